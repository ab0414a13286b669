//! Names and sizes that make no sense.

use crate::rig::*;

#[test]
fn bad_names_are_refused_and_change_nothing() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    let image = w.sparse("other.img", 1 << 20);
    let long = "x".repeat(101);
    let huge = "x".repeat(5000);
    for name in [
        "",
        "a/b",
        "/",
        "..",
        ".",
        ".hidden",
        "../../etc/passwd",
        "a@b@c",
        "@",
        "@b",
        "a\nb",
        "a\tb",
        "a\x1bb",
        "a\x7fb",
        "a b",
        " ",
        "-x",
        "--",
        "--yes",
        &long,
        &huge,
        ".tmp-x",
        "a\u{85}b",
        "a\u{2028}b",
    ] {
        w.fails(2, &["create", name, "--from", "base"]);
        if !name.starts_with("--") {
            w.fails(2, &["import", s(&image), name]);
        }
        w.fails(2, &["rename", "d", name]);
        w.fails(2, &["snapshot", &format!("d@{name}")]);
        let code = |args: &[&str]| {
            let code = w.run(args).code;
            assert!(code == 2 || code == 12, "{args:?}: {code}");
            w.fails(code, args);
        };
        code(&["create", "new", "--from", name]);
        code(&["info", name]);
        code(&["rm", name]);
        code(&["attach", name]);
        code(&["detach", name]);
        code(&["snapshot", &format!("{name}@x")]);
    }
    w.fails(2, &["create", "a@b", "--from", "base"]);
    w.fails(2, &["snapshot", "d"]);
    w.fails(2, &["snapshot", "d@"]);
    w.fails(2, &["snapshot", "base@x"]);
    w.fails(2, &["snapshot", "d@s@t"]);
    w.fails(2, &["rename", "d@s", "e@s"]);
    w.fails(2, &["rename", "d@s", "e"]);
    // A name that is as long as may be.
    let longest = "é".repeat(50);
    w.ok(["create", &longest, "--from", "base"]);
    w.ok(["rm", &longest]);
    // Numbered names that become too long.
    w.fails(
        2,
        &["create", &"x".repeat(99), "--from", "base", "--count", "3"],
    );
    w.finish();
}

#[test]
fn names_are_unique_and_must_exist() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["snapshot", "d@s"]);
    let image = w.sparse("other.img", 1 << 20);
    w.fails(13, &["create", "d", "--from", "base"]);
    w.fails(13, &["create", "base", "--from", "base"]);
    w.fails(13, &["import", s(&image), "base"]);
    w.fails(13, &["import", s(&image), "d"]);
    w.fails(13, &["snapshot", "d@s"]);
    w.fails(13, &["rename", "d", "base"]);
    w.fails(13, &["rename", "d", "d"]);
    w.fails(13, &["init"]);
    w.ok(["create", "n-2", "--from", "base"]);
    w.fails(13, &["create", "n", "--from", "base", "--count", "3"]);
    w.fails(12, &["create", "e", "--from", "nothing"]);
    w.fails(12, &["create", "e", "--from", "d@nothing"]);
    w.fails(12, &["create", "e", "--from", "deadbeef"]);
    for command in ["info", "rm", "attach", "du", "map", "tree", "check"] {
        w.fails(12, &[command, "nothing"]);
    }
    w.fails(12, &["snapshot", "nothing@s"]);
    w.fails(12, &["rename", "nothing", "e"]);
    w.fails(12, &["export", "nothing", "-"]);
    assert_eq!(w.names(), ["base", "d", "d@s", "n-2"]);
    // Attached, the same.
    w.ok(["attach", "d"]);
    w.fails_here(13, &["snapshot", "d@s"]);
    w.fails_here(13, &["create", "base", "--from", "d"]);
    w.fails_here(2, &["create", "a/b", "--from", "d"]);
    w.fails_here(2, &["snapshot", "d@a b"]);
    w.ok(["detach", "d"]);
    w.finish();
}

