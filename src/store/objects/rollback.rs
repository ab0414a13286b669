//! Rolling a disk back to one of its snapshots: a new, empty layer over the snapshot's, to which the disk's name refers from then on (FORMAT.md,
//! section 4).
//!
//! Always true: the layers that the disk wrote into are removed only after its name durably refers to another one.

use super::{NewLayer, Prepared, in_use, must_be, reserve_superblock};
use crate::disk::CowDisk;
use crate::error::{Error, Kind, Result};
use crate::io::{Access, File};
use crate::layer::Layer;
use crate::layer::history::Keep;
use crate::store::names::{NameRecord, check_part, read_name, stage};
use crate::store::{Below, Object, ObjectKind, Store, layer_file};
use crate::units::Id;
use std::collections::HashSet;
use std::sync::Arc;

impl Store {
    /// Fails as rolling the disk back would, as far as can be told; returns the snapshot.
    pub fn may_roll_back(&self, disk: &str, name: &str) -> Result<Object> {
        let _lock = self.lock(false)?;
        Ok(self.rollback_source(disk, name)?.1)
    }
    /// Lets a disk at rest show what its snapshot `name` holds. What was written since is gone.
    pub fn rollback(&self, disk: &str, name: &str) -> Result<Object> {
        let _lock = self.lock(true)?;
        let (mut record, snapshot) = self.rollback_source(disk, name)?;
        let earlier = self.leave_earlier(&mut record);
        // Nobody may write into it while its name changes.
        let held = self.hold(disk, record.target)?;
        let prepared = self.prepare_rollback(disk, &record, &snapshot, false)?;
        if let Err(e) = self.install(&prepared) {
            self.abandon_unless_named(disk, &prepared);
            return Err(e);
        }
        drop(held);
        self.forget_layers(record.target, snapshot.id);
        self.forget_earlier(&earlier);
        self.object(disk)
    }
    /// [`Store::rollback`] of an attached disk that `running` is. Its size may change with it. Nobody uses it meanwhile: what is in others' caches is not
    /// rolled back.
    pub fn rollback_running(&self, running: &CowDisk, disk: &str, name: &str) -> Result<Object> {
        let _lock = self.lock(true)?;
        let (mut record, snapshot) = self.rollback_source(disk, name)?;
        let earlier = self.leave_earlier(&mut record);
        must_be(running, &self.object(disk)?)?;
        let chain = self.chain(Below::Layer(snapshot.id))?;
        let prepared = self.prepare_rollback(disk, &record, &snapshot, true)?;
        let halted = running.halt();
        let ready = (|| {
            // A successor of this process must find nothing in the volatile log that belongs to the layer which is left.
            halted.flush()?;
            let file = self
                .layers
                .open(&layer_file(prepared.next), Access::Write)?;
            file.lock(true)?;
            // It is not the one that goes on with the history of what is left.
            let keep = self.keep_of(disk)?.map(|keep| Keep {
                after: (0, 0),
                lower: None,
                ..keep
            });
            Ok((file, halted.volatile()?, keep))
        })();
        let (file, memory, keep) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                self.abandon(&prepared);
                return Err(e);
            }
        };
        if let Err(e) = self.install(&prepared) {
            if !self.abandon_unless_named(disk, &prepared) {
                halted.stop(&e);
            }
            return Err(e);
        }
        match Layer::open_over(file, memory, keep, Some(chain.clone())) {
            Ok(layer) => halted.go_on(layer, chain),
            Err(e) => {
                // Its name says otherwise already.
                halted.stop(&e);
                return Err(e
                    .context(format!("`{disk}` is rolled back, but cannot go on"))
                    .hint(
                        "`forkdisk detach --force` it and attach it again: it shows the snapshot",
                    ));
            }
        }
        self.note_opened(disk);
        self.forget_layers(record.target, snapshot.id);
        self.forget_earlier(&earlier);
        self.object(disk)
    }
    /// The disk's record, which need not refer to anything that can be read, and the snapshot.
    fn rollback_source(&self, disk: &str, name: &str) -> Result<(NameRecord, Object)> {
        check_part(disk)?;
        check_part(name)?;
        let record = match read_name(&*self.names, disk) {
            Err(e) if e.kind() == Kind::NotFound => {
                return Err(self.resolve_locked(disk).err().unwrap_or(e));
            }
            other => other?,
        };
        if record.kind != ObjectKind::Disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{disk}` is {}, not a disk", record.kind.one()),
            )
            .hint("only disks change, so only disks are rolled back"));
        }
        let full = format!("{disk}@{name}");
        let snapshot = self.resolve_locked(&full)?;
        if snapshot.kind != ObjectKind::Snapshot {
            return Err(Error::new(
                Kind::Corrupt,
                format!("`{full}` is {}", snapshot.kind.one()),
            )
            .hint("`forkdisk check` lists what is damaged"));
        }
        Ok((record, snapshot))
    }
    /// The lock of a disk's own layer, if there is still a file that anybody could have open.
    fn hold(&self, disk: &str, target: Below) -> Result<Option<Arc<dyn File>>> {
        match self.layers.open(&layer_file(target.id()), Access::Read) {
            Ok(file) => {
                file.lock(true)
                    .map_err(|e| in_use(&e, &format!("`{disk}` is attached or in use")))?;
                Ok(Some(file))
            }
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt) => Ok(None),
            Err(e) => Err(e),
        }
    }
    /// The layer and the name that the disk will have, durable.
    fn prepare_rollback(
        &self,
        disk: &str,
        record: &NameRecord,
        snapshot: &Object,
        running: bool,
    ) -> Result<Prepared> {
        let parent = Below::Layer(snapshot.id);
        let rank = self.rank_over(parent, disk)?;
        let now = (self.env.now)();
        let (next, file) = self.new_layer(&NewLayer {
            parent,
            rank,
            size: snapshot.size,
            created: now,
            name: disk,
            before: self.written_before(record.target),
        })?;
        let mut prepared = Prepared {
            next,
            staged: Vec::new(),
            label: None,
        };
        let written = (|| {
            if running {
                // It is opened when the name refers to it already: then it is too late for a full host disk to refuse.
                reserve_superblock(&*file)?;
            }
            // The settings are the disk's, whichever layer it writes into.
            let record = NameRecord {
                target: Below::Layer(next),
                opened: false,
                ..record.clone()
            };
            let (temporary, name) = stage(&*self.names, disk, &record.encode(disk))?;
            prepared.staged.push((temporary, disk.to_string()));
            file.sync()?;
            name.sync()?;
            self.layers.sync()
        })();
        match written {
            Ok(()) => Ok(prepared),
            Err(e) => {
                self.abandon(&prepared);
                Err(e)
            }
        }
    }
    /// After a failure to give the disk its new layer: takes back what was prepared if the name does not refer to it. Says whether it could.
    fn abandon_unless_named(&self, disk: &str, prepared: &Prepared) -> bool {
        let named = read_name(&*self.names, disk)
            .map_or(true, |record| record.target == Below::Layer(prepared.next));
        if !named {
            self.abandon(prepared);
        }
        !named
    }
    /// Removes a layer that a disk wrote into, and the layers and the base below that only it needed. What cannot be removed is left to `gc`.
    /// `kept`: the layer of the snapshot, which has a name.
    pub(in crate::store) fn forget_layers(&self, from: Below, kept: Id) {
        // The usual: what it wrote into stood on the snapshot, and nothing stands on that.
        if let Some(Below::Layer(parent)) = self.parent_of_leaf(from)
            && parent == kept
        {
            if let Err(e) = self.remove_layer(from.id()) {
                tracing::warn!("what was rolled back is left to `forkdisk gc`: {e}");
            }
            return;
        }
        let graph = match self.graph() {
            Ok(graph) => graph,
            Err(e) => {
                tracing::warn!("what was rolled back is left to `forkdisk gc`: {e}");
                return;
            }
        };
        let garbage: HashSet<Below> = graph.garbage(|_| true).into_iter().collect();
        let mut at = Some(from);
        while let Some(below) = at.filter(|below| garbage.contains(below)) {
            at = graph.nodes.get(&below).and_then(|n| n.parent);
            let removed = match below {
                Below::Layer(id) => self.remove_layer(id),
                // A flattening made it, for what is gone.
                Below::Base(id) => self.remove_idle_base(id),
            };
            match removed {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    tracing::warn!(id = %below.id(), "what was rolled back is left to `forkdisk gc`: {e}");
                    return;
                }
            }
        }
    }
}
