//! What is attached, and how a server takes it over from the last one.
//!
//! Always true: the handover says of an entry what the entry says, and says it first.

use super::handover::{Handover, Place};
use super::protocol::{attached, attached_json, number, text};
use super::running::TakenUp;
use super::{Attached, Via, file_name};
use crate::disk::{CowDisk, Disk, FailedDisk};
use crate::error::{Error, Kind, Result};
use crate::serve::files::Files;
use crate::store::{Object, ObjectKind, Store};
use crate::sys::process::Process;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a disk may be held by a command that found it free between two servers.
const HELD: Duration = Duration::from_secs(30);

/// Where an attachment stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Being attached by a command.
    Opening,
    /// Attached.
    Ready,
    /// Being detached by a command.
    Closing,
}

pub(super) struct Entry {
    pub(super) attached: Attached,
    pub(super) block_size: u64,
    pub(super) ino: u64,
    pub(super) dev: u64,
    pub(super) disk: Option<Arc<CowDisk>>,
    pub(super) phase: Phase,
    /// The number of the file that the kernel reads in its place. It belongs to the mount, and so to all servers.
    pub(super) backing: Option<u32>,
    /// Where the successor finds it.
    pub(super) place: Place,
    /// Somebody is closing it, and takes it out of the table: nobody else may. What went wrong is put here.
    pub(super) going: Option<Arc<Mutex<Option<Error>>>>,
    /// It was attached by a predecessor: who has its file open is not known from requests.
    pub(super) inherited: bool,
    /// The command that attaches or detaches it talked to a predecessor, and has not come back yet.
    pub(super) orphan: bool,
    /// Processes that use it over NBD, as far as they were told of.
    pub(super) clients: Vec<Process>,
    /// Why it could not be opened again after a takeover.
    pub(super) failed: Option<Error>,
    /// How many are changing it, if it is attached read-only.
    pub(super) taken_up: TakenUp,
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Phase::Opening => "opening",
            Phase::Ready => "ready",
            Phase::Closing => "closing",
        }
    }
}

impl Entry {
    /// Leaves word of it for a successor.
    pub(super) fn note(&self) -> Result<()> {
        let mut said = attached_json(&self.attached);
        said["block_size"] = self.block_size.into();
        said["ino"] = self.ino.into();
        said["dev"] = self.dev.into();
        said["backing"] = self.backing.into();
        said["phase"] = self.phase.word().into();
        if !self.clients.is_empty() {
            let clients = self.clients.iter().map(|c| json!([c.pid, c.started]));
            said["clients"] = clients.collect();
        }
        self.place.write(&said)
    }
    pub(super) fn set_phase(&mut self, phase: Phase) {
        if phase == Phase::Ready && self.going.is_some() {
            // Too late.
            return;
        }
        self.phase = phase;
        self.orphan = false;
        self.noted();
    }
    pub(super) fn noted(&self) {
        if let Err(e) = self.note() {
            tracing::warn!(disk = self.attached.name, "{e}");
        }
    }
}

/// Opens again what the last server had attached. What cannot be opened gives errors, and does not keep the rest from going on.
pub(super) fn inherit(
    store: &Store,
    files: &Files,
    handover: &Arc<Handover>,
) -> Result<BTreeMap<String, Entry>> {
    let left = Mutex::new(handover.left()?.into_iter());
    let table = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let next = left.lock().next();
                    let Some((place, said)) = next else { return };
                    match inherit_one(store, files, place, &said) {
                        Ok(Some(entry)) => {
                            let name = entry.attached.name.clone();
                            table.lock().insert(name, entry);
                        }
                        Ok(None) => {}
                        Err(e) => tracing::error!("an attachment cannot be taken over: {e}"),
                    }
                }
            });
        }
    });
    Ok(table.into_inner())
}

