//! A difference as a stream of bytes, out of the store and into it (FORMAT.md, section "A stream").
//!
//! Always true:
//! - a stream holds nothing that could be otherwise another time: the same state over the same parent gives the same bytes;
//! - what comes in is checked piece by piece and as a whole before it gets a name; until then it stands under a temporary one, which `gc`
//!   takes away if this process dies;
//! - a difference is applied only to the state whose digest it names.

use super::digest::KNOWN_AS;
use super::import::{BaseMeta, DIGEST_MAX, Sink};
use super::names::{Extra, NameRecord, TEMPORARY, check_part, stage};
use super::objects::taken;
use super::{Below, Object, ObjectKind, Progress, State, Store, changes, layer_file};
use crate::chain::Chain;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::Header;
use crate::format::stream::{
    Digest, MAX_DATA, StreamHeader, StreamRecord, StreamTrailer, appended, cut, past_the_end,
};
use crate::io::{Access, Dir, File};
use crate::layer::{self, Layer, volatile};
use crate::units::Id;
use sha2::{Digest as _, Sha256};
use std::io::Read;
use std::sync::Arc;
use zerocopy::IntoBytes;

/// What a stream holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamTotals {
    /// SHA-256 of all its bytes: if it is that of a layer over what it stands on, the digest of the layer.
    pub digest: Digest,
    /// Records.
    pub records: u64,
    /// Bytes of data in them.
    pub data: u64,
    /// Bytes of the stream.
    pub bytes: u64,
}

/// Bytes go out, and are counted and hashed.
struct Writer<'a> {
    out: &'a mut dyn FnMut(&[u8]) -> Result<()>,
    hasher: Sha256,
    totals: StreamTotals,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.totals.bytes += bytes.len() as u64;
        (self.out)(bytes)
    }
    fn record(&mut self, at: u64, len: u64, data: Option<&[u8]>) -> Result<()> {
        self.put(StreamRecord::new(at, len, data).as_bytes())?;
        self.totals.records += 1;
        if let Some(data) = data {
            self.put(data)?;
            self.totals.data += data.len() as u64;
        }
        Ok(())
    }
}

fn digest_of(hasher: &Sha256) -> Digest {
    Digest(hasher.clone().finalize().into())
}

fn told(progress: &dyn Progress, done: u64, total: u64) -> Result<()> {
    match progress.update(done, total) {
        true => Ok(()),
        false => Err(Error::new(Kind::Interrupted, "interrupted")
            .hint("nothing was left behind; run it again")),
    }
}

/// Hands `state` to `out` as a stream: all of it, or what changed since a state with this digest. `known_as`: its own, if it is not that of the stream.
pub fn write_stream(
    state: &State,
    since: Option<(&State, Digest)>,
    known_as: Option<Digest>,
    out: &mut dyn FnMut(&[u8]) -> Result<()>,
    progress: &dyn Progress,
) -> Result<StreamTotals> {
    let size = match since {
        Some(_) => state.size(),
        None => state.len(),
    };
    let header = StreamHeader::new(size, since.map(|(lower, digest)| (digest, lower.size())));
    let header = header.of(known_as);
    let mut writer = Writer {
        out,
        hasher: Sha256::new(),
        totals: StreamTotals {
            digest: Digest([0; 32]),
            records: 0,
            data: 0,
            bytes: 0,
        },
    };
    writer.put(header.as_bytes())?;
    let mut found = changes::changes(since.map(|(lower, _)| lower), state);
    let mut buffer = Vec::new();
    loop {
        let (change, end) = found.advance()?;
        match change {
            Some(change) if change.zero => writer.record(change.at, change.len, None)?,
            Some(change) => {
                let mut at = change.at;
                while at < change.end() {
                    buffer.resize((change.end() - at).min(MAX_DATA) as usize, 0);
                    state.disk().read(&mut buffer, at)?;
                    writer.record(at, buffer.len() as u64, Some(&buffer))?;
                    at += buffer.len() as u64;
                    told(progress, at, size)?;
                }
            }
            None => {}
        }
        if end {
            break;
        }
        told(progress, found.at().min(size), size)?;
    }
    let totals = writer.totals;
    let trailer = StreamTrailer::new(totals.records, totals.data, digest_of(&writer.hasher));
    writer.put(trailer.as_bytes())?;
    told(progress, size, size)?;
    Ok(StreamTotals {
        digest: digest_of(&writer.hasher),
        ..writer.totals
    })
}

/// A stream that comes in. Memory is bounded by one record.
pub struct StreamReader<'a> {
    from: &'a mut dyn Read,
    header: StreamHeader,
    hasher: Sha256,
    records: u64,
    data: u64,
    /// Nothing before this byte of the state may come any more.
    at: u64,
    buffer: Vec<u8>,
    done: bool,
}

