//! A qcow2 image that is read, to be imported.
//!
//! Always true:
//! - only this one file is read: whoever made the image may have been a guest, and a name in it (of a backing file, of a file for the data) could be that of
//!   any file of the host;
//! - what the header says is looked at here first: a table larger than QEMU would take is refused before anybody makes room for it.
//!
//! The tables are read by the library `imago`.

use crate::{
    error::{Error, Kind, Result},
    store::Content,
    units::MAX_DISK,
};
use imago::{FormatAccess, Mapping, file::File as Storage, qcow2::Qcow2, storage};
use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};
use zerocopy::{FromBytes, FromZeros, IntoBytes, big_endian::U64};

/// What the first four bytes are.
const MAGIC: u32 = 0x5146_49fb;
/// Bytes of an L1 table, as in QEMU.
const MAX_L1: u64 = 32 << 20;
/// Bytes of a table of reference counts, as in QEMU.
const MAX_COUNTS: u64 = 8 << 20;
/// Data that is told of at once.
const STRETCH: u64 = 256 << 20;
/// How many entries are looked at before whoever asks hears something.
const LOOKS: u32 = 1 << 14;

/// Of an entry of a table, the place of what it refers to.
const TABLE_AT: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of an entry of an L2 table: it refers to compressed data; it stands for zeros (from version 3 on).
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// Bits of `incompatible_features`.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const COMPRESSION: u64 = 8;
const EXTENDED_L2: u64 = 16;

/// An image, open for reading.
pub struct Image {
    path: PathBuf,
    file: File,
    /// Length and time of change in the beginning.
    looked: (u64, i64, i64),
    access: FormatAccess<Storage>,
}

fn looks(file: &File) -> io::Result<(u64, i64, i64)> {
    let now = file.metadata()?;
    Ok((now.len(), now.mtime(), now.mtime_nsec()))
}

impl Image {
    /// Opens it. `Unsupported`: it needs another file, or something of the format that is not known here; `Corrupt`: it is none, or damaged.
    pub fn open(path: &Path) -> Result<Image> {
        let failed = |e: io::Error| Error::io("open", path, &e);
        let file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            let what = format!("{} is no regular file", path.display());
            return Err(Error::new(Kind::Invalid, what).hint(
                "a qcow2 image is read from a file; a raw one also from a device, as a stream",
            ));
        }
        let looked = looks(&file).map_err(failed)?;
        let mut header = super::Header::new_zeroed();
        // One of version 2 may end before that.
        let mut start = Vec::new();
        let most = size_of::<super::Header>() as u64;
        let read = (&file).take(most).read_to_end(&mut start);
        read.map_err(|e| Error::io("read", path, &e))?;
        header.as_mut_bytes()[..start.len()].copy_from_slice(&start);
        sound(&header).map_err(|e| told(path, e))?;
        whole(&file, looked.0, &header).map_err(|e| told(path, e))?;
        let damaged = |e: io::Error| told(path, damage(&e));
        let copy = file.try_clone().map_err(failed)?;
        let opened = Storage::from_open_file(copy, storage::StorageOpenOptions::new())
            .and_then(|storage| Qcow2::<Storage>::open_image(storage, false))
            .map_err(damaged)?;
        // What the library found, whatever it looked at.
        if opened.implicit_backing_file().is_some() || opened.requires_external_data_file() {
            return Err(told(path, not_alone("needs another file")));
        }
        Ok(Image {
            path: path.to_path_buf(),
            file,
            looked,
            access: FormatAccess::new(opened),
        })
    }
    fn mapping(&self, at: u64) -> Result<(bool, u64)> {
        let found = self.access.get_mapping(at, self.len() - at);
        let (mapping, len) = found.map_err(|e| self.damaged(&e, at))?;
        match (mapping, len) {
            (Mapping::Eof { .. }, _) | (_, 0) => {
                let e = io::Error::other("its tables end before the disk does");
                Err(self.damaged(&e, at))
            }
            (Mapping::Zero { .. }, len) => Ok((false, len)),
            (_, len) => Ok((true, len)),
        }
    }
    fn damaged(&self, e: &io::Error, at: u64) -> Error {
        let e = match e.raw_os_error() {
            Some(_) => Error::io("read", &self.path, e),
            None => told(&self.path, damage(e)),
        };
        e.context(format!("byte {at} of the disk"))
    }
}

impl Content for Image {
    fn len(&self) -> u64 {
        self.access.size()
    }
    fn data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let (mut start, len) = (from, self.len());
        let mut end = from;
        let mut looks = 0;
        while end < len && end - start < STRETCH {
            looks += 1;
            if looks > LOOKS {
                return Ok(Some(start..end));
            }
            let (data, n) = self.mapping(end)?;
            match (data, end > start) {
                (true, _) => end += n,
                (false, true) => break,
                (false, false) => (start, end) = (end + n, end + n),
            }
        }
        Ok((end > start).then_some(start..end))
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let done = self.access.read(buf, at);
        done.map_err(|e| self.damaged(&e, at))
    }
    fn unchanged(&self) -> Result<()> {
        let now = looks(&self.file).map_err(|e| Error::io("look at", &self.path, &e))?;
        match now == self.looked {
            true => Ok(()),
            false => Err(Error::new(
                Kind::Busy,
                format!("{} was changed while it was imported", self.path.display()),
            )
            .hint("stop what writes to it (shut the virtual machine down), then import it again")),
        }
    }
}

