//! Layers that become one, bases that are made of them, and the space of snapshots that were removed in the middle. Random work of this kind is in the
//! model and crash tests; here are the cases one would ask about.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::{Rng, data, env, read_all};
use forkdisk::check::{check, scrub};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Error, Kind};
use forkdisk::io::os::OsDir;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::io::{Access, Dir};
use forkdisk::store::names::{read_name, stage};
use forkdisk::store::{Below, Flattened, ImportMode, ImportSource, Progress, Quiet, Store};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const B: u64 = 4096;

fn import(store: &Store, blocks: u64) {
    let image = data(5, blocks * B - 1000);
    let source = ImportSource::Reader(&mut &image[..]);
    store
        .import(source, "image", ImportMode::Copy, &Quiet)
        .expect("import");
    store
        .create(&["d".to_string()], "image", None)
        .expect("create");
}
fn simulated(blocks: u64) -> (SimDisk, Store) {
    let sim = SimDisk::new(1);
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(1)).expect("a store");
    import(&store, blocks);
    (sim, store)
}
fn again(sim: &SimDisk, seed: u64) -> Store {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed << 20)).expect("the store")
}
fn open(store: &Store, name: &str) -> Arc<CowDisk> {
    store
        .open_cow(&store.resolve(name).expect("resolve"), true)
        .unwrap_or_else(|e| panic!("open {name}: {e:?}"))
}
fn contents(store: &Store, name: &str) -> Vec<u8> {
    let disk = store
        .open_disk(&store.resolve(name).expect("resolve"), false)
        .unwrap_or_else(|e| panic!("open {name}: {e:?}"));
    read_all(&*disk).unwrap_or_else(|e| panic!("read {name}: {e:?}"))
}
fn depth(store: &Store, name: &str) -> u32 {
    let object = store.resolve(name).expect("resolve");
    store.details(&object).expect("details").depth
}
fn remove(store: &Store, name: &str) -> u64 {
    let plan = store
        .plan_removal(&[name.to_string()], false)
        .unwrap_or_else(|e| panic!("{name}: {e:?}"));
    store.remove(&plan).expect("remove");
    plan.frees
}
fn squash(store: &Store, name: &str, all: bool) -> u32 {
    let plan = store.plan_squash(name, all).expect("plan");
    let layers = plan.layers;
    let done = store.squash(plan, &Quiet).expect("squash");
    store.collect_former(&done.former).expect("collect");
    layers
}
fn sound(store: &Store) {
    let report = check(store, None, &Quiet).expect("check");
    assert!(
        report.corruptions.is_empty() && report.leaks.is_empty(),
        "{report:?}"
    );
}
/// Random changes, small ones and large ones.
fn change(disk: &dyn Disk, rng: &mut Rng) {
    let blocks = disk.size() / B;
    for _ in 0..6 {
        let at = rng.below(blocks);
        let n = (1 + rng.below(12)).min(blocks - at);
        match rng.below(4) {
            0 => disk.discard(at * B, n * B).expect("discard"),
            _ => disk
                .write(&data(rng.next() | 1, n * B), at * B)
                .expect("write"),
        }
    }
}

