//! Sizes as people write and read them.

use std::{fmt, str::FromStr};

/// In which units sizes are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum Units {
    /// Powers of 1024: KiB, MiB, GiB
    #[default]
    Iec,
    /// Powers of 1000: kB, MB, GB
    Si,
    /// Bytes
    B,
}

const IEC: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
const SI: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];

impl Units {
    /// `bytes` for people: one decimal below 100, none from there (`2.0 GiB`, `41.2 MiB`, `412 MiB`, `0 B`).
    pub fn show(self, bytes: u64) -> String {
        let (step, names) = match self {
            Units::Iec => (1024u128, &IEC),
            Units::Si => (1000u128, &SI),
            Units::B => return format!("{bytes} B"),
        };
        if u128::from(bytes) < step {
            return format!("{bytes} B");
        }
        let mut unit = step;
        let mut power = 1;
        loop {
            // What would be rounded up to a whole next unit is shown in that unit.
            let tenths = (u128::from(bytes) * 10 + unit / 2) / unit;
            if tenths < 1000 {
                return format!("{}.{} {}", tenths / 10, tenths % 10, names[power]);
            }
            let whole = (u128::from(bytes) + unit / 2) / unit;
            if whole < step || power + 1 == names.len() {
                return format!("{whole} {}", names[power]);
            }
            unit *= step;
            power += 1;
        }
    }
}

/// A size given on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeArg {
    /// This many bytes.
    Exactly(u64),
    /// This many bytes more than there are (`+SIZE`).
    More(u64),
}

impl SizeArg {
    /// The size in bytes, for something that now has `present` bytes; `None` where that overflows.
    pub fn apply(self, present: u64) -> Option<u64> {
        match self {
            SizeArg::Exactly(bytes) => Some(bytes),
            SizeArg::More(bytes) => present.checked_add(bytes),
        }
    }
}

impl FromStr for SizeArg {
    type Err = String;
    fn from_str(text: &str) -> Result<SizeArg, String> {
        match text.trim().strip_prefix('+') {
            Some(more) => parse_size(more).map(SizeArg::More),
            None => parse_size(text).map(SizeArg::Exactly),
        }
    }
}

impl fmt::Display for SizeArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SizeArg::Exactly(bytes) => write!(f, "{bytes}"),
            SizeArg::More(bytes) => write!(f, "+{bytes}"),
        }
    }
}

/// Reads a size: `4096`, `64k`, `10G`, `10GiB`, `1.5T`. Units count in 1024s. A fraction that is no
/// whole number of blocks is rounded up to one.
///
/// The error is a sentence for the user.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = (&text[..number_end], text[number_end..].trim_start());
    if text.is_empty() {
        return Err("a size is missing, such as 10G or 64k".into());
    }
    if text.starts_with(['-', '+']) {
        return Err("a size is not negative: write 10G, or +10G for 10 GiB more".into());
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
        return Err("this is no number: write 4096, 64k, 10G or 1.5T".into());
    }
    let shift = shift_of(unit)?;
    let too_large = || "this is more than 16 EiB".to_string();
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let bytes = u128::from(whole) << shift;
    let mut bytes = u64::try_from(bytes).map_err(|_| too_large())?;
    if !fraction.is_empty() {
        if shift == 0 {
            return Err("there is no part of a byte: write 1536, or 1.5k".into());
        }
        if fraction.len() > 15 {
            return Err("this has more digits than are of use: write 1.5T".into());
        }
        let scale = 10u128.pow(fraction.len() as u32);
        let digits: u128 = fraction.parse().map_err(|_| too_large())?;
        let part = (digits << shift).div_ceil(scale) as u64;
        bytes = bytes.checked_add(part).ok_or_else(too_large)?;
        if !(digits << shift).is_multiple_of(scale) {
            bytes = crate::units::round_up(bytes).ok_or_else(too_large)?;
        }
    }
    Ok(bytes)
}

fn shift_of(unit: &str) -> Result<u32, String> {
    const LETTERS: &str = "KMGTPE";
    let upper = unit.to_ascii_uppercase();
    if upper.is_empty() || upper == "B" {
        return Ok(0);
    }
    let (letter, rest) = upper.split_at(upper.chars().next().map_or(0, char::len_utf8));
    match (LETTERS.find(letter), rest) {
        (Some(place), "" | "I" | "IB") => Ok(10 * (place as u32 + 1)),
        (Some(_), "B") => Err(format!(
            "`{unit}` may mean 1000s or 1024s: write {letter} or {letter}iB for 1024s, or the bytes"
        )),
        _ => Err(format!(
            "`{unit}` is no unit: use k, M, G, T (1024s), or nothing for bytes"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64k", 65536),
            ("64K", 65536),
            ("64KiB", 65536),
            ("64ki", 65536),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("1.5T", 3 << 39),
            ("0.5k", 512),
            ("1.50G", 3 << 29),
            (" 1M ", 1 << 20),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
            // 0.3 GiB is 322122547.2 bytes: up to the next block.
            ("0.3G", 322_125_824),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            " ",
            "G",
            "-1",
            "-1G",
            "+",
            "1..5G",
            "1.5.5G",
            ".5G",
            "1.G",
            "1.5",
            "1.5B",
            "10GB",
            "10X",
            "10Q",
            "ten",
            "1e9",
            "0x10",
            "16E",
            "18446744073709551616",
            "10G10",
            "10 G 5",
            "١٠G",
            "10µ",
            "1.0000000000000001G",
            "1_000",
        ] {
            let error = parse_size(text).expect_err(text);
            assert!(error.len() > 10 && !error.ends_with('.'), "{text}: {error}");
        }
    }

    #[test]
    fn a_plus_means_more() {
        assert_eq!("+10G".parse(), Ok(SizeArg::More(10 << 30)));
        assert_eq!("10G".parse(), Ok(SizeArg::Exactly(10 << 30)));
        assert!("++1".parse::<SizeArg>().is_err());
        assert_eq!(SizeArg::More(5).apply(7), Some(12));
        assert_eq!(SizeArg::More(5).apply(u64::MAX), None);
        assert_eq!(SizeArg::Exactly(5).apply(7), Some(5));
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, iec, si) in [
            (0, "0 B", "0 B"),
            (1, "1 B", "1 B"),
            (999, "999 B", "999 B"),
            (1000, "1000 B", "1.0 kB"),
            (1023, "1023 B", "1.0 kB"),
            (1024, "1.0 KiB", "1.0 kB"),
            (4096, "4.0 KiB", "4.1 kB"),
            (102_348, "99.9 KiB", "102 kB"),
            (102_399, "100 KiB", "102 kB"),
            (1_048_575, "1.0 MiB", "1.0 MB"),
            (1_047_000, "1022 KiB", "1.0 MB"),
            (43_200_000, "41.2 MiB", "43.2 MB"),
            (2 << 30, "2.0 GiB", "2.1 GB"),
            (u64::MAX, "16.0 EiB", "18.4 EB"),
        ] {
            assert_eq!(Units::Iec.show(bytes), iec, "{bytes}");
            assert_eq!(Units::Si.show(bytes), si, "{bytes}");
            assert_eq!(Units::B.show(bytes), format!("{bytes} B"));
        }
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        for bytes in [0, 1, 512, 4096, 3 << 19, 2 << 30, 5 << 40] {
            assert_eq!(parse_size(&Units::Iec.show(bytes)), Ok(bytes));
            assert_eq!(parse_size(&Units::B.show(bytes)), Ok(bytes));
        }
    }
}
