//! Going on where another process died (FORMAT.md, section 4, "Takeover").
//!
//! Always true: nothing that the dead process had published is lost, whether or not it was flushed; and if this process dies as well,
//! at any point, the next one finds the same.

use super::commit::{read_free_list, use_slot};
use super::{Beginning, Counted, History, Layer, Opened, Resident, SHARDS, State};
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, CommitEntry, JOURNAL_SLOTS, JOURNAL_START, Pointer, SLOT_ZERO, commit_slots,
};
use crate::io::File;
use crate::layer::history::Keep;
use crate::layer::recover::{self, After, Change, Replay};
use crate::layer::space::Space;
use crate::layer::volatile::{self, Area, Found, Syncing, VolatileLog};
use crate::layer::{open_runs, read_header, region_of};
use crate::map::{Item, Memtable, WORDS};
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Slot};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

/// The epoch of what was committed; that of what was not is the next.
const COMMITTED: u64 = 1;

impl Layer {
    /// Opens a layer that the process which died had open with [`Layer::open_on`] and the same memory: also what was not flushed is there. The
    /// caller has locked the file; every thread of the dead process is gone. [`Kind::Poisoned`] if what it had acknowledged cannot be
    /// shown to be all there.
    pub fn resume(
        file: Arc<dyn File>,
        memory: Arc<SharedMemory>,
        keep: Option<Keep>,
    ) -> Result<Layer> {
        let header = read_header(&*file)?;
        let id = Id(header.layer);
        let lost = |what: String| {
            Error::new(Kind::Poisoned, what)
                .layer(id)
                .path(file.path())
                .hint("`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush")
        };
        let (generation, areas, syncing, durable, written) = match volatile::find(&memory, &id)? {
            // It had not come far enough to accept anything.
            Found::Nothing => return Layer::open_on(file, memory, keep),
            Found::Log {
                generation,
                areas,
                syncing,
                durable,
                written,
            } => (generation, areas, syncing, durable, written),
        };
        let found = recover::superblock(&*file, &header)?;
        let superblock = found.superblock;
        if State::of(&superblock) != State::Writable || superblock.generation.get() != generation {
            if areas.iter().all(|a| a.entries.is_empty()) {
                return Layer::open_on(file, memory, keep);
            }
            return Err(lost(
                "un-flushed changes belong to another state of the layer".into(),
            ));
        }
        let runs = open_runs(&*file, &id, superblock.run_refs())?;
        let mut free =
            read_free_list(&*file, &superblock).map_err(|e| e.layer(id).path(file.path()))?;
        let mut high = superblock.high_water.get();
        let mut replay = recover::replay_after(After::Death, &*file, &superblock, &runs)?;
        if areas[0].sequence > replay.next_commit {
            return Err(lost(format!(
                "commit {} is gone: a sync failed before the server died",
                replay.next_commit
            )));
        }
        let mut owed = BTreeSet::new();
        for (i, change) in replay.changes.iter().enumerate() {
            match *change {
                Change::Used(slot) => use_slot(&mut free, &mut high, slot.0),
                Change::Freed(slot) if i >= replay.last_changes => drop(owed.insert(slot.0)),
                Change::Freed(slot) => free.insert(slot.0, 1),
            }
        }
        let committed = replay.memtable.clone();
        let (data, zero) = (replay.data_blocks, replay.zero_blocks);
        let known = replay.changes.len();
        // What a commit holds is not un-flushed: the process before us may have died before it forgot what it had just committed.
        let left: Vec<&Area> = areas
            .iter()
            .filter(|a| a.sequence >= replay.next_commit && !a.entries.is_empty())
            .filter(|a| !is_committed(a, &committed))
            .collect();
        for entry in left.iter().flat_map(|a| &a.entries) {
            check(entry, superblock.size.get(), file.len()?)
                .map_err(|what| lost(format!("the volatile log cannot be right: {what}")))?;
        }
        let entries = left.iter().flat_map(|a| a.entries.iter().copied());
        let (fresh, undo) = replay.unflushed(entries, &runs)?;
        // Whoever did not keep a history goes on without: its superblock does not allow for one.
        let keep = keep.filter(|_| superblock.has_history());
        let undo = keep.is_some().then_some(undo);
        let steps = std::mem::take(&mut replay.steps);
        let history = History::found(keep, &*file, &superblock, steps, replay.cut)?;
        if syncing != Syncing::No {
            rewrite(&*file, &replay, replay.next_commit - 1 > durable, &fresh)?;
        }
        let mut space = Space::new(high);
        let mut unused = free.clone();
        let mut counted = Counted {
            data_delta: replay.data_blocks as i64 - data as i64,
            zero_delta: replay.zero_blocks as i64 - zero as i64,
            reserved: (fresh.entries().len() + undo.as_ref().map_or(0, Vec::len)) as u64,
            undo,
            ..Counted::default()
        };
        for change in &replay.changes[known..] {
            match *change {
                Change::Used(slot) => {
                    use_slot(&mut unused, &mut space.high, slot.0);
                    // The commit that freed it was durable: the dead process had used it again. Until a commit says so it is free, also
                    // if its block is written once more before.
                    if owed.remove(&slot.0) {
                        free.insert(slot.0, 1);
                    }
                }
                Change::Freed(slot) => counted.freed.push((slot.0, 1)),
            }
        }
        space.inherited = unused.iter().collect();
        // What it had written ahead, or for requests that it did not live to answer, stands behind all that is named.
        let end = file.len()?.div_ceil(BLOCK).min(u64::from(SLOT_ZERO));
        if end > space.high {
            let tail = (space.high as u32, (end - space.high) as u32);
            space.inherited.push(tail);
            space.high = end;
        }
        space.journal_head = replay.head;
        space.entries = counted.reserved;
        // Reserved by whoever accepted these entries.
        space.journal_reserved = match counted.reserved {
            0 => replay.head,
            entries => (replay.head + commit_slots(entries)).min(JOURNAL_SLOTS),
        };
        let at_once = left.len() > 1;
        let log = match left[..] {
            [only] if !fresh.is_empty() => VolatileLog::adopt(memory.clone(), only),
            // Nothing is left, or two areas that stay as they are until one commit holds both.
            _ if at_once => VolatileLog::adopt(memory.clone(), left[1]),
            _ => VolatileLog::new(memory.clone(), &id, generation, replay.next_commit),
        };
        let opened = Opened {
            recovered: true,
            commits: replay.commits,
            dropped: None,
            damaged_copy: found.damaged_copy,
        };
        let layer = Layer::assemble(
            file,
            header,
            Beginning {
                superblock,
                runs,
                opened,
                memtable: committed,
                free,
                high,
                next_commit: replay.next_commit,
                head: replay.head,
                data,
                zero,
                space,
                log,
                volatile: memory,
                history,
            },
        );
        layer.host.at_least(written);
        layer.note_written();
        let owed = owed.into_iter().map(|slot| (slot, 1)).collect();
        layer.go_on(&replay.memtable, &fresh, owed)?;
        layer.settle_superblock(&found, syncing)?;
        if at_once {
            layer.commit_inherited(&fresh, counted)?;
        } else {
            layer.data_blocks.fetch_add(counted.data_delta, SeqCst);
            layer.zero_blocks.fetch_add(counted.zero_delta, SeqCst);
            layer.log.lock().counted = counted;
        }
        tracing::debug!(layer = %id, entries = fresh.applied(), "took over what was not flushed");
        Ok(layer)
    }

