//! Layers under disks in use: joined, flattened, removed in the middle, while a filesystem on them is written to.

use crate::rig::*;
use std::{fs, os::unix::fs::FileExt, process::Command, thread, time::Duration};

/// Bytes of a file that must stay as it is.
const FILE: usize = 75 * 4096;

/// Writes a file after the other until it is ended.
fn busy(w: &World, dir: &std::path::Path) -> i32 {
    let script = "n=0; while :; do head -c 20000 /dev/urandom >busy.$((n % 20)); sync busy.$((n % 20)); n=$((n + 1)); sleep 0.02; done";
    let mut command = Command::new("bash");
    command.args(["-c", script]).current_dir(dir);
    w.child(command)
}

/// [`World::finish`] for a store on a filesystem of its own.
fn ends(w: &World) {
    let out = w.run(["check"]);
    assert_eq!(out.code, 0, "{out:?}\n{}", w.log());
    w.ok(["daemon", "stop"]);
}

fn clean(device: &str) {
    tool("fsck", ["-n", "-f", device]);
}

#[test]
fn squash_and_flatten_under_a_busy_filesystem() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    busy(&w, &m);
    let keep = m.join("keep");
    fs::create_dir(&keep).unwrap();
    for n in 0..8 {
        fs::write(keep.join(format!("f{n}")), noise(n, FILE)).unwrap();
        tool("sync", ["-f", s(&keep)]);
        w.ok(["snapshot", &format!("d@s{n}")]);
    }
    let same = |what: &str| {
        // Past what the filesystem remembers of them.
        for n in 0..8 {
            let found = read_direct(&keep.join(format!("f{n}")), 0, FILE);
            assert!(found == noise(n, FILE), "{what}: f{n}");
        }
    };
    for n in 0..7 {
        w.ok(["rm", &format!("d@s{n}")]);
    }
    assert_eq!(w.json(["info", "d"])["depth"], 9);
    let pretended = w.json(["squash", "d", "-n"]);
    assert_eq!(
        (&pretended["layers"], &pretended["dry_run"]),
        (&8.into(), &true.into())
    );
    let done = w.json(["squash", "d"]);
    assert_eq!(
        (&done["depth_before"], &done["depth_after"]),
        (&9.into(), &2.into())
    );
    assert_eq!(done["bytes"], done["copied"]);
    assert!(done["freed"].as_u64().unwrap() > 0, "{done}");
    assert_eq!(w.json(["info", "d"])["depth"], 2);
    assert_eq!(w.json(["squash", "d"])["copied"], serde_json::Value::Null);
    same("squashed");
    // A successor opens what the names mean now.
    kill_and_wait(w.pid("server_pid"));
    same("squashed, and another server");
    let flat = w.json(["flatten", "d"]);
    assert_eq!(flat["depth_after"], 2);
    assert!(
        flat["base_id"].is_string() && flat["digest"].is_string(),
        "{flat}"
    );
    same("flattened");
    // The snapshot still needs the image.
    w.fails_here(11, &["rm", "base"]);
    w.ok(["rm", "d@s7"]);
    w.ok(["rm", "base"]);
    same("without the image");
    assert_eq!(w.names(), ["d"]);
    w.end_children();
    // What the writer had started may take a moment more.
    eventually("nobody uses it", || w.run(["detach", "d"]).code == 0);
    let device = w.ok(["attach", "d"]);
    clean(&device);
    w.ok(["detach", "d"]);
    w.finish();
}

