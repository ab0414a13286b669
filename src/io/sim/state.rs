//! What the imaginary disk knows: for every file and directory what processes see (`now`), what would be
//! there after a power cut that spares nothing un-synced (`durable`), and the un-synced changes between the
//! two (`pending`), in order.
//!
//! Always true:
//! - `pending` applied to `durable` gives `now`, except for what a failed sync lost;
//! - an inode has at most one name, and all its life in one directory;
//! - `used` is the number of blocks of all files that have a name or a handle.

use super::{
    Harm, Verb,
    image::{Block, Change, Image, SECTOR, touched},
    rng::Rng,
};
use crate::{
    error::{Error, Kind, Result},
    io::common::fail,
    units::BLOCK,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
};

pub(super) type Ino = u64;
pub(super) const ROOT: Ino = 1;

/// Blocks of deleted contents that are remembered, to turn up where something else belongs.
const ATTIC: usize = 64;

/// An un-synced change and its number in the order of all.
#[derive(Clone)]
pub(super) struct Pending<C> {
    pub(super) seq: u64,
    pub(super) change: C,
}

/// One un-synced change of a directory's names.
#[derive(Clone)]
pub(super) enum NameChange {
    Create {
        name: String,
        ino: Ino,
    },
    Rename {
        from: String,
        to: String,
        ino: Ino,
        replaced: Option<Ino>,
    },
    Remove {
        name: String,
        ino: Ino,
    },
}

#[derive(Clone)]
pub(super) struct FileNode {
    pub(super) now: Image,
    pub(super) durable: Image,
    pub(super) pending: Vec<Pending<Change>>,
    /// Has it a name?
    pub(super) linked: bool,
    /// Is it durable that it has none?
    pub(super) forgotten: bool,
    pub(super) handles: usize,
    /// Handles that hold the lock, and whether exclusively.
    pub(super) locks: BTreeMap<u64, bool>,
    /// Blocks that a failed sync did not write, and no later one will, until the page cache has let go of them: ext4 does so with blocks
    /// that were reserved for the page and never written.
    pub(super) stuck: BTreeSet<u64>,
}

#[derive(Clone, Default)]
pub(super) struct DirNode {
    pub(super) now: BTreeMap<String, Ino>,
    pub(super) durable: BTreeMap<String, Ino>,
    pub(super) pending: Vec<Pending<NameChange>>,
    pub(super) removed: bool,
}

#[derive(Clone)]
pub(super) enum Node {
    File(FileNode),
    Dir(DirNode),
}

/// What an injected fault says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultKind {
    /// The device fails: [`Kind::Io`].
    Eio,
    /// No space left: [`Kind::NoSpace`].
    Enospc,
    /// The filesystem cannot do it: [`Kind::Unsupported`].
    Unsupported,
}

impl FaultKind {
    fn errno(self) -> i32 {
        match self {
            FaultKind::Eio => libc::EIO,
            FaultKind::Enospc => libc::ENOSPC,
            FaultKind::Unsupported => libc::EOPNOTSUPP,
        }
    }
}

#[derive(Clone)]
pub(super) struct Fault {
    pub(super) verb: Verb,
    /// Calls of the verb that still go through.
    pub(super) after: u64,
    pub(super) kind: FaultKind,
    /// Does it stay, or is it over after one failure?
    pub(super) stays: bool,
}

/// A fault on whatever call comes then.
#[derive(Clone)]
pub(super) struct CallFault {
    pub(super) calls: Range<u64>,
    pub(super) kind: FaultKind,
}

impl Verb {
    /// May it find the disk full?
    fn takes_space(self) -> bool {
        matches!(
            self,
            Verb::Create
                | Verb::CreateDir
                | Verb::Rename
                | Verb::Write
                | Verb::SetLen
                | Verb::Allocate
                | Verb::Sync
                | Verb::SyncDir
                | Verb::SyncFilesystem
        )
    }
}

/// How an operation goes on after [`State::operation`] counted it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Go,
    /// It fails, perhaps half done.
    Fault(i32),
    /// The power goes in the middle of it.
    Flight,
}

