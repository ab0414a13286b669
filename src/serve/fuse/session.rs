//! A session: the greeting, and the threads that take requests and answer them, by one of two transports.
//!
//! Always true:
//! - serving allocates nothing, and no thread here waits for memory that the kernel can only free by
//!   writing to a disk we serve ([`set_io_flusher`](crate::sys::process::set_io_flusher));
//! - a request that was taken is answered, whatever it holds, unless the process dies.

use super::{
    abi,
    device::{Buffer, Pool},
    ops::Service,
    ring::{self, Rings},
};
use crate::{
    error::{Error, Kind, Result},
    serve::{
        crew::Crew,
        files::Files,
        waiting::{self, Asker, Waiting, Write},
    },
    sys::{passthrough, process},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    io::IoSlice,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};
use zerocopy::{FromBytes, IntoBytes};

pub use crate::serve::crew::Ended;

/// Largest data of one READ or WRITE: what the kernel allows (256 pages).
pub const MAX_DATA: usize = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Requests the kernel hands out before it makes others wait, over all files. All direct I/O of loop
/// devices counts, with up to 128 requests each; the kernel's default of 12 would serialise them.
const MAX_BACKGROUND: u16 = 4096;
/// From here on the kernel calls the mount congested: three quarters, as it does by itself.
const CONGESTION: u16 = MAX_BACKGROUND / 4 * 3;
/// How long a new mount may take to send its greeting.
const INIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Flags we ask for. What is not here is left out on purpose: no write-back cache (a write must reach the
/// disk when it returns), no splice (the data is looked at anyway).
const WANTED: u64 = abi::init::ASYNC_READ
    | abi::init::ASYNC_DIO
    | abi::init::BIG_WRITES
    | abi::init::PARALLEL_DIROPS
    | abi::init::MAX_PAGES
    | abi::init::INIT_EXT
    | abi::init::HAS_RESEND
    | abi::init::PASSTHROUGH
    | abi::init::ABORT_ERROR;

/// An environment variable that makes a kernel look like one before 6.9: to try what happens there.
const WITHOUT_RESEND: &str = "FORKDISK_WITHOUT_RESEND";

/// What a session and the kernel agreed on: all that a successor must know of the greeting.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Negotiated {
    /// Minor version of the protocol.
    pub minor: u32,
    /// Agreed flags of INIT.
    pub flags: u64,
    /// Largest write in bytes.
    pub max_write: u32,
}

impl Negotiated {
    /// Can a successor get requests that were under way again (kernel 6.9)? Otherwise they wait for ever
    /// after a takeover.
    pub fn can_resend(&self) -> bool {
        self.flags & abi::init::HAS_RESEND != 0 && self.transport() == Transport::Device
    }
    /// How requests come.
    pub fn transport(&self) -> Transport {
        match self.flags & abi::init::OVER_IO_URING {
            0 => Transport::Device,
            _ => Transport::IoUring,
        }
    }
}

/// How requests and answers travel between the kernel and this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Transport {
    /// Read from and written to `/dev/fuse`. Disks survive the death of the server.
    #[default]
    #[serde(rename = "device")]
    Device,
    /// Rings that both share: quicker where one request follows the other. Disks do not survive the death of the server.
    #[serde(rename = "io_uring")]
    IoUring,
}

impl Transport {
    /// The word on the command line, in JSON and on the socket.
    pub fn word(self) -> &'static str {
        match self {
            Transport::Device => "device",
            Transport::IoUring => "io_uring",
        }
    }
    /// Fails if this kernel does not offer it, with what can be done.
    pub fn available(self) -> Result<()> {
        match self {
            Transport::Device => Ok(()),
            Transport::IoUring => ring::available(),
        }
    }
}

/// How a session begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Init {
    /// The mount is new: the kernel's greeting is the first request.
    Fresh,
    /// An earlier session greeted. Its threads must be gone, all of them: a write that one of them still
    /// does would come after its repetition, and so after later writes.
    Resumed(Negotiated),
}

