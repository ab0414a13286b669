//! The threads that read requests from `/dev/fuse` and answer them.
//!
//! Each worker blocks in read(2) with a buffer of its own, serves what it got from beginning to end,
//! and answers with one write(2). A worker that takes a request and leaves no other waiting starts one
//! more, so as many requests are in service as are in flight, up to a limit.
//!
//! Always true:
//! - a buffer belongs to one request at a time, and never leaves its worker;
//! - serving allocates nothing, and no thread here waits for memory that the kernel can only free by
//!   writing to a disk we serve ([`process::set_io_flusher`]);
//! - a request that was read is answered, whatever it holds, unless the process dies.

use super::{abi, ops};
use crate::{
    error::{Error, Kind, Result},
    serve::files::Files,
    sys::process,
};
use memmap2::{Advice, MmapMut, MmapOptions};
use parking_lot::{Condvar, Mutex};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};
use zerocopy::{FromBytes, IntoBytes};

/// Largest data of one READ or WRITE: what the kernel allows (256 pages).
pub const MAX_DATA: usize = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Requests the kernel hands out before it makes others wait, over all files. All direct I/O of loop
/// devices counts, with up to 128 requests each; the kernel's default of 12 would serialise them.
const MAX_BACKGROUND: u16 = 4096;
/// From here on the kernel calls the mount congested: three quarters, as it does by itself.
const CONGESTION: u16 = MAX_BACKGROUND / 4 * 3;
/// Idle workers above the number to keep end only after this long without need for more: starting and
/// ending threads at every change of load would cost more than they do.
const SURPLUS_AGE: Duration = Duration::from_secs(5);
/// How long a new mount may take to send its greeting.
const INIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Failures logged per second; the rest is counted. A failing disk fails thousands of requests.
const LOGGED_PER_SECOND: u64 = 10;

/// Flags we ask for. What is not here is left out on purpose: no write-back cache (a write must reach the
/// disk when it returns), no splice (the data is looked at anyway).
const WANTED: u64 = abi::init::ASYNC_READ
    | abi::init::ASYNC_DIO
    | abi::init::BIG_WRITES
    | abi::init::PARALLEL_DIROPS
    | abi::init::MAX_PAGES
    | abi::init::INIT_EXT
    | abi::init::HAS_RESEND
    | abi::init::ABORT_ERROR;

/// An environment variable that makes a kernel look like one before 6.9: to try what happens there.
const WITHOUT_RESEND: &str = "FORKDISK_WITHOUT_RESEND";

/// What a session and the kernel agreed on: all that a successor must know of the greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Negotiated {
    /// Minor version of the protocol.
    pub minor: u32,
    /// Agreed flags of INIT.
    pub flags: u64,
    /// Largest write in bytes.
    pub max_write: u32,
}

impl Negotiated {
    /// Can a successor get requests that were under way again (kernel 6.9)? Otherwise they wait for ever
    /// after a takeover.
    pub fn can_resend(&self) -> bool {
        self.flags & abi::init::HAS_RESEND != 0
    }
}

/// How a session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Init {
    /// The mount is new: the kernel's greeting is the first request.
    Fresh,
    /// An earlier session greeted. Its threads must be gone, all of them: a write that one of them still
    /// does would come after its repetition, and so after later writes.
    Resumed(Negotiated),
}

/// How many threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Most threads, and so most requests in service at one time.
    pub max_threads: usize,
    /// Threads that stay when there is little to do. Each has a buffer of 1 MiB, locked in memory.
    pub keep_threads: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_threads: 40,
            keep_threads: 8,
        }
    }
}

/// Why a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The mount is gone.
    Unmounted,
    /// [`Session::stop`] was called; the mount is still there.
    Stopped,
    /// Reading requests failed with this `errno`.
    Failed(i32),
}

/// Threads that serve one mount. Dropping it stops them, and leaves the mount to whoever holds the
/// descriptor.
pub struct Session {
    shared: Arc<Shared>,
    negotiated: Negotiated,
}

