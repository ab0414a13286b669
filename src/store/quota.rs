//! Quotas: settings of a disk's name that say how many bytes it may have for itself (FORMAT.md, section 2).
//!
//! What counts are the data blocks of the disk's own layer and of those below that were made for it, which its snapshots sealed: down to what the disk
//! was forked from. They belong to the disk, and forks do not inherit them.

use super::names::{Extra, NameRecord, read_name, stage};
use super::objects::must_be;
use super::{Below, Object, ObjectKind, Store, parent_of};
use crate::disk::CowDisk;
use crate::disk::cow::{Quota, made_for_it};
use crate::error::{Error, Kind, Result};
use crate::layer::read_header;
use crate::units::{BLOCK, Id};
use std::sync::Arc;

/// Bytes.
const QUOTA: &str = "quota";
/// `pause`: who writes more is kept waiting. Else there is no such line.
const ON_FULL: &str = "on_full";
const PAUSE: &str = "pause";
/// Id of what the lowest of the disk's layers stands on.
const ABOVE: &str = "quota_above";

/// A change of a disk's quota.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QuotaChange {
    /// The new quota in bytes, or none; outer `None`: as it is.
    pub bytes: Option<Option<u64>>,
    /// Should who writes more wait? `None`: as it is.
    pub waits: Option<bool>,
}

impl QuotaChange {
    /// Does it change nothing?
    pub fn is_nothing(&self) -> bool {
        *self == QuotaChange::default()
    }
    /// The settings of a new disk.
    pub fn settings(&self) -> Result<Extra> {
        let mut settings = Extra::default();
        self.put(&mut settings)?;
        Ok(settings)
    }
    fn put(&self, settings: &mut Extra) -> Result<()> {
        match self.bytes {
            Some(Some(bytes)) if bytes < BLOCK => {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("a quota of {bytes} bytes is no block"),
                )
                .hint("4096 is the least; `--quota none` takes a quota away"));
            }
            Some(bytes) => settings.set(QUOTA, bytes.map(|b| b.to_string())),
            None => {}
        }
        if settings.get(QUOTA).is_none() {
            if self.waits == Some(true) {
                return Err(Error::new(
                    Kind::Invalid,
                    "without a quota there is nothing to wait for",
                )
                .hint("set one as well: `--quota SIZE`"));
            }
            settings.set(ON_FULL, None);
            settings.set(ABOVE, None);
        }
        if let Some(waits) = self.waits {
            settings.set(ON_FULL, waits.then(|| PAUSE.to_string()));
        }
        Ok(())
    }
}

/// What a disk may have for itself, and what it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct QuotaUse {
    /// Bytes it may have.
    pub quota: Option<u64>,
    /// Is who writes more kept waiting?
    pub waits: bool,
    /// Bytes it has, as far as its file tells: of an attached disk as of its last flush.
    pub used: u64,
}

/// The settings of a disk that is made on `below`.
pub(super) fn settings_on(settings: &Extra, below: Below) -> Extra {
    let mut settings = settings.clone();
    if settings.get(QUOTA).is_some() {
        settings.set(ABOVE, Some(below.id().to_string()));
    }
    settings
}

/// The quota that settings tell of.
pub(super) fn quota_in(settings: &Extra) -> Result<Option<Quota>> {
    let Some(text) = settings.get(QUOTA) else {
        return Ok(None);
    };
    let bytes = text.parse().map_err(|_| {
        Error::new(Kind::Corrupt, format!("the quota `{text}` is no number"))
            .hint("`forkdisk resize DISK --quota SIZE` sets it anew")
    })?;
    Ok(Some(Quota {
        bytes,
        waits: settings.get(ON_FULL) == Some(PAUSE),
        above: settings.get(ABOVE).and_then(Id::parse),
    }))
}

impl Store {
    /// Applies to a disk that was just opened what its name says.
    pub(super) fn with_quota(&self, name: &str, disk: CowDisk) -> Result<Arc<CowDisk>> {
        let quota = quota_in(&read_name(&*self.names, name)?.extra)?;
        if quota.is_some() {
            disk.set_quota(quota);
        }
        Ok(Arc::new(disk))
    }
    /// What a disk may have for itself and what it has; `None` of what is no disk.
    pub fn quota(&self, object: &Object) -> Result<Option<QuotaUse>> {
        if object.kind != ObjectKind::Disk {
            return Ok(None);
        }
        let _lock = self.lock(false)?;
        let record = read_name(&*self.names, &object.name)?;
        let quota = quota_in(&record.extra)?;
        let id = record.target.id();
        let file = self
            .layers
            .open(&super::layer_file(id), crate::io::Access::Read)?;
        let header = read_header(&*file)?;
        let chain = self.chain(parent_of(&header))?;
        let (_, (data, _), _) = self.layer_counts(id)?;
        let below = made_for_it(&header, &chain, quota.and_then(|q| q.above));
        Ok(Some(QuotaUse {
            quota: quota.map(|q| q.bytes),
            waits: quota.is_some_and(|q| q.waits),
            used: (data + below) * BLOCK,
        }))
    }
    /// Fails as the change would, as far as can be told.
    pub fn may_set_quota(&self, disk: &str, change: QuotaChange) -> Result<()> {
        let _lock = self.lock(false)?;
        change.put(&mut read_name(&*self.names, disk)?.extra)
    }
    /// Changes the quota of a disk at rest, or of the attached one that `running` is: there it holds for the next request. Less than the disk has is no
    /// mistake: it gets no more.
    pub fn set_quota(
        &self,
        disk: &str,
        change: QuotaChange,
        running: Option<&CowDisk>,
    ) -> Result<Object> {
        let _lock = self.lock(true)?;
        let object = self.resolve_locked(disk)?;
        if object.kind != ObjectKind::Disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{}` is {}, not a disk", object.name, object.kind.one()),
            )
            .hint("only disks have quotas"));
        }
        if let Some(running) = running {
            must_be(running, &object)?;
        }
        let mut record = read_name(&*self.names, &object.name)?;
        let had_none = record.extra.get(QUOTA).is_none();
        change.put(&mut record.extra)?;
        if had_none && record.extra.get(QUOTA).is_some() {
            let above = self.stands_on(record.target)?;
            record.extra.set(ABOVE, Some(above.to_string()));
        }
        self.write_name(&object.name, &record)?;
        if let Some(running) = running {
            running.set_quota(quota_in(&record.extra)?);
        }
        Ok(object)
    }
    /// What the layers that were made for the disk with this own layer stand on.
    fn stands_on(&self, own: Below) -> Result<Id> {
        let header = |id: Id| {
            let file = self
                .layers
                .open(&super::layer_file(id), crate::io::Access::Read)?;
            read_header(&*file)
        };
        let first = header(own.id())?;
        let mut below = parent_of(&first);
        while let Below::Layer(id) = below {
            let next = header(id)?;
            if next.name() != first.name() {
                break;
            }
            below = parent_of(&next);
        }
        Ok(below.id())
    }
    /// Writes a name's record anew; durable on return.
    pub(super) fn write_name(&self, name: &str, record: &NameRecord) -> Result<()> {
        let (temporary, file) = stage(&*self.names, name, &record.encode(name))?;
        let placed = file
            .sync()
            .and_then(|()| self.names.rename(&temporary, name));
        if let Err(e) = placed {
            let _ = self.names.remove(&temporary);
            return Err(e);
        }
        self.names.sync()
    }
}
