//! Requests and answers over rings (FUSE over io_uring): one call of the kernel for an answer and the next request, and no wait for another CPU.
//!
//! The kernel has a queue for each possible CPU, and gives a request to the queue of the CPU that it was made on. Each queue has workers, and each
//! worker a ring of its own with one **entry**: a page for the request's fixed part and 1 MiB for its data. So a worker that waits for the
//! host's disk keeps no other request waiting. Workers stay on their CPU: that is where the request and its data are.
//!
//! Before the kernel hears that rings are to be used, each worker has its ring and its memory: from then on the mount answers nobody until every queue
//! has an entry.
//!
//! What it costs: a request that a worker had when its process died is lost to any successor. So there is none: whoever holds the mount must end it
//! ([`Negotiated::can_resend`](super::session::Negotiated::can_resend) says no), and those who wait get an error.

use super::{
    abi,
    ops::{Message, Reply, Service},
    session::MAX_DATA,
};
use crate::{
    error::{Error, Kind, Result},
    serve::crew::{Crew, Ended},
    sys::{
        process,
        uring::{Entry, Memory},
    },
};
use std::{
    fs, io,
    mem::offset_of,
    os::fd::OwnedFd,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    time::Duration,
};
use zerocopy::{FromBytes, IntoBytes};

/// The switch of the kernel.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// The oldest kernel that survives the end of a process with requests in its hands: earlier ones damaged their own lists.
const KERNEL: (u32, u32, u32) = (6, 18, 3);
/// Workers of all queues together, unless there are so many CPUs that one for each is more. Each has 1 MiB, locked in memory.
const WORKERS: usize = 16;
/// Most workers of one queue.
const QUEUE_WORKERS: usize = 8;
/// How long a worker may take to have its ring.
const PATIENCE: Duration = Duration::from_secs(10);

/// Can this kernel, as it is set up, serve by rings? Says what to do if not.
pub fn available() -> Result<()> {
    let refuse = |why: String| {
        Error::new(
            Kind::Unsupported,
            format!("the transport io_uring is not available: {why}"),
        )
    };
    let version = process::kernel_version();
    if version < KERNEL {
        let (major, minor, patch) = KERNEL;
        return Err(refuse(format!(
            "the kernel is {}.{}.{}",
            version.0, version.1, version.2
        ))
        .hint(format!(
            "Linux {major}.{minor}.{patch} or newer is needed; --transport device works with every kernel"
        )));
    }
    match fs::read_to_string(SWITCH) {
        Ok(on) if on.trim() == "Y" => Ok(()),
        Ok(_) => Err(refuse("it is switched off in the kernel".into())
            .hint(format!("`echo Y > {SWITCH}` as root switches it on"))),
        Err(_) => Err(refuse("this kernel was built without it".into())
            .hint("--transport device works with every kernel")),
    }
}

/// Workers that have their rings and wait for the kernel to hear of it.
pub(super) struct Rings {
    /// One for each worker: dropped without a word, the worker ends.
    go: Vec<Sender<()>>,
    said: Receiver<io::Result<()>>,
}

/// What one worker needs.
struct Worker {
    fd: Arc<OwnedFd>,
    service: Arc<Service>,
    crew: Arc<Crew>,
    /// The queue and the CPU, which have one number.
    qid: u16,
    /// Is the CPU there?
    online: bool,
}

impl Rings {
    /// Starts workers for all queues.
    pub(super) fn prepare(
        fd: &Arc<OwnedFd>,
        service: &Arc<Service>,
        crew: &Arc<Crew>,
    ) -> Result<Rings> {
        let possible = process::cpus("possible");
        let online = process::cpus("online");
        // Queues are numbered from 0 whatever numbers the CPUs have.
        let queues = possible.len().clamp(1, usize::from(u16::MAX));
        let each = (WORKERS / online.len().max(1)).clamp(1, QUEUE_WORKERS);
        let (say, said) = channel();
        let mut rings = Rings {
            go: Vec::new(),
            said,
        };
        for qid in 0..queues {
            let used = online.contains(&qid);
            for _ in 0..if used { each } else { 1 } {
                let worker = Worker {
                    fd: Arc::clone(fd),
                    service: Arc::clone(service),
                    crew: Arc::clone(crew),
                    qid: qid as u16,
                    online: used,
                };
                let (go, wait) = channel();
                let say = say.clone();
                crew.start("fuse-ring", move || worker.work(&say, &wait))?;
                rings.go.push(go);
            }
        }
        rings.all_say("cannot make a ring")?;
        Ok(rings)
    }
    /// The kernel has heard: every worker offers its entry. On return the mount answers.
    pub(super) fn begin(self) -> Result<()> {
        for go in &self.go {
            let _ = go.send(());
        }
        self.all_say("the kernel refuses an entry of a ring")
    }
    fn all_say(&self, what: &str) -> Result<()> {
        for _ in &self.go {
            let said = self.said.recv_timeout(PATIENCE);
            let said = said.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            said.map_err(|e| {
                Error::new(Kind::Unsupported, format!("{what}: {e}")).hint(
                    "is io_uring forbidden here (sysctl kernel.io_uring_disabled, a container's seccomp profile)? \
                     --transport device works everywhere",
                )
            })?;
        }
        Ok(())
    }
}

