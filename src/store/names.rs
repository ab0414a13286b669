//! Names: what may be one, and the text record behind each.

use super::{Below, ObjectKind};
use crate::error::{Error, Kind, Result};
use crate::format::text::{MAX_RECORD, Record};
use crate::format::{MAX_MESSAGE, MAX_NAME};
use crate::io::{Access, Dir, File};
use crate::units::Id;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Prefix of files that are under way: no name can begin with it.
pub const TEMPORARY: &str = ".tmp-";

/// Checks a name without `@`: an image or a disk, or the last part of a snapshot.
pub fn check_part(name: &str) -> Result<()> {
    let bad = |what: String| {
        Err(Error::new(Kind::Invalid, what).hint(
            "a name has 1 to 100 bytes, no `/`, `@`, white space or control characters, and does not begin with `-` or `.`",
        ))
    };
    let shown: String = name.chars().take(40).flat_map(char::escape_debug).collect();
    if name.is_empty() {
        return bad("the name is empty".into());
    }
    if name.len() > MAX_NAME {
        return bad(format!(
            "the name `{shown}...` has {} bytes; at most {MAX_NAME} are allowed",
            name.len()
        ));
    }
    if name.starts_with(['-', '.']) {
        return bad(format!("the name `{shown}` begins with `{}`", &name[..1]));
    }
    if let Some(c) = name
        .chars()
        .find(|c| matches!(c, '/' | '@') || c.is_control() || c.is_whitespace())
    {
        return bad(format!("the name `{shown}` contains {c:?}"));
    }
    Ok(())
}

/// Splits and checks `DISK@NAME`.
pub fn split_snapshot(name: &str) -> Result<(&str, &str)> {
    let Some((disk, snap)) = name.split_once('@') else {
        return Err(
            Error::new(Kind::Invalid, format!("`{name}` does not name a snapshot"))
                .hint("a snapshot is written DISK@NAME"),
        );
    };
    check_part(disk)?;
    check_part(snap)?;
    Ok((disk, snap))
}

/// Checks a message.
pub fn check_message(message: Option<&str>) -> Result<()> {
    match message {
        Some(m) if m.len() > MAX_MESSAGE => Err(Error::new(
            Kind::Invalid,
            format!(
                "the message has {} bytes; at most {MAX_MESSAGE} are allowed",
                m.len()
            ),
        )
        .hint("shorten the message")),
        _ => Ok(()),
    }
}

/// What a name's file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameRecord {
    /// What it is.
    pub kind: ObjectKind,
    /// Base or layer it refers to.
    pub target: Below,
    /// Seconds since 1970.
    pub created: u64,
    /// Message.
    pub message: Option<String>,
    /// Its layer was opened for writing, and so is more than its header.
    pub opened: bool,
    /// What else the record says: settings of a disk, what is known of a layer, and what newer versions wrote.
    pub extra: Extra,
}

/// Further lines of a name's record: kept when it is written anew, whether they are understood or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra(BTreeMap<String, String>);

/// Keys that a record gives a meaning of its own.
const KNOWN: &[&str] = &[
    "name", "former", "kind", "id", "created", "message", "opened",
];

impl Extra {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
    /// Sets or, with `None`, takes away the value of `key`.
    pub fn set(&mut self, key: &str, value: Option<String>) {
        debug_assert!(!KNOWN.contains(&key), "`{key}` has its own field");
        match value {
            Some(value) => self.0.insert(key.to_string(), value),
            None => self.0.remove(key),
        };
    }
    fn of(record: &Record) -> Extra {
        let others = record.iter().filter(|(key, _)| !KNOWN.contains(key));
        Extra(
            others
                .map(|(key, value)| (key.to_string(), value.to_string()))
                .collect(),
        )
    }
}

