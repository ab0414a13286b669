//! Disks change while they are in use: their size, their contents, their name, how much they may have; and several are kept as they are at one instant.

use crate::{
    nbd_client::{Nbd, TRIM, WRITE_ZEROES},
    rig::*,
};
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::fd::AsRawFd,
    os::unix::fs::{FileExt, OpenOptionsExt},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::Instant,
};

fn sectors(device: &str) -> u64 {
    let name = device.trim_start_matches("/dev/");
    let text = fs::read_to_string(format!("/sys/block/{name}/size")).unwrap();
    text.trim().parse().unwrap()
}

/// What `dd` to or from a device does.
fn dd(args: &[&str]) -> Out {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "60", "dd", "bs=1M", "status=none"])
        .args(args);
    finish(command)
}

/// One block, aligned as direct I/O wants it.
struct Block(Vec<u8>);

impl Block {
    fn new() -> Block {
        Block(vec![0; 8192])
    }
    fn bytes(&mut self) -> &mut [u8] {
        let at = self.0.as_ptr().align_offset(4096);
        &mut self.0[at..at + 4096]
    }
}

fn direct(device: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .unwrap()
}

fn grows(mkfs: &[&str], grow: &dyn Fn(&str, &Path), fsck: &[&str]) {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", 320 << 20);
    tool(mkfs[0], mkfs[1..].iter().copied().chain([s(&image)]));
    w.ok(["import", s(&image)]);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let device = w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("kept"), noise(1, 3 << 20)).unwrap();
    let made = w.json(["resize", "d", "+300M"]);
    assert_eq!(
        (made["size"].as_u64(), made["former_size"].as_u64()),
        (Some(620 << 20), Some(320 << 20))
    );
    assert_eq!(sectors(&device), (620 << 20) / 512);
    assert_eq!(
        w.json(["ls", "attached"])["attached"][0]["size"],
        620u64 << 20
    );
    // Again: it is as large as it is to be.
    w.ok(["resize", "d", "620M"]);
    grow(&device, &m);
    tool("mountpoint", ["-q", s(&m)]);
    let more = || noise(2, 1 << 20).repeat(330);
    fs::write(m.join("more"), more()).unwrap();
    tool("sync", ["-f", s(&m)]);
    // The next server knows as well.
    kill_and_wait(w.pid("server_pid"));
    assert!(fs::read(m.join("kept")).unwrap() == noise(1, 3 << 20));
    w.ok(["resize", "d", "700M"]);
    assert_eq!(sectors(&device), (700 << 20) / 512);
    w.fails_here(11, &["resize", "d", "600M", "--force"]);
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "d"]);
    tool(fsck[0], fsck[1..].iter().copied().chain([device.as_str()]));
    tool("mount", [&device, s(&m)]);
    assert!(fs::read(m.join("more")).unwrap() == more());
    tool("umount", [s(&m)]);
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn a_mounted_ext4_grows() {
    let grow = |device: &str, dir: &Path| {
        let mut command = Command::new("resize2fs");
        command.arg(device);
        let out = finish(command);
        if out.code != 0 {
            // Mounted ones grow for who has CAP_SYS_RESOURCE.
            assert!(out.stderr.contains("Permission denied"), "{out:?}");
            tool("umount", [s(dir)]);
            tool("e2fsck", ["-fp", device]);
            tool("resize2fs", [device]);
            tool("mount", [device, s(dir)]);
        }
    };
    grows(&["mkfs.ext4", "-qF"], &grow, &["e2fsck", "-fn"]);
}

#[test]
fn a_mounted_xfs_grows() {
    let grow = |_: &str, dir: &Path| drop(tool("xfs_growfs", [s(dir)]));
    grows(&["mkfs.xfs", "-qf"], &grow, &["xfs_repair", "-n"]);
}

