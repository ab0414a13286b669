//! FUSE over io_uring is switched on in the kernel for a test, and off again.

use std::fs::{self, File};

const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// The switch, on (or off) until this is dropped. One test at a time, in whatever process.
pub struct Switch {
    before: String,
    _lock: File,
}

impl Switch {
    /// `None`, with a word, where this kernel has none.
    pub fn set(on: bool) -> Option<Switch> {
        let path = std::env::temp_dir().join("forkdisk-test-uring.lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .unwrap();
        lock.lock().unwrap();
        let before = fs::read_to_string(SWITCH).unwrap_or_default();
        let set = fs::write(SWITCH, if on { "Y" } else { "N" });
        if let Err(e) = set {
            eprintln!("left out: {SWITCH}: {e}");
            return None;
        }
        let switch = Switch {
            before,
            _lock: lock,
        };
        if on && let Err(e) = forkdisk::daemon::Transport::IoUring.available() {
            eprintln!("left out: {e}");
            return None;
        }
        Some(switch)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}
