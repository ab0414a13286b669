//! The copy-on-write disk: one writable layer over a chain, or a chain alone.
//!
//! Every request holds `top` for reading while it runs; a seal takes it for writing, which quiesces the disk.

mod change;
mod rewind;
mod stats;

pub use change::{Halted, Quota, made_for_it};
pub use rewind::MAX_REWIND;
pub use stats::DiskStats;

use super::ahead::Stream;
use super::{Disk, Extent, Source, parts};
use crate::base::Base;
use crate::chain::{Chain, Place};
use crate::error::{Error, Kind, Result};
use crate::format::{self, Header, Pointer};
use crate::io::File;
use crate::layer::unsettled::Unsettled;
use crate::layer::writable::Taken;
use crate::layer::{Layer, State};
use crate::sync::atomic::{self, Ordering::SeqCst};
use crate::sync::{Mutex, RwLock};
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK, BLOCK_SIZE, Id, Lba, REGION_BLOCKS, Region, Slot};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
// Counters for people, and hints: no order depends on them.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// After so many regions in a row of which no layer below says anything it is worth to ask for the next one of which any does.
const MANY_CLEAR: u32 = 8;

/// Blocks handled in one piece: bounds buffers and what one write reserves. 1 MiB, the largest request of the doors.
const PIECE: usize = 256;
/// So often at most room is made for one request: each time half of the history goes, or all.
const ROUNDS: usize = 64;

struct Top {
    layer: Option<Layer>,
    chain: Arc<Chain>,
}

/// Blocks read, by where they came from, and written.
#[derive(Default)]
pub struct Counters {
    /// Blocks read from the base.
    pub from_base: AtomicU64,
    /// Blocks read from sealed layers.
    pub from_sealed: AtomicU64,
    /// Blocks read from the disk's own layer.
    pub from_own: AtomicU64,
    /// Blocks that were zeros.
    pub zeros: AtomicU64,
    /// Blocks written.
    pub written: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Bytes that were written to the files of layers that were sealed since, while they were open.
    pub host_sealed: AtomicU64,
}

/// A disk of the store.
pub struct CowDisk {
    /// Changes while a request holds `top` only if it grows.
    size: atomic::AtomicU64,
    top: RwLock<Top>,
    /// Its users may only read it, whether or not it has a layer of its own.
    for_reading: bool,
    /// [`CowDisk::close`] was called.
    closed: atomic::AtomicBool,
    quota: Mutex<Option<Quota>>,
    /// Who writes more than the quota allows is kept waiting.
    waits: atomic::AtomicBool,
    /// A write found that its layer is filling: told without asking the layer, which would take a lock.
    filling: AtomicBool,
    counters: Counters,
    stream: Stream,
    /// What seals left to be given back to the host: layers, and slots of each.
    idle: Mutex<Vec<(Id, IdleSlots)>>,
}

/// Slots that a sealed layer does not use: the first, and how many.
pub type IdleSlots = Vec<(u32, u32)>;

/// Where the next blocks are, as the disk sees it.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Own(Slot, u32),
    OwnZero,
    Below(Place),
}

impl At {
    /// Does a block at `other` directly continue one at `self` that is `n` blocks long?
    fn continued_by(self, other: At, n: usize) -> bool {
        match (self, other) {
            (At::Own(a, _), At::Own(b, _)) => a.0 as usize + n == b.0 as usize,
            (At::OwnZero, At::OwnZero) => true,
            (At::Below(Place::Base), At::Below(Place::Base)) => true,
            (At::Below(Place::Zero { depth: a }), At::Below(Place::Zero { depth: b })) => a == b,
            (
                At::Below(Place::Slot {
                    depth: a, slot: s, ..
                }),
                At::Below(Place::Slot {
                    depth: b, slot: t, ..
                }),
            ) => a == b && s.0 as usize + n == t.0 as usize,
            _ => false,
        }
    }
    fn sum(self) -> u32 {
        match self {
            At::Own(_, sum) | At::Below(Place::Slot { sum, .. }) => sum,
            _ => 0,
        }
    }
}

