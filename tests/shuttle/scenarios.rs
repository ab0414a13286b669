//! The scenarios: each is run from its beginning under many schedules.

use crate::chain::{Budget, Place};
use crate::disk::{CowDisk, Disk, Source};
use crate::error::Kind;
use crate::io::sim::{FaultKind, Policy, Verb};
use crate::layer::quiesce::Quiesce;
use crate::rig::*;
use crate::sync::Mutex;
use crate::units::Region;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::atomic::{AtomicUsize as Shared, Ordering::SeqCst as Scheduled};
use shuttle::thread::{JoinHandle, spawn};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};

pub const ALL: &[(&str, fn())] = &[
    ("quiesce", quiesce),
    ("chain_cache", chain_cache),
    ("flushes_join", flushes_join),
    ("power_cut", power_cut),
    ("reuse_against_readers", reuse_against_readers),
    ("partial_writes", partial_writes),
    ("counts", counts),
    ("discards", discards),
    ("seals", seals),
    ("failed_sync", failed_sync),
    ("full_disk", full_disk),
    ("close", close),
    ("death", death),
];

fn all(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("a thread");
    }
}

fn below(n: u64) -> u64 {
    thread_rng().gen_range(0..n)
}

/// Readers hold what they found, one thread takes things out of the map and frees them when `Quiesce` says that nobody can know them.
fn quiesce() {
    struct World {
        quiesce: Quiesce,
        /// What the map names.
        current: Shared,
        freed: [AtomicBool; 8],
        /// Taken out, and in which epoch.
        waiting: Mutex<Vec<(u64, usize)>>,
    }
    let world = Arc::new(World {
        quiesce: Quiesce::default(),
        current: Shared::new(0),
        freed: Default::default(),
        waiting: Mutex::default(),
    });
    let mut threads = Vec::new();
    // Few threads and steps in half of the schedules: what takes a particular order is met sooner.
    let (readers, rounds) = [(1, 1), (2, 3)][below(2) as usize];
    for _ in 0..readers {
        let w = world.clone();
        threads.push(spawn(move || {
            for _ in 0..rounds {
                let _guard = w.quiesce.enter();
                let found = w.current.load(Scheduled);
                // A long look, during which the epoch could move on more than once.
                for _ in 0..16 {
                    shuttle::thread::yield_now();
                    assert!(!w.freed[found].load(SeqCst), "freed under a reader");
                }
            }
        }));
    }
    // What was taken out is noted by another thread than the one that moves the epoch on, and may come late to the list.
    let w = world.clone();
    threads.push(spawn(move || {
        for next in 1..w.freed.len() {
            let old = w.current.swap(next, Scheduled);
            let epoch = w.quiesce.now();
            w.waiting.lock().push((epoch, old));
        }
    }));
    let w = world.clone();
    threads.push(spawn(move || {
        for _ in 0..6 {
            let mut waiting = w.waiting.lock();
            let now = w.quiesce.advance();
            waiting.retain(|&(epoch, old)| {
                let free = epoch + 2 <= now;
                w.freed[old].store(free, SeqCst);
                !free
            });
        }
    }));
    all(threads);
    // Nothing waits for ever.
    let before = world.quiesce.now();
    assert!(world.quiesce.advance() >= before + 2 || world.quiesce.advance() >= before + 2);
}

/// Regions resolved by several threads at once, with room for few: every answer is right, and memory is counted.
fn chain_cache() {
    let world = World::new();
    let disk = world.disk();
    for n in 0..3 {
        disk.write(&bytes(1, 4096), n * 256 * B).expect("write");
    }
    world.create(2);
    disk.seal(None, |_, _| {
        Ok((world.layer(2), world.chain(1, &Budget::new(1 << 20))))
    })
    .expect("seal");
    disk.write(&bytes(2, 4096), 0).expect("write");
    disk.close().expect("close");
    let layer = |n| world.read_layer(n);
    // Not sealed, but it will not change any more.
    let layers = vec![layer(2), layer(1)];
    // 1: each answer drives out the one before. 7000: room for one of two.
    let limit = [1, 7000, 1 << 20][below(3) as usize];
    let budget = Budget::new(limit);
    let chain = Arc::new(crate::chain::Chain::new(
        layers,
        world.base(),
        budget.clone(),
    ));
    let mut threads = Vec::new();
    for thread in 0..3 {
        let chain = chain.clone();
        threads.push(spawn(move || {
            for round in 0..4 {
                let region = (thread + round) % 2;
                let mut places = [Place::Base; 512];
                chain
                    .places(Region(region), 0, &mut places)
                    .expect("places");
                for (index, expected) in [(0, [0, 1]), (1, [9, 9]), (256, [1, 9])] {
                    match (places[index], expected[region as usize]) {
                        (Place::Base, 9) => {}
                        (Place::Slot { depth, .. }, expected) if depth == expected => {}
                        (found, _) => panic!("region {region}, block {index}: {found:?}"),
                    }
                }
            }
        }));
    }
    all(threads);
    // Each thread may have put in one answer beside what was there.
    assert!(budget.used() <= limit + 3 * (7 << 10), "{}", budget.used());
    drop(chain);
    assert_eq!(budget.used(), 0, "memory is counted");
}

