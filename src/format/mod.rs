//! Every on-disk structure, declared once. `docs/FORMAT.md` is the normative text; `tests/format.rs` holds the two together.
//!
//! Pure: bytes in, values or an error out. Nothing here reads a file, a clock or a random number, and no
//! decoder allocates more than a constant times the bytes it was given.

pub mod text;

use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK_SIZE, Id, Lba, MAX_DISK, MIN_DISK, Slot};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Format version that this crate writes, and the newest it reads.
pub const VERSION: u32 = 1;
/// First slot of the journal.
pub const JOURNAL_START: u32 = 4;
/// Slots of the journal.
pub const JOURNAL_SLOTS: u32 = 1020;
/// First slot that can hold data, runs and free lists.
pub const DATA_START: u32 = 1024;
/// Slot number that stands for "zero" in a stored pointer.
pub const SLOT_ZERO: u32 = 0xFFFF_FFFE;
/// Slot number that stands for "absent"; never stored.
pub const SLOT_ABSENT: u32 = 0xFFFF_FFFF;
/// Most layers of a chain.
pub const MAX_DEPTH: u32 = 16_384;
/// Largest rank of a layer (`depth` of its header).
pub const MAX_RANK: u32 = 1 << 31;
/// Most entries that may be dirty before the disk flushes by itself: their record must fit into the journal.
pub const MAX_DIRTY: u64 = 262_144;
/// Runs a superblock can refer to.
pub const MAX_RUNS: usize = 48;
/// Free extents that fit into the superblock.
pub const INLINE_FREE: usize = 160;
/// Free extents that are remembered at most.
pub const MAX_FREE_EXTENTS: usize = 65_536;
/// Bytes of a name field.
pub const NAME_FIELD: usize = 256;
/// Longest part of a name.
pub const MAX_NAME: usize = 100;
/// Longest message.
pub const MAX_MESSAGE: usize = 4096;
/// Regions in a group of a run.
pub const GROUP_REGIONS: usize = 256;
/// Bodies with more pointers than this are bitmaps.
pub const LIST_MAX: usize = 16;
/// Zero ranges of at least this many regions stand in the trailer.
pub const ZERO_RANGE_MIN: u32 = 8;
/// Bytes of the trailer of the largest run: sums of 2^32 pointers in 2^23 regions, fences and zero ranges are 46 MiB.
pub const MAX_TRAILER: u32 = 64 << 20;
/// Counters that grow by one at a time never get here; where one has, it was not we who wrote it.
pub const MAX_COUNT: u64 = 1 << 62;
/// Bytes of payload under one sum.
pub const SUM_PIECE: usize = 4096;
/// CRC-32 of a block of zeros.
pub const ZERO_SUM: u32 = 0xC71C_0011;

/// Directory flag: the body is a list of indexes, not a bitmap.
pub const FLAG_LIST: u16 = 1;
/// Directory flag: blocks of the region without a pointer are zero.
pub const FLAG_FILL: u16 = 2;

/// Superblock state: the journal counts.
pub const STATE_WRITABLE: u32 = 1;
/// Superblock state: closed, all is in runs.
pub const STATE_CLEAN: u32 = 2;
/// Superblock state: immutable.
pub const STATE_SEALED: u32 = 3;

/// CRC-32 (IEEE 802.3) of `bytes`.
pub fn crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// One field of a structure, for the test that reads FORMAT.md.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as in the document.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
}

macro_rules! record {
    ($(#[$doc:meta])* $name:ident = $title:literal { $($(#[$fdoc:meta])* $field:ident : $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
        impl $name {
            /// Heading of this structure in FORMAT.md.
            pub const TITLE: &'static str = $title;
            /// Its fields, in order.
            pub const FIELDS: &'static [Field] = &[
                $(Field { name: stringify!($field), offset: offset_of!($name, $field), size: size_of::<$type>() },)*
            ];
        }
    };
}

mod history;
mod refer;
pub mod stream;
pub use history::*;
use stream::{StreamHeader, StreamRecord, StreamTrailer};

