//! When volumes are backed up by themselves, and which snapshots go when there are too many.

use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::rows::RowsMut;
use crate::secret_views::seal_owner_bytes;
use crate::tables::{Table, key};
use crate::views::{Views, required};
use crate::volume_snapshot_views::SnapshotViews as _;
use holdfast_model::limits::{
    SNAPSHOT_DAILY_MS, SNAPSHOT_RETRY_MS, SNAPSHOTS_DAILY_KEPT, SNAPSHOTS_FAILED_KEPT, SNAPSHOTS_ORG_MAX,
};
use holdfast_model::sealed::SealOwner;
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{SnapshotCause, SnapshotState, VolumeSnapshot};
use holdfast_model::{Aggregate, EventPayload, NodeId, SnapshotId, Timestamp, VolumeId};

/// Volumes that one tick looks at.
const TICK_VOLUMES_MAX: usize = 100;

/// Asks for the snapshots of volumes that are due: a bounded number of volumes is looked at, beginning at another place
/// each time.
pub(crate) fn request_due(draft: &mut Draft<'_>) -> Result<(), StoreError> {
    if !draft.cluster_version()?.has_snapshots() {
        return Ok(());
    }
    for id in draft.marks_from_anywhere(Table::VolumeBackedUp, TICK_VOLUMES_MAX)? {
        let volume = required(draft.volume(VolumeId::from_bits(id))?, "a volume that is backed up")?;
        if is_due(draft, &volume)? {
            request(draft, &volume, SnapshotCause::Daily)?;
        }
    }
    Ok(())
}

fn is_due(draft: &Draft<'_>, volume: &Volume) -> Result<bool, StoreError> {
    if !has_disk(volume) || draft.volume_restore(volume.id)?.is_some() {
        return Ok(false);
    }
    let Some(home) = volume.home else { return Ok(false) };
    let heard = draft.node(home)?.is_some_and(|node| node.is_trusted() && node.silent_since.is_none());
    if !heard {
        return Ok(false);
    }
    let now = draft.context().now;
    let snapshots = draft.snapshots_of_volume(volume.id)?;
    if !daily_is_due(&snapshots, now) {
        return Ok(false);
    }
    Ok(draft.org_snapshots(volume.org)?.len() < SNAPSHOTS_ORG_MAX)
}

/// Whether there may be something on a volume's disk.
pub(crate) fn has_disk(volume: &Volume) -> bool {
    volume.home.is_some() && (volume.used || volume.attached.is_some())
}

fn daily_is_due(snapshots: &[VolumeSnapshot], now: Timestamp) -> bool {
    if snapshots.iter().any(|snapshot| snapshot.state.is_under_way()) {
        return false;
    }
    let daily = || snapshots.iter().filter(|snapshot| snapshot.cause == SnapshotCause::Daily);
    let good = daily().filter(|snapshot| snapshot.state.is_good()).map(|snapshot| snapshot.created_at).max();
    let tried = daily().map(|snapshot| snapshot.created_at).max();
    let over = |since: Option<Timestamp>, period| since.is_none_or(|since| now.since(since) >= period);
    over(good, SNAPSHOT_DAILY_MS) && over(tried, SNAPSHOT_RETRY_MS)
}

/// Asks a volume's home for a snapshot. The home must be known.
pub(crate) fn request(
    draft: &mut Draft<'_>,
    volume: &Volume,
    cause: SnapshotCause,
) -> Result<Option<SnapshotId>, StoreError> {
    let Some(node) = volume.home else { return Ok(None) };
    let id = SnapshotId::from_bits(draft.fresh_id());
    let now = draft.context().now;
    let snapshot = VolumeSnapshot {
        id,
        volume: volume.id,
        name: volume.name.clone(),
        env: volume.env,
        app: volume.app,
        org: volume.org,
        size_mib: volume.size_mib,
        node,
        cause,
        state: SnapshotState::Requested,
        created_at: now,
        changed_at: now,
    };
    let filing = Filing::org(Aggregate::Snapshot(id), volume.org);
    draft.emit(filing, EventPayload::SnapshotRequested(Box::new(snapshot)))?;
    Ok(Some(id))
}

/// Deletes a snapshot and the only key to it.
pub(crate) fn delete(draft: &mut Draft<'_>, snapshot: &VolumeSnapshot) -> Result<(), StoreError> {
    let owner = SealOwner::Snapshot(snapshot.id);
    draft.put(key(Table::Envelope, &[&seal_owner_bytes(owner)]), None)?;
    let filing = Filing::org(Aggregate::Snapshot(snapshot.id), snapshot.org);
    draft.emit(filing, EventPayload::SnapshotDeleted { snapshot: snapshot.id })
}

/// Deletes what is too much of a volume's snapshots. One that a volume is being made from waits.
pub(crate) fn prune(draft: &mut Draft<'_>, volume: VolumeId) -> Result<(), StoreError> {
    for snapshot in surplus(draft.snapshots_of_volume(volume)?) {
        if !draft.is_being_restored(snapshot.id)? {
            delete(draft, &snapshot)?;
        }
    }
    Ok(())
}

/// Daily ones beyond those that are kept, and failed ones beyond those that are looked at. The newest good one is never
/// among them: only newer good ones make an older one surplus.
fn surplus(snapshots: Vec<VolumeSnapshot>) -> Vec<VolumeSnapshot> {
    let (mut good, mut failed) = (0, 0);
    let mut surplus = Vec::new();
    for snapshot in snapshots.into_iter().rev() {
        let gone = match (&snapshot.state, snapshot.cause) {
            (SnapshotState::Uploaded { .. }, SnapshotCause::Daily) => {
                good += 1;
                good > SNAPSHOTS_DAILY_KEPT
            }
            (SnapshotState::Failed { .. }, _) => {
                failed += 1;
                failed > SNAPSHOTS_FAILED_KEPT
            }
            _ => false,
        };
        if gone {
            surplus.push(snapshot);
        }
    }
    surplus
}

/// The node that a volume is restored to: where the snapshot was taken, else the node with the fewest instances.
pub(crate) fn choose_home(
    draft: &Draft<'_>,
    snapshot: &VolumeSnapshot,
) -> Result<Option<NodeId>, StoreError> {
    let takes = |node: NodeId| draft.node(node).map(|node| node.is_some_and(|n| n.takes_instances()));
    if takes(snapshot.node)? {
        return Ok(Some(snapshot.node));
    }
    let mut best = None;
    for node in draft.nodes()?.into_iter().filter(|node| node.takes_instances()) {
        let load = draft.node_load(node.id)?;
        let rank = (load.memory_mib, node.id);
        if best.is_none_or(|known| rank < known) {
            best = Some(rank);
        }
    }
    Ok(best.map(|(_, node)| node))
}
