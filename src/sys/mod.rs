//! The system calls that no safe library offers, each in a small safe shape.

pub mod freeze;
pub mod idle;
pub mod mounts;
pub mod signals;
