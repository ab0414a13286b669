//! What differs between a disk and its base, and that as a stream: 1 GiB, of which 1 % is changed at random places.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, config, measuring, noise};
use forkdisk::disk::Disk;
use forkdisk::format::stream::Digest;
use forkdisk::store::{Quiet, changes, write_stream};
use forkdisk::units::{BLOCK, BLOCK_SIZE};

fn main() {
    let blocks: usize = if measuring() { 1 << 18 } else { 1 << 12 };
    let mut world = World::new(blocks * BLOCK_SIZE);
    let disk = world.fork("base");
    let mut rng = Rng(3);
    for at in rng.distinct(blocks / 100, blocks as u64) {
        disk.write(&noise(BLOCK_SIZE, at + 9), at * BLOCK)
            .expect("written");
    }
    disk.close().expect("closed");
    drop(disk);
    let state = |name: &str| {
        let object = world.store.resolve(name).expect("there");
        world.store.state(&object).expect("opened")
    };
    let (lower, upper) = (state("base"), state(&world.last()));
    let mut c = config();
    c.bench_function("diff", |b| {
        b.iter(|| {
            let mut found = changes(Some(&lower), &upper);
            let mut n = 0;
            loop {
                let (change, end) = found.advance().expect("compared");
                n += change.map_or(0, |c| c.len / BLOCK);
                if end {
                    break;
                }
            }
            assert_eq!(n, blocks as u64 / 100);
        });
    });
    let since = Some((&lower, Digest([0; 32])));
    c.bench_function("export --since", |b| {
        b.iter(|| {
            let totals = write_stream(&upper, since, None, &mut |_| Ok(()), &Quiet);
            assert_eq!(totals.expect("written").data, blocks as u64 / 100 * BLOCK);
        });
    });
    c.final_summary();
}
