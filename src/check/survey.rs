//! What there is in a store, read once and believed no further than it must be: names, headers, who stands on what.
//! From it follows whom a damaged block concerns.

use super::seen::Seen;
use crate::error::{Error, Result};
use crate::format::{Header, Pointer};
use crate::io::{Access, EntryKind};
use crate::layer::{ReadLayer, read_header, recover};
use crate::store::names::{TEMPORARY, read_name};
use crate::store::{Below, Store, layer_file, parent_of};
use crate::units::{Id, Lba};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

/// Layers kept open while it is worked out who is affected.
const KEEP_OPEN: usize = 64;

/// A header without the zeros that it mostly consists of: a store has any number of layers, and all their headers are in memory at once.
struct Kept {
    bytes: Box<[u8]>,
    crc: U32,
}

impl Kept {
    fn of(header: &Header) -> Kept {
        let bytes = header.as_bytes();
        let rest = &bytes[..bytes.len() - size_of::<U32>()];
        let end = rest
            .iter()
            .rposition(|&b| b != 0)
            .map_or(0, |last| last + 1);
        Kept {
            bytes: rest[..end].into(),
            crc: header.crc,
        }
    }
    fn header(&self) -> Header {
        let mut header = Header::new_zeroed();
        header.as_mut_bytes()[..self.bytes.len()].copy_from_slice(&self.bytes);
        header.crc = self.crc;
        header
    }
}

/// Names, layers and bases of a store.
pub(super) struct Survey<'a> {
    pub store: &'a Store,
    pub names: BTreeMap<String, Below>,
    /// Entries of `names/` that cannot be read, and why.
    pub bad_names: Vec<(String, EntryKind, String)>,
    /// Ids of all layer files, sorted.
    pub layers: Vec<Id>,
    /// Entries of `layers/` that are none, and whether the name is that of a layer.
    pub foreign: Vec<(String, bool)>,
    /// Headers and states of the layers that have readable ones.
    headers: HashMap<Id, (Kept, u32)>,
    /// Layer files without a readable header, and why.
    pub unreadable: Vec<(Id, Error)>,
    /// Layers that are their header alone.
    pub fresh: HashSet<Id>,
    /// Layers that were opened for writing, as a name says.
    pub opened: HashSet<Id>,
    children: HashMap<Below, Vec<Id>>,
    called: HashMap<Below, Vec<String>>,
    open: RefCell<HashMap<Id, Option<Arc<ReadLayer>>>>,
}

