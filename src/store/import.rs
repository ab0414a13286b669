//! Bases: bringing an image in, and opening one (FORMAT.md, section 2).

use super::names::{self, Extra, NameRecord, TEMPORARY, check_part, read_record};
use super::{Below, Content, ImportMode, ImportSource, Object, ObjectKind, Progress, Store};
use crate::base::{Base, data_blocks};
use crate::error::{Error, Kind, Result};
use crate::format::text::Record;
use crate::format::{self, SumsHeader, ZERO_SUM};
use crate::io::os::OsDir;
use crate::io::{Access, Dir, EntryKind, File};
use crate::units::{BLOCK, BLOCK_SIZE, Id, MAX_DISK, blocks};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zerocopy::IntoBytes;

/// Bytes copied in one go.
pub(super) const PIECE: usize = 1 << 20;

/// File whose lock is held while an import is under way.
pub(super) const RUNNING: &str = "running";

/// Images up to this length get a SHA-256 while they are copied. It covers holes as well, so that `sha256sum` agrees; for larger, mostly
/// empty images that would take longer than the copy.
pub(super) const DIGEST_MAX: u64 = 16 << 30;

/// What `bases/<id>/meta` says.
#[derive(Clone, Debug)]
pub struct BaseMeta {
    /// Its id.
    pub id: Id,
    /// Length of the image in bytes.
    pub len: u64,
    /// The name it was imported under; empty if it never had one.
    pub name: String,
    /// How it came in: `copy`, `reflink`, `link`.
    pub mode: String,
    /// `sha256:...`, where known.
    pub digest: Option<String>,
    /// For a linked base: the file, and what it looked like.
    pub link: Option<Link>,
    /// How many of its blocks hold data, where that was counted.
    pub data: Option<u64>,
    /// The digest by which the store that it was sent from knows it.
    pub known_as: Option<String>,
    /// Other bases: what was counted over these is true over this one, too.
    pub counts_as: Vec<Id>,
}

/// A file outside of the store, as it was when it was linked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Absolute path.
    pub path: PathBuf,
    /// Length, modification time in nanoseconds, inode, device.
    pub stamp: [u64; 4],
}

