//! Reading through 1, 4, 16, 64 and 256 layers: the first touch of a region, and every later one.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Keeps, Rng, Workshop, compare, config, measuring, noise, side};
use criterion::{Criterion, Throughput};
use forkdisk::chain::{Budget, Chain, Place};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::units::{BLOCK, BLOCK_SIZE, Lba, REGION_BLOCKS, Region};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: usize = 64 << 20;
const BLOCKS: u64 = SIZE as u64 / BLOCK;
const REGIONS: u32 = (BLOCKS / REGION_BLOCKS as u64) as u32;
const READS: u64 = 4000;

/// Blocks that differ from the base, spread evenly over the layers: every disk reads the same blocks from as many places.
const CHANGED: usize = 4096;

struct Deep {
    title: String,
    chain: Arc<Chain>,
    disk: CowDisk,
}

fn resolution(c: &mut Criterion, all: &[Deep]) {
    let mut group = c.benchmark_group("first touch of a region");
    group.throughput(Throughput::Elements(1));
    for Deep { title, chain, .. } in all {
        group.bench_function(title, |b| {
            b.iter_custom(|iters| {
                let mut took = Duration::ZERO;
                let mut left = iters as u32;
                let mut place = [Place::Base];
                while left > 0 {
                    // The same layers, of which nothing is remembered.
                    let base = chain.base().clone();
                    let fresh = Chain::new(chain.layers().to_vec(), base, Budget::new(1 << 30));
                    let n = left.min(REGIONS);
                    let start = Instant::now();
                    for region in 0..n {
                        fresh
                            .places(Region(region), 0, black_box(&mut place))
                            .expect("sound");
                    }
                    took += start.elapsed();
                    left -= n;
                }
                took
            });
        });
    }
    group.finish();
    for (what, n) in [("one block", 1), ("a region", REGION_BLOCKS)] {
        let mut group = c.benchmark_group(format!("resolved already, {what}"));
        group.throughput(Throughput::Elements(n as u64));
        for Deep { title, chain, .. } in all {
            let mut places = vec![Place::Base; n];
            let mut rng = Rng(4);
            let some: Vec<Lba> = (0..4096)
                .map(|_| Lba((rng.below(BLOCKS) as usize / n * n) as u32))
                .collect();
            let mut turn = 0;
            group.bench_function(title, |b| {
                b.iter(|| {
                    turn = (turn + 1) % some.len();
                    let lba = some[turn];
                    chain
                        .places(lba.region(), lba.index(), black_box(&mut places))
                        .expect("sound");
                });
            });
        }
        group.finish();
    }
}

fn main() {
    let depths: &[usize] = if measuring() {
        &[1, 4, 16, 64, 256]
    } else {
        &[1, 4]
    };
    let shop = Workshop::new(SIZE, SIZE as u64);
    let data = noise(BLOCK_SIZE, 3);
    let changed = Rng(1).distinct(CHANGED, BLOCKS);
    let all: Vec<Deep> = depths
        .iter()
        .map(|depth| {
            let chain = shop.chain(*depth, &changed, &data);
            let (disk, file) = shop.disk(&Keeps::All, &chain);
            shop.remove(&file);
            let title = format!("depth {depth}");
            Deep { title, chain, disk }
        })
        .collect();

    let mut c = config();
    resolution(&mut c, &all);
    c.final_summary();

    let mut sides: Vec<_> = all
        .iter()
        .map(|deep| {
            side(&deep.title, move || {
                let mut rng = Rng(9);
                let mut buffer = vec![0; BLOCK_SIZE];
                let start = Instant::now();
                for _ in 0..READS {
                    let at = rng.below(BLOCKS) * BLOCK;
                    deep.disk.read(&mut buffer, at).expect("read");
                }
                start.elapsed()
            })
        })
        .collect();
    compare("read 4 KiB after the first touch", 21, READS, &mut sides);
}
