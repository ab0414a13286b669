//! What a block device holds, by the magic numbers at its beginning. A guess that saves trying every
//! filesystem, and a reason that says more than "wrong fs type"; the kernel has the last word.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// What was recognised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// A filesystem: the kernel's names of drivers that may mount it, best first.
    Filesystem(&'static [&'static str]),
    /// Something that is not mounted as it is: what it is, for people.
    Other(&'static str),
    /// Nothing known.
    Unknown,
}

/// As far as any of the magic numbers reaches: btrfs, at 64 KiB.
const HEAD: usize = 0x11000;

/// Looks at the beginning of a device or file.
pub fn probe(path: &Path) -> io::Result<Content> {
    let file = File::open(path)?;
    let mut head = vec![0; HEAD];
    let mut len = 0;
    while len < head.len() {
        match file.read_at(&mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    // What is beyond the end of a tiny device reads as zeros, which no magic number is.
    Ok(recognise(&head))
}

fn recognise(head: &[u8]) -> Content {
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    let u32_at = |at: usize| {
        head.get(at..at + 4)
            .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    if has(0, b"XFSB") {
        Content::Filesystem(&["xfs"])
    } else if has(0x10040, b"_BHRfS_M") {
        Content::Filesystem(&["btrfs"])
    } else if has(0x438, &[0x53, 0xEF]) {
        ext(u32_at(0x45C), u32_at(0x460), u32_at(0x464))
    } else if has(0, b"hsqs") {
        Content::Filesystem(&["squashfs"])
    } else if u32_at(1024) == 0xE0F5_E1E2 {
        Content::Filesystem(&["erofs"])
    } else if u32_at(1024) == 0xF2F5_2010 {
        Content::Filesystem(&["f2fs"])
    } else if has(3, b"EXFAT   ") {
        Content::Filesystem(&["exfat"])
    } else if has(3, b"NTFS    ") {
        Content::Filesystem(&["ntfs3", "ntfs"])
    } else if has(510, &[0x55, 0xAA]) && (has(54, b"FAT") || has(82, b"FAT32")) {
        Content::Filesystem(&["vfat", "msdos"])
    } else if has(0, b"LUKS\xba\xbe") {
        Content::Other("a LUKS encrypted volume")
    } else if has(512, b"LABELONE") {
        Content::Other("an LVM physical volume")
    } else if has(4086, b"SWAPSPACE2") {
        Content::Other("swap space")
    } else if has(512, b"EFI PART") || (has(510, &[0x55, 0xAA]) && partitions(head)) {
        Content::Other("a partition table")
    } else if has(0x8001, b"CD001") {
        // After the partition tables: a hybrid image has both, and as a whole it mounts as a CD. It
        // comes last because a partition table is what it was attached for more often.
        Content::Filesystem(&["iso9660"])
    } else {
        Content::Unknown
    }
}

/// Which driver an ext filesystem asks for, by its feature words.
fn ext(compat: u32, incompat: u32, ro_compat: u32) -> Content {
    const HAS_JOURNAL: u32 = 0x4;
    // What ext3 knows; any other feature is ext4's.
    const EXT3_INCOMPAT: u32 = 0x2 | 0x4 | 0x10; // filetype, recover, meta_bg
    const EXT3_RO_COMPAT: u32 = 0x1 | 0x2 | 0x4; // sparse_super, large_file, btree_dir
    if incompat & !EXT3_INCOMPAT != 0 || ro_compat & !EXT3_RO_COMPAT != 0 {
        Content::Filesystem(&["ext4"])
    } else if compat & HAS_JOURNAL != 0 {
        Content::Filesystem(&["ext3", "ext4"])
    } else {
        Content::Filesystem(&["ext2", "ext4"])
    }
}

/// Is there a used entry in a master boot record, and none with an impossible status?
fn partitions(head: &[u8]) -> bool {
    let entries = (0..4).filter_map(|i| head.get(446 + i * 16..462 + i * 16));
    let mut used = false;
    for entry in entries {
        if entry[0] & 0x7F != 0 {
            return false;
        }
        used |= entry[4] != 0;
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(marks: &[(usize, &[u8])]) -> Content {
        let mut head = vec![0; HEAD];
        for (at, bytes) in marks {
            head[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        recognise(&head)
    }

    #[test]
    fn magic_numbers_are_known() {
        assert_eq!(with(&[]), Content::Unknown);
        assert_eq!(with(&[(0, b"XFSB")]), Content::Filesystem(&["xfs"]));
        assert_eq!(
            with(&[(0x438, &[0x53, 0xEF])]),
            Content::Filesystem(&["ext2", "ext4"])
        );
        assert_eq!(
            with(&[(0x438, &[0x53, 0xEF]), (0x460, &[0x40])]),
            Content::Filesystem(&["ext4"])
        );
        assert_eq!(
            with(&[(510, &[0x55, 0xAA]), (446 + 4, &[0x83])]),
            Content::Other("a partition table")
        );
        assert_eq!(
            with(&[(510, &[0x55, 0xAA]), (54, b"FAT16")]),
            Content::Filesystem(&["vfat", "msdos"])
        );
    }
}
