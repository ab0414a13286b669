//! The crash suite: random histories with the power cut at every operation, every sync failing, and any call failing.
//!
//! A history is some work that ends well, and then a stretch in which the trouble comes. What is left is opened in many shapes
//! (`io::sim::crash`), and must be what the model allows: per disk exactly the last acknowledged flush or one under way. Then more work,
//! more crashes: during recovery, during recovery from that, and after it; and rot.
//!
//! A history that fails is made smaller, and printed with the command that repeats it.
//!
//! | variable | meaning |
//! |---|---|
//! | `FORKDISK_CRASH_SEED=S` | the history S alone; of a campaign the first one |
//! | `FORKDISK_CRASH_CUT=N` | at place N only |
//! | `FORKDISK_CRASH_OPS=TEXT` | these operations instead of those of the seed |
//! | `FORKDISK_CRASH_SHRINK=T` | seconds for making a failing history smaller (20) |
//! | `FORKDISK_CRASH_HISTORIES=N`, `_SECONDS=T`, `_JOBS=J`, `_PROGRESS=1`, `_SUMMARY=FILE` | the campaign of `tools/crash` |
#![allow(missing_docs, reason = "a test")]

#[path = "../common/mod.rs"]
mod common;
mod ends;
mod figures;
mod history;
mod shrink;
mod watch;

use common::{Op, World};
use figures::{AGAIN, Figures, HISTORIES, POINTS, ROTTEN, SHAPES};
use history::{History, Plan, Trouble};
use shrink::{Failure, NOWHERE, first_failure, quietly, shrink};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Histories of the suite, about a minute on two cores.
const CUT_HISTORIES: u64 = 26;
const SYNC_HISTORIES: u64 = 8;
const FAILING_HISTORIES: u64 = 18;
/// Seeds with which each history is tried that failed once.
const SEEDS: u64 = 4;
/// Shapes that the suite must have opened.
const ENOUGH: u64 = 20_000;

fn text(name: &str) -> Option<String> {
    std::env::var(name).ok()
}
fn number(name: &str) -> Option<u64> {
    let text = text(name)?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// What is to be done.
struct Campaign {
    troubles: Vec<Trouble>,
    first: u64,
    histories: u64,
    until: Option<Instant>,
    jobs: u64,
    progress: bool,
}

impl Trouble {
    fn test(self) -> &'static str {
        match self {
            Trouble::Cut => "every_cut",
            Trouble::FailedSync => "every_failed_sync",
            Trouble::Failing => "failing_calls",
        }
    }
}

/// One history of a test, or the one that the environment asks for.
fn suite(trouble: Trouble, histories: u64) -> (Figures, bool) {
    let one = number("FORKDISK_CRASH_SEED");
    let campaign = Campaign {
        troubles: vec![trouble],
        first: one.unwrap_or(0),
        histories: one.map_or(histories, |_| 1),
        until: None,
        jobs: 2,
        progress: false,
    };
    let began = Instant::now();
    let (figures, failed) = campaign.run(number("FORKDISK_CRASH_CUT"));
    eprintln!("{}", figures.text(began.elapsed()));
    assert!(failed.is_none(), "{}", failed.unwrap_or_default());
    (figures, one.is_none())
}

