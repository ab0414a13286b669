//! The server: attached disks, the threads that serve their files, and the control socket.
//!
//! Always true:
//! - an object is in the table before its disk is opened and until after it is closed, so it is never open twice;
//! - no thread here waits for a request on a served file: that would be itself;
//! - what one conversation began and did not end (an attachment, a detachment) is decided when it breaks off, by what the kernel says
//!   of the loop device;
//! - what a successor needs stands in the handover before anybody is told that it is done.

use super::changes::in_use;
use super::client::answer;
use super::conversation::{self, Conversation};
use super::entry::{self, Entry, Phase, inherit, share};
use super::handover::{self, Handover};
use super::keeper::{self, loop_devices_over};
use super::protocol::{self, flag, number, text};
use super::running::TakenUp;
use super::{Attached, LOG, MOUNT, NBD, SOCKET, Via, file_name, layers, log, place_of};
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::serve::awake::{Awake, Mode};
use crate::serve::files::Files;
use crate::serve::fuse::session::{Init, Negotiated, Options, Session, Transport};
use crate::serve::nbd::Exports;
use crate::store::{ObjectKind, Store};
use crate::sys::process::{self, Process};
use crate::sys::{fdpass, latency, loopdev};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// In the environment of the daemon: when processors are kept awake while requests follow each other ([`Mode`]).
const AWAKE: &str = "FORKDISK_AWAKE";
/// How often disks are looked after: freed space goes back to the host.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// How long a command waits for another one that attaches or detaches the same.
const TRANSIT: Duration = Duration::from_secs(30);

/// How long a command whose conversation ended with the last server may take to come back.
const GRACE: Duration = Duration::from_secs(3);

/// How long the end waits until those who wait for room were told that there is none.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// How long the end of the daemon may take for space that seals left.
const LAST_GIFTS: Duration = Duration::from_secs(1);

/// How long a takeover waits for commands that attach or detach.
const CALM: Duration = Duration::from_secs(10);

/// How often it looks whether they came to their end.
const CALM_STEP: Duration = Duration::from_millis(20);

/// Longest path by which a socket can be known: `sun_path` of unix(7), without its end.
const MAX_SOCKET_PATH: usize = 107;

pub(super) struct Server {
    pub(super) store: Store,
    pub(super) files: Arc<Files>,
    pub(super) session: Session,
    pub(super) exports: Arc<Exports>,
    pub(super) table: Mutex<BTreeMap<String, Entry>>,
    /// Told whenever an attachment or a detachment may have come to its end.
    pub(super) settled: Condvar,
    /// The run directory, which may be moved with the store.
    pub(super) run_dir: File,
    pub(super) started: Instant,
    pub(super) keeper: AtomicI32,
    pub(super) threads: Mutex<conversation::Threads>,
    pub(super) end: Mutex<Sender<End>>,
    pub(super) handover: Arc<Handover>,
    /// Held while word of the session is left.
    pub(super) noting: Mutex<()>,
    /// Requests that are being answered.
    pub(super) answering: AtomicI32,
    /// How many servers there were before this one.
    pub(super) before: u64,
    /// A successor is about to take over: no conversation begins any more.
    pub(super) leaving: AtomicBool,
    /// A disk got another size, and its device is to follow.
    pub(super) resized: AtomicBool,
    /// Held while layers are joined here, or give back what nobody sees.
    pub(super) joining: Mutex<()>,
    /// The disk below which they are joined.
    pub(super) joins_below: Mutex<Option<String>>,
    /// A layer below an attached disk lost its name.
    pub(super) nameless: AtomicBool,
}

/// Why the server ends.
pub(super) enum End {
    /// The daemon ends.
    Stop,
    /// A successor takes over.
    Handover,
}

/// What keeps processors awake, as the environment has it.
fn awake() -> Awake {
    let word = std::env::var(AWAKE).unwrap_or_default();
    let mode = Mode::of(&word).unwrap_or_else(|| {
        tracing::warn!("{AWAKE}={word}: it can be auto, on or off; taken for off");
        Mode::Off
    });
    Awake::begin(mode).unwrap_or_else(|e| {
        tracing::info!("processors are not kept awake: {}: {e}", latency::DEVICE);
        Awake::off()
    })
}

