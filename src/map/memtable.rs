//! Changes in memory: regions with pointers, and ranges of regions that are zero.

use super::run::max_len;
use super::{Item, Items, RegionMap, merge};
use crate::format::{CommitEntry, Pointer};
use crate::units::{Lba, REGION_BLOCKS, Region};
use std::collections::BTreeMap;

/// Disjoint ranges of region numbers, each with a tag.
#[derive(Clone, Debug, Default)]
pub struct Ranges(BTreeMap<u32, (u32, u64)>);

impl Ranges {
    /// Adds `start..end` with `tag`, over whatever was there.
    pub fn insert(&mut self, start: u32, end: u32, tag: u64) {
        if start >= end {
            return;
        }
        self.remove(start, end);
        // Join with equal neighbours, so that a long discard in pieces stays one range.
        let mut start = start;
        let mut end = end;
        if let Some((&s, &(e, t))) = self.0.range(..start).next_back()
            && e == start
            && t == tag
        {
            start = s;
        }
        if let Some(&(e, t)) = self.0.get(&end)
            && t == tag
        {
            self.0.remove(&end);
            end = e;
        }
        self.0.insert(start, (end, tag));
    }
    fn remove(&mut self, start: u32, end: u32) {
        if let Some((&s, &(e, t))) = self.0.range(..start).next_back()
            && e > start
        {
            self.0.insert(s, (start, t));
            if e > end {
                self.0.insert(end, (e, t));
            }
        }
        while let Some((&s, &(e, t))) = self.0.range(start..end).next() {
            self.0.remove(&s);
            if e > end {
                self.0.insert(end, (e, t));
            }
        }
    }
    /// The tag of the range that holds `region`.
    pub fn get(&self, region: u32) -> Option<u64> {
        let (_, &(end, tag)) = self.0.range(..=region).next_back()?;
        (region < end).then_some(tag)
    }
    /// Drops all ranges with a tag of at most `tag`.
    pub fn forget_up_to(&mut self, tag: u64) {
        self.0.retain(|_, (_, t)| *t > tag);
    }
    /// The ranges in order: start, end.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().map(|(&s, &(e, _))| (s, e))
    }
    /// The ranges in order that end after `region`.
    pub fn iter_from(&self, region: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let first = self.0.range(..=region).next_back();
        let first = first.filter(|(_, (e, _))| *e > region).map(|(&s, _)| s);
        self.0
            .range(first.unwrap_or(region)..)
            .map(|(&s, &(e, _))| (s, e))
    }
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Changes of a block map, in memory.
///
/// Always true: a region inside a zero range that also has a map of its own has `fill` set there.
#[derive(Clone, Debug, Default)]
pub struct Memtable {
    regions: BTreeMap<u32, RegionMap>,
    zeros: Ranges,
    /// Entries applied since it was empty: what a record of it could need at most.
    applied: u64,
}

