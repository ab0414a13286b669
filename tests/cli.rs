//! The command line, as far as it needs no store: usage, errors, completions, the manual.

use forkdisk::cli::{
    command,
    render::size::{SizeArg, Units, parse_size},
};
use serde_json::Value;
use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

fn forkdisk(args: &[&str]) -> Output {
    run(Command::new(env!("CARGO_BIN_EXE_forkdisk")).args(args))
}

fn run(command: &mut Command) -> Output {
    command
        .env_remove("FORKDISK_LOG")
        .env("FORKDISK_STORE", "/nonexistent/forkdisk-test")
        .stdin(Stdio::null())
        .output()
        .expect("forkdisk runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// The JSON error of a failed command, which says nothing else.
fn json_error(output: &Output) -> Value {
    assert!(output.stdout.is_empty(), "data: {}", text(&output.stdout));
    let document: Value = serde_json::from_slice(&output.stderr).expect("one JSON document");
    assert_eq!(document["schema"], 1);
    for field in ["code", "message", "hint"] {
        let value = document["error"][field].as_str();
        assert!(
            value.is_some_and(|v| !v.is_empty()),
            "no {field}: {document}"
        );
    }
    document["error"].clone()
}

#[test]
fn sizes_are_read_and_shown() {
    for (given, bytes, shown) in [
        ("10G", 10 << 30, "10.0 GiB"),
        ("64k", 64 << 10, "64.0 KiB"),
        ("1.5T", 3 << 39, "1.5 TiB"),
        ("4096", 4096, "4.0 KiB"),
        ("0", 0, "0 B"),
    ] {
        assert_eq!(parse_size(given), Ok(bytes));
        assert_eq!(Units::Iec.show(bytes), shown);
        assert_eq!(parse_size(shown), Ok(bytes), "what is shown can be read");
    }
    assert_eq!("+1G".parse(), Ok(SizeArg::More(1 << 30)));
}

#[test]
fn the_word_of_a_group_is_no_command() {
    for (args, command) in [
        (["store", "init"], "init"),
        (["image", "import"], "import"),
        (["disk", "create"], "create"),
    ] {
        let output = forkdisk(&args);
        assert_eq!(output.status.code(), Some(2));
        let said = text(&output.stderr);
        let hint = format!("  hint: write `forkdisk {command}`\n");
        assert!(said.ends_with(&hint), "{said}");
    }
}

#[test]
fn usage_errors_exit_with_2_and_a_hint() {
    for args in [
        &[][..],
        &["bogus"],
        &["create"],
        &["create", "web"],
        &["create", "web", "--from"],
        &["create", "web", "--fron", "debian"],
        &["create", "web", "--from", "debian", "--size", "10GB"],
        &["create", "web", "--from", "debian", "--size", "-1"],
        &["create", "web", "--from", "debian", "--count", "0"],
        &["create", "-web", "--from", "debian"],
        &["create", "web", "--from", "debian", "--history", "forever"],
        &["create", "web", "--from", "debian", "--history", "10m,5m"],
        &["create", "web", "--from", "debian", "--at", "yesterday"],
        &[
            "create", "web", "--from", "debian", "--at", "-1h", "--count", "2",
        ],
        &["rewind", "web"],
        &["rewind", "web", "--at", "5m"],
        &["ls", "disks", "--history", "web"],
        &["rm"],
        &["rename", "a"],
        &["import", "-"],
        &["import", "a", "--copy", "--link"],
        &["attach", "a", "--block-size", "1024"],
        &["attach", "a", "--via", "smoke"],
        &["attach", "a", "--mount", "/dev/null"],
        &["attach", "a", "--via", "file", "--mount", "/tmp"],
        &["snapshot", "web"],
        &["snapshot", "web@a", "web"],
        &["rollback", "web"],
        &["resize", "web"],
        &["resize", "web", "10GB"],
        &["resize", "web", "--quota", "much"],
        &["resize", "web", "--quota", "1G", "--on-full", "hope"],
        &["commit", "web"],
        &["export", "web", "out", "-O", "raw", "--since", "web@a"],
        &["diff"],
        &["diff", "a", "b", "c"],
        &["check", "web", "--repair"],
        &["scrub", "--rate", "fast"],
        &["scrub", "a", "b"],
        &["ls", "everything"],
        &["daemon"],
        &["daemon", "bogus"],
        &["stats", "a", "--all"],
        &["stats", "--interval", "0"],
        &["stats", "--prometheus", "-i", "1"],
        &["bench", "everything"],
        &["bench", "--vs", "zfs"],
        &["--color", "sometimes", "ls"],
        &["--units", "furlongs", "ls"],
        &["-q", "-v", "ls"],
    ] {
        let plain = forkdisk(args);
        assert_eq!(plain.status.code(), Some(2), "{args:?}");
        assert!(plain.stdout.is_empty(), "{args:?}");
        let said = text(&plain.stderr);
        let lines: Vec<&str> = said.lines().collect();
        assert!(lines[0].starts_with("error: "), "{args:?}: {said}");
        assert!(lines[1].starts_with("  hint: "), "{args:?}: {said}");

        let mut json = vec!["--json"];
        json.extend(args);
        let output = forkdisk(&json);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert_eq!(json_error(&output)["code"], "invalid", "{args:?}");
    }
}

#[test]
fn a_name_with_a_dash_is_told_to_be_no_name() {
    let said = text(&forkdisk(&["create", "-web", "--from", "debian"]).stderr);
    assert!(said.contains("names do not begin with `-`"), "{said}");
}

#[test]
fn a_missing_store_exits_with_10() {
    for args in [
        &["ls"][..],
        &["tree"],
        &["info", "x"],
        &["diff", "x"],
        &["commit", "x", "y"],
        &["export", "x", "y", "-O", "stream"],
        &["create", "a", "--from", "b"],
        &["attach", "x"],
        &["rm", "x"],
        &["rollback", "x@y"],
        &["resize", "x", "1G"],
        &["trim", "x"],
        &["gc"],
        &["check"],
        &["check", "--repair"],
        &["scrub"],
        &["stats"],
        &["stats", "--prometheus"],
        &["daemon", "status"],
    ] {
        let output = forkdisk(args);
        assert_eq!(output.status.code(), Some(10), "{args:?}");
        let mut json = vec!["--json"];
        json.extend(args);
        let error = json_error(&forkdisk(&json));
        assert_eq!(error["code"], "no_store", "{args:?}");
        assert_eq!(error["exit_code"], 10, "{args:?}");
    }
}

#[test]
fn what_is_no_raw_image_is_not_imported() {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, start, way) in [
        (
            "a.qcow2",
            &b"QFI\xfb\0\0\0\x03"[..],
            "import --format qcow2",
        ),
        ("a.vmdk", b"KDMV\0\0\0\x03", "qemu-img convert"),
        ("a.gz", b"\x1f\x8b\x08\0\0\0\0\0", "zcat"),
    ] {
        let file = dir.path().join(name);
        std::fs::write(&file, start).expect("written");
        let output = forkdisk(&["--json", "import", file.to_str().expect("UTF-8")]);
        let error = json_error(&output);
        assert_eq!(error["code"], "unsupported");
        let hint = error["hint"].as_str().expect("a hint");
        assert!(hint.contains(way), "{hint}");
    }
}

#[test]
fn help_and_version_are_data() {
    for args in [&["--help"][..], &["help", "create"], &["-V"]] {
        let output = forkdisk(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
        assert!(!output.stdout.contains(&0x1b), "colour in a pipe");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_forkdisk"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("forkdisk runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let mut command = Command::new(env!("CARGO_BIN_EXE_forkdisk"));
    let child = command
        .args(["completions", "bash"])
        .stdout(full.expect("/dev/full"))
        .stderr(Stdio::piped())
        .spawn();
    let output = child.expect("forkdisk runs").wait_with_output();
    assert_eq!(output.expect("it ends").status.code(), Some(14));
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = text(&forkdisk(&["completions", shell]).stdout);
        for name in ["snapshot", "attach", "daemon"] {
            assert!(script.contains(name), "{shell} lacks {name}");
        }
    }
}

#[test]
fn the_manual_has_a_page_for_every_command() {
    let dir = tempfile::tempdir().expect("a directory");
    let pages = dir.path().join("man");
    let output = forkdisk(&["man", "--dir", pages.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for path in commands() {
        let file = pages.join(format!("{}.1", path.join("-")));
        let page = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        assert!(page.contains(".SH NAME"), "{file:?}");
    }
    let main = text(&forkdisk(&["man"]).stdout);
    for section in ["ENVIRONMENT", "EXIT STATUS", "EXAMPLES", "OPTIONS"] {
        assert!(main.contains(section), "no {section}");
    }
}

#[test]
fn the_doctor_needs_no_store_and_gives_a_fix_for_all_it_finds() {
    let output = forkdisk(&["--json", "doctor"]);
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let checks = document["checks"].as_array().expect("checks");
    let failed = checks.iter().any(|c| c["status"] == "fail");
    assert_eq!(document["ok"], !failed);
    assert_eq!(output.status.code(), Some(i32::from(failed)));
    for check in checks {
        assert_eq!(check["status"] == "ok", check["fix"].is_null(), "{check}");
    }
}

#[test]
fn without_fio_nothing_that_needs_it_is_measured() {
    let dir = tempfile::tempdir().expect("a directory");
    let place = dir.path().to_str().expect("UTF-8");
    let bench = |what: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkdisk"));
        command.args(["--json", "bench", what, "--dir", place]);
        run(command.env("PATH", place))
    };
    for what in ["read", "write", "chain", "all"] {
        let output = bench(what);
        assert_eq!(output.status.code(), Some(1), "{what}");
        let error = json_error(&output);
        assert_eq!(error["code"], "unsupported", "{what}");
        let hint = error["hint"].as_str().expect("a hint");
        assert!(hint.contains("apt-get install fio"), "{hint}");
    }
    let left = std::fs::read_dir(dir.path()).expect("listed").count();
    assert_eq!(left, 0);
}

#[test]
fn a_bench_says_what_it_would_measure() {
    let args = [
        "--json",
        "-n",
        "bench",
        "fork",
        "--vs",
        "reflink,raw",
        "--dir",
        "/",
    ];
    let output = forkdisk(&args);
    assert_eq!(output.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(document["groups"], serde_json::json!(["fork"]));
    assert_eq!(
        document["peers"],
        serde_json::json!(["raw", "xfs", "btrfs"])
    );
    assert_eq!(document["dry_run"], true);
}

/// The words of every command of the parser that is not hidden: `["forkdisk", "daemon", "run"]`.
fn commands() -> Vec<Vec<String>> {
    fn below(command: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
        let shown = |c: &&clap::Command| c.get_name() != "help" && !c.is_hide_set();
        for sub in command.get_subcommands().filter(shown) {
            let mut path = path.to_vec();
            path.push(sub.get_name().to_string());
            all.push(path.clone());
            below(sub, &path, all);
        }
    }
    let mut all = Vec::new();
    below(&command(), &["forkdisk".to_string()], &mut all);
    all
}

#[test]
fn the_parser_is_sound() {
    command().debug_assert();
}

/// docs/CLI.md has a section for every command, and in it every option, value and alias; and no command
/// that does not exist.
#[test]
fn the_manual_in_docs_covers_the_parser() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CLI.md");
    let manual = std::fs::read_to_string(file).expect("docs/CLI.md");
    let section = |title: &str| {
        let from = manual.find(&format!("{title}\n"))?;
        let body = &manual[from + title.len()..];
        let end = body.find("\n## ").unwrap_or(body.len());
        let end = end.min(body.find("\n### ").unwrap_or(body.len()));
        Some(&body[..end])
    };
    let root = command();
    let leaves: Vec<(Vec<String>, clap::Command)> = commands()
        .into_iter()
        .map(|path| {
            let mut found = &root;
            for word in &path[1..] {
                found = found.find_subcommand(word).expect("a command");
            }
            (path, found.clone())
        })
        .filter(|(_, command)| !command.has_subcommands())
        .collect();
    for (path, command) in &leaves {
        let name = path.join(" ");
        let body = section(&format!("### `{name}`"))
            .unwrap_or_else(|| panic!("docs/CLI.md has no section for `{name}`"));
        for alias in command.get_visible_aliases() {
            assert!(body.contains(&format!("`{alias}`")), "{name}: no {alias}");
        }
        assert_options(&name, command, body);
        assert!(
            body.contains("JSON") || name == "forkdisk daemon run",
            "{name}: no JSON"
        );
    }
    let global = section("## Options of all commands").expect("the global options");
    assert_options("forkdisk", &root, global);
    for title in manual.lines().filter(|line| line.starts_with("### ")) {
        let known = leaves
            .iter()
            .any(|(path, _)| title == format!("### `{}`", path.join(" ")));
        assert!(
            known,
            "docs/CLI.md tells of a command that is not there: {title}"
        );
    }
}

/// Every option, and every value it can have, stands in the text.
fn assert_options(name: &str, command: &clap::Command, body: &str) {
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        if matches!(id, "help" | "version") {
            continue;
        }
        let mut wanted = Vec::new();
        wanted.extend(arg.get_long().map(|long| format!("--{long}")));
        wanted.extend(arg.get_short().map(|short| format!("`-{short}")));
        let values = arg.get_possible_values();
        wanted.extend(values.iter().map(|v| v.get_name().to_string()));
        // Flags have the values true and false for clap.
        wanted.retain(|word| !matches!(word.as_str(), "true" | "false"));
        for word in wanted {
            assert!(
                body.contains(&word),
                "docs/CLI.md, {name}: {word} is missing"
            );
        }
    }
}
