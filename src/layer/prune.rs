//! Blocks of a sealed layer that nobody can see any more are given back to the host (FORMAT.md, section 4, "Reclaim").
//!
//! So is what it keeps of a history, when that is too old or too much. Nothing else of a sealed layer's file is ever changed in place, but for the
//! labels in its superblock. Always true:
//! - the slots that the superblock on the disk names are not written to, and are given back only when both copies of the next one are
//!   durable;
//! - whoever prunes has the file's lock for himself: nobody has a map of it in memory, or this process alone ([`Users::Here`]), opened once:
//!   then what that map lies in stays, until it is opened anew.

use super::history::{Segment, read_segment, segments};
use super::recover;
use super::writable::read_free_list;
use super::{ReadLayer, State, read_header};
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, FreeExtent, Header, INLINE_FREE, JOURNAL_SLOTS, JOURNAL_START, MAX_RUNS, Pointer, RunRef,
    SLOT_ZERO, Step, Superblock,
};
use crate::io::File;
use crate::layer::space::FreeSet;
use crate::map::run::{Builder, max_len};
use crate::map::{Item, WORDS};
use crate::units::{BLOCK, Id, REGION_BLOCKS, Region, Slot, blocks};
use std::sync::Arc;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

/// Says which blocks of a region nobody can see: one bit a block.
pub type Hidden<'a> = &'a dyn Fn(Region) -> Result<[u64; WORDS]>;

/// What can be given back, or was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Data blocks that nobody sees.
    pub blocks: u64,
    /// Host bytes behind what is not in use: a power cut, or readers, kept a predecessor from giving them back.
    pub leaked: u64,
}

impl Pruned {
    /// Host bytes in all.
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK + self.leaked
    }
}

/// Who may have a map of the layer in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// Nobody.
    Nobody,
    /// This process, and no other, by the lock that the caller has. It sees none of what is hidden.
    Here,
}

/// The superblock that counts, both copies of it durable.
fn settled(file: &dyn File, header: &Header) -> Result<Superblock> {
    recover::settle(file, header)?;
    let mut found = recover::superblock(file, header)?;
    if found.first_differs || found.second_differs {
        // The one good copy is the next to be written to.
        let copy = if found.second_differs { 2 } else { 1 };
        file.write_at(found.superblock.encode(), Slot(copy).at())?;
        file.sync()?;
    }
    Ok(found.superblock)
}

/// Writes the next superblock.
fn put(file: &dyn File, superblock: &mut Superblock) -> Result<()> {
    superblock.advance();
    let bytes = superblock.encode().to_vec();
    let mut copies = [1, 2].into_iter();
    copies
        .try_for_each(|copy| {
            file.write_at(&bytes, Slot(copy).at())?;
            file.sync()
        })
        .inspect_err(|_| {
            // What the disk did not take nobody is to see: who opened the layer next would map a block map whose slots are free for whoever tries
            // again.
            let _ = file.sync();
            file.forget_cached(0, Slot(JOURNAL_START).at());
        })
}

/// Takes the label from a sealed layer whose name was removed, so that nobody takes the name for lost. Its readers need not care.
pub fn unlabel(file: &dyn File, header: &Header) -> Result<()> {
    let found = recover::superblock(file, header)?;
    if State::of(&found.superblock) != State::Sealed || found.superblock.name().is_none() {
        return Ok(());
    }
    let mut superblock = settled(file, header)?;
    superblock.set_name("");
    put(file, &mut superblock)
}

/// Notes in a layer at rest how many data blocks are seen through it, and over which base that was counted. Its readers need not care.
pub fn note_refer(file: &dyn File, header: &Header, refer: (u64, Id)) -> Result<()> {
    let mut superblock = settled(file, header)?;
    superblock.set_refer(Some(refer));
    put(file, &mut superblock)
}

/// Notes in a sealed layer that nobody knows how many data blocks are seen through it. Its readers need not care.
pub fn forget_refer(file: &dyn File, header: &Header) -> Result<()> {
    let mut superblock = settled(file, header)?;
    if superblock.refer().is_none() {
        return Ok(());
    }
    superblock.set_refer(None);
    put(file, &mut superblock)
}

