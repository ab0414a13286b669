//! Ways to attach.

use crate::rig::*;
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

#[test]
fn readers_share_one_device() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    let (m1, m2) = (w.mkdir("m1"), w.mkdir("m2"));
    for name in ["d@s", "base"] {
        let first = w.ok(["attach", name, "--ro"]);
        let second = w.json(["attach", name]);
        assert_eq!(second["device"], first.as_str());
        assert_eq!(
            (&second["count"], &second["read_only"]),
            (&2.into(), &true.into())
        );
        let ro = fs::read_to_string(format!("/sys/block/{}/ro", &first[5..])).unwrap();
        assert_eq!(ro.trim(), "1");
        let open = File::options().write(true).open(&first);
        assert!(
            open.and_then(|f| f.write_all_at(b"x", 0).and(f.sync_all()))
                .is_err()
        );
        w.ok(["detach", name]);
        assert_eq!(w.device_of(name), first, "one user is left");
        w.ok(["attach", name, "--mount", s(&m1)]);
        w.ok(["attach", name, "--mount", s(&m2)]);
        assert!(m1.join("lost+found").exists() && m2.join("lost+found").exists());
        w.ok(["detach", s(&m1)]);
        assert!(!m1.join("lost+found").exists() && m2.join("lost+found").exists());
        w.ok(["detach", name]);
        w.ok(["detach", name]);
        w.fails(12, &["detach", name]);
    }
    // Another sector size is another device.
    w.ok(["attach", "base"]);
    w.fails(11, &["attach", "base", "--block-size", "4096"]);
    w.fails(11, &["attach", "base", "--via", "file"]);
    w.ok(["detach", "base"]);
    // A disk read-only: not to be written, nor attached for writing meanwhile.
    let device = w.ok(["attach", "d", "--ro"]);
    assert_eq!(w.ok(["attach", "d", "--ro"]), device);
    w.fails(11, &["attach", "d"]);
    w.ok(["detach", "d"]);
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn sectors_of_4096_bytes() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", 300 << 20);
    tool("mkfs.xfs", ["-qf", "-s", "size=4096", s(&image)]);
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let device = w.ok(["attach", "d", "--block-size", "4096", "--mount", s(&m)]);
    assert_eq!(tool("blockdev", ["--getss", &device]).trim(), "4096");
    assert_eq!(
        tool("blockdev", ["--getsize64", &device]).trim(),
        (300 << 20).to_string()
    );
    fs::write(m.join("a"), noise(1, 1 << 20)).unwrap();
    w.ok(["detach", s(&m)]);
    w.ok(["attach", "d", "--block-size", "4096", "--mount", s(&m)]);
    assert!(fs::read(m.join("a")).unwrap() == noise(1, 1 << 20));
    w.ok(["detach", "d"]);
    // In 512s as well, as the filesystem allows.
    w.ok(["attach", "d", "--mount", s(&m)]);
    w.ok(["detach", "d"]);
    w.fails(2, &["attach", "d", "--block-size", "1024"]);
    w.finish();
}

#[test]
fn a_disk_as_a_file() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("base.img", &noise(1, 4 << 20));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    let file = w.ok(["attach", "d", "--via", "file"]);
    let path = Path::new(&file);
    let mut expected = noise(1, 4 << 20);
    assert_eq!(fs::metadata(path).unwrap().len(), 4 << 20);
    let open = File::options().read(true).write(true).open(path).unwrap();
    // Odd places and lengths, through the cache.
    for (i, (at, len)) in [
        (1, 1),
        (4095, 2),
        (12_345, 54_321),
        (4 << 20, 0),
        ((4 << 20) - 3, 3),
    ]
    .into_iter()
    .enumerate()
    {
        let bytes = noise(10 + i as u64, len);
        open.write_all_at(&bytes, at).unwrap();
        expected[at as usize..at as usize + len].copy_from_slice(&bytes);
    }
    open.sync_all().unwrap();
    assert!(fs::read(path).unwrap() == expected);
    assert!(
        open.write_all_at(b"x", 4 << 20).is_err(),
        "a disk does not grow"
    );
    // Direct.
    let piece = w.file("piece", &noise(20, 256 << 10));
    tool(
        "dd",
        [
            &format!("if={}", piece.display()),
            &format!("of={file}"),
            "bs=64k",
            "seek=5",
            "oflag=direct",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    expected[5 << 16..9 << 16].copy_from_slice(&noise(20, 256 << 10));
    assert!(read_direct(path, 0, 4 << 20) == expected);
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap();
    drop(direct);
    // Holes, in whole blocks and not.
    for (at, len) in [(8192, 4096), (1 << 20, 300_000), (777, 5000)] {
        tool(
            "fallocate",
            [
                "--punch-hole",
                "-o",
                &at.to_string(),
                "-l",
                &len.to_string(),
                &file,
            ],
        );
        expected[at..at + len].fill(0);
        assert!(fs::read(path).unwrap() == expected, "{at}+{len}");
    }
    tool(
        "fallocate",
        ["--zero-range", "-o", "2000000", "-l", "100001", &file],
    );
    expected[2_000_000..2_100_001].fill(0);
    assert!(fs::read(path).unwrap() == expected);
    // Open: it stays, and works on.
    let told = w.fails_here(11, &["detach", "d"]);
    assert!(told.contains("open"), "{told}");
    open.write_all_at(b"still", 100).unwrap();
    expected[100..105].copy_from_slice(b"still");
    drop(open);
    w.ok(["detach", &file]);
    assert!(!path.exists());
    let out = w.path("out");
    w.ok(["export", "d", s(&out)]);
    assert!(fs::read(&out).unwrap() == expected);
    w.finish();
}

#[test]
fn a_dozen_at_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "12"]);
    let mut devices = Vec::new();
    for i in 1..=12 {
        let m = w.mkdir(&format!("m{i}"));
        devices.push(w.ok(["attach", &format!("d-{i}"), "--mount", s(&m)]));
        fs::write(m.join("n"), i.to_string()).unwrap();
    }
    devices.sort();
    devices.dedup();
    assert_eq!((devices.len(), w.attached().len()), (12, 12));
    for i in 1..=12 {
        let n = fs::read_to_string(w.path(&format!("m{i}/n"))).unwrap();
        assert_eq!(n, i.to_string());
    }
    let all: Vec<String> = (1..=12).map(|i| format!("d-{i}")).collect();
    w.ok(["detach"].into_iter().chain(all.iter().map(String::as_str)));
    w.finish();
}

