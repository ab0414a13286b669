//! A complete sealed layer file, written in one go: what several layers hold together, as one (FORMAT.md, section 4, "Squash").
//!
//! Always true:
//! - nobody reads the file before its name is in place, so the order in which it is written does not matter, but for the sync at its end;
//! - a block's checksum is copied from the map that named it, never computed: damage stays what it was, and is told when the block is read;
//! - what an earlier, interrupted attempt left in the file is used as far as it has the right checksum.

use super::{ReadLayer, create};
use crate::error::{Error, Kind, Result};
use crate::format::{self, DATA_START, Header, Pointer, STATE_SEALED, Superblock};
use crate::io::File;
use crate::map::run::{Builder, max_len};
use crate::map::{Item, Items, RegionMap, merge};
use crate::units::{BLOCK, BLOCK_SIZE, Id, REGION_BLOCKS, Region, Slot, blocks};
use std::sync::Arc;
use zerocopy::little_endian::{U32, U64};

/// Blocks copied in one go at most: 8 MiB, so that progress is told and a wish to stop is heard.
const PIECE: usize = 2048;
/// From so many blocks on that stand side by side, the filesystem copies: 64 KiB.
const LONG: usize = 16;
/// Of scattered stretches so many are asked for ahead.
const AHEAD: usize = 64;

/// What layers over each other hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Blocks with data, hidden ones not counted.
    pub data: u64,
    /// Blocks that are zeros.
    pub zeros: u64,
    regions: u64,
    pointers: u64,
    ranges: u64,
}

impl Measure {
    /// Looks at the block maps of `layers`, the topmost first.
    pub fn of(layers: &[Arc<ReadLayer>]) -> Result<Measure> {
        let mut found = Measure::default();
        for item in merged(layers, &|_, map| Some(map)) {
            match item? {
                Item::Region(_, map) => {
                    let (data, zeros) = map.counts();
                    found.data += data;
                    found.zeros += zeros;
                    found.regions += 1;
                    found.pointers += map.len() as u64;
                }
                Item::Zeros(_, n) => {
                    found.zeros += u64::from(n) * REGION_BLOCKS as u64;
                    found.ranges += 1;
                }
            }
        }
        Ok(found)
    }
    /// Host bytes that the file takes at most, if no block can be shared.
    pub fn bytes(&self) -> u64 {
        let run = max_len(self.regions, self.pointers, self.ranges);
        (3 + self.data + blocks(run)) * BLOCK
    }
}

/// Changes a region map on its way into a merge; the number is that of the layer.
type Change<'a> = &'a dyn Fn(usize, RegionMap) -> Option<RegionMap>;

/// The maps of `layers` over each other, each changed before.
fn merged<'a>(
    layers: &'a [Arc<ReadLayer>],
    change: Change<'a>,
) -> impl Iterator<Item = Result<Item>> + 'a {
    let sources = layers.iter().enumerate().map(|(number, layer)| {
        let items = layer.items(Region(0)).map(move |item| match item {
            Ok(Item::Region(region, map)) => change(number, map)
                .map(|map| Item::Region(region, map))
                .ok_or_else(|| Error::new(Kind::Corrupt, "a block map contradicts itself")),
            other => other,
        });
        let tagged =
            items.map(move |item| item.map_err(|e| e.layer(layer.id()).path(layer.file().path())));
        Box::new(tagged) as Items<'a>
    });
    merge(sources.collect())
}

/// The same pointers, each with the number of its layer in the place of the slot.
fn marked(number: usize, map: RegionMap) -> Option<RegionMap> {
    let pointers = map.iter().map(|(_, pointer)| match pointer {
        Pointer::Data { sum, .. } => Pointer::Data {
            slot: Slot(number as u32),
            sum,
        },
        other => other,
    });
    RegionMap::from_parts(*map.present(), pointers.collect(), map.fill())
}

