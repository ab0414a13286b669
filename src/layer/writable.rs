//! The one writer of a layer (FORMAT.md, section 4).
//!
//! Always true:
//! - a slot is written once between two times of being free: nobody ever sees half of an overwrite;
//! - a pointer is published after its data stands in the file, under the lock of its region's shard;
//! - everything published since the last close of an epoch is in `log`, in publishing order for each block;
//! - a slot that a durable commit names is free at the earliest when a later commit that does not is durable;
//! - `commit` is held by the one thread that writes journal, runs and superblock.
//!
//! Order of locks: `commit`, `gate`, a shard of `table`, `log`, `space`. None is held over data I/O; `commit` is held over the I/O
//! of a commit.

use super::quiesce::{Guard, Quiesce};
use super::recover::{self, Change};
use super::space::{FreeSet, SPARE, Space};
use super::{MappedRun, State, open_runs, read_blocks, read_header, region_of};
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, CommitEntry, FreeExtent, Header, INLINE_FREE, JOURNAL_SLOTS, JOURNAL_START, MAX_DIRTY,
    MAX_RUNS, Pointer, RunRef, Superblock, commit_slots, encode_commit,
};
use crate::io::File;
use crate::map::run::{Builder, Run, max_len};
use crate::map::{Items, Memtable, Ranges, RegionMap, WORDS, merge};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot, blocks};
use parking_lot::{Condvar, Mutex, RwLock};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Shards of the table of resident regions.
const SHARDS: usize = 64;
/// Clean regions kept in a shard: with [`SHARDS`] at most 8,192 regions, 16 GiB of disk, at most 34 MiB of memory.
const SHARD_REGIONS: usize = 128;
/// Free slots that keep their host blocks, so that the next writes find written blocks: 4 MiB.
const HOT_SLOTS: u64 = 1024;
/// Journal slots whose host space is reserved in one go.
const RESERVE_STEP: u32 = 16;
/// Slots freed by one epoch before the disk flushes by itself: bounds the list.
const MAX_FREED: usize = 1 << 20;
/// A journal this full is checkpointed at the end of a flush.
const CHECKPOINT_SLOTS: u32 = JOURNAL_SLOTS / 2;

/// A region of which everything this layer knows is in memory.
struct Resident {
    map: RegionMap,
    /// Epoch of the last change; not evicted before that is in a run.
    changed: u64,
    /// Blocks changed in epoch `changed`: their slots are in no commit yet.
    dirty: [u64; WORDS],
}

/// What was published since the last close.
#[derive(Default)]
struct Log {
    entries: Vec<CommitEntry>,
    /// Slots of earlier commits that these entries replace.
    freed: Vec<(u32, u32)>,
    data_delta: i64,
    zero_delta: i64,
    /// Journal entries that were reserved for what is in `entries`.
    reserved: u64,
}

/// What only the committing thread touches.
struct Commit {
    superblock: Superblock,
    /// Copy 2 was written but not synced yet.
    second_pending: bool,
    next_commit: u64,
    /// Journal slots in use.
    head: u32,
    /// Commits since the last checkpoint, over each other.
    memtable: Memtable,
    /// Free slots below `high`, by the last durable commit.
    free: FreeSet,
    high: u64,
    forgotten: u64,
    data_blocks: i64,
    zero_blocks: i64,
    /// Newest epoch that is in a commit.
    epoch: u64,
    buffer: Vec<u8>,
}

#[derive(Default)]
struct Group {
    running: bool,
    /// All epochs up to this one are durable.
    durable: u64,
}

/// What opening found, for the log.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    /// Was it closed uncleanly?
    pub recovered: bool,
    /// Commits found in the journal.
    pub commits: u64,
    /// A last commit that was dropped as incomplete.
    pub dropped: Option<u64>,
    /// One superblock copy could not be read.
    pub damaged_copy: bool,
}

/// A layer open for writing.
pub struct Layer {
    id: Id,
    header: Header,
    file: Arc<dyn File>,
    size: u64,
    opened: Opened,
    table: Vec<RwLock<HashMap<u32, Resident>>>,
    /// Whole regions zeroed since the last checkpoint that are not resident; tag: epoch.
    zeroed: RwLock<Ranges>,
    runs: RwLock<Arc<Vec<Arc<MappedRun>>>>,
    gate: RwLock<()>,
    /// The open epoch.
    epoch: AtomicU64,
    /// Epochs up to this one are in runs.
    checkpointed: AtomicU64,
    log: Mutex<Log>,
    space: Mutex<Space>,
    quiesce: Quiesce,
    commit: Mutex<Commit>,
    group: Mutex<Group>,
    joined: Condvar,
    data_blocks: AtomicI64,
    zero_blocks: AtomicI64,
    poison: Mutex<Option<Error>>,
    poisoned: AtomicBool,
    can_punch: AtomicBool,
}

/// Slots that were taken and hold no published data yet. They must go to [`Layer::publish`], or back by
/// [`Layer::not_written`].
pub struct Taken {
    /// The extents, in order.
    pub extents: Vec<(u32, u32)>,
    /// Journal entries reserved.
    entries: u64,
}

