//! Reading volume snapshots: which there are, what nodes have to do about them, and what is being restored.

use crate::error::StoreError;
use crate::rows::{Rows, id_suffix, read_at};
use crate::tables::{Table, decode, key};
use crate::views::{Views, by_mark, required};
use holdfast_model::limits::{SNAPSHOT_NEWS_MAX, SNAPSHOTS_ORG_MAX};
use holdfast_model::volume_snapshot::{SnapshotNews, VolumeRestore, VolumeSnapshot};
use holdfast_model::{NodeId, OrgId, SnapshotId, VolumeId};

/// Snapshots that are listed at most: more than an org may have, because daily ones are not refused.
const LISTED_MAX: usize = 2 * SNAPSHOTS_ORG_MAX;
/// Restores that are looked through at most: each is an org's volume.
const RESTORES_MAX: usize = 10_000;

/// Volume snapshots, read from any state.
pub trait SnapshotViews: Rows + Views {
    /// A snapshot.
    ///
    /// # Errors
    /// When the database fails.
    fn volume_snapshot(&self, id: SnapshotId) -> Result<Option<VolumeSnapshot>, StoreError> {
        read_at(self, Table::VolumeSnapshot, &key(Table::VolumeSnapshot, &[&id.to_key()]))
    }

    /// An org's snapshots, by id, which is the order in which they were asked for.
    ///
    /// # Errors
    /// When the database fails.
    fn org_snapshots(&self, org: OrgId) -> Result<Vec<VolumeSnapshot>, StoreError> {
        by_mark(self, &key(Table::SnapshotByOrg, &[&org.to_key()]), None, LISTED_MAX)
    }

    /// A volume's snapshots, by id. The volume may be deleted.
    ///
    /// # Errors
    /// When the database fails.
    fn snapshots_of_volume(&self, volume: VolumeId) -> Result<Vec<VolumeSnapshot>, StoreError> {
        by_mark(self, &key(Table::SnapshotByVolume, &[&volume.to_key()]), None, LISTED_MAX)
    }

    /// Snapshots that a node has yet to take or upload, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn snapshots_to_take(&self, node: NodeId, limit: usize) -> Result<Vec<VolumeSnapshot>, StoreError> {
        by_mark(self, &key(Table::SnapshotWork, &[&node.to_key()]), None, limit)
    }

    /// Deleted snapshots of which a node is to erase what is stored, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn snapshots_to_erase(&self, node: NodeId, limit: usize) -> Result<Vec<SnapshotId>, StoreError> {
        let marks = self.scan(&key(Table::SnapshotToErase, &[&node.to_key()]), None, limit)?;
        marks.iter().map(|(key, _)| id_suffix(key).map(SnapshotId::from_bits)).collect()
    }

    /// What a volume is being made from; `None` for one that is whole.
    ///
    /// # Errors
    /// When the database fails.
    fn volume_restore(&self, volume: VolumeId) -> Result<Option<VolumeRestore>, StoreError> {
        read_at(self, Table::VolumeRestore, &key(Table::VolumeRestore, &[&volume.to_key()]))
    }

    /// Volumes that a node has yet to restore, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn restores_to_do(&self, node: NodeId, limit: usize) -> Result<Vec<VolumeRestore>, StoreError> {
        let marks = self.scan(&key(Table::RestoreWork, &[&node.to_key()]), None, limit)?;
        let one = |key: &[u8]| {
            let volume = VolumeId::from_bits(id_suffix(key)?);
            required(self.volume_restore(volume)?, "a volume that is being restored")
        };
        marks.iter().map(|(key, _)| one(key)).collect()
    }

    /// What of a node's news says something new about what lies with it. The rest is a repeat, late, or not its business (I9).
    ///
    /// # Errors
    /// When the database fails.
    fn new_of_snapshots(&self, node: NodeId, told: &SnapshotNews) -> Result<SnapshotNews, StoreError> {
        let mut news = SnapshotNews::default();
        for (id, state) in &told.taken {
            let known = self.volume_snapshot(*id)?.filter(|snapshot| snapshot.node == node);
            if known.is_some_and(|known| state.follows(&known.state)) {
                news.taken.insert(*id, state.clone());
            }
        }
        for (id, restored) in &told.restored {
            let known = self.volume_restore(*id)?;
            if known.is_some_and(|known| known.node == node && known.failed.is_none()) {
                news.restored.insert(*id, restored.clone());
            }
        }
        if !told.forgotten.is_empty() {
            let asked = self.snapshots_to_erase(node, SNAPSHOT_NEWS_MAX)?;
            news.forgotten = asked.into_iter().filter(|id| told.forgotten.contains(id)).collect();
        }
        Ok(news)
    }

    /// Whether some volume is being made from a snapshot.
    ///
    /// # Errors
    /// When the database fails.
    fn is_being_restored(&self, snapshot: SnapshotId) -> Result<bool, StoreError> {
        let rows = self.scan(&key(Table::VolumeRestore, &[]), None, RESTORES_MAX)?;
        for (_, value) in rows {
            let restore: VolumeRestore = decode(Table::VolumeRestore, &value)?;
            if restore.snapshot == snapshot && restore.failed.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl<T: Rows + Views + ?Sized> SnapshotViews for T {}
