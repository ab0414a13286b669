//! `scrub`: every block of every base and layer is read and compared with its checksum.
//!
//! Always true:
//! - no lock is held while it reads: disks are attached, snapshotted and removed meanwhile as ever;
//! - what a disk in use has written since its last flush is in no commit yet and is not looked at; the rest of its layer is, and a block
//!   that does not match is damaged only if the map, read anew, still says that it stands there;
//! - where it stopped is kept in the store's file `scrub`, which is worth time and nothing else: a damaged one means to begin again;
//! - a base without checksums gets them, in one rename, when all of it was read and it is still what it was.

use super::inside::free_list;
use super::survey::{Survey, open_layer};
use super::{Check, target_of};
use crate::base::Base;
use crate::error::{Error, Kind, Result};
use crate::format::text::Record;
use crate::format::{self, Pointer, STATE_SEALED, STATE_WRITABLE, SumsHeader, ZERO_SUM};
use crate::io::{Access, Dir, File};
use crate::layer::{ReadLayer, recover};
use crate::map::Item;
use crate::store::names::{TEMPORARY, read_record};
use crate::store::{Below, CheckReport, Finding, Progress, Store, layer_file};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot, blocks};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// File of the store that says where a scrub stopped.
const POSITION: &str = "scrub";
/// Blocks read in one go: 1 MiB.
const PIECE: usize = 256;
/// Pointers of a layer looked at together, in the order of their slots: 64 MiB of data.
const BATCH: usize = 16_384;
/// Bytes read between two notes of the position.
const NOTE: u64 = 64 << 20;
/// Findings told of one layer or base.
const TOLD: usize = 1000;
/// Layers and bases with damage that a position remembers: a text record holds no more.
const REMEMBER: usize = 1000;

/// How to scrub.
#[derive(Clone, Copy, Default, Debug)]
pub struct Options {
    /// Bytes a second at most.
    pub rate: Option<u64>,
    /// Begin at the beginning, wherever the last one stopped.
    pub restart: bool,
    /// Read nothing, say what would be read.
    pub dry_run: bool,
}

/// What a scrub found.
#[derive(Clone, Debug, Default)]
pub struct ScrubReport {
    /// Damage.
    pub corruptions: Vec<Finding>,
    /// What was left out, and why.
    pub skipped: Vec<Finding>,
    /// Bases that have checksums from now on.
    pub summed: Vec<String>,
    /// Bytes read and compared, by this call.
    pub verified: u64,
    /// Bytes there are.
    pub total: u64,
    /// Layers read, or to be read.
    pub layers: u64,
    /// Bases read, or to be read.
    pub bases: u64,
    /// It went on where an earlier one stopped.
    pub resumed: bool,
}

/// Where a scrub is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Position {
    /// What it is a scrub of; empty: everything.
    scope: String,
    /// Everything before this was read.
    item: Option<Below>,
    /// Block of the base, or region of the layer, from which on `item` is to be read.
    at: u64,
    /// What damage was found in: it is read again, so that the report of the last call has all.
    damaged: BTreeSet<Below>,
}

impl Position {
    fn word(below: Below) -> String {
        match below {
            Below::Base(id) => format!("base:{id}"),
            Below::Layer(id) => format!("layer:{id}"),
        }
    }
    fn parse(word: &str) -> Option<Below> {
        match word.split_once(':')? {
            ("base", id) => Id::parse(id).map(Below::Base),
            ("layer", id) => Id::parse(id).map(Below::Layer),
            _ => None,
        }
    }
    fn encode(&self) -> Vec<u8> {
        let damaged: Vec<String> = self.damaged.iter().map(|b| Self::word(*b)).collect();
        Record::new()
            .with("scope", &self.scope)
            .with_some("item", self.item.map(Self::word))
            .with("at", self.at.to_string())
            .with("damaged", damaged.join(","))
            .encode()
    }
    fn decode(bytes: &[u8]) -> Option<Position> {
        let record = Record::decode(bytes).ok()?;
        let damaged = record.get("damaged")?.split(',').filter(|w| !w.is_empty());
        Some(Position {
            scope: record.get("scope")?.to_string(),
            item: match record.get("item") {
                Some(word) => Some(Self::parse(word)?),
                None => None,
            },
            at: record.number("at").ok()?,
            damaged: damaged.map(Self::parse).collect::<Option<_>>()?,
        })
    }
}