impl CowDisk {
    /// A disk that writes into `layer`, over `chain`.
    pub fn writable(layer: Layer, chain: Arc<Chain>) -> CowDisk {
        layer.lies_over(chain.clone());
        CowDisk::of(
            layer.size(),
            Top {
                layer: Some(layer),
                chain,
            },
        )
    }
    /// A chain as a disk that can only be read.
    pub fn read_only(chain: Arc<Chain>) -> CowDisk {
        CowDisk {
            for_reading: true,
            ..CowDisk::of(chain.size(), Top { layer: None, chain })
        }
    }
    fn of(size: u64, top: Top) -> CowDisk {
        CowDisk {
            size: atomic::AtomicU64::new(size),
            top: RwLock::new(top),
            for_reading: false,
            closed: atomic::AtomicBool::new(false),
            quota: Mutex::new(None),
            waits: atomic::AtomicBool::new(false),
            filling: AtomicBool::new(false),
            counters: Counters::default(),
            stream: Stream::default(),
            idle: Mutex::default(),
        }
    }
    /// What was read and written so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
    /// Blocks with data in the disk's own layer, and blocks it records as zeros.
    pub fn private_blocks(&self) -> (u64, u64) {
        self.top.read().layer.as_ref().map_or((0, 0), Layer::counts)
    }
    /// What lies below its own layer; of a disk that can only be read, all it shows.
    pub fn chain(&self) -> Arc<Chain> {
        self.top.read().chain.clone()
    }
    /// The header of its own layer, if it is open for writing, and the chain below it.
    pub fn stands_on(&self) -> (Option<Header>, Arc<Chain>) {
        let top = self.top.read();
        let own = top.layer.as_ref().map(|layer| *layer.header());
        (own, top.chain.clone())
    }
    /// Goes on over `chain` in the place of `now`, which shows the same: its files were replaced by others. Requests wait for a moment. Nothing is done,
    /// and that is said, if it does not stand on `now` any more.
    pub fn rechain(&self, now: &Arc<Chain>, chain: Arc<Chain>) -> bool {
        let mut lower = None;
        let old = {
            let mut top = self.top.write();
            if !Arc::ptr_eq(&top.chain, now) {
                return false;
            }
            if let Some(layer) = &top.layer {
                // What counts below it may have become less.
                self.limit(layer, &chain);
                layer.lies_over(chain.clone());
                lower = layer.lower();
            }
            std::mem::replace(&mut top.chain, chain)
        };
        // Not under the lock: the last user closes the files.
        drop(old);
        if let Some(lower) = lower {
            lower.look_again();
        }
        true
    }
    /// The layer that it writes into, or the topmost that it shows.
    pub fn top_layer(&self) -> Option<Id> {
        let top = self.top.read();
        let own = top.layer.as_ref().map(Layer::id);
        own.or_else(|| top.chain.layers().first().map(|layer| layer.id()))
    }
    /// Gives freed space back to the host; for a housekeeping thread.
    pub fn maintain(&self) -> Result<()> {
        let top = self.top.read();
        let Some(layer) = &top.layer else {
            return Ok(());
        };
        let lower = layer.lower_part();
        // Not under the lock: whoever waits for it holds up all requests.
        drop(top);
        if let Some((lower, stays)) = lower {
            lower.expire(stays);
        }
        let top = self.top.read();
        top.layer.as_ref().map_or(Ok(()), Layer::maintain)
    }
    /// What was said of its layer in the store when it was opened and is not durable yet: the first flush would wait for that.
    pub fn unsettled(&self) -> Option<Arc<Unsettled>> {
        self.top.read().layer.as_ref().map(Layer::unsettled)
    }
    /// Makes durable what it rests on: its name, and that it was opened.
    pub fn settle(&self) -> Result<()> {
        self.unsettled()
            .map_or(Ok(()), |unsettled| unsettled.settle())
    }
    /// Empties the journal into the block map: what a reopening would have to replay.
    pub fn checkpoint(&self) -> Result<()> {
        self.top
            .read()
            .layer
            .as_ref()
            .map_or(Ok(()), Layer::checkpoint_now)
    }
    /// Quiesces the disk, seals its layer and goes on in what `next` makes of the sealed file: a new layer and the chain below
    /// it, for which it gets the memory of the volatile log too. `next` is called between the seal and the first request that goes on; if it fails, the disk accepts nothing more until it is
    /// reopened (its contents are safe in the sealed layer).
    pub fn seal(
        &self,
        name: Option<&str>,
        next: impl FnOnce(Arc<dyn File>, Arc<SharedMemory>) -> Result<(Layer, Arc<Chain>)>,
    ) -> Result<()> {
        // Most of the dirty data goes out while requests still run.
        self.flush_ahead()?;
        let mut top = self.top.write();
        let Some(layer) = &top.layer else {
            return Err(read_only());
        };
        self.seal_layer(layer, name)?;
        let cost = layer.stats().host_since_opened;
        self.counters.host_sealed.fetch_add(cost, Relaxed);
        let (layer, chain) = next(layer.file().clone(), layer.volatile().clone())?;
        self.go_on_in(&mut top, layer, chain);
        Ok(())
    }
    pub(super) fn seal_layer(&self, layer: &Layer, name: Option<&str>) -> Result<()> {
        let idle = layer.seal_at_once(name)?;
        if !idle.is_empty() {
            self.idle.lock().push((layer.id(), idle));
        }
        Ok(())
    }
    /// What the layers that were sealed since the last call do not use, and was not given back to the host while requests waited.
    pub fn take_idle(&self) -> Vec<(Id, IdleSlots)> {
        std::mem::take(&mut self.idle.lock())
    }
    /// Flushes, checkpoints and closes. Requests that come later are refused.
    pub fn close(&self) -> Result<()> {
        let top = self.top.write();
        self.closed.store(true, SeqCst);
        match &top.layer {
            Some(layer) => layer.close(State::Clean, None),
            None => Ok(()),
        }
    }