pub(super) struct Shared {
    pub(super) fd: OwnedFd,
    pub(super) files: Arc<Files>,
    pub(super) owner: (u32, u32),
    pub(super) log: LogLimit,
    options: Options,
    /// Workers that wait for a request or are about to.
    idle: AtomicUsize,
    threads: AtomicUsize,
    peak: AtomicUsize,
    started: Instant,
    /// When the pool last had to grow, in milliseconds since `started`.
    grown_at: AtomicU64,
    stopping: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Kernel's numbers of the running workers.
    workers: Vec<i32>,
    /// Workers started and not ended.
    alive: usize,
    ended: Option<Ended>,
}

impl Session {
    /// Begins to serve `files` on the descriptor of a mount ([`super::mount()`]). On return the mount answers.
    pub fn start(fd: OwnedFd, files: Arc<Files>, init: Init, options: Options) -> Result<Session> {
        process::install_wake_handler()
            .map_err(|e| Error::new(Kind::Io, format!("cannot install a signal handler: {e}")))?;
        let negotiated = match init {
            Init::Fresh => greet(&fd)?,
            Init::Resumed(negotiated) => {
                // Before any worker reads: what they hold would be sent again as well.
                resend(&fd).map_err(|e| {
                    Error::new(Kind::Unsupported, "cannot take over the requests under way")
                        .context(format!("the kernel refuses to send them again: {e}"))
                        .hint("kernel 6.9 or newer can; with an older one detach and attach again")
                })?;
                negotiated
            }
        };
        let owner = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let shared = Arc::new(Shared {
            fd,
            files,
            owner,
            log: LogLimit::default(),
            options: Options {
                max_threads: options.max_threads.max(1),
                ..options
            },
            idle: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            started: Instant::now(),
            grown_at: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            state: Mutex::new(State {
                workers: Vec::new(),
                alive: 0,
                ended: None,
            }),
            changed: Condvar::new(),
        });
        let session = Session { shared, negotiated };
        for _ in 0..options
            .keep_threads
            .clamp(1, session.shared.options.max_threads)
        {
            // The drop of `session` ends those that did start.
            session.shared.start_worker()?;
        }
        Ok(session)
    }
    /// What was agreed on: to be kept for [`Init::Resumed`].
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }
    /// Waits until the session ends.
    pub fn wait(&self) -> Ended {
        let mut state = self.shared.state.lock();
        while state.alive > 0 {
            self.shared.changed.wait(&mut state);
        }
        state.ended.unwrap_or(Ended::Stopped)
    }
    /// Has the session ended?
    pub fn ended(&self) -> Option<Ended> {
        let state = self.shared.state.lock();
        if state.alive > 0 {
            None
        } else {
            Some(state.ended.unwrap_or(Ended::Stopped))
        }
    }
    /// Ends the session and leaves the mount standing: what is under way is finished and answered, what
    /// comes waits for the next session.
    pub fn stop(&self) -> Ended {
        self.shared.stopping.store(true, Release);
        let mut state = self.shared.state.lock();
        while state.alive > 0 {
            for &tid in &state.workers {
                process::wake(tid);
            }
            // A worker may have been between its look at `stopping` and its read: again, then.
            self.shared
                .changed
                .wait_for(&mut state, Duration::from_millis(5));
        }
        *state.ended.get_or_insert(Ended::Stopped)
    }
    /// Threads now, and the most there were.
    pub fn threads(&self) -> (usize, usize) {
        (
            self.shared.threads.load(Relaxed),
            self.shared.peak.load(Relaxed),
        )
    }
    /// Tells the kernel that a file's size changed, so that `stat` asks again.
    pub fn size_changed(&self, ino: u64) -> Result<()> {
        let body = abi::InvalInodeOut {
            ino,
            off: -1,
            len: 0,
        };
        match notify(&self.shared.fd, abi::notify::INVAL_INODE, body.as_bytes()) {
            // The kernel never heard of this file, or forgot it: nothing to refresh.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::new(
                Kind::Io,
                format!("cannot tell the kernel of a new size: {e}"),
            )),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sends a message of our own. `unique` 0 marks it as such.