#[derive(Clone)]
pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) nodes: BTreeMap<Ino, Node>,
    pub(super) next_ino: Ino,
    pub(super) next_handle: u64,
    pub(super) ops: u64,
    pub(super) cut: Option<u64>,
    pub(super) off: bool,
    /// Where the change stands that was in flight when the power went.
    pub(super) flight: Option<Ino>,
    pub(super) faults: Vec<Fault>,
    pub(super) call_faults: Vec<CallFault>,
    /// Calls that faults can be put on.
    pub(super) calls: u64,
    /// Faults wait, and calls are not counted.
    pub(super) held: bool,
    pub(super) harm: Harm,
    pub(super) trace: Option<Vec<String>>,
    /// In blocks.
    pub(super) capacity: Option<u64>,
    pub(super) used: u64,
    pub(super) attic: Vec<Block>,
    /// May garbage fall on a whole page, or only on the sectors that were written?
    pub(super) garbage_pages: bool,
}

pub(super) fn power_off(what: &str, path: &Path) -> Error {
    Error::new(
        Kind::Io,
        format!("cannot {what} {}: the power is off", path.display()),
    )
    .path(path)
}

impl FileNode {
    pub(super) fn new(contents: Image) -> FileNode {
        FileNode {
            now: contents.clone(),
            durable: contents,
            pending: Vec::new(),
            linked: true,
            forgotten: false,
            handles: 0,
            locks: BTreeMap::new(),
            stuck: BTreeSet::new(),
        }
    }
    fn alive(&self) -> bool {
        self.linked || self.handles > 0
    }
    /// All that is pending becomes durable; except reservations, which `fdatasync` owes nobody.
    fn sync(&mut self, rng: &mut Rng) {
        if self.pending.is_empty() && self.durable.len == self.now.len {
            return;
        }
        let mut kept = Vec::new();
        for p in std::mem::take(&mut self.pending) {
            match p.change {
                Change::Allocate { .. } if rng.chance(1, 2) => kept.push(p),
                Change::Allocate { .. } => self.durable.apply(&p.change),
                Change::Write { .. } if !self.stuck.is_empty() => {
                    let range = p.change.range();
                    for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                        if !self.stuck.contains(&block) {
                            let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
                            let part = range.start.max(start)..range.end.min(end);
                            self.durable.copy_from(&self.now, part);
                        }
                    }
                }
                _ => self.durable.copy_from(&self.now, p.change.range()),
            }
        }
        self.durable.len = self.now.len;
        self.durable.trim();
        self.pending = kept;
    }
    /// Reads see the disk again, if nothing waits to be written.
    pub(super) fn forget_cached(&mut self, at: u64, len: u64) {
        let dirty = |p: &Pending<Change>| !matches!(p.change, Change::Allocate { .. });
        if !self.pending.iter().any(dirty) {
            let end = at.saturating_add(len);
            self.now.reload(&self.durable, at..end);
            self.stuck
                .retain(|&b| b * BLOCK < at || (b + 1) * BLOCK > end);
        }
    }
    /// A sync that fails. The kernel has tried to write every dirty page, and whatever became of it, the page is
    /// clean now: the next sync has nothing to do for it and reports success.
    fn fail_sync(&mut self, rng: &mut Rng) {
        let mut dirty = BTreeMap::<u64, u8>::new();
        for p in std::mem::take(&mut self.pending) {
            let range = p.change.range();
            match p.change {
                Change::Write { .. } => {
                    for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
                        let per_block = BLOCK / SECTOR;
                        *dirty.entry(sector / per_block).or_default() |= 1 << (sector % per_block);
                    }
                }
                // Changes of the filesystem's own structures: done, or lost.
                Change::SetLen { .. } | Change::Punch { .. } if rng.chance(1, 2) => {
                    self.durable.copy_from(&self.now, range);
                }
                Change::SetLen { .. } | Change::Punch { .. } | Change::Allocate { .. } => {}
            }
        }
        // Filesystems differ in what they show afterwards: the old contents again, or the lost ones.
        let usual = rng.below(4);
        for (block, mask) in dirty {
            let fate = match rng.chance(1, 2) {
                true => usual,
                false => rng.below(4),
            };
            if fate == 2 && !self.durable.written(block) {
                self.stuck.insert(block);
            }
            for sector in (0..BLOCK / SECTOR).filter(|s| mask >> s & 1 == 1) {
                let at = block * BLOCK + sector * SECTOR;
                match fate {
                    0 => self.durable.copy_from(&self.now, at..at + SECTOR),
                    1 => self.now.copy_from(&self.durable, at..at + SECTOR),
                    2 => {}
                    _ => {
                        let mut garbage = [0; SECTOR as usize];
                        rng.fill(&mut garbage);
                        self.durable.put(&garbage, at);
                    }
                }
            }
        }
        self.now.trim();
        // The length is part of the inode, which stays dirty if it was not written: a later good sync does it.
        if rng.chance(1, 2) {
            self.durable.len = self.now.len;
        }
    }
}

