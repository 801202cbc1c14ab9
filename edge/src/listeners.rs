//! The ports that are open: those that the table has routes for, no others.
//!
//! Opening and closing ports touches no connection that exists. A port that cannot be opened is tried again and
//! shown in the status; the other ports serve meanwhile.

use crate::admission::Shed;
use crate::connection;
use crate::edge::Edge;
use crate::take_over::Inherited;
use rand::RngExt;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections that the kernel completes before they are accepted, per port (`net.core.somaxconn` may lower it).
pub const BACKLOG: i32 = 4096;
/// After how long an idle connection is checked.
pub const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(60);
/// How long an unanswered check waits for the next.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered checks that end a connection.
pub const KEEP_ALIVE_PROBES: u32 = 4;
/// How long accepting rests after a fault such as running out of descriptors; with jitter of as much again.
const ACCEPT_REST: Duration = Duration::from_millis(20);

/// The open ports.
#[derive(Debug)]
pub struct Listeners {
    edge: Arc<Edge>,
    connections: TaskTracker,
    cut: CancellationToken,
    open: BTreeMap<SocketAddr, Accepting>,
    problems: BTreeMap<SocketAddr, String>,
    /// Sockets of the process before this one, to be used where a port is wanted.
    inherited: Inherited,
}

#[derive(Debug)]
struct Accepting {
    socket: Arc<TcpListener>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("Cannot listen on {address}; free the address or give the edge another to listen on.")]
pub struct ListenError {
    /// The address and port.
    pub address: SocketAddr,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl Listeners {
    /// No ports yet; those that are inherited are opened without being opened anew.
    pub fn new(edge: Arc<Edge>, inherited: Inherited) -> Self {
        Self {
            edge,
            connections: TaskTracker::new(),
            cut: CancellationToken::new(),
            open: BTreeMap::new(),
            problems: BTreeMap::new(),
            inherited,
        }
    }

    /// Closes what was inherited and is not wanted.
    pub fn drop_inherited(&mut self) {
        for address in std::mem::take(&mut self.inherited).into_keys() {
            tracing::info!(%address, "no longer listening");
        }
    }

    /// The open sockets, for another process to listen on as well.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn share(&self) -> io::Result<Vec<(SocketAddr, OwnedFd)>> {
        let share = |(address, accepting): (&SocketAddr, &Accepting)| {
            Ok((*address, accepting.socket.as_fd().try_clone_to_owned()?))
        };
        self.open.iter().map(share).collect()
    }

    /// Opens and closes ports until they are those of the table in force; false when one could not be opened.
    pub async fn reconcile(&mut self) -> bool {
        let wanted: BTreeSet<SocketAddr> = {
            let table = self.edge.table();
            let ports: Vec<u16> = table.ports().collect();
            ports
                .iter()
                .flat_map(|port| self.edge.listen.iter().map(|ip| SocketAddr::new(*ip, *port)))
                .collect()
        };
        let surplus: Vec<SocketAddr> = self.open.keys().filter(|a| !wanted.contains(a)).copied().collect();
        for address in surplus {
            self.close(address).await;
        }
        self.problems.retain(|address, _| wanted.contains(address));
        for address in wanted {
            if !self.open.contains_key(&address) {
                self.open(address);
            }
        }
        self.problems.is_empty()
    }

    fn open(&mut self, address: SocketAddr) {
        let opened = match self.inherited.remove(&address) {
            Some(socket) => adopt(address, socket),
            None => listen(address),
        };
        match opened {
            Ok(listener) => {
                tracing::info!(%address, "listening");
                self.problems.remove(&address);
                let stop = CancellationToken::new();
                let socket = Arc::new(listener);
                let accepting = accept(
                    Arc::clone(&self.edge),
                    Arc::clone(&socket),
                    address.port(),
                    stop.clone(),
                    self.connections.clone(),
                    self.cut.clone(),
                );
                self.open.insert(address, Accepting { socket, stop, task: tokio::spawn(accepting) });
            }
            Err(ListenError { source, .. }) => {
                if self.problems.insert(address, source.to_string()).is_none() {
                    tracing::error!(%address, error = %source, "cannot listen; trying again");
                }
            }
        }
    }

