//! The inside of one layer file at rest: its maps, its accounts, its free space.

use super::Check;
use super::slots::SlotSet;
use crate::error::{Error, Kind, Result};
use crate::format::{
    self, DATA_START, FreeExtent, Header, Pointer, STATE_SEALED, STATE_WRITABLE, Superblock,
};
use crate::io::File;
use crate::layer::{MappedRun, recover};
use crate::map::run::Run;
use crate::map::{Item, Items, merge};
use crate::store::{Below, Finding};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Region, Slot};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// Findings of one kind told of one file: a damaged map has thousands.
const TOLD: u32 = 10;

/// What is known of the slots of a layer file at rest.
pub(super) struct Accounts {
    /// Slots below the high-water mark that are neither in use nor free.
    pub lost: u64,
    /// Slots that are not in use and have host space: first and number.
    pub idle: Vec<(u64, u64)>,
}

impl Check<'_> {
    /// The inside of a layer file. What is found is noted; an error ends the look at this file. The accounts are those of a layer that
    /// was closed.
    pub(super) fn file(&mut self, file: &dyn File, header: &Header) -> Result<Option<Accounts>> {
        let id = Id(header.layer);
        let found = recover::superblock(file, header)?;
        let sb = found.superblock;
        let writable = sb.state.get() == STATE_WRITABLE;
        if found.fresh {
            return Ok(None);
        }
        // After a crash one copy may be torn; after a clean close never.
        if found.damaged_copy && !writable {
            let slot = if found.second_differs { 2 } else { 1 };
            let mut finding = self.about(
                Below::Layer(id),
                format!("copy {slot} of the superblock is damaged; the other is in use, `forkdisk check --repair` writes it anew"),
            );
            (finding.slot, finding.offset) = (Some(slot), Some(Slot(slot).at()));
            // Nobody sees anything of it.
            finding.affected.clear();
            self.report.corruptions.push(finding);
        }
        let len = file.len()?;
        let mut used = SlotSet::new(sb.high_water.get());
        let mut runs: Vec<Arc<MappedRun>> = Vec::new();
        let mut bad = 0;
        for r in sb.run_refs() {
            let at = Slot(r.slot.get()).at();
            if at + r.len.get() > len {
                return Err(Error::new(
                    Kind::Corrupt,
                    "the file is cut: a block map lies past its end",
                )
                .offset(at));
            }
            let run = Run::open(file.map(at, r.len.get() as usize)?, *r, &id)?;
            run.verify()?;
            // As many as the file holds: the run's end was just looked at.
            for slot in r.slot.get()..r.slot.get() + r.len.get().div_ceil(BLOCK) as u32 {
                if !used.insert(slot) {
                    self.twice(id, &mut bad, slot, None, "a block map");
                }
            }
            runs.push(Arc::new(run));
        }
        let free = free_list(file, &sb)?;
        if sb.free_slot.get() != 0 {
            // All of its room, of which the list may need less.
            for slot in sb.free_slot.get()..sb.free_slot.get() + sb.free_slots.get() {
                if !used.insert(slot) {
                    self.twice(id, &mut bad, slot, None, "the free list");
                }
            }
        }
        self.history(id, file, &sb, &mut used)?;
        let replay = if writable {
            Some(recover::replay(file, &sb, &runs)?)
        } else {
            None
        };
        let mut sources: Vec<Items<'_>> = Vec::new();
        if let Some(replay) = &replay {
            sources.push(replay.memtable.items());
        }
        sources.extend(runs.iter().map(|r| r.items(Region(0))));
        let (mut data, mut zeros) = (0u64, 0u64);
        for item in merge(sources) {
            match item? {
                Item::Zeros(_, n) => zeros += u64::from(n) * 512,
                Item::Region(region, map) => {
                    let (d, z) = map.counts();
                    data += d;
                    zeros += z;
                    for (index, pointer) in map.iter() {
                        let Pointer::Data { slot, .. } = pointer else {
                            continue;
                        };
                        let lba = u64::from(region.lba(index).0);
                        if slot.at() + BLOCK > len {
                            bad += 1;
                            let message = format!(
                                "block {lba} lies past the end of the file, in slot {slot}"
                            );
                            self.note(id, bad, slot.0, Some(lba), message);
                        } else if !writable && !used.insert(slot.0) {
                            self.twice(id, &mut bad, slot.0, Some(lba), &format!("block {lba}"));
                        }
                    }
                }
            }
        }
        if writable {
            return Ok(None);
        }
        if (data, zeros) != (sb.data_blocks.get(), sb.zero_blocks.get()) {
            let finding = self.about(
                Below::Layer(id),
                format!(
                    "the superblock counts {} data and {} zero blocks, the map has {data} and {zeros}",
                    sb.data_blocks, sb.zero_blocks
                ),
            );
            self.report.corruptions.push(finding);
        }
        self.free_space(id, file, &sb, free, used, len).map(Some)
    }
    fn twice(&mut self, id: Id, bad: &mut u32, slot: u32, lba: Option<u64>, of: &str) {
        *bad += 1;
        let message = format!("slot {slot} of {of} is in use twice or out of range");
        self.note(id, *bad, slot, lba, message);
    }
    fn note(&mut self, id: Id, count: u32, slot: u32, lba: Option<u64>, message: String) {
        let lba = lba.map(|l| (l, l + 1));
        let finding = match count {
            1..=TOLD => Finding {
                slot: Some(slot),
                offset: Some(Slot(slot).at()),
                lba,
                affected: self.survey.affected(Below::Layer(id), lba),
                ..self.about(Below::Layer(id), message)
            },
            n if n == TOLD + 1 => self.about(Below::Layer(id), "and more of the same"),
            _ => return,
        };
        self.report.corruptions.push(finding);
    }
    fn free_space(
        &mut self,
        id: Id,
        file: &dyn File,
        sb: &Superblock,
        free: Vec<(u64, u64)>,
        mut used: SlotSet,
        len: u64,
    ) -> Result<Accounts> {
        let high = sb.high_water.get();
        let mut both = 0;
        for &(start, n) in &free {
            for slot in used.within(start, start + n).collect::<Vec<_>>() {
                both += 1;
                let message = format!("slot {slot} is in use and in the free list");
                self.note(id, both, slot as u32, None, message);
            }
        }
        let listed: u64 = free.iter().map(|&(_, n)| n).sum();
        let known = used.count(u64::from(DATA_START), high) + listed - u64::from(both);
        let lost = (high - u64::from(DATA_START)).saturating_sub(known);
        if sb.state.get() != STATE_SEALED && lost > sb.forgotten.get() {
            let lost = lost - sb.forgotten.get();
            let finding = self.about(
                Below::Layer(id),
                format!("{lost} slots are neither in use nor free"),
            );
            self.leak(finding);
        }
        // What a seal left so that nobody had to wait for it is given back by the daemon, or by `gc`.
        if sb.unpunched.get() != 0 {
            let journal = (
                u64::from(format::JOURNAL_START),
                u64::from(format::JOURNAL_SLOTS),
            );
            for (start, n) in free.iter().copied().chain([journal]) {
                for slot in start..start + n {
                    used.insert(slot as u32);
                }
            }
        }
        // Host space behind what is not in use: the journal of a closed layer, free slots, the tail.
        let start = Slot(format::JOURNAL_START).at();
        let mut idle: Vec<(u64, u64)> = Vec::new();
        if len > start {
            for (at, n) in file.data_ranges(start, len - start)? {
                let (mut from, end) = (at / BLOCK, (at + n).div_ceil(BLOCK));
                for slot in used.within(from, end).chain([end]) {
                    if slot > from {
                        idle.push((from, slot - from));
                    }
                    from = slot + 1;
                }
            }
        }
        let bytes = idle.iter().map(|&(_, n)| n * BLOCK).sum::<u64>();
        if bytes > 0 {
            let finding = self.about(
                Below::Layer(id),
                format!("{bytes} bytes of host space are behind slots that are not in use"),
            );
            self.leak(finding);
        }
        Ok(Accounts { lost, idle })
    }
}

