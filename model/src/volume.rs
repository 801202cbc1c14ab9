//! Volumes: disks that outlive the instances which mount them. Each lies on one node, its home, and belongs to one
//! instance at a time.

use crate::{AppId, EnvId, InstanceId, NodeId, OrgId, Timestamp, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

/// A volume of an env.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// Unique in the env: what manifests call it.
    pub name: VolumeName,
    /// Its size in MiB.
    pub size_mib: u64,
    /// Whether it is backed up daily.
    pub backup: bool,
    /// The node that has its disk; chosen when an instance first mounts it, and never another.
    pub home: Option<NodeId>,
    /// Who has it. Only the node's word that this instance is gone makes it free.
    pub attached: Option<Attachment>,
    /// How often it was attached. A node refuses an attachment that is older than one that it has seen.
    pub generation: u64,
    /// Whether an instance was ready with it: from then on there must be a disk.
    pub used: bool,
    /// Rises with every change; `expected_version` refers to it.
    pub version: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// Who has a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Attachment {
    /// The instance.
    pub instance: InstanceId,
    /// Whether its node makes the disk if there is none.
    pub fresh: bool,
}

/// A volume, as the node of the instance that has it is to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeVolume {
    /// Its id.
    pub id: VolumeId,
    /// Which attachment this is.
    pub generation: u64,
    /// Its size in MiB.
    pub size_mib: u64,
    /// Whether its disk is made if there is none.
    pub fresh: bool,
    /// Where it appears in the guest.
    pub path: String,
    /// Not writable there.
    pub read_only: bool,
}

impl Volume {
    /// Whether this instance has it.
    pub fn is_of(&self, instance: InstanceId) -> bool {
        self.attached.is_some_and(|attached| attached.instance == instance)
    }
}
