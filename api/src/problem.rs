//! Every refusal as an RFC 9457 problem: a stable code, a sentence that says what to do, the request's id.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use holdfast_model::api::{PROBLEM_MEDIA_TYPE, Problem};
use holdfast_model::{Code, Rejection};
use holdfast_raft::{ConsensusError, Fault};
use holdfast_store::StoreError;
use std::collections::BTreeMap;

/// Why a request was not carried out. Turned into a [`Problem`] at the edge of the service, where the request's id
/// is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// The stable code.
    pub code: Code,
    /// One sentence: what happened and what to do.
    pub detail: String,
    /// More, by code.
    pub details: BTreeMap<String, String>,
}

impl Refusal {
    /// A refusal with this code and sentence.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), details: BTreeMap::new() }
    }

    /// The form of the request is wrong.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(Code::InvalidRequest, detail)
    }

    /// Absent, or outside the caller's scope: the same bytes for both (I9).
    pub fn not_found(what: &'static str) -> Self {
        Rejection::not_found(what).into()
    }

    /// A defect of ours. The cause goes to the log, never to the caller.
    pub fn internal(cause: &dyn std::error::Error) -> Self {
        let mut text = cause.to_string();
        let mut source = cause.source();
        while let Some(next) = source {
            text.push_str(": ");
            text.push_str(&next.to_string());
            source = next.source();
        }
        tracing::error!(cause = text, "a request failed for a reason of our own");
        Self::new(Code::Internal, "The server failed; the request id leads to its log.")
    }

    /// With one more detail.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.details.insert(key.to_owned(), value.to_string());
        self
    }

    /// The body for the request with this id.
    pub fn problem(&self, request_id: &str) -> Problem {
        Problem {
            r#type: format!("urn:holdfast:problem:{}", self.code),
            title: self.code.as_str().replace('_', " "),
            status: self.code.status(),
            detail: self.detail.clone(),
            code: self.code.as_str().to_owned(),
            request_id: request_id.to_owned(),
            retryable: self.code.retryable(),
            details: self.details.clone(),
        }
    }
}

impl From<Rejection> for Refusal {
    fn from(r: Rejection) -> Self {
        Self::new(r.code, r.message)
    }
}

impl From<StoreError> for Refusal {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Compacted { oldest, .. } => {
                Self::new(Code::Compacted, sentence(&e)).with("oldest", oldest)
            }
            StoreError::NoSuchRevision { head, .. } => {
                Self::new(Code::InvalidRequest, sentence(&e)).with("newest", head)
            }
            _ => Self::internal(&e),
        }
    }
}

impl From<ConsensusError> for Refusal {
    fn from(e: ConsensusError) -> Self {
        let code = match &e {
            ConsensusError::NoLeader | ConsensusError::ShuttingDown | ConsensusError::Unreachable(_) => {
                Code::Unavailable
            }
            ConsensusError::Unknown => Code::Timeout,
            ConsensusError::Busy => Code::RateLimited,
            ConsensusError::Stopped(Fault::Diverged { .. }) => Code::Diverged,
            ConsensusError::Stopped(Fault::Damaged(_)) => Code::Diverged,
            ConsensusError::Stopped(_) => Code::Unavailable,
            ConsensusError::UnknownMember(_) => Code::NotFound,
            ConsensusError::Invalid(_) => Code::InvalidRequest,
        };
        Self::new(code, sentence(&e))
    }
}

/// An error's words as a sentence for people.
pub(crate) fn sentence(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).chain((!text.ends_with('.')).then_some('.')).collect()
}

/// The answer carries its refusal as an extension; [`finish`] adds the request's id.
impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Writes the body of a refusal; leaves every other answer alone.
pub(crate) fn finish(response: Response, request_id: &str) -> Response {
    let Some(refusal) = response.extensions().get::<Refusal>().cloned() else { return response };
    let mut out = (response.status(), Json(refusal.problem(request_id))).into_response();
    out.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_MEDIA_TYPE));
    match refusal.code {
        Code::Unauthenticated => {
            out.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        code if code.retryable() => {
            out.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        _ => {}
    }
    out
}
