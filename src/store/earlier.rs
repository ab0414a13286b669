//! The part of a disk's history that is in layers which were its own before they were sealed.
//!
//! Always true:
//! - the record of the disk's name says down to which layer the history is its own. What a sealed layer keeps that no such record leads to is garbage;
//! - a history costs what was replaced, and no more: it has no part in a layer, or above one, that nobody else needs. Else blocks would stay that only the
//!   history shows, and that no limit counts;
//! - numbers of commits rise from layer to layer: a layer that goes on with the history of the one below begins with the number after its last;
//! - what a sealed layer keeps of a history is changed under the lock of the names, by whoever has the disk open for writing, or where nobody has.

use super::graph::Graph;
use super::history::{LIMITS, Point};
use super::names::{self, NameRecord};
use super::{Below, Object, ObjectKind, Store, layer_file, many, names_lock_if_free, parent_of};
use crate::disk::CowDisk;
use crate::disk::cow::MAX_REWIND;
use crate::error::{Kind, Result};
use crate::format::{CommitEntry, MAX_DEPTH, Pointer, Superblock};
use crate::io::{Access, Dir, File};
use crate::layer::history::{Lower, Segment, Stays, segments};
use crate::layer::{ReadLayer, State, prune, read_header, recover};
use crate::map::undo::Undo;
use crate::map::{Item, Items, merge};
use crate::sync::Mutex;
use crate::units::{BLOCK, Id, Lba, REGION_BLOCKS, Region};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
// Hints: no order depends on them.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Line of a disk's record: the lowest layer with a part of its history.
const PAST: &str = "past";
/// Sealed layers that keep a part of one history at most: the oldest go first. Others are joined where there are many.
pub const MAX_EARLIER: usize = 128;
/// Behind every point.
const ALL: u64 = u64::MAX - 1;
/// Layers of which something goes in one go of the housekeeping: other commands wait for that.
const AT_ONCE: usize = 8;
/// What is given up on a full host disk at least, if there is as much.
const WORTH: u64 = 16 << 20;
/// How often, and how long each time, whoever needs room waits for a command that changes names.
const TRIES: u32 = 40;
const WAIT: Duration = Duration::from_millis(5);

/// A layer with a part of a history.
struct Earlier {
    id: Id,
    superblock: Superblock,
    file: Arc<dyn File>,
}

impl Earlier {
    fn segments(&self) -> Result<VecDeque<Segment>> {
        // Where the chain of them is broken, what lies behind is lost.
        Ok(segments(&*self.file, &self.superblock)?.segments)
    }
}

/// A sealed layer, if it keeps a part of a history, and what it stands on.
fn earlier(layers: &dyn Dir, id: Id) -> Result<Option<(Earlier, Below)>> {
    let file = layers.open(&layer_file(id), Access::Read)?;
    let header = read_header(&*file)?;
    let superblock = recover::superblock(&*file, &header)?.superblock;
    let is = State::of(&superblock) == State::Sealed && superblock.has_history();
    let found = Earlier {
        id,
        superblock,
        file,
    };
    Ok(is.then(|| (found, parent_of(&header))))
}

/// What the layer `own` stands on, if that is a sealed layer that keeps a part of a history.
fn below(layers: &dyn Dir, own: Id) -> Result<Option<(Earlier, Below)>> {
    let file = layers.open(&layer_file(own), Access::Read)?;
    match parent_of(&read_header(&*file)?) {
        Below::Layer(id) => earlier(layers, id),
        Below::Base(_) => Ok(None),
    }
}

/// Of a disk whose history is also in sealed layers: its own layer, and the lowest of these.
fn leads(record: &NameRecord) -> Option<(Id, Id)> {
    record.extra.get(LIMITS)?;
    let lowest = record.extra.get(PAST).and_then(Id::parse)?;
    Some((record.target.id(), lowest))
}

