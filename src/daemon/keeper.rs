//! The keeper: the process that outlives servers.
//!
//! It takes the daemon's lock, makes the mount and the socket, starts the server, hands both over, and waits. It never looks at a disk,
//! so there is little in it that could fail. Single-threaded; it may wait for requests on served files, as the server must not.
//!
//! While it lives, the descriptor of the mount lives, and with it all requests that were not answered; so does the handover, in which stands what the
//! server must leave to its successor. When the server ends in order, the keeper takes mount and socket away. When the server dies, it starts
//! another one, which goes on: users of the disks see a pause. Only where the kernel cannot pass on requests (before Linux 6.9, and with the
//! transport io_uring), or no server comes up any more, it ends the mount, so that I/O fails instead of hanging: what was flushed is safe in the layers.
//!
//! A keeper that is killed is replaced too, by the server: whoever is left brings the other back. Only if both die at once is the mount lost.
//!
//! For a takeover by another program the keeper itself becomes that program, with the same descriptors and the same number.

use super::client::{Client, Waiting, socket_path};
use super::handover::Handover;
use super::{Attached, LOCK, LOG, MOUNT, NBD, SOCKET, dead, log, place_of, protocol, server};
use crate::attach;
use crate::error::{Error, Kind, Result};
use crate::serve::fuse::mount as fuse_mount;
use crate::serve::fuse::session::{Negotiated, Transport};
use crate::store::Store;
use crate::sys::{cgroup, loopdev};
use crate::sys::{fdpass, mounts, private, process};
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The hidden command that becomes the server.
const SERVE_COMMAND: &str = "serve";
/// The hidden command that becomes the keeper, in the background.
const KEEP_COMMAND: &str = "keep";

/// Servers that may fail to begin, one after the other, before the keeper gives up.
const ATTEMPTS: u32 = 10;
/// A server that lives shorter than this may be killed by what it serves.
const SHORT_LIFE: Duration = Duration::from_millis(300);
/// So many of them in a row, and the next waits a little.
const SHORT_LIVES: u32 = 5;
/// So many, and the keeper gives up.
const TOO_MANY: u32 = 200;

/// How long a daemon that was told to stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(120);

/// The program that we are. Its file may have been replaced since: then the one that runs still is what our descriptors are for.
fn own_program() -> Result<PathBuf> {
    const SELF: &str = "/proc/self/exe";
    let io = |e: std::io::Error| Error::io("find", "the forkdisk program", &e);
    let exe = std::env::current_exe().map_err(io)?;
    let running = std::fs::metadata(SELF).map_err(io)?;
    let same = |m: std::fs::Metadata| (m.dev(), m.ino()) == (running.dev(), running.ino());
    Ok(match std::fs::metadata(&exe).is_ok_and(same) {
        true => exe,
        false => SELF.into(),
    })
}

/// The store's directory, where it is now: it may have been moved since the run directory was opened.
fn store_of(run_dir: &File) -> PathBuf {
    let run_dir = place_of(run_dir);
    run_dir.parent().unwrap_or(&run_dir).to_path_buf()
}

/// A hidden command of the program that we are.
pub(super) fn own_command(store: &Path, command: &str) -> Result<Command> {
    let exe = own_program()?;
    let mut child = Command::new(exe);
    child
        .arg("--store")
        .arg(store)
        .args(["daemon", command])
        .stdin(Stdio::null());
    Ok(child)
}

