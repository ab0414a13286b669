//! The size of a layer that is open for writing, and how many data blocks it may have.
//!
//! Always true:
//! - the size that others are told is durable;
//! - past its size a layer shows zeros, whatever lies below: whoever makes it smaller zeroes first what is to go;
//! - no block is published that would make the layer's data blocks more than its limit: they are counted under the lock of the log, in which they
//!   change.

use super::{Layer, State};
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::map::RegionMap;
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::{Lba, REGION_BLOCKS};
use zerocopy::little_endian::U64;

/// The limit of a layer that has none.
pub(super) const NONE: u64 = u64::MAX;

impl Layer {
    /// Gives the layer another size in bytes, which is durable on return. If it becomes smaller, what is cut off must have been zeroed and flushed.
    /// An error before anything is written (no space for the block map) leaves the size as it was; a later one stops the layer.
    pub fn set_size(&self, size: u64) -> Result<()> {
        let mut commit = self.commit.lock();
        self.check_poison()?;
        let former = commit.superblock.size;
        commit.superblock.size = U64::new(size);
        if let Err(e) = self.checkpoint(&mut commit, State::Writable) {
            commit.superblock.size = former;
            return Err(e);
        }
        // Both copies: one that rots later must not bring the former size back.
        self.sync(&mut commit)?;
        self.size.store(size, SeqCst);
        Ok(())
    }
    /// Lets the layer have at most so many data blocks from now on; `None`: as many as there is room for. No write may be under way.
    pub fn set_limit(&self, blocks: Option<u64>) {
        self.limit.store(blocks.unwrap_or(NONE), SeqCst);
    }
    /// Is the number of its data blocks limited?
    pub fn is_limited(&self) -> bool {
        self.limit.load(SeqCst) != NONE
    }
    /// Stops the layer for good: nothing is accepted any more, nor by a successor of this process.
    pub fn stop(&self, why: &Error) {
        self.poison(why.clone());
    }
    /// Would the blocks from `lba` on, all of one region, find room if they got these pointers? To be asked before data is written for
    /// them; publishing them asks again, and that answer counts. The caller holds a guard.
    pub fn ask_room(&self, lba: Lba, pointers: &[Pointer]) -> Result<()> {
        let mut old = [Pointer::Absent; REGION_BLOCKS];
        let old = &mut old[..pointers.len()];
        self.lookup(lba.region(), lba.index(), old)?;
        self.has_room(growth(old.iter().copied(), pointers))
    }
    /// [`Layer::ask_room`] of what is about to be published. The lock of the log is held.
    pub(super) fn room_in(
        &self,
        map: &RegionMap,
        index: usize,
        pointers: &[Pointer],
    ) -> Result<()> {
        if !self.is_limited() {
            return Ok(());
        }
        let old = (index..index + pointers.len()).map(|i| map.get(i));
        self.has_room(growth(old, pointers))
    }
    fn has_room(&self, more: i64) -> Result<()> {
        let limit = i64::try_from(self.limit.load(SeqCst)).unwrap_or(i64::MAX);
        let total = self.data_blocks.load(SeqCst).saturating_add(more);
        // What takes no more than there was is never refused, though there be more than there may.
        if more <= 0 || total <= limit {
            return Ok(());
        }
        Err(Error::new(Kind::NoSpace, "the disk has used its quota").of_quota())
    }
}

/// How many more data blocks there are if `new` takes the place of `old`.
fn growth(old: impl Iterator<Item = Pointer>, new: &[Pointer]) -> i64 {
    let data = |p: &Pointer| i64::from(matches!(p, Pointer::Data { .. }));
    old.zip(new).map(|(old, new)| data(new) - data(&old)).sum()
}
