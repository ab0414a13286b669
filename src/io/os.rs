//! The real disk: [`Dir`] and [`File`] on the system calls of Linux.
//!
//! Always true:
//! - every name is opened relative to its directory's descriptor and never followed out of it: it is one
//!   component (checked), and `O_NOFOLLOW` refuses a symbolic link there. `openat2` could promise no more for a
//!   single component, and is forbidden in some sandboxes;
//! - an open file is a regular file: a FIFO, device or directory in its place is told, not waited for;
//! - an interrupted call is repeated, a short one continued.
//!
//! Not here: caching, retries of failed syncs, and anything that knows what the bytes mean.

use super::{
    Access, Dir, EntryKind, File, Mapping,
    common::{
        check_name, check_range, copy_by_hand, fail, locked, past_end, read_only, wrong_type,
    },
};
use crate::error::{Error, Result};
use crate::sys::{blocking, fiemap};
use rustix::{
    fs::{self, AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom},
    io::{Errno, ReadWriteFlags, retry_on_intr},
};
use std::{
    io::IoSlice,
    num::NonZeroU64,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

/// `RWF_DONTCACHE` (Linux 6.14): written back at once, and dropped from memory when it has arrived.
const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
/// The kernel and the filesystem know it, as far as was seen.
static CAN_DROP: AtomicBool = AtomicBool::new(true);

/// New files are their owner's alone: they may hold a disk with secrets on it.
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// New directories likewise.
const DIR_MODE: Mode = Mode::RWXU;

/// A directory of the host.
#[derive(Debug)]
pub struct OsDir {
    fd: OwnedFd,
    path: PathBuf,
}

/// A regular file of the host, opened through an [`OsDir`].
#[derive(Debug)]
pub struct OsFile {
    fd: OwnedFd,
    path: PathBuf,
    writable: bool,
}

impl OsDir {
    /// Opens a directory by its path, which may lead through symbolic links: it is the user's own word.
    pub fn open(path: &Path) -> Result<OsDir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| fs::open(path, flags, Mode::empty()))
            .map_err(|e| fail("open", path, e.raw_os_error()))?;
        let path = path.to_path_buf();
        Ok(OsDir { fd, path })
    }
    /// Opens a directory by its path after having created it and its missing ancestors, for the owner
    /// alone. Their names are durable on return.
    pub fn create(path: &Path) -> Result<OsDir> {
        let mut missing = Vec::new();
        let mut here = path;
        while !here.as_os_str().is_empty() && !here.exists() {
            missing.push(here);
            match here.parent() {
                Some(parent) => here = parent,
                None => break,
            }
        }
        for dir in missing.into_iter().rev() {
            match retry_on_intr(|| fs::mkdir(dir, DIR_MODE)) {
                Ok(()) => {}
                // Another process was faster. That it is a directory shows when it is opened.
                Err(Errno::EXIST) => continue,
                Err(e) => return Err(fail("create", dir, e.raw_os_error())),
            }
            let parent = match dir.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            OsDir::open(parent)?.sync()?;
        }
        OsDir::open(path)
    }
    /// Takes reading and writing from everybody but the owner: what is in it will be the owner's alone.
    pub fn make_private(&self) -> Result<()> {
        match retry_on_intr(|| fs::fchmod(&self.fd, DIR_MODE)) {
            // Somebody else's directory that this user may write to; or a filesystem without modes.
            Err(Errno::PERM | Errno::OPNOTSUPP) => Ok(()),
            done => done.map_err(|e| fail("protect", &self.path, e.raw_os_error())),
        }
    }
    fn at(&self, name: &str) -> Result<PathBuf> {
        check_name(&self.path, name)?;
        Ok(self.path.join(name))
    }
    fn kind_of(&self, name: impl rustix::path::Arg + Copy) -> Result<Option<EntryKind>, Errno> {
        match retry_on_intr(|| fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)) {
            Ok(stat) => Ok(Some(entry_kind(FileType::from_raw_mode(stat.st_mode)))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn entry_kind(file_type: FileType) -> EntryKind {
    match file_type {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Dir,
        _ => EntryKind::Other,
    }
}

impl Dir for OsDir {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let path = self.at(name)?;
        let what = match access {
            Access::CreateNew => "create",
            Access::Read | Access::Write => "open",
        };
        let told = |e: Errno| fail(what, &path, e.raw_os_error());
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        if access == Access::CreateNew {
            // What O_EXCL has just made is a regular file: nothing has to be asked of it.
            let flags = flags | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
            let fd = retry_on_intr(|| fs::openat(&self.fd, name, flags, FILE_MODE));
            return Ok(Arc::new(OsFile {
                fd: fd.map_err(told)?,
                writable: true,
                path,
            }));
        }
        // O_NONBLOCK: opening a FIFO would wait for its other end.
        let flags = flags | OFlags::NONBLOCK;
        let flags = match access {
            Access::Read => flags | OFlags::RDONLY,
            Access::Write | Access::CreateNew => flags | OFlags::RDWR,
        };
        let fd =
            retry_on_intr(|| fs::openat(&self.fd, name, flags, Mode::empty())).map_err(told)?;
        let stat = fs::fstat(&fd).map_err(told)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(told(Errno::ISDIR)),
            FileType::Fifo => {
                return Err(wrong_type(what, &path, "a FIFO where a file belongs"));
            }
            _ => return Err(told(Errno::NXIO)),
        }
        // The descriptor is handed out (`fd`), and some users of descriptors take O_NONBLOCK at its word.
        // It is the only one of the flags set above that can still be changed.
        fs::fcntl_setfl(&fd, OFlags::empty()).map_err(told)?;
        Ok(Arc::new(OsFile {
            fd,
            writable: access != Access::Read,
            path,
        }))
    }

    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>> {
        let path = self.at(name)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| fs::openat(&self.fd, name, flags, Mode::empty()))
            .map_err(|e| fail("open", &path, e.raw_os_error()))?;
        Ok(Arc::new(OsDir { fd, path }))
    }

    fn create_dir(&self, name: &str) -> Result<()> {
        let path = self.at(name)?;
        retry_on_intr(|| fs::mkdirat(&self.fd, name, DIR_MODE))
            .map_err(|e| fail("create", &path, e.raw_os_error()))
    }

    fn list(&self) -> Result<Vec<(String, EntryKind)>> {
        let told = |e: Errno| fail("list", &self.path, e.raw_os_error());
        let mut entries = Vec::new();
        // Opens the directory anew: the position of the descriptor is shared, also between threads.
        for entry in fs::Dir::read_from(&self.fd).map_err(told)? {
            let entry = entry.map_err(told)?;
            let name = match entry.file_name().to_str() {
                Ok("." | "..") => continue,
                Ok(name) => name.to_string(),
                // No name of ours: shown as well as can be, and as nothing that could be opened.
                Err(_) => {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    entries.push((name, EntryKind::Other));
                    continue;
                }
            };
            let kind = match entry.file_type() {
                FileType::Unknown => self.kind_of(entry.file_name()).map_err(told)?,
                known => Some(entry_kind(known)),
            };
            // `None`: removed since it was read.
            entries.extend(kind.map(|kind| (name, kind)));
        }
        Ok(entries)
    }

    fn entry(&self, name: &str) -> Result<Option<EntryKind>> {
        let path = self.at(name)?;
        self.kind_of(name)
            .map_err(|e| fail("look at", &path, e.raw_os_error()))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let path = self.at(from)?;
        let new = self.at(to)?;
        retry_on_intr(|| fs::renameat(&self.fd, from, &self.fd, to)).map_err(|e| {
            fail("rename", &path, e.raw_os_error())
                .context(format!("cannot rename {from} to {}", new.display()))
        })
    }

    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        let path = self.at(from)?;
        let new = self.at(to)?;
        let flags = fs::RenameFlags::NOREPLACE;
        retry_on_intr(|| fs::renameat_with(&self.fd, from, &self.fd, to, flags)).map_err(|e| {
            let e = match e {
                // What filesystems answer that do not know the flag.
                Errno::INVAL => fail("rename", &path, libc::EOPNOTSUPP),
                Errno::EXIST => fail("replace", &new, libc::EEXIST),
                e => fail("rename", &path, e.raw_os_error()),
            };
            e.context(format!("cannot rename {from} to {}", new.display()))
        })
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.at(name)?;
        retry_on_intr(|| fs::unlinkat(&self.fd, name, AtFlags::empty()))
            .map_err(|e| fail("remove", &path, e.raw_os_error()))
    }

    fn remove_dir(&self, name: &str) -> Result<()> {
        let path = self.at(name)?;
        retry_on_intr(|| fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR))
            .map_err(|e| fail("remove", &path, e.raw_os_error()))
    }

    fn sync(&self) -> Result<()> {
        retry_on_intr(|| fs::fsync(&self.fd))
            .map_err(|e| fail("sync", &self.path, e.raw_os_error()))
    }

    fn sync_filesystem(&self) -> Result<()> {
        retry_on_intr(|| fs::syncfs(&self.fd))
            .map_err(|e| fail("sync the filesystem of", &self.path, e.raw_os_error()))
    }

    fn path(&self) -> PathBuf {
        self.path.clone()
    }
}