/// On a real filesystem: a chain of a hundred layers of which some have names.
#[test]
fn a_hundred_layers_become_one_and_then_a_base() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = Arc::new(OsDir::open(dir.path()).expect("opened"));
    let store = Store::init_on(root, dir.path(), env(1)).expect("a store");
    import(&store, 1500);
    let mut rng = Rng(11);
    let mut kept = BTreeMap::new();
    let disk = open(&store, "d");
    for n in 0..100 {
        change(&*disk, &mut rng);
        let name = format!("s{n}");
        store
            .snapshot_running(&disk, "d", &name, None)
            .expect("snapshot");
        if n % 10 == 3 {
            kept.insert(format!("d@{name}"), read_all(&*disk).expect("read"));
        }
    }
    change(&*disk, &mut rng);
    let now = read_all(&*disk).expect("read");
    let most: Vec<String> = (0..100)
        .filter(|n| n % 10 != 3)
        .map(|n| format!("d@s{n}"))
        .collect();
    let plan = store.plan_removal(&most, false).expect("plan");
    assert_eq!(plan.names.len(), 90);
    // What is hidden by now, though it stays as long as this disk is open here.
    assert!(plan.frees > 0);
    store.remove(&plan).expect("remove");
    disk.close().expect("close");
    drop(disk);
    assert_eq!(depth(&store, "d"), 101);
    let same = |store: &Store| {
        assert!(contents(store, "d") == now, "d");
        for (name, held) in &kept {
            assert!(contents(store, name) == *held, "{name}");
        }
    };
    same(&store);
    let given = store.gc(false).expect("gc");
    assert!(given.reclaimed > 0 && !given.shrunk.is_empty(), "{given:?}");
    same(&store);
    sound(&store);
    assert_eq!(squash(&store, "d", false), 100);
    assert_eq!(depth(&store, "d"), 2);
    same(&store);
    sound(&store);
    assert_eq!(depth(&store, "d@s3"), 4, "what has a name stays for it");
    assert_eq!(squash(&store, "d@s93", true), 94);
    same(&store);
    sound(&store);
    for name in ["d", "d@s93"] {
        if name == "d" {
            store.seal("d").expect("seal");
        }
        let flat = store.flatten(name, &Quiet).expect("flatten");
        assert!(flat.base.is_some() && flat.digest.is_some());
        store.collect_former(&flat.former).expect("collect");
        same(&store);
        sound(&store);
    }
    assert_eq!((depth(&store, "d"), depth(&store, "d@s93")), (2, 1));
    // Once more changes nothing.
    assert_eq!(store.flatten("d", &Quiet).expect("flatten").base, None);
    for name in kept.keys().filter(|n| *n != "d@s93") {
        remove(&store, name);
    }
    // The image is needed by nobody any more.
    assert!(remove(&store, "image") > 1000 * B);
    assert!(contents(&store, "d") == now);
    assert!(contents(&store, "d@s93") == kept["d@s93"]);
    let left = std::fs::read_dir(dir.path().join("bases"))
        .expect("bases")
        .count();
    assert_eq!(left, 2, "one base each");
    sound(&store);
}

/// A fresh fork has nothing of its own, and the layer it stands on is others' too.
#[test]
fn a_flattened_disk_stands_on_nothing_of_its_image() {
    let (_sim, store) = simulated(60);
    let disk = open(&store, "d");
    disk.write(&data(3, 9 * B), 5 * B).expect("write");
    store.commit_running(&disk, "d", "i", None).expect("commit");
    store
        .create(&["fork".to_string()], "i", None)
        .expect("create");
    let shown = contents(&store, "fork");
    let flatten = |name: &str| {
        let flat = store.flatten(name, &Quiet).expect("flatten");
        assert!(flat.base.is_some(), "{name}");
        store.collect_former(&flat.former).expect("collect");
    };
    // At rest, and open.
    store.seal("fork").expect("seal");
    flatten("fork");
    store.seal_open(&disk, "d").expect("seal");
    flatten("d");
    assert!(store.rechain(&disk).expect("rechain"));
    sound(&store);
    // Now there is nothing to seal, and nothing to flatten.
    store.seal("fork").expect("seal");
    store.seal_open(&disk, "d").expect("seal");
    for name in ["fork", "d"] {
        assert_eq!((depth(&store, name), name), (2, name));
        assert_eq!(store.flatten(name, &Quiet).expect("flatten").base, None);
    }
    // Both fail if anything still stands on them.
    remove(&store, "i");
    remove(&store, "image");
    assert!(contents(&store, "fork") == shown);
    assert!(read_all(&*disk).expect("read") == shown);
    disk.close().expect("close");
    drop(disk);
    sound(&store);
    assert_eq!(store.layers().expect("list").sound.len(), 4);
}

/// What a flattening made goes with what was written since the snapshot.
#[test]
fn a_rollback_takes_the_base_of_a_flattened_disk_with_it() {
    let (_sim, store) = simulated(60);
    store.snapshot("d", "s", None).expect("snapshot");
    let shown = contents(&store, "d");
    for open_meanwhile in [false, true] {
        let disk = open(&store, "d");
        disk.write(&data(3, 9 * B), 5 * B).expect("write");
        let running = if open_meanwhile {
            store.seal_open(&disk, "d").expect("seal");
            Some(disk)
        } else {
            disk.close().expect("close");
            drop(disk);
            store.seal("d").expect("seal");
            None
        };
        let flat = store.flatten("d", &Quiet).expect("flatten");
        if let Some(disk) = running {
            assert!(store.rechain(&disk).expect("rechain"));
            store.collect_former(&flat.former).expect("collect");
            store.rollback_running(&disk, "d", "s").expect("roll back");
            assert!(read_all(&*disk).expect("read") == shown);
            disk.close().expect("close");
        } else {
            store.collect_former(&flat.former).expect("collect");
            store.rollback("d", "s").expect("roll back");
            assert!(contents(&store, "d") == shown);
        }
        sound(&store);
    }
}

