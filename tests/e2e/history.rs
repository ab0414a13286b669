//! The history of a disk from the outside: a file that was deleted is back.

use crate::rig::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::{fs, thread, time::Duration};

/// The number of the last point of a disk's history.
fn last(w: &World, disk: &str) -> u64 {
    let history = w.json(["ls", "--history", disk]);
    let points = history["points"].as_array().unwrap();
    points.last().unwrap()["point"].as_u64().unwrap()
}

#[test]
fn a_deleted_file_comes_back() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "web", "--from", "base", "--history", "10m,1G"]);
    w.ok(["create", "plain", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "web", "--mount", s(&m)]);
    let content = "important\n".repeat(5000);
    fs::write(m.join("report"), &content).unwrap();
    tool("sync", ["-f", s(&m)]);
    let good = last(&w, "web");
    // A time between the two, to the second.
    thread::sleep(Duration::from_millis(1100));
    let between = std::time::SystemTime::now();
    let between = between
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    thread::sleep(Duration::from_millis(1100));
    fs::remove_file(m.join("report")).unwrap();
    fs::write(m.join("other"), "later").unwrap();
    tool("sync", ["-f", s(&m)]);
    assert!(last(&w, "web") > good);
    // It is mounted.
    w.fails_here(11, &["rewind", "web", "--at", &between.to_string()]);
    w.ok(["detach", "web"]);

    // A fork of then leaves the disk as it is.
    let at = between.to_string();
    let fork = w.json(["create", "then", "--from", "web", "--at", &at]);
    assert_eq!(fork["name"], "then");
    w.ok(["attach", "then", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("report")).unwrap(), content);
    assert!(!m.join("other").exists());
    w.ok(["detach", "then"]);

    // Back, and forth again.
    let plan = w.json(["rewind", "web", "--at", &at, "-n"]);
    assert!(
        plan["dry_run"] == true && plan["undoable"] == true,
        "{plan}"
    );
    let undone = last(&w, "web");
    let done = w.json(["rewind", "web", "--at", &at]);
    assert_eq!(
        (&done["point"], &done["blocks"]),
        (&plan["point"], &plan["blocks"])
    );
    let device = w.ok(["attach", "web", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("report")).unwrap(), content);
    assert!(!m.join("other").exists());
    w.ok(["detach", &device]);
    w.ok(["rewind", "web", "--at", &format!("#{undone}")]);
    let device = w.ok(["attach", "web", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("other")).unwrap(), "later");
    w.ok(["detach", &device]);
    let device = w.ok(["attach", "web"]);
    tool("e2fsck", ["-fn", device.as_str()]);
    w.ok(["detach", "web"]);

    // What is told of it.
    let info = w.json(["info", "web"]);
    let held = info["history_bytes"].as_u64().unwrap();
    assert!(held > 0 && held < 64 << 20, "{held}");
    assert_eq!(w.json(["du", "web"])["history_bytes"], held);
    let history = w.json(["ls", "--history", "web"]);
    assert_eq!(
        (&history["window"], &history["limit"]),
        (&600.into(), &(1u64 << 30).into())
    );
    assert!(w.ok(["ls", "--history", "web"]).contains("ago)"));
    assert_eq!(
        w.json(["ls", "--history", "plain"])["points"],
        serde_json::json!([])
    );
    w.fails(12, &["rewind", "plain", "--at", "-1s"]);
    w.fails(12, &["rewind", "web", "--at", "-2h"]);
    w.fails(12, &["rewind", "web", "--at", "#99999999"]);
    w.fails(2, &["rewind", "base", "--at", "-1s"]);
    // A snapshot is a point of its own, and the history goes on; that of the disk, whatever becomes of the snapshot.
    let before = points(&w, "web");
    w.ok(["snapshot", "web@s"]);
    assert_eq!(w.json(["info", "web"])["history_bytes"], held);
    assert_eq!(points(&w, "web"), before);
    let device = w.ok(["attach", "web", "--mount", s(&m)]);
    fs::remove_file(m.join("other")).unwrap();
    w.ok(["detach", &device]);
    assert!(points(&w, "web") > before);
    w.ok(["gc"]);
    let there = |name: &str| {
        let device = w.ok(["attach", name, "--mount", s(&m)]);
        let there = (m.join("report").exists(), m.join("other").exists());
        w.ok(["detach", &device]);
        there
    };
    assert_eq!(there("web"), (false, false));
    let gone = format!("#{}", last(&w, "web"));
    w.ok(["rewind", "web", "--at", &format!("#{undone}")]);
    assert_eq!(there("web"), (false, true));
    w.ok(["rewind", "web", "--at", &gone]);
    assert_eq!(there("web"), (false, false));
    w.ok([
        "create",
        "again",
        "--from",
        "web",
        "--at",
        &format!("#{undone}"),
    ]);
    assert_eq!(there("again"), (false, true));
    assert!(points(&w, "again") <= 1, "a fork has no part in it");
    // What goes with a snapshot, or with the disk, is told before.
    w.ok(["snapshot", "web@s2"]);
    let before = points(&w, "web");
    let told = w.run(["rm", "web@s"]);
    assert!(
        told.stderr.contains("the history of web begins anew"),
        "{}",
        told.stderr
    );
    assert!(points(&w, "web") < before);
    let device = w.ok(["attach", "web", "--mount", s(&m)]);
    fs::write(m.join("more"), vec![7; 1 << 20]).unwrap();
    tool("sync", ["-f", s(&m)]);
    fs::write(m.join("more"), vec![8; 1 << 20]).unwrap();
    w.ok(["detach", &device]);
    w.ok(["snapshot", "web@s3"]);

    w.ok(["fork", "other", "--from", "web@s3"]);
    let held = w.json(["info", "web"])["history_bytes"].as_u64().unwrap();
    assert!(held > 0);
    let all = ["web", "web@s2", "web@s3"];
    let told = w.json([&["rm", "-n"][..], &all].concat())["frees"].as_u64();
    let used = w.stored();
    w.ok([&["rm"][..], &all].concat());
    let freed = used - w.stored();
    assert!(
        told.unwrap().abs_diff(freed) <= 32 << 10,
        "{told:?}, {freed}"
    );
    assert!(freed >= held, "{freed}");
    w.ok(["gc"]);
    assert_eq!(w.json(["gc", "-n"])["bytes"], 0);
    assert_eq!(there("other"), (false, false));
    w.finish();
}

