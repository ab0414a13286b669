//! What `src/sync.rs` offers, as the scheduler's: each call is a point at which another thread may go on.
//!
//! Its locks know neither poisoning nor a second read by the same thread: that would be a deadlock as soon as a writer waits, and is
//! told as one.

use shuttle::sync;
use std::ops::{Deref, DerefMut};

/// Every access in one order: what weaker orderings allow beyond that is not tried.
pub mod atomic {
    pub use shuttle::sync::atomic::{
        AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };
}

pub fn thread_number() -> usize {
    shuttle::current::me().into()
}

#[derive(Default)]
pub struct Mutex<T>(sync::Mutex<T>);

/// Empty only while a [`Condvar`] waits with it.
pub struct MutexGuard<'a, T>(Option<sync::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    pub fn new(value: T) -> Mutex<T> {
        Mutex(sync::Mutex::new(value))
    }
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().expect("no thread panicked")))
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_ref().expect("it does not wait")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("it does not wait")
    }
}

pub struct Condvar(sync::Condvar);

impl Condvar {
    pub fn new() -> Condvar {
        Condvar(sync::Condvar::new())
    }
    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let inner = guard.0.take().expect("it does not wait");
        guard.0 = Some(self.0.wait(inner).expect("no thread panicked"));
    }
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[derive(Default)]
pub struct RwLock<T>(sync::RwLock<T>);

impl<T> RwLock<T> {
    pub fn new(value: T) -> RwLock<T> {
        RwLock(sync::RwLock::new(value))
    }
    pub fn read(&self) -> sync::RwLockReadGuard<'_, T> {
        self.0.read().expect("no thread panicked")
    }
    pub fn write(&self) -> sync::RwLockWriteGuard<'_, T> {
        self.0.write().expect("no thread panicked")
    }
}
