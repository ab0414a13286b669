//! A parser of one command: to build that of all commands takes longer than much of what they do.

use super::{Cli, Globals, attach, disk, list, look, snapshot};
use clap::{Args, Command, FromArgMatches};
use std::ffi::OsString;

/// Adds a command's arguments.
type Arguments = fn(Command) -> Command;

/// What scripts call thousands of times.
const OFTEN: [(&str, Arguments); 7] = [
    ("create", disk::Create::augment_args),
    ("attach", attach::Attach::augment_args),
    ("detach", attach::Detach::augment_args),
    ("snapshot", snapshot::Snapshot::augment_args),
    ("rm", disk::Rm::augment_args),
    ("info", look::Info::augment_args),
    ("ls", list::Ls::augment_args),
];

/// What the arguments say, if they are one of these commands and nothing is wrong with them. All else (help, mistakes, other names of a command)
/// is for the parser of everything, which would have said the same.
pub(super) fn parse(args: &[OsString]) -> Option<Cli> {
    // It may be the value of an option: then what follows is no command of the parser below.
    let word = |arg: &OsString| OFTEN.iter().find(|(name, _)| arg == name);
    let &(name, arguments) = args.iter().skip(1).find_map(word)?;
    let all = Globals::augment_args(Command::new("forkdisk"))
        .disable_version_flag(true)
        .disable_help_subcommand(true)
        .subcommand(arguments(Command::new(name)));
    let matches = all.try_get_matches_from(args).ok()?;
    Cli::from_arg_matches(&matches).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow(args: &[OsString]) -> Option<Cli> {
        let matches = super::super::command().try_get_matches_from(args).ok()?;
        Cli::from_arg_matches(&matches).ok()
    }

    #[test]
    fn says_what_the_whole_parser_says() {
        let lines = [
            "create d --from base",
            "-S /s create a b -n --from x@y --json",
            "-S create create d --from base --size 10G",
            "--json attach d --ro -v",
            "attach d --no-such-option",
            "attach",
            "attach --help",
            "-q detach d e",
            "--store=attach detach --all",
            "snapshot d@s -m attach --freeze",
            "rm -r --yes a b",
            "info d --json",
            "ls disks -o name,size -H",
            "ls --history d",
            "-S attach ls",
            "--units si ls",
            "--quiet --verbose ls",
            "help ls",
            "--version ls",
            "fork d --from base",
            "tree ls",
        ];
        let mut quick = 0;
        for line in lines {
            let args: Vec<OsString> = std::iter::once("forkdisk")
                .chain(line.split(' '))
                .map(OsString::from)
                .collect();
            if let Some(parsed) = parse(&args) {
                quick += 1;
                let whole = slow(&args).map(|cli| format!("{cli:?}"));
                assert_eq!(Some(format!("{parsed:?}")), whole, "{line}");
            }
        }
        assert!(quick >= 10, "only {quick} lines were parsed by it");
    }
}
