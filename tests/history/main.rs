//! The history of a disk: random work beside a plain model that remembers every flush; every point that is kept is what was flushed then,
//! whatever came between: checkpoints, clean and unclean ends, the death of the process, expiry, a full host disk.
#![allow(missing_docs, reason = "a test")]

#[path = "../common/mod.rs"]
mod common;
mod sealed;
use common::{Rng, audit, base_image, read_all};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Kind, Result};
use forkdisk::io::Access;
use forkdisk::io::count::Counting;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::layer::history::Hold;
use forkdisk::layer::volatile;
use forkdisk::store::history::{At, Limits};
use forkdisk::store::names::Extra;
use forkdisk::store::past::{Owner, PastFork};
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, QuotaChange, Store};
use forkdisk::sys::shared::SharedMemory;
use forkdisk::units::{Id, REGION_BLOCKS};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const B: u64 = 4096;

/// A store with one disk, `d`, which keeps its history, and what it held at each flush.
struct World {
    sim: SimDisk,
    store: Store,
    clock: Arc<AtomicU64>,
    seed: u64,
    lives: u64,
    snapshots: u64,
    size: u64,
    disk: Option<Arc<CowDisk>>,
    memory: Arc<SharedMemory>,
    now: Vec<u8>,
    flushed: Vec<u8>,
    points: BTreeMap<u64, Vec<u8>>,
}

fn env(seed: u64, lives: u64, clock: &Arc<AtomicU64>) -> Env {
    let ids = common::env(Rng(seed ^ lives << 40).next());
    let clock = clock.clone();
    Env {
        now: Arc::new(move || clock.load(Ordering::SeqCst)),
        ..ids
    }
}

fn limits(window: Option<u64>, bytes: Option<u64>) -> Limits {
    Limits { window, bytes }
}

