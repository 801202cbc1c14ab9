//! Counts connections against a limit, and knows when the server shall end and when it may.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The state that all threads share.
pub(crate) struct Drain {
    state: Mutex<State>,
    changed: Condvar,
    connections_max: usize,
}

struct State {
    connections: usize,
    began_at: Option<Instant>,
}

/// One connection's place; given back when dropped.
pub(crate) struct Slot(Arc<Drain>);

impl Drain {
    pub(crate) fn new(connections_max: usize) -> Drain {
        let state = State { connections: 0, began_at: None };
        Drain { state: Mutex::new(state), changed: Condvar::new(), connections_max }
    }

    /// Waits for a free place.
    pub(crate) fn acquire(self: &Arc<Drain>) -> Slot {
        let full = |state: &mut State| state.connections >= self.connections_max;
        let mut state = self.changed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        state.connections += 1;
        Slot(Arc::clone(self))
    }

    /// From now on the server is ending.
    pub(crate) fn begin(&self) {
        self.lock().began_at.get_or_insert_with(Instant::now);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.lock().began_at.is_some()
    }

    /// For how long the server has been ending, if it is.
    pub(crate) fn begun_for(&self) -> Option<Duration> {
        self.lock().began_at.map(|began_at| began_at.elapsed())
    }

    /// Waits until no connection is left; false if the time ran out first.
    pub(crate) fn wait_until_idle(&self, time_max: Duration) -> bool {
        let busy = |state: &mut State| state.connections > 0;
        let (_state, outcome) = self
            .changed
            .wait_timeout_while(self.lock(), time_max, busy)
            .unwrap_or_else(PoisonError::into_inner);
        !outcome.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.lock().connections -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_given_back() {
        let drain = Arc::new(Drain::new(2));
        let (first, second) = (drain.acquire(), drain.acquire());
        let waiting = std::thread::spawn({
            let drain = Arc::clone(&drain);
            move || drop(drain.acquire())
        });
        assert!(!drain.wait_until_idle(Duration::from_millis(1)));
        drop(first);
        waiting.join().unwrap();
        drop(second);
        assert!(drain.wait_until_idle(Duration::from_secs(60)));
    }

    #[test]
    fn a_drain_begins_once() {
        let drain = Drain::new(1);
        assert!(!drain.has_begun() && drain.begun_for().is_none());
        drain.begin();
        let began_at = drain.lock().began_at;
        drain.begin();
        assert_eq!(drain.lock().began_at, began_at);
    }
}
