//! The report as a page: one file that needs no other and no network, readable on light and on dark.

use crate::bench::book::{Better, Cell, Must, Report, Row, Verdict, figure};
use crate::bench::{Group, PeerKind};
use std::fmt::Write;

/// Width of a chart, and of the names and the figures beside its bars.
const WIDE: f64 = 560.0;
const NAMES: f64 = 80.0;
const FIGURES: f64 = 150.0;
/// Height of a bar with its gap.
const BAR: f64 = 18.0;
/// From this span on a chart is logarithmic: on a linear one the shortest bar would not be seen.
const SPAN: f64 = 20.0;

const STYLE: &str = "
:root { color-scheme: light dark; --text: #1b1f24; --faint: #667; --line: #d5d9e0; --back: #fff; --bar: #9fb3c8; --ours: #d9730d; --good: #1a7f37; --bad: #b42318 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e6ea; --faint: #99a; --line: #3a3f47; --back: #15181c; --bar: #52677d; --ours: #f0923c; --good: #4ac26b; --bad: #ff7b72 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1200px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { margin-top: 2.5em; border-bottom: 1px solid var(--line) } h3 { font-size: 1em; margin: 0 }
code { font-size: .9em } small, .faint { color: var(--faint) } .good { color: var(--good) } .bad { color: var(--bad) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85em }
th, td { padding: .3em .7em; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; white-space: nowrap }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 15em } td small { display: block }
.ours { font-weight: 600 } .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34em), 1fr)); gap: 1.5em 2em; margin-top: 1.5em }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif } svg text { fill: var(--text) } svg .bar { fill: var(--bar) } svg .bar.ours { fill: var(--ours) }
svg .whisker { stroke: var(--text); stroke-opacity: .55 } svg .mark { stroke: var(--faint); stroke-dasharray: 3 3 } svg .faint { fill: var(--faint) }
";

/// The page. `date` is when it was measured, for people.
pub fn page(report: &Report, date: &str) -> String {
    let mut out = String::new();
    // Writing into a String does not fail.
    let _ = write_page(&mut out, report, date);
    out
}

fn write_page(out: &mut String, report: &Report, date: &str) -> std::fmt::Result {
    let m = &report.machine;
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>forkdisk beside others</title><style>{STYLE}</style></head><body>\n<h1>forkdisk beside others</h1>\n"
    )?;
    writeln!(out, "<p><code>{}</code><br>", escape(&report.command))?;
    writeln!(
        out,
        "{date}, {:.0} minutes; up to {} rounds, {} samples, {} of them while others used the machine, {} left out.<br>",
        report.took / 60.0,
        report.rounds,
        report.samples,
        report.disturbed,
        report.dropped
    )?;
    let tools = [m.fio.as_deref(), m.qemu.as_deref()];
    let tools: Vec<&str> = tools.into_iter().flatten().collect();
    writeln!(
        out,
        "Linux {}, {} processors ({}), {:.1} GiB of memory, {} on {}; forkdisk {}; {}.</p>",
        escape(&m.kernel),
        m.processors,
        escape(&m.processor),
        m.memory as f64 / f64::from(1 << 30),
        escape(&m.filesystem),
        escape(&m.device),
        escape(&m.version),
        escape(&tools.join("; "))
    )?;
    summary(out, report)?;
    for group in Group::ALL {
        let rows: Vec<&Row> = report
            .rows
            .iter()
            .filter(|r| r.group == group.id())
            .collect();
        if rows.is_empty() {
            continue;
        }
        writeln!(out, "<h2 id=\"{0}\">{0}</h2>", group.id())?;
        table(out, &rows)?;
        writeln!(out, "<div class=\"charts\">")?;
        for row in rows {
            chart(out, row)?;
        }
        writeln!(out, "</div>")?;
    }
    writeln!(out, "<h2>How it was measured</h2>\n<ul>")?;
    for remark in &report.remarks {
        writeln!(out, "<li>{}</li>", escape(remark))?;
    }
    writeln!(out, "</ul>\n<dl>")?;
    for peer in &report.peers {
        writeln!(
            out,
            "<dt><b>{}</b></dt><dd>{}",
            peer.id.id(),
            escape(peer.title)
        )?;
        for note in &peer.notes {
            writeln!(out, "<br><span class=\"bad\">{}</span>", escape(note))?;
        }
        writeln!(out, "</dd>")?;
    }
    writeln!(out, "</dl></body></html>")
}

