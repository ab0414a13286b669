//! A limit to what is written to the log: a failing disk fails thousands of requests.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Failures logged per second; the rest is counted.
const LOGGED_PER_SECOND: u64 = 10;

/// Lets so many messages pass a second.
#[derive(Default)]
pub(super) struct LogLimit {
    second: AtomicU64,
    count: AtomicU64,
}

impl LogLimit {
    /// May one more be written now?
    pub(super) fn allow(&self) -> bool {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        if self.second.swap(now, Relaxed) != now {
            let dropped = self
                .count
                .swap(0, Relaxed)
                .saturating_sub(LOGGED_PER_SECOND);
            if dropped > 0 {
                tracing::error!("{dropped} more failures were not logged");
            }
        }
        self.count.fetch_add(1, Relaxed) < LOGGED_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_limited() {
        let log = LogLimit::default();
        let passed = (0..1000).filter(|_| log.allow()).count() as u64;
        assert!((LOGGED_PER_SECOND..=3 * LOGGED_PER_SECOND).contains(&passed));
    }
}
