//! Host space behind what sealed layers do not use: a seal leaves it while the users of the disk wait, and it is given back afterwards.
//!
//! Always true: slots are given back under the names lock, as long as the layer's file and its places are those of its seal: whoever prunes it, or puts another
//! file in its place, has the lock, too.

use super::graph::Graph;
use super::{Below, Store, layer_file, names_lock_if_free};
use crate::disk::CowDisk;
use crate::error::Result;
use crate::io::Access;
use crate::layer::prune::{self, Places};
use crate::layer::{read_header, recover};
use crate::units::Id;
use std::sync::Weak;

/// What one layer does not use.
pub(super) enum Idle {
    /// These slots, as long as its places are those; none: that is to be noted in the layer.
    Known(Places, Vec<(u32, u32)>),
    /// What its superblock says: a server before this one sealed it.
    Inherited,
}

impl Store {
    /// Notes what the seals of a disk left. The names lock is held.
    pub(super) fn note_idle(&self, running: &CowDisk) {
        for (id, slots) in running.take_idle() {
            let places = self
                .layers
                .open(&layer_file(id), Access::Read)
                .and_then(|file| Places::of(&*file));
            match places {
                Ok(places) => drop(self.idle.lock().insert(id, Idle::Known(places, slots))),
                Err(e) => tracing::debug!(layer = %id, "what it does not use is left to gc: {e}"),
            }
        }
    }
    /// After another server of the same store ended, whose layers are open here now: what it did not give back. One without a name may have given
    /// back blocks since: [`Store::inherit`] takes care of these.
    pub(super) fn inherit_idle(&self) {
        let open: Vec<_> = {
            let open = self.open_layers.lock();
            open.values().filter_map(Weak::upgrade).collect()
        };
        let left = open.iter().filter(|layer| {
            let superblock = layer.superblock();
            prune::is_unpunched(superblock) && superblock.name().is_some()
        });
        let left = left.map(|layer| (layer.id(), Idle::Inherited));
        self.idle.lock().extend(left);
    }
    /// Gives back at most so many pieces of what seals left; says whether it makes sense to go on: there is more, and nobody changes names.
    pub fn give_back_idle(&self, pieces: usize) -> bool {
        if self.idle.lock().is_empty() {
            return false;
        }
        match names_lock_if_free(&*self.root) {
            Ok(Some(_lock)) => self.give_back_some(pieces),
            Ok(None) | Err(_) => false,
        }
    }
    fn give_back_some(&self, pieces: usize) -> bool {
        // What is only to be noted comes last.
        let (id, idle) = {
            let mut all = self.idle.lock();
            let empty = |idle: &Idle| matches!(idle, Idle::Known(_, slots) if slots.is_empty());
            let first = all
                .iter()
                .find(|(_, idle)| !empty(idle))
                .or(all.iter().next());
            let Some(id) = first.map(|(id, _)| *id) else {
                return false;
            };
            let Some(idle) = all.remove(&id) else {
                return false;
            };
            (id, idle)
        };
        match self.give_back_of(id, idle, pieces) {
            Ok(None) => {}
            Ok(Some(idle)) => drop(self.idle.lock().insert(id, idle)),
            Err(e) => tracing::debug!(layer = %id, "what it does not use is left to gc: {e}"),
        }
        !self.idle.lock().is_empty()
    }
    /// What is left of it then.
    fn give_back_of(&self, id: Id, idle: Idle, pieces: usize) -> Result<Option<Idle>> {
        let file = self.layers.open(&layer_file(id), Access::Write)?;
        let header = read_header(&*file)?;
        let now = Places::of(&*file)?;
        match idle {
            Idle::Inherited => {
                let superblock = recover::superblock(&*file, &header)?.superblock;
                let slots = match superblock.name() {
                    Some(_) => prune::left(&*file, &superblock)?,
                    None => Vec::new(),
                };
                Ok((!slots.is_empty()).then_some(Idle::Known(now, slots)))
            }
            Idle::Known(places, _) if places != now => Ok(None),
            Idle::Known(_, slots) if slots.is_empty() => {
                prune::nothing_left(&*file, &header).map(|()| None)
            }
            Idle::Known(places, mut slots) => {
                let some = slots.split_off(slots.len().saturating_sub(pieces));
                prune::give_back(&*file, &some)?;
                Ok(Some(Idle::Known(places, slots)))
            }
        }
    }
    /// What seals left of layers that nobody has open, and of which nobody came to give it back: bytes, and the layers. The names lock is held.
    pub(super) fn collect_idle(&self, graph: &Graph, dry_run: bool) -> Result<(u64, Vec<Id>)> {
        let (mut bytes, mut layers) = (0, Vec::new());
        let ids = graph.nodes.keys().filter_map(|below| match below {
            Below::Layer(id) => Some(*id),
            Below::Base(_) => None,
        });
        for id in ids {
            match self.collect_idle_of(id, dry_run) {
                Ok(0) => {}
                Ok(n) => {
                    bytes += n;
                    layers.push(id);
                }
                Err(e) if e.of_resources() => return Err(e),
                Err(e) => tracing::debug!(layer = %id, "left as it is: {e}"),
            }
        }
        Ok((bytes, layers))
    }
    fn collect_idle_of(&self, id: Id, dry_run: bool) -> Result<u64> {
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        let header = read_header(&*file)?;
        let superblock = recover::superblock(&*file, &header)?.superblock;
        if !prune::is_unpunched(&superblock) {
            return Ok(0);
        }
        // Who has it open gives it back, or may read by a former map.
        file.lock(true)?;
        if dry_run {
            return prune::left_by_seal(&*file, &superblock);
        }
        drop(file);
        let file = self.layers.open(&layer_file(id), Access::Write)?;
        file.lock(true)?;
        prune::finish_seal(&*file, &header)
    }
}
