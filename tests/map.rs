//! Block maps against plain models: what they answer, in memory and packed, and what happens when their bytes rot.
#![allow(missing_docs, reason = "a test")]

use forkdisk::format::{
    CommitEntry, DATA_START, DirEntry, Fence, GROUP_REGIONS, LIST_MAX, Pointer, RunHeader, RunRef,
    SLOT_ZERO, SUM_PIECE, ZERO_RANGE_MIN, crc,
};
use forkdisk::map::run::{Builder, Run, max_len};
use forkdisk::map::{Item, Items, Memtable, Ranges, RegionMap, WORDS, merge};
use forkdisk::units::{BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

const LAYER: Id = Id([5; 16]);
/// The last region of a 16 TiB disk.
const LAST: u32 = (1 << 23) - 1;
const REGION: u64 = REGION_BLOCKS as u64;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn data(n: u32) -> Pointer {
    Pointer::Data {
        slot: Slot(DATA_START + n % (SLOT_ZERO - DATA_START)),
        sum: n.wrapping_mul(0x9E37_79B9),
    }
}

// ---- the model -------------------------------------------------------------------------------------------------

/// A change: `count` blocks from `lba` on get `pointer` (one block unless it is zero).
type Change = (u64, u32, Pointer);

/// A block map as plainly as can be: single blocks, and long stretches of zeros. Later changes win.
#[derive(Clone, Default)]
struct Model {
    blocks: BTreeMap<u64, Pointer>,
    /// Start and end; they may overlap, for all say the same.
    zeros: Vec<(u64, u64)>,
}

impl Model {
    fn of(changes: &[Change]) -> Model {
        let mut model = Model::default();
        for &(lba, count, pointer) in changes {
            let end = lba + u64::from(count);
            if pointer == Pointer::Zero {
                model.blocks.retain(|k, _| !(lba..end).contains(k));
                model.zeros.push((lba, end));
            } else {
                model.blocks.insert(lba, pointer);
            }
        }
        model
    }
    fn get(&self, lba: u64) -> Pointer {
        match self.blocks.get(&lba) {
            Some(pointer) => *pointer,
            None if self.zeros.iter().any(|(s, e)| (*s..*e).contains(&lba)) => Pointer::Zero,
            None => Pointer::Absent,
        }
    }
    /// This model where it knows something, else `older`.
    fn over(&self, older: &Model) -> Model {
        let mut both = self.clone();
        for (lba, pointer) in &older.blocks {
            if self.get(*lba) == Pointer::Absent {
                both.blocks.insert(*lba, *pointer);
            }
        }
        both.zeros.extend(&older.zeros);
        both
    }
    /// Regions worth a look: all that something begins or ends in, their neighbours, and the ends of the disk.
    fn regions(&self) -> BTreeSet<u32> {
        let ends = self.zeros.iter().flat_map(|(s, e)| [*s, e - 1]);
        self.blocks
            .keys()
            .copied()
            .chain(ends)
            .flat_map(|b| {
                let r = (b / REGION) as u32;
                [r.saturating_sub(1), r, (r + 1).min(LAST)]
            })
            .chain([0, 1, LAST - 1, LAST])
            .collect()
    }
    fn region(&self, region: u32) -> Vec<Pointer> {
        let first = u64::from(region) * REGION;
        let mut all = vec![Pointer::Absent; REGION_BLOCKS];
        for (start, end) in &self.zeros {
            let from = (*start).clamp(first, first + REGION) - first;
            let to = (*end).clamp(first, first + REGION) - first;
            all[from as usize..to as usize].fill(Pointer::Zero);
        }
        for (lba, pointer) in self.blocks.range(first..first + REGION) {
            all[(lba - first) as usize] = *pointer;
        }
        all
    }
    /// Blocks with data, and blocks that are zero.
    fn counts(&self) -> (u64, u64) {
        let mut ranges = self.zeros.clone();
        ranges.sort_unstable();
        let (mut zeros, mut done) = (0, 0);
        for (start, end) in ranges {
            let start = start.max(done);
            if end > start {
                zeros += end - start;
                zeros -= self.blocks.range(start..end).count() as u64;
                done = end;
            }
        }
        (self.blocks.len() as u64, zeros)
    }
}

fn spread(map: &RegionMap) -> Vec<Pointer> {
    (0..REGION_BLOCKS).map(|i| map.get(i)).collect()
}

/// Places that are close together, at the edges of groups, and at the end of the disk.
fn any_region() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..12,
        2 => 250u32..262,
        1 => 510u32..515,
        1 => LAST - 3..=LAST,
        1 => 0..=LAST,
    ]
}

