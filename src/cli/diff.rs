//! What changed between two states: `diff`.

use crate::{
    cli::{
        Outcome, Stop,
        context::Context,
        diff_files,
        names::Names,
        render::{
            json::SCHEMA,
            table::{Align, Table},
        },
        states::{Looked, look},
    },
    error::{Error, Kind, Result},
    store::{Below, Change, Object, ObjectKind, Progress, State, Store, changes},
    sys::signals,
};
use clap::Args;
use serde::Serialize;
use std::{
    collections::HashMap,
    io::{self, BufWriter, IsTerminal, Write},
};

/// Exit code under `--exit-code` if two things differ.
const DIFFER: u8 = 5;

/// Changes kept in memory at most: those of a disk that is written to are shown only when all of them are known.
pub(super) const MAX_KEPT: usize = 1 << 22;

/// Show which bytes differ between two disks, snapshots or images
#[derive(Args, Debug)]
#[command(
    after_help = "What is shown is what has to be changed of A to make it B: `data`, or `zero` for what reads as zeros in B.\n\
        With A alone: what A changed of what it stands on, the nearest below it that has a name."
)]
pub(crate) struct Diff {
    /// The old state; the only one is compared with what it stands on
    #[arg(value_name = "A")]
    a: String,
    /// The new state
    #[arg(value_name = "B")]
    b: Option<String>,
    /// Only say how much differs
    #[arg(long)]
    stat: bool,
    /// Show which files of an ext4 or xfs filesystem it belongs to
    #[arg(long, conflicts_with = "stat")]
    files: bool,
    /// Exit with 5 if they differ
    #[arg(long)]
    exit_code: bool,
    /// For scripts: tabs between columns, no heading, bytes
    #[arg(short = 'H', long)]
    pub(super) no_header: bool,
}

/// How much differs.
#[derive(Clone, Copy, Default)]
struct Totals {
    /// Bytes that differ.
    changed: u64,
    /// Of these, bytes that hold data in the new state.
    data: u64,
    /// Bytes that read as zeros in the new state.
    zeroed: u64,
    /// Bytes past the end of the new state, which is shorter.
    gone: u64,
    /// Ranges.
    count: u64,
}

impl Totals {
    fn add(&mut self, change: &Change) {
        self.changed += change.len;
        self.count += 1;
        match change.zero {
            true => self.zeroed += change.len,
            false => self.data += change.len,
        }
    }
}

/// No display; only the wish to cancel gets through.
pub(super) struct Silent;

impl Progress for Silent {
    fn update(&self, _: u64, _: u64) -> bool {
        !signals::caught()
    }
}

impl Diff {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let store = context.open()?;
        let a = store.resolve(&self.a)?;
        if self.files {
            let (lower, upper) = match &self.b {
                Some(b) => (a, store.resolve(b)?),
                None => {
                    let (name, below) = stands_on(&store, &a)?;
                    let named = store.resolve(&name).ok().filter(|o| o.id == below.id());
                    (named.ok_or_else(|| nothing_named(&a.name))?, a)
                }
            };
            let differ = diff_files::run(&self, context, &store, &lower, &upper)?;
            return match differ && self.exit_code {
                true => Err(Stop::Code(DIFFER)),
                false => Ok(()),
            };
        }
        let (lower_name, upper_name, mut lower, mut upper) = match &self.b {
            Some(b) => {
                let b = store.resolve(b)?;
                let lower = Looked::at(context, &store, &a)?;
                let upper = Looked::at(context, &store, &b)?;
                (a.name, b.name, lower, upper)
            }
            None => {
                let (name, below) = stands_on(&store, &a)?;
                let lower = Looked::below(&store, below)?;
                let upper = Looked::at(context, &store, &a)?;
                (name, a.name, lower, upper)
            }
        };
        signals::catch();
        // A bar among the lines of a terminal would be in the way.
        let shown = self.stat || context.ui.json || !io::stdout().is_terminal();
        let progress: Box<dyn Progress> = match shown {
            true => context
                .ui
                .progress(&format!("comparing {lower_name} and {upper_name}")),
            false => Box::new(Silent),
        };
        let mut printer = Printer::new(&self, context, &lower_name, &upper_name);
        let shown = show(&mut printer, &mut lower, &mut upper, progress);
        if shown.is_err() && context.ui.json {
            // An error has a document of its own.
            let _ = printer.out.into_parts();
        }
        let differ = shown?;
        match differ && self.exit_code {
            true => Err(Stop::Code(DIFFER)),
            false => Ok(()),
        }
    }
}

