//! What objects cost and what they share.

use super::graph::Graph;
use super::objects::object_target;
use super::refer::Refer;
use super::{
    BaseInfo, Below, Damage, Details, Found, Object, ObjectKind, Store, Usage, layer_file,
    parent_of,
};
use crate::error::{Error, Kind, Result};
use crate::format::MAX_DEPTH;
use crate::io::Access;
use crate::layer::read_header;
use crate::units::{BLOCK, Id};
use std::os::unix::fs::MetadataExt;

impl Store {
    /// What the chain of an object consists of: its own layer first, the base last. The graph knows; a file is read only for the error
    /// that says what is wrong with it.
    fn chain_of(&self, object: &Object, graph: &Graph) -> Result<Vec<Below>> {
        let mut chain = vec![object_target(object)];
        while let Some(Below::Layer(id)) = chain.last().copied() {
            if chain.len() > MAX_DEPTH as usize + 1 {
                return Err(Error::new(Kind::Corrupt, "the chain of layers has no end").layer(id));
            }
            let known = graph.nodes.get(&Below::Layer(id)).and_then(|n| n.parent);
            chain.push(match known {
                Some(parent) => parent,
                None => self.parent_in_file(id)?,
            });
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
    /// Host bytes that the data of a base occupy, wherever it is.
    pub(super) fn base_data(&self, id: Id) -> Result<u64> {
        let meta = self.base_meta(id)?;
        if let Some(link) = &meta.link {
            let len = meta.len.next_multiple_of(BLOCK);
            // Gone or changed: looking goes on all the same.
            return Ok(
                std::fs::metadata(&link.path).map_or(len, |found| (found.blocks() * 512).min(len))
            );
        }
        let dir = self.bases.subdir(&id.to_string())?;
        Ok(dir
            .open("image", Access::Read)?
            .allocated()?
            .min(meta.len.next_multiple_of(BLOCK)))
    }
    /// Space of one object.
    pub fn usage(&self, object: &Object) -> Result<Usage> {
        let _lock = self.lock(false)?;
        self.usage_in(object, &self.graph()?, &mut Refer::default())
    }
    /// Space of several objects, with one look at the store.
    pub fn usages(&self, objects: Vec<Object>) -> Result<Found<(Object, Usage)>> {
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
        let mut found = Found::default();
        let mut refer = Refer::default();
        for object in objects {
            match self.usage_in(&object, &graph, &mut refer) {
                Ok(usage) => found.sound.push((object, usage)),
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                    let name = object.name;
                    found.damaged.push(Damage { name, error });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }
    fn usage_in(&self, object: &Object, graph: &Graph, refer: &mut Refer) -> Result<Usage> {
        let chain = self.chain_of(object, graph)?;
        let mut usage = Usage {
            size: object.size,
            ..Usage::default()
        };
        // What goes with this name alone: from its own layer down, as long as nothing else needs it.
        let mut alone = true;
        for (i, below) in chain.iter().enumerate() {
            let names = graph.names.get(below).map_or(0, Vec::len);
            let children = graph.children.get(below).map_or(0, Vec::len);
            alone = alone
                && if i == 0 {
                    names <= 1 && children == 0
                } else {
                    names == 0 && children == 1
                };
            let allocated = graph.nodes.get(below).map_or(0, |n| n.allocated);
            if alone {
                usage.exclusive += allocated;
            } else {
                usage.shared += match *below {
                    Below::Base(id) => refer.base_bytes(self, id)?,
                    Below::Layer(_) => allocated,
                };
            }
        }
        usage.refer = refer.blocks(self, &chain)? * BLOCK;
        Ok(usage)
    }
    /// All about one object.
    pub fn details(&self, object: &Object) -> Result<Details> {
        let _lock = self.lock(false)?;
        let graph = self.graph()?;
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
            usage: self.usage_in(object, &graph, &mut Refer::default())?,
            chain,
        })
    }
}
