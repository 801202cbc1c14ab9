//! A client of the OCI distribution protocol, for pulling only.
//!
//! HTTPS with the system's certificate authorities; plain HTTP only to a loopback registry (see
//! [`ImageRef::endpoint`]) and never after a redirect away from one. A bearer token, anonymous or of the reference's
//! login, is fetched when the registry asks for it and sent to that registry alone. Every await has a deadline. Bytes are handed on as they
//! come; whoever takes them compares them with their digest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Limits;
use super::auth::{Login, TOKEN_ANSWER_BYTES_MAX, Token, asks_for_basic, token_address};
use super::digest::Digest;
use super::error::{ImageError, ManifestError, RegistryError};
use super::manifest::{ACCEPT, Descriptor, Document, Manifest, RawConfig, choose};
use super::reference::ImageRef;
use super::retry::Backoff;

/// To connect, at most.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// From a request to its answer's first line, at most.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Between two pieces of a body, at most.
const STALL_TIME_MAX: Duration = Duration::from_secs(30);
/// For a whole resolution, retries included, at most.
const RESOLVE_TIME_MAX: Duration = Duration::from_secs(90);
/// Redirects of one request, at most.
const REDIRECTS_MAX: usize = 5;
/// Blobs fetched at once over all images, at most.
const BLOBS_AT_ONCE_MAX: usize = 6;
/// The status of an answer that says that there is no such rest.
const RANGE_NOT_SATISFIABLE: u16 = 416;
/// Tokens kept, at most: one for each repository.
const TOKENS_MAX: usize = 256;
/// Idle connections kept for each registry, at most, and for how long.
const IDLE_CONNECTIONS_MAX: usize = 4;
const IDLE_TIME_MAX: Duration = Duration::from_secs(30);

/// An image found in its registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The reference that was asked for, pinned to [`ResolvedImage::digest`].
    pub reference: ImageRef,
    /// The manifest of the one image for this machine's architecture.
    pub digest: Digest,
}

/// Pulls from registries. Cheap to share; one for each process.
pub struct RegistryClient {
    http: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    tokens: Mutex<HashMap<String, Token>>,
    blob_slots: Arc<Semaphore>,
    limits: Limits,
}

