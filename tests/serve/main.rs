//! Disks served as files and attached as loop devices, with the real kernel. Needs root; without it each
//! test says so and passes.
//!

mod device;
mod disks;
mod file;
#[path = "../common/namespace.rs"]
mod namespace;
mod nbd;
#[path = "../common/nbd.rs"]
mod nbd_client;
mod passthrough;
mod rig;
mod ring;
mod takeover;
#[path = "../common/uring.rs"]
mod uring;
