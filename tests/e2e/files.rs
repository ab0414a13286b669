//! Which files changed blocks belong to, between two snapshots of a real filesystem.

use crate::rig::*;
use forkdisk::attach::files::{Change, ChangedFile, Summary};
use forkdisk::daemon::files::changed_files;
use forkdisk::error::{Kind, Result};
use forkdisk::store::Store;
use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
};

/// The bytes in which two devices differ.
fn differences(a: &str, b: &str) -> Vec<Range<u64>> {
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let (mut one, mut two) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    loop {
        let n = a.read_at(&mut one, at).unwrap();
        assert_eq!(b.read_at(&mut two[..n], at).unwrap(), n);
        if n == 0 {
            return found;
        }
        if one[..n] != two[..n] {
            for (i, (x, y)) in one[..n].chunks(4096).zip(two.chunks(4096)).enumerate() {
                let start = at + i as u64 * 4096;
                match found.last_mut() {
                    _ if x == &y[..x.len()] => {}
                    Some(last) if last.end == start => last.end += 4096,
                    _ => found.push(start..start + 4096),
                }
            }
        }
        at += n as u64;
    }
}

fn look(
    w: &World,
    upper: &str,
    lower: &str,
    ranges: &[Range<u64>],
) -> Result<(Vec<ChangedFile>, Summary)> {
    let store = Store::open(&w.store)?;
    let (upper, lower) = (store.resolve(upper)?, store.resolve(lower)?);
    let mut files = Vec::new();
    let mut each = |file: ChangedFile| {
        files.push(file);
        Ok(())
    };
    let summary = changed_files(&store, &upper, &lower, ranges, &|| false, &mut each)?;
    Ok((files, summary))
}

fn changed_between_snapshots(mkfs: &[&str], mib: u64) {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", mib << 20);
    tool(mkfs[0], mkfs[1..].iter().copied().chain([s(&image)]));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let write =
        |path: &str, seed: u64, len: usize| fs::write(m.join(path), noise(seed, len)).unwrap();
    for dir in ["etc/deep", "old/inner", "var"] {
        fs::create_dir_all(m.join(dir)).unwrap();
    }
    write("etc/deep/kept", 1, 1 << 20);
    write("etc/written", 2, 1 << 20);
    write("etc/longer", 3, 8192);
    write("gone", 4, 200_000);
    write("old/inner/gone", 5, 5000);
    write("var/rights", 6, 100);
    write("var/turned", 7, 100);
    std::os::unix::fs::symlink("etc/written", m.join("link")).unwrap();
    w.ok(["snapshot", "d@a", "--freeze"]);
    let written = File::options()
        .write(true)
        .open(m.join("etc/written"))
        .unwrap();
    written.write_all_at(&noise(8, 8192), 512 << 10).unwrap();
    drop(written);
    write("etc/longer", 9, 100_000);
    fs::remove_file(m.join("gone")).unwrap();
    fs::remove_dir_all(m.join("old")).unwrap();
    fs::create_dir(m.join("fresh")).unwrap();
    write("fresh/file", 10, 300_000);
    write("fresh/empty", 10, 0);
    fs::remove_file(m.join("var/turned")).unwrap();
    fs::create_dir(m.join("var/turned")).unwrap();
    tool("chmod", ["600", s(&m.join("var/rights"))]);
    w.ok(["snapshot", "d@b", "--freeze"]);
    w.ok(["detach", "d"]);
    let (a, b) = (w.ok(["attach", "d@a"]), w.ok(["attach", "d@b"]));
    let ranges = differences(&a, &b);
    w.ok(["detach", "d@a"]);

    // The command says the same.
    let said = w.json(["diff", "d@a", "d@b", "--files"]);
    let said_files = said["files"].as_array().unwrap().len();
    assert_eq!(
        w.run(["diff", "d@a", "d@b", "--files", "--exit-code"]).code,
        5
    );
    assert_eq!(
        w.run(["diff", "d@a", "d@a", "--files", "--exit-code"]).code,
        0
    );
    let text = w.ok(["diff", "d@a", "d@b", "--files", "-H"]);
    assert!(
        text.contains("added\tf\t") && text.contains("\tfresh/file\n"),
        "{text}"
    );

    let (files, summary) = look(&w, "d@b", "d@a", &ranges).unwrap();
    assert_eq!(said_files, files.len());
    assert_eq!(said["metadata"], summary.metadata);
    let mut shown: Vec<(&str, Change, char)> = files
        .iter()
        .map(|f| (f.path.to_str().unwrap(), f.change, f.kind))
        .collect();
    shown.sort();
    assert_eq!(
        shown,
        [
            ("etc/longer", Change::Changed, 'f'),
            ("etc/written", Change::Changed, 'f'),
            ("fresh", Change::Added, 'd'),
            ("fresh/empty", Change::Added, 'f'),
            ("fresh/file", Change::Added, 'f'),
            ("gone", Change::Deleted, 'f'),
            ("old", Change::Deleted, 'd'),
            ("old/inner", Change::Deleted, 'd'),
            ("old/inner/gone", Change::Deleted, 'f'),
            ("var/rights", Change::Changed, 'f'),
            // What is something else now was deleted, and added.
            ("var/turned", Change::Added, 'd'),
            ("var/turned", Change::Deleted, 'f'),
        ]
    );
    let bytes = |path: &str| {
        let file = files.iter().find(|f| f.path == Path::new(path));
        file.unwrap().bytes
    };
    assert_eq!(bytes("etc/written"), 8192, "{files:?}");
    assert!(bytes("fresh/file") >= 300_000);
    assert_eq!(bytes("fresh/empty"), 0);
    let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    assert!(summary.metadata > 0 && summary.metadata < total);
    // xfs leaves something in its journal even when it is frozen.
    let frozen = mkfs[0] == "mkfs.ext4";
    assert_eq!(summary.without_journal, !frozen, "{summary:?}");
    assert_eq!(mkfs[0].strip_prefix("mkfs."), Some(&summary.fs_type[..]));

    // What was attached before is attached still, and nothing else; no mount is left.
    assert_eq!(w.attached(), ["d@b"]);
    w.ok(["detach", "d@b"]);
    // From the base, which is the empty filesystem, everything was added.
    let (files, _) = look(&w, "d@a", "base", &[]).unwrap();
    assert!(files.iter().all(|f| f.change == Change::Added), "{files:?}");
    assert!(files.iter().any(|f| f.path == Path::new("etc/deep/kept")));

    // A disk that is in use cannot be compared; what holds no filesystem neither.
    w.ok(["attach", "d"]);
    let busy = look(&w, "d", "d@a", &ranges).unwrap_err();
    assert_eq!(busy.kind(), Kind::Busy);
    assert!(busy.hint_text().unwrap().contains("snapshot"), "{busy:?}");
    w.ok(["detach", "d"]);
    let nothing = w.file("nothing.img", &noise(1, 1 << 20));
    w.ok(["import", s(&nothing), "nothing"]);
    let none = look(&w, "nothing", "d@a", &ranges).unwrap_err();
    assert_eq!(none.kind(), Kind::Unsupported, "{none:?}");
    assert!(none.hint_text().is_some());
    // An interrupt ends it, and leaves nothing.
    let store = Store::open(&w.store).unwrap();
    let (upper, lower) = (store.resolve("d@b").unwrap(), store.resolve("d@a").unwrap());
    let ended = changed_files(&store, &upper, &lower, &ranges, &|| true, &mut |_| Ok(()));
    assert_eq!(ended.unwrap_err().kind(), Kind::Interrupted);
    w.finish();
}

