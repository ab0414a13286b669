//! A disk as a raw image: a sparse file, or a stream of all its bytes.
//!
//! Always true:
//! - the target appears under its name whole, synced, or not at all; the file that was there before
//!   stays untouched until then;
//! - what reads as zeros takes no space in the file.
//!
//! Until it is complete the file has no name at all (`O_TMPFILE`), so that nothing is left even by a
//! process that is killed. Where the filesystem cannot do that, it has a hidden name beside the target.

use crate::{
    disk::{Disk, stretches},
    error::{Error, Kind, Result},
    store::Progress,
    units::{BLOCK_SIZE, REGION_BYTES},
};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
};

/// Bytes read and written at once.
const PIECE: usize = 1 << 20;
/// Bytes whose extents are asked for at once: a bounded answer for a disk of any size.
pub(super) const WINDOW: u64 = 512 * REGION_BYTES;

/// Writes the first `len` bytes of `disk` into a new file at `target`. Replaces a file that is there
/// only if `replace`. Returns how many bytes of data were written, which leaves out the zeros.
pub fn export_file(
    disk: &dyn Disk,
    len: u64,
    target: &Path,
    replace: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let target = check_target(target, replace)?;
    let new = NewFile::beside(&target)?;
    let failed = |e: &io::Error| Error::io("write", &target, e);
    new.file.set_len(len).map_err(|e| failed(&e))?;
    let mut written = 0;
    for_data(disk, len, progress, |at, piece| {
        for (at, run) in runs_of_data(at, piece) {
            new.file.write_all_at(run, at).map_err(|e| failed(&e))?;
            written += run.len() as u64;
        }
        Ok(())
    })?;
    new.file
        .sync_all()
        .map_err(|e| Error::io("sync", &target, &e))?;
    new.name(&target, replace)?;
    Ok(written)
}

/// Fails if `target` cannot be made, or must not be replaced. Returns where it really is.
pub fn check_target(target: &Path, replace: bool) -> Result<PathBuf> {
    let shown = target.display();
    // A link is followed, so that the link stays and its file is replaced.
    let real = match fs::canonicalize(target) {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let parent = parent_of(target);
            if !parent.is_dir() {
                return Err(Error::new(
                    Kind::NotFound,
                    format!(
                        "cannot create {shown}: there is no directory {}",
                        parent.display()
                    ),
                )
                .hint(format!("`mkdir -p {}` makes it", parent.display())));
            }
            if fs::symlink_metadata(target).is_ok() {
                return Err(
                    Error::new(Kind::Exists, format!("{shown} is a broken link"))
                        .hint("remove the link, or choose another file"),
                );
            }
            return Ok(target.to_path_buf());
        }
        Err(e) => return Err(Error::io("create", target, &e)),
    };
    let meta = fs::metadata(&real).map_err(|e| Error::io("read", target, &e))?;
    if meta.is_dir() {
        return Err(
            Error::new(Kind::Invalid, format!("{shown} is a directory")).hint(format!(
                "name the file: {}",
                target.join("NAME.img").display()
            )),
        );
    }
    if !meta.is_file() {
        return Err(
            Error::new(Kind::Invalid, format!("{shown} is no regular file"))
                .hint(format!("to write to it: `forkdisk export REF - > {shown}`")),
        );
    }
    if !replace {
        return Err(exists(target));
    }
    Ok(real)
}

