//! Disks as exports of a socket. The client is our own, so that it can do what no other does; `tests/e2e` has QEMU's.

use crate::{
    disks::MemDisk,
    nbd_client::{self as client, *},
    rig::{Random, eventually},
};
use forkdisk::{
    disk::Disk,
    error::Kind,
    serve::{
        files::Files,
        nbd::{Exports, Users},
    },
    sys::process::Process,
};
use parking_lot::Mutex;
use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::PathBuf,
    sync::{Arc, atomic::Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ESHUTDOWN: u32 = 108;

/// A socket with what it exports.
struct Door {
    files: Arc<Files>,
    exports: Arc<Exports>,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Door {
    fn new() -> Door {
        Door::telling(|_, _| {})
    }
    fn telling(tell: impl Fn(u64, &[Process]) + Send + Sync + 'static) -> Door {
        let dir = tempfile::Builder::new()
            .prefix("forkdisk-nbd.")
            .tempdir()
            .unwrap();
        let files = Arc::new(Files::new());
        let exports = Exports::new(Arc::clone(&files), tell);
        let socket = dir.path().join("nbd.sock");
        exports.listen(&socket, &socket).unwrap();
        Door {
            files,
            exports,
            socket,
            _dir: dir,
        }
    }
    fn with(name: &str, disk: &Arc<MemDisk>) -> (Door, u64) {
        let door = Door::new();
        let ino = door.show(name, disk);
        (door, ino)
    }
    fn show(&self, name: &str, disk: &Arc<MemDisk>) -> u64 {
        let ino = self
            .files
            .add(name, Arc::clone(disk) as Arc<dyn Disk>)
            .unwrap();
        self.exports.show(ino);
        ino
    }
    fn connect(&self, name: &str, structured: bool) -> Nbd {
        Nbd::connect(&self.socket, name, structured).unwrap()
    }
}

fn disk(mib: u64) -> Arc<MemDisk> {
    Arc::new(MemDisk::new(mib << 20))
}

/// The other side has closed the connection.
fn is_cut(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

/// Requests of all kinds, many at a time, over two connections: each place is in one request at a time.
fn all_kinds(structured: bool) {
    const SIZE: usize = 8 * MIB;
    const PARTS: usize = 8;
    let (door, _) = Door::with("d", &disk(8));
    let mut links = [door.connect("d", structured), door.connect("d", structured)];
    assert_eq!(links[0].size, SIZE as u64);
    let mut model = vec![0u8; SIZE];
    let mut random = Random::new("nbd::any_request");
    for round in 0..120 {
        // Each in a part of its own, in any order. All fits into the buffers of the sockets, as nobody reads meanwhile.
        let mut sent = Vec::new();
        let part = SIZE / PARTS;
        for n in 0..PARTS {
            let link = random.below(2) as usize;
            // Now and then what is longer than a piece: alone, then.
            let whole = round % 40 == 39;
            let (at, len) = match whole {
                true if n > 0 => continue,
                true => (random.below(MIB as u64) as usize, 5 * MIB + 777),
                false => {
                    let most = [9, 5000, 12_000][random.below(3) as usize];
                    let len = 1 + random.below(most) as usize;
                    (n * part + random.below((part - len) as u64) as usize, len)
                }
            };
            let flags = if random.below(4) == 0 { FUA } else { 0 };
            let mut data = vec![0; len];
            let command = [READ, READ, WRITE, WRITE, TRIM, WRITE_ZEROES, CACHE, FLUSH]
                [random.below(8) as usize];
            let place = &mut model[at..at + len];
            let expected = match command {
                READ => place.to_vec(),
                WRITE => {
                    random.fill(&mut data);
                    place.copy_from_slice(&data);
                    Vec::new()
                }
                TRIM | WRITE_ZEROES => {
                    place.fill(0);
                    Vec::new()
                }
                _ => Vec::new(),
            };
            let data = if command == WRITE { &data[..] } else { b"" };
            let (at, len) = if command == FLUSH {
                (0, 0)
            } else {
                (at as u64, len)
            };
            let cookie = links[link].send(command, flags, at, len, data).unwrap();
            sent.push((link, cookie, expected));
        }
        for (n, link) in links.iter_mut().enumerate() {
            let mut waiting: BTreeMap<u64, Vec<u8>> = sent
                .iter()
                .filter(|(of, ..)| *of == n)
                .map(|(_, cookie, expected)| (*cookie, expected.clone()))
                .collect();
            while !waiting.is_empty() {
                let (cookie, answer) = link.receive().unwrap();
                let expected = waiting
                    .remove(&cookie)
                    .expect("an answer to what was asked");
                assert!(answer.unwrap() == expected, "round {round}");
            }
        }
    }
    let all = links[1].read(0, SIZE).unwrap();
    assert!(all == model);
}

#[test]
fn any_request_does_what_it_says() {
    all_kinds(true);
}

#[test]
fn any_request_does_what_it_says_with_simple_replies() {
    all_kinds(false);
}

#[test]
fn an_answer_says_what_was_done() {
    let mem = disk(8);
    let (door, _) = Door::with("d", &mem);
    let end = 8 * MIB as u64;
    for structured in [true, false] {
        let mut link = door.connect("d", structured);
        link.write(0, &[7; 5000]).unwrap();
        let flushes = mem.asked.flushes.load(SeqCst);
        link.call(WRITE, FUA, 0, 10, &[7; 10]).unwrap().unwrap();
        assert_eq!(mem.asked.flushes.load(SeqCst), flushes + 1);
        link.call(WRITE_ZEROES, FUA, 100, 10, b"").unwrap().unwrap();
        link.call(WRITE, FUA, 0, 3 * MIB, &vec![7; 3 * MIB])
            .unwrap()
            .unwrap();
        link.flush().unwrap();
        assert_eq!(mem.asked.flushes.load(SeqCst), flushes + 4);
        assert!(mem.asked.zeroes.lock().contains(&(100, 10)));
        // Out of bounds, by a byte and by the whole number.
        for (at, len) in [
            (end, 1),
            (end - 1, 2),
            (u64::MAX, 5),
            (0, 0),
            (end - 100, 2 * MIB),
            (u64::MAX - 10, 2 * MIB),
        ] {
            assert_eq!(link.read(at, len), Err(EINVAL), "{at} {len}");
            assert_eq!(link.write(at, &vec![1; len]), Err(ENOSPC), "{at} {len}");
            for (command, error) in [(TRIM, EINVAL), (WRITE_ZEROES, ENOSPC), (CACHE, EINVAL)] {
                let answer = link.call(command, 0, at, len, b"").unwrap();
                assert_eq!(answer, Err(error), "{at} {len}");
            }
        }
        assert_eq!(link.call(99, 0, 0, 1, b"").unwrap(), Err(EINVAL));
        // Flags that a command does not have.
        for (command, known) in [
            (READ, FUA | DONT_FRAGMENT),
            (WRITE, FUA),
            (FLUSH, FUA),
            (TRIM, FUA),
            (CACHE, FUA),
            (WRITE_ZEROES, FUA | NO_HOLE | FAST_ZERO),
        ] {
            for flag in (0..16).map(|bit| 1 << bit) {
                let (len, data) = match command {
                    FLUSH => (0, &b""[..]),
                    WRITE => (1, &b"\x07"[..]),
                    _ => (1, &b""[..]),
                };
                let at = if command == READ || command == WRITE {
                    0
                } else {
                    end - 1
                };
                let done = link.call(command, flag, at, len, data).unwrap();
                match flag & known {
                    0 => assert_eq!(done, Err(EINVAL), "{command} {flag:#x}"),
                    _ => drop(done.unwrap()),
                }
            }
        }
        *mem.fail.lock() = Some(Kind::Io);
        assert_eq!(link.read(0, 4096), Err(EIO));
        assert_eq!(link.read(0, 3 * MIB), Err(EIO));
        assert_eq!(link.write(0, &[1]), Err(EIO));
        assert_eq!(link.write(0, &vec![1; 3 * MIB]), Err(EIO));
        assert_eq!(link.flush(), Err(EIO));
        *mem.fail.lock() = Some(Kind::NoSpace);
        assert_eq!(link.write(0, &[1]), Err(ENOSPC));
        *mem.fail.lock() = None;
        assert!(
            link.read(0, 3 * MIB).unwrap()[..100] == [7; 100],
            "and it goes on"
        );
        let long = link.call(READ, DONT_FRAGMENT, 0, 3 * MIB, b"").unwrap();
        match structured {
            true => assert_eq!(long, Err(EOVERFLOW)),
            false => assert_eq!(long.unwrap().len(), 3 * MIB),
        }
        assert_eq!(
            link.call(READ, DONT_FRAGMENT, 0, MIB, b"")
                .unwrap()
                .unwrap()
                .len(),
            MIB
        );
    }
}

#[test]
fn what_is_written_nowhere_is_told() {
    let (door, _) = Door::with("d", &disk(64));
    let mut link = door.connect("d", true);
    link.write(10 << 20, &[1; 8192]).unwrap();
    link.write((10 << 20) + 8192, &[1; 100]).unwrap();
    let data = (10 << 20) as u32;
    let all = vec![
        (data, true),
        (12288, false),
        ((64 << 20) - data - 12288, true),
    ];
    assert_eq!(link.status(0, 0, 64 << 20).unwrap(), all);
    assert_eq!(link.status(ONE, 0, 64 << 20).unwrap(), all[..1]);
    // Clipped to what was asked, however it lies in its blocks.
    let asked = (10 << 20) - 5;
    assert_eq!(link.status(0, asked, 10).unwrap(), [(5, true), (5, false)]);
    assert_eq!(link.status(0, 64 << 20, 1), Err(EINVAL));
    // Of very many as many as fit.
    for n in 0..5000 {
        link.write(n * 8192, &[1]).unwrap();
    }
    let found = link.status(0, 0, 64 << 20).unwrap();
    assert_eq!(found.len(), 4096);
    // But for what is written side by side.
    assert_eq!(found.iter().filter(|(len, _)| *len != 4096).count(), 1);
    let mut simple = door.connect("d", false);
    assert_eq!(
        simple.call(BLOCK_STATUS, 0, 0, 4096, b"").unwrap(),
        Err(EINVAL)
    );
}

#[test]
fn what_can_only_be_read_is_not_written() {
    let mut mem = MemDisk::new(1 << 20);
    mem.read_only = true;
    let (door, _) = Door::with("snap@1", &Arc::new(mem));
    let mut link = door.connect("snap@1", true);
    assert_eq!(
        link.flags & 0b110_0010,
        2,
        "read-only, neither TRIM nor WRITE_ZEROES"
    );
    assert_eq!(link.write(0, &[1]), Err(EPERM));
    assert_eq!(link.write(0, &vec![1; MIB]), Err(EPERM));
    for command in [TRIM, WRITE_ZEROES] {
        assert_eq!(link.call(command, 0, 0, 4096, b"").unwrap(), Err(EPERM));
    }
    link.flush().unwrap();
    assert!(link.read(0, MIB).unwrap() == vec![0; MIB]);
}

#[test]
fn exports_are_what_is_shown() {
    let door = Door::new();
    let mode = fs::metadata(&door.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let ino = door.show("a", &disk(1));
    door.show("b@x", &disk(2));
    door.files.add("hidden", disk(3)).unwrap();
    let mut stream = greet(&door.socket).unwrap();
    // An option that nobody knows, one with data that it must not have, and names that are no exports.
    ask(&mut stream, 5, b"").unwrap();
    assert_eq!(hear(&mut stream, 5).unwrap().0, 0x8000_0001);
    ask(&mut stream, STRUCTURED, b"x").unwrap();
    assert_eq!(hear(&mut stream, STRUCTURED).unwrap().0, 0x8000_0003);
    for name in ["", "c", "hidden", "a/b", "A"] {
        assert_eq!(go(&mut stream, name).unwrap(), Err(0x8000_0006), "{name}");
    }
    ask(&mut stream, GO, b"\0\0\0\x09abc").unwrap();
    assert_eq!(hear(&mut stream, GO).unwrap().0, 0x8000_0003);
    ask(&mut stream, 3, b"").unwrap();
    let mut names = Vec::new();
    loop {
        match hear(&mut stream, 3).unwrap() {
            (2, name) => names.push(name),
            (kind, _) => break assert_eq!(kind, 1),
        }
    }
    assert_eq!(names, [client::string("a"), client::string("b@x")]);
    assert_eq!(door.exports.connections(ino, Duration::ZERO), 0);
    assert_eq!(go(&mut stream, "a").unwrap().unwrap().0, 1 << 20);
    assert_eq!(door.exports.connections(ino, Duration::ZERO), 1);
    assert_eq!(
        door.exports.hide_unused(ino, true),
        Err(Users::Connected(1))
    );
    // The old way to choose, and its zeroes.
    let mut old = UnixStream::connect(&door.socket).unwrap();
    old.read_exact(&mut [0; 18]).unwrap();
    old.write_all(&1u32.to_be_bytes()).unwrap();
    ask(&mut old, 1, b"b@x").unwrap();
    let mut told = [0; 134];
    old.read_exact(&mut told).unwrap();
    assert_eq!(told[..8], (2u64 << 20).to_be_bytes());
    assert_eq!(told[10..], [0; 124]);
    let mut wrong = greet(&door.socket).unwrap();
    ask(&mut wrong, 1, b"c").unwrap();
    assert!(is_cut(&mut wrong));
    // Who leaves is no longer counted.
    drop(stream);
    assert_eq!(door.exports.connections(ino, Duration::from_secs(10)), 0);
    door.exports.hide_unused(ino, false).unwrap();
    assert!(Nbd::connect(&door.socket, "a", false).is_err());
    door.exports.show(ino);
    assert!(Nbd::connect(&door.socket, "a", false).is_ok());
}

#[test]
fn whoever_speaks_something_else_is_cut_off() {
    let (door, ino) = Door::with("d", &disk(1));
    let mut good = door.connect("d", true);
    let mut random = Random::new("whoever_speaks_something_else");
    for n in 0..200 {
        let mut noise = vec![0; 1 + random.below(300) as usize];
        random.fill(&mut noise);
        let mut bad = match n % 4 {
            // Before the greeting, in it, and after it.
            0 => UnixStream::connect(&door.socket).unwrap(),
            1 => greet(&door.socket).unwrap(),
            2 => {
                let mut stream = greet(&door.socket).unwrap();
                // A known option with random data.
                let _ = ask(&mut stream, 1 + random.below(11) as u32, &noise);
                stream
            }
            _ => door.connect("d", n % 8 == 3).stream,
        };
        let _ = bad.write_all(&noise);
    }
    // A magic number that is wrong, data of a length that no piece has, and half a request.
    let mut bad = door.connect("d", true);
    bad.stream.write_all(&[0x25; 28]).unwrap();
    assert!(is_cut(&mut bad.stream));
    let mut bad = door.connect("d", true);
    bad.send(WRITE, 0, 0, 33 << 20, b"").unwrap();
    assert!(is_cut(&mut bad.stream));
    let mut half = door.connect("d", true);
    half.send(WRITE, 0, 0, 4096, &[9; 4095]).unwrap();
    drop(half);
    // Whoever leaves is let go, whatever the others of its threads are about.
    for _ in 0..200 {
        let mut left = door.connect("d", true);
        left.flush().unwrap();
        left.send(DISCONNECT, 0, 0, 0, b"").unwrap();
        assert!(is_cut(&mut left.stream));
    }
    let mut left = door.connect("d", true);
    left.send(DISCONNECT, 0, 0, 0, b"").unwrap();
    assert!(is_cut(&mut left.stream));
    // All that is gone leaves nothing, and who behaves notices nothing.
    eventually("the others are gone", || {
        door.exports.connections(ino, Duration::ZERO) == 1 && door.exports.peers() == 1
    });
    assert!(
        good.read(0, MIB).unwrap() == vec![0; MIB],
        "nothing was written"
    );
}

#[test]
fn a_disk_that_is_taken_away_ends_its_connections() {
    let (door, ino) = Door::with("d", &disk(1));
    let other = door.show("e", &disk(1));
    let mut link = door.connect("d", true);
    let mut stays = door.connect("e", true);
    link.write(0, &[1; 4096]).unwrap();
    door.files.remove(ino).unwrap();
    assert_eq!(link.read(0, 4096), Err(ESHUTDOWN));
    door.exports.hide(ino);
    assert!(is_cut(&mut link.stream));
    assert!(stays.read(0, 4096).is_ok());
    assert_eq!(door.exports.connections(other, Duration::ZERO), 1);
    door.exports.stop();
    assert!(is_cut(&mut stays.stream));
    assert!(UnixStream::connect(&door.socket).is_err(), "nobody listens");
}

#[test]
fn one_that_is_slow_keeps_no_other_waiting() {
    let mut slow = MemDisk::new(1 << 20);
    slow.read_delay = Duration::from_millis(200);
    let (door, _) = Door::with("d", &Arc::new(slow));
    let mut link = door.connect("d", true);
    let begun = Instant::now();
    for n in 0..16 {
        link.send(READ, 0, n * 4096, 4096, b"").unwrap();
    }
    // It comes last, and is done first.
    let quick = link.send(WRITE, 0, 512 << 10, 4096, &[1; 4096]).unwrap();
    assert_eq!(link.receive().unwrap().0, quick);
    for _ in 0..16 {
        link.receive().unwrap().1.unwrap();
    }
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "they were read at once"
    );
    // Also one that comes when the only thread of its connection waits for the disk. On a busy machine it may come too late for that, but not always.
    let first = (0..8).any(|_| {
        let mut link = door.connect("d", true);
        link.send(READ, 0, 0, 4096, b"").unwrap();
        thread::sleep(Duration::from_millis(20));
        let quick = link.send(WRITE, 0, 512 << 10, 4096, &[1; 4096]).unwrap();
        link.receive().unwrap().0 == quick
    });
    assert!(first, "nobody read on");
}

/// What writes leave is done after they were answered, and holds up nobody, also of the same connection.
#[test]
fn what_requests_leave_is_done_after_the_answer() {
    let mem = disk(8);
    let (door, _) = Door::with("d", &mem);
    let mut link = door.connect("d", true);
    let mut ask = |command, data: &[u8]| {
        let asked = link.send(command, 0, 0, 4096, data).unwrap();
        let (answered, outcome) = link.receive().unwrap();
        outcome.unwrap();
        assert_eq!(answered, asked);
    };
    ask(WRITE, &[1; 4096]);
    assert_eq!(mem.asked.tidied.load(SeqCst), 0, "nothing was left");
    mem.filling.store(true, SeqCst);
    let held = mem.untidy.lock();
    ask(WRITE, &[2; 4096]);
    mem.filling.store(false, SeqCst);
    for _ in 0..16 {
        ask(READ, b"");
        ask(WRITE, &[3; 4096]);
    }
    assert_eq!(mem.asked.tidied.load(SeqCst), 0);
    drop(held);
    eventually("what was left is done", || {
        mem.asked.tidied.load(SeqCst) == 1
    });
}

#[test]
fn a_write_that_waits_for_room_is_answered_when_there_is_some() {
    let mem = disk(8);
    let (door, ino) = Door::with("d", &mem);
    let zeros = 6 * MIB + 7;
    for structured in [true, false] {
        let mut link = door.connect("d", structured);
        link.write(6 * MIB as u64, &[4; 40_000]).unwrap();
        mem.full.store(true, SeqCst);
        let short = link.send(WRITE, FUA, 0, 4096, &[5; 4096]).unwrap();
        let long = link
            .send(WRITE, 0, MIB as u64, 3 * MIB + 5, &vec![6; 3 * MIB + 5])
            .unwrap();
        let part = link.send(WRITE_ZEROES, 0, zeros as u64, 20_000, b"");
        // Others are served.
        assert!(link.read(0, 4096).unwrap() == [0; 4096] || !structured);
        link.flush().unwrap();
        link.call(TRIM, 0, 0, 8192, b"").unwrap().unwrap();
        eventually("all wait", || door.exports.waiting(Some(ino)) == 3);
        assert_eq!(door.exports.waiting(Some(ino + 1)), 0);
        let flushes = mem.asked.flushes.load(SeqCst);
        mem.full.store(false, SeqCst);
        let mut answers: BTreeMap<_, _> = (0..3).map(|_| link.receive().unwrap()).collect();
        assert_eq!(answers.remove(&part.unwrap()), Some(Ok(vec![])));
        let mut expected = vec![4; 40_000];
        expected[7..20_007].fill(0);
        assert!(link.read(6 * MIB as u64, 40_000).unwrap() == expected);
        assert_eq!(answers.remove(&short), Some(Ok(vec![])));
        assert_eq!(answers.remove(&long), Some(Ok(vec![])));
        assert_eq!(mem.asked.flushes.load(SeqCst), flushes + 1);
        assert!(link.read(0, 4096).unwrap() == [5; 4096]);
        assert!(link.read(MIB as u64, 3 * MIB + 5).unwrap() == vec![6; 3 * MIB + 5]);
        eventually("none waits", || door.exports.waiting(None) == 0);
    }
    // Whoever leaves meanwhile is not waited for.
    mem.full.store(true, SeqCst);
    let mut link = door.connect("d", true);
    link.send(WRITE, 0, 0, 4096, &[8; 4096]).unwrap();
    eventually("it waits", || door.exports.waiting(None) == 1);
    drop(link);
    assert_eq!(door.exports.connections(ino, Duration::from_secs(10)), 0);
    mem.full.store(false, SeqCst);
    let mut link = door.connect("d", true);
    mem.full.store(true, SeqCst);
    link.send(WRITE, 0, 0, 4096, &[9; 4096]).unwrap();
    eventually("it waits", || door.exports.waiting(None) == 1);
    door.exports.stop();
    assert!(is_cut(&mut link.stream));
}

#[test]
fn long_writes_that_wait_for_room_share_the_memory_for_that() {
    const LEN: usize = 32 * MIB;
    let mem = disk(64);
    let (door, ino) = Door::with("d", &mem);
    mem.full.store(true, SeqCst);
    let data = vec![3; LEN];
    let wait = || {
        let mut link = door.connect("d", true);
        for at in [0, LEN as u64] {
            link.send(WRITE, 0, at, LEN, &data).unwrap();
        }
        eventually("both wait", || door.exports.waiting(Some(ino)) == 2);
        link
    };
    // Nine clients that are gone had more than there is for all.
    for _ in 0..9 {
        drop(wait());
        assert_eq!(door.exports.connections(ino, Duration::from_secs(10)), 0);
    }
    let mut link = wait();
    mem.full.store(false, SeqCst);
    for _ in 0..2 {
        link.receive().unwrap().1.unwrap();
    }
    assert!(link.read(2 * LEN as u64 - 10, 10).unwrap() == [3; 10]);
}

#[test]
fn what_was_answered_before_the_end_is_there() {
    const BLOCKS: u64 = 4 * 509;
    let mem = disk(8);
    let (door, _) = Door::with("d", &mem);
    let mut clients = Vec::new();
    for n in 0..4u64 {
        let mut link = door.connect("d", n % 2 == 0);
        clients.push(thread::spawn(move || {
            let mut answered = Vec::new();
            for round in 1.. {
                let block = n + 4 * (round * 7 % (BLOCKS / 4));
                let Ok(cookie) = link.send(WRITE, 0, block * 4096, 4096, &[round as u8; 4096])
                else {
                    break;
                };
                match link.receive() {
                    Ok((of, answer)) => {
                        assert_eq!((of, answer), (cookie, Ok(vec![])));
                        answered.push((block, round as u8));
                    }
                    Err(_) => break,
                }
            }
            answered
        }));
    }
    thread::sleep(Duration::from_millis(300));
    door.exports.stop();
    let mut last = BTreeMap::new();
    let mut count = 0;
    for client in clients {
        let answered = client.join().unwrap();
        count += answered.len();
        last.extend(answered);
    }
    assert!(count > 100, "{count}");
    for (block, byte) in last {
        let mut found = [0; 4096];
        mem.read(&mut found, block * 4096).unwrap();
        // The one that was not answered may be there too.
        let next = byte.wrapping_add((BLOCKS / 4) as u8);
        assert!(
            found == [byte; 4096] || found == [next; 4096],
            "block {block}"
        );
    }
}

#[test]
fn nothing_of_a_client_that_is_gone_comes_late() {
    const THREADS: u64 = 32;
    const WRITES: u64 = 45;
    let mut mem = MemDisk::new(1 << 20);
    mem.write_delay = Duration::from_millis(200);
    let mem = Arc::new(mem);
    let (door, ino) = Door::with("d", &mem);
    let mut first = door.connect("d", true);
    for n in 0..WRITES {
        first.send(WRITE, 0, n * 4096, 4096, &[1; 4096]).unwrap();
    }
    // As many as there are threads are under way, and the rest is not even read.
    eventually("they are under way", || {
        mem.asked.writes.load(SeqCst) >= THREADS
    });
    drop(first);
    let mut second = door.connect("d", true);
    let asked = mem.asked.writes.load(SeqCst);
    for n in 0..WRITES {
        second.send(WRITE, 0, n * 4096, 4096, &[2; 4096]).unwrap();
    }
    for _ in 0..WRITES {
        second.receive().unwrap().1.unwrap();
    }
    thread::sleep(Duration::from_millis(600));
    assert_eq!(mem.asked.writes.load(SeqCst), asked + WRITES);
    let all = second.read(0, (WRITES * 4096) as usize).unwrap();
    assert!(all.iter().all(|b| *b == 2));
    // Nor does anything go on after all are sent away.
    for n in 0..WRITES {
        second.send(WRITE, 0, n * 4096, 4096, &[3; 4096]).unwrap();
    }
    eventually("they are under way", || {
        mem.asked.writes.load(SeqCst) >= asked + WRITES + THREADS
    });
    door.exports.hide(ino);
    let (asked, mut now) = (mem.asked.writes.load(SeqCst), vec![0; 1 << 20]);
    mem.read(&mut now, 0).unwrap();
    thread::sleep(Duration::from_millis(600));
    let mut later = vec![0; 1 << 20];
    mem.read(&mut later, 0).unwrap();
    assert_eq!(mem.asked.writes.load(SeqCst), asked);
    assert!(now == later);
}

#[test]
fn nobody_connects_while_an_export_is_held() {
    let (door, ino) = Door::with("d", &disk(1));
    let link = door.connect("d", true);
    assert_eq!(door.exports.hold_unused(ino), Err(Users::Connected(1)));
    drop(link);
    assert_eq!(door.exports.connections(ino, Duration::from_secs(10)), 0);
    door.exports.hold_unused(ino).unwrap();
    door.exports.hold_unused(ino).unwrap();
    // Whoever else shows it does not end what others hold it for.
    door.exports.show(ino);
    door.exports.release(ino);
    assert!(Nbd::connect(&door.socket, "d", true).is_err());
    door.exports.release(ino);
    door.connect("d", true);
}

#[test]
fn who_used_an_export_before_is_expected_until_he_comes_or_ends() {
    let told = Arc::new(Mutex::new(Vec::<(u64, Vec<Process>)>::new()));
    let hears = Arc::clone(&told);
    let door = Door::telling(move |ino, who| hears.lock().push((ino, who.to_vec())));
    let ino = door.show("d", &disk(1));
    let other = door.show("e", &disk(1));
    let me = Process::of(std::process::id() as i32).unwrap();
    let mut sleeper = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let child = Process::of(sleeper.id() as i32).unwrap();
    let ended = Process {
        started: 1,
        ..child
    };
    door.exports.await_again(ino, &[me, child, ended]);
    door.exports.await_again(other, &[ended]);
    // Who has ended is not waited for.
    door.exports.hold_unused(other).unwrap();
    door.exports.release(other);
    let awaited = Err(Users::Expected(vec![me, child]));
    assert_eq!(door.exports.hold_unused(ino), awaited);
    assert_eq!(door.exports.hide_unused(ino, false), awaited);
    door.exports.look_after();
    assert_eq!(
        told.lock().split_off(0),
        [(ino, vec![me, child]), (other, vec![])]
    );

    // One comes.
    let link = door.connect("d", true);
    assert_eq!(door.exports.hold_unused(ino), Err(Users::Connected(1)));
    drop(link);
    assert_eq!(door.exports.connections(ino, Duration::from_secs(10)), 0);
    let awaited = Err(Users::Expected(vec![child]));
    assert_eq!(door.exports.hold_unused(ino), awaited);
    // That he came was told before he heard that he may, and that he left when he did.
    eventually("it is told", || *told.lock() == [(ino, vec![child])]);
    told.lock().clear();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    door.exports.look_after();
    assert_eq!(told.lock().split_off(0), [(ino, vec![])]);
    let (a, b) = (door.connect("d", true), door.connect("d", true));
    assert_eq!(told.lock().split_off(0), [(ino, vec![me])]);
    drop(a);
    door.exports.look_after();
    assert!(told.lock().is_empty());
    drop(b);
    eventually("it is told", || *told.lock() == [(ino, vec![])]);
    // Whichever thread finds out.
    let mut link = door.connect("d", true);
    link.flush().unwrap();
    link.flush().unwrap();
    drop(link);
    let all = [(ino, vec![]), (ino, vec![me]), (ino, vec![])];
    eventually("it is told", || *told.lock() == all);

    // Force passes over who is expected, not over who is there.
    door.exports.await_again(other, &[me]);
    let link = door.connect("e", true);
    door.exports.await_again(other, &[me]);
    assert_eq!(
        door.exports.hide_unused(other, true),
        Err(Users::Connected(1))
    );
    drop(link);
    assert_eq!(door.exports.connections(other, Duration::from_secs(10)), 0);
    door.exports.hide_unused(other, true).unwrap();
    door.exports.hold_unused(other).unwrap();
}
