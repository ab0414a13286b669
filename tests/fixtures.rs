//! Stores of every format version that was ever released stay readable: each stands as a file in `tests/fixtures`.
//!
//! A fixture is a text: `= PATH LENGTH` begins a file, `OFFSET HEX` are bytes of it, `OFFSET *N HEX` are N repetitions of eight bytes;
//! all else is zeros, and holes. It is written once, by the version it is named after, and never again:
//! `FORKDISK_FIXTURE=FILE cargo test --test fixtures` makes one for a new version.
#![allow(missing_docs, reason = "a test")]

use forkdisk::disk::{CowDisk, Disk};
use forkdisk::store::{Env, ImportMode, ImportSource, ObjectKind, Quiet, Store};
use forkdisk::units::{BLOCK, BLOCK_SIZE, Id};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Virtual size of the disks.
const SIZE: u64 = 64 << 20;

/// A block of one word, so that a fixture stays small; never zeros.
fn block(n: u64) -> [u8; BLOCK_SIZE] {
    let word = (n + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1 << 63;
    let mut block = [0; BLOCK_SIZE];
    block
        .chunks_exact_mut(8)
        .for_each(|c| c.copy_from_slice(&word.to_le_bytes()));
    block
}

/// The image: nine blocks and a bit, with a hole.
fn image() -> Vec<u8> {
    let mut image: Vec<u8> = (0..10).flat_map(block).collect();
    image[3 * BLOCK_SIZE..5 * BLOCK_SIZE].fill(0);
    image.truncate(9 * BLOCK_SIZE + 1234);
    image
}

/// What was done to the store, told to whoever does it: the maker of a fixture, or the model it is compared with.
trait Actor {
    fn write(&mut self, disk: &str, at: u64, data: &[u8]);
    fn discard(&mut self, disk: &str, at: u64, len: u64);
    fn flush(&mut self, disk: &str);
    fn checkpoint(&mut self, disk: &str);
    fn snapshot(&mut self, disk: &str, name: &str, message: Option<&str>);
    fn fork(&mut self, disk: &str, from: &str);
    fn close(&mut self, disk: &str);
}

/// The history of version 1. It must never change.
fn history(a: &mut dyn Actor) {
    a.fork("web", "image");
    // A dense region (bitmap), sparse ones (lists), parts of blocks, zeros.
    for n in 0..400 {
        a.write("web", n * BLOCK, &block(1000 + n));
    }
    a.flush("web");
    for n in 0..20 {
        a.write("web", (n * 3 + 2) << 20, &block(2000 + n));
    }
    a.write("web", 5 * BLOCK + 100, b"part of a block");
    a.write("web", 30 * BLOCK - 3, b"across two blocks");
    a.write("web", 31 * BLOCK, &[0; BLOCK_SIZE]);
    a.flush("web");
    a.checkpoint("web");
    // Every second block goes: a free list too long for the superblock.
    for n in 0..180 {
        a.discard("web", (2 * n + 40) * BLOCK, BLOCK);
    }
    // A zero range, with one block in it.
    a.discard("web", 20 << 20, 24 << 20);
    a.write("web", 30 << 20, &block(3000));
    a.flush("web");
    a.snapshot("web", "clean", Some("a \"message\"\nof two lines"));
    a.write("web", 7 * BLOCK, &block(4000));
    a.discard("web", 8 * BLOCK, 300);
    a.close("web");
    // A second layer over the snapshot that was not closed: its state is in the journal.
    a.fork("dirty", "web@clean");
    a.write("dirty", 0, &block(5000));
    a.flush("dirty");
    a.write("dirty", BLOCK, &block(5001));
    a.discard("dirty", 2 << 20, 2 << 20);
    a.write("dirty", 100 * BLOCK + 17, b"journal");
    a.flush("dirty");
    // And one that was never opened.
    a.fork("fresh", "web@clean");
}

// ---- the model -------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Model(BTreeMap<String, Vec<u8>>);

impl Actor for Model {
    fn write(&mut self, disk: &str, at: u64, data: &[u8]) {
        let disk = self.0.get_mut(disk).expect("a disk");
        disk[at as usize..at as usize + data.len()].copy_from_slice(data);
    }
    fn discard(&mut self, disk: &str, at: u64, len: u64) {
        let disk = self.0.get_mut(disk).expect("a disk");
        disk[at as usize..(at + len) as usize].fill(0);
    }
    fn flush(&mut self, _: &str) {}
    fn checkpoint(&mut self, _: &str) {}
    fn close(&mut self, _: &str) {}
    fn snapshot(&mut self, disk: &str, name: &str, _: Option<&str>) {
        self.fork(&format!("{disk}@{name}"), disk);
    }
    fn fork(&mut self, disk: &str, from: &str) {
        let mut contents = self.0[from].clone();
        contents.resize(SIZE as usize, 0);
        self.0.insert(disk.to_string(), contents);
    }
}

// ---- reading -----------------------------------------------------------------------------------------------------

fn unpack(fixture: &str, to: &Path) {
    let mut file: Option<fs::File> = None;
    for line in fixture.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let bytes = |hex: &str| -> Vec<u8> {
            (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hexadecimal"))
                .collect()
        };
        let (at, data) = match words[..] {
            ["=", path, len] => {
                let path = to.join(path);
                fs::create_dir_all(path.parent().expect("a folder")).expect("created");
                let new = fs::File::create_new(path).expect("created");
                new.set_len(len.parse().expect("a length")).expect("set");
                file = Some(new);
                continue;
            }
            [at, n, hex] => {
                let n: usize = n.trim_start_matches('*').parse().expect("a number");
                (at, bytes(hex).repeat(n))
            }
            [at, hex] => (at, bytes(hex)),
            _ => panic!("not a line of a fixture: {line}"),
        };
        let at = at.parse().expect("an offset");
        file.as_ref()
            .expect("a file")
            .write_all_at(&data, at)
            .expect("written");
    }
    for folder in ["run", "layers", "names", "bases"] {
        fs::create_dir_all(to.join(folder)).expect("created");
    }
}

fn contents(disk: &dyn Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size() as usize];
    disk.read(&mut all, 0).expect("readable");
    all
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(a.len().min(b.len()));
    }
    a.iter().zip(b).position(|(a, b)| a != b)
}

