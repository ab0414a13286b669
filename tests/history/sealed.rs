//! The part of a history that sealed layers keep: it goes on over snapshots, and ends with nothing that does not say so.

use super::*;
use forkdisk::disk::cow::MAX_REWIND;
use forkdisk::store::Below;

/// The history goes on over snapshots, also of a disk at rest, and over their removal: the points of a sealed layer can be shown, forked, and gone back
/// to. Without the setting nothing is kept of any of them.
#[test]
fn a_history_goes_on_over_snapshots() {
    let mut world = World::new(6, 40, limits(Some(1000), None));
    let mut numbers = vec![0];
    for i in 0..24u64 {
        world.write(i % 5 * B, &noise(i, 2 * B));
        world.discard((i * 3 + 1) % 40 * B, B);
        numbers.push(world.flush());
        match i % 6 {
            1 => world.snapshot(),
            4 => {
                world.close();
                let name = world.next_snapshot();
                world.store.snapshot("d", &name, None).expect("a snapshot");
            }
            _ => {}
        }
    }
    assert_eq!(numbers, (0..25).collect::<Vec<_>>());
    assert_eq!(world.look_back(&mut Rng(6)), numbers);
    // There and back again, over several layers, at rest and attached.
    for (number, undone) in [(3, 25), (24, 26), (11, 27), (26, 28)] {
        assert!(world.rewind(number));
        world.points.insert(undone, world.now.clone());
    }
    for (number, undone) in [(2, 29), (28, 30), (29, 31)] {
        let disk = world.open();
        let back = world.store.rewind_running(&disk, "d", At::Number(number));
        assert!(back.expect("back").undoable);
        world.now = world.points[&number].clone();
        world.points.insert(undone, world.now.clone());
        same(&read_all(&*disk).expect("read"), &world.now, number);
        drop(disk);
        world.close();
    }
    assert_eq!(world.look_back(&mut Rng(7)), (0..32).collect::<Vec<_>>());
    let held = world.store.history("d").expect("a history").bytes;
    assert!(held > 30 * B, "{held}");
    // A snapshot that goes takes what was before the next one with it: else blocks would stay that no limit counts.
    let third = world.store.resolve("d@s3").expect("a snapshot").id;
    let file = world
        .store
        .layers_dir()
        .open(&forkdisk::store::layer_file(third), Access::Read)
        .expect("its file");
    let (end, _) = forkdisk::layer::ReadLayer::open(file)
        .expect("open")
        .ended();
    let plan = world.store.plan_removal(&["d@s2".to_string()], false);
    let plan = plan.expect("a plan");
    let (used, held) = (
        world.sim.used(),
        world.store.history("d").expect("it").bytes,
    );
    world.store.remove(&plan).expect("removed");
    let given = held - world.store.history("d").expect("it").bytes;
    assert!(given > 0 && plan.frees >= given, "{given} of {plan:?}");
    assert!(used - world.sim.used() >= plan.frees);
    assert_eq!(world.store.gc(true).expect("gc").bytes, 0);
    assert_eq!(world.look_back(&mut Rng(8)), (end..32).collect::<Vec<_>>());
    let name = ["d".to_string()];
    world.store.set_history(&name, None).expect("none");
    world.open();
    world.close();
    assert!(world.number().is_empty());
    let error = world
        .store
        .rewind("d", At::Number(0), &Quiet)
        .expect_err("no history");
    assert_eq!(error.kind(), Kind::NotFound);
    assert_eq!(world.store.gc(true).expect("gc").layers, []);
    audit::layers(&world.sim, "snapshot");
}

