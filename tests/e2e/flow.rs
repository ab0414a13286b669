//! The main job: a base, forks of it, mounted, changed, snapshotted, detached, and all there again.

use crate::rig::*;
use std::{fs, process::Command};

/// Copies a real tree of about 50 MB into a directory.
fn real_tree(into: &str) {
    shell(&format!(
        "sum=0; for d in /usr/share/*/; do n=$(du -sm \"$d\" | cut -f1); \
         if [ $n -ge 1 -a $n -le 25 -a $((sum + n)) -le 60 ]; then cp -a \"$d\" '{into}/'; sum=$((sum + n)); fi; done; \
         [ $sum -ge 10 ]"
    ));
}

fn main_flow(mkfs: &[&str], fsck: &[&str], mib: u64) {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", mib << 20);
    tool(mkfs[0], mkfs[1..].iter().copied().chain([s(&image)]));
    w.ok(["import", s(&image)]);
    let digest = format!("sha256:{}", sha256(&image));
    assert_eq!(w.json(["info", "base"])["digest"], digest.as_str());
    let made = w.json(["create", "web", "--from", "base", "--count", "3"]);
    assert_eq!(made["objects"].as_array().unwrap().len(), 3);
    assert_eq!(made["objects"][2]["name"], "web-3");

    let mounts: Vec<_> = (1..=3).map(|i| w.mkdir(&format!("m{i}"))).collect();
    for (i, dir) in mounts.iter().enumerate() {
        let device = w.ok(["attach", &format!("web-{}", i + 1), "--mount", s(dir)]);
        assert!(device.starts_with("/dev/loop"), "{device}");
        fs::write(dir.join("who"), format!("disk {i}")).unwrap();
    }
    real_tree(s(&mounts[0]));
    let tree = tree_digest(&mounts[0]);
    // Isolation: what one writes nobody else sees.
    for (i, dir) in mounts.iter().enumerate() {
        let who = fs::read_to_string(dir.join("who")).unwrap();
        assert_eq!(who, format!("disk {i}"));
        assert_eq!(fs::read_dir(dir).unwrap().count() > 5, i == 0);
    }
    tool("sync", ["-f", s(&mounts[1])]);
    // A snapshot and a fork while it is mounted and written to.
    let mut writer = Command::new("bash");
    writer.args(["-c", "i=0; while :; do i=$((i+1)); echo $i > \"$0/n.$((i%50))\"; sync -d \"$0/n.$((i%50))\"; done"]);
    writer.arg(&mounts[1]).stderr(std::process::Stdio::null());
    w.child(writer);
    eventually("the writer writes", || mounts[1].join("n.8").exists());
    w.ok(["snapshot", "web-2@busy", "-m", "while writing"]);
    w.ok(["create", "live", "--from", "web-2"]);
    w.ok(["snapshot", "web-2@frozen", "--freeze"]);
    w.ok(["create", "old", "--from", "web-2@busy"]);
    w.ok(["create", "clean", "--from", "web-2@frozen"]);
    w.end_children();
    for dir in &mounts {
        w.ok(["detach", s(dir)]);
    }
    assert_eq!(w.attached(), [""; 0]);
    let m = w.mkdir("m");
    for name in ["old", "live", "clean"] {
        w.ok(["attach", name, "--mount", s(&m)]);
        assert_eq!(fs::read_to_string(m.join("who")).unwrap(), "disk 1");
        assert!(m.join("n.5").exists());
        fs::write(m.join("who"), name).unwrap();
        w.ok(["detach", name]);
    }
    // All there again, and sound.
    for i in 1..=3 {
        let name = format!("web-{i}");
        let device = w.ok(["attach", &name]);
        tool(fsck[0], fsck[1..].iter().copied().chain([device.as_str()]));
        w.ok(["detach", &device]);
    }
    for name in ["old", "live", "clean"] {
        let device = w.ok(["attach", name]);
        tool(fsck[0], fsck[1..].iter().copied().chain([device.as_str()]));
        w.ok(["detach", name]);
    }
    w.ok(["attach", "web-1", "--mount", s(&m)]);
    assert_eq!(tree_digest(&m), tree);
    w.ok(["detach", "web-1"]);
    // The snapshot itself, read-only, whatever its journal needs.
    for name in ["web-2@busy", "web-2@frozen"] {
        let out = w.run(["attach", name, "--mount", s(&m)]);
        assert_eq!(out.code, 0, "{out:?}");
        w.note(&out.stdout);
        // A journal cannot be replayed on what is read-only; that is said.
        if name == "web-2@frozen" || !out.stderr.contains("journal") {
            assert_eq!(fs::read_to_string(m.join("who")).unwrap(), "disk 1");
        }
        assert!(fs::write(m.join("new"), "x").is_err());
        w.ok(["detach", name]);
    }
    // The base is what it was.
    let out = w.path("out.img");
    w.ok(["export", "base", s(&out)]);
    assert_eq!(format!("sha256:{}", sha256(&out)), digest);
    w.finish();
}

#[test]
fn the_main_job_with_ext4() {
    main_flow(&["mkfs.ext4", "-qF"], &["e2fsck", "-fn"], 512);
}

#[test]
fn the_main_job_with_xfs() {
    main_flow(&["mkfs.xfs", "-qf"], &["xfs_repair", "-n"], 512);
}

