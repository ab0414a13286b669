//! What a test does to a store, as values: drawn at random, written down, read again.

use super::Rng;
use std::fmt;
use std::str::FromStr;

/// What a test does to the store. Disks and names are numbers: counted among those that there are, from the front again past the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Write {
        disk: usize,
        at: u64,
        len: u64,
        seed: u64,
    },
    Discard {
        disk: usize,
        at: u64,
        len: u64,
    },
    Flush {
        disk: usize,
    },
    /// A flush in which others write, just before its record is written or synced: one to where the flush itself has data, one elsewhere.
    FlushAmid {
        disk: usize,
        at: u64,
        seed: u64,
    },
    Checkpoint {
        disk: usize,
    },
    Maintain {
        disk: usize,
    },
    Snapshot {
        disk: usize,
    },
    /// The disk's own layer becomes an image.
    Commit {
        disk: usize,
    },
    /// From anything that has a name.
    Fork {
        from: usize,
    },
    /// Three forks in one call.
    Forks {
        from: usize,
    },
    /// Close it cleanly, and open it again.
    Reopen {
        disk: usize,
    },
    /// Close it; it is opened when it is used next.
    Close {
        disk: usize,
    },
    /// To one of its snapshots, if it has any.
    Rollback {
        disk: usize,
        to: usize,
    },
    /// Larger, open or not; smaller, at rest.
    Resize {
        disk: usize,
        blocks: u64,
    },
    /// Of the disk and another one, at one instant.
    SnapshotTwo {
        disk: usize,
    },
    /// Anything that has a name gets another one; a disk's snapshots with it.
    Rename {
        what: usize,
    },
    Remove {
        what: usize,
    },
    /// The layers that anything with a name stands on become one: down to the next image, or (1) to the base.
    Squash {
        what: usize,
        all: u64,
    },
    /// Anything with a name gets a base of its own.
    Flatten {
        what: usize,
    },
    /// One more image.
    Import {
        seed: u64,
    },
    Gc,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Write {
                disk,
                at,
                len,
                seed,
            } => write!(f, "write {disk} {at}+{len} seed {seed}"),
            Op::Discard { disk, at, len } => write!(f, "discard {disk} {at}+{len}"),
            Op::Flush { disk } => write!(f, "flush {disk}"),
            Op::FlushAmid { disk, at, seed } => write!(f, "flush-amid {disk} {at} seed {seed}"),
            Op::Checkpoint { disk } => write!(f, "checkpoint {disk}"),
            Op::Maintain { disk } => write!(f, "maintain {disk}"),
            Op::Snapshot { disk } => write!(f, "snapshot {disk}"),
            Op::Commit { disk } => write!(f, "commit {disk}"),
            Op::Fork { from } => write!(f, "fork {from}"),
            Op::Forks { from } => write!(f, "forks {from}"),
            Op::Reopen { disk } => write!(f, "reopen {disk}"),
            Op::Close { disk } => write!(f, "close {disk}"),
            Op::Rollback { disk, to } => write!(f, "rollback {disk} {to}"),
            Op::Resize { disk, blocks } => write!(f, "resize {disk} {blocks}"),
            Op::SnapshotTwo { disk } => write!(f, "snapshot-two {disk}"),
            Op::Rename { what } => write!(f, "rename {what}"),
            Op::Remove { what } => write!(f, "remove {what}"),
            Op::Squash { what, all } => write!(f, "squash {what} {all}"),
            Op::Flatten { what } => write!(f, "flatten {what}"),
            Op::Import { seed } => write!(f, "import seed {seed}"),
            Op::Gc => write!(f, "gc"),
        }
    }
}

