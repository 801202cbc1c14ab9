//! What an edge is told at start: where it listens, where it keeps its data, and every limit that it holds.
//!
//! All of it has safe defaults; nothing here changes while the process runs.

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

/// How many file descriptors one proxied connection may take: two sockets, and its share of the pipes.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 3;
/// Descriptors kept back for listeners, the database, probes and the status socket.
pub const DESCRIPTORS_RESERVED: u64 = 512;

/// The configuration of an edge.
#[derive(Debug, Clone)]
pub struct EdgeConfig {
    /// The edge's own folder: its status socket lives here, beside its copy of the routes.
    pub data_dir: PathBuf,
    /// The addresses to listen on. An unspecified IPv6 address takes IPv4 too.
    pub listen: Vec<IpAddr>,
    /// The limits.
    pub limits: Limits,
    /// Whether bulk data may be moved by `splice(2)`; off, everything is read and written.
    pub zero_copy: bool,
    /// The seed of the balancer's choices; drawn from the operating system when absent.
    pub seed: Option<u64>,
}

impl EdgeConfig {
    /// The defaults, with the edge's folder.
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            listen: vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
            limits: Limits::default(),
            zero_copy: true,
            seed: None,
        }
    }
}

/// Every bound of the data path.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time, over all ports. Lowered at start to what the process's descriptors allow.
    pub connections: usize,
    /// Connections at a time of one source: an IPv4 address or an IPv6 /64.
    pub connections_per_source: usize,
    /// Memory for large hellos that are not complete yet, over all connections, in bytes.
    pub hello_memory_bytes: usize,
    /// How long a client has for its whole hello (SPEC: 5 s).
    pub hello_total: Duration,
    /// How long a client may pause within its hello (SPEC: 2 s).
    pub hello_gap: Duration,
    /// How long a backend has to accept (SPEC: 2 s).
    pub connect: Duration,
    /// How long a connection may carry nothing in either direction.
    pub idle: Duration,
    /// The same, once one side has finished sending.
    pub idle_half_closed: Duration,
    /// How often a backend in rotation is probed when no connection proved it alive.
    pub probe_healthy: Duration,
    /// How often a backend out of rotation is probed.
    pub probe_unhealthy: Duration,
    /// How long connections may finish when the edge is told to stop.
    pub shutdown: Duration,
    /// How long an edge that takes over may take to serve what the one before it served.
    pub take_over: Duration,
    /// How long connections may go on once another process has taken the ports over.
    pub after_take_over: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 65_536,
            connections_per_source: 8_192,
            hello_memory_bytes: 64 << 20,
            hello_total: Duration::from_secs(5),
            hello_gap: Duration::from_secs(2),
            connect: Duration::from_secs(2),
            idle: Duration::from_secs(3_600),
            idle_half_closed: Duration::from_secs(600),
            // A death just after an answer shows after two intervals, their jitter and a connect: 9.2 s.
            probe_healthy: Duration::from_secs(3),
            probe_unhealthy: Duration::from_millis(500),
            shutdown: Duration::from_secs(10),
            take_over: Duration::from_secs(20),
            after_take_over: Duration::from_secs(24 * 3_600),
        }
    }
}

/// Raises the process's soft limit of descriptors to its hard one, and says how many connections fit into it.
pub fn fit_connections(wanted: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let descriptors = match raised {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files; serving fewer connections");
            limit.current
        }
    };
    // No limit at all fits whatever was asked for.
    let Some(descriptors) = descriptors else { return wanted };
    let fitting = descriptors.saturating_sub(DESCRIPTORS_RESERVED) / DESCRIPTORS_PER_CONNECTION;
    wanted.min(usize::try_from(fitting).unwrap_or(usize::MAX)).max(1)
}
