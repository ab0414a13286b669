//! The imaginary disk: everything a power cut may do is seen, and nothing it may not.

use super::{K4, contents, kind, names};
use forkdisk::{
    error::Kind,
    io::{
        Access, Dir, EntryKind, File,
        sim::{FaultKind, Policy, SimDisk, Verb},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
};

/// A disk with one durable file.
fn disk_with(name: &str, bytes: &[u8]) -> SimDisk {
    let disk = SimDisk::new(7);
    disk.write_file(name, bytes).unwrap();
    disk
}

/// What many power cuts leave, each named by `look`; `look` checks what must hold in all of them.
fn outcomes<T: Ord>(disk: &SimDisk, look: impl Fn(&SimDisk, u64) -> T) -> BTreeSet<T> {
    (0..600).map(|seed| look(&disk.crash(seed), seed)).collect()
}

#[track_caller]
fn all_seen<T: Ord + Debug, const N: usize>(seen: &BTreeSet<T>, wanted: [T; N]) {
    for w in wanted {
        assert!(seen.contains(&w), "never saw {w:?}, only {seen:?}");
    }
}

// ---- un-synced contents ----

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Sector {
    Old,
    New,
    Zero,
    Garbage,
}

fn sectors(bytes: &[u8]) -> Vec<Sector> {
    let look = |part: &[u8]| match part {
        part if part.iter().all(|b| *b == b'o') => Sector::Old,
        part if part.iter().all(|b| *b == b'n') => Sector::New,
        part if part.iter().all(|b| *b == 0) => Sector::Zero,
        _ => Sector::Garbage,
    };
    bytes.chunks(512).map(look).collect()
}

#[test]
fn an_unsynced_write_is_done_dropped_torn_or_garbage() {
    let disk = disk_with("f", &[b'o'; 4 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.write_at(&[b'n'; 2 * K4], K4 as u64).unwrap();
    assert_eq!(disk.unsynced(), 1);
    let seen = outcomes(&disk, |left, seed| {
        let all = sectors(&left.read_file("f").unwrap());
        assert_eq!(all.len(), 32, "seed {seed}: no length was changed");
        let untouched = |s: &Sector| *s == Sector::Old;
        assert!(all[..8].iter().all(untouched), "seed {seed}");
        assert!(all[24..].iter().all(untouched), "seed {seed}");
        let kinds: BTreeSet<Sector> = all[8..24].iter().copied().collect();
        kinds.into_iter().collect::<Vec<_>>()
    });
    use Sector::*;
    let kinds = [
        vec![Old],
        vec![New],
        vec![Old, New],
        vec![Garbage],
        vec![Old, New, Garbage],
    ];
    all_seen(&seen, kinds);
    file.sync().unwrap();
    assert_eq!(disk.unsynced(), 0);
    let seen = outcomes(&disk, |left, _| {
        sectors(&left.read_file("f").unwrap())[8..24].to_vec()
    });
    assert_eq!(seen, BTreeSet::from([vec![New; 16]]));
}

#[test]
fn an_unsynced_append_comes_back_short_zero_or_garbage() {
    let disk = disk_with("f", &[b'o'; 1000]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.write_at(&[b'n'; 3 * K4], 1000).unwrap();
    let seen = outcomes(&disk, |left, seed| {
        let bytes = left.read_file("f").unwrap();
        assert!((1000..=1000 + 3 * K4).contains(&bytes.len()), "seed {seed}");
        assert_eq!(sectors(&bytes[..512]), [Sector::Old], "seed {seed}");
        // What was written past the end that came back does not show when the file grows again.
        let again = left.root().open("f", Access::Write).unwrap();
        again.set_len(20_000).unwrap();
        let grown = contents(&again);
        assert!(grown[bytes.len()..].iter().all(|b| *b == 0), "seed {seed}");
        let length = match bytes.len() - 1000 {
            0 => "old",
            n if n == 3 * K4 => "new",
            _ => "between",
        };
        let added: BTreeSet<Sector> = sectors(&bytes[1000..]).into_iter().collect();
        (length, added.into_iter().collect::<Vec<_>>())
    });
    use Sector::*;
    let some = [
        ("old", vec![]),
        ("new", vec![New]),
        ("new", vec![Zero]),
        ("between", vec![New]),
        ("between", vec![Zero]),
    ];
    all_seen(&seen, some);
    assert!(seen.iter().any(|(_, s)| s.contains(&Garbage)));
    assert!(
        seen.iter()
            .any(|(_, s)| s.contains(&Zero) && s.contains(&New))
    );
}

#[test]
fn later_writes_are_done_without_earlier_ones_in_all_combinations() {
    let disk = disk_with("f", &[b'-'; 3 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    for i in 0..3 {
        file.write_at(&[b'a' + i; 512], u64::from(i) * K4 as u64)
            .unwrap();
    }
    let seen = outcomes(&disk, |left, _| {
        let bytes = left.read_file("f").unwrap();
        [bytes[0], bytes[K4], bytes[2 * K4]]
    });
    for done in 0..8 {
        let pick = |i: u8| if done >> i & 1 == 1 { b'a' + i } else { b'-' };
        all_seen(&seen, [[pick(0), pick(1), pick(2)]]);
    }
}

#[test]
fn garbage_may_be_let_fall_on_the_rest_of_the_page() {
    let disk = disk_with("f", &[b'o'; 3 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.write_at(&[b'n'; 512], K4 as u64 + 1024).unwrap();
    let look = |left: &SimDisk, seed: u64| {
        let all = sectors(&left.read_file("f").unwrap());
        let beside = all.iter().enumerate().filter(|(i, _)| *i != 10);
        let bad: Vec<usize> = beside
            .filter(|(_, s)| **s != Sector::Old)
            .map(|(i, _)| i)
            .collect();
        assert!(bad.iter().all(|i| (8..16).contains(i)), "seed {seed}");
        bad.is_empty()
    };
    assert_eq!(outcomes(&disk, look), BTreeSet::from([true]));
    disk.set_garbage_pages(true);
    assert_eq!(outcomes(&disk, look), BTreeSet::from([false, true]));
}

#[test]
fn several_writes_may_be_torn_at_once() {
    let disk = disk_with("f", &[b'o'; 2 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.write_at(&[b'n'; K4], 0).unwrap();
    file.write_at(&[b'n'; K4], K4 as u64).unwrap();
    let seen = outcomes(&disk, |left, _| {
        let bytes = left.read_file("f").unwrap();
        let torn = |part: &[u8]| part.contains(&b'o') && part.contains(&b'n');
        (torn(&bytes[..K4]), torn(&bytes[K4..]))
    });
    all_seen(&seen, [(false, true), (true, false), (true, true)]);
}

#[test]
fn overwrites_may_end_as_any_of_the_writes() {
    let disk = disk_with("f", &[b'0'; 512]);
    let file = disk.root().open("f", Access::Write).unwrap();
    for b in b"123" {
        file.write_at(&[*b; 512], 0).unwrap();
    }
    let seen = outcomes(&disk, |left, _| {
        let bytes = left.read_file("f").unwrap();
        bytes.iter().all(|b| *b == bytes[0]).then_some(bytes[0])
    });
    all_seen(&seen, [b'0', b'1', b'2', b'3'].map(Some));
}

#[test]
fn lengths_and_holes_are_changes_like_writes() {
    let disk = disk_with("f", &[b'o'; 4 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.set_len(K4 as u64).unwrap();
    file.set_len(2 * K4 as u64).unwrap();
    let seen = outcomes(&disk, |left, _| left.read_file("f").unwrap().len() / K4);
    assert_eq!(seen, BTreeSet::from([1, 2, 4]));

    let disk = disk_with("f", &[b'o'; 4 * K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    file.punch(0, 3 * K4 as u64).unwrap();
    let seen = outcomes(&disk, |left, seed| {
        let all = sectors(&left.read_file("f").unwrap());
        assert!(all[24..].iter().all(|s| *s == Sector::Old), "seed {seed}");
        let kinds: BTreeSet<Sector> = all[..24].iter().copied().collect();
        kinds.into_iter().collect::<Vec<_>>()
    });
    use Sector::*;
    let all = [vec![Old], vec![Zero], vec![Old, Zero]];
    assert_eq!(seen, BTreeSet::from(all));
}

#[test]
fn reserved_space_may_be_lost_even_after_a_sync() {
    let disk = disk_with("f", b"");
    let file = disk.root().open("f", Access::Write).unwrap();
    file.allocate(0, 1 << 16).unwrap();
    let blocks = |disk: &SimDisk| disk.used() / K4 as u64;
    assert_eq!(blocks(&disk), 16);
    let seen = outcomes(&disk, |left, _| blocks(left));
    all_seen(&seen, [0, 7, 16]);
    file.sync().unwrap();
    assert_eq!(blocks(&disk), 16);
    disk.root().sync_filesystem().unwrap();
    assert_eq!(file.len().unwrap(), 0);
}

#[test]
fn garbage_may_be_an_old_block_that_looks_good() {
    let disk = disk_with("f", &[b'o'; K4]);
    disk.write_file("old", &[b'!'; K4]).unwrap();
    disk.root().remove("old").unwrap();
    disk.root().sync().unwrap();
    let file = disk.root().open("f", Access::Write).unwrap();
    file.write_at(&[b'n'; K4], 0).unwrap();
    let seen = outcomes(&disk, |left, _| left.read_file("f").unwrap() == [b'!'; K4]);
    all_seen(&seen, [true]);
}

/// Random histories: whatever was synced and not touched since is intact.
#[test]
fn synced_data_never_changes() {
    struct Model {
        name: &'static str,
        file: Arc<dyn File>,
        durable: Vec<u8>,
        /// Sectors that a change after the last sync touched.
        touched: BTreeSet<u64>,
    }
    impl Model {
        fn touch(&mut self, at: u64, end: u64) {
            self.touched.extend(at / 512..end.div_ceil(512));
        }
        fn check(&self, left: &SimDisk, why: &str) {
            let found = left.read_file(self.name).unwrap();
            for (n, was) in self.durable.chunks(512).enumerate() {
                if !self.touched.contains(&(n as u64)) {
                    let is = found.get(n * 512..n * 512 + was.len());
                    assert_eq!(is, Some(was), "sector {n} of {}, {why}", self.name);
                }
            }
        }
    }
    for seed in 0..300u64 {
        let mut next = numbers(seed);
        let disk = SimDisk::new(seed);
        let root = disk.root();
        let mut models = ["a", "b"].map(|name| Model {
            name,
            file: root.open(name, Access::CreateNew).unwrap(),
            durable: Vec::new(),
            touched: BTreeSet::new(),
        });
        root.sync().unwrap();
        for step in 0..60 {
            let why = format!("seed {seed}, step {step}");
            let model = &mut models[next(2) as usize];
            let (at, len) = (next(40_000), next(9_000) + 1);
            match next(10) {
                0..5 => {
                    let bytes = vec![next(255) as u8 + 1; len as usize];
                    model.file.write_at(&bytes, at).unwrap();
                    model.touch(at, at + len);
                }
                5 => {
                    let old = model.file.len().unwrap();
                    model.file.set_len(at).unwrap();
                    model.touch(at.min(old), at.max(old));
                }
                6 => {
                    model.file.punch(at, len).unwrap();
                    model.touch(at, at + len);
                }
                7 => model.file.allocate(at, len).unwrap(),
                8 => {
                    model.file.sync().unwrap();
                    model.durable = contents(&model.file);
                    model.touched.clear();
                }
                _ => {
                    let left = disk.crash(next(1 << 40));
                    let none = disk.crash_with(Policy::AllDropped);
                    let all = disk.crash_with(Policy::AllDone);
                    for model in &models {
                        model.check(&left, &why);
                        assert_eq!(none.read_file(model.name).unwrap(), model.durable, "{why}");
                        let now = contents(&model.file);
                        assert_eq!(all.read_file(model.name).unwrap(), now, "{why}");
                    }
                }
            }
        }
    }
}

/// A stream of test numbers: each call gives one below its argument.
fn numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |n| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x % n
    }
}

// ---- names ----

fn put(dir: &Arc<dyn Dir>, name: &str, bytes: &[u8]) {
    let file = dir.open(name, Access::CreateNew).unwrap();
    file.write_at(bytes, 0).unwrap();
    file.sync().unwrap();
}

#[test]
fn a_rename_is_old_or_new_until_the_directory_is_synced() {
    let disk = disk_with("f", b"old");
    let root = disk.root();
    put(&root, "tmp", b"new");
    root.rename("tmp", "f").unwrap();
    let look = |left: &SimDisk, seed: u64| {
        let found = left.read_file("f").expect("never neither");
        let tmp = left.read_file("tmp").ok();
        assert!(
            tmp.is_none() || found == b"old",
            "seed {seed}: in two places"
        );
        (found, tmp)
    };
    let (old, new) = (b"old".to_vec(), b"new".to_vec());
    let ends = [
        (old.clone(), None),
        (old, Some(new.clone())),
        (new.clone(), None),
    ];
    assert_eq!(outcomes(&disk, look), BTreeSet::from(ends));
    root.sync().unwrap();
    assert_eq!(outcomes(&disk, look), BTreeSet::from([(new, None)]));
}

#[test]
fn names_become_durable_independently() {
    let disk = disk_with("gone", b"gone");
    disk.write_file("a", b"moved").unwrap();
    let root = disk.root();
    put(&root, "made", b"made");
    root.create_dir("d").unwrap();
    put(&root.subdir("d").unwrap(), "inner", b"inner");
    root.subdir("d").unwrap().sync().unwrap();
    root.remove("gone").unwrap();
    root.rename("a", "b").unwrap();
    let look = |left: &SimDisk, _: u64| {
        let names = left.file_names();
        let has = |name: &str| names.iter().any(|n| n == name);
        assert!(has("a") != has("b"));
        (has("gone"), has("made"), has("b"), has("d/inner"))
    };
    let seen = outcomes(&disk, look);
    assert_eq!(seen.len(), 16, "all combinations");
    root.sync().unwrap();
    let synced = BTreeSet::from([(false, true, true, true)]);
    assert_eq!(outcomes(&disk, look), synced);
}

#[test]
fn a_name_does_not_make_its_contents_durable() {
    let disk = disk_with("f", b"old");
    let root = disk.root();
    let tmp = root.open("tmp", Access::CreateNew).unwrap();
    tmp.write_at(&[b'n'; 2 * K4], 0).unwrap();
    root.rename("tmp", "f").unwrap();
    root.sync().unwrap();
    let seen = outcomes(&disk, |left, _| {
        let kinds: BTreeSet<Sector> = sectors(&left.read_file("f").unwrap()).into_iter().collect();
        kinds.into_iter().collect::<Vec<_>>()
    });
    use Sector::*;
    all_seen(
        &seen,
        [
            vec![],
            vec![New],
            vec![Zero],
            vec![New, Zero],
            vec![Garbage],
        ],
    );
}

#[test]
fn contents_do_not_make_the_name_durable() {
    let disk = SimDisk::new(3);
    put(&disk.root(), "f", b"synced");
    let seen = outcomes(&disk, |left, _| left.file_names().len());
    assert_eq!(seen, BTreeSet::from([0, 1]));
    disk.root().sync_filesystem().unwrap();
    assert_eq!(disk.unsynced(), 0);
    let seen = outcomes(&disk, |left, _| left.read_file("f").unwrap());
    assert_eq!(seen, BTreeSet::from([b"synced".to_vec()]));
}

#[test]
fn an_unsynced_removal_brings_the_file_back_whole() {
    let disk = disk_with("f", &[b'o'; K4]);
    let root = disk.root();
    root.remove("f").unwrap();
    assert_eq!(disk.used(), 0);
    let seen = outcomes(&disk, |left, seed| {
        let back = left.read_file("f").ok();
        assert!(back.iter().all(|b| *b == [b'o'; K4]), "seed {seed}");
        back.is_some()
    });
    assert_eq!(seen, BTreeSet::from([false, true]));
    root.create_dir("d").unwrap();
    root.remove_dir("d").unwrap();
    root.sync().unwrap();
    assert_eq!(
        outcomes(&disk, |left, _| left.file_names().len()),
        BTreeSet::from([0])
    );
}

/// A removal that a failed sync lost: the file is gone for all processes, and must still come back whole, though everything
/// is synced again meanwhile.
#[test]
fn a_lost_removal_brings_the_file_back_whole() {
    let mut back = 0;
    for seed in 0..100 {
        let disk = SimDisk::new(seed);
        disk.write_file("f", &[b'o'; K4]).unwrap();
        let root = disk.root();
        root.remove("f").unwrap();
        let verb = [Verb::SyncDir, Verb::SyncFilesystem][seed as usize % 2];
        disk.fail_nth(verb, 0, FaultKind::Eio);
        let failed = match verb {
            Verb::SyncDir => root.sync(),
            _ => root.sync_filesystem(),
        };
        assert_eq!(kind(failed), Kind::Io);
        for _ in 0..2 {
            if let Ok(bytes) = disk.crash(seed).read_file("f") {
                assert_eq!(bytes, [b'o'; K4], "seed {seed}");
                back += 1;
            }
            root.sync_filesystem().unwrap();
        }
    }
    assert!(back > 0);
}

#[test]
fn chains_of_renames_lose_no_file() {
    let disk = disk_with("a", b"x");
    let root = disk.root();
    for (from, to) in [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a"), ("a", "e")] {
        root.rename(from, to).unwrap();
    }
    let seen = outcomes(&disk, |left, _| {
        let names = left.file_names();
        assert_eq!(names.len(), 1, "{names:?}");
        names[0].clone()
    });
    all_seen(&seen, ["a", "b", "c", "d", "e"].map(String::from));
}

// ---- power, processes, faults ----

#[test]
fn a_cut_stops_everything_and_the_operation_in_flight_is_uncertain() {
    let make = || {
        let disk = disk_with("f", &[b'o'; K4]);
        (
            disk.clone(),
            disk.root(),
            disk.root().open("f", Access::Write).unwrap(),
        )
    };
    let (disk, root, file) = make();
    assert_eq!(disk.ops(), 0, "opening is no operation");
    file.write_at(&[b'x'; 512], 0).unwrap();
    file.read_at(&mut [0], 0).unwrap();
    assert_eq!(disk.ops(), 1);
    file.sync().unwrap();
    disk.cut_at(disk.ops());
    contents(&file);
    assert!(!disk.is_off());
    let e = file.write_at(&[b'n'; 512], 512).unwrap_err();
    assert!(
        e.kind() == Kind::Io && e.to_string().contains("the power is off"),
        "{e}"
    );
    assert!(disk.is_off());
    assert_eq!(kind(file.read_at(&mut [0], 0)), Kind::Io);
    assert_eq!(kind(file.write_at(&[0], 0)), Kind::Io);
    assert_eq!(kind(file.len()), Kind::Io);
    assert_eq!(kind(file.sync()), Kind::Io);
    assert_eq!(kind(file.lock(true)), Kind::Io);
    assert_eq!(kind(file.map(0, 1)), Kind::Io);
    assert_eq!(kind(root.list()), Kind::Io);
    assert_eq!(kind(root.entry("f")), Kind::Io);
    assert_eq!(kind(root.open("f", Access::Read)), Kind::Io);
    assert_eq!(kind(root.sync()), Kind::Io);
    let seen = outcomes(&disk, |left, seed| {
        let bytes = left.read_file("f").unwrap();
        assert_eq!(bytes[..512], [b'x'; 512], "seed {seed}");
        assert_eq!(bytes[1024..], [b'o'; K4 - 1024], "seed {seed}");
        sectors(&bytes[512..1024])[0]
    });
    all_seen(&seen, [Sector::Old, Sector::New, Sector::Garbage]);

    // A sync in flight has synced nothing for certain.
    let (disk, _, file) = make();
    file.write_at(&[b'n'; 512], 0).unwrap();
    disk.cut_at(1);
    assert_eq!(kind(file.sync()), Kind::Io);
    let seen = outcomes(&disk, |left, _| left.read_file("f").unwrap()[0]);
    all_seen(&seen, [b'o', b'n']);

    // Names likewise.
    let (disk, root, _) = make();
    disk.cut_at(0);
    assert_eq!(kind(root.rename_new("f", "g")), Kind::Io);
    let seen = outcomes(&disk, |left, _| left.file_names());
    assert_eq!(
        seen,
        BTreeSet::from([vec!["f".to_string()], vec!["g".to_string()]])
    );

    // A call that is refused changes nothing even in flight, and a cut in the past is a cut now.
    let (disk, root, _) = make();
    disk.cut_at(0);
    assert_eq!(kind(root.create_dir("f")), Kind::Exists);
    assert_eq!(kind(root.list()), Kind::Io);
    assert_eq!(disk.unsynced(), 0);
    let (disk, root, _) = make();
    root.sync().unwrap();
    disk.cut_at(0);
    assert_eq!(kind(root.list()), Kind::Io);
}

#[test]
fn a_killed_process_leaves_all_it_wrote_and_no_lock() {
    let disk = SimDisk::new(9);
    let root = disk.root();
    let file = root.open("f", Access::CreateNew).unwrap();
    file.lock(true).unwrap();
    file.write_at(b"seen", 0).unwrap();
    let gone = root.open("gone", Access::CreateNew).unwrap();
    gone.write_at(&[1; K4], 0).unwrap();
    root.remove("gone").unwrap();
    assert_eq!(disk.used(), 2 * K4 as u64);
    let left = disk.kill();
    assert_eq!(
        left.used(),
        K4 as u64,
        "nobody holds the removed file any more"
    );
    let again = left.root().open("f", Access::Write).unwrap();
    assert_eq!(contents(&again), b"seen");
    again.lock(true).unwrap();
    // It is as un-synced as before.
    let seen = outcomes(&left, |left, _| left.read_file("f").ok());
    all_seen(&seen, [None, Some(vec![]), Some(b"seen".to_vec())]);
    // The two are different disks from now on.
    again.write_at(b"more", 0).unwrap();
    assert_eq!(contents(&file), b"seen");
}

#[test]
fn a_kill_in_the_middle_of_a_write_leaves_a_part() {
    let seen: BTreeSet<usize> = (0..200)
        .map(|seed| {
            let disk = SimDisk::new(seed);
            let file = disk.root().open("f", Access::CreateNew).unwrap();
            disk.cut_at(1);
            file.write_at(&[1; 4 * K4], 0).unwrap_err();
            assert_eq!(disk.crash_with(Policy::AllDropped).file_names().len(), 0);
            let left = disk.kill();
            assert!(!left.is_off());
            left.read_file("f").unwrap().len() / K4
        })
        .collect();
    assert_eq!(seen, BTreeSet::from([0, 1, 2, 3, 4]));
}

#[test]
fn a_failed_sync_promises_nothing_and_the_next_one_lies() {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let disk = SimDisk::new(seed);
        disk.write_file("f", &[b'o'; 2 * K4]).unwrap();
        let file = disk.root().open("f", Access::Write).unwrap();
        file.write_at(&[b'n'; 512], 0).unwrap();
        disk.fail_nth(Verb::Sync, 0, FaultKind::Eio);
        assert_eq!(kind(file.sync()), Kind::Io);
        file.sync().unwrap();
        let now = contents(&file);
        let later = disk.crash_with(Policy::AllDone).read_file("f").unwrap();
        assert_eq!(now[512..], [b'o'; 2 * K4 - 512], "seed {seed}");
        assert_eq!(later[512..], [b'o'; 2 * K4 - 512], "seed {seed}");
        seen.insert((sectors(&now)[0], sectors(&later)[0]));
    }
    use Sector::*;
    let all = [(New, New), (Old, Old), (New, Old), (New, Garbage)];
    assert_eq!(seen, BTreeSet::from(all));
}

#[test]
fn failed_syncs_of_names_and_of_everything_promise_nothing() {
    let mut seen = BTreeSet::new();
    for (seed, verb) in (0..200).zip([Verb::SyncDir, Verb::SyncFilesystem].into_iter().cycle()) {
        let disk = SimDisk::new(seed);
        let root = disk.root();
        put(&root, "a", b"x");
        put(&root, "b", b"x");
        disk.fail_nth(verb, 0, FaultKind::Eio);
        let sync = || match verb {
            Verb::SyncDir => root.sync(),
            _ => root.sync_filesystem(),
        };
        assert_eq!(kind(sync()), Kind::Io);
        sync().unwrap();
        assert_eq!(names(&root), ["a", "b"]);
        let left = disk.crash_with(Policy::AllDone);
        seen.insert((verb == Verb::SyncDir, left.file_names().len()));
    }
    for dir_only in [true, false] {
        all_seen(&seen, [(dir_only, 0), (dir_only, 1), (dir_only, 2)]);
    }
}

#[test]
fn faults_hit_the_calls_they_were_put_on() {
    let disk = disk_with("f", &[b'o'; K4]);
    let root = disk.root();
    let file = root.open("f", Access::Write).unwrap();
    disk.fail_nth(Verb::Read, 2, FaultKind::Eio);
    let read = || file.read_at(&mut [0; 10], 0);
    read().unwrap();
    read().unwrap();
    assert_eq!(kind(read()), Kind::Io);
    read().unwrap();
    disk.fail_from(Verb::Punch, 1, FaultKind::Unsupported);
    file.punch(0, 1).unwrap();
    for _ in 0..3 {
        assert_eq!(kind(file.punch(0, K4 as u64)), Kind::Unsupported);
    }
    disk.clear_faults();
    file.punch(0, 1).unwrap();
    for (verb, call) in [
        (
            Verb::Create,
            &(|| root.open("x", Access::CreateNew).map(drop)) as &dyn Fn() -> _,
        ),
        (Verb::CreateDir, &|| root.create_dir("x")),
        (Verb::Open, &|| root.open("f", Access::Read).map(drop)),
        (Verb::Look, &|| root.list().map(drop)),
        (Verb::Rename, &|| root.rename("f", "x")),
        (Verb::Remove, &|| root.remove("f")),
        (Verb::SetLen, &|| file.set_len(0)),
        (Verb::Allocate, &|| file.allocate(0, 1)),
        (Verb::Map, &|| file.map(0, 1).map(drop)),
        (Verb::Lock, &|| file.lock(true)),
        (Verb::Stat, &|| file.len().map(drop)),
    ] {
        disk.fail_nth(verb, 0, FaultKind::Enospc);
        assert_eq!(kind(call()), Kind::NoSpace, "{verb:?}");
        assert_eq!(names(&root), ["f"]);
        assert_eq!(file.len().unwrap(), K4 as u64);
    }
}

#[test]
fn faults_on_any_calls_come_in_their_order() {
    let disk = disk_with("f", &[b'o'; K4]);
    let root = disk.root();
    let file = root.open("f", Access::Write).unwrap();
    // Calls of all kinds count, also those that change nothing; no space is missed only where some is needed.
    disk.fail_calls(disk.calls() + 1, 3, FaultKind::Enospc);
    file.len().unwrap();
    assert_eq!(kind(file.write_at(&[1; 10], 0)), Kind::NoSpace);
    assert_eq!(kind(file.read_at(&mut [0; 10], 0)), Kind::Io);
    // Somebody who looks from outside meets no fault, and changes nothing of what comes.
    disk.hold_faults(true);
    assert_eq!(names(&root), ["f"]);
    disk.hold_faults(false);
    assert_eq!(kind(root.list().map(drop)), Kind::Io);
    root.list().unwrap();
    let harm = disk.harm();
    assert_eq!((harm.of("ENOSPC"), harm.of("EIO"), harm.total()), (1, 2, 3));
    // The power stays on as long as somebody looks.
    disk.cut_at(disk.ops());
    disk.hold_faults(true);
    file.sync().unwrap();
    disk.hold_faults(false);
    file.sync().unwrap_err();
    assert!(disk.is_off());
    let left = disk.crash_with(Policy::AllDropped).harm();
    assert_eq!(
        left.of("power cuts"),
        1,
        "counted where its results are found"
    );
}

#[test]
fn others_come_in_between() {
    let disk = disk_with("f", &[b'o'; K4]);
    let file = disk.root().open("f", Access::Write).unwrap();
    let other = file.clone();
    disk.meanwhile(Verb::Sync, move || other.write_at(b"other", 8).unwrap());
    file.write_at(b"mine", 0).unwrap();
    assert_eq!(disk.unsynced(), 1, "not before the sync");
    file.sync().unwrap();
    assert!(!disk.take_meanwhile(), "it was called");
    assert_eq!(
        disk.unsynced(),
        0,
        "what was written before a sync is synced"
    );
    assert_eq!(&contents(&file)[..13], b"mineooooother");
    disk.meanwhile(Verb::Punch, || panic!("nobody punches"));
    file.sync().unwrap();
    assert!(disk.take_meanwhile(), "it waits, and is taken back");
}

#[test]
fn rot_is_durable_and_changes_no_length() {
    let disk = disk_with("f", &[b'o'; K4]);
    disk.overwrite("f", 4000, &[b'x'; 512]).unwrap();
    let left = disk.crash_with(Policy::AllDropped).read_file("f").unwrap();
    assert_eq!(left.len(), K4);
    assert_eq!(left.iter().filter(|b| **b == b'x').count(), 96);
    assert_eq!(disk.harm().of("rot"), 1);
}

#[test]
fn a_failed_write_may_be_done_in_part() {
    let seen: BTreeSet<u64> = (0..100)
        .map(|seed| {
            let disk = SimDisk::new(seed);
            let file = disk.root().open("f", Access::CreateNew).unwrap();
            disk.fail_nth(Verb::Write, 0, FaultKind::Eio);
            assert_eq!(kind(file.write_at(&[1; 3 * K4], 0)), Kind::Io);
            file.len().unwrap() / K4 as u64
        })
        .collect();
    assert_eq!(seen, BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn a_full_disk_refuses_and_is_usable_when_space_is_freed() {
    let disk = SimDisk::new(1);
    disk.set_capacity(Some(4 * K4 as u64));
    let root = disk.root();
    let file = root.open("f", Access::CreateNew).unwrap();
    file.write_at(&[1; 3 * K4], 0).unwrap();
    let e = file.write_at(&[2; 3 * K4], 2 * K4 as u64).unwrap_err();
    assert_eq!(e.kind(), Kind::NoSpace);
    assert_eq!(
        file.len().unwrap(),
        4 * K4 as u64,
        "what there was space for"
    );
    assert_eq!(kind(file.write_at(&[2], 1 << 40)), Kind::NoSpace);
    assert_eq!(kind(file.allocate(1 << 30, 1)), Kind::NoSpace);
    file.write_at(&[3; 4 * K4], 0).unwrap();
    file.punch(0, K4 as u64).unwrap();
    file.allocate(1 << 30, 1).unwrap();
    assert_eq!(disk.used(), 4 * K4 as u64);
    assert_eq!(kind(file.write_at(&[2], 0)), Kind::NoSpace);
    file.write_at(&[2], 1 << 30).unwrap();
    assert_eq!(disk.used(), 4 * K4 as u64, "that was reserved");
    let left = disk.crash_with(Policy::AllDone);
    assert_eq!(left.used(), disk.used());
    root.remove("f").unwrap();
    assert_eq!(disk.used(), 4 * K4 as u64, "it is open");
    drop(file);
    assert_eq!(disk.used(), 0);
    root.sync().unwrap();
}

#[test]
fn the_same_seed_is_the_same_disaster() {
    let history = |seed: u64| {
        let disk = SimDisk::new(seed);
        let root = disk.root();
        let mut next = numbers(5);
        disk.fail_nth(Verb::Sync, 3, FaultKind::Eio);
        let files = ["a", "b", "c"].map(|n| root.open(n, Access::CreateNew).unwrap());
        root.sync().unwrap();
        for _ in 0..100 {
            let file = &files[next(3) as usize];
            let _ = match next(8) {
                0 => file.sync(),
                1 => file.punch(next(30_000), 5000),
                _ => file.write_at(&vec![next(256) as u8; 5000], next(30_000)),
            };
        }
        root.rename("a", "d").unwrap();
        disk
    };
    let dump = |disk: &SimDisk| {
        let names = disk.file_names().into_iter();
        names
            .map(|name| (name.clone(), disk.read_file(&name).unwrap()))
            .collect::<Vec<_>>()
    };
    let (one, two) = (history(1), history(1));
    assert_eq!(dump(&one), dump(&two));
    let different: BTreeSet<_> = (0..50)
        .map(|seed| {
            let left = dump(&one.crash(seed));
            assert_eq!(left, dump(&one.crash(seed)), "asking changes nothing");
            assert_eq!(left, dump(&two.crash(seed)), "seed {seed}");
            left
        })
        .collect();
    assert!(different.len() > 25, "{}", different.len());
    let other = (2..12).any(|seed| dump(&history(seed)) != dump(&one));
    assert!(other, "the disk's own seed decides what a failed sync does");
}

#[test]
fn damage_is_durable_at_once() {
    let disk = disk_with("d/e/f", b"abc");
    let root = disk.root();
    let dir = root.subdir("d").unwrap().subdir("e").unwrap();
    let file = dir.open("f", Access::Read).unwrap();
    assert_eq!(disk.file_names(), ["d/e/f"]);
    disk.flip("d/e/f", 1, 0x20).unwrap();
    assert_eq!(contents(&file), b"aBc");
    let durable = disk.crash_with(Policy::AllDropped);
    assert_eq!(durable.read_file("d/e/f").unwrap(), b"aBc");
    assert_eq!(kind(disk.flip("d/e/f", 3, 1)), Kind::Corrupt);
    disk.truncate_file("d/e/f", 2).unwrap();
    assert_eq!(contents(&file), b"aB");
    disk.write_file("d/e/f", b"xyz").unwrap();
    assert_eq!(contents(&file), b"xyz");
    disk.remove_file("d/e/f").unwrap();
    assert_eq!(contents(&file), b"xyz");
    assert_eq!(disk.file_names(), [""; 0]);
    assert_eq!(disk.crash(1).file_names(), [""; 0]);
    assert_eq!(kind(disk.read_file("d/e/f")), Kind::NotFound);
    assert_eq!(kind(disk.remove_file("d/e")), Kind::NotFound);
    assert_eq!(kind(disk.flip("d", 0, 1)), Kind::NotFound);
    assert_eq!(disk.unsynced(), 0);
    drop(file);
    assert_eq!(disk.used(), 0);
}

#[test]
fn sparse_files_cost_what_was_written() {
    let disk = SimDisk::new(1);
    let file = disk.root().open("f", Access::CreateNew).unwrap();
    for i in 0..8u64 {
        file.write_at(&[1], i << 50).unwrap();
    }
    file.set_len(i64::MAX as u64).unwrap();
    assert_eq!(disk.used(), 8 * K4 as u64);
    let ranges = file
        .data_ranges(1 << 49, i64::MAX as u64 - (1 << 49))
        .unwrap();
    assert_eq!(ranges.len(), 7);
    for seed in 0..50 {
        disk.crash(seed);
    }
    file.sync().unwrap();
    file.punch(0, i64::MAX as u64).unwrap();
    assert_eq!(disk.used(), 0);
    file.set_len(0).unwrap();
    file.sync().unwrap();
}

/// Random histories of names, with faults, kills and cuts: the books balance, and a name that was synced and not touched
/// since means what it meant.
#[test]
fn histories_of_names_keep_the_books() {
    fn tree(dir: &Arc<dyn Dir>, at: &str, found: &mut BTreeMap<String, Vec<u8>>) -> u64 {
        let mut used = 0;
        for (name, kind) in dir.list().unwrap() {
            let path = format!("{at}/{name}");
            if kind == EntryKind::Dir {
                used += tree(&dir.subdir(&name).unwrap(), &path, found);
            } else {
                let file = dir.open(&name, Access::Read).unwrap();
                used += file.allocated().unwrap();
                found.insert(path, contents(&file));
            }
        }
        used
    }
    for seed in 0..400 {
        let mut next = numbers(seed);
        let mut disk = SimDisk::new(seed);
        let mut open: Vec<Arc<dyn File>> = Vec::new();
        for step in 0..80 {
            let why = format!("seed {seed}, step {step}");
            let root = disk.root();
            let dir = match next(2) {
                0 => root.subdir("d").unwrap_or(root.clone()),
                _ => root.clone(),
            };
            let (a, b) = (["x", "y", "z", "d"], ["x", "y", "d", "w"]);
            let (a, b) = (a[next(4) as usize], b[next(4) as usize]);
            // What the calls answer is tested elsewhere.
            let _ = match next(14) {
                0..3 => dir.open(a, Access::CreateNew).and_then(|file| {
                    file.write_at(&vec![next(255) as u8 + 1; next(20_000) as usize], 0)?;
                    open.push(file.clone());
                    file.sync()
                }),
                3 => dir.create_dir(a),
                4 | 5 => dir.rename(a, b),
                6 => dir.rename_new(a, b),
                7 => dir.remove(a),
                8 => dir.remove_dir(a),
                9 => dir.sync(),
                10 => {
                    open.truncate(next(3) as usize);
                    dir.sync_filesystem()
                }
                11 => {
                    let verbs = [
                        Verb::Sync,
                        Verb::SyncDir,
                        Verb::SyncFilesystem,
                        Verb::Rename,
                    ];
                    disk.fail_nth(verbs[next(4) as usize], next(3), FaultKind::Eio);
                    Ok(())
                }
                12 => dir.open(a, Access::Write).and_then(|file| {
                    open.push(file.clone());
                    file.punch(next(9000), next(9000))?;
                    file.set_len(next(20_000))
                }),
                _ => {
                    if next(2) == 0 {
                        disk.cut_at(disk.ops());
                        let _ = dir.rename(a, b);
                    }
                    let left = match next(3) {
                        0 => disk.crash(next(1 << 40)),
                        _ => disk.kill(),
                    };
                    open.clear();
                    disk = left;
                    Ok(())
                }
            };
            let held = open.len();
            let mut found = BTreeMap::new();
            let used = tree(&disk.root(), "", &mut found);
            assert!(held > 0 || used == disk.used(), "{why}");
            assert!(used <= disk.used(), "{why}");
            let left = disk.crash(next(1 << 40));
            let used = tree(&left.root(), "", &mut BTreeMap::new());
            assert_eq!(used, left.used(), "{why}");
        }
        // In the end all is synced, and nothing can happen to it any more.
        disk.clear_faults();
        open.clear();
        let disk = disk.kill();
        let again = disk.crash_with(Policy::AllDone);
        again.root().sync_filesystem().unwrap();
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        tree(&again.root(), "", &mut before);
        tree(&again.crash(seed).root(), "", &mut after);
        assert_eq!(before, after, "seed {seed}");
    }
}

/// Without faults: after any history, what a whole sync covered is there after any power cut.
#[test]
fn a_synced_tree_survives_until_it_is_touched() {
    for seed in 0..300 {
        let mut next = numbers(seed);
        let disk = SimDisk::new(seed);
        let root = disk.root();
        let all = ["a", "b", "c", "e"];
        let mut synced = BTreeMap::<&str, Option<Vec<u8>>>::new();
        for step in 0..60 {
            let (a, b) = (all[next(4) as usize], all[next(4) as usize]);
            match next(6) {
                0 | 1 => {
                    if let Ok(file) = root.open(a, Access::CreateNew) {
                        file.write_at(&[next(200) as u8; 700], 0).unwrap();
                        file.sync().unwrap();
                        synced.remove(a);
                    }
                }
                2 | 3 => {
                    if root.rename(a, b).is_ok() && a != b {
                        synced.remove(a);
                        synced.remove(b);
                    }
                }
                4 => {
                    if root.remove(a).is_ok() {
                        synced.remove(a);
                    }
                }
                _ => {
                    root.sync().unwrap();
                    for name in all {
                        synced.insert(name, disk.read_file(name).ok());
                    }
                }
            }
            let left = disk.crash(next(1 << 40));
            for (name, was) in &synced {
                assert_eq!(
                    left.read_file(name).ok(),
                    *was,
                    "seed {seed}, step {step}, {name}"
                );
            }
        }
    }
}
