//! Volumes: what may be made, deleted and erased.

use super::agents::node;
use super::{Decision, Refusal, absent, admission::sees, expect_version, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use crate::volumes;
use holdfast_model::limits::{VOLUMES_ERASED_MAX, VOLUMES_ORG_MAX, VOLUMES_ORG_MIB_MAX};
use holdfast_model::resource::{Env, Release};
use holdfast_model::{Aggregate, Code, EventPayload, NodeId, OrgId, Output, VolumeId};
use std::collections::BTreeSet;

/// Refuses a release whose volumes its env cannot have: too large for what is there, or beyond the org's quota.
pub(super) fn check_declared(draft: &Draft<'_>, env: &Env, release: &Release) -> Result<(), Refusal> {
    for (name, declared) in &release.manifest.volumes {
        let Some(volume) = draft.volume_by_name(env.id, name)? else { continue };
        if declared.size_mib > volume.size_mib {
            let message = format!(
                "The volume «{name}» has {} MiB and cannot grow to {}: declare another one and move what is on it.",
                volume.size_mib, declared.size_mib
            );
            return Err(refuse(Code::FailedPrecondition, message));
        }
    }
    let missing = volumes::missing(draft, env.id, &release.manifest)?;
    if missing.is_empty() {
        return Ok(());
    }
    check_quota(draft, env.org, missing.iter().map(|(_, declared)| declared.size_mib))
}

/// Refuses more volumes, of these sizes, than an org may have.
pub(super) fn check_quota(
    draft: &Draft<'_>,
    org: OrgId,
    more_mib: impl ExactSizeIterator<Item = u64>,
) -> Result<(), Refusal> {
    let has = draft.org_volumes(org)?;
    let count = has.len() + more_mib.len();
    if count > VOLUMES_ORG_MAX {
        let message =
            format!("The org may have {VOLUMES_ORG_MAX} volumes and would have {count}: delete some.");
        return Err(refuse(Code::QuotaExceeded, message));
    }
    let sizes = has.iter().map(|v| v.size_mib).chain(more_mib);
    let size_mib = sizes.fold(0u64, u64::saturating_add);
    if size_mib > VOLUMES_ORG_MIB_MAX {
        let message = format!(
            "The org's volumes may have {VOLUMES_ORG_MIB_MAX} MiB in all and would have {size_mib}: delete some."
        );
        return Err(refuse(Code::QuotaExceeded, message));
    }
    Ok(())
}

pub(super) fn delete(draft: &mut Draft<'_>, id: VolumeId, expected_version: Option<u64>) -> Decision {
    let volume = draft.volume(id)?.filter(|v| sees(draft, v.org)).ok_or_else(|| absent("volume"))?;
    expect_version(expected_version, volume.version)?;
    // What runs on a node that was cut off counts no more, and no other node can ever have this disk.
    let cut_off = match volume.home {
        Some(home) => draft.node(home)?.is_none_or(|node| !node.is_trusted()),
        None => false,
    };
    if let (Some(attached), false) = (volume.attached, cut_off) {
        let message = format!(
            "The volume is attached to {}: scale that process to 0 and wait until it has stopped.",
            attached.instance
        );
        return Err(refuse(Code::FailedPrecondition, message));
    }
    if !cut_off && is_wanted(draft, &volume.name, volume.env)? {
        let message =
            "What is deployed mounts the volume: scale that process to 0, or deploy a release without it.";
        return Err(refuse(Code::FailedPrecondition, message));
    }
    let filing = Filing::org(Aggregate::Volume(id), volume.org);
    draft.emit(filing, EventPayload::VolumeDeleted { volume: id })?;
    Ok(Output::None)
}

/// Whether an env's deployment wants instances that mount the volume.
fn is_wanted(
    draft: &Draft<'_>,
    name: &holdfast_model::VolumeName,
    env: holdfast_model::EnvId,
) -> Result<bool, Refusal> {
    let Some(current) = draft.env(env)?.and_then(|env| env.current) else { return Ok(false) };
    let deployment = required(draft.deployment(current)?, "a deployment")?;
    let release = required(draft.release(deployment.release)?, "a release")?;
    Ok(release.manifest.processes.iter().any(|(process, spec)| {
        let wanted = deployment.counts.get(process).is_some_and(|count| *count > 0);
        wanted && spec.mounts.iter().any(|mount| mount.volume == *name)
    }))
}

pub(super) fn erased(draft: &mut Draft<'_>, id: NodeId, volumes: &BTreeSet<VolumeId>) -> Decision {
    let node = node(draft, id)?;
    if volumes.len() > VOLUMES_ERASED_MAX {
        let message = format!("A report names at most {VOLUMES_ERASED_MAX} erased volumes: send several.");
        return Err(refuse(Code::InvalidRequest, message));
    }
    let asked: BTreeSet<_> = draft.volumes_to_erase(node.id, VOLUMES_ERASED_MAX)?.into_iter().collect();
    for volume in volumes.intersection(&asked) {
        let payload = EventPayload::VolumeErased { volume: *volume, node: node.id };
        draft.emit(Filing::cluster(Aggregate::Volume(*volume)), payload)?;
    }
    Ok(Output::None)
}
