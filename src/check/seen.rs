//! A layer file that someone else may be writing, or cutting: nothing of it is mapped. User code that reads the mapping of a file
//! that is cut meanwhile dies of SIGBUS; a copy that is out of date is merely wrong, and that its checksums tell.

use crate::error::{Error, Kind, Result};
use crate::io::{File, Mapping};
use std::sync::Arc;

/// Bytes of a mapping that may be holes for no reason but that someone copied the file sparsely.
const HOLES: u64 = 1 << 20;

/// The file.
pub(super) struct Seen(Arc<dyn File>);

impl Seen {
    pub fn of(file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(Seen(file))
    }
}

impl File for Seen {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.0.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.0.write_at(buf, at)
    }
    fn sync(&self) -> Result<()> {
        self.0.sync()
    }
    fn len(&self) -> Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.0.set_len(len)
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.0.allocate(at, len)
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        self.0.punch(at, len)
    }
    fn number(&self) -> Result<u64> {
        self.0.number()
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
        // Memory for what is there, not for what a superblock claims of a file that is all hole.
        let there: u64 = self.data_ranges(at, len as u64)?.iter().map(|r| r.1).sum();
        let no = |what: &str| {
            Error::new(Kind::Corrupt, format!("block map: {what}"))
                .offset(at)
                .path(self.path())
        };
        if there.saturating_mul(2) + HOLES < len as u64 {
            return Err(no("most of it is a hole"));
        }
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(len)
            .map_err(|_| no("it does not fit into memory"))?;
        bytes.resize(len, 0);
        self.0.read_at(&mut bytes, at)?;
        Ok(Mapping::Copied(bytes))
    }
    fn lock(&self, exclusive: bool) -> Result<()> {
        self.0.lock(exclusive)
    }
    fn written_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.0.written_ranges(at, len)
    }
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.0.data_ranges(at, len)
    }
    fn allocated(&self) -> Result<u64> {
        self.0.allocated()
    }
    fn path(&self) -> std::path::PathBuf {
        self.0.path()
    }
}
