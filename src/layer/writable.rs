//! The one writer of a layer (FORMAT.md, section 4).
//!
//! Always true:
//! - a slot is written once between two times of being free: nobody ever sees half of an overwrite;
//! - a pointer is published after its data stands in the file, under the lock of its region's shard;
//! - everything published since the last close of an epoch is in the volatile log, in publishing order for each block;
//! - a slot that a durable commit names is free at the earliest when a later commit that does not is durable;
//! - `commit` is held by the one thread that writes journal, runs and superblock.
//!
//! Order of locks: `commit`, `gate`, a shard of `table`, `log`, `space`. None is held over data I/O; `commit` is held over the I/O
//! of a commit. The latter is in `commit.rs`.

mod close;
mod commit;
mod expiry;
mod history;
mod host;
mod limit;
mod refer;
mod reserve;
mod resume;
mod stats;
mod zero;

pub(super) use commit::read_free_list;
pub use stats::LayerStats;

use super::early::{Early, Errand};
use super::history::{Keep, Lower};
use super::quiesce::{Guard, Quiesce};
use super::recover::{self, Change};
use super::refer::Below;
use super::space::{Extents, FEW, FreeSet, SPARE, Space};
use super::unsettled::Unsettled;
use super::volatile::{self, VolatileLog};
use super::written::Written;
use super::{MappedRun, State, open_runs, read_blocks, read_header, region_of};
use crate::error::{Error, Kind, Result};
use crate::format::{
    CommitEntry, Header, JOURNAL_SLOTS, MAX_DIRTY, Pointer, Superblock, commit_slots,
};
use crate::io::{Dir, File};
use crate::map::{Memtable, Ranges, RegionMap, WORDS, undo};
use crate::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst,
};
use crate::sync::{Condvar, Mutex, RwLock};
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot};
use commit::use_slot;
use history::History;
use rustc_hash::FxHashMap;
use std::sync::Arc;
use zerocopy::little_endian::U64;

/// Shards of the table of resident regions.
const SHARDS: usize = 64;
/// Clean regions kept in a shard: with [`SHARDS`] at most 8,192 regions, 16 GiB of disk, at most 34 MiB of memory.
const SHARD_REGIONS: usize = 128;
/// Free slots that always keep their host blocks, so that the next writes find written blocks: 2 MiB.
const HOT_SLOTS: u64 = 512;
/// Free slots that keep their host blocks at most, however much is written between two commits: 1 GiB.
const HOT_MAX: u64 = 1 << 18;
/// Flushes between two looks of the housekeeping from which on a disk counts as one that syncs often.
const OFTEN: u32 = 16;
/// Slots written ahead for such a disk: so many at first, and twice as many each time they are used up, to the larger number. On a
/// filesystem with a journal a flush of 4 KiB over written blocks takes a third less time than one that makes the file longer.
const AHEAD: (u32, u32) = (32, 256);
/// Free slots that keep their host blocks on a disk at rest.
const IDLE_SLOTS: u64 = 64;
/// From so many bytes in one piece on, what is written is a stream: the filesystem above has it in memory as long as it is of use, and to take ever new
/// pages for it costs more than to write it.
const STREAM: usize = 256 << 10;
/// Journal slots whose host space is reserved in one go.
const RESERVE_STEP: u32 = 16;
/// Slots freed by one epoch before the disk flushes by itself: bounds the list.
const MAX_FREED: usize = 1 << 20;
/// A journal this full is checkpointed at the end of a flush.
const CHECKPOINT_SLOTS: u32 = JOURNAL_SLOTS / 2;
/// And one that changes so many regions: who opens the layer after an unclean stop asks the runs about each, and they are read from the disk for that
/// (`cargo bench --bench scale`: 190 ms for 4,096 of 100 million blocks).
const CHECKPOINT_REGIONS: usize = 2048;
/// A checkpoint for which the host had no room is tried again when the journal is so much longer, in slots.
const PUT_OFF: u32 = JOURNAL_SLOTS / 32;

/// A region of which everything this layer knows is in memory.
struct Resident {
    map: RegionMap,
    /// Epoch of the last change; not evicted before that is in a run.
    changed: u64,
    /// Blocks changed in epoch `changed`: their slots are in no commit yet.
    dirty: [u64; WORDS],
}

