//! What the benches share: a store on a real directory, and measuring things that must be compared.
//!
//! A machine that does other work too is never the same twice. So things that are compared take turns, round by round, in changing order, and
//! what is told is the median of the ratios within a round.
#![allow(dead_code, missing_docs, reason = "each bench uses a part of it")]

use forkdisk::disk::CowDisk;
use forkdisk::io::count::Counting;
use forkdisk::io::os::OsDir;
use forkdisk::store::{Env, ImportMode, ImportSource, Quiet, Store};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Measure, or only try whether everything runs (`cargo test --benches`)?
pub fn measuring() -> bool {
    std::env::args().any(|a| a == "--bench")
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
