//! The store as a whole: `init`, `doctor`, `gc`, `check`, `scrub`.

use crate::{
    check::{repair, scrub},
    cli::{
        Outcome, Stop,
        context::Context,
        render::{json::Done, size::parse_size},
        ui::Paint,
    },
    daemon,
    doctor::{self, Status},
    error::{Error, Kind},
    store::{CheckReport, Finding, Store},
    sys::signals,
};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use std::path::Path;

/// Make the store (import makes it too)
#[derive(Args, Debug)]
pub(crate) struct Init {}

impl Init {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let path = context.path.as_path();
        if context.dry_run {
            return match Store::open(path) {
                Ok(_) => Err(Error::new(
                    Kind::Exists,
                    format!("there is a store at {} already", path.display()),
                )
                .hint("use it, or choose another directory with --store")
                .into()),
                Err(e) if e.kind() == Kind::NoStore => {
                    let dry_run = true;
                    let store = path;
                    context.ui.answer(Done { store, dry_run }, || {
                        format!("would make a store at {}\n", path.display())
                    })
                }
                Err(e) => Err(e.into()),
            };
        }
        let store = Store::init(path).map_err(|e| match e.kind() {
            Kind::Exists => e.or_hint("it can be used as it is; -S DIR makes another one"),
            _ => e,
        })?;
        if context.ui.json {
            let id = store.id().to_string();
            return context
                .ui
                .document(json!({"store": store.path(), "id": id}));
        }
        let path = store.path().display();
        context.ui.talk(format_args!("made a store at {path}"));
        Ok(())
    }
}

/// Tell what this kernel, filesystem and user can do, and what to do about the rest
#[derive(Args, Debug)]
pub(crate) struct Doctor {}

#[derive(Serialize)]
struct DoctorDoc<'a> {
    ok: bool,
    store: &'a Path,
    checks: Vec<ProbeDoc<'a>>,
}

#[derive(Serialize)]
struct ProbeDoc<'a> {
    name: &'a str,
    status: &'a str,
    message: &'a str,
    fix: Option<&'a str>,
}

impl Doctor {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let probes = doctor::examine(&context.path);
        let ok = probes.iter().all(|p| p.status != Status::Fail);
        let checks = probes.iter().map(|p| ProbeDoc {
            name: p.name,
            status: p.status.word(),
            message: &p.message,
            fix: p.fix.as_deref(),
        });
        let document = DoctorDoc {
            ok,
            store: &context.path,
            checks: checks.collect(),
        };
        ui.answer(document, || {
            let mut text = String::new();
            let wide = probes.iter().map(|p| p.name.len()).max().unwrap_or(0);
            for p in &probes {
                let paint = match p.status {
                    Status::Ok => Paint::Good,
                    Status::Warn => Paint::Doubtful,
                    Status::Fail => Paint::Bad,
                };
                let word = ui.paint(paint, &format!("{:<4}", p.status.word()));
                text.push_str(&format!("{word}  {:<wide$}  {}\n", p.name, p.message));
                if let Some(fix) = &p.fix {
                    let hint = ui.paint(Paint::Hint, "hint:");
                    text.push_str(&format!("      {:<wide$}  {hint} {fix}\n", ""));
                }
            }
            text
        })?;
        if ok { Ok(()) } else { Err(Stop::Code(1)) }
    }
}

/// Remove what no name needs: layers without names and children, blocks that nobody sees, and half-made files
#[derive(Args, Debug)]
pub(crate) struct Gc {}

impl Gc {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let store = context.open_to_change()?;
        let ui = &context.ui;
        if !context.dry_run {
            let plan = store.gc(true)?;
            if !plan.inhabited.is_empty() {
                let what = format!(
                    "no name refers to {} any more, nor to what stands on it, {} in all: this looks like lost names, not like garbage",
                    counted(plan.inhabited.len(), "base"),
                    counted(plan.layers.len(), "object"),
                );
                match ui.confirm(&format!("{what}\n"), "Remove all of it?") {
                    Err(Stop::Error(e)) if e.kind() == Kind::Invalid => {
                        return Err(Error::new(Kind::Invalid, what)
                            .hint("`forkdisk check --repair` brings names back; --yes removes all of it")
                            .into());
                    }
                    other => other?,
                }
            }
        }
        let mut report = store.gc(context.dry_run)?;
        if !context.dry_run {
            daemon::clear_dead(&store);
        }
        if !context.dry_run
            && let Some((bytes, shrunk)) = context.reclaim_attached(&store)
        {
            report.reclaimed += bytes;
            report.bytes += bytes;
            report.shrunk.extend(shrunk);
        }
        if ui.json {
            let layers: Vec<String> = report.layers.iter().map(|id| id.to_string()).collect();
            return ui.document(json!({
                "dry_run": context.dry_run,
                "layers": layers,
                "files": report.files,
                "shrunk": report.shrunk.iter().map(|id| id.to_string()).collect::<Vec<_>>(),
                "reclaimed": report.reclaimed,
                "bytes": report.bytes,
            }));
        }
        let parts = [(report.layers.len(), "layer"), (report.files.len(), "file")];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, word)| counted(*n, word))
            .collect();
        let freed = ui.size(report.bytes);
        let hidden = match report.shrunk.len() {
            0 => String::new(),
            n => format!(
                " ({} of blocks that nobody sees, in {})",
                ui.size(report.reclaimed),
                counted(n, "layer")
            ),
        };
        let summary = match (parts.is_empty(), context.dry_run) {
            (true, _) if report.shrunk.is_empty() => "there is no garbage".to_string(),
            (true, true) => format!("would free {freed}{hidden}"),
            (true, false) => format!("freed {freed}{hidden}"),
            (false, true) => format!("would remove {}, {freed}{hidden}", parts.join(" and ")),
            (false, false) => format!("removed {}, {freed}{hidden}", parts.join(" and ")),
        };
        if context.dry_run {
            let mut text = String::new();
            for id in &report.layers {
                text.push_str(&format!("layer {id}\n"));
            }
            for file in &report.files {
                text.push_str(&format!("file {file}\n"));
            }
            for id in &report.shrunk {
                text.push_str(&format!("blocks of layer {id}\n"));
            }
            ui.data(text)?;
        }
        ui.talk(summary);
        Ok(())
    }
}