/// A conversation in which a disk was made larger; nobody has told its device yet.
fn larger(w: &World, size: u64) -> UnixStream {
    let mut stream = UnixStream::connect(w.store.join("run/control.sock")).unwrap();
    let request = format!("{{\"op\":\"resize\",\"disk\":\"d\",\"size\":{size}}}\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut said = String::new();
    BufReader::new(&stream).read_line(&mut said).unwrap();
    assert!(said.contains(&size.to_string()), "{said}");
    stream
}

/// Whoever makes a disk larger may die before its device has the size: then whoever comes next sees to that.
#[test]
fn a_device_gets_the_size_of_its_disk_whoever_died() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let mut size = sectors(&device) * 512;
    // Whoever looks after the conversation before may still be at it, and tell the device.
    let mut step = || {
        let larger = (0..10).find_map(|_| {
            size += 1 << 20;
            let conversation = larger(&w, size);
            (sectors(&device) * 512 < size).then_some((conversation, size))
        });
        larger.expect("a device that nobody has told")
    };
    // The next command about it.
    let (one, size) = step();
    w.ok(["resize", "d", &size.to_string()]);
    assert_eq!(sectors(&device) * 512, size);
    drop(one);
    // The daemon, when the command died.
    let (two, size) = step();
    drop(two);
    eventually("the device grows", || sectors(&device) * 512 == size);
    // The next server, when that died, too.
    let (three, size) = step();
    kill_and_wait(w.pid("server_pid"));
    eventually("the device grows", || sectors(&device) * 512 == size);
    drop(three);
    let mut last = Block::new();
    let at = size - 4096;
    last.bytes().fill(5);
    direct(&device).write_all_at(last.bytes(), at).unwrap();
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn a_disk_shrinks_at_rest_and_only_if_it_is_told_to() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("full.img", &noise(7, 8 << 20));
    w.ok(["import", s(&image), "full"]);
    w.ok(["create", "d", "--from", "full"]);
    w.fails(2, &["resize", "d", "4M"]);
    let told = w.fails(2, &["resize", "d", "4M", "--force"]);
    assert!(told.contains("--yes"), "{told}");
    let would = w.json(["-n", "resize", "d", "4M", "--force"]);
    assert_eq!(would["lost"], 4u64 << 20);
    w.ok(["resize", "d", "4M", "--force", "--yes"]);
    // What is cut off never comes back, and needs no second yes.
    w.ok(["resize", "d", "8M"]);
    w.ok(["resize", "d", "7M", "--force"]);
    w.ok(["resize", "d", "9M"]);
    let out = w.path("out");
    w.ok(["export", "d", s(&out)]);
    let mut expected = noise(7, 4 << 20);
    expected.resize(9 << 20, 0);
    assert!(fs::read(&out).unwrap() == expected);
    w.fails(2, &["resize", "d", "17T"]);
    w.fails(2, &["resize", "d", "0"]);
    w.fails(2, &["resize", "d", "--on-full", "pause"]);
    w.fails(2, &["resize", "full", "9M"]);
    w.fails(2, &["resize", "d"]);
    w.fails(12, &["resize", "nothing", "9M"]);
    w.finish();
}

