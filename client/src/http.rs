//! A client of the HTTP API over several members: it goes on with another when one does not answer.
//!
//! A request is tried until it has an answer that is final, its deadline passes or its attempts are used up. Every
//! mutation carries an `Idempotency-Key` that stays the same over all attempts, so that a retry never does a thing
//! twice (I4). The bearer token is marked sensitive and never logged (I10).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_identity::{CaCertificate, Credential, Fingerprint, Token};
use holdfast_model::api::{IDEMPOTENCY_HEADER, NDJSON_MEDIA_TYPE, REQUEST_ID_HEADER};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Response};
use rustls_pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::connection::{Line, Security, SendBody};
use crate::dial::Dial;
use crate::endpoint::{ENDPOINTS_MAX, Endpoint};
use crate::error::{ApiError, ClientError, TransportError};
use crate::lines::Lines;

/// Default bound on a request with all its attempts.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Longest that one attempt waits for an answer.
pub const ATTEMPT_MAX: Duration = Duration::from_secs(10);
/// Most attempts at one request.
pub const ATTEMPTS_MAX: u32 = 64;
/// Largest answer that is read whole, in bytes.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Longest wait that a server's `Retry-After` may ask for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(10);

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const AGENT: &str = concat!("holdfast/", env!("CARGO_PKG_VERSION"));
const JSON: &str = "application/json";

/// A client of one cluster. Clones share connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    deadline: Duration,
}

struct Shared {
    lines: Vec<Line>,
    security: Mutex<Security>,
    authorization: Option<HeaderValue>,
    /// The line that answered last.
    preferred: AtomicUsize,
}

/// One request, as every attempt sends it.
struct Outgoing<'a> {
    method: Method,
    path: &'a str,
    accept: &'static str,
    body: Option<Bytes>,
    key: Option<String>,
}

impl Client {
    /// A client for people, scripts and members: it trusts `ca` alone and carries `token` if there is one.
    ///
    /// # Errors
    /// [`ClientError`] when there is no endpoint or TLS cannot be set up.
    pub fn new(
        endpoints: Vec<Endpoint>,
        ca: &CaCertificate,
        token: Option<&Token>,
    ) -> Result<Client, ClientError> {
        let config = holdfast_identity::client_config(ca, None)?;
        let name = holdfast_identity::server_name(ca.cluster())?;
        Client::with(endpoints, Security::over_tls(config, name, Some(ca.clone())), token)
    }

    /// A client for an agent: it proves itself with its certificate.
    ///
    /// # Errors
    /// [`ClientError`] when there is no endpoint or TLS cannot be set up.
    pub fn with_credential(
        endpoints: Vec<Endpoint>,
        ca: &CaCertificate,
        credential: &Credential,
    ) -> Result<Client, ClientError> {
        let config = holdfast_identity::client_config(ca, Some(credential))?;
        let name = holdfast_identity::server_name(ca.cluster())?;
        Client::with(endpoints, Security::over_tls(config, name, Some(ca.clone())), None)
    }

    /// A client for first contact: it trusts the cluster whose authority has this fingerprint, whatever its name.
    ///
    /// # Errors
    /// [`ClientError`] when there is no endpoint or TLS cannot be set up.
    pub fn first_contact(endpoints: Vec<Endpoint>, pin: Fingerprint) -> Result<Client, ClientError> {
        let config = holdfast_identity::pinned_client_config(pin)?;
        // TLS wants a name; the pin is what is verified.
        let name = holdfast_identity::server_name("first-contact")?;
        Client::with(endpoints, Security::over_tls(config, name, None), None)
    }

    /// A client whose connections `dial` opens: for simulations, and for nothing in the product. It carries no token; whom
    /// it is taken for is what the dialler proves.
    ///
    /// # Errors
    /// [`ClientError`] when there is no endpoint or the cluster's id cannot be a name.
    pub fn with_dial(
        endpoints: Vec<Endpoint>,
        ca: &CaCertificate,
        dial: Arc<dyn Dial>,
    ) -> Result<Client, ClientError> {
        let name = holdfast_identity::server_name(ca.cluster())?;
        Client::with(endpoints, Security { dial, name, ca: Some(ca.clone()) }, None)
    }

