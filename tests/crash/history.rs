//! One history: some work that ends well, and then a stretch in which the power goes, a sync fails, or some call fails.

use crate::common::failing::Ended;
use crate::common::{Op, Reached, Rng, World, audit, random_op};
use crate::figures::{AGAIN, FAILING, Figures, POINTS, ROTTEN, SHAPES};
use crate::shrink::quietly;
use crate::watch::Watch;
use forkdisk::io::sim::{FaultKind, Policy, SimDisk, Verb};
use std::panic::AssertUnwindSafe;

/// What a history is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub seed: u64,
    /// Blocks of a disk.
    pub blocks: u64,
    /// The work before the stretch.
    pub before: Vec<Op>,
    pub stretch: Vec<Op>,
}

/// What befalls the stretch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// The power goes at operation 0, 1, 2... of the stretch.
    Cut,
    /// Sync 0, 1, 2... fails, and the process ends.
    FailedSync,
    /// Calls fail somewhere in the stretch, and the work goes on; the power goes later.
    Failing,
}

/// A world that has done the work before and is at rest.
pub struct History {
    pub plan: Plan,
    start: World,
    /// Calls of the stretch, and operations.
    length: (u64, u64),
    tracing: bool,
}

impl Plan {
    pub fn random(seed: u64) -> Plan {
        let mut rng = Rng(seed.wrapping_mul(0x5851_F42D_4C95_7F2D) ^ 0xC4A5);
        let blocks = match rng.below(10) {
            0 => 1,
            1..=2 => 9,
            3..=7 => 37,
            8 => 600,
            _ => 1100,
        };
        let size = blocks * 4096;
        let before = [0, 0, 15, 60][rng.below(4) as usize];
        let before = (0..before)
            .map(|_| random_op(&mut rng, size, true))
            .collect();
        let len = if blocks > 500 { 14 } else { 18 };
        let mut stretch: Vec<Op> = (0..len).map(|_| random_op(&mut rng, size, true)).collect();
        if rng.below(3) == 0 {
            // The journal from its first slot again, and slots that come back.
            let disk = rng.below(8) as usize;
            let mut write = || Op::Write {
                disk,
                at: 0,
                len: 4096,
                seed: rng.next() | 1,
            };
            let flush = Op::Flush { disk };
            let turns = [
                write(),
                flush.clone(),
                Op::Checkpoint { disk },
                write(),
                flush,
            ];
            let at = rng.below(stretch.len() as u64 - 4) as usize;
            stretch.splice(at..at + turns.len(), turns);
        }
        if blocks > 500 {
            let disk = rng.below(8) as usize;
            let len = size;
            stretch[rng.below(8) as usize] = Op::Discard { disk, at: 0, len };
            stretch.insert(rng.below(10) as usize + 4, Op::Flush { disk });
        }
        if blocks < 40 && rng.below(4) == 0 {
            let at = rng.below(stretch.len() as u64) as usize;
            stretch.insert(at, Op::Import { seed: rng.next() });
        }
        Plan {
            seed,
            blocks,
            before,
            stretch,
        }
    }
    /// As text that [`Plan::parse`] reads.
    pub fn text(&self) -> String {
        let ops = |ops: &[Op]| ops.iter().map(Op::to_string).collect::<Vec<_>>().join("; ");
        let (before, stretch) = (ops(&self.before), ops(&self.stretch));
        format!("{} blocks | {before} | {stretch}", self.blocks)
    }
    pub fn parse(seed: u64, text: &str) -> Result<Plan, String> {
        let [blocks, before, stretch] = text.split('|').collect::<Vec<_>>()[..] else {
            return Err(format!(
                "{text}: three parts are expected: N blocks | work before | stretch"
            ));
        };
        let ops = |part: &str| {
            part.split(';')
                .map(str::trim)
                .filter(|op| !op.is_empty())
                .map(str::parse)
                .collect::<Result<Vec<Op>, String>>()
        };
        let blocks = blocks.replace("blocks", "");
        Ok(Plan {
            seed,
            blocks: blocks
                .trim()
                .parse()
                .map_err(|e| format!("{blocks}: {e}"))?,
            before: ops(before)?,
            stretch: ops(stretch)?,
        })
    }
}

