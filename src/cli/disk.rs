//! Disks and their names: `create`, `rename`, `rm`.

use crate::{
    cli::{
        Outcome,
        context::Context,
        history::{HistoryArg, TimeArg},
        names::Names,
        render::{json::ObjectDoc, size::SizeArg},
        resize::QuotaArgs,
        states::{patiently, tell_of_histories, with_points},
        store::counted,
    },
    daemon::{Attached, Client, PastOwner},
    error::{Error, Kind, Result},
    store::{
        Object, ObjectKind, RemovePlan, Store,
        names::Extra,
        past::{Owner, PastFork},
    },
    sys::signals,
};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use std::collections::{BTreeSet, HashSet};

/// Fork new disks from an image, a snapshot or a disk
#[derive(Args, Debug)]
#[command(
    after_help = "A fork takes no time and almost no space, whatever the size of what it is forked from."
)]
pub(crate) struct Create {
    /// The new disk
    #[arg(value_name = "DISK")]
    name: String,
    /// What it is forked from
    #[arg(long, value_name = "REF")]
    from: String,
    /// Its size, or +SIZE for more than REF has [default: the size of REF]
    #[arg(long)]
    size: Option<SizeArg>,
    /// Make DISK-1 to DISK-N
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: Option<u32>,
    #[command(flatten)]
    quota: QuotaArgs,
    /// Keep its last flush points: so long, so many bytes, or both (10m, 2G, 10m,2G)
    #[arg(long, value_name = "LENGTH")]
    history: Option<HistoryArg>,
    /// As REF, a disk with a history, was then: -90s, -2h, 2026-11-27T23:10:00Z, seconds since 1970, or #N
    #[arg(
        long,
        value_name = "TIME",
        allow_hyphen_values = true,
        conflicts_with = "count"
    )]
    at: Option<TimeArg>,
}

#[derive(Serialize)]
struct CreateDoc {
    dry_run: bool,
    #[serde(flatten)]
    first: Option<ObjectDoc>,
    from: String,
    objects: Vec<ObjectDoc>,
}

impl Create {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let from = store.resolve(&self.from)?;
        let size = self
            .size
            .map(|size| size.apply(from.size).ok_or_else(too_large));
        let size = size.transpose()?;
        let names: Vec<String> = match self.count {
            None => vec![self.name.clone()],
            Some(n) => (1..=n).map(|i| format!("{}-{i}", self.name)).collect(),
        };
        let quota = self.quota.change(|| Ok(None))?;
        let settings = quota.settings()?;
        let what = match &names[..] {
            [one] => one.clone(),
            [first, .., last] => format!("{first} to {last}"),
            [] => unreachable!("--count is at least 1"),
        };
        if context.dry_run {
            let size = store.may_create(&names, &self.from, size)?;
            if let Some(at) = self.at {
                match context.daemon_of(&store, &from.name)? {
                    None => store.look_back(&from.name, at.at())?,
                    Some(_) => store.look_back_busy(&from.name, at.at())?,
                };
            }
            let document =
                json!({"dry_run": true, "names": names, "from": from.name, "size": size});
            return ui.answer(document, || {
                format!("would create {what} from {}\n", from.name)
            });
        }
        let made = match from.kind {
            _ if self.at.is_some() => self.past(context, &store, &from, size, &settings)?,
            ObjectKind::Disk => match context.daemon_of(&store, &from.name)? {
                Some((mut daemon, _)) => daemon.create(&names, &from.name, size, &quota)?,
                None => store.create_with(&names, &from.name, size, &settings)?,
            },
            _ => store.create_with(&names, &self.from, size, &settings)?,
        };
        if let Some(HistoryArg(Some(limits))) = self.history {
            store
                .set_history(&names, Some(limits))
                .map_err(|e| e.context(format!("created {what}, but without a history")))?;
        }
        if ui.json {
            // The layer of a disk was sealed for it, and the disk's name went on to another.
            let known = match from.kind {
                ObjectKind::Disk => Names::of(&store)?,
                _ => Names::from_objects([&from]),
            };
            let objects: Vec<_> = made.iter().map(|o| ObjectDoc::new(o, &known)).collect();
            return ui.document(CreateDoc {
                dry_run: false,
                first: objects.first().cloned(),
                from: from.name,
                objects,
            });
        }
        ui.talk(format_args!("created {what} from {}", from.name));
        Ok(())
    }
}

impl Create {
    /// A fork of what the disk `from` was.
    fn past(
        &self,
        context: &Context,
        store: &Store,
        from: &Object,
        size: Option<u64>,
        settings: &Extra,
    ) -> Result<Vec<Object>> {
        let Some(at) = self.at else {
            return Ok(Vec::new());
        };
        let fork = PastFork {
            name: &self.name,
            from: &from.name,
            at: at.at(),
            size,
            settings,
        };
        let mut attached = match from.kind {
            ObjectKind::Disk => context.daemon_of(store, &from.name)?,
            _ => None,
        };
        // What is attached read-only nobody changes for longer than a moment.
        let read = attached.as_ref().is_some_and(|(_, a)| a.read_only);
        attached = attached.filter(|_| !read);
        let mut owner = attached.as_mut().map(|(daemon, _)| PastOwner {
            daemon,
            disk: &from.name,
        });
        signals::catch();
        let label = format!("copying {} as it was", from.name);
        let progress = context.ui.progress(&label);
        let owner = owner.as_mut().map(|o| o as &mut dyn Owner);
        let made = match read {
            true => patiently(|| store.create_at_with(&fork, None, &*progress))?,
            false => store.create_at_with(&fork, owner, &*progress)?,
        };
        Ok(vec![made])
    }
}

