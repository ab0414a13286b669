//! Finding the state of a layer file: superblock copies, and the journal (FORMAT.md, section 4, "Recovery").
//!
//! Reads only. What it returns is what the writer then makes durable.

use super::{MappedRun, region_of};
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, CommitEntry, CommitRecord, Header, JOURNAL_SLOTS, JOURNAL_START, Pointer, Step,
    Superblock, decode_commit, decode_record,
};
use crate::io::File;
use crate::map::{Item, Memtable, RegionMap, WORDS, merge, undo};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// The superblock that counts, and how it was found.
pub struct Found {
    /// The one that counts.
    pub superblock: Superblock,
    /// Neither copy was ever written: a fork that was never opened.
    pub fresh: bool,
    /// A copy that is unreadable although the other is not: said in the log.
    pub damaged_copy: bool,
    /// Copy 1 counts and copy 2 is not the same: copy 2 must be made good before copy 1, the only good one, is written to.
    pub second_differs: bool,
    /// Copy 2 counts and copy 1 is not the same.
    pub first_differs: bool,
}

fn read_slot(file: &dyn File, slot: u32, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; BLOCK_SIZE];
    let at = Slot(slot).at();
    if at < len {
        let n = ((len - at) as usize).min(BLOCK_SIZE);
        file.read_at(&mut bytes[..n], at)?;
    }
    Ok(bytes)
}

/// Before a writer believes what it reads: its predecessor may have died with changes only in the page cache, or after a failed sync, when
/// the page cache shows what is not on the disk and no later sync will put it there. Afterwards reads show the disk.
/// A layer that is its header alone has nothing to settle.
pub fn settle(file: &dyn File, header: &Header) -> Result<()> {
    if file.len()? <= BLOCK {
        return Ok(());
    }
    file.sync()?;
    file.forget_cached(0, Slot(JOURNAL_START).at());
    // What was closed cleanly was synced before the superblock said so; else all is in doubt.
    if superblock(file, header)?.superblock.state.get() == format::STATE_WRITABLE {
        file.forget_cached(0, u64::MAX);
    }
    Ok(())
}

/// [`settle`], unless the layer was closed cleanly. Then all that its superblock refers to was durable before that was written; that itself may
/// be in the page cache only, also for good where a sync of it failed. The caller syncs before it writes the next one, and syncs that, before
/// it changes anything else.
pub fn settle_unless_clean(file: &dyn File, header: &Header) -> Result<()> {
    if file.len()? > BLOCK
        && superblock(file, header)?.superblock.state.get() == format::STATE_CLEAN
    {
        return Ok(());
    }
    settle(file, header)
}

/// Takes the valid copy with the higher sequence.
pub fn superblock(file: &dyn File, header: &Header) -> Result<Found> {
    let id = Id(header.layer);
    let len = file.len()?;
    let first = read_slot(file, 1, len)?;
    let second = read_slot(file, 2, len)?;
    let a = Superblock::decode(&first, &id);
    let b = Superblock::decode(&second, &id);
    match (a, b) {
        (Ok(a), Ok(b)) => {
            let superblock = if b.sequence.get() > a.sequence.get() {
                b
            } else {
                a
            };
            Ok(Found {
                superblock,
                fresh: false,
                damaged_copy: false,
                second_differs: a.sequence.get() > b.sequence.get(),
                first_differs: a.sequence.get() < b.sequence.get(),
            })
        }
        (Ok(superblock), Err(_)) => Ok(Found {
            superblock,
            fresh: false,
            damaged_copy: true,
            second_differs: true,
            first_differs: false,
        }),
        (Err(_), Ok(superblock)) => Ok(Found {
            superblock,
            fresh: false,
            damaged_copy: true,
            second_differs: false,
            first_differs: true,
        }),
        (Err(e), Err(_)) => {
            let untouched = second.iter().all(|&b| b == 0);
            let journal = read_journal(file, len)?;
            let committed = journal
                .chunks_exact(BLOCK_SIZE)
                .enumerate()
                .any(|(slot, _)| decode_commit(&journal[slot * BLOCK_SIZE..], &id).is_some());
            if untouched && !committed {
                return Ok(Found {
                    superblock: Superblock::empty(header),
                    fresh: true,
                    damaged_copy: false,
                    second_differs: false,
                    first_differs: false,
                });
            }
            Err(e
                .context("neither copy of the superblock can be read")
                .offset(Slot(1).at())
                .layer(id)
                .path(file.path()))
        }
    }
}

