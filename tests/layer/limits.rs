//! The smallest, the largest, the deepest.

use super::*;
use crate::common::read_all;
use crate::hooked::Hooked;
use forkdisk::disk::Source;
use forkdisk::error::Kind;
use forkdisk::format::MAX_DEPTH;
use forkdisk::io::sim::Policy;
use forkdisk::store::Env;
use forkdisk::store::history::Limits;
use forkdisk::units::MAX_DISK;

/// A read is begun before anybody looks whether it is within the disk.
#[test]
fn what_is_begun_lies_within_the_disk() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 40 * 4096 + 1]);
    fork(&store, "image", "big", Some(MAX_DISK));
    let hooked = Hooked::new(sim.root());
    let root = Arc::new(hooked.clone());
    let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
    let d = open(&store, "d").expect("d");
    d.write(&[2; 4096], 5 * B).expect("write");
    assert!(!d.begin_read(0, B), "all of it is in memory");
    hooked.cold();
    let begun = |disk: &CowDisk, at: u64, len: u64| {
        let begun = disk.begin_read(at, len);
        let asked = hooked.cold();
        assert_eq!(begun, !asked.is_empty());
        asked
    };
    assert_eq!(begun(&d, 0, B), [(0, B)]);
    assert_eq!(begun(&d, B + 100, B), [(B, 2 * B)]);
    // One of these blocks is its own.
    let asked = begun(&d, 4 * B, 3 * B);
    assert_eq!(asked.iter().map(|(_, len)| len).sum::<u64>(), 3 * B);
    assert_eq!((asked[0], asked[2]), ((4 * B, B), (6 * B, B)));
    let end = d.size();
    assert_eq!(begun(&d, end - B, 8 * B), [(end - B, B)]);
    for at in [end, end + B, MAX_DISK, MAX_DISK * 2, u64::MAX - B, u64::MAX] {
        assert_eq!(begun(&d, at, B), [], "{at}");
    }
    let big = open(&store, "big").expect("big");
    // Zeros, of which there is nothing to be read.
    assert_eq!(begun(&big, MAX_DISK - B, B), []);
    big.write(&[3; 4096], MAX_DISK - B).expect("write");
    assert_eq!(begun(&big, MAX_DISK - 2 * B, 4 * B).len(), 1);
    assert_eq!(begun(&big, MAX_DISK, B), []);
}

#[test]
fn sixteen_tebibytes_are_written_at_both_ends_and_discarded_as_a_whole() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 3 * 4096]);
    fork(&store, "image", "big", Some(MAX_DISK));
    let disk = open(&store, "big").expect("big");
    assert_eq!(disk.size(), MAX_DISK);
    let last = MAX_DISK / B - 1;
    disk.write(&[2; 4096], 0).expect("write");
    disk.write(&[3; 5000], MAX_DISK - 5000).expect("write");
    disk.write(&[4; 4096], MAX_DISK / 2).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    disk.write(&[2; 1], MAX_DISK).expect_err("past the end");
    disk.write(&[2; 2], MAX_DISK - 1).expect_err("past the end");
    disk.read(&mut [0; 2], u64::MAX).expect_err("past the end");
    assert_eq!(block(&*disk, last)[4095], 3);
    let before = sim.used();
    let start = std::time::Instant::now();
    disk.discard(0, MAX_DISK).expect("discard");
    disk.flush().expect("flush");
    let took = start.elapsed();
    // Eight million regions. Reported; the bound only catches a step for each block.
    eprintln!("discard of 16 TiB: {took:?}");
    assert!(took.as_secs() < 60, "{took:?}");
    disk.maintain().expect("maintain");
    for n in [0, 1, 511, 512, last / 2, last / 2 + 1, last - 1, last] {
        assert_eq!(block(&*disk, n), [0; 4096], "block {n}");
    }
    // One zero range: a record of a few entries.
    assert!(
        sim.used() <= before + 64 * B,
        "{} bytes more",
        sim.used() - before
    );
    let zeros = disk.extents(0, 1 << 36).expect("extents");
    assert!(
        zeros.len() == 1 && zeros[0].from == Source::Zero { depth: 0 },
        "{zeros:?}"
    );
    disk.write(&[9; 4096], last * B).expect("write");
    disk.flush().expect("flush");
    for policy in [Policy::AllDropped, Policy::AllDone] {
        let left = again(&sim.crash_with(policy), 3);
        let disk = open(&left, "big").expect("big");
        assert_eq!(block(&*disk, 0), [0; 4096]);
        assert_eq!(block(&*disk, last), [9; 4096]);
        assert_eq!(disk.private_blocks(), (1, last));
    }
    disk.close().expect("close");
    drop(disk);
    let disk = open(&store, "big").expect("big");
    assert_eq!(block(&*disk, last / 2), [0; 4096]);
    assert_eq!(block(&*disk, last), [9; 4096]);
    assert_eq!(disk.private_blocks(), (1, last));
}

