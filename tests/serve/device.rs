//! Loop devices over served files, and filesystems on them.

use crate::{
    disks::MemDisk,
    namespace::LEAVE_OTHERS,
    rig::{Loop, Random, Rig, eventually, mounts_lock, root, run},
};
use forkdisk::{
    attach::{self, Detach, DetachOptions, LoopOptions, MountOptions},
    disk::Disk,
    error::Kind,
    serve::fuse::Options,
    sys::{holders, loopdev, process},
};
use std::{
    fs::{self, File},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
const QUICK: DetachOptions = DetachOptions {
    timeout: Duration::from_secs(2),
    force: false,
    server: None,
};

/// A program that runs until the end of the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn queue(device: &Path, file: &str) -> String {
    let name = device.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{name}/queue/{file}"))
        .unwrap()
        .trim()
        .to_string()
}

#[test]
fn a_device_is_the_disk() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    for block_size in [512, 4096] {
        let name = format!("disk-{block_size}");
        let disk = Arc::new(MemDisk::new(64 * MIB));
        let dev = rig.attach(
            &name,
            disk.clone(),
            LoopOptions {
                block_size,
                ..Default::default()
            },
        );
        let status = loopdev::status(dev.device()).unwrap().unwrap();
        assert!(
            status.direct_io && !status.read_only && !status.autoclear,
            "{status:?}"
        );
        assert_eq!((status.dev, status.ino), (dev.0.dev, dev.0.ino));
        assert!(status.file_name.ends_with(&name), "{status:?}");
        assert_eq!(
            loopdev::backing_file(dev.device()).unwrap(),
            rig.dir.path().join(&name)
        );
        assert_eq!(
            queue(dev.device(), "logical_block_size"),
            block_size.to_string()
        );
        assert_eq!(queue(dev.device(), "read_ahead_kb"), "1024");
        assert_eq!(queue(dev.device(), "rotational"), "0");
        assert_eq!(queue(dev.device(), "rq_affinity"), where_made());
        assert_eq!(
            attach::find_loops(dev.0.dev, dev.0.ino).unwrap(),
            std::slice::from_ref(&dev.0)
        );

        // A pattern through dd, straight and through the page cache, with odd sizes.
        let mut pattern = vec![0; 9 * MIB as usize];
        Random::new("a_device_is_the_disk").fill(&mut pattern);
        let source = tempfile::NamedTempFile::new().unwrap();
        fs::write(source.path(), &pattern).unwrap();
        let input = format!("if={}", source.path().display());
        let output = format!("of={}", dev.path());
        for (at, bs, extra) in [
            (0, 1 << 20, "direct"),
            (16 * MIB, 65536, "direct"),
            (32 * MIB, 1000, ""),
        ] {
            let seek = format!("seek={at}");
            let bs = format!("bs={bs}");
            let flags = format!("oflag=seek_bytes,{extra}");
            let flags = flags.trim_end_matches(',');
            run(
                "dd",
                &[
                    &input,
                    &output,
                    &bs,
                    &seek,
                    flags,
                    "conv=notrunc,fsync",
                    "status=none",
                ],
            );
            let mut now = vec![0; pattern.len()];
            disk.read(&mut now, at).unwrap();
            assert!(now == pattern, "at {at}");
        }
        let mut all = vec![0; 64 * MIB as usize];
        File::open(dev.device())
            .unwrap()
            .read_exact_at(&mut all, 0)
            .unwrap();
        let mut now = vec![0; all.len()];
        disk.read(&mut now, 0).unwrap();
        assert!(all == now);

        let device = dev.device().to_path_buf();
        assert_eq!(attach::detach_loop(&dev.0, QUICK).unwrap(), Detach::Done);
        assert_eq!(loopdev::status(&device).unwrap(), None);
        // As long as it is nobody else's.
        if device.exists() && loopdev::backing_file(&device).is_none() {
            let affinity = queue(&device, "rq_affinity");
            assert!(affinity == "1" || loopdev::backing_file(&device).is_some());
        }
        assert_eq!(attach::detach_loop(&dev.0, QUICK).unwrap(), Detach::Gone);
    }
    assert_eq!(rig.files.total().errors, 0);
}

/// What a device has of which few requests are under way.
fn where_made() -> &'static str {
    match loopdev::can_complete() {
        true => "2",
        false => "1",
    }
}