/// What is too old or too much goes from sealed layers, too, by the housekeeping; the host's full disk takes it first.
#[test]
fn what_sealed_layers_keep_expires() {
    // A window.
    let mut world = World::new(31, 40, limits(Some(100), None));
    let start = world.clock.load(Ordering::SeqCst);
    for i in 0..30u64 {
        world.clock.store(start + 10 * i, Ordering::SeqCst);
        world.write(i % 3 * B, &noise(i, B));
        world.flush();
        if i % 4 == 3 {
            world.snapshot();
        }
        world.open().maintain().expect("maintain");
    }
    let points = world.store.history("d").expect("a history").points;
    // A segment of this window spans more than a second, so that each of these is one.
    assert_eq!(points[0].time, (start + 190) * 1000);
    assert_eq!(points.len(), 11);
    let kept = world.look_back(&mut Rng(31));
    assert_eq!(kept, (20..31).collect::<Vec<_>>());
    // A budget, over many snapshots.
    let mut world = World::new(32, 40, limits(None, Some(20 * B)));
    for i in 0..200u64 {
        world.write(i % 5 * B, &noise(i, B));
        world.flush();
        if i % 7 == 6 {
            world.snapshot();
        }
        world.open().maintain().expect("maintain");
        let held = world.open().history_bytes();
        assert!(held <= 22 * B, "{held} bytes are held");
    }
    let kept = world.look_back(&mut Rng(32));
    // What a layer replaces of those below it takes no room.
    assert!((20..=60).contains(&kept.len()), "{kept:?}");
    assert_eq!(world.store.gc(true).expect("gc").bytes, 0);
    // Layers without end.
    let mut world = World::new(33, 40, limits(Some(1_000_000), None));
    for i in 0..300u64 {
        world.write(i % 5 * B, &noise(i, B));
        world.snapshot();
        world.open().maintain().expect("maintain");
    }
    let kept = world.number();
    assert!((100..=140).contains(&kept.len()), "{}", kept.len());
    assert_eq!(kept.last(), Some(&300));
}

/// A disk that was smaller, or larger, shows its past as it was, in the size that it has now.
#[test]
fn a_past_of_another_size_shows_no_more_than_there_was() {
    let mut world = World::new(34, 40, limits(Some(1000), None));
    world.write(2 * B, &noise(1, B));
    world.close();
    world.store.resize("d", 20 * B).expect("smaller");
    let mut small = world.now[..20 * B as usize].to_vec();
    let disk = world.open();
    disk.write(&noise(2, B), 3 * B).expect("write");
    small[3 * B as usize..4 * B as usize].copy_from_slice(&noise(2, B));
    disk.flush().expect("flush");
    let (_, number) = disk.point().expect("writable");
    world.snapshot();
    let done = world.store.resize_running(&disk, "d", 60 * B);
    assert_eq!(done.expect("larger").size, 60 * B);
    for block in [2, 30, 31, 50] {
        disk.write(&noise(block, B), block * B).expect("write");
    }
    disk.discard(5 * B, B).expect("discard");
    disk.flush().expect("flush");
    let (_, late) = disk.point().expect("writable");
    let large = read_all(&*disk).expect("read");
    small.resize(60 * B as usize, 0);
    for (number, expected) in [(number, &small), (late, &large)] {
        let back = world.store.rewind_running(&disk, "d", At::Number(number));
        back.expect("back");
        same(&read_all(&*disk).expect("read"), expected, number);
    }
    // A fork has the size that the disk has now.
    let settings = Extra::default();
    let mut writer = Writer {
        disk: disk.clone(),
        hold: None,
    };
    let made = fork_of("f", number, &settings);
    let made = world
        .store
        .create_at_with(&made, Some(&mut writer), &Quiet)
        .expect("a fork");
    let fork = world.store.open_disk(&made, false).expect("open");
    same(&read_all(&*fork).expect("read"), &small, number);
    disk.close().expect("close");
    audit::layers(&world.sim, "sizes");
}

