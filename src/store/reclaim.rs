//! Space of layers that have no name any more but are needed by what stands on them: blocks that nobody can see through any of these are given
//! back (FORMAT.md, section 4, "Reclaim").
//!
//! Always true:
//! - only what is durable hides: sealed layers, and disks at rest; what an attached disk has written may be lost in a power cut, and with it
//!   what it hides;
//! - a layer that another process has open is left alone: a later `gc` finds it. What this process has open shrinks under its readers
//!   ([`Store::reclaim_open`]), who come to it only through what hides the blocks;
//! - the names lock is held all the time, so that nothing new can stand on the layer, or on those that it is seen through;
//! - what hides by standing on a child counts only where nobody can see that child by itself: it has no name, no label that a name could be brought
//!   back from, and no view of it is open.

use super::graph::Graph;
use super::objects::object_target;
use super::{Below, RemovePlan, Store, layer_file, names, names_lock_if_free};
use crate::chain::Chain;
use crate::error::{Error, Kind, Result};
use crate::io::{Access, File};
use crate::layer::prune::Users;
use crate::layer::{ReadLayer, State, prune, read_header};
use crate::map::WORDS;
use crate::units::{BLOCK, Id, Region};
use std::collections::HashSet;
use std::sync::{Arc, Weak};

/// The file that a scrub has locked: it reads sealed layers without their locks.
const SCRUB: &str = "scrub";

/// Setting of a disk whose own layer also keeps what it held earlier: that may come back, and so hides nothing for good.
const HISTORY: &str = "history";

/// So many layers without names, one on top of the other, are asked at most what they hide.
const LEVELS: usize = 64;

/// Blocks that every one of these hides.
struct Hiding(Vec<Cover>);

/// A layer that stands on another one.
struct Cover {
    layer: ReadLayer,
    /// Where nobody sees the layer but through what stands on it: that hides, too. It may be the only one left that does, since the layer gave back
    /// what it had itself.
    above: Option<Hiding>,
}

impl Hiding {
    fn region(&self, region: Region) -> Result<[u64; WORDS]> {
        let mut bits = [u64::MAX; WORDS];
        for cover in &self.0 {
            let hidden = cover.region(region)?;
            bits.iter_mut()
                .zip(hidden)
                .for_each(|(all, one)| *all &= one);
        }
        Ok(bits)
    }
}

impl Cover {
    fn region(&self, region: Region) -> Result<[u64; WORDS]> {
        let map = self.layer.region(region)?;
        if map.fill() {
            return Ok([u64::MAX; WORDS]);
        }
        let mut bits = *map.present();
        if let Some(above) = &self.above {
            bits.iter_mut()
                .zip(above.region(region)?)
                .for_each(|(one, more)| *one |= more);
        }
        Ok(bits)
    }
}

/// A lock that its readers share, held by one of them for himself as long as this lives. Nobody asks for it in between: that takes the names lock.
struct Alone<'a>(&'a dyn File);

impl Alone<'_> {
    /// `None` if others have the file open as well.
    fn with(file: &dyn File) -> Result<Option<Alone<'_>>> {
        // Whether it succeeds or not, what was held is given up for it.
        let alone = Alone(file);
        match file.lock(true) {
            Ok(()) => Ok(Some(alone)),
            Err(e) if e.kind() == Kind::Busy => Ok(None),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        // Kept for one alone it would keep all others out.
        let shared = (0..3).any(|_| self.0.lock(false).is_ok());
        if !shared {
            tracing::error!("{} is open without its lock", self.0.path().display());
        }
    }
}

/// What [`Store::reclaim_open`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Bytes that were given back.
    pub bytes: u64,
    /// The layers that they were of.
    pub shrunk: Vec<Id>,
    /// Open layers without names of which more may be given back later.
    pub left: usize,
}

/// What is done about blocks that nobody sees.
#[derive(Clone, Copy)]
enum How {
    /// They are given back.
    Do,
    /// They are counted.
    Count,
    /// They are counted, in a layer that has a name as if it had none.
    CountNamed,
}

