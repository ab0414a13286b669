//! What a power cut leaves.
//!
//! Every un-synced change meets a [`Fate`] of its own; a [`Plan`] decides which. Besides the fair coin for each, plans
//! lean to the corners that break stores: all names without their contents, lengths without data, everything but
//! one change, nothing but one change, everything up to a moment.
//!
//! Kinder than a disk in two things only, as the seam promises them: a sector that no un-synced change touched
//! is untouched, and a rename is one step.

use super::{
    Harm, Policy,
    image::{Block, Change, Image, SECTOR},
    rng::Rng,
    state::{DirNode, FileNode, Ino, Node, Pending, ROOT, State},
};
use crate::units::{BLOCK, BLOCK_SIZE};
use std::collections::BTreeMap;

/// What becomes of the contents that one change wrote.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    Dropped,
    /// Done for some sectors, or garbage in some of them.
    Torn,
}

/// What becomes of the length that a write past the end implied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Growth {
    Full,
    Part,
    None,
}

/// What a change belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Name,
    /// A change that is a length and nothing else.
    Length,
    Data,
}

enum Lean {
    AllDone,
    AllDropped,
    /// Only the change of this rank.
    Only(usize),
    /// All but the change of this rank.
    AllBut(usize),
    /// The changes below this rank; it is torn itself.
    UpTo(usize),
    /// Names, and no contents: the empty file after a rename.
    Names,
    /// Contents, and no names.
    Contents,
    /// Names and lengths without data: files full of zeros.
    Lengths,
    /// Each for itself: done in so many of 8 cases.
    Each(u64),
}

/// One power cut.
struct Plan {
    rng: Rng,
    lean: Lean,
    /// The numbers of all un-synced changes, in order.
    order: Vec<u64>,
    garbage: bool,
    /// May it fall on the other sectors of a page that was written to?
    garbage_pages: bool,
    /// What a disk may show where something else belongs.
    stale: Vec<Block>,
    harm: Harm,
}

/// The state after a power cut.
pub(super) fn crash(state: &State, policy: Policy) -> State {
    let (mut rng, random) = match policy {
        Policy::AllDone => (Rng::new(0), false),
        Policy::AllDropped => (Rng::new(1), false),
        Policy::Random(seed) => (Rng::new(seed), true),
    };
    let mut order: Vec<u64> = Vec::new();
    for node in state.nodes.values() {
        match node {
            Node::File(file) => order.extend(file.pending.iter().map(|p| p.seq)),
            Node::Dir(dir) => order.extend(dir.pending.iter().map(|p| p.seq)),
        }
    }
    order.sort_unstable();
    let lean = match policy {
        Policy::AllDone => Lean::AllDone,
        Policy::AllDropped => Lean::AllDropped,
        Policy::Random(_) => lean(&mut rng, order.len()),
    };
    let stale = match random {
        true => stale(state, &mut rng),
        false => Vec::new(),
    };
    let mut left = State::new(rng.next());
    left.capacity = state.capacity;
    left.garbage_pages = state.garbage_pages;
    let mut plan = Plan {
        garbage: rng.chance(1, 2),
        garbage_pages: state.garbage_pages,
        rng,
        lean,
        order,
        stale,
        harm: Harm::default(),
    };
    plan.harm.count(Harm::POWER_CUTS);
    if let Some(Node::Dir(root)) = state.nodes.get(&ROOT) {
        let names = plan.dir(state, root, &mut left);
        left.nodes.insert(ROOT, Node::Dir(names));
    }
    left.harm = plan.harm;
    left
}

fn lean(rng: &mut Rng, changes: usize) -> Lean {
    let last = changes.saturating_sub(1);
    let some = rng.below(changes as u64) as usize;
    match rng.below(16) {
        0 => Lean::AllDone,
        1 => Lean::AllDropped,
        2 => Lean::Only(last),
        3 => Lean::Only(some),
        4 => Lean::AllBut(0),
        5 => Lean::AllBut(some),
        6 => Lean::Names,
        7 => Lean::Contents,
        8 => Lean::Lengths,
        9 | 10 => Lean::UpTo(some),
        11 | 12 => Lean::Each(4),
        13 => Lean::Each(1),
        14 => Lean::Each(7),
        _ => Lean::Each(0),
    }
}

