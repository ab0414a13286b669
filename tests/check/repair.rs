//! `check --repair`: what comes back, what goes, and what it never touches.

use super::*;
use forkdisk::check::repair::{Step, plan, repair};
use forkdisk::units::Id;

fn repaired(store: &Store) -> Vec<Step> {
    let steps = plan(store, &Quiet).expect("a plan");
    let done = repair(store, &steps, &Quiet).expect("a repair");
    assert_eq!(done, steps, "what was announced is done");
    assert_eq!(plan(store, &Quiet).expect("a plan"), [], "once is enough");
    done
}

fn same_contents(store: &Store, expected: &Contents, story: &str) {
    let found = contents(store);
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>(),
        "{story}"
    );
    assert!(found == *expected, "{story}: other contents");
}

#[test]
fn a_sound_store_needs_none() {
    let (sim, contents) = small();
    let store = again(&sim, 2);
    let before = sim.file_names();
    assert_eq!(plan(&store, &Quiet).expect("a plan"), []);
    assert_eq!(repaired(&store), []);
    assert_eq!(sim.file_names(), before);
    same_contents(&store, &contents, "sound");
}

/// Every name that is lost or damaged comes back, with the contents it had; several at once, too.
#[test]
fn names_come_back() {
    let (sim, contents) = small();
    let names = ["d", "d@s", "f", "image", "new"];
    for damage in ["remove", "empty", "flip", "rubbish"] {
        for lost in 1..1u32 << names.len() {
            let lost: Vec<&str> = (0..names.len())
                .filter(|i| lost >> i & 1 == 1)
                .map(|i| names[i])
                .collect();
            let sim = sim.crash_with(Policy::AllDone);
            for name in &lost {
                let path = format!("names/{name}");
                match damage {
                    "remove" => sim.remove_file(&path).expect("remove"),
                    "empty" => sim.truncate_file(&path, 0).expect("cut"),
                    "flip" => sim.flip(&path, 3, 1).expect("flip"),
                    _ => sim.write_file(&path, &[0xA5; 300]).expect("write"),
                }
            }
            let story = format!("{damage} {lost:?}");
            let store = again(&sim, 2);
            let report = checked(&store);
            // A snapshot that was interrupted leaves a layer like one whose name is gone: that is no damage.
            let silent = damage == "remove" && lost == ["d@s"];
            assert_eq!(
                report.leaks.is_empty() && report.corruptions.is_empty(),
                silent,
                "{story}"
            );
            let steps = repaired(&store);
            let back: Vec<&str> = steps.iter().map(|s| s.what.as_str()).collect();
            for name in &lost {
                assert!(back.contains(name), "{story}: {steps:?}");
            }
            same_contents(&store, &contents, &story);
            let report = checked(&store);
            assert_eq!(
                (report.leaks, report.corruptions),
                (vec![], vec![]),
                "{story}"
            );
        }
    }
}

/// A name given since is not replaced, and an object under it not confused with the one that lost it.
#[test]
fn a_name_that_is_taken_is_left_alone() {
    let (sim, contents) = small();
    sim.remove_file("names/d").expect("remove");
    let store = again(&sim, 2);
    fork(&store, "image", "d");
    let steps = repaired(&store);
    assert_eq!(steps.len(), 1);
    let found = steps[0].what.clone();
    assert!(found.starts_with("found-"), "{found}");
    let all = super::contents(&store);
    assert!(all["d"] == contents["image"] && all[&found] == contents["d"]);
    change(&store, &found, |d| d.write(&[1; 4096], 0).expect("write"));
    assert_eq!(checked(&store).corruptions, []);
}

/// A record that was copied over another names an object twice: the other one is not lost.
#[test]
fn a_copied_record_is_told_and_mended() {
    let (sim, contents) = small();
    let record = sim.read_file("names/f").expect("f");
    sim.write_file("names/d", &record).expect("write");
    let store = again(&sim, 2);
    let e = store.resolve("d").expect_err("not f's data");
    assert!(e.to_string().contains("record of `f`"), "{e}");
    repaired(&store);
    same_contents(&store, &contents, "copied");
}

