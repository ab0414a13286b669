//! One connection after the greeting: takes requests and answers them.
//!
//! One thread reads at a time. It serves what it read itself, as the shortest way; while it does, another one reads on if there is
//! more to read, or if the first waits for a disk. So one request after the other costs no change of threads, and many at once are served by
//! as many threads as there are processors, and one more.
//!
//! Always true:
//! - whoever comes back from a request reads on, unless somebody else does: a connection has always one that reads or will;
//! - answers are sent whole: of two threads one after the other;
//! - a client that stops in the middle of a request, or speaks something else, loses the connection; nothing of half a request is done, but that whole
//!   pieces ([`PIECE`]) of a long write may be.

use super::{
    greeting::{ALLOCATION_ID, Chosen},
    input::Input,
    wire::{self, Chunk, REPLY_HEAD, Request, Simple, chunk, command, flag, state},
};
use crate::{
    disk::{Disk, Extent, Source},
    error::{Error, Kind, Result},
    serve::{
        crew::{Crew, Ended, Woken},
        files::{Files, Op, ServedFile},
        limit::LogLimit,
        waiting::{Asker, MOST_OF_ONE, Memory, Waiting, What, Write},
    },
    sys::blocking::{self, Attendant},
};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io::{self, Write as _},
    net::Shutdown,
    num::NonZero,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Acquire},
        },
    },
    thread,
    time::Duration,
};
use zerocopy::IntoBytes;

/// Longest data of a request: what a client may send that did not ask how much.
pub(super) const MOST: usize = 32 << 20;
/// Data is read and written in pieces of so many bytes.
const PIECE: usize = 1 << 20;
/// A request with so much data takes long enough that somebody else should read on meanwhile.
const LONG: usize = 64 << 10;
/// Most threads of one connection, and so most of its requests under way.
const MAX_THREADS: usize = 32;
/// A thread that nobody needed for so long ends.
const SURPLUS_AGE: Duration = Duration::from_secs(5);
/// Most stretches in the answer to one BLOCK_STATUS.
const MAX_STRETCHES: usize = 1 << 12;
/// First look of BLOCK_STATUS, in bytes; it doubles.
const LOOK_FIRST: u64 = 1 << 20;
const LOOK_MAX: u64 = 1 << 30;

/// What was agreed on in the greeting.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Answers to READ and BLOCK_STATUS are structured.
    pub structured: bool,
    /// BLOCK_STATUS may be asked.
    pub allocation: bool,
}

/// The way back to a client.
pub(super) struct Out {
    stream: Arc<UnixStream>,
    sending: Mutex<()>,
}

impl Out {
    pub(super) fn new(stream: Arc<UnixStream>) -> Out {
        Out {
            stream,
            sending: Mutex::new(()),
        }
    }
    /// Sends one piece, after those that are on their way.
    pub(super) fn send(&self, piece: &[u8]) -> io::Result<()> {
        let _turn = self.sending.lock();
        (&*self.stream).write_all(piece)
    }
    /// Has the client gone, or said that nothing comes any more? Also where not all that it sent was read.
    pub(super) fn is_left(&self) -> bool {
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut asked = [PollFd::new(&*self.stream, PollFlags::RDHUP)];
        poll(&mut asked, Some(&none)).is_ok() && asked[0].revents().intersects(gone)
    }
    /// Ends the connection for the client: what is sent goes nowhere, and who waits to send or to read does so no longer. What is here already could
    /// still be read: whoever does not want that stops the threads.
    pub(super) fn cut(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
    fn simple(&self, cookie: u64, errno: i32) {
        let reply = Simple {
            magic: wire::SIMPLE_MAGIC.into(),
            error: if errno == 0 { 0 } else { wire::error(errno) }.into(),
            cookie: cookie.into(),
        };
        // If the client is gone, the reader hears of it.
        let _ = self.send(reply.as_bytes());
    }
    fn chunk(&self, cookie: u64, kind: u16, body: &[u8]) {
        let head = Chunk {
            magic: wire::CHUNK_MAGIC.into(),
            flags: chunk::DONE.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            len: (body.len() as u32).into(),
        };
        let mut piece = head.as_bytes().to_vec();
        piece.extend_from_slice(body);
        let _ = self.send(&piece);
    }
    fn error_chunk(&self, cookie: u64, errno: i32) {
        // The number, and a text of no length.
        let mut body = wire::error(errno).to_be_bytes().to_vec();
        body.extend_from_slice(&0u16.to_be_bytes());
        self.chunk(cookie, chunk::ERROR, &body);
    }
}

/// The answers to writes that waited for room.
struct Late(Arc<Out>);

impl Asker for Late {
    fn is_gone(&self) -> bool {
        // Its crew ends with it.
        false
    }
    fn answer(&self, write: &Write, outcome: std::result::Result<(), i32>) {
        self.0.simple(write.unique, outcome.err().unwrap_or(0));
    }
}

/// Called when the client has ended the connection, by whoever finds that out.
type Left = Box<dyn Fn() + Send + Sync>;

/// A connection.
pub(super) struct Link {
    file: Arc<ServedFile>,
    shape: Shape,
    out: Arc<Out>,
    input: Mutex<Input>,
    crew: Arc<Crew>,
    pub(super) waiting: Arc<Waiting>,
    log: Arc<LogLimit>,
    left: Left,
    /// So many are at work at most, as far as they do not wait.
    limit: usize,
    /// Threads that read or serve, and do not wait for a disk.
    active: AtomicUsize,
    threads: AtomicUsize,
}

/// What became of a write: false, it waits for room.
type Written = std::result::Result<bool, i32>;

/// The end of a connection.
struct Over;

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Over {
        Over
    }
}

