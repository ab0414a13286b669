//! What layers and bases say of the data they show: always what a plain model says, and what `check` and `check --repair` make of it.

use super::*;
use forkdisk::check::{check, repair};
use forkdisk::format::Superblock;
use forkdisk::io::{Access, File};
use forkdisk::layer::{read_header, recover};
use forkdisk::store::Object;
use std::collections::BTreeMap;

const BLOCKS: usize = 1064;
/// The largest a disk becomes here.
const MOST: usize = 2600;

/// Deterministic random numbers (splitmix64).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
    fn of<'a>(&mut self, names: &'a [String]) -> &'a str {
        &names[self.below(names.len())]
    }
}

/// For each object a truth for each block; its length is the object's.
type Truths = BTreeMap<String, Vec<bool>>;

fn write(disk: &dyn Disk, truth: &mut [bool], rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(truth.len());
        let longest = 1 << rng.below(12);
        let len = 1 + rng.below(longest.min(truth.len() - at));
        let (from, bytes) = (at as u64 * BLOCK, len as u64 * BLOCK);
        let data = match rng.below(4) {
            0 => {
                disk.discard(from, bytes).expect("discard");
                false
            }
            1 => {
                disk.write(&vec![0; bytes as usize], from).expect("write");
                false
            }
            2 => {
                // A part of a block.
                disk.write(&[9], from).expect("write");
                truth[at] = true;
                continue;
            }
            _ => {
                disk.write(&vec![3; bytes as usize], from).expect("write");
                true
            }
        };
        truth[at..at + len].fill(data);
        if rng.below(3) == 0 {
            disk.flush().expect("flush");
        }
    }
}

fn compare(store: &Store, truths: &Truths, story: &str) {
    for object in store.list().expect("listed") {
        let shown = truths[&object.name].iter().filter(|seen| **seen).count() as u64;
        let found = store.usage(&object).expect("known").refer;
        assert_eq!(found, shown * BLOCK, "{story}: {}", object.name);
    }
}

/// Whatever changes a view, in random order: in the end, and in between, what is kept is what the model shows.
#[test]
fn what_is_kept_is_what_a_plain_model_shows() {
    for seed in 0..12 {
        let sim = SimDisk::new(seed);
        let store = store_on(&sim);
        let mut rng = Rng(seed);
        let mut image = vec![true; 64];
        image.resize(BLOCKS, false);
        let mut truths = Truths::from([("base".to_string(), image)]);
        let mut disks: Vec<String> = Vec::new();
        for step in 0..40 {
            let all: Vec<String> = truths.keys().cloned().collect();
            let kind = if disks.is_empty() { 0 } else { rng.below(14) };
            let story = format!("seed {seed}, step {step}, {kind}");
            match kind {
                0 => {
                    let (from, name) = (rng.of(&all), format!("d{step}"));
                    fork(&store, &name, from);
                    truths.insert(name.clone(), truths[from].clone());
                    disks.push(name);
                }
                1 => {
                    let (disk, snap) = (rng.of(&disks), format!("s{step}"));
                    store.snapshot(disk, &snap, None).expect("snapshot");
                    truths.insert(format!("{disk}@{snap}"), truths[disk].clone());
                }
                2 => {
                    let mut snaps = all.iter().filter_map(|name| name.split_once('@'));
                    if let Some((disk, snap)) = snaps.next_back() {
                        store.rollback(disk, snap).expect("rollback");
                        truths.insert(disk.to_string(), truths[&format!("{disk}@{snap}")].clone());
                    }
                }
                3 => {
                    let disk = rng.of(&disks);
                    let size = 64 + rng.below(MOST - 64);
                    store.resize(disk, size as u64 * BLOCK).expect("resize");
                    truths.get_mut(disk).expect("known").resize(size, false);
                }
                4 | 5 => {
                    let plan = store.plan_squash(rng.of(&disks), kind == 5).expect("plan");
                    let done = store.squash(plan, &Quiet).expect("squash");
                    store.collect_former(&done.former).expect("collect");
                }
                6 => {
                    let done = store.flatten(rng.of(&disks), &Quiet).expect("flatten");
                    store.collect_former(&done.former).expect("collect");
                }
                7 => {
                    let snaps: Vec<&String> =
                        all.iter().filter(|name| name.contains('@')).collect();
                    if let Some(name) = snaps.first() {
                        let name = [name.to_string()];
                        let plan = store.plan_removal(&name, false).expect("plan");
                        store.remove(&plan).expect("remove");
                        truths.remove(&name[0]);
                    }
                    store.gc(false).expect("gc");
                }
                8 | 9 => {
                    // In use, flushed, looked at, and then left without a close.
                    let disk = rng.of(&disks).to_string();
                    let open = store.open_cow(&store.resolve(&disk).expect("there"), true);
                    let open = open.expect("opened");
                    write(&*open, truths.get_mut(&disk).expect("known"), &mut rng);
                    open.flush().expect("flush");
                    compare(&store, &truths, &story);
                    if kind == 9 {
                        let snap = format!("s{step}");
                        store
                            .snapshot_running(&open, &disk, &snap, None)
                            .expect("snapshot");
                        truths.insert(format!("{disk}@{snap}"), truths[&disk].clone());
                        write(&*open, truths.get_mut(&disk).expect("known"), &mut rng);
                        open.flush().expect("flush");
                    }
                }
                _ => {
                    let disk = rng.of(&disks).to_string();
                    let truth = truths.get_mut(&disk).expect("known");
                    change(&store, &disk, |open| write(open, truth, &mut rng));
                }
            }
            if step % 8 == 7 {
                compare(&store, &truths, &story);
            }
        }
        for disk in &disks {
            change(&store, disk, |_| {});
        }
        let story = format!("seed {seed}, at its end");
        compare(&store, &truths, &story);
        audit::layers(&sim, &story);
        let report = check(&store, None, &Quiet).expect("a check");
        assert!(
            report.corruptions.is_empty(),
            "{story}: {:?}",
            report.corruptions
        );
        assert_eq!(repairs(&store), 0, "{story}: all is counted");
    }
}

