//! The file of a layer that is open for writing, as its writer sees it: it counts the bytes that are written, on from what was written to the disk before.
//!
//! The counts are for people: nothing depends on them, and they order nothing. And nothing is changed before what is [`Unsettled`] is durable.

use super::unsettled::Unsettled;
use crate::error::Result;
use crate::format::Superblock;
use crate::io::{File, Mapping};
use crate::units::BLOCK;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use zerocopy::little_endian::U64;

/// A layer's file, and what was written over the disk's life: by users, and to the files of its layers.
pub(super) struct Written {
    inner: Arc<dyn File>,
    user: AtomicU64,
    host: AtomicU64,
    /// `host` when it was opened.
    began: AtomicU64,
    unsettled: Arc<Unsettled>,
}

impl Written {
    /// Counts on from what the superblock says.
    pub fn new(inner: Arc<dyn File>, superblock: &Superblock) -> Written {
        let began = superblock.host_written.get();
        Written {
            inner,
            user: AtomicU64::new(superblock.user_written.get()),
            host: AtomicU64::new(began),
            began: AtomicU64::new(began),
            unsettled: Arc::default(),
        }
    }
    /// What is to be durable before the file is changed.
    pub fn unsettled(&self) -> &Arc<Unsettled> {
        &self.unsettled
    }
    /// The file without the count, for readers.
    pub fn file(&self) -> &Arc<dyn File> {
        &self.inner
    }
    /// A user wrote so many bytes.
    pub fn by_user(&self, bytes: u64) {
        self.user.fetch_add(bytes, Relaxed);
    }
    /// Users wrote no more than so many bytes.
    pub fn forget_users(&self, bytes: u64) {
        self.user.store(bytes, Relaxed);
    }
    /// A predecessor had counted as many, by users and to the file.
    pub fn at_least(&self, (user, host): (u64, u64)) {
        self.user.fetch_max(user, Relaxed);
        let before = self.host.fetch_max(host, Relaxed);
        self.began.fetch_add(host.saturating_sub(before), Relaxed);
    }
    /// So many bytes are written to the file itself.
    pub fn by_another(&self, bytes: u64) {
        self.host.fetch_add(bytes, Relaxed);
    }
    /// Bytes that users wrote over the disk's life.
    pub fn user(&self) -> u64 {
        self.user.load(Relaxed)
    }
    /// Bytes that were written to the files of its layers over the disk's life.
    pub fn host(&self) -> u64 {
        self.host.load(Relaxed)
    }
    /// Bytes that were written to the file since it was opened.
    pub fn since_opened(&self) -> u64 {
        self.host().wrapping_sub(self.began.load(Relaxed))
    }
    /// Puts the counts into a superblock that is about to be written, twice.
    pub fn note(&self, next: &mut Superblock) {
        next.user_written = U64::new(self.user());
        next.host_written = U64::new(self.host().saturating_add(2 * BLOCK));
    }
}

impl File for Written {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.inner.read_at(buf, at)
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.unsettled.settle()?;
        // Also what fails: it may be written in part.
        self.host.fetch_add(buf.len() as u64, Relaxed);
        self.inner.write_at(buf, at)
    }
    fn write_through(&self, buf: &[u8], at: u64) -> Result<()> {
        self.unsettled.settle()?;
        self.host.fetch_add(buf.len() as u64, Relaxed);
        self.inner.write_through(buf, at)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.unsettled.settle()?;
        self.inner.set_len(len)
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.unsettled.settle()?;
        self.inner.allocate(at, len)
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        self.unsettled.settle()?;
        self.inner.punch(at, len)
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
    fn keep_in_place(&self) {
        self.inner.keep_in_place();
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
    fn written_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.inner.written_ranges(at, len)
    }
    fn host_room(&self) -> Option<(u64, u64)> {
        self.inner.host_room()
    }
    fn allocated(&self) -> Result<u64> {
        self.inner.allocated()
    }
    fn copy_from(&self, source: &dyn File, from: u64, at: u64, len: u64) -> Result<()> {
        self.unsettled.settle()?;
        self.host.fetch_add(len, Relaxed);
        self.inner.copy_from(source, from, at, len)
    }
    fn number(&self) -> Result<u64> {
        self.inner.number()
    }
    fn path(&self) -> PathBuf {
        self.inner.path()
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
}
