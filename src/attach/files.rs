//! Which files changed blocks of a device belong to.
//!
//! Two devices with states of one filesystem, ext4 or xfs, are mounted read-only where nobody else sees them, and their trees are walked side by
//! side. Nothing is followed: no link, no other filesystem.
//!
//! Always true: both mounts are gone when it returns, and also if the process is killed.

use crate::error::{Error, Kind, Result};
use crate::sys::{fiemap, probe, unseen};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, openat, statat};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::{ffi::OsStrExt, fs::FileExt};
use std::path::{Path, PathBuf};

/// What became of a path.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Change {
    /// Only the upper state has it.
    Added,
    /// Both have it, and it is not the same.
    Changed,
    /// Only the lower state has it.
    Deleted,
}

impl Change {
    /// The word used in tables and JSON: `added`, `changed`, `deleted`.
    pub fn word(self) -> &'static str {
        match self {
            Change::Added => "added",
            Change::Changed => "changed",
            Change::Deleted => "deleted",
        }
    }
}

/// A path that differs between the two states.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChangedFile {
    /// Where it is, from the top of the filesystem on: `etc/hosts`.
    pub path: PathBuf,
    /// What became of it.
    pub change: Change,
    /// `f` for a file, `d` for a directory, `l` for a symbolic link, `-` for anything else.
    pub kind: char,
    /// Changed bytes of the device that are its data: in the upper state, or in the lower one if it is deleted.
    pub bytes: u64,
}

/// What was found besides the files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// `ext4` or `xfs`.
    pub fs_type: String,
    /// Changed bytes that are the data of no file: the filesystem's own.
    pub metadata: u64,
    /// A journal would have to be replayed, which needs a device that can be written: the latest changes may not be seen as files. A snapshot
    /// that was taken with `--freeze` needs none; of xfs this is said all the same, which leaves something in its journal.
    pub without_journal: bool,
}

/// Tells `each` the paths that differ between the filesystems of two devices: those of a directory, then those in its directories. `ranges` are the bytes in which
/// the devices differ: disjoint, in order. `Interrupted` once `cancelled` says so.
pub fn changed_files(
    upper: &Path,
    lower: &Path,
    ranges: &[Range<u64>],
    cancelled: &dyn Fn() -> bool,
    each: &mut dyn FnMut(ChangedFile) -> Result<()>,
) -> Result<Summary> {
    let Some(fs_type) = known_type(upper)? else {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{} holds no ext4 and no xfs filesystem", upper.display()),
        )
        .hint("leave out --files: then the blocks that differ are listed"));
    };
    let (top, mut without_journal) = mount(upper, fs_type)?;
    // A state from before the filesystem was made has no files.
    let below = match known_type(lower)? {
        Some(other) if other == fs_type => Some(mount(lower, fs_type)?),
        Some(other) => {
            return Err(Error::new(
                Kind::Unsupported,
                format!("one holds an {other} filesystem, the other an {fs_type} filesystem: their files do not compare"),
            )
            .hint("leave out --files: then the blocks that differ are listed"));
        }
        None => None,
    };
    without_journal |= below.as_ref().is_some_and(|(_, without)| *without);
    let unit = block_size(&top, upper)?;
    let narrow = match unit < GRAIN {
        // Blocks of several files may share one of the device's.
        true => Some(narrowed(upper, lower, ranges, unit, cancelled)?),
        false => None,
    };
    let ranges = narrow.as_deref().unwrap_or(ranges);
    let mut walk = Walk {
        ranges,
        left: ranges.iter().map(|r| (r.start, r.end)).collect(),
        cancelled,
        each,
    };
    walk.run(top, below.map(|(top, _)| top))?;
    Ok(Summary {
        fs_type: fs_type.to_string(),
        metadata: walk.left.iter().map(|(start, end)| end - start).sum(),
        without_journal,
    })
}

/// What the ranges in which two devices differ are multiples of.
const GRAIN: u64 = 4096;

