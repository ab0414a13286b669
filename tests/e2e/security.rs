//! What keeps others out, and what a name, a link or a disk's contents cannot do (docs/SECURITY.md).

use crate::rig::*;
use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::UnixStream,
    },
    path::Path,
    process::Command,
};

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Everything in a store is its owner's alone, whatever the umask, and also in a directory that was there before.
#[test]
fn a_store_is_its_owners_alone() {
    if !root() {
        return;
    }
    let w = World::new();
    let made = w.mkdir("store");
    chmod(&made, 0o777);
    let image = w.ext4("base.img", 32);
    // Without a umask at all.
    let script = r#"umask 0; "$@" import base.img base && "$@" create d --from base && "$@" snapshot d@s && "$@" attach d && "$@" attach d@s --via file"#;
    let words = w.command([""; 0]);
    let words: Vec<&OsStr> = words.get_args().collect();
    let mut command = Command::new("bash");
    command
        .args(["-euc", script, "bash"])
        .args(&words[3..])
        .current_dir(&w.dir);
    let out = finish(command);
    assert_eq!(out.code, 0, "{out:?}");
    for line in out.stdout.lines() {
        w.note(line);
    }
    drop(image);
    let mut seen = 0;
    let mut todo = vec![w.store.clone()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        seen += 1;
        let shown = path.display();
        let mode = mode(&path);
        if kind.is_dir() {
            assert_eq!(mode, 0o700, "{shown}");
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if kind.is_socket() {
            assert_eq!(mode, 0o600, "{shown}");
        } else {
            assert!(kind.is_file(), "{shown}");
            // What can only be read is shown as such.
            assert!(mode & 0o177 == 0, "{shown}: {mode:o}");
        }
    }
    assert!(seen > 15, "{seen}");
    // The kernel keeps others out of the mount: no such option was asked for.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts
        .lines()
        .find(|l| l.contains(s(&w.store)) && l.contains("forkdisk"));
    let line = line.expect("the mount of the served files");
    assert!(
        !line.contains("allow_other") && !line.contains("allow_root"),
        "{line}"
    );
    assert!(
        line.contains("nosuid") && line.contains("nodev") && line.contains("noexec"),
        "{line}"
    );
    w.ok(["detach", "d"]);
    w.ok(["detach", "d@s"]);
    w.finish();
}

/// Another user can neither look into the mount nor talk to the daemon, even where all modes were opened.
#[test]
fn other_users_are_kept_out() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let file = w.ok(["attach", "d", "--via", "file"]);
    let run = w.store.join("run");
    let socket = run.join("control.sock");
    let nobody = |script: &str| {
        let mut command = Command::new("timeout");
        command.args([
            "20",
            "setpriv",
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "bash",
            "-c",
            script,
        ]);
        finish(command)
    };
    let read = format!("head -c 1 '{file}'");
    let out = nobody(&read);
    assert!(out.stderr.contains("Permission denied"), "{out:?}");
    let open = [&w.dir, &w.store, &run, &socket];
    let before = open.map(|path| mode(path));
    for path in open {
        chmod(path, 0o777);
    }
    let out = nobody(&read);
    assert!(
        out.stderr.contains("Permission denied"),
        "the mount is root's: {out:?}"
    );
    // A conversation of another user is ended without a word.
    let talk = format!(
        "printf '{{\"op\":\"hello\",\"version\":1}}\\n' | timeout 5 nc -U -w 3 '{}'",
        s(&socket)
    );
    if Path::new("/usr/bin/nc").exists() || Path::new("/bin/nc").exists() {
        let out = nobody(&talk);
        assert_eq!(out.stdout, "", "{out:?}");
    }
    let script = format!(
        "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect('{}')\ns.settimeout(5)\ntry:\n s.sendall(b'{{\"op\":\"status\"}}\\n'); print(repr(s.recv(100)))\nexcept OSError: print(repr(b''))",
        s(&socket)
    );
    let python = w.file("talk.py", script.as_bytes());
    chmod(&python, 0o644);
    let out = nobody(&format!(
        "command -v python3 >/dev/null || {{ echo \"b''\"; exit; }}; python3 '{}'",
        s(&python)
    ));
    assert_eq!(out.stdout.trim(), "b''", "{out:?}");
    // The owner is answered, and told about the modes.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"{\"op\":\"status\"}\n").unwrap();
    let mut said = String::new();
    BufReader::new(stream).read_line(&mut said).unwrap();
    assert!(said.contains("server_pid"), "{said}");
    let out = w.run(["ls"]);
    assert!(out.code == 0 && out.stderr.contains("chmod 700"), "{out:?}");
    let doctor = w.run(["doctor"]);
    let line = doctor
        .stdout
        .lines()
        .find(|l| l.contains("privacy"))
        .unwrap();
    assert!(line.contains("warn"), "{line}");
    for (path, mode) in open.into_iter().zip(before) {
        chmod(path, mode);
    }
    assert!(!w.run(["ls"]).stderr.contains("chmod"));
    w.ok(["detach", "d"]);
    w.finish();
}