impl History {
    /// Does the work before, and the stretch once without any trouble.
    pub fn new(plan: Plan, figures: &Figures) -> History {
        let mut start = World::new(plan.seed, plan.blocks);
        for op in &plan.before {
            start
                .run(op)
                .unwrap_or_else(|e| panic!("history {}: {op}: {e:?}", plan.seed));
            // Chains and disks in numbers are the model tests' business; here each costs time at every cut.
            if start.disks.len() + start.frozen.len() > 6 {
                thin_out(&mut start);
            }
        }
        start.compare_in(&format!("history {}, without trouble", plan.seed));
        let mut reached = std::mem::take(&mut start.reached);
        let length = watch(&mut start, &plan, &mut reached);
        figures.reached(&reached);
        History {
            plan,
            start,
            length,
            tracing: false,
        }
    }

    /// A world in which the trouble number `place` came; `None` if there are not so many.
    fn trouble(&mut self, trouble: Trouble, place: u64) -> Option<World> {
        match trouble {
            Trouble::Cut => self.cut(place),
            Trouble::FailedSync => self.failed_sync(place),
            Trouble::Failing => self.failing(place),
        }
    }
    /// Tries what can be found after the trouble number `place`; says whether there are so many.
    pub fn try_at(&mut self, trouble: Trouble, place: u64, story: &str, figures: &Figures) -> bool {
        let Some(world) = self.trouble(trouble, place) else {
            return false;
        };
        figures.count(POINTS);
        let shapes = Shapes {
            world: &world,
            figures,
            story,
        };
        let seed = self.plan.seed ^ place.wrapping_mul(0x9E37);
        match trouble {
            Trouble::Cut => shapes.of_a_cut(seed),
            Trouble::FailedSync => shapes.of_a_failed_sync(seed),
            Trouble::Failing => shapes.of_a_failing_disk(seed),
        }
        figures.harm(&world.sim);
        if trouble == Trouble::Failing {
            // Of a cut it was counted once, when the history was run to its end.
            figures.reached(&world.reached);
        }
        true
    }
    /// What the disk was asked to do in the stretch until the trouble came, for people.
    pub fn trace(&mut self, trouble: Trouble, place: u64) -> Vec<String> {
        self.tracing = true;
        let found = quietly(AssertUnwindSafe(|| self.trouble(trouble, place)));
        self.tracing = false;
        let world = found.ok().flatten();
        world.map(|world| world.sim.trace()).unwrap_or_default()
    }
    /// The world when operation `cut` of the stretch failed.
    fn cut(&mut self, cut: u64) -> Option<World> {
        let mut world = self.start.copy(self.plan.seed ^ cut << 32);
        world.sim.set_garbage_pages(true);
        if self.tracing {
            world.sim.keep_trace();
        }
        world.sim.cut_at(cut);
        for op in &self.plan.stretch {
            if let Err(e) = world.run(op) {
                assert!(world.sim.is_off(), "{op}: {e:?}");
                return Some(world);
            }
            // A hint that failed (giving space back, say) may be swallowed; the next operation will tell.
        }
        // The end of a history is a crash point as well, once.
        world.sim.is_off().then_some(world)
    }
    /// The world when the sync number `nth` of the stretch failed.
    fn failed_sync(&mut self, nth: u64) -> Option<World> {
        let mut world = self.start.copy(self.plan.seed ^ nth << 32 ^ 0xF5);
        world.sim.set_garbage_pages(true);
        if self.tracing {
            world.sim.keep_trace();
        }
        world.alone = true;
        world.sim.fail_nth(Verb::Sync, nth, FaultKind::Eio);
        for op in &self.plan.stretch {
            if world.run(op).is_err() {
                world.doubt = true;
                world.sim.clear_faults();
                return Some(world);
            }
        }
        None
    }
    /// The world after calls failed in the stretch, with the work going on.
    fn failing(&mut self, place: u64) -> Option<World> {
        /// Places of a history.
        const PLACES: u64 = 24;
        if place >= PLACES {
            return None;
        }
        let mut rng = Rng(self.plan.seed << 8 ^ place);
        let mut world = self.start.copy(self.plan.seed ^ place << 32 ^ 0xFA);
        world.sim.set_garbage_pages(true);
        if self.tracing {
            world.sim.keep_trace();
        }
        world.alone = true;
        let (calls, ops) = self.length;
        let from = world.sim.calls() + rng.below(calls.max(1));
        let kind = [FaultKind::Eio, FaultKind::Enospc][rng.below(2) as usize];
        let full = rng.below(6) == 0;
        match rng.below(3) {
            _ if full => {
                let room = rng.below(12) * 4096;
                world.sim.set_capacity(Some(world.sim.used() + room));
            }
            0 => world.sim.fail_calls(from, 1 + rng.below(8), kind),
            _ => world.sim.fail_calls(from, 1, kind),
        }
        if rng.below(3) > 0 {
            world.sim.cut_at(world.sim.ops() + rng.below(ops.max(1)));
        }
        let relief = rng.below(self.plan.stretch.len() as u64 + 1) as usize;
        for (i, op) in self.plan.stretch.iter().enumerate() {
            if i == relief {
                world.sim.set_capacity(None);
            }
            let ended = world.run_failing(op);
            world.stopped |= ended == Ended::Stopped;
            if world.stopped || world.sim.is_off() {
                break;
            }
        }
        world.sim.set_capacity(None);
        Some(world)
    }
}

