//! One batch of log entries: each is decided, its events evolve the views, its outcome is kept. Readers see all of a
//! batch or nothing of it, with Raft's own bytes beside it.

use crate::database::DIGEST_EVERY;
use crate::decide::{Refusal, decide};
use crate::error::StoreError;
use crate::outcomes::{self, Repeat, RetentionTime};
use crate::overlay::Draft;
use crate::writer::Writer;
use holdfast_model::{
    Accepted, Actor, ClusterVersion, Command, LogIndex, Outcome, Proposal, SupportedVersions,
};

/// Applies the entries, of which the first has the index `first`.
pub(crate) fn apply_entries(
    writer: &mut Writer,
    first: LogIndex,
    entries: &[Vec<Proposal>],
    supported: SupportedVersions,
) -> Result<Vec<Vec<Outcome>>, StoreError> {
    let mut outcomes = Vec::with_capacity(entries.len());
    let mut at = first;
    for proposals in entries {
        check_order(writer, at)?;
        let mut answers = Vec::with_capacity(proposals.len());
        for proposal in proposals {
            verify(writer, proposal)?;
            let began_at = writer.head().revision;
            answers.push(apply_one(writer, proposal)?);
            check_version(writer.cluster_version(), supported)?;
            writer.end_command(began_at);
        }
        outcomes.push(answers);
        writer.head_mut().applied = Some(at);
        if at.0.is_multiple_of(DIGEST_EVERY) {
            writer.record_digest(at);
        }
        at = at.next();
    }
    Ok(outcomes)
}

fn check_order(writer: &Writer, at: LogIndex) -> Result<(), StoreError> {
    match writer.head().applied {
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
fn verify(writer: &Writer, proposal: &Proposal) -> Result<(), StoreError> {
    let Command::VerifyDigest { at, digest } = &proposal.command else { return Ok(()) };
    if !matches!(proposal.context.actor, Actor::System(_)) {
        return Ok(());
    }
    match writer.recorded(*at)? {
        Some(ours) if ours != *digest => Err(StoreError::Diverged { at: *at, ours, theirs: *digest }),
        _ => Ok(()),
    }
}

fn apply_one(writer: &mut Writer, proposal: &Proposal) -> Result<Outcome, StoreError> {
    let now = RetentionTime::of(writer.cluster_version(), writer.log_time_ms(), &proposal.context);
    outcomes::forget(writer, now)?;
    let Some(identity) = outcomes::identity(proposal)? else { return decide_one(writer, proposal) };
    let old = match outcomes::find(writer, &identity, now)? {
        Repeat::Seen(outcome) => return Ok(outcome),
        Repeat::First(old) => old,
    };
    let outcome = decide_one(writer, proposal)?;
    // The command may have raised the version.
    let now = RetentionTime::of(writer.cluster_version(), writer.log_time_ms(), &proposal.context);
    outcomes::keep(writer, identity, old, now, &outcome)?;
    Ok(outcome)
}

/// Decides a command on a draft, and merges the draft if it was accepted.
fn decide_one(writer: &mut Writer, proposal: &Proposal) -> Result<Outcome, StoreError> {
    let mut draft = Draft::new(writer, *writer.head(), &proposal.context);
    match decide(&mut draft, &proposal.command) {
        Ok(output) => {
            let revision = draft.revision();
            let parts = draft.into_parts();
            writer.merge(parts)?;
            Ok(Ok(Accepted { revision, output }))
        }
        Err(Refusal::Rejected(rejection)) => Ok(Err(rejection)),
        Err(Refusal::Fault(error)) => Err(error),
    }
}
