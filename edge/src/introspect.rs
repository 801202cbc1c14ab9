//! What an edge says about itself, on a socket in its own folder: `holdfast edge status` reads it.
//!
//! Whoever connects gets one JSON document and the end of the stream; nothing is read from them. The socket is for
//! the edge's own user alone. The document names routes and backends, never a client, never a secret (I10).

use crate::edge::Edge;
use crate::metrics::MetricsSnapshot;
use crate::own_socket;
use holdfast_client::Link;
use holdfast_model::agent::{Held, ProxyProtocol, Stamp};
use holdfast_model::{Hostname, InstanceId, RouteId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// The socket's name in the edge's folder.
pub const STATUS_SOCKET: &str = "edge-status.sock";
/// Routes that a status lists; their number is always whole.
pub const STATUS_ROUTES_MAX: usize = 10_000;
/// The longest status that is read, in bytes.
pub const STATUS_BYTES_MAX: u64 = 64 << 20;
/// How long asking or answering may take.
pub const STATUS_TIME_OUT: Duration = Duration::from_secs(5);
/// Readers that are answered at a time.
const STATUS_READERS_MAX: usize = 4;

/// How an edge stands with its control plane.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPlane {
    /// The member that it follows; none while it is on its own.
    pub member: Option<String>,
    /// Why it follows none.
    pub reason: Option<String>,
    /// When it last found or lost a member, in milliseconds since the Unix epoch; none since its start.
    pub changed_ms: Option<u64>,
}

/// An edge's status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeStatus {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it started, in milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// The revision that it serves.
    pub serving: Option<Stamp>,
    /// An update that waits to be confirmed (I7).
    pub held: Option<Held>,
    /// Why it does not serve a later set of routes that it has.
    pub refused: Option<String>,
    /// How it stands with its control plane.
    pub control_plane: ControlPlane,
    /// Open ports.
    pub listening: Vec<SocketAddr>,
    /// Ports that could not be opened, and why.
    pub not_listening: BTreeMap<SocketAddr, String>,
    /// Open client connections.
    pub connections: usize,
    /// Number of routes.
    pub route_count: usize,
    /// The routes by port and name, at most [`STATUS_ROUTES_MAX`].
    pub routes: Vec<RouteStatus>,
    /// The counters.
    pub metrics: MetricsSnapshot,
}

