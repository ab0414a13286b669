//! A host disk that is full, for real: the writer is told so, nobody else is disturbed, what was acknowledged is there, and once there is
//! room again it all goes on, with the same daemon and the same mounts.

use crate::rig::*;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const FULL: &str = "No space left on device";

/// A store on a small filesystem of its own, with a disk of a sparse base, and 12 MiB that can be freed.
struct Small {
    w: World,
    host: PathBuf,
}

impl Small {
    fn new(kind: &str) -> Small {
        let w = World::at("host/store");
        let host = w.mkdir("host");
        // The least that each takes.
        let mib = match kind {
            "xfs" => 300,
            "btrfs" => 128,
            _ => 64,
        };
        let disk = w.sparse("host.img", mib << 20);
        tool(&format!("mkfs.{kind}"), ["-q", s(&disk)]);
        tool("mount", ["-o", "loop", s(&disk), s(&host)]);
        let image = w.sparse("base.img", 600 << 20);
        // Nothing that the kernel would write later, in the background.
        let now = "lazy_itable_init=0,lazy_journal_init=0";
        tool("mkfs.ext4", ["-qF", "-E", now, s(&image)]);
        w.ok(["import", s(&image), "base"]);
        w.ok(["create", "d", "--from", "base"]);
        let ballast = host.join("ballast");
        fs::write(&ballast, noise(1, 12 << 20)).unwrap();
        tool("sync", ["-f", s(&ballast)]);
        // Something to remove.
        for disk in ["old", "lost"] {
            w.ok(["create", disk, "--from", "base"]);
            let device = w.ok(["attach", disk]);
            tool(
                "dd",
                [
                    "if=/dev/urandom",
                    &format!("of={device}"),
                    "bs=1M",
                    "count=2",
                    "oflag=direct",
                    "conv=fsync",
                    "status=none",
                ],
            );
            w.ok(["detach", disk]);
        }
        Small { w, host }
    }
    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.host).unwrap();
        stat.f_bfree * stat.f_frsize
    }
    /// Takes what is left of the host's space.
    fn fill_to_the_brim(&self) {
        let filler = self.host.join("filler");
        for bs in ["1M", "4k"] {
            // The filler grows where it ends, whichever time this is.
            let out = run(
                "dd",
                &[
                    "if=/dev/urandom",
                    &format!("of={}", s(&filler)),
                    "oflag=append",
                    "conv=notrunc,fsync",
                    &format!("bs={bs}"),
                    "status=none",
                ],
            );
            assert!(out.stderr.contains(FULL), "{out:?}");
        }
        // What a file of data no longer fits, many small ones may.
        for n in 0..20_000 {
            if fs::write(self.host.join(format!("small-{n}")), [1; 100]).is_err() {
                break;
            }
        }
    }
    fn empty_again(&self) {
        for entry in fs::read_dir(&self.host).unwrap().flatten() {
            let name = entry.file_name();
            let name = name.to_str().unwrap();
            if name == "filler" || name == "ballast" || name.starts_with("small-") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        tool("sync", ["-f", s(&self.host)]);
    }
    fn no_leftovers(&self) {
        for dir in ["names", "layers", "bases"] {
            for entry in fs::read_dir(self.w.store.join(dir)).unwrap().flatten() {
                let name = entry.file_name();
                assert!(!name.to_string_lossy().starts_with('.'), "left: {name:?}");
            }
        }
    }
    fn end(self) {
        let w = &self.w;
        let checked = w.run(["check"]);
        assert_eq!(checked.code, 0, "{checked:?}");
        assert_eq!(w.attached(), [""; 0]);
        w.ok(["daemon", "stop"]);
        tool("umount", [s(&self.host)]);
        w.nothing_left();
    }
}

fn run(program: &str, args: &[&str]) -> Out {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "100", program])
        .args(args)
        .env("LC_ALL", "C");
    finish(command)
}

/// Writes a file or device until it is told that there is no room.
fn until_full(target: &Path) {
    let target = format!("of={}", s(target));
    let out = run(
        "dd",
        &[
            "if=/dev/urandom",
            &target,
            "bs=1M",
            "count=550",
            "oflag=direct",
            "conv=notrunc",
            "status=none",
        ],
    );
    assert_ne!(out.code, 0, "{target} never filled up");
    assert!(out.stderr.contains(FULL), "not told why: {out:?}");
}

