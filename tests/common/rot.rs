//! Rot: a bit or a sector of what a crash left is not what it was. What is found is right, or refused.

use super::{Rng, World, audit, header_of, with_all};
use forkdisk::error::{Error, Kind, Result};
use forkdisk::io::sim::SimDisk;
use forkdisk::store::{Below, Object, ObjectKind};
use std::collections::BTreeMap;

const SECTOR: u64 = 512;

impl World {
    /// Lets something rot in what a crash left. Each name must then hold what it may hold, or be refused as damaged, and refused only if
    /// the rot is in what it needs.
    pub fn check_rotten(&self, sim: &SimDisk, seed: u64, story: &str) {
        let mut rng = Rng(seed);
        let sound = |e: Error| -> ! { panic!("{story}: before anything rots: {e:?}") };
        let before = World::on(
            sim.clone(),
            seed,
            self.size,
            BTreeMap::new(),
            BTreeMap::new(),
            self.made + 100,
        )
        .unwrap_or_else(|e| sound(e));
        let objects = before.store.list().unwrap_or_else(|e| sound(e));
        let needs: Vec<Vec<String>> = objects.iter().map(|o| needs(sim, o)).collect();
        drop(before);
        let Some((path, what)) = rot(sim, &mut rng) else {
            return;
        };
        let story = format!("{story} ({what})");
        let world = World::on(
            sim.clone(),
            seed ^ 1,
            self.size,
            BTreeMap::new(),
            BTreeMap::new(),
            self.made + 200,
        );
        let world = match world {
            Ok(world) => world,
            Err(e) => {
                // A version is looked at before the checksum: what a newer one writes need not look sound to this one.
                let refused = matches!(e.kind(), Kind::Corrupt | Kind::Version);
                assert!(refused && path == "forkdisk.toml", "{story}: {e:?}");
                return;
            }
        };
        for (object, needs) in objects.iter().zip(needs) {
            let name = &object.name;
            let known = self.known_as(name);
            for writable in [false, true] {
                if writable && object.kind != ObjectKind::Disk {
                    continue;
                }
                let verdict = world
                    .store
                    .resolve(name)
                    .and_then(|object| world.store.open_disk(&object, writable))
                    .and_then(|disk| with_all(&*disk, |found| self.rotten_verdict(&known, found)));
                match verdict {
                    Ok(Ok(())) => {}
                    Ok(Err(why)) => panic!("{story}: {name} (writable: {writable}) {why}"),
                    Err(e) => {
                        assert_eq!(e.kind(), Kind::Corrupt, "{story}: {name}: {e:?}");
                        assert!(
                            needs.contains(&path),
                            "{story}: {name} does not need that, and yet: {e:?}"
                        );
                    }
                }
            }
        }
    }
    /// The name that the model has for what is called so on the disk.
    fn known_as(&self, name: &str) -> String {
        let there = self.disks.contains_key(name) || self.frozen.contains_key(name);
        let pair = |(old, new): &(String, String)| match () {
            () if old == name => Some(new.clone()),
            () if new == name => Some(old.clone()),
            () => None,
        };
        match self.under_way.moving.iter().find_map(pair) {
            Some(other) if !there => other,
            _ => name.to_string(),
        }
    }
    fn rotten_verdict(&self, name: &str, found: &[u8]) -> std::result::Result<(), String> {
        let earlier = self.disks.get(name).and_then(|m| m.earlier.as_ref());
        match self.verdict(name, found) {
            Err(_) if earlier.is_some_and(|e| found == &e[..]) => Ok(()),
            verdict => verdict.map(|_| ()),
        }
    }
}

/// The files that an object needs.
fn needs(sim: &SimDisk, object: &Object) -> Vec<String> {
    let mut files = vec![
        "forkdisk.toml".to_string(),
        format!("names/{}", object.name),
    ];
    let mut at = match object.kind {
        ObjectKind::Base => Below::Base(object.id),
        _ => Below::Layer(object.id),
    };
    loop {
        match at {
            Below::Base(id) => {
                files.extend(["image", "meta", "sums"].map(|f| format!("bases/{id}/{f}")));
                return files;
            }
            Below::Layer(id) => {
                let path = format!("layers/{id}.layer");
                let header = below(sim, &path).unwrap_or_else(|e| panic!("{path}: {e:?}"));
                files.push(path);
                at = header;
            }
        }
    }
}

fn below(sim: &SimDisk, path: &str) -> Result<Below> {
    Ok(forkdisk::store::parent_of(&header_of(
        &sim.read_file(path)?,
    )?))
}

/// Lets something rot that is not zeros; tells where and what.
fn rot(sim: &SimDisk, rng: &mut Rng) -> Option<(String, String)> {
    let files = sim.file_names();
    let layers: Vec<&String> = files.iter().filter(|f| f.ends_with(".layer")).collect();
    let path = match rng.below(4) {
        0 => &files[rng.below(files.len() as u64) as usize],
        _ => *layers.get(rng.below(layers.len().max(1) as u64) as usize)?,
    };
    let bytes = sim.read_file(path).ok()?;
    let used: Vec<u64> = bytes
        .chunks(SECTOR as usize)
        .enumerate()
        .filter(|(_, sector)| sector.iter().any(|b| *b != 0))
        .map(|(i, _)| i as u64)
        .collect();
    if used.is_empty() {
        return None;
    }
    // Half of the time in the front: header, superblocks, journal.
    let front = used.partition_point(|s| *s < 1024 * 8).max(1);
    let among = if rng.below(2) == 0 { front } else { used.len() };
    let mut sector = used[rng.below(among as u64) as usize];
    // And sometimes in a block map: few sectors, on which all depends.
    let superblock = audit::superblock(&bytes);
    let runs = superblock.as_ref().map_or(&[][..], |s| s.run_refs());
    let in_runs = used.iter().copied().filter(|s| {
        let slot = s / 8;
        runs.iter().any(|r| {
            let start = u64::from(r.slot.get());
            (start..start + u64::from(r.slots.get())).contains(&slot)
        })
    });
    let in_runs: Vec<u64> = in_runs.collect();
    if !in_runs.is_empty() && rng.below(2) == 0 {
        sector = in_runs[rng.below(in_runs.len() as u64) as usize];
    }
    let (at, len) = (
        sector * SECTOR,
        SECTOR.min(bytes.len() as u64 - sector * SECTOR),
    );
    let what = match rng.below(4) {
        0 => {
            let zeros = vec![0; len as usize];
            sim.overwrite(path, at, &zeros).expect("overwrite");
            "zeros in"
        }
        1 => {
            let garbage: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
            sim.overwrite(path, at, &garbage).expect("overwrite");
            "garbage in"
        }
        _ => {
            let place = at + rng.below(len);
            sim.flip(path, place, 1 << rng.below(8)).expect("flip");
            "a flipped bit in"
        }
    };
    Some((path.clone(), format!("{what} sector {sector} of {path}")))
}