#[test]
fn a_disk_is_rolled_back() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let device = w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("a"), "one").unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["snapshot", "d@one", "--freeze"]);
    fs::write(m.join("a"), "two").unwrap();
    fs::write(m.join("big"), noise(3, 20 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["snapshot", "d@two"]);
    w.fails(12, &["rollback", "d@three"]);
    w.fails(2, &["rollback", "d"]);
    let told = w.fails_here(11, &["rollback", "d@one"]);
    assert!(told.contains("mounted on"), "{told}");
    tool("umount", [s(&m)]);
    // Somebody has it open.
    let open = File::open(&device).unwrap();
    let told = w.fails_here(11, &["rollback", "d@one"]);
    assert!(told.contains("has it open"), "{told}");
    drop(open);
    // What the device's cache holds is gone as well, clean and dirty.
    assert_eq!(
        dd(&[
            "if=/dev/urandom",
            &format!("of={device}"),
            "seek=100",
            "count=4",
            "conv=notrunc"
        ])
        .code,
        0
    );
    w.ok(["resize", "d", "300M"]);
    assert_eq!(w.json(["-n", "rollback", "d@one"])["snapshot"], "d@one");
    let rolled = w.json(["rollback", "d@one"]);
    assert_eq!(
        (rolled["name"].as_str(), rolled["size"].as_u64()),
        (Some("d"), Some(256 << 20))
    );
    assert_eq!(sectors(&device), (256 << 20) / 512);
    tool("e2fsck", ["-fn", &device]);
    tool("mount", [&device, s(&m)]);
    assert_eq!(fs::read_to_string(m.join("a")).unwrap(), "one");
    assert!(!m.join("big").exists());
    fs::write(m.join("a"), "three").unwrap();
    // A successor goes on with that.
    tool("sync", ["-f", s(&m)]);
    kill_and_wait(w.pid("server_pid"));
    assert_eq!(fs::read_to_string(m.join("a")).unwrap(), "three");
    w.ok(["detach", "d"]);
    w.ok(["attach", "d", "--via", "file"]);
    let open = File::open(w.store.join("run/disks/d")).unwrap();
    w.fails_here(11, &["rollback", "d@two"]);
    drop(open);
    eventually("the file is closed", || {
        w.run(["rollback", "d@two"]).code == 0
    });
    w.ok(["detach", "d"]);
    w.ok(["attach", "d", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("a")).unwrap(), "two");
    w.ok(["detach", "d"]);
    w.ok(["rollback", "d@one"]);
    assert_eq!(w.names(), ["base", "d", "d@one", "d@two"]);
    let layers = fs::read_dir(w.store.join("layers")).unwrap().count();
    assert_eq!(layers, 3, "what was left is gone");
    w.finish();
}

#[test]
fn a_quota_is_a_full_disk_to_its_filesystem() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--quota", "40M"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("kept"), noise(1, 10 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    let big = m.join("big");
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={}", s(&big)),
        "count=60",
        "oflag=direct",
    ]);
    assert!(out.code != 0, "{out:?}");
    let info = w.json(["info", "d"]);
    let used = info["quota_used"].as_u64().unwrap();
    assert!(used <= 40 << 20 && used > 38 << 20, "{used}");
    assert_eq!(
        (info["quota"].as_u64(), info["on_full"].as_str()),
        (Some(40 << 20), Some("error"))
    );
    let listed = w.ok(["ls", "disks", "-H", "-p", "-o", "name,quota,used"]);
    assert!(
        listed.starts_with(&format!("d\t{}\t", 40 << 20)),
        "{listed}"
    );
    assert!(fs::read(m.join("kept")).unwrap() == noise(1, 10 << 20));
    let raised = w.json(["resize", "d", "--quota", "+160M"]);
    assert_eq!(raised["quota"], 200u64 << 20);
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={}", s(&big)),
        "count=60",
        "oflag=direct",
    ]);
    assert_eq!(out.code, 0, "{out:?}");
    // Of the next server as well.
    w.ok(["resize", "d", "--quota", "80M"]);
    kill_and_wait(w.pid("server_pid"));
    let out = dd(&[
        "if=/dev/urandom",
        &format!("of={}", s(&m.join("more"))),
        "count=60",
        "oflag=direct",
    ]);
    assert!(out.code != 0, "{out:?}");
    w.ok(["resize", "d", "--quota", "none"]);
    w.fails_here(2, &["resize", "d", "--quota", "+4M"]);
    w.ok(["detach", "d"]);
    assert!(w.json(["info", "d"])["quota"].is_null());
    w.finish();
}