/// Some thousand reads of one block past the page cache, by so many threads.
fn read_by(device: &Path, threads: u64) {
    let one = || {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(device)
            .unwrap();
        let mut memory = vec![0; 2 * 4096];
        let start = memory.as_ptr().align_offset(4096);
        for n in 0..4096 / threads {
            let block = &mut memory[start..start + 4096];
            file.read_exact_at(block, n % 512 * 4096).unwrap();
        }
    };
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(one))));
}

/// Where many requests are under way none of them is worth an interrupt.
#[test]
fn a_device_suits_its_load() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let mut disk = MemDisk::new(2 * MIB);
    disk.read_delay = Duration::from_micros(200);
    let dev = rig.attach("disk", Arc::new(disk), LoopOptions::default());
    let ino = rig.files.lookup("disk").unwrap().ino();
    // Nobody has said yet whose device it is.
    read_by(dev.device(), 16);
    assert_eq!(queue(dev.device(), "rq_affinity"), where_made());
    rig.files.shown_as(ino, dev.device());
    for _ in 0..2 {
        for (threads, affinity) in [(16, "1"), (1, where_made())] {
            eventually("the device suits its load", || {
                read_by(dev.device(), threads);
                queue(dev.device(), "rq_affinity") == affinity
            });
        }
    }
}

#[test]
fn discard_zeroes_and_flush_arrive_as_such() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(64 * MIB));
    let dev = rig.attach("disk", disk.clone(), LoopOptions::default());
    let file = File::options()
        .read(true)
        .write(true)
        .open(dev.device())
        .unwrap();
    file.write_all_at(&vec![7; 8 * MIB as usize], 0).unwrap();
    let flushes = disk.asked.flushes.load(SeqCst);
    file.sync_all().unwrap();
    assert!(disk.asked.flushes.load(SeqCst) > flushes);

    run(
        "blkdiscard",
        &["-o", "1048576", "-l", "1048576", dev.path()],
    );
    assert_eq!(
        disk.asked.discards.lock().iter().map(|d| d.1).sum::<u64>(),
        MIB
    );
    assert!(disk.asked.zeroes.lock().is_empty());
    // Not a multiple of the disk's blocks: exactly these bytes are zero afterwards.
    run(
        "blkdiscard",
        &["-z", "-o", "2097664", "-l", "1024", dev.path()],
    );
    let zeroed = disk.asked.zeroes.lock().iter().map(|d| d.1).sum::<u64>()
        + disk
            .asked
            .discards
            .lock()
            .iter()
            .skip(1)
            .map(|d| d.1)
            .sum::<u64>();
    assert_eq!(zeroed, 1024);
    let mut all = vec![0; 8 * MIB as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    for (i, &byte) in all.iter().enumerate() {
        let zero = (MIB..2 * MIB).contains(&(i as u64)) || (2_097_664..2_098_688).contains(&i);
        assert_eq!(byte, if zero { 0 } else { 7 }, "byte {i}");
    }
    println!(
        "discards {:?} zeroes {:?}",
        disk.asked.discards.lock(),
        disk.asked.zeroes.lock()
    );
    // The whole device in few requests.
    disk.asked.discards.lock().clear();
    run("blkdiscard", &[dev.path()]);
    assert_eq!(
        disk.asked.discards.lock().iter().map(|d| d.1).sum::<u64>(),
        64 * MIB
    );
}

