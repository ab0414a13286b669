//! The history of a disk: what is kept of it, its points, and going back to one of them, in the disk itself or in a fork.
//!
//! Always true: a disk that goes back is all that it was at that point, or all that it was before.

use super::names::{self, NameRecord, check_part, stage};
use super::objects::{disk_size, taken};
use super::{Below, Object, ObjectKind, Progress, Store, in_use, layer_file, parent_of};
use crate::chain::Chain;
use crate::disk::cow::MAX_REWIND;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::io::{Access, File};
use crate::layer::history::Keep;
pub use crate::layer::history::Point;
use crate::layer::{Layer, ReadLayer, volatile};
use crate::map::Item;
use crate::map::undo::Undo;
use crate::units::{BLOCK, BLOCK_SIZE, Lba, REGION_BLOCKS, Region, Slot};
use std::sync::Arc;

/// The setting of a disk in the record of its name.
const KEY: &str = "history";
/// Longest window: 100 years. A longer one is a mistake.
const MAX_WINDOW: u64 = 100 * 366 * 86_400;
/// Blocks copied in one go.
const PIECE: usize = 256;

/// How much of its past a disk keeps: at least one of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// So many seconds.
    pub window: Option<u64>,
    /// So many bytes of replaced blocks.
    pub bytes: Option<u64>,
}

impl Limits {
    /// Are they limits that a disk can have?
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str| {
            Err(Error::new(Kind::Invalid, what)
                .hint("write a length of time, a size, or both: 10m, 2G, or 10m,2G"))
        };
        match (self.window, self.bytes) {
            (None, None) => wrong("the history has no limit"),
            (Some(0), _) | (_, Some(0)) => wrong("a history of nothing cannot be kept"),
            (Some(window), _) if window > MAX_WINDOW => wrong("the history is too long"),
            _ => Ok(()),
        }
    }
    fn text(&self) -> String {
        let window = self.window.map(|s| format!("{s}s"));
        let bytes = self.bytes.map(|b| format!("{b}B"));
        let both: Vec<String> = window.into_iter().chain(bytes).collect();
        both.join(",")
    }
    fn parse(text: &str) -> Option<Limits> {
        let mut limits = Limits::default();
        for part in text.split(',') {
            match part.split_at_checked(part.len().checked_sub(1)?)? {
                (number, "s") => limits.window = Some(number.parse().ok()?),
                (number, "B") => limits.bytes = Some(number.parse().ok()?),
                _ => return None,
            }
        }
        limits.check().ok().map(|()| limits)
    }
}

/// Which point of a history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// The one with this number.
    Number(u64),
    /// The last one that was made at this time or before: milliseconds since 1970.
    Time(u64),
}

/// The history of a disk.
#[derive(Clone, Debug, Default)]
pub struct HistoryReport {
    /// How much is kept; `None`: nothing.
    pub limits: Option<Limits>,
    /// The points, the oldest first; the last one is the disk's last flush.
    pub points: Vec<Point>,
    /// Host bytes that it occupies.
    pub bytes: u64,
}

/// What going back did, or would do.
#[derive(Clone, Copy, Debug)]
pub struct Rewound {
    /// The point.
    pub point: Point,
    /// Blocks that had changed since.
    pub blocks: u64,
    /// The history goes on, and what was done can be undone: else there was too much for one commit, and the history began anew.
    pub undoable: bool,
}

