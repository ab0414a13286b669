//! Layers without a name give back what nobody sees while disks read through them.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::{Rng, data, env, read_all};
use forkdisk::check::{check, scrub};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::io::os::OsDir;
use forkdisk::io::sim::{FaultKind, Policy, SimDisk};
use forkdisk::store::{Finding, ImportMode, ImportSource, Quiet, Reclaimed, Store};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const B: u64 = 4096;

/// A store with an image of so many blocks, and a disk of it.
fn simulated(blocks: u64) -> (SimDisk, Store) {
    let sim = SimDisk::new(1);
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(1)).expect("a store");
    fill(&store, blocks);
    (sim, store)
}
fn fill(store: &Store, blocks: u64) {
    let image = data(5, blocks * B);
    let source = ImportSource::Reader(&mut &image[..]);
    store
        .import(source, "image", ImportMode::Copy, &Quiet)
        .expect("import");
    store
        .create(&["d".to_string()], "image", None)
        .expect("create");
}
fn again(sim: &SimDisk, seed: u64) -> Store {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed << 20)).expect("the store")
}
fn open(store: &Store, name: &str, writable: bool) -> Arc<CowDisk> {
    store
        .open_cow(&store.resolve(name).expect("resolve"), writable)
        .unwrap_or_else(|e| panic!("open {name}: {e:?}"))
}
fn contents(store: &Store, name: &str) -> Vec<u8> {
    read_all(&*open(store, name, false)).unwrap_or_else(|e| panic!("read {name}: {e:?}"))
}
fn snapshot(store: &Store, disk: &CowDisk, name: &str) {
    store
        .snapshot_running(disk, "d", name, None)
        .expect("snapshot");
}
fn remove(store: &Store, name: &str) -> u64 {
    let plan = store
        .plan_removal(&[name.to_string()], false)
        .unwrap_or_else(|e| panic!("{name}: {e:?}"));
    store.remove(&plan).expect("remove");
    plan.frees
}
fn write(disk: &CowDisk, seed: u64, at: u64, blocks: u64) {
    disk.write(&data(seed, blocks * B), at * B).expect("write");
}
fn reclaim(store: &Store) -> Reclaimed {
    store.reclaim_open().expect("reclaim")
}
fn sound(store: &Store) {
    let report = check(store, None, &Quiet).expect("check");
    assert!(
        report.corruptions.is_empty() && report.leaks.is_empty(),
        "{report:?}"
    );
}
/// `s1` below `s2` below the disk, which is open; `s2` hides 900 blocks of `s1`.
fn stacked(store: &Store) -> Arc<CowDisk> {
    let disk = open(store, "d", true);
    write(&disk, 1, 0, 1000);
    snapshot(store, &disk, "s1");
    write(&disk, 2, 50, 900);
    snapshot(store, &disk, "s2");
    write(&disk, 3, 10, 20);
    disk
}

/// What is given back may have been seen through layers that do not hide it: what they show is not known any more, nor what they show when they are one.
#[test]
fn what_joined_layers_show_is_what_is_left_of_them() {
    let (_sim, store) = simulated(300);
    // Past the end of the image nothing lies below.
    store
        .create(&["e".to_string()], "image", Some(1000 * B))
        .expect("create");
    let disk = open(&store, "e", true);
    let snapshot = |disk: &CowDisk, name: &str| {
        let made = store.snapshot_running(disk, "e", name, None);
        made.expect("snapshot");
    };
    let names = ["s0", "s1", "s2"];
    for (n, name) in (0u64..).zip(names) {
        write(&disk, n + 1, 400 + n * 100, 100);
        snapshot(&disk, name);
    }
    for name in names {
        remove(&store, &format!("e@{name}"));
    }
    disk.close().expect("close");
    drop(disk);
    // Its layers say what they show when they are opened.
    let disk = open(&store, "e", true);
    write(&disk, 9, 400, 90);
    snapshot(&disk, "x");
    let done = reclaim(&store);
    assert_eq!(done.bytes, 90 * B, "{done:?}");
    assert!(store.rechain(&disk).expect("rechain"));
    let now = read_all(&*disk).expect("read");
    let plan = store.idle_stretch("e", &disk, 3).expect("a look");
    let done = store.squash(plan.expect("three layers"), &Quiet);
    assert!(store.rechain(&disk).expect("rechain"));
    let former = done.expect("squash").former;
    store.collect_former(&former).expect("collect");
    assert!(read_all(&*disk).expect("read") == now);
    disk.close().expect("close");
    drop(disk);
    sound(&store);
}