#[test]
fn a_renamed_disk_is_sound_at_once_and_after_a_power_cut() {
    let (sim, contents) = small();
    let expected = |new: bool| {
        let mut all = contents.clone();
        for (from, to) in [("d", "e"), ("d@s", "e@s")] {
            if new && let Some(data) = all.remove(from) {
                all.insert(to.to_string(), data);
            }
        }
        all
    };
    let (mut old, mut new) = (0, 0);
    for cut in 0..100 {
        let dying = sim.crash_with(Policy::AllDone);
        dying.cut_at(cut);
        let done = again(&dying, 2).rename("d", "e").is_ok();
        for seed in 0..8 {
            let left = dying.crash(seed);
            let store = again(&left, 3);
            let found = super::contents(&store);
            // The disk and its snapshot each have one of both names, and one only.
            let both = [expected(false), expected(true)];
            for (a, b) in [("d", "e"), ("d@s", "e@s")] {
                let (a, b) = (found.get(a), found.get(b));
                assert!(a.is_some() != b.is_some(), "cut {cut} seed {seed}");
                let data = a.or(b).expect("one of both");
                assert!(both.iter().any(|all| all.values().any(|d| d == data)));
                old += usize::from(a.is_some());
                new += usize::from(b.is_some());
            }
            if done {
                assert!(found == expected(true));
            }
            assert_eq!(checked(&store).corruptions, [], "cut {cut} seed {seed}");
        }
        if done {
            assert!(old > 20 && new > 20);
            return;
        }
    }
    panic!("it never ends");
}

#[test]
fn a_damaged_copy_of_a_superblock_is_written_anew() {
    let (sim, contents) = small();
    let layers: Vec<String> = sim.file_names();
    for path in layers.iter().filter(|p| p.ends_with(".layer")) {
        let before = sim.read_file(path).expect("a layer");
        if before.len() <= 4096 {
            continue;
        }
        for copy in [1, 2] {
            let sim = sim.crash_with(Policy::AllDone);
            sim.flip(path, copy * B + 100, 8).expect("flip");
            let store = again(&sim, 2);
            let report = checked(&store);
            assert_eq!(report.corruptions.len(), 1, "{path} {copy}");
            assert_eq!(report.corruptions[0].slot, Some(copy as u32));
            assert_eq!(repaired(&store).len(), 1);
            assert!(sim.read_file(path).expect("a layer") == before);
            same_contents(&store, &contents, path);
            assert_eq!(checked(&store).corruptions, []);
        }
    }
}

/// Host space that nothing uses, half-made files and empty layers go; the rest is as it was.
#[test]
fn leaks_are_freed() {
    let (sim, contents) = small();
    let before: Contents = sim
        .file_names()
        .into_iter()
        .map(|f| (f.clone(), sim.read_file(&f).expect("a file")))
        .collect();
    let store = again(&sim, 2);
    let layer = format!("layers/{}.layer", store.resolve("f").expect("f").id);
    // Rubbish in the journal of a closed layer, and behind its end.
    let mut bytes = sim.read_file(&layer).expect("a layer");
    bytes[10 * 4096..12 * 4096].fill(7);
    bytes.resize(bytes.len() + 3 * 4096, 9);
    sim.write_file(&layer, &bytes).expect("write");
    // A snapshot and an import that died, and a fork that did.
    let rubbish = [
        "names/.tmp-x".to_string(),
        ".tmp-forkdisk.toml".to_string(),
        format!("bases/.tmp-{}/image", Id([3; 16])),
        format!("layers/{}.layer", Id([4; 16])),
    ];
    for path in &rubbish[..3] {
        sim.write_file(path, b"half").expect("write");
    }
    sim.write_file(&rubbish[3], &[0; 4096]).expect("write");
    fork(&store, "d@s", "gone");
    sim.write_file("names/gone2", &[]).expect("write");
    sim.remove_file("names/gone2").expect("remove");
    let gone = store.resolve("gone").expect("gone").id;
    // Its name is there again under another layer: the first one is plainly superfluous.
    sim.remove_file("names/gone").expect("remove");
    fork(&store, "d@s", "gone");
    let report = checked(&store);
    assert_eq!(report.corruptions, []);
    assert!(report.leaks.len() >= 6, "{:?}", report.leaks);
    let steps = repaired(&store);
    assert!(
        steps.iter().any(|s| s.what == format!("layer {gone}")),
        "{steps:?}"
    );
    let report = checked(&store);
    assert_eq!((report.leaks, report.corruptions), (vec![], vec![]));
    for (path, bytes) in &before {
        let now = sim.read_file(path).expect("still there");
        assert!(now[..bytes.len()] == bytes[..], "{path} was touched");
        assert!(
            now[bytes.len()..].iter().all(|b| *b == 0),
            "{path} was touched"
        );
    }
    let mut expected = contents.clone();
    expected.insert("gone".into(), contents["d@s"].clone());
    same_contents(&store, &expected, "leaks");
}

