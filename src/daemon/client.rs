//! How commands talk to the daemon.

mod changes;
mod past;

pub use changes::Waiting;
pub use past::PastOwner;

use super::changes::quota_json;
use super::protocol::{
    self, attached, attached_json, below, number, object, receive, send, send_all, success, text,
};
use super::{AttachRequest, Attached, SOCKET, Via, handover, keeper};
use crate::attach::{self, LoopAttachment, LoopOptions};
use crate::error::{Error, Kind, Result};
use crate::serve::fuse::session::Transport;
use crate::store::{Below, Object, QuotaChange, Store};
use crate::sys::loopdev::DetachOptions;
use serde_json::{Value, json};
use std::fs::File;
use std::io::BufReader;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A conversation with the daemon of a store.
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    place: Where,
}

/// Where a daemon is found.
struct Where {
    /// The run directory, which may be moved with the store.
    dir: File,
    /// Its path, for messages.
    shown: PathBuf,
    /// The store's id.
    store: String,
}

/// What became of an attempt to talk.
enum Reached {
    Server(BufReader<UnixStream>, UnixStream),
    /// Nobody listens.
    Nobody,
    /// Somebody listened, and nobody answered.
    Lost,
}

/// How long a daemon without a server may take to get one.
const BETWEEN_SERVERS: Duration = Duration::from_secs(60);

/// A takeover that was done.
#[derive(Clone, Debug)]
pub struct TakenOver {
    /// The keeper's process, the same as before.
    pub keeper: u64,
    /// The process that served.
    pub former: u64,
    /// The process that serves now.
    pub server: u64,
    /// Version of the program that serves now.
    pub version: String,
}

/// Longest wait for an answer. The longest work is a flush of everything that is dirty.
const PATIENCE: Duration = Duration::from_secs(600);

/// A path to the socket that is short however deep the store is: socket addresses hold 107 bytes. The file must live as
/// long as the path is used.
pub(super) fn socket_path(run_dir: &Path) -> Result<(File, PathBuf)> {
    let dir = File::open(run_dir).map_err(|e| Error::io("open", run_dir, &e))?;
    let path = socket_in(&dir);
    Ok((dir, path))
}

fn socket_in(run_dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", run_dir.as_raw_fd()))
}