fn told(path: &Path, e: Error) -> Error {
    e.path(path)
}

fn damage(e: &io::Error) -> Error {
    Error::new(Kind::Corrupt, format!("the qcow2 image is damaged: {e}")).hint(
        "`qemu-img check` tells what is wrong with it; `--format raw` takes the file as a raw image",
    )
}

fn not_alone(what: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the qcow2 image {what}, and no other file is read than the one that was named"),
    )
    .hint("`qemu-img convert -O qcow2 FILE WHOLE.qcow2` puts all of it into one file, if you trust the names in it")
}

/// Refuses a file in which tables are missing, or what they refer to: what is past its end would be read as zeros.
fn whole(file: &File, len: u64, header: &super::Header) -> Result<()> {
    let bad = |what: &str| damage(&io::Error::other(what));
    let cut = || bad("it is shorter than its tables say");
    let within = |at: u64, n: u64| at.checked_add(n).is_some_and(|end| end <= len);
    let bits = header.cluster_bits.get();
    let cluster = 1 << bits;
    let at = header.l1_table_offset.get();
    let mut table = vec![0; header.l1_size.get() as usize * 8];
    // What a table that is too short says nothing of would be zeros, too.
    let tables = header.size.get().div_ceil(cluster * (cluster / 8));
    if u64::from(header.l1_size.get()) < tables || at == 0 {
        return Err(bad("its first table is too short for its disk"));
    }
    if !within(at, table.len() as u64) {
        return Err(cut());
    }
    let read = |buf: &mut [u8], at| file.read_exact_at(buf, at).map_err(|e| damage(&e));
    read(&mut table, at)?;
    let entries = |table: &[u8]| -> Vec<u64> {
        let entry = |bytes: &[u8]| U64::read_from_bytes(bytes).map_or(0, U64::get);
        table.chunks_exact(8).map(entry).collect()
    };
    let mut seconds: Vec<u64> = entries(&table).iter().map(|e| e & TABLE_AT).collect();
    // Whoever makes all the same does not have it read as often.
    seconds.sort_unstable();
    seconds.dedup();
    let mut table = vec![0; cluster as usize];
    for at in seconds.into_iter().filter(|at| *at != 0) {
        if !within(at, cluster) {
            return Err(cut());
        }
        read(&mut table, at)?;
        for entry in entries(&table) {
            let there = match entry & COMPRESSED != 0 {
                // How many sectors its data touches stands above its place. The last one need not be in the file as a whole.
                true => {
                    let place = 62 - (bits - 8);
                    let at = entry & ((1 << place) - 1);
                    let sectors = (entry & (COMPRESSED - 1)) >> place;
                    let end = (at / SECTOR + sectors + 1) * SECTOR;
                    at < len && end < len + SECTOR
                }
                false if entry & ZERO != 0 && header.version.get() == 2 => {
                    return Err(bad("a table has marks that its version does not know"));
                }
                // QEMU leaves a file shorter than its last cluster where nothing but zeros would follow.
                false => entry & ZERO != 0 || entry & TABLE_AT < len,
            };
            if !there {
                return Err(cut());
            }
        }
    }
    Ok(())
}

/// Refuses what cannot be read, by what the header says.
fn sound(header: &super::Header) -> Result<()> {
    let bad = |what: &str| Err(damage(&io::Error::other(what)));
    let convert = |what: &str| {
        Err(
            Error::new(Kind::Unsupported, format!("the qcow2 image {what}"))
                .hint("`qemu-img convert -O raw FILE FILE.img` makes a raw image of it"),
        )
    };
    let version = header.version.get();
    if header.magic.get() != MAGIC {
        return bad("it does not begin as one");
    }
    if !matches!(version, 2 | 3) {
        return convert(&format!("is of version {version}"));
    }
    if header.crypt_method.get() != 0 {
        return convert("is encrypted");
    }
    if header.backing_file_offset.get() != 0 {
        return Err(not_alone("stands on a backing file"));
    }
    let features = match version {
        2 => 0,
        _ => header.incompatible_features.get(),
    };
    let has = |bit: u64| features & bit != 0;
    if has(EXTERNAL_DATA) {
        return Err(not_alone("has its data in another file"));
    }
    if has(DIRTY | CORRUPT) {
        return Err(Error::new(
            Kind::Corrupt,
            "the qcow2 image was not closed cleanly, or is damaged",
        )
        .hint("`qemu-img check -r all FILE` repairs it; nothing may have it open meanwhile"));
    }
    if has(COMPRESSION) {
        return convert("is compressed in another way than by zlib");
    }
    if has(EXTENDED_L2) {
        return convert("has sub-clusters (extended_l2)");
    }
    if features != 0 {
        return convert("has features that are not known here");
    }
    let bits = header.cluster_bits.get();
    if !(9..=21).contains(&bits) {
        return bad("the size of its clusters is out of range");
    }
    let counts = u64::from(header.refcount_table_clusters.get()) << bits;
    if u64::from(header.l1_size.get()) * 8 > MAX_L1 || counts > MAX_COUNTS {
        return bad("its tables are larger than they may be");
    }
    match header.size.get() {
        0 => Err(Error::new(Kind::Invalid, "the qcow2 image is empty")
            .hint("a base has at least one byte")),
        size if size > MAX_DISK => Err(Error::new(
            Kind::Invalid,
            "the disk of the qcow2 image is larger than 16 TiB",
        )
        .hint("a disk has at most 16 TiB")),
        _ => Ok(()),
    }
}