impl<'a> Survey<'a> {
    /// Reads names and headers. The names lock is held.
    pub fn new(store: &'a Store) -> Result<Survey<'a>> {
        let mut survey = Survey {
            store,
            names: BTreeMap::new(),
            bad_names: Vec::new(),
            layers: Vec::new(),
            foreign: Vec::new(),
            headers: HashMap::new(),
            unreadable: Vec::new(),
            fresh: HashSet::new(),
            opened: HashSet::new(),
            children: HashMap::new(),
            called: HashMap::new(),
            open: RefCell::default(),
        };
        for (name, kind) in store.names_dir().list()? {
            if name.starts_with(TEMPORARY) {
                continue;
            }
            if kind != EntryKind::File {
                let why = "not a regular file".to_string();
                survey.bad_names.push((name, kind, why));
                continue;
            }
            match read_name(&**store.names_dir(), &name) {
                Ok(record) => {
                    let all = survey.called.entry(record.target).or_default();
                    all.push(name.clone());
                    if record.opened {
                        survey.opened.insert(record.target.id());
                    }
                    survey.names.insert(name, record.target);
                }
                Err(e) if e.of_resources() => return Err(e),
                Err(e) => survey.bad_names.push((name, kind, e.to_string())),
            }
        }
        survey.called.values_mut().for_each(|names| names.sort());
        survey.bad_names.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, kind) in store.layers_dir().list()? {
            if name.starts_with(TEMPORARY) {
                continue;
            }
            match name.strip_suffix(".layer").and_then(Id::parse) {
                Some(id) if kind == EntryKind::File => survey.layers.push(id),
                found => survey.foreign.push((name, found.is_some())),
            }
        }
        survey.layers.sort();
        for id in survey.layers.clone() {
            survey.header(id)?;
        }
        Ok(survey)
    }
    fn header(&mut self, id: Id) -> Result<()> {
        let read = self
            .store
            .layers_dir()
            .open(&layer_file(id), Access::Read)
            .and_then(|file| {
                let header = read_header(&*file)?;
                let found = recover::superblock(&*file, &header)?;
                Ok((header, found.superblock.state.get(), found.fresh))
            });
        match read {
            Ok((header, state, fresh)) => {
                if fresh {
                    self.fresh.insert(id);
                }
                // What calls itself something else than its file stands on nothing that can be relied on.
                if header.layer == id.0 {
                    let above = self.children.entry(parent_of(&header)).or_default();
                    above.push(id);
                }
                self.headers.insert(id, (Kept::of(&header), state));
            }
            Err(e) if e.of_resources() => return Err(e),
            Err(e) => self.unreadable.push((id, e)),
        }
        Ok(())
    }
    /// Header and state of a layer that has a readable header.
    pub fn header_of(&self, id: Id) -> Option<(Header, u32)> {
        let (kept, state) = self.headers.get(&id)?;
        Some((kept.header(), *state))
    }
    /// The names that refer to something.
    pub fn names_of(&self, below: Below) -> &[String] {
        self.called.get(&below).map_or(&[], |names| names)
    }
    /// What to call a layer or base: the names that refer to it, else its id.
    pub fn called(&self, below: Below) -> String {
        match (self.names_of(below), below) {
            ([], Below::Layer(id)) => format!("layer {id}"),
            ([], Below::Base(id)) => format!("base {id}"),
            (names, _) => names.join(", "),
        }
    }
    /// The layers that stand directly on something.
    pub fn children_of(&self, below: Below) -> &[Id] {
        self.children.get(&below).map_or(&[], |ids| ids)
    }
    /// Does a name or a layer need it?
    pub fn needed(&self, below: Below) -> bool {
        !self.names_of(below).is_empty() || !self.children_of(below).is_empty()
    }
    /// An object and all it stands on.
    pub fn chain(&self, top: Below) -> HashSet<Below> {
        let mut chain = HashSet::new();
        let mut at = Some(top);
        while let Some(below) = at.filter(|b| chain.insert(*b)) {
            at = match below {
                Below::Layer(id) => self.header_of(id).map(|(h, _)| parent_of(&h)),
                Below::Base(_) => None,
            };
        }
        chain
    }
    /// All names that show the blocks `lbas` of a layer or base, `None` meaning any block: its own, and those above unless each layer in
    /// between hides them. What cannot be read hides nothing.
    pub fn affected(&self, below: Below, lbas: Option<(u64, u64)>) -> Vec<String> {
        let mut names: Vec<String> = self.names_of(below).to_vec();
        let mut seen = HashSet::new();
        let all: Option<Vec<u64>> = lbas.map(|(start, end)| (start..end).collect());
        let mut todo: Vec<(Id, Option<Vec<u64>>)> = Vec::new();
        let above = |of: Below, shown: &Option<Vec<u64>>, todo: &mut Vec<_>| {
            todo.extend(self.children_of(of).iter().map(|id| (*id, shown.clone())));
        };
        above(below, &all, &mut todo);
        while let Some((id, mut shown)) = todo.pop() {
            // A circle of damaged headers must end, too.
            if !seen.insert(id) {
                continue;
            }
            if let Some(lbas) = &mut shown {
                lbas.retain(|lba| !self.hides(id, *lba));
                if lbas.is_empty() {
                    continue;
                }
            }
            names.extend_from_slice(self.names_of(Below::Layer(id)));
            above(Below::Layer(id), &shown, &mut todo);
        }
        names.sort();
        names.dedup();
        names
    }
    /// Has a layer something of its own for a block?
    fn hides(&self, id: Id, lba: u64) -> bool {
        let mut open = self.open.borrow_mut();
        if open.len() >= KEEP_OPEN && !open.contains_key(&id) {
            open.clear();
        }
        let layer = open
            .entry(id)
            .or_insert_with(|| open_layer(self.store, id).ok());
        let Some(layer) = layer else {
            return false;
        };
        let Ok(lba) = u32::try_from(lba) else {
            return false;
        };
        layer.pointer(Lba(lba)).is_ok_and(|p| p != Pointer::Absent)
    }
}

/// How often a layer that is being written is looked at again.
const TRIES: u32 = 20;

/// Opens a layer for reading as of its last commit, whoever is writing it.
pub(super) fn open_layer(store: &Store, id: Id) -> Result<Arc<ReadLayer>> {
    let mut tries = 0;
    loop {
        let file = store.layers_dir().open(&layer_file(id), Access::Read)?;
        match ReadLayer::open(Seen::of(file)) {
            Ok(layer) => return Ok(Arc::new(layer)),
            // Its writer may have put a checkpoint in between: then what was read makes no sense, and is read again.
            Err(e) if tries >= TRIES => return Err(e),
            Err(_) => tries += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was() {
        let longest = "n".repeat(crate::format::NAME_FIELD);
        for name in ["", "a", &longest] {
            let header = Header::new(
                Id([7; 16]),
                Id([8; 16]),
                true,
                1000,
                1 << 44,
                u64::MAX,
                name,
            );
            let kept = Kept::of(&header);
            assert_eq!(kept.header().as_bytes(), header.as_bytes());
            assert!(kept.bytes.len() < 400, "{} bytes", kept.bytes.len());
        }
        // Whatever a later version puts at the end stays.
        let mut full = Header::new(Id([7; 16]), Id([8; 16]), true, 1, 4096, 1, "a");
        full.as_mut_bytes().fill(9);
        assert_eq!(Kept::of(&full).header().as_bytes(), full.as_bytes());
    }
}
