//! Reading through 1, 8, 64 and 256 layers: the first touch of a region, and every later one.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, compare, measuring, noise, side};
use forkdisk::chain::{Budget, Chain, Place};
use forkdisk::disk::Disk;
use forkdisk::store::Below;
use forkdisk::units::Region;
use std::sync::Arc;
use std::time::Instant;

const SIZE: usize = 64 << 20;
const BLOCK: u64 = 4096;
const READS: u64 = 4000;

fn main() {
    let depths: &[usize] = if measuring() {
        &[1, 8, 64, 256]
    } else {
        &[1, 8]
    };
    let deepest = depths.iter().max().copied().unwrap_or(1);
    let mut world = World::new(SIZE);
    drop(world.fork("base"));
    let name = world.last();
    let data = noise(BLOCK as usize, 3);
    let mut rng = Rng(1);
    let start = Instant::now();
    for depth in 1..=deepest {
        let object = world.store.resolve(&name).expect("there");
        let disk = world.store.open_cow(&object, true).expect("opened");
        for _ in 0..64 {
            let at = rng.below(SIZE as u64 / BLOCK) * BLOCK;
            disk.write(&data, at).expect("written");
        }
        disk.close().expect("closed");
        drop(disk);
        let snapshot = format!("s{depth}");
        world.store.snapshot(&name, &snapshot, None).expect("made");
    }
    println!(
        "{deepest} snapshots in {:.1} s",
        start.elapsed().as_secs_f64()
    );

    let chains: Vec<(String, Arc<Chain>, _)> = depths
        .iter()
        .map(|depth| {
            let snapshot = world
                .store
                .resolve(&format!("{name}@s{depth}"))
                .expect("there");
            let chain = world
                .store
                .chain(Below::Layer(snapshot.id))
                .expect("opened");
            assert_eq!(chain.depth(), *depth);
            let disk = world.store.open_cow(&snapshot, false).expect("opened");
            (format!("depth {depth}"), chain, disk)
        })
        .collect();

    let regions = SIZE as u64 / (BLOCK * 512);
    let mut sides: Vec<_> = chains
        .iter()
        .map(|(title, chain, _)| {
            side(title, move || {
                let fresh = Chain::new(
                    chain.layers().to_vec(),
                    chain.base().clone(),
                    Budget::new(1 << 30),
                );
                let mut place = [Place::Base];
                let start = Instant::now();
                for region in 0..regions {
                    fresh
                        .places(Region(region as u32), 0, &mut place)
                        .expect("sound");
                }
                start.elapsed()
            })
        })
        .collect();
    compare("first touch of a region", 15, regions, &mut sides);

    let mut sides: Vec<_> = chains
        .iter()
        .map(|(title, _, disk)| {
            side(title, move || {
                let mut rng = Rng(9);
                let mut buffer = vec![0; BLOCK as usize];
                let start = Instant::now();
                for _ in 0..READS {
                    let at = rng.below(SIZE as u64 / BLOCK) * BLOCK;
                    disk.read(&mut buffer, at).expect("read");
                }
                start.elapsed()
            })
        })
        .collect();
    compare("read 4 KiB after the first touch", 21, READS, &mut sides);
}
