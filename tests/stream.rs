//! Differences, streams and digests: against a plain model, and what is refused of a stream.
#![allow(missing_docs, reason = "a test")]

mod common;

use common::{Rng, base_image, data, env, read_all};
use forkdisk::convert::stream::is_stream;
use forkdisk::disk::Disk;
use forkdisk::error::{Kind, Result};
use forkdisk::format::stream::{Digest, StreamHeader, StreamRecord, StreamTrailer};
use forkdisk::io::Access;
use forkdisk::io::os::OsDir;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::store::{
    Change, Effort, ImportMode, ImportSource, Object, ObjectKind, Quiet, State, Store, changes,
    write_stream,
};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

const BLOCK: usize = 4096;

fn store_with(seed: u64) -> (SimDisk, Store) {
    let sim = SimDisk::new(seed);
    let store = Store::init_on(sim.root(), Path::new("/sim"), env(seed)).expect("a store");
    (sim, store)
}

fn import(store: &Store, name: &str, image: &[u8]) {
    let mut image = image;
    let source = ImportSource::Reader(&mut image);
    store
        .import(source, name, ImportMode::Copy, &Quiet)
        .expect("import");
}

fn fork(store: &Store, name: &str, from: &str, size: Option<u64>) {
    store.create(&[name.to_string()], from, size).expect("fork");
}

fn change(store: &Store, name: &str, work: impl FnOnce(&dyn Disk)) {
    let disk = store.resolve(name).expect("resolve");
    let disk = store.open_cow(&disk, true).expect("open");
    work(&*disk);
    disk.close().expect("close");
}

fn state(store: &Store, name: &str) -> State {
    let object = store.resolve(name).expect("resolve");
    store.state(&object).expect("state")
}

fn contents(store: &Store, name: &str) -> Vec<u8> {
    read_all(state(store, name).disk()).expect("read")
}

fn digest(store: &Store, name: &str) -> Digest {
    let object = store.resolve(name).expect("resolve");
    let digest = store.digest(&object, Effort::ANY, &Quiet);
    digest.expect("computed").expect("it has one")
}

fn all(lower: Option<&State>, upper: &State) -> Result<Vec<Change>> {
    let mut found = changes(lower, upper);
    let mut all = Vec::new();
    loop {
        let (change, end) = found.advance()?;
        all.extend(change);
        if end {
            return Ok(all);
        }
    }
}

/// What a plain comparison of the bytes says.
fn expected(lower: &[u8], upper: &[u8]) -> Vec<Change> {
    let zeros = [0u8; BLOCK];
    let mut found: Vec<Change> = Vec::new();
    for (i, new) in upper.chunks(BLOCK).enumerate() {
        let old = lower.get(i * BLOCK..(i + 1) * BLOCK).unwrap_or(&zeros);
        if old == new {
            continue;
        }
        let (at, zero) = ((i * BLOCK) as u64, new == zeros);
        match found.last_mut() {
            Some(last) if last.end() == at && last.zero == zero => last.len += BLOCK as u64,
            _ => found.push(Change {
                at,
                len: BLOCK as u64,
                zero,
            }),
        }
    }
    found
}

fn stream(store: &Store, name: &str, since: Option<&str>) -> Vec<u8> {
    let upper = state(store, name);
    let lower = since.map(|since| (state(store, since), digest(store, since)));
    let since = lower.as_ref().map(|(state, digest)| (state, *digest));
    let mut bytes = Vec::new();
    let mut put = |piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    };
    let totals = write_stream(&upper, since, None, &mut put, &Quiet).expect("a stream");
    assert_eq!(totals.bytes, bytes.len() as u64);
    assert_eq!(totals.digest, sha256(&bytes));
    bytes
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest(Sha256::digest(bytes).into())
}

fn take_in(store: &Store, bytes: &[u8], name: &str) -> Result<Object> {
    let mut bytes = bytes;
    store.import_stream(&mut bytes, name, &Quiet)
}

