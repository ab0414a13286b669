//! Snapshots of a mounted, busy disk at a steady pace: no error, every snapshot holds what was acknowledged before it, and the writer's latency stays what it was.
//!
//! The suite takes snapshots for a few seconds; `FORKDISK_LIVE_SECONDS` asks for more (`tools/live`), and `FORKDISK_FIGURES=FILE` for a document
//! with what was seen.

use crate::rig::*;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

fn seconds() -> u64 {
    std::env::var("FORKDISK_LIVE_SECONDS").map_or(4, |n| n.parse().expect("a number"))
}

/// A writer that counts: each number is written and synced before the next.
struct Counter {
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// When each write began, since the start, and how long it took with its sync.
    thread: Option<thread::JoinHandle<Vec<(Duration, Duration)>>>,
}

impl Counter {
    fn start(path: PathBuf) -> Counter {
        let (acknowledged, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (seen, end) = (acknowledged.clone(), stop.clone());
        let file = File::create(path).unwrap();
        let thread = thread::spawn(move || {
            let started = Instant::now();
            let mut latencies = Vec::new();
            for n in 1u64.. {
                if end.load(SeqCst) {
                    break;
                }
                let begun = Instant::now();
                file.write_all_at(&n.to_le_bytes(), n % 512 * 4096)
                    .expect("a write while snapshots are taken");
                file.sync_data().expect("a sync while snapshots are taken");
                latencies.push((begun - started, begun.elapsed()));
                seen.store(n, SeqCst);
                thread::sleep(Duration::from_millis(1));
            }
            latencies
        });
        Counter {
            acknowledged,
            stop,
            thread: Some(thread),
        }
    }
    fn finish(mut self) -> Vec<(Duration, Duration)> {
        self.stop.store(true, SeqCst);
        self.thread.take().unwrap().join().expect("the counter")
    }
}

/// The largest number in a counter's file.
fn counted(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    let numbers = bytes
        .chunks(4096)
        .map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()));
    numbers.max().unwrap_or(0)
}

fn millis(latencies: impl Iterator<Item = Duration>) -> Value {
    let mut all: Vec<Duration> = latencies.collect();
    all.sort();
    let at = |part: f64| {
        let at = ((all.len() as f64 * part).ceil() as usize).clamp(1, all.len()) - 1;
        (all[at].as_secs_f64() * 1e5).round() / 100.0
    };
    json!({"p50": at(0.5), "p99": at(0.99), "max": at(1.0)})
}

/// Ten snapshots a second under fio with verify and a writer that syncs.
#[test]
fn snapshots_at_a_steady_pace() {
    if !root() {
        return;
    }
    let w = World::new();
    w.import_ext4("base", 1024);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let mut fio = Command::new("fio");
    fio.args(["--name=verify", "--rw=randwrite", "--bs=4k", "--size=64M"])
        .args(["--iodepth=4", "--ioengine=libaio", "--direct=1"])
        .args([
            "--verify=crc32c",
            "--verify_backlog=256",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args(["--time_based", "--runtime=3600", "--rate_iops=1000"])
        .args(["--output-format=json", "--fsync=100"])
        .arg(format!("--directory={}", m.display()))
        .arg(format!("--output={}", w.path("fio.json").display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let fio = w.child(fio);
    let counter = Counter::start(m.join("counter"));
    eventually("the writer works", || {
        counter.acknowledged.load(SeqCst) > 10
    });
    // What it is like without.
    thread::sleep(Duration::from_secs(seconds().div_ceil(4)));
    let calm = counter.acknowledged.load(SeqCst);
    let begun = Instant::now();
    let (mut taken, mut commands) = (Vec::new(), Vec::new());
    while begun.elapsed() < Duration::from_secs(seconds()) {
        let due = begun + Duration::from_millis(100) * taken.len() as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let before = counter.acknowledged.load(SeqCst);
        let name = format!("d@s{}", taken.len());
        let started = Instant::now();
        w.ok(["snapshot", &name]);
        commands.push(started.elapsed());
        taken.push((name, before));
        assert!(
            alive(fio),
            "fio ended: {}",
            fs::read_to_string(w.path("fio.json")).unwrap_or_default()
        );
    }
    let latencies = counter.finish();
    assert!(kill(fio, "INT"));
    eventually("fio ends", || !alive(fio));
    let report = fs::read_to_string(w.path("fio.json")).unwrap();
    let report: Value = serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "fio: {job}");
    assert!(job["write"]["total_ios"].as_u64().unwrap() > 0);
    // Some of them, as they come back.
    let dir = w.mkdir("snap");
    for (name, before) in taken.iter().step_by((taken.len() / 4).max(1)) {
        let fork = format!("fork-{}", &name[3..]);
        w.ok(["create", &fork, "--from", name]);
        w.ok(["attach", &fork, "--mount", s(&dir)]);
        let found = counted(&dir.join("counter"));
        assert!(
            found >= *before,
            "{name}: {before} was acknowledged before it, {found} is in it"
        );
        w.ok(["detach", &fork]);
    }
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "d"]);
    tool("e2fsck", ["-fn", &device]);
    w.ok(["detach", "d"]);
    let (quiet, busy) = latencies.split_at(calm as usize);
    let half = busy.len() / 2;
    let of = |part: &[(Duration, Duration)]| millis(part.iter().map(|l| l.1));
    let document = json!({
        "test": "live", "snapshots": taken.len(), "errors": 0, "writes": latencies.len(),
        "fio_ios": job["write"]["total_ios"], "command_ms": millis(commands.into_iter()),
        "write_sync_ms": {"without": of(quiet), "first_half": of(&busy[..half]), "second_half": of(&busy[half..])},
    });
    eprintln!("{document}");
    if let Ok(path) = std::env::var("FORKDISK_FIGURES") {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        writeln!(file, "{document}").unwrap();
    }
    w.finish();
}