/// How requests come to a new session, and how many threads there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Most threads, and so most requests in service at one time.
    pub max_threads: usize,
    /// Threads that stay when there is little to do. Each has a buffer of 1 MiB, locked in memory.
    pub keep_threads: usize,
    /// How requests come; a session that goes on keeps what was agreed on. Over rings the number of threads is that of the CPUs.
    pub transport: Transport,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            max_threads: 40,
            keep_threads: 8,
            transport: Transport::Device,
        }
    }
}

/// Threads that serve one mount. Dropping it stops them, and leaves the mount to whoever holds the
/// descriptor.
pub struct Session {
    fd: Arc<OwnedFd>,
    crew: Arc<Crew>,
    waiting: Option<Arc<Waiting>>,
    negotiated: Negotiated,
}

impl Session {
    /// Begins to serve `files` on the descriptor of a mount ([`super::mount()`]). On return the mount answers. If this fails, the mount may have been
    /// greeted: it is to be ended.
    pub fn start(fd: OwnedFd, files: Arc<Files>, init: Init, options: Options) -> Result<Session> {
        process::install_wake_handler()
            .map_err(|e| Error::new(Kind::Io, format!("cannot install a signal handler: {e}")))?;
        let fd = Arc::new(fd);
        let crew = Arc::new(Crew::default());
        let transport = match init {
            Init::Fresh => options.transport,
            Init::Resumed(negotiated) => negotiated.transport(),
        };
        // Over rings an answer goes back the way that the request came, and blocks it until then.
        let waiting = (transport == Transport::Device).then(|| {
            let late = Arc::new(Late(Arc::clone(&fd)));
            let (files, crew) = (Arc::clone(&files), Arc::clone(&crew));
            Arc::new(Waiting::new(
                late,
                files,
                crew,
                Arc::default(),
                waiting::MOST,
            ))
        });
        let service = Arc::new(Service::new(files, waiting.clone()));
        // From here on its drop ends the threads that did start.
        let mut session = Session {
            fd: Arc::clone(&fd),
            crew,
            waiting,
            negotiated: Negotiated::default(),
        };
        let mut options = options;
        match init {
            Init::Fresh => {
                let greeting = Greeting::hear(&fd)?;
                let rings = match options.transport {
                    Transport::Device => None,
                    Transport::IoUring if greeting.offers(abi::init::OVER_IO_URING) => {
                        Some(Rings::prepare(&fd, &service, &session.crew)?)
                    }
                    Transport::IoUring => {
                        // Says why, as a rule.
                        ring::available()?;
                        return Err(Error::new(
                            Kind::Unsupported,
                            "the kernel does not offer the transport io_uring",
                        )
                        .hint("--transport device works with every kernel"));
                    }
                };
                let wanted = match rings {
                    None => WANTED,
                    Some(_) => WANTED | abi::init::OVER_IO_URING,
                };
                session.negotiated = greeting.answer(&fd, wanted)?;
                if let Some(rings) = rings {
                    rings.begin()?;
                    // What is left for the descriptor: requests that want no answer.
                    options.keep_threads = 1;
                    options.max_threads = 2;
                }
            }
            Init::Resumed(negotiated) if negotiated.transport() == Transport::IoUring => {
                return Err(Error::new(
                    Kind::Unsupported,
                    "requests that came over io_uring cannot be taken over",
                )
                .hint("detach everything and restart the daemon"));
            }
            Init::Resumed(negotiated) => {
                // Before any worker reads: what they hold would be sent again as well.
                resend(&fd).map_err(|e| {
                    Error::new(Kind::Unsupported, "cannot take over the requests under way")
                        .context(format!("the kernel refuses to send them again: {e}"))
                        .hint("kernel 6.9 or newer can; with an older one detach and attach again")
                })?;
                session.negotiated = negotiated;
            }
        }
        Pool::start(fd, service, Arc::clone(&session.crew), options)?;
        Ok(session)
    }
    /// What was agreed on: to be kept for [`Init::Resumed`].
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }
    /// Waits until the session ends.
    pub fn wait(&self) -> Ended {
        self.crew.wait()
    }
    /// Has the session ended?
    pub fn ended(&self) -> Option<Ended> {
        self.crew.ended()
    }
    /// Ends the session and leaves the mount standing: what is under way is finished and answered, what
    /// comes waits for the next session. (Over rings there is none: the mount is to be ended.)
    pub fn stop(&self) -> Ended {
        self.crew.stop()
    }
    /// Writes that wait for room: of one file, or of all.
    pub fn waiting(&self, ino: Option<u64>) -> usize {
        self.waiting.as_ref().map_or(0, |w| w.count(ino))
    }
    /// Threads now, and the most there were.
    pub fn threads(&self) -> (usize, usize) {
        self.crew.count()
    }
    /// Makes known a file that the kernel is to read by itself in the place of a served one, whose bytes are the same
    /// ([`Files::add_backed`]). The number belongs to the mount, and is given back with [`Session::close_backing`].
    pub fn open_backing(&self, file: BorrowedFd<'_>) -> Result<u32> {
        if self.negotiated.flags & abi::init::PASSTHROUGH == 0 {
            return Err(
                no_passthrough("the kernel did not offer it when the daemon began").hint(
                    "Linux 6.9 or newer is needed; without --passthrough it works everywhere",
                ),
            );
        }
        passthrough::open(self.fd.as_fd(), file).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => no_passthrough("the daemon has no CAP_SYS_ADMIN")
                .hint("attach as root; without --passthrough it works for every user"),
            Some(libc::ELOOP) => {
                no_passthrough("the image lies on a filesystem that is itself stacked on another")
                    .hint("put the store on a local filesystem such as ext4, xfs or btrfs")
            }
            Some(libc::EOPNOTSUPP) => no_passthrough("the filesystem of the image cannot do it")
                .hint("put the store on a local filesystem such as ext4, xfs or btrfs"),
            _ => no_passthrough(&e.to_string()).hint("attach it without --passthrough"),
        })
    }
    /// Gives the number back. One that is not known any more is no error: an earlier session may have given it back and died.
    pub fn close_backing(&self, id: u32) {
        match passthrough::close(self.fd.as_fd(), id) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => tracing::warn!("a backing file stays open: {e}"),
        }
    }
    /// Tells the kernel that a file's size changed, so that `stat` asks again.
    pub fn size_changed(&self, ino: u64) -> Result<()> {
        let body = abi::InvalInodeOut {
            ino,
            off: -1,
            len: 0,
        };
        match notify(&self.fd, abi::notify::INVAL_INODE, body.as_bytes()) {
            // The kernel never heard of this file, or forgot it: nothing to refresh.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::new(
                Kind::Io,
                format!("cannot tell the kernel of a new size: {e}"),
            )),
        }
    }
}