/// Random work on a disk of the store. Some of it writes what is there already, or zeros over zeros.
fn work(store: &Store, name: &str, rng: &mut Rng, ops: u64) {
    change(store, name, |disk| {
        for _ in 0..ops {
            let blocks = disk.size() / BLOCK as u64;
            let at = rng.below(blocks) * BLOCK as u64;
            let len = (1 + rng.below(6)) * BLOCK as u64;
            let len = len.min(disk.size() - at);
            match rng.below(8) {
                0 => disk.discard(at, len).expect("discard"),
                1 => disk.write(&vec![0; len as usize], at).expect("write"),
                2 => {
                    let mut same = vec![0; len as usize];
                    disk.read(&mut same, at).expect("read");
                    disk.write(&same, at).expect("write");
                }
                3 if rng.below(4) == 0 => disk.discard(0, disk.size()).expect("discard"),
                _ => {
                    // Few kinds of blocks: that two disks write the same is no rarity.
                    let seed = 1 + rng.below(5);
                    disk.write(&data(seed, len), at).expect("write");
                }
            }
            if rng.below(5) == 0 {
                disk.flush().expect("flush");
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two chains with a common part, or with different bases: any two of their states differ as their bytes do; and what is exported
    /// here and imported there is the same, and gives the same bytes again.
    #[test]
    fn a_difference_is_one_of_contents(seed in any::<u64>(), blocks in prop_oneof![Just(9u64), Just(60), Just(700)], depth in 1u64..4) {
        let mut rng = Rng(seed);
        let (_sim, store) = store_with(1);
        let image = base_image((blocks * BLOCK as u64 - 1000) as usize);
        import(&store, "base", &image);
        let mut other = image.clone();
        other[BLOCK..2 * BLOCK].fill(7);
        import(&store, "other", &other);
        let mut names = vec!["base".to_string(), "other".to_string()];
        for (disk, from) in [("a", "base"), ("b", "base"), ("c", "other")] {
            let larger = (rng.below(3) == 0).then(|| (blocks + rng.below(700)) * BLOCK as u64);
            fork(&store, disk, from, larger);
            names.push(disk.to_string());
            for i in 0..depth {
                let ops = rng.below(12);
                work(&store, disk, &mut rng, ops);
                let name = format!("{disk}{i}");
                match rng.below(2) {
                    0 => drop(store.commit(disk, &name, None).expect("commit")),
                    _ => drop(store.snapshot(disk, &name, None).expect("snapshot")),
                }
                names.push(store.resolve(&name).map_or_else(|_| format!("{disk}@{name}"), |o| o.name));
            }
            let ops = rng.below(12);
            work(&store, disk, &mut rng, ops);
        }
        let states: Vec<(State, Vec<u8>)> = names.iter().map(|n| (state(&store, n), contents(&store, n))).collect();
        for (lower, old) in &states {
            let (upper, new) = &states[rng.below(states.len() as u64) as usize];
            prop_assert_eq!(all(Some(lower), upper).expect("compared"), expected(old, new));
            prop_assert_eq!(all(None, lower).expect("compared"), expected(&[], old));
        }
        drop(states);
        // There and back again: everything of the bases, and then each layer.
        let (_far, far) = store_with(2);
        for base in ["base", "other"] {
            take_in(&far, &stream(&store, base, None), base).expect("a base");
            prop_assert_eq!(digest(&far, base), digest(&store, base));
        }
        for name in names.iter().filter(|n| !["base", "other", "a", "b", "c"].contains(&n.as_str())) {
            let object = store.resolve(name).expect("there");
            let parent = store.list().expect("listed").into_iter().find(|o| Some(o.id) == object.parent.map(|p| p.id()) && o.kind != ObjectKind::Disk);
            // A layer in between may have no name of its own.
            let Some(parent) = parent else { continue };
            let bytes = stream(&store, name, Some(&parent.name));
            prop_assert_eq!(sha256(&bytes), digest(&store, name));
            let there = name.replace('@', "-");
            let made = take_in(&far, &bytes, &there).expect("an image");
            prop_assert_eq!(made.kind, ObjectKind::Image);
            prop_assert!(contents(&far, &there) == contents(&store, name), "{}", name);
            prop_assert_eq!(digest(&far, &there), digest(&store, name));
            let parent_there = parent.name.replace('@', "-");
            prop_assert!(stream(&far, &there, Some(&parent_there)) == bytes);
        }
        let report = forkdisk::check::check(&far, None, &Quiet).expect("checked");
        prop_assert!(report.leaks.is_empty() && report.corruptions.is_empty(), "{:?}", report);
    }
}

/// A store whose ids and times are others each time.
fn two_stores() -> [Store; 2] {
    [3, 4].map(|seed| {
        let (_, store) = store_with(seed);
        import(&store, "base", &base_image(50 * BLOCK));
        fork(&store, "d", "base", None);
        store
    })
}

#[test]
fn a_digest_is_one_of_contents() {
    let [a, b] = two_stores();
    assert_eq!(digest(&a, "base"), sha256(&base_image(50 * BLOCK)));
    let blocks: Vec<(u64, Vec<u8>)> = (0..20).map(|i| (i * 2, data(i + 1, 4096))).collect();
    change(&a, "d", |disk| {
        for (at, block) in &blocks {
            disk.write(block, at * 4096).expect("write");
        }
        disk.discard(45 * 4096, 4096).expect("discard");
    });
    change(&b, "d", |disk| {
        // Backwards, each twice, with what is no difference in between.
        for (at, block) in blocks.iter().rev() {
            disk.write(&data(99, 4096), at * 4096).expect("write");
            disk.flush().expect("flush");
            disk.write(block, at * 4096).expect("write");
        }
        let mut same = [0; 4096];
        disk.read(&mut same, 41 * 4096).expect("read");
        disk.write(&same, 41 * 4096).expect("write");
        disk.write(&[0; 4096], 45 * 4096).expect("write");
    });
    a.commit("d", "image", Some("here")).expect("commit");
    b.snapshot("d", "other-name", None).expect("snapshot");
    let one = digest(&a, "image");
    assert_eq!(one, digest(&b, "d@other-name"));
    change(&b, "d", |disk| disk.write(&[1; 1], 3).expect("write"));
    b.commit("d", "more", None).expect("commit");
    assert_ne!(one, digest(&b, "more"));
    // The same over another parent is another one.
    fork(&b, "e", "more", None);
    change(&b, "e", |disk| disk.write(&[1; 1], 3).expect("write"));
    b.commit("e", "same-as-more", None).expect("commit");
    assert!(contents(&b, "more") == contents(&b, "same-as-more"));
    assert_ne!(digest(&b, "more"), digest(&b, "same-as-more"));
    let object = b.resolve("d").expect("a disk");
    assert_eq!(b.digest(&object, Effort::ANY, &Quiet).expect("asked"), None);
}

/// Layers that nobody named are no parents: they are there for other reasons than the contents.
#[test]
fn a_digest_passes_over_layers_without_names() {
    let [a, b] = two_stores();
    let halves: [fn(&dyn Disk); 2] = [
        |disk| disk.write(&[3; 8192], 4096).expect("write"),
        |disk| disk.write(&[4; 8192], 8192).expect("write"),
    ];
    change(&a, "d", |disk| halves.iter().for_each(|half| half(disk)));
    a.commit("d", "image", None).expect("commit");
    // A fork of the disk, and one of a snapshot whose name goes.
    change(&b, "d", halves[0]);
    fork(&b, "f", "d", None);
    fork(&b, "e", "d", None);
    change(&b, "e", |disk| disk.write(&[9; 4096], 0).expect("write"));
    b.snapshot("e", "s", None).expect("snapshot");
    change(&b, "e", |disk| {
        let mut base = [0; 4096];
        state(&b, "base").disk().read(&mut base, 0).expect("read");
        disk.write(&base, 0).expect("write");
    });
    let plan = b.plan_removal(&["e@s".to_string()], false).expect("a plan");
    b.remove(&plan).expect("removed");
    for (disk, image) in [("d", "one"), ("e", "two")] {
        change(&b, disk, halves[1]);
        b.commit(disk, image, None).expect("commit");
    }
    let depth = |name| {
        let object = b.resolve(name).expect("there");
        b.details(&object).expect("details").depth
    };
    assert_eq!((depth("one"), depth("two")), (2, 3));
    assert_eq!(digest(&b, "one"), digest(&a, "image"));
    assert_eq!(digest(&b, "two"), digest(&a, "image"));
    let one = b.resolve("one").expect("there");
    let same = b.same_as(&one, digest(&b, "one")).expect("asked");
    assert_eq!(same, ["two"]);
    // It is that of the stream over the parent, too.
    let stream = stream(&b, "two", Some("base"));
    assert_eq!(sha256(&stream), digest(&b, "two"));
}

#[test]
fn digests_are_kept_found_and_forgotten() {
    let [store, _] = two_stores();
    for disk in ["d", "e"] {
        if disk == "e" {
            fork(&store, disk, "base", None);
        }
        change(&store, disk, |d| d.write(&[5; 8192], 0).expect("write"));
        store.snapshot(disk, "s", None).expect("snapshot");
    }
    change(&store, "d", |d| d.write(&[6; 8192], 0).expect("write"));
    store.snapshot("d", "t", None).expect("snapshot");
    let known = |name: &str| {
        let all = store.known_digests().expect("known");
        all.get(name).copied()
    };
    assert_eq!(known("d@s"), None);
    let object = store.resolve("d@s").expect("there");
    let unkept = Effort::ANY.unkept(true);
    let computed = store.digest(&object, unkept, &Quiet).expect("computed");
    assert_eq!(known("d@s"), None, "nothing was to be kept");
    // That of what stands on it is computed with it.
    let upper = digest(&store, "d@t");
    assert_eq!((known("d@s"), known("d@t")), (computed, Some(upper)));
    assert_eq!(digest(&store, "e@s"), digest(&store, "d@s"));
    let same = store.same_as(&object, computed.expect("computed"));
    assert_eq!(same.expect("asked"), ["e@s"]);
    store.rename("d@s", "d@r").expect("renamed");
    assert_eq!(known("d@r"), computed);
    let below = forkdisk::store::Below::Layer(object.id);
    store.forget_digest(below).expect("forgotten");
    assert_eq!((known("d@r"), known("d@t")), (None, None));
    assert_eq!(known("e@s"), computed, "it stands on something else");
    assert_eq!(digest(&store, "d@t"), upper);
}

#[test]
fn a_commit_is_an_image() {
    let [store, _] = two_stores();
    // Of nothing over a base: an image all the same.
    let first = store.commit("d", "first", None).expect("commit");
    assert_eq!(first.kind, ObjectKind::Image);
    assert!(contents(&store, "first") == contents(&store, "base"));
    change(&store, "d", |d| d.write(&[1; 4096], 0).expect("write"));
    let one = store.commit("d", "one", Some("why")).expect("commit");
    assert_eq!(
        (one.kind, one.message.as_deref()),
        (ObjectKind::Image, Some("why"))
    );
    // Nothing was written since: the same layer, under one more name.
    let two = store.commit("d", "two", None).expect("commit");
    assert_eq!(two.id, one.id);
    assert_eq!(
        store.resolve("d").expect("there").parent.map(|p| p.id()),
        Some(one.id)
    );
    // But not of a disk that is larger.
    fork(&store, "large", "one", Some(100 * 4096));
    let large = store.commit("large", "three", None).expect("commit");
    assert_ne!(large.id, one.id);
    assert_eq!(large.size, 100 * 4096);
    let refused = |disk: &str, name: &str| {
        let e = store.commit(disk, name, None).expect_err("refused");
        assert!(e.hint_text().is_some());
        e.kind()
    };
    assert_eq!(refused("d", "one"), Kind::Exists);
    assert_eq!(refused("one", "four"), Kind::Invalid);
    assert_eq!(refused("d", "a@b"), Kind::Invalid);
    assert_eq!(refused("nothing", "four"), Kind::NotFound);
    fork(&store, "e", "one", None);
    assert!(contents(&store, "e") == contents(&store, "d"));
}

/// Its name is lost: the layer knows what it was.
#[test]
fn a_lost_name_of_an_image_comes_back() {
    let (sim, store) = store_with(9);
    import(&store, "base", &base_image(20 * BLOCK));
    fork(&store, "d", "base", None);
    change(&store, "d", |d| d.write(&[1; 4096], 0).expect("write"));
    let image = store.commit("d", "image", None).expect("commit");
    store.names_dir().remove("image").expect("removed");
    store.names_dir().remove("d").expect("removed");
    let store = Store::open_on(sim.root(), Path::new("/sim"), env(10)).expect("a store");
    let steps = forkdisk::check::repair::plan(&store, &Quiet).expect("a plan");
    forkdisk::check::repair::repair(&store, &steps, &Quiet).expect("repaired");
    let found = store.resolve("image").expect("there again");
    assert_eq!((found.kind, found.id), (ObjectKind::Image, image.id));
    assert!(contents(&store, "image") == contents(&store, "d"));
}

/// A store with a base and one small difference to it, and the same base without.
fn small() -> (Store, Store, Vec<u8>) {
    let [from, to] = two_stores();
    change(&from, "d", |disk| {
        disk.write(&data(1, 4096), 0).expect("write");
        disk.write(&data(2, 4096), 3 * 4096).expect("write");
        disk.discard(40 * 4096, 3 * 4096).expect("discard");
    });
    from.commit("d", "image", None).expect("commit");
    let bytes = stream(&from, "image", Some("base"));
    (from, to, bytes)
}

fn names(store: &Store) -> Vec<String> {
    let all = store.list().expect("listed");
    all.into_iter().map(|o| o.name).collect()
}

/// Nothing is left of what was refused: no name, no layer, no file.
fn nothing_left(store: &Store) {
    assert_eq!(names(store), ["base", "d"]);
    assert_eq!(store.layers().expect("layers").sound.len(), 1);
    let garbage = store.gc(true).expect("gc");
    assert!(
        garbage.layers.is_empty() && garbage.files.is_empty(),
        "{garbage:?}"
    );
}

#[test]
fn a_damaged_stream_is_refused_and_leaves_nothing() {
    let (_from, to, bytes) = small();
    let refused = |bytes: &[u8], what: &str| {
        let e = take_in(&to, bytes, "x").expect_err(what);
        assert!(e.hint_text().is_some(), "{what}: {e}");
        e.kind()
    };
    // Each byte of what is not data, and some of the data; any sum covers each of them.
    let heads = 128 + 2 * 32 + 32 + 64;
    assert_eq!(bytes.len(), heads + 2 * BLOCK);
    let data = [160..160 + BLOCK, 192 + BLOCK..192 + 2 * BLOCK];
    let every = |at: &usize| at.is_multiple_of(97) || !data.iter().any(|d| d.contains(at));
    for at in (0..bytes.len()).filter(every) {
        let mut wrong = bytes.clone();
        wrong[at] ^= 1 << (at % 8);
        let kind = refused(&wrong, &format!("byte {at}"));
        assert!(
            matches!(kind, Kind::Corrupt | Kind::Invalid),
            "{at}: {kind:?}"
        );
    }
    for len in (0..bytes.len()).filter(every) {
        assert_eq!(
            refused(&bytes[..len], &format!("cut to {len}")),
            Kind::Corrupt
        );
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(refused(&longer, "appended"), Kind::Corrupt);
    // Both records of data, the other way round; and one of them twice or not at all.
    let record = 32 + BLOCK;
    let [first, second] = [
        &bytes[128..128 + record],
        &bytes[128 + record..128 + 2 * record],
    ];
    let rest = &bytes[128 + 2 * record..];
    for middle in [&[second, first][..], &[first, first], &[second], &[first]] {
        let mut wrong = bytes[..128].to_vec();
        middle
            .iter()
            .for_each(|piece| wrong.extend_from_slice(piece));
        wrong.extend_from_slice(rest);
        assert_eq!(refused(&wrong, "records"), Kind::Corrupt);
    }
    nothing_left(&to);
    take_in(&to, &bytes, "x").expect("the stream itself");
}

/// Whoever took it for a raw image would not notice.
#[test]
fn a_damaged_beginning_is_still_that_of_a_stream() {
    let (_from, to, bytes) = small();
    for at in 0..64 {
        let mut wrong = bytes.clone();
        wrong[at / 8] ^= 1 << (at % 8);
        assert!(is_stream(&wrong), "bit {at}");
        let e = take_in(&to, &wrong, "x").expect_err("a damaged stream");
        assert_eq!(e.kind(), Kind::Corrupt, "bit {at}: {e}");
    }
    assert!((1..8).all(|len| is_stream(&bytes[..len])));
    let images: [&[u8]; 5] = [b"", b"FE", &[0; 8], b"FDLAYER1", b"\xebX\x90mkfs.f"];
    assert!(images.iter().all(|image| !is_stream(image)));
}

/// A header, records and a trailer that fit each other, whatever they say.
fn forged(header: StreamHeader, records: &[(u64, u64, Option<&[u8]>)]) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    let mut total = 0;
    for (at, len, data) in records {
        bytes.extend_from_slice(StreamRecord::new(*at, *len, *data).as_bytes());
        bytes.extend_from_slice(data.unwrap_or_default());
        total += data.map_or(0, <[u8]>::len) as u64;
    }
    let trailer = StreamTrailer::new(records.len() as u64, total, sha256(&bytes));
    bytes.extend_from_slice(trailer.as_bytes());
    bytes
}

#[test]
fn a_stream_is_not_trusted() {
    let [to, _] = two_stores();
    let base = digest(&to, "base");
    let size = 50 * 4096u64;
    let since = Some((base, size));
    let block = [3u8; BLOCK];
    let refused = |bytes: Vec<u8>, wanted: Kind, what: &str| {
        let e = take_in(&to, &bytes, "x").expect_err(what);
        assert_eq!(e.kind(), wanted, "{what}: {e}");
    };
    for (at, len, what) in [
        (1, 4096, "no block"),
        (0, 4095, "half a block"),
        (0, 0, "nothing"),
        (size, 4096, "past the end"),
        (u64::MAX - 4095, 4096, "past all ends"),
        (4096, u64::MAX - 4095, "without an end"),
        (0, 1 << 40, "larger than it is"),
    ] {
        let records = [(at, len, None)];
        refused(
            forged(StreamHeader::new(size, since), &records),
            Kind::Corrupt,
            what,
        );
        let records = [(at, len, Some(&block[..]))];
        refused(
            forged(StreamHeader::new(size, since), &records),
            Kind::Corrupt,
            what,
        );
    }
    let order = [(8192, 4096, Some(&block[..])), (4096, 4096, None)];
    refused(
        forged(StreamHeader::new(size, since), &order),
        Kind::Corrupt,
        "order",
    );
    let over = [(0, 8192, None), (4096, 4096, None)];
    refused(
        forged(StreamHeader::new(size, since), &over),
        Kind::Corrupt,
        "overlap",
    );
    for sizes in [
        (0, since),
        (4097, since),
        (1 << 60, since),
        (0, None),
        (1 << 60, None),
    ] {
        let header = StreamHeader::new(sizes.0, sizes.1);
        refused(forged(header, &[]), Kind::Corrupt, "size");
    }
    let header = StreamHeader::new(size, Some((base, 4097)));
    refused(forged(header, &[]), Kind::Corrupt, "size of the parent");
    let header = StreamHeader::new(size, Some((base, size + 4096)));
    refused(forged(header, &[]), Kind::NotFound, "another size");
    let header = StreamHeader::new(size, Some((Digest([1; 32]), size)));
    refused(forged(header, &[]), Kind::NotFound, "another parent");
    let zeros = forged(StreamHeader::new(size, None), &[(0, 4096, None)]);
    refused(zeros, Kind::Corrupt, "zeros over nothing");
    let past = forged(StreamHeader::new(100, None), &[(0, 4096, Some(&block))]);
    refused(past, Kind::Corrupt, "data past the end");
    let mut newer = StreamHeader::new(size, since);
    newer.version = 2.into();
    let sum = forkdisk::format::crc(&newer.as_bytes()[..124]);
    newer.crc = sum.into();
    refused(forged(newer, &[]), Kind::Version, "a newer version");
    nothing_left(&to);
    // A larger one: what the parent had past its end is not there.
    let larger = forged(
        StreamHeader::new(2 * size, since),
        &[(size, 4096, Some(&block))],
    );
    take_in(&to, &larger, "x").expect("taken");
    let mut wanted = contents(&to, "base");
    wanted.extend_from_slice(&block);
    wanted.resize(2 * size as usize, 0);
    assert!(contents(&to, "x") == wanted);
}

/// What is larger or smaller than its parent, and back.
#[test]
fn sizes_travel() {
    let [store, far] = two_stores();
    fork(&store, "large", "base", Some(3000 * 4096));
    change(&store, "large", |d| {
        d.write(&[1; 4096], 2999 * 4096).expect("write");
    });
    store.commit("large", "image", None).expect("commit");
    let bytes = stream(&store, "image", Some("base"));
    assert_eq!(
        take_in(&far, &bytes, "image").expect("taken").size,
        3000 * 4096
    );
    assert!(contents(&far, "image") == contents(&store, "image"));
    // The base since the larger image: smaller.
    let back = stream(&store, "base", Some("image"));
    let made = take_in(&far, &back, "small").expect("taken");
    assert_eq!(made.size, 50 * 4096);
    assert!(contents(&far, "small") == contents(&store, "base"));
    // And the image again over that: what it hides does not come back.
    let again = stream(&far, "image", Some("small"));
    take_in(&far, &again, "again").expect("taken");
    assert!(contents(&far, "again") == contents(&far, "image"));
    // Nor in what becomes larger.
    fork(&far, "grown", "small", Some(3000 * 4096));
    let mut grown = contents(&store, "base");
    grown.resize(3000 * 4096, 0);
    assert!(contents(&far, "grown") == grown);
    let known = digest(&far, "small");
    assert_eq!(digest(&store, "base"), digest(&far, "base"));
    assert_ne!(known, digest(&far, "base"));
}

/// What is not looked at is not read: a disk of 16 TiB with a hundred changed blocks.
#[test]
fn a_huge_disk_takes_no_longer_than_its_changes() {
    let (_sim, store) = store_with(5);
    import(&store, "base", &base_image(10 * BLOCK));
    fork(&store, "d", "base", Some(16 << 40));
    store.snapshot("d", "s", None).expect("snapshot");
    let blocks: Vec<u64> = (0..100).map(|i| i * 40_000_000 + 5).collect();
    change(&store, "d", |d| {
        d.discard(1 << 40, 1 << 40).expect("discard");
        for at in &blocks {
            d.write(&data(at * 7 + 1, 4096), at * 4096).expect("write");
        }
    });
    let (lower, upper) = (state(&store, "d@s"), state(&store, "d"));
    let found = all(Some(&lower), &upper).expect("compared");
    let wanted: Vec<Change> = blocks
        .iter()
        .map(|at| Change {
            at: at * 4096,
            len: 4096,
            zero: false,
        })
        .collect();
    assert_eq!(found, wanted);
}

/// Nobody has a name for it until it is whole; and what a dead import left `gc` takes away, but nothing of one that lives.
#[test]
fn what_an_import_left_goes() {
    struct Dies<'a>(&'a [u8], &'a Store, u32);
    impl std::io::Read for Dies<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let n = std::io::Read::read(&mut self.0, into)?;
            self.2 += 1;
            if self.2 == 5 {
                assert_eq!(names(self.1), ["base", "d"]);
                let running = self.1.gc(false).expect("gc");
                assert!(running.files.is_empty(), "{running:?}");
                let report = forkdisk::check::check(self.1, None, &Quiet).expect("checked");
                assert!(report.leaks.is_empty(), "{report:?}");
            }
            Ok(n)
        }
    }
    let (_from, to, bytes) = small();
    let mut dies = Dies(&bytes, &to, 0);
    to.import_stream(&mut dies, "x", &Quiet).expect("imported");
    assert!(dies.2 > 5);
    let dir = to.layers_dir();
    let left = ".tmp-00000000000000000000000000000001.layer";
    drop(
        dir.open(left, forkdisk::io::Access::CreateNew)
            .expect("made"),
    );
    let report = forkdisk::check::check(&to, None, &Quiet).expect("checked");
    assert_eq!(report.leaks.len(), 1);
    assert_eq!(to.gc(false).expect("gc").files, [format!("layers/{left}")]);
}

/// An interrupt leaves nothing, wherever it comes.
#[test]
fn an_interrupted_import_leaves_nothing() {
    struct After(std::sync::atomic::AtomicU64, u64);
    impl forkdisk::store::Progress for After {
        fn update(&self, _: u64, _: u64) -> bool {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < self.1
        }
    }
    let (_from, to, bytes) = small();
    for after in 0..3 {
        let progress = After(Default::default(), after);
        let mut from = &bytes[..];
        let e = to.import_stream(&mut from, "x", &progress);
        assert_eq!(e.expect_err("interrupted").kind(), Kind::Interrupted);
        nothing_left(&to);
    }
}

/// The power goes at each operation of an import: what is found is the whole image or no trace of it, and the image if it was acknowledged.
#[test]
fn a_cut_import_leaves_the_image_or_nothing() {
    let (from, _, bytes) = small();
    let image = contents(&from, "image");
    let (before, store) = store_with(11);
    import(&store, "base", &base_image(50 * BLOCK));
    drop(store);
    let mut found = [0, 0];
    for cut in 0.. {
        let sim = before.crash_with(Policy::AllDone);
        let to = Store::open_on(sim.root(), Path::new("/sim"), env(12)).expect("a store");
        sim.cut_at(sim.ops() + cut);
        let done = take_in(&to, &bytes, "x").is_ok();
        drop(to);
        let whole = !sim.is_off();
        assert!(done || !whole);
        for left in [
            sim.crash_with(Policy::AllDone),
            sim.crash_with(Policy::AllDropped),
            sim.crash(cut),
            sim.kill(),
        ] {
            let to = Store::open_on(left.root(), Path::new("/sim"), env(13)).expect("a store");
            let names = names(&to);
            let there = names.contains(&"x".to_string());
            assert!(there || !done, "cut {cut}");
            found[usize::from(there)] += 1;
            to.gc(false).expect("gc");
            let report = forkdisk::check::check(&to, None, &Quiet).expect("checked");
            assert!(
                report.leaks.is_empty() && report.corruptions.is_empty(),
                "cut {cut}: {report:?}"
            );
            match there {
                true => assert!(contents(&to, "x") == image, "cut {cut}"),
                false => assert_eq!(to.layers().expect("layers").sound.len(), 0, "cut {cut}"),
            }
        }
        if whole {
            break;
        }
    }
    assert!(found[0] > 20 && found[1] > 4, "{found:?}");
}

/// A disk is looked at while somebody writes to it and flushes: what is seen is one flush as a whole, never older than the last one before
/// the look, or it is an error.
#[test]
fn a_look_at_a_busy_disk_shows_one_flush() {
    const BLOCKS: usize = 48;
    let dir = tempfile::tempdir().expect("a directory");
    let root = Arc::new(OsDir::open(dir.path()).expect("opened"));
    let store = Store::init_on(root, dir.path(), env(20)).expect("a store");
    import(&store, "base", &base_image(BLOCKS * BLOCK));
    fork(&store, "d", "base", None);
    let object = store.resolve("d").expect("there");
    let running = store.open_cow(&object, true).expect("open");
    let (done, end) = (AtomicU64::new(0), AtomicBool::new(false));
    let (mut seen, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1.. {
                for i in 0..BLOCKS {
                    let block = [n as u8; BLOCK];
                    running.write(&block, (i * BLOCK) as u64).expect("write");
                }
                running.flush().expect("flush");
                done.store(n, SeqCst);
                if n % 17 == 0 {
                    running.checkpoint().expect("checkpoint");
                }
                if n % 5 == 0 {
                    running.maintain().expect("maintain");
                }
                if end.load(SeqCst) {
                    return;
                }
            }
        });
        let lower = state(&store, "base");
        let deadline = Instant::now() + Duration::from_secs(20);
        while seen < 60 && Instant::now() < deadline {
            let before = done.load(SeqCst);
            if before == 0 {
                continue;
            }
            let looked = store.live_state(&object).and_then(|state| {
                let found = all(Some(&lower), &state)?;
                Ok((read_all(state.disk())?, found))
            });
            let Ok((bytes, found)) = looked else {
                failed += 1;
                continue;
            };
            seen += 1;
            let stamp = bytes[0];
            assert!(bytes.iter().all(|b| *b == stamp), "a mixture");
            let after = done.load(SeqCst) + 1;
            assert!(
                (before..=after).any(|n| n as u8 == stamp),
                "{stamp}: {before}..{after}"
            );
            let whole: u64 = found.iter().map(|c| c.len).sum();
            assert_eq!(whole, (BLOCKS * BLOCK) as u64);
        }
        end.store(true, SeqCst);
    });
    assert!(seen >= 20, "seen {seen} times, not {failed} times");
}