impl Where {
    fn of(dir: &File, store: &Store) -> Result<Where> {
        Ok(Where {
            dir: dir
                .try_clone()
                .map_err(|e| Error::io("open", store.run_dir(), &e))?,
            shown: store.run_dir(),
            store: store.id().to_string(),
        })
    }
    /// Talks to the daemon, if one runs. Between two servers it waits for the next. `first`: a request that is sent at once, for which no
    /// answer is read yet.
    fn connect(
        &self,
        first: Option<&Value>,
    ) -> Result<Option<(BufReader<UnixStream>, UnixStream)>> {
        let deadline = Instant::now() + BETWEEN_SERVERS;
        loop {
            match self.connect_once(first)? {
                Reached::Server(reader, writer) => return Ok(Some((reader, writer))),
                Reached::Nobody => return Ok(None),
                // The server died, or is about to leave: another one comes, or the daemon ends.
                Reached::Lost if keeper::is_kept(&self.dir) => {
                    if Instant::now() > deadline {
                        return Err(Error::new(Kind::Busy, "the daemon answers nobody")
                            .hint("it may serve as many commands as it can, or no server can begin; its log, daemon.log in the run directory of the store, tells"));
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                Reached::Lost => return Ok(None),
            }
        }
    }
    fn connect_once(&self, first: Option<&Value>) -> Result<Reached> {
        let stream = match UnixStream::connect(socket_in(&self.dir)) {
            Ok(stream) => stream,
            // Nobody listens: a socket that a dead daemon left, or none at all.
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(Reached::Nobody);
            }
            Err(e) => {
                let socket = self.shown.join(SOCKET);
                return Err(Error::io("talk to the daemon at", socket, &e)
                    .or_hint("the daemon may belong to another user"));
            }
        };
        let io = |e: std::io::Error| Error::io("set up", "the control socket", &e);
        stream.set_read_timeout(Some(PATIENCE)).map_err(io)?;
        let mut writer = stream.try_clone().map_err(io)?;
        let mut reader = BufReader::new(stream);
        let hello = json!({"op": "hello", "version": protocol::VERSION, "store": self.store});
        // A server that does not want us reads no further.
        let words: Vec<&Value> = std::iter::once(&hello).chain(first).collect();
        let said = send_all(&mut writer, &words).and_then(|()| receive(&mut reader));
        // One that did not answer to the first word has done nothing of what follows it either.
        let Ok(Some(said)) = said else {
            return Ok(Reached::Lost);
        };
        success(said)?;
        Ok(Reached::Server(reader, writer))
    }
}

fn attach_request(request: &AttachRequest) -> Value {
    json!({
        "op": "attach", "reference": request.reference, "via": request.via.word(),
        "read_only": request.read_only, "block_size": request.block_size,
        "passthrough": request.passthrough,
    })
}

impl Client {
    /// Talks to the daemon, if one runs.
    pub fn connect(store: &Store) -> Result<Option<Client>> {
        Client::connect_asking(store, None)
    }
    /// [`Client::connect`] with a request that goes out with the first word, so that its answer is waited for only once.
    fn connect_asking(store: &Store, first: Option<&Value>) -> Result<Option<Client>> {
        match File::open(store.run_dir()) {
            Ok(dir) => Client::connect_at(&dir, store, first),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("open", store.run_dir(), &e)),
        }
    }
    /// [`Client::connect`] through the run directory itself, wherever it is now.
    pub(super) fn connect_in(dir: &File, store: &Store) -> Result<Option<Client>> {
        Client::connect_at(dir, store, None)
    }
    fn connect_at(dir: &File, store: &Store, first: Option<&Value>) -> Result<Option<Client>> {
        let place = Where::of(dir, store)?;
        Ok(place.connect(first)?.map(|(reader, writer)| Client {
            reader,
            writer,
            place,
        }))
    }
    /// Talks to the daemon, starting one if none runs. `transport`: how it must get its requests, if that matters.
    pub fn connect_or_start(store: &Store, transport: Option<Transport>) -> Result<Client> {
        for _ in 0..3 {
            if let Some(mut client) = Client::connect(store)? {
                if let Some(wanted) = transport {
                    client.must_use(wanted)?;
                }
                return Ok(client);
            }
            match keeper::start(store, transport.unwrap_or_default()) {
                // Another command was faster: its daemon serves us as well.
                Err(e) if e.kind() == Kind::Busy => std::thread::sleep(Duration::from_millis(20)),
                other => other?,
            }
        }
        Client::connect(store)?.ok_or_else(|| {
            Error::new(Kind::Io, "the daemon does not answer")
                .path(store.run_dir().join(super::LOG))
                .hint("its log tells why")
        })
    }
    /// Fails if the daemon gets its requests in another way.
    fn must_use(&mut self, wanted: Transport) -> Result<()> {
        let status = self.status()?;
        // One that says nothing knows no other.
        let has = status["transport"]
            .as_str()
            .unwrap_or(Transport::Device.word());
        if has == wanted.word() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Busy,
            format!("the daemon of this store runs with the transport {has}"),
        )
        .hint(format!(
            "detach everything and `forkdisk daemon stop`, then attach with --transport {}; or leave --transport out",
            wanted.word()
        )))
    }
    pub(super) fn ask(&mut self, request: Value) -> Result<Value> {
        let answer = self.try_ask(&request)?;
        Client::heard(answer)
    }
    /// The answer to what must not be asked twice.
    fn heard(answer: Option<Value>) -> Result<Value> {
        match answer {
            Some(answer) => success(answer),
            None => Err(
                Error::new(Kind::Io, "the daemon's server ended in the middle of a request")
                    .hint("whether it was done, `forkdisk ls` and `ls attached` show; the log is daemon.log in the store's run directory"),
            ),
        }
    }
    /// [`Client::ask`] for what can be asked twice: if the server dies meanwhile, the next one is asked.
    pub(super) fn ask_again(&mut self, request: Value) -> Result<Value> {
        self.ask_again_and(request, || ())
    }
    /// [`Client::ask_again`], and something else while it is answered.
    fn ask_again_and(&mut self, request: Value, meanwhile: impl FnOnce()) -> Result<Value> {
        let mut meanwhile = Some(meanwhile);
        for _ in 0..20 {
            let sent = self.say(&request)?;
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile();
            }
            if sent && let Some(answer) = self.hear()? {
                return success(answer);
            }
            match self.place.connect(None)? {
                Some((reader, writer)) => {
                    (self.reader, self.writer) = (reader, writer);
                }
                None => break,
            }
        }
        Err(
            Error::new(Kind::Io, "the daemon ended in the middle of a request")
                .hint("its log, daemon.log in the run directory of the store, tells why"),
        )
    }
    /// One request; `None` if nobody is there to answer.
    fn try_ask(&mut self, request: &Value) -> Result<Option<Value>> {
        match self.say(request)? {
            true => self.hear(),
            false => Ok(None),
        }
    }
    /// False: nobody is there to hear it.
    fn say(&mut self, request: &Value) -> Result<bool> {
        match send(&mut self.writer, request) {
            Err(e) if e.kind() == Kind::Io => Ok(false),
            Err(e) => Err(e),
            Ok(()) => Ok(true),
        }
    }
    fn hear(&mut self) -> Result<Option<Value>> {
        match receive(&mut self.reader) {
            Err(e) if e.kind() == Kind::Io => Ok(None),
            other => other,
        }
    }
    /// Attaches, with a daemon that is started if none runs and `before` allows it. `transport`: how it must get its requests, if that matters.
    pub fn attach_or_start(
        store: &Store,
        transport: Option<Transport>,
        request: &AttachRequest,
        before: impl FnOnce() -> Result<()>,
    ) -> Result<(Client, Attached)> {
        if transport.is_none()
            && let Some(mut client) = Client::connect_asking(store, Some(&attach_request(request)))?
        {
            let answer = client.hear()?;
            let attached = client.set_up(request, &Client::heard(answer)?)?;
            return Ok((client, attached));
        }
        before()?;
        let mut client = Client::connect_or_start(store, transport)?;
        let attached = client.attach(request)?;
        Ok((client, attached))
    }
    /// Attaches.
    pub fn attach(&mut self, request: &AttachRequest) -> Result<Attached> {
        let answer = self.ask(attach_request(request))?;
        self.set_up(request, &answer)
    }
    /// Makes a device of what the daemon opened.
    fn set_up(&mut self, request: &AttachRequest, answer: &Value) -> Result<Attached> {
        let opened = attached(&answer["attached"])?;
        if !answer["fresh"].as_bool().unwrap_or(false) || request.via != Via::Loop {
            return Ok(opened);
        }
        // Here and not in the daemon: configuring the device waits for the daemon.
        let options = LoopOptions {
            read_only: opened.read_only,
            block_size: request.block_size,
        };
        match attach::begin_loop(&opened.file, options) {
            Ok(fresh) => {
                let device = fresh.attachment().clone();
                let done = json!({"op": "attach-done", "name": opened.name, "device": device.device, "dev": device.dev});
                let answer = self.ask_again_and(done, || drop(fresh.finish()));
                if answer.is_err() {
                    let _ = attach::detach_loop(&device, DetachOptions::default());
                }
                attached(&answer?["attached"])
            }
            Err(e) => {
                let _ = self.ask_again(json!({"op": "attach-undo", "name": opened.name}));
                Err(e.context(format!("cannot attach {}", opened.name)))
            }
        }
    }
    /// Detaches by name or device: once. The device must not be mounted any more. Returns what was detached, when all of it is
    /// durable.
    pub fn detach(&mut self, target: &str) -> Result<Vec<Attached>> {
        self.detach_how(target, DetachOptions::default())
    }
    /// [`Client::detach`] also if what was written but never flushed cannot be written back: it is lost.
    pub fn detach_by_force(&mut self, target: &str) -> Result<Vec<Attached>> {
        let force = DetachOptions {
            force: true,
            ..DetachOptions::default()
        };
        self.detach_how(target, force)
    }
    fn detach_how(&mut self, target: &str, options: DetachOptions) -> Result<Vec<Attached>> {
        let answer = self.ask(json!({"op": "detach", "target": target, "force": options.force}))?;
        let mut gone = attached(&answer["attached"])?;
        if !answer["last"].as_bool().unwrap_or(false) {
            return Ok(vec![gone]);
        }
        let options = DetachOptions {
            server: number(&answer, "server_pid").ok().map(|pid| pid as i32),
            ..options
        };
        let device = gone.device.as_ref().map(|device| LoopAttachment {
            device: device.into(),
            dev: number(&answer, "dev").unwrap_or(0),
            ino: number(&answer, "ino").unwrap_or(0),
            read_only: gone.read_only,
        });
        if let Some(device) = &device
            && let Err(e) = attach::detach_loop(device, options)
        {
            let _ = self.ask_again(json!({"op": "detach-undo", "name": gone.name}));
            return Err(e.context(format!("cannot detach {}", gone.name)));
        }
        match self.ask_again(json!({"op": "detach-done", "name": gone.name})) {
            // The server that was asked first had done it.
            Err(e) if e.kind() == Kind::NotFound => {}
            // A disk that stopped cannot be closed as others are; the next opening recovers it.
            Err(e) if options.force => tracing::warn!("{e}"),
            other => drop(other?),
        }
        gone.count = 0;
        Ok(vec![gone])
    }
    /// Everything attached, by name.
    pub fn attached(&mut self) -> Result<Vec<Attached>> {
        let answer = self.ask_again(json!({"op": "attached"}))?;
        answer["attached"]
            .as_array()
            .map_or(Ok(Vec::new()), |list| list.iter().map(attached).collect())
    }
    /// Snapshots an attached disk.
    pub fn snapshot(&mut self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let answer =
            self.ask(json!({"op": "snapshot", "disk": disk, "name": name, "message": message}))?;
        object(&answer["object"])
    }
    /// Publishes the state of an attached disk as an image.
    pub fn commit(&mut self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let answer =
            self.ask(json!({"op": "commit", "disk": disk, "name": name, "message": message}))?;
        object(&answer["object"])
    }
    /// Makes all that was written to an attached disk durable.
    pub fn flush(&mut self, disk: &str) -> Result<()> {
        self.ask_again(json!({"op": "flush", "disk": disk}))
            .map(drop)
    }
    /// What an attached disk shows now, as a state that stays.
    pub fn settle(&mut self, disk: &str) -> Result<Below> {
        let answer = self.ask_again(json!({"op": "settle", "disk": disk}))?;
        below(&answer["state"])
    }
    /// Makes disks from an attached disk.
    pub fn create(
        &mut self,
        names: &[String],
        from: &str,
        size: Option<u64>,
        quota: &QuotaChange,
    ) -> Result<Vec<Object>> {
        let answer = self.ask(json!({
            "op": "create", "names": names, "from": from, "size": size, "quota": quota_json(quota),
        }))?;
        answer["objects"]
            .as_array()
            .map_or(Ok(Vec::new()), |list| list.iter().map(object).collect())
    }
    /// What the daemon tells of itself.
    pub fn status(&mut self) -> Result<Value> {
        let mut answer = self.ask_again(json!({"op": "status"}))?;
        Ok(answer["status"].take())
    }
    /// Lets the program that we are take over from the server, and returns when it serves.
    pub fn take_over(&mut self, store: &Store) -> Result<TakenOver> {
        let program = std::env::current_exe()
            .map_err(|e| Error::io("find", "the forkdisk program", &e))?
            .display()
            .to_string();
        let former = number(&self.status()?, "server_pid")?;
        let doors = [Via::Loop, Via::File, Via::Nbd].map(Via::word);
        let request = json!({
            "op": "takeover", "program": program, "handover": handover::VERSION, "doors": doors,
        });
        // Without an answer it may be gone for this reason: then the next one tells what it is.
        if let Some(answer) = self.try_ask(&request)? {
            success(answer)?;
        }
        let deadline = Instant::now() + BETWEEN_SERVERS;
        loop {
            let Some(mut client) = Client::connect(store)? else {
                return Err(Error::new(Kind::Io, "no server came up after the takeover")
                    .path(store.run_dir().join(super::LOG))
                    .hint("its log tells why"));
            };
            let status = client.status()?;
            let server = number(&status, "server_pid")?;
            if server != former {
                let version = text(&status, "version")?.to_string();
                if text(&status, "program")? != program {
                    return Err(Error::new(
                        Kind::Io,
                        format!(
                            "{} could not serve: the daemon goes on with the program it had",
                            program
                        ),
                    )
                    .path(store.run_dir().join(super::LOG))
                    .hint("its log tells why"));
                }
                return Ok(TakenOver {
                    keeper: number(&status, "keeper_pid")?,
                    former,
                    server,
                    version,
                });
            }
            if Instant::now() > deadline {
                return Err(in_time());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    /// Stops the daemon and returns when it is gone. `Busy` while anything is attached.
    pub fn stop(&mut self) -> Result<()> {
        let answer = self.ask(json!({"op": "stop"}))?;
        let keeper = number(&answer, "keeper_pid")? as i32;
        keeper::wait_for_end(keeper)
    }
}

fn in_time() -> Error {
    Error::new(Kind::Busy, "the server that was to leave is still there")
        .hint("the daemon's log tells what it waits for")
}

/// An attachment as it stands in an answer.
pub(super) fn answer(a: &Attached) -> Value {
    json!({"attached": attached_json(a)})
}
