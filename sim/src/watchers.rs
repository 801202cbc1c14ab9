//! Clients that follow the history: each a stream of events from one member, cut and taken up again at another.
//!
//! Whatever happens to members, a watcher sees every event once and in order, and the same events as every other watcher
//! and as the history has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use holdfast_model::api::Problem;
use holdfast_model::{Code, Digest, Event, Revision};
use holdfast_store::Store;
use http_body_util::BodyExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::AbortHandle;

use crate::api_member::{self, ApiMember};
use crate::host::Host;
use crate::trace::Trace;

/// How many follow.
const WATCHERS: usize = 2;
/// How long one stream is followed, in milliseconds, before its watcher leaves for another member.
const STAY_MS: std::ops::Range<u64> = 100..8_000;
/// Between two streams, in milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 1..300;

/// All watchers.
pub(crate) struct Watchers {
    rng: StdRng,
    secret: String,
    watchers: Vec<Watcher>,
    /// The digest of each event's line, as the first watcher got it.
    seen: BTreeMap<Revision, Digest>,
    events: u64,
    streams: u64,
    /// Whether watchers leave streams that work.
    restless: bool,
}

struct Watcher {
    /// The last revision that it saw.
    last: Revision,
    stream: Option<Stream>,
    /// When it begins a stream, or leaves the one it has.
    next_ms: u64,
}

struct Stream {
    host: u64,
    heard: Arc<Mutex<Heard>>,
    task: Option<AbortHandle>,
}

#[derive(Default)]
struct Heard {
    lines: Vec<Vec<u8>>,
    ended: Option<End>,
}

/// Why a stream ended.
#[derive(Debug)]
enum End {
    /// The member is gone, or ended it.
    Cut,
    /// It never began: the member said so.
    Refused(Problem),
    /// What it said has no form.
    Wrong(String),
}

impl Watchers {
    pub(crate) fn new(seed: u64, secret: String) -> Self {
        let watcher = || Watcher { last: Revision(0), stream: None, next_ms: 0 };
        Watchers {
            rng: StdRng::seed_from_u64(seed),
            secret,
            watchers: (0..WATCHERS).map(|_| watcher()).collect(),
            seen: BTreeMap::new(),
            events: 0,
            streams: 0,
            restless: true,
        }
    }

