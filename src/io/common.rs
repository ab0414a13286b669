//! What the real and the imaginary disk must agree on: which names and ranges are legal, and which
//! [`Kind`] a failure is. One place, so that a test on the one holds for the other.

use super::File;
use crate::error::{Error, Kind, Result};
use std::{io, path::Path};

/// Longest name of a directory entry, in bytes: what every Linux filesystem can store.
const MAX_NAME: usize = 255;

/// Refuses whatever is not one plain path component.
pub(super) fn check_name(dir: &Path, name: &str) -> Result<()> {
    let fault = match name {
        "" => "it is empty",
        "." | ".." => "it names a directory itself",
        _ if name.contains('/') => "it contains a slash",
        _ if name.contains('\0') => "it contains a NUL",
        _ if name.len() > MAX_NAME => "it is longer than 255 bytes",
        _ => return Ok(()),
    };
    Err(Error::new(
        Kind::Invalid,
        format!("no file can be named {name:?}: {fault}"),
    )
    .path(dir))
}

/// End of the range, unless it lies beyond what a file offset can express.
pub(super) fn check_range(path: &Path, at: u64, len: u64) -> Result<u64> {
    match at.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(end),
        _ => Err(Error::new(
            Kind::Invalid,
            format!(
                "no file reaches as far as {len} bytes from {at:#x}: {}",
                path.display()
            ),
        )
        .path(path)
        .offset(at)),
    }
}

/// The error of a read (or a mapping) of `len` bytes from `at` that the file is too short for.
pub(super) fn past_end(path: &Path, at: u64, len: usize) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "{} ends too early: {len} bytes from {at:#x} lie past its end",
            path.display()
        ),
    )
    .path(path)
    .offset(at)
}

/// The error of changing a file through a handle that was opened for reading.
pub(super) fn read_only(what: &str, path: &Path) -> Error {
    Error::new(
        Kind::ReadOnly,
        format!("cannot {what} {}: it is open for reading", path.display()),
    )
    .path(path)
}

/// A store holds files and directories; the error of finding anything else in the place of one.
pub(super) fn wrong_type(what: &str, path: &Path, is: &str) -> Error {
    Error::new(
        Kind::Corrupt,
        format!("cannot {what} {}: it is {is}", path.display()),
    )
    .path(path)
}

/// The error of the system call that failed with `errno` while doing `what` (an infinitive).
///
/// As all names are single components, some codes mean here that something is not what it must be.
pub(super) fn fail(what: &str, path: &Path, errno: i32) -> Error {
    match errno {
        libc::EISDIR => wrong_type(what, path, "a directory where a file belongs"),
        libc::ENOTDIR => wrong_type(what, path, "no directory where one belongs"),
        libc::ELOOP => wrong_type(what, path, "a symbolic link, and those are never followed"),
        libc::ENXIO => wrong_type(what, path, "a socket or device where a file belongs"),
        libc::ENOTEMPTY => {
            Error::io(what, path, &io::Error::from_raw_os_error(errno)).with_kind(Kind::Busy)
        }
        _ => Error::io(what, path, &io::Error::from_raw_os_error(errno)),
    }
}

/// Bytes read and written in one go by [`copy_by_hand`].
const COPY_PIECE: u64 = 1 << 20;

/// Copies through memory.
pub(super) fn copy_by_hand<F: File + ?Sized>(
    to: &F,
    source: &dyn File,
    from: u64,
    at: u64,
    len: u64,
) -> Result<()> {
    let mut buf = vec![0; len.min(COPY_PIECE) as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(COPY_PIECE) as usize;
        source.read_at(&mut buf[..n], from + done)?;
        to.write_at(&buf[..n], at + done)?;
        done += n as u64;
    }
    Ok(())
}

/// The inode behind a file's descriptor, 0 if it has none.
pub(super) fn number<F: File + ?Sized>(file: &F) -> Result<u64> {
    match file.fd() {
        None => Ok(0),
        Some(fd) => rustix::fs::fstat(fd)
            .map(|stat| stat.st_ino)
            .map_err(|e| fail("look at", &file.path(), e.raw_os_error())),
    }
}

/// The error of finding the lock of a file taken.
pub(super) fn locked(path: &Path) -> Error {
    Error::new(
        Kind::Busy,
        format!("{} is locked by another process", path.display()),
    )
    .path(path)
}
