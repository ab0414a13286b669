//! Joining layers into one, and putting a layer's file in the place of another one (FORMAT.md, section 4, "Squash").
//!
//! Always true:
//! - a layer's file is replaced by one that, with what it stands on, shows the same: whoever has the old one open goes on reading it,
//!   and children name it by its id as before;
//! - the new file is durable before it has the name, and the rename before anything is removed that the old file stood on;
//! - all that the old file stands on is open, and so locked, until the new one is in its place.

use super::graph::Graph;
use super::names::{self, TEMPORARY};
use super::{Below, Object, ObjectKind, Progress, Store, layer_file, parent_of, too_deep};
use crate::chain::Chain;
use crate::disk::CowDisk;
use crate::error::{Error, Kind, Result};
use crate::format::{MAX_DEPTH, MAX_RANK, Superblock};
use crate::io::{Access, File};
use crate::layer::rewrite::{self, Measure};
use crate::layer::{ReadLayer, State, prune, read_header, recover};
use crate::units::{BLOCK, Id};
use std::collections::HashMap;
use std::sync::{Arc, Weak};

/// Layers that are to become one, open until then.
pub struct Squash {
    /// Whose layers they are.
    pub name: String,
    /// How many: fewer than two need no squash.
    pub layers: u32,
    /// Bytes that are copied, or shared where the filesystem can.
    pub bytes: u64,
    /// Host bytes that the new file takes at most.
    pub needs: u64,
    /// The layer that they become.
    pub top: Id,
    /// Layers from the object down to the base.
    pub depth: u32,
    /// The same afterwards.
    pub depth_after: u32,
    /// It stops at the history of this disk.
    pub border: Option<String>,
    /// The topmost first.
    stretch: Vec<Arc<ReadLayer>>,
    below: Below,
    measure: Measure,
    /// Keeps all that is read where it is.
    _chain: Arc<Chain>,
}

/// Layers that were joined.
#[derive(Clone, Debug)]
pub struct Squashed {
    /// Bytes that were copied: less than there are, if an earlier attempt had copied some.
    pub copied: u64,
    /// What the layer stood on until now, and may be needed by nobody any more.
    pub former: Vec<Below>,
    /// Host bytes of the layer's file until now: they are free when nobody has it open any more.
    pub replaced: u64,
}

impl Squash {
    /// The layers that are to become one.
    pub fn members(&self) -> Vec<Below> {
        let ids = self.stretch.iter().map(|layer| layer.id());
        ids.map(Below::Layer).collect()
    }
}

/// `EXT4_SUPER_MAGIC`.
const EXT4: i64 = 0xEF53;

/// Name of the file that is to replace a layer's.
fn replacement(id: Id) -> String {
    format!("{TEMPORARY}{id}")
}

impl Store {
    // ---- ranks and depths ------------------------------------------------------------------------------------

    /// The rank of a layer that is to stand on `parent`; an error if a chain would become too long. `name` is whose, for the message.
    pub(super) fn rank_over(&self, parent: Below, name: &str) -> Result<u32> {
        let rank = self.rank_of(parent)?;
        // A rank is never less than the number of layers.
        let most = self.env.depth;
        if rank >= MAX_RANK || rank >= most && self.length(parent)? >= most {
            return Err(too_deep(name, most));
        }
        Ok(rank + 1)
    }
    /// The rank of a layer; of a base, that is there, 0.
    pub(super) fn rank_of(&self, below: Below) -> Result<u32> {
        match below {
            Below::Base(id) => self.base_meta(id).map(|_| 0),
            Below::Layer(id) => Ok(self.layer_head(id)?.0.depth.get()),
        }
    }
    /// Layers from `below` down to the base, as far as there can be.
    fn length(&self, below: Below) -> Result<u32> {
        if let Some(chain) = self.open_chains.lock().get(&below).and_then(Weak::upgrade) {
            return Ok(chain.depth() as u32);
        }
        let mut length = 0;
        let mut at = below;
        while let Below::Layer(id) = at
            && length < MAX_DEPTH
        {
            length += 1;
            let file = self.layers.open(&layer_file(id), Access::Read)?;
            at = parent_of(&read_header(&*file)?);
        }
        Ok(length)
    }

    // ---- files that replace others ---------------------------------------------------------------------------