#[test]
fn writers_wait_for_room_and_keep_nobody_waiting() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok([
        "create",
        "d",
        "--from",
        "base",
        "--quota",
        "24M",
        "--on-full",
        "pause",
    ]);
    w.ok(["create", "e", "--from", "base"]);
    let (m, n) = (w.mkdir("m"), w.mkdir("n"));
    w.ok(["attach", "d", "--mount", s(&m)]);
    w.ok(["attach", "e", "--mount", s(&n)]);
    let mut writer = Command::new("dd");
    let known = w.file("known", &noise(5, 100 << 20));
    writer.args([
        &format!("if={}", s(&known)),
        &format!("of={}", s(&m.join("big"))),
        "bs=1M",
        "conv=fsync",
        "status=none",
    ]);
    let mut writer = writer.stdin(Stdio::null()).spawn().unwrap();
    let layer = w.layer_of("d");
    eventually("the quota is used", || {
        w.json(["info", "d"])["quota_used"].as_u64() > Some(20 << 20)
    });
    eventually("writes wait", || w.log().contains("writes wait for room"));
    // Others are served, and commands answer.
    let began = Instant::now();
    for i in 0..8 {
        let file = n.join(i.to_string());
        fs::write(&file, noise(i, 4 << 20)).unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
        assert!(read_direct(&file, 0, 4 << 20) == noise(i, 4 << 20));
    }
    eprintln!("32 MiB beside a disk that waits: {:?}", began.elapsed());
    w.ok(["ls", "attached"]);
    let told = w.fails_here(11, &["detach", "d"]);
    assert!(told.contains("wait for room"), "{told}");
    // A snapshot needs nobody to go on; then the server dies, and another program takes over.
    w.ok(["snapshot", "d@s"]);
    kill_and_wait(w.pid("server_pid"));
    w.ok(["daemon", "takeover"]);
    assert!(writer.try_wait().unwrap().is_none(), "it waits still");
    w.ok(["resize", "d", "--quota", "60M"]);
    eventually("it goes on, and waits again", || {
        du(&layer) >= 10 << 20 && w.json(["info", "d"])["quota_used"].as_u64() > Some(50 << 20)
    });
    w.ok(["resize", "d", "--quota", "none"]);
    assert!(writer.wait().unwrap().success());
    assert!(fs::read(m.join("big")).unwrap() == noise(5, 100 << 20));
    w.ok(["detach", "d"]);
    // By force: whoever waits is told.
    w.ok(["resize", "d", "--quota", "110M", "--on-full", "pause"]);
    let device = w.ok(["attach", "d"]);
    let output = format!("of={device}");
    let mut writer = Command::new("dd");
    writer.args([
        "if=/dev/urandom",
        &output,
        "bs=1M",
        "count=200",
        "oflag=direct",
        "conv=notrunc",
        "status=none",
    ]);
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    let waits = || w.run(["detach", "d"]).stderr.contains("wait for room");
    eventually("it waits", waits);
    let _ = w.run(["detach", "--force", "d"]);
    assert!(!writer.wait().unwrap().success(), "it is told");
    if w.attached().contains(&"d".to_string()) {
        w.ok(["detach", "--force", "d"]);
    }
    // The daemon ends: so it is told, too.
    let device = w.ok(["attach", "d"]);
    let output = format!("of={device}");
    let mut writer = Command::new("dd");
    writer.args([
        "if=/dev/urandom",
        &output,
        "bs=1M",
        "count=200",
        "oflag=direct",
        "conv=notrunc",
        "status=none",
    ]);
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    eventually("it waits", waits);
    let keeper = w.pid("keeper_pid");
    assert!(kill(keeper, "TERM"));
    assert!(!writer.wait().unwrap().success(), "it is told");
    eventually("the daemon ends", || !alive(keeper));
    w.nothing_left();
}

