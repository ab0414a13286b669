//! The history of a layer: its segments, and the blocks that it holds.

use super::Check;
use super::scrub::Scrub;
use super::slots::SlotSet;
use super::survey::open_layer;
use crate::error::{Error, Result};
use crate::format::{self, Pointer, Step, Superblock};
use crate::io::File;
use crate::layer::ReadLayer;
use crate::layer::history::{read_segment, segments};
use crate::store::{Below, Finding, layer_file};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Slot};

/// Damaged blocks of one history told of.
const TOLD: usize = 100;

/// A block of the past that does not match.
struct Lost {
    sequence: u64,
    lba: u64,
    slot: u32,
    sum: u32,
}

impl Check<'_> {
    /// The history of a layer file at rest: its segments are whole, and it holds nothing that is held by something else. Damage of it affects
    /// nothing that a disk shows now.
    pub(super) fn history(
        &mut self,
        id: Id,
        file: &dyn File,
        sb: &Superblock,
        used: &mut SlotSet,
    ) -> Result<()> {
        let chain = segments(file, sb)?;
        let mut twice = 0u64;
        for segment in &chain.segments {
            let own = segment.slot..segment.slot + segment.slots;
            twice += own.filter(|slot| !used.insert(*slot)).count() as u64;
            match read_segment(file, &id, segment) {
                Err(e) if e.of_resources() => return Err(e),
                Err(e) => self.past(id, &e),
                Ok(steps) => {
                    let held = steps.iter().flat_map(Step::slots);
                    twice += held.filter(|slot| !used.insert(*slot)).count() as u64;
                }
            }
        }
        if let Some(e) = &chain.broken {
            self.past(id, e);
        }
        if twice > 0 {
            let what =
                format!("the history holds {twice} slots that are in use twice or out of range");
            self.corrupt(Below::Layer(id), what);
        }
        Ok(())
    }
    fn past(&mut self, id: Id, e: &Error) {
        let finding = Finding {
            offset: e.offset_at(),
            affected: Vec::new(),
            ..self.about(Below::Layer(id), e.to_string())
        };
        self.report.corruptions.push(finding);
    }
}

impl Scrub<'_> {
    /// Reads the blocks that the history of a layer holds.
    pub(super) fn history(&mut self, id: Id, layer: &ReadLayer) -> Result<()> {
        let mut blocks = Vec::new();
        let read = layer.each_step(0, |step| {
            for entry in &step.undo {
                if let (lba, _, Pointer::Data { slot, sum }) = entry.get() {
                    blocks.push(Lost {
                        sequence: step.sequence,
                        lba: lba.0.into(),
                        slot: slot.0,
                        sum,
                    });
                }
            }
            Ok(())
        });
        if let Err(e) = read {
            // Its writer may have let go of it meanwhile.
            let again = open_layer(self.store(), id).and_then(|now| now.each_step(0, |_| Ok(())));
            if again.is_err() {
                self.told(|check| check.past(id, &e));
            }
        }
        blocks.sort_by_key(|b| b.slot);
        let file = layer.file();
        let mut block = vec![0; BLOCK_SIZE];
        let mut lost = Vec::new();
        for b in blocks {
            let at = Slot(b.slot).at();
            file.forget_cached(at, BLOCK);
            if file.read_at(&mut block, at).is_err() || format::crc(&block) != b.sum {
                lost.push(b);
            }
            self.read(BLOCK)?;
        }
        if lost.is_empty() {
            return Ok(());
        }
        // What expired meanwhile may hold anything.
        let mut kept = std::collections::HashSet::new();
        if let Ok(now) = open_layer(self.store(), id) {
            // What cannot be read was told.
            let _ = now.each_step(0, |step| {
                kept.extend(step.slots().map(|slot| (step.sequence, slot)));
                Ok(())
            });
        }
        lost.retain(|b| kept.contains(&(b.sequence, b.slot)));
        for b in lost.iter().take(TOLD) {
            let offset = Slot(b.slot).at();
            let what = format!(
                "block {} as it was before point #{} of the history does not match its checksum (offset {offset:#x} of layers/{})",
                b.lba,
                b.sequence,
                layer_file(id)
            );
            self.told(|check| {
                let finding = Finding {
                    lba: Some((b.lba, b.lba + 1)),
                    slot: Some(b.slot),
                    offset: Some(offset),
                    affected: Vec::new(),
                    ..check.about(Below::Layer(id), what)
                };
                check.report.corruptions.push(finding);
            });
        }
        if lost.len() > TOLD {
            let more = format!("and {} more blocks of the history", lost.len() - TOLD);
            self.told(|check| check.corrupt(Below::Layer(id), more));
        }
        Ok(())
    }
}
