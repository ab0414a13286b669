//! What is fuzzed: every decoder, the doors that take bytes from others, and whole files under recovery. One function a target: bytes in,
//! and nothing may panic, loop, or take memory without end; where something is decoded it must hold what it promises.
//!
//! A fuzzer does not guess checksums: most targets look at their input as it is, and again with sums that fit.
//!
//! Used by the fuzzer (`tools/fuzz`) and, with the corpus, by the test suite.

use forkdisk::convert::qcow2::image::Image;
use forkdisk::daemon::protocol;
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Kind, Result};
use forkdisk::format::stream::{Digest, StreamHeader, StreamRecord, StreamTrailer};
use forkdisk::format::text::Record;
use forkdisk::format::{
    self, CommitHeader, Header, Pointer, RunHeader, RunRef, SumsHeader, Superblock,
};
use forkdisk::io::Access;
use forkdisk::io::sim::{Policy, SimDisk};
use forkdisk::layer::{Layer, ReadLayer, State};
use forkdisk::map::run::{Builder, Run};
use forkdisk::map::{Item, Memtable, merge};
use forkdisk::serve::files::Files;
use forkdisk::serve::fuse::{Init, Negotiated, Options, Session, abi};
use forkdisk::store::names::{self, NameRecord};
use forkdisk::store::{Content, Effort, Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::{Id, Lba, Region, Slot};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Takes an input.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const ALL: &[(&str, Target)] = &[
    ("header", header),
    ("superblock", superblock),
    ("commit", commit),
    ("run", run),
    ("map", map),
    ("text", text),
    ("names", names),
    ("protocol", protocol),
    ("fuse", fuse),
    ("layer", layer),
    ("store", store),
    ("stream", stream),
    ("qcow2", qcow2),
];

/// Runs one of them.
pub fn run_one(name: &str, data: &[u8]) {
    let target = ALL.iter().find(|t| t.0 == name).expect("a target");
    target.1(data);
}

const SLOT: usize = 4096;

/// Takes numbers off the front of the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(n.min(self.0.len()));
        self.0 = later;
        now
    }
    fn number<const N: usize>(&mut self) -> u64 {
        let mut raw = [0; 8];
        let bytes = self.bytes(N);
        raw[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(raw)
    }
    fn byte(&mut self) -> u8 {
        self.number::<1>() as u8
    }
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A slot that begins with the input and ends with the sum of what is before it.
fn sealed(data: &[u8], magic: &[u8; 8]) -> Vec<u8> {
    let mut slot = data[..data.len().min(SLOT)].to_vec();
    slot.resize(SLOT, 0);
    slot[..8].copy_from_slice(magic);
    seal(&mut slot);
    slot
}

fn seal(slot: &mut [u8]) {
    let sum = format::crc(&slot[..SLOT - 4]);
    slot[SLOT - 4..SLOT].copy_from_slice(&sum.to_le_bytes());
}

fn header(data: &[u8]) {
    let _ = Header::decode(data);
    if let Ok(h) = Header::decode(&sealed(data, &format::HEADER_MAGIC)) {
        assert!(h.name().len() <= format::NAME_FIELD);
        assert!(format::valid_size(h.size.get()));
    }
    let mut head = [0; 36];
    let n = data.len().min(36);
    head[..n].copy_from_slice(&data[..n]);
    head[..8].copy_from_slice(&format::SUMS_MAGIC);
    let mut id = [0; 16];
    id.copy_from_slice(&head[8..24]);
    let sum = format::crc(&head[..32]);
    head[32..].copy_from_slice(&sum.to_le_bytes());
    assert!(SumsHeader::decode(&head, &Id(id)).is_ok());
    let _ = SumsHeader::decode(data, &Id(id));
}

fn superblock(data: &[u8]) {
    let slot = sealed(data, &format::SUPER_MAGIC);
    let mut id = [0; 16];
    id.copy_from_slice(&slot[16..32]);
    let _ = Superblock::decode(data, &Id(id));
    if let Ok(mut s) = Superblock::decode(&slot, &Id(id)) {
        for r in s.run_refs() {
            let end = u64::from(r.slot.get()) + u64::from(r.slots.get());
            assert!(end <= s.high_water.get());
        }
        let _ = s.name();
        assert!(s.encode() == slot, "what is decoded is written as it was");
    }
}

fn commit(data: &[u8]) {
    let mut record = data.to_vec();
    let head = size_of::<CommitHeader>();
    if record.len() >= head {
        let mut id = [0; 16];
        id.copy_from_slice(&record[24..40]);
        let _ = format::decode_commit(&record, &Id(id));
        record[..8].copy_from_slice(&format::COMMIT_MAGIC);
        let entries = ((record.len() - head) / 12) as u32;
        record[40..44].copy_from_slice(&entries.to_le_bytes());
        record[44..48].copy_from_slice(&format::commit_slots(entries.into()).to_le_bytes());
        record[56..60].fill(0);
        let sum = format::crc(&record[..head + entries as usize * 12]);
        record[56..60].copy_from_slice(&sum.to_le_bytes());
        if let Some((_, entries)) = format::decode_commit(&record, &Id(id)) {
            let mut table = Memtable::new();
            let mut next = 0;
            for entry in entries {
                let (lba, count, pointer) = entry.get();
                assert!(u64::from(lba.0) >= next && pointer != Pointer::Absent);
                next = u64::from(lba.0) + u64::from(count);
                assert!(next <= 1 << 32);
                table.apply(lba, count, pointer);
            }
            assert!(table.items().all(|i| i.is_ok()));
        }
        // The same bytes as a record with undo entries.
        record[..8].copy_from_slice(&format::COMMIT_HISTORY_MAGIC);
        let undo = entries / 2;
        record[40..44].copy_from_slice(&(entries - undo).to_le_bytes());
        record[60..64].copy_from_slice(&undo.to_le_bytes());
        record[56..60].fill(0);
        let sum = format::crc(&record[..head + entries as usize * 12]);
        record[56..60].copy_from_slice(&sum.to_le_bytes());
        if let Some(record) = format::decode_record(&record, &Id(id)) {
            let undo = record.undo.unwrap_or_default();
            let mut known = forkdisk::map::undo::Undo::default();
            undo.iter().for_each(|e| known.add(e));
            let ordered = forkdisk::map::undo::in_order(undo.to_vec());
            let blocks: u64 = ordered.iter().map(|e| u64::from(e.get().1)).sum();
            assert_eq!(known.blocks(), blocks);
        }
    }
}

/// Payload, then what is to be the trailer; sums and lengths are made to fit.
fn run(data: &[u8]) {
    let mut input = Input(data);
    let layer = Id([7; 16]);
    let payload_len = (input.number::<2>() as usize).min(data.len());
    let (fences, ranges) = (input.byte() as usize % 8, input.byte() as usize % 4);
    let mut payload = input.bytes(payload_len).to_vec();
    payload.resize(payload_len, 0);
    let mut trailer: Vec<u8> = payload
        .chunks(format::SUM_PIECE)
        .flat_map(|piece| format::crc(piece).to_le_bytes())
        .collect();
    let rest = fences * 16 + ranges * 8;
    let mut tables = input.bytes(rest).to_vec();
    tables.resize(rest, 0);
    trailer.extend_from_slice(&tables);
    let header = RunHeader {
        magic: format::RUN_MAGIC,
        layer: layer.0,
        payload_len: U64::new(payload_len as u64),
        regions: U32::new(input.number::<4>() as u32),
        sums: U32::new(payload_len.div_ceil(format::SUM_PIECE) as u32),
        fences: U32::new(fences as u32),
        zero_ranges: U32::new(ranges as u32),
        last_commit: U64::new(1),
    };
    trailer.extend_from_slice(header.as_bytes());
    let mut reference = RunRef::read_from_bytes(&[0; size_of::<RunRef>()]).expect("zeros");
    reference.slot = U32::new(format::DATA_START);
    reference.trailer_len = U32::new(trailer.len() as u32);
    reference.trailer_crc = U32::new(format::crc(&trailer));
    let mut bytes = payload;
    bytes.extend_from_slice(&trailer);
    reference.len = U64::new(bytes.len() as u64);
    let Ok(run) = Run::open(&bytes[..], reference, &layer) else {
        return;
    };
    let _ = run.verify();
    let mut last = 0;
    for item in run.items(Region(0)) {
        let Ok(item) = item else { break };
        assert!(item.start() >= last || last == 0, "out of order");
        last = item.end();
        if let Item::Region(region, map) = &item
            && let Ok(found) = run.region(*region)
        {
            assert!(found.is_none_or(|f| f == *map || map.is_empty()));
        }
    }
    for region in [0, 1, last, u32::MAX] {
        let _ = run.region(Region(region));
        let _ = run.may_touch(region, region.saturating_add(3));
    }
}

/// Changes of a map, and a run of them: both say the same of every block.
fn map(data: &[u8]) {
    let mut input = Input(data);
    let (mut table, mut older) = (Memtable::new(), Memtable::new());
    let mut model: BTreeMap<u32, Pointer> = BTreeMap::new();
    let mut n = 0;
    while !input.is_empty() && n < 200 {
        n += 1;
        let lba = (input.number::<2>() % 4000) as u32;
        let kind = input.byte();
        let count = match kind {
            0..=99 => 1,
            _ => 1 + (input.number::<2>() % 1500) as u32,
        };
        let pointer = match kind {
            0..=99 => Pointer::Data {
                slot: Slot(format::DATA_START + n),
                sum: n,
            },
            _ => Pointer::Zero,
        };
        // The first changes go into an older map.
        if n < 20 { &mut older } else { &mut table }.apply(Lba(lba), count, pointer);
        model.extend((lba..lba + count).map(|l| (l, pointer)));
    }
    let mut bytes = Vec::new();
    let mut builder = Builder::new(|piece: &[u8]| {
        bytes.extend_from_slice(piece);
        Ok(())
    });
    for item in merge(vec![table.items(), older.items()]) {
        builder
            .push(&item.expect("from memory"))
            .expect("in memory");
    }
    let layer = Id([1; 16]);
    let Some(reference) = builder.finish(&layer, 1).expect("in memory") else {
        assert!(model.is_empty());
        return;
    };
    let run = Run::open(&bytes[..], reference, &layer).expect("its own bytes");
    run.verify().expect("its own bytes");
    for region in 0..12 {
        let found = run.region(Region(region)).expect("its own bytes");
        for index in 0..512 {
            let lba = Region(region).lba(index);
            let expected = model.get(&lba.0).copied().unwrap_or(Pointer::Absent);
            let is = found.as_ref().map_or(Pointer::Absent, |f| f.get(index));
            assert!(is == expected, "block {lba}: {is:?} for {expected:?}");
        }
    }
}

fn text(data: &[u8]) {
    let _ = Record::peek_number(data, "format");
    let mut summed = data.to_vec();
    if !summed.ends_with(b"\n") {
        summed.push(b'\n');
    }
    let sum = format::crc(&summed);
    summed.extend_from_slice(format!("crc32 = \"{sum:08x}\"\n").as_bytes());
    for bytes in [data, &summed[..]] {
        if let Ok(record) = Record::decode(bytes) {
            let again = Record::decode(&record.encode()).expect("its own bytes");
            assert!(again == record, "{record:?} comes back as {again:?}");
        }
        if let Ok(record) = NameRecord::decode(bytes, "web-1") {
            let again = NameRecord::decode(&record.encode("web-1"), "web-1");
            assert!(again.expect("its own bytes") == record);
        }
    }
}

fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if names::check_part(text).is_ok() {
        assert!(!text.contains(['/', '@', '\0', '\n']) && !text.starts_with(['.', '-']));
        assert!((1..=format::MAX_NAME).contains(&text.len()));
    }
    if let Ok((disk, snap)) = names::split_snapshot(text) {
        assert!(format!("{disk}@{snap}") == text && names::check_part(snap).is_ok());
    }
    let _ = names::check_message(Some(text));
    if let Some(id) = Id::parse(text) {
        assert!(id.to_string() == text);
    }
    let _ = forkdisk::cli::render::size::parse_size(text);
    let _ = text.parse::<forkdisk::cli::render::size::SizeArg>();
}