/// How many points are listed.
fn points(w: &World, disk: &str) -> usize {
    let listed = w.json(["ls", "--history", disk]);
    listed["points"].as_array().unwrap().len()
}

/// A filesystem that is written to is forked as it was, and its history goes on; when nobody uses the disk any more it goes back while it is attached.
#[test]
fn an_attached_disk_shows_its_past() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "web", "--from", "base", "--history", "1h,32M"]);
    let (m, m2) = (w.mkdir("m"), w.mkdir("m2"));
    let device = w.ok(["attach", "web", "--mount", s(&m)]);
    let device = device.split_whitespace().next().unwrap().to_string();
    let content = "important\n".repeat(5000);
    fs::write(m.join("report"), &content).unwrap();
    tool("sync", ["-f", s(&m)]);
    let good = format!("#{}", last(&w, "web"));
    fs::remove_file(m.join("report")).unwrap();
    tool("sync", ["-f", s(&m)]);

    // What is overwritten meanwhile is more than the history may hold.
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut rounds = 0u32;
            while !end.load(SeqCst) {
                fs::write(m.join("busy"), vec![rounds as u8; 3 << 20]).unwrap();
                tool("sync", ["-f", s(&m)]);
                rounds += 1;
            }
            rounds
        });
        let fork = w.json([
            "create", "then", "--from", "web", "--at", &good, "--quota", "1G",
        ]);
        let listed = w.json(["ls", "--history", "web"]);
        end.store(true, SeqCst);
        assert!(busy.join().unwrap() > 0);
        assert_eq!(fork["name"], "then");
        assert!(listed["points"].as_array().unwrap().len() > 1);
    });
    assert_eq!(w.json(["info", "then"])["quota"], 1u64 << 30);
    w.ok(["attach", "then", "--mount", s(&m2)]);
    assert_eq!(fs::read_to_string(m2.join("report")).unwrap(), content);
    w.ok(["detach", "then"]);
    assert!(!m.join("report").exists());

    // Back while it is attached, and forth again.
    tool("umount", [s(&m)]);
    let good = format!("#{}", good_point(&w, &device, &m, &content));
    w.fails(
        2,
        &[
            "create", "x", "--from", "web", "--at", &good, "--count", "2",
        ],
    );
    let undone = last(&w, "web");
    let done = w.json(["rewind", "web", "--at", &good]);
    assert!(done["blocks"].as_u64().unwrap() > 0, "{done}");
    tool("mount", [device.as_str(), s(&m)]);
    assert_eq!(fs::read_to_string(m.join("report")).unwrap(), content);
    w.fails_here(11, &["rewind", "web", "--at", &format!("#{undone}")]);
    tool("umount", [s(&m)]);
    w.ok(["rewind", "web", "--at", &format!("#{undone}")]);
    tool("mount", [device.as_str(), s(&m)]);
    assert!(!m.join("report").exists());
    tool("umount", [s(&m)]);
    tool("e2fsck", ["-fn", device.as_str()]);

    // What seals a layer for a while, or puts others in the place of those that keep it, ends it, and says so.
    let out = w.path("out");
    for command in [
        &["export", "-f", "web", s(&out)][..],
        &["flatten", "web"],
        &["squash", "web"],
    ] {
        // What a snapshot keeps of it goes where nobody needs what that stands on, whenever the daemon looks.
        w.ok(["snapshot", "web@first"]);
        good_point(&w, &device, &m, &content);
        w.ok(["snapshot", "web@old"]);
        let before = points(&w, "web");
        assert!(
            before > 1,
            "{command:?}: {:?}\n{}",
            w.json(["ls", "--history", "web"]),
            w.log()
        );
        good_point(&w, &device, &m, &content);
        // How many flushes there were since is the kernel's business.
        let held = points(&w, "web");
        let told = w.run(command).stderr;
        assert!(
            told.contains("the history of web begins anew"),
            "{told}: {before} before the snapshot, {held}, {}\n{}",
            points(&w, "web"),
            w.log()
        );
        let left = points(&w, "web");
        assert!(
            left + before < held + 2,
            "{command:?}: {before} before the snapshot, {held}, {left}"
        );
        let told = w.run(command).stderr;
        assert!(!told.contains("begins anew"), "{told}");
        w.ok(["rm", "web@old", "web@first"]);
        assert_eq!(w.json(["gc", "-n"])["shrunk"], serde_json::json!([]));
    }

    // A setting counts at once.
    w.ok(["resize", "web", "--history", "none"]);
    let error = w.fails_here(12, &["rewind", "web", "--at", "-0.5s"]);
    assert!(error.contains("resize web --history"), "{error}");
    w.ok(["resize", "web", "--history", "10m"]);
    assert_eq!(w.json(["ls", "--history", "web"])["window"], 600);
    let now = format!("#{}", last(&w, "web"));
    w.ok(["rewind", "web", "--at", &now]);
    w.ok(["detach", "web"]);
    w.finish();
}

