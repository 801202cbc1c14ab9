//! Releases, and what rolls them out.

use super::admission::env;
use super::{Decision, Refusal, absent, refuse, volume};
use crate::overlay::{Draft, Filing};
use crate::rollout;
use crate::views::{Views, required};
use holdfast_model::limits::SCALE_MAX;
use holdfast_model::resource::{DeploymentCause, Image, Release};
use holdfast_model::{
    Aggregate, Code, EnvId, EventPayload, Manifest, Output, ProcessName, ReleaseId, manifest::Process,
};
use std::collections::BTreeMap;

/// The longest name of an image's repository, in bytes.
const REPOSITORY_BYTES_MAX: usize = 512;

pub(super) fn create(draft: &mut Draft<'_>, of: EnvId, image: &Image, manifest: &Manifest) -> Decision {
    let env = env(draft, of)?;
    let app = required(draft.app(env.app)?, "an app")?;
    if manifest.app != app.name {
        return Err(refuse(
            Code::InvalidManifest,
            format!(
                "The manifest is for app «{}», not «{}»: deploy it to its own app.",
                manifest.app, app.name
            ),
        ));
    }
    if image.repository.is_empty() || image.repository.len() > REPOSITORY_BYTES_MAX {
        return Err(refuse(Code::InvalidRequest, "The image's repository must have 1–512 characters."));
    }
    let mounts = manifest.processes.values().any(|p| !p.mounts.is_empty());
    if (!manifest.volumes.is_empty() || mounts) && !draft.cluster_version()?.has_volumes() {
        return Err(refuse(
            Code::FailedPrecondition,
            "This cluster's version has no volumes: upgrade every member, or leave them out of the manifest.",
        ));
    }
    let Some(number) = env.releases.checked_add(1) else {
        return Err(refuse(
            Code::FailedPrecondition,
            "The env has no release numbers left: make another env.",
        ));
    };
    let manifest_hash =
        manifest.digest().map_err(|source| crate::StoreError::Encode { table: "manifest", source })?;
    let id = ReleaseId::from_bits(draft.fresh_id());
    let release = Release {
        id,
        env: of,
        app: env.app,
        org: env.org,
        number,
        image: image.clone(),
        manifest: manifest.clone(),
        manifest_hash,
        created_at: draft.context().now,
    };
    let filing = Filing::org(Aggregate::Release(id), env.org);
    draft.emit(filing, EventPayload::ReleaseCreated(Box::new(release)))?;
    Ok(Output::Release(id))
}

pub(super) fn deploy(
    draft: &mut Draft<'_>,
    of: EnvId,
    release: ReleaseId,
    asked: &BTreeMap<ProcessName, u32>,
) -> Decision {
    let env = env(draft, of)?;
    let release = draft.release(release)?.filter(|r| r.env == of).ok_or_else(|| absent("release"))?;
    check_counts(&release, asked)?;
    volume::check_declared(draft, &env, &release)?;
    let before = match env.current {
        Some(current) => required(draft.deployment(current)?, "a deployment")?.counts,
        None => BTreeMap::new(),
    };
    let mut counts = BTreeMap::new();
    for (name, process) in &release.manifest.processes {
        let kept = before.get(name).map(|count| (*count).min(most(process)));
        let count = asked.get(name).copied().or(kept).unwrap_or(process.scaling.min);
        counts.insert(name.clone(), count);
    }
    let id = rollout::start(draft, of, &release, DeploymentCause::Deploy, counts)?;
    rollout::advance(draft, of)?;
    Ok(Output::Deployment(id))
}

pub(super) fn scale(draft: &mut Draft<'_>, of: EnvId, asked: &BTreeMap<ProcessName, u32>) -> Decision {
    let env = env(draft, of)?;
    let Some(current) = env.current else {
        return Err(refuse(
            Code::FailedPrecondition,
            "Nothing is deployed to this env yet: deploy a release first.",
        ));
    };
    let current = required(draft.deployment(current)?, "a deployment")?;
    let release = required(draft.release(current.release)?, "a release")?;
    check_counts(&release, asked)?;
    volume::check_declared(draft, &env, &release)?;
    let mut counts = current.counts;
    counts.extend(asked.iter().map(|(name, count)| (name.clone(), *count)));
    let id = rollout::start(draft, of, &release, DeploymentCause::Scale, counts)?;
    rollout::advance(draft, of)?;
    Ok(Output::Deployment(id))
}

fn most(process: &Process) -> u32 {
    process.scaling.max.min(SCALE_MAX)
}

fn check_counts(release: &Release, asked: &BTreeMap<ProcessName, u32>) -> Result<(), Refusal> {
    for (name, count) in asked {
        let Some(process) = release.manifest.processes.get(name) else {
            return Err(refuse(
                Code::InvalidRequest,
                format!("The release has no process «{name}»: name one that its manifest declares."),
            ));
        };
        let most = most(process);
        if *count > most {
            return Err(refuse(
                Code::InvalidRequest,
                format!(
                    "«{name}» may have at most {most} instances, not {count}: raise `scaling.max`, or ask for fewer."
                ),
            ));
        }
    }
    Ok(())
}
