//! A process that is killed while threads of it write, discard and flush, again and again: its successors find all that was accepted, and every
//! slot is in use or free.
//!
//! The process is this program, run once more; it is killed for real, at any instruction. What it had accepted it told in shared memory.
//!
//! `FORKDISK_KILL_LIVES=N` lets more of them live.
#![allow(missing_docs, reason = "a test")]

mod common;

use common::Rng;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::layer::volatile;
use forkdisk::store::{ImportMode, ImportSource, Quiet, Store};
use forkdisk::sys::shared::{self, SharedMemory};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const LIVES: u64 = 60;
const BLOCK: usize = 4096;
/// Each thread has blocks of its own, side by side: more than one region.
const WRITERS: usize = 2;
const BLOCKS: usize = 1400;
/// After the volatile log: of each block what was accepted, and what was begun.
const ACCEPTED: usize = volatile::LEN;
const BEGUN: usize = ACCEPTED + WRITERS * BLOCKS * 8;
/// Set by a process that has begun to work.
const READY: usize = BEGUN + WRITERS * BLOCKS * 8;
const LEN: usize = READY + BLOCK;

/// A version of a block: its number, and whether it is zeros.
fn content(version: u64) -> Vec<u8> {
    match version & 1 {
        0 => version.to_le_bytes().repeat(BLOCK / 8),
        _ => vec![0; BLOCK],
    }
}

/// Everything is as it was accepted, or as what was under way.
fn verify(disk: &CowDisk, memory: &SharedMemory) {
    let mut found = vec![0; BLOCK];
    for block in 0..WRITERS * BLOCKS {
        disk.read(&mut found, (block * BLOCK) as u64).unwrap();
        let accepted = memory.load(ACCEPTED + block * 8);
        let begun = memory.load(BEGUN + block * 8);
        assert!(
            found == content(accepted) || found == content(begun),
            "block {block}: {accepted} was accepted and {begun} begun, {:?} is found",
            &found[..8]
        );
        // Whoever comes next knows what it was.
        let version = if found == content(accepted) {
            accepted
        } else {
            begun
        };
        memory.store(ACCEPTED + block * 8, version);
        memory.store(BEGUN + block * 8, version);
    }
}

/// What was not flushed may be gone: whatever is found counts.
fn believe(disk: &CowDisk, memory: &SharedMemory) {
    let mut found = vec![0; BLOCK];
    for block in 0..WRITERS * BLOCKS {
        disk.read(&mut found, (block * BLOCK) as u64).unwrap();
        let version = u64::from_le_bytes(found[..8].try_into().unwrap()).max(1);
        assert!(found == content(version), "block {block} is a mixture");
        assert!(
            version <= memory.load(BEGUN + block * 8),
            "block {block} was never that"
        );
        memory.store(ACCEPTED + block * 8, version);
        memory.store(BEGUN + block * 8, version);
    }
}

fn write_for_ever(disk: &CowDisk, memory: &SharedMemory, thread: usize, seed: u64) {
    let mut rng = Rng(seed);
    let first = thread * BLOCKS;
    let mut number = seed << 20;
    loop {
        let most = match rng.below(20) {
            0 => 600,
            1..=4 => 30,
            _ => 4,
        };
        let count = 1 + rng.below(most) as usize;
        // Few of them are written nearly always.
        let within = if rng.below(3) > 0 { 60 } else { BLOCKS };
        let at = first + rng.below(within as u64) as usize;
        let count = count.min(first + BLOCKS - at);
        number += 2;
        let version = number | u64::from(rng.below(6) == 0);
        for block in at..at + count {
            memory.store(BEGUN + block * 8, version);
        }
        let place = (at * BLOCK) as u64;
        match version & 1 {
            0 => disk.write(&content(version).repeat(count), place).unwrap(),
            _ => disk.discard(place, (count * BLOCK) as u64).unwrap(),
        }
        for block in at..at + count {
            memory.store(ACCEPTED + block * 8, version);
        }
        if rng.below(12) == 0 {
            disk.flush_first().unwrap();
        }
    }
}

