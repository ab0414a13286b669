//! What only the committing thread does: commit records, checkpoints, runs, free lists (FORMAT.md, section 4).
//!
//! Always true: whoever runs this holds `commit`. A failed sync poisons the layer and is never tried again.

use super::host::{Holes, LARGE_HOLE};
use super::{
    AHEAD, CHECKPOINT_REGIONS, CHECKPOINT_SLOTS, Commit, Counted, FreeSet, HOT_MAX, HOT_SLOTS,
    Layer, MappedRun, PUT_OFF, State,
};
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, FreeExtent, INLINE_FREE, JOURNAL_SLOTS, JOURNAL_START, MAX_RUNS, Pointer, RunRef, Step,
    Superblock, commit_slots, encode_commit, encode_commit_with_undo,
};
use crate::io::File;
use crate::layer::unsettled::First;
use crate::layer::volatile::{self, Syncing};
use crate::map::run::{Builder, Run, max_len};
use crate::map::{Items, Memtable, merge, undo};
use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use crate::sys::blocking;
use crate::units::{BLOCK, REGION_BLOCKS, Region, Slot, blocks};
use std::sync::Arc;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

impl Layer {
    /// Makes all that was published before the call durable: one commit record, one sync. Flushes that come while one is
    /// under way join the next.
    pub fn flush(&self) -> Result<()> {
        if self.flush_first()? {
            self.tidy()?;
        }
        Ok(())
    }

    /// [`Layer::flush`] without what need not be done before it is answered: [`Layer::tidy`] is to be called soon. Says whether it committed
    /// anything itself.
    pub fn flush_first(&self) -> Result<bool> {
        let target = self.epoch.load(SeqCst);
        let mut group = self.group.lock();
        loop {
            self.check_poison()?;
            if group.durable >= target {
                return Ok(false);
            }
            if !group.running {
                break;
            }
            drop(group);
            // For the disk, as whoever syncs does.
            blocking::wait(|| self.wait_for_commit(target));
            group = self.group.lock();
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
        Ok(true)
    }

    /// Waits until nobody commits, or somebody has committed `target`.
    fn wait_for_commit(&self, target: u64) {
        let mut group = self.group.lock();
        while group.running && group.durable < target {
            self.joined.wait(&mut group);
        }
    }

    /// Was so much written that [`Layer::tidy`] should be called, though nobody flushes?
    pub fn is_filling(&self) -> bool {
        self.filling.load(Relaxed) && !self.tidying.load(Relaxed)
    }

    /// What flushes, and many writes without one, leave for the time when nobody waits for it: a commit if the journal fills, a checkpoint if it is long,
    /// slots that are written ahead, large pieces of space that go back to the host. Where another thread is at it, there is nothing to do.
    pub fn tidy(&self) -> Result<()> {
        if self.tidying.swap(true, SeqCst) {
            return Ok(());
        }
        let committed = match self.filling.load(Relaxed) {
            true => self.flush_first().map(drop),
            false => Ok(()),
        };
        let done = committed.and_then(|()| self.tidy_committed());
        self.tidying.store(false, SeqCst);
        done
    }

    fn tidy_committed(&self) -> Result<()> {
        let mut over = self.over.load(SeqCst);
        if over && let Some((lower, stays)) = self.lower_part() {
            lower.expire(stays);
            let commit = self.commit.lock();
            over = !commit.history.waits(self.history_room(&commit.history));
        }
        if self.space.lock().journal_head > CHECKPOINT_SLOTS || over || self.scattered.load(SeqCst)
        {
            self.checkpoint_if_room()?;
        }
        self.keep_reserve()?;
        self.write_ahead();
        if !self.large_freed.swap(false, Relaxed) {
            return Ok(());
        }
        // Others may be in need of what was discarded.
        self.give_to_host(HOT_SLOTS.max(self.demand.load(Relaxed)), Holes::Large)
    }

    /// Closes the epoch and commits it; returns its number.
    fn commit_epoch(&self) -> Result<u64> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        self.check_poison()?;
        let (closed, counted, epoch) = {
            let _gate = self.gate.write();
            let epoch = self.epoch.fetch_add(1, SeqCst);
            let mut log = self.log.lock();
            let next = Counted {
                undo: self.keeps_history().then(Vec::new),
                ..Counted::default()
            };
            let counted = std::mem::replace(&mut log.counted, next);
            // An area that holds nothing stays open.
            let closed = (log.entries.count() > 0).then(|| {
                let generation = c.superblock.generation.get();
                log.entries.close(&self.id, generation, c.next_commit + 1)
            });
            self.logged.store(log.entries.count(), SeqCst);
            let mut space = self.space.lock();
            self.filling.store(false, Relaxed);
            space.entries -= counted.reserved;
            space.committing = commit_slots(counted.reserved);
            (closed, counted, epoch)
        };
        if c.owed.is_some() {
            // What the process before us committed last may be in the page cache only, and each commit is durable before the next one begins.
            self.sync(c)?;
        }
        let Some(closed) = closed else {
            self.space.lock().committing = 0;
            c.epoch = epoch;
            return Ok(epoch);
        };
        // Before the record: its sync is that of copy 2, too.
        self.finish_first(c)?;
        let mut changes = Memtable::new();
        for entry in closed.entries(&self.volatile) {
            let (lba, count, pointer) = entry.get();
            changes.apply(lba, count, pointer);
        }
        self.commit_changes(c, &changes, counted, epoch)?;
        closed.forget(&self.volatile);
        Ok(epoch)
    }

