//! Host space behind what sealed layers do not use: a seal leaves it while the users of the disk wait, and it is given back afterwards.
//!
//! Always true: slots are given back under the names lock, as long as the layer's file and its places are those of its seal: whoever prunes it, or puts another
//! file in its place, has the lock, too.

use super::graph::Graph;
use super::{Below, Store, layer_file, names_lock_if_free};
use crate::disk::CowDisk;
use crate::error::{Kind, Result};
use crate::io::Access;
use crate::layer::prune::{self, Places};
use crate::layer::{read_header, recover};
use crate::units::Id;
use std::sync::{Arc, Weak};

/// What one layer does not use.
pub(super) struct Idle {
    places: Places,
    slots: Vec<(u32, u32)>,
}

impl Store {
    /// Notes what the seals of a disk left. The names lock is held.
    pub(super) fn note_idle(&self, running: &CowDisk) {
        for (id, slots) in running.take_idle() {
            self.note_idle_slots(id, slots);
        }
    }
    fn note_idle_slots(&self, id: Id, slots: Vec<(u32, u32)>) {
        let places = self
            .layers
            .open(&layer_file(id), Access::Read)
            .and_then(|file| Places::of(&*file));
        match places {
            Ok(places) => drop(self.idle.lock().insert(id, Idle { places, slots })),
            Err(e) => tracing::debug!(layer = %id, "what it does not use is left to gc: {e}"),
        }
    }
    /// After another server of the same store ended, whose layers are open here now: what it did not give back.
    pub(super) fn inherit_idle(&self) {
        let open: Vec<_> = {
            let open = self.open_layers.lock();
            open.values().filter_map(Weak::upgrade).collect()
        };
        for layer in open.iter().filter(|l| l.superblock().unpunched.get() != 0) {
            if let Ok(slots) = prune::left(&**layer.file(), layer.superblock()) {
                self.note_idle_slots(layer.id(), slots);
            }
        }
    }
    /// Gives back at most so many pieces of what seals left; says whether there is more. Not while somebody changes names.
    pub fn give_back_idle(&self, pieces: usize) -> bool {
        if self.idle.lock().is_empty() {
            return false;
        }
        match names_lock_if_free(&*self.root) {
            Ok(Some(_lock)) => self.give_back_some(pieces),
            Ok(None) => true,
            Err(_) => false,
        }
    }
    fn give_back_some(&self, pieces: usize) -> bool {
        let Some((id, mut idle)) = self.idle.lock().pop_first() else {
            return false;
        };
        let given = (|| {
            let file = self.layers.open(&layer_file(id), Access::Write)?;
            if Places::of(&*file)? != idle.places {
                idle.slots.clear();
                return Ok(());
            }
            let some = idle
                .slots
                .split_off(idle.slots.len().saturating_sub(pieces));
            prune::give_back(&*file, &some)
        })();
        match given {
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => tracing::debug!(layer = %id, "what it does not use is left to gc: {e}"),
            Ok(()) if idle.slots.is_empty() => {}
            Ok(()) => drop(self.idle.lock().insert(id, idle)),
        }
        !self.idle.lock().is_empty()
    }
    /// What seals left of layers that nobody has open, and of which nobody came to give it back: bytes, and the layers. The names lock is held.
    pub(super) fn collect_idle(&self, graph: &Graph, dry_run: bool) -> Result<(u64, Vec<Id>)> {
        let (mut bytes, mut layers) = (0, Vec::new());
        for below in graph.nodes.keys() {
            let Below::Layer(id) = below else { continue };
            let access = if dry_run { Access::Read } else { Access::Write };
            let found = (|| {
                let file = self.layers.open(&layer_file(*id), Access::Read)?;
                let header = read_header(&*file)?;
                let superblock = recover::superblock(&*file, &header)?.superblock;
                let left = prune::left_by_seal(&*file, &superblock)?;
                if left == 0 || dry_run {
                    return Ok(left);
                }
                let file: Arc<_> = self.layers.open(&layer_file(*id), access)?;
                // Who has it open gives it back, or may read by a former map.
                file.lock(true)?;
                prune::finish_seal(&*file, &header)
            })();
            match found {
                Ok(0) => {}
                Ok(n) => {
                    bytes += n;
                    layers.push(*id);
                }
                Err(e) if e.of_resources() => return Err(e),
                Err(e) => tracing::debug!(layer = %id, "left as it is: {e}"),
            }
        }
        Ok((bytes, layers))
    }
}
