//! Runs: immutable packed block maps as bytes (FORMAT.md, "Run").
//!
//! A [`Builder`] streams a run out in one pass; [`Run`] reads one in place. Nothing of the payload is believed before the
//! sum of its piece was checked, each time it is looked at: a page may have left memory and come back rotten.

use super::{Item, RegionMap, WORDS};
use crate::error::{Error, Kind, Result};
use crate::format::{
    DirEntry, FLAG_FILL, FLAG_LIST, Fence, GROUP_REGIONS, LIST_MAX, Pointer, RUN_MAGIC, RawPointer,
    RunHeader, RunRef, SUM_PIECE, ZERO_RANGE_MIN, ZeroRange, crc,
};
use crate::units::{BLOCK_SIZE, Id, MAX_DISK, REGION_BLOCKS, REGION_BYTES, Region, Slot};
use std::ops::{Deref, Range};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The most bytes that a run of so many regions and pointers can take: what is reserved before it is written.
pub fn max_len(regions: u64, pointers: u64, zero_ranges: u64) -> u64 {
    let body = pointers * 8 + regions * (64 + 8);
    let directory = regions * size_of::<DirEntry>() as u64;
    // A zero range can turn into directory entries for up to ZERO_RANGE_MIN - 1 regions when it is cut by other regions.
    let cut = (zero_ranges + regions) * u64::from(ZERO_RANGE_MIN) * size_of::<DirEntry>() as u64;
    let payload = body + directory + cut;
    let sums = payload.div_ceil(SUM_PIECE as u64) * 4;
    let fences = (payload / 16).div_ceil(GROUP_REGIONS as u64) * size_of::<Fence>() as u64 + 16;
    let ranges = (zero_ranges + regions) * size_of::<ZeroRange>() as u64;
    payload + sums + fences + ranges + size_of::<RunHeader>() as u64
}

/// Writes a run: [`Item`]s in rising order go in, bytes in order come out.
pub struct Builder<W> {
    out: W,
    buffer: Vec<u8>,
    /// Payload bytes so far, the buffer included.
    payload_len: u64,
    piece: crc32fast::Hasher,
    piece_len: usize,
    sums: Vec<U32>,
    fences: Vec<Fence>,
    zero_ranges: Vec<ZeroRange>,
    group: Vec<DirEntry>,
    regions: u32,
    pointers: u64,
    zeros: u64,
}

/// Regions of the largest disk.
const REGIONS: u32 = (MAX_DISK / REGION_BYTES) as u32;

/// Bytes collected before they are handed on.
const BUFFER: usize = 256 * 1024;

