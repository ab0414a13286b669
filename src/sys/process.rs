//! What a process may ask the kernel about itself and others.

use crate::error::{Error, Result};
use rustix::process::{Pid, PidfdFlags, Resource};
use std::{
    fmt, fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

// From `linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;
/// An unused argument: the kernel insists on zero, in its full width.
const NONE: libc::c_ulong = 0;

/// Says that the calling thread serves I/O that the kernel may wait for when it needs memory, so that
/// its own allocations never wait for that I/O (`PR_SET_IO_FLUSHER`). Threads and processes it starts
/// inherit this. `false` if the kernel denies it (needs `CAP_SYS_RESOURCE`): then nothing is lost but
/// the guarantee.
pub fn set_io_flusher() -> bool {
    // SAFETY: PR_SET_IO_FLUSHER takes plain numbers and touches no memory of this process.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1 as libc::c_ulong, NONE, NONE, NONE) == 0 }
}

/// Is the calling thread an I/O flusher?
pub fn is_io_flusher() -> bool {
    // SAFETY: PR_GET_IO_FLUSHER takes plain numbers and touches no memory of this process.
    unsafe { libc::prctl(PR_GET_IO_FLUSHER, NONE, NONE, NONE, NONE) == 1 }
}

/// Sets how readily the kernel kills this process when memory runs out: -1000 (never) to 1000. Lowering it
/// needs `CAP_SYS_RESOURCE`.
pub fn set_oom_score_adj(score: i32) -> Result<()> {
    let path = "/proc/self/oom_score_adj";
    fs::write(path, score.to_string()).map_err(|e| Error::io("write", path, &e))
}

/// Raises the soft limit of open descriptors to the hard one and returns it.
pub fn raise_open_files_limit() -> u64 {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let before = limit.current;
        limit.current = limit.maximum;
        if rustix::process::setrlimit(Resource::Nofile, limit).is_err() {
            return before.unwrap_or(u64::MAX);
        }
    }
    limit.current.unwrap_or(u64::MAX)
}

/// A descriptor that stands for process `pid`: it can be waited for, and means this very process even
/// when the number is used again.
pub fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until the process behind a [`pidfd`] has ended; `false` after `timeout`.
pub fn wait_for_end(pidfd: impl AsFd, timeout: Duration) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let deadline = std::time::Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Is there a process of this number? (A zombie counts.)
pub fn is_alive(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| {
        !matches!(
            rustix::process::test_kill_process(pid),
            Err(rustix::io::Errno::SRCH)
        )
    })
}

/// Is there a process of this number that has not ended? (A zombie has.)
pub fn is_alive_and_well(pid: i32) -> bool {
    pid > 0 && pidfd(pid).is_ok_and(|fd| !wait_for_end(fd, Duration::ZERO).unwrap_or(true))
}

/// A process, told from a later one of the same number by when it started.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Process {
    /// Its number; 0: one of another namespace of processes, of which nothing can be known here.
    pub pid: i32,
    /// When it started, in clock ticks since boot; 0: that is not known.
    pub started: u64,
}

impl Process {
    /// One of which nothing is known.
    pub const UNKNOWN: Process = Process { pid: 0, started: 0 };

    /// The process that has this number now; `None`: there is none, or it has ended. Where that cannot be found out it is taken to be there.
    pub fn of(pid: i32) -> Option<Process> {
        if pid == 0 {
            return Some(Process::UNKNOWN);
        }
        let unknown = Process { pid, started: 0 };
        match fs::read(format!("/proc/{pid}/stat")) {
            Ok(stat) => match Stat::of(&String::from_utf8_lossy(&stat)) {
                // The first thread of a process may have ended before the others.
                Some(stat) if stat.has_ended && stat.threads <= 1 => None,
                Some(Stat { started, .. }) => Some(Process { pid, started }),
                None => Some(unknown),
            },
            // With `hidepid` the processes of others look as if they were not there.
            Err(e) if is_gone(&e) => is_alive(pid).then_some(unknown),
            Err(_) => Some(unknown),
        }
    }
    /// Has it not ended? Of one that cannot be seen it is not known, so that it may be there.
    pub fn is_there(self) -> bool {
        Process::of(self.pid).is_some_and(|now| now.is(self))
    }
    /// Is it the same, as far as one knows?
    pub fn is(self, other: Process) -> bool {
        let unknown = self.started == 0 || other.started == 0;
        self.pid == other.pid && (unknown || self.started == other.started)
    }
}

/// Says an error of a file in `/proc` that there is no such process?
fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Of the fields of `/proc/PID/stat`, by proc_pid_stat(5).
struct Stat {
    has_ended: bool,
    threads: u64,
    started: u64,
}

impl Stat {
    fn of(text: &str) -> Option<Stat> {
        // The second one, the name, may have spaces and parentheses of its own.
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        Some(Stat {
            has_ended: matches!(fields.next()?, "Z" | "X"),
            threads: fields.nth(16)?.parse().ok()?,
            started: fields.nth(1)?.parse().ok()?,
        })
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, comm(self.pid)) {
            (0, _) => f.write_str("a process that cannot be seen from here"),
            (pid, Some(name)) => write!(f, "process {pid} ({name})"),
            (pid, None) => write!(f, "process {pid}"),
        }
    }
}

