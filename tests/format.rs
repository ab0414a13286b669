//! `docs/FORMAT.md` against the code, in both directions; and every structure: round trips, and what a decoder must refuse.
#![allow(missing_docs, reason = "a test")]

use forkdisk::error::Kind;
use forkdisk::format::stream::*;
use forkdisk::format::text::{MAX_RECORD, Record};
use forkdisk::format::*;
use forkdisk::io::{Access, Dir, EntryKind, sim::SimDisk};
use forkdisk::store::history::Limits;
use forkdisk::store::{Effort, Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::{BLOCK, BLOCK_SIZE, Id, Lba, MAX_DISK, MIN_DISK, REGION_BLOCKS, Slot};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const DOCUMENT: &str = include_str!("../docs/FORMAT.md");

// ---- the document ------------------------------------------------------------------------------------------------

/// The cells of a table row.
fn cells(line: &str) -> Vec<&str> {
    line.trim()
        .trim_matches('|')
        .split('|')
        .map(str::trim)
        .collect()
}

/// The tables of the document whose head is `head`: the heading they stand under, and their rows.
fn tables(head: &str) -> Vec<(&'static str, Vec<Vec<&'static str>>)> {
    let mut heading = "";
    let mut found = Vec::new();
    let mut lines = DOCUMENT.lines().peekable();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix('#') {
            heading = text.trim_start_matches('#').trim();
        }
        if line.trim() == head {
            lines.next();
            let mut rows = Vec::new();
            while let Some(row) = lines.next_if(|l| l.starts_with('|')) {
                rows.push(cells(row));
            }
            found.push((heading, rows));
        }
    }
    found
}

#[test]
fn every_field_is_documented_and_every_row_is_a_field() {
    let documented = tables("| offset | size | field | meaning |");
    let titles: Vec<&str> = documented.iter().map(|t| t.0).collect();
    let known: Vec<&str> = LAYOUTS.iter().map(|l| l.0).collect();
    for title in &titles {
        assert!(known.contains(title), "no structure is called `{title}`");
    }
    for (title, fields, size) in LAYOUTS {
        let mine: Vec<_> = documented.iter().filter(|t| t.0 == *title).collect();
        assert_eq!(
            mine.len(),
            1,
            "FORMAT.md needs one table under `### {title}`"
        );
        let rows: Vec<(usize, usize, &str)> = mine[0]
            .1
            .iter()
            .map(|r| {
                assert_eq!(r.len(), 4, "{title}: {r:?}");
                assert!(!r[3].is_empty(), "{title}: `{}` has no meaning", r[2]);
                let number = |s: &str| s.parse().unwrap_or_else(|_| panic!("{title}: {r:?}"));
                (number(r[0]), number(r[1]), r[2])
            })
            .collect();
        let code: Vec<(usize, usize, &str)> =
            fields.iter().map(|f| (f.offset, f.size, f.name)).collect();
        assert_eq!(
            rows, code,
            "{title}: document (left) and code (right) differ"
        );
        let mut end = 0;
        for (offset, len, field) in code {
            assert_eq!(offset, end, "{title}: a gap before `{field}`");
            end = offset + len;
        }
        assert_eq!(end, *size, "{title}: bytes behind the last field");
    }
    for slot_sized in ["Header", "Superblock"] {
        let (_, _, size) = LAYOUTS.iter().find(|l| l.0 == slot_sized).expect("listed");
        assert_eq!(*size, BLOCK_SIZE, "{slot_sized} fills a slot");
    }
}

/// What the rows of a table say about a field.
fn meaning(title: &str, field: &str) -> &'static str {
    tables("| offset | size | field | meaning |")
        .into_iter()
        .find(|t| t.0 == title)
        .and_then(|t| t.1.into_iter().find(|r| r[2] == field))
        .map(|r| r[3])
        .unwrap_or_else(|| panic!("no field {field} under {title}"))
}