#[test]
fn sizes_have_limits() {
    if !root() {
        return;
    }
    let w = World::with_base();
    for size in [
        "0",
        "255M",
        "1",
        "4095",
        "17T",
        "16385G",
        "16777216T",
        "99999999999999999999",
        "-1",
        "10GB",
        "x",
        "",
    ] {
        w.fails(2, &["create", "d", "--from", "base", "--size", size]);
    }
    w.fails(2, &["create", "d", "--from", "base", "--size", "+16T"]);
    w.fails(2, &["create", "d", "--from", "base", "--count", "0"]);
    w.fails(2, &["create", "d", "--from", "base", "--count", "-1"]);
    w.fails(2, &["create", "d", "--from", "base", "--count", "1000001"]);
    // From one block to 16 TiB.
    assert_eq!(
        w.json(["create", "d", "--from", "base", "--size", "16T"])["size"],
        16u64 << 40
    );
    let device = w.ok(["attach", "d"]);
    assert_eq!(
        tool("blockdev", ["--getsize64", &device]).trim(),
        (16u64 << 40).to_string()
    );
    // Its very last block.
    let piece = w.file("piece", &noise(1, 4096));
    let last = ((16u64 << 40) - 4096).to_string();
    tool(
        "dd",
        [
            &format!("if={}", piece.display()),
            &format!("of={device}"),
            "bs=4k",
            "oflag=direct,seek_bytes",
            &format!("seek={last}"),
            "conv=notrunc,fsync",
            "status=none",
        ],
    );
    w.ok(["detach", "d"]);
    let device = w.ok(["attach", "d"]);
    assert!(read_direct(device.as_ref(), (16 << 40) - 4096, 4096) == noise(1, 4096));
    tool("blkdiscard", ["-f", &device]);
    assert!(read_direct(device.as_ref(), (16 << 40) - 4096, 4096) == [0; 4096]);
    w.ok(["detach", "d"]);
    let tiny = w.file("tiny.img", b"x");
    w.ok(["import", s(&tiny)]);
    assert_eq!(w.json(["create", "t", "--from", "tiny"])["size"], 4096);
    let device = w.ok(["attach", "t"]);
    let mut expected = vec![0; 4096];
    expected[0] = b'x';
    assert!(read_direct(device.as_ref(), 0, 4096) == expected);
    w.ok(["detach", "t"]);
    w.finish();
}

#[test]
fn without_a_store() {
    if !root() {
        return;
    }
    let w = World::new();
    for args in [
        &["ls"][..],
        &["tree"],
        &["du"],
        &["check"],
        &["gc"],
        &["info", "x"],
        &["create", "a", "--from", "b"],
        &["attach", "x"],
        &["detach", "x"],
        &["rm", "x"],
        &["snapshot", "a@b"],
        &["rename", "a", "b"],
        &["export", "a", "b"],
        &["daemon", "status"],
        &["daemon", "stop"],
        &["daemon", "run"],
        &["map", "x"],
    ] {
        w.fails(10, args);
    }
    assert!(!w.store.exists());
    // A directory that is something else.
    w.mkdir("store");
    w.fails(10, &["ls"]);
    w.file("store/mine", b"precious");
    w.fails(10, &["ls"]);
    w.fails(13, &["init"]);
    let image = w.sparse("i.img", 1 << 20);
    w.fails(13, &["import", s(&image)]);
    assert_eq!(std::fs::read_dir(&w.store).unwrap().count(), 1);
}

/// All names lost is not a store full of garbage: `gc` asks, and `check --repair` brings them back.
#[test]
fn lost_names_are_not_taken_for_garbage() {
    if !root() {
        return;
    }
    let w = World::with_base();
    w.ok(["create", "d", "--from", "base"]);
    w.ok(["create", "e", "--from", "d"]);
    w.ok(["snapshot", "d@s"]);
    let names = w.names();
    let dir = w.store.join("names");
    for entry in std::fs::read_dir(&dir).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let told = w.fails(2, &["gc"]);
    assert!(told.contains("check --repair"), "{told}");
    w.ok(["check", "--repair", "--yes"]);
    assert_eq!(w.names(), names);
    w.ok(["check"]);
    // Whoever says so has it all removed.
    for entry in std::fs::read_dir(&dir).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    w.ok(["gc", "--yes"]);
    assert_eq!(
        std::fs::read_dir(w.store.join("layers")).unwrap().count(),
        0
    );
}
