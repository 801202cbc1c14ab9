//! How a command ends: accepted with what it made, or rejected with a stable code and a sentence that says what to do.

use crate::resource::Enrolled;
use crate::{
    AppId, DeploymentId, EnrolmentId, EnvId, ExecGrantId, OrgId, ReleaseId, Revision, RouteId, SnapshotId,
    TokenId, VolumeId,
};
use serde::{Deserialize, Serialize};

/// What a command came to.
pub type Outcome = Result<Accepted, Rejection>;

/// A command that was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The last revision that it made, or the current one when it made none.
    pub revision: Revision,
    /// What it made.
    pub output: Output,
}

/// What a command made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// Nothing to name.
    None,
    /// An org.
    Org(OrgId),
    /// An app.
    App(AppId),
    /// An env.
    Env(EnvId),
    /// A release.
    Release(ReleaseId),
    /// A deployment.
    Deployment(DeploymentId),
    /// A route.
    Route(RouteId),
    /// A token.
    Token(TokenId),
    /// An enrolment.
    Enrolment(EnrolmentId),
    /// A member, node or edge.
    Enrolled(Enrolled),
    /// An exec grant.
    ExecGrant(ExecGrantId),
    /// A version of an env's secrets.
    SecretVersion(u32),
    /// A volume snapshot.
    Snapshot(SnapshotId),
    /// A volume.
    Volume(VolumeId),
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal, $retryable:literal;)*) => {
        /// A stable error code: scripts may rely on it, and on its HTTP status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Code { $($(#[$doc])* $name,)* }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The code as text.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The HTTP status that it travels with.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }

            /// Whether the same request may succeed later without a change.
            pub const fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable,)* }
            }
        }
    };
}

codes! {
    /// The request's form is wrong.
    InvalidRequest = "invalid_request", 400, false;
    /// The manifest is wrong.
    InvalidManifest = "invalid_manifest", 400, false;
    /// No valid credential.
    Unauthenticated = "unauthenticated", 401, false;
    /// The credential does not carry the scope.
    Forbidden = "forbidden", 403, false;
    /// It does not exist, or lies outside the caller's scope.
    NotFound = "not_found", 404, false;
    /// The path exists, not with this method.
    MethodNotAllowed = "method_not_allowed", 405, false;
    /// The name is taken.
    NameTaken = "name_taken", 409, false;
    /// The hostname is taken.
    HostnameTaken = "hostname_taken", 409, false;
    /// The edge's port is taken.
    PortTaken = "port_taken", 409, false;
    /// The resource changed since the caller saw it.
    VersionConflict = "version_conflict", 409, false;
    /// The idempotency key was used with another request.
    IdempotencyKeyReuse = "idempotency_key_reuse", 409, false;
    /// A quota is used up.
    QuotaExceeded = "quota_exceeded", 409, false;
    /// What it needs is not in the state for it.
    FailedPrecondition = "failed_precondition", 409, false;
    /// The enrolment is unknown, used or over.
    EnrolmentInvalid = "enrolment_invalid", 403, false;
    /// The body is too large.
    BodyTooLarge = "body_too_large", 413, false;
    /// The body's type is not understood.
    UnsupportedMediaType = "unsupported_media_type", 415, false;
    /// Too many requests.
    RateLimited = "rate_limited", 429, true;
    /// The revision is no longer held.
    Compacted = "compacted", 410, false;
    /// The cluster exists already.
    AlreadyInitialised = "already_initialised", 409, false;
    /// No leader, or no majority, right now.
    Unavailable = "unavailable", 503, true;
    /// The agent that the request is about is not connected.
    AgentUnreachable = "agent_unreachable", 503, true;
    /// It took too long; whether it happened is unknown.
    Timeout = "timeout", 504, true;
    /// This member's state differs from its peers': it has stopped serving (I1).
    Diverged = "diverged", 503, true;
    /// A defect of ours.
    Internal = "internal", 500, false;
    /// The agent was cut off by an operator: its host must be wiped and joined anew.
    Quarantined = "quarantined", 403, false;
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A command that changed nothing, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// The stable code.
    pub code: Code,
    /// One sentence: what happened and what to do. Never holds secret material.
    pub message: String,
}

impl Rejection {
    /// A rejection with this code and sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What does not exist and what the caller may not see are answered by these same bytes (I9).
    pub fn not_found(what: &'static str) -> Self {
        Self::new(
            Code::NotFound,
            format!("There is no such {what}; check its name and that your login may see it."),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i14_codes_are_stable_and_distinct() {
        let names: std::collections::BTreeSet<_> = Code::ALL.iter().map(|c| c.as_str()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(serde_json::to_string(code).unwrap(), format!("\"{}\"", code.as_str()));
            assert!((400..600).contains(&code.status()));
        }
    }
}