/// One life, until it is killed.
fn live(store: &Path, memory: &Path, resume: bool, seed: u64) {
    let file = File::options().read(true).write(true).open(memory).unwrap();
    let memory = Arc::new(SharedMemory::map(&Arc::new(file), 0, LEN).unwrap());
    let store = Store::open(store).unwrap();
    let disk = match resume {
        true => store.resume_cow("d", memory.clone()).unwrap(),
        false => {
            let object = store.resolve("d").unwrap();
            store.open_cow_on(&object, memory.clone()).unwrap()
        }
    };
    verify(&disk, &memory);
    memory.store(READY, 1);
    std::thread::scope(|scope| {
        for thread in 0..WRITERS {
            let (disk, memory) = (&disk, &memory);
            scope.spawn(move || write_for_ever(disk, memory, thread, seed * 4 + thread as u64));
        }
        scope.spawn(|| {
            let mut rng = Rng(seed);
            loop {
                std::thread::sleep(Duration::from_millis(rng.below(5)));
                match rng.below(6) {
                    0 => disk.maintain().unwrap(),
                    1 => disk.checkpoint().unwrap(),
                    2 => disk.tidy(),
                    3 => disk.flush().unwrap(),
                    _ => disk.flush_first().unwrap(),
                }
            }
        });
    });
}

#[test]
fn what_was_accepted_is_there_and_no_slot_is_lost() {
    if let Ok(life) = std::env::var("FORKDISK_LIFE") {
        let life: Vec<&str> = life.split(' ').collect();
        let seed = life[3].parse().unwrap();
        live(
            life[0].as_ref(),
            life[1].as_ref(),
            life[2] == "resume",
            seed,
        );
        return;
    }
    let lives = std::env::var("FORKDISK_KILL_LIVES").map_or(LIVES, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::init(&path).unwrap();
    let image = vec![0u8; WRITERS * BLOCKS * BLOCK];
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .unwrap();
    store.create(&["d".to_string()], "image", None).unwrap();
    let file = Arc::new(shared::create("lives").unwrap());
    let memory = Arc::new(SharedMemory::map(&file, 0, LEN).unwrap());
    let place = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    for block in 0..WRITERS * BLOCKS {
        memory.store(ACCEPTED + block * 8, 1);
        memory.store(BEGUN + block * 8, 1);
    }
    let mut rng = Rng(std::env::var("FORKDISK_KILL_SEED").map_or(1, |n| n.parse().unwrap()));
    let mut resume = false;
    for number in 0..lives {
        memory.store(READY, 0);
        let how = if resume { "resume" } else { "open" };
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "what_was_accepted_is_there_and_no_slot_is_lost",
                "--nocapture",
            ])
            .env(
                "FORKDISK_LIFE",
                format!("{} {place} {how} {}", path.display(), number + 1),
            )
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while memory.load(READY) == 0 {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("life {number} ({how}): {status}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.below(30_000)));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            status.code(),
            None,
            "life {number} ended by itself: {status}"
        );
        resume = rng.below(4) > 0;
        if !resume {
            let object = store.resolve("d").unwrap();
            let disk = match rng.below(2) {
                0 => store.resume_cow("d", memory.clone()).unwrap(),
                // As after a power cut.
                _ => {
                    let disk = store.open_cow_on(&object, memory.clone()).unwrap();
                    believe(&disk, &memory);
                    disk
                }
            };
            verify(&disk, &memory);
            disk.close().unwrap();
            drop(disk);
            let report = forkdisk::check::check(&store, None, &Quiet).unwrap();
            assert_eq!(
                (&report.leaks[..], &report.corruptions[..]),
                (&[][..], &[][..]),
                "after life {number}"
            );
        }
    }
}
