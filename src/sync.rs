//! Locks, atomics, and the thread's number: the primitives whose interleavings matter, in one place.
//!
//! `tests/shuttle` compiles the modules that use them against a `sync` of its own, in which a scheduler decides who runs next. So what
//! two threads may do to each other goes through here; counters that nothing depends on need not.
//!
//! Always true: nothing here blocks but a lock, so that the other `sync` can stand for this one.

pub use parking_lot::{Condvar, Mutex, RwLock};
/// The standard library's atomics.
pub mod atomic {
    pub use std::sync::atomic::{
        AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };
}

/// A small number for each thread, to spread threads over stripes.
pub fn thread_number() -> usize {
    use atomic::{AtomicUsize, Ordering::Relaxed};
    use std::cell::Cell;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed)));
    MINE.with(Cell::get)
}
