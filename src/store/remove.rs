//! Taking away: names, and what nothing needs any more.

use super::flatten::COPIED;
use super::graph::Graph;
use super::import::allocated_in;
use super::names::{self, TEMPORARY};
use super::objects::object_target;
use super::{Below, GcReport, Object, ObjectKind, RemovePlan, Store, layer_file};
use crate::error::{Error, Kind, Result};
use crate::io::{Access, EntryKind};
use crate::units::Id;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Names that a message lists.
const LISTED: usize = 8;

fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len() > LISTED;
    let mut list: Vec<&str> = names.take(LISTED).collect();
    list.extend(more.then_some("..."));
    list.join(", ")
}

/// Why nothing goes: all that is attached of what was to go, and what that was.
fn all_busy(busy: Vec<(&Object, Error)>, going: &BTreeMap<String, Object>) -> Option<Error> {
    let disks: Vec<&str> = busy
        .iter()
        .filter(|(object, _)| object.kind == ObjectKind::Disk)
        .map(|(object, _)| object.name.as_str())
        .collect();
    // A snapshot or image is in use by what stands on it, if that is attached.
    if disks.is_empty() || going.len() == 1 {
        return busy.into_iter().next().map(|(_, e)| e);
    }
    let are = if disks.len() == 1 { "is" } else { "are" };
    let e = Error::new(
        Kind::Busy,
        format!("{} {are} attached", listed(disks.iter().copied())),
    );
    Some(e.hint(format!(
        "`forkdisk detach {}` first; {} names would go: {}",
        disks.join(" "),
        going.len(),
        listed(going.keys().map(String::as_str))
    )))
}

