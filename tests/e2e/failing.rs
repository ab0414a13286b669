//! Errors of the host other than a full disk, for real: a sync that fails, too few descriptors, too little memory.

use crate::rig::*;
use std::{fs, path::Path, process::Command};

fn dd(words: &[&str]) -> Out {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "100", "dd", "bs=1M", "status=none"])
        .args(words)
        .env("LC_ALL", "C");
    finish(command)
}

/// The host's filesystem believes that it has room, and its device has none: data that was taken cannot be written back, and the host's sync
/// says so, once. The disk stops, and no later flush is acknowledged, though the host would call it good. It can be given up, and comes
/// back as of its last flush.
#[test]
fn a_failed_sync_is_never_followed_by_a_good_one() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let (thin, host) = (w.mkdir("thin"), w.mkdir("host"));
    tool("mount", ["-t", "tmpfs", "-o", "size=56m", "none", s(&thin)]);
    let disk = w.sparse("thin/host.img", 400 << 20);
    tool("mkfs.ext4", ["-qF", "-E", "nodiscard", s(&disk)]);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    w.import_ext4("base", 300);
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let output = format!("of={device}");
    let known = w.file("known", &noise(2, 4 << 20));
    let input = format!("if={}", s(&known));
    let synced = dd(&[
        &input,
        &output,
        "seek=200",
        "oflag=direct",
        "conv=fsync,notrunc",
    ]);
    assert_eq!(synced.code, 0, "{synced:?}");

    let more = [
        "if=/dev/urandom",
        &output,
        "count=120",
        "oflag=direct",
        "conv=fsync,notrunc",
    ];
    let out = dd(&more);
    assert_ne!(
        out.code, 0,
        "the device under the host's filesystem was never full"
    );
    eventually("the disk stops", || {
        w.log().contains("stops accepting writes")
    });
    // Room again; the host would take writes and call its syncs good.
    tool("mount", ["-o", "remount,size=600m", s(&thin)]);
    for _ in 0..2 {
        let out = dd(&[
            "if=/dev/urandom",
            &output,
            "count=1",
            "oflag=direct",
            "conv=fsync,notrunc",
        ]);
        assert_ne!(out.code, 0, "a flush was acknowledged after a failed one");
        let out = finish({
            let mut sync = Command::new("sync");
            sync.args(["-d", &device]);
            sync
        });
        assert_ne!(out.code, 0, "a flush was acknowledged after a failed one");
    }
    // Other disks do not care.
    w.ok(["create", "e", "--from", "base"]);
    let other = w.ok(["attach", "e"]);
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={other}"),
        "count=2",
        "oflag=direct",
        "conv=fsync,notrunc",
    ]);
    assert_eq!(out.code, 0, "{out:?}");
    w.ok(["detach", "e"]);
    let told = w.fails_here(1, &["detach", "d"]);
    assert!(told.contains("forkdisk detach --force"), "{told}");
    w.ok(["detach", "--force", "d"]);
    let device = w.ok(["attach", "d"]);
    assert!(read_direct(Path::new(&device), 200 << 20, 4 << 20) == noise(2, 4 << 20));
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={device}"),
        "count=2",
        "oflag=direct",
        "conv=fsync,notrunc",
    ]);
    assert_eq!(out.code, 0, "it goes on: {out:?}");
    w.ok(["detach", "d"]);
    assert_eq!(w.run(["check"]).code, 0);
    w.ok(["daemon", "stop"]);
    tool("umount", [s(&host)]);
    tool("umount", [s(&thin)]);
    w.nothing_left();
}

