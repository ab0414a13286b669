//! Free slots of a writable layer.

use super::quiesce::Quiesce;
use crate::error::{Error, Kind, Result};
use crate::format::{DATA_START, JOURNAL_SLOTS, MAX_FREE_EXTENTS, SLOT_ZERO};
use std::collections::{BTreeMap, VecDeque};

/// A set of slots as disjoint, joined extents.
#[derive(Clone, Debug, Default)]
pub struct FreeSet {
    extents: BTreeMap<u32, u32>,
    total: u64,
}

/// Extents in order, of which the first few take no memory of their own: nearly always they are all.
#[derive(Default)]
pub struct Extents {
    few: [(u32, u32); FEW],
    /// How many of `few` count.
    len: usize,
    rest: Vec<(u32, u32)>,
}

/// Extents that need no memory of their own.
pub const FEW: usize = 8;

impl Extents {
    /// Adds one at the end; if it continues the last one, that becomes longer.
    pub fn push(&mut self, start: u32, len: u32) {
        let few = self.few.get_mut(..self.len).unwrap_or_default();
        let last = self.rest.last_mut().or(few.last_mut());
        match last {
            Some((s, l)) if *s + *l == start => *l += len,
            _ => match self.few.get_mut(self.len) {
                Some(free) => {
                    *free = (start, len);
                    self.len += 1;
                }
                None => self.rest.push((start, len)),
            },
        }
    }
    /// The first one.
    pub fn first(&self) -> Option<(u32, u32)> {
        self.iter().next()
    }
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.few.iter().take(self.len).chain(&self.rest).copied()
    }
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Free slots with host blocks that no data is put into: the run that empties the journal needs them on a full disk.
pub const SPARE: u64 = 8;

/// An epoch that may need so many slots of the journal is committed by whoever has answered a write, and one of a sixteenth of them if the journal ends
/// behind three quarters with it: those who write and never flush would all wait for it when the journal is full.
const FILLING: u32 = JOURNAL_SLOTS * 3 / 8;

/// How many extents a search for neighbouring slots looks at before it gives up.
const SEARCH: usize = 64;

impl FreeSet {
    /// Slots in it.
    pub fn total(&self) -> u64 {
        self.total
    }
    /// Number of extents.
    pub fn extents(&self) -> usize {
        self.extents.len()
    }
    /// Adds slots that are not in it.
    pub fn insert(&mut self, start: u32, len: u32) {
        if len == 0 {
            return;
        }
        self.total += u64::from(len);
        let (mut start, mut len) = (start, len);
        if let Some((&s, &l)) = self.extents.range(..start).next_back()
            && s + l == start
        {
            self.extents.remove(&s);
            start = s;
            len += l;
        }
        if let Some(&l) = self.extents.get(&(start + len)) {
            self.extents.remove(&(start + len));
            len += l;
        }
        self.extents.insert(start, len);
    }
    /// Takes `start..start+len` out, as far as it is in.
    pub fn remove(&mut self, start: u32, len: u32) {
        let end = start + len;
        if let Some((&s, &l)) = self.extents.range(..start).next_back()
            && s + l > start
        {
            self.extents.insert(s, start - s);
            self.total -= u64::from((s + l).min(end) - start);
            if s + l > end {
                self.extents.insert(end, s + l - end);
            }
        }
        while let Some((&s, &l)) = self.extents.range(start..end).next() {
            self.extents.remove(&s);
            self.total -= u64::from((s + l).min(end) - s);
            if s + l > end {
                self.extents.insert(end, s + l - end);
            }
        }
    }
    /// Takes `n` neighbouring slots, if a short search finds them.
    pub fn take(&mut self, n: u32) -> Option<u32> {
        let (&start, &len) = self.extents.iter().take(SEARCH).find(|(_, l)| **l >= n)?;
        self.extents.remove(&start);
        if len > n {
            self.extents.insert(start + n, len - n);
        }
        self.total -= u64::from(n);
        Some(start)
    }
    /// Takes up to `n` neighbouring slots.
    pub fn take_some(&mut self, n: u32) -> Option<(u32, u32)> {
        let (start, len) = self.extents.pop_first()?;
        let n = n.min(len);
        if len > n {
            self.extents.insert(start + n, len - n);
        }
        self.total -= u64::from(n);
        Some((start, n))
    }
    /// Takes these slots; says whether all of them were in it, else it takes none.
    pub fn take_this(&mut self, start: u32, len: u32) -> bool {
        let before = self.extents.range(..=start).next_back();
        let all = before.is_some_and(|(&s, &l)| s + l >= start + len);
        if all {
            self.remove(start, len);
        }
        all
    }
    /// The extents in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.extents.iter().map(|(&s, &l)| (s, l))
    }
    /// Forgets extents until at most the limit is left; returns the number of slots forgotten.
    pub fn limit(&mut self) -> u64 {
        let before = self.total;
        while self.extents.len() > MAX_FREE_EXTENTS {
            self.extents
                .pop_last()
                .inspect(|&(_, l)| self.total -= u64::from(l));
        }
        before - self.total
    }
}

