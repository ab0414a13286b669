//! Changes of disks that are in use: rolled back, made larger and smaller, limited by a quota, kept together with others.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::mortal::{Mortal, until_death};
use common::{Rng, env};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Kind;
use forkdisk::format::Header;
use forkdisk::io::Access;
use forkdisk::io::sim::{FaultKind, Policy, SimDisk, Verb};
use forkdisk::layer::{self, Layer, volatile};
use forkdisk::store::history::{At, Limits};
use forkdisk::store::{Below, ImportMode, ImportSource, Member, Quiet, QuotaChange, Store};
use forkdisk::units::Id;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

const B: u64 = 4096;
/// Blocks of the base, none of which is zeros.
const BASE: u64 = 600;

fn base() -> Vec<u8> {
    (0..BASE * B).map(|i| (i / B % 250) as u8 + 1).collect()
}

fn store_on(sim: &SimDisk, seed: u64) -> Store {
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(seed)).unwrap();
    let source = ImportSource::Reader(&mut &base()[..]);
    store
        .import(source, "base", ImportMode::Copy, &Quiet)
        .unwrap();
    store.create(&["d".to_string()], "base", None).unwrap();
    store
}

fn store() -> Store {
    store_on(&SimDisk::new(1), 1)
}

fn open(store: &Store, name: &str) -> Arc<CowDisk> {
    store.open_cow(&store.resolve(name).unwrap(), true).unwrap()
}

fn contents(disk: &dyn Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size() as usize];
    disk.read(&mut all, 0).unwrap();
    all
}

fn of(store: &Store, name: &str) -> Vec<u8> {
    contents(
        &*store
            .open_disk(&store.resolve(name).unwrap(), false)
            .unwrap(),
    )
}

fn layers(store: &Store) -> usize {
    store.layers_dir().list().unwrap().len()
}

fn quota(bytes: u64) -> QuotaChange {
    QuotaChange {
        bytes: Some(Some(bytes)),
        waits: None,
    }
}