/// A layer that a fork needs as well keeps its part of the history. When the fork is gone, the history costs what nobody else needs: it goes, and the layers can
/// be joined. So it is with a layer that was sealed for a reader.
#[test]
fn a_history_has_no_part_in_layers_that_nobody_else_needs() {
    let mut world = World::new(35, 40, limits(Some(1000), None));
    let disk = world.open();
    let forks: Vec<String> = (0..6).map(|i| format!("f{i}")).collect();
    for (i, name) in forks.iter().enumerate() {
        world.write(i as u64 % 5 * B, &noise(i as u64, B));
        world.flush();
        let fork = std::slice::from_ref(name);
        let made = world.store.create_from_running(&disk, "d", fork, None);
        made.expect("a fork");
    }
    let idle = |world: &World| {
        let found = world.store.idle_stretch("d", &disk, 3).expect("looked");
        found.map_or(0, |found| found.layers)
    };
    assert_eq!(idle(&world), 0);
    assert_eq!(world.number(), (0..7).collect::<Vec<_>>());
    let plan = world.store.plan_removal(&forks[2..3], false);
    world.store.remove(&plan.expect("a plan")).expect("removed");
    assert_eq!(world.number(), [4, 5, 6]);
    world.write(0, &noise(99, B));
    world.flush();
    world.store.settle_running(&disk, "d").expect("sealed");
    assert_eq!(world.number(), [7]);
    assert_eq!(disk.history_bytes(), 0);
    for fork in &forks {
        if let Ok(plan) = world.store.plan_removal(std::slice::from_ref(fork), false) {
            world.store.remove(&plan).expect("removed");
        }
    }
    assert_eq!(idle(&world), 7);
    assert_eq!(read_all(&*disk).expect("read"), world.now);
}

/// On a full host disk the oldest goes first, which sealed layers keep, and no write fails.
#[test]
fn a_full_disk_takes_what_sealed_layers_keep() {
    let mut world = World::new(36, 40, limits(Some(1_000_000), None));
    for i in 0..300u64 {
        world.write(i % 20 * B, &noise(i, B));
        world.flush();
        if i % 50 == 49 {
            world.snapshot();
        }
    }
    let before = world.number();
    assert!(before.len() > 300, "{before:?}");
    // The snapshots themselves stay; what was replaced before they were taken is room.
    world.sim.set_capacity(Some(world.sim.used() + 2 * B));
    for i in 0..40u64 {
        world.write(i % 20 * B, &noise(i + 1000, B));
        if i % 5 == 0 {
            world.flush();
        }
    }
    assert_eq!(read_all(&*world.open()).expect("read"), world.now);
    world.sim.set_capacity(None);
    let kept = world.look_back(&mut Rng(36));
    assert!(kept[0] > before[0], "the oldest went");
    assert!(kept.contains(&300), "and not what is newer: {kept:?}");
}

/// What a point shows of layers below stays: what has been written over since hides it for the present only. And what the layer of a point says nothing of
/// comes back from below.
#[test]
fn a_past_is_seen_through_to_what_is_hidden_now() {
    let mut world = World::new(37, 2000, limits(Some(1000), None));
    let name = ["d".to_string()];
    // Below, without a history.
    world.store.set_history(&name, None).expect("none");
    world.close();
    world.write(0, &noise(1, 300 * B));
    world.write(700 * B, &noise(2, 300 * B));
    world.snapshot();
    world.close();
    world
        .store
        .set_history(&name, Some(limits(Some(1000), None)))
        .expect("a history");
    world.points.clear();
    world.write(1400 * B, &noise(3, B));
    let before = world.flush();
    world.write(0, &noise(4, 1300 * B));
    world.flush();
    world.snapshot();
    world.write(0, &noise(5, 20 * B));
    world.write(1300 * B, &noise(6, 300 * B));
    world.discard(1800 * B, 20 * B);
    let last = world.flush();
    world.close();
    // A fork that hides all of it keeps the layer, when the snapshot has lost its name.
    let fork = world.store.create(&["f".to_string()], "d@s1", None);
    let fork = world.store.open_cow(&fork.expect("a fork")[0], true);
    let fork = fork.expect("open");
    fork.write(&noise(8, 1000 * B), 0).expect("write");
    fork.close().expect("close");
    drop(fork);
    let plan = world.store.plan_removal(&["d@s1".to_string()], false);
    world.store.remove(&plan.expect("a plan")).expect("removed");
    assert_eq!(world.store.gc(false).expect("gc").bytes, 0);
    assert!(world.rewind(before));
    assert!(world.rewind(last));
    world.look_back(&mut Rng(37));
    // Nobody wants to see it any more: then it goes.
    world.store.set_history(&name, None).expect("none");
    world.open();
    world.close();
    assert_eq!(world.store.gc(false).expect("gc").bytes, 600 * B);
    same(&read_all(&*world.open()).expect("read"), &world.now, last);
    world.close();
    audit::layers(&world.sim, "hidden");
}

