//! Writing 4 KiB and flushing it, against `pwrite` and `fdatasync` on a plain file; and what opening, committing and closing cost in calls.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, compare, noise, raw_file, side};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::io::count::Counts;
use forkdisk::store::history::Limits;
use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const SIZE: usize = 256 << 20;
const BLOCK: usize = 4096;
const OPS: usize = 60;

fn timed(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

fn told(what: &str, c: Counts) {
    println!(
        "    {what:<44} {} writes, {} bytes, {} syncs, {} maps",
        c.writes, c.bytes_written, c.syncs, c.maps
    );
}

fn main() {
    let world = RefCell::new(World::new(SIZE));
    let dir = world.borrow().dir.path().to_path_buf();
    let data = noise(BLOCK, 2);
    let rng = RefCell::new(Rng(1));
    let places = |n| -> Vec<u64> {
        let mut rng = rng.borrow_mut();
        let all = rng.distinct(n, (SIZE / BLOCK) as u64);
        all.iter().map(|b| b * BLOCK as u64).collect()
    };

    println!("calls");
    let count = || world.borrow().io.counts();
    let name = {
        let mut world = world.borrow_mut();
        drop(world.fork("base"));
        world.last()
    };
    let open = || {
        let world = world.borrow();
        let object = world.store.resolve(&name).expect("there");
        world.store.open_cow(&object, true).expect("opened")
    };
    open().close().expect("closed");
    let before = count();
    let disk = open();
    told("open a disk that was closed cleanly", count() - before);
    for (what, blocks) in [("1 block", 1), ("1,000 blocks", 1000)] {
        let places = places(blocks);
        for at in &places {
            disk.write(&data, *at).expect("written");
        }
        let before = count();
        disk.flush().expect("flushed");
        told(&format!("flush of {what}"), count() - before);
    }
    let before = count();
    disk.checkpoint().expect("checkpointed");
    told("checkpoint of 1,001 blocks", count() - before);
    let before = count();
    disk.close().expect("closed");
    told("close after a checkpoint", count() - before);
    drop(disk);

    let raw = raw_file(&dir, "raw", SIZE as u64);
    let disk = world.borrow_mut().fork("base");
    compare(
        "write 4 KiB and flush, fresh",
        11,
        OPS as u64,
        &mut [
            side("plain file, fdatasync", || {
                let places = places(OPS);
                timed(|| {
                    for at in &places {
                        raw.write_all_at(&data, *at).expect("written");
                        raw.sync_data().expect("synced");
                    }
                })
            }),
            side("disk", || {
                let places = places(OPS);
                timed(|| {
                    for at in &places {
                        disk.write(&data, *at).expect("written");
                        disk.flush().expect("flushed");
                    }
                })
            }),
        ],
    );
    // Written once before: the plain file has its blocks, the disk its journal and some free slots.
    let again = places(OPS);
    for _ in 0..2 {
        for at in &again {
            raw.write_all_at(&data, *at).expect("written");
            disk.write(&data, *at).expect("written");
        }
        raw.sync_data().expect("synced");
        disk.flush().expect("flushed");
    }
    compare(
        "write 4 KiB and flush, overwritten",
        11,
        OPS as u64,
        &mut [
            side("plain file, fdatasync", || {
                timed(|| {
                    for at in &again {
                        raw.write_all_at(&data, *at).expect("written");
                        raw.sync_data().expect("synced");
                    }
                })
            }),
            side("disk", || {
                timed(|| {
                    for at in &again {
                        disk.write(&data, *at).expect("written");
                        disk.flush().expect("flushed");
                    }
                })
            }),
        ],
    );
    disk.close().expect("closed");

    // Both overwrite; one of them keeps what it replaces.
    let past = {
        let mut world = world.borrow_mut();
        drop(world.fork("base"));
        let name = world.last();
        let limits = Limits {
            window: None,
            bytes: Some(1 << 30),
        };
        world
            .store
            .set_history(std::slice::from_ref(&name), Some(limits))
            .expect("noted");
        let object = world.store.resolve(&name).expect("there");
        world.store.open_cow(&object, true).expect("opened")
    };
    let disk = world.borrow_mut().fork("base");
    for at in &again {
        for disk in [&disk, &past] {
            disk.write(&data, *at).expect("written");
            disk.flush().expect("flushed");
        }
    }
    let overwrite = |disk: &CowDisk| {
        timed(|| {
            for at in &again {
                disk.write(&data, *at).expect("written");
                disk.flush().expect("flushed");
            }
        })
    };
    compare(
        "write 4 KiB and flush, overwritten, with and without a history",
        11,
        OPS as u64,
        &mut [
            side("without", || overwrite(&disk)),
            side("with", || overwrite(&past)),
        ],
    );
    disk.close().expect("closed");
    past.close().expect("closed");
}
