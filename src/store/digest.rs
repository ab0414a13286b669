//! Digests: what tells whether two bases or sealed layers are the same, on any machine (FORMAT.md, section "A stream").
//!
//! Always true:
//! - a digest depends on contents and on the digest of the parent, never on what a name is, an id, a time, or the order of writes; the parent is the
//!   nearest layer below that has a name, or the base;
//! - what is kept in the records of a layer's names stays as long as they do: what the layer shows never changes, also when it and what lies below
//!   are joined or given back; and another store that was sent it knows it by that;
//! - what came from another store as a stream may also be known by the digest that it has there, so that what changes there can follow it;
//! - a disk has none: it changes.

use super::names::{NameRecord, read_name, stage};
use super::objects::object_target;
use super::{Below, Object, ObjectKind, Progress, Store, many, parent_of, stream};
use crate::base::Base;
use crate::chain::Chain;
use crate::error::{Error, Kind, Result};
use crate::format::stream::Digest;
use crate::units::{BLOCK_SIZE, Lba};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

/// Key of a digest in a name's record.
const KEY: &str = "digest";

/// Key of the digest by which another store knows what it sent, in a name's record and in that of a base.
pub(super) const KNOWN_AS: &str = "known_as";

/// Bytes hashed in one go.
const PIECE: u64 = 1 << 20;

/// Key of the digest of what a layer stood on when its own was computed, in a name's record.
const OVER: &str = "digest_over";

/// What a stream says of the digest of what it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Calls {
    /// It is that of the stream.
    ByItself,
    /// It is another one: of the layer that it holds all of, or over something else than that stands on; or that by which a base is known elsewhere.
    By(Digest),
    /// There is none to tell.
    Nothing,
    /// It would take more than the effort: what changes later cannot follow.
    Unknown,
}

impl Calls {
    /// What stands in the stream.
    pub fn digest(self) -> Option<Digest> {
        match self {
            Calls::By(digest) => Some(digest),
            _ => None,
        }
    }
}

/// Layers with their digests, and those of what they stand on.
type Computed = HashMap<Below, (Digest, Option<Digest>)>;

/// A layer without a name belongs to what stands on it: it is there because a fork or an export needed it, or a name went, and is joined sooner or later.
fn named_in(chain: &Chain, below: Below, known: &Known) -> Vec<Below> {
    let layers = chain.layers().iter().map(|l| Below::Layer(l.id()));
    let mut all: Vec<Below> = layers
        .filter(|this| *this == below || known.names.contains_key(this))
        .collect();
    all.push(Below::Base(chain.base().id()));
    all
}

/// How much may be done for a digest that is not known.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// The largest base that is read, in bytes: one that is mostly holes takes as long as one that is not.
    pub largest_base: u64,
    /// Is what was computed kept?
    pub keep: bool,
}

impl Effort {
    /// Whatever it takes.
    pub const ANY: Effort = Effort {
        largest_base: u64::MAX,
        keep: true,
    };
    /// What `info` does without being asked: bases of up to 16 GiB are read.
    pub const USUAL: Effort = Effort {
        largest_base: super::import::DIGEST_MAX,
        keep: true,
    };
    /// The same without a change of the store.
    #[must_use]
    pub fn unkept(self, unkept: bool) -> Effort {
        Effort {
            keep: self.keep && !unkept,
            ..self
        }
    }
}

/// The digests that are known, and the names of what is sealed.
#[derive(Default)]
struct Known {
    digests: HashMap<Below, Digest>,
    /// What they are known by elsewhere.
    elsewhere: HashMap<Below, Digest>,
    names: HashMap<Below, Vec<String>>,
    /// A name could not be read: what it is of may seem to have none.
    partial: bool,
}

/// A part of some work as the whole sees it.
struct Part<'a> {
    whole: &'a dyn Progress,
    before: u64,
    total: u64,
}

impl Progress for Part<'_> {
    fn update(&self, done: u64, _: u64) -> bool {
        self.whole.update(self.before + done, self.total)
    }
}

