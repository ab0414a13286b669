//! The daemon dies and is upgraded under mounted, busy disks: nobody who uses them sees more than a pause.
//!
//! The suite runs a few rounds; `FORKDISK_KILLS`, `FORKDISK_UPGRADES` and `FORKDISK_ROUNDS` ask for more (`tools/takeover`, `tools/crash-daemon`), and
//! `FORKDISK_FIGURES=FILE` for a document with what was seen.

use crate::rig::*;
use serde_json::json;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |n| n.parse().expect(name))
}

/// Adds a document to the file of figures, if one is asked for.
fn figures(document: &serde_json::Value) {
    eprintln!("{document}");
    if let Ok(path) = std::env::var("FORKDISK_FIGURES") {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        writeln!(file, "{document}").unwrap();
    }
}

fn random(below: u64) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) % below
}

/// A database that a child works on: one transaction after the other, each acknowledged by the number it inserted.
struct Sqlite {
    child: Child,
    acknowledged: Arc<AtomicU64>,
    reader: Option<thread::JoinHandle<Vec<String>>>,
    stop: Arc<AtomicBool>,
    writer: Option<thread::JoinHandle<()>>,
}

impl Sqlite {
    fn start(db: &Path) -> Sqlite {
        let mut child = Command::new("sqlite3")
            .args(["-batch", "-bail", s(db)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = child.stdout.take().unwrap();
        let (acknowledged, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (seen, end) = (acknowledged.clone(), stop.clone());
        let reader = thread::spawn(move || {
            let mut odd = Vec::new();
            for line in BufReader::new(output).lines() {
                match line.unwrap().parse::<u64>() {
                    Ok(n) => seen.store(n, SeqCst),
                    Err(_) => odd.push("?".to_string()),
                }
            }
            odd
        });
        let behind = acknowledged.clone();
        let writer = thread::spawn(move || {
            let begin = "PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, b BLOB);\n";
            let _ = input.write_all(begin.as_bytes());
            for n in 1.. {
                if end.load(SeqCst) {
                    break;
                }
                // One transaction, durable before the number is printed.
                let line = format!("INSERT INTO t VALUES ({n}, randomblob(3000)); SELECT {n};\n");
                if input.write_all(line.as_bytes()).is_err() {
                    break;
                }
                while behind.load(SeqCst) + 4 < n && !end.load(SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Sqlite {
            child,
            acknowledged,
            reader: Some(reader),
            stop,
            writer: Some(writer),
        }
    }
    /// Ends it in order; transactions acknowledged.
    fn finish(mut self) -> u64 {
        self.stop.store(true, SeqCst);
        self.writer.take().unwrap().join().unwrap();
        let out = self.child.wait_with_output().unwrap();
        let odd = self.reader.take().unwrap().join().unwrap();
        assert!(odd.is_empty(), "{odd:?}");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && said.is_empty(), "sqlite: {said}");
        self.acknowledged.load(SeqCst)
    }
}

fn sqlite(db: &Path, sql: &str) -> String {
    tool("sqlite3", ["-batch", s(db), sql]).trim().to_string()
}

/// Longest wait of a small direct write and its fsync, since it was last asked for.
struct Probe {
    longest: Arc<Mutex<Duration>>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<u64>>,
}

impl Probe {
    fn start(path: PathBuf) -> Probe {
        let longest = Arc::new(Mutex::new(Duration::ZERO));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, end) = (longest.clone(), stop.clone());
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let thread = thread::spawn(move || {
            let file = File::options()
                .read(true)
                .write(true)
                .custom_flags(0o40000)
                .open(path)
                .unwrap();
            // Direct I/O wants an aligned buffer.
            let mut memory = vec![0u8; 8192];
            let shift = memory.as_ptr().align_offset(4096);
            let mut n = 0u64;
            while !end.load(SeqCst) {
                let begun = Instant::now();
                let block = &mut memory[shift..shift + 4096];
                let at = n % 200 * 4096;
                block.fill(n as u8);
                file.write_all_at(block, at)
                    .expect("a write while servers come and go");
                if n.is_multiple_of(8) {
                    file.sync_data()
                        .expect("an fsync while servers come and go");
                }
                block.fill(0);
                file.read_exact_at(block, at)
                    .expect("a read while servers come and go");
                assert!(
                    block.iter().all(|&b| b == n as u8),
                    "write {n} reads as something else"
                );
                let mut longest = seen.lock().unwrap();
                *longest = (*longest).max(begun.elapsed());
                drop(longest);
                n += 1;
                thread::sleep(Duration::from_millis(1));
            }
            n
        });
        Probe {
            longest,
            stop,
            thread: Some(thread),
        }
    }
    fn longest(&self) -> Duration {
        std::mem::take(&mut self.longest.lock().unwrap())
    }
    fn finish(mut self) -> u64 {
        self.stop.store(true, SeqCst);
        self.thread.take().unwrap().join().expect("the probe")
    }
}

fn millis(all: &mut [Duration], part: f64) -> f64 {
    all.sort();
    let at = ((all.len() as f64 * part).ceil() as usize).clamp(1, all.len()) - 1;
    (all[at].as_secs_f64() * 1e5).round() / 100.0
}

/// The same workloads while the daemon is killed and upgraded: zero errors, zero mismatches.
#[test]
fn killed_and_upgraded_under_mounted_disks() {
    if !root() {
        return;
    }
    let (kills, upgrades) = (number("FORKDISK_KILLS", 6), number("FORKDISK_UPGRADES", 2));
    let w = World::new();
    w.import_ext4("base", 1024);
    w.ok(["create", "d", "--from", "base", "--count", "2"]);
    let (a, b) = (w.mkdir("a"), w.mkdir("b"));
    w.ok(["attach", "d-1", "--mount", s(&a)]);
    w.ok(["attach", "d-2", "--mount", s(&b)]);
    let keeper = w.pid("keeper_pid");
    // Another program, to be upgraded to.
    let programs = [w.path("new/forkdisk"), w.path("newer/forkdisk")];
    for program in &programs {
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::copy(BIN, program).unwrap();
    }
    let mut fio = Command::new("fio");
    fio.args([
        "--name=verify",
        "--rw=randrw",
        "--rwmixread=30",
        "--bsrange=512-64k",
        "--bs_unaligned=0",
        "--blockalign=512",
    ])
    .args([
        "--size=96M",
        "--numjobs=2",
        "--iodepth=16",
        "--ioengine=libaio",
        "--direct=1",
        "--fsync=200",
    ])
    .args([
        "--verify=crc32c",
        "--verify_backlog=256",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ])
    .args([
        "--time_based",
        "--runtime=3600",
        "--rate=12m",
        "--output-format=json",
    ])
    .arg(format!("--directory={}", a.display()))
    .arg(format!("--output={}", w.path("fio.json").display()))
    .stdout(Stdio::null())
    .stderr(Stdio::null());
    let fio = w.child(fio);
    let db = Sqlite::start(&b.join("db"));
    let probe = Probe::start(b.join("probe"));
    eventually("the database works", || db.acknowledged.load(SeqCst) > 10);
    let (mut killed, mut upgraded) = (0, 0);
    let (mut pauses, mut upgrade_pauses) = (Vec::new(), Vec::new());
    while killed < kills || upgraded < upgrades {
        thread::sleep(Duration::from_millis(150 + random(350)));
        assert!(
            alive(fio),
            "fio ended: {}",
            fs::read_to_string(w.path("fio.json")).unwrap_or_default()
        );
        probe.longest();
        let before = db.acknowledged.load(SeqCst);
        let upgrade = upgraded < upgrades && killed * upgrades >= upgraded * kills.max(1);
        if upgrade {
            let program = &programs[upgraded as usize % 2];
            let out = Command::new("timeout")
                .args([
                    "60",
                    s(program),
                    "-S",
                    s(&w.store),
                    "--json",
                    "daemon",
                    "takeover",
                ])
                .output()
                .unwrap();
            assert!(out.status.success(), "{out:?}\n{}", w.log());
            upgraded += 1;
            assert_eq!(w.status()["program"], s(program));
        } else {
            // With a request of a command under way now and then.
            let server = w.pid("server_pid");
            thread::sleep(Duration::from_millis(random(20)));
            assert!(kill(server, "KILL"));
            killed += 1;
        }
        eventually(&format!("work goes on\n{}", w.log()), || {
            db.acknowledged.load(SeqCst) > before + 2
        });
        thread::sleep(Duration::from_millis(100));
        let pause = probe.longest();
        if upgrade {
            &mut upgrade_pauses
        } else {
            &mut pauses
        }
        .push(pause);
        if killed == kills / 2 && killed > 0 {
            // Commands find the daemon as before.
            w.run(["snapshot", &format!("d-2@at-{upgraded}-{killed}")]);
        }
    }
    assert_eq!(w.pid("keeper_pid"), keeper);
    assert_eq!(w.status()["takeovers"], kills + upgrades);
    let writes = probe.finish();
    let transactions = db.finish();
    assert!(kill(fio, "INT"));
    eventually("fio ends", || !alive(fio));
    let report = fs::read_to_string(w.path("fio.json")).unwrap();
    let report: serde_json::Value =
        serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
    let mut ios = 0;
    for job in report["jobs"].as_array().unwrap() {
        assert_eq!(job["error"], 0, "fio: {job}");
        assert_eq!(job["total_err"].as_u64().unwrap_or(0), 0);
        ios += job["read"]["total_ios"].as_u64().unwrap()
            + job["write"]["total_ios"].as_u64().unwrap();
    }
    assert!(ios > 0);
    let db = b.join("db");
    assert_eq!(sqlite(&db, "PRAGMA integrity_check"), "ok");
    let rows: u64 = sqlite(&db, "SELECT count(*) FROM t").parse().unwrap();
    assert!(
        rows >= transactions,
        "{transactions} transactions were acknowledged, {rows} are there"
    );
    let devices = [w.device_of("d-1"), w.device_of("d-2")];
    for m in [&a, &b] {
        tool("umount", [s(m)]);
    }
    for device in &devices {
        tool("e2fsck", ["-fn", device]);
    }
    w.ok(["detach", "d-1", "d-2"]);
    figures(&json!({
        "test": "takeover", "kills": killed, "upgrades": upgraded, "fio_ios": ios, "probe_writes": writes,
        "transactions": transactions, "errors": 0, "mismatches": 0,
        "kill_pause_ms": {"p50": millis(&mut pauses, 0.5), "p99": millis(&mut pauses, 0.99), "max": millis(&mut pauses, 1.0)},
        "upgrade_pause_ms": {"p50": millis(&mut upgrade_pauses, 0.5), "max": millis(&mut upgrade_pauses, 1.0)},
    }));
    w.finish();
}

/// A file that was written and synced: its number, the seed of its contents, its length.
#[derive(Clone, Copy)]
struct Synced {
    seed: u64,
    len: usize,
}

/// Writes files into a ring of names and syncs each, until it fails or is told to stop. What is acknowledged goes into `done`; the file that is
/// being written is named by `busy`.
fn write_files(
    dir: &Path,
    done: &Mutex<Vec<Option<Synced>>>,
    busy: &AtomicU64,
    stop: &AtomicBool,
    seed: &AtomicU64,
) {
    while !stop.load(SeqCst) {
        let seed = seed.fetch_add(1, SeqCst);
        let slot = seed as usize % done.lock().unwrap().len();
        let len = 1 + (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as usize % 300_000;
        busy.store(slot as u64, SeqCst);
        done.lock().unwrap()[slot] = None;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(dir.join(format!("f{slot}")))?;
            file.write_all(&noise(seed, len))?;
            file.sync_all()
        };
        if write().is_err() {
            return;
        }
        done.lock().unwrap()[slot] = Some(Synced { seed, len });
        busy.store(u64::MAX, SeqCst);
    }
}

fn all_there(dir: &Path, done: &[Option<Synced>], story: &str) -> u64 {
    let mut bytes = 0;
    for (slot, synced) in done.iter().enumerate() {
        let Some(synced) = synced else { continue };
        let found = fs::read(dir.join(format!("f{slot}")))
            .unwrap_or_else(|e| panic!("{story}: file {slot}: {e}"));
        assert!(
            found == noise(synced.seed, synced.len),
            "{story}: file {slot} is not what was synced"
        );
        bytes += found.len() as u64;
    }
    bytes
}

/// SIGKILL at random moments, of the server alone or of the whole daemon. All that an fsync acknowledged is there, the store is sound, the
/// filesystem is clean.
#[test]
fn killed_at_random_moments() {
    if !root() {
        return;
    }
    let rounds = number("FORKDISK_ROUNDS", 8);
    let w = World::new();
    w.import_ext4("base", 512);
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let done = Mutex::new(vec![None; 24]);
    let seed = AtomicU64::new(1);
    let (mut survived, mut died, mut files, mut verified) = (0u64, 0u64, 0u64, 0u64);
    let mut mounted = false;
    for round in 0..rounds {
        if !mounted {
            w.ok(["attach", "d", "--mount", s(&m)]);
            mounted = true;
        }
        let status = w.status();
        let pid = |field: &str| status[field].as_i64().unwrap() as i32;
        let (keeper, server) = (pid("keeper_pid"), pid("server_pid"));
        let whole = round % 2 == 1;
        let story = format!(
            "round {round} ({})",
            if whole { "daemon" } else { "server" }
        );
        let (busy, stop) = (AtomicU64::new(u64::MAX), AtomicBool::new(false));
        let before = seed.load(SeqCst);
        thread::scope(|scope| {
            let writer = scope.spawn(|| write_files(&m, &done, &busy, &stop, &seed));
            thread::sleep(Duration::from_millis(20 + random(250)));
            if whole {
                // The keeper must not start another one.
                assert!(kill(keeper, "STOP"));
                kill_and_wait(server);
                kill_and_wait(keeper);
            } else {
                assert!(kill(server, "KILL"));
                thread::sleep(Duration::from_millis(50 + random(150)));
                assert!(
                    !writer.is_finished(),
                    "{story}: the writer saw an error\n{}",
                    w.log()
                );
            }
            stop.store(true, SeqCst);
            if whole {
                // What waits for the dead gets its error when the mount goes.
                w.run(["detach", s(&m)]);
            }
            writer.join().unwrap();
        });
        files += seed.load(SeqCst) - before;
        let synced = done.lock().unwrap().clone();
        if whole {
            died += 1;
            let out = w.run(["detach", s(&m)]);
            // A device that somebody looks at, as udev does, goes with the last look.
            eventually("the device goes", || w.loops().is_empty());
            assert!(
                w.mounts().iter().all(|m| m.ends_with("run/disks")) && w.loops().is_empty(),
                "{story}: {out:?} {:?} {:?}",
                w.mounts(),
                w.loops()
            );
            let check = w.run(["check"]);
            assert_eq!(check.code, 0, "{story}: {check:?}");
            // The journal of the filesystem is replayed, as after a power cut.
            w.ok(["attach", "d", "--mount", s(&m)]);
        } else {
            survived += 1;
        }
        verified += all_there(&m, &synced, &story);
        if whole || round % 16 == 0 {
            let device = w.device_of("d");
            tool("umount", [s(&m)]);
            tool("e2fsck", ["-fn", &device]);
            verified += {
                w.ok(["detach", "d"]);
                let check = w.run(["check"]);
                assert_eq!(check.code, 0, "{story}: {check:?}");
                w.ok(["attach", "d", "--mount", s(&m)]);
                all_there(&m, &synced, &story)
            };
        }
    }
    if mounted {
        w.ok(["detach", "d"]);
    }
    figures(&json!({
        "test": "crash-daemon", "rounds": rounds, "server_killed_and_survived": survived, "daemon_killed": died,
        "files_synced": files, "bytes_verified": verified, "lost": 0,
    }));
    w.finish();
}

/// Commands under way when the server dies: they end, with success or one clear error, and leave nothing half-done.
#[test]
fn commands_outlive_servers() {
    if !root() {
        return;
    }
    let seconds = number("FORKDISK_COMMANDS_SECONDS", 8);
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "3"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d-1", "--mount", s(&m)]);
    let stop = AtomicBool::new(false);
    let (done, broken) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut kills = 0;
    let loops = |work: &dyn Fn(u64) -> Vec<Vec<String>>| {
        let mut n = 0;
        while !stop.load(SeqCst) {
            n += 1;
            for args in work(n) {
                let out = w.run(&args);
                w.note(&out.stdout);
                match out.code {
                    0 => drop(done.fetch_add(1, SeqCst)),
                    // The server ended in the midst of it, or another command's undoing is still under way.
                    1 | 11 | 12 | 13 => {
                        assert!(out.stderr.contains("hint:"), "{args:?}: {out:?}");
                        broken.fetch_add(1, SeqCst);
                    }
                    _ => panic!("{args:?}: {out:?}\n{}", w.log()),
                }
            }
        }
    };
    let words = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    let file = m.join("f");
    thread::scope(|scope| {
        scope.spawn(|| {
            loops(&|_| {
                vec![
                    words("attach d-2"),
                    words("ls attached"),
                    words("detach d-2"),
                ]
            })
        });
        scope.spawn(|| loops(&|_| vec![words("attach d-3 --via file"), words("detach d-3")]));
        scope.spawn(|| {
            loops(&|n| {
                vec![
                    words(&format!("snapshot d-1@s{n}")),
                    words(&format!("create f{n} --from d-1")),
                    words(&format!("rm f{n}")),
                ]
            })
        });
        scope.spawn(|| {
            let mut n = 0;
            while !stop.load(SeqCst) {
                n += 1;
                fs::write(&file, noise(n, 100_000)).expect("a write on a mounted disk");
                tool("sync", [s(&file)]);
                assert!(fs::read(&file).unwrap() == noise(n, 100_000));
            }
        });
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            thread::sleep(Duration::from_millis(30 + random(200)));
            let out = w.run(["--json", "daemon", "status"]);
            let status: serde_json::Value = serde_json::from_str(&out.stdout).unwrap_or_default();
            if let Some(server) = status["server_pid"].as_i64() {
                kill(server as i32, "KILL");
                kills += 1;
            }
        }
        stop.store(true, SeqCst);
    });
    // What a broken command had begun is decided within seconds.
    eventually("nothing is under way", || {
        ["d-2", "d-3"].iter().all(|d| {
            let out = w.run(["detach", d]);
            out.code == 0 || out.code == 12
        })
    });
    for d in ["d-2", "d-3"] {
        let device = w.ok(["attach", d]);
        tool("e2fsck", ["-fn", &device]);
        w.ok(["detach", d]);
    }
    w.ok(["detach", "d-1"]);
    w.ok(["gc"]);
    figures(&json!({
        "test": "commands", "kills": kills, "commands": done.load(SeqCst), "commands_broken_off": broken.load(SeqCst),
    }));
    w.finish();
}
