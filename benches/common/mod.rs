//! What the benches share: a store on a real directory, and measuring things that must be compared.
//!
//! A machine that does other work too is never the same twice. So things that are compared take turns, round by round, in changing order, and
//! what is told is the median of the ratios within a round.
#![allow(dead_code, missing_docs, reason = "each bench uses a part of it")]

use criterion::Criterion;
use forkdisk::chain::{Budget, Chain};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::Result;
use forkdisk::format::{DATA_START, Header};
use forkdisk::io::count::Counting;
use forkdisk::io::os::OsDir;
use forkdisk::io::{Access, Dir, File, Mapping};
use forkdisk::layer::{self, Layer, ReadLayer, State};
use forkdisk::store::{Below, Env, ImportMode, ImportSource, Quiet, Store};
use forkdisk::units::{BLOCK_SIZE, Id, Slot};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Measure, or only try whether everything runs (`cargo test --benches`)?
pub fn measuring() -> bool {
    std::env::args().any(|a| a == "--bench")
}

/// Does criterion keep or compare a baseline? Then only what criterion measures is of interest.
pub fn for_a_baseline() -> bool {
    std::env::args().any(|a| a.starts_with("--save-baseline") || a.starts_with("--baseline"))
}

/// Criterion as all benches use it: short, for there are many; the command line may ask for more.
pub fn config() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .sample_size(30)
        .nresamples(20_000)
        .configure_from_args()
}

/// `n` where something is measured, else 1.
pub fn rounds(n: usize) -> usize {
    if measuring() { n } else { 1 }
}

/// Deterministic random numbers (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// `n` numbers below `of`, each once.
    pub fn distinct(&mut self, n: usize, of: u64) -> Vec<u64> {
        let mut all: Vec<u64> = (0..of).collect();
        for i in 0..n {
            let j = i as u64 + self.below(of - i as u64);
            all.swap(i, j as usize);
        }
        all.truncate(n);
        all
    }
}

/// Bytes that no filesystem makes smaller.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut bytes = vec![0; len];
    bytes
        .chunks_exact_mut(8)
        .for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()));
    bytes
}

/// A store in a directory of its own, which goes when this goes.
pub struct World {
    pub dir: TempDir,
    pub store: Store,
    pub io: Counting,
    made: usize,
}

impl World {
    /// With the image `base` of so many bytes.
    pub fn new(base: usize) -> World {
        let dir = directory();
        let io = Counting::new(Arc::new(OsDir::open(dir.path()).expect("opened")));
        let store = Store::init_on(Arc::new(io.clone()), dir.path(), Env::os()).expect("a store");
        let image = noise(base, 1);
        store
            .import(
                ImportSource::Reader(&mut &image[..]),
                "base",
                ImportMode::Copy,
                &Quiet,
            )
            .expect("imported");
        World {
            dir,
            store,
            io,
            made: 0,
        }
    }
    /// A new disk from `from`, open for writing.
    pub fn fork(&mut self, from: &str) -> Arc<CowDisk> {
        self.made += 1;
        let name = format!("disk{}", self.made);
        let made = self
            .store
            .create(std::slice::from_ref(&name), from, None)
            .expect("created");
        self.store.open_cow(&made[0], true).expect("opened")
    }
    /// Removes the file of the disk made last, and with it what was not written out yet: the next round begins like this one.
    pub fn forget(&self, disk: Arc<CowDisk>) {
        drop(disk);
        let object = self.store.resolve(&self.last()).expect("there");
        let file = forkdisk::store::layer_file(object.id);
        self.store
            .names_dir()
            .remove(&object.name)
            .expect("removed");
        self.store.layers_dir().remove(&file).expect("removed");
    }
    /// The name of the disk made last.
    pub fn last(&self) -> String {
        format!("disk{}", self.made)
    }
}

/// What a [`Bare`] file keeps.
#[derive(Clone)]
pub enum Keeps {
    /// Everything, in a file of the host.
    All,
    /// All but data, which must be this block again and again: it is dropped, and each data slot reads as the block.
    This(Arc<Vec<u8>>),
}

/// A file whose syncs and early writing back do nothing, so that the machine's disk takes no part in what is measured.
struct Bare {
    inner: Arc<dyn File>,
    keeps: Keeps,
}

impl File for Bare {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        match &self.keeps {
            Keeps::This(block) if at >= Slot(DATA_START).at() => {
                for part in buf.chunks_exact_mut(BLOCK_SIZE) {
                    part.copy_from_slice(block);
                }
                Ok(())
            }
            _ => self.inner.read_at(buf, at),
        }
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        match &self.keeps {
            // Block maps go to the same part of the file.
            Keeps::This(block) if at >= Slot(DATA_START).at() && buf.starts_with(&block[..64]) => {
                Ok(())
            }
            _ => self.inner.write_at(buf, at),
        }
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.inner.allocate(at, len)
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        self.inner.punch(at, len)
    }
    fn start_writeback(&self, _at: u64, _len: u64) {}
    fn forget_cached(&self, at: u64, len: u64) {
        self.inner.forget_cached(at, len);
    }
    fn map(&self, at: u64, len: usize) -> Result<Mapping> {
        self.inner.map(at, len)
    }
    fn lock(&self, exclusive: bool) -> Result<()> {
        self.inner.lock(exclusive)
    }
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.inner.data_ranges(at, len)
    }
    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
    fn path(&self) -> std::path::PathBuf {
        self.inner.path()
    }
}

