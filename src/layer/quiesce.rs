//! Knowing when no reader can hold what was just taken out of the map: two-phase epoch reclamation.
//!
//! A reader enters before it looks a pointer up and leaves after it has copied the data. What was unpublished in
//! epoch `e` is out of every reader's reach once the epoch is `e + 2`: the step to `e + 1` waited for the readers of `e - 1`, the
//! step to `e + 2` for those of `e`, and whoever entered later cannot have seen it. The scheme is that of K. Fraser,
//! "Practical lock-freedom" (2004), section 5.2.3, with two counters because only the present and the last epoch can have readers.

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use crate::sync::thread_number;

/// Readers spread over this many counters, so that they do not fight for one cache line.
const STRIPES: usize = 8;

#[repr(align(128))]
#[derive(Default)]
struct Stripe([AtomicUsize; 2]);

/// The epoch and its readers.
#[derive(Default)]
pub struct Quiesce {
    epoch: AtomicU64,
    stripes: [Stripe; STRIPES],
}

/// A reader is under way while this lives.
pub struct Guard<'a>(&'a AtomicUsize);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Quiesce {
    /// Begins a read.
    pub fn enter(&self) -> Guard<'_> {
        let stripe = &self.stripes[thread_number() % STRIPES];
        loop {
            let epoch = self.epoch.load(SeqCst);
            let counter = &stripe.0[(epoch & 1) as usize];
            counter.fetch_add(1, SeqCst);
            if self.epoch.load(SeqCst) == epoch {
                return Guard(counter);
            }
            // The epoch moved in between: this counter may already have been found empty.
            counter.fetch_sub(1, SeqCst);
        }
    }
    /// The epoch in which something unpublished right now counts.
    pub fn now(&self) -> u64 {
        self.epoch.load(SeqCst)
    }
    /// Moves the epoch on where no reader of the last one is left, twice at the most; returns it. Callers
    /// must not run at the same time (they hold the lock of the free space).
    pub fn advance(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.epoch.load(SeqCst);
            let last = ((epoch + 1) & 1) as usize;
            if self.stripes.iter().any(|s| s.0[last].load(SeqCst) != 0) {
                return epoch;
            }
            self.epoch.store(epoch + 1, SeqCst);
        }
        self.epoch.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reader_may_know_stays() {
        let q = Quiesce::default();
        let reader = q.enter();
        let retired = q.now();
        assert!(
            q.advance() < retired + 2,
            "a reader of that epoch is under way"
        );
        assert!(q.advance() < retired + 2);
        drop(reader);
        q.advance();
        assert!(q.advance() >= retired + 2);
    }
}
