//! `holdfast server verify|rebuild|recover --data-dir`: what is done with the folder of a member that does not run.
//!
//! A running member holds its files, so none of this can happen under its feet. Nothing here reaches over a network.

use super::folder::Folder;
use crate::args::operator::Recover;
use crate::failure::{Failure, with_sources};
use crate::output::Output;
use holdfast_api::service::RequestInfo;
use holdfast_model::{Command, Context, Incarnation, Proposal, Revision};
use holdfast_raft::{Consensus, MemberIdentity, MemberNode};
use holdfast_store::{Store, Views};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The state's file in a member's folder.
const STATE_FILE: &str = "state.redb";

fn host(error: &dyn std::error::Error) -> Failure {
    Failure::Host(with_sources(error))
}

fn open(data_dir: &Path) -> Result<Store, Failure> {
    Folder::open(data_dir)?;
    let path = data_dir.join(STATE_FILE);
    if !path.exists() {
        return Err(Failure::Host(format!(
            "{} is not there: the member has no state yet. Run it once, and it makes the state from its log.",
            path.display()
        )));
    }
    Store::open(&path).map_err(|e| host(&e))
}

#[derive(Serialize)]
struct Verified {
    revision: Revision,
    rows: u64,
    events: u64,
    state: String,
}

/// Reads every row and event of a stopped member, and replays its history. Changes nothing.
pub(crate) fn verify(output: &Output, data_dir: &Path) -> Result<(), Failure> {
    let found = open(data_dir)?.verify().map_err(|e| host(&e))?;
    let state = found.state.to_string();
    let shown = Verified { revision: found.revision, rows: found.rows, events: found.events, state };
    output.show(&shown, || {
        format!(
            "Sound: {} rows and {} events agree at revision {}; the state's digest is {}.",
            shown.rows, shown.events, shown.revision, shown.state
        )
    })
}

#[derive(Serialize)]
struct Rebuilt {
    revision: Revision,
    views: String,
    /// Rows by table, when only looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<BTreeMap<&'static str, u64>>,
}

/// What the views were at a revision, for people to read.
pub(crate) fn views_at<'a>(
    revision: Revision,
    views: &str,
    rows: impl Iterator<Item = (&'a str, u64)>,
) -> String {
    let rows: String = rows.map(|(table, count)| format!("\n{count:>8}  {table}")).collect();
    format!(
        "At revision {revision} the views had the digest {views}.\n    ROWS  TABLE{rows}\nNothing was changed."
    )
}

/// Makes the views of a stopped member anew from its events, or tells what they were at a revision.
pub(crate) fn rebuild(output: &Output, data_dir: &Path, to: Option<Revision>) -> Result<(), Failure> {
    let store = open(data_dir)?;
    let Some(to) = to else {
        let rebuilt = store.rebuild().map_err(|e| host(&e))?;
        let shown = Rebuilt { revision: rebuilt.revision, views: rebuilt.views.to_string(), rows: None };
        return output.show(&shown, || {
            format!(
                "The views are made anew up to revision {}; their digest is {}.",
                shown.revision, shown.views
            )
        });
    };
    let replayed = store.replayed(to).map_err(|e| host(&e))?;
    let shown = Rebuilt {
        revision: replayed.rebuilt.revision,
        views: replayed.rebuilt.views.to_string(),
        rows: Some(replayed.rows),
    };
    output.show(&shown, || {
        let rows = shown.rows.iter().flatten().map(|(table, count)| (*table, *count));
        views_at(shown.revision, &shown.views, rows)
    })
}

#[derive(Serialize)]
struct Recovered {
    cluster: String,
    member: holdfast_model::MemberId,
    incarnation: Incarnation,
    /// The last log entry that was kept.
    kept_through: u64,
}

/// Goes on with the stopped member of a folder alone, in a new incarnation.
pub(crate) fn recover(output: &Output, arguments: &Recover) -> Result<(), Failure> {
    let (_, member) = Folder::open(&arguments.data_dir)?;
    if !arguments.i_understand_that_writes_may_be_lost {
        let (term, index) =
            Consensus::log_end(&arguments.data_dir).map_err(|e| host(&e))?.unwrap_or_default();
        return Err(Failure::Usage(format!(
            "The log of member {} ends at term {term}, entry {index}; of several survivors take the one with the highest \
             term, and then entry. What only the lost members had is lost, and if one of them still runs there are two \
             clusters: stop them for good, and say so with --i-understand-that-writes-may-be-lost.",
            member.member
        )));
    }
    let identity = Consensus::identity_of(&arguments.data_dir).map_err(|e| host(&e))?;
    let store = open(&arguments.data_dir)?;
    let view = store.view().map_err(|e| host(&e))?;
    // After a crash the state may be behind the log, even empty: then it says nothing, and the log is what goes on.
    let known = view.member(member.member).map_err(|e| host(&e))?;
    if known.is_some_and(|m| m.removed) {
        return Err(Failure::Host(
            "This member was removed from the cluster; choose another survivor.".into(),
        ));
    }
    let cluster = view.cluster().map_err(|e| host(&e))?;
    let known = cluster.map_or(Incarnation(1), |cluster| cluster.incarnation);
    if identity.is_some_and(|identity| identity.incarnation > known.0) {
        return Err(Failure::Host(format!(
            "This member was recovered already, and has not run since for long enough to write it down. Run it: holdfast \
             server run --data-dir {}",
            arguments.data_dir.display()
        )));
    }
    // Closes the file: the recovery itself is done in the log.
    drop((view, store));
    let node = MemberNode { raft_addr: member.raft_addr.clone(), api_addr: member.api_addr.clone() };
    let done = Consensus::recover(&arguments.data_dir, node, begin).map_err(|e| host(&e))?;
    let shown = Recovered {
        cluster: done.identity.cluster,
        member: done.identity.member,
        incarnation: Incarnation(done.identity.incarnation),
        kept_through: done.kept_through,
    };
    output.show(&shown, || {
        format!(
            "Member {} is now the only one of {}, in incarnation {}; log entries up to {} were kept.\nRun it: holdfast \
             server run --data-dir {}\nThen let new members join. Never start the others again.",
            shown.member,
            shown.cluster,
            shown.incarnation,
            shown.kept_through,
            arguments.data_dir.display()
        )
    })
}

/// The proposal that says in the history who went on, and since when.
fn begin(identity: &MemberIdentity) -> Proposal {
    let request = RequestInfo::of_member(identity.member);
    let context = Context {
        actor: request.actor,
        actor_org: None,
        source: None,
        request_id: request.request_id,
        idempotency_key: None,
        now: request.now,
        entropy: request.entropy,
    };
    let incarnation = Incarnation(identity.incarnation);
    Proposal { context, command: Command::BeginIncarnation { incarnation, survivor: identity.member } }
}
