//! Rows, samples, and what they come to.

use crate::bench::{Group, Options, machine::Machine, peers::PeerKind, quiet::Others, stats};
use serde::{Serialize, Serializer};
use std::time::Duration;

/// Which way is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More.
    Higher,
    /// Less.
    Lower,
}

/// What forkdisk must reach.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "value")]
pub enum Must {
    /// At least this many times raw.
    RatioAtLeast(f64),
    /// At most this many times raw.
    RatioAtMost(f64),
    /// At most this.
    AtMost(f64),
    /// At most so many times its own value in another row.
    AtMostOfRow(String, f64),
}

impl Must {
    /// For people.
    pub fn text(&self) -> String {
        match self {
            Must::RatioAtLeast(r) => format!(">= {r} raw"),
            Must::RatioAtMost(r) => format!("<= {r} raw"),
            Must::AtMost(v) => format!("<= {}", figure(*v)),
            Must::AtMostOfRow(row, r) => format!("<= {r} of {row}"),
        }
    }
}

/// How it came out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It must reach something, and does.
    Met,
    /// It does not.
    Missed,
}

/// One value that was taken.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Sample {
    /// In which round, from 0.
    pub round: u32,
    /// The value, with what made it durable.
    #[serde(serialize_with = "number")]
    pub value: f64,
    /// The value before a last flush, where that is another one.
    pub during: Option<f64>,
    /// Processors that others used meanwhile.
    pub others: f64,
    /// Processors that the hypervisor took away meanwhile.
    pub stolen: f64,
    /// Others used too much.
    pub disturbed: bool,
    /// It is left out of the median.
    pub dropped: bool,
}

/// The samples of one peer in one row.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// Which.
    #[serde(serialize_with = "id")]
    pub peer: PeerKind,
    /// Of the samples that count.
    #[serde(serialize_with = "number")]
    pub median: f64,
    /// The smallest of them.
    #[serde(serialize_with = "number")]
    pub min: f64,
    /// The largest.
    #[serde(serialize_with = "number")]
    pub max: f64,
    /// The median of the ratios to raw of the same round.
    pub ratio: Option<f64>,
    /// The median before a last flush.
    pub during: Option<f64>,
    /// Were only disturbed samples to be had?
    pub noisy: bool,
    /// All of them.
    pub samples: Vec<Sample>,
}

fn id<S: Serializer>(kind: &PeerKind, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(kind.id())
}

/// Whole numbers, such as bytes, are written as such.
fn number<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => s.serialize_i64(*value as i64),
        false => s.serialize_f64(*value),
    }
}

/// Something that is measured.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `read.random.qd1.warm`.
    pub id: String,
    /// For people.
    pub title: String,
    /// The group's word.
    pub group: &'static str,
    /// Of the values.
    pub unit: &'static str,
    /// Which way is better.
    pub better: Better,
    /// What forkdisk must reach.
    pub must: Option<Must>,
    /// Does it? `None` where nothing is asked, or nothing was measured to hold it against.
    pub verdict: Option<Verdict>,
    /// A cell for each peer that was measured.
    pub peers: Vec<Cell>,
}

impl Row {
    /// The cell of a peer.
    pub fn cell(&self, peer: PeerKind) -> Option<&Cell> {
        self.peers.iter().find(|c| c.peer == peer)
    }
}

/// What is said of a peer.
#[derive(Clone, Debug, Serialize)]
pub struct PeerNote {
    /// Which.
    #[serde(serialize_with = "id")]
    pub id: PeerKind,
    /// What it is.
    pub title: &'static str,
    /// What went wrong with it, and where.
    pub notes: Vec<String>,
}

/// Everything that came of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How it was called.
    pub command: String,
    /// When it began: seconds since 1970.
    pub started: u64,
    /// How long it took, in seconds.
    pub took: f64,
    /// `full`, `quick` or `tiny`.
    pub level: &'static str,
    /// Rounds that were wanted.
    pub rounds: u32,
    /// Samples that were taken.
    pub samples: u64,
    /// Of these, samples during which others used the machine.
    pub disturbed: u64,
    /// Of these, samples that were left out of the medians.
    pub dropped: u64,
    /// On what.
    pub machine: Machine,
    /// Who was compared.
    pub peers: Vec<PeerNote>,
    /// How it was measured, and what to know of it.
    pub remarks: Vec<String>,
    /// The rows.
    pub rows: Vec<Row>,
}