/// What all connections have in common.
pub(super) struct Shared {
    pub files: Arc<Files>,
    pub log: Arc<LogLimit>,
    /// Of what waits for room.
    pub memory: Arc<Memory>,
}

impl Link {
    pub(super) fn new(
        chosen: Chosen,
        input: Input,
        out: Arc<Out>,
        crew: Arc<Crew>,
        shared: Shared,
        left: Left,
    ) -> Arc<Link> {
        let Shared { files, log, memory } = shared;
        let late = Arc::new(Late(Arc::clone(&out)));
        Arc::new(Link {
            file: chosen.file,
            shape: chosen.shape,
            out,
            input: Mutex::new(input),
            waiting: Arc::new(Waiting::new(
                late,
                files,
                Arc::clone(&crew),
                memory,
                MOST_OF_ONE,
            )),
            crew,
            log,
            left,
            limit: thread::available_parallelism().map_or(2, NonZero::get) + 1,
            active: AtomicUsize::new(1),
            threads: AtomicUsize::new(1),
        })
    }

    /// What each thread does, the first one in the thread that greeted.
    pub(super) fn work(self: &Arc<Link>) -> Option<Ended> {
        blocking::attend(Arc::new(Arc::clone(self)));
        let mut room = Vec::new();
        let ended = loop {
            if self.crew.is_stopping() {
                break None;
            }
            match self.turn(&mut room) {
                Some(Ok(())) => continue,
                Some(Err(Over)) => break Some(Ended::Stopped),
                None => {}
            }
            // Somebody else reads.
            self.active.fetch_sub(1, AcqRel);
            // It keeps no memory while it rests.
            room = Vec::new();
            if self.crew.rest(Some(SURPLUS_AGE)) != Woken::Called {
                self.threads.fetch_sub(1, AcqRel);
                return None;
            }
        };
        self.active.fetch_sub(1, AcqRel);
        self.threads.fetch_sub(1, AcqRel);
        if ended.is_some() && !self.crew.is_stopping() {
            (self.left)();
        }
        ended
    }

    /// Somebody else is to read on: one that rests, or a new one, if there are not as many as there may be.
    fn more(self: &Arc<Link>) {
        let one_more = |n: usize| (n < self.limit).then_some(n + 1);
        if self.active.fetch_update(AcqRel, Acquire, one_more).is_err() {
            return;
        }
        if self.crew.call() {
            return;
        }
        let one_more = |n: usize| (n < MAX_THREADS).then_some(n + 1);
        if self.threads.fetch_update(AcqRel, Acquire, one_more).is_ok() {
            let link = Arc::clone(self);
            match self.crew.start("nbd-worker", move || link.work()) {
                Ok(()) => return,
                // Then one does what it can.
                Err(e) if self.log.allow() => tracing::warn!("requests have to wait: {e}"),
                Err(_) => {}
            }
            self.threads.fetch_sub(1, AcqRel);
        }
        self.active.fetch_sub(1, AcqRel);
    }

