//! What differs between two states: the canonical difference (FORMAT.md, section "A stream").
//!
//! Always true:
//! - it is a difference of contents: a block that holds the same bytes in both states is no part of it, and one that reads as zeros in the
//!   upper state is `zero`, however either is stored;
//! - regions that no layer above the common ancestor touches are not looked at; data is read only where neither the place of a block nor its
//!   checksum decides;
//! - memory is bounded by a region of blocks and a window of a base's holes, whatever the size of the states.

use super::{Below, Object, ObjectKind, Store, layer_file, parent_of};
use crate::base::Base;
use crate::chain::{Chain, Place};
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::ZERO_SUM;
use crate::io::Access;
use crate::layer::{ReadLayer, recover};
use crate::map::{Item, Items, merge};
use crate::units::{BLOCK, BLOCK_SIZE, REGION_BLOCKS, REGION_BYTES, Region, blocks};
use std::collections::VecDeque;
use std::sync::Arc;

/// The contents of a base, image, snapshot or disk, to be read and compared.
pub struct State {
    chain: Arc<Chain>,
    disk: CowDisk,
    /// Do whole blocks count, whatever the length of the base?
    whole: bool,
}

impl State {
    fn new(chain: Arc<Chain>) -> State {
        State {
            disk: CowDisk::read_only(chain.clone()),
            whole: chain.depth() > 0,
            chain,
        }
    }
    /// The same as a disk over it shows it: whole blocks.
    #[must_use]
    pub fn of_a_disk(self) -> State {
        State {
            whole: true,
            ..self
        }
    }
    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.chain.size()
    }
    /// Bytes that count: of a base its length, which may be no multiple of the block size; else the virtual size.
    pub fn len(&self) -> u64 {
        match self.whole {
            true => self.size(),
            false => self.chain.base().len(),
        }
    }
    /// Is it empty? No state is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// As a disk that can only be read.
    pub fn disk(&self) -> &CowDisk {
        &self.disk
    }
}

/// A range in which two states differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// First byte.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
    /// Does it read as zeros in the upper state? Else it holds data.
    pub zero: bool,
}

impl Change {
    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.at + self.len
    }
}

impl Store {
    /// The state of an object. A disk that is attached for writing is `Busy`.
    pub fn state(&self, object: &Object) -> Result<State> {
        match object.kind {
            ObjectKind::Disk => {
                let file = self.layers.open(&layer_file(object.id), Access::Read)?;
                file.lock(false)
                    .map_err(|e| super::in_use(&e, &format!("`{}` is attached", object.name)))?;
                self.state_over(ReadLayer::open(file)?)
            }
            _ => self.state_of(super::objects::object_target(object)),
        }
    }
    /// The state of a base or sealed layer.
    pub fn state_of(&self, below: Below) -> Result<State> {
        Ok(State::new(self.chain(below)?))
    }
    /// The state that the last flush of a disk made durable, while others may be writing to it. Its map is that of one instant. What is read
    /// later is checked as ever: where the writer has used a place anew since then the error is one of damage, and the state has to be
    /// opened again.
    pub fn live_state(&self, disk: &Object) -> Result<State> {
        let mut tries = 0;
        loop {
            let file = self.layers.open(&layer_file(disk.id), Access::Read)?;
            let opened = ReadLayer::open(file.clone()).and_then(|layer| {
                let now = recover::superblock(&*file, layer.header())?.superblock;
                Ok((layer, now.sequence))
            });
            // A checkpoint or a commit of its writer may have come in between: then journal and superblock may not belong together, or
            // the last commit may seem to lack data.
            let e = match opened {
                Ok((layer, now)) if now == layer.superblock().sequence && !layer.dropped() => {
                    return self.state_over(layer);
                }
                Ok(_) => Error::new(
                    Kind::Busy,
                    format!("`{}` changes too fast to be looked at", disk.name),
                )
                .hint("take a snapshot and look at that"),
                Err(e) => e,
            };
            if tries >= super::graph::TRIES {
                return Err(e);
            }
            tries += 1;
        }
    }
    fn state_over(&self, layer: ReadLayer) -> Result<State> {
        let below = self.chain(parent_of(layer.header()))?;
        let mut layers = vec![Arc::new(layer)];
        layers.extend(below.layers().iter().cloned());
        let chain = Chain::new(layers, below.base().clone(), self.budget.clone());
        Ok(State::new(Arc::new(chain)))
    }
}

/// What of a base holds data on the host, looked up a window at a time.
struct Holes<'a> {
    base: &'a Base,
    /// Regions that are known.
    window: std::ops::Range<u32>,
    /// Blocks with data in them: disjoint, in order.
    data: Vec<(u64, u64)>,
}

