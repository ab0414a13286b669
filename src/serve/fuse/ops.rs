//! What each request does, however it came ([`Message`]). Malformed requests are answered with an error like any other: lengths are
//! checked before anything is looked at.
//!
//! Two decisions about what the kernel may remember:
//! - **names: nothing.** A name is looked up when a device is attached, which is rare; a removed one must not be
//!   found, and an added one must be, without a message to the kernel that could be lost with the server.
//! - **attributes: for a day**, and they are called back when a size changes. The loop driver asks for the inode of
//!   its backing file whenever somebody lists loop devices; while no server answers (between a crash and
//!   the takeover) that must not hang.

use super::{
    abi::{self, op},
    session::MAX_DATA,
};
use crate::{
    disk::{Disk, Extent, Source},
    error::{Error, Kind, Result},
    serve::{
        files::{FIRST_INO, Files, Op, ServedFile},
        limit::LogLimit,
        waiting::{Waiting, What, Write},
    },
};
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How long the kernel may remember attributes, in seconds.
const ATTR_VALID: u64 = 24 * 3600;
/// Block size told to programs.
const BLKSIZE: u32 = 4096;
/// The longest read that is begun before it is served: longer ones ask the disk for all of it at once anyway.
const SHORT: u32 = 32 << 10;
/// First look of LSEEK, in bytes; it doubles up to [`SEEK_MAX`], so that a seek over a large empty disk takes
/// few steps and one into data costs little.
const SEEK_FIRST: u64 = 256 << 10;
const SEEK_MAX: u64 = 1 << 30;

/// A request and the room for its answer, whichever way it came. What came and the room may be the same place.
pub(super) trait Message {
    /// The fixed part of the request, after its header; what follows may be in it too.
    fn fixed(&self) -> &[u8];
    /// What came after a fixed part of so many bytes: a name, the data of a WRITE.
    fn rest(&self, fixed: usize) -> &[u8];
    /// [`MAX_DATA`] bytes for the body of the answer.
    fn room(&mut self) -> &mut [u8];
}

/// An answer: its body is in the room.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    /// 0, or an `errno`, negative.
    pub(super) error: i32,
    /// Length of the body.
    pub(super) len: usize,
    /// Something is left to be done: [`Service::finish`] is to be called with this, after the answer went.
    pub(super) left: Option<Left>,
}

/// What a request has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    /// Number of the file.
    ino: u64,
    /// Is its disk to be tidied, too?
    disk: bool,
}

impl Reply {
    /// Done, and nothing to tell.
    pub(super) const DONE: Reply = Reply {
        error: 0,
        len: 0,
        left: None,
    };
    /// Failed with `errno`.
    pub(super) fn failed(errno: i32) -> Reply {
        Reply {
            error: -errno,
            ..Reply::DONE
        }
    }
}

/// Is this a request to read no more than what is worth to be begun before it is served?
pub(super) fn is_short_read(request: &[u8]) -> bool {
    let Ok((header, fixed)) = abi::InHeader::read_from_prefix(request) else {
        return false;
    };
    let short = |(arg, _): (abi::IoIn, _)| arg.size <= SHORT;
    header.opcode == op::READ
        && header.len as usize == request.len()
        && abi::IoIn::read_from_prefix(fixed).is_ok_and(short)
}

/// What requests are served from, by whatever transport they come.
pub(super) struct Service {
    files: Arc<Files>,
    /// Where writes are put aside that wait for room; over rings there is none, and they get the error.
    waiting: Option<Arc<Waiting>>,
    owner: (u32, u32),
    log: LogLimit,
}

