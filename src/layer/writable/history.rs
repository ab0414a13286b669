//! Keeping the history of a layer: what a commit replaced stays, until it is too old or too much (FORMAT.md, "History").
//!
//! Always true:
//! - what a commit of the history replaced is neither free nor punched before a durable superblock says that its history begins later;
//! - the commits that can be undone follow each other without a gap, up to the last one: those of the segments, then those of the journal;
//! - nobody needs the history to find what the disk shows now: where there is no room for it, it goes.

use super::expiry::{WORTH, bytes_of};
use super::{Commit, Layer, State};
use crate::error::{Error, Kind, Result};
use crate::format::{CommitEntry, Pointer, SegmentHeader, Step, Superblock};
use crate::io::File;
use crate::layer::history::{Hold, Holds, Keep, Lower, Segment, Stays, read_segment, segments};
use crate::map::{RegionMap, WORDS, undo};
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::{BLOCK, BLOCK_SIZE, Id, REGION_BLOCKS, Region, Slot};
use std::collections::VecDeque;
use std::sync::Arc;
use zerocopy::little_endian::{U32, U64};

/// Regions with pointers of their own that a discard zeroes under one reservation: each may replace 512 blocks.
pub(super) const KNOWN_REGIONS: u32 = 64;

/// What a layer keeps of its past.
#[derive(Default)]
pub(super) struct History {
    /// How much to keep; `None`: nothing.
    pub keep: Option<Keep>,
    /// Number and time of the oldest point. What the commits up to it replaced is free once a superblock says so.
    pub oldest: (u64, u64),
    pub segments: VecDeque<Segment>,
    /// The commits of the journal.
    journal: Vec<Step>,
    /// Slots of replaced blocks that all of them hold.
    held: u64,
    /// Bytes that those of the journal will take in a segment.
    noted: u64,
    /// Slots of the segments.
    own: u64,
    /// Slots of which nobody can say any more whether they are held: a segment was damaged.
    lost: u64,
    /// Points that somebody reads.
    pub holds: Holds,
}

/// What goes as a whole: a segment, or a commit of the journal.
pub(super) struct Part {
    /// Its last commit.
    pub number: u64,
    /// When that was made.
    pub time: u64,
    /// What it occupies.
    pub bytes: u64,
}

/// The history as the next superblock will describe it.
pub(super) struct Turn {
    oldest: (u64, u64),
    segments: VecDeque<Segment>,
    held: u64,
    /// The new segments, which are neighbours.
    pub own: Option<(u32, u32)>,
    /// What is free once that superblock counts.
    pub freed: Vec<(u32, u32)>,
    /// What is lost with a damaged segment.
    pub lost: u64,
}

impl History {
    /// The history of a layer that is opened: what the superblock names, and what the commits of the journal replaced.
    pub fn found(
        keep: Option<Keep>,
        file: &dyn File,
        superblock: &Superblock,
        journal: Vec<Step>,
        cut: Option<(u64, u64)>,
    ) -> Result<History> {
        let mut history = History {
            journal,
            ..History::default()
        };
        let last = superblock.next_commit.get().saturating_sub(1);
        if superblock.has_history() {
            let chain = segments(file, superblock)?;
            history.segments = chain.segments;
            history.oldest = (
                superblock.history_oldest.get(),
                superblock.history_time.get(),
            );
            if let Some(e) = chain.broken {
                tracing::warn!(layer = %Id(superblock.layer), "a part of the history is lost: {e}");
                let of = |s: &Segment| s.blocks + u64::from(s.slots);
                let known: u64 = history.segments.iter().map(of).sum();
                history.lost = superblock.history_blocks.get().saturating_sub(known);
                history.oldest = history
                    .segments
                    .front()
                    .map_or((last, 0), |s| (s.commits.0 - 1, 0));
            }
        } else {
            let time = |k: &Keep| match k.after {
                // What the layer below ended with.
                (after, time) if after == last && after > 0 => time,
                _ => (k.clock)(),
            };
            history.oldest = (last, keep.as_ref().map_or(0, time));
        }
        history.held = history.segments.iter().map(|s| s.blocks).sum();
        history.own = own_slots(&history.segments);
        history.held += history
            .journal
            .iter()
            .map(|s| s.slots().count() as u64)
            .sum::<u64>();
        history.noted = history.journal.iter().map(Step::noted).sum();
        if let Some(cut) = cut {
            history.oldest = history.oldest.max(cut);
        }
        history.keep = keep;
        Ok(history)
    }
    /// Slots that it occupies.
    pub fn slots(&self) -> u64 {
        self.held + self.own
    }
    /// Bytes that it occupies, and will when what is in the journal has become segments.
    pub fn bytes(&self) -> u64 {
        self.slots() * BLOCK + self.noted
    }
    /// A commit was made that can be undone.
    pub fn push(&mut self, step: Step) {
        self.held += step.slots().count() as u64;
        self.noted += step.noted();
        self.journal.push(step);
    }
    /// A commit was made that cannot be undone: the history begins with it.
    pub fn cut(&mut self, number: u64, time: u64) {
        self.oldest = (number, time);
    }
    /// What goes one after the other, the oldest first.
    pub fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let whole = |s: &Segment| Part {
            number: s.commits.1,
            time: s.last_time,
            bytes: (s.blocks + u64::from(s.slots)) * BLOCK,
        };
        let of = |s: &Step| Part {
            number: s.sequence,
            time: s.time,
            bytes: bytes_of(s),
        };
        let segments = self.segments.iter().map(whole);
        segments.chain(self.journal.iter().map(of))
    }
}