    /// Has the name of an open layer another file now?
    pub(super) fn is_replaced(&self, layer: &ReadLayer) -> bool {
        let now = self.layers.open(&layer_file(layer.id()), Access::Read);
        match (now.and_then(|file| file.number()), layer.file().number()) {
            (Ok(now), Ok(then)) => now != then,
            _ => false,
        }
    }
    /// Was an open layer put out of use for a new opening of the same file ([`Store::reclaim_open`])?
    fn has_shrunk(&self, layer: &Arc<ReadLayer>) -> bool {
        let open = self.open_layers.lock();
        let found = open.get(&layer.id());
        // A disk's own layer is not among them.
        layer.state() == State::Sealed && found.is_none_or(|l| l.as_ptr() != Arc::as_ptr(layer))
    }
    /// Layers whose file was replaced are opened anew by whoever asks for them next.
    pub(super) fn forget_replaced(&self) {
        let current = |layer: &ReadLayer| !self.is_replaced(layer);
        self.open_layers
            .lock()
            .retain(|_, layer| layer.upgrade().is_some_and(|layer| current(&layer)));
        let known = self.open_layers.lock().clone();
        let current = |layer: &Arc<ReadLayer>| {
            known
                .get(&layer.id())
                .is_some_and(|found| found.as_ptr() == Arc::as_ptr(layer))
        };
        self.open_chains.lock().retain(|_, chain| {
            chain
                .upgrade()
                .is_some_and(|chain| chain.layers().iter().all(current))
        });
    }
    /// The file that will replace layer `id`'s, locked: a new one, or what an interrupted attempt left.
    pub(super) fn begin_replacement(&self, id: Id) -> Result<Arc<dyn File>> {
        // `gc` may not come in between.
        let _lock = self.lock(true)?;
        let name = replacement(id);
        let file = match self.layers.open(&name, Access::CreateNew) {
            Err(e) if e.kind() == Kind::Exists => self.layers.open(&name, Access::Write)?,
            other => other?,
        };
        file.lock(true).map_err(|e| match e.kind() {
            Kind::Busy => Error::new(Kind::Busy, "another command is rewriting this layer")
                .layer(id)
                .hint("wait for it to end, or end it"),
            _ => e,
        })?;
        Ok(file)
    }
    /// Removes what an interrupted squash of layer `id` has copied.
    pub fn drop_replacement(&self, id: Id) {
        let _ = self.layers.remove(&replacement(id));
    }
    /// Is the file that will replace a layer's being written?
    pub fn rewrite_running(&self, temporary: &str) -> bool {
        self.layers
            .open(temporary, Access::Read)
            .is_ok_and(|file| file.lock(true).is_err_and(|e| e.kind() == Kind::Busy))
    }
    /// Puts `file` in the place of the layer `old`. The names lock is held, and `file` is durable. Returns the host bytes of the old file.
    pub(super) fn replace(&self, old: &ReadLayer, file: &dyn File) -> Result<u64> {
        let id = old.id();
        let name = layer_file(id);
        let gone = || {
            Error::new(Kind::NotFound, "the layer was removed meanwhile")
                .layer(id)
                .hint("nothing was changed")
        };
        let now = match self.layers.open(&name, Access::Read) {
            Err(e) if e.kind() == Kind::NotFound => return Err(gone()),
            other => other?,
        };
        if now.number()? != old.file().number()? {
            return Err(Error::new(
                Kind::Busy,
                "another command has rewritten the layer meanwhile",
            )
            .layer(id)
            .hint("look at it again, then repeat the command if it is still needed"));
        }
        let graph = self.graph()?;
        if graph.garbage(|_| true).contains(&Below::Layer(id)) {
            return Err(gone());
        }
        if self.label_of(id).is_none() {
            // A name that was removed while the file was written must not look as if it were lost.
            prune::unlabel(file, &read_header(file)?)?;
        }
        // Readers share its lock from now on. Should a power cut take the rename back, all is as it was: nothing goes before it is durable.
        file.lock(false)?;
        let replaced = now.allocated()?;
        self.layers.rename(&replacement(id), &name)?;
        Ok(replaced)
    }
    /// Removes those of `former` that nothing needs any more and nobody has open; returns the host bytes.
    pub fn collect_former(&self, former: &[Below]) -> Result<u64> {
        let _lock = self.lock(true)?;
        self.names.sync()?;
        self.layers.sync()?;
        let graph = self.graph()?;
        let mut garbage = graph.garbage(|_| true);
        garbage.retain(|below| former.contains(below));
        garbage.sort_by_key(|below| std::cmp::Reverse(graph.rank(*below)));
        let mut freed = 0;
        for below in garbage {
            let removed = match below {
                Below::Layer(id) => self.remove_layer(id)?,
                Below::Base(id) => self.remove_idle_base(id)?,
            };
            if removed {
                freed += graph.nodes[&below].allocated;
            }
        }
        // The histories of those that stay end with the layer that took their place.
        let keeps = |below: &&Below| match below {
            Below::Layer(id) => matches!(self.keeps_a_past(*id), Ok(true)),
            Below::Base(_) => false,
        };
        let left: Vec<Id> = former
            .iter()
            .filter(keeps)
            .map(|below| below.id())
            .collect();
        if !left.is_empty() {
            let graph = self.graph()?;
            freed += self
                .collect_histories(&graph, |id| left.contains(&id), false)?
                .0;
        }
        Ok(freed)
    }
    /// Free bytes of the host filesystem for this user, where that can be known.
    pub(super) fn host_free(&self) -> Option<u64> {
        let found = rustix::fs::statvfs(self.path.join("layers")).ok()?;
        let blocks = match rustix::process::geteuid().is_root() {
            true => found.f_bfree,
            false => found.f_bavail,
        };
        // What ext4 keeps for itself nobody gets, and it counts as free: 2 %, 16 MiB at most.
        let kept = match rustix::fs::statfs(self.path.join("layers")).ok()?.f_type {
            EXT4 => (found.f_blocks / 50).min((16 << 20) / found.f_frsize.max(1)),
            _ => 0,
        };
        let blocks = match rustix::process::geteuid().is_root() {
            true => blocks.saturating_sub(kept),
            false => blocks,
        };
        Some(blocks.saturating_mul(found.f_frsize))
    }
    /// Fails if the host has not so many bytes.
    pub(super) fn must_fit(&self, what: &str, needs: u64) -> Result<()> {
        match self.host_free() {
            Some(free) if free < needs => Err(Error::new(
                Kind::NoSpace,
                format!("{what} needs up to {needs} bytes, and the host filesystem has {free}"),
            )
            .path(&self.path)
            .hint(
                "free space (`forkdisk gc`, `forkdisk rm`), then try again; nothing was changed",
            )),
            _ => Ok(()),
        }
    }