impl Layer {
    /// Opens a layer for writing, recovering it if it was not closed cleanly. The caller has locked the file. A sealed layer is
    /// refused with [`Kind::ReadOnly`].
    pub fn open(file: Arc<dyn File>) -> Result<Layer> {
        let header = read_header(&*file)?;
        let id = Id(header.layer);
        recover::settle(&*file, &header)?;
        let found = recover::superblock(&*file, &header)?;
        let superblock = found.superblock;
        let state = State::of(&superblock);
        if state == State::Sealed {
            return Err(Error::new(Kind::ReadOnly, "the layer is sealed")
                .layer(id)
                .path(file.path()));
        }
        let runs = open_runs(&*file, &id, superblock.run_refs())?;
        let mut free =
            read_free_list(&*file, &superblock).map_err(|e| e.layer(id).path(file.path()))?;
        let mut high = superblock.high_water.get();
        let mut opened = Opened {
            damaged_copy: found.damaged_copy,
            ..Opened::default()
        };
        let mut memtable = Memtable::new();
        let mut next_commit = superblock.next_commit.get();
        let (mut data, mut zero) = (superblock.data_blocks.get(), superblock.zero_blocks.get());
        if state == State::Writable {
            let replay = recover::replay(&*file, &superblock, &runs)?;
            for change in &replay.changes {
                match *change {
                    Change::Used(slot) => use_slot(&mut free, &mut high, slot.0),
                    Change::Freed(slot) => free.insert(slot.0, 1),
                }
            }
            opened.recovered = true;
            opened.commits = replay.commits;
            opened.dropped = replay.dropped;
            memtable = replay.memtable;
            next_commit = replay.next_commit;
            (data, zero) = (replay.data_blocks, replay.zero_blocks);
        }
        let mut space = Space::new(high);
        for (start, len) in free.iter() {
            space.cold.insert(start, len);
        }
        let layer = Layer {
            id,
            header,
            size: superblock.size.get(),
            opened,
            table: (0..SHARDS).map(|_| RwLock::default()).collect(),
            zeroed: RwLock::default(),
            runs: RwLock::new(Arc::new(runs)),
            gate: RwLock::new(()),
            epoch: AtomicU64::new(1),
            checkpointed: AtomicU64::new(0),
            log: Mutex::default(),
            space: Mutex::new(space),
            quiesce: Quiesce::default(),
            commit: Mutex::new(Commit {
                second_pending: false,
                next_commit,
                head: 0,
                memtable,
                free,
                high,
                forgotten: superblock.forgotten.get(),
                data_blocks: data as i64,
                zero_blocks: zero as i64,
                epoch: 0,
                buffer: Vec::new(),
                superblock,
            }),
            group: Mutex::default(),
            joined: Condvar::new(),
            data_blocks: AtomicI64::new(data as i64),
            zero_blocks: AtomicI64::new(zero as i64),
            poison: Mutex::new(None),
            poisoned: AtomicBool::new(false),
            can_punch: AtomicBool::new(true),
            file,
        };
        layer.begin(state, found.second_differs)?;
        Ok(layer)
    }

