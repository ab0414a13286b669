//! The commit, epoch, quiesce and cache code under a scheduler that decides which thread goes on, at every lock, every atomic and every call
//! to the disk.
//!
//! The modules of the core are compiled a second time, against the `sync` of this folder: no feature of the crate, no flag, and nothing
//! of it in a build for use. Two schedulers take turns: one that chooses at random, and PCT (Burckhardt and others, 2010), which
//! finds what takes few, but particular, changes between threads. A scenario that fails prints the command that replays it.
//!
//!     cargo test --test shuttle                                     # about six seconds
//!     FORKDISK_SHUTTLE_SECONDS=300 cargo test --test shuttle        # longer, over all scenarios
//!     FORKDISK_SHUTTLE_SEED=1234 cargo test --test shuttle seals    # one batch of one scenario
#![allow(
    missing_docs,
    dead_code,
    unused_imports,
    reason = "a test, and modules of which it uses a part"
)]

#[path = "../../src/base.rs"]
mod base;
#[path = "../../src/chain.rs"]
mod chain;
#[path = "../../src/disk/mod.rs"]
mod disk;
#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/format/mod.rs"]
mod format;
#[path = "../../src/io/mod.rs"]
mod io;
#[path = "../../src/layer/mod.rs"]
mod layer;
#[path = "../../src/map/mod.rs"]
mod map;
mod rig;
mod scenarios;
mod sync;
mod sys;
#[path = "../../src/units.rs"]
mod units;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, FailurePersistence, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::exit;
use std::time::{Duration, Instant};

/// Schedules of one seed.
const BATCH: usize = 20;
/// Changes of priority that PCT places in one schedule: each seed one of these.
const DEPTHS: [usize; 4] = [3, 4, 5, 6];
/// For all scenarios together.
const SECONDS: f64 = 6.0;

fn batch(seed: u64, scenario: fn()) {
    let mut config = Config::new();
    // Tables of a whole region stand on the stack.
    config.stack_size = 1 << 20;
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::None;
    if seed.is_multiple_of(2) {
        Runner::new(RandomScheduler::new_from_seed(seed, BATCH), config).run(scenario);
    } else {
        let depth = DEPTHS[(seed / 2) as usize % DEPTHS.len()];
        Runner::new(PctScheduler::new_from_seed(seed, depth, BATCH), config).run(scenario);
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|w| w == "--list") {
        for (name, _) in scenarios::ALL {
            println!("{name}: test");
        }
        return;
    }
    let filters: Vec<&String> = words.iter().filter(|w| !w.starts_with('-')).collect();
    let chosen: Vec<_> = scenarios::ALL
        .iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str())))
        .collect();
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<f64>().unwrap_or_else(|_| {
            eprintln!("{name} is no number: {text}");
            exit(2);
        }))
    };
    let only = number("FORKDISK_SHUTTLE_SEED").map(|s| s as u64);
    let seconds = number("FORKDISK_SHUTTLE_SECONDS").unwrap_or(SECONDS);
    println!("\nrunning {} scenarios", chosen.len());
    let mut total = 0;
    let begun = Instant::now();
    for (i, &&(name, scenario)) in chosen.iter().enumerate() {
        // What the ones before did not use is for those that follow.
        let left = Duration::from_secs_f64(seconds).saturating_sub(begun.elapsed());
        let end = Instant::now() + left / (chosen.len() - i) as u32;
        let mut seed = only.unwrap_or(0);
        let mut schedules = 0;
        loop {
            if catch_unwind(AssertUnwindSafe(|| batch(seed, scenario))).is_err() {
                eprintln!("\n{name} FAILED after {schedules} schedules; replay:");
                eprintln!("  FORKDISK_SHUTTLE_SEED={seed} cargo test --test shuttle {name}");
                exit(101);
            }
            schedules += BATCH;
            seed += 1;
            if only.is_some() || Instant::now() >= end {
                break;
            }
        }
        total += schedules;
        println!("scenario {name} ... ok ({schedules} schedules)");
    }
    println!(
        "\nresult: ok. {} scenarios, {total} schedules, {:.1} s\n",
        chosen.len(),
        begun.elapsed().as_secs_f64()
    );
}
