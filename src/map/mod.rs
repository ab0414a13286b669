//! Packed block maps: lookup, iterate, merge. Pure: no I/O, no clock, no randomness.
//!
//! Three shapes of the same thing:
//! - [`RegionMap`]: the pointers of one 2 MiB region, packed behind a presence bitmap;
//! - [`Memtable`]: changes that are in no run yet, in memory, bounded by the journal;
//! - [`run::Run`]: an immutable map of a whole layer on disk.
//!
//! [`merge`] lays any number of them over each other, the newest first. It serves checkpoints, squash, flatten and
//! export: one piece of code.

mod memtable;
mod merge;
pub mod run;
pub mod undo;

pub use memtable::{Memtable, Ranges};
pub use merge::merge;

use crate::error::Result;
use crate::format::Pointer;
use crate::units::{REGION_BLOCKS, Region};

/// Words of a presence bitmap.
pub const WORDS: usize = REGION_BLOCKS / 64;

/// The pointers that one map has for the blocks of one region.
///
/// Always true: `pointers.len()` is the number of bits set; pointer `k` belongs to the `k`-th set bit; `before[w]` is the number of bits
/// set in the words before `w`, so that a lookup counts the bits of one word. In a map with `fill` no stored pointer is `Zero`: zero is what remains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegionMap {
    present: [u64; WORDS],
    before: [u16; WORDS],
    pointers: Vec<u64>,
    fill: bool,
}

