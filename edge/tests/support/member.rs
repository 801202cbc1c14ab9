//! A control-plane member as an edge sees one: it streams frames and takes reports, over TLS and HTTP/2.

use super::world::cluster;
use bytes::Bytes;
use futures::StreamExt;
use holdfast_client::{Client, frames};
use holdfast_identity::{Authority, CERTIFICATE_VALIDITY, Credential, PrivateKey, Subject, server_config};
use holdfast_model::agent::{EdgeRoute, FOLLOW_PATH, Frame, REPORT_PATH, Report};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::SystemTime;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// The cluster's authority, and how an edge comes to trust and be trusted.
pub(crate) struct Trust(Authority);

impl Trust {
    pub(crate) fn new() -> Self {
        Self(Authority::create(&cluster().to_string(), SystemTime::now()).unwrap())
    }

    /// A client with an edge's certificate.
    pub(crate) fn edge_client(&self, member: SocketAddr) -> Client {
        let credential = self.credential(Subject::Edge { id: "edge_1".to_owned() });
        Client::with_credential(vec![member.into()], self.0.certificate(), &credential).unwrap()
    }

    fn credential(&self, subject: Subject) -> Credential {
        let key = PrivateKey::generate().unwrap();
        let request = key.signing_request().unwrap();
        let issued = self.0.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
        Credential::new(key, &issued.chain_pem).unwrap()
    }
}

/// A member that runs; dropped, it is gone with all its connections.
pub(crate) struct Member {
    /// The newest report.
    pub(crate) reports: watch::Receiver<Option<Report>>,
    accepting: JoinHandle<()>,
}

impl Member {
    /// Starts one at `address` that answers every follower with these frames and then heartbeats no more.
    pub(crate) async fn start(trust: &Trust, address: SocketAddr, frames: Vec<Frame<EdgeRoute>>) -> Self {
        let subject = Subject::Member { id: "1".to_owned(), host_names: vec![], addresses: vec![] };
        let config = server_config(&trust.credential(subject), trust.0.certificate()).unwrap();
        let acceptor = TlsAcceptor::from(config);
        let listener = TcpListener::bind(address).await.unwrap();
        let stream: Bytes = frames.iter().flat_map(|frame| frames::encode(frame).unwrap()).collect();
        let (reported, reports) = watch::channel(None);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, stream, reported) = (acceptor.clone(), stream.clone(), reported.clone());
                connections.spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let service =
                        service_fn(move |request| answer(request, stream.clone(), reported.clone()));
                    let mut http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = http.timer(TokioTimer::new()).serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        Self { reports, accepting }
    }
}

impl Member {
    /// Ends it; its address is free afterwards.
    pub(crate) async fn stop(mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

type Body = BoxBody<Bytes, Infallible>;

async fn answer(
    request: Request<Incoming>,
    stream: Bytes,
    reported: watch::Sender<Option<Report>>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    if path == FOLLOW_PATH {
        let first = futures::stream::iter([Ok(hyper::body::Frame::data(stream))]);
        return Ok(Response::new(BodyExt::boxed(StreamBody::new(first.chain(futures::stream::pending())))));
    }
    assert_eq!(path, REPORT_PATH);
    let body = request.into_body().collect().await.unwrap().to_bytes();
    reported.send_replace(Some(serde_json::from_slice(&body).unwrap()));
    Ok(Response::new(Full::new(Bytes::from_static(b"{}")).boxed()))
}
