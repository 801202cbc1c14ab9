//! What the agent tells of itself: the report to the control plane, and `status.json` for `holdfast node status`,
//! which an operator reads when there is no control plane.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use holdfast_client::{Link, View};
use holdfast_model::agent::{
    Disk, Held, ImageProgress, NodeInstance, Observation, REPORT_OBSERVATIONS_MAX, Report, ReportDetail,
};
use holdfast_model::resource::Capacity;
use holdfast_model::volume_snapshot::SnapshotNews;
use holdfast_model::{Incarnation, InstanceId, Revision, VolumeId};
use serde::{Deserialize, Serialize};

use crate::phase::bounded;
use crate::pulls;
use crate::supervisor::Snapshot;

/// The file's name in the data folder.
pub const STATUS_FILE: &str = "status.json";

/// The largest status that is read, in bytes.
const STATUS_BYTES_MAX: u64 = 16 << 20;

/// Why the status could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The file could not be used.
    #[error("The node's status '{}' could not be {action}; has a node agent ever run with this folder?", .path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is of no known form.
    #[error("The node's status '{}' was not written by this release; restart the agent.", .path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// What a node says of itself on its own disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The agent's process. It is gone if no process with this id holds the folder.
    pub pid: u32,
    /// When this was written, in milliseconds since the Unix epoch.
    pub written_at_ms: u64,
    /// The member that is followed; `None` without a control plane.
    pub following: Option<String>,
    /// Why nothing is followed.
    pub unreachable: Option<String>,
    /// The revision that is acted on; `None` before the first.
    pub revision: Option<Revision>,
    /// An update that is held back until it is confirmed (I7).
    pub held: Option<Held>,
    /// Whether an operator has cut this node off: its instances have no network and nothing is begun.
    #[serde(default)]
    pub quarantined: bool,
    /// The VMM probe's verdict.
    pub vmm: String,
    /// What the node has for instances.
    pub capacity: Capacity,
    /// Free on the disk of images, logs and machines' folders, in MiB; `None` where it is not known.
    #[serde(default)]
    pub disk_free_mib: Option<u64>,
    /// Every instance that is known here.
    pub instances: Vec<InstanceStatus>,
}

/// One instance in a [`NodeStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// What the control plane is told of it.
    #[serde(flatten)]
    pub observation: Observation,
    /// Whose it is and what of: `org/app/env/process`; `None` once it is no longer desired.
    pub name: Option<String>,
    /// Its address.
    pub address: Option<std::net::Ipv6Addr>,
    /// Where it stands, in this node's own words.
    pub phase: String,
    /// Its VMM's process, while one runs.
    pub pid: Option<u32>,
    /// The VMM that runs it.
    pub vmm: Option<String>,
    /// How far its image is, while it waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageProgress>,
}

/// What is said beside the instances.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Whether the control plane is followed.
    pub link: Link,
    /// The VMM probe's verdict.
    pub vmm: String,
    /// What the node has for instances.
    pub capacity: Capacity,
    /// Its disk.
    pub disk: Option<Disk>,
    /// Instances that wait for their images.
    pub waiting: BTreeMap<InstanceId, ImageProgress>,
    /// Deleted volumes whose disks it has erased.
    pub erased: BTreeSet<VolumeId>,
    /// What there is to tell of snapshots.
    pub snapshots: SnapshotNews,
}

/// The report to the control plane.
pub fn report(snapshot: &Snapshot, view: Option<&View<NodeInstance>>, around: &Surroundings) -> Report {
    if snapshot.instances.len() > REPORT_OBSERVATIONS_MAX {
        tracing::error!(instances = snapshot.instances.len(), "more instances than a report holds");
    }
    let observations = snapshot
        .instances
        .iter()
        .take(REPORT_OBSERVATIONS_MAX)
        .map(|(id, instance)| instance.observed.observation(*id))
        .collect();
    Report {
        applied: view.map_or(Revision(0), |view| view.stamp.revision),
        incarnation: view.map_or(Incarnation(0), |view| view.stamp.incarnation),
        held: view.and_then(|view| view.held),
        detail: ReportDetail::Node {
            observations,
            capacity: around.capacity,
            vmm: bounded(around.vmm.clone()),
            erased: around.erased.clone(),
            snapshots: around.snapshots.clone(),
            pulls: pulls::reported(&around.waiting),
            disk: around.disk,
        },
    }
}

