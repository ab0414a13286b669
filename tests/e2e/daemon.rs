//! The daemon itself.

use crate::rig::*;
use std::{
    fs,
    io::{Read, Write},
    os::unix::process::CommandExt,
    os::unix::{fs::FileTypeExt, fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

fn socket(w: &World) -> PathBuf {
    w.status()["socket"].as_str().unwrap().into()
}

#[test]
fn status_and_stop() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let out = w.run(["--json", "daemon", "status"]);
    assert_eq!(out.code, 1, "{out:?}");
    assert!(out.stdout.contains("\"running\": false"), "{out:?}");
    assert_eq!(w.json(["daemon", "stop"])["stopped"], false);
    w.ok(["attach", "d"]);
    let status = w.status();
    for field in ["keeper_pid", "server_pid"] {
        assert!(alive(status[field].as_i64().unwrap() as i32), "{status}");
    }
    let path = |field: &str| PathBuf::from(status[field].as_str().unwrap());
    let meta = fs::metadata(path("socket")).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(w.store.join("run"))
            .unwrap()
            .permissions()
            .mode()
            & 0o777,
        0o700
    );
    assert!(path("mount").join("d").is_file());
    assert!(path("socket").starts_with(w.store.join("run")));
    let log = w.store.join("run/daemon.log");
    assert!(fs::read_to_string(&log).unwrap().contains("attached"));
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o077, 0);
    let told = w.fails_here(11, &["daemon", "stop"]);
    assert!(told.contains('d') && told.contains("detach"), "{told}");
    w.fails_here(11, &["daemon", "run"]);
    w.fails_here(11, &["daemon", "run", "--foreground"]);
    w.ok(["detach", "d"]);
    assert_eq!(w.json(["daemon", "stop"])["stopped"], true);
    w.nothing_left();
    assert!(!path("socket").exists());
    w.ok(["daemon", "run"]);
    let second = w.fails_here(11, &["daemon", "run"]);
    assert!(second.contains("already"), "{second}");
    w.finish();
}

#[test]
fn in_the_foreground() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    for signal in ["TERM", "INT"] {
        let mut command = Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["daemon", "run", "--foreground"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        eventually("it serves", || w.run(["daemon", "status"]).code == 0);
        assert_eq!(w.pid("keeper_pid"), child.id() as i32);
        let m = w.mkdir("m");
        w.ok(["attach", "d", "--mount", s(&m)]);
        fs::write(m.join(signal), "x").unwrap();
        kill(child.id() as i32, signal);
        let out = Out::from(child.wait_with_output().unwrap());
        assert_eq!(out.code, 0, "{out:?}");
        assert!(out.stderr.contains("serves"), "its log: {out:?}");
        w.nothing_left();
        w.ok(["attach", "d", "--mount", s(&m)]);
        assert_eq!(fs::read_to_string(m.join(signal)).unwrap(), "x");
        w.ok(["detach", "d"]);
        w.ok(["daemon", "stop"]);
    }
    w.finish();
}

#[test]
fn a_term_signal_detaches_what_is_idle() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base", "--count", "3"]);
    w.ok(["snapshot", "d-3@s"]);
    let (m, n) = (w.mkdir("m"), w.mkdir("n"));
    w.ok(["attach", "d-1", "--mount", s(&m)]);
    w.ok(["attach", "d-2"]);
    w.ok(["attach", "d-3@s", "--mount", s(&n)]);
    w.ok(["attach", "d-3@s"]);
    w.ok(["attach", "d-3", "--via", "file"]);
    fs::write(m.join("f"), noise(1, 9 << 20)).unwrap();
    let keeper = w.pid("keeper_pid");
    kill(keeper, "TERM");
    eventually("the daemon ends", || !alive(keeper));
    w.nothing_left();
    for name in ["d-1", "d-2", "d-3"] {
        let state = w.json(["info", name])["state"]
            .as_str()
            .unwrap()
            .to_string();
        assert_ne!(state, "writable", "{name}\n{}", w.log());
    }
    w.ok(["attach", "d-1", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 9 << 20));
    w.ok(["detach", "d-1"]);
    w.finish();
}

