//! Releases, and deployments that roll them out.

use super::apps::{env, gone, vanished};
use crate::endpoint::{Endpoint, Need, PAGE, Table};
use crate::problem::{Refusal, sentence};
use crate::request::{Body, Call, created, cut, found, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{Answer, CreateDeployment, CreateRelease, Page, Scale};
use holdfast_model::resource::{Deployment, Release};
use holdfast_model::{Accepted, Code, Command, Output, Scope, manifest};
use holdfast_store::{View, Views};
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let releases = "/v1/envs/{env}/releases";
    table.add(
        Endpoint::post(releases, Need::Scope(Scope::ReleasesWrite), "Make a release")
            .body::<CreateRelease>()
            .answers::<Answer<Release>>(201),
        create_release,
    );
    table.add(
        Endpoint::get(releases, Need::Scope(Scope::ReleasesRead), "List an env's releases")
            .query(&PAGE_WITHOUT_NAME)
            .reads()
            .answers::<Page<Release>>(200),
        list_releases,
    );
    table.add(
        Endpoint::get("/v1/releases/{release}", Need::Scope(Scope::ReleasesRead), "Show a release")
            .reads()
            .answers::<Answer<Release>>(200),
        show_release,
    );
    let deployments = "/v1/envs/{env}/deployments";
    table.add(
        Endpoint::post(deployments, Need::Scope(Scope::DeploysWrite), "Roll out a release")
            .body::<CreateDeployment>()
            .answers::<Answer<Deployment>>(201),
        create_deployment,
    );
    table.add(
        Endpoint::get(deployments, Need::Scope(Scope::EnvsRead), "List an env's deployments")
            .query(&PAGE_WITHOUT_NAME)
            .reads()
            .answers::<Page<Deployment>>(200),
        list_deployments,
    );
    table.add(
        Endpoint::get("/v1/deployments/{deployment}", Need::Scope(Scope::EnvsRead), "Show a deployment")
            .reads()
            .answers::<Answer<Deployment>>(200),
        show_deployment,
    );
    table.add(
        Endpoint::post(
            "/v1/envs/{env}/scale",
            Need::Scope(Scope::DeploysWrite),
            "Change numbers of instances",
        )
        .body::<Scale>()
        .answers::<Answer<Deployment>>(201),
        scale,
    );
}

const PAGE_WITHOUT_NAME: [(&str, &str); 2] = [PAGE[0], PAGE[1]];

async fn create_release(call: Call, Body(body): Body<CreateRelease>) -> Result<Response, Refusal> {
    let manifest =
        manifest::parse(&body.manifest).map_err(|e| Refusal::new(Code::InvalidManifest, sentence(&e)))?;
    let command = Command::CreateRelease { env: call.id("env", "env")?, image: body.image, manifest };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Release(id) = accepted.output else { return Err(vanished("release")) };
    Ok(created(accepted.revision, view.release(id)?.ok_or_else(|| gone("release", id, accepted.revision))?))
}

async fn list_releases(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let env = env(&call, &view, call.id("env", "env")?)?;
    let items = view.releases(env.id, call.query::<u32>("cursor")?, limit + 1)?;
    let (items, next) = cut(items, limit, |r| r.number.to_string());
    Ok(page(view.revision(), items, next))
}

async fn show_release(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let release = view.release(call.id("release", "release")?)?;
    Ok(found(view.revision(), call.caller.visible("release", release, |r| r.org)?))
}

fn started(accepted: &Accepted, view: &View) -> Result<Response, Refusal> {
    let Output::Deployment(id) = accepted.output else { return Err(vanished("deployment")) };
    Ok(created(
        accepted.revision,
        view.deployment(id)?.ok_or_else(|| gone("deployment", id, accepted.revision))?,
    ))
}

async fn create_deployment(call: Call, Body(body): Body<CreateDeployment>) -> Result<Response, Refusal> {
    let command = Command::Deploy { env: call.id("env", "env")?, release: body.release, counts: body.counts };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    started(&accepted, &view)
}

async fn list_deployments(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let env = env(&call, &view, call.id("env", "env")?)?;
    let items = view.deployments(env.id, call.query::<u32>("cursor")?, limit + 1)?;
    let (items, next) = cut(items, limit, |d| d.number.to_string());
    Ok(page(view.revision(), items, next))
}

async fn show_deployment(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let deployment = view.deployment(call.id("deployment", "deployment")?)?;
    Ok(found(view.revision(), call.caller.visible("deployment", deployment, |d| d.org)?))
}

async fn scale(call: Call, Body(body): Body<Scale>) -> Result<Response, Refusal> {
    let command = Command::Scale { env: call.id("env", "env")?, counts: body.counts };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    started(&accepted, &view)
}
