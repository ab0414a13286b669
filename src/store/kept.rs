//! What layers and bases say of the data that they show, without a look at any block map (FORMAT.md, "Superblock").

use super::graph::Graph;
use super::names::{TEMPORARY, read_record};
use super::refer::Refer;
use super::{Below, Store, layer_file, parent_of, refer};
use crate::error::Result;
use crate::format::text::Record;
use crate::format::{MAX_DEPTH, Superblock};
use crate::io::Access;
use crate::layer::{State, prune, read_header, recover};
use crate::units::Id;
use std::collections::HashMap;

/// A base, as far as counts go.
#[derive(Clone)]
struct Ground {
    /// Blocks that hold data.
    data: Option<u64>,
    id: Id,
    counts_as: Vec<Id>,
}

impl Ground {
    /// What a superblock says is seen through its layer, if that was counted over this base.
    fn refer(&self, superblock: &Superblock) -> Option<u64> {
        let (refer, over) = superblock.refer()?;
        (over == self.id || self.counts_as.contains(&over)).then_some(refer)
    }
}

/// The counts of a store.
pub(super) struct Kept<'a> {
    store: &'a Store,
    graph: &'a Graph,
    grounds: HashMap<Id, Ground>,
    /// On which base a layer stands.
    bases: HashMap<Below, Id>,
}

impl<'a> Kept<'a> {
    /// Those of a graph. The names lock is held.
    pub fn new(store: &'a Store, graph: &'a Graph) -> Kept<'a> {
        Kept {
            store,
            graph,
            grounds: HashMap::new(),
            bases: HashMap::new(),
        }
    }
    /// How many data blocks are seen through `top`, and how many are its own; `None` if that is not known, or cannot be read.
    pub fn of(&mut self, top: Below) -> Option<(u64, u64)> {
        let base = self.base_of(top)?;
        let ground = self.ground(base)?;
        let mut at = top;
        // What was never written shows what it stands on.
        while let Some(node) = self.graph.nodes.get(&at).filter(|node| node.bare) {
            at = node.parent?;
        }
        let (shown, own) = match at {
            Below::Base(_) => (ground.data?, 0),
            // It is counted, which tells what is wrong, too.
            Below::Layer(id) => self.layer(id, &ground).ok().flatten()?,
        };
        Some((shown, if at == top { own } else { 0 }))
    }
    fn base_of(&mut self, top: Below) -> Option<Id> {
        let mut path = Vec::new();
        let mut at = top;
        let base = loop {
            if let Some(known) = self.bases.get(&at) {
                break *known;
            }
            if let Below::Base(id) = at {
                break id;
            }
            if path.len() > MAX_DEPTH as usize {
                return None;
            }
            path.push(at);
            at = self.graph.nodes.get(&at)?.parent?;
        };
        self.bases
            .extend(path.into_iter().map(|below| (below, base)));
        Some(base)
    }
    fn ground(&mut self, id: Id) -> Option<Ground> {
        if let Some(known) = self.grounds.get(&id) {
            return Some(known.clone());
        }
        let meta = self.store.base_meta(id).ok()?;
        let counted = || {
            let data = refer::data_blocks(self.store, id).ok()?;
            Some(data.iter().map(|(start, end)| end - start).sum())
        };
        let ground = Ground {
            data: meta.data.or_else(counted),
            id,
            counts_as: meta.counts_as,
        };
        self.grounds.insert(id, ground.clone());
        Some(ground)
    }
    fn layer(&self, id: Id, ground: &Ground) -> Result<Option<(u64, u64)>> {
        let file = self
            .store
            .layers_dir()
            .open(&layer_file(id), Access::Read)?;
        let superblock = recover::superblock(&*file, &read_header(&*file)?)?.superblock;
        let Some(refer) = ground.refer(&superblock) else {
            return Ok(None);
        };
        if State::of(&superblock) != State::Writable {
            return Ok(Some((refer, superblock.data_blocks.get())));
        }
        // As much as the journal holds is looked at; and nothing below, where the journal is empty.
        let layer = self.store.layer_now(id)?;
        let chain = self.store.chain(parent_of(layer.header()))?;
        let refer = layer.refer(&*chain)?;
        Ok(refer.map(|refer| (refer, layer.counts().0)))
    }
}

/// What is kept of a layer or base at rest, and what its block maps and those below say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recount {
    /// Which one.
    pub below: Below,
    /// Data blocks that it shows, as it was kept; `None`: that is not known.
    pub kept: Option<u64>,
    /// The same, counted.
    pub counted: u64,
    /// The base over which that was counted.
    pub over: Id,
}

