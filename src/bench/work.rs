//! The private directory of one run, and everything that is started from it.
//!
//! Always true: when a [`Work`] goes, for whatever reason, nothing is left of the run: no mount, no loop device, no daemon,
//! no process, no file. What is taken away is found by its path below the directory and by the process ids of what was started here,
//! never by a name.

use crate::{
    error::{Error, Kind, Result},
    sys::{loopdev, mounts, process, signals},
};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal};
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Every process of a run has this variable, by which its processor time is told from that of others.
pub const MARK: &str = "FORKDISK_BENCH_RUN";

/// How long a tool may take before it is ended.
const LONGEST: Duration = Duration::from_secs(600);

/// The private directory.
pub struct Work {
    dir: PathBuf,
    exe: PathBuf,
    mark: String,
    path: std::ffi::OsString,
    children: Mutex<Vec<Child>>,
    stores: Mutex<Vec<PathBuf>>,
}

impl Work {
    /// Makes a new directory in `parent`.
    pub fn new(parent: &Path) -> Result<Work> {
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, &e))?;
        let parent = fs::canonicalize(parent).map_err(|e| Error::io("look at", parent, &e))?;
        clear_dead(&parent);
        let exe = std::env::current_exe().map_err(|e| Error::io("find", "forkdisk", &e))?;
        let pid = std::process::id();
        for attempt in 0..100 {
            let dir = parent.join(format!("forkdisk-bench.{pid}.{attempt}"));
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            match builder.create(&dir) {
                Ok(()) => {
                    let mut path = std::env::var_os("FORKDISK_QEMU").unwrap_or_default();
                    path.push(":");
                    path.push(std::env::var_os("PATH").unwrap_or_default());
                    path.push(":/usr/sbin:/sbin");
                    return Ok(Work {
                        mark: dir.display().to_string(),
                        dir,
                        exe,
                        path,
                        children: Mutex::default(),
                        stores: Mutex::default(),
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create", dir, &e)),
            }
        }
        Err(Error::new(
            Kind::Exists,
            format!("{} is full of directories of former runs", parent.display()),
        )
        .hint("remove forkdisk-bench.* there"))
    }
    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
    /// A new directory in it.
    pub fn mkdir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.path(name);
        fs::create_dir_all(&dir).map_err(|e| Error::io("create", &dir, &e))?;
        Ok(dir)
    }
    /// What marks the processes of this run, as it stands in their environment.
    pub fn mark(&self) -> String {
        format!("{MARK}={}", self.mark)
    }
    /// Is there such a program?
    pub fn has(&self, program: &str) -> bool {
        let mut dirs = std::env::split_paths(&self.path).filter(|d| !d.as_os_str().is_empty());
        dirs.any(|dir| dir.join(program).is_file())
    }
    /// Fails if a program is missing; `package` has it.
    pub fn need(&self, program: &str, package: &str) -> Result<()> {
        match self.has(program) {
            true => Ok(()),
            false => Err(
                Error::new(Kind::Unsupported, format!("{program} is not installed"))
                    .hint(format!("apt-get install {package}")),
            ),
        }
    }
    /// A program with the surroundings of the run.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("PATH", &self.path)
            .env("LC_ALL", "C")
            .env(MARK, &self.mark)
            .env_remove("FORKDISK_LOG")
            .env_remove("FORKDISK_STORE")
            .env_remove("FORKDISK_AWAKE")
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        command
    }
    /// This very program on a store, as a user runs it.
    pub fn forkdisk(&self, store: &Path) -> Command {
        let mut command = self.command(&self.exe);
        command.arg("-q").arg("-S").arg(store);
        command
    }
    /// From now on the daemon of this store is stopped at the end.
    pub fn note_store(&self, store: &Path) {
        self.stores.lock().push(store.to_path_buf());
    }
    /// Runs a short command and waits for it without a pause, so that it can be timed. What it printed.
    pub fn short(&self, mut command: Command) -> Result<String> {
        let program = command.get_program().to_os_string();
        let out = command
            .output()
            .map_err(|e| Error::io("run", &program, &e))?;
        match out.status.success() {
            true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
            false => Err(failed(&command, &String::from_utf8_lossy(&out.stderr))),
        }
    }
    /// Runs a command that may take long; an interrupt ends it. What it printed.
    pub fn long(&self, mut command: Command) -> Result<String> {
        let program = command.get_program().to_os_string();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|e| Error::io("run", &program, &e))?;
        let out = reader(child.stdout.take());
        let err = reader(child.stderr.take());
        let deadline = Instant::now() + LONGEST;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if signals::caught() => break Err(interrupted()),
                Ok(None) if Instant::now() > deadline => {
                    break Err(failed(&command, "it took more than ten minutes"));
                }
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                Err(e) => break Err(Error::io("wait for", &program, &e)),
            }
        };
        if status.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
        let (out, err) = (text(out), text(err));
        match status?.success() {
            true => Ok(out),
            // Ctrl-C goes to the whole group.
            false if signals::caught() => Err(interrupted()),
            false => Err(failed(&command, &format!("{err}{out}"))),
        }
    }
    /// Starts a program that runs until [`Work::end`].
    pub fn start(&self, mut command: Command) -> Result<i32> {
        let program = command.get_program().to_os_string();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .map_err(|e| Error::io("open", self.path("log"), &e))?;
        let copy = log
            .try_clone()
            .map_err(|e| Error::io("open", self.path("log"), &e))?;
        command.stdout(copy).stderr(log);
        // Ctrl-C must not take it away from under the device that stands on it.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command
            .spawn()
            .map_err(|e| Error::io("run", &program, &e))?;
        let pid = child.id() as i32;
        self.children.lock().push(child);
        Ok(pid)
    }
    /// Has a started program ended by itself?
    pub fn is_gone(&self, pid: i32) -> bool {
        let mut children = self.children.lock();
        let child = children.iter_mut().find(|c| c.id() as i32 == pid);
        child.is_none_or(|c| !matches!(c.try_wait(), Ok(None)))
    }
    /// Ends a started program and waits for it.
    pub fn end(&self, pid: i32) {
        let child = {
            let mut children = self.children.lock();
            let at = children.iter().position(|c| c.id() as i32 == pid);
            at.map(|at| children.swap_remove(at))
        };
        let Some(mut child) = child else { return };
        if let Some(pid) = Pid::from_raw(pid)
            && matches!(child.try_wait(), Ok(None))
        {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
    /// Takes away everything that was made below `dir`, then `dir`. The rest of the run goes on.
    pub fn clear(&self, dir: &Path) {
        clear(dir, &|| {
            let mut stores = self.stores.lock();
            let here: Vec<PathBuf> = stores.extract_if(.., |s| s.starts_with(dir)).collect();
            drop(stores);
            here.iter().for_each(|store| self.stop_daemon(store));
            if dir == self.dir {
                let all: Vec<i32> = self.children.lock().iter().map(|c| c.id() as i32).collect();
                all.into_iter().for_each(|pid| self.end(pid));
            }
        });
    }
    fn stop_daemon(&self, store: &Path) {
        // Asked first: its process must be waited for, also if stopping fails.
        let mut status = self.forkdisk(store);
        status.args(["--json", "daemon", "status"]);
        let pid = self.short(status).ok().and_then(|text| {
            let document: serde_json::Value = serde_json::from_str(&text).ok()?;
            document["keeper_pid"].as_i64()
        });
        let mut stop = self.forkdisk(store);
        stop.args(["daemon", "stop"]);
        if let Err(e) = self.short(stop) {
            tracing::debug!("{e}");
        }
        if let Some(fd) = pid.and_then(|pid| process::pidfd(pid as i32).ok()) {
            let _ = process::wait_for_end(fd, Duration::from_secs(10));
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let dir = self.dir.clone();
        self.clear(&dir);
    }
}

/// Takes away what runs that were killed left in `parent`: directories of ours that are named after a process that is no more.
fn clear_dead(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| {
            n.strip_prefix("forkdisk-bench.")?
                .split_once('.')?
                .0
                .parse()
                .ok()
        });
        let ours = entry.metadata().is_ok_and(|m| {
            m.is_dir() && m.uid() == rustix::process::geteuid().as_raw() && m.mode() & 0o077 == 0
        });
        let Some(pid) = pid.filter(|_| ours) else {
            continue;
        };
        if process::is_alive(pid) {
            continue;
        }
        let dir = entry.path();
        tracing::info!("a killed run left {}: it is taken away", dir.display());
        let mark = format!("{MARK}={}", dir.display());
        clear(&dir, &|| end_marked(mark.as_bytes()));
    }
}

