//! Every limit that more than one crate must agree on, with its unit in its name.

/// The largest request body, in bytes.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// The longest idempotency key, in bytes.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// How much log time one command may add, in milliseconds: what a leader measured and did not report yet.
pub const LOG_TIME_STEP_MS_MAX: u64 = 60_000;
/// How long an idempotency key's outcome is kept, in milliseconds (SPEC: at least 24 h).
pub const IDEMPOTENCY_KEPT_MS: u64 = 48 * 3_600_000;
/// Items on one page by default.
pub const PAGE_DEFAULT: usize = 50;
/// Items on one page at most.
pub const PAGE_MAX: usize = 200;

/// Instances of one process at most.
pub const SCALE_MAX: u32 = 100;
/// Process types of one manifest at most.
pub const PROCESSES_MAX: usize = 16;
/// Ports of one process at most.
pub const PORTS_MAX: usize = 16;
/// Volumes of one manifest at most.
pub const VOLUMES_MAX: usize = 16;
/// The smallest volume, in MiB: a file system with a journal has to fit.
pub const VOLUME_MIB_MIN: u64 = 16;
/// The largest volume, in MiB (16 TiB).
pub const VOLUME_MIB_MAX: u64 = 16 << 20;
/// Volumes of one org at most.
pub const VOLUMES_ORG_MAX: usize = 100;
/// What the volumes of one org may have together, in MiB (10 TiB).
pub const VOLUMES_ORG_MIB_MAX: u64 = 10 << 20;
/// Erased volumes that a node reports at a time.
pub const VOLUMES_ERASED_MAX: usize = 100;
/// Snapshots of one org at most, failed ones included.
pub const SNAPSHOTS_ORG_MAX: usize = 2_000;
/// Snapshots of one volume that somebody asked for, at most.
pub const SNAPSHOTS_ASKED_MAX: usize = 32;
/// Daily snapshots of one volume that are kept.
pub const SNAPSHOTS_DAILY_KEPT: usize = 14;
/// Failed snapshots of one volume that are kept, to be looked at.
pub const SNAPSHOTS_FAILED_KEPT: usize = 3;
/// From one good daily snapshot to the next, in milliseconds.
pub const SNAPSHOT_DAILY_MS: u64 = 24 * 3_600_000;
/// From a daily snapshot that failed to the next try, in milliseconds.
pub const SNAPSHOT_RETRY_MS: u64 = 3_600_000;
/// Snapshots that a node takes, and volumes that it restores, at a time.
pub const SNAPSHOTS_AT_ONCE_MAX: usize = 2;
/// Snapshots that a node is asked to forget, and tells of, at a time.
pub const SNAPSHOT_NEWS_MAX: usize = 100;
/// Volumes that one process mounts at most: a machine has room for eight devices and has four of its own.
pub const MOUNTS_MAX: usize = 4;
/// Plain variables of one process or manifest at most.
pub const VARS_MAX: usize = 256;
/// The longest value of a plain variable, in bytes.
pub const VAR_VALUE_BYTES_MAX: usize = 64 << 10;
/// Arguments of one command at most.
pub const COMMAND_ARGS_MAX: usize = 128;
/// The longest manifest, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 256 << 10;
/// Secrets of an env, and secrets that one process may require, at most.
pub const SECRETS_MAX: usize = 256;
/// The longest key of a secret, in bytes.
pub const SECRET_KEY_BYTES_MAX: usize = 128;
/// The longest value of a secret, in bytes.
pub const SECRET_VALUE_BYTES_MAX: usize = 64 << 10;
/// The longest file that a bundle of secrets becomes, in bytes.
pub const SECRETS_FILE_BYTES_MAX: usize = 256 << 10;
/// What sealing adds to a secret at most, in bytes: age's header, its chunks' tags, and what the seal is bound to.
pub const SEAL_BYTES_MAX: usize = 1 << 10;
/// Versions of an env's secrets that are kept, beside those that something runs with.
pub const SECRET_VERSIONS_KEPT: usize = 16;
/// Registry credentials of one org or app at most.
pub const REGISTRY_CREDENTIALS_MAX: usize = 32;

