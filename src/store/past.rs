//! A disk made from what another was at a point of its history, also while that is attached and written to.
//!
//! Always true: what is copied is one state. Of a disk that somebody writes into, a part of the map counts only if its superblock was the same before and
//! after it was read; and the data that it names stays in its place as long as the writer holds the point.

use super::earlier::Place;
use super::history::{At, Point, no_disk};
use super::names::{Extra, NameRecord, check_part, stage};
use super::objects::{NewLayer, disk_size, taken};
use super::quota::settings_on;
use super::{
    Below, LifeWritten, Object, ObjectKind, Progress, Store, in_use, layer_file, parent_of,
};
use crate::chain::Chain;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::io::{Access, File};
use crate::layer::{self, Layer, ReadLayer};
use crate::map::Item;
use crate::map::undo::Undo;
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, MAX_DISK, REGION_BLOCKS, Region, Slot};
use std::sync::Arc;

/// Blocks copied in one go.
const PIECE: usize = 256;
/// Ranges of the map that are read in one go.
const PART: usize = 1 << 13;
/// How often a part is read again that a checkpoint of the writer came between.
const TRIES: u32 = 1000;

/// A fork of the past.
#[derive(Clone, Copy, Debug)]
pub struct PastFork<'a> {
    /// The new disk.
    pub name: &'a str,
    /// The disk that keeps its history.
    pub from: &'a str,
    /// The point.
    pub at: At,
    /// Bytes of the new disk, if not as many as the other has.
    pub size: Option<u64>,
    /// Settings of the new disk.
    pub settings: &'a Extra,
}

/// Whoever has a disk open for writing while its past is read.
pub trait Owner {
    /// Keeps a point of the disk's own layer until [`Owner::let_go`]; [`Kind::NotFound`] if it is gone.
    fn hold(&mut self, layer: Id, point: u64) -> Result<()>;
    /// Keeps it no longer.
    fn let_go(&mut self);
}

/// A state of the past that is read.
pub(super) struct Past {
    pub object: Object,
    pub point: Point,
    file: Arc<dyn File>,
    id: Id,
    pub parent: Below,
    pub rank: u32,
    /// Somebody writes into the disk.
    busy: bool,
    /// Nobody does as long as this is open.
    #[expect(dead_code, reason = "held for its lock")]
    held: Option<Arc<dyn File>>,
    /// Whoever writes keeps the point.
    kept: bool,
    /// The layer as it was when it was last looked at, and what leads back from there.
    seen: (ReadLayer, Undo),
}

/// Blocks that are alike, or neighbours in the file: from, to, and what the first one was.
type Ranges = Vec<(u64, u64, Pointer)>;

