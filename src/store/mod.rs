//! The store: names, bases, layers, references, locks (FORMAT.md, section 2).
//!
//! Always true:
//! - names change under the exclusive lock of `lock`, and are read under the shared one;
//! - a name on disk refers to a base or layer that was durable before it;
//! - a sealed layer or a base that anything refers to is never removed;
//! - whoever has a layer open holds its file's lock: exclusive for writing, shared for reading.
//!
//! Works on any [`Dir`], the simulated disk included. It reads no clock and draws no randomness but through [`Env`].

mod changes;
mod commit;
mod digest;
mod earlier;
mod flatten;
mod graph;
pub mod history;
mod idle;
mod import;
mod kept;
mod leaf;
mod look;
mod many;
mod may;
pub mod names;
mod objects;
pub mod past;
mod quota;
mod reading;
mod reclaim;
mod refer;
mod remove;
mod resize;
mod squash;
mod stream;
pub mod types;
mod usage;
mod written;

pub use changes::{Change, Changes, State, changes};
pub use digest::{Calls, Effort};
pub use earlier::MAX_EARLIER;
pub use flatten::{COPIED, Flattened};
pub use kept::Recount;
pub use objects::Member;
pub use quota::{QuotaChange, QuotaUse};
pub use reclaim::Reclaimed;
pub use resize::whole_blocks;
pub use squash::{Squash, Squashed};
pub use stream::{Piece, StreamReader, StreamTotals, write_stream};
pub use types::*;
pub use written::LifeWritten;

use crate::base::Base;
use crate::chain::{Budget, Chain};
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::text::Record;
use crate::format::{Header, MAX_DEPTH, VERSION};
use crate::io::os::OsDir;
use crate::io::{Access, Dir, EntryKind, File};
use crate::layer::history::Keep;
use crate::layer::{Layer, ReadLayer, read_header, volatile};
use crate::sync::Mutex;
use crate::sys::private;
use crate::sys::shared::SharedMemory;
use crate::units::{BLOCK, Id, blocks};
use names::{NameRecord, read_name, read_record};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Where ids and times come from, and how deep chains may become.
#[derive(Clone)]
pub struct Env {
    /// A fresh random id.
    pub id: Arc<dyn Fn() -> Id + Send + Sync>,
    /// Seconds since 1970.
    pub now: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Most layers of a chain that is made: [`MAX_DEPTH`], or fewer.
    pub depth: u32,
}

impl Env {
    /// The operating system's.
    pub fn os() -> Env {
        Env {
            id: Arc::new(|| {
                let mut id = [0u8; 16];
                let mut at = 0;
                while at < id.len() {
                    // Cannot fail for so few bytes once the system is up; a short read is continued.
                    match rustix::rand::getrandom(
                        &mut id[at..],
                        rustix::rand::GetRandomFlags::empty(),
                    ) {
                        Ok(n) => at += n,
                        Err(rustix::io::Errno::INTR) => {}
                        Err(e) => {
                            tracing::error!("getrandom: {e}");
                            std::process::abort();
                        }
                    }
                }
                Id(id)
            }),
            now: Arc::new(|| {
                std::time::SystemTime::now()
                    .duration_since(std::time::UNIX_EPOCH)
                    .map_or(0, |d| d.as_secs())
            }),
            depth: MAX_DEPTH,
        }
    }
}

/// How long a command waits for another one that changes names.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// How often a chain is opened anew of which a file was replaced meanwhile.
const TRIES: u32 = 10;

/// File that says what the directory is.
const STORE_FILE: &str = "forkdisk.toml";

/// An open store.
pub struct Store {
    path: PathBuf,
    id: Id,
    env: Env,
    /// Milliseconds since 1970: labels for people.
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    root: Arc<dyn Dir>,
    names: Arc<dyn Dir>,
    layers: Arc<dyn Dir>,
    bases: Arc<dyn Dir>,
    budget: Arc<Budget>,
    open_layers: Mutex<HashMap<Id, Weak<ReadLayer>>>,
    open_bases: Mutex<HashMap<Id, Weak<Base>>>,
    open_chains: Mutex<HashMap<Below, Weak<Chain>>>,
    /// Snapshots and images that are open themselves, by their layers.
    views: Mutex<Vec<(Id, Weak<CowDisk>)>>,
    /// What sealed layers do not use, and was not given back yet.
    idle: Mutex<BTreeMap<Id, idle::Idle>>,
    /// Layers that gave back blocks while they were open here, whose former block maps are not given back yet.
    former_maps: Mutex<BTreeSet<Id>>,
}

