//! What this kernel, this filesystem and this user can do, and what to do about the rest.
//!
//! Always true: examining changes nothing that outlives it. What is tried out on the store's
//! filesystem is tried on a file without a name, or on one that is removed at once.

use crate::{
    daemon::{Client, Transport},
    serve::awake,
    store::Store,
    sys::{
        latency::{self, Latency},
        private,
    },
    units::BLOCK,
};
use rustix::{
    fs::{Access, AtFlags, CWD, FallocateFlags, Mode, OFlags},
    io::Errno,
    process::{Resource, geteuid, getrlimit},
};
use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

/// How a probe came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, with less.
    Warn,
    /// Something that is needed is missing.
    Fail,
}

impl Status {
    /// `ok`, `warn` or `fail`.
    pub fn word(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug)]
pub struct Probe {
    /// What: `kernel`, `fuse`, ...
    pub name: &'static str,
    /// How it came out.
    pub status: Status,
    /// The finding.
    pub message: String,
    /// What to do, unless it is as it should be.
    pub fix: Option<String>,
}

fn ok(name: &'static str, message: impl Into<String>) -> Probe {
    Probe {
        name,
        status: Status::Ok,
        message: message.into(),
        fix: None,
    }
}
fn warn(name: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Probe {
    Probe {
        name,
        status: Status::Warn,
        message: message.into(),
        fix: Some(fix.into()),
    }
}
fn fail(name: &'static str, message: impl Into<String>, fix: impl Into<String>) -> Probe {
    Probe {
        status: Status::Fail,
        ..warn(name, message, fix)
    }
}

/// Oldest kernel with all that is used: LOOP_CONFIGURE came with 5.8.
const KERNEL: (u32, u32) = (5, 8);
/// The kernel that sends requests again which a dead server had read: FUSE_NOTIFY_RESEND.
const RESEND: (u32, u32) = (6, 9);
/// Free space below which a store is of no use.
const LITTLE: u64 = 64 << 20;
/// Free space below which it is worth a warning.
const SCARCE: u64 = 1 << 30;
/// Descriptors: an attached disk holds one for each layer of its chain.
const FILES: u64 = 4096;

/// Looks at everything that matters for a store at `path`, which need not exist.
pub fn examine(path: &Path) -> Vec<Probe> {
    let root = geteuid().is_root();
    let mut probes = vec![
        kernel(),
        user(root),
        fuse(root),
        takeover(),
        loop_control(root),
    ];
    if !root {
        probes.push(fusermount());
    }
    probes.extend([uring(), idle(), files(), store(path)]);
    let place = existing(path);
    probes.push(filesystem(&place));
    match scratch(&place) {
        Ok((file, unnamed)) => {
            probes.push(punch(&file));
            probes.push(reflink(&place, &file));
            probes.push(tmpfile(unnamed));
        }
        Err(e) => probes.push(fail(
            "write access",
            format!("no file can be made in {}: {}", place.display(), text(e)),
            "run as the owner of the store, or use another one with -S",
        )),
    }
    probes.push(privacy(path));
    probes.push(space(&place));
    probes.push(daemon(path));
    probes
}

/// Who but the owner may change what is in the store.
fn privacy(path: &Path) -> Probe {
    let name = "privacy";
    let dirs = ["", "names", "layers", "bases", "run"].map(|dir| path.join(dir));
    // Before there is a store there is nothing to protect: it is made for its owner alone.
    let open: Vec<String> = dirs
        .iter()
        .filter(|_| path.join("forkdisk.toml").exists())
        .filter(|dir| private::open_to_others(dir).is_some())
        .map(|dir| dir.display().to_string().trim_end_matches('/').to_string())
        .collect();
    if open.is_empty() {
        return ok(name, "only the owner can change the store");
    }
    let all = open.join(" ");
    warn(
        name,
        format!("other users can change {all}"),
        format!("`chmod 700 {all}`"),
    )
}

fn text(e: Errno) -> String {
    let text = std::io::Error::from(e).to_string();
    text.split(" (os error").next().unwrap_or(&text).to_string()
}

/// The kernel's release, and the version in it.
fn release() -> (String, (u32, u32)) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (release, version)
}

/// Can another server go on when one dies?
fn takeover() -> Probe {
    let (release, version) = release();
    let (major, minor) = RESEND;
    match version >= RESEND {
        true => ok(
            "takeover",
            "attached disks survive the death and the upgrade of the daemon",
        ),
        false => warn(
            "takeover",
            format!(
                "{release} cannot send requests again: if the daemon dies, attached disks give I/O errors (what was flushed is safe)"
            ),
            format!(
                "Linux {major}.{minor} or newer; until then detach everything before an upgrade"
            ),
        ),
    }
}

fn kernel() -> Probe {
    let (release, version) = release();
    if version >= KERNEL {
        ok("kernel", release)
    } else {
        let (major, minor) = KERNEL;
        fail(
            "kernel",
            format!("{release} is too old"),
            format!("Linux {major}.{minor} or newer is needed to attach disks"),
        )
    }
}

