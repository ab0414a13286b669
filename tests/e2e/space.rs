//! Space that is given back goes to the host, and reads as zeros for ever.

use crate::rig::*;
use std::{fs, path::Path};

/// A base without a block of zeros, and a disk of it.
fn full_base() -> World {
    let w = World::new();
    let image = w.file("full.img", &noise(7, 32 << 20));
    w.ok(["import", s(&image), "full"]);
    w.ok(["create", "d", "--from", "full"]);
    w
}

fn zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}

#[test]
fn a_discarded_device_is_empty_and_stays_so() {
    if !root() {
        return;
    }
    let w = full_base();
    let device = w.ok(["attach", "d"]);
    let path = Path::new(&device);
    let layer = w.layer_of("d");
    let content = w.file("content", &noise(8, 32 << 20));
    let fill = || {
        tool(
            "dd",
            [
                &format!("if={}", content.display()),
                &format!("of={device}"),
                "bs=1M",
                "oflag=direct",
                "conv=fsync",
                "status=none",
            ],
        )
    };
    for how in [&[][..], &["-z"]] {
        fill();
        eventually("all is written", || du(&layer) >= 32 << 20);
        tool("blkdiscard", how.iter().copied().chain(["-f", &device]));
        tool("sync", ["-d", &device]);
        eventually("the space is given back", || du(&layer) < 3 << 20);
        assert!(zeros(&read_direct(path, 0, 32 << 20)), "{how:?}");
    }
    w.ok(["detach", "d"]);
    assert!(du(&layer) <= 128 << 10, "{}", du(&layer));
    let device = w.ok(["attach", "d"]);
    assert!(
        zeros(&read_direct(Path::new(&device), 0, 32 << 20)),
        "the base shows"
    );
    w.ok(["detach", "d"]);
    // What stands on it sees zeros, too; the base is as ever.
    w.ok(["snapshot", "d@zero"]);
    w.ok(["create", "e", "--from", "d@zero"]);
    let out = w.path("e.out");
    w.ok(["export", "e", s(&out)]);
    assert!(zeros(&fs::read(&out).unwrap()));
    assert!(du(&out) < 64 << 10, "sparse");
    w.finish();
}

#[test]
fn odd_ranges_are_discarded_to_the_byte() {
    if !root() {
        return;
    }
    let w = full_base();
    let mut expected = noise(7, 32 << 20);
    let device = w.ok(["attach", "d"]);
    let path = Path::new(&device);
    // Some of it written before, some the base's.
    let piece = w.file("piece", &noise(9, 5 << 20));
    tool(
        "dd",
        [
            &format!("if={}", piece.display()),
            &format!("of={device}"),
            "bs=1M",
            "seek=3",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    expected[3 << 20..8 << 20].copy_from_slice(&noise(9, 5 << 20));
    for (at, len) in [
        (512, 512),
        (8192 - 512, 1024),
        (1 << 20, 4096),
        ((3 << 20) + 1536, (1 << 20) + 512),
        ((7 << 20) - 3584, 2 << 20),
        ((32 << 20) - 512, 512),
        ((20 << 20) + 512, (2 << 20) + 1024),
    ] {
        for how in [&[][..], &["-z"]] {
            let at = if how.is_empty() {
                at
            } else {
                at / 2 / 512 * 512
            };
            tool(
                "blkdiscard",
                how.iter().copied().chain([
                    "-f",
                    "-o",
                    &at.to_string(),
                    "-l",
                    &len.to_string(),
                    &device,
                ]),
            );
            let all = read_direct(path, 0, 32 << 20);
            // A device may leave the edges of a discard, which are no whole blocks, as they are; but
            // what it says is gone is gone as a whole: zeros or untouched, never the base under a written block.
            let (a, b) = (at as usize, (at + len) as usize);
            for block in a / 512..b / 512 {
                let range = block * 512..block * 512 + 512;
                let now = &all[range.clone()];
                let inner = range.start.next_multiple_of(4096) + 4096 <= b
                    && range.start / 4096 * 4096 >= a;
                if zeros(now) {
                    expected[range].fill(0);
                } else {
                    assert!(
                        how.is_empty() && !inner,
                        "{at}+{len} {how:?}: sector {block} is not zero"
                    );
                    assert!(now == &expected[range], "sector {block} is neither");
                }
            }
            assert!(all == expected, "{at}+{len} {how:?} touched more");
        }
    }
    w.ok(["detach", "d"]);
    let out = w.path("d.out");
    w.ok(["export", "d", s(&out)]);
    assert!(fs::read(&out).unwrap() == expected, "after detach");
    w.finish();
}

#[test]
fn fstrim_gives_deleted_files_back() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let layer = w.layer_of("d");
    let before = du(&layer);
    fs::write(m.join("big"), noise(4, 64 << 20)).unwrap();
    fs::write(m.join("keep"), noise(5, 1 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    assert!(du(&layer) >= before + (64 << 20));
    fs::remove_file(m.join("big")).unwrap();
    tool("sync", ["-f", s(&m)]);
    tool("fstrim", [s(&m)]);
    tool("sync", ["-f", s(&m)]);
    eventually("the space is given back", || {
        du(&layer) < before + (8 << 20)
    });
    w.ok(["detach", s(&m)]);
    assert!(du(&layer) < before + (4 << 20));
    w.ok(["attach", "d", "--mount", s(&m)]);
    assert!(fs::read(m.join("keep")).unwrap() == noise(5, 1 << 20));
    w.ok(["detach", "d"]);
    w.finish();
}

/// Nobody flushes, nobody looks, and still what was discarded is durable, and its space free, soon after the disk is quiet.
#[test]
fn discards_of_a_quiet_disk_give_space_back() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let device = device.trim_end();
    let layer = w.layer_of("d");
    let data = w.file("data", &noise(7, 24 << 20));
    shell(&format!(
        "dd if={} of={device} bs=1M oflag=direct conv=fsync status=none",
        s(&data)
    ));
    let full = du(&layer);
    assert!(full >= 24 << 20);
    // Held open: to close a device would flush what is dirty of it.
    let open = fs::File::options().write(true).open(device).unwrap();
    let flushes = |w: &World| w.json(["stats", "d"])["disks"][0]["flushes"].as_u64();
    let before = flushes(&w).unwrap();
    tool("blkdiscard", ["-o", "0", "-l", "16777216", device]);
    eventually("the space is given back", || du(&layer) < full - (15 << 20));
    assert_eq!(flushes(&w), Some(before), "and nobody flushed");
    drop(open);
    w.ok(["detach", "d"]);
    w.finish();
}
