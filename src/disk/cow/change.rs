//! Changes of the disk itself while it is in use: its size, its quota, and what it writes into.
//!
//! Always true: a request sees one layer, one chain and one size from beginning to end. What takes another layer or makes the disk smaller
//! halts it first ([`CowDisk::halt`]).

use super::{CowDisk, Top, read_only, zero_with_room};
use crate::chain::Chain;
use crate::disk::{Disk, Extent, Source};
use crate::error::{Error, Result};
use crate::format::Header;
use crate::io::File;
use crate::layer::{Layer, ReadLayer, State};
use crate::sync::atomic::Ordering::SeqCst;
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK, Id, Lba, REGION_BYTES};
use std::ops::DerefMut;
use std::sync::Arc;

/// Bytes that are looked at at once.
const WINDOW: u64 = 512 * REGION_BYTES;

/// How many bytes a disk may have for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quota {
    /// The most, in bytes: data blocks of the disk's own layer and of those below it that were made for it.
    pub bytes: u64,
    /// Should who writes more be kept waiting for room, instead of getting the error?
    pub waits: bool,
    /// What the lowest of the disk's layers stands on, where that is known.
    pub above: Option<Id>,
}

/// A disk that serves no request as long as this lives: all that were under way have ended, and those that come wait.
pub struct Halted<'d> {
    disk: &'d CowDisk,
    top: Box<dyn DerefMut<Target = Top> + 'd>,
}