/// Examine the structure of the store, or of one object and what it stands on
#[derive(Args, Debug)]
#[command(
    after_help = "Exit code 3: only leaks were found, space that nothing needs and `gc` frees. Exit code 4: damage. \
        Data is not read: `scrub` does that."
)]
pub(crate) struct Check {
    /// What to examine [default: everything]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Mend what can be mended without touching data: lost names, leaks, one damaged copy of a superblock
    #[arg(long, conflicts_with = "reference")]
    repair: bool,
}

#[derive(Serialize)]
struct CheckDoc {
    ok: bool,
    checked: u64,
    leaks: Vec<FindingDoc>,
    corruptions: Vec<FindingDoc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repairs: Option<Vec<RepairDoc>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    dry_run: bool,
}

#[derive(Serialize)]
struct RepairDoc {
    what: String,
    message: String,
}

#[derive(Serialize)]
struct FindingDoc {
    what: String,
    message: String,
    layer: Option<String>,
    base: Option<String>,
    lba_start: Option<u64>,
    lba_end: Option<u64>,
    slot: Option<u32>,
    offset: Option<u64>,
    affected: Vec<String>,
}

impl From<&Finding> for FindingDoc {
    fn from(finding: &Finding) -> FindingDoc {
        FindingDoc {
            what: finding.what.clone(),
            message: finding.message.clone(),
            layer: finding.layer.map(|id| id.to_string()),
            base: finding.base.map(|id| id.to_string()),
            lba_start: finding.lba.map(|l| l.0),
            lba_end: finding.lba.map(|l| l.1),
            slot: finding.slot,
            offset: finding.offset,
            affected: finding.affected.clone(),
        }
    }
}

/// Findings as lines; whom damage concerns is named below it, unless that is what it was called by.
fn lines(word: &str, list: &[Finding]) -> String {
    let mut text = String::new();
    for f in list {
        text.push_str(&format!("{word}: {}: {}\n", f.what, f.message));
        let affected = f.affected.join(", ");
        if !affected.is_empty() && affected != f.what {
            text.push_str(&format!("  affected: {affected}\n"));
        }
    }
    text
}

impl Check {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        signals::catch();
        let mut repairs = None;
        if self.repair {
            let progress = ui.progress("examining");
            let mut steps = repair::plan(&store, &*progress)?;
            drop(progress);
            let list = |word: &str, steps: &[repair::Step]| {
                let line = |s: &repair::Step| format!("{word}: {}: {}\n", s.what, s.message);
                steps.iter().map(line).collect::<String>()
            };
            if context.dry_run {
                if !ui.json {
                    ui.data(list("would repair", &steps))?;
                }
            } else if !steps.is_empty() {
                ui.confirm(&list("to repair", &steps), "Do this?")?;
                let progress = ui.progress("repairing");
                steps = crate::check::repair(&store, &steps, &*progress)?;
                if !ui.json {
                    ui.data(list("repaired", &steps))?;
                }
            }
            let step = |s: &repair::Step| RepairDoc {
                what: s.what.clone(),
                message: s.message.clone(),
            };
            repairs = Some(steps.iter().map(step).collect());
        }
        let progress = ui.progress("checking");
        let report = crate::check::check(&store, self.reference.as_deref(), &*progress)?;
        drop(progress);
        let code = exit_code(&report);
        let document = CheckDoc {
            ok: code == 0,
            checked: report.checked,
            leaks: report.leaks.iter().map(FindingDoc::from).collect(),
            corruptions: report.corruptions.iter().map(FindingDoc::from).collect(),
            repairs,
            dry_run: context.dry_run && self.repair,
        };
        ui.answer(document, || {
            lines("corruption", &report.corruptions) + &lines("leak", &report.leaks)
        })?;
        let checked = counted(report.checked as usize, "layer or base");
        match code {
            0 => {
                ui.talk(format_args!("checked {checked}: no damage, no leaks"));
                Ok(())
            }
            _ => {
                let leaks = counted(report.leaks.len(), "leak");
                let damage = counted(report.corruptions.len(), "corruption");
                let next = match code {
                    3 => {
                        "nothing that has a name is damaged; `forkdisk gc` frees the leaks, after `forkdisk check --repair` gave layers that hold data a name again"
                    }
                    _ => "other objects are not affected",
                };
                ui.talk(format_args!("checked {checked}: {damage}, {leaks}; {next}"));
                Err(Stop::Code(code))
            }
        }
    }
}

