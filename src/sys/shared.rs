//! Memory that outlives the process that writes to it: a memfd, mapped in parts.
//!
//! Whoever else holds the descriptor finds there, after the death of the writer, every store that the writer had made. The file can
//! grow but never shrink, so that an access within a mapping never fails.

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A new memfd of length 0, sealed against shrinking.
pub fn create(name: &str) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK)?;
    Ok(File::from(fd))
}

/// Can `file` not shrink under a mapping?
pub fn is_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|s| s.contains(SealFlags::SHRINK))
}

/// A mapped part of such a file, or memory of this process alone.
///
/// Accesses are copies and single stores; who may touch which bytes when is the business of the user.
pub struct SharedMemory {
    map: MmapRaw,
    /// The file and where in it this begins. All mappings of a file share one descriptor: there are thousands.
    file: Option<(Arc<File>, u64)>,
}

impl SharedMemory {
    /// Zeros that end with this process. Takes memory only where it is touched.
    pub fn private(len: usize) -> io::Result<SharedMemory> {
        let map: MmapMut = MmapOptions::new().len(len).no_reserve_swap().map_anon()?;
        Ok(SharedMemory {
            map: map.into(),
            file: None,
        })
    }
    /// The bytes `at..at+len` of a file from [`create`], which is made longer if need be. `at` is a multiple of the page size.
    pub fn map(file: &Arc<File>, at: u64, len: usize) -> io::Result<SharedMemory> {
        if !is_sealed(file) {
            return Err(io::Error::other("the memory could shrink"));
        }
        if file.metadata()?.len() < at + len as u64 {
            file.set_len(at + len as u64)?;
        }
        let map = MmapOptions::new().offset(at).len(len).map_raw(&**file)?;
        Ok(SharedMemory {
            map,
            file: Some((file.clone(), at)),
        })
    }
    fn check(&self, at: usize, len: usize, align: usize) {
        assert!(
            at.is_multiple_of(align)
                && at.checked_add(len).is_some_and(|end| end <= self.map.len()),
            "{len} bytes at {at} are outside of the shared memory"
        );
    }
    /// Copies bytes out.
    pub fn read(&self, at: usize, buf: &mut [u8]) {
        self.check(at, buf.len(), 1);
        // SAFETY: the source is within the mapping (checked), which lives as long as `self` and whose file cannot shrink; `buf` is memory
        // of ours and cannot overlap it.
        unsafe {
            std::ptr::copy_nonoverlapping(self.map.as_ptr().add(at), buf.as_mut_ptr(), buf.len());
        }
    }
    /// Copies bytes in.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        self.check(at, bytes.len(), 1);
        // SAFETY: the target is within the mapping (checked), which is writable, lives as long as `self` and whose file cannot shrink;
        // `bytes` is memory of ours and cannot overlap it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.map.as_mut_ptr().add(at),
                bytes.len(),
            );
        }
    }
    /// One store of a number at a multiple of 8, after all stores before it.
    pub fn store(&self, at: usize, value: u64) {
        self.check(at, 8, 8);
        // SAFETY: within the mapping and aligned (checked: a mapping begins at a page); any bytes are a valid u64.
        let place = unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) };
        place.store(value.to_le(), Ordering::Release);
    }
    /// The inverse of [`SharedMemory::store`].
    pub fn load(&self, at: usize) -> u64 {
        self.check(at, 8, 8);
        // SAFETY: as in `store`.
        let place = unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) };
        u64::from_le(place.load(Ordering::Acquire))
    }
    /// One store of a small number at a multiple of 4.
    pub fn store_small(&self, at: usize, value: u32) {
        self.check(at, 4, 4);
        // SAFETY: within the mapping and aligned (checked); any bytes are a valid u32.
        let place = unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(at).cast()) };
        place.store(value.to_le(), Ordering::Release);
    }
    /// Gives the memory of a range back, where that can be done; it reads as zeros then.
    pub fn give_back(&self, at: usize, len: usize) {
        self.check(at, len, 1);
        if let Some((file, start)) = &self.file {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(file, flags, start + at as u64, len as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_stores_another_finds() {
        let file = Arc::new(create("test").unwrap());
        let page = rustix::param::page_size();
        let a = SharedMemory::map(&file, page as u64, 2 * page).unwrap();
        a.write(3, b"bytes");
        a.store(16, 0x0102_0304_0506_0708);
        a.store_small(24, 7);
        drop(a);
        let b = SharedMemory::map(&file, page as u64, page).unwrap();
        let _c = SharedMemory::map(&file, 0, page).unwrap();
        assert_eq!(Arc::strong_count(&file), 3, "one descriptor for all");
        let mut found = [0; 5];
        b.read(3, &mut found);
        assert_eq!(&found, b"bytes");
        assert_eq!(b.load(16), 0x0102_0304_0506_0708);
        assert_eq!(b.load(24), 7);
        b.give_back(0, page);
        assert_eq!(b.load(16), 0);
    }

    #[test]
    fn it_cannot_shrink() {
        let file = create("test").unwrap();
        file.set_len(8192).unwrap();
        assert!(file.set_len(4096).is_err());
        let plain = Arc::new(tempfile::tempfile().unwrap());
        assert!(SharedMemory::map(&plain, 0, 4096).is_err());
    }

    #[test]
    #[should_panic(expected = "outside")]
    fn nothing_is_touched_outside() {
        SharedMemory::private(4096).unwrap().store(4096, 1);
    }
}