/// Ends the work after so many bytes.
struct After(AtomicU64);
impl Progress for After {
    fn update(&self, done: u64, _: u64) -> bool {
        done < self.0.load(SeqCst)
    }
}

#[test]
fn an_interrupted_squash_changes_nothing_and_goes_on() {
    let (_sim, store) = simulated(9000);
    let disk = open(&store, "d");
    for n in 0..3 {
        disk.write(&data(n * 7 + 1, 3000 * B), n * 2000 * B)
            .expect("write");
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .expect("snapshot");
    }
    let now = read_all(&*disk).expect("read");
    let plan = store.plan_squash("d", false).expect("plan");
    let (layers, bytes, top) = (plan.layers, plan.bytes, plan.top);
    assert_eq!((layers, bytes), (3, 7000 * B));
    let e = store
        .squash(plan, &After(AtomicU64::new(bytes / 2)))
        .expect_err("interrupted");
    assert_eq!(e.kind(), Kind::Interrupted);
    assert_eq!(depth(&store, "d"), 4);
    assert!(read_all(&*disk).expect("read") == now);
    let report = check(&store, None, &Quiet).expect("check");
    assert!(report.corruptions.is_empty(), "{report:?}");
    assert_eq!(report.leaks.len(), 1, "{report:?}");
    // A block of what was copied is not what it should be: it is copied again.
    let left = format!("layers/.tmp-{top}");
    _sim.flip(&left, 1030 * B + 5, 4).expect("flip");
    let plan = store.plan_squash("d", false).expect("plan");
    let done = store.squash(plan, &Quiet).expect("squash");
    // Of two pieces one was whole.
    assert_eq!(done.copied, bytes - 2048 * B);
    assert!(store.rechain(&disk).expect("rechain"));
    store.collect_former(&done.former).expect("collect");
    assert!(read_all(&*disk).expect("read") == now);
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&store, "d") == now);
    sound(&store);
    // One that nobody takes up is garbage.
    let disk = open(&store, "d");
    for n in 3..5 {
        change(&*disk, &mut Rng(n));
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .expect("snapshot");
    }
    let plan = store.plan_squash("d", false).expect("plan");
    let (id, name) = (plan.top, format!(".tmp-{}", plan.top));
    store
        .squash(plan, &After(AtomicU64::new(1)))
        .expect_err("interrupted");
    let gone = store.gc(false).expect("gc");
    assert_eq!(gone.files, [format!("layers/{name}")], "{id}");
    disk.close().expect("close");
    drop(disk);
    sound(&store);
}

/// Somebody else has the disk open: with the old files, until it is told.
#[test]
fn who_has_the_old_files_open_reads_on() {
    let (sim, store) = simulated(200);
    let disk = open(&store, "d");
    let mut rng = Rng(3);
    for n in 0..5 {
        change(&*disk, &mut rng);
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .expect("snapshot");
    }
    let old = store.resolve("d@s1").expect("resolve");
    let reader = store.open_cow(&old, false).expect("open");
    let held = read_all(&*reader).expect("read");
    let other = again(&sim, 2);
    change(&*disk, &mut rng);
    let now = read_all(&*disk).expect("read");
    for n in 0..5 {
        remove(&other, &format!("d@s{n}"));
    }
    let plan = other.plan_squash("d", false).expect("plan");
    let done = other.squash(plan, &Quiet).expect("squash");
    assert_eq!(other.collect_former(&done.former).expect("collect"), 0);
    assert!(read_all(&*disk).expect("read") == now);
    assert!(read_all(&*reader).expect("read") == held);
    assert!(store.rechain(&disk).expect("rechain"));
    assert!(!store.rechain(&disk).expect("rechain"), "once is enough");
    assert_eq!(disk.chain().depth(), 1);
    assert!(read_all(&*disk).expect("read") == now);
    drop(reader);
    assert!(other.collect_former(&done.former).expect("collect") > 0);
    assert!(read_all(&*disk).expect("read") == now);
    change(&*disk, &mut rng);
    let now = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&again(&sim, 3), "d") == now);
    sound(&other);
}

