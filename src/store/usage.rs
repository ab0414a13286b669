//! What objects cost and what they share.

use super::graph::Graph;
use super::objects::object_target;
use super::refer::Refer;
use super::{
    BaseInfo, Below, Damage, Details, Found, Object, ObjectKind, Space, Store, Usage, layer_file,
    parent_of,
};
use crate::error::{Error, Kind, Result};
use crate::format::MAX_DEPTH;
use crate::io::Access;
use crate::layer::read_header;
use crate::units::{BLOCK, Id};
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;

/// A layer or base and all it stands on.
#[derive(Clone, Copy)]
struct Stack {
    /// Host bytes; those of a linked base, too.
    bytes: u64,
    depth: u32,
}

/// What several objects cost: each layer and base is looked at once.
struct Costs<'a> {
    store: &'a Store,
    graph: &'a Graph,
    refer: Refer,
    stacks: HashMap<Below, Stack>,
}

impl<'a> Costs<'a> {
    fn of(store: &'a Store, graph: &'a Graph, objects: &[Object]) -> Costs<'a> {
        Costs {
            store,
            graph,
            refer: Refer::of(store, graph, objects.iter().map(object_target)),
            stacks: HashMap::new(),
        }
    }
    fn allocated(&self, below: Below) -> u64 {
        self.graph.nodes.get(&below).map_or(0, |n| n.allocated)
    }
    /// The graph knows who stands on whom; a file is read only for the error that says what is wrong with it.
    fn stack(&mut self, top: Below) -> Result<Stack> {
        let mut path = Vec::new();
        let mut at = top;
        let mut stack = loop {
            if let Some(known) = self.stacks.get(&at) {
                break *known;
            }
            match at {
                Below::Base(id) => {
                    // What the store holds of it, its checksums too, and the image that it links to.
                    let bytes = self.allocated(at) + self.store.linked(id)?;
                    let stack = Stack { bytes, depth: 0 };
                    self.stacks.insert(at, stack);
                    break stack;
                }
                Below::Layer(id) => {
                    path.push(at);
                    at = self.store.parent_in(self.graph, id, path.len())?;
                }
            }
        };
        for below in path.into_iter().rev() {
            stack.bytes += self.allocated(below);
            stack.depth += 1;
            self.stacks.insert(below, stack);
        }
        Ok(stack)
    }
    fn usage(&mut self, object: &Object) -> Result<Usage> {
        let own = object_target(object);
        let stack = self.stack(own)?;
        let mut usage = Usage {
            size: object.size,
            refer: self.refer.shown(own)? * BLOCK,
            private: self.refer.own(own)? * BLOCK,
            allocated: self.allocated(own),
            depth: stack.depth,
            ..Usage::default()
        };
        // What goes with this name alone: from its own layer down, as long as nothing else needs it.
        let mut next = Some(own);
        while let Some(below) = next {
            let names = self.graph.names.get(&below).map_or(0, Vec::len);
            let children = self.graph.children.get(&below).map_or(0, Vec::len);
            let alone = match below == own {
                true => names <= 1 && children == 0,
                false => names == 0 && children == 1,
            };
            if !alone {
                usage.shared = self.stack(below)?.bytes;
                break;
            }
            usage.exclusive += self.allocated(below);
            next = self.graph.nodes.get(&below).and_then(|n| n.parent);
        }
        Ok(usage)
    }
}

