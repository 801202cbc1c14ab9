//! Whether this member may serve. Once it may not, it never may again until it is restarted: a member that is wrong about
//! its state, or that cannot trust its disk, must not talk itself back into service (I1, I2). What a restart cannot heal
//! is written down before the member stops, and refuses the restart ([`crate::verdict`]).

use std::path::PathBuf;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// Why a member stopped serving. New reasons are added at the end: their number is part of the stored form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Fault {
    /// A majority has another state after the same entry.
    #[error(
        "the state of this member differs from that of a majority at log index {index}; take it out of service, keep its disk for the report, and let it join again under a new id"
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
        "the state of this member contradicts itself ({0}); take it out of service, keep its disk for the report, and let it join again under a new id"
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
}

impl Fault {
    /// Whether a restart cannot heal it.
    fn is_final(&self) -> bool {
        !matches!(self, Fault::Core(_))
    }
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
        if self.fault.set(fault.clone()).is_ok() {
            tracing::error!(%fault, "this member stops serving");
            // Small and rare enough to be written where it is found; nobody hears of the fault before it is durable.
            if let Some(data_dir) = self.data_dir.as_ref().filter(|_| fault.is_final())
                && let Err(error) = crate::verdict::write(data_dir, &fault)
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