fn any_change() -> impl Strategy<Value = Change> {
    let lba = || (any_region(), 0..REGION).prop_map(|(r, i)| u64::from(r) * REGION + i);
    let cut = |lba: u64, count: u64| (lba, count.min((1 << 32) - lba) as u32, Pointer::Zero);
    prop_oneof![
        6 => (lba(), any::<u32>()).prop_map(|(lba, n)| (lba, 1, data(n))),
        2 => (lba(), 1u64..20).prop_map(move |(lba, n)| cut(lba, n)),
        2 => (lba(), 1u64..2000).prop_map(move |(lba, n)| cut(lba, n)),
        2 => (any_region(), 1u64..20).prop_map(move |(r, n)| cut(u64::from(r) * REGION, n * REGION)),
        1 => (any_region(), 1u64..1 << 22).prop_map(move |(r, n)| cut(u64::from(r) * REGION, n * REGION)),
    ]
}

fn any_changes() -> impl Strategy<Value = Vec<Change>> {
    let few = prop::collection::vec(any_change(), 0..40);
    // A region that is dense enough for a bitmap.
    let dense = (any_region(), 0usize..600, 1u64..4, any::<u32>()).prop_map(|(r, n, step, x)| {
        let first = u64::from(r) * REGION;
        let count = (n as u64).min(((1 << 32) - first) / step);
        (0..count)
            .map(|i| (first + i * step, 1, data(x.wrapping_add(i as u32))))
            .collect::<Vec<Change>>()
    });
    (few, dense, any::<bool>()).prop_map(|(few, dense, late)| {
        if late {
            [few, dense].concat()
        } else {
            [dense, few].concat()
        }
    })
}

fn table(changes: &[Change]) -> Memtable {
    let mut table = Memtable::new();
    for &(lba, count, pointer) in changes {
        table.apply(Lba(lba as u32), count, pointer);
    }
    table
}

/// A run on "disk".
struct Packed {
    bytes: Vec<u8>,
    reference: RunRef,
}

impl Packed {
    fn of(items: Items<'_>) -> Option<Packed> {
        let mut bytes = Vec::new();
        let mut builder = Builder::new(|b: &[u8]| {
            bytes.extend_from_slice(b);
            Ok(())
        });
        for item in items {
            builder
                .push(&item.expect("items of memory"))
                .expect("written");
        }
        let reference = builder.finish(&LAYER, 17).expect("written");
        match reference {
            None => {
                assert!(bytes.is_empty(), "an empty map writes nothing");
                None
            }
            Some(reference) => {
                assert_eq!(
                    bytes.len(),
                    reference.slots.get() as usize * BLOCK_SIZE,
                    "whole slots"
                );
                Some(Packed { bytes, reference })
            }
        }
    }
    fn open(&self) -> Run<&[u8]> {
        Run::open(&self.bytes[..], self.reference, &LAYER).expect("a sound run")
    }
}

/// Do items in order, from region `from` on, say what the model says, and nothing else?
fn compare_items(items: Items<'_>, model: &Model, from: u32) {
    let mut next = from;
    let mut zeros: Vec<(u32, u32)> = Vec::new();
    let mut maps: BTreeMap<u32, RegionMap> = BTreeMap::new();
    for item in items {
        let item = item.expect("sound");
        assert!(item.start() >= next, "region {} after {next}", item.start());
        assert!(item.end() > item.start() && item.end() <= LAST + 1);
        next = item.end();
        match item {
            Item::Region(r, map) => drop(maps.insert(r.0, map)),
            Item::Zeros(r, n) => zeros.push((r.0, r.0 + n)),
        }
    }
    let mut look = model.regions();
    look.extend(maps.keys());
    look.extend(zeros.iter().flat_map(|(s, e)| [*s, e - 1]));
    for region in look.range(from..) {
        let found = match maps.get(region) {
            Some(map) => spread(map),
            None if zeros.iter().any(|(s, e)| (*s..*e).contains(region)) => {
                vec![Pointer::Zero; REGION_BLOCKS]
            }
            None => vec![Pointer::Absent; REGION_BLOCKS],
        };
        assert!(found == model.region(*region), "region {region}");
    }
}

