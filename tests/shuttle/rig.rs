//! A small disk on the imaginary disk, whose every call is a point at which another thread may go on; and a model of what its threads wrote.

use crate::base::Base;
use crate::chain::{Budget, Chain};
use crate::disk::{CowDisk, Disk};
use crate::error::Result;
use crate::format::Header;
use crate::io::sim::{Policy, SimDisk};
use crate::io::{Access, Dir, File, Mapping};
use crate::layer::{self, Layer, ReadLayer, volatile};
use crate::map::Item;
use crate::sys::shared::SharedMemory;
use crate::units::{Id, REGION_BLOCKS, Region};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

pub const B: u64 = 4096;
/// Two regions.
pub const SIZE: u64 = 1024 * B;
/// Blocks of the base that are not zeros.
pub const BASE_BLOCKS: u64 = 4;
/// What the base holds.
pub const BASE: u8 = 0xBA;

/// The core's modules count with standard atomics here: only the disk's own steps are points of change.
type Here = AtomicU64;

/// A file each of whose calls another thread may come before.
struct Paused(Arc<dyn File>);

fn pause() {
    // Any access to a variable of the scheduler is one; a yield would tell PCT to put this thread last.
    shuttle::sync::atomic::AtomicBool::new(false).load(shuttle::sync::atomic::Ordering::SeqCst);
}

impl File for Paused {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        pause();
        self.0.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        pause();
        self.0.write_at(buf, at)
    }
    fn sync(&self) -> Result<()> {
        pause();
        let done = self.0.sync();
        // Durable, and not yet known to be.
        pause();
        done
    }
    fn len(&self) -> Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        pause();
        self.0.set_len(len)
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        pause();
        self.0.allocate(at, len)
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        pause();
        self.0.punch(at, len)
    }
    fn start_writeback(&self, at: u64, len: u64) {
        self.0.start_writeback(at, len);
    }
    fn prefetch(&self, at: u64, len: u64) {
        self.0.prefetch(at, len);
    }
    fn is_cached(&self, at: u64) -> bool {
        self.0.is_cached(at)
    }
    fn await_writeback(&self, at: u64, len: u64) {
        self.0.await_writeback(at, len);
    }
    fn forget_cached(&self, at: u64, len: u64) {
        self.0.forget_cached(at, len);
    }
    fn map(&self, at: u64, len: usize) -> Result<Mapping> {
        pause();
        self.0.map(at, len)
    }
    fn lock(&self, exclusive: bool) -> Result<()> {
        self.0.lock(exclusive)
    }
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.0.data_ranges(at, len)
    }
    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }
    fn path(&self) -> PathBuf {
        self.0.path()
    }
}

/// An imaginary disk with a base and layers on it.
pub struct World {
    pub sim: SimDisk,
    dir: Arc<dyn Dir>,
}

const BASE_ID: Id = Id([0xBA; 16]);

fn layer_id(n: u32) -> Id {
    Id([n as u8; 16])
}