/// Each snapshot gets a base of its own, the oldest first: what was counted over the bases before is true over the last.
#[test]
fn what_is_flattened_again_and_again_stays_counted() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.discard(0, 10 * BLOCK).expect("discard")
    });
    let shown = refer(&store, "d");
    for i in 0..5 {
        store
            .snapshot("d", &format!("s{i}"), None)
            .expect("snapshot");
    }
    for i in 0..5 {
        let done = store.flatten(&format!("d@s{i}"), &Quiet).expect("flatten");
        store.collect_former(&done.former).expect("collect");
        // This one is counted over the newest base, what was there before over older ones.
        store
            .snapshot("d", &format!("t{i}"), None)
            .expect("snapshot");
        assert_eq!(repairs(&store), 0, "all is counted after s{i}");
        assert_eq!(refer(&store, "d"), shown);
    }
}

/// Between finding objects and looking at them one was rolled back, and another was removed: neither is damage.
#[test]
fn what_changed_since_it_was_found_is_no_damage() {
    let store = store();
    for name in ["d", "e"] {
        fork(&store, name, "base");
        change(&store, name, |disk| {
            disk.discard(0, 10 * BLOCK).expect("discard")
        });
    }
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(0, 20 * BLOCK).expect("discard")
    });
    let found = store.list().expect("a list");
    let before = store.resolve("d").expect("there");
    store.rollback("d", "s").expect("rollback");
    let plan = store.plan_removal(&["e".to_string()], false).expect("plan");
    store.remove(&plan).expect("removed");
    let looked = store.usages(found).expect("usages");
    assert!(looked.damaged.is_empty(), "{:?}", looked.damaged);
    let names: Vec<&str> = looked.sound.iter().map(|(o, _)| o.name.as_str()).collect();
    assert_eq!(names, ["base", "d", "d@s"]);
    assert_eq!(looked.sound[1].1.refer, looked.sound[2].1.refer);
    // Who asks for one by its name gets what it is now.
    let mut seen = Vec::new();
    let details = store.with_object("d", |object| {
        // The first look is at what it was.
        let object = if seen.is_empty() { &before } else { object };
        seen.push(object.id);
        store.details(object)
    });
    assert!(
        details.is_err() && seen == [before.id],
        "it did not change meanwhile"
    );
    let mut rolled = false;
    let details = store.with_object("d", |object| {
        if !std::mem::replace(&mut rolled, true) {
            store.rollback("d", "s").expect("rollback");
        }
        store.details(object)
    });
    assert_eq!(details.expect("details").depth, 2);
}

/// Mends what can be mended; says how many steps that took.
fn repairs(store: &Store) -> usize {
    let steps = repair::plan(store, &Quiet).expect("a plan");
    let done = forkdisk::check::repair(store, &steps, &Quiet).expect("mended");
    assert_eq!(done, steps);
    done.len()
}

