//! Making, naming and removing disks, snapshots and images.

use super::names::{self, NameRecord, TEMPORARY, check_message, check_part, split_snapshot, stage};
use super::{
    Below, Damage, Found, GcReport, LayerInfo, Object, ObjectKind, RemovePlan, Store, layer_file,
    parent_of, too_deep,
};
use crate::chain::Chain;
use crate::disk::CowDisk;
use crate::error::{Error, Kind, Result};
use crate::format::{Header, MAX_DEPTH, valid_size};
use crate::io::{Access, EntryKind, File};
use crate::layer::{self, Layer, ReadLayer, State, read_header, volatile};
use crate::units::{BLOCK, Id, MAX_DISK, Slot, round_up};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

impl Store {
    /// Makes disks from an image, snapshot or disk at rest: all of them or none. One round of syncs, however many.
    pub fn create(&self, disks: &[String], from: &str, size: Option<u64>) -> Result<Vec<Object>> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(from)?;
        self.check_new(disks)?;
        let size = disk_size(&source, size)?;
        let parent = match source.kind {
            ObjectKind::Base => Below::Base(source.id),
            ObjectKind::Image | ObjectKind::Snapshot => Below::Layer(source.id),
            ObjectKind::Disk => match self.unchanged(&source)? {
                // Nothing to seal: forks of an idle disk must not make its chain longer each time.
                Some(parent) => parent,
                // Its layer becomes the common parent; the disk goes on above it.
                None => Below::Layer(self.seal_at_rest(&source, None)?),
            },
        };
        self.create_on(disks, parent, size, from)
    }
    /// Makes disks from an attached disk that `running` is.
    pub fn create_from_running(
        &self,
        running: &CowDisk,
        from: &str,
        disks: &[String],
        size: Option<u64>,
    ) -> Result<Vec<Object>> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(from)?;
        self.check_new(disks)?;
        let size = disk_size(&source, size)?;
        // Nothing was written since it was made or sealed last: what it shows is its parent.
        if let (Some(parent), (0, 0)) = (source.parent, running.private_blocks()) {
            return self.create_on(disks, parent, size, from);
        }
        self.seal_running(&source, running, None)?;
        self.create_on(disks, Below::Layer(source.id), size, from)
    }
    /// What a disk at rest stands on, if its own layer has nothing.
    fn unchanged(&self, disk: &Object) -> Result<Option<Below>> {
        drop(self.open_exclusive(disk)?);
        let (_, counts, _) = self.layer_counts(disk.id)?;
        Ok(disk.parent.filter(|_| counts == (0, 0)))
    }
    fn check_new(&self, disks: &[String]) -> Result<()> {
        let mut seen = HashSet::new();
        for name in disks {
            check_part(name)?;
            if !seen.insert(name) || self.names.entry(name)?.is_some() {
                return Err(taken(name));
            }
        }
        Ok(())
    }
    fn create_on(
        &self,
        disks: &[String],
        parent: Below,
        size: u64,
        from: &str,
    ) -> Result<Vec<Object>> {
        let depth = self.depth_of(parent)? + 1;
        if depth > MAX_DEPTH {
            return Err(too_deep(from));
        }
        let created = (self.env.now)();
        let one = disks.len() == 1;
        let mut made: Vec<Object> = Vec::with_capacity(disks.len());
        let mut named = 0;
        let done = (|| {
            let mut unsynced = Vec::new();
            for name in disks {
                let (id, file) = self.new_layer(parent, depth, size, created, name)?;
                unsynced.push(file);
                made.push(Object {
                    name: name.clone(),
                    kind: ObjectKind::Disk,
                    id,
                    size,
                    parent: Some(parent),
                    created,
                    message: None,
                });
                let record = NameRecord {
                    kind: ObjectKind::Disk,
                    target: Below::Layer(id),
                    created,
                    message: None,
                    opened: false,
                };
                unsynced.push(stage(&*self.names, name, &record.encode(name))?.1);
                if !one {
                    // Thousands of files need not be open at once: all are synced together.
                    unsynced.clear();
                }
            }
            // Layers before names, whatever the number; and all is written before the first sync, so that most of what the
            // later ones would do is done by then.
            if one {
                // The host allocates space for both now, so that the first sync makes both allocations durable and the second finds little to do.
                for file in &unsynced {
                    file.start_writeback(0, BLOCK);
                }
                unsynced.iter().try_for_each(|file| file.sync())?;
                self.layers.sync()?;
            } else {
                self.root.sync_filesystem()?;
            }
            for name in disks {
                self.names
                    .rename_new(&format!("{TEMPORARY}{name}"), name)
                    .map_err(|e| match e.kind() {
                        Kind::Exists => taken(name),
                        _ => e,
                    })?;
                named += 1;
            }
            self.names.sync()
        })();
        if let Err(e) = done {
            // Nothing half-made stays: what was named is unnamed again, then the files go.
            for (i, name) in disks.iter().enumerate() {
                let _ = self.names.remove(&if i < named {
                    name.clone()
                } else {
                    format!("{TEMPORARY}{name}")
                });
            }
            // A name must never refer to a layer that is gone: where it is not certain that the names are, the layers are left to `gc`.
            if named == 0 || self.names.sync().is_ok() {
                for object in &made {
                    let _ = self.layers.remove(&layer_file(object.id));
                }
            }
            return Err(e.or_hint("nothing was created"));
        }
        Ok(made)
    }
    /// Writes the header of a new layer, not durable yet.
    fn new_layer(
        &self,
        parent: Below,
        depth: u32,
        size: u64,
        created: u64,
        name: &str,
    ) -> Result<(Id, Arc<dyn File>)> {
        let id = (self.env.id)();
        let header = Header::new(
            id,
            parent.id(),
            matches!(parent, Below::Layer(_)),
            depth,
            size,
            created,
            name,
        );
        let file = self.layers.open(&layer_file(id), Access::CreateNew)?;
        if let Err(e) = layer::create(&*file, &header) {
            let _ = self.layers.remove(&layer_file(id));
            return Err(e);
        }
        Ok((id, file))
    }
    fn depth_of(&self, below: Below) -> Result<u32> {
        match below {
            Below::Base(id) => self.base_meta(id).map(|_| 0),
            Below::Layer(id) => Ok(self.layer_head(id)?.0.depth.get()),
        }
    }

    // ---- snapshots -------------------------------------------------------------------------------------------

    /// Snapshots a disk at rest.
    pub fn snapshot(&self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.snapshot_source(disk, name, message)?;
        self.seal_at_rest(&source, Some((name, message)))?;
        self.object(&format!("{disk}@{name}"))
    }
    /// Snapshots an attached disk that `running` is: requests wait while its layer is sealed and a new one is put on top.
    pub fn snapshot_running(
        &self,
        running: &CowDisk,
        disk: &str,
        name: &str,
        message: Option<&str>,
    ) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.snapshot_source(disk, name, message)?;
        self.seal_running(&source, running, Some((name, message)))?;
        self.object(&format!("{disk}@{name}"))
    }
    fn snapshot_source(&self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        check_part(disk)?;
        check_part(name)?;
        check_message(message)?;
        let source = self.resolve_locked(disk)?;
        if source.kind != ObjectKind::Disk || source.name != disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{disk}` is a {}, not a disk", source.kind.word()),
            )
            .hint("only disks change, so only disks have snapshots"));
        }
        let full = format!("{disk}@{name}");
        if self.names.entry(&full)?.is_some() {
            return Err(taken(&full));
        }
        Ok(source)
    }
    /// What a seal needs beside the layer itself, durable: the layer that will be above it, and the names as they will be.
    fn prepare(&self, source: &Object, snapshot: Option<(&str, Option<&str>)>) -> Result<Prepared> {
        let (header, size, _) = self.layer_head(source.id)?;
        let depth = header.depth.get() + 1;
        if depth > MAX_DEPTH {
            return Err(too_deep(&source.name));
        }
        let now = (self.env.now)();
        let parent = Below::Layer(source.id);
        let (next, file) = self.new_layer(parent, depth, size, now, &source.name)?;
        let mut unsynced = vec![file];
        let mut staged = Vec::new();
        let written = (|| {
            // Its superblock is written when the layer below is sealed already: then it is too late for a full host disk to refuse.
            reserve_superblock(&*unsynced[0])?;
            let mut put = |name: String, kind, target, created, message: Option<String>| {
                let record = NameRecord {
                    kind,
                    target,
                    created,
                    message,
                    opened: false,
                };
                let (temporary, file) = stage(&*self.names, &name, &record.encode(&name))?;
                unsynced.push(file);
                staged.push((temporary, name));
                Ok::<_, Error>(())
            };
            if let Some((name, message)) = snapshot {
                let full = format!("{}@{name}", source.name);
                put(
                    full,
                    ObjectKind::Snapshot,
                    parent,
                    now,
                    message.map(String::from),
                )?;
            }
            let above = Below::Layer(next);
            put(
                source.name.clone(),
                ObjectKind::Disk,
                above,
                source.created,
                source.message.clone(),
            )?;
            // All is written before the first sync: most of what the later ones would do is done by then.
            unsynced.iter().try_for_each(|file| file.sync())?;
            self.layers.sync()
        })();
        let label = snapshot.map(|(name, _)| format!("{}@{name}", source.name));
        let prepared = Prepared {
            next,
            staged,
            label,
        };
        match written {
            Ok(()) => Ok(prepared),
            Err(e) => {
                self.abandon(&prepared);
                Err(e)
            }
        }
    }
    /// Takes back what was prepared for a seal that did not come about.
    fn abandon(&self, prepared: &Prepared) {
        for (temporary, _) in &prepared.staged {
            let _ = self.names.remove(temporary);
        }
        let _ = self.layers.remove(&layer_file(prepared.next));
    }
    fn install(&self, prepared: &Prepared) -> Result<()> {
        for (temporary, name) in &prepared.staged {
            self.names.rename(temporary, name)?;
        }
        self.names.sync()
    }
    /// Seals the layer of a disk at rest and puts a new one on top. Returns the sealed layer.
    fn seal_at_rest(&self, source: &Object, snapshot: Option<(&str, Option<&str>)>) -> Result<Id> {
        // An interrupted snapshot may have left it sealed: then it is completed first, and sealed anew.
        let (layer, _) = self.open_top(source, volatile::private()?)?;
        let source = self.object(&source.name)?;
        let prepared = self.prepare(&source, snapshot)?;
        if let Err(e) = layer.close(State::Sealed, prepared.label.as_deref()) {
            self.abandon(&prepared);
            return Err(e);
        }
        self.install(&prepared)?;
        Ok(source.id)
    }
    fn seal_running(
        &self,
        source: &Object,
        running: &CowDisk,
        snapshot: Option<(&str, Option<&str>)>,
    ) -> Result<()> {
        let prepared = self.prepare(source, snapshot)?;
        let mut sealed_at = false;
        let done = running.seal(prepared.label.as_deref(), |sealed, memory| {
            sealed_at = true;
            self.install(&prepared)?;
            // From the writer's lock to a reader's, on the same open file.
            sealed.lock(false)?;
            let sealed = Arc::new(ReadLayer::open(sealed)?);
            self.open_layers
                .lock()
                .insert(sealed.id(), Arc::downgrade(&sealed));
            let file = self
                .layers
                .open(&layer_file(prepared.next), Access::Write)?;
            file.lock(true)?;
            let layer = Layer::open_on(file, memory)?;
            let chain: Arc<Chain> = self.chain(Below::Layer(sealed.id()))?;
            Ok((layer, chain))
        });
        match &done {
            Ok(()) => self.note_opened(&source.name),
            Err(_) if !sealed_at => self.abandon(&prepared),
            Err(_) => {}
        }
        done
    }
    /// Completes an interrupted snapshot: a new layer over the sealed one that the disk's name refers to.
    pub(super) fn put_layer_on_top(&self, source: &Object) -> Result<NameRecord> {
        self.install(&self.prepare(source, None)?)?;
        names::read_name(&*self.names, &source.name)
    }

    // ---- renaming and removing ------------------------------------------------------------------------------------

    /// Renames an image, a disk at rest (and its snapshots), or a snapshot (within its disk).
    pub fn rename(&self, old: &str, new: &str) -> Result<Object> {
        let _lock = self.lock(true)?;
        let object = self.resolve_locked(old)?;
        let old = object.name.clone();
        if object.kind == ObjectKind::Snapshot {
            let (disk, _) = split_snapshot(&old)?;
            let (new_disk, _) = split_snapshot(new)?;
            if disk != new_disk {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("`{old}` cannot become a snapshot of `{new_disk}`"),
                )
                .hint(
                    "a snapshot is renamed within its disk; `forkdisk fork` makes a disk from it",
                ));
            }
        } else {
            check_part(new)?;
        }
        if self.names.entry(new)?.is_some() {
            return Err(taken(new));
        }
        if object.kind == ObjectKind::Disk {
            drop(self.open_exclusive(&object)?);
            let prefix = format!("{old}@");
            let mut renamed = false;
            for name in self.all_names()? {
                if let Some(snap) = name.strip_prefix(&prefix) {
                    names::rename(&*self.names, &name, &format!("{new}@{snap}"))?;
                    renamed = true;
                }
            }
            if renamed {
                self.names.sync()?;
            }
        }
        // The object itself last: an interrupted rename is completed by the same command.
        names::rename(&*self.names, &old, new).map_err(|e| {
            if e.kind() == Kind::Exists {
                taken(new)
            } else {
                e
            }
        })?;
        self.names.sync()?;
        self.object(new)
    }
    /// What removing `refs` would take away. `InUse` if others need them and it is not `recursive`.
    pub fn plan_removal(&self, refs: &[String], recursive: bool) -> Result<RemovePlan> {
        let _lock = self.lock(false)?;
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
            let users = self.users_of(&going, &objects, &graph);
            let Some((needed, first)) = users.first_key_value() else {
                break;
            };
            if !recursive {
                let mut list: Vec<&str> = first.iter().take(8).map(|o| o.name.as_str()).collect();
                if first.len() > list.len() {
                    list.push("...");
                }
                return Err(Error::new(
                    Kind::Busy,
                    format!("{needed} is in use by {}", list.join(", ")),
                )
                .hint(format!(
                    "`forkdisk rm -r {needed} -n` shows all that would go"
                )));
            }
            let more: Vec<Object> = users.into_values().flatten().cloned().collect();
            going.extend(more.into_iter().map(|o| (o.name.clone(), o)));
        }
        let kept: HashSet<Below> = objects
            .iter()
            .filter(|o| !going.contains_key(&o.name))
            .map(object_target)
            .collect();
        for object in going.values() {
            // What keeps another name may stay open by it.
            if !kept.contains(&object_target(object)) {
                self.check_idle(object)?;
            }
        }
        let mut list: Vec<Object> = going.into_values().collect();
        list.sort_by_key(|o| {
            (
                std::cmp::Reverse(graph.depth(object_target(o))),
                o.name.clone(),
            )
        });
        let gone: HashSet<&str> = list.iter().map(|o| o.name.as_str()).collect();
        let frees = graph
            .garbage(|name| !gone.contains(name))
            .iter()
            .map(|b| graph.nodes[b].allocated)
            .sum();
        Ok(RemovePlan { names: list, frees })
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
    ) -> BTreeMap<String, Vec<&'o Object>> {
        // What another name keeps alive is not going, whatever becomes of the name; what stands on it is not concerned.
        let kept: HashSet<Below> = objects
            .iter()
            .filter(|o| !going.contains_key(&o.name))
            .map(object_target)
            .collect();
        let dying: HashMap<Below, &str> = going
            .values()
            .map(|o| (object_target(o), o.name.as_str()))
            .filter(|(target, _)| !kept.contains(target))
            .collect();
        let mut users: BTreeMap<String, Vec<&Object>> = BTreeMap::new();
        for object in objects.iter().filter(|o| !going.contains_key(&o.name)) {
            let disk = object.name.split_once('@').map(|(disk, _)| disk);
            let of = disk.filter(|d| going.contains_key(*d));
            if let Some(needed) = of.or_else(|| graph.first_below(object_target(object), &dying)) {
                users.entry(needed.to_string()).or_default().push(object);
            }
        }
        users
    }
    /// Fails if an object is attached.
    fn check_idle(&self, object: &Object) -> Result<()> {
        let busy = |e: Error| {
            if e.kind() == Kind::Busy {
                Error::new(Kind::Busy, format!("{} is attached", object.name))
                    .hint(format!("`forkdisk detach {}` first", object.name))
            } else {
                e
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
        let mut graph = self.graph()?;
        let gone: HashSet<&str> = plan.names.iter().map(|o| o.name.as_str()).collect();
        for object in &plan.names {
            let names = graph.names.get(&object_target(object));
            if !names.is_some_and(|names| names.iter().any(|n| !gone.contains(n.as_str()))) {
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
            .map(|o| (object_target(o), o.name.as_str()))
            .filter(|(target, _)| stays(target).is_none())
            .collect();
        for below in graph.names.keys() {
            if let Some(name) = stays(below)
                && let Some(needed) = graph.first_below(*below, &dying)
            {
                return Err(
                    Error::new(Kind::Busy, format!("{needed} is in use by {name}"))
                        .hint("look at it again, then repeat the command"),
                );
            }
        }
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
        } else {
            graph.forget(&gone);
        }
        self.collect(&graph, false).map(|_| ())
    }
    /// Removes what nothing names or needs, and leftovers of interrupted operations.
    pub fn gc(&self, dry_run: bool) -> Result<GcReport> {
        let _lock = self.lock(true)?;
        if !dry_run {
            // Whoever removed a name may have died before the directory was synced: then the name would be there again, and what it
            // refers to would be gone.
            self.names.sync()?;
        }
        self.collect(&self.graph()?, dry_run)
    }
    fn collect(&self, graph: &Graph, dry_run: bool) -> Result<GcReport> {
        let mut report = GcReport::default();
        let mut garbage = graph.garbage(|_| true);
        // Children before parents: after a crash in between nothing refers to what is gone.
        garbage.sort_by_key(|b| std::cmp::Reverse(graph.depth(*b)));
        report.inhabited = garbage
            .iter()
            .filter(|b| matches!(b, Below::Base(_)) && graph.children.contains_key(b))
            .map(|b| b.id())
            .collect();
        for below in garbage {
            let removed = match below {
                _ if dry_run => true,
                Below::Layer(id) => self.remove_layer(id)?,
                Below::Base(id) => self.remove_base(&id.to_string()).map(|()| true)?,
            };
            if removed {
                report.layers.push(below.id());
                report.bytes += graph.nodes[&below].allocated;
            }
        }
        for (dir, what) in [
            (&self.names, "names"),
            (&self.root, ""),
            (&self.bases, "bases"),
        ] {
            for (name, kind) in dir.list()? {
                if !name.starts_with(TEMPORARY) {
                    continue;
                }
                match kind {
                    EntryKind::Dir if self.import_running(&name) => continue,
                    _ if dry_run => {}
                    EntryKind::Dir => self.remove_base(&name)?,
                    _ => dir.remove(&name)?,
                }
                report.files.push(if what.is_empty() {
                    name
                } else {
                    format!("{what}/{name}")
                });
            }
        }
        Ok(report)
    }
    /// Removes a layer file unless someone has it open (an attachment that is just ending).
    fn remove_layer(&self, id: Id) -> Result<bool> {
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
        // `meta` first: without it the directory is plainly garbage.
        for file in ["meta", "sums", "image"] {
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

    // ---- the graph -----------------------------------------------------------------------------------------------

    /// All bases and layers, what they stand on, and who names them. The names lock is held.
    pub(super) fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::default();
        for (file, kind) in self.layers.list()? {
            let Some(id) = file
                .strip_suffix(".layer")
                .and_then(Id::parse)
                .filter(|_| kind == EntryKind::File)
            else {
                continue;
            };
            let open = self.layers.open(&file, Access::Read)?;
            match read_header(&*open) {
                Ok(header) => {
                    let (parent, depth) = (Some(parent_of(&header)), header.depth.get());
                    graph.nodes.insert(
                        Below::Layer(id),
                        Node {
                            parent,
                            depth,
                            allocated: open.allocated()?,
                            damaged: false,
                        },
                    );
                }
                // An interrupted creation, or rot. It may stand on anything, which matters only if somebody needs it.
                Err(e) if e.kind() == Kind::Corrupt => {
                    graph.nodes.insert(
                        Below::Layer(id),
                        Node {
                            parent: None,
                            depth: MAX_DEPTH + 1,
                            allocated: open.allocated()?,
                            damaged: true,
                        },
                    );
                }
                // It may stand on anything: nothing is garbage then. `check` reports it.
                Err(_) => graph.unreadable = true,
            }
        }
        for (name, kind) in self.bases.list()? {
            if let Some(id) = Id::parse(&name).filter(|_| kind == EntryKind::Dir) {
                let allocated = self.base_allocated(id).unwrap_or(0);
                graph.nodes.insert(
                    Below::Base(id),
                    Node {
                        parent: None,
                        depth: 0,
                        allocated,
                        damaged: false,
                    },
                );
            }
        }
        // A link or a directory in the place of a name is unreadable, too.
        graph.unreadable |= self
            .names
            .list()?
            .iter()
            .any(|(name, kind)| *kind != EntryKind::File && !name.starts_with('.'));
        for name in self.all_names()? {
            match names::read_name(&*self.names, &name) {
                Ok(record) => graph.names.entry(record.target).or_default().push(name),
                // An unreadable name may refer to anything: nothing is garbage then.
                Err(_) => graph.unreadable = true,
            }
        }
        for (below, node) in &graph.nodes {
            if let Some(parent) = node.parent {
                graph.children.entry(parent).or_default().push(*below);
            }
        }
        Ok(graph)
    }
    /// All layer files with what is known of them.
    pub fn layers(&self) -> Result<Found<LayerInfo>> {
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
        let mut found = Found::default();
        for (below, node) in &graph.nodes {
            let Below::Layer(id) = *below else {
                continue;
            };
            let names = graph.names.get(below).cloned().unwrap_or_default();
            let counts = self.layer_counts(id).and_then(|counts| {
                let parent = node.parent.ok_or_else(|| {
                    Error::new(Kind::Corrupt, "its header cannot be read").layer(id)
                })?;
                Ok((parent, counts))
            });
            let (parent, (state, (data, zeros), size)) = match counts {
                Ok(counts) => counts,
                Err(error) if error.kind() == Kind::Corrupt => {
                    let name = match &names[..] {
                        [] => format!("layer {id}"),
                        names => names.join(", "),
                    };
                    found.damaged.push(Damage { name, error });
                    continue;
                }
                Err(e) => return Err(e),
            };
            found.sound.push(LayerInfo {
                id,
                parent,
                state: state.word(),
                size,
                allocated: node.allocated,
                private_bytes: data * crate::units::BLOCK,
                zero_blocks: zeros,
                depth: node.depth,
                names,
            });
        }
        found.sound.sort_by_key(|l| (l.depth, l.id));
        found.damaged.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
    /// State, counts and size of a layer file that others may be writing.
    pub(super) fn layer_counts(&self, id: Id) -> Result<(State, (u64, u64), u64)> {
        // A checkpoint of its writer may come in between; then what was read makes no sense, and is read again.
        let mut tries = 0;
        loop {
            let file = self.layers.open(&layer_file(id), Access::Read)?;
            match ReadLayer::open(file) {
                Ok(layer) => return Ok((layer.state(), layer.counts(), layer.size())),
                Err(e) if tries >= 20 => return Err(e),
                Err(_) => tries += 1,
            }
        }
    }
}

/// What a seal needs beside the layer itself.
struct Prepared {
    /// The layer that will be above.
    next: Id,
    /// Temporary files and the names they will have.
    staged: Vec<(String, String)>,
    /// What the sealed layer will call itself.
    label: Option<String>,
}

/// What the object's name refers to.
pub(super) fn object_target(object: &Object) -> Below {
    match object.kind {
        ObjectKind::Base => Below::Base(object.id),
        _ => Below::Layer(object.id),
    }
}

fn taken(name: &str) -> Error {
    Error::new(Kind::Exists, format!("`{name}` exists already"))
        .hint("choose another name, or `forkdisk rm` the old one")
}

/// Host space for both copies of the superblock of a layer that is its header alone.
fn reserve_superblock(file: &dyn File) -> Result<()> {
    let (at, len) = (Slot(1).at(), 2 * BLOCK);
    match file.allocate(at, len) {
        // Zeros are as good as nothing, and take space.
        Err(e) if e.kind() == Kind::Unsupported => file.write_at(&vec![0; len as usize], at),
        other => other,
    }
}

fn disk_size(source: &Object, size: Option<u64>) -> Result<u64> {
    let Some(size) = size else {
        return Ok(source.size);
    };
    let rounded = round_up(size)
        .filter(|&s| s <= MAX_DISK && valid_size(s))
        .ok_or_else(|| {
            Error::new(Kind::Invalid, format!("a disk cannot have {size} bytes"))
                .hint("from 4 KiB to 16 TiB")
        })?;
    if rounded < source.size {
        return Err(Error::new(
            Kind::Invalid,
            format!(
                "{size} bytes are less than `{}` has ({} bytes)",
                source.name, source.size
            ),
        )
        .hint("a disk is at least as large as what it is made from"));
    }
    Ok(rounded)
}

/// A base or layer in the graph.
pub(super) struct Node {
    pub parent: Option<Below>,
    pub depth: u32,
    pub allocated: u64,
    /// Its header cannot be read, so nobody knows what it stands on.
    pub damaged: bool,
}

/// Bases and layers, and who needs whom.
#[derive(Default)]
pub(super) struct Graph {
    pub nodes: HashMap<Below, Node>,
    pub children: HashMap<Below, Vec<Below>>,
    pub names: HashMap<Below, Vec<String>>,
    /// Something could not be read, so that nothing may be called garbage.
    pub unreadable: bool,
}

impl Graph {
    /// Walks down from `upper` to the first of `wanted` and returns what is said of it.
    pub fn first_below<'w>(
        &self,
        upper: Below,
        wanted: &HashMap<Below, &'w str>,
    ) -> Option<&'w str> {
        let mut at = Some(upper);
        for _ in 0..=MAX_DEPTH + 1 {
            let below = at?;
            if let Some(found) = wanted.get(&below) {
                return Some(found);
            }
            at = self.nodes.get(&below).and_then(|n| n.parent);
        }
        None
    }
    /// Names that are gone.
    fn forget(&mut self, gone: &HashSet<&str>) {
        for names in self.names.values_mut() {
            names.retain(|n| !gone.contains(n.as_str()));
        }
        self.names.retain(|_, names| !names.is_empty());
    }
    pub fn depth(&self, below: Below) -> u32 {
        self.nodes.get(&below).map_or(0, |n| n.depth)
    }
    /// What no name that `counts` reaches.
    pub fn garbage(&self, counts: impl Fn(&str) -> bool) -> Vec<Below> {
        if self.unreadable {
            return Vec::new();
        }
        let mut needed: HashSet<Below> = HashSet::new();
        for (below, names) in &self.names {
            if !names.iter().any(|n| counts(n)) {
                continue;
            }
            let mut at = Some(*below);
            while let Some(b) = at {
                if !needed.insert(b) {
                    break;
                }
                at = self.nodes.get(&b).and_then(|n| n.parent);
            }
        }
        // What is needed and damaged, missing, or something else than a file may stand on anything; a base stands on nothing.
        let unknown = |b: &Below| match self.nodes.get(b) {
            None => matches!(b, Below::Layer(_)),
            Some(node) => node.damaged,
        };
        if needed.iter().any(unknown) {
            return Vec::new();
        }
        self.nodes
            .keys()
            .filter(|b| !needed.contains(b))
            .copied()
            .collect()
    }
}