fn protocol(data: &[u8]) {
    let mut reader = data;
    // A conversation ends with the first line that makes no sense.
    while let Ok(Some(value)) = protocol::receive(&mut reader) {
        let _ = protocol::success(value.clone()).map_err(|e| protocol::failure(&e));
        if let Ok(attached) = protocol::attached(&value) {
            let again = protocol::attached(&protocol::attached_json(&attached));
            let again = again.expect("its own words");
            assert!(again.name == attached.name && again.size == attached.size);
        }
        if let Ok(object) = protocol::object(&value) {
            let again = protocol::object(&protocol::object_json(&object));
            assert!(again.expect("its own words") == object);
        }
        for key in ["op", "name", "version", "disks", "size"] {
            let _ = protocol::text(&value, key).map(protocol::via_of);
            let _ = protocol::number(&value, key);
            let _ = protocol::flag(&value, key);
        }
        let mut line = Vec::new();
        protocol::send(&mut line, &value).expect("memory");
        let again = protocol::receive(&mut &line[..]).expect("its own words");
        // Not compared: a number with a fraction comes back rounded, and none is ever sent.
        assert!(again.is_some());
    }
}

// ---- FUSE ------------------------------------------------------------------------------------------------------

/// A disk in memory.
struct Ram(Mutex<Vec<u8>>);

