//! What the store tells of its objects, and what it makes of requests that others need not know.
#![allow(missing_docs, reason = "a test")]

use forkdisk::disk::Disk;
use forkdisk::io::sim::SimDisk;
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::Id;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

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
    let e = plan("a@s", false).expect_err("in use");
    assert!(e.to_string().contains("a@s is in use by a, b"), "{e}");
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
