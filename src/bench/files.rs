//! What a filesystem on the disk makes of it: a database, an archive, one small change.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Level,
        book::{Better, Book, Must, Reading},
        peers::{Direct, Numbers, Peer, PeerKind, noise},
        quiet::Others,
        sharing::overlay_mount,
        speed::{settle, unmount},
        work,
    },
    error::{Error, Result},
    sys::{mounts, signals},
};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::Path,
    time::Instant,
};

/// What each of these is called in the list.
const MODES: [(&str, &str); 2] = [
    ("delete", "files.sqlite.delete"),
    ("wal", "files.sqlite.wal"),
];
const UNTAR: &str = "files.untar";
const CHANGE: &str = "change.time";
const BYTES: &str = "change.bytes";

/// The rows of filesystems.
pub fn jobs<'a>(lab: &Lab<'_>, book: &mut Book) -> Result<Vec<Job<'a>>> {
    let size = &lab.size;
    let low = Better::Lower;
    let g = Group::Write;
    let title = format!(
        "4 KiB changed in a fork (overlayfs: a file of {} MiB)",
        size.large_file >> 20
    );
    book.row(g, CHANGE, &title, "ms", low, None);
    book.row(g, BYTES, "host bytes of that change", "bytes", low, None);
    let rounds = size.rounds.min(4);
    let mut jobs = vec![Job {
        name: "a small change".to_string(),
        rounds,
        peers: PeerKind::has_devices,
        measure: Box::new(change),
    }];
    let tools = [
        ("mkfs.ext4", "e2fsprogs"),
        ("sqlite3", "sqlite3"),
        ("tar", "tar"),
    ];
    if let Some((_, package)) = tools.iter().find(|t| !lab.work.has(t.0)) {
        book.remark(&format!(
            "sqlite and untar are left out: `apt-get install {package}`"
        ));
        return Ok(jobs);
    }
    let n = size.transactions;
    for (mode, id) in MODES {
        let must = Some(Must::RatioAtMost(1.1));
        book.row(
            g,
            id,
            &format!("sqlite, {n} transactions, {mode}"),
            "s",
            low,
            must,
        );
    }
    let title = format!("untar {} files + sync", size.files);
    book.row(g, UNTAR, &title, "s", low, Some(Must::RatioAtMost(1.0)));
    archive(&lab.work.path("files.tar"), size.files)?;
    for (mode, _) in MODES {
        let path = lab.work.path(&format!("{mode}.sql"));
        fs::write(&path, script(mode, n)).map_err(|e| Error::io("write", &path, &e))?;
    }
    jobs.push(Job {
        name: "a database and an archive".to_string(),
        rounds: if size.level == Level::Quick {
            1
        } else {
            rounds
        },
        peers: PeerKind::waits,
        measure: Box::new(|lab, peer, gauge, _| {
            peer.fork(lab.work, None, "files")?;
            let device = peer.attach(lab.work, "files")?;
            let mut make = lab.work.command("mkfs.ext4");
            // A raw file must not become sparse by it.
            make.args([
                "-qF",
                "-E",
                "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
            ]);
            lab.work.long({
                make.arg(&device);
                make
            })?;
            let dir = lab.work.mkdir("files-on")?;
            mounts::mount(&device, &dir, &mounts::Options::default())?;
            settle(&dir);
            let readings = peer.measure(|| programs(lab, &dir, gauge));
            unmount(&dir)?;
            peer.remove(lab.work, "files")?;
            settle(peer.home());
            readings
        }),
    });
    Ok(jobs)
}

/// Runs the programs in a directory.
fn programs(lab: &Lab<'_>, dir: &Path, gauge: &mut Gauge) -> Result<Vec<Reading>> {
    let mut readings = Vec::new();
    for (mode, id) in MODES {
        let mut command = lab.work.command("sqlite3");
        command.arg(dir.join(format!("{mode}.db")));
        command.arg(format!(
            ".read {}",
            lab.work.path(&format!("{mode}.sql")).display()
        ));
        let took = gauge.during(|| timed(lab, command, dir))?;
        readings.push(Reading::of(id, took));
    }
    let mut command = lab.work.command("tar");
    command
        .arg("xf")
        .arg(lab.work.path("files.tar"))
        .arg("-C")
        .arg(dir);
    let took = gauge.during(|| timed(lab, command, dir))?;
    readings.push(Reading::of(UNTAR, took));
    Ok(readings)
}

/// Seconds of a command, until all that it wrote is durable.
fn timed(lab: &Lab<'_>, command: std::process::Command, dir: &Path) -> Result<f64> {
    let open = File::open(dir).map_err(|e| Error::io("open", dir, &e))?;
    let started = Instant::now();
    lab.work.long(command)?;
    rustix::fs::syncfs(open).map_err(|e| Error::io("sync", dir, &e.into()))?;
    Ok(started.elapsed().as_secs_f64())
}

