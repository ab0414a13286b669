//! forkdisk: a block-level copy-on-write snapshot store.
#![doc = ""]

pub mod attach;
pub mod disk;
pub mod error;
pub mod io;
pub mod serve;
pub mod store;
pub mod sys;
pub mod units;