impl World {
    fn new(seed: u64, blocks: u64, limits: Limits) -> World {
        let size = blocks * B;
        let clock = Arc::new(AtomicU64::new(1_700_000_000));
        let sim = SimDisk::new(seed);
        let path = Path::new("/sim");
        let store = Store::init_on(sim.root(), path, env(seed, 0, &clock)).expect("a store");
        let mut image = base_image(size as usize - 1000);
        let source = ImportSource::Reader(&mut &image[..]);
        store
            .import(source, "image", ImportMode::Copy, &Quiet)
            .expect("import");
        image.resize(size as usize, 0);
        let name = ["d".to_string()];
        store.create(&name, "image", None).expect("a disk");
        store.set_history(&name, Some(limits)).expect("a history");
        let mut world = World {
            sim,
            store,
            clock,
            seed,
            lives: 0,
            snapshots: 0,
            size,
            disk: None,
            memory: volatile::private().expect("memory"),
            now: image.clone(),
            flushed: image,
            points: BTreeMap::new(),
        };
        world.open();
        world
    }
    fn open(&mut self) -> Arc<CowDisk> {
        if self.disk.is_none() {
            let object = self.store.resolve("d").expect("d");
            let disk = self
                .store
                .open_cow_on(&object, self.memory.clone())
                .expect("open");
            self.points
                .insert(disk.point().expect("writable").1, self.flushed.clone());
            self.disk = Some(disk);
        }
        self.disk.clone().expect("just opened")
    }
    fn close(&mut self) {
        if let Some(disk) = self.disk.take() {
            disk.close().expect("close");
            // The last flush before the clean end.
            self.points
                .insert(disk.point().expect("writable").1, self.now.clone());
            self.flushed = self.now.clone();
        }
    }
    fn write(&mut self, at: u64, data: &[u8]) {
        self.open().write(data, at).expect("write");
        self.now[at as usize..at as usize + data.len()].copy_from_slice(data);
    }
    fn discard(&mut self, at: u64, len: u64) {
        self.open().discard(at, len).expect("discard");
        self.now[at as usize..(at + len) as usize].fill(0);
    }
    fn flush(&mut self) -> u64 {
        let disk = self.open();
        disk.flush().expect("flush");
        self.flushed = self.now.clone();
        let number = disk.point().expect("writable").1;
        self.points.insert(number, self.now.clone());
        number
    }
    fn next_snapshot(&mut self) -> String {
        self.snapshots += 1;
        format!("s{}", self.snapshots)
    }
    /// A snapshot of the disk in use is a flush, and the disk goes on in another layer.
    fn snapshot(&mut self) {
        let (disk, name) = (self.open(), self.next_snapshot());
        let taken = self.store.snapshot_running(&disk, "d", &name, None);
        taken.expect("a snapshot");
        self.flushed = self.now.clone();
        let (_, number) = disk.point().expect("writable");
        self.points.insert(number, self.now.clone());
    }
    /// The name of a snapshot goes, and what only that needed.
    fn forget_snapshot(&mut self, rng: &mut Rng) {
        let name = format!("d@s{}", 1 + rng.below(self.snapshots.max(1)));
        if let Ok(plan) = self.store.plan_removal(&[name], false) {
            self.store.remove(&plan).expect("removed");
            self.store.gc(false).expect("gc");
        }
    }
    /// The store on what is left of the disk.
    fn again(&mut self, sim: SimDisk) {
        self.disk = None;
        self.sim = sim;
        self.lives += 1;
        let env = env(self.seed, self.lives, &self.clock);
        self.store = Store::open_on(self.sim.root(), Path::new("/sim"), env).expect("a store");
    }
    fn power_cut(&mut self, policy: Policy) {
        self.again(self.sim.crash_with(policy));
        self.now = self.flushed.clone();
    }
    /// The process dies; the next one takes over.
    fn death(&mut self) {
        self.open();
        self.again(self.sim.kill());
        self.disk = Some(
            self.store
                .resume_cow("d", self.memory.clone())
                .expect("taken over"),
        );
    }
    fn number(&self) -> Vec<u64> {
        let history = self.store.history("d").expect("a history");
        history.points.iter().map(|p| p.number).collect()
    }
    /// Every point that is kept is what was flushed then; by itself, and in a fork.
    fn look_back(&mut self, rng: &mut Rng) -> Vec<u64> {
        self.close();
        let kept = self.number();
        for (i, &number) in kept.iter().enumerate() {
            // A flush that the disk began by itself is a point, too.
            let Some(expected) = self.points.get(&number) else {
                continue;
            };
            let past = self
                .store
                .open_at("d", At::Number(number))
                .expect("a point");
            same(&read_all(&*past).expect("read"), expected, number);
            if i == 0 || rng.below(6) == 0 {
                let name = format!("f{}-{number}", self.lives);
                let made = self
                    .store
                    .create_at(&name, "d", At::Number(number), None, &Quiet);
                let fork = self
                    .store
                    .open_disk(&made.expect("a fork"), false)
                    .expect("open");
                same(&read_all(&*fork).expect("read"), expected, number);
                drop(fork);
                let plan = self.store.plan_removal(&[name], false).expect("a plan");
                self.store.remove(&plan).expect("removed");
            }
            self.lives += 1;
        }
        audit::layers(&self.sim, "history");
        kept
    }
    fn rewind(&mut self, number: u64) -> bool {
        self.close();
        let done = self
            .store
            .rewind("d", At::Number(number), &Quiet)
            .expect("rewind");
        let Some(expected) = self.points.get(&number).cloned() else {
            return false;
        };
        (self.now, self.flushed) = (expected.clone(), expected);
        let found = read_all(&*self.open()).expect("read");
        same(&found, &self.now, number);
        done.undoable
    }
    fn step(&mut self, rng: &mut Rng) {
        let at = rng.below(self.size);
        match rng.below(70) {
            0..=25 => {
                let at = if rng.below(3) == 0 {
                    at
                } else {
                    rng.below(8).min(self.size / B - 1) * B
                };
                let len = [4096, 4096, 8192, 700, 30_000][rng.below(5) as usize];
                let data = common::data(rng.next(), u64::min(len, self.size - at));
                self.write(at, &data);
            }
            26..=31 => self.discard(at, (1 + rng.below(20_000)).min(self.size - at)),
            32 => self.discard(0, self.size),
            33..=50 => drop(self.flush()),
            51..=53 => self.open().checkpoint().expect("checkpoint"),
            54..=56 => self.open().maintain().expect("maintain"),
            57 => self.close(),
            58 => {
                self.flush();
                self.power_cut(Policy::AllDropped);
            }
            59 => {
                self.flush();
                self.power_cut(Policy::Random(rng.next()));
            }
            60..=61 => self.death(),
            62 => drop(self.look_back(rng)),
            63..=65 => self.snapshot(),
            66 => {
                self.close();
                let name = self.next_snapshot();
                self.store.snapshot("d", &name, None).expect("a snapshot");
            }
            67 => self.forget_snapshot(rng),
            _ => {
                self.close();
                let kept = self.number();
                // A layer that nobody has opened yet has none of its own, and those below it may have gone with a snapshot.
                if kept.is_empty() {
                    return;
                }
                let number = kept[rng.below(kept.len() as u64) as usize];
                if self.points.contains_key(&number) {
                    self.rewind(number);
                }
            }
        }
        self.clock.fetch_add(rng.below(20), Ordering::SeqCst);
    }
}

