//! `scrub`: what it finds, whom it names, where it goes on, and the checksums it makes.

use super::*;
use forkdisk::check::scrub::{Options, ScrubReport, scrub};
use forkdisk::error::Kind;
use forkdisk::store::Progress;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

fn scrubbed(store: &Store) -> ScrubReport {
    scrub(store, None, Options::default(), &Quiet).expect("a scrub")
}

#[test]
fn a_sound_store_is_sound_and_all_of_it_is_read() {
    let (sim, _) = small();
    let report = scrubbed(&again(&sim, 2));
    assert_eq!(report.corruptions, []);
    assert_eq!((report.layers, report.bases), (4, 1));
    // Nine blocks of the image, three of the snapshot, three of the disk, one of the fork.
    assert_eq!(report.verified, 16 * B);
    assert!(!report.resumed);
    assert!(sim.read_file("scrub").is_err(), "no position is left");
}

/// Whoever has something of its own above a damaged block is not concerned, and is not named.
#[test]
fn damage_names_block_layer_and_those_who_see_it() {
    let (sim, contents) = small();
    let store = again(&sim, 2);
    // Block 1 of the snapshot: `d` and `f` have their own, `new` has not. Block 2: all but `f` and `new` have their own... `d` wrote
    // blocks 0, 1 and 7.
    for (lba, affected, sound) in [
        (1, &["d@s", "new"][..], &["d", "f", "image"][..]),
        (2, &["d", "d@s", "f", "new"], &["image"]),
    ] {
        let (file, slot) = slot_of(&store, "d@s", lba);
        let rotten = sim.crash_with(Policy::AllDone);
        rotten.flip(&file, slot * B + 7, 4).expect("flip");
        let store = again(&rotten, 3);
        let report = scrubbed(&store);
        let [found] = &report.corruptions[..] else {
            panic!("{:?}", report.corruptions);
        };
        assert_eq!(found.affected, affected, "{found:?}");
        assert_eq!(found.lba, Some((lba.into(), u64::from(lba) + 1)));
        assert_eq!(found.slot.map(u64::from), Some(slot));
        assert_eq!(found.offset, Some(slot * B));
        assert_eq!(found.what, "d@s");
        assert!(found.layer.is_some() && found.base.is_none());
        // And so it is.
        for (name, expected) in &contents {
            let disk = store
                .open_disk(&store.resolve(name).expect("resolve"), false)
                .expect("open");
            match common::read_all(&*disk) {
                Ok(found) => {
                    assert!(sound.contains(&name.as_str()), "{name} reads block {lba}");
                    assert!(found == *expected, "{name}");
                }
                Err(e) => {
                    assert!(affected.contains(&name.as_str()), "{name}: {e}");
                    assert_eq!(e.kind(), Kind::Corrupt);
                }
            }
        }
        // Of one object: only if it stands on what is damaged.
        let image = scrub(&store, Some("image"), Options::default(), &Quiet).expect("a scrub");
        assert_eq!(image.corruptions, []);
    }
}

#[test]
fn a_damaged_base_names_those_who_show_the_block() {
    let (sim, _) = small();
    let image = sim
        .file_names()
        .into_iter()
        .find(|f| f.ends_with("image") && f.starts_with("bases"))
        .expect("an image");
    // Blocks 3 and 4 are everybody's, 5 is discarded in `d@s`, 8 is the last one and not whole.
    for at in [3 * B + 1, 4 * B + 4095, 5 * B, 8 * B + 3000] {
        sim.flip(&image, at, 1).expect("flip");
    }
    let report = scrubbed(&again(&sim, 2));
    let found: Vec<_> = report
        .corruptions
        .iter()
        .map(|f| (f.lba.expect("blocks"), f.affected.len()))
        .collect();
    // 3 to 5 are one place, and of that all see something.
    assert_eq!(found, [((3, 6), 5), ((8, 9), 5)]);
    sim.flip(&image, 3 * B + 1, 1).expect("flip");
    sim.flip(&image, 4 * B + 4095, 1).expect("flip");
    let report = scrubbed(&again(&sim, 2));
    assert_eq!(report.corruptions[0].lba, Some((5, 6)));
    assert_eq!(report.corruptions[0].affected, ["image"]);
    assert!(report.corruptions[0].base.is_some());
}

/// Cancels after so many bytes.
struct After(u64);
impl Progress for After {
    fn update(&self, done: u64, _: u64) -> bool {
        done < self.0
    }
}

