//! Watching a deployment until it is done. The deployment goes on whether or not it is watched.

use crate::args::tenant::Wait;
use crate::commands::instances::image;
use crate::failure::Failure;
use crate::output::{Output, word};
use crate::session::Session;
use holdfast_client::ClientError;
use holdfast_model::api::InstanceStatus;
use holdfast_model::resource::{Deployment, DeploymentState, Instance, InstanceState};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// Between two frames of the spinner.
const SPIN_EVERY: Duration = Duration::from_millis(120);

/// Prints the deployment, after watching it to its end if that was asked.
pub(crate) async fn finish(session: &Session, started: Deployment, wait: Wait) -> Result<(), Failure> {
    if wait.no_wait {
        return session
            .output
            .show(&started, || format!("Deployment {} is under way: {}", started.number, started.id));
    }
    let began = Instant::now();
    let ended = watch(session, &started, wait.wait_timeout).await?;
    session.output.show(&ended, || {
        format!("Deployment {} is complete after {:.1} s.", ended.number, began.elapsed().as_secs_f32())
    })
}

async fn watch(session: &Session, started: &Deployment, patience: Duration) -> Result<Deployment, Failure> {
    let deadline = Instant::now() + patience;
    let mut progress = Progress::new(session.output);
    loop {
        match look(session, started).await {
            Ok((deployment, shown)) => {
                let images = images(&deployment, &shown);
                let instances: Vec<Instance> = shown.into_iter().map(|shown| shown.instance).collect();
                progress.say(&stand(&deployment, &instances), &images);
                if let Some(ended) = ended(deployment, &instances) {
                    progress.clear();
                    return ended;
                }
            }
            // The control plane may be away for a while; what it started goes on.
            Err(error) if error.is_retryable() => {
                progress.say("no member answers; still trying", "");
            }
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            progress.clear();
            let what = format!("Deployment {}", started.number);
            return Err(Failure::WaitTimedOut { what, after: patience });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
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

/// A spinner where somebody watches; elsewhere a line for each change.
pub(crate) struct Progress {
    output: Output,
    bar: Option<ProgressBar>,
    last: String,
}

impl Progress {
    pub(crate) fn new(output: Output) -> Self {
        let bar = output.watched.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(SPIN_EVERY);
            bar
        });
        Self { output, bar, last: String::new() }
    }

    /// `more` changes often: who does not watch is not told.
    pub(crate) fn say(&mut self, line: &str, more: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{line}{more}")),
            None if line != self.last => self.output.remark(line),
            None => {}
        }
        line.clone_into(&mut self.last);
    }

    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.output.remark(&self.last);
        }
    }
}
