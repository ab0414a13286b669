//! What is read, written and shared, as commands and the control socket tell it.

use crate::rig::*;
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::Stdio,
};

fn dd(input: &str, output: &str, more: &[&str]) {
    let fixed = [
        format!("if={input}"),
        format!("of={output}"),
        "bs=64k".to_string(),
        "status=none".to_string(),
    ];
    let more = more.iter().map(|m| m.to_string());
    tool("dd", fixed.into_iter().chain(more));
}

fn disk(document: &Value, name: &str) -> Value {
    let all = document["disks"].as_array().unwrap();
    let found = all.iter().find(|d| d["name"] == name);
    found.unwrap_or_else(|| panic!("{document}")).clone()
}

#[test]
fn what_a_disk_reads_and_writes_is_counted() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("full.img", &noise(3, 16 << 20));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["create", "rest", "--from", "base"]);
    let nothing = w.json(["stats"]);
    assert!(nothing["daemon"].is_null());
    assert_eq!(nothing["disks"].as_array().unwrap().len(), 0);
    let device = w.ok(["attach", "d"]);
    let data = w.file("data", &noise(4, 4 << 20));
    dd(s(&data), &device, &["oflag=direct", "conv=fsync"]);
    dd(&device, "/dev/null", &["iflag=direct", "count=128"]);
    let now = w.json(["stats"]);
    let d = disk(&now, "d");
    let number =
        |d: &Value, field: &str| d[field].as_u64().unwrap_or_else(|| panic!("{field}: {d}"));
    assert_eq!(number(&d, "written_bytes"), 4 << 20);
    assert!(number(&d, "read_bytes") >= 8 << 20, "{d}");
    assert!(number(&d, "read_from_own") >= 4 << 20, "{d}");
    assert!(number(&d, "read_from_base") >= 4 << 20, "{d}");
    assert!(number(&d, "write_requests") >= 16 && number(&d, "flushes") >= 1);
    assert_eq!(number(&d, "private_bytes"), 4 << 20);
    let host = number(&d, "host_written_bytes");
    assert!((4 << 20..6 << 20).contains(&host), "{d}");
    let amplification = d["amplification"].as_f64().unwrap();
    assert!((amplification - host as f64 / (4 << 20) as f64).abs() < 0.01);
    assert_eq!(number(&d, "total_written_bytes"), 4 << 20);
    assert_eq!((number(&d, "dirty_blocks"), number(&d, "depth")), (0, 1));
    let base = &now["bases"][0];
    assert_eq!(base["id"], d["base_id"]);
    assert_eq!(
        (base["attached"].clone(), base["length"].clone()),
        (1.into(), (16 << 20).into())
    );
    assert!(number(&now["daemon"], "written_bytes") >= 4 << 20);

    // The ways of showing it.
    let text = w.ok(["stats", "d"]);
    assert!(
        text.contains("written to the host") && text.contains("4.0 MiB"),
        "{text}"
    );
    let row = w.ok(["stats", "-H", "-p", "-o", "name,written,private,total"]);
    assert_eq!(row, format!("d\t{0}\t{0}\t{0}", 4 << 20));
    assert!(w.ok(["stats"]).starts_with("NAME"));
    assert!(
        w.fails_here(2, &["stats", "-o", "nothing"])
            .contains("the columns are")
    );
    w.fails_here(12, &["stats", "nothing"]);
    let all = w.ok(["stats", "--all", "-H", "-o", "name,reads,total"]);
    assert!(all.lines().any(|l| l == "rest\t-\t0 B"), "{all}");

    // The same over the control socket, as anybody can ask for it.
    let socket = w.status()["socket"].as_str().unwrap().to_string();
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"{\"op\":\"metrics\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    let metrics = said["metrics"].as_str().unwrap();
    let sample = format!(
        "forkdisk_disk_written_bytes_total{{disk=\"d\"}} {}",
        4 << 20
    );
    let has = |text: &str| text.lines().any(|l| l == sample);
    assert!(has(metrics), "{metrics}");
    let printed = w.ok(["stats", "--prometheus"]);
    assert!(
        has(&printed) && printed.contains("forkdisk_up 1\n"),
        "{printed}"
    );
    let heads = |text: &str| text.lines().filter(|l| l.starts_with('#')).count();
    assert_eq!(heads(&printed), heads(metrics));

    // A new count after each attachment; the disk keeps its own.
    w.ok(["detach", "d"]);
    let rest = disk(&w.json(["stats", "d"]), "d");
    assert_eq!(rest["attached"], false);
    assert!(rest["written_bytes"].is_null());
    assert_eq!(number(&rest, "total_written_bytes"), 4 << 20);
    assert!(number(&rest, "total_host_written_bytes") >= host);
    let device = w.ok(["attach", "d"]);
    let again = disk(&w.json(["stats", "d"]), "d");
    assert_eq!(number(&again, "written_bytes"), 0);
    assert_eq!(number(&again, "total_written_bytes"), 4 << 20);
    assert!(again["amplification"].is_null());
    // A successor counts on what was written over the disk's life, and anew what it does itself.
    dd(s(&data), &device, &["oflag=direct", "conv=fsync"]);
    let before = disk(&w.json(["stats", "d"]), "d");
    kill_and_wait(w.pid("server_pid"));
    let after = disk(&w.json(["stats", "d"]), "d");
    for d in [&before, &after] {
        assert_eq!(number(d, "total_written_bytes"), 8 << 20);
    }
    let total = "total_host_written_bytes";
    assert!(number(&after, total) >= number(&before, total), "{after}");
    assert!(number(&after, "host_written_bytes") < 1 << 20, "{after}");
    w.ok(["detach", "d"]);
    let rest = disk(&w.json(["stats", "d"]), "d");
    assert_eq!(number(&rest, "total_written_bytes"), 8 << 20);
    // They are of the disk's life, whatever layer it writes into; a fork has its own.
    let totals = |name: &str, written: u64, host: u64| {
        let now = disk(&w.json(["stats", name]), name);
        assert_eq!(number(&now, "total_written_bytes"), written << 20, "{now}");
        assert!(number(&now, total) >= host, "{now}");
        number(&now, total)
    };
    let host = totals("d", 8, 8 << 20);
    w.ok(["snapshot", "d@rest"]);
    let host = totals("d", 8, host);
    let device = w.ok(["attach", "d"]);
    let host = totals("d", 8, host);
    w.ok(["snapshot", "d@live"]);
    let host = totals("d", 8, host);
    dd(s(&data), &device, &["oflag=direct"]);
    w.ok(["commit", "d", "image"]);
    let host = totals("d", 12, host);
    kill_and_wait(w.pid("server_pid"));
    let host = totals("d", 12, host);
    dd(s(&data), &device, &["oflag=direct"]);
    w.ok(["rollback", "d@live"]);
    let host = totals("d", 16, host);
    w.ok(["detach", "d"]);
    w.ok(["rollback", "d@rest"]);
    let host = totals("d", 16, host);
    w.ok(["squash", "d@live"]);
    w.ok(["flatten", "d"]);
    totals("d", 16, host);
    totals("d@live", 8, 8 << 20);
    w.ok(["fork", "e", "--from", "d@rest"]);
    assert!(totals("e", 0, 0) < 1 << 20);
    // What was acknowledged and never flushed is known after the death of a server, and after a takeover; the count of the attachment begins anew.
    w.ok(["create", "f", "--from", "base", "--history", "1h"]);
    let device = w.ok(["attach", "f"]);
    dd(s(&data), &device, &["oflag=direct"]);
    let host = totals("f", 4, 4 << 20);
    let began = disk(&w.json(["stats", "f"]), "f")["since"].as_u64();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    kill_and_wait(w.pid("server_pid"));
    let host = totals("f", 4, host);
    assert!(disk(&w.json(["stats", "f"]), "f")["since"].as_u64() > began);
    dd(s(&data), &device, &["oflag=direct"]);
    w.ok(["daemon", "takeover"]);
    totals("f", 8, host);
    w.ok(["detach", "f"]);
    totals("f", 8, host);
    // A fork of an earlier point was written to by nobody.
    let points = w.json(["ls", "--history", "f"]);
    let last = points["points"].as_array().unwrap().last().unwrap()["point"].clone();
    w.ok(["create", "g", "--from", "f", "--at", &format!("#{last}")]);
    totals("g", 0, 0);
    w.finish();
    assert!(w.ok(["stats", "--prometheus"]).contains("forkdisk_up 0"));
}