    /// Flushes, checkpoints, and seals the disk's layer for ever, which calls itself `name` from then on.
    pub fn close_sealed(&self, name: &str) -> Result<()> {
        let top = self.top.write();
        match &top.layer {
            Some(layer) => layer.close(State::Sealed, Some(name)),
            None => Err(read_only()),
        }
    }

    /// The layer into which its users write.
    fn layer_to_write<'t>(&self, top: &'t Top) -> Result<&'t Layer> {
        let layer = top.layer.as_ref().filter(|_| !self.for_reading);
        layer.ok_or_else(read_only)
    }

    /// After something was written.
    fn note_filling(&self, layer: &Layer) {
        if layer.is_filling() {
            self.filling.store(true, Relaxed);
        }
    }

    /// Is it inside? The caller holds `top`: else the disk may become smaller in between.
    fn check(&self, at: u64, len: u64) -> Result<()> {
        let size = self.size.load(SeqCst);
        if at.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Invalid,
            format!("{len} bytes at {at} are outside the disk of {size} bytes"),
        ))
    }

    /// Where at most `N` blocks of one region are. The caller holds a guard of the layer.
    fn locate<const N: usize>(
        top: &Top,
        region: Region,
        index: usize,
        out: &mut [At],
    ) -> Result<()> {
        let n = out.len();
        let mut own = [Pointer::Absent; N];
        if let Some(layer) = &top.layer {
            layer.lookup(region, index, &mut own[..n])?;
        }
        let mut below = [Place::Base; N];
        if own[..n].contains(&Pointer::Absent) {
            top.chain.places(region, index, &mut below[..n])?;
        }
        for i in 0..n {
            out[i] = match own[i] {
                Pointer::Absent => At::Below(below[i]),
                Pointer::Zero => At::OwnZero,
                Pointer::Data { slot, sum } => At::Own(slot, sum),
            };
        }
        Ok(())
    }

    /// Reads neighbouring blocks that begin at `place`.
    fn fetch(&self, top: &Top, place: At, sums: &[u32], lba: Lba, buf: &mut [u8]) -> Result<()> {
        let counter = match place {
            At::Own(slot, _) => {
                // A layer is there: its pointer was found.
                if let Some(layer) = &top.layer {
                    layer.read_blocks(slot, sums, lba, buf)?;
                }
                &self.counters.from_own
            }
            At::OwnZero => {
                buf.fill(0);
                &self.counters.zeros
            }
            At::Below(place) => {
                top.chain.read_blocks(place, sums, lba, buf)?;
                match place {
                    Place::Base => &self.counters.from_base,
                    Place::Zero { .. } => &self.counters.zeros,
                    Place::Slot { .. } => &self.counters.from_sealed,
                }
            }
        };
        counter.fetch_add(sums.len() as u64, Relaxed);
        Ok(())
    }

    /// Reads whole blocks.
    fn read_whole(&self, top: &Top, lba: Lba, buf: &mut [u8]) -> Result<()> {
        let total = buf.len() / BLOCK_SIZE;
        let mut done = 0;
        while done < total {
            let first = Lba(lba.0 + done as u32);
            let n = (REGION_BLOCKS - first.index()).min(total - done);
            let part = &mut buf[done * BLOCK_SIZE..(done + n) * BLOCK_SIZE];
            // To clear the tables of a whole region would cost a small read more than its checksum.
            match n {
                1 => self.read_region::<1>(top, first, part)?,
                2..=32 => self.read_region::<32>(top, first, part)?,
                _ => self.read_region::<REGION_BLOCKS>(top, first, part)?,
            }
            done += n;
        }
        Ok(())
    }

    /// Reads at most `N` whole blocks of one region.
    fn read_region<const N: usize>(&self, top: &Top, first: Lba, buf: &mut [u8]) -> Result<()> {
        let n = buf.len() / BLOCK_SIZE;
        let mut places = [At::OwnZero; N];
        let mut sums = [0u32; N];
        // The guard is taken before the lookup and held until the data is copied.
        let _guard = top.layer.as_ref().map(Layer::enter);
        Self::locate::<N>(top, first.region(), first.index(), &mut places[..n])?;
        let mut i = 0;
        while i < n {
            let start = places[i];
            let mut len = 1;
            sums[0] = start.sum();
            while i + len < n && start.continued_by(places[i + len], len) {
                sums[len] = places[i + len].sum();
                len += 1;
            }
            let part = &mut buf[i * BLOCK_SIZE..(i + len) * BLOCK_SIZE];
            let at = Lba(first.0 + i as u32);
            self.fetch(top, start, &sums[..len], at, part)?;
            i += len;
        }
        Ok(())
    }

    /// Begins to read what a sequential reader will ask for next. Damage is met when it is read.
    fn read_ahead(&self, top: &Top, range: Range<u64>) {
        let mut cold = false;
        self.in_files::<REGION_BLOCKS>(top, range, |file, at, len| {
            // What is in memory at the beginning is taken to be there as a whole.
            cold = cold || !file.is_cached(at);
            if cold {
                file.prefetch(at, len);
            }
            cold
        });
    }

    /// Tells where the blocks of a range stand, stretch by stretch, `N` blocks of a region at a time, until `each` has enough (`false`), or a block map cannot be read.
    fn in_files<const N: usize>(
        &self,
        top: &Top,
        range: Range<u64>,
        mut each: impl FnMut(&dyn File, u64, u64) -> bool,
    ) {
        let end = range.end.min(self.size.load(SeqCst)).div_ceil(BLOCK);
        let mut from = range.start / BLOCK;
        let mut places = [At::OwnZero; N];
        while from < end {
            // Within the disk, and so a number of a block.
            let next = Lba(from as u32);
            let n = (REGION_BLOCKS - next.index())
                .min((end - from) as usize)
                .min(N);
            let _guard = top.layer.as_ref().map(Layer::enter);
            if Self::locate::<N>(top, next.region(), next.index(), &mut places[..n]).is_err() {
                return;
            }
            let mut i = 0;
            while i < n {
                let mut len = 1;
                while i + len < n && places[i].continued_by(places[i + len], len) {
                    len += 1;
                }
                let lba = Lba(next.0 + i as u32);
                let there = match places[i] {
                    At::Own(slot, _) => top.layer.as_ref().map(|l| (l.file(), slot.at())),
                    At::OwnZero => None,
                    At::Below(place) => top.chain.file_of(place, lba),
                };
                if let Some((file, at)) = there
                    && !each(&**file, at, len as u64 * BLOCK)
                {
                    return;
                }
                i += len;
            }
            from += n as u64;
        }
    }

    /// Replaces part of one block: read, merge, write as a whole, and publish only if nobody changed the block meanwhile.
    fn write_part(
        &self,
        top: &Top,
        layer: &Layer,
        lba: Lba,
        offset: usize,
        len: usize,
        data: Option<&[u8]>,
    ) -> Result<()> {
        let mut block = [0u8; BLOCK_SIZE];
        loop {
            // Held until after publishing: the pointer compared below must not return in another life.
            let _guard = layer.enter();
            let mut place = [At::OwnZero];
            Self::locate::<1>(top, lba.region(), lba.index(), &mut place)?;
            // Read from the very place that is compared below, not from where the block may be by now.
            self.fetch(top, place[0], &[place[0].sum()], lba, &mut block)?;
            let before = match place[0] {
                At::Own(slot, sum) => Pointer::Data { slot, sum },
                At::OwnZero => Pointer::Zero,
                At::Below(_) => Pointer::Absent,
            };
            match data {
                Some(data) => block[offset..offset + len].copy_from_slice(data),
                // What is zeros already need not be written, wherever it comes from.
                None if block[offset..offset + len].iter().all(|&b| b == 0) => {
                    return layer.check_poison();
                }
                None => block[offset..offset + len].fill(0),
            }
            let zero = is_zero(&block);
            if !zero && layer.is_limited() {
                // Where it will be is not known yet; that it will be somewhere is.
                let some = Pointer::Data {
                    slot: Slot(0),
                    sum: 0,
                };
                layer.ask_room(lba, &[some])?;
            }
            let taken = layer.take(1, u32::from(!zero))?;
            let pointer = if zero {
                Pointer::Zero
            } else {
                if let Err(e) = layer.write_slots(&taken, 0, &block) {
                    layer.not_written(taken);
                    return Err(e);
                }
                let slot = Slot(taken.extents.first().map_or(0, |e| e.0));
                Pointer::Data {
                    slot,
                    sum: format::crc(&block),
                }
            };
            if layer.publish_if(lba, pointer, before, taken)? {
                return Ok(());
            }
        }
    }

    /// Writes whole blocks, at most [`PIECE`]: the parent is never read.
    fn write_whole(&self, layer: &Layer, lba: Lba, data: &[u8]) -> Result<()> {
        // As for reads: tables of the size of the request.
        match data.len() / BLOCK_SIZE {
            1 => self.write_blocks::<1>(layer, lba, data),
            2..=32 => self.write_blocks::<32>(layer, lba, data),
            _ => self.write_blocks::<PIECE>(layer, lba, data),
        }
    }

    /// Writes at most `N` whole blocks.
    fn write_blocks<const N: usize>(&self, layer: &Layer, lba: Lba, data: &[u8]) -> Result<()> {
        let n = data.len() / BLOCK_SIZE;
        let mut table = [Pointer::Zero; N];
        let pointers = &mut table[..n];
        let mut slots = 0;
        for (pointer, block) in pointers.iter_mut().zip(data.chunks_exact(BLOCK_SIZE)) {
            if !is_zero(block) {
                // Its slot is known once all are counted.
                *pointer = Pointer::Data {
                    slot: Slot(0),
                    sum: format::crc(block),
                };
                slots += 1;
            }
        }
        if slots > 0 && layer.is_limited() {
            let _guard = layer.enter();
            layer.ask_room(lba, pointers)?;
        }
        let taken = layer.take(n as u64, slots)?;
        let free = taken
            .extents
            .iter()
            .flat_map(|(start, len)| start..start + len);
        let filled = pointers.iter_mut().filter(|p| **p != Pointer::Zero);
        for (pointer, next) in filled.zip(free) {
            if let Pointer::Data { slot, .. } = pointer {
                *slot = Slot(next);
            }
        }
        if let Err(e) = write_data(layer, &taken, pointers, data) {
            layer.not_written(taken);
            return Err(e);
        }
        layer.publish(lba, pointers, taken)
    }
}