fn inherit_one(store: &Store, files: &Files, place: Place, said: &Value) -> Result<Option<Entry>> {
    let mut attached = attached(said)?;
    let ino = number(said, "ino")?;
    if ino == 0 {
        // Nobody ever saw its file.
        place.release();
        return Ok(None);
    }
    let phase = match text(said, "phase")? {
        "ready" => Phase::Ready,
        "opening" => Phase::Opening,
        _ => Phase::Closing,
    };
    // The last server may have died before it could leave word of a new name.
    if let Ok(Some(present)) = store.present_name(&attached.name, attached.kind, attached.id) {
        attached.name = present;
    }
    let name = file_name(&attached).to_string_lossy().into_owned();
    let backing = said["backing"].as_u64().map(|id| id as u32);
    let show = |disk| match backing {
        Some(id) => files.add_backed(&name, disk, Some(ino), id).map(|_| ()),
        None => files.add_with_ino(&name, disk, ino),
    };
    let opened = reopen(store, &attached, &place);
    let (disk, failed) = match opened {
        Ok(disk) => {
            show(disk.clone())?;
            attached.size = disk.size();
            // A disk writes into another layer after each snapshot, of which the last server may not have left word.
            if attached.kind == ObjectKind::Disk {
                attached.id = disk.top_layer().unwrap_or(attached.id);
            }
            (Some(disk), None)
        }
        Err(e) => {
            tracing::error!(
                disk = name,
                "cannot be taken over, gives errors from now on: {e:?}"
            );
            let disk = FailedDisk::new(attached.size, e.clone());
            show(Arc::new(disk))?;
            (None, Some(e))
        }
    };
    if let Some(device) = &attached.device {
        files.shown_as(ino, Path::new(device));
    }
    Ok(Some(Entry {
        attached,
        block_size: number(said, "block_size")?,
        ino,
        dev: number(said, "dev")?,
        disk,
        phase,
        backing,
        place,
        going: None,
        inherited: true,
        orphan: phase != Phase::Ready,
        clients: clients(said),
        failed,
        taken_up: TakenUp::default(),
    }))
}

/// The processes that used it over NBD.
fn clients(said: &Value) -> Vec<Process> {
    let clients = said["clients"].as_array().into_iter().flatten();
    let known = clients.filter_map(|c| {
        Some(Process {
            pid: c[0].as_i64()? as i32,
            started: c[1].as_u64()?,
        })
    });
    known.collect()
}

fn reopen(store: &Store, attached: &Attached, place: &Place) -> Result<Arc<CowDisk>> {
    let deadline = Instant::now() + HELD;
    loop {
        match open_again(store, attached, place) {
            // A command looks at it, which found it free. Its users wait as long as they would for a slow disk.
            Err(e) if e.kind() == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Opens what a predecessor had attached, with all that it had accepted. `Busy` while another process has it.
pub(super) fn open_again(
    store: &Store,
    attached: &Attached,
    place: &Place,
) -> Result<Arc<CowDisk>> {
    // It may have another size than it had: the server may have died before it could leave word of that.
    if attached.read_only {
        store.open_cow(
            &Object {
                name: attached.name.clone(),
                kind: attached.kind,
                id: attached.id,
                size: attached.size,
                parent: None,
                created: 0,
                message: None,
            },
            false,
        )
    } else {
        store.resume_cow(&attached.name, place.volatile()?)
    }
}

/// One more user of what is attached read-only already.
pub(super) fn share(
    entry: &mut Entry,
    object: &Object,
    read_only: bool,
    via: Via,
    block_size: u64,
    passthrough: bool,
) -> Result<()> {
    let a = &mut entry.attached;
    let place = a
        .device
        .clone()
        .unwrap_or_else(|| a.file.display().to_string());
    if !(a.read_only && read_only) {
        return Err(Error::new(
            Kind::Busy,
            format!("{} is attached already, as {place}", object.name),
        )
        .hint(format!(
            "use {place}, or `forkdisk detach {}` first",
            object.name
        )));
    }
    if a.via != via
        || a.passthrough != passthrough
        || (via == Via::Loop && entry.block_size != block_size)
    {
        return Err(Error::new(
            Kind::Busy,
            format!(
                "{} is attached already, in another way, as {place}",
                object.name
            ),
        )
        .hint("attach it in the same way to share it"));
    }
    a.count += 1;
    entry.noted();
    Ok(())
}