#[test]
fn a_layer_shrinks_under_its_readers() {
    let (sim, store) = simulated(2000);
    let disk = stacked(&store);
    let s2 = contents(&store, "d@s2");
    assert_eq!(reclaim(&store), Reclaimed::default(), "all have names");
    assert_eq!(remove(&store, "d@s1"), 900 * B, "what will be given back");
    disk.flush().expect("flush");
    let (now, used) = (read_all(&*disk).expect("read"), sim.used());
    let done = reclaim(&store);
    assert_eq!((done.bytes, done.shrunk.len(), done.left), (900 * B, 1, 0));
    assert!(sim.used() + 880 * B < used, "{} of {used}", sim.used());
    // With the map that it has in memory, and with the new one.
    assert!(read_all(&*disk).expect("read") == now);
    assert!(store.rechain(&disk).expect("rechain"));
    assert!(!store.rechain(&disk).expect("rechain"), "once is enough");
    assert!(read_all(&*disk).expect("read") == now && contents(&store, "d@s2") == s2);
    assert_eq!(reclaim(&store).bytes, 0);
    // The next one, over which the disk itself stands: it hides only what is durable, and that is not before it is sealed.
    assert_eq!(remove(&store, "d@s2"), 0);
    let done = reclaim(&store);
    assert_eq!((done.bytes, done.left), (0, 1));
    write(&disk, 4, 100, 700);
    snapshot(&store, &disk, "s3");
    let now = read_all(&*disk).expect("read");
    let done = reclaim(&store);
    // Of the one below, too: what is seen through both of them and by nobody else.
    assert_eq!((done.bytes, done.left), (720 * B, 0));
    assert!(read_all(&*disk).expect("read") == now);
    // And the same layers once more, with readers of each time.
    for n in 0..4u64 {
        write(&disk, 10 + n, 800 + 40 * n, 100);
        snapshot(&store, &disk, &format!("t{n}"));
        remove(
            &store,
            &if n == 0 {
                "d@s3".into()
            } else {
                format!("d@t{}", n - 1)
            },
        );
        let now = read_all(&*disk).expect("read");
        reclaim(&store);
        assert!(read_all(&*disk).expect("read") == now, "{n}");
        if n % 2 == 0 {
            store.rechain(&disk).expect("rechain");
            assert!(read_all(&*disk).expect("read") == now, "{n}");
        }
    }
    let now = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    // What readers may have known until now, the maps, is given back when there are none.
    let used = sim.used();
    store.gc(false).expect("gc");
    assert!(sim.used() < used, "{} of {used}", sim.used());
    assert!(contents(&again(&sim, 2), "d") == now);
    sound(&store);
}

/// On a real filesystem, where a map in memory is the file itself: readers who have not looked at it yet find it whole.
#[test]
fn maps_in_memory_stay_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = Arc::new(OsDir::open(dir.path()).expect("opened"));
    let store = Store::init_on(root, dir.path(), env(1)).expect("a store");
    fill(&store, 2000);
    let mut plain = data(5, 2000 * B);
    for (seed, at, blocks) in [(1, 0, 1000), (2, 50, 900), (3, 10, 20)] {
        let at = (at * B) as usize;
        plain[at..at + (blocks * B) as usize].copy_from_slice(&data(seed, blocks * B));
    }
    let disk = stacked(&store);
    disk.close().expect("close");
    drop(disk);
    let disk = open(&store, "d", true);
    remove(&store, "d@s1");
    assert_eq!(reclaim(&store).bytes, 900 * B);
    assert!(read_all(&*disk).expect("read") == plain);
    assert!(store.rechain(&disk).expect("rechain"));
    assert_eq!(reclaim(&store).bytes, 0);
    assert!(read_all(&*disk).expect("read") == plain);
    disk.close().expect("close");
    drop(disk);
    sound(&store);
}

/// A snapshot that is open by its name is read as a whole, also when the name is gone.
#[test]
fn what_is_shown_itself_stays_as_it_is() {
    let (_sim, store) = simulated(2000);
    let disk = stacked(&store);
    let view = open(&store, "d@s1", false);
    let s1 = read_all(&*view).expect("read");
    remove(&store, "d@s1");
    let done = reclaim(&store);
    assert_eq!((done.bytes, done.left), (0, 1));
    assert!(read_all(&*view).expect("read") == s1);
    drop(view);
    assert_eq!(reclaim(&store).bytes, 900 * B);
    disk.close().expect("close");
}