/// Ends the processes that a killed run left, which have its mark in their environment.
fn end_marked(mark: &[u8]) {
    let mut ended = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(pid) = pid.filter(|pid| *pid != std::process::id() as i32) else {
            continue;
        };
        // The descriptor is of the very process whose environment is read next.
        let Ok(fd) = process::pidfd(pid) else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|v| v == mark) {
            let _ = rustix::process::pidfd_send_signal(&fd, Signal::TERM);
            ended.push(fd);
        }
    }
    for fd in ended {
        let gone = process::wait_for_end(&fd, Duration::from_secs(10));
        if !gone.unwrap_or(false) {
            let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
        }
    }
}

/// Takes away the mounts, the devices and the files below `dir`. `end` ends what serves them, once all is gone that can go while that lives.
fn clear(dir: &Path, end: &dyn Fn()) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut ended = false;
    loop {
        let here: Vec<PathBuf> = mounts::list()
            .unwrap_or_default()
            .into_iter()
            .rev()
            .filter(|m| m.mount_point.starts_with(dir))
            // What a daemon serves is unmounted by the daemon, unless it is gone.
            .filter(|m| ended || !m.fs_type.starts_with("fuse"))
            .map(|m| m.mount_point)
            .collect();
        for place in &here {
            if mounts::unmount(place).is_err() && Instant::now() > deadline {
                let _ = mounts::unmount_lazily(place);
            }
        }
        let loops = loops_below(dir);
        for device in &loops {
            detach_loop(device);
        }
        if !ended {
            ended = true;
            end();
            continue;
        }
        if here.is_empty() && loops.is_empty() {
            break;
        }
        if Instant::now() > deadline + Duration::from_secs(5) {
            tracing::warn!("{} is still in use; it stays", dir.display());
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    if let Err(e) = fs::remove_dir_all(dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("cannot remove {}: {e}", dir.display());
    }
}

/// Loop devices whose backing file is below `dir`.
fn loops_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let devices = entries
        .flatten()
        .map(|e| Path::new("/dev").join(e.file_name()));
    devices
        .filter(|d| loopdev::backing_file(d).is_some_and(|file| file.starts_with(dir)))
        .collect()
}

