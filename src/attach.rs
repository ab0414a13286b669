//! Plugs: a served file becomes a loop device, the device a mount, and back.
//!
//! Everything here is remembered by the kernel alone, so it works the same after a crash, and from another
//! process than the one that attached.
//!
//! Call these from a process that does not serve the file itself: each of them waits for requests on
//! it, and a server that dies while one of its own threads waits for it never quite dies
//! (see [`crate::serve::fuse`]).

use crate::{
    error::{Error, Kind, Result},
    sys::{
        blockdev,
        holders::{self, Holder},
        loopdev, mounts,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

pub mod files;

pub use blockdev::{Held, or_detached, trim};
pub use loopdev::{Detach, DetachOptions};
pub use mounts::{Mounted, Options as MountOptions};

/// How to set up a loop device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoopOptions {
    /// Refuse writes on the device.
    pub read_only: bool,
    /// Logical block size: 512 works everywhere, 4096 spares partial blocks.
    pub block_size: u32,
}

impl Default for LoopOptions {
    fn default() -> LoopOptions {
        LoopOptions {
            read_only: false,
            block_size: 512,
        }
    }
}

/// A loop device over a file: what must be known to take it away again, and no other by mistake.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LoopAttachment {
    /// The device.
    pub device: PathBuf,
    /// `st_dev` of the file.
    pub dev: u64,
    /// `st_ino` of the file.
    pub ino: u64,
    /// Is the device read-only?
    pub read_only: bool,
}

/// Longest time for which a device is waited for that is merely open, or mounted in another namespace only: `blkid`, udev and the
/// like look at new devices for moments, and a service or container that begins has for moments a copy of all mounts.
pub const GRACE: Duration = Duration::from_millis(1000);

/// Fails if this user may not set up loop devices: to be asked before work is done for one.
pub fn may_attach_loops() -> Result<()> {
    loopdev::may_attach()
}

/// Makes a served file a loop device, with direct I/O, so that its data is not cached twice.
pub fn attach_loop(file: &Path, options: LoopOptions) -> Result<LoopAttachment> {
    begin_loop(file, options).map(FreshLoop::finish)
}

/// A device that works, and is still to get what makes it quick.
pub(crate) struct FreshLoop {
    attachment: LoopAttachment,
    fresh: loopdev::Fresh,
}

impl FreshLoop {
    /// What it will be.
    pub(crate) fn attachment(&self) -> &LoopAttachment {
        &self.attachment
    }
    /// Gives it its settings.
    pub(crate) fn finish(self) -> LoopAttachment {
        self.fresh.tune(loopdev::Below::Served);
        if let Ok(Some(status)) = self.fresh.status()
            && !status.direct_io
        {
            tracing::warn!(
                "{} goes through the page cache: slower, and cached twice",
                self.attachment.device.display()
            );
        }
        self.attachment
    }
}

/// [`attach_loop`] for whoever has something else to wait for meanwhile: the settings of the device are left to [`FreshLoop::finish`].
pub(crate) fn begin_loop(file: &Path, options: LoopOptions) -> Result<FreshLoop> {
    if !matches!(options.block_size, 512 | 4096) {
        return Err(Error::new(
            Kind::Invalid,
            format!("a block size of {} is not possible", options.block_size),
        )
        .hint("use --block-size 512 or --block-size 4096"));
    }
    let open = |flags: i32| {
        fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(file)
    };
    let opened = match open(libc::O_DIRECT) {
        // A filesystem without direct I/O: the device works, through the page cache.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => open(0),
        opened => opened,
    };
    let opened = opened.map_err(|e| {
        let error = Error::io("open", file, &e);
        match error.kind() {
            Kind::ReadOnly => error.hint("it can only be read: attach it with --ro"),
            _ => error,
        }
    })?;
    let meta = opened
        .metadata()
        .map_err(|e| Error::io("look at", file, &e))?;
    // As the kernel calls it. To look the path up once more would ask who serves it.
    let name = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))
        .unwrap_or_else(|_| file.to_path_buf());
    let setup = loopdev::Setup {
        read_only: options.read_only,
        block_size: options.block_size,
        direct_io: true,
    };
    let fresh = loopdev::attach(opened.as_fd(), &name, setup)?;
    Ok(FreshLoop {
        attachment: LoopAttachment {
            device: fresh.path().into(),
            dev: meta.dev(),
            ino: meta.ino(),
            read_only: options.read_only,
        },
        fresh,
    })
}