impl FromStr for Op {
    type Err = String;
    fn from_str(text: &str) -> Result<Op, String> {
        let mut words = text.split_whitespace();
        let word = words.next().unwrap_or_default();
        let mut numbers = words
            .flat_map(|w| w.split('+'))
            .filter(|w| *w != "seed")
            .map(|w| w.parse::<u64>().map_err(|e| format!("{text}: {w}: {e}")));
        let mut next = || {
            numbers
                .next()
                .unwrap_or_else(|| Err(format!("{text}: a number is missing")))
        };
        Ok(match word {
            "write" => Op::Write {
                disk: next()? as usize,
                at: next()?,
                len: next()?,
                seed: next()?,
            },
            "discard" => Op::Discard {
                disk: next()? as usize,
                at: next()?,
                len: next()?,
            },
            "flush" => Op::Flush {
                disk: next()? as usize,
            },
            "flush-amid" => Op::FlushAmid {
                disk: next()? as usize,
                at: next()?,
                seed: next()?,
            },
            "checkpoint" => Op::Checkpoint {
                disk: next()? as usize,
            },
            "maintain" => Op::Maintain {
                disk: next()? as usize,
            },
            "snapshot" => Op::Snapshot {
                disk: next()? as usize,
            },
            "commit" => Op::Commit {
                disk: next()? as usize,
            },
            "fork" => Op::Fork {
                from: next()? as usize,
            },
            "forks" => Op::Forks {
                from: next()? as usize,
            },
            "reopen" => Op::Reopen {
                disk: next()? as usize,
            },
            "close" => Op::Close {
                disk: next()? as usize,
            },
            "rollback" => Op::Rollback {
                disk: next()? as usize,
                to: next()? as usize,
            },
            "resize" => Op::Resize {
                disk: next()? as usize,
                blocks: next()?,
            },
            "snapshot-two" => Op::SnapshotTwo {
                disk: next()? as usize,
            },
            "rename" => Op::Rename {
                what: next()? as usize,
            },
            "remove" => Op::Remove {
                what: next()? as usize,
            },
            "squash" => Op::Squash {
                what: next()? as usize,
                all: next()?,
            },
            "flatten" => Op::Flatten {
                what: next()? as usize,
            },
            "import" => Op::Import { seed: next()? },
            "gc" => Op::Gc,
            _ => return Err(format!("{text}: no such operation")),
        })
    }
}

impl Op {
    /// Simpler ones that might do as well, the simplest first.
    pub fn simpler(&self) -> Vec<Op> {
        let mut found = Vec::new();
        match *self {
            Op::Write {
                disk,
                at,
                len,
                seed,
            } => {
                // Every seventh seed writes zeros.
                let plain = if seed % 7 == 0 { 7 } else { seed % 7 };
                for (at, len) in [(0, 4096), (at / 4096 * 4096, 4096), (at, len.min(512))] {
                    found.push(Op::Write {
                        disk: 0,
                        at,
                        len,
                        seed: plain,
                    });
                    found.push(Op::Write {
                        disk,
                        at,
                        len,
                        seed: plain,
                    });
                }
            }
            Op::Discard { disk, at, .. } => {
                for (disk, at, len) in [(0, 0, 4096), (disk, 0, 4096), (disk, at, 4096)] {
                    found.push(Op::Discard { disk, at, len });
                }
            }
            Op::FlushAmid { disk, .. } => {
                found.push(Op::Flush { disk: 0 });
                found.push(Op::Flush { disk });
                found.push(Op::FlushAmid {
                    disk,
                    at: 0,
                    seed: 1,
                });
            }
            Op::Flush { .. } => found.push(Op::Flush { disk: 0 }),
            Op::Checkpoint { .. } => found.push(Op::Checkpoint { disk: 0 }),
            Op::Maintain { .. } => found.push(Op::Maintain { disk: 0 }),
            Op::Snapshot { .. } => found.push(Op::Snapshot { disk: 0 }),
            Op::Commit { disk } => {
                found.push(Op::Snapshot { disk });
                found.push(Op::Commit { disk: 0 });
            }
            Op::Forks { from } => {
                found.push(Op::Fork { from: 0 });
                found.push(Op::Fork { from });
            }
            Op::Fork { .. } => found.push(Op::Fork { from: 0 }),
            Op::Reopen { disk } => {
                found.push(Op::Close { disk: 0 });
                found.push(Op::Close { disk });
                found.push(Op::Reopen { disk: 0 });
            }
            Op::Close { .. } => found.push(Op::Close { disk: 0 }),
            Op::Rollback { to, .. } => found.push(Op::Rollback { disk: 0, to }),
            Op::Resize { blocks, .. } => found.push(Op::Resize { disk: 0, blocks }),
            Op::SnapshotTwo { disk } => {
                found.push(Op::Snapshot { disk: 0 });
                found.push(Op::Snapshot { disk });
            }
            Op::Rename { .. } => found.push(Op::Rename { what: 0 }),
            Op::Remove { .. } => found.push(Op::Remove { what: 0 }),
            Op::Squash { what, .. } => {
                found.push(Op::Squash { what: 0, all: 0 });
                found.push(Op::Squash { what, all: 0 });
            }
            Op::Flatten { what } => {
                found.push(Op::Squash { what, all: 1 });
                found.push(Op::Flatten { what: 0 });
            }
            Op::Import { .. } => found.push(Op::Import { seed: 1 }),
            Op::Gc => {}
        }
        found.retain(|op| op != self);
        found.dedup();
        found
    }
}

