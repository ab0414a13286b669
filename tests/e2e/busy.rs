//! What is in use stays as it is, and who uses it is named.

use crate::{namespace::LEAVE_OTHERS, rig::*};
use std::{fs, process::Command};

fn holder(w: &World, dir: &std::path::Path, script: &str) -> i32 {
    let mut command = Command::new("bash");
    command.args(["-c", script]).current_dir(dir);
    w.child(command)
}

#[test]
fn a_busy_mount_stays() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let device = w.ok(["attach", "d", "--mount", s(&m)]);
    fs::write(m.join("f"), "x").unwrap();
    for (script, dir) in [
        ("exec sleep 1000", m.clone()),
        (
            &*format!("exec 3<'{}/f'; exec sleep 1000", m.display()),
            w.dir.clone(),
        ),
    ] {
        let pid = holder(&w, &dir, script);
        eventually("sleep runs", || {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
        });
        for target in ["d", &device, s(&m)] {
            let told = w.fails_here(11, &["detach", target]);
            assert!(
                told.contains(&pid.to_string()) && told.contains("sleep"),
                "{told}"
            );
        }
        fs::write(m.join("g"), "still usable").unwrap();
        assert_eq!(w.attached(), ["d"]);
        w.end_children();
    }
    // The device alone, open.
    tool("umount", [s(&m)]);
    let pid = holder(&w, &w.dir, &format!("exec 3<{device}; exec sleep 1000"));
    eventually("sleep runs", || {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
    });
    let told = w.fails_here(11, &["detach", "d"]);
    assert!(
        told.contains(&pid.to_string()) && told.contains("sleep"),
        "{told}"
    );
    w.end_children();
    // Something else over the same directory, which is not ours to unmount.
    w.ok(["detach", "d"]);
    w.ok(["attach", "d", "--mount", s(&m)]);
    tool("mount", ["-t", "tmpfs", "foreign", s(&m)]);
    fs::write(m.join("foreign"), "x").unwrap();
    for target in ["d", s(&m)] {
        let told = w.fails_here(11, &["detach", target]);
        assert!(told.contains("something else is mounted over"), "{told}");
        assert!(m.join("foreign").exists());
    }
    tool("umount", [s(&m)]);
    assert_eq!(fs::read_to_string(m.join("g")).unwrap(), "still usable");
    tool("umount", [s(&m)]);
    // One busy, one not: none is touched.
    w.ok(["create", "e", "--from", "base"]);
    let n = w.mkdir("n");
    w.ok(["attach", "e", "--mount", s(&n)]);
    w.ok(["detach", "d"]);
    w.ok(["attach", "d", "--mount", s(&m)]);
    holder(&w, &m, "exec sleep 1000");
    w.fails_here(12, &["detach", "e", "nothing"]);
    assert_eq!(w.attached(), ["d", "e"]);
    w.end_children();
    w.ok(["detach", "d", "e"]);
    w.finish();
}

#[test]
fn what_is_attached_is_attached_once() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.fails(12, &["detach", "d"]);
    w.fails(12, &["detach", "/dev/loop999"]);
    w.fails(12, &["detach", "/mnt"]);
    w.fails(12, &["detach", "nothing"]);
    let device = w.ok(["attach", "d"]);
    let told = w.fails_here(11, &["attach", "d"]);
    assert!(told.contains(&device), "{told}");
    w.fails_here(11, &["attach", "d", "--ro"]);
    w.fails_here(11, &["attach", "d", "--via", "file"]);
    w.fails_here(11, &["rm", "d"]);
    w.fails_here(11, &["rm", "-r", "--yes", "base"]);
    w.fails_here(12, &["detach", "base"]);
    assert_eq!(w.device_of("d"), device);
    w.ok(["detach", "d"]);
    w.fails(12, &["detach", "d"]);
    w.fails(12, &["attach", "nothing"]);
    w.fails(12, &["attach", "d@nothing"]);
    // Its old layer belongs to nobody by name: it is the fork's parent, by its id.
    let parents = |doc: &serde_json::Value| doc["parent"].as_str().unwrap().to_string();
    let made = w.json(["create", "f", "--from", "d", "--json"]);
    assert_ne!(parents(&made), "d");
    assert_eq!(made["parent"], w.json(["info", "f"])["parent"]);
    w.ok(["rm", "f"]);
    // A base or snapshot that is attached.
    w.ok(["snapshot", "d@s"]);
    w.ok(["attach", "d@s"]);
    w.fails_here(11, &["rm", "d@s"]);
    w.ok(["detach", "d@s"]);
    w.ok(["attach", "base"]);
    w.fails_here(11, &["rm", "-r", "--yes", "base"]);
    w.fails_here(11, &["attach", "base", "--via", "file"]);
    w.ok(["detach", "base"]);
    w.finish();
}

