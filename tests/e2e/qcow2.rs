//! Disks as qcow2 images: QEMU's own program reads and checks them.

use crate::rig::*;
use std::os::unix::fs::FileExt;
use std::{
    fs,
    path::{Path, PathBuf},
};

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

/// An image that QEMU's tool makes of raw bytes.
fn made(w: &World, raw: &Path, name: &str, how: &[&str]) -> PathBuf {
    let image = w.path(name);
    let args = [&["convert", "-f", "raw", "-O", "qcow2"], how].concat();
    tool("qemu-img", [&args[..], &[s(raw), s(&image)]].concat());
    image
}

#[test]
fn qcow2_images_come_in() {
    if !root() {
        return;
    }
    let w = World::new();
    // A length that is none of whole blocks, data that begins and ends within blocks, and compressible.
    let len = (70 << 20) + 512;
    let raw = w.sparse("raw", len);
    let open = fs::File::options().write(true).open(&raw).unwrap();
    open.write_all_at(&noise(1, 300_000), 0).unwrap();
    open.write_all_at(&[7; 200_000], (9 << 20) + 512).unwrap();
    open.write_all_at(&noise(2, 5000), (33 << 20) - 2500)
        .unwrap();
    open.write_all_at(&noise(3, 512), len - 512).unwrap();
    let sum = format!("sha256:{}", sha256(&raw));
    let is_raw = |name: &str, image: &Path| {
        let doc = w.json(["import", "-O", "qcow2", s(image), name]);
        assert_eq!(doc["size"], len.next_multiple_of(4096), "{name}");
        let info = w.json(["info", name]);
        assert_eq!(info["digest"], sum.as_str(), "{name}: {info}");
        let back = w.path("back.img");
        w.ok(["export", "-f", name, s(&back)]);
        assert_eq!(format!("sha256:{}", sha256(&back)), sum, "{name}");
        // What is zeros in it takes no room.
        assert!(du(&back) < 1 << 20, "{name}");
    };
    for (name, how) in [
        ("plain", &[][..]),
        ("compressed", &["-c"]),
        ("two", &["-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=512"]),
        ("large", &["-c", "-o", "cluster_size=2M"]),
        ("counts", &["-o", "refcount_bits=1"]),
        ("made", &["-o", "preallocation=metadata"]),
    ] {
        is_raw(name, &made(&w, &raw, name, how));
    }
    // Our own, and one with snapshots inside, of which the present is meant.
    let ours = w.path("ours.qcow2");
    w.ok(["export", "-O", "qcow2", "plain", s(&ours)]);
    tool("qemu-img", ["snapshot", "-c", "before", s(&ours)]);
    tool(
        "qemu-io",
        ["-c", "write -P 9 0 128k", "-c", "write -z 9M 1M", s(&ours)],
    );
    w.ok(["import", "-O", "qcow2", s(&ours), "ours"]);
    let back = w.path("back.img");
    w.ok(["export", "-f", "ours", s(&back)]);
    let mut bytes = fs::read(&raw).unwrap();
    bytes[..128 << 10].fill(9);
    bytes[9 << 20..10 << 20].fill(0);
    assert!(fs::read(&back).unwrap() == bytes);
    tool("qemu-img", ["snapshot", "-a", "before", s(&ours)]);
    is_raw("before", &ours);
    // A disk over one is a disk.
    w.ok(["create", "d", "--from", "compressed"]);
    let device = w.ok(["attach", "d"]);
    assert!(read_direct(Path::new(&device), 0, 294_912) == noise(1, 300_000)[..294_912]);
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn qcow2_images_that_cannot_come_in_are_told_why() {
    if !root() {
        return;
    }
    let w = World::new();
    let raw = w.file("raw", &noise(1, 1 << 20));
    let good = made(&w, &raw, "good", &[]);
    w.ok(["init"]);
    let refused = |image: &Path, code: i32, why: &str| {
        let told = w.fails(code, &["import", "-O", "qcow2", s(image), "x"]);
        assert!(told.contains(why), "{}: {told}", image.display());
        assert!(
            told.lines().count() > 1 && told.contains(s(image)),
            "{told}"
        );
        assert_eq!(w.ok(["ls", "-H"]), "");
    };
    // Not called one; from where it cannot be read; in a way in which it cannot.
    let told = w.fails(1, &["import", s(&good), "x"]);
    assert!(told.contains("import --format qcow2"), "{told}");
    let pipe = |args: &[&str]| {
        let mut command = w.command(args);
        command.stdin(fs::File::open(&good).unwrap());
        let out = command.output().unwrap();
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    let (code, told) = pipe(&["import", "-", "x"]);
    assert!(
        code == Some(1) && told.contains("is a qcow2 file"),
        "{told}"
    );
    let (code, told) = pipe(&["import", "-O", "qcow2", "-", "x"]);
    assert!(
        code == Some(2) && told.contains("save it to a file"),
        "{told}"
    );
    for how in ["--link", "--reflink"] {
        let told = w.fails(2, &["import", "-O", "qcow2", how, s(&good), "x"]);
        assert!(told.contains("can only be copied"), "{told}");
    }
    // What needs another file, or is of a kind that is not known.
    let over = w.path("over");
    let create = ["create", "-q", "-f", "qcow2", "-b", s(&good), "-F", "qcow2"];
    tool("qemu-img", [&create[..], &[s(&over)]].concat());
    refused(&over, 1, "stands on a backing file");
    let data = format!("data_file={}", s(&w.path("data")));
    refused(
        &made(&w, &raw, "apart", &["-o", &data]),
        1,
        "has its data in another file",
    );
    refused(
        &made(&w, &raw, "sub", &["-o", "extended_l2=on,cluster_size=128k"]),
        1,
        "sub-clusters",
    );
    refused(
        &made(&w, &raw, "zstd", &["-c", "-o", "compression_type=zstd"]),
        1,
        "compressed in another way",
    );
    // Damage: no image, cut off, marked, pointing past its end, a table without end.
    let bytes = fs::read(&good).unwrap();
    let with = |name: &str, at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        w.file(name, &bytes)
    };
    refused(&raw, 4, "does not begin as one");
    refused(&w.file("empty", &[]), 4, "does not begin as one");
    let cut = w.file("cut", &bytes[..bytes.len() - (300 << 10)]);
    refused(&cut, 4, "damaged");
    refused(&w.file("head", &bytes[..300]), 4, "shorter");
    refused(&with("dirty", 79, &[1]), 4, "not closed cleanly");
    refused(&with("version", 7, &[4]), 1, "version 4");
    refused(&with("crypt", 35, &[2]), 1, "encrypted");
    refused(&with("l1", 36, &[0xff; 4]), 4, "larger than they may be");
    refused(&with("bits", 23, &[63]), 4, "out of range");
    refused(&with("size", 24, &[0, 0, 0x20]), 2, "16 TiB");
    refused(&with("nothing", 24, &[0; 8]), 2, "empty");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    refused(
        &with("far", l2 as usize + 8, &(1u64 << 40).to_be_bytes()),
        4,
        "shorter",
    );
    refused(&with("short", 36, &[0; 4]), 4, "too short for its disk");
    refused(&with("none", 40, &[0; 8]), 4, "too short for its disk");
    let packed = made(
        &w,
        &w.file("text", &b"some text ".repeat(1 << 17)),
        "packed",
        &["-c"],
    );
    let packed = fs::read(&packed).unwrap();
    refused(
        &w.file("unpacked", &packed[..packed.len() - 4096]),
        4,
        "shorter",
    );
    // In clusters smaller than a block of ours, behind one that is zeros.
    let small = w.sparse("small.img", 1 << 20);
    let open = fs::File::options().write(true).open(&small).unwrap();
    open.write_all_at(&noise(4, 512), 0).unwrap();
    open.write_all_at(&noise(5, 512), 1024).unwrap();
    let small = fs::read(made(&w, &small, "small", &["-o", "cluster_size=512"])).unwrap();
    let entry = |at: usize| u64::from_be_bytes(small[at..at + 8].try_into().unwrap()) & !(1 << 63);
    let third = entry(entry(40) as usize) as usize + 16;
    let mut moved = small.clone();
    moved[third..third + 8].copy_from_slice(&((1u64 << 63) | (1 << 30)).to_be_bytes());
    refused(&w.file("third", &moved), 4, "shorter");
    // Without the table that says where the data is, all would be zeros.
    let moved = (bytes.len() as u64).to_be_bytes();
    refused(&with("lost", l1, &moved), 4, "shorter");
    refused(&w.path("gone"), 12, "No such file");
    refused(&w.dir, 2, "no regular file");
    w.finish();
}
