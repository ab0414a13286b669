//! What a disk tells of itself: for people.

use super::CowDisk;
use crate::io::File;
use crate::layer::{Layer, LayerStats};
use crate::units::Id;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// What was done with a disk since it was opened, and how it is now. The numbers are of about the same moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DiskStats {
    /// Blocks read from the base.
    pub from_base: u64,
    /// Blocks read from sealed layers.
    pub from_sealed: u64,
    /// Blocks read from the disk's own layer.
    pub from_own: u64,
    /// Blocks read that were zeros.
    pub zeros: u64,
    /// Bytes that were written to the files of its layers.
    pub host_written: u64,
    /// Blocks with data in its own layer, and blocks that it records as zeros.
    pub private_blocks: (u64, u64),
    /// Layers above the base, its own included.
    pub depth: u32,
    /// Its own layer; `None` for what can only be read.
    pub layer: Option<LayerStats>,
}

impl CowDisk {
    /// How it is now.
    pub fn stats(&self) -> DiskStats {
        let top = self.top.read();
        let layer = top.layer.as_ref().map(Layer::stats);
        let counters = &self.counters;
        DiskStats {
            from_base: counters.from_base.load(Relaxed),
            from_sealed: counters.from_sealed.load(Relaxed),
            from_own: counters.from_own.load(Relaxed),
            zeros: counters.zeros.load(Relaxed),
            host_written: counters.host_sealed.load(Relaxed)
                + layer.map_or(0, |l| l.host_since_opened),
            private_blocks: top.layer.as_ref().map_or((0, 0), Layer::counts),
            depth: top.chain.depth() as u32 + u32::from(layer.is_some()),
            layer,
        }
    }
    /// What was written to it since it was made was not written by users.
    pub fn not_by_users(&self) {
        if let Some(layer) = &self.top.read().layer {
            layer.not_by_users();
        }
    }
    /// Its base: id and image. Whoever has the file open shows it to all disks over it from one place in memory.
    pub fn base(&self) -> (Id, Arc<dyn File>) {
        let top = self.top.read();
        let base = top.chain.base();
        (base.id(), base.file().clone())
    }
    /// The file of its own layer; of what can only be read, that of the uppermost.
    pub fn layer_file(&self) -> Option<Arc<dyn File>> {
        let top = self.top.read();
        match &top.layer {
            Some(layer) => Some(layer.file().clone()),
            None => top.chain.layers().first().map(|l| l.file().clone()),
        }
    }
}