/// Flushes that come while one is under way join the next: none returns before what was written before it is durable.
fn flushes_join() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let world = Arc::new(world);
    let model = Arc::new(Model::new(2));
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (world, disk, model) = (world.clone(), disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                model.write(&*disk, writer).expect("write");
                model.flush(&*disk).expect("flush");
                // As if the power went now, and nothing that was not synced made it.
                let durable = model.durable();
                let left = World::of(world.sim.crash_with(Policy::AllDropped));
                model.check_moment(&left.open(1), durable);
            }
        }));
    }
    let (d, m) = (disk.clone(), model.clone());
    threads.push(spawn(move || {
        for _ in 0..2 {
            m.flush(&*d).expect("flush");
        }
        d.checkpoint().expect("checkpoint");
    }));
    all(threads);
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
    model.check_moment(&world.open(1), [3, 3]);
}

/// Writers, flushes, checkpoints and housekeeping until the power goes: what is found is of one moment, and nothing acknowledged is lost.
fn power_cut() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(3));
    world.sim.cut_at(world.sim.ops() + below(60));
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            while model.done()[writer] < 6 && model.write(&*disk, writer).is_ok() {}
        }));
    }
    for _ in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                if model.flush(&*disk).is_err() {
                    return;
                }
            }
        }));
    }
    let d = disk.clone();
    threads.push(spawn(move || {
        for _ in 0..2 {
            if d.checkpoint().and_then(|()| d.maintain()).is_err() {
                return;
            }
        }
    }));
    all(threads);
    for _ in 0..3 {
        let left = World::of(world.sim.crash(below(u64::MAX)));
        let disk = left.open(1);
        model.check_moment(&disk, model.durable());
        disk.close().expect("close");
        drop(disk);
        left.audit(1);
    }
}

/// Slots go round as fast as they can while readers copy: nobody sees another block's data, or an older state than was there when it began.
fn reuse_against_readers() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let newest = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let mut threads = Vec::new();
    for n in 0..2u64 {
        let (disk, newest) = (disk.clone(), newest.clone());
        threads.push(spawn(move || {
            for v in 1..4 {
                // Two numbers in one, so that a block of the other writer is known as such.
                disk.write(&bytes(v * 2 + n, 4096), n * B).expect("write");
                newest[n as usize].store(v, SeqCst);
                disk.flush().expect("flush");
                if n == 1 {
                    disk.checkpoint().expect("checkpoint");
                    disk.maintain().expect("maintain");
                }
            }
        }));
    }
    for _ in 0..2 {
        let (disk, newest) = (disk.clone(), newest.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                let n = below(2);
                let low = newest[n as usize].load(SeqCst);
                let found = version(&block(&*disk, n));
                if found == 0 {
                    assert_eq!(low, 0, "what lies below a written block");
                    continue;
                }
                assert_eq!(found % 2, n, "the other block's data");
                assert!(found / 2 >= low, "{} after {low}", found / 2);
            }
        }));
    }
    all(threads);
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
}

/// Two writers of halves of one block, a reader, and the commits between them: no half is lost.
fn partial_writes() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(1));
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                model.write(&*disk, writer).expect("write");
            }
        }));
    }
    let (d, m) = (disk.clone(), model.clone());
    threads.push(spawn(move || {
        for _ in 0..3 {
            m.check_bounds(&*d);
        }
    }));
    let d = disk.clone();
    threads.push(spawn(move || {
        d.flush().expect("flush");
        d.checkpoint().expect("checkpoint");
        d.flush().expect("flush");
    }));
    all(threads);
    model.check_moment(&*disk, [3, 3]);
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
    model.check_moment(&world.open(1), [3, 3]);
}

/// A block that is replaced is counted at every moment.
fn counts() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    disk.write(&bytes(1, 4096), 2 * B).expect("write");
    let d = disk.clone();
    let writer = spawn(move || {
        d.write(&bytes(2, 4096), 2 * B).expect("write");
        d.discard(0, 512 * B).expect("discard");
        d.write(&bytes(3, 4096), 2 * B).expect("write");
    });
    let d = disk.clone();
    let asker = spawn(move || {
        for _ in 0..4 {
            // Whoever forks a disk that has nothing of its own forks what is below it.
            assert_ne!(d.private_blocks(), (0, 0), "it has a block");
        }
    });
    all(vec![writer, asker]);
}

