//! 8 disks, 8 threads on each, snapshots and forks meanwhile, on the real filesystem, against a model of each block.
//!
//! `FORKDISK_STRESS_SECONDS=N` goes on for longer.

use crate::common::Rng;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::store::{ImportMode, ImportSource, Quiet, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const DISKS: usize = 8;
const THREADS: u64 = 8;
/// Blocks of each thread; of one disk, those of all threads take turns.
const BLOCKS: u64 = 40;
const SIZE: u64 = THREADS * BLOCKS * 4096;

/// A block has versions: the even ones are data that tells its version, the odd ones are zeros. Version 1 is that of the image.
struct Model {
    done: Vec<AtomicU64>,
    begun: Vec<AtomicU64>,
}

impl Model {
    fn new() -> Model {
        let all = || (0..THREADS * BLOCKS).map(|_| AtomicU64::new(1)).collect();
        Model {
            done: all(),
            begun: all(),
        }
    }
    fn now(of: &[AtomicU64]) -> Vec<u64> {
        of.iter().map(|v| v.load(SeqCst)).collect()
    }
}

fn content(block: u64, version: u64) -> Vec<u8> {
    if version % 2 == 1 {
        return vec![0; 4096];
    }
    let mut data = vec![0; 4096];
    for (i, word) in data.chunks_mut(16).enumerate() {
        word[..8].copy_from_slice(&version.to_le_bytes());
        word[8..].copy_from_slice(&(block << 16 | i as u64).to_le_bytes());
    }
    data
}

/// Is this block of a version from `low` to `high`?
fn fits(found: &[u8], block: u64, low: u64, high: u64) -> bool {
    let version = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
    if version == 0 {
        // Zeros: any odd version.
        return found.iter().all(|&b| b == 0) && (low % 2 == 1 || low < high);
    }
    (low..=high).contains(&version) && found == content(block, version)
}

fn check(disk: &dyn Disk, low: &[u64], high: &[u64], story: &str) {
    let mut found = vec![0; SIZE as usize];
    disk.read(&mut found, 0).expect(story);
    for (block, found) in found.chunks(4096).enumerate() {
        assert!(
            fits(found, block as u64, low[block], high[block]),
            "{story}: block {block} holds {:?}, which is not of versions {} to {}",
            &found[..16],
            low[block],
            high[block]
        );
    }
}

/// Writes, discards, reads and flushes the blocks of one thread.
fn work(
    disk: &CowDisk,
    model: &Model,
    thread: u64,
    seed: u64,
    stop: &AtomicBool,
    count: &AtomicU64,
) {
    let mut rng = Rng(seed);
    while !stop.load(SeqCst) {
        let block = rng.below(BLOCKS) * THREADS + thread;
        let at = block * 4096;
        let (done, begun) = (&model.done[block as usize], &model.begun[block as usize]);
        let version = done.load(SeqCst);
        match rng.below(20) {
            0..=9 => {
                let next = (version + 2) / 2 * 2;
                begun.store(next, SeqCst);
                let data = content(block, next);
                if rng.below(4) == 0 && version % 2 == 0 && version > 0 {
                    // A part of it once more, the same bytes, by way of reading the block.
                    disk.write(&data, at).expect("write");
                    disk.write(&data[1000..3000], at + 1000)
                        .expect("write a part");
                } else {
                    disk.write(&data, at).expect("write");
                }
                done.store(next, SeqCst);
            }
            10..=11 => {
                let next = version.next_multiple_of(2) + 1;
                begun.store(next, SeqCst);
                disk.discard(at, 4096).expect("discard");
                done.store(next, SeqCst);
            }
            12..=18 => {
                let mut found = vec![0; 4096];
                disk.read(&mut found, at).expect("read");
                assert!(
                    found == content(block, version),
                    "block {block} is not of version {version}"
                );
            }
            _ => disk.flush().expect("flush"),
        }
        count.fetch_add(1, SeqCst);
    }
}

#[test]
fn eight_disks_and_eight_threads_on_each() {
    let seconds =
        std::env::var("FORKDISK_STRESS_SECONDS").map_or(5, |n| n.parse().expect("seconds"));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::init(&dir.path().join("store")).unwrap();
    let image = vec![0u8; SIZE as usize];
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .unwrap();
    let names: Vec<String> = (0..DISKS).map(|n| format!("d{n}")).collect();
    store.create(&names, "image", None).unwrap();
    let disks: Vec<Arc<CowDisk>> = names
        .iter()
        .map(|n| store.open_cow(&store.resolve(n).unwrap(), true).unwrap())
        .collect();
    let models: Vec<Model> = (0..DISKS).map(|_| Model::new()).collect();
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut snapshots, mut forks) = (0, 0);
    std::thread::scope(|scope| {
        for (n, (disk, model)) in disks.iter().zip(&models).enumerate() {
            for thread in 0..THREADS {
                let (stop, count) = (&stop, &count);
                scope.spawn(move || {
                    work(disk, model, thread, n as u64 * 1000 + thread, stop, count)
                });
            }
        }
        // A thread that fails must not leave the others at work for ever.
        let end = Instant::now() + Duration::from_secs(seconds);
        let controlled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut rng = Rng(99);
            while Instant::now() < end {
                let n = rng.below(DISKS as u64) as usize;
                let (disk, model, name) = (&disks[n], &models[n], &names[n]);
                let low = Model::now(&model.done);
                let made = if rng.below(3) > 0 {
                    snapshots += 1;
                    let snap = format!("s{snapshots}");
                    store
                        .snapshot_running(disk, name, &snap, None)
                        .expect("snapshot");
                    format!("{name}@{snap}")
                } else {
                    forks += 1;
                    let fork = format!("f{forks}");
                    store
                        .create_from_running(disk, name, std::slice::from_ref(&fork), None)
                        .expect("fork");
                    fork
                };
                let high = Model::now(&model.begun);
                let object = store.resolve(&made).expect("what was made");
                check(
                    &*store.open_cow(&object, false).expect("open"),
                    &low,
                    &high,
                    &made,
                );
                disk.maintain().expect("housekeeping");
                // Chains in bounds: what nobody needs goes.
                if made.starts_with('f') {
                    let plan = store.plan_removal(&[made], false).expect("a plan");
                    store.remove(&plan).expect("removed");
                }
            }
        }));
        stop.store(true, SeqCst);
        if let Err(why) = controlled {
            std::panic::resume_unwind(why);
        }
    });
    for ((disk, model), name) in disks.iter().zip(&models).zip(&names) {
        let now = Model::now(&model.done);
        check(&**disk, &now, &now, name);
        disk.close().unwrap();
    }
    drop(disks);
    for (name, model) in names.iter().zip(&models) {
        let now = Model::now(&model.done);
        check(
            &*store.open_cow(&store.resolve(name).unwrap(), true).unwrap(),
            &now,
            &now,
            name,
        );
    }
    let report = forkdisk::check::check(&store, None, &Quiet).unwrap();
    assert!(report.corruptions.is_empty(), "{report:?}");
    let count = count.into_inner();
    eprintln!(
        "{{\"test\": \"stress\", \"operations\": {count}, \"snapshots\": {snapshots}, \"forks\": {forks}, \"seconds\": {seconds}}}"
    );
    assert!(snapshots > 3 && forks > 0 && count > 1000);
}
