//! Looking a block up: in the map of a region, in a run on disk, in a resolved chain; and against a flat sorted array.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, config, for_a_baseline, measuring};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use forkdisk::chain::Place;
use forkdisk::disk::Disk;
use forkdisk::format::{CommitEntry, DATA_START, Pointer, RunRef};
use forkdisk::map::run::{Builder, Run};
use forkdisk::map::{Memtable, RegionMap, WORDS};
use forkdisk::store::Below;
use forkdisk::units::{Id, Lba, Region, Slot};
use rustc_hash::FxHashMap;
use std::hint::black_box;

/// Blocks of a 16 GiB disk.
const DISK: u64 = 4 << 20;

fn data(n: u32) -> Pointer {
    Pointer::Data {
        slot: Slot(DATA_START + n),
        sum: n,
    }
}

fn region_map(c: &mut Criterion) {
    let mut group = c.benchmark_group("region map, get");
    for n in [10, 100, 512] {
        let mut rng = Rng(1);
        let mut map = RegionMap::new();
        for i in rng.distinct(n, 512) {
            map.set(i as usize, data(i as u32));
        }
        group.bench_function(format!("{n} of 512"), |b| {
            b.iter_batched(
                || rng.below(512) as usize,
                |i| black_box(map.get(i)),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn pack(table: &Memtable) -> (Vec<u8>, RunRef) {
    let mut bytes = Vec::new();
    let mut builder = Builder::new(|b: &[u8]| {
        bytes.extend_from_slice(b);
        Ok(())
    });
    for item in table.items() {
        builder.push(&item.expect("memory")).expect("written");
    }
    let reference = builder.finish(&Id::default(), 1).expect("written");
    (bytes, reference.expect("not empty"))
}

fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("map of a layer, one block");
    let sizes: &[usize] = if measuring() {
        &[1_000, 100_000, 1_000_000]
    } else {
        &[1_000]
    };
    for &n in sizes {
        let mut rng = Rng(2);
        let mut blocks = rng.distinct(n, DISK);
        blocks.sort_unstable();
        let mut table = Memtable::new();
        for (i, lba) in blocks.iter().enumerate() {
            table.apply(Lba(*lba as u32), 1, data(i as u32));
        }
        let (bytes, reference) = pack(&table);
        let run = Run::open(&bytes[..], reference, &Id::default()).expect("sound");
        let flat: Vec<CommitEntry> = table.entries();
        println!(
            "{n} blocks: a run has {:.2} bytes a block, a sorted array of entries {:.2}",
            reference.len.get() as f64 / n as f64,
            size_of::<CommitEntry>() as f64
        );
        group.bench_function(format!("run, {n}"), |b| {
            b.iter_batched(
                || Lba(blocks[rng.below(n as u64) as usize] as u32),
                |lba| {
                    let map = run.region(lba.region()).expect("sound");
                    map.map(|m| m.get(lba.index()))
                },
                BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("run, its region in memory, {n}"), |b| {
            let maps: std::collections::HashMap<u32, RegionMap> = blocks
                .iter()
                .map(|l| (*l >> 9) as u32)
                .map(|r| (r, run.region(Region(r)).expect("sound").expect("there")))
                .collect();
            b.iter_batched(
                || Lba(blocks[rng.below(n as u64) as usize] as u32),
                |lba| maps.get(&lba.region().0).map(|m| m.get(lba.index())),
                BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("sorted array, {n}"), |b| {
            b.iter_batched(
                || blocks[rng.below(n as u64) as usize] as u32,
                |lba| {
                    let found = flat.binary_search_by_key(&lba, |e| e.lba.get());
                    found.map(|i| flat[i].get())
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// A whole map in memory as a layer keeps it: a table of regions, each packed. Half of the blocks are mapped.
fn lookup(c: &mut Criterion) {
    const BATCH: usize = 8192;
    let mut group = c.benchmark_group("map lookup");
    group.throughput(Throughput::Elements(BATCH as u64));
    let sizes: &[u32] = if for_a_baseline() {
        // The largest takes longer to make than all others to measure.
        &[1_000, 10_000, 100_000, 1_000_000]
    } else if measuring() {
        &[1_000, 10_000, 100_000, 1_000_000, 100_000_000]
    } else {
        &[1_000]
    };
    for &n in sizes {
        let mut rng = Rng(3);
        let mut maps: FxHashMap<u32, RegionMap> = FxHashMap::default();
        let (mut mapped, mut region) = (0, 0);
        while mapped < n {
            let present: [u64; WORDS] = std::array::from_fn(|_| rng.below(u64::MAX));
            let count: u32 = present.iter().map(|w| w.count_ones()).sum();
            let pointers = (mapped..mapped + count).map(data).collect();
            maps.insert(
                region,
                RegionMap::from_parts(present, pointers, false).expect("fits"),
            );
            mapped += count;
            region += 1;
        }
        let mut some = |sequential: bool| {
            let mut lbas = Vec::with_capacity(BATCH);
            let mut next = 0;
            while lbas.len() < BATCH {
                let lba = match sequential {
                    true => Lba(next),
                    false => Lba(rng.below(u64::from(region) * 512) as u32),
                };
                next = (next + 1) % (region * 512);
                if maps[&lba.region().0].get(lba.index()) != Pointer::Absent {
                    lbas.push(lba);
                }
            }
            lbas
        };
        // Many batches, so that the processor's caches hold of the map only what fits them.
        let batches = if n > 10_000 { 512 } else { 8 };
        let random: Vec<Vec<Lba>> = (0..batches).map(|_| some(false)).collect();
        let rising = some(true);
        let sum = |lbas: &[Lba]| {
            lbas.iter().fold(0u64, |sum, lba| {
                let pointer = maps
                    .get(&lba.region().0)
                    .map_or(Pointer::Absent, |m| m.get(lba.index()));
                sum.wrapping_add(pointer.pack())
            })
        };
        let mut turn = 0;
        group.bench_function(format!("random, {n} mapped"), |b| {
            b.iter(|| {
                turn = (turn + 1) % batches;
                black_box(sum(&random[turn]))
            });
        });
        if n <= 1_000_000 {
            // The limit: one load, of an array with a place for each block, mapped or not.
            let array: Vec<u64> = (0..region * 512)
                .map(|lba| maps[&(lba / 512)].get(Lba(lba).index()).pack())
                .collect();
            let sum = |lbas: &[Lba]| {
                let load = |sum: u64, lba: &Lba| sum.wrapping_add(array[lba.0 as usize]);
                lbas.iter().fold(0u64, load)
            };
            group.bench_function(format!("an array, random, {n} mapped"), |b| {
                b.iter(|| {
                    turn = (turn + 1) % batches;
                    black_box(sum(&random[turn]))
                });
            });
        }
        group.bench_function(format!("sequential, {n} mapped"), |b| {
            b.iter(|| black_box(sum(&rising)));
        });
        group.bench_function(format!("sequential, a region at a time, {n} mapped"), |b| {
            let mut out = [Pointer::Absent; 512];
            b.iter(|| {
                for r in 0..(BATCH / 512) as u32 {
                    if let Some(map) = maps.get(&(r % region)) {
                        map.get_all(0, &mut out);
                    }
                    black_box(&out);
                }
            });
        });
    }
    group.finish();
}

fn resolved(c: &mut Criterion) {
    let mut world = World::new(64 << 20);
    let disk = world.fork("base");
    let mut rng = Rng(3);
    for lba in rng.distinct(4000, (64 << 20) / 4096) {
        disk.write(&[1; 4096], lba * 4096).expect("written");
    }
    let name = world.last();
    disk.close().expect("closed");
    drop(disk);
    let snapshot = world.store.snapshot(&name, "s", None).expect("made");
    let chain = world
        .store
        .chain(Below::Layer(snapshot.id))
        .expect("opened");
    c.bench_function("resolved chain, one block", |b| {
        let mut place = [Place::Base];
        b.iter_batched(
            || Lba(rng.below((64 << 20) / 4096) as u32),
            |lba| {
                chain
                    .places(lba.region(), lba.index(), &mut place)
                    .expect("sound");
                black_box(place[0])
            },
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(name = benches; config = config(); targets = region_map, lookup, runs, resolved);
criterion_main!(benches);
