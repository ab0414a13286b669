//! What was written to disks, as the superblocks of their layers tell.

use super::objects::object_target;
use super::{Below, Object, Store, layer_file};
use crate::error::Result;
use crate::io::Access;
use crate::layer::{read_header, recover};

/// Bytes that were written over the life of a disk, up to one of its layers, as of the last superblock of that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LifeWritten {
    /// By users of the disk.
    pub by_user: u64,
    /// To the files of its layers.
    pub to_host: u64,
}

impl Store {
    /// What was written to a disk, or to that of a snapshot or image up to there; `None` for a base. Of what is open for writing it is as of its last
    /// checkpoint.
    pub fn life_written(&self, object: &Object) -> Result<Option<LifeWritten>> {
        self.written_up_to(object_target(object))
    }
    /// [`Store::life_written`] of the disk that goes on above a layer; nothing where that cannot be told.
    pub(super) fn written_before(&self, below: Below) -> LifeWritten {
        self.written_up_to(below).ok().flatten().unwrap_or_default()
    }
    fn written_up_to(&self, below: Below) -> Result<Option<LifeWritten>> {
        let Below::Layer(id) = below else {
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
