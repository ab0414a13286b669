//! How fast disks are read and written.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Sizes,
        book::{Better, Book, Must, Reading},
        fio::{self, Load},
        peers::{Direct, Peer, PeerKind},
    },
    error::{Error, Kind, Result},
    sys::{cachestat, mounts},
};
use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

/// The state of the host's page cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cache {
    Warm,
    Cold,
}

/// Which disk is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Disk {
    /// A new fork each time: every block is touched for the first time.
    Fresh,
    /// All that is used was written before.
    Private,
}

const READ: Load = Load {
    rw: "randread",
    block: 4096,
    depth: 1,
    reads: 0,
    sync: false,
    again: true,
    area: 0,
    millis: 0,
};

/// The rows of reading.
pub fn reads<'a>(size: &Sizes, book: &mut Book) -> Vec<Job<'a>> {
    let random = |depth| Load { depth, ..READ };
    let sequential = Load {
        rw: "read",
        block: 1 << 20,
        depth: 4,
        ..READ
    };
    let at_least = |r| Some(Must::RatioAtLeast(r));
    let rows = [
        (
            "read.random.qd1.warm",
            "4K random read, qd1, warm",
            random(1),
            Cache::Warm,
            at_least(1.0),
        ),
        (
            "read.random.qd32.warm",
            "4K random read, qd32, warm",
            random(32),
            Cache::Warm,
            at_least(1.0),
        ),
        (
            "read.sequential.warm",
            "1M sequential read, warm",
            sequential,
            Cache::Warm,
            at_least(2.0),
        ),
        (
            "read.random.qd1.cold",
            "4K random read, qd1, cold",
            random(1),
            Cache::Cold,
            at_least(0.85),
        ),
        (
            "read.random.qd32.cold",
            "4K random read, qd32, cold",
            random(32),
            Cache::Cold,
            None,
        ),
        (
            "read.sequential.cold",
            "1M sequential read, cold",
            sequential,
            Cache::Cold,
            at_least(1.0),
        ),
    ];
    let mut jobs = Vec::new();
    for (id, title, load, cache, must) in rows {
        let unit = if load.block > 4096 { "MB/s" } else { "IOPS" };
        book.row(Group::Read, id, title, unit, Better::Higher, must);
        let load = Load {
            area: size.area,
            millis: size.millis,
            // Cold is cold only the first time.
            again: cache == Cache::Warm,
            ..load
        };
        jobs.push(Job {
            name: title.to_string(),
            rounds: size.rounds,
            peers: match (cache, load.depth) {
                (Cache::Warm, 1) => |kind| kind.waits() || kind == PeerKind::Plain,
                (Cache::Warm, _) => |kind| kind.has_devices() || kind == PeerKind::Plain,
                // Its one thread serves requests one by one.
                (Cache::Cold, 32) => |kind| kind.has_devices() || kind.is_file(),
                (Cache::Cold, 1) => {
                    |kind| kind.waits() || kind.is_file() || kind == PeerKind::CachedLoop
                }
                (Cache::Cold, _) => {
                    |kind| kind.has_devices() || kind.is_file() || kind == PeerKind::CachedLoop
                }
            },
            measure: Box::new(move |lab, peer, gauge, _| {
                let (device, _) = peer.ensure(lab.work, "reader")?;
                match cache {
                    Cache::Warm => prime(peer, "reader", load.area)?,
                    Cache::Cold => drop_caches(&peer.files("reader")),
                }
                let direct = peer.kind != PeerKind::Cached;
                let run = || fio::run(lab.work, &device, &load, direct, lab.seed());
                let figures = peer.measure(|| gauge.during(run))?;
                let value = match load.block > 4096 {
                    true => figures.megabytes(0.0),
                    false => figures.iops(0.0),
                };
                Ok(vec![Reading::of(id, value)])
            }),
        });
    }
    jobs
}

/// A row of writing: its id, its title, its load, on which disk, what it must reach; and the same of its slowest syncs.
type WriteRow = (
    &'static str,
    &'static str,
    Load,
    Disk,
    Option<Must>,
    Option<(&'static str, &'static str, Option<Must>)>,
);

