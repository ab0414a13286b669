//! A layer of the largest disk, 16 TiB, with up to 100 million private blocks: opening it after a clean and an unclean stop, the first touch of
//! a region, reads, flushes, checkpoints; and the memory all that takes.
//!
//! There is no room for 400 GB of data: the data slots are holes of the layer file, which read as zeros, and the map holds the checksum of
//! zeros. The map itself is as large as it would be. Each measurement is a process of its own, so that its memory is only its own.
//!
//! `cargo bench --bench scale -- N` measures N blocks alone.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, measuring, median};
use forkdisk::check::check;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::format::{DATA_START, Header, Pointer, STATE_CLEAN, Superblock, ZERO_SUM};
use forkdisk::io::Access;
use forkdisk::layer::read_header;
use forkdisk::map::run::Builder;
use forkdisk::map::{Item, RegionMap};
use forkdisk::store::{Quiet, Store, layer_file};
use forkdisk::units::{BLOCK, BLOCK_SIZE, Id, Lba, MAX_DISK, Slot};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use zerocopy::little_endian::{U32, U64};

/// Blocks of the disk.
const BLOCKS: u64 = MAX_DISK / BLOCK;
/// Flushes that leave the journal a little less than half full: more, and it would be emptied.
const FLUSHES: u64 = 500;
/// Blocks written between two flushes: their record fills one slot of the journal.
const A_FLUSH: u64 = 300;

/// Private block number `i` of `n`: one in each of `n` equal stretches of the disk, at a place that is as good as random.
fn private_block(i: u64, n: u64) -> Lba {
    let stretch = BLOCKS / n;
    Lba((i * stretch + Rng(i).next() % stretch) as u32)
}

/// Turns the fresh disk `name` into one with `n` private blocks. Returns the bytes of its map.
fn fill(store: &Store, name: &str, n: u64) -> u64 {
    let id = store.resolve(name).expect("there").id;
    let file = store.layers_dir().open(&layer_file(id), Access::Write);
    let file = file.expect("opened");
    let header: Header = read_header(&*file).expect("sound");
    let first = u64::from(DATA_START) + n;
    let mut at = first * BLOCK;
    let mut builder = Builder::new(|bytes: &[u8]| {
        file.write_at(bytes, at)?;
        at += bytes.len() as u64;
        Ok(())
    });
    let mut map = RegionMap::new();
    let mut region = private_block(0, n).region();
    for i in 0..n {
        let lba = private_block(i, n);
        if lba.region() != region {
            let done = std::mem::replace(&mut map, RegionMap::new());
            builder.push(&Item::Region(region, done)).expect("written");
            region = lba.region();
        }
        let slot = Slot(DATA_START + i as u32);
        map.set(
            lba.index(),
            Pointer::Data {
                slot,
                sum: ZERO_SUM,
            },
        );
    }
    builder.push(&Item::Region(region, map)).expect("written");
    let run = builder.finish(&Id(header.layer), 0).expect("written");
    let mut run = run.expect("not empty");
    run.slot = U32::new(first as u32);
    let mut superblock = Superblock::empty(&header);
    superblock.state = U32::new(STATE_CLEAN);
    superblock.sequence = U64::new(1);
    superblock.data_blocks = U64::new(n);
    superblock.high_water = U64::new(first + u64::from(run.slots.get()));
    superblock.run_count = U32::new(1);
    superblock.runs[0] = run;
    let bytes = superblock.encode();
    for copy in [1, 2] {
        file.write_at(bytes, Slot(copy).at()).expect("written");
    }
    file.sync().expect("synced");
    run.len.get()
}

fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("read");
    let line = text.lines().find(|l| l.starts_with(field)).expect("there");
    let kib: f64 = line
        .split_whitespace()
        .nth(1)
        .expect("a number")
        .parse()
        .expect("a number");
    kib / 1024.0
}