impl NameChange {
    /// Does the change. An inode never gets a second name: a rename that is done without the
    /// one before it takes the file from wherever it stands.
    pub(super) fn apply(&self, names: &mut BTreeMap<String, Ino>) {
        match self {
            NameChange::Create { name, ino } => {
                names.insert(name.clone(), *ino);
            }
            NameChange::Rename { from, to, ino, .. } => {
                if names.get(from) == Some(ino) {
                    names.remove(from);
                } else {
                    names.retain(|_, i| i != ino);
                }
                names.insert(to.clone(), *ino);
            }
            NameChange::Remove { name, .. } => {
                names.remove(name);
            }
        }
    }
    fn inode(&self) -> Ino {
        match *self {
            NameChange::Create { ino, .. }
            | NameChange::Rename { ino, .. }
            | NameChange::Remove { ino, .. } => ino,
        }
    }
    /// The inode that has no name any more because of it.
    fn unlinked(&self) -> Option<Ino> {
        match *self {
            NameChange::Create { .. } => None,
            NameChange::Rename { replaced, .. } => replaced,
            NameChange::Remove { ino, .. } => Some(ino),
        }
    }
}

impl State {
    pub(super) fn new(seed: u64) -> State {
        State {
            rng: Rng::new(seed),
            nodes: BTreeMap::from([(ROOT, Node::Dir(DirNode::default()))]),
            next_ino: ROOT + 1,
            next_handle: 0,
            ops: 0,
            cut: None,
            off: false,
            flight: None,
            faults: Vec::new(),
            call_faults: Vec::new(),
            calls: 0,
            held: false,
            harm: Harm::default(),
            trace: None,
            capacity: None,
            used: 0,
            attic: Vec::new(),
            garbage_pages: false,
        }
    }