#[test]
fn a_rollback_shows_the_snapshot_and_takes_no_space() {
    let store = store();
    store.set_quota("d", quota(100 * B), None).unwrap();
    let disk = open(&store, "d");
    disk.write(&[1; 4096], 0).unwrap();
    store.snapshot_running(&disk, "d", "one", None).unwrap();
    disk.write(&[2; 8192], B).unwrap();
    store.snapshot_running(&disk, "d", "two", None).unwrap();
    disk.write(&[3; 4096], 5 * B).unwrap();
    let (one, two) = (of(&store, "d@one"), of(&store, "d@two"));
    let before = layers(&store);
    for (name, shows) in [("one", &one), ("two", &two), ("one", &one)] {
        let object = store.rollback_running(&disk, "d", name).unwrap();
        assert_eq!(store.resolve("d").unwrap(), object);
        assert!(contents(&*disk) == *shows, "{name}");
        assert_eq!(layers(&store), before, "what was left is gone");
        disk.write(&[9; 4096], 7 * B).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    store.rollback("d", "two").unwrap();
    assert!(of(&store, "d") == two);
    assert_eq!(layers(&store), before);
    // The settings and both snapshots stay.
    let used = store.quota(&store.resolve("d").unwrap()).unwrap().unwrap();
    assert_eq!((used.quota, used.used), (Some(100 * B), 3 * B));
    assert!(of(&store, "d@one") == one && of(&store, "d@two") == two);
    for (disk, name, kind) in [
        ("d", "three", Kind::NotFound),
        ("e", "one", Kind::NotFound),
        ("base", "one", Kind::Invalid),
        ("d", "a b", Kind::Invalid),
    ] {
        assert_eq!(
            store.rollback(disk, name).unwrap_err().kind(),
            kind,
            "{disk}@{name}"
        );
    }
    let disk = open(&store, "d");
    let e = store.rollback("d", "one").unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    disk.close().unwrap();
}

/// Layers that only the disk needed go; those that somebody stands on stay.
#[test]
fn a_rollback_leaves_what_others_need() {
    let store = store();
    let change = |at: u64| {
        let disk = open(&store, "d");
        disk.write(&[7; 4096], at * B).unwrap();
        disk.close().unwrap();
    };
    store.snapshot("d", "s", None).unwrap();
    change(1);
    store.create(&["f".to_string()], "d", None).unwrap();
    change(2);
    store.create(&["g".to_string()], "d", None).unwrap();
    let plan = store.plan_removal(&["g".to_string()], false).unwrap();
    store.remove(&plan).unwrap();
    change(3);
    let shown = of(&store, "f");
    store.rollback("d", "s").unwrap();
    assert!(of(&store, "d") == of(&store, "d@s"));
    assert!(of(&store, "f") == shown);
    // base <- d@s <- what f stands on <- f; and d.
    assert_eq!(layers(&store), 4);
    assert!(store.gc(true).unwrap().layers.is_empty());
}

#[test]
fn what_was_cut_off_never_comes_back() {
    let store = store();
    let size = BASE * B;
    let expected = |kept: u64, size: u64| {
        let mut all = base();
        all[B as usize..3 * B as usize].fill(5);
        all.truncate(kept as usize);
        all.resize(size as usize, 0);
        all
    };
    let disk = open(&store, "d");
    disk.write(&[5; 8192], B).unwrap();
    disk.write(&[6; 4096], 500 * B).unwrap();
    disk.close().unwrap();
    drop(disk);
    let object = store.resolve("d").unwrap();
    assert_eq!(store.lost_by_resizing(&object, 100 * B).unwrap(), 500 * B);
    store.resize("d", 100 * B).unwrap();
    assert!(of(&store, "d") == expected(100 * B, 100 * B));
    store.snapshot("d", "small", None).unwrap();
    // Whoever makes it larger, and whenever: the base has more, and a layer had.
    store
        .create(&["f".to_string()], "d@small", Some(size))
        .unwrap();
    assert!(of(&store, "f") == expected(100 * B, size));
    store.resize("d", size + 7 * B).unwrap();
    assert!(of(&store, "d") == expected(100 * B, size + 7 * B));
    let disk = open(&store, "d");
    disk.write(&[8; 4096], 599 * B).unwrap();
    store.snapshot_running(&disk, "d", "large", None).unwrap();
    let e = store.resize_running(&disk, "d", B).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy, "{e}");
    store.resize_running(&disk, "d", 2 * size).unwrap();
    let mut grown = expected(100 * B, 2 * size);
    grown[599 * B as usize..size as usize].fill(8);
    assert!(contents(&*disk) == grown);
    disk.write(&[9; 4096], 2 * size - B).unwrap();
    // A snapshot has the size that it had.
    store.rollback_running(&disk, "d", "small").unwrap();
    assert!(contents(&*disk) == expected(100 * B, 100 * B));
    assert_eq!(
        disk.write(&[1; 4096], 100 * B).unwrap_err().kind(),
        Kind::Invalid
    );
    disk.close().unwrap();
    drop(disk);
    // With nothing of its own but the cut.
    store.create(&["g".to_string()], "base", None).unwrap();
    store.resize("g", B).unwrap();
    store.resize("g", size).unwrap();
    let mut cut = base();
    cut[B as usize..].fill(0);
    assert!(of(&store, "g") == cut);
    for size in [0, (16 << 40) + 1, u64::MAX] {
        assert_eq!(store.resize("g", size).unwrap_err().kind(), Kind::Invalid);
    }
    assert_eq!(store.resize("g", 16 << 40).unwrap().size, 16 << 40);
    assert_eq!(store.resize("g", 1).unwrap().size, B);
    assert_eq!(store.resize("base", B).unwrap_err().kind(), Kind::Invalid);
}

