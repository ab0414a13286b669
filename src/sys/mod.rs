//! What the operating system offers beyond files: loop devices, mounts, processes, descriptor passing.
//!
//! Earth: this floor knows nothing of disks, layers or stores. Everything here is Linux, and each
//! function is one thing the kernel does, with the kernel's races and delays taken care of.

pub mod blockdev;
pub mod blocking;
pub mod cachestat;
pub mod cgroup;
pub mod fdpass;
pub mod fiemap;
pub mod freeze;
pub mod holders;
pub mod idle;
pub mod latency;
pub mod loopdev;
pub mod mounts;
pub mod passthrough;
pub mod private;
pub mod probe;
pub mod process;
pub mod shared;
pub mod signals;
pub mod unseen;
pub mod uring;