#[test]
fn parts_of_blocks_have_the_room_that_the_whole_ones_give() {
    if !root() {
        return;
    }
    let w = World::new();
    let mut model = noise(9, 1 << 20);
    model[500_000..600_000].fill(0);
    let raw = w.file("raw", &model);
    w.ok(["import", s(&raw), "base"]);
    // Four blocks of its own.
    let quota = ["--quota", "16K", "--on-full", "pause"];
    w.ok(["create", "d", "--from", "base"].iter().chain(&quota));
    let path = w.ok(["attach", "d", "--via", "file"]);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let used = || w.json(["info", "d"])["quota_used"].as_u64().unwrap() / 4096;
    let write = |model: &mut [u8], block: usize, blocks: usize| {
        let data = noise(block as u64, blocks * 4096);
        file.write_all_at(&data, block as u64 * 4096).unwrap();
        file.sync_all().unwrap();
        model[block * 4096..][..data.len()].copy_from_slice(&data);
    };
    let punch = |at: usize, len: usize| {
        let mut punches = Command::new("fallocate");
        let (at, len) = (at.to_string(), len.to_string());
        punches.args(["--punch-hole", "-o", &at, "-l", &len, &path]);
        let mut punches = punches.stderr(Stdio::null()).spawn().unwrap();
        let mut ended = None;
        eventually("it ends", || {
            ended = punches.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().success()
    };
    let whole = |at: usize, len: usize| at.next_multiple_of(4096)..(at + len) / 4096 * 4096;

    // The part before them belongs to the image, and needs room that they give.
    write(&mut model, 10, 4);
    assert_eq!(used(), 4);
    assert!(punch(40_960 - 100, 16_384 + 100));
    model[40_960 - 100..40_960 + 16_384].fill(0);
    assert_eq!(used(), 1);
    // None gives any: the whole ones are zeros, the parts stay, and it is told at once. All else goes on.
    write(&mut model, 50, 3);
    let (at, len) = (100_000, 30_001);
    assert!(!punch(at, len), "there was room");
    model[whole(at, len)].fill(0);
    file.sync_all().unwrap();
    // What is zeros already needs no room.
    assert!(punch(500_100, 300) && punch(550_000, 40_000));
    assert_eq!(used(), 4);
    let mut now = vec![0; model.len()];
    file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == model);
    drop(file);
    w.ok(["detach", "d"]);

    // Over NBD zeros wait, and keep nothing else waiting; a discard, which is a hint, leaves the parts as they are.
    w.ok(["attach", "d", "--via", "nbd"]);
    let mut link = Nbd::connect(&w.store.join("run/nbd.sock"), "d", true).unwrap();
    let (at, len) = (150_000, 30_001);
    let waits = link.send(WRITE_ZEROES, 0, at as u64, len, b"").unwrap();
    eventually("it waits", || w.log().contains("writes wait for room"));
    model[whole(at, len)].fill(0);
    link.flush().unwrap();
    let hint = (300_000, 10_001);
    let answer = link.call(TRIM, 0, hint.0 as u64, hint.1, b"").unwrap();
    answer.unwrap();
    model[whole(hint.0, hint.1)].fill(0);
    assert!(link.read(0, model.len()).unwrap() == model);
    w.ok(["resize", "d", "--quota", "64K"]);
    let (answered, outcome) = link.receive().unwrap();
    outcome.unwrap();
    assert_eq!(answered, waits);
    model[at..at + len].fill(0);
    assert!(link.read(0, model.len()).unwrap() == model);
    drop(link);
    w.ok(["detach", "d"]);
    assert_eq!(used(), 6);
    w.finish();
}

/// What the filesystem still has to write is more than the disk may have: a freeze would wait for that, and nothing could end it.
#[test]
fn a_freeze_does_not_wait_for_room() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let quota = ["--quota", "24M", "--on-full", "pause"];
    w.ok(["create", "d", "--from", "base"].iter().chain(&quota));
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("big"), noise(5, 60 << 20)).unwrap();
    for refused in [
        &["snapshot", "d@s", "--freeze"][..],
        &["commit", "d", "i", "--freeze"][..],
    ] {
        let out = w.run(refused);
        assert_eq!(out.code, 11, "{out:?}");
        assert!(out.stderr.contains("wait for room"), "{out:?}");
    }
    w.ok(["resize", "d", "--quota", "none"]);
    eventually("what waits is written", || {
        w.run(["snapshot", "d@s", "--freeze"]).code == 0
    });
    assert!(fs::read(m.join("big")).unwrap() == noise(5, 60 << 20));
    w.ok(["detach", "d"]);
    w.finish();
}

