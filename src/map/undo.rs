//! What a map said of blocks before they were changed: of each block the first word counts.

use super::{RegionMap, WORDS};
use crate::format::{CommitEntry, Pointer};
use crate::units::{Lba, REGION_BLOCKS, Region};
use std::collections::BTreeMap;

/// An entry is at most this long: a range of 2^32 blocks does not fit into 32 bits.
const LONGEST: u64 = 1 << 31;

/// Blocks, and what the map said of them first.
///
/// Always true: the ranges are disjoint; a range of data is one block.
#[derive(Clone, Debug, Default)]
pub struct Undo(BTreeMap<u64, (u64, Pointer)>);

impl Undo {
    /// Adds what `entry` says of those of its blocks of which nothing is known yet.
    pub fn add(&mut self, entry: &CommitEntry) {
        let (lba, count, pointer) = entry.get();
        let (mut at, end) = (u64::from(lba.0), u64::from(lba.0) + u64::from(count));
        if let Some((_, &(until, _))) = self.0.range(..=at).next_back() {
            at = at.max(until);
        }
        while at < end {
            let next = self.0.range(at..end).next().map(|(&s, &(e, _))| (s, e));
            let (gap_end, on) = next.unwrap_or((end, end));
            if at < gap_end {
                self.0.insert(at, (gap_end, pointer));
            }
            at = on;
        }
    }
    /// The ranges in order: first block, the one after the last, what was said of them.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, Pointer)> + '_ {
        self.0.iter().map(|(&start, &(end, p))| (start, end, p))
    }
    /// The ranges between `start` and `end`, cut to fit.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, Pointer)> + '_ {
        let first = self.0.range(..=start).next_back();
        let first = first.map_or(start, |(&s, _)| s);
        self.0
            .range(first..end)
            .map(move |(&s, &(e, p))| (s.max(start), e.min(end), p))
            .filter(|(s, e, _)| s < e)
    }
    /// The blocks from `start` to before `end` of which it says nothing, as ranges in order.
    pub fn gaps(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = start;
        if let Some((_, &(until, _))) = self.0.range(..=at).next_back() {
            at = at.max(until);
        }
        for (&s, &(e, _)) in self.0.range(at..end.max(at)) {
            if at < s {
                gaps.push((at, s));
            }
            at = e;
        }
        if at < end {
            gaps.push((at, end));
        }
        gaps
    }
    /// Number of blocks of which it says something.
    pub fn blocks(&self) -> u64 {
        self.0.iter().map(|(start, (end, _))| end - start).sum()
    }
}

/// Appends what was said of `count` blocks from `lba` on; zeros, or what is absent, lengthen a last entry of their kind.
pub fn push(list: &mut Vec<CommitEntry>, lba: Lba, count: u32, pointer: Pointer) {
    if !matches!(pointer, Pointer::Data { .. })
        && let Some(last) = list.last_mut()
        && let (start, len, before) = last.get()
        && before == pointer
        && u64::from(start.0) + u64::from(len) == u64::from(lba.0)
        && u64::from(len) + u64::from(count) <= LONGEST
    {
        *last = CommitEntry::new(start, len + count, pointer);
        return;
    }
    list.push(CommitEntry::new(lba, count, pointer));
}

/// Appends the same word of all blocks of the regions from `from` to before `to`.
pub fn push_regions(list: &mut Vec<CommitEntry>, from: u32, to: u32, pointer: Pointer) {
    let mut at = from;
    while at < to {
        let n = (to - at).min((LONGEST / REGION_BLOCKS as u64) as u32);
        push(list, Region(at).first(), n * REGION_BLOCKS as u32, pointer);
        at += n;
    }
}

/// Appends what `map` says of the blocks of a region, but of those whose bit is set in `without`.
pub fn push_map(
    list: &mut Vec<CommitEntry>,
    region: Region,
    map: &RegionMap,
    without: &[u64; WORDS],
) {
    let mut pointers = [Pointer::Absent; REGION_BLOCKS];
    map.get_all(0, &mut pointers);
    for (index, pointer) in pointers.into_iter().enumerate() {
        if without[index / 64] >> (index % 64) & 1 == 0 {
            push(list, region.lba(index), 1, pointer);
        }
    }
}

/// In rising order, without overlaps: where several entries speak of a block, the first one counts.
pub fn in_order(mut entries: Vec<CommitEntry>) -> Vec<CommitEntry> {
    let end = |e: &CommitEntry| u64::from(e.lba.get()) + u64::from(e.get().1);
    // Nearly always a block is in one entry.
    let mut sorted = entries.clone();
    sorted.sort_by_key(|e| e.lba.get());
    if sorted
        .windows(2)
        .any(|w| end(&w[0]) > w[1].lba.get().into())
    {
        let mut undo = Undo::default();
        entries.iter().for_each(|e| undo.add(e));
        entries.clear();
        for (start, end, pointer) in undo.iter() {
            let mut at = start;
            while at < end {
                let n = (end - at).min(LONGEST);
                push(&mut entries, Lba(at as u32), n as u32, pointer);
                at += n;
            }
        }
        return entries;
    }
    entries.clear();
    for entry in sorted {
        let (lba, count, pointer) = entry.get();
        push(&mut entries, lba, count, pointer);
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Slot;

    fn entry(lba: u32, count: u32, pointer: Pointer) -> CommitEntry {
        CommitEntry::new(Lba(lba), count, pointer)
    }

    #[test]
    fn the_first_word_counts() {
        let data = |slot| Pointer::Data {
            slot: Slot(slot),
            sum: slot,
        };
        let mut rng = 12345u64;
        let mut below = |n: u64| {
            rng = rng
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (rng >> 33) % n
        };
        for _ in 0..300 {
            let mut entries = Vec::new();
            let mut model = vec![None; 64];
            for i in 0..below(12) + 1 {
                let (lba, pointer) = (below(60) as u32, below(3));
                let count = if pointer == 0 {
                    1
                } else {
                    1 + below(64 - u64::from(lba)) as u32
                };
                let pointer =
                    [data(2000 + i as u32), Pointer::Zero, Pointer::Absent][pointer as usize];
                push(&mut entries, Lba(lba), count, pointer);
                for block in &mut model[lba as usize..(lba + count) as usize] {
                    block.get_or_insert(pointer);
                }
            }
            let mut undo = Undo::default();
            entries.iter().for_each(|e| undo.add(e));
            assert_eq!(undo.blocks(), model.iter().flatten().count() as u64);
            for (start, end) in undo.gaps(3, 61) {
                assert!(
                    model[start as usize..end as usize]
                        .iter()
                        .all(Option::is_none)
                );
            }
            let mut inside = vec![None; 64];
            for (start, end, pointer) in undo.within(3, 61) {
                inside[start as usize..end as usize].fill(Some(pointer));
            }
            assert_eq!(inside[3..61], model[3..61]);
            let mut found = vec![None; 64];
            let mut next = 0;
            for e in in_order(entries) {
                let (lba, count, pointer) = e.get();
                assert!(lba.0 >= next && count > 0);
                next = lba.0 + count;
                found[lba.0 as usize..next as usize].fill(Some(pointer));
            }
            assert_eq!(found, model);
        }
        assert_eq!(
            entry(3, 7, Pointer::Absent).get(),
            (Lba(3), 7, Pointer::Absent)
        );
    }
}
