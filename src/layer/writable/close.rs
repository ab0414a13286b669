//! The end of a layer that is open for writing: a clean close, or a seal.

use super::{Layer, State};
use crate::error::{Error, Kind, Result};
use crate::format::{JOURNAL_SLOTS, JOURNAL_START};
use crate::units::{BLOCK, Slot};
use std::sync::atomic::Ordering::SeqCst;
use zerocopy::little_endian::U32;

/// So many pieces of the file are given back at once, whoever waits: some milliseconds at most.
const AT_ONCE: usize = 4;

impl Layer {
    /// Ends writing: flush, checkpoint, freed space given back, state clean or sealed in both copies. No other call may be under way. On a
    /// full host disk the layer stays as recovery can take it up; nothing is lost.
    pub fn close(&self, state: State, name: Option<&str>) -> Result<()> {
        self.close_how(state, name, false).map(drop)
    }
    /// Seals it while its users wait: what is not in use keeps its host space if it is in many pieces, of which thousands would take seconds. Returns these slots: whoever
    /// called gives them back later ([`prune::give_back`](crate::layer::prune::give_back)); the superblock says that there are some.
    pub fn seal_at_once(&self, name: Option<&str>) -> Result<Vec<(u32, u32)>> {
        self.close_how(State::Sealed, name, true)
    }
    /// Does the host have so much room that nobody misses these slots for a while?
    fn host_can_wait(&self, slots: &[(u32, u32)]) -> bool {
        let bytes: u64 = slots.iter().map(|&(_, n)| u64::from(n) * BLOCK).sum();
        let room = self.file.host_room();
        room.is_none_or(|(free, all)| free >= all / 10 && free >= bytes * 8)
    }
    fn close_how(&self, state: State, name: Option<&str>, later: bool) -> Result<Vec<(u32, u32)>> {
        self.flush()?;
        let mut commit = self.commit.lock();
        let c = &mut *commit;
        self.check_poison()?;
        self.finish_first(c)?;
        if c.head > 0 {
            self.checkpoint(c, State::Writable)?;
        }
        // Copy 2 of that checkpoint, before anything it could be needed for is destroyed.
        if c.second_pending {
            self.sync(c)?;
        }
        let (hot, reserved) = {
            let mut space = self.space.lock();
            for _ in 0..3 {
                space.settle(&self.quiesce);
            }
            let hot = std::iter::from_fn(|| space.hot.take_some(u32::MAX)).collect::<Vec<_>>();
            let inherited = std::mem::take(&mut space.inherited);
            let reserve = Some(std::mem::take(&mut space.reserve)).filter(|r| r.1 > 0);
            (
                [hot, inherited, reserve.into_iter().collect()].concat(),
                std::mem::take(&mut space.journal_reserved),
            )
        };
        // For a seal this is tidying only, and no reason to stop half-way.
        let tidied = |done: Result<()>| match done {
            Err(e) if e.kind() == Kind::NoSpace && state == State::Sealed => Ok(()),
            other => other,
        };
        // Slots past the committed high-water mark go with the tail below.
        let mut idle = hot;
        idle.retain(|&(start, _)| u64::from(start) < c.high);
        for (start, len) in &mut idle {
            *len = u64::from(*len).min(c.high - u64::from(*start)) as u32;
        }
        // Also what a writer before us left, when there was nothing to write since.
        if reserved > 0 || self.opened.recovered {
            idle.push((JOURNAL_START, JOURNAL_SLOTS));
        }
        if !later || idle.len() <= AT_ONCE || !self.host_can_wait(&idle) {
            for (start, len) in idle.drain(..) {
                tidied(self.punch(start, len))?;
            }
        }
        let end = Slot(c.high as u32).at();
        if self.file.len()? > end {
            self.file.set_len(end)?;
        }
        if let Some(name) = name {
            c.superblock.set_name(name);
        }
        let mut next = c.superblock;
        next.advance();
        next.state = U32::new(state.number());
        next.unpunched = U32::new(u32::from(!idle.is_empty()));
        self.host.note(&mut next);
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
        Ok(idle)
    }
}