/// Keeps to a rate.
struct Pace {
    rate: Option<u64>,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// How long to wait before more may be read.
    fn due(&self) -> Duration {
        let Some(rate) = self.rate.filter(|r| *r > 0) else {
            return Duration::ZERO;
        };
        let at = Duration::from_secs_f64(self.bytes as f64 / rate as f64);
        at.saturating_sub(self.since.elapsed())
    }
}

pub(super) struct Scrub<'a> {
    check: Check<'a>,
    progress: &'a dyn Progress,
    pace: Pace,
    report: ScrubReport,
    position: Position,
    file: Option<Arc<dyn File>>,
    done: u64,
    noted: u64,
}

/// A block that is not what its checksum says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Bad {
    lba: u64,
    slot: u32,
    sum: u32,
}

/// Reads and verifies everything, or what `reference` stands on.
pub fn scrub(
    store: &Store,
    reference: Option<&str>,
    options: Options,
    progress: &dyn Progress,
) -> Result<ScrubReport> {
    let top = reference.map(|r| target_of(store, r)).transpose()?;
    let file = match options.dry_run {
        true => None,
        false => Some(claim(store)?),
    };
    let survey = {
        let _lock = store.lock(false)?;
        Survey::new(store)?
    };
    let only = top.map(|below| survey.chain(below));
    let among = |below: &Below| only.as_ref().is_none_or(|o| o.contains(below));
    let mut todo: Vec<Below> = Vec::new();
    for (name, _) in store.bases_dir().list()? {
        todo.extend(Id::parse(&name).map(Below::Base));
    }
    todo.extend(survey.layers.iter().map(|id| Below::Layer(*id)));
    todo.retain(among);
    todo.sort();
    let scope = top.map(Position::word).unwrap_or_default();
    let mut position = read_record(&**store.root(), POSITION)
        .ok()
        .and_then(|bytes| Position::decode(&bytes))
        .filter(|p| p.scope == scope && !options.restart)
        .unwrap_or_default();
    position.scope = scope;
    let resumed = position.item.is_some();
    let mut s = Scrub {
        check: Check {
            store,
            survey,
            report: CheckReport::default(),
            unable: None,
        },
        progress,
        pace: Pace {
            rate: options.rate,
            since: Instant::now(),
            bytes: 0,
        },
        report: ScrubReport {
            resumed,
            ..ScrubReport::default()
        },
        position,
        file,
        done: 0,
        noted: 0,
    };
    s.run(&todo, options.dry_run)?;
    match s.check.unable {
        Some(e) => Err(e.context("not all could be read")),
        None => Ok(s.report),
    }
}

/// The file of the position, locked: one scrub runs at a time.
fn claim(store: &Store) -> Result<Arc<dyn File>> {
    let root = store.root();
    let file = match root.open(POSITION, Access::CreateNew) {
        Err(e) if e.kind() == Kind::Exists => root.open(POSITION, Access::Write)?,
        other => other?,
    };
    file.lock(true).map_err(|e| match e.kind() {
        Kind::Busy => Error::new(Kind::Busy, "another scrub of this store is running")
            .path(file.path())
            .hint("wait for it to end, or end it: what it has read need not be read again"),
        _ => e,
    })?;
    Ok(file)
}