#[test]
fn magic_strings_and_meanings() {
    for (title, magic) in [
        ("Sums header", SUMS_MAGIC),
        ("Header", HEADER_MAGIC),
        ("Run header", RUN_MAGIC),
        ("History segment", SEGMENT_MAGIC),
        ("Stream header", STREAM_MAGIC),
        ("Stream trailer", TRAILER_MAGIC),
    ] {
        let magic = std::str::from_utf8(&magic).expect("ASCII");
        assert_eq!(meaning(title, "magic"), format!("`{magic}`"), "{title}");
    }
    for (title, magic, with_history) in [
        ("Superblock", SUPER_MAGIC, SUPER_HISTORY_MAGIC),
        ("Commit record", COMMIT_MAGIC, COMMIT_HISTORY_MAGIC),
    ] {
        let text = |magic| String::from_utf8(Vec::from(magic)).expect("ASCII");
        let (magic, other): (String, String) = (text(magic), text(with_history));
        let expected = format!("`{magic}`; `{other}` where the layer keeps its history");
        assert_eq!(meaning(title, "magic"), expected, "{title}");
    }
    assert!(meaning("Commit record", "undo").contains(&format!("`0x{NO_UNDO:08X}`")));
    assert_eq!(
        meaning("Superblock", "state"),
        format!(
            "{STATE_WRITABLE} writable (the journal counts), {STATE_CLEAN} clean, {STATE_SEALED} sealed (in both the journal is empty)"
        )
    );
    assert_eq!(
        meaning("Directory entry", "flags"),
        format!(
            "{FLAG_LIST}: the body is a list, else a bitmap; {FLAG_FILL}: blocks without a pointer here are zero"
        )
    );
    assert_eq!(
        meaning("Header", "depth"),
        format!(
            "its rank, larger than that of the layer below, so that no chain is a circle: 1 to {MAX_RANK}"
        )
    );
    assert_eq!(
        meaning("Header", "version"),
        format!("{VERSION}; a larger one is refused")
    );
    assert_eq!(
        meaning("Superblock", "runs"),
        format!("{MAX_RUNS} run references, the newest first")
    );
    assert_eq!(
        meaning("Superblock", "free_inline"),
        format!("up to {INLINE_FREE} extents of the free list")
    );
    assert_eq!(
        meaning("Stream header", "kind"),
        format!("{STREAM_FULL} everything, {STREAM_SINCE} a difference")
    );
    assert_eq!(
        meaning("Stream header", "version"),
        format!("{STREAM_VERSION}; a larger one is refused")
    );
    assert_eq!(
        meaning("Stream record", "kind"),
        format!("{RECORD_DATA} data, {RECORD_ZERO} zero")
    );
    assert_eq!(
        meaning("Directory entry", "count"),
        format!("pointers in the body, 0 to {REGION_BLOCKS}")
    );
}

/// Sentences that state a number of the code.
#[test]
fn numbers_in_the_text() {
    let zero_sum = crc(&[0; BLOCK_SIZE]);
    assert_eq!(zero_sum, ZERO_SUM);
    let thousands = |n: u64| n.to_string();
    for sentence in [
        format!("(0x{ZERO_SUM:08X})"),
        format!("`0x{SLOT_ABSENT:08X}` *absent*"),
        format!("`0x{SLOT_ZERO:08X}` *zero*"),
        format!("A stored data pointer is at least {DATA_START} "),
        format!("groups of up to {GROUP_REGIONS} regions"),
        format!("Lists are used up to {LIST_MAX} pointers"),
        format!("Ranges of fewer than {ZERO_RANGE_MIN} regions"),
        format!("one CRC for each {SUM_PIECE} bytes of payload"),
        format!("A record of more than {} KiB is refused", MAX_RECORD / 1024),
        format!("A name is 1 to {MAX_NAME} bytes"),
        format!("A *slot* is {BLOCK_SIZE} bytes"),
        format!("into records of {MAX_DATA} bytes"),
        format!("*region* {REGION_BLOCKS} neighbouring blocks"),
        format!("entries of the group, 1 to {GROUP_REGIONS}"),
        format!("# The on-disk format, version {VERSION}\n"),
        format!("alone: {} bytes", thousands(BLOCK)),
    ] {
        assert!(
            DOCUMENT.contains(&sentence),
            "FORMAT.md does not say `{sentence}`"
        );
    }
    // The CRC is the one of gzip.
    assert_eq!(crc(b"123456789"), 0xCBF4_3926);
    // The areas of a layer file.
    let areas = tables("| slots | content |");
    let areas: Vec<&str> = areas[0].1.iter().map(|r| r[0]).collect();
    let journal = format!("{JOURNAL_START} .. {}", JOURNAL_START + JOURNAL_SLOTS - 1);
    let data = format!("{DATA_START} ..");
    assert_eq!(areas, ["0", "1, 2", "3", &journal, &data]);
    assert_eq!(JOURNAL_START + JOURNAL_SLOTS, DATA_START);
    let versions = tables("| version | since | change |");
    let newest = versions[0].1.last().expect("a version");
    assert_eq!(newest[0], VERSION.to_string());
}

