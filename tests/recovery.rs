//! Stories of crashes that once went wrong, each told step by step.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::{World, env};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Kind, Result};
use forkdisk::io::sim::{FaultKind, Policy, SimDisk, Verb};
use forkdisk::store::Store;
use forkdisk::store::history::Limits;
use std::path::Path;
use std::sync::Arc;

/// Opens the store on what is left; each time with ids of its own.
fn store(sim: &SimDisk, seed: u64) -> Store {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed << 20)).expect("a store")
}
fn open(store: &Store, name: &str) -> Result<Arc<CowDisk>> {
    store.open_cow(&store.resolve(name)?, true)
}
/// A store with an image of 9 blocks and the disk `d1`, everything durable.
fn world() -> SimDisk {
    World::new(1, 9).sim.crash_with(Policy::AllDone)
}
/// The byte that fills a block.
fn block(disk: &dyn Disk, n: u64) -> u8 {
    let mut block = [0; 4096];
    disk.read(&mut block, n * 4096).expect("read");
    assert!(
        block.iter().all(|b| *b == block[0]),
        "block {n} is not of one piece"
    );
    block[0]
}
/// Tries `work` on copies of `sim` in which the power goes at operation 0, 1, 2... until it gets through; shows each to `then`.
fn each_cut(sim: &SimDisk, work: impl Fn(&SimDisk) -> Result<()>, then: impl Fn(&SimDisk, &str)) {
    for cut in 0.. {
        let copy = sim.kill();
        copy.set_garbage_pages(true);
        copy.cut_at(copy.ops() + cut);
        let done = work(&copy);
        if let Err(e) = &done {
            assert!(copy.is_off(), "cut {cut}: {e:?}");
        }
        then(&copy, &format!("cut {cut}"));
        if done.is_ok() {
            return;
        }
    }
}

/// A power cut in a fork left a layer file whose header never reached the disk. Nobody needed it, but as it might have stood on anything,
/// no collection ever removed anything again.
#[test]
fn an_unfinished_layer_does_not_stop_gc() {
    let forks = |sim: &SimDisk| {
        store(sim, 2)
            .create(&["new".to_string()], "image", None)
            .map(drop)
    };
    each_cut(&world(), forks, |off, cut| {
        for seed in 0..20 {
            let left = off.crash(seed);
            let store = store(&left, 3);
            store.gc(false).expect("gc");
            let layers = store.layers_dir().list().expect("list").len();
            let named = store.list().expect("list").len() - 1;
            assert_eq!(layers, named, "{cut}, seed {seed}: garbage stays");
        }
    });
}

/// A process died in a snapshot after it wrote the seal and before it synced it. The next one saw a sealed layer and put a new one on top;
/// a power cut took the seal back, and the disk stood on a layer that was not sealed.
#[test]
fn death_while_sealing_then_work_then_a_power_cut() {
    let snapshots = |sim: &SimDisk| {
        let store = store(sim, 2);
        let disk = open(&store, "d1")?;
        disk.write(&[7; 4096], 0)?;
        store.snapshot_running(&disk, "d1", "s", None).map(drop)
    };
    each_cut(&world(), snapshots, |off, cut| {
        for seed in 0..8 {
            off.reseed(seed);
            let dead = off.kill();
            let disk = open(&store(&dead, 3), "d1").expect("d1");
            disk.write(&[9; 4096], 4096).expect("write");
            disk.flush().expect("flush");
            for policy in [Policy::AllDropped, Policy::Random(seed)] {
                match open(&store(&dead.crash_with(policy), 4), "d1") {
                    Ok(disk) => assert_eq!(block(&*disk, 1), 9, "{cut}, seed {seed}"),
                    Err(e) => panic!("{cut}, seed {seed}: {e:?}"),
                }
            }
        }
    });
}

/// A process died in a fork after it named the disk and before it synced the names. The next one wrote to the disk and was told that it is
/// durable; a power cut took the name, and with it what was acknowledged.
#[test]
fn death_while_naming_then_a_flush_then_a_power_cut() {
    let forks = |sim: &SimDisk| {
        store(sim, 2)
            .create(&["new".to_string()], "image", None)
            .map(drop)
    };
    each_cut(&world(), forks, |off, cut| {
        let dead = off.kill();
        let store = store(&dead, 3);
        let Ok(disk) = open(&store, "new") else {
            return;
        };
        disk.write(&[9; 4096], 4096).expect("write");
        disk.flush().expect("flush");
        match open(&self::store(&dead.crash_with(Policy::AllDropped), 4), "new") {
            Ok(disk) => assert_eq!(block(&*disk, 1), 9, "{cut}"),
            Err(e) => panic!("{cut}: {e:?}"),
        }
    });
}