    /// Puts what is in no run yet into the table, and the committing side in order.
    fn go_on(&self, known: &Memtable, fresh: &Memtable, owed: Vec<(u32, u32)>) -> Result<()> {
        let open = COMMITTED + 1;
        let runs = self.runs.read().clone();
        for item in known.items() {
            match item? {
                Item::Zeros(region, regions) => {
                    self.zeroed
                        .write()
                        .insert(region.0, region.0 + regions, open);
                }
                Item::Region(region, mut map) => {
                    let below = region_of(&runs, region)
                        .map_err(|e| e.layer(self.id).path(self.file.path()))?;
                    map.underlay(&below);
                    let mut dirty = [0; WORDS];
                    if let Some(new) = fresh.region(region) {
                        for index in 0..REGION_BLOCKS {
                            if new.get(index) != Pointer::Absent {
                                dirty[index / 64] |= 1u64 << (index % 64);
                            }
                        }
                    }
                    let resident = Resident {
                        map,
                        changed: open,
                        dirty,
                    };
                    self.table[region.0 as usize % SHARDS]
                        .write()
                        .insert(region.0, resident);
                }
            }
        }
        self.epoch.store(open, SeqCst);
        let mut commit = self.commit.lock();
        commit.epoch = COMMITTED;
        commit.owed = Some(owed);
        // Nobody knows; it costs nothing to think so.
        commit.second_pending = true;
        Ok(())
    }

