//! Requests by read(2) from `/dev/fuse`, answers by write(2): the transport that every kernel has, and that a successor can take over.
//!
//! Each worker blocks in read(2) with a buffer of its own, serves what it got from beginning to end,
//! and answers with one write(2). A worker that takes a request and leaves no other waiting starts one
//! more, so as many requests are in service as are in flight, up to a limit.
//!
//! Always true: a buffer belongs to one request at a time, and never leaves its worker.

use super::{
    abi,
    crew::Crew,
    ops::{Message, Reply, Service},
    session::{Ended, MAX_DATA, Options, readable},
};
use crate::error::{Error, Kind, Result};
use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::io::Errno;
use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    time::{Duration, Instant},
};
use zerocopy::{FromBytes, IntoBytes};

/// Idle workers above the number to keep end only after this long without need for more: starting and
/// ending threads at every change of load would cost more than they do.
const SURPLUS_AGE: Duration = Duration::from_secs(5);

/// Where data begins in a [`Buffer`]: on a page, whatever stands before it.
const DATA: usize = 4096;
/// What follows the largest data: names and small structures need no more than it either.
const SLACK: usize = 4096;

/// Memory of one worker, laid out so that data is page-aligned both in a WRITE request and in the
/// answer to a READ, and both are one piece with their headers.
pub(super) struct Buffer {
    map: MmapMut,
}

impl Buffer {
    /// All of it is in memory from the start, and stays there. Not for speed: a killed process can no
    /// longer take a page fault, and the kernel fails a request that it was just handing over to a missing
    /// page. The same for pages that a fork made read-only. With its pages in place, a death at that
    /// moment costs nothing: the request is among those that are sent again.
    pub(super) fn new() -> Result<Buffer> {
        let map = MmapOptions::new()
            .len(DATA + MAX_DATA + SLACK)
            .populate()
            .map_anon()
            .map_err(|e| Error::new(Kind::Io, format!("cannot allocate a request buffer: {e}")))?;
        // Best effort: users without root may lock little memory.
        let _ = map.lock();
        let _ = map.advise(Advice::DontFork);
        // Nor are its pages taken away for a moment to be made one large page.
        let _ = map.advise(Advice::NoHugePage);
        Ok(Buffer { map })
    }
    /// The whole request.
    pub(super) fn request(&self) -> &[u8] {
        &self.map[DATA - abi::WRITE_HEAD..]
    }
    pub(super) fn request_mut(&mut self) -> &mut [u8] {
        &mut self.map[DATA - abi::WRITE_HEAD..]
    }
    /// The data of a WRITE request, and the body of an answer: the same place.
    pub(super) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.map[DATA..DATA + MAX_DATA]
    }
    /// Puts a header before the first `len` bytes of the body and returns the whole answer.
    pub(super) fn answer(&mut self, unique: u64, error: i32, len: usize) -> &[u8] {
        let header = abi::OutHeader {
            len: (abi::OUT_HEADER + len) as u32,
            error,
            unique,
        };
        self.map[DATA - abi::OUT_HEADER..DATA].copy_from_slice(header.as_bytes());
        &self.map[DATA - abi::OUT_HEADER..DATA + len]
    }
}

/// A request in the first bytes of a buffer, and the room for its answer.
struct Taken<'a> {
    buffer: &'a mut Buffer,
    len: usize,
}

impl Message for Taken<'_> {
    fn fixed(&self) -> &[u8] {
        self.rest(0)
    }
    fn rest(&self, fixed: usize) -> &[u8] {
        let start = abi::IN_HEADER + fixed;
        &self.buffer.request()[start..self.len.max(start)]
    }
    fn room(&mut self) -> &mut [u8] {
        self.buffer.data_mut()
    }
}

/// The workers that read one descriptor.
pub(super) struct Pool {
    fd: Arc<OwnedFd>,
    service: Arc<Service>,
    crew: Arc<Crew>,
    options: Options,
    /// Workers that wait for a request or are about to.
    idle: AtomicUsize,
    threads: AtomicUsize,
    started: Instant,
    /// When the pool last had to grow, in milliseconds since `started`.
    grown_at: AtomicU64,
}

impl Pool {
    /// Begins to serve. If that fails, some workers may have started: the crew ends them.
    pub(super) fn start(
        fd: Arc<OwnedFd>,
        service: Arc<Service>,
        crew: Arc<Crew>,
        options: Options,
    ) -> Result<()> {
        let options = Options {
            max_threads: options.max_threads.max(1),
            ..options
        };
        let pool = Arc::new(Pool {
            fd,
            service,
            crew,
            options,
            idle: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            started: Instant::now(),
            grown_at: AtomicU64::new(0),
        });
        for _ in 0..options.keep_threads.clamp(1, options.max_threads) {
            pool.start_worker()?;
        }
        Ok(())
    }