impl Disk for Ram {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let bytes = self.0.lock().expect("no panic");
        buf.copy_from_slice(&bytes[at as usize..at as usize + buf.len()]);
        Ok(())
    }
    fn write(&self, buf: &[u8], at: u64) -> Result<()> {
        let mut bytes = self.0.lock().expect("no panic");
        bytes[at as usize..at as usize + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let mut bytes = self.0.lock().expect("no panic");
        bytes[at as usize..(at + len) as usize].fill(0);
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn extents(&self, at: u64, len: u64) -> Result<Vec<forkdisk::disk::Extent>> {
        let from = forkdisk::disk::Source::Base;
        Ok(vec![forkdisk::disk::Extent { at, len, from }])
    }
}

/// A session that takes its requests from a socket instead of the kernel; the socket.
fn kernel() -> &'static Mutex<(OwnedFd, Session)> {
    static KERNEL: OnceLock<Mutex<(OwnedFd, Session)>> = OnceLock::new();
    KERNEL.get_or_init(|| {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let kind = SocketType::SEQPACKET;
        let pair = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.expect("a pair of sockets");
        let files = Files::new();
        let ram = Arc::new(Ram(Mutex::new(vec![0; 1 << 20])));
        files.add("disk", ram).expect("a file");
        let negotiated = Negotiated {
            minor: abi::MINOR,
            flags: 0,
            max_write: 1 << 20,
        };
        let options = Options {
            max_threads: 1,
            keep_threads: 1,
            ..Options::default()
        };
        let begun = Init::Resumed(negotiated);
        let session = Session::start(theirs, Arc::new(files), begun, options).expect("a session");
        // The request to send again what was under way.
        let mut buf = [0; 64];
        rustix::io::read(&ours, &mut buf).expect("a notification");
        Mutex::new((ours, session))
    })
}