/// Of a list of free slots the room may be larger than the list: at 511 and 512 extents it is one slot more than they need.
#[test]
fn the_room_of_a_free_list_is_in_use() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 3000 * B as usize]);
    fork(&store, "image", "d");
    change(&store, "d", |disk| {
        disk.write(&[2; 3000 * B as usize], 0).expect("write");
        disk.flush().expect("flush");
        for n in 0..505 {
            disk.discard(n * 3 * B, B).expect("discard");
        }
    });
    for n in 505..520 {
        change(&store, "d", |disk| {
            disk.discard(n * 3 * B, B).expect("discard")
        });
        let report = checked(&store);
        assert_eq!(
            (report.leaks, report.corruptions),
            (vec![], vec![]),
            "after discard {n}"
        );
    }
}

/// What is damaged stays as it is, and what is in use is left alone.
#[test]
fn data_and_what_is_in_use_are_not_touched() {
    let (sim, _) = small();
    let store = again(&sim, 2);
    let disk = open(&store, "d").expect("d");
    disk.write(&[9; 4096], 0).expect("write");
    disk.flush().expect("flush");
    let id = store.resolve("d").expect("d").id;
    let path = format!("layers/{id}.layer");
    sim.flip(&path, 2 * B + 100, 8).expect("flip");
    // Not even the layer that its name was taken from.
    sim.remove_file("names/d").expect("remove");
    let (file, slot) = slot_of(&store, "d@s", 1);
    sim.flip(&file, slot * B, 1).expect("flip");
    let before: Vec<_> = [&path, &file]
        .map(|f| sim.read_file(f).expect("a file"))
        .into();
    let steps = repaired(&again(&sim, 3));
    assert_eq!(steps.len(), 1, "{steps:?}");
    assert_eq!(steps[0].what, "d");
    let after: Vec<_> = [&path, &file]
        .map(|f| sim.read_file(f).expect("a file"))
        .into();
    assert!(before == after);
    disk.write(&[10; 4096], B).expect("write");
    disk.close().expect("close");
    drop(disk);
    assert_eq!(contents_of(&again(&sim, 4), "d")[..4096], [9; 4096]);
}

fn contents_of(store: &Store, name: &str) -> Vec<u8> {
    let object = store.resolve(name).expect("resolve");
    let disk = store.open_disk(&object, true).expect("open");
    let mut first = vec![0; 2 * 4096];
    disk.read(&mut first, 0).expect("read");
    first
}

/// A power cut at any step leaves a store that the same command mends, with the same result.
#[test]
fn a_repair_can_be_cut_anywhere() {
    let (sim, contents) = small();
    for name in ["d", "d@s", "new"] {
        sim.remove_file(&format!("names/{name}")).expect("remove");
    }
    sim.truncate_file("names/f", 5).expect("cut");
    sim.write_file("names/.tmp-y", b"half").expect("write");
    let layer = sim
        .file_names()
        .into_iter()
        .find(|f| f.ends_with(".layer") && sim.read_file(f).is_ok_and(|b| b.len() > 8192))
        .expect("a layer");
    sim.flip(&layer, B + 9, 1).expect("flip");
    for cut in 0..200 {
        let dying = sim.crash_with(Policy::AllDone);
        let steps = plan(&again(&dying, 2), &Quiet).expect("a plan");
        dying.cut_at(cut);
        let done = repair(&again(&dying, 2), &steps, &Quiet).is_ok();
        for seed in 0..4 {
            let left = dying.crash(seed);
            let store = again(&left, 3);
            repaired(&store);
            same_contents(&store, &contents, &format!("cut {cut} seed {seed}"));
            let report = checked(&store);
            assert_eq!((report.leaks, report.corruptions), (vec![], vec![]));
        }
        if done {
            assert!(cut > 10);
            return;
        }
    }
    panic!("it never ends");
}
