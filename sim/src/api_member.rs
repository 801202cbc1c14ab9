//! A member with the API's service layer on it: the real router, gate, handlers and clockwork over the simulated
//! consensus. Clients' requests go into the router as HTTP requests, without the bytes of HTTP and TLS; agents come over
//! connections, by HTTP/2.

use std::sync::{Arc, Weak};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use holdfast_api::contacts::Contacts;
use holdfast_api::peers::Peers;
use holdfast_api::service::{SecretSeed, Service};
use holdfast_api::{caller::Peer, clockwork, gate::Connection, router, server};
use holdfast_identity::{Authority, client_config, server_name};
use holdfast_model::api::IDEMPOTENCY_HEADER;
use holdfast_model::{ClusterId, ClusterVersion, MemberId, Timestamp};
use holdfast_raft::Consensus;
use http_body_util::{BodyExt, Limited};
use tokio::sync::watch;
use tower::ServiceExt;

use crate::network::ApiPort;

/// The largest answer of the API that a client takes, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What all members of a cluster share.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) id: ClusterId,
    /// The version that it begins at.
    pub(crate) version: ClusterVersion,
    pub(crate) authority: Arc<Authority>,
}

/// A member at work.
#[derive(Clone)]
pub(crate) struct ApiMember {
    pub(crate) consensus: Arc<Consensus>,
    router: Router,
    /// Dropped with the process: only an orderly stop would say anything on it.
    _stop: Arc<watch::Sender<bool>>,
}

impl ApiMember {
    /// Puts the API on a member that has started, and starts its clockwork. Must run on the member's runtime.
    pub(crate) fn start(
        cluster: &Cluster,
        member: u64,
        consensus: Consensus,
        port: ApiPort,
    ) -> Result<ApiMember, String> {
        let dialling = client_config(cluster.authority.certificate(), None).map_err(|e| e.to_string())?;
        let name = server_name(&cluster.id.to_string()).map_err(|e| e.to_string())?;
        let consensus = Arc::new(consensus);
        let (stop, stopping) = watch::channel(false);
        let service = Arc::new(Service {
            cluster: cluster.id,
            member: MemberId(member),
            consensus: Arc::clone(&consensus),
            contacts: Arc::new(Contacts::new(MemberId(member))),
            exec: Arc::default(),
            seed: SecretSeed::of(&cluster.authority),
            // Sealing draws randomness that no seed gives.
            keys: None,
            registries: None,
            peers: Peers::new(dialling, name),
            authority: Arc::clone(&cluster.authority),
            stopping: stopping.clone(),
        });
        // Weak, because the consensus would hold itself: a process ends, and a simulated one must be freed.
        let taker: Weak<Service> = Arc::downgrade(&service);
        consensus.set_app_handler(Arc::new(move |_, message| {
            if let Some(service) = taker.upgrade() {
                clockwork::take_in(&service, &message);
            }
            Box::pin(async { Vec::new() })
        }));
        tokio::spawn(clockwork::run(Arc::clone(&service)));
        let router = router(service);
        tokio::spawn(serve_agents(port, router.clone(), stopping));
        Ok(ApiMember { consensus, router, _stop: Arc::new(stop) })
    }

    /// Sends a request. The answer's body may go on for as long as the member lives.
    pub(crate) async fn send(&self, request: Request<Body>) -> (StatusCode, Body) {
        let Ok(response) = self.router.clone().oneshot(request).await;
        (response.status(), response.into_body())
    }

    /// Sends a request and reads its answer to the end.
    pub(crate) async fn ask(&self, request: Request<Body>) -> Result<(StatusCode, Vec<u8>), String> {
        let (status, body) = self.send(request).await;
        let whole = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|e| e.to_string())?;
        Ok((status, whole.to_bytes().to_vec()))
    }
}

/// Serves the connections of agents. Who an agent is, its connection says, as a handshake would have proved.
async fn serve_agents(port: ApiPort, router: Router, stopping: watch::Receiver<bool>) {
    loop {
        let (identity, stream) = port.accept().await;
        let peer = identity.map(|identity| Peer { identity, not_after: Timestamp(u64::MAX) });
        let known = Connection { source: None, peer };
        tokio::spawn(server::serve_stream(stream, known, router.clone(), stopping.clone()));
    }
}

/// A request of the holder of a token.
pub(crate) fn request(
    method: &str,
    path: &str,
    token: &str,
    key: Option<&str>,
    json: Option<String>,
) -> Result<Request<Body>, String> {
    let mut builder =
        Request::builder().method(method).uri(path).header(header::AUTHORIZATION, format!("Bearer {token}"));
    if let Some(key) = key {
        builder = builder.header(IDEMPOTENCY_HEADER, key);
    }
    if json.is_some() {
        builder = builder.header(header::CONTENT_TYPE, "application/json");
    }
    builder.body(json.map_or_else(Body::empty, Body::from)).map_err(|e| e.to_string())
}
