//! The damage matrix: each file of a small store is flipped, cut, made longer, zeroed, mixed up with others, and removed. Whatever is done,
//! every read is right or refused with an error that names what is damaged; nothing panics, hangs, or takes memory without end.
//!
//! The suite runs a sample; `FORKDISK_DAMAGE=full cargo test --release --test check matrix` runs all of it.

use super::*;
use forkdisk::error::{Error, Kind};
use forkdisk::store::ObjectKind;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// What is done to the store.
#[derive(Clone, Debug)]
enum Damage {
    Flip { at: u64, mask: u8 },
    Cut { len: u64 },
    Longer { by: u64, with: u8 },
    Zero { at: u64, len: u64 },
    CopyFrom { other: String },
    Swap { other: String },
    SwapSlots { one: u64, other: u64 },
    Remove,
}

impl Damage {
    fn word(&self) -> &'static str {
        match self {
            Damage::Flip { .. } => "byte flipped",
            Damage::Cut { .. } => "cut",
            Damage::Longer { .. } => "made longer",
            Damage::Zero { .. } => "zeroed",
            Damage::CopyFrom { .. } => "another copied over it",
            Damage::Swap { .. } => "swapped with another",
            Damage::SwapSlots { .. } => "slots swapped",
            Damage::Remove => "removed",
        }
    }
    fn apply(&self, sim: &SimDisk, path: &str) {
        let read = |path: &str| sim.read_file(path).expect("a file");
        let write = |path: &str, bytes: &[u8]| sim.write_file(path, bytes).expect("write");
        match self {
            Damage::Flip { at, mask } => sim.flip(path, *at, *mask).expect("flip"),
            Damage::Cut { len } => sim.truncate_file(path, *len).expect("cut"),
            Damage::Longer { by, with } => {
                let mut bytes = read(path);
                bytes.resize(bytes.len() + *by as usize, *with);
                write(path, &bytes);
            }
            Damage::Zero { at, len } => {
                let mut bytes = read(path);
                let end = (at + len).min(bytes.len() as u64);
                bytes[(*at).min(end) as usize..end as usize].fill(0);
                write(path, &bytes);
            }
            Damage::CopyFrom { other } => write(path, &read(other)),
            Damage::Swap { other } => {
                let (one, two) = (read(path), read(other));
                write(path, &two);
                write(other, &one);
            }
            Damage::SwapSlots { one, other } => {
                let mut bytes = read(path);
                for i in 0..4096 {
                    bytes.swap((one * B) as usize + i, (other * B) as usize + i);
                }
                write(path, &bytes);
            }
            Damage::Remove => sim.remove_file(path).expect("remove"),
        }
    }
}

/// The store, and what each name may hold: one content, but for the disk that was not closed, `u`. Rot of its last commit looks like
/// a power cut, so its last flush but one is right, too, if its own file was damaged.
struct Subject {
    sim: SimDisk,
    contents: Contents,
    unclean: String,
    /// What `u` held at each of its flushes, the oldest first; the last one is in `contents`.
    flushed: Vec<Vec<u8>>,
}

fn subject() -> Subject {
    let (sim, mut contents) = small();
    let store = again(&sim, 2);
    fork(&store, "image", "u");
    let disk = open(&store, "u").expect("u");
    let mut flushed = Vec::new();
    disk.write(&[2; 3 * 4096], 0).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    flushed.push(common::read_all(&*disk).expect("read"));
    for n in 3..6u8 {
        disk.write(&[n; 5000], u64::from(n) * 4000).expect("write");
        disk.discard(u64::from(n) * B, 100).expect("discard");
        disk.flush().expect("flush");
        flushed.push(common::read_all(&*disk).expect("read"));
    }
    disk.write(&[9; 2 * 4096], 7 * B).expect("write");
    disk.flush().expect("flush");
    contents.insert("u".into(), common::read_all(&*disk).expect("read"));
    let sim = sim.crash_with(Policy::AllDropped);
    let unclean = format!("layers/{}.layer", store.resolve("u").expect("u").id);
    Subject {
        sim,
        contents,
        unclean,
        flushed,
    }
}

/// What became of a case.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Outcome {
    /// Everything is read and written rightly.
    Harmless,
    /// The last commit of the disk that was not closed is gone.
    Dropped,
    /// More of its commits are gone: that it was damaged in several places looks like nothing but an older power cut.
    Older,
    /// Something is refused.
    Refused,
}