/// Where the next slots come from, and where freed ones wait.
#[derive(Default)]
pub struct Space {
    /// No slot from here on was ever handed out.
    pub high: u64,
    /// Free, with host blocks still behind them: the first choice, for rewriting written blocks is cheapest.
    pub hot: FreeSet,
    /// Free, without host blocks.
    pub cold: FreeSet,
    /// Free, and not given back to the host yet by the process before us: not in use before that is done.
    pub inherited: Vec<(u32, u32)>,
    /// Epoch and extent: unpublished in that epoch; readers may still know them.
    waiting: VecDeque<(u64, (u32, u32))>,
    /// Journal entries that accepted and running writes of the open epoch may need.
    pub entries: u64,
    /// Journal slots in use by durable commits, and by the one being written.
    pub journal_head: u32,
    /// See `journal_head`.
    pub committing: u32,
    /// Journal slots that have host space.
    pub journal_reserved: u32,
    /// [`SPARE`] slots were kept, as far as there was room.
    pub spare: bool,
    /// Free slots side by side, with host blocks, for the run that empties the journal of a disk that keeps a history; start and number.
    pub reserve: (u32, u32),
    /// The most slots that were ever needed of it.
    pub reserve_needed: u32,
}

impl Space {
    /// An empty layer's space.
    pub fn new(high: u64) -> Space {
        Space {
            high: high.max(u64::from(DATA_START)),
            ..Space::default()
        }
    }
    /// Is the open epoch, which may need so many slots of the journal, to be committed though nobody flushes?
    pub fn fills(&self, slots: u32) -> bool {
        let end = self.journal_head + self.committing + slots;
        slots > FILLING || slots > FILLING / 6 && end > 2 * FILLING
    }
    /// Makes extents free once no reader can know them.
    pub fn retire(&mut self, epoch: u64, extents: impl IntoIterator<Item = (u32, u32)>) {
        self.waiting
            .extend(extents.into_iter().map(|extent| (epoch, extent)));
    }
    /// Moves what no reader can know any more to the free slots.
    pub fn settle(&mut self, quiesce: &Quiesce) {
        if self.waiting.is_empty() {
            return;
        }
        let now = quiesce.advance();
        while let Some(&(epoch, (start, len))) = self.waiting.front()
            && epoch + 2 <= now
        {
            self.waiting.pop_front();
            self.hot.insert(start, len);
        }
    }
    /// `n` slots side by side; says whether they have host blocks.
    pub fn contiguous(&mut self, n: u32) -> Result<(u32, bool)> {
        let hot = self.hot.take(n).map(|start| (start, true));
        hot.or_else(|| self.fresh(n).map(|start| (start, false)))
            .ok_or_else(Self::full)
    }
    /// `n` slots side by side without host blocks.
    pub fn fresh(&mut self, n: u32) -> Option<u32> {
        if let Some(start) = self.cold.take(n) {
            return Some(start);
        }
        let start = self.high;
        (start + u64::from(n) <= u64::from(SLOT_ZERO)).then(|| {
            self.high += u64::from(n);
            start as u32
        })
    }
    /// `n` slots, side by side where that is cheap. `written`: those with host blocks are worth more than that, if it is few slots that are needed.
    pub fn alloc(&mut self, n: u32, quiesce: &Quiesce, written: bool) -> Result<Extents> {
        self.settle(quiesce);
        // The last ones with host blocks are for emptying the journal.
        let hot = self.hot.total() >= SPARE + u64::from(n);
        let mut found = None;
        if n == 1 {
            let one = if hot { self.hot.take_some(1) } else { None };
            found = one.or_else(|| self.cold.take_some(1)).map(|(s, _)| s);
        } else if hot {
            found = self.hot.take(n);
        }
        let mut got = Extents::default();
        let mut left = n;
        if found.is_none() && hot && written && n as usize <= FEW {
            while left > 0
                && let Some((start, len)) = self.hot.take_some(left)
            {
                got.push(start, len);
                left -= len;
            }
            return Ok(got);
        }
        if let Some(start) = found.or_else(|| self.fresh(n)) {
            got.push(start, n);
            return Ok(got);
        }
        // The file is at its largest: gather what is left.
        while left > 0 {
            match self
                .hot
                .take_some(left)
                .or_else(|| self.cold.take_some(left))
            {
                Some((start, len)) => {
                    got.push(start, len);
                    left -= len;
                }
                None => {
                    for (start, len) in got.iter() {
                        self.hot.insert(start, len);
                    }
                    return Err(Self::full());
                }
            }
        }
        Ok(got)
    }
    fn full() -> Error {
        Error::new(Kind::NoSpace, "the layer has used all of its 2^32 slots").hint(
            "take a snapshot: the disk goes on in a new layer; or discard unused blocks (`fstrim`)",
        )
    }
}
