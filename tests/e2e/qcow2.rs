//! Disks as qcow2 images: QEMU's own program reads and checks them.

use crate::rig::*;
use std::os::unix::fs::FileExt;
use std::{fs, path::Path};

/// `qemu-img` finds nothing wrong with an image, and it holds `bytes`, and zeros up to its end.
fn holds(w: &World, image: &Path, bytes: &[u8]) {
    tool("qemu-img", ["check", "-q", "-f", "qcow2", s(image)]);
    let raw = w.path("read.raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", s(image), s(&raw)];
    tool("qemu-img", convert);
    let found = fs::read(&raw).unwrap();
    assert_eq!(found.len(), bytes.len().next_multiple_of(512));
    assert!(found[..bytes.len()] == *bytes, "{}", image.display());
    assert!(found[bytes.len()..].iter().all(|b| *b == 0));
}

/// To a file and to standard output.
fn exported(w: &World, name: &str, bytes: &[u8]) -> (u64, u64) {
    let out = w.path("out.qcow2");
    let told = w.json(["export", "-f", "-O", "qcow2", name, s(&out)]);
    assert_eq!(told["format"], "qcow2");
    holds(w, &out, bytes);
    let piped = w.path("piped.qcow2");
    let mut pipe = w.command(["export", "-O", "qcow2", name, "-"]);
    let file = fs::File::create(&piped).unwrap();
    assert!(pipe.stdout(file).status().unwrap().success());
    holds(w, &piped, bytes);
    (told["written"].as_u64().unwrap(), du(&out))
}

#[test]
fn a_qcow2_image_is_the_content() {
    if !root() {
        return;
    }
    let w = World::new();
    // Data at the beginning, blocks of zeros that are no hole, the end of a table of 512 MiB, and a last block that is not whole.
    let image = w.sparse("image", (513 << 20) + 4096 * 3 + 1000);
    let open = fs::File::options().write(true).open(&image).unwrap();
    open.write_all_at(&noise(1, 300_000), 0).unwrap();
    open.write_all_at(&vec![0; 4 << 20], 64 << 20).unwrap();
    open.write_all_at(&noise(2, 4096), (512 << 20) - 4096)
        .unwrap();
    open.write_all_at(&noise(3, 70_000), 512 << 20).unwrap();
    open.write_all_at(&noise(4, 1000), (513 << 20) + 4096 * 3)
        .unwrap();
    let mut bytes = fs::read(&image).unwrap();
    w.ok(["import", s(&image), "base"]);
    let (written, taken) = exported(&w, "base", &bytes);
    assert_eq!(written, (5 + 1 + 2 + 1) << 16);
    // Header, counts and their table, L1, two L2 tables.
    assert!(taken <= written + (7 << 16), "{taken}");

    // A disk over two layers, with a discard, attached.
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let disk = fs::File::options().write(true).open(&device).unwrap();
    disk.write_all_at(&noise(5, 8192), 100 << 20).unwrap();
    disk.sync_all().unwrap();
    w.ok(["snapshot", "d@s"]);
    disk.write_all_at(&noise(6, 4096), 300 << 20).unwrap();
    disk.sync_all().unwrap();
    tool("blkdiscard", ["-o", "0", "-l", "131072", device.as_str()]);
    drop(disk);
    bytes.resize((513 << 20) + 4096 * 4, 0);
    bytes[100 << 20..][..8192].copy_from_slice(&noise(5, 8192));
    let snapshot = bytes.clone();
    bytes[300 << 20..][..4096].copy_from_slice(&noise(6, 4096));
    bytes[..131_072].fill(0);
    exported(&w, "d", &bytes);
    exported(&w, "d@s", &snapshot);
    w.ok(["detach", "d"]);

    // Nothing at all, and a size that is none of whole clusters.
    let empty = w.sparse("empty.img", 4096);
    w.ok(["import", s(&empty), "empty"]);
    assert_eq!(exported(&w, "empty", &[0; 4096]).0, 0);
    w.ok(["create", "large", "--from", "empty", "--size", "2T"]);
    let device = w.ok(["attach", "large"]);
    let disk = fs::File::options().write(true).open(&device).unwrap();
    disk.write_all_at(&noise(7, 512), (2u64 << 40) - 512)
        .unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    w.ok(["detach", "large"]);
    let out = w.path("large.qcow2");
    w.ok(["export", "-O", "qcow2", "large", s(&out)]);
    tool("qemu-img", ["check", "-q", "-f", "qcow2", s(&out)]);
    let info = tool("qemu-img", ["info", "--output=json", s(&out)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 2u64 << 40);
    let data = [
        "dd",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "bs=512",
        "skip=4294967295",
    ];
    let end = w.path("end");
    tool(
        "qemu-img",
        data.into_iter()
            .map(str::to_string)
            .chain([format!("if={}", s(&out)), format!("of={}", s(&end))]),
    );
    assert!(fs::read(&end).unwrap() == noise(7, 512));

    // What is refused: a difference, a file that is there, and nothing stays of it.
    w.fails(
        2,
        &[
            "export",
            "-O",
            "qcow2",
            "d",
            s(&w.path("x")),
            "--since",
            "d@s",
        ],
    );
    w.fails(13, &["export", "-O", "qcow2", "d", s(&out)]);
    assert!(!w.path("x").exists());
    w.finish();
}