#[test]
fn what_cannot_be_mounted_does_not_stay_attached() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let blank = w.sparse("blank.img", 16 << 20);
    w.ok(["import", s(&blank), "blank"]);
    w.ok(["create", "b", "--from", "blank"]);
    let m = w.mkdir("m");
    w.fails_here(12, &["attach", "d", "--mount", s(&w.path("no/such/dir"))]);
    let file = w.file("file", b"x");
    w.fails_here(2, &["attach", "d", "--mount", s(&file)]);
    assert_eq!(w.attached(), [""; 0]);
    let told = w.fails_here(1, &["attach", "b", "--mount", s(&m)]);
    assert!(told.contains("mkfs"), "{told}");
    assert_eq!((w.attached(), w.loops()), (vec![], vec![]), "undone");
    w.fails_here(2, &["attach", "d", "--via", "file", "--mount", s(&m)]);
    // A directory where something is mounted can take one more; the newest goes first.
    w.ok(["create", "e", "--from", "base"]);
    w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("d"), "d").unwrap();
    w.fails_here(11, &["attach", "d", "--mount", s(&m)]);
    assert!(m.join("d").exists(), "the failure took nothing away");
    let over = w.run(["attach", "e", "--mount", s(&m)]);
    if over.code == 0 {
        w.note(&over.stdout);
        assert!(!m.join("d").exists());
        w.ok(["detach", "e"]);
    }
    assert!(m.join("d").exists());
    w.ok(["detach", "d"]);
    // A filesystem made on it later.
    let device = w.ok(["attach", "b"]);
    tool("mkfs.ext4", ["-q", &device]);
    w.ok(["detach", "b"]);
    w.ok(["attach", "b", "--mount", s(&m)]);
    w.ok(["detach", s(&m)]);
    w.finish();
}

/// A relative mount point, a device by a link to it, an attachment by the beginning of its id.
#[test]
fn attachments_have_many_names() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.mkdir("m m");
    let id = w.json(["info", "d"])["id"].as_str().unwrap().to_string();
    w.ok(["attach", &id[..12], "--mount", "m m"]);
    assert_eq!(w.attached(), ["d"]);
    w.ok(["detach", "m m/"]);
    let device = w.ok(["attach", "d"]);
    std::os::unix::fs::symlink(&device, w.path("link")).unwrap();
    w.ok(["detach", "./link"]);
    w.ok(["attach", "d", "--mount", "m m"]);
    // Unmounted by hand.
    tool("umount", [s(&w.path("m m"))]);
    w.ok(["detach", "d"]);
    w.ok(["attach", "d"]);
    w.ok(["detach", &id[..12]]);
    w.finish();
}

#[test]
fn all_that_is_not_busy_is_taken_away_at_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    // Nothing is attached, and no daemon runs.
    w.ok(["detach", "--all"]);
    w.ok(["create", "d", "--from", "base", "--count", "3"]);
    w.ok(["snapshot", "d-1@s"]);
    let (busy, m1, m2) = (w.mkdir("busy"), w.mkdir("m1"), w.mkdir("m2"));
    w.ok(["attach", "d-1", "--mount", s(&busy)]);
    w.ok(["attach", "d-2", "--via", "file"]);
    w.ok(["attach", "d-1@s", "--mount", s(&m1)]);
    w.ok(["attach", "d-1@s", "--mount", s(&m2)]);
    w.ok(["attach", "d-1@s"]);
    w.ok(["attach", "d-3"]);
    let used = File::create(busy.join("file")).unwrap();
    w.fails_here(2, &["detach", "--all", "d-2"]);
    let told = w.ok(["detach", "--all", "-n"]);
    assert_eq!(told.matches("would detach d-1@s").count(), 3, "{told}");
    assert_eq!(w.attached().len(), 4);
    let told = w.run(["detach", "--all", "--json"]);
    assert!(
        told.code == 11 && told.stderr.contains(s(&busy)),
        "{told:?}"
    );
    let gone: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(gone["detached"].as_array().unwrap().len(), 5, "{told:?}");
    assert_eq!(w.attached(), ["d-1"]);
    let told = w.fails_here(11, &["detach", "--all"]);
    assert!(told.contains(s(&busy)), "{told}");
    assert!(busy.join("file").exists(), "what is busy stays mounted");
    let told = w.fails_here(11, &["daemon", "stop"]);
    assert!(told.contains("detach --all"), "{told}");
    drop(used);
    let gone = w.json(["detach", "--all"]);
    assert_eq!(gone["detached"][0]["name"], "d-1");
    w.finish();
}
