//! Making, naming and removing disks, snapshots and images.

mod group;
mod rollback;

pub use group::Member;

use super::commit::Kept;
use super::many;
use super::names::{
    self, Extra, NameRecord, TEMPORARY, check_message, check_part, split_snapshot, stage,
};
use super::quota;
use super::resize::whole_blocks;
use super::{Below, LifeWritten, Object, ObjectKind, Store, in_use, layer_file};
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::Header;
use crate::io::{Access, File};
use crate::layer::{self, State, volatile};
use crate::units::{BLOCK, Id, Slot};
use std::collections::HashSet;
use std::sync::Arc;

impl Store {
    /// Makes disks from an image, snapshot or disk at rest: all of them or none. One round of syncs, however many.
    pub fn create(&self, disks: &[String], from: &str, size: Option<u64>) -> Result<Vec<Object>> {
        self.create_with(disks, from, size, &Extra::default())
    }
    /// [`Store::create`] of disks with settings.
    pub fn create_with(
        &self,
        disks: &[String],
        from: &str,
        size: Option<u64>,
        settings: &Extra,
    ) -> Result<Vec<Object>> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(from)?;
        self.check_new(disks)?;
        let size = disk_size(&source, size)?;
        let parent = match source.kind {
            ObjectKind::Base => Below::Base(source.id),
            ObjectKind::Image | ObjectKind::Snapshot => Below::Layer(source.id),
            ObjectKind::Disk => match self.unchanged(&source)? {
                // Nothing to seal: forks of an idle disk must not make its chain longer each time.
                Some(parent) => parent,
                // Its layer becomes the common parent; the disk goes on above it.
                None => Below::Layer(self.seal_at_rest(&source, None)?),
            },
        };
        self.create_on(disks, parent, size, from, settings)
    }
    /// Makes disks from an attached disk that `running` is.
    pub fn create_from_running(
        &self,
        running: &CowDisk,
        from: &str,
        disks: &[String],
        size: Option<u64>,
    ) -> Result<Vec<Object>> {
        self.create_from_running_with(running, from, disks, size, &Extra::default())
    }
    /// [`Store::create_from_running`] of disks with settings.
    pub fn create_from_running_with(
        &self,
        running: &CowDisk,
        from: &str,
        disks: &[String],
        size: Option<u64>,
        settings: &Extra,
    ) -> Result<Vec<Object>> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(from)?;
        self.check_new(disks)?;
        let size = disk_size(&source, size)?;
        must_be(running, &source)?;
        // Nothing was written since it was made or sealed last: what it shows is its parent.
        if let (Some(parent), (0, 0)) = (source.parent, running.private_blocks()) {
            return self.create_on(disks, parent, size, from, settings);
        }
        self.seal_running(&source, running, None)?;
        self.create_on(disks, Below::Layer(source.id), size, from, settings)
    }
    /// What a disk at rest stands on, if its own layer has nothing.
    pub(super) fn unchanged(&self, disk: &Object) -> Result<Option<Below>> {
        drop(self.open_exclusive(disk)?);
        let (_, counts, _) = self.layer_counts(disk.id)?;
        Ok(disk.parent.filter(|_| counts == (0, 0)))
    }
    pub(super) fn check_new(&self, disks: &[String]) -> Result<()> {
        let mut seen = HashSet::new();
        for name in disks {
            check_part(name)?;
            if !seen.insert(name) || self.names.entry(name)?.is_some() {
                return Err(taken(name));
            }
        }
        Ok(())
    }
    fn create_on(
        &self,
        disks: &[String],
        parent: Below,
        size: u64,
        from: &str,
        settings: &Extra,
    ) -> Result<Vec<Object>> {
        let settings = quota::settings_on(settings, parent);
        let rank = self.rank_over(parent, from)?;
        let created = (self.env.now)();
        let one = disks.len() == 1;
        let ids: Vec<Id> = disks.iter().map(|_| (self.env.id)()).collect();
        let each: Vec<(Id, &String)> = ids.iter().copied().zip(disks).collect();
        // Thousands of files need not be open at once: all are synced together.
        let kept = |file| one.then_some(file);
        let layer_of = |(id, name): &(Id, &String)| {
            let new = NewLayer {
                parent,
                rank,
                size,
                created,
                name,
                before: LifeWritten::default(),
            };
            let file = self.write_layer(*id, &new)?;
            Ok(kept(file))
        };
        let name_of = |(id, name): &(Id, &String)| {
            let record = NameRecord {
                kind: ObjectKind::Disk,
                target: Below::Layer(*id),
                created,
                message: None,
                opened: false,
                extra: settings.clone(),
            };
            let (_, file) = stage(&*self.names, name, &record.encode(name))?;
            Ok(kept(file))
        };
        let mut named = 0;
        // Two directories, so that two threads do not wait for one another.
        let ((written, layers), (_, staged)) = many::both(&each, layer_of, name_of);
        let done = (|| {
            let files = layers?.into_iter().chain(staged?);
            let unsynced: Vec<_> = files.flatten().collect();
            // Layers before names, whatever the number; and all is written before the first sync, so that most of what the
            // later ones would do is done by then.
            if one {
                // The host allocates space for both now, so that the first sync makes both allocations durable and the second finds little to do.
                for file in &unsynced {
                    file.start_writeback(0, BLOCK);
                }
                unsynced.iter().try_for_each(|file| file.sync())?;
                self.layers.sync()?;
            } else {
                self.root.sync_filesystem()?;
            }
            for name in disks {
                self.names
                    .rename_new(&format!("{TEMPORARY}{name}"), name)
                    .map_err(|e| match e.kind() {
                        Kind::Exists => taken(name),
                        _ => e,
                    })?;
                named += 1;
            }
            self.names.sync()
        })();
        if let Err(e) = done {
            // Nothing half-made stays: what was named is unnamed again, then the files go.
            let unnamed: Vec<bool> = disks
                .iter()
                .enumerate()
                .map(|(i, name)| match i < named {
                    true => self.names.remove(name).is_ok(),
                    false => {
                        let _ = self.names.remove(&format!("{TEMPORARY}{name}"));
                        true
                    }
                })
                .collect();
            // A name must never refer to a layer that is gone: where it is not certain that the names are, the layers are left to `gc`.
            if named == 0 || self.names.sync().is_ok() {
                for (id, _) in ids[..written].iter().zip(unnamed).filter(|(_, gone)| *gone) {
                    let _ = self.layers.remove(&layer_file(*id));
                }
            }
            return Err(e.or_hint("nothing was created"));
        }
        let made = each.into_iter().map(|(id, name)| Object {
            name: name.clone(),
            kind: ObjectKind::Disk,
            id,
            size,
            parent: Some(parent),
            created,
            message: None,
        });
        Ok(made.collect())
    }
    /// Writes the header of a new layer, not durable yet.
    pub(super) fn new_layer(&self, new: &NewLayer<'_>) -> Result<(Id, Arc<dyn File>)> {
        let id = (self.env.id)();
        Ok((id, self.write_layer(id, new)?))
    }
    fn write_layer(&self, id: Id, new: &NewLayer<'_>) -> Result<Arc<dyn File>> {
        let header = Header::new(
            id,
            new.parent.id(),
            matches!(new.parent, Below::Layer(_)),
            new.rank,
            new.size,
            new.created,
            new.name,
        );
        let header = header.after(new.before.by_user, new.before.to_host);
        let file = self.layers.open(&layer_file(id), Access::CreateNew)?;
        if let Err(e) = layer::create(&*file, &header) {
            let _ = self.layers.remove(&layer_file(id));
            return Err(e);
        }
        Ok(file)
    }

    // ---- snapshots -------------------------------------------------------------------------------------------

    /// Snapshots a disk at rest.
    pub fn snapshot(&self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.snapshot_source(disk, name, message)?;
        let kept = Kept::snapshot(disk, name, message);
        self.seal_at_rest(&source, Some(&kept))?;
        self.object(&kept.name)
    }
    /// Snapshots an attached disk that `running` is: requests wait while its layer is sealed and a new one is put on top.
    pub fn snapshot_running(
        &self,
        running: &CowDisk,
        disk: &str,
        name: &str,
        message: Option<&str>,
    ) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.snapshot_source(disk, name, message)?;
        let kept = Kept::snapshot(disk, name, message);
        self.seal_running(&source, running, Some(&kept))?;
        self.object(&kept.name)
    }
    pub(super) fn snapshot_source(
        &self,
        disk: &str,
        name: &str,
        message: Option<&str>,
    ) -> Result<Object> {
        check_part(disk)?;
        check_part(name)?;
        check_message(message)?;
        let source = self.resolve_locked(disk)?;
        if source.kind != ObjectKind::Disk || source.name != disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{disk}` is {}, not a disk", source.kind.one()),
            )
            .hint("only disks change, so only disks have snapshots"));
        }
        let full = format!("{disk}@{name}");
        if self.names.entry(&full)?.is_some() {
            return Err(taken(&full));
        }
        Ok(source)
    }
    /// What a seal needs beside the layer itself, durable: the layer that will be above it, and the names as they will be.
    fn prepare(&self, source: &Object, kept: Option<&Kept<'_>>) -> Result<Prepared> {
        let (_, size, _) = self.layer_head(source.id)?;
        let rank = self.rank_over(Below::Layer(source.id), &source.name)?;
        let now = (self.env.now)();
        let parent = Below::Layer(source.id);
        // What a seal itself writes comes to it only where the disk is open.
        let (next, file) = self.new_layer(&NewLayer {
            parent,
            rank,
            size,
            created: now,
            name: &source.name,
            before: self.written_before(parent),
        })?;
        let mut unsynced = vec![file];
        let mut staged = Vec::new();
        let written = (|| {
            // Its superblock is written when the layer below is sealed already: then it is too late for a full host disk to refuse.
            reserve_superblock(&*unsynced[0])?;
            let mut put = |name: String, kind, target, created, message: Option<String>, extra| {
                let record = NameRecord {
                    kind,
                    target,
                    created,
                    message,
                    opened: false,
                    extra,
                };
                let (temporary, file) = stage(&*self.names, &name, &record.encode(&name))?;
                unsynced.push(file);
                staged.push((temporary, name));
                Ok::<_, Error>(())
            };
            if let Some(kept) = kept {
                put(
                    kept.name.clone(),
                    kept.kind,
                    parent,
                    now,
                    kept.message.map(String::from),
                    Extra::default(),
                )?;
            }
            let above = Below::Layer(next);
            // The settings are the disk's, whichever layer it writes into.
            let mut record = names::read_name(&*self.names, &source.name)?;
            // What it keeps of its history stays in the layer that is sealed.
            self.note_earlier(&mut record);
            put(
                source.name.clone(),
                ObjectKind::Disk,
                above,
                source.created,
                source.message.clone(),
                record.extra,
            )?;
            // All is written before the first sync: most of what the later ones would do is done by then.
            unsynced.iter().try_for_each(|file| file.sync())?;
            self.layers.sync()
        })();
        let label = kept.map(|kept| kept.name.clone());
        let prepared = Prepared {
            next,
            staged,
            label,
        };
        match written {
            Ok(()) => Ok(prepared),
            Err(e) => {
                self.abandon(&prepared);
                Err(e)
            }
        }
    }
    /// Takes back what was prepared for a seal that did not come about.
    fn abandon(&self, prepared: &Prepared) {
        for (temporary, _) in &prepared.staged {
            let _ = self.names.remove(temporary);
        }
        let _ = self.layers.remove(&layer_file(prepared.next));
    }
    fn install(&self, prepared: &Prepared) -> Result<()> {
        for (temporary, name) in &prepared.staged {
            self.names.rename(temporary, name)?;
        }
        self.names.sync()
    }
    /// Seals the layer of a disk at rest and puts a new one on top. Returns the sealed layer.
    pub(super) fn seal_at_rest(&self, source: &Object, kept: Option<&Kept<'_>>) -> Result<Id> {
        // An interrupted snapshot may have left it sealed: then it is completed first, and sealed anew.
        let (layer, _) = self.open_top(source, volatile::private()?)?;
        let source = self.object(&source.name)?;
        let prepared = self.prepare(&source, kept)?;
        if let Err(e) = layer.close(State::Sealed, prepared.label.as_deref()) {
            self.abandon(&prepared);
            return Err(e);
        }
        self.install(&prepared)?;
        Ok(source.id)
    }
    pub(super) fn seal_running(
        &self,
        source: &Object,
        running: &CowDisk,
        kept: Option<&Kept<'_>>,
    ) -> Result<()> {
        must_be(running, source)?;
        let prepared = self.prepare(source, kept)?;
        let mut sealed_at = false;
        let done = running.seal(prepared.label.as_deref(), |sealed, memory| {
            sealed_at = true;
            self.install(&prepared)?;
            self.layer_above(&source.name, sealed, &prepared, memory)
        });
        self.note_idle(running);
        match &done {
            Ok(()) => self.note_opened(&source.name),
            Err(_) if !sealed_at => self.abandon(&prepared),
            Err(_) => {}
        }
        done
    }
    /// Completes an interrupted snapshot: a new layer over the sealed one that the disk's name refers to.
    pub(super) fn put_layer_on_top(&self, source: &Object) -> Result<NameRecord> {
        self.install(&self.prepare(source, None)?)?;
        names::read_name(&*self.names, &source.name)
    }

    // ---- renaming and removing ------------------------------------------------------------------------------------

    /// Renames an image, a disk at rest (and its snapshots), or a snapshot (within its disk).
    pub fn rename(&self, old: &str, new: &str) -> Result<Object> {
        self.rename_how(old, new, false)
    }
    /// [`Store::rename`] also of a disk that this process has open.
    pub fn rename_open(&self, old: &str, new: &str) -> Result<Object> {
        self.rename_how(old, new, true)
    }
    /// What is to be renamed.
    pub(super) fn rename_source(&self, old: &str, new: &str) -> Result<Object> {
        let object = self.resolve_locked(old)?;
        let old = object.name.clone();
        if object.kind == ObjectKind::Snapshot {
            let (disk, _) = split_snapshot(&old)?;
            let (new_disk, _) = split_snapshot(new)?;
            if disk != new_disk {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("`{old}` cannot become a snapshot of `{new_disk}`"),
                )
                .hint(
                    "a snapshot is renamed within its disk; `forkdisk fork` makes a disk from it",
                ));
            }
        } else {
            check_part(new)?;
        }
        if old == new {
            return Err(
                Error::new(Kind::Exists, format!("`{old}` is its name already"))
                    .hint("give another name"),
            );
        }
        if self.names.entry(new)?.is_some() {
            return Err(taken(new));
        }
        Ok(object)
    }
    fn rename_how(&self, old: &str, new: &str, open: bool) -> Result<Object> {
        let _lock = self.lock(true)?;
        let object = self.rename_source(old, new)?;
        let old = object.name.clone();
        if object.kind == ObjectKind::Disk {
            if !open {
                drop(self.open_exclusive(&object)?);
            }
            let prefix = format!("{old}@");
            let mut renamed = false;
            for name in self.all_names()? {
                if let Some(snap) = name.strip_prefix(&prefix) {
                    names::rename(&*self.names, &name, &format!("{new}@{snap}"))?;
                    renamed = true;
                }
            }
            if renamed {
                self.names.sync()?;
            }
        }
        // The object itself last: an interrupted rename is completed by the same command.
        names::rename(&*self.names, &old, new).map_err(|e| {
            if e.kind() == Kind::Exists {
                taken(new)
            } else {
                e
            }
        })?;
        self.names.sync()?;
        self.object(new)
    }
}

/// A layer that is to be made.
pub(super) struct NewLayer<'a> {
    pub(super) parent: Below,
    pub(super) rank: u32,
    pub(super) size: u64,
    pub(super) created: u64,
    /// The disk it is made for.
    pub(super) name: &'a str,
    /// What was written to that before.
    pub(super) before: LifeWritten,
}

/// What a seal needs beside the layer itself.
struct Prepared {
    /// The layer that will be above.
    next: Id,
    /// Temporary files and the names they will have.
    staged: Vec<(String, String)>,
    /// What the sealed layer will call itself.
    label: Option<String>,
}

/// Fails if an attached disk is not the one that the name means by now: it was renamed, and another one got its name.
pub(super) fn must_be(running: &CowDisk, object: &Object) -> Result<()> {
    match running.own_layer() {
        Some(id) if id != object.id => {
            // A disk that stopped in the midst of a snapshot says so itself.
            running.flush()?;
            Err(Error::new(
                Kind::Busy,
                format!("`{}` was renamed meanwhile", object.name),
            )
            .hint("look at it again, then repeat the command"))
        }
        _ => Ok(()),
    }
}

/// What the object's name refers to.
pub(super) fn object_target(object: &Object) -> Below {
    match object.kind {
        ObjectKind::Base => Below::Base(object.id),
        _ => Below::Layer(object.id),
    }
}

pub(super) fn taken(name: &str) -> Error {
    Error::new(Kind::Exists, format!("`{name}` exists already"))
        .hint("choose another name, or `forkdisk rm` the old one")
}

/// Host space for both copies of the superblock of a layer that is its header alone.
fn reserve_superblock(file: &dyn File) -> Result<()> {
    let (at, len) = (Slot(1).at(), 2 * BLOCK);
    match file.allocate(at, len) {
        // Zeros are as good as nothing, and take space.
        Err(e) if e.kind() == Kind::Unsupported => file.write_at(&vec![0; len as usize], at),
        other => other,
    }
}

pub(super) fn disk_size(source: &Object, size: Option<u64>) -> Result<u64> {
    let Some(size) = size else {
        return Ok(source.size);
    };
    let rounded = whole_blocks(size)?;
    if rounded < source.size {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "{size} bytes are less than `{}` has ({} bytes)",
                source.name, source.size
            ),
        )
        .hint("a disk is at least as large as what it is made from"));
    }
    Ok(rounded)
}
