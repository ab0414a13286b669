//! Top-down resolution of a region through sealed layers, memoised.
//!
//! A chain is a sealed layer, the layers below it, and the base. It never changes, so an answer once found holds for ever, and all
//! disks over the same parent share the chain and its answers. Depth costs at the first touch of a region only.

use crate::base::Base;
use crate::error::Result;
use crate::format::Pointer;
use crate::io::File;
use crate::layer::ReadLayer;
use crate::layer::refer::{Below, Bits, known_and_data, ones};
use crate::map::{Item, Items, RegionMap, WORDS, merge};
use crate::sync::RwLock;
use crate::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use crate::units::{Id, Lba, REGION_BLOCKS, Region, Slot};
use rustc_hash::FxHashMap;
use std::ops::Range;
use std::sync::Arc;

/// Where a block of a chain is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In the base, at its own offset (or past its end: zeros).
    Base,
    /// Zeros, by the word of the layer `depth` steps below the top of the chain.
    Zero {
        /// Layers above it in the chain.
        depth: u16,
    },
    /// A slot of the layer `depth` steps below the top of the chain.
    Slot {
        /// Layers above it in the chain.
        depth: u16,
        /// Slot of that layer's file.
        slot: Slot,
        /// CRC of the block.
        sum: u32,
    },
}

/// Places of all blocks of a region.
#[derive(Debug)]
enum Resolved {
    /// No layer has anything here.
    Base,
    /// One place a block.
    Mixed(Box<[Place; REGION_BLOCKS]>),
}

/// Memory for resolved regions, shared by all chains that are given the same budget.
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// At most about `limit` bytes.
    pub fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget {
            used: AtomicUsize::new(0),
            limit,
        })
    }
    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }
}

impl Default for Budget {
    fn default() -> Budget {
        Budget {
            used: AtomicUsize::new(0),
            limit: DEFAULT_BUDGET,
        }
    }
}

/// Bytes of resolved regions kept: 64 MiB are about 8,000 regions or 16 GiB of disk in use at a time.
pub const DEFAULT_BUDGET: usize = 64 << 20;

/// Shards of the cache.
const SHARDS: usize = 16;

/// A sealed layer and all below it; or a base alone.
pub struct Chain {
    /// From the top down.
    layers: Vec<Arc<ReadLayer>>,
    base: Arc<Base>,
    cache: Vec<RwLock<FxHashMap<u32, Resolved>>>,
    budget: Arc<Budget>,
}

fn weight(resolved: &Resolved) -> usize {
    match resolved {
        Resolved::Base => 64,
        Resolved::Mixed(_) => REGION_BLOCKS * size_of::<Place>() + 64,
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let held: usize = self
            .cache
            .iter()
            .flat_map(|s| s.read().values().map(weight).collect::<Vec<_>>())
            .sum();
        self.budget.used.fetch_sub(held, Relaxed);
    }
}

