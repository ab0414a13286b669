//! Going on after calls that failed: what may be there is followed as exactly as it can be known.

use super::{Attempt, Op, World, with_all};
use forkdisk::disk::Disk;
use forkdisk::error::Kind;
use std::sync::Arc;

/// How an operation on a failing disk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    Well,
    /// It failed, and the work can go on.
    Failed,
    /// Names could not be synced: the filesystem takes no more changes until it is mounted again (FORMAT.md, A4).
    Stopped,
}

impl World {
    /// Does `op` although calls may fail. A panic where an error has no reason, or what is found afterwards is not what it may be.
    pub fn run_failing(&mut self, op: &Op) -> Ended {
        let before = self.sim.harm();
        let target = self.target(op);
        let old = target
            .as_ref()
            .map(|(name, _)| self.model(name).now.clone());
        let done = self.run(op);
        if let Err(e) = &done {
            self.sim.note(&format!("{op}: {e}"));
        }
        let harm = self.sim.harm();
        let more = |what: &str| harm.of(what) > before.of(what);
        let struck = harm != before;
        self.doubt |= more("syncs failed");
        // A write that met a full disk makes room first, with a flush of what there is.
        let by_itself = match (&target, &old) {
            (Some((_, range)), Some(old)) if struck => {
                let new = self.intended(op, old);
                Some(Attempt::blurred(old.clone(), range.clone(), new))
            }
            _ => None,
        };
        if self.sim.is_off() {
            if let (Some((name, _)), Some(attempt)) = (&target, by_itself) {
                self.model(name).attempted.push(attempt);
            }
            return match more("syncs of names failed") {
                true => Ended::Stopped,
                false => Ended::Failed,
            };
        }
        if let Err(e) = &done {
            let reason = struck || e.kind() == Kind::Poisoned;
            assert!(reason, "{op}: nothing failed below, and yet: {e:?}");
        }
        if more("syncs of names failed") {
            self.sim.hold_faults(true);
            self.look_at_names();
            self.sim.hold_faults(false);
            return Ended::Stopped;
        }
        if !struck && done.is_ok() {
            return Ended::Well;
        }
        self.sim.hold_faults(true);
        if let (Some((name, _)), Some(attempt)) = (&target, by_itself) {
            if let Some(open) = self.open.get(name).cloned()
                && done.is_err()
                && open.maintain().is_ok()
            {
                let found = with_all(&*open, |found| found.to_vec())
                    .unwrap_or_else(|e| panic!("{op} failed, and {name} cannot be read: {e:?}"));
                assert!(
                    attempt.matches(&found),
                    "{op} failed, and changed more than it should have: {name}"
                );
                self.model(name).now = Arc::new(found);
            }
            self.model(name).attempted.push(attempt);
        }
        if done.is_err() {
            self.look_at_names();
        }
        self.bring_back();
        self.sim.hold_faults(false);
        match done {
            Ok(()) => Ended::Well,
            Err(_) => Ended::Failed,
        }
    }
    /// The disk and the range that an operation changes.
    fn target(&self, op: &Op) -> Option<(String, std::ops::Range<u64>)> {
        let (Op::Write { disk, at, len, .. } | Op::Discard { disk, at, len }) = op else {
            return None;
        };
        let disk = self.pick_disk(*disk)?;
        let size = self.size_of(&disk);
        let at = at % size;
        Some((disk, at..at + (*len).min(size - at)))
    }
    /// What the disk would hold if it had gone well.
    fn intended(&self, op: &Op, old: &Arc<Vec<u8>>) -> Arc<Vec<u8>> {
        let mut new = old.to_vec();
        if let Some((_, range)) = self.target(op) {
            let place = &mut new[range.start as usize..range.end as usize];
            match op {
                Op::Write { seed, .. } => {
                    place.copy_from_slice(&super::data(*seed, range.end - range.start));
                }
                _ => place.fill(0),
            }
        }
        Arc::new(new)
    }
    /// Opens again the disks that stopped after an error.
    fn bring_back(&mut self) {
        for name in self.open.keys().cloned().collect::<Vec<_>>() {
            if self.open[&name].maintain().is_ok() {
                continue;
            }
            self.open.remove(&name);
            let disk = self
                .opened(&name)
                .unwrap_or_else(|e| panic!("{name} stopped, and does not come back: {e:?}"));
            let verdict = with_all(&*disk as &dyn Disk, |found| self.verdict(&name, found))
                .unwrap_or_else(|e| panic!("{name} came back, and cannot be read: {e:?}"));
            let found = verdict.unwrap_or_else(|why| panic!("{name} came back, and {why}"));
            *self.model(&name) = super::Model::new(found);
            self.reached.note("stopped and opened again");
        }
    }
}
