//! The store as a whole: `init`, `doctor`, `gc`, `check`.

use crate::{
    cli::{Outcome, Stop, context::Context, render::json::Done, ui::Paint},
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

/// Remove what no name needs: layers without names and children, and half-made files
#[derive(Args, Debug)]
pub(crate) struct Gc {}

impl Gc {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let report = context.open_to_change()?.gc(context.dry_run)?;
        let ui = &context.ui;
        if ui.json {
            let layers: Vec<String> = report.layers.iter().map(|id| id.to_string()).collect();
            return ui.document(json!({
                "dry_run": context.dry_run,
                "layers": layers,
                "files": report.files,
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
        let summary = match (parts.is_empty(), context.dry_run) {
            (true, _) => "there is no garbage".to_string(),
            (false, true) => format!("would remove {}, {freed}", parts.join(" and ")),
            (false, false) => format!("removed {}, {freed}", parts.join(" and ")),
        };
        if context.dry_run {
            let mut text = String::new();
            for id in &report.layers {
                text.push_str(&format!("layer {id}\n"));
            }
            for file in &report.files {
                text.push_str(&format!("file {file}\n"));
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
    after_help = "Exit code 3: only leaks were found, space that nothing needs and `gc` frees. Exit code 4: damage."
)]
pub(crate) struct Check {
    /// What to examine [default: everything]
    #[arg(value_name = "REF")]
    reference: Option<String>,
}

#[derive(Serialize)]
struct CheckDoc {
    ok: bool,
    checked: u64,
    leaks: Vec<FindingDoc>,
    corruptions: Vec<FindingDoc>,
}

#[derive(Serialize)]
struct FindingDoc {
    what: String,
    message: String,
}

impl From<&Finding> for FindingDoc {
    fn from(finding: &Finding) -> FindingDoc {
        FindingDoc {
            what: finding.what.clone(),
            message: finding.message.clone(),
        }
    }
}

impl Check {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        signals::catch();
        let progress = ui.progress("checking");
        let report = crate::check::check(&store, self.reference.as_deref(), &*progress)?;
        drop(progress);
        let code = exit_code(&report);
        let document = CheckDoc {
            ok: code == 0,
            checked: report.checked,
            leaks: report.leaks.iter().map(FindingDoc::from).collect(),
            corruptions: report.corruptions.iter().map(FindingDoc::from).collect(),
        };
        ui.answer(document, || {
            let findings = |word: &str, list: &[Finding]| {
                let line = |f: &Finding| format!("{word}: {}: {}\n", f.what, f.message);
                list.iter().map(line).collect::<String>()
            };
            let mut text = findings("corruption", &report.corruptions);
            text.push_str(&findings("leak", &report.leaks));
            text
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
                    3 => "nothing is lost; `forkdisk gc` frees the leaks",
                    _ => "other objects are not affected",
                };
                ui.talk(format_args!("checked {checked}: {damage}, {leaks}; {next}"));
                Err(Stop::Code(code))
            }
        }
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
        let finding = || Finding {
            what: "x".into(),
            message: "y".into(),
        };
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
