//! What a handler gets: a [`Call`] whose path, query and body were parsed once, strictly (I14).

use crate::caller::Caller;
use crate::endpoint::Endpoint;
use crate::problem::Refusal;
use crate::service::Service;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, RequestPartsExt};
use holdfast_model::api::{Answer, Consistency, Done, Page, REVISION_HEADER, Reported};
use holdfast_model::limits::{BODY_BYTES_MAX, PAGE_DEFAULT, PAGE_MAX};
use holdfast_model::{Code, Revision};
use holdfast_store::View;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

/// The longest query string, in bytes.
const QUERY_BYTES_MAX: usize = 4_096;

/// A request that was admitted.
pub(crate) struct Call {
    /// The service.
    pub(crate) service: Arc<Service>,
    /// Who calls.
    pub(crate) caller: Caller,
    path: BTreeMap<String, String>,
    query: BTreeMap<String, String>,
}

impl FromRequestParts<Arc<Service>> for Call {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Self, Refusal> {
        let missing =
            || Refusal::new(Code::Internal, "The request reached a handler without being admitted.");
        let caller = parts.extensions.get::<Caller>().cloned().ok_or_else(missing)?;
        let endpoint = parts.extensions.get::<Arc<Endpoint>>().cloned().ok_or_else(missing)?;
        let params = parts.extract::<RawPathParams>().await;
        let params = params.map_err(|_| Refusal::invalid("The path is not valid UTF-8."))?;
        let path = params.iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        let query = parse_query(parts.uri.query().unwrap_or(""), &endpoint)?;
        Ok(Self { service: Arc::clone(service), caller, path, query })
    }
}

fn parse_query(text: &str, endpoint: &Endpoint) -> Result<BTreeMap<String, String>, Refusal> {
    if text.len() > QUERY_BYTES_MAX {
        return Err(Refusal::invalid("The query string is longer than 4 KiB."));
    }
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
        .map_err(|_| Refusal::invalid("The query string is not URL-encoded text."))?;
    let mut query = BTreeMap::new();
    for (key, value) in pairs {
        if !endpoint.parameters().any(|(name, _)| name == key) {
            let known: Vec<_> = endpoint.parameters().map(|(name, _)| name).collect();
            return Err(Refusal::invalid(format!(
                "The query parameter «{}» does not exist here; there are: {}.",
                key.chars().take(48).collect::<String>(),
                if known.is_empty() { "none".into() } else { known.join(", ") }
            )));
        }
        if query.insert(key.clone(), value).is_some() {
            return Err(Refusal::invalid(format!("The query parameter «{key}» is given twice.")));
        }
    }
    Ok(query)
}

impl Call {
    /// A path parameter as an id. Text that is no id names nothing: it is answered as absent.
    ///
    /// # Errors
    /// Not found.
    pub(crate) fn id<T: FromStr>(&self, name: &str, what: &'static str) -> Result<T, Refusal> {
        self.path.get(name).and_then(|text| text.parse().ok()).ok_or_else(|| Refusal::not_found(what))
    }

    /// Whether the path has this parameter.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path.contains_key(name)
    }

    /// A query parameter, parsed.
    ///
    /// # Errors
    /// When it has the wrong form.
    pub(crate) fn query<T: FromStr>(&self, name: &str) -> Result<Option<T>, Refusal>
    where
        T::Err: std::fmt::Display,
    {
        let Some(text) = self.query.get(name) else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|e| Refusal::invalid(format!("The query parameter `{name}` is wrong: {e}.")))
    }

    /// Items on a page.
    ///
    /// # Errors
    /// When it is no number from 1 to 200.
    pub(crate) fn limit(&self) -> Result<usize, Refusal> {
        match self.query::<usize>("limit")? {
            None => Ok(PAGE_DEFAULT),
            Some(n) if (1..=PAGE_MAX).contains(&n) => Ok(n),
            Some(_) => Err(Refusal::invalid("The query parameter `limit` must be from 1 to 200.")),
        }
    }

    /// How fresh the read must be.
    ///
    /// # Errors
    /// When it is neither `linearizable` nor `stale`.
    pub(crate) fn consistency(&self) -> Result<Consistency, Refusal> {
        match self.query.get("consistency").map(String::as_str) {
            None | Some("linearizable") => Ok(Consistency::Linearizable),
            Some("stale") => Ok(Consistency::Stale),
            Some(_) => {
                Err(Refusal::invalid("The query parameter `consistency` must be linearizable or stale."))
            }
        }
    }

    /// A view to read from (I3), which may be an earlier one. The caller's credential holds in the present one (I11).
    ///
    /// # Errors
    /// When there is no majority, the credential no longer holds, or the revision asked for is not held.
    pub(crate) async fn view(&self) -> Result<View, Refusal> {
        let view = self.service.read(self.consistency()?).await?;
        crate::caller::still_holds(&self.caller, &view, self.caller.request().now)?;
        match self.query::<Revision>("revision")? {
            None => Ok(view),
            Some(at) if at == view.revision() => Ok(view),
            Some(at) => Ok(self.service.store().view_at(at)?),
        }
    }
}

