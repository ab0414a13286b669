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
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long commands that read the layer of a disk attached read-only are waited for.
const READ: Duration = Duration::from_secs(10);
/// How often it is tried meanwhile.
const STEP: Duration = Duration::from_millis(5);

/// How many change a disk that is attached read-only. Held while the first of them makes it ready for that, and the last one ends it.
pub(super) type TakenUp = Arc<Mutex<usize>>;

/// An attached disk that can be changed as long as this lives.
pub(super) struct Running<'s> {
    disk: Arc<CowDisk>,
    /// It is to be open for reading only again.
    reading: Option<Reading<'s>>,
}

struct Reading<'s> {
    server: &'s Server,
    name: String,
    taken_up: TakenUp,
}

/// What is needed to change a disk that is attached read-only.
pub(super) struct ToTakeUp {
    /// For its volatile log.
    memory: Arc<SharedMemory>,
    taken_up: TakenUp,
}

impl Deref for Running<'_> {
    type Target = CowDisk;
    fn deref(&self) -> &CowDisk {
        &self.disk
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Some(reading) = &self.reading else { return };
        let mut others = reading.taken_up.lock();
        *others -= 1;
        if *others == 0
            && let Err(e) = reading.server.store.lay_down(&self.disk)
        {
            tracing::error!(
                disk = reading.name,
                "attached read-only, was changed, and cannot be again until it is detached: {e}"
            );
        }
        drop(others);
        // Whatever became of the change: it may have got another layer.
        reading.server.refresh(&reading.name);
    }
}

impl Server {
    /// An attached disk, to be changed. Its users do not notice, but for a moment in which they wait.
    pub(super) fn running(&self, name: &str) -> Result<Running<'_>> {
        self.running_with(name, false)
    }
    /// [`Server::running`]; `whole`: nothing of its history goes by that.
    pub(super) fn running_with(&self, name: &str, whole: bool) -> Result<Running<'_>> {
        let (disk, reading) = self.open_disk(name)?;
        let Some(ToTakeUp { memory, taken_up }) = reading else {
            return Ok(Running {
                disk,
                reading: None,
            });
        };
        let mut others = taken_up.lock();
        if *others == 0 {
            let deadline = Instant::now() + READ;
            while !self.store.take_up(name, &disk, memory.clone(), whole)? {
                if Instant::now() >= deadline {
                    return Err(being_read(name));
                }
                std::thread::sleep(STEP);
            }
        }
        *others += 1;
        drop(others);
        Ok(Running {
            disk,
            reading: Some(Reading {
                server: self,
                name: name.into(),
                taken_up,
            }),
        })
    }
    /// An attached disk; [`Kind::Busy`] if nobody writes to it.
    pub(super) fn written_to(&self, name: &str) -> Result<Arc<CowDisk>> {
        match self.open_disk(name)? {
            (disk, None) => Ok(disk),
            (_, Some(_)) => Err(read_only(name)),
        }
    }
    /// An attached disk, and what is needed to change it if it is attached read-only.
    pub(super) fn open_disk(&self, name: &str) -> Result<(Arc<CowDisk>, Option<ToTakeUp>)> {
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
        if !entry.attached.read_only {
            return Ok((disk, None));
        }
        let memory = entry.place.volatile()?;
        let taken_up = entry.taken_up.clone();
        Ok((disk, Some(ToTakeUp { memory, taken_up })))
    }
}

fn being_read(name: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!("`{name}` is attached read-only, and its layer is being read"),
    )
    .hint("wait until the command that reads it has ended (`export`, `diff`, `map`, ...)")
}

fn read_only(name: &str) -> Error {
    Error::new(Kind::Busy, format!("`{name}` is attached read-only")).hint(format!(
        "`forkdisk detach {name}` first, or attach it for writing"
    ))
}
