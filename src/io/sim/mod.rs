//! The imaginary disk: a filesystem in memory that loses, tears and reorders whatever was not synced.
//!
//! It owns names and contents, keeps for both what processes see apart from what a power cut leaves, and
//! draws all its disasters from seeds: the same seed, the same history, the same result.
//!
//! How it is used: run a history on [`SimDisk::root`], stop it with [`SimDisk::cut_at`] or let it end, then open what
//! [`SimDisk::crash`] (the power went) or [`SimDisk::kill`] (the process died) left, many times with many seeds.
//!
//! - Each call that changes or syncs something is an *operation* and has a number.
//! - After a power cut an un-synced write is done, dropped, done for some 512-byte sectors, or leaves garbage in some
//!   of those it touched; lengths, holes and names are changes like writes; any may be done without
//!   those before it. A grown file may come back longer and full of zeros.
//! - Garbage may be an old block, of the same file or another, that looks perfectly good.
//! - A directory entry is durable after the sync of its directory and not before; a file's sync
//!   does nothing for its name. Space reserved by [`File::allocate`] may be lost in spite of a sync.
//! - After a failed sync its changes may be durable, gone at once, or visible and never durable.
//! - A failed or killed write may be done in part.
//!
//! - Errors can be put on the calls of one kind ([`SimDisk::fail_nth`]), or on any calls in the order in which they come
//!   ([`SimDisk::fail_calls`]).
//!
//! Not here: time and threads. What another thread would do in between is done by [`SimDisk::meanwhile`], on purpose.
//!
//! [`File::allocate`]: super::File::allocate

mod crash;
mod harm;
mod image;
mod rng;
mod state;
mod verbs;

pub use harm::Harm;
pub use state::FaultKind;

use super::{Dir, common::fail};
use crate::error::Result;
use parking_lot::{Mutex, MutexGuard};
use state::{CallFault, DirNode, Fault, FileNode, Ino, Node, ROOT, State};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// Damage that comes by itself.
const ROT: &str = "damage";

/// Where the root of every imaginary disk seems to be.
const ROOT_PATH: &str = "/sim";

/// The calls that a fault can be put on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// `Dir::open` of an existing file.
    Open,
    /// `Dir::open` of a new file.
    Create,
    /// `Dir::subdir`, `Dir::list`, `Dir::entry`.
    Look,
    /// `Dir::create_dir`.
    CreateDir,
    /// `Dir::rename`, `Dir::rename_new`.
    Rename,
    /// `Dir::remove`, `Dir::remove_dir`.
    Remove,
    /// `Dir::sync`.
    SyncDir,
    /// `Dir::sync_filesystem`.
    SyncFilesystem,
    /// `File::read_at`.
    Read,
    /// `File::write_at`.
    Write,
    /// `File::sync`.
    Sync,
    /// `File::set_len`.
    SetLen,
    /// `File::allocate`.
    Allocate,
    /// `File::punch`.
    Punch,
    /// `File::map`.
    Map,
    /// `File::lock`.
    Lock,
    /// `File::len`, `File::data_ranges`, `File::allocated`.
    Stat,
}

/// What a power cut does to the un-synced changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Policy {
    /// All are there: the kindest power cut.
    AllDone,
    /// None is there.
    AllDropped,
    /// Decided by this seed.
    Random(u64),
}

/// What another thread does before a call of that kind.
type Meanwhile = (Verb, Box<dyn FnOnce() + Send>);

/// What all handles of one imaginary disk share.
struct Machine {
    state: Mutex<State>,
    /// See [`SimDisk::meanwhile`].
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl Machine {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
    /// Lets the others come in between, if they wait for this call.
    fn interrupt(&self, verb: Verb) {
        let waiting = {
            let mut meanwhile = self.meanwhile.lock();
            let due = meanwhile.as_ref().is_some_and(|(on, _)| *on == verb);
            meanwhile.take_if(|_| due)
        };
        if let Some((_, f)) = waiting {
            f();
        }
    }
}

/// An imaginary disk. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Machine>,
}

impl SimDisk {
    /// An empty disk. The seed decides what faults do; each [`SimDisk::crash`] has a seed of its own.
    pub fn new(seed: u64) -> SimDisk {
        SimDisk::of(State::new(seed))
    }
    fn of(state: State) -> SimDisk {
        SimDisk {
            state: Arc::new(Machine {
                state: Mutex::new(state),
                meanwhile: Mutex::new(None),
            }),
        }
    }
    /// From here on another seed decides what faults do.
    pub fn reseed(&self, seed: u64) {
        self.state.lock().rng = rng::Rng::new(seed);
    }
    /// The root directory.
    pub fn root(&self) -> Arc<dyn Dir> {
        Arc::new(verbs::SimDir::new(
            self.state.clone(),
            ROOT,
            PathBuf::from(ROOT_PATH),
        ))
    }