/// From this length on a read asks the disk for all of it at once: the kernel's readahead goes in steps of 128 KiB unless told otherwise.
const LARGE: usize = 64 << 10;

impl OsFile {
    /// Reads as much of the beginning of the range as is in memory, without waiting for the disk; how much that is.
    fn read_cached(&self, buf: &mut [u8], at: u64) -> usize {
        let mut parts = [std::io::IoSliceMut::new(buf)];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        // Errors are met again by the read that follows.
        rustix::io::preadv2(&self.fd, &mut parts, at, flags).unwrap_or(0)
    }
    fn fail(&self, what: &str, e: Errno) -> Error {
        fail(what, &self.path, e.raw_os_error())
    }
    /// Writes all of `buf`; the error says at which offset.
    fn write_with(
        &self,
        buf: &[u8],
        at: u64,
        flags: ReadWriteFlags,
    ) -> std::result::Result<(), (Errno, u64)> {
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let rest = &buf[done..];
            let written = match flags.is_empty() {
                true => rustix::io::pwrite(&self.fd, rest, here),
                false => rustix::io::pwritev2(&self.fd, &[IoSlice::new(rest)], here, flags),
            };
            match written {
                // No regular file does this; but to go round for ever would be worse than an error.
                Ok(0) => return Err((Errno::IO, here)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err((e, here)),
            }
        }
        Ok(())
    }
    fn writable(&self, what: &str) -> Result<()> {
        match self.writable {
            true => Ok(()),
            false => Err(read_only(what, &self.path)),
        }
    }
    fn fallocate(&self, what: &str, mode: FallocateFlags, at: u64, len: u64) -> Result<()> {
        self.writable(what)?;
        check_range(&self.path, at, len)?;
        if len == 0 {
            return Ok(());
        }
        let mode = mode | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| fs::fallocate(&self.fd, mode, at, len))
            .map_err(|e| self.fail(what, e).offset(at))
    }
}

