//! One batch of log entries: each is decided, its events evolve the views, its outcome is kept. All in one
//! transaction, so that a crash leaves the state at the end of a batch, with Raft's own bytes beside it.

use crate::database::{DIGEST_EVERY, WriteTables};
use crate::decide::{Refusal, decide};
use crate::error::StoreError;
use crate::outcomes::{self, Repeat, RetentionTime};
use crate::overlay::{Batch, Draft};
use holdfast_model::{
    Accepted, Actor, ClusterVersion, Command, Digest, LogIndex, Outcome, Proposal, SupportedVersions,
};
use std::collections::BTreeMap;

/// Digests that the batch itself comes to, before they are in the database.
pub(crate) type Records = BTreeMap<LogIndex, Digest>;

/// Applies the entries, of which the first has the index `first`.
pub(crate) fn apply_entries(
    tables: &WriteTables<'_>,
    batch: &mut Batch<'_>,
    first: LogIndex,
    entries: &[Vec<Proposal>],
    supported: SupportedVersions,
) -> Result<(Vec<Vec<Outcome>>, Records), StoreError> {
    let mut outcomes = Vec::with_capacity(entries.len());
    let mut records = Records::new();
    let mut at = first;
    for proposals in entries {
        check_order(batch, at)?;
        let mut answers = Vec::with_capacity(proposals.len());
        for proposal in proposals {
            verify(tables, &records, proposal)?;
            answers.push(apply_one(batch, proposal)?);
            check_version(batch.cluster_version(), supported)?;
        }
        outcomes.push(answers);
        batch.head_mut().applied = Some(at);
        if at.0.is_multiple_of(DIGEST_EVERY) {
            records.insert(at, batch.head().state_digest());
        }
        at = at.next();
    }
    Ok((outcomes, records))
}

fn check_order(batch: &Batch<'_>, at: LogIndex) -> Result<(), StoreError> {
    match batch.head().applied {
        Some(applied) if applied.next() != at => Err(StoreError::OutOfOrder { applied, got: at }),
        _ => Ok(()),
    }
}

/// Refuses rules that this build does not know: the member stops before it goes another way than the others (I1).
pub(crate) fn check_version(version: ClusterVersion, supported: SupportedVersions) -> Result<(), StoreError> {
    match supported.includes(version) {
        true => Ok(()),
        false => Err(StoreError::UnsupportedVersion { version, supported }),
    }
}

/// Compares a peer's digest with ours after the same entry, if ours is still known (I1).
fn verify(tables: &WriteTables<'_>, records: &Records, proposal: &Proposal) -> Result<(), StoreError> {
    let Command::VerifyDigest { at, digest } = &proposal.command else { return Ok(()) };
    if !matches!(proposal.context.actor, Actor::System(_)) {
        return Ok(());
    }
    let ours = match records.get(at) {
        Some(ours) => Some(*ours),
        None => tables.recorded(*at)?,
    };
    match ours {
        Some(ours) if ours != *digest => Err(StoreError::Diverged { at: *at, ours, theirs: *digest }),
        _ => Ok(()),
    }
}

fn apply_one(batch: &mut Batch<'_>, proposal: &Proposal) -> Result<Outcome, StoreError> {
    let now = RetentionTime::of(batch.cluster_version(), batch.log_time_ms(), &proposal.context);
    outcomes::forget(batch, now)?;
    let Some(identity) = outcomes::identity(proposal)? else { return decide_one(batch, proposal) };
    if let Repeat::Seen(outcome) = outcomes::find(batch, &identity, now)? {
        return Ok(outcome);
    }
    let outcome = decide_one(batch, proposal)?;
    // The command may have raised the version.
    let now = RetentionTime::of(batch.cluster_version(), batch.log_time_ms(), &proposal.context);
    outcomes::keep(batch, identity, now, &outcome)?;
    Ok(outcome)
}

/// Decides a command on a draft, and merges the draft if it was accepted.
fn decide_one(batch: &mut Batch<'_>, proposal: &Proposal) -> Result<Outcome, StoreError> {
    let mut draft = Draft::new(&*batch, *batch.head(), &proposal.context);
    match decide(&mut draft, &proposal.command) {
        Ok(output) => {
            let revision = draft.revision();
            let parts = draft.into_parts();
            batch.merge(parts)?;
            Ok(Ok(Accepted { revision, output }))
        }
        Err(Refusal::Rejected(rejection)) => Ok(Err(rejection)),
        Err(Refusal::Fault(error)) => Err(error),
    }
}
