//! Loop devices: configure a free one over a file, look at it, take it away, and wait until it is gone.
//!
//! Always true:
//! - a device is only ever cleared after the kernel said that its backing file is the one we recorded,
//!   and while we hold it exclusively, so that nobody can mount it in between;
//! - "gone" means gone: recent kernels answer `LOOP_CLR_FD` at once and clear the device when the last
//!   opener leaves, so success of the call alone says nothing.
//!
//! Others configure loop devices at the same time: "free" is a hint that may be stale before we use it.

use crate::error::{Error, Kind, Result};
use crate::sys::process;
use std::{
    fs,
    io::{self, ErrorKind},
    mem,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Major number of loop devices.
const LOOP_MAJOR: u32 = 7;
/// How often another free device is asked for when somebody else was faster. Each attempt waits a
/// little longer, so that this is several seconds: more than any burst of attachments lasts.
const ATTEMPTS: u32 = 100;
/// How long the node of a new device may take to appear before we make it ourselves.
const NODE_TIMEOUT: Duration = Duration::from_millis(500);

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(mem::size_of::<Info64>() == 232);

impl Info64 {
    const EMPTY: Info64 = Info64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info64,
    reserved: [u64; 8],
}
const _: () = assert!(mem::size_of::<Config>() == 304);

/// An ioctl that takes no argument.
fn ioctl_none(fd: RawFd, request: libc::Ioctl) -> io::Result<i32> {
    // SAFETY: none of the requests passed here reads or writes memory of this process; a bad
    // descriptor or request is answered with an error.
    let r = unsafe { libc::ioctl(fd, request, 0) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

fn get_status(fd: RawFd) -> io::Result<Info64> {
    let mut info = Info64::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`, whose layout and size `Info64` has;
    // all bit patterns are valid for it.
    let r = unsafe { libc::ioctl(fd, LOOP_GET_STATUS64, &raw mut info) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(info)
    }
}

fn configure(fd: RawFd, config: &Config) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, whose layout and size `Config` has.
    let r = unsafe { libc::ioctl(fd, LOOP_CONFIGURE, &raw const *config) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// How to set a device up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setup {
    /// Refuse writes on the device.
    pub read_only: bool,
    /// Logical block size, 512 or 4096.
    pub block_size: u32,
    /// Go round the page cache of the backing file.
    pub direct_io: bool,
}

/// What the kernel says of a configured device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// `st_dev` of the backing file.
    pub dev: u64,
    /// `st_ino` of the backing file.
    pub ino: u64,
    /// The name given at set-up, cut to 63 bytes; for people only.
    pub file_name: String,
    /// Is the device read-only?
    pub read_only: bool,
    /// Does it go round the page cache of the backing file?
    pub direct_io: bool,
    /// Will it go away with its last opener?
    pub autoclear: bool,
}

/// Number of a loop device from its path (`/dev/loop7`), or `None` for any other path.
pub fn number(device: &Path) -> Option<u32> {
    let name = device.file_name()?.to_str()?;
    name.strip_prefix("loop")?.parse().ok()
}

fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn sysfs(number: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}"))
}

/// A device that was just set up, and is open, so that nobody else gets its number as long as this lives.
pub struct Fresh {
    device: PathBuf,
    number: u32,
    open: fs::File,
}

impl Fresh {
    /// Its path.
    pub fn path(&self) -> &Path {
        &self.device
    }
    /// Its path; it stays as it is.
    pub fn into_path(self) -> PathBuf {
        self.device
    }
    /// [`status`], without opening it once more.
    pub fn status(&self) -> Result<Option<Status>> {
        status_of(&self.open, &self.device)
    }
    /// Gives it the queue settings that fit.
    pub fn tune(&self, below: Below) {
        tune(self.number, below);
    }
}

/// What stands behind a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Below {
    /// A file of a filesystem in the kernel.
    File,
    /// A file that a process serves (FUSE).
    Served,
}

/// Sets a free loop device up over `file`. `name` is what `losetup` shows.
///
/// The file must be open for writing unless `setup.read_only`.
pub fn attach(file: BorrowedFd<'_>, name: &Path, setup: Setup) -> Result<Fresh> {
    let control = open_control()?;
    let mut config = Config {
        fd: file.as_raw_fd() as u32,
        block_size: setup.block_size,
        info: Info64::EMPTY,
        reserved: [0; 8],
    };
    let text = name.as_os_str().as_encoded_bytes();
    let shown = text.len().min(63);
    config.info.file_name[..shown].copy_from_slice(&text[..shown]);
    if setup.read_only {
        config.info.flags |= LO_FLAGS_READ_ONLY;
    }
    if setup.direct_io {
        config.info.flags |= LO_FLAGS_DIRECT_IO;
    }
    let mut last = io::Error::from_raw_os_error(libc::EBUSY);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            // Racing for one free device in lockstep would go on for ever: the process id and the clock
            // spread the contenders.
            let jitter = u64::from(std::process::id() ^ clock_nanos()) % 5;
            thread::sleep(Duration::from_millis(u64::from(attempt.min(40)) + jitter));
        }
        let number = match ioctl_none(control.as_raw_fd(), LOOP_CTL_GET_FREE) {
            Ok(number) => number as u32,
            Err(e) if retry(&e) => {
                last = e;
                continue;
            }
            Err(e) => {
                return Err(Error::io(
                    "find a free loop device with",
                    "/dev/loop-control",
                    &e,
                ));
            }
        };
        let device = node(number);
        ensure_node(number)?;
        let open = fs::OpenOptions::new()
            .read(true)
            .write(!setup.read_only)
            .open(&device);
        let open = match open {
            Ok(open) => open,
            // A read-only device left behind by somebody who detaches it right now.
            Err(e) if retry(&e) || e.raw_os_error() == Some(libc::EROFS) => {
                last = e;
                continue;
            }
            Err(e) => return Err(Error::io("open", device, &e)),
        };
        match configure(open.as_raw_fd(), &config) {
            Ok(()) => {
                return Ok(Fresh {
                    device,
                    number,
                    open,
                });
            }
            Err(e) if retry(&e) => last = e,
            Err(e) => {
                let error = Error::io("configure", device, &e);
                return Err(match e.raw_os_error() {
                    Some(libc::EINVAL) => error.or_hint(
                        "the kernel refuses the block size, or is older than 5.8 (LOOP_CONFIGURE)",
                    ),
                    _ => error,
                });
            }
        }
    }
    Err(
        Error::io("find a free loop device with", "/dev/loop-control", &last)
            .with_kind(Kind::Busy)
            .hint("other processes keep taking every free loop device: try again"),
    )
}

/// Fails if this user may not set up devices.
pub fn may_attach() -> Result<()> {
    open_control().map(|_| ())
}

fn open_control() -> Result<fs::File> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")
        .map_err(|e| {
            let error = Error::io("open", "/dev/loop-control", &e);
            match e.kind() {
                ErrorKind::NotFound => error
                    .with_kind(Kind::Unsupported)
                    .hint("load the driver: `modprobe loop`"),
                ErrorKind::PermissionDenied => {
                    error.hint("loop devices need root; `--via file` and `--via nbd` do not")
                }
                _ => error,
            }
        })
}

/// Errors that say no more than "somebody else was faster".
fn retry(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EBUSY | libc::ENXIO | libc::EINTR | libc::EAGAIN | libc::ENODEV)
    )
}

fn clock_nanos() -> u32 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.subsec_nanos())
}

/// Waits for the node of a device; makes it where `/dev` is not the kernel's own (containers).
fn ensure_node(number: u32) -> Result<()> {
    let device = node(number);
    let deadline = Instant::now() + NODE_TIMEOUT;
    loop {
        match fs::metadata(&device) {
            Ok(meta) if meta.file_type().is_block_device() => return Ok(()),
            Ok(_) => {
                return Err(Error::new(
                    Kind::Io,
                    format!("{} is not a block device", device.display()),
                ));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io("look at", device, &e)),
        }
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let rdev = rustix::fs::makedev(LOOP_MAJOR, number);
    let mode = rustix::fs::Mode::from_raw_mode(0o660);
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        &device,
        rustix::fs::FileType::BlockDevice,
        mode,
        rdev,
    );
    match made {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Error::io("make the device node", device, &e.into())
            .hint("mount devtmpfs on /dev, or give this container the loop devices")),
    }
}

/// Queue settings that fit what stands behind a device. Best effort: it works without them, only slower. What is right already
/// is left alone: to write some of them again makes the kernel stop the queue, for some 15 ms.
fn tune(number: u32, below: Below) {
    set(number, "read_ahead_kb", "1024");
    // What stands behind is the host's business: no elevator, no seek avoidance up here. Kernels since 6.11 think so by themselves.
    set(number, "rotational", "0");
    let completed = match below {
        Below::File => Completed::Near,
        // The answer comes from the processor of the server, and in no interrupt: there the kernel would leave the rest to a thread, and wake the program from
        // there. So the processor that asked is interrupted, and wakes it itself. The server looks whether that is worth it.
        Below::Served => Completed::WhereMade,
    };
    complete(number, completed);
}

/// The device goes back to others, who find it as the kernel makes it.
fn forget_tuning(device: &Path) {
    if let Some(number) = number(device) {
        complete(number, Completed::Near);
    }
}

/// Where a request of a device is completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completed {
    /// Near the processor that made it: as the kernel does it by itself.
    Near,
    /// On the very processor that made it, which is interrupted for that.
    WhereMade,
}

/// Says where the requests of a device are completed. Kernels 6.11 to 6.18.2 stop the queue for this, too: there it would take longer than it is worth, and
/// who holds a request would wait for himself. Nothing is done there.
pub fn complete(number: u32, completed: Completed) {
    let value = match completed {
        Completed::Near => "1",
        Completed::WhereMade => "2",
    };
    if can_complete() {
        set(number, "rq_affinity", value);
    }
}

/// Does [`complete`] do anything?
pub fn can_complete() -> bool {
    !((6, 11, 0)..(6, 18, 3)).contains(&process::kernel_version())
}

/// Requests of a device that are under way; `None` where that cannot be told.
pub fn in_flight(number: u32) -> Option<u32> {
    let counts = fs::read_to_string(sysfs(number).join("inflight")).ok()?;
    let counts = counts.split_whitespace().map(str::parse::<u32>);
    counts.sum::<std::result::Result<u32, _>>().ok()
}

fn set(number: u32, file: &str, value: &str) {
    let path = sysfs(number).join("queue").join(file);
    if fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == value) {
        return;
    }
    if let Err(e) = fs::write(&path, value) {
        tracing::debug!("cannot set {} to {value}: {e}", path.display());
    }
}

/// State of a device; `None` if it is free (or does not exist).
pub fn status(device: &Path) -> Result<Option<Status>> {
    let open = match open_quiet(device, 0) {
        Ok(open) => open,
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENXIO | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(Error::io("open", device, &e)),
    };
    status_of(&open, device)
}

fn status_of(open: &fs::File, device: &Path) -> Result<Option<Status>> {
    match get_status(open.as_raw_fd()) {
        Ok(info) => {
            let end = info
                .file_name
                .iter()
                .position(|&c| c == 0)
                .unwrap_or(info.file_name.len());
            Ok(Some(Status {
                dev: info.device,
                ino: info.inode,
                file_name: String::from_utf8_lossy(&info.file_name[..end]).into_owned(),
                read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
                direct_io: info.flags & LO_FLAGS_DIRECT_IO != 0,
                autoclear: info.flags & LO_FLAGS_AUTOCLEAR != 0,
            }))
        }
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(Error::io("ask for the state of", device, &e)),
    }
}

/// Opens a device without waiting for anything and without making it ours.
fn open_quiet(device: &Path, extra: i32) -> io::Result<fs::File> {
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | extra)
        .open(device)
}

/// The backing file of a device as sysfs shows it, `None` if the device is free. Asks nobody but the
/// loop driver, so it answers even when the server of the backing file is dead.
pub fn backing_file(device: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut text = fs::read(sysfs(number(device)?).join("loop/backing_file")).ok()?;
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    (!text.is_empty()).then(|| PathBuf::from(std::ffi::OsString::from_vec(text)))
}

/// Which use of the device it is: the number changes whenever the device gets another backing file, and is never the
/// same again until the next boot. `None` before kernel 5.15.
pub fn sequence(device: &Path) -> Option<u64> {
    let text = fs::read_to_string(sysfs(number(device)?).join("diskseq")).ok()?;
    text.trim().parse().ok()
}

/// Takes away a device whose backing file nobody will ever serve again, if it is still that use of it. What was
/// written to it and never flushed is lost. `Busy` if it is mounted or held exclusively.
pub fn detach_dead(device: &Path, use_of: u64) -> Result<Detach> {
    let gone = || backing_file(device).is_none() || sequence(device) != Some(use_of);
    if gone() {
        return Ok(Detach::Gone);
    }
    let open = open_quiet(device, libc::O_EXCL).map_err(|e| {
        Error::io("detach", device, &e).or_hint("unmount it and stop what uses it, then try again")
    })?;
    // Held exclusively, nobody can put another file behind it.
    if gone() {
        return Ok(Detach::Gone);
    }
    forget_tuning(device);
    if let Err(e) = ioctl_none(open.as_raw_fd(), LOOP_CLR_FD)
        && e.raw_os_error() != Some(libc::ENXIO)
    {
        return Err(Error::io("detach", device, &e));
    }
    drop(open);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !gone() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(2));
    }
    Ok(Detach::Done)
}

/// All configured devices whose backing file has this `st_dev` and `st_ino`.
pub fn find(dev: u64, ino: u64) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir("/sys/block").map_err(|e| Error::io("list", "/sys/block", &e))?;
    for entry in entries.flatten() {
        let device = Path::new("/dev").join(entry.file_name());
        if number(&device).is_none() || backing_file(&device).is_none() {
            continue;
        }
        // Devices come and go while we look; one that cannot be asked is not ours to report.
        if let Ok(Some(status)) = status(&device)
            && status.dev == dev
            && status.ino == ino
        {
            found.push(device);
        }
    }
    found.sort_by_key(|d| number(d));
    Ok(found)
}

/// Size of a device in bytes, as sysfs shows it.
pub fn size(device: &Path) -> Option<u64> {
    let text = fs::read_to_string(sysfs(number(device)?).join("size")).ok()?;
    // In units of 512 bytes, whatever the device's block size is.
    text.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// Tells the device that its backing file has another size.
pub fn update_capacity(device: &Path) -> Result<()> {
    let open = open_quiet(device, 0).map_err(|e| Error::io("open", device, &e))?;
    ioctl_none(open.as_raw_fd(), LOOP_SET_CAPACITY)
        .map(|_| ())
        .map_err(|e| Error::io("change the size of", device, &e))
}

/// `st_rdev` of a device.
pub fn rdev(device: &Path) -> Result<u64> {
    let meta = fs::metadata(device).map_err(|e| Error::io("look at", device, &e))?;
    if !meta.file_type().is_block_device() {
        return Err(Error::new(
            Kind::Invalid,
            format!("{} is not a block device", device.display()),
        )
        .hint("name a loop device, such as /dev/loop0"));
    }
    Ok(meta.rdev())
}

/// What [`detach`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detach {
    /// The device was ours and is free now.
    Done,
    /// The device is free or somebody else's: there was nothing to do.
    Gone,
}

/// How far [`detach`] goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DetachOptions {
    /// How long to wait for a device that is in use for a moment only (`blkid`, udev), and then for it
    /// to become free.
    pub timeout: Duration,
    /// Detach even if what was written to the device but never flushed cannot be written back.
    pub force: bool,
    /// The process that serves the backing file. It never uses the device, and has a descriptor for each disk that it serves: who uses
    /// the device is looked for among the others.
    pub server: Option<i32>,
}

impl Default for DetachOptions {
    fn default() -> DetachOptions {
        DetachOptions {
            timeout: Duration::from_secs(5),
            force: false,
            server: None,
        }
    }
}

/// Takes a device away if its backing file is still `dev`, `ino`, and waits until it is free.
///
/// `Busy` if it is mounted or held exclusively; who does that is for the caller to find
/// ([`crate::sys::holders`]). Other openers do not prevent the detaching: the caller asks for them first.
pub fn detach(device: &Path, dev: u64, ino: u64, options: DetachOptions) -> Result<Detach> {
    let deadline = Instant::now() + options.timeout;
    let ours = |open: &fs::File| -> Result<bool> {
        Ok(status_of(open, device)?.is_some_and(|s| s.dev == dev && s.ino == ino))
    };
    // Held exclusively from here to the end: nobody mounts the device between check and clearing.
    let open = loop {
        match open_quiet(device, libc::O_EXCL) {
            Ok(open) => break open,
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENXIO | libc::ENOENT | libc::ENODEV)
                ) =>
            {
                return Ok(Detach::Gone);
            }
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                match open_quiet(device, 0) {
                    Ok(open) if !ours(&open)? => return Ok(Detach::Gone),
                    _ => {}
                }
                if Instant::now() >= deadline {
                    return Err(Error::io("detach", device, &e)
                        .with_kind(Kind::Busy)
                        .or_hint("unmount it and stop what uses it, then detach again"));
                }
                thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(Error::io("open", device, &e)),
        }
    };
    if !ours(&open)? {
        return Ok(Detach::Gone);
    }
    if let Err(e) = open.sync_all() {
        let error = Error::io("write back and flush", device, &e);
        if !options.force {
            return Err(error.or_hint(
                "what was written but never flushed would be lost; `forkdisk detach --force` gives it up",
            ));
        }
        tracing::error!("{error}; detaching all the same");
    }
    forget_tuning(device);
    if let Err(e) = ioctl_none(open.as_raw_fd(), LOOP_CLR_FD)
        && e.raw_os_error() != Some(libc::ENXIO)
    {
        return Err(Error::io("detach", device, &e));
    }
    // From kernel 6.10 on the device goes with its last opener, which may be us.
    drop(open);
    wait_until_free(device, dev, ino, options.timeout)?;
    Ok(Detach::Done)
}

/// Waits until the device no longer has the backing file `dev`, `ino`.
fn wait_until_free(device: &Path, dev: u64, ino: u64, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_micros(200);
    loop {
        // sysfs first: opening the device to ask would itself keep it from going.
        if backing_file(device).is_none() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    match status(device)? {
        Some(s) if s.dev == dev && s.ino == ino => Err(Error::new(
            Kind::Busy,
            format!("{} is being detached but is still open", device.display()),
        )
        .hint("it goes as soon as the last process closes it")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_from_names() {
        assert_eq!(number(Path::new("/dev/loop17")), Some(17));
        assert_eq!(number(Path::new("/dev/loop-control")), None);
        assert_eq!(number(Path::new("/dev/loop1p1")), None);
        assert_eq!(number(Path::new("/dev/sda")), None);
    }
}