/// Prints what differs. Is there a difference?
fn show<'a>(
    printer: &mut Printer<'_>,
    lower: &mut Looked<'a>,
    upper: &mut Looked<'a>,
    progress: Box<dyn Progress>,
) -> Result<bool, Stop> {
    let (sizes, mut totals) = if lower.live() || upper.live() {
        let (sizes, kept) = look(&mut [lower, upper], |both| {
            let (lower, upper) = (both[0].state(), both[1].state());
            Ok((
                [lower.size(), upper.size()],
                all_of(lower, upper, &*progress)?,
            ))
        })?;
        printer.begin(sizes)?;
        let mut totals = Totals::default();
        for change in &kept {
            totals.add(change);
            printer.change(change)?;
        }
        (sizes, totals)
    } else {
        let (lower, upper) = (lower.state(), upper.state());
        let sizes = [lower.size(), upper.size()];
        printer.begin(sizes)?;
        let mut totals = Totals::default();
        each(lower, upper, &*progress, |change| {
            totals.add(&change);
            printer.change(&change)
        })?;
        (sizes, totals)
    };
    drop(progress);
    let [was, is] = sizes;
    if let Some(len) = was.checked_sub(is).filter(|len| *len > 0) {
        totals.changed += len;
        totals.gone += len;
        totals.count += 1;
        printer.range(is, len, "gone")?;
    }
    let differ = totals.count > 0 || sizes[0] != sizes[1];
    printer.end(sizes, &totals, differ)?;
    Ok(differ)
}

/// The nearest below an object that has a name of its own, or else what it stands on directly.
fn stands_on(store: &Store, object: &Object) -> Result<(String, Below)> {
    let chain = store.details(object)?.chain;
    let named: HashMap<_, _> = store
        .list()?
        .into_iter()
        .filter(|o| o.kind != ObjectKind::Disk)
        .map(|o| (o.id, o.name))
        .collect();
    let below = &chain[1..];
    let found = below.iter().find_map(|b| Some((named.get(&b.id())?, b)));
    match (found, below.first()) {
        (Some((name, below)), _) => Ok((name.clone(), *below)),
        (None, Some(below)) => Ok((Names::default().show(below.id()), *below)),
        (None, None) => Err(Error::new(
            Kind::Invalid,
            format!("{} is a base: it stands on nothing", object.name),
        )
        .hint(format!(
            "name what to compare it with: `forkdisk diff {} B`",
            object.name
        ))),
    }
}

/// Only what has a name can be attached to look at its files.
fn nothing_named(name: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("nothing that {name} stands on has a name"),
    )
    .hint("name what to compare it with: `forkdisk diff A B --files`")
}

/// Calls `f` with each change.
pub(super) fn each(
    lower: &State,
    upper: &State,
    progress: &dyn Progress,
    mut f: impl FnMut(Change) -> Outcome,
) -> Outcome {
    let mut found = changes(Some(lower), upper);
    loop {
        let (change, end) = found.advance()?;
        if let Some(change) = change {
            f(change)?;
        }
        if end {
            return Ok(());
        }
        if !progress.update(found.at(), upper.size()) {
            return Err(Error::new(Kind::Interrupted, "interrupted").into());
        }
    }
}

/// All changes at once.
fn all_of(lower: &State, upper: &State, progress: &dyn Progress) -> Result<Vec<Change>> {
    let mut all = Vec::new();
    let done = each(lower, upper, progress, |change| {
        if all.len() == MAX_KEPT {
            return Err(Error::new(
                Kind::Busy,
                format!("more than {MAX_KEPT} ranges differ, and the disk is being written to"),
            )
            .hint("take a snapshot and compare that")
            .into());
        }
        all.push(change);
        Ok(())
    });
    match done {
        Err(Stop::Error(e)) => Err(e),
        _ => Ok(all),
    }
}

/// Writes the changes as they come: there may be millions.
struct Printer<'a> {
    diff: &'a Diff,
    context: &'a Context,
    names: [&'a str; 2],
    out: BufWriter<io::Stdout>,
    first: bool,
}

