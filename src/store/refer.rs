//! REFER: how much data an object shows, whoever holds it.
//!
//! Layers keep that count ([`super::kept`]). Where it is not known, it is counted from the base upwards. What is shown is carried along, a bit for each block of the regions that some layer knows; a layer adds its
//! blocks and takes away what they, and its zeros, hide. Layers stand on each other as a tree: what a layer changed is taken back before its
//! neighbour's turn. So each map is read once, however deep it lies and however many stand on it.

use super::graph::Graph;
use super::kept::Kept;
use super::{Below, Store, layer_file};
use crate::base::data_blocks as data_blocks_of;
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::io::Access;
use crate::layer::ReadLayer;
use crate::map::{Item, Ranges, RegionMap, WORDS};
use crate::units::{Id, REGION_BLOCKS, Region};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

/// How often a layer that is being written is looked at again.
const TRIES: u32 = 20;

/// Regions that are counted in one go, 512 GiB: what is carried along takes about 30 MiB at most, however large the disks are.
const WINDOW: u32 = 1 << 18;

/// The blocks of a region: a bit for each.
type Bits = [u64; WORDS];

/// What was counted.
#[derive(Default)]
pub(super) struct Refer {
    counts: HashMap<Below, Count>,
}

#[derive(Default)]
struct Count {
    /// Data blocks that are seen through it.
    shown: u64,
    /// Data blocks of its own.
    own: u64,
    /// Why nobody knows.
    failed: Option<Error>,
    /// All of its map was looked at.
    done: bool,
}

impl Refer {
    /// What `tops` show: as it was kept, else counted.
    pub fn of(store: &Store, graph: &Graph, tops: impl IntoIterator<Item = Below>) -> Refer {
        let mut kept = Kept::new(store, graph);
        let mut known = Vec::new();
        let mut unknown = Vec::new();
        for top in tops {
            match kept.of(top) {
                Some(counts) => known.push((top, counts)),
                None => unknown.push(top),
            }
        }
        let mut refer = Refer::counted(store, graph, unknown);
        for (top, (shown, own)) in known {
            let count = Count {
                shown,
                own,
                failed: None,
                done: true,
            };
            refer.counts.entry(top).or_insert(count);
        }
        refer
    }
    /// Counts what `tops` show, and all they stand on.
    pub fn counted(store: &Store, graph: &Graph, tops: impl IntoIterator<Item = Below>) -> Refer {
        let mut needed = HashSet::new();
        let mut above: HashMap<Below, Vec<Below>> = HashMap::new();
        let mut bases = Vec::new();
        for top in tops {
            let mut at = top;
            while needed.insert(at) {
                if let Below::Base(id) = at {
                    bases.push(id);
                    break;
                }
                let Some(parent) = graph.nodes.get(&at).and_then(|n| n.parent) else {
                    break;
                };
                above.entry(parent).or_default().push(at);
                at = parent;
            }
        }
        let mut refer = Refer::default();
        for base in bases {
            let tree = Tree {
                store,
                graph,
                above: &above,
                base: Below::Base(base),
            };
            refer.count(&tree, base);
        }
        refer
    }
    /// Data blocks that `below` shows.
    pub fn shown(&self, below: Below) -> Result<u64> {
        Ok(self.of_layer(below)?.shown)
    }
    /// Data blocks that `below` has of its own; 0 for a base.
    pub fn own(&self, below: Below) -> Result<u64> {
        Ok(self.of_layer(below)?.own)
    }
    fn of_layer(&self, below: Below) -> Result<&Count> {
        let none = || Error::new(Kind::Corrupt, "the chain of layers has no base");
        let count = self.counts.get(&below).ok_or_else(none)?;
        match &count.failed {
            None => Ok(count),
            Some(e) => Err(e.clone()),
        }
    }
    /// Counts a base and what stands on it.
    fn count(&mut self, tree: &Tree<'_>, base: Id) {
        let data = match data_blocks(tree.store, base) {
            Ok(data) => data,
            Err(e) => return self.fail(tree, tree.base, &e),
        };
        let mut start = 0;
        loop {
            let end = start + WINDOW;
            self.window(tree, &data, start..end);
            if tree.all().all(|below| self.entry(below).done) {
                let rest = within(&data, first_block(end), u64::MAX);
                tree.all().for_each(|below| self.entry(below).shown += rest);
                return;
            }
            start = end;
        }
    }
    fn entry(&mut self, below: Below) -> &mut Count {
        self.counts.entry(below).or_default()
    }
    /// Nobody knows what is shown from here upwards.
    fn fail(&mut self, tree: &Tree<'_>, below: Below, why: &Error) {
        for below in tree.from(below) {
            let count = self.entry(below);
            count.failed.get_or_insert_with(|| why.clone());
            count.done = true;
        }
    }
    /// Counts in some regions.
    fn window(&mut self, tree: &Tree<'_>, data: &[(u64, u64)], window: Range<u32>) {
        enum Step {
            Enter(Below),
            Leave(Undo),
        }
        let mut shown = Shown::of_base(data, &window);
        let base = self.entry(tree.base);
        base.shown += shown.total;
        base.done = true;
        let mut steps: Vec<Step> = tree.on(tree.base).map(Step::Enter).collect();
        while let Some(step) = steps.pop() {
            let below = match step {
                Step::Leave(undo) => {
                    shown.take_back(undo);
                    continue;
                }
                Step::Enter(below) => below,
            };
            let count = self.entry(below);
            if count.failed.is_some() {
                continue;
            }
            let bare = tree.graph.nodes.get(&below).is_some_and(|n| n.bare);
            let keep = tree.above.contains_key(&below);
            let laid = match below {
                Below::Layer(id) if !bare && !count.done => {
                    lay(tree.store, id, &mut shown, &window, keep)
                }
                _ => Ok(Laid::nothing(&shown)),
            };
            match laid {
                Ok(laid) => {
                    count.shown += laid.total;
                    count.own += laid.own;
                    count.done |= !laid.more;
                    if keep {
                        shown.total = laid.total;
                        steps.push(Step::Leave(laid.undo));
                        steps.extend(tree.on(below).map(Step::Enter));
                    }
                }
                Err(e) => self.fail(tree, below, &e),
            }
        }
    }
}

