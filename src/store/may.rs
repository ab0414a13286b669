//! Whether a change would be refused, for whoever only asks: as far as that can be told beforehand.

use super::objects::disk_size;
use super::{Below, Object, ObjectKind, Store};
use crate::error::{Error, Kind, Result};

impl Store {
    /// Fails as [`Store::create_with`] would; returns the size that the disks would have.
    pub fn may_create(&self, disks: &[String], from: &str, size: Option<u64>) -> Result<u64> {
        let _lock = self.lock(false)?;
        let source = self.resolve_locked(from)?;
        self.check_new(disks)?;
        let size = disk_size(&source, size)?;
        // A disk without anything of its own is no parent; whether it is so is not known while it is in use.
        if matches!(source.kind, ObjectKind::Image | ObjectKind::Snapshot) {
            self.rank_over(Below::Layer(source.id), from)?;
        }
        Ok(size)
    }
    /// Fails as [`Store::snapshot_group`] of these disks and names would.
    pub fn may_snapshot(&self, members: &[(String, String)], message: Option<&str>) -> Result<()> {
        let _lock = self.lock(false)?;
        for (n, (disk, name)) in members.iter().enumerate() {
            if members[..n].iter().any(|(other, _)| other == disk) {
                return Err(named_twice(disk));
            }
            let source = self.snapshot_source(disk, name, message)?;
            self.rank_over(Below::Layer(source.id), disk)?;
        }
        Ok(())
    }
    /// Fails as [`Store::commit`] would.
    pub fn may_commit(&self, disk: &str, name: &str, message: Option<&str>) -> Result<()> {
        let _lock = self.lock(false)?;
        self.commit_source(disk, name, message).map(drop)
    }
    /// Fails as [`Store::rename`] would; returns what would be renamed.
    pub fn may_rename(&self, old: &str, new: &str) -> Result<Object> {
        let _lock = self.lock(false)?;
        self.rename_source(old, new)
    }
}

pub(super) fn named_twice(disk: &str) -> Error {
    Error::new(Kind::Invalid, format!("`{disk}` is named more than once"))
        .hint("one snapshot of each disk is made at one instant")
}