#[derive(Serialize)]
struct ChangeDoc {
    offset: u64,
    length: u64,
    #[serde(rename = "type")]
    kind: &'static str,
}

fn word(change: &Change) -> &'static str {
    match change.zero {
        true => "zero",
        false => "data",
    }
}

impl<'a> Printer<'a> {
    fn new(diff: &'a Diff, context: &'a Context, lower: &'a str, upper: &'a str) -> Printer<'a> {
        Printer {
            diff,
            context,
            names: [lower, upper],
            out: BufWriter::with_capacity(super::look::HELD, io::stdout()),
            first: true,
        }
    }
    fn write(&mut self, text: &str) -> Outcome {
        let written = self.out.write_all(text.as_bytes());
        written.map_err(|e| Stop::output(&e))
    }
    fn begin(&mut self, sizes: [u64; 2]) -> Outcome {
        if self.context.ui.json {
            let [from, to] = self.names.map(|name| serde_json::json!(name));
            let text = format!(
                "{{\"schema\":{SCHEMA},\"from\":{from},\"to\":{to},\"from_size\":{},\"to_size\":{}",
                sizes[0], sizes[1]
            );
            self.write(&text)?;
            return match self.diff.stat {
                true => Ok(()),
                false => self.write(",\"extents\":["),
            };
        }
        if self.diff.stat || self.diff.no_header {
            return Ok(());
        }
        self.write(&format!("{:>15}  {:>9}  TYPE\n", "OFFSET", "LENGTH"))
    }
    fn change(&mut self, change: &Change) -> Outcome {
        self.range(change.at, change.len, word(change))
    }
    fn range(&mut self, at: u64, len: u64, kind: &'static str) -> Outcome {
        if self.diff.stat {
            return Ok(());
        }
        if self.context.ui.json {
            let document = ChangeDoc {
                offset: at,
                length: len,
                kind,
            };
            let comma = if std::mem::take(&mut self.first) {
                ""
            } else {
                ","
            };
            let text = serde_json::json!(document);
            return self.write(&format!("{comma}\n{text}"));
        }
        let text = match self.diff.no_header {
            true => format!("{at}\t{len}\t{kind}\n"),
            false => format!("{at:>15}  {:>9}  {kind}\n", self.context.ui.size(len)),
        };
        self.write(&text)
    }
    fn end(&mut self, sizes: [u64; 2], totals: &Totals, differ: bool) -> Outcome {
        let ui = &self.context.ui;
        let text = match (ui.json, self.diff.stat) {
            (true, stat) => {
                let close = if stat { "" } else { "\n]" };
                let Totals {
                    changed,
                    data,
                    zeroed,
                    gone,
                    count,
                } = totals;
                format!(
                    "{close},\"changed\":{changed},\"data\":{data},\"zeroed\":{zeroed},\"gone\":{gone},\"count\":{count},\"differ\":{differ}}}\n"
                )
            }
            (false, true) => self.stat(sizes, totals),
            (false, false) => String::new(),
        };
        self.write(&text)?;
        self.out.flush().map_err(|e| Stop::output(&e))?;
        if sizes[0] != sizes[1] && !self.diff.stat {
            let [from, to] = self.names;
            let [old, new] = sizes.map(|size| ui.size(size));
            ui.talk(format_args!("{from} has {old}, {to} has {new}"));
        }
        Ok(())
    }
    fn stat(&self, sizes: [u64; 2], totals: &Totals) -> String {
        let ui = &self.context.ui;
        if self.diff.no_header {
            let Totals {
                changed,
                data,
                zeroed,
                gone,
                count,
            } = totals;
            return format!("{changed}\t{data}\t{zeroed}\t{count}\t{gone}\n");
        }
        let mut table = Table::new([(String::new(), Align::Left), (String::new(), Align::Left)]);
        let mut row = |name: &str, value: String| table.row(vec![name.to_string(), value]);
        row("changed", ui.size(totals.changed));
        row("data", ui.size(totals.data));
        row("zeroed", ui.size(totals.zeroed));
        if totals.gone > 0 {
            row("gone", ui.size(totals.gone));
        }
        row("extents", totals.count.to_string());
        if sizes[0] != sizes[1] {
            let [old, new] = sizes.map(|size| ui.size(size));
            row("size", format!("{old} -> {new}"));
        }
        table.text(false)
    }
}
