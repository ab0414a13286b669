//! Disks from and to other formats.
//!
//! So far: raw export ([`raw`]), qcow2 in and out ([`qcow2`]), streams of differences ([`stream`]), and telling what a file is before it is taken for a raw
//! image ([`sniff`]).

pub mod qcow2;
pub mod raw;
pub mod stream;

use crate::error::{Error, Kind};
use std::{fs::File, io::Read, path::Path};

/// A file format that is not raw, known by its first bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Foreign {
    /// Its name.
    pub name: &'static str,
    /// Is it a compression, rather than a disk format?
    pub compressed: bool,
}

const MAGICS: [(usize, &[u8], &str, bool); 9] = [
    (0, b"QFI\xfb", "qcow2", false),
    (0, b"KDMV", "vmdk", false),
    (0, b"vhdxfile", "vhdx", false),
    (0, b"conectix", "vhd", false),
    (0x40, b"\x7f\x10\xda\xbe", "vdi", false),
    (0, b"\x1f\x8b\x08", "gzip", true),
    (0, b"\xfd7zXZ\x00", "xz", true),
    (0, b"\x28\xb5\x2f\xfd", "zstd", true),
    (0, b"BZh", "bzip2", true),
];

/// What the beginning of a file says it is; `None` for what can be a raw image.
pub fn sniff(start: &[u8]) -> Option<Foreign> {
    MAGICS
        .iter()
        .find(|(at, magic, ..)| start.get(*at..).is_some_and(|s| s.starts_with(magic)))
        .map(|&(_, _, name, compressed)| Foreign { name, compressed })
}

/// What the beginning of a file says it is. Whether it is there and can be read is for the import to say.
pub fn sniff_file(path: &Path) -> Option<Foreign> {
    let is_file = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
    let file = is_file.then(|| File::open(path).ok()).flatten()?;
    let mut start = Vec::new();
    file.take(512).read_to_end(&mut start).ok()?;
    sniff(&start)
}

/// The error for what is plainly no raw image: to take it for one would make a disk of rubbish. `path`: the file, if it is not standard input.
pub fn not_raw(path: Option<&Path>, foreign: Foreign) -> Error {
    let Foreign { name, compressed } = foreign;
    let shown = path.map(|path| path.display().to_string());
    let (what, file) = match &shown {
        Some(shown) => (&**shown, &**shown),
        None => ("standard input", "FILE"),
    };
    let error = Error::new(
        Kind::Unsupported,
        format!("{what} is a {name} file, not a raw image"),
    );
    error.hint(match (compressed, name) {
        (true, "gzip") => format!("unpack it on the way: `zcat {file} | forkdisk import - NAME`"),
        (true, _) => format!("unpack it on the way: `{name} -dc {file} | forkdisk import - NAME`"),
        (false, "qcow2") => match path {
            None => "a qcow2 image is read from a file, as its tables may be anywhere; `--format raw` takes the bytes as they are".into(),
            Some(_) => format!(
                "`forkdisk import --format qcow2 {file}` takes the disk that it describes; if it is a raw image that begins like one, `--format raw`"
            ),
        },
        (false, _) => format!(
            "convert it first: `qemu-img convert -O raw {file} FILE.img`; if it is a raw image that begins like one, `--format raw`"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        assert_eq!(sniff(b"QFI\xfb\0\0\0\x03").map(|f| f.name), Some("qcow2"));
        assert_eq!(sniff(b"\x1f\x8b\x08\0").map(|f| f.name), Some("gzip"));
        let mut vdi = vec![0; 0x44];
        vdi[0x40..].copy_from_slice(b"\x7f\x10\xda\xbe");
        assert_eq!(sniff(&vdi).map(|f| f.name), Some("vdi"));
        assert_eq!(sniff(&[]), None);
        assert_eq!(sniff(&[0; 512]), None);
        assert_eq!(sniff(b"QFI"), None);
    }
}
