//! Doors: how a disk is shown to the world. They know the trait [`Disk`](crate::disk::Disk) and
//! nothing else of the house, so a new one is one new module.
//!
//! - [`files`]: the disks that are shown, by name and number, with their counters;
//! - [`fuse`]: each of them a regular file in a FUSE mount.

pub mod files;
pub mod fuse;
