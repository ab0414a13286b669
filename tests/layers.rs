//! The house: which module may call which (arrows point downward only), how large a file may grow, and what no file may contain.
//! It reads the sources, and so holds for code that no other test runs.
#![allow(missing_docs, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The floors from the top down. A module may use those of lower floors, and itself; nothing of its own floor.
const FLOORS: &[&[&str]] = &[
    &["main", "lib"],
    &["cli"],
    &["bench", "doctor"],
    &["daemon"],
    &["attach"],
    &["serve"],
    &["check", "convert"],
    &["store"],
    &["disk"],
    &["chain"],
    &["base", "layer"],
    &["map"],
    &["format"],
    &["io"],
    &["sys"],
    &["error"],
    &["sync", "units"],
];

/// Modules that may use less than what lies below them: who, what they may use, why.
const ONLY: &[(&str, &[&str], &str)] = &[
    (
        "format",
        &["error", "units"],
        "bytes in, values out: no I/O, no clock",
    ),
    ("map", &["format", "error", "units"], "pure"),
    (
        "serve",
        &["disk", "sys", "error", "units"],
        "a door knows disks, not stores",
    ),
    (
        "attach",
        &["serve", "sys", "error", "units"],
        "devices and mounts of files, whoever serves them",
    ),
];

/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &[
    "daemon/keeper.rs",
    "io/os.rs",
    "sys/blockdev.rs",
    "sys/cachestat.rs",
    "sys/fiemap.rs",
    "sys/freeze.rs",
    "sys/loopdev.rs",
    "sys/passthrough.rs",
    "sys/process.rs",
    "sys/shared.rs",
    "sys/signals.rs",
    "sys/uring.rs",
];

/// Calls that end the thread, outside of tests: file, how many, why they cannot happen.
const PANICS: &[(&str, usize, &str)] = &[
    (
        "cli/disk.rs",
        1,
        "the parser refuses a count of 0, so there is a first disk",
    ),
    (
        "cli/look.rs",
        1,
        "writing plain fields into a String cannot fail",
    ),
    (
        "cli/render/json.rs",
        1,
        "documents hold strings, numbers and lists only",
    ),
    (
        "io/sim/state.rs",
        1,
        "the imaginary disk: its own numbers are wrong, the test must end",
    ),
    (
        "sys/shared.rs",
        1,
        "a copy outside of the mapping would be undefined; all offsets are those of fixed layouts",
    ),
];

/// Longest file, in lines.
const LONGEST: usize = 1000;

struct Source {
    /// Relative to `src/`.
    path: String,
    text: String,
    /// Without comments, contents of strings, and test modules; as many lines as `text`.
    code: String,
}

impl Source {
    /// The part of `src/` it belongs to: its file or folder at the top.
    fn module(&self) -> &str {
        let first = self.path.split('/').next().unwrap_or(&self.path);
        first.strip_suffix(".rs").unwrap_or(first)
    }
}

fn sources() -> Vec<Source> {
    fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a folder of src") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    walk(&root, &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "the sources are not where they should be");
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a source file");
            let code = without_tests(&plain(&text));
            let path = path.strip_prefix(&root).expect("below src");
            Source {
                path: path.to_str().expect("UTF-8").to_string(),
                text,
                code,
            }
        })
        .collect()
}

/// Blanks comments and the contents of strings and characters; lines stay where they are.
fn plain(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    while at < chars.len() {
        let c = chars[at];
        let word_before = at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
        if c == '/' && peek(at + 1) == '/' {
            while at < chars.len() && chars[at] != '\n' {
                blank(&mut out, chars[at]);
                at += 1;
            }
        } else if c == '/' && peek(at + 1) == '*' {
            let mut depth = 0;
            while at < chars.len() {
                match (chars[at], peek(at + 1)) {
                    ('/', '*') => depth += 1,
                    ('*', '/') => depth -= 1,
                    _ => {
                        blank(&mut out, chars[at]);
                        at += 1;
                        continue;
                    }
                }
                out.push_str("  ");
                at += 2;
                if depth == 0 {
                    break;
                }
            }
        } else if c == 'r' && !word_before && matches!(peek(at + 1), '"' | '#') {
            let hashes = chars[at + 1..].iter().take_while(|c| **c == '#').count();
            if peek(at + 1 + hashes) != '"' {
                out.push(c); // A raw identifier.
                at += 1;
                continue;
            }
            let close: Vec<char> = std::iter::once('"')
                .chain(std::iter::repeat_n('#', hashes))
                .collect();
            at += hashes + 2;
            while at < chars.len() && !chars[at..].starts_with(&close) {
                blank(&mut out, chars[at]);
                at += 1;
            }
            at += close.len();
        } else if c == '"' {
            at += 1;
            while at < chars.len() && chars[at] != '"' {
                if chars[at] == '\\' {
                    at += 1;
                }
                blank(&mut out, peek(at));
                at += 1;
            }
            at += 1;
        } else if c == '\'' && peek(at + 1) == '\\' {
            at += 3;
            while at < chars.len() && chars[at] != '\'' {
                at += 1;
            }
            at += 1;
        } else if c == '\'' && peek(at + 2) == '\'' {
            at += 3;
        } else {
            out.push(c);
            at += 1;
        }
    }
    out
}