/// Lets go of what a sealed layer keeps of its history before point `number`; of all of it, if that is the last one. Returns the host bytes. Nobody else
/// changes the layer meanwhile. Its readers need not care, but for those of its history.
pub fn forget_history(file: &dyn File, header: &Header, number: u64) -> Result<u64> {
    let superblock = settled(file, header)?;
    if State::of(&superblock) != State::Sealed || !superblock.has_history() {
        return Ok(0);
    }
    let all = number + 1 >= superblock.next_commit.get();
    let segments = segments(file, &superblock)?.segments;
    let (gone, stay): (Vec<Segment>, Vec<Segment>) = segments
        .into_iter()
        .partition(|s| all || s.commits.1 <= number);
    if gone.is_empty() && !all {
        return Ok(0);
    }
    // What a predecessor wrote that no superblock ever named.
    let end = superblock.high_water.get().saturating_mul(BLOCK);
    if file.len()? > end {
        file.set_len(end)?;
    }
    let mut slots = FreeSet::default();
    for segment in &gone {
        slots.insert(segment.slot, segment.slots);
        match read_segment(file, &Id(header.layer), segment) {
            Ok(steps) => {
                let held = steps.iter().flat_map(Step::slots);
                held.for_each(|slot| slots.insert(slot, 1));
            }
            // Nobody can say any more what it held.
            Err(e) if e.kind() == Kind::Corrupt => tracing::warn!("{e}"),
            Err(e) => return Err(e),
        }
    }
    let kept: u64 = stay.iter().map(|s| s.blocks + u64::from(s.slots)).sum();
    let freed = slots.total();
    let lost = superblock.history_blocks.get().saturating_sub(kept + freed);
    let mut work = Work::of(file, &superblock)?;
    if let Some(last) = gone.last() {
        work.data = slots;
        let listed = work.write_free_list(file);
        let listed = listed.and_then(|()| file.sync().map_err(|e| e.layer(Id(header.layer))));
        match listed {
            Ok(()) => {
                work.next.forgotten = U64::new(work.next.forgotten.get() + lost);
                work.next.high_water = U64::new(work.high);
            }
            // Then nobody knows of these slots, which matters little where nobody writes.
            Err(e) if e.kind() == Kind::NoSpace => {
                let data = std::mem::take(&mut work.data);
                work = Work::of(file, &superblock)?;
                work.data = data;
                work.maps = FreeSet::default();
                work.next.forgotten = U64::new(superblock.forgotten.get() + freed + lost);
                file.set_len(end)?;
            }
            Err(e) => return Err(e),
        }
        let newest = stay.last().map_or((0, 0), |s| (s.slot, s.slots));
        work.next.history_slot = U32::new(newest.0);
        work.next.history_slots = U32::new(newest.1);
        work.next.history_oldest = U64::new(last.commits.1);
        work.next.history_time = U64::new(last.last_time);
        work.next.history_blocks = U64::new(kept);
        put(file, &mut work.next)?;
    } else {
        // The free list stays where it is.
        work.maps = FreeSet::default();
        work.next.forgotten = U64::new(superblock.forgotten.get() + lost);
    }
    punch(file, work.data.iter())?;
    punch(file, work.maps.iter())?;
    // Also what a predecessor died before it could. A layer that keeps a history was never pruned: nobody reads a map in what is free.
    punch(file, work.free.iter())?;
    if all {
        file.sync()?;
        // Now nobody needs to come back for it.
        work.next.set_history(false);
        work.next.history_slot = U32::new(0);
        work.next.history_slots = U32::new(0);
        work.next.history_oldest = U64::new(0);
        work.next.history_time = U64::new(0);
        work.next.history_blocks = U64::new(0);
        put(file, &mut work.next)?;
    }
    Ok(freed * BLOCK)
}

/// How a layer's slots are in use: what differs when [`prune`], or another file in its place, has changed that.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Places {
    file: u64,
    high_water: u64,
    /// The list: how many pieces, their CRC, and where it stands.
    free: [u32; 4],
    runs: Vec<u8>,
}

impl Places {
    /// Those of a sealed layer.
    pub fn of(file: &dyn File) -> Result<Places> {
        let header = read_header(file)?;
        let s = recover::superblock(file, &header)?.superblock;
        Ok(Places {
            file: file.number()?,
            high_water: s.high_water.get(),
            free: [s.free_count, s.free_crc, s.free_slot, s.free_slots].map(U32::get),
            runs: s.run_refs().as_bytes().to_vec(),
        })
    }
}

/// Gives back what a seal left: slots that a sealed layer does not use, whose places are what they were when it was sealed. Nobody prunes it
/// meanwhile. Its readers need not care.
pub fn give_back(file: &dyn File, slots: &[(u32, u32)]) -> Result<()> {
    punch(file, slots.iter().copied()).map(drop)
}

/// Does the superblock of a sealed layer say that its seal left something?
pub fn is_unpunched(superblock: &Superblock) -> bool {
    State::of(superblock) == State::Sealed && superblock.unpunched.get() != 0
}

