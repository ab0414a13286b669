//! A store on a simulated disk beside a plain model of it: what every property and crash test runs.
//!
//! The model keeps, for each disk, its contents now, at the last acknowledged flush, and at a flush that is under way. Whatever is found
//! after a crash must be exactly one of the last two: acknowledged <= found <= attempted, and never a mixture.
#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

pub mod audit;
pub mod mortal;

use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Error, Kind, Result};
use forkdisk::format::Header;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::Id;
use std::collections::BTreeMap;
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

/// What a test does to the store.
#[derive(Clone, Debug)]
pub enum Op {
    Write {
        disk: usize,
        at: u64,
        len: u64,
        seed: u64,
    },
    Discard {
        disk: usize,
        at: u64,
        len: u64,
    },
    Flush {
        disk: usize,
    },
    Checkpoint {
        disk: usize,
    },
    Maintain {
        disk: usize,
    },
    Snapshot {
        disk: usize,
    },
    /// From anything that has a name.
    Fork {
        from: usize,
    },
    /// Three forks in one call.
    Forks {
        from: usize,
    },
    /// Close it cleanly, and open it again.
    Reopen {
        disk: usize,
    },
    /// Close it; it is opened when it is used next.
    Close {
        disk: usize,
    },
    Remove {
        what: usize,
    },
    Gc,
}

/// A disk of the model.
#[derive(Clone)]
pub struct Model {
    pub now: Arc<Vec<u8>>,
    pub flushed: Arc<Vec<u8>>,
    /// The contents at a flush that was begun and not acknowledged.
    pub attempted: Option<Arc<Vec<u8>>>,
}

impl Model {
    fn new(contents: Arc<Vec<u8>>) -> Model {
        Model {
            now: contents.clone(),
            flushed: contents,
            attempted: None,
        }
    }
}