/// The host lost some blocks of a base: where data was is a hole. Nobody takes it for zeros: not who sends, not who copies.
#[test]
fn a_hole_where_data_was_is_no_zeros() {
    let (sim, store) = store_with(9);
    let mut image = data(9, 700 * BLOCK as u64);
    image[600 * BLOCK..650 * BLOCK].fill(0);
    import(&store, "base", &image);
    fork(&store, "d", "base", None);
    change(&store, "d", |disk| {
        disk.write(&[7; BLOCK], 0).expect("write")
    });
    store.snapshot("d", "s", None).expect("snapshot");
    let base = store.resolve("base").expect("resolve").id;
    let dir = sim.root().subdir("bases").expect("bases");
    let dir = dir.subdir(&base.to_string()).expect("a base");
    let file = dir.open("image", Access::Write).expect("an image");
    // The first of them follows data, the last is the end of the image.
    for (at, n) in [(100, 3), (649, 2), (699, 1)] {
        let (at, len) = (at * BLOCK as u64, n * BLOCK);
        file.punch(at, len as u64).expect("lost");
        let store = Store::open_on(sim.root(), Path::new("/sim"), env(10)).expect("opened");
        let state = state(&store, "d");
        let sent = write_stream(&state, None, None, &mut |_| Ok(()), &Quiet);
        assert_eq!(sent.expect_err("damage").kind(), Kind::Corrupt);
        drop(state);
        let made = store.flatten("d@s", &Quiet);
        assert_eq!(made.expect_err("damage").kind(), Kind::Corrupt);
        let bytes = &image[at as usize..][..len];
        file.write_at(bytes, at).expect("restored");
    }
    // Zeros may be stored or not, and are the same.
    file.write_at(&[0; BLOCK], 620 * BLOCK as u64)
        .expect("stored");
    let store = Store::open_on(sim.root(), Path::new("/sim"), env(10)).expect("opened");
    let before = contents(&store, "d");
    store.flatten("d@s", &Quiet).expect("flattened");
    assert!(contents(&store, "d") == before);
}
