//! The death of the process, again and again: what it had accepted is all there for the next one, flushed or not; and a power cut afterwards
//! leaves a flush and nothing else.
//!
//! A history is random work on a few disks of one store. It dies at a random changing call (in the midst of writes, commits,
//! checkpoints, seals, and of takeovers themselves), the next process takes over, does again what was under way as the kernel does, and goes on. After each takeover, each disk
//! is exactly what was accepted. At the end the power goes.
//!
//! `FORKDISK_TAKEOVER_HISTORIES=N` runs more, `FORKDISK_TAKEOVER_SEED=S` that one alone.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::mortal::{Mortal, until_death};
use common::{Rng, base_image, env};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Kind;
use forkdisk::io::Access;
use forkdisk::io::sim::{FaultKind, Policy, SimDisk, Verb};
use forkdisk::layer::volatile;
use forkdisk::store::history::{At, Limits};
use forkdisk::store::{Finding, ImportMode, ImportSource, Quiet, Store};
use forkdisk::sys::shared::SharedMemory;
use forkdisk::units::Id;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

const HISTORIES: u64 = 100;
const BLOCK: usize = 4096;

#[derive(Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Discard(u64, u64),
    Flush,
    Checkpoint,
    Maintain,
    Snapshot(String),
    Fork(String),
    /// To a snapshot of the disk.
    Rollback(String),
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Op::Write(at, data) => write!(f, "write {}+{}", at, data.len()),
            Op::Discard(at, len) => write!(f, "discard {at}+{len}"),
            Op::Flush => write!(f, "flush"),
            Op::Checkpoint => write!(f, "checkpoint"),
            Op::Maintain => write!(f, "maintain"),
            Op::Snapshot(name) => write!(f, "snapshot {name}"),
            Op::Fork(name) => write!(f, "fork {name}"),
            Op::Rollback(name) => write!(f, "rollback {name}"),
        }
    }
}

struct Open {
    disk: Option<Arc<CowDisk>>,
    memory: Arc<SharedMemory>,
    /// It was refused, and what was not flushed is given up.
    given_up: bool,
    /// This process has accepted a write of it.
    written: bool,
    /// What was accepted.
    now: Vec<u8>,
    /// What a power cut may leave: the last acknowledged flush, and what later commits that nobody acknowledged may hold.
    durable: Vec<Vec<u8>>,
    /// What it held at acknowledged flushes: by layer, and number of the point of its history.
    points: BTreeMap<(Id, u64), Vec<u8>>,
}

/// Where, and what.
type Writes = Vec<(u64, Vec<u8>)>;

struct World {
    seed: u64,
    sim: SimDisk,
    mortal: Mortal,
    store: Option<Store>,
    disks: BTreeMap<String, Open>,
    frozen: BTreeMap<String, Vec<u8>>,
    lives: u64,
    size: u64,
    /// What others write to a disk while the flush of it is under way in which the process dies; and what was accepted of it.
    others: Writes,
    accepted: Arc<Mutex<Writes>>,
    /// A sync failed and nobody heard of it, since the last whole takeover.
    failed: bool,
    /// How often, and how often a disk was refused for it.
    unheard: u64,
    refused: u64,
    /// Somebody died in a rollback, which also lets go of what sealed layers keep of a history.
    torn: bool,
}

fn read(disk: &CowDisk, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    disk.read(&mut bytes, 0).expect("read");
    bytes
}

/// For a message: the first block that differs.
fn differ(a: &[u8], b: &[u8]) -> Option<usize> {
    a.chunks(BLOCK)
        .zip(b.chunks(BLOCK))
        .position(|(a, b)| a != b)
}

