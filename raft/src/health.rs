//! Whether this member may serve. Once it may not, it never may again until it is restarted: a member that is wrong about
//! its state, or that cannot trust its disk, must not talk itself back into service (I1, I2). What a restart alone
//! does not heal is written down before the member stops: that it must be filled ([`crate::healing`]), or that it must not
//! start again ([`crate::verdict`]).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use holdfast_model::{ClusterVersion, SupportedVersions};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::healing::{self, WrongDigest};

/// Why a member stopped serving. New reasons are added at the end: their number is part of the stored form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Fault {
    /// A majority has another state after the same entry.
    #[error(
        "the state of this member differs from that of a majority at log index {index}; start it again, and its peers fill it anew; if it refuses to start, keep its disk for the report and let a new member join under a new id"
    )]
    Diverged {
        /// After which entry.
        index: u64,
    },
    /// The consensus core stopped, such as after a failed fsync.
    #[error("the consensus core stopped ({0}); check the disk, then restart the member")]
    Core(String),
    /// A check found the state to contradict itself.
    #[error(
        "the state of this member contradicts itself ({0}); start it again, and its peers fill it anew; if it refuses to start, keep its disk for the report and let a new member join under a new id"
    )]
    Damaged(String),
    /// The disk is older than what this member acknowledged with it.
    #[error(
        "this member acknowledged log entries up to {acknowledged} and its disk has them up to {has}: an older image of the disk was put back, or the disk lost writes that it had reported as stored; remove this member from the cluster and let a new one join in an empty folder"
    )]
    WentBack {
        /// What it acknowledged.
        acknowledged: u64,
        /// What it has.
        has: u64,
    },
    /// The cluster removed this member.
    #[error(
        "this member was removed from the cluster; its folder is of no use any more: delete it, or keep it as a record, and let a new member join in an empty folder"
    )]
    Removed,
    /// The cluster goes on in a newer incarnation.
    #[error(
        "the cluster goes on in incarnation {incarnation}, which began without this member; its folder belongs to an older one: keep it as a record, and let a new member join in an empty folder"
    )]
    Superseded {
        /// The newer incarnation.
        incarnation: u64,
    },
    /// Members disagree, and nobody can tell who is right.
    #[error(
        "the members disagree about the state at log index {index} and no majority agrees on one; keep the disks of all of them for the report, and restore the last good backup or recover from the member that you trust"
    )]
    Undecided {
        /// After which entry.
        index: u64,
    },
    /// The file of the state returned other bytes than were written.
    #[error(
        "the state of this member cannot be read as it was written ({0}); start it again, and its peers fill it anew; if it refuses to start, its disk is not to be trusted: let a new member join on another one"
    )]
    StateRotten(String),
    /// The file of the log returned other bytes than were written.
    #[error(
        "the log of this member cannot be read as it was written ({0}), so it no longer knows what it promised; remove it with `holdfast server remove`, and let a new member join in an empty folder on a disk that is well"
    )]
    LogRotten(String),
    /// The cluster uses a version that this build does not support.
    #[error(
        "the cluster is at version {version} and this build supports {supported}, so this member can follow no further and changed nothing; its disk is well: start it again as a build that supports version {version}, as every other member already does"
    )]
    Unsupported {
        /// The cluster's.
        version: ClusterVersion,
        /// This build's.
        supported: SupportedVersions,
    },
}

impl Fault {
    /// What the next start does about it.
    fn remedy(&self) -> Remedy {
        match self {
            Fault::Core(_) | Fault::Unsupported { .. } => Remedy::Restart,
            Fault::Diverged { .. } | Fault::Damaged(_) | Fault::StateRotten(_) => Remedy::Fill,
            Fault::WentBack { .. }
            | Fault::Removed
            | Fault::Superseded { .. }
            | Fault::Undecided { .. }
            | Fault::LogRotten(_) => Remedy::Replace,
        }
    }

    /// Whether the member's next start fills it with a new state from its peers, unless that was done too often. A process
    /// may then start it again by itself.
    pub fn is_healed_by_a_start(&self) -> bool {
        self.remedy() == Remedy::Fill
    }
}

/// What can be done about a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Remedy {
    /// A restart, once the cause is gone.
    Restart,
    /// A new state for the same member: see [`crate::healing`].
    Fill,
    /// A new member.
    Replace,
}

/// The member's health, shared by everything that serves.
#[derive(Debug, Default)]
pub(crate) struct Health {
    fault: OnceLock<Fault>,
    faulty: CancellationToken,
    /// Where verdicts are kept.
    data_dir: Option<PathBuf>,
}

impl Health {
    /// Healthy, with verdicts kept in this folder.
    pub(crate) fn kept_in(data_dir: PathBuf) -> Self {
        Health { data_dir: Some(data_dir), ..Health::default() }
    }

    /// The first fault, once there was one.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.get()
    }

    /// Stops serving. Only the first fault is kept.
    pub(crate) fn fail(&self, fault: Fault) {
        self.fail_with(fault, None);
    }

    /// The same, and says which digest of this member's was wrong.
    pub(crate) fn fail_with(&self, fault: Fault, wrong: Option<WrongDigest>) {
        if self.fault.set(fault.clone()).is_ok() {
            tracing::error!(%fault, "this member stops serving");
            // Small and rare enough to be written where it is found; nobody hears of the fault before it is durable.
            if let Some(data_dir) = &self.data_dir
                && let Err(error) = write_down(data_dir, &fault, wrong)
            {
                tracing::error!(%error, "the verdict could not be written down; do not start this member again");
            }
        }
        self.faulty.cancel();
    }

    /// Resolves when the first fault comes.
    pub(crate) async fn failed(&self) {
        self.faulty.cancelled().await;
    }
}

/// Makes durable what the next start must do.
pub(crate) fn write_down(data_dir: &Path, fault: &Fault, wrong: Option<WrongDigest>) -> io::Result<()> {
    match fault.remedy() {
        Remedy::Restart => Ok(()),
        Remedy::Fill if healing::request(data_dir, fault, wrong)? => Ok(()),
        Remedy::Fill | Remedy::Replace => crate::verdict::write(data_dir, fault),
    }
}