fn full_host(kind: &str) {
    if !root() {
        return;
    }
    let small = Small::new(kind);
    let w = &small.w;
    // One raw device, past every cache: each write is told at once. One filesystem.
    let device = w.ok(["attach", "d"]);
    let raw = Path::new(&device);
    let server = w.pid("server_pid");
    let known = w.file("known", &noise(2, 4 << 20));
    let input = format!("if={}", s(&known));
    let output = format!("of={device}");
    let write = |more: &[&str]| {
        let fixed = [
            &output,
            "bs=1M",
            "oflag=direct",
            "conv=fsync,notrunc",
            "status=none",
        ];
        run("dd", &[&fixed[..], more].concat())
    };
    let right = || read_direct(raw, 560 << 20, 4 << 20) == noise(2, 4 << 20);
    let m = w.mkdir("m");
    w.ok(["create", "e", "--from", "base"]);
    w.ok(["attach", "e", "--mount", s(&m)]);
    let kept = m.join("kept");
    fs::write(&kept, noise(3, 3 << 20)).unwrap();
    tool("sync", ["-f", s(&kept)]);
    assert_eq!(write(&[&input, "seek=560"]).code, 0);
    assert_eq!(write(&["if=/dev/urandom", "count=6"]).code, 0);

    // The filesystem fills the host: its writer is told.
    until_full(&m.join("big"));
    // A filesystem that cannot write its journal stops, as on any thin disk: a little room, and it has no reason to.
    fs::remove_file(small.host.join("ballast")).unwrap();
    tool("sync", ["-f", s(&small.host)]);
    let synced = run("sync", &["-f", s(&m)]);
    assert_eq!(synced.code, 0, "{synced:?}\n{}", w.log());
    // The device as well; then its own discards make room for it.
    until_full(raw);
    assert!(right(), "what was acknowledged");
    let discarded = run("blkdiscard", &["-f", "-l", "64M", &device]);
    assert_eq!(discarded.code, 0, "{discarded:?}\n{}", w.log());
    tool("sync", ["-d", &device]);
    let done = write(&["if=/dev/urandom", "count=1"]);
    assert_eq!(done.code, 0, "its discards made room: {done:?}");

    small.fill_to_the_brim();
    let done = write(&["if=/dev/urandom", "count=200"]);
    assert!(done.code != 0 && done.stderr.contains(FULL), "{done:?}");
    // A flush has nothing to complain of: what was refused is not part of it.
    tool("sync", ["-d", &device]);
    // Reading goes on, below every cache.
    assert!(right(), "what was acknowledged");
    assert!(read_direct(&kept, 0, 3 << 20) == noise(3, 3 << 20));
    for look in ["ls", "tree", "du", "check"] {
        w.ok([look]);
    }
    // A command that needs room does it or says so, and leaves nothing; Btrfs keeps room for names longer than for data.
    let refused = |args: &[&str]| {
        let before = w.names();
        let done = w.run(args);
        if done.code == 0 {
            return false;
        }
        let told = w.fails_here(14, args);
        assert!(told.contains("free space on the host filesystem"), "{told}");
        assert_eq!(w.names(), before, "{args:?}");
        small.no_leftovers();
        true
    };
    let import = ["import", s(&known), "big"];
    assert!(refused(&import), "4 MiB");
    let many = ["create", "f", "--from", "base", "--count", "300"];
    // Btrfs keeps room for small files longer than for data.
    assert!(refused(&many) || kind == "btrfs", "300 forks");
    // A snapshot takes next to nothing, and a disk that gives up what it kept for later makes room for some.
    let mut snapshots = 0;
    while snapshots < 20 && !refused(&["snapshot", &format!("e@{snapshots}")]) {
        snapshots += 1;
        small.fill_to_the_brim();
    }
    assert!(snapshots < 20 || kind == "btrfs", "never refused");
    assert!(
        refused(&["create", "g", "--from", "e"]) || kind == "btrfs",
        "a fork of a running disk"
    );
    assert!(read_direct(&kept, 0, 3 << 20) == noise(3, 3 << 20));
    assert!(right());
    // What gives room needs none: removing a name, and collecting a layer that lost its name.
    let before = small.free();
    fs::remove_file(w.store.join("names/lost")).unwrap();
    w.ok(["rm", "old"]);
    w.ok(["gc"]);
    let names = w.names();
    assert!(!names.contains(&"old".to_string()) && names.contains(&"e".to_string()));
    tool("sync", ["-f", s(&small.host)]);
    eventually("there is room", || small.free() > before + (3 << 20));
    let done = write(&["if=/dev/urandom", "count=2"]);
    assert_eq!(done.code, 0, "there is room: {done:?}");

    // The same daemon, the same mount.
    small.empty_again();
    tool(
        "dd",
        [
            "if=/dev/urandom",
            &format!("of={}", s(&m.join("after"))),
            "bs=1M",
            "count=5",
            "conv=fsync",
            "status=none",
        ],
    );
    fs::remove_file(m.join("big")).unwrap();
    tool("sync", ["-f", s(&m)]);
    tool("fstrim", [s(&m)]);
    w.ok(["snapshot", "e@s"]);
    fs::write(m.join("last"), noise(4, 1 << 20)).unwrap();
    assert_eq!(w.pid("server_pid"), server, "the daemon of the beginning");
    w.ok(["detach", s(&m)]);
    assert!(right());
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "e"]);
    tool("e2fsck", ["-fn", &device]);
    tool("mount", [&device, s(&m)]);
    assert!(fs::read(&kept).unwrap() == noise(3, 3 << 20));
    assert!(fs::read(m.join("last")).unwrap() == noise(4, 1 << 20));
    assert_eq!(fs::metadata(m.join("after")).unwrap().len(), 5 << 20);
    tool("umount", [s(&m)]);
    w.ok(["detach", "e"]);
    small.end();
}

