//! Disks that exist for tests: in memory, in a file, slow, failing.

use forkdisk::sys::blocking;
use forkdisk::{
    disk::{Disk, Extent, Source},
    error::{Error, Kind, Result},
    units::{BLOCK, BLOCK_SIZE, Slot},
};
use parking_lot::{Mutex, RwLock};
use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    time::Duration,
};

fn check(size: u64, at: u64, len: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            Kind::Invalid,
            format!("{len} bytes at {at} are out of range"),
        )),
    }
}

/// What a [`MemDisk`] was asked for.
#[derive(Default)]
pub struct Asked {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub tidied: AtomicU64,
    pub begun: AtomicU64,
    /// Where reads were begun or served.
    pub places: Mutex<BTreeSet<u64>>,
    pub discards: Mutex<Vec<(u64, u64)>>,
    pub zeroes: Mutex<Vec<(u64, u64)>>,
}

type Block = Option<Box<[u8; BLOCK_SIZE]>>;

/// A sparse disk in memory.
pub struct MemDisk {
    blocks: Vec<RwLock<Block>>,
    pub asked: Asked,
    pub read_only: bool,
    /// What to fail with, if anything.
    pub fail: Mutex<Option<Kind>>,
    /// Are writers to wait for room?
    pub full: AtomicBool,
    /// Do its writes leave something to be done?
    pub filling: AtomicBool,
    /// Who holds it keeps whoever tidies.
    pub untidy: Mutex<()>,
    /// Who holds it keeps whoever reads.
    pub held: Mutex<()>,
    /// How long each read takes at least.
    pub read_delay: Duration,
    /// How long each write takes at least, before it is seen.
    pub write_delay: Duration,
    /// Do they say so, as a file of the host does?
    pub says_so: bool,
    /// Can a read be begun before it is asked for?
    pub begins: bool,
}

impl MemDisk {
    pub fn new(size: u64) -> MemDisk {
        MemDisk {
            blocks: (0..size / BLOCK).map(|_| RwLock::new(None)).collect(),
            asked: Asked::default(),
            read_only: false,
            fail: Mutex::new(None),
            full: AtomicBool::new(false),
            filling: AtomicBool::new(false),
            untidy: Mutex::new(()),
            held: Mutex::new(()),
            read_delay: Duration::ZERO,
            write_delay: Duration::ZERO,
            says_so: true,
            begins: false,
        }
    }
    fn failing(&self) -> Result<()> {
        match *self.fail.lock() {
            Some(kind) => Err(Error::new(kind, "told to fail")),
            None => Ok(()),
        }
    }
    /// Calls `f` with the block and the part of it that each piece of the range is.
    fn pieces(&self, at: u64, len: u64, mut f: impl FnMut(&RwLock<Block>, usize, usize, usize)) {
        let (mut done, len) = (0, len as usize);
        while done < len {
            let here = at + done as u64;
            let start = (here % BLOCK) as usize;
            let n = (BLOCK_SIZE - start).min(len - done);
            f(&self.blocks[(here / BLOCK) as usize], start, n, done);
            done += n;
        }
    }
    /// Parts of blocks cannot become zeros without room.
    fn room_for_parts(&self, at: u64, len: u64) -> Result<()> {
        match self.full.load(SeqCst) && !(at | len).is_multiple_of(BLOCK) {
            true => Err(Error::new(Kind::NoSpace, "told to be full").and_waits()),
            false => Ok(()),
        }
    }
    fn zero(&self, at: u64, len: u64) {
        self.pieces(at, len, |block, start, n, _| {
            let mut block = block.write();
            if n == BLOCK_SIZE {
                *block = None;
            } else if let Some(bytes) = block.as_mut() {
                bytes[start..start + n].fill(0);
            }
        });
    }
}

