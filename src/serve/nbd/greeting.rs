//! What is said before the transmission: which export the client wants, and how.
//!
//! Always true: a client that asks for what there is not gets an error and may go on asking; one that does not speak the protocol is
//! left without an answer.

use super::{
    Exports,
    input::Input,
    link::{Out, Shape},
    wire::{self, OptionHead, OptionReply, export, greeting, info, option, reply},
};
use crate::serve::files::ServedFile;
use std::{
    io::{self, ErrorKind},
    sync::Arc,
};
use zerocopy::{IntoBytes, byteorder::big_endian::U32};

/// Longest data of an option: two names of the longest kind, and some.
const MAX_OPTION: usize = 64 << 10;
/// What comes after the old kind of answer to EXPORT_NAME.
const ZEROES: usize = 124;
/// The sizes of requests that are told to a client: any, best whole blocks, and as much as a client may send that did not ask.
const BLOCK_SIZES: [u32; 3] = [1, 4096, super::link::MOST as u32];
/// The one context there is, and its number.
pub(super) const ALLOCATION: &str = "base:allocation";
pub(super) const ALLOCATION_ID: u32 = 1;

/// What a client wants to use.
pub(super) struct Chosen {
    pub file: Arc<ServedFile>,
    pub shape: Shape,
}

fn wrong() -> io::Error {
    ErrorKind::InvalidData.into()
}

/// Reads what stands in the data of an option.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(now)
    }
    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }
    /// A string with its length before it.
    fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()?;
        std::str::from_utf8(self.bytes(len as usize)?).ok()
    }
    /// It was all.
    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// How a client asks for contexts.
struct Contexts<'a> {
    export: &'a str,
    queries: Vec<&'a str>,
}

fn contexts(data: &[u8]) -> Option<Contexts<'_>> {
    let mut fields = Fields(data);
    let export = fields.string()?;
    let mut queries = Vec::new();
    for _ in 0..fields.u32()? {
        queries.push(fields.string()?);
    }
    fields.end()?;
    Some(Contexts { export, queries })
}

/// The export that is asked for, and what is to be told of it.
fn wanted(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let mut asked = Vec::new();
    for _ in 0..fields.u16()? {
        asked.push(fields.u16()?);
    }
    fields.end()?;
    Some((name, asked))
}

/// An export, its size, and what it can do.
type Found = (Arc<ServedFile>, u64, u16);

/// A conversation before the transmission.
pub(super) struct Greeting<'a> {
    pub exports: &'a Exports,
    pub input: &'a mut Input,
    pub out: &'a Out,
    /// Told what the client chose, before the client is told that it may use it; false: it may not any more.
    pub register: &'a dyn Fn(&ServedFile) -> io::Result<bool>,
}