impl Store {
    /// What layer `id` stands on. `steps`: layers that were passed on the way down to it, itself included.
    fn parent_in(&self, graph: &Graph, id: Id, steps: usize) -> Result<Below> {
        if steps > MAX_DEPTH as usize + 1 {
            return Err(Error::new(Kind::Corrupt, "the chain of layers has no end").layer(id));
        }
        match graph.nodes.get(&Below::Layer(id)).and_then(|n| n.parent) {
            Some(parent) => Ok(parent),
            None => self.parent_in_file(id),
        }
    }
    /// What the chain of an object consists of: its own layer first, the base last.
    fn chain_of(&self, object: &Object, graph: &Graph) -> Result<Vec<Below>> {
        let mut chain = vec![object_target(object)];
        while let Some(Below::Layer(id)) = chain.last().copied() {
            chain.push(self.parent_in(graph, id, chain.len())?);
        }
        Ok(chain)
    }
    fn parent_in_file(&self, id: Id) -> Result<Below> {
        let open = self.layers.open(&layer_file(id), Access::Read);
        let file = open.map_err(|e| match e.kind() {
            Kind::NotFound => e
                .context(format!("layer {id} is gone"))
                .with_kind(Kind::Corrupt),
            _ => e,
        })?;
        Ok(parent_of(&read_header(&*file)?))
    }
    /// A base.
    pub fn base_info(&self, id: Id) -> Result<BaseInfo> {
        let meta = self.base_meta(id)?;
        let dir = self.bases.subdir(&id.to_string())?;
        let path = match &meta.link {
            Some(link) => link.path.clone(),
            None => dir.path().join("image"),
        };
        Ok(BaseInfo {
            id,
            len: meta.len,
            allocated: self.base_allocated(id)?,
            digest: meta.digest,
            sums: dir.entry("sums")?.is_some(),
            link: meta.link.map(|l| l.path),
            path,
        })
    }
    /// Host bytes of the image, outside of the store, that a base links to.
    fn linked(&self, id: Id) -> Result<u64> {
        let meta = self.base_meta(id)?;
        let Some(link) = &meta.link else {
            return Ok(0);
        };
        let len = meta.len.next_multiple_of(BLOCK);
        // Gone or changed: looking goes on all the same.
        Ok(std::fs::metadata(&link.path).map_or(len, |found| (found.blocks() * 512).min(len)))
    }
    /// What is needed of the graph to tell about one object. The names lock is held.
    fn graph_for(&self, object: &Object) -> Result<Graph> {
        match self.graph_around(object)? {
            Some(graph) => Ok(graph),
            None => self.graph(),
        }
    }
    /// Space of one object.
    pub fn usage(&self, object: &Object) -> Result<Usage> {
        let _lock = self.lock(false)?;
        let graph = self.graph_for(object)?;
        Costs::of(self, &graph, std::slice::from_ref(object)).usage(object)
    }
    /// Space of several objects, with one look at the store.
    pub fn usages(&self, objects: Vec<Object>) -> Result<Found<(Object, Usage)>> {
        Ok(self.space(objects)?.objects)
    }
    /// Since they were found one may have become another layer (a rollback), or have been removed. The names lock is held, and the graph is of now.
    fn as_they_are(&self, objects: Vec<Object>, graph: &Graph) -> Vec<Object> {
        let several = objects.len() > 1;
        let now = |object: Object| match graph.nodes.contains_key(&object_target(&object)) {
            true => Some(object),
            false => match self.object(&object.name) {
                Ok(now) => Some(now),
                Err(e) if several && e.kind() == Kind::NotFound => None,
                // Who looks at it says what is wrong.
                Err(_) => Some(object),
            },
        };
        objects.into_iter().filter_map(now).collect()
    }
    /// Space of several objects, each and together, with one look at the store.
    pub fn space(&self, objects: Vec<Object>) -> Result<Space> {
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
        let objects = self.as_they_are(objects, &graph);
        let mut costs = Costs::of(self, &graph, &objects);
        let mut space = Space::default();
        let mut seen: HashSet<Below> = HashSet::new();
        for object in objects {
            match costs.usage(&object) {
                Ok(usage) => {
                    let mut next = Some(object_target(&object));
                    while let Some(below) = next.filter(|b| seen.insert(*b)) {
                        space.stored += costs.allocated(below);
                        next = graph.nodes.get(&below).and_then(|n| n.parent);
                    }
                    space.objects.sound.push((object, usage));
                }
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                    let name = object.name;
                    space.objects.damaged.push(Damage { name, error });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(space)
    }
    /// All about one object.
    pub fn details(&self, object: &Object) -> Result<Details> {
        let _lock = self.lock(false)?;
        let graph = self.graph_for(object)?;
        let chain = self.chain_of(object, &graph)?;
        let Some(Below::Base(base)) = chain.last().copied() else {
            return Err(Error::new(Kind::Corrupt, "the chain of layers has no base"));
        };
        let own = chain[0];
        let (state, (data, zeros)) = match own {
            Below::Base(_) => ("base", (0, 0)),
            Below::Layer(id) => {
                let (state, counts, _) = self.layer_counts(id)?;
                (state.word(), counts)
            }
        };
        let called = |below: &Below| {
            let names = graph.names.get(below).cloned();
            (below.id(), names.unwrap_or_default())
        };
        Ok(Details {
            object: object.clone(),
            base: self.base_info(base)?,
            depth: chain.len() as u32 - 1,
            private_bytes: data * BLOCK,
            zero_blocks: zeros,
            allocated: graph.nodes.get(&own).map_or(0, |n| n.allocated),
            state: if object.kind == ObjectKind::Base {
                "base"
            } else {
                state
            },
            usage: Costs::of(self, &graph, std::slice::from_ref(object)).usage(object)?,
            names: chain.iter().map(called).collect(),
            chain,
        })
    }
}
