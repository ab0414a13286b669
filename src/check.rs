//! `check`: is the structure of a store sound?
//!
//! Shares only `format`, `map`, recovery's reading and the seam with the code that writes: it must not trust the code that made the mess. It
//! changes nothing. Data blocks are not read here; their checksums are verified whenever they are read.

use crate::error::{Error, Kind, Result};
use crate::format::{
    self, DATA_START, FreeExtent, Header, Pointer, STATE_SEALED, STATE_WRITABLE, Superblock,
};
use crate::io::{Access, EntryKind, File};
use crate::layer::{MappedRun, read_header, recover};
use crate::map::run::Run;
use crate::map::{Item, Items, merge};
use crate::store::names::{TEMPORARY, read_name};
use crate::store::{Below, CheckReport, Finding, Progress, Store, layer_file, parent_of};
use crate::units::{BLOCK, BLOCK_SIZE, Id, Region, Slot};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use zerocopy::{FromBytes, IntoBytes};

/// A set of slots of one layer file, one bit each.
struct SlotSet(Vec<u64>);

impl SlotSet {
    fn new(slots: u64) -> SlotSet {
        SlotSet(vec![0; slots.div_ceil(64) as usize])
    }
    /// Adds a slot; `false` if it was there.
    fn insert(&mut self, slot: u32) -> bool {
        let (word, bit) = (slot as usize / 64, 1u64 << (slot % 64));
        match self.0.get_mut(word) {
            Some(w) if *w & bit == 0 => {
                *w |= bit;
                true
            }
            _ => false,
        }
    }
    fn has(&self, slot: u64) -> bool {
        self.0
            .get(slot as usize / 64)
            .is_some_and(|w| w >> (slot % 64) & 1 == 1)
    }
}

struct Check<'a> {
    store: &'a Store,
    report: CheckReport,
    headers: HashMap<Id, (Header, u32)>,
    names: BTreeMap<String, Below>,
    /// Layer files without a readable header, and why.
    unreadable: Vec<(Id, String)>,
}

/// Checks the whole store, or what `reference` stands on.
pub fn check(
    store: &Store,
    reference: Option<&str>,
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let wanted = match reference {
        Some(r) => Some(store.resolve(r)?),
        None => None,
    };
    let _lock = store.lock(false)?;
    let mut c = Check {
        store,
        report: CheckReport::default(),
        headers: HashMap::new(),
        names: BTreeMap::new(),
        unreadable: Vec::new(),
    };
    c.names()?;
    let layers = c.layer_files()?;
    for id in &layers {
        c.header(*id);
    }
    let only: Option<HashSet<Id>> = wanted.map(|o| c.chain(o.id));
    if let Some(only) = &only {
        // What was found so far concerns names and files that this object does not stand on.
        c.report = CheckReport {
            checked: layers.iter().filter(|id| only.contains(id)).count() as u64,
            ..CheckReport::default()
        };
    }
    c.unreadable(only.as_ref());
    let total = layers.len() as u64;
    for (done, id) in layers.iter().enumerate() {
        if !progress.update(done as u64, total) {
            return Err(
                Error::new(Kind::Interrupted, "the check was interrupted").hint("run it again")
            );
        }
        if only.as_ref().is_none_or(|o| o.contains(id)) {
            c.layer(*id);
        }
    }
    c.bases(only.as_ref())?;
    if only.is_none() {
        c.references(&layers);
        c.leftovers()?;
    }
    Ok(c.report)
}