/// Removes what can be removed.
fn thin_out(world: &mut World) {
    world.close_all().expect("close");
    for what in (0..12).rev() {
        if world.disks.len() > 1 || what < world.frozen.len() {
            let _ = world.run(&Op::Remove { what });
        }
    }
    if world.disks.is_empty() {
        world.run(&Op::Fork { from: 0 }).expect("a disk");
    }
}

/// Runs the history to its end once, and sees what it reaches.
fn watch(start: &mut World, plan: &Plan, reached: &mut Reached) -> (u64, u64) {
    let mut world = start.copy(plan.seed);
    let mut watch = Watch::default();
    watch.look(&world.sim, reached);
    for op in &plan.stretch {
        world
            .run(op)
            .unwrap_or_else(|e| panic!("history {}: {op}: {e:?}", plan.seed));
        watch.look(&world.sim, reached);
    }
    let length = (world.sim.calls(), world.sim.ops());
    let story = format!("history {}, without trouble", plan.seed);
    world.compare_in(&story);
    reached.add(&world.reached);
    world.close_all().expect("close");
    world.compare_in(&story);
    world.close_all().expect("close");
    audit::layers(&world.sim, &story);
    length
}

/// All that is tried with one world after the trouble.
struct Shapes<'a> {
    world: &'a World,
    figures: &'a Figures,
    story: &'a str,
}