/// The rows of writing.
pub fn writes<'a>(size: &Sizes, book: &mut Book) -> Vec<Job<'a>> {
    let random = |depth| Load {
        rw: "randwrite",
        depth,
        again: false,
        ..READ
    };
    let sync = Load {
        sync: true,
        ..random(1)
    };
    let mixed = Load {
        rw: "randrw",
        reads: 70,
        ..random(16)
    };
    let sequential = Load {
        rw: "write",
        block: 1 << 20,
        ..random(4)
    };
    let at_least = |r| Some(Must::RatioAtLeast(r));
    let rows: [WriteRow; 8] = [
        (
            "write.first.qd1",
            "4K random write, first touch, qd1",
            random(1),
            Disk::Fresh,
            at_least(1.0),
            None,
        ),
        (
            "write.first.qd32",
            "4K random write, first touch, qd32",
            random(32),
            Disk::Fresh,
            at_least(0.8),
            None,
        ),
        (
            "write.private.qd1",
            "4K random write, private, qd1",
            random(1),
            Disk::Private,
            at_least(1.0),
            None,
        ),
        (
            "write.private.qd32",
            "4K random write, private, qd32",
            random(32),
            Disk::Private,
            at_least(0.8),
            None,
        ),
        (
            "write.sync.first",
            "4K write + fdatasync, first touch",
            sync,
            Disk::Fresh,
            at_least(0.8),
            Some(("write.sync.first.p99", "fdatasync p99, first touch", None)),
        ),
        (
            "write.sync.private",
            "4K write + fdatasync, private",
            sync,
            Disk::Private,
            None,
            Some((
                "write.sync.private.p99",
                "fdatasync p99, private",
                Some(Must::RatioAtMost(1.2)),
            )),
        ),
        (
            "write.mixed",
            "4K mixed 70/30, qd16, warm",
            mixed,
            Disk::Fresh,
            at_least(0.9),
            None,
        ),
        (
            "write.sequential.first",
            "1M sequential write, first touch",
            sequential,
            Disk::Fresh,
            at_least(1.0),
            None,
        ),
    ];
    let mut jobs = Vec::new();
    for (id, title, load, disk, must, tail) in rows {
        let unit = if load.block > 4096 { "MB/s" } else { "IOPS" };
        book.row(Group::Write, id, title, unit, Better::Higher, must);
        if let Some((id, title, must)) = &tail {
            book.row(Group::Write, id, title, "us", Better::Lower, must.clone());
        }
        let load = Load {
            // What is touched for the first time must not run out.
            area: if disk == Disk::Fresh && load.rw != "randrw" {
                size.base
            } else {
                size.area
            },
            again: disk == Disk::Private,
            millis: size.millis,
            ..load
        };
        let tail = tail.map(|t| t.0);
        jobs.push(Job {
            name: title.to_string(),
            rounds: size.rounds,
            peers: match (id, load.sync) {
                ("write.sequential.first", _) => {
                    |kind| kind.has_devices() || kind.is_file() || kind == PeerKind::CachedLoop
                }
                (_, true) => |kind| kind.waits() || kind == PeerKind::CachedLoop,
                _ if load.depth == 1 => PeerKind::waits,
                _ => PeerKind::has_devices,
            },
            measure: Box::new(move |lab, peer, gauge, _| {
                write(lab, peer, gauge, &load, disk, id, tail)
            }),
        });
    }
    jobs
}

fn write(
    lab: &Lab<'_>,
    peer: &mut Peer,
    gauge: &mut Gauge,
    load: &Load,
    disk: Disk,
    id: &str,
    tail: Option<&str>,
) -> Result<Vec<Reading>> {
    let device = match disk {
        Disk::Fresh => {
            peer.fork(lab.work, None, "fresh")?;
            peer.attach(lab.work, "fresh")?
        }
        Disk::Private => {
            let (device, new) = peer.ensure(lab.work, "private")?;
            if new {
                fill(lab, &device, load.area)?;
            }
            device
        }
    };
    if load.rw == "randrw" {
        prime(peer, "fresh", load.area)?;
    }
    settle(peer.home());
    let write = || {
        let figures = fio::run(
            lab.work,
            &device,
            load,
            peer.kind != PeerKind::Cached,
            lab.seed(),
        )?;
        let started = Instant::now();
        let open = File::options().write(true).open(&device);
        open.and_then(|f| f.sync_all())
            .map_err(|e| Error::io("flush", &device, &e))?;
        Ok((figures, started.elapsed().as_secs_f64()))
    };
    let measured = peer.measure(|| gauge.during(write));
    if disk == Disk::Fresh {
        peer.remove(lab.work, "fresh")?;
        settle(peer.home());
    }
    let (figures, flush) = measured?;
    let value = |more| match load.block > 4096 {
        true => figures.megabytes(more),
        false => figures.iops(more),
    };
    let mut readings = vec![Reading::of(id, value(flush)).during(value(0.0))];
    if let (Some(row), Some(p99)) = (tail, figures.sync_p99) {
        readings.push(Reading::of(row, p99));
    }
    Ok(readings)
}