/// The status for this node's disk.
pub fn status(
    snapshot: &Snapshot,
    view: Option<&View<NodeInstance>>,
    around: &Surroundings,
    now_ms: u64,
) -> NodeStatus {
    let spec = |id: &InstanceId| view.and_then(|view| view.items.get(id));
    let instance = |(id, seen): (&InstanceId, &crate::supervisor::InstanceView)| InstanceStatus {
        observation: seen.observed.observation(*id),
        name: spec(id).map(|s| format!("{}/{}/{}/{}", s.org, s.app, s.env, s.process)),
        address: spec(id).map(|s| s.address),
        phase: format!("{:?}", seen.observed.phase),
        pid: seen.machine.map(|(pid, _)| pid),
        vmm: seen.machine.map(|(_, kind)| kind.to_owned()),
        image: around.waiting.get(id).copied(),
    };
    let (following, unreachable) = match &around.link {
        Link::Up { endpoint } => (Some(endpoint.clone()), None),
        Link::Down { reason } => (None, Some(reason.clone())),
    };
    NodeStatus {
        pid: std::process::id(),
        written_at_ms: now_ms,
        following,
        unreachable,
        revision: view.map(|view| view.stamp.revision),
        held: view.and_then(|view| view.held),
        quarantined: snapshot.cut_off,
        vmm: around.vmm.clone(),
        capacity: around.capacity,
        disk_free_mib: around.disk.map(|disk| disk.free_mib),
        instances: snapshot.instances.iter().map(instance).collect(),
    }
}

impl NodeStatus {
    /// Writes it where [`NodeStatus::read`] finds it; a reader sees the old one or the new one, whole.
    pub fn write(&self, data_dir: &Path) -> Result<(), StatusError> {
        let path = data_dir.join(STATUS_FILE);
        let fresh = data_dir.join("status.json.new");
        let text = serde_json::to_vec_pretty(self)
            .map_err(|source| StatusError::Form { path: path.clone(), source })?;
        fs::write(&fresh, text)
            .and_then(|()| fs::rename(&fresh, &path))
            .map_err(|source| StatusError::Access { path, action: "written", source })
    }

    /// What the agent with this data folder last wrote.
    pub fn read(data_dir: &Path) -> Result<Self, StatusError> {
        let path = data_dir.join(STATUS_FILE);
        let mut text = Vec::new();
        fs::File::open(&path)
            .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, STATUS_BYTES_MAX), &mut text))
            .map_err(|source| StatusError::Access { path: path.clone(), action: "read", source })?;
        serde_json::from_slice(&text).map_err(|source| StatusError::Form { path, source })
    }
}

#[cfg(test)]
mod tests {
    use holdfast_model::agent::DETAIL_BYTES_MAX;

    use super::*;

    #[test]
    fn reports_stay_within_what_the_control_plane_takes() {
        let around = Surroundings {
            link: Link::Down { reason: String::new() },
            vmm: "é".repeat(4_000),
            capacity: Capacity::default(),
            disk: None,
            waiting: BTreeMap::new(),
            erased: BTreeSet::new(),
            snapshots: SnapshotNews::default(),
        };
        let report = report(&Snapshot::default(), None, &around);
        let ReportDetail::Node { observations, vmm, .. } = report.detail else { panic!("not a node's") };
        assert!(observations.is_empty() && vmm.len() <= DETAIL_BYTES_MAX, "{}", vmm.len());
        assert_eq!((report.applied, report.held), (Revision(0), None));
    }

    #[test]
    fn a_status_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let around = Surroundings {
            link: Link::Up { endpoint: "[::1]:7443".to_owned() },
            vmm: "qemu-tcg".to_owned(),
            capacity: Capacity { memory_mib: 5, cpu_milli: 6 },
            disk: Some(Disk { total_mib: 8, free_mib: 7 }),
            waiting: BTreeMap::new(),
            erased: BTreeSet::new(),
            snapshots: SnapshotNews::default(),
        };
        let written = status(&Snapshot::default(), None, &around, 7);
        assert!(NodeStatus::read(folder.path()).is_err());
        written.write(folder.path()).unwrap();
        assert_eq!(NodeStatus::read(folder.path()).unwrap(), written);
    }
}
