//! Examples: shown by the long help of a command, and on its manual page.
//!
//! Always true: each is a line for a shell whose commands parse, and each command has one (a test sees to both).

use clap::Command;
use std::fmt::Write;

/// A line for a shell, and what it is good for.
pub(super) type Example = (&'static str, &'static str);

/// Of a command, named by its path: `daemon run`.
pub(super) fn of(path: &str) -> &'static [Example] {
    let found = EXAMPLES.iter().find(|(name, _)| *name == path);
    found.map_or(&[], |(_, examples)| examples)
}

/// Adds them to the long help of a command and of all below it.
pub(super) fn add(command: Command, path: &str) -> Command {
    let command = command.mut_subcommands(|sub| {
        let path = below(path, &sub);
        add(sub, &path)
    });
    let examples = of(path);
    if examples.is_empty() {
        return command;
    }
    let mut text = String::new();
    if let Some(before) = command.get_after_help() {
        let _ = write!(text, "{before}\n\n");
    }
    text.push_str("Examples:");
    for (line, meaning) in examples {
        let _ = write!(text, "\n  {line}\n      {meaning}");
    }
    command.after_long_help(text)
}

/// The path of a command below another.
pub(super) fn below(path: &str, command: &Command) -> String {
    format!("{path} {}", command.get_name()).trim().to_string()
}

