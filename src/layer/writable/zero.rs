//! Zeroing: blocks, parts of regions, and whole regions of which nothing need be in memory.

use super::super::space::Extents;
use super::Layer;
use super::history::{KNOWN_REGIONS, note_region};
use crate::error::Result;
use crate::format::{CommitEntry, Pointer};
use crate::map::{Ranges, WORDS};
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::{Lba, REGION_BLOCKS, Region};
use std::sync::Arc;

impl Layer {
    /// Makes `count` whole blocks from `lba` zero.
    pub fn zero(&self, lba: Lba, count: u64) -> Result<()> {
        let mut done = 0;
        while done < count {
            done += self.zero_some(Lba(lba.0 + done as u32), count - done)?;
        }
        Ok(())
    }
    /// Makes the first of `count` whole blocks from `lba` zero; returns how many: one at least. An error leaves all as it was, so that whoever makes
    /// room and tries again goes on there.
    pub fn zero_some(&self, lba: Lba, count: u64) -> Result<u64> {
        let whole = match lba.index() {
            0 => count / REGION_BLOCKS as u64,
            _ => 0,
        };
        if whole > 0 {
            // At most 4 GiB at a time: bounds the list of freed slots.
            let done = self.zero_regions(lba.region(), whole.min(2048) as u32)?;
            return Ok(u64::from(done) * REGION_BLOCKS as u64);
        }
        let n = ((REGION_BLOCKS - lba.index()) as u64).min(count) as usize;
        self.zero_part(lba, n)?;
        Ok(n as u64)
    }

    /// Zeroes some blocks of one region.
    fn zero_part(&self, lba: Lba, n: usize) -> Result<()> {
        let taken = self.take(n as u64, 0)?;
        self.publish(lba, &[Pointer::Zero; REGION_BLOCKS][..n], taken)
    }

    /// Zeroes whole regions, `regions` at most; returns how many.
    fn zero_regions(&self, region: Region, regions: u32) -> Result<u32> {
        let mut end = region.0 + regions;
        // Damage is met before anything is changed: the whole range is zeroed or nothing of it.
        let runs = self.runs.read().clone();
        let mut in_runs = Ranges::default();
        for run in runs.iter().filter(|r| r.may_touch(region.0, end)) {
            for item in run.items(region) {
                let item = item.map_err(|e| e.layer(self.id).path(self.file.path()))?;
                if item.start() >= end {
                    break;
                }
                in_runs.insert(item.start(), item.end(), 0);
            }
        }
        let mut entries = 2;
        if self.keeps_history() {
            // What they replace must fit into one commit.
            let of = |r: u32| self.shard(Region(r)).read().contains_key(&r);
            let mut known = (region.0..end).filter(|&r| in_runs.get(r).is_some() || of(r));
            let some: Vec<u32> = known.by_ref().take(KNOWN_REGIONS as usize).collect();
            end = known.next().unwrap_or(end);
            entries += u64::from(end - region.0) + some.len() as u64 * REGION_BLOCKS as u64;
        }
        let taken = self.take_for(entries, 0, u64::from(end - region.0))?;
        let mut reusable = Extents::default();
        let done = {
            let _gate = self.gate.read();
            let epoch = self.epoch.load(SeqCst);
            let done = (region.0..end).try_for_each(|r| {
                // A checkpoint may have put new runs in place meanwhile: then their word counts, roughly.
                let known = || {
                    let now = self.runs.read();
                    if Arc::ptr_eq(&now, &runs) {
                        in_runs.get(r).is_some()
                    } else {
                        now.iter().any(|run| run.may_touch(r, r + 1))
                    }
                };
                self.zero_region(Region(r), &known, epoch, &mut reusable)
            });
            self.log.lock().counted.reserved += taken.entries;
            self.expected.fetch_sub(taken.logged, SeqCst);
            self.writers.fetch_sub(1, SeqCst);
            done
        };
        self.retire(reusable);
        done.map(|()| end - region.0)
    }

    /// Zeroes a whole region, of which runs may know something. The gate is held.
    fn zero_region(
        &self,
        region: Region,
        in_runs: &dyn Fn() -> bool,
        epoch: u64,
        reusable: &mut Extents,
    ) -> Result<()> {
        let all = REGION_BLOCKS as i64;
        let r = region.0;
        let mut table = self.shard(region).write();
        // The runs last: a checkpoint installs its run before it forgets the zeroed ranges that are in it.
        let known = table.contains_key(&r) || self.zeroed.read().get(r).is_some() || in_runs();
        if known {
            let resident = self.resident(&mut table, region)?;
            let fresh = resident.changed == epoch;
            let mut log = self.log.lock();
            let (data, zeros) = resident.map.counts();
            let noted = if fresh { resident.dirty } else { [0; WORDS] };
            note_region(&mut log.counted.undo, region, Some((&resident.map, &noted)));
            for (index, pointer) in resident.map.iter() {
                let dirty = fresh && resident.dirty[index / 64] >> (index % 64) & 1 == 1;
                self.replaced(pointer, dirty, &mut log.counted, reusable);
            }
            log.counted.data_delta -= data as i64;
            log.counted.zero_delta += all - zeros as i64;
            self.data_blocks.fetch_sub(data as i64, SeqCst);
            self.zero_blocks.fetch_add(all - zeros as i64, SeqCst);
        }
        {
            let mut log = self.log.lock();
            if !known {
                note_region(&mut log.counted.undo, region, None);
                self.count(&mut log.counted, Pointer::Zero, all);
            }
            let entry = CommitEntry::new(region.first(), REGION_BLOCKS as u32, Pointer::Zero);
            self.append(&mut log, entry);
        }
        // From here on the range in `zeroed` stands for the region: it takes no memory of its own.
        self.zeroed.write().insert(r, r + 1, epoch);
        table.remove(&r);
        Ok(())
    }
}