impl World {
    /// With the base alone.
    pub fn new() -> World {
        static MADE: OnceLock<SimDisk> = OnceLock::new();
        let made = MADE.get_or_init(|| {
            let sim = SimDisk::new(0);
            let file = sim.root().open("base", Access::CreateNew).expect("a base");
            let image = vec![BASE; (BASE_BLOCKS * B) as usize];
            file.write_at(&image, 0).expect("write");
            file.set_len(SIZE).expect("length");
            file.sync().expect("sync");
            sim.root().sync().expect("sync");
            sim
        });
        World::of(made.crash_with(Policy::AllDone))
    }
    pub fn of(sim: SimDisk) -> World {
        let dir = sim.root();
        World { sim, dir }
    }
    fn file(&self, n: u32, access: Access) -> Arc<dyn File> {
        Arc::new(Paused(
            self.dir.open(&format!("l{n}"), access).expect("a layer"),
        ))
    }
    pub fn base(&self) -> Arc<Base> {
        let open = || Arc::new(Paused(self.dir.open("base", Access::Read).expect("base")));
        Arc::new(Base::open(BASE_ID, open(), SIZE, None, open()).expect("base"))
    }
    /// Makes layer `n` over layer `n - 1`; the first is over the base.
    pub fn create(&self, n: u32) {
        let file = self
            .dir
            .open(&format!("l{n}"), Access::CreateNew)
            .expect("a layer");
        let parent = if n == 1 { BASE_ID } else { layer_id(n - 1) };
        let header = Header::new(layer_id(n), parent, n > 1, n, SIZE, 0, "d");
        layer::create(&*file, &header).expect("create");
        file.sync().expect("sync");
        self.dir.sync().expect("sync");
    }
    pub fn layer(&self, n: u32) -> Layer {
        Layer::open(self.file(n, Access::Write)).unwrap_or_else(|e| panic!("layer {n}: {e:?}"))
    }
    /// The disk whose own layer is `n`, as of the death of the process that had it: also what was not flushed is there.
    pub fn resume(&self, n: u32, memory: Arc<SharedMemory>) -> CowDisk {
        let layer = Layer::resume(self.file(n, Access::Write), memory, None)
            .unwrap_or_else(|e| panic!("layer {n}: {e:?}"));
        CowDisk::writable(layer, self.chain(n - 1, &Budget::new(1 << 20)))
    }
    /// A new disk with one layer, whose volatile log outlives it.
    pub fn disk_on(&self, memory: Arc<SharedMemory>) -> CowDisk {
        self.create(1);
        let layer = Layer::open_on(self.file(1, Access::Write), memory, None).expect("a layer");
        CowDisk::writable(layer, self.chain(0, &Budget::new(1 << 20)))
    }
    pub fn read_layer(&self, n: u32) -> Arc<ReadLayer> {
        let layer = ReadLayer::open(self.file(n, Access::Read));
        Arc::new(layer.unwrap_or_else(|e| panic!("layer {n}: {e:?}")))
    }
    /// Sealed layers from `n` down to the base.
    pub fn chain(&self, n: u32, budget: &Arc<Budget>) -> Arc<Chain> {
        let layers = (1..=n).rev().map(|n| self.read_layer(n)).collect();
        Arc::new(Chain::new(layers, self.base(), budget.clone()))
    }
    /// The disk whose own layer is `n`; those below are sealed.
    pub fn open(&self, n: u32) -> CowDisk {
        CowDisk::writable(self.layer(n), self.chain(n - 1, &Budget::new(1 << 20)))
    }
    /// A new disk with one layer.
    pub fn disk(&self) -> CowDisk {
        self.create(1);
        self.open(1)
    }
    /// What the layer says of itself is so: counts, and no slot twice.
    pub fn audit(&self, n: u32) {
        let layer = self.read_layer(n);
        let mut slots = std::collections::BTreeSet::new();
        let (mut data, mut zeros) = (0u64, 0u64);
        for item in layer.items(Region(0)) {
            match item.expect("a block map") {
                Item::Region(_, map) => {
                    let (d, z) = map.counts();
                    data += d;
                    zeros += z;
                    for (_, pointer) in map.iter() {
                        if let crate::format::Pointer::Data { slot, .. } = pointer {
                            assert!(slots.insert(slot.0), "slot {} is used twice", slot.0);
                        }
                    }
                }
                Item::Zeros(_, regions) => zeros += u64::from(regions) * REGION_BLOCKS as u64,
            }
        }
        assert_eq!(layer.counts(), (data, zeros), "what the layer counts");
    }
}

/// Memory for a volatile log.
pub fn memory() -> Arc<SharedMemory> {
    volatile::private().expect("memory")
}

/// What a successor finds in `memory` if the process dies now.
pub fn left_in(memory: &SharedMemory) -> Arc<SharedMemory> {
    let copy = self::memory();
    // Of each area the head and more entries than any scenario makes.
    let mut bytes = [0; 16 << 10];
    for area in 0..2 {
        let at = area * (volatile::LEN / 2);
        memory.read(at, &mut bytes);
        copy.write(at, &bytes);
    }
    copy
}