/// A disk that was made smaller hides what its image has past its end; so does whatever is made of its past.
#[test]
fn a_fork_of_the_past_hides_what_was_cut_off() {
    let store = store();
    let limits = Limits {
        window: Some(3600),
        bytes: None,
    };
    store.set_history(&["d".to_string()], Some(limits)).unwrap();
    let flushed = |block: u64| {
        let disk = open(&store, "d");
        for n in 0..2 {
            disk.write(&[7; 4096], (block + n) * B).unwrap();
            disk.flush().unwrap();
        }
        disk.close().unwrap();
    };
    flushed(1);
    store.resize("d", 100 * B).unwrap();
    flushed(3);
    let mut expected = base();
    expected[B as usize..5 * B as usize].fill(7);
    expected[100 * B as usize..].fill(0);
    let last = store.history("d").unwrap().points.last().unwrap().number;
    store
        .create_at("e", "d", At::Number(last), None, &Quiet)
        .unwrap();
    // Whoever makes it larger: a fork, or a change of its size.
    store.snapshot("e", "s", None).unwrap();
    store
        .create(&["f".to_string()], "e@s", Some(BASE * B))
        .unwrap();
    assert!(of(&store, "f") == expected, "f");
    for name in ["d", "e"] {
        assert_eq!(store.resize(name, BASE * B).unwrap().size, BASE * B);
        assert!(of(&store, name) == expected, "{name}");
    }
}

/// A layer that is smaller than what it stands on and hides nothing of it, as earlier versions made some: what it does not show stays hidden.
#[test]
fn growing_shows_nothing_that_was_hidden() {
    let store = store();
    let image = store.resolve("base").unwrap();
    let chain = store.chain(Below::Base(image.id)).unwrap();
    let file = store
        .layers_dir()
        .open("x.layer", Access::CreateNew)
        .unwrap();
    let header = Header::new(Id([9; 16]), image.id, false, 1, 100 * B, 0, "");
    layer::create(&*file, &header).unwrap();
    let disk = CowDisk::writable(Layer::open(file).unwrap(), chain);
    disk.resize(BASE * B).unwrap();
    let mut expected = base();
    expected[100 * B as usize..].fill(0);
    assert!(contents(&disk) == expected);
}

#[test]
fn a_quota_counts_what_the_disk_has_for_itself() {
    let store = store();
    let write = |disk: &CowDisk, block: u64, n: u64| {
        disk.write(&vec![block as u8 | 1; (n * B) as usize], block * B)
    };
    let disk = open(&store, "d");
    write(&disk, 0, 4).unwrap();
    store.set_quota("d", quota(10 * B), Some(&disk)).unwrap();
    write(&disk, 4, 6).unwrap();
    let full = |done: forkdisk::error::Result<()>| {
        let e = done.expect_err("the quota leaves no room");
        assert!(
            e.kind() == Kind::NoSpace && e.is_of_quota() && !e.waits(),
            "{e:?}"
        );
        assert!(
            e.hint_text().is_some_and(|h| h.contains("--quota")),
            "{e:?}"
        );
    };
    full(write(&disk, 10, 1));
    full(disk.write(&[1; 100], 300 * B + 5));
    // What is its own goes on: whole, in part, as zeros.
    write(&disk, 0, 10).unwrap();
    disk.write(&[9; 100], 3 * B + 5).unwrap();
    disk.write(&[0; 4096], 400 * B).unwrap();
    disk.flush().unwrap();
    disk.discard(0, 2 * B).unwrap();
    write(&disk, 20, 2).unwrap();
    full(write(&disk, 22, 1));
    // Two regions: the first part is written, the second is not.
    disk.discard(4 * B, B).unwrap();
    full(write(&disk, 511, 2));
    assert_eq!(disk.used(), 10 * B);
    // What snapshots keep counts.
    disk.discard(0, 24 * B).unwrap();
    store.snapshot_running(&disk, "d", "s", None).unwrap();
    assert_eq!(disk.used(), B);
    write(&disk, 511, 1).unwrap();
    assert_eq!(disk.used(), 2 * B);
    write(&disk, 30, 8).unwrap();
    full(write(&disk, 40, 1));
    // Under another name, and opened again.
    disk.close().unwrap();
    drop(disk);
    store.rename("d", "e").unwrap();
    let disk = open(&store, "e");
    store.snapshot_running(&disk, "e", "t", None).unwrap();
    full(write(&disk, 30, 1));
    assert_eq!(disk.used(), 10 * B);
    store.set_quota("e", quota(11 * B), Some(&disk)).unwrap();
    write(&disk, 30, 1).unwrap();
    full(write(&disk, 31, 1));
    // Less than it has: it gets no more, and loses nothing.
    store.set_quota("e", quota(3 * B), Some(&disk)).unwrap();
    write(&disk, 30, 1).unwrap();
    full(write(&disk, 31, 1));
    store.rollback_running(&disk, "e", "s").unwrap();
    assert_eq!(disk.used(), B);
    write(&disk, 50, 2).unwrap();
    full(write(&disk, 52, 1));
    // Forks have none, and what they stand on is not theirs.
    store.create(&["f".to_string()], "e@t", None).unwrap();
    let fork = open(&store, "f");
    write(&fork, 0, 100).unwrap();
    assert_eq!(fork.used(), 100 * B);
    fork.close().unwrap();
    drop(fork);
    let none = QuotaChange {
        bytes: Some(None),
        waits: None,
    };
    store.set_quota("e", none, Some(&disk)).unwrap();
    write(&disk, 100, 100).unwrap();
    disk.close().unwrap();
    drop(disk);
    // Made with one.
    let settings = quota(2 * B).settings().unwrap();
    store
        .create_with(&["h".to_string()], "f", None, &settings)
        .unwrap();
    let disk = open(&store, "h");
    write(&disk, 0, 2).unwrap();
    full(write(&disk, 2, 1));
    let waits = QuotaChange {
        bytes: None,
        waits: Some(true),
    };
    store.set_quota("h", waits, Some(&disk)).unwrap();
    assert!(write(&disk, 2, 1).unwrap_err().waits());
    disk.stop_waiting();
    full(write(&disk, 2, 1));
    disk.close().unwrap();
    for bad in [quota(0), quota(4095)] {
        assert_eq!(
            store.set_quota("h", bad, None).unwrap_err().kind(),
            Kind::Invalid
        );
    }
    assert_eq!(
        store.set_quota("f", waits, None).unwrap_err().kind(),
        Kind::Invalid
    );
}

