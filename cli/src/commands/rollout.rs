//! Watching a deployment until it is done. The deployment goes on whether or not it is watched.

use crate::args::tenant::Wait;
use crate::commands::instances::image;
use crate::commands::watch::{Progress, watch};
use crate::failure::Failure;
use crate::output::word;
use crate::session::Session;
use holdfast_client::ClientError;
use holdfast_model::api::InstanceStatus;
use holdfast_model::resource::{Deployment, DeploymentState, Instance, InstanceState};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Prints the deployment, after watching it to its end if that was asked.
pub(crate) async fn finish(session: &Session, started: Deployment, wait: Wait) -> Result<(), Failure> {
    if wait.no_wait {
        return session
            .output
            .show(&started, || format!("Deployment {} is under way: {}", started.number, started.id));
    }
    let began = Instant::now();
    let ended = watch_deployment(session, &started, wait.wait_timeout).await?;
    session.output.show(&ended, || {
        format!("Deployment {} is complete after {:.1} s.", ended.number, began.elapsed().as_secs_f32())
    })
}

async fn watch_deployment(
    session: &Session,
    started: &Deployment,
    patience: Duration,
) -> Result<Deployment, Failure> {
    let what = format!("Deployment {}", started.number);
    let look = async |progress: &mut Progress| {
        let (deployment, shown) = look(session, started).await?;
        let images = images(&deployment, &shown);
        let instances: Vec<Instance> = shown.into_iter().map(|shown| shown.instance).collect();
        progress.say(&stand(&deployment, &instances), &images);
        Ok(ended(deployment, &instances))
    };
    watch(session, &what, patience, look).await?
}

async fn look(
    session: &Session,
    started: &Deployment,
) -> Result<(Deployment, Vec<InstanceStatus>), ClientError> {
    let deployment = session.client.deployment(started.id).await?.item;
    let all = session.client.instances(started.env, true).await?.items;
    Ok((deployment, all))
}

/// What came of the deployment, once it has ended.
fn ended(deployment: Deployment, instances: &[Instance]) -> Option<Result<Deployment, Failure>> {
    match deployment.state {
        DeploymentState::Rolling => None,
        DeploymentState::Complete => Some(Ok(deployment)),
        DeploymentState::Superseded => Some(Err(Failure::RollOut(format!(
            "Deployment {} was superseded by a later one before it was complete.",
            deployment.number
        )))),
        DeploymentState::Failed => {
            let why = deployment.failure.map_or_else(String::new, |f| format!(" ({})", word(&f)));
            Some(Err(Failure::RollOut(format!(
                "Deployment {} failed{why}{}; the env goes back to its last good release.",
                deployment.number,
                reasons(&deployment, instances)
            ))))
        }
    }
}

/// Why instances of the deployment failed, each reason once.
fn reasons(deployment: &Deployment, instances: &[Instance]) -> String {
    let failed =
        instances.iter().filter(|i| i.deployment == deployment.id && i.state == InstanceState::Failed);
    let mut reasons: Vec<String> = failed
        .filter_map(|i| {
            let reason = word(&i.reason?);
            Some(i.detail.as_ref().map_or_else(|| reason.clone(), |detail| format!("{reason}: {detail}")))
        })
        .collect();
    reasons.sort();
    reasons.dedup();
    if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join("; ")) }
}

/// One line: how many of each process are ready, and what holds it up.
fn stand(deployment: &Deployment, instances: &[Instance]) -> String {
    let of_release = |i: &&Instance| i.release == deployment.release && !i.state.is_final();
    let mut states: BTreeMap<_, BTreeMap<InstanceState, u32>> = BTreeMap::new();
    for instance in instances.iter().filter(of_release) {
        *states.entry(&instance.process).or_default().entry(instance.state).or_default() += 1;
    }
    let mut parts: Vec<String> = Vec::new();
    for (process, wanted) in &deployment.counts {
        let of_process = states.get(process);
        let number = |state| of_process.and_then(|s| s.get(&state)).copied().unwrap_or(0);
        let mut part = format!("{process} {}/{wanted} ready", number(InstanceState::Ready));
        for state in [InstanceState::Booting, InstanceState::Draining] {
            if number(state) > 0 {
                part.push_str(&format!(", {} {}", number(state), word(&state)));
            }
        }
        parts.push(part);
    }
    let old = instances.iter().filter(|i| i.release != deployment.release && !i.state.is_final()).count();
    if old > 0 {
        parts.push(format!("{old} of an older release"));
    }
    if let Some(blocked) = deployment.unschedulable {
        parts.push(format!("cannot be placed: {}", word(&blocked)));
    }
    parts.join(" · ")
}

/// How far the image is of the deployment's instance whose image is least far, if one waits for its own.
fn images(deployment: &Deployment, shown: &[InstanceStatus]) -> String {
    let of_release = shown.iter().filter(|shown| shown.instance.release == deployment.release);
    let least = of_release
        .filter_map(|shown| shown.image_progress)
        .min_by_key(|progress| (progress.phase, progress.received_bytes, progress.layer));
    least.map_or_else(String::new, |progress| format!(" · {}", image(&progress)))
}