fn notify(fd: &OwnedFd, code: i32, body: &[u8]) -> Result<(), Errno> {
    let header = abi::OutHeader {
        len: (abi::OUT_HEADER + body.len()) as u32,
        error: code,
        unique: 0,
    };
    let parts = [
        std::io::IoSlice::new(header.as_bytes()),
        std::io::IoSlice::new(body),
    ];
    rustix::io::writev(fd, &parts).map(|_| ())
}

/// Asks for all requests that were read and not answered.
fn resend(fd: &OwnedFd) -> Result<(), Errno> {
    notify(fd, abi::notify::RESEND, &[])
}

fn readable(fd: &OwnedFd, timeout: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(n) => return n > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Answers the kernel's greeting.
fn greet(fd: &OwnedFd) -> Result<Negotiated> {
    let refuse = |why: String| {
        Error::new(
            Kind::Unsupported,
            format!("cannot agree with the kernel on a FUSE session: {why}"),
        )
        .hint("kernel 4.20 or newer is needed")
    };
    // A server that died with the greeting in its hands leaves nothing to read: ask for it again.
    if !readable(fd, Duration::from_secs(1)) {
        let _ = resend(fd);
        if !readable(fd, INIT_TIMEOUT) {
            return Err(refuse("it sends no greeting".into()));
        }
    }
    let mut buffer = Buffer::new()?;
    let n = loop {
        match rustix::io::read(fd, buffer.request_mut()) {
            Ok(n) => break n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(refuse(format!("reading the greeting failed: {e}"))),
        }
    };
    let message = &buffer.request()[..n];
    let Ok((header, body)) = abi::InHeader::read_from_prefix(message) else {
        return Err(refuse(format!("a greeting of {n} bytes")));
    };
    if header.opcode != abi::op::INIT {
        return Err(refuse(format!(
            "the first request is of kind {}",
            header.opcode
        )));
    }
    let Ok((init, rest)) = abi::InitIn::read_from_prefix(body) else {
        return Err(refuse(format!("a greeting of {n} bytes")));
    };
    let mut out = abi::InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR,
        ..Default::default()
    };
    if init.major != abi::MAJOR || init.minor < abi::MINOR_MIN {
        let answer = abi::OutHeader {
            len: abi::OUT_HEADER as u32,
            error: -libc::EPROTO,
            unique: header.unique,
        };
        let _ = rustix::io::write(fd, answer.as_bytes());
        return Err(refuse(format!(
            "it speaks version {}.{}",
            init.major, init.minor
        )));
    }
    let mut offered = u64::from(init.flags);
    if offered & abi::init::INIT_EXT != 0
        && let Ok((flags2, _)) = u32::read_from_prefix(rest)
    {
        offered |= u64::from(flags2) << 32;
    }
    let mut flags = offered & WANTED;
    if std::env::var_os(WITHOUT_RESEND).is_some() {
        flags &= !abi::init::HAS_RESEND;
    }
    out.minor = out.minor.min(init.minor);
    out.max_readahead = init.max_readahead;
    out.flags = flags as u32;
    out.flags2 = (flags >> 32) as u32;
    out.max_background = MAX_BACKGROUND;
    out.congestion_threshold = CONGESTION;
    out.max_write = MAX_DATA as u32;
    out.time_gran = 1;
    out.max_pages = MAX_PAGES;
    let answer = abi::OutHeader {
        len: (abi::OUT_HEADER + size_of::<abi::InitOut>()) as u32,
        error: 0,
        unique: header.unique,
    };
    let parts = [
        std::io::IoSlice::new(answer.as_bytes()),
        std::io::IoSlice::new(out.as_bytes()),
    ];
    rustix::io::writev(fd, &parts)
        .map_err(|e| refuse(format!("answering the greeting failed: {e}")))?;
    Ok(Negotiated {
        minor: out.minor,
        flags,
        max_write: out.max_write,
    })
}

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
    fn new() -> Result<Buffer> {
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
    fn request_mut(&mut self) -> &mut [u8] {
        &mut self.map[DATA - abi::WRITE_HEAD..]
    }
    /// The data of a WRITE request, and the body of an answer: the same place.
    pub(super) fn data(&self) -> &[u8] {
        &self.map[DATA..DATA + MAX_DATA]
    }
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

impl Shared {
    /// Starts one worker; it counts as idle from now on, so that no other is started in its place.
    fn start_worker(self: &Arc<Shared>) -> Result<()> {
        let buffer = Buffer::new()?;
        self.idle.fetch_add(1, AcqRel);
        let threads = self.threads.fetch_add(1, AcqRel) + 1;
        self.peak.fetch_max(threads, Relaxed);
        self.state.lock().alive += 1;
        let shared = Arc::clone(self);
        let started = thread::Builder::new()
            .name("fuse-worker".into())
            .stack_size(512 << 10)
            .spawn(move || shared.work(buffer));
        if let Err(e) = started {
            self.idle.fetch_sub(1, AcqRel);
            self.worker_gone(None);
            return Err(Error::new(
                Kind::Io,
                format!("cannot start a worker thread: {e}"),
            ));
        }
        Ok(())
    }

    fn worker_gone(&self, ended: Option<Ended>) {
        self.threads.fetch_sub(1, AcqRel);
        let tid = process::thread_id();
        let mut state = self.state.lock();
        state.workers.retain(|&t| t != tid);
        state.alive -= 1;
        if state.ended.is_none() {
            state.ended = ended;
        }
        if state.alive == 0 {
            self.changed.notify_all();
        }
    }

    fn millis(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// No reader is left: one more, if the limit allows.
    fn grow(self: &Arc<Shared>) {
        self.grown_at.store(self.millis(), Relaxed);
        if self.threads.load(Acquire) >= self.options.max_threads {
            return;
        }
        if let Err(e) = self.start_worker()
            && self.log.allow()
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

    fn work(self: Arc<Shared>, mut buffer: Buffer) {
        process::set_io_flusher();
        self.state.lock().workers.push(process::thread_id());
        let ended = loop {
            if self.stopping.load(Acquire) {
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
            ops::serve(&self, &mut buffer, n);
            let idle_before = self.idle.fetch_add(1, AcqRel);
            if self.surplus(idle_before) {
                break None;
            }
        };
        self.idle.fetch_sub(1, AcqRel);
        self.worker_gone(ended);
    }
}

/// Lets so many messages pass a second.
#[derive(Default)]
pub(super) struct LogLimit {
    second: AtomicU64,
    count: AtomicU64,
}

impl LogLimit {
    pub(super) fn allow(&self) -> bool {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        if self.second.swap(now, Relaxed) != now {
            let dropped = self
                .count
                .swap(0, Relaxed)
                .saturating_sub(LOGGED_PER_SECOND);
            if dropped > 0 {
                tracing::error!("{dropped} more failures were not logged");
            }
        }
        self.count.fetch_add(1, Relaxed) < LOGGED_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_page_aligned_and_one_piece_with_its_headers() {
        let mut buffer = Buffer::new().unwrap();
        assert_eq!(buffer.data().as_ptr() as usize % 4096, 0);
        assert_eq!(
            buffer.request()[abi::WRITE_HEAD..].as_ptr(),
            buffer.data().as_ptr()
        );
        // The kernel refuses to hand requests to a smaller one.
        assert!(buffer.request().len() >= abi::WRITE_HEAD + MAX_DATA);
        buffer.data_mut()[0] = 7;
        let answer = buffer.answer(1, 0, 1);
        assert_eq!((answer.len(), answer[16]), (17, 7));
    }

    #[test]
    fn the_log_is_limited() {
        let log = LogLimit::default();
        let passed = (0..1000).filter(|_| log.allow()).count() as u64;
        assert!((LOGGED_PER_SECOND..=3 * LOGGED_PER_SECOND).contains(&passed));
    }
}