/// A disk of which more has changed than goes back in one step.
fn large(world: &World) -> (u64, u64) {
    let blocks = MAX_REWIND + 5000;
    let name = ["large".to_string()];
    let store = &world.store;
    store
        .create(&name, "image", Some(blocks * B))
        .expect("a disk");
    store
        .set_history(&name, Some(limits(Some(100_000), None)))
        .expect("a history");
    let disk = store.open_cow(&store.resolve("large").expect("large"), true);
    let disk = disk.expect("open");
    disk.write(&noise(7, B), 3 * B).expect("write");
    disk.flush().expect("flush");
    let number = disk.point().expect("writable").1;
    disk.discard(0, blocks * B).expect("discard");
    disk.close().expect("close");
    (number, blocks)
}

fn block_of(world: &World, name: &str, block: u64) -> Vec<u8> {
    let object = world.store.resolve(name).expect(name);
    let disk = world.store.open_disk(&object, false).expect(name);
    let mut found = vec![0; B as usize];
    disk.read(&mut found, block * B).expect("read");
    found
}

/// A snapshot that was interrupted between its two names: the disk and the snapshot are one layer. A rewind that makes a new layer leaves the snapshot what
/// it is, and so does a rollback; what is left of the history is nobody's.
#[test]
fn an_interrupted_snapshot_survives_a_large_rewind() {
    for rollback in [false, true] {
        let mut world = World::new(40, 40, limits(Some(1000), None));
        let (number, blocks) = large(&world);
        let names = world.store.names_dir().clone();
        let file = names.open("large", Access::Read).expect("its name");
        let mut record = vec![0; file.len().expect("a length") as usize];
        file.read_at(&mut record, 0).expect("its record");
        world.store.snapshot("large", "s", None).expect("taken");
        names.remove("large").expect("removed");
        let file = names.open("large", Access::CreateNew).expect("again");
        file.write_at(&record, 0).expect("as it was");
        file.sync().expect("sync");
        let snapshot = world.store.resolve("large@s").expect("a snapshot");
        assert_eq!(world.store.resolve("large").expect("large").id, snapshot.id);
        if rollback {
            world.store.rollback("large", "s").expect("back");
            assert_eq!(block_of(&world, "large", 3), vec![0; B as usize]);
        } else {
            let done = world.store.rewind("large", At::Number(number), &Quiet);
            let done = done.expect("back");
            assert_eq!((done.undoable, done.blocks), (false, blocks));
            assert_eq!(block_of(&world, "large", 3), noise(7, B));
        }
        assert_eq!(block_of(&world, "large@s", 3), vec![0; B as usize]);
        world.close();
        world.store.gc(false).expect("gc");
        assert_eq!(world.store.gc(true).expect("gc").bytes, 0);
        assert_eq!(block_of(&world, "large@s", 3), vec![0; B as usize]);
        let held = world.store.layers().expect("layers").sound;
        assert!(held.iter().any(|l| l.id == snapshot.id));
        audit::layers(&world.sim, "interrupted");
    }
}