    /// Starts one worker; it counts as idle from now on, so that no other is started in its place.
    fn start_worker(self: &Arc<Pool>) -> Result<()> {
        let buffer = Buffer::new()?;
        self.idle.fetch_add(1, AcqRel);
        self.threads.fetch_add(1, AcqRel);
        let pool = Arc::clone(self);
        let started = self.crew.start("fuse-worker", move || {
            let ended = pool.work(buffer);
            pool.threads.fetch_sub(1, AcqRel);
            ended
        });
        if started.is_err() {
            self.idle.fetch_sub(1, AcqRel);
            self.threads.fetch_sub(1, AcqRel);
        }
        started
    }

    fn millis(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// No reader is left: one more, if the limit allows.
    fn grow(self: &Arc<Pool>) {
        self.grown_at.store(self.millis(), Relaxed);
        if self.threads.load(Acquire) >= self.options.max_threads {
            return;
        }
        if let Err(e) = self.start_worker()
            && self.service.may_log()
        {
            tracing::warn!("requests have to wait: {e}");
        }
    }

    /// Is this worker, idle again, one too many?
    fn surplus(&self, idle_before: usize) -> bool {
        idle_before >= self.options.keep_threads.max(1)
            && self.millis().saturating_sub(self.grown_at.load(Relaxed))
                > SURPLUS_AGE.as_millis() as u64
    }

    fn work(self: &Arc<Pool>, mut buffer: Buffer) -> Option<Ended> {
        let ended = loop {
            if self.crew.is_stopping() {
                break None;
            }
            let n = match rustix::io::read(&self.fd, buffer.request_mut()) {
                Ok(n) => n,
                // NOENT: the request was withdrawn while it was handed over.
                Err(Errno::INTR | Errno::NOENT) => continue,
                Err(Errno::AGAIN) => {
                    // Somebody made the descriptor non-blocking.
                    readable(&self.fd, Duration::from_millis(100));
                    continue;
                }
                Err(Errno::NODEV | Errno::CONNABORTED) => break Some(Ended::Unmounted),
                Err(e) => {
                    tracing::error!("reading from /dev/fuse failed: {e}");
                    break Some(Ended::Failed(e.raw_os_error()));
                }
            };
            if self.idle.fetch_sub(1, AcqRel) == 1 {
                self.grow();
            }
            self.serve(&mut buffer, n);
            let idle_before = self.idle.fetch_add(1, AcqRel);
            if self.surplus(idle_before) {
                break None;
            }
        };
        self.idle.fetch_sub(1, AcqRel);
        ended
    }

    /// Serves the request in the first `n` bytes of the buffer and answers it.
    fn serve(&self, buffer: &mut Buffer, n: usize) {
        let Ok((header, _)) = abi::InHeader::read_from_prefix(&buffer.request()[..n]) else {
            // Without a header there is nobody to answer.
            if self.service.may_log() {
                tracing::error!("a request of {n} bytes from /dev/fuse");
            }
            return;
        };
        let reply = if header.len as usize == n {
            let mut message = Taken { buffer, len: n };
            self.service.serve(&header, &mut message)
        } else {
            Some(Reply::failed(libc::EIO))
        };
        let Some(Reply {
            error,
            len,
            flushed,
        }) = reply
        else {
            return;
        };
        match rustix::io::write(&self.fd, buffer.answer(header.unique, error, len)) {
            // NOENT: whoever asked was killed meanwhile. NODEV: the mount is gone; the next read says so.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => {}
            Err(e) => {
                tracing::error!(
                    "the kernel refuses the answer to a request of kind {}: {e}",
                    header.opcode
                );
                // It must not wait for ever.
                let _ = rustix::io::write(&self.fd, buffer.answer(header.unique, -libc::EIO, 0));
            }
        }
        if let Some(ino) = flushed {
            self.service.after_flush(ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_page_aligned_and_one_piece_with_its_headers() {
        let mut buffer = Buffer::new().unwrap();
        assert_eq!(buffer.data_mut().as_ptr() as usize % 4096, 0);
        let data = buffer.data_mut().as_ptr();
        assert_eq!(buffer.request()[abi::WRITE_HEAD..].as_ptr(), data);
        // The kernel refuses to hand requests to a smaller one.
        assert!(buffer.request().len() >= abi::WRITE_HEAD + MAX_DATA);
        buffer.data_mut()[0] = 7;
        let answer = buffer.answer(1, 0, 1);
        assert_eq!((answer.len(), answer[16]), (17, 7));
    }
}