    /// Makes what was found durable and starts a new generation.
    fn begin(&self, found: State, second_differs: bool) -> Result<()> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        let generation = c.superblock.generation.get() + 1;
        if second_differs {
            // A crash tore or dropped copy 2: it takes over before the checkpoint below writes to the one good copy.
            let bytes = c.superblock.encode().to_vec();
            self.file.write_at(&bytes, Slot(2).at())?;
            self.file.sync()?;
        }
        if found == State::Writable {
            // Everything behind the high-water mark was never committed.
            if self.file.len()? > Slot(c.high as u32).at() {
                self.file.set_len(Slot(c.high as u32).at())?;
            }
            for (start, len) in c.free.iter() {
                self.punch(start, len)?;
            }
        }
        c.superblock.generation = U64::new(generation);
        self.checkpoint(c, State::Writable)
    }

    /// Its id.
    pub fn id(&self) -> Id {
        self.id
    }
    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// What opening found.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }
    /// Its file.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }
    /// Blocks with data of their own, and blocks it records as zeros, un-flushed ones included.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.data_blocks.load(SeqCst).max(0) as u64,
            self.zero_blocks.load(SeqCst).max(0) as u64,
        )
    }
    /// A read begins: until the guard goes, no slot that it may find is reused.
    pub fn enter(&self) -> Guard<'_> {
        self.quiesce.enter()
    }

    // ---- lookup ---------------------------------------------------------------------------------------------

    fn shard(&self, region: Region) -> &RwLock<HashMap<u32, Resident>> {
        &self.table[region.0 as usize % SHARDS]
    }

    /// The pointers of blocks `index..index+out.len()` of a region. The caller holds a guard from before.
    pub fn lookup(&self, region: Region, index: usize, out: &mut [Pointer]) -> Result<()> {
        let shard = self.shard(region);
        {
            let table = shard.read();
            if let Some(resident) = table.get(&region.0) {
                for (i, p) in out.iter_mut().enumerate() {
                    *p = resident.map.get(index + i);
                }
                return Ok(());
            }
        }
        // Nothing of this layer can be there: spare the table an empty entry.
        if self.knows_nothing(region) {
            out.fill(Pointer::Absent);
            return Ok(());
        }
        let mut table = shard.write();
        let resident = self.resident(&mut table, region)?;
        for (i, p) in out.iter_mut().enumerate() {
            *p = resident.map.get(index + i);
        }
        Ok(())
    }

    /// Is it certain, without a look into any run's payload, that the layer has nothing for the region? A region that changed
    /// since the last checkpoint is resident or in `zeroed`.
    pub fn knows_nothing(&self, region: Region) -> bool {
        // In the order in which knowledge moves, so that it cannot slip by: a discard notes the range in `zeroed` before it takes the
        // region out of the table, a checkpoint installs its run before it forgets the zeroed ranges that are in it.
        let resident = self.shard(region).read().contains_key(&region.0);
        let zeroed = !self.zeroed.read().is_empty();
        let runs = self.runs.read();
        !resident && !zeroed && runs.is_empty()
    }

    /// The entry of a region, loaded if need be.
    fn resident<'t>(
        &self,
        table: &'t mut HashMap<u32, Resident>,
        region: Region,
    ) -> Result<&'t mut Resident> {
        if !table.contains_key(&region.0) {
            let map = self.load(region)?;
            if table.len() >= SHARD_REGIONS {
                self.evict(table);
            }
            table.insert(
                region.0,
                Resident {
                    map,
                    changed: 0,
                    dirty: [0; WORDS],
                },
            );
        }
        table
            .get_mut(&region.0)
            .ok_or_else(|| Error::new(Kind::Io, "a region vanished from the table"))
    }

    fn load(&self, region: Region) -> Result<RegionMap> {
        if self.zeroed.read().get(region.0).is_some() {
            return Ok(RegionMap::zeros());
        }
        let runs = self.runs.read().clone();
        region_of(&runs, region).map_err(|e| e.layer(self.id).path(self.file.path()))
    }

    /// Drops a few regions that are in runs. A bounded look: with everything changed there is nothing to drop, and the
    /// journal bounds that.
    fn evict(&self, table: &mut HashMap<u32, Resident>) {
        let checkpointed = self.checkpointed.load(SeqCst);
        let gone: Vec<u32> = table
            .iter()
            .take(4 * SHARD_REGIONS)
            .filter(|(_, r)| r.changed <= checkpointed)
            .map(|(&r, _)| r)
            .take(16)
            .collect();
        for region in gone {
            table.remove(&region);
        }
    }

    /// Reads neighbouring data blocks, checking their sums. The caller holds a guard from before the lookup.
    pub fn read_blocks(&self, slot: Slot, sums: &[u32], lba: Lba, buf: &mut [u8]) -> Result<()> {
        read_blocks(&*self.file, &self.id, slot, sums, lba, buf)
    }

    // ---- writing --------------------------------------------------------------------------------------------

    fn check_poison(&self) -> Result<()> {
        if self.poisoned.load(SeqCst) {
            let why = self
                .poison
                .lock()
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default();
            return Err(Error::new(
                Kind::Poisoned,
                format!("the disk stopped after an error: {why}"),
            )
            .layer(self.id)
            .path(self.file.path())
            .hint("detach the disk and attach it again: it comes back as of its last flush"));
        }
        Ok(())
    }

    fn poison(&self, e: Error) -> Error {
        let mut poison = self.poison.lock();
        if poison.is_none() {
            tracing::error!(layer = %self.id, "the disk stops accepting writes: {e}");
            *poison = Some(e.clone());
        }
        self.poisoned.store(true, SeqCst);
        e
    }

    /// Reserves journal space for `changes` map changes, and takes `slots` slots.
    pub fn take(&self, changes: u64, slots: u32) -> Result<Taken> {
        self.check_poison()?;
        // A change can cut a zero range of the same epoch in two: two entries each.
        let entries = changes * 2;
        let mut tries = 0;
        loop {
            let freed = self.log.lock().freed.len();
            let mut space = self.space.lock();
            let total = space.entries + entries;
            let end = space.journal_head + space.committing + commit_slots(total);
            if total <= MAX_DIRTY && end <= JOURNAL_SLOTS && freed < MAX_FREED {
                self.reserve_journal(&mut space, end)?;
                let extents = if slots > 0 {
                    space.alloc(slots, &self.quiesce)?
                } else {
                    Vec::new()
                };
                space.entries = total;
                return Ok(Taken { extents, entries });
            }
            drop(space);
            // The journal is full: this is a flush that the disk itself starts. Other writers may fill it again meanwhile.
            tries += 1;
            if tries > 1000 {
                return Err(Error::new(Kind::Io, "no room in the journal")
                    .layer(self.id)
                    .path(self.file.path()));
            }
            self.flush()?;
            self.checkpoint_now()?;
        }
    }

    /// Host space for the record of what is about to be accepted: a full host disk must fail the write, not the flush.
    fn reserve_journal(&self, space: &mut Space, end: u32) -> Result<()> {
        if end <= space.journal_reserved {
            return Ok(());
        }
        if space.journal_reserved == 0 {
            self.reserve_spare(space);
        }
        let step = end.next_multiple_of(RESERVE_STEP).min(JOURNAL_SLOTS);
        let done = match self.reserve(space.journal_reserved, step) {
            Err(e) if e.kind() == Kind::NoSpace && step > end => {
                self.reserve(space.journal_reserved, end).map(|()| end)
            }
            other => other.map(|()| step),
        };
        space.journal_reserved = done?;
        Ok(())
    }

    /// Host space for the run that empties the journal: on a full disk nothing could be freed without it. Where there is none, there is none.
    fn reserve_spare(&self, space: &mut Space) {
        let missing = SPARE.saturating_sub(space.hot.total()) as u32;
        let Some(start) = space.fresh(missing).filter(|_| missing > 0) else {
            return;
        };
        let (at, bytes) = (Slot(start).at(), u64::from(missing) * BLOCK);
        // Within the file's length, or a host filesystem might keep the space when the file is cut.
        let done = self.file.len().and_then(|len| {
            if len < at + bytes {
                self.file.set_len(at + bytes)?;
            }
            self.file.allocate(at, bytes)
        });
        match done {
            Ok(()) => space.hot.insert(start, missing),
            Err(e) => {
                tracing::debug!(layer = %self.id, "no space kept for the checkpoint: {e}");
                let _ = self.punch(start, missing);
                space.cold.insert(start, missing);
            }
        }
    }

    /// Reserves journal slots `from..to`, all or none.
    fn reserve(&self, from: u32, to: u32) -> Result<()> {
        let (at, slots) = (Slot(JOURNAL_START + from).at(), to - from);
        let done = match self.file.allocate(at, u64::from(slots) * BLOCK) {
            // The filesystem cannot reserve: writing zeros takes the space as well.
            Err(e) if e.kind() == Kind::Unsupported => self
                .file
                .write_at(&vec![0; slots as usize * BLOCK_SIZE], at),
            other => other,
        };
        if done.is_err() {
            // It may be done in part; on a full disk every block counts.
            let _ = self.punch(JOURNAL_START + from, slots);
        }
        done
    }

    /// Writes block data into taken slots. `data` is as long as the extents.
    pub fn write_slots(&self, taken: &Taken, data: &[u8]) -> Result<()> {
        let mut rest = data;
        for &(start, len) in &taken.extents {
            let (now, later) = rest.split_at(len as usize * BLOCK_SIZE);
            self.file.write_at(now, Slot(start).at())?;
            rest = later;
        }
        Ok(())
    }

    /// Gives slots back that were written and never published.
    fn give_back(&self, taken: Taken) {
        let mut space = self.space.lock();
        space.entries -= taken.entries;
        for (start, len) in taken.extents {
            space.hot.insert(start, len);
        }
    }

    /// Gives slots back that could not be written.
    pub fn not_written(&self, taken: Taken) {
        self.space.lock().entries -= taken.entries;
        for (start, len) in taken.extents {
            self.unused(start, len);
        }
    }

    /// Makes slots free that were written in part or not at all, without host blocks: on a full disk every block counts.
    fn unused(&self, start: u32, len: u32) {
        // Whether it can be done changes nothing but the space it takes.
        let _ = self.punch(start, len);
        self.space.lock().cold.insert(start, len);
    }

    /// Publishes pointers for blocks from `lba` on.
    pub fn publish(&self, lba: Lba, pointers: &[Pointer], taken: Taken) -> Result<()> {
        let done = self.publish_inner(lba, pointers, None, &taken);
        self.published(done, taken).map(|_| ())
    }

    /// Publishes one pointer if the block still has the pointer `expected`; says whether it did. If not, the slots are given back.
    pub fn publish_if(
        &self,
        lba: Lba,
        pointer: Pointer,
        expected: Pointer,
        taken: Taken,
    ) -> Result<bool> {
        let done = self.publish_inner(lba, &[pointer], Some(expected), &taken);
        self.published(done, taken)
    }

    fn published(&self, done: Result<bool>, taken: Taken) -> Result<bool> {
        match done {
            Ok(true) => Ok(true),
            Ok(false) => {
                self.give_back(taken);
                Ok(false)
            }
            Err(e) => {
                // A region could not be read; of a write over several regions some may be published already. The slots stay out
                // of use, and the next opening finds those that nothing refers to.
                Err(e)
            }
        }
    }

    fn publish_inner(
        &self,
        lba: Lba,
        pointers: &[Pointer],
        expected: Option<Pointer>,
        taken: &Taken,
    ) -> Result<bool> {
        let mut reusable = Vec::new();
        let done = {
            let _gate = self.gate.read();
            let done = self.publish_regions(lba, pointers, expected, &mut reusable);
            // After an error too: some regions may be in the log.
            if !matches!(done, Ok(false)) {
                self.log.lock().reserved += taken.entries;
            }
            done
        };
        self.retire(reusable);
        done
    }

    fn publish_regions(
        &self,
        lba: Lba,
        pointers: &[Pointer],
        expected: Option<Pointer>,
        reusable: &mut Vec<(u32, u32)>,
    ) -> Result<bool> {
        let epoch = self.epoch.load(SeqCst);
        let mut at = 0;
        while at < pointers.len() {
            let first = Lba(lba.0 + at as u32);
            let n = (REGION_BLOCKS - first.index()).min(pointers.len() - at);
            let mut table = self.shard(first.region()).write();
            let resident = self.resident(&mut table, first.region())?;
            if expected.is_some_and(|e| resident.map.get(first.index()) != e) {
                return Ok(false);
            }
            let mut log = self.log.lock();
            for (i, &pointer) in pointers[at..at + n].iter().enumerate() {
                self.set(
                    resident,
                    &mut log,
                    epoch,
                    first.region(),
                    first.index() + i,
                    pointer,
                    reusable,
                );
            }
            at += n;
        }
        Ok(true)
    }

    /// Changes one pointer of a resident region and logs it.
    #[expect(
        clippy::too_many_arguments,
        reason = "the innermost step of publishing, called with its locks held"
    )]
    fn set(
        &self,
        resident: &mut Resident,
        log: &mut Log,
        epoch: u64,
        region: Region,
        index: usize,
        pointer: Pointer,
        reusable: &mut Vec<(u32, u32)>,
    ) {
        if resident.changed != epoch {
            resident.changed = epoch;
            resident.dirty = [0; WORDS];
        }
        let old = resident.map.set(index, pointer);
        let (word, bit) = (index / 64, 1u64 << (index % 64));
        let old_is_dirty = resident.dirty[word] & bit != 0;
        resident.dirty[word] |= bit;
        self.replaced(old, old_is_dirty, log, reusable);
        self.count(log, old, -1);
        self.count(log, pointer, 1);
        log.entries
            .push(CommitEntry::new(region.lba(index), 1, pointer));
    }

    /// A pointer lost its place: its slot becomes free, at once if no commit names it, else with the commit of this epoch.
    fn replaced(&self, old: Pointer, dirty: bool, log: &mut Log, reusable: &mut Vec<(u32, u32)>) {
        if let Pointer::Data { slot, .. } = old {
            let list = if dirty { reusable } else { &mut log.freed };
            match list.last_mut() {
                Some((start, len)) if *start + *len == slot.0 => *len += 1,
                _ => list.push((slot.0, 1)),
            }
        }
    }

    fn count(&self, log: &mut Log, pointer: Pointer, blocks: i64) {
        match pointer {
            Pointer::Data { .. } => {
                log.data_delta += blocks;
                self.data_blocks.fetch_add(blocks, SeqCst);
            }
            Pointer::Zero => {
                log.zero_delta += blocks;
                self.zero_blocks.fetch_add(blocks, SeqCst);
            }
            Pointer::Absent => {}
        }
    }

    fn retire(&self, extents: Vec<(u32, u32)>) {
        if !extents.is_empty() {
            let epoch = self.quiesce.now();
            self.space.lock().retire(epoch, extents);
        }
    }

    /// Makes `count` whole blocks from `lba` zero.
    pub fn zero(&self, lba: Lba, count: u64) -> Result<()> {
        let end = u64::from(lba.0) + count;
        let mut at = u64::from(lba.0);
        while at < end {
            let first = Lba(at as u32);
            let whole = if first.index() == 0 {
                (end - at) / REGION_BLOCKS as u64
            } else {
                0
            };
            if whole > 0 {
                // At most 4 GiB at a time: bounds the list of freed slots.
                let regions = whole.min(2048) as u32;
                self.zero_regions(first.region(), regions)?;
                at += u64::from(regions) * REGION_BLOCKS as u64;
            } else {
                let n = ((REGION_BLOCKS - first.index()) as u64).min(end - at) as usize;
                self.zero_part(first, n)?;
                at += n as u64;
            }
        }
        Ok(())
    }

    /// Zeroes some blocks of one region.
    fn zero_part(&self, lba: Lba, n: usize) -> Result<()> {
        let taken = self.take(n as u64, 0)?;
        self.publish(lba, &vec![Pointer::Zero; n], taken)
    }

    fn zero_regions(&self, region: Region, regions: u32) -> Result<()> {
        let end = region.0 + regions;
        // Damage is met before anything is changed: the whole range is zeroed or nothing of it.
        let runs = self.runs.read().clone();
        let mut in_runs = Ranges::default();
        for run in runs.iter().filter(|r| r.may_touch(region.0, end)) {
            for item in run.items(region) {
                let item = item.map_err(|e| e.layer(self.id).path(self.file.path()))?;
                if item.start() >= end {
                    break;
                }
                in_runs.insert(item.start(), item.end(), 0);
            }
        }
        let taken = self.take(1, 0)?;
        let mut reusable = Vec::new();
        let done = {
            let _gate = self.gate.read();
            let epoch = self.epoch.load(SeqCst);
            let done = (region.0..end).try_for_each(|r| {
                // A checkpoint may have put new runs in place meanwhile: then their word counts, roughly.
                let known = {
                    let now = self.runs.read();
                    if Arc::ptr_eq(&now, &runs) {
                        in_runs.get(r).is_some()
                    } else {
                        now.iter().any(|run| run.may_touch(r, r + 1))
                    }
                };
                self.zero_region(Region(r), known, epoch, &mut reusable)
            });
            self.log.lock().reserved += taken.entries;
            done
        };
        self.retire(reusable);
        done
    }

    /// Zeroes a whole region, of which runs may know something. The gate is held.
    fn zero_region(
        &self,
        region: Region,
        in_runs: bool,
        epoch: u64,
        reusable: &mut Vec<(u32, u32)>,
    ) -> Result<()> {
        let all = REGION_BLOCKS as i64;
        let r = region.0;
        let mut table = self.shard(region).write();
        let known = in_runs || table.contains_key(&r) || self.zeroed.read().get(r).is_some();
        if known {
            let resident = self.resident(&mut table, region)?;
            let fresh = resident.changed == epoch;
            let mut log = self.log.lock();
            let (data, zeros) = resident.map.counts();
            for (index, pointer) in resident.map.iter() {
                let dirty = fresh && resident.dirty[index / 64] >> (index % 64) & 1 == 1;
                self.replaced(pointer, dirty, &mut log, reusable);
            }
            log.data_delta -= data as i64;
            log.zero_delta += all - zeros as i64;
            self.data_blocks.fetch_sub(data as i64, SeqCst);
            self.zero_blocks.fetch_add(all - zeros as i64, SeqCst);
        }
        {
            let mut log = self.log.lock();
            if !known {
                self.count(&mut log, Pointer::Zero, all);
            }
            let entry = CommitEntry::new(region.first(), REGION_BLOCKS as u32, Pointer::Zero);
            log.entries.push(entry);
            merge_last_zero(&mut log.entries);
        }
        // From here on the range in `zeroed` stands for the region: it takes no memory of its own.
        self.zeroed.write().insert(r, r + 1, epoch);
        table.remove(&r);
        Ok(())
    }

    // ---- commit ---------------------------------------------------------------------------------------------

    /// Makes all that was published before the call durable: one commit record, one sync. Flushes that come while one is
    /// under way join the next.
    pub fn flush(&self) -> Result<()> {
        let target = self.epoch.load(SeqCst);
        let mut group = self.group.lock();
        loop {
            self.check_poison()?;
            if group.durable >= target {
                return Ok(());
            }
            if !group.running {
                break;
            }
            self.joined.wait(&mut group);
        }
        group.running = true;
        drop(group);
        let done = self.commit_epoch();
        let mut group = self.group.lock();
        group.running = false;
        if let Ok(epoch) = &done {
            group.durable = group.durable.max(*epoch);
        }
        self.joined.notify_all();
        drop(group);
        done?;
        // After the acknowledgement of the others, who need not wait for it.
        if self.space.lock().journal_head > CHECKPOINT_SLOTS {
            match self.checkpoint_now() {
                // The journal still has room: nothing is lost, and writers will be told in time.
                Err(e) if e.kind() == Kind::NoSpace => {
                    tracing::warn!(layer = %self.id, "checkpoint put off: {e}")
                }
                other => other?,
            }
        }
        self.give_to_host(4 * HOT_SLOTS, HOT_SLOTS)
    }

    /// Closes the epoch and commits it; returns its number.
    fn commit_epoch(&self) -> Result<u64> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        self.check_poison()?;
        let (log, epoch) = {
            let _gate = self.gate.write();
            let epoch = self.epoch.fetch_add(1, SeqCst);
            let log = std::mem::take(&mut *self.log.lock());
            let mut space = self.space.lock();
            space.entries -= log.reserved;
            space.committing = commit_slots(log.reserved);
            (log, epoch)
        };
        if log.entries.is_empty() {
            self.space.lock().committing = 0;
            c.epoch = epoch;
            return Ok(epoch);
        }
        let mut changes = Memtable::new();
        for entry in &log.entries {
            let (lba, count, pointer) = entry.get();
            changes.apply(lba, count, pointer);
        }
        let entries = changes.entries();
        let slots = commit_slots(entries.len() as u64);
        debug_assert!(
            c.head + slots <= JOURNAL_SLOTS,
            "the journal space was reserved"
        );
        let generation = c.superblock.generation.get();
        encode_commit(&self.id, c.next_commit, generation, &entries, &mut c.buffer);
        self.file
            .write_at(&c.buffer, Slot(JOURNAL_START + c.head).at())
            .and_then(|()| self.file.sync())
            .map_err(|e| self.poison(e))?;
        c.buffer.shrink_to(1 << 20);
        c.second_pending = false;
        c.head += slots;
        c.next_commit += 1;
        c.epoch = epoch;
        c.data_blocks += log.data_delta;
        c.zero_blocks += log.zero_delta;
        for entry in &entries {
            let (lba, count, pointer) = entry.get();
            c.memtable.apply(lba, count, pointer);
            if let Pointer::Data { slot, .. } = pointer {
                use_slot(&mut c.free, &mut c.high, slot.0);
            }
        }
        for &(start, len) in &log.freed {
            c.free.insert(start, len);
        }
        let now = self.quiesce.now();
        let mut space = self.space.lock();
        space.journal_head = c.head;
        space.committing = 0;
        space.retire(now, log.freed);
        Ok(epoch)
    }

    /// Writes a checkpoint of what is committed, so that the journal is empty.
    pub fn checkpoint_now(&self) -> Result<()> {
        let mut commit = self.commit.lock();
        self.check_poison()?;
        if commit.head == 0 {
            return Ok(());
        }
        self.checkpoint(&mut commit, State::Writable)
    }

    /// FORMAT.md, "Checkpoint". An error before the superblock is touched (no space for the run) leaves all as it was; a failed
    /// sync or superblock write poisons.
    fn checkpoint(&self, c: &mut Commit, state: State) -> Result<()> {
        let mut runs: Vec<Arc<MappedRun>> = self.runs.read().to_vec();
        let mut replaced: Vec<(u32, u32)> = Vec::new();
        let mut new_extent = None;
        if !c.memtable.is_empty() {
            let merged = self.runs_to_merge(&runs, c.memtable.applied());
            let (reference, extent) = self.write_run(c, &runs[..merged])?;
            for run in runs.drain(..merged) {
                replaced.push((run.reference().slot.get(), run.reference().slots.get()));
            }
            if let Some(reference) = reference {
                let mapping = self.file.map(
                    Slot(reference.slot.get()).at(),
                    reference.len.get() as usize,
                );
                let run = mapping.and_then(|m| Run::open(m, reference, &self.id));
                match run {
                    Ok(run) => runs.insert(0, Arc::new(run)),
                    Err(e) => {
                        self.space.lock().hot.insert(extent.0, extent.1);
                        return Err(e);
                    }
                }
                new_extent = Some(extent);
            }
        }
        let mut next = c.superblock;
        // What is free once this superblock counts.
        let mut free = c.free.clone();
        let mut high = c.high;
        if let Some((start, len)) = new_extent {
            for slot in start..start + len {
                use_slot(&mut free, &mut high, slot);
            }
        }
        let old_list = (next.free_slot.get(), next.free_slots.get());
        if old_list.0 != 0 {
            replaced.push(old_list);
        }
        for &(start, len) in &replaced {
            free.insert(start, len);
        }
        let mut forgotten = c.forgotten + free.limit();
        let undo = |e: Error| {
            if let Some((start, len)) = new_extent {
                self.space.lock().hot.insert(start, len);
            }
            e
        };
        let list = self
            .write_free_list(&mut next, &mut free, &mut high, &mut forgotten)
            .map_err(undo)?;
        next.sequence = U64::new(next.sequence.get() + 1);
        next.state = U32::new(state.number());
        next.next_commit = U64::new(c.next_commit);
        next.data_blocks = U64::new(c.data_blocks.max(0) as u64);
        next.zero_blocks = U64::new(c.zero_blocks.max(0) as u64);
        next.high_water = U64::new(high);
        next.forgotten = U64::new(forgotten);
        next.run_count = U32::new(runs.len() as u32);
        next.runs = [RunRef::new_zeroed(); MAX_RUNS];
        for (entry, run) in next.runs.iter_mut().zip(&runs) {
            *entry = *run.reference();
        }
        // The new run, and copy 2 of the last change, before copy 1 is touched. Where neither was written there is nothing to wait for.
        let wrote = new_extent.is_some() || list.is_some() || c.second_pending;
        if wrote {
            self.file.sync().map_err(|e| self.poison(e))?;
            c.second_pending = false;
        }
        let bytes = next.encode().to_vec();
        self.file
            .write_at(&bytes, Slot(1).at())
            .and_then(|()| self.file.sync())
            .and_then(|()| self.file.write_at(&bytes, Slot(2).at()))
            .map_err(|e| self.poison(e))?;
        c.second_pending = true;
        c.superblock = next;
        c.free = free;
        c.high = high;
        c.forgotten = forgotten;
        c.memtable = Memtable::new();
        c.head = 0;
        *self.runs.write() = Arc::new(runs);
        self.zeroed.write().forget_up_to(c.epoch);
        self.checkpointed.fetch_max(c.epoch, SeqCst);
        let now = self.quiesce.now();
        let mut space = self.space.lock();
        space.journal_head = 0;
        space.retire(now, replaced);
        Ok(())
    }

    /// How many of the newest runs go into the new one: afterwards each run is more than twice as large as all newer ones together,
    /// so that there are few, and each entry is rewritten a logarithmic number of times.
    fn runs_to_merge(&self, runs: &[Arc<MappedRun>], new: u64) -> usize {
        let weight = |r: &MappedRun| {
            let reference = r.reference();
            reference.pointers.get() + u64::from(reference.regions.get()) + r.zero_ranges()
        };
        let mut total = new.max(1);
        let mut count = 0;
        for run in runs {
            if weight(run) > 2 * total && runs.len() - count < MAX_RUNS {
                break;
            }
            total += weight(run);
            count += 1;
        }
        count
    }

    /// Writes the memtable merged with `runs` as a new run; returns its reference and the slots it occupies.
    fn write_run(
        &self,
        c: &Commit,
        runs: &[Arc<MappedRun>],
    ) -> Result<(Option<RunRef>, (u32, u32))> {
        let (mut regions, mut pointers, mut ranges) = (0u64, 0u64, 0u64);
        for item in c.memtable.items() {
            match item? {
                crate::map::Item::Region(_, map) => {
                    regions += 1;
                    pointers += map.len() as u64;
                }
                crate::map::Item::Zeros(..) => ranges += 1,
            }
        }
        for run in runs {
            let r = run.reference();
            regions += u64::from(r.regions.get());
            // Stored zeros are pointers too; of a filled region there are none.
            pointers += r.pointers.get()
                + r.zeros
                    .get()
                    .min(u64::from(r.regions.get()) * REGION_BLOCKS as u64);
            ranges += run.zero_ranges();
        }
        let slots = blocks(max_len(regions, pointers, ranges));
        let slots = u32::try_from(slots)
            .map_err(|_| Error::new(Kind::NoSpace, "the block map is too large"))?;
        let (start, hot) = {
            let mut space = self.space.lock();
            space.settle(&self.quiesce);
            space.contiguous(slots)?
        };
        let give_back = |from: u32| {
            let mut space = self.space.lock();
            let rest = start + slots - from;
            if hot {
                space.hot.insert(from, rest);
            } else if u64::from(start) + u64::from(slots) == space.high {
                // The tail of the file goes back to its end.
                space.high = u64::from(from);
            } else {
                space.cold.insert(from, rest);
            }
        };
        let mut at = Slot(start).at();
        let mut builder = Builder::new(|bytes: &[u8]| {
            self.file.write_at(bytes, at)?;
            at += bytes.len() as u64;
            Ok(())
        });
        let mut sources: Vec<Items<'_>> = vec![c.memtable.items()];
        sources.extend(runs.iter().map(|r| r.items(Region(0))));
        let written = merge(sources)
            .try_for_each(|item| builder.push(&item?))
            .and_then(|()| builder.finish(&self.id, c.next_commit - 1));
        match written {
            Ok(Some(mut reference)) => {
                reference.slot = U32::new(start);
                let used = reference.slots.get();
                debug_assert!(used <= slots);
                if used < slots {
                    give_back(start + used);
                }
                Ok((Some(reference), (start, used)))
            }
            Ok(None) => {
                give_back(start);
                Ok((None, (start, 0)))
            }
            Err(e) => {
                self.unused(start, slots);
                Err(e.layer(self.id))
            }
        }
    }

    /// Puts the free list into the superblock, or beside it. Returns the slots it took.
    fn write_free_list(
        &self,
        next: &mut Superblock,
        free: &mut FreeSet,
        high: &mut u64,
        forgotten: &mut u64,
    ) -> Result<Option<(u32, u32)>> {
        next.free_slot = U32::new(0);
        next.free_slots = U32::new(0);
        next.free_inline = [FreeExtent::new_zeroed(); INLINE_FREE];
        let mut own = None;
        if free.extents() > INLINE_FREE {
            // One more than needed: taking the slots may cut an extent in two.
            let bytes = (free.extents() + 2) as u64 * size_of::<FreeExtent>() as u64;
            let slots = blocks(bytes) as u32;
            let (start, _) = self.space.lock().contiguous(slots)?;
            for slot in start..start + slots {
                use_slot(free, high, slot);
            }
            *forgotten += free.limit();
            next.free_slot = U32::new(start);
            next.free_slots = U32::new(slots);
            own = Some((start, slots));
        }
        let list: Vec<FreeExtent> = free
            .iter()
            .map(|(s, l)| FreeExtent {
                slot: U32::new(s),
                slots: U32::new(l),
            })
            .collect();
        next.free_count = U32::new(list.len() as u32);
        next.free_crc = U32::new(format::crc(list.as_bytes()));
        match own {
            None => next.free_inline[..list.len()].copy_from_slice(&list),
            Some((start, slots)) => {
                if let Err(e) = self.file.write_at(list.as_bytes(), Slot(start).at()) {
                    self.unused(start, slots);
                    return Err(e);
                }
            }
        }
        Ok(own)
    }

    // ---- space ----------------------------------------------------------------------------------------------

    fn punch(&self, start: u32, len: u32) -> Result<()> {
        if !self.can_punch.load(SeqCst) {
            return Ok(());
        }
        match self.file.punch(Slot(start).at(), u64::from(len) * BLOCK) {
            Err(e) if e.kind() == Kind::Unsupported => {
                tracing::warn!(layer = %self.id, "the host filesystem cannot punch holes: freed space stays allocated");
                self.can_punch.store(false, SeqCst);
                Ok(())
            }
            other => other,
        }
    }

    /// Punches free slots out of the host file until at most `keep` have their blocks, if there are more than `above`.
    fn give_to_host(&self, above: u64, keep: u64) -> Result<()> {
        let mut limit = above;
        loop {
            let extent = {
                let mut space = self.space.lock();
                space.settle(&self.quiesce);
                if space.hot.total() <= limit {
                    return Ok(());
                }
                let most = space.hot.total() - keep.min(space.hot.total());
                space.hot.take_some(most.min(u64::from(u32::MAX)) as u32)
            };
            let Some((start, len)) = extent else {
                return Ok(());
            };
            let done = self.punch(start, len);
            self.space.lock().cold.insert(start, len);
            done?;
            limit = keep;
        }
    }

    /// Work that can wait: gives freed space back to the host. For a housekeeping thread.
    pub fn maintain(&self) -> Result<()> {
        self.check_poison()?;
        self.give_to_host(HOT_SLOTS, HOT_SLOTS)
    }

    /// The host disk is full: gives back all that this layer does not need, so that what it needs finds room. What its discards freed
    /// counts only once they are committed.
    pub fn make_room(&self) -> Result<()> {
        self.flush()?;
        match self.checkpoint_now() {
            Err(e) if e.kind() == Kind::NoSpace => {}
            other => other?,
        }
        {
            // Nobody writes to the journal meanwhile.
            let mut commit = self.commit.lock();
            if commit.second_pending {
                // Copy 2 may still need what stands there.
                self.file.sync().map_err(|e| self.poison(e))?;
                commit.second_pending = false;
            }
            let mut space = self.space.lock();
            let needed = commit.head + commit_slots(space.entries);
            let keep = needed.next_multiple_of(RESERVE_STEP);
            if keep < space.journal_reserved {
                self.punch(JOURNAL_START + keep, space.journal_reserved - keep)?;
                space.journal_reserved = keep;
            }
        }
        self.give_to_host(SPARE, SPARE)
    }

    /// Ends writing: flush, checkpoint, freed space given back, state clean or sealed in both copies. No other call may be under way. On a
    /// full host disk the layer stays as recovery can take it up; nothing is lost.
    pub fn close(&self, state: State, name: Option<&str>) -> Result<()> {
        self.flush()?;
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        self.check_poison()?;
        if c.head > 0 {
            self.checkpoint(c, State::Writable)?;
        }
        // Copy 2 of that checkpoint, before anything it could be needed for is destroyed.
        if c.second_pending {
            self.file.sync().map_err(|e| self.poison(e))?;
            c.second_pending = false;
        }
        let (hot, reserved) = {
            let mut space = self.space.lock();
            for _ in 0..3 {
                space.settle(&self.quiesce);
            }
            let hot: Vec<(u32, u32)> =
                std::iter::from_fn(|| space.hot.take_some(u32::MAX)).collect();
            (hot, std::mem::take(&mut space.journal_reserved))
        };
        for &(start, len) in &hot {
            // Slots past the committed high-water mark go with the tail below.
            if u64::from(start) < c.high {
                self.punch(start, len)?;
            }
        }
        if reserved > 0 {
            self.punch(JOURNAL_START, JOURNAL_SLOTS)?;
        }
        let end = Slot(c.high as u32).at();
        if self.file.len()? > end {
            self.file.set_len(end)?;
        }
        if let Some(name) = name {
            c.superblock.set_name(name);
        }
        let mut next = c.superblock;
        next.sequence = U64::new(next.sequence.get() + 1);
        next.state = U32::new(state.number());
        let bytes = next.encode().to_vec();
        for copy in [1, 2] {
            self.file
                .write_at(&bytes, Slot(copy).at())
                .and_then(|()| self.file.sync())
                .map_err(|e| self.poison(e))?;
        }
        c.superblock = next;
        self.poisoned.store(true, SeqCst);
        *self.poison.lock() = Some(Error::new(Kind::Poisoned, "it was closed"));
        Ok(())
    }
}

