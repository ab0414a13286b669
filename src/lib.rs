//! forkdisk: a block-level copy-on-write snapshot store.
#![doc = ""]

pub mod disk;
pub mod error;
pub mod io;
pub mod store;
pub mod sys;
pub mod units;
