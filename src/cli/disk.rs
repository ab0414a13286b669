//! Disks and their names: `create`, `snapshot`, `rename`, `rm`.

use crate::{
    cli::{
        Outcome,
        context::{Context, mounts_of},
        names::Names,
        render::{json::ObjectDoc, size::SizeArg},
        store::counted,
    },
    daemon::Attached,
    error::{Error, Kind, Result},
    store::{Object, ObjectKind, RemovePlan, Store},
    sys::{
        freeze::{self, Frozen},
        signals,
    },
};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use std::collections::HashSet;

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
        let what = match &names[..] {
            [one] => one.clone(),
            [first, .., last] => format!("{first} to {last}"),
            [] => unreachable!("--count is at least 1"),
        };
        if context.dry_run {
            for name in &names {
                context.must_be_free(&store, name)?;
            }
            let document = json!({"dry_run": true, "names": names, "from": from.name, "size": size.unwrap_or(from.size)});
            return ui.answer(document, || {
                format!("would create {what} from {}\n", from.name)
            });
        }
        let made = match from.kind {
            ObjectKind::Disk => match context.daemon_of(&store, &from.name)? {
                Some((mut daemon, _)) => daemon.create(&names, &from.name, size)?,
                None => store.create(&names, &from.name, size)?,
            },
            _ => store.create(&names, &self.from, size)?,
        };
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

fn too_large() -> Error {
    Error::new(Kind::Invalid, "the size would be more than 16 EiB")
        .hint("a disk has at most 16 TiB")
}

/// Keep the present state of a disk, also while it is mounted and busy
#[derive(Args, Debug)]
#[command(
    after_help = "A snapshot of a mounted disk is consistent as after a power cut, and a journal brings it in order.\n\
        With --freeze its filesystem is clean."
)]
pub(crate) struct Snapshot {
    /// The disk, and the name of the snapshot
    #[arg(value_name = "DISK@NAME")]
    name: String,
    /// What to remember about it
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Halt the mounted filesystem for the moment
    #[arg(long)]
    freeze: bool,
}

impl Snapshot {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let Some((disk, name)) = self.name.split_once('@') else {
            let name = &self.name;
            return Err(
                Error::new(Kind::Invalid, format!("`{name}` names no snapshot"))
                    .hint(format!(
                        "write the disk and the snapshot's name: `forkdisk snapshot {name}@NAME`"
                    ))
                    .into(),
            );
        };
        let store = context.open()?;
        if context.dry_run {
            store.resolve(disk)?;
            context.must_be_free(&store, &self.name)?;
            let document = json!({"dry_run": true, "name": self.name});
            return ui.answer(document, || format!("would make {}\n", self.name));
        }
        let (object, thawed) = self.take(context, &store, disk, name)?;
        thawed?;
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::of(&store)?));
        }
        ui.talk(format_args!("made {}", object.name));
        Ok(())
    }
    /// Takes the snapshot. The inner result tells whether the filesystem stayed frozen for it.
    fn take(
        &self,
        context: &Context,
        store: &Store,
        disk: &str,
        name: &str,
    ) -> Result<(Object, Result<()>)> {
        let message = self.message.as_deref();
        let Some((mut daemon, attached)) = context.daemon_of(store, disk)? else {
            return Ok((store.snapshot(disk, name, message)?, Ok(())));
        };
        let mounts = if self.freeze {
            mounts_of(&attached)?
        } else {
            Vec::new()
        };
        if self.freeze && mounts.is_empty() {
            context.ui.warn(format_args!(
                "{disk} is not mounted here: there is nothing to freeze"
            ));
        }
        // All mounts of one device show one filesystem. From here to the thaw nothing may be written
        // that could end up on it, not even a line of talk.
        signals::catch();
        let frozen = mounts.first().map(|dir| freeze::freeze(dir)).transpose()?;
        let made = daemon.snapshot(disk, name, message);
        let thawed = frozen.map_or(Ok(()), Frozen::thaw);
        Ok((made?, thawed))
    }
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
            store.resolve(old)?;
            context.must_be_free(&store, new)?;
            let document = json!({"dry_run": true, "old": old, "name": new});
            return ui.answer(document, || format!("would rename {old} to {new}\n"));
        }
        let name = store.resolve(old)?.name;
        // The daemon knows what is attached by its name.
        let concerned = |a: &Attached| {
            let tail = a.name.strip_prefix(name.as_str());
            tail.is_some_and(|tail| tail.is_empty() || tail.starts_with('@'))
        };
        if let Some(a) = context.attached(&store)?.iter().find(|a| concerned(a)) {
            return Err(Error::new(Kind::Busy, format!("{} is attached", a.name))
                .hint(format!("`forkdisk detach {}` first", a.name))
                .into());
        }
        let object = store.rename(old, new)?;
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::of(&store)?));
        }
        ui.talk(format_args!("renamed {old} to {}", object.name));
        Ok(())
    }
}

/// Remove disks, snapshots and images
#[derive(Args, Debug)]
#[command(after_help = "Without -r nothing is removed that something else stands on.")]
pub(crate) struct Rm {
    /// What to remove
    #[arg(value_name = "REF", required = true)]
    references: Vec<String>,
    /// Remove what stands on it, too
    #[arg(short, long)]
    recursive: bool,
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
            store.remove(&plan)?;
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
