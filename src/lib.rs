//! forkdisk: a block-level copy-on-write snapshot store.
#![doc = ""]

pub mod base;
pub mod chain;
pub mod disk;
pub mod error;
pub mod format;
pub mod io;
pub mod layer;
pub mod map;
pub mod store;
pub mod units;
