//! A history that fails is made smaller: operations are left out and made simpler, as long as what remains still fails.

use crate::common::Op;
use crate::figures::Figures;
use crate::history::{History, Plan, Trouble};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, UnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

/// A plan that fails, where and how.
#[derive(Clone)]
pub struct Failure {
    pub plan: Plan,
    pub place: u64,
    pub why: String,
}

/// The place of a failure without any trouble.
pub const NOWHERE: u64 = u64::MAX;

/// Does `f`; a panic in it is no noise on the terminal, but an error here.
pub fn quietly<R>(f: impl FnOnce() -> R + UnwindSafe) -> Result<R, String> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    let outer = QUIET.replace(true);
    let done = catch_unwind(f);
    QUIET.set(outer);
    done.map_err(|why| {
        let text = why.downcast_ref::<String>().cloned();
        text.or_else(|| why.downcast_ref::<&str>().map(|s| s.to_string()))
            .unwrap_or_else(|| "a panic without words".to_string())
    })
}

/// The first place at which a plan fails.
pub fn first_failure(
    plan: &Plan,
    trouble: Trouble,
    figures: &Figures,
    until: Instant,
) -> Option<Failure> {
    let made = quietly(AssertUnwindSafe(|| History::new(plan.clone(), figures)));
    let failed = |place, why| {
        let plan = plan.clone();
        Some(Failure { plan, place, why })
    };
    let mut history = match made {
        Ok(history) => history,
        Err(why) => return failed(NOWHERE, why),
    };
    for place in 0.. {
        if Instant::now() > until {
            return None;
        }
        let tried = quietly(AssertUnwindSafe(|| {
            history.try_at(trouble, place, &format!("at {place}"), figures)
        }));
        match tried {
            Ok(true) => {}
            Ok(false) => return None,
            Err(why) => return failed(place, why),
        }
    }
    None
}

/// What is said of a failure, without places, names and numbers: so that one failure is not taken for another.
fn kind(why: &str) -> Vec<&str> {
    let mut depth = 0;
    let mut words = Vec::new();
    for word in why.split_whitespace() {
        let open = word.matches(['(', '[']).count();
        let close = word.matches([')', ']']).count();
        depth += open;
        if depth == 0 && word.chars().all(|c| c.is_alphabetic()) {
            words.push(word);
        }
        depth -= close.min(depth);
    }
    words.retain(|w| *w != "history" && *w != "at");
    words
}

/// Looks for a smaller plan that fails in the same way, for so long; `fails` tries one. Returns the smallest found, and the number of
/// plans that were tried.
pub fn shrink(
    failure: Failure,
    most: Duration,
    fails: impl Fn(&Plan, Instant) -> Option<Failure>,
) -> (Failure, u64) {
    let until = Instant::now() + most;
    let mut best = failure;
    let mut tried = 0;
    let mut try_plan = |plan: Plan, best: &mut Failure| {
        if Instant::now() > until || plan == best.plan {
            return false;
        }
        tried += 1;
        match fails(&plan, until) {
            Some(failure) if kind(&failure.why) == kind(&best.why) => {
                *best = failure;
                true
            }
            _ => false,
        }
    };
    // Most of the work before is usually of no importance, nor is what comes after the trouble.
    let plan = Plan {
        before: Vec::new(),
        ..best.plan.clone()
    };
    try_plan(plan, &mut best);
    loop {
        let size = best.plan.weight();
        for blocks in [1, 9, 37] {
            if blocks < best.plan.blocks {
                let plan = Plan {
                    blocks,
                    ..best.plan.clone()
                };
                if try_plan(plan, &mut best) {
                    break;
                }
            }
        }
        for stretch in [true, false] {
            let mut piece = best.plan.part(stretch).len().div_ceil(2);
            while piece > 0 {
                // From the end on: what comes after the trouble goes first.
                let mut end = best.plan.part(stretch).len();
                while end > 0 {
                    let start = end.saturating_sub(piece);
                    let mut plan = best.plan.clone();
                    plan.part_mut(stretch).drain(start..end);
                    try_plan(plan, &mut best);
                    end = start.min(best.plan.part(stretch).len());
                }
                piece /= 2;
            }
            // Work in the stretch costs a try at each of its operations; before it, nothing.
            for i in (0..best.plan.part(stretch).len()).rev() {
                let simpler = best.plan.part(stretch).get(i).map(Op::simpler);
                for op in simpler.unwrap_or_default() {
                    let mut plan = best.plan.clone();
                    plan.part_mut(stretch)[i] = op;
                    if try_plan(plan, &mut best) {
                        break;
                    }
                }
            }
        }
        if best.plan.weight() >= size || Instant::now() > until {
            return (best, tried);
        }
    }
}

impl Plan {
    fn part(&self, stretch: bool) -> &Vec<Op> {
        if stretch { &self.stretch } else { &self.before }
    }
    fn part_mut(&mut self, stretch: bool) -> &mut Vec<Op> {
        if stretch {
            &mut self.stretch
        } else {
            &mut self.before
        }
    }
    /// Operations first; then their text, in which what is simple is short.
    fn weight(&self) -> (usize, usize) {
        (self.before.len() + self.stretch.len(), self.text().len())
    }
}
