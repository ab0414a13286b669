//! The report as one picture: how each peer compares with raw, row by row. A file that needs no other, readable on light and on dark.

use crate::bench::book::{Better, Cell, Must, Report, Row, Verdict, figure};
use crate::bench::html::escape;
use crate::bench::{Group, PeerKind};
use std::fmt::Write;

/// Width of the picture, of the titles and of the figures at its end.
const WIDE: f64 = 900.0;
const TITLES: f64 = 250.0;
const FIGURES: f64 = 60.0;
/// Height of a row, of a heading, and of what is above and below all rows.
const ROW: f64 = 20.0;
const HEADING: f64 = 26.0;
const EDGE: f64 = 44.0;
/// What is slower or quicker than this lies at the edge.
const SLOWEST: f64 = 0.05;
const QUICKEST: f64 = 8.0;
/// The lines to measure by.
const GRID: [f64; 7] = [0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0];

/// Those that are shown, with a class for the colour; the last is drawn over the others.
const SHOWN: [(PeerKind, &str); 6] = [
    (PeerKind::Xfs, "xfs"),
    (PeerKind::Btrfs, "btrfs"),
    (PeerKind::Qcow2, "qcow2"),
    (PeerKind::Qcow2L2, "l2"),
    (PeerKind::IoUring, "ring"),
    (PeerKind::Forkdisk, "ours"),
];

