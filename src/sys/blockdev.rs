//! Two things that are asked of the kernel about a block device and the filesystem on it: to forget what it caches of the device, and to
//! discard what the filesystem does not use.

use crate::error::{Error, Kind, Result};
use crate::sys::loopdev;
use rustix::fs::{Mode, OFlags};
use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

const BLKFLSBUF: libc::Ioctl = 0x1261;
const FITRIM: libc::Ioctl = 0xC018_5879;

/// `struct fstrim_range` of `linux/fs.h`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
    minlen: u64,
}

/// A device held exclusively: as long as this lives nobody mounts it.
pub struct Held {
    device: PathBuf,
    open: fs::File,
}

/// Holds a device exclusively; `Busy` if it is mounted, or somebody else holds it so.
pub fn hold(device: &Path) -> Result<Held> {
    let open = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_EXCL)
        .open(device)
        .map_err(|e| {
            Error::io("hold", device, &e)
                .or_hint("unmount it and stop what uses it, then try again")
        })?;
    Ok(Held {
        device: device.to_path_buf(),
        open,
    })
}

/// What failed on a loop device, or, if nothing is attached to that any more, that somebody was faster.
pub fn or_detached(device: &Path, error: Error) -> Error {
    match loopdev::backing_file(device) {
        Some(_) => error,
        None => Error::new(
            Kind::Busy,
            format!("{} was detached meanwhile", device.display()),
        )
        .hint("run it again"),
    }
}

impl Held {
    /// Writes back what the kernel caches of the device, and forgets it.
    pub fn drop_cache(&self) -> Result<()> {
        let failed = |e: io::Error| {
            or_detached(
                &self.device,
                Error::io("empty the cache of", &self.device, &e),
            )
        };
        self.open.sync_all().map_err(failed)?;
        // SAFETY: BLKFLSBUF takes no argument and touches no memory of this process.
        match unsafe { libc::ioctl(self.open.as_raw_fd(), BLKFLSBUF, 0) } {
            0 => Ok(()),
            _ => Err(failed(io::Error::last_os_error())),
        }
    }
}

/// Discards what the filesystem mounted at `dir` does not use of its bytes `start..start+len`; how many it told the device of. `None` if it has
/// no byte `start`.
pub fn trim(dir: &Path, start: u64, len: u64) -> Result<Option<u64>> {
    let open: OwnedFd = rustix::fs::open(
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Error::io("open", dir, &e.into()))?;
    let mut range = Range {
        start,
        len,
        minlen: 0,
    };
    // SAFETY: FITRIM reads and writes one `struct fstrim_range`, whose layout `Range` has.
    if unsafe { libc::ioctl(open.as_raw_fd(), FITRIM, &raw mut range) } == 0 {
        return Ok(Some(range.len));
    }
    let e = io::Error::last_os_error();
    let error = Error::io("discard what is not used of the filesystem at", dir, &e);
    Err(match e.raw_os_error() {
        Some(libc::EINVAL) if start > 0 => return Ok(None),
        Some(libc::ENOTTY | libc::EOPNOTSUPP) => error
            .with_kind(Kind::Unsupported)
            .hint("this filesystem cannot tell what it does not use"),
        _ => error,
    })
}
