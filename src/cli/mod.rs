//! The command line: one thin file per command group, which parses, calls and prints.
//!
//! Always true:
//! - stdout carries data only: text, or under `--json` one document. Talk, progress, questions and
//!   errors go to stderr;
//! - every error has a hint, and its kind alone decides the exit code;
//! - nothing is changed under `--dry-run`;
//! - a reader that closes stdout early ends the command quietly.
//!
//! Not here: what names are valid, what may be removed, how anything is done.

mod attach;
mod bench;
mod commit;
mod context;
mod daemon;
mod diff;
mod diff_files;
mod disk;
mod examples;
mod history;
mod image;
mod layers;
mod list;
mod look;
mod names;
mod quick;
pub mod render;
mod resize;
mod rollback;
mod shell;
mod snapshot;
mod states;
mod stats;
mod store;
mod tree;
mod trim;
mod ui;

use crate::{
    error::{Error, Kind},
    sys::signals,
};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use context::Context;
use render::size::Units;
use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};
use ui::{ColorMode, ProgressMode, Ui};

/// The whole command line.
#[derive(Parser, Debug)]
#[command(
    name = "forkdisk",
    version,
    about = "Thousands of virtual disks over one shared base image",
    long_about = "forkdisk keeps virtual disks as thin copy-on-write layers over shared, read-only base images. \
        A fork takes no time and almost no space; what a disk changes is its own. Each disk can be attached \
        as a block device, and mounted, formatted and used as any other.",
    after_help = "REF is a NAME, a DISK@SNAPSHOT, or the beginning of an id. Sizes: 10G is 10 GiB; 64k, 1.5T.\n\
        `forkdisk help COMMAND` tells more about a command, `forkdisk man` is the manual.",
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(flatten)]
    global: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Global options")]
struct Globals {
    /// The store [env: FORKDISK_STORE] [default: /var/lib/forkdisk as root, else $XDG_DATA_HOME/forkdisk]
    #[arg(
        short = 'S',
        long,
        global = true,
        value_name = "DIR",
        value_hint = clap::ValueHint::DirPath
    )]
    store: Option<PathBuf>,
    /// Print one JSON document; errors are JSON on stderr
    #[arg(long, global = true)]
    json: bool,
    /// Print data and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Log more to stderr (-v, -vv, -vvv); FORKDISK_LOG sets a filter
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// When to use colour: auto, always or never; auto honours NO_COLOR
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        value_enum,
        default_value_t,
        hide_possible_values = true,
        hide_default_value = true
    )]
    color: ColorMode,
    /// How long work shows how far it is: auto, plain or none
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        value_enum,
        default_value_t,
        hide_possible_values = true,
        hide_default_value = true
    )]
    progress: ProgressMode,
    /// Only say what would be done
    #[arg(short = 'n', long, global = true)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long, global = true)]
    yes: bool,
    /// Units of sizes in text: iec (1024s), si (1000s) or b (bytes)
    #[arg(
        long,
        global = true,
        value_name = "UNITS",
        value_enum,
        default_value_t,
        hide_possible_values = true,
        hide_default_value = true
    )]
    units: Units,
}

#[derive(Subcommand, Debug)]
enum Command {
    Init(store::Init),
    Doctor(store::Doctor),
    Gc(store::Gc),
    Check(store::Check),
    Scrub(store::Scrub),
    Import(image::Import),
    Export(image::Export),
    #[command(visible_alias = "fork")]
    Create(disk::Create),
    #[command(visible_alias = "snap")]
    Snapshot(snapshot::Snapshot),
    Rollback(rollback::Rollback),
    Resize(resize::Resize),
    Squash(layers::Squash),
    Flatten(layers::Flatten),
    Rewind(history::Rewind),
    Commit(commit::Commit),
    Rename(disk::Rename),
    Rm(disk::Rm),
    Trim(trim::Trim),
    Attach(attach::Attach),
    Detach(attach::Detach),
    Ls(list::Ls),
    Tree(tree::Tree),
    Info(look::Info),
    Du(look::Du),
    Map(look::Map),
    Stats(stats::Stats),
    Diff(diff::Diff),
    #[command(subcommand)]
    Daemon(daemon::Daemon),
    Bench(bench::Bench),
    Completions(shell::Completions),
    Man(shell::Man),
}

/// Why a command does not go on.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It failed.
    Error(Error),
    /// Nobody reads its output any more.
    Pipe,
    /// It has said everything; this is the exit code.
    Code(u8),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}

impl Stop {
    /// Writing to stdout failed.
    fn output(error: &io::Error) -> Stop {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Stop::Pipe;
        }
        let error = Error::io("write to", "standard output", error);
        Stop::Error(error.hint("make room, or make it writable, where the output goes"))
    }
}

/// How a command ends.
type Outcome = Result<(), Stop>;

/// The parser, for completions and tests.
pub fn command() -> clap::Command {
    examples::add(Cli::command(), "")
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    // A chain of 1,000 layers is 1,000 open files; the usual limit is lower than what we may have.
    crate::sys::process::raise_open_files_limit();
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(cli) = quick::parse(&args) {
        return run(cli);
    }
    let parsed = command()
        .try_get_matches_from(&args)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    match parsed {
        Ok(cli) => run(cli),
        Err(error) => not_a_command(&error, &args),
    }
}