pub fn block(disk: &dyn Disk, n: u64) -> Vec<u8> {
    let mut block = vec![0; B as usize];
    disk.read(&mut block, n * B).expect("read");
    block
}

/// Bytes of a version, all over.
pub fn bytes(version: u64, len: usize) -> Vec<u8> {
    version.to_le_bytes().repeat(len / 8)
}

/// The version that some bytes hold.
pub fn version(bytes: &[u8]) -> u64 {
    if bytes.iter().all(|b| *b == BASE) {
        return 0;
    }
    let first = bytes[..8].try_into().expect("eight bytes");
    assert!(bytes.chunks(8).all(|c| c == first), "torn");
    u64::from_le_bytes(first)
}

/// Writers of which each owns one half of each of the first blocks of the base, and writes rising versions into one after the other.
pub struct Model {
    begun: [Here; 2],
    done: [Here; 2],
    durable: [Here; 2],
    blocks: u64,
}

const HALF: usize = 2048;

impl Model {
    pub fn new(blocks: u64) -> Model {
        assert!(blocks <= BASE_BLOCKS);
        Model {
            begun: Default::default(),
            done: Default::default(),
            durable: Default::default(),
            blocks,
        }
    }
    /// The next write of one writer.
    pub fn write(&self, disk: &dyn Disk, writer: usize) -> Result<()> {
        let next = self.done[writer].load(SeqCst) + 1;
        self.begun[writer].store(next, SeqCst);
        let at = next % self.blocks * B + (writer * HALF) as u64;
        disk.write(&bytes(next, HALF), at)?;
        self.done[writer].store(next, SeqCst);
        Ok(())
    }
    pub fn flush(&self, disk: &dyn Disk) -> Result<()> {
        let now = self.done();
        disk.flush()?;
        self.promised(now);
        Ok(())
    }
    pub fn promised(&self, now: [u64; 2]) {
        for (durable, now) in self.durable.iter().zip(now) {
            durable.fetch_max(now, SeqCst);
        }
    }
    pub fn done(&self) -> [u64; 2] {
        [self.done[0].load(SeqCst), self.done[1].load(SeqCst)]
    }
    pub fn durable(&self) -> [u64; 2] {
        [self.durable[0].load(SeqCst), self.durable[1].load(SeqCst)]
    }
    fn halves(&self, disk: &dyn Disk, writer: usize) -> Vec<u64> {
        let half = writer * HALF..(writer + 1) * HALF;
        (0..self.blocks)
            .map(|n| version(&block(disk, n)[half.clone()]))
            .collect()
    }
    /// The last version that was written to each block when a writer's last write was `last`.
    fn expected(&self, last: u64) -> Vec<u64> {
        let newest = |n| (1..=last).rev().find(|v| v % self.blocks == n);
        (0..self.blocks).map(|n| newest(n).unwrap_or(0)).collect()
    }
    /// A reader while writers run: each half is at least what was done before, at most what is begun by now.
    pub fn check_bounds(&self, disk: &dyn Disk) {
        let low = self.done().map(|last| self.expected(last));
        for (writer, low) in low.iter().enumerate() {
            for (n, found) in self.halves(disk, writer).into_iter().enumerate() {
                let high = self.begun[writer].load(SeqCst);
                assert!(
                    (low[n]..=high).contains(&found),
                    "block {n}, half {writer}: {found} is not in {}..={high}",
                    low[n]
                );
            }
        }
    }
    /// What stands still (a snapshot, what is found after a crash) is of one moment: of each writer everything up to some write, and nothing
    /// after it; at least up to `low`.
    pub fn check_moment(&self, disk: &dyn Disk, low: [u64; 2]) {
        for (writer, low) in low.into_iter().enumerate() {
            let found = self.halves(disk, writer);
            let last = found.iter().max().copied().unwrap_or(0);
            let high = self.begun[writer].load(SeqCst);
            assert!(
                (low..=high).contains(&last),
                "half {writer}: {last} is not in {low}..={high}"
            );
            assert_eq!(found, self.expected(last), "half {writer}: a mixture");
        }
    }
}
