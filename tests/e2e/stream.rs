//! Images out of disks, what differs, and streams from one store to another: at rest, and of disks that are mounted and busy.

use crate::rig::*;
use std::{fs, os::unix::fs::FileExt, process::Command, process::Stdio};

/// A mounted disk that somebody writes to without an end.
fn busy(w: &World, disk: &str) -> std::path::PathBuf {
    let m = w.mkdir(&format!("m-{disk}"));
    w.ok(["attach", disk, "--mount", s(&m)]);
    fs::write(m.join("who"), disk).unwrap();
    tool("sync", ["-f", s(&m)]);
    let mut writer = Command::new("bash");
    writer.args(["-c", "i=0; while :; do i=$((i+1)); head -c 20000 /dev/urandom > \"$0/n.$((i%50))\"; sync -d \"$0/n.$((i%50))\"; done"]);
    writer.arg(&m).stderr(Stdio::null());
    w.child(writer);
    eventually("the writer writes", || m.join("n.8").exists());
    m
}

/// Detaches what children of the writer may still use for a moment.
fn detach(w: &World, disk: &str) {
    eventually("nobody uses it", || w.run(["detach", disk]).code == 0);
}

fn fsck(w: &World, name: &str) {
    let device = w.ok(["attach", name]);
    tool("e2fsck", ["-fn", &device]);
    w.ok(["detach", &device]);
}

#[test]
fn a_busy_disk_becomes_an_image() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "web", "--from", "base"]);
    let m = busy(&w, "web");
    let layer = w.json(["info", "web"])["id"].clone();
    let said = w.json(["-n", "commit", "web", "image"]);
    assert_eq!(said["dry_run"], true);
    let made = w.json(["commit", "web", "image", "-m", "while writing"]);
    assert_eq!((&made["kind"], &made["id"]), (&"image".into(), &layer));
    assert_eq!(made["message"], "while writing");
    w.ok(["commit", "web", "frozen", "--freeze"]);
    w.fails_here(13, &["commit", "web", "image"]);
    w.fails_here(12, &["commit", "nothing", "x"]);
    w.fails_here(2, &["commit", "image", "x"]);
    w.fails_here(11, &["rm", "image"]);
    for _ in 0..3 {
        w.ok(["diff", "web", "--stat"]);
        w.ok(["map", "web"]);
    }
    w.end_children();
    // What is looked at while it is mounted is no more than looked at.
    let before = w.json(["ls", "layers"])["layers"].as_array().unwrap().len();
    tool("sync", ["-f", s(&m)]);
    assert_eq!(w.run(["diff", "web", "--exit-code"]).code, 5);
    let stat = w.json(["diff", "frozen", "web", "--stat"]);
    assert_eq!(
        (&stat["from"], &stat["differ"]),
        (&"frozen".into(), &true.into())
    );
    assert!(stat["data"].as_u64().unwrap() > 0);
    let map = w.json(["map", "web"]);
    assert!(map["extents"].as_array().unwrap().len() > 2);
    let after = w.json(["ls", "layers"])["layers"].as_array().unwrap().len();
    assert_eq!(before, after);
    detach(&w, "web");
    for image in ["image", "frozen"] {
        let disk = format!("of-{image}");
        w.ok(["create", &disk, "--from", image]);
        w.ok(["attach", &disk, "--mount", s(&m)]);
        assert_eq!(fs::read_to_string(m.join("who")).unwrap(), "web");
        w.ok(["detach", &disk]);
        fsck(&w, &disk);
    }
    let tree = w.ok(["tree"]);
    assert!(tree.contains("image") && tree.contains("frozen"), "{tree}");
    assert!(
        w.ok(["ls", "images", "-H", "-o", "name"])
            .contains("frozen")
    );
    w.ok(["export", "image", s(&w.path("image.raw"))]);
    w.ok(["rm", "of-image"]);
    w.ok(["rm", "-r", "--yes", "image"]);
    assert_eq!(w.names(), ["base"]);
    w.finish();
}