/// The answers to writes that waited for room.
struct Late(Arc<OwnedFd>);

impl Asker for Late {
    fn is_gone(&self) -> bool {
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut asked = [PollFd::new(&*self.0, PollFlags::IN)];
        let answered = poll(&mut asked, Some(&none));
        answered.is_ok() && asked[0].revents().contains(PollFlags::ERR)
    }
    fn answer(&self, write: &Write, outcome: std::result::Result<(), i32>) {
        let body = abi::WriteOut {
            size: write.done as u32,
            padding: 0,
        };
        let body = match outcome {
            Ok(()) => body.as_bytes(),
            Err(_) => &[],
        };
        let header = abi::OutHeader {
            len: (abi::OUT_HEADER + body.len()) as u32,
            error: -outcome.err().unwrap_or(0),
            unique: write.unique,
        };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body)];
        match rustix::io::writev(&*self.0, &parts) {
            // As for any other answer: whoever asked is gone, or the mount is.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => {}
            Err(e) => tracing::error!("the kernel refuses the answer to a write that waited: {e}"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

fn no_passthrough(why: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the kernel cannot read the image by itself: {why}"),
    )
}

/// Sends a message of our own. `unique` 0 marks it as such.
fn notify(fd: &OwnedFd, code: i32, body: &[u8]) -> Result<(), Errno> {
    let header = abi::OutHeader {
        len: (abi::OUT_HEADER + body.len()) as u32,
        error: code,
        unique: 0,
    };
    let parts = [
        std::io::IoSlice::new(header.as_bytes()),
        std::io::IoSlice::new(body),
    ];
    rustix::io::writev(fd, &parts).map(|_| ())
}

/// Asks for all requests that were read and not answered.
fn resend(fd: &OwnedFd) -> Result<(), Errno> {
    notify(fd, abi::notify::RESEND, &[])
}

pub(super) fn readable(fd: &OwnedFd, timeout: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(n) => return n > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The kernel's greeting: the first request of a mount.
struct Greeting {
    unique: u64,
    init: abi::InitIn,
    offered: u64,
}

fn refuse(why: String) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("cannot agree with the kernel on a FUSE session: {why}"),
    )
    .hint("kernel 4.20 or newer is needed")
}

