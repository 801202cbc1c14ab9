//! The comparison of the members' states (I1).
//!
//! Every member's store records the digest of its state at the same log indexes. Now and then the leader proposes its own
//! last one. A member that has another one asks all voters for theirs. Whoever is not with the majority stops serving
//! and is filled anew ([`crate::healing`]); without a majority the members that cannot be sure stop for good, because an
//! unavailable cluster can be repaired and a forked one cannot.

use std::sync::Arc;
use std::time::Duration;

use holdfast_model::{Command, Digest, LogIndex};
use holdfast_store::Store;
use rand::RngExt;
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::consensus::Inner;
use crate::disk_work;
use crate::healing::WrongDigest;
use crate::health::Fault;
use crate::membership;
use crate::transport::message::{Purpose, Request, Response};
use crate::types::LogCommand;

/// How long a voter may take to tell its digest.
const DIGEST_DEADLINE: Duration = Duration::from_secs(3);
/// How often an open verdict is asked for again before this member stops.
const ATTEMPTS_MAX: u32 = 5;
/// Between two such attempts.
const ATTEMPT_INTERVAL: Duration = Duration::from_secs(2);

/// A digest in the log that is not this member's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// After which entry.
    pub(crate) index: u64,
    /// What the log says.
    pub(crate) proposed: Digest,
    /// What this member has.
    pub(crate) own: Digest,
}

/// What follows from the digests of the voters that answered, this member's own among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This member is with the majority.
    Right,
    /// A majority agrees on another digest.
    Wrong,
    /// Nobody can tell: too few answered, or no majority agrees.
    Open,
}

/// Judges `own` by what `voters` voters were found to have.
pub(crate) fn judge(own: Digest, others: &[Digest], voters: usize) -> Verdict {
    let majority = voters / 2 + 1;
    if 1 + others.iter().filter(|other| **other == own).count() >= majority {
        return Verdict::Right;
    }
    let wrong =
        others.iter().any(|candidate| others.iter().filter(|other| *other == candidate).count() >= majority);
    if wrong { Verdict::Wrong } else { Verdict::Open }
}

/// As the leader, proposes a comparison every `every`, with some jitter. Ends with the member.
pub(crate) async fn propose_checks(inner: Arc<Inner>, every: Duration) {
    loop {
        let pause = every.mul_f64(rand::rng().random_range(0.75..1.25));
        tokio::select! {
            () = sleep(pause) => {}
            () = inner.stop.cancelled() => return,
        }
        if inner.raft.is_leader()
            && let Err(reason) = propose_check(&inner).await
        {
            tracing::debug!(%reason, "the states were not compared this time");
        }
    }
}

/// Proposes one comparison.
pub(crate) async fn propose_check(inner: &Inner) -> Result<(), String> {
    let store = inner.store.clone();
    let recorded = disk_work::run(move || store.recorded_digest()).await;
    let recorded = recorded.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    // A state so young that nothing was recorded has nothing to compare.
    let Some((at, digest)) = recorded else { return Ok(()) };
    let proposal = inner.clockwork_proposal(Command::VerifyDigest { at, digest });
    let command = LogCommand::encode(&proposal).map_err(|error| error.to_string())?;
    inner.raft.client_write(command).await.map(drop).map_err(|error| error.to_string())
}

/// Looks into every mismatch that this member found, or that another found in it. Ends with the member.
pub(crate) async fn settle(
    inner: Arc<Inner>,
    mut found: mpsc::Receiver<Mismatch>,
    mut accused: mpsc::Receiver<u64>,
) {
    loop {
        let index = tokio::select! {
            Some(mismatch) = found.recv() => {
                let Mismatch { index, proposed, own } = mismatch;
                tracing::error!(index, %proposed, %own, "this member's state differs from the one in the log");
                index
            }
            Some(index) = accused.recv() => {
                tracing::error!(index, "another member found this member's state to differ from a majority's");
                index
            }
            () = inner.stop.cancelled() => return,
        };
        settle_one(&inner, index).await;
    }
}