impl Campaign {
    /// Runs it; returns the report of a failure, if there was one. After that the other threads end soon.
    fn run(&self, only: Option<u64>) -> (Figures, Option<String>) {
        let figures = Figures::default();
        let next = AtomicU64::new(self.first);
        let stop = AtomicBool::new(false);
        let failed = std::sync::Mutex::new(None::<String>);
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        let late = self.until.is_some_and(|until| Instant::now() > until);
                        let over = seed - self.first >= self.histories || late;
                        if over || stop.load(Ordering::Relaxed) {
                            return;
                        }
                        if let Some((trouble, failure)) = self.history(seed, only, &figures, &stop)
                        {
                            let first = !stop.swap(true, Ordering::Relaxed);
                            if first {
                                let given = text("FORKDISK_CRASH_OPS").is_some();
                                let report = report(trouble, failure, given);
                                *failed.lock().expect("nobody panics with it") = Some(report);
                            }
                            return;
                        }
                        figures.count(HISTORIES);
                        if self.progress {
                            let (n, points) = (figures.of(HISTORIES), figures.of(POINTS));
                            eprint!(
                                "\r   {n} histories, {points} crash points, {} shapes ",
                                figures.of(SHAPES)
                            );
                        }
                    }
                });
            }
        });
        if self.progress {
            eprintln!();
        }
        let failed = failed.into_inner().expect("all threads have ended");
        (figures, failed)
    }
    /// One history with all its troubles.
    fn history(
        &self,
        seed: u64,
        only: Option<u64>,
        figures: &Figures,
        stop: &AtomicBool,
    ) -> Option<(Trouble, Failure)> {
        let plan = match text("FORKDISK_CRASH_OPS") {
            None => Plan::random(seed),
            Some(text) => Plan::parse(seed, &text).unwrap_or_else(|e| panic!("{e}")),
        };
        self.planned(plan, only, figures, stop)
    }
    fn planned(
        &self,
        plan: Plan,
        only: Option<u64>,
        figures: &Figures,
        stop: &AtomicBool,
    ) -> Option<(Trouble, Failure)> {
        let seed = plan.seed;
        let fails = |trouble, place, why| {
            let plan = plan.clone();
            Some((trouble, Failure { plan, place, why }))
        };
        let made = quietly(AssertUnwindSafe(|| History::new(plan.clone(), figures)));
        let mut history = match made {
            Ok(history) => history,
            Err(why) => return fails(self.troubles[0], NOWHERE, why),
        };
        for &trouble in &self.troubles {
            for place in only.unwrap_or(0).. {
                let story = format!("history {seed}, {} at {place}", trouble.test());
                let under_way = ends::begin(format!(
                    "{story}: FORKDISK_CRASH_SEED={seed} FORKDISK_CRASH_CUT={place}"
                ));
                let tried = quietly(AssertUnwindSafe(|| {
                    history.try_at(trouble, place, &story, figures)
                }));
                drop(under_way);
                match tried {
                    Ok(true) if only.is_none() && !stop.load(Ordering::Relaxed) => {}
                    Ok(_) => break,
                    Err(why) => return fails(trouble, place, why),
                }
            }
        }
        None
    }
}

/// What is said of a failure: as it was found, and as small as it could be made.
fn report(trouble: Trouble, failure: Failure, given: bool) -> String {
    let repeat = |failure: &Failure, ops: bool| {
        let Failure { plan, place, .. } = failure;
        let ops = match ops {
            true => format!("FORKDISK_CRASH_OPS='{}' ", plan.text()),
            false => String::new(),
        };
        let cut = match *place {
            NOWHERE => String::new(),
            place => format!("FORKDISK_CRASH_CUT={place} "),
        };
        format!(
            "FORKDISK_CRASH_SEED={} {ops}{cut}cargo test --test crash {}",
            plan.seed,
            trouble.test()
        )
    };
    let mut said = format!(
        "{}\n   to repeat it: {}\n",
        failure.why,
        repeat(&failure, given)
    );
    let seconds = number("FORKDISK_CRASH_SHRINK").unwrap_or(20);
    if seconds == 0 {
        return said;
    }
    let began = Instant::now();
    let of = failure.plan.before.len() + failure.plan.stretch.len();
    let nowhere = Figures::default();
    let (small, tried) = shrink(failure, Duration::from_secs(seconds), |plan, until| {
        first_failure(plan, trouble, &nowhere, until)
    });
    let took = began.elapsed().as_secs_f64();
    let left = small.plan.before.len() + small.plan.stretch.len();
    said += &format!(
        "\nof {of} operations, {left} do as well ({tried} histories tried in {took:.1} s); a disk has {} blocks\n",
        small.plan.blocks
    );
    for (part, ops) in [
        ("before", &small.plan.before),
        ("stretch", &small.plan.stretch),
    ] {
        for (i, op) in ops.iter().enumerate() {
            said += &format!("   {:8} {op}\n", if i == 0 { part } else { "" });
        }
    }
    let made = quietly(AssertUnwindSafe(|| {
        History::new(small.plan.clone(), &nowhere)
    }));
    if let Ok(mut history) = made
        && small.place != NOWHERE
    {
        let trace = history.trace(trouble, small.place);
        let skipped = trace.len().saturating_sub(12);
        if !trace.is_empty() {
            said += "what the disk was asked, to the end:\n";
        }
        for (i, line) in trace.iter().enumerate().skip(skipped) {
            let here = trouble == Trouble::Cut && i as u64 == small.place;
            said += &format!(
                "   {i:4}  {line}{}\n",
                if here { "   <- the power goes" } else { "" }
            );
        }
    }
    said += &format!("{}\n   to repeat it: {}\n", small.why, repeat(&small, true));
    said
}

