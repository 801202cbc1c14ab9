//! What the events of volumes do to the views.

use crate::error::StoreError;
use crate::evolve::missing;
use crate::rows::{RowsMut, remove, write, write_id, write_mark};
use crate::tables::Table;
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
    match volume.home {
        Some(home) => write_mark(rows, Table::VolumeToErase, &[&home.to_key(), &id.to_key()]),
        None => Ok(()),
    }
}