impl RegistryClient {
    /// A client with these limits. Without usable system certificates it still reaches loopback registries.
    pub fn new(limits: Limits) -> Result<RegistryClient, RegistryError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIME_MAX));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let http = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .pool_idle_timeout(IDLE_TIME_MAX)
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .build(connector);
        let blob_slots = Arc::new(Semaphore::new(BLOBS_AT_ONCE_MAX));
        Ok(RegistryClient { http, tokens: Mutex::new(HashMap::new()), blob_slots, limits })
    }

    /// Finds the one image that a reference means on this machine, and checks that it could be used: its limits,
    /// media types and platform. Takes 90 s at most.
    pub async fn resolve(&self, reference: &ImageRef) -> Result<ResolvedImage, ImageError> {
        timeout(RESOLVE_TIME_MAX, self.resolve_unbounded(reference)).await.map_err(|_| {
            ImageError::TooSlow {
                what: format!("resolving {reference}"),
                seconds: RESOLVE_TIME_MAX.as_secs(),
            }
        })?
    }

    async fn resolve_unbounded(&self, reference: &ImageRef) -> Result<ResolvedImage, ImageError> {
        let key = reference.manifest_key();
        let (mut digest, bytes) = self.manifest_bytes(reference, &key).await?;
        if let Some(expected) = reference.digest().filter(|expected| *expected != digest) {
            let host = reference.host().to_owned();
            return Err(RegistryError::WrongDigest { host, expected, actual: digest }.into());
        }
        let image = match Document::parse(digest, &bytes)? {
            Document::Image(image) => image,
            Document::Index(entries) => {
                digest = choose(digest, &entries)?;
                self.image_document(reference, digest).await?.1
            }
        };
        let manifest = image.check(digest, self.limits.layers_max, self.limits.compressed_bytes_max)?;
        self.config(reference, &manifest).await?;
        Ok(ResolvedImage { reference: reference.with_digest(digest), digest })
    }

    /// The manifest with this digest, checked against the limits, and its bytes.
    pub(crate) async fn manifest(&self, reference: &ImageRef, digest: Digest) -> Result<Bytes, ImageError> {
        Ok(self.image_document(reference, digest).await?.0)
    }

    /// An image's configuration.
    pub(crate) async fn config(
        &self,
        reference: &ImageRef,
        manifest: &Manifest,
    ) -> Result<(Bytes, RawConfig), ImageError> {
        let Descriptor { digest, size, .. } = manifest.config;
        let path = format!("blobs/{digest}");
        let bytes_max = size.min(self.limits.document_bytes_max);
        let bytes = self.document(reference, &path, "*/*", bytes_max).await?;
        self.expect_digest(reference, digest, &bytes)?;
        let config = RawConfig::parse(digest, &bytes, manifest.layers.len())?;
        Ok((bytes, config))
    }

    /// Waits for the right to fetch one blob.
    pub(crate) async fn blob_slot(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed; without a permit the fetch would still be correct.
        Arc::clone(&self.blob_slots).acquire_owned().await.ok()
    }

    /// Begins to fetch a blob from an offset on. One attempt: whoever resumes retries.
    pub(crate) async fn blob(
        &self,
        reference: &ImageRef,
        digest: Digest,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        let what = format!("blob {digest}");
        let not_the_rest = |what| RegistryError::Range { host: reference.host().to_owned(), what };
        let answer = match self.get(reference, &format!("blobs/{digest}"), &what, "*/*", offset).await {
            Err(RegistryError::Status { status: RANGE_NOT_SATISFIABLE, .. }) if offset > 0 => {
                return Err(not_the_rest(what));
            }
            answer => answer?,
        };
        let partial = answer.status() == StatusCode::PARTIAL_CONTENT;
        let starts_at = if partial { content_range_start(answer.headers()) } else { Some(0) };
        let Some(starts_at) = starts_at.filter(|starts_at| !partial || *starts_at == offset) else {
            return Err(not_the_rest(what));
        };
        let length = answer.body().size_hint().exact();
        Ok(BlobStream {
            body: answer.into_body(),
            host: reference.host().to_owned(),
            what,
            starts_at,
            length,
        })
    }

    async fn image_document(
        &self,
        reference: &ImageRef,
        digest: Digest,
    ) -> Result<(Bytes, super::manifest::RawManifest), ImageError> {
        let (actual, bytes) = self.manifest_bytes(reference, &digest.to_string()).await?;
        if actual != digest {
            let host = reference.host().to_owned();
            return Err(RegistryError::WrongDigest { host, expected: digest, actual }.into());
        }
        match Document::parse(digest, &bytes)? {
            Document::Image(image) => Ok((bytes, image)),
            Document::Index(_) => Err(ManifestError::IsIndex { digest }.into()),
        }
    }

    async fn manifest_bytes(
        &self,
        reference: &ImageRef,
        key: &str,
    ) -> Result<(Digest, Bytes), RegistryError> {
        let path = format!("manifests/{key}");
        let bytes = self.document(reference, &path, ACCEPT, self.limits.document_bytes_max).await?;
        Ok((Digest::of(&bytes), bytes))
    }

    fn expect_digest(
        &self,
        reference: &ImageRef,
        expected: Digest,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        match Digest::of(bytes) {
            actual if actual == expected => Ok(()),
            actual => Err(RegistryError::WrongDigest { host: reference.host().to_owned(), expected, actual }),
        }
    }

    /// Fetches a small document whole, with retries.
    async fn document(
        &self,
        reference: &ImageRef,
        path: &str,
        accept: &'static str,
        bytes_max: u64,
    ) -> Result<Bytes, RegistryError> {
        let what = format!("{}/{path}", reference.repository());
        let mut backoff = Backoff::default();
        loop {
            let attempt = async {
                let answer = self.get(reference, path, &what, accept, 0).await?;
                read_whole(answer.into_body(), reference.host(), &what, bytes_max).await
            };
            match attempt.await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => backoff.pause(error).await?,
            }
        }
    }

    /// One GET, through redirects and at most one challenge, to a successful answer.
    async fn get(
        &self,
        reference: &ImageRef,
        path: &str,
        what: &str,
        accept: &'static str,
        offset: u64,
    ) -> Result<Response<Incoming>, RegistryError> {
        let host = || reference.host().to_owned();
        let endpoint = reference.endpoint();
        let in_clear = endpoint.starts_with("http://");
        let origin = parse_uri(&format!("{endpoint}/v2/{}/{path}", reference.repository()), reference)?;
        let mut address = origin.clone();
        let (mut challenged, mut basic) = (false, None);
        for _ in 0..=REDIRECTS_MAX + 1 {
            let at_home = address.authority() == origin.authority() && address.scheme() == origin.scheme();
            let token = if at_home { self.token_for(reference) } else { None };
            let had_token = token.is_some();
            let basic_here = basic.filter(|_| at_home).map(Login::header);
            let token = token.map(|token| token.header());
            let authorization = basic_here.or(token.as_deref());
            let request = build_request(address.clone(), accept, offset, authorization, reference)?;
            let answer = self.send(request, reference.host()).await?;
            let status = answer.status();
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(answer),
                _ if status.is_redirection() => {
                    address = redirect_target(&address, answer.headers())
                        .filter(|target| is_allowed(target, in_clear))
                        .ok_or_else(|| RegistryError::Redirect { host: host(), what: what.to_owned() })?;
                }
                StatusCode::UNAUTHORIZED if at_home && !challenged => {
                    challenged = true;
                    let denied =
                        || RegistryError::Denied { host: host(), what: what.to_owned(), status: 401 };
                    let scope = format!("repository:{}:pull", reference.repository());
                    let mut challenges = answer.headers().get_all(header::WWW_AUTHENTICATE).iter();
                    if challenges.any(|c| c.to_str().is_ok_and(asks_for_basic)) {
                        basic = Some(reference.login().ok_or_else(denied)?);
                        continue;
                    }
                    let token_address = challenge_in(answer.headers(), &scope).ok_or_else(denied)?;
                    if had_token {
                        tracing::debug!(
                            host = reference.host(),
                            "a registry token was refused before its time"
                        );
                    }
                    self.fetch_token(reference, token_address, in_clear).await?;
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    let status = status.as_u16();
                    return Err(RegistryError::Denied { host: host(), what: what.to_owned(), status });
                }
                StatusCode::NOT_FOUND => {
                    return Err(RegistryError::NotFound { host: host(), what: what.to_owned() });
                }
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                    let status = status.as_u16();
                    return Err(RegistryError::Unavailable { host: host(), what: what.to_owned(), status });
                }
                _ if status.is_server_error() => {
                    let status = status.as_u16();
                    return Err(RegistryError::Unavailable { host: host(), what: what.to_owned(), status });
                }
                _ => {
                    let status = status.as_u16();
                    return Err(RegistryError::Status { host: host(), what: what.to_owned(), status });
                }
            }
        }
        Err(RegistryError::Redirect { host: host(), what: what.to_owned() })
    }

    async fn send(
        &self,
        request: Request<Empty<Bytes>>,
        host: &str,
    ) -> Result<Response<Incoming>, RegistryError> {
        match timeout(ANSWER_TIME_MAX, self.http.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                Err(RegistryError::Unreachable { host: host.to_owned(), source: Box::new(error) })
            }
            Err(_) => {
                Err(RegistryError::Silent { host: host.to_owned(), seconds: ANSWER_TIME_MAX.as_secs() })
            }
        }
    }

    fn token_for(&self, reference: &ImageRef) -> Option<Token> {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(&token_key(reference)).filter(|token| token.is_usable(Instant::now())).cloned()
    }

    async fn fetch_token(
        &self,
        reference: &ImageRef,
        address: Uri,
        in_clear: bool,
    ) -> Result<(), RegistryError> {
        let failed = || RegistryError::Token { host: reference.host().to_owned() };
        if !is_allowed(&address, in_clear) {
            return Err(failed());
        }
        let login = reference.login().map(Login::header);
        let request = build_request(address, "application/json", 0, login, reference)?;
        let answer = self.send(request, reference.host()).await?;
        if answer.status() != StatusCode::OK {
            return Err(failed());
        }
        let body =
            read_whole(answer.into_body(), reference.host(), "a token", TOKEN_ANSWER_BYTES_MAX).await?;
        let token = Token::parse(&body, Instant::now()).ok_or_else(failed)?;
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= TOKENS_MAX {
            tokens.clear();
        }
        tokens.insert(token_key(reference), token);
        Ok(())
    }
}