/// Another process that has the layer open may be reading all of it.
#[test]
fn what_another_process_reads_stays_as_it_is() {
    let (sim, store) = simulated(2000);
    let disk = stacked(&store);
    let other = again(&sim, 2);
    let view = open(&other, "d@s1", false);
    let s1 = read_all(&*view).expect("read");
    remove(&store, "d@s1");
    assert_eq!(reclaim(&store).bytes, 0);
    assert!(read_all(&*view).expect("read") == s1);
    // That it was tried leaves the layer as open as it was.
    assert_eq!(other.gc(false).expect("gc").reclaimed, 0);
    drop(view);
    assert_eq!(other.gc(false).expect("gc").reclaimed, 0);
    assert_eq!(reclaim(&store).bytes, 900 * B);
    assert_eq!(other.gc(false).expect("gc").reclaimed, 0);
    assert!(store.rechain(&disk).expect("rechain"));
    assert_eq!(reclaim(&store).bytes, 0, "only the former map");
    let now = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&other, "d") == now);
    sound(&other);
}

/// A disk that still reads through files that were replaced comes to a layer in a way that the names do not tell.
#[test]
fn a_chain_of_former_files_keeps_what_it_reads() {
    let (sim, store) = simulated(2000);
    let disk = stacked(&store);
    store
        .create(&["f".to_string()], "d@s1", None)
        .expect("fork");
    let fork = open(&store, "f", true);
    write(&fork, 9, 0, 1000);
    fork.close().expect("close");
    drop(fork);
    remove(&store, "d@s1");
    let now = read_all(&*disk).expect("read");
    let other = again(&sim, 2);
    let plan = other.plan_squash("d", false).expect("plan");
    assert_eq!(plan.layers, 2);
    other.squash(plan, &Quiet).expect("squash");
    // Only the fork stands on it now, and hides all of it.
    let done = reclaim(&store);
    assert_eq!((done.bytes, done.left), (0, 1));
    assert!(read_all(&*disk).expect("read") == now);
    assert!(store.rechain(&disk).expect("rechain"));
    assert!(read_all(&*disk).expect("read") == now);
    disk.close().expect("close");
    drop(disk);
    assert_eq!(store.gc(false).expect("gc").reclaimed, 1000 * B);
    assert!(contents(&again(&sim, 3), "d") == now);
    sound(&store);
}

/// A disk is closed between the reclaim under it and the look at its new block map: the former map goes with its last reader.
#[test]
fn a_disk_that_is_closed_meanwhile_leaves_no_map_behind() {
    let (_sim, store) = simulated(2000);
    let disk = stacked(&store);
    remove(&store, "d@s1");
    // Somebody else reads by the former map as well.
    let other = open(&store, "d@s2", false);
    let now = read_all(&*other).expect("read");
    assert_eq!(reclaim(&store).bytes, 900 * B);
    disk.close().expect("close");
    drop(disk);
    store.closed();
    assert!(read_all(&*other).expect("read") == now);
    drop(other);
    store.closed();
    sound(&store);
    assert!(contents(&store, "d@s2") == now);
}

/// Who dies between the reclaim and the look at its new block map leaves the former map: `gc` finds it, and says what it frees.
#[test]
fn what_a_death_leaves_behind_is_told_and_freed() {
    let (sim, store) = simulated(2000);
    let disk = stacked(&store);
    remove(&store, "d@s1");
    assert_eq!(reclaim(&store).bytes, 900 * B);
    disk.close().expect("close");
    drop((disk, store));
    let store = again(&sim, 2);
    let report = check(&store, None, &Quiet).expect("check");
    assert!(!report.leaks.is_empty());
    let would = store.gc(true).expect("gc");
    assert!(would.bytes > 0, "{would:?}");
    let used = sim.used();
    let done = store.gc(false).expect("gc");
    assert_eq!((done.bytes, used - sim.used()), (would.bytes, would.bytes));
    assert_eq!(store.gc(true).expect("gc").bytes, 0);
    sound(&store);
    // Another server of the store has its layers open then, and may not know of it.
    let (sim, store) = simulated(2000);
    let disk = stacked(&store);
    remove(&store, "d@s1");
    assert_eq!(reclaim(&store).bytes, 900 * B);
    disk.close().expect("close");
    drop((disk, store));
    let store = again(&sim, 2);
    let disk = open(&store, "d", true);
    store.inherit();
    disk.close().expect("close");
    drop(disk);
    store.closed();
    sound(&store);
}

/// A disk, snapshotted as `d@s1` while it is used, whose sealed layer has many pieces that it does not use.
fn scattered(store: &Store) -> (Arc<CowDisk>, Vec<u8>) {
    let disk = open(store, "d", true);
    write(&disk, 1, 0, 800);
    disk.flush().expect("flush");
    for at in 0..400 {
        write(&disk, 1000 + at, at * 2, 1);
    }
    disk.flush().expect("flush");
    snapshot(store, &disk, "s1");
    let now = read_all(&*disk).expect("read");
    (disk, now)
}

