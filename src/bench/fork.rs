//! What a new disk costs: time and space, for the first one and the hundred-thousandth.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Sizes,
        book::{Better, Book, Must, Reading},
        peers::{Direct, Numbers, Peer, PeerKind},
        quiet::Others,
        speed::settle,
        stats, work,
    },
    error::Result,
    sys::signals,
};
use std::time::{Duration, Instant};

/// A time of a millisecond is taken so often, and the middle one counts.
const OFTEN: u32 = 5;

fn makes_forks(kind: PeerKind) -> bool {
    kind.is_block() && kind != PeerKind::Raw
}

fn millis(times: &[Duration]) -> f64 {
    let times: Vec<f64> = times.iter().map(|t| t.as_secs_f64() * 1e3).collect();
    stats::median(&times).unwrap_or(f64::NAN)
}

/// The rows of forks.
pub fn jobs<'a>(size: &Sizes, book: &mut Book) -> Vec<Job<'a>> {
    let n = size.forks;
    let low = Better::Lower;
    let at_most = |v| Some(Must::AtMost(v));
    let g = Group::Fork;
    book.row(
        g,
        "fork.first",
        "fork, durable, by a call",
        "ms",
        low,
        at_most(1.0),
    );
    book.row(g, "fork.command", "fork, by command", "ms", low, None);
    book.row(
        g,
        "fork.batch",
        &format!("each of {n} forks in a batch"),
        "ms",
        low,
        at_most(0.1),
    );
    book.row(
        g,
        "fork.bytes",
        "host bytes of a fork",
        "bytes",
        low,
        at_most(16384.0),
    );
    book.row(
        g,
        "fork.nth",
        &format!("fork when there are {n}"),
        "ms",
        low,
        at_most(1.0),
    );
    book.row(
        g,
        "fork.written",
        &format!("fork of a disk with {} writes", size.writes),
        "ms",
        low,
        at_most(2.0),
    );
    let rounds = size.rounds.min(3);
    let mut first = Names::new("one");
    // Names that were never used: a sample may be taken again.
    let mut crowds = Names::new("crowd");
    let mut nth = Names::new("next");
    let mut written = Names::new("of-busy");
    let (forks, writes, base) = (n, size.writes, size.base);
    vec![
        Job {
            name: "a fork".to_string(),
            rounds,
            peers: |kind| makes_forks(kind) || kind == PeerKind::Copy,
            measure: Box::new(move |lab, peer, gauge, _| {
                if peer.kind == PeerKind::Copy {
                    let name = first.next();
                    settle(peer.home());
                    let took = gauge.during(|| peer.fork_fast(lab.work, None, &name))?;
                    peer.remove(lab.work, &name)?;
                    return Ok(vec![Reading::of("fork.first", millis(&[took]))]);
                }
                let calls = several(lab, peer, gauge, None, &mut first, true)?;
                let commands = several(lab, peer, gauge, None, &mut first, false)?;
                Ok(vec![
                    Reading::of("fork.first", calls),
                    Reading::of("fork.command", commands),
                ])
            }),
        },
        Job {
            name: format!("{n} forks"),
            rounds: rounds.min(2),
            peers: makes_forks,
            measure: Box::new(move |lab, peer, gauge, round| {
                // A batch is made durable by a sync of the whole filesystem: not also of what others left to be written.
                settle(peer.home());
                // They stay: ext4 without a journal takes no number of a file that was removed within the last minutes, and looks at each of
                // them anew for each new file.
                let crowd = crowds.next();
                let before = peer.allocated()?;
                let took = gauge.during(|| peer.fork_many(lab.work, &crowd, forks))?;
                let after = peer.allocated()?;
                let each = f64::from(forks);
                let mut readings = vec![
                    Reading::of("fork.batch", took.as_secs_f64() * 1e3 / each),
                    Reading::of("fork.bytes", after.saturating_sub(before) as f64 / each),
                ];
                if round == 0 {
                    let one = several(lab, peer, gauge, None, &mut nth, true)?;
                    readings.push(Reading::of("fork.nth", one));
                }
                Ok(readings)
            }),
        },
        Job {
            name: "a fork of a written disk".to_string(),
            rounds,
            peers: makes_forks,
            measure: Box::new(move |lab, peer, gauge, _| {
                let (device, new) = peer.ensure(lab.work, "busy")?;
                if new {
                    let mut numbers = Numbers::new(lab.seed());
                    let mut open = Direct::open(&device)?;
                    for _ in 0..writes {
                        let at = numbers.draw() % (base / 4096) * 4096;
                        open.write(&mut numbers, at, 4096)?;
                    }
                    open.flush()?;
                }
                peer.detach(lab.work, "busy")?;
                settle(peer.home());
                let one = several(lab, peer, gauge, Some("busy"), &mut written, true)?;
                Ok(vec![Reading::of("fork.written", one)])
            }),
        },
    ]
}

