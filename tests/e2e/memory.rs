//! Memory pressure: dirty pages can only be freed by writing them to a disk whose daemon lives in the same little memory.

use crate::rig::*;
use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// A memory cgroup below the one of this process, with a limit.
struct Group(PathBuf);

impl Group {
    /// `None`, and said loudly, where none can be made.
    fn new(whose: &str, mib: u64) -> Option<Group> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path_of = |wanted: &str| {
            own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                (fields.next()? == wanted).then(|| fields.next().unwrap_or("/").to_string())
            })
        };
        let (root, limit) = match path_of("memory") {
            Some(path) => (
                PathBuf::from(format!("/sys/fs/cgroup/memory{path}")),
                "memory.limit_in_bytes",
            ),
            None => (
                PathBuf::from(format!("/sys/fs/cgroup{}", path_of("").unwrap_or_default())),
                "memory.max",
            ),
        };
        let dir = root.join(format!(
            "forkdisk-test-{}-{whose}-{mib}",
            std::process::id()
        ));
        let made = fs::create_dir(&dir).and_then(|()| {
            let group = Group(dir.clone());
            fs::write(dir.join(limit), (mib << 20).to_string()).map(|()| group)
        });
        made.inspect_err(|e| {
            eprintln!(
                "NOT LIMITED: no memory cgroup can be made in {}: {e}",
                root.display()
            )
        })
        .ok()
    }
    /// A command that begins its life in the group.
    fn command(group: Option<&Group>, command: &Command) -> Command {
        let Some(Group(dir)) = group else {
            let mut plain = Command::new(command.get_program());
            plain.args(command.get_args());
            return plain;
        };
        let mut inside = Command::new("bash");
        inside
            .args(["-euc", "echo $$ > \"$0\"; exec \"$@\""])
            .arg(dir.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        inside
    }
    fn holds(&self, pid: i32) -> bool {
        let all = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        all.lines().any(|line| line == pid.to_string())
    }
    /// How often the limit was met.
    fn met(&self) -> u64 {
        let old = fs::read_to_string(self.0.join("memory.failcnt"));
        let new = || {
            let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
            let max = events.lines().find_map(|l| l.strip_prefix("max "));
            max.unwrap_or("0").to_string()
        };
        old.unwrap_or_else(|_| new()).trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The processes that end may take a moment to leave it.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays", self.0.display());
    }
}

/// Where the daemon lives.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Daemon {
    /// Where there is no limit.
    Free,
    /// In the writer's group.
    Together,
}

/// Several times the limit is written through the page cache to a mounted disk.
fn pressure(limit: u64, daemon: Daemon, mib: u64) {
    if !root() {
        return;
    }
    // Dropped after the world, whose daemon is in one of them.
    let group = Group::new("writer", limit);
    let w = World::new();
    w.import_ext4("base", 512);
    w.ok(["create", "d", "--from", "base"]);
    let inside = match daemon {
        Daemon::Free => None,
        Daemon::Together => group.as_ref(),
    };
    let out = finish(Group::command(inside, &w.command(["daemon", "run"])));
    assert_eq!(out.code, 0, "{out:?}");
    if let Some(group) = inside {
        // It serves the whole machine: it does not stay in the group of whoever was first to need it. There the two would wait for
        // each other, unless the daemon may be an I/O flusher: the one for memory, the other for its pages to be written back.
        assert!(!group.holds(w.pid("server_pid")) && !group.holds(w.pid("keeper_pid")));
        assert!(w.log().contains("left a group"), "{}", w.log());
    }
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let source = w.file("source", &noise(7, 4 << 20));
    let begun = Instant::now();
    // The same few megabytes again and again, each file another one; the second file rewrites the first one's place.
    let script = format!(
        "for n in $(seq {}); do cat '{1}'; done | tee '{2}/a' > '{2}/b'; sync -f '{2}'; cat '{2}/a' | dd of='{2}/b' bs=64k conv=notrunc,fsync status=none",
        mib / 4 / 2,
        s(&source),
        s(&m)
    );
    let mut writer = Command::new("timeout");
    writer.args(["-k", "5", "90", "bash", "-euo", "pipefail", "-c", &script]);
    let out = finish(Group::command(group.as_ref(), &writer));
    assert_eq!(out.code, 0, "{out:?}\n{}", w.log());
    eprintln!(
        "{mib} MiB through {limit} MiB in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    if let Some(group) = &group {
        assert!(group.met() > 0, "there was no pressure");
    }
    w.ok(["snapshot", "d@s"]);
    w.ok(["detach", s(&m)]);
    let device = w.ok(["attach", "d", "--ro", "--mount", s(&m)]);
    assert!(!device.is_empty());
    let expected = noise(7, 4 << 20);
    for name in ["a", "b"] {
        let found = fs::read(m.join(name)).unwrap();
        assert_eq!(found.len() as u64, mib / 4 / 2 * (4 << 20), "{name}");
        assert!(found.chunks(4 << 20).all(|c| c == expected), "{name}");
    }
    w.ok(["detach", "d"]);
    w.finish();
}

/// The writer alone has little memory.
#[test]
fn a_writer_with_little_memory() {
    pressure(32, Daemon::Free, 128);
}

/// They share what there is: the daemon needs memory to free the writer's.
#[test]
fn writer_and_daemon_with_little_memory() {
    pressure(64, Daemon::Together, 256);
}