/// A process died in a removal after it took the name and before it synced the names. A collection removed the layer; a power cut brought the
/// name back, and nothing was behind it: not even a list of names could be had.
#[test]
fn death_while_removing_then_gc_then_a_power_cut() {
    let removes = |sim: &SimDisk| {
        let store = store(sim, 2);
        store.remove(&store.plan_removal(&["d1".to_string()], false)?)
    };
    each_cut(&world(), removes, |off, cut| {
        let dead = off.kill();
        store(&dead, 3).gc(false).expect("gc");
        for seed in 0..20 {
            let left = store(&dead.crash(seed), 4);
            let found = left
                .survey()
                .unwrap_or_else(|e| panic!("{cut}, seed {seed}: {e:?}"));
            assert!(found.sound.iter().any(|o| o.name == "image"));
            assert!(
                found.damaged.is_empty(),
                "{cut}, seed {seed}: {:?}",
                found.damaged
            );
        }
    });
}

/// A process died while it closed a disk: one copy of the superblock was durable, the other only in the page cache. The next
/// process wrote to the durable one first, the power went, and both copies were gone.
#[test]
fn death_while_closing_then_a_power_cut_while_opening() {
    let closes = |sim: &SimDisk| {
        let disk = open(&store(sim, 2), "d1")?;
        disk.write(&[7; 4096], 0)?;
        disk.close()
    };
    let opens = |sim: &SimDisk| open(&store(sim, 3), "d1").map(drop);
    each_cut(&world(), closes, |off, first| {
        each_cut(&off.kill(), opens, |off, second| {
            for seed in 0..150 {
                if let Err(e) = open(&store(&off.crash(seed), 4), "d1") {
                    panic!("death at {first}, power at {second}, seed {seed}: {e:?}");
                }
            }
        });
    });
}

/// A sync failed while a disk was closed, and its process ended. The next one saw in the page cache what was not on the disk, and what no later sync
/// would put there: it wrote to copy 2 of the superblock, the only good one, the power went, and both copies were gone.
#[test]
fn a_failed_sync_while_closing_then_a_power_cut_while_opening() {
    let opens = |sim: &SimDisk| open(&store(sim, 3), "d1").map(drop);
    // What becomes of what a failed sync was to write is chance.
    for chance in 0..48 {
        for nth in 0.. {
            let sim = world().kill();
            sim.set_garbage_pages(true);
            // Of one with a history something is written at once.
            if chance % 2 == 1 {
                let limits = Limits {
                    window: Some(1_000_000),
                    bytes: None,
                };
                let kept = store(&sim, 2).set_history(&["d1".to_string()], Some(limits));
                kept.expect("a history");
            }
            let disk = open(&store(&sim, 2), "d1").expect("d1");
            disk.write(&[7; 4096], 0).expect("write");
            sim.reseed(chance);
            sim.fail_nth(Verb::Sync, nth, FaultKind::Eio);
            if disk.close().is_ok() {
                assert!(nth > 2, "only {nth} syncs while it was closed");
                break;
            }
            sim.clear_faults();
            each_cut(&sim, opens, |off, cut| {
                for seed in 0..12 {
                    if let Err(e) = open(&store(&off.crash(seed), 4), "d1") {
                        panic!("{chance}: sync {nth} failed, power at {cut}, seed {seed}: {e:?}");
                    }
                }
            });
        }
    }
}

/// A power cut tore copy 2 of the superblock, which a checkpoint leaves to the next sync. Recovery wrote to copy 1, the only good one;
/// the power went again, and both copies were gone.
#[test]
fn a_torn_second_copy_then_a_power_cut_during_recovery() {
    let sim = world();
    let disk = open(&store(&sim, 2), "d1").expect("d1");
    disk.write(&[7; 4096], 0).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    sim.set_garbage_pages(true);
    let opens = |sim: &SimDisk| open(&store(sim, 3), "d1").map(drop);
    for seed in 0..40 {
        each_cut(&sim.crash(seed), opens, |off, cut| {
            for again in 0..6 {
                match open(&store(&off.crash(seed << 8 | again), 4), "d1") {
                    Ok(disk) => assert_eq!(block(&*disk, 0), 7),
                    Err(e) => panic!("seeds {seed} and {again}, {cut}: {e:?}"),
                }
            }
        });
    }
}