/// Requests one after the other, each with a length before it; every one is answered, and never with more than was asked for.
fn fuse(data: &[u8]) {
    let (kernel, _) = &*kernel().lock().expect("no panic");
    let mut input = Input(data);
    let mut sent = 0;
    let mut answer = vec![0; 256 << 10];
    while !input.is_empty() && sent < 20 {
        sent += 1;
        let len = (input.number::<2>() as usize % 8192).max(1);
        let mut request = input.bytes(len).to_vec();
        if request.is_empty() {
            return;
        }
        let mut expected = false;
        if let Ok((mut head, _)) = abi::InHeader::read_from_prefix(&request) {
            head.opcode %= 64;
            // Mostly a length that is right, and files that are there.
            if head.len % 8 != 0 {
                head.len = request.len() as u32;
            }
            head.nodeid %= 4;
            head.unique = sent;
            request[..abi::IN_HEADER].copy_from_slice(head.as_bytes());
            let sound = head.len as usize == request.len();
            let silent = matches!(head.opcode, abi::op::FORGET | abi::op::BATCH_FORGET);
            expected = !(sound && silent);
            // The socket carries no answer of a megabyte.
            let size = abi::IN_HEADER + 16..abi::IN_HEADER + 20;
            let reads = matches!(head.opcode, abi::op::READ | abi::op::READDIR);
            if reads && request.len() >= size.end {
                request[size.start + 2..size.end].fill(0);
            }
        }
        rustix::io::retry_on_intr(|| rustix::io::write(kernel, &request)).expect("sent");
        if !expected {
            continue;
        }
        // The fuzzer has a timer.
        let read = rustix::io::retry_on_intr(|| rustix::io::read(kernel, &mut answer));
        let n = read.expect("an answer");
        let (head, _) = abi::OutHeader::read_from_prefix(&answer[..n]).expect("a header");
        assert!(head.len as usize == n && head.unique == sent);
        assert!((-4095..=0).contains(&head.error), "{}", head.error);
        assert!(head.error == 0 || n == abi::OUT_HEADER);
    }
}

