//! Mounts that nobody else sees: a filesystem that is mounted nowhere, and reached through one descriptor. It is gone with the last
//! descriptor below it, however the process ends.

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};
use std::{os::fd::OwnedFd, path::Path};

/// Mounts a device read-only, nowhere, and returns the directory at its top. `flags`: options of the filesystem.
pub fn mount(device: &Path, fs_type: &str, flags: &[&str]) -> Result<OwnedFd, Errno> {
    let context = fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    for flag in ["ro"].iter().chain(flags) {
        fsconfig_set_flag(&context, *flag)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // That one names the directory, and cannot list it.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(&mount, ".", flags, Mode::empty())
}
