//! REFER and EXCL against plain models: a truth for each block, and what a removal says that it frees.

use super::*;
use forkdisk::error::Kind;
use forkdisk::store::ObjectKind;
use forkdisk::units::REGION_BLOCKS;
use std::collections::BTreeMap;

/// Does a block show data?
type Truth = Vec<bool>;

/// Deterministic random numbers (splitmix64).
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

fn base_truth(store: &Store, blocks: usize) -> Truth {
    let base = store
        .base(store.resolve("base").expect("base").id)
        .expect("opened");
    let mut truth = vec![false; blocks];
    for (at, len) in base.file().data_ranges(0, base.len()).expect("ranges") {
        for block in at / BLOCK..(at + len).div_ceil(BLOCK) {
            truth[block as usize] = true;
        }
    }
    truth
}

fn compare(store: &Store, truths: &BTreeMap<String, Truth>, story: &str) {
    let objects = store.list().expect("listed");
    let space = store.space(objects).expect("known");
    assert!(space.objects.damaged.is_empty());
    assert_eq!(space.objects.sound.len(), truths.len());
    let layers = store.layers().expect("layers").sound;
    for (object, usage) in &space.objects.sound {
        let shown = truths[&object.name].iter().filter(|shown| **shown).count() as u64;
        assert_eq!(usage.refer, shown * BLOCK, "{story}: {}", object.name);
        // Alone it is the same as among others.
        let alone = store.usage(object).expect("known");
        assert_eq!(*usage, alone, "{story}: {}", object.name);
        let details = store.details(object).expect("known");
        assert_eq!(details.depth, usage.depth);
        assert_eq!(details.private_bytes, usage.private, "{}", object.name);
        match store.plan_removal(std::slice::from_ref(&object.name), false) {
            Ok(plan) if plan.names.len() == 1 => {
                // The layer of a snapshot that others stand on stays, and gives back what these hide.
                let hidden = plan.frees.checked_sub(usage.exclusive);
                let may = object.kind == ObjectKind::Snapshot && usage.exclusive == 0;
                assert!(
                    hidden.is_some_and(|hidden| hidden == 0 || may),
                    "{story}: {} frees {}, not {}",
                    object.name,
                    plan.frees,
                    usage.exclusive
                );
            }
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), Kind::Busy, "{e}"),
        }
    }
    let base = store.base_info(store.resolve("base").expect("base").id);
    let all = layers.iter().map(|l| l.allocated).sum::<u64>();
    assert_eq!(
        space.stored,
        all + base.expect("base").allocated,
        "{story}: each layer is needed, and counted once"
    );
}

#[test]
fn refer_and_excl_are_those_of_a_plain_model() {
    const BLOCKS: usize = 1064;
    for seed in 0..6 {
        let store = store();
        let mut rng = Rng(seed);
        let mut truths = BTreeMap::from([("base".to_string(), base_truth(&store, BLOCKS))]);
        let mut disks: Vec<String> = Vec::new();
        for step in 0..40 {
            let story = format!("seed {seed}, step {step}");
            match rng.below(if disks.is_empty() { 1 } else { 4 }) {
                0 => {
                    let names: Vec<&String> = truths.keys().collect();
                    let from = names[rng.below(names.len() as u64) as usize].clone();
                    let name = format!("d{step}");
                    fork(&store, &name, &from);
                    truths.insert(name.clone(), truths[&from].clone());
                    disks.push(name);
                }
                1 => {
                    let disk = &disks[rng.below(disks.len() as u64) as usize];
                    let snap = format!("s{step}");
                    store.snapshot(disk, &snap, None).expect("snapshot");
                    let truth = truths[disk].clone();
                    truths.insert(format!("{disk}@{snap}"), truth);
                }
                _ => {
                    let disk = disks[rng.below(disks.len() as u64) as usize].clone();
                    let truth = truths.get_mut(&disk).expect("known");
                    change(&store, &disk, |open| {
                        for _ in 0..3 {
                            let at = rng.below(BLOCKS as u64);
                            let most = BLOCKS as u64 - at;
                            // Single blocks, and also whole regions.
                            let longest = 1 << rng.below(11);
                            let len = 1 + rng.below(most.min(longest));
                            let range = at as usize..(at + len) as usize;
                            let (from, bytes) = (at * BLOCK, len * BLOCK);
                            match rng.below(3) {
                                0 => {
                                    open.discard(from, bytes).expect("discard");
                                    truth[range].fill(false);
                                }
                                1 => {
                                    let zeros = vec![0; bytes as usize];
                                    open.write(&zeros, from).expect("write");
                                    truth[range].fill(false);
                                }
                                _ => {
                                    let data = vec![3; bytes as usize];
                                    open.write(&data, from).expect("write");
                                    truth[range].fill(true);
                                }
                            }
                        }
                    });
                }
            }
            if step % 10 == 9 {
                compare(&store, &truths, &story);
            }
        }
    }
}

