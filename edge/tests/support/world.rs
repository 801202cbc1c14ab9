//! A running edge with a real replica on disk, backends on loopback, and clients.

use super::tls::{Identity, Offer};
use holdfast_client::Link;
use holdfast_client::replica::{Applied, Replica};
use holdfast_edge::agent::{Feed, REPLICA_FILE, RunningEdge};
use holdfast_edge::introspect::{EdgeStatus, read_status};
use holdfast_edge::take_over::Inherited;
use holdfast_edge::{EdgeConfig, Limits};
use holdfast_model::agent::{Backend, EdgeRoute, Frame, ProxyProtocol, Stamp};
use holdfast_model::{ClusterId, Incarnation, InstanceId, Revision, RouteId};
use rustls::pki_types::ServerName;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// How long a test waits before it says that something hangs.
pub(crate) const HANG: Duration = Duration::from_secs(60);
pub(crate) const TLS_PORT: u16 = 8443;
pub(crate) const TCP_PORT: u16 = 9000;

static NEXT: AtomicU64 = AtomicU64::new(1);
static WORLDS: AtomicU16 = AtomicU16::new(1);

pub(crate) async fn guarded<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, what).await.expect("it hangs")
}

/// Repeats `look` until it says true.
pub(crate) async fn until(mut look: impl AsyncFnMut() -> bool) {
    guarded(async {
        while !look().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// An edge and the control plane's side of its replica.
pub(crate) struct World {
    dir: TempDir,
    pub(crate) config: EdgeConfig,
    replica: Option<Replica<EdgeRoute>>,
    running: Option<RunningEdge>,
    revision: u64,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// An edge on a loopback address of its own, with nothing known yet.
    pub(crate) async fn with(change: impl FnOnce(&mut EdgeConfig)) -> Self {
        let dir = TempDir::new().unwrap();
        let mut config = EdgeConfig::new(dir.path().to_owned());
        let [high, low] = WORLDS.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let process = (std::process::id() % 100 + 100) as u8;
        config.listen = vec![IpAddr::V4(Ipv4Addr::new(127, process, high, low.max(1)))];
        config.limits = Limits { probe_unhealthy: Duration::from_millis(20), ..Limits::default() };
        change(&mut config);
        let mut world = Self { dir, config, replica: None, running: None, revision: 0 };
        world.start();
        world
    }

    fn start(&mut self) {
        let replica = Replica::open(&self.dir.path().join(REPLICA_FILE), cluster()).unwrap();
        // Nobody sends on it: the edge is on its own.
        let (_, link) = watch::channel(Link::Down { reason: "alone".to_owned() });
        let feed = Feed { routes: replica.subscribe(), link };
        self.running = Some(RunningEdge::start(&self.config, feed, Inherited::new()).unwrap());
        self.replica = Some(replica);
    }

    /// Ends the edge and starts another from the same folder; no control plane takes part.
    pub(crate) async fn restart(&mut self) {
        self.end().await;
        self.start();
    }

    /// Whoever sent the edge its routes is gone; the edge runs on.
    pub(crate) fn end_feed(&mut self) {
        self.replica = None;
    }

    /// Ends the edge and leaves its folder.
    pub(crate) async fn end(&mut self) {
        guarded(self.running.take().unwrap().stop()).await.unwrap();
        self.replica = None;
    }

    /// Makes these the routes and waits until the edge serves them.
    pub(crate) async fn publish(&mut self, routes: Vec<EdgeRoute>) {
        let revision = self.offer(routes);
        self.served(revision).await;
    }

    /// Gives the replica these routes as the next revision.
    pub(crate) fn offer(&mut self, routes: Vec<EdgeRoute>) -> u64 {
        self.revision += 1;
        let stamp =
            Stamp { cluster: cluster(), incarnation: Incarnation(0), revision: Revision(self.revision) };
        let replica = self.replica.as_mut().unwrap();
        replica.begin_stream();
        let items = routes.len() as u64;
        let confirmed_through = stamp.revision;
        for frame in [
            Frame::SnapshotBegin { stamp, items, confirmed_through },
            Frame::SnapshotItems(routes),
            Frame::SnapshotEnd,
        ] {
            let applied = replica.apply(frame).unwrap();
            assert!(matches!(applied, Applied::Applied | Applied::Staged), "{applied:?}");
        }
        self.revision
    }

    pub(crate) async fn served(&self, revision: u64) {
        let mut applied = self.running.as_ref().unwrap().applied();
        guarded(applied.wait_for(|stamp| stamp.is_some_and(|s| s.revision.0 >= revision))).await.unwrap();
    }

    pub(crate) fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.config.listen[0], port)
    }

    pub(crate) async fn status(&self) -> EdgeStatus {
        read_status(self.dir.path()).await.unwrap()
    }

    pub(crate) async fn tcp(&self, port: u16) -> TcpStream {
        guarded(TcpStream::connect(self.address(port))).await.unwrap()
    }

    /// A TLS connection through the edge.
    pub(crate) async fn tls(
        &self,
        hostname: &str,
        trusted: &[&Identity],
        offer: Offer,
    ) -> io::Result<TlsStream<Dribble>> {
        let stream = TcpStream::connect(self.address(TLS_PORT)).await?;
        stream.set_nodelay(true)?;
        handshake(Dribble { stream, at_a_time: usize::MAX }, hostname, trusted, offer).await
    }
}

pub(crate) async fn handshake(
    stream: Dribble,
    hostname: &str,
    trusted: &[&Identity],
    offer: Offer,
) -> io::Result<TlsStream<Dribble>> {
    let connector = TlsConnector::from(super::tls::client(trusted, offer));
    let name = ServerName::try_from(hostname.to_owned()).unwrap();
    guarded(connector.connect(name, stream)).await
}

pub(crate) fn cluster() -> ClusterId {
    ClusterId::from_bits(1)
}

/// A route without backends' state: all are ready.
pub(crate) fn route(hostname: Option<&str>, backends: &[SocketAddr]) -> EdgeRoute {
    EdgeRoute {
        id: RouteId::from_bits(u128::from(NEXT.fetch_add(1, Ordering::Relaxed))),
        hostname: hostname.map(|name| name.parse().unwrap()),
        listen_port: if hostname.is_some() { TLS_PORT } else { TCP_PORT },
        proxy_protocol: ProxyProtocol::Off,
        backends: backends.iter().map(|address| instance(*address)).collect(),
    }
}

fn instance(address: SocketAddr) -> Backend {
    let IpAddr::V6(v6) = address.ip() else { panic!("{address} is not IPv6") };
    Backend {
        instance: InstanceId::from_bits(u128::from(address.port())),
        address: v6,
        port: address.port(),
        draining: false,
    }
}

/// A socket that a backend listens on.
pub(crate) async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A TLS backend that says `greeting` and then sends back what it gets.
pub(crate) async fn tls_backend(identity: &Identity, greeting: &'static str) -> SocketAddr {
    let (listener, address) = listener().await;
    let acceptor = TlsAcceptor::from(identity.server.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // Probes of the edge come and go without a hello.
                let mut stream = acceptor.accept(stream).await?;
                stream.write_all(greeting.as_bytes()).await?;
                stream.flush().await?;
                let (mut read, mut write) = tokio::io::split(stream);
                tokio::io::copy(&mut read, &mut write).await?;
                write.shutdown().await
            });
        }
    });
    address
}

