//! Requests by read(2) from `/dev/fuse`, answers by write(2): the transport that every kernel has, and that a successor can take over.
//!
//! Each worker blocks in read(2) with a buffer of its own, serves what it got, and answers with one write(2). As many are at work as there are processors, and one more: others would only
//! take turns with them, and each turn costs as much as a small request. One that is about to wait for a disk says so, and
//! another one takes its place, so as many requests wait for disks as are in flight, up to a limit. Not all
//! waits are announced (for a lock, for memory, for a host that throttles): while all are at work a watch looks whether requests are
//! still taken, and calls others if not.
//!
//! Always true: a buffer belongs to one request at a time, and never leaves its worker.

use super::{
    abi,
    begun::{self, Begun, Left},
    ops::{Message, Reply, Service},
    session::{MAX_DATA, Options, readable},
};
use crate::{
    error::{Error, Kind, Result},
    serve::crew::{Crew, Ended, Woken},
    sys::blocking::{self, Attendant},
};
use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::io::Errno;
use std::{
    cell::Cell,
    num::NonZero,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        },
    },
    thread,
    time::Duration,
};
use zerocopy::{FromBytes, IntoBytes};

/// Workers above the number to keep end when they rested for so long: starting and
/// ending threads at every change of load would cost more than they do.
const SURPLUS_AGE: Duration = Duration::from_secs(5);

/// How often the watch looks, and after how many looks at workers without work it ends.
const LOOK: Duration = Duration::from_millis(1);
const QUIET: u32 = 50;

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
    /// So many are at work at most, as far as they do not wait.
    limit: usize,
    /// Workers that wait for a request or are about to.
    idle: AtomicUsize,
    /// Those, and the ones that serve one and do not wait for a disk.
    active: AtomicUsize,
    /// All of them.
    threads: AtomicUsize,
    /// Requests that were taken.
    taken: AtomicU64,
    /// Is there a watch?
    watched: AtomicBool,
    begun: Begun,
}

/// What a new worker does at first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Works,
    Rests,
    /// Finishes reads that others began; it is counted as one who does.
    Finishes,
}

