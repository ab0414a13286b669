//! Disks over NBD, with QEMU's tools and a client of our own.

use crate::{nbd_client::Nbd, rig::*};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

/// Attaches, and checks the URI that is printed. Returns it and the socket.
fn attach(w: &World, name: &str) -> (String, PathBuf) {
    let uri = w.ok(["attach", name, "--via", "nbd"]);
    let socket = w.store.join("run/nbd.sock");
    let told = uri.strip_prefix("nbd+unix:///").unwrap();
    let (export, path) = told.split_once("?socket=").unwrap();
    assert_eq!((export, Path::new(path)), (name, socket.as_path()));
    (uri, socket)
}

fn qemu_io<const N: usize>(uri: &str, commands: [&str; N]) -> String {
    let mut args = vec!["-f", "raw"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(uri);
    let told = tool("qemu-io", args);
    assert!(!told.contains("failed"), "{told}");
    told
}

#[test]
fn a_disk_over_nbd_is_what_it_is_elsewhere() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let (uri, socket) = attach(&w, "d");
    let listed = w.json(["ls", "attached"]);
    let listed = &listed["attached"][0];
    assert_eq!(
        (&listed["via"], &listed["uri"]),
        (&"nbd".into(), &uri.clone().into())
    );
    assert!(w.ok(["ls", "attached"]).contains(&uri));
    qemu_io(
        &uri,
        [
            "write -P 0xa1 1M 3M",
            "write -f -P 0xa2 2M 12345",
            "discard 8M 1M",
            "write -z 3M 64k",
            "read -P 0xa1 1M 1M",
            "read -P 0xa2 2M 12345",
            "read -P 0 3M 64k",
            "flush",
        ],
    );
    // Several connections at once, of which each sees what the others did.
    let mut links: Vec<Nbd> = (0..4)
        .map(|_| Nbd::connect(&socket, "d", true).unwrap())
        .collect();
    for (n, link) in links.iter_mut().enumerate() {
        link.write((16 << 20) + n as u64, &[n as u8 + 1]).unwrap();
    }
    for link in &mut links {
        assert_eq!(link.read(16 << 20, 5).unwrap(), [1, 2, 3, 4, 0]);
    }
    assert_eq!(w.status()["connections"], 4);
    // A snapshot while they are there; no rollback, and no detaching.
    w.ok(["snapshot", "d@s"]);
    links[0].write(16 << 20, &[9]).unwrap();
    for args in [
        &["rollback", "d@s"][..],
        &["detach", "d"],
        &["detach", &uri],
    ] {
        let told = w.fails_here(11, args);
        assert!(told.contains("4 connections"), "{told}");
    }
    assert_eq!(links[0].read(16 << 20, 2).unwrap(), [9, 2]);
    drop(links);
    w.ok(["rollback", "d@s"]);
    let mut link = Nbd::connect(&socket, "d", true).unwrap();
    assert_eq!(link.read(16 << 20, 2).unwrap(), [1, 2]);
    // A new size is told to who connects.
    w.ok(["resize", "d", "+16M"]);
    assert_eq!(
        Nbd::connect(&socket, "d", true).unwrap().size,
        (256 + 16) << 20
    );
    drop(link);
    w.ok(["detach", &uri]);
    assert_eq!(w.attached(), [""; 0]);
    assert!(Nbd::connect(&socket, "d", true).is_err());
    w.fails_here(12, &["detach", &uri]);

    // The same by another door, and as QEMU finds it.
    let raw = w.path("d.raw");
    w.ok(["export", "d", s(&raw)]);
    let bytes = fs::read(&raw).unwrap();
    assert!(bytes[1 << 20..2 << 20].iter().all(|b| *b == 0xa1));
    assert!(bytes[2 << 20..][..12345].iter().all(|b| *b == 0xa2));
    assert!(bytes[3 << 20..][..64 << 10].iter().all(|b| *b == 0));
    let (uri, _) = attach(&w, "d");
    assert_eq!(
        tool(
            "qemu-img",
            ["compare", "-f", "raw", "-F", "raw", &uri, s(&raw)]
        )
        .trim(),
        "Images are identical."
    );
    let copied = w.path("copied.qcow2");
    tool(
        "qemu-img",
        ["convert", "-f", "raw", "-O", "qcow2", &uri, s(&copied)],
    );
    tool(
        "qemu-img",
        ["compare", "-f", "qcow2", "-F", "raw", s(&copied), s(&raw)],
    );
    assert!(du(&copied) < 8 << 20, "holes were told: {}", du(&copied));
    w.ok(["detach", "d"]);

    // What can only be read, by two users.
    let (uri, _) = attach(&w, "d@s");
    assert_eq!(attach(&w, "d@s").0, uri);
    let mut link = Nbd::connect(&socket, "d@s", true).unwrap();
    assert_eq!(link.write(0, &[1]), Err(1));
    assert_eq!(link.read(16 << 20, 2).unwrap(), [1, 2]);
    w.ok(["detach", "d@s"]);
    assert!(link.read(0, 1).is_ok(), "the other user stays");
    drop(link);
    let told = w.fails_here(11, &["attach", "d@s"]);
    assert!(told.contains("another way"), "{told}");
    w.ok(["detach", "d@s"]);
    w.ok(["daemon", "stop"]);
    assert!(!socket.exists());
    w.ok(["check"]);
    w.finish();
}

