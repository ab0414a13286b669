//! Mounts: what is mounted where, mounting a block device, and unmounting.

use crate::{
    error::{Error, Kind, Result},
    sys::probe::{self, Content},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};
use std::{
    ffi::{CString, OsString},
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One line of `mountinfo`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The kernel's number of the mount.
    pub id: u64,
    /// Major and minor number of the filesystem's device (anonymous for some filesystems).
    pub device: (u32, u32),
    /// Which directory of the filesystem is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Options of the mount, such as `rw,relatime`.
    pub options: String,
    /// The filesystem's type.
    pub fs_type: String,
    /// What is mounted, as it was given to mount(2): mostly a device.
    pub source: PathBuf,
}

impl Mount {
    /// Is this a mount of the block device at `device` with the device number `rdev`? By number, or, for
    /// filesystems that number themselves (btrfs), by the path it was mounted from.
    pub fn is_of(&self, device: &Path, rdev: u64) -> bool {
        let number = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        self.device == number || (self.device.0 == 0 && self.source == device)
    }
}

/// Undoes the octal escapes (`\040` is a space) of the kernel's tables.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        rest = match (first, tail) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                after
            }
            _ => {
                out.push(first);
                tail
            }
        };
    }
    OsString::from_vec(out)
}

/// Reads the text of a `mountinfo` file. Lines of an unknown form are left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&c| c == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|&c| c == b' ').collect();
    let text = |i: usize| fields.get(i).and_then(|f| std::str::from_utf8(f).ok());
    // Between the options and the dash stand any number of optional fields.
    let dash = 6 + fields.get(6..)?.iter().position(|f| *f == b"-")?;
    let (major, minor) = text(2)?.split_once(':')?;
    Some(Mount {
        id: text(0)?.parse().ok()?,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root: unescape(fields.get(3)?).into(),
        mount_point: unescape(fields.get(4)?).into(),
        options: text(5)?.to_string(),
        fs_type: unescape(fields.get(dash + 1)?)
            .to_string_lossy()
            .into_owned(),
        source: unescape(fields.get(dash + 2)?).into(),
    })
}

/// All mounts of this process's namespace, in the order of mounting.
pub fn list() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    Ok(parse(
        &fs::read(path).map_err(|e| Error::io("read", path, &e))?,
    ))
}

/// What is mounted at exactly this directory (the uppermost, if several are).
pub fn at(mount_point: &Path) -> Result<Option<Mount>> {
    // Not canonicalised: that would ask a filesystem that may be dead. An absolute path is enough.
    let mount_point =
        std::path::absolute(mount_point).map_err(|e| Error::io("look at", mount_point, &e))?;
    Ok(list()?
        .into_iter()
        .rev()
        .find(|m| m.mount_point == mount_point))
}

/// How to mount.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Options {
    /// Mount read-only.
    pub read_only: bool,
    /// The filesystem's type; guessed where not given.
    pub fs_type: Option<String>,
    /// Options for the filesystem, separated by commas.
    pub data: Option<String>,
}

/// What [`mount`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mounted {
    /// The filesystem's type.
    pub fs_type: String,
    /// The journal needs replay and the device is read-only, so the filesystem is shown without what its
    /// journal holds: files changed shortly before the end may be old, missing or damaged. A writable
    /// fork of the same disk mounts with everything.
    pub without_journal: bool,
}

/// Mounts a block device on a directory.
pub fn mount(device: &Path, dir: &Path, options: &Options) -> Result<Mounted> {
    let meta = fs::metadata(dir).map_err(|e| {
        Error::io("mount on", dir, &e).or_hint("create the directory first: `mkdir -p DIR`")
    })?;
    if !meta.is_dir() {
        return Err(Error::new(
            Kind::Invalid,
            format!("{} is not a directory", dir.display()),
        )
        .hint("name a directory to mount on"));
    }
    let content = match &options.fs_type {
        Some(_) => Content::Unknown,
        None => probe::probe(device).map_err(|e| Error::io("read", device, &e))?,
    };
    let candidates: Vec<String> = match (&options.fs_type, content) {
        (Some(fs_type), _) => vec![fs_type.clone()],
        (None, Content::Filesystem(types)) => types.iter().map(|t| (*t).to_string()).collect(),
        (None, Content::Other(what)) => {
            return Err(Error::new(Kind::Unsupported, format!("{} holds {what}, not a filesystem", device.display()))
                .hint("attach without --mount and set up what is inside with its own tools (partx, cryptsetup, vgchange)"));
        }
        (None, Content::Unknown) => known_filesystems()?,
    };
    let mut last = Errno::NODEV;
    for fs_type in &candidates {
        match try_mount(device, dir, fs_type, options) {
            Ok(without_journal) => {
                return Ok(Mounted {
                    fs_type: fs_type.clone(),
                    without_journal,
                });
            }
            // Not this type, or no such driver: the next one may know better.
            Err(e @ (Errno::INVAL | Errno::NODEV)) => last = e,
            Err(e) => {
                let error = Error::io("mount", device, &e.into());
                return Err(match e {
                    Errno::BUSY => {
                        error.hint("it is mounted already, or something else is mounted there")
                    }
                    Errno::UCLEAN => {
                        error.hint("the filesystem is damaged: check it with its fsck")
                    }
                    Errno::ROFS => error.hint("the disk is attached read-only: mount it read-only"),
                    _ => error.or_hint("see the kernel's log: `dmesg | tail`"),
                });
            }
        }
    }
    let error = Error::io("mount", device, &last.into()).with_kind(Kind::Unsupported);
    Err(match content {
        Content::Unknown if options.fs_type.is_none() => error.hint(
            "no filesystem was recognised on it: make one first, for instance with mkfs.ext4",
        ),
        _ => error.hint("does this kernel have the filesystem's driver? see `dmesg | tail`"),
    })
}