impl World {
    fn new(seed: u64, blocks: u64) -> World {
        let size = blocks * BLOCK as u64;
        let sim = SimDisk::new(seed);
        let mortal = Mortal::on(&sim);
        let store = Store::init_on(Arc::new(mortal.clone()), Path::new("/sim"), env(seed)).unwrap();
        let mut image = base_image(size as usize - 1000);
        store
            .import(
                ImportSource::Reader(&mut &image[..]),
                "image",
                ImportMode::Copy,
                &Quiet,
            )
            .unwrap();
        image.resize(size as usize, 0);
        let mut world = World {
            seed,
            sim,
            mortal,
            store: Some(store),
            disks: BTreeMap::new(),
            frozen: BTreeMap::from([("image".into(), image)]),
            lives: 1,
            size,
            others: Vec::new(),
            accepted: Arc::default(),
            failed: false,
            unheard: 0,
            refused: 0,
            torn: false,
        };
        for name in ["a", "b"] {
            let store = world.store.as_ref().unwrap();
            store.create(&[name.to_string()], "image", None).unwrap();
            if name == "b" {
                // All of its history, or as much as room is left for.
                let limits = Limits {
                    window: seed.is_multiple_of(2).then_some(1_000_000),
                    bytes: (!seed.is_multiple_of(2)).then_some(20 * BLOCK as u64),
                };
                store.set_history(&["b".into()], Some(limits)).unwrap();
            }
            world.attach(name, "image");
        }
        world
    }
    fn attach(&mut self, name: &str, from: &str) {
        let memory = volatile::private().unwrap();
        let store = self.store.as_ref().unwrap();
        let object = store.resolve(name).unwrap();
        let disk = store.open_cow_on(&object, memory.clone()).unwrap();
        let now = self.frozen[from].clone();
        let open = Open {
            disk: Some(disk),
            memory,
            given_up: false,
            written: false,
            durable: vec![now.clone()],
            now,
            points: BTreeMap::new(),
        };
        self.disks.insert(name.to_string(), open);
    }
    fn op(&self, rng: &mut Rng, n: u64) -> (String, Op) {
        let names: Vec<&String> = self.disks.keys().collect();
        let name = names[rng.below(names.len() as u64) as usize].clone();
        let at = rng.below(self.size);
        let snaps: Vec<&String> = self
            .frozen
            .keys()
            .filter(|n| n.starts_with(&format!("{name}@")))
            .collect();
        let op = match rng.below(42) {
            0..=21 => {
                let (at, len) = match rng.below(3) {
                    0 => (at, 1 + rng.below(9000)),
                    _ => (at / 4096 * 4096, 4096 * (1 + rng.below(6))),
                };
                let mut data = vec![0; len.min(self.size - at) as usize];
                if rng.below(8) != 0 {
                    data.chunks_mut(8)
                        .for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()]));
                }
                Op::Write(at, data)
            }
            22..=26 => {
                let long = if rng.below(3) == 0 { self.size } else { 30_000 };
                Op::Discard(at, (1 + rng.below(long)).min(self.size - at))
            }
            27..=34 => Op::Flush,
            35 => Op::Checkpoint,
            36..=37 => Op::Maintain,
            38 => Op::Snapshot(format!("s{n}")),
            39..=40 if !snaps.is_empty() => {
                Op::Rollback(snaps[rng.below(snaps.len() as u64) as usize].clone())
            }
            _ => Op::Fork(format!("f{n}")),
        };
        (name, op)
    }
    /// Does it. Whoever survives has had it accepted.
    fn run(&mut self, name: &str, op: &Op) {
        let store = self.store.as_ref().unwrap();
        let open = self.disks.get_mut(name).unwrap();
        let disk = open.disk.clone().unwrap();
        match op {
            Op::Write(at, data) => {
                disk.write(data, *at).unwrap();
                open.written = true;
                open.now[*at as usize..*at as usize + data.len()].copy_from_slice(data);
            }
            Op::Discard(at, len) => {
                disk.discard(*at, *len).unwrap();
                open.now[*at as usize..(*at + *len) as usize].fill(0);
            }
            Op::Flush => {
                open.durable.push(open.now.clone());
                let others = std::mem::take(&mut self.others);
                if open.written && !others.is_empty() {
                    let (disk, accepted) = (disk.clone(), self.accepted.clone());
                    let write = move || {
                        for (at, data) in others {
                            disk.write(&data, at).unwrap();
                            accepted.lock().unwrap().push((at, data));
                        }
                    };
                    self.mortal.meanwhile(Some(Box::new(write)));
                }
                disk.flush().unwrap();
                self.mortal.meanwhile(None);
                open.durable = vec![open.now.clone()];
                if let Some(point) = disk.point().filter(|_| name == "b") {
                    open.points.insert(point, open.now.clone());
                }
            }
            Op::Checkpoint => disk.checkpoint().unwrap(),
            Op::Maintain => disk.maintain().unwrap(),
            Op::Snapshot(snap) => {
                open.durable.push(open.now.clone());
                let full = format!("{name}@{snap}");
                match store.resolve(&full) {
                    // The one who died had come so far.
                    Ok(_) => {}
                    Err(_) => drop(store.snapshot_running(&disk, name, snap, None).unwrap()),
                }
                open.durable = vec![open.now.clone()];
                self.frozen.insert(full, open.now.clone());
            }
            Op::Fork(fork) => {
                open.durable.push(open.now.clone());
                if store.resolve(fork).is_err() {
                    store
                        .create_from_running(&disk, name, std::slice::from_ref(fork), None)
                        .unwrap();
                }
                open.durable = vec![open.now.clone()];
                self.frozen.insert(fork.clone(), open.now.clone());
            }
            Op::Rollback(full) => {
                let contents = self.frozen[full].clone();
                open.durable.extend([open.now.clone(), contents.clone()]);
                // The history ends, and the numbers of its points begin anew.
                open.points.clear();
                let snap = full.strip_prefix(&format!("{name}@")).unwrap();
                store.rollback_running(&disk, name, snap).unwrap();
                open.now = contents.clone();
                open.durable = vec![contents];
            }
        }
    }
    /// Blocks of random data for random places.
    fn blocks(&self, rng: &mut Rng) -> Writes {
        let one = |rng: &mut Rng| {
            let at = rng.below(self.size / 4096) * 4096;
            let mut data = vec![0; 4096.min(self.size - at) as usize];
            data.chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()[..c.len()]));
            (at, data)
        };
        (0..rng.below(6)).map(|_| one(rng)).collect()
    }
    /// What was accepted of others while the process died counts.
    fn hear_of_others(&mut self, name: &str) {
        let now = &mut self.disks.get_mut(name).unwrap().now;
        for (at, data) in self.accepted.lock().unwrap().drain(..) {
            now[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
    }
    /// Other requests to a disk whose flush is still to be sent again.
    fn meanwhile(&mut self, name: &str, rng: &mut Rng, story: &str) {
        for (at, data) in self.blocks(rng) {
            self.run(name, &Op::Maintain);
            self.run(name, &Op::Write(at, data));
        }
        if rng.below(2) == 0 {
            self.power_cut(Policy::Random(rng.next()), story);
        }
    }
    /// The next process. It may die as well.
    fn take_over(&mut self, rng: &mut Rng) {
        let again = (rng.below(3) == 0).then(|| rng.below(12));
        self.next_life(rng, again);
    }
    /// [`World::take_over`] by a process that dies after so many calls.
    fn next_life(&mut self, rng: &mut Rng, mut again: Option<u64>) {
        loop {
            self.store = None;
            for open in self.disks.values_mut() {
                open.disk = None;
                open.written = false;
            }
            let unheard = self.mortal.failed_unheard();
            self.failed |= unheard;
            self.unheard += u64::from(unheard);
            self.sim = self.sim.kill();
            self.mortal = Mortal::on(&self.sim);
            self.lives += 1;
            if let Some(calls) = again.take() {
                self.mortal.die_after(calls, rng.next());
            }
            let seed = self.seed ^ (self.lives << 32);
            let mortal = self.mortal.clone();
            let (history, size, failed) = (self.seed, self.size, self.failed);
            let (disks, refused) = (&mut self.disks, &mut self.refused);
            let begun = until_death(|| {
                let store = Store::open_on(Arc::new(mortal), Path::new("/sim"), env(seed)).unwrap();
                for (name, open) in disks.iter_mut() {
                    // What was accepted may become one commit at once.
                    open.durable.push(open.now.clone());
                    if !open.given_up {
                        match store.resume_cow(name, open.memory.clone()) {
                            Ok(disk) => open.disk = Some(disk),
                            // What a failed sync took with it is missed, and said.
                            Err(e) => {
                                assert!(failed && e.kind() == Kind::Poisoned, "{history}: {e:?}");
                                open.given_up = true;
                                *refused += 1;
                            }
                        }
                    }
                    if open.given_up {
                        // As a user does: detached by force, and attached again.
                        let object = store.resolve(name).unwrap();
                        let disk = store.open_cow_on(&object, open.memory.clone()).unwrap();
                        let found = read(&disk, size);
                        assert!(
                            open.durable.contains(&found),
                            "history {history}: {name} comes back as no flush"
                        );
                        open.now = found.clone();
                        open.durable = vec![found];
                        open.disk = Some(disk);
                        open.given_up = false;
                    }
                }
                store
            });
            if begun.is_some() {
                self.failed = false;
            }
            if let Some(store) = begun {
                self.store = Some(store);
                self.mortal.live_on();
                return;
            }
        }
    }
    /// Everything is as it was accepted; what was under way may be there, block by block.
    fn compare(&mut self, under_way: Option<(&str, &Op)>, story: &str) {
        for (name, open) in &mut self.disks {
            let found = read(open.disk.as_ref().unwrap(), self.size);
            let mut next = open.now.clone();
            match under_way {
                Some((n, Op::Write(at, data))) if n == name => {
                    next[*at as usize..*at as usize + data.len()].copy_from_slice(data);
                }
                Some((n, Op::Discard(at, len))) if n == name => {
                    next[*at as usize..(*at + *len) as usize].fill(0);
                }
                Some((n, Op::Rollback(full))) if n == name => {
                    next.clone_from(&self.frozen[full]);
                    // All of the disk, or nothing of it.
                    let whole = found == open.now || found == next;
                    assert!(whole, "{story}: {name} is a mixture");
                }
                _ => {}
            }
            for (block, found) in found.chunks(BLOCK).enumerate() {
                let range = block * BLOCK..(block + 1) * BLOCK;
                assert!(
                    found == &open.now[range.clone()] || found == &next[range],
                    "{story}: block {block} of {name} is neither what was accepted nor what was under way"
                );
            }
            if under_way.is_some() {
                open.durable.push(found);
            }
        }
    }
    /// Closes all disks: every slot is in use or free, and not both; and what is free takes no space.
    fn close(&mut self, story: &str) {
        for open in self.disks.values_mut() {
            open.disk.take().unwrap().close().unwrap();
            open.durable = vec![open.now.clone()];
        }
        let store = self.store.as_ref().unwrap();
        // Who died in a rollback has not given back all that sealed layers kept of the history.
        store.gc(false).unwrap();
        let report = forkdisk::check::check(store, None, &Quiet).unwrap();
        let of_slots = |f: &&Finding| {
            [
                "neither in use nor free",
                "and in the free",
                "bytes of host",
            ]
            .iter()
            .any(|what| f.message.contains(what))
        };
        let all = report.leaks.iter().chain(&report.corruptions);
        let found: Vec<_> = all.filter(of_slots).collect();
        assert!(found.is_empty(), "{story}: {found:?}");
    }
    /// The power goes, and comes back.
    fn power_cut(&mut self, policy: Policy, story: &str) {
        let left = self.sim.crash_with(policy);
        let store = Store::open_on(left.root(), Path::new("/sim"), env(self.seed ^ 99)).unwrap();
        for (name, open) in &self.disks {
            let disk = store
                .open_cow(&store.resolve(name).unwrap(), true)
                .unwrap_or_else(|e| panic!("{story}: {policy:?}: {e:?}"));
            let found = read(&disk, self.size);
            assert!(
                open.durable.contains(&found),
                "{story}: {policy:?}: {name} is no flush: first differences {:?}",
                open.durable
                    .iter()
                    .map(|d| differ(d, &found))
                    .collect::<Vec<_>>()
            );
            drop(disk);
            let details = store.details(&store.resolve(name).unwrap()).unwrap();
            let history = store.history(name).unwrap();
            // The layers that were its own before it was snapshotted keep theirs.
            let known = |number: u64| {
                let mut chain = details.chain.iter();
                let at = chain.find_map(|layer| open.points.get(&(layer.id(), number)));
                at.map(|contents| (number, contents))
            };
            let points = history.points.iter().filter_map(|p| known(p.number));
            for (number, contents) in points.step_by(3) {
                let past = store.open_at(name, At::Number(number)).unwrap();
                let mut found = vec![0; self.size as usize];
                past.read(&mut found, 0).unwrap();
                let unlike = differ(contents, &found);
                assert_eq!(
                    unlike, None,
                    "{story}: {policy:?}: point {number} of {name}"
                );
            }
        }
        for (name, contents) in &self.frozen {
            if name == "image" || store.resolve(name).is_ok() {
                let object = store.resolve(name).unwrap();
                let found = read(&store.open_cow(&object, false).unwrap(), self.size);
                assert!(&found == contents, "{story}: {policy:?}: {name} changed");
            }
        }
        // What torn writes leave in files that nothing refers to is another matter.
        if !matches!(policy, Policy::Random(_)) {
            let mut report = forkdisk::check::check(&store, None, &Quiet).unwrap();
            // After a failed sync that is so, and said; and where somebody died as he wrote the superblock of a sealed layer.
            report.corruptions.retain(|c| {
                let of_copy = |n| {
                    c.message
                        .starts_with(&format!("copy {n} of the superblock"))
                };
                let torn = self.torn && (of_copy(1) || of_copy(2));
                !torn && (self.unheard == 0 || !of_copy(2))
            });
            assert!(
                report.corruptions.is_empty(),
                "{story}: {policy:?}: {report:?}"
            );
        }
    }
}

/// Deaths, failed syncs that nobody heard of, disks refused for them.
fn history(seed: u64) -> [u64; 3] {
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9) ^ 0x7A);
    let blocks = [9, 37, 37, 600, 1200][rng.below(5) as usize];
    let mut world = World::new(seed, blocks);
    let mut deaths = 0;
    let story = format!("history {seed} (FORKDISK_TAKEOVER_SEED={seed})");
    let mut next_death = rng.below(40);
    world.mortal.die_after(next_death, rng.next());
    for n in 0..70 {
        let (name, op) = world.op(&mut rng, n);
        // The kernel sends what was under way again, until it is answered.
        if std::env::var_os("FORKDISK_TAKEOVER_SEED").is_some() {
            eprintln!("operation {n}: {name} {op:?}");
        }
        world.others = world.blocks(&mut rng);
        while until_death(|| world.run(&name, &op)).is_none() {
            deaths += 1;
            world.torn |= matches!(op, Op::Rollback(_));
            world.hear_of_others(&name);
            // It could have been the power.
            if rng.below(3) == 0 {
                world.power_cut(
                    Policy::Random(rng.next()),
                    &format!("{story}, death {deaths} in {op:?}"),
                );
            }
            if std::env::var_os("FORKDISK_TAKEOVER_SEED").is_some() {
                eprintln!("death {deaths} in operation {n}: {name} {op:?}");
            }
            world.take_over(&mut rng);
            world.compare(
                Some((&name, &op)),
                &format!("{story}, death {deaths} in {op:?}"),
            );
            // Others may be faster than what is sent again.
            if matches!(op, Op::Flush) {
                world.meanwhile(&name, &mut rng, &format!("{story}, after death {deaths}"));
            }
            next_death = rng.below(40);
            world.mortal.die_after(next_death, rng.next());
        }
        if rng.below(12) == 0 {
            world.power_cut(
                Policy::Random(rng.next()),
                &format!("{story}, after operation {n}"),
            );
        }
    }
    world.mortal.live_on();
    world.compare(None, &story);
    for policy in [
        Policy::AllDone,
        Policy::AllDropped,
        Policy::Random(rng.next()),
        Policy::Random(rng.next()),
    ] {
        world.power_cut(policy, &story);
    }
    world.close(&story);
    world.power_cut(Policy::AllDropped, &story);
    [deaths, world.unheard, world.refused]
}

