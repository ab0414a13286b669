//! The daemon of a store: it owns the attached disks and shows each as a file of one FUSE mount.
//!
//! Two processes. The **keeper** (`keeper`) holds what must outlive a server: the descriptor of the mount, the listening
//! socket, the lock that makes the daemon the only one. The **server** (`server`) does everything else. Commands talk to the server
//! through a [`Client`].
//!
//! Loop devices are configured and mounted by the command, not here: each of those steps waits for requests on the served
//! file, and a process that waits for itself cannot even be killed; where nobody is left to tell a device its size, a process of its own does (`fit`). What is attached where is known from the kernel, so a command
//! that dies half-way leaves nothing that the next one does not find.

mod answers;
mod changes;
mod client;
mod conversation;
mod dead;
mod entry;
pub mod files;
mod fit;
mod handover;
mod keeper;
mod layers;
mod log;
mod metrics;
mod past;
pub mod protocol;
mod running;
mod server;
pub mod stats;

pub use client::{Client, PastOwner, TakenOver, Waiting};
pub use dead::{Dead, dead_devices};
pub use keeper::{Keep, clear_dead, keep, run, serve};

pub use crate::serve::fuse::session::Transport;

use crate::error::{Error, Kind, Result};
use crate::store::{Object, ObjectKind};
use crate::units::Id;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// How a disk is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Via {
    /// As a loop device over the file.
    Loop,
    /// As the file alone.
    File,
    /// As an export of the NBD socket (and as the file).
    Nbd,
}

impl Via {
    /// The word in JSON and on the socket.
    pub fn word(self) -> &'static str {
        match self {
            Via::Loop => "loop",
            Via::File => "file",
            Via::Nbd => "nbd",
        }
    }
}

/// What to attach, and how.
#[derive(Clone, Debug)]
pub struct AttachRequest {
    /// Name, snapshot, or beginning of an id.
    pub reference: String,
    /// Door.
    pub via: Via,
    /// Attach a disk read-only (snapshots and images always are).
    pub read_only: bool,
    /// Sector size of the loop device: 512 or 4096.
    pub block_size: u32,
    /// Let the kernel read the image by itself: only a base, and no checksum is verified.
    pub passthrough: bool,
}

/// An attached object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Name it was attached by.
    pub name: String,
    /// Id of its layer or base.
    pub id: Id,
    /// What it is.
    pub kind: ObjectKind,
    /// Can it only be read?
    pub read_only: bool,
    /// Does the kernel read it by itself?
    pub passthrough: bool,
    /// Door.
    pub via: Via,
    /// The loop device, if there is one.
    pub device: Option<String>,
    /// The file that shows it.
    pub file: PathBuf,
    /// How often it is attached: more than once only read-only.
    pub count: u32,
    /// Bytes.
    pub size: u64,
}

impl Attached {
    /// Where it is found by NBD, for `--via nbd`: as the [specification of such URIs](https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md) says.
    pub fn uri(&self) -> Option<String> {
        if self.via != Via::Nbd {
            return None;
        }
        let name = file_name(self).to_string_lossy();
        let run_dir = self.file.parent().and_then(Path::parent);
        let socket = run_dir.unwrap_or(Path::new("/")).join(NBD);
        Some(format!(
            "nbd+unix:///{}?socket={}",
            escaped(name.as_bytes(), b""),
            escaped(socket.as_os_str().as_bytes(), b"/")
        ))
    }
}

/// Bytes as they may stand in a URI: those that mean something, and are not in `kept`, by their numbers.
fn escaped(bytes: &[u8], kept: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'-' | b'.' | b'_' | b'~' | b'@' | b':' => text.push(byte.into()),
            _ if byte.is_ascii_alphanumeric() || kept.contains(&byte) => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

/// The name of the file that shows an attachment: the one it was attached by, also after it was renamed.
fn file_name(attached: &Attached) -> &std::ffi::OsStr {
    let name = std::ffi::OsStr::new(&attached.name);
    attached.file.file_name().unwrap_or(name)
}

/// Fails if an object is nothing that the kernel could read by itself.
pub fn may_pass_through(object: &Object) -> Result<()> {
    match object.kind {
        ObjectKind::Base => Ok(()),
        _ => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} cannot be attached with --passthrough: its blocks lie in layers",
                object.name
            ),
        )
        .hint("only an image that was imported is one file; attach others without --passthrough")),
    }
}

/// Where a directory is now: it may have been moved since it was opened.
fn place_of(dir: &File) -> PathBuf {
    let link = format!("/proc/self/fd/{}", dir.as_raw_fd());
    std::fs::read_link(&link).unwrap_or_else(|_| link.into())
}

/// Names of files in the run directory.
pub(crate) const SOCKET: &str = "control.sock";
pub(crate) const NBD: &str = "nbd.sock";
pub(crate) const LOCK: &str = "daemon.lock";
pub(crate) const MOUNT: &str = "disks";
pub(crate) const LOG: &str = "daemon.log";