// ---- whole files -------------------------------------------------------------------------------------------------

fn env(seed: u64) -> Env {
    let next = Arc::new(AtomicU64::new(seed << 20));
    Env {
        id: Arc::new(move || Id(u128::from(next.fetch_add(1, SeqCst)).to_be_bytes())),
        now: Arc::new(|| 1_700_000_000),
        depth: forkdisk::format::MAX_DEPTH,
    }
}

fn open(sim: &SimDisk, seed: u64) -> Result<Store> {
    Store::open_on(sim.root(), Path::new("/sim"), env(seed))
}

fn disk(store: &Store, name: &str) -> Result<Arc<CowDisk>> {
    store.open_cow(&store.resolve(name)?, true)
}

/// A store with an image, a disk that was closed with a snapshot below it, and one that was not.
fn template() -> SimDisk {
    static MADE: OnceLock<SimDisk> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let sim = SimDisk::new(1);
        let store = Store::init_on(sim.root(), Path::new("/sim"), env(1)).expect("a store");
        let image: Vec<u8> = (0..6 * SLOT - 100).map(|i| (i % 251) as u8 + 1).collect();
        let source = ImportSource::Reader(&mut &image[..]);
        store
            .import(source, "image", ImportMode::Copy, &Quiet)
            .expect("import");
        for (name, from) in [("d", "image"), ("u", "d@s")] {
            store.create(&[name.into()], from, None).expect("fork");
            let limits = forkdisk::store::history::Limits {
                window: Some(1000),
                bytes: None,
            };
            store
                .set_history(&[name.into()], Some(limits))
                .expect("a history");
            let disk = disk(&store, name).expect("open");
            for n in 0..3u8 {
                disk.write(&[n + 1; 5000], u64::from(n) * 4096)
                    .expect("write");
                disk.discard(4 * 4096, 4096).expect("discard");
                disk.flush().expect("flush");
                if n == 0 {
                    disk.checkpoint().expect("checkpoint");
                }
            }
            if name == "d" {
                store
                    .snapshot_running(&disk, "d", "s", None)
                    .expect("snapshot");
                disk.write(&[9; SLOT], 0).expect("write");
                disk.close().expect("close");
            }
        }
        sim.crash_with(Policy::AllDone)
    });
    made.crash_with(Policy::AllDone)
}

/// A file of the template, and the slots in which something stands: holes are not worth the input.
struct Whole {
    bytes: Vec<u8>,
    used: Vec<usize>,
}

impl Whole {
    fn slot(&self, n: usize) -> &[u8] {
        &self.bytes[n * SLOT..((n + 1) * SLOT).min(self.bytes.len())]
    }
}

