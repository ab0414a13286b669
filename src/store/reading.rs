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
use crate::error::{Error, Kind, Result};
use crate::io::{Access, File};
use crate::layer::{ReadLayer, State, recover};
use crate::sys::shared::SharedMemory;
use std::sync::Arc;

impl Store {
    /// Opens a disk for reading only. The names lock is held.
    pub(super) fn open_to_read(&self, object: &Object) -> Result<Arc<CowDisk>> {
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
    /// Lets a disk called `name` that is open for reading only be changed, by all but its users: until [`Store::lay_down`]. `memory` is for its volatile log.
    /// Nothing is done where it can be written. [`Kind::Busy`] while another process reads it, too.
    pub fn take_up(&self, name: &str, disk: &CowDisk, memory: Arc<SharedMemory>) -> Result<()> {
        let _lock = self.lock(true)?;
        let mut object = self.object(name)?;
        let halted = disk.halt();
        let Some(own) = halted.shown_layer() else {
            return Ok(());
        };
        if own.id() != object.id || halted.is_closed() {
            return Err(Error::new(
                Kind::Busy,
                format!("`{name}` is not what it was when it was attached"),
            )
            .hint(format!("`forkdisk detach {name}` and attach it again")));
        }
        let opened = if own.state() == State::Sealed {
            // A snapshot of it was interrupted, maybe before the seal and the name were on the disk.
            self.names.sync()?;
            recover::settle(&**own.file(), own.header())?;
            let fresh = self.put_layer_on_top(&object)?;
            object = self.object_of(name, fresh)?;
            self.open_top(&object, memory)
        } else {
            let file = own.file().clone();
            if let Err(e) = file.lock(true) {
                file.lock(false)?;
                return Err(in_use(&e, &format!("`{name}` is being read")));
            }
            let staged = self.stage_opened(name);
            let opened = self.open_layer(&object, file.clone(), memory, self.keep_of(name)?);
            match (&opened, staged) {
                (Ok(_), Some(staged)) => self.place_opened(name, staged),
                (Err(_), Some((temporary, _))) => drop(self.names.remove(&temporary)),
                (_, None) => {}
            }
            if opened.is_err() {
                file.lock(false)?;
            }
            opened
        };
        let (layer, chain) = opened?;
        halted.go_on(layer, chain);
        let quota = quota_in(&names::read_name(&*self.names, name)?.extra)?;
        disk.set_quota(quota);
        Ok(())
    }
    /// Ends what [`Store::take_up`] began. Where that fails the disk can still be read, and not be changed any more.
    pub fn lay_down(&self, disk: &CowDisk) -> Result<()> {
        let halted = disk.halt();
        if halted.shown_layer().is_some() || halted.is_closed() {
            return Ok(());
        }
        let file = halted.close()?;
        file.lock(false)?;
        let layer = Arc::new(ReadLayer::open(file)?);
        let chain = self.chain_over(layer, &halted.chain());
        halted.show(Arc::new(chain));
        Ok(())
    }
}
