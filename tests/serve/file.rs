//! The served file itself: reads, writes, holes, names, removal, the pool of threads.

use crate::{
    disks::MemDisk,
    namespace::LEAVE_OTHERS,
    rig::{Random, Rig, eventually, mounts_lock, root, run},
};
use forkdisk::{
    disk::Disk,
    error::Kind,
    serve::fuse::{Ended, Options},
};
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    sync::{Arc, Barrier, atomic::Ordering::SeqCst},
    thread,
    time::Duration,
};

const MIB: u64 = 1 << 20;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

#[test]
fn any_offset_and_length_reads_what_was_written() {
    if !root() {
        return;
    }
    const SIZE: u64 = 8 * MIB;
    let rig = Rig::new();
    rig.serve("disk", Arc::new(MemDisk::new(SIZE)));
    let file = rig.open("disk");
    let mut model = vec![0u8; SIZE as usize];
    let mut random = Random::new("any_offset_and_length");
    let mut buf = vec![0u8; 3 * MIB as usize];
    for step in 0..1500 {
        let max = if random.below(20) == 0 {
            3 * MIB
        } else {
            20_000
        };
        let at = random.below(SIZE);
        let len = (1 + random.below(max)).min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        match random.below(10) {
            0..4 => {
                let buf = &mut buf[..len as usize];
                random.fill(buf);
                file.write_all_at(buf, at).unwrap();
                model[range].copy_from_slice(buf);
            }
            4 => {
                fallocate(&file, PUNCH, at, len).unwrap();
                model[range].fill(0);
            }
            5 => {
                fallocate(&file, ZERO, at, len).unwrap();
                model[range].fill(0);
            }
            _ => {
                let buf = &mut buf[..len as usize];
                file.read_exact_at(buf, at).unwrap();
                assert!(buf == &model[range], "step {step}: {len} bytes at {at}");
            }
        }
    }
    file.sync_all().unwrap();
    assert!(fs::read(rig.dir.path().join("disk")).unwrap() == model);
    let total = rig.files.total();
    assert_eq!((total.in_flight, total.errors, total.flushes), (0, 0, 1));
}

#[test]
fn the_end_of_the_disk_is_the_end_of_the_file() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(MIB));
    let (ino, path) = rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    let meta = file.metadata().unwrap();
    assert_eq!(
        (meta.len(), meta.ino(), meta.mode() & 0o777),
        (MIB, ino, 0o600)
    );
    let mut buf = [1; 100];
    assert_eq!(file.read_at(&mut buf, MIB - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut buf, MIB).unwrap(), 0);
    assert_eq!(file.write_at(&buf, MIB - 10).unwrap(), 10);
    assert_eq!(
        file.write_at(&buf, MIB).unwrap_err().raw_os_error(),
        Some(libc::ENOSPC)
    );
    // Holes are clipped, promises of space within the size are given, growth is refused.
    fallocate(&file, PUNCH, MIB - 4096, 1 << 30).unwrap();
    assert_eq!(*disk.asked.discards.lock(), [(MIB - 4096, 4096)]);
    fallocate(&file, ZERO, 2 * MIB, 4096).unwrap();
    assert!(disk.asked.zeroes.lock().is_empty());
    fallocate(&file, FallocateFlags::empty(), 0, MIB).unwrap();
    assert_eq!(
        fallocate(&file, FallocateFlags::empty(), 0, MIB + 1),
        Err(Errno::PERM)
    );
    assert_eq!(
        fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096),
        Err(Errno::OPNOTSUPP)
    );
    file.set_len(MIB).unwrap();
    assert_eq!(
        file.set_len(0).unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
}

#[test]
fn a_changed_size_is_seen_once_the_kernel_is_told() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let (ino, path) = rig.serve("disk", Arc::new(MemDisk::new(MIB)));
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
    rig.files
        .replace(ino, Arc::new(MemDisk::new(2 * MIB)))
        .unwrap();
    rig.session.size_changed(ino).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 * MIB);
    rig.session.size_changed(999).unwrap();
}