impl RegionMap {
    /// A map that knows nothing: every block is absent.
    pub fn new() -> RegionMap {
        RegionMap::default()
    }
    /// A map in which every block is zero.
    pub fn zeros() -> RegionMap {
        RegionMap {
            fill: true,
            ..RegionMap::default()
        }
    }
    /// Puts a map together from its parts; `None` if they do not fit each other.
    pub fn from_parts(
        present: [u64; WORDS],
        pointers: Vec<Pointer>,
        fill: bool,
    ) -> Option<RegionMap> {
        let bits: u32 = present.iter().map(|w| w.count_ones()).sum();
        if bits as usize != pointers.len() {
            return None;
        }
        let mut map = RegionMap {
            present,
            before: [0; WORDS],
            pointers: pointers.into_iter().map(Pointer::pack).collect(),
            fill,
        };
        map.count_before();
        if fill {
            // A foreign writer may have stored zeros beside `fill`: bring it to the one form we keep.
            let zeros: Vec<usize> = map
                .iter()
                .filter(|(_, p)| *p == Pointer::Zero)
                .map(|(i, _)| i)
                .collect();
            for index in zeros {
                map.remove(index);
            }
        }
        Some(map)
    }
    /// Number of pointers before `index`.
    fn rank(&self, index: usize) -> usize {
        let word = index / 64;
        let below = self.present[word] & ((1 << (index % 64)) - 1);
        usize::from(self.before[word]) + below.count_ones() as usize
    }
    fn count_before(&mut self) {
        let mut sum = 0;
        for (before, word) in self.before.iter_mut().zip(&self.present) {
            *before = sum;
            sum += word.count_ones() as u16;
        }
    }
    fn has(&self, index: usize) -> bool {
        self.present[index / 64] >> (index % 64) & 1 == 1
    }
    /// What this map says of block `index` of the region.
    pub fn get(&self, index: usize) -> Pointer {
        if self.has(index) {
            Pointer::unpack(self.pointers[self.rank(index)])
        } else if self.fill {
            Pointer::Zero
        } else {
            Pointer::Absent
        }
    }
    /// What this map says of the blocks from `index` on.
    pub fn get_all(&self, index: usize, out: &mut [Pointer]) {
        let rest = if self.fill {
            Pointer::Zero
        } else {
            Pointer::Absent
        };
        let mut rank = self.rank(index);
        for (i, pointer) in out.iter_mut().enumerate() {
            *pointer = if self.has(index + i) {
                rank += 1;
                Pointer::unpack(self.pointers[rank - 1])
            } else {
                rest
            };
        }
    }
    /// Sets block `index` to `pointer` (never `Absent`) and returns what stood there.
    pub fn set(&mut self, index: usize, pointer: Pointer) -> Pointer {
        debug_assert!(pointer != Pointer::Absent);
        let old = self.get(index);
        if self.fill && pointer == Pointer::Zero {
            self.remove(index);
            return old;
        }
        let rank = self.rank(index);
        if self.has(index) {
            self.pointers[rank] = pointer.pack();
        } else {
            self.present[index / 64] |= 1 << (index % 64);
            self.before[index / 64 + 1..]
                .iter_mut()
                .for_each(|n| *n += 1);
            self.pointers.insert(rank, pointer.pack());
        }
        old
    }
    fn remove(&mut self, index: usize) {
        if self.has(index) {
            let rank = self.rank(index);
            self.pointers.remove(rank);
            self.present[index / 64] &= !(1 << (index % 64));
            self.before[index / 64 + 1..]
                .iter_mut()
                .for_each(|n| *n -= 1);
        }
    }
    /// Makes every block zero.
    pub fn fill_zero(&mut self) {
        *self = RegionMap::zeros();
    }
    /// Are blocks without a pointer zero?
    pub fn fill(&self) -> bool {
        self.fill
    }
    /// Does it say nothing at all?
    pub fn is_empty(&self) -> bool {
        self.pointers.is_empty() && !self.fill
    }
    /// Has it no stored pointer (though it may be filled with zeros)?
    pub fn has_no_pointers(&self) -> bool {
        self.pointers.is_empty()
    }
    /// Number of stored pointers.
    pub fn len(&self) -> usize {
        self.pointers.len()
    }
    /// The presence bits.
    pub fn present(&self) -> &[u64; WORDS] {
        &self.present
    }
    /// Stored pointers in block order: index and pointer.
    pub fn iter(&self) -> impl Iterator<Item = (usize, Pointer)> + '_ {
        let mut word = 0;
        let mut bits = self.present[0];
        self.pointers.iter().map(move |&packed| {
            while bits == 0 {
                word += 1;
                bits = self.present[word];
            }
            let index = word * 64 + bits.trailing_zeros() as usize;
            bits &= bits - 1;
            (index, Pointer::unpack(packed))
        })
    }
    /// Lays this map over `older`: where it says nothing, `older` counts from now on.
    pub fn underlay(&mut self, older: &RegionMap) {
        if self.fill || older.is_empty() {
            return;
        }
        if self.is_empty() {
            self.clone_from(older);
            return;
        }
        let mut merged = RegionMap {
            fill: older.fill,
            ..RegionMap::default()
        };
        let mut mine = self.pointers.iter();
        let mut theirs = older.pointers.iter();
        merged
            .pointers
            .reserve(self.pointers.len().max(older.pointers.len()));
        for word in 0..WORDS {
            let (a, b) = (self.present[word], older.present[word]);
            let mut bits = a | b;
            while bits != 0 {
                let bit = bits & bits.wrapping_neg();
                bits &= bits - 1;
                let from_older = if b & bit != 0 {
                    theirs.next().copied()
                } else {
                    None
                };
                let packed = if a & bit != 0 {
                    mine.next().copied()
                } else {
                    from_older
                };
                let Some(packed) = packed else { continue };
                if older.fill && Pointer::unpack(packed) == Pointer::Zero {
                    continue;
                }
                merged.present[word] |= bit;
                merged.pointers.push(packed);
            }
        }
        merged.count_before();
        *self = merged;
    }
    /// This map without the stored pointers of the blocks whose bits are set in `gone`: absent then, or zeros where the map is filled.
    pub fn without(&self, gone: &[u64; WORDS]) -> RegionMap {
        let mut kept = RegionMap {
            fill: self.fill,
            ..RegionMap::default()
        };
        for (index, pointer) in self.iter() {
            if gone[index / 64] >> (index % 64) & 1 == 0 {
                kept.present[index / 64] |= 1 << (index % 64);
                kept.pointers.push(pointer.pack());
            }
        }
        kept.count_before();
        kept
    }
    /// Counts: data pointers, and blocks that are zero by this map.
    pub fn counts(&self) -> (u64, u64) {
        let data = self
            .pointers
            .iter()
            .filter(|&&p| matches!(Pointer::unpack(p), Pointer::Data { .. }))
            .count() as u64;
        let stored_zeros = self.pointers.len() as u64 - data;
        let zeros = if self.fill {
            REGION_BLOCKS as u64 - data
        } else {
            stored_zeros
        };
        (data, zeros)
    }
    /// Bytes of memory this map occupies, roughly.
    pub fn memory(&self) -> usize {
        size_of::<RegionMap>() + self.pointers.capacity() * 8
    }
}

/// A piece of a block map, as merge reads and writes them: in rising order, never overlapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The pointers of one region.
    Region(Region, RegionMap),
    /// This many regions from the given one on are zero as a whole.
    Zeros(Region, u32),
}

impl Item {
    /// First region.
    pub fn start(&self) -> u32 {
        match self {
            Item::Region(r, _) | Item::Zeros(r, _) => r.0,
        }
    }
    /// One past the last region.
    pub fn end(&self) -> u32 {
        match self {
            Item::Region(r, _) => r.0 + 1,
            Item::Zeros(r, n) => r.0 + n,
        }
    }
}

/// A source of merge.
pub type Items<'a> = Box<dyn Iterator<Item = Result<Item>> + 'a>;
