//! Measuring: `bench`.

use crate::{
    bench::{
        self, Better, Cell, Group, Level, Options, PeerKind, Report, Row, Verdict, Watch, figure,
    },
    cli::{
        Outcome,
        context::Context,
        render::{
            json::Document,
            table::{Align, Table},
            time,
        },
        ui::{Paint, Steps, Ui},
    },
    error::Error,
    sys::signals,
};
use clap::{Args, ValueEnum, ValueHint};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum What {
    /// Making disks
    Fork,
    /// Reading
    Read,
    /// Writing, databases, archives
    Write,
    /// Deep stacks, attach, detach
    Chain,
    /// Many disks that read the same
    Sharing,
    /// Host bytes for bytes of the user
    Amplification,
    /// All of these
    All,
}

/// With what it is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Versus {
    /// A loop device over a file
    Raw,
    /// xfs and btrfs
    Reflink,
    /// Reflinks on XFS
    Xfs,
    /// Reflinks on Btrfs
    Btrfs,
    /// qcow2 served by QEMU
    Qcow2,
    /// Whole copies
    Copy,
    /// Overlayfs
    Overlayfs,
    /// Itself, attached with --transport io_uring
    #[value(name = "io_uring")]
    IoUring,
}

impl Versus {
    fn kinds(self) -> &'static [PeerKind] {
        match self {
            Versus::Raw => &[PeerKind::Raw],
            Versus::Reflink => &[PeerKind::Xfs, PeerKind::Btrfs],
            Versus::Xfs => &[PeerKind::Xfs],
            Versus::Btrfs => &[PeerKind::Btrfs],
            Versus::Qcow2 => &[PeerKind::Qcow2, PeerKind::Qcow2L2],
            Versus::Copy => &[PeerKind::Copy],
            Versus::Overlayfs => &[PeerKind::Overlayfs],
            Versus::IoUring => &[PeerKind::IoUring],
        }
    }
}

/// Measure forkdisk side by side with others
#[derive(Args, Debug)]
#[command(
    after_help = "It works in a store of its own, and takes away all it made. The store of -S is not touched; it only tells where to measure.\n\
        All peers do one row one after another, round by round; ratios are to raw of the same round. Needs root, and fio for what reads and writes."
)]
pub(crate) struct Bench {
    /// What to measure
    #[arg(value_name = "WHAT", value_enum, default_value = "all")]
    what: Vec<What>,
    /// With what to compare, separated by commas
    #[arg(
        long,
        value_name = "PEERS",
        value_enum,
        value_delimiter = ',',
        default_value = "raw,copy"
    )]
    vs: Vec<Versus>,
    /// Also write a page with charts
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    html: Option<PathBuf>,
    /// Also write one picture, of all that can be compared with raw
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    svg: Option<PathBuf>,
    /// Also write the JSON document, with all samples
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    save: Option<PathBuf>,
    /// Smaller and shorter: under 4 minutes instead of under 40
    #[arg(long)]
    quick: bool,
    /// Measure on the filesystem of this directory [default: that of the store]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl Bench {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let all = self.what.contains(&What::All);
        let wanted = |group: &Group| {
            let word = |what: &What| {
                what.to_possible_value()
                    .is_some_and(|v| v.get_name() == group.id())
            };
            all || self.what.iter().any(word)
        };
        let mut peers: Vec<PeerKind> = self.vs.iter().flat_map(|v| v.kinds()).copied().collect();
        peers.sort();
        peers.dedup();
        // Only for the tests, which must see everything done in seconds.
        let tiny = std::env::var_os("FORKDISK_BENCH_SIZE").is_some_and(|v| v == "tiny");
        let options = Options {
            groups: Group::ALL.into_iter().filter(wanted).collect(),
            peers,
            level: match (tiny, self.quick) {
                (true, _) => Level::Tiny,
                (_, true) => Level::Quick,
                _ => Level::Full,
            },
            dir: self.dir.clone().unwrap_or_else(|| near(&context.path)),
            command: std::iter::once("forkdisk".to_string())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
        };
        if context.dry_run {
            let groups: Vec<&str> = options.groups.iter().map(|g| g.id()).collect();
            let peers: Vec<&str> = options.peers.iter().map(|p| p.id()).collect();
            let document =
                json!({"dry_run": true, "groups": groups, "peers": peers, "dir": options.dir});
            return ui.answer(document, || {
                let dir = options.dir.display();
                format!(
                    "would measure {} against {} in {dir}\n",
                    groups.join(", "),
                    peers.join(", ")
                )
            });
        }
        let files: Vec<&PathBuf> = [&self.html, &self.svg, &self.save]
            .into_iter()
            .flatten()
            .collect();
        // Found out before, not after half an hour.
        for file in &files {
            fs::write(file, "").map_err(|e| failed(file, &e))?;
        }
        signals::catch();
        let steps = ui.steps();
        let report = bench::run(&options, &Talk { ui, steps: &steps });
        drop(steps);
        let report = report.inspect_err(|_| {
            // Nothing empty is left of a run that failed.
            for file in &files {
                let _ = fs::remove_file(file);
            }
        })?;
        let date = time::date_time(report.started);
        if let Some(file) = &self.html {
            fs::write(file, bench::page(&report, &date)).map_err(|e| failed(file, &e))?;
        }
        if let Some(file) = &self.svg {
            fs::write(file, bench::picture(&report, &date)).map_err(|e| failed(file, &e))?;
        }
        if let Some(file) = &self.save {
            let document = Document::new(&report).text();
            fs::write(file, document).map_err(|e| failed(file, &e))?;
        }
        for file in &files {
            ui.talk(format_args!("wrote {}", file.display()));
        }
        ui.answer(&report, || text(ui, &report))
    }
}