/// The sealed layers below `own` that keep parts of a history, down to `lowest`, the newest first; and whether they could all be read.
fn walk(layers: &dyn Dir, own: Id, lowest: Id) -> (Vec<Earlier>, bool) {
    let mut found: Vec<Earlier> = Vec::new();
    let mut next = below(layers, own);
    while found.len() < MAX_DEPTH as usize {
        match next {
            Ok(Some((layer, parent))) => {
                next = match parent {
                    Below::Layer(id) if layer.id != lowest => earlier(layers, id),
                    _ => Ok(None),
                };
                found.push(layer);
            }
            Ok(None) => break,
            Err(e) => {
                tracing::debug!("a part of the history cannot be read: {e}");
                return (found, false);
            }
        }
    }
    (found, true)
}

/// Lets go of what a sealed layer keeps of a history before point `number`; returns the host bytes. The names lock is held.
fn forget(layers: &dyn Dir, id: Id, number: u64) -> Result<u64> {
    let file = layers.open(&layer_file(id), Access::Write)?;
    let header = read_header(&*file)?;
    prune::forget_history(&*file, &header, number)
}

impl Store {
    /// The sealed layers that keep a part of the history of the disk with this record, the newest first. What cannot be read ends them.
    pub(super) fn earlier(&self, record: &NameRecord) -> Vec<Id> {
        let earlier = self.earlier_layers(record).0;
        earlier.into_iter().map(|earlier| earlier.id).collect()
    }
    /// And whether these are all, as far as can be told.
    fn earlier_layers(&self, record: &NameRecord) -> (Vec<Earlier>, bool) {
        match leads(record) {
            Some((own, lowest)) => walk(&*self.layers, own, lowest),
            None => (Vec::new(), true),
        }
    }
    /// Does a sealed layer keep a part of a history?
    pub(super) fn keeps_a_past(&self, id: Id) -> Result<bool> {
        Ok(earlier(&*self.layers, id)?.is_some())
    }
    /// What sealed layers keep of the history of the disk with this record, if it goes on from there. Nothing is looked at: whoever asks may hold up the
    /// users of the disk.
    pub(super) fn goes_on(&self, record: &NameRecord) -> Option<Arc<dyn Lower>> {
        let (own, lowest) = leads(record)?;
        Some(Arc::new(Earliest {
            root: self.root.clone(),
            layers: self.layers.clone(),
            own,
            lowest,
            known: Mutex::new(None),
            held: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        }))
    }
    /// The record of a disk whose own layer is to be sealed, for the layer above that.
    pub(super) fn note_earlier(&self, record: &mut NameRecord) {
        let past = match (record.extra.get(LIMITS), leads(record)) {
            (None, _) => None,
            // As far as there are any: how far down is known.
            (Some(_), Some((own, lowest))) if !matches!(below(&*self.layers, own), Ok(None)) => {
                Some(lowest)
            }
            (Some(_), _) => Some(record.target.id()),
        };
        record.extra.set(PAST, past.map(|id| id.to_string()));
    }
    /// Takes from a record what it says of earlier layers; returns these. They are to be given to [`Store::forget_earlier`] when that is durable.
    pub(super) fn leave_earlier(&self, record: &mut NameRecord) -> Vec<Id> {
        let earlier = self.all_earlier(record);
        record.extra.set(PAST, None);
        earlier
    }
    /// The sealed layers that keep a part of a disk's history, also its own if a snapshot was interrupted; the newest first.
    pub(super) fn all_earlier(&self, record: &NameRecord) -> Vec<Id> {
        let own = record.target.id();
        let sealed = matches!(self.keeps_a_past(own), Ok(true));
        let mut all: Vec<Id> = sealed.then_some(own).into_iter().collect();
        all.extend(self.earlier(record));
        all
    }
    /// Which disks have a part of their history in these layers.
    pub fn histories_in(&self, among: &[Below]) -> Result<Vec<Object>> {
        let _lock = self.lock(false)?;
        let mut found = Vec::new();
        for (name, record) in self.with_a_past()? {
            let mut earlier = self.earlier(&record).into_iter();
            if earlier.any(|id| among.contains(&Below::Layer(id))) {
                found.push(self.object(&name)?);
            }
        }
        Ok(found)
    }
    /// All disks whose history is also in sealed layers, with their records. What cannot be read is left out.
    fn with_a_past(&self) -> Result<Vec<(String, NameRecord)>> {
        let all = self.all_names()?;
        let records = many::each(&all, |name| names::read_name(&*self.names, name));
        let records = all.into_iter().zip(records);
        let found = records.filter_map(|(name, record)| Some((name, record.ok()?)));
        Ok(found
            .filter(|(_, record)| leads(record).is_some())
            .collect())
    }
    /// The layers that keep parts of the histories of other disks than that called `name`, and which disks these are.
    pub(super) fn of_other_histories(&self, name: &str) -> Result<HashMap<Id, String>> {
        let mut others = self.with_a_past()?;
        others.retain(|(other, _)| other != name);
        let layers = others.iter().flat_map(|(name, record)| {
            let earlier = self.earlier(record).into_iter();
            earlier.map(|id| (id, name.clone()))
        });
        Ok(layers.collect())
    }
    /// All layers with parts of the histories that end if these layers are replaced by others.
    pub(super) fn histories_through(&self, replaced: &[Id]) -> Result<Vec<Below>> {
        let _lock = self.lock(false)?;
        let mut all = Vec::new();
        for (_, record) in self.with_a_past()? {
            let earlier = self.earlier(&record);
            if earlier.iter().any(|id| replaced.contains(id)) {
                all.extend(earlier.into_iter().map(Below::Layer));
            }
        }
        Ok(all)
    }
    /// Lets go of what these layers keep of a history that is nobody's any more; returns the host bytes. What cannot be done is left to `gc`. The names lock
    /// is held.
    pub(super) fn forget_earlier(&self, layers: &[Id]) -> u64 {
        let mut bytes = 0;
        // The oldest first.
        for id in layers.iter().rev() {
            match forget(&*self.layers, *id, ALL) {
                Ok(more) => bytes += more,
                // It went with the rest.
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) => tracing::warn!(layer = %id, "its history is left to `forkdisk gc`: {e}"),
            }
        }
        bytes
    }
    /// Host bytes that the history in these layers occupies.
    pub(super) fn earlier_bytes(&self, layers: &[Id]) -> u64 {
        bytes_of(&*self.layers, layers.iter())
    }
    /// The layers of which a part of a history goes, since they, or the layers that they stand on, have lost their names, and nothing else stands on these; the
    /// newest first. `gone`: disks of which nobody asks; `left`: layers that nobody can give the name again that they call themselves. The names lock is held.
    pub(super) fn ended(
        &self,
        graph: &Graph,
        gone: &HashSet<Below>,
        left: &HashSet<Below>,
    ) -> Result<Vec<Id>> {
        let mut ended = Vec::new();
        if graph.unreadable {
            return Ok(ended);
        }
        let alone = |below: Below| {
            let named = graph
                .names
                .get(&below)
                .is_some_and(|names| !names.is_empty());
            let others = graph.children.get(&below).map_or(0, Vec::len) > 1;
            matches!(below, Below::Layer(_))
                && !named
                && !others
                && (left.contains(&below) || self.label_of(below.id()).is_none())
        };
        let parent = |below: Below| graph.nodes.get(&below).and_then(|node| node.parent);
        for (_, record) in self.with_a_past()? {
            // Most have nothing of the kind, which the graph knows.
            let down = std::iter::successors(parent(record.target), |below| parent(*below));
            if gone.contains(&record.target) || !down.take(MAX_DEPTH as usize).any(alone) {
                continue;
            }
            let earlier = self.earlier(&record);
            let ends = earlier.iter().position(|id| {
                let layer = Below::Layer(*id);
                alone(layer) || parent(layer).is_some_and(alone)
            });
            ended.extend(ends.into_iter().flat_map(|first| earlier[first..].to_vec()));
        }
        Ok(ended)
    }
    /// Ends the history of a disk before its own layer: that below was sealed for a reader, who needs it for a while only. `running`: who has the disk open. The
    /// names lock is held.
    pub(super) fn end_before(&self, disk: &str, running: Option<&CowDisk>) {
        // The state that was asked for is there all the same, and what is left is garbage.
        if let Err(e) = self.try_end_before(disk, running) {
            tracing::warn!(disk, "its history is left to `forkdisk gc`: {e}");
        }
    }
    fn try_end_before(&self, disk: &str, running: Option<&CowDisk>) -> Result<()> {
        let mut record = names::read_name(&*self.names, disk)?;
        let earlier = self.leave_earlier(&mut record);
        if earlier.is_empty() {
            return Ok(());
        }
        let (temporary, file) = names::stage(&*self.names, disk, &record.encode(disk))?;
        file.sync()?;
        self.names.rename(&temporary, disk)?;
        self.names.sync()?;
        self.forget_earlier(&earlier);
        if let Some(running) = running {
            running.look_back_again();
        }
        Ok(())
    }
    /// Lets go of, or counts, what sealed layers `among` others keep of histories that are nobody's any more. The names lock is held, and the names are synced.
    pub(super) fn collect_histories(
        &self,
        graph: &Graph,
        among: impl Fn(Id) -> bool,
        dry_run: bool,
    ) -> Result<(u64, Vec<Id>)> {
        let mut claimed: HashSet<Id> = HashSet::new();
        for name in self.all_names()? {
            let record = match names::read_name(&*self.names, &name) {
                Ok(record) => record,
                // It may be anybody's.
                Err(e) if e.kind() == Kind::Corrupt => return Ok((0, Vec::new())),
                Err(e) => return Err(e),
            };
            if record.kind == ObjectKind::Disk {
                // Also that of a disk whose snapshot was interrupted.
                claimed.insert(record.target.id());
                let (layers, all) = self.earlier_layers(&record);
                if !all {
                    tracing::warn!(
                        disk = name,
                        "what the disk stands on cannot be read: nothing is done about what is left of histories"
                    );
                    return Ok((0, Vec::new()));
                }
                claimed.extend(layers.iter().map(|layer| layer.id));
            }
        }
        for id in self.ended(graph, &HashSet::new(), &HashSet::new())? {
            claimed.remove(&id);
        }
        let (mut bytes, mut shrunk) = (0, Vec::new());
        for (file, _) in self.layers.list()? {
            let id = file.strip_suffix(".layer").and_then(Id::parse);
            let Some(id) = id.filter(|id| !claimed.contains(id) && among(*id)) else {
                continue;
            };
            let Ok(Some((found, _))) = earlier(&*self.layers, id) else {
                continue;
            };
            let held = found.superblock.history_blocks.get() * BLOCK;
            let freed = match dry_run {
                true => held,
                // One of which nothing can be given back is no reason to leave the others.
                false => forget(&*self.layers, id, ALL).unwrap_or_else(|e| {
                    tracing::warn!(layer = %id, "its part of a history stays: {e}");
                    0
                }),
            };
            if freed > 0 {
                bytes += freed;
                shrunk.push(id);
            }
        }
        Ok((bytes, shrunk))
    }
}

