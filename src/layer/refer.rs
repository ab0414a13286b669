//! How many data blocks are seen through a layer: its own, and those below that it does not hide.
//!
//! The layer knows its own map; what lies below tells of itself by [`Below`]. Nothing is looked up when a block is written: a checkpoint takes what the
//! journal adds to the runs, and asks what lies below only about blocks that neither said anything of before.

use super::{MappedRun, ReadLayer, region_of};
use crate::error::Result;
use crate::format::Pointer;
use crate::map::{Item, Items, RegionMap, WORDS, merge};
use crate::units::{Id, Region};
use std::ops::Range;
use std::sync::Arc;

/// The blocks of a region: a bit for each.
pub type Bits = [u64; WORDS];

/// What lies below a layer, as far as it matters which blocks hold data.
pub trait Below: Send + Sync {
    /// Which base a new count is said to be over, where the one before it was over `kept`, if that is known.
    fn counted_over(&self, kept: Option<Id>) -> Id;
    /// Is what was counted over that base true of this, too?
    fn counts_over(&self, base: Id) -> bool;
    /// How many data blocks it shows, if that is known.
    fn refer(&self) -> Result<Option<u64>>;
    /// The blocks of a region that it shows as data.
    fn data_in(&self, region: Region) -> Result<Bits>;
    /// How many blocks of some regions it shows as data.
    fn data_within(&self, regions: Range<u32>) -> Result<u64>;
}

/// Number of bits that are set.
pub fn ones(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The blocks of which a map says something, and those of them that are data.
pub fn known_and_data(map: &RegionMap) -> (Bits, Bits) {
    let mut data = [0; WORDS];
    for (index, pointer) in map.iter() {
        if let Pointer::Data { .. } = pointer {
            data[index / 64] |= 1 << (index % 64);
        }
    }
    match map.fill() {
        true => ([u64::MAX; WORDS], data),
        false => (*map.present(), data),
    }
}

fn both(a: &Bits, b: &Bits) -> Bits {
    std::array::from_fn(|word| a[word] & b[word])
}

fn without(a: &Bits, b: &Bits) -> Bits {
    std::array::from_fn(|word| a[word] & !b[word])
}

/// How many data blocks more are seen when `newer` lies over `older`, and that over `below`.
pub fn change(newer: Items<'_>, older: &[Arc<MappedRun>], below: &dyn Below) -> Result<i64> {
    let mut change = 0;
    for item in newer {
        match item? {
            Item::Region(region, map) => {
                let (touched, data) = known_and_data(&map);
                let (known, old) = known_and_data(&region_of(older, region)?);
                let first = without(&touched, &known);
                let seen = match first.iter().all(|word| *word == 0) {
                    true => 0,
                    false => ones(&both(&below.data_in(region)?, &first)),
                };
                let seen = seen + ones(&both(&old, &touched));
                change += ones(&data) as i64 - seen as i64;
            }
            Item::Zeros(region, n) => {
                change -= seen_within(region.0..region.0 + n, older, below)? as i64;
            }
        }
    }
    Ok(change)
}

/// How many data blocks are seen in some regions where `older` lies over `below`.
fn seen_within(regions: Range<u32>, older: &[Arc<MappedRun>], below: &dyn Below) -> Result<u64> {
    let sources = older
        .iter()
        .filter(|run| run.may_touch(regions.start, regions.end))
        .map(|run| Box::new(run.items(Region(regions.start))) as Items<'_>);
    let (mut seen, mut next) = (0, regions.start);
    for item in merge(sources.collect()) {
        let item = item?;
        if item.start() >= regions.end {
            break;
        }
        seen += below.data_within(next..item.start())?;
        next = item.end().min(regions.end);
        if let Item::Region(region, map) = item {
            let (known, data) = known_and_data(&map);
            seen += ones(&data);
            if known != [u64::MAX; WORDS] {
                seen += ones(&without(&below.data_in(region)?, &known));
            }
        }
    }
    Ok(seen + below.data_within(next..regions.end)?)
}

impl ReadLayer {
    /// How many data blocks are seen through it as of its last commit, over `below`; `None` if that was not kept. Looks at the journal, and at
    /// nothing else that grows with the layer.
    pub fn refer(&self, below: &dyn Below) -> Result<Option<u64>> {
        let kept = self.superblock.refer();
        let Some((refer, _)) = kept.filter(|(_, base)| below.counts_over(*base)) else {
            return Ok(None);
        };
        let change = change(self.journal.items(), &self.runs, below)?;
        Ok(refer.checked_add_signed(change))
    }
}
