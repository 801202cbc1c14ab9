//! Snapshots of volumes: asked for, told of by the volume's home, deleted, and restored into new volumes.

use super::agents::node;
use super::volume::check_quota;
use super::{Decision, Refusal, absent, admission::sees, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use crate::volume_snapshot_views::SnapshotViews as _;
use crate::volume_snapshots::{self, has_disk};
use holdfast_model::limits::{SNAPSHOT_NEWS_MAX, SNAPSHOTS_ASKED_MAX, SNAPSHOTS_ORG_MAX};
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{Restored, SnapshotCause, SnapshotNews, VolumeSnapshot};
use holdfast_model::{Aggregate, Code, EventPayload, NodeId, Output, SnapshotId, VolumeId, VolumeName};
use std::collections::BTreeSet;

fn snapshot(draft: &Draft<'_>, id: SnapshotId) -> Result<VolumeSnapshot, Refusal> {
    let found = draft.volume_snapshot(id)?.filter(|snapshot| sees(draft, snapshot.org));
    found.ok_or_else(|| absent("volume snapshot"))
}

pub(super) fn create(draft: &mut Draft<'_>, id: VolumeId) -> Decision {
    let volume = draft.volume(id)?.filter(|v| sees(draft, v.org)).ok_or_else(|| absent("volume"))?;
    let precondition = |message: &str| Err(refuse(Code::FailedPrecondition, message));
    if draft.volume_restore(id)?.is_some() {
        return precondition("The volume is not whole: it is being restored, or could not be.");
    }
    if !has_disk(&volume) {
        return precondition("There is nothing on the volume yet: no instance has mounted it.");
    }
    let trusted = match volume.home {
        Some(home) => draft.node(home)?.is_some_and(|node| node.is_trusted()),
        None => false,
    };
    if !trusted {
        return precondition("The node that has the volume was cut off, and what it says does not count.");
    }
    let snapshots = draft.snapshots_of_volume(id)?;
    if let Some(other) = snapshots.iter().find(|other| other.state.is_under_way()) {
        let message =
            format!("The snapshot {} of the volume is under way: wait for its end, or delete it.", other.id);
        return Err(refuse(Code::FailedPrecondition, message));
    }
    let asked =
        snapshots.iter().filter(|other| other.cause == SnapshotCause::Asked && !other.state.is_failed());
    if asked.count() >= SNAPSHOTS_ASKED_MAX {
        let message = format!(
            "A volume may have {SNAPSHOTS_ASKED_MAX} snapshots that were asked for: delete some first."
        );
        return Err(refuse(Code::QuotaExceeded, message));
    }
    if draft.org_snapshots(volume.org)?.len() >= SNAPSHOTS_ORG_MAX {
        let message = format!("An org may have {SNAPSHOTS_ORG_MAX} snapshots: delete some first.");
        return Err(refuse(Code::QuotaExceeded, message));
    }
    let made = volume_snapshots::request(draft, &volume, SnapshotCause::Asked)?;
    made.map(Output::Snapshot).ok_or_else(|| absent("volume"))
}

pub(super) fn delete(draft: &mut Draft<'_>, id: SnapshotId) -> Decision {
    let snapshot = snapshot(draft, id)?;
    if draft.is_being_restored(id)? {
        let message =
            "A volume is being restored from the snapshot: wait for its end, or delete that volume.";
        return Err(refuse(Code::FailedPrecondition, message));
    }
    volume_snapshots::delete(draft, &snapshot)?;
    Ok(Output::None)
}

pub(super) fn restore(draft: &mut Draft<'_>, id: SnapshotId, name: &VolumeName) -> Decision {
    let snapshot = snapshot(draft, id)?;
    if !snapshot.state.is_good() {
        let message = "Only a snapshot that was uploaded can be restored: see `holdfast volume snapshots`.";
        return Err(refuse(Code::FailedPrecondition, message));
    }
    if draft.volume_by_name(snapshot.env, name)?.is_some() {
        let message =
            format!("The env has a volume «{name}» already: choose another name, or delete that one.");
        return Err(refuse(Code::NameTaken, message));
    }
    check_quota(draft, snapshot.org, std::iter::once(snapshot.size_mib))?;
    let Some(home) = volume_snapshots::choose_home(draft, &snapshot)? else {
        let message = "No node can take the volume now: wait until one is active and heard from.";
        return Err(refuse(Code::FailedPrecondition, message));
    };
    let id = VolumeId::from_bits(draft.fresh_id());
    let volume = Volume {
        id,
        env: snapshot.env,
        app: snapshot.app,
        org: snapshot.org,
        name: name.clone(),
        size_mib: snapshot.size_mib,
        backup: draft.volume(snapshot.volume)?.is_some_and(|volume| volume.backup),
        home: Some(home),
        attached: None,
        generation: 0,
        // Its disk is never made anew: what was restored is there, or the volume is of no use.
        used: true,
        version: 1,
        created_at: draft.context().now,
    };
    let filing = Filing::org(Aggregate::Volume(id), snapshot.org);
    let payload = EventPayload::VolumeRestoreBegan { volume: Box::new(volume), snapshot: snapshot.id };
    draft.emit(filing, payload)?;
    Ok(Output::Volume(id))
}

/// What a node tells counts for what lies with it, and for nothing else (I9).
pub(super) fn report(draft: &mut Draft<'_>, id: NodeId, news: &SnapshotNews) -> Decision {
    let node = node(draft, id)?.id;
    if news.len() > SNAPSHOT_NEWS_MAX || !news.fits() {
        let message = format!("A report tells of at most {SNAPSHOT_NEWS_MAX} snapshots, and shortly.");
        return Err(refuse(Code::InvalidRequest, message));
    }
    let news = draft.new_of_snapshots(node, news)?;
    let mut ended = BTreeSet::new();
    for (id, state) in news.taken {
        let snapshot = required(draft.volume_snapshot(id)?, "a volume snapshot")?;
        if !state.is_under_way() {
            ended.insert(snapshot.volume);
        }
        let filing = Filing::org(Aggregate::Snapshot(id), snapshot.org);
        draft.emit(filing, EventPayload::SnapshotAdvanced { snapshot: id, state })?;
    }
    for (id, restored) in news.restored {
        let volume = required(draft.volume(id)?, "a volume that is being restored")?;
        let payload = match restored {
            Restored::Whole => EventPayload::VolumeRestored { volume: id },
            Restored::Failed { detail } => EventPayload::VolumeRestoreFailed { volume: id, detail },
        };
        draft.emit(Filing::org(Aggregate::Volume(id), volume.org), payload)?;
    }
    for snapshot in news.forgotten {
        let payload = EventPayload::SnapshotErased { snapshot, node };
        draft.emit(Filing::cluster(Aggregate::Snapshot(snapshot)), payload)?;
    }
    for volume in ended {
        volume_snapshots::prune(draft, volume)?;
    }
    Ok(Output::None)
}