fn compare_run(run: &Run<&[u8]>, model: &Model) {
    for region in model.regions() {
        let map = run.region(Region(region)).expect("sound");
        let found = map.map_or(vec![Pointer::Absent; REGION_BLOCKS], |m| spread(&m));
        assert!(found == model.region(region), "region {region}");
        let known = found.iter().any(|p| *p != Pointer::Absent);
        assert!(
            !known || run.may_touch(region, region + 1),
            "region {region}"
        );
    }
}

// ---- maps in memory ----------------------------------------------------------------------------------------------

#[derive(Clone, Debug)]
enum Step {
    Set(usize, Pointer),
    FillZero,
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (0..REGION_BLOCKS, any::<u32>()).prop_map(|(i, n)| Step::Set(i, data(n))),
        6 => (0..REGION_BLOCKS).prop_map(|i| Step::Set(i, Pointer::Zero)),
        1 => Just(Step::FillZero),
    ];
    prop::collection::vec(step, 0..200)
}

fn region_of(steps: &[Step]) -> (RegionMap, Vec<Pointer>) {
    let mut map = RegionMap::new();
    let mut model = vec![Pointer::Absent; REGION_BLOCKS];
    for step in steps {
        match *step {
            Step::Set(i, p) => {
                assert_eq!(map.set(i, p), model[i]);
                model[i] = p;
            }
            Step::FillZero => {
                map.fill_zero();
                model.fill(Pointer::Zero);
            }
        }
    }
    (map, model)
}

