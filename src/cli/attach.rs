//! Using disks: `attach`, `detach`.
//!
//! Mounting happens here and not in the daemon: a mount belongs to the mount namespace of the caller.

use crate::{
    attach,
    cli::{
        Outcome, Stop,
        context::{Context, mounts_in, mounts_of},
        list::shown_at,
        render::json::AttachedDoc,
    },
    daemon::{self, AttachRequest, Attached, Client, Dead, Transport, Via, Waiting},
    error::{Error, Kind, Result},
    store::{ObjectKind, Store},
    sys::{idle, mounts, signals},
    units::Id,
};
use clap::{Args, ValueEnum, ValueHint};
use serde::Serialize;
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

/// After so long it is asked why an unmount takes its time.
const PATIENCE: Duration = Duration::from_secs(1);

/// How a disk is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
enum Door {
    /// As a block device
    #[default]
    Loop,
    /// As a file only
    File,
    /// As an export of a Unix socket (NBD); prints its URI
    Nbd,
}

/// How the daemon gets its requests from the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Way {
    /// From /dev/fuse: works everywhere, and disks survive the death of the server
    Device,
    /// Over io_uring: quicker, but if the server dies attached disks give I/O errors
    #[value(name = "io_uring")]
    IoUring,
}

/// The option of all commands that may start a daemon.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct TransportArg {
    /// How the daemon gets its requests from the kernel [default: device]
    #[arg(long, value_enum, env = "FORKDISK_TRANSPORT", hide_env = true)]
    transport: Option<Way>,
}

impl TransportArg {
    /// What was asked for, if anything was.
    fn wanted(self) -> Option<Transport> {
        self.transport.map(|way| match way {
            Way::Device => Transport::Device,
            Way::IoUring => Transport::IoUring,
        })
    }
    pub(crate) fn or_default(self) -> Transport {
        self.wanted().unwrap_or_default()
    }
}

/// Make a disk usable as a block device, a file or an NBD export; prints which
#[derive(Args, Debug)]
#[command(
    after_help = "Snapshots and images are attached read-only; all their users share one device.\n\
        What reads only /dev/... can be given the device, what reads files the file."
)]
pub(crate) struct Attach {
    /// A disk, snapshot or image
    #[arg(value_name = "REF")]
    reference: String,
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    via: Door,
    /// Refuse writes
    #[arg(long)]
    ro: bool,
    /// Also mount its filesystem on this directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    mount: Option<PathBuf>,
    /// Size of the device's sectors; 4096 is faster, and only for a filesystem made for it
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = ["512", "4096"])]
    block_size: String,
    /// Let the kernel read the image by itself: quicker, but its checksums are not verified
    #[arg(long)]
    passthrough: bool,
    #[command(flatten)]
    transport: TransportArg,
}

#[derive(Serialize)]
struct AttachDoc {
    dry_run: bool,
    #[serde(flatten)]
    attached: AttachedDoc,
    mount: Option<PathBuf>,
}

impl Attach {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let via = match self.via {
            Door::Loop => Via::Loop,
            Door::File => Via::File,
            Door::Nbd => Via::Nbd,
        };
        let mount = self.mount.as_deref().map(mount_point).transpose()?;
        if mount.is_some() && via != Via::Loop {
            return Err(
                Error::new(Kind::Invalid, "only a block device can be mounted")
                    .hint("leave out --via, or mount the file later")
                    .into(),
            );
        }
        let store = context.open()?;
        let allowed = || {
            let object = store.resolve(&self.reference)?;
            if self.passthrough {
                daemon::may_pass_through(&object)?;
            }
            Ok(object)
        };
        if context.dry_run {
            let object = allowed()?;
            let document = json!({"dry_run": true, "name": object.name, "id": object.id.to_string(), "mount": mount});
            return ui.answer(document, || match &mount {
                Some(dir) => format!(
                    "would attach {} and mount it on {}\n",
                    object.name,
                    dir.display()
                ),
                None => format!("would attach {}\n", object.name),
            });
        }
        if via == Via::Loop {
            attach::may_attach_loops()?;
        }
        signals::catch();
        let request = AttachRequest {
            reference: self.reference.clone(),
            via,
            read_only: self.ro,
            block_size: if self.block_size == "4096" { 4096 } else { 512 },
            passthrough: self.passthrough,
        };
        // A daemon that runs looks for itself; none is started for what will be refused.
        let before = || allowed().map(drop);
        let (mut daemon, attached) =
            Client::attach_or_start(&store, self.transport.wanted(), &request, before)?;
        if let Err(stop) = finish(context, &attached, mount.as_deref()) {
            undo(&mut daemon, &attached, mount.as_deref());
            return Err(stop);
        }
        Ok(())
    }
}