#[test]
fn what_others_stand_on_is_not_removed() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "a", "--from", "base"]);
    w.ok(["snapshot", "a@one"]);
    w.ok(["create", "b", "--from", "a@one"]);
    let told = w.fails(11, &["rm", "base"]);
    for name in ["a", "b", "a@one"] {
        assert!(told.contains(name), "{told}");
    }
    w.fails(11, &["rm", "a"]);
    w.fails(12, &["rm", "nothing"]);
    w.fails(12, &["rm", "b", "nothing"]);
    // More than was named goes: only with a yes.
    w.fails(2, &["rm", "-r", "base"]);
    let before = w.fingerprint();
    let pretended = w.json(["rm", "-r", "-n", "base"]);
    assert_eq!(pretended["removed"].as_array().unwrap().len(), 4);
    assert_eq!(pretended["dry_run"], true);
    let listed = w.ok(["rm", "-r", "base", "-n"]);
    for name in ["a", "b", "a@one", "base"] {
        assert!(listed.contains(name), "{listed}");
    }
    assert!(before == w.fingerprint());
    // What is in the way is told whole, with what would go.
    w.ok(["attach", "a", "--via", "file"]);
    w.ok(["attach", "b", "--via", "file"]);
    let told = w.fails_here(11, &["rm", "-r", "base", "-n"]);
    assert!(told.contains("a, b are attached"), "{told}");
    assert!(
        told.contains("4 names would go: a, a@one, b, base"),
        "{told}"
    );
    w.ok(["detach", "a", "b"]);
    w.ok(["rm", "b"]);
    let removed = w.json(["rm", "-r", "--yes", "base"]);
    assert_eq!(removed["removed"].as_array().unwrap().len(), 3);
    assert_eq!(w.names(), [""; 0]);
    assert!(w.stored() < 64 << 10, "{}", w.stored());
    w.finish();
}

/// A copy of all mounts, as what begins in a namespace of its own has for moments, is waited for: of a served device and of a dead one.
#[test]
fn what_is_mounted_elsewhere_for_a_moment_is_waited_for() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let m = w.mkdir("m");
    let copied = |seconds: &str| {
        let ready = w.path("ready");
        let _ = fs::remove_file(&ready);
        let script = format!(
            "{LEAVE_OTHERS}\ntouch '{}'; exec sleep {seconds}",
            ready.display()
        );
        let mut command = Command::new("unshare");
        command.env("KEEP", &m);
        command.args(["-m", "--propagation", "private", "sh", "-c", &script]);
        let pid = w.child(command);
        eventually("the namespace is there", || ready.exists());
        pid
    };
    w.ok(["attach", "d", "--mount", s(&m)]);
    copied(".5");
    w.ok(["detach", "d"]);
    // One that stays is named.
    w.ok(["attach", "d", "--mount", s(&m)]);
    let pid = copied("1000");
    let told = w.fails_here(11, &["detach", "d"]);
    assert!(
        told.contains(&format!("the namespace of pid {pid}")),
        "{told}"
    );
    w.end_children();
    w.ok(["detach", "d"]);
    w.ok(["attach", "d", "--mount", s(&m)]);
    let (keeper, server) = (w.pid("keeper_pid"), w.pid("server_pid"));
    kill(keeper, "STOP");
    kill_and_wait(server);
    kill_and_wait(keeper);
    copied(".5");
    w.ok(["detach", "d"]);
    assert_eq!(w.loops(), [""; 0]);
    w.finish();
}
