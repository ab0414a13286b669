//! Costs in calls of the seam: time is reported elsewhere, this is asserted.

use super::*;
use forkdisk::io::Access;
use forkdisk::io::count::Counts;

fn cost(counting: &Counting, f: impl FnOnce()) -> Counts {
    let before = counting.counts();
    f();
    counting.counts() - before
}

#[test]
fn a_flush_is_one_write_and_one_sync() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 40 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    // The first write reserves space for the journal.
    disk.write(&[1; 4096], 0).expect("write");
    disk.flush().expect("flush");
    for n in [1, 7, 30] {
        disk.write(&vec![n; usize::from(n) * 4096], 4096)
            .expect("write");
        disk.discard(35 * 4096, 4096).expect("discard");
        let cost = cost(&counting, || disk.flush().expect("flush"));
        assert_eq!((cost.writes, cost.syncs), (1, 1), "{cost:?}");
        assert_eq!(
            (cost.dir_syncs, cost.fs_syncs, cost.reads),
            (0, 0, 0),
            "{cost:?}"
        );
        assert_eq!(
            cost.bytes_written, 4096,
            "one slot of the journal: {cost:?}"
        );
    }
}

/// A disk that syncs often finds its next slots written, a few at first; one at rest gives them back.
#[test]
fn slots_are_written_ahead_for_a_disk_that_syncs_often() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 600 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let step = |n: u64| {
        cost(&counting, || {
            disk.write(&[7; 4096], n * B).expect("write");
            disk.flush().expect("flush");
        })
    };
    let seldom: Vec<u64> = (0..8).map(|n| step(n).bytes_written).collect();
    // Data, record, and what the journal takes at once.
    assert!(seldom.iter().all(|&b| b <= 2 * B + 16 * B), "{seldom:?}");
    assert_eq!(seldom[4], 2 * B, "{seldom:?}");
    let often: Vec<u64> = (8..500).map(|n| step(n).bytes_written).collect();
    let ahead = often.iter().sum::<u64>() - often.len() as u64 * 2 * B;
    assert!(
        (492 * B..=(492 + 492 + 512) * B).contains(&ahead),
        "{ahead}"
    );
    // Most flushes are what they were.
    let small = often.iter().filter(|&&b| b == 2 * B).count();
    assert!(small > often.len() * 8 / 10, "{small}");

    let layers = sim.root().subdir("layers").expect("layers");
    let id = store.resolve("d").expect("d").id;
    let file = layers
        .open(&format!("{id}.layer"), Access::Read)
        .expect("its file");
    let allocated = || file.allocated().expect("known");
    let busy = allocated();
    for _ in 0..20 {
        disk.maintain().expect("maintained");
    }
    let rest = allocated();
    assert!(busy - rest >= 100 * B, "{busy} {rest}");
    assert!(rest <= (500 + 64 + 520) * B, "{rest}");
}

/// Two blocks of such a disk need no two free slots side by side: written ones are worth more.
#[test]
fn a_disk_that_syncs_often_takes_written_slots_wherever_they_are() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 600 * 4096]));
    let (store, _) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let layers = sim.root().subdir("layers").expect("layers");
    let id = store.resolve("d").expect("d").id;
    let file = layers
        .open(&format!("{id}.layer"), Access::Read)
        .expect("its file");
    let sync = |at: u64, blocks: usize| {
        disk.write(&vec![at as u8; blocks * 4096], at * B)
            .expect("write");
        disk.flush().expect("flush");
    };
    (0..400).for_each(|n| sync(n, 1));
    // Every second one goes: what becomes free has no free neighbours.
    for n in 0..200 {
        disk.discard(n * 2 * B, B).expect("discard");
    }
    disk.flush().expect("flush");
    disk.flush().expect("flush");
    let before = file.allocated().expect("known");
    (200..280).for_each(|n| sync(n * 2, 2));
    let after = file.allocated().expect("known");
    // They need 160, which are there.
    assert!(after - before <= 20 * B, "{before} {after}");
    let mut buf = [0; 2 * 4096];
    for n in 200..280 {
        disk.read(&mut buf, n * 2 * B).expect("read");
        assert!(buf.iter().all(|&b| b == (n * 2) as u8), "{n}");
    }
}

/// Whoever trims a filesystem may not flush it for long: what is worth it is committed when the disk is quiet.
#[test]
fn what_is_discarded_goes_without_a_flush() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 600 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let layers = sim.root().subdir("layers").expect("layers");
    let id = store.resolve("d").expect("d").id;
    let file = layers
        .open(&format!("{id}.layer"), Access::Read)
        .expect("its file");
    let maintain = |times| (0..times).for_each(|_| disk.maintain().expect("maintain"));
    disk.write(&[7; 500 * 4096], 0).expect("write");
    disk.flush().expect("flush");
    maintain(4);
    let full = file.allocated().expect("known");
    disk.discard(0, 400 * B).expect("discard");
    maintain(1);
    assert!(file.allocated().expect("known") >= full, "it may go on");
    maintain(8);
    let left = file.allocated().expect("known");
    assert!(left + 330 * B < full, "{left} of {full}");
    // Few blocks wait for whoever flushes.
    disk.discard(400 * B, 10 * B).expect("discard");
    let calls = cost(&counting, || maintain(8));
    assert_eq!((calls.writes, calls.syncs), (0, 0), "{calls:?}");
}

