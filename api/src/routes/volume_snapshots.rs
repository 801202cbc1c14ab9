//! Snapshots of volumes: asked for, listed, deleted, restored into new volumes; and what their nodes have to do.

use super::apps::{env, gone, vanished};
use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, done, found, page};
use crate::sealing;
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{Answer, AskSnapshotKey, Done, Page, RestoreSnapshot, SnapshotKey};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::{SNAPSHOT_NEWS_MAX, SNAPSHOTS_AT_ONCE_MAX};
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{
    RestoreVolume, SnapshotNews, SnapshotOf, SnapshotState, SnapshotWork, TakeSnapshot, VolumeRestore,
    VolumeSnapshot,
};
use holdfast_model::{Command, NodeId, Output, Scope};
use holdfast_store::{SnapshotViews, View, Views};
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let (read, write) = (Need::Scope(Scope::VolumesRead), Need::Scope(Scope::VolumesWrite));
    table.add(
        Endpoint::get("/v1/envs/{env}/snapshots", read, "List the snapshots of an env's volumes")
            .reads()
            .answers::<Page<VolumeSnapshot>>(200),
        list,
    );
    table.add(
        Endpoint::post("/v1/volumes/{volume}/snapshots", write, "Take a snapshot of a volume")
            .answers::<Answer<VolumeSnapshot>>(201),
        create,
    );
    table.add(
        Endpoint::get("/v1/snapshots/{snapshot}", read, "Show a volume snapshot")
            .reads()
            .answers::<Answer<VolumeSnapshot>>(200),
        show,
    );
    table.add(
        Endpoint::delete(
            "/v1/snapshots/{snapshot}",
            write,
            "Delete a volume snapshot, and the only key to it",
        )
        .answers::<Done>(200),
        delete,
    );
    table.add(
        Endpoint::post("/v1/snapshots/{snapshot}/restore", write, "Make a new volume from a snapshot")
            .body::<RestoreSnapshot>()
            .answers::<Answer<Volume>>(201),
        restore,
    );
    table.add(
        Endpoint::get(
            "/v1/volumes/{volume}/restore",
            read,
            "Show what a volume is being made from; absent when it is whole",
        )
        .reads()
        .answers::<Answer<VolumeRestore>>(200),
        restoring,
    );
    table.add(
        Endpoint::post(
            "/v1/agent/snapshots/key",
            Need::Agent,
            "The key of the snapshot that the node restores a volume from, sealed to it",
        )
        .body::<AskSnapshotKey>()
        .answers::<Answer<SnapshotKey>>(200),
        key,
    );
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    let mut snapshots = view.org_snapshots(env.org)?;
    snapshots.retain(|snapshot| snapshot.env == env.id);
    Ok(page(view.revision(), snapshots, None))
}

fn visible(call: &Call, view: &View) -> Result<VolumeSnapshot, Refusal> {
    let snapshot = view.volume_snapshot(call.id("snapshot", "volume snapshot")?)?;
    call.caller.visible("volume snapshot", snapshot, |snapshot| snapshot.org)
}

async fn show(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    Ok(found(view.revision(), visible(&call, &view)?))
}

async fn create(call: Call) -> Result<Response, Refusal> {
    let command = Command::CreateSnapshot { volume: call.id("volume", "volume")? };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Snapshot(id) = accepted.output else { return Err(vanished("volume snapshot")) };
    let snapshot = view.volume_snapshot(id)?;
    let snapshot = snapshot.ok_or_else(|| gone("volume snapshot", id, accepted.revision))?;
    Ok(created(accepted.revision, snapshot))
}