/// Writes the superblock of an object's layer anew, after `change`.
fn forge(store: &Store, name: &str, change: impl FnOnce(&mut Superblock)) {
    let object: Object = store.resolve(name).expect("there");
    let path = format!("{}.layer", object.id);
    let file: Arc<dyn File> = store.layers_dir().open(&path, Access::Write).expect("open");
    let header = read_header(&*file).expect("a header");
    let mut superblock = recover::superblock(&*file, &header)
        .expect("one")
        .superblock;
    change(&mut superblock);
    for copy in [1, 2] {
        file.write_at(superblock.encode(), copy * BLOCK)
            .expect("written");
    }
}

fn findings(store: &Store) -> Vec<String> {
    let report = check(store, None, &Quiet).expect("a check");
    report
        .corruptions
        .into_iter()
        .map(|f| format!("{}: {}", f.what, f.message))
        .collect()
}

#[test]
fn a_wrong_count_is_found_and_corrected() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[1; 8192], 70 * BLOCK).expect("write")
    });
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(0, 10 * BLOCK).expect("discard")
    });
    assert_eq!((refer(&store, "d"), refer(&store, "d@s")), (56, 66));
    assert!(findings(&store).is_empty());
    for (name, right) in [("d", 56), ("d@s", 66)] {
        forge(&store, name, |s| {
            let (refer, over) = s.refer().expect("it is counted");
            s.set_refer(Some((refer + 1, over)));
        });
        assert_eq!(refer(&store, name), right + 1, "what is kept is believed");
        let found = findings(&store);
        let message = format!(
            "{name}: it says that it shows {} blocks of data, and shows {right}",
            right + 1
        );
        assert!(
            found.len() == 1 && found[0].starts_with(&message),
            "{found:?}"
        );
        assert_eq!(repairs(&store), 1);
        assert_eq!(refer(&store, name), right);
        assert!(findings(&store).is_empty());
    }
}

#[test]
fn what_a_program_that_does_not_count_leaves_is_counted() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[1; 8192], 70 * BLOCK).expect("write")
    });
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(0, 10 * BLOCK).expect("discard")
    });
    let forget = |name| {
        // It copies what it does not know, and raises the sequence.
        forge(&store, name, |s| {
            s.sequence += 1;
            assert_eq!(s.refer(), None);
        });
    };
    forget("d");
    assert_eq!((refer(&store, "d"), refer(&store, "d@s")), (56, 66));
    assert!(findings(&store).is_empty(), "not to know is no damage");
    // Who opens it for writing counts all of it.
    change(&store, "d", |_| {});
    assert_eq!(repairs(&store), 0);
    // What it stands on is not known either: then it cannot.
    forget("d");
    forget("d@s");
    change(&store, "d", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    assert_eq!((refer(&store, "d"), refer(&store, "d@s")), (57, 66));
    assert_eq!(repairs(&store), 2);
    assert_eq!((refer(&store, "d"), refer(&store, "d@s")), (57, 66));
    assert!(findings(&store).is_empty());
}

/// An image that was put back from a backup may have other holes; and a flattening makes holes of zeros.
#[test]
fn a_base_with_other_holes_is_counted_anew() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[1; 8192], 70 * BLOCK).expect("write")
    });
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(0, 10 * BLOCK).expect("discard")
    });
    let id = store.resolve("base").expect("there").id;
    let dir = store
        .bases_dir()
        .subdir(&id.to_string())
        .expect("its folder");
    let image = dir.open("image", Access::Write).expect("the image");
    image
        .write_at(&[0; 4096], 500 * BLOCK)
        .expect("zeros, where there was a hole");
    drop(image);
    assert!(findings(&store).is_empty(), "other holes are no damage");
    assert_eq!(repairs(&store), 3);
    assert!(findings(&store).is_empty());
    let counts = |store: &Store| ["base", "d@s", "d"].map(|name| refer(store, name));
    assert_eq!(counts(&store), [65, 67, 57]);
    // The snapshot goes over a base without that block; what stands on it was counted over the old one, and is counted again.
    store.flatten("d@s", &Quiet).expect("flatten");
    assert_eq!(counts(&store), [65, 66, 56]);
    assert!(findings(&store).is_empty());
    change(&store, "d", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    assert_eq!(counts(&store), [65, 66, 57]);
    assert_eq!(repairs(&store), 0);
    // Where nothing becomes a hole, what was counted stays true: of the snapshot above it, too.
    store.snapshot("d", "t", None).expect("snapshot");
    fork(&store, "e", "d@t");
    change(&store, "e", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    store.flatten("d@t", &Quiet).expect("flatten");
    assert_eq!(repairs(&store), 0);
    assert_eq!(counts(&store), [65, 66, 57]);
    assert_eq!(refer(&store, "e"), 57);
}