/// A route in a status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteStatus {
    /// Its port.
    pub listen_port: u16,
    /// Its name; none for a TCP route.
    pub hostname: Option<Hostname>,
    /// Its id.
    pub id: RouteId,
    /// Whether backends are told the client's address.
    pub proxy_protocol: ProxyProtocol,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend in a status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Which instance.
    pub instance: InstanceId,
    /// Its address and port.
    pub address: SocketAddr,
    /// Whether the control plane is draining it.
    pub draining: bool,
    /// Whether it answers, as far as the edge knows.
    pub in_rotation: bool,
    /// Connections that it carries.
    pub connections: usize,
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The socket cannot be made.
    #[error("Cannot make the status socket {path}; check that its folder exists and can be written.")]
    Bind {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No edge answers.
    #[error(
        "No edge answers on {path}; start one with this data folder, or give the folder of one that runs."
    )]
    Unreachable {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The answer is of another version.
    #[error(
        "The edge on {path} gave a status that this program does not understand; use the edge's own version."
    )]
    Malformed {
        /// The socket's path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// What the main task tells the status.
#[derive(Debug)]
pub(crate) struct Serving {
    started_ms: u64,
    pub(crate) stamp: Option<Stamp>,
    pub(crate) held: Option<Held>,
    pub(crate) refused: Option<String>,
    control_plane: ControlPlane,
    listening: Vec<SocketAddr>,
    not_listening: BTreeMap<SocketAddr, String>,
}

impl Serving {
    pub(crate) fn new() -> Self {
        Self {
            started_ms: now_ms(),
            stamp: None,
            held: None,
            refused: None,
            control_plane: ControlPlane::default(),
            listening: Vec::new(),
            not_listening: BTreeMap::new(),
        }
    }

    pub(crate) fn set_link(&mut self, link: &Link) {
        let (member, reason) = match link {
            Link::Up { endpoint } => (Some(endpoint.clone()), None),
            Link::Down { reason } => (None, Some(reason.clone())),
        };
        // Going from one failed attempt to the next is no news of a member.
        let changed = self.control_plane.member != member;
        let changed_ms = if changed { Some(now_ms()) } else { self.control_plane.changed_ms };
        self.control_plane = ControlPlane { member, reason, changed_ms };
    }

    pub(crate) fn set_listeners(&mut self, open: Vec<SocketAddr>, problems: BTreeMap<SocketAddr, String>) {
        self.listening = open;
        self.not_listening = problems;
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Asks the edge whose folder is `data_dir` for its status.
///
/// # Errors
/// [`StatusError`] when none answers within [`STATUS_TIME_OUT`], or not in a way that is understood.
pub async fn read_status(data_dir: &Path) -> Result<EdgeStatus, StatusError> {
    let path = data_dir.join(STATUS_SOCKET);
    let read = async {
        let mut answer = Vec::new();
        UnixStream::connect(&path).await?.take(STATUS_BYTES_MAX).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    let answer = match tokio::time::timeout(STATUS_TIME_OUT, read).await {
        Ok(answer) => answer,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    match answer {
        Ok(answer) => {
            serde_json::from_slice(&answer).map_err(|source| StatusError::Malformed { path, source })
        }
        Err(source) => Err(StatusError::Unreachable { path, source }),
    }
}

/// Makes the socket, in place of one that an earlier process left.
pub(crate) fn bind(data_dir: &Path) -> Result<UnixListener, StatusError> {
    let path = data_dir.join(STATUS_SOCKET);
    own_socket::bind(&path).map_err(|source| StatusError::Bind { path, source })
}

/// Answers whoever connects, until `stop`.
pub(crate) async fn answer(
    socket: UnixListener,
    edge: Arc<Edge>,
    serving: watch::Receiver<Serving>,
    stop: CancellationToken,
) {
    let readers = Arc::new(Semaphore::new(STATUS_READERS_MAX));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let (Ok((mut reader, _)), Ok(permit)) = (accepted, Arc::clone(&readers).try_acquire_owned()) else {
            // Out of descriptors, or of patience: whoever asks can ask again.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let status = collect(&edge, &serving.borrow());
        tokio::spawn(async move {
            let document = match serde_json::to_vec(&status) {
                Ok(document) => document,
                Err(error) => return tracing::error!(%error, "cannot write the status"),
            };
            match tokio::time::timeout(STATUS_TIME_OUT, reader.write_all(&document)).await {
                Ok(Ok(())) => {}
                _ => tracing::debug!("whoever asked for the status did not read it"),
            }
            drop(permit);
        });
    }
}

fn collect(edge: &Edge, serving: &Serving) -> EdgeStatus {
    let table = edge.table();
    let mut routes: Vec<RouteStatus> = table
        .iter()
        .take(STATUS_ROUTES_MAX)
        .map(|(listen_port, hostname, route)| RouteStatus {
            listen_port,
            hostname: hostname.cloned(),
            id: route.id,
            proxy_protocol: route.proxy_protocol,
            backends: route.targets.iter().map(backend_status).collect(),
        })
        .collect();
    routes.sort_by(|a, b| (a.listen_port, &a.hostname).cmp(&(b.listen_port, &b.hostname)));
    EdgeStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_ms: serving.started_ms,
        serving: serving.stamp,
        held: serving.held,
        refused: serving.refused.clone(),
        control_plane: serving.control_plane.clone(),
        listening: serving.listening.clone(),
        not_listening: serving.not_listening.clone(),
        connections: edge.connections(),
        route_count: table.routes(),
        routes,
        metrics: edge.metrics.snapshot(),
    }
}

fn backend_status(target: &crate::table::Target) -> BackendStatus {
    let key = target.backend.key();
    BackendStatus {
        instance: key.instance,
        address: key.address,
        draining: target.draining,
        in_rotation: target.backend.in_rotation(),
        connections: target.backend.connections(),
    }
}