impl NameRecord {
    /// Its bytes, as the file of `name`.
    pub fn encode(&self, name: &str) -> Vec<u8> {
        self.record(name).encode()
    }
    fn record(&self, name: &str) -> Record {
        Record::new()
            .with("name", name)
            .with("kind", self.kind.word())
            .with("id", self.target.id().to_string())
            .with("created", self.created.to_string())
            .with_some("message", self.message.as_deref())
            .with_some("opened", self.opened.then_some("1"))
            .with_all(&self.extra.0)
    }
    /// Reads the record that stands in the file of `name`. One that belongs elsewhere is damage: a file copied over another.
    pub fn decode(bytes: &[u8], name: &str) -> Result<NameRecord> {
        let record = Record::decode(bytes)?;
        // Records of the first stores do not say whose they are; one that is being renamed says both.
        let whose = [record.get("name"), record.get("former")];
        if whose[0].is_some() && !whose.contains(&Some(name)) {
            return Err(Error::new(
                Kind::Corrupt,
                format!("it is the record of `{}`", whose[0].unwrap_or_default()),
            ));
        }
        let kind = match record.need("kind")? {
            "base" => ObjectKind::Base,
            "image" => ObjectKind::Image,
            "snap" => ObjectKind::Snapshot,
            "disk" => ObjectKind::Disk,
            other => return Err(Error::new(Kind::Corrupt, format!("unknown kind `{other}`"))),
        };
        let id = Id::parse(record.need("id")?)
            .ok_or_else(|| Error::new(Kind::Corrupt, "`id` is no id"))?;
        let target = if kind == ObjectKind::Base {
            Below::Base(id)
        } else {
            Below::Layer(id)
        };
        Ok(NameRecord {
            kind,
            target,
            created: record.number("created")?,
            message: record.get("message").map(String::from),
            opened: record.get("opened").is_some(),
            extra: Extra::of(&record),
        })
    }
}

/// Reads a whole text record of a directory.
pub fn read_record(dir: &dyn Dir, name: &str) -> Result<Vec<u8>> {
    let file = dir.open(name, Access::Read)?;
    let len = file.len()?;
    if len > MAX_RECORD {
        return Err(Error::new(
            Kind::Corrupt,
            format!("it has {len} bytes, too many for a text record"),
        )
        .path(file.path()));
    }
    let mut bytes = vec![0; len as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Reads a name; `NotFound` if there is none.
pub fn read_name(names: &dyn Dir, name: &str) -> Result<NameRecord> {
    let bytes = read_record(names, name)?;
    NameRecord::decode(&bytes, name).map_err(|e| {
        e.context(format!("the record of `{name}` is damaged"))
            .path(names.path().join(name))
            .hint("`forkdisk check` lists what is damaged; `forkdisk check --repair` rebuilds names from the layer headers")
    })
}

/// Is this record the only one of what it refers to, as far as it says? Not if it does not say its own name (it could have been copied), or if
/// the name is still there that it had before.
pub fn is_alone(names: &dyn Dir, name: &str) -> Result<bool> {
    let record = Record::decode(&read_record(names, name)?)?;
    let former = match record.get("former") {
        Some(former) if former != name => names.entry(former)?,
        _ => None,
    };
    Ok(record.get("name") == Some(name) && former.is_none())
}

/// Writes `bytes` into a new temporary file for `name`; returns the temporary's name, and the file, which is not durable yet.
pub fn stage(dir: &dyn Dir, name: &str, bytes: &[u8]) -> Result<(String, Arc<dyn File>)> {
    let temporary = format!("{TEMPORARY}{name}");
    let file = match dir.open(&temporary, Access::CreateNew) {
        // A leftover of an interrupted operation: the lock is held, so nobody else uses it.
        Err(e) if e.kind() == Kind::Exists => {
            dir.remove(&temporary)?;
            dir.open(&temporary, Access::CreateNew)?
        }
        other => other?,
    };
    if let Err(e) = file.write_at(bytes, 0) {
        let _ = dir.remove(&temporary);
        return Err(e);
    }
    Ok((temporary, file))
}

/// Renames a name; `Exists` if the new one is taken. Its record says both names before it moves, so that it is sound at either place. Not
/// durable before the directory is synced.
pub fn rename(names: &dyn Dir, old: &str, new: &str) -> Result<()> {
    if names.entry(new)?.is_some() {
        return Err(Error::new(Kind::Exists, format!("`{new}` exists already")));
    }
    let record = read_name(names, old)?.record(new).with("former", old);
    let (temporary, file) = stage(names, old, &record.encode())?;
    file.sync()?;
    names.rename(&temporary, old)?;
    // A power cut must not keep the second step without the first.
    names.sync()?;
    names.rename_new(old, new)
}