/// Whichever goes first: what is left is what somebody sees. A layer that gave back what it had hides nothing itself any more.
#[test]
fn snapshots_go_in_any_order() {
    for order in [
        [1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1],
        [3, 1, 5, 2, 4],
        [2, 4, 1, 5, 3],
        [4, 5, 1, 2, 3],
    ] {
        let (_sim, store) = simulated(200);
        for i in 1..=6 {
            let disk = open(&store, "d");
            disk.write(&data(i, 100 * B), 10 * B).expect("write");
            disk.close().expect("close");
            drop(disk);
            store.snapshot("d", &i.to_string(), None).expect("snapshot");
        }
        let (now, kept) = (contents(&store, "d"), contents(&store, "d@6"));
        for (gone, i) in order.into_iter().enumerate() {
            let name = format!("d@{i}");
            assert_eq!(remove(&store, &name), 100 * B, "{name} of {order:?}");
            assert!(contents(&store, "d") == now && contents(&store, "d@6") == kept);
            let held = store.layers().expect("layers").sound;
            let held: u64 = held.iter().map(|layer| layer.private_bytes).sum();
            assert_eq!(held, (5 - gone as u64) * 100 * B, "{name} of {order:?}");
        }
        // What still has a name is seen, whatever stands on it.
        store.create(&["f".to_string()], "d@6", None).expect("fork");
        assert_eq!(store.gc(false).expect("gc").reclaimed, 0);
        assert!(contents(&store, "f") == kept);
        sound(&store);
    }
}

#[test]
fn a_snapshot_that_goes_gives_back_what_nobody_sees() {
    let (sim, store) = simulated(2000);
    let disk = open(&store, "d");
    disk.write(&data(1, 1000 * B), 0).expect("write");
    store
        .snapshot_running(&disk, "d", "one", None)
        .expect("snapshot");
    disk.write(&data(2, 900 * B), 50 * B).expect("write");
    // While a disk above is open its files are left alone.
    assert_eq!(remove(&store, "d@one"), 0);
    let now = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    let used = sim.used();
    let pretended = store.gc(true).expect("gc");
    assert_eq!(pretended.reclaimed, 900 * B);
    assert_eq!(sim.used(), used);
    let given = store.gc(false).expect("gc");
    assert_eq!((given.reclaimed, given.shrunk.len()), (900 * B, 1));
    assert!(sim.used() + 890 * B < used, "{} of {used}", sim.used());
    assert!(contents(&store, "d") == now);
    sound(&store);
    // Removed at rest it gives back at once; but not what a fork of it still sees.
    store.snapshot("d", "two", None).expect("snapshot");
    store
        .create(&["f".to_string()], "d@two", None)
        .expect("fork");
    let disk = open(&store, "d");
    disk.write(&data(3, 500 * B), 100 * B).expect("write");
    disk.close().expect("close");
    drop(disk);
    let (d, f) = (contents(&store, "d"), contents(&store, "f"));
    remove(&store, "d@two");
    assert_eq!(store.gc(false).expect("gc").reclaimed, 0);
    assert!(contents(&store, "f") == f);
    let disk = open(&store, "f");
    disk.discard(150 * B, 100 * B).expect("discard");
    disk.close().expect("close");
    drop(disk);
    let f = contents(&store, "f");
    assert_eq!(store.gc(false).expect("gc").reclaimed, 100 * B);
    assert!(contents(&store, "d") == d && contents(&store, "f") == f);
    sound(&store);
    // Nobody takes the name for lost.
    let steps = forkdisk::check::repair::plan(&store, &Quiet).expect("plan");
    assert!(steps.is_empty(), "{steps:?}");
    // A disk that keeps its history may want back what it hides.
    let history = forkdisk::store::history::Limits {
        window: Some(3600),
        bytes: None,
    };
    store
        .set_history(&["f".to_string()], Some(history))
        .expect("a history");
    let disk = open(&store, "f");
    disk.discard(300 * B, 50 * B).expect("discard");
    disk.close().expect("close");
    drop(disk);
    assert_eq!(store.gc(false).expect("gc").reclaimed, 0);
}

/// Another store that was sent the snapshot knows it by its digest, whatever becomes of the layers here.
#[test]
fn a_digest_stays_when_layers_are_joined() {
    let (_sim, store) = simulated(40);
    for n in 0..2 {
        let disk = open(&store, "d");
        disk.write(&data(n + 1, 3 * B), n * B).expect("write");
        disk.close().expect("close");
        drop(disk);
        store.snapshot("d", &format!("s{n}"), None).expect("snap");
    }
    let names = store.names_dir();
    for name in ["d@s0", "d@s1"] {
        let mut record = read_name(&**names, name).expect("a name");
        record.extra.set("digest", Some("sha256:0".into()));
        record.extra.set("other", Some("kept".into()));
        let (staged, file) = stage(&**names, name, &record.encode(name)).expect("staged");
        file.sync().expect("sync");
        names.rename(&staged, name).expect("rename");
    }
    assert_eq!(squash(&store, "d", false), 2);
    let extra = |name: &str| read_name(&**names, name).expect("a name").extra;
    assert_eq!(extra("d@s0").get("digest"), Some("sha256:0"));
    assert_eq!(extra("d@s1").get("digest"), Some("sha256:0"));
    assert_eq!(extra("d@s1").get("other"), Some("kept"));
}

