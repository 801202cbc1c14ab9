//! What an exported history is checked against: a checkpoint, which says how the chain of events stood, signed by the
//! cluster's authority (I12).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{ClusterId, Digest, Incarnation, Revision, Timestamp};

/// The purpose of the authority's statement.
pub const CHECKPOINT_PURPOSE: &str = "holdfast 2026 audit checkpoint v1";

/// How the chain of events stood at a revision. Whoever has the events up to it and the cluster's certificate can tell,
/// without the cluster, that none was changed, removed, added or moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AuditCheckpoint {
    /// Of which cluster.
    pub cluster: ClusterId,
    /// In which incarnation.
    pub incarnation: Incarnation,
    /// The last event.
    pub revision: Revision,
    /// That event's chain.
    pub chain: Digest,
    /// When it was signed, as the member's clock says.
    pub signed_at: Timestamp,
    /// The authority's signature over [`AuditCheckpoint::statement`]: ECDSA P-256 with SHA-256, DER, base64.
    pub signature: String,
}

impl AuditCheckpoint {
    /// The bytes that are signed: a line for each field but the signature, in their order.
    pub fn statement(&self) -> Vec<u8> {
        let Self { cluster, incarnation, revision, chain, signed_at, signature: _ } = self;
        format!("{cluster}\n{incarnation}\n{revision}\n{chain}\n{}\n", signed_at.0).into_bytes()
    }
}

/// The first line of an exported history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditHeader {
    /// The form of the file: [`AUDIT_FORM`].
    pub holdfast_audit: u32,
    /// Of which cluster.
    pub cluster: ClusterId,
    /// The events that follow come after this revision.
    pub after: Revision,
    /// The chain of the event at that revision; all zeros at the beginning.
    pub chain: Digest,
}

/// The form of an exported history that this build writes and reads.
pub const AUDIT_FORM: u32 = 1;

/// The last line of an exported history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditEnd {
    /// What the events before it come to.
    pub checkpoint: AuditCheckpoint,
}
