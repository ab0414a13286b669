//! What both disks do, and what only a real one can be asked.

use super::{K4, contents, kind, names};
use forkdisk::{
    error::Kind,
    io::{
        Access, Dir, EntryKind,
        count::{Counting, Counts},
        os::OsDir,
        sim::SimDisk,
    },
};
use std::sync::Arc;

/// Runs a test on a fresh real directory and on a fresh imaginary disk.
fn both(test: impl Fn(Arc<dyn Dir>)) {
    let temp = tempfile::tempdir().unwrap();
    test(Arc::new(OsDir::open(temp.path()).unwrap()));
    test(SimDisk::new(1).root());
}

#[test]
fn files_hold_what_was_written() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        assert!(file.is_empty().unwrap());
        file.write_at(b"hello", 3).unwrap();
        assert_eq!(contents(&file), b"\0\0\0hello");
        let long: Vec<u8> = (0..3 * K4 + 77).map(|i| (i % 251) as u8).collect();
        file.write_at(&long, 4000).unwrap();
        assert_eq!(file.len().unwrap(), (4000 + long.len()) as u64);
        let again = dir.open("f", Access::Read).unwrap();
        assert_eq!(contents(&again)[4000..], long);
        assert_eq!(contents(&again)[..8], *b"\0\0\0hello");
        file.write_at(b"", 1 << 40).unwrap();
        assert_eq!(file.len().unwrap(), (4000 + long.len()) as u64);
        file.sync().unwrap();
        again.sync().unwrap();
        file.start_writeback(0, 100);
        file.await_writeback(0, 100);
        file.await_writeback(u64::MAX, 2);
        assert_eq!(file.path(), dir.path().join("f"));
    });
}

#[test]
fn a_read_past_the_end_is_corruption_and_says_where() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        file.write_at(&[1; 100], 0).unwrap();
        let mut buf = [0; 50];
        file.read_at(&mut buf, 50).unwrap();
        for at in [51, 100, 1 << 40, u64::MAX - 3] {
            let e = file.read_at(&mut buf, at).unwrap_err();
            assert_eq!(e.kind(), Kind::Corrupt);
            let text = e.to_string();
            assert!(text.contains(&file.path().display().to_string()), "{text}");
            assert!(text.contains(&format!("{at:#x}")), "{text}");
        }
        file.read_at(&mut [], 100).unwrap();
        assert_eq!(kind(file.map(90, 11)), Kind::Corrupt);
    });
}

#[test]
fn lengths_change_and_what_is_added_is_zero() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        file.write_at(&[9; 2 * K4], 0).unwrap();
        file.set_len(100).unwrap();
        file.set_len(3 * K4 as u64).unwrap();
        let bytes = contents(&file);
        assert!(bytes[..100].iter().all(|b| *b == 9));
        assert!(bytes[100..].iter().all(|b| *b == 0));
        assert_eq!(kind(file.set_len(u64::MAX)), Kind::Invalid);
        assert_eq!(kind(file.write_at(b"x", i64::MAX as u64)), Kind::Invalid);
    });
}

#[test]
fn holes_are_zero_and_free() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        let far = 64 << 20;
        file.write_at(&[5; 4 * K4], 0).unwrap();
        file.write_at(&[6; K4], far).unwrap();
        file.sync().unwrap();
        let all = file.allocated().unwrap();
        assert!(((5 * K4) as u64..1 << 20).contains(&all), "{all}");
        file.punch(100, 3 * K4 as u64 - 100).unwrap();
        assert_eq!(file.len().unwrap(), far + K4 as u64);
        file.sync().unwrap();
        assert!(file.allocated().unwrap() <= all - 2 * K4 as u64);
        let mut bytes = vec![1; 4 * K4];
        file.read_at(&mut bytes, 0).unwrap();
        assert!(bytes[..100].iter().all(|b| *b == 5));
        assert!(bytes[100..3 * K4].iter().all(|b| *b == 0));
        assert!(bytes[3 * K4..].iter().all(|b| *b == 5));

        let ranges = file.data_ranges(50, far + 100).unwrap();
        let covers = |at: u64| ranges.iter().any(|(a, n)| (*a..a + n).contains(&at));
        assert!(covers(50) && covers(99) && covers(4 * K4 as u64 - 1) && covers(far + 149));
        assert!(!covers(49) && !covers(far + 150) && !covers(32 << 20));
        assert!(ranges.is_sorted());
        assert_eq!(file.data_ranges(far + K4 as u64, 1 << 30).unwrap(), []);
        assert_eq!(file.data_ranges(0, 0).unwrap(), []);
        file.punch(0, 0).unwrap();
        assert_eq!(kind(file.punch(1, u64::MAX)), Kind::Invalid);
    });
}