fn is_data(p: &Pointer) -> bool {
    matches!(p, Pointer::Data { .. })
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn a_region_map_is_an_array(a in any_steps(), b in any_steps()) {
        let (map, model) = region_of(&a);
        prop_assert_eq!(&spread(&map), &model);
        for index in [0, 1, 63, 64, 300, 511] {
            let mut all = vec![Pointer::Absent; REGION_BLOCKS - index];
            map.get_all(index, &mut all);
            prop_assert_eq!(&all[..], &model[index..]);
        }
        let listed: Vec<(usize, Pointer)> = map.iter().collect();
        prop_assert_eq!(listed.len(), map.len());
        prop_assert!(listed.windows(2).all(|w| w[0].0 < w[1].0));
        prop_assert!(listed.iter().all(|(i, p)| model[*i] == *p && !(map.fill() && *p == Pointer::Zero)));
        let datas = model.iter().filter(|p| is_data(p)).count() as u64;
        let zeros = model.iter().filter(|p| **p == Pointer::Zero).count() as u64;
        prop_assert_eq!(map.counts(), (datas, zeros));
        prop_assert_eq!(map.is_empty(), model.iter().all(|p| *p == Pointer::Absent));
        // Taken apart and put together.
        let parts = listed.iter().map(|(_, p)| *p).collect();
        prop_assert_eq!(RegionMap::from_parts(*map.present(), parts, map.fill()), Some(map.clone()));
        let mut one_less = *map.present();
        if let Some(word) = one_less.iter_mut().find(|w| **w != 0) {
            *word &= *word - 1;
            let parts = listed.iter().map(|(_, p)| *p).collect();
            prop_assert_eq!(RegionMap::from_parts(one_less, parts, map.fill()), None);
        }
        // A writer that stores zeros beside a fill means the same.
        let mut every = [0u64; WORDS];
        let mut pointers = Vec::new();
        for (i, p) in model.iter().enumerate().filter(|(_, p)| **p != Pointer::Absent) {
            every[i / 64] |= 1 << (i % 64);
            pointers.push(*p);
        }
        let stored = RegionMap::from_parts(every, pointers, map.fill()).expect("they fit");
        prop_assert_eq!(&spread(&stored), &model);
        prop_assert!(!stored.fill() || stored.iter().all(|(_, p)| p != Pointer::Zero));
        // One over another.
        let (older, older_model) = region_of(&b);
        let mut both = map.clone();
        both.underlay(&older);
        let expected: Vec<Pointer> = model.iter().zip(&older_model)
            .map(|(p, o)| if *p == Pointer::Absent { *o } else { *p }).collect();
        prop_assert_eq!(&spread(&both), &expected);
        prop_assert!(!both.fill() || both.iter().all(|(_, p)| p != Pointer::Zero));
    }

    #[test]
    fn ranges_are_tagged_numbers(
        steps in prop::collection::vec((0u32..300, 0u32..60, 0u64..4), 0..60), forget in 0u64..4, top: bool,
    ) {
        let shift = if top { LAST + 1 - 360 } else { 0 };
        let mut ranges = Ranges::default();
        let mut model: BTreeMap<u32, u64> = BTreeMap::new();
        for (start, len, tag) in steps {
            ranges.insert(start + shift, start + len + shift, tag);
            model.extend((start..start + len).map(|n| (n, tag)));
        }
        let same = |ranges: &Ranges, model: &BTreeMap<u32, u64>| {
            (0..361).all(|n| ranges.get(n + shift) == model.get(&n).copied())
                && ranges.iter().all(|(s, e)| s < e)
                && ranges.iter().flat_map(|(s, e)| s..e).eq(model.keys().map(|n| n + shift))
                && ranges.is_empty() == model.is_empty()
        };
        prop_assert!(same(&ranges, &model));
        ranges.forget_up_to(forget);
        model.retain(|_, tag| *tag > forget);
        prop_assert!(same(&ranges, &model));
    }

    #[test]
    fn a_memtable_is_a_map(changes in any_changes()) {
        let table = table(&changes);
        let model = Model::of(&changes);
        prop_assert_eq!(table.is_empty(), changes.is_empty());
        prop_assert_eq!(table.applied(), changes.len() as u64);
        for region in model.regions() {
            let expected = model.region(region);
            for index in [0, 1, 255, 510, 511] {
                prop_assert_eq!(table.get(Region(region).lba(index)), expected[index]);
            }
            let found = table.region(Region(region)).map_or(vec![Pointer::Absent; REGION_BLOCKS], |m| spread(&m));
            prop_assert!(found == expected, "region {}", region);
        }
        compare_items(table.items(), &model, 0);
        // As the entries of a record, and back.
        let entries = table.entries();
        let mut next = 0u64;
        let mut again = Memtable::new();
        for entry in &entries {
            let (lba, count, pointer) = entry.get();
            prop_assert!(u64::from(lba.0) >= next && count > 0);
            next = u64::from(lba.0) + u64::from(count);
            prop_assert!(next <= 1 << 32);
            again.apply(lba, count, pointer);
        }
        compare_items(again.items(), &model, 0);
        // What a writer reserves for its changes suffices for the record: two entries a change.
        prop_assert!(entries.len() <= 2 * changes.len());
        prop_assert_eq!(size_of::<CommitEntry>(), 12);
    }

    #[test]
    fn merge_lays_maps_over_each_other(stack in prop::collection::vec(any_changes(), 0..5)) {
        let tables: Vec<Memtable> = stack.iter().map(|c| table(c)).collect();
        let model = stack.iter().rev().fold(Model::default(), |older, c| Model::of(c).over(&older));
        compare_items(Box::new(merge(tables.iter().map(Memtable::items).collect())), &model, 0);
    }

    // ---- runs ----------------------------------------------------------------------------------------------------

    #[test]
    fn a_run_is_a_map(changes in any_changes(), starts in prop::collection::vec(any_region(), 3)) {
        let table = table(&changes);
        let model = Model::of(&changes);
        let Some(packed) = Packed::of(table.items()) else {
            prop_assert!(changes.is_empty());
            return Ok(());
        };
        let run = packed.open();
        run.verify().expect("sound");
        prop_assert_eq!(run.last_commit(), 17);
        compare_run(&run, &model);
        for from in starts.into_iter().chain([0, LAST]) {
            compare_items(run.items(Region(from)), &model, from);
        }
        prop_assert_eq!((run.reference().pointers.get(), run.reference().zeros.get()), model.counts());
    }

    /// What is reserved for a merge before it is written suffices.
    #[test]
    fn the_length_of_a_run_is_foreseen(new in any_changes(), old in any_changes(), older in any_changes()) {
        let new = table(&new);
        let (mut regions, mut pointers, mut ranges) = (0, 0, 0);
        for item in new.items() {
            match item.expect("memory") {
                Item::Region(_, map) => { regions += 1; pointers += map.len() as u64 }
                Item::Zeros(..) => ranges += 1,
            }
        }
        let packed: Vec<Packed> = [old, older].iter().filter_map(|c| Packed::of(table(c).items())).collect();
        let runs: Vec<Run<&[u8]>> = packed.iter().map(Packed::open).collect();
        for run in &runs {
            let r = run.reference();
            regions += u64::from(r.regions.get());
            pointers += r.pointers.get() + r.zeros.get().min(u64::from(r.regions.get()) * REGION);
            ranges += run.zero_ranges();
        }
        let mut sources: Vec<Items<'_>> = vec![new.items()];
        sources.extend(runs.iter().map(|r| r.items(Region(0))));
        if let Some(merged) = Packed::of(Box::new(merge(sources))) {
            let limit = max_len(regions, pointers, ranges);
            prop_assert!(merged.reference.len.get() <= limit, "{} > {limit}", merged.reference.len.get());
        }
    }
}

