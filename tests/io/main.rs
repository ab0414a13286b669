//! The seam's promises, held against the real disk and the imaginary one alike (`both`), and the imaginary disk's own
//! (`sim`): that it can do to un-synced changes all that a real disk could.

mod both;
mod sim;

use forkdisk::{
    error::{Kind, Result},
    io::{Dir, File},
};
use std::sync::Arc;

const K4: usize = 4096;

#[track_caller]
fn kind<T>(result: Result<T>) -> Kind {
    match result {
        Ok(_) => panic!("this should have failed"),
        Err(e) => e.kind(),
    }
}

fn contents(file: &Arc<dyn File>) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn names(dir: &Arc<dyn Dir>) -> Vec<String> {
    let mut names: Vec<String> = dir.list().unwrap().into_iter().map(|(n, _)| n).collect();
    names.sort();
    names
}
