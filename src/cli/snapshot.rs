//! Keeping states of disks: `snapshot`.

use crate::{
    cli::{
        Outcome,
        context::{Context, mounts_of},
        names::Names,
        render::json::ObjectDoc,
    },
    daemon::{Client, Waiting},
    error::{Error, Kind, Result},
    store::{Member, Object, ObjectKind, Store},
    sys::{
        freeze::{self, Frozen},
        signals,
    },
};
use clap::Args;
use serde_json::json;
use std::{
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// Keep the present state of a disk, also while it is mounted and busy
#[derive(Args, Debug)]
#[command(
    after_help = "A snapshot of a mounted disk is consistent as after a power cut, and a journal brings it in order.\n\
        With --freeze its filesystem is clean. Several disks are kept as they are at one instant."
)]
pub(crate) struct Snapshot {
    /// The disk, and the name of the snapshot
    #[arg(value_name = "DISK@NAME", required = true)]
    names: Vec<String>,
    /// What to remember about it
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Halt the mounted filesystem for the moment
    #[arg(long)]
    freeze: bool,
}

impl Snapshot {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let mut wanted: Vec<(String, String)> = Vec::new();
        for full in &self.names {
            let Some((disk, name)) = full.split_once('@') else {
                return Err(
                    Error::new(Kind::Invalid, format!("`{full}` names no snapshot"))
                        .hint(format!(
                            "write the disk and the snapshot's name: `forkdisk snapshot {full}@NAME`"
                        ))
                        .into(),
                );
            };
            wanted.push((disk.to_string(), name.to_string()));
        }
        let store = context.open()?;
        for (disk, _) in &mut wanted {
            *disk = context.disk_name(&store, disk)?;
        }
        if context.dry_run {
            store.may_snapshot(&wanted, self.message.as_deref())?;
            let full = wanted.iter().map(|(disk, name)| format!("{disk}@{name}"));
            let names: Vec<String> = full.collect();
            let document = match &names[..] {
                [one] => json!({"dry_run": true, "name": one}),
                all => json!({"dry_run": true, "names": all}),
            };
            return ui.answer(document, || {
                let line = |name: &String| format!("would make {name}\n");
                names.iter().map(line).collect()
            });
        }
        let (made, thawed) = self.take(context, &store, &wanted)?;
        thawed?;
        if ui.json {
            let names = Names::of(&store)?;
            let objects: Vec<_> = made.iter().map(|o| ObjectDoc::new(o, &names)).collect();
            return match &objects[..] {
                [one] => ui.document(one),
                _ => ui.document(json!({"objects": objects})),
            };
        }
        for object in &made {
            ui.talk(format_args!("made {}", object.name));
        }
        Ok(())
    }
    /// Takes the snapshots. The inner result tells whether the filesystems stayed frozen for it.
    fn take(
        &self,
        context: &Context,
        store: &Store,
        wanted: &[(String, String)],
    ) -> Result<(Vec<Object>, Result<()>)> {
        let message = self.message.as_deref();
        let attached = context.attached(store)?;
        let of = |disk: &str| {
            let mut disks = attached.iter().filter(|a| a.kind == ObjectKind::Disk);
            disks.find(|a| a.name == disk)
        };
        let mut to_freeze: Vec<PathBuf> = Vec::new();
        let mut running = false;
        for (disk, _) in wanted {
            let Some(attached) = of(disk) else { continue };
            running = true;
            if !self.freeze {
                continue;
            }
            // All mounts of one device show one filesystem.
            match mounts_of(attached)?.into_iter().next() {
                Some(dir) => to_freeze.push(dir),
                None => context.ui.warn(format_args!(
                    "{disk} is not mounted here: there is nothing to freeze"
                )),
            }
        }
        if !running {
            let made = match wanted {
                [(disk, name)] => vec![store.snapshot(disk, name, message)?],
                all => store.snapshot_group(&at_rest(all), message)?,
            };
            return Ok((made, Ok(())));
        }
        let gone = || {
            Error::new(Kind::Io, "the daemon ended meanwhile")
                .hint("try again; its log, daemon.log in the run directory of the store, tells why")
        };
        let mut daemon = Client::connect(store)?.ok_or_else(gone)?;
        if self.freeze {
            let disks = wanted.iter().map(|(disk, _)| disk.as_str());
            let disks: Vec<&str> = disks.filter(|disk| of(disk).is_some()).collect();
            ready_to_freeze(&mut daemon, &disks, &to_freeze)?;
        }
        // From here to the thaw nothing may be written that could end up on a frozen filesystem, not even a line of talk.
        signals::catch();
        // What is frozen already is thawed if one cannot be: each thaws when it is dropped.
        let frozen: Vec<Frozen> = to_freeze
            .iter()
            .map(|dir| freeze::freeze(dir))
            .collect::<Result<_>>()?;
        let made = match wanted {
            [(disk, name)] => daemon.snapshot(disk, name, message).map(|o| vec![o]),
            all => daemon.snapshots(all, message),
        };
        let mut thawed = Ok(());
        for frozen in frozen {
            thawed = thawed.and(frozen.thaw());
        }
        Ok((made?, thawed))
    }
}

/// Lets the filesystems on `dirs` write what they have, so that little is left for the freeze. That waits for its writes, for ever if those wait for
/// room themselves, and nothing ends it: so this fails as soon as a write to one of the disks does.
pub(super) fn ready_to_freeze(daemon: &mut Client, disks: &[&str], dirs: &[PathBuf]) -> Result<()> {
    let mut nothing_waits = || {
        disks
            .iter()
            .try_for_each(|disk| nothing_waits(daemon, disk))
    };
    nothing_waits()?;
    for dir in dirs {
        // Another process: a thread of this one that waits would not let it end.
        let mut sync = Command::new("sync");
        sync.arg("-f").arg("--").arg(dir);
        sync.stdin(Stdio::null());
        sync.stdout(Stdio::null()).stderr(Stdio::null());
        // Where there is no such program the freeze has more to do.
        let Ok(mut sync) = sync.spawn() else { continue };
        let mut pause = Duration::from_millis(1);
        while matches!(sync.try_wait(), Ok(None)) {
            if let Err(e) = nothing_waits() {
                // It ends when there is room.
                let _ = sync.kill();
                return Err(e);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
    nothing_waits()
}

fn nothing_waits(daemon: &mut Client, disk: &str) -> Result<()> {
    match daemon.waiting(disk, Waiting::Stay) {
        // An older server, which lets nobody wait.
        Err(e) if e.kind() == Kind::Invalid => Ok(()),
        Err(e) => Err(e),
        Ok(0) => Ok(()),
        Ok(n) => Err(Error::new(
            Kind::Busy,
            format!("{n} writes to `{disk}` wait for room: its filesystem cannot be frozen"),
        )
        .hint(format!(
            "`forkdisk resize {disk} --quota SIZE` makes room; or leave out --freeze"
        ))),
    }
}

fn at_rest(wanted: &[(String, String)]) -> Vec<Member<'_>> {
    let all = wanted.iter().map(|(disk, name)| Member {
        disk,
        name,
        running: None,
    });
    all.collect()
}