/// A point at which the report is there, before it is gone again. The disk is attached and not mounted.
fn good_point(w: &World, device: &str, m: &std::path::Path, content: &str) -> u64 {
    tool("mount", [device, s(m)]);
    fs::write(m.join("report"), content).unwrap();
    tool("umount", [s(m)]);
    let good = last(w, "web");
    tool("mount", [device, s(m)]);
    fs::remove_file(m.join("report")).unwrap();
    tool("umount", [s(m)]);
    good
}

/// However old it is: who asks for a point does not let go of it by that.
#[test]
fn what_is_attached_read_only_goes_back_to_any_point_that_it_has() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "web", "--from", "base", "--history", "1s"]);
    let m = w.mkdir("m");
    w.ok(["attach", "web", "--mount", s(&m)]);
    fs::write(m.join("a"), "one").unwrap();
    tool("sync", ["-f", s(&m)]);
    let good = last(&w, "web");
    fs::write(m.join("a"), "two").unwrap();
    tool("sync", ["-f", s(&m)]);
    w.ok(["detach", "web"]);
    let points = || w.json(["ls", "--history", "web"])["points"].clone();
    let kept = points();
    thread::sleep(Duration::from_millis(1500));
    w.ok(["attach", "web", "--ro", "--mount", s(&m)]);
    let at = format!("#{good}");
    // Not while it is used; and that it was asked for changes nothing.
    w.fails_here(11, &["rewind", "web", "--at", &at]);
    assert_eq!(points(), kept);
    tool("umount", [s(&m)]);
    assert_eq!(w.json(["rewind", "web", "--at", &at])["point"], good);
    w.ok(["detach", "web"]);
    w.ok(["attach", "web", "--mount", s(&m)]);
    assert_eq!(fs::read_to_string(m.join("a")).unwrap(), "one");
    w.ok(["detach", "web"]);
    w.finish();
}