/// What was published since the last close.
struct Log {
    entries: VolatileLog,
    counted: Counted,
}

/// What goes with the entries of a log.
#[derive(Default)]
struct Counted {
    /// Slots of earlier commits that these entries replace.
    freed: Vec<(u32, u32)>,
    /// What the entries replace, if it is noted: the first word on a block counts.
    undo: Option<Vec<CommitEntry>>,
    data_delta: i64,
    zero_delta: i64,
    /// Journal entries that were reserved for what is in `entries`.
    reserved: u64,
}

/// What only the committing thread touches.
struct Commit {
    superblock: Superblock,
    /// Copy 1 may not be written yet, and copy 2 was not: nothing else of the file was changed since.
    first_pending: bool,
    /// Copy 2 was written but not synced yet.
    second_pending: bool,
    /// After a takeover, until the first sync: slots that the last commit found freed. It may be in the page cache only.
    owed: Option<Vec<(u32, u32)>>,
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
    history: History,
    /// How long the journal must be before a checkpoint is tried again that can wait, in slots: the host had no room for the last one.
    put_off: u32,
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
    /// `host`, as all but its counts is used.
    file: Arc<dyn File>,
    host: Arc<Written>,
    size: AtomicU64,
    /// Data blocks it may have.
    limit: AtomicU64,
    opened: Opened,
    table: Vec<RwLock<FxHashMap<u32, Resident>>>,
    /// Whole regions zeroed since the last checkpoint that are not resident; tag: epoch.
    zeroed: RwLock<Ranges>,
    runs: RwLock<Arc<Vec<Arc<MappedRun>>>>,
    gate: RwLock<()>,
    /// The open epoch.
    epoch: AtomicU64,
    /// Epochs up to this one are in runs.
    checkpointed: AtomicU64,
    log: Mutex<Log>,
    /// The memory of the log.
    volatile: Arc<SharedMemory>,
    /// Entries of the log that writes under way may need.
    expected: AtomicU64,
    /// Writes under way. Flushes in between can give each of them a commit record of its own.
    writers: AtomicU32,
    /// Entries in the log.
    logged: AtomicU64,
    space: Mutex<Space>,
    quiesce: Quiesce,
    commit: Mutex<Commit>,
    group: Mutex<Group>,
    joined: Condvar,
    data_blocks: AtomicI64,
    zero_blocks: AtomicI64,
    /// Slots taken since the last commit.
    taken: AtomicU64,
    /// Slots that are taken between two commits, as of late: that many freed ones are worth keeping.
    demand: AtomicU64,
    early: Early,
    /// Written since housekeeping last looked.
    busy: AtomicBool,
    /// Small flushes since housekeeping last looked.
    syncs: AtomicU32,
    /// [`Layer::logged`] when housekeeping last looked.
    quiet: AtomicU64,
    /// See [`Space::fills`].
    filling: AtomicBool,
    /// Somebody does what flushes have left.
    tidying: AtomicBool,
    /// A commit freed slots side by side since the last look.
    large_freed: AtomicBool,
    /// Were these many, up to the last look?
    often: AtomicBool,
    /// Slots to be written ahead the next time.
    ahead: AtomicU32,
    /// Looks of the housekeeping in a row that found nothing new.
    idle: AtomicU32,
    poison: Mutex<Option<Error>>,
    poisoned: AtomicBool,
    can_punch: AtomicBool,
    /// What commits replace is noted.
    keeps: AtomicBool,
    /// Slots of the history.
    past: AtomicU64,
    /// What of it is in layers below.
    lower: Mutex<Option<Arc<dyn Lower>>>,
    /// The last commit left the history much larger than it may be.
    over: AtomicBool,
    /// The journal changes so many regions that it should be emptied.
    scattered: AtomicBool,
    /// What lies below it, where that is known.
    below: Mutex<Option<Arc<dyn Below>>>,
    /// What is seen through it could not be counted.
    uncounted: AtomicBool,
}

/// Slots that were taken and hold no published data yet. They must go to [`Layer::publish`], or back by
/// [`Layer::not_written`].
pub struct Taken {
    /// The extents, in order.
    pub extents: Extents,
    /// Journal entries reserved.
    entries: u64,
    /// Entries of the volatile log reserved.
    logged: u64,
}

