//! Joining 1, 10 and 100 layers into one, compared with copying as many blocks from one file to another. Through memory: the machine's disk, and what
//! filesystems can share, take no part.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Keeps, Rng, Workshop, compare, measuring, noise, side};
use forkdisk::format::Header;
use forkdisk::layer::rewrite::{self, Measure};
use forkdisk::units::{BLOCK, BLOCK_SIZE, Id};
use std::time::Instant;

const SIZE: u64 = 1 << 30;

fn main() {
    let (blocks, depths): (usize, &[usize]) = match measuring() {
        true => (16_000, &[1, 10, 100]),
        false => (100, &[1, 10]),
    };
    let shop = Workshop::new(1 << 20, SIZE);
    let data = noise(BLOCK_SIZE, 3);
    let changed = Rng(1).distinct(blocks, SIZE / BLOCK);
    let chains: Vec<_> = depths
        .iter()
        .map(|depth| {
            (
                format!("squash {depth}"),
                shop.chain(*depth, &changed, &data),
            )
        })
        .collect();
    let plain = side("copy as many blocks", || {
        let (from, from_name) = shop.file(&Keeps::All);
        let (to, to_name) = shop.file(&Keeps::All);
        from.write_at(&data.repeat(blocks), 0).expect("written");
        let start = Instant::now();
        to.copy_from(&*from, 0, 0, blocks as u64 * BLOCK)
            .expect("copied");
        let took = start.elapsed();
        shop.remove(&from_name);
        shop.remove(&to_name);
        took
    });
    let mut sides = vec![plain];
    sides.extend(chains.iter().map(|(title, chain)| {
        side(title, || {
            let (file, name) = shop.file(&Keeps::All);
            let base = chain.base().id();
            let header = Header::new(Id([9; 16]), base, false, 1, SIZE, 0, "");
            let start = Instant::now();
            let measure = Measure::of(chain.layers()).expect("sound");
            rewrite::write(
                &*file,
                &header,
                (None, SIZE, None),
                chain.layers(),
                &measure,
                &mut |_| Ok(()),
            )
            .expect("written");
            let took = start.elapsed();
            shop.remove(&name);
            took
        })
    }));
    compare("squash, for each block", 11, blocks as u64, &mut sides);
}