record! {
    /// First slot of a layer file; written once.
    Header = "Header" {
        /// [`HEADER_MAGIC`].
        magic: [u8; 8],
        /// Format version of the file.
        version: U32,
        /// Its rank: larger than that of the layer below.
        depth: U32,
        /// Id of this layer.
        layer: [u8; 16],
        /// Id of the base or layer below.
        parent: [u8; 16],
        /// 0 base, 1 layer.
        parent_kind: U32,
        /// Bytes of `name` used.
        name_len: U32,
        /// Virtual size when created.
        size: U64,
        /// Seconds since 1970, for people.
        created: U64,
        /// The disk it was made for.
        name: [u8; NAME_FIELD],
        /// Bytes that users had written to the disk before; for people.
        user_written: U64,
        /// Bytes that were written to the files of its layers before; for people.
        host_written: U64,
        /// Zeros.
        reserved: [u8; 3748],
        /// CRC of the bytes before.
        crc: U32,
    }
}
record! {
    /// Where a run stands, and what it must look like.
    RunRef = "Run reference" {
        /// First slot.
        slot: U32,
        /// Slots occupied.
        slots: U32,
        /// Bytes, trailer included.
        len: U64,
        /// Bytes of the trailer.
        trailer_len: U32,
        /// CRC of the trailer.
        trailer_crc: U32,
        /// Data pointers.
        pointers: U64,
        /// Blocks mapped to zero.
        zeros: U64,
        /// Directory entries.
        regions: U32,
        /// 0.
        reserved: U32,
    }
}
record! {
    /// Some neighbouring free slots.
    FreeExtent = "Free extent" {
        /// First slot.
        slot: U32,
        /// How many.
        slots: U32,
    }
}
record! {
    /// The state of a layer at its last checkpoint. Two copies, in slots 1 and 2.
    Superblock = "Superblock" {
        /// [`SUPER_MAGIC`] or [`SUPER_HISTORY_MAGIC`].
        magic: [u8; 8],
        /// Grows by one with each change.
        sequence: U64,
        /// Id of this layer.
        layer: [u8; 16],
        /// [`STATE_WRITABLE`], [`STATE_CLEAN`] or [`STATE_SEALED`].
        state: U32,
        /// Valid entries of `runs`.
        run_count: U32,
        /// Grows with each opening for writing.
        generation: U64,
        /// Sequence of the first commit record of the journal.
        next_commit: U64,
        /// Virtual size.
        size: U64,
        /// Blocks with a data pointer in the runs.
        data_blocks: U64,
        /// Blocks with a zero pointer in the runs.
        zero_blocks: U64,
        /// No slot from here on is in use.
        high_water: U64,
        /// Free slots that no list names.
        forgotten: U64,
        /// First slot of the free list, 0: inline.
        free_slot: U32,
        /// Slots of the free list.
        free_slots: U32,
        /// Extents in the free list.
        free_count: U32,
        /// CRC of the extents.
        free_crc: U32,
        /// Bytes of `name` used; 0: the header's counts.
        name_len: U32,
        /// 0.
        reserved: U32,
        /// The latest name.
        name: [u8; NAME_FIELD],
        /// 1: of a sealed layer, there may be host space behind slots that are not in use; else 0.
        unpunched: U32,
        /// Zeros.
        reserved2: [u8; 4],
        /// The newest first.
        runs: [RunRef; MAX_RUNS],
        /// The free list, if it is short.
        free_inline: [FreeExtent; INLINE_FREE],
        /// Bytes that users wrote to the disk, up to this layer; for people.
        user_written: U64,
        /// Bytes that were written to the files of the disk's layers, up to this one; for people.
        host_written: U64,
        /// Zeros.
        /// First slot of the newest history segment, 0: there is none.
        history_slot: U32,
        /// Slots of that segment.
        history_slots: U32,
        /// The oldest commit of which the state can be shown.
        history_oldest: U64,
        /// When it was made: a label.
        history_time: U64,
        /// Slots that the history occupies.
        history_blocks: U64,
        /// Data blocks that are seen through the layer: its own, and those below that it does not hide.
        refer: U64,
        /// The sequence with which `refer` was written; another: it is not known.
        refer_at: U64,
        /// Id of the base over which it was counted.
        refer_over: [u8; 16],
        /// Zeros.
        reserved3: [u8; 44],
        /// CRC of the bytes before.
        crc: U32,
    }
}
record! {
    /// One region of a run's directory.
    DirEntry = "Directory entry" {
        /// Region number.
        region: U32,
        /// Pointers in the body.
        count: U16,
        /// [`FLAG_LIST`], [`FLAG_FILL`].
        flags: U16,
        /// Offset of the body in the payload.
        at: U64,
    }
}
record! {
    /// A stored pointer.
    RawPointer = "Pointer" {
        /// Slot, or [`SLOT_ZERO`].
        slot: U32,
        /// CRC of the block; 0 for zero.
        sum: U32,
    }
}
record! {
    /// The first region of a group of a run, and where its directory is.
    Fence = "Fence" {
        /// First region of the group.
        region: U32,
        /// Directory entries of the group.
        entries: U32,
        /// Offset of the group's directory in the payload.
        at: U64,
    }
}
record! {
    /// Neighbouring regions that are zero where the run has no pointer.
    ZeroRange = "Zero range" {
        /// First region.
        region: U32,
        /// How many.
        regions: U32,
    }
}
record! {
    /// The last bytes of a run.
    RunHeader = "Run header" {
        /// [`RUN_MAGIC`].
        magic: [u8; 8],
        /// Id of the layer.
        layer: [u8; 16],
        /// Bytes of payload.
        payload_len: U64,
        /// Directory entries in all.
        regions: U32,
        /// Number of sums.
        sums: U32,
        /// Number of fences.
        fences: U32,
        /// Number of zero ranges.
        zero_ranges: U32,
        /// The newest commit that is in it.
        last_commit: U64,
    }
}
record! {
    /// Head of a commit record.
    CommitHeader = "Commit record" {
        /// [`COMMIT_MAGIC`] or [`COMMIT_HISTORY_MAGIC`].
        magic: [u8; 8],
        /// One more than the commit before.
        sequence: U64,
        /// The superblock's generation.
        generation: U64,
        /// Id of the layer.
        layer: [u8; 16],
        /// Number of entries.
        entries: U32,
        /// Slots the record occupies.
        slots: U32,
        /// When it was made, in milliseconds since 1970: a label. 0 where the layer keeps no history.
        time: U64,
        /// CRC of header (this field as 0) and entries.
        crc: U32,
        /// Number of undo entries, or [`NO_UNDO`]. 0 where the layer keeps no history.
        undo: U32,
    }
}
record! {
    /// One change of a commit, or what it replaced.
    CommitEntry = "Commit entry" {
        /// The block, or the first of several.
        lba: U32,
        /// Its slot, or [`SLOT_ZERO`]; of what was replaced also [`SLOT_ABSENT`].
        slot: U32,
        /// CRC of the block; for zero and absent the number of blocks.
        sum: U32,
    }
}
record! {
    /// Head of one area of a volatile log; in memory, never on a disk.
    VolatileHeader = "Volatile area" {
        /// [`VOLATILE_MAGIC`].
        magic: [u8; 8],
        /// Id of the layer.
        layer: [u8; 16],
        /// The superblock's generation.
        generation: U64,
        /// Sequence of the commit that the entries will become.
        sequence: U64,
        /// Not 0: a sync failed, and nothing must be acknowledged any more.
        poisoned: U64,
        /// Number of entries.
        count: U64,
        /// Not 0 (in the first area alone): a sync has begun, and nobody knows its outcome.
        syncing: U64,
        /// In the first area alone: the last commit that is known to be durable.
        durable: U64,
        /// In the first area alone: bytes that users wrote over the layer's life, as far as it was noted.
        user_written: U64,
        /// In the first area alone: bytes that were written to the layer's file, the same.
        host_written: U64,
    }
}
record! {
    /// First slot of a base's `sums`.
    SumsHeader = "Sums header" {
        /// [`SUMS_MAGIC`].
        magic: [u8; 8],
        /// Base id.
        base: [u8; 16],
        /// Blocks of the image.
        blocks: U64,
        /// CRC of the bytes before.
        crc: U32,
    }
}