/// A blob's bytes as they come.
pub(crate) struct BlobStream {
    body: Incoming,
    host: String,
    what: String,
    starts_at: u64,
    length: Option<u64>,
}

impl BlobStream {
    /// The blob's offset of the first byte: the one asked for, or 0 where the registry cannot resume.
    pub(crate) fn starts_at(&self) -> u64 {
        self.starts_at
    }

    /// How many bytes the registry announced, if it did.
    pub(crate) fn length(&self) -> Option<u64> {
        self.length
    }

    /// The next piece, none at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        next_piece(&mut self.body, &self.host, &self.what).await
    }
}

async fn next_piece(body: &mut Incoming, host: &str, what: &str) -> Result<Option<Bytes>, RegistryError> {
    loop {
        let frame = match timeout(STALL_TIME_MAX, body.frame()).await {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) | Err(_) => {
                return Err(RegistryError::Interrupted { host: host.to_owned(), what: what.to_owned() });
            }
        };
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
}

async fn read_whole(
    mut body: Incoming,
    host: &str,
    what: &str,
    bytes_max: u64,
) -> Result<Bytes, RegistryError> {
    let mut whole = Vec::new();
    while let Some(piece) = next_piece(&mut body, host, what).await? {
        if whole.len() as u64 + piece.len() as u64 > bytes_max {
            return Err(RegistryError::TooLarge { host: host.to_owned(), what: what.to_owned(), bytes_max });
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.into())
}

/// TLS 1.3 with the system's certificate authorities.
fn tls_config() -> Result<rustls::ClientConfig, RegistryError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(RegistryError::Tls)?;
    Ok(match builder.clone().with_native_roots() {
        Ok(builder) => builder.with_no_client_auth(),
        Err(error) => {
            tracing::warn!(%error, "no system certificates; install ca-certificates to use HTTPS registries");
            builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
        }
    })
}

