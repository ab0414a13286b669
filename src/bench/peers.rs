//! What is compared: each peer has a base, makes disks of it, and shows a disk as a block device.
//!
//! Always true: every peer starts from the same bytes, and every device goes round the page cache of its backing file, except below
//! forkdisk, whose one shared cache is the point.

use crate::{
    bench::work::{self, Work},
    error::{Error, Kind, Result},
    serve::fuse::Transport,
    store::Store,
    sys::{
        latency::{self, Latency},
        loopdev, mounts, signals,
    },
};
use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// The kinds of peers, in the order they are shown.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PeerKind {
    /// A loop device over a file: no copy-on-write.
    Raw,
    /// The same while the processors are kept awake, as the daemon keeps them.
    RawAwake,
    /// The file itself.
    Plain,
    /// The same through the page cache: what the memory of this machine allows anybody who uses it.
    Cached,
    /// A loop device over a file, through the page cache: what is left of forkdisk's way without forkdisk.
    CachedLoop,
    /// A whole copy for each disk.
    Copy,
    /// Reflinks of XFS.
    Xfs,
    /// Reflinks of Btrfs.
    Btrfs,
    /// qcow2 with a backing file, served by QEMU's storage daemon.
    Qcow2,
    /// The same with sub-clusters.
    Qcow2L2,
    /// qcow2 through the host's page cache, where that is what is counted.
    Qcow2Cached,
    /// Files instead of blocks.
    Overlayfs,
    /// This.
    Forkdisk,
    /// This where processors may sleep.
    Asleep,
    /// This through its other door, where single requests are timed.
    IoUring,
}

impl PeerKind {
    /// The word in JSON and on the command line.
    pub fn id(self) -> &'static str {
        match self {
            PeerKind::Raw => "raw",
            PeerKind::RawAwake => "raw-awake",
            PeerKind::Plain => "plain",
            PeerKind::Cached => "cached",
            PeerKind::CachedLoop => "cached-loop",
            PeerKind::Copy => "copy",
            PeerKind::Xfs => "xfs",
            PeerKind::Btrfs => "btrfs",
            PeerKind::Qcow2 => "qcow2",
            PeerKind::Qcow2L2 => "qcow2-l2",
            PeerKind::Qcow2Cached => "qcow2-cached",
            PeerKind::Overlayfs => "overlayfs",
            PeerKind::Forkdisk => "forkdisk",
            PeerKind::Asleep => "asleep",
            PeerKind::IoUring => "io_uring",
        }
    }
    /// What it is, in a sentence.
    pub fn title(self) -> &'static str {
        match self {
            PeerKind::Raw => "a loop device over a file: no copy-on-write, the limit",
            PeerKind::RawAwake => {
                "raw while the processors are kept awake for it, as forkdisk's daemon keeps them for its disks"
            }
            PeerKind::Plain => "a file on the same filesystem, without a device over it",
            PeerKind::Cached => "the same file through the page cache, as forkdisk uses it",
            PeerKind::CachedLoop => "a loop device over a file, through the page cache",
            PeerKind::Copy => "a whole copy of the base for each disk",
            PeerKind::Xfs => "reflinks on XFS, a loop device over each",
            PeerKind::Btrfs => "reflinks on Btrfs, a loop device over each",
            PeerKind::Qcow2 => "qcow2 over the base: QEMU's FUSE export, a loop device over it",
            PeerKind::Qcow2L2 => "the same with extended L2 entries (sub-clusters)",
            PeerKind::Qcow2Cached => "qcow2 through the host's page cache (cache.direct=off)",
            PeerKind::Overlayfs => "overlayfs, which copies files",
            PeerKind::Forkdisk => "forkdisk",
            PeerKind::Asleep => "forkdisk with FORKDISK_AWAKE=off: processors sleep while it waits",
            PeerKind::IoUring => "forkdisk attached with --transport io_uring: no takeover",
        }
    }
    /// Is it served by QEMU?
    pub fn is_qemu(self) -> bool {
        matches!(
            self,
            PeerKind::Qcow2 | PeerKind::Qcow2L2 | PeerKind::Qcow2Cached
        )
    }
    /// Is it this program, by whatever door?
    pub fn is_forkdisk(self) -> bool {
        matches!(
            self,
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring
        )
    }
    /// Does it show disks as devices, and is it a way of its own to make and to keep them?
    pub fn is_block(self) -> bool {
        !self.is_file()
            && !matches!(
                self,
                PeerKind::RawAwake
                    | PeerKind::CachedLoop
                    | PeerKind::Copy
                    | PeerKind::Qcow2Cached
                    | PeerKind::Overlayfs
                    | PeerKind::Asleep
                    | PeerKind::IoUring
            )
    }
    /// Does it show disks as devices, and is it worth a sample where one request waits for the other?
    pub fn waits(self) -> bool {
        self.has_devices() || matches!(self, PeerKind::RawAwake | PeerKind::Asleep)
    }
    /// Does it show disks as devices?
    pub fn has_devices(self) -> bool {
        self.is_block() || self == PeerKind::IoUring
    }
    /// Is it a file, without a device over it?
    pub fn is_file(self) -> bool {
        matches!(self, PeerKind::Plain | PeerKind::Cached)
    }
}

