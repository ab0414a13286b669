//! Reading and writing a disk without any transport: what one request costs, of a block and of 1 MiB, wherever its blocks are.
//!
//! Once with files of the host, whose pages stay in memory; and once without: data is not kept, and a block is copied from one
//! place. What then remains is forkdisk's own work, and hardly any noise.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Keeps, Rng, Workshop, config, noise};
use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::units::{BLOCK, BLOCK_SIZE};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SIZE: usize = 64 << 20;
const BLOCKS: u64 = SIZE as u64 / BLOCK;
const LARGE: usize = 1 << 20;

/// Offsets of all pieces of `len` bytes of the disk, in random order.
fn offsets(len: usize) -> Vec<u64> {
    let all = SIZE / len;
    let order = Rng(5).distinct(all, all as u64);
    order.iter().map(|i| i * len as u64).collect()
}

/// Writes every block, so that runs of neighbours are as long as the request; or, scattered, so that no two are.
fn fill(disk: &CowDisk, data: &[u8], scattered: bool) {
    let len = if scattered { BLOCK_SIZE } else { LARGE };
    for at in offsets(len) {
        disk.write(&data[..len], at).expect("written");
    }
    disk.flush().expect("flushed");
}

fn reading(b: &mut Bencher<'_>, disk: &CowDisk, len: usize) {
    let offsets = offsets(len);
    let mut buf = vec![0; len];
    let mut turn = 0;
    b.iter(|| {
        turn = (turn + 1) % offsets.len();
        disk.read(&mut buf, offsets[turn]).expect("read");
    });
}

fn worlds() -> [(&'static str, Keeps, Vec<u8>); 2] {
    let data = noise(LARGE, 2);
    let block = noise(BLOCK_SIZE, 3);
    let same = block.repeat(LARGE / BLOCK_SIZE);
    [
        ("", Keeps::All, data),
        (", own work alone", Keeps::This(Arc::new(block)), same),
    ]
}

fn reads(c: &mut Criterion) {
    let shop = Workshop::new(SIZE, SIZE as u64);
    assert!(shop.base.base().has_sums(), "the base is checked as well");
    for (world, keeps, data) in worlds() {
        let disk = |scattered| {
            let (disk, name) = shop.disk(&keeps, &shop.base);
            fill(&disk, &data, scattered);
            shop.remove(&name);
            disk
        };
        let (own, scattered) = (disk(false), disk(true));
        let (zeros, name) = shop.disk(&keeps, &shop.base);
        zeros.discard(0, SIZE as u64).expect("discarded");
        shop.remove(&name);
        let mut sources = vec![
            ("own layer", own),
            ("own layer, scattered", scattered),
            ("zeros", zeros),
        ];
        if matches!(keeps, Keeps::All) {
            let all: Vec<u64> = (0..BLOCKS).collect();
            for (title, chain) in [
                ("sealed layer", shop.chain(1, &all, &data[..BLOCK_SIZE])),
                ("base", shop.base.clone()),
            ] {
                let (disk, name) = shop.disk(&keeps, &chain);
                shop.remove(&name);
                sources.push((title, disk));
            }
        }
        for (title, len) in [("4 KiB", BLOCK_SIZE), ("1 MiB", LARGE)] {
            let mut group = c.benchmark_group(format!("read {title}{world}"));
            group.throughput(Throughput::Bytes(len as u64));
            for (from, disk) in &sources {
                group.bench_function(*from, |b| reading(b, disk, len));
            }
            group.finish();
        }
        let mut group = c.benchmark_group(format!("read 512 bytes{world}"));
        group.bench_function("own layer", |b| reading(b, &sources[0].1, 512));
        group.finish();
    }
}

/// Writes to new disks, each piece of each once.
fn first_touch(
    iters: u64,
    data: &[u8],
    offsets: &[u64],
    new: &dyn Fn() -> (CowDisk, String),
    remove: &dyn Fn(&str),
) -> Duration {
    let mut took = Duration::ZERO;
    let mut left = iters as usize;
    while left > 0 {
        let (disk, name) = new();
        // The first write reserves what the layer needs once.
        disk.write(data, offsets[0]).expect("written");
        let n = left.min(offsets.len() - 1);
        let start = Instant::now();
        for at in &offsets[1..=n] {
            disk.write(data, *at).expect("written");
        }
        took += start.elapsed();
        left -= n;
        drop(disk);
        remove(&name);
    }
    took
}

fn writes(c: &mut Criterion) {
    let shop = Workshop::new(SIZE, SIZE as u64);
    for (world, keeps, data) in worlds() {
        for (title, len) in [("512 bytes", 512), ("4 KiB", BLOCK_SIZE), ("1 MiB", LARGE)] {
            let mut group = c.benchmark_group(format!("write {title}{world}"));
            group.throughput(Throughput::Bytes(len as u64));
            let offsets = offsets(len.max(BLOCK_SIZE));
            let private = |data: &[u8], b: &mut Bencher<'_>| {
                let (disk, name) = shop.disk(&keeps, &shop.base);
                fill(&disk, data, len < LARGE);
                let mut turn = 0;
                b.iter(|| {
                    turn = (turn + 1) % offsets.len();
                    disk.write(&data[..len], offsets[turn]).expect("written");
                });
                drop(disk);
                shop.remove(&name);
            };
            group.bench_function("first touch", |b| {
                b.iter_custom(|iters| {
                    first_touch(
                        iters,
                        &data[..len],
                        &offsets,
                        &|| shop.disk(&keeps, &shop.base),
                        &|name| shop.remove(name),
                    )
                });
            });
            group.bench_function("private already", |b| private(&data, b));
            if len == LARGE {
                let mut holes = data.clone();
                for block in holes.chunks_exact_mut(BLOCK_SIZE).step_by(2) {
                    block.fill(0);
                }
                group.bench_function("every second block zeros", |b| private(&holes, b));
            }
            group.finish();
        }
    }
}

criterion_group!(name = benches; config = config(); targets = reads, writes);
criterion_main!(benches);