    /// Takes one request and serves it; `None` if somebody else is about to read one.
    fn turn(self: &Arc<Link>, room: &mut Vec<u8>) -> Option<std::result::Result<(), Over>> {
        let mut input = self.input.try_lock()?;
        if input.over {
            return Some(Err(Over));
        }
        let (request, long) = match self.take(&mut input, room) {
            Ok(taken) => taken,
            Err(Over) => {
                // What may be here still is nobody's request.
                input.over = true;
                return Some(Err(Over));
            }
        };
        if self.crew.is_stopping() {
            // It stays unanswered: the client sends it again, or is gone.
            input.over = true;
            return Some(Err(Over));
        }
        let (command, len) = (request.command.get(), request.len.get() as usize);
        if let Some(outcome) = long {
            drop(input);
            self.written(&request, outcome);
            return Some(Ok(()));
        }
        let others = input.ahead() >= wire::REQUEST;
        drop(input);
        // What takes its time may do so without telling.
        let is_quick = matches!(command, command::READ | command::WRITE) && len < LONG;
        if others || !is_quick {
            self.more();
        }
        self.serve(&request, &mut room[..]);
        Some(Ok(()))
    }

    /// The next request, its data in the room; what is longer than a piece is written already, with this outcome.
    fn take(
        self: &Arc<Link>,
        input: &mut Input,
        room: &mut Vec<u8>,
    ) -> std::result::Result<(Request, Option<Written>), Over> {
        let request: Request = input.next()?;
        if request.magic.get() != wire::REQUEST_MAGIC {
            tracing::warn!(
                disk = self.file.name(),
                "a client speaks no NBD: it is cut off"
            );
            self.out.cut();
            return Err(Over);
        }
        let (command, len) = (request.command.get(), request.len.get() as usize);
        if command == command::DISCONNECT {
            return Err(Over);
        }
        let first = match command {
            command::READ | command::WRITE | command::CACHE => len.min(PIECE),
            _ => 0,
        };
        if room.len() < REPLY_HEAD + first {
            room.resize(REPLY_HEAD + first.next_power_of_two(), 0);
        }
        if command != command::WRITE {
            return Ok((request, None));
        }
        if len > MOST {
            // Nor is its data read.
            self.out.cut();
            return Err(Over);
        }
        let data = &mut room[REPLY_HEAD..REPLY_HEAD + first];
        input.fill(data)?;
        let long = match len > PIECE {
            true => Some(self.write_long(&request, input, data)?),
            false => None,
        };
        Ok((request, long))
    }

    fn serve(self: &Arc<Link>, request: &Request, room: &mut [u8]) {
        let len = request.len.get() as usize;
        match request.command.get() {
            command::READ => self.read(request, room),
            command::WRITE => {
                let data = &room[REPLY_HEAD..REPLY_HEAD + len];
                let outcome = self.write(request, data);
                self.written(request, outcome);
            }
            command::FLUSH => {
                let outcome = self.known(request).and_then(|()| {
                    let flushed = self.file.request(Op::Flush, |disk| disk.flush_first());
                    self.errno("flush", request, flushed)
                });
                self.done(request, outcome);
                self.file.tidy();
            }
            command @ (command::TRIM | command::WRITE_ZEROES) => {
                let outcome = self.discard(request, command == command::TRIM);
                self.written(request, outcome);
            }
            command::CACHE => {
                let outcome = self.pieces(request).and_then(|pieces| {
                    for (at, len) in pieces {
                        self.read_piece(request, &mut room[..len], at)?;
                    }
                    Ok(())
                });
                self.done(request, outcome);
            }
            command::BLOCK_STATUS if self.shape.allocation => self.block_status(request),
            _ => self.done(request, Err(libc::EINVAL)),
        }
    }