/// Is the device still this attachment?
pub fn is_attached(attachment: &LoopAttachment) -> Result<bool> {
    let LoopAttachment {
        device, dev, ino, ..
    } = attachment;
    // The cheap question first: it needs nobody but the loop driver.
    if loopdev::backing_file(device).is_none() {
        return Ok(false);
    }
    Ok(loopdev::status(device)?.is_some_and(|s| s.dev == *dev && s.ino == *ino))
}

/// All loop devices over a file, known by its `st_dev` and `st_ino`: what is left after a crash.
pub fn find_loops(dev: u64, ino: u64) -> Result<Vec<LoopAttachment>> {
    let mut found = Vec::new();
    for device in loopdev::find(dev, ino)? {
        if let Some(status) = loopdev::status(&device)? {
            found.push(LoopAttachment {
                device,
                dev,
                ino,
                read_only: status.read_only,
            });
        }
    }
    Ok(found)
}

/// Takes the device away if nobody uses it, and waits until it is free. `Busy` names who uses it; a
/// mounted device is not unmounted ([`unmount`]). What is gone already is no error.
pub fn detach_loop(attachment: &LoopAttachment, options: DetachOptions) -> Result<Detach> {
    if !is_attached(attachment)? {
        return Ok(Detach::Gone);
    }
    let LoopAttachment {
        device, dev, ino, ..
    } = attachment;
    let deadline = Instant::now() + options.timeout.min(GRACE);
    loop {
        // The kernel would say yes to anybody and take the device away when the last user closes it:
        // so whoever is there must be found first.
        let mut users = holders::of_device(device, options.server)?;
        if users.is_empty() {
            // Exclusive users that the list does not show (another container's) still make it fail.
            match loopdev::detach(
                device,
                *dev,
                *ino,
                DetachOptions {
                    timeout: options.timeout,
                    ..options
                },
            ) {
                Err(e) if e.kind() == Kind::Busy => {
                    users = holders::of_device(device, options.server)?
                }
                result => return result,
            }
        }
        if !holders::for_moments(&users) || Instant::now() >= deadline {
            return Err(in_use(device, &users));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn in_use(device: &Path, users: &[Holder]) -> Error {
    let mut message = format!("{} is in use", device.display());
    if !users.is_empty() {
        message = format!("{message}: {}", holders::describe(users));
    }
    let mounted = users.iter().find_map(|u| match u {
        Holder::Mount { at, seen_by: None } => Some(at),
        _ => None,
    });
    let hint = match mounted {
        Some(at) => format!(
            "`umount {}` first, or detach by the mount point",
            at.display()
        ),
        None => "stop what uses it, then try again".to_string(),
    };
    Error::new(Kind::Busy, message).path(device).hint(hint)
}

/// Tells the device that the file has another size. The file's server must have told the kernel first.
pub fn size_changed(attachment: &LoopAttachment) -> Result<()> {
    loopdev::update_capacity(&attachment.device)
}

/// [`size_changed`] until the device has `size` bytes.
pub fn resize_loop(attachment: &LoopAttachment, size: u64) -> Result<()> {
    if !is_attached(attachment)? {
        return Err(Error::new(
            Kind::Busy,
            format!("{} was detached meanwhile", attachment.device.display()),
        )
        .hint("attach it again: it has its new size"));
    }
    if loopdev::size(&attachment.device) == Some(size) {
        return Ok(());
    }
    size_changed(attachment)?;
    match loopdev::size(&attachment.device) {
        Some(now) if now != size => Err(Error::new(
            Kind::Io,
            format!(
                "{} has {now} bytes, and should have {size}",
                attachment.device.display()
            ),
        )
        .hint("detach it and attach it again")),
        _ => Ok(()),
    }
}

/// Holds a device that nobody uses, so that nobody mounts it; `Busy` names who uses it. `server`: the process that serves its file.
pub fn hold_unused(device: &Path, server: Option<i32>) -> Result<Held> {
    let deadline = Instant::now() + GRACE;
    loop {
        let users = holders::of_device(device, server)?;
        if users.is_empty() {
            return blockdev::hold(device);
        }
        if !holders::for_moments(&users) || Instant::now() >= deadline {
            return Err(in_use(device, &users));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Mounts the device's filesystem on a directory.
pub fn mount(device: &Path, dir: &Path, options: &MountOptions) -> Result<Mounted> {
    mounts::mount(device, dir, options)
}

/// Where a device is mounted, in the order of mounting.
pub fn mounts_of(device: &Path) -> Result<Vec<PathBuf>> {
    Mounts::now()?.of(device)
}

/// What is mounted at one moment, for whoever asks of many devices: the kernel's table is read once, not once for each.
pub struct Mounts(Vec<mounts::Mount>);

impl Mounts {
    /// What is mounted now, in this namespace.
    pub fn now() -> Result<Mounts> {
        mounts::list().map(Mounts)
    }
    /// Where a device is mounted, in the order of mounting.
    pub fn of(&self, device: &Path) -> Result<Vec<PathBuf>> {
        let rdev = loopdev::rdev(device)?;
        let here = self.0.iter().filter(|m| m.is_of(device, rdev));
        Ok(here.map(|m| m.mount_point.clone()).collect())
    }
}

/// The loop device that is mounted at exactly this directory.
pub fn device_at(dir: &Path) -> Result<Option<PathBuf>> {
    let Some(mount) = mounts::at(dir)? else {
        return Ok(None);
    };
    Ok(loopdev::number(&mount.source)
        .is_some()
        .then_some(mount.source))
}

/// Unmounts a directory; `Busy` names who uses it.
pub fn unmount(dir: &Path) -> Result<()> {
    unmount_if(dir, || Ok(()))
}

/// Unmounts the device from a directory; `Busy` names who uses it. What else is mounted there stays.
pub fn unmount_device(device: &Path, dir: &Path) -> Result<()> {
    unmount_if(dir, || may_unmount(device, dir))
}

/// Fails if unmounting the directory would unmount something else than the device: the kernel takes what is on
/// top, whatever it is.
pub fn may_unmount(device: &Path, dir: &Path) -> Result<()> {
    let rdev = loopdev::rdev(device)?;
    match mounts::at(dir)? {
        Some(top) if !top.is_of(device, rdev) => Err(Error::new(
            Kind::Busy,
            format!("something else is mounted over {}", dir.display()),
        )
        .path(dir)
        .hint(format!(
            "`umount {}` takes it away; then try again",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

fn unmount_if(dir: &Path, may: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + GRACE;
    loop {
        may()?;
        match mounts::unmount(dir) {
            Err(e) if e.kind() == Kind::Busy => {
                let dir = std::path::absolute(dir)
                    .map_err(|e: io::Error| Error::io("look at", dir, &e))?;
                let users = holders::of_mount(&dir);
                // Nobody to be seen: somebody looked in for a moment.
                if !users.is_empty() || Instant::now() >= deadline {
                    let message = format!("{} is in use", dir.display());
                    let message = match users.is_empty() {
                        true => message,
                        false => format!("{message}: {}", holders::describe(&users)),
                    };
                    return Err(Error::new(Kind::Busy, message)
                        .path(dir)
                        .hint("stop what uses it, then try again"));
                }
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}
