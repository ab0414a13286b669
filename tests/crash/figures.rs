//! Counts what was tried.

use crate::common::Reached;
use forkdisk::io::sim::{Harm, SimDisk};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::time::Duration;

#[derive(Default)]
struct Counts {
    named: BTreeMap<&'static str, u64>,
    harm: Harm,
    reached: Reached,
}

/// The figures of a campaign; many threads add to them.
#[derive(Default)]
pub struct Figures(Mutex<Counts>);

pub const HISTORIES: &str = "histories";
pub const POINTS: &str = "crash points";
pub const SHAPES: &str = "shapes opened";
pub const AGAIN: &str = "recoveries cut again";
pub const ROTTEN: &str = "shapes with rot";
pub const FAILING: &str = "works with failing calls";

impl Figures {
    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        // A test that failed while it counted has counted something wrong at the most.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
    pub fn count(&self, what: &'static str) {
        *self.counts().named.entry(what).or_default() += 1;
    }
    pub fn harm(&self, sim: &SimDisk) {
        let harm = sim.harm();
        self.counts().harm.add(&harm);
    }
    pub fn reached(&self, reached: &Reached) {
        self.counts().reached.add(reached);
    }
    pub fn of(&self, what: &str) -> u64 {
        self.counts().named.get(what).copied().unwrap_or(0)
    }
    pub fn times_reached(&self, what: &str) -> u64 {
        self.counts().reached.0.get(what).copied().unwrap_or(0)
    }
    pub fn times_harmed(&self, what: &str) -> u64 {
        self.counts().harm.of(what)
    }
    /// For people.
    pub fn text(&self, took: Duration) -> String {
        let counts = self.counts();
        let mut text = String::new();
        let mut line = |what: &str, n: u64| {
            let _ = writeln!(text, "{n:>12}  {what}");
        };
        for (what, n) in &counts.named {
            line(what, *n);
        }
        line("seconds", took.as_secs());
        for (what, n) in counts.harm.iter() {
            line(&format!("faults: {what}"), n);
        }
        for (what, n) in &counts.reached.0 {
            line(&format!("reached: {what}"), *n);
        }
        text
    }
    /// For programs.
    pub fn json(&self, took: Duration, passed: bool) -> String {
        let counts = self.counts();
        let mut all = serde_json::Map::new();
        let key = |what: &str| what.replace([' ', '-'], "_");
        all.insert("schema".into(), 1.into());
        all.insert("passed".into(), passed.into());
        all.insert("seconds".into(), took.as_secs_f64().into());
        for (what, n) in &counts.named {
            all.insert(key(what), (*n).into());
        }
        let faults: serde_json::Map<_, _> = counts
            .harm
            .iter()
            .map(|(what, n)| (key(what), n.into()))
            .collect();
        let reached: serde_json::Map<_, _> = counts
            .reached
            .0
            .iter()
            .map(|(what, n)| (key(what), (*n).into()))
            .collect();
        all.insert("faults".into(), faults.into());
        all.insert("reached".into(), reached.into());
        serde_json::Value::from(all).to_string()
    }
}
