//! What of `src/sys` the core uses.

#[path = "../../src/sys/blocking.rs"]
pub mod blocking;
#[path = "../../src/sys/fiemap.rs"]
pub mod fiemap;
#[path = "../../src/sys/shared.rs"]
pub mod shared;
