//! Times for people. They order nothing.

use std::time::{SystemTime, UNIX_EPOCH};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Seconds since 1970, now.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// `then` as seen from `now`: `just now`, `2 min ago`, `3 h ago`, `5 days ago`, and the date from a
/// month on (or where a clock was wrong).
pub fn ago(then: u64, now: u64) -> String {
    // A clock may be a little off; a lot is worth showing.
    if then > now + MINUTE {
        return date(then);
    }
    let passed = now.saturating_sub(then);
    match passed {
        0..MINUTE => "just now".into(),
        MINUTE..HOUR => format!("{} min ago", passed / MINUTE),
        HOUR..DAY => format!("{} h ago", passed / HOUR),
        _ if passed < 2 * DAY => "1 day ago".into(),
        _ if passed < 31 * DAY => format!("{} days ago", passed / DAY),
        _ => date(then),
    }
}

/// A length of time: `48 s`, `3 min`, `5 h`, `12 days`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..MINUTE => format!("{seconds} s"),
        MINUTE..HOUR => format!("{} min", seconds / MINUTE),
        HOUR..DAY => format!("{} h", seconds / HOUR),
        _ if seconds < 2 * DAY => "1 day".into(),
        _ => format!("{} days", seconds / DAY),
    }
}

/// The day, as `2026-11-03` (UTC).
pub fn date(seconds: u64) -> String {
    let (year, month, day) = civil(seconds / DAY);
    format!("{year:04}-{month:02}-{day:02}")
}

/// The second, as `2026-11-03 14:05:59 UTC`.
pub fn date_time(seconds: u64) -> String {
    let of_day = seconds % DAY;
    format!(
        "{} {:02}:{:02}:{:02} UTC",
        date(seconds),
        of_day / HOUR,
        of_day % HOUR / MINUTE,
        of_day % MINUTE
    )
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years begin on 1 March here, so that the leap day is the last of its year.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + carry, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_from_now() {
        let now = 1_800_000_000;
        for (before, text) in [
            (0, "just now"),
            (59, "just now"),
            (60, "1 min ago"),
            (150, "2 min ago"),
            (3600, "1 h ago"),
            (23 * 3600, "23 h ago"),
            (86_400, "1 day ago"),
            (5 * 86_400, "5 days ago"),
            (40 * 86_400, "2026-12-06"),
        ] {
            assert_eq!(ago(now - before, now), text);
        }
        assert_eq!(ago(now + 30, now), "just now");
        assert_eq!(ago(now + 86_400, now), "2027-01-16");
    }

    #[test]
    fn dates_are_right() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_827_696, "2000-02-29 12:34:56 UTC"),
            (1_709_164_800, "2024-02-29 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(date_time(seconds), text);
        }
    }
}
