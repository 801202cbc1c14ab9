//! One real member – consensus, log and state on disk – and its router, called without a socket.

pub(crate) mod scene;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use holdfast_api::caller::Peer;
use holdfast_api::contacts::Contacts;
use holdfast_api::gate::Connection;
use holdfast_api::peers::Peers;
use holdfast_api::service::{RequestInfo, SecretSeed, Service};
use holdfast_identity::{
    Authority, CERTIFICATE_VALIDITY, Credential, KeyRing, PeerIdentity, PrivateKey, Token,
    TokenKind as SecretKind, client_config, mutual_client_config, mutual_server_config, server_config,
    server_name,
};
use holdfast_model::command::{NewCluster, NewMember, NewToken};
use holdfast_model::resource::{Member, TokenKind};
use holdfast_model::{ClusterId, ClusterVersion, Digest, Incarnation, MemberId, Scope, Timestamp};
use holdfast_raft::transport::RaftTls;
use holdfast_raft::{Consensus, ConsensusConfig, MemberIdentity, MemberNode};
use http_body_util::BodyExt;
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt as _;

/// Where every request comes from (RFC 5737).
pub(crate) const SOURCE: [u8; 4] = [192, 0, 2, 7];

/// Nothing here takes this long; a test that hangs ends.
pub(crate) const HANG: Duration = Duration::from_secs(30);

pub(crate) struct Rig {
    pub(crate) service: Arc<Service>,
    pub(crate) router: Router,
    pub(crate) operator: String,
    /// The member's own certificate.
    credential: Credential,
    _stop: watch::Sender<bool>,
    /// The member's data.
    pub(crate) folder: tempfile::TempDir,
}

pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) body: Value,
    pub(crate) text: String,
    pub(crate) request_id: String,
}