fn add(a: [u64; 3], b: [u64; 3]) -> [u64; 3] {
    std::array::from_fn(|i| a[i] + b[i])
}

/// A death is a panic that nobody need read of.
fn let_die_quietly() {
    std::panic::set_hook(Box::new(|info| {
        if !info.payload().is::<common::mortal::Dead>() {
            eprintln!("{info}");
        }
    }));
}

#[test]
fn the_next_process_finds_all_that_was_accepted() {
    let_die_quietly();
    let number = |name: &str| Some(std::env::var(name).ok()?.parse::<u64>().expect("a number"));
    let seeds = match number("FORKDISK_TAKEOVER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FORKDISK_TAKEOVER_HISTORIES").unwrap_or(HISTORIES),
    };
    let count = seeds.end - seeds.start;
    let [deaths, unheard, refused] = std::thread::scope(|scope| {
        let (first, last) = (seeds.start, seeds.end);
        let threads: Vec<_> = (0..2)
            .map(|t| {
                scope.spawn(move || (first + t..last).step_by(2).map(history).fold([0; 3], add))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a history"))
            .fold([0; 3], add)
    });
    eprintln!(
        "{count} histories, {deaths} deaths, {unheard} failed syncs that nobody heard of, {refused} disks refused for them"
    );
    assert!(
        count < HISTORIES || deaths > 5 * count,
        "only {deaths} deaths"
    );
    assert!(
        count < HISTORIES || (unheard > count / 4 && refused < unheard),
        "{unheard} failed syncs, {refused} refused"
    );
}

/// A store with an image of so many blocks, all of ones.
fn small_store(seed: u64, blocks: usize) -> (SimDisk, Store) {
    let sim = SimDisk::new(seed);
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(seed)).unwrap();
    let image = vec![1u8; blocks * BLOCK];
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .unwrap();
    (sim, store)
}