impl CowDisk {
    /// Gives the disk another size in bytes, a multiple of the block size; durable on return. What is added reads as zeros. What is cut off is gone: the
    /// disk is halted for that, and if it is interrupted, it has the former size, and zeros where it was being cut.
    pub fn resize(&self, size: u64) -> Result<()> {
        if size >= self.size() {
            let top = self.top.read();
            let layer = top.layer.as_ref().ok_or_else(read_only)?;
            // Nothing is there: nobody could write past the end, and who made the disk smaller left zeros behind. If it was made
            // smaller by one that did not, they are made now.
            let (from, end) = (self.size(), top.chain.reach().min(size));
            if Self::shows_data(&top, from, end)? {
                zero_with_room(layer, Lba::of(from), (end - from) / BLOCK)?;
                layer.flush()?;
            }
            layer.set_size(size)?;
            // Not before it is durable: what is acknowledged there must be there after a crash.
            self.size.store(size, SeqCst);
            return Ok(());
        }
        let top = self.top.write();
        let layer = top.layer.as_ref().ok_or_else(read_only)?;
        let end = match layer.counts() {
            // Only what lies below can show through.
            (0, 0) => layer.size().min(top.chain.size()),
            _ => layer.size(),
        };
        if end > size {
            zero_with_room(layer, Lba::of(size), (end - size) / BLOCK)?;
            layer.flush()?;
        }
        layer.set_size(size)?;
        self.size.store(size, SeqCst);
        Ok(())
    }
    /// Lets a new layer hide what lies below past `from`, which may be the disk's end: whoever makes the disk larger sees zeros there.
    pub fn hide_from(&self, from: u64) -> Result<()> {
        let top = self.top.read();
        let layer = top.layer.as_ref().ok_or_else(read_only)?;
        match top.chain.reach().checked_sub(from) {
            Some(hidden) if hidden > 0 => layer.zero(Lba::of(from), hidden / BLOCK),
            _ => Ok(()),
        }
    }
    /// Would anything else than zeros show in a range, wherever the disk ends?
    fn shows_data(top: &Top, from: u64, end: u64) -> Result<bool> {
        for at in (from..end).step_by(WINDOW as usize) {
            let shown = Self::mapped(top, at, WINDOW.min(end - at))?;
            let data = |e: &Extent| matches!(e.from, Source::Layer { .. } | Source::Base);
            if shown.iter().any(data) {
                return Ok(true);
            }
        }
        Ok(false)
    }
    /// How many bytes of `at..at+len` hold data, its own or what lies below.
    pub fn data_within(&self, at: u64, len: u64) -> Result<u64> {
        let mut data = 0;
        for extent in self.extents(at, len)? {
            data += match extent.from {
                Source::Absent | Source::Zero { .. } | Source::Hole => 0,
                Source::Layer { .. } => extent.len,
                Source::Base => {
                    let base = self.top.read().chain.base().clone();
                    let inside = base.len().saturating_sub(extent.at).min(extent.len);
                    let ranges = base.data_ranges(extent.at, inside)?;
                    ranges.iter().map(|(_, len)| len).sum::<u64>()
                }
            };
        }
        Ok(data)
    }
    /// Lets the disk have so much for itself from now on, and applies that to the next request. What it has already it keeps.
    pub fn set_quota(&self, quota: Option<Quota>) {
        let top = self.top.write();
        *self.quota.lock() = quota;
        self.waits.store(quota.is_some_and(|q| q.waits), SeqCst);
        if let Some(layer) = &top.layer {
            self.limit(layer, &top.chain);
        }
    }
    /// How many bytes the disk may have for itself, if that is limited.
    pub fn quota_bytes(&self) -> Option<u64> {
        self.quota.lock().map(|q| q.bytes)
    }
    /// What the disk has for itself, in bytes, un-flushed blocks included.
    pub fn used(&self) -> u64 {
        let top = self.top.read();
        let above = self.quota.lock().and_then(|q| q.above);
        top.layer.as_ref().map_or(0, |layer| {
            (layer.counts().0 + made_for_it(layer.header(), &top.chain, above)) * BLOCK
        })
    }
    /// Who waits for room gets the error instead, and so does who would have to wait: until the quota is set anew.
    pub fn stop_waiting(&self) {
        self.waits.store(false, SeqCst);
    }
    /// Who would get the error waits again, if the quota says so.
    pub fn wait_again(&self) {
        let waits = self.quota.lock().is_some_and(|q| q.waits);
        self.waits.store(waits, SeqCst);
    }
    /// Id of the layer that it writes into.
    pub fn own_layer(&self) -> Option<Id> {
        self.top.read().layer.as_ref().map(Layer::id)
    }
    /// Limits a layer to what is left of the quota above the chain.
    pub(super) fn limit(&self, layer: &Layer, chain: &Chain) {
        let quota = *self.quota.lock();
        layer.set_limit(quota.map(|q| {
            let below = made_for_it(layer.header(), chain, q.above);
            (q.bytes / BLOCK).saturating_sub(below)
        }));
    }
    /// Says of an error that is about the quota what it is and what can be done.
    pub(super) fn refused(&self, e: Error) -> Error {
        if !e.is_of_quota() {
            return e;
        }
        let quota = self.quota.lock().map_or(0, |q| q.bytes);
        let e = Error::new(
            e.kind(),
            format!("the disk has used its quota of {quota} bytes"),
        )
        .of_quota()
        .hint("`forkdisk resize DISK --quota SIZE` raises it; discarded blocks (`fstrim`) make room, too");
        match self.waits.load(SeqCst) {
            true => e.and_waits(),
            false => e,
        }
    }
    /// Puts another layer and what lies below it in the place of the present ones.
    pub(super) fn go_on_in(&self, top: &mut Top, layer: Layer, chain: Arc<Chain>) {
        self.limit(&layer, &chain);
        layer.lies_over(chain.clone());
        if let Some(former) = &top.layer {
            layer.counts_on_from(former);
        }
        self.size.store(layer.size(), SeqCst);
        *top = Top {
            layer: Some(layer),
            chain,
        };
    }
    /// Flushes, and does what a seal would have to do while the disk is halted.
    pub fn flush_ahead(&self) -> Result<()> {
        self.flush()?;
        let top = self.top.read();
        top.layer.as_ref().map_or(Ok(()), Layer::checkpoint_ahead)
    }
    /// Halts the disk: waits for the requests under way. For milliseconds, as its users wait. Several disks are halted in the order of their
    /// names, so that two who do that do not wait for each other.
    pub fn halt(&self) -> Halted<'_> {
        Halted {
            disk: self,
            top: Box::new(self.top.write()),
        }
    }
}