/// Layers are joined, and what nothing needs any more goes, while a point of one of them is being copied: the copy is whole, or there is none; what it stands
/// on is not gone.
#[test]
fn what_is_joined_while_its_past_is_copied_makes_no_broken_fork() {
    for rewind in [false, true] {
        let mut world = World::new(41, 40, limits(Some(1000), None));
        let (_, blocks) = large(&world);
        let store = &world.store;
        store.snapshot("large", "a", None).expect("taken");
        let write = |seed: u64| {
            let object = store.resolve("large").expect("large");
            let disk = store.open_cow(&object, true).expect("open");
            for block in 0..300 {
                let data = noise(seed << 20 | block, B);
                disk.write(&data, block * B).expect("write");
            }
            disk.flush().expect("flush");
            let number = disk.point().expect("writable").1;
            disk.discard(0, blocks * B).expect("discard");
            disk.close().expect("close");
            number
        };
        let number = write(1);
        store.snapshot("large", "b", None).expect("taken");
        write(2);
        let mut done = false;
        let meanwhile = Meanwhile(Mutex::new(|_: u64| {
            if std::mem::replace(&mut done, true) {
                return;
            }
            let plan = store.plan_squash("large", false).expect("a plan");
            assert_eq!(plan.layers, 2);
            let squashed = store.squash(plan, &Quiet).expect("squashed");
            store.collect_former(&squashed.former).expect("collected");
            store.gc(false).expect("gc");
        }));
        let at = At::Number(number);
        let made = match rewind {
            true => store.rewind("large", at, &meanwhile).map(|_| ()),
            false => store
                .create_at("fork", "large", at, None, &meanwhile)
                .map(|_| ()),
        };
        assert_eq!(made.expect_err("it went").kind(), Kind::Busy);
        assert_eq!(block_of(&world, "large", 5), vec![0; B as usize]);
        assert!(world.store.resolve("fork").is_err());
        world.close();
        world.store.gc(false).expect("gc");
        assert_eq!(block_of(&world, "large", 5), vec![0; B as usize]);
        audit::layers(&world.sim, "joined");
    }
}

/// Layers with the history of one disk are not joined for another, unless all layers are to be; then it is known whose history that ends.
#[test]
fn a_squash_of_a_fork_leaves_the_history_of_its_origin() {
    let mut world = World::new(42, 40, limits(Some(1000), None));
    for i in 0..3u64 {
        world.write(i * B, &noise(i, B));
        world.flush();
        world.write(i * B, &noise(i + 10, B));
        world.flush();
        world.snapshot();
    }
    let store = &world.store;
    store
        .create(&["y".to_string()], "d@s3", None)
        .expect("a fork");
    assert!(store.plan_squash("y", false).expect("a plan").layers < 2);
    let plan = store.plan_squash("y", true).expect("a plan");
    assert_eq!(plan.layers, 3);
    let whose = store.histories_in(&plan.members()).expect("looked");
    assert_eq!(whose.len(), 1);
    assert_eq!(whose[0].name, "d");
    let others = [Below::Base(whose[0].id)];
    assert!(store.histories_in(&others).expect("looked").is_empty());
    drop(plan);
    let before = world.number();
    let plan = world.store.plan_squash("d", false).expect("a plan");
    assert_eq!(plan.layers, 3);
    drop(plan);
    assert_eq!(world.number(), before);
    world.look_back(&mut Rng(42));
}

/// A part that is damaged keeps neither the housekeeping nor what is newer from going on.
#[test]
fn a_damaged_part_keeps_nothing_from_going_on() {
    let mut world = World::new(43, 40, limits(Some(100), None));
    for i in 0..6u64 {
        world.write(0, &noise(i, B));
        world.flush();
        world.write(0, &noise(i + 10, B));
        world.flush();
        world.snapshot();
    }
    let first = world.store.resolve("d@s1").expect("a snapshot").id;
    let file = world.store.layers_dir();
    let file = file
        .open(&forkdisk::store::layer_file(first), Access::Write)
        .expect("its file");
    let layer = forkdisk::layer::ReadLayer::open(file.clone()).expect("a layer");
    let segment = layer.superblock().history_slot.get();
    file.write_at(&[0xAA; 100], u64::from(segment) * B + 200)
        .expect("damaged");
    world.clock.fetch_add(10_000, Ordering::SeqCst);
    let disk = world.open();
    for _ in 0..3 {
        disk.maintain().expect("it goes on");
    }
    assert_eq!(world.number().len(), 1);
    assert_eq!(disk.history_bytes(), 0);
    assert_eq!(read_all(&*disk).expect("read"), world.now);
}

