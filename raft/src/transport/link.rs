//! An authenticated byte stream between two members. The TLS one is what runs; the trait is there so that the very same
//! code above it can run over a simulated network.

use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use holdfast_identity::{Role, member_server_name, peer_identity};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A stream to a member whose identity was proven.
pub struct PeerStream {
    /// The member at the other end.
    pub peer: u64,
    /// The bytes.
    pub io: Box<dyn Duplex>,
}

/// Why a link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody answered.
    #[error("{address} could not be reached; check the address and the network")]
    Connect {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The handshake failed.
    #[error("the TLS handshake failed; check that both members have certificates of this cluster")]
    Tls(#[source] io::Error),
    /// Nothing can be accepted.
    #[error("the listener failed; check the limits of the process")]
    Listen(#[source] io::Error),
    /// The peer is no member.
    #[error("the peer's certificate does not prove a member of this cluster; give it one")]
    Certificate,
    /// Another member answered.
    #[error(
        "member {found} answered where member {wanted} was expected; check the address of member {wanted}"
    )]
    WrongMember {
        /// Who was dialled.
        wanted: u64,
        /// Who answered.
        found: u64,
    },
    /// The name does not fit.
    #[error("the name of member {0} cannot be used in TLS; check the cluster id")]
    Name(u64),
}

/// The rest of accepting a connection: it may take long, so it runs beside the accept loop.
pub type Handshake = BoxFuture<'static, Result<PeerStream, LinkError>>;

/// Makes links.
pub trait Link: Send + Sync + 'static {
    /// Dials a member. Resolves only to that member.
    fn dial<'a>(&'a self, target: u64, address: &'a str) -> BoxFuture<'a, Result<PeerStream, LinkError>>;
    /// Waits for somebody to dial this member.
    fn accept(&self) -> BoxFuture<'_, Result<Handshake, LinkError>>;
}

/// The TLS configurations of a member. Replaced when its certificate is renewed; new connections use the new ones.
pub struct RaftTls {
    cluster: String,
    server: ArcSwap<rustls::ServerConfig>,
    client: ArcSwap<rustls::ClientConfig>,
}

impl RaftTls {
    /// From `holdfast_identity::mutual_server_config` and `mutual_client_config`, for the cluster that they belong to.
    pub fn new(cluster: &str, server: Arc<rustls::ServerConfig>, client: Arc<rustls::ClientConfig>) -> Self {
        RaftTls { cluster: cluster.to_owned(), server: ArcSwap::new(server), client: ArcSwap::new(client) }
    }

    /// Uses other configurations from now on.
    pub fn replace(&self, server: Arc<rustls::ServerConfig>, client: Arc<rustls::ClientConfig>) {
        self.server.store(server);
        self.client.store(client);
    }

    /// The cluster whose certificates are accepted.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Which member a certificate chain proves.
    fn member_of(&self, chain: Option<&[CertificateDer<'_>]>) -> Result<u64, LinkError> {
        let identity = chain.and_then(|chain| peer_identity(chain).ok()).ok_or(LinkError::Certificate)?;
        if identity.role != Role::Member || identity.cluster != self.cluster {
            return Err(LinkError::Certificate);
        }
        identity.id.parse().map_err(|_| LinkError::Certificate)
    }
}

impl std::fmt::Debug for RaftTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftTls").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Links over TCP and TLS 1.3.
pub(crate) struct TlsLink {
    tls: Arc<RaftTls>,
    listener: TcpListener,
}

impl TlsLink {
    pub(crate) fn new(tls: Arc<RaftTls>, listener: TcpListener) -> Self {
        TlsLink { tls, listener }
    }

    async fn connect(&self, target: u64, address: &str) -> Result<PeerStream, LinkError> {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|source| LinkError::Connect { address: address.to_owned(), source })?;
        tcp.set_nodelay(true).map_err(|source| LinkError::Connect { address: address.to_owned(), source })?;
        let name = member_server_name(&self.tls.cluster, &target.to_string())
            .map_err(|_| LinkError::Name(target))?;
        let connector = TlsConnector::from(self.tls.client.load_full());
        let stream = connector.connect(name, tcp).await.map_err(LinkError::Tls)?;
        let found = self.tls.member_of(stream.get_ref().1.peer_certificates())?;
        if found != target {
            return Err(LinkError::WrongMember { wanted: target, found });
        }
        Ok(PeerStream { peer: found, io: Box::new(stream) })
    }
}

impl Link for TlsLink {
    fn dial<'a>(&'a self, target: u64, address: &'a str) -> BoxFuture<'a, Result<PeerStream, LinkError>> {
        Box::pin(self.connect(target, address))
    }

    fn accept(&self) -> BoxFuture<'_, Result<Handshake, LinkError>> {
        Box::pin(async move {
            let (tcp, _address) = self.listener.accept().await.map_err(LinkError::Listen)?;
            let tls = self.tls.clone();
            let handshake: Handshake = Box::pin(async move {
                tcp.set_nodelay(true).map_err(LinkError::Tls)?;
                let acceptor = TlsAcceptor::from(tls.server.load_full());
                let stream = acceptor.accept(tcp).await.map_err(LinkError::Tls)?;
                let peer = tls.member_of(stream.get_ref().1.peer_certificates())?;
                Ok(PeerStream { peer, io: Box::new(stream) })
            });
            Ok(handshake)
        })
    }
}
