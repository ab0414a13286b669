//! Damage is told, stays where it is, and loses nothing else.

use crate::rig::*;
use std::{fs, fs::File, os::unix::fs::FileExt, os::unix::fs::symlink, path::Path};

/// A base, a disk `bad` with data in its layer, and `good`, which has nothing to do with it.
fn two_disks() -> (World, std::path::PathBuf) {
    let w = World::with_base();
    w.ok(["create", "bad", "--from", "base"]);
    w.ok(["create", "good", "--from", "base"]);
    let m = w.mkdir("m");
    for name in ["bad", "good"] {
        w.ok(["attach", name, "--mount", s(&m)]);
        fs::write(m.join("f"), noise(1, 1 << 20)).unwrap();
        w.ok(["detach", name]);
    }
    let layer = w.layer_of("bad");
    (w, layer)
}

/// Everything but the damaged disk goes on as ever.
fn others_go_on(w: &World) {
    let m = w.mkdir("m");
    w.ok(["attach", "good", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 1 << 20));
    w.ok(["create", "new", "--from", "good"]);
    w.ok(["detach", "good"]);
    w.ok(["snapshot", "new@s"]);
    w.ok(["info", "new"]);
    w.ok(["rm", "--yes", "-r", "new"]);
    w.ok(["export", "good", s(&w.path("good.out"))]);
    fs::remove_file(w.path("good.out")).unwrap();
}

/// What is sound is listed, what is not is named, and the exit code tells.
fn listed(w: &World, bad: &str) {
    let out = w.run(["ls", "-H", "-o", "name"]);
    assert_eq!(out.code, 4, "{out:?}");
    assert!(
        out.stdout.contains("good\n") && out.stdout.contains("base\n"),
        "{out:?}"
    );
    assert!(out.stderr.contains(bad), "{out:?}");
    let out = w.run(["--json", "ls"]);
    assert_eq!(out.code, 4, "{out:?}");
    let document: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!(document["damaged"][0]["name"], bad);
    let names: Vec<&str> = document["objects"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|o| o["name"].as_str())
        .collect();
    assert_eq!(names, ["base", "good"]);
    for args in [
        &["tree"][..],
        &["du"],
        &["--json", "tree"],
        &["--json", "du"],
    ] {
        let out = w.run(args);
        assert_eq!(out.code, 4, "{args:?} {out:?}");
        assert!(out.stdout.contains("good"), "{args:?} {out:?}");
    }
}

#[test]
fn a_truncated_layer() {
    if !root() {
        return;
    }
    let (w, layer) = two_disks();
    let whole = fs::read(&layer).unwrap();
    let backup = w.path("backup");
    tool("cp", ["--sparse=always", s(&layer), s(&backup)]);
    for len in [0, 1, 100, 4095] {
        fs::write(&layer, &whole[..len]).unwrap();
        for args in [
            &["attach", "bad"][..],
            &["info", "bad"],
            &["export", "bad", "out"],
            &["create", "x", "--from", "bad"],
            &["snapshot", "bad@x"],
            &["map", "bad"],
        ] {
            let told = w.fails_here(4, args);
            assert!(told.contains("layer"), "{len}: {told}");
        }
        let check = w.run(["check"]);
        assert_eq!(check.code, 4, "{len} {check:?}");
        assert!(check.stdout.contains("bad"), "{check:?}");
        listed(&w, "bad");
        others_go_on(&w);
    }
    // Cut in its data: what is cut off is missed at the latest when it is read. (The very last slot may be a free one.)
    for len in [whole.len() / 4 * 3, whole.len() / 2] {
        fs::write(&layer, &whole[..len]).unwrap();
        let check = w.run(["check"]);
        assert_eq!(check.code, 4, "{len} {check:?}");
        let out = w.run(["export", "bad", "out"]);
        assert_eq!(out.code, 4, "{len} {out:?}");
        assert!(!w.path("out").exists());
        others_go_on(&w);
    }
    // Damage is no garbage.
    w.run(["gc"]);
    assert!(layer.exists());
    tool("cp", ["--sparse=always", s(&backup), s(&layer)]);
    w.ok(["check"]);
    let m = w.mkdir("m");
    w.ok(["attach", "bad", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 1 << 20));
    w.ok(["detach", "bad"]);
    // What nobody can repair can be removed, and the store is sound again.
    fs::write(&layer, &whole[..100]).unwrap();
    w.ok(["rm", "bad"]);
    assert!(!layer.exists());
    w.ok(["ls"]);
    w.finish();
}

#[test]
fn a_layer_that_is_gone() {
    if !root() {
        return;
    }
    let (w, layer) = two_disks();
    let away = w.path("away");
    fs::rename(&layer, &away).unwrap();
    for args in [
        &["attach", "bad"][..],
        &["info", "bad"],
        &["export", "bad", "out"],
        &["create", "x", "--from", "bad"],
    ] {
        w.fails_here(4, args);
    }
    assert_eq!(w.run(["check"]).code, 4);
    listed(&w, "bad");
    others_go_on(&w);
    // Something else in its place.
    for what in ["directory", "link", "fifo", "another layer"] {
        match what {
            "directory" => fs::create_dir(&layer).unwrap(),
            "link" => symlink(&away, &layer).unwrap(),
            "fifo" => drop(tool("mkfifo", [s(&layer)])),
            _ => drop(fs::copy(w.layer_of("good"), &layer).unwrap()),
        }
        for args in [
            &["attach", "bad"][..],
            &["info", "bad"],
            &["export", "bad", "out"],
            &["create", "x", "--from", "bad"],
        ] {
            let told = w.fails_here(4, args);
            assert!(told.contains("layer"), "{what}: {told}");
        }
        let check = w.run(["check"]);
        assert_eq!(check.code, 4, "{what} {check:?}");
        listed(&w, "bad");
        others_go_on(&w);
        w.run(["gc"]);
        match what {
            "directory" => fs::remove_dir(&layer).unwrap(),
            _ => fs::remove_file(&layer).unwrap(),
        }
    }
    fs::rename(&away, &layer).unwrap();
    w.finish();
}

