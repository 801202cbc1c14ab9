//! Whether this member lives and serves, and what its API is.

use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::Call;
use crate::service::Service;
use axum::body::Bytes;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use holdfast_model::api::Consistency;
use std::sync::{Arc, OnceLock};

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(Endpoint::get("/healthz", Need::Nothing, "Whether the process lives"), healthz);
    table.add(
        Endpoint::get("/readyz", Need::Nothing, "Whether this member serves linearizable reads"),
        readyz,
    );
    table.add(Endpoint::get("/v1/openapi.json", Need::Nothing, "This document"), openapi);
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(call: Call) -> Result<&'static str, Refusal> {
    call.service.read(Consistency::Linearizable).await?;
    Ok("ready\n")
}

async fn openapi() -> Result<Response, Refusal> {
    // Anyone may ask, so it is written once.
    static TEXT: OnceLock<Bytes> = OnceLock::new();
    let text = match TEXT.get() {
        Some(text) => text.clone(),
        None => {
            let text = crate::openapi_text().map_err(|e| Refusal::internal(&e))?;
            TEXT.get_or_init(|| text.into()).clone()
        }
    };
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}