/// Writes the blocks that are not zeros into the slots that were taken for them: each row of them at once, from where it stands.
fn write_data(layer: &Layer, taken: &Taken, pointers: &[Pointer], data: &[u8]) -> Result<()> {
    let (mut at, mut done) = (0, 0);
    for row in pointers.chunk_by(|a, b| (*a == Pointer::Zero) == (*b == Pointer::Zero)) {
        let end = at + row.len() * BLOCK_SIZE;
        if row[0] != Pointer::Zero {
            layer.write_slots(taken, done, &data[at..end])?;
            done += row.len() as u32;
        }
        at = end;
    }
    Ok(())
}

/// Does `f`, and again if the host disk was full and the layer gave something back. What `f` had done when it found no room must be undone, or nothing: else what it
/// does again would be more history, which would be given up for it, without end.
fn with_room<T>(layer: &Layer, f: impl Fn() -> Result<T>) -> Result<T> {
    let is_full = |done: &Result<T>| {
        let e = done.as_ref().err();
        e.is_some_and(|e| e.kind() == Kind::NoSpace && !e.is_of_quota())
    };
    let mut done = f();
    for _ in 0..ROUNDS {
        if !is_full(&done) {
            break;
        }
        // Again and again only as long as there is a history that can go.
        let more = layer.make_room()?;
        done = f();
        if !more {
            break;
        }
    }
    done
}

