//! How things look: apart from doing them.

pub mod error;
pub mod json;
pub mod size;
pub mod table;
pub mod time;
pub mod tree;