/// Chains of so many layers, as those of [`MAX_DEPTH`] take too long.
const DEPTH: u32 = 1000;
const _: () = assert!(DEPTH <= MAX_DEPTH);

#[test]
fn a_thousand_layers_and_no_more() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 9 * 4096]));
    let again = |sim: &SimDisk, seed: u64| {
        let env = Env {
            depth: DEPTH,
            ..env(seed << 20)
        };
        Store::open_on(sim.root(), Path::new("/sim"), env).expect("a store")
    };
    let store = again(&sim, 2);
    let disk = open(&store, "d").expect("d");
    // The first layer has depth 1.
    for n in 1..DEPTH {
        disk.write(&[(n % 250) as u8 + 2; 4096], u64::from(n % 8) * B)
            .expect("write");
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .unwrap_or_else(|e| panic!("snapshot {n}: {e:?}"));
    }
    disk.write(&[77; 4096], 0).expect("write");
    let e = store
        .snapshot_running(&disk, "d", "more", None)
        .expect_err("too deep");
    assert_eq!(e.kind(), Kind::Invalid);
    let more = ["more".to_string()];
    let e = store
        .create_from_running(&disk, "d", &more, None)
        .expect_err("too deep");
    assert_eq!(e.kind(), Kind::Invalid);
    // Refused, and not harmed.
    disk.write(&[78; 4096], 0).expect("write");
    disk.close().expect("close");
    drop(disk);
    let e = store.snapshot("d", "more", None).expect_err("too deep");
    assert_eq!(e.kind(), Kind::Invalid);
    let e = store.create(&more, "d", None).expect_err("too deep");
    assert_eq!(e.kind(), Kind::Invalid);
    let store = again(&sim, 3);
    let disk = open(&store, "d").expect("a chain of a thousand layers");
    assert_eq!(block(&*disk, 0)[0], 78);
    for n in 992..1000u32 {
        if n % 8 != 0 {
            assert_eq!(block(&*disk, u64::from(n % 8))[0], (n % 250) as u8 + 2);
        }
    }
    assert_eq!(block(&*disk, 8)[0], 1);
    disk.close().expect("close");
    drop(disk);
    let deep = store
        .resolve(&format!("d@s{}", DEPTH - 1))
        .expect("the deepest snapshot");
    let e = store.create(&more, &format!("d@s{}", DEPTH - 1), None);
    // It is the disk's parent, at depth 999: a fork of it is as deep as the disk.
    e.expect("as deep as the disk itself");
    let disk = store.open_disk(&deep, false).expect("open");
    assert_eq!(block(&*disk, 8)[0], 1);
    drop(disk);
    // Joined, the chain is short, though the ranks of its layers are as large as they were, and those above are larger.
    let plan = store.plan_squash("d", false).expect("plan");
    assert_eq!((plan.layers, plan.depth_after), (DEPTH - 1, 2));
    store.squash(plan, &Quiet).expect("squash");
    let disk = open(&store, "d").expect("d");
    for n in 0..3 {
        disk.write(&[79 + n; 4096], 0).expect("write");
        store
            .snapshot_running(&disk, "d", &format!("more{n}"), None)
            .unwrap_or_else(|e| panic!("snapshot {n}: {e:?}"));
    }
    assert_eq!(block(&*disk, 0)[0], 81);
    assert_eq!(block(&*disk, 7)[0], (999 % 250) as u8 + 2);
    disk.close().expect("close");
    drop(disk);
    let store = again(&sim, 4);
    store
        .create(&["deep".to_string()], "d@more2", None)
        .expect("fork");
    assert_eq!(block(&*open(&store, "deep").expect("deep"), 0)[0], 81);
}

#[test]
fn a_disk_of_one_block() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 10]);
    let disk = open(&store, "d").expect("d");
    assert_eq!(disk.size(), B);
    let mut expected = [0u8; 4096];
    expected[..10].fill(1);
    assert_eq!(block(&*disk, 0), expected);
    disk.write(&[5; 3], 4093).expect("write");
    expected[4093..].fill(5);
    disk.flush().expect("flush");
    assert_eq!(block(&*disk, 0), expected);
    disk.discard(0, 5).expect("discard");
    expected[..5].fill(0);
    disk.close().expect("close");
    drop(disk);
    let disk = open(&store, "d").expect("d");
    assert_eq!(block(&*disk, 0), expected);
    disk.discard(0, B).expect("discard");
    assert_eq!(disk.private_blocks(), (0, 1));
    assert_eq!(block(&*disk, 0), [0; 4096]);
    let extents = disk.extents(0, B).expect("extents");
    assert_eq!(extents.len(), 1);
    assert_eq!(extents[0].from, Source::Zero { depth: 0 });
}

