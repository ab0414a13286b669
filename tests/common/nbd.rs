//! A client of NBD that can also say what none should.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DONT_FRAGMENT: u16 = 4;
pub const FAST_ZERO: u16 = 16;
pub const ONE: u16 = 8;

pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const GO: u32 = 7;
pub const STRUCTURED: u32 = 8;
pub const SET_CONTEXT: u32 = 10;

/// The answer to a request: an error number, or data, and for BLOCK_STATUS lengths and states.
pub type Answer = Result<Vec<u8>, u32>;

/// A connection.
pub struct Nbd {
    pub stream: UnixStream,
    pub structured: bool,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
    /// Places and lengths of the READs under way.
    reads: BTreeMap<u64, (u64, usize)>,
}

fn bytes<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn many(stream: &mut UnixStream, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

/// A string with its length before it.
pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The first words.
pub fn greet(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let hello: [u8; 18] = bytes(&mut stream)?;
    assert_eq!(hello[..16], *b"NBDMAGICIHAVEOPT");
    assert_eq!(hello[16..], [0, 3]);
    stream.write_all(&3u32.to_be_bytes())?;
    Ok(stream)
}

pub fn ask(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let mut said = OPTION_MAGIC.to_be_bytes().to_vec();
    said.extend_from_slice(&option.to_be_bytes());
    said.extend_from_slice(&(data.len() as u32).to_be_bytes());
    said.extend_from_slice(data);
    stream.write_all(&said)
}

/// Kind and data of an answer to an option.
pub fn hear(stream: &mut UnixStream, option: u32) -> io::Result<(u32, Vec<u8>)> {
    let head: [u8; 20] = bytes(stream)?;
    assert_eq!(number(&head[..8]), 0x0003_e889_0455_65a9);
    assert_eq!(number(&head[8..12]), u64::from(option));
    let data = many(stream, number(&head[16..20]) as usize)?;
    Ok((number(&head[12..16]) as u32, data))
}

/// Asks for an export, and for what is told of it; the kind of the answer if that is no.
pub fn go(stream: &mut UnixStream, name: &str) -> io::Result<Result<(u64, u16), u32>> {
    let mut data = string(name);
    data.extend_from_slice(&[0, 0]);
    ask(stream, GO, &data)?;
    let mut found = None;
    loop {
        match hear(stream, GO)? {
            (3, data) if data[..2] == [0, 0] => {
                found = Some((number(&data[2..10]), number(&data[10..12]) as u16));
            }
            (3, _) => {}
            (1, _) => return Ok(Ok(found.expect("an export is told of"))),
            (kind, _) => return Ok(Err(kind)),
        }
    }
}

impl Nbd {
    /// Connects, with structured replies and `base:allocation` or without.
    pub fn connect(socket: &Path, name: &str, structured: bool) -> io::Result<Nbd> {
        let mut stream = greet(socket)?;
        if structured {
            ask(&mut stream, STRUCTURED, b"")?;
            assert_eq!(hear(&mut stream, STRUCTURED)?.0, 1);
            let mut data = string(name);
            data.extend_from_slice(&1u32.to_be_bytes());
            data.extend(string("base:allocation"));
            ask(&mut stream, SET_CONTEXT, &data)?;
            loop {
                match hear(&mut stream, SET_CONTEXT)?.0 {
                    4 => {}
                    1 => break,
                    kind => return Err(io::Error::other(format!("{kind:#x}"))),
                }
            }
        }
        match go(&mut stream, name)? {
            Ok((size, flags)) => Ok(Nbd {
                stream,
                structured,
                size,
                flags,
                cookie: 0,
                reads: BTreeMap::new(),
            }),
            Err(kind) => Err(io::Error::other(format!("{kind:#x}"))),
        }
    }
    /// Sends a request, and returns what its answer will be known by.
    pub fn send(
        &mut self,
        command: u16,
        flags: u16,
        at: u64,
        len: usize,
        data: &[u8],
    ) -> io::Result<u64> {
        self.cookie += 1;
        let mut said = 0x2560_9513u32.to_be_bytes().to_vec();
        said.extend_from_slice(&flags.to_be_bytes());
        said.extend_from_slice(&command.to_be_bytes());
        said.extend_from_slice(&self.cookie.to_be_bytes());
        said.extend_from_slice(&at.to_be_bytes());
        said.extend_from_slice(&(len as u32).to_be_bytes());
        said.extend_from_slice(data);
        if command == READ {
            self.reads.insert(self.cookie, (at, len));
        }
        self.stream.write_all(&said)?;
        Ok(self.cookie)
    }
    /// The next answer, whichever request it belongs to.
    pub fn receive(&mut self) -> io::Result<(u64, Answer)> {
        let mut parts: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        loop {
            let magic = number(&bytes::<4>(&mut self.stream)?);
            if magic == 0x6744_6698 {
                let rest: [u8; 12] = bytes(&mut self.stream)?;
                let (error, cookie) = (number(&rest[..4]) as u32, number(&rest[4..]));
                let data = match self.reads.remove(&cookie) {
                    Some((_, len)) if error == 0 => {
                        assert!(!self.structured, "a READ has a structured answer");
                        many(&mut self.stream, len)?
                    }
                    _ => Vec::new(),
                };
                let answer = if error == 0 { Ok(data) } else { Err(error) };
                return Ok((cookie, answer));
            }
            assert_eq!(magic, 0x668e_33ef, "the answer begins like one");
            assert!(self.structured);
            let head: [u8; 16] = bytes(&mut self.stream)?;
            let (done, kind) = (head[1] & 1 == 1, number(&head[2..4]));
            let (cookie, len) = (number(&head[4..12]), number(&head[12..16]));
            let body = many(&mut self.stream, len as usize)?;
            match kind {
                1 => {
                    let (at, len) = self.reads[&cookie];
                    let whole = parts.entry(cookie).or_insert_with(|| vec![0; len]);
                    let start = (number(&body[..8]) - at) as usize;
                    whole[start..start + body.len() - 8].copy_from_slice(&body[8..]);
                    if done {
                        self.reads.remove(&cookie);
                        return Ok((cookie, Ok(parts.remove(&cookie).unwrap())));
                    }
                }
                5 => {
                    assert!(done && number(&body[..4]) == 1);
                    return Ok((cookie, Ok(body[4..].to_vec())));
                }
                0x8001 => {
                    assert!(done);
                    self.reads.remove(&cookie);
                    return Ok((cookie, Err(number(&body[..4]) as u32)));
                }
                kind => panic!("a chunk of kind {kind}"),
            }
        }
    }
    /// One request and its answer.
    pub fn call(
        &mut self,
        command: u16,
        flags: u16,
        at: u64,
        len: usize,
        data: &[u8],
    ) -> io::Result<Answer> {
        let cookie = self.send(command, flags, at, len, data)?;
        let (of, answer) = self.receive()?;
        assert_eq!(of, cookie);
        Ok(answer)
    }
    pub fn read(&mut self, at: u64, len: usize) -> Answer {
        self.call(READ, 0, at, len, b"").unwrap()
    }
    pub fn write(&mut self, at: u64, data: &[u8]) -> Answer {
        self.call(WRITE, 0, at, data.len(), data).unwrap()
    }
    pub fn flush(&mut self) -> Answer {
        self.call(FLUSH, 0, 0, 0, b"").unwrap()
    }
    /// Lengths of a range's stretches; true: zeros.
    pub fn status(&mut self, flags: u16, at: u64, len: usize) -> Result<Vec<(u32, bool)>, u32> {
        let answer = self.call(BLOCK_STATUS, flags, at, len, b"").unwrap()?;
        let stretch = |s: &[u8]| (number(&s[..4]) as u32, number(&s[4..]) == 3);
        Ok(answer.chunks(8).map(stretch).collect())
    }
}
