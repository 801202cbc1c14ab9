//! The story of one client connection: read the hello, find the route, reach a backend, relay, close.
//!
//! The route is looked up once, in the table in force when the hello is complete; whatever follows uses what was
//! found there, so that a connection sees exactly one revision (I8). Nothing is routed by default: what has no route
//! of its own is closed.

use crate::backend::Load;
use crate::client_hello::{HelloError, HelloReader, Progress, ReadHello};
use crate::connect::{ConnectError, connect};
use crate::edge::Edge;
use crate::proxy_protocol::ProxyHeader;
use crate::relay::Ending;
use crate::table::{PortRoutes, Route};
use holdfast_model::Hostname;
use holdfast_model::agent::ProxyProtocol;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use ulid::Ulid;

/// What is read of a hello at a time, in bytes.
const HELLO_READ_BYTES: usize = 4 << 10;

/// Why a connection was closed without being relayed.
#[derive(Debug, thiserror::Error)]
pub enum Closed {
    /// What arrived is no hello that the edge routes.
    #[error("The connection was closed: its ClientHello is refused.")]
    Refused(#[source] HelloError),
    /// The hello did not arrive in time.
    #[error("The connection was closed: its ClientHello took too long.")]
    TimedOut,
    /// The client left before its hello was complete.
    #[error("The client closed before its ClientHello was complete.")]
    Abandoned(#[source] Option<io::Error>),
    /// There is no memory for more unfinished hellos.
    #[error(
        "The connection was closed: unfinished ClientHellos use all the memory that they may; try again later."
    )]
    HelloMemory,
    /// The hello names no host.
    #[error("The connection was closed: its ClientHello names no host; use a client that sends SNI.")]
    NoServerName,
    /// No route has the name, or the port.
    #[error("The connection was closed: this port has no route for the name; add a route.")]
    NoRoute,
    /// No backend could be reached.
    #[error("The connection was closed: no backend could be reached.")]
    Unreachable(#[source] ConnectError),
    /// The client's socket failed.
    #[error("The connection was closed: its addresses cannot be read.")]
    Addresses(#[source] io::Error),
}

/// Where a connection goes, and what its backend gets first.
struct Routed {
    route: Arc<Route>,
    hostname: Option<Hostname>,
    raw: Vec<u8>,
}

/// Carries one connection from its first byte to its end.
///
/// # Errors
/// [`Closed`] when it was closed without reaching a backend. The counters have it; the caller may log it.
pub async fn serve(edge: &Edge, client: TcpStream, port: u16) -> Result<Ending, Closed> {
    let metrics = &edge.metrics;
    let (backend, load, first) = match reach(edge, &client, port).await {
        Ok(reached) => reached,
        Err(closed) => {
            count(edge, &closed);
            return Err(closed);
        }
    };
    let ending = edge.relay.run(client, backend, first, metrics).await;
    drop(load);
    metrics.relayed.increment();
    match ending {
        Ending::Closed => {}
        Ending::Reset => metrics.relayed_reset.increment(),
        Ending::Idle => metrics.relayed_idle.increment(),
    }
    Ok(ending)
}

async fn reach(edge: &Edge, client: &TcpStream, port: u16) -> Result<(TcpStream, Load, Vec<u8>), Closed> {
    let Routed { route, hostname, raw } = find_route(edge, client, port).await?;
    let (backend, load) = connect(&route.targets, &edge.balancer, edge.limits.connect, &edge.metrics)
        .await
        .map_err(Closed::Unreachable)?;
    let first = match route.proxy_protocol {
        ProxyProtocol::Off => raw,
        ProxyProtocol::V2 => {
            let mut first = proxy_header(client, hostname).map_err(Closed::Addresses)?.encode();
            first.extend_from_slice(&raw);
            first
        }
    };
    Ok((backend, load, first))
}

async fn find_route(edge: &Edge, client: &TcpStream, port: u16) -> Result<Routed, Closed> {
    match edge.table().port(port) {
        None => return Err(Closed::NoRoute),
        Some(PortRoutes::Tcp(route)) => {
            return Ok(Routed { route: Arc::clone(route), hostname: None, raw: Vec::new() });
        }
        Some(PortRoutes::Tls(_)) => {}
    }
    let ReadHello { hello, raw } = read_hello(edge, client).await?;
    let hostname = hello.server_name.ok_or(Closed::NoServerName)?;
    // The one look-up. Were the port given to a TCP route meanwhile, it would find no names and close.
    let table = edge.table();
    let route = table.port(port).and_then(|routes| routes.by_name(&hostname)).ok_or(Closed::NoRoute)?;
    Ok(Routed { route: Arc::clone(route), hostname: Some(hostname), raw })
}

async fn read_hello(edge: &Edge, client: &TcpStream) -> Result<ReadHello, Closed> {
    let limits = &edge.limits;
    let mut memory = edge.admission.hello_memory();
    let mut reader = HelloReader::new();
    let deadline = Instant::now() + limits.hello_total;
    loop {
        let until = deadline.min(Instant::now() + limits.hello_gap);
        match timeout_at(until, client.readable()).await {
            Err(_) => return Err(Closed::TimedOut),
            Ok(Err(error)) => return Err(Closed::Abandoned(Some(error))),
            Ok(Ok(())) => {}
        }
        reader = match read_once(client, reader)? {
            Progress::Complete(read) => return Ok(read),
            Progress::NeedMore(reader) => reader,
        };
        if !memory.grow_to(reader.buffered_bytes()) {
            return Err(Closed::HelloMemory);
        }
    }
}

/// Reads what is there; its buffer is gone before anybody waits.
fn read_once(client: &TcpStream, reader: HelloReader) -> Result<Progress, Closed> {
    let mut buffer = [0; HELLO_READ_BYTES];
    match client.try_read(&mut buffer) {
        Ok(0) => Err(Closed::Abandoned(None)),
        Ok(read) => reader.push(&buffer[..read]).map_err(Closed::Refused),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Progress::NeedMore(reader)),
        Err(error) => Err(Closed::Abandoned(Some(error))),
    }
}

fn proxy_header(client: &TcpStream, hostname: Option<Hostname>) -> io::Result<ProxyHeader> {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let id = Ulid::from_parts(u64::try_from(now_ms).unwrap_or(u64::MAX), rand::random());
    Ok(ProxyHeader {
        source: canonical(client.peer_addr()?),
        destination: canonical(client.local_addr()?),
        authority: hostname.map(|name| name.as_str().to_owned()),
        unique_id: Some(id.to_string()),
    })
}

fn count(edge: &Edge, closed: &Closed) {
    let metrics = &edge.metrics;
    let counter = match closed {
        Closed::Refused(_) => &metrics.hello_refused,
        Closed::TimedOut => &metrics.hello_timed_out,
        Closed::Abandoned(_) | Closed::Addresses(_) => &metrics.hello_abandoned,
        Closed::HelloMemory => &metrics.shed_hello_memory,
        Closed::NoServerName => &metrics.no_server_name,
        Closed::NoRoute => &metrics.no_route,
        Closed::Unreachable(ConnectError::NoBackend) => &metrics.no_backend,
        Closed::Unreachable(ConnectError::NoneAccepted { .. }) => &metrics.connect_failed,
    };
    counter.increment();
}