#[test]
fn reserved_space_changes_neither_contents_nor_length() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        file.write_at(&[5; 10], 0).unwrap();
        file.allocate(0, 1 << 20).unwrap();
        assert_eq!(contents(&file), [5; 10]);
        assert!(file.allocated().unwrap() >= 1 << 20);
        file.set_len(1 << 20).unwrap();
        assert!(contents(&file)[10..].iter().all(|b| *b == 0));
        file.allocate(0, 0).unwrap();
    });
}

#[test]
fn maps_show_a_range() {
    both(|dir| {
        let file = dir.open("f", Access::CreateNew).unwrap();
        let bytes: Vec<u8> = (0..3 * K4).map(|i| (i % 253) as u8).collect();
        file.write_at(&bytes, 0).unwrap();
        for (at, len) in [(0, 3 * K4), (K4, K4), (77, 5000), (3 * K4, 0)] {
            assert_eq!(*file.map(at as u64, len).unwrap(), bytes[at..at + len]);
        }
    });
}

#[test]
fn names_are_single_components() {
    both(|dir| {
        let long = "x".repeat(256);
        for bad in ["", ".", "..", "a/b", "/", "a\0b", &long] {
            assert_eq!(kind(dir.open(bad, Access::Read)), Kind::Invalid);
            assert_eq!(kind(dir.open(bad, Access::CreateNew)), Kind::Invalid);
            assert_eq!(kind(dir.subdir(bad)), Kind::Invalid);
            assert_eq!(kind(dir.create_dir(bad)), Kind::Invalid);
            assert_eq!(kind(dir.entry(bad)), Kind::Invalid);
            assert_eq!(kind(dir.rename(bad, "x")), Kind::Invalid);
            assert_eq!(kind(dir.rename_new("x", bad)), Kind::Invalid);
            assert_eq!(kind(dir.remove(bad)), Kind::Invalid);
            assert_eq!(kind(dir.remove_dir(bad)), Kind::Invalid);
        }
        dir.create_dir(&long[..255]).unwrap();
        dir.create_dir("name with ünïcode").unwrap();
    });
}