#[test]
fn files_that_differ_in_ext4() {
    changed_between_snapshots(&["mkfs.ext4", "-qF", "-b", "4096"], 64);
}

#[test]
fn files_that_differ_in_xfs() {
    changed_between_snapshots(&["mkfs.xfs", "-qf"], 320);
}

#[test]
fn files_of_two_kinds_of_filesystems_are_not_compared() {
    if !root() {
        return;
    }
    let w = World::new();
    for (name, mkfs) in [("four", ["mkfs.ext4", "-qF"]), ("x", ["mkfs.xfs", "-qf"])] {
        let image = w.sparse(name, 320 << 20);
        tool(mkfs[0], [mkfs[1], s(&image)]);
        w.ok(["import", s(&image), name]);
    }
    let said = w.fails_here(1, &["diff", "four", "x", "--files"]);
    assert!(said.contains("an ext4 filesystem"), "{said}");
    w.finish();
}

/// Files whose small blocks share one block of the disk are told from each other.
#[test]
fn files_in_blocks_of_a_kilobyte() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("image", 64 << 20);
    tool("mkfs.ext4", ["-qF", "-b", "1024", s(&image)]);
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    for i in 0..16 {
        fs::write(m.join(format!("f{i}")), noise(i, 1000)).unwrap();
    }
    tool("sync", ["-f", s(&m)]);
    w.ok(["snapshot", "d@a", "--freeze"]);
    let file = File::options().write(true).open(m.join("f5")).unwrap();
    file.write_all_at(b"changed", 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::rename(m.join("f9"), m.join("g9")).unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["snapshot", "d@b", "--freeze"]);
    let doc = w.json(["diff", "d@a", "d@b", "--files"]);
    let files: Vec<_> = doc["files"].as_array().unwrap().iter().collect();
    let all: Vec<_> = files
        .iter()
        .filter(|f| f["kind"] == "f")
        .map(|f| format!("{} {} {}", f["change"], f["path"], f["bytes"]))
        .collect();
    assert_eq!(
        all,
        [
            "\"changed\" \"f5\" 1024",
            "\"deleted\" \"f9\" 0",
            "\"added\" \"g9\" 0"
        ]
    );
    assert!(doc["metadata"].as_u64().unwrap() > 0, "{doc}");
    w.ok(["detach", "d"]);
    w.finish();
}