/// What tells whether a file was changed.
fn stamp(meta: &std::fs::Metadata) -> [u64; 4] {
    let mtime = (meta.mtime() as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(meta.mtime_nsec() as u64);
    [meta.len(), mtime, meta.ino(), meta.dev()]
}

impl BaseMeta {
    /// That of an image whose bytes were copied; the name it gets later.
    pub(super) fn copied(id: Id, len: u64, digest: Option<String>) -> BaseMeta {
        BaseMeta {
            id,
            len,
            name: String::new(),
            mode: "copy".to_string(),
            digest,
            link: None,
            data: None,
            known_as: None,
            counts_as: Vec::new(),
        }
    }
    pub(super) fn encode(&self, created: u64) -> Vec<u8> {
        let others: Vec<String> = self.counts_as.iter().map(Id::to_string).collect();
        let counts_as = (!others.is_empty()).then(|| others.join(" "));
        let mut record = Record::new()
            .with("id", self.id.to_string())
            .with("len", self.len.to_string())
            .with("mode", &self.mode)
            .with("name", &self.name)
            .with("created", created.to_string())
            .with_some("digest", self.digest.as_deref())
            .with_some("data", self.data.map(|n| n.to_string()))
            .with_some("known_as", self.known_as.as_deref())
            .with_some("counts_as", counts_as);
        if let Some(link) = &self.link {
            record = record.with("link", link.path.to_string_lossy());
            for (key, value) in ["size", "mtime", "inode", "device"]
                .into_iter()
                .zip(link.stamp)
            {
                record = record.with(key, value.to_string());
            }
        }
        record.encode()
    }
    fn decode(bytes: &[u8]) -> Result<BaseMeta> {
        let record = Record::decode(bytes)?;
        let id = Id::parse(record.need("id")?)
            .ok_or_else(|| Error::new(Kind::Corrupt, "`id` is no id"))?;
        let link = match record.get("link") {
            None => None,
            Some(path) => Some(Link {
                path: path.into(),
                stamp: [
                    record.number("size")?,
                    record.number("mtime")?,
                    record.number("inode")?,
                    record.number("device")?,
                ],
            }),
        };
        let len = record.number("len")?;
        if len == 0 || len > MAX_DISK {
            return Err(Error::new(Kind::Corrupt, "`len` is out of range"));
        }
        Ok(BaseMeta {
            id,
            len,
            name: record.get("name").unwrap_or_default().to_string(),
            mode: record.get("mode").unwrap_or_default().to_string(),
            digest: record.get("digest").map(String::from),
            link,
            // Whatever is there and is no count counts as if it were not there.
            data: record.number("data").ok().filter(|n| *n <= blocks(len)),
            known_as: record.get("known_as").map(String::from),
            counts_as: record
                .get("counts_as")
                .unwrap_or_default()
                .split(' ')
                .filter_map(Id::parse)
                .collect(),
        })
    }
}

impl Store {
    /// Reads the record of a base.
    pub fn base_meta(&self, id: Id) -> Result<BaseMeta> {
        let dir = self.bases.subdir(&id.to_string())?;
        let bytes = read_record(&*dir, "meta")?;
        let tag = |e: Error| {
            e.context(format!("the record of base {id} is damaged"))
                .path(dir.path().join("meta"))
        };
        let meta = BaseMeta::decode(&bytes).map_err(tag)?;
        if meta.id != id {
            return Err(tag(Error::new(Kind::Corrupt, "it belongs to another base")));
        }
        Ok(meta)
    }
    /// Is this a base that was made by flattening, and so never had a name?
    pub fn never_named(&self, id: Id) -> bool {
        self.base_meta(id).is_ok_and(|meta| meta.name.is_empty())
    }
    /// Was a base imported with checksums, and has none now? An image that was linked or reflinked has none before its first scrub.
    pub fn sums_are_lost(&self, id: Id) -> Result<bool> {
        let dir = self.bases.subdir(&id.to_string())?;
        Ok(dir.entry("sums")?.is_none() && self.base_meta(id)?.mode == "copy")
    }
    /// Fails if a linked image is not what it was when it was linked.
    pub fn check_link(&self, meta: &BaseMeta) -> Result<()> {
        match &meta.link {
            Some(link) => open_link(meta.id, link).map(|_| ()),
            None => Ok(()),
        }
    }
    /// Host bytes of a base's directory.
    pub(super) fn base_allocated(&self, id: Id) -> Result<u64> {
        allocated_in(&*self.bases.subdir(&id.to_string())?)
    }
    /// Fails with `Busy` if anyone has the base open.
    pub(super) fn base_idle(&self, id: Id) -> Result<()> {
        match self
            .bases
            .subdir(&id.to_string())
            .and_then(|d| d.open("meta", Access::Read))
        {
            // Not the image: a linked base has none here.
            Ok(meta) => meta.lock(true),
            // A damaged base may lack it, and then nobody can open it.
            Err(e) if e.kind() == Kind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
    /// Brings an image in under `name`. Nothing half-made stays if it fails.
    pub fn import(
        &self,
        source: ImportSource<'_>,
        name: &str,
        mode: ImportMode,
        progress: &dyn Progress,
    ) -> Result<Object> {
        self.bring_in(name, |dir, id| match source {
            ImportSource::Reader(_) if matches!(mode, ImportMode::Link | ImportMode::Reflink) => {
                Err(Error::new(Kind::Invalid, "a stream can only be copied")
                    .hint("leave --link and --reflink out"))
            }
            ImportSource::Content(_) if matches!(mode, ImportMode::Link | ImportMode::Reflink) => {
                Err(Error::new(
                    Kind::Invalid,
                    "an image of another format can only be copied",
                )
                .hint("leave --link and --reflink out"))
            }
            ImportSource::Reader(reader) => copy_stream(dir, id, reader, progress),
            ImportSource::Content(content) => copy_content(dir, id, content, progress),
            ImportSource::Path(path) => import_file(dir, id, path, mode, progress),
        })
    }
    /// Makes a base under `name` in a directory that `fill` fills.
    pub(super) fn bring_in(
        &self,
        name: &str,
        fill: impl FnOnce(&dyn Dir, Id) -> Result<BaseMeta>,
    ) -> Result<Object> {
        check_part(name)?;
        let taken = || {
            Error::new(Kind::Exists, format!("`{name}` exists already"))
                .hint("choose another name, or `forkdisk rm` the old one")
        };
        // Before hours of copying; the name is claimed at the end.
        if self.names.entry(name)?.is_some() {
            return Err(taken());
        }
        let id = (self.env.id)();
        let temporary = format!("{TEMPORARY}{id}");
        let (dir, running) = {
            // `gc` may not come in between: a locked file tells it that the import is under way.
            let _lock = self.lock(true)?;
            self.bases.create_dir(&temporary)?;
            let dir = self.bases.subdir(&temporary)?;
            let running = dir.open(RUNNING, Access::CreateNew)?;
            running.lock(true)?;
            (dir, running)
        };
        let mut named = false;
        let done = fill(&*dir, id)
            .and_then(|meta| self.write_meta(&*dir, meta, name))
            .and_then(|()| {
                let _lock = self.lock(true)?;
                if self.names.entry(name)?.is_some() {
                    return Err(taken());
                }
                // From here on the lock of the names keeps `gc` away.
                dir.remove(RUNNING)?;
                dir.sync()?;
                self.bases.rename_new(&temporary, &id.to_string())?;
                self.bases.sync()?;
                let record = NameRecord {
                    kind: ObjectKind::Base,
                    target: Below::Base(id),
                    created: (self.env.now)(),
                    message: None,
                    opened: false,
                    extra: Extra::default(),
                };
                let (staged, file) = names::stage(&*self.names, name, &record.encode(name))?;
                file.sync()?;
                self.names.rename_new(&staged, name)?;
                named = true;
                self.names.sync()?;
                self.object(name)
            });
        // A name must never refer to a base that is gone: where it is not certain that the name is, the base stays.
        let unnamed = || !named || (self.names.remove(name).is_ok() && self.names.sync().is_ok());
        if done.is_err() && unnamed() {
            for dir_name in [&temporary, &id.to_string()] {
                if let Ok(dir) = self.bases.subdir(dir_name) {
                    for file in ["meta", "sums", "image", RUNNING] {
                        let _ = dir.remove(file);
                    }
                    let _ = self.bases.remove_dir(dir_name);
                }
            }
        }
        drop(running);
        done
    }
    fn write_meta(&self, dir: &dyn Dir, mut meta: BaseMeta, name: &str) -> Result<()> {
        meta.name = name.to_string();
        let image = match &meta.link {
            None => dir.open("image", Access::Read)?,
            Some(link) => open_link(meta.id, link)?,
        };
        meta.data = Some(counted(&*image, meta.len)?);
        let file = dir.open("meta", Access::CreateNew)?;
        file.write_at(&meta.encode((self.env.now)()), 0)?;
        file.sync()
    }
    /// Is a directory of `bases/` that of an import under way?
    pub fn import_running(&self, temporary: &str) -> bool {
        let open = self
            .bases
            .subdir(temporary)
            .and_then(|dir| dir.open(RUNNING, Access::Read));
        open.is_ok_and(|file| file.lock(true).is_err_and(|e| e.kind() == Kind::Busy))
    }
}

/// Host bytes of the files in a directory.
pub(super) fn allocated_in(dir: &dyn Dir) -> Result<u64> {
    let mut bytes = 0;
    for (name, kind) in dir.list()? {
        if kind == EntryKind::File {
            bytes += dir.open(&name, Access::Read)?.allocated()?;
        }
    }
    Ok(bytes)
}

/// How many blocks of an image hold data.
pub(super) fn counted(image: &dyn File, len: u64) -> Result<u64> {
    let data = data_blocks(image, 0, len)?;
    Ok(data.iter().map(|(start, end)| end - start).sum())
}

/// Opens the image of a base, and its sums.
pub(super) fn open_base(store: &Store, meta: &BaseMeta) -> Result<Base> {
    let dir = store.bases.subdir(&meta.id.to_string())?;
    // As long as anyone has it open it is not removed.
    let held = loop {
        let held = dir.open("meta", Access::Read)?;
        held.lock(false)?;
        // Unless it was written anew just now.
        if dir.open("meta", Access::Read)?.number()? == held.number()? {
            break held;
        }
    };
    let image: Arc<dyn File> = match &meta.link {
        None => dir.open("image", Access::Read)?,
        Some(link) => open_link(meta.id, link)?,
    };
    let base = Base::open(meta.id, image, meta.len, open_sums(&*dir)?, held)?;
    Ok(base.with_counts(meta.data, meta.counts_as.clone()))
}

/// The checksums of a base, if it has them.
fn open_sums(dir: &dyn Dir) -> Result<Option<Arc<dyn File>>> {
    match dir.open("sums", Access::Read) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Checksums that `scrub` made since the base was opened are taken into use. Without them it goes on as before.
pub(super) fn refresh_sums(store: &Store, base: &Base) {
    if base.has_sums() {
        return;
    }
    let added = store
        .bases
        .subdir(&base.id().to_string())
        .and_then(|dir| open_sums(&*dir))
        .and_then(|sums| sums.map_or(Ok(()), |sums| base.add_sums(sums)));
    if let Err(e) = added {
        tracing::warn!(base = %base.id(), "its checksums cannot be used: {e}");
    }
}

/// Opens a linked image if it is what it was.
fn open_link(id: Id, link: &Link) -> Result<Arc<dyn File>> {
    let shown = link.path.display();
    let changed = |what: String| {
        Error::new(Kind::Corrupt, format!("base {id}: {what}"))
            .path(&link.path)
            .hint("put the original file back (same contents and modification time); disks over a changed base would be garbage")
    };
    let now = std::fs::metadata(&link.path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => changed(format!("the linked image {shown} is gone")),
        _ => Error::io("look at", &link.path, &e),
    })?;
    let found = stamp(&now);
    let names = ["size", "modification time", "inode", "device"];
    if let Some(i) = (0..3).find(|&i| found[i] != link.stamp[i]) {
        return Err(changed(format!(
            "the linked image {shown} was changed: its {} is not what it was",
            names[i]
        )));
    }
    let (parent, file) = split_path(&link.path)?;
    OsDir::open(&parent)?.open(&file, Access::Read)
}

fn split_path(path: &Path) -> Result<(PathBuf, String)> {
    let file = path.file_name().and_then(|f| f.to_str());
    let parent = path.parent().map(|p| {
        if p.as_os_str().is_empty() {
            Path::new(".")
        } else {
            p
        }
    });
    match (parent, file) {
        (Some(parent), Some(file)) => Ok((parent.to_path_buf(), file.to_string())),
        _ => Err(
            Error::new(Kind::Invalid, format!("{} names no file", path.display()))
                .hint("name a regular file, with a name in UTF-8"),
        ),
    }
}

fn import_file(
    dir: &dyn Dir,
    id: Id,
    path: &Path,
    mode: ImportMode,
    progress: &dyn Progress,
) -> Result<BaseMeta> {
    let invalid = |what: &str, hint: &str| {
        Error::new(Kind::Invalid, format!("{} {what}", path.display())).hint(hint)
    };
    // Links are followed here: the file is the user's, outside of the store.
    let real = std::fs::canonicalize(path)
        .map_err(|e| Error::io("open", path, &e).or_hint("name an image file that exists"))?;
    let before = std::fs::metadata(&real).map_err(|e| Error::io("look at", path, &e))?;
    if before.is_dir() {
        return Err(invalid(
            "is a directory",
            "name a raw disk image; `mke2fs -d DIR IMAGE SIZE` makes one of a directory",
        ));
    }
    if !before.is_file() {
        return Err(invalid(
            "is not a regular file",
            "read a device as a stream: `forkdisk import - NAME < DEVICE`",
        ));
    }
    if before.len() == 0 {
        return Err(invalid("is empty", "a base has at least one byte"));
    }
    if before.len() > MAX_DISK {
        return Err(invalid(
            "is larger than 16 TiB",
            "a disk has at most 16 TiB",
        ));
    }
    let (parent, file_name) = split_path(&real)?;
    let source = OsDir::open(&parent)?
        .open(&file_name, Access::Read)
        .map_err(|e| e.or_hint("the image must be readable by you"))?;
    let mut meta = BaseMeta {
        mode: "link".to_string(),
        ..BaseMeta::copied(id, before.len(), None)
    };
    if mode == ImportMode::Link {
        meta.link = Some(Link {
            path: real,
            stamp: stamp(&before),
        });
        return Ok(meta);
    }
    meta.mode = if mode != ImportMode::Copy && reflink(dir, &*source)? {
        "reflink".to_string()
    } else if mode == ImportMode::Reflink {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{} cannot be reflinked into the store", path.display()),
        )
        .hint("source and store must be on one XFS or Btrfs filesystem; --copy copies"));
    } else {
        meta.digest = copy_file(dir, id, &*source, before.len(), progress)?;
        "copy".to_string()
    };
    let after = std::fs::metadata(&real).map_err(|e| Error::io("look at", path, &e))?;
    if stamp(&after) != stamp(&before) {
        return Err(Error::new(Kind::Busy, format!("{} was changed while it was imported", path.display()))
            .hint("stop what writes to it (detach it, shut the virtual machine down), then import it again"));
    }
    Ok(meta)
}

/// Shares the source's blocks, if the filesystem can.
fn reflink(dir: &dyn Dir, source: &dyn File) -> Result<bool> {
    let image = dir.open("image", Access::CreateNew)?;
    let done = match (source.fd(), image.fd()) {
        (Some(from), Some(to)) => rustix::fs::ioctl_ficlone(to, from).is_ok(),
        _ => false,
    };
    if done {
        image.sync()?;
    } else {
        drop(image);
        dir.remove("image")?;
    }
    Ok(done)
}

/// Image and sums under way: data goes in at rising offsets.
pub(super) struct Sink<'a> {
    image: Arc<dyn File>,
    sums: Arc<dyn File>,
    hasher: Option<Sha256>,
    /// Bytes so far, holes included.
    pub(super) at: u64,
    /// Bytes that the files have room for.
    room: u64,
    progress: &'a dyn Progress,
    total: u64,
}

