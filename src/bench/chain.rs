//! What depth costs: reading through a stack of layers, attaching it, detaching it.

use crate::{
    bench::{
        Gauge, Group, Job, Lab, Sizes,
        book::{Better, Book, Must, Reading},
        fio::{self, Load},
        peers::{Direct, Numbers, Peer, PeerKind},
        speed::{prime, settle},
        stats,
    },
    error::Result,
};
use std::{cell::RefCell, collections::HashSet, rc::Rc};

/// Blocks that each layer of a stack holds.
const BLOCKS: u32 = 64;
/// Opening a deeper stack takes QEMU longer than all else together.
const QEMU_DEEPEST: u32 = 64;
/// A time of milliseconds is taken so often, and the middle one counts.
const OFTEN: u32 = 3;

fn stacks(kind: PeerKind) -> bool {
    kind.is_block() && kind != PeerKind::Raw
}

fn reaches(kind: PeerKind, depth: u32) -> bool {
    let qemu = matches!(kind, PeerKind::Qcow2 | PeerKind::Qcow2L2);
    !qemu || depth <= QEMU_DEEPEST
}

/// The rows of stacks.
pub fn jobs<'a>(size: &Sizes, book: &mut Book) -> Vec<Job<'a>> {
    let depths = size.depths;
    let shallow = depths[0];
    // Two of them: attaching is slow at some peers.
    let ends: Vec<u32> = depths
        .iter()
        .copied()
        .filter(|d| *d == shallow || *d == 64 || size.level == super::Level::Tiny)
        .collect();
    let low = Better::Lower;
    for &depth in depths {
        let must =
            (depth != shallow).then(|| Must::AtMostOfRow(format!("read.depth.{shallow}"), 1.1));
        let title = format!("4K random read at depth {depth}, warm");
        book.row(
            Group::Chain,
            &format!("read.depth.{depth}"),
            &title,
            "us",
            low,
            must,
        );
    }
    for &depth in &ends {
        let must = Some(Must::AtMost(if depth == shallow { 3.0 } else { 5.0 }));
        let title = format!("attach at depth {depth}, by command");
        book.row(
            Group::Chain,
            &format!("attach.depth.{depth}"),
            &title,
            "ms",
            low,
            must,
        );
        let title = format!("detach at depth {depth}, by command");
        book.row(
            Group::Chain,
            &format!("detach.depth.{depth}"),
            &title,
            "ms",
            low,
            None,
        );
    }
    let built = Rc::new(RefCell::new(HashSet::new()));
    let mut jobs = Vec::new();
    for &depth in depths {
        let built = built.clone();
        let load = Load {
            rw: "randread",
            block: 4096,
            depth: 1,
            reads: 0,
            sync: false,
            again: true,
            area: size.area,
            millis: size.millis,
        };
        jobs.push(Job {
            name: format!("depth {depth}"),
            rounds: size.rounds.min(3),
            peers: stacks,
            measure: Box::new(move |lab, peer, gauge, _| {
                if !reaches(peer.kind, depth) {
                    return Ok(Vec::new());
                }
                if built.borrow_mut().insert(peer.kind) {
                    build(lab, peer, depths)?;
                }
                let name = format!("depth-{depth}");
                let device = peer.attach(lab.work, &name)?;
                prime(peer, &name, load.area)?;
                let figures = gauge.during(|| fio::run(lab.work, &device, &load, true, lab.seed()));
                peer.detach(lab.work, &name)?;
                let micros = 1e6 / figures?.iops(0.0);
                Ok(vec![Reading::of(format!("read.depth.{depth}"), micros)])
            }),
        });
    }
    for depth in ends {
        jobs.push(Job {
            name: format!("attach at depth {depth}"),
            rounds: size.rounds.min(3),
            // A raw file has no depth: it is in the row of the shallowest.
            peers: if depth == shallow {
                PeerKind::is_block
            } else {
                stacks
            },
            measure: Box::new(move |lab, peer, gauge, _| attach(lab, peer, gauge, depth)),
        });
    }
    jobs
}

fn attach(lab: &Lab<'_>, peer: &mut Peer, gauge: &mut Gauge, depth: u32) -> Result<Vec<Reading>> {
    // With a disk attached the daemon of forkdisk is running.
    peer.ensure(lab.work, "reader")?;
    let name = format!("depth-{depth}");
    let (mut on, mut off) = (Vec::new(), Vec::new());
    gauge.during(|| {
        for _ in 0..OFTEN {
            on.push(peer.attach_by_command(lab.work, &name)?.as_secs_f64() * 1e3);
            off.push(peer.detach_by_command(lab.work, &name)?.as_secs_f64() * 1e3);
        }
        Ok(())
    })?;
    let middle = |times: &[f64]| stats::median(times).unwrap_or(f64::NAN);
    Ok(vec![
        Reading::of(format!("attach.depth.{depth}"), middle(&on)),
        Reading::of(format!("detach.depth.{depth}"), middle(&off)),
    ])
}

/// Makes the disks `depth-D`, each with D layers that hold something.
fn build(lab: &Lab<'_>, peer: &mut Peer, depths: &[u32]) -> Result<()> {
    let deepest = depths
        .iter()
        .copied()
        .filter(|d| reaches(peer.kind, *d))
        .max();
    let mut numbers = Numbers::new(7);
    let mut below: Option<String> = None;
    let step = |depth: u32| match depths.contains(&depth) {
        true => format!("depth-{depth}"),
        false => format!("step-{depth}"),
    };
    let mut live = None;
    for depth in 1..=deepest.unwrap_or(0) {
        if peer.kind == PeerKind::Forkdisk {
            // One disk that is written and snapshotted while it is attached; a fork of its snapshot has one layer more.
            let device = peer.ensure(lab.work, "chain")?.0;
            if live.is_none() {
                live = Some(Direct::open(&device)?);
            }
            if depths.contains(&depth) {
                peer.fork(lab.work, below.as_deref(), &step(depth))?;
            }
            if let Some(open) = &mut live {
                scatter(lab, open, &mut numbers)?;
            }
            let snapshot = format!("s{depth}");
            peer.snapshot(lab.work, "chain", &snapshot)?;
            below = Some(format!("chain@{snapshot}"));
            continue;
        }
        let name = step(depth);
        peer.stack(lab.work, below.as_deref(), &name)?;
        if let Some(mut open) = peer.inside(lab.work, &name, &mut numbers)? {
            scatter(lab, &mut open, &mut numbers)?;
        }
        below = Some(name);
    }
    drop(live);
    if peer.kind == PeerKind::Forkdisk {
        peer.detach(lab.work, "chain")?;
        // What is above the last snapshot of it is written now, as in the other layers.
        for &depth in depths {
            let name = step(depth);
            let device = peer.attach(lab.work, &name)?;
            scatter(lab, &mut Direct::open(&device)?, &mut numbers)?;
            peer.detach(lab.work, &name)?;
        }
    }
    settle(peer.home());
    Ok(())
}

fn scatter(lab: &Lab<'_>, open: &mut Direct, numbers: &mut Numbers) -> Result<()> {
    for _ in 0..BLOCKS {
        let at = numbers.draw() % (lab.size.area / 4096) * 4096;
        open.write(numbers, at, 4096)?;
    }
    open.flush()
}
