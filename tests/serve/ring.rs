//! The same disks over io_uring: what is asked and answered does not depend on how it travels.

use crate::{
    disks::MemDisk,
    rig::{MountDir, Random, Rig, eventually, root, run},
    uring::Switch,
};
use forkdisk::{
    attach::LoopOptions,
    disk::Disk,
    error::Kind,
    serve::{
        files::Files,
        fuse::{self, Ended, Init, Options, Session, Transport},
    },
};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::Arc,
    thread,
    time::Duration,
};

const MIB: u64 = 1 << 20;
const RINGS: Options = Options {
    max_threads: 40,
    keep_threads: 8,
    transport: Transport::IoUring,
};

/// Root, and a kernel that can, with its switch on until the end of the test.
fn switched() -> Option<Switch> {
    root().then(|| Switch::set(true)).flatten()
}

#[test]
fn everything_that_is_asked_of_a_file_is_answered_over_rings() {
    let Some(_on) = switched() else {
        return;
    };
    const SIZE: u64 = 8 * MIB;
    let rig = Rig::with(RINGS);
    let negotiated = rig.session.negotiated();
    assert_eq!(negotiated.transport(), Transport::IoUring);
    assert!(!negotiated.can_resend());
    let disk = Arc::new(MemDisk::new(SIZE));
    rig.serve("disk", disk.clone());
    let long = "n".repeat(255);
    rig.serve(&long, Arc::new(MemDisk::new(MIB)));
    let file = rig.open("disk");
    let mut model = vec![0u8; SIZE as usize];
    let mut random = Random::new("everything_that_is_asked");
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
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, punch, at, len).unwrap();
                model[range].fill(0);
            }
            5 => {
                let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, zero, at, len).unwrap();
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
    // Names, attributes, the directory, positions, errors.
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert_eq!(fs::metadata(rig.dir.path().join(&long)).unwrap().len(), MIB);
    assert!(fs::metadata(rig.dir.path().join("missing")).is_err());
    let mut names: Vec<_> = fs::read_dir(rig.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["disk", &long]);
    fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        0,
        SIZE,
    )
    .unwrap();
    file.write_all_at(&[1; 4096], 4 * MIB).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 4 * MIB);
    assert_eq!(
        file.set_len(0).unwrap_err().raw_os_error(),
        Some(libc::EPERM)
    );
    *disk.fail.lock() = Some(Kind::Corrupt);
    let failed = file.read_at(&mut buf, 0).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EIO));
    *disk.fail.lock() = None;
    drop(file);
    // What the kernel forgets it says through the descriptor, and the mount can be taken away in order.
    fuse::unmount(rig.dir.path()).unwrap();
    eventually("the session sees it", || {
        rig.session.ended() == Some(Ended::Unmounted)
    });
    assert_eq!(rig.files.total().in_flight, 0);
}

/// A request that waits for the host keeps no other waiting, whatever CPU they come from.
#[test]
fn slow_requests_do_not_hold_up_others() {
    let Some(_on) = switched() else {
        return;
    };
    let rig = Rig::with(RINGS);
    let mut slow = MemDisk::new(64 * MIB);
    slow.read_delay = Duration::from_millis(20);
    let dev = rig.attach("slow", Arc::new(slow), LoopOptions::default());
    rig.serve("quick", Arc::new(MemDisk::new(MIB)));
    let readers: Vec<_> = (0..8u64)
        .map(|i| {
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(dev.device())
                .unwrap();
            thread::spawn(move || {
                let mut map = memmap2::MmapMut::map_anon(4096).unwrap();
                for j in 0..20 {
                    file.read_exact_at(&mut map, (i * 20 + j) * 4096).unwrap();
                }
            })
        })
        .collect();
    let file = rig.open("quick");
    while !readers.iter().all(|r| r.is_finished()) {
        file.write_all_at(&[7; 4096], 0).unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    readers.into_iter().for_each(|r| r.join().unwrap());
    let max = rig.files.total().max_in_flight;
    assert!(max >= 6, "{max} at once");
}

#[test]
fn a_filesystem_lives_on_a_device_over_rings() {
    let Some(_on) = switched() else {
        return;
    };
    let rig = Rig::with(RINGS);
    let disk = Arc::new(MemDisk::new(128 * MIB));
    let dev = rig.attach("disk", disk.clone(), LoopOptions::default());
    run("mkfs.ext4", &["-qF", dev.path()]);
    run(
        "fio",
        &[
            "--name=verify",
            &format!("--filename={}", dev.path()),
            "--offset=64m",
            "--size=32m",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=32",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--output=/dev/null",
        ],
    );
    assert!(rig.files.total().max_in_flight > 1);
    run("mkfs.ext4", &["-qF", dev.path()]);
    run("e2fsck", &["-fn", dev.path()]);
}

/// A session that ends leaves nobody waiting once the mount is ended.
#[test]
fn requests_without_a_session_fail_when_the_mount_ends() {
    let Some(_on) = switched() else {
        return;
    };
    let rig = Rig::with(RINGS);
    rig.serve("disk", Arc::new(MemDisk::new(MIB)));
    let file = rig.open("disk");
    assert_eq!(rig.session.stop(), Ended::Stopped);
    let reader = thread::spawn(move || file.read_at(&mut [0; 4096], 0));
    thread::sleep(Duration::from_millis(50));
    fuse::mount::abort(rig.dir.path()).unwrap();
    assert!(reader.join().unwrap().is_err());
}

#[test]
fn what_cannot_be_had_is_refused_before_anything_is_promised() {
    let Some(on) = switched() else {
        return;
    };
    drop(on);
    // Switched off.
    let off = Switch::set(false);
    let dir = MountDir::new();
    let fd = fuse::mount(dir.path()).unwrap();
    let e = Session::start(fd, Arc::new(Files::new()), Init::Fresh, RINGS)
        .err()
        .unwrap();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.hint_text().unwrap().contains("enable_uring"), "{e:?}");
    drop(off);
    // Nobody takes over what came over rings.
    let Some(_on) = Switch::set(true) else {
        return;
    };
    let rig = Rig::with(RINGS);
    let dir = MountDir::new();
    let fd = fuse::mount(dir.path()).unwrap();
    let init = Init::Resumed(rig.session.negotiated());
    let e = Session::start(fd, Arc::new(Files::new()), init, Options::default())
        .err()
        .unwrap();
    assert_eq!(e.kind(), Kind::Unsupported);
    // The one that serves is not disturbed.
    let disk = Arc::new(MemDisk::new(MIB));
    rig.serve("disk", disk.clone());
    rig.open("disk").write_all_at(&[3; 512], 0).unwrap();
    let mut read = [0; 512];
    disk.read(&mut read, 0).unwrap();
    assert_eq!(read, [3; 512]);
}
