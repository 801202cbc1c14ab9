//! The word by which an agent is handed over from an older incarnation to the one that this member is of (I6).
//!
//! A member gives it only for what its own applied history says began, and signs it with the authority's key, so that
//! an agent need not trust the stream that it comes over.

use crate::problem::Refusal;
use crate::service::Service;
use holdfast_model::Incarnation;
use holdfast_model::agent::{HAND_OVER_PURPOSE, HandOver, SignedHandOver};
use holdfast_store::{View, Views};

/// The hand-over for an agent of `from`; `None` when the agent's incarnation is this one, or a newer one.
pub(crate) fn signed(
    service: &Service,
    view: &View,
    from: Incarnation,
) -> Result<Option<SignedHandOver>, Refusal> {
    let Some(cluster) = view.cluster()?.filter(|cluster| cluster.incarnation > from) else { return Ok(None) };
    let Some(last) = view.last_before(cluster.incarnation)? else { return Ok(None) };
    let hand_over = HandOver { cluster: cluster.id, from, to: cluster.incarnation, last };
    let record = postcard::to_stdvec(&hand_over).map_err(|e| Refusal::internal(&e))?;
    let signature = service.authority.sign_statement(HAND_OVER_PURPOSE, &record);
    let signature = signature.map_err(|e| Refusal::internal(&e))?;
    Ok(Some(SignedHandOver { record, signature }))
}
