//! forkdisk: a block-level copy-on-write snapshot store.
#![doc = ""]

pub mod cli;
pub mod convert;
pub mod daemon;
pub mod disk;
pub mod doctor;
pub mod error;
pub mod io;
pub mod store;
pub mod sys;
pub mod units;