    // ---- squash ----------------------------------------------------------------------------------------------

    /// What a squash would join: of a disk the sealed layers below its own, of a snapshot or image its own and those below, down to the first
    /// that is an image; with `all` down to the base.
    pub fn plan_squash(&self, reference: &str, all: bool) -> Result<Squash> {
        let _lock = self.lock(false)?;
        let object = self.resolve_locked(reference)?;
        let graph = self.graph()?;
        let below = match object.kind {
            ObjectKind::Disk => object.parent,
            _ => Some(super::objects::object_target(&object)),
        };
        let mut at = below.ok_or_else(|| Error::new(Kind::Corrupt, "a disk stands on nothing"))?;
        let top = at;
        let mut stretch = Vec::new();
        let others = match all {
            true => HashMap::new(),
            // Its own are those of its snapshots, too.
            false => self.of_other_histories(object.name.split('@').next().unwrap_or_default())?,
        };
        let mut border = None;
        while let Below::Layer(id) = at {
            // An image is what others stand on, and a history is what another disk goes back to; but it is itself what it is asked of.
            let own = stretch.is_empty() && object.kind != ObjectKind::Disk;
            if let Some(whose) = others.get(&id).filter(|_| !own) {
                border = Some(whose.clone());
                break;
            }
            if !all && !own && self.is_image(&graph, at)? {
                break;
            }
            stretch.push(id);
            at = self.below(&graph, at)?;
        }
        let above = u32::from(object.kind == ObjectKind::Disk);
        let plan = self.prepare_squash(&object.name, top, &stretch, above)?;
        Ok(Squash { border, ..plan })
    }
    /// Is a layer what an image's name refers to?
    fn is_image(&self, graph: &Graph, below: Below) -> Result<bool> {
        for name in graph.names.get(&below).into_iter().flatten() {
            if names::read_name(&*self.names, name)?.kind == ObjectKind::Image {
                return Ok(true);
            }
        }
        Ok(false)
    }
    /// What a layer stands on, by the graph.
    fn below(&self, graph: &Graph, below: Below) -> Result<Below> {
        let parent = graph.nodes.get(&below).and_then(|node| node.parent);
        parent.ok_or_else(|| {
            Error::new(Kind::Corrupt, "a layer of the chain is gone or damaged")
                .layer(below.id())
                .hint("`forkdisk check` tells what is damaged")
        })
    }
    /// Opens what is to be joined. `above`: layers of the object above `top`. The names lock is held.
    fn prepare_squash(&self, name: &str, top: Below, stretch: &[Id], above: u32) -> Result<Squash> {
        let chain = self.chain(top)?;
        let layers: Vec<Arc<ReadLayer>> = chain.layers()[..stretch.len()].to_vec();
        debug_assert!(layers.iter().map(|l| l.id()).eq(stretch.iter().copied()));
        let below = layers.last().map_or(top, |last| parent_of(last.header()));
        let measure = Measure::of(&layers)?;
        let depth = above + chain.depth() as u32;
        Ok(Squash {
            name: name.to_string(),
            layers: layers.len() as u32,
            bytes: measure.data * BLOCK,
            needs: measure.bytes(),
            top: top.id(),
            depth,
            depth_after: depth - (layers.len() as u32).saturating_sub(1),
            border: None,
            stretch: layers,
            below,
            measure,
            _chain: chain,
        })
    }
    /// Neighbouring layers under an attached disk of which nobody needs one alone: without names, each with one child, at least `least` of them.
    pub fn idle_stretch(&self, name: &str, disk: &CowDisk, least: usize) -> Result<Option<Squash>> {
        let chain = disk.chain();
        if chain.depth() < least {
            return Ok(None);
        }
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
        if graph.unreadable {
            return Ok(None);
        }
        let idle = |layer: &Arc<ReadLayer>| {
            let below = Below::Layer(layer.id());
            // A label without a name: the name may be lost, and can be brought back.
            graph.names.get(&below).is_none_or(Vec::is_empty)
                && graph.children.get(&below).is_some_and(|c| c.len() == 1)
                && self.label_of(layer.id()).is_none()
        };
        let mut stretch: Vec<Id> = Vec::new();
        for layer in chain.layers() {
            if idle(layer) {
                stretch.push(layer.id());
            } else if stretch.len() >= least {
                break;
            } else {
                stretch.clear();
            }
        }
        match stretch.first() {
            Some(top) if stretch.len() >= least => self
                .prepare_squash(name, Below::Layer(*top), &stretch, 0)
                .map(Some),
            _ => Ok(None),
        }
    }
    /// What a sealed layer calls itself in its superblock now.
    pub(super) fn label_of(&self, id: Id) -> Option<String> {
        self.superblock_of(id)?.name().map(str::to_string)
    }
    /// What its file says now, whatever an open layer was when it was opened.
    fn superblock_of(&self, id: Id) -> Option<Superblock> {
        let file = self.layers.open(&layer_file(id), Access::Read).ok()?;
        let header = read_header(&*file).ok()?;
        let found = recover::superblock(&*file, &header).ok()?;
        Some(found.superblock)
    }
    /// Fails if the host has no room for it.
    pub fn may_squash(&self, plan: &Squash) -> Result<()> {
        let Some(top) = plan.stretch.first().filter(|_| plan.layers > 1) else {
            return Ok(());
        };
        // What an interrupted attempt left has its space already.
        let left = self.layers.open(&replacement(top.id()), Access::Read);
        let left = left.and_then(|file| file.allocated()).unwrap_or(0);
        self.must_fit("the squash", plan.needs.saturating_sub(left))
    }
    /// Joins the layers of a plan. What was copied is kept if it is interrupted: the next squash of the same layers goes on with it, and `gc`
    /// removes it. Afterwards the daemon must be told ([`Store::rechain`]), and what the layers stood on can go ([`Store::collect_former`]).
    pub fn squash(&self, plan: Squash, progress: &dyn Progress) -> Result<Squashed> {
        let Some(top) = plan.stretch.first().filter(|_| plan.layers > 1).cloned() else {
            return Ok(Squashed {
                copied: 0,
                former: Vec::new(),
                replaced: 0,
            });
        };
        let id = top.id();
        self.may_squash(&plan)?;
        let members: Vec<Id> = plan.stretch.iter().map(|layer| layer.id()).collect();
        let ending = self.histories_through(&members)?;
        let file = self.begin_replacement(id)?;
        let header = top
            .header()
            .over(plan.below.id(), matches!(plan.below, Below::Layer(_)));
        let written = self.written_before(Below::Layer(id));
        let header = header.after(written.by_user, written.to_host);
        let mut done = 0;
        let mut told = |bytes: u64| {
            done += bytes;
            if progress.update(done, plan.bytes) {
                return Ok(());
            }
            Err(
                Error::new(Kind::Interrupted, "the squash was interrupted").hint(
                    "nothing was changed; run it again, and it goes on with what it has copied (`forkdisk gc` removes that)",
                ),
            )
        };
        // Not as it was when it was opened: its name may have been removed since, and what it shows is not known any more if some of that was given back.
        let superblock = self.superblock_of(id);
        let refer = |superblock: Option<&Superblock>| superblock.and_then(Superblock::refer);
        let shown = refer(superblock.as_ref());
        let label = superblock.as_ref().and_then(Superblock::name);
        // It shows what it showed, over the same base.
        let label = (label, top.size(), shown);
        let written = rewrite::write(
            &*file,
            &header,
            label,
            &plan.stretch,
            &plan.measure,
            &mut told,
        )
        .and_then(|copied| {
            let _lock = self.lock(true)?;
            if refer(self.superblock_of(id).as_ref()) != shown {
                prune::forget_refer(&*file, &header)?;
            }
            Ok((copied, self.replace(&top, &*file)?))
        });
        let (copied, replaced) = match written {
            Ok(done) => done,
            Err(e) => {
                if e.kind() != Kind::Interrupted {
                    self.drop_replacement(id);
                }
                // Whoever made garbage of them meanwhile could not remove what was open here.
                let (name, members) = (plan.name.clone(), plan.members());
                drop((plan, top, file));
                self.forget_replaced();
                if let Err(e) = self.collect_former(&members) {
                    tracing::debug!("left to gc: {e}");
                }
                return Err(e.context(format!("cannot squash `{name}`")));
            }
        };
        let mut former: Vec<Below> = members[1..].iter().copied().map(Below::Layer).collect();
        former.extend(ending.into_iter().filter(|below| below.id() != id));
        drop(plan);
        drop(top);
        self.forget_replaced();
        Ok(Squashed {
            copied,
            former,
            replaced,
        })
    }
    /// Lets an open disk read through the files that its layers have now; says whether any had been replaced. What the disk shows does not change.
    pub fn rechain(&self, disk: &CowDisk) -> Result<bool> {
        // Nobody seals its layer meanwhile.
        let _lock = self.lock(false)?;
        loop {
            let (own, old) = disk.stands_on();
            let changed =
                |layer: &Arc<ReadLayer>| self.is_replaced(layer) || self.has_shrunk(layer);
            if !old.layers().iter().any(changed) {
                return Ok(false);
            }
            self.forget_replaced();
            let new = match (own, old.layers().first()) {
                (Some(own), _) => self.chain(parent_of(&own))?,
                (None, None) => return Ok(false),
                // A disk that is open for reading only: its own layer is no sealed one.
                (None, Some(own)) if own.state() != State::Sealed => {
                    let below = self.chain(parent_of(own.header()))?;
                    Arc::new(self.chain_over(own.clone(), &below))
                }
                (None, Some(top)) => self.chain(Below::Layer(top.id()))?,
            };
            // Else it was just opened for reading only: it stands on another chain then, which includes its own layer.
            if disk.rechain(&old, new) {
                return Ok(true);
            }
        }
    }
    /// Seals the layer of a disk at rest: all it shows is in sealed layers then, and the topmost of them is its own. Nothing is done where that is so already.
    pub fn seal(&self, disk: &str) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(disk)?;
        let empty = self.unchanged(&source)?.is_some();
        if !(empty && self.stands_on_its_own(&source)?) {
            self.seal_at_rest(&source, None)?;
            self.end_before(&source.name, None);
        }
        self.object(&source.name)
    }
    /// Is the layer below a disk one that has no name, and that nothing else stands on?
    fn stands_on_its_own(&self, disk: &Object) -> Result<bool> {
        let Some(below @ Below::Layer(_)) = disk.parent else {
            return Ok(false);
        };
        let graph = self.graph()?;
        Ok(!graph.unreadable
            && graph.names.get(&below).is_none_or(Vec::is_empty)
            && graph.children.get(&below).is_none_or(|c| c.len() <= 1))
    }
    /// [`Store::seal`] for an attached disk that `running` is.
    pub fn seal_open(&self, running: &CowDisk, disk: &str) -> Result<Object> {
        let _lock = self.lock(true)?;
        let source = self.resolve_locked(disk)?;
        let empty = running.private_blocks() == (0, 0);
        if !(empty && self.stands_on_its_own(&source)?) {
            self.seal_running(&source, running, None)?;
            self.end_before(&source.name, Some(running));
        }
        self.object(&source.name)
    }
}
