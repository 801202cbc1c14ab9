//! Volumes: what an env's deployments have made, who has each, and its end.

use super::apps::env;
use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Call, done, found, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{Answer, Done, Page};
use holdfast_model::volume::Volume;
use holdfast_model::{Command, Scope};
use holdfast_store::Views;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get("/v1/envs/{env}/volumes", Need::Scope(Scope::VolumesRead), "List an env's volumes")
            .reads()
            .answers::<Page<Volume>>(200),
        list,
    );
    table.add(
        Endpoint::get("/v1/volumes/{volume}", Need::Scope(Scope::VolumesRead), "Show a volume")
            .reads()
            .answers::<Answer<Volume>>(200),
        show,
    );
    table.add(
        Endpoint::delete(
            "/v1/volumes/{volume}",
            Need::Scope(Scope::VolumesWrite),
            "Delete a volume that no instance has, with what is on it",
        )
        .query(&[("expected_version", "Only if this is its version.")])
        .answers::<Done>(200),
        delete,
    );
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    Ok(page(view.revision(), view.volumes(env.id)?, None))
}

async fn show(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let volume = view.volume(call.id("volume", "volume")?)?;
    Ok(found(view.revision(), call.caller.visible("volume", volume, |v| v.org)?))
}

async fn delete(call: Call) -> Result<Response, Refusal> {
    let command = Command::DeleteVolume {
        volume: call.id("volume", "volume")?,
        expected_version: call.query("expected_version")?,
    };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}