#[test]
fn a_full_ext4() {
    full_host("ext4");
}

#[test]
fn a_full_xfs() {
    full_host("xfs");
}

#[test]
fn a_full_btrfs() {
    full_host("btrfs");
}

/// A quota is a limit as a full disk is, told by another number: commands say that there is no room, and nothing acknowledged is lost. Btrfs enforces its own for root as well.
#[test]
fn a_quota_is_no_space() {
    if !root() {
        return;
    }
    let w = World::at("host/sub/store");
    let host = w.mkdir("host");
    let disk = w.sparse("host.img", 256 << 20);
    tool("mkfs.btrfs", ["-q", s(&disk)]);
    tool("mount", ["-o", "loop", s(&disk), s(&host)]);
    let sub = host.join("sub");
    tool("btrfs", ["-q", "subvolume", "create", s(&sub)]);
    tool("btrfs", ["quota", "enable", s(&host)]);
    w.import_ext4("base", 200);
    w.ok(["create", "d", "--from", "base"]);
    tool("btrfs", ["qgroup", "limit", "30M", s(&sub)]);
    let device = w.ok(["attach", "d"]);
    let known = w.file("known", &noise(2, 4 << 20));
    tool(
        "dd",
        [
            &format!("if={}", s(&known)),
            &format!("of={device}"),
            "bs=1M",
            "seek=100",
            "oflag=direct",
            "conv=fsync,notrunc",
            "status=none",
        ],
    );
    let (input, output) = ("if=/dev/urandom", format!("of={device}"));
    let fixed = ["bs=1M", "oflag=direct", "status=none"];
    let out = run(
        "dd",
        &[&fixed[..], &[input, &output, "count=90", "conv=notrunc"]].concat(),
    );
    assert_ne!(out.code, 0, "it was never refused");
    assert!(read_direct(Path::new(&device), 100 << 20, 4 << 20) == noise(2, 4 << 20));
    let big = w.file("big", &noise(5, 40 << 20));
    let told = w.fails_here(14, &["import", s(&big), "big"]);
    assert!(told.contains("Disk quota exceeded"), "{told}");
    assert_eq!(w.names(), ["base", "d"]);
    // More of it, and the disk goes on. Btrfs counts what a commit changes in its trees, too, and then even reserved space is of no use: so the
    // disk may have stopped, and comes back as of its last flush.
    tool("btrfs", ["qgroup", "limit", "200M", s(&sub)]);
    w.ok(["detach", "--force", "d"]);
    let device = w.ok(["attach", "d"]);
    let output = format!("of={device}");
    let out = run(
        "dd",
        &[
            &fixed[..],
            &[input, &output, "count=20", "conv=notrunc,fsync"],
        ]
        .concat(),
    );
    assert_eq!(out.code, 0, "{out:?}");
    assert!(read_direct(Path::new(&device), 100 << 20, 4 << 20) == noise(2, 4 << 20));
    w.ok(["detach", "d"]);
    assert_eq!(w.run(["check"]).code, 0);
    w.ok(["daemon", "stop"]);
    tool("umount", [s(&host)]);
    w.nothing_left();
}