// ---- points -------------------------------------------------------------------------------------------------------

/// A point, and the layer that shows it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub layer: Id,
    pub point: Point,
}

/// What has changed since a point.
pub(super) struct Since {
    /// So many blocks.
    pub blocks: u64,
    /// What the layer that keeps the point said of each of these then; `None` where there are too many to go back in one step.
    pub undo: Option<Undo>,
}

impl Store {
    /// The points of the disk with this record, whose own layer is `own`, the oldest first.
    pub(super) fn places(&self, record: &NameRecord, own: &ReadLayer) -> Result<Vec<Place>> {
        let mut places: Vec<Place> = Vec::new();
        let mut add = |layer: Id, points: Vec<Point>| {
            for point in points {
                match places.last_mut() {
                    // Each layer begins with what the one below ended with.
                    Some(last) if last.point.number == point.number => last.layer = layer,
                    Some(last) if last.point.number > point.number => {}
                    _ => places.push(Place { layer, point }),
                }
            }
        };
        for id in self.earlier(record).into_iter().rev() {
            add(id, self.layer_now(id)?.points()?);
        }
        add(own.id(), own.points()?);
        // What was never written shows what the layer below ended with.
        if !own.has_history()
            && own.counts() == (0, 0)
            && let Some(last) = places.last_mut()
        {
            last.layer = own.id();
        }
        Ok(places)
    }
    /// What has changed since a point of the disk whose own layer is `own`, and the layer that keeps the point. If not `all` are to be counted, no more than
    /// tell that there are too many.
    pub(super) fn since(
        &self,
        record: &NameRecord,
        own: &ReadLayer,
        place: &Place,
        all: bool,
    ) -> Result<Since> {
        let number = place.point.number;
        let few = |undo: Undo| Since {
            blocks: undo.blocks(),
            undo: Some(undo).filter(|undo| undo.blocks() <= MAX_REWIND),
        };
        if place.layer == own.id() {
            return own.undone_to(number).map(few);
        }
        let then = self.layer_now(place.layer)?;
        then.must_have(number)?;
        let between: Vec<Id> = self.earlier(record);
        let between = between.into_iter().take_while(|id| *id != place.layer);
        let between = between
            .map(|id| self.layer_now(id))
            .collect::<Result<Vec<_>>>()?;
        let mut undo = then.undone_to(number)?;
        // As it was said of the layer then, so it stays of what has not changed in it since.
        let above: Vec<&ReadLayer> = std::iter::once(own).chain(&between).collect();
        let mut blocks = undo.blocks();
        each_range(&above, |start, end| {
            let gaps = undo.gaps(start, end);
            blocks += gaps.iter().map(|(from, to)| to - from).sum::<u64>();
            Ok(all || blocks <= MAX_REWIND)
        })?;
        if blocks > MAX_REWIND {
            return Ok(Since { blocks, undo: None });
        }
        each_range(&above, |start, end| {
            add_said(&then, start, end, &mut undo).map(|()| true)
        })?;
        Ok(Since {
            blocks,
            undo: Some(undo),
        })
    }
}