/// Every structure with its heading in FORMAT.md, for the test.
pub const LAYOUTS: &[(&str, &[Field], usize)] = &[
    (
        SumsHeader::TITLE,
        SumsHeader::FIELDS,
        size_of::<SumsHeader>(),
    ),
    (Header::TITLE, Header::FIELDS, size_of::<Header>()),
    (
        Superblock::TITLE,
        Superblock::FIELDS,
        size_of::<Superblock>(),
    ),
    (RunRef::TITLE, RunRef::FIELDS, size_of::<RunRef>()),
    (
        FreeExtent::TITLE,
        FreeExtent::FIELDS,
        size_of::<FreeExtent>(),
    ),
    (DirEntry::TITLE, DirEntry::FIELDS, size_of::<DirEntry>()),
    (
        RawPointer::TITLE,
        RawPointer::FIELDS,
        size_of::<RawPointer>(),
    ),
    (Fence::TITLE, Fence::FIELDS, size_of::<Fence>()),
    (ZeroRange::TITLE, ZeroRange::FIELDS, size_of::<ZeroRange>()),
    (RunHeader::TITLE, RunHeader::FIELDS, size_of::<RunHeader>()),
    (
        CommitHeader::TITLE,
        CommitHeader::FIELDS,
        size_of::<CommitHeader>(),
    ),
    (
        CommitEntry::TITLE,
        CommitEntry::FIELDS,
        size_of::<CommitEntry>(),
    ),
    (
        VolatileHeader::TITLE,
        VolatileHeader::FIELDS,
        size_of::<VolatileHeader>(),
    ),
    (
        SegmentHeader::TITLE,
        SegmentHeader::FIELDS,
        size_of::<SegmentHeader>(),
    ),
    (
        PointHeader::TITLE,
        PointHeader::FIELDS,
        size_of::<PointHeader>(),
    ),
    (
        StreamHeader::TITLE,
        StreamHeader::FIELDS,
        size_of::<StreamHeader>(),
    ),
    (
        StreamRecord::TITLE,
        StreamRecord::FIELDS,
        size_of::<StreamRecord>(),
    ),
    (
        StreamTrailer::TITLE,
        StreamTrailer::FIELDS,
        size_of::<StreamTrailer>(),
    ),
];

