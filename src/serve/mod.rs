//! Doors: how a disk is shown to the world. They know the trait [`Disk`](crate::disk::Disk) and
//! nothing else of the house, so a new one is one new module.
//!
//! - [`files`]: the disks that are shown, by name and number, with their counters;
//! - [`awake`]: what keeps processors from sleeping while somebody waits for each request;
//! - [`fuse`]: each of them a regular file in a FUSE mount;
//! - [`nbd`]: some of them exports of a Unix socket;
//! - `crew`, `waiting`, `limit`, `depth`: what they need: threads, writes that wait for room, a log that is not flooded, a device that suits its load.

pub mod awake;
mod crew;
mod depth;
pub mod files;
pub mod fuse;
mod limit;
pub mod nbd;
mod waiting;
