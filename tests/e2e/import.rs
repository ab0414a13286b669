//! Images that cannot be taken in, and what is left of the attempt: nothing.

use crate::rig::*;
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    process::Stdio,
    time::Duration,
};

/// Bases, whole or half, in the store.
fn bases(w: &World) -> Vec<String> {
    let Ok(dir) = fs::read_dir(w.store.join("bases")) else {
        return Vec::new();
    };
    dir.flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn what_is_no_image_is_refused() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let empty = w.file("empty", b"");
    let dir = w.mkdir("dir");
    let fifo = w.path("fifo");
    tool("mkfifo", [s(&fifo)]);
    w.fails(12, &["import", s(&w.path("missing")), "x"]);
    w.fails(2, &["import", "", "x"]);
    w.fails(12, &["import", s(&w.path("no/such/dir/x.img"))]);
    w.fails(12, &["import", s(&empty.join("below")), "x"]);
    for how in [&[][..], &["--copy"], &["--link"]] {
        let fails = |file: &str| {
            let mut args = vec!["import", file, "x"];
            args.extend(how);
            w.fails(2, &args);
        };
        for file in [s(&empty), s(&dir), s(&fifo), "/dev/null", "/dev/zero", "/"] {
            fails(file);
        }
    }
    let link = w.path("dangling");
    std::os::unix::fs::symlink(w.path("missing"), &link).unwrap();
    w.fails(12, &["import", s(&link), "x"]);
    let gz = w.file("x.gz", b"\x1f\x8b\x08\0\0\0\0\0");
    let told = w.fails(1, &["import", s(&gz), "x"]);
    assert!(told.contains("gzip"), "{told}");
    w.fails(2, &["import", "-", "x", "--link"]);
    w.fails(2, &["import", "-"]);
    w.fails(2, &["import", "-", "x"]);
    let huge = w.path("huge");
    // The host filesystem may not hold one as large.
    if File::create(&huge).unwrap().set_len((16 << 40) + 1).is_ok() {
        w.fails(2, &["import", s(&huge), "x"]);
    }
    fs::remove_file(&huge).unwrap();
    assert_eq!(bases(&w).len(), 1);
    // By a link, and with a name that needs care.
    let image = w.file("an image.v1.img", &noise(1, 5000));
    w.fails(2, &["import", s(&image)]);
    let link = w.path("link.img");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    w.ok(["import", s(&link)]);
    assert_eq!(w.names(), ["base", "link"]);
    w.finish();
}

#[test]
fn a_changing_image_is_refused() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let image = w.file("busy.img", &noise(1, 64 << 20));
    let mut writer = std::process::Command::new("bash");
    // By itself, without children that would outlive it.
    writer.args(["-c", "while :; do printf x 1<>\"$0\"; done"]);
    writer.arg(&image);
    w.child(writer);
    std::thread::sleep(Duration::from_millis(100));
    let told = w.fails(11, &["import", s(&image), "x", "--copy"]);
    assert!(told.contains("changed"), "{told}");
    w.end_children();
    assert_eq!(bases(&w).len(), 1);
    w.ok(["import", s(&image), "x"]);
    w.finish();
}