/// The journal area, as far as the file holds it.
fn read_journal(file: &dyn File, len: u64) -> Result<Vec<u8>> {
    let start = Slot(JOURNAL_START).at();
    let end = len.min(start + u64::from(JOURNAL_SLOTS) * BLOCK);
    if end <= start {
        return Ok(Vec::new());
    }
    // Most of it is usually a hole: up to the last byte the host has.
    let last = file
        .data_ranges(start, end - start)?
        .last()
        .map_or(start, |(at, n)| at + n);
    let mut bytes = vec![0; (last - start) as usize];
    file.read_at(&mut bytes, start)?;
    bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
    Ok(bytes)
}

/// What the journal adds to the superblock's state.
pub struct Replay {
    /// The changes, all commits over each other.
    pub memtable: Memtable,
    /// Sequence of the next commit.
    pub next_commit: u64,
    /// Counts after the changes.
    pub data_blocks: u64,
    /// See `data_blocks`.
    pub zero_blocks: u64,
    /// Slots that the commits took into use and freed, in order.
    pub changes: Vec<Change>,
    /// Where in `changes` those of the last commit begin.
    pub last_changes: usize,
    /// Journal slots that the commits occupy.
    pub head: u32,
    /// Entries of the last commit.
    pub last: Vec<CommitEntry>,
    /// Journal slots of the last commit.
    pub last_slots: u32,
    /// What the commits replaced, the oldest first, as far as they say so.
    pub steps: Vec<Step>,
    /// Sequence and time of the last commit that does not say what it replaced: nothing before it can be shown.
    pub cut: Option<(u64, u64)>,
    /// Where what changes replace is noted, if it is.
    undo: Option<Vec<CommitEntry>>,
    /// A last commit that was dropped because its data is not whole: its sequence.
    pub dropped: Option<u64>,
    /// Number of commits found.
    pub commits: u64,
}

/// A slot that a commit took into use or freed.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Now holds data.
    Used(Slot),
    /// Holds nothing any more.
    Freed(Slot),
}

/// What came before: did the machine go down, or at most the process?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// The last commit may lack data: it is checked.
    Crash,
    /// All that was written is found, whether or not it is on the disk.
    Death,
}

/// Follows the journal of a layer that was not closed cleanly.
pub fn replay(file: &dyn File, superblock: &Superblock, runs: &[Arc<MappedRun>]) -> Result<Replay> {
    replay_after(After::Crash, file, superblock, runs)
}