/// A terminal (Ctrl-C) and a service manager signal all processes of the daemon at once; somebody may signal the wrong one.
#[test]
fn a_signal_to_all_processes_or_to_the_server_loses_nothing() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    for (round, (signal, to)) in [
        ("INT", "the group"),
        ("TERM", "both"),
        ("TERM", "the server"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut command = Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["daemon", "run", "--foreground"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        let mut child = command.spawn().unwrap();
        eventually("it serves", || w.run(["daemon", "status"]).code == 0);
        let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
        w.ok(["attach", "d", "--mount", s(&m)]);
        // Not synced.
        fs::write(m.join("f"), noise(round as u64, 9 << 20)).unwrap();
        match to {
            "the group" => assert!(kill(-keeper, signal)),
            "both" => assert!(kill(server, signal) && kill(keeper, signal)),
            _ => assert!(kill(server, signal)),
        }
        eventually("it ends", || child.try_wait().unwrap().is_some());
        let status = child.wait().unwrap();
        assert!(status.success(), "{to}: {status}\n{}", w.log());
        w.nothing_left();
        w.ok(["attach", "d", "--mount", s(&m)]);
        assert!(
            fs::read(m.join("f")).unwrap() == noise(round as u64, 9 << 20),
            "lost after a signal to {to}"
        );
        w.ok(["detach", "d"]);
        w.ok(["daemon", "stop"]);
    }
    w.finish();
}

/// Whoever is busy gets errors from then on, but what was written before the signal is safe, and the device can
/// be taken away later.
#[test]
fn a_term_signal_while_a_mount_is_busy() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let mut sleeper = Command::new("sleep");
    sleeper.arg("1000").current_dir(&m);
    w.child(sleeper);
    // Not synced: the daemon does that at its end.
    fs::write(m.join("f"), noise(1, 9 << 20)).unwrap();
    let keeper = w.pid("keeper_pid");
    kill(keeper, "TERM");
    eventually("the daemon ends", || !alive(keeper));
    assert!(w.log().contains("in use"), "{}", w.log());
    w.end_children();
    let n = w.mkdir("n");
    w.ok(["attach", "d", "--mount", s(&n)]);
    assert!(fs::read(n.join("f")).unwrap() == noise(1, 9 << 20), "lost");
    w.ok(["detach", s(&m)]);
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn rubbish_on_the_socket_does_no_harm() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d", "--mount", s(&m)]);
    let socket = socket(&w);
    let mut open = Vec::new();
    let deep = format!("{}1{}\n", "[".repeat(100_000), "]".repeat(100_000));
    for rubbish in [
        &b"\n\n\n"[..],
        b"hello\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"{\"op\":\"bogus\"}\n",
        b"{\"op\":7}\n",
        b"{\"op\":\"attach\"}\n",
        b"{\"op\":\"detach\",\"target\":\"nothing\"}\n",
        b"{\"op\":\"attach-done\",\"name\":\"d\"}\n",
        b"{\"op\":\"attach-undo\",\"name\":\"x\"}\n",
        b"{\"op\":\"detach-done\",\"name\":\"x\"}\n",
        b"{\"op\":\"hello\",\"version\":99}\n",
        b"{\"op\":\"create\"}\n",
        b"{\"op\":\"snapshot\",\"disk\":\"d\",\"name\":\"../x\"}\n",
        b"\0\0\0\0\0\0\0\0",
        b"\xff\xfe\xfd\n",
        deep.as_bytes(),
        &noise(1, 3 << 20),
        // Begun, and not ended.
        b"{\"op\":\"detach\",\"target\":\"d\"}\n",
    ] {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let _ = stream.write_all(rubbish);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        assert_eq!(
            w.attached(),
            ["d"],
            "{:?}",
            &rubbish[..rubbish.len().min(80)]
        );
        fs::write(m.join("f"), "works").unwrap();
        tool("sync", ["-f", s(&m)]);
    }
    // Many that say nothing, and stay.
    for _ in 0..100 {
        open.push(UnixStream::connect(&socket).unwrap());
    }
    assert_eq!(w.attached(), ["d"]);
    w.ok(["detach", "d"]);
    w.ok(["daemon", "stop"]);
    drop(open);
    w.nothing_left();
    w.finish();
}

/// An attached disk whose attachment is begun by a command that dies is not stuck.
#[test]
fn a_command_that_dies_leaves_nothing_stuck() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["daemon", "run"]);
    for i in 0..12 {
        let mut command = Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["attach", "d"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(i * 3));
        let _ = child.kill();
        child.wait().unwrap();
        eventually("it is attached, or it is not", || {
            let code = w.run(["detach", "d"]).code;
            assert!([0, 11, 12].contains(&code), "{code}");
            code != 11
        });
        // What the dead command had asked for may come after that.
        let mut device = String::new();
        eventually("it can be attached", || {
            let out = w.run(["attach", "d"]);
            assert!([0, 11].contains(&out.code), "{out:?}");
            device = out.stdout.trim_end().to_string();
            out.code == 0 || w.run(["detach", "d"]).code > 12
        });
        assert!(Path::new(&device).exists());
        let mut command = Command::new(BIN);
        command
            .arg("-S")
            .arg(&w.store)
            .args(["detach", "d"])
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(i * 3));
        let _ = child.kill();
        child.wait().unwrap();
        eventually("it is attached, or it is not", || {
            let code = w.run(["detach", "d"]).code;
            assert!([0, 11, 12].contains(&code), "{code}");
            code != 11
        });
        assert_eq!(w.loops(), [""; 0], "round {i}");
    }
    w.finish();
}
