//! A set of slots of one layer file: as large as what is in it, whatever a superblock claims of the file.

use std::collections::BTreeMap;

/// Slots in one piece of the set.
const PIECE: u32 = 4096;
const WORDS: usize = PIECE as usize / 64;

/// One bit for each slot, in pieces that are there only where a slot is.
pub(super) struct SlotSet {
    pieces: BTreeMap<u32, Box<[u64; WORDS]>>,
    /// No slot from here on can be in it.
    end: u64,
}

impl SlotSet {
    pub fn new(end: u64) -> SlotSet {
        SlotSet {
            pieces: BTreeMap::new(),
            end,
        }
    }
    /// Adds a slot; `false` if it was there, or cannot be.
    pub fn insert(&mut self, slot: u32) -> bool {
        if u64::from(slot) >= self.end {
            return false;
        }
        let piece = self
            .pieces
            .entry(slot / PIECE)
            .or_insert_with(|| Box::new([0; WORDS]));
        let word = &mut piece[(slot % PIECE) as usize / 64];
        let bit = 1u64 << (slot % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }
    /// The slots from `start` to before `end`, in order.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
        let first = (start / u64::from(PIECE)).min(u64::from(u32::MAX)) as u32;
        self.pieces
            .range(first..)
            .take_while(move |(piece, _)| u64::from(**piece) * u64::from(PIECE) < end)
            .flat_map(|(piece, words)| {
                let base = u64::from(*piece) * u64::from(PIECE);
                words.iter().enumerate().flat_map(move |(i, word)| {
                    let mut bits = *word;
                    std::iter::from_fn(move || {
                        let bit = bits.trailing_zeros();
                        bits &= bits.wrapping_sub(1);
                        (bit < 64).then(|| base + i as u64 * 64 + u64::from(bit))
                    })
                })
            })
            .filter(move |slot| (start..end).contains(slot))
    }
    /// How many of the slots from `start` to before `end` are in it.
    pub fn count(&self, start: u64, end: u64) -> u64 {
        self.within(start, end).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_found_again() {
        let mut set = SlotSet::new(1 << 32);
        for slot in [0, 1, 63, 64, 4095, 4096, u32::MAX] {
            assert!(set.insert(slot));
            assert!(!set.insert(slot));
        }
        assert_eq!(set.count(0, 1 << 32), 7);
        assert_eq!(set.within(1, 4096).collect::<Vec<_>>(), [1, 63, 64, 4095]);
        assert_eq!(set.count(4096, 4097), 1);
        assert_eq!(set.count(5000, 1 << 31), 0);
        assert!(!SlotSet::new(10).insert(10));
    }
}