/// Follows the journal, knowing what came before.
pub fn replay_after(
    after: After,
    file: &dyn File,
    superblock: &Superblock,
    runs: &[Arc<MappedRun>],
) -> Result<Replay> {
    let id = Id(superblock.layer);
    let journal = read_journal(file, file.len()?)?;
    let generation = superblock.generation.get();
    let mut expected = superblock.next_commit.get();
    let mut at = 0usize;
    let mut records: Vec<CommitRecord<'_>> = Vec::new();
    while let Some(rest) = journal.get(at..).filter(|r| !r.is_empty()) {
        match decode_record(rest, &id) {
            Some(record)
                if record.header.sequence.get() == expected
                    && record.header.generation.get() == generation =>
            {
                at += record.header.slots.get() as usize * BLOCK_SIZE;
                records.push(record);
                expected += 1;
            }
            _ => break,
        }
    }
    // An invalid record with a valid later one behind it is damage, never a crash: each commit was durable before the next
    // one was begun.
    for slot in (at..journal.len()).step_by(BLOCK_SIZE) {
        if let Some((h, _)) = decode_commit(&journal[slot..], &id)
            && (h.generation.get() > generation
                || (h.generation.get() == generation && h.sequence.get() >= expected))
        {
            return Err(Error::new(
                Kind::Corrupt,
                format!("the journal is damaged: commit {expected} cannot be read, but commit {} stands behind it", h.sequence),
            )
            .offset(Slot(JOURNAL_START).at() + at as u64)
            .layer(id)
            .path(file.path())
            .hint("restore the layer from a backup; snapshots below it are not affected"));
        }
    }
    let mut dropped = None;
    let mut head = (at / BLOCK_SIZE) as u32;
    if after == After::Crash
        && let Some(last) = records.last()
        && !data_whole(file, last.entries)?
    {
        expected -= 1;
        dropped = Some(expected);
        head -= last.header.slots.get();
        records.pop();
    }
    let mut replay = Replay {
        memtable: Memtable::new(),
        next_commit: expected,
        data_blocks: superblock.data_blocks.get(),
        zero_blocks: superblock.zero_blocks.get(),
        changes: Vec::new(),
        last_changes: 0,
        head,
        last: records
            .last()
            .map_or(Vec::new(), |last| last.entries.to_vec()),
        last_slots: records.last().map_or(0, |last| last.header.slots.get()),
        steps: Vec::new(),
        cut: None,
        undo: None,
        dropped,
        commits: records.len() as u64,
    };
    let mut below = Below {
        runs,
        regions: HashMap::new(),
    };
    prefetch(file, runs, &records);
    for record in records {
        replay.last_changes = replay.changes.len();
        let (sequence, time) = (record.header.sequence.get(), record.header.time.get());
        if let Some(undo) = record.undo {
            replay.apply_undoable(record.entries, undo);
            replay.steps.push(Step {
                sequence,
                time,
                undo: undo.to_vec(),
            });
            continue;
        }
        replay.cut = Some((sequence, time));
        for entry in record.entries {
            replay
                .apply(entry, &mut below)
                .map_err(|e| e.layer(id).path(file.path()))?;
        }
    }
    Ok(replay)
}

/// Fewer regions are looked up one after the other before all could be asked for.
const FEW: usize = 32;

/// Asked for at most, in bytes: a file that was made to deceive may name the same places again and again.
const AHEAD: u64 = 1 << 30;

/// Asks for what the runs say of all the regions that the journal changes, first where it stands and then itself: on the disk it is anywhere, and to wait for one after
/// the other takes as many times as long as the disk can serve at once.
fn prefetch(file: &dyn File, runs: &[Arc<MappedRun>], records: &[CommitRecord<'_>]) {
    let asked = records.iter().filter(|record| record.undo.is_none());
    let mut regions: Vec<u32> = asked
        .flat_map(|record| record.entries)
        .flat_map(|entry| {
            let (lba, count, _) = entry.get();
            let last = u64::from(lba.0) + u64::from(count).saturating_sub(1);
            [lba.region().0, Lba(last as u32).region().0]
        })
        .collect();
    regions.sort_unstable();
    regions.dedup();
    if regions.len() < FEW {
        return;
    }
    let mut left = AHEAD;
    let mut ask = |run: &MappedRun, place: Range<u64>| {
        let len = place.end - place.start;
        let enough = left < len;
        if !enough {
            left -= len;
            let start = Slot(run.reference().slot.get()).at();
            file.prefetch(start.saturating_add(place.start), len);
        }
        !enough
    };
    for run in runs {
        // Each is asked for while the one before is on its way.
        let _all = run.directories(&regions).all(|place| ask(run, place));
    }
    for run in runs {
        let _all = run.bodies(&regions).all(|place| ask(run, place));
    }
}

/// What the runs say, remembered region by region while the journal is replayed.
struct Below<'a> {
    runs: &'a [Arc<MappedRun>],
    regions: HashMap<u32, RegionMap>,
}