#[test]
fn foreign_things_in_the_store() {
    if !root() {
        return;
    }
    let (w, layer) = two_disks();
    let layers = w.store.join("layers");
    let names = w.store.join("names");
    let foreign = [
        layers.join("notes.txt"),
        layers.join("0011.layer"),
        layers.join("00112233445566778899aabbccddeeff.layer~"),
        names.join("..odd"),
    ];
    for path in &foreign {
        fs::write(path, b"precious").unwrap();
        let code = w.run(["check"]).code;
        assert!(code == 3 || code == 4, "{}: {code}", path.display());
        w.ok(["ls"]);
        others_go_on(&w);
        w.ok(["gc"]);
        assert_eq!(fs::read(path).unwrap(), b"precious", "not ours to remove");
        fs::remove_file(path).unwrap();
        w.ok(["check"]);
    }
    // Links and directories.
    symlink(
        &layer,
        layers.join("11112233445566778899aabbccddeeff.layer"),
    )
    .unwrap();
    symlink(names.join("good"), names.join("alias")).unwrap();
    symlink("/etc/passwd", names.join("passwd")).unwrap();
    fs::create_dir(names.join("folder")).unwrap();
    fs::create_dir(layers.join("folder")).unwrap();
    let check = w.run(["check"]);
    assert_eq!(check.code, 4, "{check:?}");
    for name in ["alias", "passwd", "folder"] {
        assert!(check.stdout.contains(name), "{check:?}");
        for args in [
            &["info", name][..],
            &["attach", name],
            &["create", "x", "--from", name],
        ] {
            w.fails_here(4, args);
        }
        w.fails_here(13, &["create", name, "--from", "base"]);
        w.fails_here(13, &["rename", "good", name]);
    }
    assert_eq!(w.names(), ["bad", "base", "good"]);
    others_go_on(&w);
    w.ok(["gc"]);
    for path in ["alias", "passwd"] {
        fs::remove_file(names.join(path)).unwrap();
    }
    fs::remove_dir(names.join("folder")).unwrap();
    fs::remove_dir(layers.join("folder")).unwrap();
    fs::remove_file(layers.join("11112233445566778899aabbccddeeff.layer")).unwrap();
    // A name that says nonsense.
    for content in [
        &b""[..],
        b"nonsense",
        b"kind = disk\n",
        &[0; 100],
        &[0xff; 10_000],
    ] {
        fs::write(names.join("odd"), content).unwrap();
        w.fails_here(4, &["info", "odd"]);
        w.fails_here(4, &["attach", "odd"]);
        assert_eq!(w.run(["check"]).code, 4);
        let out = w.run(["ls"]);
        assert_eq!(out.code, 4, "{out:?}");
        assert!(
            out.stdout.contains("good") && out.stderr.contains("odd"),
            "{out:?}"
        );
        others_go_on(&w);
    }
    w.ok(["rm", "odd"]);
    w.finish();
}

/// A flipped byte in data is told by name and place, and the rest is read.
#[test]
fn a_rotten_block() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("i.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let piece = w.file("piece", &noise(2, 64 << 10));
    tool(
        "dd",
        [
            &format!("if={}", piece.display()),
            &format!("of={device}"),
            "bs=64k",
            "oflag=direct",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    w.ok(["detach", "d"]);
    let layer = w.layer_of("d");
    let bytes = fs::read(&layer).unwrap();
    let wanted = &noise(2, 64 << 10)[5 * 4096..6 * 4096];
    let at = bytes
        .windows(4096)
        .step_by(4096)
        .position(|b| b == wanted)
        .expect("the block is in the layer")
        * 4096;
    File::options()
        .write(true)
        .open(&layer)
        .unwrap()
        .write_all_at(&[!bytes[at + 17]], at as u64 + 17)
        .unwrap();
    let told = w.fails_here(4, &["export", "d", "out"]);
    assert!(
        told.contains("block 5") && told.contains("hecksum"),
        "{told}"
    );
    let device = w.ok(["attach", "d"]);
    let read = |skip: u64| {
        let mut dd = std::process::Command::new("dd");
        dd.args([
            &format!("if={device}"),
            "of=/dev/null",
            "bs=4k",
            &format!("skip={skip}"),
            "count=1",
            "iflag=direct",
            "status=none",
        ]);
        finish(dd).code
    };
    assert_eq!((read(4), read(5), read(6)), (0, 1, 0));
    w.ok(["detach", "d"]);
    // And in the base.
    let base = fs::read_dir(w.store.join("bases"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path()
        .join("image");
    let file = File::options().write(true).open(&base).unwrap();
    file.write_all_at(b"rotten", 100 * 4096 + 9).unwrap();
    let told = w.fails_here(4, &["export", "base", "out"]);
    assert!(told.contains("block 100"), "{told}");
    assert!(!Path::new(&w.path("out")).exists());
    w.ok(["rm", "d"]);
    w.ok(["rm", "base"]);
    w.finish();
}
