//! Sizes and quotas of disks: `resize`.

use crate::{
    cli::{Outcome, context::Context, history::HistoryArg, render::size::SizeArg, ui::Ui},
    error::{Error, Kind, Result},
    store::{ObjectKind, QuotaChange, QuotaUse, whole_blocks},
};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::str::FromStr;

/// What becomes of a write for which the quota leaves no room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum OnFull {
    /// It fails: no space left
    Error,
    /// It waits until there is room
    Pause,
}

/// A quota, so much more than there is (`+SIZE`), or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QuotaSize(Option<SizeArg>);

impl FromStr for QuotaSize {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<QuotaSize, String> {
        match text {
            "none" => Ok(QuotaSize(None)),
            _ => text.parse().map(|size| QuotaSize(Some(size))),
        }
    }
}

/// The options about quotas.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct QuotaArgs {
    /// How much the disk may have for itself, its snapshots included: a size, or none; of a disk that has one, +SIZE for more
    #[arg(long, value_name = "SIZE")]
    quota: Option<QuotaSize>,
    /// What becomes of a write for which the quota leaves no room [default: error]
    #[arg(long, value_enum, value_name = "WHAT")]
    on_full: Option<OnFull>,
}

impl QuotaArgs {
    /// What they change. `present` tells the quota that there is, where it matters.
    pub(crate) fn change(
        self,
        present: impl FnOnce() -> Result<Option<u64>>,
    ) -> Result<QuotaChange> {
        let bytes = match self.quota.map(|q| q.0) {
            None => None,
            Some(None) => Some(None),
            Some(Some(SizeArg::Exactly(bytes))) => Some(Some(bytes)),
            Some(Some(more)) => {
                let quota = present()?.and_then(|quota| more.apply(quota));
                let none = || {
                    Error::new(Kind::Invalid, format!("there is no quota to add {more} to"))
                        .hint("say how much it may have: `--quota SIZE`")
                };
                Some(Some(quota.ok_or_else(none)?))
            }
        };
        Ok(QuotaChange {
            bytes,
            waits: self.on_full.map(|what| what == OnFull::Pause),
        })
    }
}

/// Make a disk larger or smaller, or change its quota, also while it is mounted and busy
#[derive(Args, Debug)]
#[command(
    after_help = "A filesystem on it grows afterwards, by its own tool: `resize2fs DEVICE`, `xfs_growfs DIR`.\n\
        Smaller is possible with --force, of a disk that is not attached."
)]
pub(crate) struct Resize {
    /// The disk
    disk: String,
    /// Its size, or +SIZE for more than it has
    #[arg(required_unless_present_any = ["quota", "on_full", "history"])]
    size: Option<SizeArg>,
    /// Also make it smaller: what is cut off is lost
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    quota: QuotaArgs,
    /// Keep its last flush points: so long, so many bytes, or both (10m, 2G, 10m,2G), or none of them
    #[arg(long, value_name = "LENGTH")]
    history: Option<HistoryArg>,
}

