//! Proposals of this member and of those that forward theirs to it: into the log by way of whoever leads.
//!
//! A proposal is repeated through leader changes, which is safe because its context names the request (I4). What this
//! member concluded as the leader is tried once and by no other leader (I7).

use std::sync::Arc;

use futures::future::BoxFuture;
use holdfast_model::{Outcome, Proposal};
use holdfast_store::Store;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::impls::ProgressResponder;
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

use crate::batches::{BATCH_BYTES_MAX, BATCH_COMMANDS_MAX, Destination, Limits, SubmitError, Told};
use crate::consensus::{Inner, PROPOSE_ATTEMPTS_MAX};
use crate::error::ConsensusError;
use crate::service::{MemberRaft, MemberService, not_leader};
use crate::transport::message::{Refusal, Request, Response};
use crate::types::{COMMAND_BYTES_MAX, CommandError, LeaderId, LogCommand, Reply};

/// How long a proposal is tried before its sender is told.
const PROPOSE_DEADLINE: Duration = Duration::from_secs(15);
/// How long forwarded proposals may take. Longer than the leader itself waits, so that its answer can arrive.
const FORWARD_DEADLINE: Duration = Duration::from_secs(11);
/// How long the leader waits for proposals to be committed and applied before it says that it does not know.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Entries of the leader's that may be under way while commands gather for the next.
const ENTRIES_UNDER_WAY_MAX: usize = 2;
/// Messages to the leader that may be under way while commands gather for the next.
const FORWARDS_UNDER_WAY_MAX: usize = 2;
/// Commands under way where each goes by itself.
const SINGLE_UNDER_WAY_MAX: usize = 1024;

/// What may be sent at once. Members of an older cluster version could read neither an entry nor a message of many.
fn limits(store: &Store, under_way: usize) -> Limits {
    if store.cluster_version().has_command_batches() {
        Limits { commands: BATCH_COMMANDS_MAX, under_way }
    } else {
        Limits { commands: 1, under_way: SINGLE_UNDER_WAY_MAX }
    }
}

impl Inner {
    pub(crate) async fn propose(&self, proposal: &Proposal) -> Result<Outcome, ConsensusError> {
        self.serving()?;
        let command = LogCommand::encode(proposal).map_err(invalid)?;
        let _place = self.proposals.try_acquire().map_err(|_| ConsensusError::Busy)?;
        let until = Instant::now() + PROPOSE_DEADLINE;
        let mut maybe_stored = false;
        for attempt in 0..PROPOSE_ATTEMPTS_MAX {
            match timeout_at(until, self.try_propose(command.clone())).await {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(SubmitError::Full)) if maybe_stored => {}
                Ok(Err(SubmitError::Full)) => return Err(ConsensusError::Busy),
                Ok(Err(SubmitError::Refused(Refusal::Invalid(reason)))) => {
                    return Err(ConsensusError::Invalid(reason));
                }
                Ok(Err(SubmitError::Refused(Refusal::Unknown(_)))) | Err(_) => maybe_stored = true,
                Ok(Err(SubmitError::Refused(
                    Refusal::NotLeader { .. } | Refusal::Unavailable(_) | Refusal::Removed,
                ))) => {}
            }
            self.serving()?;
            if !self.pause(attempt, until).await {
                break;
            }
        }
        Err(if maybe_stored { ConsensusError::Unknown } else { ConsensusError::NoLeader })
    }

    async fn try_propose(&self, command: LogCommand) -> Result<Outcome, SubmitError> {
        match self.leader_now() {
            None => Err(SubmitError::Refused(Refusal::NotLeader { leader: None })),
            Some(leader) if leader == self.id => self.entries.submit_one(command, None).await,
            Some(_) => self.forwards.submit_one(command, None).await,
        }
    }

    pub(crate) async fn propose_as_leader(&self, proposal: &Proposal) -> Result<Outcome, ConsensusError> {
        self.serving()?;
        let command = LogCommand::encode(proposal).map_err(invalid)?;
        let leader = self.raft.as_leader().map_err(|_| ConsensusError::NoLeader)?;
        let until = Instant::now() + PROPOSE_DEADLINE;
        let only_as = Some(leader.to_committed_leader_id());
        match timeout_at(until, self.entries.submit_one(command, only_as)).await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(SubmitError::Full)) => Err(ConsensusError::Busy),
            Ok(Err(SubmitError::Refused(Refusal::Invalid(reason)))) => Err(ConsensusError::Invalid(reason)),
            Ok(Err(SubmitError::Refused(
                Refusal::NotLeader { .. } | Refusal::Unavailable(_) | Refusal::Removed,
            ))) => Err(ConsensusError::NoLeader),
            Ok(Err(SubmitError::Refused(Refusal::Unknown(_)))) | Err(_) => Err(ConsensusError::Unknown),
        }
    }
}

fn invalid(error: CommandError) -> ConsensusError {
    ConsensusError::Invalid(crate::network::chain(&error))
}

impl MemberService {
    /// Proposes one command of another member, on this member alone.
    pub(crate) async fn propose_one(&self, command: LogCommand) -> Result<Outcome, Refusal> {
        self.propose_all(vec![command]).await?.pop().unwrap_or_else(|| Err(no_outcome()))
    }