/// The turn from lists to bitmaps, and all that a region can hold.
#[test]
fn bodies_of_every_size() {
    for n in (0..=LIST_MAX + 4).chain([63, 64, 65, 511, 512]) {
        for fill in [false, true] {
            let mut map = if fill {
                RegionMap::zeros()
            } else {
                RegionMap::new()
            };
            // Spread out, the last block included.
            for i in 0..n {
                map.set(
                    REGION_BLOCKS - 1 - i * REGION_BLOCKS / n.max(1),
                    data(i as u32),
                );
            }
            let item = Item::Region(Region(LAST), map.clone());
            let packed = Packed::of(Box::new(std::iter::once(Ok(item))));
            let Some(packed) = packed else {
                assert!(n == 0 && !fill);
                continue;
            };
            let head = match n {
                0 => 0,
                n if n <= LIST_MAX => (2 * n).next_multiple_of(8),
                _ => 64,
            };
            let payload =
                packed.reference.len.get() - u64::from(packed.reference.trailer_len.get());
            assert_eq!(payload as usize, head + n * 8 + size_of::<DirEntry>());
            let run = packed.open();
            run.verify().expect("sound");
            assert_eq!(run.region(Region(LAST)).expect("sound"), Some(map));
            assert_eq!(run.region(Region(LAST - 1)).expect("sound"), None);
        }
    }
}

/// Full groups, and one region more.
#[test]
fn groups_and_fences() {
    for regions in [GROUP_REGIONS, GROUP_REGIONS + 1, 3 * GROUP_REGIONS] {
        let changes: Vec<Change> = (0..regions as u64)
            .map(|r| (r * 3 * REGION + r % REGION, 1, data(r as u32)))
            .collect();
        let packed = Packed::of(table(&changes).items()).expect("not empty");
        let run = packed.open();
        run.verify().expect("sound");
        assert_eq!(packed.reference.regions.get() as usize, regions);
        let model = Model::of(&changes);
        compare_run(&run, &model);
        for from in [
            0,
            1,
            3 * GROUP_REGIONS as u32 - 1,
            3 * GROUP_REGIONS as u32,
            LAST,
        ] {
            compare_items(run.items(Region(from)), &model, from);
        }
        let trailer = size_of::<RunHeader>()
            + regions.div_ceil(GROUP_REGIONS) * size_of::<Fence>()
            + (packed.reference.len.get() as usize).div_ceil(SUM_PIECE) * 4;
        assert!(packed.reference.trailer_len.get() as usize <= trailer);
    }
}

/// A whole disk of zeros takes a few bytes; short stretches stand in the directory.
#[test]
fn zero_ranges() {
    for regions in [1, ZERO_RANGE_MIN - 1, ZERO_RANGE_MIN, LAST + 1] {
        let item = Item::Zeros(Region(LAST + 1 - regions), regions);
        let packed = Packed::of(Box::new(std::iter::once(Ok(item)))).expect("not empty");
        assert_eq!(packed.bytes.len(), BLOCK_SIZE);
        let run = packed.open();
        assert_eq!(run.zero_ranges(), u64::from(regions >= ZERO_RANGE_MIN));
        assert_eq!(run.reference().zeros.get(), u64::from(regions) * REGION);
        assert_eq!(
            run.region(Region(LAST)).expect("sound"),
            Some(RegionMap::zeros())
        );
        if regions <= LAST {
            assert_eq!(run.region(Region(LAST - regions)).expect("sound"), None);
        }
    }
}