impl Service {
    pub(super) fn new(files: Arc<Files>, waiting: Option<Arc<Waiting>>) -> Service {
        Service {
            files,
            waiting,
            owner: (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
            log: LogLimit::default(),
        }
    }
    /// May one more failure be logged now?
    pub(super) fn may_log(&self) -> bool {
        self.log.allow()
    }
    /// Does what a request has left.
    pub(super) fn finish(&self, left: Left) {
        let Some(file) = self.files.get(left.ino) else {
            return;
        };
        file.look();
        if left.disk {
            file.tidy();
        }
    }
    /// Begins a [short read](is_short_read), and does not wait for its data; `false` if there is nothing to wait for.
    pub(super) fn begin_read(&self, request: &[u8]) -> bool {
        let Ok((header, fixed)) = abi::InHeader::read_from_prefix(request) else {
            return false;
        };
        let Ok((arg, _)) = abi::IoIn::read_from_prefix(fixed) else {
            return false;
        };
        let file = self.files.get(header.nodeid);
        let disk = file.as_ref().and_then(|file| file.disk());
        disk.is_some_and(|disk| disk.begin_read(arg.offset, arg.size.into()))
    }
    /// Serves one request; `None` if no answer is expected.
    pub(super) fn serve(&self, header: &abi::InHeader, message: &mut dyn Message) -> Option<Reply> {
        let request = Request {
            service: self,
            header,
            message,
        };
        match request.dispatch() {
            Ok(Answer::Silence) => None,
            Ok(Answer::Body(len)) => Some(Reply { len, ..Reply::DONE }),
            Ok(Answer::Left { len, disk }) => Some(Reply {
                len,
                left: Some(Left {
                    ino: header.nodeid,
                    disk,
                }),
                ..Reply::DONE
            }),
            Err(errno) => Some(Reply::failed(errno)),
        }
    }
}

/// How a request ends.
enum Answer {
    /// No answer is expected.
    Silence,
    /// Done, with so many bytes in the room.
    Body(usize),
    /// The same; something is left to be done for the file, and for its disk.
    Left { len: usize, disk: bool },
}

/// An `errno`, or an answer.
type Outcome = std::result::Result<Answer, i32>;

const DONE: Outcome = Ok(Answer::Body(0));

struct Request<'a> {
    service: &'a Service,
    header: &'a abi::InHeader,
    message: &'a mut dyn Message,
}

