//! The ways requests reach the daemon, as a user chooses them.

use crate::{rig::*, uring::Switch};
use forkdisk::sys::{latency, loopdev};
use serde_json::Value;
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

fn switched() -> Option<Switch> {
    root().then(|| Switch::set(true)).flatten()
}

/// Where many requests are under way none is worth an interrupt of the processor that made it; also for the server of the next program.
#[test]
fn a_device_suits_its_load() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let setting = format!("/sys/block/{}/queue/rq_affinity", &device[5..]);
    let suits = |depth: &str, value: &str| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while fs::read_to_string(&setting).unwrap().trim() != value {
            assert!(Instant::now() < deadline, "depth {depth}: not {value}");
            tool(
                "fio",
                [
                    "--name=load",
                    &format!("--filename={device}"),
                    "--size=16m",
                    "--rw=randread",
                    "--bs=4k",
                    "--direct=1",
                    "--ioengine=libaio",
                    &format!("--iodepth={depth}"),
                    "--output=/dev/null",
                ],
            );
        }
    };
    let where_made = match loopdev::can_complete() {
        true => "2",
        false => "1",
    };
    suits("32", "1");
    suits("1", where_made);
    w.ok(["daemon", "takeover"]);
    suits("32", "1");
    suits("1", where_made);
    w.ok(["detach", "d"]);
}

/// Seconds that processors were kept awake, of the daemon of a world with this in its environment; before and after `reads` of a block, each after the other.
fn awake(word: &str, reads: u64) -> (Value, Value) {
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    // It starts the daemon.
    let mut attach = w.command(["attach", "d"]);
    let attached = attach.env("FORKDISK_AWAKE", word).output().unwrap();
    let device = String::from_utf8(attached.stdout).unwrap();
    w.note(&device);
    let device = device.trim_end();
    let before = w.status()["awake_seconds"].clone();
    let open = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .unwrap();
    let mut memory = vec![0u8; 8192];
    let from = memory.as_ptr().align_offset(4096);
    for n in 0..reads {
        let block = &mut memory[from..from + 4096];
        open.read_exact_at(block, n % 1000 * 4096).unwrap();
    }
    drop(open);
    let after = w.status()["awake_seconds"].clone();
    w.ok(["detach", "d"]);
    (before, after)
}

/// Where each request waits for the one before it.
#[test]
fn processors_stay_awake_for_those_who_wait() {
    if !root() {
        return;
    }
    // Machines without this file let nobody say how their processors sleep.
    let can = File::options().write(true).open(latency::DEVICE).is_ok();
    let (before, after) = awake("on", 20_000);
    match can {
        true => {
            assert!(before.as_f64().unwrap() < 0.5, "{before}");
            assert!(after.as_f64().unwrap() > 0.0, "{after}");
        }
        false => assert_eq!((before, after), (Value::Null, Value::Null)),
    }
    for word in ["off", "sideways"] {
        assert_eq!(awake(word, 100), (Value::Null, Value::Null), "{word}");
    }
}

#[test]
fn a_disk_attached_over_io_uring() {
    let Some(_on) = switched() else {
        return;
    };
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d", "--transport", "io_uring"]);
    let status = w.status();
    assert_eq!(status["transport"], "io_uring", "{status}");
    assert_eq!(status["can_take_over"], false, "{status}");
    tool(
        "fio",
        [
            "--name=verify",
            &format!("--filename={device}"),
            "--offset=128m",
            "--size=64m",
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=32",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--output=/dev/null",
        ],
    );
    tool("mkfs.ext4", ["-qF", &device]);
    let m = w.mkdir("m");
    tool("mount", [&device, s(&m)]);
    fs::write(m.join("f"), noise(1, 20 << 20)).unwrap();
    // Live, over rings: the snapshot is made while the filesystem is mounted.
    w.ok(["snapshot", "d@s", "--freeze"]);
    fs::write(m.join("g"), noise(2, 1 << 20)).unwrap();
    tool("umount", [s(&m)]);
    tool("e2fsck", ["-fn", &device]);
    // The same daemon serves all; another way is refused, none in particular is not.
    w.ok(["create", "e", "--from", "d@s"]);
    let told = w.fails_here(11, &["attach", "e", "--transport", "device"]);
    assert!(
        told.contains("io_uring") && told.contains("daemon stop"),
        "{told}"
    );
    w.ok(["attach", "e", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 20 << 20));
    assert!(!m.join("g").exists());
    // No server can be followed by another.
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    let told = w.fails_here(1, &["daemon", "takeover"]);
    assert!(
        told.contains("io_uring") && told.contains("detach"),
        "{told}"
    );
    assert_eq!((keeper, server), (w.pid("keeper_pid"), w.pid("server_pid")));
    // A keeper can.
    kill_and_wait(keeper);
    eventually("another keeper", || {
        let now = w.pid("keeper_pid");
        now != 0 && now != keeper
    });
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 20 << 20));
    w.ok(["detach", "d", "e"]);
    w.finish();
}

