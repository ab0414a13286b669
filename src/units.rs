//! The units every other module counts in.
//!
//! Two numbers of one machine type that mean different things never stand in one signature: a block
//! of the virtual disk is an [`Lba`], a block of a layer file is a [`Slot`], and neither turns into
//! the other without a block map. Byte offsets and lengths are plain `u64`, always named `at` and
//! `len`.

use std::fmt;

/// Size of a block and of a slot, in bytes. The unit of mapping, of allocation and of checksums.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] as a `u64`, for offset arithmetic.
pub const BLOCK: u64 = BLOCK_SIZE as u64;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_SHIFT: u32 = 12;
/// Blocks in a region (2 MiB): the unit in which block maps are packed and cached.
pub const REGION_BLOCKS: usize = 512;
/// log2 of [`REGION_BLOCKS`].
pub const REGION_SHIFT: u32 = 9;
/// Bytes in a region.
pub const REGION_BYTES: u64 = BLOCK * REGION_BLOCKS as u64;

/// Smallest virtual disk: one block.
pub const MIN_DISK: u64 = BLOCK;
/// Largest virtual disk, 16 TiB: the number of blocks that a 32-bit [`Lba`] can name.
pub const MAX_DISK: u64 = BLOCK << 32;

/// Number of a block of the virtual disk (its byte offset divided by [`BLOCK_SIZE`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lba(pub u32);

/// Number of a block of a layer file (its byte offset divided by [`BLOCK_SIZE`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Slot(pub u32);

/// Number of a region of the virtual disk: [`REGION_BLOCKS`] neighbouring blocks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Region(pub u32);

impl Lba {
    /// The block that holds byte `at`.
    pub fn of(at: u64) -> Lba {
        debug_assert!(at < MAX_DISK);
        Lba((at >> BLOCK_SHIFT) as u32)
    }
    /// First byte of the block.
    pub fn at(self) -> u64 {
        u64::from(self.0) << BLOCK_SHIFT
    }
    /// The region this block is part of.
    pub fn region(self) -> Region {
        Region(self.0 >> REGION_SHIFT)
    }
    /// Place of this block in its region, `0..REGION_BLOCKS`.
    pub fn index(self) -> usize {
        self.0 as usize & (REGION_BLOCKS - 1)
    }
}

impl Slot {
    /// First byte of the slot in its layer file.
    pub fn at(self) -> u64 {
        u64::from(self.0) << BLOCK_SHIFT
    }
}

impl Region {
    /// First block of the region.
    pub fn first(self) -> Lba {
        Lba(self.0 << REGION_SHIFT)
    }
    /// The block at place `index` (`0..REGION_BLOCKS`) of the region.
    pub fn lba(self, index: usize) -> Lba {
        debug_assert!(index < REGION_BLOCKS);
        Lba(self.0 << REGION_SHIFT | index as u32)
    }
}

impl fmt::Display for Lba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of blocks that hold `len` bytes.
pub fn blocks(len: u64) -> u64 {
    len.div_ceil(BLOCK)
}

/// `len` rounded up to whole blocks, or `None` where that overflows.
pub fn round_up(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(BLOCK)
}

/// A 128-bit identity of a store, a base or a layer, written as 32 hexadecimal digits.
///
/// Drawn at random by whoever creates the object; the core never draws one itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// Reads 32 hexadecimal digits; `None` for anything else.
    pub fn parse(text: &str) -> Option<Id> {
        let bytes = text.as_bytes();
        if bytes.len() != 32 {
            return None;
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(bytes.chunks_exact(2)) {
            let hi = hex_digit(pair[0])?;
            let lo = hex_digit(pair[1])?;
            *byte = hi << 4 | lo;
        }
        Some(Id(id))
    }
    /// The first 12 digits, enough to tell objects apart in tables.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_string()
    }
}

fn hex_digit(c: u8) -> Option<u8> {
    match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}
impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
