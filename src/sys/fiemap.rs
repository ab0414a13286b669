//! Where the bytes of a file lie on the device of its filesystem.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`.
const FIEMAP: libc::Ioctl = 0xC020_660B_u32 as libc::Ioctl;

/// Filesystems whose files can have blocks in common, by their magic numbers (statfs(2)): xfs, btrfs, bcachefs.
const SHARING: [u64; 3] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e];

/// Can files of this one's filesystem have blocks in common, so that copying within the kernel takes no room?
pub fn can_share(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(file)
        .is_ok_and(|stat| SHARING.contains(&(stat.f_type as u64 & 0xffff_ffff)))
}

/// The last extent of the file.
const LAST: u32 = 0x1;
/// Extents that are nowhere, or not as they are on the device: unknown, delayed, encoded, inside an inode, packed with others.
const NOWHERE: u32 = 0x2 | 0x4 | 0x8 | 0x200 | 0x400;

/// Allocated, but never written: reads as zeros.
const UNWRITTEN: u32 = 0x800;
/// What waits to be allocated is written first.
const SYNC: u32 = 0x1;

/// Extents asked for at once.
const BATCH: usize = 128;

/// `struct fiemap_extent` of `linux/fiemap.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` of `linux/fiemap.h`, with room for extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}
const _: () = assert!(size_of::<RawExtent>() == 56);
const _: () = assert!(size_of::<Request>() == 32 + BATCH * 56);

/// A stretch of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Offset on the device, in bytes.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Calls `each` with the extents of a file, in the order of the file. What has no place of its own on the device is left out: holes, and what is
/// kept in an inode.
pub fn each_extent(file: BorrowedFd<'_>, mut each: impl FnMut(Extent)) -> io::Result<()> {
    each_raw(file, 0, u64::MAX, 0, |extent| {
        if extent.flags & NOWHERE == 0 {
            each(Extent {
                at: extent.physical,
                len: extent.length,
            });
        }
    })
}

/// Calls `each` with what was ever written of `at..at + len` of a file: offset and length, in order. Other than what `lseek(2)` calls data it does
/// not depend on what of it is in memory.
pub fn each_written(
    file: BorrowedFd<'_>,
    at: u64,
    len: u64,
    mut each: impl FnMut(u64, u64),
) -> io::Result<()> {
    let end = at.saturating_add(len);
    each_raw(file, at, end, SYNC, |extent| {
        let (from, to) = (
            extent.logical.max(at),
            extent.logical.saturating_add(extent.length).min(end),
        );
        if extent.flags & UNWRITTEN == 0 && from < to {
            each(from, to - from);
        }
    })
}

fn each_raw(
    file: BorrowedFd<'_>,
    mut start: u64,
    end: u64,
    flags: u32,
    mut each: impl FnMut(&RawExtent),
) -> io::Result<()> {
    let nothing = RawExtent {
        logical: 0,
        physical: 0,
        length: 0,
        reserved64: [0; 2],
        flags: 0,
        reserved: [0; 3],
    };
    while start < end {
        let mut request = Request {
            start,
            length: end - start,
            flags,
            mapped: 0,
            count: BATCH as u32,
            reserved: 0,
            extents: [nothing; BATCH],
        };
        // SAFETY: FS_IOC_FIEMAP reads one `struct fiemap` and writes at most `count` of the `struct fiemap_extent` behind it; both have the
        // layouts of the kernel's, `count` says how many there are, and the request lives for the whole call.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut request) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = &request.extents[..(request.mapped as usize).min(BATCH)];
        found.iter().for_each(&mut each);
        match found.last() {
            Some(last) if last.flags & LAST == 0 && last.length > 0 => {
                start = last.logical.saturating_add(last.length);
            }
            _ => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_extents_of_a_file_are_as_long_as_its_data() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1; 300_000]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        file.sync_all().unwrap();
        let mut total = 0;
        match each_extent(file.as_fd(), |e| total += e.len) {
            Ok(()) => assert!((300_000..400_000).contains(&total), "{total}"),
            // Not every filesystem knows.
            Err(e) => assert!(
                [libc::EOPNOTSUPP, libc::ENOTTY].contains(&e.raw_os_error().unwrap_or(0)),
                "{e}"
            ),
        }
    }
}
