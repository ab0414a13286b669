//! Everything ends: what goes on for minutes is told, with what repeats it, and ends the run.

use std::collections::BTreeMap;
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// Much longer than anything takes on a slow machine.
const LIMIT: Duration = Duration::from_secs(300);

type UnderWay = BTreeMap<u64, (Instant, String)>;
static UNDER_WAY: Mutex<(u64, UnderWay)> = Mutex::new((0, UnderWay::new()));

/// Something that is to end, and has when this is dropped.
pub struct Begun(u64);

pub fn begin(what: String) -> Begun {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| drop(std::thread::spawn(watch)));
    let mut under_way = UNDER_WAY.lock().expect("nobody panics with it");
    under_way.0 += 1;
    let number = under_way.0;
    under_way.1.insert(number, (Instant::now(), what));
    Begun(number)
}

impl Drop for Begun {
    fn drop(&mut self) {
        let mut under_way = UNDER_WAY.lock().expect("nobody panics with it");
        under_way.1.remove(&self.0);
    }
}

fn watch() {
    loop {
        std::thread::sleep(Duration::from_secs(5));
        let under_way = UNDER_WAY.lock().expect("nobody panics with it");
        for (since, what) in under_way.1.values() {
            if since.elapsed() > LIMIT {
                eprintln!("it does not end: {what}");
                std::process::exit(1);
            }
        }
    }
}
