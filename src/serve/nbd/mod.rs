//! Disks as exports of a Unix socket, by the protocol of network block devices (NBD): for those who need no device of the kernel, such as
//! virtual machines and tools that read and write images. No loop device is needed.
//!
//! - `wire`: the protocol's numbers and structures (pure);
//! - `input`: what a client sent, as far as nobody has looked at it;
//! - `greeting`: what is said before the transmission;
//! - `link`: one connection after that.
//!
//! What is spoken: fixed newstyle, GO and INFO with block sizes, structured replies, `base:allocation`; the commands READ, WRITE (FUA), FLUSH,
//! TRIM, WRITE_ZEROES, CACHE and BLOCK_STATUS. Several connections to one export see the same, and a flush on one makes durable what was answered on any
//! of them. A size is told once, in the greeting: who is to see another one connects again.
//!
//! Connections end with the server. Whoever has a request under way then connects again and repeats it, as clients of NBD do that are told to; what was
//! answered is kept, as that of every door.

mod greeting;
mod input;
mod link;
mod wire;

use super::{
    crew::{Crew, Ended},
    files::{Files, ServedFile},
    limit::LogLimit,
    waiting::Memory,
};
use crate::{
    error::{Error, Result},
    sys::{
        private,
        process::{self, Process},
    },
};
use greeting::Greeting;
use input::Input;
use link::{Link, Out, Shared};
use parking_lot::Mutex;
use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};

/// How long a client may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most connections at one time.
const MAX_PEERS: usize = 4096;
/// How often it is looked whether a connection has ended.
const STEP: Duration = Duration::from_millis(2);

/// A connection, as far as others must know of it.
struct Peer {
    crew: Arc<Crew>,
    out: Weak<Out>,
    /// Who connected.
    process: Option<Process>,
    /// It has ended the connection itself, and does not come back to it.
    has_left: AtomicBool,
    /// Number of the file that it uses; 0: it has not chosen yet.
    ino: AtomicU64,
    link: OnceLock<Weak<Link>>,
}

#[derive(Default)]
struct State {
    /// Numbers of the files that are exports.
    shown: BTreeSet<u64>,
    /// Of these, the ones to which nobody may connect for now, and for how many reasons.
    held: BTreeMap<u64, usize>,
    /// Of these, the ones that processes used when the last server ended: such a process may connect again.
    expected: BTreeMap<u64, Vec<Process>>,
    peers: Vec<Arc<Peer>>,
    listening: bool,
    stopping: bool,
}

/// Most processes that are told of one export, so that word of them fits into a small record.
const MOST_TOLD: usize = 64;

/// Who uses an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Users {
    /// So many connections.
    Connected(usize),
    /// Processes that used it when the last server ended, and may connect again.
    Expected(Vec<Process>),
}

/// Hears of the processes that use the file of a number.
type Tell = Box<dyn Fn(u64, &[Process]) + Send + Sync>;

/// The disks that are shown over NBD: some of the files that a server has.
pub struct Exports {
    files: Arc<Files>,
    state: Mutex<State>,
    /// The thread that waits for clients.
    crew: Arc<Crew>,
    log: Arc<LogLimit>,
    /// Of what waits for room on any connection.
    waiting_memory: Arc<Memory>,
    tell: Tell,
    /// What was told last. Held while something is told, so that it is told in order.
    told: Mutex<BTreeMap<u64, Vec<Process>>>,
}

