//! The crash suite: random histories with the power cut at every operation.
//!
//! A history is some work that ends well, and then a stretch in which the power goes, or the process dies, at each call of the seam in
//! turn. What is left is opened in many shapes (`io::sim::crash`), and must be what the model allows: per disk exactly the last
//! acknowledged flush or the one under way. Then more work, more crashes: during recovery, and after it.
//!
//! `FORKDISK_CRASH_HISTORIES=N` runs more histories, `FORKDISK_CRASH_SEED=S` that one alone, with `FORKDISK_CRASH_CUT=N` at one cut.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::{Op, Reached, Rng, World, audit, random_op};
use forkdisk::io::sim::{FaultKind, Policy, SimDisk, Verb};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Histories of the suite: about a minute on two cores.
const HISTORIES: u64 = 36;
/// Crash points that the suite must have seen.
const ENOUGH: u64 = 20_000;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// A world that has seen some work and is at rest, and the work that follows.
struct History {
    seed: u64,
    start: World,
    ops: Vec<Op>,
    reached: Reached,
}

fn history(seed: u64) -> History {
    let mut rng = Rng(seed.wrapping_mul(0x5851_F42D_4C95_7F2D) ^ 0xC4A5);
    let blocks = match rng.below(10) {
        0 => 1,
        1..=2 => 9,
        3..=7 => 37,
        8 => 600,
        _ => 1100,
    };
    let mut start = World::new(seed, blocks);
    let before = [0, 0, 15, 60][rng.below(4) as usize];
    for _ in 0..before {
        let op = random_op(&mut rng, start.size, true);
        start
            .run(&op)
            .unwrap_or_else(|e| panic!("history {seed}: {op:?}: {e:?}"));
        // Chains and disks in numbers are the model tests' business; here each costs time at every cut.
        if start.disks.len() + start.frozen.len() > 6 {
            thin_out(&mut start);
        }
    }
    start.compare();
    let len = if blocks > 500 { 14 } else { 18 };
    let mut ops: Vec<Op> = (0..len)
        .map(|_| random_op(&mut rng, start.size, true))
        .collect();
    if blocks > 500 {
        let disk = rng.below(8) as usize;
        let len = start.size;
        ops[rng.below(8) as usize] = Op::Discard { disk, at: 0, len };
        ops.insert(rng.below(10) as usize + 4, Op::Flush { disk });
    }
    let mut reached = std::mem::take(&mut start.reached);
    watch(&mut start, seed, &ops, &mut reached);
    History {
        seed,
        start,
        ops,
        reached,
    }
}

/// Removes what can be removed.
fn thin_out(world: &mut World) {
    world.close_all().expect("close");
    for what in (0..12).rev() {
        if world.disks.len() > 1 || what < world.frozen.len() {
            let _ = world.run(&Op::Remove { what });
        }
    }
    if world.disks.is_empty() {
        world.run(&Op::Fork { from: 0 }).expect("a disk");
    }
}

/// Runs the history to its end once, and sees what it reaches.
fn watch(start: &mut World, seed: u64, ops: &[Op], reached: &mut Reached) {
    let mut world = start.copy(seed);
    let mut watch = Watch::default();
    watch.look(&world.sim, reached);
    for op in ops {
        world
            .run(op)
            .unwrap_or_else(|e| panic!("history {seed}: {op:?}: {e:?}"));
        watch.look(&world.sim, reached);
    }
    world.compare();
    reached.add(&world.reached);
    world.close_all().expect("close");
    world.compare();
    world.close_all().expect("close");
    audit::layers(&world.sim, &format!("history {seed}"));
}

/// What is seen of the layer files as a history goes on.
#[derive(Default)]
struct Watch {
    sequences: BTreeMap<String, u64>,
    runs: BTreeMap<String, BTreeSet<u32>>,
    /// Sums of the slots seen, by file.
    slots: BTreeMap<String, BTreeMap<usize, u32>>,
    first_records: BTreeMap<String, Vec<u8>>,
}