/// Makes `count` blocks from `lba` zero. Where room has to be made it goes on where it was.
fn zero_with_room(layer: &Layer, lba: Lba, count: u64) -> Result<()> {
    let mut done = 0;
    while done < count {
        let (at, left) = (Lba(lba.0 + done as u32), count - done);
        done += with_room(layer, || layer.zero_some(at, left))?;
    }
    Ok(())
}

/// Is a whole block zeros? Real data fails at its first bytes.
fn is_zero(block: &[u8]) -> bool {
    // Eight bytes at a time; the compiler makes wider ones of it.
    block
        .chunks_exact(64)
        .all(|c| c.iter().fold(0u8, |a, b| a | b) == 0)
}

fn read_only() -> Error {
    Error::new(Kind::ReadOnly, "the disk can only be read")
        .hint("snapshots and images never change; `forkdisk fork` makes a writable disk from one")
}

impl Disk for CowDisk {
    fn size(&self) -> u64 {
        self.size.load(SeqCst)
    }
    fn allocated(&self) -> u64 {
        self.private_blocks().0 * BLOCK + self.history_bytes()
    }
    fn read_only(&self) -> bool {
        self.for_reading
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let top = self.top.read();
        self.check(at, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        if let Some(range) = self.stream.read(at, buf.len() as u64) {
            self.read_ahead(&top, range);
        }
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let offset = (at % BLOCK) as usize;
            let n = if offset != 0 || rest.len() < BLOCK_SIZE {
                // Part of a block: the sum covers all of it.
                let n = (BLOCK_SIZE - offset).min(rest.len());
                let mut block = [0u8; BLOCK_SIZE];
                self.read_whole(&top, Lba::of(at), &mut block)?;
                rest[..n].copy_from_slice(&block[offset..offset + n]);
                n
            } else {
                let n = rest.len() / BLOCK_SIZE * BLOCK_SIZE;
                self.read_whole(&top, Lba::of(at), &mut rest[..n])?;
                n
            };
            at += n as u64;
            rest = &mut rest[n..];
        }
        Ok(())
    }
    fn begin_read(&self, at: u64, len: u64) -> bool {
        let mut begun = false;
        let top = self.top.read();
        self.in_files::<32>(&top, at..at.saturating_add(len), |file, at, len| {
            if !file.is_cached(at) {
                file.prefetch(at, len);
                begun = true;
            }
            true
        });
        begun
    }
    fn write(&self, buf: &[u8], at: u64) -> Result<()> {
        let top = self.top.read();
        self.check(at, buf.len() as u64)?;
        let layer = self.layer_to_write(&top)?;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let offset = (at % BLOCK) as usize;
            let n = if offset != 0 || rest.len() < BLOCK_SIZE {
                let n = (BLOCK_SIZE - offset).min(rest.len());
                with_room(layer, || {
                    self.write_part(&top, layer, Lba::of(at), offset, n, Some(&rest[..n]))
                })
                .map_err(|e| self.refused(e))?;
                n
            } else {
                let mut n = (rest.len() / BLOCK_SIZE).min(PIECE);
                if layer.is_limited() {
                    // Region by region: of each all is published or nothing.
                    n = n.min(REGION_BLOCKS - Lba::of(at).index());
                }
                let n = n * BLOCK_SIZE;
                with_room(layer, || self.write_whole(layer, Lba::of(at), &rest[..n]))
                    .map_err(|e| self.refused(e))?;
                n
            };
            at += n as u64;
            rest = &rest[n..];
        }
        self.note_filling(layer);
        layer.written_by_user(buf.len() as u64);
        self.counters
            .written
            .fetch_add(crate::units::blocks(buf.len() as u64), Relaxed);
        Ok(())
    }
    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let top = self.top.read();
        self.check(at, len)?;
        let layer = self.layer_to_write(&top)?;
        let [whole, head, tail] = parts(at, len);
        // The whole blocks first: they need no room, and may give the room that the parts need.
        if whole.1 > 0 {
            zero_with_room(layer, Lba::of(whole.0), whole.1 / BLOCK)?;
        }
        let mut done = Ok(());
        for (at, len) in [head, tail] {
            let (offset, len) = ((at % BLOCK) as usize, len as usize);
            if len > 0 {
                let zeroed = with_room(layer, || {
                    self.write_part(&top, layer, Lba::of(at), offset, len, None)
                });
                // Where one finds no room the other may need none.
                done = done.and(zeroed.map_err(|e| self.refused(e)));
            }
        }
        self.note_filling(layer);
        done
    }
    fn flush(&self) -> Result<()> {
        let top = self.top.read();
        self.counters.flushes.fetch_add(1, Relaxed);
        match &top.layer {
            Some(layer) => layer.flush(),
            None => Ok(()),
        }
    }
    fn flush_first(&self) -> Result<()> {
        let top = self.top.read();
        self.counters.flushes.fetch_add(1, Relaxed);
        match &top.layer {
            Some(layer) => layer.flush_first().map(|_| ()),
            None => Ok(()),
        }
    }
    fn is_filling(&self) -> bool {
        self.filling.load(Relaxed)
    }
    fn tidy(&self) {
        // Before: else what is found meanwhile may be forgotten.
        self.filling.store(false, Relaxed);
        let top = self.top.read();
        if let Some(layer) = &top.layer
            && let Err(e) = layer.tidy()
            && e.kind() != Kind::Poisoned
        {
            // The next request says so, if it is of any consequence.
            tracing::warn!(layer = %layer.id(), "after it was written to: {e}");
        }
    }
    fn plain_file(&self) -> Result<OwnedFd> {
        let no = |why: String| Error::new(Kind::Unsupported, why);
        let top = self.top.read();
        if top.layer.is_some() || !top.chain.layers().is_empty() {
            return Err(no("its blocks lie in layers, not in one file".into())
                .hint("only an image that was imported can be read past the daemon"));
        }
        let base = top.chain.base();
        if base.len() != self.size.load(SeqCst) {
            return Err(no(format!(
                "the image has {} bytes, which is no multiple of {BLOCK}",
                base.len()
            ))
            .hint("attach it without --passthrough, or import it again with its end filled up with zeros (`truncate -s %4096`)"));
        }
        let fd = base.file().fd();
        let fd = fd.ok_or_else(|| no("the image is no file of the host".into()))?;
        fd.try_clone_to_owned()
            .map_err(|e| Error::io("open", base.file().path(), &e))
    }
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let (found, base) = {
            let top = self.top.read();
            self.check(at, len)?;
            (Self::mapped(&top, at, len)?, top.chain.base().clone())
        };
        // Not under the lock: the host is asked, and a seal would wait for its answer, and all others for the seal.
        show_holes(found, &base)
    }
}

