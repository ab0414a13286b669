//! Text records: `key = "value"` lines with a CRC in the last one (FORMAT.md, section 2).

use super::crc;
use crate::error::{Error, Kind, Result};

/// Longest record that is read.
pub const MAX_RECORD: u64 = 64 * 1024;

/// A text record: keys and values in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record(Vec<(String, String)>);

impl Record {
    /// An empty record.
    pub fn new() -> Record {
        Record::default()
    }
    /// Adds a line.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Record {
        self.0.push((key.to_string(), value.into()));
        self
    }
    /// Adds a line if there is a value.
    #[must_use]
    pub fn with_some(self, key: &str, value: Option<impl Into<String>>) -> Record {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }
    /// Adds all of these lines.
    #[must_use]
    pub fn with_all<'a>(self, lines: impl IntoIterator<Item = (&'a String, &'a String)>) -> Record {
        lines
            .into_iter()
            .fold(self, |record, (key, value)| record.with(key, value))
    }
    /// All lines but the checksum's, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }
    /// The value of `key`, or an error that names it.
    pub fn need(&self, key: &str) -> Result<&str> {
        self.get(key)
            .ok_or_else(|| Error::new(Kind::Corrupt, format!("the record has no `{key}`")))
    }
    /// The value of `key` as a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        self.need(key)?
            .parse()
            .map_err(|_| Error::new(Kind::Corrupt, format!("`{key}` of the record is no number")))
    }
    /// The number after `key` in what may be no sound record: for the version, which tells how to read the rest.
    pub fn peek_number(bytes: &[u8], key: &str) -> Option<u64> {
        let text = String::from_utf8_lossy(bytes);
        let value = text.lines().find_map(|line| {
            let (found, value) = line.split_once('=')?;
            (found.trim() == key).then(|| value.trim().trim_matches('"').to_string())
        })?;
        value.parse().ok()
    }
    /// The bytes that stand on disk.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = String::new();
        for (key, value) in &self.0 {
            text.push_str(key);
            text.push_str(" = \"");
            for c in value.chars() {
                match c {
                    '\\' => text.push_str("\\\\"),
                    '"' => text.push_str("\\\""),
                    '\n' => text.push_str("\\n"),
                    c if c.is_control() => text.push_str(&format!("\\x{:02X}", c as u32)),
                    c => text.push(c),
                }
            }
            text.push_str("\"\n");
        }
        let sum = crc(text.as_bytes());
        text.push_str(&format!("crc32 = \"{sum:08x}\"\n"));
        text.into_bytes()
    }
    /// Reads what [`Record::encode`] wrote; any changed byte is an error.
    pub fn decode(bytes: &[u8]) -> Result<Record> {
        let bad =
            |what: &str| Error::new(Kind::Corrupt, format!("not a sound text record: {what}"));
        let text = std::str::from_utf8(bytes).map_err(|_| bad("it is not UTF-8"))?;
        let body_len = text
            .strip_suffix('\n')
            .and_then(|t| t.rfind('\n').map(|at| at + 1))
            .ok_or_else(|| bad("it is cut"))?;
        let (body, last) = text.split_at(body_len);
        if last != format!("crc32 = \"{:08x}\"\n", crc(body.as_bytes())) {
            return Err(bad("checksum mismatch"));
        }
        let mut record = Record::new();
        for line in body.lines() {
            let (key, quoted) = line
                .split_once(" = ")
                .ok_or_else(|| bad("a line has no ` = `"))?;
            let inner = quoted
                .strip_prefix('"')
                .and_then(|q| q.strip_suffix('"'))
                .ok_or_else(|| bad("a value is not quoted"))?;
            record.0.push((
                key.to_string(),
                unescape(inner).ok_or_else(|| bad("a bad escape"))?,
            ));
        }
        Ok(record)
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next()? {
            '\\' => out.push('\\'),
            '"' => out.push('"'),
            'n' => out.push('\n'),
            'x' => {
                let hi = chars.next()?.to_digit(16)?;
                let lo = chars.next()?.to_digit(16)?;
                out.push(char::from_u32(hi << 4 | lo)?);
            }
            _ => return None,
        }
    }
    Some(out)
}