impl Shapes<'_> {
    fn of_a_cut(&self, seed: u64) {
        let mut rng = Rng(seed);
        for policy in [Policy::AllDone, Policy::AllDropped] {
            self.check(
                self.world.sim.crash_with(policy),
                rng.next(),
                &format!("{policy:?}"),
            );
        }
        for _ in 0..3 {
            self.crash(rng.next());
        }
        self.kill(rng.next());
        let seed = rng.next();
        self.during_recovery(self.world.sim.crash(seed), seed, &format!("crash {seed}"));
        let seed = rng.next();
        self.during_recovery(self.killed(seed), seed, "kill");
        let seed = rng.next();
        self.after_more_work(self.killed(seed), seed, "kill");
        let seed = rng.next();
        self.after_more_work(self.world.sim.crash(seed), seed, &format!("crash {seed}"));
        self.rot(rng.next());
    }
    fn of_a_failed_sync(&self, seed: u64) {
        let mut rng = Rng(seed);
        for _ in 0..2 {
            self.kill(rng.next());
            let seed = rng.next();
            self.after_more_work(self.killed(seed), seed, "kill");
            let seed = rng.next();
            self.during_recovery(self.killed(seed), seed, "kill");
        }
        self.crash(rng.next());
    }
    fn of_a_failing_disk(&self, seed: u64) {
        self.figures.count(FAILING);
        let mut rng = Rng(seed);
        for _ in 0..2 {
            self.crash(rng.next());
        }
        let seed = rng.next();
        self.after_more_work(self.world.sim.crash(seed), seed, &format!("crash {seed}"));
        if !self.world.stopped {
            self.kill(rng.next());
            let seed = rng.next();
            self.during_recovery(self.killed(seed), seed, "kill");
        }
    }

    fn check(&self, left: SimDisk, seed: u64, what: &str) {
        self.figures.count(SHAPES);
        self.figures.harm(&left);
        self.world
            .check_after(&left, seed, &format!("{} ({what})", self.story));
    }
    fn crash(&self, seed: u64) {
        self.check(self.world.sim.crash(seed), seed, &format!("crash {seed}"));
    }
    fn kill(&self, seed: u64) {
        self.check(self.killed(seed), seed, &format!("kill {seed}"));
    }
    fn killed(&self, seed: u64) -> SimDisk {
        self.world.sim.reseed(seed);
        self.world.sim.kill()
    }
    fn rot(&self, seed: u64) {
        self.figures.count(ROTTEN);
        let left = self.world.sim.crash(seed);
        self.world
            .check_rotten(&left, seed, &format!("{} (crash {seed}, rot)", self.story));
        self.figures.harm(&left);
    }
    /// The power goes again while what the first crash left is opened; and sometimes again in that.
    fn during_recovery(&self, left: SimDisk, seed: u64, what: &str) {
        let mut story = format!("{} ({what}", self.story);
        let mut rng = Rng(seed);
        let mut left = left;
        loop {
            let among = 1 + 12 * (1 + self.world.disks.len() as u64);
            let cut = rng.below(among);
            left.cut_at(left.ops() + cut);
            story += &format!(", again in recovery at {cut}");
            if let Err(e) = self.world.revive(&left, rng.next(), &format!("{story})")) {
                assert!(left.is_off(), "{story}): {e:?}");
            }
            let seed = rng.next();
            let next = match rng.below(4) {
                0 => left.kill(),
                _ => left.crash(seed),
            };
            self.figures.count(AGAIN);
            self.figures.harm(&next);
            left = next;
            if rng.below(2) == 0 {
                break;
            }
        }
        self.figures.count(SHAPES);
        self.world.check_after(&left, seed, &format!("{story})"));
    }
    /// What was left is opened and works for a while, until the power goes.
    fn after_more_work(&self, left: SimDisk, seed: u64, what: &str) {
        let story = format!("{} ({what}, work, crash {seed})", self.story);
        self.figures.count(SHAPES);
        let mut next = self
            .world
            .revive(&left, seed ^ 1, &story)
            .unwrap_or_else(|e| panic!("{story}: {e:?}"));
        let mut rng = Rng(seed);
        left.cut_at(left.ops() + rng.below(60));
        for _ in 0..12 {
            let op = random_op(&mut rng, next.size, true);
            if let Err(e) = next.run(&op) {
                assert!(left.is_off(), "{story}: {op}: {e:?}");
                break;
            }
        }
        let seed = rng.next();
        let left = left.crash(seed);
        self.figures.harm(&left);
        next.check_after(&left, seed, &story);
    }
}