/// Wherever it is interrupted, the next one goes on and in the end all was read, and all damage was found.
#[test]
fn an_interrupted_scrub_goes_on_where_it_stopped() {
    let (sim, _) = small();
    let store = again(&sim, 2);
    let (file, slot) = slot_of(&store, "d@s", 1);
    drop(store);
    sim.flip(&file, slot * B + 7, 4).expect("flip");
    for cut in 1..16 {
        let sim = sim.crash_with(Policy::AllDone);
        let store = again(&sim, 2);
        let stopped =
            scrub(&store, None, Options::default(), &After(cut * B)).expect_err("interrupted");
        assert_eq!(stopped.kind(), Kind::Interrupted);
        assert!(sim.read_file("scrub").is_ok());
        // As another process, after a crash that kept the file or tore it.
        let store = again(&sim, 3);
        let planned = Options {
            dry_run: true,
            ..Options::default()
        };
        let plan = scrub(&store, None, planned, &Quiet).expect("a plan");
        assert!(plan.resumed && plan.verified == 0);
        let report = scrubbed(&store);
        assert!(report.resumed, "{cut}");
        assert!(
            report.verified <= 16 * B - (cut - 1).min(9) * B,
            "{cut}: {report:?}"
        );
        assert_eq!(report.corruptions.len(), 1, "{cut}: {report:?}");
        assert!(sim.read_file("scrub").is_err(), "no position is left");
        assert!(!scrubbed(&store).resumed);
    }
    // Of something else, begun anew, or with a damaged position: all is read.
    for what in 0..3 {
        let sim = sim.crash_with(Policy::AllDone);
        let store = again(&sim, 2);
        scrub(&store, None, Options::default(), &After(12 * B)).expect_err("interrupted");
        let (reference, options) = match what {
            0 => (Some("f"), Options::default()),
            1 => {
                let restart = Options {
                    restart: true,
                    ..Options::default()
                };
                (None, restart)
            }
            _ => {
                sim.flip("scrub", 20, 1).expect("flip");
                (None, Options::default())
            }
        };
        let report = scrub(&store, reference, options, &Quiet).expect("a scrub");
        assert!(!report.resumed);
        let all = if what == 0 { 13 } else { 16 };
        assert_eq!(report.verified, all * B);
    }
}

#[test]
fn one_scrub_runs_at_a_time() {
    let (sim, _) = small();
    let store = again(&sim, 2);
    struct Another(Store, AtomicU64);
    impl Progress for Another {
        fn update(&self, _: u64, _: u64) -> bool {
            let e = scrub(&self.0, None, Options::default(), &Quiet).expect_err("one runs");
            assert_eq!(e.kind(), Kind::Busy);
            self.1.fetch_add(1, SeqCst);
            true
        }
    }
    let another = Another(again(&sim, 3), AtomicU64::new(0));
    scrub(&store, None, Options::default(), &another).expect("a scrub");
    assert!(another.1.load(SeqCst) > 3);
}

#[test]
fn a_rate_is_kept() {
    let (sim, _) = small();
    let options = Options {
        rate: Some(16 * B * 5),
        ..Options::default()
    };
    let before = std::time::Instant::now();
    scrub(&again(&sim, 2), None, options, &Quiet).expect("a scrub");
    // No claim about speed: it must have waited.
    assert!(before.elapsed().as_millis() >= 190);
}

/// A disk in use is verified as of its last flush, whatever is written meanwhile, and damage in it is found.
#[test]
fn a_disk_in_use_is_verified() {
    let (sim, _) = small();
    let store = again(&sim, 2);
    let disk = open(&store, "d").expect("d");
    disk.write(&[8; 6 * 4096], 2 * B).expect("write");
    disk.flush().expect("flush");
    struct Writes<'a>(&'a CowDisk, AtomicU64);
    impl Progress for Writes<'_> {
        fn update(&self, _: u64, _: u64) -> bool {
            let n = self.1.fetch_add(1, SeqCst);
            for lba in 0..9 {
                let data = [n as u8; 4096];
                self.0.write(&data, lba * B).expect("write");
                self.0.flush().expect("flush");
            }
            if n.is_multiple_of(3) {
                self.0.checkpoint().expect("checkpoint");
            }
            true
        }
    }
    let writes = Writes(&disk, AtomicU64::new(0));
    let report = scrub(&again(&sim, 3), None, Options::default(), &writes).expect("a scrub");
    assert_eq!(report.corruptions, []);
    assert_eq!(report.layers, 4);
    let (file, slot) = slot_of(&store, "d", 4);
    sim.flip(&file, slot * B, 1).expect("flip");
    let report = scrubbed(&again(&sim, 3));
    assert_eq!(report.corruptions.len(), 1, "{report:?}");
    assert_eq!(report.corruptions[0].affected, ["d"]);
    assert_eq!(report.corruptions[0].lba, Some((4, 5)));
    disk.close().expect("close");
}

