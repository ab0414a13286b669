//! Requests that change attached disks, and what the command has to do beside: what waits for requests on a served file is never done by the server.

use super::Client;
use crate::attach::{self, LoopAttachment};
use crate::daemon::Attached;
use crate::daemon::changes::quota_json;
use crate::daemon::protocol::{attached, number, object};
use crate::error::{Error, Kind, Result};
use crate::store::{Object, QuotaChange};
use crate::sys::blockdev::Held;
use serde_json::{Value, json};
use std::path::Path;

/// What becomes of requests that wait for room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Waiting {
    /// They are left alone.
    Stay,
    /// They fail, and so do others from now on.
    Fail,
    /// Others wait again, if the quota says so.
    Wait,
}

impl Client {
    /// Rolls an attached disk back to its snapshot `name`. `Busy` if anybody uses the disk: what is in his caches would not be rolled back.
    pub fn roll_back(&mut self, disk: &Attached, name: &str) -> Result<Object> {
        // Held to the end: nobody mounts it meanwhile.
        let held = self.hold_unused(disk)?;
        if let Some(held) = &held {
            // What is dirty in the device's own cache belongs to what is left behind, and must not come later.
            held.drop_cache()?;
        }
        // Twice does no harm: the device is held, so nothing was written in between; and its size must follow, whoever answers.
        let answer = self.ask_again(json!({"op": "rollback", "disk": disk.name, "name": name}))?;
        if let Some(held) = &held {
            held.drop_cache()?;
        }
        self.tell_device(&answer)?;
        object(&answer["object"])
    }
    /// Holds the device of a disk, if it has one, so that nobody else begins to use it. `Busy` if anybody does.
    pub fn hold_unused(&mut self, disk: &Attached) -> Result<Option<Held>> {
        let device = disk.device.as_deref().map(Path::new);
        let server = self.status()?["server_pid"].as_i64().map(|pid| pid as i32);
        device
            .map(|device| attach::hold_unused(device, server))
            .transpose()
    }
    /// Makes an attached disk larger, and its device with it.
    pub fn resize(&mut self, disk: &str, size: u64) -> Result<Object> {
        let answer = self.ask_again(json!({"op": "resize", "disk": disk, "size": size}))?;
        self.tell_device(&answer)?;
        object(&answer["object"])
    }
    /// Lets the device of an attached disk have the disk's size, if it does not.
    pub fn fit(&mut self, disk: &str) -> Result<()> {
        let answer = self.ask_again(json!({"op": "fit", "disk": disk}))?;
        self.tell_device(&answer)
    }
    /// Lets the kernel ask for the size of a served file, and the device take it over.
    fn tell_device(&self, answer: &Value) -> Result<()> {
        let said = attached(&answer["attached"])?;
        // The kernel takes note of a file's size when somebody asks for it.
        let seen =
            std::fs::metadata(&said.file).map_err(|e| Error::io("look at", &said.file, &e))?;
        if seen.len() != said.size {
            return Err(Error::new(
                Kind::Io,
                format!(
                    "the disk has {} bytes, and the kernel shows {}",
                    said.size,
                    seen.len()
                ),
            )
            .path(&said.file)
            .hint("detach it and attach it again"));
        }
        let Some(device) = said.device else {
            return Ok(());
        };
        attach::resize_loop(
            &LoopAttachment {
                device: device.into(),
                dev: number(answer, "dev")?,
                ino: number(answer, "ino")?,
                read_only: said.read_only,
            },
            said.size,
        )
    }
    /// Changes the quota of an attached disk.
    pub fn set_quota(&mut self, disk: &str, change: &QuotaChange) -> Result<Object> {
        let request = json!({"op": "quota", "disk": disk, "quota": quota_json(change)});
        object(&self.ask_again(request)?["object"])
    }
    /// What an attached disk has for itself, in bytes, with what is not flushed yet.
    pub fn used(&mut self, disk: &str) -> Result<u64> {
        number(
            &self.ask_again(json!({"op": "used", "disk": disk}))?,
            "used",
        )
    }
    /// Renames something of which this, or a snapshot, is attached.
    pub fn rename(&mut self, old: &str, new: &str) -> Result<Object> {
        object(&self.ask(json!({"op": "rename", "old": old, "new": new}))?["object"])
    }
    /// Snapshots several disks at one instant, attached ones and others.
    pub fn snapshots(
        &mut self,
        wanted: &[(String, String)],
        message: Option<&str>,
    ) -> Result<Vec<Object>> {
        let pair = |(disk, name): &(String, String)| json!({"disk": disk, "name": name});
        let pairs: Vec<Value> = wanted.iter().map(pair).collect();
        let answer =
            self.ask(json!({"op": "snapshots", "snapshots": pairs, "message": message}))?;
        answer["objects"]
            .as_array()
            .map_or(Ok(Vec::new()), |list| list.iter().map(object).collect())
    }
    /// How many requests of an attached disk wait for room, and what becomes of them.
    pub fn waiting(&mut self, name: &str, then: Waiting) -> Result<u64> {
        let then = match then {
            Waiting::Stay => "stay",
            Waiting::Fail => "fail",
            Waiting::Wait => "wait",
        };
        number(
            &self.ask_again(json!({"op": "waiting", "name": name, "then": then}))?,
            "waiting",
        )
    }
}