    /// The same for many. One that this build cannot read is refused by itself and spares its neighbours; in the log it
    /// would stop every member.
    pub(crate) async fn propose_all(&self, commands: Vec<LogCommand>) -> Result<Vec<Told>, Refusal> {
        let bytes: usize = commands.iter().map(|command| command.bytes().len()).sum();
        let fits = commands.len() == 1 || bytes <= BATCH_BYTES_MAX;
        if commands.len() > BATCH_COMMANDS_MAX || !fits {
            return Err(Refusal::Invalid("more proposals were sent than go into one message".to_owned()));
        }
        let checked: Vec<Result<(), Refusal>> = commands.iter().map(check).collect();
        let good = commands.into_iter().zip(&checked).filter(|(_, checked)| checked.is_ok());
        let good: Vec<LogCommand> = good.map(|(command, _)| command).collect();
        if good.is_empty() {
            return Ok(checked.into_iter().filter_map(Result::err).map(Err).collect());
        }
        let told = match timeout(WRITE_DEADLINE, self.entries.submit(good, None)).await {
            Ok(told) => told.map_err(refusal)?,
            Err(_elapsed) => return Err(no_majority()),
        };
        let mut told = told.into_iter();
        let of = |checked: Result<(), Refusal>| {
            checked.and_then(|()| told.next().unwrap_or_else(|| Err(no_outcome())))
        };
        Ok(checked.into_iter().map(of).collect())
    }
}

/// Whether a command of another member is a proposal that this build knows.
fn check(command: &LogCommand) -> Result<(), Refusal> {
    if command.bytes().len() > COMMAND_BYTES_MAX {
        return Err(Refusal::Invalid("the proposal is too large".to_owned()));
    }
    command.decode().map(drop).map_err(|error| Refusal::Invalid(crate::network::chain(&error)))
}

fn refusal(error: SubmitError) -> Refusal {
    match error {
        SubmitError::Full => Refusal::Unavailable("too many proposals wait".to_owned()),
        SubmitError::Refused(refusal) => refusal,
    }
}

fn no_majority() -> Refusal {
    Refusal::Unknown("a majority did not answer in time".to_owned())
}

fn no_outcome() -> Refusal {
    Refusal::Invalid("the command had no outcome; this is a bug".to_owned())
}

/// Batches become entries of the log, as long as this member leads.
pub(crate) struct IntoLog {
    pub(crate) raft: MemberRaft,
    pub(crate) store: Arc<Store>,
}

impl Destination for IntoLog {
    fn limits(&self) -> Limits {
        if self.raft.is_leader() {
            limits(&self.store, ENTRIES_UNDER_WAY_MAX)
        } else {
            // What waits is refused at once, also while entries of before have no answer yet.
            limits(&self.store, SINGLE_UNDER_WAY_MAX)
        }
    }

    fn send(
        &self,
        commands: Vec<LogCommand>,
        only_as: Option<LeaderId>,
    ) -> BoxFuture<'static, Result<Vec<Told>, Refusal>> {
        let raft = self.raft.clone();
        Box::pin(async move {
            match timeout(WRITE_DEADLINE, write(&raft, LogCommand::batch(commands), only_as)).await {
                Ok(written) => {
                    Ok(written?.0.into_iter().map(|outcome| outcome.ok_or_else(no_outcome)).collect())
                }
                Err(_elapsed) => Err(no_majority()),
            }
        })
    }
}

/// Writes one entry on this member, which must lead, and waits until it is applied.
async fn write(raft: &MemberRaft, command: LogCommand, only_as: Option<LeaderId>) -> Result<Reply, Refusal> {
    let written = match only_as {
        None => raft.client_write(command).await,
        Some(leader) => {
            let (responder, answer) = ProgressResponder::complete_only();
            if let Err(error) = raft.write(command).with_leader(leader).responder(responder).await {
                return Err(Refusal::Unknown(error.to_string()));
            }
            let answer = answer.await.map_err(|_| Refusal::Unknown("the core ended".to_owned()))?;
            answer.map_err(RaftError::APIError)
        }
    };
    match written {
        Ok(response) => Ok(response.data),
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => Err(not_leader(&forward)),
        Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => {
            Err(Refusal::Unknown("the leader changed".to_owned()))
        }
        Err(RaftError::APIError(error)) => Err(Refusal::Invalid(error.to_string())),
        Err(RaftError::Fatal(error)) => Err(Refusal::Unknown(error.to_string())),
    }
}

/// Batches go to the leader, whoever that is.
pub(crate) struct ToLeader {
    pub(crate) inner: Arc<Inner>,
}

impl Destination for ToLeader {
    fn limits(&self) -> Limits {
        limits(&self.inner.store, FORWARDS_UNDER_WAY_MAX)
    }

    fn send(
        &self,
        commands: Vec<LogCommand>,
        _only_as: Option<LeaderId>,
    ) -> BoxFuture<'static, Result<Vec<Told>, Refusal>> {
        let inner = self.inner.clone();
        Box::pin(async move {
            let leader = inner.leader_now().filter(|leader| *leader != inner.id);
            let Some(leader) = leader else { return Err(Refusal::NotLeader { leader: None }) };
            let request = match <[LogCommand; 1]>::try_from(commands) {
                Ok([single]) => Request::Forward(single),
                Err(commands) => Request::ForwardAll(commands),
            };
            match inner.call_leader(leader, request, FORWARD_DEADLINE).await? {
                Response::Outcome(outcome) => Ok(vec![Ok(outcome)]),
                Response::Outcomes(told) => Ok(told),
                _ => Err(Refusal::Unknown("the answer is to another question".to_owned())),
            }
        })
    }
}
