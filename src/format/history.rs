//! What a layer keeps of its past: what each commit replaced, in the journal and in history segments (FORMAT.md, "History segment").

use super::{
    COMMIT_MAGIC, CommitEntry, CommitHeader, Field, JOURNAL_SLOTS, SLOT_ABSENT, SLOT_ZERO,
    SUPER_MAGIC, Superblock, crc, entries_sound,
};
use crate::units::{BLOCK, BLOCK_SIZE, Id};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Magic of a superblock of a layer that keeps its history.
pub const SUPER_HISTORY_MAGIC: [u8; 8] = *b"FDSUPER2";
/// Magic of a commit record of a layer that keeps its history.
pub const COMMIT_HISTORY_MAGIC: [u8; 8] = *b"FDCOMMI2";
/// Magic of a history segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"FDHISTO1";
/// In place of the number of undo entries: what the commit replaced is not known, and the history begins with it.
pub const NO_UNDO: u32 = u32::MAX;
/// History segments of a layer at most; the oldest ones go first.
pub const MAX_SEGMENTS: usize = 4096;

record! {
    /// Head of a history segment: where what earlier commits replaced went when the journal was emptied.
    SegmentHeader = "History segment" {
        /// [`SEGMENT_MAGIC`].
        magic: [u8; 8],
        /// Id of the layer.
        layer: [u8; 16],
        /// Sequence of the first commit in it.
        first: U64,
        /// Sequence of the last one.
        last: U64,
        /// When the first one was made: a label.
        first_time: U64,
        /// When the last one was made: a label.
        last_time: U64,
        /// Data blocks that the commits replaced: their slots are held.
        blocks: U64,
        /// First slot of the segment before, 0: there is none.
        previous: U32,
        /// Slots that one occupies.
        previous_slots: U32,
        /// Bytes behind this head.
        len: U64,
        /// CRC of these bytes.
        body_crc: U32,
        /// CRC of the bytes before.
        crc: U32,
    }
}
record! {
    /// One commit of a history segment.
    PointHeader = "History point" {
        /// Sequence of the commit.
        sequence: U64,
        /// When it was made, in milliseconds since 1970: a label.
        time: U64,
        /// Number of undo entries.
        entries: U32,
        /// 0.
        reserved: U32,
    }
}

/// What a commit replaced.
#[derive(Clone)]
pub struct Step {
    /// Sequence of the commit.
    pub sequence: u64,
    /// When it was made, in milliseconds since 1970: a label, which orders nothing.
    pub time: u64,
    /// What the layer said before of each block that the commit changed, in rising order.
    pub undo: Vec<CommitEntry>,
}

impl Step {
    /// Blocks that the commit changed.
    pub fn changed(&self) -> u64 {
        self.undo.iter().map(|e| u64::from(e.get().1)).sum()
    }
    /// Bytes that it takes in a segment.
    pub fn noted(&self) -> u64 {
        (size_of::<PointHeader>() + size_of_val(self.undo.as_slice())) as u64
    }
    /// The slots of data that it replaced.
    pub fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        let slots = self.undo.iter().map(|e| e.slot.get());
        slots.filter(|slot| !matches!(*slot, SLOT_ZERO | SLOT_ABSENT))
    }
}

/// A commit record as it stands in the journal.
pub struct CommitRecord<'a> {
    /// Its head.
    pub header: CommitHeader,
    /// What it changed.
    pub entries: &'a [CommitEntry],
    /// What that replaced; `None` where it is not recorded.
    pub undo: Option<&'a [CommitEntry]>,
}

/// A commit record of a layer that keeps its history as bytes, whole slots. Without `undo`, the history begins with it.
pub fn encode_commit_with_undo(
    layer: &Id,
    numbers: (u64, u64),
    time: u64,
    entries: &[CommitEntry],
    undo: Option<&[CommitEntry]>,
    out: &mut Vec<u8>,
) {
    let header = CommitHeader {
        magic: COMMIT_HISTORY_MAGIC,
        time: U64::new(time),
        undo: U32::new(undo.map_or(NO_UNDO, |list| list.len() as u32)),
        ..CommitHeader::new(layer, numbers, entries.len(), undo.map_or(0, <[_]>::len))
    };
    header.encode(entries, undo.unwrap_or_default(), out);
}

/// Decodes the record that begins at the start of `bytes` (which may go on behind it), of either kind; `None` if there is no sound
/// record of this layer.
pub fn decode_record<'a>(bytes: &'a [u8], layer: &Id) -> Option<CommitRecord<'a>> {
    let (header, rest) = CommitHeader::read_from_prefix(bytes).ok()?;
    if header.layer != layer.0 {
        return None;
    }
    let undone = match (header.magic, header.undo.get()) {
        (COMMIT_MAGIC, _) | (COMMIT_HISTORY_MAGIC, NO_UNDO) => None,
        (COMMIT_HISTORY_MAGIC, n) => Some(n),
        _ => return None,
    };
    let count = header.entries.get() as usize;
    let all = u64::from(header.entries.get()) + u64::from(undone.unwrap_or(0));
    if all > u64::from(JOURNAL_SLOTS) * BLOCK || header.slots.get() != super::commit_slots(all) {
        return None;
    }
    let body = rest.get(..all as usize * size_of::<CommitEntry>())?;
    let mut plain = header;
    plain.crc = U32::new(0);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(plain.as_bytes());
    hasher.update(body);
    if hasher.finalize() != header.crc.get() {
        return None;
    }
    let (entries, undo) = <[CommitEntry]>::ref_from_bytes(body).ok()?.split_at(count);
    // Whoever wrote it broke the format otherwise.
    let sound = entries_sound(entries, false) && entries_sound(undo, true);
    sound.then_some(CommitRecord {
        header,
        entries,
        undo: undone.map(|_| undo),
    })
}

