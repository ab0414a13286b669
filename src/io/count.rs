//! Counts what passes through the seam, so that a test can state the price of an operation: "a flush
//! is one sync".
//!
//! Counted are calls, whether they succeed or fail: a failed one costs too. Not counted is what goes past the
//! seam: bytes of a mapping, and whatever is done with a file's descriptor.

use super::{Access, Dir, EntryKind, File, Mapping};
use crate::error::Result;
use std::{
    ops::Sub,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What was counted up to a moment. The difference of two is what happened between them.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        #[derive(Default)]
        struct Counters {
            $($name: AtomicU64,)*
        }

        impl Counters {
            fn counts(&self) -> Counts {
                Counts { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl Sub for Counts {
            type Output = Counts;
            fn sub(self, earlier: Counts) -> Counts {
                Counts { $($name: self.$name - earlier.$name,)* }
            }
        }
    };
}

counters! {
    /// Calls of `read_at`.
    reads,
    /// Calls of `write_at`.
    writes,
    /// Bytes asked for by `read_at`.
    bytes_read,
    /// Bytes given to `write_at`.
    bytes_written,
    /// Calls of [`File::sync`].
    syncs,
    /// Calls of [`Dir::sync`].
    dir_syncs,
    /// Calls of [`Dir::sync_filesystem`].
    fs_syncs,
    /// Files opened (not created).
    opens,
    /// Files and directories created.
    creates,
    /// Calls of `rename` and `rename_new`.
    renames,
    /// Files and directories removed.
    removes,
    /// Calls of `set_len`.
    set_lens,
    /// Calls of `punch`.
    punches,
    /// Calls of `allocate`.
    allocations,
    /// Calls of `map`.
    maps,
}

fn add(counter: &AtomicU64, n: u64) {
    // Counters order nothing; a test reads them when the threads it counts have come to rest.
    counter.fetch_add(n, Ordering::Relaxed);
}

/// A directory that counts all that is done in it, below it, and with the files opened through it.
#[derive(Clone)]
pub struct Counting {
    inner: Arc<dyn Dir>,
    counters: Arc<Counters>,
}

struct CountingFile {
    inner: Arc<dyn File>,
    counters: Arc<Counters>,
}

impl Counting {
    /// Counts what is done through the result, from zero.
    pub fn new(inner: Arc<dyn Dir>) -> Counting {
        Counting {
            inner,
            counters: Arc::default(),
        }
    }
    /// All counts up to now.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }
}

impl Dir for Counting {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let counter = match access {
            Access::CreateNew => &self.counters.creates,
            Access::Read | Access::Write => &self.counters.opens,
        };
        add(counter, 1);
        Ok(Arc::new(CountingFile {
            inner: self.inner.open(name, access)?,
            counters: self.counters.clone(),
        }))
    }
    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>> {
        Ok(Arc::new(Counting {
            inner: self.inner.subdir(name)?,
            counters: self.counters.clone(),
        }))
    }
    fn create_dir(&self, name: &str) -> Result<()> {
        add(&self.counters.creates, 1);
        self.inner.create_dir(name)
    }
    fn list(&self) -> Result<Vec<(String, EntryKind)>> {
        self.inner.list()
    }
    fn entry(&self, name: &str) -> Result<Option<EntryKind>> {
        self.inner.entry(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        add(&self.counters.renames, 1);
        self.inner.rename(from, to)
    }
    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        add(&self.counters.renames, 1);
        self.inner.rename_new(from, to)
    }
    fn remove(&self, name: &str) -> Result<()> {
        add(&self.counters.removes, 1);
        self.inner.remove(name)
    }
    fn remove_dir(&self, name: &str) -> Result<()> {
        add(&self.counters.removes, 1);
        self.inner.remove_dir(name)
    }
    fn sync(&self) -> Result<()> {
        add(&self.counters.dir_syncs, 1);
        self.inner.sync()
    }
    fn sync_filesystem(&self) -> Result<()> {
        add(&self.counters.fs_syncs, 1);
        self.inner.sync_filesystem()
    }
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
}

impl File for CountingFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        add(&self.counters.reads, 1);
        add(&self.counters.bytes_read, buf.len() as u64);
        self.inner.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        add(&self.counters.writes, 1);
        add(&self.counters.bytes_written, buf.len() as u64);
        self.inner.write_at(buf, at)
    }
    fn write_through(&self, buf: &[u8], at: u64) -> Result<()> {
        add(&self.counters.writes, 1);
        add(&self.counters.bytes_written, buf.len() as u64);
        self.inner.write_through(buf, at)
    }
    fn sync(&self) -> Result<()> {
        add(&self.counters.syncs, 1);
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        add(&self.counters.set_lens, 1);
        self.inner.set_len(len)
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        add(&self.counters.allocations, 1);
        self.inner.allocate(at, len)
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        add(&self.counters.punches, 1);
        self.inner.punch(at, len)
    }
    fn copy_from(&self, source: &dyn File, from: u64, at: u64, len: u64) -> Result<()> {
        add(&self.counters.writes, 1);
        add(&self.counters.bytes_written, len);
        self.inner.copy_from(source, from, at, len)
    }
    fn number(&self) -> Result<u64> {
        self.inner.number()
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
        add(&self.counters.maps, 1);
        self.inner.map(at, len)
    }
    fn lock(&self, exclusive: bool) -> Result<()> {
        self.inner.lock(exclusive)
    }
    fn written_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.inner.written_ranges(at, len)
    }
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.inner.data_ranges(at, len)
    }
    fn host_room(&self) -> Option<(u64, u64)> {
        self.inner.host_room()
    }
    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
}