/// A snapshot every minute, of which the last few are kept: the chain stays short for ever.
#[test]
fn snapshots_without_end() {
    let (sim, store) = simulated(300);
    let disk = open(&store, "d");
    let mut rng = Rng(8);
    let mut deepest = 0;
    for n in 0..300u32 {
        change(&*disk, &mut rng);
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .expect("snapshot");
        if n >= 3 {
            remove(&store, &format!("d@s{}", n - 3));
        }
        if let Some(plan) = store.idle_stretch("d", &disk, 16).expect("a look") {
            let done = store.squash(plan, &Quiet).expect("squash");
            assert!(store.rechain(&disk).expect("rechain"));
            store.collect_former(&done.former).expect("collect");
        }
        deepest = deepest.max(disk.chain().depth());
    }
    assert!((10..=20).contains(&deepest), "{deepest}");
    let layers = store.layers().expect("layers").sound;
    assert!(layers.len() <= 21, "{}", layers.len());
    let now = read_all(&*disk).expect("read");
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&again(&sim, 2), "d") == now);
    sound(&store);
}

/// An image is where a squash ends, unless it is told not to.
#[test]
fn a_squash_ends_at_an_image() {
    let (_sim, store) = simulated(60);
    let snap = |disk: &str, name: &str, seed: u64| {
        let open = open(&store, disk);
        change(&*open, &mut Rng(seed));
        open.close().expect("close");
        drop(open);
        store.snapshot(disk, name, None).expect("snapshot");
    };
    snap("d", "a", 1);
    snap("d", "b", 2);
    // What publishing a layer as an image does to its name.
    let names = store.names_dir();
    let mut record = read_name(&**names, "d@b").expect("a name");
    record.kind = forkdisk::store::ObjectKind::Image;
    let (staged, file) = stage(&**names, "golden", &record.encode("golden")).expect("staged");
    file.sync().expect("sync");
    names.rename(&staged, "golden").expect("rename");
    store
        .create(&["e".to_string()], "golden", None)
        .expect("fork");
    let e = contents(&store, "e");
    assert_eq!(store.plan_squash("e", false).expect("plan").layers, 0);
    snap("e", "a", 3);
    snap("e", "b", 4);
    let before = contents(&store, "e");
    let plan = store.plan_squash("e", false).expect("plan");
    assert_eq!((plan.layers, plan.depth, plan.depth_after), (2, 5, 4));
    drop(plan);
    assert_eq!(squash(&store, "e", false), 2);
    let parent = store.resolve("e@b").expect("resolve").parent;
    let golden = store.resolve("golden").expect("resolve").id;
    assert_eq!(parent, Some(Below::Layer(golden)));
    assert!(contents(&store, "e") == before);
    // The image itself: its own layer and those below it.
    assert_eq!(squash(&store, "golden", false), 2);
    assert!(contents(&store, "golden") == e);
    assert_eq!(squash(&store, "e", true), 2);
    assert_eq!(depth(&store, "e"), 2);
    assert!(contents(&store, "e") == before);
    assert_eq!(store.plan_squash("image", false).expect("plan").layers, 0);
    let image = store.resolve("image").expect("resolve");
    let refused = store.plan_flatten(&image).expect_err("a base");
    assert_eq!(refused.kind(), Kind::Invalid);
    sound(&store);
}

/// The process dies after the rename and before anything is synced; a `gc` comes, and then the power goes. Either file is there, and all it stands on.
#[test]
fn a_rename_that_nobody_synced_costs_nothing() {
    let (sim, store) = simulated(60);
    let disk = open(&store, "d");
    for n in 0..4 {
        change(&*disk, &mut Rng(n));
        store
            .snapshot_running(&disk, "d", &format!("s{n}"), None)
            .expect("snapshot");
    }
    disk.close().expect("close");
    drop(disk);
    for n in 0..3 {
        remove(&store, &format!("d@s{n}"));
    }
    let now = contents(&store, "d");
    let plan = store.plan_squash("d", false).expect("plan");
    assert_eq!(store.squash(plan, &Quiet).expect("squash").former.len(), 3);
    drop(store);
    for cut in 0.. {
        let left = sim.kill();
        let store = again(&left, 2);
        left.cut_at(left.ops() + cut);
        let done = store.gc(false);
        for seed in 0..12 {
            let store = again(&left.crash(seed), 3);
            for name in ["d", "d@s3"] {
                assert!(
                    contents(&store, name) == now,
                    "cut {cut}, seed {seed}: {name}"
                );
            }
        }
        if let Ok(done) = done {
            assert_eq!(done.layers.len(), 3);
            break;
        }
    }
}