/// The free list of a superblock, checked.
pub(super) fn free_list(file: &dyn File, sb: &Superblock) -> Result<Vec<(u64, u64)>> {
    let count = sb.free_count.get() as usize;
    let bytes = if sb.free_slot.get() == 0 {
        sb.free_inline[..count].as_bytes().to_vec()
    } else {
        let mut bytes = vec![0; count * size_of::<FreeExtent>()];
        file.read_at(&mut bytes, Slot(sb.free_slot.get()).at())?;
        bytes
    };
    let at = u64::from(sb.free_slot.get().max(1)) * BLOCK_SIZE as u64;
    let bad = |what: &str| Error::new(Kind::Corrupt, format!("free list: {what}")).offset(at);
    if format::crc(&bytes) != sb.free_crc.get() {
        return Err(bad("checksum mismatch"));
    }
    let list = <[FreeExtent]>::ref_from_bytes(&bytes).map_err(|_| bad("it is cut"))?;
    let list: Vec<(u64, u64)> = list
        .iter()
        .map(|e| (e.slot.get().into(), e.slots.get().into()))
        .collect();
    let mut last = u64::from(DATA_START);
    for &(start, n) in &list {
        if start < last || n == 0 || start + n > sb.high_water.get() {
            return Err(bad("its extents are out of order"));
        }
        last = start + n;
    }
    Ok(list)
}
