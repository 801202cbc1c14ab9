//! Volumes in a roll-out: made when a deployment declares them, given to one instance at a time, and free again only when
//! the node of that instance has said that it is gone.
//!
//! A volume's disk lies on its home. So whoever has one is not given up when its node is silent: nothing could take its
//! place, and it may well be running (I5, I7).

use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use crate::volume_snapshot_views::SnapshotViews as _;
use holdfast_model::manifest::{Manifest, Process};
use holdfast_model::resource::{Env, Instance, Release, Unschedulable};
use holdfast_model::volume::{NodeVolume, Volume};
use holdfast_model::{Aggregate, EnvId, EventPayload, NodeId, VolumeId};

/// Makes the volumes that a release declares and its env does not have.
pub(crate) fn create_missing(draft: &mut Draft<'_>, env: &Env, release: &Release) -> Result<(), StoreError> {
    for (name, declared) in missing(draft, env.id, &release.manifest)? {
        let id = VolumeId::from_bits(draft.fresh_id());
        let volume = Volume {
            id,
            env: env.id,
            app: env.app,
            org: env.org,
            name,
            size_mib: declared.size_mib,
            backup: declared.backup,
            home: None,
            attached: None,
            generation: 0,
            used: false,
            version: 1,
            created_at: draft.context().now,
        };
        draft.emit(Filing::org(Aggregate::Volume(id), env.org), EventPayload::VolumeCreated(volume))?;
    }
    Ok(())
}

type Declared = (holdfast_model::VolumeName, holdfast_model::manifest::Volume);

/// What a manifest declares and an env does not have, by name.
pub(crate) fn missing(
    views: &impl Views,
    env: EnvId,
    manifest: &Manifest,
) -> Result<Vec<Declared>, StoreError> {
    let mut missing = Vec::new();
    for (name, declared) in &manifest.volumes {
        if views.volume_by_name(env, name)?.is_none() {
            missing.push((name.clone(), declared.clone()));
        }
    }
    Ok(missing)
}

/// Whether an instance has any volume.
pub(crate) fn has_any(views: &impl Views, instance: &Instance) -> Result<bool, StoreError> {
    Ok(!views.volumes_of(instance)?.is_empty())
}

/// Where a process with mounts can be placed, and what it would get.
pub(crate) struct Wanted {
    /// Its volumes, in the order of its mounts.
    pub(crate) volumes: Vec<Volume>,
    /// The only node that can take it; any, while no volume has a home.
    pub(crate) home: Option<NodeId>,
}

/// What a process needs of volumes, if it can have that now.
pub(crate) fn wanted(
    draft: &Draft<'_>,
    env: EnvId,
    process: &Process,
) -> Result<Result<Wanted, Unschedulable>, StoreError> {
    let mut wanted = Wanted { volumes: Vec::with_capacity(process.mounts.len()), home: None };
    for mount in &process.mounts {
        // Deleted since it was deployed.
        let Some(volume) = draft.volume_by_name(env, &mount.volume)? else {
            return Ok(Err(Unschedulable::VolumeLocality));
        };
        if draft.volume_restore(volume.id)?.is_some() {
            return Ok(Err(Unschedulable::VolumeRestoring));
        }
        // A manifest names each once.
        if wanted.volumes.iter().any(|other| other.id == volume.id) {
            return Ok(Err(Unschedulable::VolumeInUse));
        }
        let two_homes = wanted.home.is_some() && volume.home.is_some() && wanted.home != volume.home;
        if two_homes {
            return Ok(Err(Unschedulable::VolumeLocality));
        }
        wanted.home = wanted.home.or(volume.home);
        wanted.volumes.push(volume);
    }
    if let Some(home) = wanted.home
        && draft.node(home)?.is_none_or(|node| !node.takes_instances())
    {
        return Ok(Err(Unschedulable::VolumeLocality));
    }
    if wanted.volumes.iter().any(|volume| volume.attached.is_some()) {
        return Ok(Err(Unschedulable::VolumeInUse));
    }
    Ok(Ok(wanted))
}

/// Gives volumes that nobody has to an instance that was just placed.
pub(crate) fn attach(
    draft: &mut Draft<'_>,
    instance: &Instance,
    volumes: &[Volume],
) -> Result<(), StoreError> {
    for volume in volumes {
        let filing = Filing::org(Aggregate::Volume(volume.id), volume.org).of(instance.deployment);
        let payload = EventPayload::VolumeAttached {
            volume: volume.id,
            instance: instance.id,
            node: instance.node,
            generation: volume.generation + 1,
            fresh: !volume.used,
        };
        draft.emit(filing, payload)?;
    }
    Ok(())
}

/// Frees what an instance had: its own node has said that nothing of it is left.
pub(crate) fn detach(draft: &mut Draft<'_>, instance: &Instance) -> Result<(), StoreError> {
    for volume in draft.volumes_of(instance)? {
        let filing = Filing::org(Aggregate::Volume(volume.id), volume.org).of(instance.deployment);
        let used = volume.used || instance.was_ready;
        let payload = EventPayload::VolumeDetached { volume: volume.id, instance: instance.id, used };
        draft.emit(filing, payload)?;
    }
    Ok(())
}

/// An instance's volumes as its node is to know them, by id.
pub(crate) fn of_node_instance(
    view: &(impl Views + ?Sized),
    instance: &Instance,
    process: &Process,
) -> Result<Vec<NodeVolume>, StoreError> {
    if process.mounts.is_empty() {
        return Ok(Vec::new());
    }
    let mut volumes = Vec::with_capacity(process.mounts.len());
    for mount in &process.mounts {
        let found = required(view.volume_by_name(instance.env, &mount.volume)?, "an attached volume")?;
        let Some(attached) = found.attached.filter(|attached| attached.instance == instance.id) else {
            return Err(StoreError::corrupt(format!("{} runs without a volume that it mounts", instance.id)));
        };
        volumes.push(NodeVolume {
            id: found.id,
            generation: found.generation,
            size_mib: found.size_mib,
            fresh: attached.fresh,
            path: mount.path.clone(),
            read_only: mount.read_only,
        });
    }
    volumes.sort_by_key(|volume| volume.id);
    Ok(volumes)
}