fn exists(target: &Path) -> Error {
    Error::new(Kind::Exists, format!("{} exists already", target.display()))
        .hint("--force replaces it")
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes the first `len` bytes of `disk` to `out`, zeros and all. The inner result tells of `out`
/// failing, so that the caller can tell a reader that went away from a disk that cannot be read.
pub fn export_stream(
    disk: &dyn Disk,
    len: u64,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<io::Result<()>> {
    let zeros = vec![0; PIECE];
    let fill = |from: u64, to: u64, put: &mut dyn FnMut(&[u8]) -> Result<()>| {
        let mut left = to - from;
        while left > 0 {
            let piece = left.min(PIECE as u64);
            put(&zeros[..piece as usize])?;
            left -= piece;
        }
        Ok(())
    };
    to_pipe(out, |put| {
        let mut at = 0;
        for_data(disk, len, progress, |data_at, piece| {
            fill(at, data_at, put)?;
            at = data_at + piece.len() as u64;
            put(piece)
        })?;
        fill(at, len, put)
    })
}

/// Lets `work` write to `out`. The inner result tells of `out` failing, the outer one of anything else.
pub(super) fn to_pipe(
    out: &mut dyn Write,
    work: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
) -> Result<io::Result<()>> {
    let mut failure = None;
    let result = work(&mut |bytes| {
        out.write_all(bytes).map_err(|e| {
            failure = Some(e);
            Error::new(Kind::Io, "the output is closed")
        })
    });
    match (failure, result) {
        (Some(e), _) => Ok(Err(e)),
        (None, Err(e)) => Err(e),
        (None, Ok(())) => Ok(out.flush()),
    }
}

/// Calls `each` with every stretch of the first `len` bytes that is not known to be zeros, in order.
fn for_data(
    disk: &dyn Disk,
    len: u64,
    progress: &dyn Progress,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut buf = vec![0; PIECE];
    let told = |done| {
        if progress.update(done, len) {
            Ok(())
        } else {
            Err(Error::new(Kind::Interrupted, "interrupted"))
        }
    };
    let mut window = 0;
    while window < len {
        let size = WINDOW.min(disk.size() - window);
        for stretch in stretches(&disk.extents(window, size)?) {
            let end = stretch.end.min(len);
            let mut at = stretch.start;
            told(at.min(len))?;
            while at < end {
                let piece = &mut buf[..(end - at).min(PIECE as u64) as usize];
                disk.read(piece, at)?;
                each(at, piece)?;
                at += piece.len() as u64;
                told(at)?;
            }
        }
        window += size;
        told(window.min(len))?;
    }
    told(len)
}

/// The stretches of `piece` (which stands at `at`) that are not whole blocks of zeros.
fn runs_of_data(at: u64, piece: &[u8]) -> Vec<(u64, &[u8])> {
    let mut runs = Vec::new();
    let mut start = None;
    for (i, block) in piece.chunks(BLOCK_SIZE).enumerate() {
        let pos = i * BLOCK_SIZE;
        if is_zero(block) {
            if let Some(start) = start.take() {
                runs.push((at + start as u64, &piece[start..pos]));
            }
        } else if start.is_none() {
            start = Some(pos);
        }
    }
    if let Some(start) = start {
        runs.push((at + start as u64, &piece[start..]));
    }
    runs
}

pub(super) fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && rest.iter().all(|b| *b == 0)
}

/// A file that has no name yet, or a hidden one that goes with it.
pub(super) struct NewFile {
    pub(super) file: File,
    hidden: Option<PathBuf>,
}

impl NewFile {
    pub(super) fn beside(target: &Path) -> Result<NewFile> {
        let parent = parent_of(target);
        let mode = Mode::from_raw_mode(0o666); // less the umask, as any new file
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(parent, flags | OFlags::TMPFILE, mode) {
            Ok(fd) => {
                return Ok(NewFile {
                    file: fd.into(),
                    hidden: None,
                });
            }
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
            Err(e) => return Err(Error::io("create", target, &e.into())),
        }
        let hidden = hidden_name(target);
        rustix::fs::open(&hidden, flags | OFlags::CREATE | OFlags::EXCL, mode)
            .map(|fd| NewFile {
                file: fd.into(),
                hidden: Some(hidden),
            })
            .map_err(|e| Error::io("create", target, &e.into()))
    }
    /// Gives the complete file its name.
    pub(super) fn name(mut self, target: &Path, replace: bool) -> Result<()> {
        let failed = |e: Errno| match e {
            Errno::EXIST => exists(target),
            e => Error::io("create", target, &e.into()),
        };
        if self.hidden.is_none() {
            let unnamed = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let link = |to: &Path| {
                rustix::fs::linkat(CWD, unnamed.as_str(), CWD, to, AtFlags::SYMLINK_FOLLOW)
            };
            if replace {
                // A link replaces nothing, a rename does: the hidden name is for an instant.
                let hidden = hidden_name(target);
                link(&hidden).map_err(failed)?;
                self.hidden = Some(hidden);
            } else {
                link(target).map_err(failed)?;
            }
        }
        if let Some(hidden) = &self.hidden {
            let flags = if replace {
                RenameFlags::empty()
            } else {
                RenameFlags::NOREPLACE
            };
            match rustix::fs::renameat_with(CWD, hidden, CWD, target, flags) {
                // Without renameat2, a hard link refuses to replace as well.
                Err(Errno::INVAL | Errno::NOSYS) if !replace => {
                    rustix::fs::link(hidden, target).map_err(failed)?;
                }
                other => {
                    other.map_err(failed)?;
                    self.hidden = None;
                }
            }
        }
        let parent = parent_of(target);
        let sync = File::open(parent).and_then(|dir| dir.sync_all());
        sync.map_err(|e| Error::io("sync", parent, &e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            let _ = fs::remove_file(hidden);
        }
    }
}

fn hidden_name(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    // Names are at most 255 bytes long.
    let name: String = name.chars().take(50).collect();
    target.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{Extent, Source},
        store::Quiet,
        units::BLOCK,
    };
    use std::os::unix::fs::MetadataExt;

    /// Blocks by letter: `.` is absent, `z` recorded as zeros, `0` data that is all zeros, others data.
    struct Letters(&'static str);

    impl Disk for Letters {
        fn size(&self) -> u64 {
            self.0.len() as u64 * BLOCK
        }
        fn read_only(&self) -> bool {
            true
        }
        fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
            for (i, byte) in buf.iter_mut().enumerate() {
                let letter = self.0.as_bytes()[(at as usize + i) / BLOCK_SIZE];
                *byte = if b".z0".contains(&letter) { 0 } else { letter };
            }
            Ok(())
        }
        fn write(&self, _: &[u8], _: u64) -> Result<()> {
            unreachable!()
        }
        fn discard(&self, _: u64, _: u64) -> Result<()> {
            unreachable!()
        }
        fn flush(&self) -> Result<()> {
            unreachable!()
        }
        fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
            let blocks = (at / BLOCK) as usize..((at + len) / BLOCK) as usize;
            Ok(blocks
                .map(|i| Extent {
                    at: i as u64 * BLOCK,
                    len: BLOCK,
                    from: match self.0.as_bytes()[i] {
                        b'.' => Source::Absent,
                        b'z' => Source::Zero { depth: 1 },
                        _ => Source::Base,
                    },
                })
                .collect())
        }
    }

    const DISK: Letters = Letters("..ab0z.cc..");

    fn expected(len: usize) -> Vec<u8> {
        let mut all = vec![0; DISK.size() as usize];
        DISK.read(&mut all, 0).expect("in range");
        all.truncate(len);
        all
    }

    #[test]
    fn a_file_is_equal_and_sparse() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("out.img");
        let written = export_file(&DISK, DISK.size(), &file, false, &Quiet).expect("exported");
        assert_eq!(written, 4 * BLOCK);
        assert_eq!(fs::read(&file).expect("there"), expected(11 * BLOCK_SIZE));
        let meta = fs::metadata(&file).expect("there");
        assert!(meta.blocks() * 512 < DISK.size(), "no holes");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    }

    #[test]
    fn a_length_that_is_no_multiple_of_a_block_is_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("out.img");
        let len = 8 * BLOCK + 100;
        export_file(&DISK, len, &file, false, &Quiet).expect("exported");
        assert_eq!(fs::read(&file).expect("there"), expected(len as usize));
    }

    #[test]
    fn a_stream_has_every_byte() {
        let mut out = Vec::new();
        export_stream(&DISK, DISK.size(), &mut out, &Quiet)
            .expect("read")
            .expect("written");
        assert_eq!(out, expected(11 * BLOCK_SIZE));
    }

    #[test]
    fn a_file_that_is_there_is_replaced_only_on_demand() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("out.img");
        let link = dir.path().join("link");
        fs::write(&file, "precious").expect("written");
        std::os::unix::fs::symlink(&file, &link).expect("linked");
        let refused = export_file(&DISK, BLOCK, &file, false, &Quiet).expect_err("exists");
        assert_eq!(refused.kind(), Kind::Exists);
        assert_eq!(fs::read(&file).expect("there"), b"precious");
        export_file(&DISK, BLOCK, &link, true, &Quiet).expect("replaced");
        assert_eq!(fs::metadata(&file).expect("there").len(), BLOCK);
        assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 2);
    }

    #[test]
    fn a_directory_a_device_or_no_parent_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        for (target, kind) in [
            (dir.path().to_path_buf(), Kind::Invalid),
            ("/dev/null".into(), Kind::Invalid),
            (dir.path().join("no/x.img"), Kind::NotFound),
        ] {
            let refused = export_file(&DISK, BLOCK, &target, true, &Quiet).expect_err("refused");
            assert_eq!(refused.kind(), kind, "{refused}");
        }
    }

    #[test]
    fn nothing_is_left_of_what_was_cancelled() {
        struct Cancel;
        impl Progress for Cancel {
            fn update(&self, done: u64, _: u64) -> bool {
                done < 4 * BLOCK
            }
        }
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("out.img");
        let cancelled = export_file(&DISK, DISK.size(), &file, false, &Cancel).expect_err("ends");
        assert_eq!(cancelled.kind(), Kind::Interrupted);
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn a_hidden_name_leads_to_the_same() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = dir.path().join("out.img");
        for replace in [false, true] {
            let hidden = hidden_name(&target);
            let new = NewFile {
                file: File::create_new(&hidden).expect("created"),
                hidden: Some(hidden),
            };
            new.name(&target, replace).expect("named");
            assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
        }
        let hidden = hidden_name(&target);
        let new = NewFile {
            file: File::create_new(&hidden).expect("created"),
            hidden: Some(hidden),
        };
        let refused = new.name(&target, false).expect_err("exists");
        assert_eq!(refused.kind(), Kind::Exists);
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    }
}
