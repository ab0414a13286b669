//! Makes a FUSE mount and hands out its descriptor; takes it away again.
//!
//! The mount lives as long as any copy of the descriptor does: whoever should survive the server keeps one.

use crate::{
    error::{Error, Kind, Result},
    sys::{fdpass, mounts},
};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};
use std::{
    ffi::CString,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
};

/// Mounts on `dir` and returns the descriptor that requests are read from.
///
/// As root by mount(2), else with the help of `fusermount3`. Only this user (and, as root, the kernel's own
/// loop driver) gets in: a disk's contents have no owner but the store's.
pub fn mount(dir: &Path) -> Result<OwnedFd> {
    let meta = dir.metadata().map_err(|e| Error::io("mount on", dir, &e))?;
    if rustix::process::geteuid().is_root() {
        mount_as_root(dir, meta.mode())
    } else {
        mount_with_helper(dir)
    }
}

fn mount_as_root(dir: &Path, mode: u32) -> Result<OwnedFd> {
    let path = "/dev/fuse";
    let fd =
        rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
            Error::io("open", path, &e.into()).or_hint("load the driver: `modprobe fuse`")
        })?;
    let data = format!(
        "fd={},rootmode={:o},user_id={},group_id={}",
        fd.as_raw_fd(),
        mode & libc::S_IFMT,
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    let data = CString::new(data)
        .map_err(|_| Error::new(Kind::Invalid, "a mount option holds a zero byte"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    rustix::mount::mount("forkdisk", dir, "fuse.forkdisk", flags, data.as_c_str()).map_err(
        |e| {
            let error = Error::io("mount on", dir, &e.into());
            match e {
                Errno::NODEV => error
                    .with_kind(Kind::Unsupported)
                    .hint("load the driver: `modprobe fuse`"),
                Errno::PERM => {
                    error.hint("mounting needs CAP_SYS_ADMIN (in a container: --privileged)")
                }
                _ => error,
            }
        },
    )?;
    Ok(fd)
}

/// `fusermount3` is set-uid root: it mounts and sends the descriptor over a socket.
fn mount_with_helper(dir: &Path) -> Result<OwnedFd> {
    let (here, there) = UnixStream::pair()
        .map_err(|e| Error::new(Kind::Io, format!("cannot make a socket pair: {e}")))?;
    // The socket is the helper's standard input: nothing else of ours is inherited, whatever
    // other threads do at this moment.
    let mut child = Command::new("fusermount3")
        .args([
            "-o",
            "fsname=forkdisk,subtype=forkdisk,nosuid,nodev,noexec,noatime",
            "--",
        ])
        .arg(dir)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(there)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| {
            Error::io("run", "fusermount3", &e)
                .hint("install fuse3: it lets users without root mount")
        })?;
    let received = fdpass::receive(&here, &mut [0; 1]);
    drop(here);
    let fd = received.ok().and_then(|(_, fds)| fds.into_iter().next());
    if let Some(fd) = fd {
        // With auto_unmount the helper would stay; without, it is done.
        let _ = child.wait();
        return Ok(fd);
    }
    let said = child
        .wait_with_output()
        .map(|o| String::from_utf8_lossy(&o.stderr).trim().to_string());
    Err(Error::new(
        Kind::Permission,
        format!(
            "cannot mount on {}: {}",
            dir.display(),
            said.unwrap_or_default()
        ),
    )
    .path(dir)
    .hint("`forkdisk doctor` tells what this user may do"))
}

/// Takes the mount away if no file of it is open; `Busy` if one is.
pub fn unmount(dir: &Path) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return mounts::unmount(dir);
    }
    helper_unmount(dir, "-u")
}

/// Takes the mount away whatever uses it: requests under way and all later ones fail. The only way out when
/// nobody will ever serve it again.
pub fn abort(dir: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return helper_unmount(dir, "-uz");
    }
    let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(dir, flags).map_err(|e| Error::io("unmount", dir, &e.into()))
}

fn helper_unmount(dir: &Path, how: &str) -> Result<()> {
    let out = Command::new("fusermount3")
        .args([how, "--"])
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::io("run", "fusermount3", &e).hint("install fuse3"))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr).trim().to_string();
    let kind = if said.contains("busy") {
        Kind::Busy
    } else {
        Kind::Io
    };
    Err(
        Error::new(kind, format!("cannot unmount {}: {said}", dir.display()))
            .path(dir)
            .hint("detach the disks that are attached through it first"),
    )
}
