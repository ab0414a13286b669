//! What the layer takes from the host disk and gives back to it (FORMAT.md, section 4).
//!
//! Always true: what a flush will write is reserved before the data it is about is accepted, and [`SPARE`] slots are kept for the run that
//! empties the journal, so that a full host disk fails writes and nothing else.

use super::{
    AHEAD, Errand, FEW, HOT_SLOTS, IDLE_SLOTS, Layer, OFTEN, RESERVE_STEP, SPARE, Space, Taken,
};
use crate::error::{Kind, Result};
use crate::format::{JOURNAL_SLOTS, JOURNAL_START, commit_slots};
use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use crate::units::{BLOCK, BLOCK_SIZE, Slot};
use std::ops::Range;

/// So many blocks that wait to be given back (1 MiB) are worth a flush that nobody asked for.
const WORTH_A_FLUSH: u64 = 256;

/// Free slots side by side that are worth a hole at any time: 1 MiB.
pub(super) const LARGE_HOLE: u32 = 256;
/// So many smaller ones are made at a time under a disk that is written to: some milliseconds of each second.
const FEW_HOLES: usize = 128;

/// How much of what is free is worth holding up those who write and sync: random writes leave tens of thousands of small pieces.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Holes {
    /// All of it.
    All,
    /// All of it, as long as nobody writes.
    WhileQuiet,
    /// Large pieces, and [`FEW_HOLES`] small ones.
    Few,
    /// Large pieces.
    Large,
}