    /// Operations so far, which is the number of the next one.
    pub fn ops(&self) -> u64 {
        self.state.lock().ops
    }
    /// Turns the power off at operation `n`. It fails, as does every call after it, and may have happened, not have
    /// happened, or have happened in part.
    pub fn cut_at(&self, n: u64) {
        let mut state = self.state.lock();
        state.off |= n < state.ops;
        state.cut = Some(n);
    }
    /// Is the power off?
    pub fn is_off(&self) -> bool {
        self.state.lock().off
    }
    /// Changes that a power cut now could undo.
    pub fn unsynced(&self) -> usize {
        let state = self.state.lock();
        let count = |node: &Node| match node {
            Node::File(file) => file.pending.len(),
            Node::Dir(dir) => dir.pending.len(),
        };
        state.nodes.values().map(count).sum()
    }
    /// What a power cut now could leave, by [`Policy::Random`]. This disk goes on as before.
    pub fn crash(&self, seed: u64) -> SimDisk {
        self.crash_with(Policy::Random(seed))
    }
    /// What a power cut now leaves: everything on the new disk is durable, the power is on, no fault is set, the
    /// capacity is the same, operations count from 0.
    pub fn crash_with(&self, policy: Policy) -> SimDisk {
        SimDisk::of(crash::crash(&self.state.lock(), policy))
    }
    /// What the death of all processes leaves: everything they saw, un-synced as it was, and no lock. The
    /// operation that [`SimDisk::cut_at`] interrupted happened, did not, or (a write) did in part. Operations count on, no cut and
    /// no fault is set.
    pub fn kill(&self) -> SimDisk {
        let mut state = self.state.lock().clone();
        state.close_all();
        SimDisk::of(state)
    }

    /// Lets one call of `verb` fail, after `n` more have gone through.
    pub fn fail_nth(&self, verb: Verb, n: u64, kind: FaultKind) {
        self.fault(verb, n, kind, false);
    }
    /// Lets all calls of `verb` fail, after `n` more have gone through.
    pub fn fail_from(&self, verb: Verb, n: u64, kind: FaultKind) {
        self.fault(verb, n, kind, true);
    }
    fn fault(&self, verb: Verb, after: u64, kind: FaultKind, stays: bool) {
        self.state.lock().faults.push(Fault {
            verb,
            after,
            kind,
            stays,
        });
    }
    /// Lets `count` calls fail, of whatever kind, from the call number `from` on (see [`SimDisk::calls`]). Of [`FaultKind::Enospc`],
    /// calls that need no space know nothing: they fail with [`FaultKind::Eio`].
    pub fn fail_calls(&self, from: u64, count: u64, kind: FaultKind) {
        let calls = from..from.saturating_add(count);
        self.state
            .lock()
            .call_faults
            .push(CallFault { calls, kind });
    }
    /// Calls so far, those that change nothing included.
    pub fn calls(&self) -> u64 {
        self.state.lock().calls
    }
    /// Takes back all faults.
    pub fn clear_faults(&self) {
        let mut state = self.state.lock();
        state.faults.clear();
        state.call_faults.clear();
    }
    /// While they are held, faults strike nobody, calls are not counted, the disk is not full, and the power stays on (it goes at the first operation
    /// afterwards): for a look from outside in the middle of a history.
    pub fn hold_faults(&self, hold: bool) {
        self.state.lock().held = hold;
    }
    /// What was done to whom so far.
    pub fn harm(&self) -> Harm {
        self.state.lock().harm.clone()
    }
    /// Calls `f` once, before the next write, sync, read or hole of a file: what another thread does in between.
    pub fn meanwhile(&self, before: Verb, f: impl FnOnce() + Send + 'static) {
        *self.state.meanwhile.lock() = Some((before, Box::new(f)));
    }
    /// Is there something that [`SimDisk::meanwhile`] did not find the time for? It is taken back.
    pub fn take_meanwhile(&self) -> bool {
        self.state.meanwhile.lock().take().is_some()
    }
    /// From here on a line is kept for each operation, for people.
    pub fn keep_trace(&self) {
        self.state.lock().trace.get_or_insert_default();
    }
    /// Adds a line to those kept.
    pub fn note(&self, line: &str) {
        if let Some(trace) = &mut self.state.lock().trace {
            trace.push(line.to_string());
        }
    }
    /// The lines kept.
    pub fn trace(&self) -> Vec<String> {
        self.state.lock().trace.clone().unwrap_or_default()
    }
    /// Limits the space: whole 4 KiB blocks in use by files that have a name or are open. Names cost nothing.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().capacity = bytes.map(|bytes| bytes / crate::units::BLOCK);
    }
    /// Lets the garbage of a torn write fall on any sector of the 4 KiB pages it touched, as the page cache writes whole
    /// pages: crueller than the seam allows, for formats that trust it with whole pages only.
    pub fn set_garbage_pages(&self, on: bool) {
        self.state.lock().garbage_pages = on;
    }
    /// Bytes in use, as counted against the capacity.
    pub fn used(&self) -> u64 {
        self.state.lock().used * crate::units::BLOCK
    }
}

