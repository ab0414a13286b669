//! The past of disks: `rewind`, and the options that speak of it.

use crate::{
    cli::{
        Outcome,
        context::Context,
        render::{size::parse_size, time},
        store::counted,
    },
    error::{Kind, Result},
    store::history::{At, Limits, Rewound, too_many},
    sys::signals,
};
use clap::Args;
use serde::Serialize;
use std::str::FromStr;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// How much of its past a disk keeps: `10m`, `2G`, `10m,2G`; `none`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HistoryArg(pub Option<Limits>);

impl FromStr for HistoryArg {
    type Err = String;
    fn from_str(text: &str) -> Result<HistoryArg, String> {
        if text == "none" {
            return Ok(HistoryArg(None));
        }
        let mut limits = Limits::default();
        for part in text.split(',') {
            let part = part.trim();
            let known = match span(part) {
                Some(seconds) => limits.window.replace(seconds),
                None => limits.bytes.replace(parse_size(part).map_err(|e| {
                    format!("{e}; a history is so long (10m, 2h, 1d) or so large (2G) at most")
                })?),
            };
            if known.is_some() {
                return Err("write one length of time and one size at most: 10m,2G".into());
            }
        }
        limits.check().map_err(|e| e.to_string())?;
        Ok(HistoryArg(Some(limits)))
    }
}

/// Seconds of `90s`, `10m`, `2h`, `1d`, and of several in a row: `1h30m`.
fn span(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let unit = match rest[end..].chars().next()? {
            's' => 1,
            'm' => MINUTE,
            'h' => HOUR,
            'd' => DAY,
            _ => return None,
        };
        let number: u64 = rest[..end].parse().ok()?;
        total = total.checked_add(number.checked_mul(unit)?)?;
        rest = &rest[end + 1..];
    }
    (!text.is_empty()).then_some(total)
}

/// Milliseconds of `12` or `12.345` seconds; of further digits nothing is told.
fn in_ms(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let plain = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !plain(whole) || !plain(fraction) {
        return None;
    }
    let ms: String = fraction.chars().chain("00".chars()).take(3).collect();
    let whole = whole.parse::<u64>().ok()?.checked_mul(1000)?;
    whole.checked_add(ms.parse().ok()?)
}

/// Milliseconds of what [`span`] reads, of which the seconds may have a fraction: `1.5s`, `1m0.25s`.
fn span_ms(text: &str) -> Option<u64> {
    let Some((_, fraction)) = text.split_once('.') else {
        return span(text)?.checked_mul(1000);
    };
    fraction.strip_suffix('s')?;
    let seconds = text.rfind(['d', 'h', 'm']).map_or(0, |at| at + 1);
    let before = match seconds {
        0 => 0,
        at => span(&text[..at])?.checked_mul(1000)?,
    };
    before.checked_add(in_ms(&text[seconds..text.len() - 1])?)
}

/// A point of a history: `-90s`, `2026-11-27T23:10:00Z`, seconds since 1970, `#N`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TimeArg {
    /// So many milliseconds ago.
    Ago(u64),
    /// This point.
    Is(At),
}

impl TimeArg {
    pub(crate) fn at(self) -> At {
        match self {
            TimeArg::Ago(ms) => At::Time(time::now_ms().saturating_sub(ms)),
            TimeArg::Is(at) => at,
        }
    }
}

impl FromStr for TimeArg {
    type Err = String;
    fn from_str(text: &str) -> Result<TimeArg, String> {
        let text = text.trim();
        let found = if let Some(number) = text.strip_prefix('#') {
            number.parse().ok().map(|n| TimeArg::Is(At::Number(n)))
        } else if let Some(past) = text.strip_prefix('-') {
            span_ms(past).map(TimeArg::Ago)
        } else if text.contains('T') || text.contains(' ') || text.contains('t') {
            time::parse_rfc3339(text).map(|ms| TimeArg::Is(At::Time(ms)))
        } else {
            let ms = match text.contains('.') {
                true => in_ms(text),
                // All of that second.
                false => in_ms(text).and_then(|ms| ms.checked_add(999)),
            };
            ms.map(|ms| TimeArg::Is(At::Time(ms)))
        };
        found.ok_or_else(|| {
            "write how long ago (-90s, -1.5s, -2h), a time (2026-11-27T23:10:00Z, seconds since 1970), or a point (#12)".into()
        })
    }
}

/// Milliseconds since 1970 as a second, and how long ago that was.
pub(crate) fn when(ms: u64) -> String {
    let (then, now) = (ms / 1000, time::now());
    match now.checked_sub(then) {
        _ if ms == 0 => String::new(),
        Some(passed) => format!("{} ({} ago)", time::date_time(then), time::span(passed)),
        None => time::date_time(then),
    }
}