/// A random operation on disks of `size` bytes. `heavy` includes what changes names.
pub fn random_op(rng: &mut Rng, size: u64, heavy: bool) -> Op {
    let disk = rng.below(8) as usize;
    let at = match rng.below(4) {
        0 => rng.below(size / 4096) * 4096,
        1 => rng.below(4) * 4096,
        2 => size.saturating_sub(rng.below(9000) + 1),
        _ => rng.below(size),
    };
    let len = match rng.below(8) {
        0 => rng.below(100) + 1,
        1 => 512,
        2..=4 => 4096 * (rng.below(3) + 1),
        5 => rng.below(20_000) + 1,
        6 => 4096 * rng.below(60),
        _ => 4096,
    };
    match rng.below(if heavy { 120 } else { 80 }) {
        0..=44 => Op::Write {
            disk,
            at,
            len,
            seed: rng.next(),
        },
        45..=54 => Op::Discard {
            disk,
            at,
            len: if rng.below(4) == 0 { size } else { len },
        },
        55..=65 => Op::Flush { disk },
        66..=71 => Op::FlushAmid {
            disk,
            at: at / 4096 * 4096,
            seed: rng.next(),
        },
        72..=74 => Op::Checkpoint { disk },
        75..=76 => Op::Maintain { disk },
        77..=79 => Op::Reopen { disk },
        80..=85 => Op::Snapshot { disk },
        86..=87 => Op::Commit { disk },
        88..=92 => Op::Fork {
            from: rng.below(8) as usize,
        },
        93 => Op::Forks {
            from: rng.below(8) as usize,
        },
        94..=95 => Op::Close { disk },
        96..=98 => Op::Remove {
            what: rng.below(16) as usize,
        },
        99..=100 => Op::Rename {
            what: rng.below(16) as usize,
        },
        112..=115 => Op::Squash {
            what: rng.below(16) as usize,
            all: rng.below(2),
        },
        // A large image would cost more than it tells.
        116 if size <= 64 * 4096 => Op::Flatten {
            what: rng.below(16) as usize,
        },
        101 if size <= 64 * 4096 => Op::Import { seed: rng.next() },
        103..=105 => Op::Rollback {
            disk,
            to: rng.below(4) as usize,
        },
        106..=108 => Op::Resize {
            disk,
            blocks: rng.next() % 10_000,
        },
        109..=111 => Op::SnapshotTwo { disk },
        _ => Op::Gc,
    }
}
