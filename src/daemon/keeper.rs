//! The keeper: the process that outlives servers.
//!
//! It takes the daemon's lock, makes the mount and the socket, starts the server, hands both over, and waits. It never looks at a disk,
//! so there is little in it that could fail. Single-threaded; it may wait for requests on served files, as the server must not.
//!
//! While it lives, the descriptor of the mount lives. When the server ends in order, it takes mount and socket away. When the server
//! dies, it ends the mount, so that I/O fails at once instead of hanging: what was flushed is safe in the layers, and the next
//! daemon starts from there.

use super::client::{Client, socket_path};
use super::{Attached, LOCK, LOG, MOUNT, SOCKET, dead, log, place_of, protocol, server};
use crate::attach;
use crate::error::{Error, Kind, Result};
use crate::serve::fuse::mount as fuse_mount;
use crate::store::Store;
use crate::sys::loopdev;
use crate::sys::{fdpass, mounts, process};
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that becomes the server.
pub const SERVE_COMMAND: &str = "serve";
/// The hidden command that becomes the keeper, in the background.
const KEEP_COMMAND: &str = "keep";

/// How long a daemon that was told to stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(120);

fn own_command(store: &Store, command: &str) -> Result<Command> {
    let exe = std::env::current_exe().map_err(|e| Error::io("find", "the forkdisk program", &e))?;
    let mut child = Command::new(exe);
    child
        .arg("--store")
        .arg(store.path())
        .args(["daemon", command])
        .stdin(Stdio::null());
    Ok(child)
}

/// Starts a daemon in the background and returns when it serves.
pub(super) fn start(store: &Store) -> Result<()> {
    let path =
        std::path::absolute(store.path()).map_err(|e| Error::io("find", store.path(), &e))?;
    let store = Store::open(&path)?;
    let mut child = own_command(&store, KEEP_COMMAND)?
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| Error::io("start", "the daemon", &e))?;
    let mut said = String::new();
    if let Some(mut out) = child.stdout.take() {
        // Ends when the keeper closes its standard output: it serves, or it failed.
        let _ = out.read_to_string(&mut said);
    }
    match serde_json::from_str(&said) {
        Ok(answer) => {
            let answer = protocol::success(answer);
            if answer.is_err() {
                let _ = child.wait();
            }
            answer.map(|_| ())
        }
        Err(_) => Err(Error::new(Kind::Io, "the daemon ended before it served")
            .path(store.run_dir().join(LOG))
            .hint("its log tells why")),
    }
}

/// Becomes the daemon in the foreground, or starts one in the background.
pub fn run(store: Store, foreground: bool) -> Result<()> {
    if !foreground {
        return start(&store);
    }
    let keeper = Keeper::begin(store, true)?;
    keeper.stay()
}

/// Becomes one of the daemon's processes: what the hidden commands do.
pub fn serve(store: Store, command: &str) -> Result<()> {
    if command == SERVE_COMMAND {
        return server::run(store);
    }
    // In the background: no terminal, no directory that could not be unmounted.
    let _ = rustix::process::setsid();
    let _ = std::env::set_current_dir("/");
    let begun = Keeper::begin(store, false);
    let answer = match &begun {
        Ok(_) => json!({"ready": true}),
        Err(e) => protocol::failure(e),
    };
    println!("{answer}");
    // Whoever started us waits for the end of our standard output.
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .map_err(|e| Error::io("open", "/dev/null", &e))?;
    rustix::stdio::dup2_stdout(&null)
        .map_err(|e| Error::io("close", "standard output", &e.into()))?;
    begun?.stay()
}

/// Waits until process `pid` has ended.
pub(super) fn wait_for_end(pid: i32) -> Result<()> {
    match process::pidfd(pid) {
        Ok(fd) => match process::wait_for_end(&fd, STOP_PATIENCE) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::new(
                Kind::Busy,
                format!("the daemon (process {pid}) is still stopping"),
            )
            .hint("its log tells what it waits for")),
            Err(e) => Err(Error::io("wait for", "the daemon", &e)),
        },
        // Gone already.
        Err(_) => Ok(()),
    }
}

