//! A process that dies: a seam at which the work ends, in the midst of a call, without any of the code that would follow an error.
//!
//! The nth changing call panics with [`Dead`], before it is done, after it, or (a write) half-way. Whoever catches that has what a killed process
//! leaves: the simulated disk as it was, and the memory that outlives processes.

use forkdisk::error::Result;
use forkdisk::format::{JOURNAL_SLOTS, JOURNAL_START};
use forkdisk::io::sim::{FaultKind, SimDisk, Verb};
use forkdisk::io::{Access, Dir, EntryKind, File, Mapping};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// What the panic carries.
pub struct Dead;

#[derive(Default)]
struct Life {
    /// Changing calls until death; negative: immortal.
    left: AtomicI64,
    how: AtomicU64,
    calls: AtomicU64,
    /// Where a sync fails if it is the last call, and nobody lives to hear of it.
    sim: Option<SimDisk>,
    failed: AtomicBool,
    others: Mutex<Option<Others>>,
}

/// What other threads do while the last call is under way.
type Others = Box<dyn FnOnce() + Send>;

impl Life {
    /// Does a changing call; `half` does it in part.
    fn live<T>(&self, all: impl FnOnce() -> Result<T>, half: impl FnOnce(u64)) -> Result<T> {
        self.live_with(false, all, half)
    }
    fn live_with<T>(
        &self,
        others_go_on: bool,
        all: impl FnOnce() -> Result<T>,
        half: impl FnOnce(u64),
    ) -> Result<T> {
        self.calls.fetch_add(1, SeqCst);
        if self.left.load(SeqCst) < 0 || self.left.fetch_sub(1, SeqCst) > 0 {
            return all();
        }
        if others_go_on && let Some(others) = self.others.lock().unwrap().take() {
            others();
        }
        let how = self.how.load(SeqCst);
        match how % 3 {
            0 => {}
            1 => drop(all()),
            _ => half(how / 3),
        }
        panic_any(Dead)
    }
}

#[derive(Clone)]
pub struct Mortal {
    inner: Arc<dyn Dir>,
    life: Arc<Life>,
}

struct MortalFile {
    inner: Arc<dyn File>,
    life: Arc<Life>,
}

/// Runs `work`; `None` if it died.
pub fn until_death<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(why) if why.is::<Dead>() => None,
        Err(why) => std::panic::resume_unwind(why),
    }
}

impl Mortal {
    pub fn new(inner: Arc<dyn Dir>) -> Mortal {
        Mortal::with(inner, None)
    }
    /// The last call may be a sync that fails.
    pub fn on(sim: &SimDisk) -> Mortal {
        Mortal::with(sim.root(), Some(sim.clone()))
    }
    fn with(inner: Arc<dyn Dir>, sim: Option<SimDisk>) -> Mortal {
        let life = Life {
            left: AtomicI64::new(-1),
            sim,
            ..Life::default()
        };
        Mortal {
            inner,
            life: Arc::new(life),
        }
    }
    /// Did the last call fail, with nobody to hear of it?
    pub fn failed_unheard(&self) -> bool {
        self.life.failed.load(SeqCst)
    }
    /// Death at the changing call after `n` more.
    pub fn die_after(&self, n: u64, how: u64) {
        self.life.how.store(how, SeqCst);
        self.life.left.store(n as i64, SeqCst);
    }
    /// What others do while the last call is under way, if that is the sync of a file or a record of the journal. `None`: nothing.
    pub fn meanwhile(&self, others: Option<Others>) {
        *self.life.others.lock().unwrap() = others;
    }
    pub fn live_on(&self) {
        self.life.left.store(-1, SeqCst);
    }
    pub fn calls(&self) -> u64 {
        self.life.calls.load(SeqCst)
    }
}

impl Dir for Mortal {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let open = || {
            Ok(Arc::new(MortalFile {
                inner: self.inner.open(name, access)?,
                life: self.life.clone(),
            }) as Arc<dyn File>)
        };
        match access {
            Access::CreateNew => self.life.live(open, |_| ()),
            _ => open(),
        }
    }
    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>> {
        Ok(Arc::new(Mortal {
            inner: self.inner.subdir(name)?,
            life: self.life.clone(),
        }))
    }
    fn create_dir(&self, name: &str) -> Result<()> {
        self.life.live(|| self.inner.create_dir(name), |_| ())
    }
    fn list(&self) -> Result<Vec<(String, EntryKind)>> {
        self.inner.list()
    }
    fn entry(&self, name: &str) -> Result<Option<EntryKind>> {
        self.inner.entry(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.life.live(|| self.inner.rename(from, to), |_| ())
    }
    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        self.life.live(|| self.inner.rename_new(from, to), |_| ())
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.life.live(|| self.inner.remove(name), |_| ())
    }
    fn remove_dir(&self, name: &str) -> Result<()> {
        self.life.live(|| self.inner.remove_dir(name), |_| ())
    }
    fn sync(&self) -> Result<()> {
        self.life.live(|| self.inner.sync(), |_| ())
    }
    fn sync_filesystem(&self) -> Result<()> {
        self.life.live(|| self.inner.sync_filesystem(), |_| ())
    }
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
}

impl File for MortalFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.inner.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        let journal = u64::from(JOURNAL_START)..u64::from(JOURNAL_START + JOURNAL_SLOTS);
        let is_record = journal.contains(&(at / 4096)) && buf.iter().any(|&b| b != 0);
        self.life.live_with(
            is_record,
            || self.inner.write_at(buf, at),
            // The kernel copies page by page.
            |how| {
                let pages = (buf.len() as u64).div_ceil(4096);
                let part = (how % pages.max(1) * 4096) as usize;
                let _ = self.inner.write_at(&buf[..part.min(buf.len())], at);
            },
        )
    }
    fn sync(&self) -> Result<()> {
        self.life.live_with(
            true,
            || self.inner.sync(),
            |_| {
                if let Some(sim) = &self.life.sim {
                    sim.fail_nth(Verb::Sync, 0, FaultKind::Eio);
                    let _ = self.inner.sync();
                    self.life.failed.store(true, SeqCst);
                }
            },
        )
    }
    fn number(&self) -> Result<u64> {
        self.inner.number()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.life.live(|| self.inner.set_len(len), |_| ())
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.life.live(|| self.inner.allocate(at, len), |_| ())
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        self.life.live(|| self.inner.punch(at, len), |_| ())
    }
    fn start_writeback(&self, at: u64, len: u64) {
        self.inner.start_writeback(at, len);
    }
    fn prefetch(&self, at: u64, len: u64) {
        self.inner.prefetch(at, len);
    }
    fn is_cached(&self, at: u64) -> bool {
        self.inner.is_cached(at)
    }
    fn await_writeback(&self, at: u64, len: u64) {
        self.inner.await_writeback(at, len);
    }
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
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
}
