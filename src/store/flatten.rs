//! Making an object independent of all it stands on: its whole content becomes a base of its own (FORMAT.md, section 4, "Flatten").
//!
//! Always true: the topmost sealed layer keeps its id, and becomes an empty one over the new base, in one rename. The base is durable before
//! that. It has no name: the layer needs it, and so it goes with it.

mod copied;

use super::import::{BaseMeta, DIGEST_MAX, PIECE, RUNNING, Same, counted};
use super::names::TEMPORARY;
use super::{Below, Object, ObjectKind, Progress, Store};
use crate::chain::Chain;
use crate::disk::{CowDisk, Disk, Extent, Source, stretches};
use crate::error::{Error, Kind, Result};
use crate::io::Access;
use crate::layer::refer::Below as _;
use crate::layer::rewrite::{self, Measure};
use crate::units::{BLOCK, Id};
pub use copied::COPIED;
use copied::{Begun, Copy, STAGED};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a disk whose map is looked at together.
const STEP: u64 = 256 << 20;
/// So many bases are named whose counts are true over a new one.
const OTHERS: usize = 8;

/// What a flattening made.
#[derive(Clone, Debug)]
pub struct Flattened {
    /// The new base; `None` if the object stood on one of its own already.
    pub base: Option<Id>,
    /// Its SHA-256, where it was computed.
    pub digest: Option<String>,
    /// Bytes of data in it.
    pub bytes: u64,
    /// Bytes that were copied, or shared: less if an earlier attempt had copied some.
    pub copied: u64,
    /// Layers from the object down to the base, before.
    pub depth: u32,
    /// The same now.
    pub depth_after: u32,
    /// What the object stood on until now, and may be needed by nobody any more.
    pub former: Vec<Below>,
    /// Host bytes of the file that its topmost layer had until now: they are free when nobody has it open any more.
    pub replaced: u64,
}

