//! What is seen of the layer files as a history goes on: that it reaches what it is meant to reach.

use crate::common::{Reached, audit};
use forkdisk::io::sim::SimDisk;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct Watch {
    sequences: BTreeMap<String, u64>,
    runs: BTreeMap<String, BTreeSet<u32>>,
    /// Sums of the slots seen, by file.
    slots: BTreeMap<String, BTreeMap<usize, u32>>,
    first_records: BTreeMap<String, Vec<u8>>,
}

impl Watch {
    pub fn look(&mut self, sim: &SimDisk, reached: &mut Reached) {
        for name in sim.file_names() {
            if !name.ends_with(".layer") {
                continue;
            }
            let bytes = sim.read_file(&name).expect("a file");
            let Some(superblock) = audit::superblock(&bytes) else {
                continue;
            };
            let runs: BTreeSet<u32> = superblock.run_refs().iter().map(|r| r.slot.get()).collect();
            let last = self
                .sequences
                .insert(name.clone(), superblock.sequence.get());
            let old = self
                .runs
                .insert(name.clone(), runs.clone())
                .unwrap_or_default();
            if last.is_some_and(|l| l < superblock.sequence.get()) && old != runs {
                reached.note("checkpoint");
                if old.iter().any(|r| !runs.contains(r)) {
                    reached.note("runs merged");
                }
            }
            let slots = self.slots.entry(name.clone()).or_default();
            for (i, slot) in bytes.chunks(4096).enumerate().skip(1024) {
                if slot.iter().all(|b| *b == 0) {
                    continue;
                }
                let sum = forkdisk::format::crc(slot);
                if slots.insert(i, sum).is_some_and(|old| old != sum) {
                    reached.note("slot reused");
                }
            }
            let first = bytes
                .get(4 * 4096..4 * 4096 + 64)
                .unwrap_or_default()
                .to_vec();
            if first.starts_with(b"FDCOMMIT") {
                let old = self.first_records.insert(name, first.clone());
                if old.is_some_and(|old| old != first) {
                    reached.note("journal wrapped");
                }
            }
        }
    }
}
