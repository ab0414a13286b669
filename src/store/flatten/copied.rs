//! What an interrupted flattening has copied, and how the next one goes on with it.
//!
//! Always true:
//! - the record says no more than what is durable in the files beside it;
//! - whatever of that is not as its record says was changed by a layer that the record names, or by one above it: who goes on stands on
//!   that layer, too, and copies anew what any layer above the state that was copied first says anything about.

use super::super::import::{PIECE, RUNNING, Sink};
use super::super::names::{TEMPORARY, read_record, stage};
use super::super::{Progress, Store};
use crate::chain::Chain;
use crate::disk::{CowDisk, Disk};
use crate::error::{Error, Kind, Result};
use crate::format::text::Record;
use crate::io::{Access, Dir, EntryKind, File};
use crate::layer::ReadLayer;
use crate::map::{Item, Items, WORDS, merge};
use crate::units::{BLOCK, Id, REGION_BLOCKS, Region};
use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

/// File in the directory of the base that is being made.
pub const COPIED: &str = "copied";
/// The same while it is written.
pub(super) const STAGED: &str = ".tmp-copied";

/// What the files of a base that is being made hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    /// The topmost layer of what was copied.
    pub(super) of: Id,
    /// The topmost layer of the attempts that went over it since: what was changed up to that one may be in there, too.
    pub(super) with: Id,
    /// So many bytes from the beginning on.
    pub(super) bytes: u64,
}

impl Copied {
    fn read(dir: &dyn Dir) -> Result<Copied> {
        let record = Record::decode(&read_record(dir, COPIED)?)?;
        let id = |key| {
            Id::parse(record.need(key)?)
                .ok_or_else(|| Error::new(Kind::Corrupt, format!("`{key}` is no id")))
        };
        Ok(Copied {
            of: id("of")?,
            with: id("with")?,
            bytes: record.number("bytes")?,
        })
    }
    /// Makes it the record, durable. All that it says is durable already.
    fn write(&self, dir: &dyn Dir) -> Result<()> {
        let record = Record::new()
            .with("of", self.of.to_string())
            .with("with", self.with.to_string())
            .with("bytes", self.bytes.to_string());
        let (staged, file) = stage(dir, COPIED, &record.encode())?;
        debug_assert_eq!(staged, STAGED);
        file.sync()?;
        dir.rename(&staged, COPIED)?;
        dir.sync()
    }
    /// Can who stands on these layers go on with what is in the directory?
    fn suits(&self, dir: &dyn Dir, layers: &HashSet<Id>) -> Result<bool> {
        let has = |file, len| Ok(dir.open(file, Access::Read)?.len()? >= len);
        Ok(self.bytes > 0
            && layers.contains(&self.of)
            && layers.contains(&self.with)
            && has("image", self.bytes)?
            && has("sums", BLOCK + self.bytes / BLOCK * 4)?)
    }
}

/// The directory of a base that is being made.
pub(super) struct Begun {
    pub(super) id: Id,
    pub(super) dir: Arc<dyn Dir>,
    /// Keeps `gc` away.
    #[expect(dead_code, reason = "held for its lock")]
    running: Arc<dyn File>,
    /// What an earlier attempt left in it.
    pub(super) copied: Option<Copied>,
}

/// What an interrupted attempt left.
struct Left {
    id: Id,
    dir: Arc<dyn Dir>,
    copied: Copied,
}

impl Begun {
    /// Has anything been copied that the next attempt can go on with?
    pub(super) fn is_worth_keeping(&self) -> bool {
        Copied::read(&*self.dir).is_ok_and(|copied| copied.bytes > 0)
    }
}

impl Store {
    /// A directory for the new base: what an interrupted attempt left whose copy suits the chain, else a new one.
    pub(super) fn begin_base(&self, chain: &Chain) -> Result<Begun> {
        let _lock = self.lock(true)?;
        for Left { id, dir, copied } in self.left_of(chain)? {
            let Ok(running) = dir.open(RUNNING, Access::Write) else {
                continue;
            };
            // Another command is at it.
            if running.lock(true).is_ok() {
                return Ok(Begun {
                    id,
                    dir,
                    running,
                    copied: Some(copied),
                });
            }
        }
        let id = (self.env.id)();
        self.create_base(id)
            .inspect_err(|_| self.remove_unfinished(id))
    }
    fn create_base(&self, id: Id) -> Result<Begun> {
        let temporary = format!("{TEMPORARY}{id}");
        self.bases.create_dir(&temporary)?;
        let dir = self.bases.subdir(&temporary)?;
        let running = dir.open(RUNNING, Access::CreateNew)?;
        running.lock(true)?;
        Ok(Begun {
            id,
            dir,
            running,
            copied: None,
        })
    }
    /// What interrupted attempts left that suits a chain: who has copied most first.
    fn left_of(&self, chain: &Chain) -> Result<Vec<Left>> {
        let layers: HashSet<Id> = chain.layers().iter().map(|layer| layer.id()).collect();
        let mut found = Vec::new();
        for (name, kind) in self.bases.list()? {
            let id = name.strip_prefix(TEMPORARY).and_then(Id::parse);
            let Some(id) = id.filter(|_| kind == EntryKind::Dir) else {
                continue;
            };
            // One that cannot be read is nobody's.
            let left = self.bases.subdir(&name).and_then(|dir| {
                let copied = Copied::read(&*dir)?;
                let suits = copied.suits(&*dir, &layers)?;
                Ok(suits.then_some(Left { id, dir, copied }))
            });
            found.extend(left.ok().flatten());
        }
        found.sort_by_key(|left| (Reverse(left.copied.bytes), left.id));
        Ok(found)
    }
    /// Host bytes of what an interrupted attempt left that the next one goes on with.
    pub(super) fn left_bytes(&self, chain: &Chain) -> Result<u64> {
        let _lock = self.lock(false)?;
        let left = self.left_of(chain)?.into_iter();
        let idle = |left: &Left| !self.import_running(&format!("{TEMPORARY}{}", left.id));
        match left.into_iter().find(idle) {
            Some(left) => left.dir.open("image", Access::Read)?.allocated(),
            None => Ok(0),
        }
    }
}