/// Nothing that is zeros.
fn noise(i: u64, len: u64) -> Vec<u8> {
    common::data(7 * i + 1, len)
}

fn same(found: &[u8], expected: &[u8], number: u64) {
    let unlike = found
        .chunks(B as usize)
        .zip(expected.chunks(B as usize))
        .position(|(a, b)| a != b);
    assert_eq!(unlike, None, "point {number}: the first block that differs");
    assert_eq!(found.len(), expected.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_point_is_what_was_flushed(
        seed in any::<u64>(),
        blocks in prop_oneof![Just(3u64), Just(40), Just(1100)],
        kept in prop_oneof![Just((Some(1_000_000), None)), Just((Some(200), None)), Just((None, Some(30 * B)))],
        len in 20usize..150,
    ) {
        let mut world = World::new(seed, blocks, limits(kept.0, kept.1));
        let mut rng = Rng(seed);
        for _ in 0..len {
            world.step(&mut rng);
        }
        world.look_back(&mut rng);
    }
}

/// With room for it, nothing of the history is missing: not a single flush, over many checkpoints and both kinds of ends.
#[test]
fn nothing_is_left_out() {
    let mut world = World::new(5, 40, limits(Some(1_000_000), None));
    let mut numbers = vec![0];
    for i in 1..60u64 {
        world.write(i % 9 * B, &noise(i, B));
        numbers.push(world.flush());
        match i % 12 {
            3 => world.open().checkpoint().expect("checkpoint"),
            6 => world.close(),
            9 => world.power_cut(Policy::AllDropped),
            11 => world.death(),
            _ => {}
        }
    }
    assert_eq!(numbers, (0..60).collect::<Vec<_>>());
    assert_eq!(world.look_back(&mut Rng(5)), numbers);
    // There and back again: what was undone is a point as any other.
    assert!(world.rewind(17));
    world.points.insert(60, world.now.clone());
    assert!(world.rewind(59));
    world.points.insert(61, world.now.clone());
    assert_eq!(world.look_back(&mut Rng(6)).len(), 62);
}

/// A time means the last flush before it, also if the clock went back; what is too old goes, and its space with it.
#[test]
fn a_window_moves_on() {
    let mut world = World::new(1, 40, limits(Some(100), None));
    let start = world.clock.load(Ordering::SeqCst);
    for i in 0..30u64 {
        world.clock.store(start + 10 * i, Ordering::SeqCst);
        world.write(i % 3 * B, &noise(i, B));
        world.flush();
    }
    world.close();
    world.open();
    world.close();
    let history = world.store.history("d").expect("a history");
    // The last one before the window is what the disk was when the window began.
    assert_eq!(history.points[0].number, 20);
    assert_eq!(history.points[0].time, (start + 190) * 1000);
    assert_eq!(history.points.len(), 11);
    let at = |seconds: u64| {
        let time = At::Time((start + seconds) * 1000);
        world.store.look_back("d", time).map(|r| r.point.number)
    };
    assert_eq!(at(189).expect_err("too old").kind(), Kind::NotFound);
    assert_eq!(at(190).expect("the oldest"), 20);
    assert_eq!(at(255).expect("between two"), 26);
    assert_eq!(at(9999).expect("the last"), 30);
    // What is there can be gone back to, also if it is too old by now; only opening it lets go of it.
    world.clock.fetch_add(10_000, Ordering::SeqCst);
    // Ten replaced blocks, and the segments of their commits: ten seconds are more than a segment of this window spans.
    assert_eq!(history.bytes, 20 * B);
    assert!(world.rewind(20));
    assert_eq!(world.number(), [30, 31]);
    audit::layers(&world.sim, "window");
}

/// A budget is kept to, by the housekeeping alone.
#[test]
fn a_budget_is_kept() {
    let mut world = World::new(2, 40, limits(None, Some(20 * B)));
    for i in 0..200u64 {
        world.write(i % 5 * B, &noise(i, B));
        world.flush();
        world.open().maintain().expect("maintain");
        let held = world.open().history_bytes();
        assert!(held <= 22 * B, "{held} bytes are held");
    }
    let kept = world.look_back(&mut Rng(2));
    assert!((8..=20).contains(&kept.len()), "{kept:?}");
}

/// A burst that is many times the budget: no flush leaves much more than that, and most of the budget is full of points that can be shown.
#[test]
fn a_burst_leaves_a_full_budget() {
    for (seed, budget, each) in [(11, 1024, 13), (12, 1024, 120), (13, 256, 5)] {
        let mut world = World::new(seed, 150, limits(None, Some(budget * B)));
        // A sixteenth, or 64 blocks.
        let more = (budget / 16).max(64);
        let (mut written, mut most) = (0, 0);
        while written < 20 * budget {
            for i in written..written + each {
                world.write(i % 150 * B, &noise(i, B));
            }
            written += each;
            world.flush();
            let held = world.open().history_bytes();
            most = most.max(held / B);
            // What a flush replaced comes to what was there, and what is noted of it.
            assert!(held <= (budget + more + 2) * B, "{held} bytes are held");
        }
        assert!(most > budget, "the budget is never full: {most}");
        // Housekeeping leaves no more than the budget.
        world.open().maintain().expect("maintain");
        assert!(world.open().history_bytes() <= (budget + 2) * B);
        world.close();
        let points = world.store.history("d").expect("a history").points;
        let held: u64 = points.iter().map(|p| p.held).sum();
        assert!(held >= budget * 3 / 5, "{held} of {budget} blocks are left");
        let first = points[0].number;
        let numbers: Vec<u64> = points.iter().map(|p| p.number).collect();
        assert!(
            numbers
                .iter()
                .copied()
                .eq(first..first + points.len() as u64)
        );
        assert_eq!(world.look_back(&mut Rng(seed)), numbers);
    }
}

/// A quota holds for the history, too: that has the room which the data leave, and no write is refused for it.
#[test]
fn a_history_has_the_room_that_the_quota_leaves() {
    let quota = 400;
    let mut world = World::new(20, 300, limits(Some(1_000_000), None));
    let change = QuotaChange {
        bytes: Some(Some(quota * B)),
        waits: None,
    };
    let disk = world.open();
    let store = &world.store;
    store.set_quota("d", change, Some(&disk)).expect("a quota");
    for (data, rounds) in [(100, 12), (300, 6)] {
        let mut most = 0;
        for i in 0..rounds * 10 {
            let at = i * data / 10 % data;
            world.write(at * B, &noise(i ^ data << 20, data / 10 * B));
            world.flush();
            let all = disk.used() + disk.history_bytes();
            most = most.max(all);
            // What is more than a sixteenth, or 64 blocks, goes with the flush.
            assert!(all <= (quota + 64 + 2) * B, "{all}");
            assert!(disk.used() <= data.max(100) * B);
        }
        assert!(most >= quota * 3 / 4 * B, "{most}");
        assert_eq!(disk.used(), data * B);
    }
    drop(disk);
    assert!(world.look_back(&mut Rng(20)).len() > 1);
}

/// What is too old goes little by little, whatever the journal holds.
#[test]
fn a_window_moves_on_in_small_steps() {
    let window = 640;
    let mut world = World::new(14, 40, limits(Some(window), None));
    let start = world.clock.load(Ordering::SeqCst);
    for i in 0..600u64 {
        world.clock.store(start + 4 * i, Ordering::SeqCst);
        world.write(i % 20 * B, &noise(i, B));
        world.flush();
        world.open().maintain().expect("maintain");
        if i > 200 {
            let points = world.store.history("d").expect("a history").points;
            let age = world.clock.load(Ordering::SeqCst) - points[0].time / 1000;
            // All of the window, and no more than a sixteenth beyond: three segments, and a flush.
            assert!((window..=window + 3 * 10 + 4).contains(&age), "{age}");
        }
    }
    world.look_back(&mut Rng(14));
}

/// On a full host disk the history goes before a writer is refused.
#[test]
fn a_full_disk_takes_the_history() {
    let mut world = World::new(3, 40, limits(Some(1_000_000), None));
    for i in 0..64u64 {
        world.write(i % 20 * B, &noise(i, B));
        world.flush();
    }
    let held = world.open().history_bytes();
    assert!(held >= 40 * B);
    world.sim.set_capacity(Some(world.sim.used() + 2 * B));
    for i in 0..400u64 {
        world.write(i % 20 * B, &noise(i + 100, B));
        if i % 5 == 0 {
            world.flush();
        }
    }
    let found = read_all(&*world.open()).expect("read");
    assert_eq!(found, world.now);
    world.sim.set_capacity(None);
    world.look_back(&mut Rng(3));
}

/// The same where the block map of what was flushed takes more than the few slots that are always kept for one.
/// A discard of many regions, each of which has something of its own, becomes more history than the host has room for: it ends, done or refused, and is not
/// done over and over again.
#[test]
fn a_full_disk_takes_the_history_of_large_discards() {
    let (done, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        const REGIONS: u64 = 700;
        let region = B * REGION_BLOCKS as u64;
        for room in [0, 1, 3, 10, 20, 40] {
            let mut world = World::new(31 + room, 40, limits(None, Some(1 << 40)));
            let disk = world.open();
            disk.resize(REGIONS * region).expect("larger");
            for r in 0..REGIONS {
                disk.write(&[1; 4096], r * region).expect("write");
            }
            disk.flush().expect("flush");
            world.sim.set_capacity(Some(world.sim.used() + room * B));
            // First a little, for which there is room, then what takes more than there can be.
            let begin = region - 12 * B;
            let discarded = disk.discard(begin, REGIONS * region - begin);
            world.sim.set_capacity(None);
            if let Err(e) = discarded {
                assert_eq!(e.kind(), Kind::NoSpace, "{e:?}");
                disk.discard(0, REGIONS * region).expect("there is room");
            }
            disk.flush().expect("flush");
            let mut found = vec![1; 4096];
            for r in 0..REGIONS {
                disk.read(&mut found, r * region).expect("read");
                assert!(found.iter().all(|b| *b == 0), "region {r}");
            }
            disk.close().expect("close");
        }
        done.send(()).expect("somebody listens");
    });
    let limit = std::time::Duration::from_secs(60);
    heard.recv_timeout(limit).expect("it ends");
}