/// A piece of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece<'a> {
    /// Bytes, and where they stand.
    Data(u64, &'a [u8]),
    /// A range that reads as zeros: where, and how long.
    Zero(u64, u64),
}

impl<'a> StreamReader<'a> {
    /// Reads the header.
    pub fn open(from: &'a mut dyn Read) -> Result<StreamReader<'a>> {
        let mut head = [0; size_of::<StreamHeader>()];
        fill(from, &mut head)?;
        let header = StreamHeader::decode(&head)?;
        let mut hasher = Sha256::new();
        hasher.update(head);
        Ok(StreamReader {
            from,
            header,
            hasher,
            records: 0,
            data: 0,
            at: 0,
            buffer: Vec::new(),
            done: false,
        })
    }
    /// What it says of itself.
    pub fn header(&self) -> &StreamHeader {
        &self.header
    }
    /// The next piece. `None` is the end: all of it was whole, and nothing follows.
    pub fn piece(&mut self) -> Result<Option<Piece<'_>>> {
        if self.done {
            return Ok(None);
        }
        let mut head = [0; size_of::<StreamRecord>()];
        fill(self.from, &mut head)?;
        if StreamTrailer::begins(&head) {
            self.end(&head)?;
            self.done = true;
            return Ok(None);
        }
        let record = StreamRecord::decode(&head, &self.header, self.at)?;
        self.buffer.resize(record.data_len(), 0);
        fill(self.from, &mut self.buffer)?;
        record.check(&self.buffer)?;
        self.hasher.update(head);
        self.hasher.update(&self.buffer);
        self.records += 1;
        self.data += self.buffer.len() as u64;
        let (at, len) = (record.at.get(), record.len.get());
        self.at = at + len;
        Ok(Some(match self.buffer.is_empty() {
            true => Piece::Zero(at, len),
            false => Piece::Data(at, &self.buffer),
        }))
    }
    /// The digest of the state where the stream comes from, once all of it was read: what the stream says, or its own. Only of a difference.
    fn digest_there(&self) -> Digest {
        self.header
            .known_as()
            .unwrap_or_else(|| digest_of(&self.hasher))
    }
    fn end(&mut self, head: &[u8]) -> Result<()> {
        let mut trailer = [0; size_of::<StreamTrailer>()];
        let (first, rest) = trailer.split_at_mut(head.len());
        first.copy_from_slice(head);
        fill(self.from, rest)?;
        let wanted = StreamTrailer::new(self.records, self.data, digest_of(&self.hasher));
        StreamTrailer::check(&trailer, &wanted)?;
        self.hasher.update(trailer);
        match read(self.from, &mut [0])? {
            0 => Ok(()),
            _ => Err(appended()),
        }
    }
}

/// Reads what there is, at least one byte; 0 is the end.
fn read(from: &mut dyn Read, into: &mut [u8]) -> Result<usize> {
    loop {
        match from.read(into) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", "the stream", &e)),
            Ok(n) => return Ok(n),
        }
    }
}

fn fill(from: &mut dyn Read, mut into: &mut [u8]) -> Result<()> {
    while !into.is_empty() {
        match read(from, into)? {
            0 => return Err(cut()),
            n => into = &mut into[n..],
        }
    }
    Ok(())
}

/// What the record of a layer's name says of it.
fn known_as(digest: Option<Digest>) -> Extra {
    let mut extra = Extra::default();
    extra.set(KNOWN_AS, digest.map(|digest| digest.to_string()));
    extra
}

/// Where a stream becomes a layer.
struct Growing {
    id: Id,
    temporary: String,
    file: Arc<dyn File>,
}

/// How far a stream got in the store: what has to be taken back if it goes no further.
#[derive(PartialEq, Eq)]
enum Reached {
    Temporary,
    Layer,
    Named,
}