impl Store {
    /// How much of its history the record of a disk asks for.
    fn limits_of(&self, record: &NameRecord) -> Result<Option<Limits>> {
        let Some(text) = record.extra.get(KEY) else {
            return Ok(None);
        };
        let limits = Limits::parse(text).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("`{text}` is no length of a history"))
                .hint("a newer forkdisk may know what it means")
        })?;
        Ok(Some(limits))
    }
    fn keep(&self, limits: Limits) -> Keep {
        Keep {
            window: limits.window.map(|s| s * 1000),
            bytes: limits.bytes,
            clock: self.clock.clone(),
        }
    }
    /// What the layer of a disk is to keep of its past.
    pub(super) fn keep_of(&self, name: &str) -> Result<Option<Keep>> {
        let record = names::read_name(&*self.names, name)?;
        let limits = self
            .limits_of(&record)
            .map_err(|e| e.context(format!("the record of `{name}`")))?;
        Ok(limits.map(|limits| self.keep(limits)))
    }
    /// Notes how much of its history each of these disks keeps from its next opening on; `None`: nothing. One round of syncs.
    pub fn set_history(&self, disks: &[String], limits: Option<Limits>) -> Result<()> {
        limits.iter().try_for_each(Limits::check)?;
        let _lock = self.lock(true)?;
        self.note_history(disks, limits)
    }
    /// The same for an attached disk that `running` is: it counts at once.
    pub fn set_history_running(
        &self,
        running: &CowDisk,
        disk: &str,
        limits: Option<Limits>,
    ) -> Result<()> {
        limits.iter().try_for_each(Limits::check)?;
        let _lock = self.lock(true)?;
        // First where it takes effect: whoever dies in between leaves a setting that is merely not noted.
        running.set_keep(limits.map(|l| self.keep(l)))?;
        self.note_history(&[disk.to_string()], limits)
    }
    fn note_history(&self, disks: &[String], limits: Option<Limits>) -> Result<()> {
        let mut staged = Vec::with_capacity(disks.len());
        for name in disks {
            let mut record = names::read_name(&*self.names, name)?;
            if record.kind != ObjectKind::Disk {
                return Err(no_disk(name, record.kind));
            }
            record.extra.set(KEY, limits.map(|l| l.text()));
            let (temporary, file) = stage(&*self.names, name, &record.encode(name))?;
            file.sync()?;
            staged.push((temporary, name));
        }
        for (temporary, name) in staged {
            self.names.rename(&temporary, name)?;
        }
        self.names.sync()
    }
    /// The history of a disk, attached or not.
    pub fn history(&self, disk: &str) -> Result<HistoryReport> {
        /// How often a layer that is being written is looked at again.
        const TRIES: u32 = 20;
        let object = self.disk_named(disk)?;
        let record = names::read_name(&*self.names, &object.name)?;
        let limits = self.limits_of(&record)?;
        let look = || -> Result<HistoryReport> {
            let file = self.layers.open(&layer_file(object.id), Access::Read)?;
            let layer = ReadLayer::open(file)?;
            Ok(HistoryReport {
                limits,
                points: layer.points()?,
                bytes: layer.history_slots() * BLOCK,
            })
        };
        let mut tries = 0;
        loop {
            match look() {
                // Its writer may have put a checkpoint in between.
                Err(e) if tries < TRIES && e.kind() != Kind::NotFound => tries += 1,
                other => return other,
            }
        }
    }
    /// How much of its history a disk keeps, and the host bytes that this occupies now.
    pub fn history_space(&self, object: &Object) -> Result<(Option<Limits>, u64)> {
        if object.kind != ObjectKind::Disk {
            return Ok((None, 0));
        }
        let record = names::read_name(&*self.names, &object.name)?;
        match self.limits_of(&record)? {
            None => Ok((None, 0)),
            limits => {
                let bytes = self.layer_now(object.id)?.history_slots() * BLOCK;
                Ok((limits, bytes))
            }
        }
    }
    fn disk_named(&self, disk: &str) -> Result<Object> {
        let object = self.resolve(disk)?;
        match object.kind {
            ObjectKind::Disk => Ok(object),
            kind => Err(no_disk(&object.name, kind)),
        }
    }
    /// The layer of a disk at rest for reading; nobody writes into it as long as the file is held.
    fn past_of(&self, object: &Object, file: Arc<dyn File>, at: At) -> Result<(ReadLayer, Point)> {
        let layer = ReadLayer::open(file)?;
        let point = choose(&layer.points()?, at).map_err(|e| match layer.has_history() {
            true => e.context(format!("the history of `{}`", object.name)),
            false => Error::new(
                Kind::NotFound,
                format!("`{}` keeps no history", object.name),
            )
            .hint("a history is kept from its beginning on: `forkdisk create --history 10m`"),
        })?;
        Ok((layer, point))
    }
    /// The point that `at` means in the history of a disk at rest, and how many blocks changed since.
    pub fn look_back(&self, disk: &str, at: At) -> Result<Rewound> {
        let object = self.disk_named(disk)?;
        let file = self.layers.open(&layer_file(object.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        let (layer, point) = self.past_of(&object, file, at)?;
        let blocks = layer.undone_to(point.number)?.blocks();
        Ok(Rewound {
            point,
            blocks,
            undoable: blocks <= MAX_REWIND,
        })
    }
    /// A disk at rest as it was at a point of its history, for reading.
    pub fn open_at(&self, disk: &str, at: At) -> Result<Arc<dyn Disk>> {
        let object = self.disk_named(disk)?;
        let file = self.layers.open(&layer_file(object.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        let (layer, point) = self.past_of(&object, file, at)?;
        let below = self.chain(parent_of(layer.header()))?;
        let mut layers = vec![Arc::new(layer.at_point(point.number)?)];
        layers.extend(below.layers().iter().cloned());
        let chain = Chain::new(layers, below.base().clone(), self.budget.clone());
        Ok(Arc::new(CowDisk::read_only(Arc::new(chain))))
    }
    /// Makes a disk at rest what it was at a point of its history.
    pub fn rewind(&self, disk: &str, at: At, progress: &dyn Progress) -> Result<Rewound> {
        let lock = self.lock(true)?;
        let object = self.resolve_locked(disk)?;
        if object.kind != ObjectKind::Disk {
            return Err(no_disk(&object.name, object.kind));
        }
        let file = self.open_exclusive(&object)?;
        let (layer, point) = self.past_of(&object, file.clone(), at)?;
        let tag = |e: Error| e.context(format!("point #{} of `{}`", point.number, object.name));
        let undo = layer.undone_to(point.number).map_err(tag)?;
        let rewound = Rewound {
            point,
            blocks: undo.blocks(),
            undoable: undo.blocks() <= MAX_REWIND,
        };
        if rewound.undoable {
            drop((layer, file));
            self.rewind_in_place(&object, point, progress)?;
            return Ok(rewound);
        }
        // Too much for one commit: in a new layer, which takes the place of the old one when it is complete. Nobody else changes the disk
        // meanwhile, as its layer is locked.
        let header = *layer.header();
        let (id, new) = self.new_layer(
            parent_of(&header),
            header.depth.get(),
            object.size,
            (self.env.now)(),
            &object.name,
        )?;
        new.lock(true)?;
        drop(lock);
        let done = self
            .copy_past(&layer, &undo, new.clone(), progress)
            .map_err(tag)
            .and_then(|()| {
                let _lock = self.lock(true)?;
                let mut record = names::read_name(&*self.names, &object.name)?;
                record.target = Below::Layer(id);
                record.opened = true;
                let (temporary, named) =
                    stage(&*self.names, &object.name, &record.encode(&object.name))?;
                named.sync()?;
                self.layers.sync()?;
                self.names.rename(&temporary, &object.name)?;
                self.names.sync()
            });
        if let Err(e) = done {
            // If the name refers to it already, it stays: `gc` knows.
            let placed = names::read_name(&*self.names, &object.name);
            if placed.is_ok_and(|record| record.target != Below::Layer(id)) {
                let _ = self.layers.remove(&layer_file(id));
            }
            return Err(e);
        }
        drop((layer, file));
        let _ = self.layers.remove(&layer_file(object.id));
        Ok(rewound)
    }
    /// In one commit, which is a point of its own. The names lock is held.
    fn rewind_in_place(
        &self,
        object: &Object,
        point: Point,
        progress: &dyn Progress,
    ) -> Result<()> {
        // Whatever is too old or too much, goes when the disk is opened the next time: the point must not.
        let keep = self.keep(Limits::default());
        let (layer, chain) = self.open_top_keeping(object, volatile::private()?, Some(keep))?;
        let past = ReadLayer::open(layer.file().clone())?;
        let undo = past.undone_to(point.number)?;
        let total = undo.blocks() * BLOCK;
        let disk = CowDisk::writable(layer, chain);
        disk.rewind(&undo, &past, |blocks| step(progress, blocks * BLOCK, total))
            .map_err(|e| {
                e.context(format!("point #{} of `{}`", point.number, object.name))
                    .or_hint("the disk is what it was before")
            })?;
        disk.close()
    }
    /// Makes a disk from what a disk at rest was at a point of its history.
    pub fn create_at(
        &self,
        name: &str,
        from: &str,
        at: At,
        size: Option<u64>,
        progress: &dyn Progress,
    ) -> Result<Object> {
        let lock = self.lock(true)?;
        let source = self.resolve_locked(from)?;
        if source.kind != ObjectKind::Disk {
            return Err(no_disk(&source.name, source.kind));
        }
        check_part(name)?;
        if self.names.entry(name)?.is_some() {
            return Err(taken(name));
        }
        let size = disk_size(&source, size)?;
        let file = self.layers.open(&layer_file(source.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", source.name)))?;
        let (layer, point) = self.past_of(&source, file, at)?;
        let tag = |e: Error| e.context(format!("point #{} of `{}`", point.number, source.name));
        let undo = layer.undone_to(point.number).map_err(tag)?;
        let header = *layer.header();
        let parent = parent_of(&header);
        let created = (self.env.now)();
        let (id, new) = self.new_layer(parent, header.depth.get(), size, created, name)?;
        // Who collects garbage leaves alone what is locked: until it has its name.
        new.lock(true)?;
        drop(lock);
        let done = self
            .copy_past(&layer, &undo, new.clone(), progress)
            .map_err(tag)
            .and_then(|()| {
                let _lock = self.lock(true)?;
                if self.names.entry(name)?.is_some() {
                    return Err(taken(name));
                }
                let record = NameRecord {
                    kind: ObjectKind::Disk,
                    target: Below::Layer(id),
                    created,
                    message: None,
                    opened: true,
                    extra: names::Extra::default(),
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
    /// Fills a new layer with what `layer` says, but of the blocks of `undo` with what that says; closes it.
    fn copy_past(
        &self,
        layer: &ReadLayer,
        undo: &Undo,
        new: Arc<dyn File>,
        progress: &dyn Progress,
    ) -> Result<()> {
        let chain = self.chain(parent_of(layer.header()))?;
        let disk = CowDisk::writable(Layer::open(new)?, chain);
        let blocks = layer.counts().0 + undo.blocks();
        let mut copy = Copy {
            layer,
            disk: &disk,
            progress,
            done: 0,
            total: blocks * BLOCK,
            run: Vec::new(),
            first: 0,
        };
        for item in layer.items(Region(0)) {
            match item? {
                Item::Zeros(region, n) => {
                    let start = u64::from(region.0) * REGION_BLOCKS as u64;
                    let end = start + u64::from(n) * REGION_BLOCKS as u64;
                    for (from, to) in undo.gaps(start, end) {
                        copy.range(from, to, Pointer::Zero)?;
                    }
                }
                Item::Region(region, map) => {
                    let start = u64::from(region.0) * REGION_BLOCKS as u64;
                    for (from, to) in undo.gaps(start, start + REGION_BLOCKS as u64) {
                        for block in from..to {
                            copy.range(block, block + 1, map.get((block - start) as usize))?;
                        }
                    }
                }
            }
        }
        for (start, end, pointer) in undo.iter() {
            copy.range(start, end, pointer)?;
        }
        copy.flush()?;
        disk.close()
    }
}

/// Copying blocks of one layer into another.
struct Copy<'a> {
    layer: &'a ReadLayer,
    disk: &'a CowDisk,
    progress: &'a dyn Progress,
    done: u64,
    total: u64,
    /// Slots and sums of neighbouring blocks from `first` on that are to be copied.
    run: Vec<(u32, u32)>,
    first: u64,
}

impl Copy<'_> {
    /// What the layer says of blocks `start` to before `end` of the new one.
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
            self.layer.read_blocks(Slot(row[0].0), &sums, lba, part)?;
            at += row.len();
        }
        self.disk.write(&buf, self.first * BLOCK)?;
        self.run.clear();
        self.done += buf.len() as u64;
        step(self.progress, self.done.min(self.total), self.total)
    }
}

fn step(progress: &dyn Progress, done: u64, total: u64) -> Result<()> {
    match progress.update(done, total) {
        true => Ok(()),
        false => Err(Error::new(Kind::Interrupted, "interrupted").hint("nothing was changed")),
    }
}

/// The point that `at` means. Times are labels: the last point that is not later, by its number, is meant.
fn choose(points: &[Point], at: At) -> Result<Point> {
    let found = match at {
        At::Number(number) => points.iter().find(|p| p.number == number),
        At::Time(time) => points.iter().rev().find(|p| p.time <= time && p.time > 0),
    };
    let none = || {
        let what = match at {
            At::Number(number) => format!("there is no point #{number}"),
            At::Time(_) => "it does not go back so far".to_string(),
        };
        let error = Error::new(Kind::NotFound, what);
        match (points.first(), points.last()) {
            (Some(first), Some(last)) => error.hint(format!(
                "`forkdisk ls --history` lists the points: #{} to #{}",
                first.number, last.number
            )),
            _ => error,
        }
    };
    found.copied().ok_or_else(none)
}

fn no_disk(name: &str, kind: ObjectKind) -> Error {
    Error::new(
        Kind::Invalid,
        format!("`{name}` is {}, not a disk", kind.one()),
    )
    .hint("only disks change, so only disks have a history")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_they_are_written() {
        for (window, bytes) in [
            (Some(600), None),
            (None, Some(1 << 31)),
            (Some(1), Some(4096)),
        ] {
            let limits = Limits { window, bytes };
            assert_eq!(Limits::parse(&limits.text()), Some(limits));
        }
        for bad in [
            "",
            "s",
            "B",
            "10",
            "10m",
            "0s",
            "1s,",
            "1s,é",
            "99999999999999s",
            "-1s",
        ] {
            assert_eq!(Limits::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_time_means_the_last_point_that_is_not_later() {
        let point = |number, time| Point {
            number,
            time,
            changed: 0,
            held: 0,
        };
        // The clock went back between 5 and 6.
        let points = [point(4, 100), point(5, 200), point(6, 150), point(7, 300)];
        let number = |at| choose(&points, at).map(|p| p.number).ok();
        assert_eq!(number(At::Time(99)), None);
        assert_eq!(number(At::Time(100)), Some(4));
        assert_eq!(number(At::Time(180)), Some(6));
        assert_eq!(number(At::Time(299)), Some(6));
        assert_eq!(number(At::Time(9999)), Some(7));
        assert_eq!(number(At::Number(5)), Some(5));
        assert_eq!(number(At::Number(8)), None);
    }
}