/// Magic of a layer file.
pub const HEADER_MAGIC: [u8; 8] = *b"FDLAYER1";
/// Magic of a superblock.
pub const SUPER_MAGIC: [u8; 8] = *b"FDSUPER1";
/// Magic of a run.
pub const RUN_MAGIC: [u8; 8] = *b"FDRUN001";
/// Magic of a commit record.
pub const COMMIT_MAGIC: [u8; 8] = *b"FDCOMMIT";
/// Magic of an area of a volatile log.
pub const VOLATILE_MAGIC: [u8; 8] = *b"FDVOLA01";
/// Magic of a sums file.
pub const SUMS_MAGIC: [u8; 8] = *b"FDSUMS01";

const _: () = assert!(size_of::<Header>() == BLOCK_SIZE);
const _: () = assert!(size_of::<Superblock>() == BLOCK_SIZE);
const _: () = assert!(size_of::<CommitHeader>() == 64);
// The largest record must fit into the journal.
const _: () = assert!(
    size_of::<CommitHeader>() + MAX_DIRTY as usize * size_of::<CommitEntry>()
        <= JOURNAL_SLOTS as usize * BLOCK_SIZE
);

/// What a block map says of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pointer {
    /// Look in the layer below.
    Absent,
    /// Zeros.
    Zero,
    /// The block stands in this slot and has this CRC.
    Data {
        /// Slot of the layer file.
        slot: Slot,
        /// CRC-32 of its 4096 bytes.
        sum: u32,
    },
}