/// Writes what `layers` (the topmost first) hold together as a sealed layer with this header, this label, this virtual size, and what is
/// seen through it, if that is known; and makes it durable. `measure` is theirs. `copied` is told of each piece in bytes; its error ends the work, and what was done so far can be taken up again.
/// Returns the bytes that were copied.
pub fn write(
    file: &dyn File,
    header: &Header,
    (label, size, refer): (Option<&str>, u64, Option<(u64, Id)>),
    layers: &[Arc<ReadLayer>],
    measure: &Measure,
    copied: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let id = Id(header.layer);
    let left = file.len()?;
    if left > 0 {
        // Whoever left it may have died after a failed sync: only what is on the disk counts.
        file.sync()?;
        file.forget_cached(0, u64::MAX);
    } else {
        create(file, header)?;
    }
    let too_large = || {
        Error::new(
            Kind::NoSpace,
            "together the layers have more blocks than one layer file can hold",
        )
        .layer(id)
        .hint("squash fewer layers: take a snapshot of the disk, commit it as an image, and squash what is above it")
    };
    let first = u64::from(DATA_START) + measure.data;
    let run_slots = blocks(max_len(measure.regions, measure.pointers, measure.ranges));
    if first + run_slots > u64::from(format::SLOT_ZERO) {
        return Err(too_large());
    }
    let run_slot = Slot(first as u32);
    let mut run_at = run_slot.at();
    let mut builder = Builder::new(|bytes: &[u8]| {
        file.write_at(bytes, run_at)?;
        run_at += bytes.len() as u64;
        Ok(())
    });
    let mut copier = Copier {
        file,
        layers,
        left,
        to: Slot(DATA_START),
        piece: Vec::new(),
        sums: Vec::new(),
        copied: 0,
        told: copied,
    };
    let same = |_: usize, map: RegionMap| Some(map);
    let mut origins = merged(layers, &marked);
    let mut next = DATA_START;
    for item in merged(layers, &same) {
        let origin = origins.next().transpose()?;
        let (region, map, from) = match (item?, origin) {
            (Item::Region(region, map), Some(Item::Region(_, from))) => (region, map, from),
            (zeros, _) => {
                builder.push(&zeros)?;
                continue;
            }
        };
        let mut pointers = Vec::with_capacity(map.len());
        for ((_, pointer), (_, origin)) in map.iter().zip(from.iter()) {
            pointers.push(match (pointer, origin) {
                (Pointer::Data { slot, sum }, Pointer::Data { slot: number, .. }) => {
                    copier.add(number.0 as usize, slot, sum)?;
                    next += 1;
                    Pointer::Data {
                        slot: Slot(next - 1),
                        sum,
                    }
                }
                (other, _) => other,
            });
        }
        let map = RegionMap::from_parts(*map.present(), pointers, map.fill())
            .ok_or_else(|| Error::new(Kind::Corrupt, "a block map contradicts itself").layer(id))?;
        builder.push(&Item::Region(region, map))?;
    }
    copier.flush()?;
    let copied = copier.copied;
    if Slot(next) != run_slot {
        let why = "the layers hold other blocks than they did when they were measured";
        return Err(Error::new(Kind::Corrupt, why)
            .layer(id)
            .hint("`forkdisk check` tells what is wrong with them"));
    }
    let mut superblock = Superblock::empty(header);
    superblock.sequence = U64::new(1);
    superblock.set_refer(refer);
    superblock.generation = U64::new(1);
    superblock.state = U32::new(STATE_SEALED);
    superblock.size = U64::new(size);
    superblock.data_blocks = U64::new(measure.data);
    superblock.zero_blocks = U64::new(measure.zeros);
    superblock.high_water = U64::new(first);
    if let Some(mut run) = builder.finish(&id, 0)? {
        run.slot = U32::new(run_slot.0);
        superblock.high_water = U64::new(first + u64::from(run.slots.get()));
        superblock.run_count = U32::new(1);
        superblock.runs[0] = run;
    }
    superblock.set_name(label.unwrap_or_default());
    use zerocopy::IntoBytes;
    file.write_at(header.as_bytes(), 0)?;
    for copy in [1, 2] {
        file.write_at(superblock.encode(), Slot(copy).at())?;
    }
    let end = Slot(superblock.high_water.get() as u32).at();
    if file.len()? > end {
        file.set_len(end)?;
    }
    file.sync()?;
    Ok(copied)
}

