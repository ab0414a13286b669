//! `check --repair`: names come back from the headers of layers, leaks are freed, a damaged copy of a superblock is written anew.
//!
//! Always true:
//! - what holds data is never removed and never changed; what nothing names gets a name, so that its owner can look and decide;
//! - only what is plainly empty goes: the files of interrupted operations, forks that were never written and have no name;
//! - what is in use is left alone;
//! - each step is whole or not there after a power cut, and all of them can be done again.

use super::inside::Accounts;
use super::{Check, leftovers};
use crate::error::{Error, Kind, Result};
use crate::format::{Header, JOURNAL_START, STATE_SEALED, STATE_WRITABLE, Superblock};
use crate::io::{Access, Dir, EntryKind, File};
use crate::layer::recover;
use crate::store::names::{Extra, NameRecord, TEMPORARY, check_part, split_snapshot, stage};
use crate::store::{Below, COPIED, ObjectKind, Progress, Recount, Store, layer_file};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Slot};
use std::collections::BTreeSet;
use zerocopy::little_endian::U64;

/// One thing that can be mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The object or file it concerns.
    pub what: String,
    /// What is done.
    pub message: String,
    action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    /// Gives something a name.
    Name(String, NameKind, Below),
    /// Writes a copy of a layer's superblock from the other one.
    Copy(Id, u32),
    /// Gives host space back: slots of a layer, first and number.
    Punch(Id, Vec<(u64, u64)>),
    /// So many slots are neither used nor free: the layer's superblock says so.
    Forget(Id, u64),
    /// Notes how much data something shows.
    Count(Recount),
    /// Removes a layer that is empty and that nothing needs.
    Layer(Id),
    /// Removes what an interrupted operation left.
    Leftover(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameKind {
    Disk,
    Snapshot,
    Image,
    Base,
}

impl NameKind {
    fn kind(self) -> ObjectKind {
        match self {
            NameKind::Disk => ObjectKind::Disk,
            NameKind::Snapshot => ObjectKind::Snapshot,
            NameKind::Image => ObjectKind::Image,
            NameKind::Base => ObjectKind::Base,
        }
    }
}

/// What can be mended. Changes nothing.
pub fn plan(store: &Store, progress: &dyn Progress) -> Result<Vec<Step>> {
    let _lock = store.lock(false)?;
    plan_locked(store, progress)
}

/// Does those of the steps that are still to be done; returns them.
pub fn repair(store: &Store, steps: &[Step], progress: &dyn Progress) -> Result<Vec<Step>> {
    let _lock = store.lock(true)?;
    // Whoever removed a name may have died before the directory was synced: what it refers to must not go before it.
    store.names_dir().sync()?;
    let mut done = Vec::new();
    for step in plan_locked(store, progress)? {
        if !steps.contains(&step) {
            continue;
        }
        match apply(store, &step) {
            Ok(()) => done.push(step),
            // Attached meanwhile.
            Err(e) if e.kind() == Kind::Busy => {}
            Err(e) => {
                return Err(e.context(format!("cannot mend {}", step.what)));
            }
        }
    }
    store.names_dir().sync()?;
    store.layers_dir().sync()?;
    Ok(done)
}

/// A layer or base that no name refers to.
struct Nameless {
    below: Below,
    /// What it was called, and what that name was.
    called: String,
    kind: NameKind,
    depth: u32,
    /// It holds nothing of its own, and nothing stands on it.
    empty: bool,
}

fn plan_locked(store: &Store, progress: &dyn Progress) -> Result<Vec<Step>> {
    let mut check = Check::new(store)?;
    let mut steps = Vec::new();
    let mut nameless = Vec::new();
    let layers = check.survey.layers.clone();
    for (n, id) in layers.iter().enumerate() {
        if !progress.update(n as u64, layers.len() as u64) {
            return Err(Error::new(Kind::Interrupted, "interrupted").hint("nothing was changed"));
        }
        look_inside(&mut check, *id, &mut steps);
        nameless.extend(nameless_layer(&check, *id));
    }
    nameless.extend(nameless_bases(&check)?);
    // The newest first: of several layers that were made for one disk it is the one on top.
    nameless.sort_by_key(|n| (std::cmp::Reverse(n.depth), n.below));
    let mut taken: BTreeSet<String> = check.survey.names.keys().cloned().collect();
    let mut broken: BTreeSet<String> = check.survey.bad_names.iter().map(|b| b.0.clone()).collect();
    let salvaged = salvage(&check, &nameless);
    let mut empty = Vec::new();
    for n in &nameless {
        let known = salvaged.iter().find(|(below, _)| *below == n.below);
        let wanted = known.map_or(&n.called, |(_, name)| name);
        let free = sound(wanted, n.kind) && !taken.contains(wanted) && replaceable(&check, wanted);
        let name = match (free, n.below) {
            (true, _) => wanted.clone(),
            // A disk of that name is there, and this holds nothing: what an interrupted snapshot or fork left.
            (false, Below::Layer(id)) if n.empty => {
                empty.push(id);
                continue;
            }
            (false, _) => format!("found-{}", n.below.id().short()),
        };
        if !free && taken.contains(&name) {
            continue;
        }
        let kind = match (name.contains('@'), n.kind) {
            (false, NameKind::Snapshot) => NameKind::Image,
            (_, kind) => kind,
        };
        broken.remove(&name);
        taken.insert(name.clone());
        steps.push(Step {
            what: name.clone(),
            message: format!(
                "gets its name back: {} {}",
                kind.kind().word(),
                n.below.id()
            ),
            action: Action::Name(name, kind, n.below),
        });
    }
    // A name that cannot be read may refer to anything: nothing is plainly garbage then.
    if broken.is_empty() {
        for id in empty {
            steps.push(removal(
                id,
                "it is empty, and nothing refers to it: removed",
            ));
        }
        for (id, _) in &check.survey.unreadable {
            if !check.survey.needed(Below::Layer(*id)) && never_written(store, *id) {
                steps.push(removal(*id, "a layer that was never completed: removed"));
            }
        }
    }
    // Of layers that were damaged otherwise too: what can be read of them is counted.
    for found in store.recount(&|_| true)? {
        if found.kept != Some(found.counted) {
            steps.push(Step {
                what: check.survey.called(found.below),
                message: format!("it is noted that it shows {} blocks of data", found.counted),
                action: Action::Count(found),
            });
        }
    }
    for name in leftovers(store)? {
        steps.push(Step {
            what: name.clone(),
            message: "left by an interrupted operation: removed".to_string(),
            action: Action::Leftover(name),
        });
    }
    Ok(steps)
}

fn removal(id: Id, message: &str) -> Step {
    Step {
        what: format!("layer {id}"),
        message: message.to_string(),
        action: Action::Layer(id),
    }
}

/// May something have this name?
fn sound(name: &str, kind: NameKind) -> bool {
    match kind {
        NameKind::Snapshot if name.contains('@') => split_snapshot(name).is_ok(),
        _ => check_part(name).is_ok(),
    }
}

/// Is there nothing under this name, or a file whose record cannot be read?
fn replaceable(check: &Check<'_>, name: &str) -> bool {
    let mut bad = check.survey.bad_names.iter();
    bad.find(|b| b.0 == name)
        .is_none_or(|b| b.1 == EntryKind::File)
}

/// A layer that was never completed: no header, or one of zeros.
fn never_written(store: &Store, id: Id) -> bool {
    let Ok(file) = store.layers_dir().open(&layer_file(id), Access::Read) else {
        return false;
    };
    let Ok(len) = file.len() else {
        return false;
    };
    let mut head = vec![0; len.min(BLOCK) as usize];
    len <= BLOCK && file.read_at(&mut head, 0).is_ok() && head.iter().all(|b| *b == 0)
}

/// What can be mended within a layer at rest.
fn look_inside(check: &mut Check<'_>, id: Id, steps: &mut Vec<Step>) {
    let Some((header, state)) = check.survey.header_of(id) else {
        return;
    };
    // Recovery mends what a crash left.
    if header.layer != id.0 || state == STATE_WRITABLE {
        return;
    }
    let opened = check.store.layers_dir().open(&layer_file(id), Access::Read);
    let Ok(file) = opened else {
        return;
    };
    if file.lock(false).is_err() {
        return;
    }
    let who = check.survey.called(Below::Layer(id));
    let copy = damaged_copy(&*file, &header);
    check.report.corruptions.clear();
    let inside = check.file(&*file, &header);
    let damage = check.report.corruptions.len();
    check.report = Default::default();
    if let Some((slot, _)) = copy {
        steps.push(Step {
            what: who.clone(),
            message: format!("copy {slot} of its superblock is written from the other one"),
            action: Action::Copy(id, slot),
        });
    }
    // Accounts of a damaged map are not to be relied on.
    let Ok(Some(Accounts { lost, idle })) = inside else {
        return;
    };
    if damage > usize::from(copy.is_some()) {
        return;
    }
    let bytes: u64 = idle.iter().map(|&(_, n)| n * BLOCK).sum();
    if bytes > 0 {
        steps.push(Step {
            what: who.clone(),
            message: format!("{bytes} bytes of unused host space are given back"),
            action: Action::Punch(id, idle),
        });
    }
    let known = recover::superblock(&*file, &header).map(|f| f.superblock.forgotten.get());
    if state != STATE_SEALED && known.is_ok_and(|known| lost > known) {
        steps.push(Step {
            what: who,
            message: format!("{lost} slots that are neither used nor free are noted as such"),
            action: Action::Forget(id, lost),
        });
    }
}

/// The damaged copy of a superblock, and the good one.
fn damaged_copy(file: &dyn File, header: &Header) -> Option<(u32, Superblock)> {
    let found = recover::superblock(file, header).ok()?;
    let sound = found.superblock.state.get() != STATE_WRITABLE && !found.fresh;
    let slot = if found.second_differs { 2 } else { 1 };
    (sound && found.damaged_copy).then_some((slot, found.superblock))
}

fn nameless_layer(check: &Check<'_>, id: Id) -> Option<Nameless> {
    let survey = &check.survey;
    let below = Below::Layer(id);
    let (header, state) = survey.header_of(id)?;
    if header.layer != id.0 || !survey.names_of(below).is_empty() {
        return None;
    }
    // Of no use without what it stands on.
    let whole = survey.chain(below).iter().any(|b| match b {
        Below::Base(id) => check.store.base_meta(*id).is_ok(),
        Below::Layer(_) => false,
    });
    if !whole {
        return None;
    }
    let alone = survey.children_of(below).is_empty();
    let layer = super::survey::open_layer(check.store, id).ok()?;
    let label = layer.superblock().name();
    let (called, kind) = match label {
        Some(label) if state == STATE_SEALED && label.contains('@') => (label, NameKind::Snapshot),
        Some(label) if state == STATE_SEALED => (label, NameKind::Image),
        // Between a disk and its forks: it never had a name.
        _ if !alone => return None,
        _ => (header.name(), NameKind::Disk),
    };
    Some(Nameless {
        below,
        called: called.to_string(),
        kind,
        depth: header.depth.get(),
        empty: alone && layer.counts() == (0, 0),
    })
}

fn nameless_bases(check: &Check<'_>) -> Result<Vec<Nameless>> {
    let mut found = Vec::new();
    for (name, _) in check.store.bases_dir().list()? {
        let Some(id) = Id::parse(&name) else {
            continue;
        };
        let below = Below::Base(id);
        if check.survey.names_of(below).is_empty()
            && let Ok(meta) = check.store.base_meta(id)
            && !meta.name.is_empty()
        {
            found.push(Nameless {
                below,
                called: meta.name,
                kind: NameKind::Base,
                depth: 0,
                empty: false,
            });
        }
    }
    Ok(found)
}

/// Names whose damaged records still show the id of something nameless.
fn salvage(check: &Check<'_>, nameless: &[Nameless]) -> Vec<(Below, String)> {
    let mut found: Vec<(Below, String)> = Vec::new();
    for (name, kind, _) in &check.survey.bad_names {
        if *kind != EntryKind::File {
            continue;
        }
        let Ok(bytes) = crate::store::names::read_record(&**check.store.names_dir(), name) else {
            continue;
        };
        // A record that is sound in itself belongs to another name.
        if crate::format::text::Record::decode(&bytes).is_ok() {
            continue;
        }
        let ids: BTreeSet<Id> = bytes
            .windows(32)
            .filter_map(|w| Id::parse(std::str::from_utf8(w).ok()?))
            .collect();
        let mut of = nameless.iter().filter(|n| ids.contains(&n.below.id()));
        if let (Some(n), None) = (of.next(), of.next())
            && !found.iter().any(|(below, _)| *below == n.below)
        {
            found.push((n.below, name.clone()));
        }
    }
    found
}

fn apply(store: &Store, step: &Step) -> Result<()> {
    let open = |id: Id| -> Result<(std::sync::Arc<dyn File>, Header)> {
        let file = store.layers_dir().open(&layer_file(id), Access::Write)?;
        file.lock(true)?;
        let header = crate::layer::read_header(&*file)?;
        Ok((file, header))
    };
    match &step.action {
        Action::Name(name, kind, below) => {
            let (created, opened) = match below {
                Below::Layer(id) => {
                    let (header, fresh) = open_header(store, *id)?;
                    (header.created.get(), *kind == NameKind::Disk && !fresh)
                }
                Below::Base(_) => (0, false),
            };
            let record = NameRecord {
                kind: kind.kind(),
                target: *below,
                created,
                message: None,
                opened,
                extra: Extra::default(),
            };
            let names = store.names_dir();
            let (temporary, file) = stage(&**names, name, &record.encode(name))?;
            file.sync()?;
            names.rename(&temporary, name)
        }
        Action::Copy(id, slot) => {
            let (file, header) = open(*id)?;
            if let Some((damaged, mut good)) = damaged_copy(&*file, &header)
                && damaged == *slot
            {
                file.write_at(good.encode(), Slot(*slot).at())?;
                file.sync()?;
            }
            Ok(())
        }
        Action::Punch(id, slots) => {
            let (file, _) = open(*id)?;
            for &(slot, n) in slots.iter().filter(|s| s.0 >= u64::from(JOURNAL_START)) {
                file.punch(slot * BLOCK, n * BLOCK)?;
            }
            file.sync()
        }
        Action::Forget(id, lost) => {
            let (file, header) = open(*id)?;
            let mut superblock = recover::superblock(&*file, &header)?.superblock;
            superblock.forgotten = U64::new(*lost);
            superblock.advance();
            let bytes: [u8; BLOCK_SIZE] = superblock
                .encode()
                .try_into()
                .map_err(|_| Error::new(Kind::Io, "a superblock is no slot"))?;
            for copy in [1, 2] {
                file.write_at(&bytes, Slot(copy).at())?;
                file.sync()?;
            }
            Ok(())
        }
        Action::Count(found) => store.note_count(found),
        Action::Layer(id) => {
            let name = layer_file(*id);
            let file = store.layers_dir().open(&name, Access::Read)?;
            file.lock(true)?;
            store.layers_dir().remove(&name)
        }
        Action::Leftover(path) => {
            let removed = match path.split_once('/') {
                Some(("names", name)) => store.names_dir().remove(name),
                Some(("layers", name)) => store.layers_dir().remove(name),
                Some(("bases", name)) => remove_import(&**store.bases_dir(), name),
                _ => store.root().remove(path),
            };
            match removed {
                // The name it was to become was made anew just now.
                Err(e) if e.kind() == Kind::NotFound => Ok(()),
                other => other,
            }
        }
    }
}

/// A layer's header; and is the header all there is?
fn open_header(store: &Store, id: Id) -> Result<(Header, bool)> {
    let file = store.layers_dir().open(&layer_file(id), Access::Read)?;
    let header = crate::layer::read_header(&*file)?;
    Ok((header, recover::superblock(&*file, &header)?.fresh))
}

/// Removes the directory of an import that died.
fn remove_import(bases: &dyn Dir, name: &str) -> Result<()> {
    if !name.starts_with(TEMPORARY) {
        return Err(Error::new(Kind::Invalid, "not left by an import"));
    }
    let dir = bases.subdir(name)?;
    // First what others go by.
    match dir.remove(COPIED) {
        Err(e) if e.kind() == Kind::NotFound => {}
        other => other?,
    }
    for (file, kind) in dir.list()? {
        if kind != EntryKind::Dir {
            dir.remove(&file)?;
        }
    }
    bases.remove_dir(name)
}