impl Scrub<'_> {
    fn run(&mut self, todo: &[Below], dry_run: bool) -> Result<()> {
        let sizes: Vec<u64> = todo.iter().map(|b| self.size(*b)).collect();
        self.report.total = sizes.iter().fold(0, |all: u64, n| all.saturating_add(*n));
        let from = self.position.clone();
        for (below, size) in todo.iter().zip(sizes) {
            // What was read is not read again, but where damage was found.
            let start = match from.item {
                _ if from.damaged.contains(below) => 0,
                Some(item) if *below < item => {
                    self.done += size;
                    continue;
                }
                Some(item) if *below == item => from.at,
                _ => 0,
            };
            match below {
                Below::Base(_) => self.report.bases += 1,
                Below::Layer(_) => self.report.layers += 1,
            }
            if dry_run {
                continue;
            }
            // Before the place where the last one stopped only damage is read again: the place stays.
            let behind = from.item.is_some_and(|item| *below < item);
            if !behind {
                (self.position.item, self.position.at) = (Some(*below), start);
            }
            let before = self.done;
            let found = self.report.corruptions.len();
            match below {
                Below::Base(id) => self.base(*id, start, behind)?,
                Below::Layer(id) => self.layer(*id, start, behind)?,
            }
            self.done = before + size;
            if self.report.corruptions.len() > found && self.position.damaged.len() < REMEMBER {
                self.position.damaged.insert(*below);
            } else if self.report.corruptions.len() == found {
                self.position.damaged.remove(below);
            }
        }
        if let Some(file) = self.file.take() {
            self.check.store.root().remove(POSITION)?;
            drop(file);
        }
        Ok(())
    }
    /// Bytes to be read of a layer or base; 0 where that is not known.
    fn size(&self, below: Below) -> u64 {
        let store = self.check.store;
        match below {
            Below::Layer(id) => {
                let Some((header, _)) = self.check.survey.header_of(id) else {
                    return 0;
                };
                let found = store
                    .layers_dir()
                    .open(&layer_file(id), Access::Read)
                    .and_then(|file| recover::superblock(&*file, &header));
                found.map_or(0, |f| {
                    let s = f.superblock;
                    let held = s.history_blocks.get();
                    s.data_blocks
                        .get()
                        .saturating_add(held)
                        .saturating_mul(BLOCK)
                })
            }
            Below::Base(id) => {
                let ranges = store
                    .base(id)
                    .and_then(|b| b.file().data_ranges(0, b.len()));
                ranges.map_or(0, |ranges| ranges.iter().map(|r| r.1).sum())
            }
        }
    }
    /// So many bytes were read: keeps to the rate, notes the position, tells how far it is. `at`: from where on the present object is
    /// still to be read, if it is known.
    fn step(&mut self, bytes: u64, at: Option<u64>) -> Result<()> {
        self.done += bytes;
        self.report.verified += bytes;
        self.pace.bytes += bytes;
        if let Some(at) = at {
            self.position.at = at;
        }
        loop {
            let total = self.report.total;
            if !self.progress.update(self.done.min(total), total) {
                return Err(self.interrupted());
            }
            match self.pace.due() {
                Duration::ZERO => break,
                due => std::thread::sleep(due.min(Duration::from_millis(50))),
            }
        }
        if self.report.verified >= self.noted + NOTE {
            self.noted = self.report.verified;
            self.note()?;
        }
        Ok(())
    }
    fn note(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        // In place, without a sync: a torn record is told by its sum, and costs nothing but time.
        let bytes = self.position.encode();
        file.write_at(&bytes, 0)?;
        file.set_len(bytes.len() as u64)
    }
    fn interrupted(&self) -> Error {
        let found = self.report.corruptions.len();
        let hint = match self.note() {
            Ok(()) => {
                "run it again: it goes on where it stopped; --restart begins anew".to_string()
            }
            Err(e) => format!("run it again; where it stopped could not be noted: {e}"),
        };
        let what = match found {
            0 => "the scrub was interrupted".to_string(),
            n => format!("the scrub was interrupted; {n} corruptions were found so far"),
        };
        Error::new(Kind::Interrupted, what).hint(hint)
    }
    fn failed(&mut self, below: Below, e: &Error) {
        self.told(|check| check.failed(below, e));
    }
    /// What `f` finds is told.
    pub(super) fn told(&mut self, f: impl FnOnce(&mut Check<'_>)) {
        f(&mut self.check);
        self.report
            .corruptions
            .append(&mut self.check.report.corruptions);
    }
    /// So many bytes were read that do not count as a place to go on from.
    pub(super) fn read(&mut self, bytes: u64) -> Result<()> {
        self.step(bytes, None)
    }
    pub(super) fn store(&self) -> &Store {
        self.check.store
    }
    /// Tells of blocks that do not match, neighbours together.
    fn tell(&mut self, below: Below, mut bad: Vec<Bad>, file: &str) {
        bad.sort();
        let mut groups: Vec<(Bad, u64)> = Vec::new();
        for b in bad {
            match groups.last_mut() {
                // Not over the border of a region: who is affected is asked for each.
                Some((first, n))
                    if first.lba + *n == b.lba && !b.lba.is_multiple_of(REGION_BLOCKS as u64) =>
                {
                    *n += 1;
                }
                _ => groups.push((b, 1)),
            }
        }
        let rest = groups.len().saturating_sub(TOLD);
        for (first, n) in groups.into_iter().take(TOLD) {
            let lba = (first.lba, first.lba + n);
            let offset = match below {
                Below::Layer(_) => Slot(first.slot).at(),
                Below::Base(_) => first.lba * BLOCK,
            };
            let which = match n {
                1 => format!("block {} does not match its checksum", lba.0),
                _ => format!(
                    "blocks {} to {} do not match their checksums",
                    lba.0,
                    lba.1 - 1
                ),
            };
            let finding = Finding {
                lba: Some(lba),
                slot: matches!(below, Below::Layer(_)).then_some(first.slot),
                offset: Some(offset),
                affected: self.check.survey.affected(below, Some(lba)),
                ..self
                    .check
                    .about(below, format!("{which} (offset {offset:#x} of {file})"))
            };
            self.report.corruptions.push(finding);
        }
        if rest > 0 {
            let finding = self
                .check
                .about(below, format!("and {rest} more places of {file}"));
            self.report.corruptions.push(finding);
        }
    }

    // ---- layers ----------------------------------------------------------------------------------------------

    fn layer(&mut self, id: Id, from: u64, behind: bool) -> Result<()> {
        let below = Below::Layer(id);
        let store = self.check.store;
        let file = match store.layers_dir().open(&layer_file(id), Access::Read) {
            // Removed meanwhile.
            Err(e) if e.kind() == Kind::NotFound => return Ok(()),
            Err(e) => {
                self.failed(below, &e);
                return Ok(());
            }
            Ok(file) => file,
        };
        let Some((header, state)) = self.check.survey.header_of(id) else {
            let found = std::mem::take(&mut self.check.survey.unreadable);
            if let Some((_, e)) = found.iter().find(|(bad, _)| *bad == id)
                && self.check.survey.needed(below)
            {
                self.failed(below, e);
            }
            self.check.survey.unreadable = found;
            return Ok(());
        };
        let sealed = state == STATE_SEALED;
        // From the disk, not from memory: what is not dirty is forgotten first. All of it, as what is mapped below stays.
        file.forget_cached(0, u64::MAX);
        let opened = match sealed {
            true => ReadLayer::open(file.clone()).map(Arc::new),
            false => open_layer(store, id),
        };
        let layer = match opened {
            Ok(layer) if layer.id() == id => layer,
            Ok(layer) => {
                let held = layer.id();
                let e = Error::new(Kind::Corrupt, format!("its file holds layer {held}"));
                self.failed(below, &e);
                return Ok(());
            }
            // In use, and its map changed each time it was looked at.
            Err(e) if !sealed && self.in_use(&*file) => {
                let mut finding = self.check.about(
                    below,
                    format!("left out, as its map changed whenever it was read ({e}); detach it, or scrub it when it is quiet"),
                );
                finding.affected.clear();
                self.report.skipped.push(finding);
                return Ok(());
            }
            Err(e) => {
                self.failed(below, &e);
                return Ok(());
            }
        };
        let told = self.report.corruptions.len();
        if from == 0 {
            self.pages(id, &file, &layer, &header)?;
        }
        // Where damage was found, all is read again by whoever goes on: the report of the last call has everything.
        let keep = !behind && self.report.corruptions.len() == told;
        let mut batch: Vec<Bad> = Vec::with_capacity(BATCH);
        let mut bad = Vec::new();
        let mut next = Region(from as u32);
        for item in layer.items(next) {
            match item {
                Ok(Item::Region(region, map)) => {
                    if batch.len() + REGION_BLOCKS > BATCH {
                        let at = keep.then_some(u64::from(next.0));
                        self.data(id, &layer, &mut batch, &mut bad, sealed, at)?;
                    }
                    batch.extend(map.iter().filter_map(|(index, pointer)| match pointer {
                        Pointer::Data { slot, sum } => Some(Bad {
                            lba: region.lba(index).0.into(),
                            slot: slot.0,
                            sum,
                        }),
                        _ => None,
                    }));
                    next = Region(region.0 + 1);
                }
                Ok(Item::Zeros(..)) => {}
                Err(e) => {
                    self.failed(below, &e);
                    break;
                }
            }
        }
        let at = keep.then_some(u64::from(next.0));
        self.data(id, &layer, &mut batch, &mut bad, sealed, at)?;
        if layer.has_history() {
            self.history(id, &layer)?;
        }
        self.tell(below, bad, &format!("layers/{}", layer_file(id)));
        Ok(())
    }
    /// Is someone writing into it? Whoever opens a layer for writing holds the names lock.
    fn in_use(&self, file: &dyn File) -> bool {
        let lock = self.check.store.lock(false);
        lock.is_ok() && file.lock(false).is_err_and(|e| e.kind() == Kind::Busy)
    }
    /// Pages that are no data: superblocks, maps, free list. That the layer could be opened says that the header, one superblock and
    /// the trailers of the maps are sound.
    fn pages(
        &mut self,
        id: Id,
        file: &Arc<dyn File>,
        layer: &ReadLayer,
        header: &format::Header,
    ) -> Result<()> {
        let below = Below::Layer(id);
        let sealed = layer.state() == crate::layer::State::Sealed;
        let found = recover::superblock(&**file, header);
        if let Ok(found) = &found
            && found.damaged_copy
            && found.superblock.state.get() != STATE_WRITABLE
        {
            let slot = if found.second_differs { 2 } else { 1 };
            let mut finding = self.check.about(
                below,
                format!("copy {slot} of the superblock is damaged; the other is in use, `forkdisk check --repair` writes it anew"),
            );
            (finding.slot, finding.offset) = (Some(slot), Some(Slot(slot).at()));
            finding.affected.clear();
            self.report.corruptions.push(finding);
        }
        for run in layer.runs() {
            let at = Slot(run.reference().slot.get()).at();
            let len = run.reference().len.get();
            file.forget_cached(at, len);
            if let Err(e) = run.verify() {
                self.failed(below, &e);
            }
            self.step(0, None)?;
        }
        if sealed
            && let Err(e) = free_list(&**file, layer.superblock())
            // Somebody may have let go of a part of its history meanwhile.
            && layer.is_current().unwrap_or(true)
        {
            self.failed(below, &e);
        }
        Ok(())
    }
    /// Reads the blocks of a batch in the order of their slots.
    fn data(
        &mut self,
        id: Id,
        layer: &ReadLayer,
        batch: &mut Vec<Bad>,
        bad: &mut Vec<Bad>,
        sealed: bool,
        at: Option<u64>,
    ) -> Result<()> {
        batch.sort_by_key(|b| b.slot);
        let file = layer.file().clone();
        let mut buf = vec![0; PIECE * BLOCK_SIZE];
        let mut suspects = Vec::new();
        let mut rest = &batch[..];
        while let Some(first) = rest.first() {
            let n = rest
                .iter()
                .zip(first.slot..=u32::MAX)
                .take(PIECE)
                .take_while(|(b, slot)| b.slot == *slot)
                .count()
                .max(1);
            let (piece, later) = rest.split_at(n);
            rest = later;
            let buf = &mut buf[..n * BLOCK_SIZE];
            file.forget_cached(Slot(first.slot).at(), buf.len() as u64);
            if file.read_at(buf, Slot(first.slot).at()).is_ok() {
                let blocks = buf.chunks_exact(BLOCK_SIZE);
                let wrong = piece
                    .iter()
                    .zip(blocks)
                    .filter(|(b, block)| format::crc(block) != b.sum);
                suspects.extend(wrong.map(|(b, _)| *b));
            } else {
                // One of them cannot be read: which?
                suspects.extend(piece.iter().filter(|b| !matches(&*file, b)));
            }
            self.step(n as u64 * BLOCK, None)?;
        }
        if !suspects.is_empty() && !sealed {
            // Its writer may have put other blocks there. What is damaged is still called by the map, and still wrong.
            let now = open_layer(self.check.store, id);
            suspects.retain(|b| match &now {
                Ok(now) => {
                    let pointer = now.pointer(Lba(b.lba as u32));
                    let same = pointer.is_ok_and(|p| {
                        p == Pointer::Data {
                            slot: Slot(b.slot),
                            sum: b.sum,
                        }
                    });
                    same && !matches(&**now.file(), b)
                }
                Err(_) => false,
            });
        }
        bad.extend(suspects);
        batch.clear();
        // What was found is told with the layer; it is read again as a whole if this is not its end.
        if bad.is_empty() {
            self.step(0, at)?;
        }
        Ok(())
    }

    // ---- bases -----------------------------------------------------------------------------------------------

    fn base(&mut self, id: Id, from: u64, behind: bool) -> Result<()> {
        let below = Below::Base(id);
        let store = self.check.store;
        let dir = match store.bases_dir().subdir(&id.to_string()) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(()),
            other => other,
        };
        let opened = dir.and_then(|dir| Ok((dir, store.base(id)?)));
        let (dir, base) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                self.failed(below, &e);
                return Ok(());
            }
        };
        let done = match base.has_sums() {
            true => self.compare(&*dir, &base, from, behind),
            false => self.sum(&*dir, &base),
        };
        match done {
            Err(e) if e.kind() == Kind::Interrupted => return Err(e),
            Err(e) => self.failed(below, &e),
            Ok(()) => {}
        }
        Ok(())
    }
    /// Compares an image with its checksums.
    fn compare(&mut self, dir: &dyn Dir, base: &Base, from: u64, behind: bool) -> Result<()> {
        let sums = dir.open("sums", Access::Read)?;
        let mut head = vec![0; BLOCK_SIZE];
        sums.read_at(&mut head, 0)?;
        SumsHeader::decode(&head, &base.id())?;
        let all = blocks(base.len());
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (at, len) in base.file().data_ranges(0, base.len())? {
            ranges.push((at / BLOCK, (at + len).div_ceil(BLOCK)));
        }
        // A hole is right where no sum says otherwise.
        for (at, len) in sums.data_ranges(BLOCK, all * 4)? {
            let first = (at - BLOCK) / 4;
            ranges.push((first, (first + len.div_ceil(4)).min(all)));
        }
        ranges.sort();
        let mut bad = Vec::new();
        let mut at = from;
        let mut wanted = vec![0; PIECE * 4];
        let mut buf = vec![0; PIECE * BLOCK_SIZE];
        for (start, end) in ranges {
            at = at.max(start);
            while at < end {
                let n = (end - at).min(PIECE as u64) as usize;
                let wanted = &mut wanted[..n * 4];
                sums.read_at(wanted, BLOCK + at * 4)?;
                let buf = &mut buf[..n * BLOCK_SIZE];
                let whole = read_image(base, at, buf).is_ok();
                for i in 0..n {
                    let lba = at + i as u64;
                    let raw = &wanted[i * 4..i * 4 + 4];
                    let sum = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]) ^ ZERO_SUM;
                    let block = &mut buf[i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE];
                    let readable = whole || read_image(base, lba, block).is_ok();
                    if !readable || format::crc(block) != sum {
                        bad.push(Bad { lba, slot: 0, sum });
                    }
                }
                at += n as u64;
                let done = (!behind && bad.is_empty()).then_some(at);
                self.step(n as u64 * BLOCK, done)?;
            }
        }
        let file = base.file().path().display().to_string();
        self.tell(Below::Base(base.id()), bad, &file);
        Ok(())
    }
    /// Computes the checksums of an image that has none.
    fn sum(&mut self, dir: &dyn Dir, base: &Base) -> Result<()> {
        let store = self.check.store;
        let id = base.id();
        let meta = store.base_meta(id)?;
        store.check_link(&meta)?;
        let name = format!("{TEMPORARY}sums");
        // Of a scrub that was interrupted: this one is the only one.
        match dir.remove(&name) {
            Err(e) if e.kind() == Kind::NotFound => {}
            other => other?,
        }
        let sums = dir.open(&name, Access::CreateNew)?;
        let made = self.sum_into(&*sums, base, meta.digest.as_deref());
        let done = made.and_then(|()| {
            // Whoever changed it meanwhile must not find the change approved.
            store.check_link(&meta)?;
            dir.rename_new(&name, "sums")?;
            dir.sync()
        });
        match done {
            Ok(()) => {
                base.add_sums(sums)?;
                self.report
                    .summed
                    .push(self.check.survey.called(Below::Base(id)));
                Ok(())
            }
            Err(e) => {
                let _ = dir.remove(&name);
                Err(e)
            }
        }
    }
    fn sum_into(&mut self, sums: &dyn File, base: &Base, digest: Option<&str>) -> Result<()> {
        let all = blocks(base.len());
        let mut hasher = digest.map(|_| Sha256::new());
        let mut hashed = 0;
        let mut hash_to = |hasher: &mut Option<Sha256>, end: u64, data: &[u8]| {
            let Some(hasher) = hasher else { return };
            let zeros = [0; BLOCK_SIZE];
            while hashed < end {
                let n = (end - hashed).min(BLOCK);
                hasher.update(&zeros[..n as usize]);
                hashed += n;
            }
            hasher.update(data);
            hashed += data.len() as u64;
        };
        let mut buf = vec![0; PIECE * BLOCK_SIZE];
        let mut at = 0;
        for (start, len) in base.file().data_ranges(0, base.len())? {
            at = (start / BLOCK).max(at);
            let end = (start + len).div_ceil(BLOCK);
            while at < end {
                let n = (end - at).min(PIECE as u64) as usize;
                let buf = &mut buf[..n * BLOCK_SIZE];
                read_image(base, at, buf)?;
                let mut found = Vec::with_capacity(n * 4);
                for block in buf.chunks_exact(BLOCK_SIZE) {
                    found.extend_from_slice(&(format::crc(block) ^ ZERO_SUM).to_le_bytes());
                }
                if found.iter().any(|b| *b != 0) {
                    sums.write_at(&found, BLOCK + at * 4)?;
                }
                let inside = (base.len() - at * BLOCK).min(buf.len() as u64) as usize;
                hash_to(&mut hasher, at * BLOCK, &buf[..inside]);
                at += n as u64;
                self.step(n as u64 * BLOCK, None)?;
            }
        }
        hash_to(&mut hasher, base.len(), &[]);
        if let (Some(hasher), Some(digest)) = (hasher, digest) {
            let hex = hasher.finalize().iter().fold(String::new(), |mut s, b| {
                s.push_str(&format!("{b:02x}"));
                s
            });
            if digest != format!("sha256:{hex}") {
                return Err(Error::new(
                    Kind::Corrupt,
                    "its checksums are gone, and its contents are not those that were imported",
                )
                .path(base.file().path())
                .hint("restore the image from a backup, or import it again"));
            }
        }
        sums.write_at(SumsHeader::new(base.id(), all).as_bytes(), 0)?;
        sums.set_len(BLOCK + all * 4)?;
        sums.sync()
    }
}

