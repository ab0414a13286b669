//! Going back: `rollback`.

use crate::{
    cli::{Outcome, context::Context, names::Names, render::json::ObjectDoc},
    error::{Error, Kind},
};
use clap::Args;
use serde_json::json;

/// Let a disk show again what one of its snapshots holds
#[derive(Args, Debug)]
#[command(
    after_help = "What was written since is gone; newer snapshots stay. The disk may be attached, but not mounted or in use."
)]
pub(crate) struct Rollback {
    /// The disk and its snapshot
    #[arg(value_name = "DISK@NAME")]
    name: String,
}

impl Rollback {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let full = &self.name;
        let Some((disk, name)) = full.split_once('@') else {
            return Err(
                Error::new(Kind::Invalid, format!("`{full}` names no snapshot"))
                    .hint("write the disk and its snapshot: `forkdisk rollback DISK@NAME`; `forkdisk ls snapshots` shows them")
                    .into(),
            );
        };
        let store = context.open_to_change()?;
        let snapshot = store.may_roll_back(disk, name)?;
        let attached = context.daemon_of(&store, disk)?;
        if context.dry_run {
            if let Some((mut daemon, a)) = attached {
                daemon.hold_unused(&a)?;
            }
            let document =
                json!({"dry_run": true, "name": disk, "snapshot": full, "size": snapshot.size});
            return ui.answer(document, || format!("would roll {disk} back to {full}\n"));
        }
        let object = match attached {
            None => store.rollback(disk, name)?,
            Some((mut daemon, attached)) => {
                daemon
                    .roll_back(&attached, name)
                    .map_err(|e| match e.kind() {
                        Kind::Busy => e.context(format!("cannot roll {disk} back")),
                        _ => e,
                    })?
            }
        };
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::of(&store)?));
        }
        ui.talk(format_args!("rolled {disk} back to {full}"));
        Ok(())
    }
}
