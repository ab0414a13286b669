//! The history of a disk from the outside: a file that was deleted is back.

use crate::rig::*;
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
    w.fails_here(11, &["rewind", "web", "--at", "-90s"]);
    w.fails_here(11, &["create", "x", "--from", "web", "--at", "-90s"]);
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
    // A snapshot is a point of its own, and the history begins anew.
    w.ok(["snapshot", "web@s"]);
    assert_eq!(w.json(["info", "web"])["history_bytes"], 0);
    w.finish();
}