/// One writer, two disks, in turns: each acknowledged before the other is written.
#[test]
fn snapshots_of_several_are_of_one_instant() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", 16 << 20);
    w.ok(["import", s(&image)]);
    for disk in ["a", "b", "c"] {
        w.ok(["create", disk, "--from", "base"]);
    }
    let devices = [w.ok(["attach", "a"]), w.ok(["attach", "b"])];
    let (end, written, longest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let number = |disk: &str| {
        let out = w.path("out");
        w.ok(["export", "-f", disk, s(&out)]);
        let mut bytes = [0; 8];
        File::open(&out)
            .unwrap()
            .read_exact_at(&mut bytes, 0)
            .unwrap();
        u64::from_le_bytes(bytes)
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let disks = [direct(&devices[0]), direct(&devices[1])];
            let mut block = Block::new();
            for n in 1u64.. {
                if end.load(SeqCst) {
                    return;
                }
                block.bytes()[..8].copy_from_slice(&n.to_le_bytes());
                for disk in &disks {
                    let began = Instant::now();
                    disk.write_all_at(block.bytes(), 0).unwrap();
                    longest.fetch_max(began.elapsed().as_micros() as u64, SeqCst);
                }
                written.store(n, SeqCst);
            }
        });
        for i in 0..12 {
            let before = written.load(SeqCst);
            eventually("it writes", || written.load(SeqCst) > before);
            let names = [format!("a@{i}"), format!("b@{i}"), format!("c@{i}")];
            let [a, b, c] = [&names[0], &names[1], &names[2]];
            let made = match i % 2 {
                0 => w.json(["snapshot", a, b, c, "-m", "all"]),
                _ => w.json(["snapshot", b, c, a]),
            };
            assert_eq!(made["objects"].as_array().unwrap().len(), 3);
            let (a, b) = (number(a), number(b));
            assert!(a == b || a == b + 1, "{i}: {a} and {b}");
        }
        end.store(true, SeqCst);
    });
    eprintln!("the longest wait of a writer: {longest:?} us");
    w.fails_here(2, &["snapshot", "a@x", "a@y"]);
    w.fails_here(13, &["snapshot", "a@x", "b@1"]);
    w.fails_here(12, &["snapshot", "a@x", "nothing@x"]);
    let dry = w.json(["-n", "snapshot", "a@x", "c@x"]);
    assert_eq!(dry["names"], serde_json::json!(["a@x", "c@x"]));
    for disk in ["a", "b"] {
        w.ok(["detach", disk]);
    }
    // All at rest, and frozen ones.
    assert_eq!(
        w.json(["snapshot", "c@r", "a@r"])["objects"][0]["name"],
        "c@r"
    );
    w.finish();
}

#[test]
fn frozen_filesystems_are_clean_in_snapshots_of_one_instant() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let dirs = ["a", "b"].map(|disk| {
        w.ok(["create", disk, "--from", "base"]);
        let dir = w.mkdir(&format!("m-{disk}"));
        w.ok(["attach", disk, "--mount", s(&dir)]);
        fs::write(dir.join("who"), disk).unwrap();
        dir
    });
    w.ok(["snapshot", "a@s", "b@s", "--freeze"]);
    for (disk, dir) in ["a", "b"].iter().zip(&dirs) {
        // It goes on.
        fs::write(dir.join("after"), "x").unwrap();
        w.ok(["detach", disk]);
        let device = w.ok(["attach", &format!("{disk}@s")]);
        tool("e2fsck", ["-fn", &device]);
        tool("mount", ["-o", "ro,noload", &device, s(dir)]);
        assert_eq!(fs::read_to_string(dir.join("who")).unwrap(), *disk);
        assert!(!dir.join("after").exists());
        tool("umount", [s(dir)]);
        w.ok(["detach", &format!("{disk}@s")]);
    }
    w.finish();
}

