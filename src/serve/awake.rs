//! Processors stay awake while requests are served one after the other.
//!
//! A request passes through three or four threads, which wait for each other and for the disk. On a virtual machine a processor that waits is given back to the hypervisor, and to
//! get it again takes 30 to 50 us each time: longer than everything else that is done for the request. Where so many requests are under way that no processor idles, nothing is
//! changed by it.
//!
//! The kernel is asked for it ([`Latency`]), for all processors of the machine; so it is done by itself only where they are few and a hypervisor has them ([`Mode::Auto`]). A thread takes the wish back as soon as no such requests come
//! any more; if the process dies, the kernel does.

use crate::sys::{
    latency::{self, Latency},
    process,
};
use parking_lot::{Condvar, Mutex};
use std::{
    io,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};

/// Requests follow each other if there is no more time between the ends of two, of whatever disks. Where each takes longer (a disk that turns, a network) little is gained by it.
const QUICK: Duration = Duration::from_millis(1);
/// So many of them in a row are worth it.
const ROW: u32 = 16;
/// Without one for so long it is over.
const OVER: Duration = Duration::from_millis(2);
/// [`Mode::Auto`] is for machines of so many processors at most: all of them stay awake for one disk.
const MOST: usize = 8;

/// When it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// On a guest of KVM with no more than 8 processors.
    #[default]
    Auto,
    /// On any machine.
    On,
    /// Never.
    Off,
}

impl Mode {
    /// What a word says.
    pub fn of(word: &str) -> Option<Mode> {
        match word {
            "auto" | "" => Some(Mode::Auto),
            "on" | "1" => Some(Mode::On),
            "off" | "0" => Some(Mode::Off),
            _ => None,
        }
    }
    /// Is it done on this machine?
    pub fn is_meant(self) -> bool {
        match self {
            Mode::Auto => latency::is_guest() && process::cpus("online").len() <= MOST,
            Mode::On => true,
            Mode::Off => false,
        }
    }
}

/// See the module.
pub struct Awake {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    latency: Latency,
    began: Instant,
    /// When the last request ended, in nanoseconds since `began` (not exactly, while processors are kept awake); how many there were in a row.
    last: AtomicU64,
    row: AtomicU32,
    /// As in `state`, to be looked at without the lock.
    held: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Since when processors are kept awake, if they are.
    since: Option<Instant>,
    /// How long they were, before that.
    total: Duration,
    ends: bool,
    /// The kernel did not take the wish: it is not asked again.
    fails: bool,
}

