//! What a layer keeps of its past, for reading: the points that can be shown, and what they looked like (FORMAT.md, "History").
//!
//! Always true: a point is the state after a commit; what later commits replaced leads back to it, and of several that changed a block
//! the first one after the point tells what stood there.
//!
//! Not here: what is kept and for how long; that is the writer's business.

use super::{ReadLayer, recover};
use crate::error::{Error, Kind, Result};
use crate::format::{JOURNAL_SLOTS, MAX_SEGMENTS, Pointer, SegmentHeader, Step, Superblock};
use crate::io::File;
use crate::map::RegionMap;
use crate::map::undo::Undo;
use crate::units::{BLOCK, BLOCK_SIZE, Id, REGION_BLOCKS, Region, Slot};
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

/// How much of its past a layer keeps.
#[derive(Clone)]
pub struct Keep {
    /// So many milliseconds.
    pub window: Option<u64>,
    /// So many bytes of replaced blocks.
    pub bytes: Option<u64>,
    /// The time now, in milliseconds since 1970. It labels points and orders nothing.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Where the history goes on from that of a sealed layer below: number and time of the last commit of that. A layer that was never opened begins with
    /// the next number.
    pub after: (u64, u64),
    /// What sealed layers below keep of the same history.
    pub lower: Option<Arc<dyn Lower>>,
}

/// What of the older part of a history may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stays {
    /// What was made then or before is too old.
    pub since: Option<u64>,
    /// What was made then or before is so old that it is worth work of its own.
    pub late: Option<u64>,
    /// So many bytes may stay.
    pub room: u64,
    /// If they are more, so many.
    pub left: u64,
}

/// The older part of a history, which sealed layers hold.
pub trait Lower: Send + Sync {
    /// Host bytes that it occupies.
    fn bytes(&self) -> u64;
    /// Lets go of what may not stay, the oldest first. What cannot be done now is done another time.
    fn expire(&self, stays: Stays);
    /// The host disk is full: the older half goes, or the little that is left; says whether anything did.
    fn yield_oldest(&self) -> bool;
    /// Is there anything that can be given up before what is newer? As far as is known: whoever asks must not wait.
    fn goes_first(&self) -> bool;
    /// Layers may have been replaced by others.
    fn look_again(&self);
}

/// As long as somebody has it, a point of a layer that is open for writing stays: also where it is too old, or too much. It goes all the same
/// where room is needed, or where the history ends.
#[derive(Debug)]
pub struct Hold {
    /// Number of the point.
    pub number: u64,
}

/// The points that somebody holds.
#[derive(Default)]
pub(super) struct Holds(Vec<Weak<Hold>>);

impl Holds {
    /// Holds point `number`.
    pub fn add(&mut self, number: u64) -> Arc<Hold> {
        let hold = Arc::new(Hold { number });
        self.0.retain(|held| held.strong_count() > 0);
        self.0.push(Arc::downgrade(&hold));
        hold
    }
    /// The oldest that must stay.
    pub fn oldest(&self) -> Option<u64> {
        let held = self.0.iter().filter_map(Weak::upgrade);
        held.map(|hold| hold.number).min()
    }
}

/// A history segment of a layer file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first slot.
    pub slot: u32,
    /// Slots it occupies.
    pub slots: u32,
    /// First and last commit in it.
    pub commits: (u64, u64),
    /// When the last one was made.
    pub last_time: u64,
    /// When the first one was made.
    pub first_time: u64,
    /// Slots of replaced blocks that it holds.
    pub blocks: u64,
}

/// A state of the past that can be shown: that after a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// Sequence of the commit.
    pub number: u64,
    /// When it was made, in milliseconds since 1970; 0 where that is not known.
    pub time: u64,
    /// Blocks that it changed. Of the oldest point that is not known: 0.
    pub changed: u64,
    /// Slots with blocks that it replaced.
    pub held: u64,
}

/// What was found of the segments of a layer.
pub struct Chain {
    /// The oldest first.
    pub segments: VecDeque<Segment>,
    /// Why there are not more of them.
    pub broken: Option<Error>,
}