fn run(cli: Cli) -> ExitCode {
    let Globals {
        store,
        json,
        quiet,
        verbose,
        color,
        progress,
        dry_run,
        yes,
        units,
    } = cli.global;
    let background = matches!(&cli.command, Command::Daemon(d) if d.logs_for_itself());
    if !background {
        start_logging(quiet, verbose);
    }
    // Not left to clap, for which an empty variable is a mistake.
    let by_env = || std::env::var_os("FORKDISK_STORE").map(PathBuf::from);
    let named = store
        .or_else(by_env)
        .filter(|path| !path.as_os_str().is_empty());
    let path = named.unwrap_or_else(context::default_store);
    let context = Context {
        ui: Ui::new(json, quiet, yes, units, color, progress),
        dry_run,
        path: std::path::absolute(&path).unwrap_or(path),
    };
    let outcome = match cli.command {
        Command::Init(c) => c.run(&context),
        Command::Doctor(c) => c.run(&context),
        Command::Gc(c) => c.run(&context),
        Command::Check(c) => c.run(&context),
        Command::Scrub(c) => c.run(&context),
        Command::Import(c) => c.run(&context),
        Command::Export(c) => c.run(&context),
        Command::Create(c) => c.run(&context),
        Command::Snapshot(c) => c.run(&context),
        Command::Rollback(c) => c.run(&context),
        Command::Resize(c) => c.run(&context),
        Command::Squash(c) => c.run(&context),
        Command::Flatten(c) => c.run(&context),
        Command::Rewind(c) => c.run(&context),
        Command::Commit(c) => c.run(&context),
        Command::Rename(c) => c.run(&context),
        Command::Rm(c) => c.run(&context),
        Command::Trim(c) => c.run(&context),
        Command::Attach(c) => c.run(&context),
        Command::Detach(c) => c.run(&context),
        Command::Ls(c) => c.run(&context),
        Command::Tree(c) => c.run(&context),
        Command::Info(c) => c.run(&context),
        Command::Du(c) => c.run(&context),
        Command::Map(c) => c.run(&context),
        Command::Stats(c) => c.run(&context),
        Command::Diff(c) => c.run(&context),
        Command::Daemon(c) => c.run(&context),
        Command::Bench(c) => c.run(&context),
        Command::Completions(c) => c.run(&context),
        Command::Man(c) => c.run(&context),
    };
    match outcome {
        Ok(()) | Err(Stop::Pipe) => ExitCode::SUCCESS,
        Err(Stop::Code(code)) => code.into(),
        Err(Stop::Error(mut error)) => {
            // Whatever broke off because of the signal, the signal is the reason.
            if signals::caught() && error.kind() != Kind::Interrupted {
                tracing::debug!("interrupted during: {error}");
                error = Error::new(Kind::Interrupted, "interrupted");
            }
            context.ui.error(&error);
            error.exit_code().into()
        }
    }
}

/// Help and version go to stdout; anything else is a usage error.
fn not_a_command(error: &clap::Error, args: &[OsString]) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    // Nothing could be parsed, so what decides how to answer is looked for by hand.
    let flags = args.iter().skip(1).take_while(|arg| *arg != "--");
    let (mut json, mut never, mut last) = (false, false, None);
    for arg in flags {
        json |= arg == "--json";
        never |= arg == "--color=never" || (last == Some("--color") && arg == "never");
        last = arg.to_str();
    }
    if matches!(error.kind(), DisplayHelp | DisplayVersion) {
        let text = error.render();
        let plain = never || !io::IsTerminal::is_terminal(&io::stdout());
        let text = if plain {
            text.to_string()
        } else {
            text.ansi().to_string()
        };
        let mut out = io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        return match written.map_err(|e| Stop::output(&e)) {
            Err(Stop::Error(e)) => e.exit_code().into(),
            _ => ExitCode::SUCCESS,
        };
    }
    let color = if never {
        ColorMode::Never
    } else {
        ColorMode::Auto
    };
    let ui = Ui::new(json, false, false, Units::Iec, color, ProgressMode::None);
    let error = render::error::from_clap(error, meant(args).as_deref());
    ui.error(&error);
    error.exit_code().into()
}

/// The command that was meant, for a hint: the first argument that is one.
fn meant(args: &[OsString]) -> Option<String> {
    let parser = command();
    let mut words = args.iter().skip(1).filter_map(|arg| arg.to_str());
    let found = words.find_map(|word| parser.find_subcommand(word))?;
    Some(found.get_name().to_string())
}

/// The log goes to stderr: warnings, more with -v, and what FORKDISK_LOG asks for.
fn start_logging(quiet: bool, verbose: u8) {
    use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt};
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::WARN,
        (_, 1) => LevelFilter::INFO,
        (_, 2) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let wish = std::env::var("FORKDISK_LOG").ok();
    let wish = wish.filter(|text| verbose == 0 && !text.is_empty());
    let filter = EnvFilter::builder().with_default_directive(level.into());
    let filter = filter.parse_lossy(wish.unwrap_or_default());
    // A second subscriber in one process would be a mistake of ours, and no reason to fail.
    let _ = fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .try_init();
}