impl Graph {
    /// Is what it shows of interest: by its name, or through what was never written and stands on it?
    fn asked(&self, below: Below) -> bool {
        let bare = |below: &Below| self.nodes.get(below).is_some_and(|node| node.bare);
        let children = self.children.get(&below);
        matches!(below, Below::Base(_))
            || self
                .names
                .get(&below)
                .is_some_and(|names| !names.is_empty())
            || children.is_some_and(|children| children.iter().any(bare))
    }
}

impl Store {
    /// Counts anew what the layers and bases of `among` that are at rest and can be read show; of what is not known, that which somebody may ask for.
    /// The names lock is held.
    pub(crate) fn recount(&self, among: &dyn Fn(Below) -> bool) -> Result<Vec<Recount>> {
        let graph = self.graph()?;
        let mut kept = Kept::new(self, &graph);
        let mut tops: Vec<(Below, Ground, Option<u64>)> = Vec::new();
        let of = |(below, node): (&Below, &super::graph::Node)| {
            (among(*below) && !node.bare && !node.damaged).then_some(*below)
        };
        for below in graph.nodes.iter().filter_map(of) {
            let Some(ground) = kept.base_of(below).and_then(|base| kept.ground(base)) else {
                continue;
            };
            // What was counted over an image that is not there any more cannot be counted again.
            if self.base(ground.id).is_err() {
                continue;
            }
            let known = match below {
                Below::Base(id) => self.base_meta(id).ok().map(|meta| meta.data),
                Below::Layer(id) => self.at_rest(id).ok().flatten().map(|s| ground.refer(&s)),
            };
            let asked = known.is_some_and(|known| known.is_some()) || graph.asked(below);
            tops.extend(known.filter(|_| asked).map(|known| (below, ground, known)));
        }
        let refer = Refer::counted(self, &graph, tops.iter().map(|top| top.0));
        let recount = |(below, ground, kept): (Below, Ground, Option<u64>)| {
            let counted = refer.shown(below).ok()?;
            Some(Recount {
                below,
                kept,
                counted,
                over: ground.id,
            })
        };
        let mut found: Vec<Recount> = tops.into_iter().filter_map(recount).collect();
        found.sort_by_key(|recount| recount.below);
        Ok(found)
    }
    /// The superblock of a layer that nobody writes and that was closed.
    fn at_rest(&self, id: Id) -> Result<Option<Superblock>> {
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        let sealed = |s: &Superblock| State::of(s) == State::Sealed;
        let superblock = recover::superblock(&*file, &read_header(&*file)?)?.superblock;
        let rests = sealed(&superblock)
            || State::of(&superblock) == State::Clean && file.lock(false).is_ok();
        Ok(Some(superblock).filter(|_| rests))
    }
    /// Notes what was counted. The names lock is held, for changes.
    pub(crate) fn note_count(&self, found: &Recount) -> Result<()> {
        let id = match found.below {
            Below::Base(id) => return self.note_data(id, found.counted),
            Below::Layer(id) => id,
        };
        let file = self.layers.open(&layer_file(id), Access::Write)?;
        let header = read_header(&*file)?;
        let superblock = recover::superblock(&*file, &header)?.superblock;
        if State::of(&superblock) != State::Sealed {
            // Nobody else writes it; of a sealed one that matters to nobody.
            file.lock(true)?;
        }
        prune::note_refer(&*file, &header, (found.counted, found.over))
    }
    /// Writes the record of a base anew, with so many blocks that hold data.
    fn note_data(&self, id: Id, data: u64) -> Result<()> {
        let dir = self.bases.subdir(&id.to_string())?;
        // Its lock says that the base is in use: it must not go to another file meanwhile.
        let held = dir.open("meta", Access::Read)?;
        held.lock(true)?;
        let old = Record::decode(&read_record(&*dir, "meta")?)?;
        let others = old
            .iter()
            .filter(|(key, _)| !["data", "counts_as"].contains(key));
        let new = others.fold(Record::new(), |new, (key, value)| new.with(key, value));
        let new = new.with("data", data.to_string());
        let temporary = format!("{TEMPORARY}meta");
        if dir.entry(&temporary)?.is_some() {
            dir.remove(&temporary)?;
        }
        let file = dir.open(&temporary, Access::CreateNew)?;
        file.write_at(&new.encode(), 0)?;
        file.sync()?;
        dir.rename(&temporary, "meta")?;
        dir.sync()
    }
}
