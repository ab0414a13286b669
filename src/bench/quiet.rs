//! Was the machine ours while a sample was taken?
//!
//! What others use is what all processors were busy with, less our own processes and the kernel's threads, which work for whoever
//! does I/O. Time that the hypervisor took away counts as well.

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
    busy: f64,
    stolen: f64,
    ours: f64,
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
        let (busy, stolen) = machine(&stat);
        Moment {
            when: Instant::now(),
            busy,
            stolen,
            ours: ours(mark.as_bytes()),
        }
    }
    /// What happened since.
    pub fn until(&self, later: &Moment) -> Others {
        let wall = later.when - self.when;
        let used = (later.busy - self.busy) - (later.ours - self.ours);
        judge(wall, used, later.stolen - self.stolen)
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

/// Seconds that processors were busy with processes, and that were stolen, from `/proc/stat`.
fn machine(stat: &str) -> (f64, f64) {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "));
    let fields: Vec<f64> = line
        .unwrap_or_default()
        .split_whitespace()
        .map(|f| f.parse().unwrap_or(0.0))
        .collect();
    let field = |i: usize| fields.get(i).copied().unwrap_or(0.0) / TICKS;
    // user, nice, system; interrupts are nobody's.
    (field(0) + field(1) + field(2), field(7))
}

/// Seconds used by this process, by what it started and has ended, by marked processes, and by the kernel's threads.
fn ours(mark: &[u8]) -> f64 {
    let me = std::process::id().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut sum = 0.0;
    for entry in entries {
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        let dir = entry.path();
        let Some(process) = fs::read_to_string(dir.join("stat"))
            .ok()
            .and_then(|t| parse(&t))
        else {
            continue;
        };
        if pid == me {
            sum += process.own + process.children;
        } else if process.kernel || (process.own > 0.0 && marked(&dir, mark)) {
            sum += process.own;
        }
    }
    sum
}

fn marked(dir: &Path, mark: &[u8]) -> bool {
    fs::read(dir.join("environ")).is_ok_and(|text| text.split(|b| *b == 0).any(|v| v == mark))
}

struct Process {
    kernel: bool,
    own: f64,
    children: f64,
}

/// Reads `/proc/PID/stat`; the name in it may hold anything.
fn parse(text: &str) -> Option<Process> {
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<u64> = rest
        .split_whitespace()
        .map(|f| f.parse().unwrap_or(0))
        .collect();
    let field = |i: usize| fields.get(i).copied();
    // proc(5) counts from 1; the state, its third, is our first.
    let seconds = |a: usize| Some((field(a)? + field(a + 1)?) as f64 / TICKS);
    Some(Process {
        kernel: field(6)? & KERNEL_THREAD != 0,
        own: seconds(11)?,
        children: seconds(13)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_the_kernel_are_read() {
        let stat = "cpu  100 10 40 5000 70 3 4 25 0 0\ncpu0 1 2 3\n";
        assert_eq!(machine(stat), (1.5, 0.25));
        let line = "7 (a) b (c) S 1 7 7 0 -1 2097152 9 9 9 9 150 50 20 30 20 0 1 0 5 0 0";
        let process = parse(line).unwrap();
        assert!(process.kernel);
        assert_eq!((process.own, process.children), (2.0, 0.5));
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
        let before = Moment::now("FORKDISK_BENCH_RUN=none");
        let until = Instant::now() + Duration::from_millis(400);
        let mut child = std::process::Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        let during = Moment::now("FORKDISK_BENCH_RUN=none");
        child.kill().unwrap();
        child.wait().unwrap();
        // The child is not marked and has not ended: it is one of the others.
        assert!(before.until(&during).used > 0.1);
        let after = Moment::now("FORKDISK_BENCH_RUN=none");
        // It has ended: what it used is ours now, and more than what passed meanwhile.
        assert!(during.until(&after).used < 0.1);
    }
}