/// A device that stands on a disk.
struct Shown {
    device: PathBuf,
    dev: u64,
    ino: u64,
    server: Option<i32>,
}

/// One peer at work.
pub struct Peer {
    /// Which.
    pub kind: PeerKind,
    home: PathBuf,
    base: PathBuf,
    /// The loop device below its own filesystem, if it has one.
    below: Option<PathBuf>,
    /// All names mean one file: for raw, where a copy for each would only take time.
    one_file: bool,
    shown: HashMap<String, Shown>,
    /// Disks that [`Peer::ensure`] made.
    kept: HashSet<String>,
    /// Disks that stand on another disk, not on the base.
    stacked: RefCell<HashSet<String>>,
    latency: Option<Latency>,
}

/// Keeps the processors awake.
struct Awake<'a>(&'a Latency);

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        let _ = self.0.sleep();
    }
}

/// Needed for a filesystem of its own: beside the data.
const SLACK: u64 = 2 << 30;

impl Peer {
    /// Sets a peer up in a directory of its own below `parent`, with its base: a copy of `base`, or that file itself.
    pub fn new(
        work: &Work,
        kind: PeerKind,
        parent: &Path,
        base: &Path,
        one_file: bool,
    ) -> Result<Peer> {
        let home = parent.join(kind.id());
        fs::create_dir_all(&home).map_err(|e| Error::io("create", &home, &e))?;
        let mut peer = Peer {
            kind,
            base: base.to_path_buf(),
            home,
            below: None,
            one_file,
            shown: HashMap::new(),
            kept: HashSet::new(),
            stacked: RefCell::default(),
            latency: None,
        };
        match kind {
            PeerKind::Xfs | PeerKind::Btrfs => {
                let (program, package) = match kind {
                    PeerKind::Xfs => ("mkfs.xfs", "xfsprogs"),
                    _ => ("mkfs.btrfs", "btrfs-progs"),
                };
                work.need(program, package)?;
                let len = fs::metadata(base)
                    .map_err(|e| Error::io("look at", base, &e))?
                    .len();
                let (dir, device) = filesystem(work, &peer.home, program, len * 4 + SLACK)?;
                peer.below = Some(device);
                peer.base = dir.join("base.img");
                peer.home = dir;
                copy(work, base, &peer.base)?;
            }
            PeerKind::Qcow2 | PeerKind::Qcow2L2 | PeerKind::Qcow2Cached => {
                work.need("qemu-img", "qemu-utils")?;
                work.need("qemu-storage-daemon", "qemu-utils")?;
            }
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring => {
                if kind == PeerKind::IoUring {
                    Transport::IoUring.available()?;
                }
                let store = peer.store();
                work.note_store(&store);
                let mut import = work.forkdisk(&store);
                import.arg("import").arg(base).args(["base", "--copy"]);
                work.long(import)?;
            }
            PeerKind::Raw if one_file => copy(work, base, &peer.home.join("disk.img"))?,
            // That of raw: one more would take the room of a base, and they are never used at the same time.
            PeerKind::RawAwake => {
                peer.base = parent.join("raw/disk.img");
                let open = Latency::open();
                peer.latency = Some(open.map_err(|e| Error::io("open", latency::DEVICE, &e))?);
            }
            PeerKind::CachedLoop => peer.base = parent.join("raw/disk.img"),
            _ => {}
        }
        Ok(peer)
    }
    /// Calls what is measured, with processors that stay awake if that is what this peer is about.
    pub fn measure<T>(&self, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let awake = self.latency.as_ref().map(|latency| {
            let kept = latency.awake();
            kept.map(|()| Awake(latency))
        });
        let _until_the_end = awake
            .transpose()
            .map_err(|e| Error::io("write to", latency::DEVICE, &e))?;
        call()
    }
    /// The store of forkdisk.
    pub fn store(&self) -> PathBuf {
        self.home.join("store")
    }
    /// The loop device below the peer's own filesystem.
    pub fn below(&self) -> Option<&Path> {
        self.below.as_deref()
    }
    /// Where its files are.
    pub fn home(&self) -> &Path {
        &self.home
    }
    fn image(&self, name: &str) -> PathBuf {
        match (self.kind, name) {
            (PeerKind::RawAwake | PeerKind::CachedLoop, _) => self.base.clone(),
            // What is only read.
            (PeerKind::Plain | PeerKind::Cached, "reader") => self.base.clone(),
            (PeerKind::Raw, _) if self.one_file => self.home.join("disk.img"),
            (PeerKind::Qcow2 | PeerKind::Qcow2L2 | PeerKind::Qcow2Cached, _) => {
                self.home.join(format!("{name}.qcow2"))
            }
            _ => self.home.join(format!("{name}.img")),
        }
    }
    /// The files that hold the bytes below a disk, for the page cache.
    pub fn files(&self, name: &str) -> Vec<PathBuf> {
        match self.kind {
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring => {
                let mut files = Vec::new();
                for dir in ["bases", "layers"] {
                    below(&self.store().join(dir), &mut files);
                }
                files
            }
            PeerKind::Qcow2 | PeerKind::Qcow2L2 | PeerKind::Qcow2Cached => {
                vec![self.base.clone(), self.image(name)]
            }
            _ => vec![self.image(name)],
        }
    }
    /// Makes a disk from the base (`None`) or from another disk, as a user does.
    pub fn fork(&self, work: &Work, from: Option<&str>, name: &str) -> Result<()> {
        let to = self.image(name);
        if from.is_some() {
            self.stacked.borrow_mut().insert(name.to_string());
        }
        match self.kind {
            PeerKind::Raw | PeerKind::Copy => match to.exists() {
                true => Ok(()),
                false => copy(
                    work,
                    &from.map_or(self.base.clone(), |n| self.image(n)),
                    &to,
                ),
            },
            PeerKind::Cached if to != self.base => {
                let len = fs::metadata(&self.base)
                    .and_then(|base| File::create(&to)?.set_len(base.len()));
                len.map_err(|e| Error::io("create", to, &e))
            }
            // Its blocks are found before: what is left is how the disk below takes such as were never written.
            PeerKind::Plain if to != self.base => {
                let made = fs::metadata(&self.base).and_then(|base| {
                    let file = File::create(&to)?;
                    let none = rustix::fs::FallocateFlags::empty();
                    rustix::fs::fallocate(&file, none, 0, base.len())?;
                    file.sync_all()
                });
                made.map_err(|e| Error::io("create", to, &e))
            }
            PeerKind::RawAwake
            | PeerKind::Plain
            | PeerKind::Cached
            | PeerKind::CachedLoop
            | PeerKind::Overlayfs => Ok(()),
            PeerKind::Xfs | PeerKind::Btrfs => {
                let from = from.map_or(self.base.clone(), |n| self.image(n));
                let mut command = work.command("cp");
                command.arg("--reflink=always").arg(from).arg(to);
                work.short(command).map(drop)
            }
            PeerKind::Qcow2 | PeerKind::Qcow2L2 | PeerKind::Qcow2Cached => {
                let mut command = work.command("qemu-img");
                command.args(["create", "-q", "-f", "qcow2"]);
                if self.kind == PeerKind::Qcow2L2 {
                    command.args(["-o", "extended_l2=on"]);
                }
                match from {
                    Some(name) => command.args(["-F", "qcow2", "-b"]).arg(self.image(name)),
                    None => command.args(["-F", "raw", "-b"]).arg(&self.base),
                };
                work.short({
                    command.arg(to);
                    command
                })
                .map(drop)
            }
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring => {
                let mut command = work.forkdisk(&self.store());
                command.args(["create", name, "--from", from.unwrap_or("base")]);
                work.short(command).map(drop)
            }
        }
    }
    /// Makes a disk by the shortest way there is, and makes it durable; for forkdisk and reflinks that is a call, not a command.
    pub fn fork_fast(&self, work: &Work, from: Option<&str>, name: &str) -> Result<Duration> {
        let started;
        match self.kind {
            PeerKind::Xfs | PeerKind::Btrfs => {
                let from = from.map_or(self.base.clone(), |n| self.image(n));
                let source = File::open(&from).map_err(|e| Error::io("open", &from, &e))?;
                started = Instant::now();
                let made = self.reflink(&source, name)?;
                made.sync_all()
                    .map_err(|e| Error::io("sync", &self.home, &e))?;
                sync_dir(&self.home)?;
            }
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring => {
                let store = Store::open(&self.store())?;
                started = Instant::now();
                store.create(&[name.to_string()], from.unwrap_or("base"), None)?;
            }
            _ => {
                started = Instant::now();
                self.fork(work, from, name)?;
                let to = self.image(name);
                let made = File::open(&to).map_err(|e| Error::io("open", &to, &e))?;
                made.sync_all().map_err(|e| Error::io("sync", &to, &e))?;
                sync_dir(&self.home)?;
            }
        }
        Ok(started.elapsed())
    }
    /// Makes many disks of the base, which are durable together.
    pub fn fork_many(&self, work: &Work, prefix: &str, count: u32) -> Result<Duration> {
        let name = |i: u32| format!("{prefix}-{i}");
        let started = Instant::now();
        match self.kind {
            PeerKind::Forkdisk | PeerKind::Asleep | PeerKind::IoUring => {
                let store = Store::open(&self.store())?;
                let names: Vec<String> = (0..count).map(name).collect();
                store.create(&names, "base", None)?;
            }
            PeerKind::Xfs | PeerKind::Btrfs => {
                let source =
                    File::open(&self.base).map_err(|e| Error::io("open", &self.base, &e))?;
                for i in 0..count {
                    check_signal()?;
                    self.reflink(&source, &name(i))?;
                }
                rustix::fs::syncfs(&source)
                    .map_err(|e| Error::io("sync", &self.base, &e.into()))?;
            }
            _ => {
                for i in 0..count {
                    check_signal()?;
                    self.fork(work, None, &name(i))?;
                }
                let dir = File::open(&self.home).map_err(|e| Error::io("open", &self.home, &e))?;
                rustix::fs::syncfs(&dir).map_err(|e| Error::io("sync", &self.home, &e.into()))?;
            }
        }
        Ok(started.elapsed())
    }
    fn reflink(&self, source: &File, name: &str) -> Result<File> {
        let to = self.image(name);
        let made = File::create_new(&to).map_err(|e| Error::io("create", &to, &e))?;
        rustix::fs::ioctl_ficlone(&made, source)
            .map_err(|e| Error::io("clone to", &to, &e.into()))?;
        Ok(made)
    }
    /// Makes a disk of the base unless it was made before, and attaches it: the device, and is it new?
    pub fn ensure(&mut self, work: &Work, name: &str) -> Result<(PathBuf, bool)> {
        let new = !self.kept.contains(name);
        if new {
            self.fork(work, None, name)?;
            self.kept.insert(name.to_string());
        }
        Ok((self.attach(work, name)?, new))
    }
    /// Takes a disk away.
    pub fn remove(&mut self, work: &Work, name: &str) -> Result<()> {
        self.detach(work, name)?;
        match self.kind {
            PeerKind::RawAwake => return Ok(()),
            PeerKind::Plain if self.image(name) == self.base => return Ok(()),
            PeerKind::Raw if self.one_file => return Ok(()),
            PeerKind::CachedLoop => {
                // Raw goes round what is in memory of its file, and would have to look for it.
                if let Ok(file) = File::open(&self.base) {
                    let _ = file.sync_data();
                    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                }
                return Ok(());
            }
            _ => {}
        }
        if self.kind.is_forkdisk() {
            let mut command = work.forkdisk(&self.store());
            command.args(["-y", "rm", "-r", name]);
            return work.short(command).map(drop);
        }
        let file = self.image(name);
        match fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", file, &e))
            }
            _ => Ok(()),
        }
    }
    /// Shows a disk as a device.
    pub fn attach(&mut self, work: &Work, name: &str) -> Result<PathBuf> {
        if let Some(shown) = self.shown.get(name) {
            return Ok(shown.device.clone());
        }
        if self.kind.is_file() {
            return Ok(self.image(name));
        }
        if self.kind.is_forkdisk() {
            let mut command = work.forkdisk(&self.store());
            command.args(["attach", name]);
            if self.kind == PeerKind::Asleep {
                // Starts the daemon.
                command.env("FORKDISK_AWAKE", "off");
            }
            if self.kind == PeerKind::IoUring {
                command.args(["--transport", Transport::IoUring.word()]);
            }
            let device = PathBuf::from(work.short(command)?.trim_end());
            let shown = Shown {
                device: device.clone(),
                dev: 0,
                ino: 0,
                server: None,
            };
            self.shown.insert(name.to_string(), shown);
            return Ok(device);
        }
        let (file, server) = match self.kind.is_qemu() {
            true => {
                let (file, pid) = self.serve(work, name)?;
                (file, Some(pid))
            }
            false => (self.image(name), None),
        };
        let attached = match self.kind {
            PeerKind::CachedLoop => cached_device_over(&file),
            _ => device_over(&file),
        };
        if let (Err(_), Some(pid)) = (&attached, server) {
            work.end(pid);
        }
        let (device, dev, ino) = attached?;
        let shown = Shown {
            device: device.clone(),
            dev,
            ino,
            server,
        };
        self.shown.insert(name.to_string(), shown);
        Ok(device)
    }
    /// QEMU's storage daemon shows an image as a file: the file, and the process.
    fn serve(&self, work: &Work, name: &str) -> Result<(PathBuf, i32)> {
        let file = self.home.join(format!("{name}.export"));
        File::create(&file).map_err(|e| Error::io("create", &file, &e))?;
        let image = self.image(name);
        let text = |path: &Path| path.display().to_string();
        let direct = self.kind != PeerKind::Qcow2Cached;
        let (cache, aio) = (
            serde_json::json!({"direct": direct}),
            // Native is for direct I/O alone.
            if direct { "native" } else { "threads" },
        );
        let file_node = |path: &Path| serde_json::json!({"driver": "file", "filename": text(path), "aio": aio, "cache": cache, "discard": "unmap"});
        let mut node = serde_json::json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap", "cache": cache, "file": file_node(&image),
        });
        // What is named by the image itself would be read by threads instead.
        if !self.stacked.borrow().contains(name) {
            node["backing"] =
                serde_json::json!({"driver": "raw", "cache": cache, "file": file_node(&self.base)});
            node["backing"]["file"]["read-only"] = true.into();
            node["backing"]["read-only"] = true.into();
        }
        let mut export = serde_json::json!({
            "type": "fuse", "id": "export", "node-name": "disk", "mountpoint": text(&file),
            "writable": true, "growable": true, "allow-other": "off",
        });
        let mut command = work.command("qemu-storage-daemon");
        for thread in ["t0", "t1"] {
            command.args(["--object", &format!("iothread,id={thread}")]);
        }
        export["iothread"] = match several_threads(work) {
            true => serde_json::json!(["t0", "t1"]),
            false => serde_json::json!("t0"),
        };
        command.args([
            "--blockdev",
            &node.to_string(),
            "--export",
            &export.to_string(),
        ]);
        let pid = work.start(command)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if mounts::at(&file)?.is_some() && fs::metadata(&file).is_ok_and(|m| m.len() > 0) {
                return Ok((file, pid));
            }
            if work.is_gone(pid) || Instant::now() > deadline {
                work.end(pid);
                let log = fs::read_to_string(work.path("log")).unwrap_or_default();
                let last = log
                    .lines()
                    .last()
                    .unwrap_or("it does not tell why")
                    .to_string();
                return Err(Error::new(
                    Kind::Io,
                    format!(
                        "qemu-storage-daemon does not serve {}: {last}",
                        image.display()
                    ),
                )
                .hint("see `qemu-storage-daemon --help`: its FUSE export is needed"));
            }
            check_signal().inspect_err(|_| work.end(pid))?;
            thread::sleep(Duration::from_micros(500));
        }
    }
    /// Takes a device away; what was written to it is durable then.
    pub fn detach(&mut self, work: &Work, name: &str) -> Result<()> {
        let Some(shown) = self.shown.remove(name) else {
            return Ok(());
        };
        if self.kind.is_forkdisk() {
            let mut command = work.forkdisk(&self.store());
            command.args(["detach", name]);
            return work.short(command).map(drop);
        }
        let options = loopdev::DetachOptions::default();
        let gone = loopdev::detach(&shown.device, shown.dev, shown.ino, options).map(drop);
        if let Some(pid) = shown.server {
            work.end(pid);
            let _ = fs::remove_file(self.home.join(format!("{name}.export")));
        }
        gone
    }
    /// Takes all its devices away.
    pub fn close(&mut self, work: &Work) {
        let names: Vec<String> = self.shown.keys().cloned().collect();
        for name in names {
            if let Err(e) = self.detach(work, &name) {
                tracing::debug!("{e}");
            }
        }
    }
    /// Puts a disk on another for a stack: as [`Peer::fork`], but QEMU need not open all that is below.
    pub fn stack(&self, work: &Work, from: Option<&str>, name: &str) -> Result<()> {
        let (true, Some(from)) = (self.kind.is_qemu(), from) else {
            return self.fork(work, from, name);
        };
        self.stacked.borrow_mut().insert(name.to_string());
        let len = fs::metadata(&self.base)
            .map_err(|e| Error::io("look at", &self.base, &e))?
            .len();
        let mut command = work.command("qemu-img");
        command.args(["create", "-q", "-u", "-f", "qcow2"]);
        if self.kind == PeerKind::Qcow2L2 {
            command.args(["-o", "extended_l2=on"]);
        }
        command.args(["-F", "qcow2", "-b"]).arg(self.image(from));
        command.arg(self.image(name)).arg(len.to_string());
        work.short(command).map(drop)
    }
    /// Opens what holds a detached disk, to write a few blocks into it; of qcow2 QEMU writes them itself (`None`).
    pub fn inside(&self, work: &Work, name: &str, numbers: &mut Numbers) -> Result<Option<Direct>> {
        let image = self.image(name);
        if !self.kind.is_qemu() {
            return Direct::open(&image).map(Some);
        }
        let len = fs::metadata(&self.base)
            .map_err(|e| Error::io("look at", &self.base, &e))?
            .len();
        let node = serde_json::json!({
            "driver": "qcow2", "backing": null, "file": {"driver": "file", "filename": image.display().to_string()},
        });
        let mut command = work.command("qemu-io");
        // Whole clusters: then nothing below is read for them.
        for _ in 0..4 {
            let at = numbers.draw() % (len / 65536) * 65536;
            command.args(["-c", &format!("write -q -P 7 {at} 65536")]);
        }
        command.arg(format!("json:{node}"));
        work.short(command).map(|_| None)
    }
    /// Shows a disk as a device as a user does it, and tells how long that took.
    pub fn attach_by_command(&mut self, work: &Work, name: &str) -> Result<Duration> {
        let image = self.image(name);
        if self.kind.is_forkdisk() {
            let started = Instant::now();
            self.attach(work, name)?;
            return Ok(started.elapsed());
        }
        let started = Instant::now();
        let (file, server) = match self.kind.is_qemu() {
            true => {
                let (file, pid) = self.serve(work, name)?;
                (file, Some(pid))
            }
            false => (image, None),
        };
        let mut command = work.command("losetup");
        command.args(["--find", "--show", "--direct-io=on"]);
        if self.kind == PeerKind::Xfs {
            command.args(["--sector-size", "4096"]);
        }
        command.arg(&file);
        let device = work.short(command).inspect_err(|_| {
            if let Some(pid) = server {
                work.end(pid);
            }
        })?;
        let took = started.elapsed();
        let meta = fs::metadata(&file).map_err(|e| Error::io("look at", &file, &e))?;
        let shown = Shown {
            device: PathBuf::from(device.trim_end()),
            dev: meta.dev(),
            ino: meta.ino(),
            server,
        };
        self.shown.insert(name.to_string(), shown);
        Ok(took)
    }
    /// Takes a device away as a user does it, and tells how long that took.
    pub fn detach_by_command(&mut self, work: &Work, name: &str) -> Result<Duration> {
        let started = Instant::now();
        if !self.kind.is_forkdisk()
            && let Some(shown) = self.shown.get(name)
        {
            let mut command = work.command("losetup");
            command.arg("--detach").arg(&shown.device);
            work.short(command)?;
        }
        self.detach(work, name)?;
        Ok(started.elapsed())
    }
    /// The processes that serve its disks.
    pub fn servers(&self, work: &Work) -> Vec<i32> {
        if !self.kind.is_forkdisk() {
            return self.shown.values().filter_map(|s| s.server).collect();
        }
        let mut command = work.forkdisk(&self.store());
        command.args(["--json", "daemon", "status"]);
        let text = work.short(command).unwrap_or_default();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let pids = ["keeper_pid", "server_pid"].map(|name| status[name].as_i64());
        pids.into_iter().flatten().map(|pid| pid as i32).collect()
    }
    /// Takes a snapshot of an attached disk of forkdisk.
    pub fn snapshot(&self, work: &Work, name: &str, snapshot: &str) -> Result<()> {
        let mut command = work.forkdisk(&self.store());
        command.args(["snapshot", &format!("{name}@{snapshot}")]);
        work.short(command).map(drop)
    }
    /// Host bytes that the peer takes.
    pub fn allocated(&self) -> Result<u64> {
        let dir = File::open(&self.home).map_err(|e| Error::io("open", &self.home, &e))?;
        rustix::fs::syncfs(&dir).map_err(|e| Error::io("sync", &self.home, &e.into()))?;
        match self.below {
            // Of reflinks the files do not tell what they share.
            Some(_) => Ok(work::space(&self.home)?.1),
            None => Ok(work::allocated(&self.home)),
        }
    }
}