impl Watch {
    fn look(&mut self, sim: &SimDisk, reached: &mut Reached) {
        for name in sim.file_names() {
            if !name.ends_with(".layer") {
                continue;
            }
            let bytes = sim.read_file(&name).expect("a file");
            let Some(superblock) = audit::superblock(&bytes) else {
                continue;
            };
            let runs: BTreeSet<u32> = superblock.run_refs().iter().map(|r| r.slot.get()).collect();
            let last = self
                .sequences
                .insert(name.clone(), superblock.sequence.get());
            let old = self
                .runs
                .insert(name.clone(), runs.clone())
                .unwrap_or_default();
            if last.is_some_and(|l| l < superblock.sequence.get()) && old != runs {
                reached.note("checkpoint");
                if old.iter().any(|r| !runs.contains(r)) {
                    reached.note("runs merged");
                }
            }
            let slots = self.slots.entry(name.clone()).or_default();
            for (i, slot) in bytes.chunks(4096).enumerate().skip(1024) {
                if slot.iter().all(|b| *b == 0) {
                    continue;
                }
                let sum = forkdisk::format::crc(slot);
                if slots.insert(i, sum).is_some_and(|old| old != sum) {
                    reached.note("slot reused");
                }
            }
            let first = bytes
                .get(4 * 4096..4 * 4096 + 64)
                .unwrap_or_default()
                .to_vec();
            if first.starts_with(b"FDCOMMIT") {
                let old = self.first_records.insert(name, first.clone());
                if old.is_some_and(|old| old != first) {
                    reached.note("journal wrapped");
                }
            }
        }
    }
}

/// Counts what was tried.
#[derive(Default)]
struct Tried {
    points: AtomicU64,
    cuts: AtomicU64,
}

impl History {
    /// The world when operation `cut` of the stretch failed; `None` if the stretch has fewer.
    fn cut(&mut self, cut: u64) -> Option<World> {
        let mut world = self.start.copy(self.seed ^ cut << 32);
        world.sim.set_garbage_pages(true);
        world.sim.cut_at(cut);
        for op in &self.ops {
            if let Err(e) = world.run(op) {
                assert!(world.sim.is_off(), "{op:?}: {e:?}");
                return Some(world);
            }
            // A hint that failed (giving space back, say) may be swallowed; the next operation will tell.
        }
        // The end of a history is a crash point as well, once.
        world.sim.is_off().then_some(world)
    }

    /// The world when the sync number `nth` of the stretch failed; `None` if the stretch has fewer.
    fn failed_sync(&mut self, nth: u64) -> Option<World> {
        let mut world = self.start.copy(self.seed ^ nth << 32 ^ 0xF5);
        world.sim.set_garbage_pages(true);
        world.sim.fail_nth(Verb::Sync, nth, FaultKind::Eio);
        for op in &self.ops {
            if world.run(op).is_err() {
                world.doubt = true;
                world.sim.clear_faults();
                return Some(world);
            }
        }
        None
    }

    /// Tries `one` at each place 0, 1, 2... until it says that there is none.
    fn each(
        &mut self,
        test: &str,
        only: Option<u64>,
        mut one: impl FnMut(&mut History, u64, &str) -> bool,
    ) {
        for place in only.unwrap_or(0).. {
            let story = format!(
                "FORKDISK_CRASH_SEED={} FORKDISK_CRASH_CUT={place} cargo test --test crash {test}",
                self.seed
            );
            match catch_unwind(AssertUnwindSafe(|| one(self, place, &story))) {
                Ok(true) if only.is_none() => {}
                Ok(_) => return,
                Err(why) => {
                    eprintln!("to repeat it: {story}");
                    std::panic::resume_unwind(why);
                }
            }
        }
    }
}

/// All that is tried with one world that lost its power.
fn shapes(world: &World, seed: u64, story: &str, tried: &Tried) {
    let mut rng = Rng(seed);
    let mut point = || {
        tried.points.fetch_add(1, Ordering::Relaxed);
        rng.next()
    };
    for policy in [Policy::AllDone, Policy::AllDropped] {
        world.check_after(
            &world.sim.crash_with(policy),
            point(),
            &format!("{story} ({policy:?})"),
        );
    }
    for _ in 0..3 {
        let seed = point();
        world.check_after(
            &world.sim.crash(seed),
            seed,
            &format!("{story} (crash {seed})"),
        );
    }
    let seed = point();
    world.check_after(&kill(world, seed), seed, &format!("{story} (kill)"));
    let seed = point();
    during_recovery(
        world,
        &world.sim.crash(seed),
        seed,
        &format!("{story} (crash {seed}, again in recovery)"),
    );
    let seed = point();
    during_recovery(
        world,
        &kill(world, seed),
        seed,
        &format!("{story} (kill, crash {seed} in recovery)"),
    );
    let seed = point();
    after_more_work(
        world,
        &kill(world, seed),
        seed,
        &format!("{story} (kill, work, crash {seed})"),
    );
    let seed = point();
    after_more_work(
        world,
        &world.sim.crash(seed),
        seed,
        &format!("{story} (crash {seed}, work, crash)"),
    );
}

fn kill(world: &World, seed: u64) -> SimDisk {
    world.sim.reseed(seed);
    world.sim.kill()
}