    /// The outcome of a request as an `errno`, told to the log where it is an error of the disk.
    fn errno<R>(
        &self,
        what: &str,
        request: &Request,
        outcome: Option<Result<R>>,
    ) -> std::result::Result<R, i32> {
        match outcome {
            Some(Ok(value)) => Ok(value),
            Some(Err(e)) => {
                if e.kind() != Kind::ReadOnly && self.log.allow() {
                    let (at, len) = (request.at.get(), request.len.get());
                    tracing::error!(disk = self.file.name(), at, len, "{what} failed: {e}");
                }
                Err(e.errno())
            }
            None => Err(libc::ESTALE),
        }
    }

    /// A simple answer without data.
    fn done(&self, request: &Request, outcome: std::result::Result<(), i32>) {
        self.out
            .simple(request.cookie.get(), outcome.err().unwrap_or(0));
    }

    /// Fails if the request asks for something that is not known: to ignore that might be what the client does not expect.
    fn known(&self, request: &Request) -> std::result::Result<(), i32> {
        match request.flags.get() & !flag::of(request.command.get()) {
            0 => Ok(()),
            _ => Err(libc::EINVAL),
        }
    }
    /// Fails with `errno` if the request does not lie within the disk.
    fn within(&self, request: &Request, errno: i32) -> std::result::Result<(), i32> {
        self.known(request)?;
        let size = self.file.disk().map(|disk| disk.size());
        let size = size.ok_or(libc::ESTALE)?;
        let end = request.at.get().checked_add(request.len.get().into());
        match end {
            Some(end) if end <= size && request.len.get() > 0 => Ok(()),
            _ => Err(errno),
        }
    }

    /// The pieces in which a request is served: their places and lengths.
    fn pieces(
        &self,
        request: &Request,
    ) -> std::result::Result<impl Iterator<Item = (u64, usize)> + use<>, i32> {
        self.within(request, libc::EINVAL)?;
        let (at, len) = (request.at.get(), request.len.get() as usize);
        let piece = move |start: usize| (at + start as u64, PIECE.min(len - start));
        Ok((0..len).step_by(PIECE).map(piece))
    }

    fn read_piece(
        &self,
        request: &Request,
        room: &mut [u8],
        at: u64,
    ) -> std::result::Result<(), i32> {
        let read = self
            .file
            .request(Op::Read(room.len() as u64), |disk| disk.read(room, at));
        self.errno("read", request, read)
    }

    fn read(&self, request: &Request, room: &mut [u8]) {
        let cookie = request.cookie.get();
        let len = request.len.get() as usize;
        let whole = request.flags.get() & flag::DONT_FRAGMENT != 0;
        let pieces = match self.pieces(request) {
            Ok(_) if self.shape.structured && whole && len > PIECE => Err(libc::EOVERFLOW),
            other => other,
        };
        let failed = |errno| match self.shape.structured {
            true => self.out.error_chunk(cookie, errno),
            false => self.out.simple(cookie, errno),
        };
        let pieces = match pieces {
            Ok(pieces) => pieces,
            Err(errno) => return failed(errno),
        };
        if !self.shape.structured {
            return self.read_simply(request, pieces, room, failed);
        }
        let end = request.at.get() + len as u64;
        for (at, len) in pieces {
            if let Err(errno) = self.read_piece(request, &mut room[REPLY_HEAD..][..len], at) {
                return failed(errno);
            }
            let last = at + len as u64 == end;
            let head = Chunk {
                magic: wire::CHUNK_MAGIC.into(),
                flags: if last { chunk::DONE } else { 0 }.into(),
                kind: chunk::OFFSET_DATA.into(),
                cookie: cookie.into(),
                len: (len as u32 + 8).into(),
            };
            let (before, place) = room[..REPLY_HEAD].split_at_mut(size_of::<Chunk>());
            before.copy_from_slice(head.as_bytes());
            place.copy_from_slice(&at.to_be_bytes());
            if self.out.send(&room[..REPLY_HEAD + len]).is_err() {
                return;
            }
        }
    }