/// A power cut tore copy 2 while a disk was closed. Who opened it wrote copy 1 once more, as it might have been in the page cache only, and another power cut tore
/// the only good copy.
#[test]
fn a_torn_second_copy_of_a_closed_disk_then_a_power_cut_while_opening() {
    let opens = |sim: &SimDisk| open(&store(sim, 3), "d1").map(drop);
    let closes = |sim: &SimDisk| {
        let disk = open(&store(sim, 2), "d1")?;
        disk.write(&[7; 4096], 0)?;
        disk.close()
    };
    let sim = world();
    sim.set_garbage_pages(true);
    each_cut(&sim, closes, |off, closing| {
        for seed in 0..48 {
            each_cut(&off.crash(seed), opens, |off, opening| {
                for again in 0..16 {
                    if let Err(e) = open(&store(&off.crash(seed << 8 | again), 4), "d1") {
                        panic!(
                            "power at {closing}, seed {seed}, at {opening}, seed {again}: {e:?}"
                        );
                    }
                }
            });
        }
    });
}

/// A power cut in a renaming kept the disk's new name and dropped that of its snapshot: nobody could complete it, as there was no disk of
/// the old name any more.
#[test]
fn a_renaming_can_be_completed() {
    let sim = world();
    store(&sim, 2).snapshot("d1", "s", None).expect("snapshot");
    let renames = |sim: &SimDisk| store(sim, 3).rename("d1", "new").map(drop);
    each_cut(&sim, renames, |off, cut| {
        for seed in 0..40 {
            let store = store(&off.crash(seed), 4);
            if store.resolve("new").is_err() {
                store
                    .rename("d1", "new")
                    .unwrap_or_else(|e| panic!("{cut}, seed {seed}: {e:?}"));
            }
            if let Err(e) = store.resolve("new@s") {
                panic!("{cut}, seed {seed}: {e:?}");
            }
        }
    });
}

/// A commit record that a power cut left half new, half old, over the record of a time before the last checkpoint. Every entry of it is sound,
/// and all the data it names is there: only the record's own checksum tells that it was never written.
#[test]
fn a_commit_record_is_believed_as_a_whole_or_not_at_all() {
    let sim = World::new(1, 250).sim.crash_with(Policy::AllDone);
    let disk = open(&store(&sim, 2), "d1").expect("d1");
    disk.write(&[5; 240 * 4096], 0).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    disk.write(&[7; 240 * 4096], 0).expect("write");
    sim.cut_at(sim.ops() + 1);
    disk.flush().expect_err("the power goes in the sync");
    for garbage_pages in [false, true] {
        sim.set_garbage_pages(garbage_pages);
        for seed in 0..1500 {
            let disk = open(&store(&sim.crash(seed), 3), "d1")
                .unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            let first = block(&*disk, 0);
            assert!(first == 5 || first == 7, "seed {seed}: {first}");
            let mut all = vec![0; 240 * 4096];
            disk.read(&mut all, 0)
                .unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
            assert!(
                all.iter().all(|b| *b == first),
                "seed {seed}: a mixture of two flushes"
            );
        }
    }
}

/// Rot in the journal of a disk that was not closed: where it hits the last commit it looks like a power cut, and the commit is dropped; where
/// it hits an earlier one, everything after it would be lost, and opening is refused.
#[test]
fn rot_before_the_last_commit_is_not_taken_for_a_crash() {
    let sim = world();
    let disk = open(&store(&sim, 2), "d1").expect("d1");
    for n in 1..5u8 {
        disk.write(&[n; 4096], u64::from(n) * 4096).expect("write");
        disk.flush().expect("flush");
    }
    let dead = sim.crash_with(Policy::AllDropped);
    let path = layer_of(&dead, "d1");
    for record in 0..4u64 {
        // Magic, sequence, generation, layer, entries, slots, sum, the entry.
        for byte in [0, 8, 16, 24, 40, 44, 56, 64, 68, 72] {
            let rotten = dead.crash_with(Policy::AllDone);
            let at = (4 + record) * 4096 + byte;
            rotten.flip(&path, at, 1 << (byte % 8)).expect("flip");
            let reopened = store(&rotten, 3);
            let object = reopened.resolve("d1").expect("d1");
            let reader = reopened.open_disk(&object, false).map(drop);
            let writer = open(&reopened, "d1");
            let story = format!("record {record}, byte {byte}");
            if record < 3 {
                let e = writer.map(drop).expect_err(&story);
                assert_eq!(e.kind(), Kind::Corrupt, "{story}: {e:?}");
                assert_eq!(reader.expect_err(&story).kind(), Kind::Corrupt);
            } else {
                reader.unwrap_or_else(|e| panic!("{story}: {e:?}"));
                let disk = writer.unwrap_or_else(|e| panic!("{story}: {e:?}"));
                assert_eq!(block(&*disk, 3), 3, "{story}");
                assert!(disk.private_blocks().0 == 3, "{story}: dropped as a whole");
            }
        }
    }
}
/// Path of the layer file of a disk.
fn layer_of(sim: &SimDisk, disk: &str) -> String {
    let id = store(sim, 9).resolve(disk).expect("a disk").id;
    format!("layers/{id}.layer")
}
