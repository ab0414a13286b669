//! What damage does: to `check`, `scrub` and `repair`, to readers and writers, and to every decoder.
#![allow(missing_docs, reason = "a test")]

mod bounded;
#[path = "../common/mod.rs"]
mod common;
mod corpus;
mod hostile;
mod matrix;
mod repair;
mod scrub;

use common::env;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Result;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::store::{CheckReport, ImportMode, ImportSource, Quiet, Store};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

pub const B: u64 = 4096;

/// What all names of a store hold.
pub type Contents = BTreeMap<String, Vec<u8>>;

/// A store on `sim` with an image of these contents.
pub fn store_with(sim: &SimDisk, image: &[u8]) -> Store {
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(1)).expect("a store");
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .expect("import");
    store
}
/// The store on `sim`, once more; `seed` makes its ids its own.
pub fn again(sim: &SimDisk, seed: u64) -> Store {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed << 20)).expect("a store")
}
pub fn fork(store: &Store, from: &str, name: &str) {
    store
        .create(&[name.to_string()], from, None)
        .unwrap_or_else(|e| panic!("fork {name}: {e:?}"));
}
pub fn open(store: &Store, name: &str) -> Result<Arc<CowDisk>> {
    store.open_cow(&store.resolve(name)?, true)
}
/// Opens a disk for writing, and closes it.
pub fn change(store: &Store, name: &str, work: impl FnOnce(&CowDisk)) {
    let disk = open(store, name).unwrap_or_else(|e| panic!("open {name}: {e:?}"));
    work(&disk);
    disk.close().expect("close");
}
pub fn contents(store: &Store) -> Contents {
    let mut contents = Contents::new();
    for object in store.list().expect("list") {
        let disk = store.open_disk(&object, false).expect("open");
        contents.insert(object.name, common::read_all(&*disk).expect("read"));
    }
    contents
}
pub fn checked(store: &Store) -> CheckReport {
    forkdisk::check::check(store, None, &Quiet).expect("a check")
}
/// Slot and layer file of a block of the layer that `name` refers to.
pub fn slot_of(store: &Store, name: &str, lba: u32) -> (String, u64) {
    use forkdisk::format::Pointer;
    use forkdisk::io::Access;
    let id = store.resolve(name).expect("resolve").id;
    let file = format!("{id}.layer");
    let open = store.layers_dir().open(&file, Access::Read).expect("open");
    let layer = forkdisk::layer::ReadLayer::open(open).expect("a layer");
    match layer.pointer(forkdisk::units::Lba(lba)).expect("a pointer") {
        Pointer::Data { slot, .. } => (format!("layers/{file}"), slot.0.into()),
        other => panic!("{name} has {other:?} for block {lba}"),
    }
}
/// A small store at rest: an image, a disk with a snapshot, a fork of the snapshot, one that was never opened; data, zeros and several
/// runs.
pub fn small() -> (SimDisk, Contents) {
    let sim = SimDisk::new(1);
    let image: Vec<u8> = (0..9 * 4096 - 100)
        .map(|i| (i / 7 % 251) as u8 + 1)
        .collect();
    let store = store_with(&sim, &image);
    fork(&store, "image", "d");
    let disk = open(&store, "d").expect("d");
    disk.write(&[2; 3 * 4096], 0).expect("write");
    disk.discard(5 * B, B).expect("discard");
    disk.flush().expect("flush");
    store
        .snapshot_running(&disk, "d", "s", Some("a message"))
        .expect("snapshot");
    disk.write(&[3; 5000], 3000).expect("write");
    disk.checkpoint().expect("checkpoint");
    disk.write(&[4; 4096], 7 * B).expect("write");
    disk.close().expect("close");
    drop(disk);
    fork(&store, "d@s", "f");
    change(&store, "f", |f| f.write(&[5; 4096], B).expect("write"));
    fork(&store, "d@s", "new");
    let contents = contents(&store);
    drop(store);
    (sim.crash_with(Policy::AllDone), contents)
}