#[test]
fn a_full_disk_takes_the_history_of_large_writes() {
    let mut world = World::new(3, 8000, limits(Some(1_000_000), None));
    let rewrite = |world: &mut World, i| {
        world.write(0, &noise(i, 7000 * B));
        world.flush();
    };
    (0..3).for_each(|i| rewrite(&mut world, i));
    assert!(world.open().history_bytes() >= 14000 * B);
    // Others take all that is left.
    world.sim.set_capacity(Some(world.sim.used()));
    (3..14).for_each(|i| rewrite(&mut world, i));
    let found = read_all(&*world.open()).expect("read");
    same(&found, &world.now, 0);
    world.sim.set_capacity(None);
    world.look_back(&mut Rng(3));
}

/// Too much for one commit goes back as well, and to where nothing was written nothing is copied.
#[test]
fn a_large_rewind_needs_no_commit_of_its_size() {
    let blocks = 70_000;
    let mut world = World::new(4, 40, limits(Some(1_000_000), None));
    let name = ["large".to_string()];
    world
        .store
        .create(&name, "image", Some(blocks * B))
        .expect("a disk");
    world
        .store
        .set_history(&name, Some(limits(Some(1000), None)))
        .expect("a history");
    let open = |w: &World| {
        w.store
            .open_cow(&w.store.resolve("large").expect("large"), true)
            .expect("open")
    };
    let disk = open(&world);
    disk.write(&[7; 4096], 3 * B).expect("write");
    disk.flush().expect("flush");
    let number = disk.point().expect("writable").1;
    disk.discard(0, blocks * B).expect("discard");
    disk.flush().expect("flush");
    disk.close().expect("close");
    drop(disk);
    let done = world
        .store
        .rewind("large", At::Number(number), &Quiet)
        .expect("rewind");
    assert_eq!((done.undoable, done.blocks), (false, blocks));
    let disk = open(&world);
    assert_eq!(disk.private_blocks(), (1, 0));
    let mut block = [0; 4096];
    disk.read(&mut block, 3 * B).expect("read");
    assert_eq!(block, [7; 4096]);
    disk.read(&mut block, 5 * B).expect("read");
    assert_eq!(block[..], world.now[5 * B as usize..6 * B as usize]);
    disk.close().expect("close");
    drop(disk);
    assert_eq!(
        world
            .store
            .history("large")
            .expect("a history")
            .points
            .len(),
        1
    );
    world.close();
    audit::layers(&world.sim, "large");
}