/// Who waits for a flush does not wait for what comes after it.
#[test]
fn what_can_wait_is_left_to_after_the_flush() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 1400 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let mut later = Counts::default();
    for n in 0..1300 {
        disk.write(&[7; 4096], n * B).expect("write");
        let flush = cost(&counting, || disk.flush_first().expect("flush"));
        assert_eq!((flush.writes, flush.syncs), (1, 1), "{n}: {flush:?}");
        assert_eq!(flush.bytes_written, B, "{n}: {flush:?}");
        let after = cost(&counting, || disk.tidy());
        later.bytes_written += after.bytes_written;
        later.syncs += after.syncs;
    }
    // Slots written ahead, and checkpoints.
    assert!(later.bytes_written >= 1000 * B, "{later:?}");
    assert!(later.syncs > 0, "{later:?}");
    let idle = cost(&counting, || disk.tidy());
    assert_eq!(idle.syncs, 0, "{idle:?}");
}

/// Who writes on and never flushes does not wait for a commit either: it comes when his write was answered, before the journal is full.
#[test]
fn who_never_flushes_does_not_wait_for_a_commit() {
    const MIB: u64 = 1 << 20;
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 4096]));
    let (store, counting) = counted(&sim);
    fork(&store, "image", "large", Some(1 << 30));
    let disk = open(&store, "large").expect("large");
    let zeros = vec![0; MIB as usize];
    let mut commits = 0;
    for n in 0..4096 {
        let write = cost(&counting, || {
            disk.write(&zeros, n % 1024 * MIB).expect("write");
        });
        assert_eq!(write.syncs, 0, "{n}: {write:?}");
        if disk.is_filling() {
            let after = cost(&counting, || disk.tidy());
            assert!(after.syncs > 0, "{n}: {after:?}");
            assert!(!disk.is_filling());
            commits += 1;
        }
    }
    // Each block of a mebibyte may need two entries; half of what there is room for is enough.
    assert!((10..=20).contains(&commits), "{commits}");
}

#[test]
fn a_flush_of_nothing_costs_nothing() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 40 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let first = cost(&counting, || disk.flush().expect("flush"));
    assert_eq!(first, Counts::default());
    disk.write(&[1; 4096], 0).expect("write");
    disk.flush().expect("flush");
    let second = cost(&counting, || disk.flush().expect("flush"));
    assert_eq!(second, Counts::default());
}

#[test]
fn a_full_block_write_reads_nothing() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 600 * 4096]));
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let cost = cost(&counting, || {
        for at in [0, 3, 511, 512, 300] {
            disk.write(&[2; 4 * 4096], at * B).expect("write");
        }
        disk.flush().expect("flush");
        disk.write(&[3; 8 * 4096], 0).expect("write");
    });
    assert_eq!((cost.reads, cost.maps), (0, 0), "{cost:?}");
    // Whole blocks, side by side, are one write; one is the record, and one the first slots of the journal, written once before use.
    assert_eq!(cost.writes, 5 + 1 + 1 + 1, "{cost:?}");
}

#[test]
fn a_fork_costs_the_same_whatever_it_is_of() {
    let mut seen = Vec::new();
    for blocks in [3u64, 700] {
        let sim = SimDisk::new(1);
        let store = store_with(&sim, &vec![1; (blocks * B) as usize]);
        let disk = open(&store, "d").expect("d");
        for n in 0..blocks {
            disk.write(&[7; 4096], n * B).expect("write");
        }
        disk.close().expect("close");
        drop(disk);
        store.snapshot("d", "s", None).expect("snapshot");
        drop(store);
        let (store, counting) = counted(&sim);
        seen.push(cost(&counting, || fork(&store, "image", "a", None)));
        seen.push(cost(&counting, || fork(&store, "d@s", "b", None)));
    }
    for cost in &seen {
        // Header and name, each synced, and both directories.
        assert_eq!(
            (cost.creates, cost.writes, cost.syncs),
            (2, 2, 2),
            "{cost:?}"
        );
        assert_eq!(
            (cost.dir_syncs, cost.fs_syncs, cost.renames),
            (2, 0, 1),
            "{cost:?}"
        );
    }
    // But for the digits of the numbers in text records.
    let seen: Vec<Counts> = seen
        .into_iter()
        .map(|c| Counts { bytes_read: 0, ..c })
        .collect();
    assert_eq!(seen[0], seen[2], "of an image");
    assert_eq!(seen[1], seen[3], "of a snapshot");
}

#[test]
fn many_forks_are_one_round_of_syncs() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 5 * 4096]));
    let (store, counting) = counted(&sim);
    for n in [2, 50] {
        let names: Vec<String> = (0..n).map(|i| format!("many-{n}-{i}")).collect();
        let cost = cost(&counting, || {
            store.create(&names, "image", None).expect("forks");
        });
        assert_eq!(
            (cost.syncs, cost.dir_syncs, cost.fs_syncs),
            (0, 1, 1),
            "{cost:?}"
        );
        assert_eq!((cost.writes, cost.renames), (2 * n, n), "{cost:?}");
    }
}

#[test]
fn a_running_snapshot_costs_the_same_whatever_the_disk_holds() {
    let mut seen = Vec::new();
    for blocks in [3u64, 700] {
        let sim = SimDisk::new(1);
        drop(store_with(&sim, &vec![1; (blocks * B) as usize]));
        let (store, counting) = counted(&sim);
        let disk = open(&store, "d").expect("d");
        disk.write(&vec![5; (blocks * B) as usize], 0)
            .expect("write");
        disk.flush().expect("flush");
        disk.checkpoint().expect("checkpoint");
        disk.write(&[6; 4096], 0).expect("write");
        seen.push(cost(&counting, || {
            store
                .snapshot_running(&disk, "d", "s", None)
                .expect("snapshot");
        }));
    }
    let syncs: Vec<u64> = seen.iter().map(|c| c.syncs + c.dir_syncs).collect();
    assert_eq!(syncs[0], syncs[1], "{seen:#?}");
    assert!(syncs[0] <= 14, "{seen:#?}");
}
