//! Which blocks a chain shows as data.

use super::{Chain, Place, Resolved, SHARDS};
use crate::error::Result;
use crate::layer::refer::{Below, Bits, known_and_data, ones};
use crate::map::{Item, Items, WORDS, merge};
use crate::units::{Id, REGION_BLOCKS, Region};
use std::ops::Range;

impl Below for Chain {
    fn base(&self) -> Id {
        self.base.id()
    }
    fn counts_over(&self, base: Id) -> bool {
        self.base.counts_as(base)
    }
    fn refer(&self) -> Result<Option<u64>> {
        let Some(top) = self.layers.first() else {
            return self.base.data_blocks().map(Some);
        };
        // All of it is in its runs.
        let kept = top.superblock().refer();
        Ok(kept
            .filter(|(_, base)| self.counts_over(*base))
            .map(|(refer, _)| refer))
    }
    fn data_in(&self, region: Region) -> Result<Bits> {
        let (mut data, mut open) = ([0; WORDS], [u64::MAX; WORDS]);
        if let Some(Resolved::Mixed(places)) =
            self.cache[region.0 as usize % SHARDS].read().get(&region.0)
        {
            for (index, place) in places.iter().enumerate() {
                let (word, bit) = (index / 64, 1u64 << (index % 64));
                match place {
                    Place::Base => continue,
                    Place::Slot { .. } => data[word] |= bit,
                    Place::Zero { .. } => {}
                }
                open[word] &= !bit;
            }
        } else {
            for layer in &self.layers {
                let (known, own) = known_and_data(&layer.region(region)?);
                for word in 0..WORDS {
                    data[word] |= own[word] & open[word];
                    open[word] &= !known[word];
                }
                if open == [0; WORDS] {
                    break;
                }
            }
        }
        if open != [0; WORDS] {
            let base = self.base_in(region)?;
            for word in 0..WORDS {
                data[word] |= base[word] & open[word];
            }
        }
        Ok(data)
    }
    fn data_within(&self, regions: Range<u32>) -> Result<u64> {
        if regions.is_empty() {
            return Ok(0);
        }
        let sources = self
            .layers
            .iter()
            .map(|layer| Box::new(layer.items(Region(regions.start))) as Items<'_>);
        let (mut data, mut next) = (0, regions.start);
        for item in merge(sources.collect()) {
            let item = item?;
            if item.start() >= regions.end {
                break;
            }
            data += self.base_within(next..item.start())?;
            next = item.end().min(regions.end);
            if let Item::Region(region, map) = item {
                let (known, own) = known_and_data(&map);
                data += ones(&own);
                if known != [u64::MAX; WORDS] {
                    let base = self.base_in(region)?;
                    data += ones(&std::array::from_fn(|word| base[word] & !known[word]));
                }
            }
        }
        Ok(data + self.base_within(next..regions.end)?)
    }
}

impl Chain {
    fn base_in(&self, region: Region) -> Result<Bits> {
        let first = u64::from(region.first().0);
        let mut bits = [0; WORDS];
        for (start, end) in self.base.data_in(first, first + REGION_BLOCKS as u64)? {
            for block in start - first..end - first {
                bits[block as usize / 64] |= 1u64 << (block % 64);
            }
        }
        Ok(bits)
    }
    fn base_within(&self, regions: Range<u32>) -> Result<u64> {
        let first = |region: u32| u64::from(region) * REGION_BLOCKS as u64;
        let found = self
            .base
            .data_in(first(regions.start), first(regions.end))?;
        Ok(found.iter().map(|(start, end)| end - start).sum())
    }
}