impl Chain {
    /// A chain of sealed layers, top down, over a base.
    pub fn new(layers: Vec<Arc<ReadLayer>>, base: Arc<Base>, budget: Arc<Budget>) -> Chain {
        Chain {
            layers,
            base,
            cache: (0..SHARDS).map(|_| RwLock::default()).collect(),
            budget,
        }
    }
    /// Number of layers.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }
    /// The layers, top down.
    pub fn layers(&self) -> &[Arc<ReadLayer>] {
        &self.layers
    }
    /// The base.
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }
    /// Virtual size of what the chain holds: what its top layer says, or the base's length in whole blocks.
    pub fn size(&self) -> u64 {
        match self.layers.first() {
            Some(top) => top.size(),
            None => crate::units::blocks(self.base.len()) * crate::units::BLOCK,
        }
    }
    /// Where all ends that its layers and its base may hold, also past what it shows, in whole blocks.
    pub fn reach(&self) -> u64 {
        let base = crate::units::blocks(self.base.len()) * crate::units::BLOCK;
        let layers = self.layers.iter();
        layers
            .map(|layer| layer.size().max(layer.header().size.get()))
            .fold(base, u64::max)
    }
    /// What `look` makes of a resolved region.
    fn resolve<T>(&self, region: Region, look: impl FnOnce(&Resolved) -> T) -> Result<T> {
        let shard = &self.cache[region.0 as usize % SHARDS];
        if let Some(found) = shard.read().get(&region.0) {
            return Ok(look(found));
        }
        let resolved = self.walk(region)?;
        let answer = look(&resolved);
        let mut shard = shard.write();
        if self.budget.used.load(Relaxed) + weight(&resolved) > self.budget.limit {
            // Whichever come first: the order of a hash map is as good as random, and costs nothing to keep.
            let gone: Vec<u32> = shard.keys().take(shard.len() / 4 + 1).copied().collect();
            for r in gone {
                if let Some(old) = shard.remove(&r) {
                    self.budget.used.fetch_sub(weight(&old), Relaxed);
                }
            }
        }
        self.budget.used.fetch_add(weight(&resolved), Relaxed);
        if let Some(old) = shard.insert(region.0, resolved) {
            self.budget.used.fetch_sub(weight(&old), Relaxed);
        }
        Ok(answer)
    }
    /// The first touch: every layer is asked, from the top.
    fn walk(&self, region: Region) -> Result<Resolved> {
        let mut places: Option<Box<[Place; REGION_BLOCKS]>> = None;
        // Blocks that no layer has decided yet.
        let mut open = [u64::MAX; crate::map::WORDS];
        for (depth, layer) in self.layers.iter().enumerate() {
            let map = layer.region(region)?;
            if map.is_empty() {
                continue;
            }
            let places = places.get_or_insert_with(|| Box::new([Place::Base; REGION_BLOCKS]));
            self.lay(&map, depth as u16, places, &mut open);
            if open.iter().all(|w| *w == 0) {
                break;
            }
        }
        Ok(places.map_or(Resolved::Base, Resolved::Mixed))
    }
    fn lay(
        &self,
        map: &RegionMap,
        depth: u16,
        places: &mut [Place; REGION_BLOCKS],
        open: &mut [u64; crate::map::WORDS],
    ) {
        for (index, pointer) in map.iter() {
            let bit = 1u64 << (index % 64);
            if open[index / 64] & bit == 0 {
                continue;
            }
            open[index / 64] &= !bit;
            places[index] = match pointer {
                Pointer::Data { slot, sum } => Place::Slot { depth, slot, sum },
                Pointer::Zero | Pointer::Absent => Place::Zero { depth },
            };
        }
        if map.fill() {
            for (index, place) in places.iter_mut().enumerate() {
                if open[index / 64] >> (index % 64) & 1 == 1 {
                    *place = Place::Zero { depth };
                }
            }
            *open = [0; crate::map::WORDS];
        }
    }
    /// Where blocks `index..index+out.len()` of a region are.
    pub fn places(&self, region: Region, index: usize, out: &mut [Place]) -> Result<()> {
        if self.layers.is_empty() {
            out.fill(Place::Base);
            return Ok(());
        }
        self.resolve(region, |resolved| match resolved {
            Resolved::Base => out.fill(Place::Base),
            Resolved::Mixed(places) => out.copy_from_slice(&places[index..index + out.len()]),
        })
    }
    /// Does the whole region come from the base?
    pub fn is_base(&self, region: Region) -> Result<bool> {
        Ok(self.layers.is_empty()
            || self.resolve(region, |resolved| matches!(resolved, Resolved::Base))?)
    }
    /// The first region from `from` on of which any layer says something; `None` if none does.
    pub fn next_touched(&self, from: Region) -> Result<Option<Region>> {
        let mut next: Option<u32> = None;
        for layer in &self.layers {
            // What begins before reaches into it.
            let mut ahead = layer.items(from).skip_while(|item| {
                let ends = item.as_ref().map(crate::map::Item::end);
                ends.is_ok_and(|end| end <= from.0)
            });
            if let Some(item) = ahead.next() {
                let start = item?.start().max(from.0);
                next = Some(next.map_or(start, |next| next.min(start)));
            }
        }
        Ok(next.map(Region))
    }
    /// The file in which a block is that is not zeros, and the offset there.
    pub fn file_of(&self, place: Place, lba: Lba) -> Option<(&Arc<dyn File>, u64)> {
        match place {
            Place::Base if lba.at() < self.base.len() => Some((self.base.file(), lba.at())),
            Place::Base | Place::Zero { .. } => None,
            Place::Slot { depth, slot, .. } => {
                Some((self.layers[depth as usize].file(), slot.at()))
            }
        }
    }
    /// Reads `n` neighbouring blocks that begin at `place` into `buf`. For a slot, `sums` are the checksums.
    pub fn read_blocks(&self, place: Place, sums: &[u32], lba: Lba, buf: &mut [u8]) -> Result<()> {
        match place {
            Place::Base => self.base.read_blocks(lba, buf),
            Place::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Place::Slot { depth, slot, .. } => {
                self.layers[depth as usize].read_blocks(slot, sums, lba, buf)
            }
        }
    }
}

impl Below for Chain {
    fn counted_over(&self, kept: Option<Id>) -> Id {
        // The base may have come there so lately that a power cut brings back the one before it. What was counted over that one is true over this, but
        // that one knows nothing of this.
        match self.base.others().first() {
            Some(before) if kept != Some(self.base.id()) => *before,
            _ => self.base.id(),
        }
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
