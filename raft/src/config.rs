//! What a member is started with. Every default suits loopback and a LAN.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_model::{ClusterVersion, MemberId};
use openraft::SnapshotPolicy;

use crate::error::StartError;
use crate::transport::link::RaftTls;

/// How often followers hear from the leader, and how soon they stop believing in it.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// The shortest time after which a follower without heartbeats stands for election. openraft adds the lease that
    /// the leader may still believe in, which is `election_max`.
    pub election_min: Duration,
    /// The longest such time.
    pub election_max: Duration,
}

impl Default for Timing {
    /// A killed leader is replaced after 550–700 ms: the lease that it may still believe in, then an election time.
    fn default() -> Self {
        Timing {
            heartbeat: Duration::from_millis(75),
            election_min: Duration::from_millis(200),
            election_max: Duration::from_millis(350),
        }
    }
}

/// When snapshots are made and how much of the log is kept.
#[derive(Clone, Debug)]
pub struct Compaction {
    /// A snapshot is made after so many entries.
    pub snapshot_entries: u64,
    /// So many entries are kept even when a snapshot covers them, for followers that are a little behind.
    pub kept_entries: u64,
    /// At least so many entries are purged at a time.
    pub purge_entries: u64,
}

impl Default for Compaction {
    fn default() -> Self {
        Compaction { snapshot_entries: 100_000, kept_entries: 50_000, purge_entries: 1024 }
    }
}

/// Entries of one replication request; their bytes are bounded by the log store.
const REPLICATION_ENTRIES_MAX: u64 = 512;

/// With what a member is started.
#[derive(Clone, Debug)]
pub struct ConsensusConfig {
    /// Which member this is. The data folder must have been prepared for it.
    pub id: MemberId,
    /// Where `log.redb`, `state.redb`, `snapshots/` and the marker lie.
    pub data_dir: PathBuf,
    /// Where members are listened for.
    pub listen: SocketAddr,
    /// Certificates and the cluster.
    pub tls: Arc<RaftTls>,
    /// Heartbeats and elections.
    pub timing: Timing,
    /// Snapshots and purges.
    pub compaction: Compaction,
    /// Between two comparisons of the members' states (I1).
    pub digest_check_every: Duration,
    /// Between two reports of log time, while this member leads. Less than a step of log time may hold.
    pub log_time_every: Duration,
    /// The newest cluster version that this member supports: lower than the build's to act as an earlier build.
    pub cluster_version_max: ClusterVersion,
    /// In about which time log and state are read from end to end, to find bits that rotted.
    pub scrub_pass: Duration,
}

impl ConsensusConfig {
    /// A configuration with every default.
    pub fn new(id: MemberId, data_dir: PathBuf, listen: SocketAddr, tls: Arc<RaftTls>) -> Self {
        ConsensusConfig {
            id,
            data_dir,
            listen,
            tls,
            timing: Timing::default(),
            compaction: Compaction::default(),
            digest_check_every: Duration::from_secs(30),
            log_time_every: Duration::from_secs(15),
            cluster_version_max: ClusterVersion::NEWEST,
            scrub_pass: Duration::from_secs(24 * 3600),
        }
    }

    /// The same for openraft.
    pub(crate) fn openraft(&self) -> Result<openraft::Config, StartError> {
        let ms = |duration: Duration| duration.as_millis() as u64;
        let Compaction { snapshot_entries, kept_entries, purge_entries } = self.compaction;
        openraft::Config {
            cluster_name: self.tls.cluster().to_owned(),
            heartbeat_interval: ms(self.timing.heartbeat),
            election_timeout_min: ms(self.timing.election_min),
            election_timeout_max: ms(self.timing.election_max),
            max_payload_entries: REPLICATION_ENTRIES_MAX,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_entries),
            max_in_snapshot_log_to_keep: kept_entries,
            purge_batch_size: purge_entries,
            // A follower is sent entries for as long as the log has them.
            replication_lag_threshold: snapshot_entries.saturating_add(kept_entries).saturating_mul(2),
            // A member that cannot win must not push a working leader out of its term.
            enable_pre_vote: Some(true),
            // A restarted leader asks for votes again, whatever its disk says.
            enable_leader_restore: Some(false),
            // A follower whose log went back is a lost disk, never a reason to send it everything again.
            allow_log_reversion: Some(false),
            ..openraft::Config::default()
        }
        .validate()
        .map_err(|error| StartError::Timing(error.to_string()))
    }
}