#[test]
fn filesystems_live_on_it() {
    if !root() {
        return;
    }
    let _lock = mounts_lock(false);
    let rig = Rig::new();
    for (fs_type, block_size) in [("ext4", 512), ("ext4", 4096), ("xfs", 512), ("btrfs", 4096)] {
        let name = format!("{fs_type}-{block_size}");
        let disk = Arc::new(MemDisk::new(512 * MIB));
        let dev = rig.attach(
            &name,
            disk,
            LoopOptions {
                block_size,
                ..Default::default()
            },
        );
        let at = tempfile::tempdir().unwrap();
        let e = attach::mount(dev.device(), at.path(), &MountOptions::default()).unwrap_err();
        assert_eq!(e.kind(), Kind::Unsupported, "{e:?}");
        let force = if fs_type == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{fs_type}"), &["-q", force, dev.path()]);
        let mounted = attach::mount(dev.device(), at.path(), &MountOptions::default()).unwrap();
        assert_eq!(
            (mounted.fs_type.as_str(), mounted.without_journal),
            (fs_type, false)
        );
        assert_eq!(attach::mounts_of(dev.device()).unwrap(), [at.path()]);
        assert_eq!(
            attach::device_at(at.path()).unwrap().as_deref(),
            Some(dev.device())
        );
        run(
            "cp",
            &["-a", "/usr/include/linux", at.path().to_str().unwrap()],
        );
        run("fstrim", &[at.path().to_str().unwrap()]);
        attach::unmount(at.path()).unwrap();
        match fs_type {
            "ext4" => drop(run("e2fsck", &["-fn", dev.path()])),
            "xfs" => drop(run("xfs_repair", &["-n", dev.path()])),
            _ => drop(run("btrfs", &["check", dev.path()])),
        }
        let read_only = MountOptions {
            read_only: true,
            ..Default::default()
        };
        attach::mount(dev.device(), at.path(), &read_only).unwrap();
        let copy = at.path().join("linux");
        run(
            "diff",
            &[
                "-r",
                "--no-dereference",
                "/usr/include/linux",
                copy.to_str().unwrap(),
            ],
        );
        attach::unmount(at.path()).unwrap();
        assert_eq!(attach::detach_loop(&dev.0, QUICK).unwrap(), Detach::Done);
    }
    let stats = rig.files.total();
    assert!(stats.errors == 0 && stats.discards > 0, "{stats:?}");
}

/// What was mounted when the power went: mounts read-only all the same, twice at a time too.
#[test]
fn a_dirty_journal_mounts_read_only() {
    if !root() {
        return;
    }
    let _lock = mounts_lock(false);
    let rig = Rig::new();
    for fs_type in ["ext4", "xfs"] {
        let disk = Arc::new(MemDisk::new(512 * MIB));
        let dev = rig.attach(
            &format!("{fs_type}-live"),
            disk.clone(),
            LoopOptions::default(),
        );
        run(
            &format!("mkfs.{fs_type}"),
            &[
                "-q",
                if fs_type == "ext4" { "-F" } else { "-f" },
                dev.path(),
            ],
        );
        let at = tempfile::tempdir().unwrap();
        attach::mount(dev.device(), at.path(), &MountOptions::default()).unwrap();
        fs::write(at.path().join("kept"), "kept").unwrap();
        attach::unmount(at.path()).unwrap();
        attach::mount(dev.device(), at.path(), &MountOptions::default()).unwrap();
        fs::write(at.path().join("in the journal"), "perhaps").unwrap();
        run("sync", &["-f", at.path().to_str().unwrap()]);
        // The image of a mounted filesystem, as a snapshot is.
        let mut image = MemDisk::new(512 * MIB);
        let mut buf = vec![0; MIB as usize];
        for at in (0..512 * MIB).step_by(MIB as usize) {
            disk.read(&mut buf, at).unwrap();
            if buf.iter().any(|&b| b != 0) {
                image.write(&buf, at).unwrap();
            }
        }
        image.read_only = true;
        let image = Arc::new(image);
        let snap = rig.attach(
            &format!("{fs_type}-snap"),
            image.clone(),
            LoopOptions {
                read_only: true,
                ..Default::default()
            },
        );
        let writes = image.asked.writes.load(SeqCst);
        let there = tempfile::tempdir().unwrap();
        let read_only = MountOptions {
            read_only: true,
            ..Default::default()
        };
        let mounted = attach::mount(snap.device(), there.path(), &read_only).unwrap();
        assert!(mounted.without_journal, "{mounted:?}");
        assert_eq!(
            fs::read_to_string(there.path().join("kept")).unwrap(),
            "kept"
        );
        attach::unmount(there.path()).unwrap();
        assert_eq!(image.asked.writes.load(SeqCst), writes);
        attach::unmount(at.path()).unwrap();
    }
}