fn script(mode: &str, transactions: u32) -> String {
    let mut text = format!(
        "PRAGMA journal_mode={mode};\nPRAGMA synchronous=FULL;\nCREATE TABLE t(id INTEGER PRIMARY KEY, data BLOB);\n"
    );
    for i in 0..transactions {
        text.push_str(&format!("INSERT INTO t VALUES({i}, randomblob(400));\n"));
    }
    text
}

/// Writes an archive of small files in a hundred directories.
fn archive(path: &Path, files: u32) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("write", path, &e);
    let mut out = BufWriter::new(File::create(path).map_err(failed)?);
    let mut numbers = Numbers::new(3);
    for i in 0..files {
        // From nothing to 16 KiB, small ones more often.
        let len = (numbers.draw() % 129 * (numbers.draw() % 129)) as usize;
        let mut data = vec![0; len];
        numbers.fill(&mut data);
        out.write_all(&header(&format!("d{}/f{i}", i % 100), len))
            .map_err(failed)?;
        data.resize(len.next_multiple_of(512), 0);
        out.write_all(&data).map_err(failed)?;
    }
    out.write_all(&[0; 1024]).map_err(failed)?;
    out.flush().map_err(failed)
}

/// The header of a file in a tar archive (ustar).
fn header(name: &str, len: usize) -> [u8; 512] {
    let mut block = [0u8; 512];
    let mut put = |at: usize, text: &str| {
        let bytes = text.as_bytes();
        block[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, name);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{len:011o}\0"));
    put(136, "00000000000\0");
    // The sum is taken with spaces in its own place.
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn change(lab: &Lab<'_>, peer: &mut Peer, gauge: &mut Gauge, _: u32) -> Result<Vec<Reading>> {
    peer.fork(lab.work, None, "changed")?;
    let device = peer.attach(lab.work, "changed")?;
    settle(peer.home());
    let before = peer.allocated()?;
    let mut numbers = Numbers::new(lab.seed());
    let at = numbers.draw() % (lab.size.base / 4096) * 4096;
    let took = gauge.during(|| {
        let started = Instant::now();
        let mut open = Direct::open(&device)?;
        open.write(&mut numbers, at, 4096)?;
        open.flush()?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    })?;
    let taken = peer.allocated()?.saturating_sub(before);
    peer.remove(lab.work, "changed")?;
    let mut readings = vec![Reading::of(CHANGE, took)];
    if peer.kind != PeerKind::Raw {
        readings.push(Reading::of(BYTES, taken as f64));
    }
    Ok(readings)
}

/// The same on overlayfs, on the host's filesystem.
pub fn overlay(lab: &Lab<'_>, book: &mut Book, kinds: &[PeerKind]) -> Result<()> {
    if !kinds.contains(&PeerKind::Overlayfs) {
        return Ok(());
    }
    let dir = lab.work.mkdir("overlay")?;
    match overlay_in(lab, book, &dir) {
        Err(e) if !signals::caught() => book.note(PeerKind::Overlayfs, &e.to_string()),
        other => other?,
    }
    lab.work.clear(&dir);
    Ok(())
}

fn overlay_in(lab: &Lab<'_>, book: &mut Book, dir: &Path) -> Result<()> {
    lab.watch.step(0, 1, "files on overlayfs");
    let lower = lab.work.mkdir("overlay/lower")?;
    noise(&lower.join("large"), lab.size.large_file, &|_| ())?;
    let failed = |e: std::io::Error| Error::io("change a file on", dir, &e);
    for round in 0..lab.size.rounds.min(2) {
        let mut gauge = Gauge {
            mark: lab.work.mark(),
            worst: Others::default(),
        };
        let name = round.to_string();
        let merged = overlay_mount(dir, &name)?;
        settle(&merged);
        let took = gauge.during(|| {
            let started = Instant::now();
            let open = File::options()
                .write(true)
                .open(merged.join("large"))
                .map_err(failed)?;
            open.write_all_at(&[7; 4096], 8192).map_err(failed)?;
            open.sync_data().map_err(failed)?;
            Ok(started.elapsed().as_secs_f64() * 1e3)
        })?;
        settle(&merged);
        let bytes = work::allocated(&dir.join(format!("upper-{name}"))) as f64;
        let mut readings = vec![Reading::of(CHANGE, took), Reading::of(BYTES, bytes)];
        if lab.work.path("files.tar").exists() {
            readings.extend(programs(lab, &merged, &mut gauge)?);
        }
        book.enter(PeerKind::Overlayfs, round, &readings, gauge.worst);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        archive(&path, 150).unwrap();
        let out = std::process::Command::new("tar")
            .arg("tf")
            .arg(&path)
            .output();
        // Where there is no tar, nothing is untarred.
        let Ok(out) = out else { return };
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        assert_eq!(out.stdout.split(|b| *b == b'\n').count(), 151);
    }
}