impl Pointer {
    /// Both numbers in one word; every pointer has exactly one packed form.
    pub fn pack(self) -> u64 {
        match self {
            Pointer::Absent => u64::from(SLOT_ABSENT) << 32,
            Pointer::Zero => u64::from(SLOT_ZERO) << 32,
            Pointer::Data { slot, sum } => u64::from(slot.0) << 32 | u64::from(sum),
        }
    }
    /// The inverse of [`Pointer::pack`].
    pub fn unpack(word: u64) -> Pointer {
        match (word >> 32) as u32 {
            SLOT_ABSENT => Pointer::Absent,
            SLOT_ZERO => Pointer::Zero,
            slot => Pointer::Data {
                slot: Slot(slot),
                sum: word as u32,
            },
        }
    }
    /// The stored form. `Absent` is never stored.
    pub fn raw(self) -> RawPointer {
        let word = self.pack();
        RawPointer {
            slot: U32::new((word >> 32) as u32),
            sum: U32::new(word as u32),
        }
    }
    /// Decodes a stored pointer; `None` if it can stand in no sound file.
    pub fn from_raw(raw: &RawPointer) -> Option<Pointer> {
        match raw.slot.get() {
            SLOT_ABSENT => None,
            SLOT_ZERO => (raw.sum.get() == 0).then_some(Pointer::Zero),
            slot if slot < DATA_START => None,
            slot => Some(Pointer::Data {
                slot: Slot(slot),
                sum: raw.sum.get(),
            }),
        }
    }
}

fn damaged(what: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, what)
        .hint("`forkdisk check` shows what is damaged and who is affected")
}

/// Does the CRC at the end of this slot hold?
fn sealed_slot(bytes: &[u8]) -> bool {
    bytes.len() == BLOCK_SIZE
        && crc(&bytes[..BLOCK_SIZE - 4]).to_le_bytes() == bytes[BLOCK_SIZE - 4..]
}

/// Copies a name into a name field; longer ones are cut (the store refuses them long before).
fn name_field(name: &str) -> ([u8; NAME_FIELD], U32) {
    let mut field = [0; NAME_FIELD];
    let mut len = name.len().min(NAME_FIELD);
    while !name.is_char_boundary(len) {
        len -= 1;
    }
    field[..len].copy_from_slice(&name.as_bytes()[..len]);
    (field, U32::new(len as u32))
}

fn field_name(field: &[u8; NAME_FIELD], len: U32) -> Option<&str> {
    std::str::from_utf8(field.get(..len.get() as usize)?).ok()
}

/// Is `size` one a disk can have?
pub fn valid_size(size: u64) -> bool {
    (MIN_DISK..=MAX_DISK).contains(&size) && size.is_multiple_of(BLOCK_SIZE as u64)
}