// ---- rot ---------------------------------------------------------------------------------------------------------

/// A run that has everything: lists, bitmaps, fills, zero ranges, several pieces and groups.
fn rich() -> (Packed, Model) {
    let mut changes: Vec<Change> = Vec::new();
    for r in 0..300u64 {
        changes.push((r * REGION, 1, data(r as u32)));
    }
    for i in 0..200 {
        changes.push((10 * REGION + 2 * i, 1, data(1000 + i as u32)));
    }
    changes.push((20 * REGION, 2 * REGION as u32, Pointer::Zero));
    changes.push((20 * REGION + 7, 1, data(77)));
    changes.push((30 * REGION + 3, 9, Pointer::Zero));
    changes.push((1000 * REGION, 100 * REGION as u32, Pointer::Zero));
    changes.push((1010 * REGION + 1, 1, data(78)));
    changes.push((u64::from(LAST) * REGION + 511, 1, data(79)));
    let packed = Packed::of(table(&changes).items()).expect("not empty");
    (packed, Model::of(&changes))
}

/// Everything a reader can do with a run; what it returns does not matter, only that it returns.
/// What is said to be read for some regions is what is read for them: of all regions that is the whole payload, each byte of it once; and a run of which nothing
/// but that is left still answers for them.
#[test]
fn places_of_regions_are_what_is_read() {
    let (packed, model) = rich();
    let run = packed.open();
    let all: Vec<u32> = (0..1 << 23).collect();
    let mut places: Vec<_> = run.directories(&all).chain(run.bodies(&all)).collect();
    places.sort_unstable_by_key(|place| place.start);
    let payload = packed.reference.len.get() - u64::from(packed.reference.trailer_len.get());
    let mut at = 0;
    for place in &places {
        assert_eq!(place.start, at);
        at = place.end;
    }
    // The trailer begins at the next multiple of its own alignment.
    assert!(at <= payload && payload - at < 8, "{at} of {payload}");

    let mut some: Vec<u32> = model.blocks.keys().map(|b| (b / REGION) as u32).collect();
    some.dedup();
    let some: Vec<u32> = some.into_iter().step_by(3).collect();
    let mut left = packed.bytes.clone();
    left[..at as usize].fill(0);
    // Checksums are of pieces of 4096 bytes.
    for place in run.directories(&some).chain(run.bodies(&some)) {
        let from = place.start as usize / 4096 * 4096;
        let to = (place.end as usize).next_multiple_of(4096).min(at as usize);
        left[from..to].copy_from_slice(&packed.bytes[from..to]);
    }
    let left = Run::open(&left[..], packed.reference, &LAYER).expect("its trailer is there");
    for region in some {
        let (found, wanted) = (left.region(Region(region)), run.region(Region(region)));
        assert_eq!(found.expect("all is there"), wanted.expect("sound"));
    }
}

fn read_all(bytes: &[u8], reference: RunRef) -> bool {
    let Ok(run) = Run::open(bytes, reference, &LAYER) else {
        return false;
    };
    let mut sound = run.verify().is_ok();
    for region in [0, 1, 10, 20, 30, 255, 256, 299, 1000, 1010, 1099, LAST] {
        sound &= run.region(Region(region)).is_ok();
        let _ = run.may_touch(region, region + 1);
        let items = run.items(Region(region)).take(2000);
        sound &= items
            .map(|i| i.map(|i| (i.start(), i.end())))
            .all(|i| i.is_ok());
    }
    sound
}