/// Make a disk what it was at a point of its history
#[derive(Args, Debug)]
#[command(
    after_help = "The disk may be attached, but not mounted or in use. What is undone is a point of the history, too: it can be undone.\n\
        `forkdisk create NEW --from DISK --at TIME` leaves the disk as it is."
)]
pub(crate) struct Rewind {
    /// The disk
    disk: String,
    /// The point: -90s, -2h, 2026-11-27T23:10:00Z, seconds since 1970, or #N; a time means the last flush before it
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    at: TimeArg,
}

#[derive(Serialize)]
struct RewindDoc {
    dry_run: bool,
    name: String,
    point: u64,
    time: u64,
    time_ms: u64,
    blocks: u64,
    undoable: bool,
}

impl Rewind {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open_to_change()?;
        let name = store.resolve(&self.disk)?.name;
        // The same instant in all that follows.
        let at = self.at.at();
        let mut attached = context.daemon_of(&store, &name)?;
        let plan = match attached {
            None => store.look_back(&name, at)?,
            Some(_) => store.look_back_busy(&name, at)?,
        };
        let exact = At::Number(plan.point.number);
        let done = if context.dry_run {
            if let Some((daemon, a)) = &mut attached {
                daemon.hold_unused(a)?;
                if !plan.undoable {
                    return Err(too_many(&name).into());
                }
            }
            plan
        } else {
            if !plan.undoable && attached.is_none() {
                ui.confirm(
                    &format!(
                        "{} have changed since, too many to take back in one step: the history of {name} begins anew.\n",
                        counted(plan.blocks as usize, "block")
                    ),
                    "Go back all the same?",
                )?;
            }
            match &mut attached {
                Some((daemon, a)) => {
                    daemon
                        .rewind(a, plan.point.number)
                        .map_err(|e| match e.kind() {
                            Kind::Busy => e.context(format!("cannot take {name} back")),
                            _ => e,
                        })?
                }
                None => {
                    signals::catch();
                    let progress = ui.progress(&format!("rewinding {name}"));
                    store.rewind(&name, exact, &*progress)?
                }
            }
        };
        let Rewound {
            point,
            blocks,
            undoable,
        } = done;
        if ui.json {
            return ui.document(RewindDoc {
                dry_run: context.dry_run,
                name,
                point: point.number,
                time: point.time / 1000,
                time_ms: point.time,
                blocks,
                undoable,
            });
        }
        let what = format!(
            "{name} to #{}, {}: {}",
            point.number,
            when(point.time),
            counted(blocks as usize, "block")
        );
        if context.dry_run {
            return ui.data(format!("would rewind {what}\n"));
        }
        ui.talk(format_args!("rewound {what}"));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_histories_are_read() {
        let limits = |window, bytes| Ok(HistoryArg(Some(Limits { window, bytes })));
        for (text, expected) in [
            ("10m", limits(Some(600), None)),
            ("90s", limits(Some(90), None)),
            ("1h30m", limits(Some(5400), None)),
            ("2d", limits(Some(172_800), None)),
            ("2G", limits(None, Some(2 << 30))),
            ("10m,2G", limits(Some(600), Some(2 << 30))),
            ("2G, 10m", limits(Some(600), Some(2 << 30))),
            ("none", Ok(HistoryArg(None))),
        ] {
            assert_eq!(text.parse(), expected, "{text}");
        }
        for bad in [
            "",
            "10m,5m",
            "2G,3G",
            "0s",
            "0",
            "m",
            "-5m",
            "ten",
            "10m,",
            "99999999999d",
        ] {
            assert!(bad.parse::<HistoryArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_read() {
        let at = |ms| Ok(TimeArg::Is(At::Time(ms)));
        for (text, expected) in [
            ("-90s", Ok(TimeArg::Ago(90_000))),
            ("-1h30m", Ok(TimeArg::Ago(5_400_000))),
            ("-1.5s", Ok(TimeArg::Ago(1500))),
            ("-0.0129s", Ok(TimeArg::Ago(12))),
            ("-1m0.25s", Ok(TimeArg::Ago(60_250))),
            ("1700000000.25", at(1_700_000_000_250)),
            ("#12", Ok(TimeArg::Is(At::Number(12)))),
            // All of that second.
            ("1700000000", at(1_700_000_000_999)),
            ("1970-01-02T00:00:01Z", at(86_401_999)),
            ("1970-01-02t01:00:01.25+01:00", at(86_401_250)),
            ("2000-02-29 12:34:56Z", at(951_827_696_999)),
        ] {
            assert_eq!(text.parse::<TimeArg>(), expected, "{text}");
        }
        for bad in [
            "",
            "#",
            "#x",
            "-",
            "-5",
            "-1.5",
            "-1.5m",
            "-.5s",
            "-1.s",
            "-1.5s3m",
            "-1.5.5s",
            "-1.+5s",
            "1700000000.",
            "1700000000.x",
            "18446744073709551615",
            "5m",
            "yesterday",
            "2026-13-01T00:00:00Z",
            "2026-11-27",
            "2026-02-30T00:00:00Z",
        ] {
            assert!(bad.parse::<TimeArg>().is_err(), "{bad}");
        }
    }
}
