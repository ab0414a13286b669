//! Going back to a point of the disk's own history.
//!
//! Always true: all of it becomes one commit, which can be undone as any other; until that is durable the disk is what it was.

use super::{CowDisk, PIECE, Top, read_only};
use crate::chain::Chain;
use crate::error::{Error, Kind, Result};
use crate::format::Pointer;
use crate::layer::ReadLayer;
use crate::layer::history::{Hold, Keep};
use crate::map::undo::Undo;
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba};
use std::sync::Arc;

/// Blocks that can be taken back in one commit: each needs four entries of its record at most.
pub const MAX_REWIND: u64 = 60_000;

const _: () = assert!(MAX_REWIND * 4 + 4 * PIECE as u64 <= crate::format::MAX_DIRTY);

impl CowDisk {
    /// Makes the blocks of `undo`, at most [`MAX_REWIND`], what it says of them, and flushes. It speaks of a layer, and of what lies below that where it says
    /// nothing: `past`, which is the disk's own layer or was it once. `progress` is told how many blocks are done. After an error the disk must be dropped without another flush:
    /// then it is what it was.
    pub fn rewind(
        &self,
        undo: &Undo,
        (past, chain): (&ReadLayer, Arc<Chain>),
        mut progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let top = self.top.write();
        let Some(layer) = &top.layer else {
            return Err(read_only());
        };
        let below = Top { layer: None, chain };
        // The journal must have room for all of it.
        layer.checkpoint_now()?;
        let mut done = 0;
        let mut first = 0;
        let mut piece: Vec<u8> = Vec::with_capacity(PIECE * BLOCK_SIZE);
        // What lies past the end of the disk is nobody's.
        for (start, end, pointer) in undo.within(0, layer.size() / BLOCK) {
            if pointer == Pointer::Zero {
                layer.zero(Lba(start as u32), end - start)?;
                done += end - start;
                progress(done)?;
                continue;
            }
            for block in start..end {
                let next = first + (piece.len() / BLOCK_SIZE) as u64;
                if !piece.is_empty() && (next != block || piece.len() == PIECE * BLOCK_SIZE) {
                    self.write_whole(layer, Lba(first as u32), &piece)?;
                    piece.clear();
                    progress(done)?;
                }
                if piece.is_empty() {
                    first = block;
                }
                let lba = Lba(block as u32);
                let at = piece.len();
                piece.resize(at + BLOCK_SIZE, 0);
                match pointer {
                    Pointer::Data { slot, sum } => {
                        past.read_blocks(slot, &[sum], lba, &mut piece[at..])?;
                    }
                    _ => self.read_whole(&below, lba, &mut piece[at..])?,
                }
                done += 1;
            }
        }
        if !piece.is_empty() {
            self.write_whole(layer, Lba(first as u32), &piece)?;
        }
        progress(done)?;
        layer.flush()
    }
    /// Keeps so much of its past from now on; `None`: nothing, and what was kept goes.
    pub fn set_keep(&self, keep: Option<Keep>) -> Result<()> {
        let top = self.top.read();
        let layer = top.layer.as_ref().ok_or_else(read_only)?;
        layer.set_keep(keep)
    }
    /// Keeps point `number` of its layer `own` as long as the result lives; [`Kind::NotFound`] if that is gone, or the disk goes on in another layer.
    pub fn hold_point(&self, own: Id, number: u64) -> Result<Arc<Hold>> {
        let top = self.top.read();
        match &top.layer {
            Some(layer) if layer.id() == own => layer.hold(number),
            _ => Err(
                Error::new(Kind::NotFound, "the disk goes on in another layer by now")
                    .hint("try again"),
            ),
        }
    }
    /// Its layer, and the number of the last commit in that which is durable: the point that a history, if it keeps one, has of that flush.
    pub fn point(&self) -> Option<(Id, u64)> {
        let top = self.top.read();
        top.layer.as_ref().map(|layer| (layer.id(), layer.point()))
    }
    /// What earlier layers keep of its history may have become less.
    pub fn look_back_again(&self) {
        let lower = self
            .top
            .read()
            .layer
            .as_ref()
            .and_then(|layer| layer.lower());
        if let Some(lower) = lower {
            lower.look_again();
        }
    }
    /// Host bytes that its history occupies.
    pub fn history_bytes(&self) -> u64 {
        let top = self.top.read();
        let Some(layer) = &top.layer else {
            return 0;
        };
        let (own, lower) = (layer.history_slots() * BLOCK, layer.lower());
        // Files are looked at for that.
        drop(top);
        own + lower.map_or(0, |lower| lower.bytes())
    }
}
