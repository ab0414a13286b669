//! What of `src/sys` the core uses.

#[path = "../../src/sys/shared.rs"]
pub mod shared;
