//! What a client sent, as far as nobody has looked at it.

use std::{
    io::{self, ErrorKind, Read},
    os::unix::net::UnixStream,
    sync::Arc,
};
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// So much is asked for at once: many small requests with one call.
const LEN: usize = 64 << 10;

/// A stream with what was read from it ahead.
pub(super) struct Input {
    stream: Arc<UnixStream>,
    ahead: Box<[u8]>,
    start: usize,
    end: usize,
    /// Nothing is read any more, although something may be there.
    pub over: bool,
}

fn gone() -> io::Error {
    ErrorKind::UnexpectedEof.into()
}

impl Input {
    pub(super) fn new(stream: Arc<UnixStream>) -> Input {
        Input {
            stream,
            ahead: vec![0; LEN].into_boxed_slice(),
            start: 0,
            end: 0,
            over: false,
        }
    }
    /// Bytes that are here already.
    pub(super) fn ahead(&self) -> usize {
        self.end - self.start
    }
    /// The next structure, which is small.
    pub(super) fn next<T: FromBytes + KnownLayout + Immutable>(&mut self) -> io::Result<T> {
        let len = size_of::<T>();
        if self.ahead() < len {
            self.ahead.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.ahead());
            while self.end < len {
                self.end += some(&self.stream, &mut self.ahead[self.end..])?;
            }
        }
        let bytes = &self.ahead[self.start..self.start + len];
        self.start += len;
        T::read_from_bytes(bytes).map_err(|_| ErrorKind::InvalidData.into())
    }
    /// The next bytes, as many as there is room for. Where they are not here yet, they are read right there.
    pub(super) fn fill(&mut self, room: &mut [u8]) -> io::Result<()> {
        let here = self.ahead().min(room.len());
        let (first, mut rest) = room.split_at_mut(here);
        first.copy_from_slice(&self.ahead[self.start..self.start + here]);
        self.start += here;
        while !rest.is_empty() {
            let n = some(&self.stream, rest)?;
            rest = &mut rest[n..];
        }
        Ok(())
    }
}

/// Some bytes, at least one.
fn some(mut stream: &UnixStream, room: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(room) {
            Ok(0) => return Err(gone()),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