#[test]
fn a_quota_holds_whoever_writes() {
    const QUOTA: u64 = 60;
    let store = store();
    let disk = open(&store, "d");
    store.set_quota("d", quota(QUOTA * B), Some(&disk)).unwrap();
    let end = AtomicBool::new(false);
    let (refused, most) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (disk, end, refused) = (&disk, &end, &refused);
            scope.spawn(move || {
                let mut rng = Rng(seed);
                for _ in 0..3000 {
                    let at = rng.below(BASE - 3);
                    let n = 1 + rng.below(3);
                    let done = match rng.below(8) {
                        0 => disk.discard(at * B, n * B),
                        1 => disk.flush(),
                        2 => disk.write(&[3; 777], at * B + 99),
                        _ => disk.write(&vec![seed as u8 + 1; (n * B) as usize], at * B),
                    };
                    match done {
                        Err(e) if e.is_of_quota() => drop(refused.fetch_add(1, SeqCst)),
                        other => other.unwrap(),
                    }
                }
                end.store(true, SeqCst);
            });
        }
        while !end.load(SeqCst) {
            most.fetch_max(disk.private_blocks().0, SeqCst);
        }
    });
    let most = most.load(SeqCst);
    assert!(
        most == QUOTA && refused.load(SeqCst) > 100,
        "{most} {refused:?}"
    );
    disk.close().unwrap();
}

/// Two writes that were both told that there is room, and room for one.
#[test]
fn a_quota_is_asked_again_when_the_data_is_written() {
    let sim = SimDisk::new(1);
    let store = store_on(&sim, 1);
    let disk = open(&store, "d");
    disk.write(&[6; B as usize], 0).unwrap();
    disk.flush().unwrap();
    store.set_quota("d", quota(2 * B), Some(&disk)).unwrap();
    let other = disk.clone();
    let between = move || other.write(&[8; B as usize], 590 * B).unwrap();
    sim.meanwhile(Verb::Write, between);
    let e = disk.write(&[7; B as usize], 5 * B).unwrap_err();
    assert!(e.is_of_quota(), "{e}");
    assert!(!sim.take_meanwhile(), "nobody wrote in between");
    assert_eq!(disk.private_blocks().0, 2);
    disk.close().unwrap();
    drop(disk);
    let mut expected = base();
    expected[..B as usize].fill(6);
    expected[590 * B as usize..][..B as usize].fill(8);
    assert!(of(&store, "d") == expected);
    let report = forkdisk::check::check(&store, None, &Quiet).unwrap();
    assert!(report.leaks.is_empty() && report.corruptions.is_empty());
}