/// Blocks that stand side by side, before and after.
struct Stretch {
    layer: usize,
    from: Slot,
    blocks: usize,
}

/// Copies blocks to places side by side: long stretches as the filesystem can do it best, which may be to share them, and what is scattered through
/// memory, so that it is written in one piece.
struct Copier<'a> {
    file: &'a dyn File,
    layers: &'a [Arc<ReadLayer>],
    /// Length of what an earlier attempt left.
    left: u64,
    /// Where the next piece goes, and what it is made of.
    to: Slot,
    piece: Vec<Stretch>,
    /// Checksums of its blocks.
    sums: Vec<u32>,
    copied: u64,
    told: &'a mut dyn FnMut(u64) -> Result<()>,
}

impl Copier<'_> {
    fn add(&mut self, layer: usize, from: Slot, sum: u32) -> Result<()> {
        if self.sums.len() == PIECE {
            self.flush()?;
        }
        self.sums.push(sum);
        match self.piece.last_mut() {
            Some(s)
                if s.layer == layer
                    && u64::from(s.from.0) + s.blocks as u64 == u64::from(from.0) =>
            {
                s.blocks += 1;
            }
            _ => self.piece.push(Stretch {
                layer,
                from,
                blocks: 1,
            }),
        }
        Ok(())
    }
    /// Copies what was added.
    fn flush(&mut self) -> Result<()> {
        let (at, len) = (self.to.at(), self.sums.len() as u64 * BLOCK);
        if len == 0 {
            return Ok(());
        }
        if at + len > self.left || !self.is_there() {
            self.copy(at)?;
            self.file.start_writeback(at, len);
            self.copied += len;
        }
        self.to = Slot(self.to.0 + self.sums.len() as u32);
        self.piece.clear();
        self.sums.clear();
        (self.told)(len)
    }
    fn copy(&self, mut at: u64) -> Result<()> {
        let mut gathered = Vec::new();
        for (n, s) in self.piece.iter().enumerate() {
            let layer = &self.layers[s.layer];
            let (file, from) = (&**layer.file(), s.from.at());
            if n % AHEAD == 0 {
                self.ask_for(&self.piece[n..]);
            }
            if s.blocks >= LONG {
                self.write(&mut gathered, &mut at)?;
                let len = s.blocks as u64 * BLOCK;
                self.file
                    .copy_from(file, from, at, len)
                    .map_err(|e| e.layer(layer.id()))?;
                at += len;
                continue;
            }
            let start = gathered.len();
            gathered.resize(start + s.blocks * BLOCK_SIZE, 0);
            file.read_at(&mut gathered[start..], from)
                .map_err(|e| e.layer(layer.id()))?;
        }
        self.write(&mut gathered, &mut at)
    }
    /// Asks for the next scattered blocks that are not in memory: they come together, whatever their order.
    fn ask_for(&self, next: &[Stretch]) {
        for s in next.iter().take(AHEAD).filter(|s| s.blocks < LONG) {
            let file = self.layers[s.layer].file();
            if !file.is_cached(s.from.at()) {
                file.prefetch(s.from.at(), s.blocks as u64 * BLOCK);
            }
        }
    }
    /// Writes what was gathered.
    fn write(&self, gathered: &mut Vec<u8>, at: &mut u64) -> Result<()> {
        if !gathered.is_empty() {
            self.file.write_at(gathered, *at)?;
            *at += gathered.len() as u64;
            gathered.clear();
        }
        Ok(())
    }
    /// Did an earlier attempt copy all of it?
    fn is_there(&self) -> bool {
        let mut buf = vec![0; self.sums.len() * BLOCK_SIZE];
        self.file.read_at(&mut buf, self.to.at()).is_ok()
            && buf
                .chunks_exact(BLOCK_SIZE)
                .zip(&self.sums)
                .all(|(block, sum)| format::crc(block) == *sum)
    }
}