/// Nobody waits for a seal to give back what is in many pieces: that comes later, and is no leak until then.
#[test]
fn what_a_seal_leaves_is_given_back_later() {
    let (sim, store) = simulated(2000);
    let (disk, now) = scattered(&store);
    sound(&store);
    let used = sim.used();
    while store.give_back_idle(7) {}
    assert!(sim.used() + 300 * B < used, "{} of {used}", sim.used());
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&store, "d@s1") == now);
    assert_eq!(store.gc(true).expect("gc").bytes, 0);
    sound(&store);
    // Who dies before leaves it to `gc`, or to the next who has the layer open.
    for inherits in [false, true] {
        let (sim, store) = simulated(2000);
        let (disk, now) = scattered(&store);
        disk.close().expect("close");
        drop((disk, store));
        let store = again(&sim, 2);
        sound(&store);
        let used = sim.used();
        if inherits {
            let disk = open(&store, "d", true);
            assert!(!store.give_back_idle(7), "nobody knows of it");
            store.inherit();
            while store.give_back_idle(7) {}
            disk.close().expect("close");
        } else {
            let would = store.gc(true).expect("gc");
            assert!(would.bytes > 300 * B, "{would:?}");
            assert_eq!(store.gc(false).expect("gc").bytes, would.bytes);
        }
        assert!(sim.used() + 300 * B < used, "{} of {used}", sim.used());
        assert_eq!(store.gc(true).expect("gc").bytes, 0);
        assert!(contents(&store, "d@s1") == now);
        sound(&store);
    }
}

/// What a layer did not use when it was sealed it may use when its file was changed since.
#[test]
fn what_a_seal_left_and_is_used_again_stays() {
    for squash in [false, true] {
        let (sim, store) = simulated(2000);
        let (disk, _) = scattered(&store);
        write(&disk, 9, 100, 500);
        snapshot(&store, &disk, "s2");
        write(&disk, 10, 0, 3);
        let now = read_all(&*disk).expect("read");
        remove(&store, "d@s1");
        if squash {
            let plan = store.plan_squash("d", true).expect("plan");
            store.squash(plan, &Quiet).expect("squash");
        } else {
            assert!(reclaim(&store).bytes > 0);
        }
        while store.give_back_idle(7) {}
        store.rechain(&disk).expect("rechain");
        assert!(read_all(&*disk).expect("read") == now, "{squash}");
        disk.close().expect("close");
        drop(disk);
        assert!(contents(&store, "d") == now, "{squash}");
        store.gc(false).expect("gc");
        let read = scrub(&store, None, Default::default(), &Quiet).expect("scrub");
        assert!(read.corruptions.is_empty(), "{squash}: {read:?}");
        assert!(contents(&again(&sim, 2), "d") == now, "{squash}");
    }
}

/// What would cost more than it gives is not promised.
#[test]
fn a_block_of_a_full_region_is_not_worth_a_new_map() {
    let (sim, store) = simulated(2000);
    let disk = open(&store, "d", true);
    write(&disk, 1, 0, 512);
    snapshot(&store, &disk, "s1");
    write(&disk, 2, 7, 1);
    snapshot(&store, &disk, "s2");
    disk.close().expect("close");
    drop(disk);
    let used = sim.used();
    assert_eq!(remove(&store, "d@s1"), 0);
    let would = store.gc(true).expect("gc");
    assert_eq!((would.bytes, would.shrunk.len()), (0, 0));
    assert_eq!(store.gc(false).expect("gc"), would);
    assert!(used - sim.used() <= B, "the name");
    sound(&store);
}

