//! `bench`, at a size that only shows that it works: its figures are of no interest, but that they are all there is, and that nothing
//! is left of a run, however it ends.

use crate::{rig::*, uring::Switch};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// `bench` in a directory of the world.
fn bench(w: &World, args: &[&str]) -> Command {
    let dir = w.mkdir("bench");
    let mut command = w.command(["--json", "bench", "--dir", s(&dir)]);
    command.args(args).env("FORKDISK_BENCH_SIZE", "tiny");
    command
}

/// The run made its own store and took it away, and touched no other.
fn nothing_left(w: &World) {
    let left: Vec<_> = fs::read_dir(w.path("bench")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!w.store.exists());
    w.nothing_left();
}

#[test]
fn a_run_measures_all_rows_and_leaves_nothing() {
    if !root() {
        return;
    }
    let w = World::new();
    let (page, saved) = (w.path("page.html"), w.path("all.json"));
    let picture = w.path("picture.svg");
    let files = [
        "--html",
        s(&page),
        "--svg",
        s(&picture),
        "--save",
        s(&saved),
    ];
    let out = finish({
        let mut command = bench(&w, &["fork", "read", "--vs", "raw"]);
        command.args(files);
        command
    });
    assert_eq!(out.code, 0, "{out:?}");
    nothing_left(&w);
    let document: Value = serde_json::from_str(&out.stdout).expect("one document");
    assert_eq!(document["schema"], 1);
    assert_eq!(document["level"], "tiny");
    let rows = document["rows"].as_array().unwrap();
    let ids: BTreeSet<&str> = rows.iter().map(|r| r["id"].as_str().unwrap()).collect();
    let wanted = [
        "fork.at.1",
        "fork.at.4",
        "fork.batch",
        "fork.bytes",
        "fork.command",
        "fork.first",
        "fork.nth",
        "fork.written",
        "read.random.qd1.cold",
        "read.random.qd1.warm",
        "read.random.qd32.cold",
        "read.random.qd32.warm",
        "read.sequential.cold",
        "read.sequential.warm",
    ];
    assert_eq!(ids, BTreeSet::from(wanted));
    let mut samples = 0;
    for row in rows {
        let id = row["id"].as_str().unwrap();
        let peers = row["peers"].as_array().unwrap();
        let named: BTreeSet<&str> = peers.iter().map(|p| p["peer"].as_str().unwrap()).collect();
        let wanted: &[&str] = match row["group"].as_str() {
            Some("read") if id == "read.random.qd32.cold" => {
                &["cached", "forkdisk", "plain", "raw"]
            }
            Some("read") if id.ends_with(".cold") => {
                &["cached", "cached-loop", "forkdisk", "plain", "raw"]
            }
            Some("read") => &["forkdisk", "plain", "raw"],
            _ => &["forkdisk"],
        };
        assert_eq!(named, wanted.iter().copied().collect(), "{id}");
        for peer in peers {
            let value = |name: &str| peer[name].as_f64().unwrap_or(f64::NAN);
            let (min, median, max) = (value("min"), value("median"), value("max"));
            assert!(0.0 < min && min <= median && median <= max, "{id}: {peer}");
            // Only what raw was measured in is held against raw.
            assert_eq!(peer["ratio"].is_number(), row["group"] == "read", "{id}");
            samples += peer["samples"].as_array().unwrap().len();
        }
    }
    assert_eq!(document["samples"], samples);
    // The file holds the same, and the page tells of every row.
    let again: Value = serde_json::from_slice(&fs::read(&saved).unwrap()).unwrap();
    assert_eq!(again, document);
    let page = fs::read_to_string(&page).unwrap();
    assert_eq!(page.matches("<svg").count(), rows.len());
    // The picture shows a mark of ours for each row that raw is in, beside that of the legend.
    let picture = fs::read_to_string(&picture).unwrap();
    let with_raw = rows.iter().filter(|row| row["group"] == "read").count();
    let marks = picture.matches("<circle class=\"ours\"").count();
    assert_eq!(marks, with_raw + 1, "{picture}");
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    if !root() {
        return;
    }
    let w = World::new();
    // While there is nothing, while the base is made or a peer set up, while something is attached.
    for wait in [0, 300, 2000] {
        let page = w.path("page.html");
        let mut command = Command::new(BIN);
        command
            .args(["--json", "bench", "write", "--vs", "raw", "--dir"])
            .arg(w.mkdir("bench"))
            .arg("--html")
            .arg(&page)
            .env("FORKDISK_BENCH_SIZE", "tiny")
            .env("FORKDISK_STORE", &w.store)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        // It catches signals from the moment it made the page's file.
        eventually("it begins", || page.exists());
        thread::sleep(Duration::from_millis(50 + wait));
        assert!(kill(child.id() as i32, "TERM"));
        let out: Out = child.wait_with_output().unwrap().into();
        assert_eq!(out.code, 130, "{out:?}");
        assert_eq!(out.stdout, "");
        let error: Value = serde_json::from_str(&out.stderr).expect("one document");
        assert_eq!(error["error"]["code"], "interrupted");
        assert!(!page.exists(), "an empty page is left");
        nothing_left(&w);
    }
}

#[test]
fn the_next_run_takes_away_what_a_killed_one_left() {
    if !root() {
        return;
    }
    let w = World::new();
    let dir = w.mkdir("bench");
    let mut command = Command::new(BIN);
    command
        .args(["-q", "bench", "write", "--vs", "raw", "--dir", s(&dir)])
        .env("FORKDISK_BENCH_SIZE", "tiny")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    eventually("something is attached", || w.loops().len() > 1);
    child.kill().unwrap();
    child.wait().unwrap();
    // What it was waiting for ends by itself; its daemon and its devices stay.
    assert!(!w.loops().is_empty() && !w.processes().is_empty());
    let out = finish(bench(&w, &["sharing", "--vs", "raw"]));
    assert_eq!(out.code, 0, "{out:?}");
    nothing_left(&w);
}

#[test]
fn the_other_door_is_measured_where_the_kernel_offers_it() {
    if !root() {
        return;
    }
    for on in [true, false] {
        let Some(_switch) = Switch::set(on) else {
            continue;
        };
        let w = World::new();
        // Forks are the same whatever door they are used by.
        let what = if on { "write" } else { "fork" };
        let out = finish(bench(&w, &[what, "--vs", "raw,io_uring"]));
        assert_eq!(out.code, 0, "{out:?}");
        nothing_left(&w);
        let document: Value = serde_json::from_str(&out.stdout).expect("one document");
        let rows = document["rows"].as_array().unwrap();
        for row in rows {
            let peers = row["peers"].as_array().unwrap();
            let measured = peers.iter().any(|p| p["peer"] == "io_uring");
            let timed = row["id"].as_str().unwrap().starts_with("write.");
            assert!(measured == on || on && !timed, "{row}");
        }
        let notes = document["peers"].as_array().unwrap();
        let note = notes.iter().find(|p| p["id"] == "io_uring").unwrap();
        let left_out = note["notes"].to_string().contains("left out");
        assert_eq!(left_out, !on, "{note}");
    }
}