impl Header {
    /// A new layer's header.
    pub fn new(
        layer: Id,
        parent: Id,
        parent_is_layer: bool,
        depth: u32,
        size: u64,
        created: u64,
        name: &str,
    ) -> Header {
        let (name, name_len) = name_field(name);
        let mut header = Header {
            magic: HEADER_MAGIC,
            version: U32::new(VERSION),
            depth: U32::new(depth),
            layer: layer.0,
            parent: parent.0,
            parent_kind: U32::new(u32::from(parent_is_layer)),
            name_len,
            size: U64::new(size),
            created: U64::new(created),
            name,
            user_written: U64::new(0),
            host_written: U64::new(0),
            reserved: [0; 3748],
            crc: U32::new(0),
        };
        header.crc = U32::new(crc(&header.as_bytes()[..BLOCK_SIZE - 4]));
        header
    }
    /// Decodes and checks slot 0 of a layer file.
    pub fn decode(bytes: &[u8]) -> Result<Header> {
        let header = Header::read_from_bytes(bytes)
            .map_err(|_| damaged("the layer header is not 4096 bytes"))?;
        if header.magic != HEADER_MAGIC {
            return Err(damaged(
                "this is not a forkdisk layer: wrong magic at offset 0x0",
            ));
        }
        // The checksum first: a half-written header, or a rotten one, is no newer version.
        if !sealed_slot(bytes) {
            return Err(damaged("layer header: checksum mismatch at offset 0x0"));
        }
        if header.version.get() > VERSION {
            return Err(Error::new(
                Kind::Version,
                format!(
                    "this layer has format version {}, newer than this forkdisk reads ({VERSION})",
                    header.version
                ),
            )
            .hint("use a newer forkdisk"));
        }
        let sound = header.version.get() == VERSION
            && (1..=MAX_RANK).contains(&header.depth.get())
            && header.parent_kind.get() <= 1
            && valid_size(header.size.get())
            && field_name(&header.name, header.name_len).is_some();
        if !sound {
            return Err(damaged("layer header: a field is out of range"));
        }
        Ok(header)
    }
    /// The header of a layer of a disk to which so many bytes were written before: by users, and to the files of its layers.
    #[must_use]
    pub fn after(mut self, user: u64, host: u64) -> Header {
        (self.user_written, self.host_written) = (U64::new(user), U64::new(host));
        self.crc = U32::new(crc(&self.as_bytes()[..BLOCK_SIZE - 4]));
        self
    }
    /// The header of the same layer over another parent.
    pub fn over(&self, parent: Id, parent_is_layer: bool) -> Header {
        let mut header = Header {
            parent: parent.0,
            parent_kind: U32::new(u32::from(parent_is_layer)),
            ..*self
        };
        header.crc = U32::new(crc(&header.as_bytes()[..BLOCK_SIZE - 4]));
        header
    }
    /// The name it was made for.
    pub fn name(&self) -> &str {
        field_name(&self.name, self.name_len).unwrap_or("")
    }
}