/// One value of one row.
#[derive(Clone, Debug)]
pub struct Reading {
    row: String,
    value: f64,
    during: Option<f64>,
}

impl Reading {
    /// A value.
    pub fn of(row: impl Into<String>, value: f64) -> Reading {
        Reading {
            row: row.into(),
            value,
            during: None,
        }
    }
    /// And what it was before a last flush.
    pub fn during(mut self, value: f64) -> Reading {
        self.during = Some(value);
        self
    }
}

/// Collects what is measured.
pub struct Book {
    report: Report,
}

/// How the figures come about.
const REMARKS: [&str; 12] = [
    "Devices are loop devices with direct I/O over what each peer makes; 512-byte sectors (XFS: 4096, which its reflinks need); load by fio (libaio, direct I/O).",
    "Cold: the host's page cache was dropped before. Warm: the files below the disk were read once before, through the page cache, \
     where that is used at all (by forkdisk and overlayfs; the others go round it).",
    "Writes count with the time of a last flush; `during` in the JSON is the value without it.",
    "A fork by a call: forkdisk's library, the reflink ioctl, both with the syncs that make it durable; qcow2 and copies are made by their \
     command. A fork by command: `forkdisk create`, `cp --reflink=always`, `qemu-img create`; only the first of them syncs.",
    "Sharing and amplification are counted at a loop device with a filesystem of its own, so that what others do is not in them; \
     page cache by cachestat(2).",
    "Ratios are medians of the ratios to raw within one round.",
    "PLAIN is the file itself, by direct I/O; where it is written it is a new one, whose blocks are allocated but were never written.",
    "The daemon of forkdisk keeps idle processors awake while requests follow each other. RAW-AWAKE is raw while they are kept awake for it, ASLEEP is forkdisk where they are not.",
    "CACHED is what forkdisk stands on: a file read and written through the page cache, where memory that was not in use yet has to be had first, by one thread \
     (at depth 32 by as many, each in a part of its own). CACHED-LOOP is the same file with a loop device over it: forkdisk's way without FUSE and without forkdisk.",
    "qcow2 is stacked 64 deep at most: to open more takes QEMU longer than all other rows together.",
    "Page cache per disk: each device has pages of its own, of what is read through it; the base below is there once more, for all (FORKDISK, QCOW2-CACHED).",
    "XFS and Btrfs lie in an image file on the same host filesystem, with one more loop device below them.",
];