/// Bit of CAP_SYS_ADMIN in the capability sets of /proc/self/status.
const CAP_SYS_ADMIN: u32 = 21;

fn user(root: bool) -> Probe {
    if !root {
        return warn(
            "user",
            format!("user {}, not root", geteuid().as_raw()),
            "only root can attach block devices and mount; the rest works, and `attach --via file`",
        );
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    match effective {
        Some(mask) if mask >> CAP_SYS_ADMIN & 1 == 0 => fail(
            "user",
            "root without CAP_SYS_ADMIN (a container?)",
            "run the container privileged, or run forkdisk on the host",
        ),
        _ => ok("user", "root"),
    }
}

/// Opens a character device for reading and writing, as those who need it do.
fn device(path: &str) -> Result<OwnedFd, String> {
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "is missing".to_string(),
        _ => format!("cannot be read: {e}"),
    })?;
    if !meta.file_type().is_char_device() {
        return Err("is no device".into());
    }
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| format!("cannot be opened: {}", text(e)))
}

fn fuse(root: bool) -> Probe {
    match device("/dev/fuse") {
        Ok(_) => ok("fuse", "/dev/fuse can be opened"),
        Err(why) => fail(
            "fuse",
            format!("/dev/fuse {why}"),
            if root {
                "`modprobe fuse`; in a container, pass --device /dev/fuse"
            } else {
                "ask the administrator for read and write access to /dev/fuse"
            },
        ),
    }
}

fn loop_control(root: bool) -> Probe {
    let name = "loop";
    match device("/dev/loop-control") {
        Ok(_) => ok(name, "/dev/loop-control can be opened"),
        Err(why) if root => fail(
            name,
            format!("/dev/loop-control {why}"),
            "`modprobe loop`; in a container, pass --device /dev/loop-control and the loop devices",
        ),
        Err(why) => warn(
            name,
            format!("/dev/loop-control {why}"),
            "block devices need root; `attach --via file` does not",
        ),
    }
}

fn fusermount() -> Probe {
    let name = "fusermount3";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find_map(|file| std::fs::metadata(&file).ok().map(|meta| (file, meta)));
    match found {
        None => fail(
            name,
            "is not installed: nothing can be attached without root",
            "`apt-get install fuse3`",
        ),
        Some((file, meta)) if meta.mode() & 0o4000 == 0 => warn(
            name,
            format!("{} has no setuid bit", file.display()),
            "reinstall fuse3, or attach as root",
        ),
        Some((file, _)) => ok(name, file.display().to_string()),
    }
}

/// Can `--transport io_uring` be used? It is a choice, so nothing is wrong if not.
fn uring() -> Probe {
    let name = "fuse io_uring";
    match Transport::IoUring.available() {
        Ok(()) => ok(name, "can be used (--transport io_uring)"),
        Err(e) => {
            let how = e.hint_text().map(|h| format!("; {h}")).unwrap_or_default();
            ok(name, format!("optional, not used by default: {e}{how}"))
        }
    }
}

/// Do processors stay awake while requests follow each other? It is a choice too.
fn idle() -> Probe {
    let name = "idle processors";
    if !awake::Mode::Auto.is_meant() {
        let why = "sleep as they like; FORKDISK_AWAKE=on in the daemon's environment keeps them awake while requests follow each other";
        return ok(name, why);
    }
    match Latency::open() {
        Ok(_) => ok(
            name,
            "stay awake while requests follow each other (FORKDISK_AWAKE=off lets them sleep)",
        ),
        Err(e) => ok(
            name,
            format!(
                "sleep as they like, as {} cannot be opened: {e}",
                latency::DEVICE
            ),
        ),
    }
}

fn files() -> Probe {
    let name = "open files";
    // The daemon raises the soft limit by itself, up to the hard one.
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(n) if n < FILES => warn(
            name,
            format!("at most {n} (RLIMIT_NOFILE)"),
            format!(
                "`ulimit -Hn {FILES}` as root, or LimitNOFILE= in the unit, for many attached disks"
            ),
        ),
        Some(n) => ok(name, format!("up to {n}")),
        None => ok(name, "no limit"),
    }
}

/// The nearest directory above `path`, itself included, that exists.
fn existing(path: &Path) -> PathBuf {
    path.ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/"))
        .to_path_buf()
}

fn store(path: &Path) -> Probe {
    let name = "store";
    let shown = path.display();
    match Store::open(path) {
        Ok(_) => ok(name, shown.to_string()),
        Err(e) if e.kind() == crate::error::Kind::NoStore => {
            let place = existing(path);
            let flags = AtFlags::EACCESS;
            match rustix::fs::accessat(CWD, &place, Access::WRITE_OK | Access::EXEC_OK, flags) {
                Ok(()) => ok(name, format!("{shown} (not made yet; import makes it)")),
                Err(e) => fail(
                    name,
                    format!("{shown} cannot be made: {}: {}", place.display(), text(e)),
                    "run as root, or use another directory with -S or FORKDISK_STORE",
                ),
            }
        }
        Err(e) => {
            let fix = e.hint_text().unwrap_or("`forkdisk check` tells more");
            fail(name, format!("{shown}: {e}"), fix)
        }
    }
}