/// With a history a flush is still one write and one sync.
#[test]
fn a_flush_costs_no_more() {
    let world = World::new(10, 40, limits(Some(1000), None));
    let counting = Counting::new(world.sim.root());
    let clock = world.clock.clone();
    drop(world.disk);
    let env = env(10, 99, &clock);
    let store =
        Store::open_on(Arc::new(counting.clone()), Path::new("/sim"), env).expect("a store");
    let disk = store
        .open_cow(&store.resolve("d").expect("d"), true)
        .expect("open");
    for i in 0..3 {
        disk.write(&noise(i, 20 * B), 0).expect("write");
        let before = counting.counts();
        disk.flush().expect("flush");
        let cost = counting.counts() - before;
        assert_eq!((cost.writes, cost.syncs), (1, 1));
    }
    assert_eq!(disk.history_bytes(), 40 * B);
}

/// Whoever interrupts a rewind or a fork of the past finds everything as it was.
#[test]
fn an_interrupt_changes_nothing() {
    struct Stop(u64);
    impl forkdisk::store::Progress for Stop {
        fn update(&self, done: u64, _: u64) -> bool {
            done < self.0
        }
    }
    let mut world = World::new(11, 1100, limits(Some(1_000_000), None));
    let first = world.flush();
    for i in 0..5 {
        world.write(i * 200 * B, &noise(i, 200 * B));
        world.flush();
    }
    world.close();
    let names = world.store.list().expect("list");
    for stop in [0, 300 * B] {
        let done = world.store.rewind("d", At::Number(first), &Stop(stop));
        assert_eq!(done.expect_err("interrupted").kind(), Kind::Interrupted);
        // A disk that was not closed is found as of its last flush.
        world.lives += 1;
        let made = world
            .store
            .create_at("f", "d", At::Number(first + 5), None, &Stop(stop));
        assert_eq!(made.expect_err("interrupted").kind(), Kind::Interrupted);
        assert_eq!(world.store.list().expect("list"), names);
        let found = read_all(&*world.open()).expect("read");
        same(&found, &world.flushed, stop);
        assert_eq!(world.look_back(&mut Rng(11)).len(), 6);
    }
    assert!(world.store.gc(true).expect("gc").layers.is_empty());
    assert!(world.rewind(first));
}