impl Store {
    /// What removing `refs` would take away. `InUse` if others need them and it is not `recursive`.
    pub fn plan_removal(&self, refs: &[String], recursive: bool) -> Result<RemovePlan> {
        let _lock = self.lock(false)?;
        // The usual: one of thousands, that nothing stands on.
        if let Some(plan) = self.leaves(refs)? {
            return Ok(plan);
        }
        let graph = self.graph()?;
        let objects = self.survey_locked()?.sound;
        let mut wanted: BTreeMap<String, Object> = BTreeMap::new();
        for reference in refs {
            let object = match self.resolve_locked(reference) {
                // What is damaged can be removed, if it is called by its name.
                Err(e) if e.kind() == Kind::Corrupt => self.remains(reference, e)?,
                other => other?,
            };
            wanted.insert(object.name.clone(), object);
        }
        let mut going = wanted;
        // Until nothing stands on anything that goes: what goes may itself be needed.
        loop {
            let users = self.users_of(&going, &objects, &graph, recursive);
            let Some((needed, first)) = users.first_key_value() else {
                break;
            };
            if !recursive {
                let users = listed(first.iter().map(|o| o.name.as_str()));
                return Err(
                    Error::new(Kind::Busy, format!("{needed} is in use by {users}")).hint(format!(
                        "{}`forkdisk rm -r {needed} -n` shows all that would go",
                        // Of a disk its snapshots are in the way.
                        match first.iter().any(|o| o.kind == ObjectKind::Disk) {
                            true => "`forkdisk flatten DISK` makes a disk independent; ",
                            false => "",
                        }
                    )),
                );
            }
            let more: Vec<Object> = users.into_values().flatten().cloned().collect();
            going.extend(more.into_iter().map(|o| (o.name.clone(), o)));
        }
        let kept: HashSet<Below> = objects
            .iter()
            .filter(|o| !going.contains_key(&o.name))
            .map(object_target)
            .collect();
        let garbage: HashSet<Below> = graph
            .garbage(|name| !going.contains_key(name))
            .into_iter()
            .collect();
        let mut left = HashSet::new();
        let mut busy: Vec<(&Object, Error)> = Vec::new();
        for object in going.values() {
            let target = object_target(object);
            // What keeps another name may stay open by it, and so may what others stand on.
            let stays = object.kind == ObjectKind::Snapshot && !garbage.contains(&target);
            if kept.contains(&target) {
                continue;
            }
            match stays {
                true => drop(left.insert(target)),
                false => match self.check_idle(object) {
                    Err(e) if e.kind() == Kind::Busy => busy.push((object, e)),
                    other => other?,
                },
            }
        }
        if let Some(e) = all_busy(busy, &going) {
            return Err(e);
        }
        let mut list: Vec<Object> = going.into_values().collect();
        list.sort_by_key(|o| {
            (
                std::cmp::Reverse(graph.rank(object_target(o))),
                o.name.clone(),
            )
        });
        let mut plan = RemovePlan {
            names: list,
            frees: garbage.iter().map(|b| graph.nodes[b].allocated).sum(),
        };
        let mut earlier = self.earlier_of(&plan);
        earlier.retain(|id| !garbage.contains(&Below::Layer(*id)));
        plan.frees += self.would_reclaim(graph, &garbage, &left, earlier)?;
        Ok(plan)
    }
    /// What is known of an object that cannot be read: enough to remove its name. `why` if there is no such file.
    fn remains(&self, name: &str, why: Error) -> Result<Object> {
        let record = match names::read_name(&*self.names, name) {
            Ok(record) => Some(record),
            Err(e) if e.kind() == Kind::Corrupt => None,
            Err(_) => return Err(why),
        };
        if self.names.entry(name)? != Some(EntryKind::File) {
            return Err(why);
        }
        Ok(Object {
            name: name.to_string(),
            kind: record.as_ref().map_or(ObjectKind::Disk, |r| r.kind),
            id: record.as_ref().map_or(Id([0; 16]), |r| r.target.id()),
            size: 0,
            parent: None,
            created: record.map_or(0, |r| r.created),
            message: None,
        })
    }
    /// What needs something that is going: by its name, those that stand on it; and a disk's snapshots, which go with it.
    fn users_of<'o>(
        &self,
        going: &BTreeMap<String, Object>,
        objects: &'o [Object],
        graph: &Graph,
        recursive: bool,
    ) -> BTreeMap<String, Vec<&'o Object>> {
        // What another name keeps alive is not going, whatever becomes of the name; what stands on it is not concerned.
        let kept: HashSet<Below> = objects
            .iter()
            .filter(|o| !going.contains_key(&o.name))
            .map(object_target)
            .collect();
        // A snapshot's name can go alone: what others stand on stays, without a name.
        let dying: HashMap<Below, &str> = going
            .values()
            .filter(|o| recursive || o.kind != ObjectKind::Snapshot)
            .map(|o| (object_target(o), o.name.as_str()))
            .filter(|(target, _)| !kept.contains(target))
            .collect();
        let standing = graph.standing_on(&dying);
        let mut users: BTreeMap<String, Vec<&Object>> = BTreeMap::new();
        for object in objects.iter().filter(|o| !going.contains_key(&o.name)) {
            let disk = object.name.split_once('@').map(|(disk, _)| disk);
            let of = disk.filter(|d| going.contains_key(*d));
            if let Some(needed) = of.or_else(|| standing.get(&object_target(object)).copied()) {
                users.entry(needed.to_string()).or_default().push(object);
            }
        }
        users
    }
    /// Fails if an object is attached.
    fn check_idle(&self, object: &Object) -> Result<()> {
        let busy = |e: Error| {
            match (e.kind(), object.kind) {
            (Kind::Busy, ObjectKind::Disk) => {
                Error::new(Kind::Busy, format!("{} is attached", object.name))
                    .hint(format!("`forkdisk detach {}` first", object.name))
            }
            (Kind::Busy, _) => Error::new(
                Kind::Busy,
                format!(
                    "{} is in use, or something that stands on it",
                    object.name
                ),
            )
            .hint("`forkdisk ls attached` shows what is attached, and `forkdisk detach` ends it; what another command reads is free when that ends"),
            _ => e,
        }
        };
        match object.kind {
            ObjectKind::Base => self.base_idle(object.id).map_err(busy),
            _ => match self.layers.open(&layer_file(object.id), Access::Read) {
                Ok(file) => file.lock(true).map_err(busy),
                // Gone, or something that is no file: nobody has it open.
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt) => Ok(()),
                Err(e) => Err(e),
            },
        }
    }
    /// Removes what a plan lists, then everything that nothing needs any more.
    pub fn remove(&self, plan: &RemovePlan) -> Result<()> {
        let _lock = self.lock(true)?;
        // Someone may have written into what goes, or forked from it, since the plan was made.
        let names: Vec<String> = plan.names.iter().map(|o| o.name.clone()).collect();
        if let Some(now) = self.leaves(&names)?
            && now.names.iter().map(|o| (&o.name, o.id)).eq(by_name(plan))
        {
            return self.remove_leaves(&now);
        }
        let mut graph = self.graph()?;
        let gone: HashSet<&str> = plan.names.iter().map(|o| o.name.as_str()).collect();
        let mut garbage: HashSet<Below> = graph
            .garbage(|name| !gone.contains(name))
            .into_iter()
            .collect();
        for object in &plan.names {
            let target = object_target(object);
            let names = graph.names.get(&target);
            let kept = names.is_some_and(|names| names.iter().any(|n| !gone.contains(n.as_str())));
            let stays = object.kind == ObjectKind::Snapshot && !garbage.contains(&target);
            if !kept && !stays {
                self.check_idle(object)?;
            }
            // What it is must not have changed since the plan was made.
            match names::read_name(&*self.names, &object.name) {
                Ok(record) if record.target == object_target(object) => {}
                Err(e) if e.kind() == Kind::NotFound => continue,
                Err(e) if e.kind() == Kind::Corrupt => {}
                Err(e) => return Err(e),
                Ok(_) => {
                    return Err(Error::new(
                        Kind::Busy,
                        format!("{} was changed meanwhile", object.name),
                    )
                    .hint("look at it again, then repeat the command"));
                }
            }
        }
        // Someone may have forked from it since the plan was made.
        let stays = |below: &Below| {
            let names = graph.names.get(below)?;
            names.iter().find(|n| !gone.contains(n.as_str()))
        };
        let dying: HashMap<Below, &str> = plan
            .names
            .iter()
            .filter(|o| o.kind != ObjectKind::Snapshot)
            .map(|o| (object_target(o), o.name.as_str()))
            .filter(|(target, _)| stays(target).is_none())
            .collect();
        for (below, needed) in graph.standing_on(&dying) {
            if let Some(name) = stays(&below) {
                return Err(
                    Error::new(Kind::Busy, format!("{needed} is in use by {name}"))
                        .hint("look at it again, then repeat the command"),
                );
            }
        }
        let earlier = self.earlier_of(plan);
        for object in &plan.names {
            match self.names.remove(&object.name) {
                Err(e) if e.kind() == Kind::NotFound => {}
                other => other?,
            }
        }
        self.names.sync()?;
        // Nobody else changes the store meanwhile, so what is left is known; unless what could not be read was among what went.
        if graph.unreadable {
            graph = self.graph()?;
            garbage = graph.garbage(|_| true).into_iter().collect();
        } else {
            graph.forget(&gone);
        }
        let removed = self.collect(&graph, false)?.layers;
        self.forget_earlier(&earlier);
        // What somebody is still making is as good as there.
        garbage.retain(|below| removed.contains(&below.id()));
        graph.without(&garbage);
        let left = plan.names.iter().map(object_target).collect();
        self.forget_earlier(&self.ended(&graph, &garbage, &left)?);
        self.left_behind(&graph, plan)
    }
    /// The layers with parts of the histories of the disks of a plan.
    pub(super) fn earlier_of(&self, plan: &RemovePlan) -> Vec<Id> {
        let disks = plan.names.iter().filter(|o| o.kind == ObjectKind::Disk);
        let records = disks.filter_map(|o| names::read_name(&*self.names, &o.name).ok());
        records
            .flat_map(|record| self.all_earlier(&record))
            .collect()
    }
    /// Removes what nothing names or needs, and leftovers of interrupted operations.
    pub fn gc(&self, dry_run: bool) -> Result<GcReport> {
        let _lock = self.lock(true)?;
        if !dry_run {
            // Whoever removed a name may have died before the directory was synced: then the name would be there again, and what it
            // refers to would be gone.
            self.names.sync()?;
        }
        let mut graph = self.graph()?;
        let mut report = self.collect(&graph, dry_run)?;
        let mut garbage: HashSet<Below> = graph.garbage(|_| true).into_iter().collect();
        garbage.retain(|below| report.layers.contains(&below.id()));
        graph.without(&garbage);
        // Before whatever else gives back space of a layer, and counts less of it.
        let (of_seals, sealed) = self.collect_idle(&graph, dry_run)?;
        // What is left of a history keeps a layer as it is.
        let stays = |id: Id| !report.layers.contains(&id);
        let (bytes, of_histories) = self.collect_histories(&graph, stays, dry_run)?;
        graph.ended = of_histories.iter().copied().collect();
        (report.reclaimed, report.shrunk) = self.reclaim_all(&graph, dry_run)?;
        report.reclaimed += bytes + of_seals;
        report.shrunk.extend(of_histories);
        report.shrunk.extend(sealed);
        report.shrunk.sort();
        report.shrunk.dedup();
        report.bytes += report.reclaimed;
        Ok(report)
    }
    fn collect(&self, graph: &Graph, dry_run: bool) -> Result<GcReport> {
        let mut report = GcReport::default();
        let mut garbage = graph.garbage(|_| true);
        // Children before parents: after a crash in between nothing refers to what is gone.
        garbage.sort_by_key(|b| std::cmp::Reverse(graph.rank(*b)));
        report.inhabited = garbage
            .iter()
            .filter(|b| matches!(b, Below::Base(id) if !self.never_named(*id)))
            .filter(|b| graph.children.contains_key(b))
            .map(|b| b.id())
            .collect();
        if !dry_run && !garbage.is_empty() {
            // Whoever replaced a layer's file may have died before the directory was synced: then the old one would be there again, and what
            // it stands on would be gone.
            self.layers.sync()?;
        }
        for below in garbage {
            let removed = match below {
                _ if dry_run => true,
                Below::Layer(id) => self.remove_layer(id)?,
                Below::Base(id) => self.remove_idle_base(id)?,
            };
            if removed {
                report.layers.push(below.id());
                report.bytes += graph.nodes[&below].allocated;
            }
        }
        for (dir, what) in [
            (&self.names, "names"),
            (&self.root, ""),
            (&self.layers, "layers"),
            (&self.bases, "bases"),
        ] {
            for (name, kind) in dir.list()? {
                if !name.starts_with(TEMPORARY) {
                    continue;
                }
                match kind {
                    EntryKind::Dir if self.import_running(&name) => continue,
                    EntryKind::Dir if what == "layers" => continue,
                    _ if what == "layers"
                        && (self.rewrite_running(&name) || self.layer_import_running(&name)) =>
                    {
                        continue;
                    }
                    _ => {}
                }
                let bytes = match kind {
                    EntryKind::Dir => allocated_in(&*dir.subdir(&name)?)?,
                    EntryKind::File => dir.open(&name, Access::Read)?.allocated()?,
                    EntryKind::Other => 0,
                };
                match kind {
                    _ if dry_run => {}
                    EntryKind::Dir => self.remove_base(&name)?,
                    _ => dir.remove(&name)?,
                }
                report.bytes += bytes;
                report.files.push(if what.is_empty() {
                    name
                } else {
                    format!("{what}/{name}")
                });
            }
        }
        Ok(report)
    }
    /// Removes a base unless someone has it open (a disk that reads through a file which was replaced).
    pub(super) fn remove_idle_base(&self, id: Id) -> Result<bool> {
        match self.base_idle(id) {
            Err(e) if e.kind() == Kind::Busy => Ok(false),
            _ => self.remove_base(&id.to_string()).map(|()| true),
        }
    }
    /// Removes a layer file unless someone has it open (an attachment that is just ending).
    pub(super) fn remove_layer(&self, id: Id) -> Result<bool> {
        let name = layer_file(id);
        if let Ok(file) = self.layers.open(&name, Access::Read)
            && file.lock(true).is_err_and(|e| e.kind() == Kind::Busy)
        {
            return Ok(false);
        }
        self.layers.remove(&name)?;
        Ok(true)
    }
    /// Removes a directory of `bases/` with what is in it.
    fn remove_base(&self, name: &str) -> Result<()> {
        let dir = self.bases.subdir(name)?;
        // First what others go by: without it the directory is plainly garbage.
        for file in ["meta", COPIED, "sums", "image"] {
            match dir.remove(file) {
                Err(e) if e.kind() == Kind::NotFound => {}
                other => other?,
            }
        }
        for (other, kind) in dir.list()? {
            if kind != EntryKind::Dir {
                dir.remove(&other)?;
            }
        }
        self.bases.remove_dir(name)
    }
}

/// The names and ids of a plan in the order of names.
fn by_name(plan: &RemovePlan) -> impl Iterator<Item = (&String, Id)> {
    let mut all: Vec<_> = plan.names.iter().map(|o| (&o.name, o.id)).collect();
    all.sort();
    all.into_iter()
}