/// What a layer begins with.
struct Beginning {
    superblock: Superblock,
    runs: Vec<Arc<MappedRun>>,
    opened: Opened,
    memtable: Memtable,
    free: FreeSet,
    high: u64,
    next_commit: u64,
    head: u32,
    data: u64,
    zero: u64,
    space: Space,
    log: VolatileLog,
    volatile: Arc<SharedMemory>,
    history: History,
}

impl Layer {
    /// Opens a layer for writing, recovering it if it was not closed cleanly. The caller has locked the file. A sealed layer is
    /// refused with [`Kind::ReadOnly`].
    pub fn open(file: Arc<dyn File>) -> Result<Layer> {
        Layer::open_on(file, volatile::private()?, None)
    }

    /// [`Layer::open`] with [`volatile::LEN`] bytes of memory for the volatile log, from which [`Layer::resume`] can go on. What stood there is
    /// forgotten. It keeps its history as `keep` says; without, what was kept goes.
    pub fn open_on(
        file: Arc<dyn File>,
        memory: Arc<SharedMemory>,
        keep: Option<Keep>,
    ) -> Result<Layer> {
        Layer::open_over(file, memory, keep, None)
    }

    /// [`Layer::open_on`], counting from the first superblock on what is seen over `below`.
    pub fn open_over(
        file: Arc<dyn File>,
        memory: Arc<SharedMemory>,
        keep: Option<Keep>,
        below: Option<Arc<dyn Below>>,
    ) -> Result<Layer> {
        let header = read_header(&*file)?;
        let id = Id(header.layer);
        volatile::clear(&memory);
        recover::settle_unless_clean(&*file, &header)?;
        let found = recover::superblock(&*file, &header)?;
        let mut superblock = found.superblock;
        if let Some(keep) = keep.as_ref().filter(|_| found.fresh) {
            superblock.next_commit = U64::new(keep.after.0 + 1);
        }
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
        let (mut steps, mut cut) = (Vec::new(), None);
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
            (steps, cut) = (replay.steps, replay.cut);
        }
        let history = History::found(keep, &*file, &superblock, steps, cut)?;
        let mut space = Space::new(high);
        for (start, len) in free.iter() {
            space.cold.insert(start, len);
        }
        let generation = superblock.generation.get() + 1;
        let layer = Layer::assemble(
            file,
            header,
            Beginning {
                superblock,
                runs,
                opened,
                memtable,
                free,
                high,
                next_commit,
                // Nothing of the journal is appended to: it is emptied first.
                head: 0,
                data,
                zero,
                space,
                log: VolatileLog::new(memory.clone(), &id, generation, next_commit),
                volatile: memory,
                history,
            },
        );
        // Of a history something may have to go now, which whoever looks at the file is to see.
        let sound = state == State::Clean
            && !found.fresh
            && !found.first_differs
            && !superblock.has_history();
        *layer.below.lock() = below;
        layer.begin(state, &found, sound)?;
        Ok(layer)
    }

    fn assemble(file: Arc<dyn File>, header: Header, b: Beginning) -> Layer {
        let host = Arc::new(Written::new(file, &b.superblock));
        let (keeps, past) = (b.history.keep.is_some(), b.history.slots());
        let lower = b.history.keep.as_ref().and_then(|keep| keep.lower.clone());
        Layer {
            id: Id(header.layer),
            header,
            size: AtomicU64::new(b.superblock.size.get()),
            limit: AtomicU64::new(u64::MAX),
            opened: b.opened,
            table: (0..SHARDS).map(|_| RwLock::default()).collect(),
            zeroed: RwLock::default(),
            runs: RwLock::new(Arc::new(b.runs)),
            gate: RwLock::new(()),
            epoch: AtomicU64::new(1),
            checkpointed: AtomicU64::new(0),
            expected: AtomicU64::new(0),
            writers: AtomicU32::new(0),
            logged: AtomicU64::new(b.log.count()),
            log: Mutex::new(Log {
                entries: b.log,
                counted: Counted {
                    undo: keeps.then(Vec::new),
                    ..Counted::default()
                },
            }),
            volatile: b.volatile,
            space: Mutex::new(b.space),
            quiesce: Quiesce::default(),
            commit: Mutex::new(Commit {
                first_pending: false,
                second_pending: false,
                owed: None,
                next_commit: b.next_commit,
                head: b.head,
                memtable: b.memtable,
                free: b.free,
                high: b.high,
                forgotten: b.superblock.forgotten.get(),
                data_blocks: b.data as i64,
                zero_blocks: b.zero as i64,
                epoch: 0,
                history: b.history,
                put_off: 0,
                buffer: Vec::new(),
                superblock: b.superblock,
            }),
            group: Mutex::default(),
            joined: Condvar::new(),
            data_blocks: AtomicI64::new(b.data as i64),
            zero_blocks: AtomicI64::new(b.zero as i64),
            taken: AtomicU64::new(0),
            demand: AtomicU64::new(0),
            early: Early::default(),
            busy: AtomicBool::new(false),
            syncs: AtomicU32::new(0),
            quiet: AtomicU64::new(0),
            filling: AtomicBool::new(false),
            tidying: AtomicBool::new(false),
            large_freed: AtomicBool::new(false),
            often: AtomicBool::new(false),
            ahead: AtomicU32::new(AHEAD.0),
            idle: AtomicU32::new(0),
            poison: Mutex::new(None),
            poisoned: AtomicBool::new(false),
            can_punch: AtomicBool::new(true),
            keeps: AtomicBool::new(keeps),
            past: AtomicU64::new(past),
            lower: Mutex::new(lower),
            over: AtomicBool::new(false),
            scattered: AtomicBool::new(false),
            below: Mutex::new(None),
            uncounted: AtomicBool::new(false),
            file: host.clone(),
            host,
        }
    }

    /// Makes what was found durable and starts a new generation. `later`: that it was started is written, and durable, before anything else is written.
    fn begin(&self, state: State, found: &recover::Found, later: bool) -> Result<()> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        let generation = c.superblock.generation.get() + 1;
        // Of a layer that was closed cleanly nobody looked what of it is on the disk, and what in the page cache only: who closed it may have died
        // before he synced a copy, or his sync failed, and then no later one writes it.
        let unsettled = state == State::Clean && !found.fresh;
        let bytes = c.superblock.encode().to_vec();
        let copy = |copy| {
            self.file.write_at(&bytes, Slot(copy).at())?;
            self.file.sync()
        };
        if found.second_differs {
            if unsettled && !found.damaged_copy {
                // Until copy 1 is there copy 2 is the one good copy. A torn copy 2 is none: it was written after copy 1 was synced, and to write copy 1
                // once more could tear the one that is left.
                copy(1)?;
            }
            // A crash tore or dropped copy 2: it takes over before the checkpoint below writes to the one good copy.
            copy(2)?;
        } else if unsettled && !found.first_differs && !later {
            // Both are the same, so copy 1 was synced before copy 2 was written; the checkpoint below writes to it.
            copy(2)?;
        }
        if state == State::Writable {
            // Everything behind the high-water mark was never committed.
            if self.file.len()? > Slot(c.high as u32).at() {
                self.file.set_len(Slot(c.high as u32).at())?;
            }
            for (start, len) in c.free.iter() {
                self.punch(start, len)?;
            }
        }
        c.superblock.generation = U64::new(generation);
        self.checkpoint_how(c, State::Writable, later && !found.second_differs)
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
        self.size.load(SeqCst)
    }
    /// What opening found.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }
    /// Its file.
    pub fn file(&self) -> &Arc<dyn File> {
        self.host.file()
    }
    /// The memory of its volatile log.
    pub fn volatile(&self) -> &Arc<SharedMemory> {
        &self.volatile
    }
    /// Blocks with data of their own, and blocks it records as zeros, un-flushed ones included.
    pub fn counts(&self) -> (u64, u64) {
        // Whoever changes a block takes the old one off first: in between it is counted nowhere.
        let _changing = self.log.lock();
        (
            self.data_blocks.load(SeqCst).max(0) as u64,
            self.zero_blocks.load(SeqCst).max(0) as u64,
        )
    }
    /// Something was said of the layer in this directory that is not durable yet. It will be before the first commit is.
    pub fn rest_on(&self, names: Arc<dyn Dir>) {
        self.host.unsettled().rest_on_names(names);
    }
    /// What [`Layer::rest_on`] was told of, for whoever has the time before the first commit.
    pub fn unsettled(&self) -> Arc<Unsettled> {
        self.host.unsettled().clone()
    }
    /// A read begins: until the guard goes, no slot that it may find is reused.
    pub fn enter(&self) -> Guard<'_> {
        self.quiesce.enter()
    }

    // ---- lookup ---------------------------------------------------------------------------------------------

    fn shard(&self, region: Region) -> &RwLock<FxHashMap<u32, Resident>> {
        &self.table[region.0 as usize % SHARDS]
    }

    /// The pointers of blocks `index..index+out.len()` of a region. The caller holds a guard from before.
    pub fn lookup(&self, region: Region, index: usize, out: &mut [Pointer]) -> Result<()> {
        let shard = self.shard(region);
        {
            let table = shard.read();
            if let Some(resident) = table.get(&region.0) {
                resident.map.get_all(index, out);
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
        resident.map.get_all(index, out);
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
        table: &'t mut FxHashMap<u32, Resident>,
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
    fn evict(&self, table: &mut FxHashMap<u32, Resident>) {
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

    pub(crate) fn check_poison(&self) -> Result<()> {
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
            .hint("`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush"));
        }
        Ok(())
    }

    fn poison(&self, e: Error) -> Error {
        let mut poison = self.poison.lock();
        if poison.is_none() {
            tracing::error!(layer = %self.id, "the disk stops accepting writes: {e}");
            *poison = Some(e.clone());
        }
        // A successor must not accept what we refuse.
        volatile::poison(&self.volatile);
        self.poisoned.store(true, SeqCst);
        e
    }

    /// Reserves journal space for `changes` map changes, and takes `slots` slots.
    pub fn take(&self, changes: u64, slots: u32) -> Result<Taken> {
        // A change can cut a zero range of the same epoch in two: two entries each, and what they replace.
        let each = if self.keeps_history() { 4 } else { 2 };
        self.take_for(changes * each, slots, changes)
    }

    /// [`Layer::take`] for changes that need so many `entries` in a commit record, and may be logged as `logged`.
    fn take_for(&self, entries: u64, slots: u32, logged: u64) -> Result<Taken> {
        self.check_poison()?;
        let settled = self.host.unsettled().settle();
        settled.map_err(|e| self.poison(e))?;
        let mut tries = 0;
        // Counted before it reserves: whoever comes later sees it.
        self.writers.fetch_add(1, SeqCst);
        let taken = loop {
            let freed = self.log.lock().counted.freed.len();
            let mut space = self.space.lock();
            let total = space.entries + entries;
            let end = space.journal_head
                + space.committing
                + commit_slots(total)
                + self.writers.load(SeqCst);
            // In this order: what moves from one to the other meanwhile is counted twice, not left out.
            let volatile = self.expected.load(SeqCst) + logged;
            let volatile = volatile + self.logged.load(SeqCst);
            if total <= MAX_DIRTY
                && end <= JOURNAL_SLOTS
                && freed < MAX_FREED
                && volatile <= volatile::CAPACITY
            {
                let extents = self
                    .reserve_journal(&mut space, end)
                    .and_then(|()| match slots {
                        0 => Ok(Extents::default()),
                        _ => space.alloc(slots, &self.quiesce, self.syncs_often()),
                    });
                let extents = match extents {
                    Ok(extents) => extents,
                    Err(e) => break Err(e),
                };
                space.entries = total;
                if space.fills(commit_slots(total)) {
                    self.filling.store(true, Relaxed);
                }
                self.expected.fetch_add(logged, SeqCst);
                self.taken.fetch_add(u64::from(slots), Relaxed);
                break Ok(Taken {
                    extents,
                    entries,
                    logged,
                });
            }
            drop(space);
            // The journal is full: this is a flush that the disk itself starts. Other writers may fill it again meanwhile.
            tries += 1;
            if tries > 1000 {
                break Err(Error::new(Kind::Io, "no room in the journal")
                    .layer(self.id)
                    .path(self.file.path()));
            }
            if let Err(e) = self.flush().and_then(|()| self.checkpoint_now()) {
                break Err(e);
            }
        };
        if taken.is_err() {
            self.writers.fetch_sub(1, SeqCst);
        }
        taken
    }

    /// Writes block data into taken slots, of which the first `skip` are left out.
    pub fn write_slots(&self, taken: &Taken, skip: u32, data: &[u8]) -> Result<()> {
        let (mut skip, mut rest) = (skip, data);
        for (start, len) in taken.extents.iter() {
            let left = skip.min(len);
            skip -= left;
            let n = ((len - left) as usize).min(rest.len() / BLOCK_SIZE);
            if n == 0 {
                continue;
            }
            let (now, later) = rest.split_at(n * BLOCK_SIZE);
            let at = Slot(start + left).at();
            match now.len() >= STREAM {
                true => self.file.write_through(now, at)?,
                false => self.file.write_at(now, at)?,
            }
            self.write_back_early(start + left, n as u32);
            rest = later;
        }
        debug_assert!(rest.is_empty(), "as many slots were taken as are needed");
        Ok(())
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
            // Nothing of it was published.
            Err(e) if e.is_of_quota() => {
                self.give_back(taken);
                Err(e)
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
        let mut reusable = Extents::default();
        let done = {
            let _gate = self.gate.read();
            let done = self.publish_regions(lba, pointers, expected, &mut reusable);
            // After an error too: some regions may be in the log.
            let nothing = match &done {
                Ok(published) => !published,
                Err(e) => e.is_of_quota(),
            };
            if !nothing {
                self.log.lock().counted.reserved += taken.entries;
                self.expected.fetch_sub(taken.logged, SeqCst);
                self.writers.fetch_sub(1, SeqCst);
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
        reusable: &mut Extents,
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
            if at == 0 {
                // All of it or nothing: what is limited comes region by region.
                self.room_in(&resident.map, first.index(), &pointers[..n])?;
            }
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
        reusable: &mut Extents,
    ) {
        if resident.changed != epoch {
            resident.changed = epoch;
            resident.dirty = [0; WORDS];
        }
        let old = resident.map.set(index, pointer);
        let (word, bit) = (index / 64, 1u64 << (index % 64));
        let old_is_dirty = resident.dirty[word] & bit != 0;
        resident.dirty[word] |= bit;
        if let Some(list) = log.counted.undo.as_mut().filter(|_| !old_is_dirty) {
            undo::push(list, region.lba(index), 1, old);
        }
        self.replaced(old, old_is_dirty, &mut log.counted, reusable);
        self.count(&mut log.counted, old, -1);
        self.count(&mut log.counted, pointer, 1);
        self.append(log, CommitEntry::new(region.lba(index), 1, pointer));
    }

    fn append(&self, log: &mut Log, entry: CommitEntry) {
        log.entries.push(entry);
        self.logged.store(log.entries.count(), SeqCst);
    }

    /// A pointer lost its place: its slot becomes free, at once if no commit names it, else with the commit of this epoch.
    fn replaced(&self, old: Pointer, dirty: bool, counted: &mut Counted, reusable: &mut Extents) {
        let Pointer::Data { slot, .. } = old else {
            return;
        };
        if dirty {
            reusable.push(slot.0, 1);
            return;
        }
        match counted.freed.last_mut() {
            Some((start, len)) if *start + *len == slot.0 => *len += 1,
            _ => counted.freed.push((slot.0, 1)),
        }
    }

    fn count(&self, counted: &mut Counted, pointer: Pointer, blocks: i64) {
        match pointer {
            Pointer::Data { .. } => {
                counted.data_delta += blocks;
                self.data_blocks.fetch_add(blocks, SeqCst);
            }
            Pointer::Zero => {
                counted.zero_delta += blocks;
                self.zero_blocks.fetch_add(blocks, SeqCst);
            }
            Pointer::Absent => {}
        }
    }

    fn retire(&self, extents: Extents) {
        if !extents.is_empty() {
            let epoch = self.quiesce.now();
            self.space.lock().retire(epoch, extents.iter());
        }
    }
}
