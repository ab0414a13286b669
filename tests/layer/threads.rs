//! Many threads on one disk, against a model of each block.
//!
//! A block is two halves, each with an owner that writes rising versions into it: a lost half, a torn half or one that goes back in time is
//! seen by readers at once, and in the end, and in snapshots that are taken meanwhile.

use super::*;
use crate::common::Rng;
use crate::hooked::Hooked;
use forkdisk::io::sim::Policy;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

const BLOCKS: u64 = 24;
const HALF: usize = 2048;

/// What a half holds: its version, all over.
fn half(version: u64) -> [u8; HALF] {
    let mut half = [0; HALF];
    if version > 0 {
        half.chunks_mut(8)
            .for_each(|c| c.copy_from_slice(&version.to_le_bytes()));
    }
    half
}
fn version(half: &[u8]) -> u64 {
    let first = u64::from_le_bytes(half[..8].try_into().expect("eight bytes"));
    assert!(
        half.chunks(8).all(|c| c == first.to_le_bytes()),
        "torn: {:?}",
        half.chunks(8)
            .map(|c| u64::from_le_bytes(c.try_into().expect("eight bytes")))
            .fold(Vec::new(), |mut all: Vec<u64>, v| {
                if !all.contains(&v) {
                    all.push(v);
                }
                all
            })
    );
    first
}

/// For each half: the newest version that was written and returned, and the newest that was begun.
struct Model {
    done: Vec<AtomicU64>,
    begun: Vec<AtomicU64>,
}

impl Model {
    fn new() -> Model {
        let all = || (0..2 * BLOCKS).map(|_| AtomicU64::new(0)).collect();
        Model {
            done: all(),
            begun: all(),
        }
    }
    fn now(of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|v| v.load(SeqCst)).collect()
    }
    /// Every half of `disk` must be at least `low` and at most what was begun by now.
    fn check(&self, disk: &dyn Disk, low: &[u64], story: &str) {
        for n in 0..BLOCKS {
            let block = block(disk, n);
            for h in 0..2 {
                let found = version(&block[h * HALF..(h + 1) * HALF]);
                let i = 2 * n as usize + h;
                let high = self.begun[i].load(SeqCst);
                assert!(
                    (low[i]..=high).contains(&found),
                    "{story}: block {n}, half {h}: version {found} is not in {}..={high}",
                    low[i]
                );
            }
        }
    }
}

/// Stops the others when it goes, in a panic as well.
struct Stop<'a>(&'a AtomicBool);
impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn storm(store: &Store, disk: &CowDisk, rounds: u64, snapshots: u64) -> Model {
    let model = Model::new();
    let stop = AtomicBool::new(false);
    let whole = AtomicU64::new(0);
    std::thread::scope(|scope| {
        // Two writers for each parity of block, one for each half; both parities sometimes write whole stretches of their half.
        let mut writers = Vec::new();
        for h in 0..2usize {
            for part in 0..2u64 {
                let model = &model;
                writers.push(scope.spawn(move || {
                    let mut rng = Rng(h as u64 * 2 + part);
                    for _ in 0..rounds {
                        let n = rng.below(BLOCKS / 2) * 2 + part;
                        let i = 2 * n as usize + h;
                        let next = model.begun[i].fetch_add(1, SeqCst) + 1;
                        disk.write(&half(next), n * B + (h * HALF) as u64)
                            .expect("write");
                        model.done[i].store(next, SeqCst);
                    }
                }));
            }
        }
        for seed in 0..2 {
            let (model, stop) = (&model, &stop);
            scope.spawn(move || {
                let _stop = Stop(stop);
                let mut rng = Rng(100 + seed);
                while !stop.load(SeqCst) {
                    let low = Model::now(&model.done);
                    match rng.below(3) {
                        0 => model.check(disk, &low, "a reader"),
                        _ => disk.flush().expect("flush"),
                    }
                    if rng.below(20) == 0 {
                        disk.checkpoint().expect("checkpoint");
                        disk.maintain().expect("maintain");
                    }
                }
            });
        }
        // A region of its own is written as a whole and discarded as a whole: readers see one or the other, never what lies below.
        let (stop, model, whole) = (&stop, &model, &whole);
        scope.spawn(move || {
            let _stop = Stop(stop);
            for round in 1.. {
                if stop.load(SeqCst) {
                    break;
                }
                disk.write(&[(round % 200) as u8 + 1; 4096], 512 * B)
                    .expect("write");
                whole.store(round, SeqCst);
                disk.discard(512 * B, 512 * B).expect("discard");
            }
        });
        scope.spawn(move || {
            let _stop = Stop(stop);
            while !stop.load(SeqCst) {
                let first = whole.load(SeqCst);
                let found = block(disk, 512);
                assert!(found.iter().all(|b| *b == found[0]), "torn");
                // The image holds 255 there.
                assert!(
                    found[0] != 255 || first == 0,
                    "what lies below a discarded block is seen"
                );
                for extent in disk.extents(512 * B, B).expect("extents") {
                    let base = matches!(extent.from, forkdisk::disk::Source::Base);
                    assert!(
                        !base || first == 0,
                        "an extent of what lies below a discarded block"
                    );
                }
            }
        });
        for n in 0..snapshots {
            let low = Model::now(&model.done);
            let name = format!("s{n}");
            store
                .snapshot_running(disk, "d", &name, None)
                .expect("snapshot");
            let snap = store.resolve(&format!("d@{name}")).expect("snapshot");
            let snap = store.open_disk(&snap, false).expect("snapshot");
            model.check(&*snap, &low, &name);
            let before = common::read_all(&*snap).expect("read");
            std::thread::yield_now();
            assert!(
                common::read_all(&*snap).expect("read") == before,
                "a snapshot changed"
            );
        }
        for writer in writers {
            writer.join().expect("a writer");
        }
        stop.store(true, SeqCst);
    });
    let last = Model::now(&model.begun);
    assert_eq!(last, Model::now(&model.done));
    model.check(disk, &last, "the end");
    model
}