impl Book {
    /// An empty one.
    pub fn new(machine: Machine, options: &Options, rounds: u32) -> Book {
        let mut kinds = options.peers.clone();
        kinds.push(PeerKind::Forkdisk);
        if [Group::Read, Group::Write]
            .iter()
            .any(|g| options.groups.contains(g))
        {
            kinds.extend([PeerKind::Plain, PeerKind::Cached]);
            if options.peers.contains(&PeerKind::Raw) {
                kinds.push(PeerKind::CachedLoop);
            }
            kinds.extend(super::awake_or_not(options));
        }
        if options.groups.contains(&Group::Sharing) && kinds.contains(&PeerKind::Qcow2) {
            kinds.push(PeerKind::Qcow2Cached);
        }
        kinds.sort();
        let notes = kinds.into_iter().map(|id| PeerNote {
            id,
            title: id.title(),
            notes: Vec::new(),
        });
        Book {
            report: Report {
                command: options.command.clone(),
                started: std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0, |d| d.as_secs()),
                took: 0.0,
                level: match options.level {
                    super::Level::Full => "full",
                    super::Level::Quick => "quick",
                    super::Level::Tiny => "tiny",
                },
                rounds,
                samples: 0,
                disturbed: 0,
                dropped: 0,
                machine,
                peers: notes.collect(),
                remarks: REMARKS.map(str::to_string).to_vec(),
                rows: Vec::new(),
            },
        }
    }
    /// Announces a row. Rows are shown in the order in which they were announced.
    pub fn row(
        &mut self,
        group: Group,
        id: &str,
        title: &str,
        unit: &'static str,
        better: Better,
        must: Option<Must>,
    ) {
        self.report.rows.push(Row {
            id: id.to_string(),
            title: title.to_string(),
            group: group.id(),
            unit,
            better,
            must,
            verdict: None,
            peers: Vec::new(),
        });
    }
    /// Says something of a peer, once.
    pub fn note(&mut self, kind: PeerKind, text: &str) {
        tracing::debug!("{}: {text}", kind.id());
        if !self.report.peers.iter().any(|p| p.id == kind) {
            self.report.peers.push(PeerNote {
                id: kind,
                title: kind.title(),
                notes: Vec::new(),
            });
        }
        for peer in &mut self.report.peers {
            if peer.id == kind && !peer.notes.iter().any(|n| n == text) {
                peer.notes.push(text.to_string());
            }
        }
    }
    /// Says something of the run.
    pub fn remark(&mut self, text: &str) {
        self.report.remarks.push(text.to_string());
    }
    /// Enters what was measured.
    pub fn enter(&mut self, peer: PeerKind, round: u32, readings: &[Reading], others: Others) {
        for reading in readings {
            let Some(row) = self.report.rows.iter_mut().find(|r| r.id == reading.row) else {
                debug_assert!(false, "{} was not announced", reading.row);
                continue;
            };
            let at = match row.peers.iter().position(|c| c.peer == peer) {
                Some(at) => at,
                None => {
                    row.peers.push(Cell {
                        peer,
                        median: 0.0,
                        min: 0.0,
                        max: 0.0,
                        ratio: None,
                        during: None,
                        noisy: false,
                        samples: Vec::new(),
                    });
                    row.peers.len() - 1
                }
            };
            row.peers[at].samples.push(Sample {
                round,
                value: reading.value,
                during: reading.during,
                others: others.used,
                stolen: others.stolen,
                disturbed: others.disturbed,
                dropped: false,
            });
        }
    }
    /// Medians, ratios and verdicts.
    pub fn close(mut self, took: Duration) -> Report {
        let report = &mut self.report;
        report.took = took.as_secs_f64();
        for row in &mut report.rows {
            row.peers.sort_by_key(|c| c.peer);
            row.peers.iter_mut().for_each(settle);
            let raw = row.cell(PeerKind::Raw).map(counted);
            for cell in &mut row.peers {
                cell.ratio = raw
                    .as_ref()
                    .and_then(|raw| stats::paired_ratio(&counted(cell), raw));
            }
        }
        let medians: Vec<(String, Option<f64>)> = report
            .rows
            .iter()
            .map(|r| (r.id.clone(), r.cell(PeerKind::Forkdisk).map(|c| c.median)))
            .collect();
        for row in &mut report.rows {
            row.verdict = judge(row, &medians);
        }
        for sample in report
            .rows
            .iter()
            .flat_map(|r| &r.peers)
            .flat_map(|c| &c.samples)
        {
            report.samples += 1;
            report.disturbed += u64::from(sample.disturbed);
            report.dropped += u64::from(sample.dropped);
        }
        // A row without a single sample tells nothing.
        report.rows.retain(|r| !r.peers.is_empty());
        self.report
    }
}

/// Samples that count, with their rounds.
fn counted(cell: &Cell) -> Vec<(u32, f64)> {
    let kept = cell.samples.iter().filter(|s| !s.dropped);
    kept.map(|s| (s.round, s.value)).collect()
}

/// Leaves out what was disturbed if enough was not, and finds the middle.
fn settle(cell: &mut Cell) {
    let rounds: std::collections::BTreeSet<u32> = cell.samples.iter().map(|s| s.round).collect();
    let quiet = cell.samples.iter().filter(|s| !s.disturbed).count();
    // Three make a median; where fewer were wanted, fewer are enough.
    let enough = quiet >= rounds.len().clamp(1, 3);
    cell.noisy = !enough && cell.samples.iter().any(|s| s.disturbed);
    for sample in &mut cell.samples {
        sample.dropped = enough && sample.disturbed;
    }
    let kept: Vec<f64> = counted(cell).iter().map(|s| s.1).collect();
    cell.median = stats::median(&kept).unwrap_or(0.0);
    (cell.min, cell.max) = stats::range(&kept).unwrap_or((0.0, 0.0));
    let kept = cell.samples.iter().filter(|s| !s.dropped);
    let during: Vec<f64> = kept.filter_map(|s| s.during).collect();
    cell.during = stats::median(&during);
}