/// Starts a daemon in the background and returns when it serves.
pub(super) fn start(store: &Store, transport: Transport) -> Result<()> {
    let path =
        std::path::absolute(store.path()).map_err(|e| Error::io("find", store.path(), &e))?;
    let store = Store::open(&path)?;
    let mut child = own_command(store.path(), KEEP_COMMAND)?
        .args(["--transport", transport.word()])
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
pub fn run(store: Store, foreground: bool, transport: Transport) -> Result<()> {
    if !foreground {
        return start(&store, transport);
    }
    let keeper = Keeper::begin(store, true, transport)?;
    keeper.stay()
}

/// Becomes the server: what the hidden command does.
pub fn serve(store: Store, transport: Transport) -> Result<()> {
    server::run(store, transport)
}

/// How a keeper begins.
#[derive(Clone, Debug)]
pub enum Keep {
    /// With a new mount and a new server, which gets its requests in this way.
    New(Transport),
    /// As the keeper that this process was as another program, with these descriptors.
    GoOn(String),
    /// In the place of a dead one, for the server of this number, which is at the other end of standard input.
    Adopt(i32),
}

/// Becomes the keeper.
pub fn keep(store: Store, how: Keep, foreground: bool) -> Result<()> {
    let transport = match how {
        Keep::New(transport) => transport,
        Keep::GoOn(descriptors) => return Keeper::go_on(store, &descriptors, foreground)?.stay(),
        Keep::Adopt(server) => return Keeper::adopt(store, server)?.stay(),
    };
    // In the background: no terminal, no directory that could not be unmounted.
    let _ = rustix::process::setsid();
    let _ = std::env::set_current_dir("/");
    let left = cgroup::leave_limited_memory();
    let begun = Keeper::begin(store, false, transport);
    if let Some(group) = left {
        tracing::info!(group = %group.display(), "left a group whose memory is limited");
    }
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
    store: Arc<Store>,
    /// Held for its lock.
    lock: File,
    /// The run directory, which may be moved with the store.
    run_dir: File,
    /// Keeps the mount alive.
    fuse: OwnedFd,
    listener: OwnedFd,
    /// What servers leave to each other.
    memory: File,
    foreground: bool,
    ending: Ending,
    server: Server,
}

/// How far the end of the daemon, which a signal asked for, has come.
enum Ending {
    /// Nobody asked.
    No,
    /// What nobody uses is being detached; true when that is done.
    Detaching(Arc<AtomicBool>),
    /// The server was told to end.
    Told,
}

/// The server, as the keeper sees it.
struct Server {
    process: Process,
    /// Its standard input: a byte tells the server to end, its end that we are gone.
    line: UnixStream,
    since: Instant,
}

enum Process {
    /// We started it.
    Child(Child),
    /// It started us. A thread sends us SIGCHLD when it ends.
    Adopted(OwnedFd),
}

impl Process {
    /// How it ended, for people, if it did.
    fn ended(&mut self) -> std::io::Result<Option<String>> {
        match self {
            Process::Child(child) => Ok(child.try_wait()?.map(|status| status.to_string())),
            Process::Adopted(pidfd) => Ok(process::wait_for_end(pidfd, Duration::ZERO)?
                .then(|| "another process had started it".to_string())),
        }
    }
}

/// Starts a server, if it must be with so many attempts.
fn patiently(attempts: u32, start: impl Fn() -> Result<Server>) -> Result<Server> {
    let mut pause = Duration::from_millis(20);
    for _ in 1..attempts {
        match start() {
            Ok(server) => return Ok(server),
            Err(e) => tracing::error!("{e}"),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(2));
    }
    start()
}

/// Is this the program that we are?
fn is_this_program(file: &OwnedFd) -> bool {
    let own = rustix::fs::stat("/proc/self/exe");
    let other = rustix::fs::fstat(file);
    own.is_ok_and(|own| {
        other.is_ok_and(|other| (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino))
    })
}

/// Why the keeper waits no longer.
enum Over {
    /// The server ended in order, and the daemon with it.
    Ended,
    /// Nobody can serve any more.
    Failed(String),
}

impl Keeper {
    /// Everything until the server serves.
    fn begin(store: Store, foreground: bool, transport: Transport) -> Result<Keeper> {
        // Before there is anything to take back.
        transport.available()?;
        let run_dir = store.run_dir();
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&run_dir)
            .map_err(|e| Error::io("create", &run_dir, &e))?;
        private::must_be_private(&run_dir)?;
        let lock = take_lock(&run_dir)?;
        if let Ok((_dir, path)) = socket_path(&run_dir)
            && UnixStream::connect(path).is_ok()
        {
            // A server that is just getting another keeper. Its mount is not ours to take away.
            return Err(
                Error::new(Kind::Busy, "a server runs for this store already")
                    .path(run_dir.join(SOCKET))
                    .hint("try again in a moment; `forkdisk daemon status` shows it"),
            );
        }
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
        // A mount goes where a link leads.
        private::must_be_private(&mount)?;
        let open = File::open(&run_dir).map_err(|e| Error::io("open", &run_dir, &e))?;
        // Signals are waited for, not caught; a child starts without this mask.
        signals(true);
        let fuse = fuse_mount::mount(&mount)?;
        let begun = (|| {
            let listener = listen(&run_dir)?;
            let memory = Handover::create()?;
            let server = start_server(&store_of(&open), &fuse, &listener, &memory, transport)?;
            Ok((listener, memory, server))
        })();
        match begun {
            Ok((listener, memory, server)) => {
                tracing::info!(store = %store.path().display(), "the daemon serves");
                Ok(Keeper {
                    store: Arc::new(store),
                    lock,
                    run_dir: open,
                    fuse,
                    listener,
                    memory,
                    foreground,
                    ending: Ending::No,
                    server,
                })
            }
            Err(e) => {
                let _ = fuse_mount::abort(&mount);
                let _ = std::fs::remove_file(run_dir.join(SOCKET));
                Err(e)
            }
        }
    }
    /// Goes on as the keeper that was another program until now. `descriptors`: as [`Keeper::descriptors`] lists them.
    fn go_on(store: Store, descriptors: &str, foreground: bool) -> Result<Keeper> {
        signals(true);
        log::begin(&store.run_dir(), foreground)?;
        let inherited = inherited(descriptors)?;
        let [fuse, listener, memory, lock, run_dir, former] = inherited;
        let (memory, lock, run_dir) = (File::from(memory), File::from(lock), File::from(run_dir));
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            "the keeper is another program now"
        );
        let path = store_of(&run_dir);
        // Only over the device can a session be taken over.
        let transport = Transport::Device;
        // Where we are the former program, it is us who came back: there is nothing else to go back to.
        let returned = is_this_program(&former);
        let begun = patiently(if returned { ATTEMPTS } else { 1 }, || {
            start_server(&path, &fuse, &listener, &memory, transport)
        });
        let server = match begun {
            Ok(server) => Ok(server),
            Err(e) if returned => {
                tracing::error!(
                    "no server can take over: {e}; disks that were attached give I/O errors: attach them again"
                );
                let mount = store.run_dir().join(MOUNT);
                dead::note(&store.run_dir(), &mount);
                let _ = fuse_mount::abort(&mount);
                Err(e)
            }
            Err(e) => {
                // Back to what worked, if that can be.
                tracing::error!("the new program cannot serve: {e}; back to the former one");
                let all = [&fuse, &listener].map(|fd| fd.as_fd());
                let rest = [&memory, &lock, &run_dir].map(|fd| fd.as_fd());
                let all = [all[0], all[1], rest[0], rest[1], rest[2], former.as_fd()];
                let path = format!("/proc/self/fd/{}", former.as_raw_fd());
                Err(become_program(
                    &store_of(&run_dir),
                    Path::new(&path),
                    all,
                    foreground,
                ))
            }
        };
        Ok(Keeper {
            server: server?,
            store: Arc::new(store),
            lock,
            run_dir,
            fuse,
            listener,
            memory,
            foreground,
            ending: Ending::No,
        })
    }
    /// Takes the place of a dead keeper.
    fn adopt(store: Store, server: i32) -> Result<Keeper> {
        let _ = rustix::process::setsid();
        let _ = std::env::set_current_dir("/");
        signals(true);
        let run_dir = store.run_dir();
        log::begin(&run_dir, false)?;
        let lock = take_lock(&run_dir)?;
        let open = File::open(&run_dir).map_err(|e| Error::io("open", &run_dir, &e))?;
        let io = |e: std::io::Error| Error::io("hear from", "the server", &e);
        let line = UnixStream::from(rustix::io::dup(std::io::stdin()).map_err(|e| io(e.into()))?);
        let (_, fds) = fdpass::receive(&line, &mut [0; 1]).map_err(io)?;
        let [fuse, listener, memory]: [OwnedFd; 3] = fds
            .try_into()
            .map_err(|_| Error::new(Kind::Invalid, "the server sent no descriptors"))?;
        let pidfd = process::pidfd(server).map_err(io)?;
        let watched = pidfd.try_clone().map_err(io)?;
        std::thread::Builder::new()
            .name("server's end".into())
            .spawn(move || {
                while !process::wait_for_end(&watched, STOP_PATIENCE).unwrap_or(true) {}
                let _ = rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::CHILD,
                );
            })
            .map_err(io)?;
        (&line).write_all(b"k").map_err(io)?;
        tracing::info!("a new keeper, as the last one died");
        Ok(Keeper {
            store: Arc::new(store),
            lock,
            run_dir: open,
            fuse,
            listener,
            memory: memory.into(),
            foreground: false,
            ending: Ending::No,
            server: Server {
                process: Process::Adopted(pidfd),
                line,
                since: Instant::now(),
            },
        })
    }
    /// Serves until the end.
    fn stay(mut self) -> Result<()> {
        let over = self.watch();
        drop(self.listener);
        let run_dir = place_of(&self.run_dir);
        let mount = run_dir.join(MOUNT);
        for socket in [SOCKET, NBD] {
            let _ = std::fs::remove_file(run_dir.join(socket));
        }
        if let Over::Failed(why) = &over {
            tracing::error!("{why}: disks that were attached give I/O errors; attach them again");
        }
        // In order nothing is open any more; else requests that wait must fail.
        if matches!(over, Over::Failed(_)) || fuse_mount::unmount(&mount).is_err() {
            dead::note(&run_dir, &mount);
            let _ = fuse_mount::abort(&mount);
        }
        drop(self.fuse);
        clear_away(&run_dir, &mount);
        tracing::info!("the daemon ends");
        match over {
            Over::Ended => Ok(()),
            Over::Failed(why) => Err(Error::new(Kind::Io, why)),
        }
    }
    /// Sees to it that there is a server, as long as there can be one.
    fn watch(&mut self) -> Over {
        let mut short_lives = 0;
        loop {
            let ended = match self.wait() {
                Ok(ended) => ended,
                Err(e) => return Over::Failed(format!("cannot wait for the server: {e}")),
            };
            let said = Handover::open_file(&self.memory).and_then(|h| h.session());
            let said = match said {
                Ok(said) => said.unwrap_or_default(),
                Err(e) => return Over::Failed(format!("the server ended ({ended}): {e}")),
            };
            let program = said["program"].as_str().map(PathBuf::from);
            match program {
                _ if said["ended"] == true => return Over::Ended,
                // Asked to end, the daemon ends as what it is: another program would not know of it.
                Some(_) if !matches!(self.ending, Ending::No) => {
                    tracing::info!("the daemon is about to end: it becomes no other program");
                }
                Some(program) => {
                    let e = self.become_another(&program);
                    tracing::error!("cannot become {}: {e}", program.display());
                }
                None => {
                    let can = serde_json::from_value(said["negotiated"].clone())
                        .is_ok_and(|n: Negotiated| n.can_resend());
                    if !can {
                        return Over::Failed(format!("the server died ({ended})"));
                    }
                    tracing::error!("the server died ({ended}): another one takes over");
                    if said["ending"] == true {
                        // It had promised to end.
                        self.ending = Ending::Told;
                    }
                }
            }
            short_lives = match self.server.since.elapsed() < SHORT_LIFE {
                true => short_lives + 1,
                false => 0,
            };
            if short_lives > TOO_MANY {
                return Over::Failed(format!("{TOO_MANY} servers died at once ({ended})"));
            }
            if short_lives > SHORT_LIVES {
                std::thread::sleep(SHORT_LIFE);
            }
            if let Err(e) = self.start_another() {
                return Over::Failed(format!("no server can take over: {e}"));
            }
        }
    }
    /// Waits for the server's end, and does what signals ask for.
    fn wait(&mut self) -> std::io::Result<String> {
        loop {
            if let Some(ended) = self.server.process.ended()? {
                return Ok(ended);
            }
            match wait_signal() {
                libc::SIGTERM | libc::SIGINT => self.begin_to_end(),
                // SIGCHLD: the loop looks; SIGHUP: there is no terminal to lose.
                _ => {}
            }
            if let Ending::Detaching(done) = &self.ending
                && done.load(SeqCst)
            {
                self.ending = Ending::Told;
                self.tell_to_end();
            }
        }
    }
    /// On SIGTERM, once: unmounts and detaches what nobody uses, then ends the server, which flushes the rest. On a thread of its own: should
    /// the server die meanwhile, another one must be started for it to talk to.
    fn begin_to_end(&mut self) {
        let Ending::No = self.ending else {
            return;
        };
        tracing::info!("asked to end: detaching what is attached");
        let (store, run_dir) = (self.store.clone(), self.run_dir.try_clone());
        let done = Arc::new(AtomicBool::new(false));
        let detached = done.clone();
        let work = std::thread::Builder::new().spawn(move || {
            if let Err(e) = run_dir
                .map_err(|e| Error::io("open", store.run_dir(), &e))
                .and_then(|run_dir| detach_all(&run_dir, &store))
            {
                tracing::warn!("{e}");
            }
            detached.store(true, SeqCst);
            // Wakes whoever waits for signals.
            let own = rustix::process::getpid();
            let _ = rustix::process::kill_process(own, rustix::process::Signal::HUP);
        });
        self.ending = match work {
            Ok(_) => Ending::Detaching(done),
            Err(e) => {
                tracing::warn!("{}", Error::io("start", "a thread", &e));
                self.tell_to_end();
                Ending::Told
            }
        };
    }
    /// Not by a signal: those the server passes on to us.
    fn tell_to_end(&self) {
        let _ = (&self.server.line).write_all(b"q");
    }
    fn start_another(&mut self) -> Result<()> {
        // Whatever the last one wanted to make way for: it is this program that goes on.
        let handover = Handover::open_file(&self.memory)?;
        if let Some(mut said) = handover.session()?
            && said
                .as_object_mut()
                .is_some_and(|s| s.remove("program").is_some())
        {
            handover.set_session(said)?;
        }
        drop(handover);
        self.server = patiently(ATTEMPTS, || {
            let path = store_of(&self.run_dir);
            let way = Transport::Device;
            start_server(&path, &self.fuse, &self.listener, &self.memory, way)
        })?;
        if let Ending::Told = self.ending {
            self.tell_to_end();
        }
        Ok(())
    }
    /// Becomes `program` in this process; returns only if that fails.
    fn become_another(&self, program: &Path) -> Error {
        let former = match File::open("/proc/self/exe") {
            Ok(former) => former,
            Err(e) => return Error::io("open", "the running program", &e),
        };
        let descriptors = [
            self.fuse.as_fd(),
            self.listener.as_fd(),
            self.memory.as_fd(),
            self.lock.as_fd(),
            self.run_dir.as_fd(),
            former.as_fd(),
        ];
        become_program(
            &store_of(&self.run_dir),
            program,
            descriptors,
            self.foreground,
        )
    }
}

