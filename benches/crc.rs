//! The checksum of a block, against copying it: what every read and every write pays once.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::noise;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;

/// 16 MiB, more than the caches of a core: blocks come from memory, as after a read of the page cache.
const COLD: usize = 16 << 20;

fn crc(c: &mut Criterion) {
    let block = noise(4096, 1);
    let mut copy = vec![0u8; 4096];
    let mut group = c.benchmark_group("one block of 4 KiB");
    group.throughput(Throughput::Bytes(4096));
    group.bench_function("CRC-32, in the cache", |b| {
        b.iter(|| forkdisk::format::crc(black_box(&block)));
    });
    group.bench_function("copy, in the cache", |b| {
        b.iter(|| {
            copy.copy_from_slice(black_box(&block));
            black_box(copy[7])
        });
    });
    let long = noise(COLD, 2);
    let mut at = 0;
    let mut next = move || {
        at = (at + 4096 * 7) % COLD;
        at..at + 4096
    };
    group.bench_function("CRC-32, from memory", |b| {
        b.iter(|| forkdisk::format::crc(black_box(&long[next()])));
    });
    group.bench_function("copy, from memory", |b| {
        b.iter(|| {
            copy.copy_from_slice(black_box(&long[next()]));
            black_box(copy[7])
        });
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sample_size(30)
}

criterion_group!(name = benches; config = config(); targets = crc);
criterion_main!(benches);
