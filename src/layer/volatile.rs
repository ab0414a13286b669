//! The volatile log: the map changes that are in no durable commit yet, in memory that outlives the process (FORMAT.md, "Volatile
//! area" and "Takeover").
//!
//! Always true:
//! - there are two areas; the open one takes the changes of the open epoch, the other one those of a commit that is being written, or nothing;
//! - an entry is whole before it is counted; only the length of a last entry of zeros ever changes, in one store;
//! - an area is emptied when the commit that holds its entries is durable, not before.
//!
//! Not here: what the entries mean.

use crate::error::{Error, Kind, Result};
use crate::format::{CommitEntry, Pointer, VOLATILE_MAGIC, VolatileHeader};
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK_SIZE, Id};
use std::sync::Arc;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Entries of one area at most: what one commit may hold.
pub const CAPACITY: u64 = crate::format::MAX_DIRTY;
/// Bytes before the entries.
const HEAD: usize = BLOCK_SIZE;
const ENTRY: usize = size_of::<CommitEntry>();
/// Bytes of one area.
const AREA: usize = HEAD + CAPACITY as usize * ENTRY;
/// Bytes of shared memory that a volatile log needs. Untouched, they take no memory.
pub const LEN: usize = 2 * AREA;
/// An area with more entries gives its memory back when it is emptied.
const KEEP: u64 = 16_384;

const COUNT: usize = std::mem::offset_of!(VolatileHeader, count);
const POISONED: usize = std::mem::offset_of!(VolatileHeader, poisoned);
/// In the first area.
const SYNCING: usize = std::mem::offset_of!(VolatileHeader, syncing);
const DURABLE: usize = std::mem::offset_of!(VolatileHeader, durable);
const USER_WRITTEN: usize = std::mem::offset_of!(VolatileHeader, user_written);
const HOST_WRITTEN: usize = std::mem::offset_of!(VolatileHeader, host_written);

const _: () = assert!(AREA.is_multiple_of(BLOCK_SIZE));
const _: () = assert!(COUNT.is_multiple_of(8) && POISONED.is_multiple_of(8));
const _: () = assert!(SYNCING.is_multiple_of(8) && DURABLE.is_multiple_of(8));

/// Memory for a volatile log that ends with this process.
pub fn private() -> Result<Arc<SharedMemory>> {
    SharedMemory::private(LEN)
        .map(Arc::new)
        .map_err(|e| Error::io("take memory for", "the volatile log", &e))
}

/// Marks the log: a sync failed, nothing of it may be acknowledged any more.
pub fn poison(memory: &SharedMemory) {
    for area in [0, 1] {
        memory.store(area * AREA + POISONED, 1);
    }
}

/// What a sync is there for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Syncing {
    /// None is under way.
    No = 0,
    /// A commit, or what a superblock is going to rest on.
    Slots = 1,
    /// Copy 1 of the superblock.
    Superblock = 2,
}

/// Marks that a sync begins, or that it ended well. Whoever dies in between may have been told that it failed, which the kernel says once.
pub fn syncing(memory: &SharedMemory, what: Syncing) {
    memory.store(SYNCING, what as u64);
}

/// Notes that this commit, and all before it, are durable.
pub fn durable(memory: &SharedMemory, sequence: u64) {
    memory.store(DURABLE, sequence);
}

/// Notes the bytes that were written over the layer's life, by users and to its file. Nothing depends on them.
pub fn written(memory: &SharedMemory, user: u64, host: u64) {
    memory.store(USER_WRITTEN, user);
    memory.store(HOST_WRITTEN, host);
}

/// Forgets everything: the disk is not attached any more.
pub fn clear(memory: &SharedMemory) {
    for area in [0, 1] {
        memory.store(area * AREA + COUNT, 0);
        memory.write(area * AREA, VolatileHeader::new_zeroed().as_bytes());
    }
}

fn empty(memory: &SharedMemory, area: usize, layer: &Id, generation: u64, sequence: u64) {
    // First of all: a header that is only half written must be one of an empty area.
    memory.store(area * AREA + COUNT, 0);
    let header = VolatileHeader {
        magic: VOLATILE_MAGIC,
        layer: layer.0,
        generation: U64::new(generation),
        sequence: U64::new(sequence),
        poisoned: U64::new(0),
        count: U64::new(0),
        syncing: U64::new(0),
        durable: U64::new(0),
        user_written: U64::new(0),
        host_written: U64::new(0),
    };
    // All but what is said of syncs and of the layer's life, which is not about the entries.
    memory.write(area * AREA, &header.as_bytes()[..SYNCING]);
}

fn read(memory: &SharedMemory, area: usize, count: u64) -> Vec<CommitEntry> {
    let mut entries = vec![CommitEntry::new_zeroed(); count.min(CAPACITY) as usize];
    memory.read(area * AREA + HEAD, entries.as_mut_bytes());
    entries
}

/// The writer's side.
pub struct VolatileLog {
    memory: Arc<SharedMemory>,
    /// The open area.
    open: usize,
    count: u64,
    /// The last entry, if more zeros may lengthen it.
    last: Option<CommitEntry>,
}

/// An area that takes no more entries.
pub struct Closed {
    area: usize,
    count: u64,
}

