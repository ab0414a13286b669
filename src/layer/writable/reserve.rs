//! Host space for the block map of a disk that keeps a history.
//!
//! What such a disk replaces is held, so a full host disk leaves it no free slots; and to give up some of the history takes a checkpoint, which
//! writes what the journal holds as a run. Always true: the reserve is free slots side by side with host blocks, which nothing but such a run takes.

use super::{Layer, Space};
use crate::error::{Kind, Result};
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::{BLOCK, Slot, blocks};

/// Slots in reserve at most (16 MiB): more than the map of a full journal takes, unless nearly each entry is in a region of its own.
const MOST: u32 = 4096;

impl Space {
    /// `n` slots of the reserve; the rest of it is free for anything then.
    pub(super) fn take_reserve(&mut self, n: u32) -> Option<u32> {
        if self.reserve.1 < n {
            return None;
        }
        let (start, len) = std::mem::take(&mut self.reserve);
        self.hot.insert(start + n, len - n);
        Some(start)
    }
}

impl Layer {
    /// After a flush: sees to it that the reserve suffices for what the journal holds, and as much again. Where the host has no room for that the
    /// journal is emptied, as long as what is there suffices.
    pub(super) fn keep_reserve(&self) -> Result<()> {
        if !self.keeps.load(SeqCst) {
            let mut space = self.space.lock();
            let (start, len) = std::mem::take(&mut space.reserve);
            space.hot.insert(start, len);
            return Ok(());
        }
        let needed = blocks(self.commit.lock().memtable.run_len()).min(u64::from(MOST)) as u32;
        match self.enlarge_reserve(needed) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == Kind::NoSpace => self.checkpoint_if_room(),
            // The flush before it was good, whatever became of this.
            Err(e) => {
                tracing::debug!(layer = %self.id, "nothing is in reserve: {e}");
                Ok(())
            }
        }
    }

    /// Room was made, and a reserve that was used for that is there again before others take what there is.
    pub(super) fn reserve_anew(&self) {
        let needed = self.space.lock().reserve_needed;
        if self.keeps.load(SeqCst)
            && needed > 0
            && let Err(e) = self.enlarge_reserve(needed)
        {
            tracing::debug!(layer = %self.id, "nothing is in reserve: {e}");
        }
    }

    fn enlarge_reserve(&self, needed: u32) -> Result<()> {
        // Held all the time: nobody takes slots behind these before the file is that long.
        let mut space = self.space.lock();
        space.reserve_needed = space.reserve_needed.max(needed);
        if needed <= space.reserve.1 {
            return Ok(());
        }
        let slots = (2 * needed).next_power_of_two().min(MOST);
        let Some(start) = space.fresh(slots) else {
            return Ok(());
        };
        let (at, bytes) = (Slot(start).at(), u64::from(slots) * BLOCK);
        // Within the file's length, or a host filesystem might keep the space when the file is cut.
        let done = self.file.len().and_then(|len| {
            if len < at + bytes {
                self.file.set_len(at + bytes)?;
            }
            self.file.allocate(at, bytes)
        });
        if let Err(e) = done {
            let _ = self.punch(start, slots);
            space.cold.insert(start, slots);
            return Err(e);
        }
        let (former, len) = std::mem::replace(&mut space.reserve, (start, slots));
        space.hot.insert(former, len);
        Ok(())
    }
}