/// A JSON body of at most 1 MiB.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, service: &Arc<Service>) -> Result<Self, Refusal> {
        let json =
            request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).is_some_and(|v| {
                v.split(';').next().is_some_and(|m| m.trim().eq_ignore_ascii_case("application/json"))
            });
        if !json {
            let detail = "The body must be JSON, with the header content-type: application/json.";
            return Err(Refusal::new(Code::UnsupportedMediaType, detail));
        }
        let bytes =
            Bytes::from_request(request, service).await.map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Refusal::new(
                    Code::BodyTooLarge,
                    format!("The body is larger than {BODY_BYTES_MAX} bytes; send less."),
                ),
                _ => Refusal::invalid("The body could not be read to its end."),
            })?;
        // Serde's words name the line and the field, and hold no more of the body than a type or a key.
        serde_json::from_slice(&bytes).map(Self).map_err(|e| {
            let category = match e.classify() {
                serde_json::error::Category::Data => "does not have the right form",
                _ => "is not JSON",
            };
            let place = format!("line {}, column {}", e.line(), e.column());
            Refusal::invalid(format!("The body {category} at {place}: {}.", first_words(&e.to_string())))
        })
    }
}

/// Characters of a parser's message that are passed on at most.
const MESSAGE_CHARS_MAX: usize = 200;

fn first_words(message: &str) -> String {
    let bare = message.split(" at line ").next().unwrap_or(message);
    bare.trim_end_matches('.').chars().take(MESSAGE_CHARS_MAX).collect()
}

fn with_revision(mut response: Response, revision: Revision) -> Response {
    response.headers_mut().insert(REVISION_HEADER, HeaderValue::from(revision.0));
    response
}

/// 200 with one resource.
pub(crate) fn found<T: Serialize>(revision: Revision, item: T) -> Response {
    with_revision(Json(Answer { revision, item }).into_response(), revision)
}

/// 201 with what was made.
pub(crate) fn created<T: Serialize>(revision: Revision, item: T) -> Response {
    with_revision((StatusCode::CREATED, Json(Answer { revision, item })).into_response(), revision)
}

/// 200 with a page.
pub(crate) fn page<T: Serialize>(revision: Revision, items: Vec<T>, next: Option<String>) -> Response {
    with_revision(Json(Page { revision, items, next }).into_response(), revision)
}

/// 200 for a change without a resource.
pub(crate) fn done(revision: Revision) -> Response {
    with_revision(Json(Done { revision }).into_response(), revision)
}

/// 200 for an agent's report.
pub(crate) fn reported(reported: Reported) -> Response {
    let revision = reported.revision;
    with_revision(Json(reported).into_response(), revision)
}

/// Cuts `items`, of which one more than `limit` was read, to a page and its cursor.
pub(crate) fn cut<T>(
    mut items: Vec<T>,
    limit: usize,
    cursor: impl Fn(&T) -> String,
) -> (Vec<T>, Option<String>) {
    if items.len() <= limit {
        return (items, None);
    }
    items.truncate(limit);
    let next = items.last().map(cursor);
    (items, next)
}
