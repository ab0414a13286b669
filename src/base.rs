//! One base image: a raw file that is only ever read (FORMAT.md, section 2).
//!
//! The file is never mapped where its bytes are looked at: it may be someone else's (`--link`), and someone else may cut it. Reads
//! go through the host's page cache, which is the one copy that all disks share.

use crate::error::{Error, Kind, Result};
use crate::format::{self, SumsHeader, ZERO_SUM};
use crate::io::{File, Mapping};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, blocks};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// An open base.
pub struct Base {
    id: Id,
    file: Arc<dyn File>,
    len: u64,
    /// `scrub` may add them while the base is open.
    sums: OnceLock<(Mapping, Arc<dyn File>)>,
    /// How many of its blocks hold data, once that is known.
    data: OnceLock<u64>,
    /// What was counted over these bases is true over this one, too.
    counts_as: Vec<Id>,
    /// Its lock says that the base is in use.
    _held: Arc<dyn File>,
}

impl Base {
    /// Opens a base whose image is `len` bytes long; `sums` is its file of checksums, if there is one.
    /// `held` stays open as long as the base is, and with it the lock that it carries.
    pub fn open(
        id: Id,
        file: Arc<dyn File>,
        len: u64,
        sums: Option<Arc<dyn File>>,
        held: Arc<dyn File>,
    ) -> Result<Base> {
        check_len(&*file, len)?;
        let base = Base {
            id,
            file,
            len,
            sums: OnceLock::new(),
            data: OnceLock::new(),
            counts_as: Vec::new(),
            _held: held,
        };
        if let Some(sums) = sums {
            base.add_sums(sums)?;
        }
        Ok(base)
    }
    /// With what is known of it: how many of its blocks hold data, and over which other bases what was counted is true of it.
    pub fn with_counts(mut self, data: Option<u64>, counts_as: Vec<Id>) -> Base {
        if let Some(data) = data {
            self.data = data.into();
        }
        self.counts_as = counts_as;
        self
    }
    /// Is what was counted over base `id` true of this one, too?
    pub fn counts_as(&self, id: Id) -> bool {
        self.id == id || self.counts_as.contains(&id)
    }
    /// The other bases of which [`Base::counts_as`] is true.
    pub fn others(&self) -> &[Id] {
        &self.counts_as
    }
    /// How many of its blocks hold data.
    pub fn data_blocks(&self) -> Result<u64> {
        if let Some(known) = self.data.get() {
            return Ok(*known);
        }
        let data = data_blocks(&*self.file, 0, self.len)?;
        check_len(&*self.file, self.len)?;
        let counted = data.iter().map(|(start, end)| end - start).sum();
        Ok(*self.data.get_or_init(|| counted))
    }
    /// Its blocks that hold data, of `start` to before `end`: ranges in order.
    pub fn data_in(&self, start: u64, end: u64) -> Result<Vec<(u64, u64)>> {
        let at = (start * BLOCK).min(self.len);
        let found = data_blocks(&*self.file, at, (end * BLOCK).min(self.len) - at)?;
        check_len(&*self.file, self.len)?;
        Ok(found)
    }
    /// Takes a file of checksums into use, from now on. Those that are in use already stay.
    pub fn add_sums(&self, sums: Arc<dyn File>) -> Result<()> {
        let n = blocks(self.len);
        let cut = || {
            Error::new(Kind::Corrupt, "the checksums of the base are cut")
                .path(sums.path())
                .hint("restore the file from a backup; or remove it, and `forkdisk scrub` computes the checksums anew")
        };
        if sums.len()? < BLOCK + n * 4 {
            return Err(cut());
        }
        let mut head = vec![0; BLOCK_SIZE];
        sums.read_at(&mut head, 0)?;
        let header = SumsHeader::decode(&head, &self.id).map_err(|e| e.path(sums.path()))?;
        if header.blocks.get() != n {
            return Err(cut());
        }
        let map = sums.map(BLOCK, (n * 4) as usize)?;
        // Another thread may have been faster, with the same file.
        let _ = self.sums.set((map, sums));
        Ok(())
    }
    /// Are its blocks verified when they are read?
    pub fn has_sums(&self) -> bool {
        self.sums.get().is_some()
    }
    /// Its id.
    pub fn id(&self) -> Id {
        self.id
    }
    /// Length of the image in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Is the image empty? No base is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Its file.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }
    /// The CRC that block `lba` must have, where sums are known.
    pub fn sum(&self, lba: Lba) -> Option<u32> {
        let at = lba.0 as usize * 4;
        let raw = self.sums.get()?.0.get(at..at + 4)?;
        Some(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]) ^ ZERO_SUM)
    }
    /// What of `len` bytes from `at` on may be something else than zeros: ranges of bytes in order. A hole whose checksum is not that of zeros
    /// was none when the image was imported; it is among them, so that whoever reads what there is hears of the damage.
    pub fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let found = self.file.data_ranges(at, len)?;
        // Afterwards: what is cut off of a linked image is no hole.
        check_len(&*self.file, self.len)?;
        let Some((_, sums)) = self.sums.get() else {
            return Ok(found);
        };
        let (mut all, mut next) = (Vec::new(), at);
        for (start, n) in found.into_iter().chain([(at + len, 0)]) {
            self.lost_in(next..start, &**sums, &mut all)?;
            if n > 0 {
                push(&mut all, start, n);
            }
            next = start + n;
        }
        Ok(all)
    }
    /// The whole blocks of a hole that have checksums of something else.
    fn lost_in(
        &self,
        hole: Range<u64>,
        sums: &dyn File,
        found: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let first = hole.start.div_ceil(BLOCK);
        let end = match hole.end >= self.len {
            true => blocks(self.len),
            false => hole.end / BLOCK,
        };
        if first >= end {
            return Ok(());
        }
        // Most of a sparse image: its sums are a hole as well.
        for (at, n) in sums.data_ranges(BLOCK + first * 4, (end - first) * 4)? {
            let some = (at - BLOCK) / 4..(at + n - BLOCK).div_ceil(4).min(end);
            for lba in some.filter(|lba| self.sum(Lba(*lba as u32)).is_some_and(|s| s != ZERO_SUM))
            {
                let at = lba * BLOCK;
                push(found, at, BLOCK.min(self.len - at));
            }
        }
        Ok(())
    }
    /// Reads whole blocks from `lba` on; what lies past the image's end is zeros.
    pub fn read_blocks(&self, lba: Lba, buf: &mut [u8]) -> Result<()> {
        debug_assert!(buf.len().is_multiple_of(BLOCK_SIZE));
        let at = lba.at();
        let inside = self.len.saturating_sub(at).min(buf.len() as u64) as usize;
        let (data, past) = buf.split_at_mut(inside);
        past.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        self.file.read_at(data, at).map_err(|e| {
            e.context(format!("cannot read base {}", self.id))
                .block(lba)
        })?;
        if self.has_sums() {
            let whole = inside.next_multiple_of(BLOCK_SIZE);
            for (i, block) in buf[..whole].chunks_exact(BLOCK_SIZE).enumerate() {
                let block_lba = u64::from(lba.0) + i as u64;
                if self
                    .sum(Lba(block_lba as u32))
                    .is_some_and(|sum| sum != format::crc(block))
                {
                    return Err(Error::new(
                        Kind::Corrupt,
                        format!("the base image does not match its checksum (base {})", self.id),
                    )
                    .block(Lba(block_lba as u32))
                    .offset(block_lba * BLOCK)
                    .path(self.file.path())
                    .hint("restore the image from a backup; disks that do not read this block are not affected"));
                }
            }
        }
        Ok(())
    }
}

/// Has the image the length that it had when it was imported?
fn check_len(image: &dyn File, len: u64) -> Result<()> {
    let found = image.len()?;
    if found == len {
        return Ok(());
    }
    Err(Error::new(
        Kind::Corrupt,
        format!("the base image has {found} bytes, but had {len} when it was imported"),
    )
    .path(image.path())
    .hint("restore the image: all disks over it depend on its exact contents"))
}

/// Adds a range to ranges in order.
fn push(ranges: &mut Vec<(u64, u64)>, at: u64, len: u64) {
    match ranges.last_mut() {
        Some((start, n)) if *start + *n == at => *n += len,
        _ => ranges.push((at, len)),
    }
}

/// The blocks of an image that hold data, from byte `at` on, which begins a block: disjoint ranges in order.
pub fn data_blocks(image: &dyn File, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for (at, len) in image.written_ranges(at, len)? {
        let (start, end) = (at / BLOCK, (at + len).div_ceil(BLOCK));
        match found.last_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ => found.push((start, end)),
        }
    }
    Ok(found)
}
