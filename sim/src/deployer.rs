//! Somebody who deploys: now and then another release, or another number of instances, through the API of any member.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use holdfast_model::{EnvId, ReleaseId};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::api_member;
use crate::host::Host;
use crate::trace::Trace;

/// Between two deployments, in milliseconds.
const PAUSE_MS: Range<u64> = 200..2_000;
/// The same where somebody thinks better of it at once.
const HASTE_MS: Range<u64> = 1..80;
/// How long an answer is waited for, in milliseconds.
const PATIENCE_MS: Range<u64> = 500..4_000;
/// Instances of the process at most.
const INSTANCES_MAX: u32 = 4;

/// What there is to deploy.
#[derive(Clone, Debug)]
pub(crate) struct Estate {
    pub(crate) env: EnvId,
    pub(crate) releases: Vec<ReleaseId>,
}

/// See the module.
pub(crate) struct Deployer {
    rng: StdRng,
    secret: String,
    estate: Estate,
    /// When the next request is begun.
    next_ms: u64,
    asked: u64,
    asking: Option<Asking>,
    told: Arc<Mutex<Option<(u64, StatusCode)>>>,
    open: bool,
}

struct Asking {
    path: String,
    body: String,
    again_ms: u64,
}

impl Deployer {
    pub(crate) fn new(seed: u64, secret: String, estate: Estate) -> Self {
        Deployer {
            rng: StdRng::seed_from_u64(seed),
            secret,
            estate,
            next_ms: 0,
            asked: 0,
            asking: None,
            told: Arc::default(),
            open: true,
        }
    }

    /// From now on only what was begun is brought to its end.
    pub(crate) fn close(&mut self) {
        self.open = false;
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.asking.is_none()
    }

    /// One millisecond.
    pub(crate) fn tick(&mut self, now_ms: u64, hosts: &[Host], trace: &mut Trace) -> Result<(), String> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((number, status)) = told.filter(|(number, _)| *number == self.asked) {
            trace.line(now_ms, format_args!("deployment {number} is told {status}"));
            if status.is_server_error() {
                let soon = now_ms + self.rng.random_range(5..100);
                self.asking.iter_mut().for_each(|asking| asking.again_ms = asking.again_ms.min(soon));
            } else if status.is_success() {
                self.asking = None;
                let pause = if self.rng.random_bool(0.3) { HASTE_MS } else { PAUSE_MS };
                self.next_ms = now_ms + self.rng.random_range(pause);
            } else {
                return Err(format!("deployment {number} is refused with {status}"));
            }
        }
        if self.asking.is_none() && self.open && now_ms >= self.next_ms {
            self.choose(now_ms, trace);
        }
        self.send(now_ms, hosts)
    }

    fn choose(&mut self, now_ms: u64, trace: &mut Trace) {
        self.asked += 1;
        let env = self.estate.env;
        let count = self.rng.random_range(0..=INSTANCES_MAX);
        // The first one is a roll-out: before it there is nothing to scale.
        let (path, body) = if self.asked == 1 || self.rng.random_bool(0.6) {
            let release = self.estate.releases[self.rng.random_range(0..self.estate.releases.len())];
            let counts =
                if self.rng.random_bool(0.5) { format!("{{\"web\":{count}}}") } else { "{}".to_owned() };
            let body = format!("{{\"release\":\"{release}\",\"counts\":{counts}}}");
            (format!("/v1/envs/{env}/deployments"), body)
        } else {
            (format!("/v1/envs/{env}/scale"), format!("{{\"counts\":{{\"web\":{count}}}}}"))
        };
        trace.line(now_ms, format_args!("deployment {} asks {path} {body}", self.asked));
        self.asking = Some(Asking { path, body, again_ms: now_ms });
    }

    fn send(&mut self, now_ms: u64, hosts: &[Host]) -> Result<(), String> {
        let Some(asking) = self.asking.as_mut().filter(|asking| asking.again_ms <= now_ms) else {
            return Ok(());
        };
        let members: Vec<&Host> = hosts.iter().filter(|host| host.api().is_some()).collect();
        asking.again_ms = now_ms + self.rng.random_range(PATIENCE_MS);
        if members.is_empty() {
            asking.again_ms = now_ms + 20;
            return Ok(());
        }
        let host = members[self.rng.random_range(0..members.len())];
        let Some(api) = host.api().cloned() else { return Ok(()) };
        let key = format!("deployment-{}", self.asked);
        let body = Some(asking.body.clone());
        let request = api_member::request("POST", &asking.path, &self.secret, Some(&key), body)?;
        let (told, number) = (Arc::clone(&self.told), self.asked);
        host.spawn(async move {
            if let Ok((status, _)) = api.ask(request).await {
                *told.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, status));
            }
        });
        Ok(())
    }
}