#[test]
fn a_client_that_connects_again_finds_all_that_was_answered() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let (_, socket) = attach(&w, "d");
    let stop = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    // Each of two clients writes to blocks of its own, a number that grows; what is unanswered when the connection ends is sent again.
    let clients: Vec<_> = (0..2u64)
        .map(|n| {
            let (socket, stop, answered) = (socket.clone(), stop.clone(), answered.clone());
            thread::spawn(move || {
                let (mut link, mut again) = (None, 0);
                let mut model = vec![0u64; 1024];
                let mut round = 0u64;
                while !stop.load(SeqCst) {
                    round += 1;
                    let slot = (round * 17 % 1024) as usize;
                    let at = (64 << 20) + (slot as u64 * 2 + n) * 4096;
                    let block: Vec<u8> = round.to_le_bytes().repeat(512);
                    loop {
                        let open = match &mut link {
                            Some(open) => open,
                            None => match Nbd::connect(&socket, "d", true) {
                                Ok(open) => link.insert(open),
                                Err(_) => {
                                    thread::sleep(Duration::from_millis(5));
                                    continue;
                                }
                            },
                        };
                        let flags = u16::from(round.is_multiple_of(16));
                        match open.call(crate::nbd_client::WRITE, flags, at, 4096, &block) {
                            Ok(answer) => break drop(answer.unwrap()),
                            Err(_) => {
                                again += 1;
                                link = None;
                            }
                        }
                    }
                    model[slot] = round;
                    answered.fetch_add(1, SeqCst);
                }
                drop(link);
                (model, again)
            })
        })
        .collect();
    let progress = |what: &str| {
        let before = answered.load(SeqCst);
        eventually(what, || answered.load(SeqCst) > before + 50);
    };
    let begun = Instant::now();
    for n in 0..6 {
        progress("writes are answered");
        match n % 3 {
            0 | 1 => kill_and_wait(w.pid("server_pid")),
            _ => drop(w.ok(["daemon", "takeover"])),
        }
        progress("they go on after the server's end");
        w.ok(["snapshot", &format!("d@{n}")]);
    }
    eprintln!("six servers in {:?}", begun.elapsed());
    stop.store(true, SeqCst);
    let models: Vec<_> = clients.into_iter().map(|c| c.join().unwrap()).collect();
    let again: u64 = models.iter().map(|(_, again)| again).sum();
    assert!(again >= 6, "connections ended: {again}");
    w.ok(["detach", "d"]);
    w.ok(["daemon", "stop"]);
    let raw = w.path("d.raw");
    w.ok(["export", "d", s(&raw)]);
    let bytes = fs::read(&raw).unwrap();
    for (n, (model, _)) in models.iter().enumerate() {
        for (slot, round) in model.iter().enumerate() {
            let at = (64 << 20) + (slot * 2 + n) * 4096;
            let found = &bytes[at..at + 4096];
            assert!(
                found == round.to_le_bytes().repeat(512),
                "slot {slot} of {n}"
            );
        }
    }
    w.ok(["check"]);
    w.finish();
}

/// A program that connects once, keeps the connection, and never connects again. It ends with the result.
struct Idle(std::process::Child);