/// A snapshot in the middle goes while its disk is mounted and busy: what nobody sees comes back at once, or when the next snapshot hides it.
#[test]
fn what_nobody_sees_comes_back_under_a_busy_filesystem() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    busy(&w, &m);
    let (keep, large) = (m.join("keep"), m.join("large"));
    let write = |seed: u64| {
        // In place, past the filesystem's memory.
        fs::write(m.join("noise"), noise(seed, 8 << 20)).unwrap();
        let (from, to) = (
            format!("if={}", s(&m.join("noise"))),
            format!("of={}", s(&large)),
        );
        tool(
            "dd",
            [&from, &to, "bs=1M", "conv=notrunc,fsync", "status=none"],
        );
        fs::remove_file(m.join("noise")).unwrap();
    };
    fs::write(&keep, noise(1, FILE)).unwrap();
    for n in 0..3 {
        write(n);
        tool("sync", ["-f", s(&m)]);
        w.ok(["snapshot", &format!("d@s{n}")]);
    }
    let id = |name: &str| w.json(["info", name])["id"].as_str().unwrap().to_string();
    let layers = [id("d@s0"), id("d@s1"), id("d@s2")];
    let used = |id: &str| {
        let file = w.store.join(format!("layers/{id}.layer"));
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(file).unwrap()) * 512
    };
    let before = used(&layers[0]);
    assert!(before > 8 << 20, "{before}");
    let gone = w.json(["rm", "d@s0"]);
    assert!(gone["frees"].as_u64().unwrap() >= 7 << 20, "{gone}");
    let after = used(&layers[0]);
    assert!(after + (7 << 20) < before, "{before} {after}");
    // The topmost one: only what is sealed hides for good.
    let before = used(&layers[2]);
    w.ok(["rm", "d@s2"]);
    assert_eq!(used(&layers[2]), before);
    write(7);
    tool("sync", ["-f", s(&m)]);
    w.ok(["snapshot", "d@s3"]);
    eventually("the daemon looks at it", || {
        used(&layers[2]) + (7 << 20) < before
    });
    let same = |what: &str| {
        assert!(read_direct(&keep, 0, FILE) == noise(1, FILE), "{what}");
        assert!(
            read_direct(&large, 0, 8 << 20) == noise(7, 8 << 20),
            "{what}"
        );
    };
    same("given back");
    kill_and_wait(w.pid("server_pid"));
    same("another server");
    assert_eq!(w.run(["scrub"]).code, 0, "{}", w.log());
    w.end_children();
    eventually("nobody uses it", || w.run(["detach", "d"]).code == 0);
    for name in ["d@s1", "d@s3", "d"] {
        let device = w.ok(["attach", name]);
        if name == "d" {
            clean(&device);
        }
        w.ok(["detach", name]);
    }
    w.ok(["gc"]);
    w.finish();
}

/// The daemon's own work: nobody asks for it.
#[test]
fn chains_stay_short_by_themselves() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    for n in 0..24 {
        fs::write(m.join(format!("f{n}")), noise(n, 20_000)).unwrap();
        w.ok(["snapshot", &format!("d@s{n}")]);
        if n > 0 {
            w.ok(["rm", &format!("d@s{}", n - 1)]);
        }
    }
    let depth = || w.json(["info", "d"])["depth"].as_u64().unwrap();
    eventually("the chain is short", || depth() <= 12);
    // What was joined goes a moment after it is replaced; before a detach ends, in any case.
    w.ok(["detach", "d"]);
    let out = w.run(["check"]);
    assert_eq!(out.code, 0, "{out:?}\n{}", w.log());
    w.ok(["attach", "d", "--mount", s(&m)]);
    for n in 0..24 {
        let found = fs::read(m.join(format!("f{n}"))).unwrap();
        assert!(found == noise(n, 20_000), "f{n}");
    }
    w.ok(["detach", "d"]);
    w.finish();
}

/// Where the host's filesystem can share blocks, a squash moves none.
#[test]
fn on_xfs_blocks_are_shared() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.sparse("host.img", 400 << 20);
    tool("mkfs.xfs", ["-q", "-m", "reflink=1", s(&disk)]);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let used = || {
        tool("sync", ["-f", s(&host)]);
        let stat = rustix::fs::statvfs(&host).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    };
    w.import_ext4("base", 128);
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    for n in 0..3u64 {
        let data = w.file("data", &noise(n, 8 << 20));
        tool(
            "dd",
            [
                &format!("if={}", s(&data)),
                &format!("of={device}"),
                "bs=1M",
                &format!("seek={}", n * 4),
                "oflag=direct",
                "conv=fsync,notrunc",
                "status=none",
            ],
        );
        w.ok(["snapshot", &format!("d@s{n}")]);
    }
    let held = read_direct(device.as_ref(), 0, 20 << 20);
    let before = used();
    let done = w.json(["squash", "d"]);
    assert_eq!(done["layers"], 3);
    // The snapshots keep their layers, and yet the 16 MiB are not there twice.
    let more = used().saturating_sub(before);
    assert!(more < 6 << 20, "{more} bytes more");
    assert!(read_direct(device.as_ref(), 0, 20 << 20) == held);
    // Nor are they after it is flattened.
    let before = used();
    w.ok(["flatten", "d"]);
    let more = used().saturating_sub(before);
    assert!(more < 6 << 20, "{more} bytes more");
    assert!(read_direct(device.as_ref(), 0, 20 << 20) == held);
    w.ok(["detach", "d"]);
    ends(&w);
}