/// Regions remembered at most: recovery's memory is bounded by the journal and this.
const REMEMBER: usize = 4096;

impl Below<'_> {
    fn region(&mut self, region: Region) -> Result<&RegionMap> {
        if self.regions.len() >= REMEMBER && !self.regions.contains_key(&region.0) {
            self.regions.clear();
        }
        match self.regions.entry(region.0) {
            std::collections::hash_map::Entry::Occupied(e) => Ok(e.into_mut()),
            std::collections::hash_map::Entry::Vacant(e) => {
                Ok(e.insert(region_of(self.runs, region)?))
            }
        }
    }
    fn may_touch(&self, start: u32, end: u32) -> bool {
        self.runs.iter().any(|r| r.may_touch(start, end))
    }
}

impl Replay {
    /// Applies changes that are in no commit, on top of those that are; returns them, and what they replace.
    pub fn unflushed(
        &mut self,
        entries: impl Iterator<Item = CommitEntry>,
        runs: &[Arc<MappedRun>],
    ) -> Result<(Memtable, Vec<CommitEntry>)> {
        let mut found = Memtable::new();
        for entry in entries {
            let (lba, count, pointer) = entry.get();
            found.apply(lba, count, pointer);
        }
        let mut below = Below {
            runs,
            regions: HashMap::new(),
        };
        self.undo = Some(Vec::new());
        for entry in found.entries() {
            self.apply(&entry, &mut below)?;
        }
        Ok((found, self.undo.take().unwrap_or_default()))
    }
    /// Applies a commit that says what it replaced: nothing needs to be looked up, and what it replaced is held.
    fn apply_undoable(&mut self, entries: &[CommitEntry], undo: &[CommitEntry]) {
        for entry in undo {
            let (_, count, pointer) = entry.get();
            self.forget(pointer, count.into());
        }
        for entry in entries {
            let (lba, count, pointer) = entry.get();
            self.count(Pointer::Absent, pointer, count.into());
            if let Pointer::Data { slot, .. } = pointer {
                self.changes.push(Change::Used(slot));
            }
            self.memtable.apply(lba, count, pointer);
        }
    }
    /// Notes what is about to be replaced.
    fn note(&mut self, lba: Lba, count: u32, old: Pointer) {
        if let Some(list) = &mut self.undo {
            undo::push(list, lba, count, old);
        }
    }
    /// What the changes, and the runs below them, say of a block.
    fn pointer(&self, lba: Lba, below: &mut Below<'_>) -> Result<Pointer> {
        match self.memtable.get(lba) {
            Pointer::Absent if below.may_touch(lba.region().0, lba.region().0 + 1) => {
                Ok(below.region(lba.region())?.get(lba.index()))
            }
            known => Ok(known),
        }
    }
    fn apply(&mut self, entry: &CommitEntry, below: &mut Below<'_>) -> Result<()> {
        let (lba, count, pointer) = entry.get();
        if count == 1 {
            let old = self.pointer(lba, below)?;
            self.note(lba, 1, old);
            self.count(old, pointer, 1);
            if let Pointer::Data { slot, .. } = old {
                self.changes.push(Change::Freed(slot));
            }
            if let Pointer::Data { slot, .. } = pointer {
                self.changes.push(Change::Used(slot));
            }
            self.memtable.apply(lba, count, pointer);
            return Ok(());
        }
        let end = u64::from(lba.0) + u64::from(count);
        let mut at = u64::from(lba.0);
        while at < end {
            let first = Lba(at as u32);
            let region = first.region();
            if first.index() == 0 && pointer == Pointer::Zero && end - at >= REGION_BLOCKS as u64 {
                let whole = (end - at) / REGION_BLOCKS as u64;
                self.zero_regions(region, whole as u32, below)?;
                at += whole * REGION_BLOCKS as u64;
                continue;
            }
            let n = ((REGION_BLOCKS - first.index()) as u64).min(end - at);
            let known = self.memtable.region(region);
            // Whole regions that nothing knows: only to be counted.
            if known.is_none() && !below.may_touch(region.0, region.0 + 1) {
                self.note(first, n as u32, Pointer::Absent);
                self.count(Pointer::Absent, pointer, n);
            } else {
                let mut map = known.unwrap_or_default();
                map.underlay(below.region(region)?);
                for index in first.index()..first.index() + n as usize {
                    let old = map.get(index);
                    self.note(region.lba(index), 1, old);
                    self.count(old, pointer, 1);
                    if let Pointer::Data { slot, .. } = old {
                        self.changes.push(Change::Freed(slot));
                    }
                }
            }
            at += n;
        }
        self.memtable.apply(lba, count, pointer);
        Ok(())
    }
    /// Counts what becomes of whole regions, up to all of the largest disk: only those that something knows are looked at.
    fn zero_regions(&mut self, region: Region, regions: u32, below: &Below<'_>) -> Result<()> {
        let end = region.0 + regions;
        let (mut noted, mut next) = (self.undo.take(), region.0);
        let note = |noted: &mut Option<Vec<CommitEntry>>, from, to, pointer| {
            if let Some(list) = noted {
                undo::push_regions(list, from, to, pointer);
            }
        };
        let mut sources = vec![self.memtable.items_in(region, end)];
        let runs = below.runs.iter().filter(|r| r.may_touch(region.0, end));
        sources.extend(runs.map(|r| r.items(region)));
        let (mut data, mut zeros) = (0, 0);
        for item in merge(sources) {
            let item = item?;
            if item.start() >= end {
                break;
            }
            note(&mut noted, next, item.start(), Pointer::Absent);
            next = item.end().min(end);
            match item {
                Item::Zeros(..) => {
                    note(&mut noted, item.start(), next, Pointer::Zero);
                    zeros += u64::from(next - item.start()) * REGION_BLOCKS as u64;
                }
                Item::Region(region, map) => {
                    if let Some(list) = &mut noted {
                        undo::push_map(list, region, &map, &[0; WORDS]);
                    }
                    let counts = map.counts();
                    data += counts.0;
                    zeros += counts.1;
                    self.changes.extend(map.iter().filter_map(|(_, p)| match p {
                        Pointer::Data { slot, .. } => Some(Change::Freed(slot)),
                        _ => None,
                    }));
                }
            }
        }
        note(&mut noted, next, end, Pointer::Absent);
        self.undo = noted;
        let all = u64::from(regions) * REGION_BLOCKS as u64;
        self.data_blocks = self.data_blocks.saturating_sub(data);
        self.zero_blocks = self.zero_blocks.saturating_sub(zeros) + all;
        Ok(())
    }
    fn forget(&mut self, old: Pointer, blocks: u64) {
        match old {
            Pointer::Data { .. } => self.data_blocks = self.data_blocks.saturating_sub(blocks),
            Pointer::Zero => self.zero_blocks = self.zero_blocks.saturating_sub(blocks),
            Pointer::Absent => {}
        }
    }
    fn count(&mut self, old: Pointer, new: Pointer, blocks: u64) {
        self.forget(old, blocks);
        match new {
            Pointer::Data { .. } => self.data_blocks += blocks,
            Pointer::Zero => self.zero_blocks += blocks,
            Pointer::Absent => {}
        }
    }
}

/// Is all the data of a commit there?
fn data_whole(file: &dyn File, entries: &[CommitEntry]) -> Result<bool> {
    let len = file.len()?;
    let mut block = vec![0; BLOCK_SIZE];
    for entry in entries {
        if let (_, _, Pointer::Data { slot, sum }) = entry.get() {
            if slot.at() + BLOCK > len {
                return Ok(false);
            }
            file.read_at(&mut block, slot.at())?;
            if format::crc(&block) != sum {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