/// Mounts and prints what was attached.
fn finish(context: &Context, attached: &Attached, mount: Option<&Path>) -> Outcome {
    let ui = &context.ui;
    if let Some(dir) = mount {
        if signals::caught() {
            return Err(Error::new(Kind::Interrupted, "interrupted").into());
        }
        let options = mounts::Options {
            read_only: attached.read_only,
            ..mounts::Options::default()
        };
        let device = attached.device.as_deref().map(Path::new);
        let device = device.ok_or_else(|| Error::new(Kind::Io, "the daemon names no device"))?;
        let mounted = attach::mount(device, dir, &options)
            .map_err(|e| e.or_hint("`mkfs.ext4 $(forkdisk attach DISK)` makes a filesystem"))?;
        if mounted.without_journal {
            ui.warn(format_args!(
                "{} is read-only and its journal needs a replay: what is in the journal only is not seen \
                 (of a snapshot with --freeze that is nothing; XFS asks for the replay all the same); \
                 a fork of it shows everything",
                attached.name
            ));
        }
    }
    if ui.json {
        let places = mounts_of(attached).unwrap_or_default();
        return ui.document(AttachDoc {
            dry_run: false,
            attached: AttachedDoc::new(attached, &places),
            mount: mount.map(Path::to_path_buf),
        });
    }
    ui.data(format!("{}\n", shown_at(attached)))
}

/// Takes back an attachment that could not be finished.
fn undo(daemon: &mut Client, attached: &Attached, mount: Option<&Path>) {
    let mounted = mounts_of(attached).unwrap_or_default();
    let device = attached.device.as_deref().map(Path::new);
    if let (Some(dir), Some(device)) = (mount, device)
        && mounted.iter().any(|m| m == dir)
    {
        let _ = attach::unmount_device(device, dir);
    }
    if let Err(e) = daemon.detach(handle(attached)) {
        tracing::warn!("{} stays attached: {e}", attached.name);
    }
}

/// What the daemon knows an attachment by.
fn handle(attached: &Attached) -> &str {
    attached.device.as_deref().unwrap_or(&attached.name)
}

/// The directory to mount on, as the kernel will call it.
fn mount_point(dir: &Path) -> Result<PathBuf> {
    let shown = dir.display();
    let real = fs::canonicalize(dir).map_err(|e| {
        Error::io("mount on", dir, &e).or_hint(&format!("`mkdir -p {shown}` makes it"))
    })?;
    if !real.is_dir() {
        return Err(Error::new(
            Kind::Invalid,
            format!("cannot mount on {shown}: it is no directory"),
        )
        .hint("name an empty directory"));
    }
    Ok(real)
}

/// Take a disk away from use: unmount it, wait until all is durable
#[derive(Args, Debug)]
#[command(
    after_help = "A disk that is busy stays attached and mounted. A snapshot or image that is attached several times is \
        detached once."
)]
pub(crate) struct Detach {
    /// A name, its device or URI, or where it is mounted
    #[arg(
        value_name = "DISK|DEVICE|URI|MOUNTPOINT",
        required_unless_present = "all",
        conflicts_with = "all",
        value_hint = ValueHint::AnyPath
    )]
    targets: Vec<String>,
    /// Take away all that is attached; what is busy stays
    #[arg(short, long)]
    all: bool,
    /// Give up what was written but can no longer be flushed, or waits for room; pass over clients of NBD that have not come back
    #[arg(short, long)]
    force: bool,
}

#[derive(Serialize)]
struct DetachDoc {
    dry_run: bool,
    detached: Vec<AttachedDoc>,
    unmounted: Vec<PathBuf>,
}

/// An attachment to give up, and the mount points that go with it.
struct Plan {
    attached: Attached,
    mounts: Vec<PathBuf>,
    /// Its daemon is dead: only the device is to be taken away.
    dead: Option<Dead>,
}