#[test]
fn names_come_and_go() {
    both(|dir| {
        dir.open("a", Access::CreateNew)
            .unwrap()
            .write_at(b"a", 0)
            .unwrap();
        dir.open("b", Access::CreateNew)
            .unwrap()
            .write_at(b"bb", 0)
            .unwrap();
        dir.create_dir("d").unwrap();
        let sub = dir.subdir("d").unwrap();
        sub.open("inner", Access::CreateNew).unwrap();
        assert_eq!(names(&dir), ["a", "b", "d"]);
        assert_eq!(names(&sub), ["inner"]);
        assert_eq!(dir.entry("a").unwrap(), Some(EntryKind::File));
        assert_eq!(dir.entry("d").unwrap(), Some(EntryKind::Dir));
        assert_eq!(dir.entry("none").unwrap(), None);

        assert_eq!(kind(dir.open("none", Access::Write)), Kind::NotFound);
        assert_eq!(kind(dir.open("a", Access::CreateNew)), Kind::Exists);
        assert_eq!(kind(dir.create_dir("a")), Kind::Exists);
        assert_eq!(kind(dir.subdir("none")), Kind::NotFound);
        assert_eq!(kind(dir.subdir("a")), Kind::Corrupt);
        assert_eq!(kind(dir.open("d", Access::Read)), Kind::Corrupt);
        assert_eq!(kind(dir.open("d", Access::Write)), Kind::Corrupt);
        assert_eq!(kind(dir.remove("d")), Kind::Corrupt);
        assert_eq!(kind(dir.remove_dir("a")), Kind::Corrupt);
        assert_eq!(kind(dir.remove_dir("d")), Kind::Busy);
        assert_eq!(kind(dir.remove("none")), Kind::NotFound);
        assert_eq!(kind(dir.rename("none", "x")), Kind::NotFound);
        assert_eq!(kind(dir.rename_new("a", "b")), Kind::Exists);
        assert_eq!(kind(dir.rename("a", "d")), Kind::Corrupt);
        assert_eq!(kind(dir.rename("d", "a")), Kind::Corrupt);

        let old_b = dir.open("b", Access::Read).unwrap();
        dir.rename("a", "b").unwrap();
        assert_eq!(names(&dir), ["b", "d"]);
        assert_eq!(contents(&dir.open("b", Access::Read).unwrap()), b"a");
        assert_eq!(contents(&old_b), b"bb", "an open file outlives its name");
        dir.rename_new("b", "c").unwrap();
        dir.rename("c", "c").unwrap();
        dir.rename("d", "e").unwrap();
        assert_eq!(names(&sub), ["inner"], "a handle follows the directory");
        sub.remove("inner").unwrap();
        dir.remove_dir("e").unwrap();
        assert_eq!(kind(sub.open("x", Access::CreateNew)), Kind::NotFound);
        dir.remove("c").unwrap();
        assert_eq!(names(&dir), [""; 0]);
        dir.sync().unwrap();
        dir.sync_filesystem().unwrap();
    });
}

#[test]
fn a_file_opened_for_reading_is_not_changed() {
    both(|dir| {
        dir.open("f", Access::CreateNew)
            .unwrap()
            .write_at(b"abc", 0)
            .unwrap();
        let file = dir.open("f", Access::Read).unwrap();
        assert_eq!(kind(file.write_at(b"x", 0)), Kind::ReadOnly);
        assert_eq!(kind(file.set_len(0)), Kind::ReadOnly);
        assert_eq!(kind(file.punch(0, 1)), Kind::ReadOnly);
        assert_eq!(kind(file.allocate(0, 1)), Kind::ReadOnly);
        assert_eq!(contents(&file), b"abc");
    });
}

#[test]
fn locks_belong_to_an_open_file() {
    both(|dir| {
        let a = dir.open("f", Access::CreateNew).unwrap();
        let b = dir.open("f", Access::Write).unwrap();
        let c = dir.open("f", Access::Read).unwrap();
        a.lock(true).unwrap();
        a.lock(true).unwrap();
        assert_eq!(kind(b.lock(true)), Kind::Busy);
        assert_eq!(kind(c.lock(false)), Kind::Busy);
        a.lock(false).unwrap();
        c.lock(false).unwrap();
        assert_eq!(kind(b.lock(true)), Kind::Busy);
        // Asking for more than can be had costs what one had.
        assert_eq!(kind(a.lock(true)), Kind::Busy);
        c.lock(true).unwrap();
        let c2 = c.clone();
        drop(c);
        assert_eq!(kind(a.lock(false)), Kind::Busy);
        drop(c2);
        a.lock(true).unwrap();
    });
}