/// All of them. The first are those of the program itself.
const EXAMPLES: [(&str, &[Example]); 36] = [
    (
        "",
        &[
            ("forkdisk import debian.img", "take an image into the store"),
            (
                "forkdisk create web --from debian --count 3",
                "make web-1, web-2 and web-3 of it",
            ),
            ("dev=$(forkdisk attach web-1 --mount /mnt)", "use one"),
            (
                "forkdisk snapshot web-1@clean",
                "keep its state, mounted or not",
            ),
        ],
    ),
    (
        "init",
        &[("forkdisk -S /srv/disks init", "make a store elsewhere")],
    ),
    (
        "doctor",
        &[(
            "forkdisk doctor",
            "what is missing here, and how to mend it",
        )],
    ),
    (
        "gc",
        &[("forkdisk gc -n", "what would go, and how much that is")],
    ),
    (
        "check",
        &[
            ("forkdisk check", "examine the whole store"),
            (
                "forkdisk check --repair -n",
                "list what could be mended without touching data",
            ),
        ],
    ),
    (
        "scrub",
        &[(
            "forkdisk scrub --rate 100M",
            "compare all data with its checksums, in the background of other work",
        )],
    ),
    (
        "import",
        &[
            ("forkdisk import debian.img", "as the base `debian`"),
            (
                "xz -dc debian.img.xz | forkdisk import - debian",
                "from a pipe",
            ),
            (
                "forkdisk import monday.stream web-monday",
                "apply what `export --since` wrote",
            ),
        ],
    ),
    (
        "export",
        &[
            ("forkdisk export web-1 web-1.img", "as a raw, sparse image"),
            (
                "forkdisk export --since web-1@sunday web-1@monday - | ssh host forkdisk import - web-1-monday",
                "send to another store what changed in between",
            ),
        ],
    ),
    (
        "create",
        &[
            ("forkdisk create web-1 --from debian", "a disk of an image"),
            ("forkdisk fork test --from web-1", "of a disk that runs"),
            (
                "forkdisk create job --from debian --count 100 --quota 2G",
                "a hundred, none of which fills the host",
            ),
            (
                "forkdisk create saved --from db --at -90s",
                "what the disk `db`, which keeps a history, was 90 seconds ago",
            ),
        ],
    ),
    (
        "snapshot",
        &[
            (
                "forkdisk snapshot web-1@clean -m 'after apt upgrade'",
                "keep the present state",
            ),
            (
                "forkdisk snapshot db@noon wal@noon --freeze",
                "two mounted disks, at one instant and with clean filesystems",
            ),
        ],
    ),
    (
        "rollback",
        &[(
            "forkdisk rollback web-1@clean",
            "undo all since that snapshot",
        )],
    ),
    (
        "resize",
        &[
            (
                "forkdisk resize web-1 +10G",
                "then `resize2fs DEVICE` or `xfs_growfs DIR`",
            ),
            (
                "forkdisk resize job-7 --quota 4G --on-full pause",
                "at most so much of its own; then writers wait",
            ),
            ("forkdisk resize db --history 10m", "keep ten minutes"),
        ],
    ),
    (
        "squash",
        &[("forkdisk squash web-1", "join the layers below it")],
    ),
    (
        "flatten",
        &[("forkdisk flatten web-1", "needs `debian` no more")],
    ),
    (
        "rewind",
        &[
            ("forkdisk ls --history db", "which points there are"),
            ("forkdisk rewind db --at -90s", "as it was 90 seconds ago"),
        ],
    ),
    (
        "commit",
        &[(
            "forkdisk commit web-1 web-golden -m 'with nginx'",
            "an image that disks can be made of",
        )],
    ),
    (
        "rename",
        &[("forkdisk rename web-1 web-old", "its snapshots go with it")],
    ),
    (
        "rm",
        &[
            ("forkdisk rm -n web-1", "what would go, and what that frees"),
            (
                "forkdisk rm -r -y debian",
                "an image and all that stands on it",
            ),
        ],
    ),
    (
        "trim",
        &[(
            "forkdisk trim web-1",
            "give back the space of removed files",
        )],
    ),
    (
        "attach",
        &[
            (
                "dev=$(forkdisk attach web-1)",
                "as a block device, whose name is printed",
            ),
            ("forkdisk attach web-1 --mount /mnt", "and mount it"),
            (
                "uri=$(forkdisk attach web-1 --via nbd)",
                "for QEMU and others, over a socket: `qemu-img info $uri`",
            ),
            (
                "forkdisk attach web-1@clean --mount /mnt/old",
                "a snapshot, read-only",
            ),
        ],
    ),
    (
        "detach",
        &[
            ("forkdisk detach web-1", "by name"),
            ("forkdisk detach /mnt", "or by mount point, or device"),
            ("forkdisk detach --all", "before the machine goes down"),
        ],
    ),
    (
        "ls",
        &[
            ("forkdisk ls disks -o name,size,excl", "some columns"),
            (
                "forkdisk ls -H -p -o name,created snapshots | sort -nk2",
                "for scripts: the oldest snapshots first",
            ),
        ],
    ),
    ("tree", &[("forkdisk tree debian", "all that stands on it")]),
    (
        "info",
        &[("forkdisk --json info web-1", "all there is to know of it")],
    ),
    (
        "du",
        &[("forkdisk du", "of all, and what full copies would take")],
    ),
    (
        "map",
        &[("forkdisk map web-1", "which layer each range comes from")],
    ),
    (
        "stats",
        &[
            ("forkdisk stats -i 1", "each second what came since"),
            ("forkdisk stats --prometheus", "for a scraper"),
        ],
    ),
    (
        "diff",
        &[
            (
                "forkdisk diff web-1@clean web-1 --stat",
                "how much changed since",
            ),
            (
                "forkdisk diff web-1@clean web-1@now --files",
                "which files did",
            ),
        ],
    ),
    (
        "daemon",
        &[("forkdisk daemon status", "does one run, and how is it?")],
    ),
    (
        "daemon run",
        &[(
            "forkdisk daemon run --foreground",
            "for a service manager; else `attach` starts it",
        )],
    ),
    (
        "daemon status",
        &[(
            "forkdisk --json daemon status",
            "pids, socket, mount, counters",
        )],
    ),
    (
        "daemon stop",
        &[("forkdisk daemon stop", "when nothing is attached")],
    ),
    (
        "daemon takeover",
        &[(
            "forkdisk daemon takeover",
            "after an upgrade: this program goes on, disks stay attached",
        )],
    ),
    (
        "bench",
        &[(
            "forkdisk bench read write --quick --vs raw",
            "against a loop device over a file",
        )],
    ),
    (
        "completions",
        &[(
            "forkdisk completions bash > /usr/share/bash-completion/completions/forkdisk",
            "for all users",
        )],
    ),
    (
        "man",
        &[
            ("forkdisk man | man -l -", "read it"),
            (
                "forkdisk man --dir /usr/local/share/man/man1",
                "install a page for each command",
            ),
        ],
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    /// The commands of this program in a line: from its name to where the shell takes over.
    fn commands(line: &str) -> Vec<Vec<String>> {
        let mut words = Vec::new();
        for (i, part) in line.split('\'').enumerate() {
            match i % 2 {
                0 => words.extend(part.split_whitespace()),
                _ => words.push(part),
            }
        }
        let mut found = Vec::new();
        for (i, word) in words.iter().enumerate() {
            if *word == "forkdisk" || word.ends_with("=$(forkdisk") {
                let rest = words[i + 1..].iter();
                let rest = rest.take_while(|w| !["|", ">"].contains(w));
                let rest = rest.map(|w| w.trim_end_matches(')').to_string());
                found.push(std::iter::once("forkdisk".into()).chain(rest).collect());
            }
        }
        found
    }

    #[test]
    fn every_example_parses() {
        for (_, examples) in EXAMPLES {
            for (line, _) in examples {
                let commands = commands(line);
                assert!(!commands.is_empty(), "{line}");
                for words in commands {
                    let parsed = cli::command().try_get_matches_from(&words);
                    parsed.unwrap_or_else(|e| panic!("{line}: {e}"));
                }
            }
        }
    }

    #[test]
    fn every_command_has_one() {
        fn collect(command: &Command, path: String, paths: &mut Vec<String>) {
            for sub in command.get_subcommands().filter(|c| !c.is_hide_set()) {
                collect(sub, below(&path, sub), paths);
            }
            paths.push(path);
        }
        let mut paths = Vec::new();
        collect(&cli::command(), String::new(), &mut paths);
        for path in &paths {
            assert!(!of(path).is_empty(), "`{path}` has no example");
        }
        for (path, _) in EXAMPLES {
            assert!(paths.iter().any(|p| p == path), "there is no `{path}`");
        }
    }
}