impl Superblock {
    /// The superblock of a layer in which nothing was ever written.
    pub fn empty(header: &Header) -> Superblock {
        Superblock {
            magic: SUPER_MAGIC,
            sequence: U64::new(0),
            layer: header.layer,
            state: U32::new(STATE_CLEAN),
            run_count: U32::new(0),
            generation: U64::new(0),
            next_commit: U64::new(1),
            size: header.size,
            data_blocks: U64::new(0),
            zero_blocks: U64::new(0),
            high_water: U64::new(u64::from(DATA_START)),
            forgotten: U64::new(0),
            free_slot: U32::new(0),
            free_slots: U32::new(0),
            free_count: U32::new(0),
            free_crc: U32::new(crc(&[])),
            name_len: U32::new(0),
            reserved: U32::new(0),
            name: [0; NAME_FIELD],
            unpunched: U32::new(0),
            reserved2: [0; 4],
            runs: [RunRef::new_zeroed(); MAX_RUNS],
            free_inline: [FreeExtent::new_zeroed(); INLINE_FREE],
            user_written: header.user_written,
            host_written: header.host_written,
            history_slot: U32::new(0),
            history_slots: U32::new(0),
            history_oldest: U64::new(0),
            history_time: U64::new(0),
            history_blocks: U64::new(0),
            refer: U64::new(0),
            refer_at: U64::new(0),
            refer_over: [0; 16],
            reserved3: [0; 44],
            crc: U32::new(0),
        }
    }
    /// Sets the name.
    pub fn set_name(&mut self, name: &str) {
        (self.name, self.name_len) = name_field(name);
    }
    /// The latest name, if one was set.
    pub fn name(&self) -> Option<&str> {
        field_name(&self.name, self.name_len).filter(|n| !n.is_empty())
    }
    /// Sets the CRC and gives the bytes.
    pub fn encode(&mut self) -> &[u8] {
        self.crc = U32::new(crc(&self.as_bytes()[..BLOCK_SIZE - 4]));
        self.as_bytes()
    }
    /// The run references in use, newest first.
    pub fn run_refs(&self) -> &[RunRef] {
        &self.runs[..(self.run_count.get() as usize).min(MAX_RUNS)]
    }
    /// Decodes and checks one copy; an error says what is wrong with it.
    pub fn decode(bytes: &[u8], layer: &Id) -> Result<Superblock> {
        let s = Superblock::read_from_bytes(bytes)
            .map_err(|_| damaged("a superblock is not 4096 bytes"))?;
        let known = [SUPER_MAGIC, SUPER_HISTORY_MAGIC].contains(&s.magic);
        if !known || !sealed_slot(bytes) {
            return Err(damaged("superblock: checksum mismatch"));
        }
        if s.layer != layer.0 {
            return Err(damaged("superblock: it belongs to another layer"));
        }
        let high_water = s.high_water.get();
        let within = |slot: u32, slots: u32| {
            slot >= DATA_START && slots > 0 && u64::from(slot) + u64::from(slots) <= high_water
        };
        let runs_sound = s.run_count.get() as usize <= MAX_RUNS
            && s.run_refs().iter().all(|r| {
                let bytes = u64::from(r.slots.get()) * BLOCK_SIZE as u64;
                within(r.slot.get(), r.slots.get())
                    && r.len.get() <= bytes
                    && u64::from(r.trailer_len.get()) <= r.len.get()
                    && (size_of::<RunHeader>()..=MAX_TRAILER as usize)
                        .contains(&(r.trailer_len.get() as usize))
            });
        let mut runs: Vec<(u32, u32)> = s
            .run_refs()
            .iter()
            .map(|r| (r.slot.get(), r.slots.get()))
            .collect();
        runs.sort_unstable();
        let runs_apart = runs.windows(2).all(|w| w[1].0 - w[0].0 >= w[0].1);
        let counts_sound = [s.sequence, s.generation, s.next_commit]
            .iter()
            .all(|n| n.get() < MAX_COUNT)
            && s.data_blocks.get() <= 1 << 32
            && s.zero_blocks.get() <= 1 << 32
            && s.forgotten.get() <= high_water;
        let free_bytes = u64::from(s.free_count.get()) * size_of::<FreeExtent>() as u64;
        let free_sound = s.free_count.get() as usize <= MAX_FREE_EXTENTS
            && if s.free_slot.get() == 0 {
                s.free_count.get() as usize <= INLINE_FREE && s.free_slots.get() == 0
            } else {
                within(s.free_slot.get(), s.free_slots.get())
                    && free_bytes <= u64::from(s.free_slots.get()) * BLOCK_SIZE as u64
            };
        let sound = (STATE_WRITABLE..=STATE_SEALED).contains(&s.state.get())
            && (u64::from(DATA_START)..=u64::from(SLOT_ZERO)).contains(&high_water)
            && valid_size(s.size.get())
            && field_name(&s.name, s.name_len).is_some()
            && runs_sound
            && runs_apart
            && s.history_sound(within)
            && counts_sound
            && free_sound;
        if !sound {
            return Err(damaged("superblock: a field is out of range"));
        }
        Ok(s)
    }
}

/// A commit record as bytes, whole slots.
pub fn encode_commit(
    layer: &Id,
    sequence: u64,
    generation: u64,
    entries: &[CommitEntry],
    out: &mut Vec<u8>,
) {
    CommitHeader::new(layer, (sequence, generation), entries.len(), 0).encode(entries, &[], out);
}

