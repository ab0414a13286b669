//! The contents of one imaginary file: sparse, cheap to copy, and changed by [`Change`]s.
//!
//! Always true: a byte past `len` that is read by nobody may still be there (a disk has such bytes too);
//! [`Image::trim`] removes them. Blocks are shared between copies until one of them writes.

use crate::units::{BLOCK, BLOCK_SIZE};
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// What a power cut cannot split: it is old, new or garbage.
pub(super) const SECTOR: u64 = 512;

pub(super) type Block = Arc<[u8; BLOCK_SIZE]>;

/// One un-synced change of a file's contents, length or allocation.
#[derive(Clone)]
pub(super) enum Change {
    Write {
        at: u64,
        bytes: Arc<[u8]>,
    },
    /// `from` is the length that processes saw before.
    SetLen {
        from: u64,
        len: u64,
    },
    Punch {
        at: u64,
        len: u64,
    },
    Allocate {
        at: u64,
        len: u64,
    },
}

impl Change {
    /// The bytes it changes (not the allocation).
    pub(super) fn range(&self) -> Range<u64> {
        match *self {
            Change::Write { at, ref bytes } => at..at + bytes.len() as u64,
            // Space that was reserved beyond the old end is given back as well.
            Change::SetLen { from, len } if len < from => len..i64::MAX as u64,
            Change::SetLen { from, len } => from..len,
            Change::Punch { at, len } => at..at + len,
            Change::Allocate { at, .. } => at..at,
        }
    }
}

/// The sparse contents of a file.
#[derive(Clone, Default)]
pub(super) struct Image {
    pub(super) len: u64,
    /// Allocated blocks; `None` is reserved and was never written (an unwritten extent).
    cells: BTreeMap<u64, Option<Block>>,
}

