//! The way in: every request gets an id and a deadline, is admitted or refused by its endpoint's declaration, and
//! leaves with a problem's body when it was refused.

use crate::caller::{Claims, Peer, admit, bearer_digest};
use crate::endpoint::{Endpoint, Pace};
use crate::problem::{Refusal, finish};
use crate::service::{Service, fresh_request_id, idempotency_key, now};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use holdfast_model::api::{IDEMPOTENCY_HEADER, REQUEST_ID_HEADER};
use holdfast_model::{Code, RequestId};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long a request with an answer may take.
pub const ANSWER_MS_MAX: u64 = 30_000;

/// What the listener knows of a connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The peer's address.
    pub source: Option<IpAddr>,
    /// Whom the peer's verified certificate names, if it showed one.
    pub peer: Option<Peer>,
}

/// The declarations by path.
pub struct Gate {
    service: Arc<Service>,
    endpoints: HashMap<&'static str, Vec<Arc<Endpoint>>>,
}

impl Gate {
    /// A gate for these endpoints.
    pub fn new(service: Arc<Service>, endpoints: &[Endpoint]) -> Arc<Self> {
        let mut by_path: HashMap<_, Vec<_>> = HashMap::new();
        for endpoint in endpoints {
            by_path.entry(endpoint.path).or_default().push(Arc::new(endpoint.clone()));
        }
        Arc::new(Self { service, endpoints: by_path })
    }

    fn find(&self, path: &str, method: &Method) -> Option<Arc<Endpoint>> {
        self.endpoints.get(path)?.iter().find(|endpoint| endpoint.method == *method).cloned()
    }
}

/// Around everything: names the request and writes refusals.
pub async fn name(mut request: Request, next: Next) -> Response {
    let id = fresh_request_id(now());
    request.extensions_mut().insert(id);
    let text = id.to_string();
    let mut response = finish(next.run(request).await, &text);
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert(REQUEST_ID_HEADER, value);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Around each endpoint: admits the caller, or refuses.
pub async fn guard(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>();
    let found = path.and_then(|path| gate.find(path.as_str(), request.method()));
    // No declaration, no entry: an endpoint that nobody declared is one that nobody may call.
    let Some(endpoint) = found else { return method_not_allowed().await.into_response() };
    let claims = match claims(&request) {
        Ok(claims) => claims,
        Err(refusal) => return refusal.into_response(),
    };
    let caller = match admit(&gate.service, endpoint.need, &claims).await {
        Ok(caller) => caller,
        Err(refusal) => return refusal.into_response(),
    };
    request.extensions_mut().insert(caller);
    request.extensions_mut().insert(Arc::clone(&endpoint));
    let answer = next.run(request);
    match endpoint.pace {
        Pace::Stream => answer.await,
        Pace::Answer => tokio::time::timeout(Duration::from_millis(ANSWER_MS_MAX), answer).await.unwrap_or_else(|_| {
            let detail = "The request took too long; whether it was carried out is unknown. Repeat it with the same \
                          Idempotency-Key.";
            Refusal::new(Code::Timeout, detail).into_response()
        }),
    }
}

fn claims(request: &Request) -> Result<Claims, Refusal> {
    let connection = request.extensions().get::<Connection>();
    let token =
        request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).and_then(bearer_digest);
    let key = request.headers().get(IDEMPOTENCY_HEADER).filter(|_| request.method() != Method::GET);
    let time = now();
    Ok(Claims {
        peer: connection.and_then(|c| c.peer.clone()),
        source: connection.and_then(|c| c.source),
        token,
        request_id: request
            .extensions()
            .get::<RequestId>()
            .copied()
            .unwrap_or_else(|| fresh_request_id(time)),
        idempotency_key: key.map(|k| idempotency_key(k.as_bytes())).transpose()?,
        now: time,
    })
}

/// For paths that do not exist.
pub async fn nothing_here() -> Refusal {
    Refusal::new(Code::NotFound, "There is nothing at this path; see /v1/openapi.json for what there is.")
}

/// For paths that exist with other methods.
pub async fn method_not_allowed() -> Refusal {
    Refusal::new(Code::MethodNotAllowed, "This path does not take this method; see /v1/openapi.json.")
}
