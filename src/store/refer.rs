//! REFER: how much data an object shows, whoever holds it.
//!
//! Counted from the base upwards: a layer adds its blocks and takes away what they, and its zeros, hide below. Each layer is looked at
//! once, however many disks stand on it.

use super::{Below, Store, layer_file};
use crate::chain::{Chain, Place};
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::io::Access;
use crate::layer::ReadLayer;
use crate::map::{Item, RegionMap};
use crate::units::{BLOCK, Id, REGION_BLOCKS, Region};
use std::collections::HashMap;
use std::sync::Arc;

/// Ranges of blocks of a base that hold data: disjoint, in order.
type DataBlocks = Arc<Vec<(u64, u64)>>;

/// What was counted so far.
#[derive(Default)]
pub(super) struct Refer {
    bases: HashMap<Id, DataBlocks>,
    /// Host bytes of a base.
    bytes: HashMap<Id, u64>,
    /// Data blocks seen through a layer.
    layers: HashMap<Below, u64>,
}

/// How often a layer that is being written is looked at again.
const TRIES: u32 = 20;

impl Refer {
    /// Data blocks that the top of `chain` shows; the base is its last element.
    pub fn blocks(&mut self, store: &Store, chain: &[Below]) -> Result<u64> {
        let Some(Below::Base(base)) = chain.last().copied() else {
            return Err(Error::new(Kind::Corrupt, "the chain of layers has no base"));
        };
        let data = self.base(store, base)?;
        let mut total = data.iter().map(|(start, end)| end - start).sum::<u64>();
        for at in (0..chain.len() - 1).rev() {
            if let Some(known) = self.layers.get(&chain[at]) {
                total = *known;
                continue;
            }
            let Below::Layer(id) = chain[at] else {
                continue;
            };
            let (mine, hidden) = difference(store, id, chain[at + 1], &data)?;
            total = (total + mine).saturating_sub(hidden);
            self.layers.insert(chain[at], total);
        }
        Ok(total)
    }
    /// Host bytes of a base, looked up once however many stand on it.
    pub fn base_bytes(&mut self, store: &Store, id: Id) -> Result<u64> {
        if let Some(known) = self.bytes.get(&id) {
            return Ok(*known);
        }
        let bytes = store.base_data(id)?;
        self.bytes.insert(id, bytes);
        Ok(bytes)
    }
    fn base(&mut self, store: &Store, id: Id) -> Result<DataBlocks> {
        if let Some(known) = self.bases.get(&id) {
            return Ok(known.clone());
        }
        let mut blocks: Vec<(u64, u64)> = Vec::new();
        let base = match store.base(id) {
            Ok(base) => base,
            // It cannot be read, so nothing of it can be shown to be a hole: looking goes on.
            Err(e) if e.kind() == Kind::Corrupt => {
                let all = Arc::new(vec![(0, crate::units::blocks(store.base_meta(id)?.len))]);
                self.bases.insert(id, all.clone());
                return Ok(all);
            }
            Err(e) => return Err(e),
        };
        for (at, len) in base.file().data_ranges(0, base.len())? {
            let (start, end) = (at / BLOCK, (at + len).div_ceil(BLOCK));
            match blocks.last_mut() {
                Some((_, last)) if *last >= start => *last = (*last).max(end),
                _ => blocks.push((start, end)),
            }
        }
        let blocks = Arc::new(blocks);
        self.bases.insert(id, blocks.clone());
        Ok(blocks)
    }
}

/// How many of the blocks `start..end` hold data.
fn within(data: &[(u64, u64)], start: u64, end: u64) -> u64 {
    let first = data.partition_point(|&(_, e)| e <= start);
    data[first..]
        .iter()
        .take_while(|&&(s, _)| s < end)
        .map(|&(s, e)| e.min(end) - s.max(start))
        .sum()
}

/// The data blocks of layer `id`, and how many data blocks below it hides.
fn difference(store: &Store, id: Id, below: Below, data: &[(u64, u64)]) -> Result<(u64, u64)> {
    let mut tries = 0;
    loop {
        let seen = (|| {
            let file = store.layers_dir().open(&layer_file(id), Access::Read)?;
            let layer = ReadLayer::open(file)?;
            if layer.counts() == (0, 0) {
                return Ok((0, 0));
            }
            match store.chain(below) {
                Ok(chain) => count(&layer, &chain, data),
                Err(e) if e.kind() == Kind::Corrupt => Ok((layer.counts().0, 0)),
                Err(e) => Err(e),
            }
        })();
        match seen {
            // Its writer may have put a checkpoint in between.
            Err(_) if tries < TRIES => tries += 1,
            other => return other,
        }
    }
}

fn count(layer: &ReadLayer, below: &Chain, data: &[(u64, u64)]) -> Result<(u64, u64)> {
    let (mut mine, mut hidden) = (0, 0);
    let blocks = REGION_BLOCKS as u64;
    for item in layer.items(Region(0)) {
        match item? {
            Item::Region(region, map) => {
                mine += map.counts().0;
                hidden += hides(&map, region, below, data)?;
            }
            Item::Zeros(region, n) if below.depth() == 0 => {
                let start = u64::from(region.0) * blocks;
                hidden += within(data, start, start + u64::from(n) * blocks);
            }
            Item::Zeros(region, n) => {
                for r in region.0..region.0 + n {
                    hidden += hides(&RegionMap::zeros(), Region(r), below, data)?;
                }
            }
        }
    }
    Ok((mine, hidden))
}

/// How many data blocks below a region's map hides.
fn hides(map: &RegionMap, region: Region, below: &Chain, data: &[(u64, u64)]) -> Result<u64> {
    let start = u64::from(region.0) * REGION_BLOCKS as u64;
    if map.fill() && below.is_base(region)? {
        return Ok(within(data, start, start + REGION_BLOCKS as u64));
    }
    let mut places = [Place::Base; REGION_BLOCKS];
    below.places(region, 0, &mut places)?;
    let mut hidden = 0;
    for (index, place) in places.iter().enumerate() {
        if map.get(index) == Pointer::Absent {
            continue;
        }
        let block = start + index as u64;
        hidden += match place {
            Place::Slot { .. } => 1,
            Place::Zero { .. } => 0,
            Place::Base => within(data, block, block + 1),
        };
    }
    Ok(hidden)
}
