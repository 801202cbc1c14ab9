//! The HTTP API: the one way in for people, agents and other members.
//!
//! A request passes [`gate`], which names it and admits its caller by the endpoint's declaration ([`endpoint`],
//! [`caller`]); a handler in `routes/` reads a view or makes a command; [`service`] gives it a context and proposes it.
//! Agents follow through [`follow`]; [`exec`] passes sessions on between people and nodes. [`clockwork`] is what members do by themselves.
//!
//! It must never: decide what a command means (that is `store`), answer a caller without a declaration, tell what
//! lies outside a caller's scope from what does not exist, or let bytes from a socket panic the process.
//!
//! Invariants kept here: I3 (reads wait for a read index), I4 (idempotency keys reach the command), I7 (the judge of
//! silence), I9 (one place that admits), I11 (credentials are checked in the view that answers), I14 (problems).

pub mod caller;
pub mod clockwork;
pub mod contacts;
pub mod endpoint;
pub mod exec;
mod follow;
pub mod gate;
mod hand_over;
pub mod liveness;
pub mod log_readers;
mod membership;
pub mod openapi;
pub mod peers;
pub mod problem;
pub mod registries;
mod request;
mod routes;
mod sealing;
pub mod server;
pub mod service;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use holdfast_model::limits::BODY_BYTES_MAX;
use service::Service;
use std::sync::Arc;

pub use routes::member_subject;

/// The router over every endpoint.
pub fn router(service: Arc<Service>) -> Router {
    let (router, endpoints) = routes::table().into_router();
    let gate = gate::Gate::new(Arc::clone(&service), &endpoints);
    router
        .route_layer(from_fn_with_state(gate, gate::guard))
        .fallback(gate::nothing_here)
        .method_not_allowed_fallback(gate::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(from_fn(gate::name))
        .with_state(service)
}

/// The OpenAPI document, as it is checked in at `docs/reference/openapi.json`.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn openapi_text() -> Result<String, serde_json::Error> {
    openapi::document_text(&routes::table().endpoints)
}

/// Who may call what, as it is checked in at `docs/reference/access.md`.
pub fn access_text() -> String {
    openapi::access_table(&routes::table().endpoints)
}
