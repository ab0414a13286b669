//! What the store tells about itself: plain data, for the command line, the daemon and tests.

use crate::{
    error::{Error, Result},
    units::Id,
};

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ObjectKind {
    /// An image that is a base: a raw file.
    Base,
    /// An image that is a sealed layer (a committed disk).
    Image,
    /// A sealed layer, `disk@name`.
    Snapshot,
    /// A writable layer.
    Disk,
}

impl ObjectKind {
    /// The word used in tables and JSON: `base`, `image`, `snap`, `disk`.
    pub fn word(self) -> &'static str {
        match self {
            ObjectKind::Base => "base",
            ObjectKind::Image => "image",
            ObjectKind::Snapshot => "snap",
            ObjectKind::Disk => "disk",
        }
    }
    /// The same with its article, for sentences: `a base`, `an image`.
    pub fn one(self) -> &'static str {
        match self {
            ObjectKind::Base => "a base",
            ObjectKind::Image => "an image",
            ObjectKind::Snapshot => "a snap",
            ObjectKind::Disk => "a disk",
        }
    }
}

/// What a layer or a name stands on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Below {
    /// A base image.
    Base(Id),
    /// A sealed layer.
    Layer(Id),
}

impl Below {
    /// The id, whichever it is.
    pub fn id(self) -> Id {
        match self {
            Below::Base(id) | Below::Layer(id) => id,
        }
    }
}

/// A named object of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// Its name: `debian`, `web-1`, `web-1@clean`.
    pub name: String,
    /// What it is.
    pub kind: ObjectKind,
    /// Id of the base or layer the name refers to.
    pub id: Id,
    /// Virtual size in bytes.
    pub size: u64,
    /// What it stands on; `None` for a base.
    pub parent: Option<Below>,
    /// When the name was made: seconds since 1970, for people only (it orders nothing).
    pub created: u64,
    /// The message given with `-m`.
    pub message: Option<String>,
}

impl Object {
    /// The word for what it is: that of its kind, but `layer` for a layer that no name refers to ([`super::Store::resolve_any`]).
    pub fn word(&self) -> &'static str {
        match self.kind {
            ObjectKind::Image | ObjectKind::Disk if self.name == self.id.to_string() => "layer",
            kind => kind.word(),
        }
    }
}

/// Space of one object, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Virtual size.
    pub size: u64,
    /// Data reachable through it: its own blocks, its parents' and the base's that it does not hide.
    pub refer: u64,
    /// Host bytes that would be freed if this object alone were removed.
    pub exclusive: u64,
    /// Host bytes of what it refers to that others need too.
    pub shared: u64,
    /// Data blocks of its own layer (0 for a base).
    pub private: u64,
    /// Host bytes of its own layer file or base directory.
    pub allocated: u64,
    /// Layers between it and the base, its own included (0 for a base).
    pub depth: u32,
}

/// Space of several objects.
#[derive(Debug, Default)]
pub struct Space {
    /// Each of them.
    pub objects: Found<(Object, Usage)>,
    /// Host bytes of all that they stand on, each layer and base counted once.
    pub stored: u64,
}

/// More about one object, for `info`.
#[derive(Clone, Debug)]
pub struct Details {
    /// The object.
    pub object: Object,
    /// The base under it.
    pub base: BaseInfo,
    /// Layers between it and the base, its own included (0 for a base).
    pub depth: u32,
    /// Bytes of data blocks in its own layer (0 for a base).
    pub private_bytes: u64,
    /// Blocks its own layer records as zeros.
    pub zero_blocks: u64,
    /// Host bytes of its own layer file or base directory.
    pub allocated: u64,
    /// `writable`, `clean` or `sealed` for a layer; `base`.
    pub state: &'static str,
    /// Layer chain from the top down (layer ids, then the base's id).
    pub chain: Vec<Below>,
    /// The names of each of the chain, by its id.
    pub names: Vec<(Id, Vec<String>)>,
    /// Space.
    pub usage: Usage,
}

/// A base image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseInfo {
    /// Its id.
    pub id: Id,
    /// Length of the image file in bytes, possibly no multiple of the block size.
    pub len: u64,
    /// Host bytes allocated for it (0 where it is linked).
    pub allocated: u64,
    /// SHA-256 of its contents as `sha256:...`, where known.
    pub digest: Option<String>,
    /// The external file for a linked base.
    pub link: Option<std::path::PathBuf>,
    /// Are per-block checksums present?
    pub sums: bool,
    /// The path of the image file.
    pub path: std::path::PathBuf,
}