impl Check<'_> {
    fn corrupt(&mut self, what: impl Into<String>, message: impl Into<String>) {
        self.report.corruptions.push(Finding {
            what: what.into(),
            message: message.into(),
        });
    }
    fn leak(&mut self, what: impl Into<String>, message: impl Into<String>) {
        self.report.leaks.push(Finding {
            what: what.into(),
            message: message.into(),
        });
    }
    /// What to call a layer: the names that refer to it, else its id.
    fn called(&self, id: Id) -> String {
        let names: Vec<&str> = self
            .names
            .iter()
            .filter(|(_, b)| **b == Below::Layer(id))
            .map(|(n, _)| n.as_str())
            .collect();
        if names.is_empty() {
            format!("layer {id}")
        } else {
            names.join(", ")
        }
    }
    fn names(&mut self) -> Result<()> {
        for (name, kind) in self.store.names_dir().list()? {
            if name.starts_with(TEMPORARY) {
                continue;
            }
            if kind != EntryKind::File {
                self.corrupt(format!("names/{name}"), "not a regular file");
                continue;
            }
            match read_name(&**self.store.names_dir(), &name) {
                Ok(record) => {
                    self.names.insert(name, record.target);
                }
                Err(e) => self.corrupt(format!("names/{name}"), e.to_string()),
            }
        }
        Ok(())
    }
    fn layer_files(&mut self) -> Result<Vec<Id>> {
        let mut layers = Vec::new();
        for (name, kind) in self.store.layers_dir().list()? {
            match name.strip_suffix(".layer").and_then(Id::parse) {
                Some(id) if kind == EntryKind::File => layers.push(id),
                Some(_) => self.corrupt(format!("layers/{name}"), "not a regular file"),
                None => self.leak(
                    format!("layers/{name}"),
                    "a foreign file: nothing of the store refers to it, and `gc` leaves it alone",
                ),
            }
        }
        layers.sort();
        Ok(layers)
    }
    fn header(&mut self, id: Id) {
        self.report.checked += 1;
        let read = self
            .store
            .layers_dir()
            .open(&layer_file(id), Access::Read)
            .and_then(|file| {
                let header = read_header(&*file)?;
                let state = recover::superblock(&*file, &header)?.superblock.state.get();
                Ok((header, state))
            });
        match read {
            Ok((header, _)) if header.layer != id.0 => {
                self.corrupt(
                    self.called(id),
                    format!("layers/{} holds layer {}", layer_file(id), Id(header.layer)),
                );
            }
            Ok(both) => {
                self.headers.insert(id, both);
            }
            Err(e) => self.unreadable.push((id, e.to_string())),
        }
    }
    /// A layer whose header cannot be read is damage if anything needs it; else an interrupted creation.
    fn unreadable(&mut self, only: Option<&HashSet<Id>>) {
        for (id, message) in std::mem::take(&mut self.unreadable) {
            let below = Below::Layer(id);
            let needed = self.names.values().any(|b| *b == below)
                || self.headers.values().any(|(h, _)| parent_of(h) == below);
            if only.is_some_and(|o| !o.contains(&id)) {
                continue;
            }
            if needed {
                self.corrupt(self.called(id), message);
            } else {
                self.leak(
                    self.called(id),
                    format!("{message}; nothing refers to it: `forkdisk gc` removes it"),
                );
            }
        }
    }
    fn chain(&self, top: Id) -> HashSet<Id> {
        let mut chain = HashSet::new();
        let mut at = top;
        while chain.insert(at) {
            match self.headers.get(&at).map(|(h, _)| parent_of(h)) {
                Some(below) => at = below.id(),
                None => break,
            }
        }
        chain
    }
    fn layer(&mut self, id: Id) {
        let Some((header, _)) = self.headers.get(&id).copied() else {
            return;
        };
        let who = self.called(id);
        match parent_of(&header) {
            Below::Base(base) => {
                if self
                    .store
                    .bases_dir()
                    .entry(&base.to_string())
                    .ok()
                    .flatten()
                    .is_none()
                {
                    self.corrupt(&who, format!("its base {base} is gone"));
                }
                if header.depth.get() != 1 {
                    self.corrupt(&who, format!("its depth is {} over a base", header.depth));
                }
            }
            Below::Layer(parent) => match self.headers.get(&parent) {
                None => self.corrupt(
                    &who,
                    format!("its parent, layer {parent}, is gone or unreadable"),
                ),
                Some((upper, state)) => {
                    if upper.depth.get() + 1 != header.depth.get() {
                        self.corrupt(&who, "its depth does not fit its parent's");
                    } else if *state != STATE_SEALED {
                        self.corrupt(&who, format!("its parent, layer {parent}, is not sealed"));
                    }
                }
            },
        }
        match self.store.layers_dir().open(&layer_file(id), Access::Read) {
            Err(e) => self.corrupt(&who, e.to_string()),
            // Open for writing: its file changes under our eyes, and its writer checks what it reads.
            Ok(file) if file.lock(false).is_err_and(|e| e.kind() == Kind::Busy) => {}
            Ok(file) => {
                if let Err(e) = self.file(&who, &*file, &header) {
                    self.corrupt(&who, e.to_string());
                }
            }
        }
    }
    /// The inside of a layer file. What is found is noted; an error ends the look at this file.
    fn file(&mut self, who: &str, file: &dyn File, header: &Header) -> Result<()> {
        let id = Id(header.layer);
        let found = recover::superblock(file, header)?;
        let sb = found.superblock;
        let writable = sb.state.get() == STATE_WRITABLE;
        if found.fresh {
            return Ok(());
        }
        // After a crash one copy may be torn; after a clean close never.
        if found.damaged_copy && !writable {
            self.corrupt(
                who,
                "one copy of the superblock is damaged; the other is in use",
            );
        }
        let len = file.len()?;
        let mut used = SlotSet::new(sb.high_water.get());
        let mut runs: Vec<Arc<MappedRun>> = Vec::new();
        for r in sb.run_refs() {
            let at = Slot(r.slot.get()).at();
            if at + r.len.get() > len {
                return Err(Error::new(
                    Kind::Corrupt,
                    "the file is cut: a block map lies past its end",
                )
                .offset(at));
            }
            let run = Run::open(file.map(at, r.len.get() as usize)?, *r, &id)?;
            run.verify()?;
            for slot in r.slot.get()..r.slot.get() + r.slots.get() {
                if !used.insert(slot) {
                    self.corrupt(who, format!("slot {slot} of a block map is in use twice"));
                }
            }
            runs.push(Arc::new(run));
        }
        let free = free_list(file, &sb)?;
        for slot in sb.free_slot.get()..sb.free_slot.get() + sb.free_slots.get() {
            if !used.insert(slot) {
                self.corrupt(who, format!("slot {slot} of the free list is in use twice"));
            }
        }
        let replay = if writable {
            Some(recover::replay(file, &sb, &runs)?)
        } else {
            None
        };
        let mut sources: Vec<Items<'_>> = Vec::new();
        if let Some(replay) = &replay {
            sources.push(replay.memtable.items());
        }
        sources.extend(runs.iter().map(|r| r.items(Region(0))));
        let (mut data, mut zeros) = (0u64, 0u64);
        let mut bad = 0;
        for item in merge(sources) {
            match item? {
                Item::Zeros(_, n) => zeros += u64::from(n) * 512,
                Item::Region(region, map) => {
                    let (d, z) = map.counts();
                    data += d;
                    zeros += z;
                    for (index, pointer) in map.iter() {
                        let Pointer::Data { slot, .. } = pointer else {
                            continue;
                        };
                        let block = region.lba(index);
                        if slot.at() + BLOCK > len {
                            bad += 1;
                            self.note(
                                who,
                                bad,
                                format!(
                                    "block {block} lies past the end of the file, in slot {slot}"
                                ),
                            );
                        } else if !writable && !used.insert(slot.0) {
                            bad += 1;
                            self.note(
                                who,
                                bad,
                                format!(
                                    "slot {slot} of block {block} is in use twice or out of range"
                                ),
                            );
                        }
                    }
                }
            }
        }
        if writable {
            return Ok(());
        }
        if (data, zeros) != (sb.data_blocks.get(), sb.zero_blocks.get()) {
            self.corrupt(who, format!(
                "the superblock counts {} data and {} zero blocks, the map has {data} and {zeros}",
                sb.data_blocks, sb.zero_blocks
            ));
        }
        self.free_space(who, file, &sb, &free, &used, len)
    }
    /// At most a few of a kind: a damaged map has thousands.
    fn note(&mut self, who: &str, count: u32, message: String) {
        match count {
            1..=10 => self.corrupt(who, message),
            11 => self.corrupt(who, "and more of the same"),
            _ => {}
        }
    }
    fn free_space(
        &mut self,
        who: &str,
        file: &dyn File,
        sb: &Superblock,
        free: &[(u64, u64)],
        used: &SlotSet,
        len: u64,
    ) -> Result<()> {
        let mut listed = SlotSet::new(sb.high_water.get());
        for &(start, n) in free {
            for slot in start..start + n {
                listed.insert(slot as u32);
                if used.has(slot) {
                    self.corrupt(who, format!("slot {slot} is in use and in the free list"));
                }
            }
        }
        if sb.state.get() != STATE_SEALED {
            let lost = (u64::from(DATA_START)..sb.high_water.get())
                .filter(|&s| !used.has(s) && !listed.has(s))
                .count() as u64;
            if lost > sb.forgotten.get() {
                self.leak(
                    who,
                    format!(
                        "{} slots are neither in use nor free",
                        lost - sb.forgotten.get()
                    ),
                );
            }
        }
        // Host space behind what is not in use: the journal of a closed layer, free slots, the tail.
        let start = Slot(format::JOURNAL_START).at();
        let mut bytes = 0;
        if len > start {
            for (at, n) in file.data_ranges(start, len - start)? {
                for slot in at / BLOCK..(at + n).div_ceil(BLOCK) {
                    bytes += if used.has(slot) { 0 } else { BLOCK };
                }
            }
        }
        if bytes > 0 {
            self.leak(
                who,
                format!("{bytes} bytes of host space are behind slots that are not in use"),
            );
        }
        Ok(())
    }
    fn bases(&mut self, only: Option<&HashSet<Id>>) -> Result<()> {
        for (name, kind) in self.store.bases_dir().list()? {
            if name.starts_with(TEMPORARY) {
                continue;
            }
            let Some(id) = Id::parse(&name).filter(|_| kind == EntryKind::Dir) else {
                self.leak(
                    format!("bases/{name}"),
                    "foreign: nothing of the store refers to it",
                );
                continue;
            };
            if only.is_some_and(|o| !o.contains(&id)) {
                continue;
            }
            self.report.checked += 1;
            if let Err(e) = self.store.base(id) {
                let names: Vec<&str> = self
                    .names
                    .iter()
                    .filter(|(_, b)| **b == Below::Base(id))
                    .map(|(n, _)| n.as_str())
                    .collect();
                let who = if names.is_empty() {
                    format!("base {id}")
                } else {
                    names.join(", ")
                };
                self.corrupt(who, e.to_string());
            }
        }
        Ok(())
    }
    /// Names that refer to nothing, and layers and bases that nothing refers to.
    fn references(&mut self, layers: &[Id]) {
        let mut needed: HashSet<Below> = HashSet::new();
        let mut lost = Vec::new();
        for (name, target) in &self.names {
            let there = match target {
                Below::Base(id) => self
                    .store
                    .bases_dir()
                    .entry(&id.to_string())
                    .ok()
                    .flatten()
                    .is_some(),
                Below::Layer(id) => layers.contains(id),
            };
            if !there {
                lost.push((
                    name.clone(),
                    format!("it refers to {}, which is gone", target.id()),
                ));
            }
            let mut at = Some(*target);
            while let Some(below) = at.filter(|b| needed.insert(*b)) {
                at = match below {
                    Below::Layer(id) => self.headers.get(&id).map(|(h, _)| parent_of(h)),
                    Below::Base(_) => None,
                };
            }
        }
        for (name, message) in lost {
            self.corrupt(name, message);
        }
        // While anything is unreadable it may be what needs the rest.
        if !self.report.corruptions.is_empty() {
            return;
        }
        for id in layers {
            if !needed.contains(&Below::Layer(*id)) && self.headers.contains_key(id) {
                self.leak(
                    format!("layer {id}"),
                    "nothing refers to it; `forkdisk gc` removes it",
                );
            }
        }
        let bases = self.store.bases_dir().list().unwrap_or_default();
        for id in bases.iter().filter_map(|(n, _)| Id::parse(n)) {
            if !needed.contains(&Below::Base(id)) {
                self.leak(
                    format!("base {id}"),
                    "nothing refers to it; `forkdisk gc` removes it",
                );
            }
        }
    }
    fn leftovers(&mut self) -> Result<()> {
        let dirs = [
            ("", self.store.root()),
            ("names/", self.store.names_dir()),
            ("bases/", self.store.bases_dir()),
        ];
        let mut found = Vec::new();
        for (prefix, dir) in dirs {
            for (name, _) in dir.list()? {
                if name.starts_with(TEMPORARY)
                    && !(prefix == "bases/" && self.store.import_running(&name))
                {
                    found.push(format!("{prefix}{name}"));
                }
            }
        }
        for name in found {
            self.leak(
                name,
                "left by an interrupted operation; `forkdisk gc` removes it",
            );
        }
        Ok(())
    }
}

