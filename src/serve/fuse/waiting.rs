//! Writes that wait for room: of a disk that has used its quota, and whose writers are to wait instead of failing.
//!
//! Such a write is put aside with its data, so that the worker that took it serves others. One thread, which is there while any write
//! waits, tries them again.
//!
//! Always true:
//! - a write that waits holds neither a worker nor the disk, so that it keeps nobody else waiting, and the disk can be taken away;
//! - of one file the one that waits longest is tried first; after one that must go on waiting no other of that file is tried in the same round;
//! - a session that ends leaves them unanswered: a successor gets them again.

use super::{abi, crew::Crew, ops::Reply};
use crate::serve::files::Files;
use parking_lot::Mutex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    collections::{HashSet, VecDeque},
    io::IoSlice,
    os::fd::OwnedFd,
    sync::Arc,
    thread,
    time::Duration,
};
use zerocopy::IntoBytes;

/// How often it is tried.
const ROUND: Duration = Duration::from_millis(20);
/// Data of all writes that wait, at most: a loop device has 128 requests under way, mostly of 256 KiB or less. Who comes then gets the error.
const MOST: usize = 512 << 20;

/// A write that waits.
struct Write {
    unique: u64,
    ino: u64,
    at: u64,
    data: Vec<u8>,
}

#[derive(Default)]
struct State {
    writes: VecDeque<Write>,
    bytes: usize,
    /// Is there a thread that tries them?
    tried: bool,
    /// File of the one that is being tried.
    in_hand: Option<u64>,
}

/// The writes of a session that wait.
pub(super) struct Waiting {
    fd: Arc<OwnedFd>,
    files: Arc<Files>,
    crew: Arc<Crew>,
    state: Mutex<State>,
}

impl Waiting {
    pub(super) fn new(fd: Arc<OwnedFd>, files: Arc<Files>, crew: Arc<Crew>) -> Waiting {
        Waiting {
            fd,
            files,
            crew,
            state: Mutex::default(),
        }
    }
    /// Puts a write aside; says whether it could. If not, it is to be answered with the error.
    pub(super) fn put_aside(
        self: &Arc<Waiting>,
        unique: u64,
        ino: u64,
        at: u64,
        data: &[u8],
    ) -> bool {
        let mut state = self.state.lock();
        if self.crew.is_stopping() {
            // It stays unanswered, as those do that wait: who comes after gets it again.
            return true;
        }
        if state.bytes + data.len() > MOST {
            return false;
        }
        if !state.tried {
            let waiting = Arc::clone(self);
            let started = self.crew.start_beside("fuse-waiting", move || {
                waiting.work();
                None
            });
            if let Err(e) = started {
                tracing::warn!("a write cannot wait: {e}");
                return false;
            }
            tracing::info!(ino, "writes wait for room");
            state.tried = true;
        }
        state.bytes += data.len();
        state.writes.push_back(Write {
            unique,
            ino,
            at,
            data: data.to_vec(),
        });
        true
    }
    /// How many wait: of one file, or of all.
    pub(super) fn count(&self, ino: Option<u64>) -> usize {
        let state = self.state.lock();
        let writes = state.writes.iter().map(|w| w.ino).chain(state.in_hand);
        writes.filter(|of| ino.is_none_or(|ino| *of == ino)).count()
    }
    /// Tries what waits until nothing does, or the session ends.
    fn work(&self) {
        loop {
            thread::sleep(ROUND);
            if self.crew.is_stopping() || self.is_gone() {
                return;
            }
            self.round();
            let mut state = self.state.lock();
            if state.writes.is_empty() {
                state.tried = false;
                tracing::info!("no write waits for room any more");
                return;
            }
        }
    }
    /// Is the mount gone?
    fn is_gone(&self) -> bool {
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut asked = [PollFd::new(&*self.fd, PollFlags::IN)];
        let answered = poll(&mut asked, Some(&none));
        answered.is_ok() && asked[0].revents().contains(PollFlags::ERR)
    }
    fn round(&self) {
        let mut full = HashSet::new();
        // Only what waits now: who comes meanwhile is tried in the next round.
        let mut left = self.state.lock().writes.len();
        let mut at = 0;
        while left > 0 && !self.crew.is_stopping() {
            left -= 1;
            let write = {
                let mut state = self.state.lock();
                match state.writes.get(at).map(|w| w.ino) {
                    Some(ino) if full.contains(&ino) => None,
                    Some(ino) => {
                        state.in_hand = Some(ino);
                        state.writes.remove(at)
                    }
                    None => return,
                }
            };
            let Some(write) = write else {
                at += 1;
                continue;
            };
            match self.attempt(&write) {
                Some(reply) => {
                    self.answer(&write, reply);
                    let mut state = self.state.lock();
                    state.bytes -= write.data.len();
                    state.in_hand = None;
                }
                None => {
                    full.insert(write.ino);
                    let mut state = self.state.lock();
                    state.writes.insert(at, write);
                    state.in_hand = None;
                    at += 1;
                }
            }
        }
    }
    /// The answer to a write, unless it must go on waiting.
    fn attempt(&self, write: &Write) -> Option<Reply> {
        let file = self.files.get(write.ino);
        let Some(disk) = file.as_ref().and_then(|file| file.disk()) else {
            return Some(Reply::failed(libc::ESTALE));
        };
        match disk.write(&write.data, write.at) {
            Ok(()) => Some(Reply {
                len: write.data.len(),
                ..Reply::DONE
            }),
            Err(e) if e.waits() => None,
            Err(e) => {
                tracing::error!(
                    ino = write.ino,
                    at = write.at,
                    "a write waited in vain: {e}"
                );
                Some(Reply::failed(e.errno()))
            }
        }
    }
    fn answer(&self, write: &Write, reply: Reply) {
        let body = abi::WriteOut {
            size: reply.len as u32,
            padding: 0,
        };
        let body = match reply.error {
            0 => body.as_bytes(),
            _ => &[],
        };
        let header = abi::OutHeader {
            len: (abi::OUT_HEADER + body.len()) as u32,
            error: reply.error,
            unique: write.unique,
        };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body)];
        match rustix::io::writev(&*self.fd, &parts) {
            // As for any other answer: whoever asked is gone, or the mount is.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED | Errno::PERM) => {}
            Err(e) => tracing::error!("the kernel refuses the answer to a write that waited: {e}"),
        }
    }
}
