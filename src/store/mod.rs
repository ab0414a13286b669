//! Names, bases, layers, references.

pub mod stub;
pub mod types;
pub use stub::*;
pub use types::*;