fn summary(out: &mut String, report: &Report) -> std::fmt::Result {
    let of = |v: Verdict| report.rows.iter().filter(move |r| r.verdict == Some(v));
    let (met, missed) = (of(Verdict::Met).count(), of(Verdict::Missed).count());
    if met + missed == 0 {
        return Ok(());
    }
    writeln!(
        out,
        "<p>Of {} bounds <span class=\"good\">{met} are met</span> and <span class=\"bad\">{missed} are missed</span>.</p>",
        met + missed
    )?;
    if missed > 0 {
        writeln!(out, "<ul>")?;
        for row in of(Verdict::Missed) {
            let must = row.must.as_ref().map_or(String::new(), Must::text);
            writeln!(
                out,
                "<li>{} <small>({})</small></li>",
                escape(&row.title),
                escape(&must)
            )?;
        }
        writeln!(out, "</ul>")?;
    }
    Ok(())
}

fn table(out: &mut String, rows: &[&Row]) -> std::fmt::Result {
    let mut peers: Vec<PeerKind> = rows.iter().flat_map(|r| &r.peers).map(|c| c.peer).collect();
    peers.sort();
    peers.dedup();
    write!(
        out,
        "<div class=\"wide\"><table><thead><tr><th>median, (min-max), ratio to raw</th><th>unit</th>"
    )?;
    for peer in &peers {
        write!(out, "<th>{}</th>", peer.id())?;
    }
    writeln!(out, "<th>must</th></tr></thead><tbody>")?;
    for row in rows {
        let arrow = if row.better == Better::Higher {
            "↑"
        } else {
            "↓"
        };
        write!(
            out,
            "<tr><td>{}</td><td>{} {arrow}</td>",
            escape(&row.title),
            escape(row.unit)
        )?;
        for peer in &peers {
            let class = if *peer == PeerKind::Forkdisk {
                " class=\"ours\""
            } else {
                ""
            };
            let text = row.cell(*peer).map_or(String::new(), cell);
            write!(out, "<td{class}>{text}</td>")?;
        }
        let must = row.must.as_ref().map_or(String::new(), Must::text);
        let (class, word) = match row.verdict {
            Some(Verdict::Met) => ("good", "met"),
            Some(Verdict::Missed) => ("bad", "missed"),
            None => ("faint", ""),
        };
        writeln!(
            out,
            "<td class=\"{class}\">{}<small>{word}</small></td></tr>",
            escape(&must)
        )?;
    }
    writeln!(out, "</tbody></table></div>")
}

fn cell(cell: &Cell) -> String {
    let mut text = String::new();
    if cell.noisy {
        text.push_str("<span title=\"only samples taken while others used the machine\">~</span>");
    }
    text.push_str(&figure(cell.median));
    if cell.min != cell.max {
        text.push_str(&format!(
            "<small>({}-{})</small>",
            figure(cell.min),
            figure(cell.max)
        ));
    }
    if let Some(ratio) = cell.ratio.filter(|_| cell.peer != PeerKind::Raw) {
        text.push_str(&format!("<small>× {}</small>", figure(ratio)));
    }
    text
}