#[test]
fn snapshots_of_several_are_made_or_none() {
    let store = store();
    for name in ["a", "b", "c"] {
        store.create(&[name.to_string()], "base", None).unwrap();
    }
    let (a, b) = (open(&store, "a"), open(&store, "b"));
    a.write(&[1; 4096], 0).unwrap();
    b.write(&[2; 4096], 0).unwrap();
    let member = |disk: &'static str, name: &'static str| (disk, name);
    let group = |wanted: &[(&'static str, &'static str)]| {
        let members: Vec<Member<'_>> = wanted
            .iter()
            .map(|&(disk, name)| Member {
                disk,
                name,
                running: match disk {
                    "a" => Some(&*a),
                    "b" => Some(&*b),
                    _ => None,
                },
            })
            .collect();
        store.snapshot_group(&members, Some("all"))
    };
    let made = group(&[member("c", "x"), member("b", "y"), member("a", "x")]).unwrap();
    let names: Vec<&str> = made.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(names, ["c@x", "b@y", "a@x"]);
    assert!(made.iter().all(|o| o.message.as_deref() == Some("all")));
    a.write(&[3; 4096], 0).unwrap();
    assert_eq!(
        (
            of(&store, "a@x")[0],
            of(&store, "b@y")[0],
            of(&store, "c@x")[0]
        ),
        (1, 2, 1)
    );
    let before = (layers(&store), store.list().unwrap().len());
    for (wanted, kind) in [
        (vec![member("a", "z"), member("b", "y")], Kind::Exists),
        (vec![member("a", "z"), member("a", "w")], Kind::Invalid),
        (vec![member("a", "z"), member("no", "z")], Kind::NotFound),
        (vec![member("a", "z"), member("base", "z")], Kind::Invalid),
    ] {
        assert_eq!(group(&wanted).unwrap_err().kind(), kind);
    }
    // Held by somebody else.
    let c = open(&store, "c");
    assert_eq!(
        group(&[member("a", "z"), member("c", "z")])
            .unwrap_err()
            .kind(),
        Kind::Busy
    );
    c.close().unwrap();
    assert_eq!((layers(&store), store.list().unwrap().len()), before);
    for disk in [&a, &b] {
        disk.write(&[4; 4096], B).unwrap();
        disk.close().unwrap();
    }
}

/// The first disk is sealed, and for the second there is no room: there is no snapshot, and nothing looks like one that lost its name.
#[test]
fn a_snapshot_of_several_without_room_leaves_no_label() {
    let mut half = 0;
    for (n, attached) in (0..40).flat_map(|n| [(n, false), (n, true)]) {
        let sim = SimDisk::new(1);
        let store = store_on(&sim, 1);
        store.create(&["e".to_string()], "base", None).unwrap();
        let mut disks = vec![open(&store, "d"), open(&store, "e")];
        disks[0].write(&[1; 4096], 0).unwrap();
        // The block map of this one takes more.
        for block in (0..BASE).step_by(2) {
            disks[1].write(&[2; 4096], block * B).unwrap();
        }
        disks.iter().for_each(|d| d.flush().unwrap());
        // At rest they are as after a crash, with all in the journal.
        if !attached {
            disks.clear();
        }
        let members: Vec<Member<'_>> = ["d", "e"]
            .into_iter()
            .enumerate()
            .map(|(i, disk)| Member {
                disk,
                name: "s",
                running: disks.get(i).map(|d| &**d),
            })
            .collect();
        sim.fail_nth(Verb::Write, n, FaultKind::Enospc);
        let done = store.snapshot_group(&members, None);
        sim.clear_faults();
        drop(members);
        let sound = disks.iter().all(|disk| disk.close().is_ok());
        drop(disks);
        let object = store.resolve("d").unwrap();
        let sealed = store.details(&object).unwrap().depth > 1;
        // Where the second was stopped in the middle of its seal, it is as a crash leaves it.
        if done.is_ok() || !sound || !sealed {
            continue;
        }
        half += 1;
        let steps = forkdisk::check::repair::plan(&store, &Quiet).unwrap();
        assert!(steps.iter().all(|s| !s.what.contains('@')), "{steps:?}");
    }
    assert!(half > 0, "none failed after the first was sealed");
}