#[test]
fn holes_are_found() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let size = 64 * MIB;
    rig.serve("disk", Arc::new(MemDisk::new(size)));
    let file = rig.open("disk");
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(5)), Ok(5));
    file.write_all_at(&[1; 4096], 40 * MIB).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(40 * MIB));
    assert_eq!(
        seek(&file, SeekFrom::Data(40 * MIB + 100)),
        Ok(40 * MIB + 100)
    );
    assert_eq!(
        seek(&file, SeekFrom::Hole(40 * MIB + 100)),
        Ok(40 * MIB + 4096)
    );
    assert_eq!(
        seek(&file, SeekFrom::Data(40 * MIB + 4096)),
        Err(Errno::NXIO)
    );
    file.write_all_at(&[1], size - 1).unwrap();
    assert_eq!(seek(&file, SeekFrom::Hole(size - 1)), Ok(size));
    assert_eq!(seek(&file, SeekFrom::Hole(size)), Err(Errno::NXIO));
    // A copying program finds them too.
    let copy = tempfile::NamedTempFile::new().unwrap();
    let from = rig.dir.path().join("disk");
    run(
        "cp",
        &[from.to_str().unwrap(), copy.path().to_str().unwrap()],
    );
    let meta = copy.as_file().metadata().unwrap();
    assert!(meta.len() == size && meta.blocks() * 512 < MIB, "{meta:?}");
}

#[test]
fn names_come_and_go() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let dir = rig.dir.path();
    for bad in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        let e = rig
            .files
            .add(bad, Arc::new(MemDisk::new(4096)))
            .unwrap_err();
        assert_eq!(e.kind(), Kind::Invalid, "{bad:?}");
    }
    let names: Vec<String> = (0..200)
        .map(|i| format!("web {i}@clean-{}", "y".repeat(i)))
        .collect();
    let inos: Vec<u64> = names
        .iter()
        .map(|n| rig.files.add(n, Arc::new(MemDisk::new(4096))).unwrap())
        .collect();
    assert_eq!(
        rig.files
            .add(&names[0], Arc::new(MemDisk::new(4096)))
            .unwrap_err()
            .kind(),
        Kind::Exists
    );
    let mut listed: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    listed.sort();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(listed, sorted);
    for (i, name) in names.iter().enumerate() {
        assert_eq!(fs::metadata(dir.join(name)).unwrap().ino(), inos[i]);
        rig.files.remove(inos[i]).unwrap();
        assert!(!dir.join(name).exists());
    }
    let again = rig
        .files
        .add(&names[0], Arc::new(MemDisk::new(4096)))
        .unwrap();
    assert!(!inos.contains(&again));
    assert_eq!(fs::metadata(dir.join(&names[0])).unwrap().ino(), again);
    // Nobody makes, moves or removes files from outside.
    assert!(File::create(dir.join("new")).is_err());
    assert!(fs::create_dir(dir.join("new")).is_err());
    assert!(fs::remove_file(dir.join(&names[0])).is_err());
    assert!(fs::rename(dir.join(&names[0]), dir.join("new")).is_err());
    assert!(std::os::unix::fs::symlink("x", dir.join("new")).is_err());
    assert!(!dir.join("x".repeat(255)).exists());
    assert!(!dir.join("x".repeat(256)).exists());
    run("stat", &["-f", dir.to_str().unwrap()]);
}

#[test]
fn removal_waits_for_requests_and_leaves_a_stale_file() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let mut disk = MemDisk::new(MIB);
    disk.read_delay = Duration::from_millis(200);
    let disk = Arc::new(disk);
    let (ino, _) = rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    assert_eq!(rig.files.list()[0].opens, 1);
    thread::scope(|s| {
        let reader = s.spawn(|| file.read_exact_at(&mut [0; 4096], 0));
        eventually("a read is under way", || disk.asked.reads.load(SeqCst) == 1);
        let removed = rig.files.remove(ino).unwrap();
        // The registry, the test's two handles; none is with a worker.
        drop(removed);
        assert_eq!(Arc::strong_count(&disk), 1);
        reader.join().unwrap().unwrap();
    });
    let stale = Some(libc::ESTALE);
    assert_eq!(
        file.read_at(&mut [0; 10], 0).unwrap_err().raw_os_error(),
        stale
    );
    assert_eq!(
        file.write_at(&[0; 10], 0).unwrap_err().raw_os_error(),
        stale
    );
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), stale);
    assert_eq!(
        rig.files.remove(ino).map(|_| ()).unwrap_err().kind(),
        Kind::NotFound
    );
    drop(file);
    // A namesake is another file.
    rig.serve("disk", Arc::new(MemDisk::new(4096)));
    assert_eq!(rig.open("disk").metadata().unwrap().len(), 4096);
}