const STYLE: &str = "
text { font: 12px system-ui, sans-serif; fill: #1b1f24 } .faint { fill: #667 } .head { font-weight: 600 } .good { fill: #1a7f37 } .bad { fill: #b42318 }
.grid { stroke: #d5d9e0 } .raw { stroke: #667; stroke-width: 1.5 } .bound { stroke: #1b1f24; stroke-width: 2 }
.xfs { fill: #4c78a8 } .btrfs { fill: #8c6bb1 } .qcow2 { fill: #54a24b } .l2 { fill: #b5cf6b } .ring { fill: none; stroke: #d9730d; stroke-width: 2 } .ours { fill: #d9730d }
@media (prefers-color-scheme: dark) { text { fill: #e3e6ea } .faint { fill: #99a } .good { fill: #4ac26b } .bad { fill: #ff7b72 }
.grid { stroke: #3a3f47 } .raw { stroke: #99a } .bound { stroke: #e3e6ea } .ring { stroke: #f0923c } .ours { fill: #f0923c } }
";

/// The picture of all rows that were measured on raw too. `date` is when it was measured, for people.
pub fn picture(report: &Report, date: &str) -> String {
    let mut out = String::new();
    // Writing into a String does not fail.
    let _ = draw(&mut out, report, date);
    out
}

/// How many times as quick as raw.
fn quicker(row: &Row, cell: &Cell) -> Option<f64> {
    let ratio = cell.ratio.filter(|r| *r > 0.0)?;
    Some(match row.better {
        Better::Higher => ratio,
        Better::Lower => 1.0 / ratio,
    })
}

/// The bound in the same measure.
fn bound(must: &Must) -> Option<f64> {
    match must {
        Must::RatioAtLeast(r) => Some(*r),
        Must::RatioAtMost(r) => Some(1.0 / r),
        _ => None,
    }
}

/// Where a speed lies from left to right.
fn across(speed: f64) -> f64 {
    let part = (speed.clamp(SLOWEST, QUICKEST) / SLOWEST).ln() / (QUICKEST / SLOWEST).ln();
    TITLES + (WIDE - TITLES - FIGURES) * part
}

fn draw(out: &mut String, report: &Report, date: &str) -> std::fmt::Result {
    let shows = |row: &&Row| {
        row.cell(PeerKind::Forkdisk)
            .is_some_and(|cell| quicker(row, cell).is_some())
    };
    let of = |group: Group| {
        let rows = report.rows.iter().filter(move |r| r.group == group.id());
        rows.filter(shows).collect::<Vec<&Row>>()
    };
    let groups = [Group::Read, Group::Write, Group::Chain].map(|group| (group, of(group)));
    let groups = groups.iter().filter(|(_, rows)| !rows.is_empty());
    let high = groups.clone().fold(2.0 * EDGE, |sum, (_, rows)| {
        sum + HEADING + ROW * rows.len() as f64
    });
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDE} {high}\" role=\"img\" aria-label=\"forkdisk beside others\"><style>{STYLE}</style>"
    )?;
    legend(out)?;
    for speed in GRID {
        let (x, class) = (across(speed), if speed == 1.0 { "raw" } else { "grid" });
        writeln!(
            out,
            "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{EDGE}\" y2=\"{:.1}\"/>\
             <text class=\"faint\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{speed}</text>",
            high - EDGE,
            EDGE - 6.0
        )?;
    }
    let mut y = EDGE;
    for (group, rows) in groups {
        y += HEADING;
        writeln!(
            out,
            "<text class=\"head\" x=\"4\" y=\"{:.1}\">{}</text>",
            y - 8.0,
            group.id()
        )?;
        for row in rows {
            line(out, row, y + ROW / 2.0)?;
            y += ROW;
        }
    }
    writeln!(
        out,
        "<text class=\"faint\" x=\"4\" y=\"{:.1}\">How many times as quick as raw (a loop device over a file): further right is better. Bars are bounds. {} on Linux {}</text></svg>",
        high - EDGE / 2.0,
        escape(date),
        escape(&report.machine.kernel)
    )
}

fn legend(out: &mut String) -> std::fmt::Result {
    let mut x = TITLES;
    for (peer, class) in SHOWN.iter().rev() {
        mark(out, class, x, 14.0)?;
        writeln!(
            out,
            "<text x=\"{:.1}\" y=\"18\">{}</text>",
            x + 9.0,
            peer.id()
        )?;
        x += 100.0;
    }
    Ok(())
}

fn line(out: &mut String, row: &Row, y: f64) -> std::fmt::Result {
    writeln!(
        out,
        "<text x=\"12\" y=\"{:.1}\">{}</text>",
        y + 4.0,
        escape(&row.title)
    )?;
    if let Some(x) = row.must.as_ref().and_then(bound).map(across) {
        writeln!(
            out,
            "<line class=\"bound\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
            y - 8.0,
            y + 8.0
        )?;
    }
    for (peer, class) in SHOWN {
        let Some(speed) = row.cell(peer).and_then(|cell| quicker(row, cell)) else {
            continue;
        };
        mark(out, class, across(speed), y)?;
        if peer == PeerKind::Forkdisk {
            let class = match row.verdict {
                Some(Verdict::Met) => "good",
                Some(Verdict::Missed) => "bad",
                None => "faint",
            };
            writeln!(
                out,
                "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDE - 4.0,
                y + 4.0,
                figure(speed)
            )?;
        }
    }
    Ok(())
}

fn mark(out: &mut String, class: &str, x: f64, y: f64) -> std::fmt::Result {
    let radius = if class == "ours" { 5.5 } else { 4.5 };
    writeln!(
        out,
        "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\"/>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::book::tests::sample;

    #[test]
    fn every_row_with_a_ratio_is_in_the_picture() {
        let mut report = sample();
        let picture = picture(&report, "today");
        let with_ratio = |row: &&Row| {
            row.cell(PeerKind::Forkdisk)
                .is_some_and(|c| c.ratio.is_some())
        };
        let rows: Vec<&Row> = report.rows.iter().filter(with_ratio).collect();
        assert!(!rows.is_empty());
        for row in &rows {
            assert!(picture.contains(&escape(&row.title)), "{picture}");
        }
        for word in ["href", "url(", "NaN", "inf", "<script"] {
            assert!(!picture.contains(word), "{word}");
        }
        assert_eq!(picture.matches("<svg").count(), 1);
        report.rows.clear();
        assert!(super::picture(&report, "today").contains("</svg>"));
    }

    #[test]
    fn quicker_is_further_right_whatever_the_unit() {
        assert!(across(0.5) < across(1.0) && across(1.0) < across(2.0));
        let report = sample();
        let mut row = report.rows[0].clone();
        let mut cell = row.peers[0].clone();
        cell.ratio = Some(0.5);
        row.better = Better::Lower;
        assert_eq!(quicker(&row, &cell), Some(2.0));
        row.better = Better::Higher;
        assert_eq!(quicker(&row, &cell), Some(0.5));
        assert_eq!(bound(&Must::RatioAtMost(1.25)), Some(0.8));
    }
}
