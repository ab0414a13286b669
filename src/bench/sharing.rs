//! Many disks that read the same: how often the host reads it, and how often it is in memory.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Sizes,
        book::{Better, Book, Must, Reading},
        peers::{Peer, PeerKind, copy},
        quiet::Others,
        speed::{drop_caches, settle},
        work,
    },
    error::{Error, Result},
    sys::{cachestat, loopdev, signals},
};
use rustix::mount::MountFlags;
use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

/// Bytes that a loop device has read and written since it was set up.
pub fn traffic(device: &Path) -> Result<(u64, u64)> {
    let number = loopdev::number(device).unwrap_or(0);
    let path = format!("/sys/block/loop{number}/stat");
    let text = fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let fields: Vec<u64> = text
        .split_whitespace()
        .map(|f| f.parse().unwrap_or(0))
        .collect();
    let sectors = |i: usize| fields.get(i).copied().unwrap_or(0) * 512;
    Ok((sectors(2), sectors(6)))
}

fn rows(size: &Sizes, book: &mut Book) {
    let (n, mib) = (size.disks, size.shared >> 20);
    let fair = size.shared as f64 / 1e6 / f64::from(n);
    let low = Better::Lower;
    let g = Group::Sharing;
    let what = format!("{n} disks, same {mib} MiB");
    // A little more than the bytes themselves: the host reads its own metadata, too.
    let must = Some(Must::AtMost(fair * 1.0133));
    book.row(
        g,
        "share.read",
        &format!("{what}: host read per disk"),
        "MB",
        low,
        must,
    );
    book.row(
        g,
        "share.cache",
        &format!("{what}: page cache per disk"),
        "MB",
        low,
        None,
    );
    book.row(
        g,
        "share.below",
        &format!("{what}: of that, below the devices"),
        "MB",
        low,
        None,
    );
    book.row(
        g,
        "share.memory",
        &format!("{what}: memory of the servers, all"),
        "MB",
        low,
        None,
    );
}

/// The rows of sharing. `device` is below everything that has no filesystem of its own.
pub fn jobs<'a>(size: &Sizes, book: &mut Book, device: &Path) -> Vec<Job<'a>> {
    rows(size, book);
    let (disks, shared) = (size.disks, size.shared);
    let host = device.to_path_buf();
    vec![Job {
        name: format!("{disks} disks read the same"),
        rounds: 1,
        peers: |kind| kind.is_block() || kind == PeerKind::Qcow2Cached,
        measure: Box::new(move |lab, peer, gauge, _| {
            let host = peer.below().unwrap_or(&host).to_path_buf();
            let names: Vec<String> = (0..disks).map(|i| format!("share-{i}")).collect();
            let mut devices = Vec::new();
            for name in &names {
                peer.fork(lab.work, None, name)?;
                devices.push(peer.attach(lab.work, name)?);
            }
            let readings = measure(lab, peer, gauge, &host, &names, &devices, shared);
            for name in &names {
                peer.remove(lab.work, name)?;
            }
            readings
        }),
    }]
}

fn measure(
    lab: &Lab<'_>,
    peer: &mut Peer,
    gauge: &mut Gauge,
    host: &Path,
    names: &[String],
    devices: &[PathBuf],
    len: u64,
) -> Result<Vec<Reading>> {
    let files: BTreeSet<PathBuf> = names.iter().flat_map(|n| peer.files(n)).collect();
    let files: Vec<PathBuf> = files.into_iter().collect();
    settle(peer.home());
    drop_caches(&files);
    // A device's cache goes with its last user.
    let used: Vec<File> = devices.iter().filter_map(|d| File::open(d).ok()).collect();
    let cached_before = cached(&files);
    let before = traffic(host)?.0;
    gauge.during(|| devices.iter().try_for_each(|d| read(d, len)))?;
    let read = traffic(host)?.0 - before;
    let below = cached(&files).saturating_sub(cached_before);
    let all = below + cached(devices);
    drop(used);
    let memory: u64 = peer.servers(lab.work).into_iter().map(memory).sum();
    let each = |bytes: u64| bytes as f64 / 1e6 / devices.len() as f64;
    let mut readings = vec![
        Reading::of("share.read", each(read)),
        Reading::of("share.cache", each(all)),
        Reading::of("share.below", each(below)),
    ];
    if memory > 0 {
        readings.push(Reading::of("share.memory", memory as f64 / 1e6));
    }
    Ok(readings)
}