impl Store {
    /// After names were removed: the layers that stay without one take no name any more, and give back what nobody sees. The names lock is
    /// held.
    pub(super) fn left_behind(&self, graph: &Graph, plan: &RemovePlan) -> Result<()> {
        let mut left = Vec::new();
        for below in plan.names.iter().map(object_target) {
            let named = graph.names.get(&below).is_some_and(|n| !n.is_empty());
            if let Below::Layer(id) = below
                && !named
                && let Ok(file) = self.layers.open(&layer_file(id), Access::Write)
            {
                match read_header(&*file).and_then(|header| prune::unlabel(&*file, &header)) {
                    Ok(()) => left.push(id),
                    // The name is gone all the same.
                    Err(e) => left_alone(id, e)?,
                }
            }
        }
        if !left.is_empty() {
            self.layers.sync()?;
        }
        // From below: what a layer has given back hides nothing any more.
        for id in left.into_iter().rev() {
            if let Err(e) = self.reclaim(graph, id, How::Do) {
                left_alone(id, e)?;
            }
        }
        Ok(())
    }
    /// Bytes that the layers of snapshots give back if these lose their names, `garbage` goes, and what the layers in `ended` keep of histories: what [`Store::left_behind`] does then. The names
    /// lock is held.
    pub(super) fn would_reclaim(
        &self,
        mut graph: Graph,
        garbage: &HashSet<Below>,
        left: &HashSet<Below>,
        mut ended: Vec<Id>,
    ) -> Result<u64> {
        graph.without(garbage);
        graph.names.retain(|below, _| !left.contains(below));
        ended.extend(self.ended(&graph, garbage, left)?);
        ended.sort();
        ended.dedup();
        let mut bytes = self.earlier_bytes(&ended);
        graph.ended = ended.into_iter().collect();
        for below in left {
            match self.reclaim(&graph, below.id(), How::CountNamed) {
                Ok(more) => bytes += more,
                Err(e) => left_alone(below.id(), e)?,
            }
        }
        Ok(bytes)
    }
    /// Reclaims what can be reclaimed of all layers without a name; returns the bytes, and the layers. The names lock is held, and the
    /// names are synced.
    pub(super) fn reclaim_all(&self, graph: &Graph, dry_run: bool) -> Result<(u64, Vec<Id>)> {
        if graph.unreadable {
            return Ok((0, Vec::new()));
        }
        let mut layers: Vec<Id> = graph
            .children
            .keys()
            .filter(|below| graph.names.get(below).is_none_or(Vec::is_empty))
            .filter_map(|below| match below {
                Below::Layer(id) => Some(*id),
                Below::Base(_) => None,
            })
            .collect();
        if layers.is_empty() {
            return Ok((0, layers));
        }
        layers.sort();
        if !dry_run {
            self.layers.sync()?;
        }
        let mut bytes = 0;
        let mut shrunk = Vec::new();
        for id in layers {
            let how = if dry_run { How::Count } else { How::Do };
            match self.reclaim(graph, id, how) {
                Ok(0) => {}
                Ok(n) => {
                    bytes += n;
                    shrunk.push(id);
                }
                Err(e) => left_alone(id, e)?,
            }
        }
        Ok((bytes, shrunk))
    }
    /// What hides blocks of a layer: all its children. `None` if one of them hides nothing. `labelled`: also layers that still say which name they had
    /// are seen by nobody.
    fn hiding(&self, graph: &Graph, id: Id, labelled: bool) -> Result<Option<Hiding>> {
        self.hiding_up_to(graph, id, labelled, LEVELS)
    }
    fn hiding_up_to(
        &self,
        graph: &Graph,
        id: Id,
        labelled: bool,
        levels: usize,
    ) -> Result<Option<Hiding>> {
        let children = graph.children.get(&Below::Layer(id));
        let Some(children) = children.filter(|_| !graph.unreadable) else {
            return Ok(None);
        };
        let mut hiding = Vec::new();
        for child in children {
            let layer = match self.hides(graph, child.id()) {
                Ok(Some(layer)) => layer,
                Ok(None) => return Ok(None),
                // It was garbage, and is gone.
                Err(e) if e.kind() == Kind::NotFound => continue,
                Err(e) => return Err(e),
            };
            let seen = graph.names.get(child).is_some_and(|n| !n.is_empty())
                || self.is_shown(child.id())
                // A name that is brought back from it shows it.
                || !labelled && layer.superblock().name().is_some();
            let above = match levels.checked_sub(1).filter(|_| !seen) {
                Some(levels) => self.hiding_up_to(graph, child.id(), labelled, levels)?,
                None => None,
            };
            if layer.counts() == (0, 0) && above.is_none() {
                return Ok(None);
            }
            hiding.push(Cover { layer, above });
        }
        Ok(Some(Hiding(hiding)).filter(|h| !h.0.is_empty()))
    }
    /// Gives back what nobody sees of the layers that this process has open and no other: those of attached disks. Afterwards the disks are to be told
    /// ([`Store::rechain`]); then the former block maps can go as well, if it is called again.
    pub fn reclaim_open(&self) -> Result<Reclaimed> {
        let _lock = self.lock(true)?;
        // A chain with a file that was replaced may come to a layer past all that the names know of.
        self.forget_replaced();
        let open = self.open_layers.lock().clone();
        let mut open: Vec<Arc<ReadLayer>> = open.values().filter_map(Weak::upgrade).collect();
        let mut done = Reclaimed {
            left: self.punch_former_maps(),
            ..Reclaimed::default()
        };
        if open.is_empty() {
            return Ok(done);
        }
        self.names.sync()?;
        self.layers.sync()?;
        let graph = self.graph()?;
        // What is left of a history must not keep what nobody sees.
        self.forget_earlier(&self.ended(&graph, &HashSet::new(), &HashSet::new())?);
        let chains = self.open_chains.lock().clone();
        let chains: Vec<Arc<Chain>> = chains.values().filter_map(Weak::upgrade).collect();
        let named = |below: &Below| graph.names.get(below).is_some_and(|n| !n.is_empty());
        open.retain(|layer| !named(&Below::Layer(layer.id())));
        // From below: what a layer has given back hides nothing any more.
        open.sort_by_key(|layer| layer.header().depth.get());
        let mut failed = Vec::new();
        let mut one = |layer: &Arc<ReadLayer>| -> Result<()> {
            let id = layer.id();
            let reads = |chain: &&Arc<Chain>| chain.layers().iter().any(|l| Arc::ptr_eq(l, layer));
            // These chains, and here; whoever else has it got it in another way.
            if Arc::strong_count(layer) != chains.iter().filter(reads).count() + 1 {
                done.left += 1;
                return Ok(());
            }
            match self.reclaim_held(&graph, layer) {
                Ok(None) => done.left += 1,
                Ok(Some(0)) => {
                    self.former_maps.lock().remove(&id);
                }
                Ok(Some(bytes)) => {
                    done.bytes += bytes;
                    done.shrunk.push(id);
                }
                Err(e) => {
                    failed.push(id);
                    left_alone(id, e)?;
                }
            }
            Ok(())
        };
        let all = open.iter().try_for_each(&mut one);
        // Whoever asks for them next reads their new maps; those that failed may have one, too, and what their readers know must not be taken for it.
        self.open_layers
            .lock()
            .retain(|id, _| !done.shrunk.contains(id) && !failed.contains(id));
        self.forget_replaced();
        all.map(|()| done)
    }
    /// [`Store::reclaim`] of a layer that this process has open; `None` if it must wait.
    fn reclaim_held(&self, graph: &Graph, layer: &ReadLayer) -> Result<Option<u64>> {
        let id = layer.id();
        let Some(hiding) = self.hiding(graph, id, false)? else {
            return Ok(None);
        };
        if self.scrubbing()? || self.is_shown(id) || self.is_replaced(layer) {
            return Ok(None);
        }
        let Some(_alone) = Alone::with(&**layer.file())? else {
            return Ok(None);
        };
        let file = self.layers.open(&layer_file(id), Access::Write)?;
        let header = read_header(&*file)?;
        if !prune::may_prune(&*file, &header)? {
            return Ok(None);
        }
        let hidden = |region: Region| hiding.region(region);
        let before = || {
            self.former_maps.lock().insert(id);
            self.uncount(&hiding)
        };
        let done = prune::prune(&file, &header, &hidden, Users::Here, before)?;
        Ok(Some(done.blocks * BLOCK))
    }
    /// After another server of the same store ended, whose layers are open here now: it may have left former block maps.
    pub fn inherit(&self) {
        self.inherit_idle();
        let open: Vec<Arc<ReadLayer>> = {
            let open = self.open_layers.lock();
            open.values().filter_map(Weak::upgrade).collect()
        };
        let nameless = open.iter().filter(|l| l.superblock().name().is_none());
        self.former_maps
            .lock()
            .extend(nameless.map(|layer| layer.id()));
    }
    /// After a disk was closed: gives back the former block maps of layers below it that gave back blocks while they were open here. Not while somebody
    /// changes names: [`Store::reclaim_open`] comes back to them.
    pub fn closed(&self) {
        if self.former_maps.lock().is_empty() {
            return;
        }
        match names_lock_if_free(&*self.root) {
            Ok(Some(_lock)) => drop(self.punch_former_maps()),
            Ok(None) => {}
            Err(e) => tracing::debug!("former block maps stay for now: {e}"),
        }
    }
    /// Gives back the former block maps of layers that were open here and are not any more; returns how many of these are left. The names lock is held.
    fn punch_former_maps(&self) -> usize {
        let open: HashSet<Id> = {
            let open = self.open_layers.lock();
            let open = open.iter().filter(|(_, layer)| layer.strong_count() > 0);
            open.map(|(id, _)| *id).collect()
        };
        let mut ids: Vec<Id> = self.former_maps.lock().iter().copied().collect();
        ids.retain(|id| !open.contains(id));
        if !ids.is_empty() && !matches!(self.scrubbing(), Ok(false)) {
            return ids.len();
        }
        let mut left = 0;
        for id in ids {
            let punched = (|| {
                let file = self.layers.open(&layer_file(id), Access::Write)?;
                file.lock(true)?;
                prune::punch_free(&*file, &read_header(&*file)?)
            })();
            match punched {
                // Another process reads the layer, or a chain that came to its former file.
                Err(e) if e.kind() == Kind::Busy => {
                    left += 1;
                    continue;
                }
                Err(e) => tracing::debug!(layer = %id, "the former block map stays: {e}"),
                Ok(()) => {}
            }
            self.former_maps.lock().remove(&id);
        }
        left
    }
    /// Is a layer what a snapshot shows that is open here? Its name may be gone.
    fn is_shown(&self, id: Id) -> bool {
        let views = self.views.lock();
        views
            .iter()
            .any(|(of, disk)| *of == id && disk.strong_count() > 0)
    }
    /// Gives back the blocks of a layer without a name that each of its children hides, by itself or by what stands on it; returns the bytes.
    fn reclaim(&self, graph: &Graph, id: Id, how: How) -> Result<u64> {
        let labelled = matches!(how, How::CountNamed);
        let Some(hiding) = self.hiding(graph, id, labelled)? else {
            return Ok(0);
        };
        let access = match how {
            How::Do => Access::Write,
            How::Count | How::CountNamed => Access::Read,
        };
        let file = match self.layers.open(&layer_file(id), access) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(0),
            other => other?,
        };
        match file.lock(true) {
            // Who has it open reads it, and does not change it.
            Err(e) if e.kind() == Kind::Busy && !matches!(how, How::Do) => {}
            Err(e) if e.kind() == Kind::Busy => return Ok(0),
            other => other?,
        }
        let header = read_header(&*file)?;
        // One that is still named is labelled as well, until then.
        let may = match how {
            How::CountNamed => {
                graph.ended.contains(&id) || !ReadLayer::open(file.clone())?.has_history()
            }
            How::Count if graph.ended.contains(&id) => true,
            How::Do | How::Count => prune::may_prune(&*file, &header)?,
        };
        if self.scrubbing()? || !may {
            return Ok(0);
        }
        let hidden = |region: Region| hiding.region(region);
        let pruned = match how {
            How::Count | How::CountNamed => prune::would_prune(&ReadLayer::open(file)?, &hidden)?,
            How::Do => {
                let before = || self.uncount(&hiding);
                prune::prune(&file, &header, &hidden, Users::Nobody, before)?
            }
        };
        Ok(pruned.bytes())
    }
    /// What will go may be seen through a layer that does not hide it itself. Nobody sees that layer, but it says how many blocks it shows.
    fn uncount(&self, hiding: &Hiding) -> Result<()> {
        for cover in &hiding.0 {
            let Some(above) = &cover.above else {
                continue;
            };
            let layer = &cover.layer;
            let file = self.layers.open(&layer_file(layer.id()), Access::Write)?;
            prune::forget_refer(&*file, layer.header())?;
            self.uncount(above)?;
        }
        Ok(())
    }
    /// A layer whose blocks hide what lies below them for good; `None` if nobody can tell.
    fn hides(&self, graph: &Graph, id: Id) -> Result<Option<ReadLayer>> {
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        match file.lock(false) {
            Err(e) if e.kind() == Kind::Busy => return Ok(None),
            other => other?,
        }
        let layer = ReadLayer::open(file)?;
        if layer.id() != id {
            return Err(Error::new(Kind::Corrupt, "the file holds another layer").layer(id));
        }
        let sure = match layer.state() {
            State::Sealed => !layer.has_history() || graph.ended.contains(&id),
            State::Clean => {
                layer.superblock().history_slot.get() == 0 && !self.keeps_history(graph, id)?
            }
            // Its last commit may not be on the disk yet. Before a layer is clean or sealed all of it is, whatever becomes of the superblock.
            State::Writable => false,
        };
        Ok(Some(layer).filter(|_| sure))
    }
    fn keeps_history(&self, graph: &Graph, id: Id) -> Result<bool> {
        for name in graph.names.get(&Below::Layer(id)).into_iter().flatten() {
            if names::read_name(&*self.names, name)?
                .extra
                .get(HISTORY)
                .is_some()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
    /// Is a scrub under way?
    fn scrubbing(&self) -> Result<bool> {
        match self.root.open(SCRUB, Access::Read) {
            Err(e) if e.kind() == Kind::NotFound => Ok(false),
            Err(e) => Err(e),
            Ok(file) => Ok(file.lock(false).is_err_and(|e| e.kind() == Kind::Busy)),
        }
    }
}

/// A layer stays as it is, for a reason that is none to give up the rest: of damage `check` tells, and a full disk has no room for another
/// map.
fn left_alone(id: Id, e: Error) -> Result<()> {
    if e.of_resources() || !matches!(e.kind(), Kind::Corrupt | Kind::NoSpace | Kind::Busy) {
        return Err(e.context("not all space could be reclaimed").layer(id));
    }
    tracing::debug!(layer = %id, "nothing is reclaimed: {e}");
    Ok(())
}
