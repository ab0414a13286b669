//! What each operation on disks and snapshots takes: on a disk with little of its own and on one with a hundred times as much, at rest and while it is
//! open. What should not depend on the size has a ratio about 1; what reads or copies the content is told by itself.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, measuring, median, noise, rounds};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::store::history::{At, Limits};
use forkdisk::store::{Effort, Quiet, QuotaChange, Store, write_stream};
use forkdisk::units::{BLOCK, BLOCK_SIZE};
use std::sync::Arc;
use std::time::Instant;

/// Bytes of the base, and of each disk.
const SIZE: u64 = 1 << 30;
/// Flush points that are kept, of ten blocks each.
const POINTS: u64 = 100;

/// The milliseconds that were measured: by operation, then by size of the disk.
struct Times {
    sizes: usize,
    rows: Vec<(&'static str, Vec<Vec<f64>>)>,
    size: usize,
}

impl Times {
    /// Does the work, and keeps how long it took.
    fn of<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        let took = start.elapsed().as_secs_f64() * 1e3;
        let row = match self.rows.iter().position(|(name, _)| *name == what) {
            Some(row) => row,
            None => {
                self.rows.push((what, vec![Vec::new(); self.sizes]));
                self.rows.len() - 1
            }
        };
        self.rows[row].1[self.size].push(took);
        done
    }
    fn print(self) {
        for (what, sizes) in self.rows {
            let medians: Vec<f64> = sizes.into_iter().map(median).collect();
            let (first, last) = (medians[0], medians[medians.len() - 1]);
            println!(
                "{what:<44} {first:>9.2} {last:>9.2} ms {:>8.2}",
                last / first
            );
        }
    }
}

fn open(store: &Store, name: &str) -> Arc<CowDisk> {
    let object = store.resolve(name).expect("there");
    store.open_cow(&object, true).expect("opened")
}

fn remove(store: &Store, name: &str) {
    let plan = store.plan_removal(&one(name), false).expect("planned");
    store.remove(&plan).expect("removed");
}

fn limits() -> Option<Limits> {
    Some(Limits {
        window: Some(3600),
        bytes: None,
    })
}

/// Ten blocks and a flush, again and again.
fn points(disk: &CowDisk, rng: &mut Rng) {
    for _ in 0..if measuring() { POINTS } else { 3 } {
        for _ in 0..10 {
            let at = rng.below(SIZE / BLOCK) * BLOCK;
            disk.write(&[9; BLOCK_SIZE], at).expect("written");
        }
        disk.flush().expect("flushed");
    }
}

/// The number of a flush point in the middle of the history.
fn middle(store: &Store, disk: &str) -> At {
    let known = store.history(disk).expect("known").points;
    At::Number(known[known.len() / 2].number)
}

fn one(name: &str) -> [String; 1] {
    [name.to_string()]
}

fn life(store: &Store, blocks: usize, seed: u64, times: &mut Times) {
    let mut rng = Rng(seed);
    store.create(&one("d"), "base", None).expect("created");
    let disk = open(store, "d");
    for at in rng.distinct(blocks, SIZE / BLOCK) {
        disk.write(&noise(BLOCK_SIZE, seed ^ at), at * BLOCK)
            .expect("written");
    }
    disk.close().expect("closed");
    drop(disk);

    at_rest(store, &mut rng, times);
    while_open(store, &mut rng, times);
    of_the_content(store, times);

    for name in ["d@s", "d", "f", "g", "p", "i", "flat"] {
        remove(store, name);
    }
    store.gc(false).expect("collected");
}

