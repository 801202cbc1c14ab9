//! The cluster version's rise, one step at a time.

use super::{Decision, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use holdfast_model::{Aggregate, ClusterVersion, Code, EventPayload, Output};

/// Only the clockwork asks for this, after every member said that it supports `to`: see `admission`. Whether this build
/// knows the rules of `to` is judged by `apply`, for a member that does not must stop and not decide otherwise than the
/// others (I1).
pub(super) fn raise(draft: &mut Draft<'_>, to: ClusterVersion) -> Decision {
    let cluster = required(draft.cluster()?, "a cluster")?;
    if to <= cluster.version {
        return Ok(Output::None);
    }
    let next = cluster.version.next();
    if to != next {
        return Err(refuse(
            Code::FailedPrecondition,
            format!(
                "The cluster is at version {} and rises one step at a time: the next one is {next}.",
                cluster.version
            ),
        ));
    }
    let filing = Filing::cluster(Aggregate::Cluster(cluster.id));
    draft.emit(filing, EventPayload::ClusterVersionRaised { to })?;
    Ok(Output::None)
}