impl Exports {
    /// None yet, and nobody listens. `tell` hears which processes use a file: of a new one before it may, so that it can be known to a next server
    /// ([`Exports::await_again`]), and of its end when it leaves, or in [`Exports::look_after`]. It may wait for what is held while others of these methods are called than
    /// `hide`, `await_again`, `look_after` and `stop`.
    pub fn new(
        files: Arc<Files>,
        tell: impl Fn(u64, &[Process]) + Send + Sync + 'static,
    ) -> Arc<Exports> {
        Arc::new(Exports {
            files,
            tell: Box::new(tell),
            told: Mutex::default(),
            state: Mutex::default(),
            crew: Arc::default(),
            log: Arc::default(),
            waiting_memory: Arc::default(),
        })
    }
    /// Listens on a socket at `path`, for this user and root only, if nobody does yet. What is there is replaced: a server that was before has left it.
    /// `shown`: the path in messages.
    pub fn listen(self: &Arc<Exports>, path: &Path, shown: &Path) -> Result<()> {
        let mut state = self.state.lock();
        if state.listening || state.stopping {
            return Ok(());
        }
        process::install_wake_handler().map_err(|e| Error::io("serve", shown, &e))?;
        // Under another name at first: who connects meanwhile finds one of the two.
        let new = path.with_extension("new");
        let listener = private::listen(&new, shown)?;
        std::fs::rename(&new, path).map_err(|e| Error::io("make", shown, &e))?;
        let exports = Arc::clone(self);
        self.crew.start("nbd-listen", move || {
            exports.welcome(&listener);
            None
        })?;
        state.listening = true;
        Ok(())
    }
    /// Are there exports, and nobody listens?
    pub fn is_deaf(&self) -> bool {
        let state = self.state.lock();
        !state.shown.is_empty() && !state.listening && !state.stopping
    }
    /// Makes a file an export, under its name.
    pub fn show(&self, ino: u64) {
        self.state.lock().shown.insert(ino);
    }
    /// These processes used the file when the last server ended: each counts as a user until it connects again, or ends.
    pub fn await_again(&self, ino: u64, clients: &[Process]) {
        if clients.is_empty() {
            return;
        }
        let mut told = self.told.lock();
        told.insert(ino, clients.to_vec());
        self.state.lock().expected.insert(ino, clients.to_vec());
    }
    /// Tells of processes that do not use anything any more, as far as that was not told when their connections ended. To be called now and then.
    pub fn look_after(&self) {
        let mut told = self.told.lock();
        let inos: Vec<u64> = told.keys().copied().collect();
        for ino in inos {
            self.tell_now(&mut told, ino);
        }
    }
    /// A client has ended its connection, and does not come back to it.
    fn has_left(&self, peer: &Peer) {
        peer.has_left.store(true, Release);
        let mut told = self.told.lock();
        let ino = peer.ino.load(Acquire);
        if told.contains_key(&ino) {
            self.tell_now(&mut told, ino);
        }
    }
    fn tell_now(&self, told: &mut BTreeMap<u64, Vec<Process>>, ino: u64) {
        let now = {
            let mut state = self.state.lock();
            if state.stopping {
                // Who is cut off comes back.
                return;
            }
            state.clients(ino)
        };
        self.tell_of(told, ino, now);
    }
    fn tell_of(&self, told: &mut BTreeMap<u64, Vec<Process>>, ino: u64, now: Vec<Process>) {
        if told.get(&ino).is_some_and(|told| *told == now) {
            return;
        }
        (self.tell)(ino, &now);
        match now.is_empty() {
            true => told.remove(&ino),
            false => told.insert(ino, now),
        };
    }
    /// The file is no export any more. Its connections are cut, and have ended on return.
    pub fn hide(&self, ino: u64) {
        let of_it = {
            let mut told = self.told.lock();
            let mut state = self.state.lock();
            state.shown.remove(&ino);
            state.expected.remove(&ino);
            told.remove(&ino);
            state.of(ino)
        };
        end(&of_it);
    }
    /// [`Exports::hide`] if nobody uses it; else who does. With `force` only who is connected counts.
    pub fn hide_unused(&self, ino: u64, force: bool) -> std::result::Result<(), Users> {
        let mut state = self.state.lock();
        match state.users(ino) {
            Some(Users::Expected(_)) if force => {}
            Some(users) => return Err(users),
            None => {}
        }
        state.shown.remove(&ino);
        state.expected.remove(&ino);
        Ok(())
    }
    /// Lets nobody connect until [`Exports::release`], if nobody uses it; else who does. Each is to be released once.
    pub fn hold_unused(&self, ino: u64) -> std::result::Result<(), Users> {
        let mut state = self.state.lock();
        match state.users(ino) {
            Some(users) => Err(users),
            None => {
                *state.held.entry(ino).or_default() += 1;
                Ok(())
            }
        }
    }
    /// Takes one [`Exports::hold_unused`] back.
    pub fn release(&self, ino: u64) {
        let mut state = self.state.lock();
        if let Some(holds) = state.held.get_mut(&ino) {
            *holds -= 1;
            if *holds == 0 {
                state.held.remove(&ino);
            }
        }
    }
    /// Connections to a file, after those that are just ending had `patience` to do so.
    pub fn connections(&self, ino: u64, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        loop {
            let now = self.state.lock().of(ino).len();
            if now == 0 || Instant::now() >= deadline {
                return now;
            }
            thread::sleep(STEP);
        }
    }
    /// Connections to all files.
    pub fn peers(&self) -> usize {
        let mut state = self.state.lock();
        state.forget_ended();
        state.peers.len()
    }
    /// Writes that wait for room: of one file, or of all.
    pub fn waiting(&self, ino: Option<u64>) -> usize {
        let peers = self.state.lock().peers.clone();
        // Of those whose client is gone nobody waits.
        let there = peers.iter().filter(|peer| !peer.crew.is_over());
        let links = there.filter_map(|p| p.link.get()?.upgrade());
        links.map(|link| link.waiting.count(ino)).sum()
    }
    /// Cuts all connections, and listens no more. On return no request is under way; who had one finds out by himself whether it was done.
    pub fn stop(&self) {
        let peers = {
            let mut state = self.state.lock();
            state.stopping = true;
            std::mem::take(&mut state.peers)
        };
        self.crew.stop();
        end(&peers);
    }