impl Store {
    /// Brings a stream in under `name`: a stream of everything as a base, a difference as an image over the state with the digest that it
    /// names. Nothing half-made stays if it fails.
    pub fn import_stream(
        &self,
        from: &mut dyn Read,
        name: &str,
        progress: &dyn Progress,
    ) -> Result<Object> {
        check_part(name)?;
        if self.names.entry(name)?.is_some() {
            return Err(taken(name));
        }
        let mut stream = StreamReader::open(from)?;
        let Some((digest, size)) = stream.header().since() else {
            return self.bring_in(name, |dir, id| copy_full(dir, id, &mut stream, progress));
        };
        let parent = self.with_digest(digest, size, progress)?;
        self.grow(&mut stream, parent, name, progress)
    }
    /// Makes an image of a difference to `parent`.
    fn grow(
        &self,
        stream: &mut StreamReader<'_>,
        parent: Below,
        name: &str,
        progress: &dyn Progress,
    ) -> Result<Object> {
        // While it is open nobody removes it.
        let chain = self.chain(parent)?;
        let growing = self.plant(parent, stream.header(), name)?;
        let mut reached = Reached::Temporary;
        let done = (|| {
            let below: Option<Arc<dyn layer::refer::Below>> = Some(chain.clone());
            let layer = Layer::open_over(growing.file.clone(), volatile::private()?, None, below)?;
            let disk = CowDisk::writable(layer, chain.clone());
            pour(stream, &disk, &chain, progress)?;
            disk.close_sealed(name)?;
            let _lock = self.lock(true)?;
            if self.names.entry(name)?.is_some() {
                return Err(taken(name));
            }
            self.rank_of(parent)?;
            // From the writer's lock to a reader's: who sees the name can open it.
            growing.file.lock(false)?;
            let record = NameRecord {
                kind: ObjectKind::Image,
                target: Below::Layer(growing.id),
                created: (self.env.now)(),
                message: None,
                opened: false,
                extra: known_as(Some(stream.digest_there())),
            };
            let (staged, file) = stage(&*self.names, name, &record.encode(name))?;
            let placed = (|| {
                file.sync()?;
                self.layers
                    .rename_new(&growing.temporary, &layer_file(growing.id))?;
                reached = Reached::Layer;
                self.layers.sync()?;
                self.names.rename_new(&staged, name)
            })();
            if let Err(e) = placed {
                let _ = self.names.remove(&staged);
                return Err(e);
            }
            reached = Reached::Named;
            self.names.sync()?;
            self.object(name)
        })();
        if done.is_err() {
            // A name must never refer to a layer that is gone: where it is not certain that the name is, the layer stays.
            let unnamed = reached != Reached::Named
                || (self.names.remove(name).is_ok() && self.names.sync().is_ok());
            let _ = match reached {
                Reached::Temporary => self.layers.remove(&growing.temporary),
                _ if unnamed => self.layers.remove(&layer_file(growing.id)),
                _ => Ok(()),
            };
        }
        done
    }
    /// A layer under a temporary name, locked: so `gc` leaves it alone as long as this process lives.
    fn plant(&self, parent: Below, stream: &StreamHeader, name: &str) -> Result<Growing> {
        let _lock = self.lock(true)?;
        let rank = self.rank_over(parent, name)?;
        let id = (self.env.id)();
        let header = Header::new(
            id,
            parent.id(),
            matches!(parent, Below::Layer(_)),
            rank,
            stream.size.get(),
            (self.env.now)(),
            name,
        );
        let temporary = format!("{TEMPORARY}{}", layer_file(id));
        let file = self.layers.open(&temporary, Access::CreateNew)?;
        if let Err(e) = file
            .lock(true)
            .and_then(|()| layer::create(&*file, &header))
        {
            let _ = self.layers.remove(&temporary);
            return Err(e);
        }
        Ok(Growing {
            id,
            temporary,
            file,
        })
    }
    /// Is a temporary file of `layers/` that of an import under way?
    pub fn layer_import_running(&self, temporary: &str) -> bool {
        let open = self.layers.open(temporary, Access::Read);
        open.is_ok_and(|file| file.lock(true).is_err_and(|e| e.kind() == Kind::Busy))
    }
}

/// Writes a difference into the layer of `disk`, which stands on `chain`.
fn pour(
    stream: &mut StreamReader<'_>,
    disk: &CowDisk,
    chain: &Chain,
    progress: &dyn Progress,
) -> Result<()> {
    let size = disk.size();
    // What the parent does not show any more must not show again in a larger one, nor in whatever becomes larger later.
    disk.hide_from(chain.size().min(size))?;
    while let Some(piece) = stream.piece()? {
        let end = match piece {
            Piece::Data(at, data) => {
                disk.write(data, at)?;
                at + data.len() as u64
            }
            Piece::Zero(at, len) => {
                disk.discard(at, len)?;
                at + len
            }
        };
        told(progress, end, size)?;
    }
    Ok(())
}

/// Makes a base of a stream of everything.
fn copy_full(
    dir: &dyn Dir,
    id: Id,
    stream: &mut StreamReader<'_>,
    progress: &dyn Progress,
) -> Result<BaseMeta> {
    let len = stream.header().size.get();
    let mut sink = Sink::new(dir, len, len <= DIGEST_MAX, progress)?;
    while let Some(piece) = stream.piece()? {
        // There are no zeros in it: they would be zeros over nothing.
        let Piece::Data(at, data) = piece else {
            continue;
        };
        sink.hole(at)?;
        let inside = len.saturating_sub(at).min(data.len() as u64) as usize;
        let (data, past) = data.split_at(inside);
        if past.iter().any(|b| *b != 0) {
            return Err(past_the_end());
        }
        sink.data(data)?;
    }
    let digest = sink.finish(id, len)?;
    let known_as = stream.header().known_as();
    Ok(BaseMeta {
        known_as: known_as.map(|digest| digest.to_string()),
        ..BaseMeta::copied(id, len, digest)
    })
}
