//! Asking another member's API, for the few things that are not replicated: an agent's stream ends at one member, and
//! questions to the agent must reach that one.

use crate::problem::Refusal;
use arc_swap::ArcSwap;
use bytes::Bytes;
use holdfast_model::Code;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// For a connection to another member, in milliseconds.
const CONNECT_MS_MAX: u64 = 2_000;
/// For another member's answer, in milliseconds.
const ANSWER_MS_MAX: u64 = 25_000;
/// The largest answer of another member, in bytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// How this member dials the others' API, by its own certificate.
pub struct Peers {
    tls: ArcSwap<rustls::ClientConfig>,
    name: ServerName<'static>,
}

impl Peers {
    /// Dials with `tls`, and expects `name`.
    pub fn new(tls: Arc<rustls::ClientConfig>, name: ServerName<'static>) -> Self {
        Self { tls: ArcSwap::new(over_http1(&tls)), name }
    }

    /// Dials with `tls` from now on: the certificate was renewed.
    pub fn replace(&self, tls: &rustls::ClientConfig) {
        self.tls.store(over_http1(tls));
    }

    /// Posts `body` to `path` of the member at `address`; the answer's status and body.
    ///
    /// # Errors
    /// When the member cannot be reached or takes too long.
    pub async fn post(&self, address: &str, path: &str, body: Vec<u8>) -> Result<(u16, Bytes), Refusal> {
        let work =
            tokio::time::timeout(Duration::from_millis(ANSWER_MS_MAX), self.post_now(address, path, body));
        match work.await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(cause)) => {
                tracing::debug!(address, %cause, "another member could not be asked");
                Err(Refusal::new(Code::Unavailable, "Another member could not be asked; try again."))
            }
            Err(_) => Err(Refusal::new(Code::Timeout, "Another member took too long to answer; try again.")),
        }
    }

    async fn post_now(&self, address: &str, path: &str, body: Vec<u8>) -> Result<(u16, Bytes), PeerError> {
        let connecting =
            tokio::time::timeout(Duration::from_millis(CONNECT_MS_MAX), TcpStream::connect(address));
        let stream = connecting.await.map_err(|_| PeerError::Slow)??;
        let tls = TlsConnector::from(self.tls.load_full());
        let stream = tls.connect(self.name.clone(), stream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = hyper::Request::post(path)
            .header(hyper::header::HOST, address)
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let answer = sender.send_request(request).await;
        let result = match answer {
            Ok(answer) => {
                let status = answer.status().as_u16();
                let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
                body.map(|b| (status, b.to_bytes())).map_err(PeerError::Body)
            }
            Err(error) => Err(error.into()),
        };
        driver.abort();
        result
    }
}

/// These are single requests; one protocol is enough.
fn over_http1(tls: &rustls::ClientConfig) -> Arc<rustls::ClientConfig> {
    let mut config = tls.clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error("the connection took too long")]
    Slow,
    #[error("the connection failed: {0}")]
    Connect(#[from] std::io::Error),
    #[error("HTTP failed: {0}")]
    Http(#[from] hyper::Error),
    #[error("the request could not be built: {0}")]
    Build(#[from] hyper::http::Error),
    #[error("the answer could not be read: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}
