//! Serves the text over HTTP, on a TCP address or a Unix socket. There is no authentication: the operator chooses who can
//! reach the address, which is why there is none by default.

use crate::exposition::Exposition;
use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::prometheus_text;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Readers at a time; more wait to be accepted.
pub const READERS_MAX: usize = 4;
/// How long one reader may take for everything.
pub const READER_TIME_MAX: Duration = Duration::from_secs(10);
/// The largest head of a request, in bytes. A body is never read.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// After an accept that failed: out of descriptors, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where to serve: `127.0.0.1:9464`, `[::1]:9464`, or `unix:/run/holdfast/node-metrics.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An address.
    Tcp(SocketAddr),
    /// A socket for this process's own user alone.
    Unix(PathBuf),
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text names no place.
    #[error("Metrics are served on an address and port, as in 127.0.0.1:9464, or on unix:/path/of/a/socket.")]
    Form,
    /// The place cannot be had.
    #[error("Metrics cannot be served on {listen}; choose an address that is free.")]
    Bind {
        /// Which.
        listen: Listen,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err(ListenError::Form),
            None => text.parse().map(Self::Tcp).map_err(|_| ListenError::Form),
        }
    }
}

/// A place that is held.
#[derive(Debug)]
pub enum Listener {
    /// An address.
    Tcp(TcpListener),
    /// A socket.
    Unix(UnixListener),
}

impl Listener {
    /// Takes the place; a socket's file that an earlier process left is replaced.
    ///
    /// # Errors
    /// [`ListenError::Bind`].
    pub async fn bind(listen: &Listen) -> Result<Self, ListenError> {
        let bound = match listen {
            Listen::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            Listen::Unix(path) => bind_unix(path).map(Self::Unix),
        };
        bound.map_err(|source| ListenError::Bind { listen: listen.clone(), source })
    }
}

fn bind_unix(path: &PathBuf) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(socket)
}

/// Gathers what is to be told, at each scrape.
pub type Source = Arc<dyn Fn() -> BoxFuture<'static, Exposition> + Send + Sync>;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Answers `GET /metrics` until it is dropped. Readers under way are finished within [`READER_TIME_MAX`].
pub async fn serve(listener: Listener, source: Source) -> Infallible {
    let readers = Arc::new(Semaphore::new(READERS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&readers).acquire_owned().await else { std::future::pending().await };
        let accepted: io::Result<Box<dyn Stream>> = match &listener {
            Listener::Tcp(socket) => socket.accept().await.map(|(stream, _)| Box::new(stream) as _),
            Listener::Unix(socket) => socket.accept().await.map(|(stream, _)| Box::new(stream) as _),
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "a reader of metrics was not accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let source = Arc::clone(&source);
        tokio::spawn(async move {
            let answer = service_fn(move |request| answer(request, Arc::clone(&source)));
            let connection = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            if !matches!(tokio::time::timeout(READER_TIME_MAX, connection).await, Ok(Ok(()))) {
                tracing::debug!("a reader of metrics left, or was too slow");
            }
            drop(permit);
        });
    }
}

async fn answer(request: Request<Incoming>, source: Source) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return Ok(plain(StatusCode::NOT_FOUND, "Metrics are at /metrics.\n"));
    }
    if request.method() != Method::GET {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "Metrics are read with GET.\n"));
    }
    let Ok(text) = source().await.text() else {
        return Ok(plain(StatusCode::INTERNAL_SERVER_ERROR, "The metrics could not be written.\n"));
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(prometheus_text::CONTENT_TYPE));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpStream, UnixStream};

    fn source() -> Source {
        Arc::new(|| {
            let mut exposition = Exposition::default();
            exposition.gauge("holdfast_up", "Up", &[], 1.0);
            Box::pin(async { exposition })
        })
    }

    async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
        // A server that has heard enough may close before all is written.
        stream.write_all(request.as_bytes()).await.ok();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok();
        answer
    }

    #[tokio::test]
    async fn i14_only_a_scrape_is_answered() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let Listener::Tcp(socket) = &listener else { panic!("not TCP") };
        let address = socket.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, source()));
        let told = |request: String| async move {
            let answer = ask(TcpStream::connect(address).await.unwrap(), &request);
            tokio::time::timeout(Duration::from_secs(60), answer).await.unwrap()
        };
        let scrape = told("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".into()).await;
        assert!(scrape.starts_with("HTTP/1.1 200") && scrape.contains("\nholdfast_up 1"), "{scrape}");
        assert!(scrape.contains("content-type: text/plain; version=0.0.4"), "{scrape}");
        assert!(told("GET / HTTP/1.1\r\nhost: x\r\n\r\n".into()).await.starts_with("HTTP/1.1 404"));
        let post = "POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n";
        assert!(told(post.into()).await.starts_with("HTTP/1.1 405"));
        let long = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(2 * HEAD_BYTES_MAX));
        assert!(!told(long).await.starts_with("HTTP/1.1 200"));
        // Readers that say nothing take every place, but not for ever.
        let mut silent = Vec::new();
        for _ in 0..READERS_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(told("GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".into()).await.starts_with("HTTP/1.1 200"));
        server.abort();
    }

    #[tokio::test]
    async fn a_socket_is_its_users_own_and_replaces_what_was_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.sock");
        let listen: Listen = format!("unix:{}", path.display()).parse().unwrap();
        drop(Listener::bind(&listen).await.unwrap());
        let listener = Listener::bind(&listen).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let server = tokio::spawn(serve(listener, source()));
        let stream = UnixStream::connect(&path).await.unwrap();
        assert!(ask(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.contains("holdfast_up 1"));
        server.abort();
    }

    #[test]
    fn a_place_is_an_address_or_an_absolute_socket() {
        for text in ["", "9464", "localhost", "unix:", "unix:relative", "127.0.0.1"] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
        for text in ["127.0.0.1:9464", "[::1]:0", "unix:/run/x.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
    }
}
