//! The books of the imaginary disk: what was done to whom, for the figures of a test.

use super::Verb;
use std::collections::BTreeMap;

/// How often what was done. Counts of a crash are found on the disk that it left.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Harm(BTreeMap<&'static str, u64>);

impl Harm {
    pub(super) const POWER_CUTS: &'static str = "power cuts";
    pub(super) const KILLS: &'static str = "processes killed";
    pub(super) const DONE: &'static str = "un-synced writes done";
    pub(super) const DROPPED: &'static str = "un-synced writes dropped";
    pub(super) const TORN: &'static str = "un-synced writes torn";
    pub(super) const GARBAGE: &'static str = "sectors with garbage";
    pub(super) const LENGTHS: &'static str = "lengths lost or cut";
    pub(super) const HOLES: &'static str = "holes and reservations lost or cut";
    pub(super) const NAMES: &'static str = "changes of names lost";
    pub(super) const FULL: &'static str = "disk found full";
    pub(super) const ROT: &'static str = "rot";

    pub(super) fn count(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }
    pub(super) fn struck(&mut self, verb: Verb, errno: i32) {
        self.count(match (verb, errno) {
            (Verb::Sync, _) => "syncs failed",
            (Verb::SyncDir | Verb::SyncFilesystem, _) => "syncs of names failed",
            (_, libc::ENOSPC) => "ENOSPC",
            (_, libc::EIO) => "EIO",
            _ => "not supported",
        });
    }
    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Harm) {
        for (what, n) in &other.0 {
            *self.0.entry(what).or_default() += n;
        }
    }
    /// What was done, and how often, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.0.iter().map(|(what, n)| (*what, *n))
    }
    /// How often this was done.
    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
    /// All in all.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}