/// This member's digest after an entry, if it is still kept.
pub(crate) async fn recorded_at(store: &Arc<Store>, index: u64) -> Option<Digest> {
    let store = store.clone();
    match disk_work::run(move || store.digest_at(LogIndex(index))).await {
        Ok(Ok(digest)) => digest,
        Ok(Err(error)) => {
            tracing::error!(%error, index, "a recorded digest could not be read");
            None
        }
        Err(_) => None,
    }
}

async fn settle_one(inner: &Inner, index: u64) {
    let Some(own) = recorded_at(&inner.store, index).await else { return };
    for attempt in 1..=ATTEMPTS_MAX {
        let (voters, answers) = collect(inner, index).await;
        let digests: Vec<Digest> = answers.iter().map(|(_, digest)| *digest).collect();
        match judge(own, &digests, voters) {
            Verdict::Right => {
                tracing::error!(
                    index,
                    "a majority has this member's state; telling those that differ to stop"
                );
                for (member, _) in answers.into_iter().filter(|(_, digest)| *digest != own) {
                    accuse(inner, member, index, own).await;
                }
                return;
            }
            Verdict::Wrong => {
                let wrong = WrongDigest { index, digest: own };
                inner.health.fail_with(Fault::Diverged { index }, Some(wrong));
                return;
            }
            Verdict::Open if attempt < ATTEMPTS_MAX => sleep(ATTEMPT_INTERVAL).await,
            Verdict::Open => {}
        }
    }
    // Whose state would fill this member, if nobody knows whose is right?
    inner.health.fail(Fault::Undecided { index });
}

/// How many voters there are, and what the other ones have.
async fn collect(inner: &Inner, index: u64) -> (usize, Vec<(u64, Digest)>) {
    let membership = membership::current(&inner.raft);
    let voters: Vec<u64> = membership.voter_ids().collect();
    let asked = voters.iter().filter(|voter| **voter != inner.id).map(|voter| {
        let address = membership.get_node(voter).map(|node| node.raft_addr.clone()).unwrap_or_default();
        async move {
            let channel = inner.channels.to(*voter, &address, Purpose::Control);
            match channel.call(Request::DigestAt { index }, DIGEST_DEADLINE).await {
                Ok(Response::Digest(Some(digest))) => Some((*voter, Digest(digest))),
                _ => None,
            }
        }
    });
    let answers = futures::future::join_all(asked).await;
    let own_vote = usize::from(voters.contains(&inner.id));
    // A learner has no vote of its own: it is right only with a majority of those who do.
    (voters.len() + (1 - own_vote), answers.into_iter().flatten().collect())
}

async fn accuse(inner: &Inner, member: u64, index: u64, expected: Digest) {
    let Some(address) = membership::node(&inner.raft, member).map(|node| node.raft_addr) else {
        return;
    };
    let channel = inner.channels.to(member, &address, Purpose::Control);
    let told = channel.call(Request::Diverged { index, expected: expected.0 }, DIGEST_DEADLINE).await;
    if let Err(error) = told {
        tracing::error!(member, %error, "a member with another state could not be told to stop");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: u8) -> Digest {
        Digest([byte; 32])
    }

    #[test]
    fn i01_the_minority_is_wrong_and_a_tie_is_open() {
        assert_eq!(judge(digest(1), &[digest(1), digest(2)], 3), Verdict::Right);
        assert_eq!(judge(digest(2), &[digest(1), digest(1)], 3), Verdict::Wrong);
        assert_eq!(judge(digest(2), &[digest(1)], 3), Verdict::Open);
        assert_eq!(judge(digest(2), &[digest(1)], 2), Verdict::Open);
        assert_eq!(judge(digest(1), &[digest(2), digest(3)], 3), Verdict::Open);
        assert_eq!(judge(digest(1), &[], 1), Verdict::Right);
    }
}