fn free_list(file: &dyn File, sb: &Superblock) -> Result<Vec<(u64, u64)>> {
    let count = sb.free_count.get() as usize;
    let bytes = if sb.free_slot.get() == 0 {
        sb.free_inline[..count].as_bytes().to_vec()
    } else {
        let mut bytes = vec![0; count * size_of::<FreeExtent>()];
        file.read_at(&mut bytes, Slot(sb.free_slot.get()).at())?;
        bytes
    };
    let at = u64::from(sb.free_slot.get().max(1)) * BLOCK_SIZE as u64;
    let bad = |what: &str| Error::new(Kind::Corrupt, format!("free list: {what}")).offset(at);
    if format::crc(&bytes) != sb.free_crc.get() {
        return Err(bad("checksum mismatch"));
    }
    let list = <[FreeExtent]>::ref_from_bytes(&bytes).map_err(|_| bad("it is cut"))?;
    let list: Vec<(u64, u64)> = list
        .iter()
        .map(|e| (e.slot.get().into(), e.slots.get().into()))
        .collect();
    let mut last = u64::from(DATA_START);
    for &(start, n) in &list {
        if start < last || n == 0 || start + n > sb.high_water.get() {
            return Err(bad("its extents are out of order"));
        }
        last = start + n;
    }
    Ok(list)
}
