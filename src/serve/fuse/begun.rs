//! Reads that were begun: the disk below was asked for them, and the worker that took them goes on with other requests meanwhile.
//!
//! A worker that waits for the disk itself lets another one take its place, and both change places again when the disk has answered: two turns of the
//! scheduler for each request. Where many wait, few workers finish what others begin: each finds the next ones ready when the first one is.
//!
//! Always true: what is here is finished by somebody. A worker that finishes leaves only when nothing is left, and one that cannot leave a read to others finishes it.

use super::{abi, ops};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

/// Bytes of a request to READ.
pub(super) const HEAD: usize = abi::IN_HEADER + size_of::<abi::IoIn>();
/// A request to READ.
pub(super) type Head = [u8; HEAD];

/// So many finish at most, unless none of them gets on.
const FINISHERS: usize = 4;
/// For so many reads there is one more of them.
const EACH: usize = 4;
/// So many reads are here at most: then others are served as they come.
const MOST: usize = 256;
/// After so many in a row that had nothing to wait for, none is begun.
const WARM: u32 = 64;

/// See the module.
pub(super) struct Begun {
    state: Mutex<State>,
    /// Reads that are not answered, and how many were.
    unfinished: AtomicUsize,
    finished: AtomicU64,
    /// Did a request have to wait for the disk while others wanted to be served? And how many in a row had not, since.
    cold: AtomicBool,
    warm: AtomicU32,
}

#[derive(Default)]
struct State {
    reads: VecDeque<Head>,
    /// Workers that finish reads, and workers that were called to do so.
    finishing: usize,
    called: usize,
}

impl Begun {
    pub(super) fn new() -> Begun {
        Begun {
            state: Mutex::new(State {
                // Serving allocates nothing.
                reads: VecDeque::with_capacity(MOST),
                ..State::default()
            }),
            unfinished: AtomicUsize::new(0),
            finished: AtomicU64::new(0),
            cold: AtomicBool::new(false),
            warm: AtomicU32::new(0),
        }
    }
    /// A worker waits for the disk while nobody else waits for requests.
    pub(super) fn waits(&self) {
        self.cold.store(true, Relaxed);
    }
    /// Is any read here?
    pub(super) fn is_any(&self) -> bool {
        self.unfinished.load(Acquire) > 0
    }
    /// How many were finished.
    pub(super) fn finished(&self) -> u64 {
        self.finished.load(Relaxed)
    }
    /// The request, if it is a read that may be left to others as soon as it is begun.
    pub(super) fn head<'a>(&self, request: &'a [u8]) -> Option<&'a Head> {
        let head: &Head = match self.cold.load(Relaxed) {
            true => request.try_into().ok()?,
            false => return None,
        };
        ops::is_short_read(head).then_some(head)
    }
    /// Nothing had to be begun.
    pub(super) fn nothing(&self) {
        if self.warm.fetch_add(1, Relaxed) >= WARM {
            self.cold.store(false, Relaxed);
        }
    }
    /// Leaves a read that was begun to others. `call` calls one of those that rest, if any does. What is left to the caller: nothing (`Ok(false)`); to finish reads,
    /// as nobody else does (`Ok(true)`); or all, as there is no room (`Err`).
    pub(super) fn leave(&self, read: &Head, call: impl FnOnce() -> bool) -> Result<bool, ()> {
        self.warm.store(0, Relaxed);
        let mut state = self.state.lock();
        if state.reads.len() == MOST {
            return Err(());
        }
        state.reads.push_back(*read);
        self.unfinished.fetch_add(1, AcqRel);
        let finishers = state.finishing + state.called;
        if finishers < FINISHERS && state.reads.len() > EACH * finishers {
            // Under the lock: whoever wakes must find that it was meant.
            if call() {
                state.called += 1;
            } else if finishers == 0 {
                state.finishing += 1;
                return Ok(true);
            }
        }
        Ok(false)
    }
    /// Calls one more to finish reads: those that do get on with nothing.
    pub(super) fn call(&self, call: impl FnOnce() -> bool) {
        let mut state = self.state.lock();
        if !state.reads.is_empty() && call() {
            state.called += 1;
        }
    }
    /// A worker woke: is it one that was called to finish reads? It is counted as one, then.
    pub(super) fn is_called(&self) -> bool {
        let mut state = self.state.lock();
        let is = state.called > 0;
        if is {
            state.called -= 1;
            state.finishing += 1;
        }
        is
    }
    /// A worker ends; it finishes what is here before.
    pub(super) fn ends(&self) {
        self.state.lock().finishing += 1;
    }
    /// The next read for a worker that finishes them; with the last one it is none of those any more.
    pub(super) fn next(&self) -> Option<Head> {
        let mut state = self.state.lock();
        let next = state.reads.pop_front();
        if next.is_none() {
            state.finishing -= 1;
        }
        next
    }
    /// One that [`Begun::next`] gave is answered.
    pub(super) fn answered(&self) {
        self.finished.fetch_add(1, Relaxed);
        self.unfinished.fetch_sub(1, AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(begun: &Begun) -> usize {
        let mut n = 0;
        while begun.next().is_some() {
            begun.answered();
            n += 1;
        }
        n
    }

    #[test]
    fn whatever_is_left_is_finished_by_somebody() {
        let begun = Begun::new();
        let read = [0; HEAD];
        // Nobody rests: who brings it does it.
        assert_eq!(begun.leave(&read, || false), Ok(true));
        assert!(begun.is_any() && !begun.is_called());
        assert_eq!(finish(&begun), 1);
        assert!(!begun.is_any());
        // One is called for the first, another one for the sixth, and so on, up to four.
        let mut calls = 0;
        for n in 0..MOST {
            let mut called = false;
            let left = begun.leave(&read, || {
                called = true;
                true
            });
            assert_eq!(left, Ok(false));
            calls += usize::from(called);
            assert_eq!(calls, (n / EACH + 1).min(FINISHERS), "{n}");
        }
        assert_eq!(begun.leave(&read, || true), Err(()));
        begun.call(|| true);
        assert!((0..=FINISHERS).all(|_| begun.is_called()) && !begun.is_called());
        assert_eq!(finish(&begun), MOST);
        // The others find nothing, and are none any more.
        assert_eq!((0..FINISHERS).map(|_| finish(&begun)).sum::<usize>(), 0);
        assert_eq!(begun.leave(&read, || false), Ok(true));
        assert_eq!(finish(&begun), 1);
        begun.call(|| panic!("there is nothing to finish"));
    }

    #[test]
    fn reads_are_begun_while_some_wait_for_the_disk() {
        let begun = Begun::new();
        let read = ops::tests::read_of(4096);
        assert!(begun.head(&read).is_none());
        begun.waits();
        assert!(begun.head(&read).is_some());
        assert!(begun.head(&read[1..]).is_none());
        assert!(begun.head(&ops::tests::read_of(1 << 20)).is_none());
        for _ in 0..=WARM {
            assert!(begun.head(&read).is_some());
            begun.nothing();
        }
        assert!(begun.head(&read).is_none());
    }
}