    /// Events that were seen, and streams that were begun.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.events, self.streams)
    }

    /// From now on they leave only streams that end.
    pub(crate) fn rest(&mut self) {
        self.restless = false;
    }

    /// Whether all have seen everything up to a revision.
    pub(crate) fn have_seen(&self, revision: Revision) -> bool {
        self.watchers.iter().all(|watcher| watcher.last >= revision)
    }

    /// One millisecond of all watchers.
    pub(crate) fn tick(&mut self, now_ms: u64, hosts: &[Host], trace: &mut Trace) -> Result<(), String> {
        for number in 0..self.watchers.len() {
            self.hear(number, now_ms, hosts, trace)?;
            if self.watchers[number].next_ms > now_ms {
                continue;
            }
            match self.watchers[number].stream.take() {
                Some(stream) if !self.restless => self.watchers[number].stream = Some(stream),
                Some(stream) => {
                    // What was on its way is lost to it; it asks again from where it is.
                    stream.task.iter().for_each(AbortHandle::abort);
                    self.watchers[number].next_ms = now_ms + self.rng.random_range(PAUSE_MS);
                }
                None => self.begin(number, now_ms, hosts, trace),
            }
        }
        Ok(())
    }

    fn begin(&mut self, number: usize, now_ms: u64, hosts: &[Host], trace: &mut Trace) {
        let watcher = &mut self.watchers[number];
        let members: Vec<&Host> = hosts.iter().filter(|host| host.api().is_some()).collect();
        watcher.next_ms = now_ms + self.rng.random_range(PAUSE_MS);
        if members.is_empty() {
            return;
        }
        let host = members[self.rng.random_range(0..members.len())];
        let Some(member) = host.api().cloned() else { return };
        // Now and then it wants to read again what it has read.
        if self.rng.random_bool(0.1) {
            watcher.last = Revision(self.rng.random_range(0..=watcher.last.0));
        }
        let stale = self.rng.random_bool(0.5);
        watcher.next_ms = now_ms + self.rng.random_range(STAY_MS);
        self.streams += 1;
        trace.line(now_ms, format_args!("watcher {number} follows host {} after {}", host.id, watcher.last));
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (after, secret, ends) = (watcher.last, self.secret.clone(), Ends(heard.clone()));
        let task = host.spawn(async move {
            let end = follow(&member, &secret, after, stale, &ends).await;
            ends.say(end);
        });
        watcher.stream = Some(Stream { host: host.id, heard, task });
    }

    fn hear(&mut self, number: usize, now_ms: u64, hosts: &[Host], trace: &mut Trace) -> Result<(), String> {
        let watcher = &mut self.watchers[number];
        let Some(stream) = &watcher.stream else { return Ok(()) };
        let Heard { lines, ended } =
            std::mem::take(&mut *stream.heard.lock().unwrap_or_else(PoisonError::into_inner));
        for line in lines {
            let event: Event = serde_json::from_slice(&line)
                .map_err(|e| format!("watcher {number} got a line that is no event: {e}"))?;
            let (revision, digest) = (event.revision, Digest::of(&line));
            trace.line(now_ms, format_args!("watcher {number} sees {revision} {digest}"));
            if revision != watcher.last.next() {
                return Err(format!(
                    "watch: watcher {number} got revision {revision} after {} from host {}",
                    watcher.last, stream.host
                ));
            }
            if *self.seen.entry(revision).or_insert(digest) != digest {
                return Err(format!("watch: host {} sent another event as revision {revision}", stream.host));
            }
            watcher.last = revision;
            self.events += 1;
        }
        match ended {
            None => return Ok(()),
            Some(End::Wrong(reason)) => return Err(format!("watch: host {} sent {reason}", stream.host)),
            Some(End::Refused(problem)) => {
                let host = hosts.iter().find(|host| host.id == stream.host);
                judge_refusal(&problem, watcher.last, host)
                    .map_err(|reason| format!("watch: host {} said {problem:?}: {reason}", stream.host))?;
            }
            Some(End::Cut) => {}
        }
        watcher.stream = None;
        watcher.next_ms = now_ms + self.rng.random_range(PAUSE_MS);
        Ok(())
    }

    /// Whether what was seen is the history of this member.
    pub(crate) fn judge(&self, store: &Store) -> Result<(), String> {
        let view = store.view().map_err(|e| e.to_string())?;
        for (revision, digest) in &self.seen {
            let event = view.event(*revision).map_err(|e| e.to_string())?;
            let line =
                event.map(|event| serde_json::to_vec(&event)).transpose().map_err(|e| e.to_string())?;
            if line.map(|line| Digest::of(&line)) != Some(*digest) {
                return Err(format!("watch: revision {revision} was seen otherwise than the history has it"));
            }
        }
        Ok(())
    }
}

/// A stream may be refused for a while. It may never be said to be compacted when its events are held.
fn judge_refusal(problem: &Problem, after: Revision, host: Option<&Host>) -> Result<(), &'static str> {
    if problem.code == Code::Compacted.as_str() {
        let store = host.and_then(Host::member).map(|member| member.store());
        let held = store.and_then(|store| store.view().ok()?.first_held().ok()?);
        return match held {
            Some(first) if after.next() >= first => Err("the events after it are held"),
            _ => Ok(()),
        };
    }
    let excused = host.is_none_or(|host| host.may_fail() || host.member().is_none());
    if problem.retryable || (problem.status == 500 && excused) { Ok(()) } else { Err("that is no reason") }
}

/// Says that a stream ended, also when its task is dropped with its host.
struct Ends(Arc<Mutex<Heard>>);

impl Ends {
    fn say(&self, end: End) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).ended.get_or_insert(end);
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        self.say(End::Cut);
    }
}

async fn follow(member: &ApiMember, secret: &str, after: Revision, stale: bool, ends: &Ends) -> End {
    let consistency = if stale { "stale" } else { "linearizable" };
    let path = format!("/v1/events?follow=true&after={after}&consistency={consistency}");
    let request = match api_member::request("GET", &path, secret, None, None) {
        Ok(request) => request,
        Err(reason) => return End::Wrong(reason),
    };
    let (status, mut body) = member.send(request).await;
    if status != StatusCode::OK {
        let Ok(whole) = body.collect().await else { return End::Cut };
        return match serde_json::from_slice(&whole.to_bytes()) {
            Ok(problem) => End::Refused(problem),
            Err(error) => End::Wrong(format!("{status} without a problem: {error}")),
        };
    }
    let mut rest = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        let Some(bytes) = frame.data_ref() else { continue };
        rest.extend_from_slice(bytes);
        let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
        let whole: Vec<u8> = rest.drain(..=end).collect();
        // An empty line keeps the stream alive.
        let lines = whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec);
        ends.0.lock().unwrap_or_else(PoisonError::into_inner).lines.extend(lines);
    }
    End::Cut
}
