//! What must be durable before anything of a layer that was just opened is overwritten.
//!
//! Attaching does not wait for it: the device is set up meanwhile, which only reads.

use super::volatile::{self, Syncing};
use crate::error::{Error, Result};
use crate::format::Superblock;
use crate::io::{Dir, File};
use crate::sync::Mutex;
use crate::sys::shared::SharedMemory;
use crate::units::Slot;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A superblock that says that its layer is being written.
pub(super) struct First {
    pub file: Arc<dyn File>,
    /// The layer's volatile log, where a sync that is under way is marked.
    pub memory: Arc<SharedMemory>,
    pub superblock: Superblock,
}

impl First {
    /// Copy 2; copy 1 is for whoever commits first. Both are the same, and copy 1 is durable: the predecessor wrote copy 2 after it had
    /// synced copy 1. Whether it lived to sync copy 2 as well nobody knows; so this is the one that may be torn now.
    fn write(mut self) -> Result<()> {
        volatile::syncing(&self.memory, Syncing::Superblock);
        self.file.write_at(self.superblock.encode(), Slot(2).at())?;
        self.file.sync()
    }
}

#[derive(Default)]
struct Work {
    first: Option<First>,
    /// The name that refers to it, and what that says of it.
    names: Option<Arc<dyn Dir>>,
    /// It could not be done, and is not tried again: a sync after one that failed says nothing.
    failed: Option<Error>,
}

/// See the module.
#[derive(Default)]
pub struct Unsettled {
    waits: AtomicBool,
    work: Mutex<Work>,
}

impl Unsettled {
    /// From now on this is to be written.
    pub(super) fn rest_on_superblock(&self, first: First) {
        self.work.lock().first = Some(first);
        self.waits.store(true, SeqCst);
    }
    /// From now on there is something in this directory that is not durable.
    pub(super) fn rest_on_names(&self, names: Arc<dyn Dir>) {
        self.work.lock().names = Some(names);
        self.waits.store(true, SeqCst);
    }
    /// Makes it durable; waits if somebody else is doing so. An error stays.
    pub fn settle(&self) -> Result<()> {
        if !self.waits.load(SeqCst) {
            return Ok(());
        }
        let mut work = self.work.lock();
        if let Some(error) = &work.failed {
            return Err(error.clone());
        }
        // Nothing is held any more when this lock is free: the disk may be detached then.
        let (first, names) = (work.first.take(), work.names.take());
        let done = first
            .map_or(Ok(()), First::write)
            .and_then(|()| names.map_or(Ok(()), |names| names.sync()));
        match done {
            Ok(()) => self.waits.store(false, SeqCst),
            Err(e) => {
                let e = e.context("what the disk rests on could not be made durable");
                work.failed = Some(e.clone());
                return Err(e);
            }
        }
        Ok(())
    }
}
