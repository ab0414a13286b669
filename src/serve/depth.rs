//! Where the requests of a loop device over a served file are completed, by how many of them are under way.
//!
//! The kernel can interrupt the processor that made a request, to complete it there, or complete it near the one that answered. Where somebody waits for
//! each request the first wakes him sooner; where many are under way it is an interrupt for each, which on a virtual machine is the hypervisor's business.

use crate::sys::loopdev::{self, Completed};
use parking_lot::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

/// Requests of one kind between two looks: a look takes as long as one or two of them. A prime, as many programs ask for a power of two at once, and ask for
/// more when they have got all.
const LOOK: u64 = 251;
/// From so many requests under way on they are completed near the processor that answers, and where they were made when so many looks in a row have found so few.
const MANY: u32 = 8;
const FEW: u32 = 3;
const LOOKS: u32 = 8;

/// See the module.
#[derive(Default)]
pub(super) struct Depth {
    /// One more than the number of the device; 0: there is none.
    device: AtomicU32,
    due: AtomicBool,
    few: Mutex<Few>,
}

/// Looks in a row that found few requests.
#[derive(Default)]
struct Few(u32);

impl Few {
    /// What suits a device of which so many requests are under way, if that can be told.
    fn next(&mut self, under_way: u32) -> Option<Completed> {
        self.0 = match under_way {
            n if n <= FEW => (self.0 + 1).min(LOOKS),
            _ => 0,
        };
        match under_way {
            n if n >= MANY => Some(Completed::Near),
            _ if self.0 == LOOKS => Some(Completed::WhereMade),
            _ => None,
        }
    }
}

impl Depth {
    /// The file is shown as loop device `number`.
    pub(super) fn is_of(&self, number: u32) {
        self.device.store(number + 1, Release);
    }
    /// One more request was served, the one after so many others.
    pub(super) fn count(&self, before: u64) {
        if before % LOOK == LOOK - 1 {
            self.due.store(true, Relaxed);
        }
    }
    /// Is it time for [`Depth::look`]?
    pub(super) fn is_due(&self) -> bool {
        self.due.load(Relaxed)
    }
    /// Looks how many requests are under way, if it is time to. After the answer: on older kernels (before 6.11) whoever sets up the device may hold the lock that
    /// this needs, and wait for all requests. Those that have rings have no such lock, or nothing is done ([`loopdev::complete`]).
    pub(super) fn look(&self) {
        if !self.is_due() || !self.due.swap(false, Relaxed) {
            return;
        }
        let Some(number) = self.device.load(Acquire).checked_sub(1) else {
            return;
        };
        // One worker at most waits for that lock.
        let Some(mut few) = self.few.try_lock() else {
            return;
        };
        if let Some(completed) = loopdev::in_flight(number).and_then(|n| few.next(n)) {
            // Nothing is written if it is set already.
            loopdev::complete(number, completed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_finds_many_and_several_find_few() {
        let mut few = Few::default();
        let mut next = |n| few.next(n);
        assert_eq!(next(32), Some(Completed::Near));
        // Between two bursts.
        for n in [0, 1, 2, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 4, 0] {
            assert_eq!(next(n), None, "{n}");
        }
        for _ in 0..LOOKS - 2 {
            assert_eq!(next(1), None);
        }
        assert_eq!(next(1), Some(Completed::WhereMade));
        assert_eq!(next(1), Some(Completed::WhereMade));
        assert_eq!(next(7), None);
        assert_eq!(next(1), None);
        assert_eq!(next(8), Some(Completed::Near));
    }
}