#[test]
fn every_cut_leaves_what_was_acknowledged_or_attempted() {
    let (figures, all) = suite(Trouble::Cut, CUT_HISTORIES);
    if !all {
        return;
    }
    let shapes = figures.of(SHAPES);
    assert!(shapes >= ENOUGH, "only {shapes} crash points");
    for what in [
        "several disks open",
        "snapshot of an open disk",
        "commit of an open disk",
        "fork of an open disk",
        "fork of what is at rest",
        "fork of a snapshot",
        "discard",
        "discard of a region",
        "zeros written",
        "writes in the middle of a flush",
        "checkpoint",
        "runs merged",
        "slot reused",
        "journal wrapped",
        "reopening",
        "renaming",
        "rollback of an open disk",
        "rollback at rest",
        "snapshot of a disk open for reading",
        "growing",
        "shrinking",
        "snapshots of two disks",
        "removal",
        "squash",
        "flattening",
        "removal of what others stand on",
        "blocks that nobody sees given back",
        "import",
        "gc",
        "history kept",
    ] {
        let times = figures.times_reached(what);
        assert!(times >= 3, "`{what}` is reached only {times} times");
    }
    for what in [
        "un-synced writes done",
        "un-synced writes dropped",
        "un-synced writes torn",
        "sectors with garbage",
        "lengths lost or cut",
        "holes and reservations lost or cut",
        "changes of names lost",
        "processes killed",
        "rot",
    ] {
        let times = figures.times_harmed(what);
        assert!(times >= 100, "`{what}` is done only {times} times");
    }
    let again = figures.of(AGAIN);
    assert!(again >= 1000, "only {again} recoveries were cut");
    let rotten = figures.of(ROTTEN);
    assert!(rotten >= 1000, "only {rotten} shapes rotted");
}

/// A failed sync stops the disk; its process ends, and the next one, on the same running system, finds a page cache that may not tell
/// what is on the disk. Nothing that was acknowledged is lost, then or after a power cut.
#[test]
fn every_failed_sync_loses_nothing() {
    suite(Trouble::FailedSync, SYNC_HISTORIES);
}

/// Any call fails, once or several in a row, or the disk is full for a while. The work goes on as far as it can; then the power goes.
/// Nothing that was acknowledged is lost, and nothing changes but what was asked for.
#[test]
fn failing_calls_lose_nothing() {
    let (figures, all) = suite(Trouble::Failing, FAILING_HISTORIES);
    if !all {
        return;
    }
    for what in [
        "EIO",
        "ENOSPC",
        "syncs failed",
        "syncs of names failed",
        "disk found full",
    ] {
        let times = figures.times_harmed(what);
        assert!(times >= 4, "`{what}` strikes only {times} times");
    }
    let back = figures.times_reached("stopped and opened again");
    assert!(back >= 10, "only {back} disks stopped and came back");
}

/// Histories that failed once, as small as they became: where the trouble comes, and how the power cut leaves things, differs from seed to seed.
#[test]
fn what_failed_once_does_not_fail_again() {
    const HISTORIES: [(&str, &str); 1] = [(
        "a flattening that a power cut undoes after the disk above was opened",
        "1 blocks | snapshot 0; write 0 23348+512 seed 7; snapshot 0; write 0 0+4096 seed 1 | remove 5; flatten 0",
    )];
    let campaign = Campaign {
        troubles: vec![Trouble::Cut],
        first: 0,
        histories: 0,
        until: None,
        jobs: 1,
        progress: false,
    };
    for (what, ops) in HISTORIES {
        for seed in 0..SEEDS {
            let plan = Plan::parse(seed, ops).expect("a plan");
            let failed = campaign.planned(plan, None, &Figures::default(), &AtomicBool::new(false));
            if let Some((trouble, failure)) = failed {
                panic!("{what}: {}", report(trouble, failure, true));
            }
        }
    }
}

