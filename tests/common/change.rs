//! Rollback, other sizes, and snapshots of two disks at one instant.

use super::{Attempt, Model, World, with_all};
use forkdisk::disk::{CowDisk, Disk};
use forkdisk::error::{Kind, Result};
use forkdisk::layer::volatile;
use forkdisk::store::{Member, Store};
use std::sync::Arc;

/// The same contents with another size: what is added is zeros.
fn sized(contents: &Arc<Vec<u8>>, size: u64) -> Arc<Vec<u8>> {
    let mut new = contents.to_vec();
    new.resize(size as usize, 0);
    Arc::new(new)
}

impl World {
    /// Bytes of a disk.
    pub(super) fn size_of(&self, disk: &str) -> u64 {
        self.disks
            .get(disk)
            .map_or(self.size, |m| m.now.len() as u64)
    }
    /// Changes a disk at rest while somebody has it open for reading only, who sees `then` afterwards.
    pub(super) fn beneath_readers(
        &self,
        disk: &str,
        then: &[u8],
        work: impl FnOnce(&Store, &CowDisk) -> Result<()>,
    ) -> Result<()> {
        let object = self.store.resolve(disk)?;
        let open = self.store.open_cow(&object, false)?;
        self.store
            .take_up(disk, &open, volatile::private()?, false)?;
        let done = work(&self.store, &open);
        let refused = open.write(&[1; 512], 0).map_err(|e| e.kind());
        assert_eq!(refused, Err(Kind::ReadOnly), "a reader writes to {disk}");
        self.store.lay_down(&open)?;
        done?;
        let mut seen = vec![0; then.len()];
        open.read(&mut seen, 0)?;
        assert!(seen == then, "who reads {disk} sees something else");
        Ok(())
    }
    pub(super) fn roll_back(&mut self, disk: &str, to: usize) -> Result<()> {
        let prefix = format!("{disk}@");
        let snaps: Vec<String> = self
            .frozen
            .keys()
            .filter(|n| n.starts_with(&prefix))
            .cloned()
            .collect();
        if snaps.is_empty() {
            return Ok(());
        }
        let snap = &snaps[to % snaps.len()];
        let contents = self.frozen[snap].clone();
        let name = &snap[prefix.len()..];
        // Its history ends, and the numbers of its points begin anew.
        self.points.clear();
        // Some that are open are closed for it.
        let read = to % 4 == 1 && self.open.contains_key(disk);
        if read {
            self.close(disk)?;
        }
        let open = self.open.get(disk).cloned();
        if open.is_some() {
            self.begin_flush(disk);
        }
        let attempt = Attempt::of(contents.clone());
        self.model(disk).attempted.push(attempt);
        let done = match &open {
            Some(open) => {
                self.reached.note("rollback of an open disk");
                self.store.rollback_running(open, disk, name)
            }
            None if read => {
                self.reached.note("rollback of a disk open for reading");
                let work = |store: &Store, open: &CowDisk| {
                    store.rollback_running(open, disk, name).map(drop)
                };
                self.beneath_readers(disk, &contents, work)
                    .and_then(|()| self.store.resolve(disk))
            }
            None => {
                self.reached.note("rollback at rest");
                self.store.rollback(disk, name)
            }
        };
        if let Err(e) = done {
            drop(open);
            if self.look_again(disk, &contents) {
                *self.model(disk) = Model::new(contents);
            }
            return Err(e);
        }
        *self.model(disk) = Model::new(contents);
        self.certain_names();
        Ok(())
    }
    pub(super) fn resize(&mut self, disk: &str, blocks: u64) -> Result<()> {
        let size = (1 + blocks % (self.size / 4096 + 40)) * 4096;
        let former = self.size_of(disk);
        if size == former {
            return Ok(());
        }
        if size < former {
            // Only at rest.
            self.close(disk)?;
        }
        let model = self.model(disk);
        let flushed = model.flushed.clone();
        // What was flushed, and what may have been, each with the one size or the other.
        let more: Vec<Attempt> = std::iter::once(Attempt::of(flushed.clone()))
            .chain(model.attempted.iter().cloned())
            .map(|attempt| attempt.sized(size))
            .collect();
        model.attempted.extend(more);
        if size < former {
            let cut = sized(&sized(&flushed, size), former);
            let range = size..former;
            let partly = Attempt::blurred(flushed, range, cut);
            model.attempted.push(partly);
        }
        let open = self.open.get(disk).cloned();
        let done = match &open {
            Some(open) => self.store.resize_running(open, disk, size),
            None => self.store.resize(disk, size),
        };
        if let Err(e) = done {
            drop(open);
            let grown = sized(&self.model(disk).now, size);
            if self.look_again(disk, &grown) {
                self.model(disk).now = grown;
            }
            return Err(e);
        }
        self.reached.note(if size < former {
            "shrinking"
        } else {
            "growing"
        });
        let model = self.model(disk);
        model.now = sized(&model.now, size);
        model.flushed = sized(&model.flushed, size);
        model.attempted.retain(|a| a.len() == size);
        // All of it is in the block maps.
        model.earlier = None;
        Ok(())
    }
    pub(super) fn snapshot_two(&mut self, disk: &str) -> Result<()> {
        let mut others = self.disks.keys().filter(|d| *d != disk);
        let Some(other) = others.next().cloned() else {
            return Ok(());
        };
        self.made += 1;
        let name = format!("g{}", self.made);
        let both = [other.as_str(), disk];
        for disk in both {
            let now = self.model(disk).now.clone();
            let making = (format!("{disk}@{name}"), false, now);
            self.under_way.making.push(making);
            self.begin_flush(disk);
        }
        let open = both.map(|disk| self.open.get(disk).cloned());
        let members = [0, 1].map(|i| Member {
            disk: both[i],
            name: &name,
            running: open[i].as_deref(),
        });
        self.store.snapshot_group(&members, Some("together"))?;
        for disk in both {
            let full = format!("{disk}@{name}");
            self.flushed(disk);
            let model = self.model(disk);
            model.earlier = None;
            let now = model.now.clone();
            self.under_way.making.retain(|m| m.0 != full);
            self.frozen.insert(full, now);
        }
        self.certain_names();
        self.reached.note("snapshots of two disks");
        Ok(())
    }
    /// After an operation that failed and may have been done all the same: what is to be seen of the disk now. Says whether it is open and shows `next`
    /// instead of what it did.
    fn look_again(&mut self, disk: &str, next: &Arc<Vec<u8>>) -> bool {
        if self.sim.is_off() {
            return false;
        }
        self.sim.hold_faults(true);
        let done = match self.open.get(disk).cloned() {
            // One that stopped is opened again by whoever goes on.
            Some(open) => {
                open.maintain().is_ok() && {
                    let found = with_all(&*open as &dyn Disk, |found| found.to_vec())
                        .unwrap_or_else(|e| panic!("{disk} cannot be read: {e:?}"));
                    let now = &self.disks[disk].now;
                    assert!(found == **now || found == **next, "{disk} is neither");
                    found != **now
                }
            }
            None => {
                // Where names could not be synced nothing can be opened for writing any more.
                let found = self
                    .opened(disk)
                    .and_then(|open| with_all(&*open as &dyn Disk, |found| found.to_vec()));
                if let Ok(found) = found {
                    let verdict = self.verdict(disk, &found);
                    let found = verdict.unwrap_or_else(|why| panic!("{disk} {why}"));
                    *self.model(disk) = Model::new(found);
                }
                false
            }
        };
        self.sim.hold_faults(false);
        done
    }
}