#[test]
fn thirty_two_requests_of_a_device_are_in_service_at_once() {
    if !root() {
        return;
    }
    let rig = Rig::with(Options {
        max_threads: 40,
        keep_threads: 1,
        ..Options::default()
    });
    let mut disk = MemDisk::new(64 * MIB);
    disk.read_delay = Duration::from_millis(5);
    let dev = rig.attach("disk", Arc::new(disk), LoopOptions::default());
    let threads: Vec<_> = (0..32u64)
        .map(|i| {
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(dev.device())
                .unwrap();
            thread::spawn(move || {
                let mut map = memmap2::MmapMut::map_anon(4096).unwrap();
                for j in 0..40 {
                    file.read_exact_at(&mut map, (i * 40 + j) * 4096 * 2 % (64 * MIB))
                        .unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let max = rig.files.total().max_in_flight;
    assert!(max >= 32, "{max} at once");
}

#[test]
fn a_full_disk_says_so_through_the_device() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(16 * MIB));
    let dev = rig.attach("disk", disk.clone(), LoopOptions::default());
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(dev.device())
        .unwrap();
    let map = memmap2::MmapMut::map_anon(4096).unwrap();
    for (kind, errno) in [(Kind::NoSpace, libc::ENOSPC), (Kind::Corrupt, libc::EIO)] {
        *disk.fail.lock() = Some(kind);
        assert_eq!(
            file.write_at(&map, 0).unwrap_err().raw_os_error(),
            Some(errno)
        );
    }
    *disk.fail.lock() = None;
    file.write_all_at(&map, 0).unwrap();
}

#[test]
fn twelve_devices_attach_and_detach_at_once() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let seen = AtomicU64::new(0);
    thread::scope(|s| {
        for i in 0..12 {
            let (rig, seen) = (&rig, &seen);
            s.spawn(move || {
                let disk = Arc::new(MemDisk::new(MIB));
                let dev = rig.attach(&format!("disk-{i}"), disk.clone(), LoopOptions::default());
                let file = File::options().write(true).open(dev.device()).unwrap();
                file.write_all_at(&[i as u8; 4096], 0).unwrap();
                file.sync_all().unwrap();
                drop(file);
                let mut now = [0; 4096];
                disk.read(&mut now, 0).unwrap();
                assert_eq!(now, [i as u8; 4096]);
                // All twelve are there before the first goes.
                seen.fetch_add(1, SeqCst);
                eventually("all are attached", || seen.load(SeqCst) == 12);
                assert_eq!(attach::detach_loop(&dev.0, QUICK).unwrap(), Detach::Done);
                assert!(!attach::is_attached(&dev.0).unwrap());
            });
        }
    });
}

#[test]
fn a_device_in_use_names_who_uses_it() {
    if !root() {
        return;
    }
    let _lock = mounts_lock(true);
    let rig = Rig::new();
    let dev = rig.attach(
        "disk",
        Arc::new(MemDisk::new(64 * MIB)),
        LoopOptions::default(),
    );
    let refused = |what: &str| {
        let start = Instant::now();
        let e = attach::detach_loop(&dev.0, QUICK).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
        assert!(e.to_string().contains(what), "{e:?} does not name {what}");
        assert!(e.hint_text().is_some() && start.elapsed() < Duration::from_secs(2));
        let status = loopdev::status(dev.device()).unwrap().unwrap();
        assert!(!status.autoclear, "refused, and yet on its way out");
    };
    let sleeper = |args: &mut Command| Running(args.spawn().unwrap());

    let held = File::open(dev.device()).unwrap();
    let open = sleeper(Command::new("sleep").arg("600").stdin(Stdio::from(held)));
    refused(&format!("sleep (pid {})", open.0.id()));
    // One process can be left out of the search: the server, which has thousands of descriptors and none of a device.
    let found = |server| {
        let found = holders::of_device(dev.device(), server).unwrap();
        let is_it = |h: &holders::Holder| matches!(h, holders::Holder::Process { pid, .. } if *pid == open.0.id() as i32);
        found.iter().any(is_it)
    };
    assert!(found(None) && found(Some(1)) && !found(Some(open.0.id() as i32)));
    drop(open);

    run("mkfs.ext4", &["-q", "-F", dev.path()]);
    let at = tempfile::tempdir().unwrap();
    attach::mount(dev.device(), at.path(), &MountOptions::default()).unwrap();
    refused(&format!("mounted on {}", at.path().display()));

    let inside = sleeper(Command::new("sleep").arg("600").current_dir(at.path()));
    let e = attach::unmount(at.path()).unwrap_err();
    assert_eq!(e.kind(), Kind::Busy);
    assert!(
        e.to_string().contains(&format!("pid {}", inside.0.id())),
        "{e:?}"
    );
    drop(inside);
    attach::unmount(at.path()).unwrap();

    // Mounted where we cannot see it: in the namespace of another process.
    let script = format!(
        "{LEAVE_OTHERS}\nmount {} {} && exec sleep 600",
        dev.path(),
        at.path().display()
    );
    let hidden = sleeper(
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .process_group(0),
    );
    eventually("the hidden mount is there", || {
        process::comm(hidden.0.id() as i32).as_deref() == Some("sleep")
    });
    eventually("it is found", || {
        holders::of_device(dev.device(), None)
            .unwrap()
            .iter()
            .any(|h| matches!(h, holders::Holder::Mount { .. }))
    });
    refused(&format!("in the namespace of pid {}", hidden.0.id()));
    drop(hidden);
    eventually("the device is free to go", || {
        attach::detach_loop(&dev.0, QUICK).is_ok()
    });
    assert_eq!(loopdev::status(dev.device()).unwrap(), None);
}

#[test]
fn a_device_that_became_someone_elses_is_left_alone() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let dev = rig.attach("ours", Arc::new(MemDisk::new(MIB)), LoopOptions::default());
    let mut mistaken = dev.0.clone();
    mistaken.ino += 1;
    assert_eq!(attach::detach_loop(&mistaken, QUICK).unwrap(), Detach::Gone);
    assert!(attach::is_attached(&dev.0).unwrap());
    assert_eq!(
        loopdev::detach(dev.device(), dev.0.dev, mistaken.ino, QUICK).unwrap(),
        Detach::Gone
    );
    assert!(attach::is_attached(&dev.0).unwrap());
}

#[test]
fn a_failing_flush_keeps_the_device_unless_forced() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(MIB));
    let dev = rig.attach("disk", disk.clone(), LoopOptions::default());
    // Written to the device's page cache and not further.
    let file = File::options().write(true).open(dev.device()).unwrap();
    *disk.fail.lock() = Some(Kind::Poisoned);
    file.write_all_at(&[1; 4096], 0).unwrap();
    // A second handle: the first one's closing is what would write it back.
    let again = File::open(dev.device()).unwrap();
    drop(file);
    let open = dev.device().to_path_buf();
    let e = loopdev::detach(&open, dev.0.dev, dev.0.ino, QUICK).unwrap_err();
    assert_eq!(e.kind(), Kind::Io, "{e:?}");
    drop(again);
    assert!(attach::is_attached(&dev.0).unwrap());
    let force = DetachOptions {
        force: true,
        ..QUICK
    };
    assert_eq!(attach::detach_loop(&dev.0, force).unwrap(), Detach::Done);
}

