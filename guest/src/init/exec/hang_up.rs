//! How a program goes that nobody is connected to any more: HUP, then TERM, then KILL, to every process of its session.
//!
//! A process that made a session of its own is let alone, as after `ssh` and `nohup`; it can do nothing that the
//! workload could not.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

/// From HUP to TERM.
const TERM_AFTER: Duration = Duration::from_secs(5);

/// From HUP to KILL.
const KILL_AFTER: Duration = Duration::from_secs(30);

/// A session that is to go.
#[derive(Debug)]
pub(super) struct HangUp {
    session: Pid,
    begun_at: Instant,
    termed: bool,
}

impl HangUp {
    /// Sends HUP, or KILL at once; `None` when nothing is left to wait for.
    pub(super) fn begin(session: Pid, kill: bool) -> Option<Self> {
        let signal = if kill { Signal::KILL } else { Signal::HUP };
        let any = signal_session(session, signal);
        (any && !kill).then(|| Self { session, begun_at: Instant::now(), termed: false })
    }

    /// Sends what is due; false when it is done.
    pub(super) fn keep(&mut self, now: Instant) -> bool {
        if now >= self.begun_at + KILL_AFTER {
            signal_session(self.session, Signal::KILL);
            return false;
        }
        if !self.termed && now >= self.begun_at + TERM_AFTER {
            self.termed = true;
            return signal_session(self.session, Signal::TERM);
        }
        true
    }

    pub(super) fn next_deadline(&self) -> Instant {
        self.begun_at + if self.termed { KILL_AFTER } else { TERM_AFTER }
    }
}

/// A signal to each process of a session; whether there was one. The session's number is a process id that cannot be
/// given anew while one of its processes is there.
pub(super) fn signal_session(session: Pid, signal: Signal) -> bool {
    let mut any = false;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if session_of(&stat) != Some(session.as_raw_nonzero().get()) {
            continue;
        }
        if let Some(pid) = Pid::from_raw(pid) {
            // One that has just ended is no longer there to be signalled.
            any |= rustix::process::kill_process(pid, signal).is_ok();
        }
    }
    any
}

/// The session in a `/proc/…/stat`, of a process that is no zombie. The name in it may hold anything, and ends at the
/// last bracket.
fn session_of(stat: &str) -> Option<i32> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    // Parent and process group come before it.
    fields.nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_read_past_names_that_try_to_look_like_one() {
        assert_eq!(session_of("12 (sh) S 1 12 7 34816"), Some(7));
        assert_eq!(session_of("12 (a) S 1 2 3) R 1 12 9 0"), Some(9));
        assert_eq!(session_of("12 (sh) Z 1 12 7 0"), None);
        for bad in ["", "12 (sh", "12 (sh) S", "12 (sh) S 1 2", "12 (sh) S 1 2 x"] {
            assert_eq!(session_of(bad), None, "{bad}");
        }
    }
}