/// Blanks what stands under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    without(code, "#[cfg(test)]")
}

/// Blanks the items that begin with `start`.
fn without(code: &str, start: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(found) = rest.find(start) {
        out.push_str(&rest[..found]);
        let mut depth = 0usize;
        let mut end = rest.len();
        for (i, c) in rest[found..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && matches!(c, '}' | ';') {
                end = found + i + 1;
                break;
            }
        }
        out.extend(rest[found..end].chars().filter(|c| *c == '\n'));
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// The modules that `code` names by `crate::NAME`, groups included, and by `super::` out of its own folder.
fn uses(source: &Source) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut after = |rest: &str| {
        let rest = rest.trim_start();
        let word = |s: &str| -> String {
            s.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            return;
        };
        // The first word of each part at the outermost level of the group.
        let mut depth = 0;
        let mut part = 0;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    found.insert(word(group[part..i].trim_start()));
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    found.insert(word(group[part..i].trim_start()));
                    part = i + 1;
                }
                _ => {}
            }
        }
    };
    for (at, _) in source.code.match_indices("crate::") {
        // `$crate::` of a macro counts as well.
        after(&source.code[at + "crate::".len()..]);
    }
    // As many `super` as the file is deep lead to the root of the crate.
    let parts: Vec<&str> = source.path.trim_end_matches(".rs").split('/').collect();
    let depth = parts.len() - usize::from(parts.last() == Some(&"mod"));
    let to_root = "super::".repeat(depth);
    let mut from = 0;
    while let Some(at) = source.code[from..].find(&to_root) {
        let at = from + at;
        if !source.code[..at].ends_with("super::") {
            after(&source.code[at + to_root.len()..]);
        }
        from = at + to_root.len();
    }
    found.remove("");
    found
}

