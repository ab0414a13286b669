//! What the server answers to requests that change attached disks: rollback, size, quota, name, and snapshots of several at once.

use super::entry::{Entry, Phase};
use super::protocol::{number, object_json, text};
use super::running::Running;
use super::server::{Server, in_transit, not_attached};
use super::{Via, file_name};
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::serve::nbd::Users;
use crate::store::{Member, QuotaChange};
use crate::sys::holders;
use crate::sys::process::Process;
use serde_json::{Value, json};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// Most processes that a message names.
const NAMED: usize = 5;

/// How long a user that is just leaving is waited for.
const LEAVING: Duration = Duration::from_millis(500);

impl Server {
    pub(super) fn change(&self, op: &str, request: &Value) -> Result<Value> {
        match op {
            "rollback" => self.roll_back(text(request, "disk")?, text(request, "name")?),
            "resize" => self.resize(text(request, "disk")?, number(request, "size")?),
            "quota" => {
                let disk = text(request, "disk")?;
                let change = quota_change(&request["quota"]);
                let running = self.running(disk)?;
                let object = self.store.set_quota(disk, change, Some(&running))?;
                Ok(json!({"object": object_json(&object)}))
            }
            "fit" => self.fit(request),
            "rename" => self.rename(text(request, "old")?, text(request, "new")?),
            "snapshots" => self.snapshots(request),
            "used" => {
                let disk = self.written_to(text(request, "disk")?)?;
                Ok(json!({"used": disk.used()}))
            }
            _ => self.waiting(text(request, "name")?, text(request, "then")?),
        }
    }

    fn roll_back(&self, disk: &str, name: &str) -> Result<Value> {
        let _unused = self.must_be_unused(disk)?;
        let running = self.running(disk)?;
        let done = self.store.rollback_running(&running, disk, name);
        // Also after a failure: it may have come late.
        self.refresh(disk);
        let object = done?;
        self.resized.store(true, SeqCst);
        let mut said = self.tell_size(disk, &running)?;
        said["object"] = object_json(&object);
        Ok(said)
    }
    /// Fails if anybody uses what is attached, as far as the command that asks cannot know.
    /// Of an export nobody can become a client as long as the result lives.
    pub(super) fn must_be_unused(&self, disk: &str) -> Result<Unused<'_>> {
        self.wait_for_clients(|e| e.attached.name == disk);
        let table = self.table.lock();
        let entry = table.get(disk).ok_or_else(|| not_attached(disk))?;
        match entry.attached.via {
            // Of a device the command knows who uses it.
            Via::Loop => Ok(Unused(self, 0)),
            Via::File => self.must_be_closed(entry).map(|()| Unused(self, 0)),
            Via::Nbd => {
                self.must_be_closed(entry)?;
                let hidden = self.exports.hold_unused(entry.ino);
                hidden.map_err(|users| in_use(entry, &users))?;
                Ok(Unused(self, entry.ino))
            }
        }
    }
    /// Gives users that just leave the time to do so: clients of NBD, and whoever closed a file, of which the kernel tells later.
    pub(super) fn wait_for_clients(&self, meant: impl Fn(&Entry) -> bool) {
        let table = self.table.lock();
        let entry = table.values().find(|e| meant(e));
        let used = entry.map(|e| (e.attached.via, e.ino));
        drop(table);
        let is_open = |ino| {
            let info = self.files.get(ino).and_then(|file| file.info());
            info.is_some_and(|info| info.opens > 0)
        };
        match used {
            Some((Via::Nbd, ino)) => {
                self.exports.connections(ino, LEAVING);
            }
            Some((Via::File, ino)) => {
                let deadline = Instant::now() + LEAVING;
                while is_open(ino) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            _ => {}
        }
    }
    /// Fails if anybody has the file of an attachment open.
    pub(super) fn must_be_closed(&self, entry: &Entry) -> Result<()> {
        let file = self.mount().join(file_name(&entry.attached));
        let opens = match entry.inherited {
            true => holders::of_file(&file).len() as u64,
            false => {
                let info = self.files.get(entry.ino).and_then(|f| f.info());
                info.map_or(0, |i| i.opens)
            }
        };
        if opens == 0 {
            return Ok(());
        }
        let file = file.display();
        Err(
            Error::new(Kind::Busy, format!("{file} is open {opens} times"))
                .hint(format!("`fuser -v {file}` names who has it open")),
        )
    }

    fn resize(&self, disk: &str, size: u64) -> Result<Value> {
        let running = self.running(disk)?;
        let object = self.store.resize_running(&running, disk, size)?;
        self.resized.store(true, SeqCst);
        let mut said = self.tell_size(disk, &running)?;
        said["object"] = object_json(&object);
        Ok(said)
    }
    /// Tells the kernel and the successor of a disk's present size; the command tells the device.
    pub(super) fn tell_size(&self, disk: &str, running: &CowDisk) -> Result<Value> {
        let (ino, mut said) = {
            let mut table = self.table.lock();
            let entry = table.get_mut(disk).ok_or_else(|| not_attached(disk))?;
            entry.attached.size = running.size();
            entry.noted();
            let mut said = self.shown(&entry.attached);
            said["dev"] = entry.dev.into();
            (entry.ino, said)
        };
        self.session.size_changed(ino)?;
        said["ino"] = ino.into();
        Ok(said)
    }

    /// What is attached is known by its name to commands and to the successor; its file keeps the name under which the kernel knows it.
    fn rename(&self, old: &str, new: &str) -> Result<Value> {
        // Held to the end, so that nothing is attached under either name meanwhile.
        let mut table = self.table.lock();
        let object = self.store.resolve(old)?;
        let disk = format!("{}@", object.name);
        let old = object.name;
        let concerned: Vec<String> = table
            .keys()
            .filter(|name| **name == old || name.starts_with(&disk))
            .cloned()
            .collect();
        if let Some(busy) = concerned.iter().find(|n| table[*n].phase != Phase::Ready) {
            return Err(in_transit(busy));
        }
        // Where the name is taken, that is what there is to say.
        let taken = self.store.resolve(new).is_ok_and(|o| o.name == new);
        if let Some(other) = table.get(new).filter(|_| !taken) {
            return Err(Error::new(
                Kind::Busy,
                format!("something else is attached under the name {new}"),
            )
            .hint(format!("`forkdisk detach {}` first", other.attached.name)));
        }
        let object = match table.contains_key(&old) {
            // It is held by us.
            true => self.store.rename_open(&old, new)?,
            false => self.store.rename(&old, new)?,
        };
        for name in concerned {
            let Some(mut entry) = table.remove(&name) else {
                continue;
            };
            let renamed = format!("{new}{}", &name[old.len()..]);
            if name == old {
                entry.attached.id = object.id;
            }
            entry.attached.name.clone_from(&renamed);
            entry.noted();
            tracing::info!(disk = renamed, former = name, "renamed");
            table.insert(renamed, entry);
        }
        Ok(json!({"object": object_json(&object)}))
    }

    fn snapshots(&self, request: &Value) -> Result<Value> {
        let mut wanted: Vec<(&str, &str, Option<Running<'_>>)> = Vec::new();
        for pair in request["snapshots"].as_array().into_iter().flatten() {
            let (disk, name) = (text(pair, "disk")?, text(pair, "name")?);
            let running = match self.running(disk) {
                Ok(running) => Some(running),
                Err(e) if e.kind() == Kind::NotFound => None,
                Err(e) => return Err(e),
            };
            wanted.push((disk, name, running));
        }
        let members: Vec<Member<'_>> = wanted
            .iter()
            .map(|(disk, name, running)| Member {
                disk,
                name,
                running: running.as_deref(),
            })
            .collect();
        let message = request.get("message").and_then(Value::as_str);
        let made = self.store.snapshot_group(&members, message);
        for (disk, _, running) in &wanted {
            if running.is_some() {
                self.refresh(disk);
            }
        }
        let objects: Vec<Value> = made?.iter().map(object_json).collect();
        Ok(json!({"objects": objects}))
    }

    /// How many requests of a disk wait for room; and what then becomes of those, and of others like them: `stay`, `fail`, or `wait` as the quota says.
    fn waiting(&self, name: &str, then: &str) -> Result<Value> {
        let (ino, disk) = {
            let table = self.table.lock();
            let entry = table.get(name).ok_or_else(|| not_attached(name))?;
            (entry.ino, entry.disk.clone())
        };
        let waiting = self.session.waiting(Some(ino)) + self.exports.waiting(Some(ino));
        match (disk, then) {
            (Some(disk), "fail") => disk.stop_waiting(),
            (Some(disk), "wait") => disk.wait_again(),
            _ => {}
        }
        Ok(json!({"waiting": waiting}))
    }
}

/// Something attached that nobody uses, and its number if it is an export, to which clients may connect again afterwards.
pub(super) struct Unused<'a>(&'a Server, u64);