#[test]
fn what_is_attached_is_renamed() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let device = w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("a"), "one").unwrap();
    w.ok(["snapshot", "d@s"]);
    let snap = w.ok(["attach", "d@s"]);
    let open = File::create(m.join("open")).unwrap();
    assert_eq!(w.json(["rename", "d", "e"])["name"], "e");
    assert_eq!(w.names(), ["base", "e", "e@s"]);
    assert_eq!(w.attached(), ["e", "e@s"]);
    assert_eq!(
        (w.device_of("e"), w.device_of("e@s")),
        (device.clone(), snap)
    );
    open.write_all_at(&noise(4, 1 << 20), 0).unwrap();
    open.sync_all().unwrap();
    drop(open);
    // The old name is free for a disk, but not for a file.
    w.ok(["create", "d", "--from", "base"]);
    let told = w.fails_here(11, &["attach", "d"]);
    assert!(told.contains("was attached as d"), "{told}");
    w.fails_here(13, &["rename", "e", "d"]);
    w.ok(["snapshot", "e@t"]);
    kill_and_wait(w.pid("server_pid"));
    w.ok(["daemon", "takeover"]);
    assert_eq!(w.attached(), ["e", "e@s"]);
    fs::write(m.join("a"), "two").unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["rename", "e@s", "e@r"]);
    w.ok(["rename", "base", "other"]);
    w.ok(["detach", "e@r"]);
    w.ok(["detach", "e"]);
    assert_eq!(w.loops(), [""; 0]);
    w.ok(["attach", "d"]);
    w.ok(["detach", "d"]);
    w.ok(["attach", "e", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("a")).unwrap(), "two");
    assert!(fs::read(m.join("open")).unwrap() == noise(4, 1 << 20));
    w.ok(["detach", s(&m)]);
    w.finish();
}