/// After a failed sync nobody knows what is on the disk. The next process must not accept what the last one refused.
#[test]
fn a_failed_sync_is_not_forgotten() {
    let (sim, store) = small_store(5, 20);
    store.create(&["a".to_string()], "image", None).unwrap();
    let memory = volatile::private().unwrap();
    let object = store.resolve("a").unwrap();
    let disk = store.open_cow_on(&object, memory.clone()).unwrap();
    disk.write(&vec![2; BLOCK], 0).unwrap();
    disk.flush().unwrap();
    disk.write(&vec![3; BLOCK], 0).unwrap();
    sim.fail_nth(Verb::Sync, 0, FaultKind::Eio);
    disk.flush().unwrap_err();
    drop(disk);
    let sim = sim.kill();
    let store = Store::open_on(sim.root(), Path::new("/sim"), env(6)).unwrap();
    let refused = store
        .resume_cow("a", memory.clone())
        .err()
        .expect("refused");
    assert_eq!(refused.kind(), Kind::Poisoned);
    // Attached anew it is as of a flush.
    let disk = store
        .open_cow_on(&store.resolve("a").unwrap(), memory)
        .unwrap();
    let found = read(&disk, BLOCK as u64);
    assert!(found == vec![2; BLOCK] || found == vec![3; BLOCK]);
}

