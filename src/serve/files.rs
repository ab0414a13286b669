//! The disks a server shows, each a regular file of a flat directory.
//!
//! Always true:
//! - a number is never used again while the mount lives, so a request that is late finds nothing, never a
//!   stranger;
//! - a request works on one disk from beginning to end: [`Files::remove`], [`Files::replace`] and
//!   [`Files::quiesce`] wait for those under way, and return when no worker touches the disk any more;
//! - removing never waits for requests that come after it: they are refused at once.

use super::{awake::Awake, depth::Depth};
use crate::{
    disk::Disk,
    error::{Error, Kind, Result},
    sys::loopdev,
};
use parking_lot::{RwLock, RwLockReadGuard};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// Lowest number of a file. 1 is the directory; what is between serves as positions of `.` and `..`.
pub const FIRST_INO: u64 = 16;
/// Longest name of a file, as of any file on Linux.
pub const NAME_MAX: usize = 255;

/// Counters of one file or of all. Relaxed: each is right, together they are a snapshot in motion.
#[derive(Default, Debug)]
pub struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    bytes_discarded: AtomicU64,
    in_flight: AtomicU64,
    max_in_flight: AtomicU64,
}

/// Values of [`Counters`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Discard and write-zeroes requests.
    pub discards: u64,
    /// Requests of these kinds that failed.
    pub errors: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Bytes discarded or written as zeros.
    pub bytes_discarded: u64,
    /// Requests being served now.
    pub in_flight: u64,
    /// Most requests that were being served at one time.
    pub max_in_flight: u64,
}

/// What a request does, for counting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Read so many bytes.
    Read(u64),
    /// Write so many bytes.
    Write(u64),
    /// Discard or zero so many bytes.
    Discard(u64),
    /// Flush.
    Flush,
    /// Look where data is.
    Seek,
}

impl Counters {
    fn enter(&self) {
        let now = self.in_flight.fetch_add(1, Relaxed) + 1;
        // Mostly a load: the maximum is soon reached.
        if now > self.max_in_flight.load(Relaxed) {
            self.max_in_flight.fetch_max(now, Relaxed);
        }
    }
    /// Returns how many of its kind there were before.
    fn leave(&self, op: Op, ok: bool) -> u64 {
        let (count, bytes) = match op {
            Op::Read(len) => (&self.reads, Some((&self.bytes_read, len))),
            Op::Write(len) => (&self.writes, Some((&self.bytes_written, len))),
            Op::Discard(len) => (&self.discards, Some((&self.bytes_discarded, len))),
            Op::Flush => (&self.flushes, None),
            Op::Seek => {
                self.in_flight.fetch_sub(1, Relaxed);
                return 0;
            }
        };
        let before = count.fetch_add(1, Relaxed);
        match bytes {
            Some((counter, len)) if ok => {
                counter.fetch_add(len, Relaxed);
            }
            _ => {}
        }
        if !ok {
            self.errors.fetch_add(1, Relaxed);
        }
        self.in_flight.fetch_sub(1, Relaxed);
        before
    }
    /// The values now.
    pub fn stats(&self) -> Stats {
        Stats {
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            discards: self.discards.load(Relaxed),
            errors: self.errors.load(Relaxed),
            bytes_read: self.bytes_read.load(Relaxed),
            bytes_written: self.bytes_written.load(Relaxed),
            bytes_discarded: self.bytes_discarded.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
            max_in_flight: self.max_in_flight.load(Relaxed),
        }
    }
}

/// One disk that is shown.
pub struct ServedFile {
    ino: u64,
    name: String,
    /// Seconds since 1970 when it was added: its times, for `stat`.
    since: u64,
    /// The disk; `None` once removed. Each request holds it for reading, from beginning to end.
    disk: RwLock<Option<Arc<dyn Disk>>>,
    /// The file that the kernel reads in its place ([`crate::sys::passthrough`]).
    backing: Option<u32>,
    /// Refuses new requests while a removal waits for those under way.
    closing: AtomicBool,
    opens: AtomicI64,
    counters: Counters,
    total: Arc<Counters>,
    awake: Arc<Awake>,
    depth: Depth,
}

/// A disk that is shown, for tables.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileInfo {
    /// Number of the file.
    pub ino: u64,
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Can it only be read?
    pub read_only: bool,
    /// How often it is open now. Opens from before a takeover are not known.
    pub opens: u64,
    /// Its counters.
    pub stats: Stats,
}

fn stale(name: &str) -> Error {
    Error::new(Kind::NotFound, format!("{name} is no longer served"))
        .hint("detach its device and attach it again")
}