fn judge(row: &Row, medians: &[(String, Option<f64>)]) -> Option<Verdict> {
    let cell = row.cell(PeerKind::Forkdisk)?;
    // Two digits are what is shown, and as much as a measurement is worth.
    let round = |v: f64| (v * 100.0).round() / 100.0;
    let met = match row.must.as_ref()? {
        Must::RatioAtLeast(r) => round(cell.ratio?) >= *r,
        Must::RatioAtMost(r) => round(cell.ratio?) <= *r,
        Must::AtMost(v) => cell.median <= *v * 1.005,
        Must::AtMostOfRow(other, r) => {
            let (_, other) = medians.iter().find(|m| m.0 == *other)?;
            round(cell.median / (*other)?) <= *r
        }
    };
    Some(if met { Verdict::Met } else { Verdict::Missed })
}

/// A value with three digits that matter.
pub fn figure(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size >= 100_000.0 => format!("{:.0}k", value / 1000.0),
        _ if size >= 1000.0 => format!("{:.1}k", value / 1000.0),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if size >= 10.0 => format!("{value:.1}"),
        _ if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::bench::Level;

    /// A report with two rows, one with a disturbed sample.
    pub fn sample() -> Report {
        let options = Options {
            groups: vec![Group::Read],
            peers: vec![PeerKind::Raw, PeerKind::Xfs],
            level: Level::Tiny,
            dir: "/tmp".into(),
            command: "forkdisk bench <read>".to_string(),
        };
        let mut book = Book::new(Machine::default(), &options, 4);
        let must = Some(Must::RatioAtLeast(1.0));
        book.row(Group::Read, "a", "a row", "IOPS", Better::Higher, must);
        let must = Some(Must::AtMostOfRow("a".to_string(), 1.0));
        book.row(Group::Read, "b", "b row", "us", Better::Lower, must);
        book.row(Group::Read, "empty", "nothing", "us", Better::Lower, None);
        let disturbed = Others {
            used: 1.0,
            stolen: 0.0,
            disturbed: true,
        };
        for round in 0..4 {
            let factor = f64::from(round + 1);
            let quiet = Others::default();
            book.enter(
                PeerKind::Raw,
                round,
                &[Reading::of("a", 100.0 * factor)],
                quiet,
            );
            let reading = Reading::of("a", 150.0 * factor).during(200.0);
            book.enter(PeerKind::Forkdisk, round, &[reading], quiet);
        }
        book.enter(PeerKind::Forkdisk, 3, &[Reading::of("a", 1.0)], disturbed);
        book.enter(PeerKind::Forkdisk, 0, &[Reading::of("b", 1e6)], disturbed);
        book.note(PeerKind::Xfs, "left out: <none>");
        book.close(Duration::from_secs(5))
    }

    #[test]
    fn disturbed_samples_are_left_out_where_others_are_enough() {
        let report = sample();
        assert_eq!(
            (report.samples, report.disturbed, report.dropped),
            (10, 2, 1)
        );
        let cell = report.rows[0].cell(PeerKind::Forkdisk).unwrap();
        assert_eq!((cell.min, cell.median, cell.max), (150.0, 375.0, 600.0));
        assert_eq!(
            (cell.ratio, cell.during, cell.noisy),
            (Some(1.5), Some(200.0), false)
        );
        assert_eq!(report.rows[0].verdict, Some(Verdict::Met));
        // The only sample there is counts, and is marked.
        let cell = report.rows[1].cell(PeerKind::Forkdisk).unwrap();
        assert_eq!((cell.median, cell.noisy), (1e6, true));
        assert_eq!(report.rows[1].verdict, Some(Verdict::Missed));
        assert_eq!(report.rows.len(), 2, "a row without samples");
    }

    #[test]
    fn without_raw_nothing_is_held_against_raw() {
        let mut report = sample();
        report.rows[0].peers.retain(|c| c.peer != PeerKind::Raw);
        report.rows[0].peers[0].ratio = None;
        assert_eq!(judge(&report.rows[0], &[]), None);
    }

    #[test]
    fn figures_have_three_digits() {
        for (value, text) in [
            (0.0, "0.00"),
            (0.0123, "0.012"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (123.4, "123"),
            (12_340.0, "12.3k"),
            (123_400.0, "123k"),
        ] {
            assert_eq!(figure(value), text);
        }
    }
}