/// A snapshot that found no room leaves the disk as it was: it still keeps its history.
#[test]
fn a_snapshot_without_room_ends_no_history() {
    let limits = Limits {
        window: Some(3600),
        bytes: None,
    };
    let mut failed = 0;
    for n in 0..20 {
        let (sim, store, disk) = scattered(Some(limits));
        disk.flush().unwrap();
        sim.fail_from(Verb::Write, n, FaultKind::Enospc);
        let done = store.snapshot_running(&disk, "d", "s", None);
        sim.clear_faults();
        if done.is_ok() || disk.flush().is_err() {
            continue;
        }
        failed += 1;
        let points = || store.history("d").unwrap().points.len();
        let before = points();
        for more in 1..=2 {
            disk.write(&[3; 4096], more * B).unwrap();
            disk.flush().unwrap();
            assert_eq!(points(), before + more as usize, "{n}");
        }
    }
    assert!(failed > 1, "{failed}");
}

/// A disk with 300 blocks of its own, not flushed.
fn scattered(history: Option<Limits>) -> (SimDisk, Store, Arc<CowDisk>) {
    let sim = SimDisk::new(1);
    let store = store_on(&sim, 1);
    store.set_history(&["d".to_string()], history).unwrap();
    let disk = open(&store, "d");
    for block in (0..BASE).step_by(2) {
        disk.write(&[2; 4096], block * B).unwrap();
    }
    (sim, store, disk)
}

/// Where only the tidying found no room all is flushed, and a flush says so; where a flush itself failed, it fails again.
#[test]
fn closing_without_room_is_told_from_a_flush_that_failed() {
    let mut tidying = 0;
    for n in 0..10 {
        let (sim, _store, disk) = scattered(None);
        disk.flush().unwrap();
        sim.fail_nth(Verb::Write, n, FaultKind::Enospc);
        let closed = disk.close();
        tidying += u32::from(closed.is_err() && disk.flush().is_ok());
    }
    assert!(tidying > 0);
    let (sim, _store, disk) = scattered(None);
    sim.fail_nth(Verb::Sync, 0, FaultKind::Enospc);
    assert_eq!(disk.close().unwrap_err().kind(), Kind::NoSpace);
    disk.flush().unwrap_err();
}

/// A writer that turns to the second disk when the first has acknowledged: whatever the moment, the second never shows what the first does not.
#[test]
fn snapshots_of_several_are_of_one_instant() {
    let store = store();
    store.create(&["e".to_string()], "base", None).unwrap();
    let (first, second) = (open(&store, "d"), open(&store, "e"));
    let end = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    let number = |disk: &str| {
        let all = of(&store, disk);
        u64::from_le_bytes(all[..8].try_into().unwrap())
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1.. {
                if end.load(SeqCst) {
                    return;
                }
                let mut block = vec![1; 4096];
                block[..8].copy_from_slice(&u64::to_le_bytes(n));
                first.write(&block, 0).unwrap();
                second.write(&block, 0).unwrap();
                written.store(n, SeqCst);
            }
        });
        for i in 0..30 {
            let before = written.load(SeqCst);
            while written.load(SeqCst) == before {
                std::thread::yield_now();
            }
            let name = format!("s{i}");
            let member = |disk, running| Member {
                disk,
                name: &name,
                running: Some(running),
            };
            // In either order.
            let mut members = [member("d", &*first), member("e", &*second)];
            if i % 2 == 1 {
                members.reverse();
            }
            store.snapshot_group(&members, None).unwrap();
            let (a, b) = (number(&format!("d@{name}")), number(&format!("e@{name}")));
            assert!(a == b || a == b + 1, "{name}: {a} and {b}");
        }
        end.store(true, SeqCst);
    });
    first.close().unwrap();
    second.close().unwrap();
}