impl Halted<'_> {
    fn layer(&self) -> Result<&Layer> {
        self.top.layer.as_ref().ok_or_else(read_only)
    }
    /// Makes all that was written durable: then the volatile log holds nothing.
    pub fn flush(&self) -> Result<()> {
        self.layer()?.flush()
    }
    /// Seals its layer; returns the layer's file and the memory of its volatile log, for the next layer. Until [`Halted::go_on`] the disk accepts nothing.
    pub fn seal(&self, name: Option<&str>) -> Result<(Arc<dyn File>, Arc<SharedMemory>)> {
        let layer = self.layer()?;
        self.disk.seal_layer(layer, name)?;
        Ok((layer.file().clone(), layer.volatile().clone()))
    }
    /// The file of its layer.
    pub fn file(&self) -> Result<Arc<dyn File>> {
        Ok(self.layer()?.file().clone())
    }
    /// What lies below its layer.
    pub fn chain(&self) -> Arc<Chain> {
        self.top.chain.clone()
    }
    /// Closes its layer cleanly, without letting go of that point of its history; returns the memory of the volatile log. Until [`Halted::go_on`]
    /// the disk accepts nothing.
    pub fn rest(&self, held: Option<u64>) -> Result<Arc<SharedMemory>> {
        let layer = self.layer()?;
        let hold = held.map(|number| layer.hold(number)).transpose()?;
        layer.close(State::Clean, None)?;
        drop(hold);
        Ok(layer.volatile().clone())
    }
    /// The memory of the volatile log.
    pub fn volatile(&self) -> Result<Arc<SharedMemory>> {
        Ok(self.layer()?.volatile().clone())
    }
    /// The layer at the top of what it shows, if that cannot be changed now.
    pub fn shown_layer(&self) -> Option<Arc<ReadLayer>> {
        let shown = self.top.layer.is_none().then(|| self.top.chain.layers());
        shown.and_then(|layers| layers.first().cloned())
    }
    /// Was it closed?
    pub fn is_closed(&self) -> bool {
        self.disk.closed.load(SeqCst)
    }
    /// Closes its layer cleanly.
    pub fn close(&self) -> Result<()> {
        self.layer()?.close(State::Clean, None)
    }
    /// Shows a chain alone from now on, with the same contents.
    pub fn show(mut self, chain: Arc<Chain>) {
        let top: &mut Top = &mut self.top;
        *top = Top { layer: None, chain };
    }
    /// Stops the disk for good: what it writes into is no part of it any more.
    pub fn stop(&self, why: &Error) {
        if let Some(layer) = &self.top.layer {
            layer.stop(why);
        }
    }
    /// Lets the disk go on in another layer, with its size, over another chain.
    pub fn go_on(mut self, layer: Layer, chain: Arc<Chain>) {
        self.disk.go_on_in(&mut self.top, layer, chain);
    }
}

/// Data blocks of the layers at the top of `chain` that were made for the disk whose own layer has this header: down to what is called
/// `above`, or, where that is not known or not there any more, to the first that was made for another disk.
pub fn made_for_it(own: &Header, chain: &Chain, above: Option<Id>) -> u64 {
    let layers = chain.layers();
    let known = above.and_then(|id| match chain.base().id() == id {
        true => Some(layers.len()),
        false => layers.iter().position(|l| l.id() == id),
    });
    let end = known.unwrap_or_else(|| {
        let other = layers.iter().position(|l| l.header().name() != own.name());
        other.unwrap_or(layers.len())
    });
    layers[..end].iter().map(|l| l.counts().0).sum()
}