/// Regions of a window: 1 GiB.
const WINDOW: u32 = 512;

impl<'a> Holes<'a> {
    fn of(base: &'a Base) -> Holes<'a> {
        Holes {
            base,
            window: 0..0,
            data: Vec::new(),
        }
    }
    fn look(&mut self, region: Region) -> Result<()> {
        if self.window.contains(&region.0) {
            return Ok(());
        }
        self.data.clear();
        let first = region.0 / WINDOW * WINDOW;
        self.window = first..first + WINDOW;
        let at = Region(first).first().at();
        let len = self.base.len().saturating_sub(at);
        let len = len.min(u64::from(WINDOW) * REGION_BYTES);
        if len == 0 {
            return Ok(());
        }
        for (at, len) in self.base.data_ranges(at, len)? {
            let (start, end) = (at / BLOCK, (at + len).div_ceil(BLOCK));
            match self.data.last_mut() {
                Some((_, last)) if *last >= start => *last = (*last).max(end),
                _ => self.data.push((start, end)),
            }
        }
        Ok(())
    }
    /// Could any of the blocks `start..end` of a region hold data?
    fn any(&mut self, region: Region, start: u64, end: u64) -> Result<bool> {
        self.look(region)?;
        let first = self.data.partition_point(|&(_, e)| e <= start);
        Ok(self.data.get(first).is_some_and(|&(s, _)| s < end))
    }
    /// The first region from `from` on that may hold data.
    fn next(&mut self, from: u32) -> Result<Option<u32>> {
        let end = blocks(self.base.len()).div_ceil(REGION_BLOCKS as u64) as u32;
        let mut region = from;
        while region < end {
            self.look(Region(region))?;
            let start = u64::from(region) * REGION_BLOCKS as u64;
            let found = self.data.partition_point(|&(_, e)| e <= start);
            if let Some((at, _)) = self.data.get(found) {
                return Ok(Some(region.max((at / REGION_BLOCKS as u64) as u32)));
            }
            region = self.window.end;
        }
        Ok(None)
    }
}

/// Regions of a base from `from` on that hold data, as pieces of a map whose contents nobody looks at.
fn touched_by(base: &Base, from: u32) -> Items<'_> {
    let mut holes = Holes::of(base);
    let mut from = Some(from);
    Box::new(std::iter::from_fn(move || {
        let next = holes.next(from?);
        from = match &next {
            Ok(Some(region)) => Some(region + 1),
            _ => None,
        };
        let item = |region| Item::Zeros(Region(region), 1);
        next.map(|found| found.map(item)).transpose()
    }))
}

/// One of the two states.
struct Side<'a> {
    state: &'a State,
    holes: Holes<'a>,
    places: [Place; REGION_BLOCKS],
}

/// What is known of a block without a look at its data.
#[derive(Clone, Copy)]
enum Known {
    Zero,
    Data {
        /// The layer (its place counted from the bottom), or the base, and the block there.
        home: (Home, u64),
        sum: Option<u32>,
    },
}

/// Whose file a block is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    Base(crate::units::Id),
    Layer(crate::units::Id),
}

impl<'a> Side<'a> {
    fn of(state: &'a State) -> Side<'a> {
        Side {
            state,
            holes: Holes::of(state.chain.base()),
            places: [Place::Base; REGION_BLOCKS],
        }
    }
    /// Blocks of a region that are within the state.
    fn blocks(&self, region: Region) -> usize {
        let all = self.state.size() / BLOCK;
        let left = all.saturating_sub(u64::from(region.first().0));
        left.min(REGION_BLOCKS as u64) as usize
    }
    /// Is the whole region zeros, by the word of one layer or as a hole of the base?
    fn is_zero(&mut self, region: Region) -> Result<bool> {
        for layer in self.state.chain.layers() {
            let map = layer.region(region)?;
            if !map.is_empty() {
                return Ok(map.fill() && map.has_no_pointers());
            }
        }
        let start = u64::from(region.first().0);
        let end = start + REGION_BLOCKS as u64;
        Ok(!self.holes.any(region, start, end)?)
    }
    fn look(&mut self, region: Region) -> Result<()> {
        let n = self.blocks(region);
        self.state.chain.places(region, 0, &mut self.places[..n])
    }
    /// What is known of a block of the region that was looked at last.
    fn known(&mut self, region: Region, index: usize) -> Result<Known> {
        if index >= self.blocks(region) {
            return Ok(Known::Zero);
        }
        let lba = region.lba(index);
        let chain = &self.state.chain;
        Ok(match self.places[index] {
            Place::Zero { .. } => Known::Zero,
            Place::Slot { depth, slot, sum } => Known::Data {
                home: (
                    Home::Layer(chain.layers()[usize::from(depth)].id()),
                    u64::from(slot.0),
                ),
                sum: Some(sum),
            },
            Place::Base => {
                let block = u64::from(lba.0);
                let base = chain.base();
                match lba.at() < base.len() && self.holes.any(region, block, block + 1)? {
                    true => Known::Data {
                        home: (Home::Base(base.id()), block),
                        sum: base.sum(lba),
                    },
                    false => Known::Zero,
                }
            }
        })
    }
    /// Reads the blocks of a region that are marked, each row of them at once.
    fn read(
        &self,
        region: Region,
        marked: &[bool; REGION_BLOCKS],
        into: &mut Vec<u8>,
    ) -> Result<()> {
        into.resize(REGION_BYTES as usize, 0);
        let mut index = 0;
        while index < REGION_BLOCKS {
            let row = marked[index..].iter().take_while(|m| **m).count();
            if row > 0 {
                let part = &mut into[index * BLOCK_SIZE..(index + row) * BLOCK_SIZE];
                self.state.disk.read(part, region.lba(index).at())?;
            }
            index += row.max(1);
        }
        Ok(())
    }
}

/// How a block differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Same,
    Data,
    Zero,
    /// Data has to be looked at.
    Look,
}

