//! What the server answers to each request of the control socket.

use super::changes::quota_change;
use super::conversation::Conversation;
use super::entry::Phase;
use super::protocol::{self, below_json, flag, number, object_json, text};
use super::server::{End, Server, not_attached};
use super::{Via, place_of};
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

impl Server {
    pub(super) fn answer(&self, request: &Value, conversation: &mut Conversation) -> Result<Value> {
        let begun = &mut conversation.begun;
        match text(request, "op")? {
            "hello" => {
                let version = number(request, "version")?;
                if version != protocol::VERSION {
                    return Err(Error::new(
                        Kind::Version,
                        format!(
                            "the daemon speaks version {} of the protocol, not {version}",
                            protocol::VERSION
                        ),
                    )
                    .hint("stop the daemon that an older or newer forkdisk started"));
                }
                let store = self.store.id().to_string();
                // Whoever says which one it means may go on without waiting for the answer.
                if request["store"]
                    .as_str()
                    .is_some_and(|meant| meant != store)
                {
                    return Err(Error::new(
                        Kind::Busy,
                        "the daemon in the run directory serves another store",
                    )
                    .path(place_of(&self.run_dir))
                    .hint("was the store copied? stop that daemon, or remove the copied run directory"));
                }
                Ok(json!({"store": store}))
            }
            "status" => Ok(json!({"status": self.status()})),
            "attached" => {
                let table = self.table.lock();
                let all: Vec<Value> = table
                    .values()
                    .filter(|e| e.phase != Phase::Opening)
                    .map(|e| self.shown(&e.attached)["attached"].take())
                    .collect();
                Ok(json!({"attached": all}))
            }
            "attach" => self.attach(request, conversation),
            "attach-done" => {
                let name = text(request, "name")?;
                let disk = self.table.lock().get(name).and_then(|e| e.disk.clone());
                if let Some(disk) = disk {
                    // Begun when it was opened, and long done.
                    disk.settle()?;
                }
                let mut table = self.table.lock();
                let entry = table.get_mut(name).ok_or_else(|| not_attached(name))?;
                let device = text(request, "device")?;
                entry.attached.device = Some(device.to_string());
                self.files.shown_as(entry.ino, Path::new(device));
                entry.dev = number(request, "dev")?;
                entry.set_phase(Phase::Ready);
                begun.retain(|b| b != name);
                tracing::info!(disk = name, device = entry.attached.device, "attached");
                Ok(self.shown(&entry.attached))
            }
            "attach-undo" => {
                let name = text(request, "name")?;
                begun.retain(|b| b != name);
                self.close(name)?;
                Ok(json!({}))
            }
            "detach" => self.detach(text(request, "target")?, flag(request, "force"), begun),
            "detach-undo" => {
                let name = text(request, "name")?;
                begun.retain(|b| b != name);
                if let Some(entry) = self.table.lock().get_mut(name) {
                    entry.set_phase(Phase::Ready);
                    if entry.attached.via == Via::Nbd && entry.phase == Phase::Ready {
                        self.exports.show(entry.ino);
                    }
                }
                Ok(json!({}))
            }
            "detach-done" => {
                let name = text(request, "name")?;
                begun.retain(|b| b != name);
                self.close(name)?;
                tracing::info!(disk = name, "detached");
                Ok(json!({}))
            }
            "snapshot" => {
                let (disk, name) = (text(request, "disk")?, text(request, "name")?);
                let running = self.running(disk)?;
                let message = request.get("message").and_then(Value::as_str);
                let object = self.store.snapshot_running(&running, disk, name, message)?;
                self.refresh(disk);
                Ok(json!({"object": object_json(&object)}))
            }
            op @ ("rollback" | "resize" | "fit" | "quota" | "used" | "rename" | "snapshots"
            | "waiting") => self.change(op, request),
            "commit" => {
                let (disk, name) = (text(request, "disk")?, text(request, "name")?);
                let running = self.running(disk)?;
                let message = request.get("message").and_then(Value::as_str);
                let object = self.store.commit_running(&running, disk, name, message)?;
                self.refresh(disk);
                Ok(json!({"object": object_json(&object)}))
            }
            "flush" => {
                self.running(text(request, "disk")?)?.flush()?;
                Ok(json!({}))
            }
            "settle" => {
                let disk = text(request, "disk")?;
                let running = self.running(disk)?;
                let below = self.store.settle_running(&running, disk)?;
                self.refresh(disk);
                Ok(json!({"state": below_json(below)}))
            }
            "create" => {
                let from = text(request, "from")?;
                let names = request
                    .get("names")
                    .and_then(Value::as_array)
                    .cloned()
                    .unwrap_or_default();
                let names: Vec<String> = names
                    .iter()
                    .filter_map(Value::as_str)
                    .map(String::from)
                    .collect();
                let running = self.running(from)?;
                let size = request.get("size").and_then(Value::as_u64);
                let settings = quota_change(&request["quota"]).settings()?;
                let objects = self
                    .store
                    .create_from_running_with(&running, from, &names, size, &settings)?;
                self.refresh(from);
                Ok(json!({"objects": objects.iter().map(object_json).collect::<Vec<_>>()}))
            }
            "stop" => {
                let table = self.table.lock();
                if !table.is_empty() {
                    let names: Vec<&str> = table.keys().take(8).map(String::as_str).collect();
                    let more = if table.len() > names.len() {
                        ", ..."
                    } else {
                        ""
                    };
                    return Err(Error::new(
                        Kind::Busy,
                        format!("attached: {}{more}", names.join(", ")),
                    )
                    .hint(
                        "`forkdisk detach --all` first; SIGTERM to the keeper detaches what it can",
                    ));
                }
                let keeper = self.keeper.load(SeqCst);
                if keeper == 0 {
                    return Err(Error::new(
                        Kind::Busy,
                        "the daemon is just getting another keeper",
                    )
                    .hint("try again in a moment"));
                }
                // If we die before we end, the next server ends in our place.
                self.handover.set_session(json!({
                    "negotiated": self.session.negotiated(),
                    "next_ino": self.files.next_ino(),
                    "servers": self.before + 1,
                    "ending": true,
                }))?;
                let _ = self.end.lock().send(End::Stop);
                Ok(json!({"keeper_pid": self.keeper.load(SeqCst)}))
            }
            "stats" => self.stats_said(),
            "metrics" => Ok(self.metrics_said()),
            "rechain" | "reclaim" | "seal" => self.answer_on_layers(request),
            "takeover" => self.leave(request),
            other => Err(Error::new(
                Kind::Invalid,
                format!("the daemon knows no request `{other}`"),
            )
            .hint("command and daemon may be of different versions: restart the daemon")),
        }
    }
}
