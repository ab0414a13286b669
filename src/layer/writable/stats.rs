//! What a layer that is open for writing tells of itself: for people.

use super::Layer;
use crate::layer::volatile;
use crate::sync::atomic::Ordering::Relaxed;
use crate::units::BLOCK;

/// How a layer is, and what was written. The numbers are of about the same moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LayerStats {
    /// Bytes that users wrote, over the disk's life up to this layer.
    pub user_written: u64,
    /// Bytes that were written to the files of the disk's layers, over its life: data, journal, runs, superblocks.
    pub host_written: u64,
    /// The latter since the layer was opened.
    pub host_since_opened: u64,
    /// Changes of the map that no flush has made durable: one for each block written, one for each whole region zeroed.
    pub dirty: u64,
    /// Bytes of the journal in use.
    pub journal: u64,
}

impl Layer {
    /// How it is now.
    pub fn stats(&self) -> LayerStats {
        LayerStats {
            user_written: self.host.user(),
            host_written: self.host.host(),
            host_since_opened: self.host.since_opened(),
            dirty: self.logged.load(Relaxed),
            journal: u64::from(self.space.lock().journal_head) * BLOCK,
        }
    }
    /// Lets a successor of this process know what was written so far.
    pub(super) fn note_written(&self) {
        volatile::written(&self.volatile, self.host.user(), self.host.host());
    }
    /// Counts on from what was written before the disk went on in this layer.
    pub fn counts_on_from(&self, former: &Layer) {
        self.host.at_least((former.host.user(), former.host.host()));
        self.note_written();
    }
    /// Counts what a user wrote, for [`LayerStats::user_written`].
    pub fn written_by_user(&self, bytes: u64) {
        self.host.by_user(bytes);
        self.note_written();
    }
    /// What was written since the layer was made was not written by users.
    pub fn not_by_users(&self) {
        self.host.forget_users(self.header().user_written.get());
        self.note_written();
    }
}
