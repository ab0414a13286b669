//! Is a store sound? `check` examines its structure, [`scrub`](mod@scrub) reads every block, [`repair`](mod@repair) mends what can be
//! mended without touching data.
//!
//! Shares only `format`, `map`, recovery's reading and the seam with the code that writes: it must not trust the code that made the mess.
//! `check` and `scrub` change nothing (but that `scrub` adds the checksums of a base that has none).

mod counts;
mod inside;
mod past;
pub mod repair;
pub mod scrub;
mod seen;
mod slots;
mod survey;

pub use repair::repair;
pub use scrub::scrub;

use crate::error::{Error, Kind, Result};
use crate::format::STATE_SEALED;
use crate::io::{Access, EntryKind};
use crate::store::names::TEMPORARY;
use crate::store::{Below, CheckReport, Finding, Progress, Store, layer_file, parent_of};
use crate::units::Id;
use std::collections::HashSet;
use survey::Survey;

struct Check<'a> {
    store: &'a Store,
    survey: Survey<'a>,
    report: CheckReport,
    /// What kept it from looking.
    unable: Option<Error>,
}

/// Checks the whole store, or what `reference` stands on.
pub fn check(
    store: &Store,
    reference: Option<&str>,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let wanted = reference.map(|r| target_of(store, r)).transpose()?;
    let _lock = store.lock(false)?;
    let mut c = Check::new(store)?;
    let only = wanted.map(|below| c.survey.chain(below));
    if only.is_none() {
        c.names();
        c.foreign();
    }
    let among = |below: Below| only.as_ref().is_none_or(|o| o.contains(&below));
    c.unreadable(&among);
    let layers: Vec<Id> = c.survey.layers.clone();
    let total = layers.len() as u64;
    for (done, id) in layers.iter().enumerate() {
        if !progress.update(done as u64, total) {
            return Err(
                Error::new(Kind::Interrupted, "the check was interrupted").hint("run it again")
            );
        }
        if among(Below::Layer(*id)) {
            c.report.checked += 1;
            c.layer(*id);
        }
    }
    c.bases(&among, only.is_none())?;
    if only.is_none() {
        c.references();
        c.leftovers()?;
    }
    c.counts(&among)?;
    match c.unable {
        Some(e) => Err(e.context("the check could not be done")),
        None => Ok(c.report),
    }
}

/// What a reference means.
fn target_of(store: &Store, reference: &str) -> Result<Below> {
    let object = store.resolve_any(reference)?;
    Ok(match object.kind {
        crate::store::ObjectKind::Base => Below::Base(object.id),
        _ => Below::Layer(object.id),
    })
}