#[test]
fn the_daemon_is_started_with_a_transport() {
    let Some(_on) = switched() else {
        return;
    };
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["daemon", "run", "--transport", "io_uring"]);
    assert_eq!(w.status()["transport"], "io_uring");
    w.ok(["attach", "d"]);
    w.ok(["detach", "d"]);
    w.ok(["daemon", "stop"]);
    w.nothing_left();
    // By the environment; the option comes first.
    for (option, used) in [(None, "io_uring"), (Some("device"), "device")] {
        let mut attach = w.command(["attach", "d"]);
        attach.env("FORKDISK_TRANSPORT", "io_uring");
        if let Some(option) = option {
            attach.args(["--transport", option]);
        }
        let out = finish(attach);
        assert_eq!(out.code, 0, "{out:?}");
        w.note(&out.stdout);
        assert_eq!(w.status()["transport"], used);
        w.ok(["detach", "d"]);
        w.ok(["daemon", "stop"]);
    }
    w.finish();
}

/// The price of rings: what was under way when the server died fails, at once and cleanly. What was flushed is there.
#[test]
fn the_death_of_a_server_over_io_uring_is_an_error_and_no_hang() {
    let Some(_on) = switched() else {
        return;
    };
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "2"]);
    let raw = w.ok(["attach", "d-1", "--transport", "io_uring"]);
    let m = w.mkdir("m");
    let mounted = w.ok(["attach", "d-2", "--mount", s(&m)]);
    fs::write(m.join("f"), noise(1, 3 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&raw)
            .unwrap()
    };
    // Each writer says what it last flushed, until it gets an error.
    let writers: Vec<_> = (0..4u64)
        .map(|i| {
            let file = open();
            thread::spawn(move || {
                let mut block = memmap2::MmapMut::map_anon(4096).unwrap();
                let mut flushed = 0u64;
                for n in 1.. {
                    block.copy_from_slice(&noise(i << 32 | n, 4096));
                    let at = (128 << 20) + i * 4096;
                    if file.write_all_at(&block, at).is_err() || file.sync_data().is_err() {
                        break;
                    }
                    flushed = n;
                }
                flushed
            })
        })
        .collect();
    let busy = Command::new("fio")
        .args([
            "--name=busy",
            &format!("--filename={raw}"),
            "--rw=randrw",
            "--bs=4k",
            "--size=64m",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=32",
            "--time_based",
            "--runtime=60",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(700));
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    let killed = Instant::now();
    kill_and_wait(server);
    let out = busy.wait_with_output().unwrap();
    assert!(!out.status.success(), "fio should get errors");
    let flushed: Vec<u64> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    let waited = killed.elapsed();
    assert!(waited < Duration::from_secs(10), "{waited:?}");
    eventually("the keeper ends", || !alive(keeper));
    // The device that nobody uses is taken away; the mounted one fails.
    let mut block = memmap2::MmapMut::map_anon(4096).unwrap();
    let device = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&mounted)
        .unwrap();
    let read = device.read_at(&mut block, 0);
    assert!(read.is_err(), "{read:?}");
    assert!(w.log().contains("the server died"), "{}", w.log());
    // Attached again, over whatever: all that was flushed is there, or what was written after it.
    drop(device);
    let device = w.ok(["attach", "d-1"]);
    for (i, &n) in flushed.iter().enumerate() {
        assert!(n > 0, "writer {i} flushed nothing");
        let found = read_direct(device.as_ref(), (128 << 20) + i as u64 * 4096, 4096);
        let one_of = [n, n + 1].map(|n| noise((i as u64) << 32 | n, 4096));
        assert!(one_of.contains(&found), "writer {i}: flush {n} is lost");
    }
    let n = w.mkdir("n");
    w.ok(["attach", "d-2", "--mount", s(&n)]);
    assert!(fs::read(n.join("f")).unwrap() == noise(1, 3 << 20));
    w.ok(["detach", "d-1", "d-2"]);
    w.ok(["detach", s(&m)]);
    w.finish();
}

#[test]
fn without_the_switch_io_uring_is_refused() {
    if !root() {
        return;
    }
    let _off = Switch::set(false);
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let told = w.fails_here(1, &["attach", "d", "--transport", "io_uring"]);
    assert!(told.contains("io_uring"), "{told}");
    let told = w.fails_here(1, &["daemon", "run", "--transport", "io_uring"]);
    assert!(told.contains("io_uring"), "{told}");
    w.nothing_left();
    assert_eq!(w.run(["daemon", "status"]).code, 1);
    let doctor = w.run(["doctor"]);
    assert!(doctor.stdout.contains("fuse io_uring"), "{doctor:?}");
    w.ok(["attach", "d"]);
    assert_eq!(w.status()["transport"], "device");
    w.ok(["detach", "d"]);
    w.finish();
}