/// An operation that makes or removes names, while it runs and after it failed.
#[derive(Clone, Default)]
pub struct UnderWay {
    /// Names that are being made, whether they are disks, and what they hold if they are there.
    making: Vec<(String, bool, Arc<Vec<u8>>)>,
    /// Names that are going.
    removing: Vec<String>,
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
type Verdict = std::result::Result<Arc<Vec<u8>>, String>;

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
            open: BTreeMap::new(),
            made,
        })
    }
    /// A copy of a world at rest: its disks are closed first.
    pub fn copy(&mut self, seed: u64) -> World {
        self.close_all().expect("close");
        let sim = self.sim.crash_with(Policy::AllDone);
        sim.reseed(seed);
        World::on(
            sim,
            seed,
            self.size,
            self.disks.clone(),
            self.frozen.clone(),
            self.made + 1000,
        )
        .expect("a store that opens")
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
        let disk = self.store.open_cow(&self.store.resolve(name)?, true)?;
        self.open.insert(name.to_string(), disk.clone());
        Ok(disk)
    }
    fn model(&mut self, name: &str) -> &mut Model {
        self.disks.get_mut(name).expect("a disk of the model")
    }
    fn begin_flush(&mut self, name: &str) {
        let model = self.model(name);
        model.attempted = Some(model.now.clone());
    }
    fn flushed(&mut self, name: &str) {
        let model = self.model(name);
        model.flushed = model.now.clone();
        model.attempted = None;
    }
    /// Closes a disk: a flush at the least.
    fn close(&mut self, name: &str) -> Result<()> {
        if let Some(disk) = self.open.get(name).cloned() {
            self.begin_flush(name);
            disk.close()?;
            self.open.remove(name);
            self.flushed(name);
        }
        Ok(())
    }
    /// Does `op` to both. An error is the store's; the model then knows what was under way.
    pub fn run(&mut self, op: &Op) -> Result<()> {
        let disk = match op {
            Op::Write { disk, .. }
            | Op::Discard { disk, .. }
            | Op::Flush { disk }
            | Op::Checkpoint { disk }
            | Op::Maintain { disk }
            | Op::Snapshot { disk }
            | Op::Reopen { disk }
            | Op::Close { disk } => match self.pick_disk(*disk) {
                Some(name) => name,
                None => return Ok(()),
            },
            Op::Fork { .. } | Op::Forks { .. } | Op::Remove { .. } | Op::Gc => String::new(),
        };
        match op {
            Op::Write { at, len, seed, .. } => {
                let at = at % self.size;
                let len = (*len).min(self.size - at);
                let mut rng = Rng(*seed);
                let mut data = vec![0u8; len as usize];
                // Sometimes zeros: a written block of zeros holds no slot.
                if seed % 7 != 0 {
                    data.chunks_mut(8).for_each(|c| {
                        let n = c.len();
                        c.copy_from_slice(&rng.next().to_le_bytes()[..n]);
                    });
                }
                self.opened(&disk)?.write(&data, at)?;
                let now = Arc::make_mut(&mut self.model(&disk).now);
                now[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Discard { at, len, .. } => {
                let at = at % self.size;
                let len = (*len).min(self.size - at);
                self.opened(&disk)?.discard(at, len)?;
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
            Op::Checkpoint { .. } => self.opened(&disk)?.checkpoint()?,
            Op::Maintain { .. } => self.opened(&disk)?.maintain()?,
            Op::Snapshot { .. } => self.snapshot(&disk)?,
            Op::Fork { from } => self.fork(*from, 1)?,
            Op::Forks { from } => self.fork(*from, 3)?,
            Op::Reopen { .. } => {
                self.close(&disk)?;
                self.opened(&disk)?;
                self.reached.note("reopening");
            }
            Op::Close { .. } => self.close(&disk)?,
            Op::Remove { what } => {
                let Some(name) = self.pick_any(*what) else {
                    return Ok(());
                };
                match self.store.plan_removal(std::slice::from_ref(&name), false) {
                    Ok(plan) => {
                        self.under_way.removing.push(name.clone());
                        self.store.remove(&plan)?;
                        self.under_way.removing.clear();
                        self.disks.remove(&name);
                        self.frozen.remove(&name);
                        self.reached.note("removal");
                    }
                    // Attached or needed by others.
                    Err(e) if e.kind() == Kind::Busy => {}
                    Err(e) => return Err(e),
                }
            }
            Op::Gc => {
                self.store.gc(false)?;
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
            None => drop(self.store.snapshot(disk, &snap, None)?),
        }
        self.flushed(disk);
        self.under_way.making.clear();
        self.frozen.insert(full, now);
        Ok(())
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
                self.store.create_from_running(&open, &from, &names, None)?;
                self.flushed(&from);
                self.reached.note("fork of an open disk");
            }
            None => {
                self.store.create(&names, &from, None)?;
                self.reached.note("fork of what is at rest");
            }
        }
        self.under_way.making.clear();
        for name in names {
            self.disks.insert(name, Model::new(contents.clone()));
        }
        Ok(())
    }
    /// Compares everything with the model, reading through open disks and snapshots.
    pub fn compare(&mut self) {
        self.compare_in("");
    }
    fn compare_in(&mut self, story: &str) {
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
        let listed: Vec<String> = world.store.list()?.into_iter().map(|o| o.name).collect();
        let making = |name: &str| self.under_way.making.iter().find(|m| m.0 == name);
        for name in &listed {
            let known = self.disks.contains_key(name)
                || self.frozen.contains_key(name)
                || making(name).is_some();
            assert!(known, "{story}: {name} is there again, or still");
        }
        let expected = self.disks.keys().chain(self.frozen.keys());
        let unsure = self.under_way.making.iter().map(|m| &m.0);
        for name in expected.chain(unsure) {
            if !listed.contains(name) {
                let may_miss = self.under_way.removing.contains(name) || making(name).is_some();
                assert!(may_miss, "{story}: {name} is lost");
                // Nobody was told that it is gone: until the names are synced it may be there again.
                let contents = match self.disks.get(name) {
                    Some(model) => Some((true, model.flushed.clone())),
                    None => self.frozen.get(name).map(|c| (false, c.clone())),
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
            let verdict = with_all(&*reader, |seen| self.verdict(name, seen))?;
            drop(reader);
            let mut contents = verdict.unwrap_or_else(|why| panic!("{story}: {name} {why}"));
            if object.kind != forkdisk::store::ObjectKind::Disk {
                world.frozen.insert(name.clone(), contents);
                continue;
            }
            let verdict = with_all(&*world.opened(name)?, |found| self.verdict(name, found))?;
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
        Ok(world)
    }
    /// May a name hold this?
    fn verdict(&self, name: &str, found: &[u8]) -> Verdict {
        let making = self.under_way.making.iter().find(|m| m.0 == name);
        let may_be: Vec<&Arc<Vec<u8>>> = match self.disks.get(name) {
            Some(model) => [&model.flushed]
                .into_iter()
                .chain(&model.attempted)
                .collect(),
            None => self
                .frozen
                .get(name)
                .or(making.map(|m| &m.2))
                .into_iter()
                .collect(),
        };
        if let Some(right) = may_be.iter().find(|c| found == &c[..]) {
            return Ok((*right).clone());
        }
        Err(match self.disks.get(name) {
            Some(model) => format!(
                "is neither its last flush nor the one under way: {}",
                diff(found, model)
            ),
            None => "changed".to_string(),
        })
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
        world.compare_in(story);
        world.close_all().unwrap_or_else(works);
        world
            .store
            .gc(false)
            .unwrap_or_else(|e| panic!("{story}: gc: {e:?}"));
        audit::layers(&world.sim, story);
    }
}

fn diff(found: &[u8], model: &Model) -> String {
    let blocks = |other: &[u8]| -> Vec<usize> {
        found
            .chunks(4096)
            .zip(other.chunks(4096))
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .take(10)
            .collect()
    };
    format!(
        "blocks unlike the last flush {:?}, unlike the attempt {:?}",
        blocks(&model.flushed),
        model.attempted.as_ref().map(|a| blocks(a))
    )
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

/// A random operation. `heavy` includes what changes names.
pub fn random_op(rng: &mut Rng, size: u64, heavy: bool) -> Op {
    let disk = rng.below(8) as usize;
    let at = match rng.below(4) {
        0 => rng.below(size / 4096) * 4096,
        1 => rng.below(4) * 4096,
        2 => size.saturating_sub(rng.below(9000) + 1),
        _ => rng.below(size),
    };
    let len = match rng.below(8) {
        0 => rng.below(100) + 1,
        1 => 512,
        2..=4 => 4096 * (rng.below(3) + 1),
        5 => rng.below(20_000) + 1,
        6 => 4096 * rng.below(60),
        _ => 4096,
    };
    match rng.below(if heavy { 100 } else { 80 }) {
        0..=44 => Op::Write {
            disk,
            at,
            len,
            seed: rng.next(),
        },
        45..=54 => Op::Discard {
            disk,
            at,
            len: if rng.below(4) == 0 { size } else { len },
        },
        55..=71 => Op::Flush { disk },
        72..=74 => Op::Checkpoint { disk },
        75..=76 => Op::Maintain { disk },
        77..=79 => Op::Reopen { disk },
        80..=87 => Op::Snapshot { disk },
        88..=92 => Op::Fork {
            from: rng.below(8) as usize,
        },
        93 => Op::Forks {
            from: rng.below(8) as usize,
        },
        94..=95 => Op::Close { disk },
        96..=98 => Op::Remove {
            what: rng.below(16) as usize,
        },
        _ => Op::Gc,
    }
}

/// The header of a layer file of the simulated disk.
pub fn header_of(bytes: &[u8]) -> std::result::Result<Header, Error> {
    Header::decode(&bytes[..4096])
}
