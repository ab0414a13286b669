//! One disk among thousands: what goes with it, known without a look at all the others.
//!
//! Always true:
//! - nothing stands on a layer that is not sealed, and no name but that of its disk refers to it: a seal comes before both. So what goes with
//!   such a disk is its own layer, and what that stands on only if nothing else needs it;
//! - that something else needs it is believed only of a name that stays, whose record and headers, read under the lock of the names, lead
//!   there. Where such a name is to be looked for is a guess: without a good one the whole store is looked at ([`super::graph`]).

use super::graph::{Graph, Node};
use super::names::{self, read_name};
use super::objects::object_target;
use super::{Below, Object, ObjectKind, RemovePlan, Store, layer_file, many, parent_of};
use crate::error::{Kind, Result};
use crate::format::STATE_SEALED;
use crate::io::{Access, EntryKind};
use crate::layer::{read_header, recover};
use crate::units::Id;
use std::collections::{HashMap, HashSet};

/// Steps down from a name that is looked at: a fork of a disk stands directly on what the disk stands on.
const STEPS: usize = 4;

/// Names on either side in the order of names that are looked at: disks that were made together are called alike.
const NEIGHBOURS: usize = 8;

impl Store {
    /// What removing these disks takes away, where that is their own layers and nothing else; `None` where the whole store has to be
    /// looked at to know. The names lock is held.
    pub(super) fn leaves(&self, references: &[String]) -> Result<Option<RemovePlan>> {
        let mut plan = RemovePlan::default();
        let mut going = HashSet::new();
        let mut parents = HashSet::new();
        for reference in references {
            let object = match self.resolve_locked(reference) {
                Ok(object) if object.kind == ObjectKind::Disk => object,
                _ => return Ok(None),
            };
            let Some(parent) = object.parent else {
                return Ok(None);
            };
            let Some(allocated) = self.leaf(&object)? else {
                return Ok(None);
            };
            if going.insert(object.name.clone()) {
                parents.insert(parent);
                plan.frees += allocated;
                plan.names.push(object);
            }
        }
        // What keeps a history may be needed by nobody else from now on.
        for parent in &parents {
            if let Below::Layer(id) = parent
                && !matches!(self.keeps_a_past(*id), Ok(false))
            {
                return Ok(None);
            }
        }
        // A disk that stands on a base was never sealed, and so has no snapshots.
        let above_layers = parents.iter().any(|p| matches!(p, Below::Layer(_)));
        parents.retain(|parent| self.known_witness(*parent, &going).is_none());
        if above_layers || !parents.is_empty() {
            let Some(all) = self.plain_names()? else {
                return Ok(None);
            };
            let snapshots = |name: &String| {
                let disk = name.split_once('@').map(|(disk, _)| disk);
                disk.is_some_and(|disk| going.contains(disk))
            };
            if all.iter().any(snapshots) {
                return Ok(None);
            }
            let first = plan.names.first().map_or("", |o| o.name.as_str());
            for parent in parents {
                if self.near_witness(parent, first, &all, &going).is_none() {
                    return Ok(None);
                }
            }
        }
        // As they would be sorted by rank, and by name: these need not know their ranks, as none stands on another.
        plan.names.sort_by(|a, b| a.name.cmp(&b.name));
        if above_layers {
            plan.frees += self.earlier_bytes(&self.earlier_of(&plan));
        }
        Ok(Some(plan))
    }
    /// All names, not sorted; `None` if something stands among them that is no name.
    fn plain_names(&self) -> Result<Option<Vec<String>>> {
        let mut all = Vec::new();
        for (name, kind) in self.names.list()? {
            match kind {
                _ if name.starts_with('.') => {}
                EntryKind::File => all.push(name),
                _ => return Ok(None),
            }
        }
        Ok(Some(all))
    }
    /// What a layer stands on that is not sealed, so that nothing stands on it; `None` if it is, or nobody can tell. The names lock is held.
    pub(super) fn parent_of_leaf(&self, below: Below) -> Option<Below> {
        let Below::Layer(id) = below else {
            return None;
        };
        let file = self.layers.open(&layer_file(id), Access::Read).ok()?;
        let header = read_header(&*file).ok().filter(|h| h.layer == id.0)?;
        let found = recover::superblock(&*file, &header).ok()?;
        let sealed = found.superblock.state.get() == STATE_SEALED;
        (!sealed).then(|| parent_of(&header))
    }
    /// As much of the graph as tells all about one object: what it stands on, all names, and of what stands on these as much as shows whether
    /// it needs them alone. `None` where only the whole graph tells. The names lock is held.
    pub(super) fn graph_around(&self, object: &Object) -> Result<Option<Graph>> {
        let Some(all) = self.plain_names()? else {
            return Ok(None);
        };
        let mut graph = Graph::default();
        let records = many::each(&all, |name| read_name(&*self.names, name));
        for (name, record) in all.iter().zip(records) {
            match record {
                Ok(record) => {
                    let names = graph.names.entry(record.target).or_default();
                    names.push(name.clone());
                }
                Err(_) => return Ok(None),
            }
        }
        graph.names.values_mut().for_each(|names| names.sort());
        let own = object_target(object);
        let mut at = own;
        while let Below::Layer(id) = at {
            let node = match self.node(id) {
                Err(e) if e.kind() == Kind::NotFound => None,
                other => other?,
            };
            let Some((parent, node)) = node.and_then(|n| Some((n.parent?, n))) else {
                return Ok(None);
            };
            // A header may name anything, and so may a circle of them.
            if graph.nodes.insert(at, node).is_some() {
                return Ok(None);
            }
            graph.children.entry(parent).or_default().push(at);
            at = parent;
        }
        if let Below::Base(id) = at {
            let allocated = self.base_allocated(id).unwrap_or(0);
            graph.nodes.insert(at, Node::of_base(allocated));
        }
        // The topmost that something else needs: what lies below it is needed, too.
        let named = |below| graph.names.get(&below).map_or(0, Vec::len);
        let shared = match self.parent_of_leaf(own) {
            _ if named(own) > 1 => return Ok(Some(graph)),
            Some(parent) if named(parent) > 0 => return Ok(Some(graph)),
            Some(parent) => parent,
            None => own,
        };
        let not_itself = HashSet::from([object.name.clone()]);
        let known = self.known_witness(shared, &not_itself);
        let near = || self.near_witness(shared, &object.name, &all, &not_itself);
        let Some(other) = known.or_else(near) else {
            return Ok(None);
        };
        // It stands there, if not directly.
        let other = read_name(&*self.names, &other)?.target;
        graph.children.entry(shared).or_default().push(other);
        Ok(Some(graph))
    }
    /// The names of all bases and layers, by their ids, sorted.
    pub fn called(&self) -> Result<Vec<(Id, Vec<String>)>> {
        let _lock = self.lock(false)?;
        let all = self.all_names()?;
        let records = many::each(&all, |name| read_name(&*self.names, name));
        let mut called: HashMap<Id, Vec<String>> = HashMap::new();
        for (name, record) in all.into_iter().zip(records) {
            match record {
                Ok(record) => called.entry(record.target.id()).or_default().push(name),
                Err(e) if e.kind() == Kind::Corrupt => {}
                Err(e) => return Err(e),
            }
        }
        Ok(called.into_iter().collect())
    }
    /// Host bytes of a disk's layer that nothing stands on, and that has no other name; `None` if that is not certain.
    fn leaf(&self, disk: &Object) -> Result<Option<u64>> {
        if !names::is_alone(&*self.names, &disk.name)? {
            return Ok(None);
        }
        let file = match self.layers.open(&layer_file(disk.id), Access::Read) {
            Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt) => return Ok(None),
            other => other?,
        };
        // Whoever has it open may be about to seal it.
        match file.lock(true) {
            Err(e) if e.kind() == Kind::Busy => return Ok(None),
            other => other?,
        }
        let found = match read_header(&*file).and_then(|h| recover::superblock(&*file, &h)) {
            Err(e) if e.kind() == Kind::Corrupt => return Ok(None),
            other => other?,
        };
        match found.superblock.state.get() {
            STATE_SEALED => Ok(None),
            _ => file.allocated().map(Some),
        }
    }
    /// A name that is not `going` and needs `below`, among those that it had.
    fn known_witness(&self, below: Below, going: &HashSet<String>) -> Option<String> {
        let needs = |name: &String| !going.contains(name) && self.leads_to(name, below);
        self.names_it_had(below).into_iter().find(needs)
    }
    /// A name that is not `going` and needs `below`, among the neighbours of the name `near` in the order of `all`.
    fn near_witness(
        &self,
        below: Below,
        near: &str,
        all: &[String],
        going: &HashSet<String>,
    ) -> Option<String> {
        let mut others: Vec<&String> = all.iter().filter(|n| !going.contains(*n)).collect();
        others.sort();
        let at = others.partition_point(|name| name.as_str() < near);
        let around = at.saturating_sub(NEIGHBOURS)..others.len().min(at + NEIGHBOURS);
        let mut around = others[around].iter();
        around
            .find(|n| self.leads_to(n, below))
            .map(|n| n.to_string())
    }
    /// What a base or layer was called: when it was made, and when it was sealed. It may be called otherwise by now.
    fn names_it_had(&self, below: Below) -> Vec<String> {
        let had = match below {
            Below::Base(id) => self.base_meta(id).map(|meta| vec![meta.name]),
            Below::Layer(id) => self
                .layers
                .open(&layer_file(id), Access::Read)
                .and_then(|file| {
                    let header = read_header(&*file)?;
                    let found = recover::superblock(&*file, &header)?;
                    let had = found.superblock.name().into_iter().chain([header.name()]);
                    Ok(had.map(String::from).collect())
                }),
        };
        // What is no name could be no file, or lie elsewhere.
        let is_name = |name: &String| match name.contains('@') {
            true => names::split_snapshot(name).is_ok(),
            false => names::check_part(name).is_ok(),
        };
        had.unwrap_or_default()
            .into_iter()
            .filter(is_name)
            .collect()
    }
    /// Does what this name refers to stand on `below`, or is it that?
    fn leads_to(&self, name: &str, below: Below) -> bool {
        let Ok(record) = read_name(&*self.names, name) else {
            return false;
        };
        let mut at = record.target;
        for _ in 0..STEPS {
            match at {
                _ if at == below => return true,
                Below::Base(_) => return false,
                Below::Layer(id) => match self.parent_said_by(id) {
                    Some(parent) => at = parent,
                    None => return false,
                },
            }
        }
        false
    }
    fn parent_said_by(&self, id: Id) -> Option<Below> {
        let file = self.layers.open(&layer_file(id), Access::Read).ok()?;
        let header = read_header(&*file).ok()?;
        (header.layer == id.0).then(|| parent_of(&header))
    }
    /// Removes disks of which only their own layers go. The names lock is held.
    pub(super) fn remove_leaves(&self, plan: &RemovePlan) -> Result<()> {
        let earlier = self.earlier_of(plan);
        for disk in &plan.names {
            match self.names.remove(&disk.name) {
                Err(e) if e.kind() == Kind::NotFound => {}
                other => other?,
            }
        }
        self.names.sync()?;
        for disk in &plan.names {
            self.remove_layer(disk.id)?;
        }
        self.forget_earlier(&earlier);
        Ok(())
    }
}
