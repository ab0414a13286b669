//! The count of what is seen through a layer, in its superblock.
//!
//! Always true: it is known only together with the sequence with which it was written. A program that does not know of it, and changes the
//! layer, raises the sequence alone: then the count is not known, instead of being wrong.

use super::Superblock;
use crate::units::Id;
use zerocopy::little_endian::U64;

/// No disk has more blocks.
const MOST: u64 = 1 << 32;

impl Superblock {
    /// How many data blocks are seen through the layer as its runs are, and over which base they were counted; `None`: that is not known.
    pub fn refer(&self) -> Option<(u64, Id)> {
        let known = self.refer_at.get() == self.sequence.get() && self.sequence.get() > 0;
        let (refer, over) = (self.refer.get(), Id(self.refer_over));
        (known && over != Id([0; 16]) && refer <= MOST).then_some((refer, over))
    }
    /// Notes that count, for the sequence that the superblock has now.
    pub fn set_refer(&mut self, refer: Option<(u64, Id)>) {
        let at = refer.map_or(0, |_| self.sequence.get());
        let (refer, over) = refer.unwrap_or((0, Id([0; 16])));
        self.refer = U64::new(refer);
        self.refer_over = over.0;
        self.refer_at = U64::new(at);
    }
    /// The next superblock: of the same maps, so that the count goes along.
    pub fn advance(&mut self) {
        let refer = self.refer();
        self.sequence = U64::new(self.sequence.get().saturating_add(1));
        self.set_refer(refer);
    }
}