/// Layers without a store and without syncs, over the base of one.
pub struct Workshop {
    pub base: Arc<Chain>,
    size: u64,
    dir: Arc<dyn Dir>,
    made: Cell<u64>,
    _world: World,
}

impl Workshop {
    /// Over a base of so many bytes, for layers of a disk of `size`.
    pub fn new(base: usize, size: u64) -> Workshop {
        let world = World::new(base);
        let image = world.store.resolve("base").expect("imported");
        let base = world.store.chain(Below::Base(image.id)).expect("opened");
        let path = world.dir.path().join("bare");
        std::fs::create_dir(&path).expect("created");
        Workshop {
            base,
            size,
            dir: Arc::new(OsDir::open(&path).expect("opened")),
            made: Cell::new(0),
            _world: world,
        }
    }
    /// An empty file, and its name.
    pub fn file(&self, keeps: &Keeps) -> (Arc<dyn File>, String) {
        self.made.set(self.made.get() + 1);
        let name = format!("{}.layer", self.made.get());
        let inner = self.dir.open(&name, Access::CreateNew).expect("created");
        let keeps = keeps.clone();
        (Arc::new(Bare { inner, keeps }), name)
    }
    pub fn remove(&self, name: &str) {
        self.dir.remove(name).expect("removed");
    }
    /// A new layer, open for writing, and the name of its file.
    pub fn layer(&self, keeps: &Keeps) -> (Layer, String) {
        let (file, name) = self.file(keeps);
        let id = Id(u128::from(self.made.get()).to_le_bytes());
        let parent = self.base.base().id();
        let header = Header::new(id, parent, false, 1, self.size, 0, "");
        layer::create(&*file, &header).expect("created");
        (Layer::open(file).expect("opened"), name)
    }
    /// A new disk over `chain`, and the name of the file of its layer.
    pub fn disk(&self, keeps: &Keeps, chain: &Arc<Chain>) -> (CowDisk, String) {
        let (layer, name) = self.layer(keeps);
        (CowDisk::writable(layer, chain.clone()), name)
    }
    /// A chain of sealed layers: `data` is written to the blocks of `changed`, spread evenly over `depth` layers.
    pub fn chain(&self, depth: usize, changed: &[u64], data: &[u8]) -> Arc<Chain> {
        let mut layers = Vec::new();
        for blocks in changed.chunks(changed.len() / depth) {
            let (layer, name) = self.layer(&Keeps::All);
            let file = layer.file().clone();
            let disk = CowDisk::writable(layer, self.base.clone());
            for lba in blocks {
                disk.write(data, lba * BLOCK_SIZE as u64).expect("written");
            }
            disk.close().expect("closed");
            drop(disk);
            let layer = Layer::open(file.clone()).expect("opened");
            layer.close(State::Sealed, None).expect("sealed");
            layers.insert(0, Arc::new(ReadLayer::open(file).expect("opened")));
            // Its handle keeps what is in it.
            self.remove(&name);
        }
        assert!(layers.iter().all(|l| l.state() == State::Sealed));
        assert_eq!(layers.len(), depth);
        let base = self.base.base().clone();
        Arc::new(Chain::new(layers, base, Budget::new(1 << 30)))
    }
}

/// A directory on the disk that also holds what is built (not in memory, as `/tmp` may be).
pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// A plain file to compare with.
pub fn raw_file(dir: &Path, name: &str, len: u64) -> std::fs::File {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join(name))
        .expect("created");
    file.set_len(len).expect("set");
    file
}

/// Something measured: its name, and what does it once and says how long that took, without what it had to prepare.
pub struct Side<'a> {
    pub name: &'a str,
    pub run: Box<dyn FnMut() -> Duration + 'a>,
}

/// One side.
pub fn side<'a>(name: &'a str, run: impl FnMut() -> Duration + 'a) -> Side<'a> {
    Side {
        name,
        run: Box::new(run),
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// Lets the sides take turns, and prints for each the median time of one of its `ops` operations, and the median of its rate as a ratio to
/// the first side's in the same round: above 1 is faster.
pub fn compare(title: &str, n: usize, ops: u64, sides: &mut [Side<'_>]) {
    if for_a_baseline() {
        return;
    }
    // `cargo bench --bench NAME -- WORDS` measures what has these words in its title.
    let mut filter = std::env::args().skip(1).filter(|a| !a.starts_with('-'));
    if filter.next().is_some_and(|f| !title.contains(&f)) {
        return;
    }
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); sides.len()];
    // The first round warms up.
    for round in 0..rounds(n + 1) {
        for turn in 0..sides.len() {
            let i = if round % 2 == 0 {
                turn
            } else {
                sides.len() - 1 - turn
            };
            let took = (sides[i].run)().as_secs_f64() / ops as f64;
            if round > 0 || !measuring() {
                times[i].push(took);
            }
        }
    }
    println!("{title}");
    for (i, side) in sides.iter().enumerate() {
        let ratio = median(times[0].iter().zip(&times[i]).map(|(a, b)| a / b).collect());
        let each = median(times[i].clone()) * 1e6;
        println!(
            "    {:<28} {each:>10.2} us each   {ratio:>6.3} of the first",
            side.name
        );
    }
}