/// What a seal left that nobody gave back: how much it is.
pub fn left_by_seal(file: &dyn File, superblock: &Superblock) -> Result<u64> {
    let mut bytes = 0;
    for (start, slots) in left(file, superblock)? {
        let at = Slot(start).at();
        bytes += data_in(file, at, at + u64::from(slots) * BLOCK)?;
    }
    Ok(bytes)
}

/// Gives that back, and says in the superblock that nothing is left; returns the bytes. The caller has the file's lock for himself, and nobody a map of
/// the layer in memory.
pub fn finish_seal(file: &dyn File, header: &Header) -> Result<u64> {
    let superblock = settled(file, header)?;
    let bytes = punch(file, left(file, &superblock)?.into_iter())?;
    nothing_left(file, header)?;
    Ok(bytes)
}

/// Notes in a sealed layer that nothing is left of its seal. Its readers need not care.
pub fn nothing_left(file: &dyn File, header: &Header) -> Result<()> {
    let mut superblock = settled(file, header)?;
    if !is_unpunched(&superblock) {
        return Ok(());
    }
    superblock.unpunched = U32::new(0);
    put(file, &mut superblock)
}

/// The slots that a seal may have left, as far as its superblock tells.
pub fn left(file: &dyn File, superblock: &Superblock) -> Result<Vec<(u32, u32)>> {
    if !is_unpunched(superblock) {
        return Ok(Vec::new());
    }
    let mut all: Vec<(u32, u32)> = read_free_list(file, superblock)?.iter().collect();
    all.push((JOURNAL_START, JOURNAL_SLOTS));
    Ok(all)
}

/// What [`prune`] would give back of a layer.
pub fn would_prune(layer: &ReadLayer, hidden: Hidden<'_>) -> Result<Pruned> {
    let (file, superblock) = (&**layer.file(), layer.superblock());
    let found = count(layer, hidden)?;
    let end = superblock.high_water.get().saturating_mul(BLOCK);
    let mut leaked = data_in(file, end, u64::MAX)?;
    let mut free = read_free_list(file, superblock)?;
    if is_unpunched(superblock) {
        // It is counted as such.
        free = FreeSet::default();
    }
    for (start, slots) in free.iter() {
        let at = Slot(start).at();
        leaked += data_in(file, at, at + u64::from(slots) * BLOCK)?;
    }
    Ok(Pruned {
        blocks: if is_worth(found, superblock) {
            found
        } else {
            0
        },
        leaked,
    })
}

/// Is it worth a new block map to give back so many blocks?
fn is_worth(blocks: u64, superblock: &Superblock) -> bool {
    let run_bytes: u64 = superblock.run_refs().iter().map(|r| r.len.get()).sum();
    blocks > 0 && blocks * BLOCK >= run_bytes
}

/// How many data blocks of a layer nobody sees.
fn count(layer: &ReadLayer, hidden: Hidden<'_>) -> Result<u64> {
    let mut blocks = 0;
    for item in layer.items(Region(0)) {
        if let Item::Region(region, map) = item? {
            let gone = hidden(region)?;
            let data = |p| matches!(p, Pointer::Data { .. });
            let in_gone = |i: usize| gone[i / 64] >> (i % 64) & 1 == 1;
            blocks += map.iter().filter(|&(i, p)| data(p) && in_gone(i)).count() as u64;
        }
    }
    Ok(blocks)
}

/// Gives back the data blocks of a sealed layer that nobody sees, where that is worth a new block map. The caller has the file's lock
/// for himself. `before` is called if there is something to give back.
pub fn prune(
    file: &Arc<dyn File>,
    header: &Header,
    hidden: Hidden<'_>,
    users: Users,
    before: impl FnOnce() -> Result<()>,
) -> Result<Pruned> {
    let superblock = settled(&**file, header)?;
    // What a predecessor wrote that no superblock ever named.
    let end = superblock.high_water.get().saturating_mul(BLOCK);
    let tail = data_in(&**file, end, u64::MAX)?;
    if file.len()? > end {
        file.set_len(end)?;
    }
    let layer = ReadLayer::open(file.clone())?;
    let found = count(&layer, hidden)?;
    if !is_worth(found, &superblock) {
        // What a power cut kept a predecessor from giving back, or readers.
        return Ok(Pruned {
            blocks: 0,
            leaked: tail + punch_listed(&**file, &superblock)?,
        });
    }
    before()?;
    let id = layer.id();
    let len = file.len()?;
    let mut work = Work::new(&layer, &superblock)?;
    let done = work
        .write(&**file, &layer, hidden)
        // All of it before the superblock that names it.
        .and_then(|()| file.sync());
    if let Err(e) = done {
        // Nothing names what was written.
        let _ = file.set_len(len);
        let _ = punch_listed(&**file, &superblock);
        return Err(e.layer(id));
    }
    drop(layer);
    // What it shows by itself is another thing now, though nobody sees it.
    work.next.set_refer(None);
    put(&**file, &mut work.next)?;
    punch(&**file, work.data.iter())?;
    if users == Users::Nobody {
        punch_listed(&**file, &work.next)?;
    }
    Ok(Pruned {
        blocks: found,
        leaked: tail,
    })
}