/// The power goes again while what the first crash left is opened.
fn during_recovery(world: &World, left: &SimDisk, seed: u64, story: &str) {
    let mut rng = Rng(seed);
    left.cut_at(left.ops() + rng.below(1 + 12 * (1 + world.disks.len() as u64)));
    match world.revive(left, seed ^ 1, story) {
        Ok(_) => {}
        Err(e) => assert!(left.is_off(), "{story}: {e:?}"),
    }
    let seed = rng.next();
    let again = if rng.below(4) == 0 {
        left.kill()
    } else {
        left.crash(seed)
    };
    world.check_after(&again, seed, story);
}

/// What was left is opened and works for a while, until the power goes.
fn after_more_work(world: &World, left: &SimDisk, seed: u64, story: &str) {
    let mut next = world
        .revive(left, seed ^ 1, story)
        .unwrap_or_else(|e| panic!("{story}: {e:?}"));
    let mut rng = Rng(seed);
    left.cut_at(left.ops() + rng.below(60));
    for _ in 0..12 {
        let op = random_op(&mut rng, next.size, true);
        if let Err(e) = next.run(&op) {
            assert!(left.is_off(), "{story}: {op:?}: {e:?}");
            break;
        }
    }
    let seed = rng.next();
    next.check_after(&left.crash(seed), seed, story);
}

/// Runs `f` on each history, on two threads; after a failure the others end soon.
fn histories(count: u64, f: impl Fn(History, Option<u64>) + Sync) -> bool {
    let one = number("FORKDISK_CRASH_SEED");
    let only = number("FORKDISK_CRASH_CUT");
    let seeds = match one {
        Some(seed) => seed..seed + 1,
        None => 0..number("FORKDISK_CRASH_HISTORIES").unwrap_or(count),
    };
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if let Err(why) = catch_unwind(AssertUnwindSafe(|| f(history(seed), only))) {
                        next.store(seeds.end, Ordering::Relaxed);
                        std::panic::resume_unwind(why);
                    }
                }
            });
        }
    });
    one.is_none() && seeds.end >= count
}

#[test]
fn every_cut_leaves_what_was_acknowledged_or_attempted() {
    let tried = Tried::default();
    let reached = Mutex::new(Reached::default());
    let all = histories(HISTORIES, |mut history, only| {
        reached.lock().expect("reached").add(&history.reached);
        history.each("every_cut", only, |history, cut, story| {
            let Some(world) = history.cut(cut) else {
                return false;
            };
            let seed = history.seed ^ cut.wrapping_mul(0x9E37);
            shapes(&world, seed, story, &tried);
            tried.cuts.fetch_add(1, Ordering::Relaxed);
            true
        });
    });
    let (cuts, points) = (tried.cuts.into_inner(), tried.points.into_inner());
    let reached = reached.into_inner().expect("reached");
    eprintln!("{cuts} cuts, {points} crash points; reached: {reached:#?}");
    if all {
        assert!(points >= ENOUGH, "only {points} crash points");
        for what in [
            "several disks open",
            "snapshot of an open disk",
            "fork of an open disk",
            "fork of what is at rest",
            "discard of a region",
            "checkpoint",
            "runs merged",
            "slot reused",
            "journal wrapped",
            "reopening",
            "removal",
            "gc",
        ] {
            let times = reached.0.get(what).copied().unwrap_or(0);
            assert!(
                times >= 4,
                "the histories reach `{what}` only {times} times"
            );
        }
    }
}

/// A failed sync stops the disk; its process ends, and the next one, on the same running system, finds a page cache that may not tell
/// what is on the disk. Nothing that was acknowledged is lost, then or after a power cut.
#[test]
fn every_failed_sync_loses_nothing() {
    let points = AtomicU64::new(0);
    histories(HISTORIES / 2, |mut history, only| {
        history.each("every_failed_sync", only, |history, nth, story| {
            let Some(world) = history.failed_sync(nth) else {
                return false;
            };
            let mut rng = Rng(history.seed ^ nth.wrapping_mul(0x9E37));
            for _ in 0..3 {
                points.fetch_add(3, Ordering::Relaxed);
                let seed = rng.next();
                world.check_after(&kill(&world, seed), seed, &format!("{story} (kill {seed})"));
                after_more_work(
                    &world,
                    &kill(&world, seed),
                    seed,
                    &format!("{story} (kill, work, crash {seed})"),
                );
                during_recovery(
                    &world,
                    &kill(&world, seed),
                    seed,
                    &format!("{story} (kill, crash {seed} in recovery)"),
                );
            }
            true
        });
    });
    eprintln!("{} crash points after a failed sync", points.into_inner());
}
