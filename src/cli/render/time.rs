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

/// Milliseconds since 1970, now.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// Reads a time as RFC 3339 writes it: `2026-11-03T14:05:59Z`, `2026-11-03 15:05:59.5+01:00`. Milliseconds since 1970; without a
/// fraction the last one of that second.
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let number = |at: usize, len: usize| -> Option<u64> {
        let digits = text.get(at..at + len)?;
        let plain = digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse().ok().filter(|_| plain)
    };
    let sign = |at: usize, signs: &str| text.get(at..at + 1).filter(|c| signs.contains(c));
    sign(4, "-").and(sign(7, "-")).and(sign(10, "Tt "))?;
    sign(13, ":").and(sign(16, ":"))?;
    let (year, month, day) = (number(0, 4)?, number(5, 2)?, number(8, 2)?);
    let (hour, minute, second) = (number(11, 2)?, number(14, 2)?, number(17, 2)?);
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // The day is found as it is shown, so that there is one calendar only.
    let from = (year.checked_sub(1970)? * 365).saturating_sub(1);
    let days = (from..from + 1000).find(|&d| civil(d) == (year, month, day))?;
    let mut rest = text.get(19..)?;
    let mut ms = 999;
    if let Some(fraction) = rest.strip_prefix('.') {
        let end = fraction.find(|c: char| !c.is_ascii_digit())?;
        let digits: String = fraction[..end]
            .chars()
            .chain("000".chars())
            .take(3)
            .collect();
        ms = digits.parse().ok().filter(|_| end > 0)?;
        rest = &fraction[end..];
    }
    let local = (days * DAY + hour * HOUR + minute * MINUTE + second) as i64;
    let offset = match rest {
        "Z" | "z" => 0,
        _ => {
            let at = text.len().checked_sub(6)?;
            sign(at + 3, ":").filter(|_| rest.len() == 6)?;
            let (hours, minutes) = (number(at + 1, 2)?, number(at + 4, 2)?);
            let seconds = (hours * HOUR + minutes * MINUTE) as i64;
            match sign(at, "+-")? {
                "-" => -seconds,
                _ => seconds,
            }
        }
    };
    let utc = u64::try_from(local - offset).ok()?;
    Some(utc * 1000 + ms)
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
