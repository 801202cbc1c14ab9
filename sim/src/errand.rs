//! Something that the operator wants done once: the same request under one idempotency key, to any member, until it is told
//! that it is done.

use std::sync::{Arc, Mutex, PoisonError};

use axum::http::StatusCode;
use holdfast_model::api::Problem;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::api_member;
use crate::host::Host;

/// How long the operator waits for an answer before another member is asked, in milliseconds.
const PATIENCE_MS: std::ops::Range<u64> = 500..4000;

/// What a member said.
enum Said {
    Done,
    Later,
    Wrong(String),
}

/// An errand.
pub(crate) struct Errand {
    method: &'static str,
    path: String,
    json: Option<String>,
    key: String,
    secret: String,
    /// When it is asked for, the first time or again.
    next_ms: u64,
    said: Arc<Mutex<Vec<Said>>>,
}

impl Errand {
    /// An errand that begins at a time.
    pub(crate) fn new(
        at_ms: u64,
        secret: &str,
        key: String,
        method: &'static str,
        path: String,
        json: Option<String>,
    ) -> Self {
        Errand { method, path, json, key, secret: secret.to_owned(), next_ms: at_ms, said: Arc::default() }
    }

    /// One millisecond of it. Answers whether it is done.
    pub(crate) fn tick(&mut self, now_ms: u64, hosts: &[Host], rng: &mut StdRng) -> Result<bool, String> {
        let said = std::mem::take(&mut *self.said.lock().unwrap_or_else(PoisonError::into_inner));
        for said in said {
            match said {
                Said::Done => return Ok(true),
                Said::Later => self.next_ms = self.next_ms.min(now_ms + rng.random_range(20..200)),
                Said::Wrong(reason) => return Err(format!("{} {}: {reason}", self.method, self.path)),
            }
        }
        if self.next_ms > now_ms {
            return Ok(false);
        }
        self.next_ms = now_ms + rng.random_range(PATIENCE_MS);
        let members: Vec<&Host> = hosts.iter().filter(|host| host.api().is_some()).collect();
        if members.is_empty() {
            return Ok(false);
        }
        let host = members[rng.random_range(0..members.len())];
        let Some(member) = host.api().cloned() else { return Ok(false) };
        let request =
            api_member::request(self.method, &self.path, &self.secret, Some(&self.key), self.json.clone())?;
        let told = self.said.clone();
        host.spawn(async move {
            let said = match member.ask(request).await {
                Ok((status, body)) => judge(status, &body),
                Err(reason) => Said::Wrong(reason),
            };
            told.lock().unwrap_or_else(PoisonError::into_inner).push(said);
        });
        Ok(false)
    }
}

fn judge(status: StatusCode, body: &[u8]) -> Said {
    if status.is_success() {
        return Said::Done;
    }
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) if problem.retryable || status.is_server_error() => Said::Later,
        Ok(problem) => Said::Wrong(format!("refused: {problem:?}")),
        Err(error) => Said::Wrong(format!("{status} without a problem: {error}")),
    }
}