impl CommitHeader {
    /// A head without its sum, of a record of so many entries and undo entries; `numbers`: sequence and generation.
    fn new(layer: &Id, numbers: (u64, u64), entries: usize, undo: usize) -> CommitHeader {
        CommitHeader {
            magic: COMMIT_MAGIC,
            sequence: U64::new(numbers.0),
            generation: U64::new(numbers.1),
            layer: layer.0,
            entries: U32::new(entries as u32),
            slots: U32::new(commit_slots((entries + undo) as u64)),
            time: U64::new(0),
            crc: U32::new(0),
            undo: U32::new(0),
        }
    }
    /// The whole record.
    fn encode(mut self, entries: &[CommitEntry], undo: &[CommitEntry], out: &mut Vec<u8>) {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(self.as_bytes());
        hasher.update(entries.as_bytes());
        hasher.update(undo.as_bytes());
        self.crc = U32::new(hasher.finalize());
        out.clear();
        out.extend_from_slice(self.as_bytes());
        out.extend_from_slice(entries.as_bytes());
        out.extend_from_slice(undo.as_bytes());
        out.resize(self.slots.get() as usize * BLOCK_SIZE, 0);
    }
}

/// Slots that a record of `entries` entries occupies.
pub fn commit_slots(entries: u64) -> u32 {
    (size_of::<CommitHeader>() as u64 + entries * size_of::<CommitEntry>() as u64)
        .div_ceil(BLOCK_SIZE as u64) as u32
}

/// Decodes the record that begins at the start of `bytes` (which may go on behind it): header and
/// entries, or `None` if there is no sound record of this layer.
pub fn decode_commit<'a>(bytes: &'a [u8], layer: &Id) -> Option<(CommitHeader, &'a [CommitEntry])> {
    decode_record(bytes, layer).map(|record| (record.header, record.entries))
}

/// Are they rising, not overlapping, and in range? Only of what was replaced there may be something absent.
fn entries_sound(entries: &[CommitEntry], undo: bool) -> bool {
    let mut next = 0u64;
    entries.iter().all(|e| {
        let lba = u64::from(e.lba.get());
        let len = match e.slot.get() {
            SLOT_ABSENT if !undo => 0,
            SLOT_ZERO | SLOT_ABSENT => u64::from(e.sum.get()),
            slot => u64::from(slot >= DATA_START),
        };
        let sound = len > 0 && lba >= next && lba + len <= 1 << 32;
        next = lba + len;
        sound
    })
}

impl CommitEntry {
    /// `pointer` for `count` blocks from `lba` (`count` is 1 for data).
    pub fn new(lba: Lba, count: u32, pointer: Pointer) -> CommitEntry {
        let (slot, sum) = match pointer {
            Pointer::Data { slot, sum } => (slot.0, sum),
            Pointer::Zero => (SLOT_ZERO, count),
            Pointer::Absent => (SLOT_ABSENT, count),
        };
        CommitEntry {
            lba: U32::new(lba.0),
            slot: U32::new(slot),
            sum: U32::new(sum),
        }
    }
    /// Block, count and pointer.
    pub fn get(&self) -> (Lba, u32, Pointer) {
        let lba = Lba(self.lba.get());
        match self.slot.get() {
            SLOT_ZERO => (lba, self.sum.get(), Pointer::Zero),
            SLOT_ABSENT => (lba, self.sum.get(), Pointer::Absent),
            slot => (
                lba,
                1,
                Pointer::Data {
                    slot: Slot(slot),
                    sum: self.sum.get(),
                },
            ),
        }
    }
}

impl SumsHeader {
    /// Head of the sums of a base.
    pub fn new(base: Id, blocks: u64) -> SumsHeader {
        let mut h = SumsHeader {
            magic: SUMS_MAGIC,
            base: base.0,
            blocks: U64::new(blocks),
            crc: U32::new(0),
        };
        h.crc = U32::new(crc(&h.as_bytes()[..32]));
        h
    }
    /// Decodes and checks it.
    pub fn decode(bytes: &[u8], base: &Id) -> Result<SumsHeader> {
        let (h, _) =
            SumsHeader::read_from_prefix(bytes).map_err(|_| damaged("sums: the header is cut"))?;
        if h.magic != SUMS_MAGIC || h.crc.get() != crc(&h.as_bytes()[..32]) || h.base != base.0 {
            return Err(damaged(
                "sums: the header does not match its checksum or its base",
            ));
        }
        Ok(h)
    }
}