impl Layer {
    /// Host space for the record of what is about to be accepted: a full host disk must fail the write, not the flush.
    pub(super) fn reserve_journal(&self, space: &mut Space, end: u32) -> Result<()> {
        if end <= space.journal_reserved {
            return Ok(());
        }
        // After a takeover nobody knows what was kept.
        if space.journal_reserved == 0 || !space.spare {
            self.reserve_spare(space);
            space.spare = true;
        }
        // Each step makes one flush slow.
        let often = self.syncs_often();
        let step = if often { AHEAD.1 } else { RESERVE_STEP };
        let step = end.next_multiple_of(step).min(JOURNAL_SLOTS);
        // Never what may hold a record: of two writers who counted on one record, the slower may have been committed with one of its own, behind
        // what was reserved for both.
        let from = space
            .journal_reserved
            .max(space.journal_head + space.committing);
        let done = match self.reserve(from, step, often) {
            Err(e) if e.kind() == Kind::NoSpace && step > end => {
                self.reserve(from, end, often).map(|()| end)
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

    /// Reserves journal slots `from..to`, all or none. `often`: for many records.
    fn reserve(&self, from: u32, to: u32, often: bool) -> Result<()> {
        let (at, slots) = (Slot(JOURNAL_START + from).at(), to - from);
        let done = match self.file.allocate(at, u64::from(slots) * BLOCK) {
            // Enough for one record that is seldom so large.
            Ok(()) if slots > RESERVE_STEP && !often => Ok(()),
            Err(e) if e.kind() != Kind::Unsupported => Err(e),
            // Of space that is only reserved, each commit would make the filesystem note that it is written now, with a commit of its own.
            // And where the filesystem cannot reserve, zeros take the space as well.
            _ => self
                .file
                .write_at(&vec![0; slots as usize * BLOCK_SIZE], at),
        };
        if done.is_err() {
            // It may be done in part; on a full disk every block counts.
            let _ = self.punch(JOURNAL_START + from, slots);
        }
        done
    }

    /// Gives slots back that were written and never published.
    pub(super) fn give_back(&self, taken: Taken) {
        let mut space = self.space.lock();
        space.entries -= taken.entries;
        self.expected.fetch_sub(taken.logged, SeqCst);
        self.writers.fetch_sub(1, SeqCst);
        for (start, len) in taken.extents.iter() {
            space.hot.insert(start, len);
        }
    }

    /// Gives slots back that could not be written.
    pub fn not_written(&self, taken: Taken) {
        self.space.lock().entries -= taken.entries;
        self.expected.fetch_sub(taken.logged, SeqCst);
        self.writers.fetch_sub(1, SeqCst);
        for (start, len) in taken.extents.iter() {
            self.unused(start, len);
        }
    }

    /// Makes slots free that were written in part or not at all, without host blocks: on a full disk every block counts.
    pub(super) fn unused(&self, start: u32, len: u32) {
        // Whether it can be done changes nothing but the space it takes.
        let _ = self.punch(start, len);
        self.space.lock().cold.insert(start, len);
    }

    pub(super) fn punch(&self, start: u32, len: u32) -> Result<()> {
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

    /// Slots were written: sends them on their way, if they are enough, and waits where the writers are too far ahead of the disk.
    pub(super) fn write_back_early(&self, start: u32, len: u32) {
        let Some(Errand { send, wait }) = self.early.wrote(start, len) else {
            return;
        };
        let bytes = |r: &Range<u32>| (Slot(r.start).at(), u64::from(r.end - r.start) * BLOCK);
        let (at, len) = bytes(&send);
        self.file.start_writeback(at, len);
        if let Some(wait) = wait {
            let (at, len) = bytes(&wait);
            self.file.await_writeback(at, len);
        }
    }

    /// Does the disk sync so often that written host blocks matter more to it than neighbourhood?
    pub(super) fn syncs_often(&self) -> bool {
        self.often.load(Relaxed) || self.syncs.load(Relaxed) >= OFTEN
    }

    /// A disk that syncs often gets slots whose host blocks are written, before it needs them. After a flush, and only if there are not
    /// many left; where the host has no room it does without.
    pub(super) fn write_ahead(&self) {
        if !self.syncs_often() {
            return;
        }
        let slots = self.ahead.load(Relaxed);
        let start = {
            let mut space = self.space.lock();
            space.settle(&self.quiesce);
            if space.hot.total() >= SPARE + FEW as u64 + u64::from(slots) / 4 {
                return;
            }
            match space.fresh(slots) {
                Some(start) => start,
                None => return,
            }
        };
        let (at, bytes) = (Slot(start).at(), u64::from(slots) * BLOCK);
        let zeros = vec![0; bytes as usize];
        if let Err(e) = self.file.write_at(&zeros, at) {
            tracing::debug!(layer = %self.id, "no slots are written ahead: {e}");
            self.unused(start, slots);
            self.syncs.store(0, Relaxed);
            self.often.store(false, Relaxed);
            return;
        }
        // The next flush is not to wait for all of it; and there are others to be used first.
        self.file.start_writeback(at, bytes);
        self.ahead.store((slots * 2).min(AHEAD.1), Relaxed);
        self.space.lock().hot.insert(start, slots);
    }

    /// If more than `keep` free slots have host blocks, punches some out of the host file until at most so many have: large pieces first.
    pub(super) fn give_to_host(&self, keep: u64, holes: Holes) -> Result<()> {
        let taken = self.taken.load(Relaxed);
        let mut pieces: Vec<(u32, u32)> = {
            let mut space = self.space.lock();
            // What has just become free, unless somebody still reads it.
            for _ in 0..3 {
                space.settle(&self.quiesce);
            }
            if space.hot.total() <= keep {
                return Ok(());
            }
            let large = space.hot.iter().filter(|&(_, len)| len >= LARGE_HOLE);
            let small = space.hot.iter().filter(|&(_, len)| len < LARGE_HOLE);
            let few = if holes == Holes::Few {
                FEW_HOLES
            } else {
                usize::MAX
            };
            large.chain(small.take(few)).collect()
        };
        pieces.reverse();
        while let Some((start, len)) = pieces.pop() {
            let quiet = self.taken.load(Relaxed) == taken;
            if holes == Holes::WhileQuiet && len < LARGE_HOLE && !quiet {
                return Ok(());
            }
            let len = {
                let mut space = self.space.lock();
                let most = space.hot.total().saturating_sub(keep);
                let len = most.min(len.into()) as u32;
                // Somebody may have taken it, or a part of it, meanwhile.
                if len == 0 || !space.hot.take_this(start, len) {
                    continue;
                }
                len
            };
            let done = self.punch(start, len);
            self.space.lock().cold.insert(start, len);
            done?;
        }
        Ok(())
    }

    /// Gives the host what a predecessor left allocated of free slots, and takes these slots into use.
    fn punch_inherited(&self) -> Result<()> {
        loop {
            let Some((start, len)) = self.space.lock().inherited.pop() else {
                return Ok(());
            };
            let done = self.punch(start, len);
            self.space.lock().cold.insert(start, len);
            done?;
        }
    }

    /// What was discarded is given back when that is committed; and whoever trimmed a filesystem may not flush it for long. So a disk that has been
    /// quiet since the last time is flushed, if it is worth it.
    fn commit_discards(&self) -> Result<()> {
        let logged = self.logged.load(SeqCst);
        if self.quiet.swap(logged, Relaxed) != logged || logged == 0 || self.keeps.load(SeqCst) {
            return Ok(());
        }
        let freed: u64 = {
            let log = self.log.lock();
            log.counted.freed.iter().map(|&(_, n)| u64::from(n)).sum()
        };
        match freed >= WORTH_A_FLUSH {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Work that can wait: begins to write back what is dirty, and gives freed space back to the host. For a housekeeping thread,
    /// about once a second.
    pub fn maintain(&self) -> Result<()> {
        self.check_poison()?;
        self.note_written();
        self.punch_inherited()?;
        self.expire()?;
        self.commit_discards()?;
        let busy = self.busy.swap(false, Relaxed) || self.taken.load(Relaxed) > 0;
        if busy {
            // All of the file; what is clean costs nothing.
            self.file.start_writeback(0, self.file.len()?);
        }
        // A disk that has become quiet gives its pool back within seconds.
        let demand = self.demand.load(Relaxed);
        if self.taken.load(Relaxed) == 0 {
            self.demand.store(demand / 2, Relaxed);
        }
        let mut keep = HOT_SLOTS.max(demand);
        let syncs = self.syncs.swap(0, Relaxed);
        self.often.store(syncs >= OFTEN, Relaxed);
        if syncs == 0 && self.taken.load(Relaxed) == 0 {
            if self.idle.fetch_add(1, Relaxed) >= 2 && demand == 0 {
                self.ahead.store(AHEAD.0, Relaxed);
                keep = IDLE_SLOTS;
            }
        } else {
            self.idle.store(0, Relaxed);
        }
        let holes = if busy { Holes::Few } else { Holes::WhileQuiet };
        self.give_to_host(keep, holes)
    }

    /// The host disk is full: gives back all that this layer does not need, so that what it needs finds room. What its discards freed
    /// counts only once they are committed. Of its history a part goes; says whether there was any, so that it is worth another try.
    pub fn make_room(&self) -> Result<bool> {
        self.punch_inherited()?;
        self.flush()?;
        match self.checkpoint_now() {
            Err(e) if e.kind() == Kind::NoSpace => {}
            other => other?,
        }
        let yielded = match self.yield_history() {
            Err(e) if e.kind() == Kind::NoSpace => false,
            other => other?,
        };
        {
            // Nobody writes to the journal meanwhile.
            let mut commit = self.commit.lock();
            if commit.second_pending {
                // Copy 2 may still need what stands there.
                self.sync(&mut commit)?;
            }
            let mut space = self.space.lock();
            // What has just become free, unless somebody still reads it.
            for _ in 0..3 {
                space.settle(&self.quiesce);
            }
            let needed = commit.head + commit_slots(space.entries) + self.writers.load(SeqCst);
            let keep = needed.next_multiple_of(RESERVE_STEP);
            if keep < space.journal_reserved {
                self.punch(JOURNAL_START + keep, space.journal_reserved - keep)?;
                space.journal_reserved = keep;
            }
        }
        self.give_to_host(SPARE, Holes::All)?;
        // A filesystem with a journal of its own hands out what was freed when that is durable there, and not before.
        self.sync(&mut self.commit.lock())?;
        self.reserve_anew();
        Ok(yielded)
    }
}
