//! The checksum of a block, against copying it: what every read and every write pays once. And against other crates and another polynomial.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{config, noise};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// 64 MiB, more than the caches of a core: blocks come from memory, as after a read of what the page cache holds.
const COLD: usize = 64 << 20;

type Sum = fn(&[u8]) -> u64;

fn crc(c: &mut Criterion) {
    let long = noise(COLD, 2);
    let sums: [(&str, Sum); 4] = [
        ("CRC-32, ours", |b| u64::from(forkdisk::format::crc(b))),
        ("CRC-32, crc32fast", |b| u64::from(crc32fast::hash(b))),
        ("CRC-32, crc-fast", |b| {
            crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, b)
        }),
        ("CRC-32C, crc32c", |b| u64::from(crc32c::crc32c(b))),
    ];
    let check = &long[..4096];
    for (name, sum) in &sums[1..3] {
        assert_eq!(sums[0].1(check), sum(check), "{name} is the same sum");
    }
    for (title, len) in [("4 KiB", 4096), ("1 MiB", 1 << 20)] {
        let mut group = c.benchmark_group(format!("checksum of {title}"));
        group.throughput(Throughput::Bytes(len as u64));
        // Warm: the same bytes again and again. Cold: others each time, as far apart as the memory allows.
        for (heat, step) in [("warm", 0), ("cold", len * 7)] {
            let mut at = 0;
            let mut next = || {
                at = (at + step) % COLD;
                black_box(&long[at..at + len])
            };
            for (name, sum) in sums {
                group.bench_function(format!("{name}, {heat}"), |b| b.iter(|| sum(next())));
            }
            let mut copy = vec![0u8; len];
            group.bench_function(format!("copy, {heat}"), |b| {
                b.iter(|| {
                    copy.copy_from_slice(next());
                    black_box(copy[7])
                });
            });
        }
        // As a read does it: the bytes are copied out of the page cache, and what was copied is checked.
        let mut at = 0;
        let mut copy = vec![0u8; len];
        for (name, sum) in &sums[..3] {
            group.bench_function(format!("copy, then {name}, cold"), |b| {
                b.iter(|| {
                    at = (at + len * 7) % COLD;
                    copy.copy_from_slice(black_box(&long[at..at + len]));
                    sum(black_box(&copy))
                });
            });
        }
        group.finish();
    }
}

criterion_group!(name = benches; config = config(); targets = crc);
criterion_main!(benches);