impl Request<'_> {
    fn dispatch(mut self) -> Outcome {
        match self.header.opcode {
            op::READ => self.read(),
            op::WRITE => self.write(),
            op::FSYNC => self.fsync(),
            op::FALLOCATE => self.fallocate(),
            op::LSEEK => self.lseek(),
            op::LOOKUP => self.lookup(),
            op::GETATTR => self.getattr(),
            op::SETATTR => self.setattr(),
            op::OPEN => self.open(),
            op::RELEASE => {
                if let Some(file) = self.service.files.get(self.header.nodeid) {
                    file.closed();
                }
                DONE
            }
            // Numbers are never used again, so it does not matter what the kernel still knows.
            op::FORGET | op::BATCH_FORGET => Ok(Answer::Silence),
            op::OPENDIR => self.body(&abi::OpenOut::default()),
            op::READDIR => self.readdir(),
            op::STATFS => self.statfs(),
            op::FLUSH | op::RELEASEDIR | op::FSYNCDIR | op::DESTROY => DONE,
            op::IOCTL => Err(libc::ENOTTY),
            // ENOSYS: the kernel does not ask again. For INTERRUPT it means that requests cannot be
            // interrupted: each ends by itself.
            op::GETXATTR | op::LISTXATTR | op::ACCESS | op::INTERRUPT => Err(libc::ENOSYS),
            // A second greeting.
            op::INIT => Err(libc::EIO),
            _ => Err(libc::ENOSYS),
        }
    }

    /// The fixed part of the request, after the header.
    fn arg<T: FromBytes>(&self) -> std::result::Result<T, i32> {
        T::read_from_prefix(self.message.fixed())
            .map(|(arg, _)| arg)
            .map_err(|_| libc::EINVAL)
    }

    fn body<T: IntoBytes + Immutable>(&mut self, body: &T) -> Outcome {
        let bytes = body.as_bytes();
        self.message.room()[..bytes.len()].copy_from_slice(bytes);
        Ok(Answer::Body(bytes.len()))
    }

    /// The file the request is about.
    fn file(&self) -> std::result::Result<Arc<ServedFile>, i32> {
        match self.header.nodeid {
            abi::ROOT_INO => Err(libc::EISDIR),
            ino => self.service.files.get(ino).ok_or(libc::ESTALE),
        }
    }

    /// Turns the result of a disk request into an `errno`, and tells the log once what happened.
    fn result<R>(
        &self,
        file: &ServedFile,
        what: &str,
        at: u64,
        len: u64,
        result: Option<Result<R>>,
    ) -> std::result::Result<R, i32> {
        let e: Error = match result {
            Some(Ok(value)) => return Ok(value),
            Some(Err(e)) => e,
            None => return Err(libc::ESTALE),
        };
        if self.service.log.allow() {
            tracing::error!(disk = file.name(), at, len, "{what} failed: {e}");
        }
        Err(e.errno())
    }

    fn read(&mut self) -> Outcome {
        let arg: abi::IoIn = self.arg()?;
        let file = self.file()?;
        let want = (arg.size as usize).min(MAX_DATA) as u64;
        let room = self.message.room();
        let mut len = 0;
        let result = file.request(Op::Read(want), |disk| {
            len = want.min(disk.size().saturating_sub(arg.offset)) as usize;
            if len == 0 {
                Ok(())
            } else {
                disk.read(&mut room[..len], arg.offset)
            }
        });
        self.result(&file, "read", arg.offset, want, result)?;
        match file.is_look_due() {
            true => Ok(Answer::Left { len, disk: false }),
            false => Ok(Answer::Body(len)),
        }
    }

    fn write(&mut self) -> Outcome {
        let arg: abi::IoIn = self.arg()?;
        let file = self.file()?;
        let data = self.message.rest(size_of::<abi::IoIn>());
        if arg.size as usize > data.len().min(MAX_DATA) {
            return Err(libc::EINVAL);
        }
        let want = u64::from(arg.size);
        let mut len = 0;
        let (mut waits, mut left) = (false, false);
        let result = file.request(Op::Write(want), |disk| {
            if disk.read_only() {
                return Err(Error::new(Kind::ReadOnly, "the disk can only be read"));
            }
            len = want.min(disk.size().saturating_sub(arg.offset)) as usize;
            if len == 0 {
                return Ok(());
            }
            let data = &data[..len];
            match (disk.write(data, arg.offset), &self.service.waiting) {
                (Err(e), Some(waiting)) if e.waits() => {
                    let header = self.header;
                    waits = waiting.put_aside(Write {
                        unique: header.unique,
                        ino: header.nodeid,
                        at: arg.offset,
                        what: What::Data(data.to_vec()),
                        done: 0,
                        durable: false,
                    });
                    if waits { Ok(()) } else { Err(e) }
                }
                (done, _) => {
                    left = disk.is_filling();
                    done
                }
            }
        });
        self.result(&file, "write", arg.offset, want, result)?;
        if waits {
            return Ok(Answer::Silence);
        }
        if len == 0 && want > 0 {
            // As a block device does behind its end.
            return Err(libc::ENOSPC);
        }
        let body = abi::WriteOut {
            size: len as u32,
            padding: 0,
        };
        match self.body(&body)? {
            Answer::Body(len) if left || file.is_look_due() => Ok(Answer::Left { len, disk: left }),
            answer => Ok(answer),
        }
    }

    fn fsync(&mut self) -> Outcome {
        let file = self.file()?;
        let result = file.request(Op::Flush, |disk| disk.flush_first());
        self.result(&file, "flush", 0, 0, result)?;
        Ok(Answer::Left { len: 0, disk: true })
    }

    fn fallocate(&mut self) -> Outcome {
        use abi::falloc::{KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE};
        const PUNCH: u32 = PUNCH_HOLE | KEEP_SIZE;
        const ZERO: u32 = ZERO_RANGE | KEEP_SIZE;
        let arg: abi::FallocateIn = self.arg()?;
        let file = self.file()?;
        let (size, read_only) = file
            .disk()
            .map(|d| (d.size(), d.read_only()))
            .ok_or(libc::ESTALE)?;
        if read_only {
            return Err(libc::EROFS);
        }
        if arg.length == 0 {
            return Err(libc::EINVAL);
        }
        let end = arg.offset.checked_add(arg.length).ok_or(libc::EFBIG)?;
        let (at, len) = (arg.offset, end.min(size).saturating_sub(arg.offset));
        let (what, discard) = match arg.mode {
            PUNCH => ("discard", true),
            ZERO => ("write zeroes", false),
            ZERO_RANGE if end <= size => ("write zeroes", false),
            // Space is found when it is written to: a promise for later would be a lie, but programs
            // take a refusal worse.
            KEEP_SIZE => return DONE,
            0 if end <= size => return DONE,
            0 | ZERO_RANGE => return Err(libc::EPERM),
            _ => return Err(libc::EOPNOTSUPP),
        };
        if len == 0 {
            return DONE;
        }
        // It never waits for room: the kernel lets no flush and no other discard of the file pass until it is answered.
        let mut left = false;
        let result = file.request(Op::Discard(len), |disk| {
            let done = match discard {
                true => disk.discard(at, len),
                false => disk.write_zeroes(at, len),
            };
            left = disk.is_filling();
            done
        });
        self.result(&file, what, at, len, result)?;
        match left {
            true => Ok(Answer::Left { len: 0, disk: true }),
            false => DONE,
        }
    }

    fn lseek(&mut self) -> Outcome {
        let arg: abi::LseekIn = self.arg()?;
        let want_data = match arg.whence {
            abi::SEEK_DATA => true,
            abi::SEEK_HOLE => false,
            _ => return Err(libc::EINVAL),
        };
        let file = self.file()?;
        let result = file.request(Op::Seek, |disk| seek(disk, arg.offset, want_data));
        match self.result(&file, "seek", arg.offset, 0, result)? {
            Some(offset) => self.body(&abi::LseekOut { offset }),
            None => Err(libc::ENXIO),
        }
    }

    fn lookup(&mut self) -> Outcome {
        if self.header.nodeid != abi::ROOT_INO {
            return Err(libc::ENOTDIR);
        }
        let body = self.message.rest(0);
        let end = body.iter().position(|&c| c == 0).ok_or(libc::EINVAL)?;
        let name = std::str::from_utf8(&body[..end]).map_err(|_| libc::ENOENT)?;
        let file = self.service.files.lookup(name).ok_or(libc::ENOENT)?;
        let attr = self.attr_of(&file).ok_or(libc::ENOENT)?;
        let entry = abi::EntryOut {
            nodeid: file.ino(),
            attr_valid: ATTR_VALID,
            attr,
            ..Default::default()
        };
        self.body(&entry)
    }

    fn attr_of(&self, file: &ServedFile) -> Option<abi::Attr> {
        let (size, allocated, read_only) = file
            .disk()
            .map(|d| (d.size(), d.allocated(), d.read_only()))?;
        Some(abi::Attr {
            ino: file.ino(),
            size,
            // What is the disk's own, so that `du` does not count the base once for each disk. Never as much as a full file
            // has: programs that copy (cp, tar) look for holes only where this number says that there are some.
            // Never nothing: then tar would take the file for empty.
            blocks: (allocated / 512).min((size / 512).saturating_sub(8)).max(1),
            atime: file.since(),
            mtime: file.since(),
            ctime: file.since(),
            mode: libc::S_IFREG | if read_only { 0o400 } else { 0o600 },
            nlink: 1,
            uid: self.service.owner.0,
            gid: self.service.owner.1,
            blksize: BLKSIZE,
            ..Default::default()
        })
    }

    fn attr(&self) -> std::result::Result<abi::Attr, i32> {
        if self.header.nodeid != abi::ROOT_INO {
            return self.attr_of(&*self.file()?).ok_or(libc::ESTALE);
        }
        Ok(abi::Attr {
            ino: abi::ROOT_INO,
            mode: libc::S_IFDIR | 0o700,
            nlink: 2,
            uid: self.service.owner.0,
            gid: self.service.owner.1,
            blksize: BLKSIZE,
            ..Default::default()
        })
    }

    fn getattr(&mut self) -> Outcome {
        let attr = self.attr()?;
        self.body(&abi::AttrOut {
            attr_valid: ATTR_VALID,
            attr,
            ..Default::default()
        })
    }

    /// Times, mode and owner are not ours to keep: asking for them is no error. The size is fixed.
    fn setattr(&mut self) -> Outcome {
        let arg: abi::SetattrIn = self.arg()?;
        let attr = self.attr()?;
        if arg.valid & abi::fattr::SIZE != 0 && arg.size != attr.size {
            return Err(libc::EPERM);
        }
        self.body(&abi::AttrOut {
            attr_valid: ATTR_VALID,
            attr,
            ..Default::default()
        })
    }

    fn open(&mut self) -> Outcome {
        let arg: abi::OpenIn = self.arg()?;
        let file = self.file()?;
        let read_only = file.disk().map(|d| d.read_only()).ok_or(libc::ESTALE)?;
        // The kernel would write to the backing file itself: never, whatever the disk in its place says.
        let backing = file.backing();
        if (read_only || backing.is_some()) && arg.flags as i32 & libc::O_ACCMODE != libc::O_RDONLY
        {
            return Err(libc::EROFS);
        }
        file.opened();
        use abi::fopen::{DIRECT_IO, NOFLUSH, PARALLEL_DIRECT_WRITES, PASSTHROUGH};
        self.body(&abi::OpenOut {
            fh: file.ino(),
            open_flags: match backing {
                None => DIRECT_IO | PARALLEL_DIRECT_WRITES | NOFLUSH,
                Some(_) => PASSTHROUGH | NOFLUSH,
            },
            backing_id: backing.map_or(0, |id| id as i32),
        })
    }

    /// Positions are numbers of files, so that adding and removing between two calls loses and repeats
    /// nothing else.
    fn readdir(&mut self) -> Outcome {
        let arg: abi::IoIn = self.arg()?;
        if self.header.nodeid != abi::ROOT_INO {
            return Err(libc::ENOTDIR);
        }
        let room = (arg.size as usize).min(MAX_DATA);
        let mut used = 0;
        let mut put = |data: &mut [u8], ino: u64, off: u64, kind: u32, name: &[u8]| {
            let head = abi::Dirent {
                ino,
                off,
                namelen: name.len() as u32,
                kind,
            };
            let total = (size_of::<abi::Dirent>() + name.len()).next_multiple_of(8);
            if used + total > room {
                return false;
            }
            let entry = &mut data[used..used + total];
            entry.fill(0);
            let (start, rest) = entry.split_at_mut(size_of::<abi::Dirent>());
            start.copy_from_slice(head.as_bytes());
            rest[..name.len()].copy_from_slice(name);
            used += total;
            true
        };
        let data = self.message.room();
        let dir = u32::from(libc::DT_DIR);
        let mut at = arg.offset;
        for (position, name) in [(1, &b"."[..]), (2, b"..")] {
            if at < position && put(data, abi::ROOT_INO, position, dir, name) {
                at = position;
            }
        }
        at = at.max(2);
        while let Some(file) = self.service.files.after(at.max(FIRST_INO - 1)) {
            at = file.ino();
            if !put(
                data,
                at,
                at,
                u32::from(libc::DT_REG),
                file.name().as_bytes(),
            ) {
                break;
            }
        }
        Ok(Answer::Body(used))
    }

    fn statfs(&mut self) -> Outcome {
        let (files, bytes) = self.service.files.extent();
        self.body(&abi::StatfsOut {
            blocks: bytes / u64::from(BLKSIZE),
            files,
            bsize: BLKSIZE,
            frsize: BLKSIZE,
            namelen: crate::serve::files::NAME_MAX as u32,
            ..Default::default()
        })
    }
}