/// Is a block what its checksum says?
fn matches(file: &dyn File, b: &Bad) -> bool {
    let mut block = vec![0; BLOCK_SIZE];
    file.read_at(&mut block, Slot(b.slot).at()).is_ok() && format::crc(&block) == b.sum
}

/// Blocks of an image from `lba` on, from the disk and not from memory; what lies past its end is zeros.
fn read_image(base: &Base, lba: u64, buf: &mut [u8]) -> Result<()> {
    let at = lba * BLOCK;
    let inside = base.len().saturating_sub(at).min(buf.len() as u64) as usize;
    let (data, past) = buf.split_at_mut(inside);
    past.fill(0);
    base.file().forget_cached(at, inside as u64);
    base.file().read_at(data, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_found_again() {
        let position = Position {
            scope: "layer:00112233445566778899aabbccddeeff".into(),
            item: Some(Below::Layer(Id([7; 16]))),
            at: 12,
            damaged: [Below::Base(Id([1; 16])), Below::Layer(Id([2; 16]))].into(),
        };
        assert_eq!(Position::decode(&position.encode()), Some(position.clone()));
        let bytes = position.encode();
        for cut in [0, 10, bytes.len() - 1] {
            assert_eq!(Position::decode(&bytes[..cut]), None);
        }
        let full = Position {
            damaged: (0..REMEMBER as u128)
                .map(|n| Below::Layer(Id((n << 64).to_be_bytes())))
                .collect(),
            ..position
        };
        assert!(full.encode().len() as u64 <= format::text::MAX_RECORD);
    }
}