/// What is exported is what is read through the device; a file that is there is not replaced.
#[test]
fn an_export_is_the_content() {
    if !root() {
        return;
    }
    let w = World::new();
    // No multiple of 4096 long.
    let image = w.file("odd.img", &noise(1, 3_000_001));
    w.ok(["import", s(&image), "odd"]);
    w.ok(["create", "a", "--from", "odd", "--size", "8M"]);
    let device = w.ok(["attach", "a"]);
    fs::write(w.path("piece"), noise(2, 70_000)).unwrap();
    tool(
        "dd",
        [
            &format!("if={}", w.path("piece").display()),
            &format!("of={device}"),
            "bs=7k",
            "seek=3",
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    let whole = w.path("whole");
    tool(
        "dd",
        [
            &format!("if={device}"),
            &format!("of={}", whole.display()),
            "bs=1M",
            "status=none",
        ],
    );
    let seen = fs::read(&whole).unwrap();
    assert_eq!(seen.len(), 8 << 20);
    let mut expected = fs::read(&image).unwrap();
    expected.resize(8 << 20, 0);
    expected[3 * 7168..][..70_000].copy_from_slice(&noise(2, 70_000));
    assert!(seen == expected, "the device shows something else");
    w.ok(["snapshot", "a@s"]);
    w.ok(["detach", "a"]);
    for name in ["a", "a@s"] {
        let out = w.path(&format!("{name}.out"));
        let told = w.json(["export", name, s(&out)]);
        assert_eq!(told["file"], s(&out));
        assert!(told["written"].as_u64().unwrap() > 0);
        assert!(fs::read(&out).unwrap() == expected, "{name}");
        let streamed = finish_bytes(w.command(["export", name, "-"]));
        assert!(streamed == expected, "{name} as a stream");
        w.fails(13, &["export", name, s(&out)]);
        assert!(fs::read(&out).unwrap() == expected, "{name}");
    }
    // The base as long as it came in.
    w.ok(["export", "odd", s(&w.path("odd.out"))]);
    assert_eq!(sha256(&w.path("odd.out")), sha256(&image));
    w.fails(12, &["export", "nothing", s(&w.path("nothing.out"))]);
    assert!(!w.path("nothing.out").exists());
    w.fails(12, &["export", "a", s(&w.path("no/such/dir/x"))]);
    w.finish();
}

fn finish_bytes(mut command: Command) -> Vec<u8> {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{out:?}");
    out.stdout
}

/// What the JSON documents promise.
#[test]
fn the_documents_have_their_fields() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "web", "--from", "base", "--size", "300M"]);
    let m = w.mkdir("m");
    let attached = w.json(["attach", "web", "--mount", s(&m)]);
    let device = attached["device"].as_str().unwrap().to_string();
    assert!(
        attached["file"]
            .as_str()
            .unwrap()
            .ends_with("/run/disks/web")
    );
    assert_eq!(attached["mounts"][0], s(&m));
    assert_eq!(attached["mount"], s(&m));
    assert_eq!(attached["count"], 1);
    assert_eq!(attached["read_only"], false);
    assert_eq!(attached["size"], 300 << 20);
    fs::write(m.join("data"), noise(3, 4 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    let snap = w.json(["snapshot", "web@one", "-m", "first"]);
    assert_eq!(
        (&snap["name"], &snap["kind"], &snap["message"]),
        (&"web@one".into(), &"snap".into(), &"first".into())
    );

    let listed = w.json(["ls", "-o", "name,refer"]);
    let web = listed["objects"]
        .as_array()
        .unwrap()
        .iter()
        .find(|o| o["name"] == "web")
        .unwrap();
    for field in [
        "name",
        "id",
        "size",
        "kind",
        "parent",
        "parent_id",
        "created",
    ] {
        assert!(!web[field].is_null(), "{field}: {web}");
    }
    assert_eq!(
        (&web["attached"], &web["device"]),
        (&true.into(), &device.as_str().into())
    );
    assert!(web["usage"]["refer"].as_u64().unwrap() >= 4 << 20);

    let info = w.json(["info", "web@one"]);
    assert_eq!((&info["base"], &info["depth"]), (&"base".into(), &1.into()));
    assert!(info["digest"].as_str().unwrap().starts_with("sha256:"));
    assert!(info["private_bytes"].as_u64().unwrap() >= 4 << 20);
    assert_eq!(w.json(["info", "web"])["depth"], 2);
    assert_eq!(w.json(["info", "base"])["depth"], 0);

    let du = w.json(["du"]);
    assert_eq!(du["objects"].as_array().unwrap().len(), 3);
    for field in ["stored", "full_copies", "size"] {
        assert!(du["total"][field].as_u64().is_some(), "{field}");
    }
    let one = w.json(["du", "web@one"]);
    for field in ["size", "refer", "exclusive", "shared"] {
        assert!(one[field].as_u64().is_some(), "{field}: {one}");
        assert_eq!(one[field], one["objects"][0][field]);
    }
    let tree = w.json(["tree"]);
    let nodes = tree["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    let web = nodes.iter().find(|n| n["name"] == "web").unwrap();
    assert_eq!(
        (&web["depth"], &web["attached"], &web["mounts"][0]),
        (&2.into(), &true.into(), &s(&m).into())
    );

    let map = w.json(["map", "web@one"]);
    let mut at = 0;
    for extent in map["extents"].as_array().unwrap() {
        assert_eq!(extent["start"], at, "no gaps");
        at += extent["length"].as_u64().unwrap();
        assert!(["absent", "zero", "layer", "base"].contains(&extent["type"].as_str().unwrap()));
    }
    assert_eq!(at, 300 << 20);
    let check = w.json(["check"]);
    assert_eq!(
        (&check["leaks"], &check["corruptions"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
    let gone = w.json(["detach", "web"]);
    assert_eq!(gone["detached"][0]["name"], "web");
    assert_eq!(gone["unmounted"][0], s(&m));
    w.finish();
}