#[test]
fn limits_are_those_of_the_code() {
    fn size(text: &str) -> u64 {
        let (number, unit) = text.split_once(' ').expect("number and unit");
        let scale = match unit {
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "TiB" => 1u64 << 40,
            other => panic!("unit {other}"),
        };
        number.parse::<u64>().expect("a number") * scale
    }
    let number = |text: &str| -> u64 {
        let digits = text.trim_end_matches(" bytes").replace(',', "");
        digits
            .parse()
            .unwrap_or_else(|_| panic!("`{text}` is no number"))
    };
    let tables = tables("| limit | value | reason |");
    assert_eq!(tables.len(), 1);
    let mut seen = BTreeSet::new();
    for row in &tables[0].1 {
        let (limit, value) = (row[0], row[1]);
        assert!(!row[2].is_empty(), "{limit}: no reason");
        seen.insert(limit);
        match limit {
            "disk size" => {
                let (min, max) = value.split_once(" to ").expect("a range");
                assert_eq!((size(min), size(max)), (MIN_DISK, MAX_DISK));
            }
            "private data in one layer" => {
                let left_out = u64::from(DATA_START) + u64::from(u32::MAX - SLOT_ZERO) + 1;
                assert!(
                    value.starts_with(&format!("2^32 - {left_out} slots")),
                    "{value}"
                );
            }
            "depth" => assert_eq!(number(value), u64::from(MAX_DEPTH)),
            "uncommitted entries" => {
                assert_eq!(number(value), MAX_DIRTY);
                assert!(commit_slots(MAX_DIRTY) <= JOURNAL_SLOTS);
            }
            "runs in a layer" => assert_eq!(number(value), MAX_RUNS as u64),
            "history segments" => assert_eq!(number(value), MAX_SEGMENTS as u64),
            "sealed layers that keep parts of one history" => {
                assert_eq!(number(value), forkdisk::store::MAX_EARLIER as u64);
            }
            "free extents kept" => assert_eq!(number(value), MAX_FREE_EXTENTS as u64),
            "name" => {
                assert_eq!(number(value), MAX_NAME as u64);
                assert!(2 * MAX_NAME < NAME_FIELD && 2 * MAX_NAME + 1 + ".tmp-".len() <= 255);
            }
            "message" => {
                assert_eq!(number(value), MAX_MESSAGE as u64);
                // Each byte may become four.
                assert!(4 * MAX_MESSAGE as u64 + 1024 < MAX_RECORD);
            }
            other => panic!("the limit `{other}` is not checked by this test"),
        }
    }
    assert_eq!(seen.len(), 10, "a limit is missing: {seen:?}");
}

/// The keys of the text records, as written by the store.
#[test]
fn keys_of_the_records() {
    let mut documented: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for row in &tables("| record | keys |")[0].1 {
        // Every second piece between back quotes is a key.
        let keys = row[1]
            .split('`')
            .skip(1)
            .step_by(2)
            .map(String::from)
            .collect();
        documented.insert(row[0].trim_matches('`').to_string(), keys);
    }
    let next = Arc::new(AtomicU64::new(1));
    let env = Env {
        id: Arc::new(move || Id(u128::from(next.fetch_add(1, Ordering::SeqCst)).to_be_bytes())),
        now: Arc::new(|| 1),
        depth: forkdisk::format::MAX_DEPTH,
    };
    let sim = SimDisk::new(1);
    let store = Store::init_on(sim.root(), Path::new("/sim"), env).expect("a store");
    let image = [7u8; 5000];
    store
        .import(
            ImportSource::Reader(&mut &image[..]),
            "image",
            ImportMode::Copy,
            &Quiet,
        )
        .expect("import");
    store
        .create(&["disk".to_string()], "image", None)
        .expect("a disk");
    store
        .snapshot("disk", "s", Some("why"))
        .expect("a snapshot");
    let snapshot = store.resolve("disk@s").expect("a snapshot");
    let digest = store.digest(&snapshot, Effort::ANY, &Quiet);
    assert!(digest.expect("computed").is_some());
    store.rename("disk@s", "disk@t").expect("a new name");
    let history = Limits {
        window: Some(600),
        bytes: None,
    };
    store
        .set_history(&["disk".to_string()], Some(history))
        .expect("a history");
    let quota = forkdisk::store::QuotaChange {
        bytes: Some(Some(1 << 20)),
        waits: Some(true),
    };
    store.set_quota("disk", quota, None).expect("a quota");
    let disk = store.resolve("disk").expect("a disk");
    drop(store.open_disk(&disk, true).expect("open"));
    store.snapshot("disk", "u", None).expect("a snapshot");
    let disk = store.resolve("disk").expect("a disk");
    drop(store.open_disk(&disk, true).expect("open"));
    struct Stop;
    impl forkdisk::store::Progress for Stop {
        fn update(&self, done: u64, _: u64) -> bool {
            done == 0
        }
    }
    forkdisk::check::scrub(&store, None, Default::default(), &Stop).expect_err("interrupted");
    struct Later;
    impl forkdisk::store::Progress for Later {
        fn update(&self, done: u64, _: u64) -> bool {
            done <= 4 << 20
        }
    }
    store
        .create(&["large".to_string()], "image", Some(16 << 20))
        .expect("a disk");
    store.snapshot("large", "s", None).expect("a snapshot");
    store.flatten("large@s", &Later).expect_err("interrupted");
    fn keys(dir: &dyn Dir, file: &str, into: &mut BTreeSet<String>) {
        let file = dir.open(file, Access::Read).expect("there");
        let mut bytes = vec![0; file.len().expect("a length") as usize];
        file.read_at(&mut bytes, 0).expect("read");
        let text = String::from_utf8(bytes).expect("UTF-8");
        into.extend(
            text.lines()
                .filter_map(|l| Some(l.split_once(" = ")?.0.to_string())),
        );
    }
    let mut written: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    keys(
        &**store.root(),
        "forkdisk.toml",
        written.entry("forkdisk.toml").or_default(),
    );
    let root = &**store.root();
    keys(root, "scrub", written.entry("scrub").or_default());
    for (name, kind) in store.names_dir().list().expect("names") {
        if kind == EntryKind::File {
            keys(
                &**store.names_dir(),
                &name,
                written.entry("names/*").or_default(),
            );
        }
    }
    for (id, _) in store.bases_dir().list().expect("bases") {
        let dir = store.bases_dir().subdir(&id).expect("a base");
        let (file, record) = match id.starts_with(".tmp-") {
            true => ("copied", "bases/.tmp-*/copied"),
            false => ("meta", "bases/*/meta"),
        };
        keys(&*dir, file, written.entry(record).or_default());
    }
    assert_eq!(
        written.len(),
        documented.len(),
        "a record that nobody wrote"
    );
    for (record, mut keys) in written {
        let documented = &documented[record];
        assert!(keys.remove("crc32"), "{record} has no checksum");
        assert!(
            keys.is_subset(documented),
            "{record}: {keys:?} against {documented:?}"
        );
        // What only a linked base has, one that was made by flattening, and what came as a stream.
        let rest: BTreeSet<&str> = documented.difference(&keys).map(String::as_str).collect();
        let some = [
            "link",
            "size",
            "mtime",
            "inode",
            "device",
            "counts_as",
            "known_as",
        ];
        assert!(
            rest.iter().all(|k| some.contains(k)),
            "{record} never has {rest:?}"
        );
    }
}

