//! Writing and reading a disk without any transport, against the same calls on a plain file beside it. No flush: all of it is in memory.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, compare, noise, raw_file, side};
use forkdisk::disk::Disk;
use std::cell::{Cell, RefCell};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SIZE: usize = 256 << 20;
const BLOCK: usize = 4096;
const SMALL: usize = 4000;
const LARGE: usize = 1 << 20;

fn timed(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

fn main() {
    let world = RefCell::new(World::new(SIZE));
    let dir = world.borrow().dir.path().to_path_buf();
    let mut rng = Rng(1);
    let blocks: Vec<u64> = rng
        .distinct(SMALL, (SIZE / BLOCK) as u64)
        .iter()
        .map(|b| b * BLOCK as u64)
        .collect();
    let data = noise(LARGE, 2);
    let small = &data[..BLOCK];
    let raw = || raw_file(&dir, "raw", SIZE as u64);
    let fork = || world.borrow_mut().fork("base");

    compare(
        "write 4 KiB, random, first touch",
        9,
        SMALL as u64,
        &mut [
            side("plain file, pwrite", || {
                let file = raw();
                let took = timed(|| {
                    for at in &blocks {
                        file.write_all_at(small, *at).expect("written");
                    }
                });
                drop(file);
                std::fs::remove_file(dir.join("raw")).expect("removed");
                took
            }),
            side("disk", || {
                let disk = fork();
                let took = timed(|| {
                    for at in &blocks {
                        disk.write(small, *at).expect("written");
                    }
                });
                world.borrow().forget(disk);
                took
            }),
        ],
    );

    let file = raw();
    let disk = fork();
    for at in &blocks {
        file.write_all_at(small, *at).expect("written");
        disk.write(small, *at).expect("written");
    }
    file.sync_data().expect("synced");
    disk.flush().expect("flushed");
    compare(
        "write 4 KiB, random, private already",
        9,
        SMALL as u64,
        &mut [
            side("plain file, pwrite", || {
                timed(|| {
                    for at in &blocks {
                        file.write_all_at(small, *at).expect("written");
                    }
                })
            }),
            side("disk", || {
                timed(|| {
                    for at in &blocks {
                        disk.write(small, *at).expect("written");
                    }
                })
            }),
        ],
    );
    disk.flush().expect("flushed");
    file.sync_data().expect("synced");

    let buffer = RefCell::new(vec![0u8; LARGE]);
    let read_small = |read: &dyn Fn(&mut [u8], u64)| {
        let mut buffer = buffer.borrow_mut();
        timed(|| {
            for at in &blocks {
                read(&mut buffer[..BLOCK], *at);
            }
        })
    };
    let below = fork();
    compare(
        "read 4 KiB, random, in the page cache",
        15,
        SMALL as u64,
        &mut [
            side("plain file, pread", || {
                read_small(&|buf, at| file.read_exact_at(buf, at).expect("read"))
            }),
            side("disk, its own blocks", || {
                read_small(&|buf, at| disk.read(buf, at).expect("read"))
            }),
            side("disk, blocks of the base", || {
                read_small(&|buf, at| below.read(buf, at).expect("read"))
            }),
        ],
    );
    disk.close().expect("closed");
    drop((disk, below, file));

    let large = 64u64;
    compare(
        "write 1 MiB, sequential, first touch",
        9,
        large,
        &mut [
            side("plain file, pwrite", || {
                let file = raw();
                let took = timed(|| {
                    for i in 0..large {
                        file.write_all_at(&data, i * LARGE as u64).expect("written");
                    }
                });
                drop(file);
                std::fs::remove_file(dir.join("raw")).expect("removed");
                took
            }),
            side("disk", || {
                let disk = fork();
                let took = timed(|| {
                    for i in 0..large {
                        disk.write(&data, i * LARGE as u64).expect("written");
                    }
                });
                world.borrow().forget(disk);
                took
            }),
        ],
    );

    let file = raw();
    let disk = fork();
    for i in 0..large {
        file.write_all_at(&data, i * LARGE as u64).expect("written");
        disk.write(&data, i * LARGE as u64).expect("written");
    }
    let sum = Cell::new(0u64);
    let read_large = |read: &dyn Fn(&mut [u8], u64)| {
        let mut buffer = buffer.borrow_mut();
        let took = timed(|| {
            for i in 0..large {
                read(&mut buffer, i * LARGE as u64);
            }
        });
        sum.set(sum.get() + u64::from(buffer[17]));
        took
    };
    compare(
        "read 1 MiB, sequential, in the page cache",
        15,
        large,
        &mut [
            side("plain file, pread", || {
                read_large(&|buf, at| file.read_exact_at(buf, at).expect("read"))
            }),
            side("disk, its own blocks", || {
                read_large(&|buf, at| disk.read(buf, at).expect("read"))
            }),
        ],
    );
}
