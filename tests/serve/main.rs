//! Disks served as files and attached as loop devices, with the real kernel. Needs root; without it each
//! test says so and passes.
//!
//! `cargo test --release --test serve -- --ignored --nocapture figures` prints the transport's cost.

mod device;
mod disks;
mod figures;
mod file;
mod rig;
mod takeover;