impl Store {
    /// Fails if an object cannot be flattened, or its content would not fit on the host. Returns the bytes of data.
    pub fn plan_flatten(&self, object: &Object) -> Result<u64> {
        if object.kind == ObjectKind::Base {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{}` is a base: it stands on nothing", object.name),
            )
            .hint("flatten a disk, a snapshot, or an image that was committed"));
        }
        let bytes = self.usage(object)?.refer;
        let needs = bytes + bytes / 1024;
        if self.host_free().is_some_and(|free| free < needs) {
            // What an interrupted attempt left has its space already.
            let (_, chain, _) = self.to_flatten(&object.name)?;
            let left = self.left_bytes(&chain)?;
            self.must_fit("flattening", needs.saturating_sub(left))?;
        }
        Ok(bytes)
    }
    /// Makes the content of an object, as far as sealed layers hold it ([`Store::seal`]), a base of its own, on which it stands alone from then on.
    /// Nothing half-made stays if it fails; what was copied is kept if it is interrupted: the next flattening of the same goes on with it, whatever was
    /// written to the disk meanwhile, and `gc` removes it. Afterwards the daemon must be told ([`Store::rechain`]), and what the object stood on can go
    /// ([`Store::collect_former`]).
    pub fn flatten(&self, name: &str, progress: &dyn Progress) -> Result<Flattened> {
        let (object, chain, alone) = self.to_flatten(name)?;
        let above = u32::from(object.kind == ObjectKind::Disk);
        let depth = above + chain.depth() as u32;
        let Some(top) = chain.layers().first().filter(|_| !alone).cloned() else {
            return Ok(Flattened {
                base: None,
                digest: None,
                bytes: 0,
                copied: 0,
                depth,
                depth_after: depth,
                former: Vec::new(),
                replaced: 0,
            });
        };
        let mut former: Vec<Below> = chain.layers()[1..]
            .iter()
            .map(|layer| Below::Layer(layer.id()))
            .collect();
        former.push(Below::Base(chain.base().id()));
        former.extend(
            self.histories_through(&[top.id()])?
                .into_iter()
                .filter(|below| below.id() != top.id()),
        );
        let layer = self.begin_replacement(top.id())?;
        let begun = self.begin_base(&chain);
        let begun = begun.inspect_err(|_| self.drop_replacement(top.id()))?;
        let id = begun.id;
        let dir = &begun.dir;
        let done: Result<_> = (|| {
            let (copied, data) = self.copy_content(&begun, &chain, progress)?;
            let written = self.written_before(Below::Layer(top.id()));
            let header = top.header().over(id, false);
            let header = header.after(written.by_user, written.to_host);
            let label = self.label_of(top.id());
            let label = (label.as_deref(), top.size(), Some((data, id)));
            rewrite::write(
                &*layer,
                &header,
                label,
                &[],
                &Measure::default(),
                &mut |_| Ok(()),
            )?;
            let _lock = self.lock(true)?;
            // From here on the lock of the names keeps `gc` away.
            for file in [COPIED, STAGED, RUNNING] {
                if dir.entry(file)?.is_some() {
                    dir.remove(file)?;
                }
            }
            dir.sync()?;
            self.bases
                .rename_new(&format!("{TEMPORARY}{id}"), &id.to_string())?;
            self.bases.sync()?;
            Ok((copied, data, self.replace(&top, &*layer)?))
        })();
        match done {
            Ok(((digest, copied), data, replaced)) => {
                drop(chain);
                drop(top);
                self.forget_replaced();
                Ok(Flattened {
                    base: Some(id),
                    digest,
                    bytes: data * BLOCK,
                    copied,
                    depth,
                    depth_after: above + 1,
                    former,
                    replaced,
                })
            }
            Err(e) => {
                match e.kind() == Kind::Interrupted && begun.is_worth_keeping() {
                    true => self.drop_replacement(top.id()),
                    false => self.drop_base(id, &top),
                }
                // Whoever made garbage of it meanwhile could not remove what was open here.
                former.push(Below::Layer(top.id()));
                drop((chain, top, layer));
                self.forget_replaced();
                if let Err(e) = self.collect_former(&former) {
                    tracing::debug!("left to gc: {e}");
                }
                Err(e.context(format!("cannot flatten `{name}`")))
            }
        }
    }
    /// The object, its sealed layers, and whether it stands on a base of its own already.
    fn to_flatten(&self, name: &str) -> Result<(Object, Arc<Chain>, bool)> {
        let _lock = self.lock(false)?;
        let object = self.resolve_locked(name)?;
        let top = match (object.kind, object.parent) {
            (ObjectKind::Disk, Some(parent)) => parent,
            _ => super::objects::object_target(&object),
        };
        let chain = self.chain(top)?;
        let base = Below::Base(chain.base().id());
        let graph = self.graph()?;
        let unshared = graph.children.get(&base).is_none_or(|c| c.len() <= 1)
            && self.never_named(base.id())
            && graph.names.get(&base).is_none_or(Vec::is_empty);
        let empty = chain.layers().iter().all(|l| l.counts() == (0, 0));
        let alone = chain.depth() == 1 && empty && unshared;
        Ok((object, chain, alone))
    }
    /// Takes away a new base that came to nothing, and the file that was to replace the layer `top`: where the layer's name may have the new
    /// file, the base stays.
    fn drop_base(&self, id: Id, top: &crate::layer::ReadLayer) {
        if self.is_replaced(top) {
            return;
        }
        self.drop_replacement(top.id());
        self.remove_unfinished(id);
    }
    fn remove_unfinished(&self, id: Id) {
        for name in [format!("{TEMPORARY}{id}"), id.to_string()] {
            if let Ok(dir) = self.bases.subdir(&name) {
                // First what others go by.
                for file in ["meta", COPIED, STAGED, "sums", "image", RUNNING] {
                    let _ = dir.remove(file);
                }
                let _ = self.bases.remove_dir(&name);
            }
        }
    }
    /// Copies what a chain shows into the files of a new base; all of it is durable on return. The digest, how many bytes were copied, and how many
    /// blocks hold data now.
    fn copy_content(
        &self,
        begun: &Begun,
        chain: &Arc<Chain>,
        progress: &dyn Progress,
    ) -> Result<((Option<String>, u64), u64)> {
        let (id, dir) = (begun.id, &*begun.dir);
        let view = CowDisk::read_only(chain.clone());
        let size = view.size();
        let told = |e: Error| {
            match e.kind() {
            Kind::Interrupted => Error::new(Kind::Interrupted, "the flattening was interrupted").hint(
                "what it shows is as it was; run it again, and it goes on with what it has copied (`forkdisk gc` removes that)",
            ),
            _ => e,
        }
        };
        let mut copy =
            Copy::begin(begun, chain, &view, size <= DIGEST_MAX, progress).map_err(told)?;
        copy_rest(&mut copy, chain, &view).map_err(|e| {
            if e.kind() == Kind::Interrupted
                && let Err(e) = copy.note()
            {
                tracing::warn!("how far it came is not known: {e}");
            }
            told(e)
        })?;
        let bytes = copy.bytes;
        let digest = copy.sink.finish(id, size).map_err(told)?;
        let data = counted(&*dir.open("image", Access::Read)?, size)?;
        // Blocks of zeros became holes, and nothing else is another than it was: as many are the same ones.
        let before = chain.layers().first().and_then(|l| l.superblock().refer());
        let same = before.is_some_and(|(refer, over)| chain.counts_over(over) && refer == data);
        // A layer above may have been counted over any that came before the old one, if nobody wrote its superblock since.
        let mut counts_as = Vec::new();
        if same {
            let base = chain.base();
            counts_as = vec![base.id()];
            counts_as.extend(base.others().iter().take(OTHERS - 1));
        }
        let meta = BaseMeta {
            data: Some(data),
            counts_as,
            ..BaseMeta::copied(id, size, digest.clone())
        };
        // One that an earlier attempt left says other things.
        if dir.entry("meta")?.is_some() {
            dir.remove("meta")?;
        }
        let file = dir.open("meta", Access::CreateNew)?;
        file.write_at(&meta.encode((self.env.now)()), 0)?;
        file.sync()?;
        Ok(((digest, bytes), data))
    }
}

/// Copies what a chain shows from where the sink is to the end.
fn copy_rest(copy: &mut Copy<'_>, chain: &Chain, view: &CowDisk) -> Result<()> {
    let (from, size) = (copy.sink.at, view.size());
    let mut buf = vec![0; PIECE];
    let shares = copy.sink.shares();
    for step in (from..size).step_by(STEP as usize) {
        let extents = view.extents(step, STEP.min(size - step))?;
        let same: Vec<Same<'_>> = match shares {
            true => extents.iter().filter_map(|e| stands_in(chain, e)).collect(),
            false => Vec::new(),
        };
        for Range { start: mut at, end } in stretches(&extents) {
            while at < end {
                let n = (end - at).min(PIECE as u64) as usize;
                view.read(&mut buf[..n], at)?;
                copy.sink.hole(at)?;
                let first = same.partition_point(|s| s.at + s.len <= at);
                let last = same.partition_point(|s| s.at < at + n as u64);
                copy.sink.data_of(&buf[..n], &same[first..last])?;
                at += n as u64;
                copy.bytes += n as u64;
                copy.note_now_and_then()?;
            }
        }
    }
    copy.sink.hole(size)
}

/// The file that the bytes of an extent stand in, and where.
fn stands_in<'a>(chain: &'a Chain, extent: &Extent) -> Option<Same<'a>> {
    let Extent { at, len, from } = *extent;
    match from {
        Source::Layer { depth, slot } => Some(Same {
            at,
            len,
            file: &**chain.layers().get(depth as usize)?.file(),
            from: slot.at(),
        }),
        // A last block that is not whole is whole in the copy.
        Source::Base => Some(Same {
            at,
            len: len.min((chain.base().len() / BLOCK * BLOCK).saturating_sub(at)),
            file: &**chain.base().file(),
            from: at,
        }),
        _ => None,
    }
}
