//! A store on a simulated disk beside a plain model of it: what every property and crash test runs.
//!
//! The model keeps, for each disk, its contents now, at the last acknowledged flush, and at the flushes that were begun since and not
//! acknowledged. Whatever is found after a crash must be exactly one of these flushes: acknowledged <= found <= attempted, and never a mixture.
#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

pub mod audit;
mod change;
pub mod failing;
mod model;
pub mod mortal;
mod ops;
mod rot;

pub use model::{Attempt, Model};
pub use ops::{Op, random_op};

use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Error, Kind, Result};
use forkdisk::format::Header;
use forkdisk::io::sim::{Policy, SimDisk, Verb};
use forkdisk::store::history::{At, Limits};
use forkdisk::store::{Below, Env, ImportMode, ImportSource, ObjectKind, Quiet, Store};
use forkdisk::units::Id;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Deterministic random numbers (splitmix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// An environment without clock and randomness.
pub fn env(seed: u64) -> Env {
    let next = Arc::new(AtomicU64::new(1));
    let clock = next.clone();
    Env {
        id: Arc::new(move || {
            let n = next.fetch_add(1, Ordering::SeqCst);
            let mut id = [0; 16];
            id[..8].copy_from_slice(&seed.to_be_bytes());
            id[8..].copy_from_slice(&n.to_be_bytes());
            Id(id)
        }),
        now: Arc::new(move || 1_700_000_000 + clock.load(Ordering::SeqCst)),
        depth: forkdisk::format::MAX_DEPTH,
    }
}

/// The image all disks begin with: not a multiple of the block size, with a hole.
pub fn base_image(len: usize) -> Vec<u8> {
    let mut rng = Rng(7);
    let mut image = vec![0; len];
    let hole = len / 3..len / 3 + 40_000.min(len / 4);
    for (i, chunk) in image.chunks_mut(8).enumerate() {
        if !hole.contains(&(i * 8)) {
            let bytes = rng.next().to_le_bytes();
            let n = chunk.len();
            chunk.copy_from_slice(&bytes[..n]);
        }
    }
    image
}

/// An operation that makes or removes names, while it runs and after it failed.
#[derive(Clone, Default)]
pub struct UnderWay {
    /// Names that are being made, whether they are disks, and what they hold if they are there.
    making: Vec<(String, bool, Arc<Vec<u8>>)>,
    /// Names that are going.
    removing: Vec<String>,
    /// Names that are being changed, old and new: there is one of the two, and not both.
    moving: Vec<(String, String)>,
}

impl UnderWay {
    fn is_nothing(&self) -> bool {
        self.making.is_empty() && self.removing.is_empty() && self.moving.is_empty()
    }
}

/// What the histories reached, over a whole suite.
#[derive(Default, Debug, Clone, PartialEq, Eq)]
pub struct Reached(pub BTreeMap<&'static str, u64>);

impl Reached {
    pub fn note(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }
    pub fn add(&mut self, other: &Reached) {
        for (what, n) in &other.0 {
            *self.0.entry(what).or_default() += n;
        }
    }
}

/// The store and its model.
pub struct World {
    pub sim: SimDisk,
    pub store: Store,
    pub size: u64,
    pub disks: BTreeMap<String, Model>,
    pub frozen: BTreeMap<String, Arc<Vec<u8>>>,
    pub under_way: UnderWay,
    pub reached: Reached,
    /// A sync failed: what readers see may not be what is on the disk.
    pub doubt: bool,
    /// Nobody else comes in between: he could meet a fault and wait for the one he interrupts.
    pub alone: bool,
    /// The filesystem takes no more changes: only a power cut ends that.
    pub stopped: bool,
    /// What disks that keep a history held when a flush was acknowledged: by layer, and number of the point.
    pub points: BTreeMap<(Id, u64), Arc<Vec<u8>>>,
    open: BTreeMap<String, Arc<CowDisk>>,
    made: u64,
}

pub const IMAGE: &str = "image";

/// A store with one image, made once for each size: copied for each test.
fn template(blocks: u64) -> SimDisk {
    static MADE: Mutex<BTreeMap<u64, SimDisk>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().expect("no test panics in here");
    let sim = made.entry(blocks).or_insert_with(|| {
        let sim = SimDisk::new(0);
        let store = Store::init_on(sim.root(), Path::new("/sim"), env(u64::MAX)).expect("a store");
        let image = base_image((blocks * 4096 - 1000) as usize);
        store
            .import(
                ImportSource::Reader(&mut &image[..]),
                IMAGE,
                ImportMode::Copy,
                &Quiet,
            )
            .expect("import");
        sim
    });
    sim.crash_with(Policy::AllDone)
}

/// What a disk holds if it is right, or what is wrong with it.
pub type Verdict = std::result::Result<Arc<Vec<u8>>, String>;

impl World {
    /// A store with one image and one disk.
    pub fn new(seed: u64, blocks: u64) -> World {
        let sim = template(blocks);
        sim.reseed(seed);
        let mut contents = base_image((blocks * 4096 - 1000) as usize);
        contents.resize((blocks * 4096) as usize, 0);
        let frozen = BTreeMap::from([(IMAGE.to_string(), Arc::new(contents))]);
        let mut world = World::on(sim, seed, blocks * 4096, BTreeMap::new(), frozen, 0)
            .expect("a store that opens");
        world.run(&Op::Fork { from: 0 }).expect("the first disk");
        // Every third history: its first disk keeps its own, all of it or as much as room is left for.
        if seed.is_multiple_of(3) {
            let window = seed.is_multiple_of(2).then_some(1_000_000);
            let bytes = window.is_none().then_some(24 * 4096);
            let first: Vec<String> = world.disks.keys().cloned().collect();
            let limits = Limits { window, bytes };
            world
                .store
                .set_history(&first, Some(limits))
                .expect("a history");
        }
        world
    }
    /// The store on `sim`, all disks closed.
    fn on(
        sim: SimDisk,
        seed: u64,
        size: u64,
        disks: BTreeMap<String, Model>,
        frozen: BTreeMap<String, Arc<Vec<u8>>>,
        made: u64,
    ) -> Result<World> {
        // No two worlds of one history draw the same ids.
        let ids = env(Rng(seed ^ made.wrapping_mul(0x2545_F491_4F6C_DD1D)).next());
        let store = Store::open_on(sim.root(), Path::new("/sim"), ids)?;
        Ok(World {
            sim,
            store,
            size,
            disks,
            frozen,
            under_way: UnderWay::default(),
            reached: Reached::default(),
            doubt: false,
            alone: false,
            stopped: false,
            points: BTreeMap::new(),
            open: BTreeMap::new(),
            made,
        })
    }
    /// A copy of a world at rest: its disks are closed first.
    pub fn copy(&mut self, seed: u64) -> World {
        self.close_all().expect("close");
        let sim = self.sim.crash_with(Policy::AllDone);
        sim.reseed(seed);
        let mut copy = World::on(
            sim,
            seed,
            self.size,
            self.disks.clone(),
            self.frozen.clone(),
            self.made + 1000,
        )
        .expect("a store that opens");
        copy.points = self.points.clone();
        copy
    }
    fn pick_disk(&self, n: usize) -> Option<String> {
        let names: Vec<&String> = self.disks.keys().collect();
        (!names.is_empty()).then(|| names[n % names.len()].clone())
    }
    fn pick_any(&self, n: usize) -> Option<String> {
        let names: Vec<&String> = self.frozen.keys().chain(self.disks.keys()).collect();
        (!names.is_empty()).then(|| names[n % names.len()].clone())
    }
    fn opened(&mut self, name: &str) -> Result<Arc<CowDisk>> {
        if let Some(disk) = self.open.get(name) {
            return Ok(disk.clone());
        }
        let object = self.store.resolve(name)?;
        // As a server opens it: what it rests on becomes durable with the first write. Not in a world after a crash, where disks are found of which
        // nobody was told.
        let disk = if self.made < 1000 && (self.open.len() as u64 + self.made).is_multiple_of(2) {
            self.reached.note("opened without a sync");
            let memory = forkdisk::layer::volatile::private()?;
            self.store.open_cow_on(&object, memory)?
        } else {
            self.store.open_cow(&object, true)?
        };
        self.open.insert(name.to_string(), disk.clone());
        Ok(disk)
    }
    fn model(&mut self, name: &str) -> &mut Model {
        self.disks.get_mut(name).expect("a disk of the model")
    }
    fn begin_flush(&mut self, name: &str) {
        let model = self.model(name);
        model.attempted.push(Attempt::of(model.now.clone()));
    }
    fn flushed(&mut self, name: &str) {
        let now = self.model(name).now.clone();
        self.acknowledged(name, now);
    }
    fn acknowledged(&mut self, name: &str, contents: Arc<Vec<u8>>) {
        let open = self.open.get(name).cloned();
        if let Some(point) = open.as_ref().and_then(|disk| disk.point()) {
            self.points.insert(point, contents.clone());
        }
        if open.is_some_and(|disk| disk.history_bytes() > 0) {
            self.reached.note("history kept");
        }
        self.model(name).acknowledge(contents);
    }
    /// Each point of a history is what was acknowledged then. All disks are closed.
    fn look_back(&self, story: &str) {
        for name in self.disks.keys() {
            let object = self.store.resolve(name).expect("a disk of the model");
            let history = self.store.history(name);
            let history =
                history.unwrap_or_else(|e| panic!("{story}: the history of {name}: {e:?}"));
            // The layers that were its own before it was snapshotted keep theirs.
            let details = self.store.details(&object);
            let details = details.unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
            let kept = |number: u64| {
                let mut chain = details.chain.iter();
                chain.find_map(|layer| self.points.get(&(layer.id(), number)))
            };
            // A few of them, the last among them: each is all of a disk.
            let few = history.points.len() / 5 + 1;
            for point in history.points.iter().rev().step_by(few) {
                let number = point.number;
                let Some(contents) = kept(number) else {
                    continue;
                };
                let story = format!("{story}: point {number}");
                let past = self.store.open_at(name, At::Number(number));
                let past = past.unwrap_or_else(|e| panic!("{story}: {e:?}"));
                // A disk that was given another size since shows the past in that one.
                let mut expected = contents.to_vec();
                expected.resize(past.size() as usize, 0);
                with_all(&*past, |found| same(&story, name, found, &expected))
                    .unwrap_or_else(|e| panic!("{story}: read {name}: {e:?}"));
            }
        }
    }
    /// Closes a disk: a flush at the least.
    fn close(&mut self, name: &str) -> Result<()> {
        if let Some(disk) = self.open.get(name).cloned() {
            self.begin_flush(name);
            disk.close()?;
            self.open.remove(name);
            self.flushed(name);
            // All of it is in the block maps: no commit is the last one any more.
            self.model(name).earlier = None;
        }
        Ok(())
    }
    /// Does `op` to both. An error is the store's; the model then knows what was under way.
    pub fn run(&mut self, op: &Op) -> Result<()> {
        let disk = match op {
            Op::Write { disk, .. }
            | Op::Discard { disk, .. }
            | Op::Flush { disk }
            | Op::FlushAmid { disk, .. }
            | Op::Checkpoint { disk }
            | Op::Maintain { disk }
            | Op::Snapshot { disk }
            | Op::Commit { disk }
            | Op::Reopen { disk }
            | Op::Rollback { disk, .. }
            | Op::Resize { disk, .. }
            | Op::SnapshotTwo { disk }
            | Op::Close { disk } => match self.pick_disk(*disk) {
                Some(name) => name,
                None => return Ok(()),
            },
            Op::Fork { .. }
            | Op::Forks { .. }
            | Op::Rename { .. }
            | Op::Remove { .. }
            | Op::Squash { .. }
            | Op::Flatten { .. }
            | Op::Import { .. }
            | Op::Gc => String::new(),
        };
        match op {
            Op::Write { at, len, seed, .. } => {
                let size = self.size_of(&disk);
                let at = at % size;
                let len = (*len).min(size - at);
                let data = data(*seed, len);
                self.opened(&disk)?.write(&data, at)?;
                let now = Arc::make_mut(&mut self.model(&disk).now);
                now[at as usize..(at + len) as usize].copy_from_slice(&data);
                if len >= 2 * 4096 && seed.is_multiple_of(7) {
                    self.reached.note("zeros written");
                }
            }
            Op::Discard { at, len, .. } => {
                let size = self.size_of(&disk);
                let at = at % size;
                let len = (*len).min(size - at);
                self.opened(&disk)?.discard(at, len)?;
                self.reached.note("discard");
                let now = Arc::make_mut(&mut self.model(&disk).now);
                now[at as usize..(at + len) as usize].fill(0);
                const REGION: u64 = 512 * 4096;
                if at.next_multiple_of(REGION) + REGION <= at + len {
                    self.reached.note("discard of a region");
                }
            }
            Op::Flush { .. } => {
                let open = self.opened(&disk)?;
                self.begin_flush(&disk);
                open.flush()?;
                self.flushed(&disk);
            }
            Op::FlushAmid { at, seed, .. } => self.flush_amid(&disk, *at, *seed)?,
            Op::Checkpoint { .. } => {
                self.opened(&disk)?.checkpoint()?;
                self.model(&disk).earlier = None;
            }
            Op::Maintain { .. } => self.opened(&disk)?.maintain()?,
            Op::Snapshot { .. } => self.snapshot(&disk)?,
            Op::Commit { .. } => self.commit(&disk)?,
            Op::Fork { from } => self.fork(*from, 1)?,
            Op::Forks { from } => self.fork(*from, 3)?,
            Op::Reopen { .. } => {
                self.close(&disk)?;
                self.opened(&disk)?;
                self.reached.note("reopening");
            }
            Op::Close { .. } => self.close(&disk)?,
            Op::Rollback { to, .. } => self.roll_back(&disk, *to)?,
            Op::Resize { blocks, .. } => self.resize(&disk, *blocks)?,
            Op::SnapshotTwo { .. } => self.snapshot_two(&disk)?,
            Op::Rename { what } => self.rename(*what)?,
            Op::Remove { what } => self.remove(*what)?,
            Op::Squash { what, all } => self.squash(*what, *all == 1)?,
            Op::Flatten { what } => self.flatten(*what)?,
            Op::Import { seed } => self.import(*seed)?,
            Op::Gc => {
                self.store.gc(false)?;
                self.certain_names();
                self.reached.note("gc");
            }
        }
        if self.open.len() > 1 {
            self.reached.note("several disks open");
        }
        Ok(())
    }
    fn snapshot(&mut self, disk: &str) -> Result<()> {
        self.made += 1;
        let snap = format!("s{}", self.made);
        let full = format!("{disk}@{snap}");
        let now = self.model(disk).now.clone();
        self.under_way
            .making
            .push((full.clone(), false, now.clone()));
        self.begin_flush(disk);
        match self.open.get(disk).cloned() {
            Some(open) => {
                self.store
                    .snapshot_running(&open, disk, &snap, Some("a message"))?;
                self.reached.note("snapshot of an open disk");
            }
            None if self.made.is_multiple_of(2) => {
                self.beneath_readers(disk, &now, |store, open| {
                    store.snapshot_running(open, disk, &snap, None).map(drop)
                })?;
                self.reached.note("snapshot of a disk open for reading");
            }
            None => drop(self.store.snapshot(disk, &snap, None)?),
        }
        self.flushed(disk);
        self.model(disk).earlier = None;
        self.under_way.making.retain(|m| m.0 != full);
        self.frozen.insert(full, now);
        self.certain_names();
        Ok(())
    }
    fn commit(&mut self, disk: &str) -> Result<()> {
        self.made += 1;
        let image = format!("c{}", self.made);
        let now = self.model(disk).now.clone();
        self.under_way
            .making
            .push((image.clone(), false, now.clone()));
        self.begin_flush(disk);
        match self.open.get(disk).cloned() {
            Some(open) => {
                // Of a disk that has nothing of its own the parent gets the name, if that is a layer.
                let alone = open.private_blocks() == (0, 0);
                let on_layer = matches!(
                    self.store.resolve(disk)?.parent,
                    Some(forkdisk::store::Below::Layer(_))
                );
                self.store
                    .commit_running(&open, disk, &image, Some("a message"))?;
                if !(alone && on_layer) {
                    self.flushed(disk);
                    self.model(disk).earlier = None;
                    self.reached.note("commit of an open disk");
                }
            }
            None => {
                self.store.commit(disk, &image, None)?;
                self.flushed(disk);
                self.model(disk).earlier = None;
                self.reached.note("commit of a disk at rest");
            }
        }
        self.under_way.making.retain(|m| m.0 != image);
        self.frozen.insert(image, now);
        self.certain_names();
        Ok(())
    }
    /// A flush, and somebody who writes in the middle of it.
    fn flush_amid(&mut self, disk: &str, at: u64, seed: u64) -> Result<()> {
        let open = self.opened(disk)?;
        self.begin_flush(disk);
        let acknowledged = self.model(disk).now.clone();
        let written = Arc::new(Mutex::new(Vec::<(u64, Vec<u8>)>::new()));
        if !self.alone {
            let (other, wrote, size) = (open.clone(), written.clone(), self.size_of(disk));
            let before = if seed.is_multiple_of(2) {
                Verb::Write
            } else {
                Verb::Sync
            };
            self.sim.meanwhile(before, move || {
                // First where the flush may well have data; then twice at one place, so that a slot comes back at once.
                for (i, at) in [at, at + 4096, at + 4096].into_iter().enumerate() {
                    let at = at % size;
                    let data = data(seed ^ i as u64, 4096.min(size - at));
                    // An error is the power cut; the flush will meet it as well.
                    if other.write(&data, at).is_ok() {
                        wrote.lock().expect("written").push((at, data));
                    }
                }
            });
        }
        let done = open.flush();
        let missed = self.sim.take_meanwhile();
        let model = self.model(disk);
        for (at, data) in written.lock().expect("written").drain(..) {
            let now = Arc::make_mut(&mut model.now);
            now[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
        done?;
        self.acknowledged(disk, acknowledged);
        if !missed {
            self.reached.note("writes in the middle of a flush");
        }
        Ok(())
    }
    fn rename(&mut self, what: usize) -> Result<()> {
        let Some(old) = self.pick_any(what) else {
            return Ok(());
        };
        if !self.under_way.is_nothing() {
            // A snapshot that may be there would get another name as well, and a name in change a third one.
            self.store.gc(false)?;
            self.certain_names();
        }
        self.made += 1;
        let new = match old.split_once('@') {
            Some((disk, _)) => format!("{disk}@r{}", self.made),
            None => format!("r{}", self.made),
        };
        let is_disk = self.disks.contains_key(&old);
        if is_disk {
            self.close(&old)?;
        }
        let prefix = format!("{old}@");
        let snaps = self
            .frozen
            .keys()
            .filter(|n| is_disk && n.starts_with(&prefix));
        let mut pairs: Vec<(String, String)> = snaps
            .map(|n| (n.clone(), format!("{new}@{}", &n[prefix.len()..])))
            .collect();
        pairs.push((old.clone(), new.clone()));
        self.under_way.moving.extend(pairs.iter().cloned());
        self.store.rename(&old, &new)?;
        self.under_way.moving.retain(|m| !pairs.contains(m));
        for (old, new) in &pairs {
            self.moved(old, new);
        }
        self.certain_names();
        self.reached.note("renaming");
        Ok(())
    }
    /// The model follows a change of names.
    fn moved(&mut self, old: &str, new: &str) {
        if let Some(model) = self.disks.remove(old) {
            self.disks.insert(new.to_string(), model);
        }
        if let Some(contents) = self.frozen.remove(old) {
            self.frozen.insert(new.to_string(), contents);
        }
    }
    fn remove(&mut self, what: usize) -> Result<()> {
        let Some(mut name) = self.pick_any(what) else {
            return Ok(());
        };
        let moving = &self.under_way.moving;
        if moving.iter().any(|(old, new)| [old, new].contains(&&name)) {
            // A renaming of it failed: once it is gone nobody could tell which of the two names it had.
            self.store.gc(false)?;
            self.certain_names();
            name = self.pick_any(what).unwrap_or(name);
        }
        match self.store.plan_removal(std::slice::from_ref(&name), false) {
            Ok(plan) => {
                self.under_way.removing.push(name.clone());
                let used = self.sim.used();
                self.store.remove(&plan)?;
                let file = format!("{}.layer", plan.names[0].id);
                let stays = self
                    .store
                    .layers_dir()
                    .entry(&file)
                    .is_ok_and(|e| e.is_some());
                if stays && name.contains('@') {
                    self.reached.note("removal of what others stand on");
                    // More than the file of its name.
                    if self.sim.used() + 4096 < used {
                        self.reached.note("blocks that nobody sees given back");
                    }
                }
                self.under_way.removing.retain(|n| *n != name);
                self.disks.remove(&name);
                self.frozen.remove(&name);
                self.certain_names();
                self.reached.note("removal");
                Ok(())
            }
            // Attached or needed by others.
            Err(e) if e.kind() == Kind::Busy => Ok(()),
            Err(e) => Err(e),
        }
    }
    fn squash(&mut self, what: usize, all: bool) -> Result<()> {
        let Some(name) = self.pick_any(what) else {
            return Ok(());
        };
        let plan = self.store.plan_squash(&name, all)?;
        if plan.layers < 2 {
            return Ok(());
        }
        // What the layers keep of a history ends.
        self.points.clear();
        let former = self.store.squash(plan, &Quiet)?.former;
        self.replaced(&former)?;
        self.reached.note("squash");
        Ok(())
    }
    fn flatten(&mut self, what: usize) -> Result<()> {
        let Some(name) = self.pick_any(what) else {
            return Ok(());
        };
        let object = self.store.resolve(&name)?;
        // What is sealed for it ends the history, whatever becomes of the rest.
        self.points.clear();
        match (object.kind, self.open.get(&name).cloned()) {
            (ObjectKind::Base, _) => return Ok(()),
            (ObjectKind::Disk, Some(open)) => {
                self.begin_flush(&name);
                let over_base = matches!(object.parent, Some(Below::Base(_)));
                let seals = over_base || open.private_blocks() != (0, 0);
                self.store.seal_open(&open, &name)?;
                if seals {
                    self.flushed(&name);
                    self.model(&name).earlier = None;
                }
            }
            (ObjectKind::Disk, None) => drop(self.store.seal(&name)?),
            _ => {}
        }
        let flat = self.store.flatten(&name, &Quiet)?;
        self.replaced(&flat.former)?;
        if flat.base.is_some() {
            self.reached.note("flattening");
        }
        Ok(())
    }
    /// Files were replaced: what is open goes on over the new ones, and what nothing needs goes.
    fn replaced(&mut self, former: &[Below]) -> Result<()> {
        for disk in self.open.values() {
            self.store.rechain(disk)?;
        }
        self.store.collect_former(former)?;
        self.certain_names();
        Ok(())
    }
    fn import(&mut self, seed: u64) -> Result<()> {
        self.made += 1;
        let name = format!("i{}", self.made);
        let mut contents = data(seed | 1 << 40, self.size - seed % 4096);
        let image = contents.clone();
        contents.resize(self.size as usize, 0);
        let contents = Arc::new(contents);
        let making = (name.clone(), false, contents.clone());
        self.under_way.making.push(making);
        let source = ImportSource::Reader(&mut &image[..]);
        self.store.import(source, &name, ImportMode::Copy, &Quiet)?;
        self.under_way.making.retain(|m| m.0 != name);
        self.frozen.insert(name, contents);
        self.certain_names();
        self.reached.note("import");
        Ok(())
    }
    /// An operation that syncs the names has ended well: what was uncertain about them is not any more.
    fn certain_names(&mut self) {
        if self.under_way.is_nothing() {
            return;
        }
        self.sim.hold_faults(true);
        self.look_at_names();
        let listed = self.listed();
        let under_way = std::mem::take(&mut self.under_way);
        for (name, is_disk, contents) in under_way.making {
            match is_disk {
                _ if !listed.contains(&name) => {}
                true => drop(self.disks.insert(name, Model::new(contents))),
                false => drop(self.frozen.insert(name, contents)),
            }
        }
        self.sim.hold_faults(false);
    }
    fn listed(&self) -> BTreeSet<String> {
        let all = self.store.list().unwrap_or_else(|e| panic!("list: {e:?}"));
        all.into_iter().map(|o| o.name).collect()
    }
    /// After an operation on names that failed: what is to be seen of them now. It may change again with a power cut.
    fn look_at_names(&mut self) {
        let listed = self.listed();
        for name in self.under_way.removing.clone() {
            if listed.contains(&name) {
                continue;
            }
            self.open.remove(&name);
            let contents = match self.disks.remove(&name) {
                Some(model) => Some((true, model.flushed)),
                None => self.frozen.remove(&name).map(|c| (false, c)),
            };
            if let Some((is_disk, contents)) = contents {
                self.under_way.making.push((name, is_disk, contents));
            }
        }
        for (old, new) in self.under_way.moving.clone() {
            assert!(
                listed.contains(&old) != listed.contains(&new),
                "one of {old} and {new}"
            );
            match listed.contains(&new) {
                true => self.moved(&old, &new),
                false => self.moved(&new, &old),
            }
        }
    }
    fn fork(&mut self, from: usize, count: u64) -> Result<()> {
        let Some(from) = self.pick_any(from) else {
            return Ok(());
        };
        self.made += count;
        let names: Vec<String> = (0..count).map(|i| format!("d{}", self.made - i)).collect();
        let contents = match self.frozen.get(&from) {
            Some(c) => c.clone(),
            None => self.model(&from).now.clone(),
        };
        for name in &names {
            self.under_way
                .making
                .push((name.clone(), true, contents.clone()));
        }
        match self.open.get(&from).cloned() {
            Some(open) => {
                self.begin_flush(&from);
                // A disk that has nothing of its own is not sealed.
                let flushes = open.private_blocks() != (0, 0);
                self.store.create_from_running(&open, &from, &names, None)?;
                if flushes {
                    self.flushed(&from);
                    self.model(&from).earlier = None;
                }
                self.reached.note("fork of an open disk");
            }
            None => {
                self.store.create(&names, &from, None)?;
                self.reached.note("fork of what is at rest");
            }
        }
        self.under_way.making.retain(|m| !names.contains(&m.0));
        if self.frozen.contains_key(&from) && from.contains('@') {
            self.reached.note("fork of a snapshot");
        }
        for name in names {
            self.disks.insert(name, Model::new(contents.clone()));
        }
        self.certain_names();
        Ok(())
    }
    /// Compares everything with the model, reading through open disks and snapshots.
    pub fn compare(&mut self) {
        self.compare_in("");
    }
    pub fn compare_in(&mut self, story: &str) {
        for (name, model) in self.disks.clone() {
            let disk = self
                .opened(&name)
                .unwrap_or_else(|e| panic!("{story}: open {name}: {e:?}"));
            with_all(&*disk, |found| same(story, &name, found, &model.now))
                .unwrap_or_else(|e| panic!("{story}: read {name}: {e:?}"));
            let counted = disk.private_blocks();
            let extents = disk.extents(0, disk.size()).expect("extents");
            let mut own = (0, 0);
            for e in &extents {
                match e.from {
                    forkdisk::disk::Source::Layer { depth: 0, .. } => own.0 += e.len / 4096,
                    forkdisk::disk::Source::Zero { depth: 0 } => own.1 += e.len / 4096,
                    _ => {}
                }
            }
            assert_eq!(
                own.0, counted.0,
                "{story}: {name}: blocks counted and blocks mapped"
            );
            // Zeros past the end of a region's part of the disk are counted as well.
            assert!(
                own.1 <= counted.1,
                "{story}: {name}: zeros {own:?} {counted:?}"
            );
        }
        for (name, contents) in &self.frozen {
            let object = self
                .store
                .resolve(name)
                .unwrap_or_else(|e| panic!("{story}: {name} is lost: {e:?}"));
            let disk = self
                .store
                .open_disk(&object, false)
                .unwrap_or_else(|e| panic!("{story}: open {name}: {e:?}"));
            with_all(&*disk, |found| same(story, name, found, contents))
                .unwrap_or_else(|e| panic!("{story}: read {name}: {e:?}"));
        }
    }
    /// Closes all disks cleanly.
    pub fn close_all(&mut self) -> Result<()> {
        for name in self.disks.keys().cloned().collect::<Vec<_>>() {
            self.close(&name)?;
        }
        Ok(())
    }
    /// Opens what a crash left as a new world. What is found must be what the model allows: a panic where it is not, an error where the
    /// store answers one. In the new world what was found is acknowledged: whoever was told it may rely on it.
    pub fn revive(&self, sim: &SimDisk, seed: u64, story: &str) -> Result<World> {
        let mut world = World::on(
            sim.clone(),
            seed,
            self.size,
            BTreeMap::new(),
            BTreeMap::new(),
            self.made + 100,
        )?;
        world.points = self.points.clone();
        let found = world.store.survey()?;
        // Also of names that may be there or not: if one is there, so is what it refers to.
        assert!(found.damaged.is_empty(), "{story}: {:?}", found.damaged);
        let listed: Vec<String> = found.sound.into_iter().map(|o| o.name).collect();
        let making = |name: &str| self.under_way.making.iter().find(|m| m.0 == name);
        let moving = &self.under_way.moving;
        for name in &listed {
            let known = self.disks.contains_key(name)
                || self.frozen.contains_key(name)
                || making(name).is_some()
                || moving.iter().any(|(old, new)| name == old || name == new);
            assert!(known, "{story}: {name} is there again, or still");
        }
        for (old, new) in moving {
            let both = listed.contains(old) && listed.contains(new);
            assert!(!both, "{story}: {old} and its new name {new}");
        }
        world.under_way.moving = moving.clone();
        let mut opened = false;
        // There, and nobody was told so: until the names are synced a power cut may take them away.
        let mut unsure_frozen = Vec::new();
        let expected = self.disks.keys().chain(self.frozen.keys());
        let unsure = self.under_way.making.iter().map(|m| &m.0);
        for known in expected.chain(unsure) {
            // It is there by the one name or by the other.
            let other = moving.iter().find_map(|(old, new)| match known {
                _ if known == old => Some(new),
                _ if known == new => Some(old),
                _ => None,
            });
            let name = match other {
                Some(other) if !listed.contains(known) => other,
                _ => known,
            };
            if !listed.contains(name) {
                let may_miss = self.under_way.removing.contains(known) || making(known).is_some();
                assert!(may_miss, "{story}: {name} is lost");
                // Nobody was told that it is gone: until the names are synced it may be there again.
                let contents = match (self.disks.get(known), self.frozen.get(known)) {
                    (Some(model), _) => Some((true, model.flushed.clone())),
                    (None, Some(contents)) => Some((false, contents.clone())),
                    (None, None) => making(known).map(|m| (m.1, m.2.clone())),
                };
                if let Some((is_disk, contents)) = contents {
                    let ghost = (name.clone(), is_disk, contents);
                    world.under_way.making.push(ghost);
                }
                continue;
            }
            let object = world.store.resolve(name)?;
            // First as a reader sees it, then as the writer recovers it: both must agree.
            let reader = world.store.open_disk(&object, false)?;
            let verdict = with_all(&*reader, |seen| self.verdict(known, seen))?;
            drop(reader);
            let seen = verdict.or_else(|why| match self.doubt {
                true => Ok(Arc::default()),
                false => Err(why),
            });
            let mut contents = seen.unwrap_or_else(|why| panic!("{story}: {name} {why}"));
            if object.kind != forkdisk::store::ObjectKind::Disk {
                if making(known).is_some() {
                    unsure_frozen.push(name.clone());
                }
                world.frozen.insert(name.clone(), contents);
                continue;
            }
            let verdict = with_all(&*world.opened(name)?, |found| self.verdict(known, found))?;
            opened = true;
            let found = verdict.unwrap_or_else(|why| panic!("{story}: {name} {why}"));
            if self.doubt {
                contents = found;
            } else {
                assert!(
                    found == contents,
                    "{story}: {name}: reader and writer disagree"
                );
            }
            world.disks.insert(name.clone(), Model::new(contents));
        }
        if opened {
            // Opening for writing has synced the names.
            world.under_way = UnderWay::default();
        } else {
            for name in unsure_frozen {
                if let Some(contents) = world.frozen.remove(&name) {
                    world.under_way.making.push((name, false, contents));
                }
            }
        }
        Ok(world)
    }
    /// May a name hold this?
    pub fn verdict(&self, name: &str, found: &[u8]) -> Verdict {
        if let Some(model) = self.disks.get(name) {
            return model.verdict(found);
        }
        let making = self.under_way.making.iter().find(|m| m.0 == name);
        match self.frozen.get(name).or(making.map(|m| &m.2)) {
            Some(right) if found == &right[..] => Ok(right.clone()),
            _ => Err("changed".to_string()),
        }
    }
    /// What a crash left, opened as a new store, must be what the model allows, and it must be usable: more work, another crash that
    /// spares nothing, a clean end, and not one slot lost or used twice.
    pub fn check_after(&self, sim: &SimDisk, seed: u64, story: &str) {
        let mut world = self
            .revive(sim, seed ^ 0xABCD, story)
            .unwrap_or_else(|e| panic!("{story}: {e:?}"));
        let mut rng = Rng(seed);
        let works = |e: Error| panic!("{story}: going on: {e:?}");
        for _ in 0..3 {
            let op = random_op(&mut rng, self.size, false);
            world.run(&op).unwrap_or_else(works);
        }
        if rng.below(4) == 0 {
            let left = world.sim.crash_with(Policy::AllDropped);
            let story = format!("{story}, then went on and crashed");
            world = world
                .revive(&left, seed ^ 0xBCDE, &story)
                .unwrap_or_else(|e| panic!("{story}: {e:?}"));
        }
        world.close_all().unwrap_or_else(works);
        world.look_back(story);
        world.compare_in(story);
        world.close_all().unwrap_or_else(works);
        world
            .store
            .gc(false)
            .unwrap_or_else(|e| panic!("{story}: gc: {e:?}"));
        audit::layers(&world.sim, story);
    }
}

/// What is written with this seed.
pub fn data(seed: u64, len: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut data = vec![0u8; len as usize];
    // Sometimes zeros: a written block of zeros holds no slot.
    if !seed.is_multiple_of(7) {
        data.chunks_mut(8).for_each(|c| {
            let n = c.len();
            c.copy_from_slice(&rng.next().to_le_bytes()[..n]);
        });
    }
    data
}

pub fn read_all(disk: &dyn Disk) -> Result<Vec<u8>> {
    let mut all = vec![0; disk.size() as usize];
    disk.read(&mut all, 0)?;
    Ok(all)
}

/// Shows all of a disk to `f`, in a buffer that is used again and again.
pub fn with_all<R>(disk: &dyn Disk, f: impl FnOnce(&[u8]) -> R) -> Result<R> {
    thread_local!(static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) });
    let mut buffer = BUFFER.take();
    buffer.resize(disk.size() as usize, 0);
    let done = disk.read(&mut buffer, 0).map(|()| f(&buffer));
    BUFFER.set(buffer);
    done
}

pub fn same(story: &str, name: &str, found: &[u8], expected: &[u8]) {
    if found != expected {
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!(
            "{story}: {name}: differs from the model at byte {at:?} (block {:?})",
            at.map(|a| a / 4096)
        );
    }
}

/// The header of a layer file of the simulated disk.
pub fn header_of(bytes: &[u8]) -> std::result::Result<Header, Error> {
    Header::decode(&bytes[..4096])
}