impl CowDisk {
    /// What the block maps say of a range; what is of the base may be a hole of it.
    fn mapped(top: &Top, at: u64, len: u64) -> Result<Vec<Extent>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let own = u32::from(top.layer.is_some());
        let base_end = crate::units::blocks(top.chain.base().len()) * BLOCK;
        let first = at / BLOCK;
        let last = (at + len).div_ceil(BLOCK);
        let mut out: Vec<Extent> = Vec::new();
        let mut places = [At::OwnZero; REGION_BLOCKS];
        let mut block = first;
        // How many regions in a row no layer below says anything of, and from where up to where that is known without a look at each.
        let (mut row, mut clear, mut many) = (0, 0..0, MANY_CLEAR);
        while block < last {
            let lba = Lba(block as u32);
            let n = ((REGION_BLOCKS - lba.index()) as u64).min(last - block) as usize;
            let nothing = top
                .layer
                .as_ref()
                .is_none_or(|l| l.knows_nothing(lba.region()));
            let region = lba.region();
            if nothing && (clear.contains(&region.0) || top.chain.is_base(region)?) {
                // Most of a large disk: no need to look at each block.
                row += 1;
                if row >= many && !clear.contains(&region.0) {
                    // What is damaged is met by whoever reads it.
                    clear = match top.chain.next_touched(region) {
                        Ok(next) => region.0..next.map_or(u32::MAX, |next| next.0),
                        Err(_) => 0..0,
                    };
                    // Where little is gained it is asked less often.
                    if clear.len() < 64 {
                        many = u32::saturating_mul(many, 2);
                    }
                    row = 0;
                }
                let start = block * BLOCK;
                let end = (block + n as u64) * BLOCK;
                let cut = base_end.clamp(start, end);
                for (from, to, source) in [(start, cut, Source::Base), (cut, end, Source::Absent)] {
                    match out.last_mut() {
                        _ if from == to => {}
                        Some(e) if e.from == source => e.len += to - from,
                        _ => out.push(Extent {
                            at: from,
                            len: to - from,
                            from: source,
                        }),
                    }
                }
                block += n as u64;
                continue;
            }
            row = 0;
            let _guard = top.layer.as_ref().map(Layer::enter);
            Self::locate::<REGION_BLOCKS>(top, lba.region(), lba.index(), &mut places[..n])?;
            for (i, place) in places[..n].iter().enumerate() {
                let at = (block + i as u64) * BLOCK;
                let from = match *place {
                    At::Own(slot, _) => Source::Layer { depth: 0, slot },
                    At::OwnZero => Source::Zero { depth: 0 },
                    At::Below(Place::Zero { depth }) => Source::Zero {
                        depth: own + u32::from(depth),
                    },
                    At::Below(Place::Slot { depth, slot, .. }) => Source::Layer {
                        depth: own + u32::from(depth),
                        slot,
                    },
                    At::Below(Place::Base) if at < base_end => Source::Base,
                    At::Below(Place::Base) => Source::Absent,
                };
                match out.last_mut() {
                    Some(e) if continues(e, from) => e.len += BLOCK,
                    _ => out.push(Extent {
                        at,
                        len: BLOCK,
                        from,
                    }),
                }
            }
            block += n as u64;
        }
        Ok(out)
    }
}