/// The process dies at each changing call in turn. Its successor finds the disk as it was, un-flushed writes included, or as it was to be;
/// so does who comes after a power cut, as far as it was durable.
fn dies_in_the_middle(
    what: &str,
    change: impl Fn(&Store, &CowDisk),
    after: &dyn Fn(&[u8]) -> Vec<u8>,
) {
    dies_with_a_history(None, what, change, after);
}

/// The same of a disk that keeps its history.
fn dies_with_a_history(
    keeps: Option<Limits>,
    what: &str,
    change: impl Fn(&Store, &CowDisk),
    after: &dyn Fn(&[u8]) -> Vec<u8>,
) {
    let mut whole = 0;
    for at in 0.. {
        let sim = SimDisk::new(at);
        drop(store_on(&sim, at));
        let mortal = Mortal::new(sim.root());
        let again =
            || Store::open_on(Arc::new(mortal.clone()), Path::new("/sim"), env(at ^ 77)).unwrap();
        let store = again();
        let disk = open(&store, "d");
        disk.write(&[1; 4096], 0).unwrap();
        store.snapshot_running(&disk, "d", "s", None).unwrap();
        disk.close().unwrap();
        drop(disk);
        store.set_history(&["d".to_string()], keeps).unwrap();
        let memory = volatile::private().unwrap();
        let object = store.resolve("d").unwrap();
        let disk = store.open_cow_on(&object, memory.clone()).unwrap();
        disk.write(&[2; 4096], B).unwrap();
        disk.flush().unwrap();
        let flushed = contents(&*disk);
        disk.write(&[3; 4096], 2 * B).unwrap();
        let now = contents(&*disk);
        mortal.die_after(at, at);
        let done = until_death(|| change(&store, &disk)).is_some();
        drop((disk, store));
        mortal.live_on();
        let left = sim.kill();
        let successor = Store::open_on(left.root(), Path::new("/sim"), env(at ^ 99)).unwrap();
        let disk = successor.resume_cow("d", memory).unwrap();
        let found = contents(&*disk);
        assert!(
            found == after(&now) || (!done && found == now),
            "{what}, death at {at}: neither before nor after"
        );
        disk.write(&[4; 4096], 3 * B).unwrap();
        disk.close().unwrap();
        drop(disk);
        let left = sim.crash_with(if at % 2 == 0 {
            Policy::AllDropped
        } else {
            Policy::AllDone
        });
        let next = Store::open_on(left.root(), Path::new("/sim"), env(at ^ 55)).unwrap();
        let found = contents(&*open(&next, "d"));
        let fine = [&now, &flushed]
            .iter()
            .any(|c| found == **c || found == after(c));
        assert!(fine, "{what}, power cut at {at}: no flush");
        if done {
            whole += 1;
            if whole == 2 {
                return;
            }
        }
    }
}

#[test]
fn a_death_in_a_rewind_leaves_the_one_or_the_other() {
    let back = |_: &[u8]| {
        let mut all = base();
        all[..B as usize].fill(1);
        all
    };
    let change = |store: &Store, disk: &CowDisk| {
        let oldest = store.history("d").unwrap().points[0].number;
        let done = store.rewind_running(disk, "d", At::Number(oldest)).unwrap();
        assert_eq!(done.blocks, 2);
    };
    let keeps = Limits {
        window: Some(1_000_000),
        bytes: None,
    };
    dies_with_a_history(Some(keeps), "rewind", change, &back);
}

#[test]
fn a_death_in_a_rollback_leaves_the_one_or_the_other() {
    let rolled = |_: &[u8]| {
        let mut all = base();
        all[..B as usize].fill(1);
        all
    };
    dies_in_the_middle(
        "rollback",
        |store, disk| drop(store.rollback_running(disk, "d", "s").unwrap()),
        &rolled,
    );
}

#[test]
fn a_death_while_it_grows_leaves_the_one_or_the_other() {
    let grown = |now: &[u8]| {
        let mut all = now.to_vec();
        all.resize(((BASE + 9) * B) as usize, 0);
        all
    };
    dies_in_the_middle(
        "resize",
        |store, disk| drop(store.resize_running(disk, "d", (BASE + 9) * B).unwrap()),
        &grown,
    );
}