/// A daemon that may open few files only says so to whoever wants one more, and goes on with what it has.
#[test]
fn too_many_open_files() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "40"]);
    let few = |limit: &str| {
        let run = w.command(["daemon", "run"]);
        let mut command = Command::new("prlimit");
        command
            .arg(limit)
            .arg(run.get_program())
            .args(run.get_args());
        let out = finish(command);
        assert_eq!(out.code, 0, "{out:?}");
    };
    // What the daemon may raise by itself, it does.
    few("--nofile=20:1024");
    let limits = fs::read_to_string(format!("/proc/{}/limits", w.pid("server_pid"))).unwrap();
    let line = limits
        .lines()
        .find(|l| l.starts_with("Max open files"))
        .unwrap();
    assert!(line.split_whitespace().nth(3) == Some("1024"), "{line}");
    w.ok(["daemon", "stop"]);

    few("--nofile=48:48");
    let first = w.ok(["attach", "d-1"]);
    let mut refused = None;
    for n in 2..=40 {
        let name = format!("d-{n}");
        let out = w.run(["attach", &name]);
        w.note(&out.stdout);
        if out.code != 0 {
            refused = Some(name);
            break;
        }
    }
    let refused = refused.expect("48 descriptors were enough for 40 disks");
    let told = w.fails_here(1, &["attach", &refused]);
    assert!(
        told.contains("Too many open files") && told.contains("LimitNOFILE"),
        "{told}"
    );
    // The attached ones go on: reads, writes, flushes, another layer for a snapshot once there is room.
    let write = |device: &str| {
        let out = dd(&[
            "if=/dev/urandom",
            &format!("of={device}"),
            "count=2",
            "oflag=direct",
            "conv=fsync,notrunc",
        ]);
        assert_eq!(out.code, 0, "{out:?}");
    };
    write(&first);
    let all = w.attached();
    assert!(all.len() > 3, "{all:?}");
    // A snapshot needs some: it is taken or refused, and the disk goes on, however many are left.
    let mut others = all.iter().filter(|n| *n != "d-1");
    loop {
        let out = w.run(["snapshot", "d-1@s"]);
        write(&first);
        if out.code == 0 {
            break;
        }
        assert!(
            out.code == 1 && out.stderr.contains("LimitNOFILE"),
            "{out:?}"
        );
        w.ok(["detach", others.next().expect("never enough")]);
    }
    w.ok(["detach", others.next().expect("another")]);
    w.ok(["attach", &refused]);
    for name in w.attached() {
        w.ok(["detach", &name]);
    }
    w.finish();
}

/// Too little memory for caches and mappings: what cannot be had is an error of one command or a slower way, not the end of the daemon.
#[test]
fn little_address_space() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "40"]);
    let run = w.command(["daemon", "run"]);
    let mut command = Command::new("prlimit");
    command
        .arg("--as=400000000")
        .arg(run.get_program())
        .args(run.get_args());
    let out = finish(command);
    assert_eq!(out.code, 0, "{out:?}");
    let first = w.ok(["attach", "d-1"]);
    let server = w.pid("server_pid");
    let mut refused = 0;
    // How many fit depends on what the allocator keeps for each thread.
    for n in 2..=40 {
        if refused == 3 {
            break;
        }
        let name = format!("d-{n}");
        let out = w.run(["attach", &name]);
        w.note(&out.stdout);
        if out.code != 0 {
            refused += 1;
            assert!(out.stderr.contains("hint:"), "{out:?}");
        }
    }
    assert!(refused > 0, "it was enough for all");
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={first}"),
        "count=200",
        "oflag=direct",
        "conv=fsync,notrunc",
    ]);
    assert_eq!(out.code, 0, "{out:?}");
    w.ok(["snapshot", "d-1@s"]);
    assert_eq!(w.pid("server_pid"), server, "it lives: {}", w.log());
    for name in w.attached() {
        w.ok(["detach", &name]);
    }
    w.finish();
}

/// A process that may not open files has seen no damage.
#[test]
fn a_check_without_descriptors_finds_no_damage() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["create", "e", "--from", "d"]);
    w.ok(["snapshot", "d@s"]);
    let mut refused = 0;
    for limit in 5..16 {
        let check = w.command(["check"]);
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}:{limit}"));
        command.arg(check.get_program()).args(check.get_args());
        for (key, value) in check.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        let out = finish(command);
        assert!(
            !matches!(out.code, 3 | 4),
            "{limit}: {} {}",
            out.code,
            out.stderr
        );
        refused += u32::from(out.code != 0);
    }
    assert!(refused > 0, "no limit was low enough");
}
