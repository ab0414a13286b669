//! A store on a simulated disk beside a plain model of it: what every property and crash test runs.
//!
//! The model keeps, for each disk, its contents now, at the last acknowledged flush, and at a flush that is under way. Whatever is found
//! after a crash must be exactly one of the last two: acknowledged <= found <= attempted, and never a mixture.
#![allow(dead_code, missing_docs, reason = "each test uses a part of it")]

use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Error, Kind, Result};
use forkdisk::format::Header;
use forkdisk::io::sim::SimDisk;
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::Id;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
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

/// The store and its model.
pub struct World {
    pub sim: SimDisk,
    pub store: Store,
    pub size: u64,
    pub disks: BTreeMap<String, Model>,
    pub frozen: BTreeMap<String, Arc<Vec<u8>>>,
    /// Names whose creation or removal was under way when the power went.
    pub unsure: Vec<String>,
    open: BTreeMap<String, Arc<CowDisk>>,
    made: u64,
}

pub const IMAGE: &str = "image";

impl World {
    /// A store with one image and one disk.
    pub fn new(seed: u64, blocks: u64) -> World {
        let sim = SimDisk::new(seed);
        let store = Store::init_on(sim.root(), Path::new("/sim"), env(seed)).expect("a new store");
        let len = blocks * 4096 - 1000;
        let image = base_image(len as usize);
        store
            .import(
                ImportSource::Reader(&mut &image[..]),
                IMAGE,
                ImportMode::Copy,
                &Quiet,
            )
            .expect("import");
        let mut contents = image;
        contents.resize((blocks * 4096) as usize, 0);
        let contents = Arc::new(contents);
        let mut world = World {
            sim,
            store,
            size: blocks * 4096,
            disks: BTreeMap::new(),
            frozen: BTreeMap::from([(IMAGE.to_string(), contents)]),
            unsure: Vec::new(),
            open: BTreeMap::new(),
            made: 0,
        };
        world.run(&Op::Fork { from: 0 }).expect("the first disk");
        world
    }
    fn pick_disk(&self, n: usize) -> Option<String> {
        let names: Vec<&String> = self.disks.keys().collect();
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
        match op {
            Op::Write {
                disk,
                at,
                len,
                seed,
            } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
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
                self.opened(&name)?.write(&data, at)?;
                let now = Arc::make_mut(&mut self.model(&name).now);
                now[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Discard { disk, at, len } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                let at = at % self.size;
                let len = (*len).min(self.size - at);
                self.opened(&name)?.discard(at, len)?;
                let now = Arc::make_mut(&mut self.model(&name).now);
                now[at as usize..(at + len) as usize].fill(0);
            }
            Op::Flush { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                let open = self.opened(&name)?;
                self.begin_flush(&name);
                open.flush()?;
                self.flushed(&name);
            }
            Op::Checkpoint { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                self.opened(&name)?.checkpoint()?;
            }
            Op::Maintain { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                self.opened(&name)?.maintain()?;
            }
            Op::Snapshot { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                self.made += 1;
                let snap = format!("s{}", self.made);
                let full = format!("{name}@{snap}");
                self.unsure.push(full.clone());
                self.begin_flush(&name);
                match self.open.get(&name).cloned() {
                    Some(open) => {
                        self.store
                            .snapshot_running(&open, &name, &snap, Some("a message"))?
                    }
                    None => self.store.snapshot(&name, &snap, None)?,
                };
                self.flushed(&name);
                self.unsure.pop();
                let now = self.model(&name).now.clone();
                self.frozen.insert(full, now);
            }
            Op::Fork { from } => {
                let names: Vec<String> = self
                    .frozen
                    .keys()
                    .chain(self.disks.keys())
                    .cloned()
                    .collect();
                let from = names[from % names.len()].clone();
                self.made += 1;
                let name = format!("d{}", self.made);
                self.unsure.push(name.clone());
                let contents = match self.frozen.get(&from) {
                    Some(c) => c.clone(),
                    None => self.model(&from).now.clone(),
                };
                match self.open.get(&from).cloned() {
                    Some(open) => {
                        self.begin_flush(&from);
                        self.store.create_from_running(
                            &open,
                            &from,
                            std::slice::from_ref(&name),
                            None,
                        )?;
                        self.flushed(&from);
                    }
                    None => {
                        self.store
                            .create(std::slice::from_ref(&name), &from, None)?;
                    }
                }
                self.unsure.pop();
                self.disks.insert(name, Model::new(contents));
            }
            Op::Reopen { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                self.close(&name)?;
                self.opened(&name)?;
            }
            Op::Close { disk } => {
                let Some(name) = self.pick_disk(*disk) else {
                    return Ok(());
                };
                self.close(&name)?;
            }
            Op::Remove { what } => {
                let names: Vec<String> = self
                    .frozen
                    .keys()
                    .chain(self.disks.keys())
                    .cloned()
                    .collect();
                let name = names[what % names.len()].clone();
                match self.store.plan_removal(std::slice::from_ref(&name), false) {
                    Ok(plan) => {
                        self.unsure.push(name.clone());
                        self.store.remove(&plan)?;
                        self.unsure.pop();
                        self.disks.remove(&name);
                        self.frozen.remove(&name);
                    }
                    // Attached or needed by others.
                    Err(e) if e.kind() == Kind::Busy => {}
                    Err(e) => return Err(e),
                }
            }
            Op::Gc => {
                self.store.gc(false)?;
            }
        }
        Ok(())
    }
    /// Compares everything with the model, reading through open disks and snapshots.
    pub fn compare(&mut self) {
        for (name, model) in self.disks.clone() {
            let disk = self.opened(&name).expect("open");
            same(&name, &read_all(&*disk).expect("read"), &model.now);
            let (data, _) = disk.private_blocks();
            let extents = disk.extents(0, disk.size()).expect("extents");
            let own: u64 = extents
                .iter()
                .filter(|e| matches!(e.from, forkdisk::disk::Source::Layer { depth: 0, .. }))
                .map(|e| e.len / 4096)
                .sum();
            assert_eq!(own, data, "{name}: blocks counted and blocks mapped");
        }
        for (name, contents) in &self.frozen {
            let object = self.store.resolve(name).expect("a snapshot");
            let disk = self.store.open_disk(&object, false).expect("open");
            same(name, &read_all(&*disk).expect("read"), contents);
        }
    }
    /// Closes all disks cleanly.
    pub fn close_all(&mut self) -> Result<()> {
        for name in self.disks.keys().cloned().collect::<Vec<_>>() {
            self.close(&name)?;
        }
        Ok(())
    }
    /// What a crash leaves, opened as a new store, must be what the model allows.
    pub fn check_after(&self, sim: &SimDisk, seed: u64, story: &str) {
        let store = Store::open_on(sim.root(), Path::new("/sim"), env(seed ^ 0xABCD))
            .unwrap_or_else(|e| panic!("{story}: {e:?}"));
        let mut expected: Vec<&String> = self.disks.keys().chain(self.frozen.keys()).collect();
        expected.sort();
        for name in expected {
            let object = match store.resolve(name) {
                Ok(object) => object,
                Err(e) if e.kind() == Kind::NotFound && self.unsure.contains(name) => continue,
                Err(e) => panic!("{story}: {name} is lost: {e:?}"),
            };
            match self.disks.get(name) {
                Some(model) => {
                    // First as a reader sees it, then as the writer recovers it: both must agree.
                    let reader = store
                        .open_disk(&object, false)
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    let seen =
                        read_all(&*reader).unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    drop(reader);
                    let disk = store
                        .open_cow(&object, true)
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    let found =
                        read_all(&*disk).unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    assert!(found == seen, "{story}: {name}: reader and writer disagree");
                    let ok = found == *model.flushed
                        || model.attempted.as_ref().is_some_and(|a| found == **a);
                    assert!(
                        ok,
                        "{story}: {name} is neither its last flush nor the one under way: {}",
                        diff(&found, model)
                    );
                    // And it must be usable.
                    disk.write(&[0x5A; 5000], 1000)
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    disk.flush()
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    disk.close()
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                }
                None => {
                    let disk = store
                        .open_disk(&object, false)
                        .unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    let found =
                        read_all(&*disk).unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
                    assert!(found == *self.frozen[name], "{story}: {name} changed");
                }
            }
        }
        store
            .gc(false)
            .unwrap_or_else(|e| panic!("{story}: gc: {e:?}"));
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

pub fn same(name: &str, found: &[u8], expected: &[u8]) {
    if found != expected {
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!(
            "{name}: differs from the model at byte {at:?} (block {:?})",
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
        88..=93 => Op::Fork {
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