/// What is counted in several goes, because the disk is so large, is counted once.
#[test]
fn refer_of_a_large_disk() {
    const REGION: u64 = REGION_BLOCKS as u64 * BLOCK;
    // What is counted in one go ends here, and again at twice that.
    let edge = (1 << 18) * REGION;
    let store = store();
    let name = ["d".to_string()];
    store
        .create(&name, "base", Some(3 * edge))
        .expect("created");
    change(&store, "d", |disk| {
        for at in [edge - BLOCK, edge, 2 * edge + 15 * REGION, 3 * edge - BLOCK] {
            disk.write(&[1; 4096], at).expect("write");
        }
        // Over the edge, in one range.
        disk.discard(2 * edge - 20 * REGION, 30 * REGION)
            .expect("discard");
    });
    assert_eq!(refer(&store, "d"), 64 + 4);
    store.snapshot("d", "s", None).expect("snapshot");
    change(&store, "d", |disk| {
        disk.discard(edge - 10 * REGION, 20 * REGION)
            .expect("discard");
        disk.write(&[2; 4096], edge + BLOCK).expect("write");
        disk.write(&[2; 4096], 2 * edge).expect("write");
        disk.discard(0, 32 * BLOCK).expect("discard");
    });
    fork(&store, "e", "d");
    assert_eq!(refer(&store, "d@s"), 64 + 4);
    assert_eq!(refer(&store, "d"), 32 + 2 + 2);
    assert_eq!(refer(&store, "e"), 32 + 2 + 2);
}

#[test]
fn what_has_no_name_is_found_by_its_id() {
    let store = store();
    fork(&store, "d", "base");
    change(&store, "d", |disk| {
        disk.write(&[1; 4096], 0).expect("write")
    });
    // A fork of a changed disk leaves a layer between that nobody named.
    fork(&store, "e", "d");
    let layers = store.layers().expect("layers").sound;
    let unnamed = layers.iter().find(|l| l.names.is_empty());
    let id = unnamed.expect("a layer without a name").id;
    let text = id.to_string();
    let found = store.resolve_any(&text).expect("found");
    assert_eq!((found.id, found.word()), (id, "layer"));
    assert_eq!(found.name, text);
    assert_eq!(store.usage(&found).expect("known").refer, 64 * BLOCK);
    let disk = store.open_disk(&found, false).expect("opened");
    let mut block = [0; 4096];
    disk.read(&mut block, 0).expect("read");
    assert_eq!(block, [1; 4096]);
    // Nothing that changes finds it; a name comes first.
    let missing = store.resolve(&text).expect_err("no name");
    assert_eq!(missing.kind(), Kind::NotFound);
    assert_eq!(store.resolve_any("d").expect("a name").name, "d");
    // The ids of this store begin alike.
    let many = store.resolve_any(&text[..8]).expect_err("several");
    assert_eq!(many.kind(), Kind::Invalid);
    for nothing in ["ffffffff", &text[..3], "no such"] {
        store.resolve_any(nothing).expect_err("nothing");
    }
}
