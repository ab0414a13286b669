//! The accounts of layer files at rest: every slot below the high-water mark is data, run, free list, free or forgotten, and only one of
//! these; what the superblock counts is what the runs say.

use forkdisk::format::{FreeExtent, Header, Pointer, Superblock};
use forkdisk::io::sim::SimDisk;
use forkdisk::io::{Access, Dir};
use forkdisk::layer::history::segments;
use forkdisk::layer::{MappedRun, ReadLayer, State};
use forkdisk::map::Item;
use forkdisk::units::{Id, Region};
use std::sync::Arc;
use zerocopy::FromBytes;

const SLOT: usize = 4096;

/// Audits all layer files that are not open.
pub fn layers(sim: &SimDisk, story: &str) {
    let dir: Arc<dyn Dir> = sim.root().subdir("layers").expect("layers");
    for (name, _) in dir.list().expect("list") {
        let file = dir.open(&name, Access::Read).expect("a layer file");
        let layer = ReadLayer::open(file).unwrap_or_else(|e| panic!("{story}: {name}: {e:?}"));
        let story = format!("{story}: {name}");
        if layer.state() != State::Writable {
            audit(&layer, &story);
        }
        seen(sim, &layer, &story);
    }
}

/// What is seen through a layer is as much data as its superblock says: a truth for each block, from the base upwards.
fn seen(sim: &SimDisk, top: &ReadLayer, story: &str) {
    let mut truth = vec![false; 1 << 16];
    let below = top.header();
    let base = show(
        sim,
        Id(below.parent),
        below.parent_kind.get() == 1,
        &mut truth,
    );
    let counts = |over: Id| over == base || counts_as(sim, base, over);
    let kept = top.superblock().refer().filter(|(_, over)| counts(*over));
    // Of what only layers above it show nobody asks, and blocks that all of these hide may be gone.
    let asked = top.state() == State::Clean || top.superblock().name().is_some();
    // What is its header alone shows what it stands on.
    let asked = asked && top.superblock().sequence.get() > 0;
    // Where calls fail, what lies below may not have been to be looked at: then it is not known from there on.
    let failing = story.contains("failing_calls");
    assert!(
        kept.is_some() || !asked || failing,
        "{story}: nobody counted"
    );
    let Some((kept, _)) = kept else { return };
    lay(top.runs(), &mut truth);
    let count = truth.iter().filter(|seen| **seen).count() as u64;
    assert_eq!(kept, count, "{story}: data blocks seen through it");
}

/// Does a base say that what was counted over another one is true over it, too?
fn counts_as(sim: &SimDisk, base: Id, other: Id) -> bool {
    let dir = sim.root().subdir("bases").expect("bases");
    let dir = dir.subdir(&base.to_string()).expect("a base");
    let file = dir.open("meta", Access::Read).expect("its record");
    let mut text = vec![0; file.len().expect("its length") as usize];
    file.read_at(&mut text, 0).expect("read");
    let text = String::from_utf8(text).expect("text");
    let line = text.lines().find(|line| line.starts_with("counts_as"));
    line.is_some_and(|line| line.contains(&other.to_string()))
}

fn show(sim: &SimDisk, id: Id, is_layer: bool, truth: &mut [bool]) -> Id {
    if !is_layer {
        let base = sim.root().subdir("bases").expect("bases");
        let base = base.subdir(&id.to_string()).expect("a base");
        let image = base.open("image", Access::Read).expect("an image");
        let len = image.len().expect("its length");
        for (at, len) in image.data_ranges(0, len).expect("ranges") {
            truth[at as usize / SLOT..(at + len).div_ceil(4096) as usize].fill(true);
        }
        return id;
    }
    let dir = sim.root().subdir("layers").expect("layers");
    let file = dir.open(&format!("{id}.layer"), Access::Read);
    let layer = ReadLayer::open(file.expect("a layer below")).expect("a layer below");
    let below = layer.header();
    let base = show(sim, Id(below.parent), below.parent_kind.get() == 1, truth);
    lay(layer.runs(), truth);
    base
}