/// Memory that a VMM takes beside its guest's, in MiB.
pub const VMM_OVERHEAD_MIB: u64 = 64;
/// The least memory of a guest, in MiB.
pub const MEMORY_MIB_MIN: u64 = 64;
/// The most memory of a guest, in MiB.
pub const MEMORY_MIB_MAX: u64 = 1 << 20;
/// The most virtual CPUs of a guest, in thousandths.
pub const CPU_MILLI_MAX: u64 = 64_000;
/// The least scratch disk, in MiB.
pub const DISK_MIB_MIN: u64 = 1 << 10;
/// CPU that may be promised per CPU that a node has, in thousandths (4.0).
pub const CPU_OVERCOMMIT_MILLI: u64 = 4_000;

/// Instances that a roll-out may have beyond the wanted number.
pub const ROLLOUT_SURGE: u32 = 1;
/// The longest roll-out, in milliseconds.
pub const ROLLOUT_MS_MAX: u64 = 600_000;
/// The longest start of an instance, in milliseconds.
pub const INSTANCE_START_MS_MAX: u64 = 120_000;
/// Replacements per process in one deployment before it fails.
pub const REPLACEMENTS_MAX: u32 = 3;
/// How long a draining instance finishes its connections before TERM, in milliseconds.
pub const DRAIN_GRACE_MS: u64 = 10_000;
/// How long a workload has after TERM before KILL, in milliseconds.
pub const TERM_GRACE_MS: u64 = 10_000;

/// How often an agent reports, in milliseconds.
pub const HEARTBEAT_MS: u64 = 5_000;
/// Silence after which a node counts as unreachable, in milliseconds.
pub const UNREACHABLE_MS: u64 = 30_000;
/// Silence after which an unreachable node's instances are placed elsewhere, in milliseconds.
pub const RESCHEDULE_MS: u64 = 120_000;
/// The share of nodes that may go silent before the control plane suspects itself, in per cent (I7).
pub const SILENT_NODES_PERCENT_MAX: u64 = 50;
/// The share of an agent's items that one update may remove unconfirmed, in per cent (I7).
pub const REMOVED_ITEMS_PERCENT_MAX: u64 = 50;
/// Removals up to this many never need a confirmation, whatever their share (I7).
pub const REMOVED_ITEMS_FREE: u64 = 8;

/// How long an enrolment is valid by default, in milliseconds.
pub const ENROLMENT_MS: u64 = 3_600_000;
/// How long an enrolment is valid at most, in milliseconds.
pub const ENROLMENT_MS_MAX: u64 = 24 * 3_600_000;
/// How long a token is valid at most, in milliseconds (one year).
pub const TOKEN_MS_MAX: u64 = 366 * 24 * 3_600_000;

/// How long an exec grant may wait to be used, at most and by default, in milliseconds.
pub const EXEC_USE_WITHIN_MS_MAX: u64 = 60_000;
/// How long an exec session may last by default, in milliseconds.
pub const EXEC_SESSION_MS: u64 = 3_600_000;
/// How long an exec session may last at most, in milliseconds.
pub const EXEC_SESSION_MS_MAX: u64 = 24 * 3_600_000;
/// How long an exec session may last at least, in milliseconds.
pub const EXEC_SESSION_MS_MIN: u64 = 1_000;
/// Exec grants and sessions of one instance at a time.
pub const EXEC_INSTANCE_MAX: usize = 2;
/// Exec grants and sessions of one env at a time.
pub const EXEC_ENV_MAX: usize = 10;
/// Exec grants of one org within an hour of the clock.
pub const EXEC_ORG_HOUR_MAX: u32 = 100;
/// How long after its end a grant whose member says nothing counts as over, in milliseconds.
pub const EXEC_SILENCE_MS: u64 = 30_000;

/// Ports that no route may listen on: remote shells, mail, and file sharing.
pub const DENIED_PORTS: &[u16] = &[22, 23, 25, 137, 138, 139, 445];
/// The overlay's own UDP and TCP port.
pub const OVERLAY_PORT: u16 = 51820;
/// Where members' API listens by default.
pub const API_PORT: u16 = 7443;
/// Where members' Raft transport listens by default.
pub const RAFT_PORT: u16 = 7444;