/// Writes the first `len` bytes of a device, durably.
fn fill(lab: &Lab<'_>, device: &Path, len: u64) -> Result<()> {
    let load = Load {
        rw: "write",
        block: 1 << 20,
        depth: 4,
        again: false,
        area: len,
        millis: 600_000,
        ..READ
    };
    fio::run(lab.work, device, &load, true, lab.seed())?;
    Direct::open(device)?.flush()
}

/// What was removed or copied before must not be written during the next sample.
pub fn settle(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = rustix::fs::syncfs(dir);
    }
}

/// Reads what is below a disk once, through the page cache, where it is not there already.
pub fn prime(peer: &Peer, name: &str, area: u64) -> Result<()> {
    // Below the others is direct I/O: to them it makes no difference.
    if !peer.kind.is_forkdisk() {
        return Ok(());
    }
    for path in peer.files(name) {
        let Ok(mut file) = File::open(&path) else {
            continue;
        };
        let len = file.metadata().map_or(0, |m| m.len()).min(area);
        // Not all kernels tell; then it is read again.
        if cachestat::cached(file.as_fd()).is_ok_and(|cached| cached >= len) {
            continue;
        }
        let mut part = std::io::Read::take(&mut file, len);
        std::io::copy(&mut part, &mut std::io::sink()).map_err(|e| Error::io("read", &path, &e))?;
    }
    Ok(())
}

/// Drops the page cache: all of it as root, else our own files.
pub fn drop_caches(files: &[std::path::PathBuf]) {
    for path in files {
        if let Ok(file) = File::open(path) {
            let _ = file.sync_data();
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

/// Does a device keep what was written? Random writes at depth 32 that are verified, then a filesystem that is checked.
pub fn correct(lab: &Lab<'_>, peer: &mut Peer) -> Result<()> {
    fio::must_exist(lab.work)?;
    lab.work.need("mkfs.ext4", "e2fsprogs")?;
    peer.fork(lab.work, None, "gate")?;
    let device = peer.attach(lab.work, "gate")?;
    let shown = device.display().to_string();
    let bytes = lab.size.base.min(64 << 20).min(lab.size.shared);
    let mut command = lab.work.command("fio");
    command
        .args(["--name=gate", "--ioengine=libaio", "--direct=1", "--thread"])
        .args([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--allow_file_create=0",
        ])
        .args([
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args([format!("--filename={shown}"), format!("--size={bytes}")]);
    lab.work.long(command).map_err(|e| {
        // It tells so for a mismatch; everything else is a failure of another kind.
        let said = e.to_string();
        match said.contains("verify: ") || said.contains("verify failed") {
            true => corrupt("fio reads other bytes than it wrote, at queue depth 32"),
            false => e,
        }
    })?;
    let mut make = lab.work.command("mkfs.ext4");
    lab.work.long({
        make.args(["-qF", &shown]);
        make
    })?;
    let dir = lab.work.mkdir("gate")?;
    mounts::mount(&device, &dir, &mounts::Options::default())?;
    let wrote = fs::write(dir.join("file"), vec![7; 1 << 20]);
    let unmounted = unmount(&dir);
    wrote.map_err(|e| Error::io("write", &dir, &e))?;
    unmounted?;
    let mut check = lab.work.command("e2fsck");
    lab.work
        .long({
            check.args(["-fn", &shown]);
            check
        })
        .map_err(|e| match e.kind() {
            Kind::Interrupted => e,
            _ => corrupt("e2fsck finds a new filesystem damaged"),
        })?;
    peer.remove(lab.work, "gate")
}

/// Unmounts; somebody may look at a new filesystem for a moment.
pub fn unmount(dir: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match mounts::unmount(dir) {
            Err(e) if e.kind() == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

fn corrupt(how: &str) -> Error {
    Error::new(Kind::Corrupt, format!("it corrupts data: {how}")).hint("use QEMU 10.2 or newer")
}
