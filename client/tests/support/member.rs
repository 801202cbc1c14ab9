//! A small real API server over TLS and HTTP/2 whose answers a test decides.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use holdfast_client::Endpoint;
use holdfast_identity::{Authority, CERTIFICATE_VALIDITY, Credential, PrivateKey, Subject};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// How long a test waits for what must happen before it calls it stuck.
pub const HANG_GUARD: Duration = Duration::from_secs(60);

pub type Body = BoxBody<Bytes, std::io::Error>;

pub fn authority() -> Authority {
    Authority::create(&super::CLUSTER.to_string(), SystemTime::now()).unwrap()
}

pub fn credential(authority: &Authority, subject: Subject) -> Credential {
    let key = PrivateKey::generate().unwrap();
    let request = key.signing_request().unwrap();
    let issued = authority.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
    Credential::new(key, &issued.chain_pem).unwrap()
}

pub fn edge_credential(authority: &Authority) -> Credential {
    credential(authority, Subject::Edge { id: "edge_1".into() })
}

/// A running member; it stops, with all its connections, when it is dropped.
pub struct Member {
    pub address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Member {
    pub async fn start<H, F>(authority: &Authority, handler: H) -> Member
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Member::start_at(authority, "127.0.0.1:0".parse().unwrap(), handler).await
    }

    pub async fn start_at<H, F>(authority: &Authority, address: SocketAddr, handler: H) -> Member
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let subject = Subject::Member { id: "1".into(), host_names: vec![], addresses: vec![] };
        let config =
            holdfast_identity::server_config(&credential(authority, subject), authority.certificate());
        let acceptor = TlsAcceptor::from(config.unwrap());
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            // Dropped with this task, and with it every connection.
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let (acceptor, handler) = (acceptor.clone(), handler.clone());
                connections.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| {
                        let answer = handler(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ =
                        http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Member { address, accepting }
    }

    pub fn endpoint(&self) -> Endpoint {
        self.address.into()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// An address at which nothing listens.
pub async fn dead_endpoint() -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().into()
}

pub fn json(status: u16, text: &str) -> Response<Body> {
    let body = Full::new(Bytes::copy_from_slice(text.as_bytes())).map_err(|never| match never {});
    Response::builder().status(status).header("content-type", "application/json").body(body.boxed()).unwrap()
}

pub fn problem(code: holdfast_model::Code) -> Response<Body> {
    let problem = holdfast_model::api::Problem {
        r#type: format!("urn:holdfast:problem:{code}"),
        title: code.to_string(),
        status: code.status(),
        detail: "Do something else.".into(),
        code: code.to_string(),
        request_id: "req_test".into(),
        retryable: code.retryable(),
        details: [("dimension".to_owned(), "apps".to_owned())].into(),
    };
    json(code.status(), &serde_json::to_string(&problem).unwrap())
}

/// The sending half of a streamed body: an error breaks the stream, dropping it ends it.
pub type Chunks = mpsc::Sender<Result<Vec<u8>, std::io::Error>>;

pub fn streamed() -> (Chunks, Response<Body>) {
    let (sender, receiver) = mpsc::channel(16);
    let stream = futures::stream::unfold(receiver, |mut receiver: mpsc::Receiver<_>| async move {
        receiver.recv().await.map(|item| (item, receiver))
    });
    let frames =
        stream.map(|item: Result<Vec<u8>, std::io::Error>| item.map(|bytes| Frame::data(Bytes::from(bytes))));
    (sender, Response::new(BodyExt::boxed(StreamBody::new(frames))))
}

pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(HANG_GUARD, future).await.expect("the test hangs")
}

pub fn shared<T>(value: T) -> Arc<std::sync::Mutex<T>> {
    Arc::new(std::sync::Mutex::new(value))
}
