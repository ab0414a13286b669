//! Rot: every flipped bit is harmless or a clear error, never wrong data, never a panic. The same for files that were cut.

use super::*;
use forkdisk::error::Kind;
use forkdisk::io::sim::Policy;
use forkdisk::store::ObjectKind;
use std::collections::BTreeMap;

/// What all names of a store hold.
type Contents = BTreeMap<String, Vec<u8>>;

/// A small store, closed cleanly: an image, a disk with a snapshot, a fork of the snapshot; data, zeros and several runs.
fn small() -> (SimDisk, Contents) {
    let sim = SimDisk::new(1);
    let image: Vec<u8> = (0..9 * 4096 - 100)
        .map(|i| (i / 7 % 251) as u8 + 1)
        .collect();
    let store = store_with(&sim, &image);
    let disk = open(&store, "d").expect("d");
    disk.write(&[2; 3 * 4096], 0).expect("write");
    disk.discard(5 * B, B).expect("discard");
    disk.flush().expect("flush");
    store
        .snapshot_running(&disk, "d", "s", Some("a message"))
        .expect("snapshot");
    disk.write(&[3; 5000], 3000).expect("write");
    disk.checkpoint().expect("checkpoint");
    disk.write(&[4; 4096], 7 * B).expect("write");
    disk.close().expect("close");
    drop(disk);
    fork(&store, "d@s", "f", None);
    let mut contents = Contents::new();
    for object in store.list().expect("list") {
        let disk = store.open_disk(&object, false).expect("open");
        contents.insert(object.name, common::read_all(&*disk).expect("read"));
    }
    drop(store);
    (sim.crash_with(Policy::AllDone), contents)
}

/// Reads all names as a reader does, and disks as a writer does. Returns the number of errors.
fn harmless_or_told(sim: &SimDisk, contents: &Contents, story: &str) -> usize {
    let told = |e: &forkdisk::error::Error| {
        let clear = matches!(
            e.kind(),
            Kind::Corrupt | Kind::Version | Kind::NoStore | Kind::NotFound
        );
        assert!(clear, "{story}: not a clear error: {e:?}");
        1
    };
    let store = match Store::open_on(sim.root(), Path::new("/sim"), env(9 << 20)) {
        Ok(store) => store,
        Err(e) => return told(&e),
    };
    let mut errors = 0;
    for writable in [false, true] {
        for (name, expected) in contents {
            let found = (|| {
                let object = store.resolve(name)?;
                let disk = store.open_cow(&object, writable && object.kind == ObjectKind::Disk)?;
                common::read_all(&*disk)
            })();
            match found {
                Ok(found) => assert!(found == *expected, "{story}: wrong data in {name}"),
                Err(e) => errors += told(&e),
            }
        }
    }
    errors
}

#[test]
fn every_flipped_byte_is_harmless_or_told() {
    let (sim, contents) = small();
    let mut errors = 0;
    let mut flips = 0;
    for path in sim.file_names() {
        let bytes = sim.read_file(&path).expect("a file");
        let (mut told, mut tried) = (0, 0);
        for (at, byte) in bytes.iter().enumerate() {
            // Of long stretches of zeros and of data, some.
            let slot = &bytes[at / 4096 * 4096..((at / 4096 + 1) * 4096).min(bytes.len())];
            let metadata = path.ends_with(".layer") && !(3 * 4096..1024 * 4096).contains(&at)
                || !path.ends_with(".layer") && !path.ends_with("image");
            let step = match metadata {
                true if *byte != 0 && slot.iter().any(|b| *b != slot[0]) => 1,
                true => 61,
                false if at < 1030 * 4096 && path.ends_with(".layer") => 40_009,
                false => 509,
            };
            if at % step != 0 {
                continue;
            }
            let copy = sim.crash_with(Policy::AllDone);
            copy.flip(&path, at as u64, 1 << (at % 8)).expect("flip");
            tried += 1;
            told +=
                usize::from(harmless_or_told(&copy, &contents, &format!("{path} byte {at}")) > 0);
        }
        eprintln!("{path}: {tried} flips, {told} told");
        if tried > 200 && !path.ends_with("f.layer") {
            assert!(told > 0, "{path}: no flip was ever noticed");
        }
        flips += tried;
        errors += told;
    }
    assert!(
        flips > 2000 && errors > 500,
        "{flips} flips, {errors} errors"
    );
}

#[test]
fn a_layer_file_cut_at_any_slot_is_harmless_or_told() {
    let (sim, contents) = small();
    for path in sim.file_names() {
        if !path.ends_with(".layer") {
            continue;
        }
        let len = sim.read_file(&path).expect("a file").len() as u64;
        for slot in 0..len / B {
            let copy = sim.crash_with(Policy::AllDone);
            copy.truncate_file(&path, slot * B).expect("cut");
            let errors = harmless_or_told(&copy, &contents, &format!("{path} cut to {slot} slots"));
            assert!(errors > 0 || len <= 3 * B || slot >= 4, "{path}: {slot}");
            let copy = sim.crash_with(Policy::AllDone);
            copy.truncate_file(&path, slot * B + 1234).expect("cut");
            harmless_or_told(
                &copy,
                &contents,
                &format!("{path} cut to {slot} slots and a bit"),
            );
        }
    }
}

/// The same for a disk that was not closed: rot of its last commit looks like a power cut, so the flush before may be what is found; but
/// nothing else may.
#[test]
fn every_flipped_byte_of_a_disk_that_was_not_closed() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 12 * 4096]);
    let disk = open(&store, "d").expect("d");
    disk.write(&[2; 3 * 4096], 0).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    for n in 3..6u8 {
        disk.write(&[n; 5000], u64::from(n) * 4000).expect("write");
        disk.discard(u64::from(n) * B, 100).expect("discard");
        disk.flush().expect("flush");
    }
    let before = common::read_all(&*disk).expect("read");
    disk.write(&[9; 2 * 4096], 8 * B).expect("write");
    disk.flush().expect("flush");
    let last = common::read_all(&*disk).expect("read");
    let dead = sim.crash_with(Policy::AllDropped);
    let id = store.resolve("d").expect("d").id;
    let path = format!("layers/{id}.layer");
    let bytes = dead.read_file(&path).expect("the layer");
    let (mut same, mut dropped, mut told) = (0, 0, 0);
    for (at, byte) in bytes.iter().enumerate() {
        let slot = &bytes[at / 4096 * 4096..(at / 4096 + 1) * 4096];
        let step = match *byte != 0 && slot.iter().any(|b| *b != slot[0]) {
            true if at < 1024 * 4096 => 1,
            true => 13,
            false if slot.iter().any(|b| *b != 0) => 127,
            false => 50_021,
        };
        if at % step != 0 {
            continue;
        }
        let rotten = dead.crash_with(Policy::AllDone);
        rotten.flip(&path, at as u64, 1 << (at % 8)).expect("flip");
        let store = again(&rotten, 9);
        let found = open(&store, "d").and_then(|disk| common::read_all(&*disk));
        match found {
            Ok(found) if found == last => same += 1,
            Ok(found) if found == before => dropped += 1,
            Ok(_) => panic!("byte {at}: wrong data"),
            Err(e) => {
                assert_eq!(e.kind(), Kind::Corrupt, "byte {at}: {e:?}");
                told += 1;
            }
        }
    }
    eprintln!("{same} harmless, {dropped} dropped the last commit, {told} told");
    assert!(dropped > 50 && told > 200 && same > 50);
}