/// Each sync of a checkpoint fails in turn, with nobody to hear of it; then each call of the successor's first commit is its last, and the power goes.
#[test]
fn a_checkpoint_whose_sync_failed_unheard() {
    let_die_quietly();
    let mut failed = 0;
    for seed in 0..3 {
        let block = |n: u8| Op::Write(4096 * u64::from(n % 9), vec![n; BLOCK]);
        for n in 0.. {
            let mut checkpointed = false;
            for m in 0.. {
                let mut world = World::new(seed, 9);
                let mut rng = Rng(seed << 20 | n << 10 | m);
                for i in 1..8 {
                    world.run("a", &block(i));
                    world.run("a", &Op::Flush);
                }
                world.mortal.die_after(n, 2);
                checkpointed = until_death(|| world.run("a", &Op::Checkpoint)).is_some();
                if checkpointed {
                    break;
                }
                world.take_over(&mut rng);
                failed += world.unheard;
                world.mortal.die_after(m, rng.next());
                let committed = until_death(|| {
                    world.run("a", &block(8));
                    world.run("a", &Op::Flush);
                });
                for _ in 0..12 {
                    let story = format!("seed {seed}, death at {n}, then at {m}");
                    world.power_cut(Policy::Random(rng.next()), &story);
                }
                if committed.is_some() {
                    break;
                }
            }
            if checkpointed {
                break;
            }
        }
    }
    assert!(failed > 0, "no sync failed");
}