    /// With one head for all pieces, between which nothing else may be sent.
    fn read_simply(
        &self,
        request: &Request,
        pieces: impl Iterator<Item = (u64, usize)>,
        room: &mut [u8],
        failed: impl Fn(i32),
    ) {
        const START: usize = REPLY_HEAD - size_of::<Simple>();
        let head = Simple {
            magic: wire::SIMPLE_MAGIC.into(),
            error: 0.into(),
            cookie: request.cookie,
        };
        room[START..REPLY_HEAD].copy_from_slice(head.as_bytes());
        let mut turn = None;
        for (at, len) in pieces {
            if let Err(errno) = self.read_piece(request, &mut room[REPLY_HEAD..][..len], at) {
                match turn {
                    None => failed(errno),
                    // There is no way to say it any more.
                    Some(_) => self.out.cut(),
                }
                return;
            }
            let start = if turn.is_none() { START } else { REPLY_HEAD };
            turn = turn.or_else(|| Some(self.out.sending.lock()));
            let piece = &room[start..REPLY_HEAD + len];
            if (&*self.out.stream).write_all(piece).is_err() {
                return;
            }
        }
    }

    /// Writes, and flushes if it must be durable; with the error of a disk whose writers are to wait for room.
    fn attempt(
        &self,
        request: &Request,
        at: u64,
        data: &[u8],
        durable: bool,
    ) -> std::result::Result<Option<Error>, i32> {
        let written = self.file.request(Op::Write(data.len() as u64), |disk| {
            if disk.read_only() {
                return Err(Error::new(Kind::ReadOnly, "the disk can only be read"));
            }
            match disk.write(data, at) {
                Err(e) if e.waits() => return Ok(Some(e)),
                other => other?,
            }
            if durable {
                disk.flush_first()?;
            }
            Ok(None)
        });
        self.errno("write", request, written)
    }

    /// False: it waits for room, and is answered later.
    fn write(&self, request: &Request, data: &[u8]) -> Written {
        self.within(request, libc::ENOSPC)?;
        let at = request.at.get();
        match self.attempt(request, at, data, is_durable(request))? {
            None => Ok(true),
            Some(full) => self.put_aside(request, at, What::Data(data.to_vec()), full),
        }
    }

    fn put_aside(&self, request: &Request, at: u64, what: What, full: Error) -> Written {
        let waits = self.waiting.put_aside(Write {
            unique: request.cookie.get(),
            ino: self.file.ino(),
            at,
            what,
            done: 0,
            durable: is_durable(request),
        });
        match waits {
            true => Ok(false),
            false => self.errno("write", request, Some(Err(full))),
        }
    }

    /// Answers a write, unless it waits for room.
    fn written(self: &Arc<Link>, request: &Request, outcome: Written) {
        match outcome {
            Ok(false) => {}
            Ok(true) => {
                // The disk is let go of before it is asked for again: in between it may be taken away.
                let fills = self.file.disk().is_some_and(|disk| disk.is_filling());
                self.done(request, Ok(()));
                if fills {
                    // It takes its time.
                    self.more();
                }
                if fills || is_durable(request) {
                    self.file.tidy();
                }
            }
            Err(errno) => self.done(request, Err(errno)),
        }
    }

    /// Writes what does not fit in one piece; of the data the first piece is here. All of it is taken from the stream, whatever becomes of it.
    fn write_long(
        &self,
        request: &Request,
        input: &mut Input,
        room: &mut [u8],
    ) -> std::result::Result<Written, Over> {
        let (first, len) = (request.at.get(), request.len.get() as usize);
        let mut outcome = self.within(request, libc::ENOSPC);
        let (mut start, mut piece) = (0, room.len());
        loop {
            // Past the end of all numbers it is refused, and only read.
            let at = first.wrapping_add(start as u64);
            let last = start + piece == len;
            let data = &mut room[..piece];
            if self.crew.is_stopping() {
                return Err(Over);
            }
            let attempt = |()| self.attempt(request, at, data, last && is_durable(request));
            match outcome.and_then(attempt) {
                Ok(Some(full)) => {
                    // What is left waits as a whole.
                    let mut left = data.to_vec();
                    left.resize(len - start, 0);
                    input.fill(&mut left[piece..])?;
                    return Ok(self.put_aside(request, at, What::Data(left), full));
                }
                other => outcome = other.map(drop),
            }
            if last {
                return Ok(outcome.map(|()| true));
            }
            start += piece;
            piece = PIECE.min(len - start);
            input.fill(&mut room[..piece])?;
        }
    }