/// The process dies while it closes the disk that hides what is below; a `gc` comes, and then the power goes. What the disk hid only in memory is still
/// there below it.
#[test]
fn what_hides_only_in_memory_hides_nothing() {
    let (mut clean, mut reclaimed) = (0, 0);
    for cut in 0.. {
        let (sim, store) = simulated(60);
        let disk = open(&store, "d");
        disk.write(&data(1, 40 * B), 0).expect("write");
        disk.close().expect("close");
        drop(disk);
        store.snapshot("d", "s", None).expect("snapshot");
        remove(&store, "d@s");
        let before = contents(&store, "d");
        let disk = open(&store, "d");
        disk.write(&data(2, 30 * B), 5 * B).expect("write");
        let after = read_all(&*disk).expect("read");
        sim.cut_at(sim.ops() + cut);
        if disk.close().is_ok() {
            break;
        }
        drop(disk);
        let left = sim.kill();
        let store = again(&left, 2);
        clean += u32::from(store.gc(true).expect("gc").reclaimed > 0);
        reclaimed += u32::from(store.gc(false).expect("gc").reclaimed > 0);
        for seed in 0..12 {
            let found = contents(&again(&left.crash(seed), 3), "d");
            assert!(
                found == before || found == after,
                "cut {cut}, seed {seed}: neither the one nor the other"
            );
        }
    }
    assert!(clean > 0 && reclaimed > 0, "{clean} {reclaimed}");
}

/// The power goes at each step of a reclaim: what is seen stays the same, and the next one gives back what is left.
#[test]
fn a_reclaim_that_is_cut_changes_nothing() {
    let (sim, store) = simulated(60);
    let mut seen = Vec::new();
    for (seed, at) in [(1, 0), (2, 5)] {
        let disk = open(&store, "d");
        disk.write(&data(seed, 40 * B), at * B).expect("write");
        seen = read_all(&*disk).expect("read");
        disk.close().expect("close");
        drop(disk);
        if seed == 1 {
            store.snapshot("d", "s", None).expect("snapshot");
            let disk = open(&store, "d");
            remove(&store, "d@s");
            disk.close().expect("close");
        }
    }
    drop(store);
    let sim = sim.crash_with(Policy::AllDone);
    for cut in 0.. {
        let left = sim.crash_with(Policy::AllDone);
        left.set_garbage_pages(true);
        left.cut_at(left.ops() + cut);
        let done = again(&left, 2).gc(false);
        for seed in 0..40 {
            let after = left.crash(seed);
            let store = again(&after, 3);
            assert!(contents(&store, "d") == seen, "cut {cut}, seed {seed}");
            store.gc(false).expect("gc");
            assert!(contents(&store, "d") == seen, "cut {cut}, seed {seed}");
            sound(&store);
        }
        if let Ok(done) = done {
            assert_eq!(done.reclaimed, 35 * B);
            break;
        }
    }
}

/// Ends the work when it is told of it for so many times.
struct Times(AtomicU64);

impl Progress for Times {
    fn update(&self, _: u64, _: u64) -> bool {
        let left = self.0.load(SeqCst);
        self.0.store(left.saturating_sub(1), SeqCst);
        left > 0
    }
}

