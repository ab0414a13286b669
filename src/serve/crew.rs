//! The threads of a session (a mount that is served, or a connection), whatever they do: how many there are, how they are ended, and why they ended.

use crate::{
    error::{Error, Kind, Result},
    sys::process,
};
use parking_lot::{Condvar, Mutex};
use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
    thread,
    time::{Duration, Instant},
};

/// Why a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// The mount is gone.
    Unmounted,
    /// It was told to, or the other side left.
    Stopped,
    /// Reading requests failed with this `errno`.
    Failed(i32),
}

/// All of them are interrupted by [`process::wake`] in whatever call they wait.
#[derive(Default)]
pub(super) struct Crew {
    stopping: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    call: Condvar,
}

#[derive(Default)]
struct State {
    /// Kernel's numbers of the running threads.
    running: Vec<i32>,
    /// Threads started and not ended.
    alive: usize,
    /// Of these, the ones that take requests; and the most there were.
    workers: usize,
    peak: usize,
    /// Threads that rest, and how many of them are called.
    resting: usize,
    called: usize,
    ended: Option<Ended>,
}

/// Why a thread rests no longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Woken {
    /// It was called.
    Called,
    /// Nobody called it for as long as it wanted to rest.
    Late,
    /// The session is to end.
    Stopping,
}

impl Crew {
    /// Starts a thread that takes requests. What `work` returns is why it ended, if that ends the session.
    pub(super) fn start(
        self: &Arc<Crew>,
        name: &str,
        work: impl FnOnce() -> Option<Ended> + Send + 'static,
    ) -> Result<()> {
        {
            let mut state = self.state.lock();
            state.workers += 1;
            state.peak = state.peak.max(state.workers);
        }
        let crew = Arc::clone(self);
        let started = self.start_beside(name, move || {
            let ended = work();
            crew.state.lock().workers -= 1;
            ended
        });
        if started.is_err() {
            self.state.lock().workers -= 1;
        }
        started
    }
    /// Starts a thread that takes none.
    pub(super) fn start_beside(
        self: &Arc<Crew>,
        name: &str,
        work: impl FnOnce() -> Option<Ended> + Send + 'static,
    ) -> Result<()> {
        self.state.lock().alive += 1;
        let crew = Arc::clone(self);
        let started = thread::Builder::new()
            .name(name.into())
            .stack_size(512 << 10)
            .spawn(move || {
                process::set_io_flusher();
                crew.state.lock().running.push(process::thread_id());
                let ended = work();
                crew.gone(ended);
            });
        started.map(|_| ()).map_err(|e| {
            self.gone(None);
            Error::new(Kind::Io, format!("cannot start a worker thread: {e}"))
        })
    }
    fn gone(&self, ended: Option<Ended>) {
        let tid = process::thread_id();
        let mut state = self.state.lock();
        state.running.retain(|&t| t != tid);
        state.alive -= 1;
        if state.ended.is_none() {
            state.ended = ended;
        }
        if state.ended.is_some() {
            // Those that rest do not hear of it otherwise.
            self.call.notify_all();
        }
        self.changed.notify_all();
    }
    /// Rests until it is called; if `most` is given, no longer than that.
    pub(super) fn rest(&self, most: Option<Duration>) -> Woken {
        let until = most.map(|most| Instant::now() + most);
        let mut state = self.state.lock();
        state.resting += 1;
        let woken = loop {
            if self.is_stopping() || state.ended.is_some() {
                break Woken::Stopping;
            }
            if state.called > 0 {
                state.called -= 1;
                break Woken::Called;
            }
            match until {
                None => self.call.wait(&mut state),
                Some(until) => {
                    if self.call.wait_until(&mut state, until).timed_out() && state.called == 0 {
                        break Woken::Late;
                    }
                }
            }
        };
        state.resting -= 1;
        woken
    }
    /// Calls one that rests, if one does.
    pub(super) fn call(&self) -> bool {
        let mut state = self.state.lock();
        if state.resting == state.called {
            return false;
        }
        state.called += 1;
        self.call.notify_one();
        true
    }
    /// Is the session to end, or did it?
    pub(super) fn is_over(&self) -> bool {
        self.is_stopping() || self.state.lock().ended.is_some()
    }
    /// Is the session to end?
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Acquire)
    }
    /// Waits until all have ended.
    pub(super) fn wait(&self) -> Ended {
        let mut state = self.state.lock();
        while state.alive > 0 {
            self.changed.wait(&mut state);
        }
        state.ended.unwrap_or(Ended::Stopped)
    }
    /// Why the session ended, if it did. One thread that failed is enough: what was its to serve waits for ever.
    pub(super) fn ended(&self) -> Option<Ended> {
        let state = self.state.lock();
        match state.ended {
            Some(Ended::Failed(errno)) => Some(Ended::Failed(errno)),
            ended if state.alive == 0 => Some(ended.unwrap_or(Ended::Stopped)),
            _ => None,
        }
    }
    /// Lets all end after what they have under way, as soon as they look; does not wait for that.
    pub(super) fn begin_stop(&self) {
        self.stopping.store(true, Release);
        let _state = self.state.lock();
        self.call.notify_all();
    }
    /// Ends all, after what they have under way.
    pub(super) fn stop(&self) -> Ended {
        self.begin_stop();
        let mut state = self.state.lock();
        while state.alive > 0 {
            for &tid in &state.running {
                process::wake(tid);
            }
            // One may have been between its look at `stopping` and its call: again, then.
            self.changed.wait_for(&mut state, Duration::from_millis(5));
        }
        *state.ended.get_or_insert(Ended::Stopped)
    }
    /// Threads that take requests now, and the most there were.
    pub(super) fn count(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.workers, state.peak)
    }
}