struct Keeper {
    store: Store,
    /// Held for its lock.
    _lock: File,
    /// The run directory, which may be moved with the store.
    run_dir: File,
    /// Keeps the mount alive.
    fuse: OwnedFd,
    listener: OwnedFd,
    server: Child,
    /// The server's standard input: a byte tells the server to end, its end that we are gone.
    line: UnixStream,
}

impl Keeper {
    /// Everything until the server serves.
    fn begin(store: Store, foreground: bool) -> Result<Keeper> {
        let run_dir = store.run_dir();
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&run_dir)
            .map_err(|e| Error::io("create", &run_dir, &e))?;
        let lock = take_lock(&run_dir)?;
        log::begin(&run_dir, foreground)?;
        process::raise_open_files_limit();
        let mount = std::path::absolute(run_dir.join(MOUNT))
            .map_err(|e| Error::io("find", &run_dir, &e))?;
        clear_away(&run_dir, &mount);
        match std::fs::DirBuilder::new().mode(0o700).create(&mount) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("create", &mount, &e));
            }
            _ => {}
        }
        let open = File::open(&run_dir).map_err(|e| Error::io("open", &run_dir, &e))?;
        // Signals are waited for, not caught; a child starts without this mask.
        signals(true);
        let fuse = fuse_mount::mount(&mount)?;
        let begun = (|| {
            let listener = listen(&run_dir)?;
            let (line, server) = start_server(&store, &fuse, &listener)?;
            Ok((listener, line, server))
        })();
        match begun {
            Ok((listener, line, server)) => {
                tracing::info!(store = %store.path().display(), server = server.id(), "the daemon serves");
                Ok(Keeper {
                    store,
                    _lock: lock,
                    run_dir: open,
                    fuse,
                    listener,
                    server,
                    line,
                })
            }
            Err(e) => {
                let _ = fuse_mount::abort(&mount);
                let _ = std::fs::remove_file(run_dir.join(SOCKET));
                Err(e)
            }
        }
    }
    /// Waits for the server's end, or for a signal.
    fn stay(mut self) -> Result<()> {
        let ended = loop {
            match self.server.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break status,
                Err(e) => return Err(Error::io("wait for", "the server", &e)),
            }
            match wait_signal() {
                libc::SIGTERM | libc::SIGINT => self.shut_down(),
                // SIGCHLD: the loop looks; SIGHUP: there is no terminal to lose.
                _ => {}
            }
        };
        drop(self.listener);
        let run_dir = place_of(&self.run_dir);
        let mount = run_dir.join(MOUNT);
        let _ = std::fs::remove_file(run_dir.join(SOCKET));
        let orderly = ended.success();
        if !orderly {
            tracing::error!(
                "the server died ({ended}): disks that were attached give I/O errors; attach them again"
            );
        }
        // In order nothing is open any more; else requests that wait must fail.
        if !orderly || fuse_mount::unmount(&mount).is_err() {
            dead::note(&run_dir, &mount);
            let _ = fuse_mount::abort(&mount);
        }
        drop(self.fuse);
        clear_away(&run_dir, &mount);
        tracing::info!("the daemon ends");
        if orderly {
            Ok(())
        } else {
            Err(Error::new(Kind::Io, format!("the server died: {ended}")))
        }
    }
    /// On SIGTERM: unmounts and detaches what nobody uses, then ends the server, which flushes the rest.
    fn shut_down(&self) {
        tracing::info!("asked to end: detaching what is attached");
        let detached = Client::connect_in(&self.run_dir, &self.store).and_then(|client| {
            let Some(mut client) = client else {
                return Ok(());
            };
            for a in client.attached()? {
                if let Some(device) = &a.device {
                    for dir in attach::mounts_of(Path::new(device))?.iter().rev() {
                        if let Err(e) = attach::unmount(dir) {
                            tracing::warn!("{e}");
                        }
                    }
                }
                for _ in 0..a.count {
                    if let Err(e) = client.detach(&a.name) {
                        tracing::warn!("{e}");
                        write_back(&a);
                        break;
                    }
                }
            }
            Ok(())
        });
        if let Err(e) = detached {
            tracing::warn!("{e}");
        }
        // Not by a signal: those the server passes on to us.
        let _ = (&self.line).write_all(b"q");
    }
}