impl<W: FnMut(&[u8]) -> Result<()>> Builder<W> {
    /// A builder that hands its bytes to `out`, in order.
    pub fn new(out: W) -> Self {
        Builder {
            out,
            buffer: Vec::with_capacity(BUFFER),
            payload_len: 0,
            piece: crc32fast::Hasher::new(),
            piece_len: 0,
            sums: Vec::new(),
            fences: Vec::new(),
            zero_ranges: Vec::new(),
            group: Vec::with_capacity(GROUP_REGIONS),
            regions: 0,
            pointers: 0,
            zeros: 0,
        }
    }
    fn payload(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.payload_len += bytes.len() as u64;
        while !bytes.is_empty() {
            let n = bytes.len().min(SUM_PIECE - self.piece_len);
            self.piece.update(&bytes[..n]);
            self.piece_len += n;
            bytes = &bytes[n..];
            if self.piece_len == SUM_PIECE {
                self.end_piece();
            }
        }
        if self.buffer.len() >= BUFFER {
            (self.out)(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
    fn end_piece(&mut self) {
        let hasher = std::mem::replace(&mut self.piece, crc32fast::Hasher::new());
        self.sums.push(U32::new(hasher.finalize()));
        self.piece_len = 0;
    }
    /// Adds the next item.
    pub fn push(&mut self, item: &Item) -> Result<()> {
        match item {
            Item::Region(region, map) => self.region(*region, map),
            Item::Zeros(region, count) if *count >= ZERO_RANGE_MIN => {
                self.zero_ranges.push(ZeroRange {
                    region: U32::new(region.0),
                    regions: U32::new(*count),
                });
                self.zeros += u64::from(*count) * REGION_BLOCKS as u64;
                Ok(())
            }
            Item::Zeros(region, count) => {
                let zeros = RegionMap::zeros();
                (region.0..region.0 + count).try_for_each(|r| self.region(Region(r), &zeros))
            }
        }
    }
    fn region(&mut self, region: Region, map: &RegionMap) -> Result<()> {
        if map.is_empty() {
            return Ok(());
        }
        let at = self.payload_len;
        let mut flags = if map.fill() { FLAG_FILL } else { 0 };
        let mut body = Vec::with_capacity(64 + map.len() * 8);
        if !map.has_no_pointers() && map.len() <= LIST_MAX {
            flags |= FLAG_LIST;
            for (index, _) in map.iter() {
                body.extend_from_slice(&(index as u16).to_le_bytes());
            }
            body.resize(body.len().next_multiple_of(8), 0);
        } else if !map.has_no_pointers() {
            for word in map.present() {
                body.extend_from_slice(&word.to_le_bytes());
            }
        }
        for (_, pointer) in map.iter() {
            body.extend_from_slice(pointer.raw().as_bytes());
        }
        self.payload(&body)?;
        self.group.push(DirEntry {
            region: U32::new(region.0),
            count: U16::new(map.len() as u16),
            flags: U16::new(flags),
            at: U64::new(at),
        });
        let (data, zeros) = map.counts();
        self.pointers += data;
        self.zeros += zeros;
        self.regions += 1;
        if self.group.len() == GROUP_REGIONS {
            self.end_group()?;
        }
        Ok(())
    }
    fn end_group(&mut self) -> Result<()> {
        let Some(first) = self.group.first() else {
            return Ok(());
        };
        self.fences.push(Fence {
            region: first.region,
            entries: U32::new(self.group.len() as u32),
            at: U64::new(self.payload_len),
        });
        let group = std::mem::take(&mut self.group);
        self.payload(group.as_bytes())?;
        self.group = group;
        self.group.clear();
        Ok(())
    }
    /// Writes the trailer. The reference says all but where the run stands. An empty map gives `None` (and no bytes).
    pub fn finish(mut self, layer: &Id, last_commit: u64) -> Result<Option<RunRef>> {
        if self.regions == 0 && self.zero_ranges.is_empty() {
            return Ok(None);
        }
        self.end_group()?;
        if self.piece_len > 0 {
            self.end_piece();
        }
        let header = RunHeader {
            magic: RUN_MAGIC,
            layer: layer.0,
            payload_len: U64::new(self.payload_len),
            regions: U32::new(self.regions),
            sums: U32::new(self.sums.len() as u32),
            fences: U32::new(self.fences.len() as u32),
            zero_ranges: U32::new(self.zero_ranges.len() as u32),
            last_commit: U64::new(last_commit),
        };
        let mut trailer = Vec::new();
        trailer.extend_from_slice(self.sums.as_bytes());
        trailer.extend_from_slice(self.fences.as_bytes());
        trailer.extend_from_slice(self.zero_ranges.as_bytes());
        trailer.extend_from_slice(header.as_bytes());
        let trailer_crc = crc(&trailer);
        self.buffer.extend_from_slice(&trailer);
        let len = self.payload_len + trailer.len() as u64;
        // Whole slots: the mapping of the run must lie within the file.
        let padded = len.next_multiple_of(BLOCK_SIZE as u64);
        self.buffer
            .resize(self.buffer.len() + (padded - len) as usize, 0);
        (self.out)(&self.buffer)?;
        let mut reference = RunRef::new_zeroed();
        reference.slots = U32::new((padded / BLOCK_SIZE as u64) as u32);
        reference.len = U64::new(len);
        reference.trailer_len = U32::new(trailer.len() as u32);
        reference.trailer_crc = U32::new(trailer_crc);
        reference.pointers = U64::new(self.pointers);
        reference.zeros = U64::new(self.zeros);
        reference.regions = U32::new(self.regions);
        Ok(Some(reference))
    }
}

/// Bytes of the body of a region with so many pointers.
fn body_len(count: usize, list: bool) -> usize {
    match (count, list) {
        (0, _) => 0,
        (_, true) => (count * 2).next_multiple_of(8) + count * 8,
        (_, false) => 64 + count * 8,
    }
}

/// A run, read in place from `B`.
pub struct Run<B> {
    bytes: B,
    reference: RunRef,
    payload_len: usize,
    last_commit: u64,
    sums: usize,
    fences: Vec<Fence>,
    zero_ranges: Vec<ZeroRange>,
}

impl<B: Deref<Target = [u8]>> Run<B> {
    /// Opens the run that `reference` describes and that `bytes` (at least its length) holds.
    pub fn open(bytes: B, reference: RunRef, layer: &Id) -> Result<Run<B>> {
        let at = Slot(reference.slot.get()).at();
        let bad = |what: &str| {
            Error::new(Kind::Corrupt, format!("block map: {what}"))
                .offset(at)
                .layer(*layer)
        };
        let len = reference.len.get() as usize;
        let trailer_len = reference.trailer_len.get() as usize;
        if bytes.len() < len || trailer_len > len || trailer_len < size_of::<RunHeader>() {
            return Err(bad("it is cut"));
        }
        let trailer = &bytes[len - trailer_len..len];
        if crc(trailer) != reference.trailer_crc.get() {
            return Err(bad("checksum mismatch in its trailer"));
        }
        let (rest, header) =
            RunHeader::ref_from_suffix(trailer).map_err(|_| bad("it has no header"))?;
        let payload_len = len - trailer_len;
        let sums = header.sums.get() as usize;
        let (fence_count, range_count) = (
            header.fences.get() as usize,
            header.zero_ranges.get() as usize,
        );
        let shape = header.magic == RUN_MAGIC
            && header.layer == layer.0
            && header.payload_len.get() == payload_len as u64
            && sums == payload_len.div_ceil(SUM_PIECE)
            && rest.len()
                == sums * 4
                    + fence_count * size_of::<Fence>()
                    + range_count * size_of::<ZeroRange>();
        // No run that was ever written has more; what claims to is not copied.
        let few = fence_count <= REGIONS as usize / GROUP_REGIONS
            && range_count <= (REGIONS / ZERO_RANGE_MIN) as usize;
        if !shape || !few {
            return Err(bad("its trailer contradicts itself"));
        }
        let (fences, ranges) = rest[sums * 4..].split_at(fence_count * size_of::<Fence>());
        let fences = <[Fence]>::ref_from_bytes(fences)
            .map_err(|_| bad("its fences are cut"))?
            .to_vec();
        let zero_ranges = <[ZeroRange]>::ref_from_bytes(ranges)
            .map_err(|_| bad("its zero ranges are cut"))?
            .to_vec();
        let fences_sound = fences
            .windows(2)
            .all(|w| w[0].region.get() < w[1].region.get())
            && fences.iter().all(|f| {
                let n = f.entries.get() as usize;
                (1..=GROUP_REGIONS).contains(&n)
                    && f.at
                        .get()
                        .checked_add((n * size_of::<DirEntry>()) as u64)
                        .is_some_and(|e| e <= payload_len as u64)
            });
        let end = |r: &ZeroRange| u64::from(r.region.get()) + u64::from(r.regions.get());
        let ranges_sound = zero_ranges
            .windows(2)
            .all(|w| end(&w[0]) <= u64::from(w[1].region.get()))
            && zero_ranges
                .iter()
                .all(|r| r.regions.get() > 0 && end(r) <= u64::from(REGIONS));
        if !fences_sound || !ranges_sound {
            return Err(bad("its trailer is out of order"));
        }
        let last_commit = header.last_commit.get();
        Ok(Run {
            bytes,
            reference,
            payload_len,
            last_commit,
            sums,
            fences,
            zero_ranges,
        })
    }
    /// The reference it was opened by.
    pub fn reference(&self) -> &RunRef {
        &self.reference
    }
    /// The newest commit that is in it.
    pub fn last_commit(&self) -> u64 {
        self.last_commit
    }
    /// Number of zero ranges.
    pub fn zero_ranges(&self) -> u64 {
        self.zero_ranges.len() as u64
    }
    fn bad(&self, what: &str, at: usize) -> Error {
        Error::new(Kind::Corrupt, format!("block map: {what}")).offset(
            Slot(self.reference.slot.get())
                .at()
                .saturating_add(at as u64),
        )
    }
    /// The bytes `at..at+len` of the payload, checked.
    fn checked(&self, at: u64, len: usize) -> Result<&[u8]> {
        let at = at as usize;
        let end = at
            .checked_add(len)
            .filter(|&e| e <= self.payload_len)
            .ok_or_else(|| self.bad("it points outside itself", at))?;
        if len == 0 {
            return Ok(&[]);
        }
        let trailer_at =
            self.reference.len.get() as usize - self.reference.trailer_len.get() as usize;
        let sums = &self.bytes[trailer_at..trailer_at + self.sums * 4];
        for piece in at / SUM_PIECE..end.div_ceil(SUM_PIECE) {
            let start = piece * SUM_PIECE;
            let stop = (start + SUM_PIECE).min(self.payload_len);
            if crc(&self.bytes[start..stop]).to_le_bytes() != sums[piece * 4..piece * 4 + 4] {
                return Err(self.bad("checksum mismatch", start));
            }
        }
        Ok(&self.bytes[at..end])
    }
    /// The directory of a group, whose regions and bodies are in order and without gaps: so a walk over all of them is as long as the run
    /// is, whoever wrote it.
    fn group_in_order(&self, group: usize) -> Result<&[DirEntry]> {
        let fence = &self.fences[group];
        let entries = self.group(fence)?;
        let directory_end =
            |f: &Fence| f.at.get() + u64::from(f.entries.get()) * size_of::<DirEntry>() as u64;
        let mut at = match group.checked_sub(1) {
            Some(before) => directory_end(&self.fences[before]),
            None => 0,
        };
        let mut region = fence.region.get();
        let next = self.fences.get(group + 1);
        let until = next.map_or(REGIONS, |f| f.region.get());
        for entry in entries {
            let ordered = entry.region.get() >= region && entry.region.get() < until;
            if !ordered || entry.at.get() != at {
                return Err(self.bad("a directory is out of order", fence.at.get() as usize));
            }
            region = entry.region.get() + 1;
            let count = entry.count.get() as usize;
            let list = entry.flags.get() & FLAG_LIST != 0;
            at += body_len(count, list) as u64;
        }
        let last = next.is_some() || directory_end(fence) == self.payload_len as u64;
        if at != fence.at.get() || !last {
            return Err(self.bad("it has gaps", fence.at.get() as usize));
        }
        Ok(entries)
    }
    fn group(&self, fence: &Fence) -> Result<&[DirEntry]> {
        let bytes = self.checked(
            fence.at.get(),
            fence.entries.get() as usize * size_of::<DirEntry>(),
        )?;
        <[DirEntry]>::ref_from_bytes(bytes)
            .map_err(|_| self.bad("a directory is cut", fence.at.get() as usize))
    }
    fn body(&self, entry: &DirEntry) -> Result<RegionMap> {
        let at = entry.at.get();
        let count = entry.count.get() as usize;
        let flags = entry.flags.get();
        let fill = flags & FLAG_FILL != 0;
        let bad = || self.bad("a region contradicts itself", at as usize);
        if count > REGION_BLOCKS
            || flags & !(FLAG_FILL | FLAG_LIST) != 0
            || entry.region.get() >= REGIONS
        {
            return Err(bad());
        }
        if count == 0 {
            return Ok(if fill {
                RegionMap::zeros()
            } else {
                RegionMap::new()
            });
        }
        let len = body_len(count, flags & FLAG_LIST != 0);
        let head = len - count * 8;
        let bytes = self.checked(at, len)?;
        let mut present = [0u64; WORDS];
        if flags & FLAG_LIST != 0 {
            let mut last = None;
            for pair in bytes[..count * 2].chunks_exact(2) {
                let index = usize::from(u16::from_le_bytes([pair[0], pair[1]]));
                if index >= REGION_BLOCKS || last.is_some_and(|l| l >= index) {
                    return Err(bad());
                }
                present[index / 64] |= 1 << (index % 64);
                last = Some(index);
            }
        } else {
            for (word, raw) in present.iter_mut().zip(bytes[..64].chunks_exact(8)) {
                *word = u64::from_le_bytes([
                    raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7],
                ]);
            }
        }
        let raws = <[RawPointer]>::ref_from_bytes(&bytes[head..]).map_err(|_| bad())?;
        let pointers = raws
            .iter()
            .map(Pointer::from_raw)
            .collect::<Option<Vec<_>>>()
            .ok_or_else(bad)?;
        RegionMap::from_parts(present, pointers, fill).ok_or_else(bad)
    }
    /// What the run says of a region; `None`: nothing.
    pub fn region(&self, region: Region) -> Result<Option<RegionMap>> {
        let group = self.fences.partition_point(|f| f.region.get() <= region.0);
        if let Some(fence) = group.checked_sub(1).map(|g| &self.fences[g]) {
            let entries = self.group(fence)?;
            if let Ok(found) = entries.binary_search_by_key(&region.0, |e| e.region.get()) {
                let mut map = self.body(&entries[found])?;
                if self.in_zero_range(region.0) {
                    map.underlay(&RegionMap::zeros());
                }
                return Ok(Some(map));
            }
        }
        Ok(self.in_zero_range(region.0).then(RegionMap::zeros))
    }
    /// Which groups could say something of these regions, which are in rising order; each once.
    fn groups_of<'a>(&'a self, regions: &'a [u32]) -> impl Iterator<Item = &'a Fence> {
        let mut last = None;
        regions.iter().filter_map(move |region| {
            let group = self.fences.partition_point(|f| f.region.get() <= *region);
            let group = group.checked_sub(1)?;
            (last.replace(group) != Some(group)).then(|| &self.fences[group])
        })
    }
    /// What of the run is read to find these regions, which are in rising order, as bytes from its beginning. Looks at the trailer only.
    pub fn directories<'a>(&'a self, regions: &'a [u32]) -> impl Iterator<Item = Range<u64>> {
        self.groups_of(regions).map(|fence| {
            let entries = (fence.entries.get() as usize).min(GROUP_REGIONS);
            let at = fence.at.get();
            at..at.saturating_add((entries * size_of::<DirEntry>()) as u64)
        })
    }
    /// What is read of it then. Reads the directories; what cannot be read of them is left out.
    pub fn bodies<'a>(&'a self, regions: &'a [u32]) -> impl Iterator<Item = Range<u64>> {
        let entries = self.groups_of(regions).filter_map(|f| self.group(f).ok());
        let wanted = entries
            .flatten()
            .filter(|e| e.count.get() > 0 && regions.binary_search(&e.region.get()).is_ok());
        wanted.map(|e| {
            let list = e.flags.get() & FLAG_LIST != 0;
            let count = usize::from(e.count.get()).min(REGION_BLOCKS);
            let len = body_len(count, list) as u64;
            e.at.get()..e.at.get().saturating_add(len)
        })
    }
    fn in_zero_range(&self, region: u32) -> bool {
        let after = self
            .zero_ranges
            .partition_point(|r| r.region.get() <= region);
        after
            .checked_sub(1)
            .map(|i| &self.zero_ranges[i])
            .is_some_and(|r| region < r.region.get() + r.regions.get())
    }
    /// Could the run say anything of the regions `start..end`? Looks at the trailer only; may err towards yes.
    pub fn may_touch(&self, start: u32, end: u32) -> bool {
        let first = self.fences.partition_point(|f| f.region.get() <= start);
        let in_groups = first > 0 || self.fences.first().is_some_and(|f| f.region.get() < end);
        in_groups
            || self
                .zero_ranges
                .iter()
                .any(|r| r.region.get() < end && start < r.region.get() + r.regions.get())
    }
    /// Its content from region `from` on, for [`merge`](super::merge).
    pub fn items(&self, from: Region) -> super::Items<'_> {
        let first = self
            .fences
            .partition_point(|f| f.region.get() <= from.0)
            .saturating_sub(1);
        let regions = (first..self.fences.len()).flat_map(move |group| {
            let (entries, error) = match self.group_in_order(group) {
                Ok(entries) => (entries, None),
                Err(e) => (&[][..], Some(Err(e))),
            };
            let items = entries
                .iter()
                .filter(move |e| e.region.get() >= from.0)
                .map(|e| Ok(Item::Region(Region(e.region.get()), self.body(e)?)));
            error.into_iter().chain(items)
        });
        let zeros = self.zero_ranges.iter().filter_map(move |r| {
            let start = r.region.get().max(from.0);
            let end = r.region.get() + r.regions.get();
            (start < end).then(|| Ok(Item::Zeros(Region(start), end - start)))
        });
        Box::new(super::merge(vec![Box::new(regions), Box::new(zeros)]))
    }
    /// Checks every byte of the run.
    pub fn verify(&self) -> Result<()> {
        self.checked(0, self.payload_len)?;
        let mut last = None;
        for item in self.items(Region(0)) {
            let item = item?;
            if last.is_some_and(|l| item.start() < l) {
                return Err(self.bad("its regions are out of order", 0));
            }
            last = Some(item.end());
        }
        Ok(())
    }
}
