//! `holdfast server sealing|rotate-sealing`: the cluster's key, to which the keys of envs and orgs are sealed.

use crate::args::tenant::Wait;
use crate::commands::rollout::Progress;
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::api::SealingStatus;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(300);

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
    let deadline = Instant::now() + wait.wait_timeout;
    let mut progress = Progress::new(session.output);
    loop {
        match session.client.sealing().await {
            Ok(answer) => {
                progress.say(&stand(&answer.item), "");
                if answer.item.stale == 0 {
                    progress.clear();
                    return session.output.show(&answer.item, || "The rotation is through.".to_owned());
                }
            }
            // The control plane may be away for a while; what it started goes on.
            Err(error) if error.is_retryable() => progress.say("no member answers; still trying", ""),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            progress.clear();
            return Err(Failure::WaitTimedOut { what: "The rotation".into(), after: wait.wait_timeout });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One line: to whom, and what is left.
fn stand(status: &SealingStatus) -> String {
    let Some(recipient) = &status.recipient else {
        return "The cluster has no sealing key yet; the leader makes one.".into();
    };
    let sealed = status.envelopes.saturating_sub(status.stale);
    format!("{sealed} of {} keys are sealed to {recipient}", status.envelopes)
}