impl Image {
    /// Fills `buf` from `at`, whatever the length: what is not there is zero.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) {
        for (block, inner, outer) in pieces(at, buf.len()) {
            match self.cells.get(&block) {
                Some(Some(data)) => buf[outer].copy_from_slice(&data[inner]),
                _ => buf[outer].fill(0),
            }
        }
    }
    /// Puts bytes in place; the length stays.
    pub(super) fn put(&mut self, bytes: &[u8], at: u64) {
        for (block, inner, outer) in pieces(at, bytes.len()) {
            let cell = self.cells.entry(block).or_default();
            let data = cell.get_or_insert_with(|| Arc::new([0; BLOCK_SIZE]));
            Arc::make_mut(data)[inner].copy_from_slice(&bytes[outer]);
        }
    }
    /// Makes bytes zeros in place; no block comes or goes.
    fn zero(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        for (block, cell) in self.cells.range_mut(touched(&range)) {
            if let Some(data) = cell {
                let inner = within(*block, &range);
                Arc::make_mut(data)[inner].fill(0);
            }
        }
    }
    /// Frees the whole blocks of a range and makes the rest of it zeros.
    pub(super) fn clear(&mut self, range: Range<u64>) {
        let whole = range.start.div_ceil(BLOCK)..range.end / BLOCK;
        if whole.start < whole.end {
            self.cells
                .extract_if(whole.clone(), |_, _| true)
                .for_each(drop);
            self.zero(range.start..whole.start * BLOCK);
            self.zero(whole.end * BLOCK..range.end);
        } else {
            self.zero(range);
        }
    }
    /// Sets the length; what is cut off is freed.
    pub(super) fn resize(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..len.next_multiple_of(BLOCK));
            self.cells.split_off(&len.div_ceil(BLOCK));
        }
        self.len = len;
    }
    /// Reserves the blocks of a range that are not there yet.
    pub(super) fn reserve(&mut self, range: Range<u64>) {
        for block in touched(&range) {
            self.cells.entry(block).or_default();
        }
    }
    /// Does what a change says, as the processes see it.
    pub(super) fn apply(&mut self, change: &Change) {
        match *change {
            Change::Write { at, ref bytes } => {
                self.put(bytes, at);
                self.len = self.len.max(at + bytes.len() as u64);
            }
            Change::SetLen { len, .. } => self.resize(len),
            Change::Punch { at, len } => self.clear(at..at + len),
            Change::Allocate { at, len } => self.reserve(at..at + len),
        }
    }
    /// Takes over what `other` holds in all sectors that the range touches.
    pub(super) fn copy_from(&mut self, other: &Image, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let range = range.start / SECTOR * SECTOR..range.end.next_multiple_of(SECTOR);
        let touched = touched(&range);
        let mut gone: Vec<u64> = self.cells.range(touched.clone()).map(|(b, _)| *b).collect();
        gone.retain(|block| !other.cells.contains_key(block));
        for block in gone {
            match within(block, &range) {
                all if all.len() == BLOCK_SIZE => drop(self.cells.remove(&block)),
                some => {
                    self.zero(block * BLOCK + some.start as u64..block * BLOCK + some.end as u64)
                }
            }
        }
        for (block, theirs) in other.cells.range(touched) {
            let inner = within(*block, &range);
            let mine = self.cells.entry(*block).or_default();
            match (theirs, mine) {
                (theirs, mine) if inner.len() == BLOCK_SIZE => *mine = theirs.clone(),
                (Some(theirs), mine) => {
                    let mine = mine.get_or_insert_with(|| Arc::new([0; BLOCK_SIZE]));
                    Arc::make_mut(mine)[inner.clone()].copy_from_slice(&theirs[inner]);
                }
                (None, Some(mine)) => Arc::make_mut(mine)[inner].fill(0),
                (None, None) => {}
            }
        }
    }
    /// Takes over what `other` holds in the whole blocks of a range that have data here. Which blocks are allocated is not looked up
    /// again.
    pub(super) fn reload(&mut self, other: &Image, range: Range<u64>) {
        for (block, cell) in self
            .cells
            .range_mut(range.start.div_ceil(BLOCK)..range.end / BLOCK)
        {
            if cell.is_some() {
                *cell = other.cells.get(block).cloned().flatten();
            }
        }
    }
    /// Removes what stands past the end. Reserved blocks may stand there.
    pub(super) fn trim(&mut self) {
        self.zero(self.len..self.len.next_multiple_of(BLOCK));
        let past = self.len.div_ceil(BLOCK)..;
        self.cells
            .extract_if(past, |_, cell| cell.is_some())
            .for_each(drop);
    }
    /// Number of allocated blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.cells.len() as u64
    }
    /// Is this block allocated?
    pub(super) fn has(&self, block: u64) -> bool {
        self.cells.contains_key(&block)
    }
    /// Does this block hold what was written, and not only space?
    pub(super) fn written(&self, block: u64) -> bool {
        self.cells.get(&block).is_some_and(Option::is_some)
    }
    /// The written blocks of a range, as byte ranges `(at, len)` cut to the range and to the length.
    pub(super) fn data(&self, range: Range<u64>) -> Vec<(u64, u64)> {
        let range = range.start..range.end.min(self.len);
        let mut found: Vec<(u64, u64)> = Vec::new();
        if range.is_empty() {
            return found;
        }
        for (block, cell) in self.cells.range(touched(&range)) {
            if cell.is_none() {
                continue;
            }
            let start = (block * BLOCK).max(range.start);
            let len = ((block + 1) * BLOCK).min(range.end) - start;
            match found.last_mut() {
                Some((at, n)) if *at + *n == start => *n += len,
                _ => found.push((start, len)),
            }
        }
        found
    }
    /// Some written block at or after a random place: what a disk may show where something else belongs.
    pub(super) fn any_block(&self, pick: u64) -> Option<Block> {
        let (last, _) = self.cells.last_key_value()?;
        let start = pick % (last + 1);
        self.cells.range(start..).find_map(|(_, cell)| cell.clone())
    }
}

/// Numbers of the blocks that a range of bytes touches.
pub(super) fn touched(range: &Range<u64>) -> Range<u64> {
    match range.is_empty() {
        true => 0..0,
        false => range.start / BLOCK..range.end.div_ceil(BLOCK),
    }
}

/// The part of `block` that a range covers, as offsets in the block.
fn within(block: u64, range: &Range<u64>) -> Range<usize> {
    let base = block * BLOCK;
    let start = range.start.max(base) - base;
    let end = range.end.min(base + BLOCK).max(base) - base;
    start as usize..end.max(start) as usize
}

/// Cuts `len` bytes from `at` at block borders: block, place in the block, place in the bytes.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = at + done as u64;
        let inner = (here % BLOCK) as usize;
        let n = (BLOCK_SIZE - inner).min(len - done);
        if n == 0 {
            return None;
        }
        let outer = done..done + n;
        done += n;
        Some((here / BLOCK, inner..inner + n, outer))
    })
}