/// All files of the template.
fn files() -> &'static BTreeMap<String, Whole> {
    static READ: OnceLock<BTreeMap<String, Whole>> = OnceLock::new();
    READ.get_or_init(|| {
        let sim = template();
        let read = |path: String| {
            let bytes = sim.read_file(&path).expect("a file");
            let mut whole = Whole {
                bytes,
                used: Vec::new(),
            };
            let all = 0..whole.bytes.len().div_ceil(SLOT);
            whole.used = all
                .filter(|n| whole.slot(*n).iter().any(|b| *b != 0))
                .collect();
            (path, whole)
        };
        sim.file_names().into_iter().map(read).collect()
    })
}

/// Changes some bytes of a file: each change is a place in the slots that are used, a number of bytes, and the bytes. With `seal` the sums of
/// header, superblocks and journal records are made to fit again.
fn patch(sim: &SimDisk, path: &str, input: &mut Input<'_>, at_most: usize, seal: bool) {
    let whole = &files()[path];
    let mut changed: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    for _ in 0..at_most {
        if input.is_empty() || whole.used.is_empty() {
            break;
        }
        let place = input.number::<3>() as usize % (whole.used.len() * SLOT);
        let n = whole.used[place / SLOT];
        let slot = changed.entry(n).or_insert_with(|| whole.slot(n).to_vec());
        let len = input.byte() as usize % 32;
        let new = input.bytes(len);
        let at = (place % SLOT).min(slot.len());
        let end = (at + new.len()).min(slot.len());
        slot[at..end].copy_from_slice(&new[..end - at]);
    }
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
    let parts = dir.split('/').filter(|d| !d.is_empty());
    let dir = parts.fold(sim.root(), |dir, part| {
        dir.subdir(part).expect("a directory")
    });
    let file = dir.open(name, Access::Write).expect("a file");
    for (n, mut slot) in changed {
        if seal {
            seal_slot(n, &mut slot);
        }
        file.write_at(&slot, (n * SLOT) as u64).expect("write");
    }
}