/// A backend that says `greeting` to each connection that sends anything, then sends back what it gets.
pub(crate) async fn plain_backend(greeting: &'static [u8]) -> SocketAddr {
    let (listener, address) = listener().await;
    serve_plain(listener, greeting);
    address
}

pub(crate) fn serve_plain(listener: TcpListener, greeting: &'static [u8]) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(greeting).await?;
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await?;
                write.shutdown().await
            });
        }
    });
}

/// The next connection that is not a probe: one that sends something within its life.
pub(crate) async fn accept_used(listener: &TcpListener) -> TcpStream {
    loop {
        let (stream, _) = guarded(listener.accept()).await.unwrap();
        if matches!(guarded(stream.peek(&mut [0])).await, Ok(1)) {
            return stream;
        }
    }
}

/// What a connection says until it ends, whichever way it ends.
pub(crate) async fn all(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut got = Vec::new();
    let _ = guarded(stream.read_to_end(&mut got)).await;
    got
}

pub(crate) async fn exactly(stream: &mut (impl AsyncRead + Unpin), bytes: usize) -> io::Result<String> {
    let mut got = vec![0; bytes];
    guarded(stream.read_exact(&mut got)).await?;
    Ok(String::from_utf8(got).unwrap())
}

/// A stream that hands the network a few bytes at a time.
#[derive(Debug)]
pub(crate) struct Dribble {
    pub(crate) stream: TcpStream,
    pub(crate) at_a_time: usize,
}

impl AsyncRead for Dribble {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Dribble {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let some = &bytes[..bytes.len().min(self.at_a_time)];
        Pin::new(&mut self.stream).poll_write(cx, some)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
