//! Whether a session may go on (I11): looked at again at every revision, and once in a while for what ends by time.

use super::Session;
use crate::caller::{Caller, still_holds};
use crate::problem::Refusal;
use crate::service::{Service, now, told_to_stop};
use holdfast_model::exec::ExecEnd;
use holdfast_store::Views;
use std::time::Duration;

/// Between two looks while nothing happens, in milliseconds: tokens and certificates end by time.
const LOOK_MS: u64 = 1_000;

/// Resolves when the session must be cut, with how it ends and a sentence for people.
pub(super) async fn taken_away(
    service: &Service,
    session: &Session,
    person: &Caller,
    node: &Caller,
) -> (ExecEnd, &'static str) {
    let (mut revisions, mut stopping) = (service.consensus.revisions(), service.stopping.clone());
    loop {
        match may_go_on(service, session, person, node) {
            Ok(None) => {}
            Ok(Some(end)) => return end,
            // A member that cannot read its state vouches for nobody.
            Err(_) => return (ExecEnd::Lost, "The member that passed the session on cannot serve any more."),
        }
        tokio::select! {
            changed = revisions.changed() => if changed.is_err() {
                return (ExecEnd::Lost, "The member that passed the session on stops.");
            },
            () = tokio::time::sleep(Duration::from_millis(LOOK_MS)) => {}
            () = told_to_stop(&mut stopping) => {
                return (ExecEnd::Lost, "The member that passed the session on stops; run the command again.");
            }
        }
    }
}

fn may_go_on(
    service: &Service,
    session: &Session,
    person: &Caller,
    node: &Caller,
) -> Result<Option<(ExecEnd, &'static str)>, Refusal> {
    let (view, time) = (service.view()?, now());
    if still_holds(person, &view, time).is_err() {
        return Ok(Some((ExecEnd::Revoked, "Your token was revoked, or has ended.")));
    }
    if view.exec_grant(session.grant)?.is_none() {
        return Ok(Some((ExecEnd::Revoked, "The exec session was ended by somebody else.")));
    }
    if still_holds(node, &view, time).is_err() {
        return Ok(Some((ExecEnd::Revoked, "The instance's node is not trusted any more.")));
    }
    Ok(None)
}
