//! `holdfast server sealing|rotate-sealing`: the cluster's key, to which the keys of envs and orgs are sealed.

use crate::args::tenant::Wait;
use crate::commands::watch::{Progress, watch};
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::api::SealingStatus;

pub(crate) async fn show(session: &Session) -> Result<(), Failure> {
    let status = session.client.sealing().await?.item;
    session.output.show(&status, || stand(&status))
}

/// Begins a rotation and watches it to its end. The leader carries it on whether or not it is watched; that it began and
/// each key that was sealed anew are events.
pub(crate) async fn rotate(session: &Session, wait: Wait) -> Result<(), Failure> {
    let begun = session.client.rotate_sealing().await?.item;
    if wait.no_wait {
        return session.output.show(&begun, || format!("The rotation is under way: {}", stand(&begun)));
    }
    let look = async |progress: &mut Progress| {
        let status = session.client.sealing().await?.item;
        progress.say(&stand(&status), "");
        Ok((status.stale == 0).then_some(status))
    };
    let through = watch(session, "The rotation", wait.wait_timeout, look).await?;
    session.output.show(&through, || "The rotation is through.".to_owned())
}

/// One line: to whom, and what is left.
fn stand(status: &SealingStatus) -> String {
    let Some(recipient) = &status.recipient else {
        return "The cluster has no sealing key yet; the leader makes one.".into();
    };
    let sealed = status.envelopes.saturating_sub(status.stale);
    format!("{sealed} of {} keys are sealed to {recipient}", status.envelopes)
}