/// Names that no disk has yet.
struct Names(&'static str, u32);

impl Names {
    fn new(prefix: &'static str) -> Names {
        Names(prefix, 0)
    }
    fn next(&mut self) -> String {
        self.1 += 1;
        format!("{}-{}", self.0, self.1)
    }
}

/// Milliseconds of a fork, by a call or by a command: the middle of several, which are removed afterwards.
fn several(
    lab: &Lab<'_>,
    peer: &mut Peer,
    gauge: &mut Gauge,
    from: Option<&str>,
    names: &mut Names,
    call: bool,
) -> Result<f64> {
    let names: Vec<String> = (0..OFTEN).map(|_| names.next()).collect();
    let times = gauge.during(|| {
        let one = |name: &String| {
            if call {
                return peer.fork_fast(lab.work, from, name);
            }
            let started = Instant::now();
            peer.fork(lab.work, from, name)?;
            Ok(started.elapsed())
        };
        names.iter().map(one).collect::<Result<Vec<_>>>()
    })?;
    for name in &names {
        peer.remove(lab.work, name)?;
    }
    Ok(millis(&times))
}

/// Forkdisk alone: does the hundred-thousandth fork cost what the first did?
pub fn many(lab: &Lab<'_>, book: &mut Book) -> Result<()> {
    if !lab.work.has("mkfs.ext4") {
        book.remark("the forks of many are left out: `apt-get install e2fsprogs`");
        return Ok(());
    }
    let home = lab.work.mkdir("many")?;
    // A filesystem of their own, which goes as one file: where the host discards what is removed, to remove so many takes minutes.
    let most = lab.size.many.iter().copied().max().unwrap_or(0);
    let room = u64::from(most) * (48 << 10) + (256 << 20);
    let (dir, _) = crate::bench::peers::filesystem(lab.work, &home, "mkfs.ext4", room)?;
    let base = dir.join("small.img");
    crate::bench::peers::noise(&base, 1 << 20, &|_| ())?;
    let peer = Peer::new(lab.work, PeerKind::Forkdisk, &dir, &base, false)?;
    let mut there = 0;
    for (i, &wanted) in lab.size.many.iter().enumerate() {
        let total = lab.size.many.len() as u64;
        lab.watch
            .step(i as u64, total, &format!("{wanted} forks: forkdisk"));
        let id = format!("fork.at.{wanted}");
        let title = format!("fork when there are {wanted}, own ext4");
        let first = i64::from(wanted) == i64::from(lab.size.many[0]);
        let must =
            (!first).then(|| Must::AtMostOfRow(format!("fork.at.{}", lab.size.many[0]), 1.5));
        book.row(Group::Fork, &id, &title, "ms", Better::Lower, must);
        while there < wanted {
            // In parts, so that an interrupt is heard.
            let part = (wanted - there).min(5000);
            peer.fork_many(lab.work, &format!("crowd-{there}"), part)?;
            there += part;
            if signals::caught() {
                return Err(work::interrupted());
            }
        }
        settle(&dir);
        for round in 0..lab.size.rounds {
            let mut gauge = Gauge {
                mark: lab.work.mark(),
                worst: Others::default(),
            };
            let times = gauge.during(|| {
                let one = |k| peer.fork_fast(lab.work, None, &format!("one-{wanted}-{round}-{k}"));
                (0..OFTEN).map(one).collect::<Result<Vec<_>>>()
            })?;
            let reading = Reading::of(id.as_str(), millis(&times));
            book.enter(PeerKind::Forkdisk, round, &[reading], gauge.worst);
        }
    }
    drop(peer);
    lab.work.clear(&home);
    Ok(())
}