/// How an image comes into the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImportMode {
    /// Reflink where the filesystem can, else copy.
    Auto,
    /// Reflink or fail.
    Reflink,
    /// Copy, keeping holes.
    Copy,
    /// Leave the file where it is and record what it looked like.
    Link,
}

/// Where an image comes from.
pub enum ImportSource<'a> {
    /// A file.
    Path(&'a std::path::Path),
    /// A stream of raw bytes.
    Reader(&'a mut dyn std::io::Read),
    /// What another format holds.
    Content(&'a dyn Content),
}

/// The bytes of a disk that are kept in another format.
#[expect(clippy::len_without_is_empty, reason = "none is empty")]
pub trait Content {
    /// How many there are, at least one and at most [`MAX_DISK`](crate::units::MAX_DISK).
    fn len(&self) -> u64;
    /// The next of them, not before `from`, that may be something else than zeros; `None` if there are no more. Where it takes long, none of them: an empty
    /// range, at the place up to which there is nothing.
    fn data(&self, from: u64) -> Result<Option<std::ops::Range<u64>>>;
    /// Reads the bytes from `at` on, within the length.
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()>;
    /// Fails if they may not be those of the beginning any more.
    fn unchanged(&self) -> Result<()>;
}

/// A layer file.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Its id.
    pub id: Id,
    /// What it stands on.
    pub parent: Below,
    /// `writable`, `clean` or `sealed`.
    pub state: &'static str,
    /// Virtual size in bytes.
    pub size: u64,
    /// Host bytes allocated.
    pub allocated: u64,
    /// Bytes of data blocks.
    pub private_bytes: u64,
    /// Blocks recorded as zeros.
    pub zero_blocks: u64,
    /// Layers from here to the base.
    pub depth: u32,
    /// The names that refer to it.
    pub names: Vec<String>,
}

/// What a collection of garbage took away (or would).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GcReport {
    /// Layers and bases that nothing named or needed.
    pub layers: Vec<Id>,
    /// Bases among them with layers that stand on them. What removes names leaves such behind only if it is interrupted: the names may
    /// have been lost.
    pub inhabited: Vec<Id>,
    /// Temporary files of interrupted operations.
    pub files: Vec<String>,
    /// Layers that others need, and that gave back blocks which nobody sees.
    pub shrunk: Vec<Id>,
    /// Host bytes that these gave back.
    pub reclaimed: u64,
    /// Host bytes freed in all.
    pub bytes: u64,
}

/// Told how far long work is. `total` 0 means unknown.
pub trait Progress: Sync {
    /// `done` of `total` bytes are done. Returning `false` cancels the work (kind `Interrupted`).
    fn update(&self, done: u64, total: u64) -> bool;
}

/// Says nothing, never cancels.
pub struct Quiet;
impl Progress for Quiet {
    fn update(&self, _: u64, _: u64) -> bool {
        true
    }
}

/// What a removal would take away, in the order it would do it.
#[derive(Clone, Debug, Default)]
pub struct RemovePlan {
    /// Names that go, children before parents.
    pub names: Vec<Object>,
    /// Host bytes that become free.
    pub frees: u64,
}

/// One finding of `check` or `scrub`: what it concerns, and where it is as far as that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finding {
    /// The object or file it concerns: the names of a layer or base, else its id.
    pub what: String,
    /// The sentence.
    pub message: String,
    /// The layer whose file it is in.
    pub layer: Option<Id>,
    /// The base whose files it is in.
    pub base: Option<Id>,
    /// Blocks of the virtual disk: the first, and the one after the last.
    pub lba: Option<(u64, u64)>,
    /// First slot of the layer file.
    pub slot: Option<u32>,
    /// Byte offset in the file.
    pub offset: Option<u64>,
    /// All names that show what is damaged: not those above a layer that hides it.
    pub affected: Vec<String>,
}

/// What `check` found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// Space that nothing needs: exit code 3 if this is all.
    pub leaks: Vec<Finding>,
    /// Damage: exit code 4.
    pub corruptions: Vec<Finding>,
    /// Layers and bases looked at.
    pub checked: u64,
}

/// What is sound of a kind, and what is not.
#[derive(Debug)]
pub struct Found<T> {
    /// What can be read.
    pub sound: Vec<T>,
    /// What cannot.
    pub damaged: Vec<Damage>,
}

impl<T> Default for Found<T> {
    fn default() -> Found<T> {
        Found {
            sound: Vec::new(),
            damaged: Vec::new(),
        }
    }
}

/// A name or layer that is there and cannot be read.
#[derive(Clone, Debug)]
pub struct Damage {
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub error: Error,
}
