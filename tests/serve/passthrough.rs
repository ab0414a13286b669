//! Files that the kernel reads by itself.

use crate::{
    disks::MemDisk,
    rig::{Random, Rig, root},
};
use forkdisk::{attach::LoopOptions, serve::fuse::Transport};
use std::{
    fs::File,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    sync::{Arc, atomic::Ordering::SeqCst},
};

const MIB: u64 = 1 << 20;

/// Whatever the disk in its place says: the kernel reads the file, and nobody gets to write to it.
#[test]
fn the_kernel_reads_the_file_and_nobody_writes_to_it() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    assert_eq!(rig.session.negotiated().transport(), Transport::Device);
    let image = tempfile::NamedTempFile::new().unwrap();
    let mut content = vec![0; MIB as usize];
    Random::new("the_kernel_reads_the_file").fill(&mut content);
    std::fs::write(image.path(), &content).unwrap();
    let backing = match rig.session.open_backing(image.as_file().as_fd()) {
        Ok(backing) => backing,
        Err(e) => {
            eprintln!("left out: {e}");
            return;
        }
    };
    // A disk that could be written, so that only the door stands in the way.
    let disk = Arc::new(MemDisk::new(MIB));
    let ino = rig
        .files
        .add_backed("image", disk.clone(), None, backing)
        .unwrap();
    let path = rig.dir.path().join("image");
    let mut got = vec![0; MIB as usize];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == content);
    // A second one, past the cache.
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut map = memmap2::MmapMut::map_anon(8192).unwrap();
    direct.read_exact_at(&mut map, 4096).unwrap();
    assert!(map[..] == content[4096..4096 + 8192]);
    assert_eq!(disk.asked.reads.load(SeqCst), 0, "the server was asked");
    for (write, append, truncate) in [
        (true, false, false),
        (false, true, false),
        (true, false, true),
    ] {
        let e = File::options()
            .write(write)
            .append(append)
            .truncate(truncate)
            .open(&path)
            .unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EROFS));
    }
    assert!(std::fs::read(image.path()).unwrap() == content);
    // A device over it, too.
    let options = LoopOptions {
        read_only: true,
        ..LoopOptions::default()
    };
    let device = crate::rig::Loop(forkdisk::attach::attach_loop(&path, options).unwrap());
    let through = File::open(device.device()).unwrap();
    through.read_exact_at(&mut got, 0).unwrap();
    assert!(got == content);
    assert_eq!(disk.asked.reads.load(SeqCst), 0, "the server was asked");
    drop((through, device));
    // Taken away: who has it open goes on, and the number is given back once.
    rig.files.remove(ino).unwrap();
    rig.session.close_backing(backing);
    rig.session.close_backing(backing);
    file.read_exact_at(&mut got[..512], 512).unwrap();
    assert_eq!(got[..512], content[512..1024]);
    assert!(File::open(&path).is_err());
}

#[test]
fn what_cannot_be_read_by_the_kernel_is_refused() {
    if !root() {
        return;
    }
    let rig = Rig::new();
    let (reader, _writer) = std::io::pipe().unwrap();
    let e = rig.session.open_backing(reader.as_fd()).unwrap_err();
    assert_eq!(e.kind(), forkdisk::error::Kind::Unsupported);
    assert!(e.hint_text().is_some());
}