fn flatten(store: &Store, name: &str, after: u64) -> Result<Flattened, Error> {
    let done = store.flatten(name, &Times(AtomicU64::new(after)))?;
    store.collect_former(&done.former).expect("collect");
    Ok(done)
}
fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes);
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// What an interrupted flattening has copied is not copied again, but for what was changed since; and `gc` removes it.
#[test]
fn an_interrupted_flattening_goes_on() {
    let (_sim, store) = simulated(4000);
    let disk = open(&store, "d");
    disk.write(&data(9, 3000 * B), 500 * B).expect("write");
    let run = |after: u64| {
        store.seal_open(&disk, "d").expect("seal");
        let done = flatten(&store, "d", after);
        store.rechain(&disk).expect("rechain");
        done
    };
    let bases = || store.bases_dir().list().expect("list").len();
    let error = run(9).expect_err("interrupted");
    assert_eq!((error.kind(), bases()), (Kind::Interrupted, 2));
    assert!(
        error
            .hint_text()
            .is_some_and(|hint| hint.contains("goes on")),
        "{error:?}"
    );
    // In what was copied, and behind it; data, and zeros.
    for at in [100, 700, 3900] {
        disk.write(&data(at, 10 * B), at * B).expect("write");
        disk.discard((at + 40) * B, 20 * B).expect("discard");
    }
    run(12).expect_err("interrupted");
    let now = read_all(&*disk).expect("read");
    let done = run(u64::MAX).expect("flattened");
    // Two attempts that got to 9 and 12 MiB: 8 are known to be there.
    assert!(
        done.copied < (4000 - 8 * 256 + 60) * B && done.copied > 0,
        "{done:?}"
    );
    assert_eq!(done.digest, Some(sha256(&now)));
    assert!(read_all(&*disk).expect("read") == now);
    disk.close().expect("close");
    drop(disk);
    assert!(contents(&store, "d") == now);
    // What was open when it could have gone.
    store.gc(false).expect("gc");
    sound(&store);
    let read = scrub(&store, None, Default::default(), &Quiet).expect("scrub");
    assert!(read.corruptions.is_empty(), "{read:?}");
    assert_eq!(bases(), 2, "the image, and the new one");
    // Nobody comes back for it.
    store
        .create(&["e".to_string()], "image", None)
        .expect("create");
    let e = open(&store, "e");
    e.write(&data(9, 3000 * B), 500 * B).expect("write");
    e.close().expect("close");
    drop(e);
    store.snapshot("e", "s", None).expect("snapshot");
    flatten(&store, "e@s", 9).expect_err("interrupted");
    assert_eq!(bases(), 3);
    store.gc(false).expect("gc");
    assert_eq!(bases(), 2);
    sound(&store);
}

/// What an earlier attempt left in the store.
fn left(store: &Store) -> Arc<dyn Dir> {
    let names = store.bases_dir().list().expect("list");
    let mut names = names.iter().map(|(name, _)| name);
    let left = names.find(|name| name.starts_with(".tmp-")).expect("one");
    store.bases_dir().subdir(left).expect("open")
}

/// What an earlier attempt copied is not believed where it is not what it was: of a small disk, and of one of which no digest is computed.
#[test]
fn a_damaged_copy_is_not_gone_on_with() {
    for size in [3000 * B, 17 << 30] {
        let (_sim, store) = simulated(3000);
        store.resize("d", size).expect("resize");
        store.snapshot("d", "s", None).expect("snapshot");
        let shown = |store: &Store| {
            let object = store.resolve("d@s").expect("resolve");
            let disk = store.open_disk(&object, false).expect("open");
            let mut buf = vec![0; (3000 * B) as usize];
            disk.read(&mut buf, 0).expect("read");
            buf
        };
        let now = shown(&store);
        // Other bytes; none where there were some; and some where there were none in between.
        for damage in 0..3 {
            flatten(&store, "d@s", 9).expect_err("interrupted");
            let image = left(&store).open("image", Access::Write).expect("open");
            match damage {
                0 => image.write_at(&[7; 10], 5 * B + 7).expect("write"),
                1 => image.punch(100 * B, 20 * B).expect("punch"),
                _ => image.write_at(&[0; 4096], 8 * B).expect("write"),
            }
            image.sync().expect("sync");
            drop(image);
            let error = flatten(&store, "d@s", u64::MAX).expect_err("damaged");
            assert_eq!(error.kind(), Kind::Corrupt, "{damage}: {error:?}");
            assert!(shown(&store) == now, "{damage}");
        }
        // Without its files a record is worth nothing.
        flatten(&store, "d@s", 9).expect_err("interrupted");
        left(&store).remove("sums").expect("remove");
        let done = flatten(&store, "d@s", u64::MAX).expect("flattened");
        assert_eq!(done.digest.is_some(), size < 16 << 30);
        assert!(done.digest.is_none_or(|digest| digest == sha256(&now)));
        assert!(shown(&store) == now);
        store.gc(false).expect("gc");
        sound(&store);
    }
}

/// Who takes away what is being flattened, or squashed, finds its files in use: they go with the attempt.
#[test]
fn what_is_rolled_back_under_a_flatten_leaves_nothing() {
    struct Meanwhile<'a>(&'a Store, AtomicU64);
    impl Progress for Meanwhile<'_> {
        fn update(&self, _: u64, _: u64) -> bool {
            if self.1.fetch_add(1, SeqCst) == 1 {
                self.0.rollback("d", "s").expect("rollback");
            }
            true
        }
    }
    for squash in [false, true] {
        let (_sim, store) = simulated(3000);
        let before = contents(&store, "d");
        let write = |seed: u64| {
            let disk = open(&store, "d");
            disk.write(&data(seed, 2600 * B), 100 * B).expect("write");
            disk.close().expect("close");
        };
        store.snapshot("d", "s", None).expect("snapshot");
        for seed in 1..3 {
            write(seed);
            store.seal("d").expect("seal");
        }
        let meanwhile = Meanwhile(&store, AtomicU64::new(0));
        let error = match squash {
            false => store.flatten("d", &meanwhile).expect_err("gone"),
            true => {
                let plan = store.plan_squash("d", false).expect("plan");
                store.squash(plan, &meanwhile).expect_err("gone")
            }
        };
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        assert!(contents(&store, "d") == before);
        sound(&store);
    }
}