/// Filesystems of this kernel that live on a device.
fn known_filesystems() -> Result<Vec<String>> {
    let path = "/proc/filesystems";
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    let types = text.lines().filter_map(|l| l.strip_prefix('\t'));
    Ok(types
        .filter(|t| *t != "fuseblk")
        .map(str::to_string)
        .collect())
}

/// `true`: mounted without its journal.
fn try_mount(device: &Path, dir: &Path, fs_type: &str, options: &Options) -> Result<bool, Errno> {
    let mut flags = MountFlags::empty();
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    // Forks of one image carry one UUID, and xfs mounts only one of each unless told not to look.
    let always = if fs_type == "xfs" { "nouuid" } else { "" };
    // A journal that needs replay cannot be replayed on a read-only device. Rather an older view than none.
    let without_replay = match fs_type {
        "ext3" | "ext4" => Some("noload"),
        "xfs" => Some("norecovery"),
        "btrfs" => Some("rescue=nologreplay"),
        _ => None,
    };
    let attempt = |extra: &str| {
        let user = options.data.as_deref().unwrap_or("");
        let data: Vec<&str> = [always, extra, user]
            .into_iter()
            .filter(|d| !d.is_empty())
            .collect();
        let data = CString::new(data.join(",")).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount(device, dir, fs_type, flags, data.as_c_str())
    };
    match (attempt(""), without_replay) {
        (Err(Errno::ROFS | Errno::ACCESS | Errno::PERM), Some(extra)) if options.read_only => {
            attempt(extra).map(|()| true)
        }
        (result, _) => result.map(|()| false),
    }
}

/// Unmounts what is mounted at `dir`. Who keeps it busy is for the caller to find
/// ([`crate::sys::holders`]).
pub fn unmount(dir: &Path) -> Result<()> {
    unmount_with(dir, UnmountFlags::empty())
}

/// Takes the mount out of sight at once; it ends when the last user leaves.
pub fn unmount_lazily(dir: &Path) -> Result<()> {
    unmount_with(dir, UnmountFlags::DETACH)
}

fn unmount_with(dir: &Path, flags: UnmountFlags) -> Result<()> {
    rustix::mount::unmount(dir, flags | UnmountFlags::NOFOLLOW).map_err(|e| {
        let error = Error::io("unmount", dir, &e.into());
        match e {
            Errno::INVAL => error
                .with_kind(Kind::NotFound)
                .hint("nothing is mounted there: see `forkdisk ls attached`"),
            Errno::BUSY => error.hint("stop what uses it (`fuser -vm DIR`), then try again"),
            _ => error,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_read_with_its_escapes() {
        let text = b"36 35 98:0 /mnt1 /mnt/with\\040space rw,noatime master:1 shared:2 - ext3 /dev/lo\\134op errors=continue\n\
                     22 1 0:21 / /proc rw - proc proc rw\n\
                     nonsense\n\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mount_point, Path::new("/mnt/with space"));
        assert_eq!(mounts[0].source, Path::new("/dev/lo\\op"));
        assert_eq!((mounts[0].id, mounts[0].device), (36, (98, 0)));
        assert_eq!(
            (mounts[0].fs_type.as_str(), mounts[0].options.as_str()),
            ("ext3", "rw,noatime")
        );
        assert_eq!(mounts[1].fs_type, "proc");
        assert!(mounts[0].is_of(Path::new("/x"), rustix::fs::makedev(98, 0)));
        assert!(!mounts[0].is_of(Path::new("/x"), rustix::fs::makedev(98, 1)));
    }

    #[test]
    fn the_own_mounts_are_read() {
        assert!(list().unwrap().iter().any(|m| m.fs_type == "proc"));
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
        assert_eq!(at(Path::new("/proc/self")).unwrap(), None);
    }
}