/// What a device of a dead daemon was, as far as it is known.
fn was_attached(store: &Store, dead: &Dead) -> Attached {
    let object = store.resolve(&dead.name).ok();
    Attached {
        name: dead.name.clone(),
        id: object.as_ref().map_or(Id([0; 16]), |o| o.id),
        kind: object.as_ref().map_or(ObjectKind::Disk, |o| o.kind),
        read_only: false,
        passthrough: false,
        via: Via::Loop,
        device: Some(dead.device.display().to_string()),
        file: store.run_dir().join(&dead.name),
        count: 1,
        size: object.map_or(0, |o| o.size),
    }
}

impl Detach {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let mut daemon = Client::connect(&store)?;
        // All are found before any is touched.
        let plans = self.plans(&store, daemon.as_mut())?;
        if context.dry_run {
            return self.pretend(context, &plans);
        }
        signals::catch();
        let mut document = DetachDoc {
            dry_run: false,
            detached: Vec::new(),
            unmounted: Vec::new(),
        };
        let done = self.take_all(context, &store, daemon.as_mut(), &plans, &mut document);
        if daemon.is_none() {
            daemon::clear_dead(&store);
        }
        // What was detached is told also where something could not be.
        if ui.json && (done.is_ok() || !document.detached.is_empty()) {
            let told = ui.document(document);
            return done.and(told);
        }
        done
    }
    fn take_all(
        &self,
        context: &Context,
        store: &Store,
        mut daemon: Option<&mut Client>,
        plans: &[Plan],
        document: &mut DetachDoc,
    ) -> Outcome {
        let mut first = None;
        for plan in plans {
            if signals::caught() {
                return Err(Error::new(Kind::Interrupted, "interrupted").into());
            }
            match self.take(context, store, daemon.as_deref_mut(), plan, document) {
                // Of all as many as can.
                Err(Stop::Error(e)) if self.all && first.is_some() => context.ui.warn(&e),
                Err(Stop::Error(e)) if self.all => first = Some(e),
                other => other?,
            }
        }
        first.map_or(Ok(()), |e| Err(e.into()))
    }
    /// Does what was planned, and notes it.
    fn take(
        &self,
        context: &Context,
        store: &Store,
        mut daemon: Option<&mut Client>,
        plan: &Plan,
        document: &mut DetachDoc,
    ) -> Outcome {
        let ui = &context.ui;
        let Plan {
            attached,
            mounts,
            dead,
        } = plan;
        let waiting = match (&mut daemon, dead) {
            (Some(daemon), None) => Waited::ask(daemon, attached, self.force)?,
            _ => Waited::default(),
        };
        let unmounted =
            with_word_of_waiting(context, store, attached, || unmount_all(attached, mounts));
        if let Err(stop) = unmounted {
            waiting.again(daemon, attached);
            return Err(stop);
        }
        if let Some(dead) = dead {
            dead.take_away(attach::GRACE)?;
            ui.warn(format_args!(
                "the daemon that served {} is dead: what was written to it after its last flush is lost",
                dead.device.display()
            ));
            document.detached.push(AttachedDoc::new(attached, &[]));
        } else {
            let daemon = daemon.ok_or_else(|| not_attached(&attached.name))?;
            let gone = match self.force {
                true => daemon.detach_by_force(handle(attached)),
                false => daemon.detach(handle(attached)),
            };
            if gone.is_err() {
                waiting.again(Some(daemon), attached);
            }
            for gone in gone? {
                document.detached.push(AttachedDoc::new(&gone, &[]));
            }
        }
        document.unmounted.extend_from_slice(mounts);
        ui.talk(format_args!("detached {}", attached.name));
        Ok(())
    }
    fn plans(&self, store: &Store, daemon: Option<&mut Client>) -> Result<Vec<Plan>> {
        let dead = daemon::dead_devices(store, daemon.is_some());
        let mut known = Vec::new();
        let mounted = attach::Mounts::now()?;
        for attached in daemon.map_or(Ok(Vec::new()), Client::attached)? {
            let mounts = mounts_in(&mounted, &attached)?;
            known.push((attached, mounts));
        }
        // The living first: by its name that one is meant.
        let living = known.len();
        for dead in &dead {
            let attached = was_attached(store, dead);
            let mounts = mounts_in(&mounted, &attached)?;
            known.push((attached, mounts));
        }
        if self.all {
            let mut plans = Vec::new();
            for (i, (attached, mounts)) in known.into_iter().enumerate() {
                let dead = i.checked_sub(living).map(|at| dead[at].clone());
                // As often as it is attached; all its mounts go with the first.
                for n in 0..attached.count.max(1) {
                    plans.push(Plan {
                        attached: attached.clone(),
                        mounts: if n == 0 { mounts.clone() } else { Vec::new() },
                        dead: dead.clone(),
                    });
                }
            }
            return Ok(plans);
        }
        let mut plans: Vec<Plan> = Vec::new();
        for target in &self.targets {
            let mut plan = plan(store, &known, target)?;
            let same = |p: &Plan| handle(&p.attached) == handle(&plan.attached);
            let at = known
                .iter()
                .position(|(a, _)| handle(a) == handle(&plan.attached));
            plan.dead = at
                .and_then(|at| at.checked_sub(living))
                .map(|at| dead[at].clone());
            match plans.iter_mut().find(|p| same(p)) {
                Some(there) if plan.attached.count == 1 => {
                    for dir in plan.mounts {
                        if !there.mounts.contains(&dir) {
                            there.mounts.push(dir);
                        }
                    }
                }
                _ => plans.push(plan),
            }
        }
        Ok(plans)
    }
    fn pretend(&self, context: &Context, plans: &[Plan]) -> Outcome {
        let detached = plans
            .iter()
            .map(|p| AttachedDoc::new(&p.attached, &p.mounts));
        let document = DetachDoc {
            dry_run: true,
            detached: detached.collect(),
            unmounted: plans.iter().flat_map(|p| p.mounts.clone()).collect(),
        };
        context.ui.answer(document, || {
            let mut text = String::new();
            for Plan {
                attached, mounts, ..
            } in plans
            {
                for dir in mounts.iter().rev() {
                    text.push_str(&format!("would unmount {}\n", dir.display()));
                }
                text.push_str(&format!("would detach {}\n", attached.name));
            }
            text
        })
    }
}