    /// False: it waits for room, and is answered later.
    fn discard(&self, request: &Request, trim: bool) -> Written {
        self.within(request, if trim { libc::EINVAL } else { libc::ENOSPC })?;
        // Room for later is never kept, so that a client that insists is told.
        const BOTH: u16 = flag::NO_HOLE | flag::FAST_ZERO;
        if !trim && request.flags.get() & BOTH == BOTH {
            return Err(libc::ENOTSUP);
        }
        let (at, len) = (request.at.get(), u64::from(request.len.get()));
        let durable = is_durable(request);
        let done = self.file.request(Op::Discard(len), |disk| {
            if disk.read_only() {
                return Err(Error::new(Kind::ReadOnly, "the disk can only be read"));
            }
            if trim {
                // A hint: what cannot be done without room is left as it is. The whole blocks are given back.
                match disk.discard(at, len) {
                    Err(e) if e.is_of_quota() => {}
                    other => other?,
                }
            } else {
                match disk.write_zeroes(at, len) {
                    Err(e) if e.waits() => return Ok(Some(e)),
                    other => other?,
                }
            }
            if durable {
                disk.flush_first()?;
            }
            Ok(None)
        });
        let what = if trim { "discard" } else { "write zeroes" };
        match self.errno(what, request, done)? {
            None => Ok(true),
            Some(full) => self.put_aside(request, at, What::Zeros(len), full),
        }
    }

    fn block_status(&self, request: &Request) {
        let cookie = request.cookie.get();
        let most = match request.flags.get() & flag::ONE {
            0 => MAX_STRETCHES,
            _ => 1,
        };
        let found = self.within(request, libc::EINVAL).and_then(|()| {
            let (at, len) = (request.at.get(), u64::from(request.len.get()));
            let found = self
                .file
                .request(Op::Seek, |disk| stretches(disk, at, at + len, most));
            self.errno("block status", request, found)
        });
        match found {
            Ok(found) => {
                let mut body = ALLOCATION_ID.to_be_bytes().to_vec();
                for (len, state) in found {
                    body.extend_from_slice(&len.to_be_bytes());
                    body.extend_from_slice(&state.to_be_bytes());
                }
                self.out.chunk(cookie, chunk::BLOCK_STATUS, &body);
            }
            Err(errno) => self.out.error_chunk(cookie, errno),
        }
    }
}

/// Is the request to be answered only when what it did is durable?
fn is_durable(request: &Request) -> bool {
    request.flags.get() & flag::FUA != 0
}

/// What stands in a range: lengths and states, in order, `most` of them. They may end before the range does.
fn stretches(disk: &dyn Disk, from: u64, to: u64, most: usize) -> Result<Vec<(u32, u32)>> {
    let mut found: Vec<(u32, u32)> = Vec::new();
    let (mut at, mut step) = (from, LOOK_FIRST);
    while at < to {
        let look = step.min(to - at);
        for Extent {
            at: start,
            len,
            from: source,
        } in disk.extents(at, look)?
        {
            let what = match source {
                Source::Absent | Source::Zero { .. } | Source::Hole => state::HOLE | state::ZERO,
                Source::Layer { .. } | Source::Base => 0,
            };
            // Of what was asked for only.
            let len = (start + len).min(at + look).saturating_sub(start.max(at)) as u32;
            let count = found.len();
            match found.last_mut() {
                _ if len == 0 => {}
                Some((so_far, last)) if *last == what => *so_far += len,
                _ if count == most => return Ok(found),
                _ => found.push((len, what)),
            }
        }
        at += look;
        step = (step * 2).min(LOOK_MAX);
    }
    Ok(found)
}

impl Attendant for Arc<Link> {
    fn waits(&self) {
        self.active.fetch_sub(1, AcqRel);
        if !self.input.is_locked() {
            self.more();
        }
    }
    fn goes_on(&self) {
        self.active.fetch_add(1, AcqRel);
    }
}