#[test]
fn quiesced_means_that_nothing_is_under_way() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let mut disk = MemDisk::new(MIB);
    disk.read_delay = Duration::from_millis(2);
    let (ino, _) = rig.serve("disk", Arc::new(disk));
    let file = rig.open("disk");
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while !stop.load(SeqCst) {
                    file.read_exact_at(&mut [0; 4096], 0).unwrap();
                }
            });
        }
        eventually("reads are under way", || rig.files.total().in_flight > 1);
        for _ in 0..20 {
            rig.files
                .quiesce(ino, |_| assert_eq!(rig.files.total().in_flight, 0))
                .unwrap();
        }
        stop.store(true, SeqCst);
    });
}

#[test]
fn errors_keep_their_meaning() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(MIB));
    rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    for (kind, errno) in [
        (Kind::NoSpace, libc::ENOSPC),
        (Kind::Corrupt, libc::EIO),
        (Kind::Poisoned, libc::EIO),
        (Kind::Unsupported, libc::EOPNOTSUPP),
    ] {
        *disk.fail.lock() = Some(kind);
        assert_eq!(
            file.write_at(&[0; 10], 0).unwrap_err().raw_os_error(),
            Some(errno)
        );
        assert_eq!(
            file.read_at(&mut [0; 10], 0).unwrap_err().raw_os_error(),
            Some(errno)
        );
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(errno));
        assert_eq!(
            fallocate(&file, PUNCH, 0, 4096).unwrap_err().raw_os_error(),
            errno
        );
    }
    *disk.fail.lock() = None;
    file.sync_data().unwrap();
    assert_eq!(rig.files.list()[0].stats.errors, 16);

    let mut read_only = MemDisk::new(MIB);
    read_only.read_only = true;
    let (_, path) = rig.serve("read-only", Arc::new(read_only));
    let e = File::options().write(true).open(&path).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(libc::EROFS));
    assert_eq!(
        File::open(&path).unwrap().metadata().unwrap().mode() & 0o777,
        0o400
    );
}