#[test]
fn changes_travel_to_another_store() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let far = w.path("far");
    let there = |args: &[&str]| -> String {
        let out = finish(w.command_on(&far, args));
        assert_eq!(out.code, 0, "{args:?}: {out:?}");
        out.stdout.trim_end().to_string()
    };
    let digest = |name: &str| {
        w.json(["info", name])["digest"]
            .as_str()
            .unwrap()
            .to_string()
    };
    let digest_there = |name: &str| {
        let told = there(&["--json", "info", name]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        told["digest"].as_str().unwrap_or_default().to_string()
    };
    let file = |name: &str| w.path(name).to_str().unwrap().to_string();
    w.ok(["export", "base", &file("base.fd"), "-O", "stream"]);
    there(&["import", &file("base.fd")]);
    assert_eq!(digest("base"), digest_there("base"));
    w.ok(["create", "web", "--from", "base"]);
    busy(&w, "web");
    w.ok(["snapshot", "web@1"]);
    w.ok(["export", "web@1", &file("1.fd"), "--since", "base"]);
    // It is what a digest is computed of, so that is known by now.
    let known = w.ok(["ls", "snapshots", "-H", "-o", "digest"]);
    assert_eq!(known, format!("sha256:{}", sha256(&w.path("1.fd"))));
    assert_eq!(
        digest("web@1"),
        format!("sha256:{}", sha256(&w.path("1.fd")))
    );
    assert_eq!(
        w.ok(["ls", "snapshots", "-H", "-o", "digest"]),
        digest("web@1")
    );
    w.fails_here(13, &["export", "web@1", &file("1.fd"), "--since", "base"]);
    w.fails_here(2, &["export", "web@1", &file("no.fd"), "--since", "web"]);
    assert!(!w.path("no.fd").exists());
    // The disk itself, mounted and busy: what it was at one moment.
    w.ok(["export", "web", &file("now.fd"), "--since", "web@1"]);
    w.ok(["export", "web", &file("now.raw")]);
    w.end_children();
    // Without its parent it is of no use.
    let early = finish(w.command_on(&far, ["import", &file("now.fd"), "now"]));
    assert_eq!(early.code, 12, "{early:?}");
    assert!(early.stderr.contains("sha256:"), "{early:?}");
    there(&["import", &file("1.fd"), "one"]);
    assert_eq!(digest("web@1"), digest_there("one"));
    // Through a pipe.
    shell(&format!(
        "'{BIN}' -S '{}' import - now < '{}'",
        far.display(),
        file("now.fd")
    ));
    there(&["export", "now", &file("back.fd"), "--since", "one"]);
    assert_eq!(sha256(&w.path("now.fd")), sha256(&w.path("back.fd")));
    let cut = fs::read(w.path("now.fd")).unwrap();
    fs::write(w.path("cut.fd"), &cut[..cut.len() - 1]).unwrap();
    let refused = finish(w.command_on(&far, ["import", &file("cut.fd")]));
    assert_eq!(refused.code, 4, "{refused:?}");
    // As bytes it is a disk as any other.
    there(&["import", &file("1.fd"), "bytes", "-O", "raw"]);
    let m = w.mkdir("m");
    there(&["create", "d", "--from", "now"]);
    let device = there(&["attach", "d", "--mount", s(&m)]);
    w.note(&device);
    assert_eq!(fs::read_to_string(m.join("who")).unwrap(), "web");
    there(&["detach", "d"]);
    assert_eq!(there(&["--json", "check"]).matches("\"what\"").count(), 0);
    there(&["daemon", "stop"]);
    detach(&w, "web");
    w.ok(["import", &file("now.raw"), "raw"]);
    assert_eq!(w.run(["diff", "raw", "raw", "--exit-code"]).code, 0);
    w.finish();
}