/// Names reach the filesystem only after they were checked, from the command line and over the socket.
#[test]
fn names_do_not_leave_the_store() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["attach", "d"]);
    let outside = w.file("outside", b"untouched");
    let long = "x".repeat(5000);
    let bad = [
        "../outside",
        "../names/d",
        "names/../../outside",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "-rf",
        "--help",
        ".tmp-x",
        "a\0b",
        "a\nb",
        &long,
        "a@b@c",
        "d@../x",
        "d@.",
    ];
    let ask = |request: serde_json::Value| -> String {
        let mut stream = UnixStream::connect(w.store.join("run/control.sock")).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut said = String::new();
        BufReader::new(stream).read_line(&mut said).unwrap();
        said
    };
    let before = w.names();
    for name in bad {
        for request in [
            serde_json::json!({"op": "attach", "reference": name, "via": "file", "block_size": 512}),
            serde_json::json!({"op": "snapshot", "disk": "d", "name": name}),
            serde_json::json!({"op": "snapshot", "disk": name, "name": "s"}),
            serde_json::json!({"op": "create", "from": "d", "names": [name]}),
            serde_json::json!({"op": "create", "from": name, "names": ["n"]}),
            serde_json::json!({"op": "detach", "target": name}),
            serde_json::json!({"op": "attach-done", "name": name, "device": "/dev/null", "dev": 1}),
            serde_json::json!({"op": "detach-done", "name": name}),
            serde_json::json!({"op": name}),
        ] {
            let said = ask(request.clone());
            let refused =
                said.contains("\"error\"") || (request["op"] == "snapshot" && said.is_empty());
            assert!(refused, "{request}: {said}");
        }
    }
    assert_eq!(w.names(), before);
    // What is no text is no name; what only looks like a slash or a dot is a name like others.
    for args in [["info", "a\u{fffd}"], ["info", "x"]] {
        let mut command = w.command([args[0]]);
        command.arg(OsStr::from_bytes(b"caf\xe9/\xff"));
        let out = finish(command);
        assert_eq!(out.code, 2, "{out:?}");
    }
    let alike = "\u{ff0f}etc\u{2215}\u{2024}\u{2024}";
    w.ok(["create", alike, "--from", "base"]);
    assert!(w.store.join("names").join(alike).is_file());
    w.ok(["rm", alike]);
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    w.ok(["detach", "d"]);
    w.finish();
}

