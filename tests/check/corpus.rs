//! Every input of the fuzzer's corpus through every fuzz target: what was found once stays mended, and each decoder takes what was meant
//! for another one, too.

use super::common::Rng;
use std::fs;
use std::path::Path;

#[path = "../fuzz/targets.rs"]
mod targets;

fn corpus() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let mut inputs = Vec::new();
    for target in fs::read_dir(dir).expect("a corpus") {
        let target = target.expect("an entry").path();
        for input in fs::read_dir(&target).expect("inputs") {
            let input = input.expect("an entry").path();
            inputs.push((
                input.display().to_string(),
                fs::read(&input).expect("an input"),
            ));
        }
    }
    inputs.sort();
    inputs
}

#[test]
fn every_input_through_every_target() {
    let inputs = corpus();
    assert!(inputs.len() >= 2 * targets::ALL.len());
    for (name, _) in targets::ALL {
        let own = inputs.iter().filter(|i| i.0.contains(&format!("/{name}/")));
        assert!(own.count() >= 2, "{name} has no corpus");
    }
    for (path, data) in &inputs {
        for (name, target) in targets::ALL {
            // Whole stores take their time: of what was meant for others, some.
            let slow = matches!(*name, "layer" | "store");
            if slow && !path.contains(&format!("/{name}/")) && data.len() % 4 != 0 {
                continue;
            }
            let caught = std::panic::catch_unwind(|| target(data));
            assert!(caught.is_ok(), "{path} breaks {name}");
        }
    }
}

/// Random changes of the corpus, always the same ones: a fuzzer for those who have none.
#[test]
fn changed_inputs() {
    let inputs = corpus();
    let mut rng = Rng(7);
    for (path, data) in &inputs {
        let name = path.rsplit('/').nth(1).expect("a target");
        let rounds = match name {
            "layer" | "store" => 6,
            _ => 60,
        };
        for round in 0..rounds {
            let mut data = data.clone();
            for _ in 0..=rng.below(4) {
                match rng.below(4) {
                    0 if !data.is_empty() => {
                        let at = rng.below(data.len() as u64) as usize;
                        data[at] ^= 1 << rng.below(8);
                    }
                    1 if !data.is_empty() => {
                        data.truncate(rng.below(data.len() as u64) as usize);
                    }
                    2 => data.extend_from_slice(&rng.next().to_le_bytes()),
                    _ => {
                        let at = rng.below(data.len() as u64 + 1) as usize;
                        data.splice(at..at, [0xFF, 0x80, 0]);
                    }
                }
            }
            let caught = std::panic::catch_unwind(|| targets::run_one(name, &data));
            assert!(caught.is_ok(), "{path}, round {round}, breaks {name}");
        }
    }
}
