//! What the events of volume snapshots do to the views.

use crate::error::StoreError;
use crate::evolve::missing;
use crate::evolve_volumes;
use crate::rows::{RowsMut, remove, write, write_at, write_mark};
use crate::tables::{Table, key};
use crate::volume_snapshot_views::SnapshotViews as _;
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{SnapshotState, VolumeRestore, VolumeSnapshot};
use holdfast_model::{NodeId, SnapshotId, Timestamp, VolumeId};

pub(crate) fn requested(rows: &mut impl RowsMut, snapshot: &VolumeSnapshot) -> Result<(), StoreError> {
    let id = snapshot.id.to_key();
    write_mark(rows, Table::SnapshotByOrg, &[&snapshot.org.to_key(), &id])?;
    write_mark(rows, Table::SnapshotByVolume, &[&snapshot.volume.to_key(), &id])?;
    write_mark(rows, Table::SnapshotWork, &[&snapshot.node.to_key(), &id])?;
    write(rows, snapshot)
}

fn found(rows: &impl RowsMut, id: SnapshotId) -> Result<VolumeSnapshot, StoreError> {
    rows.volume_snapshot(id)?.ok_or_else(|| missing("a volume snapshot"))
}

pub(crate) fn advanced(
    rows: &mut impl RowsMut,
    id: SnapshotId,
    state: &SnapshotState,
    at: Timestamp,
) -> Result<(), StoreError> {
    let snapshot = found(rows, id)?;
    if !state.follows(&snapshot.state) {
        return Err(StoreError::corrupt(format!("{id} goes back")));
    }
    if !state.is_under_way() {
        remove(rows, Table::SnapshotWork, &[&snapshot.node.to_key(), &id.to_key()])?;
    }
    write(rows, &VolumeSnapshot { state: state.clone(), changed_at: at, ..snapshot })
}

pub(crate) fn deleted(rows: &mut impl RowsMut, id: SnapshotId) -> Result<(), StoreError> {
    let snapshot = found(rows, id)?;
    let key = id.to_key();
    remove(rows, Table::SnapshotByOrg, &[&snapshot.org.to_key(), &key])?;
    remove(rows, Table::SnapshotByVolume, &[&snapshot.volume.to_key(), &key])?;
    remove(rows, Table::SnapshotWork, &[&snapshot.node.to_key(), &key])?;
    remove(rows, Table::VolumeSnapshot, &[&key])?;
    write_mark(rows, Table::SnapshotToErase, &[&snapshot.node.to_key(), &key])
}

pub(crate) fn erased(rows: &mut impl RowsMut, id: SnapshotId, node: NodeId) -> Result<(), StoreError> {
    remove(rows, Table::SnapshotToErase, &[&node.to_key(), &id.to_key()])
}

pub(crate) fn restore_began(
    rows: &mut impl RowsMut,
    volume: &Volume,
    snapshot: SnapshotId,
) -> Result<(), StoreError> {
    let node = volume.home.ok_or_else(|| missing("the home of a restored volume"))?;
    evolve_volumes::created(rows, volume)?;
    write_mark(rows, Table::RestoreWork, &[&node.to_key(), &volume.id.to_key()])?;
    put(rows, &VolumeRestore { volume: volume.id, snapshot, node, failed: None })
}

fn put(rows: &mut impl RowsMut, restore: &VolumeRestore) -> Result<(), StoreError> {
    let at = key(Table::VolumeRestore, &[&restore.volume.to_key()]);
    write_at(rows, Table::VolumeRestore, at, restore)
}

pub(crate) fn restored(rows: &mut impl RowsMut, volume: VolumeId) -> Result<(), StoreError> {
    forget_restore(rows, volume)
}

pub(crate) fn restore_failed(
    rows: &mut impl RowsMut,
    volume: VolumeId,
    detail: &str,
) -> Result<(), StoreError> {
    let restore = rows.volume_restore(volume)?.ok_or_else(|| missing("a volume that is being restored"))?;
    remove(rows, Table::RestoreWork, &[&restore.node.to_key(), &volume.to_key()])?;
    put(rows, &VolumeRestore { failed: Some(detail.to_owned()), ..restore })
}

/// A volume is whole, or gone: nothing is left to do for it.
pub(crate) fn forget_restore(rows: &mut impl RowsMut, volume: VolumeId) -> Result<(), StoreError> {
    let Some(restore) = rows.volume_restore(volume)? else { return Ok(()) };
    remove(rows, Table::RestoreWork, &[&restore.node.to_key(), &volume.to_key()])?;
    remove(rows, Table::VolumeRestore, &[&volume.to_key()])
}