fn own_slots(segments: &VecDeque<Segment>) -> u64 {
    segments.iter().map(|s| u64::from(s.slots)).sum()
}

/// Sorted, neighbours together.
fn extents(mut slots: Vec<u32>) -> Vec<(u32, u32)> {
    slots.sort_unstable();
    let mut extents: Vec<(u32, u32)> = Vec::new();
    for slot in slots {
        match extents.last_mut() {
            Some((start, len)) if *start + *len == slot => *len += 1,
            _ => extents.push((slot, 1)),
        }
    }
    extents
}

impl Layer {
    /// Does it keep its history?
    pub fn keeps_history(&self) -> bool {
        self.keeps.load(SeqCst)
    }
    /// The number of its last durable commit.
    pub fn point(&self) -> u64 {
        self.commit.lock().next_commit.saturating_sub(1)
    }
    /// Keeps point `number` as long as the result lives; [`Kind::NotFound`] if it is gone already.
    pub fn hold(&self, number: u64) -> Result<Arc<Hold>> {
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let (oldest, next) = (commit.history.oldest.0, commit.next_commit);
        if commit.history.keep.is_none() || !(oldest..next).contains(&number) {
            return Err(
                Error::new(Kind::NotFound, format!("there is no point #{number}"))
                    .layer(self.id)
                    .hint("`forkdisk ls --history` lists the points"),
            );
        }
        Ok(commit.history.holds.add(number))
    }
    /// Slots that its history occupies.
    pub fn history_slots(&self) -> u64 {
        self.past.load(SeqCst)
    }
    /// What of its history is in layers below, and how much of that may stay.
    pub fn lower_part(&self) -> Option<(Arc<dyn Lower>, Stays)> {
        let lower = self.lower()?;
        let commit = self.commit.lock();
        let room = self.history_room(&commit.history);
        Some((lower, commit.history.stays_below(room)?))
    }
    /// What of its history is in layers below.
    pub fn lower(&self) -> Option<Arc<dyn Lower>> {
        self.lower.lock().clone()
    }
    /// Keeps so much of its past from now on; `None`: nothing, and what was kept goes.
    pub fn set_keep(&self, keep: Option<Keep>) -> Result<()> {
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let on = keep.is_some();
        if on && commit.history.keep.is_none() {
            let now = keep.as_ref().map_or(0, |k| (k.clock)());
            commit.history.oldest = (commit.next_commit.saturating_sub(1), now);
        }
        let lower = keep.as_ref().and_then(|keep| keep.lower.clone());
        let before = std::mem::replace(&mut commit.history.keep, keep);
        // Before the first commit that tells what it replaced: whoever does not know such commits must not open the layer.
        if let Err(e) = self.checkpoint(&mut commit, State::Writable) {
            commit.history.keep = before;
            return Err(e);
        }
        *self.lower.lock() = lower;
        self.keeps.store(on, SeqCst);
        Ok(())
    }
    /// The host disk is full: the older half of the history goes, or the little that is left; says whether there was any.
    pub(super) fn yield_history(&self) -> Result<bool> {
        // What is in layers below is older.
        if let Some(lower) = self.lower()
            && lower.yield_oldest()
        {
            return Ok(true);
        }
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let c = &mut *commit;
        if c.history.slots() == 0 {
            return Ok(false);
        }
        let held = c.history.bytes();
        // What stays takes room itself, for what tells of it.
        for part in [held / 2, held] {
            let mut given = 0;
            let mut oldest = c.history.oldest;
            for gone in c.history.parts() {
                if given > part && held - given >= WORTH {
                    break;
                }
                oldest = oldest.max((gone.number, gone.time));
                given += gone.bytes;
            }
            tracing::warn!(layer = %self.id, "the host disk is full: {given} bytes of the history go");
            c.history.oldest = oldest;
            match self.checkpoint(c, State::Writable) {
                Err(e) if e.kind() == Kind::NoSpace => {}
                done => return done.map(|()| true),
            }
        }
        Ok(false)
    }
    /// Lets go of what is too old or too much, if that is worth a checkpoint.
    pub(super) fn expire(&self) -> Result<()> {
        if !self.keeps.load(SeqCst) {
            return Ok(());
        }
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let room = self.history_room(&commit.history);
        if commit.history.due(room) {
            match self.checkpoint(&mut commit, State::Writable) {
                Err(e) if e.kind() == Kind::NoSpace => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// What the next superblock will say of the history: writes what stays of the journal's as segments, which are not durable yet.
    /// Where there is no room for that, the history goes.
    pub(super) fn turn_history(&self, c: &Commit) -> Result<Turn> {
        let h = &c.history;
        let last = c.next_commit.saturating_sub(1);
        let room = self.history_room(h);
        let (mut oldest, now) = match &h.keep {
            Some(keep) => (h.expired(room).0, (keep.clock)()),
            None => ((last, 0), 0),
        };
        let stays = h.journal.iter().filter(|s| s.sequence > oldest.0);
        let steps: Vec<Step> = stays.cloned().collect();
        let previous = h.segments.back().filter(|s| s.commits.1 > oldest.0);
        let previous = previous.map_or((0, 0), |s| (s.slot, s.slots));
        let mut new = Vec::new();
        if !steps.is_empty() {
            match self.write_segments(&h.divided(&steps, room), previous) {
                Ok(segments) => new = segments,
                Err(e) if e.kind() == Kind::NoSpace => {
                    tracing::warn!(layer = %self.id, "there is no room for the history, it begins anew: {e}");
                    oldest = (last, now);
                }
                Err(e) => return Err(e),
            }
        }
        let mut turn = Turn {
            oldest,
            segments: h.segments.clone(),
            held: 0,
            own: new.first().map(|first| {
                let slots = new.iter().map(|s| s.slots).sum();
                (first.slot, slots)
            }),
            freed: Vec::new(),
            lost: h.lost,
        };
        let mut freed: Vec<u32> = Vec::new();
        while let Some(gone) = turn.segments.pop_front_if(|s| s.commits.1 <= oldest.0) {
            freed.extend(gone.slot..gone.slot + gone.slots);
            match read_segment(&*self.file, &self.id, &gone) {
                Ok(steps) => freed.extend(steps.iter().flat_map(Step::slots)),
                Err(e) => {
                    tracing::warn!(layer = %self.id, "{} bytes stay allocated: {e}", gone.blocks * BLOCK);
                    turn.lost += gone.blocks;
                }
            }
        }
        let gone = h.journal.iter().filter(|s| s.sequence <= oldest.0);
        freed.extend(gone.flat_map(Step::slots));
        turn.segments.extend(new);
        turn.held = turn.segments.iter().map(|s| s.blocks).sum();
        turn.freed = extents(freed);
        Ok(turn)
    }
    /// Writes a segment for each part of neighbouring commits, side by side.
    fn write_segments(&self, parts: &[&[Step]], previous: (u32, u32)) -> Result<Vec<Segment>> {
        let slots = parts.iter().map(|part| SegmentHeader::slots_of(part)).sum();
        let start = {
            let mut space = self.space.lock();
            space.settle(&self.quiesce);
            space.contiguous(slots)?.0
        };
        let mut bytes = Vec::with_capacity(slots as usize * BLOCK_SIZE);
        let mut segments = Vec::with_capacity(parts.len());
        let mut before = previous;
        let mut slot = start;
        for part in parts {
            let slots = SegmentHeader::slots_of(part);
            bytes.extend(SegmentHeader::encode(&self.id, part, before));
            let ends = |step: Option<&Step>| step.map_or((0, 0), |s| (s.sequence, s.time));
            let (first, last) = (ends(part.first()), ends(part.last()));
            segments.push(Segment {
                slot,
                slots,
                commits: (first.0, last.0),
                first_time: first.1,
                last_time: last.1,
                blocks: part.iter().map(|s| s.slots().count() as u64).sum(),
            });
            before = (slot, slots);
            slot += slots;
        }
        if let Err(e) = self.file.write_at(&bytes, Slot(start).at()) {
            self.unused(start, slots);
            return Err(e);
        }
        Ok(segments)
    }
}

impl Turn {
    /// Says so in the superblock.
    pub fn describe(&self, superblock: &mut Superblock, kept: bool) {
        let newest = self.segments.back().map_or((0, 0), |s| (s.slot, s.slots));
        let (oldest, blocks) = match kept {
            true => (self.oldest, self.held + own_slots(&self.segments)),
            false => ((0, 0), 0),
        };
        superblock.set_history(kept);
        superblock.history_slot = U32::new(newest.0);
        superblock.history_slots = U32::new(newest.1);
        superblock.history_oldest = U64::new(oldest.0);
        superblock.history_time = U64::new(oldest.1);
        superblock.history_blocks = U64::new(blocks);
    }
    /// The superblock is durable: it is so.
    pub fn done(self, history: &mut History) {
        *history = History {
            holds: std::mem::take(&mut history.holds),
            keep: history.keep.take(),
            oldest: self.oldest,
            own: own_slots(&self.segments),
            segments: self.segments,
            journal: Vec::new(),
            held: self.held,
            noted: 0,
            lost: 0,
        };
    }
}

/// What the blocks of a region that becomes zero were, if that is noted: those whose bit is not set in `noted`.
pub(super) fn note_region(
    list: &mut Option<Vec<CommitEntry>>,
    region: Region,
    map: Option<(&RegionMap, &[u64; WORDS])>,
) {
    let Some(list) = list else {
        return;
    };
    match map {
        Some((map, noted)) => undo::push_map(list, region, map, noted),
        None => undo::push(list, region.first(), REGION_BLOCKS as u32, Pointer::Absent),
    }
}
