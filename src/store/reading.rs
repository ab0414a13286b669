//! Disks that are open for reading only, and that are changed nevertheless: not by who reads them, but by who seals, forks, rolls back or
//! resizes them meanwhile.
//!
//! Always true:
//! - a disk that is open for reading only has its layer locked, shared as long as nobody changes it, and exclusively from [`Store::take_up`] to
//!   [`Store::lay_down`]: between the two nobody else can have it;
//! - who reads sees the same disk before, between and after the two, and can write in none of them.

use super::quota::quota_in;
use super::{Object, Store, in_use, layer_file, names, parent_of};
use crate::chain::Chain;
use crate::disk::CowDisk;
use crate::disk::cow::Halted;
use crate::error::{Error, Kind, Result};
use crate::io::{Access, File};
use crate::layer::{ReadLayer, State, recover};
use crate::sys::shared::SharedMemory;
use std::sync::Arc;

impl Store {
    /// Opens a disk for reading only. The names lock is held.
    pub(super) fn open_to_read(&self, object: &Object) -> Result<Arc<CowDisk>> {
        // It may have got another layer since it was looked up.
        let object = self.object(&object.name)?;
        let name = layer_file(object.id);
        // It may have to be changed later on, under the same lock; not where the host allows for reading alone.
        let file = match self.layers.open(&name, Access::Write) {
            Err(e) if e.kind() != Kind::NotFound => self.layers.open(&name, Access::Read)?,
            other => other?,
        };
        file.lock(false)
            .map_err(|e| in_use(&e, &format!("`{}` is attached", object.name)))?;
        let chain = self.chain_to_read(file)?;
        Ok(Arc::new(CowDisk::read_only(chain)))
    }
    /// The layer in `file`, which is no sealed one, over what it stands on.
    fn chain_to_read(&self, file: Arc<dyn File>) -> Result<Arc<Chain>> {
        let layer = ReadLayer::open(file)?;
        let below = self.chain(parent_of(layer.header()))?;
        Ok(Arc::new(self.chain_over(Arc::new(layer), &below)))
    }
    pub(super) fn chain_over(&self, layer: Arc<ReadLayer>, below: &Chain) -> Chain {
        let mut layers = vec![layer];
        layers.extend(below.layers().iter().cloned());
        Chain::new(layers, below.base().clone(), self.budget.clone())
    }
    /// Lets a disk called `name` that is open for reading only be changed, by all but its users: until [`Store::lay_down`]. `memory` is for its volatile log;
    /// `whole`: nothing of its history goes, however old it is. Nothing is done where it can be written already. Says whether it can be changed now: not while another
    /// process reads it, too.
    pub fn take_up(
        &self,
        name: &str,
        disk: &CowDisk,
        memory: Arc<SharedMemory>,
        whole: bool,
    ) -> Result<bool> {
        let _lock = self.lock(true)?;
        let mut object = self.object(name)?;
        let quota = quota_in(&names::read_name(&*self.names, name)?.extra)?;
        let limited = self.keep_of(name)?;
        let halted = disk.halt();
        let changed = || {
            Error::new(
                Kind::Busy,
                format!("`{name}` is not what it was when it was attached"),
            )
            .hint(format!("`forkdisk detach {name}` and attach it again"))
        };
        if halted.is_closed() {
            return Err(changed());
        }
        let Some(own) = halted.shown_layer() else {
            return Ok(true);
        };
        if own.id() != object.id {
            return Err(changed());
        }
        let keep = match whole && own.superblock().has_history() {
            true => Some(self.keep_all(name)?),
            false => limited,
        };
        let file = own.file().clone();
        let sealed = || -> Result<bool> {
            let found = recover::superblock(&*file, own.header())?;
            Ok(State::of(&found.superblock) == State::Sealed)
        };
        // As where a disk is opened for writing: nobody knows whether the seal and the name are on the disk.
        let (layer, chain) = if sealed()? && {
            self.names.sync()?;
            recover::settle(&*file, own.header())?;
            sealed()?
        } {
            let fresh = self.put_layer_on_top(&object)?;
            object = self.object_of(name, fresh)?;
            self.open_top(&object, memory)?
        } else {
            if let Err(e) = file.lock(true) {
                file.lock(false)?;
                return match e.kind() {
                    Kind::Busy => Ok(false),
                    _ => Err(e),
                };
            }
            let staged = self.stage_opened(name);
            match (self.open_layer(&object, file.clone(), memory, keep), staged) {
                (Ok(opened), staged) => {
                    if let Some(staged) = staged {
                        self.place_opened(name, staged);
                    }
                    opened
                }
                (Err(e), staged) => {
                    if let Some((temporary, _)) = staged {
                        let _ = self.names.remove(&temporary);
                    }
                    // The opening may have come far enough for other maps to count.
                    self.show_again(halted, file)?;
                    return Err(e);
                }
            }
        };
        halted.go_on(layer, chain);
        disk.set_quota(quota);
        Ok(true)
    }
    /// Ends what [`Store::take_up`] began. What could not be closed cleanly is shown as its last commit left it: its users had no part in what came after.
    pub fn lay_down(&self, disk: &CowDisk) -> Result<()> {
        let halted = disk.halt();
        if halted.shown_layer().is_some() || halted.is_closed() {
            return Ok(());
        }
        let file = halted.file()?;
        if let Err(e) = halted.close() {
            tracing::warn!("a disk attached read-only was changed, and is not closed cleanly: {e}");
        }
        self.show_again(halted, file)?;
        disk.set_quota(None);
        Ok(())
    }
    /// Lets a disk show the layer in `file`, and others read that, too.
    fn show_again(&self, halted: Halted<'_>, file: Arc<dyn File>) -> Result<()> {
        let chain = self.chain_to_read(file.clone());
        let shared = file.lock(false);
        halted.show(chain?);
        shared
    }
}