/// Copies into the files of a base that is being made, and says how far it came.
pub(super) struct Copy<'a> {
    dir: &'a dyn Dir,
    top: Id,
    view: &'a CowDisk,
    pub(super) sink: Sink<'a>,
    /// What the record says.
    noted: u64,
    /// Bytes that were copied, and how many of them when it was written.
    pub(super) bytes: u64,
    bytes_noted: u64,
}

/// What one block of the sums file is about: whatever comes behind what the record says is written into other blocks of it.
const GRAIN: u64 = BLOCK / 4 * BLOCK;
/// After so many bytes the record is written anew.
const NOTED: u64 = 256 << 20;

impl<'a> Copy<'a> {
    /// Begins, or goes on: what an earlier attempt copied is in the sink then.
    pub(super) fn begin(
        begun: &'a Begun,
        chain: &Chain,
        view: &'a CowDisk,
        digest: bool,
        progress: &'a dyn Progress,
    ) -> Result<Copy<'a>> {
        let size = view.size();
        let dir = &*begun.dir;
        let top = chain.layers().first().map_or(begun.id, |layer| layer.id());
        let mut changed: &[Arc<ReadLayer>] = &[];
        let mut until = 0;
        if let Some(copied) = begun.copied {
            changed = above(chain, copied.of);
            // Past its size a layer hides whatever lies below, and need not say so in its map.
            let sizes = changed.iter().map(|layer| layer.size());
            until = sizes.fold(copied.bytes.min(size), u64::min) / GRAIN * GRAIN;
            // Before any of that is so.
            let now = Copied {
                with: top,
                bytes: until,
                ..copied
            };
            if now != copied {
                now.write(dir)?;
            }
        }
        let sink = match begun.copied {
            None => Sink::new(dir, size, digest, progress)?,
            Some(_) => Sink::again(dir, until, size, digest, progress)?,
        };
        let mut copy = Copy {
            dir,
            top,
            view,
            sink,
            noted: until,
            bytes: 0,
            bytes_noted: 0,
        };
        copy.go_over(changed, until)?;
        Ok(copy)
    }
    /// Goes up to `until`, where an earlier attempt was, and copies anew what these layers changed since.
    fn go_over(&mut self, changed: &[Arc<ReadLayer>], until: u64) -> Result<()> {
        let mut sources: Vec<Items<'_>> = Vec::new();
        for layer in changed {
            sources.push(Box::new(layer.items(Region(0))));
        }
        let mut buf = Vec::new();
        for item in merge(sources) {
            let item = item?;
            for region in item.start()..item.end() {
                let region = Region(region);
                if region.first().at() >= until {
                    return self.sink.keep(until);
                }
                for blocks in told_of(&item) {
                    let first = region.first().at();
                    let (at, end) = (first + blocks.start * BLOCK, first + blocks.end * BLOCK);
                    let (at, end) = (at.min(until), end.min(until));
                    self.sink.keep(at)?;
                    for at in (at..end).step_by(PIECE) {
                        buf.resize((end - at).min(PIECE as u64) as usize, 0);
                        self.view.read(&mut buf, at)?;
                        self.sink.replace(&buf)?;
                        self.bytes += buf.len() as u64;
                    }
                }
            }
        }
        self.sink.keep(until)
    }
    /// Writes the record anew where enough was copied since the last time.
    pub(super) fn note_now_and_then(&mut self) -> Result<()> {
        match self.bytes - self.bytes_noted >= NOTED {
            true => self.note(),
            false => Ok(()),
        }
    }
    /// Makes what was copied durable, and says so.
    pub(super) fn note(&mut self) -> Result<()> {
        let bytes = self.sink.at / GRAIN * GRAIN;
        if bytes <= self.noted {
            return Ok(());
        }
        self.sink.sync()?;
        let copied = Copied {
            of: self.top,
            with: self.top,
            bytes,
        };
        copied.write(self.dir)?;
        (self.noted, self.bytes_noted) = (bytes, self.bytes);
        Ok(())
    }
}

/// The layers of a chain above one of them.
fn above(chain: &Chain, of: Id) -> &[Arc<ReadLayer>] {
    let layers = chain.layers();
    let of = layers.iter().position(|layer| layer.id() == of);
    &layers[..of.unwrap_or(layers.len())]
}

/// The blocks of its first region, or of each of its regions, that an item says anything about.
fn told_of(item: &Item) -> Vec<Range<u64>> {
    let map = match item {
        Item::Region(_, map) if !map.fill() => map,
        _ => return std::iter::once(0..REGION_BLOCKS as u64).collect(),
    };
    let present: &[u64; WORDS] = map.present();
    let told = |index: &u64| present[*index as usize / 64] >> (index % 64) & 1 == 1;
    let mut found: Vec<Range<u64>> = Vec::new();
    for index in (0..REGION_BLOCKS as u64).filter(told) {
        match found.last_mut() {
            Some(last) if last.end == index => last.end += 1,
            _ => found.push(index..index + 1),
        }
    }
    found
}