impl Awake {
    /// Never.
    pub fn off() -> Awake {
        Awake { inner: None }
    }
    /// From now on, if it is [meant](Mode::is_meant). Fails if the kernel does not let us.
    pub fn begin(mode: Mode) -> io::Result<Awake> {
        if !mode.is_meant() {
            return Ok(Awake::off());
        }
        Awake::with(Latency::open()?)
    }
    fn with(latency: Latency) -> io::Result<Awake> {
        let inner = Arc::new(Inner {
            latency,
            began: Instant::now(),
            last: AtomicU64::new(0),
            row: AtomicU32::new(0),
            held: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let watched = Arc::clone(&inner);
        thread::Builder::new()
            .name("awake".into())
            .stack_size(64 << 10)
            .spawn(move || watched.watch())?;
        Ok(Awake { inner: Some(inner) })
    }
    /// A request was served.
    pub(super) fn served(&self) {
        if let Some(inner) = &self.inner {
            inner.one_more(inner.now());
        }
    }
    /// How long processors were kept awake in all, if that may be done.
    pub fn total(&self) -> Option<Duration> {
        let state = self.inner.as_ref()?.state.lock();
        Some(state.total + state.since.map_or(Duration::ZERO, |since| since.elapsed()))
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        if let Some(inner) = &self.inner {
            inner.state.lock().ends = true;
            inner.changed.notify_all();
        }
    }
}

impl Inner {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
    /// A request ended now.
    fn one_more(&self, now: u64) {
        // Relaxed, and not in one step: of two that end at one time it does not matter which counts.
        let before = self.last.load(Relaxed);
        let since = Duration::from_nanos(now.saturating_sub(before));
        if self.held.load(Relaxed) {
            // Not each time: all who serve would write to one place.
            if since > OVER / 8 {
                self.last.store(now, Relaxed);
            }
            return;
        }
        self.last.store(now, Relaxed);
        let row = match since > QUICK {
            true => 1,
            false => self.row.load(Relaxed).saturating_add(1),
        };
        self.row.store(row, Relaxed);
        if row >= ROW {
            self.hold();
        }
    }
    fn hold(&self) {
        let Some(mut state) = self.state.try_lock() else {
            return;
        };
        if state.since.is_none() && !state.fails {
            if let Err(e) = self.latency.awake() {
                tracing::warn!("processors are not kept awake any more: {e}");
                state.fails = true;
                return;
            }
            state.since = Some(Instant::now());
            self.held.store(true, Release);
            self.changed.notify_one();
        }
    }
    /// Takes the wish back in time, until the end.
    fn watch(&self) {
        process::set_io_flusher();
        let mut state = self.state.lock();
        while !state.ends {
            let Some(since) = state.since else {
                self.changed.wait(&mut state);
                continue;
            };
            // Whoever ends us need not wait for more than this.
            self.changed.wait_for(&mut state, OVER);
            let over = self.now().saturating_sub(self.last.load(Acquire)) > OVER.as_nanos() as u64;
            if over || state.ends {
                let _ = self.latency.sleep();
                state.total += since.elapsed();
                state.since = None;
                self.row.store(0, Relaxed);
                self.held.store(false, Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    /// The wishes that were told.
    fn wishes(path: &Path) -> Vec<i32> {
        let told = fs::read(path).unwrap();
        let words = told.chunks(4);
        words
            .map(|w| i32::from_ne_bytes(w.try_into().unwrap()))
            .collect()
    }
    fn patiently(mut met: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !met() {
            assert!(Instant::now() < until, "it never is");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn requests_in_a_row_keep_processors_awake_until_none_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latency");
        fs::write(&path, "").unwrap();
        let awake = Awake::with(Latency::at(&path).unwrap()).unwrap();
        let inner = awake.inner.clone().unwrap();
        // Such as are rare.
        for n in 1..100 {
            inner.one_more(n * 1_100_000);
        }
        assert_eq!(
            (wishes(&path).len(), awake.total()),
            (0, Some(Duration::ZERO))
        );
        // After a pause.
        let begin = 120_000_000;
        for n in 1..ROW {
            inner.one_more(begin + u64::from(n));
        }
        assert_eq!(wishes(&path).len(), 0, "one is missing");
        inner.one_more(begin + 100);
        let awake_at = wishes(&path)[0];
        assert!((0..10).contains(&awake_at), "{awake_at}");
        patiently(|| wishes(&path).len() == 2);
        assert_eq!(wishes(&path)[1], -1);
        let total = awake.total().unwrap();
        assert!(total > Duration::ZERO);
        thread::sleep(Duration::from_millis(5));
        assert_eq!(awake.total(), Some(total), "it is over");
    }

    #[test]
    fn the_end_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latency");
        fs::write(&path, "").unwrap();
        let awake = Awake::with(Latency::at(&path).unwrap()).unwrap();
        let inner = awake.inner.clone().unwrap();
        inner.hold();
        // As if requests came for ever.
        inner.last.store(u64::MAX / 2, Relaxed);
        thread::sleep(Duration::from_millis(10));
        assert_eq!(wishes(&path).len(), 1);
        drop(awake);
        patiently(|| wishes(&path).len() == 2);
        patiently(|| Arc::strong_count(&inner) == 1);
    }

    #[test]
    fn words() {
        let modes = ["auto", "on", "off", "1", "0", "yes"].map(Mode::of);
        let (on, off) = (Some(Mode::On), Some(Mode::Off));
        assert_eq!(modes, [Some(Mode::Auto), on, off, on, off, None]);
        assert!(Mode::On.is_meant() && !Mode::Off.is_meant());
    }
}