/// Makes the sum of a slot of a layer file fit again, where it has one of its own.
fn seal_slot(n: usize, slot: &mut [u8]) {
    if n < 3 && slot.len() == SLOT {
        seal(slot);
    } else if n < 1024
        && slot.len() == SLOT
        && [format::COMMIT_MAGIC, format::COMMIT_HISTORY_MAGIC]
            .iter()
            .any(|m| slot[..8] == *m)
    {
        let number =
            |at: usize| u32::from_le_bytes([slot[at], slot[at + 1], slot[at + 2], slot[at + 3]]);
        let undo = match number(60) {
            format::NO_UNDO => 0,
            n if slot[..8] == format::COMMIT_HISTORY_MAGIC => n,
            _ => 0,
        };
        let entries = number(40) as usize + undo as usize;
        if let Some(end) = entries.checked_mul(12).map(|n| n + 64)
            && end <= SLOT
        {
            slot[56..60].fill(0);
            let sum = format::crc(&slot[..end]);
            slot[56..60].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// The layer file of a disk that was not closed (or was), changed: read, recovered, written, closed.
fn layer(data: &[u8]) {
    let mut input = Input(data);
    let how = input.byte();
    let sim = template();
    static IDS: OnceLock<[Id; 2]> = OnceLock::new();
    let ids = IDS.get_or_init(|| {
        let store = open(&template(), 2).expect("a store");
        ["u", "d"].map(|name| store.resolve(name).expect("a disk").id)
    });
    let id = ids[usize::from(how & 1)];
    let path = format!("layers/{id}.layer");
    patch(&sim, &path, &mut input, 8, how & 2 == 0);
    if how & 4 != 0 {
        let len = input.number::<3>() % (files()[&path].bytes.len() as u64 + 1);
        sim.truncate_file(&path, len).expect("cut");
    }
    let file = |access| {
        let dir = sim.root().subdir("layers").expect("layers");
        dir.open(&format!("{id}.layer"), access).expect("the file")
    };
    if let Ok(read) = ReadLayer::open(file(Access::Read)) {
        for region in [0, 1, 5000] {
            let _ = read.region(Region(region));
        }
        for point in read.points().unwrap_or_default() {
            let _ = read.undone_to(point.number);
        }
        let mut blocks = 0;
        for item in read.items(Region(0)) {
            let Ok(Item::Region(region, map)) = item else {
                continue;
            };
            for (index, pointer) in map.iter() {
                if let Pointer::Data { slot, sum } = pointer {
                    let mut block = vec![0; SLOT];
                    let lba = region.lba(index);
                    let whole = read.read_blocks(slot, &[sum], lba, &mut block);
                    assert!(whole.is_err() || format::crc(&block) == sum);
                    blocks += 1;
                }
            }
            if blocks > 10_000 {
                break;
            }
        }
    }
    let keep = (how & 8 != 0).then(|| forkdisk::layer::history::Keep {
        after: (0, 0),
        lower: None,
        window: Some(1000),
        bytes: None,
        clock: Arc::new(|| 1_700_000_000_000),
    });
    let memory = forkdisk::layer::volatile::private().expect("memory");
    let Ok(layer) = Layer::open_on(file(Access::Write), memory, keep) else {
        return;
    };
    let data = [0x5A; SLOT];
    let written = (|| {
        let taken = layer.take(1, 1)?;
        layer.write_slots(&taken, 0, &data)?;
        let slot = taken.extents.first().map_or(0, |e| e.0);
        let pointer = Pointer::Data {
            slot: Slot(slot),
            sum: format::crc(&data),
        };
        layer.publish(Lba(3), &[pointer], taken)?;
        layer.zero(Lba(1), 1)?;
        layer.flush()?;
        layer.close(State::Clean, None)?;
        Ok::<_, forkdisk::error::Error>(pointer)
    })();
    match written {
        Ok(pointer) => {
            // Accounts that lie under good sums (free slots in which a map stands) cost their own layer, and that is told.
            let read = ReadLayer::open(file(Access::Read)).and_then(|read| {
                assert!(read.pointer(Lba(1))? == Pointer::Zero);
                assert!(read.pointer(Lba(3))? == pointer);
                Ok(())
            });
            match read {
                Err(e) if how & 2 == 0 => assert!(e.kind() == Kind::Corrupt, "{e:?}"),
                read => read.expect("just closed"),
            }
        }
        Err(e) => assert!(
            matches!(e.kind(), Kind::Corrupt | Kind::NoSpace | Kind::Poisoned),
            "{e:?}"
        ),
    }
}

/// Any file of a store, changed: looked at, read, written.
fn store(data: &[u8]) {
    let mut input = Input(data);
    let sim = template();
    let files = files();
    let nth = input.byte() as usize % files.len();
    let (path, whole) = files.iter().nth(nth).expect("a file");
    let how = input.byte();
    let is_text = path.starts_with("names/") || path.ends_with("meta") || path.ends_with("toml");
    let mut bytes = match how % 3 {
        0 => input.bytes(input.0.len()).to_vec(),
        _ if is_text => {
            let mut bytes = whole.bytes.clone();
            for _ in 0..4 {
                let at = (input.number::<2>() as usize).min(bytes.len());
                let (out, new) = (input.byte() as usize % 64, input.byte() as usize % 64);
                let end = (at + out).min(bytes.len());
                bytes.splice(at..end, input.bytes(new).iter().copied());
            }
            bytes
        }
        _ => {
            let seal = how & 4 == 0 && path.ends_with(".layer");
            patch(&sim, path, &mut input, 4, seal);
            Vec::new()
        }
    };
    if how & 4 == 0 && is_text {
        // A last line that fits.
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let body: String = text
            .lines()
            .filter(|l| !l.starts_with("crc32"))
            .map(|l| format!("{l}\n"))
            .collect();
        let sum = format::crc(body.as_bytes());
        bytes = format!("{body}crc32 = \"{sum:08x}\"\n").into_bytes();
    }
    if is_text || how % 3 == 0 {
        sim.write_file(path, &bytes).expect("write");
    }
    let Ok(store) = open(&sim, 3) else {
        return;
    };
    let _ = forkdisk::check::check(&store, None, &Quiet);
    let _ = forkdisk::check::scrub(&store, None, Default::default(), &Quiet);
    let _ = forkdisk::check::repair::plan(&store, &Quiet);
    let _ = store.survey().map(|s| s.sound.len());
    let _ = store.layers();
    let mut buf = vec![0; 3 * SLOT];
    for name in ["image", "d", "d@s", "u"] {
        let _ = store.resolve(name).and_then(|object| {
            let _ = store.usage(&object);
            let _ = store.digest(&object, Effort::ANY.unkept(true), &Quiet);
            let _ = store.live_state(&object);
            store.open_disk(&object, false)?.read(&mut buf, 0)
        });
        let _ = disk(&store, name).and_then(|disk| {
            disk.write(&[3; SLOT], SLOT as u64)?;
            disk.flush()?;
            let mut now = [0; SLOT];
            disk.read(&mut now, SLOT as u64)?;
            assert!(now == [3; SLOT], "what was written is lost");
            disk.close()
        });
    }
    let _ = store.gc(false);
}

/// A stream as it is, and one whose sums fit: nothing is left of what is refused.
fn stream(data: &[u8]) {
    let sim = template();
    let Ok(store) = open(&sim, 5) else {
        return;
    };
    let before = store.survey().map_or(0, |s| s.sound.len());
    let take = |bytes: &[u8], name: &str| {
        let mut from = bytes;
        let made = store.import_stream(&mut from, name, &Quiet).is_ok();
        let garbage = store.gc(true).expect("gc");
        assert!(garbage.layers.is_empty() && garbage.files.is_empty());
        made
    };
    let as_it_is = take(data, "x");
    let mut input = Input(data);
    let how = input.byte();
    let parent = store.resolve("image").expect("the image");
    let digest = store.digest(&parent, Effort::ANY, &Quiet);
    let digest = digest.expect("computed").expect("it has one");
    let since = (how & 1 != 0).then_some((digest, parent.size));
    let unit = if how & 2 != 0 { 1 } else { SLOT as u64 };
    let header = StreamHeader::new(input.number::<1>() * unit, since);
    let mut bytes = header.as_bytes().to_vec();
    let (mut records, mut total) = (0, 0);
    while !input.is_empty() && records < 8 {
        let kind = input.byte();
        let unit = if kind & 8 != 0 { 1 } else { SLOT as u64 };
        let (at, mut len) = (input.number::<1>() * unit, input.number::<1>() * unit);
        if kind & 16 != 0 {
            len = input.number::<8>();
        }
        let content = vec![kind >> 5; len.min(3 * SLOT as u64) as usize];
        let content = (kind & 1 != 0).then_some(&content[..]);
        bytes.extend_from_slice(StreamRecord::new(at, len, content).as_bytes());
        bytes.extend_from_slice(content.unwrap_or_default());
        records += 1;
        total += content.map_or(0, <[u8]>::len) as u64;
    }
    let sum = Digest(Sha256::digest(&bytes).into());
    bytes.extend_from_slice(StreamTrailer::new(records, total, sum).as_bytes());
    let forged = take(&bytes, "y");
    let after = store.survey().map_or(0, |s| s.sound.len());
    assert_eq!(after, before + usize::from(as_it_is) + usize::from(forged));
    let mut all = vec![0; 4 * SLOT];
    for name in ["x", "y"] {
        let _ = store.resolve(name).and_then(|object| {
            let len = all.len().min(object.size as usize);
            store.open_disk(&object, false)?.read(&mut all[..len], 0)
        });
    }
}

/// A qcow2 image: the file as it is. What it says of itself may be anything; no more than the beginning of the disk is read.
fn qcow2(data: &[u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("image", flags).expect("a file");
    let mut written = 0;
    while written < data.len() {
        written += rustix::io::write(&file, &data[written..]).expect("written");
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(image) = Image::open(Path::new(&path)) else {
        return;
    };
    let len = image.len();
    assert!(len > 0 && len <= forkdisk::units::MAX_DISK);
    let mut buf = vec![0; 1 << 16];
    let mut at = 0;
    for _ in 0..64 {
        let Ok(Some(found)) = image.data(at) else {
            return;
        };
        assert!(at <= found.start && found.start < found.end && found.end <= len);
        let n = (found.end - found.start).min(buf.len() as u64) as usize;
        if image.read(&mut buf[..n], found.start).is_err() {
            return;
        }
        at = found.end;
    }
}
