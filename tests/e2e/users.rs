//! Without root: everything that needs no device.

use crate::{namespace::LEAVE_OTHERS, rig::*};
use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// A namespace of mounts in which everybody may use `/dev/fuse`, as on a usual machine.
fn with_fuse(w: &World) -> String {
    let node = w.path("fuse");
    tool("mknod", ["-m", "666", s(&node), "c", "10", "229"]);
    let mut holder = Command::new("unshare");
    let ready = w.path("ready");
    let script = format!(
        "{LEAVE_OTHERS}\nmount --bind '{}' /dev/fuse && touch '{}' && exec sleep 1000",
        node.display(),
        ready.display()
    );
    holder.args(["-m", "--propagation", "private", "bash", "-ec", &script]);
    let pid = w.child(holder);
    eventually("the namespace is there", || ready.exists());
    format!("/proc/{pid}/ns/mnt")
}

/// The binary where anybody can run it.
fn binary(w: &World) -> PathBuf {
    let to = w.path("forkdisk");
    if !to.exists() {
        fs::copy(BIN, &to).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&w.dir, fs::Permissions::from_mode(0o777)).unwrap();
    }
    to
}

pub fn run_as_nobody<I: AsRef<OsStr>>(w: &World, args: &[I]) -> Out {
    run_as_nobody_on(w, &w.path("nobodys"), args)
}

pub fn run_as_nobody_on<I: AsRef<OsStr>>(w: &World, store: &Path, args: &[I]) -> Out {
    run_in("/proc/self/ns/mnt", w, store, args)
}

fn run_in<I: AsRef<OsStr>>(namespace: &str, w: &World, store: &Path, args: &[I]) -> Out {
    let mut command = Command::new("timeout");
    command
        .args([
            "-k",
            "5",
            "60",
            "nsenter",
            &format!("--mount={namespace}"),
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
        ])
        .arg(binary(w))
        .arg("-S")
        .arg(store)
        .args(args)
        .env_remove("FORKDISK_STORE")
        .env_remove("FORKDISK_LOG")
        .stdin(std::process::Stdio::null())
        .current_dir(&w.dir);
    finish(command)
}

#[test]
fn a_user_works_without_devices() {
    if !root() {
        return;
    }
    let mut w = World::new();
    let image = w.file("i.img", &noise(1, 1 << 20));
    let namespace = with_fuse(&w);
    let ok = |args: &[&str]| {
        let out = run_in(&namespace, &w, &w.path("nobodys"), args);
        assert_eq!(out.code, 0, "{args:?} {out:?}");
        out.stdout.trim_end().to_string()
    };
    ok(&["init"]);
    ok(&["import", s(&image), "base"]);
    ok(&["create", "d", "--from", "base", "--count", "2"]);
    ok(&["snapshot", "d-1@s"]);
    for look in ["ls", "tree", "du", "check", "gc"] {
        ok(&[look]);
    }
    let out = w.path("out");
    ok(&["export", "d-1@s", s(&out)]);
    assert_eq!(sha256(&out), sha256(&image));
    ok(&["rename", "d-2", "e"]);
    ok(&["rm", "e"]);
    // A device needs root: said, and nothing stays attached.
    let device = run_in(&namespace, &w, &w.path("nobodys"), &["attach", "d-1"]);
    assert_eq!(device.code, 1, "{device:?}");
    assert!(device.stderr.contains("--via file"), "{device:?}");
    assert_eq!(ok(&["ls", "attached", "-H"]), "");
    // The file needs fusermount3.
    if !Path::new("/usr/bin/fusermount3").exists() {
        eprintln!("left out: the file, as there is no fusermount3");
    } else {
        let file = ok(&["attach", "d-1", "--via", "file"]);
        let script = format!(
            "dd if=/dev/zero of='{file}' bs=1000 count=3 seek=7 conv=notrunc,fsync status=none; sha256sum < '{file}'"
        );
        let seen = tool(
            "nsenter",
            [
                &format!("--mount={namespace}"),
                "setpriv",
                "--reuid",
                "65534",
                "--regid",
                "65534",
                "--clear-groups",
                "bash",
                "-ec",
                &script,
            ],
        );
        let mut expected = noise(1, 1 << 20);
        expected[7000..10_000].fill(0);
        let same = w.file("expected", &expected);
        assert_eq!(seen[..64], sha256(&same));
        ok(&["snapshot", "d-1@t"]);
        let told = run_as_nobody_on(&w, &w.path("nobodys"), &["attach", "d-1"]);
        assert_ne!(told.code, 0, "{told:?}");
        ok(&["detach", "d-1"]);
        ok(&["export", "d-1", s(&w.path("out2"))]);
        assert_eq!(sha256(&w.path("out2")), sha256(&same));
    }
    let all = fs::read_dir(w.path("nobodys/layers")).unwrap().flatten();
    for entry in all {
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "for its owner alone");
    }
    ok(&["daemon", "stop"]);
    ok(&["check"]);
    w.end_children();
    w.store = w.path("nobodys");
    w.nothing_left();
}