impl Worker {
    /// Serves until the mount is gone or the crew is to stop. `say` hears of each of the first two steps how it went.
    fn work(self, say: &Sender<io::Result<()>>, go: &Receiver<()>) -> Option<Ended> {
        if self.online {
            process::stay_on_cpu(self.qid.into());
        }
        let made = Memory::new(HEADERS, MAX_DATA, self.online)
            .and_then(|memory| Entry::new(Arc::clone(&self.fd), self.qid, memory));
        let mut entry = match made {
            Ok(entry) => entry,
            Err(e) => {
                let _ = say.send(Err(e));
                return None;
            }
        };
        let _ = say.send(Ok(()));
        if go.recv().is_err() {
            return None;
        }
        let begun = entry.register().and_then(|()| entry.submit());
        let refused = begun.is_err();
        let _ = say.send(begun);
        if refused {
            return None;
        }
        self.serve(&mut entry)
    }

    fn serve(&self, entry: &mut Entry) -> Option<Ended> {
        loop {
            match entry.take() {
                None if self.crew.is_stopping() => {
                    // The last answer still goes. It cannot go without an offer of the entry: what comes by that fails when the mount ends.
                    let _ = entry.submit();
                    return None;
                }
                None => match entry.wait() {
                    Err(e) if e.kind() != io::ErrorKind::Interrupted => {
                        tracing::error!("waiting for requests on a ring failed: {e}");
                        return Some(Ended::Failed(e.raw_os_error().unwrap_or(libc::EIO)));
                    }
                    _ => {}
                },
                Some(Ok(())) => {
                    if let Err(e) = self.answer(entry) {
                        tracing::error!("a request on a ring cannot be answered: {e}");
                        return Some(Ended::Failed(e.raw_os_error().unwrap_or(libc::EIO)));
                    }
                }
                Some(Err(e)) => {
                    return Some(match e.raw_os_error() {
                        Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV) => {
                            Ended::Unmounted
                        }
                        errno => {
                            tracing::error!("the kernel gives an entry of a ring back: {e}");
                            Ended::Failed(errno.unwrap_or(libc::EIO))
                        }
                    });
                }
            }
        }
    }

    /// Serves the request in the entry, and leaves the answer for the next entering of the kernel.
    fn answer(&self, entry: &mut Entry) -> io::Result<()> {
        let broken = || io::Error::from_raw_os_error(libc::EPROTO);
        let (head, _) = entry.memory().parts();
        let (headers, _) = abi::RingHeaders::read_from_prefix(head).map_err(|_| broken())?;
        let (request, _) =
            abi::InHeader::read_from_prefix(&headers.header).map_err(|_| broken())?;
        let mut message = Taken {
            fixed: headers.fixed,
            sent: (headers.entry.payload_size as usize).min(MAX_DATA),
            memory: entry.memory(),
        };
        // Requests without an answer come through the descriptor; should one come here, the entry must go back all the same.
        let reply = self.service.serve(&request, &mut message);
        let reply = reply.unwrap_or(Reply::DONE);
        if let Some(left) = reply.left {
            // The answer goes with the next entering of the kernel, which waits for the next request: whoever asked waits for this, too.
            self.service.finish(left);
        }
        let header = abi::OutHeader {
            len: (abi::OUT_HEADER + reply.len) as u32,
            error: reply.error,
            unique: request.unique,
        };
        let (head, _) = entry.memory().parts();
        head[..abi::OUT_HEADER].copy_from_slice(header.as_bytes());
        head[PAYLOAD_SIZE..PAYLOAD_SIZE + 4].copy_from_slice((reply.len as u32).as_bytes());
        entry.answer(headers.entry.commit_id)
    }
}

const HEADERS: usize = size_of::<abi::RingHeaders>();
/// Where the size of an answer's body stands.
const PAYLOAD_SIZE: usize =
    offset_of!(abi::RingHeaders, entry) + offset_of!(abi::RingEntry, payload_size);

/// A request in the memory of an entry, and the room for its answer.
struct Taken<'a> {
    fixed: [u8; 128],
    /// Bytes that came with it.
    sent: usize,
    memory: &'a mut Memory,
}

impl Message for Taken<'_> {
    fn fixed(&self) -> &[u8] {
        &self.fixed
    }
    fn rest(&self, _: usize) -> &[u8] {
        &self.memory.data()[..self.sent]
    }
    fn room(&mut self) -> &mut [u8] {
        self.memory.parts().1
    }
}
