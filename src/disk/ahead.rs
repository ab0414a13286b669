//! Reading ahead of sequential readers.
//!
//! The kernel's own readahead sees files, not disks: of one reader of a disk it sees reads of several files at places that do not follow each other, and
//! of many disks over one base all reads as those of one file. So the disk looks for itself whether it is read from front to back.

use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::ops::Range;

/// Requests of one reader may overtake each other by so much.
const SLACK: u64 = 4 << 20;
/// After so many bytes in a row a reader counts as sequential.
const TRIGGER: u64 = 512 << 10;
/// The most that is read ahead.
const WINDOW: u64 = 4 << 20;
/// What is read ahead in one go at least.
const STEP: u64 = 1 << 20;

/// What is known of the readers of one disk. Several at a time disturb each other, and cost each other no more than this.
#[derive(Default)]
pub struct Stream {
    /// Where the last request ended.
    end: AtomicU64,
    /// Bytes read in a row.
    run: AtomicU64,
    /// Up to here it is read ahead.
    ahead: AtomicU64,
}

impl Stream {
    /// A request was made; what to read ahead for it.
    pub fn read(&self, at: u64, len: u64) -> Option<Range<u64>> {
        let (last, end) = (self.end.load(Relaxed), at + len);
        if at + SLACK < last || at > last + SLACK {
            self.end.store(end, Relaxed);
            self.run.store(0, Relaxed);
            self.ahead.store(end, Relaxed);
            return None;
        }
        self.end.fetch_max(end, Relaxed);
        let run = self.run.fetch_add(len, Relaxed) + len;
        if run < TRIGGER {
            return None;
        }
        let ahead = self.ahead.load(Relaxed);
        let (from, to) = (ahead.max(end), end + run.min(WINDOW));
        if to < from + STEP {
            return None;
        }
        let won = self
            .ahead
            .compare_exchange(ahead, to, Relaxed, Relaxed)
            .is_ok();
        won.then_some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_seen_and_a_random_one_is_not() {
        let stream = Stream::default();
        let mut ahead = 0;
        for i in 0..64u64 {
            let at = i * (256 << 10);
            if let Some(range) = stream.read(at, 256 << 10) {
                assert!(range.start >= at && range.start >= ahead, "{range:?}");
                assert!(range.end <= at + (256 << 10) + WINDOW);
                ahead = range.end;
            } else if i > 16 {
                // Always some way ahead.
                assert!(ahead >= at + STEP, "{at} {ahead}");
            }
        }
        assert!(ahead > 15 << 20);
        for i in 0..64u64 {
            assert_eq!(stream.read(i * 7919 % 64 * (64 << 20), 4096), None);
        }
    }
}
