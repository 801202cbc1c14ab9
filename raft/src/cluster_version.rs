//! The cluster version's rise (I1): the leader raises it by one when every member supports the next one.
//!
//! What a member supports it says in the answer to every connection's greeting, so that what is known of it lasts no
//! longer than the connection to the very process that said it. The leader asks every member that the state or Raft's
//! membership names and that was not removed, voters and learners alike; one that does not answer keeps the version
//! where it is. A member whose build does not support the state's version neither starts nor applies another entry.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use holdfast_model::{ClusterVersion, Command, MemberId, SupportedVersions};
use holdfast_store::{StoreError, Views};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::consensus::Inner;
use crate::disk_work;
use crate::membership;
use crate::transport::message::Purpose;

/// Between two looks at whether the version can rise.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a member may take to say what it supports.
const ASK_DEADLINE: Duration = Duration::from_millis(1_500);

/// Raises the version whenever it can, while this member leads. Ends with the member.
pub(crate) async fn keep_raising(inner: Arc<Inner>) {
    let newest = inner.store.supported_versions().newest;
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = inner.health.failed() => return,
            () = inner.stop.cancelled() => return,
        }
        let version = inner.store.cluster_version();
        if version >= newest || !inner.leads() {
            continue;
        }
        let to = version.next();
        match obstacle(&inner, to).await {
            None => raise(&inner, to).await,
            Some(found) if told.as_ref() != Some(&found) => {
                tracing::info!(%to, obstacle = %found, "the cluster version cannot rise yet");
                told = Some(found);
            }
            Some(_) => {}
        }
    }
}

async fn raise(inner: &Inner, to: ClusterVersion) {
    let proposal = inner.clockwork_proposal(Command::RaiseClusterVersion { to });
    match inner.propose_as_leader(&proposal).await {
        Ok(Ok(_)) => tracing::info!(%to, "the cluster version was raised"),
        Ok(Err(rejection)) => tracing::warn!(%to, ?rejection, "the cluster version was not raised"),
        Err(error) => {
            tracing::debug!(%to, %error, "the cluster version was not raised; the next look tries again")
        }
    }
}

/// Why the version cannot rise, if it cannot.
async fn obstacle(inner: &Inner, to: ClusterVersion) -> Option<String> {
    let store = inner.store.clone();
    let named = disk_work::run(move || {
        let view = store.view()?;
        Ok::<_, StoreError>((view.cluster()?.is_some(), view.members()?))
    });
    let (initialised, rows) = match named.await {
        Ok(Ok(named)) => named,
        Ok(Err(error)) => return Some(error.to_string()),
        Err(error) => return Some(error.to_string()),
    };
    if !initialised {
        return Some("the cluster is not initialised".to_owned());
    }
    let membership = membership::current(&inner.raft);
    let mut members: BTreeMap<u64, String> =
        rows.into_iter().filter(|m| !m.removed).map(|m| (m.id.0, m.raft_addr)).collect();
    members.extend(membership.nodes().map(|(id, node)| (*id, node.raft_addr.clone())));
    let asked = members.iter().map(|(id, address)| async move { (*id, ask(inner, *id, address).await) });
    let answers = join_all(asked).await;
    answers.into_iter().find_map(|(id, supported)| match supported {
        Some(supported) if supported.includes(to) => None,
        Some(supported) => Some(format!("member {id} supports version {supported}")),
        None => Some(format!("member {id} does not say what it supports")),
    })
}

/// What a member supports, by its own word of just now.
async fn ask(inner: &Inner, member: u64, address: &str) -> Option<SupportedVersions> {
    if member == inner.id {
        return Some(inner.store.supported_versions());
    }
    let channel = inner.channels.to(member, address, Purpose::Control);
    timeout(ASK_DEADLINE, channel.supported_versions(ASK_DEADLINE)).await.ok()?.ok()
}

/// The same of a member of Raft's membership.
pub(crate) async fn supported_by(inner: &Inner, member: MemberId) -> Option<SupportedVersions> {
    let node = membership::node(&inner.raft, member.0)?;
    ask(inner, member.0, &node.raft_addr).await
}
