//! Files that someone made on purpose: every checksum holds, and what stands under it is absurd. Nothing panics, loops or allocates without
//! end, and whatever is refused is refused with a clear error.

use super::*;
use common::Rng;
use forkdisk::error::{Error, Kind};
use forkdisk::format::{self, CommitHeader, Header, RunHeader, RunRef, Superblock};
use forkdisk::io::Dir;
use forkdisk::store::ObjectKind;
use forkdisk::units::Id;
use std::mem::offset_of;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

const SLOT: usize = 4096;

/// Everything a user can do with a store, without looking at what is read. Returns the errors.
fn use_it(root: Arc<dyn Dir>, story: &str) -> Vec<Error> {
    let mut errors = Vec::new();
    let store = match Store::open_on(root, Path::new("/sim"), env(9 << 20)) {
        Ok(store) => store,
        Err(e) => return vec![e],
    };
    let mut buf = vec![0; 3 * SLOT];
    let mut note = |done: Result<()>| errors.extend(done.err());
    note(forkdisk::check::check(&store, None, &Quiet).map(|_| ()));
    note(forkdisk::check::scrub(&store, None, Default::default(), &Quiet).map(|_| ()));
    note(forkdisk::check::repair::plan(&store, &Quiet).map(|_| ()));
    note(store.layers().map(|_| ()));
    note(store.plan_removal(&["image".into()], true).map(|_| ()));
    for name in ["d", "d@s", "f", "new", "u"] {
        let Ok(object) = store.resolve(name).map_err(|e| note(Err(e))) else {
            continue;
        };
        note(store.usage(&object).map(|_| ()));
        note(store.details(&object).map(|_| ()));
        for writable in [false, true] {
            note((|| {
                let writable = writable && object.kind == ObjectKind::Disk;
                let disk = store.open_cow(&object, writable)?;
                let size = disk.size();
                for at in [0, size.min(100 * B), size] {
                    let n = (3 * B).min(at.max(size - at)).min(size);
                    let at = at.min(size - n);
                    disk.read(&mut buf[..n as usize], at)?;
                }
                disk.extents(0, size.min(1 << 30))?;
                if writable {
                    disk.write(&[1; SLOT], 0)?;
                    disk.discard(0, size)?;
                    disk.write(&[2; SLOT], size - B)?;
                    disk.flush()?;
                    disk.checkpoint()?;
                    disk.maintain()?;
                    disk.read(&mut buf[..SLOT], size - B)?;
                    assert!(
                        buf[..SLOT] == [2; SLOT],
                        "{story}: what was written is lost"
                    );
                    disk.close()?;
                }
                Ok(())
            })());
        }
    }
    note(store.snapshot("f", "x", None).map(|_| ()));
    note(store.create(&["y".into()], "d", None).map(|_| ()));
    note(store.gc(false).map(|_| ()));
    for e in &errors {
        let clear = !matches!(e.kind(), Kind::Io | Kind::Interrupted);
        assert!(clear, "{story}: not a clear error: {e:?}");
    }
    errors
}

/// A store with a disk that was not closed, `u`, in which there is a run and a journal.
fn victim() -> SimDisk {
    let (sim, _) = small();
    let store = again(&sim, 2);
    fork(&store, "image", "u");
    let disk = open(&store, "u").expect("u");
    for n in 0..4 {
        disk.write(&[n + 1; 5000], u64::from(n) * 8000)
            .expect("write");
        disk.discard(u64::from(n) * B, B).expect("discard");
        disk.flush().expect("flush");
        if n == 1 {
            disk.checkpoint().expect("checkpoint");
        }
    }
    sim.crash_with(Policy::AllDropped)
}

struct Victim {
    sim: SimDisk,
    path: String,
    bytes: Vec<u8>,
    id: Id,
}

