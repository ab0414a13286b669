//! The JSON documents: one each, with `"schema": 1`, sizes as integer bytes, times as seconds since 1970.
//!
//! Fields are only ever added. A field whose value is unknown is `null`, not missing.

use crate::{
    cli::names::Names,
    daemon::{Attached, Via},
    store::{Damage, Object, Usage},
};
use serde::Serialize;
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

/// The version of all documents.
pub const SCHEMA: u32 = 1;

/// A document: the schema, then the fields of `body`.
#[derive(Serialize)]
pub struct Document<T: Serialize> {
    schema: u32,
    #[serde(flatten)]
    body: T,
}

impl<T: Serialize> Document<T> {
    /// Wraps what a command has to say.
    pub fn new(body: T) -> Document<T> {
        Document {
            schema: SCHEMA,
            body,
        }
    }
    /// The text, ending in a line break.
    pub fn text(&self) -> String {
        let mut text = serde_json::to_string_pretty(self)
            .unwrap_or_else(|e| unreachable!("documents hold nothing that JSON cannot: {e}"));
        text.push('\n');
        text
    }
}

/// Something that is there and cannot be read.
#[derive(Serialize)]
pub struct DamageDoc {
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub message: String,
}

impl DamageDoc {
    /// Describes all damage, each name once.
    pub fn all(damaged: &[Damage]) -> Vec<DamageDoc> {
        let mut seen = HashSet::new();
        let once = damaged.iter().filter(|d| seen.insert(d.name.as_str()));
        once.map(|d| DamageDoc {
            name: d.name.clone(),
            message: d.error.to_string(),
        })
        .collect()
    }
}

/// An object of the store.
#[derive(Clone, Serialize)]
pub struct ObjectDoc {
    /// Its name.
    pub name: String,
    /// `base`, `image`, `snap` or `disk`.
    pub kind: &'static str,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Virtual size.
    pub size: u64,
    /// Name of what it stands on, or its id where it has no name; `null` for a base.
    pub parent: Option<String>,
    /// Id of what it stands on.
    pub parent_id: Option<String>,
    /// When the name was made.
    pub created: u64,
    /// The message given with `-m`.
    pub message: Option<String>,
}

impl ObjectDoc {
    /// Describes `object`; `names` knows its parent's name.
    pub fn new(object: &Object, names: &Names) -> ObjectDoc {
        let parent = object.parent.map(|below| below.id());
        ObjectDoc {
            name: object.name.clone(),
            kind: object.word(),
            id: object.id.to_string(),
            size: object.size,
            parent: parent.map(|id| names.first(id).map_or(id.to_string(), str::to_string)),
            parent_id: parent.map(|id| id.to_string()),
            created: object.created,
            message: object.message.clone(),
        }
    }
}

/// The space of an object.
#[derive(Clone, Serialize)]
pub struct UsageDoc {
    /// Virtual size.
    pub size: u64,
    /// Data that is reachable through it.
    pub refer: u64,
    /// Host bytes that only it needs.
    pub exclusive: u64,
    /// Host bytes that others need too.
    pub shared: u64,
    /// Data in its own layer.
    pub private_bytes: u64,
    /// Host bytes of its own layer or base.
    pub allocated: u64,
    /// Layers above the base, its own included.
    pub depth: u32,
}

impl From<Usage> for UsageDoc {
    fn from(usage: Usage) -> UsageDoc {
        UsageDoc {
            size: usage.size,
            refer: usage.refer,
            exclusive: usage.exclusive,
            shared: usage.shared,
            private_bytes: usage.private,
            allocated: usage.allocated,
            depth: usage.depth,
        }
    }
}

/// An attachment.
#[derive(Clone, Serialize)]
pub struct AttachedDoc {
    /// Name of what is attached.
    pub name: String,
    /// Its kind.
    pub kind: &'static str,
    /// Its id.
    pub id: String,
    /// Virtual size.
    pub size: u64,
    /// `loop`, `file` or `nbd`.
    pub via: &'static str,
    /// The block device, for `loop`.
    pub device: Option<String>,
    /// Where it is found, for `nbd`.
    pub uri: Option<String>,
    /// The file that shows the disk.
    pub file: PathBuf,
    /// Can it only be read?
    pub read_only: bool,
    /// Does the kernel read the image by itself?
    pub passthrough: bool,
    /// How many times it is attached.
    pub count: u32,
    /// Where it is mounted, as this process sees it.
    pub mounts: Vec<PathBuf>,
}

impl AttachedDoc {
    /// Describes an attachment and where it is mounted.
    pub fn new(attached: &Attached, mounts: &[PathBuf]) -> AttachedDoc {
        AttachedDoc {
            name: attached.name.clone(),
            kind: attached.kind.word(),
            id: attached.id.to_string(),
            size: attached.size,
            via: via_word(attached.via),
            device: attached.device.clone(),
            uri: attached.uri(),
            file: attached.file.clone(),
            read_only: attached.read_only,
            passthrough: attached.passthrough,
            count: attached.count,
            mounts: mounts.to_vec(),
        }
    }
}

/// The word for a way of attaching.
pub fn via_word(via: Via) -> &'static str {
    match via {
        Via::Loop => "loop",
        Via::File => "file",
        Via::Nbd => "nbd",
    }
}

/// What a command without further results answers: which store it worked on, and whether it only
/// pretended.
#[derive(Serialize)]
pub struct Done<'a> {
    /// The store.
    pub store: &'a Path,
    /// Was it `--dry-run`?
    pub dry_run: bool,
}