#[test]
fn a_linked_image_must_stay_what_it_is() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let content = noise(1, 1 << 20);
    let image = w.file("linked.img", &content);
    w.ok(["import", s(&image), "--link"]);
    assert_eq!(w.json(["info", "linked"])["base_linked"], true);
    w.ok(["create", "d", "--from", "linked"]);
    w.ok(["attach", "d"]);
    w.ok(["detach", "d"]);
    // In use as any other base, though its file is elsewhere.
    w.ok(["attach", "linked"]);
    w.ok(["create", "idle", "--from", "linked"]);
    w.fails_here(11, &["rm", "-r", "--yes", "linked"]);
    w.ok(["rm", "idle"]);
    w.ok(["detach", "linked"]);
    let back = || {
        fs::write(&image, &content).unwrap();
    };
    let mtime = fs::metadata(&image).unwrap().modified().unwrap();
    for change in ["content", "size", "gone", "replaced", "a directory"] {
        match change {
            "content" => fs::write(&image, noise(2, 1 << 20)).unwrap(),
            "size" => File::options()
                .write(true)
                .open(&image)
                .unwrap()
                .set_len(1 << 19)
                .unwrap(),
            "gone" => fs::remove_file(&image).unwrap(),
            "replaced" => fs::rename(w.file("new", &content), &image).unwrap(),
            _ => {
                fs::remove_file(&image).unwrap();
                fs::create_dir(&image).unwrap();
            }
        }
        for args in [
            &["attach", "d"][..],
            &["attach", "linked"],
            &["export", "d", "out"],
            &["export", "linked", "out"],
        ] {
            let told = w.fails_here(4, args);
            assert!(told.contains("linked"), "{change}: {told}");
        }
        assert!(!w.path("out").exists());
        // Looking goes on, and other disks do.
        w.ok(["ls"]);
        w.ok(["tree"]);
        w.ok(["info", "d"]);
        w.ok(["create", "other", "--from", "base"]);
        w.ok(["attach", "other"]);
        w.ok(["detach", "other"]);
        w.ok(["rm", "other"]);
        let check = w.run(["check"]);
        assert_eq!(check.code, 4, "{change}: {check:?}");
    }
    fs::remove_dir(&image).unwrap();
    // The same file, back from a backup with its time.
    back();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_modified(mtime).unwrap();
    drop(file);
    w.ok(["rm", "-r", "--yes", "linked"]);
    w.finish();
}

#[test]
fn a_file_that_may_not_be_read() {
    if !root() {
        return;
    }
    let w = World::new();
    fs::set_permissions(&w.dir, fs::Permissions::from_mode(0o777)).unwrap();
    let image = w.file("secret.img", &noise(1, 5000));
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    let out = crate::users::run_as_nobody(&w, &["import", s(&image), "x"]);
    assert_eq!(out.code, 1, "{out:?}");
    assert!(
        out.stderr.contains("Permission denied") && out.stderr.contains("hint:"),
        "{out:?}"
    );
    assert_eq!(bases(&w), [""; 0]);
}