/// Follows the segments from the newest, which the superblock names, to the oldest.
pub fn segments(file: &dyn File, superblock: &Superblock) -> Result<Chain> {
    let id = Id(superblock.layer);
    let mut found = Chain {
        segments: VecDeque::new(),
        broken: None,
    };
    let (mut slot, mut slots) = (
        superblock.history_slot.get(),
        superblock.history_slots.get(),
    );
    let mut next = superblock.next_commit.get();
    let oldest = superblock.history_oldest.get();
    let len = file.len()?;
    while superblock.has_history() && next > oldest + 1 {
        let at = Slot(slot).at();
        let bad = |what: &str| {
            Error::new(Kind::Corrupt, format!("history: {what}"))
                .offset(at)
                .layer(id)
                .path(file.path())
                .hint("what the disk shows now is not affected: only its history is")
        };
        let within = slot != 0
            && (1..=JOURNAL_SLOTS + 1).contains(&slots)
            && u64::from(slot) + u64::from(slots) <= superblock.high_water.get()
            && at + u64::from(slots) * BLOCK <= len;
        if !within || found.segments.len() >= MAX_SEGMENTS {
            found.broken = Some(bad("it ends before its oldest point"));
            break;
        }
        let mut bytes = vec![0; BLOCK_SIZE];
        file.read_at(&mut bytes, at)?;
        let header = SegmentHeader::decode(&bytes, &id, slots);
        let header = header.filter(|h| h.last.get() + 1 == next && h.first.get() > oldest);
        let Some(header) = header else {
            found.broken = Some(bad("the head of a segment is damaged"));
            break;
        };
        next = header.first.get();
        found.segments.push_front(Segment {
            slot,
            slots,
            commits: (next, header.last.get()),
            first_time: header.first_time.get(),
            last_time: header.last_time.get(),
            blocks: header.blocks.get(),
        });
        (slot, slots) = (header.previous.get(), header.previous_slots.get());
    }
    Ok(found)
}

/// When the last commit of the segments was made, as far as is known.
pub fn last_time(file: &dyn File, superblock: &Superblock) -> u64 {
    let slots = superblock.history_slots.get();
    let mut head = vec![0; BLOCK_SIZE];
    let at = Slot(superblock.history_slot.get()).at();
    let read = slots > 0 && file.read_at(&mut head, at).is_ok();
    let found = read.then(|| SegmentHeader::decode(&head, &Id(superblock.layer), slots));
    let time = found.flatten().map(|head| head.last_time.get());
    time.unwrap_or(superblock.history_time.get())
}

/// Reads the commits of a segment.
pub fn read_segment(file: &dyn File, layer: &Id, segment: &Segment) -> Result<Vec<Step>> {
    let at = Slot(segment.slot).at();
    let mut bytes = vec![0; segment.slots as usize * BLOCK_SIZE];
    file.read_at(&mut bytes, at)?;
    SegmentHeader::decode(&bytes, layer, segment.slots)
        .and_then(|header| header.steps(&bytes))
        .ok_or_else(|| {
            let (first, last) = segment.commits;
            Error::new(
                Kind::Corrupt,
                format!("history: what commits {first} to {last} replaced is damaged"),
            )
            .offset(at)
            .layer(*layer)
            .path(file.path())
            .hint(format!("points from #{last} on are not affected"))
        })
}

