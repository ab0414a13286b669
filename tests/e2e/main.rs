//! The real binary, as a user runs it, on real loop devices and filesystems. Needs root; without it each
//! test says so and passes. Whatever a test makes is its own: a store in a temporary directory, whose daemon,
//! devices and mounts are taken away at the end, however it ends.
#![allow(missing_docs, reason = "a test")]

mod attach;
mod bench;
mod busy;
mod change;
mod daemon;
mod damage;
mod dead;
mod failing;
mod figures;
mod files;
mod flow;
mod full;
mod history;
mod import;
mod layers;
mod live;
mod memory;
mod names;
#[path = "../common/namespace.rs"]
mod namespace;
mod nbd;
#[allow(dead_code, reason = "tests/serve needs more of it")]
#[path = "../common/nbd.rs"]
mod nbd_client;
mod places;
mod qcow2;
mod races;
mod rig;
mod security;
mod space;
mod stats;
mod stream;
mod survive;
mod transport;
#[path = "../common/uring.rs"]
mod uring;
mod users;