/// Single blocks far apart, on a filesystem that gives more than is asked for to whoever makes a file longer: what is between them stays holes.
#[test]
fn on_xfs_holes_stay_holes() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.sparse("host.img", 700 << 20);
    tool("mkfs.xfs", ["-q", "-m", "reflink=1", s(&disk)]);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let image = w.sparse("scattered", 256 << 20);
    let open = fs::File::options().write(true).open(&image).unwrap();
    for n in 0..1024 {
        open.write_all_at(&noise(n, 4096), n << 18).unwrap();
    }
    let used = || {
        tool("sync", ["-f", s(&host)]);
        let stat = rustix::fs::statvfs(&host).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    };
    let costs = |what: &str, work: &dyn Fn()| {
        let before = used();
        work();
        let more = used().saturating_sub(before);
        assert!(more < 12 << 20, "{what}: {more} bytes more");
    };
    costs("a copy", &|| {
        drop(w.ok(["import", "--copy", s(&image), "copied"]))
    });
    costs("a stream", &|| {
        let from = fs::File::open(&image).unwrap();
        let mut import = w.command(["import", "-", "streamed"]);
        assert!(import.stdin(from).status().unwrap().success());
    });
    w.ok(["create", "d", "--from", "copied"]);
    costs("a flattening", &|| drop(w.ok(["flatten", "d"])));
    for name in ["copied", "streamed", "d"] {
        let out = w.path("out");
        w.ok(["export", "-f", name, s(&out)]);
        assert!(
            fs::read(&out).unwrap() == fs::read(&image).unwrap(),
            "{name}"
        );
    }
    ends(&w);
}

/// The server ends while it joins layers of which nobody needs one alone, or has just done so: nothing is left over.
#[test]
fn a_daemon_that_ends_leaves_no_layers_behind() {
    if !root() {
        return;
    }
    let w = World::with_base();
    for round in 0..3 {
        let disk = format!("d{round}");
        w.ok(["create", &disk, "--from", "base"]);
        let device = w.ok(["attach", &disk]);
        let open = fs::File::options().write(true).open(&device).unwrap();
        let mut names = vec!["rm".to_string()];
        for n in 0..40 {
            open.write_all_at(&noise(n, 4096), 4096 * n).unwrap();
            open.sync_all().unwrap();
            let name = format!("{disk}@s{n}");
            w.ok(["snapshot", &name]);
            names.push(name);
        }
        drop(open);
        w.ok(&names);
        w.ok(["detach", &disk]);
        w.ok(["daemon", "stop"]);
        let out = w.run(["check"]);
        assert_eq!(out.code, 0, "{out:?}\n{}", w.log());
    }
    w.finish();
}

