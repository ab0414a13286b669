//! Requests that are about the past of attached disks.

use super::Client;
use crate::daemon::Attached;
use crate::daemon::past::rewound;
use crate::error::Result;
use crate::store::history::{Limits, Rewound};
use crate::store::past::Owner;
use crate::units::Id;
use serde_json::json;

/// The daemon as the one who has a disk open while its past is read.
pub struct PastOwner<'a> {
    /// The daemon.
    pub daemon: &'a mut Client,
    /// The disk.
    pub disk: &'a str,
}

impl Owner for PastOwner<'_> {
    fn hold(&mut self, layer: Id, point: u64) -> Result<()> {
        let request = json!({
            "op": "hold-point", "disk": self.disk, "layer": layer.to_string(), "point": point,
        });
        // The next server holds it as well, if nothing was read yet.
        self.daemon.ask_again(request).map(drop)
    }
    fn let_go(&mut self) {
        // Where the server is another one by now, nobody keeps it any more.
        let _ = self.daemon.try_ask(&json!({"op": "let-go"}));
    }
}

impl Client {
    /// Makes an attached disk what it was at point `number` of its history. `Busy` if anybody uses the disk: what is in his caches would not go back.
    pub fn rewind(&mut self, disk: &Attached, number: u64) -> Result<Rewound> {
        // Held to the end: nobody mounts it meanwhile.
        let held = self.hold_unused(disk)?;
        if let Some(held) = &held {
            // What is dirty in the device's own cache comes before, and can be gone back to.
            held.drop_cache()?;
        }
        // Twice does no harm: the disk is that point already.
        let answer = self.ask_again(json!({"op": "rewind", "disk": disk.name, "point": number}))?;
        if let Some(held) = &held {
            held.drop_cache()?;
        }
        rewound(&answer)
    }
    /// Lets an attached disk keep so much of its history from now on; `None`: nothing.
    pub fn set_history(&mut self, disk: &str, limits: Option<Limits>) -> Result<()> {
        let limits = limits.unwrap_or_default();
        let request = json!({
            "op": "history", "disk": disk, "window": limits.window, "bytes": limits.bytes,
        });
        self.ask_again(request).map(drop)
    }
}
