//! Would an unmount succeed? Asked without unmounting.

use crate::error::{Error, Result};
use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
    mount::UnmountFlags,
};
use std::path::Path;

/// Is nothing open, running or mounted below the mount point `dir`? It may change at once.
///
/// The kernel tells by umount2(2) with `MNT_EXPIRE`: it only marks a mount that is not busy. Any use of
/// the mount takes the mark away, so it is looked at once more; else the next question would unmount it.
pub fn is_idle(dir: &Path) -> Result<bool> {
    let asked = rustix::mount::unmount(dir, UnmountFlags::EXPIRE | UnmountFlags::NOFOLLOW);
    match asked {
        Err(Errno::AGAIN) => {
            let _ = rustix::fs::statx(CWD, dir, AtFlags::empty(), StatxFlags::TYPE);
            Ok(true)
        }
        Err(Errno::BUSY) => Ok(false),
        Err(e) => Err(Error::io("unmount", dir, &e.into())),
        // Someone else asked the same just before us.
        Ok(()) => Ok(true),
    }
}