async fn delete(call: Call) -> Result<Response, Refusal> {
    let command = Command::DeleteSnapshot { snapshot: call.id("snapshot", "volume snapshot")? };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn restore(call: Call, Body(body): Body<RestoreSnapshot>) -> Result<Response, Refusal> {
    let snapshot = call.id("snapshot", "volume snapshot")?;
    let command = Command::RestoreSnapshot { snapshot, name: body.name };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Volume(id) = accepted.output else { return Err(vanished("volume")) };
    let volume = view.volume(id)?.ok_or_else(|| gone("volume", id, accepted.revision))?;
    Ok(created(accepted.revision, volume))
}

async fn restoring(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let volume = view.volume(call.id("volume", "volume")?)?;
    let volume = call.caller.visible("volume", volume, |volume| volume.org)?;
    let restore =
        view.volume_restore(volume.id)?.ok_or_else(|| Refusal::not_found("restore of the volume"))?;
    Ok(found(view.revision(), restore))
}

/// Only the node that a volume is being restored on gets the key of what it is restored from (I9).
async fn key(call: Call, Body(body): Body<AskSnapshotKey>) -> Result<Response, Refusal> {
    let AgentRef::Node(node) = call.caller.agent()? else { return Err(Refusal::not_found("volume")) };
    let view = call.view().await?;
    let restore = view.volume_restore(body.volume)?.filter(|r| r.node == node && r.failed.is_none());
    let restore = restore.ok_or_else(|| Refusal::not_found("volume"))?;
    let sealed =
        sealing::deliver_snapshot_key(&call.service, &view, node, restore.snapshot, &body.recipient)?;
    Ok(found(view.revision(), SnapshotKey { sealed }))
}

/// What a node's news change. Agents repeat themselves at every heartbeat, and that must not reach the log.
pub(super) fn changed(view: &View, node: NodeId, told: &SnapshotNews) -> Result<SnapshotNews, Refusal> {
    if told.is_empty() || !view.cluster_version()?.has_snapshots() {
        return Ok(SnapshotNews::default());
    }
    if told.len() > SNAPSHOT_NEWS_MAX || !told.fits() {
        return Err(Refusal::invalid(
            "The report tells of more than 100 snapshots, or with too long a text.",
        ));
    }
    Ok(view.new_of_snapshots(node, told)?)
}

/// What a node has to do. A snapshot's key is made when its node first asks.
pub(super) async fn work(service: &Service, node: NodeId) -> Result<SnapshotWork, Refusal> {
    let view = service.view()?;
    if !view.cluster_version()?.has_snapshots() || !view.node(node)?.is_some_and(|node| node.is_trusted()) {
        return Ok(SnapshotWork::default());
    }
    let snapshots = view.snapshots_to_take(node, SNAPSHOTS_AT_ONCE_MAX)?;
    let mut work = SnapshotWork {
        forget: view.snapshots_to_erase(node, SNAPSHOT_NEWS_MAX)?.into_iter().collect(),
        ..SnapshotWork::default()
    };
    for restore in view.restores_to_do(node, SNAPSHOTS_AT_ONCE_MAX)? {
        let (volume, from) = (view.volume(restore.volume)?, view.volume_snapshot(restore.snapshot)?);
        let (Some(volume), Some(from)) = (volume, from) else { continue };
        let SnapshotState::Uploaded { manifest, .. } = from.state else { continue };
        let from = of(&from);
        work.restore.push(RestoreVolume { volume: volume.id, size_mib: volume.size_mib, from, manifest });
    }
    let mut attached = Vec::with_capacity(snapshots.len());
    for snapshot in &snapshots {
        attached.push(view.volume(snapshot.volume)?.and_then(|volume| volume.attached).map(|a| a.instance));
    }
    drop(view);
    for (snapshot, attached) in snapshots.into_iter().zip(attached) {
        match sealing::snapshot_recipient(service, snapshot.id).await {
            Ok(recipient) => {
                let (of, size_mib) = (of(&snapshot), snapshot.size_mib);
                work.take.push(TakeSnapshot { of, size_mib, attached, recipient });
            }
            // The agent's report counts all the same; it asks again at its next heartbeat.
            Err(refusal) => tracing::warn!(snapshot = %snapshot.id, %refusal, "a snapshot has no key yet"),
        }
    }
    Ok(work)
}

fn of(snapshot: &VolumeSnapshot) -> SnapshotOf {
    SnapshotOf { org: snapshot.org, volume: snapshot.volume, snapshot: snapshot.id }
}
