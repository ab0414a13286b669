//! One layer file: a block map and private blocks (FORMAT.md, section 3).
//!
//! [`ReadLayer`] reads a layer and never changes it; [`Layer`] is the one writer of a layer that is not sealed.
//! Neither knows what lies below: an absent block is the chain's business.

mod early;
pub mod history;
pub mod prune;
pub mod quiesce;
pub mod recover;
pub mod refer;
pub mod rewrite;
pub mod space;
pub mod unsettled;
pub mod volatile;
pub mod writable;
mod written;

pub use writable::{Layer, LayerStats};

use crate::error::{Error, Kind, Result};
use crate::format::{
    self, Header, Pointer, RunRef, STATE_CLEAN, STATE_SEALED, STATE_WRITABLE, Step, Superblock,
};
use crate::io::{File, Mapping};
use crate::map::run::Run;
use crate::map::undo::Undo;
use crate::map::{Memtable, RegionMap};
use crate::units::{BLOCK_SIZE, Id, Lba, Region, Slot};
use std::sync::Arc;

/// A run, mapped from its layer file.
pub type MappedRun = Run<Mapping>;

/// State of a layer file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Open for writing, or not closed cleanly.
    Writable,
    /// Closed.
    Clean,
    /// Immutable.
    Sealed,
}

impl State {
    /// The word used in JSON.
    pub fn word(self) -> &'static str {
        match self {
            State::Writable => "writable",
            State::Clean => "clean",
            State::Sealed => "sealed",
        }
    }
    /// What a superblock says.
    pub fn of(superblock: &Superblock) -> State {
        match superblock.state.get() {
            STATE_SEALED => State::Sealed,
            STATE_CLEAN => State::Clean,
            _ => State::Writable,
        }
    }
    fn number(self) -> u32 {
        match self {
            State::Writable => STATE_WRITABLE,
            State::Clean => STATE_CLEAN,
            State::Sealed => STATE_SEALED,
        }
    }
}

/// Reads the header of a layer file.
pub fn read_header(file: &dyn File) -> Result<Header> {
    let mut slot = vec![0; BLOCK_SIZE];
    let len = file.len()?;
    if len < BLOCK_SIZE as u64 {
        return Err(Error::new(
            Kind::Corrupt,
            format!("this is no layer file: it has only {len} bytes"),
        )
        .path(file.path())
        .hint("remove it, or restore it from a backup"));
    }
    file.read_at(&mut slot, 0)?;
    Header::decode(&slot).map_err(|e| e.path(file.path()))
}

/// Writes a new layer: its header, not yet durable.
pub fn create(file: &dyn File, header: &Header) -> Result<()> {
    use zerocopy::IntoBytes;
    file.keep_in_place();
    file.write_at(header.as_bytes(), 0)
}

/// Maps and opens the runs that a superblock names, newest first.
fn open_runs(file: &dyn File, layer: &Id, refs: &[RunRef]) -> Result<Vec<Arc<MappedRun>>> {
    let len = file.len()?;
    refs.iter()
        .map(|r| {
            let at = Slot(r.slot.get()).at();
            if at + r.len.get() > len {
                return Err(Error::new(
                    Kind::Corrupt,
                    "the layer file is cut: a block map lies past its end",
                )
                .offset(at)
                .layer(*layer)
                .path(file.path()));
            }
            let run = Run::open(file.map(at, r.len.get() as usize)?, *r, layer)
                .map_err(|e| e.path(file.path()))?;
            Ok(Arc::new(run))
        })
        .collect()
}

/// What the runs together say of a region.
fn region_of(runs: &[Arc<MappedRun>], region: Region) -> Result<RegionMap> {
    let mut map = RegionMap::new();
    for run in runs {
        if map.fill() {
            break;
        }
        if let Some(older) = run.region(region)? {
            map.underlay(&older);
        }
    }
    Ok(map)
}

/// Reads neighbouring slots into `buf` and checks each block against its sum; `lba` is where the first one belongs, for messages.
pub fn read_blocks(
    file: &dyn File,
    layer: &Id,
    slot: Slot,
    sums: &[u32],
    lba: Lba,
    buf: &mut [u8],
) -> Result<()> {
    debug_assert_eq!(buf.len(), sums.len() * BLOCK_SIZE);
    file.read_at(buf, slot.at())
        .map_err(|e| e.layer(*layer).block(lba))?;
    for (i, (block, &sum)) in buf.chunks_exact(BLOCK_SIZE).zip(sums).enumerate() {
        if format::crc(block) != sum {
            let at = slot.at() + (i * BLOCK_SIZE) as u64;
            return Err(Error::new(Kind::Corrupt, "data does not match its checksum")
                .block(Lba(lba.0 + i as u32))
                .offset(at)
                .layer(*layer)
                .path(file.path())
                .hint("`forkdisk check` shows what is damaged; other disks and snapshots that do not use this block are not affected"));
        }
    }
    Ok(())
}