/// A process that has a disk open while another one reads its past.
struct Writer {
    disk: Arc<CowDisk>,
    hold: Option<Arc<Hold>>,
}

impl Owner for Writer {
    fn hold(&mut self, layer: Id, point: u64) -> Result<()> {
        self.hold = Some(self.disk.hold_point(layer, point)?);
        Ok(())
    }
    fn let_go(&mut self) {
        self.hold = None;
    }
}

/// What happens while a fork is being made.
struct Meanwhile<F>(Mutex<F>);

impl<F: FnMut(u64) + Send> forkdisk::store::Progress for Meanwhile<F> {
    fn update(&self, done: u64, _: u64) -> bool {
        (self.0.lock().expect("one thread"))(done);
        true
    }
}

fn fork_of<'a>(name: &'a str, number: u64, settings: &'a Extra) -> PastFork<'a> {
    PastFork {
        name,
        from: "d",
        at: At::Number(number),
        size: None,
        settings,
    }
}

/// A disk that is overwritten many times while its past is copied, with a budget in which none of that finds room: the fork is what the disk was
/// then, and the disk is what it would be.
#[test]
fn a_busy_disk_is_forked_as_it_was() {
    let blocks = 9000;
    let mut world = World::new(15, blocks, limits(None, Some(512 * B)));
    for i in 0..blocks / 500 {
        world.write(i * 500 * B, &noise(i, 500 * B));
    }
    world.flush();
    for i in 0..6 {
        world.write(i * 977 * B, &noise(i + 20, 3 * B));
        world.discard((i * 1301 + 7) * B, 2 * B);
        world.flush();
    }
    world.points.retain(|n, _| *n >= 2);
    let disk = world.open();
    let (_, last) = disk.point().expect("writable");
    let number = last - 4;
    let then = world.points[&number].clone();
    let mut now = std::mem::take(&mut world.now);
    let (mut rounds, mut most) = (0, 0);
    let meanwhile = Meanwhile(Mutex::new(|_: u64| {
        for i in 0..8 {
            let at = (rounds * 8 + i) * 31 % (blocks - 20) * B;
            let data = noise(rounds ^ i << 20, 20 * B);
            disk.write(&data, at).expect("write");
            now[at as usize..at as usize + data.len()].copy_from_slice(&data);
            disk.flush().expect("flush");
        }
        disk.maintain().expect("maintain");
        most = most.max(disk.history_bytes());
        rounds += 1;
    }));
    let settings = Extra::default();
    let mut writer = Writer {
        disk: disk.clone(),
        hold: None,
    };
    let made = world.store.create_at_with(
        &fork_of("f", number, &settings),
        Some(&mut writer),
        &meanwhile,
    );
    let made = made.expect("a fork");
    assert!(rounds > 30 && most > 2 * 512 * B, "{rounds}, {most}");
    let fork = world.store.open_disk(&made, false).expect("open");
    same(&read_all(&*fork).expect("read"), &then, number);
    drop(fork);
    assert!(read_all(&*disk).expect("read") == now);
    // Nobody holds it any more: the budget counts again.
    disk.maintain().expect("maintain");
    assert!(disk.history_bytes() <= 514 * B);
    disk.close().expect("close");
    drop((disk, writer));
    world.disk = None;
    audit::layers(&world.sim, "a busy disk");
}