/// What the runs say, the newest last.
fn lay(runs: &[Arc<MappedRun>], truth: &mut [bool]) {
    for run in runs.iter().rev() {
        for item in run.items(Region(0)) {
            let item = item.expect("a block map");
            for region in item.start()..item.end().min(128) {
                for index in 0..512 {
                    let pointer = match &item {
                        Item::Zeros(..) => Pointer::Zero,
                        Item::Region(_, map) => map.get(index),
                    };
                    if pointer != Pointer::Absent {
                        truth[region as usize * 512 + index] =
                            matches!(pointer, Pointer::Data { .. });
                    }
                }
            }
        }
    }
}

fn audit(layer: &ReadLayer, story: &str) {
    let superblock = layer.superblock();
    let high = superblock.high_water.get() as usize;
    let mut owner: Vec<Option<&str>> = vec![None; high];
    let mut own = |slot: u32, slots: u32, who: &'static str| {
        for slot in slot..slot + slots {
            let place = &mut owner[slot as usize];
            assert!(
                place.is_none(),
                "{story}: slot {slot} is {who} and {}",
                place.unwrap_or_default()
            );
            *place = Some(who);
        }
    };
    own(0, 1024, "fixed");
    for run in superblock.run_refs() {
        own(run.slot.get(), run.slots.get(), "a run");
    }
    if superblock.free_slot.get() != 0 {
        own(
            superblock.free_slot.get(),
            superblock.free_slots.get(),
            "the free list",
        );
    }
    for extent in free_list(layer, superblock) {
        own(extent.slot.get(), extent.slots.get(), "free");
    }
    let past = segments(&**layer.file(), superblock).expect("a history");
    assert!(past.broken.is_none(), "{story}: {:?}", past.broken);
    for segment in &past.segments {
        own(segment.slot, segment.slots, "the history's");
    }
    let mut held = 0;
    let walked = layer.each_step(0, |step| {
        held += step.slots().count() as u64;
        step.slots().for_each(|slot| own(slot, 1, "held"));
        Ok(())
    });
    walked.unwrap_or_else(|e| panic!("{story}: {e:?}"));
    held += past
        .segments
        .iter()
        .map(|s| u64::from(s.slots))
        .sum::<u64>();
    assert_eq!(
        held,
        superblock.history_blocks.get(),
        "{story}: what is held"
    );
    let (mut data, mut zeros) = (0, 0);
    for item in layer.items(Region(0)) {
        match item.unwrap_or_else(|e| panic!("{story}: {e:?}")) {
            Item::Zeros(_, n) => zeros += u64::from(n) * 512,
            Item::Region(_, map) => {
                let counts = map.counts();
                data += counts.0;
                zeros += counts.1;
                for (_, pointer) in map.iter() {
                    if let forkdisk::format::Pointer::Data { slot, .. } = pointer {
                        own(slot.0, 1, "data");
                    }
                }
            }
        }
    }
    assert_eq!((data, zeros), layer.counts(), "{story}: counts");
    let lost = owner.iter().filter(|o| o.is_none()).count() as u64;
    assert_eq!(
        lost,
        superblock.forgotten.get(),
        "{story}: slots nobody knows"
    );
}

fn free_list(layer: &ReadLayer, superblock: &Superblock) -> Vec<FreeExtent> {
    let count = superblock.free_count.get() as usize;
    if superblock.free_slot.get() == 0 {
        return superblock.free_inline[..count].to_vec();
    }
    let mut bytes = vec![0; count * 8];
    let at = u64::from(superblock.free_slot.get()) * SLOT as u64;
    layer.file().read_at(&mut bytes, at).expect("a free list");
    <[FreeExtent]>::ref_from_bytes(&bytes)
        .expect("whole extents")
        .to_vec()
}

/// The superblock that counts of a layer file as bytes, if it has one.
pub fn superblock(bytes: &[u8]) -> Option<Superblock> {
    let header = Header::decode(bytes.get(..SLOT)?).ok()?;
    let copy = |n: usize| {
        let slot = bytes.get(n * SLOT..(n + 1) * SLOT)?;
        Superblock::decode(slot, &Id(header.layer)).ok()
    };
    [copy(1), copy(2)]
        .into_iter()
        .flatten()
        .max_by_key(|s| s.sequence.get())
}
