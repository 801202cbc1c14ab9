//! One HTTP/2 connection to one member, shared by every request to it, over whatever [`Dial`] opened: TLS 1.3.
//!
//! HTTP/2 only: every member offers it, requests and streams share one connection, and its pings find a peer that went
//! away without a word, also under a stream that is rightly silent.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls_pki_types::ServerName;

use crate::dial::{Dial, TlsDial};
use crate::endpoint::Endpoint;
use crate::error::TransportError;

/// Longest wait for a connection to stand: name, TCP, TLS and HTTP/2 together.
pub const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How often a quiet connection is pinged.
pub const PING_INTERVAL: Duration = Duration::from_secs(5);
/// How long a ping may take before the connection counts as dead.
pub const PING_MAX: Duration = Duration::from_secs(5);

/// What a request sends: bytes that are there, or frames that come while the answer is read.
pub(crate) type SendBody = UnsyncBoxBody<Bytes, Infallible>;

type Sender = http2::SendRequest<SendBody>;

/// How every endpoint is dialled, and whom it must prove to be.
#[derive(Clone)]
pub(crate) struct Security {
    pub(crate) dial: Arc<dyn Dial>,
    /// The name that every member proves: the authority in a request's URI.
    pub(crate) name: ServerName<'static>,
    /// The cluster's authority, once it is known.
    pub(crate) ca: Option<holdfast_identity::CaCertificate>,
}

impl Security {
    /// As the product dials.
    pub(crate) fn over_tls(
        config: Arc<rustls::ClientConfig>,
        name: ServerName<'static>,
        ca: Option<holdfast_identity::CaCertificate>,
    ) -> Security {
        Security { dial: Arc::new(TlsDial { config, name: name.clone() }), name, ca }
    }
}

/// An endpoint and the connection to it, if one stands.
pub(crate) struct Line {
    endpoint: Endpoint,
    sender: Mutex<Option<Sender>>,
}

impl Line {
    pub(crate) fn new(endpoint: Endpoint) -> Line {
        Line { endpoint, sender: Mutex::new(None) }
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends a request and waits, at most `within`, for the head of its answer. After a failure the connection is not
    /// used again.
    pub(crate) async fn send(
        &self,
        security: &Security,
        request: Request<SendBody>,
        within: Duration,
    ) -> Result<Response<Incoming>, TransportError> {
        let exchange = async {
            let mut sender = match self.standing() {
                Some(sender) => sender,
                None => self.dial(security).await?,
            };
            sender.send_request(request).await.map_err(|source| self.broken(source))
        };
        let answer = tokio::time::timeout(within, exchange).await.unwrap_or_else(|_| {
            Err(TransportError::Timeout { endpoint: self.endpoint.to_string(), after: within })
        });
        if answer.is_err() {
            self.hang_up();
        }
        answer
    }

    /// Forgets the connection; requests that use it end by themselves.
    pub(crate) fn hang_up(&self) {
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn broken(&self, source: hyper::Error) -> TransportError {
        TransportError::Http { endpoint: self.endpoint.to_string(), source }
    }

    fn standing(&self) -> Option<Sender> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.as_ref().filter(|sender| !sender.is_closed()).cloned()
    }

    async fn dial(&self, security: &Security) -> Result<Sender, TransportError> {
        let sender =
            tokio::time::timeout(CONNECT_MAX, self.connect(security)).await.unwrap_or_else(|_| {
                Err(TransportError::Timeout { endpoint: self.endpoint.to_string(), after: CONNECT_MAX })
            })?;
        *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        Ok(sender)
    }

    async fn connect(&self, security: &Security) -> Result<Sender, TransportError> {
        let stream = security.dial.dial(&self.endpoint).await?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_MAX)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken(source))?;
        // Ends when the peer closes, a ping is not answered, or the last sender and stream are gone.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the API ended");
            }
        });
        Ok(sender)
    }
}