/// The first byte from `at` on that is data (or not); the end of the disk counts as a hole.
fn seek(disk: &dyn Disk, at: u64, want_data: bool) -> Result<Option<u64>> {
    let size = disk.size();
    if at >= size {
        return Ok(None);
    }
    let (mut from, mut step) = (at, SEEK_FIRST);
    while from < size {
        let len = step.min(size - from);
        for Extent {
            at: start,
            len,
            from: source,
        } in disk.extents(from, len)?
        {
            let is_data = match source {
                Source::Absent | Source::Zero { .. } | Source::Hole => false,
                Source::Layer { .. } | Source::Base => true,
            };
            if is_data == want_data && start + len > at {
                return Ok((start.max(at) < size).then_some(start.max(at)));
            }
        }
        from += len;
        step = (step * 2).min(SEEK_MAX);
    }
    Ok(if want_data { None } else { Some(size) })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use zerocopy::FromZeros;

    /// A request to read so many bytes.
    pub(crate) fn read_of(size: u32) -> Vec<u8> {
        let header = abi::InHeader {
            len: (abi::IN_HEADER + size_of::<abi::IoIn>()) as u32,
            opcode: op::READ,
            ..abi::InHeader::new_zeroed()
        };
        let arg = abi::IoIn {
            size,
            ..abi::IoIn::new_zeroed()
        };
        [header.as_bytes(), arg.as_bytes()].concat()
    }

    #[test]
    fn short_reads_are_told() {
        assert!(is_short_read(&read_of(SHORT)) && !is_short_read(&read_of(SHORT + 1)));
        let read = read_of(4096);
        assert!(!is_short_read(&read[..read.len() - 1]) && !is_short_read(&[]));
        let mut write = read;
        write[4..8].copy_from_slice(&op::WRITE.to_ne_bytes());
        assert!(!is_short_read(&write));
    }
}