    /// Entry of every call that changes nothing.
    pub(super) fn look(&mut self, verb: Verb, what: &str, path: &Path) -> Result<()> {
        if self.off {
            return Err(power_off(what, path));
        }
        match self.fault(verb) {
            Some(errno) => Err(fail(what, path, errno)),
            None => Ok(()),
        }
    }
    /// Entry of every call that changes or syncs something: gives it its number.
    pub(super) fn operation(&mut self, verb: Verb, what: &str, path: &Path) -> Result<Pass> {
        if self.off {
            return Err(power_off(what, path));
        }
        let number = self.ops;
        self.ops += 1;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{what} {}", path.display()));
        }
        if !self.held && self.cut.is_some_and(|cut| number >= cut) {
            self.off = true;
            return Ok(Pass::Flight);
        }
        Ok(self.fault(verb).map_or(Pass::Go, Pass::Fault))
    }
    /// Adds to the last line of the trace what its operation is about.
    pub(super) fn trace_range(&mut self, at: u64, len: u64) {
        if let Some(line) = self.trace.as_mut().and_then(|trace| trace.last_mut()) {
            line.push_str(&format!(" {at:#x}+{len}"));
        }
    }
    fn fault(&mut self, verb: Verb) -> Option<i32> {
        if self.held {
            return None;
        }
        let call = self.calls;
        self.calls += 1;
        let on_call = self.call_faults.iter().find(|f| f.calls.contains(&call));
        let mut hit = on_call.map(|f| match f.kind {
            FaultKind::Enospc if !verb.takes_space() => FaultKind::Eio.errno(),
            kind => kind.errno(),
        });
        self.faults.retain_mut(|fault| {
            if fault.verb != verb {
                return true;
            }
            if fault.after > 0 {
                fault.after -= 1;
                return true;
            }
            hit = hit.or(Some(fault.kind.errno()));
            fault.stays
        });
        if let Some(errno) = hit {
            self.harm.struck(verb, errno);
        }
        hit
    }

    pub(super) fn file(&mut self, ino: Ino) -> &mut FileNode {
        match self.nodes.get_mut(&ino) {
            Some(Node::File(file)) => file,
            // Handles and names keep their inode; a test that gets here has found a bug in this module.
            _ => panic!("inode {ino} of the imaginary disk is no file"),
        }
    }
    /// The directory, unless it was removed.
    pub(super) fn dir(&mut self, ino: Ino) -> Option<&mut DirNode> {
        match self.nodes.get_mut(&ino) {
            Some(Node::Dir(dir)) if !dir.removed => Some(dir),
            _ => None,
        }
    }
    pub(super) fn new_node(&mut self, node: Node) -> Ino {
        let ino = self.next_ino;
        self.next_ino += 1;
        self.nodes.insert(ino, node);
        ino
    }

    /// Does a file's change for the processes, and notes it as un-synced.
    pub(super) fn change(&mut self, ino: Ino, change: Change) {
        let seq = self.ops;
        if let Change::Punch { at, .. } = change {
            let old = self.file(ino).now.any_block(at / BLOCK);
            self.stow(old);
        }
        let file = self.file(ino);
        let before = file.now.blocks();
        file.now.apply(&change);
        let after = file.now.blocks();
        // What becomes a hole is looked up anew.
        match change {
            Change::Punch { at, len } => {
                let end = at.saturating_add(len);
                file.stuck
                    .retain(|&b| b * BLOCK < at || (b + 1) * BLOCK > end);
            }
            Change::SetLen { len, .. } => file.stuck.retain(|&b| b * BLOCK < len),
            Change::Write { .. } | Change::Allocate { .. } => {}
        }
        file.pending.push(Pending { seq, change });
        self.used = self.used + after - before;
    }
    /// Notes a file's change that was in flight when the power went.
    pub(super) fn change_in_flight(&mut self, ino: Ino, change: Change) {
        let seq = self.ops;
        self.file(ino).pending.push(Pending { seq, change });
        self.flight = Some(ino);
    }
    /// How much of a range, from its start, there is space for.
    pub(super) fn room(&mut self, ino: Ino, at: u64, len: u64) -> u64 {
        let Some(capacity) = self.capacity.filter(|_| !self.held) else {
            return len;
        };
        let mut free = capacity.saturating_sub(self.used);
        let file = self.file(ino);
        for block in touched(&(at..at + len)) {
            if file.now.has(block) {
                continue;
            }
            if free == 0 {
                return (block * BLOCK).saturating_sub(at);
            }
            free -= 1;
        }
        len
    }

    /// Does a change of names for the processes, and notes it as un-synced.
    pub(super) fn rename(&mut self, dir: Ino, change: NameChange) {
        let seq = self.ops;
        let unlinked = change.unlinked();
        if let Some(node) = self.dir(dir) {
            change.apply(&mut node.now);
            node.pending.push(Pending { seq, change });
        }
        let Some(ino) = unlinked else { return };
        match self.nodes.get_mut(&ino) {
            Some(Node::Dir(node)) => node.removed = true,
            Some(Node::File(node)) => {
                node.linked = false;
                self.release(ino);
            }
            None => {}
        }
    }
    /// Removes a file's name as if that had been synced at once.
    pub(super) fn remove_durably(&mut self, dir: Ino, name: &str) {
        let Some(node) = self.dir(dir) else { return };
        let Some(ino) = node.now.remove(name) else {
            return;
        };
        // Under whatever name the disk knows it, and without a change that could bring it back.
        node.durable.retain(|n, i| n != name && *i != ino);
        node.pending.retain(|p| p.change.inode() != ino);
        self.file(ino).linked = false;
        self.forget(ino);
    }
    /// Notes a change of names that was in flight when the power went.
    pub(super) fn rename_in_flight(&mut self, ino: Ino, change: NameChange) {
        let seq = self.ops;
        if let Some(dir) = self.dir(ino) {
            dir.pending.push(Pending { seq, change });
            self.flight = Some(ino);
        }
    }
    /// Gives back the space of a file that has neither name nor handle; forgets it when that is durable.
    fn release(&mut self, ino: Ino) {
        let file = self.file(ino);
        if file.alive() {
            return;
        }
        let blocks = file.now.blocks();
        let old = file.now.any_block(0);
        // What a power cut may bring back stands in the other two.
        file.now = Image::default();
        let forgotten = file.forgotten;
        self.used -= blocks;
        self.stow(old);
        if forgotten {
            self.nodes.remove(&ino);
        }
    }
    fn stow(&mut self, old: Option<Block>) {
        let Some(old) = old else { return };
        if self.attic.len() < ATTIC {
            self.attic.push(old);
        } else {
            let place = self.rng.below(ATTIC as u64) as usize;
            self.attic[place] = old;
        }
    }
    /// The durable end of an inode without a name.
    fn forget(&mut self, ino: Ino) {
        match self.nodes.get_mut(&ino) {
            Some(Node::File(file)) if !file.linked => {
                file.forgotten = true;
                self.release(ino);
            }
            Some(Node::Dir(dir)) if dir.removed => {
                let mut below: BTreeSet<Ino> = dir.durable.values().copied().collect();
                below.extend(dir.pending.iter().filter_map(|p| p.change.unlinked()));
                self.nodes.remove(&ino);
                for ino in below {
                    self.forget(ino);
                }
            }
            _ => {}
        }
    }

    pub(super) fn open_handle(&mut self, ino: Ino) -> u64 {
        self.file(ino).handles += 1;
        self.next_handle += 1;
        self.next_handle
    }
    pub(super) fn close_handle(&mut self, ino: Ino, handle: u64) {
        let file = self.file(ino);
        file.handles -= 1;
        file.locks.remove(&handle);
        self.release(ino);
    }

    pub(super) fn sync_file(&mut self, ino: Ino) {
        let mut rng = self.rng.clone();
        let file = self.file(ino);
        // One without name and handle shows nothing any more, and what it held may still come back.
        if file.alive() {
            file.sync(&mut rng);
        }
        self.rng = rng;
    }
    pub(super) fn fail_sync_file(&mut self, ino: Ino) {
        let mut rng = self.rng.clone();
        let file = self.file(ino);
        if file.alive() {
            let before = file.now.blocks();
            file.fail_sync(&mut rng);
            let after = file.now.blocks();
            self.used = self.used + after - before;
        }
        self.rng = rng;
    }
    pub(super) fn sync_dir(&mut self, ino: Ino) {
        let Some(dir) = self.dir(ino) else { return };
        let done = std::mem::take(&mut dir.pending);
        for p in &done {
            p.change.apply(&mut dir.durable);
        }
        for p in done {
            if let Some(unlinked) = p.change.unlinked() {
                self.forget(unlinked);
            }
        }
    }
    /// A failed sync of names: some became durable; the others wait for the next sync, or are lost though
    /// they are seen.
    pub(super) fn fail_sync_dir(&mut self, ino: Ino) {
        let mut rng = self.rng.clone();
        let Some(dir) = self.dir(ino) else { return };
        let mut rest = std::mem::take(&mut dir.pending);
        let done = rng.below(rest.len() as u64 + 1) as usize;
        for p in rest.drain(..done) {
            p.change.apply(&mut dir.durable);
        }
        if rng.chance(1, 2) {
            dir.pending = rest;
        }
        self.rng = rng;
    }
    /// Files first and then directories, as forgetting a file takes it out of the list.
    pub(super) fn inodes(&self) -> (Vec<Ino>, Vec<Ino>) {
        self.nodes
            .keys()
            .copied()
            .partition(|ino| matches!(self.nodes[ino], Node::File(_)))
    }
    /// All files are closed: the processes died. What was in flight happened, or not, or a part of it did.
    pub(super) fn close_all(&mut self) {
        if let Some(ino) = self.flight.take() {
            self.land(ino);
        }
        let (files, _) = self.inodes();
        for ino in files {
            let file = self.file(ino);
            file.locks.clear();
            if file.handles > 0 {
                file.handles = 0;
                self.release(ino);
            }
        }
        self.off = false;
        self.cut = None;
        self.faults.clear();
        self.call_faults.clear();
        self.held = false;
        self.harm = Harm::default();
        self.harm.count(Harm::KILLS);
    }
    fn land(&mut self, ino: Ino) {
        let done = self.rng.below(3);
        match self.nodes.get_mut(&ino) {
            Some(Node::Dir(dir)) => match dir.pending.pop() {
                Some(p) if done > 0 => self.rename(ino, p.change),
                _ => {}
            },
            Some(Node::File(file)) => match file.pending.pop().map(|p| p.change) {
                Some(Change::Write { at, bytes }) if done == 1 => {
                    let n = self.some_blocks(at, bytes.len() as u64) as usize;
                    let bytes = bytes[..n].into();
                    self.change(ino, Change::Write { at, bytes });
                }
                Some(change) if done > 0 => self.change(ino, change),
                _ => {}
            },
            None => {}
        }
    }
    /// A length that ends at a block border within `len` bytes from `at`: what was done of a large request before
    /// it failed.
    pub(super) fn some_blocks(&mut self, at: u64, len: u64) -> u64 {
        let blocks = touched(&(at..at + len));
        let end = blocks.start + self.rng.below(blocks.end - blocks.start + 1);
        (end * BLOCK).saturating_sub(at).min(len)
    }
}
