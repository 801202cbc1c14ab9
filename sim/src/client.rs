//! What clients ask, and what they are told: apps of one org come and go under a few names.
//!
//! A name is a register that holds an app or nothing. Each app has an id that is drawn once by its client, so whoever
//! reads an id knows which request made it.

use holdfast_model::{
    Actor, AppId, AppName, Code, Command, Context, OrgId, Outcome, Output, Proposal, RequestId, Revision,
    Timestamp, TokenId,
};
use holdfast_raft::Consensus;
use holdfast_store::Views;
use rand::RngExt;
use rand::rngs::StdRng;

use crate::machine;

/// As whom clients act, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) operator: TokenId,
    pub(crate) org: OrgId,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    /// Make an app of this name.
    Create(Proposal),
    /// Delete the app with this id, which was made under this name.
    Delete(AppId, Proposal),
    /// Which app has this name?
    Read,
}

impl Question {
    /// What is proposed; a read proposes nothing.
    pub(crate) fn proposal(&self) -> Option<&Proposal> {
        match self {
            Question::Create(proposal) | Question::Delete(_, proposal) => Some(proposal),
            Question::Read => None,
        }
    }
}

/// What a client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The app was made.
    Created(AppId, Revision),
    /// The name is taken.
    Taken,
    /// The app was deleted.
    Deleted(Revision),
    /// There is no such app.
    Absent,
    /// The app of that name, and the revision that was read.
    Found(Option<AppId>, Revision),
}

/// An answer, or why there is none.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Answer(Answer),
    /// Nothing is known; ask again. The reason is for the trace.
    Nothing(#[expect(dead_code, reason = "read by Debug, for the trace")] String),
    /// An answer that may never be given.
    Wrong(String),
}

/// A proposal of a client's.
pub(crate) fn proposal(account: &Account, command: Command, rng: &mut StdRng) -> Proposal {
    let request: u128 = rng.random();
    Proposal {
        context: Context {
            actor: Actor::Operator(account.operator),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(request),
            // The API passes the caller's key on, and some callers send none.
            idempotency_key: rng.random_bool(0.7).then(|| format!("key-{request:x}")),
            now: Timestamp(machine::wall_ms()),
            entropy: rng.random(),
        },
        command,
    }
}

/// Asks a member.
pub(crate) async fn ask(member: Consensus, org: OrgId, name: AppName, question: Question) -> Told {
    match question {
        Question::Read => read(&member, org, &name).await,
        Question::Create(proposal) | Question::Delete(_, proposal) => match member.propose(proposal).await {
            Ok(outcome) => judge(outcome),
            Err(error) => Told::Nothing(error.to_string()),
        },
    }
}

fn judge(outcome: Outcome) -> Told {
    match outcome {
        Ok(accepted) => match accepted.output {
            Output::App(id) => Told::Answer(Answer::Created(id, accepted.revision)),
            Output::None => Told::Answer(Answer::Deleted(accepted.revision)),
            other => Told::Wrong(format!("an app was asked for, and {other:?} was made")),
        },
        Err(rejection) => match rejection.code {
            Code::NotFound => Told::Answer(Answer::Absent),
            Code::NameTaken => Told::Answer(Answer::Taken),
            code => Told::Wrong(format!("refused as {code:?}: {rejection:?}")),
        },
    }
}

async fn read(member: &Consensus, org: OrgId, name: &AppName) -> Told {
    if let Err(error) = member.linearize().await {
        return Told::Nothing(error.to_string());
    }
    let found = member.store().view().and_then(|view| Ok((view.app_by_name(org, name)?, view.revision())));
    match found {
        Ok((app, revision)) => Told::Answer(Answer::Found(app.map(|app| app.id), revision)),
        Err(error) => Told::Nothing(error.to_string()),
    }
}
