//! A disk's changes as an image: `commit`.

use crate::{
    cli::{
        Outcome,
        context::{Context, mounts_of},
        names::Names,
        render::json::ObjectDoc,
        snapshot::ready_to_freeze,
    },
    daemon::Client,
    error::Result,
    store::{Object, Store},
    sys::{
        freeze::{self, Frozen},
        signals,
    },
};
use clap::Args;
use serde_json::json;

/// Publish the present state of a disk as an image, also while it is mounted and busy
#[derive(Args, Debug)]
#[command(
    after_help = "No data moves: the disk's own layer becomes the image, and the disk goes on above it. The base is never written.\n\
        Of a mounted disk it is consistent as after a power cut, and a journal brings it in order; with --freeze its filesystem is clean."
)]
pub(crate) struct Commit {
    /// The disk
    disk: String,
    /// The new image
    #[arg(value_name = "NAME")]
    name: String,
    /// What to remember about it
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Halt the mounted filesystem for the moment
    #[arg(long)]
    freeze: bool,
}

impl Commit {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let (disk, name) = (&context.disk_name(&store, &self.disk)?, &self.name);
        if context.dry_run {
            store.may_commit(disk, name, self.message.as_deref())?;
            let document = json!({"dry_run": true, "name": name, "disk": disk});
            return ui.answer(document, || format!("would make {name} of {disk}\n"));
        }
        let message = self.message.as_deref();
        let (object, thawed) = kept(
            context,
            &store,
            disk,
            self.freeze,
            || store.commit(disk, name, message),
            |daemon| daemon.commit(disk, name, message),
        )?;
        thawed?;
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::of(&store)?));
        }
        ui.talk(format_args!("made {} of {disk}", object.name));
        Ok(())
    }
}

/// Keeps the present state of a disk: at rest in one way, by its daemon in another. The inner result tells whether the filesystem
/// stayed frozen for it.
fn kept(
    context: &Context,
    store: &Store,
    disk: &str,
    freeze: bool,
    at_rest: impl FnOnce() -> Result<Object>,
    running: impl FnOnce(&mut Client) -> Result<Object>,
) -> Result<(Object, Result<()>)> {
    let Some((mut daemon, attached)) = context.daemon_of(store, disk)? else {
        return Ok((at_rest()?, Ok(())));
    };
    let mounts = if freeze {
        mounts_of(&attached)?
    } else {
        Vec::new()
    };
    if freeze && mounts.is_empty() {
        context.ui.warn(format_args!(
            "{disk} is not mounted here: there is nothing to freeze"
        ));
    }
    if freeze {
        ready_to_freeze(&mut daemon, &[disk], &mounts[..mounts.len().min(1)])?;
    }
    // All mounts of one device show one filesystem. From here to the thaw nothing may be written
    // that could end up on it, not even a line of talk.
    signals::catch();
    let frozen = mounts.first().map(|dir| freeze::freeze(dir)).transpose()?;
    let made = running(&mut daemon);
    let thawed = frozen.map_or(Ok(()), Frozen::thaw);
    Ok((made?, thawed))
}
