//! A difference as a stream: header, records, trailer (FORMAT.md, section "A stream").
//!
//! A stream comes from anywhere. Each piece is checked by its own sum before anything in it is believed, no length in it
//! reserves memory beyond [`MAX_DATA`], and the order of the records is checked by whoever reads them one after the other.

use super::{Field, crc};
use crate::error::{Error, Kind, Result};
use crate::units::{BLOCK, MAX_DISK, round_up};
use std::fmt;
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Version of the format of streams that this crate writes, and the newest it reads.
pub const STREAM_VERSION: u32 = 1;
/// Magic of a stream.
pub const STREAM_MAGIC: [u8; 8] = *b"FDSTREAM";
/// Magic of the trailer of a stream. Its first four bytes are the kind of no record.
pub const TRAILER_MAGIC: [u8; 8] = *b"FDSTREND";
/// Kind of a stream: everything, over nothing.
pub const STREAM_FULL: u32 = 0;
/// Kind of a stream: what changed since the state whose digest it names.
pub const STREAM_SINCE: u32 = 1;
/// Kind of a record: its data follows.
pub const RECORD_DATA: u32 = 1;
/// Kind of a record: the range reads as zeros.
pub const RECORD_ZERO: u32 = 2;
/// Most bytes of data in a record.
pub const MAX_DATA: u64 = 1 << 20;

/// SHA-256 of a base's content, or of the stream of a sealed layer over what it stands on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// What a written digest begins with.
const SHA256: &str = "sha256:";

impl Digest {
    /// Reads `sha256:` and 64 hexadecimal digits in lower case; `None` for anything else.
    pub fn parse(text: &str) -> Option<Digest> {
        let hex = text.strip_prefix(SHA256)?.as_bytes();
        if hex.len() != 64 {
            return None;
        }
        let digit = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SHA256)?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

record! {
    /// What a stream begins with.
    StreamHeader = "Stream header" {
        /// [`STREAM_MAGIC`].
        magic: [u8; 8],
        /// [`STREAM_VERSION`].
        version: U32,
        /// [`STREAM_FULL`] or [`STREAM_SINCE`].
        kind: U32,
        /// Bytes of the state that the stream makes.
        size: U64,
        /// Bytes of the state that it is applied to; 0 if there is none.
        parent_size: U64,
        /// Digest of that state; zeros if there is none.
        parent: [u8; 32],
        /// Another digest of the state that the stream makes: the one by which the store that it comes from knows it; zeros if there is none.
        known_as: [u8; 32],
        /// Zeros.
        reserved: [u8; 28],
        /// CRC of the bytes before.
        crc: U32,
    }
}
record! {
    /// One changed range; that of a data record is followed by its bytes.
    StreamRecord = "Stream record" {
        /// [`RECORD_DATA`] or [`RECORD_ZERO`].
        kind: U32,
        /// 0.
        reserved: U32,
        /// First byte of the range.
        at: U64,
        /// Bytes of the range.
        len: U64,
        /// 0.
        reserved2: U32,
        /// CRC of the bytes before, and of the data.
        crc: U32,
    }
}
record! {
    /// What a stream ends with.
    StreamTrailer = "Stream trailer" {
        /// [`TRAILER_MAGIC`].
        magic: [u8; 8],
        /// Number of records.
        records: U64,
        /// Bytes of data in all of them.
        data: U64,
        /// SHA-256 of all bytes before the trailer.
        digest: [u8; 32],
        /// 0.
        reserved: U32,
        /// CRC of the bytes before.
        crc: U32,
    }
}

const _: () = assert!(size_of::<StreamHeader>() == 128);
const _: () = assert!(size_of::<StreamRecord>() == 32);
const _: () = assert!(size_of::<StreamTrailer>() == 64);

fn damaged(what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the stream is damaged: {what}")).hint(
        "make it anew with `forkdisk export`, or transfer it once more; nothing of it was kept",
    )
}