impl ServedFile {
    /// Number of the file.
    pub fn ino(&self) -> u64 {
        self.ino
    }
    /// Name of the file.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// When it was added, in seconds since 1970.
    pub fn since(&self) -> u64 {
        self.since
    }
    /// The number of the file that the kernel reads in its place.
    pub fn backing(&self) -> Option<u32> {
        self.backing
    }
    /// The disk, held for one request: while it is held the disk is neither removed nor replaced. `None`
    /// once the file is removed.
    pub fn disk(&self) -> Option<Held<'_>> {
        if self.closing.load(Relaxed) {
            return None;
        }
        RwLockReadGuard::try_map(self.disk.read(), Option::as_ref)
            .map(Held)
            .ok()
    }
    /// Serves one request of kind `op`: holds the disk, counts, and calls `serve`. `None` once the file is
    /// removed.
    pub fn request<R>(
        &self,
        op: Op,
        serve: impl FnOnce(&dyn Disk) -> Result<R>,
    ) -> Option<Result<R>> {
        let disk = self.disk()?;
        self.counters.enter();
        self.total.enter();
        let result = serve(&*disk);
        self.depth.count(self.counters.leave(op, result.is_ok()));
        self.total.leave(op, result.is_ok());
        self.awake.served();
        Some(result)
    }
    /// Is [`ServedFile::look`] due?
    pub fn is_look_due(&self) -> bool {
        self.depth.is_due()
    }
    /// Looks how much its device has to do, after a request was answered.
    pub fn look(&self) {
        self.depth.look();
    }
    /// Does what requests have left for the time after they were answered ([`Disk::tidy`]). As any request it holds the disk, which may be another by now, or
    /// none.
    pub fn tidy(&self) {
        if let Some(disk) = self.disk() {
            disk.tidy();
        }
    }
    /// Counts an open.
    pub fn opened(&self) {
        self.opens.fetch_add(1, Relaxed);
    }
    /// Counts a close.
    pub fn closed(&self) {
        self.opens.fetch_sub(1, Relaxed);
    }
    /// What this is, for tables; `None` once removed.
    pub fn info(&self) -> Option<FileInfo> {
        let disk = self.disk()?;
        Some(FileInfo {
            ino: self.ino,
            name: self.name.clone(),
            size: disk.size(),
            read_only: disk.read_only(),
            // Files that an earlier server opened may be closed here: below zero is still nobody.
            opens: self.opens.load(Relaxed).max(0) as u64,
            stats: self.counters.stats(),
        })
    }
}

/// A disk held for one request.
pub struct Held<'a>(parking_lot::MappedRwLockReadGuard<'a, Arc<dyn Disk>>);

impl std::ops::Deref for Held<'_> {
    type Target = dyn Disk;
    fn deref(&self) -> &(dyn Disk + 'static) {
        &**self.0
    }
}

#[derive(Default)]
struct Table {
    by_ino: BTreeMap<u64, Arc<ServedFile>>,
    by_name: HashMap<String, u64>,
    next_ino: u64,
}

/// All disks a server shows.
pub struct Files {
    table: RwLock<Table>,
    total: Arc<Counters>,
    awake: Arc<Awake>,
}

impl Default for Files {
    fn default() -> Files {
        Files::new()
    }
}