    fn with(
        endpoints: Vec<Endpoint>,
        security: Security,
        token: Option<&Token>,
    ) -> Result<Client, ClientError> {
        if endpoints.is_empty() {
            return Err(ClientError::NoEndpoints);
        }
        let authorization = token.map(bearer).transpose()?;
        let lines: Vec<_> = endpoints.into_iter().take(ENDPOINTS_MAX).map(Line::new).collect();
        // Clients spread over the members instead of all beginning with the first.
        let preferred = AtomicUsize::new(rand::random_range(0..lines.len()));
        let shared = Shared { lines, security: Mutex::new(security), authorization, preferred };
        Ok(Client { shared: Arc::new(shared), deadline: DEADLINE })
    }

    /// The same client with another bound on each request.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Client {
        Client { shared: Arc::clone(&self.shared), deadline }
    }

    /// Uses a renewed certificate for connections from now on, in every clone.
    ///
    /// # Errors
    /// [`ClientError::Tls`] when TLS cannot be set up with it; the old one stays in use.
    pub fn renew(&self, ca: &CaCertificate, credential: &Credential) -> Result<(), ClientError> {
        let config = holdfast_identity::client_config(ca, Some(credential))?;
        let name: ServerName<'static> = holdfast_identity::server_name(ca.cluster())?;
        *self.shared.security.lock().unwrap_or_else(PoisonError::into_inner) =
            Security::over_tls(config, name, Some(ca.clone()));
        self.shared.lines.iter().for_each(Line::hang_up);
        Ok(())
    }

    /// The authority that it trusts; `None` at first contact.
    pub(crate) fn authority(&self) -> Option<CaCertificate> {
        self.shared.security.lock().unwrap_or_else(PoisonError::into_inner).ca.clone()
    }

    /// Reads a resource. `path` begins with `/` and may have a query.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R, ClientError> {
        self.whole(Outgoing { method: Method::GET, path, accept: JSON, body: None, key: None }).await
    }

    /// Sends a mutation under a fresh idempotency key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<R, ClientError> {
        self.post_with_key(path, body, fresh_key()).await
    }

    /// Sends a mutation under the caller's idempotency key, so that it may be sent again by another process.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_with_key<B: Serialize, R: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        key: String,
    ) -> Result<R, ClientError> {
        let body = Some(encode(body)?);
        self.whole(Outgoing { method: Method::POST, path, accept: JSON, body, key: Some(key) }).await
    }

    /// Deletes a resource under a fresh idempotency key.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<R: DeserializeOwned>(&self, path: &str) -> Result<R, ClientError> {
        let key = Some(fresh_key());
        self.whole(Outgoing { method: Method::DELETE, path, accept: JSON, body: None, key }).await
    }

    /// Opens a stream of one JSON value a line. It ends when the server ends it; to go on after a break the caller
    /// opens another from where it got to.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn lines<R: DeserializeOwned>(&self, path: &str) -> Result<Lines<R>, ClientError> {
        let request =
            Outgoing { method: Method::GET, path, accept: NDJSON_MEDIA_TYPE, body: None, key: None };
        let (index, response) = self.answered(&request, Instant::now() + self.deadline).await?;
        Ok(Lines::new(response.into_body(), self.shared.lines[index].endpoint().to_string()))
    }

    /// How many endpoints there are.
    pub(crate) fn endpoints(&self) -> usize {
        self.shared.lines.len()
    }

    /// The endpoint with this index, for logs.
    pub(crate) fn endpoint(&self, index: usize) -> &Endpoint {
        self.shared.lines[index % self.shared.lines.len()].endpoint()
    }

    /// The index of the endpoint that answered last.
    pub(crate) fn preferred(&self) -> usize {
        self.shared.preferred.load(Ordering::Relaxed)
    }

    /// Opens a stream at one endpoint, without retries: following chooses its endpoints itself.
    pub(crate) async fn open_at(
        &self,
        index: usize,
        path: &str,
        accept: &'static str,
    ) -> Result<Incoming, ClientError> {
        let request = Outgoing { method: Method::GET, path, accept, body: None, key: None };
        let response = self.once(index, &request, ATTEMPT_MAX).await?;
        Ok(response.into_body())
    }

    /// Posts to one endpoint, without retries: for what only that member waits for.
    pub(crate) async fn post_at<B: Serialize>(
        &self,
        index: usize,
        path: &str,
        body: &B,
    ) -> Result<(), ClientError> {
        let body = Some(encode(body)?);
        let request = Outgoing { method: Method::POST, path, accept: JSON, body, key: Some(fresh_key()) };
        self.once(index, &request, ATTEMPT_MAX).await.map(drop)
    }

    /// One attempt at one endpoint; a refusal is an error.
    async fn once(
        &self,
        index: usize,
        request: &Outgoing<'_>,
        within: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let line = &self.shared.lines[index % self.shared.lines.len()];
        let security = self.shared.security.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let built = self.build(request, &security.name)?;
        self.head_of(line, &security, built, within).await
    }

    /// Sends a request to one endpoint, and reads what it says if that is no success.
    async fn head_of(
        &self,
        line: &Line,
        security: &Security,
        built: Request<SendBody>,
        within: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let deadline = Instant::now() + within;
        let response = line
            .send(security, built, within)
            .await
            .map_err(|source| ClientError::Unreachable { attempts: 1, source })?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let retry_after = response.headers().get(RETRY_AFTER).cloned();
        let request_id =
            response.headers().get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok()).map(str::to_owned);
        let body =
            tokio::time::timeout_at(deadline, read(line, response.into_body())).await.map_err(|_| {
                let endpoint = line.endpoint().to_string();
                ClientError::Unreachable {
                    attempts: 1,
                    source: TransportError::Timeout { endpoint, after: within },
                }
            })??;
        let mut error = ApiError::decode(status, request_id.as_deref(), &body);
        if let Some(seconds) = retry_after.as_ref().and_then(|value| value.to_str().ok()) {
            error.details.entry(RETRY_AFTER.as_str().to_owned()).or_insert_with(|| seconds.to_owned());
        }
        Err(error.into())
    }

    /// The line of the endpoint that answered last.
    pub(crate) fn preferred_line(&self) -> &Line {
        &self.shared.lines[self.preferred() % self.shared.lines.len()]
    }

    /// Posts a body that goes on while the answer is read, to one endpoint and once.
    pub(crate) async fn stream_at(
        &self,
        line: &Line,
        path: &str,
        media_type: &'static str,
        body: SendBody,
        within: Duration,
    ) -> Result<Response<Incoming>, ClientError> {
        let security = self.shared.security.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let head = Outgoing { method: Method::POST, path, accept: media_type, body: None, key: None };
        let (mut parts, _) = self.build(&head, &security.name)?.into_parts();
        parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        self.head_of(line, &security, Request::from_parts(parts, body), within).await
    }

    /// Attempts until an answer is final: the index of the line, and the head of a success.
    async fn answered(
        &self,
        request: &Outgoing<'_>,
        deadline: Instant,
    ) -> Result<(usize, Response<Incoming>), ClientError> {
        let mut backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
        let mut index = self.preferred();
        let mut attempts = 0;
        loop {
            attempts += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match self.once(index, request, left.min(ATTEMPT_MAX)).await {
                Ok(response) => {
                    self.shared.preferred.store(index, Ordering::Relaxed);
                    return Ok((index, response));
                }
                Err(error) if error.is_retryable() => error,
                Err(error) => return Err(error),
            };
            // Around all the endpoints at once while they are merely gone; then more slowly.
            let gone = matches!(error, ClientError::Unreachable { .. });
            let around = (attempts as usize).is_multiple_of(self.endpoints());
            let wait = if gone && !around { Duration::ZERO } else { backoff.next().max(asked_wait(&error)) };
            if attempts >= ATTEMPTS_MAX || Instant::now() + wait >= deadline {
                return Err(match error {
                    ClientError::Unreachable { source, .. } => ClientError::Unreachable { attempts, source },
                    other => other,
                });
            }
            tokio::time::sleep(wait).await;
            index = (index + 1) % self.endpoints();
        }
    }

    /// A request whose answer is read whole. An answer that breaks off is asked for again.
    async fn whole<R: DeserializeOwned>(&self, request: Outgoing<'_>) -> Result<R, ClientError> {
        let deadline = Instant::now() + self.deadline;
        let mut breaks = 0;
        loop {
            let (index, response) = self.answered(&request, deadline).await?;
            let line = &self.shared.lines[index];
            let body = tokio::time::timeout_at(deadline, read(line, response.into_body()))
                .await
                .unwrap_or_else(|_| {
                    let endpoint = line.endpoint().to_string();
                    let source = TransportError::Timeout { endpoint, after: self.deadline };
                    Err(ClientError::Unreachable { attempts: 1, source })
                });
            match body {
                Ok(body) if body.is_empty() => {
                    return serde_json::from_slice(b"null").map_err(ClientError::Answer);
                }
                Ok(body) => return serde_json::from_slice(&body).map_err(ClientError::Answer),
                Err(error)
                    if error.is_retryable() && breaks < self.endpoints() && Instant::now() < deadline =>
                {
                    line.hang_up();
                    breaks += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn build(&self, request: &Outgoing<'_>, name: &ServerName<'_>) -> Result<Request<SendBody>, ClientError> {
        let uri = format!("https://{}{}", name.to_str(), request.path);
        let mut builder = Request::builder()
            .method(request.method.clone())
            .uri(uri)
            .header(USER_AGENT, AGENT)
            .header(ACCEPT, request.accept);
        if let Some(authorization) = &self.shared.authorization {
            builder = builder.header(AUTHORIZATION, authorization.clone());
        }
        if let Some(key) = &request.key {
            builder = builder.header(IDEMPOTENCY_HEADER, key.as_str());
        }
        if request.body.is_some() {
            builder = builder.header(CONTENT_TYPE, JSON);
        }
        let body = Full::new(request.body.clone().unwrap_or_default()).boxed_unsync();
        builder.body(body).map_err(ClientError::Request)
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> = self.shared.lines.iter().map(|line| line.endpoint().to_string()).collect();
        f.debug_struct("Client").field("endpoints", &endpoints).finish_non_exhaustive()
    }
}

/// A fresh idempotency key: 128 random bits.
pub fn fresh_key() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn bearer(token: &Token) -> Result<HeaderValue, ClientError> {
    let text = token.reveal();
    let mut value = HeaderValue::from_str(&format!("Bearer {}", text.as_str()))
        .map_err(|error| ClientError::Request(error.into()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn encode<B: Serialize>(body: &B) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body).map(Bytes::from).map_err(ClientError::Encode)
}

/// How long the server asked to wait. Only a rate limit is obeyed: another member may well answer at once otherwise.
fn asked_wait(error: &ClientError) -> Duration {
    let ClientError::Api(api) = error else { return Duration::ZERO };
    if api.status != 429 {
        return Duration::ZERO;
    }
    let seconds = api.details.get(RETRY_AFTER.as_str()).and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    Duration::from_secs(seconds).min(RETRY_AFTER_MAX)
}

async fn read(line: &Line, body: Incoming) -> Result<Bytes, ClientError> {
    match Limited::new(body, ANSWER_BYTES_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(source) => Err(ClientError::Unreachable { attempts: 1, source: line.broken(*source) }),
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>());
                Err(ClientError::TooLarge { limit: ANSWER_BYTES_MAX })
            }
        },
    }
}