impl Resize {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open_to_change()?;
        let former = store.resolve(&self.disk)?;
        if former.kind != ObjectKind::Disk {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{}` is {}, not a disk", former.name, former.kind.one()),
            )
            .hint("only disks change; `forkdisk fork --size` makes a larger disk from it")
            .into());
        }
        let name = former.name.clone();
        let size = self.new_size(former.size)?;
        let change = self
            .quota
            .change(|| Ok(store.quota(&former)?.and_then(|q| q.quota)))?;
        // Refused before anything is changed.
        store.may_set_quota(&name, change)?;
        let mut attached = context.daemon_of(&store, &name)?;
        let mut lost = 0;
        if size < former.size {
            if attached.is_some() {
                return Err(Error::new(
                    Kind::Busy,
                    format!("`{name}` is attached: it can grow, but not shrink"),
                )
                .hint(format!("`forkdisk detach {name}` first"))
                .into());
            }
            if !self.force {
                return Err(Error::new(
                    Kind::Invalid,
                    format!("{size} bytes are less than `{name}` has ({} bytes)", former.size),
                )
                .hint("--force makes it smaller; shrink the filesystem on it before (`resize2fs`), or what is cut off is lost")
                .into());
            }
            lost = store.lost_by_resizing(&former, size)?;
        }
        if context.dry_run {
            let now = context.quota_of(&store, &former, attached.is_some());
            let bytes = change.bytes.unwrap_or(now.and_then(|q| q.quota));
            let waits = change.waits.unwrap_or(now.is_some_and(|q| q.waits));
            let then = QuotaUse {
                quota: bytes,
                waits,
                used: now.map_or(0, |q| q.used),
            };
            let document = json!({
                "dry_run": true, "name": name, "size": size, "former_size": former.size, "lost": lost,
                "quota": bytes, "on_full": on_full(&then), "quota_used": now.map(|q| q.used),
            });
            return ui.answer(document, || {
                let (to, from) = (ui.size(size), ui.size(former.size));
                let mut text = String::new();
                if self.size.is_some() {
                    text.push_str(&format!("would give {name} {to}; it has {from}\n"));
                }
                if !change.is_nothing() {
                    text.push_str(&format!("would say: {}\n", told(ui, &name, &then)));
                }
                if let Some(HistoryArg(limits)) = self.history {
                    let what = if limits.is_some() { "its" } else { "no" };
                    text.push_str(&format!("would let {name} keep {what} history\n"));
                }
                if lost > 0 {
                    text.push_str(&format!("would lose {} of data\n", ui.size(lost)));
                }
                text
            });
        }
        if lost > 0 {
            let (shown, to) = (ui.size(lost), ui.size(size));
            ui.confirm(
                &format!("{shown} of data lie beyond {to} of {name}, and would be lost\n"),
                &format!("Make {name} smaller?"),
            )?;
            // The answer may have taken its time.
            context.await_server(&store);
            attached = context.daemon_of(&store, &name)?;
        }
        if self.size.is_some() {
            match &mut attached {
                Some((daemon, _)) => daemon.resize(&name, size)?,
                None => store.resize(&name, size)?,
            };
        }
        if !change.is_nothing() {
            match &mut attached {
                Some((daemon, a)) if !a.read_only => daemon.set_quota(&name, &change)?,
                _ => store.set_quota(&name, change, None)?,
            };
        }
        if let Some(HistoryArg(limits)) = self.history {
            match &mut attached {
                Some((daemon, a)) if !a.read_only => daemon.set_history(&name, limits)?,
                _ => store.set_history(std::slice::from_ref(&name), limits)?,
            }
        }
        let object = store.resolve(&name)?;
        let now = context.quota_of(&store, &object, attached.is_some());
        if ui.json {
            return ui.document(json!({
                "name": name, "id": object.id.to_string(), "size": object.size, "former_size": former.size,
                "quota": now.and_then(|q| q.quota), "on_full": now.and_then(|q| on_full(&q)),
                "quota_used": now.map(|q| q.used), "dry_run": false,
            }));
        }
        if self.size.is_some() {
            let size = ui.size(object.size);
            ui.talk(format_args!("{name} has {size} now"));
        }
        if !change.is_nothing() {
            ui.talk(told(ui, &name, &now.unwrap_or_default()));
        }
        if let Some(HistoryArg(limits)) = self.history {
            let what = match limits {
                Some(_) => "keeps its history",
                None => "keeps no history",
            };
            ui.talk(format_args!("{name} {what}"));
        }
        Ok(())
    }
    fn new_size(&self, present: u64) -> Result<u64> {
        let Some(size) = self.size else {
            return Ok(present);
        };
        let size = size.apply(present).ok_or_else(|| {
            Error::new(Kind::Invalid, "the size would be more than 16 EiB")
                .hint("a disk has at most 16 TiB")
        })?;
        whole_blocks(size)
    }
}

/// What a disk may have.
fn told(ui: &Ui, name: &str, of: &QuotaUse) -> String {
    match of.quota {
        Some(quota) if of.waits => format!(
            "{name} may have {} for itself; who writes more waits",
            ui.size(quota)
        ),
        Some(quota) => format!("{name} may have {} for itself", ui.size(quota)),
        None => format!("{name} has no quota"),
    }
}

/// The word for what becomes of a write for which the quota leaves no room.
pub(crate) fn on_full(of: &QuotaUse) -> Option<&'static str> {
    of.quota?;
    Some(if of.waits { "pause" } else { "error" })
}