/// Gives back what a sealed layer does not use: what an earlier [`prune`] left, for power cuts or readers. The caller has the file's lock for himself, and
/// nobody a map of the layer in memory.
pub fn punch_free(file: &dyn File, header: &Header) -> Result<()> {
    let superblock = settled(file, header)?;
    if State::of(&superblock) == State::Sealed {
        punch_listed(file, &superblock)?;
    }
    Ok(())
}

/// Punches what the free list names; returns the host bytes.
fn punch_listed(file: &dyn File, superblock: &Superblock) -> Result<u64> {
    punch(file, read_free_list(file, superblock)?.iter())
}

/// Bytes of a range of the file, as far as it goes, that hold data on the host.
fn data_in(file: &dyn File, at: u64, end: u64) -> Result<u64> {
    let end = file.len()?.min(end);
    if at >= end {
        return Ok(0);
    }
    let ranges = file.data_ranges(at, end - at)?;
    Ok(ranges.iter().map(|(_, len)| len).sum())
}

/// Gives slots back to the host; returns the bytes.
fn punch(file: &dyn File, extents: impl Iterator<Item = (u32, u32)>) -> Result<u64> {
    let mut bytes = 0;
    for (start, slots) in extents {
        let (at, len) = (Slot(start).at(), u64::from(slots) * BLOCK);
        let data = data_in(file, at, at + len)?;
        if data == 0 {
            continue;
        }
        match file.punch(at, len) {
            // Then it stays allocated.
            Err(e) if e.kind() == Kind::Unsupported => return Ok(0),
            other => other?,
        }
        bytes += data;
    }
    Ok(bytes)
}

/// What becomes of the superblock and the free slots.
struct Work {
    next: Superblock,
    /// Free by the superblock that counts now: what may be written to.
    free: FreeSet,
    high: u64,
    /// Data that the next superblock does not name.
    data: FreeSet,
    /// Runs and a free list that it does not name.
    maps: FreeSet,
}