fn verdict(lower: Known, upper: Known) -> Verdict {
    // A sum that is not that of zeros is proof; one that is, is none.
    let not_zero = |sum: Option<u32>| sum.is_some_and(|sum| sum != ZERO_SUM);
    match (lower, upper) {
        (Known::Zero, Known::Zero) => Verdict::Same,
        (Known::Zero, Known::Data { sum, .. }) if not_zero(sum) => Verdict::Data,
        (Known::Data { sum, .. }, Known::Zero) if not_zero(sum) => Verdict::Zero,
        (Known::Data { home: a, .. }, Known::Data { home: b, .. }) if a == b => Verdict::Same,
        (Known::Data { sum: Some(a), .. }, Known::Data { sum: Some(b), .. })
            if a != b && b != ZERO_SUM =>
        {
            Verdict::Data
        }
        _ => Verdict::Look,
    }
}

/// The changed ranges between two states, in rising order; neighbours of one kind are one.
pub struct Changes<'a> {
    lower: Option<Side<'a>>,
    upper: Side<'a>,
    /// Regions in which anything may differ, in rising order.
    touched: Box<dyn Iterator<Item = Result<Item>> + 'a>,
    /// What is left of the last of these ranges.
    regions: std::ops::Range<u32>,
    ready: VecDeque<Change>,
    /// May still grow.
    last: Option<Change>,
    /// Bytes up to here are compared.
    at: u64,
    buffers: [Vec<u8>; 2],
    done: bool,
}

/// What has to be changed of `lower` (or of a disk of zeros) so that it is `upper`. Where `lower` is shorter, it is taken to go on with
/// zeros; what it has past the end of `upper` is no part of the difference.
pub fn changes<'a>(lower: Option<&'a State>, upper: &'a State) -> Changes<'a> {
    let layers = |state: &'a State| state.chain.layers();
    let mut common = 0;
    let mut same_base = false;
    if let Some(lower) = lower {
        same_base = lower.chain.base().id() == upper.chain.base().id();
        let pairs = layers(lower).iter().rev().zip(layers(upper).iter().rev());
        common = match same_base {
            true => pairs.take_while(|(a, b)| a.id() == b.id()).count(),
            false => 0,
        };
    }
    let mut sources: Vec<Items<'a>> = Vec::new();
    for state in [Some(upper), lower].into_iter().flatten() {
        let above = layers(state).len() - common;
        for layer in &layers(state)[..above] {
            sources.push(Box::new(layer.items(Region(0))));
        }
        if !same_base {
            sources.push(touched_by(state.chain.base(), 0));
        }
    }
    // What one state does not show any more, for it is shorter than what both stand on, the other may show.
    if let Some(lower) = lower
        && same_base
        && lower.size() < upper.size()
    {
        let from = (lower.size() / REGION_BYTES) as u32;
        let all = layers(lower);
        for layer in &all[all.len() - common..] {
            sources.push(beyond(layer, from));
        }
        sources.push(touched_by(lower.chain.base(), from));
    }
    Changes {
        lower: lower.map(Side::of),
        upper: Side::of(upper),
        touched: Box::new(merge(sources)),
        regions: 0..0,
        ready: VecDeque::new(),
        last: None,
        at: 0,
        buffers: Default::default(),
        done: false,
    }
}

/// The regions from `from` on of which a layer says something, as pieces of a map whose contents nobody looks at.
fn beyond(layer: &ReadLayer, from: u32) -> Items<'_> {
    let items = layer.items(Region(from)).filter_map(move |item| {
        let (start, end) = match &item {
            Ok(item) => (item.start().max(from), item.end()),
            Err(_) => return Some(item),
        };
        (start < end).then(|| Ok(Item::Zeros(Region(start), end - start)))
    });
    Box::new(items)
}

