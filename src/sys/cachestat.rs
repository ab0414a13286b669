//! How much of a file is in the page cache (Linux 6.5).

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// The number of `cachestat(2)`: the same on all architectures.
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of `linux/mman.h`.
#[repr(C)]
struct Range {
    off: u64,
    len: u64,
}

/// `struct cachestat` of `linux/mman.h`.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes of a file, or of a block device's own cache, that are in memory.
pub fn cached(file: impl AsFd) -> io::Result<u64> {
    // A length of zero is "to the end".
    let range = Range { off: 0, len: 0 };
    let mut stat = Stat::default();
    // SAFETY: cachestat reads one `struct cachestat_range` and writes one `struct cachestat`, whose layouts the two have; both live
    // for the whole call.
    let r = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_fd().as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0 as libc::c_uint,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.cache * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1; 300_000]).unwrap();
        match cached(std::fs::File::open(&path).unwrap()) {
            // Whole pages; and a memory filesystem has nothing else.
            Ok(bytes) => assert!(bytes >= 300_000, "{bytes}"),
            Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOSYS), "{e}"),
        }
    }
}
