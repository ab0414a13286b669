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
    // Everybody else goes on meanwhile, and so do the other blocks of this disk.
    w.ok(["create", "e", "--from", "base"]);
    let other = w.ok(["attach", "e"]);
    w.ok(["snapshot", "d@s"]);
    let read_of = |device: &str, skip: u64| {
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
    let read = |skip| read_of(&device, skip);
    assert_eq!((read(4), read(5), read(6)), (0, 1, 0));
    assert_eq!((read_of(&other, 5), read_of(&other, 100)), (0, 0));
    let write = |device: &str, at: u64| {
        tool(
            "dd",
            [
                &format!("if={}", piece.display()),
                &format!("of={device}"),
                "bs=4k",
                &format!("seek={at}"),
                "count=1",
                "oflag=direct",
                "conv=notrunc,fsync",
                "status=none",
            ],
        )
    };
    write(&device, 6);
    write(&other, 5);
    // A scrub, with both attached, names the block, and who sees it: not the disk that writes it anew.
    let scrub = w.run(["--json", "scrub"]);
    assert_eq!(scrub.code, 4, "{scrub:?}");
    let document: serde_json::Value = serde_json::from_str(&scrub.stdout).unwrap();
    let found = &document["corruptions"][0];
    assert_eq!(document["corruptions"].as_array().unwrap().len(), 1);
    assert_eq!(
        (&found["lba_start"], &found["lba_end"]),
        (&5.into(), &6.into())
    );
    assert_eq!(found["affected"], serde_json::json!(["d", "d@s"]));
    assert_eq!(found["offset"], at as u64);
    assert_eq!(found["slot"], at as u64 / 4096);
    assert!(layer.ends_with(format!("{}.layer", found["layer"].as_str().unwrap())));
    write(&device, 5);
    assert_eq!((read(4), read(5), read(6)), (0, 0, 0));
    let scrub = w.run(["scrub", "d"]);
    assert_eq!(scrub.code, 4, "{scrub:?}");
    assert!(
        scrub
            .stdout
            .contains("d@s: block 5 does not match its checksum"),
        "{scrub:?}"
    );
    assert!(!scrub.stdout.contains("affected"), "only d@s: {scrub:?}");
    w.ok(["scrub", "e"]);
    w.ok(["detach", "e"]);
    w.ok(["rm", "e"]);
    w.ok(["detach", "d"]);
    w.fails_here(4, &["export", "d@s", "out"]);
    w.ok(["export", "d", "whole"]);
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
    w.ok(["rm", "--yes", "-r", "d"]);
    w.ok(["rm", "base"]);
    w.finish();
}

/// A linked image has no checksums; the first scrub makes them, and a daemon that has it open uses them from the next attach on.
#[test]
fn a_linked_image_that_changes_unseen() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("i.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "base", "--link"]);
    for name in ["d", "e"] {
        w.ok(["create", name, "--from", "base"]);
    }
    let device = w.ok(["attach", "d"]);
    let would = w.json(["scrub", "-n"]);
    assert_eq!(
        (&would["total"], &would["verified"]),
        (&(1 << 20).into(), &0.into())
    );
    assert_eq!(would["dry_run"], true);
    assert_eq!(w.json(["info", "base"])["base_sums"], false);
    let made = w.json(["scrub", "--rate", "100M"]);
    assert_eq!(made["summed"], serde_json::json!(["base"]));
    assert_eq!(w.json(["info", "base"])["base_sums"], true);
    w.ok(["attach", "e"]);
    let file = File::options().write(true).open(&image).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"rotten", 30 * 4096).unwrap();
    file.set_modified(time).unwrap();
    let mut dd = std::process::Command::new("dd");
    dd.args([
        &format!("if={device}"),
        "of=/dev/null",
        "bs=4k",
        "skip=30",
        "count=1",
        "iflag=direct",
        "status=none",
    ]);
    assert_eq!(finish(dd).code, 1);
    let scrub = w.run(["scrub"]);
    assert_eq!(scrub.code, 4);
    assert!(
        scrub.stdout.contains("base: block 30") && scrub.stdout.contains("affected: base, d, e"),
        "{scrub:?}"
    );
    w.ok(["detach", "d", "e"]);
    // The owner says that it is another one: that is told without reading it.
    file.set_modified(time + std::time::Duration::from_secs(1))
        .unwrap();
    let scrub = w.run(["scrub", "base"]);
    assert!(
        scrub.code == 4 && scrub.stdout.contains("was changed"),
        "{scrub:?}"
    );
    file.write_all_at(&noise(1, 1 << 20), 0).unwrap();
    file.set_modified(time).unwrap();
    w.ok(["scrub"]);
    w.finish();
}