impl Idle {
    fn start(w: &World, uri: &str) -> Idle {
        let before = w.status()["connections"].as_u64().unwrap();
        let child = std::process::Command::new("qemu-io")
            .args(["-f", "raw", uri])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let idle = Idle(child);
        eventually("it connects", || {
            w.status()["connections"].as_u64() == Some(before + 1)
        });
        idle
    }
    fn end(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_client_that_has_not_come_back_yet_is_not_forgotten() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    let (uri, socket) = attach(&w, "d");
    qemu_io(&uri, ["write -P 0xb1 1M 64k"]);
    let refused = |idle: &Idle| {
        for args in [&["rollback", "d@s"][..], &["detach", "d"]] {
            let told = w.fails_here(11, args);
            let who = format!("process {} (qemu-io)", idle.0.id());
            assert!(told.contains(&who), "{told}");
            assert!(told.contains("detach --force d"), "{told}");
        }
    };
    let servers = || w.status()["takeovers"].as_u64().unwrap();
    let next = |kill: bool| {
        let before = servers();
        match kill {
            true => kill_and_wait(w.pid("server_pid")),
            false => drop(w.ok(["daemon", "takeover"])),
        }
        eventually("the next server is there", || servers() == before + 1);
        assert_eq!(w.status()["connections"], 0);
    };
    for kill in [true, false] {
        let idle = Idle::start(&w, &uri);
        next(kill);
        refused(&idle);
        w.ok(["snapshot", &format!("d@{kill}")]);
        // Nor is it for the server after that, or if somebody else comes and goes.
        next(true);
        drop(Nbd::connect(&socket, "d", true).unwrap());
        refused(&idle);
        // With its end nobody waits for it.
        idle.end();
        w.ok(["rollback", "d@s"]);
    }
    let idle = Idle::start(&w, &uri);
    next(true);
    refused(&idle);
    w.ok(["detach", "--force", "d"]);
    attach(&w, "d");
    w.ok(["detach", "d"]);
    idle.end();
    w.finish();
}

#[test]
fn writes_over_nbd_wait_for_room() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok([
        "create",
        "d",
        "--from",
        "base",
        "--quota",
        "4M",
        "--on-full",
        "pause",
    ]);
    let (_, socket) = attach(&w, "d");
    let writer = thread::spawn(move || {
        let mut link = Nbd::connect(&socket, "d", false).unwrap();
        let data = noise(3, 16 << 20);
        link.write(64 << 20, &data).unwrap();
        link.flush().unwrap();
        assert!(link.read(64 << 20, data.len()).unwrap() == data);
    });
    eventually("it waits", || w.log().contains("writes wait for room"));
    let told = w.fails_here(11, &["detach", "d"]);
    assert!(
        told.contains("wait for room") || told.contains("connections"),
        "{told}"
    );
    assert!(!writer.is_finished());
    w.ok(["resize", "d", "--quota", "none"]);
    writer.join().unwrap();
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn a_socket_that_no_client_could_name_is_refused() {
    if !root() {
        return;
    }
    let w = World::at(&format!("{}/store", "d".repeat(100)));
    w.import_ext4("base", 16);
    w.ok(["create", "d", "--from", "base"]);
    let told = w.fails_here(2, &["attach", "d", "--via", "nbd"]);
    assert!(told.contains("too long"), "{told}");
    assert_eq!(w.attached(), [""; 0]);
    w.ok(["attach", "d", "--via", "file"]);
    w.ok(["detach", "d"]);
    let told = w.fails_here(2, &["attach", "d", "--via", "nbd", "--mount", s(&w.dir)]);
    assert!(told.contains("block device"), "{told}");
    w.finish();
}

/// A program that says nothing of NBD, as those before it did, would lose what is exported: it is not let in, and nothing is interrupted.
#[test]
fn a_program_that_does_not_know_nbd_does_not_take_over() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "2"]);
    let (uri, _) = attach(&w, "d-1");
    qemu_io(&uri, ["write -f -P 0xa1 1M 64k"]);
    let server = w.pid("server_pid");
    let handover = w.status()["handover"].as_u64().unwrap();
    let take_over = || {
        let mut stream = UnixStream::connect(w.store.join("run/control.sock")).unwrap();
        let request =
            format!("{{\"op\":\"takeover\",\"program\":\"{BIN}\",\"handover\":{handover}}}\n");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut said = String::new();
        BufReader::new(&stream).read_line(&mut said).unwrap();
        said
    };
    let said = take_over();
    assert!(
        said.contains("the new program does not know") && said.contains("forkdisk detach d-1"),
        "{said}"
    );
    assert_eq!(w.pid("server_pid"), server);
    qemu_io(&uri, ["read -P 0xa1 1M 64k", "write -f -P 0xa2 2M 64k"]);
    // With nothing exported it may come.
    w.ok(["detach", "d-1"]);
    let device = w.ok(["attach", "d-2"]);
    let said = take_over();
    assert!(said.contains("server_pid"), "{said}");
    eventually("another serves", || {
        let status = w.run(["--json", "daemon", "status"]);
        status.code == 0 && w.pid("server_pid") != server
    });
    assert_eq!(w.attached(), ["d-2"]);
    drop(fs::read(device).unwrap());
    w.ok(["detach", "d-2"]);
    w.finish();
}
