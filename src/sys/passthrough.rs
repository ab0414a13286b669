//! Files that the kernel reads by itself in the place of a FUSE file (`FUSE_PASSTHROUGH`, Linux 6.9).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

// From `linux/fuse.h`.
const FUSE_DEV_IOC_BACKING_OPEN: libc::Ioctl = 0x4010_e501;
const FUSE_DEV_IOC_BACKING_CLOSE: libc::Ioctl = 0x4004_e502;

#[repr(C)]
struct FuseBackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// Makes `file` known to the session behind `fuse`, and returns the number that an answer to OPEN names it by. The number belongs to the mount: it
/// outlives this process. Needs `CAP_SYS_ADMIN`. Whoever opens the FUSE file opens `file` with the same flags, whatever the descriptor allows.
pub fn open(fuse: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<u32> {
    let map = FuseBackingMap {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    // SAFETY: both descriptors are open; the request reads a structure of 16 bytes (its number says so) and keeps no pointer.
    let id = unsafe { libc::ioctl(fuse.as_raw_fd(), FUSE_DEV_IOC_BACKING_OPEN, &raw const map) };
    u32::try_from(id).map_err(|_| io::Error::last_os_error())
}

/// Gives the number back. Those who have the file open go on.
pub fn close(fuse: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open; the request reads a number of four bytes and keeps no pointer.
    let r = unsafe { libc::ioctl(fuse.as_raw_fd(), FUSE_DEV_IOC_BACKING_CLOSE, &raw const id) };
    match r {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