#[test]
fn thirty_two_requests_are_served_at_once() {
    if !root() {
        return;
    }
    let rig = Rig::with(Options {
        max_threads: 33,
        keep_threads: 2,
        ..Options::default()
    });
    let mut disk = MemDisk::new(MIB);
    disk.read_delay = Duration::from_millis(500);
    // The watch finds out.
    disk.says_so = false;
    let disk = Arc::new(disk);
    rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    let barrier = Barrier::new(32);
    let start = std::time::Instant::now();
    thread::scope(|s| {
        for i in 0..32 {
            let (file, barrier) = (&file, &barrier);
            s.spawn(move || {
                barrier.wait();
                file.read_exact_at(&mut [0; 4096], i * 4096).unwrap();
            });
        }
    });
    assert_eq!(rig.files.total().max_in_flight, 32);
    assert!(
        start.elapsed() < Duration::from_secs(8),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(rig.session.threads().1, 33);
    // With little to do the pool shrinks again.
    thread::sleep(Duration::from_millis(5200));
    for _ in 0..200 {
        file.metadata().unwrap();
        file.read_exact_at(&mut [0; 1], 0).unwrap();
        if rig.session.threads().0 <= 4 {
            return;
        }
    }
    panic!("still {:?} threads", rig.session.threads());
}

/// Many reads that wait for the disk are begun by one and finished by another; a session that stops has answered them all.
#[test]
fn reads_that_were_begun_are_answered_whoever_finishes_them() {
    if !root() {
        return;
    }
    for round in 0..4 {
        let rig = Rig::new();
        let mut disk = MemDisk::new(4 * MIB);
        disk.read_delay = Duration::from_millis(2);
        disk.begins = true;
        let disk = Arc::new(disk);
        rig.serve("disk", disk.clone());
        let file = rig.open("disk");
        for i in 0..1024u64 {
            file.write_all_at(&[i as u8; 4096], i * 4096).unwrap();
        }
        let read = |block: u64| {
            let mut buf = [0; 4096];
            file.read_exact_at(&mut buf, block * 4096).unwrap();
            assert!(buf == [block as u8; 4096], "{block}");
        };
        thread::scope(|s| {
            for i in 0..24 {
                s.spawn(move || (0..50).for_each(|n| read((n * 24 + i) % 1024)));
            }
        });
        assert!(disk.asked.begun.load(SeqCst) > 100);
        // All of them are taken, and then it stops.
        disk.asked.places.lock().clear();
        thread::scope(|s| {
            for i in 0..24 {
                s.spawn(move || read(i * 7 + round));
            }
            eventually("they are taken", || disk.asked.places.lock().len() == 24);
            assert_eq!(rig.session.stop(), Ended::Stopped);
        });
        assert_eq!(rig.files.total().in_flight, 0);
    }
}

/// Those who finish reads are stuck with a disk, and nobody rests: reads of another disk are finished all the same.
#[test]
fn a_disk_that_does_not_answer_keeps_no_reads_of_others() {
    if !root() {
        return;
    }
    for keep_threads in [1, 8] {
        let rig = Rig::with(Options {
            keep_threads,
            ..Options::default()
        });
        let cold = |name: &str| {
            let mut disk = MemDisk::new(MIB);
            disk.read_delay = Duration::from_millis(1);
            disk.begins = true;
            let disk = Arc::new(disk);
            rig.serve(name, disk.clone());
            disk
        };
        let (stuck, other) = (cold("stuck"), cold("other"));
        let read = |name: &str, block: u64| {
            rig.open(name)
                .read_exact_at(&mut [0; 4096], block * 4096)
                .unwrap();
        };
        thread::scope(|s| {
            for block in 0..24 {
                s.spawn(move || (0..20).for_each(|_| read("other", block)));
            }
        });
        assert!(other.asked.begun.load(SeqCst) > 0);
        let held = stuck.held.lock();
        thread::scope(|s| {
            for block in 0..16 {
                s.spawn(move || read("stuck", block));
            }
            eventually("they wait", || stuck.asked.places.lock().len() == 16);
            let done = Arc::new(std::sync::atomic::AtomicU64::new(0));
            for block in 0..24 {
                let done = done.clone();
                s.spawn(move || {
                    (0..20).for_each(|_| read("other", block));
                    done.fetch_add(1, SeqCst);
                });
            }
            let start = std::time::Instant::now();
            while done.load(SeqCst) < 24 && start.elapsed() < Duration::from_secs(20) {
                thread::sleep(Duration::from_millis(5));
            }
            // Before it fails: else the readers would keep it from ending.
            drop(held);
            assert!(done.load(SeqCst) == 24, "{} of 24", done.load(SeqCst));
        });
    }
}

/// What writes leave is done after they were answered, and holds up nobody.
#[test]
fn what_requests_leave_is_done_after_the_answer() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let disk = Arc::new(MemDisk::new(4 * MIB));
    rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    let tidied = || disk.asked.tidied.load(SeqCst);
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    assert_eq!(tidied(), 0, "nothing was left");
    file.sync_all().unwrap();
    eventually("a flush is followed by what it left", || tidied() == 1);
    disk.filling.store(true, SeqCst);
    let held = disk.untidy.lock();
    file.write_all_at(&[2; 4096], 0).unwrap();
    fallocate(&file, PUNCH, 8192, 4096).unwrap();
    disk.filling.store(false, SeqCst);
    for n in 0..64 {
        file.write_all_at(&[3; 4096], n % 16 * 4096).unwrap();
    }
    assert_eq!(tidied(), 1);
    drop(held);
    eventually("both are followed by what they left", || tidied() == 3);
}