/// A few old blocks: half of them of deleted contents, the others of any file, or of what was just being written.
fn stale(state: &State, rng: &mut Rng) -> Vec<Block> {
    let mut found = Vec::new();
    let files: Vec<&FileNode> = state
        .nodes
        .values()
        .filter_map(|node| match node {
            Node::File(file) => Some(file),
            Node::Dir(_) => None,
        })
        .collect();
    for _ in 0..4 {
        let deleted = rng.below(state.attic.len() as u64) as usize;
        found.extend(state.attic.get(deleted).cloned());
        let Some(file) = files.get(rng.below(files.len() as u64) as usize) else {
            continue;
        };
        let from = match rng.chance(1, 2) {
            true => &file.durable,
            false => &file.now,
        };
        found.extend(from.any_block(rng.next()));
    }
    found
}

impl Plan {
    fn fate(&mut self, seq: u64, part: Part) -> Fate {
        let rank = self.order.partition_point(|s| *s < seq);
        let done = match self.lean {
            Lean::AllDone => true,
            Lean::AllDropped => false,
            Lean::Only(one) => rank == one,
            Lean::AllBut(one) => rank != one,
            Lean::UpTo(end) if rank == end && part == Part::Data => return Fate::Torn,
            Lean::UpTo(end) => rank < end || rank == end && self.rng.chance(1, 2),
            Lean::Names => part == Part::Name,
            Lean::Contents => part != Part::Name,
            Lean::Lengths => part != Part::Data,
            Lean::Each(of) => {
                let done = self.rng.chance(of, 8);
                let torn = part == Part::Data && self.rng.chance(1, 2);
                return match (done, torn) {
                    (true, _) => Fate::Done,
                    (false, true) => Fate::Torn,
                    (false, false) => match part {
                        // Without data that could be torn, a coin decides: `Each(0)` is not `AllDropped`.
                        Part::Name | Part::Length if self.rng.chance(1, 2) => Fate::Done,
                        _ => Fate::Dropped,
                    },
                };
            }
        };
        match done {
            true => Fate::Done,
            false => Fate::Dropped,
        }
    }
    /// The length is written apart from the data, before or after.
    fn growth(&mut self, fate: Fate) -> Growth {
        match (&self.lean, fate) {
            (Lean::Lengths, _) => Growth::Full,
            (Lean::Each(_), Fate::Done) if self.rng.chance(1, 4) => Growth::None,
            (_, Fate::Done) => Growth::Full,
            (Lean::Each(_), _) | (_, Fate::Torn) => match self.rng.below(4) {
                0 => Growth::Full,
                1 => Growth::Part,
                _ if fate == Fate::Torn => Growth::Full,
                _ => Growth::None,
            },
            (_, Fate::Dropped) => Growth::None,
        }
    }

    fn dir(&mut self, state: &State, dir: &DirNode, left: &mut State) -> DirNode {
        let mut names = dir.durable.clone();
        for p in &dir.pending {
            match self.fate(p.seq, Part::Name) {
                Fate::Done => p.change.apply(&mut names),
                _ => self.harm.count(Harm::NAMES),
            }
        }
        let mut found = BTreeMap::<String, Ino>::new();
        for (name, ino) in names {
            let node = match state.nodes.get(&ino) {
                Some(Node::File(file)) => {
                    let image = self.file(file);
                    left.used += image.blocks();
                    Node::File(FileNode::new(image))
                }
                Some(Node::Dir(dir)) => Node::Dir(self.dir(state, dir, left)),
                // A failed sync lost the change that removed the name; the file itself is gone.
                None => continue,
            };
            found.insert(name, left.new_node(node));
        }
        DirNode {
            now: found.clone(),
            durable: found,
            ..DirNode::default()
        }
    }