/// Pages of a range that are on their way to the disk; 0 where the kernel does not tell (before 6.5). `sync_file_range(2)` could
/// wait for them, but an error that it reports is not reported again to a later `fdatasync(2)`.
fn pages_under_writeback(fd: &OwnedFd, at: u64, len: u64) -> u64 {
    /// The same on all architectures.
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        off: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { off: at, len };
    let mut stat = Stat::default();
    // SAFETY: the descriptor is open while it is borrowed; both pointers are to structures of the layout that the kernel's interface
    // has (include/uapi/linux/mman.h), which live until the call returns.
    let done = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if done == 0 { stat.writeback } else { 0 }
}

/// The largest piece of a file that the page cache keeps or forgets as a whole, where pages are of 4 KiB.
const FOLIO: u64 = 2 << 20;

impl File for OsFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let len = buf.len();
        if check_range(&self.path, at, len as u64).is_err() {
            return Err(past_end(&self.path, at, len));
        }
        let mut done = 0;
        if len >= LARGE || blocking::is_attended() {
            // What is in memory costs nothing more.
            done = self.read_cached(buf, at);
        }
        if len >= LARGE && done < len {
            // For the rest the kernel would send one request of the size of its readahead after the other.
            self.prefetch(at + done as u64, (len - done) as u64);
        }
        if done == len {
            return Ok(());
        }
        blocking::wait(|| {
            while done < len {
                let here = at + done as u64;
                match rustix::io::pread(&self.fd, &mut buf[done..], here) {
                    Ok(0) => return Err(past_end(&self.path, at, len)),
                    Ok(n) => done += n,
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(self.fail("read", e).offset(here)),
                }
            }
            Ok(())
        })
    }

    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.writable("write")?;
        check_range(&self.path, at, buf.len() as u64)?;
        self.write_with(buf, at, ReadWriteFlags::empty())
            .map_err(|(e, here)| self.fail("write", e).offset(here))
    }

    fn write_through(&self, buf: &[u8], at: u64) -> Result<()> {
        self.writable("write")?;
        check_range(&self.path, at, buf.len() as u64)?;
        let failed = |(e, here)| Err(self.fail("write", e).offset(here));
        if CAN_DROP.load(Relaxed) {
            match self.write_with(buf, at, DONTCACHE) {
                Ok(()) => return Ok(()),
                // Linux before 6.14, or a filesystem that cannot.
                Err((Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL, _)) => {
                    CAN_DROP.store(false, Relaxed);
                }
                Err(e) => return failed(e),
            }
        }
        self.write_at(buf, at)
    }

    fn sync(&self) -> Result<()> {
        blocking::wait(|| retry_on_intr(|| fs::fdatasync(&self.fd)))
            .map_err(|e| self.fail("sync", e))
    }

    fn len(&self) -> Result<u64> {
        let stat = fs::fstat(&self.fd).map_err(|e| self.fail("look at", e))?;
        Ok(stat.st_size as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.writable("resize")?;
        check_range(&self.path, len, 0)?;
        retry_on_intr(|| fs::ftruncate(&self.fd, len))
            .map_err(|e| self.fail("resize", e).offset(len))
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.fallocate("reserve space in", FallocateFlags::empty(), at, len)
    }

    fn punch(&self, at: u64, len: u64) -> Result<()> {
        self.fallocate("punch a hole into", FallocateFlags::PUNCH_HOLE, at, len)
    }

    fn copy_from(&self, source: &dyn File, from: u64, at: u64, len: u64) -> Result<()> {
        self.writable("write")?;
        check_range(&self.path, at, len)?;
        let mut done = 0;
        if let Some(fd) = source.fd() {
            while done < len {
                let (mut here, mut there) = (from + done, at + done);
                let n = (len - done) as usize;
                let copied =
                    fs::copy_file_range(fd, Some(&mut here), &self.fd, Some(&mut there), n);
                match copied {
                    Ok(n) if n > 0 => done += n as u64,
                    Err(Errno::INTR) => {}
                    Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => {
                        return Err(self.fail("copy into", e).offset(at + done));
                    }
                    // Between these two it cannot be done, or the source ends here: by hand it can, or it is told what is wrong.
                    Ok(_) | Err(_) => break,
                }
            }
        }
        copy_by_hand(self, source, from + done, at + done, len - done)
    }

    fn start_writeback(&self, at: u64, len: u64) {
        let Ok(end) = check_range(&self.path, at, len) else {
            return;
        };
        // A length of 0 would mean "to the end".
        if end == at {
            return;
        }
        let fd = self.fd.as_raw_fd();
        // SAFETY: takes three numbers and a descriptor that `self` keeps open; reads and writes no memory.
        // A failure is of no interest: the next sync reports it.
        unsafe {
            libc::sync_file_range(fd, at as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE);
        }
    }

    fn prefetch(&self, at: u64, len: u64) {
        if let (Ok(_), Some(len)) = (check_range(&self.path, at, len), NonZeroU64::new(len)) {
            // Nothing is lost if it fails.
            let _ = fs::fadvise(&self.fd, at, Some(len), fs::Advice::WillNeed);
        }
    }

    fn is_cached(&self, at: u64) -> bool {
        let mut byte = [0];
        let mut parts = [std::io::IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(&self.fd, &mut parts, at, ReadWriteFlags::NOWAIT) {
            Ok(n) => n == 1,
            // This filesystem cannot tell.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => true,
            Err(_) => false,
        }
    }

    fn await_writeback(&self, at: u64, len: u64) {
        if len == 0 || check_range(&self.path, at, len).is_err() {
            return;
        }
        blocking::wait(|| {
            // A disk that hangs is not made better by writers that hang.
            for _ in 0..1000 {
                if pages_under_writeback(&self.fd, at, len) == 0 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn forget_cached(&self, at: u64, len: u64) {
        // The kernel does not let go of a part of a large folio; these are aligned.
        let end = at.saturating_add(len).checked_next_multiple_of(FOLIO);
        let at = at / FOLIO * FOLIO;
        let len = end.map_or(u64::MAX, |end| end - at);
        // A length of 0, and one past the largest offset, mean "to the end".
        let len = NonZeroU64::new(len).filter(|l| l.get() <= i64::MAX as u64 - at);
        // Nothing is lost if it fails.
        let _ = fs::fadvise(&self.fd, at, len, fs::Advice::DontNeed);
    }

    fn keep_in_place(&self) {
        // Btrfs knows the flag; the others refuse it, and rewrite in place anyway.
        if let Ok(flags) = fs::ioctl_getflags(&self.fd) {
            let _ = fs::ioctl_setflags(&self.fd, flags | fs::IFlags::NOCOW);
        }
    }

    fn map(&self, at: u64, len: usize) -> Result<Mapping> {
        let end = check_range(&self.path, at, len as u64);
        if end.is_err() || end.is_ok_and(|end| end > self.len().unwrap_or(0)) {
            return Err(past_end(&self.path, at, len));
        }
        if len == 0 {
            return Ok(Mapping::Copied(Vec::new()));
        }
        // SAFETY: the range lies within the file (just checked), and the callers of `File::map` promise that it
        // is immutable, and the file not shortened, while it is mapped: sealed layers under the store's lock.
        let map = unsafe {
            memmap2::MmapOptions::new()
                .offset(at)
                .len(len)
                .map(&self.fd)
        };
        match map {
            Ok(map) => Ok(Mapping::Mapped(map)),
            Err(e) => Err(Error::io("map", &self.path, &e).offset(at)),
        }
    }

    fn lock(&self, exclusive: bool) -> Result<()> {
        let how = match exclusive {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        retry_on_intr(|| fs::flock(&self.fd, how)).map_err(|e| match e {
            Errno::WOULDBLOCK => locked(&self.path),
            e => self.fail("lock", e),
        })
    }

    fn written_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let end = check_range(&self.path, at, len)?;
        let end = end.min(self.len()?);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let told =
            fiemap::each_written(
                self.fd.as_fd(),
                at,
                end.saturating_sub(at),
                |at, len| match ranges.last_mut() {
                    Some((start, so_far)) if *start + *so_far == at => *so_far += len,
                    _ => ranges.push((at, len)),
                },
            );
        match told {
            Ok(()) => Ok(ranges),
            // tmpfs and others have no such call.
            Err(_) => self.data_ranges(at, len),
        }
    }

    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let end = check_range(&self.path, at, len)?;
        // Moves the file's position, which nobody uses: all reads and writes say where.
        let seek = |to: SeekFrom, here: u64| match retry_on_intr(|| fs::seek(&self.fd, to)) {
            Ok(found) => Ok(Some(found)),
            // Nothing (more) from here to the end of the file.
            Err(Errno::NXIO) => Ok(None),
            Err(e) => Err(self.fail("look for data in", e).offset(here)),
        };
        let mut ranges = Vec::new();
        let mut here = at;
        while here < end {
            let Some(data) = seek(SeekFrom::Data(here), here)? else {
                break;
            };
            if data >= end {
                break;
            }
            // `None`: shortened in between.
            let Some(hole) = seek(SeekFrom::Hole(data), data)? else {
                break;
            };
            let data = data.max(here);
            let hole = hole.min(end);
            if hole <= data {
                break;
            }
            ranges.push((data, hole - data));
            here = hole;
        }
        Ok(ranges)
    }

    fn host_room(&self) -> Option<(u64, u64)> {
        let host = fs::fstatvfs(&self.fd).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(host.f_frsize);
        Some((bytes(host.f_bavail), bytes(host.f_blocks)))
    }
    fn allocated(&self) -> Result<u64> {
        let stat = fs::fstat(&self.fd).map_err(|e| self.fail("look at", e))?;
        // In units of 512 bytes, whatever the filesystem's own.
        Ok(stat.st_blocks as u64 * 512)
    }

    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd.as_fd())
    }
}
