//! What a byte of the user costs on the host: bytes allocated, bytes written.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Level, Sizes,
        book::{Better, Book, Must, Reading},
        peers::{Direct, Numbers, Peer, PeerKind, sector},
        sharing::traffic,
        speed::settle,
        work,
    },
    error::Result,
};
use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

/// One way to write.
#[derive(Clone, Copy)]
struct Pattern {
    len: u64,
    random: bool,
    /// Flush after every write.
    sync: bool,
}

impl Pattern {
    fn id(self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let sync = if self.sync { ".sync" } else { "" };
        format!("{}.{order}{sync}", self.len)
    }
    fn title(self) -> String {
        let size = match self.len {
            512 => "512 B",
            4096 => "4 KiB",
            _ => "64 KiB",
        };
        let order = if self.random { "random" } else { "sequential" };
        let sync = if self.sync {
            "flushed one by one"
        } else {
            "flushed at the end"
        };
        format!("{size} {order}, {sync}")
    }
    /// How many writes: enough for the fixed part to be small, few enough to take no minute.
    fn count(self, size: &Sizes) -> u64 {
        let most = u64::from(size.writes) * 4096 / self.len.max(4096)
            * if self.len > 4096 { 2 } else { 1 };
        let count = if self.sync { most / 10 } else { most };
        count.clamp(4, size.shared / self.len / 4)
    }
    fn must(self, what: &str) -> Option<Must> {
        if !self.random || self.sync {
            return None;
        }
        match (self.len, what) {
            (4096, "allocated") => Some(Must::AtMost(1.02)),
            (4096, _) => Some(Must::AtMost(1.05)),
            (512, "allocated") => Some(Must::AtMost(8.2)),
            (512, _) => Some(Must::AtMost(8.5)),
            _ => None,
        }
    }
}

/// The rows of amplification. `device` is below everything that has no filesystem of its own.
pub fn jobs<'a>(size: &Sizes, book: &mut Book, device: &Path) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for len in [4096, 512, 65536] {
        for (random, sync) in [(true, false), (false, false), (true, true), (false, true)] {
            let pattern = Pattern { len, random, sync };
            // In short, those that something must be reached in, and one that is flushed.
            if size.level == Level::Quick
                && pattern.must("written").is_none()
                && !(len == 4096 && random)
            {
                continue;
            }
            jobs.push(job(pattern, size, book, device));
        }
    }
    jobs
}

fn job<'a>(pattern: Pattern, size: &Sizes, book: &mut Book, device: &Path) -> Job<'a> {
    let (id, title) = (pattern.id(), pattern.title());
    for what in ["allocated", "written"] {
        book.row(
            Group::Amplification,
            &format!("{what}.{id}"),
            &format!("{what}: {title}"),
            "x",
            Better::Lower,
            pattern.must(what),
        );
    }
    let host = device.to_path_buf();
    let count = pattern.count(size);
    Job {
        name: title,
        rounds: 1,
        peers: PeerKind::is_block,
        measure: Box::new(move |lab, peer, gauge, _| {
            measure(lab, peer, gauge, pattern, count, &host)
        }),
    }
}

fn measure(
    lab: &Lab<'_>,
    peer: &mut Peer,
    gauge: &mut Gauge,
    pattern: Pattern,
    count: u64,
    host: &Path,
) -> Result<Vec<Reading>> {
    let host: PathBuf = peer.below().unwrap_or(host).to_path_buf();
    let name = "amplified";
    peer.fork(lab.work, None, name)?;
    let device = peer.attach(lab.work, name)?;
    if sector(&device) > pattern.len {
        peer.remove(lab.work, name)?;
        return Ok(Vec::new());
    }
    let mut numbers = Numbers::new(count);
    let places = places(pattern, count, lab.size.shared, &mut numbers);
    settle(peer.home());
    let used_before = work::space(peer.home())?.1;
    let before = traffic(&host)?.1;
    gauge.during(|| {
        let mut open = Direct::open(&device)?;
        for &at in &places {
            open.write(&mut numbers, at, pattern.len as usize)?;
            if pattern.sync {
                open.flush()?;
            }
        }
        open.flush()
    })?;
    // What is written when the disk goes belongs to it.
    peer.detach(lab.work, name)?;
    settle(peer.home());
    let written = traffic(&host)?.1 - before;
    let used = work::space(peer.home())?.1.saturating_sub(used_before);
    // Raw was copied once and is used again.
    if peer.kind != PeerKind::Raw {
        peer.remove(lab.work, name)?;
        settle(peer.home());
    }
    let user = (count * pattern.len) as f64;
    let id = pattern.id();
    let mut readings = vec![Reading::of(format!("written.{id}"), written as f64 / user)];
    if peer.kind != PeerKind::Raw {
        readings.push(Reading::of(format!("allocated.{id}"), used as f64 / user));
    }
    Ok(readings)
}

/// Where is written: no place twice.
fn places(pattern: Pattern, count: u64, size: u64, numbers: &mut Numbers) -> Vec<u64> {
    if !pattern.random {
        return (0..count).map(|i| i * pattern.len).collect();
    }
    let mut seen = HashSet::new();
    let mut places = Vec::new();
    while (places.len() as u64) < count {
        let at = numbers.draw() % (size / pattern.len) * pattern.len;
        if seen.insert(at) {
            places.push(at);
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_place_is_written_twice_and_all_lie_inside() {
        let sizes = Level::Tiny.sizes();
        for len in [512, 4096, 65536] {
            for random in [true, false] {
                let pattern = Pattern {
                    len,
                    random,
                    sync: false,
                };
                let count = pattern.count(&sizes);
                let places = places(pattern, count, sizes.shared, &mut Numbers::new(1));
                let distinct: HashSet<&u64> = places.iter().collect();
                assert_eq!(distinct.len() as u64, count);
                assert!(
                    places
                        .iter()
                        .all(|at| at % len == 0 && at + len <= sizes.shared)
                );
            }
        }
    }
}