#[test]
fn arrows_point_downward() {
    let floor: BTreeMap<&str, usize> = FLOORS
        .iter()
        .enumerate()
        .flat_map(|(i, names)| names.iter().map(move |n| (*n, i)))
        .collect();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for source in sources() {
        let module = source.module().to_string();
        seen.insert(module.clone());
        let Some(&mine) = floor.get(module.as_str()) else {
            wrong.push(format!(
                "src/{}: `{module}` is on no floor of this test",
                source.path
            ));
            continue;
        };
        for used in uses(&source) {
            match floor.get(used.as_str()) {
                _ if used == module => {}
                None => wrong.push(format!(
                    "src/{}: `crate::{used}` is on no floor",
                    source.path
                )),
                Some(&theirs) if theirs < mine => wrong.push(format!(
                    "src/{}: `{module}` uses `{used}`, which is above it",
                    source.path
                )),
                Some(&theirs) if theirs == mine => wrong.push(format!(
                    "src/{}: `{module}` uses `{used}`, which is beside it",
                    source.path
                )),
                Some(_) => {}
            }
            if let Some((_, may, why)) = ONLY.iter().find(|(m, _, _)| *m == module)
                && used != module
                && !may.contains(&used.as_str())
            {
                wrong.push(format!(
                    "src/{}: `{module}` must not use `{used}` ({why})",
                    source.path
                ));
            }
        }
    }
    for name in floor.keys() {
        if !seen.contains(*name) {
            wrong.push(format!("`{name}` has a floor, but there is no such module"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Only the seam touches the disk under the store, and the core reads no clock and draws no random number.
#[test]
fn the_core_is_pure() {
    let mut wrong = Vec::new();
    for source in sources() {
        let forbidden: &[&str] = match source.module() {
            "units" | "error" | "format" | "map" => &[
                "std::fs",
                "std::time",
                "std::thread",
                "rustix::",
                "memmap2::",
                "getrandom",
            ],
            "layer" | "chain" | "base" | "disk" => &[
                "std::fs",
                "std::time",
                "rustix::",
                "libc::",
                "memmap2::",
                "getrandom",
                "io::os",
            ],
            "check" => &["rustix::", "memmap2::", "libc::"],
            _ => &[],
        };
        for word in forbidden {
            // An error knows what `libc` calls the codes.
            if source.code.contains(word) {
                wrong.push(format!("src/{} uses {word}", source.path));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A file that passes a thousand lines has more than one job.
#[test]
fn files_are_short() {
    let long: Vec<String> = sources()
        .iter()
        .filter(|s| s.text.lines().count() > LONGEST)
        .map(|s| format!("src/{} has {} lines", s.path, s.text.lines().count()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// A file opens with what it is for.
#[test]
fn files_say_what_they_are_for() {
    let silent: Vec<String> = sources()
        .into_iter()
        .filter(|s| !s.text.starts_with("//! "))
        .map(|s| s.path)
        .collect();
    assert!(silent.is_empty(), "no `//!` at the top of {silent:?}");
}

fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            !part(code[..at].chars().next_back()) && !part(code[at + word.len()..].chars().next())
        })
}

#[test]
fn unsafe_code_gives_its_reason() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        let mut any = false;
        for at in words(&source.code, "unsafe") {
            any = true;
            let line = source.code[..at].matches('\n').count();
            let near = &lines[line.saturating_sub(8)..=line];
            if !near
                .iter()
                .any(|l| l.contains("SAFETY:") || l.contains("# Safety"))
            {
                wrong.push(format!(
                    "src/{}:{}: unsafe without a SAFETY comment",
                    source.path,
                    line + 1
                ));
            }
        }
        if any != UNSAFE.contains(&source.path.as_str()) {
            wrong.push(format!(
                "src/{}: {} unsafe code, the list in this test says otherwise",
                source.path,
                if any { "has" } else { "has no" }
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_undone() {
    let mut wrong = Vec::new();
    for source in sources() {
        for word in ["todo!", "unimplemented!", "dbg!"] {
            if source.code.contains(word) {
                wrong.push(format!("src/{}: {word}", source.path));
            }
        }
        for (i, line) in source.text.lines().enumerate() {
            if ["TODO", "FIXME", "XXX"].iter().any(|w| line.contains(w)) {
                wrong.push(format!("src/{}:{}: {}", source.path, i + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_can_panic_is_listed() {
    let mut wrong = Vec::new();
    let mut listed: BTreeMap<&str, usize> = PANICS.iter().map(|(f, n, _)| (*f, *n)).collect();
    for source in sources() {
        // What is asserted while it is compiled ends the build, not the program.
        let code = without(&source.code, "const _: () =");
        let found: Vec<usize> = [
            ".unwrap()",
            ".expect(",
            "panic!(",
            "unreachable!(",
            "assert!(",
            "assert_eq!(",
            "assert_ne!(",
        ]
        .iter()
        .flat_map(|word| {
            code.match_indices(word)
                // `debug_assert!` is not in the released program.
                .filter(|(at, _)| !code[..*at].ends_with("debug_"))
                .map(|(at, _)| code[..at].matches('\n').count() + 1)
        })
        .collect();
        let may = listed.remove(source.path.as_str()).unwrap_or(0);
        if found.len() != may {
            wrong.push(format!(
                "src/{}: {} calls that can panic (lines {found:?}), {may} listed",
                source.path,
                found.len()
            ));
        }
    }
    wrong.extend(
        listed
            .keys()
            .map(|f| format!("src/{f} is listed but does not exist")),
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The reader of sources itself.
#[test]
fn sources_are_read_rightly() {
    let text = "a // crate::x\n\"crate::y\" /* unsafe\n*/ 'c' '\\'' b'\"' \"}\\\"\" r#\"crate::z\"# <'a> use crate::{format::{self, A}, units::B};\n#[cfg(test)]\nmod tests { fn f() { x.unwrap() } }\ncrate::io";
    let code = without_tests(&plain(text));
    assert_eq!(code.lines().count(), text.lines().count());
    assert!(!code.contains("unsafe") && !code.contains("unwrap"));
    let source = Source {
        path: "deep/er.rs".to_string(),
        text: text.to_string(),
        code: format!("{code} use super::super::store; use super::near;"),
    };
    assert_eq!(
        uses(&source).into_iter().collect::<Vec<_>>(),
        ["format", "io", "store", "units"]
    );
    assert_eq!(source.module(), "deep");
}