impl Files {
    /// None yet.
    pub fn new() -> Files {
        Files::with(Awake::off())
    }
    /// None yet; their requests may keep processors awake.
    pub fn with(awake: Awake) -> Files {
        Files {
            table: RwLock::new(Table {
                next_ino: FIRST_INO,
                ..Table::default()
            }),
            total: Arc::default(),
            awake: Arc::new(awake),
        }
    }
    /// Shows a disk under a new name and returns its number. It can be opened at once: the kernel
    /// remembers neither names nor their absence.
    pub fn add(&self, name: &str, disk: Arc<dyn Disk>) -> Result<u64> {
        self.insert(name, disk, None, None)
    }
    /// Shows a disk under the number it had before a takeover: open files know it by that number.
    pub fn add_with_ino(&self, name: &str, disk: Arc<dyn Disk>, ino: u64) -> Result<()> {
        self.insert(name, disk, Some(ino), None).map(|_| ())
    }
    /// Shows a disk that the kernel reads by itself, from the file of number `backing`: it can only be read. `ino`: the number it had before a
    /// takeover.
    pub fn add_backed(
        &self,
        name: &str,
        disk: Arc<dyn Disk>,
        ino: Option<u64>,
        backing: u32,
    ) -> Result<u64> {
        self.insert(name, disk, ino, Some(backing))
    }
    fn insert(
        &self,
        name: &str,
        disk: Arc<dyn Disk>,
        ino: Option<u64>,
        backing: Option<u32>,
    ) -> Result<u64> {
        if name.is_empty()
            || name.len() > NAME_MAX
            || name == "."
            || name == ".."
            || name.contains(['/', '\0'])
        {
            return Err(Error::new(
                Kind::Invalid,
                format!("{name:?} cannot be the name of a file"),
            )
            .hint("a name has 1 to 255 bytes and no slash"));
        }
        let mut table = self.table.write();
        if table.by_name.contains_key(name) {
            return Err(
                Error::new(Kind::Exists, format!("{name} is already served"))
                    .hint("see `forkdisk ls attached`"),
            );
        }
        let ino = ino.unwrap_or(table.next_ino);
        if ino < FIRST_INO || table.by_ino.contains_key(&ino) {
            return Err(Error::new(
                Kind::Invalid,
                format!("{name} cannot be served as file number {ino}"),
            )
            .hint("the number is taken or reserved"));
        }
        table.next_ino = table.next_ino.max(ino + 1);
        table.by_name.insert(name.to_string(), ino);
        let file = ServedFile {
            ino,
            name: name.to_string(),
            since: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
            disk: RwLock::new(Some(disk)),
            backing,
            closing: AtomicBool::new(false),
            opens: AtomicI64::new(0),
            counters: Counters::default(),
            total: Arc::clone(&self.total),
            awake: Arc::clone(&self.awake),
            depth: Depth::default(),
        };
        table.by_ino.insert(ino, Arc::new(file));
        Ok(ino)
    }
    /// The file of that number is shown as this loop device.
    pub fn shown_as(&self, ino: u64, device: &Path) {
        if let (Some(file), Some(number)) = (self.get(ino), loopdev::number(device)) {
            file.depth.is_of(number);
        }
    }
    /// The next number that would be given out: to be carried over a takeover, with
    /// [`Files::reserve_inos`], so that numbers of removed files do not come back.
    pub fn next_ino(&self) -> u64 {
        self.table.read().next_ino
    }
    /// Gives out no number below `next`.
    pub fn reserve_inos(&self, next: u64) {
        let mut table = self.table.write();
        table.next_ino = table.next_ino.max(next);
    }
    /// The file of that number.
    pub fn get(&self, ino: u64) -> Option<Arc<ServedFile>> {
        self.table.read().by_ino.get(&ino).cloned()
    }
    /// The file of that name.
    pub fn lookup(&self, name: &str) -> Option<Arc<ServedFile>> {
        let table = self.table.read();
        table.by_ino.get(table.by_name.get(name)?).cloned()
    }
    /// The first file whose number is greater than `ino`.
    pub fn after(&self, ino: u64) -> Option<Arc<ServedFile>> {
        let next = ino.checked_add(1)?;
        self.table
            .read()
            .by_ino
            .range(next..)
            .next()
            .map(|(_, f)| Arc::clone(f))
    }
    fn find(&self, ino: u64) -> Result<Arc<ServedFile>> {
        self.get(ino).ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("no file with the number {ino} is served"),
            )
            .hint("see `forkdisk ls attached`")
        })
    }
    /// Takes a disk away and returns it. Whoever still has the file open gets ESTALE from now on. Waits
    /// for the requests under way on it: on return nothing touches the disk any more.
    pub fn remove(&self, ino: u64) -> Result<Arc<dyn Disk>> {
        let file = self.find(ino)?;
        {
            let mut table = self.table.write();
            table.by_ino.remove(&ino);
            table.by_name.remove(&file.name);
        }
        file.closing.store(true, Relaxed);
        file.disk.write().take().ok_or_else(|| stale(&file.name))
    }
    /// Puts another disk in the place of one, between two requests, and returns the former. After a change
    /// of size the kernel must be told: [`crate::serve::fuse::Session::size_changed`].
    pub fn replace(&self, ino: u64, disk: Arc<dyn Disk>) -> Result<Arc<dyn Disk>> {
        let file = self.find(ino)?;
        let mut place = file.disk.write();
        match place.as_mut() {
            Some(now) => Ok(std::mem::replace(now, disk)),
            None => Err(stale(&file.name)),
        }
    }
    /// Runs `work` while no request is under way on the file; those that come wait. For milliseconds:
    /// each of them holds a worker meanwhile.
    pub fn quiesce<R>(&self, ino: u64, work: impl FnOnce(&Arc<dyn Disk>) -> R) -> Result<R> {
        let file = self.find(ino)?;
        let place = file.disk.write();
        match place.as_ref() {
            Some(disk) => Ok(work(disk)),
            None => Err(stale(&file.name)),
        }
    }
    /// All files, by number.
    pub fn list(&self) -> Vec<FileInfo> {
        let files: Vec<_> = self.table.read().by_ino.values().cloned().collect();
        files.iter().filter_map(|f| f.info()).collect()
    }
    /// What keeps processors awake for them.
    pub fn awake(&self) -> &Awake {
        &self.awake
    }
    /// Counters over all files there ever were.
    pub fn total(&self) -> Stats {
        self.total.stats()
    }
    /// How many there are, and how many bytes they have together.
    pub fn extent(&self) -> (u64, u64) {
        let files: Vec<_> = self.table.read().by_ino.values().cloned().collect();
        let size = |f: &Arc<ServedFile>| f.disk().map_or(0, |d| d.size());
        (
            files.len() as u64,
            files.iter().map(size).fold(0, u64::saturating_add),
        )
    }
}