    async fn close(&mut self, address: SocketAddr) {
        let Some(Accepting { socket, stop, task }) = self.open.remove(&address) else { return };
        stop.cancel();
        // The loop only waits for the network beside its stop, so this is at once; the port is free afterwards.
        if let Err(error) = task.await {
            tracing::error!(%address, %error, "an accept loop ended by a panic");
        }
        drop(socket);
        tracing::info!(%address, "no longer listening");
    }

    /// The open addresses, and those that could not be opened with the reason.
    pub fn state(&self) -> (Vec<SocketAddr>, BTreeMap<SocketAddr, String>) {
        (self.open.keys().copied().collect(), self.problems.clone())
    }

    /// Closes all ports, gives connections `grace` to finish, or until `cut_short`, then cuts them.
    pub async fn stop(mut self, grace: Duration, cut_short: impl Future<Output = ()>) {
        for address in self.open.keys().copied().collect::<Vec<_>>() {
            self.close(address).await;
        }
        self.connections.close();
        let finished = tokio::select! {
            finished = tokio::time::timeout(grace, self.connections.wait()) => finished.is_ok(),
            () = cut_short => self.connections.is_empty(),
        };
        if !finished {
            tracing::warn!(connections = self.connections.len(), "cutting the connections that are left");
            self.cut.cancel();
            self.connections.wait().await;
        }
    }
}

/// Opens a listening socket that a restarted edge can open again at once.
///
/// # Errors
/// [`ListenError`] with the address.
pub fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let open = || -> io::Result<TcpListener> {
        let socket =
            Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if address.is_ipv6() {
            // The unspecified address takes IPv4 too; whoever wants IPv6 alone names an address.
            socket.set_only_v6(!address.ip().is_unspecified())?;
        }
        // Connections of an earlier process in TIME_WAIT, or still open, keep nobody from listening; another
        // listener does.
        socket.set_reuse_address(true)?;
        // Linux passes both on to the sockets that are accepted, which saves calls on each of them.
        socket.set_tcp_nodelay(true)?;
        keep_alive(&socket)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    open().map_err(|source| ListenError { address, source })
}

/// Goes on with a socket that another process opened by [`listen`].
fn adopt(address: SocketAddr, socket: OwnedFd) -> Result<TcpListener, ListenError> {
    TcpListener::from_std(std::net::TcpListener::from(socket))
        .map_err(|source| ListenError { address, source })
}

/// Lets the kernel find peers that vanished.
///
/// # Errors
/// What the system says.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE_IDLE)
        .with_interval(KEEP_ALIVE_INTERVAL)
        .with_retries(KEEP_ALIVE_PROBES);
    SockRef::from(socket).set_tcp_keepalive(&keep_alive)
}

async fn accept(
    edge: Arc<Edge>,
    listener: Arc<TcpListener>,
    port: u16,
    stop: CancellationToken,
    connections: TaskTracker,
    cut: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, peer)) => admit(&edge, client, peer, port, &connections, &cut),
            // The client left before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                edge.metrics.accept_errors.increment()
            }
            Err(error) => {
                edge.metrics.accept_errors.increment();
                tracing::warn!(port, %error, "cannot accept; resting");
                let rest = ACCEPT_REST.mul_f64(rand::rng().random_range(1.0..2.0));
                tokio::time::sleep(rest).await;
            }
        }
    }
}

fn admit(
    edge: &Arc<Edge>,
    client: TcpStream,
    peer: SocketAddr,
    port: u16,
    connections: &TaskTracker,
    cut: &CancellationToken,
) {
    edge.metrics.accepted.increment();
    let place = match edge.admission.admit(peer.ip()) {
        Ok(place) => place,
        Err(shed) => {
            match shed {
                Shed::Full => edge.metrics.shed_total.increment(),
                Shed::Source => edge.metrics.shed_source.increment(),
            }
            // A reset costs neither side a lingering socket.
            let _ = client.set_zero_linger();
            return;
        }
    };
    let (edge, cut) = (Arc::clone(edge), cut.clone());
    connections.spawn(async move {
        tokio::select! {
            ended = connection::serve(&edge, client, port) => match ended {
                Ok(ending) => tracing::debug!(%peer, port, ?ending, "connection ended"),
                Err(closed) => tracing::debug!(%peer, port, error = &closed as &dyn std::error::Error, "connection closed"),
            },
            () = cut.cancelled() => {}
        }
        drop(place);
    });
}