fn failed(file: &Path, error: &std::io::Error) -> Error {
    Error::io("write", file, error).or_hint("name a file that can be written")
}

/// The nearest directory that exists: where the store is or would be.
fn near(path: &Path) -> PathBuf {
    let mut found = path;
    while let Some(parent) = found.parent() {
        // Not in a store, which only holds what it knows.
        if found.is_dir() && !found.join("forkdisk.toml").exists() {
            break;
        }
        found = parent;
    }
    found.to_path_buf()
}

struct Talk<'a> {
    ui: &'a Ui,
    steps: &'a Steps,
}

impl Watch for Talk<'_> {
    fn step(&self, done: u64, total: u64, doing: &str) {
        self.steps.step(done, total, doing);
    }
    fn say(&self, text: &str) {
        self.ui.talk(text);
    }
}

/// The report for the terminal: a table for each group.
fn text(ui: &Ui, report: &Report) -> String {
    let mut out = String::new();
    let m = &report.machine;
    out.push_str(&format!(
        "{} on Linux {}, {} processors, {}, {} on {}\n",
        time::date_time(report.started),
        m.kernel,
        m.processors,
        ui.size(m.memory),
        m.filesystem,
        m.device
    ));
    out.push_str(&format!(
        "{}: {} s, {} samples; {} while others used the machine, {} of them left out\n",
        report.command,
        report.took.round(),
        report.samples,
        report.disturbed,
        report.dropped
    ));
    for group in Group::ALL {
        let rows: Vec<&Row> = report
            .rows
            .iter()
            .filter(|r| r.group == group.id())
            .collect();
        if !rows.is_empty() {
            out.push_str(&format!("\n{}\n", group.id()));
            out.push_str(&table(&rows).text(true));
        }
    }
    let verdicts = |v: Verdict| report.rows.iter().filter(|r| r.verdict == Some(v)).count();
    let met = ui.paint(Paint::Good, &format!("{} met", verdicts(Verdict::Met)));
    out.push_str(&format!(
        "\nbounds: {met}, {} missed\n",
        verdicts(Verdict::Missed)
    ));
    for row in report
        .rows
        .iter()
        .filter(|r| r.verdict == Some(Verdict::Missed))
    {
        let must = row.must.as_ref().map(|m| m.text()).unwrap_or_default();
        let word = ui.paint(Paint::Doubtful, "missed");
        out.push_str(&format!("  {word}: {} ({must})\n", row.title));
    }
    for peer in &report.peers {
        for note in &peer.notes {
            out.push_str(&format!("{}: {note}\n", peer.id.id()));
        }
    }
    out.push_str("each: median and ratio to raw, below it min-max; ~ marks what could only be measured while others used the machine\n");
    out
}

fn table(rows: &[&Row]) -> Table {
    let mut peers: Vec<PeerKind> = rows.iter().flat_map(|r| &r.peers).map(|c| c.peer).collect();
    peers.sort();
    peers.dedup();
    let mut columns = vec![
        ("ROW".to_string(), Align::Left),
        ("UNIT".to_string(), Align::Left),
    ];
    columns.extend(peers.iter().map(|p| (p.id().to_uppercase(), Align::Right)));
    columns.push(("MUST".to_string(), Align::Left));
    columns.push((String::new(), Align::Left));
    let mut table = Table::new(columns);
    for row in rows {
        let arrow = if row.better == Better::Higher {
            "↑"
        } else {
            "↓"
        };
        let of = |what: fn(&Cell) -> String| {
            let cells = peers
                .iter()
                .map(|p| row.cell(*p).map_or(String::new(), what));
            cells.collect::<Vec<_>>()
        };
        let verdict = match row.verdict {
            Some(Verdict::Met) => "ok",
            Some(Verdict::Missed) => "missed",
            None => "",
        };
        let must = row.must.as_ref().map(|m| m.text()).unwrap_or_default();
        let mut first = vec![row.title.clone(), format!("{} {arrow}", row.unit)];
        first.extend(of(middle));
        first.extend([must, verdict.to_string()]);
        table.row(first);
        let ranges = of(range);
        if ranges.iter().any(|r| !r.is_empty()) {
            let mut second = vec![String::new(); 2];
            second.extend(ranges);
            second.extend([String::new(), String::new()]);
            table.row(second);
        }
    }
    table
}

/// `12.3k 0.96`: the median, and the ratio to raw.
fn middle(cell: &Cell) -> String {
    let noisy = if cell.noisy { "~" } else { "" };
    let median = figure(cell.median);
    match cell.ratio.filter(|_| cell.peer != PeerKind::Raw) {
        Some(ratio) => format!("{noisy}{median} {}", figure(ratio)),
        None => format!("{noisy}{median}"),
    }
}

/// `11.9k-12.8k`: the smallest and the largest.
fn range(cell: &Cell) -> String {
    match cell.min == cell.max {
        true => String::new(),
        false => format!("{}-{}", figure(cell.min), figure(cell.max)),
    }
}