    /// Names of all exports.
    fn names(&self) -> Vec<String> {
        let shown = self.state.lock().shown.clone();
        let files = shown.iter().filter_map(|&ino| self.files.get(ino));
        files.map(|file| file.name().to_string()).collect()
    }
    fn find(&self, name: &str) -> Option<Arc<ServedFile>> {
        let file = self.files.lookup(name)?;
        let open = self.state.lock().is_open(file.ino());
        open.then_some(file)
    }

    /// Lets clients in until it is stopped.
    fn welcome(self: &Arc<Exports>, listener: &OwnedFd) {
        while !self.crew.is_stopping() {
            // Not by the standard library, which does not let itself be interrupted.
            let stream = match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(stream) => UnixStream::from(stream),
                Err(Errno::INTR) => continue,
                Err(e) => {
                    // Out of descriptors, most likely: others may free some.
                    tracing::warn!("cannot accept a connection: {e}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if let Err(e) = self.let_in(stream) {
                tracing::warn!("a connection was refused: {e}");
            }
        }
    }
    fn let_in(self: &Arc<Exports>, stream: UnixStream) -> Result<()> {
        // The mode of the socket keeps others away; this holds also where somebody changed it.
        let pid = private::check_peer(&stream)?;
        let io = |e: io::Error| Error::io("set up", "a connection", &e);
        stream.set_read_timeout(Some(PATIENCE)).map_err(io)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(io)?;
        let stream = Arc::new(stream);
        let out = Arc::new(Out::new(Arc::clone(&stream)));
        let peer = Arc::new(Peer {
            crew: Arc::default(),
            out: Arc::downgrade(&out),
            process: Process::of(pid),
            has_left: AtomicBool::new(false),
            ino: AtomicU64::new(0),
            link: OnceLock::new(),
        });
        let mut state = self.state.lock();
        state.forget_ended();
        if state.stopping || state.peers.len() >= MAX_PEERS {
            // Dropping it tells the client.
            return Ok(());
        }
        let (exports, of) = (Arc::clone(self), Arc::clone(&peer));
        peer.crew.start("nbd-worker", move || {
            let link = exports.greet(stream, out, &of)?;
            // Its end is not to wait for this thread.
            drop((exports, of));
            link.work()
        })?;
        state.peers.push(peer);
        Ok(())
    }
    /// Finds out what a client wants.
    fn greet(
        self: &Arc<Exports>,
        stream: Arc<UnixStream>,
        out: Arc<Out>,
        peer: &Arc<Peer>,
    ) -> Option<Arc<Link>> {
        let mut input = Input::new(Arc::clone(&stream));
        let mut greeting = Greeting {
            exports: self,
            input: &mut input,
            out: &out,
            register: &|file| self.register(peer, file),
        };
        let chosen = match greeting.talk() {
            Ok(chosen) => chosen?,
            Err(e) => {
                tracing::debug!("a client left in the middle of the greeting: {e}");
                return None;
            }
        };
        // From here on it may take its time.
        let patient = stream.set_read_timeout(None);
        patient.and_then(|()| stream.set_write_timeout(None)).ok()?;
        tracing::debug!(disk = chosen.file.name(), "a client connected");
        let crew = Arc::clone(&peer.crew);
        let shared = Shared {
            files: Arc::clone(&self.files),
            log: Arc::clone(&self.log),
            memory: Arc::clone(&self.waiting_memory),
        };
        let (exports, of) = (Arc::downgrade(self), Arc::downgrade(peer));
        let left = move || {
            if let (Some(exports), Some(peer)) = (exports.upgrade(), of.upgrade()) {
                exports.has_left(&peer);
            }
        };
        let link = Link::new(chosen, input, out, crew, shared, Box::new(left));
        let _ = peer.link.set(Arc::downgrade(&link));
        Some(link)
    }
    /// Notes which file a client uses, before the client hears that it may; false: it is no export any more.
    /// What a client that is gone had under way comes to its end first, and what else it had sent is dropped: nothing of it may come after what the new one
    /// writes. An error: that takes too long, and the client had better come again.
    fn register(&self, peer: &Peer, file: &ServedFile) -> io::Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        let ino = file.ino();
        loop {
            let mut told = self.told.lock();
            let mut state = self.state.lock();
            let mut of_it = state.of(ino);
            of_it.retain(|p| p.is_left());
            if of_it.is_empty() {
                if !state.is_open(ino) || state.stopping {
                    return Ok(false);
                }
                peer.ino.store(ino, Release);
                state.has_come(ino, peer.process);
                let now = state.clients(ino);
                drop(state);
                self.tell_of(&mut told, ino, now);
                return Ok(true);
            }
            drop(state);
            drop(told);
            for left in of_it {
                left.crew.begin_stop();
                if let Some(out) = left.out.upgrade() {
                    out.cut();
                }
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(STEP);
        }
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Peer {
    /// Is its client gone?
    fn is_left(&self) -> bool {
        self.crew.is_over() || self.out.upgrade().is_none_or(|out| out.is_left())
    }
}

impl State {
    /// May clients connect to it?
    fn is_open(&self, ino: u64) -> bool {
        self.shown.contains(&ino) && !self.held.contains_key(&ino)
    }
    fn forget_ended(&mut self) {
        self.peers.retain(|peer| peer.crew.ended().is_none());
    }
    /// The connections to a file.
    fn of(&mut self, ino: u64) -> Vec<Arc<Peer>> {
        self.forget_ended();
        let peers = self.peers.iter();
        let of_it = peers.filter(|peer| peer.ino.load(Acquire) == ino);
        of_it.cloned().collect()
    }
    /// The processes of its connections, and those that may connect again.
    fn clients(&mut self, ino: u64) -> Vec<Process> {
        let of_it = self.of(ino);
        let there = of_it.iter().filter(|p| !p.has_left.load(Acquire));
        let mut clients: Vec<Process> = there.filter_map(|p| p.process).collect();
        clients.extend(self.expected(ino));
        clients.sort();
        clients.dedup();
        clients.truncate(MOST_TOLD);
        clients
    }
    /// Those of whom the last server knew, who did not connect again, and have not ended.
    fn expected(&mut self, ino: u64) -> Vec<Process> {
        let Some(expected) = self.expected.get_mut(&ino) else {
            return Vec::new();
        };
        expected.retain(|process| process.is_there());
        let left = expected.clone();
        if left.is_empty() {
            self.expected.remove(&ino);
        }
        left
    }
    /// A process has connected: nobody waits for it any more.
    fn has_come(&mut self, ino: u64, process: Option<Process>) {
        if let Some(expected) = self.expected.get_mut(&ino) {
            expected.retain(|p| !process.is_some_and(|process| p.is(process)));
        }
    }
    fn users(&mut self, ino: u64) -> Option<Users> {
        let connections = self.of(ino).len();
        if connections > 0 {
            return Some(Users::Connected(connections));
        }
        let expected = self.expected(ino);
        (!expected.is_empty()).then_some(Users::Expected(expected))
    }
}

/// Ends connections, after what they have under way.
fn end(peers: &[Arc<Peer>]) {
    // All at once: each may have something to finish, and none is to begin with what else it was sent.
    for peer in peers {
        peer.crew.begin_stop();
        if let Some(out) = peer.out.upgrade() {
            out.cut();
        }
    }
    for peer in peers {
        let _: Ended = peer.crew.stop();
    }
}