/// Too little room is told before anything is written; an interrupt changes nothing, and what was copied is not copied again.
#[test]
fn no_room_and_interrupts() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.sparse("host.img", 220 << 20);
    tool("mkfs.ext4", ["-qF", s(&disk)]);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    w.import_ext4("base", 100);
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    for n in 0..2u64 {
        let data = w.file("data", &noise(n, 30 << 20));
        tool(
            "dd",
            [
                &format!("if={}", s(&data)),
                &format!("of={device}"),
                "bs=1M",
                &format!("seek={}", n * 30),
                "oflag=direct",
                "conv=fsync,notrunc",
                "status=none",
            ],
        );
        w.ok(["snapshot", &format!("d@s{n}")]);
    }
    w.ok(["detach", "d"]);
    let ballast = host.join("ballast");
    tool("fallocate", ["-l", "110M", s(&ballast)]);
    for command in ["squash", "flatten"] {
        let told = w.fails(14, &[command, "d"]);
        assert!(told.contains("needs up to"), "{told}");
    }
    fs::remove_file(&ballast).unwrap();
    // Interrupted as soon as it has something.
    let mut command = w.command(["squash", "d"]);
    let child = command.spawn().unwrap();
    let begun = || {
        fs::read_dir(w.store.join("layers"))
            .unwrap()
            .flatten()
            .any(|e| {
                e.file_name().to_string_lossy().starts_with(".tmp-")
                    && e.metadata().is_ok_and(|m| m.len() > 8 << 20)
            })
    };
    while !begun() && w.json(["info", "d"])["depth"] == 3 {
        thread::sleep(Duration::from_millis(1));
    }
    let pid = w.processes().into_iter().find(|p| {
        fs::read_to_string(format!("/proc/{p}/cmdline")).is_ok_and(|c| c.contains("squash"))
    });
    if let Some(pid) = pid {
        kill(pid, "INT");
    }
    let code = child.wait_with_output().unwrap().status.code();
    // It may have been quicker.
    assert!(matches!(code, Some(0 | 130)), "{code:?}");
    let done = w.json(["squash", "d"]);
    assert_eq!(w.json(["info", "d"])["depth"], 2);
    if code == Some(130) {
        assert!(done["copied"].as_u64() < done["bytes"].as_u64(), "{done}");
    }
    let device = w.ok(["attach", "d"]);
    for n in 0..2u64 {
        let at = (n * 30) << 20;
        assert!(read_direct(device.as_ref(), at, 30 << 20) == noise(n, 30 << 20));
    }
    w.ok(["detach", "d"]);
    ends(&w);
}

/// A flattening that was killed goes on with what it has copied, whatever the filesystem on the disk wrote meanwhile; one that is interrupted says so.
#[test]
fn a_killed_flatten_goes_on() {
    if !root() {
        return;
    }
    let w = World::new();
    w.import_ext4("base", 900);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    busy(&w, &m);
    let large = m.join("large");
    let mut content = noise(1, 300 << 20);
    fs::write(&large, &content).unwrap();
    tool("sync", ["-f", s(&m)]);
    let copied = || {
        let dirs = fs::read_dir(w.store.join("bases")).unwrap().flatten();
        dirs.filter(|dir| dir.path().join("copied").exists())
            .count()
    };
    // Whether it was quicker.
    let end = |signal: &str| {
        let mut child = w.command(["flatten", "d"]).spawn().unwrap();
        let pid = || {
            w.processes().into_iter().find(|p| {
                fs::read_to_string(format!("/proc/{p}/cmdline"))
                    .is_ok_and(|c| c.contains("forkdisk\0") && c.contains("flatten"))
            })
        };
        while copied() == 0 && child.try_wait().unwrap().is_none() {
            thread::sleep(Duration::from_millis(1));
        }
        if let Some(pid) = pid() {
            kill(pid, signal);
        }
        child.wait().unwrap().code()
    };
    let code = end("KILL");
    let killed = copied() == 1;
    assert!(killed || code == Some(0), "{code:?}");
    // In what was copied, and new.
    content[30 << 20..34 << 20].copy_from_slice(&noise(9, 4 << 20));
    let change = fs::File::options().write(true).open(&large).unwrap();
    change
        .write_all_at(&content[30 << 20..34 << 20], 30 << 20)
        .unwrap();
    drop(change);
    fs::write(m.join("more"), noise(8, FILE)).unwrap();
    tool("sync", ["-f", s(&m)]);
    let flat = w.json(["flatten", "d"]);
    let (bytes, again) = (flat["bytes"].as_u64(), flat["copied"].as_u64());
    if killed {
        assert!(again < bytes.map(|b| b - (150 << 20)), "{flat}");
    }
    assert_eq!(copied(), 0);
    w.end_children();
    let same = || {
        assert!(read_direct(&m.join("more"), 0, FILE) == noise(8, FILE));
        assert!(read_direct(&large, 0, content.len()) == content);
    };
    same();
    // On a base of its own there is nothing to do, so it needs another one below it.
    w.ok(["fork", "e", "--from", "d"]);
    if end("INT") == Some(130) {
        assert_eq!(copied(), 1);
        w.ok(["gc"]);
        assert_eq!(copied(), 0);
    }
    same();
    eventually("nobody uses it", || w.run(["detach", "d"]).code == 0);
    let device = w.ok(["attach", "d"]);
    clean(&device);
    w.ok(["detach", "d"]);
    w.finish();
}