/// What `tools/crash` runs, as long as one likes. Without its variables: that it does what it is asked, and counts it.
#[test]
fn campaign() {
    let seconds = number("FORKDISK_CRASH_SECONDS");
    let histories = number("FORKDISK_CRASH_HISTORIES");
    let asked = seconds.is_some() || histories.is_some();
    if !asked && number("FORKDISK_CRASH_SEED").is_some() {
        return;
    }
    let began = Instant::now();
    let campaign = Campaign {
        troubles: vec![Trouble::Cut, Trouble::FailedSync, Trouble::Failing],
        // Without variables: a short one.
        first: number("FORKDISK_CRASH_SEED").unwrap_or(3),
        histories: histories.unwrap_or(if asked { u64::MAX } else { 1 }),
        until: seconds.map(|s| began + Duration::from_secs(s)),
        jobs: number("FORKDISK_CRASH_JOBS").unwrap_or(1).clamp(1, 256),
        progress: number("FORKDISK_CRASH_PROGRESS").is_some(),
    };
    let (figures, failed) = campaign.run(number("FORKDISK_CRASH_CUT"));
    let took = began.elapsed();
    let json = figures.json(took, failed.is_none());
    if let Some(path) = text("FORKDISK_CRASH_SUMMARY") {
        std::fs::write(&path, format!("{json}\n")).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    println!("{}", figures.text(took));
    assert!(failed.is_none(), "{}", failed.unwrap_or_default());
    let told: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(told["schema"], 1);
    assert_eq!(told["passed"], true);
    assert_eq!(told["histories"], figures.of(HISTORIES));
    assert_eq!(told["crash_points"], figures.of(POINTS));
    if !asked {
        assert_eq!(told["histories"], 1);
        for what in ["shapes_opened", "recoveries_cut_again", "shapes_with_rot"] {
            assert!(told[what].as_u64() >= Some(50), "{what}: {told}");
        }
        assert!(told["faults"]["EIO"].as_u64() >= Some(1), "{told}");
    }
}

/// The oracle knows each flush from every other state: one too old, one too new, and any mixture is refused.
#[test]
fn the_oracle_has_both_bounds() {
    let mut world = World::new(1, 9);
    let write = |at, seed| Op::Write {
        disk: 0,
        at,
        len: 2 * 4096,
        seed,
    };
    let mut states = vec![world.disks["d1"].now.clone()];
    for (at, seed) in [(0, 1), (4096, 2), (8192, 3)] {
        world.run(&write(at, seed)).expect("write");
        world.run(&Op::Flush { disk: 0 }).expect("flush");
        states.push(world.disks["d1"].now.clone());
    }
    world.run(&write(4096, 4)).expect("write");
    world.sim.cut_at(world.sim.ops() + 1);
    world
        .run(&Op::Flush { disk: 0 })
        .expect_err("the power goes in the flush");
    states.push(world.disks["d1"].now.clone());
    let verdict = |found: &[u8]| world.verdict("d1", found).is_ok();
    let ok: Vec<bool> = states.iter().map(|s| verdict(s)).collect();
    assert_eq!(
        ok,
        [false, false, false, true, true],
        "the last flush, and the one under way"
    );
    // Something that was written and never flushed.
    let mut late = states[4].to_vec();
    late[..4096].fill(9);
    assert!(!verdict(&late), "later than what was attempted");
    let (last, attempted) = (&states[3], &states[4]);
    let unlike: Vec<usize> = (0..9 * 8)
        .filter(|s| last[s * 512..][..512] != attempted[s * 512..][..512])
        .collect();
    assert_eq!(unlike.len(), 16, "two blocks differ, in each sector");
    for sector in unlike {
        let mut mixed = last.to_vec();
        mixed[sector * 512..][..512].copy_from_slice(&attempted[sector * 512..][..512]);
        assert!(
            !verdict(&mixed),
            "sector {sector} of the attempt in the last flush"
        );
        let mut mixed = attempted.to_vec();
        mixed[sector * 512..][..512].copy_from_slice(&last[sector * 512..][..512]);
        assert!(
            !verdict(&mixed),
            "sector {sector} of the last flush in the attempt"
        );
    }
    // What stands still may not change at all.
    let image = world.frozen[common::IMAGE].clone();
    assert!(world.verdict(common::IMAGE, &image).is_ok());
    let mut changed = Arc::unwrap_or_clone(image);
    changed[5 * 4096] ^= 1;
    assert!(world.verdict(common::IMAGE, &changed).is_err());
}

/// What is printed of a history is read as the same history.
#[test]
fn a_history_is_written_as_it_is_read() {
    for seed in 0..200 {
        let plan = Plan::random(seed);
        assert_eq!(Plan::parse(seed, &plan.text()), Ok(plan));
    }
    for bad in [
        "",
        "9 blocks | |",
        "9 blocks | | fly 3",
        "9 blocks | | write 0",
        "x | | gc",
    ] {
        let parsed = Plan::parse(0, bad);
        assert!(
            parsed.is_err() || bad == "9 blocks | |",
            "{bad}: {parsed:?}"
        );
    }
}

/// Of a history that fails because of two of its operations these two are left, and they are as simple as they can be.
#[test]
fn a_failing_history_becomes_small() {
    let guilty = |plan: &Plan, _: Instant| {
        let discard = plan
            .before
            .iter()
            .position(|op| matches!(op, Op::Discard { .. }))?;
        let write = |op: &Op| matches!(op, Op::Write { len, .. } if *len >= 512);
        let place = plan.stretch.iter().position(write)? as u64;
        Some(Failure {
            plan: plan.clone(),
            place,
            why: format!(
                "history {} at {place} (after {discard}): d{place} is lost",
                plan.seed
            ),
        })
    };
    let mut seen = 0;
    for seed in 0..100 {
        let plan = Plan::random(seed);
        let Some(failure) = guilty(&plan, Instant::now()) else {
            continue;
        };
        let (small, _) = shrink(failure, Duration::from_secs(20), guilty);
        let text = small.plan.text();
        let expected = "1 blocks | discard 0 0+4096 | write 0 0+4096 seed ";
        assert!(text.starts_with(expected), "{text}, of {plan:?}");
        assert_eq!(small.place, 0);
        seen += 1;
    }
    assert!(seen >= 20, "only {seen} histories");
}