/// Do these bytes begin as a stream does, or as one of which some of the first bytes were changed, or all but the first ones cut off? No image begins so
/// by chance.
pub fn begins_like_stream(start: &[u8]) -> bool {
    let same = STREAM_MAGIC.iter().zip(start).filter(|(a, b)| a == b);
    let (same, of) = (same.count(), start.len().min(STREAM_MAGIC.len()));
    same >= 5 || same == of && of > 0
}

/// An error about a stream that ends too early.
pub fn cut() -> Error {
    damaged("it is cut")
}

/// The CRC of all but the last four bytes.
fn sum(bytes: &[u8]) -> u32 {
    crc(&bytes[..bytes.len() - size_of::<U32>()])
}

impl StreamHeader {
    /// The header of a stream that makes a state of `size` bytes, out of nothing or of `since`: digest and size.
    pub fn new(size: u64, since: Option<(Digest, u64)>) -> StreamHeader {
        let (digest, parent_size) = since.unwrap_or((Digest([0; 32]), 0));
        let mut header = StreamHeader {
            magic: STREAM_MAGIC,
            version: U32::new(STREAM_VERSION),
            kind: U32::new(match since {
                Some(_) => STREAM_SINCE,
                None => STREAM_FULL,
            }),
            size: U64::new(size),
            parent_size: U64::new(parent_size),
            parent: digest.0,
            known_as: [0; 32],
            reserved: [0; 28],
            crc: U32::new(0),
        };
        header.crc = U32::new(sum(header.as_bytes()));
        header
    }
    /// The same of a state that the store from which it comes knows by another digest than that of the stream.
    #[must_use]
    pub fn of(mut self, known_as: Option<Digest>) -> StreamHeader {
        self.known_as = known_as.map_or([0; 32], |digest| digest.0);
        self.crc = U32::new(sum(self.as_bytes()));
        self
    }
    /// Decodes and checks it.
    pub fn decode(bytes: &[u8]) -> Result<StreamHeader> {
        let header = StreamHeader::read_from_bytes(bytes).map_err(|_| cut())?;
        if header.magic != STREAM_MAGIC {
            if begins_like_stream(&header.magic) {
                return Err(damaged("its first bytes were changed")
                    .hint("make it anew with `forkdisk export`, or transfer it once more; if it is a raw image that begins like a stream, `-O raw`"));
            }
            return Err(Error::new(Kind::Invalid, "this is no stream of forkdisk")
                .hint("`forkdisk export REF FILE -O stream` makes one; leave out `-O stream` to take it as a raw image"));
        }
        if header.crc.get() != sum(bytes) {
            return Err(damaged("its header does not match its checksum"));
        }
        if header.version.get() > STREAM_VERSION {
            return Err(Error::new(
                Kind::Version,
                format!(
                    "the stream has version {}, newer than this forkdisk reads ({STREAM_VERSION})",
                    header.version
                ),
            )
            .hint("use a newer forkdisk"));
        }
        let whole = |n: u64| n > 0 && n <= MAX_DISK && n.is_multiple_of(BLOCK);
        let size = header.size.get();
        let sizes = match header.kind.get() {
            STREAM_FULL => size > 0 && size <= MAX_DISK && header.parent_size.get() == 0,
            STREAM_SINCE => whole(size) && whole(header.parent_size.get()),
            _ => false,
        };
        let nothing = header.kind.get() != STREAM_FULL || header.parent == [0; 32];
        let zeros = header.reserved == [0; 28];
        if header.version.get() != STREAM_VERSION || !sizes || !nothing || !zeros {
            return Err(damaged("a field of its header is out of range"));
        }
        Ok(header)
    }
    /// What it is applied to: the digest and the size; `None` for a stream of everything.
    pub fn since(&self) -> Option<(Digest, u64)> {
        (self.kind.get() == STREAM_SINCE).then_some((Digest(self.parent), self.parent_size.get()))
    }
    /// By what the store that it comes from knows the state, if that is not the digest of the stream.
    pub fn known_as(&self) -> Option<Digest> {
        (self.known_as != [0; 32]).then_some(Digest(self.known_as))
    }
    /// Bytes of whole blocks that hold the state.
    pub fn blocks_end(&self) -> u64 {
        round_up(self.size.get()).unwrap_or(MAX_DISK)
    }
}

