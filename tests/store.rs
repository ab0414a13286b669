//! What the store tells of its objects, and what it makes of requests that others need not know.
#![allow(missing_docs, reason = "a test")]

use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Kind;
use forkdisk::io::Access;
use forkdisk::io::count::Counting;
use forkdisk::io::os::OsDir;
use forkdisk::io::sim::{FaultKind, SimDisk};
use forkdisk::layer::volatile;
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::Id;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

#[allow(dead_code, reason = "not all of it is used here")]
#[path = "common/audit.rs"]
mod audit;
#[path = "store/counts.rs"]
mod counts;
#[path = "store/usage.rs"]
mod usage;

const BLOCK: u64 = 4096;

/// A store with an image `base`: 64 blocks of data, then 1,000 blocks of hole.
fn store() -> Store {
    store_on(&SimDisk::new(1))
}

fn store_on(sim: &SimDisk) -> Store {
    let next = AtomicU64::new(1);
    let env = Env {
        id: Arc::new(move || Id(u128::from(next.fetch_add(1, SeqCst)).to_be_bytes())),
        now: Arc::new(|| 0),
        depth: forkdisk::format::MAX_DEPTH,
    };
    let store = Store::init_on(sim.root(), Path::new("/sim"), env).expect("a store");
    let mut image = vec![7u8; 64 * BLOCK as usize];
    image.resize(1064 * BLOCK as usize, 0);
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "base",
            ImportMode::Copy,
            &Quiet,
        )
        .expect("import");
    store
}

fn fork(store: &Store, name: &str, from: &str) {
    store.create(&[name.to_string()], from, None).expect("fork");
}

fn change(store: &Store, name: &str, work: impl FnOnce(&dyn Disk)) {
    let disk = store
        .open_cow(&store.resolve(name).expect("resolve"), true)
        .expect("open");
    work(&*disk);
    disk.close().expect("close");
}

fn refer(store: &Store, name: &str) -> u64 {
    store
        .usage(&store.resolve(name).expect("resolve"))
        .expect("usage")
        .refer
        / BLOCK
}

#[test]
fn refer_counts_what_is_shown_once() {
    let store = store();
    fork(&store, "d", "base");
    assert_eq!(refer(&store, "base"), 64);
    assert_eq!(refer(&store, "d"), 64);
    change(&store, "d", |disk| {
        // Half over the base's data, half over its hole.
        disk.write(&vec![9; 40 * BLOCK as usize], 44 * BLOCK)
            .expect("write");
    });
    assert_eq!(refer(&store, "d"), 84);
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(0, 60 * BLOCK).expect("discard")
    });
    assert_eq!(refer(&store, "d@s"), 84, "a snapshot shows what it showed");
    assert_eq!(refer(&store, "d"), 24);
    change(&store, "d", |disk| {
        disk.discard(0, disk.size()).expect("discard")
    });
    assert_eq!(refer(&store, "d"), 0);
}