/// Calls `f` with ranges of blocks of which any of these layers says something, in order, as long as it says so.
fn each_range(layers: &[&ReadLayer], mut f: impl FnMut(u64, u64) -> Result<bool>) -> Result<()> {
    let mut held: Option<(u64, u64)> = None;
    let mut add = |start: u64, end: u64| match &mut held {
        Some(last) if last.1 == start => {
            last.1 = end;
            Ok(true)
        }
        _ => held
            .replace((start, end))
            .map_or(Ok(true), |(start, end)| f(start, end)),
    };
    let sources = layers
        .iter()
        .map(|l| Box::new(l.items(Region(0))) as Items<'_>);
    for item in merge(sources.collect()) {
        let go_on = match item? {
            Item::Zeros(region, n) => add(first(region.0), first(region.0 + n))?,
            Item::Region(region, map) if map.fill() => add(first(region.0), first(region.0 + 1))?,
            Item::Region(region, map) => {
                let mut go_on = true;
                for (index, _) in map.iter() {
                    let block = first(region.0) + index as u64;
                    go_on = go_on && add(block, block + 1)?;
                }
                go_on
            }
        };
        if !go_on {
            return Ok(());
        }
    }
    held.map_or(Ok(()), |(start, end)| f(start, end).map(drop))
}

fn first(region: u32) -> u64 {
    u64::from(region) * REGION_BLOCKS as u64
}

/// Adds what a layer says of blocks `start` to before `end`. Past its end the disk has grown since: there it showed nothing.
fn add_said(layer: &ReadLayer, start: u64, end: u64, undo: &mut Undo) -> Result<()> {
    let size = layer.size() / BLOCK;
    let mut add = |from: u64, to: u64, pointer: Pointer| {
        let mut at = from;
        while at < to {
            let n = (to - at).min(1 << 31);
            undo.add(&CommitEntry::new(Lba(at as u32), n as u32, pointer));
            at += n;
        }
    };
    add(start.max(size), end, Pointer::Zero);
    let end = end.min(size);
    let mut at = start;
    for item in layer.items(Region((start / REGION_BLOCKS as u64) as u32)) {
        let item = item?;
        let (from, to) = (first(item.start()), first(item.end()));
        if from >= end {
            break;
        }
        add(at, from.min(end), Pointer::Absent);
        let (from, to) = (from.max(start), to.min(end));
        match item {
            Item::Zeros(..) => add(from, to, Pointer::Zero),
            Item::Region(region, map) => {
                for block in from..to {
                    add(
                        block,
                        block + 1,
                        map.get((block - first(region.0)) as usize),
                    );
                }
            }
        }
        at = at.max(to);
    }
    add(at, end, Pointer::Absent);
    Ok(())
}

fn bytes_of<'a>(layers: &dyn Dir, ids: impl Iterator<Item = &'a Id>) -> u64 {
    let held = |id: &Id| match earlier(layers, *id) {
        Ok(Some((found, _))) => found.superblock.history_blocks.get() * BLOCK,
        _ => 0,
    };
    ids.map(held).sum()
}

