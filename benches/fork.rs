//! Making disks: one, a thousand at once, and the ten-thousandth.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{World, measuring, median};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

fn allocated(dir: &Path) -> u64 {
    fs::read_dir(dir)
        .expect("a folder")
        .map(|e| e.expect("an entry").metadata().expect("there").blocks() * 512)
        .sum()
}

fn main() {
    let world = World::new(64 << 20);
    let store = &world.store;
    let mut made = 0;
    let mut create = |n: usize| -> f64 {
        let names: Vec<String> = (made..made + n).map(|i| format!("d{i:05}")).collect();
        made += n;
        let start = Instant::now();
        store.create(&names, "base", None).expect("created");
        start.elapsed().as_secs_f64() * 1e3
    };
    let singles = if measuring() { 21 } else { 1 };
    let first = median((0..singles).map(|_| create(1)).collect());
    println!("one fork                       {first:>8.2} ms");
    let before = world.io.counts();
    create(1);
    let c = world.io.counts() - before;
    println!(
        "    its calls: {} files, {} writes, {} bytes, {} syncs, {} of directories, {} renames",
        c.creates, c.writes, c.bytes_written, c.syncs, c.dir_syncs, c.renames
    );
    if !measuring() {
        create(10);
        return;
    }
    let mut batches = Vec::new();
    for _ in 0..9 {
        batches.push(create(1000));
    }
    println!(
        "1,000 forks in one call        {:>8.2} ms, {:.3} ms each",
        median(batches.clone()),
        median(batches.clone()) / 1000.0
    );
    println!(
        "    the first 1,000: {:.1} ms, the ninth: {:.1} ms",
        batches[0], batches[8]
    );
    let before = world.io.counts();
    create(9_999 - 9_000 - singles - 1);
    let c = world.io.counts() - before;
    println!(
        "    calls of the last batch: {} syncs, {} of directories, {} of the filesystem",
        c.syncs, c.dir_syncs, c.fs_syncs
    );
    let last = median((0..21).map(|_| create(1)).collect());
    println!(
        "the 10,000th and 20 more       {last:>8.2} ms, {:.2} of the first",
        last / first
    );
    let layers = allocated(&world.dir.path().join("layers"));
    let names = allocated(&world.dir.path().join("names"));
    let all = (layers + names) as f64 / 10_020.0;
    println!("bytes on the host for each     {all:>8.0} (layer and name)");
}