impl Rig {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cluster = ClusterId::from_bits(7 << 80 | 1);
        let authority = Authority::create(&cluster.to_string(), SystemTime::now()).unwrap();
        let member = Member {
            id: MemberId(1),
            name: "alpha".parse().unwrap(),
            raft_addr: "127.0.0.1:0".into(),
            api_addr: "127.0.0.1:0".into(),
            removed: false,
            created_at: Timestamp(1),
        };
        let key = PrivateKey::generate().unwrap();
        let subject = holdfast_api::member_subject(&member);
        let request = key.signing_request().unwrap();
        let issued = authority.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
        let credential = Credential::new(key, &issued.chain_pem).unwrap();
        let ca = authority.certificate();
        let tls = RaftTls::new(
            &cluster.to_string(),
            mutual_server_config(&credential, ca).unwrap(),
            mutual_client_config(&credential, ca).unwrap(),
        );
        let identity = MemberIdentity { cluster: cluster.to_string(), member: MemberId(1), incarnation: 1 };
        Consensus::prepare(folder.path(), &identity).unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = ConsensusConfig::new(MemberId(1), folder.path().to_owned(), listen, Arc::new(tls));
        let consensus = Arc::new(Consensus::start(config).await.unwrap());
        let node =
            MemberNode { raft_addr: consensus.raft_addr().to_string(), api_addr: "127.0.0.1:1".into() };
        consensus.bootstrap(node).await.unwrap();
        let (stop, stopping) = watch::channel(false);
        let peers = Peers::new(
            client_config(ca, Some(&credential)).unwrap(),
            server_name(&cluster.to_string()).unwrap(),
        );
        let service = Arc::new(Service {
            cluster,
            member: MemberId(1),
            consensus,
            contacts: Arc::new(Contacts::new(MemberId(1))),
            exec: Arc::default(),
            seed: SecretSeed::of(&authority),
            keys: Some(Arc::new(KeyRing::open(&folder.path().join("sealing.keys")).unwrap())),
            registries: None,
            peers,
            authority: Arc::new(authority),
            stopping,
        });
        let operator = Token::generate(SecretKind::Operator).unwrap();
        let new = NewCluster {
            cluster,
            incarnation: Incarnation(1),
            member: NewMember { name: member.name, raft_addr: member.raft_addr, api_addr: member.api_addr },
            operator: NewToken {
                name: "first".parse().unwrap(),
                digest: Digest(*operator.digest().as_bytes()),
                kind: TokenKind::Operator,
                scopes: Scope::ALL.iter().copied().collect(),
                ttl_ms: 3_600_000,
            },
        };
        service.propose(&RequestInfo::of_member(MemberId(1)), new.at(ClusterVersion::NEWEST)).await.unwrap();
        let router = holdfast_api::router(Arc::clone(&service));
        Self {
            service,
            router,
            operator: operator.reveal().as_str().to_owned(),
            credential,
            _stop: stop,
            folder,
        }
    }

    /// Another member's API on loopback, as far as one process can have it: contacts and streams of its own over the
    /// same state. Answers its router and its address.
    pub(crate) async fn second_api(&self) -> (Router, String) {
        let (service, ca) = (&self.service, self.service.authority.certificate());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let peers = Peers::new(
            client_config(ca, Some(&self.credential)).unwrap(),
            server_name(&service.cluster.to_string()).unwrap(),
        );
        let router = holdfast_api::router(Arc::new(Service {
            cluster: service.cluster,
            member: MemberId(2),
            consensus: Arc::clone(&service.consensus),
            contacts: Arc::new(Contacts::new(MemberId(2))),
            exec: Arc::default(),
            seed: SecretSeed::of(&service.authority),
            keys: service.keys.clone(),
            registries: None,
            peers,
            authority: Arc::clone(&service.authority),
            stopping: service.stopping.clone(),
        }));
        let tls = Arc::new(ArcSwap::new(server_config(&self.credential, ca).unwrap()));
        let stopping = service.stopping.clone();
        tokio::spawn(holdfast_api::server::serve(listener, tls, router.clone(), stopping));
        (router, address)
    }

    /// A request as the listener would hand it on.
    pub(crate) fn request(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: Option<&str>,
    ) -> Request<Body> {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let mut request = request.body(Body::from(body.unwrap_or_default().to_owned())).unwrap();
        request.extensions_mut().insert(Connection { source: Some(SOURCE.into()), peer: None });
        request
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Reply {
        let answer = tokio::time::timeout(HANG, self.router.clone().oneshot(request)).await.unwrap().unwrap();
        let status = answer.status();
        let request_id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
        let bytes =
            tokio::time::timeout(HANG, answer.into_body().collect()).await.unwrap().unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Reply { status, body: serde_json::from_str(&text).unwrap_or(Value::Null), text, request_id }
    }

    pub(crate) async fn get(&self, path: &str, token: &str) -> Reply {
        self.send(self.request(Method::GET, path, Some(token), None)).await
    }

    pub(crate) async fn post(&self, path: &str, token: &str, body: Value) -> Reply {
        self.send(self.request(Method::POST, path, Some(token), Some(&body.to_string()))).await
    }

    /// Makes something and answers its id.
    pub(crate) async fn made(&self, path: &str, body: Value) -> String {
        let reply = self.post(path, &self.operator, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{path}: {}", reply.text);
        reply.body["item"]["id"].as_str().unwrap().to_owned()
    }

    /// An org's token with these scopes.
    pub(crate) async fn tenant(&self, org: &str, role: &str) -> String {
        let body = serde_json::json!({"name": "t", "org": org, "role": role, "ttl_s": 3600});
        let reply = self.post("/v1/tokens", &self.operator, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text);
        reply.body["item"]["secret"].as_str().unwrap().to_owned()
    }

    /// A request by somebody with this certificate.
    pub(crate) fn by(&self, request: Request<Body>, peer: PeerIdentity) -> Request<Body> {
        self.by_until(request, peer, Timestamp(u64::MAX))
    }

    /// A request by somebody with this certificate, which ends then.
    pub(crate) fn by_until(
        &self,
        mut request: Request<Body>,
        identity: PeerIdentity,
        not_after: Timestamp,
    ) -> Request<Body> {
        let peer = Peer { identity, not_after };
        request.extensions_mut().insert(Connection { source: Some(SOURCE.into()), peer: Some(peer) });
        request
    }
}