#[test]
fn stats_go_on_until_they_are_interrupted() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    let data = w.file("data", &noise(4, 1 << 20));
    dd(s(&data), &device, &["oflag=direct"]);
    let mut command = std::process::Command::new(BIN);
    command
        .args([
            "-S",
            s(&w.store),
            "stats",
            "-i",
            "1",
            "-H",
            "-p",
            "-o",
            "name,written",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert_eq!(next(), format!("d\t{}", 1 << 20));
    // From then on what came since.
    assert_eq!(next(), "d\t0");
    dd(s(&data), &device, &["oflag=direct", "count=1"]);
    let mut came = 0;
    while came == 0 {
        came = next().trim_start_matches("d\t").parse().unwrap();
    }
    assert_eq!(came, 64 << 10);
    assert!(kill(child.id() as i32, "INT"));
    assert_eq!(child.wait().unwrap().code(), Some(130));
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn for_scripts_there_are_tabs_and_exact_numbers() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.file("full.img", &noise(3, 4 << 20));
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base", "--size", "8M"]);
    let device = w.ok(["attach", "d"]);
    let data = w.file("data", &noise(4, 64 << 10));
    dd(s(&data), &device, &["oflag=direct", "conv=fsync", "seek=2"]);
    w.ok(["detach", "d"]);
    // A layer between that has no name.
    w.ok(["create", "e", "--from", "d"]);
    let layers = w.ok(["ls", "layers", "-H", "-p", "-o", "id,names"]);
    let unnamed = layers.lines().find_map(|l| l.strip_suffix('\t'));
    let id = unnamed.expect("a layer without a name");

    let du = w.ok(["du", "-H", "-p"]);
    let row = du.lines().find(|l| l.starts_with("e\t")).unwrap();
    let cells: Vec<&str> = row.split('\t').collect();
    assert_eq!(cells.len(), 5, "{row}");
    assert_eq!(
        &cells[..3],
        ["e", &(8 << 20).to_string(), &(4 << 20).to_string()]
    );
    assert_eq!(du.lines().count(), 3);
    assert!(w.ok(["du", "-p"]).contains(&format!("{}", 4 << 20)));

    let map = w.ok(["map", "-H", "-p", "e"]);
    let rows: Vec<Vec<&str>> = map.lines().map(|l| l.split('\t').collect()).collect();
    assert!(rows.iter().all(|r| r.len() == 7), "{map}");
    let owned = rows.iter().find(|r| r[2] == "layer").expect("the layer's");
    assert_eq!(&owned[..2], ["131072", "65536"], "{map}");
    assert_eq!((owned[3], owned[4], owned[5]), (id, id, "1"), "the owner");
    assert!(rows.iter().any(|r| r[2] == "base" && r[3] == "base"));
    let last = rows.last().unwrap();
    assert_eq!((last[2], last[3]), ("absent", "-"));
    let mut at = 0;
    for row in &rows {
        assert_eq!(row[0].parse::<u64>().unwrap(), at, "no gap: {map}");
        at += row[1].parse::<u64>().unwrap();
    }
    assert_eq!(at, 8 << 20);

    let tree = w.ok(["tree", "-H", "-p"]);
    let rows: Vec<Vec<&str>> = tree.lines().map(|l| l.split('\t').collect()).collect();
    assert!(rows.iter().all(|r| r.len() == 9), "{tree}");
    let row = |name: &str| rows.iter().find(|r| r[1] == name).unwrap();
    assert_eq!((row("base")[0], row("e")[0]), ("0", "2"));
    let between = rows.iter().find(|r| r[7] == id).expect("it is shown");
    assert_eq!(
        (between[0], between[1], between[2], between[4]),
        ("1", "-", "layer", "65536")
    );
    assert_eq!(row("e")[8], id);

    let ls = w.ok(["ls", "-H", "-p", "-o", "name,quota,written,depth"]);
    assert!(ls.lines().any(|l| l == "e\t\t0\t2"), "{ls}");

    // By the beginning of its id it can be looked at, and nothing else.
    let short = &id[..12];
    let info = w.json(["info", short]);
    assert_eq!(
        (info["id"].as_str(), info["kind"].as_str()),
        (Some(id), Some("layer"))
    );
    assert_eq!(info["private_bytes"], 65536);
    assert!(w.ok(["map", short]).contains(id.get(..12).unwrap()));
    assert_eq!(w.run(["check", short]).code, 0);
    let out = w.path("out");
    w.ok(["export", short, s(&out)]);
    let mut expected = noise(3, 4 << 20);
    expected.resize(8 << 20, 0);
    expected[128 << 10..192 << 10].copy_from_slice(&noise(4, 64 << 10));
    assert!(fs::read(&out).unwrap() == expected);
    w.fails(12, &["rm", short]);
    w.fails(12, &["create", "x", "--from", short]);
    w.fails_here(12, &["attach", short]);
    w.finish();
}

/// Holes of an image take no space in a copy of a disk either: `map` tells them from data, and so does the file that a disk is shown as.
#[test]
fn holes_of_an_image_are_told_from_its_data() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", 8 << 20);
    let data = w.file("data", &noise(5, 64 << 10));
    // Data in the middle, and one byte in the last block.
    dd(s(&data), s(&image), &["conv=notrunc", "bs=64K", "seek=16"]);
    dd(
        s(&data),
        s(&image),
        &["conv=notrunc", "bs=1", "count=1", "seek=8388607"],
    );
    w.ok(["import", s(&image), "base"]);
    w.ok(["create", "d", "--from", "base", "--size", "9M"]);
    let file = w.ok(["attach", "d", "--via", "file"]);
    let file = std::path::PathBuf::from(file.trim_end());
    // A block of its own in a hole.
    dd(
        s(&data),
        s(&file),
        &["conv=notrunc,fsync", "bs=4K", "count=1", "seek=100"],
    );

    let map = w.json(["map", "d"]);
    let extents: Vec<_> = map["extents"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            assert_eq!(e["zero"].as_bool(), e["data"].as_bool().map(|d| !d), "{e}");
            let number = |name: &str| e[name].as_u64().unwrap();
            (
                e["type"].as_str().unwrap().to_string(),
                number("start"),
                number("length"),
                e["data"].as_bool().unwrap(),
            )
        })
        .collect();
    let of = |kind: &str, from: u64, to: u64, data| (kind.to_string(), from, to - from, data);
    let (mib, end) = (1 << 20, 8 << 20);
    assert_eq!(
        extents,
        [
            of("base", 0, 409_600, false),
            of("layer", 409_600, 413_696, true),
            of("base", 413_696, mib, false),
            of("base", mib, mib + 65_536, true),
            of("base", mib + 65_536, end - 4096, false),
            of("base", end - 4096, end, true),
            of("absent", end, 9 << 20, false),
        ]
    );
    // What `cp --sparse`, `qemu-img convert` and others ask.
    let open = fs::File::open(&file).unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&open, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&open, rustix::fs::SeekFrom::Hole(data)).unwrap();
        found.push((data, at));
    }
    let wanted = [(409_600, 413_696), (mib, mib + 65_536), (end - 4096, end)];
    assert_eq!(found, wanted);
    drop(open);
    w.ok(["detach", "d"]);

    // A flattened disk and an exported one have the same bytes, and the same holes.
    w.ok(["flatten", "d"]);
    let out = w.path("out");
    w.ok(["export", "d", s(&out)]);
    let mut want = fs::read(&image).unwrap();
    want.resize(9 << 20, 0);
    want[409_600..413_696].copy_from_slice(&noise(5, 64 << 10)[..4096]);
    assert!(fs::read(&out).unwrap() == want);
    assert!(du(&out) < 128 << 10, "{}", du(&out));
    let data: u64 = w.json(["map", "d"])["extents"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["data"] == true)
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    assert_eq!(data, 4096 + 65_536 + 4096);
    w.finish();
}
