//! What every command starts from: the store, its daemon, and how to talk.

use crate::{
    attach::{self, Mounts},
    cli::ui::Ui,
    daemon::{Attached, Client},
    error::{Error, Kind, Result},
    store::{Object, ObjectKind, QuotaUse, Store},
    units::Id,
};
use std::path::{Path, PathBuf};

/// What every command starts from.
pub struct Context {
    /// How to talk.
    pub ui: Ui,
    /// `--dry-run`.
    pub dry_run: bool,
    /// Where the store is or would be.
    pub path: PathBuf,
}

/// The store that is meant when none is named.
pub fn default_store() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/forkdisk".into();
    }
    let of = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    // As the XDG base directory specification says: a relative path is ignored.
    let data = of("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let data = data.or_else(|| of("HOME").map(|home| Path::new(&home).join(".local/share")));
    data.unwrap_or_else(|| "/var/tmp".into()).join("forkdisk")
}

impl Context {
    /// Opens the store.
    pub fn open(&self) -> Result<Store> {
        Store::open(&self.path)
    }
    /// Opens the store, to change or take away what must not be attached: if its daemon is between two servers, waits for the next, for
    /// until then nobody holds the locks of the attached disks.
    pub fn open_to_change(&self) -> Result<Store> {
        let store = self.open()?;
        self.await_server(&store);
        Ok(store)
    }
    /// See [`Context::open_to_change`].
    pub fn await_server(&self, store: &Store) {
        // Without an answer the locks alone decide.
        let _ = Client::connect(store);
    }
    /// Lets the daemon give back what nobody sees of nameless layers below attached disks: bytes, and the layers. What it cannot do now it does later.
    pub fn reclaim_attached(&self, store: &Store) -> Option<(u64, Vec<Id>)> {
        let mut daemon = Client::connect(store).ok()??;
        match daemon.reclaim() {
            Ok(done) => Some(done),
            // A daemon of an earlier version does not know how.
            Err(e) if e.kind() == Kind::Invalid => None,
            Err(e) => {
                self.ui
                    .warn(format_args!("not all space could be given back yet: {e}"));
                None
            }
        }
    }
    /// Opens the store, and makes it if there is none.
    pub fn open_or_init(&self) -> Result<Store> {
        Store::open_or_init(&self.path)
    }
    /// Everything attached, or nothing where no daemon runs.
    pub fn attached(&self, store: &Store) -> Result<Vec<Attached>> {
        match Client::connect(store)? {
            Some(mut client) => client.attached(),
            None => Ok(Vec::new()),
        }
    }
    /// Everything attached and where it is mounted, for looking only: a daemon that does not answer is
    /// worth a warning, not a failure.
    pub fn attached_for_show(&self, store: &Store) -> Vec<(Attached, Vec<PathBuf>)> {
        let attached = self.attached(store).unwrap_or_else(|e| {
            self.ui.warn(format!("what is attached is not known: {e}"));
            Vec::new()
        });
        with_mounts(attached)
    }
    /// The daemon, if it has the disk `name` attached for writing: then only the daemon can snapshot or
    /// fork it.
    pub fn daemon_of(&self, store: &Store, name: &str) -> Result<Option<(Client, Attached)>> {
        let Some(mut client) = Client::connect(store)? else {
            return Ok(None);
        };
        let mut attached = client.attached()?.into_iter();
        let found = attached.find(|a| a.kind == ObjectKind::Disk && a.name == name);
        Ok(found.map(|a| (client, a)))
    }
    /// What a disk may have for itself, and what it has; `None` of what is no disk, or is damaged. An attached one knows it best.
    pub fn quota_of(&self, store: &Store, object: &Object, attached: bool) -> Option<QuotaUse> {
        let mut found = store.quota(object).ok().flatten()?;
        if attached
            && let Ok(Some(mut daemon)) = Client::connect(store)
            && let Ok(used) = daemon.used(&object.name)
        {
            found.used = used;
        }
        Some(found)
    }
    /// The name of the disk that `reference` is, also by the beginning of its id; anything else as it stands.
    pub fn disk_name(&self, store: &Store, reference: &str) -> Result<String> {
        let object = store.resolve(reference)?;
        Ok(match object.kind {
            ObjectKind::Disk => object.name,
            _ => reference.to_string(),
        })
    }
    /// For `--dry-run`: fails as making `name` would if it is taken.
    pub fn must_be_free(&self, store: &Store, name: &str) -> Result<()> {
        match store.resolve(name) {
            Ok(object) if object.name == name => Err(taken(&object)),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == Kind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
}

fn taken(object: &Object) -> Error {
    let Object { name, kind, .. } = object;
    Error::new(
        Kind::Exists,
        format!("{name} exists already: {}", kind.one()),
    )
}

/// Where the device of an attachment is mounted.
pub fn mounts_of(attached: &Attached) -> Result<Vec<PathBuf>> {
    match &attached.device {
        Some(device) => attach::mounts_of(Path::new(device)),
        None => Ok(Vec::new()),
    }
}

/// The same of many attachments, with one look at what is mounted.
pub fn mounts_in(mounts: &Mounts, attached: &Attached) -> Result<Vec<PathBuf>> {
    match &attached.device {
        Some(device) => mounts.of(Path::new(device)),
        None => Ok(Vec::new()),
    }
}

/// Attachments and where they are mounted, as far as that is known.
pub fn with_mounts(all: Vec<Attached>) -> Vec<(Attached, Vec<PathBuf>)> {
    let now = Mounts::now().ok();
    let of = |a: &Attached| mounts_in(now.as_ref()?, a).ok();
    all.into_iter()
        .map(|a| (of(&a).unwrap_or_default(), a))
        .map(|(mounts, a)| (a, mounts))
        .collect()
}