impl Drop for Unused<'_> {
    fn drop(&mut self) {
        self.0.exports.release(self.1);
    }
}

/// Somebody uses an export.
pub(super) fn in_use(entry: &Entry, users: &Users) -> Error {
    let name = &entry.attached.name;
    let uri = entry.attached.uri().unwrap_or_else(|| "it".into());
    match users {
        Users::Connected(connections) => Error::new(
            Kind::Busy,
            format!("{name} is in use: {connections} connections over NBD"),
        )
        .hint(format!("end the programs that use {uri}")),
        Users::Expected(processes) => {
            let named: Vec<String> = processes
                .iter()
                .take(NAMED)
                .map(Process::to_string)
                .collect();
            let more = match processes.len() - named.len() {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            Error::new(
                Kind::Busy,
                format!(
                    "{name} is in use: {}{more} had it open over NBD when the last server ended, and may connect again",
                    named.join(", ")
                ),
            )
            .hint(format!(
                "end the programs that use {uri}; if they will not connect again, `forkdisk detach --force {name}`"
            ))
        }
    }
}

/// A change of a quota as it stands in a request.
pub(super) fn quota_change(said: &Value) -> QuotaChange {
    QuotaChange {
        bytes: match &said["bytes"] {
            Value::String(_) => Some(None),
            bytes => bytes.as_u64().map(Some),
        },
        waits: said["waits"].as_bool(),
    }
}

/// The inverse of [`quota_change`].
pub(super) fn quota_json(change: &QuotaChange) -> Value {
    json!({
        "bytes": match change.bytes {
            None => Value::Null,
            Some(None) => "none".into(),
            Some(Some(bytes)) => bytes.into(),
        },
        "waits": change.waits,
    })
}
