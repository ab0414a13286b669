//! Giving back what a filesystem does not use: `trim`.

use crate::{
    attach,
    cli::{
        Outcome,
        context::{Context, mounts_of},
        render::size::Units,
    },
    daemon::{AttachRequest, Attached, Client, Via, Waiting},
    error::{Error, Kind, Result},
    store::{Object, ObjectKind, Store},
    sys::{mounts, signals},
};
use clap::Args;
use serde_json::json;
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

/// How much of a filesystem is looked at in one go: in between the user may interrupt.
const STEP: u64 = 8 << 30;

/// Give back the space of what the filesystem on a disk does not use
#[derive(Args, Debug)]
#[command(
    after_help = "A disk that is not mounted is mounted for it where nobody sees it, and not written to if that can be avoided.\n\
        Space of snapshots stays as it is."
)]
pub(crate) struct Trim {
    /// The disk
    disk: String,
}

impl Trim {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open_to_change()?;
        let object = store.resolve(&self.disk)?;
        let name = object.name.clone();
        if object.kind != ObjectKind::Disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{name}` is {}, not a disk", object.kind.one()),
            )
            .hint("only disks change")
            .into());
        }
        let present = context.daemon_of(&store, &name)?;
        if let Some((_, a)) = &present
            && a.read_only
        {
            return Err(
                Error::new(Kind::Busy, format!("`{name}` is attached read-only"))
                    .hint(format!("`forkdisk detach {name}` first"))
                    .into(),
            );
        }
        attach::may_attach_loops()?;
        if let Some((_, a)) = &present {
            device_of(a)?;
        }
        if context.dry_run {
            let document = json!({"dry_run": true, "name": name});
            return ui.answer(document, || {
                format!("would discard what the filesystem on {name} does not use\n")
            });
        }
        signals::catch();
        let freed = trim(context, &store, &object, present)?;
        if ui.json {
            return ui.document(json!({"name": name, "freed": freed, "dry_run": false}));
        }
        ui.talk(format_args!("{name}: freed {}", ui.size(freed)));
        Ok(())
    }
}

/// Does it; the bytes that became free.
fn trim(
    context: &Context,
    store: &Store,
    object: &Object,
    present: Option<(Client, Attached)>,
) -> Result<u64> {
    let used = || -> Result<u64> { Ok(store.quota(object)?.map_or(0, |q| q.used)) };
    let Some((_, attached)) = present else {
        let before = used()?;
        let running = Client::connect(store)?;
        let started = running.is_none();
        let mut daemon = match running {
            Some(daemon) => daemon,
            None => Client::connect_or_start(store, None)?,
        };
        let attached = daemon.attach(&AttachRequest {
            reference: object.name.clone(),
            via: Via::Loop,
            read_only: false,
            block_size: 512,
            passthrough: false,
        })?;
        // A journal is replayed before anything is freed: where the quota leaves no room for that, it fails instead of waiting.
        let refused = daemon.waiting(&attached.name, Waiting::Fail);
        let done = refused.and_then(|_| visit(context, store, object, &attached));
        let detached = daemon.detach(&attached.name);
        if started && let Err(e) = daemon.stop() {
            tracing::debug!("the daemon goes on: {e}");
        }
        done?;
        detached?;
        return Ok(before.saturating_sub(used()?));
    };
    // What is not flushed is not counted.
    let flush = || -> Result<()> {
        let device = device_of(&attached)?;
        let open = fs::File::open(device).and_then(|open| open.sync_all());
        open.map_err(|e| attach::or_detached(device, Error::io("flush", device, &e)))
    };
    flush()?;
    let before = used()?;
    match mounts_of(&attached)?.first() {
        Some(dir) => whole(context, object, dir)?,
        None => visit(context, store, object, &attached)?,
    }
    flush()?;
    Ok(before.saturating_sub(used()?))
}

fn device_of(attached: &Attached) -> Result<&Path> {
    attached.device.as_deref().map(Path::new).ok_or_else(|| {
        Error::new(
            Kind::Busy,
            format!("`{}` is attached as a file", attached.name),
        )
        .hint("mount the file and use `fstrim`; or detach it, and try again")
    })
}

/// A directory on which a filesystem is mounted for a while.
struct Place {
    dir: PathBuf,
    mounted: bool,
}

impl Place {
    fn new(store: &Store) -> Result<Place> {
        let dir = store.run_dir().join(format!("trim.{}", std::process::id()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(|e| Error::io("create", &dir, &e))?;
        Ok(Place {
            dir,
            mounted: false,
        })
    }
    fn mount(&mut self, device: &Path, read_only: bool) -> Result<()> {
        let options = mounts::Options {
            read_only,
            ..mounts::Options::default()
        };
        attach::mount(device, &self.dir, &options)?;
        self.mounted = true;
        Ok(())
    }
    fn unmount(&mut self) -> Result<()> {
        if std::mem::take(&mut self.mounted) {
            attach::unmount(&self.dir)?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = self.unmount() {
            tracing::warn!("{e}");
            let _ = mounts::unmount_lazily(&self.dir);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Mounts the filesystem where nobody sees it, trims it, and unmounts it.
fn visit(context: &Context, store: &Store, object: &Object, attached: &Attached) -> Result<()> {
    let device = device_of(attached)?;
    let mut place = Place::new(store)?;
    place.mount(device, true).map_err(|e| match e.kind() {
        Kind::Unsupported => e.context(format!("there is no filesystem on {}", object.name)),
        _ => e,
    })?;
    let done = match whole(context, object, &place.dir) {
        Err(e)
            if matches!(
                e.kind(),
                Kind::ReadOnly | Kind::Permission | Kind::Unsupported
            ) =>
        {
            context.ui.warn(format_args!(
                "the filesystem on {} discards nothing while it is mounted read-only: it is mounted for writing",
                object.name
            ));
            place.unmount()?;
            place.mount(device, false)?;
            whole(context, object, &place.dir)
        }
        done => done,
    };
    let unmounted = place.unmount();
    done.and(unmounted)
}

/// Trims a mounted filesystem, step by step.
fn whole(context: &Context, object: &Object, dir: &Path) -> Result<()> {
    let progress = context.ui.progress("trimming");
    for start in (0..object.size).step_by(STEP as usize) {
        if !progress.update(start, object.size) {
            return Err(Error::new(Kind::Interrupted, "interrupted")
                .hint("what was trimmed so far is; run it again for the rest"));
        }
        match attach::trim(dir, start, STEP)? {
            Some(bytes) => {
                tracing::debug!("{} from {start} on", Units::Iec.show(bytes));
            }
            // The filesystem is smaller than the disk.
            None => break,
        }
    }
    Ok(())
}