/// Bytes read of each device at once.
const PIECE: u64 = 1 << 20;

/// Bytes of a block of the filesystem.
fn block_size(top: &OwnedFd, device: &Path) -> Result<u64> {
    let stat = rustix::fs::fstatfs(top).map_err(|e| Error::io("look at", device, &e.into()))?;
    let size = u64::try_from(stat.f_bsize).unwrap_or(GRAIN);
    Ok(if size.is_power_of_two() { size } else { GRAIN })
}

/// The blocks of `unit` bytes in which two devices differ, within `ranges`.
fn narrowed(
    upper: &Path,
    lower: &Path,
    ranges: &[Range<u64>],
    unit: u64,
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<Range<u64>>> {
    let open = |path: &Path| File::open(path).map_err(|e| Error::io("open", path, &e));
    let devices = [(open(upper)?, upper), (open(lower)?, lower)];
    let mut pieces = [vec![0; PIECE as usize], vec![0; PIECE as usize]];
    let mut found: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        for at in (range.start..range.end).step_by(PIECE as usize) {
            if cancelled() {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
            let n = PIECE.min(range.end - at) as usize;
            for ((device, path), piece) in devices.iter().zip(&mut pieces) {
                // Past the end of the shorter one there are zeros.
                piece.fill(0);
                let mut done = 0;
                while done < n {
                    match device.read_at(&mut piece[done..n], at + done as u64) {
                        Ok(0) => break,
                        Ok(more) => done += more,
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(Error::io("read", path, &e)),
                    }
                }
            }
            let [one, two] = pieces
                .each_ref()
                .map(|piece| piece[..n].chunks(unit as usize));
            for (start, (one, two)) in (at..).step_by(unit as usize).zip(one.zip(two)) {
                let end = start + one.len() as u64;
                match found.last_mut() {
                    _ if one == two => {}
                    Some(last) if last.end == start => last.end = end,
                    _ => found.push(start..end),
                }
            }
        }
    }
    Ok(found)
}

/// The driver of a filesystem whose files can be found.
fn known_type(device: &Path) -> Result<Option<&'static str>> {
    let content = probe::probe(device).map_err(|e| Error::io("read", device, &e))?;
    Ok(match content {
        probe::Content::Filesystem(types) if types.contains(&"ext4") => Some("ext4"),
        probe::Content::Filesystem(types) if types.contains(&"xfs") => Some("xfs"),
        _ => None,
    })
}

/// Mounts it; and says whether without its journal, which cannot be replayed on what is read-only.
fn mount(device: &Path, fs_type: &str) -> Result<(OwnedFd, bool)> {
    let (with, without): (&[&str], &[&str]) = match fs_type {
        // Two states of one filesystem have one UUID.
        "xfs" => (&["nouuid"], &["nouuid", "norecovery"]),
        _ => (&[], &["noload"]),
    };
    let mounted = match unseen::mount(device, fs_type, with) {
        Err(Errno::ROFS | Errno::ACCESS) => {
            unseen::mount(device, fs_type, without).map(|m| (m, true))
        }
        other => other.map(|m| (m, false)),
    };
    mounted.map_err(|e| {
        let error = Error::io("mount", device, &e.into());
        match e {
            Errno::PERM => error.hint("only root can mount: use sudo"),
            Errno::UCLEAN => error.hint("the filesystem is damaged: check it with its fsck"),
            _ => error.or_hint("see the kernel's log: `dmesg | tail`"),
        }
    })
}

/// A directory that is being walked, in one of the states or in both.
struct Level {
    path: PathBuf,
    upper: Option<OwnedFd>,
    lower: Option<OwnedFd>,
    /// Directories in it that are still to be walked, and in which states.
    todo: Vec<(CString, bool, bool)>,
}

struct Walk<'a> {
    ranges: &'a [Range<u64>],
    /// What of them no file was found for: start and end.
    left: BTreeMap<u64, u64>,
    cancelled: &'a dyn Fn() -> bool,
    each: &'a mut dyn FnMut(ChangedFile) -> Result<()>,
}