impl SegmentHeader {
    /// A segment of these commits, at least one, behind the one in slots `previous` (first, number; 0: there is none): whole slots.
    pub fn encode(layer: &Id, steps: &[Step], previous: (u32, u32)) -> Vec<u8> {
        let mut bytes = vec![0; size_of::<SegmentHeader>()];
        for step in steps {
            let head = PointHeader {
                sequence: U64::new(step.sequence),
                time: U64::new(step.time),
                entries: U32::new(step.undo.len() as u32),
                reserved: U32::new(0),
            };
            bytes.extend_from_slice(head.as_bytes());
            bytes.extend_from_slice(step.undo.as_bytes());
        }
        let body = &bytes[size_of::<SegmentHeader>()..];
        let of = |step: Option<&Step>| step.map_or((0, 0), |s| (s.sequence, s.time));
        let (first, last) = (of(steps.first()), of(steps.last()));
        let mut header = SegmentHeader {
            magic: SEGMENT_MAGIC,
            layer: layer.0,
            first: U64::new(first.0),
            last: U64::new(last.0),
            first_time: U64::new(first.1),
            last_time: U64::new(last.1),
            blocks: U64::new(steps.iter().map(|s| s.slots().count() as u64).sum()),
            previous: U32::new(previous.0),
            previous_slots: U32::new(previous.1),
            len: U64::new(body.len() as u64),
            body_crc: U32::new(crc(body)),
            crc: U32::new(0),
        };
        header.crc = U32::new(header.sum());
        bytes[..size_of::<SegmentHeader>()].copy_from_slice(header.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK_SIZE), 0);
        bytes
    }
    fn sum(&self) -> u32 {
        crc(&self.as_bytes()[..size_of::<SegmentHeader>() - 4])
    }
    /// Slots that a segment of `steps` occupies.
    pub fn slots_of(steps: &[Step]) -> u32 {
        let bytes = size_of::<SegmentHeader>() as u64 + steps.iter().map(Step::noted).sum::<u64>();
        bytes.div_ceil(BLOCK) as u32
    }
    /// Decodes the head at the beginning of `bytes`; `None` if it is not a sound one of this layer, in a segment of `slots` slots.
    pub fn decode(bytes: &[u8], layer: &Id, slots: u32) -> Option<SegmentHeader> {
        let (h, _) = SegmentHeader::read_from_prefix(bytes).ok()?;
        let room = (u64::from(slots) * BLOCK).checked_sub(size_of::<SegmentHeader>() as u64)?;
        let sound = h.magic == SEGMENT_MAGIC
            && h.layer == layer.0
            && h.crc.get() == h.sum()
            && h.first.get() <= h.last.get()
            && h.last.get() < super::MAX_COUNT
            && h.len.get() <= room.min(u64::from(JOURNAL_SLOTS) * BLOCK);
        sound.then_some(h)
    }
    /// Decodes the whole segment that begins at the start of `bytes`, whose head this is: its commits, the oldest first; `None` if
    /// they are not all there.
    pub fn steps(&self, bytes: &[u8]) -> Option<Vec<Step>> {
        let start = size_of::<SegmentHeader>();
        let mut rest = bytes.get(start..start.checked_add(self.len.get() as usize)?)?;
        if crc(rest) != self.body_crc.get() {
            return None;
        }
        let mut steps: Vec<Step> = Vec::new();
        while !rest.is_empty() {
            let (head, behind) = PointHeader::read_from_prefix(rest).ok()?;
            let len = (head.entries.get() as usize).checked_mul(size_of::<CommitEntry>())?;
            let undo = <[CommitEntry]>::ref_from_bytes(behind.get(..len)?).ok()?;
            let expected = self.first.get() + steps.len() as u64;
            if head.sequence.get() != expected || !entries_sound(undo, true) {
                return None;
            }
            steps.push(Step {
                sequence: expected,
                time: head.time.get(),
                undo: undo.to_vec(),
            });
            rest = &behind[len..];
        }
        let blocks: u64 = steps.iter().map(|s| s.slots().count() as u64).sum();
        let whole = steps.last()?.sequence == self.last.get() && blocks == self.blocks.get();
        whole.then_some(steps)
    }
}

impl Superblock {
    /// Does the layer keep its history?
    pub fn has_history(&self) -> bool {
        self.magic == SUPER_HISTORY_MAGIC
    }
    /// Notes whether the layer keeps its history. Whoever does not know what that means must not open it.
    pub fn set_history(&mut self, kept: bool) {
        self.magic = match kept {
            true => SUPER_HISTORY_MAGIC,
            false => SUPER_MAGIC,
        };
    }
    /// Are the fields of the history in order? `within` knows what slots there can be.
    pub(super) fn history_sound(&self, within: impl Fn(u32, u32) -> bool) -> bool {
        let (slot, slots) = (self.history_slot.get(), self.history_slots.get());
        !self.has_history()
            || self.history_oldest.get() < self.next_commit.get()
                && self.history_blocks.get() <= self.high_water.get()
                && if slot == 0 {
                    slots == 0
                } else {
                    within(slot, slots)
                }
    }
}