/// Does what a user does with a damaged store.
fn judge(subject: &Subject, path: &str, damage: &Damage) -> Outcome {
    let story = format!("{path}: {damage:?}");
    let sim = subject.sim.crash_with(Policy::AllDone);
    damage.apply(&sim, path);
    let said = RefCell::new(String::new());
    let mut outcome = Outcome::Harmless;
    let mut told = |e: &Error| {
        let clear = matches!(
            e.kind(),
            Kind::Corrupt | Kind::Version | Kind::NoStore | Kind::NotFound | Kind::Busy
        );
        assert!(clear, "{story}: not a clear error: {e:?}");
        said.borrow_mut().push_str(&format!("{e:?}\n"));
        outcome = Outcome::Refused;
    };
    let open_store = |n: u64| Store::open_on(sim.root(), Path::new("/sim"), env(n << 20));
    match open_store(9) {
        Err(e) => told(&e),
        Ok(store) => {
            let mut lost = 0;
            let may_lose = match damage {
                _ if path != subject.unclean => 0,
                Damage::Flip { .. } | Damage::Longer { .. } | Damage::Zero { len: B, .. } => 1,
                _ => subject.flushed.len(),
            };
            let mut right = |name: &str, found: &[u8], expected: &[u8]| {
                if found != expected {
                    let mut older = subject.flushed.iter().rev().take(may_lose);
                    let at = older.position(|state| name == "u" && found == state);
                    let at = at.unwrap_or_else(|| panic!("{story}: wrong data in {name}"));
                    lost = lost.max(at + 1);
                }
            };
            match forkdisk::check::check(&store, None, &Quiet) {
                Ok(report) => {
                    for f in report.corruptions.iter().chain(&report.leaks) {
                        said.borrow_mut().push_str(&format!("{f:?}\n"));
                    }
                }
                Err(e) => told(&e),
            }
            for (name, expected) in &subject.contents {
                let read = store
                    .resolve(name)
                    .and_then(|object| common::read_all(&*store.open_cow(&object, false)?));
                match read {
                    Ok(found) => right(name, &found, expected),
                    Err(e) => told(&e),
                }
            }
            for (name, expected) in &subject.contents {
                let written = store.resolve(name).and_then(|object| {
                    if object.kind != ObjectKind::Disk {
                        return Ok(());
                    }
                    let disk = store.open_cow(&object, true)?;
                    let found = common::read_all(&*disk)?;
                    right(name, &found, expected);
                    let mut now = found;
                    now[2 * 4096 + 100..4 * 4096].fill(0x77);
                    disk.write(&now[2 * 4096 + 100..4 * 4096], 2 * B + 100)?;
                    disk.flush()?;
                    let read = common::read_all(&*disk)?;
                    assert!(read == now, "{story}: {name} lost what was written");
                    disk.close()?;
                    drop(disk);
                    // And again, as another process.
                    let disk = open_store(10)?.open_cow(&object, false)?;
                    assert!(
                        common::read_all(&*disk)? == now,
                        "{story}: {name} lost what was flushed"
                    );
                    Ok(())
                });
                if let Err(e) = written {
                    told(&e);
                }
            }
            outcome = match (lost, outcome) {
                (1, Outcome::Harmless) => Outcome::Dropped,
                (2.., Outcome::Harmless) => Outcome::Older,
                _ => outcome,
            };
        }
    }
    let said = said.into_inner();
    // The error, or at least `check`, says which file it is.
    if outcome == Outcome::Refused {
        let called = |path: &str| -> String {
            let file = path.strip_suffix(".layer").unwrap_or(path);
            match file.split('/').collect::<Vec<_>>()[..] {
                // Without it there is no store.
                ["forkdisk.toml"] if !said.contains("forkdisk.toml") => "no store at /sim".into(),
                ["bases", id, _] => id.into(),
                [.., last] => last.into(),
                [] => path.into(),
            }
        };
        let mut named = said.contains(&called(path));
        if let Damage::Swap { other } = damage {
            named |= said.contains(&called(other));
        }
        assert!(named, "{story}: nothing names it:\n{said}");
    }
    outcome
}

