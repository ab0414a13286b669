//! Daemons that were killed: what they left is found, used up or taken away, and nothing that was flushed is lost.

use crate::rig::*;
use std::fs;

/// Two disks attached, one of them mounted, with data that was synced.
fn in_use() -> (World, std::path::PathBuf) {
    in_use_of(World::with_base())
}

fn in_use_of(w: World) -> (World, std::path::PathBuf) {
    w.ok(["create", "d", "--from", "base", "--count", "3"]);
    let m = w.mkdir("m");
    w.ok(["attach", "d-1"]);
    w.ok(["attach", "d-2", "--mount", s(&m)]);
    fs::write(m.join("f"), noise(1, 3 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    (w, m)
}

/// After the death: everything can be looked at, attached again, and the dead devices go.
fn goes_on(w: &World, m: &std::path::Path) {
    w.ok(["ls"]);
    w.ok(["tree"]);
    let dead = w.loops();
    let n = w.mkdir("n");
    w.ok(["attach", "d-2", "--mount", s(&n)]);
    assert!(
        fs::read(n.join("f")).unwrap() == noise(1, 3 << 20),
        "synced data is lost"
    );
    let device = w.ok(["attach", "d-1"]);
    w.ok(["attach", "d-3"]);
    tool("e2fsck", ["-fn", &device]);
    // The dead mount is still there, for its users to see; by name the living one is meant.
    assert!(w.mounts().contains(&m.to_path_buf()));
    w.ok(["detach", "d-2"]);
    assert!(!w.mounts().contains(&n));
    // By its mount point the dead one.
    w.ok(["detach", s(m)]);
    assert!(!w.mounts().contains(&m.to_path_buf()));
    w.ok(["detach", "d-1", "d-3"]);
    w.finish();
    assert_eq!(w.loops(), [""; 0], "{dead:?}");
}

/// Where the kernel could not send again what was under way, the death of the server fails cleanly.
#[test]
fn the_server_is_killed_and_no_other_can_take_over() {
    if !root() {
        return;
    }
    let w = World::with_base();
    let mut daemon = w.command(["daemon", "run"]);
    daemon.env("FORKDISK_WITHOUT_RESEND", "1");
    assert_eq!(daemon.status().unwrap().code(), Some(0));
    assert_eq!(w.status()["can_take_over"], false);
    let (w, m) = in_use_of(w);
    let told = w.fails_here(1, &["daemon", "takeover"]);
    assert!(told.contains("6.9"), "{told}");
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    kill_and_wait(server);
    eventually("the keeper ends", || !alive(keeper));
    let device = w.loops()[0].clone();
    let read = std::process::Command::new("dd")
        .args([
            &format!("if={device}"),
            "of=/dev/null",
            "iflag=direct",
            "bs=4k",
            "count=1",
        ])
        .output()
        .unwrap();
    assert!(!read.status.success(), "{device} should give I/O errors");
    goes_on(&w, &m);
}

#[test]
fn keeper_and_server_are_killed() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    kill(keeper, "STOP");
    kill_and_wait(server);
    kill_and_wait(keeper);
    assert!(w.store.join("run/control.sock").exists(), "a stale socket");
    let out = w.run(["daemon", "status"]);
    assert_eq!(out.code, 1, "{out:?}");
    goes_on(&w, &m);
}

/// Whoever is left of the two brings the other one back, again and again.
#[test]
fn keepers_and_servers_bring_each_other_back() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    for round in 0..3 {
        let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
        kill_and_wait(keeper);
        eventually("another keeper", || {
            let now = w.pid("keeper_pid");
            now != 0 && now != keeper
        });
        assert_eq!(w.pid("server_pid"), server);
        fs::write(m.join("g"), noise(round, 1 << 20)).unwrap();
        let keeper = w.pid("keeper_pid");
        kill_and_wait(server);
        assert!(fs::read(m.join("f")).unwrap() == noise(1, 3 << 20));
        assert!(fs::read(m.join("g")).unwrap() == noise(round, 1 << 20));
        assert_eq!(w.pid("keeper_pid"), keeper);
        assert_ne!(w.pid("server_pid"), server);
        w.ok(["daemon", "takeover"]);
        assert_eq!(w.pid("keeper_pid"), keeper);
    }
    w.ok(["detach", "d-1", "d-2"]);
    w.finish();
}

#[test]
fn without_a_daemon_the_dead_devices_go_with_detach() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    kill(keeper, "STOP");
    kill_and_wait(server);
    kill_and_wait(keeper);
    w.ok(["detach", "d-1"]);
    w.ok(["detach", s(&m)]);
    assert_eq!(w.loops(), [""; 0]);
    assert!(!w.mounts().contains(&m));
    assert!(!w.mounts().contains(&w.store.join("run/disks")), "its own");
    w.fails_here(12, &["detach", "d-1"]);
    w.ok(["attach", "d-2", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(1, 3 << 20));
    w.ok(["detach", "d-2"]);
    w.finish();
}