/// A symbolic link in the place of anything in the store is refused, and nothing is made, changed or read where it leads.
#[test]
fn links_in_a_store_are_refused() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    let device = w.ok(["attach", "d"]);
    w.ok(["detach", &device]);
    w.ok(["daemon", "stop"]);
    let away = w.mkdir("away");
    let base = w.json(["info", "base"])["id"].as_str().unwrap().to_string();
    let image = w.sparse("other.img", 1 << 20);
    let layer = w.layer_of("d");
    let places = [
        "names",
        "layers",
        "bases",
        "run",
        "lock",
        "forkdisk.toml",
        "names/d",
        &format!("bases/{base}"),
        &format!("bases/{base}/image"),
        &format!("bases/{base}/meta"),
        "run/disks",
        "run/daemon.lock",
        "run/daemon.log",
    ];
    let places = places.iter().map(|p| w.store.join(p)).chain([layer]);
    for (n, place) in places.enumerate() {
        let snapshot = format!("d@t{n}");
        let moved = away.join("moved");
        w.ok(["create", "spare", "--from", "base"]);
        fs::rename(&place, &moved).unwrap();
        symlink(&moved, &place).unwrap();
        let before = digest(&away);
        let shown = place.display().to_string();
        let mut refused = 0;
        for args in [
            &["ls"][..],
            &["create", "e", "--from", "d"],
            &["attach", "d"],
            &["snapshot", &snapshot],
            &["import", s(&image), "i"],
            &["rm", "-y", "spare"],
            &["gc"],
            &["check"],
        ] {
            let out = w.run(args);
            w.note(&out.stdout);
            assert!(
                out.code >= 0 && out.code != 101,
                "{shown}: {args:?} {out:?}"
            );
            if out.code != 0 {
                refused += 1;
                let told = out.stderr.contains("symbolic link") || out.stderr.contains("hint:");
                assert!(told || args[0] == "check", "{shown}: {args:?} {out:?}");
            } else if args[0] == "attach" {
                w.ok(["detach", "d"]);
            }
        }
        if fs::symlink_metadata(&place).is_ok_and(|m| m.is_symlink()) {
            assert_eq!(before, digest(&away), "{shown}: the link was followed");
        }
        assert!(refused > 0, "{shown}: nobody minded");
        w.run(["daemon", "stop"]);
        let _ = fs::remove_file(&place);
        fs::rename(&moved, &place).unwrap();
        // Nothing that the link hid was taken for garbage; what could be done all the same is undone.
        let names = w.names();
        for name in ["base", "d", "d@s"] {
            assert!(names.iter().any(|n| n == name), "{shown}: {name} is lost");
        }
        for name in ["e", "i", "spare"] {
            if names.iter().any(|n| n == name) {
                w.ok(["rm", "-y", name]);
            }
        }
    }
    w.ok(["daemon", "stop"]);
    assert_eq!(w.run(["check"]).code, 0);
}

fn digest(dir: &Path) -> String {
    shell(&format!(
        "cd '{}' && find . -printf '%p %y %m %s %T@\\n' | sort && find . -type f -print0 | sort -z | xargs -0r sha256sum",
        dir.display()
    ))
}

/// What a disk holds never decides how it is read: a guest chose it.
#[test]
fn contents_choose_no_format() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    let device = w.ok(["attach", "d"]);
    // What a guest could write so that its host would open another file as the disk's backing file.
    let mut header = b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\x01\0\0\0\0\x0b\0\0\0\x10".to_vec();
    header.resize(256, 0);
    header.extend(b"/etc/passwd");
    header.resize(1 << 20, 0);
    let evil = w.file("evil", &header);
    tool(
        "dd",
        [
            &format!("if={}", s(&evil)),
            &format!("of={device}"),
            "bs=1M",
            "oflag=direct",
            "conv=fsync,notrunc",
            "status=none",
        ],
    );
    w.ok(["detach", "d"]);
    let out = w.path("out.img");
    w.ok(["export", "d", s(&out)]);
    assert!(fs::read(&out).unwrap()[..1 << 20] == header);
    let told = w.fails(1, &["import", s(&out), "again"]);
    assert!(
        told.contains("qcow2") && told.contains("--format raw"),
        "{told}"
    );
    w.ok(["import", "--format", "raw", s(&out), "again"]);
    assert_eq!(w.json(["info", "again"])["size"], 256 << 20);
    let back = w.path("back.img");
    w.ok(["export", "again", s(&back)]);
    assert_eq!(sha256(&back), sha256(&out));
    // Called a qcow2 image it is one, and names another file: that is not looked at.
    let told = w.fails(1, &["import", "--format", "qcow2", s(&out), "more"]);
    assert!(told.contains("stands on a backing file"), "{told}");
    // A commit, a fork and a snapshot of it look at nothing either.
    w.ok(["snapshot", "d@s"]);
    w.ok(["create", "e", "--from", "d@s"]);
    let device = w.ok(["attach", "e"]);
    assert!(read_direct(Path::new(&device), 0, 1 << 20) == header);
    w.ok(["detach", "e"]);
    w.finish();
}
