//! To look at thousands of files, or to make them, takes less time by several threads.

use crate::error::Result;
use std::panic::resume_unwind;
use std::thread;

/// From so many on: to start threads for fewer would take longer.
const MANY: usize = 1000;

/// Threads at most: they wait for the kernel, which takes the directory's lock for each file.
const THREADS: usize = 8;

/// How many were done, one after the other, until one failed; and their results, or its error.
pub(super) type Until<R> = (usize, Result<Vec<R>>);

fn until_one_fails<T, R>(items: &[T], work: impl Fn(&T) -> Result<R>) -> Until<R> {
    let mut done = Vec::with_capacity(items.len());
    for item in items {
        match work(item) {
            Ok(result) => done.push(result),
            Err(e) => return (done.len(), Err(e)),
        }
    }
    (done.len(), Ok(done))
}

/// Does both for each of `items`: all of the first, then, if that went well, all of the second; side by side where they are many.
pub(super) fn both<T: Sync, R: Send>(
    items: &[T],
    first: impl Fn(&T) -> Result<R>,
    second: impl Fn(&T) -> Result<R> + Sync,
) -> (Until<R>, Until<R>) {
    if items.len() < MANY {
        let first = until_one_fails(items, first);
        let second = match first.1 {
            Ok(_) => until_one_fails(items, second),
            Err(_) => (0, Ok(Vec::new())),
        };
        return (first, second);
    }
    let second = &second;
    thread::scope(|scope| {
        let work = || until_one_fails(items, second);
        let other = thread::Builder::new().spawn_scoped(scope, work);
        let first = until_one_fails(items, first);
        match other.map(|other| other.join()) {
            Ok(Ok(second)) => (first, second),
            Ok(Err(panic)) => resume_unwind(panic),
            // There is no thread to be had.
            Err(_) => (first, until_one_fails(items, second)),
        }
    })
}

/// Does `work` for each of `items`; the results are in their order. In this order, and one after the other, unless there are many.
pub(super) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = match items.len() {
        0..MANY => 1,
        _ => thread::available_parallelism().map_or(1, |n| n.get().min(THREADS)),
    };
    if threads == 1 {
        return items.iter().map(work).collect();
    }
    let work = &work;
    thread::scope(|scope| {
        let parts: Vec<_> = items
            .chunks(items.len().div_ceil(threads))
            .map(|part| scope.spawn(move || part.iter().map(work).collect::<Vec<R>>()))
            .collect();
        let done = parts.into_iter().flat_map(|part| match part.join() {
            Ok(results) => results,
            Err(panic) => resume_unwind(panic),
        });
        done.collect()
    })
}
