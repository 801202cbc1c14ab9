//! Orgs, their apps, and the apps' envs.

use crate::endpoint::{Endpoint, Need, PAGE, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, cut, done, found, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{Answer, CreateApp, CreateEnv, CreateOrg, Done, Page};
use holdfast_model::resource::{App, Env, Org};
use holdfast_model::{
    AppId, AppName, Code, Command, EnvId, EnvName, OrgId, OrgName, Output, Revision, Scope,
};
use holdfast_store::{View, Views};
use std::fmt::Display;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let orgs = "/v1/orgs";
    table.add(
        Endpoint::post(orgs, Need::Operator(Scope::ClusterAdmin), "Make an org")
            .body::<CreateOrg>()
            .answers::<Answer<Org>>(201),
        create_org,
    );
    table.add(
        Endpoint::get(orgs, Need::Scope(Scope::OrgsRead), "List the orgs that the token may see")
            .query(PAGE)
            .reads()
            .answers::<Page<Org>>(200),
        list_orgs,
    );
    table.add(
        Endpoint::get("/v1/orgs/{org}", Need::Scope(Scope::OrgsRead), "Show an org")
            .reads()
            .answers::<Answer<Org>>(200),
        show_org,
    );
    let apps = "/v1/orgs/{org}/apps";
    table.add(
        Endpoint::post(apps, Need::Scope(Scope::AppsWrite), "Make an app")
            .body::<CreateApp>()
            .answers::<Answer<App>>(201),
        create_app,
    );
    table.add(
        Endpoint::get(apps, Need::Scope(Scope::AppsRead), "List an org's apps")
            .query(PAGE)
            .reads()
            .answers::<Page<App>>(200),
        list_apps,
    );
    table.add(
        Endpoint::get("/v1/apps/{app}", Need::Scope(Scope::AppsRead), "Show an app")
            .reads()
            .answers::<Answer<App>>(200),
        show_app,
    );
    table.add(
        Endpoint::delete(
            "/v1/apps/{app}",
            Need::Scope(Scope::AppsWrite),
            "Delete an app with everything in it",
        )
        .query(&[("expected_version", "Only if this is its version.")])
        .answers::<Done>(200),
        delete_app,
    );
    let envs = "/v1/apps/{app}/envs";
    table.add(
        Endpoint::post(envs, Need::Scope(Scope::EnvsWrite), "Make an env")
            .body::<CreateEnv>()
            .answers::<Answer<Env>>(201),
        create_env,
    );
    table.add(
        Endpoint::get(envs, Need::Scope(Scope::EnvsRead), "List an app's envs")
            .query(PAGE)
            .reads()
            .answers::<Page<Env>>(200),
        list_envs,
    );
    table.add(
        Endpoint::get("/v1/envs/{env}", Need::Scope(Scope::EnvsRead), "Show an env")
            .reads()
            .answers::<Answer<Env>>(200),
        show_env,
    );
}

/// The org, if the caller sees it.
pub(super) fn org(call: &Call, view: &View, id: OrgId) -> Result<Org, Refusal> {
    call.caller.visible("org", view.org(id)?, |o| o.id)
}

/// The app, if the caller sees it.
pub(super) fn app(call: &Call, view: &View, id: AppId) -> Result<App, Refusal> {
    call.caller.visible("app", view.app(id)?, |a| a.org)
}

/// The env, if the caller sees it.
pub(super) fn env(call: &Call, view: &View, id: EnvId) -> Result<Env, Refusal> {
    call.caller.visible("env", view.env(id)?, |e| e.org)
}

/// What a command made was deleted since. The caller is told what it was: a repeated request gets no other answer (I4).
pub(super) fn gone(what: &str, id: impl Display, made_at: Revision) -> Refusal {
    let detail = format!("The {what} {id} was made at revision {made_at}, and is gone again already.");
    Refusal::new(Code::NotFound, detail).with("id", id).with("made_at", made_at)
}

/// What a command made is not what was asked for, or is missing although nothing deletes it: a defect of ours.
pub(super) fn vanished(what: &str) -> Refusal {
    Refusal::new(Code::NotFound, format!("The {what} was made, and is gone again already."))
}

async fn create_org(call: Call, Body(body): Body<CreateOrg>) -> Result<Response, Refusal> {
    let (accepted, view) = call.service.write(&call.caller, Command::CreateOrg { name: body.name }).await?;
    let Output::Org(id) = accepted.output else { return Err(vanished("org")) };
    Ok(created(accepted.revision, view.org(id)?.ok_or_else(|| gone("org", id, accepted.revision))?))
}

async fn list_orgs(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let revision = view.revision();
    // A tenant's token sees its own org and no other; so does the list.
    if let Some(own) = call.caller.org() {
        let wanted = call.query::<OrgName>("name")?;
        let items =
            view.org(own)?.into_iter().filter(|o| wanted.as_ref().is_none_or(|w| o.name == *w)).collect();
        return Ok(page(revision, items, None));
    }
    if let Some(name) = call.query::<OrgName>("name")? {
        return Ok(page(revision, view.org_by_name(&name)?.into_iter().collect(), None));
    }
    let items = view.orgs(call.query::<OrgName>("cursor")?.as_ref(), limit + 1)?;
    let (items, next) = cut(items, limit, |o| o.name.to_string());
    Ok(page(revision, items, next))
}

async fn show_org(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    Ok(found(view.revision(), org(&call, &view, call.id("org", "org")?)?))
}

async fn create_app(call: Call, Body(body): Body<CreateApp>) -> Result<Response, Refusal> {
    let command = Command::CreateApp { org: call.id("org", "org")?, name: body.name };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::App(id) = accepted.output else { return Err(vanished("app")) };
    Ok(created(accepted.revision, view.app(id)?.ok_or_else(|| gone("app", id, accepted.revision))?))
}

async fn list_apps(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let org = org(&call, &view, call.id("org", "org")?)?;
    if let Some(name) = call.query::<AppName>("name")? {
        return Ok(page(view.revision(), view.app_by_name(org.id, &name)?.into_iter().collect(), None));
    }
    let items = view.apps(org.id, call.query::<AppName>("cursor")?.as_ref(), limit + 1)?;
    let (items, next) = cut(items, limit, |a| a.name.to_string());
    Ok(page(view.revision(), items, next))
}

async fn show_app(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    Ok(found(view.revision(), app(&call, &view, call.id("app", "app")?)?))
}

async fn delete_app(call: Call) -> Result<Response, Refusal> {
    let command =
        Command::DeleteApp { app: call.id("app", "app")?, expected_version: call.query("expected_version")? };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn create_env(call: Call, Body(body): Body<CreateEnv>) -> Result<Response, Refusal> {
    let command = Command::CreateEnv { app: call.id("app", "app")?, name: body.name };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Env(id) = accepted.output else { return Err(vanished("env")) };
    Ok(created(accepted.revision, view.env(id)?.ok_or_else(|| gone("env", id, accepted.revision))?))
}

async fn list_envs(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let app = app(&call, &view, call.id("app", "app")?)?;
    if let Some(name) = call.query::<EnvName>("name")? {
        return Ok(page(view.revision(), view.env_by_name(app.id, &name)?.into_iter().collect(), None));
    }
    let items = view.envs(app.id, call.query::<EnvName>("cursor")?.as_ref(), limit + 1)?;
    let (items, next) = cut(items, limit, |e| e.name.to_string());
    Ok(page(view.revision(), items, next))
}

async fn show_env(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    Ok(found(view.revision(), env(&call, &view, call.id("env", "env")?)?))
}