/// The files become longer by so much of the image at a time. XFS gives whoever writes past the end of a file more than he asked for, and what lies before
/// the next piece of data then is no hole any more: so the end is always ahead of what is written.
const ROOM: u64 = 256 << 20;

/// Bytes of an image that stand in another file, too, and do not change there.
pub(super) struct Same<'a> {
    /// Where they go.
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) file: &'a dyn File,
    /// Where they are in that file.
    pub(super) from: u64,
}

/// Shorter ones are not shared: each is an extent of the file.
const SHARED: u64 = 64 << 10;

/// Zeros for the digest of holes.
static ZEROS: [u8; PIECE] = [0; PIECE];

impl<'a> Sink<'a> {
    pub(super) fn new(
        dir: &dyn Dir,
        total: u64,
        digest: bool,
        progress: &'a dyn Progress,
    ) -> Result<Sink<'a>> {
        Ok(Sink {
            image: dir.open("image", Access::CreateNew)?,
            sums: dir.open("sums", Access::CreateNew)?,
            hasher: digest.then(Sha256::new),
            at: 0,
            room: 0,
            progress,
            total,
        })
    }
    /// [`Sink::new`] over files that an earlier attempt left. `until`: how much of them is sound, whole blocks.
    pub(super) fn again(
        dir: &dyn Dir,
        until: u64,
        total: u64,
        digest: bool,
        progress: &'a dyn Progress,
    ) -> Result<Sink<'a>> {
        let sink = Sink {
            image: dir.open("image", Access::Write)?,
            sums: dir.open("sums", Access::Write)?,
            hasher: digest.then(Sha256::new),
            at: 0,
            room: until,
            progress,
            total,
        };
        // What may be behind it is to be holes.
        sink.image.set_len(until)?;
        sink.sums.set_len(BLOCK + until / BLOCK * 4)?;
        // Whoever left it may have died after a failed sync: only what is on the disk counts.
        sink.sync()?;
        sink.image.forget_cached(0, u64::MAX);
        sink.sums.forget_cached(0, u64::MAX);
        Ok(sink)
    }
    /// Can files of this filesystem have blocks in common?
    pub(super) fn shares(&self) -> bool {
        self.image.fd().is_some_and(crate::sys::fiemap::can_share)
    }
    fn make_room(&mut self, end: u64) -> Result<()> {
        if end > self.room {
            self.room = end.next_multiple_of(ROOM);
            if self.total >= end {
                self.room = self.room.min(self.total);
            }
            self.image.set_len(self.room)?;
            self.sums.set_len(BLOCK + self.room / BLOCK * 4)?;
        }
        Ok(())
    }
    fn tell(&self) -> Result<()> {
        if self.progress.update(self.at, self.total) {
            return Ok(());
        }
        Err(Error::new(Kind::Interrupted, "the import was interrupted")
            .hint("nothing was left behind; run it again"))
    }
    pub(super) fn hole(&mut self, until: u64) -> Result<()> {
        while self.at < until {
            let n = (until - self.at).min(PIECE as u64);
            if let Some(h) = &mut self.hasher {
                h.update(&ZEROS[..n as usize]);
                self.at += n;
                self.tell()?;
            } else {
                self.at = until;
            }
        }
        Ok(())
    }
    /// A piece of data: begins at a block boundary, ends at one unless it is the last.
    pub(super) fn data(&mut self, piece: &[u8]) -> Result<()> {
        self.data_of(piece, &[])
    }
    /// [`Sink::data`] of blocks of which some stand in other files, too: where the filesystem can let both have them, it does.
    pub(super) fn data_of(&mut self, piece: &[u8], same: &[Same<'_>]) -> Result<()> {
        self.make_room(self.at + piece.len() as u64)?;
        if let Some(h) = &mut self.hasher {
            h.update(piece);
        }
        let (sums, runs) = blocks_of(piece);
        self.put_runs(piece, &runs, same)?;
        if sums.iter().any(|&b| b != 0) {
            self.sums.write_at(&sums, BLOCK + self.at / BLOCK * 4)?;
        }
        self.image.start_writeback(self.at, piece.len() as u64);
        self.at += piece.len() as u64;
        self.tell()
    }
    fn put_runs(&self, piece: &[u8], runs: &[Range<usize>], same: &[Same<'_>]) -> Result<()> {
        runs.iter()
            .try_for_each(|run| self.put(&piece[run.clone()], self.at + run.start as u64, same))
    }
    /// What an earlier attempt put in, up to `until`, stays: it is compared with its sums.
    pub(super) fn keep(&mut self, until: u64) -> Result<()> {
        let mut buf = Vec::new();
        while self.at < until {
            let end = (self.at + ROOM).min(until);
            for (start, last) in self.there(self.at, end)? {
                self.hole(start)?;
                while self.at < last {
                    buf.resize((last - self.at).min(PIECE as u64) as usize, 0);
                    self.image.read_at(&mut buf, self.at)?;
                    self.must_match(&buf)?;
                    if let Some(h) = &mut self.hasher {
                        h.update(&buf);
                    }
                    self.at += buf.len() as u64;
                    self.tell()?;
                }
            }
            self.hole(end)?;
        }
        Ok(())
    }
    /// Where the image holds anything, or its sums say that it does: whole blocks, in order.
    fn there(&self, at: u64, end: u64) -> Result<Vec<(u64, u64)>> {
        let image = self.image.data_ranges(at, end - at)?;
        let (first, last) = (BLOCK + at / BLOCK * 4, BLOCK + end / BLOCK * 4);
        let sums = self.sums.data_ranges(first, last - first)?;
        let blocks = |from: u64, len: u64| {
            let (from, to) = (
                (from - BLOCK) / 4 * BLOCK,
                (from + len - BLOCK).div_ceil(4) * BLOCK,
            );
            (from, to)
        };
        let mut all: Vec<(u64, u64)> = image
            .into_iter()
            .map(|(from, len)| (from / BLOCK * BLOCK, (from + len).next_multiple_of(BLOCK)))
            .chain(sums.into_iter().map(|(from, len)| blocks(from, len)))
            .map(|(from, to)| (from.max(at), to.min(end)))
            .collect();
        all.sort_unstable();
        let mut found: Vec<(u64, u64)> = Vec::new();
        for (from, to) in all {
            match found.last_mut() {
                Some((_, last)) if *last >= from => *last = (*last).max(to),
                _ => found.push((from, to)),
            }
        }
        Ok(found)
    }
    fn must_match(&self, piece: &[u8]) -> Result<()> {
        let (sums, _) = blocks_of(piece);
        let mut noted = vec![0; sums.len()];
        self.sums.read_at(&mut noted, BLOCK + self.at / BLOCK * 4)?;
        let pairs = sums.chunks(4).zip(noted.chunks(4));
        match pairs.take_while(|(now, then)| now == then).count() {
            same if same * 4 == sums.len() => Ok(()),
            same => Err(Error::new(
                Kind::Corrupt,
                "what an earlier attempt copied is not what it was",
            )
            .path(self.image.path())
            .offset(self.at + same as u64 * BLOCK)
            .hint("it was removed; run it again")),
        }
    }
    /// Whole blocks in the place of what an earlier attempt put in.
    pub(super) fn replace(&mut self, piece: &[u8]) -> Result<()> {
        if let Some(h) = &mut self.hasher {
            h.update(piece);
        }
        let (sums, runs) = blocks_of(piece);
        // What is zero now, and may not have been.
        match self.image.punch(self.at, piece.len() as u64) {
            Err(e) if e.kind() == Kind::Unsupported => self.image.write_at(piece, self.at)?,
            other => {
                other?;
                self.put_runs(piece, &runs, &[])?;
            }
        }
        self.sums.write_at(&sums, BLOCK + self.at / BLOCK * 4)?;
        self.image.start_writeback(self.at, piece.len() as u64);
        self.at += piece.len() as u64;
        self.tell()
    }
    /// Makes durable what was put in so far.
    pub(super) fn sync(&self) -> Result<()> {
        self.image.sync()?;
        self.sums.sync()
    }
    fn put(&self, bytes: &[u8], at: u64, same: &[Same<'_>]) -> Result<()> {
        let (mut done, end) = (at, at + bytes.len() as u64);
        let rest = |done: u64, to: u64| match done < to {
            true => self
                .image
                .write_at(&bytes[(done - at) as usize..(to - at) as usize], done),
            false => Ok(()),
        };
        for other in same {
            let (from, to) = (other.at.max(done), (other.at + other.len).min(end));
            if to.saturating_sub(from) >= SHARED {
                rest(done, from)?;
                let there = other.from + (from - other.at);
                self.image.copy_from(other.file, there, from, to - from)?;
                done = to;
            }
        }
        rest(done, end)
    }
    /// Makes both files whole and durable; returns the digest.
    pub(super) fn finish(mut self, id: Id, len: u64) -> Result<Option<String>> {
        self.hole(len)?;
        let n = blocks(len);
        self.image.set_len(len)?;
        self.sums.write_at(SumsHeader::new(id, n).as_bytes(), 0)?;
        self.sums.set_len(BLOCK + n * 4)?;
        self.sync()?;
        Ok(self.hasher.map(|h| {
            h.finalize()
                .iter()
                .fold(String::from("sha256:"), |mut s, b| {
                    s.push_str(&format!("{b:02x}"));
                    s
                })
        }))
    }
}

/// What a piece is made of, which begins at a block boundary: what its sums file says of each block, and where there are others than blocks of zeros, which
/// stay holes: neighbours are written in one call.
fn blocks_of(piece: &[u8]) -> (Vec<u8>, Vec<Range<usize>>) {
    let mut sums = Vec::with_capacity(piece.len() / BLOCK_SIZE * 4 + 4);
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for block in piece.chunks(BLOCK_SIZE) {
        let zero = block.iter().all(|&b| b == 0);
        let sum = match (zero, block.len()) {
            (true, _) => ZERO_SUM,
            (_, BLOCK_SIZE) => format::crc(block),
            _ => {
                let mut whole = [0; BLOCK_SIZE];
                whole[..block.len()].copy_from_slice(block);
                format::crc(&whole)
            }
        };
        sums.extend_from_slice(&(sum ^ ZERO_SUM).to_le_bytes());
        let end = at + block.len();
        match runs.last_mut() {
            _ if zero => {}
            Some(run) if run.end == at => run.end = end,
            _ => runs.push(at..end),
        }
        at = end;
    }
    (sums, runs)
}

fn copy_file(
    dir: &dyn Dir,
    id: Id,
    source: &dyn File,
    len: u64,
    progress: &dyn Progress,
) -> Result<Option<String>> {
    let mut sink = Sink::new(dir, len, len <= DIGEST_MAX, progress)?;
    let mut buf = vec![0; PIECE];
    for (start, n) in source.data_ranges(0, len)? {
        // Whole blocks, whatever the grain of the host's holes.
        let mut at = (start / BLOCK * BLOCK).max(sink.at);
        let end = (start + n).next_multiple_of(BLOCK).min(len);
        while at < end {
            sink.hole(at)?;
            let n = (end - at).min(PIECE as u64) as usize;
            source.read_at(&mut buf[..n], at)?;
            sink.data(&buf[..n])?;
            at += n as u64;
        }
    }
    sink.finish(id, len)
}

fn copy_content(
    dir: &dyn Dir,
    id: Id,
    content: &dyn Content,
    progress: &dyn Progress,
) -> Result<BaseMeta> {
    let len = content.len();
    let mut sink = Sink::new(dir, len, len <= DIGEST_MAX, progress)?;
    // As large as the largest unit of the other formats, so that none has to be unpacked twice.
    let mut buf = vec![0; 2 * PIECE];
    while let Some(data) = content.data(sink.at)? {
        // Whole blocks, whatever the grain of the other format.
        sink.hole(data.start / BLOCK * BLOCK)?;
        sink.tell()?;
        let end = data.end.next_multiple_of(BLOCK).min(len);
        while sink.at < end {
            let piece = &mut buf[..(end - sink.at).min(2 * PIECE as u64) as usize];
            content.read(piece, sink.at)?;
            sink.data(piece)?;
        }
    }
    let digest = sink.finish(id, len)?;
    content.unchanged()?;
    Ok(BaseMeta::copied(id, len, digest))
}

fn copy_stream(
    dir: &dyn Dir,
    id: Id,
    reader: &mut dyn Read,
    progress: &dyn Progress,
) -> Result<BaseMeta> {
    let mut sink = Sink::new(dir, 0, true, progress)?;
    let mut buf = vec![0; PIECE];
    loop {
        let mut n = 0;
        while n < PIECE {
            match reader.read(&mut buf[n..]) {
                Ok(0) => break,
                Ok(got) => n += got,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {
                    sink.tell()?;
                }
                Err(e) => return Err(Error::io("read", "the input stream", &e)),
            }
        }
        if n == 0 {
            break;
        }
        if sink.at + n as u64 > MAX_DISK {
            return Err(
                Error::new(Kind::Invalid, "the stream is longer than 16 TiB")
                    .hint("a disk has at most 16 TiB"),
            );
        }
        sink.data(&buf[..n])?;
        if n < PIECE {
            break;
        }
    }
    let len = sink.at;
    if len == 0 {
        return Err(
            Error::new(Kind::Invalid, "the stream is empty").hint("a base has at least one byte")
        );
    }
    let digest = sink.finish(id, len)?;
    Ok(BaseMeta::copied(id, len, digest))
}