// ---- what goes ----------------------------------------------------------------------------------------------------

/// What is known of a part of a history without looking at it again.
struct Known {
    id: Id,
    /// The last commit of what goes as a whole, when that was made, and host bytes; the oldest first.
    parts: VecDeque<(u64, u64, u64)>,
}

impl Known {
    fn of(layer: &Earlier) -> Result<Known> {
        let part = |s: &Segment| {
            let bytes = (s.blocks + u64::from(s.slots)) * BLOCK;
            (s.commits.1, s.last_time, bytes)
        };
        Ok(Known {
            id: layer.id,
            parts: layer.segments()?.iter().map(part).collect(),
        })
    }
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.2).sum()
    }
}

/// What sealed layers keep of the history of a disk that is open for writing.
struct Earliest {
    root: Arc<dyn Dir>,
    layers: Arc<dyn Dir>,
    /// The layer that the disk writes into, and the lowest of those that keep a part of its history.
    own: Id,
    lowest: Id,
    /// The oldest layer first; `None`: nobody has looked yet.
    known: Mutex<Option<VecDeque<Known>>>,
    /// Bytes of what is known.
    held: AtomicU64,
    /// Nothing could be given up the last time.
    stuck: AtomicBool,
}

impl Earliest {
    /// What is known, looked up if nobody has yet. What cannot be read whole is taken for nothing, and looked up the next time.
    fn with<R: Default>(&self, f: impl FnOnce(&mut VecDeque<Known>) -> R) -> R {
        let mut known = self.known.lock();
        if known.is_none() {
            let (mut layers, all) = walk(&*self.layers, self.own, self.lowest);
            layers.reverse();
            let found: Result<VecDeque<Known>> = layers.iter().map(Known::of).collect();
            *known = found.ok().filter(|_| all);
        }
        let done = known.as_mut().map(f).unwrap_or_default();
        let held = known.iter().flatten().map(Known::bytes).sum();
        self.held.store(held, Relaxed);
        done
    }
    /// Lets go of the oldest part, in at most so many layers, as long as `goes` says so of its time and of the bytes of all; or if there are too many layers. The names lock is
    /// held. Returns the bytes.
    fn let_go(&self, most: usize, goes: impl Fn(u64, u64) -> bool) -> u64 {
        let mut freed = 0;
        for _ in 0..most {
            match self.with(|layers| self.let_go_of_first(layers, &goes)) {
                Some(bytes) => freed += bytes,
                None => break,
            }
        }
        freed
    }
    /// The same in the lowest layer; `None` if there is nothing more to be done.
    fn let_go_of_first(
        &self,
        layers: &mut VecDeque<Known>,
        goes: impl Fn(u64, u64) -> bool,
    ) -> Option<u64> {
        let mut left: u64 = layers.iter().map(Known::bytes).sum();
        let many = layers.len() > MAX_EARLIER;
        let layer = layers.front_mut()?;
        let (mut upto, mut parts) = (None, 0);
        for (number, time, bytes) in &layer.parts {
            if !(many || goes(*time, left)) {
                break;
            }
            left = left.saturating_sub(*bytes);
            upto = Some(*number);
            parts += 1;
        }
        // What it ended with is what the layer above began with.
        let whole = parts == layer.parts.len();
        let number = if whole { ALL } else { upto? };
        let freed = match forget(&*self.layers, layer.id, number) {
            Ok(freed) => freed,
            // It went with the rest.
            Err(e) if e.kind() == Kind::NotFound => 0,
            Err(e) => {
                tracing::warn!(layer = %layer.id, "its part of a history is not given up: {e}");
                if e.kind() == Kind::NoSpace || e.of_resources() {
                    self.stuck.store(true, Relaxed);
                    return None;
                }
                // `check` tells of the damage, and those above it need not wait.
                layers.pop_front();
                return Some(0);
            }
        };
        self.stuck.store(false, Relaxed);
        drop(layer.parts.drain(..parts));
        if whole {
            layers.pop_front();
        }
        Some(freed)
    }
}