thread_local! {
    /// This worker finishes what others began: it is none of those at work, and that it waits is no news.
    static FINISHES: Cell<bool> = const { Cell::new(false) };
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
            limit: (thread::available_parallelism().map_or(2, NonZero::get) + 1)
                .min(options.max_threads),
            idle: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            begun: Begun::new(),
        });
        for n in 0..options.keep_threads.clamp(1, options.max_threads) {
            pool.start_worker(match n < pool.limit {
                true => First::Works,
                false => First::Rests,
            })?;
        }
        Ok(())
    }

    /// Starts one worker. One that works counts as idle from now on, so that no other is started in its place.
    fn start_worker(self: &Arc<Pool>, first: First) -> Result<()> {
        let mut buffer = Buffer::new()?;
        self.threads.fetch_add(1, AcqRel);
        if first == First::Works {
            self.enters();
        }
        let pool = Arc::clone(self);
        let started = self.crew.start("fuse-worker", move || {
            blocking::attend(Arc::new(Arc::clone(&pool)));
            if first == First::Finishes {
                pool.finish_apart(&mut buffer);
            }
            let ended = match first != First::Works && !pool.rest(&mut buffer) {
                true => None,
                false => pool.work(buffer),
            };
            pool.threads.fetch_sub(1, AcqRel);
            ended
        });
        if started.is_err() {
            self.threads.fetch_sub(1, AcqRel);
            if first == First::Works {
                self.leaves();
            }
        }
        started
    }

    /// One more waits for requests.
    fn enters(&self) {
        self.active.fetch_add(1, AcqRel);
        self.idle.fetch_add(1, AcqRel);
    }
    /// One that waited for requests does so no longer, nor serves any.
    fn leaves(&self) {
        self.idle.fetch_sub(1, AcqRel);
        self.active.fetch_sub(1, AcqRel);
    }

    /// One more is to wait for requests: one that rests, or, if the limit allows, a new one. Says whether there was any.
    fn more(self: &Arc<Pool>) -> bool {
        self.enters();
        if self.crew.call() {
            return true;
        }
        self.leaves();
        self.one_more_thread(First::Works)
    }
    /// A new worker, if the limit allows. Says whether there is one.
    fn one_more_thread(self: &Arc<Pool>, first: First) -> bool {
        if self.threads.load(Acquire) >= self.options.max_threads {
            return false;
        }
        let started = self.start_worker(first);
        if let Err(e) = &started
            && self.service.may_log()
        {
            tracing::warn!("requests have to wait: {e}");
        }
        started.is_ok()
    }

    /// Nobody waits for requests.
    fn is_busy(self: &Arc<Pool>) {
        if self.active.load(Acquire) < self.limit {
            self.more();
        } else if self.options.max_threads > self.limit {
            self.begin_watch();
        }
    }

    fn begin_watch(self: &Arc<Pool>) {
        if self.watched.load(SeqCst) || self.watched.swap(true, AcqRel) {
            return;
        }
        let pool = Arc::clone(self);
        let started = self.crew.start_beside("fuse-watch", move || {
            pool.watch();
            None
        });
        if started.is_err() {
            self.watched.store(false, Relaxed);
        }
    }

    /// While all are at work: calls others when no request is taken for a while, and twice as many each time.
    fn watch(self: &Arc<Pool>) {
        let (mut last, mut calls, mut quiet) = (0, 1, 0);
        while !self.crew.is_over() {
            thread::sleep(LOOK);
            if self.begun.look(|| self.crew.call()) == Left::Finisher
                && !self.one_more_thread(First::Finishes)
            {
                self.begun.is_not_started();
            }
            let (taken, busy) = (self.taken.load(Relaxed), self.idle.load(Acquire) == 0);
            calls = match busy && taken == last {
                true => (0..calls).take_while(|_| self.more()).count().max(1) * 2,
                false => 1,
            };
            quiet = match busy || self.begun.is_any() {
                true => 0,
                false => quiet + 1,
            };
            last = taken;
            if quiet > QUIET {
                // Whoever comes now sees that there is none, or is seen.
                self.watched.store(false, SeqCst);
                let calm = self.idle.load(SeqCst) > 0 && !self.begun.is_any();
                if calm || self.watched.swap(true, AcqRel) {
                    return;
                }
            }
        }
    }

    /// Begins a read that would have to wait for the disk, and leaves it to others. Not if there is nothing to wait for, or it is no such request.
    fn leaves_to_others(self: &Arc<Pool>, buffer: &mut Buffer, n: usize) -> bool {
        let Some(head) = self.begun.head(&buffer.request()[..n]) else {
            return false;
        };
        // To look for it may take longer than it should, as it may to wait for it.
        if self.options.max_threads > self.limit {
            self.begin_watch();
        }
        if !self.service.begin_read(head) {
            self.begun.nothing();
            return false;
        }
        match self.begun.leave(head, || self.crew.call()) {
            Left::Nothing => {}
            Left::Finisher if self.one_more_thread(First::Finishes) => {}
            Left::Finisher => {
                self.is_busy();
                self.finish(buffer);
            }
            Left::All => return false,
        }
        self.begin_watch();
        true
    }
    /// Serves what others began, until nothing is left of that. This worker was counted as one who does so.
    fn finish(&self, buffer: &mut Buffer) {
        while let Some(head) = self.begun.next() {
            buffer.request_mut()[..begun::HEAD].copy_from_slice(&head);
            self.serve(buffer, begun::HEAD);
            self.begun.answered();
        }
    }

    /// The same of a worker that is none of those at work.
    fn finish_apart(&self, buffer: &mut Buffer) {
        FINISHES.set(true);
        self.finish(buffer);
        FINISHES.set(false);
    }

    /// Until this worker is needed; false: it never is.
    fn rest(&self, buffer: &mut Buffer) -> bool {
        loop {
            let one_too_many = self.threads.load(Acquire) > self.options.keep_threads;
            match self.crew.rest(one_too_many.then_some(SURPLUS_AGE)) {
                Woken::Called if self.begun.is_called() => self.finish_apart(buffer),
                Woken::Called => return true,
                Woken::Stopping => return false,
                Woken::Late => {
                    let fewer = |n: usize| (n > self.options.keep_threads.max(1)).then(|| n - 1);
                    // Its starter takes it off once more.
                    if self.threads.fetch_update(AcqRel, Acquire, fewer).is_ok() {
                        self.threads.fetch_add(1, AcqRel);
                        return false;
                    }
                }
            }
        }
    }

    /// Are there as many at work without this one as there may be? Then it is none of them any more.
    fn steps_back(&self) -> bool {
        let fewer = |n: usize| (n > self.limit).then(|| n - 1);
        self.active.load(Relaxed) > self.limit
            && self.active.fetch_update(AcqRel, Acquire, fewer).is_ok()
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
            self.taken.fetch_add(1, Relaxed);
            let last = self.idle.fetch_sub(1, AcqRel) == 1;
            let left = (last || self.begun.is_any()) && self.leaves_to_others(&mut buffer, n);
            if !left {
                if last {
                    self.is_busy();
                }
                self.serve(&mut buffer, n);
            }
            if self.steps_back() {
                if !self.rest(&mut buffer) {
                    self.last(&mut buffer);
                    return None;
                }
            } else {
                self.idle.fetch_add(1, AcqRel);
            }
        };
        self.leaves();
        self.last(&mut buffer);
        ended
    }
    /// A worker ends: what it took and began is answered before, by whomever.
    fn last(&self, buffer: &mut Buffer) {
        self.begun.ends();
        self.finish_apart(buffer);
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
        let Some(Reply { error, len, left }) = reply else {
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
        if let Some(left) = left {
            self.service.finish(left);
        }
    }
}

impl Attendant for Arc<Pool> {
    fn waits(&self) {
        if FINISHES.get() {
            return;
        }
        self.active.fetch_sub(1, AcqRel);
        if self.idle.load(Acquire) == 0 {
            self.begun.waits();
            self.more();
        }
    }
    fn goes_on(&self) {
        if !FINISHES.get() {
            self.active.fetch_add(1, AcqRel);
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
