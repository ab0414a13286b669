//! What the page cache holds of a file: `cachestat(2)`, Linux 6.5.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pages of a range of a file, of 4 KiB each.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct CacheStat {
    /// In memory.
    pub cached: u64,
    /// Changed there and not on their way to the disk.
    pub dirty: u64,
    /// On their way to the disk.
    pub writeback: u64,
    /// Were in memory once.
    pub evicted: u64,
    /// Of these, those that went a short time ago.
    pub recently_evicted: u64,
}

#[repr(C)]
struct CacheStatRange {
    off: u64,
    len: u64,
}

/// The number of the call, the same on all architectures.
const SYS_CACHESTAT: libc::c_long = 451;

/// Pages of `at..at+len`; a length of 0 means to the end. Fails with `ENOSYS` before Linux 6.5.
pub fn cachestat(fd: BorrowedFd<'_>, at: u64, len: u64) -> io::Result<CacheStat> {
    let range = CacheStatRange { off: at, len };
    let mut stat = CacheStat::default();
    // SAFETY: the descriptor is open while it is borrowed; both pointers are to structures of the layout that the kernel's
    // interface has had since it exists (include/uapi/linux/mman.h), which live until the call returns.
    let done = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    match done {
        0 => Ok(stat),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn written_pages_are_in_the_cache() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 20 * 4096]).unwrap();
        match cachestat(file.as_fd(), 4096, 10 * 4096) {
            Ok(stat) => assert_eq!(stat.cached, 10),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOSYS)),
        }
    }
}