#[test]
fn images_of_any_length_read_as_zeros_past_their_end() {
    for len in [1usize, 4095, 4096, 4097, 8191, 2 << 20, (2 << 20) + 1] {
        let sim = SimDisk::new(1);
        let image: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
        let store = store_with(&sim, &image);
        let disk = open(&store, "d").expect("d");
        let size = len.next_multiple_of(4096);
        assert_eq!(disk.size(), size as u64);
        let mut expected = image.clone();
        expected.resize(size, 0);
        assert!(read_all(&*disk).expect("read") == expected, "{len}");
        // A write into the last block brings the zeros along.
        disk.write(&[255], size as u64 - 1).expect("write");
        expected[size - 1] = 255;
        disk.close().expect("close");
        drop(disk);
        let larger = Some(size as u64 + 3 * B);
        fork(&store, "d", "larger", larger);
        let disk = open(&store, "larger").expect("larger");
        expected.resize(size + 3 * 4096, 0);
        assert!(read_all(&*disk).expect("read") == expected, "{len}");
    }
}

/// Writes a block in each of a hundred regions, other ones for each `flush`, and flushes.
fn hundred_regions(disk: &dyn Disk, flush: u64) {
    for n in 0..100 {
        let at = (flush * 100 + n) * 512 * B;
        disk.write(&[n as u8 + 1; 4096], at).expect("write");
    }
    disk.flush().expect("flush");
}

/// Who opens a disk after a crash asks the block map about each region that its journal changes, and should not wait for that: a journal of many
/// regions is emptied, however short it is.
#[test]
fn a_journal_of_many_regions_is_emptied() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 4096]);
    fork(&store, "image", "wide", Some(1 << 40));
    let disk = open(&store, "wide").expect("wide");
    let journal = || disk.stats().layer.expect("writable").journal;
    let (mut emptied, mut longest) = (0, 0);
    for flush in 0..60u64 {
        let before = journal();
        hundred_regions(&*disk, flush);
        emptied += u32::from(journal() < before);
        longest = longest.max(journal());
    }
    assert_eq!(emptied, 2, "after each 2,048 regions of 6,000");
    assert!(longest < 25 * B, "{longest} bytes");
    // As many changes in one place are no reason.
    for n in 0..60u64 {
        let before = journal();
        for at in 0..100 {
            disk.write(&[n as u8 + 1; 4096], at * B).expect("write");
        }
        disk.flush().expect("flush");
        assert!(journal() > before, "{n}");
    }
    let left = again(&sim.crash_with(Policy::AllDropped), 3);
    let disk = open(&left, "wide").expect("wide");
    for n in [1, 4095, 4096, 5999u64] {
        assert_eq!(block(&*disk, n * 512)[0], (n % 100) as u8 + 1, "{n}");
    }
    assert_eq!(block(&*disk, 99)[0], 60);
}

/// A history has room for so many checkpoints only: it would be short.
#[test]
fn a_journal_of_many_regions_stays_where_a_history_is_kept() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 4096]);
    fork(&store, "image", "wide", Some(1 << 40));
    let kept = Limits {
        window: None,
        bytes: Some(1 << 30),
    };
    store
        .set_history(&["wide".to_string()], Some(kept))
        .expect("a history");
    let disk = open(&store, "wide").expect("wide");
    let journal = || disk.stats().layer.expect("writable").journal;
    for flush in 0..60u64 {
        let before = journal();
        hundred_regions(&*disk, flush);
        assert!(journal() > before, "flush {flush}");
    }
}

/// Where the host has no room for that, it is not tried at each flush: the map would be written each time, up to where the room ends.
#[test]
fn a_journal_that_cannot_be_emptied_costs_no_more() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 4096]);
    fork(&store, "image", "wide", Some(1 << 40));
    let disk = open(&store, "wide").expect("wide");
    let flush = |fill: u8, regions: std::ops::Range<u64>| {
        for n in regions {
            disk.write(&[fill; 4096], n * 512 * B).expect("write");
        }
        let before = sim.calls();
        disk.flush().expect("flush");
        sim.calls() - before
    };
    // Room in the journal for what follows, and slots that are free.
    for n in 0..100 {
        flush(n, 0..8);
    }
    disk.checkpoint().expect("checkpoint");
    flush(1, 0..2040);
    let usual = (0..10).map(|n| flush(n, 0..4)).max().expect("some");
    let used = sim.used();
    sim.set_capacity(Some(used + 10 * B));
    flush(1, 2040..2050);
    let costs: Vec<u64> = (0..40).map(|n| flush(n, 0..4)).collect();
    let dear = costs.iter().filter(|calls| **calls > usual + 1).count();
    assert!((1..=3).contains(&dear), "{usual} {costs:?}");
    sim.set_capacity(None);
    for n in 0..40 {
        flush(n, 0..4);
    }
    let journal = disk.stats().layer.expect("writable").journal;
    assert!(journal < 60 * B, "{journal} bytes");
}