#[test]
fn more_requests_than_threads_only_wait() {
    if !root() {
        return;
    }
    let rig = Rig::with(Options {
        max_threads: 2,
        keep_threads: 1,
        ..Options::default()
    });
    let disk = Arc::new(MemDisk::new(MIB));
    rig.serve("disk", disk.clone());
    let file = rig.open("disk");
    thread::scope(|s| {
        for i in 0..16u8 {
            let file = &file;
            s.spawn(move || {
                for _ in 0..100 {
                    file.write_all_at(&[i; 8192], u64::from(i) * 8192).unwrap();
                    let mut buf = [0; 8192];
                    file.read_exact_at(&mut buf, u64::from(i) * 8192).unwrap();
                    assert!(buf == [i; 8192]);
                }
            });
        }
    });
    assert!(rig.files.total().max_in_flight <= 2);
}

#[test]
fn a_session_ends_with_its_mount_and_can_stop_before() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    rig.serve("disk", Arc::new(MemDisk::new(MIB)));
    let file = rig.open("disk");
    assert_eq!(
        forkdisk::serve::fuse::unmount(rig.dir.path())
            .unwrap_err()
            .kind(),
        Kind::Busy
    );
    drop(file);
    assert_eq!(rig.session.ended(), None);
    // The kernel closes the file a moment after us.
    eventually("it unmounts", || {
        forkdisk::serve::fuse::unmount(rig.dir.path()).is_ok()
    });
    assert_eq!(rig.session.wait(), Ended::Unmounted);

    let rig = Rig::new();
    rig.serve("disk", Arc::new(MemDisk::new(MIB)));
    rig.open("disk").write_all_at(&[1; 10], 0).unwrap();
    assert_eq!(rig.session.stop(), Ended::Stopped);
    assert_eq!(rig.session.threads().0, 0);
}

#[test]
fn nonsense_from_the_descriptor_does_no_harm() {
    use std::os::fd::OwnedFd;
    // A socket in the place of /dev/fuse: what is sent to it arrives as requests, packet by packet.
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let word = |v: u32| v.to_ne_bytes();
    let packet = |opcode: u32, len: Option<u32>, nodeid: u64, body: &[u8]| {
        let mut p = Vec::new();
        p.extend(word(len.unwrap_or(40 + body.len() as u32)));
        p.extend(word(opcode));
        p.extend(77u64.to_ne_bytes());
        p.extend(nodeid.to_ne_bytes());
        p.extend([0; 16]);
        p.extend(body);
        p
    };
    let receive = |fd: &OwnedFd| {
        let mut buf = vec![0; 1 << 21];
        let n = rustix::io::read(fd, &mut buf).unwrap();
        assert!(n >= 16 && u32::from_ne_bytes(buf[..4].try_into().unwrap()) as usize == n);
        assert_eq!(buf[8..16], 77u64.to_ne_bytes());
        i32::from_ne_bytes(buf[4..8].try_into().unwrap())
    };
    let mut init = Vec::new();
    for v in [7u32, 45, 0, u32::MAX, u32::MAX] {
        init.extend(word(v));
    }
    rustix::io::write(&ours, &packet(26, None, 0, &init)).unwrap();
    let files = Arc::new(forkdisk::serve::files::Files::new());
    let disk = Arc::new(MemDisk::new(MIB));
    let ino = files.add("disk", disk.clone()).unwrap();
    let session = forkdisk::serve::fuse::Session::start(
        theirs,
        Arc::clone(&files),
        forkdisk::serve::fuse::Init::Fresh,
        Options {
            max_threads: 4,
            keep_threads: 1,
            ..Options::default()
        },
    )
    .unwrap();
    assert_eq!(receive(&ours), 0);
    assert!(session.negotiated().can_resend());
    let send = |p: &[u8]| rustix::io::write(&ours, p).map(|_| ()).unwrap();
    let mut random = Random::new("nonsense_from_the_descriptor");
    send(&[1]);
    send(&[0; 39]);
    // Lengths that do not agree, then bodies that are too short or too long, for every kind there is.
    for opcode in 0..60 {
        send(&packet(opcode, Some(4000), ino, &[]));
        assert_eq!(receive(&ours), -libc::EIO);
        for nodeid in [0, 1, 2, ino, ino + 1, u64::MAX] {
            for len in [0, 1, 7, 8, 16, 24, 39, 40, 41, 88, 5000] {
                let mut body = vec![0; len];
                match random.below(3) {
                    0 => {}
                    1 => body.fill(0xFF),
                    _ => random.fill(&mut body),
                }
                send(&packet(opcode, None, nodeid, &body));
                if !matches!(opcode, 2 | 42) {
                    let error = receive(&ours);
                    assert!((-4095..=0).contains(&error), "{opcode}: {error}");
                }
            }
        }
    }
    // A write that claims more than it brings.
    let mut write = Vec::new();
    write.extend(0u64.to_ne_bytes());
    write.extend(0u64.to_ne_bytes());
    write.extend(word(4096));
    write.extend([0; 20]);
    write.extend([1; 4095]);
    let before = disk.asked.writes.load(SeqCst);
    send(&packet(16, None, ino, &write));
    assert_eq!(receive(&ours), -libc::EINVAL);
    assert_eq!(disk.asked.writes.load(SeqCst), before);
    write.push(1);
    send(&packet(16, None, ino, &write));
    assert_eq!(receive(&ours), 0);
    let mut now = [0; 4096];
    disk.read(&mut now, 0).unwrap();
    assert_eq!(now, [1; 4096]);
    assert_eq!(session.stop(), Ended::Stopped);
}

