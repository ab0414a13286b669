//! Disks as regular files of a FUSE mount, over `/dev/fuse` itself.
//!
//! Why an own session and no library: the descriptor of `/dev/fuse` outlives the server. A keeper holds
//! it, so when the server dies the mount stays, requests wait, and a new server takes the descriptor,
//! skips the greeting and asks for what was under way again ([`Init::Resumed`]).
//!
//! - [`abi`]: the protocol's numbers and structures (pure);
//! - [`mod@mount`]: makes a mount and its descriptor;
//! - [`session`]: the greeting, and the threads that take requests and answer them;
//! - `device` and `ring`: the two ways requests come; `begun`: reads that wait for the disk below, of the first;
//! - `ops`: what each request does.
//!
//! A server must never use its own mount, nor a loop device over it, from one of its own threads: if
//! it dies while the thread waits, the thread cannot end before its request is answered, the process not
//! before its thread, and a successor would wait for the process.

pub mod abi;
mod begun;
mod device;
pub mod mount;
mod ops;
mod ring;
pub mod session;

pub use mount::{mount, unmount};
pub use session::{Ended, Init, Negotiated, Options, Session, Transport};