impl Store {
    /// The digest of a base, image or snapshot: known, or computed. `None` for a disk, and where it would take more than the `effort`.
    pub fn digest(
        &self,
        object: &Object,
        effort: Effort,
        progress: &dyn Progress,
    ) -> Result<Option<Digest>> {
        if object.kind == ObjectKind::Disk {
            return Ok(None);
        }
        // Its own record tells, if any does: no need to read all others.
        let own = {
            let _lock = self.lock(false)?;
            read_name(&*self.names, &object.name).ok()
        };
        let target = object_target(object);
        let own = own.filter(|record| record.target == target);
        match own.and_then(|record| self.digest_in(&record)) {
            Some(digest) => Ok(Some(digest)),
            None => self.digest_of(target, effort, progress),
        }
    }
    /// What a record says, or that of the base it refers to.
    fn digest_in(&self, record: &NameRecord) -> Option<Digest> {
        self.digests_in(record).0
    }
    /// And the digest by which it is known elsewhere.
    fn digests_in(&self, record: &NameRecord) -> (Option<Digest>, Option<Digest>) {
        let meta = match record.target {
            Below::Base(id) => self.base_meta(id).ok(),
            Below::Layer(_) => None,
        };
        let of_base = meta.as_ref().and_then(|meta| meta.digest.as_deref());
        let written = of_base.or(record.extra.get(KEY));
        let elsewhere = meta.as_ref().and_then(|meta| meta.known_as.as_deref());
        let elsewhere = elsewhere.or(record.extra.get(KNOWN_AS));
        (
            written.and_then(Digest::parse),
            elsewhere.and_then(Digest::parse),
        )
    }
    /// What a stream of something is to say of the digest of that: of everything, or since something with this digest.
    pub fn calls(
        &self,
        object: &Object,
        since: Option<(&Object, Digest)>,
        effort: Effort,
        progress: &dyn Progress,
    ) -> Result<Calls> {
        let below = match (object.kind, since) {
            (ObjectKind::Disk, _) => return Ok(Calls::Nothing),
            (ObjectKind::Base, None) => {
                let elsewhere = self.known_elsewhere(object)?;
                return Ok(elsewhere.map_or(Calls::Nothing, Calls::By));
            }
            (ObjectKind::Base, Some(_)) | (_, None) => None,
            (_, Some((since, over))) => {
                let below = self.named_chain(object_target(object))?.get(1).copied();
                (below == Some(object_target(since))).then_some(over)
            }
        };
        if let Some(over) = below {
            // The stream is what a digest is computed of.
            return Ok(match self.kept(object)? {
                None => Calls::ByItself,
                Some((_, then)) if then == Some(over) => Calls::ByItself,
                Some((digest, _)) => Calls::By(digest),
            });
        }
        let digest = self.digest(object, effort, progress)?;
        Ok(digest.map_or(Calls::Unknown, Calls::By))
    }
    /// Keeps the digest of a stream that [`Calls::ByItself`] was said of.
    pub fn keep_digest(&self, object: &Object, since: (&Object, Digest), digest: Digest) {
        let target = object_target(object);
        match self.named_chain(target) {
            Ok(all) if all.get(1) == Some(&object_target(since.0)) => {
                self.keep_digests(&all, &HashMap::from([(target, (digest, Some(since.1)))]));
            }
            _ => {}
        }
    }
    /// The digest by which the store that it came from knows something, if that is not the one that it has here.
    pub fn known_elsewhere(&self, object: &Object) -> Result<Option<Digest>> {
        let (here, elsewhere) = match self.own_record(object)? {
            Some(record) => self.digests_in(&record),
            None => (None, None),
        };
        Ok(elsewhere.filter(|_| elsewhere != here))
    }
    /// The digest that is kept of a layer, and what it was computed over.
    fn kept(&self, object: &Object) -> Result<Option<(Digest, Option<Digest>)>> {
        let Some(record) = self.own_record(object)? else {
            return Ok(None);
        };
        let over = record.extra.get(OVER).and_then(Digest::parse);
        Ok(self.digest_in(&record).map(|digest| (digest, over)))
    }
    /// The record of its name, if that still refers to it.
    fn own_record(&self, object: &Object) -> Result<Option<NameRecord>> {
        let _lock = self.lock(false)?;
        let record = match read_name(&*self.names, &object.name) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            record => record?,
        };
        Ok(Some(record).filter(|record| record.target == object_target(object)))
    }
    /// A base or layer, the layers below it that have names, and the base.
    fn named_chain(&self, below: Below) -> Result<Vec<Below>> {
        let chain = self.chain(below)?;
        let _lock = self.lock(false)?;
        Ok(named_in(&chain, below, &self.known()?))
    }
    /// The digest of a base or sealed layer, as [`Store::digest`].
    pub fn digest_of(
        &self,
        below: Below,
        effort: Effort,
        progress: &dyn Progress,
    ) -> Result<Option<Digest>> {
        // While they are open nobody removes them.
        let chain = self.chain(below)?;
        let known = {
            let _lock = self.lock(false)?;
            self.known()?
        };
        let all = named_in(&chain, below, &known);
        // From the newest whose digest is known upwards.
        let found = all.iter().position(|b| known.digests.contains_key(b));
        let (mut digest, mut unknown) = match found {
            Some(at) => (known.digests.get(&all[at]).copied(), at),
            None if chain.base().len() > effort.largest_base => return Ok(None),
            None => (None, all.len()),
        };
        let size = |below: &&Below| chain.layers().iter().find(|l| l.id() == below.id());
        let sizes = all[..unknown].iter().filter_map(|below| size(&below));
        let sizes = sizes.map(|layer| layer.size());
        let base_len = match digest {
            Some(_) => 0,
            None => chain.base().len(),
        };
        let mut part = Part {
            whole: progress,
            before: 0,
            total: sizes.sum::<u64>() + base_len,
        };
        let mut computed = Computed::new();
        let mut compute = || -> Result<()> {
            while unknown > 0 {
                unknown -= 1;
                let this = all[unknown];
                let made = match (digest, this) {
                    (Some(parent), Below::Layer(_)) => {
                        let lower = self.state_of(all[unknown + 1])?;
                        let upper = self.state_of(this)?;
                        let since = Some((&lower, parent));
                        let ignore = &mut |_: &[u8]| Ok(());
                        let totals = stream::write_stream(&upper, since, None, ignore, &part)?;
                        part.before += upper.size();
                        totals.digest
                    }
                    _ => {
                        let made = of_base(chain.base(), &part)?;
                        part.before += base_len;
                        made
                    }
                };
                computed.insert(this, (made, digest));
                digest = Some(made);
            }
            Ok(())
        };
        let done = compute();
        // Also what was computed before it was interrupted.
        if effort.keep && !computed.is_empty() {
            self.keep_digests(&all, &computed);
        }
        done.map(|()| digest)
    }
    /// Keeps digests in the records of names. Nothing depends on it: what is not kept is computed again.
    fn keep_digests(&self, chain: &[Below], computed: &Computed) {
        let kept = (|| {
            let _lock = self.lock(true)?;
            let known = self.known()?;
            // They may have been put on something else meanwhile, and names may have come and gone.
            let mut now = Vec::new();
            let mut next = chain.first().copied();
            while let Some(below) = next {
                let named = known.names.contains_key(&below);
                if now.is_empty() || named || matches!(below, Below::Base(_)) {
                    now.push(below);
                }
                next = match below {
                    Below::Layer(id) => Some(parent_of(&self.layer_head(id)?.0)),
                    Below::Base(_) => None,
                };
            }
            if now != chain || known.partial {
                return Ok(());
            }
            for (below, digest) in computed {
                for name in known.names.get(below).into_iter().flatten() {
                    self.write_digest(name, Some(*digest))?;
                }
            }
            self.names.sync()
        })();
        if let Err(e) = kept {
            tracing::debug!("digests are not kept: {e}");
        }
    }
    /// Writes a name's record anew, not durable before `names/` is synced. The names lock is held.
    fn write_digest(&self, name: &str, digest: Option<(Digest, Option<Digest>)>) -> Result<()> {
        let mut record = read_name(&*self.names, name)?;
        let over = digest.and_then(|(_, over)| over);
        record.extra.set(KEY, digest.map(|(d, _)| d.to_string()));
        record.extra.set(OVER, over.map(|d| d.to_string()));
        if digest.is_none() {
            record.extra.set(KNOWN_AS, None);
        }
        let (temporary, file) = stage(&*self.names, name, &record.encode(name))?;
        let placed = file
            .sync()
            .and_then(|()| self.names.rename(&temporary, name));
        if placed.is_err() {
            let _ = self.names.remove(&temporary);
        }
        placed
    }
    /// Forgets the digests of a layer and of all that stands on it, durably: they are computed anew when they are asked for.
    pub fn forget_digest(&self, below: Below) -> Result<()> {
        let _lock = self.lock(true)?;
        let graph = self.graph()?;
        let wanted = HashMap::from([(below, "")]);
        let standing = graph.standing_on(&wanted);
        let mut forgotten = false;
        for name in self.all_names()? {
            let record = match read_name(&*self.names, &name) {
                Ok(record) => record,
                // It has no digest that anybody would believe.
                Err(e) if e.kind() == Kind::Corrupt => continue,
                Err(e) => return Err(e),
            };
            if (record.extra.get(KEY).is_some() || record.extra.get(KNOWN_AS).is_some())
                && standing.contains_key(&record.target)
            {
                self.write_digest(&name, None)?;
                forgotten = true;
            }
        }
        match forgotten {
            true => self.names.sync(),
            false => Ok(()),
        }
    }
    /// The digests that are known, by name.
    pub fn known_digests(&self) -> Result<HashMap<String, Digest>> {
        let _lock = self.lock(false)?;
        let known = self.known()?;
        let mut found = HashMap::new();
        for (below, names) in known.names {
            if let Some(digest) = known.digests.get(&below) {
                found.extend(names.into_iter().map(|name| (name, *digest)));
            }
        }
        Ok(found)
    }
    /// Other names of what is known to have this digest, sorted: those of other bases or layers, and further names of the same one.
    pub fn same_as(&self, object: &Object, digest: Digest) -> Result<Vec<String>> {
        let _lock = self.lock(false)?;
        let known = self.known()?;
        let this = object_target(object);
        let others = known.digests.iter();
        let mut found: Vec<String> = others
            .filter(|(below, other)| **below != this && **other == digest)
            .map(|(below, _)| *below)
            .chain([this])
            .filter_map(|below| known.names.get(&below))
            .flatten()
            .filter(|name| **name != object.name)
            .cloned()
            .collect();
        found.sort();
        Ok(found)
    }
    /// What the records say. The names lock is held.
    fn known(&self) -> Result<Known> {
        let mut known = Known::default();
        let all = self.all_names()?;
        let records = many::each(&all, |name| read_name(&*self.names, name));
        for (name, record) in all.into_iter().zip(records) {
            let record = match record {
                Ok(record) if record.kind != ObjectKind::Disk => record,
                Ok(_) => continue,
                Err(e) if e.kind() == Kind::Corrupt => {
                    known.partial = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let (digest, elsewhere) = self.digests_in(&record);
            known.digests.extend(digest.map(|d| (record.target, d)));
            known
                .elsewhere
                .extend(elsewhere.map(|d| (record.target, d)));
            known.names.entry(record.target).or_default().push(name);
        }
        Ok(known)
    }
    /// The base or sealed layer with this digest, here or where it came from, and so many bytes, the newest layer first. Digests that are not known are
    /// computed.
    pub(super) fn with_digest(
        &self,
        digest: Digest,
        size: u64,
        progress: &dyn Progress,
    ) -> Result<Below> {
        let known = {
            let _lock = self.lock(false)?;
            self.known()?
        };
        let mut all = Vec::new();
        for below in known.names.keys() {
            let head = (|| Ok::<_, Error>((self.size_of(*below)?, self.rank_of(*below)?)))();
            match head {
                Ok((found, depth)) if found == size => all.push((depth, *below)),
                Ok(_) => {}
                Err(e) => tracing::warn!("{} is left out: {e}", below.id()),
            }
        }
        all.sort_by_key(|(depth, below)| (std::cmp::Reverse(*depth), *below));
        for digests in [&known.digests, &known.elsewhere] {
            let as_known = |(_, below): &&(u32, Below)| digests.get(below) == Some(&digest);
            if let Some((_, below)) = all.iter().find(as_known) {
                return Ok(*below);
            }
        }
        all.retain(|(_, below)| !known.digests.contains_key(below));
        for (_, below) in all {
            match self.digest_of(below, Effort::ANY, progress) {
                Ok(Some(found)) if found == digest => return Ok(below),
                Ok(_) => {}
                Err(e) if e.kind() == Kind::Corrupt => {
                    tracing::warn!("{} is left out: {e}", below.id());
                }
                Err(e) => return Err(e),
            }
        }
        Err(Error::new(
            Kind::NotFound,
            format!("the stream is a difference to {digest}, which is not in this store"),
        )
        .hint(
            "import first what it was exported `--since`: `forkdisk info` shows the digest there. If layers below that were joined \
             since it had its digest (`squash`, `rm` of what was in between), send the difference since something older, or everything: \
             `forkdisk export REF FILE -O stream`",
        ))
    }
}

/// SHA-256 of the content of a base.
fn of_base(base: &Arc<Base>, progress: &dyn Progress) -> Result<Digest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; PIECE as usize];
    let zeros = vec![0; PIECE as usize];
    let mut at = 0;
    while at < base.len() {
        let len = (base.len() - at).min(PIECE);
        let whole = (len as usize).next_multiple_of(BLOCK_SIZE);
        // Holes need not be read, where they were holes ever since.
        let piece = match base.data_ranges(at, len)?.is_empty() {
            true => &zeros,
            false => {
                base.read_blocks(Lba::of(at), &mut buffer[..whole])?;
                &buffer
            }
        };
        hasher.update(&piece[..len as usize]);
        at += len;
        if !progress.update(at, base.len()) {
            return Err(Error::new(Kind::Interrupted, "interrupted").hint("run it again"));
        }
    }
    Ok(Digest(hasher.finalize().into()))
}