/// All damage that is done to a file; `full` or a sample.
fn damages(subject: &Subject, path: &str, full: bool) -> Vec<Damage> {
    let bytes = subject.sim.read_file(path).expect("a file");
    let len = bytes.len() as u64;
    let slots = len.div_ceil(B);
    let slot = |n: u64| &bytes[(n * B) as usize..((n + 1) * B).min(len) as usize];
    let used = |n: u64| slot(n).iter().any(|b| *b != 0);
    let layer = path.ends_with(".layer");
    let data = |n: u64| path.ends_with("image") || layer && n >= 1024 && !holds_map(slot(n));
    let mut all = Vec::new();
    for n in (0..slots).filter(|n| used(*n)) {
        for (i, byte) in slot(n).iter().enumerate() {
            let at = n * B + i as u64;
            // Data is covered by one sum: no byte of it is like no other.
            let step = match (full, data(n)) {
                (true, false) => 1,
                (true, true) => 61,
                (false, false) if *byte != 0 => 5,
                (false, false) => 97,
                (false, true) => 499,
            };
            if at.is_multiple_of(step) {
                let mask = 1 << (at % 8);
                all.push(Damage::Flip { at, mask });
                if full && !data(n) && *byte != 0 {
                    all.push(Damage::Flip { at, mask: !mask });
                }
            }
        }
    }
    // Holes: what nobody uses may be anything.
    let holes = (0..slots).filter(|n| !used(*n));
    let holes: Vec<u64> = holes.step_by(if full { 7 } else { 301 }).collect();
    all.extend(holes.iter().map(|n| Damage::Flip {
        at: n * B + n * 37 % slot(*n).len() as u64,
        mask: 0x10,
    }));
    let small = len <= 4 * B;
    let step = match (full, small) {
        (true, true) => 1,
        (true, false) => 512,
        (false, true) => 97,
        (false, false) => 4096 * 5 + 512,
    };
    all.extend((0..len).step_by(step).map(|len| Damage::Cut { len }));
    if layer {
        let cuts = (0..slots).filter(|n| used(*n) || *n < 6);
        all.extend(cuts.map(|n| Damage::Cut { len: n * B }));
    }
    for by in [1, 512, 4096, 5000, 1 << 20] {
        all.push(Damage::Longer { by, with: 0 });
        all.push(Damage::Longer { by, with: 0xA7 });
    }
    let zeros = (0..slots).filter(|n| used(*n));
    all.extend(zeros.map(|n| Damage::Zero { at: n * B, len: B }));
    all.push(Damage::Zero { at: 0, len });
    if layer {
        // As a filesystem that lost an extent.
        for (at, len) in [(1, 2), (1, 1023), (4, 1020), (1024, slots)] {
            all.push(Damage::Zero {
                at: at * B,
                len: len * B,
            });
        }
    }
    let interesting: Vec<u64> = (0..slots).filter(|n| used(*n)).collect();
    for (i, one) in interesting.iter().enumerate() {
        for other in &interesting[i + 1..] {
            let whole = (other + 1) * B <= len;
            if whole && slot(*one) != slot(*other) && (full || (one * 7 + other) % 5 == 0) {
                let (one, other) = (*one, *other);
                all.push(Damage::SwapSlots { one, other });
            }
        }
    }
    for other in subject.sim.file_names() {
        if other != path {
            let same = subject.sim.read_file(&other).expect("a file") == bytes;
            if !same {
                all.push(Damage::CopyFrom {
                    other: other.clone(),
                });
                if other.as_str() > path {
                    all.push(Damage::Swap { other });
                }
            }
        }
    }
    all.push(Damage::Remove);
    all
}

/// Is this slot the beginning of a run? (The runs here are one slot long.)
fn holds_map(slot: &[u8]) -> bool {
    slot.windows(8).any(|w| w == forkdisk::format::RUN_MAGIC)
}

#[test]
fn matrix() {
    let full = std::env::var("FORKDISK_DAMAGE").is_ok_and(|v| v == "full");
    let subject = subject();
    let mut cases: Vec<(String, Damage)> = Vec::new();
    for path in subject.sim.file_names() {
        // The lock has no contents that could be damaged; that it is gone is among the cases.
        for damage in damages(&subject, &path, full) {
            cases.push((path.clone(), damage));
        }
    }
    let next = AtomicUsize::new(0);
    let now: Mutex<BTreeMap<usize, Instant>> = Mutex::default();
    let counts: Mutex<BTreeMap<(&str, Outcome), u64>> = Mutex::default();
    let failed: Mutex<Vec<String>> = Mutex::default();
    let done = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let n = next.fetch_add(1, SeqCst);
                        let Some((path, damage)) = cases.get(n) else {
                            return;
                        };
                        now.lock().expect("no panic").insert(n, Instant::now());
                        let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                            judge(&subject, path, damage)
                        }));
                        now.lock().expect("no panic").remove(&n);
                        done.fetch_add(1, SeqCst);
                        match judged {
                            Ok(outcome) => {
                                let mut counts = counts.lock().expect("no panic");
                                *counts.entry((damage.word(), outcome)).or_default() += 1;
                            }
                            Err(_) => failed
                                .lock()
                                .expect("no panic")
                                .push(format!("{path}: {damage:?}")),
                        }
                    }
                })
            })
            .collect();
        // A case that hangs must be told by its name.
        while workers.iter().any(|w| !w.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            for (n, since) in &*now.lock().expect("no panic") {
                if since.elapsed() > Duration::from_secs(60) {
                    eprintln!("hangs: {:?}", cases[*n]);
                    std::process::abort();
                }
            }
        }
    });
    let counts = counts.into_inner().expect("no panic");
    for ((what, outcome), n) in &counts {
        println!("{what}: {n} {outcome:?}");
    }
    let sum = |o: Outcome| {
        counts
            .iter()
            .filter(|c| c.0.1 == o)
            .map(|c| c.1)
            .sum::<u64>()
    };
    println!(
        "{} cases over {} files: {} harmless, {} lost the last commit of an unclean disk, {} more of them, {} refused",
        done.load(SeqCst),
        subject.sim.file_names().len(),
        sum(Outcome::Harmless),
        sum(Outcome::Dropped),
        sum(Outcome::Older),
        sum(Outcome::Refused)
    );
    let failed = failed.into_inner().expect("no panic");
    assert!(failed.is_empty(), "{} cases: {failed:#?}", failed.len());
    assert!(sum(Outcome::Harmless) > 100 && sum(Outcome::Refused) > 500);
    assert!(sum(Outcome::Dropped) > 5);
}
