//! Routes: hostnames and ports that lead to processes.

use super::apps::{env, gone, vanished};
use crate::endpoint::{Endpoint, Need, PAGE, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, cut, done, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{Answer, CreateRoute, Done, Page};
use holdfast_model::resource::Route;
use holdfast_model::{Command, Output, RouteId, Scope};
use holdfast_store::Views;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let routes = "/v1/envs/{env}/routes";
    table.add(
        Endpoint::post(routes, Need::Scope(Scope::RoutesWrite), "Make a route; its hostname is claimed")
            .body::<CreateRoute>()
            .answers::<Answer<Route>>(201),
        create,
    );
    table.add(
        Endpoint::get(routes, Need::Scope(Scope::RoutesRead), "List an env's routes")
            .query(&PAGE_WITHOUT_NAME)
            .reads()
            .answers::<Page<Route>>(200),
        list,
    );
    table.add(
        Endpoint::delete("/v1/routes/{route}", Need::Scope(Scope::RoutesWrite), "Delete a route")
            .query(&[("expected_version", "Only if this is its version.")])
            .answers::<Done>(200),
        delete,
    );
}

const PAGE_WITHOUT_NAME: [(&str, &str); 2] = [PAGE[0], PAGE[1]];

async fn create(call: Call, Body(body): Body<CreateRoute>) -> Result<Response, Refusal> {
    let command = Command::CreateRoute {
        env: call.id("env", "env")?,
        target: body.target,
        listen_port: body.listen_port,
        process: body.process,
        port: body.port,
        proxy_protocol: body.proxy_protocol,
    };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Route(id) = accepted.output else { return Err(vanished("route")) };
    Ok(created(accepted.revision, view.route(id)?.ok_or_else(|| gone("route", id, accepted.revision))?))
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let (view, limit) = (call.view().await?, call.limit()?);
    let env = env(&call, &view, call.id("env", "env")?)?;
    let items = view.routes(env.id, call.query::<RouteId>("cursor")?, limit + 1)?;
    let (items, next) = cut(items, limit, |r| r.id.to_string());
    Ok(page(view.revision(), items, next))
}

async fn delete(call: Call) -> Result<Response, Refusal> {
    let command = Command::DeleteRoute {
        route: call.id("route", "route")?,
        expected_version: call.query("expected_version")?,
    };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}