impl Greeting<'_> {
    /// Answers until an export is chosen; `None`: the client leaves.
    pub(super) fn talk(&mut self) -> io::Result<Option<Chosen>> {
        let flags = greeting::FIXED_NEWSTYLE | greeting::NO_ZEROES;
        let mut hello = wire::MAGIC.to_be_bytes().to_vec();
        hello.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        hello.extend_from_slice(&flags.to_be_bytes());
        self.out.send(&hello)?;
        let said: U32 = self.input.next()?;
        if said.get() & !u32::from(flags) != 0 {
            return Err(wrong());
        }
        let zeroes = said.get() & u32::from(greeting::NO_ZEROES) == 0;
        let mut structured = false;
        // The export for which contexts were chosen.
        let mut allocation: Option<String> = None;
        loop {
            let head: OptionHead = self.input.next()?;
            let len = head.len.get() as usize;
            if head.magic.get() != wire::OPTION_MAGIC || len > MAX_OPTION {
                return Err(wrong());
            }
            let option = head.option.get();
            let mut data = vec![0; len];
            self.input.fill(&mut data)?;
            match option {
                option::EXPORT_NAME => {
                    let name = std::str::from_utf8(&data).map_err(|_| wrong())?;
                    // There is no other way to say no.
                    let found = self.choose(name, structured)?;
                    let (file, size, flags) = found.ok_or_else(wrong)?;
                    let mut told = size.to_be_bytes().to_vec();
                    told.extend_from_slice(&flags.to_be_bytes());
                    if zeroes {
                        told.resize(told.len() + ZEROES, 0);
                    }
                    self.out.send(&told)?;
                    return Ok(Some(Chosen {
                        file,
                        shape: Shape {
                            structured,
                            allocation: allocation.as_deref() == Some(name),
                        },
                    }));
                }
                option::ABORT => {
                    // It need not wait for the answer.
                    let _ = self.answer(option, reply::ACK, &[]);
                    return Ok(None);
                }
                option::LIST if len == 0 => {
                    for name in self.exports.names() {
                        let mut told = (name.len() as u32).to_be_bytes().to_vec();
                        told.extend_from_slice(name.as_bytes());
                        self.answer(option, reply::SERVER, &told)?;
                    }
                    self.answer(option, reply::ACK, &[])?;
                }
                option::STRUCTURED_REPLY if len == 0 => {
                    structured = true;
                    self.answer(option, reply::ACK, &[])?;
                }
                option::INFO | option::GO => {
                    let Some((name, asked)) = wanted(&data) else {
                        self.answer(option, reply::INVALID, b"malformed")?;
                        continue;
                    };
                    let found = match option {
                        option::GO => self.choose(name, structured)?,
                        _ => self.find(name, structured),
                    };
                    let Some((file, size, flags)) = found else {
                        self.unknown(option)?;
                        continue;
                    };
                    self.tell(option, name, size, flags, &asked)?;
                    self.answer(option, reply::ACK, &[])?;
                    if option == option::GO {
                        return Ok(Some(Chosen {
                            file,
                            shape: Shape {
                                structured,
                                allocation: allocation.as_deref() == Some(name),
                            },
                        }));
                    }
                }
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                    let set = option == option::SET_META_CONTEXT;
                    if set {
                        allocation = None;
                    }
                    let asked = contexts(&data).filter(|_| structured);
                    let Some(Contexts { export, queries }) = asked else {
                        self.answer(
                            option,
                            reply::INVALID,
                            b"malformed, or no structured replies",
                        )?;
                        continue;
                    };
                    if self.find(export, structured).is_none() {
                        self.unknown(option)?;
                        continue;
                    }
                    let named = queries.contains(&ALLOCATION);
                    let listed = !set && (queries.is_empty() || queries.contains(&"base:"));
                    if named || listed {
                        let mut told = if set { ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
                        told.extend_from_slice(ALLOCATION.as_bytes());
                        self.answer(option, reply::META_CONTEXT, &told)?;
                    }
                    if set && named {
                        allocation = Some(export.to_string());
                    }
                    self.answer(option, reply::ACK, &[])?;
                }
                option::LIST | option::STRUCTURED_REPLY => {
                    self.answer(option, reply::INVALID, b"no data belongs to this option")?;
                }
                _ => self.answer(option, reply::UNSUPPORTED, &[])?,
            }
        }
    }

    /// [`Greeting::find`], for a client that is to use it from here on.
    fn choose(&self, name: &str, structured: bool) -> io::Result<Option<Found>> {
        match self.find(name, structured) {
            // Only now nobody changes its size without knowing of the client.
            Some((file, ..)) if (self.register)(&file)? => Ok(self.find(name, structured)),
            _ => Ok(None),
        }
    }

    /// A disk that is shown, its size, and what it can do.
    fn find(&self, name: &str, structured: bool) -> Option<Found> {
        let file = self.exports.find(name)?;
        let (size, read_only) = file.disk().map(|disk| (disk.size(), disk.read_only()))?;
        // A flush makes durable what any connection was told is written.
        let mut flags = export::HAS_FLAGS
            | export::SEND_FLUSH
            | export::SEND_FUA
            | export::CAN_MULTI_CONN
            | export::SEND_CACHE;
        flags |= match read_only {
            true => export::READ_ONLY,
            false => export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO,
        };
        if structured {
            flags |= export::SEND_DF;
        }
        Some((file, size, flags))
    }

    fn tell(
        &self,
        option: u32,
        name: &str,
        size: u64,
        flags: u16,
        asked: &[u16],
    ) -> io::Result<()> {
        let mut told = info::EXPORT.to_be_bytes().to_vec();
        told.extend_from_slice(&size.to_be_bytes());
        told.extend_from_slice(&flags.to_be_bytes());
        self.answer(option, reply::INFO, &told)?;
        if asked.contains(&info::NAME) {
            let mut told = info::NAME.to_be_bytes().to_vec();
            told.extend_from_slice(name.as_bytes());
            self.answer(option, reply::INFO, &told)?;
        }
        if asked.contains(&info::BLOCK_SIZE) {
            let mut told = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for size in BLOCK_SIZES {
                told.extend_from_slice(&size.to_be_bytes());
            }
            self.answer(option, reply::INFO, &told)?;
        }
        Ok(())
    }

    fn unknown(&self, option: u32) -> io::Result<()> {
        let why = b"no disk of that name is attached with --via nbd";
        self.answer(option, reply::UNKNOWN, why)
    }

    fn answer(&self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let head = OptionReply {
            magic: wire::OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            len: (data.len() as u32).into(),
        };
        let mut told = head.as_bytes().to_vec();
        told.extend_from_slice(data);
        self.out.send(&told)
    }
}