#[test]
fn forks_of_an_idle_disk_do_not_make_its_chain_longer() {
    let store = store();
    fork(&store, "d", "base");
    for i in 0..5 {
        fork(&store, &format!("f{i}"), "d");
    }
    let depth = |name: &str| {
        store
            .details(&store.resolve(name).expect("resolve"))
            .expect("details")
            .depth
    };
    assert_eq!((depth("d"), depth("f4")), (1, 1));
    change(&store, "d", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    fork(&store, "g", "d");
    fork(&store, "h", "d");
    assert_eq!((depth("d"), depth("g"), depth("h")), (2, 2, 2));
    assert_eq!(refer(&store, "h"), 64);
}

#[test]
fn removal_lists_all_that_stands_on_what_goes() {
    let store = store();
    fork(&store, "a", "base");
    store.snapshot("a", "s", None).expect("snapshot");
    fork(&store, "b", "a@s");
    fork(&store, "c", "base");
    let plan = |name: &str, recursive| store.plan_removal(&[name.to_string()], recursive);
    let e = plan("base", false).expect_err("in use");
    assert!(
        e.to_string().contains("base is in use by a, a@s, b, c"),
        "{e}"
    );
    // A snapshot's name goes alone.
    let alone = plan("a@s", false).expect("plan");
    assert_eq!((alone.names.len(), alone.frees), (1, 0));
    let names = |name: &str| -> Vec<String> {
        let mut names: Vec<String> = plan(name, true)
            .expect("plan")
            .names
            .into_iter()
            .map(|o| o.name)
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("a"), ["a", "a@s", "b"]);
    assert_eq!(names("base"), ["a", "a@s", "b", "base", "c"]);
    store
        .remove(&plan("a", true).expect("plan"))
        .expect("remove");
    let left: Vec<String> = store
        .list()
        .expect("list")
        .into_iter()
        .map(|o| o.name)
        .collect();
    assert_eq!(left, ["base", "c"]);
    assert_eq!(
        store.layers().expect("layers").sound.len(),
        1,
        "the layers of what went are gone"
    );
}

/// A store on a real directory whose calls are counted, with an image `base` and `n` disks.
/// What is called by its id is found though the name of something else is damaged.
#[test]
fn a_damaged_name_hides_no_other() {
    let store = store();
    fork(&store, "a", "base");
    fork(&store, "b", "base");
    let id = store.resolve("a").expect("resolve").id.to_string();
    let file = store.names_dir().open("b", Access::Write).expect("open");
    file.write_at(b"rot", 0).expect("write");
    assert_eq!(store.resolve(&id).expect("resolve").name, "a");
    let e = store.resolve("cafe1cafe1").expect_err("there is none");
    assert_eq!(e.kind(), Kind::NotFound);
    let e = store.resolve("b").expect_err("damaged");
    assert_eq!(e.kind(), Kind::Corrupt);
}

fn counted(n: usize) -> (tempfile::TempDir, Counting, Store) {
    let dir = tempfile::tempdir().expect("a directory");
    let io = Counting::new(Arc::new(OsDir::open(dir.path()).expect("opened")));
    let store = Store::init_on(Arc::new(io.clone()), dir.path(), Env::os()).expect("a store");
    let image = vec![7u8; 4 * BLOCK as usize];
    let source = ImportSource::Reader(&mut &image[..]);
    store
        .import(source, "base", ImportMode::Copy, &Quiet)
        .expect("import");
    let names: Vec<String> = (0..n).map(|i| format!("d{i:03}")).collect();
    store.create(&names, "base", None).expect("created");
    (dir, io, store)
}

/// How many files `work` opens.
fn opens(io: &Counting, work: impl FnOnce()) -> u64 {
    let before = io.counts();
    work();
    (io.counts() - before).opens
}

#[test]
fn the_space_of_many_disks_takes_one_look_at_what_they_share() {
    let (_dir, io, store) = counted(50);
    for i in 0..20 {
        store
            .snapshot("d000", &format!("s{i}"), None)
            .expect("made");
    }
    let objects = store.list().expect("listed");
    let n = objects.len() as u64;
    assert_eq!(n, 71);
    let opened = opens(&io, || {
        let found = store.usages(objects).expect("known");
        assert!(found.damaged.is_empty());
        for (object, usage) in found.sound {
            assert_eq!(usage.refer, 4 * BLOCK, "{}", object.name);
        }
    });
    // A name and a layer each to know what there is, and a layer each to know what it hides: however deep they lie.
    assert!(opened < 4 * n, "{opened} opens for {n} objects");
}

#[test]
fn one_of_many_is_removed_without_a_look_at_the_others() {
    let (_dir, io, store) = counted(50);
    let few = |what: &str, work: &mut dyn FnMut()| {
        let opened = opens(&io, work);
        assert!(opened < 30, "{what}: {opened} opens among 50 disks");
    };
    few("over an image", &mut || assert!(remove(&store, "d000") > 0));
    // Its neighbours tell that the image is needed, whatever it is called by now.
    store.rename("base", "debian").expect("renamed");
    few("over an image with another name", &mut || {
        assert!(remove(&store, "d001") > 0);
    });
    change(&store, "d002", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    fork(&store, "f1", "d002");
    fork(&store, "f2", "d002");
    few("over the layer of a disk", &mut || {
        assert!(remove(&store, "f1") > 0);
    });
    store.snapshot("d003", "s", None).expect("made");
    fork(&store, "g", "d003@s");
    few("over a snapshot", &mut || assert!(remove(&store, "g") > 0));
    few("snapshot", &mut || {
        store.snapshot("d004", "s", None).expect("made");
    });
    few("rollback", &mut || {
        store.rollback("d004", "s").expect("rolled back");
    });
    tidy(&store);
    assert_eq!(store.list().expect("listed").len(), 52);
}

#[test]
fn all_about_one_of_many_is_told_without_their_layers() {
    let (_dir, io, store) = counted(50);
    store.snapshot("d000", "s", None).expect("made");
    for name in ["d000", "d000@s", "d001", "base"] {
        let object = store.resolve(name).expect("there");
        let mut told = None;
        let opened = opens(&io, || told = Some(store.details(&object).expect("told")));
        assert!(opened < 51 + 30, "{name}: {opened} opens among 50 disks");
        let among_all = store.usages(vec![object]).expect("known");
        assert_eq!(told.expect("told").usage, among_all.sound[0].1, "{name}");
    }
}

#[test]
fn to_remove_one_of_many_over_an_image_costs_one_sync() {
    let (_dir, io, store) = counted(50);
    let before = io.counts();
    assert!(remove(&store, "d020") > 0);
    let counts = io.counts() - before;
    assert!(counts.opens < 25, "{counts:?}");
    let syncs = (counts.syncs, counts.dir_syncs, counts.fs_syncs);
    assert_eq!(syncs, (0, 1, 0), "one of the names: {counts:?}");
    tidy(&store);
}

#[test]
fn further_names_of_a_layer_are_the_same_as_it() {
    let store = store();
    fork(&store, "a", "base");
    change(&store, "a", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    store.snapshot("a", "s", None).expect("made");
    store.commit("a", "image", None).expect("published");
    let same = |name: &str| {
        let object = store.resolve(name).expect("there");
        let effort = forkdisk::store::Effort::USUAL;
        let digest = store.digest(&object, effort, &Quiet).expect("computed");
        let digest = digest.expect("sealed");
        store.same_as(&object, digest).expect("asked")
    };
    assert_eq!(same("a@s"), ["image"]);
    assert_eq!(same("image"), ["a@s"]);
    let e = store.rename("a", "a").expect_err("it has that name");
    assert!(e.to_string().contains("its name already"), "{e}");
}

/// Removes one object; what the plan says becomes free.
fn remove(store: &Store, name: &str) -> u64 {
    let plan = store.plan_removal(&[name.to_string()], false);
    let plan = plan.unwrap_or_else(|e| panic!("{name}: {e}"));
    store.remove(&plan).expect("removed");
    plan.frees
}

/// Nothing is left over, and nothing is missing.
fn tidy(store: &Store) {
    let report = forkdisk::check::check(store, None, &Quiet).expect("checked");
    assert!(
        report.leaks.is_empty() && report.corruptions.is_empty(),
        "{report:?}"
    );
}

#[test]
fn what_only_a_removed_disk_needed_goes_with_it() {
    let store = store();
    fork(&store, "a", "base");
    change(&store, "a", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    // Both stand on what was a's layer, which has no name.
    fork(&store, "b", "a");
    assert_eq!(store.layers().expect("layers").sound.len(), 3);
    remove(&store, "b");
    assert_eq!(store.layers().expect("layers").sound.len(), 2);
    remove(&store, "a");
    assert_eq!(store.layers().expect("layers").sound.len(), 0);
    tidy(&store);
    // A base that never had a name.
    fork(&store, "c", "base");
    store.flatten("c", &Quiet).expect("flattened");
    fork(&store, "d", "c");
    remove(&store, "d");
    assert_eq!(refer(&store, "c"), 64);
    remove(&store, "c");
    tidy(&store);
    assert_eq!(store.list().expect("listed").len(), 1);
}

#[test]
fn what_happened_since_a_removal_was_planned_is_seen() {
    let store = store();
    for name in ["a", "b", "c"] {
        fork(&store, name, "base");
        change(&store, name, |disk| {
            disk.write(&[1; 4096], 0).expect("write")
        });
    }
    let plan = |name: &str| {
        store
            .plan_removal(&[name.to_string()], false)
            .expect("plan")
    };
    let (a, b, c) = (plan("a"), plan("b"), plan("c"));
    store.snapshot("a", "s", None).expect("made");
    fork(&store, "f", "b");
    store.rename("c", "d").expect("renamed");
    fork(&store, "c", "base");
    for plan in [&a, &b, &c] {
        let e = store.remove(plan).expect_err("it is not what it was");
        assert_eq!(e.kind(), forkdisk::error::Kind::Busy, "{e}");
    }
    tidy(&store);
    assert_eq!(store.list().expect("listed").len(), 7);
}

#[test]
fn a_disk_is_removed_though_a_crash_left_a_layer_on_it() {
    let store = store();
    fork(&store, "a", "base");
    fork(&store, "b", "base");
    fork(&store, "n", "base");
    // As a snapshot that did not come to its seal leaves it: a layer over a's, without a name.
    let (a, n) = (
        store.resolve("a").expect("there").id,
        store.resolve("n").expect("there").id,
    );
    let header = forkdisk::format::Header::new(n, a, true, 2, 1064 * BLOCK, 0, "a");
    use zerocopy::IntoBytes;
    let file = store
        .layers_dir()
        .open(&format!("{n}.layer"), forkdisk::io::Access::Write)
        .expect("opened");
    file.write_at(header.as_bytes(), 0).expect("written");
    store.names_dir().remove("n").expect("removed");
    let leaks = || {
        let report = forkdisk::check::check(&store, None, &Quiet).expect("checked");
        assert!(report.corruptions.is_empty(), "{report:?}");
        report.leaks
    };
    assert_eq!(leaks().len(), 1);
    remove(&store, "a");
    let left = leaks();
    assert_eq!(left.len(), 1);
    assert!(left[0].message.contains("left over"), "{left:?}");
    store.gc(false).expect("gc");
    tidy(&store);
}

#[test]
fn what_a_snapshot_in_the_middle_gives_back_is_said_before() {
    let store = store();
    fork(&store, "a", "base");
    let write = |range: std::ops::Range<u64>| {
        change(&store, "a", |disk| {
            for block in range {
                disk.write(&[1; 4096], block * BLOCK).expect("write");
            }
        });
    };
    for (name, range) in [("r", 0..10), ("s", 2..6), ("t", 4..8)] {
        write(range);
        store.snapshot("a", name, None).expect("made");
    }
    let all: Vec<String> = ["a@r", "a@s"].map(String::from).to_vec();
    // Of r 2..6 are hidden by s, and 6..8 by t, which r is seen through; of s 4..6 by t.
    let plan = store.plan_removal(&all, false).expect("plan");
    assert_eq!(plan.frees, 8 * BLOCK);
    let private = || -> u64 {
        let layers = store.layers().expect("layers").sound;
        layers.iter().map(|layer| layer.private_bytes).sum()
    };
    let before = private();
    store.remove(&plan).expect("removed");
    assert_eq!(before - private(), plan.frees);
    assert_eq!(store.gc(true).expect("gc").reclaimed, 0);
    tidy(&store);
}

/// A disk that is open for reading only.
fn reader(store: &Store, name: &str) -> Arc<CowDisk> {
    let object = store.resolve(name).expect("resolve");
    store.open_cow(&object, false).expect("open")
}

fn shows(disk: &CowDisk, byte: u8) -> bool {
    let mut seen = [0; 4096];
    disk.read(&mut seen, 0).expect("read");
    seen == [byte; 4096]
}

#[test]
fn a_disk_open_for_reading_keeps_its_layer_whoever_looks_below_it() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[9; 4096], 0).expect("write")
    });
    let disk = reader(&store, "d");
    let memory = || volatile::private().expect("memory");
    // Whoever puts other files below it had looked at it while somebody changed it.
    store
        .take_up("d", &disk, memory(), false)
        .expect("taken up");
    let (own, below) = disk.stands_on();
    assert!(own.is_some() && shows(&disk, 9));
    store.lay_down(&disk).expect("laid down");
    assert!(!disk.rechain(&below, below.clone()));
    assert!(shows(&disk, 9), "its own layer is gone");
    // While somebody else reads it nobody changes it; and it stays locked against those who write.
    let other = reader(&store, "d");
    assert!(!store.take_up("d", &disk, memory(), false).expect("read"));
    drop(other);
    let object = store.resolve("d").expect("d");
    assert!(store.open_cow(&object, true).is_err() && shows(&disk, 9));
    // Twice does no harm.
    store.lay_down(&disk).expect("laid down");
    store
        .take_up("d", &disk, memory(), false)
        .expect("taken up");
    store
        .take_up("d", &disk, memory(), false)
        .expect("taken up");
    store
        .snapshot_running(&disk, "d", "s", None)
        .expect("snapshot");
    let kind = |done: forkdisk::error::Result<()>| done.map_err(|e| e.kind());
    assert_eq!(kind(disk.write(&[1; 4096], 0)), Err(Kind::ReadOnly));
    assert_eq!(kind(disk.discard(0, 4096)), Err(Kind::ReadOnly));
    store.lay_down(&disk).expect("laid down");
    assert!(shows(&disk, 9) && disk.read_only());
    assert_eq!(disk.top_layer(), Some(store.resolve("d").expect("d").id));
    // Nobody can write to it meanwhile, and anybody can afterwards.
    let object = store.resolve("d").expect("d");
    assert!(store.open_cow(&object, true).is_err());
    // What is closed stays closed.
    disk.close().expect("closed");
    assert!(store.take_up("d", &disk, memory(), false).is_err());
    drop(disk);
    change(&store, "d", |disk| {
        disk.write(&[8; 4096], 0).expect("write")
    });
    assert!(shows(&reader(&store, "d"), 8));
    // Of a name that refers to another layer by now the present one is opened.
    let before = store.resolve("d").expect("d");
    store.snapshot("d", "t", None).expect("snapshot");
    let disk = store.open_cow(&before, false).expect("open");
    assert_eq!(disk.top_layer(), Some(store.resolve("d").expect("d").id));
}