/// The process dies in each call of a flush while others go on writing: two areas of changes are left. Its successor dies in each call of what it makes
/// of them; and the one after that writes everything twice, and closes.
#[test]
fn two_areas_are_left() {
    let_die_quietly();
    let mut both = 0;
    for seed in 0..30 {
        for n in 0.. {
            let mut flushed = false;
            for m in 0.. {
                let mut world = World::new(seed, 37);
                let mut rng = Rng(seed << 20 | n << 10 | m);
                let some = |rng: &mut Rng, n: u64| {
                    let at = (n % 3 * 7 + rng.below(4)) * 4096;
                    Op::Write(at, vec![n as u8 + 1; BLOCK * (1 + rng.below(6) as usize)])
                };
                let writes = rng.below(4);
                for i in 0..12 {
                    let op = some(&mut rng, i);
                    world.run("a", &op);
                    if i % 3 == 0 && i < 9 + writes {
                        world.run("a", &Op::Flush);
                    }
                }
                let story = format!("seed {seed}, death at {n}, then at {m}");
                world.others = (0..8)
                    .map(|i| match some(&mut rng, 20 + i) {
                        Op::Write(at, data) => (at, data),
                        _ => unreachable!(),
                    })
                    .collect();
                world.mortal.die_after(n, rng.next());
                flushed = until_death(|| world.run("a", &Op::Flush)).is_some();
                both += u64::from(!world.accepted.lock().unwrap().is_empty());
                world.hear_of_others("a");
                if flushed {
                    break;
                }
                world.next_life(&mut rng, Some(m));
                let whole = world.lives == 2;
                world.compare(None, &story);
                for i in 0..60 {
                    let op = some(&mut rng, i);
                    world.run("a", &op);
                    if i % 9 == 0 {
                        world.run("a", &Op::Flush);
                    }
                }
                world.compare(None, &story);
                world.close(&story);
                if whole {
                    break;
                }
            }
            if flushed {
                break;
            }
        }
    }
    assert!(both > 0, "nobody wrote meanwhile");
}