/// Whole regions are discarded and written while a checkpoint puts runs in their place: what lies below is never seen again.
fn discards() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let written = Arc::new(AtomicUsize::new(0));
    let mut threads = Vec::new();
    let (d, w) = (disk.clone(), written.clone());
    threads.push(spawn(move || {
        for v in 1..4 {
            d.write(&bytes(v, 4096), 2 * B).expect("write");
            w.store(v as usize, SeqCst);
            d.discard(0, 512 * B).expect("discard");
        }
    }));
    let (d, w) = (disk.clone(), written.clone());
    threads.push(spawn(move || {
        for _ in 0..3 {
            let before = w.load(SeqCst);
            let found = block(&*d, 2);
            let below = found.iter().all(|b| *b == BASE);
            assert!(!below || before == 0, "what lies below is seen");
            version(&found);
            for extent in d.extents(2 * B, B).expect("extents") {
                assert!(extent.from != Source::Base || before == 0);
            }
        }
    }));
    let d = disk.clone();
    threads.push(spawn(move || {
        for _ in 0..2 {
            d.flush().expect("flush");
            d.checkpoint().expect("checkpoint");
            d.maintain().expect("maintain");
        }
    }));
    // In the same region, but not the same block: both must survive, or be discarded.
    let d = disk.clone();
    threads.push(spawn(move || {
        d.write(&bytes(7, 2048), 3 * B).expect("write");
        d.discard(1024, 1024).expect("discard");
        // Zeros over zeros, which a checkpoint may just have put into a run.
        for _ in 0..2 {
            d.discard(512 * B, 512 * B).expect("discard");
        }
    }));
    all(threads);
    assert!(block(&*disk, 2).iter().all(|b| *b == 0));
    let counts = disk.private_blocks();
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
    assert_eq!(world.read_layer(1).counts(), counts);
    let disk = world.open(1);
    assert!(block(&disk, 2).iter().all(|b| *b == 0));
}

/// A disk is sealed under its writers: the snapshot is of one moment and stays, and they go on above it.
fn seals() {
    let world = Arc::new(World::new());
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(2));
    let budget = Budget::new(1 << 20);
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..4 {
                model.write(&*disk, writer).expect("write");
            }
        }));
    }
    let (d, m) = (disk.clone(), model.clone());
    threads.push(spawn(move || {
        m.flush(&*d).expect("flush");
        m.check_bounds(&*d);
        d.maintain().expect("maintain");
    }));
    let (w, d, m) = (world.clone(), disk.clone(), model.clone());
    threads.push(spawn(move || {
        for n in 2..4 {
            w.create(n);
            let low = m.done();
            d.seal(None, |_, _| Ok((w.layer(n), w.chain(n - 1, &budget))))
                .expect("seal");
            m.promised(low);
            let snapshot = CowDisk::read_only(w.chain(n - 1, &budget));
            m.check_moment(&snapshot, low);
            let before: Vec<_> = (0..2).map(|n| block(&snapshot, n)).collect();
            shuttle::thread::yield_now();
            let after: Vec<_> = (0..2).map(|n| block(&snapshot, n)).collect();
            assert!(before == after, "a snapshot changed");
        }
    }));
    all(threads);
    model.check_moment(&*disk, [4, 4]);
    model.flush(&*disk).expect("flush");
    let left = World::of(world.sim.crash_with(Policy::AllDropped));
    model.check_moment(&left.open(3), [4, 4]);
    drop(disk);
    for n in 1..4 {
        world.audit(n);
    }
}

/// One sync fails: no flush that begins after one was refused is acknowledged, and what was acknowledged before is there.
fn failed_sync() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(2));
    let refused = Arc::new(AtomicBool::new(false));
    world.sim.reseed(below(u64::MAX));
    world.sim.fail_nth(Verb::Sync, below(5), FaultKind::Eio);
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model, refused) = (disk.clone(), model.clone(), refused.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                let _ = model.write(&*disk, writer);
                let before = refused.load(SeqCst);
                match model.flush(&*disk) {
                    Ok(()) => assert!(!before, "acknowledged after a failed sync"),
                    Err(e) => {
                        assert!(matches!(e.kind(), Kind::Io | Kind::Poisoned), "{e:?}");
                        refused.store(true, SeqCst);
                    }
                }
            }
        }));
    }
    let (d, r) = (disk.clone(), refused.clone());
    threads.push(spawn(move || {
        for _ in 0..2 {
            let before = r.load(SeqCst);
            match d.checkpoint() {
                Ok(()) => assert!(!before, "a checkpoint after a failed sync"),
                Err(_) => r.store(true, SeqCst),
            }
        }
    }));
    all(threads);
    if refused.load(SeqCst) {
        disk.write(&bytes(9, 4096), 0).expect_err("it stopped");
        disk.flush().expect_err("it stopped");
    }
    drop(disk);
    world.sim.clear_faults();
    let left = World::of(world.sim.crash(below(u64::MAX)));
    model.check_moment(&left.open(1), model.durable());
    // The next process, without a power cut.
    let left = World::of(world.sim.kill());
    let disk = left.open(1);
    model.check_moment(&disk, model.durable());
    disk.close().expect("close");
}