/// Takes a device away if it is still the one over its file.
fn detach_loop(device: &Path) {
    if let Ok(Some(status)) = loopdev::status(device) {
        let options = loopdev::DetachOptions {
            timeout: Duration::from_millis(500),
            force: true,
            server: None,
        };
        let _ = loopdev::detach(device, status.dev, status.ino, options);
    }
}

fn reader<R: Read + Send + 'static>(from: Option<R>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The signal was caught.
pub fn interrupted() -> Error {
    Error::new(Kind::Interrupted, "interrupted")
        .hint("what the run had made is taken away; a warning tells of what stays")
}

fn failed(command: &Command, said: &str) -> Error {
    let program = command.get_program().to_string_lossy();
    let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    let said: Vec<&str> = said.trim().lines().take(3).collect();
    Error::new(
        Kind::Io,
        format!("`{program} {}` failed: {}", args.join(" "), said.join("; ")),
    )
    .hint("run it by hand to see more; `forkdisk doctor` tells what this machine can do")
}

/// Bytes allocated for all files below a directory, the directories included.
pub fn allocated(dir: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(dir) else {
        return 0;
    };
    let own = meta.blocks() * 512;
    if !meta.is_dir() {
        return own;
    }
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    own + below.map(|e| allocated(&e.path())).sum::<u64>()
}

/// Bytes free and bytes used of the filesystem a path is on.
pub fn space(path: &Path) -> Result<(u64, u64)> {
    let s = rustix::fs::statvfs(path).map_err(|e| Error::io("look at", path, &e.into()))?;
    Ok((
        s.f_bavail * s.f_frsize,
        (s.f_blocks - s.f_bfree) * s.f_frsize,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_a_run() {
        let parent = std::env::temp_dir();
        let work = Work::new(&parent).unwrap();
        let dir = work.dir.clone();
        fs::write(work.path("a"), b"x").unwrap();
        let mut sleep = work.command("sleep");
        sleep.arg("100");
        let pid = work.start(sleep).unwrap();
        assert!(!work.is_gone(pid));
        let fd = process::pidfd(pid).unwrap();
        drop(work);
        assert!(process::wait_for_end(fd, Duration::ZERO).unwrap());
        assert!(!dir.exists());
    }

    #[test]
    fn a_failing_tool_says_why() {
        let work = Work::new(&std::env::temp_dir()).unwrap();
        let mut command = work.command("sh");
        command.args(["-c", "echo nonsense >&2; exit 3"]);
        let error = work.long(command).unwrap_err().to_string();
        assert!(error.contains("nonsense"), "{error}");
        let mut command = work.command("sh");
        command.args(["-c", "echo 7"]);
        assert_eq!(work.short(command).unwrap(), "7\n");
        assert!(work.has("sh") && !work.has("no-such-program"));
        let missing = work.need("no-such-program", "some-package").unwrap_err();
        assert!(missing.hint_text().unwrap().contains("some-package"));
    }
}