/// The memory of this process without the pages of files, in MiB, and the most there was of it.
struct Memory {
    before: f64,
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Memory {
    fn watch() -> Memory {
        let (most, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (m, s) = (most.clone(), stop.clone());
        std::thread::spawn(move || {
            while !s.load(Relaxed) {
                m.fetch_max((status("RssAnon") * 1024.0) as u64, Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Memory {
            before: status("RssAnon"),
            most,
            stop,
        }
    }
    fn tell(&self, what: &str) {
        let most = self.most.load(Relaxed) as f64 / 1024.0;
        let now = status("RssAnon");
        println!(
            "        memory {what}: {:.1} MiB (at most {:.1} MiB), and {:.1} MiB of mapped files",
            now - self.before,
            most.max(now) - self.before,
            status("RssFile")
        );
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let value = work();
    (value, start.elapsed().as_secs_f64() * 1e3)
}

fn say(what: &str, ms: f64) {
    println!("    {what:<44} {ms:>10.3} ms");
}

fn say_all(what: &str, mut all: Vec<f64>) {
    all.sort_by(f64::total_cmp);
    let p99 = all[(all.len() - 1) * 99 / 100];
    println!(
        "    {what:<44} {:>10.3} ms, p99 {p99:.3} ms",
        median(all.clone())
    );
}

fn open(path: &Path, name: &str, what: &str) -> Arc<CowDisk> {
    let store = Store::open(path).expect("a store");
    let object = store.resolve(name).expect("there");
    let memory = Memory::watch();
    let (disk, ms) = timed(|| store.open_cow(&object, true).expect("opened"));
    say(what, ms);
    memory.tell("of the open disk");
    disk
}

/// A cleanly closed disk: opened, used, closed.
fn clean(path: &Path, name: &str, n: u64) {
    let disk = open(path, name, "open, closed cleanly, nothing cached");
    let memory = Memory::watch();
    let mut rng = Rng(n);
    let mut buf = vec![0; BLOCK_SIZE];
    let touches = if measuring() { 1000 } else { 20 };
    let chosen: Vec<Lba> = (0..touches)
        .map(|_| private_block(rng.below(n), n))
        .collect();
    let mut read = |lba: &Lba| timed(|| disk.read(&mut buf, lba.at()).expect("read")).1;
    say_all(
        "4 KiB read, first touch of its region",
        chosen.iter().map(&mut read).collect(),
    );
    say_all("4 KiB read, again", chosen.iter().map(&mut read).collect());
    let many = touches * 200;
    let ((), ms) = timed(|| {
        for _ in 0..many {
            read(&private_block(rng.below(n), n));
        }
    });
    say("4 KiB read anywhere, mean of many", ms / many as f64);
    memory.tell("after reads anywhere");
    let writes: Vec<f64> = (0..touches / 5)
        .map(|_| {
            let lba = private_block(rng.below(n), n);
            timed(|| {
                disk.write(&[7; BLOCK_SIZE], lba.at()).expect("written");
                disk.flush().expect("flushed");
            })
            .1
        })
        .collect();
    say_all("4 KiB write and flush", writes);
    say(
        "checkpoint of these",
        timed(|| disk.checkpoint().expect("done")).1,
    );
    for _ in 0..touches {
        let lba = private_block(rng.below(n), n);
        disk.write(&[8; BLOCK_SIZE], lba.at()).expect("written");
    }
    say(
        "close, with some more to write",
        timed(|| disk.close().expect("closed")).1,
    );
    memory.tell("after all");
}

/// Leaves a journal that is half full, of blocks anywhere or side by side, and dies.
fn die(path: &Path, name: &str, n: u64, anywhere: bool) {
    let store = Store::open(path).expect("a store");
    let object = store.resolve(name).expect("there");
    let disk = store.open_cow(&object, true).expect("opened");
    let mut rng = Rng(n);
    let flushes = if measuring() { FLUSHES } else { 10 };
    for flush in 0..flushes {
        for i in 0..A_FLUSH {
            let number = match anywhere {
                true => rng.below(n),
                false => (flush * A_FLUSH + i) % n,
            };
            let at = match anywhere {
                true => private_block(number, n).at(),
                false => number * BLOCK,
            };
            disk.write(&[9; BLOCK_SIZE], at).expect("written");
        }
        disk.flush().expect("flushed");
    }
    // Not closed, and nothing torn down.
    std::process::exit(0);
}

/// This bench again, in a process of its own.
fn stage(store: &Path, name: &str, n: u64, stage: &str) {
    let layers = store.join("layers");
    for file in std::fs::read_dir(&layers).expect("a folder").flatten() {
        let file = File::open(file.path()).expect("opened");
        file.sync_all().expect("synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("forgotten");
    }
    let mut again = Command::new(std::env::current_exe().expect("known"));
    again
        .env("FORKDISK_SCALE", stage)
        .arg(store)
        .arg(name)
        .arg(n.to_string());
    if measuring() {
        again.arg("--bench");
    }
    assert!(
        again.status().expect("run").success(),
        "{stage} of {n} failed"
    );
}

fn run_stage(stage: &str) {
    let args: Vec<String> = std::env::args().collect();
    let (path, name) = (Path::new(&args[1]), &args[2]);
    let n = args[3].parse().expect("a number");
    match stage {
        "clean" => clean(path, name, n),
        "die" => die(path, name, n, false),
        "die anywhere" => die(path, name, n, true),
        "reopen" => {
            let disk = open(path, name, "open after an unclean stop, blocks in a row");
            disk.close().expect("closed");
        }
        "reopen anywhere" => {
            let disk = open(path, name, "open after an unclean stop, blocks anywhere");
            disk.close().expect("closed");
        }
        other => panic!("no stage {other}"),
    }
}

fn main() {
    if let Ok(stage) = std::env::var("FORKDISK_SCALE") {
        return run_stage(&stage);
    }
    let wish: Option<u64> = std::env::args().skip(1).find_map(|a| a.parse().ok());
    let sizes = match (wish, measuring()) {
        (Some(n), _) => vec![n],
        (None, true) => vec![1_000_000, 10_000_000, 100_000_000],
        (None, false) => vec![20_000],
    };
    for n in sizes {
        let world = World::new(1 << 20);
        let path = world.dir.path();
        let name = "large".to_string();
        world
            .store
            .create(std::slice::from_ref(&name), "base", Some(MAX_DISK))
            .expect("created");
        let (bytes, ms) = timed(|| fill(&world.store, &name, n));
        println!("{n} private blocks of a disk of 16 TiB");
        println!(
            "    the map: {:.1} MiB, {:.2} bytes a block, written in {:.1} s",
            bytes as f64 / (1 << 20) as f64,
            bytes as f64 / n as f64,
            ms / 1e3
        );
        stage(path, &name, n, "clean");
        for how in ["", " anywhere"] {
            stage(path, &name, n, &format!("die{how}"));
            stage(path, &name, n, &format!("reopen{how}"));
        }
        let (report, ms) = timed(|| check(&world.store, None, &Quiet).expect("checked"));
        assert!(
            report.corruptions.is_empty() && report.leaks.is_empty(),
            "{report:?}"
        );
        say("check", ms);
    }
}
