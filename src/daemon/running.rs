//! Attached disks as those see them who change them: seal, fork, commit, resize, roll back.
//!
//! Always true: a disk that is attached read-only is open for reading only, but for as long as somebody changes it.

use super::entry::Phase;
use super::server::{Server, in_transit, not_attached};
use crate::disk::CowDisk;
use crate::error::{Error, Kind, Result};
use crate::store::ObjectKind;
use crate::sys::shared::SharedMemory;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

/// Disks attached read-only that are being changed, by where they are in memory, and how many change each.
pub(super) type TakenUp = Mutex<BTreeMap<usize, usize>>;

/// An attached disk that can be changed as long as this lives.
pub(super) struct Running<'s> {
    disk: Arc<CowDisk>,
    /// It is to be open for reading only again.
    taken_up: Option<&'s Server>,
}

impl Deref for Running<'_> {
    type Target = CowDisk;
    fn deref(&self) -> &CowDisk {
        &self.disk
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Some(server) = self.taken_up else { return };
        let key = Arc::as_ptr(&self.disk) as usize;
        // Held to the end: whoever comes next finds it open for reading only, or not yet.
        let mut taken = server.taken_up.lock();
        let others = taken.get(&key).copied().unwrap_or(1) - 1;
        if others > 0 {
            taken.insert(key, others);
            return;
        }
        taken.remove(&key);
        if let Err(e) = server.store.lay_down(&self.disk) {
            tracing::error!("a disk attached read-only was changed, and cannot be again: {e}");
        }
    }
}

impl Server {
    /// An attached disk, to be changed. Its users do not notice, but for a moment in which they wait.
    pub(super) fn running(&self, name: &str) -> Result<Running<'_>> {
        let (disk, memory) = self.open_disk(name)?;
        let Some(memory) = memory else {
            return Ok(Running {
                disk,
                taken_up: None,
            });
        };
        let key = Arc::as_ptr(&disk) as usize;
        let mut taken = self.taken_up.lock();
        let others = taken.get(&key).copied().unwrap_or(0);
        if others == 0 {
            self.store.take_up(name, &disk, memory)?;
        }
        taken.insert(key, others + 1);
        drop(taken);
        Ok(Running {
            disk,
            taken_up: Some(self),
        })
    }
    /// An attached disk; [`Kind::Busy`] if nobody writes to it.
    pub(super) fn written_to(&self, name: &str) -> Result<Arc<CowDisk>> {
        match self.open_disk(name)? {
            (disk, None) => Ok(disk),
            (_, Some(_)) => Err(read_only(name)),
        }
    }
    /// An attached disk, and memory for its volatile log if it is attached read-only.
    pub(super) fn open_disk(
        &self,
        name: &str,
    ) -> Result<(Arc<CowDisk>, Option<Arc<SharedMemory>>)> {
        let table = self.table.lock();
        let entry = table.get(name).ok_or_else(|| not_attached(name))?;
        if entry.phase == Phase::Closing {
            return Err(in_transit(name));
        }
        if entry.attached.kind != ObjectKind::Disk {
            return Err(read_only(name));
        }
        if let Some(why) = &entry.failed {
            return Err(why.clone());
        }
        let disk = entry.disk.clone().ok_or_else(|| in_transit(name))?;
        let memory = entry.attached.read_only.then(|| entry.place.volatile());
        Ok((disk, memory.transpose()?))
    }
}

fn read_only(name: &str) -> Error {
    Error::new(Kind::Busy, format!("`{name}` is attached read-only")).hint(format!(
        "`forkdisk detach {name}` first, or attach it for writing"
    ))
}