/// Unmounts and detaches what nobody uses.
fn detach_all(run_dir: &File, store: &Store) -> Result<()> {
    let Some(mut client) = Client::connect_in(run_dir, store)? else {
        return Ok(());
    };
    for a in client.attached()? {
        // Who waits for room would keep all from ending.
        if let Err(e) = client.waiting(&a.name, Waiting::Fail) {
            tracing::warn!("{e}");
        }
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
    let begun = Instant::now();
    // One that is just ending holds it for a moment longer than it answers; who takes away what a dead one left, as long as devices take to go.
    let may_go = || match begun.elapsed() {
        waited if waited < Duration::from_secs(2) => true,
        waited => waited < Duration::from_secs(15) && !is_served(run_dir),
    };
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if may_go() => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let (why, hint) = match is_served(run_dir) {
                    true => (
                        "a daemon runs for this store already",
                        "`forkdisk daemon status` shows it",
                    ),
                    false => (
                        "the lock of this store's daemon is held, and nobody answers",
                        "`fuser` tells who holds it",
                    ),
                };
                return Err(Error::new(Kind::Busy, why).path(path).hint(hint));
            }
            Err(e) => return Err(Error::io("lock", &path, &e.into())),
        }
    }
}

/// Does somebody answer at the socket?
fn is_served(run_dir: &Path) -> bool {
    socket_path(run_dir).is_ok_and(|(_dir, path)| UnixStream::connect(path).is_ok())
}