/// Takes a slot that a commit names out of the free ones below the high-water mark, raising the mark if need be.
fn use_slot(free: &mut FreeSet, high: &mut u64, slot: u32) {
    if u64::from(slot) >= *high {
        free.insert(*high as u32, slot - *high as u32);
        *high = u64::from(slot) + 1;
    } else {
        free.remove(slot, 1);
    }
}

/// Joins the last two entries if both are zeros side by side.
fn merge_last_zero(entries: &mut Vec<CommitEntry>) {
    if let [.., a, b] = &entries[..] {
        let ((a_lba, a_len, a_ptr), (b_lba, b_len, b_ptr)) = (a.get(), b.get());
        if a_ptr == Pointer::Zero
            && b_ptr == Pointer::Zero
            && u64::from(a_lba.0) + u64::from(a_len) == u64::from(b_lba.0)
            && let Some(len) = a_len.checked_add(b_len)
        {
            entries.pop();
            entries.pop();
            entries.push(CommitEntry::new(a_lba, len, Pointer::Zero));
        }
    }
}

/// Reads the free list that a superblock names.
pub(super) fn read_free_list(file: &dyn File, superblock: &Superblock) -> Result<FreeSet> {
    let count = superblock.free_count.get() as usize;
    let bytes = if superblock.free_slot.get() == 0 {
        superblock.free_inline[..count].as_bytes().to_vec()
    } else {
        let mut bytes = vec![0; count * size_of::<FreeExtent>()];
        file.read_at(&mut bytes, Slot(superblock.free_slot.get()).at())?;
        bytes
    };
    let at = Slot(superblock.free_slot.get().max(1)).at();
    let bad = |what: &str| Error::new(Kind::Corrupt, format!("free list: {what}")).offset(at);
    if format::crc(&bytes) != superblock.free_crc.get() {
        return Err(bad("checksum mismatch"));
    }
    let list = <[FreeExtent]>::ref_from_bytes(&bytes).map_err(|_| bad("it is cut"))?;
    let mut free = FreeSet::default();
    let mut last = u64::from(format::DATA_START);
    for extent in list {
        let (start, len) = (u64::from(extent.slot.get()), u64::from(extent.slots.get()));
        if start < last || len == 0 || start + len > superblock.high_water.get() {
            return Err(bad("its extents are out of order"));
        }
        free.insert(extent.slot.get(), extent.slots.get());
        last = start + len;
    }
    Ok(free)
}
