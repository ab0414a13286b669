//! A difference as a stream, in a file or to a reader; and telling a stream from a raw image.
//!
//! A file appears under its name whole, synced, or not at all, as that of a raw image does.

use super::raw::{NewFile, check_target};
use crate::{
    error::{Error, Kind, Result},
    format::stream::{Digest, STREAM_MAGIC, begins_like_stream},
    store::{Progress, State, StreamTotals, write_stream},
};
use std::{
    fs::File,
    io::{self, BufWriter, Read, Write},
    path::Path,
};

/// Bytes written at once.
const BUFFER: usize = 1 << 20;

/// Does a stream begin with these bytes, be it a damaged one?
pub fn is_stream(start: &[u8]) -> bool {
    begins_like_stream(start)
}

/// Does a file look like a stream? Whether it is there and can be read is for the import to say.
pub fn looks_like_stream(path: &Path) -> bool {
    let is_file = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
    let mut start = Vec::new();
    let beginning = |file: File| file.take(STREAM_MAGIC.len() as u64).read_to_end(&mut start);
    let read = is_file.then(|| File::open(path).and_then(beginning));
    read.is_some_and(|read| read.is_ok()) && is_stream(&start)
}

/// Writes a state, or what changed since another one with this digest, into a new file at `target`. Replaces a file that is there only if
/// `replace`.
pub fn export_file(
    state: &State,
    since: Option<(&State, Digest)>,
    known_as: Option<Digest>,
    target: &Path,
    replace: bool,
    progress: &dyn Progress,
) -> Result<StreamTotals> {
    let target = check_target(target, replace)?;
    let new = NewFile::beside(&target)?;
    let failed = |e: &io::Error| Error::io("write", &target, e);
    let mut out = BufWriter::with_capacity(BUFFER, &new.file);
    let totals = write_stream(
        state,
        since,
        known_as,
        &mut |bytes| out.write_all(bytes).map_err(|e| failed(&e)),
        progress,
    )?;
    out.flush().map_err(|e| failed(&e))?;
    drop(out);
    new.file
        .sync_all()
        .map_err(|e| Error::io("sync", &target, &e))?;
    new.name(&target, replace)?;
    Ok(totals)
}

/// Writes the same to `out`. The inner result tells of `out` failing, so that the caller can tell a reader that went away from a state
/// that cannot be read.
pub fn export_to(
    state: &State,
    since: Option<(&State, Digest)>,
    known_as: Option<Digest>,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<io::Result<StreamTotals>> {
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let mut failure = None;
    let mut put = |bytes: &[u8]| {
        out.write_all(bytes).map_err(|e| {
            failure = Some(e);
            Error::new(Kind::Io, "the output is closed")
        })
    };
    let written = write_stream(state, since, known_as, &mut put, progress);
    match (failure, written) {
        (Some(e), _) => Ok(Err(e)),
        (None, Err(e)) => Err(e),
        (None, Ok(totals)) => Ok(out.flush().map(|()| totals)),
    }
}
