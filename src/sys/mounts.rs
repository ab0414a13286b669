//! A stand-in for mounting. To be thrown away.
#![allow(missing_docs)]

use crate::{error::Result, store::stub::run};
use std::path::{Path, PathBuf};

pub fn mount_device(dev: &Path, dir: &Path, read_only: bool) -> Result<()> {
    let mut args = vec![dev.to_str().unwrap(), dir.to_str().unwrap()];
    if read_only {
        args.splice(0..0, ["-o", "ro,noload"]);
    }
    run("mount", &args).map(|_| ())
}
pub fn mounts_of_device(dev: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        if words.next() == dev.to_str() {
            found.push(words.next().unwrap().into());
        }
    }
    Ok(found)
}
pub fn unmount(dir: &Path) -> Result<()> {
    run("umount", &[dir.to_str().unwrap()]).map(|_| ())
}