/// Name and suitability of filesystems, by their magic numbers (statfs(2)).
fn filesystem(place: &Path) -> Probe {
    let name = "filesystem";
    let magic = match rustix::fs::statfs(place) {
        Ok(stat) => stat.f_type as u64 & 0xffff_ffff,
        Err(e) => return warn(name, text(e), "nothing is known of this filesystem"),
    };
    let on = |kind: &str| format!("{kind} at {}", place.display());
    let remote = "put the store on a local filesystem: ext4, xfs or btrfs";
    match magic {
        0xef53 => ok(name, on("ext4")),
        0x5846_5342 => ok(name, on("xfs")),
        0x9123_683e => warn(
            name,
            on("btrfs"),
            "`chattr +C` on an empty store directory avoids copying every block twice",
        ),
        0x2fc1_2fc1 => ok(name, on("zfs")),
        0xca45_1a4e => ok(name, on("bcachefs")),
        0xf2f5_2010 => ok(name, on("f2fs")),
        0x0102_1994 => warn(
            name,
            on("tmpfs"),
            "the store is gone after a reboot, and takes memory",
        ),
        0x794c_7630 => warn(
            name,
            on("overlayfs"),
            "put the store on a volume: a container's own filesystem is slow and goes with it",
        ),
        0x6969 => warn(name, on("nfs"), remote),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => warn(name, on("smb"), remote),
        0x6573_5546 => warn(name, on("fuse"), remote),
        0x0102_1997 => warn(name, on("9p"), remote),
        other => ok(name, on(&format!("type {other:#x}"))),
    }
}

/// A file in `place` that goes away by itself; `true` if it never had a name.
fn scratch(place: &Path) -> Result<(File, bool), Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(place, flags | OFlags::TMPFILE, mode) {
        return Ok((file.into(), true));
    }
    let path = place.join(format!(".forkdisk-doctor-{}", std::process::id()));
    let file = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
    rustix::fs::unlink(&path)?;
    Ok((file.into(), false))
}

fn punch(file: &File) -> Probe {
    let name = "punch holes";
    let tried = rustix::io::pwrite(file, &vec![1; 4 * BLOCK as usize], 0).and_then(|_| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, BLOCK, BLOCK)
    });
    match tried {
        Ok(()) => ok(name, "yes"),
        Err(e) => warn(
            name,
            format!("no: {}", text(e)),
            "discarded space is reused but not given back to the host; ext4, xfs and btrfs can",
        ),
    }
}

fn reflink(place: &Path, file: &File) -> Probe {
    let name = "reflink";
    let tried = scratch(place).and_then(|(other, _)| rustix::fs::ioctl_ficlone(&other, file));
    match tried {
        Ok(()) => ok(
            name,
            "yes: importing an image from this filesystem copies nothing",
        ),
        Err(_) => ok(
            name,
            "no: importing copies the image once (btrfs and xfs can share it)",
        ),
    }
}

fn tmpfile(unnamed: bool) -> Probe {
    let name = "O_TMPFILE";
    if unnamed {
        ok(name, "yes")
    } else {
        ok(name, "no: an export that is killed may leave a hidden file")
    }
}

fn space(place: &Path) -> Probe {
    let name = "free space";
    let stat = match rustix::fs::statvfs(place) {
        Ok(stat) => stat,
        Err(e) => return warn(name, text(e), "nothing is known of the free space"),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let shown = match free >> 20 {
        mib if mib < 10_240 => format!("{mib} MiB"),
        mib => format!("{} GiB", mib >> 10),
    };
    let fix = "`forkdisk gc`, `forkdisk rm`, or a larger filesystem";
    // Some filesystems have no fixed number of inodes and tell 0.
    let inodes = stat.f_files > 0 && stat.f_favail < 1000;
    if free < LITTLE {
        fail(name, shown, fix)
    } else if inodes {
        warn(name, format!("{shown}, but {} inodes", stat.f_favail), fix)
    } else if free < SCARCE {
        warn(name, shown, fix)
    } else {
        ok(name, shown)
    }
}

fn daemon(path: &Path) -> Probe {
    let name = "daemon";
    let Ok(store) = Store::open(path) else {
        return ok(name, "not running (attach starts it)");
    };
    match Client::connect(&store) {
        Ok(None) => ok(name, "not running (attach starts it)"),
        Ok(Some(_)) => ok(name, "running"),
        Err(e) => {
            let fix = e.hint_text().unwrap_or("look into the daemon's log");
            fail(name, e.to_string(), fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_not_ok_has_a_fix() {
        let dir = tempfile::tempdir().expect("a directory");
        let probes = examine(&dir.path().join("not/there"));
        assert!(probes.len() >= 10);
        for probe in &probes {
            assert_eq!(probe.status == Status::Ok, probe.fix.is_none(), "{probe:?}");
        }
        let left = std::fs::read_dir(dir.path()).expect("readable").count();
        assert_eq!(left, 0, "the doctor leaves nothing behind");
    }
}
