//! Disks and layers through their public interfaces: what operations cost, a full or failing host disk, threads, limits, damage.
#![allow(missing_docs, reason = "a test")]

#[path = "../common/mod.rs"]
mod common;
mod cost;
mod damage;
mod failing;
mod hooked;
mod limits;
mod stress;
mod threads;
mod written;

use common::env;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Result;
use forkdisk::io::count::Counting;
use forkdisk::io::sim::SimDisk;
use forkdisk::store::{ImportMode, ImportSource, Quiet, Store};
use std::path::Path;
use std::sync::Arc;

pub const B: u64 = 4096;

/// A store on `sim` with an image of these contents and the disk `d`.
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
    fork(&store, "image", "d", None);
    store
}
/// The store on `sim`, once more; `seed` makes its ids its own.
pub fn again(sim: &SimDisk, seed: u64) -> Store {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed << 20)).expect("a store")
}
/// The store with its I/O counted.
pub fn counted(sim: &SimDisk) -> (Store, Counting) {
    let counting = Counting::new(sim.root());
    let root = Arc::new(counting.clone());
    let store = Store::open_on(root, Path::new("/sim"), env(2 << 20)).expect("a store");
    (store, counting)
}
pub fn fork(store: &Store, from: &str, name: &str, size: Option<u64>) {
    store
        .create(&[name.to_string()], from, size)
        .unwrap_or_else(|e| panic!("fork {name}: {e:?}"));
}
pub fn open(store: &Store, name: &str) -> Result<Arc<CowDisk>> {
    store.open_cow(&store.resolve(name)?, true)
}
pub fn block(disk: &dyn Disk, n: u64) -> [u8; 4096] {
    let mut block = [0; 4096];
    disk.read(&mut block, n * B)
        .unwrap_or_else(|e| panic!("block {n}: {e:?}"));
    block
}
