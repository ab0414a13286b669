//! Was the machine ours while a sample was taken?
//!
//! What others used is the processor time of all processes that are not of this run, each with that of its children that have ended: what
//! a process used goes over to its parent when it ends, so that the sum grows by exactly what was used. The kernel's threads work for
//! whoever does I/O and count for nobody; the processors' own counters are no help, for many kernels only sample them. Time that the
//! hypervisor took away counts as well.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Ticks of `/proc` in a second: fixed on Linux.
const TICKS: f64 = 100.0;
/// Of one processor: more than this used by others disturbs.
const LIMIT: f64 = 0.15;
/// Less than this, in seconds, is not told from noise of the clock.
const NOISE: f64 = 0.05;
/// `PF_KTHREAD`, in the flags of `/proc/PID/stat`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// What was used up to a moment, in seconds of processor time.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    when: Instant,
    stolen: f64,
    others: f64,
}

/// What others did between two moments.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Others {
    /// Processors in use by others, on average.
    pub used: f64,
    /// Processors that the hypervisor took away, on average.
    pub stolen: f64,
    /// Too much for the sample to count.
    pub disturbed: bool,
}

impl Moment {
    /// Now. `mark` is what our processes have in their environment.
    pub fn now(mark: &str) -> Moment {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        Moment {
            when: Instant::now(),
            stolen: stolen(&stat),
            others: others(mark.as_bytes()),
        }
    }
    /// What happened since.
    pub fn until(&self, later: &Moment) -> Others {
        let wall = later.when - self.when;
        judge(wall, later.others - self.others, later.stolen - self.stolen)
    }
}

fn judge(wall: Duration, used: f64, stolen: f64) -> Others {
    let wall = wall.as_secs_f64().max(1e-3);
    let over = |seconds: f64| seconds > NOISE && seconds / wall > LIMIT;
    Others {
        used: (used / wall).max(0.0),
        stolen: (stolen / wall).max(0.0),
        disturbed: over(used) || over(stolen),
    }
}

/// Seconds that the hypervisor took away, from `/proc/stat`.
fn stolen(stat: &str) -> f64 {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "));
    let field = line.and_then(|l| l.split_whitespace().nth(7));
    field.and_then(|f| f.parse().ok()).unwrap_or(0.0) / TICKS
}

/// Seconds used by all processes but this one, the marked ones, and the kernel's threads.
fn others(mark: &[u8]) -> f64 {
    let me = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut sum = 0.0;
    for entry in entries {
        let name = entry.file_name();
        let is_pid = |n: &&str| n.bytes().all(|b| b.is_ascii_digit()) && *n != me;
        if name.to_str().filter(is_pid).is_none() {
            continue;
        }
        let dir = entry.path();
        let stat = fs::read_to_string(dir.join("stat"));
        let Some(process) = stat.ok().and_then(|t| parse(&t)) else {
            continue;
        };
        if !process.kernel && process.used > 0.0 && !marked(&dir, mark) {
            sum += process.used;
        }
    }
    sum
}

fn marked(dir: &Path, mark: &[u8]) -> bool {
    fs::read(dir.join("environ")).is_ok_and(|text| text.split(|b| *b == 0).any(|v| v == mark))
}

struct Process {
    kernel: bool,
    /// Seconds, with those of children that have ended.
    used: f64,
}

/// Reads `/proc/PID/stat`; the name in it may hold anything.
fn parse(text: &str) -> Option<Process> {
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<u64> = rest
        .split_whitespace()
        .map(|f| f.parse().unwrap_or(0))
        .collect();
    // proc(5) counts from 1; the state, its third, is our first.
    let ticks: u64 = fields.get(11..15)?.iter().sum();
    Some(Process {
        kernel: fields.get(6)? & KERNEL_THREAD != 0,
        used: ticks as f64 / TICKS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_the_kernel_are_read() {
        let stat = "cpu  100 10 40 5000 70 3 4 25 0 0\ncpu0 1 2 3\n";
        assert_eq!(stolen(stat), 0.25);
        assert_eq!(stolen(""), 0.0);
        let line = "7 (a) b (c) S 1 7 7 0 -1 2097152 9 9 9 9 150 50 20 30 20 0 1 0 5 0 0";
        let process = parse(line).unwrap();
        assert!(process.kernel);
        assert_eq!(process.used, 2.5);
        assert!(parse("nonsense").is_none());
    }

    #[test]
    fn others_disturb_from_a_limit_on() {
        let second = Duration::from_secs(1);
        assert!(!judge(second, 0.1, 0.0).disturbed);
        assert!(judge(second, 0.3, 0.0).disturbed);
        assert!(judge(second, 0.0, 0.3).disturbed);
        // A tick more or less says nothing of a short sample.
        assert!(!judge(Duration::from_millis(20), 0.02, 0.0).disturbed);
        assert_eq!(judge(second, -0.5, 0.0).used, 0.0);
    }

    #[test]
    fn work_of_ones_own_is_no_disturbance_and_that_of_others_is() {
        // Not of this machine, which others may use, but of the difference that the mark makes.
        let (mine, foreign) = (b"FORKDISK_BENCH_RUN=a-test", b"FORKDISK_BENCH_RUN=no-one");
        let difference = || others(foreign) - others(mine);
        let before = difference();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .env("FORKDISK_BENCH_RUN", "a-test")
            .spawn()
            .unwrap();
        let stat = format!("/proc/{}/stat", child.id());
        let deadline = Instant::now() + Duration::from_secs(30);
        while parse(&fs::read_to_string(&stat).unwrap()).unwrap().used < 1.0 {
            assert!(Instant::now() < deadline, "it gets no processor");
            std::thread::sleep(Duration::from_millis(10));
        }
        let during = difference();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(during - before > 0.5, "{before} {during}");
        // It has ended: what it used is this process's, and nobody's disturbance.
        let after = difference();
        assert!(during - after > 0.5, "{during} {after}");
    }

    #[test]
    fn what_has_ended_is_not_forgotten() {
        let mark = "FORKDISK_BENCH_RUN=none";
        // The shell is of the others; its child works and ends, and the shell waits for it.
        let script = "read go; timeout 0.5 sh -c 'while :; do :; done'; echo done; read end";
        let mut shell = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let before = Moment::now(mark);
        let mut input = shell.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, b"go\n").unwrap();
        let mut output = std::io::BufReader::new(shell.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut String::new()).unwrap();
        let after = Moment::now(mark);
        drop(input);
        shell.wait().unwrap();
        assert!(before.until(&after).used > 0.05);
    }
}