#[test]
fn counts_are_exact() {
    both(|dir| {
        let counting = Counting::new(dir);
        let dir: Arc<dyn Dir> = Arc::new(counting.clone());
        dir.create_dir("d").unwrap();
        let sub = dir.subdir("d").unwrap();
        let file = sub.open("f", Access::CreateNew).unwrap();
        let before = counting.counts();
        let opened = Counts {
            creates: 2,
            ..Counts::default()
        };
        assert_eq!(before, opened);
        file.write_at(&[0; 5000], 0).unwrap();
        file.write_at(&[0; 96], 5000).unwrap();
        file.sync().unwrap();
        file.read_at(&mut [0; 10], 0).unwrap();
        file.punch(0, 4096).unwrap();
        file.allocate(0, 4096).unwrap();
        file.set_len(1).unwrap();
        sub.rename("f", "g").unwrap();
        sub.rename_new("g", "h").unwrap();
        assert!(file.read_at(&mut [0; 10], 1).is_err());
        sub.sync().unwrap();
        dir.sync_filesystem().unwrap();
        let expected = Counts {
            reads: 2,
            writes: 2,
            bytes_read: 20,
            bytes_written: 5096,
            syncs: 1,
            dir_syncs: 1,
            fs_syncs: 1,
            renames: 2,
            set_lens: 1,
            punches: 1,
            allocations: 1,
            ..Counts::default()
        };
        assert_eq!(counting.counts() - before, expected);
    });
}

// ---- the real disk ----

#[test]
fn nothing_but_files_is_opened_and_no_symlink_followed() {
    use rustix::fs::{CWD, FileType, Mode, mknodat, symlinkat};
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let dir = OsDir::open(temp.path()).unwrap();
    std::fs::write(at("secret"), "x").unwrap();
    symlinkat("secret", CWD, at("link")).unwrap();
    symlinkat("/", CWD, at("dirlink")).unwrap();
    symlinkat("nowhere", CWD, at("dangling")).unwrap();
    let fifo = FileType::Fifo;
    mknodat(CWD, at("fifo"), fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for name in ["link", "dirlink", "dangling", "fifo", "socket"] {
        for access in [Access::Read, Access::Write] {
            let e = dir.open(name, access).err().unwrap();
            assert_eq!(e.kind(), Kind::Corrupt, "{name}: {e}");
            assert!(e.to_string().contains(name), "{e}");
        }
        assert_eq!(kind(dir.open(name, Access::CreateNew)), Kind::Exists);
        assert_eq!(kind(dir.subdir(name)), Kind::Corrupt);
        assert_eq!(dir.entry(name).unwrap(), Some(EntryKind::Other));
    }
    assert!(!at("nowhere").exists());
    let others = dir.list().unwrap();
    let others = others.iter().filter(|(_, kind)| *kind == EntryKind::Other);
    assert_eq!(others.count(), 5);
}

#[test]
fn new_files_are_the_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("x/y/z");
    let dir = OsDir::create(&path).unwrap();
    OsDir::create(&path).unwrap();
    let file = dir.open("f", Access::CreateNew).unwrap();
    dir.create_dir("d").unwrap();
    let mode = |p: &str| {
        let at = temp.path().join(p);
        at.metadata().unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("x"), 0o700);
    assert_eq!(mode("x/y/z"), 0o700);
    assert_eq!(mode("x/y/z/d"), 0o700);
    assert_eq!(mode("x/y/z/f"), 0o600);
    let flags = rustix::fs::fcntl_getfl(file.fd().unwrap()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    let none = temp.path().join("none");
    assert_eq!(kind(OsDir::open(&none)), Kind::NotFound);
    assert_eq!(kind(OsDir::create(&path.join("f"))), Kind::Corrupt);
    assert_eq!(kind(OsDir::create(&path.join("f/g"))), Kind::Corrupt);
}

#[test]
fn names_that_are_no_text_are_shown_and_not_opened() {
    use std::os::unix::ffi::OsStrExt;
    let temp = tempfile::tempdir().unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    std::fs::write(temp.path().join(odd), "x").unwrap();
    let dir = OsDir::open(temp.path()).unwrap();
    let odd = ("odd\u{fffd}".to_string(), EntryKind::Other);
    assert_eq!(dir.list().unwrap(), [odd]);
}
