//! The handover: what a server must leave to its successor, in memory that the keeper holds.
//!
//! One memfd. It begins with a record of the session; then there is a place for each attached object: a record of the attachment, and the
//! volatile log of the disk ([`volatile`]). The keeper creates the memory and passes it on; a server writes to it as things
//! change, and a server that finds a session in it goes on with that one.
//!
//! Always true: of each record there are two copies, written in turn, and each has a checksum: a server that dies while it writes one leaves
//! the other.

use crate::error::{Error, Kind, Result};
use crate::format::crc;
use crate::layer::volatile;
use crate::sys::shared::{self, SharedMemory};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// Version of everything in this memory, volatile logs included. Another forkdisk can take over only if it has the same.
pub const VERSION: u64 = 1;

/// One copy of a record.
const COPY: usize = 4096;
/// Bytes before the text of a record: sequence, length, checksum.
const HEAD: usize = 16;
const RECORD: usize = 2 * COPY;
/// One place.
const PLACE: usize = RECORD + volatile::LEN;

/// Address space that is left free when a place is taken, for buffers, stacks and small allocations.
const SLACK: usize = 16 << 20;

fn io(e: std::io::Error) -> Error {
    Error::io("use", "the handover memory", &e)
}

/// Two copies of a small document.
struct Record {
    memory: SharedMemory,
    sequence: AtomicU64,
}

impl Record {
    fn at(file: &Arc<File>, at: u64) -> Result<Record> {
        let memory = SharedMemory::map(file, at, RECORD).map_err(io)?;
        let record = Record {
            memory,
            sequence: AtomicU64::new(0),
        };
        let newest = [0, 1]
            .iter()
            .filter_map(|&c| record.copy(c))
            .max_by_key(|c| c.0);
        record.sequence.store(newest.map_or(0, |c| c.0), SeqCst);
        Ok(record)
    }
    /// A copy, if it is whole: its sequence and its text.
    fn copy(&self, copy: usize) -> Option<(u64, Vec<u8>)> {
        let at = copy * COPY;
        let mut head = [0; HEAD];
        self.memory.read(at, &mut head);
        let (sequence, rest) = head.split_first_chunk::<8>()?;
        let (len, sum) = rest.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*len) as usize;
        let sum = u32::from_le_bytes(sum.try_into().ok()?);
        if len > COPY - HEAD {
            return None;
        }
        let mut text = vec![0; len];
        self.memory.read(at + HEAD, &mut text);
        let mut all = sequence.to_vec();
        all.extend_from_slice(&text);
        (crc(&all) == sum).then(|| (u64::from_le_bytes(*sequence), text))
    }
    /// What it says; `None` if nothing was written, or it was emptied.
    fn read(&self) -> Option<Value> {
        let newest = [0, 1]
            .iter()
            .filter_map(|&c| self.copy(c))
            .max_by_key(|c| c.0)?;
        serde_json::from_slice(&newest.1).ok()
    }
    fn write(&self, value: Option<&Value>) -> Result<()> {
        let text = value.map(Value::to_string).unwrap_or_default();
        if text.len() > COPY - HEAD {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "{} bytes about an attachment are too many to hand over",
                    text.len()
                ),
            )
            .hint("use a shorter name"));
        }
        let sequence = self.sequence.fetch_add(1, SeqCst) + 1;
        let mut all = sequence.to_le_bytes().to_vec();
        all.extend_from_slice(text.as_bytes());
        let sum = crc(&all);
        let mut copy = sequence.to_le_bytes().to_vec();
        copy.extend_from_slice(&(text.len() as u32).to_le_bytes());
        copy.extend_from_slice(&sum.to_le_bytes());
        copy.extend_from_slice(text.as_bytes());
        self.memory.write((sequence % 2) as usize * COPY, &copy);
        Ok(())
    }
}

/// The memory, as a server or the keeper sees it.
pub struct Handover {
    file: Arc<File>,
    session: Record,
    taken: Mutex<BTreeSet<u64>>,
}

/// A place for one attached object. Dropping it leaves it to the successor.
pub struct Place {
    number: u64,
    record: Record,
    handover: Arc<Handover>,
}