/// Does a keeper live in this run directory?
pub(super) fn is_kept(run_dir: &File) -> bool {
    let path = format!("/proc/self/fd/{}/{LOCK}", run_dir.as_raw_fd());
    let Ok(file) = File::open(path) else {
        return false;
    };
    // Taken and given back at once: a daemon that just begins tries for longer than that.
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)
        == Err(rustix::io::Errno::WOULDBLOCK)
}

/// Takes away what a dead daemon left, if one did and none lives: of no use to anybody, and in the way of who removes the store. Says whether there was
/// something.
pub fn clear_dead(store: &Store) -> bool {
    let run_dir = store.run_dir();
    let Ok(mount) = std::path::absolute(run_dir.join(MOUNT)) else {
        return false;
    };
    let is_left = || {
        let found = mounts::at(&mount).ok().flatten();
        found.is_some_and(|found| found.fs_type.starts_with("fuse"))
    };
    // Most often there is nothing, and nothing is to be made to find that out.
    if !is_left() || private::must_be_private(&run_dir).is_err() {
        return false;
    }
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let lock = File::options()
        .read(true)
        .custom_flags(flags)
        .open(run_dir.join(LOCK));
    let Ok(lock) = lock else {
        return false;
    };
    // As long as we hold it nobody begins. A server may live without its keeper for a moment.
    let ours = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
    if !ours || is_served(&run_dir) {
        return false;
    }
    clear_away(&run_dir, &mount);
    !is_left()
}

