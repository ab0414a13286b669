//! What belongs to this user alone: directories that nobody else can change, and peers of a socket that are this user or root.

use crate::error::{Error, Kind, Result};
use crate::sys::process;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bits of the mode by which others than the owner change a directory.
const OTHERS_WRITE: u32 = 0o022;

fn ours(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Refuses what is no directory (a symbolic link to one is none), or one in which another user can put something else in the place of what
/// was looked at. Root may work in the directory of whoever trusts root.
pub fn must_be_private(dir: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(dir).map_err(|e| Error::io("look at", dir, &e))?;
    let bad = |why: &str, hint: String| {
        let shown = dir.display();
        Err(Error::new(Kind::Permission, format!("{shown} {why}"))
            .path(dir)
            .hint(hint))
    };
    let shown = dir.display();
    if !meta.is_dir() {
        return bad(
            "is no directory, and symbolic links are never followed",
            format!("remove {shown}: it is made again"),
        );
    }
    if !ours(meta.uid()) && !rustix::process::geteuid().is_root() {
        return bad(
            "belongs to another user",
            "run as the owner of the store, or as root".into(),
        );
    }
    if meta.mode() & OTHERS_WRITE != 0 {
        return bad(
            "can be changed by other users",
            format!("`chmod 700 {shown}`"),
        );
    }
    Ok(())
}

/// Can other users change what is in the directory? Then its mode.
pub fn open_to_others(dir: &Path) -> Option<u32> {
    let mode = fs::metadata(dir).ok()?.mode() & 0o7777;
    (mode & OTHERS_WRITE != 0).then_some(mode)
}

/// Refuses the other side of a socket unless it is this user or root. Returns the number of its process.
pub fn check_peer(socket: impl AsFd) -> Result<i32> {
    let (pid, uid) =
        process::peer_of(socket).map_err(|e| Error::io("ask who is behind", "a socket", &e))?;
    if ours(uid) {
        return Ok(pid);
    }
    Err(Error::new(
        Kind::Permission,
        format!("the other side of the socket is user {uid}"),
    )
    .hint("run forkdisk as the user whose daemon runs"))
}

/// A socket at `path` on which only this user and root can connect, also in the moment of its making. What is there is replaced. `shown`: the path in
/// messages; that of the socket must be short ([socket addresses hold 107 bytes](https://man7.org/linux/man-pages/man7/unix.7.html)).
pub fn listen(path: &Path, shown: &Path) -> Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", shown, &e));
        }
        _ => {}
    }
    let io = |what: &'static str| {
        let shown = shown.to_path_buf();
        move |e: rustix::io::Errno| Error::io(what, shown, &e.into())
    };
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(io("make"))?;
    let address = SocketAddrUnix::new(path).map_err(io("name"))?;
    rustix::net::bind(&socket, &address).map_err(io("bind"))?;
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(io("protect"))?;
    // Nobody can connect before this.
    rustix::net::listen(&socket, 128).map_err(io("listen on"))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn directories_of_others_and_links_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let own = dir.path().join("own");
        fs::create_dir(&own).expect("a directory");
        for (mode, good) in [(0o700, true), (0o755, true), (0o775, false), (0o702, false)] {
            fs::set_permissions(&own, fs::Permissions::from_mode(mode)).expect("chmod");
            assert_eq!(must_be_private(&own).is_ok(), good, "{mode:o}");
            assert_eq!(open_to_others(&own).is_none(), good, "{mode:o}");
        }
        fs::set_permissions(&own, fs::Permissions::from_mode(0o700)).expect("chmod");
        symlink(&own, dir.path().join("link")).expect("a link");
        must_be_private(&dir.path().join("link")).expect_err("a link");
        must_be_private(&dir.path().join("none")).expect_err("nothing");
        must_be_private(Path::new("/proc/self/stat")).expect_err("a file");
    }

    #[test]
    fn a_peer_of_this_user_is_welcome() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("a pair");
        check_peer(&a).expect("this user");
    }
}