/// Bars of one row, a line from the smallest to the largest value on each, and raw as a dashed line through all.
fn chart(out: &mut String, row: &Row) -> std::fmt::Result {
    let cells: Vec<&Cell> = row.peers.iter().filter(|c| c.median > 0.0).collect();
    let top = cells.iter().map(|c| c.max).fold(0.0, f64::max);
    let low = cells
        .iter()
        .map(|c| c.median.min(c.min))
        .filter(|v| *v > 0.0)
        .fold(top, f64::min);
    if cells.is_empty() || top <= 0.0 {
        return Ok(());
    }
    let logarithmic = top / low > SPAN;
    let room = WIDE - NAMES - FIGURES;
    let long = |value: f64| {
        let part = match logarithmic {
            // The shortest bar is a tenth of a decade long.
            true => (value.max(low) / low * 1.26).ln() / (top / low * 1.26).ln(),
            false => value / top,
        };
        NAMES + room * part.clamp(0.0, 1.0)
    };
    let better = if row.better == Better::Higher {
        "more is better"
    } else {
        "less is better"
    };
    let scale = if logarithmic { ", logarithmic" } else { "" };
    write!(
        out,
        "<figure style=\"margin:0\"><h3>{}</h3><small>{}, {better}{scale}</small>",
        escape(&row.title),
        escape(row.unit)
    )?;
    let high = BAR * cells.len() as f64;
    write!(
        out,
        "<svg viewBox=\"0 0 {WIDE} {high}\" role=\"img\" aria-label=\"{}\">",
        escape(&row.title)
    )?;
    for (i, cell) in cells.iter().enumerate() {
        let y = BAR * i as f64;
        let (mid, end) = (y + BAR / 2.0, long(cell.median));
        let ours = if cell.peer == PeerKind::Forkdisk {
            " ours"
        } else {
            ""
        };
        write!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            NAMES - 6.0,
            mid + 4.0,
            cell.peer.id()
        )?;
        write!(
            out,
            "<rect class=\"bar{ours}\" x=\"{NAMES}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>",
            y + 2.0,
            end - NAMES,
            BAR - 4.0
        )?;
        if cell.min != cell.max {
            let (from, to) = (long(cell.min), long(cell.max));
            write!(
                out,
                "<line class=\"whisker\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{mid}\" y2=\"{mid}\"/>"
            )?;
        }
        let ratio = cell.ratio.filter(|_| cell.peer != PeerKind::Raw);
        let ratio = ratio.map_or(String::new(), |r| format!(" (× {})", figure(r)));
        let noisy = if cell.noisy { "~" } else { "" };
        write!(
            out,
            "<text x=\"{:.1}\" y=\"{}\">{noisy}{}<tspan class=\"faint\">{ratio}</tspan></text>",
            long(cell.max.max(cell.median)) + 5.0,
            mid + 4.0,
            figure(cell.median)
        )?;
    }
    if let Some(raw) = row.cell(PeerKind::Raw).filter(|c| c.median > 0.0) {
        let x = long(raw.median);
        write!(
            out,
            "<line class=\"mark\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{high}\"/>"
        )?;
    }
    writeln!(out, "</svg></figure>")
}

/// Text that is no markup.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::book::tests::sample;

    #[test]
    fn the_page_holds_all_and_needs_nothing() {
        let report = sample();
        let page = page(&report, "today");
        for word in [
            "a row",
            "b row",
            "today",
            "× 1.50",
            "missed",
            "left out: &lt;none&gt;",
            "bench &lt;read&gt;",
        ] {
            assert!(page.contains(word), "no {word}");
        }
        for word in [
            "http", "src=", "href=", "<script", "@import", "url(", "NaN", "inf",
        ] {
            assert!(!page.contains(word), "{word}");
        }
        // A chart for each row, and every element that is opened is closed.
        assert_eq!(page.matches("<svg").count(), report.rows.len());
        for tag in [
            "svg", "table", "figure", "div", "tr", "td", "th", "ul", "dl", "text", "small",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn a_wide_span_is_logarithmic() {
        let mut report = sample();
        let row = &mut report.rows[0];
        assert!(!chart_of(row).contains("logarithmic"));
        row.peers[0].median = 100_000.0;
        row.peers[0].max = 100_000.0;
        assert!(chart_of(row).contains("logarithmic"));
    }

    fn chart_of(row: &Row) -> String {
        let mut out = String::new();
        chart(&mut out, row).unwrap();
        out
    }
}
