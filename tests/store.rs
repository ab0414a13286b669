//! What the store tells of its objects, and what it makes of requests that others need not know.
#![allow(missing_docs, reason = "a test")]

use forkdisk::disk::Disk;
use forkdisk::io::count::Counting;
use forkdisk::io::os::OsDir;
use forkdisk::io::sim::SimDisk;
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::Id;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

#[path = "store/usage.rs"]
mod usage;

const BLOCK: u64 = 4096;

/// A store with an image `base`: 64 blocks of data, then 1,000 blocks of hole.
fn store() -> Store {
    let next = AtomicU64::new(1);
    let env = Env {
        id: Arc::new(move || Id(u128::from(next.fetch_add(1, SeqCst)).to_be_bytes())),
        now: Arc::new(|| 0),
    };
    let store = Store::init_on(SimDisk::new(1).root(), Path::new("/sim"), env).expect("a store");
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
fn removing_one_of_many_does_not_read_the_store_again_afterwards() {
    let (_dir, io, store) = counted(50);
    let opened = opens(&io, || {
        let plan = store
            .plan_removal(&["d000".to_string()], false)
            .expect("plan");
        store.remove(&plan).expect("removed");
    });
    // Names and layers for the plan, and once more to find the users; then under the lock, and not again when the names are gone.
    assert!(opened < 6 * 51 + 30, "{opened} opens among 50 disks");
    assert_eq!(store.list().expect("listed").len(), 50);
    assert_eq!(store.layers().expect("layers").sound.len(), 49);
    let garbage = store.gc(true).expect("gc");
    assert!(garbage.layers.is_empty() && garbage.files.is_empty());
}
