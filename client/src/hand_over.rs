//! Whether a hand-over to another incarnation may be believed (I6). Pure: no disk, no network.

use holdfast_identity::CaCertificate;
use holdfast_model::agent::{HAND_OVER_PURPOSE, HandOver, SignedHandOver, Stamp};
use holdfast_model::{ClusterId, Incarnation};

/// Why a hand-over was refused. What the agent knows stays in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandOverError {
    /// The authority did not sign it.
    #[error("The cluster's authority did not sign the hand-over; check what the agent's endpoints lead to.")]
    Signature,
    /// It is no record that this version knows.
    #[error("The hand-over cannot be decoded; upgrade the agent.")]
    Decode,
    /// It is of another cluster, for another incarnation than this agent's, or leads back.
    #[error(
        "The hand-over is not for this agent, which follows incarnation {known}; the stream begins anew."
    )]
    NotOurs {
        /// The incarnation that the agent follows.
        known: Incarnation,
    },
}

/// The hand-over, if the authority signed it for an agent that stands here.
pub(crate) fn check(
    signed: &SignedHandOver,
    ca: Option<&CaCertificate>,
    cluster: ClusterId,
    at: Option<Stamp>,
) -> Result<HandOver, HandOverError> {
    let known = at.map_or(Incarnation(0), |stamp| stamp.incarnation);
    let ca = ca.ok_or(HandOverError::Signature)?;
    if !ca.has_signed(HAND_OVER_PURPOSE, &signed.record, &signed.signature) {
        return Err(HandOverError::Signature);
    }
    let record: HandOver = postcard::from_bytes(&signed.record).map_err(|_| HandOverError::Decode)?;
    if record.cluster != cluster || record.from != known || record.to <= record.from {
        return Err(HandOverError::NotOurs { known });
    }
    Ok(record)
}
