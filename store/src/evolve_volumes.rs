//! What the events of volumes do to the views.

use crate::error::StoreError;
use crate::evolve::missing;
use crate::evolve_volume_snapshots::forget_restore;
use crate::rows::{RowsMut, remove, write, write_id, write_mark};
use crate::tables::{Table, backed_up_key, decode, key};
use crate::views::Views;
use holdfast_model::volume::{Attachment, Volume};
use holdfast_model::{NodeId, VolumeId};

fn found(rows: &impl RowsMut, id: VolumeId) -> Result<Volume, StoreError> {
    rows.volume(id)?.ok_or_else(|| missing("a volume"))
}

pub(crate) fn created(rows: &mut impl RowsMut, volume: &Volume) -> Result<(), StoreError> {
    let name = volume.name.as_str().as_bytes();
    write_id(rows, Table::VolumeByEnv, &[&volume.env.to_key(), name], volume.id.to_key())?;
    write_mark(rows, Table::VolumeByOrg, &[&volume.org.to_key(), &volume.id.to_key()])?;
    if volume.backup && rows.cluster_version()?.has_snapshots() {
        rows.set(backed_up_key(volume.id), &[])?;
    }
    write(rows, volume)
}

pub(crate) fn attached(
    rows: &mut impl RowsMut,
    id: VolumeId,
    attached: Attachment,
    node: NodeId,
    generation: u64,
) -> Result<(), StoreError> {
    let volume = found(rows, id)?;
    // Whatever decided this, one disk never has two: the state stops rather than say so.
    if volume.attached.is_some() || generation <= volume.generation {
        return Err(StoreError::corrupt(format!("{id} is attached a second time")));
    }
    if volume.home.is_some_and(|home| home != node) {
        return Err(StoreError::corrupt(format!("{id} is attached away from its home")));
    }
    let version = volume.version + 1;
    write(rows, &Volume { attached: Some(attached), home: Some(node), generation, version, ..volume })
}

pub(crate) fn detached(rows: &mut impl RowsMut, id: VolumeId, used: bool) -> Result<(), StoreError> {
    let volume = found(rows, id)?;
    let version = volume.version + 1;
    write(rows, &Volume { attached: None, used, version, ..volume })
}

pub(crate) fn deleted(rows: &mut impl RowsMut, id: VolumeId) -> Result<(), StoreError> {
    let volume = found(rows, id)?;
    let name = volume.name.as_str().as_bytes();
    remove(rows, Table::VolumeByEnv, &[&volume.env.to_key(), name])?;
    remove(rows, Table::VolumeByOrg, &[&volume.org.to_key(), &id.to_key()])?;
    remove(rows, Table::Volume, &[&id.to_key()])?;
    rows.put(backed_up_key(id), None)?;
    forget_restore(rows, id)?;
    match volume.home {
        Some(home) => write_mark(rows, Table::VolumeToErase, &[&home.to_key(), &id.to_key()]),
        None => Ok(()),
    }
}

/// Volumes that are looked at together when the version rises.
const RAISE_PAGE: usize = 1_000;

/// From this version on volumes are backed up: those that were made before are marked, too.
pub(crate) fn mark_backed_up(rows: &mut impl RowsMut) -> Result<(), StoreError> {
    let prefix = key(Table::Volume, &[]);
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = rows.scan(&prefix, after.as_deref(), RAISE_PAGE)?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        after = Some(last.to_vec());
        for (_, value) in &page {
            let volume: Volume = decode(Table::Volume, value)?;
            if volume.backup {
                rows.set(backed_up_key(volume.id), &[])?;
            }
        }
    }
}