#[test]
fn version_1() {
    let dir = tempfile::tempdir().expect("a directory");
    unpack(include_str!("fixtures/v1.store"), dir.path());
    let mut model = Model(BTreeMap::from([("image".to_string(), image())]));
    history(&mut model);
    model
        .0
        .get_mut("image")
        .expect("it")
        .resize(10 * BLOCK_SIZE, 0);
    let store = Store::open(dir.path()).expect("a store of version 1");
    let objects = store.list().expect("its names");
    let listed: Vec<(&str, ObjectKind, u64)> = objects
        .iter()
        .map(|o| (o.name.as_str(), o.kind, o.size))
        .collect();
    assert_eq!(
        listed,
        [
            ("dirty", ObjectKind::Disk, SIZE),
            ("fresh", ObjectKind::Disk, SIZE),
            ("image", ObjectKind::Base, 10 * BLOCK),
            ("web", ObjectKind::Disk, SIZE),
            ("web@clean", ObjectKind::Snapshot, SIZE),
        ]
    );
    let snapshot = store.resolve("web@clean").expect("there");
    assert_eq!(
        snapshot.message.as_deref(),
        Some("a \"message\"\nof two lines")
    );
    // As it is, and after all that is writable was opened for writing, recovered, written and closed.
    for writable in [false, true] {
        for object in &objects {
            let disk = store
                .open_cow(object, writable && object.kind == ObjectKind::Disk)
                .unwrap_or_else(|e| panic!("{}: {e:?}", object.name));
            let expected = &model.0[&object.name];
            let wrong = first_difference(&contents(&*disk), expected);
            assert_eq!(wrong, None, "{} (writable: {writable})", object.name);
            if !disk.read_only() {
                disk.write(b"new", 12_345).expect("written");
                disk.close().expect("closed");
                // Its lock goes with it.
                drop(disk);
                let disk = store.open_cow(object, true).expect("opened again");
                let mut changed = expected.clone();
                changed[12_345..12_348].copy_from_slice(b"new");
                assert_eq!(first_difference(&contents(&*disk), &changed), None);
                disk.close().expect("closed");
            }
        }
    }
    assert_eq!(model.0.len(), objects.len());
}

