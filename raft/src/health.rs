//! Whether this member may serve. Once it may not, it never may again until it is restarted: a member that is wrong about
//! its state, or that cannot trust its disk, must not talk itself back into service (I1, I2).

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// Why a member stopped serving.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
}

/// The member's health, shared by everything that serves.
#[derive(Debug, Default)]
pub(crate) struct Health {
    fault: OnceLock<Fault>,
    faulty: CancellationToken,
}

impl Health {
    /// The first fault, once there was one.
    pub(crate) fn fault(&self) -> Option<&Fault> {
        self.fault.get()
    }

    /// Stops serving. Only the first fault is kept.
    pub(crate) fn fail(&self, fault: Fault) {
        if self.fault.set(fault.clone()).is_ok() {
            tracing::error!(%fault, "this member stops serving");
        }
        self.faulty.cancel();
    }

    /// Resolves when the first fault comes.
    pub(crate) async fn failed(&self) {
        self.faulty.cancelled().await;
    }
}
