//! Writes that wait for room: of a disk that has used its quota, and whose writers are to wait instead of failing.
//!
//! So do parts of blocks that are to become zeros. Such a write is put aside with its data, so that the worker that took it serves others. One thread, which is there while any write
//! waits, tries them again.
//!
//! Always true:
//! - a write that waits holds neither a worker nor the disk, so that it keeps nobody else waiting, and the disk can be taken away;
//! - of one file the one that waits longest is tried first; after one that must go on waiting no other of that file is tried in the same round;
//! - a session that ends leaves them unanswered: a successor gets them again.

use super::{crew::Crew, files::Files};
use crate::{
    disk::{Disk, parts},
    error::Result,
};
use parking_lot::Mutex;
use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{
            AtomicUsize,
            Ordering::{AcqRel, Acquire},
        },
    },
    thread,
    time::Duration,
};

/// How often it is tried.
const ROUND: Duration = Duration::from_millis(20);
/// Memory of all writes that wait, at most, in a mount or in all connections together: a loop device has 128 requests under way, mostly of 256 KiB
/// or less. Who comes then gets the error.
pub(super) const MOST: usize = 512 << 20;
/// Of that, one connection gets so much where several share it: enough for four of the longest writes of NBD.
pub(super) const MOST_OF_ONE: usize = 129 << 20;
/// It is written in pieces of so many bytes.
const PIECE: usize = 1 << 20;

/// What is to be written.
pub(super) enum What {
    Data(Vec<u8>),
    /// So many zeros: whole blocks first, which need no room and may give the room that the parts of blocks need.
    Zeros(u64),
}

/// A write that waits.
pub(super) struct Write {
    /// What its answer is known by.
    pub unique: u64,
    /// The file.
    pub ino: u64,
    /// Where it begins, and what is written.
    pub at: u64,
    pub what: What,
    /// How much of it is written: bytes of data, or [`parts`] of the range of zeros.
    pub done: usize,
    /// Is it to be answered only when it is durable?
    pub durable: bool,
}

impl Write {
    /// Bytes of memory that it takes, roughly.
    fn weight(&self) -> usize {
        let data = match &self.what {
            What::Data(data) => data.len(),
            What::Zeros(_) => 0,
        };
        data + size_of::<Write>() + 64
    }
    /// Writes the next piece; false: there is none.
    fn go_on(&mut self, disk: &dyn Disk) -> Result<bool> {
        let done = self.done;
        match &self.what {
            What::Data(data) => {
                let piece = &data[done..data.len().min(done + PIECE)];
                if piece.is_empty() {
                    return Ok(false);
                }
                disk.write(piece, self.at + done as u64)?;
                self.done += piece.len();
            }
            What::Zeros(len) => {
                let Some(&(at, len)) = parts(self.at, *len).get(done) else {
                    return Ok(false);
                };
                if len > 0 {
                    disk.write_zeroes(at, len)?;
                }
                self.done += 1;
            }
        }
        Ok(true)
    }
}

/// Whoever sent the writes.
pub(super) trait Asker: Send + Sync {
    /// Will no answer be heard any more?
    fn is_gone(&self) -> bool;
    /// Tells the outcome of a write: done, or an `errno`.
    fn answer(&self, write: &Write, outcome: std::result::Result<(), i32>);
}

/// The memory of what waits: one for several that share it.
#[derive(Default)]
pub(super) struct Memory(AtomicUsize);

impl Memory {
    fn take(&self, bytes: usize) -> bool {
        let more = |taken: usize| (taken + bytes <= MOST).then_some(taken + bytes);
        self.0.fetch_update(AcqRel, Acquire, more).is_ok()
    }
    fn give_back(&self, bytes: usize) {
        self.0.fetch_sub(bytes, AcqRel);
    }
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
    memory: Arc<Memory>,
    /// Of which it gets so much.
    most: usize,
    asker: Arc<dyn Asker>,
    files: Arc<Files>,
    crew: Arc<Crew>,
    state: Mutex<State>,
}

impl Waiting {
    pub(super) fn new(
        asker: Arc<dyn Asker>,
        files: Arc<Files>,
        crew: Arc<Crew>,
        memory: Arc<Memory>,
        most: usize,
    ) -> Waiting {
        Waiting {
            memory,
            most,
            asker,
            files,
            crew,
            state: Mutex::default(),
        }
    }
    /// Puts a write aside; says whether it could. If not, it is to be answered with the error.
    pub(super) fn put_aside(self: &Arc<Waiting>, write: Write) -> bool {
        let mut state = self.state.lock();
        if self.crew.is_stopping() {
            // It stays unanswered, as those do that wait: who comes after gets it again.
            return true;
        }
        let weight = write.weight();
        if state.bytes + weight > self.most || !self.memory.take(weight) {
            return false;
        }
        if !state.tried {
            let waiting = Arc::clone(self);
            let started = self.crew.start_beside("waiting", move || {
                waiting.work();
                None
            });
            if let Err(e) = started {
                tracing::warn!("a write cannot wait: {e}");
                self.memory.give_back(weight);
                return false;
            }
            tracing::info!(ino = write.ino, "writes wait for room");
            state.tried = true;
        }
        state.bytes += weight;
        state.writes.push_back(write);
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
            if self.crew.is_over() || self.asker.is_gone() {
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
    fn round(&self) {
        let mut full = HashSet::new();
        // Only what waits now: who comes meanwhile is tried in the next round.
        let mut left = self.state.lock().writes.len();
        let mut at = 0;
        while left > 0 && !self.crew.is_over() {
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
            let Some(mut write) = write else {
                at += 1;
                continue;
            };
            match self.attempt(&mut write) {
                Some(outcome) => {
                    self.asker.answer(&write, outcome);
                    let mut state = self.state.lock();
                    state.bytes -= write.weight();
                    state.in_hand = None;
                    drop(state);
                    self.memory.give_back(write.weight());
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
    /// The outcome of a write, unless it must go on waiting.
    fn attempt(&self, write: &mut Write) -> Option<std::result::Result<(), i32>> {
        let file = self.files.get(write.ino);
        let Some(disk) = file.as_ref().and_then(|file| file.disk()) else {
            return Some(Err(libc::ESTALE));
        };
        // What found room is not written again.
        let mut write_on = || -> Result<bool> {
            loop {
                if self.crew.is_over() {
                    // Whoever asked is gone: nothing of it may come after what others write now.
                    return Ok(false);
                }
                if !write.go_on(&*disk)? {
                    break;
                }
            }
            if write.durable {
                disk.flush()?;
            }
            Ok(true)
        };
        match write_on() {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(e) if e.waits() => None,
            Err(e) => {
                tracing::error!(
                    ino = write.ino,
                    at = write.at,
                    "a write waited in vain: {e}"
                );
                Some(Err(e.errno()))
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // What waits still is never answered.
        self.memory.give_back(self.state.get_mut().bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_shares_memory_gets_no_more_than_there_is() {
        let (a, b) = (Arc::new(Memory::default()), Arc::new(Memory::default()));
        let other = Arc::clone(&a);
        assert!(a.take(MOST - 1) && other.take(1));
        assert!(!other.take(1) && b.take(MOST));
        a.give_back(10);
        assert!(!other.take(11) && other.take(10));
    }
}