/// Tells data of the base from its holes.
fn show_holes(extents: Vec<Extent>, base: &Base) -> Result<Vec<Extent>> {
    let of_base = |e: &&Extent| e.from == Source::Base;
    let (Some(first), Some(last)) = (
        extents.iter().find(of_base),
        extents.iter().rev().find(of_base),
    ) else {
        return Ok(extents);
    };
    // Asked once, not for each extent.
    let end = (last.at + last.len).min(base.len());
    let ranges = base.data_ranges(first.at, end.saturating_sub(first.at))?;
    let mut ranges = ranges
        .into_iter()
        .map(|(at, len)| (at / BLOCK * BLOCK, (at + len).next_multiple_of(BLOCK)))
        .peekable();
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        if extent.from != Source::Base {
            out.push(extent);
            continue;
        }
        let (mut at, end) = (extent.at, extent.at + extent.len);
        while at < end {
            while ranges.next_if(|&(_, data_end)| data_end <= at).is_some() {}
            let (from, next) = match ranges.peek() {
                Some(&(start, data_end)) if start <= at => (Source::Base, data_end.min(end)),
                Some(&(start, _)) => (Source::Hole, start.min(end)),
                None => (Source::Hole, end),
            };
            match out.last_mut() {
                // Two ranges may share a block, or touch.
                Some(e) if e.from == from && e.at + e.len == at => e.len += next - at,
                _ => out.push(Extent {
                    at,
                    len: next - at,
                    from,
                }),
            }
            at = next;
        }
    }
    Ok(out)
}

/// Does a block from `from` lengthen the extent?
fn continues(extent: &Extent, from: Source) -> bool {
    match (extent.from, from) {
        (Source::Layer { depth: a, slot: s }, Source::Layer { depth: b, slot: t }) => {
            a == b && u64::from(s.0) + extent.len / BLOCK == u64::from(t.0)
        }
        (a, b) => a == b,
    }
}