impl Walk<'_> {
    fn run(&mut self, upper: OwnedFd, lower: Option<OwnedFd>) -> Result<()> {
        let top = self.level(PathBuf::new(), Some(upper), lower)?;
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            let Some((name, in_upper, in_lower)) = level.todo.pop() else {
                levels.pop();
                continue;
            };
            let path = level.path.join(OsStr::from_bytes(name.to_bytes()));
            let open = |dir: &Option<OwnedFd>, there: bool| match dir {
                Some(dir) if there => open_dir(dir, &name, &path).map(Some),
                _ => Ok(None),
            };
            let upper = open(&level.upper, in_upper)?;
            let lower = open(&level.lower, in_lower)?;
            let next = self.level(path, upper, lower)?;
            levels.push(next);
        }
        Ok(())
    }
    /// Looks at what is in a directory.
    fn level(
        &mut self,
        path: PathBuf,
        upper: Option<OwnedFd>,
        lower: Option<OwnedFd>,
    ) -> Result<Level> {
        let mut names = BTreeSet::new();
        for dir in [&upper, &lower].into_iter().flatten() {
            list(dir, &path, &mut names)?;
        }
        let mut level = Level {
            path,
            upper,
            lower,
            todo: Vec::new(),
        };
        for name in names {
            if (self.cancelled)() {
                return Err(Error::new(Kind::Interrupted, "interrupted"));
            }
            self.entry(&mut level, name)?;
        }
        // Taken from the end.
        level.todo.reverse();
        Ok(level)
    }
    fn entry(&mut self, level: &mut Level, name: CString) -> Result<()> {
        let path = level.path.join(OsStr::from_bytes(name.to_bytes()));
        let look = |dir: &Option<OwnedFd>| match dir {
            Some(dir) => look(dir, &name, &path),
            None => Ok(None),
        };
        let (upper, lower) = (look(&level.upper)?, look(&level.lower)?);
        let kind = |s: &Option<Stat>| s.as_ref().map(kind_of);
        let is_dir = |s: &Option<Stat>| kind(s) == Some('d');
        // What is something else now is another thing of the same name.
        let (old, new) = match (&upper, &lower) {
            (Some(_), Some(_)) if kind(&upper) == kind(&lower) => (None, None),
            _ => (lower.as_ref(), upper.as_ref()),
        };
        if let (Some(stat), Some(dir)) = (old, &level.lower) {
            let bytes = self.data(dir, &name, stat, &path)?;
            self.tell(&path, Change::Deleted, stat, bytes)?;
        }
        if let (Some(stat), Some(dir)) = (new, &level.upper) {
            let bytes = self.data(dir, &name, stat, &path)?;
            self.tell(&path, Change::Added, stat, bytes)?;
        }
        if let (None, None, Some(now), Some(then)) = (old, new, &upper, &lower)
            && let (Some(above), Some(below)) = (&level.upper, &level.lower)
        {
            let bytes = self.data(above, &name, now, &path)?;
            let differs = differ(now, then);
            if differs {
                // What it gave up is no metadata either.
                self.data(below, &name, then, &path)?;
            }
            if differs || bytes > 0 {
                self.tell(&path, Change::Changed, now, bytes)?;
            }
        }
        if is_dir(&upper) || is_dir(&lower) {
            level.todo.push((name, is_dir(&upper), is_dir(&lower)));
        }
        Ok(())
    }
    fn tell(&mut self, path: &Path, change: Change, stat: &Stat, bytes: u64) -> Result<()> {
        (self.each)(ChangedFile {
            path: path.to_path_buf(),
            change,
            kind: kind_of(stat),
            bytes,
        })
    }
    /// How many of the changed bytes are the data of a file.
    fn data(&mut self, dir: &OwnedFd, name: &CString, stat: &Stat, path: &Path) -> Result<u64> {
        // What has no blocks need not be asked.
        if kind_of(stat) != 'f' || stat.st_blocks == 0 || self.ranges.is_empty() {
            return Ok(0);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(dir, name, flags, Mode::empty());
        let file = file.map_err(|e| Error::io("open", path, &e.into()))?;
        let mut bytes = 0;
        fiemap::each_extent(file.as_fd(), |extent| {
            bytes += self.changed(extent.at, extent.at.saturating_add(extent.len));
        })
        .map_err(|e| Error::io("ask for the blocks of", path, &e))?;
        Ok(bytes)
    }
    /// How many bytes of `start..end` changed. They have a file now.
    fn changed(&mut self, start: u64, end: u64) -> u64 {
        let first = self.ranges.partition_point(|r| r.end <= start);
        let hit = self.ranges[first..].iter().take_while(|r| r.start < end);
        let total = hit.map(|r| r.end.min(end) - r.start.max(start)).sum();
        if total > 0 {
            take_out(&mut self.left, start, end);
        }
        total
    }
}