/// Whoever uses what stays attached will get errors; what was written until now is not to be lost.
fn write_back(attached: &Attached) {
    let Some(device) = &attached.device else {
        return;
    };
    for dir in attach::mounts_of(Path::new(device)).unwrap_or_default() {
        let synced = File::open(&dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        if let Err(e) = synced {
            tracing::warn!("{}", Error::io("write back", dir, &e));
        }
    }
    if let Err(e) = File::open(device).and_then(|device| device.sync_all()) {
        tracing::warn!("{}", Error::io("write back", device, &e));
    }
}

fn take_lock(run_dir: &Path) -> Result<File> {
    let path = run_dir.join(LOCK);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|e| Error::io("open", &path, &e))?;
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // One that is just ending holds it for a moment longer than it answers.
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(
                    Error::new(Kind::Busy, "a daemon runs for this store already")
                        .path(path)
                        .hint("`forkdisk daemon status` shows it"),
                );
            }
            Err(e) => return Err(Error::io("lock", &path, &e.into())),
        }
    }
}

/// Takes away what a dead daemon left: its mount, and loop devices over files of it that nobody uses.
fn clear_away(run_dir: &Path, mount: &Path) {
    dead::note(run_dir, mount);
    // More than one if daemons died one after the other.
    for _ in 0..8 {
        match mounts::at(mount) {
            Ok(Some(found)) if found.fs_type.starts_with("fuse") => {
                tracing::info!("the mount of a dead daemon was taken away");
                if fuse_mount::abort(mount).is_err() {
                    break;
                }
            }
            _ => break,
        }
    }
    dead::take_away_idle(run_dir);
}

/// Loop devices whose backing file is in `dir`, by what sysfs says.
pub(super) fn loop_devices_over(dir: &Path) -> Vec<PathBuf> {
    let Ok(all) = std::fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    all.flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("loop"))
        .map(|e| Path::new("/dev").join(e.file_name()))
        .filter(|device| loopdev::backing_file(device).is_some_and(|f| f.starts_with(dir)))
        .collect()
}

/// The control socket: only for the owner (and root), also in the moment of its making.
fn listen(run_dir: &Path) -> Result<OwnedFd> {
    let shown = run_dir.join(SOCKET);
    let (_dir, path) = socket_path(run_dir)?;
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("remove", &shown, &e));
        }
        _ => {}
    }
    let io = |what: &'static str| {
        let shown = shown.clone();
        move |e: rustix::io::Errno| Error::io(what, shown, &e.into())
    };
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(io("make"))?;
    let address = SocketAddrUnix::new(&path).map_err(io("name"))?;
    rustix::net::bind(&socket, &address).map_err(io("bind"))?;
    rustix::fs::chmod(&path, Mode::RUSR | Mode::WUSR).map_err(io("protect"))?;
    // Nobody can connect before this.
    rustix::net::listen(&socket, 128).map_err(io("listen on"))?;
    Ok(socket)
}

fn start_server(store: &Store, fuse: &OwnedFd, listener: &OwnedFd) -> Result<(UnixStream, Child)> {
    let io = |e: std::io::Error| Error::io("start", "the server", &e);
    let (here, there) = UnixStream::pair().map_err(io)?;
    let mut server = own_command(store, SERVE_COMMAND)?
        .stdin(Stdio::from(OwnedFd::from(there)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(io)?;
    fdpass::send(&here, b"d", &[fuse.as_fd(), listener.as_fd()]).map_err(io)?;
    // One byte when it serves; the end if it could not.
    let mut word = [0; 1];
    match (&here).read(&mut word) {
        Ok(1) => Ok((here, server)),
        _ => {
            let status = server.wait().map_err(io)?;
            Err(
                Error::new(Kind::Io, format!("the server could not begin ({status})"))
                    .path(store.run_dir().join(LOG))
                    .hint("its log tells why"),
            )
        }
    }
}

/// The signals the daemon waits for, blocked in this thread and those it starts.
pub(super) fn signals(child: bool) {
    // SAFETY: `set` is plain data, emptied before use; sigprocmask touches this thread's mask only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        if child {
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Waits for one of the blocked signals.
pub(super) fn wait_signal() -> i32 {
    // SAFETY: `set` is plain data, emptied before use; sigwait writes to `got` only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD] {
            libc::sigaddset(&raw mut set, signal);
        }
        let mut got = 0;
        libc::sigwait(&raw const set, &raw mut got);
        got
    }
}
