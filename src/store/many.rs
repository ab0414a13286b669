//! Looking at thousands of files takes less time by several threads.

use std::panic::resume_unwind;
use std::thread;

/// From so many on: to start threads for fewer would take longer.
const MANY: usize = 1000;

/// Threads at most: they wait for the kernel, which takes the directory's lock for each file.
const THREADS: usize = 8;

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