impl Memtable {
    /// An empty table.
    pub fn new() -> Memtable {
        Memtable::default()
    }
    /// Number of entries applied, superseded ones included.
    pub fn applied(&self) -> u64 {
        self.applied
    }
    /// Number of regions that have a map of their own here.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }
    /// Does it say nothing?
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty() && self.zeros.is_empty()
    }
    /// The most bytes that a run of it alone can take.
    pub fn run_len(&self) -> u64 {
        let regions = self.regions.len() as u64;
        let pointers = self.applied.min(regions * REGION_BLOCKS as u64);
        max_len(regions, pointers, self.zeros.iter().count() as u64)
    }
    /// Sets `count` blocks from `lba` to `pointer` (`count` is 1 unless it is zero).
    pub fn apply(&mut self, lba: Lba, count: u32, pointer: Pointer) {
        self.applied += 1;
        let mut at = u64::from(lba.0);
        let end = at + u64::from(count);
        while at < end {
            let first = Lba(at as u32);
            let (region, index) = (first.region().0, first.index());
            let whole = if index == 0 && pointer == Pointer::Zero {
                (end - at) / REGION_BLOCKS as u64
            } else {
                0
            };
            if whole > 0 {
                let last = (u64::from(region) + whole) as u32;
                let covered: Vec<u32> = self.regions.range(region..last).map(|(&r, _)| r).collect();
                for r in covered {
                    self.regions.remove(&r);
                }
                self.zeros.insert(region, last, 0);
                at += whole * REGION_BLOCKS as u64;
                continue;
            }
            let inside = self.zeros.get(region).is_some();
            let map = self.regions.entry(region).or_insert_with(|| {
                if inside {
                    RegionMap::zeros()
                } else {
                    RegionMap::new()
                }
            });
            let n = (REGION_BLOCKS - index).min((end - at) as usize);
            for i in index..index + n {
                map.set(i, pointer);
            }
            at += n as u64;
        }
    }
    /// What it says of a block.
    pub fn get(&self, lba: Lba) -> Pointer {
        let region = lba.region().0;
        match self.regions.get(&region) {
            Some(map) => map.get(lba.index()),
            None if self.zeros.get(region).is_some() => Pointer::Zero,
            None => Pointer::Absent,
        }
    }
    /// What it says of a region, if anything.
    pub fn region(&self, region: Region) -> Option<RegionMap> {
        match self.regions.get(&region.0) {
            Some(map) => Some(map.clone()),
            None => self.zeros.get(region.0).map(|_| RegionMap::zeros()),
        }
    }
    /// Its content for [`merge`].
    pub fn items(&self) -> Items<'_> {
        let regions = self
            .regions
            .iter()
            .map(|(&r, m)| Ok(Item::Region(Region(r), m.clone())));
        let zeros = self
            .zeros
            .iter()
            .map(|(s, e)| Ok(Item::Zeros(Region(s), e - s)));
        Box::new(merge(vec![Box::new(regions), Box::new(zeros)]))
    }
    /// Its content in the regions from `start` to before `end`; what begins there may go beyond.
    pub fn items_in(&self, start: Region, end: u32) -> Items<'_> {
        let regions = self
            .regions
            .range(start.0..end)
            .map(|(&r, m)| Ok(Item::Region(Region(r), m.clone())));
        let zeros = self.zeros.iter_from(start.0).map(move |(s, e)| {
            let s = s.max(start.0);
            Ok(Item::Zeros(Region(s), e - s))
        });
        let zeros = zeros.take_while(move |i| i.as_ref().is_ok_and(|i| i.start() < end));
        Box::new(merge(vec![Box::new(regions), Box::new(zeros)]))
    }
    /// Its content as the entries of a commit record.
    pub fn entries(&self) -> Vec<CommitEntry> {
        let mut entries = Entries::default();
        if self.zeros.is_empty() {
            // Nearly always: nothing to lay over each other, so nothing is copied.
            for (&r, map) in &self.regions {
                entries.region(Region(r), map);
            }
        } else {
            // The items of memory cannot fail.
            for item in self.items().flatten() {
                match item {
                    Item::Zeros(r, n) => entries.zeros(
                        u64::from(r.0) * REGION_BLOCKS as u64,
                        u64::from(n) * REGION_BLOCKS as u64,
                    ),
                    Item::Region(r, map) => entries.region(r, &map),
                }
            }
        }
        entries.flush();
        entries.list
    }
}

/// Entries in rising order, in which neighbouring zeros become one.
#[derive(Default)]
struct Entries {
    list: Vec<CommitEntry>,
    /// From which block to before which one there are zeros that are in no entry yet.
    zero: Option<(u64, u64)>,
}

impl Entries {
    fn flush(&mut self) {
        let Some((mut at, end)) = self.zero.take() else {
            return;
        };
        // A range of 2^32 blocks does not fit into 32 bits: split it.
        while at < end {
            let n = (end - at).min(1 << 31);
            let entry = CommitEntry::new(Lba(at as u32), n as u32, Pointer::Zero);
            self.list.push(entry);
            at += n;
        }
    }
    fn zeros(&mut self, start: u64, len: u64) {
        match &mut self.zero {
            Some((_, end)) if *end == start => *end += len,
            _ => {
                self.flush();
                self.zero = Some((start, start + len));
            }
        }
    }
    fn region(&mut self, region: Region, map: &RegionMap) {
        let base = u64::from(region.0) * REGION_BLOCKS as u64;
        // Between stored pointers there is nothing; where the map is filled, zeros.
        let mut next = 0;
        let end = std::iter::once((REGION_BLOCKS, Pointer::Absent));
        for (index, pointer) in map.iter().chain(end) {
            if map.fill() && next < index {
                self.zeros(base + next as u64, (index - next) as u64);
            }
            next = index + 1;
            match pointer {
                Pointer::Absent => {}
                Pointer::Zero => self.zeros(base + index as u64, 1),
                data => {
                    self.flush();
                    let entry = CommitEntry::new(region.lba(index), 1, data);
                    self.list.push(entry);
                }
            }
        }
    }
}