/// The body of [`a_user_without_root_mounts_with_the_helper`], run by that user.
#[test]
fn as_a_user() {
    let Ok(dir) = std::env::var("USER_MOUNT_DIR") else {
        return;
    };
    let dir = std::path::Path::new(&dir);
    let fd = forkdisk::serve::fuse::mount(dir).unwrap();
    let files = Arc::new(forkdisk::serve::files::Files::new());
    files.add("disk", Arc::new(MemDisk::new(MIB))).unwrap();
    let init = forkdisk::serve::fuse::Init::Fresh;
    let session =
        forkdisk::serve::fuse::Session::start(fd, files, init, Options::default()).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(dir.join("disk"))
        .unwrap();
    file.write_all_at(b"mine", 5).unwrap();
    let mut now = [0; 4];
    file.read_exact_at(&mut now, 5).unwrap();
    assert_eq!(&now, b"mine");
    assert_eq!(
        forkdisk::serve::fuse::unmount(dir).unwrap_err().kind(),
        Kind::Busy
    );
    drop(file);
    eventually("it unmounts", || {
        forkdisk::serve::fuse::unmount(dir).is_ok()
    });
    assert_eq!(session.wait(), Ended::Unmounted);
}

#[test]
fn a_user_without_root_mounts_with_the_helper() {
    use std::os::unix::fs::chown;
    const NOBODY: u32 = 65534;
    if !root() {
        return;
    }
    let _lock = mounts_lock(true);
    let dir = crate::rig::MountDir::new();
    chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Where the user can run it.
    let bin = tempfile::tempdir().unwrap();
    fs::set_permissions(bin.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let exe = bin.path().join("serve");
    fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    // In a mount namespace of its own, where everybody may open /dev/fuse, as on most systems.
    let script = format!(
        "{LEAVE_OTHERS}\nmknod {0}/fuse c 10 229 && chmod 666 {0}/fuse && mount --bind {0}/fuse /dev/fuse && \
         exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups \
         {0}/serve --exact file::as_a_user --nocapture",
        bin.path().display()
    );
    let out = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .current_dir("/")
        .env("USER_MOUNT_DIR", dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    if said.contains("install fuse3") {
        eprintln!("left out: no fusermount3");
        return;
    }
    assert!(out.status.success(), "{said}");
}