/// A base that was written full, and whose files were removed without the device being told.
#[test]
fn what_a_filesystem_does_not_use_is_given_back() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let fill = |m: &Path| {
        fs::write(m.join("big"), noise(6, 60 << 20)).unwrap();
        fs::write(m.join("kept"), noise(7, 2 << 20)).unwrap();
        tool("sync", ["-f", s(m)]);
        fs::remove_file(m.join("big")).unwrap();
        tool("sync", ["-f", s(m)]);
    };
    w.ok(["attach", "d", "--mount", s(&m)]);
    fill(&m);
    w.ok(["detach", "d"]);
    let layer = w.layer_of("d");
    assert!(du(&layer) > 60 << 20);
    let done = w.json(["trim", "d"]);
    assert!(done["freed"].as_u64() > Some(55 << 20), "{done}");
    assert!(du(&layer) < 12 << 20, "{}", du(&layer));
    assert_eq!(w.attached(), [""; 0]);
    assert!(w.mounts().iter().all(|m| m.ends_with("run/disks")));
    // Mounted, and attached only.
    w.ok(["attach", "d", "--mount", s(&m)]);
    assert!(fs::read(m.join("kept")).unwrap() == noise(7, 2 << 20));
    fill(&m);
    assert!(w.json(["trim", "d"])["freed"].as_u64() > Some(55 << 20));
    fill(&m);
    tool("umount", [s(&m)]);
    assert!(w.json(["trim", "d"])["freed"].as_u64() > Some(55 << 20));
    assert_eq!(w.attached(), ["d"]);
    w.ok(["detach", "d"]);
    // No filesystem; nothing that changes.
    let image = w.file("raw.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "raw"]);
    w.ok(["create", "r", "--from", "raw"]);
    let told = w.fails_here(1, &["trim", "r"]);
    assert!(told.contains("no filesystem"), "{told}");
    assert_eq!(w.attached(), [""; 0]);
    w.fails(2, &["trim", "base"]);
    w.fails(12, &["trim", "nothing"]);
    let kept = fs::read_dir(w.store.join("run")).unwrap().flatten();
    let left: Vec<_> = kept
        .filter(|e| e.file_name().to_string_lossy().starts_with("trim"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    w.finish();
}

/// Who reads a disk that is attached read-only does not notice what others do to it, and cannot write meanwhile or afterwards.
#[test]
fn what_is_attached_read_only_is_changed_by_others() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["create", "other", "--from", "base"]);
    w.ok(["resize", "d", "--history", "1h"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("file"), noise(1, 3 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "d", "--ro", "--mount", s(&m)]);
    let first = sectors(&device) * 512;
    let whole = || read_direct(Path::new(&device), 0, first as usize);
    let (tree, was) = (tree_digest(&m), whole());
    let history = w.json(["ls", "--history", "d"])["points"].clone();
    assert!(history.as_array().unwrap().len() > 1, "{history}");
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0;
            while !over.load(SeqCst) {
                assert!(whole() == was, "in round {rounds}");
                rounds += 1;
            }
            rounds
        });
        let changed = || {
            let mut block = Block::new();
            let open = File::options()
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(&device);
            let written = open.and_then(|f| f.write_all_at(block.bytes(), 0));
            assert!(written.is_err(), "it can be written");
        };
        // A fork of what it was, and what is only looked at, leave it as it is.
        w.ok(["create", "past", "--from", "d", "--at", "#1"]);
        assert_eq!(w.json(["ls", "--history", "d"])["points"], history);
        for args in [
            &["snapshot", "d@one"][..],
            &["create", "fork", "--from", "d"],
            &["commit", "d", "image"],
            &["snapshot", "d@two", "other@two"],
            &["snapshot", "d@frozen"],
            &["resize", "d", "+64M"],
            &["resize", "d", "--quota", "1G"],
            &["flatten", "d"],
            &["rename", "d", "renamed"],
            &["snapshot", "renamed@three"],
            &["squash", "renamed"],
        ] {
            w.ok(args);
            changed();
        }
        kill_and_wait(w.pid("server_pid"));
        w.ok(["snapshot", "renamed@four"]);
        changed();
        w.ok(["snapshot", "renamed@five"]);
        over.store(true, SeqCst);
        assert!(reader.join().unwrap() > 0);
    });
    assert_eq!(sectors(&device) * 512, first + (64 << 20));
    assert_eq!(tree_digest(&m), tree);
    // Going back is for what nobody uses.
    let told = w.fails_here(11, &["rollback", "renamed@one"]);
    assert!(told.contains("mounted"), "{told}");
    tool("umount", [s(&m)]);
    w.ok(["rollback", "renamed@one"]);
    assert_eq!(sectors(&device) * 512, first);
    assert!(whole() == was);
    // A successor goes on with that, and can be asked the same.
    kill_and_wait(w.pid("server_pid"));
    assert!(whole() == was);
    w.ok(["snapshot", "renamed@after"]);
    w.ok(["rollback", "renamed@after"]);
    w.ok(["detach", "renamed"]);
    for name in ["fork", "image", "renamed@five", "renamed"] {
        let device = w.ok(["attach", name, "--ro"]);
        let shown = read_direct(Path::new(&device), 0, first as usize);
        assert!(shown == was, "{name}");
        w.ok(["detach", name]);
    }
    // By the file, and while another process reads it, too: what that has locked nobody changes.
    w.ok(["attach", "renamed", "--ro", "--via", "file"]);
    let file = w.store.join("run/disks/renamed");
    let other = File::open(w.layer_of("renamed")).unwrap();
    flock(&other, libc::LOCK_SH);
    thread::scope(|scope| {
        let made = scope.spawn(|| w.ok(["snapshot", "renamed@six"]));
        thread::sleep(std::time::Duration::from_millis(700));
        assert!(!made.is_finished(), "it did not wait");
        flock(&other, libc::LOCK_UN);
    });
    // Against those who write it is locked as before.
    let other = File::open(w.layer_of("renamed")).unwrap();
    // SAFETY: a call on an open descriptor.
    let taken = unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    assert_eq!(taken, -1, "the layer is not locked");
    let mut shown = vec![0; first as usize];
    File::open(&file)
        .unwrap()
        .read_exact_at(&mut shown, 0)
        .unwrap();
    assert!(shown == was);
    assert!(File::options().write(true).open(&file).is_err());
    drop(other);
    w.ok(["detach", "renamed"]);
    w.ok(["check"]);
    w.finish();
}

fn flock(file: &File, how: i32) {
    // SAFETY: a call on an open descriptor.
    assert_eq!(unsafe { libc::flock(file.as_raw_fd(), how) }, 0);
}