impl Disk for MemDisk {
    fn size(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.asked.reads.fetch_add(1, SeqCst);
        self.asked.places.lock().insert(at);
        self.failing()?;
        check(self.size(), at, buf.len() as u64)?;
        drop(self.held.lock());
        if !self.read_delay.is_zero() {
            let sleep = || std::thread::sleep(self.read_delay);
            match self.says_so {
                true => blocking::wait(sleep),
                false => sleep(),
            }
        }
        self.pieces(
            at,
            buf.len() as u64,
            |block, start, n, done| match &*block.read() {
                Some(bytes) => buf[done..done + n].copy_from_slice(&bytes[start..start + n]),
                None => buf[done..done + n].fill(0),
            },
        );
        Ok(())
    }
    fn begin_read(&self, at: u64, _: u64) -> bool {
        if self.begins {
            self.asked.begun.fetch_add(1, SeqCst);
            self.asked.places.lock().insert(at);
        }
        self.begins
    }
    fn write(&self, buf: &[u8], at: u64) -> Result<()> {
        self.asked.writes.fetch_add(1, SeqCst);
        self.failing()?;
        if self.full.load(SeqCst) {
            return Err(Error::new(Kind::NoSpace, "told to be full").and_waits());
        }
        check(self.size(), at, buf.len() as u64)?;
        if !self.write_delay.is_zero() {
            blocking::wait(|| std::thread::sleep(self.write_delay));
        }
        self.pieces(at, buf.len() as u64, |block, start, n, done| {
            let mut block = block.write();
            let bytes = block.get_or_insert_with(|| Box::new([0; BLOCK_SIZE]));
            bytes[start..start + n].copy_from_slice(&buf[done..done + n]);
        });
        Ok(())
    }
    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.asked.discards.lock().push((at, len));
        self.failing()?;
        self.room_for_parts(at, len)?;
        check(self.size(), at, len)?;
        self.zero(at, len);
        Ok(())
    }
    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.asked.zeroes.lock().push((at, len));
        self.failing()?;
        self.room_for_parts(at, len)?;
        check(self.size(), at, len)?;
        self.zero(at, len);
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        self.asked.flushes.fetch_add(1, SeqCst);
        self.failing()
    }
    fn is_filling(&self) -> bool {
        self.filling.load(SeqCst)
    }
    fn tidy(&self) {
        let _held = self.untidy.lock();
        self.asked.tidied.fetch_add(1, SeqCst);
    }
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let mut out: Vec<Extent> = Vec::new();
        for i in at / BLOCK..(at + len).div_ceil(BLOCK) {
            let is_data = self.blocks[i as usize].read().is_some();
            let from = if is_data {
                Source::Layer {
                    depth: 0,
                    slot: Slot(0),
                }
            } else {
                Source::Absent
            };
            match out.last_mut() {
                Some(last) if last.from == from => last.len += BLOCK,
                _ => out.push(Extent {
                    at: i * BLOCK,
                    len: BLOCK,
                    from,
                }),
            }
        }
        Ok(out)
    }
}

/// A disk in a file, so that two processes can serve it one after the other.
pub struct FileDisk {
    file: File,
    size: u64,
    /// How long each request takes at least: so that some are always under way.
    delay: Duration,
}

impl FileDisk {
    pub fn open(path: &Path, delay: Duration) -> FileDisk {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let size = file.metadata().unwrap().len();
        FileDisk { file, size, delay }
    }
    fn io<R>(&self, r: std::io::Result<R>) -> Result<R> {
        blocking::wait(|| std::thread::sleep(self.delay));
        r.map_err(|e| Error::io("use", "the disk's file", &e))
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.io(self.file.read_exact_at(buf, at))
    }
    /// Nothing is known to be in memory.
    fn begin_read(&self, _: u64, _: u64) -> bool {
        true
    }
    fn write(&self, buf: &[u8], at: u64) -> Result<()> {
        // In two halves with a pause between them: a death in the middle leaves a torn write, which its
        // repetition must mend.
        let half = buf.len() / 2;
        self.io(self.file.write_all_at(&buf[..half], at))?;
        self.io(self.file.write_all_at(&buf[half..], at + half as u64))
    }
    fn discard(&self, at: u64, len: u64) -> Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.io(fallocate(&self.file, flags, at, len).map_err(Into::into))
    }
    fn flush(&self) -> Result<()> {
        self.io(self.file.sync_data())
    }
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        Ok(vec![Extent {
            at,
            len,
            from: Source::Base,
        }])
    }
}