/// Power cuts at each operation of giving back what sealed layers keep, all of it and a part: snapshots and disk are what they were, and in the end nothing of
/// it is left but what may stay.
#[test]
fn what_goes_of_a_sealed_layer_goes_whatever_the_moment() {
    for whole in [true, false] {
        let mut cut = 0;
        loop {
            let mut world = World::new(44, 600, limits(Some(100), None));
            // Held slots in many pieces: more than a superblock has room for.
            world.write(0, &noise(1, 500 * B));
            world.flush();
            for round in 0..2 {
                for i in 0..200 {
                    world.write((i * 2 + round) * B, &noise(i + 1000 * round, B));
                }
                world.clock.fetch_add(50, Ordering::SeqCst);
                world.flush();
                world.open().checkpoint().expect("checkpoint");
            }
            world.snapshot();
            let snapshot = world.now.clone();
            world.write(0, &noise(9, 3 * B));
            world.flush();
            let ago = if whole { 10_000 } else { 70 };
            world.clock.fetch_add(ago, Ordering::SeqCst);
            let disk = world.open();
            let before = disk.history_bytes();
            let ops = world.sim.ops();
            world.sim.cut_at(ops + cut);
            let _ = disk.maintain();
            let ended = !world.sim.is_off();
            drop(disk);
            for policy in [
                Policy::AllDone,
                Policy::AllDropped,
                Policy::Random(cut),
                Policy::Random(cut + 1000),
            ] {
                let story = format!("cut {cut}, {policy:?}");
                let left = world.sim.crash_with(policy);
                let env = env(44, 7 + cut, &world.clock);
                let store = Store::open_on(left.root(), Path::new("/sim"), env).expect("a store");
                let shown = |name: &str| {
                    let object = store.resolve(name).expect(name);
                    read_all(&*store.open_disk(&object, false).expect(name)).expect(name)
                };
                assert!(shown("d@s1") == snapshot, "{story}");
                let object = store.resolve("d").expect("d");
                let disk = store.open_cow(&object, true).expect("open");
                assert!(read_all(&*disk).expect("read") == world.now, "{story}");
                for _ in 0..2 {
                    disk.maintain().expect("maintain");
                }
                let after = disk.history_bytes();
                assert!(
                    after < before / 3 * 2 && (after == 0) == whole,
                    "{story}: {after}"
                );
                let points = store.history("d").expect("a history").points;
                assert_eq!(points.len(), if whole { 1 } else { 3 }, "{story}");
                if !whole {
                    // What a part that went left behind goes with the next one.
                    let now = world.clock.fetch_add(10_000, Ordering::SeqCst);
                    disk.maintain().expect("maintain");
                    world.clock.store(now, Ordering::SeqCst);
                }
                disk.close().expect("close");
                drop(disk);
                assert_eq!(store.gc(true).expect("gc").bytes, 0, "{story}");
                let report = forkdisk::check::check(&store, None, &Quiet).expect("checked");
                assert!(report.corruptions.is_empty(), "{story}: {report:?}");
                assert!(report.leaks.is_empty(), "{story}: {report:?}");
                audit::layers(&left, &story);
            }
            if ended {
                assert!(cut > 8, "there was something to cut: {cut}");
                break;
            }
            cut += 1;
        }
    }
}

/// A burst that is many times the limit, right after a snapshot: nothing that is newer goes before what is older, which the sealed layer keeps.
#[test]
fn the_oldest_goes_first_over_snapshots() {
    let mut world = World::new(45, 600, limits(None, Some(64 * B)));
    for round in 0..3u64 {
        for i in 0..6 {
            world.write(i * B, &noise(round << 8 | i, 4 * B));
            world.flush();
        }
        world.snapshot();
        for i in 0..10 {
            world.write(20 * B, &noise(round << 16 | i, 40 * B));
            world.flush();
            let numbers = world.number();
            let first = numbers[0];
            let all = first..first + numbers.len() as u64;
            assert_eq!(numbers, all.collect::<Vec<_>>());
            assert!(world.open().history_bytes() <= 180 * B);
        }
    }
    world.look_back(&mut Rng(45));
}