/// The power goes at each step: what is seen stays the same, and later the rest comes back.
#[test]
fn one_that_is_cut_changes_nothing() {
    let (sim, store) = simulated(60);
    let disk = open(&store, "d", true);
    for (seed, at) in [(1, 0), (2, 5), (3, 12)] {
        write(&disk, seed, at, 40);
        snapshot(&store, &disk, &format!("s{seed}"));
    }
    write(&disk, 4, 1, 3);
    let seen = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    let kept = contents(&store, "d@s3");
    drop(store);
    let sim = sim.crash_with(Policy::AllDone);
    for cut in 0.. {
        let left = sim.crash_with(Policy::AllDone);
        left.set_garbage_pages(true);
        let store = again(&left, 2);
        let disk = open(&store, "d", true);
        remove(&store, "d@s1");
        remove(&store, "d@s2");
        left.cut_at(left.ops() + cut);
        let done = store.reclaim_open();
        for seed in 0..120 {
            let store = again(&left.crash(seed), 3);
            for _ in 0..2 {
                assert!(contents(&store, "d") == seen, "cut {cut}, seed {seed}");
                assert!(contents(&store, "d@s3") == kept, "cut {cut}, seed {seed}");
                let read = scrub(&store, None, Default::default(), &Quiet).expect("scrub");
                // A copy of a superblock may be torn; what was not given back yet is as it was.
                let torn = |f: &Finding| matches!(f.slot, Some(1 | 2));
                assert!(
                    read.corruptions.iter().all(torn),
                    "cut {cut}, seed {seed}: {read:?}"
                );
                store.gc(false).expect("gc");
            }
            sound(&store);
        }
        drop(disk);
        if let Ok(done) = done {
            assert_eq!((done.bytes, done.left), ((35 + 33) * B, 0));
            break;
        }
    }
}

/// A call fails at each step, and it is tried again: the readers, with whatever maps they have, see what they saw.
#[test]
fn one_that_fails_harms_no_reader() {
    for failing in 0.. {
        let (sim, store) = simulated(2000);
        let disk = stacked(&store);
        disk.flush().expect("flush");
        let now = read_all(&*disk).expect("read");
        remove(&store, "d@s1");
        let from = sim.calls() + failing;
        sim.fail_calls(from, 1, FaultKind::Eio);
        let done = store.reclaim_open();
        let reached = sim.calls() > from;
        sim.clear_faults();
        for _ in 0..2 {
            let _ = store.reclaim_open();
            assert!(read_all(&*disk).expect("read") == now, "{failing}");
        }
        store.rechain(&disk).expect("rechain");
        reclaim(&store);
        assert!(read_all(&*disk).expect("read") == now, "{failing}");
        disk.close().expect("close");
        drop(disk);
        for _ in 0..2 {
            assert!(contents(&store, "d") == now, "{failing}");
            store.gc(false).expect("gc");
        }
        sound(&store);
        if !reached {
            assert_eq!(done.expect("nothing failed").bytes, 900 * B);
            assert!(failing > 50, "{failing}");
            break;
        }
    }
}

/// Random writes, snapshots, forks, removals and reclaims under one open disk, against plain bytes.
#[test]
fn random_lives() {
    let mut total = 0;
    for seed in 0..12 {
        let (sim, store) = simulated(300);
        let mut rng = Rng(seed * 7919 + 1);
        let disk = open(&store, "d", true);
        let mut plain = read_all(&*disk).expect("read");
        let mut kept: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut given = 0;
        for step in 0..120 {
            match rng.below(8) {
                0..3 => {
                    let at = rng.below(300);
                    let n = (1 + rng.below(60)).min(300 - at);
                    let range = (at * B) as usize..((at + n) * B) as usize;
                    if rng.below(5) == 0 {
                        disk.discard(at * B, n * B).expect("discard");
                        plain[range].fill(0);
                    } else {
                        let bytes = data(rng.next() | 1, n * B);
                        disk.write(&bytes, at * B).expect("write");
                        plain[range].copy_from_slice(&bytes);
                    }
                }
                3 | 4 => {
                    let name = format!("s{step}");
                    snapshot(&store, &disk, &name);
                    kept.insert(format!("d@{name}"), plain.clone());
                    if rng.below(4) == 0 {
                        let fork = format!("f{step}");
                        store
                            .create(std::slice::from_ref(&fork), &format!("d@{name}"), None)
                            .expect("fork");
                        kept.insert(fork, plain.clone());
                    }
                }
                5 if !kept.is_empty() => {
                    let n = rng.below(kept.len() as u64) as usize;
                    if let Some(name) = kept.keys().nth(n).cloned() {
                        remove(&store, &name);
                        kept.remove(&name);
                    }
                }
                6 => given += reclaim(&store).bytes,
                _ => drop(store.rechain(&disk).expect("rechain")),
            }
            if step % 10 == 0 {
                assert!(read_all(&*disk).expect("read") == plain, "{seed}: {step}");
            }
        }
        total += given;
        assert!(read_all(&*disk).expect("read") == plain, "{seed}");
        disk.close().expect("close");
        drop(disk);
        let store = again(&sim, 9);
        for _ in 0..2 {
            assert!(contents(&store, "d") == plain, "{seed}");
            for (name, held) in &kept {
                assert!(contents(&store, name) == *held, "{seed}: {name}");
            }
            store.gc(false).expect("gc");
        }
        sound(&store);
    }
    assert!(total > 200 * B, "little was ever hidden: {total}");
}