/// What was sent whole, or over something else than what it stands on, is known by its digest here: what changes later can follow.
#[test]
fn a_copy_follows_its_origin() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let sent = |on: &std::path::Path, args: &str, to: &std::path::Path, name: &str| {
        let (on, to) = (on.display(), to.display());
        shell(&format!(
            "set -o pipefail; '{BIN}' -S '{on}' export {args} | '{BIN}' -S '{to}' import - {name} -O stream"
        ));
    };
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    for n in 1..=4u8 {
        let file = fs::File::options().write(true).open(&device).unwrap();
        file.write_all_at(&noise(n.into(), 1 << 20), u64::from(n) << 19)
            .unwrap();
        file.sync_all().unwrap();
        w.ok(["snapshot", &format!("d@{n}")]);
    }
    w.ok(["detach", "d"]);
    let first = w.json(["info", "d@1"])["digest"].clone();
    let (far, farther) = (w.path("far"), w.path("farther"));
    let here = w.store.clone();
    sent(&here, "d@1 - -O stream", &far, "one");
    sent(&here, "d@2 - --since d@1", &far, "two");
    // Over what it does not stand on.
    sent(&here, "d@4 - --since d@2", &far, "four");
    // From there on: a base is known by both.
    sent(&far, "one - -O stream", &farther, "one");
    sent(&far, "two - --since one", &farther, "two");
    sent(&here, "d@3 - --since d@1", &farther, "three");
    let raw = |on: &std::path::Path, name: &str| {
        let out = finish(w.command_on(on, ["export", name, s(&w.path("raw")), "-f"]));
        assert_eq!(out.code, 0, "{out:?}");
        sha256(&w.path("raw"))
    };
    for (on, name, of) in [
        (&far, "one", "d@1"),
        (&far, "two", "d@2"),
        (&far, "four", "d@4"),
        (&farther, "two", "d@2"),
        (&farther, "three", "d@3"),
    ] {
        assert_eq!(raw(on, name), raw(&here, of), "{name}");
    }
    // One after the other, while what was sent goes.
    let (third, fourth) = (w.path("third"), w.path("fourth"));
    for far in [&third, &fourth] {
        sent(&here, "base - -O stream", far, "base");
    }
    sent(&here, "d@1 - --since base", &third, "one");
    sent(&here, "d@2 - --since d@1", &third, "two");
    w.ok(["rm", "d@1"]);
    sent(&here, "d@3 - --since d@2", &third, "three");
    // Over something else than what its digest was computed of.
    w.ok(["rm", "d@2"]);
    sent(&here, "d@3 - --since base", &fourth, "three");
    for far in [&third, &fourth] {
        sent(&here, "d@4 - --since d@3", far, "four");
        assert_eq!(raw(far, "four"), raw(&here, "d@4"));
    }
    // What has no name is sent as well.
    w.ok(["flatten", "d"]);
    let flat = w.json(["info", "d"])["base_id"]
        .as_str()
        .unwrap()
        .to_string();
    sent(&here, &format!("{flat} - -O stream"), &fourth, "flat");
    assert_eq!(raw(&fourth, "flat"), raw(&here, "d"));
    // What is something else is refused as ever.
    let stream = w.path("s.fd");
    w.ok(["export", "d@4", s(&stream), "--since", "d@3"]);
    let refused = finish(w.command_on(&far, ["import", s(&stream), "no"]));
    assert_eq!(refused.code, 12, "{refused:?}");
    let told = finish(w.command_on(&far, ["--json", "info", "one"]));
    let told: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(told["known_as"], first);
    w.finish();
}

#[test]
fn what_differs_is_told() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("a.img", &noise(1, 1 << 20));
    w.ok(["import", s(&image), "a"]);
    w.ok(["create", "d", "--from", "a", "--size", "2M"]);
    let device = w.ok(["attach", "d"]);
    shell(&format!(
        "printf x | dd of={device} bs=1 seek=8192 conv=notrunc,fsync status=none; blkdiscard -o 65536 -l 8192 {device}"
    ));
    let lines = "8192\t4096\tdata\n65536\t8192\tzero";
    assert_eq!(w.ok(["diff", "d", "-H"]), lines);
    w.ok(["detach", "d"]);
    assert_eq!(w.ok(["diff", "a", "d", "-H"]), lines);
    assert_eq!(
        w.ok(["diff", "d", "a", "-H"]),
        "8192\t4096\tdata\n65536\t8192\tdata\n1048576\t1048576\tgone"
    );
    assert_eq!(
        w.ok(["diff", "a", "d", "-H", "--stat"]),
        "12288\t4096\t8192\t2\t0"
    );
    let told = w.json(["diff", "a", "d"]);
    assert_eq!(
        (&told["from_size"], &told["to_size"]),
        (&(1u64 << 20).into(), &(2u64 << 20).into())
    );
    assert_eq!(told["extents"][1]["type"], "zero");
    assert_eq!(
        (&told["changed"], &told["count"]),
        (&12288.into(), &2.into())
    );
    let text = w.ok(["diff", "a", "d"]);
    assert!(
        text.starts_with("         OFFSET     LENGTH  TYPE\n           8192    4.0 KiB  data\n"),
        "{text}"
    );
    assert!(
        w.ok(["diff", "a", "d", "--stat"])
            .contains("1.0 MiB -> 2.0 MiB")
    );
    let told = w.json(["diff", "d", "a"]);
    assert_eq!(
        (&told["gone"], &told["count"]),
        (&(1 << 20).into(), &3.into())
    );
    // A size that differs is a difference.
    w.ok(["create", "e", "--from", "a", "--size", "2M"]);
    assert_eq!(w.json(["diff", "a", "e"])["differ"], true);
    assert_eq!(w.run(["diff", "e", "--exit-code"]).code, 5);
    assert_eq!(w.run(["diff", "e", "e", "--exit-code"]).code, 0);
    w.fails(2, &["diff", "a"]);
    w.fails(12, &["diff", "a", "nothing"]);
    w.finish();
}