impl ReadLayer {
    /// Has nothing that was read of it been let go of since it was opened? A layer that somebody writes into is read before this is asked, and
    /// again if it is not so.
    pub fn is_current(&self) -> Result<bool> {
        let now = recover::superblock(&**self.file(), self.header())?.superblock;
        Ok(now.sequence == self.superblock().sequence)
    }
    /// Number and time of the last commit of a layer that was closed or sealed.
    pub fn ended(&self) -> (u64, u64) {
        let number = self.superblock().next_commit.get().saturating_sub(1);
        (number, last_time(&**self.file(), self.superblock()))
    }
    /// Fails if point `number` is none that can be shown any more.
    pub fn must_have(&self, number: u64) -> Result<()> {
        let cut = self.cut.map_or(0, |(sequence, _)| sequence);
        let oldest = self.superblock().history_oldest.get().max(cut);
        match self.has_history() && number >= oldest {
            true => Ok(()),
            false => Err(Error::new(
                Kind::NotFound,
                format!("there is no point #{number} any more"),
            )
            .layer(self.id())
            .hint("`forkdisk ls --history` lists the points")),
        }
    }
    /// Does it keep its history?
    pub fn has_history(&self) -> bool {
        self.superblock().has_history()
    }
    /// Gives `f` the commits after number `from` that can be undone, the oldest first.
    pub fn each_step(&self, from: u64, mut f: impl FnMut(&Step) -> Result<()>) -> Result<()> {
        if self.cut.is_none() {
            let chain = segments(&**self.file(), self.superblock())?;
            if let Some(broken) = chain.broken {
                let reached = chain.segments.front().map(|s| s.commits.0 - 1);
                if reached.is_none_or(|oldest| from < oldest) {
                    return Err(broken);
                }
            }
            for segment in chain.segments.iter().filter(|s| s.commits.1 > from) {
                let steps = read_segment(&**self.file(), &self.id(), segment)?;
                steps
                    .iter()
                    .filter(|s| s.sequence > from)
                    .try_for_each(&mut f)?;
            }
        }
        let after = self.cut.map_or(from, |(sequence, _)| sequence.max(from));
        self.steps
            .iter()
            .filter(|s| s.sequence > after)
            .try_for_each(f)
    }
    /// The points that can be shown, the oldest first; none where it keeps no history. What lies behind damage is left out.
    pub fn points(&self) -> Result<Vec<Point>> {
        if !self.has_history() {
            return Ok(Vec::new());
        }
        let s = self.superblock();
        let mut oldest = (s.history_oldest.get(), s.history_time.get());
        let mut points = Vec::new();
        let point = |step: &Step| Point {
            number: step.sequence,
            time: step.time,
            changed: step.changed(),
            held: step.slots().count() as u64,
        };
        if let Some(cut) = self.cut {
            oldest = cut;
        } else {
            let chain = segments(&**self.file(), s)?;
            if chain.broken.is_some() {
                let first = chain.segments.front();
                oldest = (first.map_or(s.next_commit.get(), |s| s.commits.0) - 1, 0);
            }
            for segment in &chain.segments {
                match read_segment(&**self.file(), &self.id(), segment) {
                    Ok(steps) => points.extend(steps.iter().map(point)),
                    Err(e) if e.kind() == Kind::Corrupt => {
                        points.clear();
                        oldest = (segment.commits.1, segment.last_time);
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        let journal = self.steps.iter().filter(|s| s.sequence > oldest.0);
        points.extend(journal.map(point));
        points.insert(
            0,
            Point {
                number: oldest.0,
                time: oldest.1,
                changed: 0,
                held: 0,
            },
        );
        Ok(points)
    }
    /// The layer as it was at point `number`, for reading blocks.
    pub fn at_point(mut self, number: u64) -> Result<ReadLayer> {
        self.past = Some(self.undone_to(number)?);
        Ok(self)
    }
    /// What the layer said of a region at the point it shows, where now it says `map`.
    pub(super) fn before(&self, undo: &Undo, region: Region, map: RegionMap) -> RegionMap {
        let start = u64::from(region.0) * REGION_BLOCKS as u64;
        let mut pointers = [Pointer::Absent; REGION_BLOCKS];
        map.get_all(0, &mut pointers);
        let mut changed = false;
        for (from, to, pointer) in undo.within(start, start + REGION_BLOCKS as u64) {
            pointers[(from - start) as usize..(to - start) as usize].fill(pointer);
            changed = true;
        }
        if !changed {
            return map;
        }
        let mut past = RegionMap::new();
        for (index, pointer) in pointers.into_iter().enumerate() {
            if pointer != Pointer::Absent {
                past.set(index, pointer);
            }
        }
        past
    }
    /// What the layer said, as of point `number`, of each block that was changed since.
    pub fn undone_to(&self, number: u64) -> Result<Undo> {
        let mut undo = Undo::default();
        self.each_step(number, |step| {
            step.undo.iter().for_each(|entry| undo.add(entry));
            Ok(())
        })?;
        Ok(undo)
    }
    /// Slots that its history occupies: those of replaced blocks, and its own.
    pub fn history_slots(&self) -> u64 {
        let journal: usize = self.steps.iter().map(|s| s.slots().count()).sum();
        let before = match self.has_history() && self.cut.is_none() {
            true => self.superblock().history_blocks.get(),
            false => 0,
        };
        before + journal as u64
    }
}