/// Every byte of metadata and data that is rotten is found, and nothing else is said of the rest: whatever a reader stumbles over, a scrub
/// or a check tells beforehand.
#[test]
fn what_readers_meet_scrub_or_check_tells() {
    let (sim, contents) = small();
    let mut told = 0;
    for path in sim.file_names() {
        let bytes = sim.read_file(&path).expect("a file");
        for (at, byte) in bytes.iter().enumerate() {
            let step = if *byte != 0 { 61 } else { 40_009 };
            if at % step != 0 || path == "forkdisk.toml" {
                continue;
            }
            let copy = sim.crash_with(Policy::AllDone);
            copy.flip(&path, at as u64, 1 << (at % 8)).expect("flip");
            let store = again(&copy, 2);
            let failed = contents.keys().any(|name| {
                let read = store.resolve(name).and_then(|object| {
                    let disk = store.open_disk(&object, false)?;
                    common::read_all(&*disk)
                });
                read.is_err()
            });
            let found = checked(&store).corruptions.len()
                + scrub(&store, None, Options::default(), &Quiet)
                    .map_or(0, |r| r.corruptions.len());
            assert!(!failed || found > 0, "{path} byte {at}: nobody tells");
            told += usize::from(found > 0);
        }
    }
    assert!(told > 100, "{told}");
}

// ---- checksums of images that came in without -----------------------------------------------------------------

fn image(len: usize) -> Vec<u8> {
    common::base_image(len)
}

fn linked(dir: &Path, len: usize) -> (Store, std::path::PathBuf, Vec<u8>) {
    let bytes = image(len);
    let path = dir.join("i.img");
    fs::write(&path, &bytes).expect("an image");
    let store = Store::init(&dir.join("store")).expect("a store");
    store
        .import(ImportSource::Path(&path), "i", ImportMode::Link, &Quiet)
        .expect("import");
    (store, path, bytes)
}

/// Changes a byte behind everybody's back: size, times and inode stay.
fn rot(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let time = file.metadata().and_then(|m| m.modified()).expect("a time");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[!byte[0]], at).expect("write");
    file.set_modified(time).expect("the time of before");
}

#[test]
fn a_linked_image_gets_checksums_from_its_first_scrub() {
    for len in [1, 4096, 300 * 4096, 300 * 4096 + 17] {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, path, bytes) = linked(dir.path(), len);
        fork(&store, "i", "d");
        // Open before, and so without checksums.
        let object = store.resolve("d").expect("d");
        let before = store.open_disk(&object, false).expect("open");
        let planned = Options {
            dry_run: true,
            ..Options::default()
        };
        scrub(&store, None, planned, &Quiet).expect("a plan");
        let id = store.resolve("i").expect("i").id;
        assert!(!store.base(id).expect("base").has_sums());
        let other = Store::open(store.path()).expect("open");
        let report = scrub(&other, None, Options::default(), &Quiet).expect("a scrub");
        assert_eq!(
            (report.summed, report.corruptions),
            (vec!["i".to_string()], vec![])
        );
        assert!(
            !dir.path()
                .join(format!("store/bases/{id}/.tmp-sums"))
                .exists()
        );
        // The next opening finds them, and by it those who have the base open.
        let after = store.open_disk(&object, false).expect("open");
        for disk in [&before, &after] {
            let read = common::read_all(&**disk).expect("read");
            assert!(read[..len] == bytes && read[len..].iter().all(|b| *b == 0));
        }
        let at = (len as u64 - 1) / 2;
        rot(&path, at);
        for disk in [&before, &after] {
            let e = common::read_all(&**disk).expect_err("rotten");
            assert_eq!(e.kind(), Kind::Corrupt);
            assert_eq!(e.block_lba().map(|l| u64::from(l.0)), Some(at / B));
            assert!(e.to_string().contains("i.img"), "{e}");
        }
        let report = scrubbed(&Store::open(store.path()).expect("open"));
        assert_eq!(report.corruptions.len(), 1);
        assert_eq!(report.corruptions[0].affected, ["d", "i"]);
        assert_eq!(report.corruptions[0].lba, Some((at / B, at / B + 1)));
        rot(&path, at);
        assert_eq!(scrubbed(&store).corruptions, []);
        // Data in place of a hole, and a hole in place of data, are changes, too.
        if len > 200 * 4096 {
            let hole = (len / 3) as u64 + 8192;
            rot(&path, hole);
            assert_eq!(scrubbed(&store).corruptions.len(), 1);
        }
    }
}