impl VolatileLog {
    /// An empty log, for a layer that was just opened.
    pub fn new(
        memory: Arc<SharedMemory>,
        layer: &Id,
        generation: u64,
        sequence: u64,
    ) -> VolatileLog {
        // Those of another layer, perhaps.
        written(&memory, 0, 0);
        empty(&memory, 1, layer, generation, sequence);
        empty(&memory, 0, layer, generation, sequence);
        VolatileLog {
            memory,
            open: 0,
            count: 0,
            last: None,
        }
    }
    /// Goes on in an area that was found.
    pub fn adopt(memory: Arc<SharedMemory>, found: &Area) -> VolatileLog {
        VolatileLog {
            memory,
            open: found.area,
            count: found.entries.len() as u64,
            last: None,
        }
    }
    /// Entries in the open area.
    pub fn count(&self) -> u64 {
        self.count
    }
    fn at(&self, index: u64) -> usize {
        self.open * AREA + HEAD + index as usize * ENTRY
    }
    /// Appends. The caller has seen to it that there is room.
    pub fn push(&mut self, entry: CommitEntry) {
        let (lba, len, pointer) = entry.get();
        if pointer == Pointer::Zero
            && let Some(last) = self.last
            && let (last_lba, last_len, _) = last.get()
            && u64::from(last_lba.0) + u64::from(last_len) == u64::from(lba.0)
            && let Some(len) = last_len.checked_add(len)
        {
            // The length alone changes, and in one store: at no instant does the entry say anything else than before or after.
            let sum = self.at(self.count - 1) + std::mem::offset_of!(CommitEntry, sum);
            self.memory.store_small(sum, len);
            self.last = Some(CommitEntry::new(last_lba, len, Pointer::Zero));
            return;
        }
        debug_assert!(self.count < CAPACITY, "room was reserved");
        self.memory.write(self.at(self.count), entry.as_bytes());
        self.count += 1;
        self.memory.store(self.open * AREA + COUNT, self.count);
        self.last = (pointer == Pointer::Zero).then_some(entry);
    }
    /// Closes the open area and opens the other one for commit `sequence`. Only when that one is empty.
    pub fn close(&mut self, layer: &Id, generation: u64, sequence: u64) -> Closed {
        let closed = Closed {
            area: self.open,
            count: self.count,
        };
        self.open = 1 - self.open;
        self.count = 0;
        self.last = None;
        empty(&self.memory, self.open, layer, generation, sequence);
        closed
    }
}

impl Closed {
    /// Its entries.
    pub fn entries(&self, memory: &SharedMemory) -> Vec<CommitEntry> {
        read(memory, self.area, self.count)
    }
    /// They are in a durable commit.
    pub fn forget(self, memory: &SharedMemory) {
        memory.store(self.area * AREA + COUNT, 0);
        if self.count > KEEP {
            memory.give_back(self.area * AREA + HEAD, AREA - HEAD);
        }
    }
}

/// An area as a predecessor left it.
pub struct Area {
    area: usize,
    /// The commit that its entries would become.
    pub sequence: u64,
    /// Its entries.
    pub entries: Vec<CommitEntry>,
}

/// What a predecessor left.
pub enum Found {
    /// No log, or one that holds nothing and belongs to another layer.
    Nothing,
    /// The log of this layer, opened as `generation`; areas in the order of their sequences.
    Log {
        /// The superblock's.
        generation: u64,
        /// Both, also where they are empty.
        areas: [Area; 2],
        /// A sync was under way, whose outcome nobody knows.
        syncing: Syncing,
        /// The last commit that is known to be durable.
        durable: u64,
        /// What [`written`] noted: by users, to the file.
        written: (u64, u64),
    },
}

/// Reads what a predecessor left of the log of `layer`.
pub fn find(memory: &SharedMemory, layer: &Id) -> Result<Found> {
    let refuse = |what: String| Error::new(Kind::Poisoned, what).layer(*layer);
    let mut areas = Vec::new();
    let mut generation = None;
    let mut foreign = false;
    let mut syncing = Syncing::No;
    let mut durable = 0;
    let mut written = (0, 0);
    for area in [0, 1] {
        let mut bytes = [0; size_of::<VolatileHeader>()];
        memory.read(area * AREA, &mut bytes);
        let header = VolatileHeader::read_from_bytes(&bytes)
            .map_err(|_| refuse("the head of a volatile log cannot be read".into()))?;
        let count = header.count.get();
        let ours = header.magic == VOLATILE_MAGIC && header.layer == layer.0;
        if !ours {
            if count > 0 {
                return Err(
                    refuse("the volatile log holds changes of something else".into()).hint(
                        "`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush",
                    ),
                );
            }
            foreign = true;
            continue;
        }
        if header.poisoned.get() != 0 {
            return Err(refuse("a sync failed before the server died".into())
                .hint("`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush"));
        }
        if area == 0 {
            durable = header.durable.get();
            written = (header.user_written.get(), header.host_written.get());
            syncing = match header.syncing.get() {
                0 => Syncing::No,
                2 => Syncing::Superblock,
                _ => Syncing::Slots,
            };
        }
        if count > CAPACITY {
            return Err(refuse(format!(
                "the volatile log holds {count} entries, more than it can"
            )));
        }
        if *generation.get_or_insert(header.generation.get()) != header.generation.get() {
            // Written one after the other, when there was nothing in them.
            foreign = true;
        }
        areas.push(Area {
            area,
            sequence: header.sequence.get(),
            entries: read(memory, area, count),
        });
    }
    if foreign {
        return match areas.iter().all(|a| a.entries.is_empty()) {
            true => Ok(Found::Nothing),
            false => Err(refuse(
                "the areas of the volatile log do not belong together".into(),
            )),
        };
    }
    areas.sort_by_key(|a| a.sequence);
    match (generation, <[Area; 2]>::try_from(areas)) {
        (Some(generation), Ok(areas)) => Ok(Found::Log {
            generation,
            areas,
            syncing,
            durable,
            written,
        }),
        _ => Ok(Found::Nothing),
    }
}
