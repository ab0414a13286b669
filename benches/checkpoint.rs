//! What empties the journal: a commit record, a checkpoint, the merge of block maps. Without syncs, and without the disk of the machine.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Keeps, Rng, Workshop, config, measuring};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use forkdisk::format::{DATA_START, Pointer, RunRef};
use forkdisk::io::File;
use forkdisk::layer::Layer;
use forkdisk::map::run::{Builder, Run};
use forkdisk::map::{Items, Memtable, merge};
use forkdisk::units::{Id, Lba, Region, Slot};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Blocks of a 16 GiB disk.
const DISK: u64 = 4 << 20;

fn data(n: u32) -> Pointer {
    Pointer::Data {
        slot: Slot(DATA_START + n),
        sum: n,
    }
}

/// The map of so many random blocks as a run.
fn packed(blocks: usize, seed: u64) -> (Vec<u8>, RunRef) {
    let mut table = Memtable::new();
    for (i, lba) in Rng(seed).distinct(blocks, DISK).iter().enumerate() {
        table.apply(Lba(*lba as u32), 1, data(i as u32));
    }
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

fn merging(c: &mut Criterion) {
    let (blocks, counts): (usize, &[usize]) = if measuring() {
        (100_000, &[2, 4, 8])
    } else {
        (1000, &[2])
    };
    let most = counts[counts.len() - 1];
    let maps: Vec<_> = (0..most).map(|i| packed(blocks, i as u64)).collect();
    let runs: Vec<_> = maps
        .iter()
        .map(|(bytes, reference)| Run::open(&bytes[..], *reference, &Id::default()).expect("sound"))
        .collect();
    let mut group = c.benchmark_group("merge");
    group.sampling_mode(SamplingMode::Flat).sample_size(15);
    for &n in counts {
        group.throughput(Throughput::Elements((n * blocks) as u64));
        group.bench_function(format!("{n} runs of {blocks}"), |b| {
            b.iter(|| {
                let sources: Vec<Items<'_>> =
                    runs[..n].iter().map(|r| r.items(Region(0))).collect();
                let mut builder = Builder::new(|bytes: &[u8]| {
                    black_box(bytes);
                    Ok(())
                });
                for item in merge(sources) {
                    builder.push(&item.expect("sound")).expect("written");
                }
                builder.finish(&Id::default(), 1).expect("written")
            });
        });
    }
    group.finish();
}

/// Changes random blocks. Nothing is written into their slots: neither commit nor checkpoint looks at data.
fn change(layer: &Layer, blocks: usize, seed: u64) {
    let mut rng = Rng(seed);
    for _ in 0..blocks {
        let lba = rng.below(DISK);
        let taken = layer.take(1, 1).expect("taken");
        let slot = Slot(taken.extents.first().expect("one").0);
        let pointer = Pointer::Data { slot, sum: 7 };
        layer
            .publish(Lba(lba as u32), &[pointer], taken)
            .expect("published");
    }
}

/// A copy of a layer file, sparse as it is.
fn copy(shop: &Workshop, from: &dyn File) -> (Arc<dyn File>, String) {
    let (to, name) = shop.file(&Keeps::All);
    let len = from.len().expect("known");
    to.set_len(len).expect("set");
    for (at, len) in from.data_ranges(0, len).expect("known") {
        let mut bytes = vec![0; len as usize];
        from.read_at(&mut bytes, at).expect("read");
        to.write_at(&bytes, at).expect("written");
    }
    (to, name)
}

fn layers(c: &mut Criterion) {
    let (mapped, counts): (usize, &[usize]) = if measuring() {
        (1_000_000, &[1000, 10_000, 100_000])
    } else {
        (1000, &[10])
    };
    let shop = Workshop::new(1 << 20, DISK * 4096);
    let made = |blocks: &[usize]| {
        let (layer, name) = shop.layer(&Keeps::All);
        let file = layer.file().clone();
        for (i, &n) in blocks.iter().enumerate() {
            change(&layer, n, i as u64);
            layer.flush().expect("flushed");
        }
        layer.checkpoint_now().expect("checkpointed");
        layer
            .close(forkdisk::layer::State::Clean, None)
            .expect("closed");
        drop(layer);
        shop.remove(&name);
        file
    };
    let big = made(&[mapped]);
    let seed = Cell::new(100);
    let next = || {
        seed.set(seed.get() + 1);
        seed.get()
    };
    let mut group = c.benchmark_group("commit, without its sync");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    for n in [1].iter().chain(counts) {
        group.throughput(Throughput::Elements(*n as u64));
        group.bench_function(format!("{n} changes"), |b| {
            let (file, name) = copy(&shop, &*big);
            let layer = Layer::open(file).expect("opened");
            shop.remove(&name);
            b.iter_custom(|iters| {
                let mut took = Duration::ZERO;
                for i in 0..iters {
                    // Before the journal is so full that a commit would do it.
                    if *n > 1 || i % 200 == 0 {
                        layer.checkpoint_now().expect("checkpointed");
                    }
                    change(&layer, *n, next());
                    let start = Instant::now();
                    layer.flush().expect("flushed");
                    took += start.elapsed();
                }
                layer.checkpoint_now().expect("checkpointed");
                took
            });
        });
    }
    group.finish();
    let mut group = c.benchmark_group(format!(
        "checkpoint over a run of {mapped}, without its syncs"
    ));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    for n in counts {
        group.throughput(Throughput::Elements(*n as u64));
        group.bench_function(format!("{n} changes"), |b| {
            b.iter_custom(|iters| {
                let mut took = Duration::ZERO;
                for _ in 0..iters {
                    // A copy each time: each meets the same run.
                    let (file, name) = copy(&shop, &*big);
                    let layer = Layer::open(file).expect("opened");
                    shop.remove(&name);
                    change(&layer, *n, next());
                    layer.flush().expect("flushed");
                    let start = Instant::now();
                    layer.checkpoint_now().expect("checkpointed");
                    took += start.elapsed();
                }
                took
            });
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = config(); targets = merging, layers);
criterion_main!(benches);