    fn file(&mut self, file: &FileNode) -> Image {
        let mut image = file.durable.clone();
        for Pending { seq, change } in &file.pending {
            match change {
                Change::Write { at, bytes } => {
                    let fate = self.fate(*seq, Part::Data);
                    match fate {
                        Fate::Done => {
                            self.harm.count(Harm::DONE);
                            image.put(bytes, *at);
                        }
                        Fate::Dropped => self.harm.count(Harm::DROPPED),
                        Fate::Torn => {
                            self.harm.count(Harm::TORN);
                            self.tear(&mut image, bytes, *at);
                        }
                    }
                    let end = at + bytes.len() as u64;
                    let growth = self.growth(fate);
                    if end > image.len && growth != Growth::Full {
                        self.harm.count(Harm::LENGTHS);
                    }
                    let end = match growth {
                        Growth::Full => end,
                        Growth::Part if end > image.len => {
                            let part = image.len + self.rng.below(end - image.len);
                            part / SECTOR * SECTOR
                        }
                        Growth::Part | Growth::None => 0,
                    };
                    image.len = image.len.max(end);
                }
                Change::SetLen { .. } => match self.fate(*seq, Part::Length) {
                    Fate::Done => image.apply(change),
                    _ => self.harm.count(Harm::LENGTHS),
                },
                Change::Punch { at, len } => match self.fate(*seq, Part::Data) {
                    Fate::Done => image.apply(change),
                    Fate::Dropped => self.harm.count(Harm::HOLES),
                    Fate::Torn => {
                        self.harm.count(Harm::HOLES);
                        let start = at + self.rng.below(len + 1);
                        let end = start + self.rng.below(at + len - start + 1);
                        // Holes come in whole sectors, but for the ends of the range.
                        let start = (start / SECTOR * SECTOR).max(*at);
                        let end = match end == at + len {
                            true => end,
                            false => (end / SECTOR * SECTOR).max(start),
                        };
                        image.clear(start..end);
                    }
                },
                Change::Allocate { at, len } => match self.fate(*seq, Part::Data) {
                    Fate::Done => image.reserve(*at..at + len),
                    Fate::Dropped => self.harm.count(Harm::HOLES),
                    Fate::Torn => image.reserve(*at..at + self.rng.below(len + 1)),
                },
            }
        }
        image.trim();
        image
    }

    /// Leaves of a write some sectors, and garbage in some.
    fn tear(&mut self, image: &mut Image, bytes: &[u8], at: u64) {
        let end = at + bytes.len() as u64;
        let unit = match self.garbage_pages {
            true => BLOCK,
            false => SECTOR,
        };
        let first = at / unit * unit / SECTOR;
        let last = end.next_multiple_of(unit) / SECTOR;
        let sectors = last - first;
        let cut = first + self.rng.below(sectors + 1);
        let shape = self.rng.below(6);
        let bad = match self.garbage {
            true => self.rng.below(5),
            false => 0,
        };
        // The same for the whole write: a write that went to a wrong place leaves whole blocks that look good.
        let kind = self.rng.below(6);
        let stale = match self.rng.below(self.stale.len() as u64) as usize {
            _ if self.stale.is_empty() => None,
            one => Some(self.stale[one].clone()),
        };
        for sector in first..last {
            let done = match shape {
                0 => sector < cut,
                1 => sector >= cut,
                2 => sector == cut,
                3 => sector != cut,
                4 => self.rng.chance(1, 2),
                _ => false,
            };
            // Empty where the page, but not the sector was written to.
            let start = (sector * SECTOR).clamp(at, end);
            let stop = ((sector + 1) * SECTOR).clamp(start, end);
            let new = &bytes[(start - at) as usize..(stop - at) as usize];
            let garbage = match bad {
                0 => false,
                1 => self.rng.chance(1, 8),
                2 => sector == cut,
                3 => !done,
                _ => true,
            };
            if garbage {
                self.harm.count(Harm::GARBAGE);
                let garbage = self.garbage(image, sector, new, start, kind, stale.as_ref());
                image.put(&garbage, sector * SECTOR);
            } else if done {
                image.put(new, start);
            }
        }
    }
    fn garbage(
        &mut self,
        image: &Image,
        sector: u64,
        new: &[u8],
        start: u64,
        kind: u64,
        stale: Option<&Block>,
    ) -> [u8; SECTOR as usize] {
        let mut old = [0; SECTOR as usize];
        image.read(&mut old, sector * SECTOR);
        let inner = (start % SECTOR) as usize;
        match kind {
            // The new bytes up to somewhere in the middle.
            0 => {
                let n = self.rng.below(new.len() as u64 + 1) as usize;
                old[inner..inner + n].copy_from_slice(&new[..n]);
            }
            // The new bytes, but for one bit.
            1 => {
                old[inner..inner + new.len()].copy_from_slice(new);
                let bit = self.rng.below(SECTOR * 8);
                old[(bit / 8) as usize] ^= 1 << (bit % 8);
            }
            2 => old.fill(0),
            3 | 4 => match stale {
                Some(stale) => {
                    let from = (sector * SECTOR % BLOCK) as usize;
                    debug_assert!(from + old.len() <= BLOCK_SIZE);
                    old.copy_from_slice(&stale[from..from + SECTOR as usize]);
                }
                None => old.fill(0xff),
            },
            _ => self.rng.fill(&mut old),
        }
        old
    }
}
