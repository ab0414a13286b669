//! A disk's own layer, published as an image: no data moves, and the disk goes on above it (FORMAT.md, section 4, "Commit").

use super::names::{Extra, NameRecord, check_message, check_part, stage};
use super::objects::taken;
use super::{Below, Object, ObjectKind, Store};
use crate::disk::CowDisk;
use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK, blocks};

/// What a seal publishes: the name that the sealed layer gets, and calls itself from then on.
pub(super) struct Kept<'a> {
    pub kind: ObjectKind,
    pub name: String,
    pub message: Option<&'a str>,
}

impl<'a> Kept<'a> {
    pub fn snapshot(disk: &str, name: &str, message: Option<&'a str>) -> Kept<'a> {
        Kept {
            kind: ObjectKind::Snapshot,
            name: format!("{disk}@{name}"),
            message,
        }
    }
    fn image(name: &str, message: Option<&'a str>) -> Kept<'a> {
        Kept {
            kind: ObjectKind::Image,
            name: name.to_string(),
            message,
        }
    }
}

impl Store {
    /// Publishes the state of a disk at rest as an image.
    pub fn commit(&self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.commit_source(disk, name, message)?;
        let kept = Kept::image(name, message);
        match self.unchanged(&source)? {
            Some(Below::Layer(_)) if self.shows_its_parent(&source)? => {
                self.publish(&source, &kept)?;
            }
            _ => {
                self.seal_at_rest(&source, Some(&kept))?;
            }
        }
        self.object(name)
    }
    /// Publishes the state of an attached disk that `running` is: requests wait while its layer is sealed and a new one is put on top.
    pub fn commit_running(
        &self,
        running: &CowDisk,
        disk: &str,
        name: &str,
        message: Option<&str>,
    ) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.commit_source(disk, name, message)?;
        let kept = Kept::image(name, message);
        match (source.parent, running.private_blocks()) {
            (Some(Below::Layer(_)), (0, 0)) if self.shows_its_parent(&source)? => {
                self.publish(&source, &kept)?;
            }
            _ => self.seal_running(&source, running, Some(&kept))?,
        }
        self.object(name)
    }
    /// What an attached disk that `running` is shows now, as a state that stays: its parent, if it has nothing of its own; else its layer, which
    /// is sealed for that.
    pub fn settle_running(&self, running: &CowDisk, disk: &str) -> Result<Below> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(disk)?;
        if let (Some(parent), (0, 0)) = (source.parent, running.private_blocks())
            && self.size_of(parent)? == source.size
        {
            return Ok(parent);
        }
        self.seal_running(&source, running, None)?;
        self.end_before(&source.name, Some(running));
        Ok(Below::Layer(source.id))
    }
    pub(super) fn commit_source(
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
            .hint("only disks change; what is sealed can be forked from as it is"));
        }
        if self.names.entry(name)?.is_some() {
            return Err(taken(name));
        }
        Ok(source)
    }
    /// Is a disk without anything of its own what its parent is? Not if it is larger.
    fn shows_its_parent(&self, disk: &Object) -> Result<bool> {
        let parent = disk.parent.map(|parent| self.size_of(parent)).transpose()?;
        Ok(parent == Some(disk.size))
    }
    /// Virtual size of a base or layer.
    pub(super) fn size_of(&self, below: Below) -> Result<u64> {
        match below {
            Below::Base(id) => Ok(blocks(self.base_meta(id)?.len) * BLOCK),
            Below::Layer(id) => Ok(self.layer_head(id)?.1),
        }
    }
    /// Gives the sealed layer that a disk without anything of its own stands on one more name.
    fn publish(&self, source: &Object, kept: &Kept<'_>) -> Result<()> {
        let Some(target) = source.parent else {
            return Err(Error::new(Kind::Corrupt, "the disk stands on nothing").layer(source.id));
        };
        let record = NameRecord {
            kind: kept.kind,
            target,
            created: (self.env.now)(),
            message: kept.message.map(String::from),
            opened: false,
            extra: Extra::default(),
        };
        let (temporary, file) = stage(&*self.names, &kept.name, &record.encode(&kept.name))?;
        let placed = file
            .sync()
            .and_then(|()| self.names.rename_new(&temporary, &kept.name));
        if let Err(e) = placed {
            let _ = self.names.remove(&temporary);
            return Err(e);
        }
        self.names.sync()
    }
}