impl Lower for Earliest {
    fn bytes(&self) -> u64 {
        self.with(|layers| layers.iter().map(Known::bytes).sum())
    }
    fn expire(&self, stays: Stays) {
        let old = |time: u64, limit: Option<u64>| limit.is_some_and(|limit| time <= limit);
        let (due, over) = self.with(|layers| {
            let held: u64 = layers.iter().map(Known::bytes).sum();
            // One without a part was let go of by somebody who died, or has only what the next one begins with.
            let late = layers.front().is_some_and(|layer| {
                let first = layer.parts.front();
                first.is_none_or(|part| old(part.1, stays.late))
            });
            let parts = layers.iter().flat_map(|layer| &layer.parts);
            let gone = parts.take_while(|part| old(part.1, stays.since));
            let gone: u64 = gone.map(|part| part.2).sum();
            let over = held > stays.room;
            let much = gone > 0 && gone >= WORTH.max(held / 8);
            (late || much || over || layers.len() > MAX_EARLIER, over)
        });
        if !due {
            return;
        }
        match names_lock_if_free(&*self.root) {
            Ok(None) => {}
            Ok(Some(_lock)) => {
                let room = if over { stays.left } else { stays.room };
                self.let_go(AT_ONCE, |time, left| old(time, stays.since) || left > room);
            }
            Err(e) => tracing::warn!("nothing of a history goes: {e}"),
        }
    }
    fn yield_oldest(&self) -> bool {
        if self.bytes() == 0 {
            return false;
        }
        let mut tries = 0;
        let _lock = loop {
            match names_lock_if_free(&*self.root) {
                Ok(Some(lock)) => break lock,
                Ok(None) if tries < TRIES => tries += 1,
                Ok(None) | Err(_) => return false,
            }
            std::thread::sleep(WAIT);
        };
        // Until there is something: what is known may have gone otherwise.
        loop {
            let held = self.bytes();
            let stays = match held / 2 {
                half if half < WORTH => 0,
                half => half,
            };
            let freed = self.let_go(usize::MAX, |_, left| left > stays);
            if freed > 0 {
                tracing::warn!(
                    "the host disk is full: {freed} bytes of the history before the last snapshot go"
                );
                return true;
            }
            if self.bytes() == held || held == 0 {
                return false;
            }
        }
    }
    fn goes_first(&self) -> bool {
        self.held.load(Relaxed) > 0 && !self.stuck.load(Relaxed)
    }
    fn look_again(&self) {
        *self.known.lock() = None;
        self.held.store(0, Relaxed);
    }
}