fn image() -> Vec<u8> {
    let mut image = vec![0; 1100 * 4096];
    image[512 * 4096..].fill(255);
    image
}

#[test]
fn no_half_is_lost_and_none_is_torn() {
    for seed in 0..3 {
        let sim = SimDisk::new(seed);
        let store = store_with(&sim, &image());
        let disk = open(&store, "d").expect("d");
        let model = storm(&store, &disk, 1500, 5);
        disk.flush().expect("flush");
        let last = Model::now(&model.done);
        let left = again(&sim.crash_with(Policy::AllDropped), 3);
        let disk = open(&left, "d").expect("d");
        model.check(&*disk, &last, "after a power cut");
    }
}

/// The same on the real disk, where threads really run side by side.
#[test]
fn no_half_is_lost_on_the_real_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::init(&dir.path().join("store")).expect("a store");
    let image = image();
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .expect("import");
    fork(&store, "image", "d", None);
    let disk = open(&store, "d").expect("d");
    let model = storm(&store, &disk, 3000, 5);
    disk.close().expect("close");
    drop(disk);
    let disk = open(&store, "d").expect("d");
    model.check(&*disk, &Model::now(&model.done), "reopened");
}

/// Whatever was acknowledged to any thread is there after the power goes in the middle of it all.
#[test]
fn a_power_cut_under_many_threads() {
    for seed in 0..60u64 {
        let sim = SimDisk::new(seed);
        let store = store_with(&sim, &vec![0; (BLOCKS * B) as usize]);
        let disk = open(&store, "d").expect("d");
        sim.set_garbage_pages(true);
        sim.cut_at(sim.ops() + 20 + seed * 37 % 900);
        let model = Model::new();
        // Versions that a flush has promised.
        let durable: Vec<AtomicU64> = (0..2 * BLOCKS).map(|_| AtomicU64::new(0)).collect();
        let writers = AtomicU64::new(2);
        std::thread::scope(|scope| {
            for h in 0..2usize {
                let (model, disk, writers) = (&model, &disk, &writers);
                scope.spawn(move || {
                    let mut rng = Rng(seed + h as u64);
                    loop {
                        let n = rng.below(BLOCKS);
                        let i = 2 * n as usize + h;
                        let next = model.begun[i].fetch_add(1, SeqCst) + 1;
                        if disk.write(&half(next), n * B + (h * HALF) as u64).is_err() {
                            writers.fetch_sub(1, SeqCst);
                            return;
                        }
                        model.done[i].store(next, SeqCst);
                    }
                });
            }
            for _ in 0..2 {
                let (model, durable, disk, writers) = (&model, &durable, &disk, &writers);
                scope.spawn(move || {
                    // A flush that finds nothing to do does not notice that the power is gone.
                    while writers.load(SeqCst) > 0 {
                        let low = Model::now(&model.done);
                        if disk.flush().is_err() {
                            return;
                        }
                        for (place, version) in durable.iter().zip(low) {
                            place.fetch_max(version, SeqCst);
                        }
                        if disk.checkpoint().is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let low = Model::now(&durable);
        for crash in 0..8 {
            let left = again(&sim.crash(seed << 8 | crash), 3);
            let disk =
                open(&left, "d").unwrap_or_else(|e| panic!("seed {seed}, crash {crash}: {e:?}"));
            model.check(&*disk, &low, &format!("seed {seed}, crash {crash}"));
        }
    }
}

/// A read has found where its block is, and before it copies the data the block is written again, committed, and everything that is free is
/// used or given back to the host. The read still finds what was there when it began.
#[test]
fn what_a_reader_knows_is_not_reused_under_its_hands() {
    const N: u64 = 1200;
    for meanwhile in 0..4 {
        let sim = SimDisk::new(1);
        drop(store_with(&sim, &[1; N as usize * 4096]));
        let hooked = Hooked::new(sim.root());
        let root = Arc::new(hooked.clone());
        let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
        let disk = open(&store, "d").expect("d");
        let fill = |byte: u8| vec![byte; N as usize * 4096];
        disk.write(&fill(2), 0).expect("write");
        disk.flush().expect("flush");
        let other = disk.clone();
        hooked.before_read(1024 * B, move || {
            for round in 3..6 {
                match meanwhile {
                    0 => other.write(&[round; 4096], 7 * B).expect("write"),
                    1 => other.write(&[round; 1], 7 * B).expect("write"),
                    2 => other.discard(0, 512 * B).expect("discard"),
                    _ => other
                        .write(&vec![round; N as usize * 4096], 0)
                        .expect("write"),
                }
                other.flush().expect("flush");
                other.checkpoint().expect("checkpoint");
                other.maintain().expect("maintain");
                other
                    .write(&vec![round; 600 * 4096], 600 * B)
                    .expect("write");
            }
        });
        let found = block(&*disk, 7);
        assert!(hooked.was_called());
        assert_eq!(found, [2; 4096], "{meanwhile}: as of when the read began");
        let now = block(&*disk, 7);
        assert_ne!(now, [2; 4096], "{meanwhile}: as of now");
        // Once the reader has gone, its slots come back.
        let used = sim.used();
        for round in 6..12 {
            disk.write(&fill(round), 0).expect("write");
            disk.flush().expect("flush");
        }
        disk.checkpoint().expect("checkpoint");
        disk.maintain().expect("maintain");
        assert!(sim.used() <= used + 3 * N * B, "{meanwhile}: space leaks");
    }
}

/// The same for a partial write, which reads a block, merges, and publishes: what was written in between is not lost.
/// Two writers count on one commit record, and the slower is committed with one of its own: space for later records is not made over it.
#[test]
fn a_slow_writer_does_not_lose_its_commit() {
    for flushes in 0..40 {
        let sim = SimDisk::new(1);
        drop(store_with(&sim, &[1; 64 * 4096]));
        let hooked = Hooked::new(sim.root());
        let root = Arc::new(hooked.clone());
        let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
        let disk = open(&store, "d").expect("d");
        for n in 0..flushes {
            disk.write(&[n as u8 + 2; 4096], n * B).expect("write");
            disk.flush().expect("flush");
        }
        let other = disk.clone();
        hooked.before_write(1024 * B, move || {
            other.write(&[100; 4096], 50 * B).expect("write");
            other.flush().expect("flush");
        });
        disk.write(&[101; 4096], 51 * B).expect("write");
        assert!(hooked.was_called());
        disk.flush().expect("flush");
        disk.write(&[102; 4096], 52 * B).expect("write");
        disk.flush().expect("flush");
        let store = again(&sim.kill(), 3);
        let disk = open(&store, "d").unwrap_or_else(|e| panic!("after {flushes}: {e:?}"));
        for (byte, at) in [(100, 50), (101, 51), (102, 52)] {
            assert_eq!(block(&*disk, at), [byte; 4096], "after {flushes}");
        }
    }
}

#[test]
fn a_partial_write_does_not_undo_what_was_written_meanwhile() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 9 * 4096]));
    let hooked = Hooked::new(sim.root());
    let root = Arc::new(hooked.clone());
    let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
    let disk = open(&store, "d").expect("d");
    disk.write(&[2; 4096], 0).expect("write");
    let other = disk.clone();
    hooked.before_read(1024 * B, move || {
        other.write(&[3; 1000], 3000).expect("write")
    });
    disk.write(&[4; 1000], 0).expect("write");
    assert!(hooked.was_called());
    let found = block(&*disk, 0);
    assert_eq!((found[0], found[2000], found[3500]), (4, 2, 3));
}

/// While a commit is being synced others write. What they write must not go where the commit before still stands: the power may go in that
/// very sync.
#[test]
fn what_a_commit_replaces_is_not_reused_before_it_is_durable() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 60 * 4096]));
    sim.set_garbage_pages(true);
    let hooked = Hooked::new(sim.root());
    let root = Arc::new(hooked.clone());
    let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
    let disk = open(&store, "d").expect("d");
    disk.write(&[2; 20 * 4096], 0).expect("write");
    disk.flush().expect("flush");
    disk.write(&[3; 20 * 4096], 0).expect("write");
    let (other, power) = (disk.clone(), sim.clone());
    hooked.before_sync(move || {
        for n in 0..40 {
            other.write(&[4; 4096], (20 + n) * B).expect("write");
        }
        power.cut_at(power.ops());
    });
    disk.flush().expect_err("the power goes in the sync");
    assert!(hooked.was_called());
    for seed in 0..300 {
        let left = again(&sim.crash(seed), 3);
        let disk = open(&left, "d").unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        let first = block(&*disk, 0)[0];
        assert!(first == 2 || first == 3, "seed {seed}: {first}");
        for n in 0..60 {
            let expected = if n < 20 { first } else { 1 };
            assert_eq!(block(&*disk, n), [expected; 4096], "seed {seed}: block {n}");
        }
    }
}
