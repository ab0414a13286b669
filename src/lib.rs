//! forkdisk: a block-level copy-on-write snapshot store.
//!
//! Layers are thin block maps over a shared base image file; a write allocates private blocks; the result is a virtual disk, shown
//! as a file and attached as a loop device. Start at [`store::Store`]; [`disk::Disk`] is what everything above the engine knows.
//!
//! Modules call only downward; a test reads the sources and fails on an upward arrow.

pub mod attach;
pub mod base;
pub mod bench;
pub mod chain;
pub mod check;
pub mod cli;
pub mod convert;
pub mod daemon;
pub mod disk;
pub mod doctor;
pub mod error;
pub mod format;
pub mod io;
pub mod layer;
pub mod map;
pub mod serve;
pub mod store;
pub mod sync;
pub mod sys;
pub mod units;