/// Says why it takes so long, if writes of the disk begin to wait for room while `work` unmounts it: the kernel waits for them.
fn with_word_of_waiting<R>(
    context: &Context,
    store: &Store,
    attached: &Attached,
    work: impl FnOnce() -> R,
) -> R {
    if attached.read_only {
        return work();
    }
    let name = &attached.name;
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                let daemon = Client::connect(store).ok().flatten();
                let waiting = daemon.and_then(|mut d| d.waiting(name, Waiting::Stay).ok());
                if waiting.is_some_and(|n| n > 0) {
                    context.ui.warn(format_args!(
                        "what was written to {name} waits for room: `forkdisk resize {name} --quota SIZE` makes some, \
                         `forkdisk detach --force {name}` lets the writes fail"
                    ));
                    return;
                }
            }
        });
        let done = work();
        drop(end);
        done
    })
}

/// What became of writes that waited for room.
#[derive(Clone, Copy, Default)]
struct Waited {
    failed: bool,
}

impl Waited {
    /// Writes that wait for room keep a filesystem from being unmounted: with `force` they fail, else nothing is begun.
    fn ask(daemon: &mut Client, attached: &Attached, force: bool) -> Result<Waited> {
        if attached.read_only {
            return Ok(Waited::default());
        }
        let name = &attached.name;
        let then = if force { Waiting::Fail } else { Waiting::Stay };
        let waiting = match daemon.waiting(name, then) {
            // An older server, which lets nobody wait; or it went away meanwhile, which others will tell.
            Err(e) if matches!(e.kind(), Kind::Invalid | Kind::NotFound) => 0,
            waiting => waiting?,
        };
        match waiting {
            _ if force => Ok(Waited { failed: true }),
            0 => Ok(Waited::default()),
            n => Err(Error::new(
                Kind::Busy,
                format!("{n} writes to {name} wait for room: it has used its quota"),
            )
            .hint(format!(
                "`forkdisk resize {name} --quota SIZE` makes room; `forkdisk detach --force {name}` lets the writes fail"
            ))),
        }
    }
    /// It was not detached after all.
    fn again(self, daemon: Option<&mut Client>, attached: &Attached) {
        if let (true, Some(daemon)) = (self.failed, daemon) {
            let _ = daemon.waiting(&attached.name, Waiting::Wait);
        }
    }
}