#[test]
fn an_image_that_was_changed_gets_no_checksums() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, path, bytes) = linked(dir.path(), 100 * 4096);
    fork(&store, "i", "d");
    // While it is read: whoever changes it must not find the change approved.
    struct Changes<'a>(&'a Path, AtomicU64);
    impl Progress for Changes<'_> {
        fn update(&self, done: u64, _: u64) -> bool {
            if done > 0 && self.1.fetch_add(1, SeqCst) == 0 {
                let mut bytes = fs::read(self.0).expect("read");
                bytes[5] ^= 1;
                fs::write(self.0, bytes).expect("write");
            }
            true
        }
    }
    let changes = Changes(&path, AtomicU64::new(0));
    let report = scrub(&store, None, Options::default(), &changes).expect("a scrub");
    assert_eq!(report.summed, [""; 0]);
    let [found] = &report.corruptions[..] else {
        panic!("{:?}", report.corruptions);
    };
    assert_eq!(found.affected, ["d", "i"]);
    assert!(found.message.contains("changed"), "{}", found.message);
    let id = store.resolve("i").expect("i").id;
    let base = dir.path().join(format!("store/bases/{id}"));
    assert!(!base.join("sums").exists() && !base.join(".tmp-sums").exists());
    drop(bytes);
}

/// The checksums of a copied image can be made anew, but only of what was imported.
#[test]
fn lost_checksums_come_back() {
    let (sim, _) = small();
    let sums = sim
        .file_names()
        .into_iter()
        .find(|f| f.ends_with("/sums"))
        .expect("sums");
    let before = sim.read_file(&sums).expect("sums");
    sim.remove_file(&sums).expect("remove");
    let report = checked(&again(&sim, 2));
    assert_eq!(report.corruptions.len(), 1);
    assert!(report.corruptions[0].message.contains("checksums are gone"));
    let rotten = sim.crash_with(Policy::AllDone);
    let report = scrubbed(&again(&sim, 2));
    assert_eq!(report.summed, ["image"]);
    assert!(sim.read_file(&sums).expect("sums") == before);
    assert_eq!(checked(&again(&sim, 2)).corruptions, []);
    rotten
        .flip(&sums.replace("sums", "image"), 4096 * 6, 1)
        .expect("flip");
    let report = scrubbed(&again(&rotten, 2));
    assert_eq!(report.summed, [""; 0]);
    assert_eq!(report.corruptions.len(), 1);
    assert!(rotten.read_file(&sums).is_err());
}

/// A power cut at any step of a scrub that makes checksums leaves none, or all of them.
#[test]
fn checksums_are_made_in_one_step() {
    let (sim, contents_before) = small();
    let sums = sim
        .file_names()
        .into_iter()
        .find(|f| f.ends_with("/sums"))
        .expect("sums");
    let right = sim.read_file(&sums).expect("sums");
    sim.remove_file(&sums).expect("remove");
    let mut made = 0;
    for cut in 0..200 {
        let dying = sim.crash_with(Policy::AllDone);
        dying.cut_at(cut);
        let done = scrub(&again(&dying, 2), None, Options::default(), &Quiet).is_ok();
        for seed in 0..4 {
            let left = dying.crash(seed);
            if let Ok(found) = left.read_file(&sums) {
                assert!(found == right, "cut {cut} seed {seed}");
                made += 1;
            } else {
                assert!(!done, "cut {cut}: it was acknowledged");
            }
            let store = again(&left, 3);
            assert_eq!(contents(&store), contents_before);
            assert_eq!(scrubbed(&store).corruptions, []);
            assert!(left.read_file(&sums).expect("sums") == right);
            assert_eq!(checked(&store).corruptions, []);
        }
        if done {
            assert!(cut > 6 && made > 0, "{cut} {made}");
            return;
        }
    }
    panic!("it never ends");
}