impl Handover {
    /// New memory, for the keeper to hold.
    pub fn create() -> Result<File> {
        shared::create("forkdisk-handover").map_err(io)
    }
    /// The memory behind a descriptor.
    pub fn open(file: File) -> Result<Arc<Handover>> {
        let file = Arc::new(file);
        Ok(Arc::new(Handover {
            session: Record::at(&file, 0)?,
            file,
            taken: Mutex::default(),
        }))
    }
    /// [`Handover::open`] for whoever keeps the descriptor.
    pub fn open_file(file: &File) -> Result<Arc<Handover>> {
        Handover::open(file.try_clone().map_err(io)?)
    }
    /// The memory itself.
    pub fn file(&self) -> &File {
        &self.file
    }
    /// What the last server said of its session.
    pub fn session(&self) -> Result<Option<Value>> {
        match self.session.read() {
            Some(said) if said["handover"].as_u64() != Some(VERSION) => Err(Error::new(
                Kind::Version,
                format!(
                    "the server before was of another version ({})",
                    said["handover"]
                ),
            )
            .hint("detach everything and restart the daemon")),
            said => Ok(said),
        }
    }
    /// Leaves word of the session.
    pub fn set_session(&self, mut said: Value) -> Result<()> {
        said["handover"] = json!(VERSION);
        self.session.write(Some(&said))
    }
    fn offset(number: u64) -> u64 {
        RECORD as u64 + number * PLACE as u64
    }
    fn place(self: &Arc<Handover>, number: u64) -> Result<Place> {
        Ok(Place {
            number,
            record: Record::at(&self.file, Self::offset(number))?,
            handover: self.clone(),
        })
    }
    /// Takes a free place. Refused where afterwards little address space would be left for all the rest of the process, which cannot go on without.
    pub fn claim(self: &Arc<Handover>) -> Result<Place> {
        drop(SharedMemory::private(PLACE + SLACK).map_err(io)?);
        let mut taken = self.taken.lock();
        let free = (0..).find(|n| !taken.contains(n)).unwrap_or(0);
        let place = self.place(free)?;
        taken.insert(free);
        Ok(place)
    }
    /// The places that a predecessor had taken, with what it said of each.
    pub fn left(self: &Arc<Handover>) -> Result<Vec<(Place, Value)>> {
        let len = self.file.metadata().map_err(io)?.len();
        let mut left = Vec::new();
        for number in 0..len.saturating_sub(RECORD as u64).div_ceil(PLACE as u64) {
            let place = self.place(number)?;
            if let Some(said) = place.record.read() {
                self.taken.lock().insert(number);
                left.push((place, said));
            }
        }
        Ok(left)
    }
}

impl Place {
    /// Leaves word of the attachment.
    pub fn write(&self, said: &Value) -> Result<()> {
        self.record.write(Some(said))
    }
    /// Memory for its volatile log.
    pub fn volatile(&self) -> Result<Arc<SharedMemory>> {
        let at = Handover::offset(self.number) + RECORD as u64;
        SharedMemory::map(&self.handover.file, at, volatile::LEN)
            .map(Arc::new)
            .map_err(io)
    }
    /// Nothing is attached here any more.
    pub fn release(self) {
        if let Ok(memory) = self.volatile() {
            memory.give_back(0, volatile::LEN);
        }
        let _ = self.record.write(None);
        self.handover.taken.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_finds_what_was_said_last() {
        let file = Handover::create().unwrap();
        let first = Handover::open(file.try_clone().unwrap()).unwrap();
        assert!(first.session().unwrap().is_none());
        first.set_session(json!({"next_ino": 5})).unwrap();
        let (a, b) = (first.claim().unwrap(), first.claim().unwrap());
        for n in 0..5 {
            a.write(&json!({"name": "a", "n": n})).unwrap();
            b.write(&json!({"name": "b"})).unwrap();
        }
        b.volatile().unwrap().store(8, 77);
        let second = Handover::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(second.session().unwrap().unwrap()["next_ino"], 5);
        let left = second.left().unwrap();
        assert_eq!(left.len(), 2);
        assert_eq!(left[0].1, json!({"name": "a", "n": 4}));
        assert_eq!(left[1].0.volatile().unwrap().load(8), 77);
        let mut left = left.into_iter();
        left.next().unwrap().0.release();
        let third = Handover::open(file).unwrap();
        assert_eq!(
            third.left().unwrap().len(),
            1,
            "the first place is free again"
        );
        assert_eq!(third.claim().unwrap().number, 0);
    }

    #[test]
    fn half_a_record_is_not_believed() {
        let file = Handover::create().unwrap();
        let handover = Handover::open(file.try_clone().unwrap()).unwrap();
        let place = handover.claim().unwrap();
        place.write(&json!({"n": 1})).unwrap();
        place.write(&json!({"n": 2})).unwrap();
        // The third was being written over the first.
        place.record.memory.write(COPY, &3u64.to_le_bytes());
        assert_eq!(
            Handover::open(file).unwrap().left().unwrap()[0].1,
            json!({"n": 2})
        );
        assert!(place.write(&json!({"long": "x".repeat(5000)})).is_err());
    }
}