#[test]
fn every_changed_byte_of_a_run_is_found_or_harmless() {
    let (mut packed, model) = rich();
    for at in 0..packed.bytes.len() {
        let with = 1u8 << (at % 8);
        packed.bytes[at] ^= with;
        let whole =
            Run::open(&packed.bytes[..], packed.reference, &LAYER).and_then(|run| run.verify());
        let covered = (at as u64) < packed.reference.len.get();
        assert_eq!(whole.is_err(), covered, "byte {at}");
        // Without a look at everything: the right answer or an error, never a wrong one.
        if at % 7 == 0
            && let Ok(run) = Run::open(&packed.bytes[..], packed.reference, &LAYER)
        {
            for region in [0, 10, 20, 299, 1010, LAST] {
                if let Ok(map) = run.region(Region(region)) {
                    let found = map.map_or(vec![Pointer::Absent; REGION_BLOCKS], |m| spread(&m));
                    assert!(found == model.region(region), "byte {at}, region {region}");
                }
            }
        }
        packed.bytes[at] ^= with;
    }
    // Nor does a run pass for another layer's, or shorter than it is.
    assert!(Run::open(&packed.bytes[..], packed.reference, &Id([6; 16])).is_err());
    let short = &packed.bytes[..packed.reference.len.get() as usize - 1];
    assert!(Run::open(short, packed.reference, &LAYER).is_err());
}

/// Makes all checksums right again, as a writer with wrong ideas would.
fn reseal(packed: &mut Packed, payload_len: usize) {
    let len = packed.reference.len.get() as usize;
    let trailer = len - packed.reference.trailer_len.get() as usize;
    for piece in 0..payload_len.div_ceil(SUM_PIECE) {
        let end = ((piece + 1) * SUM_PIECE).min(payload_len);
        let sum = crc(&packed.bytes[piece * SUM_PIECE..end]);
        packed.bytes[trailer + piece * 4..trailer + piece * 4 + 4]
            .copy_from_slice(&sum.to_le_bytes());
    }
    packed.reference.trailer_crc = U32::new(crc(&packed.bytes[trailer..len]));
}

proptest! {
    #![proptest_config(config(400))]

    /// Wrong fields under right checksums: an error or some answer, never a panic, never more memory than a few
    /// regions.
    #[test]
    fn a_wrong_writer_does_no_harm(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6)) {
        let (mut packed, _) = rich();
        let len = packed.reference.len.get() as usize;
        let payload_len = len - packed.reference.trailer_len.get() as usize;
        for (at, with, whole_word) in changes {
            // The trailer and the last directory are where the interesting fields are.
            let at = if whole_word { at.index(len) } else { payload_len.saturating_sub(800) + at.index(len + 800 - payload_len) };
            packed.bytes[at.min(len - 1)] = with;
            if whole_word {
                let end = (at + 8).min(len);
                packed.bytes[at..end].fill(with | 0x80);
            }
        }
        reseal(&mut packed, payload_len);
        read_all(&packed.bytes, packed.reference);
    }

    #[test]
    fn random_bytes_are_no_run(
        bytes in prop::collection::vec(any::<u8>(), 64..2000), reference in any::<[u32; 12]>(), trailer in 56u32..200, fit: bool,
    ) {
        let mut run = RunRef::new_zeroed();
        run.as_mut_bytes().copy_from_slice(reference.as_bytes());
        if fit {
            run.len = U64::new(bytes.len() as u64);
            run.trailer_len = U32::new(trailer.min(bytes.len() as u32));
            let from = bytes.len() - run.trailer_len.get() as usize;
            run.trailer_crc = U32::new(crc(&bytes[from..]));
        }
        prop_assert!(!read_all(&bytes, run));
    }
}

/// Directory entries with every field at its extremes, under right checksums.
#[test]
fn extreme_directory_entries() {
    for region in [0u32, LAST, LAST + 1, u32::MAX] {
        for at in [0u64, 8, 1 << 20, u64::MAX - 7, u64::MAX] {
            for (count, flags) in [
                (0u16, 0u16),
                (0, 2),
                (1, 1),
                (1, 0),
                (512, 2),
                (513, 0),
                (u16::MAX, 3),
                (1, 4),
            ] {
                let changes: Vec<Change> = vec![(3, 1, data(1))];
                let mut packed = Packed::of(table(&changes).items()).expect("not empty");
                let payload_len = packed.reference.len.get() as usize
                    - packed.reference.trailer_len.get() as usize;
                let entry = DirEntry {
                    region: U32::new(region),
                    count: count.into(),
                    flags: flags.into(),
                    at: U64::new(at),
                };
                let from = payload_len - size_of::<DirEntry>();
                packed.bytes[from..payload_len].copy_from_slice(entry.as_bytes());
                reseal(&mut packed, payload_len);
                read_all(&packed.bytes, packed.reference);
            }
        }
    }
}