/// A QEMU that serves one export with several threads: from 10.2 on.
fn several_threads(work: &Work) -> bool {
    qemu_version(work).is_some_and(|v| v >= (10, 2))
}

/// The version of QEMU's storage daemon.
pub fn qemu_version(work: &Work) -> Option<(u32, u32)> {
    let mut command = work.command("qemu-storage-daemon");
    command.arg("--version");
    let text = work.short(command).ok()?;
    let word = text
        .split_whitespace()
        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut numbers = word.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn check_signal() -> Result<()> {
    match signals::caught() {
        true => Err(work::interrupted()),
        false => Ok(()),
    }
}

/// A loop device that goes through the page cache of its file: the device, and the file's numbers.
fn cached_device_over(file: &Path) -> Result<(PathBuf, u64, u64)> {
    let (open, dev, ino) = open_below(file)?;
    let setup = loopdev::Setup {
        read_only: false,
        block_size: 512,
        direct_io: false,
    };
    let fresh = loopdev::attach(open.as_fd(), file, setup)?;
    fresh.tune(loopdev::Below::File);
    Ok((fresh.into_path(), dev, ino))
}

fn open_below(file: &Path) -> Result<(File, u64, u64)> {
    let open = File::options()
        .read(true)
        .write(true)
        .open(file)
        .map_err(|e| Error::io("open", file, &e))?;
    let meta = open
        .metadata()
        .map_err(|e| Error::io("look at", file, &e))?;
    let (dev, ino) = (meta.dev(), meta.ino());
    Ok((open, dev, ino))
}

/// A loop device with direct I/O over a file: the device, and the file's numbers.
pub fn device_over(file: &Path) -> Result<(PathBuf, u64, u64)> {
    let (open, dev, ino) = open_below(file)?;
    // Where the file below cannot do direct I/O in sectors of 512 bytes (reflinks on XFS), the kernel goes through the page cache without
    // a word.
    for block_size in [512, 4096] {
        let setup = loopdev::Setup {
            read_only: false,
            block_size,
            direct_io: true,
        };
        let fresh = loopdev::attach(open.as_fd(), file, setup)?;
        fresh.tune(loopdev::Below::File);
        let is_direct = fresh.status()?.is_some_and(|s| s.direct_io);
        let device = fresh.into_path();
        if is_direct {
            return Ok((device, dev, ino));
        }
        let options = loopdev::DetachOptions::default();
        loopdev::detach(&device, dev, ino, options)?;
    }
    Err(Error::new(
        Kind::Unsupported,
        format!(
            "there is no direct I/O for a loop device over {}",
            file.display()
        ),
    )
    .hint("measure on another filesystem: --dir DIR"))
}

/// Bytes of a device's sectors.
pub fn sector(device: &Path) -> u64 {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    let text = fs::read_to_string(format!("/sys/block/{name}/queue/logical_block_size"));
    text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(512)
}

/// Makes an image file with a filesystem in `home` and mounts it: the mount point and the device.
pub fn filesystem(work: &Work, home: &Path, program: &str, len: u64) -> Result<(PathBuf, PathBuf)> {
    let image = home.join("fs.img");
    let made = File::create(&image).and_then(|f| f.set_len(len));
    made.map_err(|e| Error::io("create", &image, &e))?;
    let mut command = work.command(program);
    match program {
        // All of it is written now, and not by a thread of the kernel during the samples.
        "mkfs.ext4" => command.args(["-qF", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
        _ => command.args(["-q", "-f"]),
    };
    work.long({
        command.arg(&image);
        command
    })?;
    let (device, _, _) = device_over(&image)?;
    let dir = home.join("fs");
    fs::create_dir_all(&dir).map_err(|e| Error::io("create", &dir, &e))?;
    mounts::mount(&device, &dir, &mounts::Options::default())?;
    Ok((dir, device))
}

/// Copies every byte, and waits until they are on disk.
pub fn copy(work: &Work, from: &Path, to: &Path) -> Result<()> {
    let mut command = work.command("cp");
    command
        .args(["--reflink=never", "--sparse=never"])
        .arg(from)
        .arg(to);
    work.long(command)?;
    File::open(to)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io("sync", to, &e))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::io("sync", dir, &e))
}

fn below(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => below(&path, files),
            false => files.push(path),
        }
    }
}