/// Becomes the server: the descriptors come over standard input.
pub fn run(store: Store, transport: Transport) -> Result<()> {
    log::begin(&store.run_dir(), false)?;
    let ended = serve(store, transport);
    if let Err(e) = &ended {
        tracing::error!("the server ends: {e:?}");
    }
    ended
}

fn serve(store: Store, transport: Transport) -> Result<()> {
    // Before any thread starts, as all of them serve I/O that the kernel may need to free memory.
    if !process::set_io_flusher() {
        tracing::info!("not allowed to be an I/O flusher (needs CAP_SYS_RESOURCE)");
    }
    let _ = process::set_oom_score_adj(-900);
    process::raise_open_files_limit();
    keeper::signals(false);
    let line = UnixStream::from(
        rustix::io::dup(std::io::stdin())
            .map_err(|e| Error::io("open", "the line to the keeper", &e.into()))?,
    );
    let (_, fds) = fdpass::receive(&line, &mut [0; 1])
        .map_err(|e| Error::io("hear from", "the keeper", &e))?;
    let [fuse, listener, memory]: [OwnedFd; 3] = fds
        .try_into()
        .map_err(|_| Error::new(Kind::Invalid, "the keeper sent no descriptors"))?;
    let listener = UnixListener::from(listener);
    let files = Arc::new(Files::with(awake()));
    let handover = Handover::open(File::from(memory))?;
    let said = handover.session()?;
    let (init, table, before) = match &said {
        None => (Init::Fresh, BTreeMap::new(), 0),
        Some(said) => {
            let negotiated: Negotiated = serde_json::from_value(said["negotiated"].clone())
                .map_err(|e| {
                    Error::new(Kind::Invalid, format!("no session can be taken over: {e}"))
                })?;
            files.reserve_inos(number(said, "next_ino")?);
            let table = inherit(&store, &files, &handover)?;
            (Init::Resumed(negotiated), table, number(said, "servers")?)
        }
    };
    let io = |e: std::io::Error| Error::io("keep", "a descriptor", &e);
    let own_fuse = fuse.try_clone().map_err(io)?;
    let own_listener = listener.try_clone().map_err(io)?;
    let keeper_pid = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
    let options = Options {
        transport,
        ..Options::default()
    };
    let session = Session::start(fuse, files.clone(), init, options)?;
    let run_dir =
        File::open(store.run_dir()).map_err(|e| Error::io("open", store.run_dir(), &e))?;
    let (end, ended) = channel();
    let server = Arc::new_cyclic(|server: &Weak<Server>| Server {
        store,
        exports: {
            let server = server.clone();
            Exports::new(files.clone(), move |ino, clients| {
                if let Some(server) = server.upgrade() {
                    server.note_clients(ino, clients);
                }
            })
        },
        files,
        session,
        table: Mutex::new(table),
        settled: Condvar::new(),
        run_dir,
        started: Instant::now(),
        keeper: AtomicI32::new(keeper_pid),
        threads: Mutex::default(),
        end: Mutex::new(end.clone()),
        handover,
        noting: Mutex::default(),
        answering: AtomicI32::new(0),
        before,
        leaving: AtomicBool::new(false),
        joining: Mutex::new(()),
        joins_below: Mutex::default(),
        nameless: AtomicBool::new(false),
        resized: AtomicBool::new(false),
    });
    server.note_session()?;
    server.export_inherited();
    if before > 0 {
        server.store.inherit();
        let attached = server.table.lock().len();
        tracing::info!(
            attached,
            servers = before + 1,
            "took over from the last server"
        );
    }
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map(|_| ())
            .map_err(|e| Error::io("start", "a thread", &e))
    };
    // A terminal or a service manager signals keeper and server at once. To end here would take the disks away from under their
    // filesystems before the keeper has unmounted them: so the keeper decides.
    let told = server.clone();
    spawn(
        "signals",
        Box::new(move || {
            loop {
                if matches!(super::keeper::wait_signal(), libc::SIGTERM | libc::SIGINT)
                    && let Some(keeper) = rustix::process::Pid::from_raw(told.keeper.load(SeqCst))
                {
                    let _ = rustix::process::kill_process(keeper, rustix::process::Signal::TERM);
                }
            }
        }),
    )?;
    conversation::listen(&server, &Arc::new(listener)).map_err(io)?;
    (&line)
        .write_all(b"r")
        .map_err(|e| Error::io("talk to", "the keeper", &e))?;
    // The keeper says when to end. If it dies, we start another one; only if that cannot be done is its death our end as well: nobody
    // else would take the mount away.
    let kept = server.clone();
    spawn(
        "keeper",
        Box::new(move || {
            let mut line = line;
            while !matches!((&line).read(&mut [0; 1]), Ok(1)) {
                tracing::error!("the keeper is gone: another one is started");
                kept.keeper.store(0, SeqCst);
                match keeper::replace(
                    &kept.run_dir,
                    &own_fuse,
                    &own_listener,
                    kept.handover.file(),
                ) {
                    Ok((new, pid)) => {
                        line = new;
                        kept.keeper.store(pid, SeqCst);
                    }
                    Err(e) => {
                        tracing::error!("{e}");
                        break;
                    }
                }
            }
            let _ = end.send(End::Stop);
        }),
    )?;
    if before > 0 {
        server.fit_devices();
        let server = server.clone();
        spawn("inherited", Box::new(move || server.settle_inherited()))?;
    }
    {
        let server = server.clone();
        spawn("layers", Box::new(move || layers::look_after(&server)))?;
    }
    match housekeep(&server, &ended) {
        End::Stop => {
            server.shut_down();
            Ok(())
        }
        End::Handover => {
            // Whoever asked for it is to hear of it before the process ends, and where there is much to do its thread may not run for a while.
            let deadline = Instant::now() + LAST_ANSWERS;
            while server.answering.load(SeqCst) > 0 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            // What is under way is answered. Nothing is closed: all stands in the handover.
            server.exports.look_after();
            server.exports.stop();
            server.session.stop();
            // A keeper that was killed is being replaced: without one nobody would hold what we leave.
            let deadline = Instant::now() + CALM;
            while !process::is_alive_and_well(server.keeper.load(SeqCst)) {
                if Instant::now() > deadline {
                    tracing::error!("there is no keeper to leave anything to");
                    server.shut_down();
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            tracing::info!("the server leaves everything to its successor");
            std::process::exit(0);
        }
    }
}

/// Looks after the disks until the end is asked for.
fn housekeep(server: &Server, ended: &Receiver<End>) -> End {
    loop {
        if let Ok(end) = ended.recv_timeout(HOUSEKEEPING) {
            return end;
        }
        if let Some(why) = server.session.ended() {
            tracing::error!("the mount is gone: {why:?}");
            return End::Stop;
        }
        let names: Vec<String> = server.table.lock().keys().cloned().collect();
        server.reopen_held();
        server.exports.look_after();
        if server.exports.is_deaf()
            && let Err(e) = server.listen_for_clients()
        {
            tracing::warn!("clients of NBD cannot connect: {e}");
        }
        for name in names {
            // One at a time: whoever holds a disk keeps its layer locked.
            let attached = server.table.lock().get(&name).and_then(|e| e.disk.clone());
            let Some(disk) = attached else { continue };
            match disk.maintain() {
                Err(e) if e.kind() == Kind::Poisoned => {}
                Err(e) => tracing::warn!(disk = name, "{e}"),
                Ok(()) => {}
            }
        }
    }
}

impl Server {
    pub(super) fn attach(&self, request: &Value, conversation: &mut Conversation) -> Result<Value> {
        let begun = &mut conversation.begun;
        let via = protocol::via_of(text(request, "via")?)?;
        let block_size = number(request, "block_size")?;
        let object = self.store.resolve(text(request, "reference")?)?;
        let read_only = flag(request, "read_only") || object.kind != ObjectKind::Disk;
        let passthrough = flag(request, "passthrough");
        if passthrough {
            super::may_pass_through(&object)?;
        }
        let memory;
        {
            let same = |e: &Entry| {
                e.attached.name == object.name
                    || (e.attached.id == object.id && object.kind != ObjectKind::Disk)
            };
            let mut table = self.table.lock();
            self.settle(&mut table, same, begun)?;
            if let Some(other) = table
                .values()
                .find(|e| !same(e) && file_name(&e.attached) == object.name.as_str())
            {
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "{} was attached as {}, and its file keeps that name",
                        other.attached.name, object.name
                    ),
                )
                .hint(format!("`forkdisk detach {}` first", other.attached.name)));
            }
            if let Some(entry) = table.values_mut().find(|e| same(e)) {
                if entry.attached.id != object.id && object.kind != ObjectKind::Disk {
                    // Renamed or removed behind our back: its file stands in the way.
                    return Err(Error::new(
                        Kind::Busy,
                        format!("something else is attached under the name {}", object.name),
                    )
                    .hint(format!("`forkdisk detach {}` first", object.name)));
                }
                share(entry, &object, read_only, via, block_size, passthrough)?;
                let mut said = self.shown(&entry.attached);
                said["fresh"] = false.into();
                return Ok(said);
            }
            let attached = Attached {
                name: object.name.clone(),
                id: object.id,
                kind: object.kind,
                read_only,
                passthrough,
                via,
                device: None,
                file: self.mount().join(&object.name),
                count: 1,
                size: object.size,
            };
            let entry = Entry {
                attached,
                block_size,
                ino: 0,
                dev: 0,
                disk: None,
                phase: Phase::Opening,
                backing: None,
                place: self.handover.claim()?,
                going: None,
                inherited: false,
                orphan: false,
                clients: Vec::new(),
                failed: None,
                taken_up: TakenUp::default(),
            };
            memory = entry.place.volatile();
            if let Err(e) = entry.note() {
                entry.place.release();
                return Err(e);
            }
            table.insert(object.name.clone(), entry);
        }
        let opened = memory.and_then(|memory| {
            let disk = match read_only {
                true => self.store.open_cow(&object, false)?,
                false => self.store.open_cow_on(&object, memory)?,
            };
            match via {
                Via::File | Via::Nbd => disk.settle()?,
                // While the command sets up the device.
                Via::Loop => conversation.unsettled = disk.unsettled(),
            }
            if via == Via::Nbd {
                self.listen_for_clients()?;
            }
            let (name, shown) = (&object.name, disk.clone());
            if !passthrough {
                return Ok((self.files.add(name, shown)?, disk, None));
            }
            let file = crate::disk::Disk::plain_file(&*disk)
                .map_err(|e| e.context(format!("cannot attach {name} with --passthrough")))?;
            let backing = self.session.open_backing(file.as_fd())?;
            let ino = self.files.add_backed(name, shown, None, backing);
            let ino = ino.inspect_err(|_| self.session.close_backing(backing))?;
            Ok((ino, disk, Some(backing)))
        });
        let noted = self.note_session();
        let mut table = self.table.lock();
        let (ino, disk, backing) = match opened.and_then(|opened| noted.map(|()| opened)) {
            Ok(opened) => opened,
            Err(e) => {
                if let Some(entry) = table.remove(&object.name) {
                    entry.place.release();
                }
                return Err(e);
            }
        };
        let entry = table
            .get_mut(&object.name)
            .ok_or_else(|| not_attached(&object.name))?;
        entry.attached.size = crate::disk::Disk::size(&*disk);
        if object.kind == ObjectKind::Disk {
            // It may have got another layer since it was looked up.
            entry.attached.id = disk.top_layer().unwrap_or(object.id);
        }
        entry.disk = Some(disk);
        entry.ino = ino;
        entry.backing = backing;
        entry.noted();
        match via {
            Via::Loop => begun.push(object.name.clone()),
            Via::File | Via::Nbd => {
                entry.set_phase(Phase::Ready);
                if via == Via::Nbd {
                    self.exports.show(ino);
                }
                tracing::info!(disk = object.name, via = via.word(), "attached");
            }
        }
        let mut said = self.shown(&entry.attached);
        said["fresh"] = true.into();
        Ok(said)
    }

    /// `force`: also if clients of NBD may come back.
    pub(super) fn detach(
        &self,
        target: &str,
        force: bool,
        begun: &mut Vec<String>,
    ) -> Result<Value> {
        let by_id = self.store.resolve(target).ok().map(|o| (o.kind, o.id));
        let mount = self.mount();
        let meant = |e: &Entry| {
            let a = &e.attached;
            a.name == target
                || a.device.as_deref() == Some(target)
                || mount.join(file_name(a)) == Path::new(target)
                || by_id == Some((a.kind, a.id))
        };
        self.wait_for_clients(meant);
        let mut table = self.table.lock();
        self.settle(&mut table, meant, begun)?;
        let entry = table.values_mut().find(|e| meant(e));
        let entry = entry.ok_or_else(|| not_attached(target))?;
        let name = entry.attached.name.clone();
        if entry.attached.count > 1 {
            entry.attached.count -= 1;
            entry.noted();
            let mut said = self.shown(&entry.attached);
            said["last"] = false.into();
            return Ok(said);
        }
        if entry.attached.via != Via::Loop {
            self.must_be_closed(entry)?;
        }
        if entry.attached.via == Via::Nbd {
            let unused = self.exports.hide_unused(entry.ino, force);
            unused.map_err(|users| in_use(entry, &users))?;
        }
        entry.set_phase(Phase::Closing);
        begun.push(name);
        let mut said = self.shown(&entry.attached);
        said["last"] = true.into();
        said["dev"] = entry.dev.into();
        said["server_pid"] = std::process::id().into();
        said["ino"] = entry.ino.into();
        Ok(said)
    }

    /// Takes an attachment away: the file, then the disk. Returns when all is durable.
    pub(super) fn close(&self, name: &str) -> Result<()> {
        let (ino, disk, backing) = {
            let mut table = self.table.lock();
            let entry = table.get_mut(name).ok_or_else(|| not_attached(name))?;
            if let Some(outcome) = entry.going.clone() {
                // Its place, and the log in it, are not ours to give away.
                while table.get(name).is_some_and(|e| e.going.is_some()) {
                    self.settled.wait_for(&mut table, CALM_STEP);
                }
                return outcome.lock().clone().map_or(Ok(()), Err);
            }
            entry.going = Some(Arc::default());
            entry.set_phase(Phase::Closing);
            (entry.ino, entry.disk.take(), entry.backing)
        };
        let removed = if ino != 0 {
            self.exports.hide(ino);
            // Waits for requests under way.
            self.files.remove(ino).map(|_| ())
        } else {
            Ok(())
        };
        if let Some(id) = backing {
            self.session.close_backing(id);
        }
        let closed = disk.as_ref().map_or(Ok(()), |d| d.close());
        // Is all flushed, so that only the tidying found no room? A flush that failed itself fails again.
        let flushed = match (&closed, &disk) {
            (Err(_), Some(disk)) => disk.flush(),
            _ => Ok(()),
        };
        // The lock of the layer file goes with the last handle, before anyone can see the name free.
        drop(disk);
        self.store.closed();
        let done = match closed {
            Err(e) if e.kind() == Kind::NoSpace && flushed.is_ok() => {
                // The next opening tidies up.
                tracing::warn!(disk = name, "closed without a checkpoint: {e}");
                removed
            }
            Err(e) => Err(e.context(format!(
                "{name} was detached, but could not be closed cleanly"
            ))),
            Ok(()) => removed,
        };
        if let Some(entry) = self.table.lock().remove(name) {
            if let Some(outcome) = &entry.going {
                *outcome.lock() = done.as_ref().err().cloned();
            }
            entry.place.release();
        }
        self.settled.notify_all();
        // Whoever joins layers below it ends now, and leaves nothing lying about.
        if self.joins_below.lock().as_deref() == Some(name) {
            let _joining = self.joining.try_lock_for(CALM);
        }
        done
    }

    /// A conversation ended in the middle of attaching or detaching: the kernel tells how far it came.
    pub(super) fn broken_off(&self, name: &str) {
        let file = {
            let table = self.table.lock();
            match table.get(name) {
                Some(entry) if entry.phase != Phase::Ready && entry.going.is_none() => {
                    self.mount().join(file_name(&entry.attached))
                }
                _ => return,
            }
        };
        let device = loop_devices_over(&self.mount())
            .into_iter()
            .find(|d| loopdev::backing_file(d).is_some_and(|f| f == file));
        let Some(device) = device else {
            tracing::warn!(disk = name, "a command broke off: the disk is closed");
            if let Err(e) = self.close(name) {
                tracing::warn!(disk = name, "{e}");
            }
            return;
        };
        tracing::warn!(disk = name, device = %device.display(), "a command broke off: the disk stays attached");
        let dev = loopdev::status(&device).ok().flatten().map_or(0, |s| s.dev);
        if let Some(entry) = self.table.lock().get_mut(name) {
            entry.attached.device = Some(device.display().to_string());
            self.files.shown_as(entry.ino, &device);
            entry.dev = dev;
            entry.set_phase(Phase::Ready);
        }
    }

    /// Tries again to open what a command held when we took over: its log is still there.
    fn reopen_held(&self) {
        let held: Vec<(String, u64)> = {
            let table = self.table.lock();
            let held = table.values().filter(|e| {
                e.phase == Phase::Ready
                    && e.failed
                        .as_ref()
                        .is_some_and(|why| why.kind() == Kind::Busy)
            });
            held.map(|e| (e.attached.name.clone(), e.ino)).collect()
        };
        for (name, ino) in held {
            let mut table = self.table.lock();
            let Some(entry) = table.get_mut(&name).filter(|e| e.phase == Phase::Ready) else {
                continue;
            };
            match entry::open_again(&self.store, &entry.attached, &entry.place) {
                Err(e) if e.kind() == Kind::Busy => {}
                Err(e) => {
                    tracing::error!(disk = name, "cannot be taken over: {e:?}");
                    entry.failed = Some(e);
                }
                Ok(disk) => {
                    if let Err(e) = self.files.replace(ino, disk.clone()) {
                        tracing::error!(disk = name, "{e}");
                        continue;
                    }
                    entry.disk = Some(disk);
                    entry.failed = None;
                    tracing::info!(disk = name, "taken over late");
                }
            }
        }
    }

    /// What a successor must know of the session.
    fn note_session(&self) -> Result<()> {
        // One after the other: what is read last is what is written last.
        let _noting = self.noting.lock();
        self.handover.set_session(json!({
            "negotiated": self.session.negotiated(),
            "next_ino": self.files.next_ino(),
            "servers": self.before + 1,
        }))
    }

    /// Waits for clients of NBD from now on, if it does not yet.
    fn listen_for_clients(&self) -> Result<()> {
        let shown = place_of(&self.run_dir).join(NBD);
        let path = format!("/proc/self/fd/{}/{NBD}", self.run_dir.as_raw_fd());
        // We could listen there all the same.
        if shown.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::new(
                Kind::Invalid,
                "the path of the store is too long for clients of NBD: they know sockets by paths of up to 107 bytes",
            )
            .path(shown)
            .hint("make the store at a shorter path, or use --via file"));
        }
        self.exports.listen(Path::new(&path), &shown)
    }
    /// Shows again what the last server had shown over NBD. Its clients connect again.
    fn export_inherited(&self) {
        let exports: Vec<(u64, Vec<Process>)> = {
            let table = self.table.lock();
            let shown = table
                .values()
                .filter(|e| e.attached.via == Via::Nbd && e.phase == Phase::Ready);
            shown.map(|e| (e.ino, e.clients.clone())).collect()
        };
        if exports.is_empty() {
            return;
        }
        for (ino, clients) in exports {
            self.exports.await_again(ino, &clients);
            self.exports.show(ino);
        }
        if let Err(e) = self.listen_for_clients() {
            tracing::error!("clients of NBD cannot connect again: {e}");
        }
    }

    /// Leaves word of the processes that use an export: they may come back to the next server, and only with their next request.
    fn note_clients(&self, ino: u64, clients: &[Process]) {
        let mut table = self.table.lock();
        if let Some(entry) = table.values_mut().find(|e| e.ino == ino) {
            entry.clients = clients.to_vec();
            entry.noted();
        }
    }

    /// Decides about what commands had begun when the last server died, and did not come back for.
    fn settle_inherited(&self) {
        std::thread::sleep(GRACE);
        let open: Vec<String> = {
            let table = self.table.lock();
            let left = table.values().filter(|e| e.orphan);
            left.map(|e| e.attached.name.clone()).collect()
        };
        for name in open {
            self.broken_off(&name);
        }
        self.settled.notify_all();
    }

    /// Makes way for a successor: of another program, if one is named.
    pub(super) fn leave(&self, request: &Value) -> Result<Value> {
        let program = text(request, "program")?;
        let version = number(request, "handover")?;
        if version != handover::VERSION {
            return Err(Error::new(
                Kind::Version,
                format!(
                    "the daemon hands over by version {}, the new program by {version}",
                    handover::VERSION
                ),
            )
            .hint("detach everything, `forkdisk daemon stop`, and attach with the new program"));
        }
        if self.session.negotiated().transport() == Transport::IoUring {
            return Err(Error::new(
                Kind::Unsupported,
                "requests that come over io_uring cannot be passed on to another server",
            )
            .hint("detach everything, `forkdisk daemon stop`, and attach with the new program"));
        }
        if !self.session.negotiated().can_resend() {
            return Err(Error::new(
                Kind::Unsupported,
                "this kernel cannot pass on requests under way",
            )
            .hint("Linux 6.9 or newer can; else detach everything and restart the daemon"));
        }
        let doors = request["doors"].as_array();
        let knows = |via: Via| doors.is_some_and(|doors| doors.iter().any(|d| d == via.word()));
        if self.leaving.swap(true, SeqCst) {
            return Err(Error::new(Kind::Busy, "a takeover is under way already"));
        }
        let calm = {
            let mut table = self.table.lock();
            let deadline = Instant::now() + CALM;
            loop {
                let busy = table.values().find(|e| e.phase != Phase::Ready);
                let busy = busy.map(|e| e.attached.name.clone());
                // The one request is this one.
                if busy.is_none() && self.answering.load(SeqCst) <= 1 {
                    let strange = table.values().find(|e| e.attached.via == Via::Nbd);
                    break match strange.filter(|_| !knows(Via::Nbd)) {
                        None => Ok(()),
                        Some(entry) => Err(unknown_door(&entry.attached.name)),
                    };
                }
                if Instant::now() >= deadline {
                    break Err(in_transit(&busy.unwrap_or_else(|| "something".into())));
                }
                // Whoever was answered tells so without the table: word of it may come between the look and the wait.
                let step = deadline.min(Instant::now() + CALM_STEP);
                self.settled.wait_until(&mut table, step);
            }
        };
        let noted = calm.and_then(|()| {
            self.handover.set_session(json!({
                "negotiated": self.session.negotiated(),
                "next_ino": self.files.next_ino(),
                "servers": self.before + 1,
                "program": program,
            }))
        });
        if let Err(e) = noted {
            self.leaving.store(false, SeqCst);
            return Err(e);
        }
        let _ = self.end.lock().send(End::Handover);
        Ok(json!({"server_pid": std::process::id()}))
    }

    /// The mount of the served files, where it is now.
    pub(super) fn mount(&self) -> PathBuf {
        place_of(&self.run_dir).join(MOUNT)
    }
    /// An attachment as it stands in an answer.
    pub(super) fn shown(&self, a: &Attached) -> Value {
        let file = self.mount().join(file_name(a));
        answer(&Attached { file, ..a.clone() })
    }
    /// Waits until what is meant is neither being attached nor being detached by others.
    fn settle(
        &self,
        table: &mut MutexGuard<'_, BTreeMap<String, Entry>>,
        meant: impl Fn(&Entry) -> bool,
        begun: &[String],
    ) -> Result<()> {
        let deadline = Instant::now() + TRANSIT;
        loop {
            let entry = table.values().find(|e| meant(e) && e.phase != Phase::Ready);
            let Some(entry) = entry else {
                return Ok(());
            };
            let name = entry.attached.name.clone();
            if begun.contains(&name) || self.settled.wait_until(table, deadline).timed_out() {
                return Err(in_transit(&name));
            }
        }
    }

    /// After its layer was sealed, a disk's name refers to another one.
    pub(super) fn refresh(&self, disk: &str) {
        if let Ok(object) = self.store.resolve(disk)
            && let Some(entry) = self.table.lock().get_mut(disk)
        {
            entry.attached.id = object.id;
            entry.noted();
        }
    }

    /// How long processors were kept awake, to the millisecond; `None`: they never are.
    pub(super) fn awake_seconds(&self) -> Option<f64> {
        let total = self.files.awake().total()?;
        Some(total.as_millis() as f64 / 1e3)
    }

    pub(super) fn status(&self) -> Value {
        let run_dir = place_of(&self.run_dir);
        let (threads, peak) = self.session.threads();
        let total = self.files.total();
        json!({
            "keeper_pid": self.keeper.load(SeqCst),
            "server_pid": std::process::id(),
            "socket": run_dir.join(SOCKET),
            "mount": run_dir.join(MOUNT),
            "log": run_dir.join(LOG),
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "attached": self.table.lock().len(),
            "connections": self.exports.peers(),
            "threads": threads,
            "peak_threads": peak,
            "requests": total,
            "awake_seconds": self.awake_seconds(),
            "transport": self.session.negotiated().transport().word(),
            "can_take_over": self.session.negotiated().can_resend(),
            "takeovers": self.before,
            "program": std::env::current_exe().ok().map(|p| p.display().to_string()),
            "handover": handover::VERSION,
        })
    }

    /// The end: everything that is still attached is flushed and closed.
    fn shut_down(&self) {
        // Who waits for room is told that there is none: nobody will ask again.
        for disk in self.table.lock().values().filter_map(|e| e.disk.as_ref()) {
            disk.stop_waiting();
        }
        let deadline = Instant::now() + LAST_ANSWERS;
        while self.session.waiting(None) + self.exports.waiting(None) > 0
            && Instant::now() < deadline
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.exports.stop();
        self.session.stop();
        let names: Vec<String> = self.table.lock().keys().cloned().collect();
        for name in names {
            tracing::warn!(
                disk = name,
                "still attached at the end: its device gives I/O errors from now on"
            );
            if let Err(e) = self.close(&name) {
                tracing::error!(disk = name, "{e:?}");
            }
        }
        // What is more is left to `gc`.
        let giving = Instant::now();
        while giving.elapsed() < LAST_GIFTS && self.store.give_back_idle(64) {}
        // Of layers that are being joined nothing is left lying about. It ends by itself, as nothing is attached any more.
        let _joining = self.joining.try_lock_for(CALM);
        // Not before: a server that dies while it closes is followed by one that has all.
        let ended = self.handover.set_session(json!({
            "negotiated": self.session.negotiated(),
            "next_ino": self.files.next_ino(),
            "servers": self.before + 1,
            "ended": true,
        }));
        if let Err(e) = ended {
            tracing::error!("{e}");
        }
    }
}

fn unknown_door(name: &str) -> Error {
    Error::new(
        Kind::Version,
        format!("{name} is attached with --via nbd, which the new program does not know"),
    )
    .hint(format!("`forkdisk detach {name}` first"))
}

pub(super) fn not_attached(name: &str) -> Error {
    Error::new(Kind::NotFound, format!("{name} is not attached"))
        .hint("`forkdisk ls attached` lists what is")
}

pub(super) fn in_transit(name: &str) -> Error {
    Error::new(
        Kind::Busy,
        format!("{name} is just being attached or detached"),
    )
    .hint("try again in a moment")
}