impl Victim {
    fn of(sim: &SimDisk, name: &str) -> Victim {
        let sim = sim.crash_with(Policy::AllDone);
        let id = again(&sim, 3).resolve(name).expect("resolve").id;
        let path = format!("layers/{id}.layer");
        let bytes = sim.read_file(&path).expect("a layer");
        Victim {
            sim,
            path,
            bytes,
            id,
        }
    }
    fn header(&mut self, change: impl FnOnce(&mut Header)) {
        let mut h = Header::read_from_bytes(&self.bytes[..SLOT]).expect("a header");
        change(&mut h);
        h.crc = U32::new(format::crc(&h.as_bytes()[..SLOT - 4]));
        self.bytes[..SLOT].copy_from_slice(h.as_bytes());
    }
    fn superblock(&mut self, change: impl FnOnce(&mut Superblock)) {
        let mut s = common::audit::superblock(&self.bytes).expect("a superblock");
        change(&mut s);
        let bytes = s.encode().to_vec();
        for copy in [1, 2] {
            self.bytes[copy * SLOT..(copy + 1) * SLOT].copy_from_slice(&bytes);
        }
    }
    /// Changes the bytes of the newest run, payload and trailer, and makes all sums fit.
    fn run(&mut self, change: impl FnOnce(&mut Vec<u8>, &RunRef)) {
        let reference = common::audit::superblock(&self.bytes)
            .expect("a superblock")
            .run_refs()[0];
        let at = reference.slot.get() as usize * SLOT;
        let len = reference.len.get() as usize;
        let mut run = self.bytes[at..at + len].to_vec();
        change(&mut run, &reference);
        self.put_run(reference, run);
    }
    fn put_run(&mut self, mut reference: RunRef, mut run: Vec<u8>) {
        let trailer_at = run.len() - reference.trailer_len.get() as usize;
        let (payload, trailer) = run.split_at_mut(trailer_at);
        for (piece, sum) in payload.chunks(SLOT).zip(trailer.chunks_exact_mut(4)) {
            sum.copy_from_slice(&format::crc(piece).to_le_bytes());
        }
        reference.trailer_crc = U32::new(format::crc(trailer));
        reference.len = U64::new(run.len() as u64);
        reference.slots = U32::new(run.len().div_ceil(SLOT) as u32);
        let at = reference.slot.get() as usize * SLOT;
        let end = at + reference.slots.get() as usize * SLOT;
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at..at + run.len()].copy_from_slice(&run);
        self.superblock(|s| {
            s.high_water = U64::new(s.high_water.get().max((end / SLOT) as u64));
            s.runs[0] = reference;
        });
    }
    /// Changes the last record of the journal and makes its sum fit.
    fn record(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        let slots = (4..1024).rev();
        let mut found = slots.filter(|n| {
            self.bytes
                .get(n * SLOT..)
                .is_some_and(|b| format::decode_commit(b, &self.id).is_some())
        });
        // What is no record any more cannot be changed again.
        let Some(at) = found.next().map(|n| n * SLOT) else {
            return;
        };
        let mut record = self.bytes[at..at + SLOT].to_vec();
        change(&mut record);
        let crc = offset_of!(CommitHeader, crc);
        record[crc..crc + 4].fill(0);
        let entries = u32::from_le_bytes([record[40], record[41], record[42], record[43]]);
        let end = (64 + entries as usize % 330 * 12).min(record.len());
        let sum = format::crc(&record[..end]);
        record[crc..crc + 4].copy_from_slice(&sum.to_le_bytes());
        self.bytes[at..at + record.len()].copy_from_slice(&record);
    }
    fn judge(&self, story: &str) -> Vec<Error> {
        let sim = self.sim.crash_with(Policy::AllDone);
        sim.write_file(&self.path, &self.bytes).expect("write");
        use_it(sim.root(), story)
    }
}

#[test]
fn the_victim_is_sound() {
    let sim = victim();
    assert_eq!(use_it(sim.root(), "sound").len(), 0);
}

