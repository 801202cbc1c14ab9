//! One HTTP/2 connection over TLS, the same for every system that is measured: gRPC is HTTP/2 too, so the generator's
//! own cost is equal on both sides.

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use holdfast_bench::error::BenchError;
use http::{HeaderMap, Request, StatusCode};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// For a connection with its TLS handshake.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// For one request: longer than either system's own patience.
pub const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Bytes that the peer may send ahead, per stream and in all.
const WINDOW_BYTES: u32 = 4 << 20;

/// How connections are made.
#[derive(Clone)]
pub struct Dialler {
    /// Whom to trust.
    pub tls: Arc<ClientConfig>,
    /// Whom to expect.
    pub name: ServerName<'static>,
}

/// A request, ready to be sent.
pub struct Ask {
    /// Method, path and headers.
    pub head: Request<()>,
    /// The body; empty for none.
    pub body: Bytes,
}

/// An answer.
pub struct Told {
    /// The status.
    pub status: StatusCode,
    /// The whole body.
    pub body: Vec<u8>,
    /// What came after the body, or instead of it.
    pub trailers: HeaderMap,
}

/// An answer that goes on until it is dropped.
pub struct Flow {
    body: RecvStream,
    /// Held open: a peer may take its end for the end of the answer.
    _asking: SendStream<Bytes>,
    address: SocketAddr,
}

impl Flow {
    /// The next bytes; `None` when the peer ended the answer.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BenchError> {
        let broken = |why: h2::Error| BenchError::Connection {
            address: self.address.to_string(),
            why: why.to_string(),
        };
        let Some(chunk) = self.body.data().await else { return Ok(None) };
        let chunk = chunk.map_err(broken)?;
        self.body.flow_control().release_capacity(chunk.len()).map_err(broken)?;
        Ok(Some(chunk))
    }
}

/// A connection, shared by any number of clients.
#[derive(Clone)]
pub struct Line {
    sender: SendRequest<Bytes>,
    address: SocketAddr,
}

impl Line {
    /// Connects.
    pub async fn dial(dialler: &Dialler, address: SocketAddr) -> Result<Line, BenchError> {
        let broken = |why: String| BenchError::Connection { address: address.to_string(), why };
        let connecting = async {
            let stream = TcpStream::connect(address).await.map_err(|e| broken(e.to_string()))?;
            stream.set_nodelay(true).map_err(|e| broken(e.to_string()))?;
            let connector = TlsConnector::from(Arc::clone(&dialler.tls));
            let stream = connector.connect(dialler.name.clone(), stream).await;
            let stream = stream.map_err(|e| broken(e.to_string()))?;
            let mut builder = h2::client::Builder::new();
            builder.initial_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
            let (sender, connection) = builder.handshake(stream).await.map_err(|e| broken(e.to_string()))?;
            // It ends with the last sender, or when the peer goes; whoever asks then is told.
            tokio::spawn(connection);
            Ok(Line { sender, address })
        };
        tokio::time::timeout(CONNECT_MAX, connecting).await.map_err(|_| broken("it took too long".into()))?
    }

    /// Asks and waits for the whole answer.
    pub async fn ask(&mut self, ask: Ask) -> Result<Told, BenchError> {
        let address = self.address;
        match tokio::time::timeout(ANSWER_MAX, self.exchange(ask)).await {
            Ok(Ok(told)) => Ok(told),
            Ok(Err(error)) => {
                Err(BenchError::Connection { address: address.to_string(), why: error.to_string() })
            }
            Err(_) => Err(BenchError::Connection { address: address.to_string(), why: "no answer".into() }),
        }
    }

    /// Asks for an answer that goes on, and waits until it began.
    pub async fn open(&mut self, ask: Ask) -> Result<Flow, BenchError> {
        let address = self.address;
        let broken = |why: String| BenchError::Connection { address: address.to_string(), why };
        let opening = async {
            let mut sender = self.sender.clone().ready().await?;
            let (answer, mut asking) = sender.send_request(ask.head, ask.body.is_empty())?;
            if !ask.body.is_empty() {
                asking.send_data(ask.body, false)?;
            }
            let (head, body) = answer.await?.into_parts();
            Ok::<_, h2::Error>((head.status, Flow { body, _asking: asking, address }))
        };
        let opened = tokio::time::timeout(ANSWER_MAX, opening).await;
        let (status, flow) =
            opened.map_err(|_| broken("no answer".into()))?.map_err(|e| broken(e.to_string()))?;
        if status == StatusCode::OK {
            Ok(flow)
        } else {
            Err(broken(format!("a stream was refused: {status}")))
        }
    }

    async fn exchange(&mut self, ask: Ask) -> Result<Told, h2::Error> {
        let mut sender = self.sender.clone().ready().await?;
        let (answer, mut body) = sender.send_request(ask.head, ask.body.is_empty())?;
        if !ask.body.is_empty() {
            body.send_data(ask.body, true)?;
        }
        let (head, mut stream) = answer.await?.into_parts();
        let mut body = Vec::new();
        while let Some(chunk) = stream.data().await {
            let chunk = chunk?;
            stream.flow_control().release_capacity(chunk.len())?;
            body.extend_from_slice(&chunk);
        }
        // An answer without a body carries them in its head.
        let trailers = stream.trailers().await?.unwrap_or(head.headers);
        Ok(Told { status: head.status, body, trailers })
    }
}
