//! Where the bytes under HTTP/2 come from: TLS 1.3 over TCP, and nothing else in the product.
//!
//! The seam is as low as it can be: whoever dials otherwise, as the simulator does, has the real HTTP/2, the real client and
//! the real follower above it. What a dialler hands out must lead to a member of this cluster that has been verified to be
//! one; the certificate's check is the dialler's duty.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::endpoint::Endpoint;
use crate::error::TransportError;

/// Bytes in both directions.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// What a dial comes to.
pub type Dialled<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn ByteStream>, TransportError>> + Send + 'a>>;

/// Opens connections to members. The caller bounds how long it waits
/// ([`CONNECT_MAX`](crate::connection::CONNECT_MAX)) and may drop the future at any time.
pub trait Dial: Send + Sync + 'static {
    /// Opens a connection to the member at `endpoint`, who has then proved to be one, and speaks HTTP/2.
    ///
    /// # Errors
    /// [`TransportError`] says how far it got.
    fn dial<'a>(&'a self, endpoint: &'a Endpoint) -> Dialled<'a>;
}

/// The product's dialler.
pub(crate) struct TlsDial {
    pub(crate) config: Arc<rustls::ClientConfig>,
    pub(crate) name: ServerName<'static>,
}

impl TlsDial {
    async fn connect(&self, to: &Endpoint) -> Result<Box<dyn ByteStream>, TransportError> {
        let endpoint = || to.to_string();
        let addresses = tokio::net::lookup_host((to.host(), to.port()))
            .await
            .map_err(|source| TransportError::Resolve { endpoint: endpoint(), source })?;
        let addresses: Vec<_> = addresses.collect();
        let stream = TcpStream::connect(addresses.as_slice())
            .await
            .map_err(|source| TransportError::Connect { endpoint: endpoint(), source })?;
        // Requests are small and waited for; losing this only costs latency.
        let _ = stream.set_nodelay(true);
        let stream = TlsConnector::from(Arc::clone(&self.config))
            .connect(self.name.clone(), stream)
            .await
            .map_err(|source| TransportError::Tls { endpoint: endpoint(), source })?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(TransportError::NotHttp2 { endpoint: endpoint() });
        }
        Ok(Box::new(stream))
    }
}

impl Dial for TlsDial {
    fn dial<'a>(&'a self, endpoint: &'a Endpoint) -> Dialled<'a> {
        Box::pin(self.connect(endpoint))
    }
}
