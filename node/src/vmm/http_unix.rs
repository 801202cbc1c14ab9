//! One HTTP request over a Unix socket, bounded in time and size: Firecracker's API needs no more.

use std::{io, path::Path, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::VmmError;

/// How long a request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// The most bytes of an answer that are read.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Sends one request with a JSON body and returns status and answer.
pub(crate) async fn request(
    socket: &Path,
    method: Method,
    uri: &str,
    body: Vec<u8>,
) -> Result<(StatusCode, Bytes), VmmError> {
    let used = |action, source| VmmError::Control { path: socket.to_owned(), action, source };
    let exchange = async {
        let stream = UnixStream::connect(socket).await.map_err(|source| used("connected to", source))?;
        let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| used("spoken to", io::Error::other(source)))?;
        // Ends with the sender, or with the deadline, when both are dropped.
        let drive = async { connection.await.map_err(|source| used("spoken to", io::Error::other(source))) };
        let ask = async {
            let request = Request::builder()
                .method(method)
                .uri(uri)
                .header("Host", "localhost")
                .header("Content-Type", "application/json")
                .body(Full::new(Bytes::from(body)))
                .map_err(|source| used("asked", io::Error::other(source)))?;
            let answer =
                send.send_request(request).await.map_err(|source| used("asked", io::Error::other(source)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|source| used("read from", io::Error::other(source)))?
                .to_bytes();
            drop(send);
            Ok((status, body))
        };
        let (answer, driven) = tokio::join!(ask, drive);
        // An answer that arrived whole counts, however the connection ended after it.
        answer.or_else(|error| driven.and(Err(error)))
    };
    match tokio::time::timeout(REQUEST_DEADLINE, exchange).await {
        Ok(result) => result,
        Err(_) => Err(VmmError::ControlDeadline {
            path: socket.to_owned(),
            expected: "answer a request",
            seconds: REQUEST_DEADLINE.as_secs(),
        }),
    }
}
