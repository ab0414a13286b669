//! Random work on several disks at once, against a plain model of what they should hold.
#![allow(missing_docs, reason = "a test")]

mod common;
use common::{Op, Rng, World, random_op};
use proptest::prelude::*;

fn run(seed: u64, blocks: u64, ops: &[Op]) {
    let mut world = World::new(seed, blocks);
    for (i, op) in ops.iter().enumerate() {
        world
            .run(op)
            .unwrap_or_else(|e| panic!("step {i} {op:?}: {e:?}"));
        if i % 16 == 15 {
            world.compare();
        }
    }
    world.compare();
    world.close_all().expect("close");
    world.compare();
}

fn history(seed: u64, blocks: u64, len: usize) -> Vec<Op> {
    let mut rng = Rng(seed);
    (0..len)
        .map(|_| random_op(&mut rng, blocks * 4096, true))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn disks_hold_what_the_model_holds(seed in any::<u64>(), blocks in prop_oneof![Just(1u64), Just(37), Just(600), Just(1200)], len in 1usize..120) {
        run(seed, blocks, &history(seed, blocks, len));
    }
}

/// A long history on one store: runs merge, slots are reused, chains grow.
#[test]
fn a_long_history() {
    run(42, 600, &history(42, 600, 1500));
}
