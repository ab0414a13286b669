//! The history of a disk: what is kept of it, its points, and going back to one of them, in the disk itself or in a fork.
//!
//! Always true: a disk that goes back is all that it was at that point, or all that it was before.

use super::earlier::Place;
use super::graph::TRIES;
use super::names::{self, NameRecord, stage};
use super::objects::{NewLayer, must_be};
use super::past::step;
use super::{Below, Object, ObjectKind, Progress, Quiet, Store, in_use, layer_file, parent_of};
use crate::chain::Chain;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::io::{Access, File};
use crate::layer::history::Keep;
pub use crate::layer::history::Point;
use crate::layer::{Layer, ReadLayer, State, volatile};
use crate::map::undo::Undo;
use crate::units::{BLOCK, Id};
use std::sync::Arc;

/// The setting of a disk in the record of its name.
pub(super) const LIMITS: &str = "history";
/// Longest window: 100 years. A longer one is a mistake.
const MAX_WINDOW: u64 = 100 * 366 * 86_400;

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
        let Some(text) = record.extra.get(LIMITS) else {
            return Ok(None);
        };
        let limits = Limits::parse(text).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("`{text}` is no length of a history"))
                .hint("a newer forkdisk may know what it means")
        })?;
        Ok(Some(limits))
    }
    pub(super) fn keep(&self, limits: Limits) -> Keep {
        Keep {
            window: limits.window.map(|s| s * 1000),
            bytes: limits.bytes,
            clock: self.clock.clone(),
            after: (0, 0),
            lower: None,
        }
    }
    /// The same for a layer over `chain`: where the history goes on from there, so do the numbers.
    pub(super) fn keep_over(keep: Option<Keep>, chain: &Chain) -> Option<Keep> {
        let keep = keep?;
        let below = chain.layers().first().filter(|_| keep.lower.is_some());
        Some(Keep {
            after: below.map_or((0, 0), |layer| layer.ended()),
            ..keep
        })
    }
    /// What the layer of a disk is to keep of its past, of which earlier layers may keep a part.
    pub(super) fn keep_of(&self, name: &str) -> Result<Option<Keep>> {
        let record = names::read_name(&*self.names, name)?;
        let limits = self
            .limits_of(&record)
            .map_err(|e| e.context(format!("the record of `{name}`")))?;
        let Some(limits) = limits else {
            return Ok(None);
        };
        Ok(Some(Keep {
            lower: self.goes_on(&record),
            ..self.keep(limits)
        }))
    }
    /// Keeps all of its past, however old it is and however much: until the disk is opened the next time. Its numbers go on as they do otherwise.
    pub(super) fn keep_all(&self, name: &str) -> Result<Keep> {
        let record = names::read_name(&*self.names, name)?;
        Ok(Keep {
            lower: self.goes_on(&record),
            ..self.keep(Limits::default())
        })
    }
    /// Notes how much of its history each of these disks keeps from its next opening on; `None`: nothing. One round of syncs.
    pub fn set_history(&self, disks: &[String], limits: Option<Limits>) -> Result<()> {
        limits.iter().try_for_each(Limits::check)?;
        let _lock = self.lock(true)?;
        let earlier = self.note_history(disks, limits)?;
        self.forget_earlier(&earlier);
        Ok(())
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
        let names = [disk.to_string()];
        let Some(limits) = limits else {
            // Whoever dies in between leaves a history that is kept until the disk is opened the next time.
            let earlier = self.note_history(&names, None)?;
            let done = running.set_keep(None);
            self.forget_earlier(&earlier);
            return done;
        };
        // First where it takes effect: whoever dies in between leaves a setting that is merely not noted.
        let lower = self.keep_of(disk)?.and_then(|keep| keep.lower);
        running.set_keep(Some(Keep {
            lower,
            ..self.keep(limits)
        }))?;
        self.note_history(&names, Some(limits)).map(drop)
    }
    /// Returns the layers that keep what these disks shall keep no more.
    fn note_history(&self, disks: &[String], limits: Option<Limits>) -> Result<Vec<Id>> {
        let mut staged = Vec::with_capacity(disks.len());
        let mut earlier = Vec::new();
        for name in disks {
            let mut record = names::read_name(&*self.names, name)?;
            if record.kind != ObjectKind::Disk {
                return Err(no_disk(name, record.kind));
            }
            if limits.is_none() {
                earlier.extend(self.leave_earlier(&mut record));
            }
            record.extra.set(LIMITS, limits.map(|l| l.text()));
            let (temporary, file) = stage(&*self.names, name, &record.encode(name))?;
            file.sync()?;
            staged.push((temporary, name));
        }
        for (temporary, name) in staged {
            self.names.rename(&temporary, name)?;
        }
        self.names.sync()?;
        Ok(earlier)
    }
    /// The history of a disk, attached or not.
    pub fn history(&self, disk: &str) -> Result<HistoryReport> {
        let object = self.disk_named(disk)?;
        let look = || -> Result<(HistoryReport, bool)> {
            // Each time: a snapshot may have given it another layer.
            let record = names::read_name(&*self.names, &object.name)?;
            let file = self
                .layers
                .open(&layer_file(record.target.id()), Access::Read)?;
            let layer = ReadLayer::open(file)?;
            let places = self.places(&record, &layer)?;
            let earlier = self.earlier_bytes(&self.earlier(&record));
            let report = HistoryReport {
                limits: self.limits_of(&record)?,
                points: places.iter().map(|place| place.point).collect(),
                bytes: earlier + layer.history_slots() * BLOCK,
            };
            Ok((report, layer.is_current()?))
        };
        let mut tries = 0;
        loop {
            tries += 1;
            match look() {
                Ok((report, current)) if current || tries >= TRIES => return Ok(report),
                // Its writer may have put a checkpoint in between.
                Ok(_) => {}
                Err(e) if tries >= TRIES || e.kind() == Kind::NotFound => return Err(e),
                Err(_) => {}
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
                let own = self.layer_now(object.id)?.history_slots() * BLOCK;
                let earlier = self.earlier_bytes(&self.earlier(&record));
                Ok((limits, own + earlier))
            }
        }
    }
    pub(super) fn disk_named(&self, disk: &str) -> Result<Object> {
        let object = self.resolve(disk)?;
        match object.kind {
            ObjectKind::Disk => Ok(object),
            kind => Err(no_disk(&object.name, kind)),
        }
    }
    /// A point of the disk whose own layer is in `file`, that layer, and what has changed since.
    pub(super) fn past_of(
        &self,
        object: &Object,
        file: Arc<dyn File>,
        at: At,
    ) -> Result<(ReadLayer, Place)> {
        let own = ReadLayer::open(file)?;
        let record = names::read_name(&*self.names, &object.name)?;
        let places = self.places(&record, &own)?;
        let points: Vec<Point> = places.iter().map(|place| place.point).collect();
        let point = choose(&points, at).map_err(|e| match points.is_empty() {
            false => e.context(format!("the history of `{}`", object.name)),
            true => Error::new(
                Kind::NotFound,
                format!("`{}` has no history", object.name),
            )
            .hint(format!(
                "`forkdisk ls --history {0}` tells whether it is to keep one, which begins when it is attached next; \
                 `forkdisk resize {0} --history 10m` keeps one from now on",
                object.name
            )),
        })?;
        let place = places.iter().find(|p| p.point.number == point.number);
        let place = place.copied().ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("there is no point #{}", point.number),
            )
        })?;
        Ok((own, place))
    }
    /// What has changed since a point, and how that can be taken back.
    fn since_point(
        &self,
        object: &Object,
        own: &ReadLayer,
        place: &Place,
        all: bool,
    ) -> Result<(Rewound, Option<Undo>)> {
        let record = names::read_name(&*self.names, &object.name)?;
        let since = self.since(&record, own, place, all)?;
        let rewound = Rewound {
            point: place.point,
            blocks: since.blocks,
            undoable: since.undo.is_some(),
        };
        Ok((rewound, since.undo))
    }
    /// The point that `at` means in the history of a disk at rest, and how many blocks changed since.
    pub fn look_back(&self, disk: &str, at: At) -> Result<Rewound> {
        let object = self.disk_named(disk)?;
        let file = self.layers.open(&layer_file(object.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        let (own, place) = self.past_of(&object, file, at)?;
        Ok(self.since_point(&object, &own, &place, true)?.0)
    }
    /// The same of a disk that is attached, as far as can be told: it may be written to.
    pub fn look_back_busy(&self, disk: &str, at: At) -> Result<Rewound> {
        let mut tries = 0;
        loop {
            let look = || -> Result<(Rewound, bool)> {
                let object = self.disk_named(disk)?;
                let file = self.layers.open(&layer_file(object.id), Access::Read)?;
                let (own, place) = self.past_of(&object, file, at)?;
                let rewound = self.since_point(&object, &own, &place, true)?.0;
                Ok((rewound, own.is_current()?))
            };
            tries += 1;
            match look() {
                Ok((rewound, current)) if current || tries >= TRIES => return Ok(rewound),
                Err(e) if tries >= TRIES => return Err(e),
                _ => {}
            }
        }
    }
    /// A disk at rest as it was at a point of its history, for reading.
    pub fn open_at(&self, disk: &str, at: At) -> Result<Arc<dyn Disk>> {
        let object = self.disk_named(disk)?;
        let file = self.layers.open(&layer_file(object.id), Access::Read)?;
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        let (own, place) = self.past_of(&object, file, at)?;
        let then = match place.layer == own.id() {
            true => own,
            false => {
                let file = self.layers.open(&layer_file(place.layer), Access::Read)?;
                file.lock(false)?;
                ReadLayer::open(file)?
            }
        };
        let below = self.chain(parent_of(then.header()))?;
        let mut layers = vec![Arc::new(then.at_point(place.point.number)?)];
        layers.extend(below.layers().iter().cloned());
        let chain = Chain::new(layers, below.base().clone(), self.budget.clone());
        Ok(Arc::new(CowDisk::read_only(Arc::new(chain))))
    }
    /// Makes a disk at rest what it was at a point of its history.
    pub fn rewind(&self, disk: &str, at: At, progress: &dyn Progress) -> Result<Rewound> {
        let lock = self.lock(true)?;
        let mut object = self.resolve_locked(disk)?;
        if object.kind != ObjectKind::Disk {
            return Err(no_disk(&object.name, object.kind));
        }
        let mut held = self.open_exclusive(&object)?;
        if ReadLayer::open(held.clone())?.state() == State::Sealed {
            // A snapshot was interrupted, and its name may refer to the layer.
            drop(held);
            let keep = Some(self.keep_all(&object.name)?);
            let (layer, _) = self.open_top_keeping(&object, volatile::private()?, keep)?;
            layer.close(State::Clean, None)?;
            drop(layer);
            object = self.object(&object.name)?;
            held = self.open_exclusive(&object)?;
        }
        let (own, place) = self.past_of(&object, held.clone(), at)?;
        let tag = |e: Error| {
            e.context(format!(
                "point #{} of `{}`",
                place.point.number, object.name
            ))
        };
        let since = self.since_point(&object, &own, &place, true);
        let (rewound, undo) = since.map_err(tag)?;
        if undo.is_some() {
            drop((own, held));
            self.rewind_in_place(&object, place.point, progress)?;
            return Ok(rewound);
        }
        // Too much for one commit: in a new layer, which takes the place of the old one when it is complete. Nobody else changes the disk
        // meanwhile, as its layer is locked.
        let mut past = self.past_at(&object, own, &place).map_err(tag)?;
        let (id, new) = self.new_layer(&NewLayer {
            parent: past.parent,
            rank: past.rank,
            size: object.size,
            created: (self.env.now)(),
            name: &object.name,
            before: self.written_before(Below::Layer(object.id)),
        })?;
        new.lock(true)?;
        drop(lock);
        let mut earlier = Vec::new();
        let done = self
            .copy_past(&mut past, new.clone(), progress)
            .and_then(|_stays| {
                let _lock = self.lock(true)?;
                let mut record = names::read_name(&*self.names, &object.name)?;
                earlier = self.leave_earlier(&mut record);
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
        drop((past, held, new));
        let _lock = self.lock(true)?;
        self.forget_layers(Below::Layer(object.id), id);
        self.forget_earlier(&earlier);
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
        let keep = self.keep_all(&object.name)?;
        let (layer, chain) = self.open_top_keeping(object, volatile::private()?, Some(keep))?;
        self.go_back(layer, chain, (object, point), progress)
    }
    fn go_back(
        &self,
        layer: Layer,
        chain: Arc<Chain>,
        (object, point): (&Object, Point),
        progress: &dyn Progress,
    ) -> Result<()> {
        let tag = |e: Error| e.context(format!("point #{} of `{}`", point.number, object.name));
        // If the host disk is full, the history may have gone when the layer was opened.
        let at = At::Number(point.number);
        let (own, place) = self.past_of(object, layer.file().clone(), at)?;
        let undo = self.since_point(object, &own, &place, false);
        let undo = undo.map_err(tag)?.1;
        let undo = undo.ok_or_else(|| too_many(&object.name))?;
        let (past, below) = match place.layer == own.id() {
            true => (own, chain.clone()),
            false => {
                let past = self.layer_now(place.layer)?;
                let below = self.chain(parent_of(past.header()))?;
                (past, below)
            }
        };
        let total = undo.blocks() * BLOCK;
        let disk = CowDisk::writable(layer, chain);
        disk.rewind(&undo, (&past, below), |blocks| {
            step(progress, blocks * BLOCK, total)
        })
        .map_err(|e| tag(e).or_hint("the disk is what it was before"))?;
        disk.close()
    }
    /// [`Store::rewind`] of an attached disk that `running` is, where all fits into one commit. Nobody uses it meanwhile: what is in others' caches does
    /// not go back.
    pub fn rewind_running(&self, running: &CowDisk, disk: &str, at: At) -> Result<Rewound> {
        // Before its users have to wait.
        if self
            .look_back_busy(disk, at)
            .is_ok_and(|found| !found.undoable)
        {
            return Err(too_many(disk));
        }
        let _lock = self.lock(true)?;
        let object = self.resolve_locked(disk)?;
        must_be(running, &object)?;
        let keep = self.keep_of(disk)?;
        let private = volatile::private()?;
        let halted = running.halt();
        // A successor of this process must find nothing in the volatile log: neither of what is undone, nor of half of the way back.
        halted.flush()?;
        let file = halted.file()?;
        let (own, place) = self.past_of(&object, file.clone(), at)?;
        let (rewound, _) = self.since_point(&object, &own, &place, false)?;
        if !rewound.undoable {
            return Err(too_many(disk));
        }
        let point = place.point;
        // What a layer below keeps does not go by that.
        let held = (place.layer == own.id()).then_some(point.number);
        drop(own);
        let chain = halted.chain();
        let memory = halted.rest(held)?;
        // As at rest: if that fails, it is dropped without a flush, and was never there.
        let limits = Some(self.keep_all(disk)?);
        let below = || Some(chain.clone() as Arc<dyn crate::layer::refer::Below>);
        let done = Layer::open_over(file.clone(), private, limits, below())
            .and_then(|layer| self.go_back(layer, chain.clone(), (&object, point), &Quiet));
        match Layer::open_over(file, memory, keep, below()) {
            Ok(layer) => halted.go_on(layer, chain),
            Err(e) => {
                halted.stop(&e);
                return Err(done.err().unwrap_or(e).context(format!("`{disk}` cannot go on")).hint(
                    "`forkdisk detach --force` it and attach it again: it is what it was, or what it was to be",
                ));
            }
        }
        done.map(|()| rewound)
    }
}

/// A disk that is attached cannot go back so far.
pub fn too_many(disk: &str) -> Error {
    Error::new(
        Kind::Busy,
        "too many blocks have changed since to take them back in one step",
    )
    .hint(format!(
        "`forkdisk detach {disk}` first: at rest it can go back all the same"
    ))
}

/// The point that `at` means. Times are labels: the last point that is not later, by its number, is meant.
pub(super) fn choose(points: &[Point], at: At) -> Result<Point> {
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

pub(super) fn no_disk(name: &str, kind: ObjectKind) -> Error {
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
