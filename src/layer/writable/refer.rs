//! Keeping count of what is seen through the layer (FORMAT.md, "Superblock").
//!
//! Always true: the count in a superblock is that of its runs. So nothing that comes between two checkpoints (a crash, a takeover, a commit that is dropped)
//! concerns it: what the journal adds is counted when it becomes a run.

use super::{Commit, Layer};
use crate::error::Result;
use crate::layer::refer::{Below, change};
use crate::map::{Items, merge};
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::{Id, Region};
use std::sync::Arc;

/// From so many changes in the journal on, a checkpoint is worth it before the disk is halted for another one.
const MANY: u64 = 2048;

/// So many blocks are counted anew while the disk is opened (20 ms); what is more is counted by whoever wants to know.
const FEW: u64 = 1 << 16;

impl Layer {
    /// Says what lies below it: now, or from now on, where it is the same in other files.
    pub fn lies_over(&self, below: Arc<dyn Below>) {
        *self.below.lock() = Some(below);
    }
    /// Takes most of the work from a checkpoint that users of the disk will have to wait for.
    pub fn checkpoint_ahead(&self) -> Result<()> {
        let many = self.commit.lock().memtable.applied() > MANY;
        match many {
            true => self.checkpoint_now(),
            false => Ok(()),
        }
    }
    /// How many data blocks are seen through the layer once the journal is a run, and over which base; `None` if nobody knows.
    pub(super) fn refer(&self, c: &Commit) -> Option<(u64, Id)> {
        let kept = c.superblock.refer();
        let Some(below) = self.below.lock().clone() else {
            return kept.filter(|_| c.memtable.is_empty());
        };
        if self.uncounted.load(SeqCst) {
            return None;
        }
        let kept = kept.filter(|(_, base)| below.counts_over(*base));
        match self.count_refer(c, kept.map(|(refer, _)| refer), &*below) {
            Ok(refer) => {
                let over = below.counted_over(kept.map(|(_, base)| base));
                refer.map(|refer| (refer, over))
            }
            Err(e) => {
                // Whatever cannot be read below is met by whoever reads it: it is no reason to stop those who write.
                tracing::warn!(layer = %self.id, "what is seen through it is not counted any more: {e}");
                self.uncounted.store(true, SeqCst);
                None
            }
        }
    }
    fn count_refer(&self, c: &Commit, kept: Option<u64>, below: &dyn Below) -> Result<Option<u64>> {
        let runs = self.runs.read().clone();
        if let Some(refer) = kept {
            let change = change(c.memtable.items(), &runs, below)?;
            return Ok(refer.checked_add_signed(change));
        }
        // It was written by a program that did not count, or over what was not counted: all of it, once, if nobody waits long for it.
        let entries = runs.iter().map(|run| run.reference().pointers.get());
        if entries.sum::<u64>() + c.memtable.applied() > FEW {
            return Ok(None);
        }
        let Some(refer) = below.refer()? else {
            return Ok(None);
        };
        let mut all: Vec<Items<'_>> = vec![c.memtable.items()];
        all.extend(
            runs.iter()
                .map(|run| Box::new(run.items(Region(0))) as Items<'_>),
        );
        let change = change(Box::new(merge(all)), &[], below)?;
        Ok(refer.checked_add_signed(change))
    }
}
