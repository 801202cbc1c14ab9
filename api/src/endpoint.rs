//! The one table of endpoints: method, path, what the caller needs, what goes in and comes out. The router, the
//! authorisation (I9), the checked-in access table and the OpenAPI document are all made from it, so that an endpoint
//! without a declaration cannot exist.

use axum::http::Method;
use axum::routing::{MethodFilter, MethodRouter, on};
use holdfast_model::Scope;
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa::openapi::schema::Schema;
use utoipa::openapi::{Ref, RefOr};

/// What a caller needs before a handler runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: liveness, the API's own description.
    Nothing,
    /// An enrolment's secret in the body, checked by the command itself.
    EnrolmentSecret,
    /// Any valid token.
    AnyToken,
    /// A valid token with this scope. What lies outside the token's org is absent.
    Scope(Scope),
    /// A valid operator's token with this scope.
    Operator(Scope),
    /// An agent's certificate.
    Agent,
    /// A member's certificate.
    Member,
}

impl Need {
    /// The need as the access table shows it.
    pub fn describe(self) -> String {
        match self {
            Self::Nothing => "nothing".into(),
            Self::EnrolmentSecret => "enrolment secret".into(),
            Self::AnyToken => "any token".into(),
            Self::Scope(scope) => format!("token with {scope}"),
            Self::Operator(scope) => format!("operator with {scope}"),
            Self::Agent => "agent certificate".into(),
            Self::Member => "member certificate".into(),
        }
    }
}

/// How long a handler may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A request with an answer: the service's deadline applies.
    Answer,
    /// A stream without an end.
    Stream,
}

type Named = (String, RefOr<Schema>);

/// One endpoint's declaration.
#[derive(Clone)]
pub struct Endpoint {
    /// The method.
    pub method: Method,
    /// The path, as in `/v1/apps/{app}`.
    pub path: &'static str,
    /// One line for the document.
    pub summary: &'static str,
    /// What the caller needs.
    pub need: Need,
    /// How long it may take.
    pub pace: Pace,
    /// Query parameters and what they mean.
    pub query: &'static [(&'static str, &'static str)],
    /// Whether it reads resources, and so may read them as fresh as asked for, or as they were.
    pub reads: bool,
    /// The body's schema, if it takes one.
    pub body: Option<String>,
    /// The status of success.
    pub status: u16,
    /// The answer's schema; `None` is a stream or no JSON.
    pub answer: Option<String>,
    /// Every schema that body and answer refer to.
    pub schemas: BTreeMap<String, RefOr<Schema>>,
}

/// A page's query parameters.
pub const PAGE: &[(&str, &str)] = &[
    ("limit", "Items on the page: 50 by default, 200 at most."),
    ("cursor", "The `next` of the page before."),
    ("name", "Only the item with this name."),
];

/// How fresh a read must be (I3).
pub const CONSISTENCY: (&str, &str) =
    ("consistency", "linearizable by default; stale: what the asked member has now.");

/// The query parameters of a read of resources.
pub const READ: &[(&str, &str)] = &[
    CONSISTENCY,
    ("revision", "Resources as they were at this revision, while it is held; then `compacted`."),
];

impl Endpoint {
    fn new(method: Method, path: &'static str, need: Need, summary: &'static str) -> Self {
        Self {
            method,
            path,
            summary,
            need,
            pace: Pace::Answer,
            query: &[],
            reads: false,
            body: None,
            status: 200,
            answer: None,
            schemas: BTreeMap::new(),
        }
    }

    /// A `GET`.
    pub fn get(path: &'static str, need: Need, summary: &'static str) -> Self {
        Self::new(Method::GET, path, need, summary)
    }

    /// A `POST`.
    pub fn post(path: &'static str, need: Need, summary: &'static str) -> Self {
        Self::new(Method::POST, path, need, summary)
    }

    /// A `DELETE`.
    pub fn delete(path: &'static str, need: Need, summary: &'static str) -> Self {
        Self::new(Method::DELETE, path, need, summary)
    }

    /// With a JSON body.
    #[must_use]
    pub fn body<T: ToSchema>(mut self) -> Self {
        self.body = Some(self.collect::<T>());
        self
    }

    /// With a JSON answer.
    #[must_use]
    pub fn answers<T: ToSchema>(mut self, status: u16) -> Self {
        self.status = status;
        self.answer = Some(self.collect::<T>());
        self
    }

    /// With query parameters.
    #[must_use]
    pub const fn query(mut self, query: &'static [(&'static str, &'static str)]) -> Self {
        self.query = query;
        self
    }

    /// Reads resources: takes [`READ`] as well.
    #[must_use]
    pub const fn reads(mut self) -> Self {
        self.reads = true;
        self
    }

    /// Every query parameter that it takes.
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.query.iter().chain(if self.reads { READ } else { &[] }).copied()
    }

    /// With an endless answer.
    #[must_use]
    pub const fn streams(mut self) -> Self {
        self.pace = Pace::Stream;
        self
    }

    fn collect<T: ToSchema>(&mut self) -> String {
        let name = T::name().into_owned();
        let mut found: Vec<Named> = Vec::new();
        T::schemas(&mut found);
        self.schemas.extend(found);
        self.schemas.insert(name.clone(), T::schema());
        name
    }

    /// Names of the path's parameters.
    pub fn path_params(&self) -> impl Iterator<Item = &'static str> {
        self.path.split('/').filter_map(|s| s.strip_prefix('{').and_then(|s| s.strip_suffix('}')))
    }

    /// A reference to a schema by name.
    pub(crate) fn reference(name: &str) -> RefOr<Schema> {
        RefOr::Ref(Ref::from_schema_name(name))
    }
}

/// The endpoints and their handlers.
pub struct Table<S> {
    /// The declarations, in the order in which they were added.
    pub endpoints: Vec<Endpoint>,
    routers: Vec<(&'static str, MethodRouter<S>)>,
}

impl<S: Clone + Send + Sync + 'static> Default for Table<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S: Clone + Send + Sync + 'static> Table<S> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { endpoints: Vec::new(), routers: Vec::new() }
    }

    /// Adds an endpoint and its handler.
    pub fn add<H, T>(&mut self, endpoint: Endpoint, handler: H)
    where
        H: axum::handler::Handler<T, S>,
        T: 'static,
    {
        let filter = match endpoint.method {
            Method::POST => MethodFilter::POST,
            Method::DELETE => MethodFilter::DELETE,
            _ => MethodFilter::GET,
        };
        self.routers.push((endpoint.path, on(filter, handler)));
        self.endpoints.push(endpoint);
    }

    /// The router over all of them, and the declarations.
    pub fn into_router(self) -> (axum::Router<S>, Vec<Endpoint>) {
        let router = self.routers.into_iter().fold(axum::Router::new(), |r, (path, m)| r.route(path, m));
        (router, self.endpoints)
    }
}