fn token_key(reference: &ImageRef) -> String {
    // A token is the power of the login that it was given for.
    let login =
        reference.login().map(|login| data_encoding::HEXLOWER.encode(&login.id())).unwrap_or_default();
    format!("{}/{}#{login}", reference.host(), reference.repository())
}

fn parse_uri(text: &str, reference: &ImageRef) -> Result<Uri, RegistryError> {
    text.parse().map_err(|_| RegistryError::Url { host: reference.host().to_owned() })
}

fn build_request(
    address: Uri,
    accept: &'static str,
    offset: u64,
    authorization: Option<&str>,
    reference: &ImageRef,
) -> Result<Request<Empty<Bytes>>, RegistryError> {
    let mut request = Request::get(address)
        .header(header::ACCEPT, accept)
        .header(header::USER_AGENT, concat!("holdfast/", env!("CARGO_PKG_VERSION")));
    if offset > 0 {
        request = request.header(header::RANGE, format!("bytes={offset}-"));
    }
    if let Some(authorization) = authorization
        && let Ok(mut value) = HeaderValue::from_str(authorization)
    {
        value.set_sensitive(true);
        request = request.header(header::AUTHORIZATION, value);
    }
    request.body(Empty::new()).map_err(|_| RegistryError::Url { host: reference.host().to_owned() })
}

/// HTTPS always; HTTP only to loopback, and only for a registry that is itself there.
fn is_allowed(address: &Uri, registry_in_clear: bool) -> bool {
    let host = address.host().unwrap_or("");
    match address.scheme_str() {
        Some("https") => !host.is_empty(),
        Some("http") => registry_in_clear && super::reference::is_loopback(host),
        _ => false,
    }
}

/// Where an answer sends us: an absolute address, or a path on the same host.
fn redirect_target(from: &Uri, headers: &HeaderMap) -> Option<Uri> {
    let location = headers.get(header::LOCATION)?.to_str().ok()?;
    if location.starts_with('/') && !location.starts_with("//") {
        let (scheme, authority) = (from.scheme_str()?, from.authority()?);
        return format!("{scheme}://{authority}{location}").parse().ok();
    }
    location.parse().ok()
}

fn challenge_in(headers: &HeaderMap, scope: &str) -> Option<Uri> {
    headers
        .get_all(header::WWW_AUTHENTICATE)
        .iter()
        .filter_map(|challenge| challenge.to_str().ok())
        .find_map(|challenge| token_address(challenge, scope))
}

/// The first offset of `Content-Range: bytes FIRST-LAST/SIZE`.
fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_encrypted() {
        let check = |address: &str, in_clear| is_allowed(&address.parse().unwrap(), in_clear);
        assert!(check("https://cdn.example/x", false));
        assert!(check("https://cdn.example/x", true));
        assert!(check("http://127.0.0.1:5000/x", true));
        assert!(!check("http://127.0.0.1:5000/x", false));
        assert!(!check("http://cdn.example/x", true));
        assert!(!check("/x", true));
    }

    #[test]
    fn redirect_targets_are_absolute_or_on_the_same_host() {
        let from: Uri = "https://r.example:8443/v2/a/blobs/b".parse().unwrap();
        let target = |location: &str| {
            let headers =
                HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_str(location).unwrap())]);
            redirect_target(&from, &headers).map(|uri| uri.to_string())
        };
        assert_eq!(target("/data/b?x=1").unwrap(), "https://r.example:8443/data/b?x=1");
        assert_eq!(target("https://cdn.example/b").unwrap(), "https://cdn.example/b");
        assert!(target("//evil.example/b").is_none_or(|uri| !is_allowed(&uri.parse().unwrap(), true)));
        assert!(redirect_target(&from, &HeaderMap::new()).is_none());
    }
}
