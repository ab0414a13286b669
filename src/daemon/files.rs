//! Which files differ between two objects: both become devices for as long as it takes.

use super::{AttachRequest, Client, Via};
use crate::attach::files::{ChangedFile, Summary};
use crate::attach::{self, files};
use crate::error::{Error, Kind, Result};
use crate::store::{Object, Store};
use std::ops::Range;
use std::path::Path;

/// Tells `each` the paths that differ between the filesystems, ext4 or xfs, of two objects: those of a directory, then those in its
/// directories. `ranges` are the bytes in which `upper` differs from `lower`: disjoint, in order. Both are attached read-only meanwhile, and
/// detached again whatever happens; a daemon that was started for it is stopped.
pub fn changed_files(
    store: &Store,
    upper: &Object,
    lower: &Object,
    ranges: &[Range<u64>],
    cancelled: &dyn Fn() -> bool,
    each: &mut dyn FnMut(ChangedFile) -> Result<()>,
) -> Result<Summary> {
    attach::may_attach_loops()?;
    let running = Client::connect(store)?;
    let started = running.is_none();
    let mut client = match running {
        Some(client) => client,
        None => Client::connect_or_start(store, None)?,
    };
    let mut devices = Vec::new();
    let mut found = Ok(Summary::default());
    for object in [upper, lower] {
        match attach_to_look(&mut client, object) {
            Ok(device) => devices.push(device),
            Err(e) => {
                found = Err(e);
                break;
            }
        }
    }
    if let [upper, lower] = &devices[..] {
        let (upper, lower) = (Path::new(upper), Path::new(lower));
        found = files::changed_files(upper, lower, ranges, cancelled, each);
    }
    for device in devices.iter().rev() {
        if let Err(e) = client.detach(device) {
            tracing::warn!("{device} stays attached: {e}");
        }
    }
    if started && let Err(e) = client.stop() {
        tracing::debug!("the daemon goes on: {e}");
    }
    found
}

/// Attaches an object read-only, and returns its device.
fn attach_to_look(client: &mut Client, object: &Object) -> Result<String> {
    let request = AttachRequest {
        reference: object.name.clone(),
        via: Via::Loop,
        read_only: true,
        block_size: 512,
        passthrough: false,
    };
    let attached = client.attach(&request).map_err(|e| match e.kind() {
        Kind::Busy => e.hint(format!(
            "`forkdisk snapshot {}@NAME` keeps the state of a disk that is in use: compare that",
            object.name
        )),
        _ => e,
    })?;
    let none = || Error::new(Kind::Io, "the daemon names no device");
    attached.device.ok_or_else(none)
}
