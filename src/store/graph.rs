//! Who stands on whom: all bases and layers, and the names that refer to them.

use super::{Below, Damage, Found, LayerInfo, Store, layer_file, parent_of};
use super::{many, names};
use crate::error::{Error, Kind, Result};
use crate::format::{Header, MAX_DEPTH, MAX_RANK};
use crate::io::{Access, EntryKind};
use crate::layer::{ReadLayer, State, read_header};
use crate::units::{BLOCK, Id};
use std::collections::{HashMap, HashSet};

impl Store {
    /// All bases and layers, what they stand on, and who names them. The names lock is held.
    pub(super) fn graph(&self) -> Result<Graph> {
        let mut graph = Graph::default();
        let mut files = Vec::new();
        for (file, kind) in self.layers.list()? {
            let id = file.strip_suffix(".layer").and_then(Id::parse);
            files.extend(id.filter(|_| kind == EntryKind::File));
        }
        let nodes = many::each(&files, |id| self.node(*id));
        for (id, node) in files.into_iter().zip(nodes) {
            match node? {
                Some(node) => drop(graph.nodes.insert(Below::Layer(id), node)),
                // It may stand on anything: nothing is garbage then. `check` reports it.
                None => graph.unreadable = true,
            }
        }
        for (name, kind) in self.bases.list()? {
            if let Some(id) = Id::parse(&name).filter(|_| kind == EntryKind::Dir) {
                let allocated = self.base_allocated(id).unwrap_or(0);
                let node = Node::of_base(allocated);
                graph.nodes.insert(Below::Base(id), node);
            }
        }
        // A link or a directory in the place of a name is unreadable, too.
        graph.unreadable |= self
            .names
            .list()?
            .iter()
            .any(|(name, kind)| *kind != EntryKind::File && !name.starts_with('.'));
        let all = self.all_names()?;
        let records = many::each(&all, |name| names::read_name(&*self.names, name));
        for (name, record) in all.into_iter().zip(records) {
            match record {
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
    /// A layer of the graph; `None` if nobody knows what it stands on, and it may be needed.
    pub(super) fn node(&self, id: Id) -> Result<Option<Node>> {
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        let node = |header: Option<Header>| -> Result<Node> {
            Ok(Node {
                parent: header.as_ref().map(parent_of),
                rank: header.as_ref().map_or(MAX_RANK, |h| h.depth.get()),
                allocated: file.allocated()?,
                bare: header.is_some() && file.len()? <= BLOCK,
                damaged: header.is_none(),
            })
        };
        match read_header(&*file) {
            Ok(header) => node(Some(header)).map(Some),
            // An interrupted creation, or rot. It may stand on anything, which matters only if somebody needs it.
            Err(e) if e.kind() == Kind::Corrupt => node(None).map(Some),
            Err(_) => Ok(None),
        }
    }
    /// All layer files with what is known of them.
    pub fn layers(&self) -> Result<Found<LayerInfo>> {
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
        let mut found = Found::default();
        let layers: Vec<(Id, &Node)> = graph
            .nodes
            .iter()
            .filter_map(|(below, node)| match below {
                Below::Layer(id) => Some((*id, node)),
                Below::Base(_) => None,
            })
            .collect();
        let counts = many::each(&layers, |(id, _)| self.layer_counts(*id));
        for ((id, node), counts) in layers.into_iter().zip(counts) {
            let names = graph.names.get(&Below::Layer(id)).cloned();
            let names = names.unwrap_or_default();
            let counts = counts.and_then(|counts| {
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
                depth: graph.length(Below::Layer(id)),
                names,
            });
        }
        found.sound.sort_by_key(|l| (l.depth, l.id));
        found.damaged.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
    /// State, counts and size of a layer file that others may be writing.
    pub(super) fn layer_counts(&self, id: Id) -> Result<(State, (u64, u64), u64)> {
        let layer = self.layer_now(id)?;
        Ok((layer.state(), layer.counts(), layer.size()))
    }
    /// A layer as of its last commit, whoever is writing it.
    pub(super) fn layer_now(&self, id: Id) -> Result<ReadLayer> {
        // A checkpoint of its writer may come in between; then what was read makes no sense, and is read again.
        let mut tries = 0;
        loop {
            let file = self.layers.open(&layer_file(id), Access::Read)?;
            match ReadLayer::open(file) {
                Ok(layer) => return Ok(layer),
                Err(e) if tries >= TRIES => return Err(e),
                Err(_) => tries += 1,
            }
        }
    }
}

/// How often a layer that is being written is looked at again.
pub(super) const TRIES: u32 = 20;

/// A base or layer in the graph.
pub(super) struct Node {
    pub parent: Option<Below>,
    /// Rank: larger than that of what it stands on.
    pub rank: u32,
    pub allocated: u64,
    /// It is its header alone: nothing was ever written into it.
    pub bare: bool,
    /// Its header cannot be read, so nobody knows what it stands on.
    pub damaged: bool,
}

impl Node {
    /// A base with so many host bytes.
    pub fn of_base(allocated: u64) -> Node {
        Node {
            parent: None,
            rank: 0,
            allocated,
            bare: false,
            damaged: false,
        }
    }
}

/// Bases and layers, and who needs whom.
#[derive(Default)]
pub(super) struct Graph {
    pub nodes: HashMap<Below, Node>,
    pub children: HashMap<Below, Vec<Below>>,
    pub names: HashMap<Below, Vec<String>>,
    /// Something could not be read, so that nothing may be called garbage.
    pub unreadable: bool,
    /// Sealed layers whose parts of histories are about to go: they hide what lies below them.
    pub ended: HashSet<Id>,
}

impl Graph {
    /// All that stand on any of `wanted`, these included, with what is said of the nearest.
    pub fn standing_on<'w>(&self, wanted: &HashMap<Below, &'w str>) -> HashMap<Below, &'w str> {
        let mut standing = wanted.clone();
        if wanted.is_empty() {
            return standing;
        }
        // What a layer stands on has a lower rank.
        let mut order: Vec<(&Below, &Node)> = self.nodes.iter().collect();
        order.sort_by_key(|(_, node)| node.rank);
        for (below, node) in order {
            let found = node
                .parent
                .and_then(|parent| standing.get(&parent).copied());
            if let Some(found) = found {
                standing.entry(*below).or_insert(found);
            }
        }
        standing
    }
    /// Names that are gone.
    pub fn forget(&mut self, gone: &HashSet<&str>) {
        for names in self.names.values_mut() {
            names.retain(|n| !gone.contains(n.as_str()));
        }
        self.names.retain(|_, names| !names.is_empty());
    }
    /// What is gone stands on nothing.
    pub fn without(&mut self, garbage: &HashSet<Below>) {
        for children in self.children.values_mut() {
            children.retain(|child| !garbage.contains(child));
        }
    }
    /// Sorts children before parents.
    pub fn rank(&self, below: Below) -> u32 {
        self.nodes.get(&below).map_or(0, |n| n.rank)
    }
    /// Layers from `below` down to the base, itself included.
    pub fn length(&self, below: Below) -> u32 {
        let mut length = 0;
        let mut at = Some(below);
        while let Some(Below::Layer(_)) = at
            && length <= MAX_DEPTH
        {
            length += 1;
            at = at.and_then(|b| self.nodes.get(&b)).and_then(|n| n.parent);
        }
        length
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
