//! What was written into layers, as their superblocks tell.

use super::objects::object_target;
use super::{Below, Object, Store, layer_file};
use crate::error::Result;
use crate::io::Access;
use crate::layer::{read_header, recover};

/// Bytes that were written over the life of a layer, as of its last superblock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LifeWritten {
    /// By users of the disk.
    pub by_user: u64,
    /// To the layer's file.
    pub to_host: u64,
}

impl Store {
    /// What was written into an object's own layer; `None` for a base. Of a layer that is open for writing it is as of its last checkpoint.
    pub fn life_written(&self, object: &Object) -> Result<Option<LifeWritten>> {
        let Below::Layer(id) = object_target(object) else {
            return Ok(None);
        };
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        let header = read_header(&*file)?;
        let superblock = recover::superblock(&*file, &header)?.superblock;
        Ok(Some(LifeWritten {
            by_user: superblock.user_written.get(),
            to_host: superblock.host_written.get(),
        }))
    }
}