/// A death while the record is written leaves nothing that stays.
#[test]
fn a_half_written_record_goes() {
    let (_sim, store) = simulated(3000);
    store.snapshot("d", "s", None).expect("snapshot");
    flatten(&store, "d@s", 9).expect_err("interrupted");
    left(&store)
        .open(".tmp-copied", Access::CreateNew)
        .expect("made");
    let done = flatten(&store, "d@s", u64::MAX).expect("flattened");
    let base = done.base.expect("a base").to_string();
    let dir = store.bases_dir().subdir(&base).expect("open");
    let mut files: Vec<String> = dir.list().expect("list").into_iter().map(|f| f.0).collect();
    files.sort();
    assert_eq!(files, ["image", "meta", "sums"]);
}

/// Attempts that are interrupted, at any moment and by power cuts, between writes, snapshots, rollbacks, squashes and other sizes: in the end it is what the
/// disk shows.
#[test]
fn interrupted_flattenings_of_a_disk_that_changes() {
    let (mut went_on, mut compared) = (0, 0);
    for seed in 0..24 {
        let (mut sim, mut store) = simulated(3000);
        let mut rng = Rng(seed * 7919 + 3);
        let mut plain = contents(&store, "d");
        let mut kept: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for step in 0..40 {
            match rng.below(9) {
                0 | 1 => {
                    let disk = open(&store, "d");
                    change(&*disk, &mut rng);
                    plain = read_all(&*disk).expect("read");
                    disk.close().expect("close");
                }
                2 => {
                    let name = format!("s{step}");
                    store.snapshot("d", &name, None).expect("snapshot");
                    kept.insert(name, plain.clone());
                }
                3 if !kept.is_empty() => {
                    let n = rng.below(kept.len() as u64) as usize;
                    if let Some((name, bytes)) = kept.iter().nth(n) {
                        store.rollback("d", name).expect("rollback");
                        plain = bytes.clone();
                    }
                    kept.retain(|name, _| store.resolve(&format!("d@{name}")).is_ok());
                }
                4 => drop(squash(&store, "d", rng.below(2) == 0)),
                5 => {
                    let size = (2000 + rng.below(2000)) * B;
                    store.resize("d", size).expect("resize");
                    plain.resize(size as usize, 0);
                }
                6 => {
                    store.seal("d").expect("seal");
                    sim.cut_at(sim.ops() + rng.below(80));
                    let _ = store.flatten("d", &Quiet);
                    drop(store);
                    sim = sim.crash(seed * 100 + step);
                    store = again(&sim, step + 2);
                }
                _ => {
                    store.seal("d").expect("seal");
                    let after = 4 + rng.below(14);
                    let left = store.bases_dir().list().expect("list");
                    let left = left.iter().any(|(name, _)| name.starts_with(".tmp-"));
                    match flatten(&store, "d", after) {
                        Ok(done) => {
                            // A disk may have got another size since its layer was sealed.
                            let base = done.base.map(|id| store.base_meta(id).expect("meta"));
                            if base.is_some_and(|b| b.len == plain.len() as u64) {
                                let digest = sha256(&plain);
                                assert_eq!(done.digest, Some(digest), "{seed}, {step}");
                                compared += 1;
                            }
                            went_on +=
                                u32::from(left && done.base.is_some() && done.copied < done.bytes);
                        }
                        Err(e) => assert_eq!(e.kind(), Kind::Interrupted, "{seed}, {step}: {e:?}"),
                    }
                }
            }
            assert!(contents(&store, "d") == plain, "{seed}, {step}");
        }
        store.seal("d").expect("seal");
        flatten(&store, "d", u64::MAX).expect("flatten");
        store.gc(false).expect("gc");
        assert!(contents(&store, "d") == plain, "{seed}");
        for (name, bytes) in &kept {
            assert!(
                contents(&store, &format!("d@{name}")) == *bytes,
                "{seed}: {name}"
            );
        }
        sound(&store);
        let read = scrub(&store, None, Default::default(), &Quiet).expect("scrub");
        assert!(read.corruptions.is_empty(), "{seed}: {read:?}");
    }
    assert!(went_on > 5 && compared > 10, "{went_on}, {compared}");
}