/// Read every block of the store, or of one object and what it stands on, and compare it with its checksum
#[derive(Args, Debug)]
#[command(
    after_help = "Disks can be used meanwhile. An interrupted scrub goes on where it stopped. A base that was linked or reflinked \
        gets its checksums from the first scrub. Exit code 4: damage."
)]
pub(crate) struct Scrub {
    /// What to read [default: everything]
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// Read at most so many bytes a second: 100M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<u64>,
    /// Begin at the beginning, also if an earlier scrub was interrupted
    #[arg(long)]
    restart: bool,
}

#[derive(Serialize)]
struct ScrubDoc<'a> {
    ok: bool,
    dry_run: bool,
    verified: u64,
    total: u64,
    layers: u64,
    bases: u64,
    resumed: bool,
    summed: &'a [String],
    skipped: Vec<FindingDoc>,
    corruptions: Vec<FindingDoc>,
}

impl Scrub {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        if self.rate == Some(0) {
            return Err(
                Error::new(Kind::Invalid, "at 0 bytes a second no scrub ever ends")
                    .hint("leave --rate out for no limit")
                    .into(),
            );
        }
        let store = context.open()?;
        signals::catch();
        let options = scrub::Options {
            rate: self.rate,
            restart: self.restart,
            dry_run: context.dry_run,
        };
        let progress = ui.progress("scrubbing");
        let report = scrub::scrub(&store, self.reference.as_deref(), options, &*progress)?;
        drop(progress);
        let ok = report.corruptions.is_empty();
        let document = ScrubDoc {
            ok,
            dry_run: context.dry_run,
            verified: report.verified,
            total: report.total,
            layers: report.layers,
            bases: report.bases,
            resumed: report.resumed,
            summed: &report.summed,
            skipped: report.skipped.iter().map(FindingDoc::from).collect(),
            corruptions: report.corruptions.iter().map(FindingDoc::from).collect(),
        };
        ui.answer(document, || lines("corruption", &report.corruptions))?;
        for skipped in &report.skipped {
            ui.warn(format_args!("{}: {}", skipped.what, skipped.message));
        }
        for name in &report.summed {
            ui.talk(format_args!(
                "{name} has checksums now: its blocks are verified from here on"
            ));
        }
        let layers = counted(report.layers as usize, "layer");
        let bases = counted(report.bases as usize, "base");
        if context.dry_run {
            let size = ui.size(report.total);
            let from = if report.resumed {
                ", going on where the last scrub stopped"
            } else {
                ""
            };
            ui.talk(format_args!("would read {size}: {layers}, {bases}{from}"));
            return Ok(());
        }
        let size = ui.size(report.verified);
        let verdict = match report.corruptions.len() {
            0 => "no damage".to_string(),
            n => counted(n, "corruption"),
        };
        ui.talk(format_args!(
            "verified {size} in {layers} and {bases}: {verdict}"
        ));
        if ok { Ok(()) } else { Err(Stop::Code(4)) }
    }
}

/// 4 for any damage, 3 for leaks alone, 0 for neither.
fn exit_code(report: &CheckReport) -> u8 {
    match (report.corruptions.is_empty(), report.leaks.is_empty()) {
        (false, _) => 4,
        (true, false) => 3,
        (true, true) => 0,
    }
}

/// `1 layer`, `2 layers`, `2 layers or bases`.
pub(crate) fn counted(n: usize, word: &str) -> String {
    if n == 1 {
        return format!("1 {word}");
    }
    let many: Vec<String> = word.split(" or ").map(|w| format!("{w}s")).collect();
    format!("{n} {}", many.join(" or "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_outweighs_leaks() {
        let finding = Finding::default;
        let mut report = CheckReport::default();
        assert_eq!(exit_code(&report), 0);
        report.leaks.push(finding());
        assert_eq!(exit_code(&report), 3);
        report.corruptions.push(finding());
        assert_eq!(exit_code(&report), 4);
    }

    #[test]
    fn words_are_counted() {
        assert_eq!(counted(1, "layer"), "1 layer");
        assert_eq!(counted(0, "leak"), "0 leaks");
        assert_eq!(counted(3, "layer or base"), "3 layers or bases");
    }
}