impl Changes<'_> {
    /// Bytes of the upper state that are compared so far, for a display.
    pub fn at(&self) -> u64 {
        self.at
    }
    fn push(&mut self, change: Change) {
        match &mut self.last {
            Some(last) if last.end() == change.at && last.zero == change.zero => {
                last.len += change.len;
            }
            _ => self.ready.extend(self.last.replace(change)),
        }
    }
    fn region(&mut self, region: Region) -> Result<()> {
        let n = self.upper.blocks(region);
        let nothing = match &mut self.lower {
            Some(lower) => lower.is_zero(region)?,
            None => true,
        };
        if nothing && self.upper.is_zero(region)? {
            return Ok(());
        }
        self.upper.look(region)?;
        if let Some(lower) = &mut self.lower {
            lower.look(region)?;
        }
        let mut verdicts = [Verdict::Same; REGION_BLOCKS];
        let mut marked = [[false; REGION_BLOCKS]; 2];
        let mut look = false;
        for index in 0..n {
            let upper = self.upper.known(region, index)?;
            let lower = match &mut self.lower {
                Some(side) => side.known(region, index)?,
                None => Known::Zero,
            };
            verdicts[index] = verdict(lower, upper);
            if verdicts[index] == Verdict::Look {
                look = true;
                marked[0][index] = matches!(lower, Known::Data { .. });
                marked[1][index] = matches!(upper, Known::Data { .. });
            }
        }
        if look {
            self.compare(region, &marked, &mut verdicts)?;
        }
        let mut at = 0;
        for row in verdicts[..n].chunk_by(|a, b| a == b) {
            if row[0] != Verdict::Same {
                self.push(Change {
                    at: region.first().at() + at * BLOCK,
                    len: row.len() as u64 * BLOCK,
                    zero: row[0] == Verdict::Zero,
                });
            }
            at += row.len() as u64;
        }
        Ok(())
    }
    /// Decides by their data what else does not.
    fn compare(
        &mut self,
        region: Region,
        marked: &[[bool; REGION_BLOCKS]; 2],
        verdicts: &mut [Verdict; REGION_BLOCKS],
    ) -> Result<()> {
        let [lower, upper] = &mut self.buffers;
        if let Some(side) = &self.lower {
            side.read(region, &marked[0], lower)?;
        }
        self.upper.read(region, &marked[1], upper)?;
        for (index, verdict) in verdicts.iter_mut().enumerate() {
            if *verdict != Verdict::Look {
                continue;
            }
            let old = block(marked[0][index], lower, index);
            let new = block(marked[1][index], upper, index);
            *verdict = match (old == new, new == ZEROS) {
                (true, _) => Verdict::Same,
                (_, true) => Verdict::Zero,
                (_, false) => Verdict::Data,
            };
        }
        Ok(())
    }
    /// Compares one more region.
    fn step(&mut self) -> Result<()> {
        while self.regions.is_empty() {
            match self.touched.next().transpose()? {
                Some(item) => self.regions = item.start()..item.end(),
                None => {
                    self.done = true;
                    self.at = self.upper.state.size();
                    self.ready.extend(self.last.take());
                    return Ok(());
                }
            }
        }
        let region = Region(self.regions.start);
        self.regions.start += 1;
        self.at = region.first().at();
        if self.at >= self.upper.state.size() {
            // Nothing of the upper state is there, nor in any region behind.
            self.regions = 0..0;
            self.touched = Box::new(std::iter::empty());
            return Ok(());
        }
        self.region(region)?;
        self.at += REGION_BYTES;
        Ok(())
    }
}

static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// A block of a region that was read, or zeros where there was nothing to read.
fn block(read: bool, from: &[u8], index: usize) -> &[u8] {
    let at = index * BLOCK_SIZE;
    match from.get(at..at + BLOCK_SIZE) {
        Some(block) if read => block,
        _ => &ZEROS,
    }
}

impl Changes<'_> {
    /// Compares the next region; the next change, if one is complete by then, and whether the end is reached. So whoever shows how far it
    /// is, or wants to stop, need not wait for a change.
    pub fn advance(&mut self) -> Result<(Option<Change>, bool)> {
        if let Some(change) = self.ready.pop_front() {
            return Ok((Some(change), false));
        }
        if self.done {
            return Ok((None, true));
        }
        if let Err(e) = self.step() {
            self.done = true;
            return Err(e);
        }
        let change = self.ready.pop_front();
        Ok((change, self.done && change.is_none()))
    }
}