/// What the last commit freed and the dead process had used again, for a block that its successor writes once more before any commit: nobody else
/// would ever know of it.
#[test]
fn no_slot_is_forgotten() {
    let (sim, store) = small_store(7, 200);
    store.create(&["a".to_string()], "image", None).unwrap();
    let memory = volatile::private().unwrap();
    let object = store.resolve("a").unwrap();
    let disk = store.open_cow_on(&object, memory.clone()).unwrap();
    let write = |disk: &CowDisk, n: u8, at: usize, blocks: usize| {
        let bytes = vec![n; blocks * BLOCK];
        disk.write(&bytes, (at * BLOCK) as u64).unwrap();
    };
    for n in 2..4 {
        write(&disk, n, 0, 60);
        disk.flush().unwrap();
    }
    write(&disk, 4, 100, 40);
    drop(disk);
    let sim = sim.kill();
    let store = Store::open_on(sim.root(), Path::new("/sim"), env(8)).unwrap();
    let disk = store.resume_cow("a", memory).unwrap();
    write(&disk, 5, 100, 40);
    disk.flush().unwrap();
    let found = read(&disk, 200 * BLOCK as u64);
    assert!(found[..60 * BLOCK].iter().all(|&b| b == 3));
    assert!(found[100 * BLOCK..140 * BLOCK].iter().all(|&b| b == 5));
    disk.close().unwrap();
    drop(disk);
    let report = forkdisk::check::check(&store, None, &Quiet).unwrap();
    assert_eq!(
        (&report.leaks[..], &report.corruptions[..]),
        (&[][..], &[][..])
    );
}