fn not_attached(target: &str) -> Error {
    Error::new(Kind::NotFound, format!("{target} is not attached"))
        .hint("`forkdisk ls attached` lists what is")
}

/// What `target` means: a name, a device, the file that shows it, or where it is mounted.
fn plan(store: &Store, known: &[(Attached, Vec<PathBuf>)], target: &str) -> Result<Plan> {
    // A name has no slash.
    let is_path = target.contains('/');
    let path = || {
        let absolute = || std::path::absolute(target).unwrap_or_else(|_| target.into());
        fs::canonicalize(target).unwrap_or_else(|_| absolute())
    };
    let by_path = |path: &Path| {
        known.iter().find_map(|(attached, mounts)| {
            let device = attached.device.as_deref().map(Path::new);
            if device == Some(path) || attached.file == path {
                return Some((attached, mounts, None));
            }
            let mounted = mounts.iter().find(|dir| *dir == path);
            mounted.map(|dir| (attached, mounts, Some(dir.clone())))
        })
    };
    let by_uri = |uri: &str| {
        let mut all = known.iter();
        let found = all.find(|(attached, _)| attached.uri().as_deref() == Some(uri));
        found.map(|(attached, mounts)| (attached, mounts, None))
    };
    let by_name = |name: &str| {
        let mut all = known.iter();
        let found = all.find(|(attached, _)| attached.name == name);
        found.map(|(attached, mounts)| (attached, mounts, None))
    };
    let found = if is_path {
        by_uri(target).or_else(|| by_path(&path()))
    } else {
        // A name, a directory named from where we are, or the beginning of an id.
        by_name(target).or_else(|| by_path(&path()))
    };
    let found = match found {
        None if !is_path => by_name(&store.resolve(target)?.name),
        found => found,
    };
    let Some((attached, mounts, place)) = found else {
        return Err(not_attached(target));
    };
    Ok(Plan {
        attached: attached.clone(),
        mounts: going(attached.count, mounts, place),
        dead: None,
    })
}

/// Which mount points go with one attachment out of `count`: all with the last one; else the one that was named;
/// else one only if there is one for each attachment, and the newest.
fn going(count: u32, mounts: &[PathBuf], named: Option<PathBuf>) -> Vec<PathBuf> {
    if count <= 1 {
        return mounts.to_vec();
    }
    if let Some(dir) = named {
        return vec![dir];
    }
    let newest = mounts.last().filter(|_| mounts.len() >= count as usize);
    newest.into_iter().cloned().collect()
}

/// Unmounts all, or none: a mount point that is busy is found before any other is touched.
fn unmount_all(attached: &Attached, mounts: &[PathBuf]) -> Result<(), Stop> {
    let busy = |e: Error| e.context(format!("cannot detach {}", attached.name));
    // What has no device has no mounts.
    let Some(device) = attached.device.as_deref().map(Path::new) else {
        return Ok(());
    };
    for dir in mounts {
        attach::may_unmount(device, dir).map_err(busy)?;
    }
    // The newest first: it may stand on an older one.
    let mut order: Vec<&PathBuf> = mounts.iter().rev().collect();
    if order.len() > 1 {
        let mut first_busy = None;
        for (i, dir) in order.iter().enumerate() {
            if !idle::is_idle(dir).map_err(busy)? {
                first_busy = Some(i);
                break;
            }
        }
        // It comes first, to fail with the names of who uses it.
        if let Some(i) = first_busy {
            order.swap(0, i);
        }
    }
    for dir in order {
        attach::unmount_device(device, dir).map_err(busy)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_go_with_the_last_attachment() {
        let dirs = [PathBuf::from("/a"), PathBuf::from("/b")];
        assert_eq!(going(1, &dirs, None), dirs);
        assert_eq!(going(1, &dirs, Some("/a".into())), dirs);
        assert_eq!(going(2, &dirs, Some("/a".into())), [PathBuf::from("/a")]);
        assert_eq!(going(2, &dirs, None), [PathBuf::from("/b")]);
        assert!(
            going(3, &dirs, None).is_empty(),
            "one is attached and not mounted"
        );
    }
}
