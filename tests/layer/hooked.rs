//! A directory whose files call back before they read, write or sync: what another thread could do at the worst moment, done on purpose.

use forkdisk::error::Result;
use forkdisk::io::{Access, Dir, EntryKind, File, Mapping};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;

/// Called once, before the next read at or behind an offset of a layer file; before the next sync of one, where the offset is `SYNC`.
type Hook = Arc<Mutex<Option<(u64, Box<dyn FnOnce() + Send>)>>>;

const SYNC: u64 = u64::MAX;
/// Before the next write at or behind an offset.
const WRITE: u64 = 1 << 63;

/// What was asked for ahead of being read, of files of which nothing is in memory; `None`: they are what they are.
type Cold = Arc<Mutex<Option<Vec<(u64, u64)>>>>;

#[derive(Clone)]
pub struct Hooked {
    inner: Arc<dyn Dir>,
    hook: Hook,
    cold: Cold,
}

struct HookedFile {
    inner: Arc<dyn File>,
    hook: Hook,
    cold: Cold,
    layer: bool,
}

impl Hooked {
    pub fn new(inner: Arc<dyn Dir>) -> Hooked {
        Hooked {
            inner,
            hook: Hook::default(),
            cold: Cold::default(),
        }
    }
    /// From now on nothing is in memory. Returns what was asked for since the last call.
    pub fn cold(&self) -> Vec<(u64, u64)> {
        self.cold.lock().replace(Vec::new()).unwrap_or_default()
    }
    pub fn before_read(&self, from: u64, f: impl FnOnce() + Send + 'static) {
        *self.hook.lock() = Some((from, Box::new(f)));
    }
    pub fn before_write(&self, from: u64, f: impl FnOnce() + Send + 'static) {
        self.before_read(WRITE | from, f);
    }
    pub fn before_sync(&self, f: impl FnOnce() + Send + 'static) {
        self.before_read(SYNC, f);
    }
    pub fn was_called(&self) -> bool {
        self.hook.lock().is_none()
    }
}

impl Dir for Hooked {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        Ok(Arc::new(HookedFile {
            inner: self.inner.open(name, access)?,
            hook: self.hook.clone(),
            cold: self.cold.clone(),
            layer: name.ends_with(".layer"),
        }))
    }
    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>> {
        Ok(Arc::new(Hooked {
            inner: self.inner.subdir(name)?,
            hook: self.hook.clone(),
            cold: self.cold.clone(),
        }))
    }
    fn create_dir(&self, name: &str) -> Result<()> {
        self.inner.create_dir(name)
    }
    fn list(&self) -> Result<Vec<(String, EntryKind)>> {
        self.inner.list()
    }
    fn entry(&self, name: &str) -> Result<Option<EntryKind>> {
        self.inner.entry(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.inner.rename(from, to)
    }
    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        self.inner.rename_new(from, to)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.inner.remove(name)
    }
    fn remove_dir(&self, name: &str) -> Result<()> {
        self.inner.remove_dir(name)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn sync_filesystem(&self) -> Result<()> {
        self.inner.sync_filesystem()
    }
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
}

impl HookedFile {
    fn call(&self, due: impl Fn(u64) -> bool) {
        let f = {
            let mut hook = self.hook.lock();
            let due = self.layer && hook.as_ref().is_some_and(|(from, _)| due(*from));
            if due { hook.take() } else { None }
        };
        if let Some((_, f)) = f {
            f();
        }
    }
}

impl File for HookedFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.call(|from| at >= from);
        self.inner.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.call(|from| from != SYNC && at | WRITE >= from && from >= WRITE);
        self.inner.write_at(buf, at)
    }
    fn sync(&self) -> Result<()> {
        self.call(|from| from == SYNC);
        self.inner.sync()
    }
    fn number(&self) -> Result<u64> {
        self.inner.number()
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
    fn start_writeback(&self, at: u64, len: u64) {
        self.inner.start_writeback(at, len);
    }
    fn prefetch(&self, at: u64, len: u64) {
        match &mut *self.cold.lock() {
            Some(asked) => asked.push((at, len)),
            None => self.inner.prefetch(at, len),
        }
    }
    fn is_cached(&self, at: u64) -> bool {
        self.cold.lock().is_none() && self.inner.is_cached(at)
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
