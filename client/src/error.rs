//! What can go wrong between a client and the cluster, and what a command's exit code says about it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

use holdfast_model::api::Problem;

/// Longest piece of a foreign error body that is shown, in characters.
const BODY_SHOWN_MAX: usize = 200;

/// A refusal by the API: an RFC 9457 problem.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The stable code, such as `name_taken`.
    pub code: String,
    /// The kind in words.
    pub title: String,
    /// What happened and what to do.
    pub detail: String,
    /// Names the request in the servers' logs.
    pub request_id: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// More, by code.
    pub details: BTreeMap<String, String>,
}

impl ApiError {
    /// Reads the body of a refusal; a body that is no problem still becomes an error that says what is known.
    pub(crate) fn decode(status: u16, request_id: Option<&str>, body: &[u8]) -> ApiError {
        match serde_json::from_slice::<Problem>(body) {
            Ok(problem) => ApiError {
                status,
                code: problem.code,
                title: problem.title,
                detail: problem.detail,
                request_id: problem.request_id,
                retryable: problem.retryable,
                details: problem.details,
            },
            Err(_) => ApiError {
                status,
                code: format!("http_{status}"),
                title: "the server refused the request".into(),
                detail: String::from_utf8_lossy(body)
                    .chars()
                    .filter(|character| !character.is_control())
                    .take(BODY_SHOWN_MAX)
                    .collect(),
                request_id: request_id.unwrap_or_default().to_owned(),
                retryable: matches!(status, 429 | 502 | 503 | 504),
                details: BTreeMap::new(),
            },
        }
    }