impl Greeting {
    /// Waits for it.
    fn hear(fd: &OwnedFd) -> Result<Greeting> {
        // A server that died with the greeting in its hands leaves nothing to read: ask for it again.
        if !readable(fd, Duration::from_secs(1)) {
            let _ = resend(fd);
            if !readable(fd, INIT_TIMEOUT) {
                return Err(refuse("it sends no greeting".into()));
            }
        }
        let mut buffer = Buffer::new()?;
        let n = loop {
            match rustix::io::read(fd, buffer.request_mut()) {
                Ok(n) => break n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(refuse(format!("reading the greeting failed: {e}"))),
            }
        };
        let message = &buffer.request()[..n];
        let Ok((header, body)) = abi::InHeader::read_from_prefix(message) else {
            return Err(refuse(format!("a greeting of {n} bytes")));
        };
        if header.opcode != abi::op::INIT {
            return Err(refuse(format!(
                "the first request is of kind {}",
                header.opcode
            )));
        }
        let Ok((init, rest)) = abi::InitIn::read_from_prefix(body) else {
            return Err(refuse(format!("a greeting of {n} bytes")));
        };
        if init.major != abi::MAJOR || init.minor < abi::MINOR_MIN {
            let answer = abi::OutHeader {
                len: abi::OUT_HEADER as u32,
                error: -libc::EPROTO,
                unique: header.unique,
            };
            let _ = rustix::io::write(fd, answer.as_bytes());
            return Err(refuse(format!(
                "it speaks version {}.{}",
                init.major, init.minor
            )));
        }
        let mut offered = u64::from(init.flags);
        if offered & abi::init::INIT_EXT != 0
            && let Ok((flags2, _)) = u32::read_from_prefix(rest)
        {
            offered |= u64::from(flags2) << 32;
        }
        if std::env::var_os(WITHOUT_RESEND).is_some() {
            offered &= !abi::init::HAS_RESEND;
        }
        Ok(Greeting {
            unique: header.unique,
            init,
            offered,
        })
    }
    /// Does the kernel offer what a flag stands for?
    fn offers(&self, flag: u64) -> bool {
        self.offered & flag != 0
    }
    /// Answers it, and asks for what is wanted as far as it is offered.
    fn answer(self, fd: &OwnedFd, wanted: u64) -> Result<Negotiated> {
        let flags = self.offered & wanted;
        let out = abi::InitOut {
            major: abi::MAJOR,
            minor: abi::MINOR.min(self.init.minor),
            max_readahead: self.init.max_readahead,
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: CONGESTION,
            max_write: MAX_DATA as u32,
            time_gran: 1,
            max_pages: MAX_PAGES,
            // Backing files lie on a filesystem that is not stacked itself.
            max_stack_depth: u32::from(flags & abi::init::PASSTHROUGH != 0),
            ..Default::default()
        };
        let answer = abi::OutHeader {
            len: (abi::OUT_HEADER + size_of::<abi::InitOut>()) as u32,
            error: 0,
            unique: self.unique,
        };
        let parts = [
            std::io::IoSlice::new(answer.as_bytes()),
            std::io::IoSlice::new(out.as_bytes()),
        ];
        rustix::io::writev(fd, &parts)
            .map_err(|e| refuse(format!("answering the greeting failed: {e}")))?;
        Ok(Negotiated {
            minor: out.minor,
            flags,
            max_write: out.max_write,
        })
    }
}