/// What ends the history while it is read ends that: there is no fork, and nothing is left of it. A snapshot and a rewind do not end it.
#[test]
fn a_history_that_ends_while_it_is_read_makes_no_fork() {
    for how in 0..4 {
        let mut world = World::new(16 + how, 1000, limits(Some(1_000_000), None));
        world.write(0, &noise(1, 600 * B));
        let first = world.flush();
        world.write(0, &noise(2, 600 * B));
        let second = world.flush();
        let disk = world.open();
        let store = &world.store;
        store
            .snapshot_running(&disk, "d", "before", None)
            .expect("taken");
        disk.write(&noise(3, 600 * B), 0).expect("write");
        disk.flush().expect("flush");
        let (_, third) = disk.point().expect("writable");
        disk.write(&noise(4, 600 * B), 0).expect("write");
        disk.flush().expect("flush");
        for point in [first, third] {
            let mut done = false;
            let meanwhile = Meanwhile(Mutex::new(|_: u64| {
                if std::mem::replace(&mut done, true) {
                    return;
                }
                let name = format!("s{point}");
                let off = || store.set_history_running(&disk, "d", None);
                match how {
                    0 => drop(
                        store
                            .snapshot_running(&disk, "d", &name, None)
                            .expect("taken"),
                    ),
                    1 => off().expect("off"),
                    2 => drop(store.rollback_running(&disk, "d", "before").expect("back")),
                    _ => drop(
                        store
                            .rewind_running(&disk, "d", At::Number(second))
                            .expect("back"),
                    ),
                }
            }));
            let settings = Extra::default();
            let mut writer = Writer {
                disk: disk.clone(),
                hold: None,
            };
            let fork = fork_of("f", point, &settings);
            let made = store.create_at_with(&fork, Some(&mut writer), &meanwhile);
            if how == 0 || how == 3 {
                let found = read_all(&*store.open_disk(&made.expect("a fork"), false).expect("f"));
                let was = if point == first { 1 } else { 3 };
                assert!(found.expect("read")[..600 * B as usize] == noise(was, 600 * B));
                let plan = store.plan_removal(&["f".to_string()], false);
                store.remove(&plan.expect("a plan")).expect("removed");
                continue;
            }
            assert_eq!(made.expect_err("it ended").kind(), Kind::Busy, "{how}");
            assert_eq!(store.resolve("f").expect_err("none").kind(), Kind::NotFound);
            // What is gone cannot be held.
            let (own, _) = disk.point().expect("writable");
            let held = disk.hold_point(own, point);
            assert!(held.is_err_and(|e| e.kind() == Kind::NotFound));
            break;
        }
        disk.close().expect("close");
        drop(disk);
        world.disk = None;
        let left = world.store.gc(true).expect("gc");
        assert!(left.layers.is_empty() && left.bytes == 0, "{left:?}");
        audit::layers(&world.sim, "ended");
    }
}

/// A disk goes back while it is attached; what is undone can be done again.
#[test]
fn an_attached_disk_goes_back() {
    let mut world = World::new(19, 300, limits(Some(1_000_000), None));
    let mut flushes = Vec::new();
    for i in 0..8 {
        world.write(i * 30 * B, &noise(i, 50 * B));
        world.discard(i * 17 * B, 5 * B);
        flushes.push(world.flush());
    }
    world.write(0, &noise(99, 10 * B));
    let unflushed = world.now.clone();
    let disk = world.open();
    let back = |number| world.store.rewind_running(&disk, "d", At::Number(number));
    back(flushes[2]).expect("back");
    let found = read_all(&*disk).expect("read");
    same(&found, &world.points[&flushes[2]], flushes[2]);
    let points = world.store.history("d").expect("a history").points;
    let last = points[points.len() - 2].number;
    back(last).expect("forth");
    let found = read_all(&*disk).expect("read");
    same(&found, &unflushed, last);
    assert_eq!(back(9999).expect_err("none").kind(), Kind::NotFound);
    disk.write(&noise(7, B), B).expect("it goes on");
    world.now = unflushed;
    world.now[B as usize..2 * B as usize].copy_from_slice(&noise(7, B));
    drop(disk);
    world.flush();
    world.look_back(&mut Rng(19));
}

/// Switched on and off while the disk is in use.
#[test]
fn a_setting_counts_at_once() {
    let mut world = World::new(7, 40, limits(Some(1000), None));
    world.write(0, &[1; 4096]);
    world.flush();
    let running = world.open();
    world.write(B, &[2; 4096]);
    world
        .store
        .set_history_running(&running, "d", None)
        .expect("off");
    world.flush();
    assert_eq!(running.history_bytes(), 0);
    world.write(B, &[3; 4096]);
    world
        .store
        .set_history_running(&running, "d", Some(limits(None, Some(1 << 30))))
        .expect("on");
    let first = world.flush();
    world.write(B, &[4; 4096]);
    let second = world.flush();
    drop(running);
    assert_eq!(world.look_back(&mut Rng(7)), [first, second]);
}

