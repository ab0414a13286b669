//! Disks of another size.
//!
//! Always true: whatever lies past the end of a disk reads as zeros when the disk grows again, below as in its own layer.

use super::objects::must_be;
use super::{Object, ObjectKind, Store};
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::valid_size;
use crate::layer::volatile;
use crate::units::{MAX_DISK, round_up};

/// The size of a disk that is to have at least `size` bytes: a multiple of the block size; `Invalid` if no disk can have it.
pub fn whole_blocks(size: u64) -> Result<u64> {
    round_up(size)
        .filter(|&s| s <= MAX_DISK && valid_size(s))
        .ok_or_else(|| {
            Error::new(Kind::Invalid, format!("a disk cannot have {size} bytes"))
                .hint("from 4 KiB to 16 TiB")
        })
}

impl Store {
    /// Gives a disk at rest another size. Smaller: what is cut off is lost, for ever.
    pub fn resize(&self, disk: &str, size: u64) -> Result<Object> {
        let size = whole_blocks(size)?;
        let _lock = self.lock(true)?;
        let object = self.resizable(disk)?;
        let (layer, chain) = self.open_top(&object, volatile::private()?)?;
        let open = CowDisk::writable(layer, chain);
        let former = open.size();
        let done = match former == size {
            true => Ok(()),
            false => open.resize(size),
        };
        let done = done.map_err(|e| match size < former {
            true => e.context(
                "the disk has its former size, but what was to be cut off may read as zeros",
            ),
            false => e,
        });
        match open.close() {
            // Only the tidying found no room, if all is flushed. The next opening does it.
            Err(e) if e.kind() == Kind::NoSpace && open.flush().is_ok() => {
                tracing::warn!(disk, "closed without a checkpoint: {e}");
            }
            Err(e) if done.is_ok() => return Err(e),
            _ => {}
        }
        drop(open);
        done?;
        self.note_opened(&object.name);
        self.object(&object.name)
    }
    /// Makes an attached disk that `running` is larger. `Busy` if it would become smaller: who uses it does not expect that.
    pub fn resize_running(&self, running: &CowDisk, disk: &str, size: u64) -> Result<Object> {
        let size = whole_blocks(size)?;
        let _lock = self.lock(true)?;
        let object = self.resizable(disk)?;
        must_be(running, &object)?;
        if size < running.size() {
            return Err(Error::new(
                Kind::Busy,
                format!("`{disk}` is attached: it can grow, but not shrink"),
            )
            .hint(format!("`forkdisk detach {disk}` first")));
        }
        if size > running.size() {
            running.resize(size)?;
        }
        self.object(&object.name)
    }
    /// How many bytes of data a disk at rest would lose if it had only `size` bytes.
    pub fn lost_by_resizing(&self, object: &Object, size: u64) -> Result<u64> {
        let size = whole_blocks(size)?;
        let open = self.open_cow(object, false)?;
        match open.size().checked_sub(size) {
            Some(cut) if cut > 0 => open.data_within(size, cut),
            _ => Ok(0),
        }
    }
    fn resizable(&self, disk: &str) -> Result<Object> {
        let object = self.resolve_locked(disk)?;
        match object.kind {
            ObjectKind::Disk => Ok(object),
            kind => Err(Error::new(
                Kind::Invalid,
                format!("`{}` is {}, not a disk", object.name, kind.one()),
            )
            .hint("only disks change; `forkdisk fork --size` makes a larger disk from it")),
        }
    }
}