/// The host disk is full for some of the time: writers are told, flushes never fail, and what was accepted is durable.
fn full_disk() {
    let world = Arc::new(World::new());
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(2));
    disk.write(&bytes(1, 4096), 300 * B).expect("write");
    disk.flush().expect("flush");
    world
        .sim
        .set_capacity(Some(world.sim.used() + below(5) * B));
    let told = |e: crate::error::Error| assert_eq!(e.kind(), Kind::NoSpace, "{e:?}");
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..4 {
                model.write(&*disk, writer).unwrap_or_else(told);
            }
        }));
    }
    let (d, m) = (disk.clone(), model.clone());
    threads.push(spawn(move || {
        for _ in 0..2 {
            m.flush(&*d).expect("what was accepted can be flushed");
            m.check_bounds(&*d);
        }
        d.checkpoint().unwrap_or_else(told);
    }));
    let (w, d) = (world.clone(), disk.clone());
    threads.push(spawn(move || {
        d.discard(300 * B, B).unwrap_or_else(told);
        if below(2) == 0 {
            w.sim.set_capacity(None);
        }
    }));
    all(threads);
    model
        .flush(&*disk)
        .expect("what was accepted can be flushed");
    let left = World::of(world.sim.crash_with(Policy::AllDropped));
    left.sim.set_capacity(None);
    model.check_moment(&left.open(1), model.done());
    world.sim.set_capacity(None);
    let before = model.done();
    model.write(&*disk, 0).expect("there is room again");
    assert_eq!(model.done()[0], before[0] + 1);
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
    model.check_moment(&world.open(1), model.done());
}

/// A disk is closed while others still write and flush: each is done or refused, and what was done is there.
fn close() {
    let world = World::new();
    let disk = Arc::new(world.disk());
    let model = Arc::new(Model::new(2));
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..3 {
                if model.write(&*disk, writer).is_err() || model.flush(&*disk).is_err() {
                    return;
                }
            }
        }));
    }
    let d = disk.clone();
    threads.push(spawn(move || d.close().expect("close")));
    let d = disk.clone();
    threads.push(spawn(move || {
        if let Err(e) = d.maintain() {
            assert_eq!(e.kind(), Kind::Poisoned, "{e:?}");
        }
    }));
    all(threads);
    let done = model.done();
    drop(disk);
    world.audit(1);
    model.check_moment(&world.open(1), done);
}

/// The process dies at any moment, and the next one goes on with what stands in the files and in the volatile log: all that was accepted is
/// there, flushed or not.
fn death() {
    let world = Arc::new(World::new());
    let memory = memory();
    let disk = Arc::new(world.disk_on(memory.clone()));
    let model = Arc::new(Model::new(2));
    let mut threads = Vec::new();
    for writer in 0..2 {
        let (disk, model) = (disk.clone(), model.clone());
        threads.push(spawn(move || {
            for _ in 0..4 {
                model.write(&*disk, writer).expect("write");
            }
        }));
    }
    let (d, m) = (disk.clone(), model.clone());
    threads.push(spawn(move || {
        for _ in 0..2 {
            m.flush(&*d).expect("flush");
            d.checkpoint().expect("checkpoint");
            d.maintain().expect("maintain");
        }
    }));
    // A discard of what one writer never wrote, so that zeros are in the log as well.
    let d = disk.clone();
    threads.push(spawn(move || {
        d.discard(3 * B, 600 * B).expect("discard");
    }));
    let (w, m) = (world.clone(), model.clone());
    threads.push(spawn(move || {
        for _ in 0..below(3) * 8 {
            shuttle::thread::yield_now();
        }
        // No other thread comes between these.
        let (low, durable) = (m.done(), m.durable());
        let (left, memory) = (World::of(w.sim.kill()), left_in(&memory));
        let successor = left.resume(1, memory);
        m.check_moment(&successor, low);
        // The next thing to happen is a power cut, before or after a flush of what was found.
        let cut = World::of(left.sim.crash_with(Policy::AllDropped));
        m.check_moment(&cut.open(1), durable);
        successor.write(&bytes(7, 4096), 700 * B).expect("write");
        successor.flush().expect("flush");
        let cut = World::of(left.sim.crash_with(Policy::AllDropped));
        m.check_moment(&cut.open(1), low);
    }));
    all(threads);
    disk.close().expect("close");
    drop(disk);
    world.audit(1);
    model.check_moment(&world.open(1), [4, 4]);
}