/// Numbers at the end of their range, in every field of the superblock.
#[test]
fn absurd_superblocks() {
    let sim = victim();
    let mut refused = 0;
    for name in ["d", "u"] {
        for value in [0, 1023, u64::from(u32::MAX) - 2, 1 << 40, u64::MAX] {
            for field in 0..16 {
                let mut v = Victim::of(&sim, name);
                let small = value as u32;
                v.superblock(|s| match field {
                    0 => s.sequence = U64::new(value),
                    1 => s.generation = U64::new(value),
                    2 => s.next_commit = U64::new(value),
                    3 => s.size = U64::new(value),
                    4 => s.data_blocks = U64::new(value),
                    5 => s.zero_blocks = U64::new(value),
                    6 => s.high_water = U64::new(value),
                    7 => s.forgotten = U64::new(value),
                    8 => s.free_slot = U32::new(small),
                    9 => s.free_slots = U32::new(small),
                    10 => s.free_count = U32::new(small),
                    11 => s.run_count = U32::new(small),
                    12 => s.state = U32::new(small),
                    13 => s.name_len = U32::new(small),
                    14 => {
                        s.high_water = U64::new(u64::from(u32::MAX) - 1);
                        s.free_count = U32::new(1);
                        s.free_slot = U32::new(0);
                        s.free_slots = U32::new(0);
                        let extent = &mut s.free_inline[0];
                        extent.slot = U32::new(1024);
                        extent.slots = U32::new(small);
                        s.free_crc = U32::new(format::crc(s.free_inline[..1].as_bytes()));
                    }
                    _ => s.size = U64::new(value / B * B),
                });
                refused += v.judge(&format!("{name} field {field} {value:#x}")).len();
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

/// References to runs that are larger than anything, lie over each other, or are the same.
#[test]
fn absurd_run_references() {
    let sim = victim();
    for name in ["d", "d@s", "u"] {
        for value in [
            0u64,
            1,
            55,
            4095,
            1 << 20,
            u64::from(u32::MAX) - 1024,
            u64::from(u32::MAX),
        ] {
            for field in 0..9 {
                let mut v = Victim::of(&sim, name);
                v.superblock(|s| {
                    s.high_water = U64::new(u64::from(u32::MAX) - 1);
                    let small = U32::new(value as u32);
                    let r = &mut s.runs[0];
                    match field {
                        0 => r.slot = small,
                        1 => r.slots = small,
                        2 => r.len = U64::new(value),
                        3 => r.trailer_len = small,
                        4 => r.pointers = U64::new(value),
                        5 => r.regions = small,
                        6 => {
                            r.slots = small;
                            r.len = U64::new(value * B);
                        }
                        7 => {
                            (r.slots, r.trailer_len) = (small, small);
                            r.len = U64::new(value * B);
                        }
                        _ => {
                            s.run_count = U32::new(48);
                            s.runs = [s.runs[0]; 48];
                        }
                    }
                });
                let story = format!("{name} run field {field} {value:#x}");
                v.judge(&story);
                // The file claims to be as long as that.
                if matches!(field, 6 | 7) && value > 1 << 31 && name != "d@s" {
                    let dir = on_disk(&v, 15 << 40);
                    let root = forkdisk::io::os::OsDir::open(dir.path()).expect("a directory");
                    use_it(Arc::new(root), &story);
                }
            }
        }
    }
}

/// A trailer of zeros as long as a hole: what is believed of it must not be copied before it is looked at.
#[test]
fn a_trailer_that_is_all_hole() {
    let sim = victim();
    // Trailers of 63 MiB each, in a file that takes no space.
    let mut v = Victim::of(&sim, "d");
    let len: u64 = (63 << 20) + 56;
    let mut header = RunHeader::read_from_bytes(&[0; 56]).expect("a header");
    header.magic = format::RUN_MAGIC;
    header.layer = v.id.0;
    header.fences = U32::new(((len - 56) / 16) as u32);
    let mut hasher = crc32fast_of_zeros(len - 56);
    hasher.update(header.as_bytes());
    let sum = hasher.finalize();
    v.superblock(|s| {
        s.high_water = U64::new(u64::from(u32::MAX) - 1);
        s.run_count = U32::new(48);
        let mut r = s.runs[0];
        r.slot = U32::new(1 << 20);
        r.slots = U32::new(len.div_ceil(B) as u32);
        (r.len, r.trailer_len) = (U64::new(len), U32::new(len as u32));
        r.trailer_crc = U32::new(sum);
        for (n, place) in s.runs.iter_mut().enumerate() {
            r.slot = U32::new((1 << 20) + n as u32 * (1 << 15));
            *place = r;
        }
    });
    let dir = on_disk(&v, 1 << 34);
    {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options()
            .write(true)
            .open(dir.path().join(&v.path))
            .expect("open");
        for n in 0..48 {
            let at = (1u64 << 32) + n * (B << 15) + len - 56;
            file.write_all_at(header.as_bytes(), at).expect("write");
        }
    }
    let store = Store::open(dir.path()).expect("a store");
    let object = store.resolve("d").expect("d");
    for writable in [false, true] {
        let e = store.open_disk(&object, writable).err().expect("refused");
        assert_eq!(e.kind(), Kind::Corrupt, "{e:?}");
    }
    assert!(!checked(&store).corruptions.is_empty());
}

/// The store of a victim on the real disk, which maps what a simulated one would have to copy; its layer file `len` bytes long, most of
/// it a hole.
fn on_disk(v: &Victim, len: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for path in v.sim.file_names() {
        let to = dir.path().join(&path);
        std::fs::create_dir_all(to.parent().expect("a parent")).expect("mkdir");
        if path == v.path {
            std::fs::write(&to, &v.bytes).expect("write");
            let file = std::fs::File::options().write(true).open(&to);
            file.and_then(|f| f.set_len(len)).expect("longer");
        } else {
            std::fs::write(&to, v.sim.read_file(&path).expect("a file")).expect("write");
        }
    }
    std::fs::create_dir_all(dir.path().join("run")).expect("mkdir");
    dir
}

fn crc32fast_of_zeros(len: u64) -> crc32fast::Hasher {
    let mut hasher = crc32fast::Hasher::new();
    let zeros = vec![0; 1 << 20];
    let mut left = len;
    while left > 0 {
        let n = left.min(1 << 20);
        hasher.update(&zeros[..n as usize]);
        left -= n;
    }
    hasher
}

/// A small run whose directory says the same over and over: it must not take longer than a run of its size may.
#[test]
fn a_run_that_repeats_itself() {
    use forkdisk::format::{DirEntry, Fence, RawPointer};
    use forkdisk::units::Slot;
    let sim = victim();
    for (what, fences) in [("one body", 1u32), ("one directory", 30_000)] {
        let mut v = Victim::of(&sim, "d");
        let mut payload = vec![0xFF; 64];
        for n in 0..512 {
            let raw = RawPointer {
                slot: U32::new(1024 + n % 8),
                sum: U32::new(n),
            };
            payload.extend_from_slice(raw.as_bytes());
        }
        let directory = payload.len() as u64;
        for n in 0..256 {
            let entry = DirEntry {
                region: U32::new(n),
                count: 512u16.into(),
                flags: 0u16.into(),
                at: U64::new(0),
            };
            payload.extend_from_slice(entry.as_bytes());
        }
        let sums = payload.len().div_ceil(SLOT);
        let mut trailer = vec![0; sums * 4];
        for n in 0..fences {
            let fence = Fence {
                region: U32::new(n),
                entries: U32::new(256),
                at: U64::new(directory),
            };
            trailer.extend_from_slice(fence.as_bytes());
        }
        let header = RunHeader {
            magic: format::RUN_MAGIC,
            layer: v.id.0,
            payload_len: U64::new(payload.len() as u64),
            regions: U32::new(256 * fences),
            sums: U32::new(sums as u32),
            fences: U32::new(fences),
            zero_ranges: U32::new(0),
            last_commit: U64::new(1),
        };
        trailer.extend_from_slice(header.as_bytes());
        let mut reference = common::audit::superblock(&v.bytes).expect("one").runs[0];
        reference.slot = U32::new((v.bytes.len() / SLOT) as u32);
        reference.trailer_len = U32::new(trailer.len() as u32);
        assert_eq!(Slot(reference.slot.get()).at(), v.bytes.len() as u64);
        payload.extend_from_slice(&trailer);
        v.put_run(reference, payload);
        let errors = v.judge(what);
        assert!(errors.iter().any(|e| e.kind() == Kind::Corrupt), "{what}");
    }
}

/// Headers that make circles, or chains without end.
#[test]
fn parents_in_a_circle() {
    let sim = victim();
    let store = again(&sim, 2);
    let ids: Vec<Id> = ["d", "d@s", "f", "new", "u"]
        .iter()
        .map(|n| store.resolve(n).expect("resolve").id)
        .collect();
    for one in &ids {
        for two in &ids {
            for (depth_one, depth_two) in [(1, 1), (2, 1), (1000, 999), (7, 8)] {
                let sim = sim.crash_with(Policy::AllDone);
                for (id, parent, depth) in [(one, two, depth_one), (two, one, depth_two)] {
                    let name = format!("layers/{id}.layer");
                    let mut v = Victim {
                        bytes: sim.read_file(&name).expect("a layer"),
                        sim: sim.clone(),
                        path: name.clone(),
                        id: *id,
                    };
                    v.header(|h| {
                        h.parent = parent.0;
                        h.parent_kind = U32::new(1);
                        h.depth = U32::new(depth);
                    });
                    if v.bytes.len() > 2 * SLOT {
                        v.superblock(|s| s.state = U32::new(format::STATE_SEALED));
                    }
                    sim.write_file(&name, &v.bytes).expect("write");
                }
                let story = format!("{one} and {two}, {depth_one} {depth_two}");
                let errors = use_it(sim.root(), &story);
                assert!(!errors.is_empty(), "{story}");
            }
        }
    }
}

/// Disks of the largest size, over a base of one block.
#[test]
fn headers_of_the_largest_disk() {
    let sim = victim();
    for name in ["new"] {
        for size in [B, 16 << 40] {
            let mut v = Victim::of(&sim, name);
            v.header(|h| h.size = U64::new(size));
            v.judge(&format!("{name} {size}"));
        }
    }
}

/// Random changes, under sums that fit again.
#[test]
fn random_changes_with_good_sums() {
    let sim = victim();
    let rounds = match std::env::var("FORKDISK_DAMAGE") {
        Ok(v) if v == "full" => 20_000,
        _ => 400,
    };
    let mut rng = Rng(42);
    let (mut errors, mut sound) = (0, 0);
    for round in 0..rounds {
        let name = ["d", "d@s", "f", "u", "u"][rng.below(5) as usize];
        let mut v = Victim::of(&sim, name);
        let mut what = Vec::new();
        for _ in 0..=rng.below(3) {
            let kind = rng.below(if name == "u" { 4 } else { 3 });
            let word = rng.next();
            let len = [1, 2, 4, 8][rng.below(4) as usize];
            let value: [u8; 8] = match rng.below(5) {
                0 => [0; 8],
                1 => [0xFF; 8],
                2 => (rng.below(5000)).to_le_bytes(),
                3 => (1u64 << rng.below(64)).to_le_bytes(),
                _ => rng.next().to_le_bytes(),
            };
            what.push((kind, word, len));
            let put = |bytes: &mut [u8], from: usize| {
                if bytes.len() > from + 8 {
                    let at = from + word as usize % (bytes.len() - from - 8);
                    bytes[at..at + len].copy_from_slice(&value[..len]);
                }
            };
            match kind {
                0 => v.header(|h| {
                    let mut bytes = h.as_bytes()[..340].to_vec();
                    put(&mut bytes, 8);
                    h.as_mut_bytes()[..340].copy_from_slice(&bytes);
                }),
                1 => v.superblock(|s| {
                    let mut bytes = s.as_bytes()[..480].to_vec();
                    put(&mut bytes, 8);
                    s.as_mut_bytes()[..480].copy_from_slice(&bytes);
                }),
                2 => {
                    let superblock = common::audit::superblock(&v.bytes);
                    let whole = superblock.is_some_and(|s| {
                        let sound = |r: &RunRef| {
                            let end = u64::from(r.slot.get()) * B + r.len.get();
                            end <= v.bytes.len() as u64 && r.trailer_len.get() >= 56
                        };
                        s.run_refs().first().is_some_and(sound)
                    });
                    if whole {
                        v.run(|run, _| put(run, 0));
                    }
                }
                _ => v.record(|record| put(&mut record[..64 + 6 * 12], 0)),
            }
            // What is no superblock any more cannot be changed again.
            if common::audit::superblock(&v.bytes).is_none() {
                break;
            }
        }
        let found = v.judge(&format!("round {round}: {name} {what:x?}"));
        errors += usize::from(!found.is_empty());
        sound += usize::from(found.is_empty());
    }
    println!("{rounds} random changes with good sums: {errors} refused, {sound} accepted");
    assert!(
        errors > rounds / 10 && sound > rounds / 50,
        "{errors} {sound}"
    );
}
