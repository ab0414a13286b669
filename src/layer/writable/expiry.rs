//! What of a history goes, and when; and into what segments the rest is divided, so that no more goes than must.
//!
//! Always true: what goes is a beginning of the history. A limit costs at most a segment more than it must, and a segment is a small part of
//! the limit, or one commit.

use super::history::{History, Part};
use super::{Layer, limit};
use crate::format::{MAX_SEGMENTS, Step};
use crate::layer::history::Stays;
use crate::sync::atomic::Ordering::SeqCst;
use crate::units::BLOCK;

/// Expired bytes that are worth a checkpoint of their own.
pub(super) const WORTH: u64 = 16 << 20;
/// How many segments fill a limit in bytes.
const PARTS: u64 = 16;
/// A flush may leave so many bytes more than the limit, if that is more than a segment: so small limits do not cost a checkpoint a flush.
const LEAST: u64 = 64 * BLOCK;
/// Into how many segments a window is divided.
const SPANS: u64 = 64;
/// How many parts of a window may have passed before what is too old costs a checkpoint of its own.
const LATE: u64 = 2;
/// A shorter time, in milliseconds, is not worth a segment.
const MOMENT: u64 = 1000;
/// Segments that one checkpoint writes at most: the limits ask for fewer, but clocks may jump.
const MAX_NEW: usize = 128;

/// Bytes that a commit of the history takes: the blocks it holds, and the note of them.
pub(super) fn bytes_of(step: &Step) -> u64 {
    step.slots().count() as u64 * BLOCK + step.noted()
}

/// Bytes of a segment where `room` is the limit.
fn grain(room: u64) -> u64 {
    (room / PARTS).max(LEAST.min(room / 4))
}

/// Milliseconds that a segment spans.
fn span(window: u64) -> u64 {
    (window / SPANS).max(MOMENT)
}

impl History {
    /// Is it so much more than `room` bytes that it cannot wait for the housekeeping?
    pub fn is_over(&self, room: u64) -> bool {
        self.bytes() > room.saturating_add(grain(room).max(LEAST))
            && self.parts().next().is_some_and(|part| self.may_go(&part))
    }
    /// Does nobody read a point that is before its end?
    fn may_go(&self, part: &Part) -> bool {
        self.holds.oldest().is_none_or(|held| part.number <= held)
    }
    /// What was made then or before is too old.
    pub fn since(&self) -> Option<u64> {
        let keep = self.keep.as_ref()?;
        let window = keep.window?;
        Some((keep.clock)().saturating_sub(window))
    }
    /// What of the history may stay in layers below, where all of it may have so much `room`; `None`: nothing is kept.
    pub fn stays_below(&self, room: u64) -> Option<Stays> {
        let keep = self.keep.as_ref()?;
        let late = |window| (keep.clock)().saturating_sub(window + LATE * span(window));
        let own = self.bytes();
        Some(Stays {
            since: self.since(),
            late: keep.window.map(late),
            room: room.saturating_sub(own),
            left: room.saturating_sub(own).saturating_sub(grain(room) / 2),
        })
    }
    /// Does it wait with what is too much until what layers below keep, which is older, has gone? Not for ever: twice the limit is enough.
    pub fn waits(&self, room: u64) -> bool {
        let lower = self.keep.as_ref().and_then(|keep| keep.lower.as_ref());
        lower.is_some_and(|lower| lower.goes_first())
            && self.bytes() <= room.saturating_mul(2).saturating_add(LEAST)
    }
    /// The oldest point that is to stay, and how many bytes go with what is before it.
    pub fn expired(&self, room: u64) -> ((u64, u64), u64) {
        let since = self.since();
        let mut oldest = self.oldest;
        let mut left = self.bytes();
        // A little more than must: else small segments would go one by one, each with a checkpoint, and make room for small ones.
        let stays = match left > room {
            true => room - grain(room) / 2,
            false => room,
        };
        let mut freed = 0;
        let mut segments = self.segments.len();
        let waits = self.waits(room);
        for part in self.parts() {
            let gone = part.number <= self.oldest.0;
            let old = since.is_some_and(|since| part.time <= since);
            let due = self.may_go(&part) && (old || left > stays && !waits);
            if !gone && !due && segments + MAX_NEW <= MAX_SEGMENTS {
                break;
            }
            if !gone {
                oldest = (part.number, part.time);
            }
            left = left.saturating_sub(part.bytes);
            freed += part.bytes;
            segments = segments.saturating_sub(1);
        }
        (oldest, freed)
    }
    /// Is a checkpoint worth it, so that what has expired goes?
    pub fn due(&self, room: u64) -> bool {
        let Some(keep) = &self.keep else {
            return false;
        };
        if self.slots() == 0 {
            return false;
        }
        let (_, freed) = self.expired(room);
        let late = |window: u64| {
            let since = (keep.clock)().saturating_sub(window + LATE * span(window));
            self.parts().next().is_some_and(|part| part.time <= since)
        };
        freed > 0
            && (self.bytes() > room
                || freed >= WORTH.max(self.bytes() / 8)
                || keep.window.is_some_and(late))
    }
    /// Divides what the journal hands over into segments.
    pub fn divided<'s>(&self, steps: &'s [Step], room: u64) -> Vec<&'s [Step]> {
        let grain = grain(room);
        let window = self.keep.as_ref().and_then(|keep| keep.window);
        let span = window.map_or(u64::MAX, span);
        let mut parts = Vec::new();
        let mut rest = steps;
        while let Some(first) = rest.first() {
            let mut bytes = 0;
            let mut fits = |step: &&Step| {
                bytes += bytes_of(step);
                bytes <= grain && step.time.saturating_sub(first.time) <= span
            };
            let n = match parts.len() + 1 < MAX_NEW {
                true => rest.iter().take_while(|step| fits(step)).count().max(1),
                false => rest.len(),
            };
            let (part, behind) = rest.split_at(n);
            parts.push(part);
            rest = behind;
        }
        parts
    }
}

impl Layer {
    /// Bytes that its history may occupy: what is to be kept, and no more than the limit of the layer leaves beside its data.
    pub(super) fn history_room(&self, history: &History) -> u64 {
        let limit = self.limit.load(SeqCst);
        let data = self.data_blocks.load(SeqCst).max(0) as u64;
        let beside = match limit {
            limit::NONE => u64::MAX,
            limit => limit.saturating_sub(data).saturating_mul(BLOCK),
        };
        let kept = history.keep.as_ref().and_then(|keep| keep.bytes);
        kept.unwrap_or(u64::MAX).min(beside)
    }
}
