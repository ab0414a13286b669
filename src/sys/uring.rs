//! One entry of FUSE over io_uring: a ring of the kernel (`io_uring(7)`) with one command on it, and the memory that requests come into.
//!
//! Always true:
//! - the kernel writes to the memory only while the thread is inside [`Entry::wait`] (deferred task work): between two calls it is ours alone;
//! - the memory outlives the ring.

use io_uring::{IoUring, cqueue, opcode, squeue::Entry128, types::Fd};
use memmap2::{Advice, MmapMut, MmapOptions};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

/// Commands, from `linux/fuse.h`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// From `linux/io_uring.h`. The second one: not to count as a thread that waits for a disk (Linux 6.15), or an idle server would
/// look as if it did nothing else.
const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// Where the length stands in a submission, in units of four bytes.
const SQE_LEN: usize = 6;
const _: () = assert!(size_of::<Entry128>() == 128);

/// `/dev/fuse`.
const FUSE: (u32, u32) = (10, 229);

/// The first page of the memory: the head, and behind it the addresses of head and data for the kernel.
const PAGE: usize = 4096;
const VECTORS: usize = PAGE - size_of::<[libc::iovec; 2]>();

/// One entry of a queue. It belongs to the thread that made it.
pub struct Entry {
    // Dropped first: fields go in this order.
    ring: IoUring<Entry128, cqueue::Entry>,
    fd: Arc<OwnedFd>,
    qid: u16,
    memory: Memory,
}

/// Memory for one entry: a head, and page-aligned data.
pub struct Memory {
    map: MmapMut,
    head: usize,
}

impl Memory {
    /// `head` bytes for what is fixed, at most half a page, and `data` bytes for the rest. `resident`: all of it is in memory from the start and stays
    /// there, if that is allowed; else it takes address space alone until it is used.
    pub fn new(head: usize, data: usize, resident: bool) -> io::Result<Memory> {
        let mut options = MmapOptions::new();
        options.len(PAGE + data);
        if resident {
            options.populate();
        }
        let map = options.map_anon()?;
        if resident {
            let _ = map.lock();
        }
        let _ = map.advise(Advice::DontFork);
        let _ = map.advise(Advice::NoHugePage);
        let head = head.min(PAGE / 2);
        Ok(Memory { map, head })
    }
    /// The head.
    pub fn head(&mut self) -> &mut [u8] {
        &mut self.map[..self.head]
    }
    /// The data.
    pub fn data(&self) -> &[u8] {
        &self.map[PAGE..]
    }
    /// The data, and the head before it.
    pub fn parts(&mut self) -> (&mut [u8], &mut [u8]) {
        let (page, data) = self.map.split_at_mut(PAGE);
        (&mut page[..self.head], data)
    }
}

impl Entry {
    /// An entry for queue `qid` of the session behind `fd`, which must be `/dev/fuse`.
    pub fn new(fd: Arc<OwnedFd>, qid: u16, memory: Memory) -> io::Result<Entry> {
        let device = rustix::fs::fstat(&fd)?.st_rdev;
        if (rustix::fs::major(device), rustix::fs::minor(device)) != FUSE {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .dontfork()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(1)?;
        Ok(Entry {
            ring,
            fd,
            qid,
            memory,
        })
    }
    /// The memory, with the last request in it, or the answer to it.
    pub fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }
    /// Offers the entry to the kernel.
    pub fn register(&mut self) -> io::Result<()> {
        let (page, data) = self.memory.map.split_at_mut(PAGE);
        let vectors = [
            (page.as_mut_ptr() as usize, self.memory.head),
            (data.as_mut_ptr() as usize, data.len()),
        ];
        let words = vectors.map(|(at, len)| [at.to_ne_bytes(), len.to_ne_bytes()]);
        for (place, word) in page[VECTORS..]
            .chunks_exact_mut(size_of::<usize>())
            .zip(words.as_flattened())
        {
            place.copy_from_slice(word);
        }
        let vectors = page[VECTORS..].as_ptr() as u64;
        self.push(REGISTER, 0, Some(vectors))
    }
    /// Tells the kernel that the answer to request `id` is in the memory, and offers the entry again.
    pub fn answer(&mut self, id: u64) -> io::Result<()> {
        self.push(COMMIT_AND_FETCH, id, None)
    }
    fn push(&mut self, operation: u32, id: u64, vectors: Option<u64>) -> io::Result<()> {
        let mut argument = [0; 80];
        argument[8..16].copy_from_slice(&id.to_ne_bytes());
        argument[16..18].copy_from_slice(&self.qid.to_ne_bytes());
        let mut entry = opcode::UringCmd80::new(Fd(self.fd.as_raw_fd()), operation)
            .cmd(argument)
            .addr(vectors)
            .build();
        if vectors.is_some() {
            let words = (&raw mut entry).cast::<u32>();
            // SAFETY: the library copies this value of 128 bytes (`repr(C)`) to the ring as it is, so it is the kernel's structure, whose length of
            // type u32 stands at byte 24. The library has no way to set it for this kind of command.
            unsafe { words.add(SQE_LEN).write(2) };
        }
        // SAFETY: the descriptor is `/dev/fuse` and stays open as long as the ring, as does the only memory that its commands name. The kernel
        // writes to it only while this thread is inside `wait`, which has the entry for itself alone.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the ring is full"))
    }
    /// Hands over what was pushed, and waits for a request, or for a signal: then there may be nothing to take.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }
    /// Hands over what was pushed.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }
    fn enter(&mut self, answers: u32) -> io::Result<()> {
        let pushed = self.ring.submission().len() as u32;
        let flags = ENTER_GETEVENTS | ENTER_NO_IOWAIT;
        // SAFETY: these flags take no argument.
        unsafe {
            self.ring
                .submitter()
                .enter::<()>(pushed, answers, flags, None)
        }?;
        Ok(())
    }
    /// What came: `Ok` with a request in the memory, or why the entry serves no more.
    pub fn take(&mut self) -> Option<io::Result<()>> {
        let answer = self.ring.completion().next()?.result();
        Some(match answer {
            0.. => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fuse_gets_commands() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let memory = Memory::new(288, 1 << 20, false).unwrap();
        let e = Entry::new(Arc::new(file), 0, memory).err().unwrap();
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn data_begins_on_a_page_and_the_head_is_as_long_as_asked() {
        let mut memory = Memory::new(288, 1 << 20, true).unwrap();
        assert_eq!(memory.data().as_ptr() as usize % PAGE, 0);
        let (head, data) = memory.parts();
        assert_eq!((head.len(), data.len()), (288, 1 << 20));
    }
}