#[test]
fn a_full_disk_keeps_what_was_there() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.ext4("host.img", 64);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let small = w.file("small.img", &noise(1, 2 << 20));
    w.ok(["import", s(&small)]);
    w.ok(["create", "d", "--from", "small", "--size", "200M"]);
    let free = || tool("stat", ["-f", "-c", "%f", s(&host)]);
    let before = free();
    let big = w.file("big.img", &noise(2, 100 << 20));
    w.fails(14, &["import", s(&big)]);
    w.fails(14, &["import", s(&big), "x", "--copy"]);
    // As a stream.
    let mut command = w.command(["import", "-", "x"]);
    command.stdin(File::open(&big).unwrap());
    let out = finish(command);
    assert_eq!(out.code, 14, "{out:?}");
    assert_eq!(bases(&w).len(), 1);
    assert_eq!(free(), before, "nothing half-made stays");
    // A disk that fills the host: its writer is told, what was flushed stays.
    let device = w.ok(["attach", "d"]);
    let first = w.file("first", &noise(3, 8 << 20));
    tool(
        "dd",
        [
            &format!("if={}", first.display()),
            &format!("of={device}"),
            "bs=1M",
            "oflag=direct",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    let mut dd = std::process::Command::new("timeout");
    dd.args([
        "60",
        "dd",
        &format!("if={}", big.display()),
        &format!("of={device}"),
        "bs=1M",
        "seek=20",
        "oflag=direct",
        "conv=notrunc,fsync",
        "status=none",
    ]);
    let out = finish(dd);
    assert_eq!(out.code, 1, "{out:?}");
    assert!(out.stderr.contains("No space left"), "{out:?}");
    assert!(read_direct(device.as_ref(), 0, 8 << 20) == noise(3, 8 << 20));
    // What needs no space works.
    w.ok(["ls"]);
    tool(
        "blkdiscard",
        ["-f", "-o", "20M", "-l", "180M", &device]
            .map(|a| a.replace("20M", "20971520").replace("180M", "188743680")),
    );
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "d"]);
    assert!(read_direct(device.as_ref(), 0, 8 << 20) == noise(3, 8 << 20));
    tool(
        "dd",
        [
            &format!("if={}", first.display()),
            &format!("of={device}"),
            "bs=1M",
            "seek=50",
            "oflag=direct",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    w.ok(["detach", "d"]);
    w.ok(["create", "e", "--from", "small"]);
    let check = w.run(["check"]);
    assert_eq!(check.code, 0, "{check:?}\n{}", w.log());
    w.ok(["daemon", "stop"]);
    tool("umount", [s(&host)]);
    w.nothing_left();
}

#[test]
fn an_interrupted_import_leaves_nothing() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let image = w.file("large.img", &noise(1, 256 << 20));
    for (signal, code) in [("INT", 130), ("TERM", 130)] {
        // From a pipe that never ends, and from a file.
        let mut command = std::process::Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["import", "-", "x"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        pipe.write_all(&noise(2, 3 << 20)).unwrap();
        eventually("it began", || bases(&w).len() == 2);
        kill(child.id() as i32, signal);
        let out = Out::from(child.wait_with_output().unwrap());
        drop(pipe);
        assert_eq!(out.code, code, "{out:?}");
        assert!(out.stderr.contains("hint:"), "{out:?}");
        assert_eq!(bases(&w).len(), 1, "{signal}");

        let mut command = std::process::Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["import", s(&image), "--copy"])
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        eventually("it began", || bases(&w).len() == 2);
        kill(child.id() as i32, signal);
        let out = Out::from(child.wait_with_output().unwrap());
        assert_eq!(out.code, code, "{out:?}");
        assert_eq!(bases(&w).len(), 1, "{signal}");
    }
    // Killed: what is left is a leak that gc takes away.
    let mut command = std::process::Command::new(BIN);
    command
        .arg("-S")
        .arg(&w.store)
        .args(["import", s(&image), "--copy"]);
    let mut child = command.spawn().unwrap();
    eventually("it began", || bases(&w).len() == 2);
    child.kill().unwrap();
    child.wait().unwrap();
    let check = w.run(["check"]);
    assert_eq!(check.code, 3, "{check:?}");
    let pretended = w.json(["gc", "-n"]);
    assert_eq!(pretended["files"].as_array().unwrap().len(), 1);
    assert_eq!(bases(&w).len(), 2);
    w.ok(["gc"]);
    assert_eq!(bases(&w).len(), 1);
    w.finish();
}

/// Others work on the store meanwhile, and clean it: an import under way is no leftover.
#[test]
fn an_import_under_way_is_no_garbage() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let mut command = std::process::Command::new(BIN);
    command
        .arg("-S")
        .arg(&w.store)
        .args(["import", "-", "slow"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let content = noise(2, 5 << 20);
    pipe.write_all(&content[..3 << 20]).unwrap();
    eventually("it began", || bases(&w).len() == 2);
    w.ok(["rm", "d"]);
    w.ok(["gc"]);
    let check = w.run(["check"]);
    assert_eq!(check.code, 0, "{check:?}");
    pipe.write_all(&content[3 << 20..]).unwrap();
    drop(pipe);
    let out = Out::from(child.wait_with_output().unwrap());
    assert_eq!(out.code, 0, "{out:?}");
    w.ok(["export", "slow", s(&w.path("out"))]);
    assert!(fs::read(w.path("out")).unwrap() == content);
    w.finish();
}