/// Reads as a filesystem does: through the page cache.
fn read(path: &Path, len: u64) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("read", path, &e);
    let mut file = File::open(path).map_err(failed)?.take(len);
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).map_err(failed)? > 0 {
        if signals::caught() {
            return Err(work::interrupted());
        }
    }
    Ok(())
}

fn cached(files: &[PathBuf]) -> u64 {
    let one = |path: &PathBuf| cachestat::cached(File::open(path).ok()?).ok();
    files.iter().filter_map(one).sum()
}

/// Memory of a process that is not in the page cache.
fn memory(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        number.unwrap_or(0) * 1024
    };
    field("RssAnon:") + field("RssShmem:")
}

/// A mounted overlay in `dir`, over its directory `lower`: where it is mounted.
pub fn overlay_mount(dir: &Path, name: &str) -> Result<PathBuf> {
    let sub = |part: &str| dir.join(format!("{part}-{name}"));
    let (upper, scratch, merged) = (sub("upper"), sub("scratch"), sub("merged"));
    for path in [&upper, &scratch, &merged] {
        fs::create_dir_all(path).map_err(|e| Error::io("create", path, &e))?;
    }
    let data = format!(
        "lowerdir={},upperdir={},workdir={}",
        dir.join("lower").display(),
        upper.display(),
        scratch.display()
    );
    let data = CString::new(data).unwrap_or_default();
    rustix::mount::mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        data.as_c_str(),
    )
    .map_err(|e| Error::io("mount an overlay on", &merged, &e.into()))?;
    Ok(merged)
}

/// The same on overlayfs: one file below, read through many mounts.
pub fn overlay(lab: &Lab<'_>, book: &mut Book, dir: &Path, device: &Path) -> Result<()> {
    let dir = dir.join("overlay");
    match overlay_in(lab, book, &dir, device) {
        Err(e) if !signals::caught() => book.note(PeerKind::Overlayfs, &format!("sharing: {e}")),
        other => return other,
    }
    lab.work.clear(&dir);
    Ok(())
}

fn overlay_in(lab: &Lab<'_>, book: &mut Book, dir: &Path, device: &Path) -> Result<()> {
    lab.watch.step(0, 1, "many overlays read the same");
    let lower = dir.join("lower");
    fs::create_dir_all(&lower).map_err(|e| Error::io("create", &lower, &e))?;
    let file = lower.join("file");
    copy(lab.work, &lab.work.path("base.img"), &file)?;
    let mut merged = Vec::new();
    for i in 0..lab.size.disks {
        merged.push(overlay_mount(dir, &i.to_string())?.join("file"));
    }
    let files = [file];
    drop_caches(&files);
    let cached_before = cached(&files);
    let before = traffic(device)?.0;
    let mut gauge = Gauge {
        mark: lab.work.mark(),
        worst: Others::default(),
    };
    gauge.during(|| merged.iter().try_for_each(|m| read(m, lab.size.shared)))?;
    let read = traffic(device)?.0 - before;
    let below = cached(&files).saturating_sub(cached_before);
    let each = |bytes: u64| bytes as f64 / 1e6 / merged.len() as f64;
    let readings = [
        Reading::of("share.read", each(read)),
        Reading::of("share.cache", each(below)),
        Reading::of("share.below", each(below)),
    ];
    book.enter(PeerKind::Overlayfs, 0, &readings, gauge.worst);
    lab.work.clear(dir);
    Ok(())
}