/// The process at the other end of a Unix socket when it was connected, and its user.
pub fn peer_of(socket: impl AsFd) -> io::Result<(i32, u32)> {
    // Not by rustix, for which there is no process 0, as one of another namespace is told.
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, which has as many and is valid whatever they are; the descriptor is open.
    let r = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match r {
        0 => Ok((peer.pid, peer.uid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The short name of a process, as the kernel keeps it.
pub fn comm(pid: i32) -> Option<String> {
    let bytes = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end().to_string())
}

/// The version of the running kernel: 6.18.3 is (6, 18, 3).
pub fn kernel_version() -> (u32, u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// Numbers of the CPUs that are `possible`, `present` or `online`, in order; none if the kernel does not tell.
pub fn cpus(which: &str) -> Vec<usize> {
    let list = fs::read_to_string(format!("/sys/devices/system/cpu/{which}")).unwrap_or_default();
    ranges(list.trim())
}

/// What a list like `0-2,5` means.
fn ranges(list: &str) -> Vec<usize> {
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
        })
        .flatten()
        .collect()
}

/// Keeps the calling thread on one CPU. `false` if it may not be there.
pub fn stay_on_cpu(cpu: usize) -> bool {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return false;
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).is_ok()
}

/// The signal that gets a thread out of a blocking read, for [`wake`]. The kernel ignores it unless a
/// handler is installed, so that one sent too early or by someone else never does harm.
const WAKE: libc::c_int = libc::SIGURG;

/// Makes [`wake`] interrupt blocking calls. Idempotent; once per process is enough.
pub fn install_wake_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: `sigaction` is plain data for which zeros are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // No SA_RESTART: to interrupt is the whole purpose.
    action.sa_flags = 0;
    // SAFETY: `action` is fully initialised, its handler does nothing and so is async-signal-safe.
    let r = unsafe { libc::sigaction(WAKE, &raw const action, std::ptr::null_mut()) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The kernel's number of the calling thread, for [`wake`].
pub fn thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Interrupts whatever blocking call thread `tid` of this process is in. A thread that enters such a
/// call just afterwards is not: repeat until it reacts.
pub fn wake(tid: i32) {
    // SAFETY: tgkill takes plain numbers; the signal has a harmless handler or is ignored, and a thread
    // that has ended is answered with ESRCH.
    unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            std::process::id() as libc::pid_t,
            tid,
            WAKE,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_named() {
        let me = std::process::id() as i32;
        assert!(is_alive(me));
        assert!(comm(me).is_some());
        assert!(!is_alive(0) && !is_alive(i32::MAX));
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_number() {
        let me = Process::of(std::process::id() as i32).expect("this process");
        assert!(me.is_there() && me.started > 0);
        let later = Process {
            started: me.started + 1,
            ..me
        };
        assert!(!later.is_there());
        // One whose name looks like the fields after it, and which has ended and was not waited for.
        let dir = tempfile::tempdir().expect("a directory");
        let odd = dir.path().join("a) Z 1 (b");
        fs::copy("/bin/sleep", &odd).expect("a copy");
        let mut child = std::process::Command::new(&odd)
            .arg("60")
            .spawn()
            .expect("a process");
        let found = Process::of(child.id() as i32).expect("the child");
        assert!(found.is_there() && found.started >= me.started);
        child.kill().expect("a signal");
        while found.is_there() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.wait().expect("its end");
        assert_eq!(Process::of(child.id() as i32), None);
        assert!(Process::UNKNOWN.is_there());
        // One of which only the number is known is there as long as anything is that has it.
        let unknown = Process { started: 0, ..me };
        assert!(unknown.is_there() && unknown.is(me) && me.is(unknown) && !later.is(me));
        assert!(
            !Process {
                started: 0,
                ..found
            }
            .is_there()
        );
        let (a, _b) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(peer_of(&a).expect("a peer"), (me.pid, uid));
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_is_there() {
        let stat = |state: &str, threads: u32| {
            let rest = "1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0";
            Stat::of(&format!("7 (a) b) {state} {rest} {threads} 0 12345 9 9")).expect("a line")
        };
        assert!(stat("Z", 1).has_ended && stat("Z", 3).has_ended && !stat("S", 3).has_ended);
        assert_eq!((stat("Z", 3).threads, stat("R", 1).started), (3, 12345));
        assert!(Stat::of("7 (a) Z 1").is_none() && Stat::of("").is_none());
    }

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(ranges("0-2,5,7-8"), [0, 1, 2, 5, 7, 8]);
        assert_eq!((ranges("0"), ranges("")), (vec![0], vec![]));
        assert!(cpus("possible").len() >= cpus("online").len() && !cpus("online").is_empty());
        assert!(kernel_version() > (2, 6, 0));
    }

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let fd = pidfd(child.id() as i32).unwrap();
        assert!(!wait_for_end(&fd, Duration::from_millis(10)).unwrap());
        child.kill().unwrap();
        assert!(wait_for_end(&fd, Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
    }

    #[test]
    fn a_wake_interrupts_a_blocking_read() {
        install_wake_handler().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            send.send(thread_id()).unwrap();
            rustix::io::read(&reader, &mut [0; 1])
        });
        let tid = receive.recv().unwrap();
        while !thread.is_finished() {
            wake(tid);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(thread.join().unwrap(), Err(rustix::io::Errno::INTR));
    }
}