/// What is cut off of a linked image while a disk over it is open is damage, and no hole.
#[test]
fn a_linked_image_that_is_cut_while_it_is_in_use() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("i.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "base", "--link"]);
    w.ok(["create", "d", "--from", "base"]);
    let file = w.ok(["attach", "d", "--via", "file"]);
    let open = File::open(file.trim_end()).unwrap();
    let seek = |to| rustix::fs::seek(&open, to);
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(0)), Ok(1 << 20));
    let cut = File::options().write(true).open(&image).unwrap();
    let time = cut.metadata().unwrap().modified().unwrap();
    cut.set_len(4096).unwrap();
    for to in [
        rustix::fs::SeekFrom::Hole(0),
        rustix::fs::SeekFrom::Data(8192),
    ] {
        assert_eq!(seek(to), Err(rustix::io::Errno::IO));
    }
    assert_eq!(w.run(["map", "d"]).code, 4);
    cut.write_all_at(&noise(1, 1 << 20), 0).unwrap();
    cut.set_modified(time).unwrap();
    assert_eq!(seek(rustix::fs::SeekFrom::Hole(0)), Ok(1 << 20));
    w.ok(["map", "d"]);

    // What is written over the part that is gone replaces data: how much the disk shows stays the same, or is not known.
    cut.set_len(4096).unwrap();
    drop(open);
    let disk = File::options().write(true).open(file.trim_end()).unwrap();
    disk.write_all_at(&noise(2, 4096), 9 * 4096).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    w.ok(["detach", "d"]);
    cut.write_all_at(&noise(1, 1 << 20), 0).unwrap();
    cut.set_modified(time).unwrap();
    assert_eq!(w.json(["du", "d"])["refer"], 1 << 20);
    w.ok(["check"]);
    w.finish();
}

/// SIGINT ends a scrub with 130; the next one goes on. Names that are lost come back.
#[test]
fn a_scrub_is_interrupted_and_names_are_repaired() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("i.img", &noise(1, 4 << 20));
    w.ok(["import", s(&image), "base"]);
    for name in ["d", "e"] {
        w.ok(["create", name, "--from", "base"]);
    }
    w.ok(["attach", "e"]);
    let slow = w.command(["scrub", "--rate", "1M"]).spawn().unwrap();
    let position = w.store.join("scrub");
    eventually("it runs", || position.exists());
    w.fails_here(11, &["scrub"]);
    let pid = w
        .processes()
        .into_iter()
        .find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(5).any(|word| word == b"scrub")
        })
        .expect("the scrub");
    assert!(kill(pid, "INT"));
    let out = Out::from(slow.wait_with_output().unwrap());
    assert_eq!(out.code, 130);
    assert_eq!(w.json(["scrub", "-n"])["resumed"], true);
    assert_eq!(w.json(["scrub"])["resumed"], true);
    assert!(!position.exists());

    let names = w.store.join("names");
    fs::remove_file(names.join("d")).unwrap();
    fs::write(names.join("base"), b"rubbish").unwrap();
    fs::write(names.join(".tmp-x"), b"half").unwrap();
    let planned = w.run(["check", "--repair", "-n"]);
    assert_eq!(planned.code, 4, "{planned:?}");
    for what in [
        "would repair: d:",
        "would repair: base:",
        "would repair: names/.tmp-x:",
    ] {
        assert!(planned.stdout.contains(what), "{planned:?}");
    }
    assert!(!names.join("d").exists());
    w.fails_here(2, &["check", "--repair"]);
    let done = w.json(["--yes", "check", "--repair"]);
    assert_eq!(done["ok"], true);
    assert_eq!(done["repairs"].as_array().unwrap().len(), 3);
    assert_eq!(w.names(), ["base", "d", "e"]);
    let again = w.json(["check", "--repair"]);
    assert_eq!(again["repairs"].as_array().unwrap().len(), 0);
    w.ok(["detach", "e"]);
    w.finish();
}

/// The host's disk rots under what its page cache holds, in folios of whatever size: scrub looks at the disk.
#[test]
fn scrub_is_not_deceived_by_the_page_cache() {
    if !root() {
        return;
    }
    for mkfs in [
        &["mkfs.ext4", "-qF", "-b", "4096"][..],
        &["mkfs.xfs", "-qf"],
    ] {
        // Other tests drop caches, too: then there is nothing that could deceive.
        assert!((0..5).any(|_| rots_below_its_cache(mkfs)));
    }
}

/// False if the page cache did not hold what it should.
fn rots_below_its_cache(mkfs: &[&str]) -> bool {
    let w = World::at("host/store");
    let host = w.mkdir("host");
    let disk = w.sparse("host.img", 400 << 20);
    tool(mkfs[0], [&mkfs[1..], &[s(&disk)]].concat());
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let content = noise(7, 16 << 20);
    w.ok(["import", "--copy", s(&w.file("raw", &content)), "base"]);
    let id = w.json(["info", "base"])["id"].as_str().unwrap().to_string();
    let image = host.join("store/bases").join(id).join("image");
    tool("sync", ["-f", s(&host)]);
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    // From beginning to end: the kernel reads ahead, in larger and larger folios.
    shell(&format!("cat {} > /dev/null", s(&image)));

    let below = File::options().read(true).write(true).open(&disk).unwrap();
    let mut all = vec![0; 400 << 20];
    below.read_exact_at(&mut all, 0).unwrap();
    let mut rotten = 0;
    for block in (0..content.len() / 4096).step_by(16) {
        let wanted = &content[block * 4096..(block + 1) * 4096];
        let at = all.chunks_exact(4096).position(|found| found == wanted);
        below
            .write_all_at(b"rot", at.expect("a block of the base") as u64 * 4096 + 9)
            .unwrap();
        rotten += 1;
    }
    let in_memory = fs::read(&image).unwrap() == content;
    let out = w.run(["--json", "scrub"]);
    assert_eq!(out.code, 4, "{out:?}");
    let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    let found = report["corruptions"].as_array().unwrap().len();
    assert_eq!(found, rotten, "{}", mkfs[0]);
    tool("umount", [s(&host)]);
    w.nothing_left();
    in_memory
}