impl Past {
    /// A past that `layer` keeps, as long as `file` is open; if it is `busy`, only as long as nobody lets go of it.
    fn new(
        object: Object,
        file: Arc<dyn File>,
        layer: ReadLayer,
        point: Point,
        busy: bool,
    ) -> Result<Past> {
        let header = *layer.header();
        let undo = match busy {
            // It is looked at when it is needed.
            true => Undo::default(),
            false => layer.undone_to(point.number)?,
        };
        let mut past = Past {
            id: layer.id(),
            parent: parent_of(&header),
            rank: header.depth.get(),
            object,
            point,
            file,
            busy,
            held: None,
            kept: false,
            seen: (layer, undo),
        };
        if busy {
            past.look_again()?;
        }
        Ok(past)
    }
    /// Blocks that have changed since.
    pub fn changed(&self) -> u64 {
        self.seen.1.blocks()
    }
    fn look_again(&mut self) -> Result<()> {
        let mut tries = 0;
        loop {
            let look = || -> Result<Option<(ReadLayer, Undo)>> {
                let layer = ReadLayer::open(self.file.clone())?;
                layer.must_have(self.point.number)?;
                let undo = layer.undone_to(self.point.number)?;
                Ok(layer.is_current()?.then_some((layer, undo)))
            };
            tries += 1;
            match look() {
                Ok(Some(seen)) => {
                    self.seen = seen;
                    return Ok(());
                }
                Ok(None) if tries >= TRIES => return Err(too_busy(&self.object.name)),
                Err(e) if tries >= TRIES || e.kind() == Kind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    /// What the layer said from block `from` on, and where that ends; none at its end.
    fn part(&mut self, from: u64) -> Result<(Ranges, Option<u64>)> {
        let mut tries = 0;
        loop {
            let found = self.read_part(from);
            tries += 1;
            if !self.busy || found.is_ok() && self.seen.0.is_current()? {
                return found;
            }
            if tries >= TRIES {
                return found.and_then(|_| Err(too_busy(&self.object.name)));
            }
            self.look_again()?;
        }
    }
    fn read_part(&self, from: u64) -> Result<(Ranges, Option<u64>)> {
        let (layer, undo) = &self.seen;
        let mut ranges = Vec::new();
        let mut end = None;
        for item in layer.items(Region((from / REGION_BLOCKS as u64) as u32)) {
            let behind = match item? {
                Item::Zeros(region, n) => {
                    let start = (u64::from(region.0) * REGION_BLOCKS as u64).max(from);
                    let behind = (u64::from(region.0) + u64::from(n)) * REGION_BLOCKS as u64;
                    let gaps = undo.gaps(start, behind);
                    ranges.extend(gaps.into_iter().map(|(a, b)| (a, b, Pointer::Zero)));
                    behind
                }
                Item::Region(region, map) => {
                    let start = u64::from(region.0) * REGION_BLOCKS as u64;
                    let behind = start + REGION_BLOCKS as u64;
                    for block in undo.gaps(start, behind).into_iter().flat_map(|(a, b)| a..b) {
                        match map.get((block - start) as usize) {
                            Pointer::Absent => {}
                            pointer => ranges.push((block, block + 1, pointer)),
                        }
                    }
                    behind
                }
            };
            if ranges.len() >= PART {
                end = Some(behind);
                break;
            }
        }
        let until = end.unwrap_or(MAX_DISK / BLOCK);
        ranges.extend(undo.within(from, until));
        ranges.sort_unstable_by_key(|&(start, _, _)| start);
        Ok((ranges, end))
    }
}

impl Store {
    /// [`Store::create_at_with`] of a disk at rest.
    pub fn create_at(
        &self,
        name: &str,
        from: &str,
        at: At,
        size: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<Object> {
        let fork = PastFork {
            name,
            from,
            at,
            size,
            settings: &Extra::default(),
        };
        self.create_at_with(&fork, None, progress)
    }
    /// Makes a disk from what another was at a point of its history. That stays as it is; if it is open for writing, `owner` is who has it open.
    pub fn create_at_with(
        &self,
        fork: &PastFork<'_>,
        mut owner: Option<&mut (dyn Owner + '_)>,
        progress: &dyn Progress,
    ) -> Result<Object> {
        let name = fork.name;
        check_part(name)?;
        let mut past = match &mut owner {
            None => {
                let _lock = self.lock(false)?;
                self.past_at_rest(fork.from, fork.at)?
            }
            // Without the lock of the names: who holds the point may be waiting for that.
            Some(owner) => self.past_held(fork.from, fork.at, &mut **owner)?,
        };
        let free = || match self.names.entry(name)? {
            Some(_) => Err(taken(name)),
            None => Ok(()),
        };
        let size = disk_size(&past.object, fork.size)?;
        let created = (self.env.now)();
        let (id, new) = {
            let _lock = self.lock(true)?;
            free()?;
            let (id, new) = self.new_layer(&NewLayer {
                parent: past.parent,
                rank: past.rank,
                size,
                created,
                name,
                before: LifeWritten::default(),
            })?;
            // Who collects garbage leaves alone what is locked: until it has its name.
            new.lock(true)?;
            (id, new)
        };
        let copied = self.copy_past(&mut past, new.clone(), progress);
        if let Some(owner) = owner.filter(|_| past.kept) {
            owner.let_go();
        }
        let done = copied.and_then(|_stays| {
            let _lock = self.lock(true)?;
            free()?;
            let record = NameRecord {
                kind: ObjectKind::Disk,
                target: Below::Layer(id),
                created,
                message: None,
                opened: true,
                extra: settings_on(fork.settings, past.parent),
            };
            let (temporary, named) = stage(&*self.names, name, &record.encode(name))?;
            named.sync()?;
            self.layers.sync()?;
            self.names.rename_new(&temporary, name)?;
            self.names.sync()
        });
        match done {
            Ok(()) => self.resolve(name),
            Err(e) => {
                if self.names.entry(name).is_ok_and(|entry| entry.is_none()) {
                    let _ = self.layers.remove(&layer_file(id));
                }
                Err(e.or_hint("nothing was created"))
            }
        }
    }
    /// A point of the past of a disk at rest. A lock of the names is held.
    fn past_at_rest(&self, disk: &str, at: At) -> Result<Past> {
        let object = self.resolve_locked(disk)?;
        if object.kind != ObjectKind::Disk {
            return Err(no_disk(&object.name, object.kind));
        }
        let file = self.layers.open(&layer_file(object.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        let (own, place) = self.past_of(&object, file, at)?;
        self.past_at(&object, own, &place)
    }
    /// A point of the past of a disk at rest, whose own layer is `own`: as long as that is open.
    pub(super) fn past_at(&self, object: &Object, own: ReadLayer, place: &Place) -> Result<Past> {
        let (own_id, held) = (own.id(), own.file().clone());
        let earlier = place.layer != own_id;
        let layer = match earlier {
            false => own,
            true => {
                let file = self.layers.open(&layer_file(place.layer), Access::Read)?;
                file.lock(false)?;
                ReadLayer::open(file)?
            }
        };
        let file = layer.file().clone();
        // Nobody lets go of it but who has the disk open, and `gc`, if it is the disk's no longer.
        let past = Past::new(object.clone(), file, layer, place.point, earlier)?;
        Ok(Past {
            held: Some(held),
            ..past
        })
    }
    /// A point of the past of a disk that `owner` has open, and keeps; or that an earlier layer keeps.
    fn past_held(&self, disk: &str, at: At, owner: &mut (dyn Owner + '_)) -> Result<Past> {
        let mut tries = 0;
        loop {
            let mut look = || -> Result<Option<Past>> {
                let object = self.disk_named(disk)?;
                let file = self.layers.open(&layer_file(object.id), Access::Read)?;
                let (own, place) = self.past_of(&object, file.clone(), at)?;
                if !own.is_current()? {
                    return Ok(None);
                }
                if place.layer != object.id {
                    let file = self.layers.open(&layer_file(place.layer), Access::Read)?;
                    let layer = ReadLayer::open(file.clone())?;
                    return Past::new(object, file, layer, place.point, true).map(Some);
                }
                match owner.hold(object.id, place.point.number) {
                    // A snapshot came in between, or it went: then it is not found there the next time.
                    Err(e) if e.kind() == Kind::NotFound => return Ok(None),
                    other => other?,
                }
                let layer = self.layer_now(object.id)?;
                let past = Past::new(object, file, layer, place.point, true)?;
                Ok(Some(Past { kept: true, ..past }))
            };
            tries += 1;
            match look() {
                Ok(Some(past)) => return Ok(past),
                Ok(None) if tries >= TRIES => return Err(too_busy(disk)),
                Err(e) if tries >= TRIES || e.kind() == Kind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    /// Fills a new layer with what the past was; closes it. What it stands on stays as long as somebody has what this returns: before it has a name, nothing
    /// else may need that any more.
    pub(super) fn copy_past(
        &self,
        past: &mut Past,
        new: Arc<dyn File>,
        progress: &dyn Progress,
    ) -> Result<Arc<Chain>> {
        let chain = self.chain(past.parent)?;
        let copied = self.copy_over(past, new, chain.clone(), progress);
        // A history loses nothing but its beginning, and a layer that was replaced does not come back: what is there now was there all the time.
        let whole = self.is_there(past);
        match copied {
            // Where the point went, something else stands.
            Err(e) if e.kind() == Kind::Corrupt => whole.and(Err(e)),
            Err(e) => Err(e),
            Ok(()) => whole.map(|()| chain),
        }
    }
    /// Fails if a point went while it was read.
    fn is_there(&self, past: &Past) -> Result<()> {
        if !past.busy {
            return Ok(());
        }
        let gone = |e: Error| match e.kind() {
            Kind::NotFound => went(&past.object.name),
            _ => e,
        };
        let mut tries = 0;
        loop {
            let look = || -> Result<bool> {
                let file = self.layers.open(&layer_file(past.id), Access::Read)?;
                if file.number()? != past.file.number()? {
                    return Err(Error::new(Kind::NotFound, "the layer was replaced"));
                }
                let layer = ReadLayer::open(file)?;
                layer.must_have(past.point.number)?;
                layer.is_current()
            };
            tries += 1;
            match look() {
                Ok(true) => return Ok(()),
                Ok(false) if tries >= TRIES => return Err(too_busy(&past.object.name)),
                Err(e) if tries >= TRIES || e.kind() == Kind::NotFound => return Err(gone(e)),
                _ => {}
            }
        }
    }
    fn copy_over(
        &self,
        past: &mut Past,
        new: Arc<dyn File>,
        chain: Arc<Chain>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let (number, name) = (past.point.number, past.object.name.clone());
        let tag = |e: Error| e.context(format!("point #{number} of `{name}`"));
        let memory = crate::layer::volatile::private()?;
        let filled = Layer::open_over(new, memory, None, Some(chain.clone()))?;
        let disk = CowDisk::writable(filled, chain);
        // Only what is within its size is copied. Past that, zeros hid what lies below, or will have to.
        disk.hide_from(disk.size())?;
        let blocks = past.seen.0.counts().0 + past.changed();
        let mut copy = Copy {
            file: &*past.file.clone(),
            id: past.id,
            disk: &disk,
            progress,
            done: 0,
            total: blocks * BLOCK,
            run: Vec::new(),
            first: 0,
        };
        let mut next = Some(0);
        while let Some(from) = next {
            let (ranges, behind) = past.part(from).map_err(tag)?;
            for (start, end, pointer) in ranges {
                copy.range(start, end, pointer).map_err(tag)?;
            }
            next = behind;
        }
        copy.flush().map_err(tag)?;
        disk.not_by_users();
        disk.close()
    }
}

/// Copying blocks of one layer into another.
struct Copy<'a> {
    file: &'a dyn File,
    id: Id,
    disk: &'a CowDisk,
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
    /// Slots and sums of neighbouring blocks from `first` on that are to be copied.
    run: Vec<(u32, u32)>,
    first: u64,
}

impl Copy<'_> {
    /// What the layer said of blocks `start` to before `end` of the new one.
    fn range(&mut self, start: u64, end: u64, pointer: Pointer) -> Result<()> {
        // What lies past the end of the disk is nobody's.
        let end = end.min(self.disk.size() / BLOCK);
        match pointer {
            _ if start >= end => Ok(()),
            Pointer::Absent => Ok(()),
            Pointer::Zero => {
                self.flush()?;
                self.disk.discard(start * BLOCK, (end - start) * BLOCK)
            }
            Pointer::Data { slot, sum } => {
                if self.first + self.run.len() as u64 != start || self.run.len() == PIECE {
                    self.flush()?;
                    self.first = start;
                }
                self.run.push((slot.0, sum));
                Ok(())
            }
        }
    }
    fn flush(&mut self) -> Result<()> {
        if self.run.is_empty() {
            return Ok(());
        }
        let mut buf = vec![0; self.run.len() * BLOCK_SIZE];
        let mut at = 0;
        // Neighbours in the file are read together.
        for row in self.run.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)) {
            let sums: Vec<u32> = row.iter().map(|(_, sum)| *sum).collect();
            let part = &mut buf[at * BLOCK_SIZE..(at + row.len()) * BLOCK_SIZE];
            let lba = Lba((self.first + at as u64) as u32);
            layer::read_blocks(self.file, &self.id, Slot(row[0].0), &sums, lba, part)?;
            at += row.len();
        }
        self.disk.write(&buf, self.first * BLOCK)?;
        self.run.clear();
        self.done += buf.len() as u64;
        step(self.progress, self.done.min(self.total), self.total)
    }
}

/// Tells `progress`; an error if it wants to stop.
pub(super) fn step(progress: &dyn Progress, done: u64, total: u64) -> Result<()> {
    match progress.update(done, total) {
        true => Ok(()),
        false => Err(Error::new(Kind::Interrupted, "interrupted").hint("nothing was changed")),
    }
}

fn went(disk: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!("that part of the history of `{disk}` went while it was read"),
    )
    .hint("a rollback, a squash or a flattening ends a history, and so does a full host disk; what is too old goes, too: `forkdisk ls --history` lists what is left")
}

fn too_busy(disk: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!("`{disk}` is written to so quickly that its history cannot be read"),
    )
    .hint("try again")
}
