//! A disk: a fixed-size array of bytes that outlives crashes. All that the doors (`serve`) know.
//!
//! Always true:
//! - what a `write`, `discard` or `write_zeroes` changed is seen by every read that starts after it returned;
//! - after `flush` returned `Ok`, all that had returned before `flush` was called outlives any crash;
//! - two requests that overlap in time and in place happen in some order, whole block by whole block:
//!   no byte of either is lost to the other's neighbourhood;
//! - after an error of kind `Poisoned` nothing is accepted any more until the disk is reopened.
//!
//! Not here: names, devices, requests and their queues.

mod ahead;
pub mod cow;

pub use cow::{CowDisk, DiskStats};

use crate::error::{Error, Kind, Result};
use crate::units::BLOCK;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// A fixed-size array of bytes that outlives crashes. Any offset and any length within the size; all
/// methods may be called by many threads at once.
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of the block size.
    fn size(&self) -> u64;
    /// Bytes of the host that are this disk's own: what `stat` and `du` of its file show.
    fn allocated(&self) -> u64 {
        self.size()
    }
    /// May it be written?
    fn read_only(&self) -> bool;
    /// Fills `buf` from `at`: never short; out of range is `Invalid`.
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()>;
    /// Begins to read what of the range is not in memory, and does not wait for the data; `false` if nothing had to be begun, as far as can be known. A hint: the
    /// range is one that [`Disk::read`] is about to be asked for, which refuses what is out of range.
    fn begin_read(&self, _at: u64, _len: u64) -> bool {
        false
    }
    /// Writes `buf` at `at`: visible on return, durable after [`Disk::flush`].
    fn write(&self, buf: &[u8], at: u64) -> Result<()>;
    /// Makes exactly the bytes of the range read as zeros (never what lies below) and gives the space of
    /// whole blocks back.
    fn discard(&self, at: u64, len: u64) -> Result<()>;
    /// Makes exactly the bytes of the range zeros. Space may be given back.
    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.discard(at, len)
    }
    /// Makes all that returned before this call durable.
    fn flush(&self) -> Result<()>;
    /// [`Disk::flush`] for somebody who waits for it: what need not be done before he is answered is left to [`Disk::tidy`].
    fn flush_first(&self) -> Result<()> {
        self.flush()
    }
    /// Was so much written that [`Disk::tidy`] is due, though nobody flushes? To be asked after each write.
    fn is_filling(&self) -> bool {
        false
    }
    /// What [`Disk::flush_first`] has left, or many writes without one, if they have left anything. To be called after each flush, while nobody waits.
    fn tidy(&self) {}
    /// A file that holds exactly these bytes at these places and never changes, if there is one: then others can read it past this disk, and past
    /// its checksums. The error says why there is none.
    fn plain_file(&self) -> Result<OwnedFd> {
        Err(Error::new(
            Kind::Unsupported,
            "the disk is not the contents of one file",
        ))
    }
    /// What stands where in `at..at+len` (rounded outwards to blocks), in order and without gaps.
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>>;
}

/// The whole blocks of a range that is not empty, and the parts of blocks before and behind them: places and lengths, which may be 0.
pub fn parts(at: u64, len: u64) -> [(u64, u64); 3] {
    let end = at + len;
    let (from, to) = (at.next_multiple_of(BLOCK), end - end % BLOCK);
    match from <= to {
        true => [(from, to - from), (at, from - at), (to, end - to)],
        // All of it within one block.
        false => [(from, 0), (at, len), (end, 0)],
    }
}

/// Where something else than zeros may stand, of what [`Disk::extents`] found: from and to, in whole blocks. What lies side by side is one stretch, whichever
/// layer or base it is in, so that it can be read at once.
pub fn stretches(extents: &[Extent]) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        match (extent.from, found.last_mut()) {
            (Source::Absent | Source::Zero { .. } | Source::Hole, _) => {}
            (_, Some(last)) if last.end == extent.at => last.end += extent.len,
            _ => found.push(extent.at..extent.at + extent.len),
        }
    }
    found
}

/// A disk that could not be opened again under its users: every request gets the same error.
pub struct FailedDisk {
    size: u64,
    why: Error,
}

impl FailedDisk {
    /// A disk of `size` bytes that fails with `why`.
    pub fn new(size: u64, why: Error) -> FailedDisk {
        FailedDisk { size, why }
    }
}

impl Disk for FailedDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, _: &mut [u8], _: u64) -> Result<()> {
        Err(self.why.clone())
    }
    fn write(&self, _: &[u8], _: u64) -> Result<()> {
        Err(self.why.clone())
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(self.why.clone())
    }
    fn flush(&self) -> Result<()> {
        Err(self.why.clone())
    }
    fn extents(&self, _: u64, _: u64) -> Result<Vec<Extent>> {
        Err(self.why.clone())
    }
}

/// A stretch of a disk whose blocks come from one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where the bytes come from.
    pub from: Source,
}

/// Where the bytes of an extent come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Zeros: nothing was ever written, or beyond the base's end.
    Absent,
    /// Zeros that a layer records: discarded, or written as zeros. `depth` 0 is the disk's own layer, 1 its parent...
    Zero {
        /// Layers above it in the chain.
        depth: u32,
    },
    /// Blocks of a layer, from consecutive slots.
    Layer {
        /// Layers above it in the chain.
        depth: u32,
        /// First slot in that layer's file.
        slot: crate::units::Slot,
    },
    /// The base image, at the same offset.
    Base,
    /// A hole of the base image: zeros that take no space.
    Hole,
}