/// Takes away what a dead daemon left: its mount, and loop devices over files of it that nobody uses.
fn clear_away(run_dir: &Path, mount: &Path) {
    dead::note(run_dir, mount);
    let _ = std::fs::remove_file(run_dir.join(NBD));
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

/// The control socket.
fn listen(run_dir: &Path) -> Result<OwnedFd> {
    let (_dir, path) = socket_path(run_dir)?;
    private::listen(&path, &run_dir.join(SOCKET))
}

/// Becomes another program, which gets these descriptors; returns only if that fails.
fn become_program(
    store: &Path,
    program: &Path,
    descriptors: [BorrowedFd<'_>; 6],
    foreground: bool,
) -> Error {
    let inheritable = |yes: bool| {
        let flags = match yes {
            true => FdFlags::empty(),
            false => FdFlags::CLOEXEC,
        };
        for fd in descriptors {
            let _ = rustix::io::fcntl_setfd(fd, flags);
        }
    };
    let numbers: Vec<String> = descriptors
        .iter()
        .map(|fd| fd.as_raw_fd().to_string())
        .collect();
    let mut command = Command::new(program);
    command
        .arg("--store")
        .arg(store)
        .args(["daemon", "keep", "--go-on", &numbers.join(",")]);
    if foreground {
        command.arg("--foreground");
    }
    inheritable(true);
    let e = command.exec();
    inheritable(false);
    Error::io("run", program, &e)
}

/// Takes the descriptors over that [`become_program`] left open.
fn inherited(numbers: &str) -> Result<[OwnedFd; 6]> {
    let wrong = || {
        Error::new(
            Kind::Invalid,
            format!("`{numbers}` are not the descriptors of a keeper"),
        )
        .hint("only a keeper can begin like this; `forkdisk daemon takeover` asks it to")
    };
    let numbers: Vec<i32> = numbers
        .split(',')
        .map(|n| n.parse().map_err(|_| wrong()))
        .collect::<Result<_>>()?;
    let mut taken = Vec::new();
    for (i, &fd) in numbers.iter().enumerate() {
        // SAFETY: only asks; an fd that is not open is an error.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        // Those of the standard streams are nobody's to take, and none twice.
        if fd <= 2 || flags < 0 || numbers[..i].contains(&fd) {
            return Err(wrong());
        }
        // SAFETY: it is open, above the standard streams, and nobody in this process, which has just begun, owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let _ = rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC);
        taken.push(fd);
    }
    taken.try_into().map_err(|_| wrong())
}

fn start_server(
    store: &Path,
    fuse: &OwnedFd,
    listener: &OwnedFd,
    memory: &File,
    transport: Transport,
) -> Result<Server> {
    let io = |e: std::io::Error| Error::io("start", "the server", &e);
    let (here, there) = UnixStream::pair().map_err(io)?;
    let mut process = own_command(store, SERVE_COMMAND)?
        .args(["--transport", transport.word()])
        .stdin(Stdio::from(OwnedFd::from(there)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(io)?;
    let sent = fdpass::send(
        &here,
        b"d",
        &[fuse.as_fd(), listener.as_fd(), memory.as_fd()],
    );
    // One byte when it serves; the end if it could not.
    let mut word = [0; 1];
    match sent.and_then(|_| (&here).read(&mut word)) {
        Ok(1) => Ok(Server {
            process: Process::Child(process),
            line: here,
            since: Instant::now(),
        }),
        _ => {
            let status = process.wait().map_err(io)?;
            Err(
                Error::new(Kind::Io, format!("the server could not begin ({status})"))
                    .path(store.join("run").join(LOG))
                    .hint("its log tells why"),
            )
        }
    }
}

/// Starts a keeper in the place of one that died, for the server that we are. Returns the line to it, and its number.
pub(super) fn replace(
    run_dir: &File,
    fuse: impl AsFd,
    listener: impl AsFd,
    memory: impl AsFd,
) -> Result<(UnixStream, i32)> {
    let io = |e: std::io::Error| Error::io("start", "a keeper", &e);
    let (here, there) = UnixStream::pair().map_err(io)?;
    let own = std::process::id().to_string();
    let mut child = own_command(&store_of(run_dir), KEEP_COMMAND)?
        .args(["--adopt", &own])
        .stdin(Stdio::from(OwnedFd::from(there)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io)?;
    fdpass::send(
        &here,
        b"d",
        &[fuse.as_fd(), listener.as_fd(), memory.as_fd()],
    )
    .map_err(io)?;
    match (&here).read(&mut [0; 1]) {
        Ok(1) => {
            let pid = child.id() as i32;
            // So that it is no zombie when it ends.
            let waiting = std::thread::Builder::new().name("new keeper".into());
            let _ = waiting.spawn(move || child.wait());
            Ok((here, pid))
        }
        _ => Err(Error::new(Kind::Io, "the new keeper could not begin")),
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