/// The names lock, held while this lives.
pub struct NamesLock(#[expect(dead_code, reason = "held for its lock")] Arc<dyn File>);

/// The lock of the names for changes, if nobody has it. Who calls this may hold up whoever does.
fn names_lock_if_free(root: &dyn Dir) -> Result<Option<NamesLock>> {
    let file = root.open("lock", Access::Read)?;
    match file.lock(true) {
        Err(e) if e.kind() == Kind::Busy => Ok(None),
        other => other.map(|()| Some(NamesLock(file))),
    }
}

/// File name of a layer.
pub fn layer_file(id: Id) -> String {
    format!("{id}.layer")
}

impl Store {
    /// Makes a store at `path` (a new or empty directory); `Exists` if there is one.
    pub fn init(path: &Path) -> Result<Store> {
        match Store::open(path) {
            Ok(_) => {
                return Err(Error::new(
                    Kind::Exists,
                    format!("there is a store at {} already", path.display()),
                )
                .hint("use it, or choose another directory with --store"));
            }
            Err(e) if e.kind() == Kind::NoStore => {}
            Err(e) => return Err(e),
        }
        if path.metadata().is_ok_and(|m| !m.is_dir()) {
            return Err(no_directory(path));
        }
        let dir = OsDir::create(path)?;
        let dir = Arc::new(dir);
        let store = Store::init_on(dir.clone(), path, Env::os())?;
        // Only now is it known to be a store's: an empty directory may have been made with any mode.
        dir.make_private()?;
        Ok(store)
    }
    /// Opens the store at `path`; `NoStore` if there is none.
    pub fn open(path: &Path) -> Result<Store> {
        let dir = OsDir::open(path).map_err(|e| match e.kind() {
            Kind::NotFound => no_store(path),
            _ if path.metadata().is_ok_and(|m| !m.is_dir()) => no_directory(path),
            _ => e,
        })?;
        let mut store = Store::open_on(Arc::new(dir), path, Env::os())?;
        store.clock = Arc::new(|| {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| d.as_millis() as u64)
        });
        if let Some(mode) = private::open_to_others(path) {
            let path = path.display();
            tracing::warn!(
                "other users can change the store {path} (mode {mode:o}): `chmod 700 {path}`"
            );
        }
        Ok(store)
    }
    /// Opens the store at `path`, making it first if there is none.
    pub fn open_or_init(path: &Path) -> Result<Store> {
        match Store::open(path) {
            Err(e) if e.kind() == Kind::NoStore => match Store::init(path) {
                // Another command was faster; or the directory is something else.
                Err(e) if e.kind() == Kind::Exists => Store::open(path).map_err(|_| e),
                other => other,
            },
            other => other,
        }
    }
    /// Makes a store in `root`. Every step can be repeated after a crash.
    pub fn init_on(root: Arc<dyn Dir>, path: &Path, env: Env) -> Result<Store> {
        for (name, _) in root.list()? {
            let ours = matches!(
                name.as_str(),
                "bases" | "layers" | "names" | "lock" | "run" | "lost+found"
            ) || name.starts_with(names::TEMPORARY);
            if !ours {
                return Err(Error::new(
                    Kind::Exists,
                    format!(
                        "{} is neither empty nor a store: it contains `{name}`",
                        path.display()
                    ),
                )
                .hint("choose an empty or new directory"));
            }
        }
        for dir in ["bases", "layers", "names", "run"] {
            match root.create_dir(dir) {
                Err(e) if e.kind() == Kind::Exists => {}
                other => other?,
            }
        }
        let lock = match root.open("lock", Access::CreateNew) {
            Err(e) if e.kind() == Kind::Exists => root.open("lock", Access::Write)?,
            other => other?,
        };
        wait_for(&*lock, true)?;
        if root.entry(STORE_FILE)?.is_some() {
            return Err(Error::new(
                Kind::Exists,
                format!("there is a store at {} already", path.display()),
            )
            .hint("use it, or choose another directory with --store"));
        }
        let record = Record::new()
            .with("format", VERSION.to_string())
            .with("id", (env.id)().to_string())
            .encode();
        let (temporary, file) = names::stage(&*root, STORE_FILE, &record)?;
        file.sync()?;
        root.sync()?;
        root.rename_new(&temporary, STORE_FILE)?;
        root.sync()?;
        drop(lock);
        Store::open_on(root, path, env)
    }
    /// Opens the store in `root`.
    pub fn open_on(root: Arc<dyn Dir>, path: &Path, env: Env) -> Result<Store> {
        let bytes = read_record(&*root, STORE_FILE).map_err(|e| match e.kind() {
            Kind::NotFound => no_store(path),
            _ => e,
        })?;
        let store_file = path.join(STORE_FILE);
        // Before anything else: what a newer version writes need not look sound to this one.
        if let Some(version) = Record::peek_number(&bytes, "format")
            && version > u64::from(VERSION)
        {
            return Err(Error::new(
                Kind::Version,
                format!("the store {} has format version {version}, newer than this forkdisk reads ({VERSION})", path.display()),
            )
            .path(&store_file)
            .hint("use a newer forkdisk; if this one made the store, the file is damaged"));
        }
        let record = Record::decode(&bytes).map_err(|e| {
            e.context(format!("{} is damaged", store_file.display()))
                .hint("restore the file from a backup")
        })?;
        let tag = |e: Error| e.path(&store_file).hint("restore the file from a backup");
        record.number("format").map_err(tag)?;
        let id = Id::parse(record.need("id").map_err(tag)?).ok_or_else(|| {
            Error::new(Kind::Corrupt, "the store's id is no id").path(&store_file)
        })?;
        let sub = |name: &str| {
            root.subdir(name).map_err(|e| {
                e.context(format!("the store {} is not whole", path.display()))
                    .hint("restore the directory from a backup; `forkdisk check` tells what is missing")
            })
        };
        // The daemon makes it again if it is missing; anything else in its place would lead it elsewhere.
        if root
            .entry("run")?
            .is_some_and(|kind| kind != EntryKind::Dir)
        {
            let run = path.join("run");
            return Err(Error::new(
                Kind::Corrupt,
                format!(
                    "{} is no directory, and symbolic links are never followed",
                    run.display()
                ),
            )
            .hint(format!("remove {}: it is made again", run.display())));
        }
        Ok(Store {
            path: path.to_path_buf(),
            id,
            clock: {
                let now = env.now.clone();
                Arc::new(move || now() * 1000)
            },
            env,
            names: sub("names")?,
            layers: sub("layers")?,
            bases: sub("bases")?,
            root,
            budget: Arc::default(),
            open_layers: Mutex::default(),
            open_bases: Mutex::default(),
            open_chains: Mutex::default(),
            views: Mutex::default(),
            idle: Mutex::default(),
            former_maps: Mutex::default(),
        })
    }
    /// Its id.
    pub fn id(&self) -> Id {
        self.id
    }
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Directory of the daemon's socket, log and mount point.
    pub fn run_dir(&self) -> PathBuf {
        self.path.join("run")
    }
    /// The store's directory.
    pub fn root(&self) -> &Arc<dyn Dir> {
        &self.root
    }
    /// The directory of names.
    pub fn names_dir(&self) -> &Arc<dyn Dir> {
        &self.names
    }
    /// The directory of layers.
    pub fn layers_dir(&self) -> &Arc<dyn Dir> {
        &self.layers
    }
    /// The directory of bases.
    pub fn bases_dir(&self) -> &Arc<dyn Dir> {
        &self.bases
    }
    /// Takes the lock of the names: shared for reading, exclusive for changes. Waits for others a while.
    pub fn lock(&self, exclusive: bool) -> Result<NamesLock> {
        let file = self.root.open("lock", Access::Read)?;
        wait_for(&*file, exclusive)?;
        Ok(NamesLock(file))
    }

    // ---- looking ---------------------------------------------------------------------------------------------

    /// All names, without temporary ones, sorted.
    fn all_names(&self) -> Result<Vec<String>> {
        let mut all: Vec<String> = self
            .names
            .list()?
            .into_iter()
            .filter(|(name, kind)| *kind == EntryKind::File && !name.starts_with('.'))
            .map(|(name, _)| name)
            .collect();
        all.sort();
        Ok(all)
    }
    /// All named objects that can be read, sorted by name.
    pub fn list(&self) -> Result<Vec<Object>> {
        Ok(self.survey()?.sound)
    }
    /// All named objects, sorted by name; those that are damaged apart, so that they do not hide the others.
    pub fn survey(&self) -> Result<Found<Object>> {
        let _lock = self.lock(false)?;
        self.survey_locked()
    }
    fn survey_locked(&self) -> Result<Found<Object>> {
        let mut found = Found::default();
        let names = self.all_names()?;
        let objects = many::each(&names, |name| self.object(name));
        for (name, object) in names.into_iter().zip(objects) {
            match object {
                Ok(object) => found.sound.push(object),
                Err(error) if error.kind() == Kind::Corrupt => {
                    found.damaged.push(Damage { name, error });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }
    /// The object behind a name that exists.
    fn object(&self, name: &str) -> Result<Object> {
        let record = read_name(&*self.names, name)?;
        self.object_of(name, record)
    }
    fn object_of(&self, name: &str, record: NameRecord) -> Result<Object> {
        let missing = |e: Error| match e.kind() {
            Kind::NotFound => e
                .context(format!("`{name}` refers to something that is gone"))
                .with_kind(Kind::Corrupt)
                .hint("`forkdisk check` tells what is missing; restore the file from a backup"),
            _ => e.context(format!("`{name}` cannot be read")),
        };
        let (size, parent) = match record.target {
            Below::Base(id) => (
                blocks(self.base_meta(id).map_err(missing)?.len) * BLOCK,
                None,
            ),
            Below::Layer(id) => {
                let (header, size, fresh) = self.layer_head(id).map_err(missing)?;
                if fresh && record.opened {
                    return Err(missing(
                        Error::new(
                            Kind::Corrupt,
                            "the layer file is cut: nothing is left of it but its header",
                        )
                        .layer(id)
                        .path(self.layers.path().join(layer_file(id)))
                        .hint("restore the file from a backup; what it stands on is not affected"),
                    ));
                }
                (size, Some(parent_of(&header)))
            }
        };
        Ok(Object {
            name: name.to_string(),
            kind: record.kind,
            id: record.target.id(),
            size,
            parent,
            created: record.created,
            message: record.message,
        })
    }
    /// Header and present size of a layer file, without opening its maps; and is the header all there is?
    fn layer_head(&self, id: Id) -> Result<(Header, u64, bool)> {
        let file = self.layers.open(&layer_file(id), Access::Read)?;
        let header = read_header(&*file)?;
        if header.layer != id.0 {
            return Err(Error::new(
                Kind::Corrupt,
                "the layer file holds another layer than its name says",
            )
            .path(file.path())
            .hint("restore the file from a backup"));
        }
        let found = crate::layer::recover::superblock(&*file, &header)?;
        Ok((header, found.superblock.size.get(), found.fresh))
    }
    /// Finds an object by name, or by a unique beginning of its id (at least four digits).
    pub fn resolve(&self, reference: &str) -> Result<Object> {
        let _lock = self.lock(false)?;
        self.resolve_locked(reference)
    }
    fn resolve_locked(&self, reference: &str) -> Result<Object> {
        match reference.split_once('@') {
            Some(_) => drop(names::split_snapshot(reference)?),
            None => names::check_part(reference)?,
        }
        match self.object(reference) {
            Err(e) if e.kind() == Kind::NotFound => {}
            other => return other,
        }
        let hex = reference.len() >= 4
            && reference
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if hex {
            let mut found = Vec::new();
            for name in self.all_names()? {
                let record = match read_name(&*self.names, &name) {
                    // Another one's damage; `check` tells.
                    Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::NotFound) => continue,
                    other => other?,
                };
                if record.target.id().to_string().starts_with(reference) {
                    found.push((name, record));
                }
            }
            if found.len() > 1 {
                let list: Vec<&str> = found.iter().map(|(n, _)| n.as_str()).collect();
                return Err(Error::new(
                    Kind::Invalid,
                    format!("`{reference}` could be any of {}", list.join(", ")),
                )
                .hint("give more digits of the id, or the name"));
            }
            if let Some((name, record)) = found.pop() {
                return self.object_of(&name, record);
            }
        }
        Err(Error::new(
            Kind::NotFound,
            format!("there is no `{reference}` in {}", self.path.display()),
        )
        .hint("`forkdisk ls` lists all names"))
    }

    // ---- opening ---------------------------------------------------------------------------------------------

    /// Opens a base, or finds it open.
    pub fn base(&self, id: Id) -> Result<Arc<Base>> {
        let mut open = self.open_bases.lock();
        if let Some(base) = open.get(&id).and_then(Weak::upgrade) {
            import::refresh_sums(self, &base);
            return Ok(base);
        }
        let meta = self.base_meta(id)?;
        let base = Arc::new(import::open_base(self, &meta)?);
        open.retain(|_, b| b.strong_count() > 0);
        open.insert(id, Arc::downgrade(&base));
        Ok(base)
    }
    /// Opens a sealed layer, or finds it open.
    fn sealed(&self, id: Id) -> Result<Arc<ReadLayer>> {
        let mut open = self.open_layers.lock();
        if let Some(layer) = open.get(&id).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let file = self
            .layers
            .open(&layer_file(id), Access::Read)
            .map_err(|e| match e.kind() {
                Kind::NotFound => e
                    .context(format!("layer {id} is gone"))
                    .with_kind(Kind::Corrupt),
                _ => e,
            })?;
        let layer = Arc::new(self.read_sealed(id, file)?);
        open.retain(|_, l| l.strong_count() > 0);
        open.insert(id, Arc::downgrade(&layer));
        Ok(layer)
    }
    fn read_sealed(&self, id: Id, file: Arc<dyn File>) -> Result<ReadLayer> {
        file.lock(false)
            .map_err(|e| in_use(&e, "the layer is open for writing"))?;
        let layer = ReadLayer::open(file)?;
        if layer.id() != id || layer.state() != crate::layer::State::Sealed {
            let what = if layer.id() == id {
                "a parent layer is not sealed"
            } else {
                "the file holds another layer"
            };
            return Err(Error::new(Kind::Corrupt, what)
                .layer(id)
                .path(layer.file().path())
                .hint("restore the layer file from a backup"));
        }
        Ok(layer)
    }
    /// The chain from `below` down; disks over the same parent share it.
    pub fn chain(&self, below: Below) -> Result<Arc<Chain>> {
        if let Some(chain) = self.open_chains.lock().get(&below).and_then(Weak::upgrade) {
            import::refresh_sums(self, chain.base());
            return Ok(chain);
        }
        let mut layers: Vec<Arc<ReadLayer>> = Vec::new();
        let mut tries = 0;
        let base = loop {
            match self.descend(below, &mut layers) {
                // A file was replaced while it was looked at: it stands on something else now, and what it stood on may be gone.
                Err(_) if tries < TRIES && layers.iter().any(|layer| self.is_replaced(layer)) => {
                    tries += 1;
                    layers.clear();
                    self.forget_replaced();
                }
                other => break other?,
            }
        };
        let chain = Arc::new(Chain::new(layers, base, self.budget.clone()));
        let mut open = self.open_chains.lock();
        open.retain(|_, c| c.strong_count() > 0);
        open.insert(below, Arc::downgrade(&chain));
        Ok(chain)
    }
    /// Opens the layers from `below` down, and the base.
    fn descend(&self, below: Below, layers: &mut Vec<Arc<ReadLayer>>) -> Result<Arc<Base>> {
        let mut at = below;
        loop {
            let id = match at {
                Below::Base(id) => return self.base(id),
                Below::Layer(id) => id,
            };
            let layer = self.sealed(id)?;
            let rank = layer.header().depth.get();
            // Ranks fall at each step, so no chain can be a circle.
            let falls = layers
                .last()
                .is_none_or(|upper| upper.header().depth.get() > rank);
            if !falls || layers.len() >= MAX_DEPTH as usize {
                let what = match falls {
                    true => "a chain has more layers than there can be",
                    false => "the depths of a chain of layers do not fit each other",
                };
                return Err(Error::new(Kind::Corrupt, what)
                    .layer(id)
                    .path(layer.file().path())
                    .hint("restore the layer file from a backup"));
            }
            at = parent_of(layer.header());
            layers.push(layer);
        }
    }
    /// Opens an object as a disk: for writing only if it is a disk.
    pub fn open_disk(&self, object: &Object, writable: bool) -> Result<Arc<dyn Disk>> {
        Ok(self.open_cow(object, writable)?)
    }
    /// [`Store::open_disk`], as the copy-on-write disk it is.
    pub fn open_cow(&self, object: &Object, writable: bool) -> Result<Arc<CowDisk>> {
        // Nobody replaces a layer's file, or takes what it hides from a layer below, while they are opened one after the other.
        let _lock = match writable || object.kind == ObjectKind::Base {
            true => None,
            false => Some(self.lock(false)?),
        };
        match object.kind {
            ObjectKind::Disk if writable => {
                let disk = self.open_cow_on(object, volatile::private()?)?;
                disk.settle()?;
                Ok(disk)
            }
            ObjectKind::Disk => self.open_to_read(object),
            _ if writable => Err(Error::new(
                Kind::ReadOnly,
                format!(
                    "`{}` is {} and can only be read",
                    object.name,
                    object.kind.one()
                ),
            )
            .hint(format!(
                "`forkdisk fork NAME --from {}` makes a writable disk from it",
                object.name
            ))),
            ObjectKind::Base => Ok(Arc::new(CowDisk::read_only(
                self.chain(Below::Base(object.id))?,
            ))),
            ObjectKind::Image | ObjectKind::Snapshot => {
                let chain = self.chain(Below::Layer(object.id))?;
                let disk = Arc::new(CowDisk::read_only(chain));
                let mut views = self.views.lock();
                views.retain(|(_, view)| view.strong_count() > 0);
                views.push((object.id, Arc::downgrade(&disk)));
                Ok(disk)
            }
        }
    }
    /// Opens a disk for writing, with memory ([`volatile::LEN`] bytes) from which [`Store::resume_cow`] can go on after the death of the process.
    /// That there is such a disk is durable before it takes its first write, or when [`CowDisk::settle`] returns.
    pub fn open_cow_on(&self, object: &Object, memory: Arc<SharedMemory>) -> Result<Arc<CowDisk>> {
        let _lock = self.lock(true)?;
        // It may have been renamed, snapshotted or removed since it was looked up.
        let object = self.object(&object.name)?;
        let staged = self.stage_opened(&object.name);
        let mut opened = self.open_top(&object, memory.clone());
        match (&opened, staged) {
            (Ok(_), Some(staged)) => self.place_opened(&object.name, staged),
            (Err(e), Some((temporary, _))) => {
                let _ = self.names.remove(&temporary);
                if e.kind() == Kind::NoSpace {
                    // The note took the room that the disk needs.
                    opened = self.open_top(&object, memory);
                }
            }
            (_, None) => {}
        }
        let (layer, chain) = opened?;
        self.with_quota(&object.name, CowDisk::writable(layer, chain))
    }
    /// Opens a disk that a dead process had open with [`Store::open_cow_on`] and the same memory, with all that it had accepted.
    pub fn resume_cow(&self, name: &str, memory: Arc<SharedMemory>) -> Result<Arc<CowDisk>> {
        // Without the lock of the names: the disk's users wait, and nobody renames or removes what is attached.
        let object = self.object(name)?;
        let file = self.open_exclusive(&object)?;
        let header = read_header(&*file)?;
        let sealed = crate::layer::recover::superblock(&*file, &header)?
            .superblock
            .state
            .get()
            == crate::format::STATE_SEALED;
        let begun = match volatile::find(&memory, &object.id)? {
            volatile::Found::Nothing => false,
            volatile::Found::Log { areas, .. } => {
                let empty = areas.iter().all(|a| a.entries.is_empty());
                if sealed && !empty {
                    return Err(Error::new(
                        Kind::Poisoned,
                        format!("disk `{name}` was sealed with changes that are not in it"),
                    )
                    .layer(object.id));
                }
                true
            }
        };
        if sealed || !begun {
            // It died in the midst of a snapshot, or before it accepted anything: then the names may not be durable either.
            drop(file);
            return self.open_cow_on(&object, memory);
        }
        let chain = self.chain(parent_of(&header))?;
        let keep = Store::keep_over(self.keep_of(name)?, &chain);
        let layer = Layer::resume(file, memory, keep)
            .map_err(|e| e.context(format!("cannot take over disk `{name}`")))?;
        layer.rest_on(self.names.clone());
        // The one that died may not have come to that.
        self.note_opened(name);
        self.with_quota(name, CowDisk::writable(layer, chain))
    }
    /// Opens a disk's own layer for writing, and the chain below. If a snapshot was interrupted after it sealed the layer, it is
    /// completed by a new layer on top. The names lock is held.
    fn open_top(&self, object: &Object, memory: Arc<SharedMemory>) -> Result<(Layer, Arc<Chain>)> {
        self.open_top_keeping(object, memory, self.keep_of(&object.name)?)
    }
    /// [`Store::open_top`] of a disk that keeps so much of its past.
    fn open_top_keeping(
        &self,
        object: &Object,
        memory: Arc<SharedMemory>,
        keep: Option<Keep>,
    ) -> Result<(Layer, Arc<Chain>)> {
        let file = self.open_exclusive(object)?;
        let header = read_header(&*file)?;
        let sealed = || -> Result<bool> {
            let found = crate::layer::recover::superblock(&*file, &header)?;
            Ok(found.superblock.state.get() == crate::format::STATE_SEALED)
        };
        // Nobody knows whether the seal and the name are on disk, and the new layer would rest on them.
        if sealed()? && {
            self.names.sync()?;
            crate::layer::recover::settle(&*file, &header)?;
            sealed()?
        } {
            drop(file);
            tracing::warn!(
                disk = object.name,
                "a snapshot was interrupted; the disk goes on in a new layer"
            );
            let fresh = self.put_layer_on_top(object)?;
            // Its history goes on from what is sealed.
            let lower = self.goes_on(&fresh);
            let keep = keep.map(|keep| Keep { lower, ..keep });
            let object = self.object_of(&object.name, fresh)?;
            return self.open_top_keeping(&object, memory, keep);
        }
        self.open_layer(object, file, memory, keep)
    }
    /// Opens the layer of a disk in `file`, which is locked exclusively and not sealed, for writing.
    fn open_layer(
        &self,
        object: &Object,
        file: Arc<dyn File>,
        memory: Arc<SharedMemory>,
        keep: Option<Keep>,
    ) -> Result<(Layer, Arc<Chain>)> {
        let chain = self.chain(parent_of(&read_header(&*file)?))?;
        let keep = Store::keep_over(keep, &chain);
        let layer = Layer::open_over(file, memory, keep, Some(chain.clone()))
            .map_err(|e| e.context(format!("cannot open disk `{}`", object.name)))?;
        // Whoever made or changed this name may have died before the directory was synced: what is acknowledged from here on must not
        // vanish with the name.
        layer.rest_on(self.names.clone());
        let opened = layer.opened();
        if opened.recovered {
            tracing::info!(
                disk = object.name,
                commits = opened.commits,
                "recovered a disk that was not closed cleanly"
            );
        }
        if let Some(commit) = opened.dropped {
            tracing::warn!(
                disk = object.name,
                commit,
                "the last commit was incomplete and was dropped: it was never acknowledged"
            );
        }
        if opened.damaged_copy {
            tracing::warn!(
                disk = object.name,
                "one copy of the superblock could not be read; the other was used"
            );
        }
        Ok((layer, chain))
    }
    /// Notes at a disk's name that its layer is more than a header from now on (its first superblock is durable): so a file that is cut
    /// to its header can be told from a fork that was never opened. The names lock is held. Users wait: a note that a power cut takes
    /// back is worth no more than that.
    fn note_opened(&self, name: &str) {
        if let Some(staged) = self.stage_opened(name) {
            self.place_opened(name, staged);
        }
    }
    /// The note, not at its place yet; `None` if it is there already. Nothing depends on it, and on a full host disk there may be no room for it.
    fn stage_opened(&self, name: &str) -> Option<(String, Arc<dyn File>)> {
        let mut record = read_name(&*self.names, name).ok().filter(|r| !r.opened)?;
        record.opened = true;
        let staged = names::stage(&*self.names, name, &record.encode(name)).ok()?;
        // The host allocates space for it now, and makes that durable with whatever is synced next.
        staged.1.start_writeback(0, BLOCK);
        Some(staged)
    }
    fn place_opened(&self, name: &str, (temporary, file): (String, Arc<dyn File>)) {
        let placed = file
            .sync()
            .and_then(|()| self.names.rename(&temporary, name));
        if let Err(e) = placed {
            let _ = self.names.remove(&temporary);
            tracing::debug!(disk = name, "cannot note that it was opened: {e}");
        }
    }
    /// The name of what was attached as `name` and had this id then: the same, or the one that it got since. `None` if it has none any more.
    pub fn present_name(&self, name: &str, kind: ObjectKind, id: Id) -> Result<Option<String>> {
        // Without the lock of the names, as in `resume_cow`.
        let known = read_name(&*self.names, name).ok();
        if known.as_ref().is_some_and(|r| r.target.id() == id) {
            return Ok(Some(name.to_string()));
        }
        for other in self.all_names()? {
            let record = read_name(&*self.names, &other);
            if record.is_ok_and(|r| r.kind == kind && r.target.id() == id) {
                return Ok(Some(other));
            }
        }
        // A disk writes into another layer after each snapshot.
        Ok(known.map(|_| name.to_string()))
    }
    fn open_exclusive(&self, object: &Object) -> Result<Arc<dyn File>> {
        let file = self.layers.open(&layer_file(object.id), Access::Write)?;
        file.lock(true)
            .map_err(|e| in_use(&e, &format!("`{}` is attached or in use", object.name)))?;
        Ok(file)
    }
}

/// What a layer stands on.
pub fn parent_of(header: &Header) -> Below {
    if header.parent_kind.get() == 0 {
        Below::Base(Id(header.parent))
    } else {
        Below::Layer(Id(header.parent))
    }
}

fn no_store(path: &Path) -> Error {
    Error::new(
        Kind::NoStore,
        format!("there is no store at {}", path.display()),
    )
    .hint("`forkdisk import` or `forkdisk init` makes one; --store names another")
}

fn no_directory(path: &Path) -> Error {
    let shown = path.display();
    Error::new(Kind::NoStore, format!("{shown} is a file, and no store"))
        .hint("a store is a directory: name one with -S DIR or FORKDISK_STORE")
}

fn in_use(e: &Error, what: &str) -> Error {
    if e.kind() != Kind::Busy {
        return e.clone();
    }
    Error::new(Kind::Busy, what)
        .hint("`forkdisk ls attached` shows what is attached; `forkdisk detach` ends it")
}

fn too_deep(name: &str, depth: u32) -> Error {
    Error::new(
        Kind::Invalid,
        format!("`{name}` stands on {depth} layers already, the most there can be"),
    )
    .hint(format!(
        "`forkdisk squash {name}` joins the layers it stands on; `forkdisk flatten {name}` leaves none"
    ))
}

/// Takes a file's lock, waiting for others.
fn wait_for(file: &dyn File, exclusive: bool) -> Result<()> {
    let mut waited = Duration::ZERO;
    let step = Duration::from_millis(2);
    loop {
        match file.lock(exclusive) {
            Err(e) if e.kind() == Kind::Busy && waited < LOCK_WAIT => {
                std::thread::sleep(step);
                waited += step;
            }
            Err(e) if e.kind() == Kind::Busy => {
                return Err(
                    Error::new(Kind::Busy, "another command keeps the store locked")
                        .path(file.path())
                        .hint("wait for it to end; `fuser` on the lock file names it"),
                );
            }
            other => return other,
        }
    }
}