fn at_rest(store: &Store, rng: &mut Rng, times: &mut Times) {
    times.of("snapshot", || store.snapshot("d", "s", None).expect("made"));
    times.of("fork of the disk", || {
        store.create(&one("f"), "d", None).expect("created")
    });
    times.of("commit", || store.commit("d", "i", None).expect("made"));
    times.of("rename", || store.rename("d", "e").expect("renamed"));
    store.rename("e", "d").expect("renamed");
    times.of("resize, larger", || {
        store.resize("d", SIZE + (64 << 20)).expect("resized")
    });
    times.of("a quota", || {
        let change = QuotaChange {
            bytes: Some(Some(SIZE)),
            waits: None,
        };
        store.set_quota("d", change, None).expect("set")
    });
    times.of("a history", || {
        store.set_history(&one("d"), limits()).expect("set")
    });
    let disk = open(store, "d");
    points(&disk, rng);
    disk.close().expect("closed");
    drop(disk);
    let at = middle(store, "d");
    times.of("fork of a flush point", || {
        store.create_at("p", "d", at, None, &Quiet).expect("made")
    });
    times.of("rewind", || store.rewind("d", at, &Quiet).expect("rewound"));
    times.of("rollback", || {
        store.rollback("d", "s").expect("rolled back")
    });
}

fn while_open(store: &Store, rng: &mut Rng, times: &mut Times) {
    let disk = open(store, "d");
    points(&disk, rng);
    times.of("snapshot, open", || {
        store.snapshot_running(&disk, "d", "t", None).expect("made")
    });
    times.of("fork, open", || {
        let made = store.create_from_running(&disk, "d", &one("g"), None);
        made.expect("created")
    });
    points(&disk, rng);
    times.of("commit, open", || {
        store.commit_running(&disk, "d", "j", None).expect("made")
    });
    times.of("resize, larger, open", || {
        let size = disk.size() + (64 << 20);
        store.resize_running(&disk, "d", size).expect("resized")
    });
    store
        .set_history_running(&disk, "d", limits())
        .expect("set");
    points(&disk, rng);
    let at = middle(store, "d");
    times.of("rewind, open", || {
        store.rewind_running(&disk, "d", at).expect("rewound")
    });
    times.of("rollback, open", || {
        store
            .rollback_running(&disk, "d", "t")
            .expect("rolled back")
    });
    disk.close().expect("closed");
    drop(disk);
    times.of("removing an image", || remove(store, "j"));
    // Blocks that only it showed go; those that its disks see stay, and nothing is copied.
    times.of("removing a snapshot in the middle", || remove(store, "d@t"));
    times.of("gc that finds nothing", || {
        store.gc(false).expect("collected")
    });
}

fn of_the_content(store: &Store, times: &mut Times) {
    let image = store.resolve("i").expect("there");
    times.of("digest, the first time (reads the content)", || {
        store.digest(&image, Effort::ANY, &Quiet).expect("known")
    });
    let image = store.resolve("i").expect("there");
    times.of("digest", || {
        store.digest(&image, Effort::ANY, &Quiet).expect("known")
    });
    times.of("stream of all (reads the content)", || {
        let state = store.state(&image).expect("opened");
        write_stream(&state, None, None, &mut |_| Ok(()), &Quiet).expect("written")
    });
    times.of("squash of two layers (copies what they hold)", || {
        let plan = store.plan_squash("d", true).expect("planned");
        assert!(store.squash(plan, &Quiet).expect("squashed").copied > 0);
    });
    store.create(&one("flat"), "i", None).expect("created");
    times.of("flatten (copies the content)", || {
        store.seal("flat").expect("sealed");
        store.flatten("flat", &Quiet).expect("flattened")
    });
}

fn main() {
    let sizes = match measuring() {
        true => [1_000, 100_000],
        false => [10, 40],
    };
    let world = World::new(if measuring() { SIZE as usize } else { 1 << 20 });
    let mut times = Times {
        sizes: sizes.len(),
        rows: Vec::new(),
        size: 0,
    };
    for round in 0..rounds(5) {
        for (size, blocks) in sizes.into_iter().enumerate() {
            times.size = size;
            life(&world.store, blocks, round as u64 + 1, &mut times);
        }
    }
    println!(
        "{:<44} {:>9} {:>9}      ratio",
        "blocks of the disk's own", sizes[0], sizes[1]
    );
    times.print();
}