/// What nobody serves any more goes with the first that looks for garbage, or wants the daemon gone; the devices that somebody uses are still known then.
#[test]
fn without_a_daemon_its_mount_goes() {
    if !root() {
        return;
    }
    for command in [&["gc"][..], &["daemon", "stop"]] {
        let (w, m) = in_use();
        let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
        let served = w.store.join("run/disks");
        // One that lives is left alone.
        w.run(command);
        assert!(w.mounts().contains(&served), "{command:?}");
        kill(keeper, "STOP");
        kill_and_wait(server);
        kill_and_wait(keeper);
        w.ok([command, &["-n"]].concat());
        assert!(w.mounts().contains(&served), "{command:?} -n");
        w.ok(command);
        assert!(!w.mounts().contains(&served), "{command:?}");
        assert!(w.mounts().contains(&m), "{command:?}: it is in use");
        w.ok(["detach", s(&m)]);
        assert_eq!(w.loops(), [""; 0]);
        w.ok(["attach", "d-2", "--mount", s(&m)]);
        assert!(fs::read(m.join("f")).unwrap() == noise(1, 3 << 20));
        w.ok(["detach", "d-2"]);
        w.finish();
    }
}

/// What `detach` called durable is: whatever dies right after it.
#[test]
fn detached_is_durable() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    for round in 0..3 {
        w.ok(["attach", "d", "--mount", s(&m)]);
        if round > 0 {
            assert!(fs::read(m.join("f")).unwrap() == noise(round - 1, 5 << 20));
        }
        fs::write(m.join("f"), noise(round, 5 << 20)).unwrap();
        let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
        w.ok(["detach", s(&m)]);
        kill(keeper, "STOP");
        kill_and_wait(server);
        kill_and_wait(keeper);
        let check = w.run(["check"]);
        assert_eq!(check.code, 0, "{check:?}");
        assert_eq!(w.json(["info", "d"])["state"], "clean");
    }
    w.ok(["attach", "d", "--ro", "--mount", s(&m)]);
    assert!(fs::read(m.join("f")).unwrap() == noise(2, 5 << 20));
    w.ok(["detach", "d"]);
    w.finish();
}

/// The keeper dies while one server makes way for the next: there is always somebody who has everything.
#[test]
fn the_keeper_is_killed_in_a_takeover() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    for round in 0..8u64 {
        fs::write(m.join("g"), noise(round, 200_000)).unwrap();
        let keeper = w.pid("keeper_pid");
        let mut takeover = w.command(["daemon", "takeover"]);
        let mut takeover = takeover
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // While the old server still serves: once it has left, both would be dead.
        std::thread::sleep(std::time::Duration::from_micros(500 * round));
        let left = w.log().matches("leaves everything").count();
        kill(keeper, "KILL");
        let after = w.log().matches("leaves everything").count();
        let _ = takeover.wait();
        if left != after || w.run(["daemon", "status"]).code != 0 {
            // Too late: the server had gone, and the keeper was alone. Or it had not, and there is a successor.
            eprintln!("round {round}: both may be dead");
            eventually("both are detached", || {
                w.run(["detach", s(&m)]);
                w.run(["detach", "d-2"]);
                w.run(["detach", "d-1"]);
                w.attached().is_empty()
            });
            w.ok(["attach", "d-1"]);
            w.ok(["attach", "d-2", "--mount", s(&m)]);
            continue;
        }
        assert!(
            fs::read(m.join("g")).unwrap() == noise(round, 200_000),
            "round {round}"
        );
        eventually("there is a keeper", || w.pid("keeper_pid") != 0);
    }
    w.ok(["detach", "d-1", "d-2"]);
    w.finish();
}

/// A new daemon does not take the mount away from under a server that is just getting another keeper.
#[test]
fn a_new_daemon_leaves_a_living_server_alone() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    for _ in 0..8 {
        let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
        kill(keeper, "KILL");
        let out = w.run(["daemon", "run"]);
        assert_eq!(out.code, 11, "{out:?}");
        eventually("another keeper", || {
            ![0, keeper].contains(&w.pid("keeper_pid"))
        });
        assert_eq!(w.pid("server_pid"), server);
        assert!(fs::read(m.join("f")).unwrap() == noise(1, 3 << 20));
    }
    w.ok(["detach", "d-1", "d-2"]);
    w.finish();
}

#[test]
fn a_store_that_was_moved_is_taken_over() {
    if !root() {
        return;
    }
    let (w, m) = in_use();
    let server = w.pid("server_pid");
    let moved = w.path("moved");
    fs::rename(&w.store, &moved).unwrap();
    kill_and_wait(server);
    fs::write(m.join("g"), noise(4, 1 << 20)).unwrap();
    tool("sync", ["-f", s(&m)]);
    let out = finish(w.command_on(&moved, ["daemon", "takeover"]));
    assert_eq!(out.code, 0, "{out:?}");
    assert!(fs::read(m.join("g")).unwrap() == noise(4, 1 << 20));
    fs::rename(&moved, &w.store).unwrap();
    w.ok(["detach", "d-1", "d-2"]);
    w.finish();
}
