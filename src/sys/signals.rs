//! Interrupts (Ctrl-C and its kin) as a question that long work asks now and then.
//!
//! The first signal only sets a mark, so that the work can put everything back and end by itself; a
//! second one ends the process at once. Not for the daemon, which waits for its signals.

use std::sync::atomic::{AtomicI32, Ordering};

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    if CAUGHT.swap(signal, Ordering::SeqCst) != 0 {
        // SAFETY: `_exit` is async-signal-safe.
        unsafe { libc::_exit(130) }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP set the mark that [`caught`] tells. System calls that wait
/// return early (`EINTR`).
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: `action` is fully initialised (all zeros is a valid sigaction without flags and with
        // an empty mask), and `note` only touches an atomic and calls `_exit`, both async-signal-safe.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut old);
            if old.sa_sigaction == libc::SIG_IGN {
                continue; // under nohup it stays ignored
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Was there a signal since [`catch`]?
pub fn caught() -> bool {
    CAUGHT.load(Ordering::SeqCst) != 0
}