fn too_large() -> Error {
    Error::new(Kind::Invalid, "the size would be more than 16 EiB")
        .hint("a disk has at most 16 TiB")
}

/// Give a disk, snapshot or image another name
#[derive(Args, Debug)]
pub(crate) struct Rename {
    /// Its name
    old: String,
    /// Its new name
    new: String,
}

impl Rename {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let Rename { old, new } = &self;
        let store = context.open_to_change()?;
        if context.dry_run {
            let old = store.may_rename(old, new)?.name;
            let document = json!({"dry_run": true, "old": old, "name": new});
            return ui.answer(document, || format!("would rename {old} to {new}\n"));
        }
        let name = store.resolve(old)?.name;
        // The daemon knows what is attached by its name.
        let concerned = |a: &Attached| {
            let tail = a.name.strip_prefix(name.as_str());
            tail.is_some_and(|tail| tail.is_empty() || tail.starts_with('@'))
        };
        let mut daemon = Client::connect(&store)?;
        let attached = daemon.as_mut().map_or(Ok(Vec::new()), Client::attached)?;
        let object = match daemon {
            Some(mut daemon) if attached.iter().any(concerned) => daemon.rename(&name, new)?,
            _ => store.rename(old, new)?,
        };
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::of(&store)?));
        }
        ui.talk(format_args!("renamed {old} to {}", object.name));
        Ok(())
    }
}

/// Remove disks, snapshots and images
#[derive(Args, Debug)]
#[command(
    after_help = "Without -r no disk or image is removed that something else stands on. A snapshot can always go: what others need of it\n\
        stays, without a name."
)]
pub(crate) struct Rm {
    /// What to remove
    #[arg(value_name = "REF", required = true)]
    references: Vec<String>,
    /// Remove what stands on it, too
    #[arg(short, long)]
    recursive: bool,
}

/// The disks that stay while snapshots of them go.
fn origins(store: &Store, plan: &RemovePlan) -> Vec<Object> {
    let snapshots = plan.names.iter().filter_map(|o| o.name.split_once('@'));
    let disks: BTreeSet<&str> = snapshots.map(|(disk, _)| disk).collect();
    let stays = |disk: &&str| !plan.names.iter().any(|o| o.name == **disk);
    let found = disks.into_iter().filter(stays);
    found.filter_map(|disk| store.resolve(disk).ok()).collect()
}

#[derive(Serialize)]
struct RmDoc {
    dry_run: bool,
    removed: Vec<ObjectDoc>,
    frees: u64,
}

impl Rm {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open_to_change()?;
        let plan = store.plan_removal(&self.references, self.recursive)?;
        let mut named = HashSet::new();
        for reference in &self.references {
            // What is damaged is called by its name.
            let name = store.resolve(reference).map(|o| o.name);
            named.insert(name.unwrap_or_else(|_| reference.clone()));
        }
        let more = plan
            .names
            .iter()
            .any(|object| !named.contains(&object.name));
        // What others stand on stays open by them; but who attached it still uses the name.
        if plan.names.iter().any(|o| o.kind == ObjectKind::Snapshot) {
            let going = |a: &Attached| plan.names.iter().any(|o| o.name == a.name);
            if let Some(a) = context
                .attached(&store)
                .unwrap_or_default()
                .iter()
                .find(|a| going(a))
            {
                return Err(Error::new(Kind::Busy, format!("{} is attached", a.name))
                    .hint(format!("`forkdisk detach {}` first", a.name))
                    .into());
            }
        }
        if !context.dry_run {
            if more {
                let number = counted(plan.names.len(), "object");
                let frees = ui.size(plan.frees);
                ui.confirm(
                    &listing(&plan),
                    &format!("Remove these {number} ({frees})?"),
                )?;
                // The answer may have taken its time.
                context.await_server(&store);
            }
            let histories = with_points(&store, origins(&store, &plan));
            store.remove(&plan)?;
            tell_of_histories(context, &store, &histories);
            if plan.names.iter().any(|o| o.kind == ObjectKind::Snapshot) {
                context.reclaim_attached(&store);
            }
        }
        if ui.json {
            let names = Names::from_objects(&plan.names);
            let removed = plan.names.iter().map(|o| ObjectDoc::new(o, &names));
            return ui.document(RmDoc {
                dry_run: context.dry_run,
                removed: removed.collect(),
                frees: plan.frees,
            });
        }
        let frees = ui.size(plan.frees);
        if context.dry_run {
            ui.data(listing(&plan))?;
            ui.talk(format_args!("would free {frees}"));
            return Ok(());
        }
        let what = match &plan.names[..] {
            [one] => one.name.clone(),
            all => counted(all.len(), "object"),
        };
        ui.talk(format_args!("removed {what}, freed {frees}"));
        Ok(())
    }
}

/// `remove disk web-1`, a line for each.
fn listing(plan: &RemovePlan) -> String {
    let line = |o: &Object| format!("remove {} {}\n", o.kind.word(), o.name);
    plan.names.iter().map(line).collect()
}
