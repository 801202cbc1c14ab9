//! The listener: TLS, a bounded number of connections, HTTP/1.1 and HTTP/2, and a stop that waits for what is in
//! flight.

use crate::caller::Peer;
use crate::gate::Connection;
use crate::service::{at, told_to_stop};
use arc_swap::ArcSwap;
use axum::Router;
use holdfast_identity::facts;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

/// Connections at a time.
pub const CONNECTIONS_MAX: usize = 8_192;
/// For the TLS handshake, in milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 5_000;
/// For a request's headers, and for a connection's first request, in milliseconds.
pub const HEADERS_MS_MAX: u64 = 10_000;
/// Bytes of a request's headers.
pub const HEADER_BYTES_MAX: u32 = 64 << 10;
/// Streams of one HTTP/2 connection at a time.
pub const STREAMS_MAX: u32 = 256;
/// For requests in flight when the server stops, in milliseconds.
pub const STOP_MS_MAX: u64 = 5_000;
/// Between two attempts to accept after the system refused one, in milliseconds.
const ACCEPT_PAUSE_MS: u64 = 50;

/// Serves `router` on `listener` until `stopping` becomes true. New connections use what `tls` holds at that time, so
/// that a renewed certificate needs no restart.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = told_to_stop(&mut stopping) => break,
        };
        let (stream, source) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a peer that left at once: neither ends the server.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(%source, "too many connections; one was closed");
            continue;
        };
        let acceptor = TlsAcceptor::from(tls.load_full());
        let (router, stopping) = (router.clone(), stopping.clone());
        connections.spawn(async move {
            connection(stream, source, acceptor, router, stopping).await;
            drop(slot);
        });
    }
    connections.close();
    let _ = tokio::time::timeout(Duration::from_millis(STOP_MS_MAX), connections.wait()).await;
}

async fn connection(
    stream: TcpStream,
    source: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    stopping: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(Duration::from_millis(HANDSHAKE_MS_MAX), acceptor.accept(stream));
    let stream = match handshake.await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%source, %error, "a TLS handshake failed"),
        Err(_) => return tracing::debug!(%source, "a TLS handshake took too long"),
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| facts(chain.first()?).ok());
    let peer = certificate.map(|c| Peer { identity: c.identity, not_after: at(c.not_after) });
    serve_stream(stream, Connection { source: Some(source.ip()), peer }, router, stopping).await;
}

/// Serves HTTP on one connection whose handshake is done, until it ends or `stopping` becomes true. `known` is believed: it
/// is what the handshake proved.
pub async fn serve_stream(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    known: Connection,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let source = known.source;
    let asked = Arc::new(Notify::new());
    let asks = Arc::clone(&asked);
    let service = TowerToHyperService::new(router.map_request(move |request: hyper::Request<_>| {
        asks.notify_one();
        let mut request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(known.clone());
        request
    }));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(HEADERS_MS_MAX))
        .max_buf_size(HEADER_BYTES_MAX as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEADER_BYTES_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .keep_alive_timeout(Duration::from_secs(10));
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    // The protocol is told from the first bytes, and nothing below this bounds the wait for them.
    let silent = async {
        if tokio::time::timeout(Duration::from_millis(HEADERS_MS_MAX), asked.notified()).await.is_ok() {
            std::future::pending::<()>().await;
        }
    };
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = silent => return tracing::debug!(?source, "a connection asked for nothing and was closed"),
        () = told_to_stop(&mut stopping) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(?source, error, "a connection ended with an error");
    }
}