// ---- text records ------------------------------------------------------------------------------------------------

fn record(pairs: &[(String, String)]) -> Record {
    pairs
        .iter()
        .fold(Record::new(), |r, (k, v)| r.with(k, v.as_str()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn records_come_back(
        pairs in prop::collection::vec(("[a-z_]{1,12}", any::<String>()), 0..6),
        controls in prop::collection::vec(0u32..0xA0, 0..40),
    ) {
        let controls: String = controls.into_iter().filter_map(char::from_u32).collect();
        let record = record(&pairs).with("controls", controls.as_str());
        let bytes = record.encode();
        // One line a key, whatever the value: nothing in a record moves the cursor of a terminal.
        prop_assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), pairs.len() + 2);
        let text = std::str::from_utf8(&bytes).expect("UTF-8");
        prop_assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
        prop_assert_eq!(&Record::decode(&bytes).expect("its own bytes"), &record);
    }

    #[test]
    fn any_changed_byte_of_a_record_is_refused(
        pairs in prop::collection::vec(("[a-z_]{1,12}", any::<String>()), 0..4),
        with in 1u8..,
    ) {
        let mut bytes = record(&pairs).encode();
        for at in 0..bytes.len() {
            bytes[at] ^= with;
            prop_assert!(Record::decode(&bytes).is_err(), "byte {at} ^ {with}");
            bytes[at] ^= with;
        }
        for len in 0..bytes.len() {
            prop_assert!(Record::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn records_of_random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300), text in any::<String>()) {
        prop_assert!(Record::decode(&bytes).is_err());
        // A foreign text with a right sum: an error or a record, never a panic.
        let body = format!("{text}\n");
        let _ = Record::decode(format!("{body}crc32 = \"{:08x}\"\n", crc(body.as_bytes())).as_bytes());
    }
}

#[test]
fn records_with_a_right_sum_and_a_wrong_form() {
    for body in [
        "key\n",
        "key = value\n",
        "key = \"\\q\"\n",
        "key = \"\\x4\"\n",
        "key = \"\\\"\n",
        "key = \"\n",
    ] {
        let text = format!("{body}crc32 = \"{:08x}\"\n", crc(body.as_bytes()));
        assert!(Record::decode(text.as_bytes()).is_err(), "{body:?}");
    }
    let record = Record::new()
        .with("n", "12x")
        .with_some("none", None::<&str>);
    assert!(record.number("n").is_err() && record.need("none").is_err());
    assert_eq!(record.get("n"), Some("12x"));
}

// ---- structures --------------------------------------------------------------------------------------------------

/// Sets the CRC in the last four bytes of a slot.
fn seal(slot: &mut [u8]) {
    let sum = crc(&slot[..BLOCK_SIZE - 4]);
    slot[BLOCK_SIZE - 4..].copy_from_slice(&sum.to_le_bytes());
}

fn any_id() -> impl Strategy<Value = Id> {
    any::<[u8; 16]>().prop_map(Id)
}

fn any_size() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(MIN_DISK),
        Just(MAX_DISK),
        (1u64..1 << 32).prop_map(|b| b * BLOCK)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn headers(
        layer in any_id(), parent in any_id(), over_layer: bool, depth in 1..=MAX_RANK, size in any_size(),
        created: u64, name in "\\PC{0,60}", flip in 1u8..,
    ) {
        let header = Header::new(layer, parent, over_layer, depth, size, created, &name);
        let mut bytes = header.as_bytes().to_vec();
        let back = Header::decode(&bytes).expect("its own bytes");
        prop_assert_eq!(back.as_bytes(), header.as_bytes());
        prop_assert_eq!(back.name(), name);
        for at in 0..BLOCK_SIZE {
            bytes[at] ^= flip;
            let error = Header::decode(&bytes).err().map(|e| e.kind());
            // Also in the field of the version: a half-written header must not pass for one of a newer version.
            prop_assert_eq!(error, Some(Kind::Corrupt), "byte {} ^ {}", at, flip);
            bytes[at] ^= flip;
        }
        prop_assert!(Header::decode(&bytes[1..]).is_err());
        let refused = |change: &dyn Fn(&mut Header)| {
            let mut h = header;
            change(&mut h);
            let mut bytes = h.as_bytes().to_vec();
            seal(&mut bytes);
            Header::decode(&bytes).err().map(|e| e.kind())
        };
        prop_assert_eq!(refused(&|_| ()), None);
        prop_assert_eq!(refused(&|h| h.version = U32::new(VERSION + 1)), Some(Kind::Version));
        let out_of_range: [&dyn Fn(&mut Header); 9] = [
            &|h| h.magic[7] = b'2',
            &|h| h.version = U32::new(0),
            &|h| h.depth = U32::new(0),
            &|h| h.depth = U32::new(MAX_RANK + 1),
            &|h| h.parent_kind = U32::new(2),
            &|h| h.name_len = U32::new(NAME_FIELD as u32 + 1),
            &|h| h.size = U64::new(0),
            &|h| h.size = U64::new(size - 1),
            &|h| h.size = U64::new(MAX_DISK + BLOCK),
        ];
        for (i, change) in out_of_range.iter().enumerate() {
            prop_assert_eq!(refused(change), Some(Kind::Corrupt), "change {}", i);
        }
        let bad_name = refused(&|h| { h.name[0] = 0xFF; h.name_len = U32::new(1) });
        prop_assert_eq!(bad_name, Some(Kind::Corrupt));
    }

    #[test]
    fn superblocks(
        layer in any_id(), size in any_size(), sequence in 0..MAX_COUNT, generation in 0..MAX_COUNT, next_commit in 0..MAX_COUNT,
        state in STATE_WRITABLE..=STATE_SEALED, name in "\\PC{0,60}", counts in (0..=1u64 << 32, 0..=1u64 << 32, 0..=u64::from(DATA_START)),
        run_slots in prop::collection::vec(1u32..50, 0..=MAX_RUNS), extents in 0..=INLINE_FREE, flip in 1u8..,
    ) {
        let header = Header::new(layer, Id::default(), false, 1, size, 0, "");
        let mut s = Superblock::empty(&header);
        s.sequence = U64::new(sequence);
        s.generation = U64::new(generation);
        s.next_commit = U64::new(next_commit);
        s.state = U32::new(state);
        [s.data_blocks, s.zero_blocks, s.forgotten] = [counts.0, counts.1, counts.2].map(U64::new);
        s.set_name(&name);
        let mut at = DATA_START;
        for (run, slots) in s.runs.iter_mut().zip(&run_slots) {
            run.slot = U32::new(at);
            run.slots = U32::new(*slots);
            run.len = U64::new(u64::from(*slots) * BLOCK - 7);
            run.trailer_len = U32::new(size_of::<RunHeader>() as u32);
            at += slots;
        }
        s.run_count = U32::new(run_slots.len() as u32);
        s.free_count = U32::new(extents as u32);
        s.high_water = U64::new(u64::from(at));
        let bytes = s.encode().to_vec();
        let back = Superblock::decode(&bytes, &layer).expect("its own bytes");
        prop_assert_eq!(back.as_bytes(), &bytes[..]);
        prop_assert_eq!(back.run_refs().len(), run_slots.len());
        prop_assert_eq!(back.name().unwrap_or(""), name);
        let mut flipped = bytes.clone();
        for i in 0..BLOCK_SIZE {
            flipped[i] ^= flip;
            prop_assert!(Superblock::decode(&flipped, &layer).is_err(), "byte {} ^ {}", i, flip);
            flipped[i] ^= flip;
        }
        prop_assert!(Superblock::decode(&bytes, &Id([9; 16])).is_err() || layer == Id([9; 16]));
        let refused = |change: &dyn Fn(&mut Superblock)| {
            let mut s = s;
            change(&mut s);
            Superblock::decode(s.encode(), &layer).is_err()
        };
        prop_assert!(!refused(&|_| ()));
        // Counters that the next change would carry over their end, and more blocks than there can be.
        prop_assert!(refused(&|s| s.sequence = U64::new(MAX_COUNT)));
        prop_assert!(refused(&|s| s.generation = U64::new(u64::MAX)));
        prop_assert!(refused(&|s| s.next_commit = U64::new(u64::MAX)));
        prop_assert!(refused(&|s| s.data_blocks = U64::new((1 << 32) + 1)));
        prop_assert!(refused(&|s| s.zero_blocks = U64::new((1 << 32) + 1)));
        prop_assert!(refused(&|s| s.forgotten = U64::new(s.high_water.get() + 1)));
        if !run_slots.is_empty() {
            prop_assert!(refused(&|s| s.runs[0].trailer_len = U32::new(MAX_TRAILER + 1)));
        }
        if run_slots.len() > 1 {
            prop_assert!(refused(&|s| s.runs[1].slot = s.runs[0].slot), "two runs in one place");
        }
        // A free list of its own, for the changes below.
        let beside = |s: &mut Superblock| {
            s.high_water = U64::new(u64::from(at) + 2);
            s.free_slot = U32::new(at);
            s.free_slots = U32::new(2);
            s.free_count = U32::new(1024);
        };
        prop_assert!(!refused(&beside));
        let bad: [&dyn Fn(&mut Superblock); 19] = [
            &|s| s.magic[0] = 0,
            &|s| s.state = U32::new(0),
            &|s| s.state = U32::new(STATE_SEALED + 1),
            &|s| s.run_count = U32::new(MAX_RUNS as u32 + 1),
            &|s| s.run_count = U32::new(u32::MAX),
            &|s| s.high_water = U64::new(u64::from(DATA_START) - 1),
            &|s| s.high_water = U64::new(u64::from(SLOT_ZERO) + 1),
            &|s| s.size = U64::new(0),
            &|s| s.size = U64::new(MAX_DISK + BLOCK),
            &|s| s.size = U64::new(s.size.get() + 1),
            &|s| s.name_len = U32::new(NAME_FIELD as u32 + 1),
            &|s| { s.name[0] = 0xFF; s.name_len = U32::new(1) },
            &|s| s.free_count = U32::new(INLINE_FREE as u32 + 1),
            &|s| s.free_slots = U32::new(1),
            &|s| { beside(s); s.free_count = U32::new(1025) },
            &|s| { beside(s); s.free_count = U32::new(MAX_FREE_EXTENTS as u32 + 1) },
            &|s| { beside(s); s.free_slots = U32::new(0) },
            &|s| { beside(s); s.free_slots = U32::new(3) },
            &|s| { beside(s); s.free_slot = U32::new(DATA_START - 1) },
        ];
        let run_changes: [&dyn Fn(&mut Superblock); 7] = [
            &|s| s.runs[0].slot = U32::new(DATA_START - 1),
            &|s| s.runs[0].slot = U32::new(u32::MAX),
            &|s| s.runs[0].slots = U32::new(0),
            &|s| s.runs[0].slots = U32::new(u32::MAX),
            &|s| s.runs[0].len = U64::new(u64::MAX),
            &|s| s.runs[0].trailer_len = U32::new(u32::MAX),
            &|s| s.runs[0].trailer_len = U32::new(size_of::<RunHeader>() as u32 - 1),
        ];
        let of_runs: &[&dyn Fn(&mut Superblock)] = if run_slots.is_empty() { &[] } else { &run_changes };
        for (i, change) in bad.iter().chain(of_runs).enumerate() {
            prop_assert!(refused(change), "change {}", i);
        }
    }

    #[test]
    fn commits(
        layer in any_id(), sequence: u64, generation: u64,
        steps in prop::collection::vec((1u32..5000, 0u32..3, DATA_START..SLOT_ZERO, any::<u32>()), 1..400),
        flip in 1u8.., tail in 0usize..5000,
    ) {
        let mut next = 0u32;
        let entries: Vec<CommitEntry> = steps.iter().map(|&(gap, kind, slot, sum)| {
            let lba = next + gap;
            let count = if kind == 0 { 1 + sum % 2000 } else { 1 };
            next = lba + count;
            let pointer = if kind == 0 { Pointer::Zero } else { Pointer::Data { slot: Slot(slot), sum } };
            let entry = CommitEntry::new(Lba(lba), count, pointer);
            assert_eq!(entry.get(), (Lba(lba), count, pointer));
            entry
        }).collect();
        let mut bytes = Vec::new();
        encode_commit(&layer, sequence, generation, &entries, &mut bytes);
        let used = size_of::<CommitHeader>() + entries.len() * size_of::<CommitEntry>();
        prop_assert_eq!(bytes.len(), used.next_multiple_of(BLOCK_SIZE));
        prop_assert_eq!(bytes.len(), commit_slots(entries.len() as u64) as usize * BLOCK_SIZE);
        // It may go on behind the record.
        bytes.resize(bytes.len() + tail, 0xEE);
        let (head, back) = decode_commit(&bytes, &layer).expect("its own bytes");
        prop_assert_eq!((head.sequence.get(), head.generation.get()), (sequence, generation));
        prop_assert_eq!(back.as_bytes(), entries.as_bytes());
        for at in (0..used).step_by(if used > 2000 { 7 } else { 1 }) {
            bytes[at] ^= flip;
            prop_assert!(decode_commit(&bytes, &layer).is_none(), "byte {} ^ {}", at, flip);
            bytes[at] ^= flip;
        }
        prop_assert!(decode_commit(&bytes[..used - 1], &layer).is_none());
        prop_assert!(decode_commit(&bytes, &Id([1; 16])).is_none() || layer == Id([1; 16]));
        // A right CRC over what no writer writes.
        let refused = |change: &dyn Fn(&mut Vec<CommitEntry>)| {
            let mut wrong = entries.clone();
            change(&mut wrong);
            let mut bytes = Vec::new();
            encode_commit(&layer, sequence, generation, &wrong, &mut bytes);
            decode_commit(&bytes, &layer).is_none()
        };
        prop_assert!(!refused(&|_| ()));
        let zero = |lba: u32, n: u32| CommitEntry::new(Lba(lba), n, Pointer::Zero);
        prop_assert!(refused(&|e| e.push(e[0])));
        prop_assert!(refused(&|e| e.push(CommitEntry::new(Lba(u32::MAX), 1, Pointer::Absent))));
        prop_assert!(refused(&|e| e.push(zero(u32::MAX, 0))));
        prop_assert!(refused(&|e| e.push(zero(u32::MAX, 2))));
        prop_assert!(!refused(&|e| e.push(zero(u32::MAX, 1))));
        let overlap = refused(&|e| { e.truncate(1); e.insert(0, zero(0, u32::MAX)) });
        prop_assert!(overlap);
        prop_assert!(refused(&|e| e[0].slot = U32::new(DATA_START - 1)));
    }

    #[test]
    fn what_commits_replaced(layer in any_id(), first in 1u64..1 << 61, time: u64, counts in prop::collection::vec(0usize..30, 1..6), previous in (0u32..9, 0u32..9), flip in 1u8..) {
        let undo = |n: usize| -> Vec<CommitEntry> {
            let of = |i: usize| match i % 3 {
                0 => CommitEntry::new(Lba(i as u32 * 10), 1, Pointer::Data { slot: Slot(DATA_START + i as u32), sum: 7 }),
                1 => CommitEntry::new(Lba(i as u32 * 10), 10, Pointer::Zero),
                _ => CommitEntry::new(Lba(i as u32 * 10), 3, Pointer::Absent),
            };
            (0..n).map(of).collect()
        };
        let steps: Vec<Step> = counts.iter().enumerate().map(|(i, &n)| Step {
            sequence: first + i as u64,
            time: time.wrapping_add(i as u64),
            undo: undo(n),
        }).collect();
        // In the journal.
        let entries = [CommitEntry::new(Lba(3), 1, Pointer::Zero)];
        let mut bytes = Vec::new();
        for undo in [Some(&steps[0].undo[..]), None] {
            encode_commit_with_undo(&layer, (first, 5), time, &entries, undo, &mut bytes);
            let record = decode_record(&bytes, &layer).expect("its own bytes");
            prop_assert_eq!((record.header.sequence.get(), record.header.time.get()), (first, time));
            prop_assert_eq!(record.entries.as_bytes(), entries.as_bytes());
            prop_assert_eq!(record.undo.map(IntoBytes::as_bytes), undo.map(IntoBytes::as_bytes));
            for at in 0..64 + (1 + undo.map_or(0, <[_]>::len)) * 12 {
                bytes[at] ^= flip;
                prop_assert!(decode_record(&bytes, &layer).is_none(), "byte {} ^ {}", at, flip);
                bytes[at] ^= flip;
            }
        }
        // In a segment.
        let mut bytes = SegmentHeader::encode(&layer, &steps, previous);
        let slots = SegmentHeader::slots_of(&steps);
        prop_assert_eq!(bytes.len(), slots as usize * BLOCK_SIZE);
        let header = SegmentHeader::decode(&bytes, &layer, slots).expect("its own bytes");
        prop_assert_eq!((header.first.get(), header.last.get()), (first, first + steps.len() as u64 - 1));
        prop_assert_eq!((header.previous.get(), header.previous_slots.get()), previous);
        let back = header.steps(&bytes).expect("its own bytes");
        prop_assert_eq!(back.len(), steps.len());
        for (a, b) in back.iter().zip(&steps) {
            prop_assert_eq!((a.sequence, a.time, a.undo.as_bytes()), (b.sequence, b.time, b.undo.as_bytes()));
        }
        let used = size_of::<SegmentHeader>() + header.len.get() as usize;
        for at in 0..used {
            bytes[at] ^= flip;
            let found = SegmentHeader::decode(&bytes, &layer, slots).and_then(|h| h.steps(&bytes));
            prop_assert!(found.is_none(), "byte {} ^ {}", at, flip);
            bytes[at] ^= flip;
        }
        prop_assert!(SegmentHeader::decode(&bytes, &Id([1; 16]), slots).is_none() || layer == Id([1; 16]));
        prop_assert!(header.steps(&bytes[..used - 1]).is_none() || header.len.get() == 0);
        // A right CRC over what no writer writes.
        let mut gap = steps.clone();
        gap[0].sequence += 7;
        let bytes = SegmentHeader::encode(&layer, &gap, previous);
        let found = SegmentHeader::decode(&bytes, &layer, slots).and_then(|h| h.steps(&bytes));
        prop_assert!(found.is_none() || steps.len() == 1);
    }

    #[test]
    fn sums_headers(base in any_id(), blocks: u64, flip in 1u8..) {
        let header = SumsHeader::new(base, blocks);
        let mut bytes = header.as_bytes().to_vec();
        prop_assert_eq!(SumsHeader::decode(&bytes, &base).expect("its own bytes").blocks.get(), blocks);
        for at in 0..bytes.len() {
            bytes[at] ^= flip;
            prop_assert!(SumsHeader::decode(&bytes, &base).is_err(), "byte {} ^ {}", at, flip);
            bytes[at] ^= flip;
        }
        prop_assert!(SumsHeader::decode(&bytes[1..], &base).is_err());
        prop_assert!(SumsHeader::decode(&bytes, &Id([1; 16])).is_err() || base == Id([1; 16]));
    }

    #[test]
    fn pointers(slot in DATA_START..SLOT_ZERO, sum: u32, low in 0..DATA_START) {
        for pointer in [Pointer::Absent, Pointer::Zero, Pointer::Data { slot: Slot(slot), sum }] {
            prop_assert_eq!(Pointer::unpack(pointer.pack()), pointer);
            let stored = if pointer == Pointer::Absent { None } else { Some(pointer) };
            prop_assert_eq!(Pointer::from_raw(&pointer.raw()), stored);
        }
        let raw = |slot, sum| RawPointer { slot: U32::new(slot), sum: U32::new(sum) };
        prop_assert_eq!(Pointer::from_raw(&raw(low, sum)), None);
        prop_assert_eq!(Pointer::from_raw(&raw(SLOT_ABSENT, sum)), None);
        prop_assert_eq!(Pointer::from_raw(&raw(SLOT_ZERO, sum | 1)), None);
    }

    /// Whatever stands in a file: an error or a value, never a panic.
    #[test]
    fn random_slots(mut bytes in prop::collection::vec(any::<u8>(), BLOCK_SIZE), layer in any_id(), keep in 0usize..200) {
        prop_assert!(Header::decode(&bytes).is_err());
        prop_assert!(Superblock::decode(&bytes, &layer).is_err());
        prop_assert!(decode_commit(&bytes, &layer).is_none());
        // Random but for a sound beginning and a right CRC.
        let header = Header::new(layer, layer, false, 1, BLOCK, 0, "");
        let mut superblock = Superblock::empty(&header);
        for (sound, which) in [(header.as_bytes().to_vec(), 0), (superblock.encode().to_vec(), 1)] {
            bytes[..keep.max(32)].copy_from_slice(&sound[..keep.max(32)]);
            seal(&mut bytes);
            if which == 0 { drop(Header::decode(&bytes)) } else { drop(Superblock::decode(&bytes, &layer)) }
        }
    }
}

/// The smallest and the largest record.
#[test]
fn record_sizes() {
    assert_eq!(commit_slots(0), 1);
    assert_eq!(commit_slots(336), 1);
    assert_eq!(commit_slots(337), 2);
    let entry = CommitEntry::new_zeroed();
    assert_eq!(entry.as_bytes().len(), 12);
    let _ = (
        U16::new(0),
        RunRef::read_from_bytes(&[0; 48]).expect("48 bytes"),
    );
    assert!(valid_size(MIN_DISK) && valid_size(MAX_DISK));
    assert!(!valid_size(MIN_DISK - 1) && !valid_size(MAX_DISK + BLOCK) && !valid_size(BLOCK + 1));
}

/// Names of any length are cut at a character, not within one.
#[test]
fn long_names_are_cut_between_characters() {
    let name = "ä".repeat(NAME_FIELD);
    let header = Header::new(Id::default(), Id::default(), false, 1, BLOCK, 0, &name);
    assert_eq!(
        Header::decode(header.as_bytes()).expect("sound").name(),
        "ä".repeat(NAME_FIELD / 2)
    );
}