impl StreamRecord {
    /// A record of `len` bytes at `at`: of data, which follows it, or of zeros.
    pub fn new(at: u64, len: u64, data: Option<&[u8]>) -> StreamRecord {
        let mut record = StreamRecord {
            kind: U32::new(match data {
                Some(_) => RECORD_DATA,
                None => RECORD_ZERO,
            }),
            reserved: U32::new(0),
            at: U64::new(at),
            len: U64::new(len),
            reserved2: U32::new(0),
            crc: U32::new(0),
        };
        record.crc = U32::new(record.sum(data.unwrap_or_default()));
        record
    }
    fn sum(&self, data: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.as_bytes()[..size_of::<StreamRecord>() - size_of::<U32>()]);
        hasher.update(data);
        hasher.finalize()
    }
    /// Decodes a record of the stream that `header` begins, which may say something of the bytes from `from` on only. Its sum is looked at
    /// by [`StreamRecord::check`], when the data is there.
    pub fn decode(bytes: &[u8], header: &StreamHeader, from: u64) -> Result<StreamRecord> {
        let record = StreamRecord::read_from_bytes(bytes).map_err(|_| cut())?;
        let (at, len) = (record.at.get(), record.len.get());
        let kind = match record.kind.get() {
            RECORD_DATA => len <= MAX_DATA,
            RECORD_ZERO => header.since().is_some(),
            _ => false,
        };
        let blocks = at.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK) && len > 0;
        let end = at.checked_add(len);
        let inside = end.is_some_and(|end| end <= header.blocks_end());
        let plain = record.reserved.get() == 0 && record.reserved2.get() == 0;
        if !kind || !blocks || !inside || !plain {
            return Err(damaged("a record is out of range"));
        }
        if at < from {
            return Err(damaged("its records are out of order"));
        }
        Ok(record)
    }
    /// Bytes of data that follow it: at most [`MAX_DATA`].
    pub fn data_len(&self) -> usize {
        match self.kind.get() {
            RECORD_DATA => self.len.get().min(MAX_DATA) as usize,
            _ => 0,
        }
    }
    /// Checks the record and its data.
    pub fn check(&self, data: &[u8]) -> Result<()> {
        if self.crc.get() != self.sum(data) {
            return Err(damaged("a record does not match its checksum"));
        }
        Ok(())
    }
}

impl StreamTrailer {
    /// The trailer of a stream of so many records and bytes of data, of whose bytes `digest` is the SHA-256.
    pub fn new(records: u64, data: u64, digest: Digest) -> StreamTrailer {
        let mut trailer = StreamTrailer {
            magic: TRAILER_MAGIC,
            records: U64::new(records),
            data: U64::new(data),
            digest: digest.0,
            reserved: U32::new(0),
            crc: U32::new(0),
        };
        trailer.crc = U32::new(sum(trailer.as_bytes()));
        trailer
    }
    /// Does a trailer begin here, and not a record?
    pub fn begins(bytes: &[u8]) -> bool {
        bytes.starts_with(&TRAILER_MAGIC)
    }
    /// Decodes a trailer, which must be exactly `wanted`.
    pub fn check(bytes: &[u8], wanted: &StreamTrailer) -> Result<()> {
        match bytes == wanted.as_bytes() {
            true => Ok(()),
            false => Err(damaged("its trailer does not match what came before")),
        }
    }
}

/// An error about bytes behind the end of a stream.
pub fn appended() -> Error {
    damaged("something follows its end")
}

/// An error about bytes past the end of the state that are not zeros.
pub fn past_the_end() -> Error {
    damaged("it has data past the end of the image")
}