/// For tests of damage: changes behind everybody's back, durable at once. Paths are relative to the root. What an un-synced
/// change covers is still as uncertain as before.
impl SimDisk {
    /// Paths of all files, sorted.
    pub fn file_names(&self) -> Vec<String> {
        fn walk(state: &State, dir: Ino, prefix: &str, found: &mut Vec<String>) {
            let Some(Node::Dir(dir)) = state.nodes.get(&dir) else {
                return;
            };
            for (name, ino) in &dir.now {
                match state.nodes.get(ino) {
                    Some(Node::File(_)) => found.push(format!("{prefix}{name}")),
                    _ => walk(state, *ino, &format!("{prefix}{name}/"), found),
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.state.lock(), ROOT, "", &mut found);
        found.sort();
        found
    }
    /// Whole contents of a file.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>> {
        self.damage("read", path, |file| {
            let mut bytes = vec![0; file.now.len as usize];
            file.now.read(&mut bytes, 0);
            bytes
        })
    }
    /// Gives a file these contents; creates it, and the directories above it, if there is none.
    pub fn write_file(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let mut state = self.state.lock();
        let mut dir = ROOT;
        let mut parts = path.split('/').peekable();
        while let Some(part) = parts.next() {
            let is_file = parts.peek().is_none();
            super::common::check_name(&Path::new(ROOT_PATH).join(path), part)?;
            let Some(node) = state.dir(dir) else {
                return Err(fail(
                    "write",
                    &Path::new(ROOT_PATH).join(path),
                    libc::ENOTDIR,
                ));
            };
            dir = match node.now.get(part) {
                Some(ino) => *ino,
                None => {
                    let new = match is_file {
                        true => Node::File(FileNode::new(image::Image::default())),
                        false => Node::Dir(DirNode::default()),
                    };
                    let ino = state.new_node(new);
                    if let Some(node) = state.dir(dir) {
                        node.now.insert(part.to_string(), ino);
                        node.durable.insert(part.to_string(), ino);
                    }
                    ino
                }
            };
        }
        drop(state);
        self.damage("write", path, |file| {
            for image in [&mut file.now, &mut file.durable] {
                image.resize(0);
                image.put(bytes, 0);
                image.len = bytes.len() as u64;
            }
        })
    }
    /// Flips the bits of `mask` in the byte at `at`.
    pub fn flip(&self, path: &str, at: u64, mask: u8) -> Result<()> {
        let done = self.damage(ROT, path, |file| {
            for image in [&mut file.now, &mut file.durable] {
                // A file that was grown and not synced is shorter on the disk.
                if at < image.len {
                    let mut byte = [0];
                    image.read(&mut byte, at);
                    image.put(&[byte[0] ^ mask], at);
                }
            }
            at < file.now.len
        })?;
        match done {
            true => Ok(()),
            false => Err(super::common::past_end(
                &Path::new(ROOT_PATH).join(path),
                at,
                1,
            )),
        }
    }
    /// Puts bytes over what a file holds, as rot of a whole sector does; the length stays.
    pub fn overwrite(&self, path: &str, at: u64, bytes: &[u8]) -> Result<()> {
        self.damage(ROT, path, |file| {
            for image in [&mut file.now, &mut file.durable] {
                let n = image.len.saturating_sub(at).min(bytes.len() as u64);
                image.put(&bytes[..n as usize], at);
            }
        })
    }
    /// Sets the length of a file.
    pub fn truncate_file(&self, path: &str, len: u64) -> Result<()> {
        self.damage("truncate", path, |file| {
            file.now.resize(len);
            file.durable.resize(len);
        })
    }
    /// Takes a name away. Handles to the file stay good.
    pub fn remove_file(&self, path: &str) -> Result<()> {
        self.damage("remove", path, |_| ())?;
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut state = self.state.lock();
        if let Some(dir) = find(&mut state, dir) {
            state.remove_durably(dir, name);
        }
        Ok(())
    }
    fn damage<R>(&self, what: &str, path: &str, f: impl FnOnce(&mut FileNode) -> R) -> Result<R> {
        let mut state = self.state.lock();
        let ino = find(&mut state, path);
        let Some(Node::File(file)) = ino.and_then(|ino| state.nodes.get_mut(&ino)) else {
            return Err(fail(what, &Path::new(ROOT_PATH).join(path), libc::ENOENT));
        };
        let before = file.now.blocks();
        let result = f(file);
        let after = file.now.blocks();
        state.used = state.used + after - before;
        if what == ROT {
            state.harm.count(Harm::ROT);
        }
        Ok(result)
    }
}

fn find(state: &mut State, path: &str) -> Option<Ino> {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    parts.try_fold(ROOT, |dir, part| state.dir(dir)?.now.get(part).copied())
}