impl<'a> Check<'a> {
    /// The names lock is held.
    fn new(store: &'a Store) -> Result<Check<'a>> {
        Ok(Check {
            store,
            survey: Survey::new(store)?,
            report: CheckReport::default(),
            unable: None,
        })
    }
    /// A finding about a layer or base as a whole.
    fn about(&self, below: Below, message: impl Into<String>) -> Finding {
        let mut finding = Finding {
            what: self.survey.called(below),
            message: message.into(),
            affected: self.survey.affected(below, None),
            ..Finding::default()
        };
        match below {
            Below::Layer(id) => finding.layer = Some(id),
            Below::Base(id) => finding.base = Some(id),
        }
        finding
    }
    fn corrupt(&mut self, below: Below, message: impl Into<String>) {
        let finding = self.about(below, message);
        self.report.corruptions.push(finding);
    }
    /// An error that was met in a layer or base: where it says that it is one block, only those who show the block are affected.
    fn failed(&mut self, below: Below, e: &Error) {
        if e.of_resources() {
            self.unable.get_or_insert_with(|| e.clone());
            return;
        }
        let mut finding = self.about(below, e.to_string());
        finding.offset = e.offset_at();
        if let Some(lba) = e.block_lba() {
            finding.lba = Some((lba.0.into(), u64::from(lba.0) + 1));
            finding.affected = self.survey.affected(below, finding.lba);
        }
        self.report.corruptions.push(finding);
    }
    fn leak(&mut self, mut finding: Finding) {
        finding.affected.clear();
        self.report.leaks.push(finding);
    }
    /// A finding about a file that belongs to no layer or base.
    fn stray(what: impl Into<String>, message: impl Into<String>) -> Finding {
        Finding {
            what: what.into(),
            message: message.into(),
            ..Finding::default()
        }
    }
    fn names(&mut self) {
        for (name, _, why) in &self.survey.bad_names {
            self.report.corruptions.push(Finding {
                affected: vec![name.clone()],
                ..Self::stray(format!("names/{name}"), why.clone())
            });
        }
    }
    fn foreign(&mut self) {
        for (name, is_layer) in &self.survey.foreign {
            let what = format!("layers/{name}");
            if *is_layer {
                let finding = Self::stray(what, "not a regular file");
                self.report.corruptions.push(finding);
            } else {
                let finding = Self::stray(
                    what,
                    "a foreign file: nothing of the store refers to it, and `gc` leaves it alone",
                );
                self.report.leaks.push(finding);
            }
        }
    }
    /// A layer whose header cannot be read is damage if anything needs it; else an interrupted creation.
    fn unreadable(&mut self, among: &dyn Fn(Below) -> bool) {
        for (id, error) in std::mem::take(&mut self.survey.unreadable) {
            let below = Below::Layer(id);
            if !among(below) {
                continue;
            }
            if self.survey.needed(below) {
                self.failed(below, &error);
            } else {
                let finding = self.about(
                    below,
                    format!("{error}; nothing refers to it: `forkdisk gc` removes it"),
                );
                self.leak(finding);
            }
        }
    }
    fn layer(&mut self, id: Id) {
        let Some((header, _)) = self.survey.header_of(id) else {
            return;
        };
        let below = Below::Layer(id);
        if header.layer != id.0 {
            self.corrupt(
                below,
                format!("layers/{} holds layer {}", layer_file(id), Id(header.layer)),
            );
            return;
        }
        if self.survey.fresh.contains(&id) && self.survey.opened.contains(&id) {
            self.corrupt(
                below,
                format!(
                    "layers/{} is cut: nothing is left of it but its header",
                    layer_file(id)
                ),
            );
        }
        match parent_of(&header) {
            Below::Base(base) => {
                let there = self.store.bases_dir().entry(&base.to_string());
                if there.ok().flatten().is_none() {
                    self.corrupt(below, format!("its base {base} is gone"));
                }
            }
            Below::Layer(parent) => match self.survey.header_of(parent) {
                // What it was made on was removed since: `references` calls it a leak.
                None if !self.survey.needed(below) => {}
                None => self.corrupt(
                    below,
                    format!("its parent, layer {parent}, is gone or unreadable"),
                ),
                Some((upper, state)) => {
                    if upper.depth.get() >= header.depth.get() {
                        self.corrupt(below, "its depth does not fit its parent's");
                    } else if state != STATE_SEALED && !self.survey.needed(below) {
                        // Made for a snapshot that did not come to its seal: `references` calls it a leak.
                    } else if state != STATE_SEALED {
                        self.corrupt(below, format!("its parent, layer {parent}, is not sealed"));
                    }
                }
            },
        }
        match self.store.layers_dir().open(&layer_file(id), Access::Read) {
            Err(e) => self.failed(below, &e),
            // Open for writing: its file changes under our eyes, and its writer checks what it reads.
            Ok(file) if file.lock(false).is_err_and(|e| e.kind() == Kind::Busy) => {}
            Ok(file) => {
                if let Err(e) = self.file(&*file, &header) {
                    self.failed(below, &e);
                }
            }
        }
    }
    fn bases(&mut self, among: &dyn Fn(Below) -> bool, whole: bool) -> Result<()> {
        for (name, kind) in self.store.bases_dir().list()? {
            if name.starts_with(TEMPORARY) {
                continue;
            }
            let Some(id) = Id::parse(&name) else {
                if whole {
                    let finding = Self::stray(
                        format!("bases/{name}"),
                        "foreign: nothing of the store refers to it",
                    );
                    self.report.leaks.push(finding);
                }
                continue;
            };
            let below = Below::Base(id);
            if !among(below) {
                continue;
            }
            self.report.checked += 1;
            if kind != EntryKind::Dir {
                self.corrupt(below, format!("bases/{name} is not a directory"));
            } else if let Err(e) = self.store.base(id) {
                self.failed(below, &e);
            } else if self.store.sums_are_lost(id)? {
                self.corrupt(
                    below,
                    "its checksums are gone, so that its blocks are not verified; `forkdisk scrub` computes them anew",
                );
            }
        }
        Ok(())
    }
    /// Names that refer to nothing, and layers and bases that nothing refers to.
    fn references(&mut self) {
        let mut needed: HashSet<Below> = HashSet::new();
        let mut lost = Vec::new();
        for (name, target) in &self.survey.names {
            let there = match target {
                Below::Base(id) => {
                    let entry = self.store.bases_dir().entry(&id.to_string());
                    entry.ok().flatten().is_some()
                }
                Below::Layer(id) => self.survey.layers.contains(id),
            };
            if !there {
                lost.push(Finding {
                    affected: vec![name.clone()],
                    ..Self::stray(name, format!("it refers to {}, which is gone", target.id()))
                });
            }
            needed.extend(self.survey.chain(*target));
        }
        self.report.corruptions.extend(lost);
        // A base that was imported has a name before anything can stand on it. (A layer between others may never have had one.)
        let bases = self.store.bases_dir().list().unwrap_or_default();
        let bases: Vec<Id> = bases.iter().filter_map(|(n, _)| Id::parse(n)).collect();
        for id in &bases {
            let below = Below::Base(*id);
            if needed.contains(&below)
                && self.survey.names_of(below).is_empty()
                && !self.store.never_named(*id)
            {
                self.corrupt(
                    below,
                    "its name is gone; `forkdisk check --repair` gives it back",
                );
            }
        }
        // While a name, or what a layer stands on, is unreadable it may be what needs the rest.
        if !self.report.corruptions.is_empty() {
            return;
        }
        let garbage = "left over: nothing refers to it; `forkdisk gc` removes it, `forkdisk check --repair` gives it a name again if it holds data";
        let empty = "left over from a command that was interrupted, and holds nothing; `forkdisk gc` removes it";
        for id in self.survey.layers.clone() {
            let below = Below::Layer(id);
            let left = !needed.contains(&below) && self.survey.header_of(id).is_some();
            if left && !self.in_use(below) {
                let text = match self.survey.fresh.contains(&id) {
                    true => empty,
                    false => garbage,
                };
                let finding = self.about(below, text);
                self.leak(finding);
            }
        }
        for id in bases {
            if !needed.contains(&Below::Base(id)) && !self.in_use(Below::Base(id)) {
                let finding = self.about(Below::Base(id), garbage);
                self.leak(finding);
            }
        }
    }
    /// Has anybody a layer or base open? Then it is being made, or goes when he lets go of it, as what was replaced below an attached disk does.
    fn in_use(&self, below: Below) -> bool {
        let file = match below {
            Below::Layer(id) => self.store.layers_dir().open(&layer_file(id), Access::Read),
            Below::Base(id) => {
                let dir = self.store.bases_dir().subdir(&id.to_string());
                dir.and_then(|dir| dir.open("meta", Access::Read))
            }
        };
        file.is_ok_and(|file| file.lock(true).is_err_and(|e| e.kind() == Kind::Busy))
    }
    fn leftovers(&mut self) -> Result<()> {
        for name in leftovers(self.store)? {
            let finding = Self::stray(
                name,
                "left by an interrupted operation; `forkdisk gc` removes it",
            );
            self.report.leaks.push(finding);
        }
        Ok(())
    }
}

/// Files and directories that interrupted operations left, relative to the store.
fn leftovers(store: &Store) -> Result<Vec<String>> {
    let dirs = [
        ("", store.root()),
        ("names/", store.names_dir()),
        ("bases/", store.bases_dir()),
        ("layers/", store.layers_dir()),
    ];
    let mut found = Vec::new();
    for (prefix, dir) in dirs {
        for (name, _) in dir.list()? {
            if !name.starts_with(TEMPORARY) {
                continue;
            }
            let running = match prefix {
                "bases/" => store.import_running(&name),
                "layers/" => store.rewrite_running(&name) || store.layer_import_running(&name),
                _ => false,
            };
            if !running {
                found.push(format!("{prefix}{name}"));
            }
        }
    }
    Ok(found)
}