/// Numbers that look random and are the same each time.
pub struct Numbers(u64);

impl Numbers {
    /// A sequence.
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// Bytes that do not compress.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for part in buffer.chunks_mut(8) {
            let number = self.draw().to_le_bytes();
            part.copy_from_slice(&number[..part.len()]);
        }
    }
}

/// A device or file for direct I/O, and a buffer that is aligned as that wants it.
pub struct Direct {
    file: File,
    path: PathBuf,
    memory: Vec<u8>,
    from: usize,
}

/// Alignment for direct I/O.
const ALIGN: usize = 4096;

impl Direct {
    /// Opens it.
    pub fn open(path: &Path) -> Result<Direct> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(|e| Error::io("open", path, &e))?;
        let memory = vec![0; (1 << 20) + ALIGN];
        let from = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Ok(Direct {
            file,
            path: path.to_path_buf(),
            memory,
            from,
        })
    }
    /// Writes `len` new bytes at `at`.
    pub fn write(&mut self, numbers: &mut Numbers, at: u64, len: usize) -> Result<()> {
        let buffer = &mut self.memory[self.from..self.from + len];
        numbers.fill(buffer);
        self.file
            .write_all_at(buffer, at)
            .map_err(|e| Error::io("write", &self.path, &e).offset(at))
    }
    /// Waits until all is durable.
    pub fn flush(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::io("flush", &self.path, &e))
    }
}

/// Writes a file of bytes that do not compress. `told` hears how many are written.
pub fn noise(path: &Path, len: u64, told: &dyn Fn(u64)) -> Result<()> {
    let file = File::create(path).map_err(|e| Error::io("create", path, &e))?;
    let mut numbers = Numbers::new(len);
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        check_signal()?;
        let now = (len - at).min(buffer.len() as u64) as usize;
        numbers.fill(&mut buffer[..now]);
        file.write_all_at(&buffer[..now], at)
            .map_err(|e| Error::io("write", path, &e))?;
        at += now as u64;
        told(at);
    }
    file.sync_all().map_err(|e| Error::io("sync", path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_noise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        noise(&path, 100_000, &|_| ()).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 100_000);
        let distinct: std::collections::HashSet<&[u8]> = bytes.chunks_exact(8).collect();
        assert_eq!(distinct.len(), 12_500);
    }
}