#[test]
fn a_device_grows_with_its_disk() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let dev = rig.attach("disk", Arc::new(MemDisk::new(MIB)), LoopOptions::default());
    let disk = Arc::new(MemDisk::new(4 * MIB));
    rig.files.replace(dev.0.ino, disk.clone()).unwrap();
    rig.session.size_changed(dev.0.ino).unwrap();
    attach::size_changed(&dev.0).unwrap();
    assert_eq!(
        run("blockdev", &["--getsize64", dev.path()]).trim(),
        (4 * MIB).to_string()
    );
    let file = File::options().write(true).open(dev.device()).unwrap();
    file.write_all_at(&[1; 4096], 3 * MIB).unwrap();
    file.sync_all().unwrap();
    let mut now = [0; 4096];
    disk.read(&mut now, 3 * MIB).unwrap();
    assert_eq!(now, [1; 4096]);
}

#[test]
fn what_cannot_be_attached_is_refused_with_a_reason() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let mut disk = MemDisk::new(MIB);
    disk.read_only = true;
    let (_, path) = rig.serve("read-only", Arc::new(disk));
    let e = attach::attach_loop(&path, LoopOptions::default()).unwrap_err();
    assert_eq!(e.kind(), Kind::ReadOnly);
    assert!(e.hint_text().unwrap().contains("--ro"));
    let e = attach::attach_loop(
        &path,
        LoopOptions {
            read_only: true,
            block_size: 1000,
        },
    )
    .unwrap_err();
    assert_eq!(e.kind(), Kind::Invalid);
    let dev = Loop(
        attach::attach_loop(
            &path,
            LoopOptions {
                read_only: true,
                block_size: 512,
            },
        )
        .unwrap(),
    );
    assert!(
        File::options().write(true).open(dev.device()).is_err() || {
            let file = File::options().write(true).open(dev.device()).unwrap();
            file.write_all_at(&[0; 512], 0).is_err() || file.sync_all().is_err()
        }
    );
    assert_eq!(rig.files.total().writes, 0);
}