/// What fails while a disk is made ready to be changed, or when that is over, leaves it as it was to those who read it, and to others.
#[test]
fn who_reads_a_disk_does_not_notice_what_fails() {
    let sim = SimDisk::new(1);
    let store = store_on(&sim);
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[9; 4096], 0).expect("write")
    });
    let mut failed = 0;
    for nth in 1.. {
        let disk = reader(&store, "d");
        let memory = volatile::private().expect("memory");
        let before = sim.calls();
        sim.fail_calls(before + nth, 1, FaultKind::Eio);
        let taken = store.take_up("d", &disk, memory, false);
        let done = taken.and_then(|_| store.snapshot_running(&disk, "d", &format!("s{nth}"), None));
        let laid = store.lay_down(&disk);
        let all = sim.calls() < before + nth;
        sim.clear_faults();
        failed += u32::from(done.is_err() || laid.is_err());
        assert!(shows(&disk, 9), "after call {nth}: {done:?} {laid:?}");
        // Others can read it, too, before all have let go of it.
        if laid.is_ok() || laid.is_err_and(|e| !e.to_string().contains("cannot lock")) {
            assert!(shows(&reader(&store, "d"), 9), "after call {nth}");
        }
        if all {
            break;
        }
    }
    assert!(failed > 5, "{failed}");
}