    /// The copy that counts may be in the page cache only: it is made durable before the other one is written, and before the journal that it
    /// replaces is overwritten.
    fn settle_superblock(&self, found: &recover::Found, syncing: Syncing) -> Result<()> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        let bytes = c.superblock.encode().to_vec();
        let copy = |copy| {
            let written = self.file.write_at(&bytes, Slot(copy).at());
            written.map_err(|e| self.poison(e))
        };
        if syncing == Syncing::Superblock {
            copy(1)?;
            self.sync_marked(Syncing::Superblock)?;
            copy(2)?;
        } else if found.second_differs || found.first_differs {
            // What the other copy rests on is about to be overwritten.
            self.sync(c)?;
            copy(if found.first_differs { 1 } else { 2 })?;
            self.sync(c)?;
        } else if syncing != Syncing::No {
            copy(2)?;
        }
        Ok(())
    }

    /// The process died while it committed one epoch, and had accepted writes of the next: both become one commit.
    fn commit_inherited(&self, fresh: &Memtable, counted: Counted) -> Result<()> {
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        {
            let mut space = self.space.lock();
            space.entries -= counted.reserved;
            space.committing = commit_slots(counted.reserved);
        }
        self.data_blocks.fetch_add(counted.data_delta, SeqCst);
        self.zero_blocks.fetch_add(counted.zero_delta, SeqCst);
        let epoch = self.epoch.fetch_add(1, SeqCst);
        // As in every first commit after a takeover.
        self.sync(c)?;
        if fresh.is_empty() {
            self.space.lock().committing = 0;
            c.epoch = epoch;
        } else {
            self.commit_changes(c, fresh, counted, epoch)?;
        }
        // Both areas are in the journal now.
        let generation = c.superblock.generation.get();
        self.log.lock().entries =
            VolatileLog::new(self.volatile.clone(), &self.id, generation, c.next_commit);
        self.note_written();
        self.logged.store(0, SeqCst);
        Ok(())
    }
}

/// Two areas that became one commit: its number is that of the first one, and the second one must not count again, for whatever replaces its blocks
/// would free slots at once that a commit names. A slot is written once: where the commits name one for the same block as the area does, they hold
/// all of it. An area of zeros alone may count twice.
fn is_committed(area: &Area, commits: &Memtable) -> bool {
    area.entries.iter().any(|entry| {
        let (lba, _, pointer) = entry.get();
        matches!(pointer, Pointer::Data { .. }) && commits.get(lba) == pointer
    })
}

/// Slots of a stretch that the host's page cache is told to let go of as a whole: it does not let go of a part of a large folio, and these are
/// aligned, and of 2 MiB at most.
const STRETCH: u32 = 512;

