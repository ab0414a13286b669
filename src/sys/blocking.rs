//! Calls that may wait for a disk, announced to whoever has other work for the processor meanwhile.
//!
//! A thread has an attendant or has none; without one nothing is announced.

use std::cell::RefCell;
use std::sync::Arc;

/// Is told when a thread of his waits.
pub trait Attendant {
    /// The thread that calls this is about to wait.
    fn waits(&self);
    /// It goes on.
    fn goes_on(&self);
}

thread_local!(static ATTENDANT: RefCell<Option<Arc<dyn Attendant>>> = const { RefCell::new(None) });

/// From here on, and until it ends, this thread has an attendant.
pub fn attend(attendant: Arc<dyn Attendant>) {
    ATTENDANT.set(Some(attendant));
}

/// Has this thread an attendant?
pub fn is_attended() -> bool {
    ATTENDANT.with_borrow(Option::is_some)
}

/// Does what may wait for a disk.
pub fn wait<T>(call: impl FnOnce() -> T) -> T {
    let _over = ATTENDANT.with_borrow(Clone::clone).map(|attendant| {
        attendant.waits();
        Over(attendant)
    });
    call()
}

struct Over(Arc<dyn Attendant>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.goes_on();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    #[derive(Default)]
    struct Counts {
        begun: AtomicU32,
        over: AtomicU32,
    }
    impl Attendant for Counts {
        fn waits(&self) {
            self.begun.fetch_add(1, SeqCst);
        }
        fn goes_on(&self) {
            self.over.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn the_attendant_of_a_thread_hears_of_its_waits_and_of_no_others() {
        let counts = Arc::new(Counts::default());
        let of = counts.clone();
        std::thread::spawn(move || {
            assert!(!is_attended());
            wait(|| ());
            attend(of.clone());
            let during = wait(|| (of.begun.load(SeqCst), of.over.load(SeqCst)));
            assert_eq!(during, (1, 0));
            let fell = std::panic::catch_unwind(|| wait(|| panic!("it fails")));
            assert!(fell.is_err());
        })
        .join()
        .unwrap();
        wait(|| ());
        assert_eq!(counts.begun.load(SeqCst), 2);
        assert_eq!(counts.over.load(SeqCst), 2);
    }
}