    fn exit_code(&self) -> u8 {
        match (self.code.as_str(), self.status) {
            _ if self.retryable => exit::TRANSIENT,
            ("invalid_request" | "invalid_manifest", _) => exit::USAGE,
            (_, 401 | 403) => exit::AUTHENTICATION,
            (_, 404 | 410) => exit::NOT_FOUND,
            (_, 409 | 412) => exit::CONFLICT,
            (_, 429 | 502..=504) => exit::TRANSIENT,
            (_, 500..) => exit::INTERNAL,
            _ => exit::FAILURE,
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = if self.detail.is_empty() { &self.title } else { &self.detail };
        write!(f, "{text} ({}", self.code)?;
        if !self.request_id.is_empty() {
            write!(f, ", request {}", self.request_id)?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for ApiError {}

/// Exit codes of the command line, by what went wrong.
pub mod exit {
    /// Something else.
    pub const FAILURE: u8 = 1;
    /// The command or its input is wrong.
    pub const USAGE: u8 = 2;
    /// Not logged in, or not permitted.
    pub const AUTHENTICATION: u8 = 3;
    /// It does not exist.
    pub const NOT_FOUND: u8 = 4;
    /// It conflicts with what exists.
    pub const CONFLICT: u8 = 5;
    /// The same command may succeed later.
    pub const TRANSIENT: u8 = 6;
    /// A defect.
    pub const INTERNAL: u8 = 7;
}

/// Why one attempt at one endpoint got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The host has no address.
    #[error("The host of {endpoint} could not be resolved.")]
    Resolve {
        /// The endpoint.
        endpoint: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nothing accepts connections there.
    #[error("{endpoint} could not be connected to.")]
    Connect {
        /// The endpoint.
        endpoint: String,
        /// What the system said.
        source: io::Error,
    },
    /// TLS failed: most often another cluster's server, or a clock that is wrong.
    #[error("{endpoint} did not prove to be a member of this cluster, or refused this client's certificate.")]
    Tls {
        /// The endpoint.
        endpoint: String,
        /// What TLS said.
        source: io::Error,
    },
    /// The peer does not speak HTTP/2.
    #[error("{endpoint} does not speak HTTP/2, so it is not an API port; check the port.")]
    NotHttp2 {
        /// The endpoint.
        endpoint: String,
    },
    /// The connection broke.
    #[error("The connection to {endpoint} broke.")]
    Http {
        /// The endpoint.
        endpoint: String,
        /// What HTTP said.
        source: hyper::Error,
    },
    /// The other side takes nothing more.
    #[error("{endpoint} closed the stream.")]
    Closed {
        /// The endpoint.
        endpoint: String,
    },
    /// The endpoint took too long.
    #[error("{endpoint} did not answer within {} ms.", after.as_millis())]
    Timeout {
        /// The endpoint.
        endpoint: String,
        /// How long was waited.
        after: Duration,
    },
}

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The API refused it.
    #[error(transparent)]
    Api(Box<ApiError>),
    /// No endpoint answered.
    #[error("No member answered after {attempts} attempts; check the endpoints and the network.")]
    Unreachable {
        /// How often it was tried.
        attempts: u32,
        /// How the last attempt failed.
        source: TransportError,
    },
    /// There is nowhere to send it.
    #[error("No endpoint is configured; log in with `holdfast login`.")]
    NoEndpoints,
    /// The answer is not what this client expects.
    #[error("The answer could not be understood; the server may be of another version.")]
    Answer(#[source] serde_json::Error),
    /// The request could not be written as JSON.
    #[error("The request could not be encoded; report this as a defect.")]
    Encode(#[source] serde_json::Error),
    /// The path or a header is malformed.
    #[error("The request is malformed; check names and ids for characters that do not belong.")]
    Request(#[source] hyper::http::Error),
    /// The answer is larger than any that this client takes.
    #[error("The answer is larger than {limit} bytes; ask for less at a time.")]
    TooLarge {
        /// The bound, in bytes.
        limit: usize,
    },
    /// A stream ended or broke.
    #[error("The stream broke; what came before is complete. Run the command again to go on.")]
    Stream(#[source] TransportError),
    /// A frame of an exec session.
    #[error("The exec session cannot go on.")]
    Exec(#[source] holdfast_model::exec::ExecFrameError),
    /// TLS could not be set up.
    #[error("TLS could not be set up for this cluster.")]
    Tls(#[from] holdfast_identity::TlsError),
    /// The cluster's id cannot be a server name.
    #[error("The cluster's name cannot be verified.")]
    Name(#[from] holdfast_identity::SubjectError),
}

impl From<ApiError> for ClientError {
    fn from(error: ApiError) -> ClientError {
        ClientError::Api(Box::new(error))
    }
}

impl ClientError {
    /// The exit code that a command ends with.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Api(api) => api.exit_code(),
            ClientError::Unreachable { source: TransportError::Tls { .. }, .. } => exit::AUTHENTICATION,
            ClientError::Unreachable { .. } | ClientError::Stream(_) => exit::TRANSIENT,
            ClientError::NoEndpoints | ClientError::Request(_) => exit::USAGE,
            ClientError::TooLarge { .. } | ClientError::Tls(_) | ClientError::Name(_) => exit::FAILURE,
            ClientError::Answer(_) | ClientError::Encode(_) | ClientError::Exec(_) => exit::INTERNAL,
        }
    }

    /// The stable code: the API's, or one of this client's own.
    pub fn code(&self) -> &str {
        match self {
            ClientError::Api(api) => &api.code,
            ClientError::Unreachable { .. } => "unreachable",
            ClientError::NoEndpoints => "no_endpoints",
            ClientError::Answer(_) => "answer_not_understood",
            ClientError::Encode(_) => "request_not_encoded",
            ClientError::Request(_) => "request_malformed",
            ClientError::TooLarge { .. } => "answer_too_large",
            ClientError::Stream(_) => "stream_broken",
            ClientError::Exec(_) => "exec_stream_not_understood",
            ClientError::Tls(_) | ClientError::Name(_) => "tls_setup_failed",
        }
    }

    /// Whether the API said that what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, ClientError::Api(api) if api.status == 404)
    }

    /// Whether the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            ClientError::Api(api) => api.retryable,
            ClientError::Unreachable { .. } | ClientError::Stream(_) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::Code;
    use proptest::prelude::*;

    fn problem(code: Code) -> ApiError {
        let body = Problem {
            r#type: format!("urn:holdfast:problem:{code}"),
            title: "t".into(),
            status: code.status(),
            detail: "d".into(),
            code: code.as_str().into(),
            request_id: "req_1".into(),
            retryable: code.retryable(),
            details: BTreeMap::from([("limit".into(), "3".into())]),
        };
        ApiError::decode(code.status(), None, &serde_json::to_vec(&body).unwrap())
    }

    #[test]
    fn every_code_has_the_exit_code_of_its_kind() {
        for (code, expected) in [
            (Code::InvalidRequest, exit::USAGE),
            (Code::InvalidManifest, exit::USAGE),
            (Code::Unauthenticated, exit::AUTHENTICATION),
            (Code::Forbidden, exit::AUTHENTICATION),
            (Code::NotFound, exit::NOT_FOUND),
            (Code::Compacted, exit::NOT_FOUND),
            (Code::NameTaken, exit::CONFLICT),
            (Code::QuotaExceeded, exit::CONFLICT),
            (Code::RateLimited, exit::TRANSIENT),
            (Code::Unavailable, exit::TRANSIENT),
            (Code::Timeout, exit::TRANSIENT),
            (Code::Internal, exit::INTERNAL),
            (Code::BodyTooLarge, exit::FAILURE),
        ] {
            assert_eq!(problem(code).exit_code(), expected, "{code}");
        }
        assert_eq!(problem(Code::QuotaExceeded).details["limit"], "3");
    }

    proptest! {
        #[test]
        fn i14_any_body_becomes_an_error(status in 400..600u16, body in proptest::collection::vec(any::<u8>(), 0..400)) {
            let error = ApiError::decode(status, Some("req_9"), &body);
            prop_assert_eq!(error.status, status);
            prop_assert!(error.to_string().chars().all(|character| !character.is_control()));
        }
    }
}