    /// Makes all that was written to the file durable.
    pub(super) fn sync(&self, c: &mut Commit) -> Result<()> {
        self.sync_marked(Syncing::Slots)?;
        volatile::durable(&self.volatile, c.next_commit - 1);
        self.note_written();
        self.early.arrived();
        c.second_pending = false;
        if let Some(freed) = c.owed.take() {
            for &(start, len) in &freed {
                c.free.insert(start, len);
            }
            let now = self.quiesce.now();
            self.space.lock().retire(now, freed);
        }
        Ok(())
    }

    /// One sync, marked as such for a successor.
    pub(super) fn sync_marked(&self, what: Syncing) -> Result<()> {
        volatile::syncing(&self.volatile, what);
        self.file.sync().map_err(|e| self.poison(e))?;
        volatile::syncing(&self.volatile, Syncing::No);
        Ok(())
    }

    /// Writes one commit record and syncs.
    pub(super) fn commit_changes(
        &self,
        c: &mut Commit,
        changes: &Memtable,
        mut counted: Counted,
        epoch: u64,
    ) -> Result<()> {
        let entries = changes.entries();
        let undo = counted.undo.take().filter(|_| c.history.keep.is_some());
        // Where the place that was reserved does not suffice (others zeroed the same regions), the history begins anew.
        let undo = undo
            .map(undo::in_order)
            .filter(|undo| (entries.len() + undo.len()) as u64 <= counted.reserved);
        let slots = commit_slots((entries.len() + undo.as_ref().map_or(0, Vec::len)) as u64);
        debug_assert!(
            c.head + slots <= JOURNAL_SLOTS,
            "the journal space was reserved"
        );
        // As many freed slots are worth keeping as are taken between two commits; none for a disk that shrinks.
        let taken = self.taken.swap(0, Relaxed);
        if counted.freed.iter().any(|&(_, len)| len >= LARGE_HOLE) {
            self.large_freed.store(true, Relaxed);
        }
        let freed: u64 = counted.freed.iter().map(|&(_, len)| u64::from(len)).sum();
        let demand = if freed > taken {
            taken
        } else {
            taken.max(self.demand.load(Relaxed) / 8 * 7)
        };
        self.demand.store(demand.min(HOT_MAX), Relaxed);
        self.busy.store(true, Relaxed);
        if taken <= u64::from(AHEAD.0) {
            self.syncs.fetch_add(1, Relaxed);
        }
        let generation = c.superblock.generation.get();
        let numbers = (c.next_commit, generation);
        let time = c.history.keep.as_ref().map(|keep| (keep.clock)());
        match time {
            None => encode_commit(&self.id, numbers.0, generation, &entries, &mut c.buffer),
            Some(time) => encode_commit_with_undo(
                &self.id,
                numbers,
                time,
                &entries,
                undo.as_deref(),
                &mut c.buffer,
            ),
        }
        self.file
            .write_at(&c.buffer, Slot(JOURNAL_START + c.head).at())
            .map_err(|e| self.poison(e))?;
        c.next_commit += 1;
        self.sync(c)?;
        c.buffer.shrink_to(1 << 20);
        c.head += slots;
        c.epoch = epoch;
        c.data_blocks += counted.data_delta;
        c.zero_blocks += counted.zero_delta;
        for entry in &entries {
            let (lba, count, pointer) = entry.get();
            c.memtable.apply(lba, count, pointer);
            if let Pointer::Data { slot, .. } = pointer {
                use_slot(&mut c.free, &mut c.high, slot.0);
            }
        }
        // A history is read back without asking the runs, and has room for so many checkpoints only.
        let scattered = c.history.keep.is_none() && c.memtable.regions() > CHECKPOINT_REGIONS;
        self.scattered.store(scattered, SeqCst);
        match (undo, time) {
            (Some(undo), Some(time)) => {
                // What it replaced is held.
                counted.freed.clear();
                c.history.push(Step {
                    sequence: numbers.0,
                    time,
                    undo,
                });
            }
            (_, Some(time)) => c.history.cut(numbers.0, time),
            _ => {}
        }
        self.past.store(c.history.slots(), SeqCst);
        let room = self.history_room(&c.history);
        self.over.store(c.history.is_over(room), SeqCst);
        for &(start, len) in &counted.freed {
            c.free.insert(start, len);
        }
        let now = self.quiesce.now();
        let mut space = self.space.lock();
        space.journal_head = c.head;
        space.committing = 0;
        space.retire(now, counted.freed);
        Ok(())
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

    /// The same for whoever can do without. The journal still has room: nothing is lost if the host has none, and writers will be told in time. Then it is
    /// not tried again at once, as each try writes the map up to where the room ends.
    pub(super) fn checkpoint_if_room(&self) -> Result<()> {
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let head = commit.head;
        if head == 0 || head < commit.put_off {
            return Ok(());
        }
        match self.checkpoint(&mut commit, State::Writable) {
            Err(e) if e.kind() == Kind::NoSpace => {
                commit.put_off = (head + PUT_OFF).min(JOURNAL_SLOTS - 1);
                tracing::warn!(layer = %self.id, "checkpoint put off: {e}");
                Ok(())
            }
            other => other,
        }
    }

    /// FORMAT.md, "Checkpoint". An error before the superblock is touched (no space for the run) leaves all as it was; a failed
    /// sync or superblock write poisons.
    pub(super) fn checkpoint(&self, c: &mut Commit, state: State) -> Result<()> {
        self.finish_first(c)?;
        self.checkpoint_how(c, state, false)
    }

    /// What the layer rests on is durable from here on; then copy 1 of a superblock of which copy 2 was written first.
    pub(super) fn finish_first(&self, c: &mut Commit) -> Result<()> {
        let settled = self.host.unsettled().settle();
        settled.map_err(|e| self.poison(e))?;
        if c.first_pending {
            let written = self.file.write_at(c.superblock.encode(), Slot(1).at());
            written.map_err(|e| self.poison(e))?;
            volatile::syncing(&self.volatile, Syncing::No);
            c.first_pending = false;
            c.second_pending = true;
        }
        Ok(())
    }

    /// A checkpoint; `later`: the new superblock is written before anything else is, see [`Layer::finish_first`].
    pub(super) fn checkpoint_how(&self, c: &mut Commit, state: State, later: bool) -> Result<()> {
        if c.owed.is_some() {
            // What is in the page cache only must not be what the new superblock rests on; and the free slots must be all there.
            self.sync(c)?;
        }
        let refer = self.refer(c);
        let mut runs: Vec<Arc<MappedRun>> = self.runs.read().to_vec();
        let mut replaced: Vec<(u32, u32)> = Vec::new();
        let mut new_extent = None;
        if !c.memtable.is_empty() {
            let mut merged = self.runs_to_merge(&runs, c.memtable.applied());
            let mut written = self.write_run(c, &runs[..merged], false);
            if written.as_ref().is_err_and(|e| e.kind() == Kind::NoSpace) && runs.len() < MAX_RUNS {
                // What is in reserve is for the journal alone.
                match self.write_run(c, &[], true) {
                    Err(e) if e.kind() == Kind::NoSpace => {}
                    other => (merged, written) = (0, other),
                }
            }
            let (reference, extent) = written?;
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
        let undo = |e: Error| {
            if let Some((start, len)) = new_extent {
                self.space.lock().hot.insert(start, len);
            }
            e
        };
        let history = self.turn_history(c).map_err(undo)?;
        let mut next = c.superblock;
        // What is free once this superblock counts.
        let mut free = c.free.clone();
        let mut high = c.high;
        for (start, len) in new_extent.into_iter().chain(history.own) {
            for slot in start..start + len {
                use_slot(&mut free, &mut high, slot);
            }
        }
        replaced.extend(&history.freed);
        let old_list = (next.free_slot.get(), next.free_slots.get());
        if old_list.0 != 0 {
            replaced.push(old_list);
        }
        for &(start, len) in &replaced {
            free.insert(start, len);
        }
        let mut forgotten = c.forgotten + history.lost + free.limit();
        let list = self
            .write_free_list(&mut next, &mut free, &mut high, &mut forgotten)
            .map_err(|e| {
                if let Some((start, len)) = history.own {
                    self.space.lock().hot.insert(start, len);
                }
                undo(e)
            })?;
        history.describe(&mut next, c.history.keep.is_some());
        next.sequence = U64::new(next.sequence.get() + 1);
        next.set_refer(refer);
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
        self.host.note(&mut next);
        // The new run, and copy 2 of the last change, before copy 1 is touched. Where neither was written there is nothing to wait for.
        let wrote =
            new_extent.is_some() || history.own.is_some() || list.is_some() || c.second_pending;
        if wrote {
            self.sync(c)?;
        }
        let bytes = next.encode().to_vec();
        let copy = |copy| {
            let written = self.file.write_at(&bytes, Slot(copy).at());
            written.map_err(|e| self.poison(e))
        };
        if later && !wrote {
            self.host.unsettled().rest_on_superblock(First {
                file: self.file().clone(),
                memory: self.volatile.clone(),
                superblock: next,
            });
            self.host.by_another(BLOCK);
            c.first_pending = true;
        } else {
            // The mark first: a successor that finds the copy without it takes it for durable.
            volatile::syncing(&self.volatile, Syncing::Superblock);
            copy(1)?;
            self.sync_marked(Syncing::Superblock)?;
            copy(2)?;
            c.second_pending = true;
        }
        c.superblock = next;
        c.free = free;
        c.high = high;
        c.forgotten = forgotten;
        history.done(&mut c.history);
        self.past.store(c.history.slots(), SeqCst);
        self.over.store(false, SeqCst);
        self.scattered.store(false, SeqCst);
        c.put_off = 0;
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
        reserve: bool,
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
            let kept = || Error::new(Kind::NoSpace, "there is no room for the block map");
            match reserve {
                true => (space.take_reserve(slots).ok_or_else(kept)?, true),
                false => space.contiguous(slots)?,
            }
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
}

/// Takes a slot that a commit names out of the free ones below the high-water mark, raising the mark if need be.
pub(super) fn use_slot(free: &mut FreeSet, high: &mut u64, slot: u32) {
    if u64::from(slot) >= *high {
        free.insert(*high as u32, slot - *high as u32);
        *high = u64::from(slot) + 1;
    } else {
        free.remove(slot, 1);
    }
}

/// Reads the free list that a superblock names.
pub(in crate::layer) fn read_free_list(
    file: &dyn File,
    superblock: &Superblock,
) -> Result<FreeSet> {
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