/// A layer, for reading only. Of a sealed or clean one all is in the runs; of one that was not closed cleanly the committed part of the
/// journal is read into memory, and nothing is changed.
pub struct ReadLayer {
    id: Id,
    header: Header,
    superblock: Superblock,
    file: Arc<dyn File>,
    runs: Vec<Arc<MappedRun>>,
    journal: Memtable,
    /// What the commits of the journal replaced, as far as it is known.
    steps: Vec<Step>,
    /// The last commit of the journal of which that is not known.
    cut: Option<(u64, u64)>,
    /// It shows a point of its history: what it said then of the blocks that changed since.
    past: Option<Undo>,
    data_blocks: u64,
    zero_blocks: u64,
    dropped: bool,
}

impl ReadLayer {
    /// Opens a layer file. The caller has locked it, or knows that it is sealed.
    pub fn open(file: Arc<dyn File>) -> Result<ReadLayer> {
        let header = read_header(&*file)?;
        let id = Id(header.layer);
        let found = recover::superblock(&*file, &header)?;
        let superblock = found.superblock;
        let runs = open_runs(&*file, &id, superblock.run_refs())?;
        let mut layer = ReadLayer {
            id,
            header,
            data_blocks: superblock.data_blocks.get(),
            zero_blocks: superblock.zero_blocks.get(),
            superblock,
            file,
            runs,
            journal: Memtable::new(),
            steps: Vec::new(),
            cut: None,
            past: None,
            dropped: false,
        };
        if layer.state() == State::Writable {
            let replay = recover::replay(&*layer.file, &layer.superblock, &layer.runs)?;
            layer.dropped = replay.dropped.is_some();
            layer.journal = replay.memtable;
            (layer.steps, layer.cut) = (replay.steps, replay.cut);
            (layer.data_blocks, layer.zero_blocks) = (replay.data_blocks, replay.zero_blocks);
        }
        Ok(layer)
    }
    /// Was the last commit left out, because it lacks data?
    pub fn dropped(&self) -> bool {
        self.dropped
    }
    /// Its id.
    pub fn id(&self) -> Id {
        self.id
    }
    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }
    /// Its superblock as found.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }
    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.superblock.size.get()
    }
    /// Its state.
    pub fn state(&self) -> State {
        State::of(&self.superblock)
    }
    /// Its file.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.file
    }
    /// Its runs, newest first.
    pub fn runs(&self) -> &[Arc<MappedRun>] {
        &self.runs
    }
    /// Blocks with data of their own, and blocks it records as zeros.
    pub fn counts(&self) -> (u64, u64) {
        (self.data_blocks, self.zero_blocks)
    }
    /// What the layer says of a region.
    pub fn region(&self, region: Region) -> Result<RegionMap> {
        let tag = |e: Error| e.layer(self.id).path(self.file.path());
        let mut map = self.journal.region(region).unwrap_or_default();
        map.underlay(&region_of(&self.runs, region).map_err(tag)?);
        match &self.past {
            Some(undo) => Ok(self.before(undo, region, map)),
            None => Ok(map),
        }
    }
    /// The whole block map in order, from region `from` on: as it is now, also where the layer shows a point of its history.
    pub fn items(&self, from: Region) -> impl Iterator<Item = Result<crate::map::Item>> + '_ {
        let mut sources: Vec<crate::map::Items<'_>> = vec![self.journal.items_in(from, u32::MAX)];
        sources.extend(self.runs.iter().map(|r| r.items(from)));
        crate::map::merge(sources)
    }
    /// Reads neighbouring data blocks; see [`read_blocks`].
    pub fn read_blocks(&self, slot: Slot, sums: &[u32], lba: Lba, buf: &mut [u8]) -> Result<()> {
        read_blocks(&*self.file, &self.id, slot, sums, lba, buf)
    }
    /// What it says of one block.
    pub fn pointer(&self, lba: Lba) -> Result<Pointer> {
        Ok(self.region(lba.region())?.get(lba.index()))
    }
}