/// A sync was under way. Had it failed, the pages would count as written, and the next sync would have nothing to do for them: so what it was to make
/// durable is compared with what the disk has, and written again where that is something else: the last commit, if `last` (what is durable is
/// never written to), what is in none yet, and the superblock.
///
/// Written again into the same pages it need not arrive: ext4 takes blocks that it reserved for a page for written ones from then on, though they
/// become so only when the data arrives, and a later sync, which succeeds, leaves them as they are: zeros. Hence the page cache must let go of them first.
fn rewrite(file: &dyn File, replay: &Replay, last: bool, fresh: &Memtable) -> Result<()> {
    let lost = |e: Error| {
        Error::new(Kind::Poisoned, format!("a sync failed when the server died, and again: {e}"))
            .path(file.path())
            .hint("`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush")
    };
    let (record, entries) = match last {
        true => (replay.last_slots.min(replay.head), &replay.last[..]),
        false => (0, &[][..]),
    };
    let mut slots: BTreeMap<u32, Option<(Lba, u32)>> = (replay.head - record..replay.head)
        .map(|slot| (JOURNAL_START + slot, None))
        .collect();
    for entry in entries.iter().chain(&fresh.entries()) {
        if let (lba, _, Pointer::Data { slot, sum }) = entry.get() {
            slots.insert(slot.0, Some((lba, sum)));
        }
    }
    // The page cache lets go only of what is not dirty; and shows the disk only after that.
    file.sync().map_err(lost)?;
    let len = file.len()?;
    slots.extend(
        [1, 2]
            .into_iter()
            .filter(|&copy| Slot(copy).at() + BLOCK <= len)
            .map(|copy| (copy, None)),
    );
    let mut stretches: BTreeMap<u32, Vec<_>> = BTreeMap::new();
    for slot in slots {
        stretches.entry(slot.0 / STRETCH).or_default().push(slot);
    }
    let mut found = vec![0; BLOCK_SIZE];
    // What lies between them too, and behind: slots that are free, or never were in use, may have been written, and are going to be again.
    let mut forgotten = 0;
    for (number, stretch) in stretches {
        let mut blocks = Vec::with_capacity(stretch.len());
        for &(slot, known) in &stretch {
            let mut block = vec![0; BLOCK_SIZE];
            file.read_at(&mut block, Slot(slot).at())?;
            if let Some((lba, sum)) = known
                && format::crc(&block) != sum
            {
                return Err(Error::new(
                    Kind::Poisoned,
                    "a sync failed before the server died, and took with it what had been written",
                )
                .block(lba)
                .offset(Slot(slot).at())
                .path(file.path())
                .hint("`forkdisk detach --force` the disk and attach it again: it comes back as of its last flush"));
            }
            blocks.push((slot, block));
        }
        let end = (u64::from(number) + 1) * u64::from(STRETCH) * BLOCK;
        file.forget_cached(forgotten, end - forgotten);
        forgotten = end;
        let mut wrote = false;
        for (slot, block) in &blocks {
            file.read_at(&mut found, Slot(*slot).at())?;
            if found != *block {
                file.write_at(block, Slot(*slot).at())?;
                wrote = true;
                if *slot < JOURNAL_START {
                    // One copy of the superblock must be whole at any time.
                    file.sync().map_err(lost)?;
                }
            }
        }
        if wrote {
            file.sync().map_err(lost)?;
        }
    }
    file.forget_cached(forgotten, u64::MAX);
    Ok(())
}

/// Can this entry be right, in a disk of `size` bytes and a file of `len`?
fn check(entry: &CommitEntry, size: u64, len: u64) -> std::result::Result<(), String> {
    let (lba, count, pointer) = entry.get();
    let end = (u64::from(lba.0) + u64::from(count)) * crate::units::BLOCK;
    // A disk that is made smaller is zeroed first; zeros past its end do no harm.
    if count == 0 || (end > size && pointer != Pointer::Zero) {
        return Err(format!("{count} blocks from block {} on", lba.0));
    }
    match pointer {
        Pointer::Absent => Err(format!("nothing for block {}", lba.0)),
        Pointer::Data { slot, .. }
            if slot.0 < crate::format::DATA_START || slot.at() + crate::units::BLOCK > len =>
        {
            Err(format!("slot {} for block {}", slot.0, lba.0))
        }
        _ => Ok(()),
    }
}
