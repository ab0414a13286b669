//! Stores in odd places, and in places where they cannot work.

use crate::rig::*;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

/// Everything once, in a store at `path` named as `-S arg`.
fn use_store(w: &World, arg: &Path) {
    let ok = |args: &[&str]| {
        let out = finish(w.command_on(arg, args));
        assert_eq!(out.code, 0, "{args:?} {out:?}");
        w.note(&out.stdout);
        out.stdout.trim_end().to_string()
    };
    let image = w.ext4("i.img", 32);
    let m = w.mkdir("mount point");
    ok(&["import", s(&image), "base"]);
    ok(&["create", "d", "--from", "base"]);
    let device = ok(&["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("f"), "x").unwrap();
    ok(&["snapshot", "d@s", "--freeze"]);
    assert!(ok(&["ls", "attached"]).contains(&device));
    ok(&["detach", s(&m)]);
    let file = ok(&["attach", "d@s", "--via", "file"]);
    assert_eq!(fs::metadata(&file).unwrap().len(), 32 << 20);
    ok(&["detach", "d@s"]);
    ok(&["check"]);
}

#[test]
fn odd_places() {
    if !root() {
        return;
    }
    let w = World::at("a store with spaces,commas=and\\backslashes é");
    use_store(&w, &w.store);
    w.finish();
    // Longer than the address of a socket may be.
    let w = World::at(&format!("{0}/{0}/{0}/store", "d".repeat(90)));
    fs::create_dir_all(w.store.parent().unwrap()).unwrap();
    use_store(&w, &w.store);
    w.finish();
    // Relative, with parents that do not exist; through a link.
    let w = World::at("x/y/store");
    use_store(&w, Path::new("x/./y/../y/store"));
    let link = w.path("link");
    std::os::unix::fs::symlink(&w.store, &link).unwrap();
    let status = finish(w.command_on(&link, ["ls"]));
    assert_eq!(status.code, 0, "{status:?}");
    w.finish();
    // By the environment.
    let w = World::with_base();
    let mut command = std::process::Command::new(BIN);
    command
        .env("FORKDISK_STORE", &w.store)
        .args(["ls", "-H", "-o", "name"]);
    assert_eq!(finish(command).stdout, "base\n");
    // A file is no store, and an empty variable names none.
    let file = w.file("a file", b"x");
    for command in ["ls", "init"] {
        let out = finish(w.command_on(&file, [command]));
        assert_eq!(out.code, 10, "{out:?}");
        assert!(out.stderr.contains("a store is a directory"), "{out:?}");
    }
    let mut command = w.command(["ls", "-H", "-o", "name"]);
    command.env("FORKDISK_STORE", "");
    assert_eq!(finish(command).stdout, "base\n");
    let mut command = std::process::Command::new(BIN);
    command.env("FORKDISK_STORE", "").args(["help"]);
    assert_eq!(finish(command).code, 0);
}

#[test]
fn a_store_that_can_only_be_read() {
    if !root() {
        return;
    }
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.ext4("host.img", 64);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let image = w.file("i.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    tool("mount", ["-o", "remount,ro", s(&host)]);
    for args in [
        &["create", "e", "--from", "base"][..],
        &["create", "e", "--from", "d"],
        &["import", s(&image), "x"],
        &["snapshot", "d@t"],
        &["rename", "d", "e"],
        &["rollback", "d@s"],
        &["resize", "d", "2M"],
        &["rm", "-r", "--yes", "d"],
        &["attach", "d"],
        &["attach", "base"],
    ] {
        let told = w.fails(1, args);
        assert!(told.contains("ead-only"), "{args:?}: {told}");
    }
    w.ok(["ls"]);
    w.ok(["tree"]);
    w.ok(["info", "d"]);
    w.ok(["du"]);
    assert_eq!(w.run(["check"]).code, 0);
    w.ok(["export", "d", s(&w.path("out"))]);
    assert_eq!(sha256(&w.path("out")), sha256(&image));
    tool("mount", ["-o", "remount,rw", s(&host)]);
    w.ok(["create", "e", "--from", "base"]);
    assert_eq!(w.run(["check"]).code, 0);
    w.ok(["attach", "e"]);
    w.ok(["detach", "e"]);
    w.ok(["daemon", "stop"]);
    tool("umount", [s(&host)]);
    w.nothing_left();
    // A place where no store can be made.
    let w = World::at("host/store");
    let host = w.mkdir("host");
    tool("mount", ["-o", "loop,ro", s(&disk), s(&host)]);
    let other = host.join("other");
    let out = finish(w.command_on(&other, ["init"]));
    assert_eq!(out.code, 1, "{out:?}");
    assert!(out.stderr.contains("hint:"), "{out:?}");
    tool("umount", [s(&host)]);
}

#[test]
fn a_store_of_another_version() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let file = w.store.join("forkdisk.toml");
    let old = fs::read_to_string(&file).unwrap();
    let line = old.lines().find(|l| l.starts_with("format")).unwrap();
    let write = |line2: &str| fs::write(&file, old.replace(line, line2)).unwrap();
    write(&line.replace(char::is_numeric, "999"));
    for args in [
        &["ls"][..],
        &["create", "e", "--from", "base"],
        &["attach", "d"],
        &["rm", "d"],
        &["check"],
        &["gc"],
        &["init"],
        &["import", s(&w.path("base.img")), "x"],
        &["daemon", "run"],
    ] {
        let told = w.fails(1, args);
        assert!(
            told.contains("version 999") && told.contains("newer"),
            "{told}"
        );
    }
    for damage in ["", "format = nonsense", "nonsense"] {
        write(damage);
        let told = w.fails(4, &["ls"]);
        assert!(told.contains("forkdisk.toml"), "{told}");
        w.fails(4, &["init"]);
    }
    fs::write(&file, [0xff; 100]).unwrap();
    w.fails(4, &["ls"]);
    fs::write(&file, &old).unwrap();
    // One layer of a newer version.
    let layer = w.layer_of("d");
    w.ok(["create", "e", "--from", "base"]);
    w.finish();
    assert!(layer.exists());
}

#[test]
fn a_store_that_moved() {
    if !root() {
        return;
    }
    let mut w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "3"]);
    // At rest.
    let elsewhere = w.path("elsewhere");
    fs::rename(&w.store, &elsewhere).unwrap();
    w.fails(10, &["ls"]);
    w.store = elsewhere;
    let m = w.mkdir("m");
    w.ok(["attach", "d-1", "--mount", s(&m)]);
    fs::write(m.join("f"), "x").unwrap();
    // In use: what is attached works on, and so does everything else from its new place.
    let third = w.path("third place");
    fs::rename(&w.store, &third).unwrap();
    w.fails(10, &["ls"]);
    fs::write(m.join("g"), "y").unwrap();
    w.store = third;
    assert_eq!(w.attached(), ["d-1"]);
    let status = w.status();
    for field in ["socket", "mount", "log"] {
        let path = status[field].as_str().unwrap();
        assert!(Path::new(path).exists(), "{field}: {path}");
    }
    let device = w.ok(["attach", "d-2"]);
    let file = w.ok(["attach", "d-3", "--via", "file"]);
    assert_eq!(fs::metadata(&file).unwrap().len(), 256 << 20);
    w.ok(["snapshot", "d-1@s"]);
    assert_eq!(w.device_of("d-2"), device);
    w.ok(["detach", "d-3"]);
    w.ok(["detach", s(&m)]);
    w.ok(["detach", &device]);
    w.ok(["attach", "d-1", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("g")).unwrap(), "y");
    w.ok(["detach", "d-1"]);
    w.finish();
}

#[test]
fn a_store_of_somebody_else() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    fs::set_permissions(&w.dir, fs::Permissions::from_mode(0o755)).unwrap();
    let before = w.fingerprint();
    for mode in [0o700, 0o755] {
        fs::set_permissions(&w.store, fs::Permissions::from_mode(mode)).unwrap();
        for args in [
            &["ls"][..],
            &["create", "e", "--from", "base"],
            &["attach", "d"],
            &["rm", "d"],
            &["init"],
            &["check"],
            &["daemon", "status"],
        ] {
            let out = crate::users::run_as_nobody_on(&w, &w.store, args);
            assert!([1, 13].contains(&out.code), "{args:?} {out:?}");
            assert!(
                out.stderr.contains("error:") && out.stderr.contains("hint:"),
                "{args:?} {out:?}"
            );
            assert!(
                out.code == 13
                    || out.stderr.contains("ermission")
                    || out.stderr.contains("no daemon"),
                "{args:?} {out:?}"
            );
        }
    }
    fs::set_permissions(&w.store, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(before, w.fingerprint());
    w.finish();
}