impl Work {
    /// All maps of the layer will be others.
    fn new(layer: &ReadLayer, superblock: &Superblock) -> Result<Work> {
        let mut work = Work::of(&**layer.file(), superblock)?;
        for run in superblock.run_refs() {
            work.maps.insert(run.slot.get(), run.slots.get());
        }
        Ok(work)
    }
    /// Only the free list will be another.
    fn of(file: &dyn File, superblock: &Superblock) -> Result<Work> {
        let mut maps = FreeSet::default();
        if superblock.free_slot.get() != 0 {
            maps.insert(superblock.free_slot.get(), superblock.free_slots.get());
        }
        Ok(Work {
            next: *superblock,
            free: read_free_list(file, superblock)?,
            high: superblock.high_water.get(),
            data: FreeSet::default(),
            maps,
        })
    }
    /// Neighbouring slots that nothing needs.
    fn take(&mut self, slots: u64) -> Result<u32> {
        let full = || Error::new(Kind::NoSpace, "the layer has used all of its 2^32 slots");
        let slots = u32::try_from(slots).map_err(|_| full())?;
        if let Some(start) = self.free.take(slots) {
            return Ok(start);
        }
        let start = self.high;
        if start + u64::from(slots) > u64::from(SLOT_ZERO) {
            return Err(full());
        }
        self.high += u64::from(slots);
        Ok(start as u32)
    }
    /// Gives back the end of what was taken last.
    fn give(&mut self, start: u32, slots: u32) {
        if u64::from(start) + u64::from(slots) == self.high {
            self.high = u64::from(start);
        } else {
            self.free.insert(start, slots);
        }
    }
    /// Writes the block map without what is hidden, and the free list.
    fn write(&mut self, file: &dyn File, layer: &ReadLayer, hidden: Hidden<'_>) -> Result<()> {
        let run = self.write_run(file, layer, hidden)?;
        self.next.runs = [RunRef::new_zeroed(); MAX_RUNS];
        self.next.run_count = U32::new(u32::from(run.is_some()));
        if let Some(run) = run {
            self.next.runs[0] = run;
        }
        let run = run.unwrap_or_else(RunRef::new_zeroed);
        self.next.data_blocks = run.pointers;
        self.next.zero_blocks = run.zeros;
        self.write_free_list(file)?;
        self.next.high_water = U64::new(self.high);
        self.next.set_name("");
        Ok(())
    }
    fn write_run(
        &mut self,
        file: &dyn File,
        layer: &ReadLayer,
        hidden: Hidden<'_>,
    ) -> Result<Option<RunRef>> {
        let (mut regions, mut pointers, mut ranges) = (0, 0, 0);
        for run in layer.runs() {
            let r = run.reference();
            regions += u64::from(r.regions.get());
            let stored = u64::from(r.regions.get()) * REGION_BLOCKS as u64;
            pointers += r.pointers.get() + r.zeros.get().min(stored);
            ranges += run.zero_ranges();
        }
        let slots = blocks(max_len(regions, pointers, ranges));
        let start = self.take(slots)?;
        let mut at = Slot(start).at();
        let mut builder = Builder::new(|bytes: &[u8]| {
            file.write_at(bytes, at)?;
            at += bytes.len() as u64;
            Ok(())
        });
        for item in layer.items(Region(0)) {
            let item = match item? {
                Item::Region(region, map) => {
                    let gone = hidden(region)?;
                    for (index, pointer) in map.iter() {
                        if let Pointer::Data { slot, .. } = pointer
                            && gone[index / 64] >> (index % 64) & 1 == 1
                        {
                            self.data.insert(slot.0, 1);
                        }
                    }
                    // Zeros hold no slot, and may stay.
                    let mut data = [0; WORDS];
                    for (index, pointer) in map.iter() {
                        if matches!(pointer, Pointer::Data { .. }) {
                            data[index / 64] |= 1 << (index % 64);
                        }
                    }
                    let dropped: [u64; WORDS] = std::array::from_fn(|w| gone[w] & data[w]);
                    Item::Region(region, map.without(&dropped))
                }
                zeros => zeros,
            };
            builder.push(&item)?;
        }
        let last_commit = layer.runs().iter().map(|r| r.last_commit()).max();
        let run = builder.finish(&layer.id(), last_commit.unwrap_or(0))?;
        let used = run.map_or(0, |r| r.slots.get());
        self.give(start + used, slots as u32 - used);
        Ok(run.map(|mut run| {
            run.slot = U32::new(start);
            run
        }))
    }
    fn write_free_list(&mut self, file: &dyn File) -> Result<()> {
        self.next.free_slot = U32::new(0);
        self.next.free_slots = U32::new(0);
        self.next.free_inline = [FreeExtent::new_zeroed(); INLINE_FREE];
        let all = |work: &Work| {
            let mut all = work.free.clone();
            let more = [&work.data, &work.maps];
            for (start, slots) in more.into_iter().flat_map(FreeSet::iter) {
                all.insert(start, slots);
            }
            let forgotten = all.limit();
            (all, forgotten)
        };
        let (mut list, mut forgotten) = all(self);
        let mut place = None;
        if list.extents() > INLINE_FREE {
            // Taking the slots may cut an extent in two.
            let slots = blocks((list.extents() + 2) as u64 * size_of::<FreeExtent>() as u64);
            let start = self.take(slots)?;
            place = Some((start, slots as u32));
            (list, forgotten) = all(self);
        }
        let list: Vec<FreeExtent> = list
            .iter()
            .map(|(slot, slots)| FreeExtent {
                slot: U32::new(slot),
                slots: U32::new(slots),
            })
            .collect();
        self.next.forgotten = U64::new(self.next.forgotten.get() + forgotten);
        self.next.free_count = U32::new(list.len() as u32);
        self.next.free_crc = U32::new(format::crc(list.as_bytes()));
        match place {
            None => self.next.free_inline[..list.len()].copy_from_slice(&list),
            Some((start, slots)) => {
                self.next.free_slot = U32::new(start);
                self.next.free_slots = U32::new(slots);
                file.write_at(list.as_bytes(), Slot(start).at())?;
            }
        }
        Ok(())
    }
}

/// Is this a layer that may be pruned: sealed, without a label, and without a history in which blocks can be seen that are hidden now?
pub fn may_prune(file: &dyn File, header: &Header) -> Result<bool> {
    let found = recover::superblock(file, header)?;
    let superblock = &found.superblock;
    Ok(Id(superblock.layer) == Id(header.layer)
        && State::of(superblock) == State::Sealed
        && superblock.name().is_none()
        && !superblock.has_history())
}
