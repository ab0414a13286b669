//! Snapshots of several disks at one instant.
//!
//! Always true: of the attached ones none accepts a request between the moment at which the first is sealed and the one at which the last goes on. So
//! whatever one disk had acknowledged before another was asked for something is in the one snapshot if that is in the other.

use super::{Kept, Prepared, State, must_be};
use crate::disk::CowDisk;
use crate::disk::cow::Halted;
use crate::error::Result;
use crate::io::{Access, File};
use crate::layer::{Layer, ReadLayer, prune, read_header, volatile};
use crate::store::may::named_twice;
use crate::store::{Below, Object, Store, layer_file};
use crate::sys::shared::SharedMemory;
use std::sync::Arc;

/// A disk that is to have a snapshot together with others.
pub struct Member<'d> {
    /// The disk.
    pub disk: &'d str,
    /// The last part of the snapshot's name.
    pub name: &'d str,
    /// The disk itself, where it is attached for writing.
    pub running: Option<&'d CowDisk>,
}

/// What a member writes into.
enum Writer<'d> {
    AtRest(Box<Layer>),
    Running(Halted<'d>),
}

struct Part<'d> {
    disk: String,
    prepared: Prepared,
    writer: Writer<'d>,
}

impl Store {
    /// Snapshots several disks at one instant, attached ones and others; the snapshots, in the order of `members`. Nothing is changed if that fails
    /// before the first disk is sealed; after that, no snapshot is made, and the disks go on.
    pub fn snapshot_group(
        &self,
        members: &[Member<'_>],
        message: Option<&str>,
    ) -> Result<Vec<Object>> {
        let _lock = self.lock(true)?;
        let mut order: Vec<&Member<'_>> = members.iter().collect();
        order.sort_by_key(|m| m.disk);
        if let Some(twice) = order.windows(2).find(|pair| pair[0].disk == pair[1].disk) {
            return Err(named_twice(twice[0].disk));
        }
        let mut sources = Vec::new();
        for m in &order {
            let source = self.snapshot_source(m.disk, m.name, message)?;
            if let Some(running) = m.running {
                must_be(running, &source)?;
            }
            sources.push(source);
        }
        let parts = self.prepare_group(&order, sources, message)?;
        let sealed = self.seal_group(parts);
        for running in order.iter().filter_map(|m| m.running) {
            self.note_idle(running);
        }
        sealed?;
        members
            .iter()
            .map(|m| self.object(&format!("{}@{}", m.disk, m.name)))
            .collect()
    }
    /// All that the seals need, durable; and all disks halted, in the order of their names.
    fn prepare_group<'d>(
        &self,
        order: &[&Member<'d>],
        sources: Vec<Object>,
        message: Option<&str>,
    ) -> Result<Vec<Part<'d>>> {
        let mut prepared: Vec<(Prepared, Option<Layer>)> = Vec::new();
        let done = order.iter().zip(sources).try_for_each(|(m, source)| {
            let (source, layer) = match m.running {
                Some(_) => (source, None),
                None => {
                    // An interrupted snapshot may have left it sealed: then it is completed first.
                    let (layer, _) = self.open_top(&source, volatile::private()?)?;
                    (self.object(m.disk)?, Some(layer))
                }
            };
            match self.prepare(&source, Some(&Kept::snapshot(m.disk, m.name, message))) {
                Ok(made) => prepared.push((made, layer)),
                Err(e) => {
                    layer.iter().for_each(close_again);
                    return Err(e);
                }
            }
            // Most of the dirty data goes out while requests still run.
            m.running.map_or(Ok(()), CowDisk::flush_ahead)
        });
        if let Err(e) = done {
            for (made, layer) in &prepared {
                layer.iter().for_each(close_again);
                self.abandon(made);
            }
            return Err(e);
        }
        let halt = |(m, (prepared, layer)): (&&Member<'d>, (Prepared, Option<Layer>))| {
            let writer = match (layer, m.running) {
                (Some(layer), _) => Some(Writer::AtRest(Box::new(layer))),
                (None, Some(running)) => Some(Writer::Running(running.halt())),
                (None, None) => None,
            };
            writer.map(|writer| Part {
                disk: m.disk.to_string(),
                prepared,
                writer,
            })
        };
        Ok(order.iter().zip(prepared).filter_map(halt).collect())
    }
    /// Seals all, names all, and lets all go on.
    fn seal_group(&self, parts: Vec<Part<'_>>) -> Result<()> {
        let mut files = Vec::new();
        let mut failed = None;
        for part in &parts {
            let label = part.prepared.label.as_deref();
            let sealed = match &part.writer {
                Writer::AtRest(layer) => layer.close(State::Sealed, label).map(|()| None),
                Writer::Running(halted) => halted.seal(label).map(Some),
            };
            match sealed {
                Ok(file) => files.push(file),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        let sealed = files.len();
        if failed.is_some() {
            // Those that were not sealed go on as they are.
            for part in &parts[sealed..] {
                if let Writer::AtRest(layer) = &part.writer {
                    close_again(layer);
                }
                self.abandon(&part.prepared);
            }
        }
        // The snapshots before the disks: whatever a power cut leaves of these changes, each disk shows what it held.
        let staged = |snapshot: bool| {
            parts[..sealed].iter().flat_map(move |part| {
                let of = part.prepared.staged.iter();
                of.filter(move |(_, name)| (*name != part.disk) == snapshot)
            })
        };
        for (temporary, name) in staged(true) {
            if failed.is_some() {
                let _ = self.names.remove(temporary);
            } else {
                self.names.rename(temporary, name)?;
            }
        }
        for (temporary, name) in staged(false) {
            self.names.rename(temporary, name)?;
        }
        self.names.sync()?;
        if failed.is_some() {
            // They are no snapshots, and must not look like some that have lost their names.
            for (part, file) in parts.iter().zip(&files) {
                let file = match (&part.writer, file) {
                    (_, Some((file, _))) => file,
                    (Writer::AtRest(layer), None) => layer.file(),
                    (Writer::Running(_), None) => continue,
                };
                let done = read_header(&**file).and_then(|h| prune::unlabel(&**file, &h));
                if let Err(e) = done {
                    tracing::warn!(
                        disk = part.disk,
                        "a layer keeps the label of a snapshot that was not made: {e}"
                    );
                }
            }
        }
        for (part, file) in parts.into_iter().zip(files) {
            let (Writer::Running(halted), Some((file, memory))) = (part.writer, file) else {
                continue;
            };
            let (layer, chain) = self.layer_above(&part.disk, file, &part.prepared, memory)?;
            halted.go_on(layer, chain);
            self.note_opened(&part.disk);
        }
        failed.map_or(Ok(()), |e| {
            Err(e.or_hint("no snapshot was made; the disks go on"))
        })
    }
    /// What goes on above a layer that was just sealed: the layer that was prepared, and the chain below it.
    pub(super) fn layer_above(
        &self,
        disk: &str,
        sealed: Arc<dyn File>,
        prepared: &Prepared,
        memory: Arc<SharedMemory>,
    ) -> Result<(Layer, Arc<crate::chain::Chain>)> {
        // From the writer's lock to a reader's, on the same open file.
        sealed.lock(false)?;
        let sealed = Arc::new(ReadLayer::open(sealed)?);
        self.open_layers
            .lock()
            .insert(sealed.id(), Arc::downgrade(&sealed));
        let next = layer_file(prepared.next);
        let file = self.layers.open(&next, Access::Write)?;
        file.lock(true)?;
        let chain = self.chain(Below::Layer(sealed.id()))?;
        let keep = Store::keep_over(self.keep_of(disk)?, &chain);
        let layer = Layer::open_over(file, memory, keep, Some(chain.clone()))?;
        Ok((layer, chain))
    }
}

/// Closes a layer that is to stay as it is. Where that cannot be done the next opening recovers it.
fn close_again(layer: &Layer) {
    if let Err(e) = layer.close(State::Clean, None) {
        tracing::warn!(layer = %layer.id(), "not closed cleanly: {e}");
    }
}