/// A base, and the layers on it that matter.
struct Tree<'a> {
    store: &'a Store,
    graph: &'a Graph,
    above: &'a HashMap<Below, Vec<Below>>,
    base: Below,
}

impl Tree<'_> {
    /// What stands directly on `below`.
    fn on(&self, below: Below) -> impl Iterator<Item = Below> + '_ {
        self.above.get(&below).into_iter().flatten().copied()
    }
    /// `below`, and all that stands on it.
    fn from(&self, below: Below) -> impl Iterator<Item = Below> + '_ {
        let mut todo = vec![below];
        std::iter::from_fn(move || {
            let next = todo.pop()?;
            todo.extend(self.on(next));
            Some(next)
        })
    }
    fn all(&self) -> impl Iterator<Item = Below> + '_ {
        self.from(self.base)
    }
}

/// What takes a layer away again.
#[derive(Default)]
struct Undo {
    /// Regions, and what they were.
    regions: Vec<(u32, Option<Bits>)>,
    zeros: Option<Ranges>,
    total: u64,
}

/// What a layer made of what is shown.
struct Laid {
    /// Data blocks that are shown now.
    total: u64,
    /// Data blocks of the layer.
    own: u64,
    /// Does its map go on behind the window?
    more: bool,
    undo: Undo,
}

impl Laid {
    fn nothing(shown: &Shown<'_>) -> Laid {
        Laid {
            total: shown.total,
            own: 0,
            more: false,
            undo: Undo {
                total: shown.total,
                ..Undo::default()
            },
        }
    }
}

/// The data blocks that are shown in a window of regions.
struct Shown<'a> {
    /// Those of the base: disjoint ranges of blocks, in order.
    data: &'a [(u64, u64)],
    /// Regions that layers know.
    regions: BTreeMap<u32, Bits>,
    /// Other regions that are zero, whatever the base has.
    zeros: Ranges,
    total: u64,
}