/// Slots that the dead process had written ahead stand behind all that is named: its successor gives them back before it uses them for something that may
/// leave them free.
#[test]
fn what_was_written_ahead_is_given_back() {
    let (sim, store) = small_store(7, 200);
    store.create(&["a".to_string()], "image", None).unwrap();
    let memory = volatile::private().unwrap();
    let object = store.resolve("a").unwrap();
    let disk = store.open_cow_on(&object, memory.clone()).unwrap();
    // A disk that syncs often.
    for n in 0..40 {
        disk.write(&[n; BLOCK], u64::from(n) * BLOCK as u64)
            .unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    let sim = sim.kill();
    let store = Store::open_on(sim.root(), Path::new("/sim"), env(8)).unwrap();
    let disk = store.resume_cow("a", memory).unwrap();
    let layers = sim.root().subdir("layers").unwrap();
    let file = layers
        .open(&format!("{}.layer", object.id), Access::Read)
        .unwrap();
    let before = file.allocated().unwrap();
    disk.maintain().unwrap();
    let after = file.allocated().unwrap();
    assert!(after + 16 * BLOCK as u64 <= before, "{before}, {after}");
    disk.close().unwrap();
    let report = forkdisk::check::check(&store, None, &Quiet).unwrap();
    assert_eq!(
        (&report.leaks[..], &report.corruptions[..]),
        (&[][..], &[][..])
    );
}

/// Memory that cannot be that of the disk is refused, never taken for its changes.
#[test]
fn a_strange_log_is_refused() {
    let (_sim, store) = small_store(5, 20);
    store
        .create(&["a".to_string(), "b".to_string()], "image", None)
        .unwrap();
    let memory = volatile::private().unwrap();
    let disk = store
        .open_cow_on(&store.resolve("a").unwrap(), memory.clone())
        .unwrap();
    disk.write(&vec![2; 3 * BLOCK], 0).unwrap();
    drop(disk);
    // That of another disk.
    assert_eq!(
        store
            .resume_cow("b", memory.clone())
            .err()
            .expect("refused")
            .kind(),
        Kind::Poisoned
    );
    let area = 4096;
    let count = |n: u64| memory.store(48, n);
    for (what, at, value) in [
        ("a block behind the end", area, 20u64),
        ("a slot of the header", area + 4, 3),
        ("a slot behind the end", area + 4, 1 << 30),
    ] {
        let mut before = [0; 12];
        memory.read(area, &mut before);
        memory.write(at, &(value as u32).to_le_bytes());
        assert_eq!(
            store
                .resume_cow("a", memory.clone())
                .err()
                .expect(what)
                .kind(),
            Kind::Poisoned,
            "{what}"
        );
        memory.write(area, &before);
    }
    count(u64::MAX);
    assert_eq!(
        store
            .resume_cow("a", memory.clone())
            .err()
            .expect("too many")
            .kind(),
        Kind::Poisoned
    );
    count(3);
    let disk = store.resume_cow("a", memory.clone()).unwrap();
    assert!(read(&disk, 3 * BLOCK as u64) == vec![2; 3 * BLOCK]);
}
