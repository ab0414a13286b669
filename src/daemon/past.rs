//! What the server answers to requests that are about the past of attached disks: points that are held while a command reads them, going back, and how
//! much is kept.
//!
//! Always true: a point is held no longer than the conversation in which that was asked for lasts.

use super::protocol::{number, text};
use super::server::Server;
use crate::error::{Error, Kind, Result};
use crate::layer::history::Hold;
use crate::store::history::{At, Limits, Point, Rewound};
use crate::units::Id;
use serde_json::{Value, json};
use std::sync::Arc;

impl Server {
    /// The answer, if the request is about the past. `held`: what the conversation holds.
    pub(super) fn answer_on_past(
        &self,
        request: &Value,
        held: &mut Option<Arc<Hold>>,
    ) -> Option<Result<Value>> {
        let done = match request["op"].as_str()? {
            "hold-point" => self.hold_point(request).map(|now| {
                *held = Some(now);
                json!({})
            }),
            "let-go" => {
                *held = None;
                Ok(json!({}))
            }
            "rewind" => self.rewind(request),
            "history" => self.set_history(request),
            _ => return None,
        };
        Some(done)
    }
    fn hold_point(&self, request: &Value) -> Result<Arc<Hold>> {
        let disk = self.written_to(text(request, "disk")?)?;
        let own = Id::parse(text(request, "layer")?)
            .ok_or_else(|| Error::new(Kind::Invalid, "a layer is named by its id"))?;
        disk.hold_point(own, number(request, "point")?)
    }
    fn rewind(&self, request: &Value) -> Result<Value> {
        let disk = text(request, "disk")?;
        let _unused = self.must_be_unused(disk)?;
        // The point must not go because it is looked for.
        let running = self.running_with(disk, true)?;
        let at = At::Number(number(request, "point")?);
        let done = self.store.rewind_running(&running, disk, at)?;
        Ok(rewound_json(&done))
    }
    fn set_history(&self, request: &Value) -> Result<Value> {
        let disk = text(request, "disk")?;
        let running = self.running(disk)?;
        let limits = Limits {
            window: request["window"].as_u64(),
            bytes: request["bytes"].as_u64(),
        };
        let limits = (limits != Limits::default()).then_some(limits);
        self.store.set_history_running(&running, disk, limits)?;
        Ok(json!({}))
    }
}

fn rewound_json(done: &Rewound) -> Value {
    json!({
        "point": done.point.number, "time": done.point.time, "blocks": done.blocks, "undoable": done.undoable,
    })
}

/// The inverse of [`rewound_json`].
pub(super) fn rewound(said: &Value) -> Result<Rewound> {
    Ok(Rewound {
        point: Point {
            number: number(said, "point")?,
            time: number(said, "time")?,
            changed: 0,
            held: 0,
        },
        blocks: number(said, "blocks")?,
        undoable: said["undoable"].as_bool().unwrap_or(true),
    })
}