impl Shown<'_> {
    fn of_base<'a>(data: &'a [(u64, u64)], window: &Range<u32>) -> Shown<'a> {
        Shown {
            data,
            regions: BTreeMap::new(),
            zeros: Ranges::default(),
            total: within(data, first_block(window.start), first_block(window.end)),
        }
    }
    fn zeroed(&self, region: u32) -> bool {
        self.zeros.get(region).is_some()
    }
    fn bits(&self, region: u32) -> Bits {
        match self.regions.get(&region) {
            Some(bits) => *bits,
            None if self.zeroed(region) => [0; WORDS],
            None => base_bits(self.data, region),
        }
    }
    /// Data blocks of some regions.
    fn count(&self, start: u32, end: u32) -> u64 {
        let mut at = start;
        let mut total = 0;
        let base = |from, to| within(self.data, first_block(from), first_block(to));
        for (from, to) in self.zeros.iter_from(start) {
            if from >= end {
                break;
            }
            total += base(at, from.max(at));
            at = to.min(end).max(at);
        }
        total += base(at, end);
        for (&region, bits) in self.regions.range(start..end) {
            if !self.zeroed(region) {
                // Counted above, though it is not the base that is seen here.
                total -= base(region, region + 1);
            }
            total += ones(bits);
        }
        total
    }
    /// Lays a layer over it. What is not kept is only counted: then nothing stands on it. After an error all is as it was.
    fn lay(&mut self, layer: &ReadLayer, window: &Range<u32>, keep: bool) -> Result<Laid> {
        let mut laid = Laid::nothing(self);
        for item in layer.items(Region(window.start)) {
            let item = match item {
                Ok(item) => item,
                Err(e) => {
                    self.take_back(laid.undo);
                    return Err(e);
                }
            };
            if item.start() >= window.end {
                laid.more = true;
                break;
            }
            match item {
                Item::Region(region, map) => {
                    let before = self.bits(region.0);
                    let after = over(&map, &before);
                    laid.total = (laid.total + ones(&after)).saturating_sub(ones(&before));
                    laid.own += map.counts().0;
                    if keep {
                        let old = self.regions.insert(region.0, after);
                        laid.undo.regions.push((region.0, old));
                    }
                }
                Item::Zeros(region, n) => {
                    let end = (region.0 + n).min(window.end);
                    laid.more |= region.0 + n > window.end;
                    laid.total = laid.total.saturating_sub(self.count(region.0, end));
                    if keep {
                        self.zero(region.0, end, &mut laid.undo);
                    }
                }
            }
        }
        Ok(laid)
    }
    fn zero(&mut self, start: u32, end: u32, undo: &mut Undo) {
        undo.zeros.get_or_insert_with(|| self.zeros.clone());
        self.zeros.insert(start, end, 0);
        let covered: Vec<u32> = self.regions.range(start..end).map(|(&r, _)| r).collect();
        for region in covered {
            let old = self.regions.remove(&region);
            undo.regions.push((region, old));
        }
    }
    fn take_back(&mut self, undo: Undo) {
        for (region, bits) in undo.regions.into_iter().rev() {
            match bits {
                Some(bits) => self.regions.insert(region, bits),
                None => self.regions.remove(&region),
            };
        }
        if let Some(zeros) = undo.zeros {
            self.zeros = zeros;
        }
        self.total = undo.total;
    }
}

/// Lays a layer over what is shown.
fn lay(
    store: &Store,
    id: Id,
    shown: &mut Shown<'_>,
    window: &Range<u32>,
    keep: bool,
) -> Result<Laid> {
    let mut tries = 0;
    loop {
        let file = store.layers_dir().open(&layer_file(id), Access::Read);
        let layer = file.and_then(ReadLayer::open);
        match layer.and_then(|layer| shown.lay(&layer, window, keep)) {
            // Its writer may have put a checkpoint in between.
            Err(_) if tries < TRIES => tries += 1,
            other => return other,
        }
    }
}

/// First block of a region.
fn first_block(region: u32) -> u64 {
    u64::from(region) * REGION_BLOCKS as u64
}

fn ones(bits: &Bits) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The data blocks of a region whose map lies over `before`.
fn over(map: &RegionMap, before: &Bits) -> Bits {
    let mut bits = [0; WORDS];
    for (index, pointer) in map.iter() {
        if let Pointer::Data { .. } = pointer {
            bits[index / 64] |= 1 << (index % 64);
        }
    }
    if !map.fill() {
        for ((bits, before), present) in bits.iter_mut().zip(before).zip(map.present()) {
            *bits |= before & !present;
        }
    }
    bits
}

/// The data blocks of a base in a region.
fn base_bits(data: &[(u64, u64)], region: u32) -> Bits {
    let (start, end) = (first_block(region), first_block(region + 1));
    let first = data.partition_point(|&(_, e)| e <= start);
    let mut bits = [0; WORDS];
    for &(s, e) in data[first..].iter().take_while(|&&(s, _)| s < end) {
        for block in s.max(start) - start..e.min(end) - start {
            bits[block as usize / 64] |= 1u64 << (block % 64);
        }
    }
    bits
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

/// Ranges of blocks of a base that hold data: disjoint, in order.
pub(super) fn data_blocks(store: &Store, id: Id) -> Result<Vec<(u64, u64)>> {
    let base = match store.base(id) {
        Ok(base) => base,
        // It cannot be read, so nothing of it can be shown to be a hole: looking goes on.
        Err(e) if e.kind() == Kind::Corrupt => {
            return Ok(vec![(0, crate::units::blocks(store.base_meta(id)?.len))]);
        }
        Err(e) => return Err(e),
    };
    data_blocks_of(&**base.file(), 0, base.len())
}