/// Takes `start..end` out of disjoint ranges.
fn take_out(ranges: &mut BTreeMap<u64, u64>, start: u64, end: u64) {
    let before = ranges.range(..start).next_back().map(|(&s, &e)| (s, e));
    if let Some((s, e)) = before.filter(|&(_, e)| e > start) {
        ranges.insert(s, start);
        if e > end {
            ranges.insert(end, e);
        }
    }
    while let Some((&s, &e)) = ranges.range(start..end).next() {
        ranges.remove(&s);
        if e > end {
            ranges.insert(end, e);
        }
    }
}

fn kind_of(stat: &Stat) -> char {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => 'f',
        FileType::Directory => 'd',
        FileType::Symlink => 'l',
        _ => '-',
    }
}

/// Is it another file, or the same with other contents or rights? The times and sizes of directories change with what is in them.
fn differ(now: &Stat, then: &Stat) -> bool {
    let rights = |s: &Stat| (s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_rdev);
    let contents = |s: &Stat| (s.st_size, s.st_mtime, s.st_mtime_nsec);
    rights(now) != rights(then) || (kind_of(now) != 'd' && contents(now) != contents(then))
}

fn open_dir(dir: &OwnedFd, name: &CString, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty()).map_err(|e| Error::io("open", path, &e.into()))
}

fn list(dir: &OwnedFd, path: &Path, names: &mut BTreeSet<CString>) -> Result<()> {
    let failed = |e: Errno| Error::io("list", Path::new("/").join(path), &io::Error::from(e));
    for entry in Dir::read_from(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.insert(name.to_owned());
        }
    }
    Ok(())
}

/// What stands under a name, if anything.
fn look(dir: &OwnedFd, name: &CString, path: &Path) -> Result<Option<Stat>> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(Error::io("look at", path, &e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_file_is_taken_out() {
        let mut left = BTreeMap::from([(0, 10), (20, 30), (40, 50)]);
        take_out(&mut left, 5, 6);
        take_out(&mut left, 25, 45);
        take_out(&mut left, 100, 200);
        assert_eq!(left, BTreeMap::from([(0, 5), (6, 10), (20, 25), (45, 50)]));
        take_out(&mut left, 0, 1000);
        assert!(left.is_empty());
    }

    #[test]
    fn changed_bytes_are_counted_where_they_meet() {
        let ranges = [0..10, 20..30];
        let mut walk = Walk {
            ranges: &ranges,
            left: ranges.iter().map(|r| (r.start, r.end)).collect(),
            cancelled: &|| false,
            each: &mut |_| Ok(()),
        };
        assert_eq!(walk.changed(5, 25), 10);
        assert_eq!(walk.changed(10, 20), 0);
        assert_eq!(walk.changed(29, 100), 1);
        // Shared by two files: of each.
        assert_eq!(walk.changed(5, 25), 10);
        assert_eq!(walk.left, BTreeMap::from([(0, 5), (25, 29)]));
    }
}
