//! Names, bases, layers, references.

pub mod types;
pub use types::*;