/// A damaged block of the past is an error that names it; the other points, and the present, are not affected.
#[test]
fn damage_of_the_past_stays_there() {
    let mut world = World::new(8, 40, limits(Some(1_000_000), None));
    let mut numbers = vec![];
    for i in 0..4u64 {
        world.write(5 * B, &noise(i, B));
        numbers.push(world.flush());
    }
    world.close();
    let object = world.store.resolve("d").expect("d");
    let file = world
        .store
        .layers_dir()
        .open(&format!("{}.layer", object.id), forkdisk::io::Access::Write)
        .expect("the layer");
    let layer = forkdisk::layer::ReadLayer::open(file.clone()).expect("a layer");
    let mut slots = Vec::new();
    let each = layer.each_step(0, |step| {
        slots.extend(step.slots().map(|slot| (step.sequence, slot)));
        Ok(())
    });
    each.expect("the history");
    drop(layer);
    // What point 2 shows: replaced by commit 3.
    let (_, slot) = slots.iter().find(|s| s.0 == numbers[2]).expect("a block");
    file.write_at(&[0xEE; 100], u64::from(*slot) * B + 50)
        .expect("rot");
    drop(file);
    let damaged = numbers[1];
    let past = world
        .store
        .open_at("d", At::Number(damaged))
        .expect("a point");
    let error = read_all(&*past).expect_err("damage");
    assert_eq!(
        (error.kind(), error.block_lba().map(|l| l.0)),
        (Kind::Corrupt, Some(5))
    );
    drop(past);
    let error = world
        .store
        .rewind("d", At::Number(damaged), &Quiet)
        .expect_err("damage");
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(
        error.to_string().contains(&format!("point #{damaged}")),
        "{error}"
    );
    for number in numbers.iter().filter(|n| **n != damaged) {
        let past = world
            .store
            .open_at("d", At::Number(*number))
            .expect("a point");
        same(
            &read_all(&*past).expect("read"),
            &world.points[number],
            *number,
        );
    }
    let found = read_all(&*world.open()).expect("read");
    same(&found, &world.flushed, 0);
    world.close();
    let options = forkdisk::check::scrub::Options::default();
    let report = forkdisk::check::scrub(&world.store, None, options, &Quiet).expect("scrub");
    assert_eq!(report.corruptions.len(), 1, "{report:?}");
    assert!(report.corruptions[0].message.contains("history"));
    assert!(report.corruptions[0].affected.is_empty());
    let report = forkdisk::check::check(&world.store, None, &Quiet).expect("check");
    assert!(
        report.corruptions.is_empty() && report.leaks.is_empty(),
        "{report:?}"
    );
}

/// A damaged segment takes with it what leads through it, and no more.
#[test]
fn a_damaged_segment_hides_what_is_older() {
    let mut world = World::new(9, 40, limits(Some(1_000_000), None));
    for i in 0..12u64 {
        world.write(i % 4 * B, &noise(i, B));
        world.flush();
        if i % 4 == 3 {
            world.open().checkpoint().expect("checkpoint");
        }
    }
    world.close();
    let object = world.store.resolve("d").expect("d");
    let file = world
        .store
        .layers_dir()
        .open(&format!("{}.layer", object.id), forkdisk::io::Access::Write)
        .expect("the layer");
    let layer = forkdisk::layer::ReadLayer::open(file.clone()).expect("a layer");
    let chain = forkdisk::layer::history::segments(&*file, layer.superblock()).expect("segments");
    assert_eq!(chain.segments.len(), 3);
    drop(layer);
    let at = u64::from(chain.segments[1].slot) * B;
    file.write_at(&[0xEE; 8], at + 120).expect("rot");
    drop(file);
    assert_eq!(world.number(), (8..=12).collect::<Vec<_>>());
    let report = forkdisk::check::check(&world.store, None, &Quiet).expect("check");
    assert_eq!(report.corruptions.len(), 1, "{report:?}");
    for number in 8..=12 {
        let past = world
            .store
            .open_at("d", At::Number(number))
            .expect("a point");
        same(
            &read_all(&*past).expect("read"),
            &world.points[&number],
            number,
        );
    }
    // It lets go of the rest without them.
    world.store.set_history(&["d".into()], None).expect("none");
    let found = read_all(&*world.open()).expect("read");
    same(&found, &world.flushed, 0);
    world.close();
    let report = forkdisk::check::check(&world.store, None, &Quiet).expect("check");
    // What it held cannot be found any more, but by a repair.
    assert!(
        report.corruptions.is_empty() && report.leaks.len() == 1,
        "{report:?}"
    );
}