fn pattern_base(w: &World) -> Vec<u8> {
    let content = noise(7, 24 << 20);
    w.ok(["import", s(&w.file("plain.img", &content)), "plain"]);
    content
}

fn reads_of_the_daemon(w: &World) -> u64 {
    w.status()["requests"]["reads"].as_u64().unwrap()
}

/// The kernel reads the image past the daemon: the same bytes, also while there is no server, and with the next one.
#[test]
fn an_image_attached_with_passthrough() {
    if !root() {
        return;
    }
    // A filesystem of its own, to see that the image is let go.
    let w = World::at("host/store");
    let host = w.mkdir("host");
    tool(
        "mount",
        ["-t", "tmpfs", "-o", "size=200m", "none", s(&host)],
    );
    let content = pattern_base(&w);
    let device = w.json(["attach", "plain", "--passthrough"]);
    assert_eq!(device["passthrough"], true, "{device}");
    assert_eq!(device["read_only"], true, "{device}");
    let file = device["file"].as_str().unwrap().to_string();
    let device = device["device"].as_str().unwrap().to_string();
    let exported = w.path("out.img");
    w.ok(["export", "plain", s(&exported)]);
    let read = || read_direct(device.as_ref(), 0, content.len());
    assert!(read() == content);
    assert_eq!(sha256(device.as_ref()), sha256(&exported));
    assert_eq!(reads_of_the_daemon(&w), 0, "the daemon was asked");
    let write = File::options().write(true).open(&device);
    let written = write.and_then(|f| f.write_all_at(&[0; 4096], 0));
    assert!(written.is_err(), "a write to an image");
    assert!(File::options().write(true).open(&file).is_err());
    // One device for all who want it so; another way is refused.
    assert_eq!(w.ok(["attach", "plain", "--passthrough"]), device);
    let told = w.fails_here(11, &["attach", "plain"]);
    assert!(told.contains("another way"), "{told}");
    w.ok(["detach", "plain"]);
    // Nobody serves: reads go on.
    let server = w.pid("server_pid");
    kill(server, "STOP");
    let stopped = read();
    kill(server, "CONT");
    assert!(stopped == content);
    // Another server goes on with the number that the kernel knows the image by.
    let open = File::open(&file).unwrap();
    for round in 0..2 {
        match round {
            0 => kill_and_wait(w.pid("server_pid")),
            _ => drop(w.ok(["daemon", "takeover"])),
        }
        assert!(read() == content);
        let mut some = vec![0; 9000];
        open.read_exact_at(&mut some, 12345).unwrap();
        assert!(some == content[12345..12345 + 9000]);
        let another = File::open(&file).unwrap();
        another.read_exact_at(&mut some, 54321).unwrap();
        assert!(some == content[54321..54321 + 9000]);
        assert_eq!(reads_of_the_daemon(&w), 0, "the daemon was asked");
    }
    drop(open);
    w.ok(["detach", "plain"]);
    // The daemon lives, and holds nothing of the image any more.
    let free = || rustix::fs::statvfs(&host).unwrap().f_bavail;
    let before = free();
    w.ok(["rm", "plain"]);
    eventually("the image is gone", || {
        (free().saturating_sub(before)) * 4096 > 23 << 20
    });
    w.ok(["check"]);
    w.ok(["daemon", "stop"]);
    assert_eq!(w.loops(), [""; 0]);
    tool("umount", [s(&host)]);
    w.nothing_left();
}

#[test]
fn passthrough_is_refused_for_what_is_not_one_file() {
    if !root() {
        return;
    }
    let w = World::new();
    pattern_base(&w);
    w.ok(["create", "d", "--from", "plain"]);
    w.ok(["snapshot", "d@s"]);
    let odd = noise(3, (1 << 20) + 100);
    w.ok(["import", s(&w.file("odd.img", &odd)), "odd"]);
    for reference in ["d", "d@s"] {
        let told = w.fails_here(1, &["attach", reference, "--ro", "--passthrough"]);
        assert!(told.contains("layers"), "{told}");
    }
    let told = w.fails_here(1, &["attach", "odd", "--passthrough"]);
    assert!(told.contains("multiple"), "{told}");
    assert_eq!(w.attached(), [""; 0]);
    assert_eq!(w.loops(), [""; 0]);
    // Without it all of them can be had.
    w.ok(["attach", "odd", "--via", "file"]);
    w.ok(["detach", "odd"]);
    w.finish();
}
