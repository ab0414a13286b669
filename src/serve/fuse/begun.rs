//! Reads that were begun: the disk below was asked for them, and the worker that took them goes on with other requests meanwhile.
//!
//! A worker that waits for the disk itself lets another one take its place, and both change places again when the disk has answered: two turns of the
//! scheduler for each request. Where many wait, few workers finish what others begin: each finds the next ones ready when the first one is.
//!
//! Always true: what is here is finished by somebody. A worker that finishes leaves only when nothing is left, and one that cannot leave a read to others finishes it.
//!
//! What is here holds no disk: if the disk is removed before it is finished, whoever asked gets the error of those who ask then.

use super::{abi, ops};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

/// Bytes of a request to READ.
pub(super) const HEAD: usize = abi::IN_HEADER + size_of::<abi::IoIn>();
/// A request to READ.
pub(super) type Head = [u8; HEAD];

/// So many finish, and more where reads wait for them for long.
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
    /// Reads that are not answered.
    unfinished: AtomicUsize,
    /// Did a request have to wait for the disk while others wanted to be served? And how many reads in a row had not, since.
    cold: AtomicBool,
    warm: AtomicU32,
}

#[derive(Default)]
struct State {
    reads: VecDeque<Head>,
    /// How many were taken from `reads` so far, and how many had come at the last look.
    taken: u64,
    come: u64,
    /// Had one waited for long, at the last look?
    late: bool,
    /// Workers that finish reads, and workers that were called to do so.
    finishing: usize,
    called: usize,
}

/// What is left to a worker that leaves a read to others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Left {
    /// Nothing.
    Nothing,
    /// To start another one that finishes reads, or to do it: it is counted as one who does.
    Finisher,
    /// The read: there is no room for it.
    All,
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
            cold: AtomicBool::new(false),
            warm: AtomicU32::new(0),
        }
    }
    /// A worker waits for the disk while nobody else waits for requests.
    pub(super) fn waits(&self) {
        if !self.cold.load(Relaxed) {
            self.warm.store(0, Relaxed);
            self.cold.store(true, Relaxed);
        }
    }
    /// Is any read here?
    pub(super) fn is_any(&self) -> bool {
        self.unfinished.load(SeqCst) > 0
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
    /// Leaves a read that was begun to others. `call` calls one of those that rest, if any does.
    pub(super) fn leave(&self, read: &Head, call: impl FnOnce() -> bool) -> Left {
        self.warm.store(0, Relaxed);
        let mut state = self.state.lock();
        if state.reads.len() == MOST {
            return Left::All;
        }
        state.reads.push_back(*read);
        self.unfinished.fetch_add(1, SeqCst);
        let finishers = state.finishing + state.called;
        match finishers < FINISHERS && state.reads.len() > EACH * finishers {
            true => state.one_more(call),
            false => Left::Nothing,
        }
    }
    /// Has a read waited for those who finish them since the last look? Then there is to be one more.
    pub(super) fn look(&self, call: impl FnOnce() -> bool) -> Left {
        let mut state = self.state.lock();
        state.late = state.taken < state.come;
        state.come = state.taken + state.reads.len() as u64;
        match state.late {
            true => state.one_more(call),
            false => Left::Nothing,
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
    /// The one that was to be started could not be.
    pub(super) fn is_not_started(&self) {
        self.state.lock().finishing -= 1;
    }
    /// The next read for a worker that finishes them. If there is none, or more finish than are needed, it is none of those any more.
    pub(super) fn next(&self) -> Option<Head> {
        let mut state = self.state.lock();
        let needed = state.finishing <= FINISHERS || state.late;
        let next = needed.then(|| state.reads.pop_front()).flatten();
        match next {
            Some(_) => state.taken += 1,
            None => state.finishing -= 1,
        }
        next
    }
    /// One that [`Begun::next`] gave is answered.
    pub(super) fn answered(&self) {
        self.unfinished.fetch_sub(1, SeqCst);
    }
}

impl State {
    /// Calls one more that finishes reads, or else counts one that is to be started.
    fn one_more(&mut self, call: impl FnOnce() -> bool) -> Left {
        // Under the lock: whoever wakes must find that it was meant.
        if call() {
            self.called += 1;
            Left::Nothing
        } else {
            self.finishing += 1;
            Left::Finisher
        }
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
        // Nobody rests: who brings it sees to it.
        assert_eq!(begun.leave(&read, || false), Left::Finisher);
        assert!(begun.is_any() && !begun.is_called());
        assert_eq!(finish(&begun), 1);
        assert!(!begun.is_any());
        // One is called for the first, another one for the fifth, and so on, up to four.
        let mut calls = 0;
        for n in 0..MOST {
            let mut called = false;
            let left = begun.leave(&read, || {
                called = true;
                true
            });
            assert_eq!(left, Left::Nothing);
            calls += usize::from(called);
            assert_eq!(calls, (n / EACH + 1).min(FINISHERS), "{n}");
        }
        assert_eq!(begun.leave(&read, || true), Left::All);
        assert!((0..FINISHERS).all(|_| begun.is_called()) && !begun.is_called());
        assert_eq!(finish(&begun), MOST);
        // The others find nothing, and are none any more.
        assert_eq!((1..FINISHERS).map(|_| finish(&begun)).sum::<usize>(), 0);
        assert_eq!(begun.leave(&read, || false), Left::Finisher);
        assert_eq!(finish(&begun), 1);
    }

    #[test]
    fn a_read_that_waits_for_long_gets_one_more() {
        let begun = Begun::new();
        let read = [0; HEAD];
        let never = || panic!("nothing waits for long");
        begun.look(never);
        for _ in 0..3 {
            begun.leave(&read, || true);
        }
        // They came after the last look.
        begun.look(never);
        assert!(begun.is_called() && begun.next().is_some());
        begun.leave(&read, || true);
        // Two of the three are here still.
        assert_eq!(begun.look(|| true), Left::Nothing);
        assert!(begun.is_called() && begun.next().is_some());
        assert!(begun.next().is_some());
        begun.look(|| true);
        assert_eq!(begun.look(|| false), Left::Finisher);
        begun.is_not_started();
        assert!(begun.next().is_some());
        begun.look(never);
        assert!(begun.next().is_none() && begun.next().is_none());
    }

    #[test]
    fn no_more_finish_than_are_needed() {
        let begun = Begun::new();
        let come =
            || (0..20).for_each(|_| assert_eq!(begun.leave(&[0; HEAD], || true), Left::Nothing));
        come();
        begun.look(|| panic!("they came after the last look"));
        begun.look(|| true);
        begun.look(|| true);
        for _ in 0..FINISHERS + 2 {
            assert!(begun.is_called() && begun.next().is_some());
        }
        assert!(!begun.is_called());
        // Each of them gets some until nothing waits for long.
        for _ in FINISHERS + 2..20 {
            assert!(begun.next().is_some());
        }
        come();
        begun.look(|| panic!("all that had come is taken"));
        assert!(begun.next().is_none() && begun.next().is_none());
        for _ in 0..20 {
            assert!(begun.next().is_some());
        }
        for _ in 0..FINISHERS {
            assert!(begun.next().is_none());
        }
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