// ---- making one --------------------------------------------------------------------------------------------------

struct Maker {
    store: Store,
    open: BTreeMap<String, Arc<CowDisk>>,
}

impl Maker {
    fn disk(&mut self, name: &str) -> &CowDisk {
        let store = &self.store;
        self.open.entry(name.to_string()).or_insert_with(|| {
            let object = store.resolve(name).expect("there");
            store.open_cow(&object, true).expect("opened")
        })
    }
}

impl Actor for Maker {
    fn write(&mut self, disk: &str, at: u64, data: &[u8]) {
        self.disk(disk).write(data, at).expect("written");
    }
    fn discard(&mut self, disk: &str, at: u64, len: u64) {
        self.disk(disk).discard(at, len).expect("discarded");
    }
    fn flush(&mut self, disk: &str) {
        self.disk(disk).flush().expect("flushed");
    }
    fn checkpoint(&mut self, disk: &str) {
        self.disk(disk).checkpoint().expect("checkpointed");
    }
    fn snapshot(&mut self, disk: &str, name: &str, message: Option<&str>) {
        self.close(disk);
        self.store.snapshot(disk, name, message).expect("snapshot");
    }
    fn fork(&mut self, disk: &str, from: &str) {
        self.store
            .create(&[disk.to_string()], from, Some(SIZE))
            .expect("created");
    }
    fn close(&mut self, disk: &str) {
        self.open
            .remove(disk)
            .expect("open")
            .close()
            .expect("closed");
    }
}

fn pack(dir: &Path, root: &Path, out: &mut String) {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .expect("a folder")
        .map(|e| e.expect("an entry").path())
        .collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            pack(&path, root, out);
            continue;
        }
        let bytes = fs::read(&path).expect("readable");
        let name = path.strip_prefix(root).expect("below").display();
        writeln!(out, "= {name} {}", bytes.len()).expect("written");
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let word = &rest[..8.min(rest.len())];
            let same = rest.chunks_exact(8).take_while(|w| *w == word).count();
            if word.iter().all(|b| *b == 0) {
                at += 8 * same.max(1);
                continue;
            }
            if same >= 4 {
                writeln!(out, "{at} *{same} {}", hex(word)).expect("written");
                at += 8 * same;
                continue;
            }
            // Up to the next zeros or repetition.
            let n = rest
                .windows(8)
                .step_by(8)
                .take(8)
                .take_while(|w| w.iter().any(|b| *b != 0))
                .count()
                .max(1);
            let n = (8 * n).min(rest.len());
            writeln!(out, "{at} {}", hex(&rest[..n])).expect("written");
            at += n;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn a_fixture_can_be_made() {
    let dir = tempfile::tempdir().expect("a directory");
    let aside = tempfile::tempdir().expect("a directory");
    // For a new format version FORKDISK_FIXTURE names the file to keep.
    let to = std::env::var_os("FORKDISK_FIXTURE")
        .unwrap_or_else(|| aside.path().join("made.store").into_os_string());
    assert!(!Path::new(&to).exists(), "a fixture is never written again");
    let next = AtomicU64::new(1);
    let env = Env {
        id: Arc::new(move || {
            let n = next.fetch_add(1, Ordering::SeqCst);
            Id((u128::from(n) << 64 | 0xF0).to_be_bytes())
        }),
        now: Arc::new(|| 1_800_000_000),
        depth: forkdisk::format::MAX_DEPTH,
    };
    let root = forkdisk::io::os::OsDir::open(dir.path()).expect("opened");
    let store = Store::init_on(Arc::new(root), dir.path(), env).expect("a store");
    let image = image();
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .expect("imported");
    let mut maker = Maker {
        store,
        open: BTreeMap::new(),
    };
    history(&mut maker);
    let mut text = String::new();
    pack(dir.path(), dir.path(), &mut text);
    fs::write(&to, text).expect("written");
    assert!(fs::metadata(&to).expect("there").len() > 1000);
}
