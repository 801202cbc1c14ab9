//! `holdfast route`: hostnames and ports that lead to processes.

use crate::args::tenant::{RouteAdd, RouteCommand};
use crate::failure::Failure;
use crate::output::{age, table, word};
use crate::session::Session;
use holdfast_model::agent::ProxyProtocol;
use holdfast_model::api::CreateRoute;
use holdfast_model::resource::{Route, RouteTarget};

/// Where TLS is served when nobody says otherwise.
const TLS_PORT: u16 = 443;

pub(crate) async fn run(session: &Session, command: RouteCommand) -> Result<(), Failure> {
    match command {
        RouteCommand::Add(arguments) => add(session, arguments).await,
        RouteCommand::List => {
            let env = session.env().await?;
            let routes = session.client.routes(env.id).await?;
            session.output.show(&routes.items, || {
                let header = ["REACHED BY", "PORT", "PROCESS", "PROXY", "ID", "AGE"];
                table(header, routes.items.iter().map(row))
            })
        }
        RouteCommand::Remove { route } => remove(session, &route).await,
    }
}

async fn add(session: &Session, arguments: RouteAdd) -> Result<(), Failure> {
    let env = session.env().await?;
    let target = match arguments.hostname {
        Some(hostname) => RouteTarget::TlsPassthrough { hostname },
        None => RouteTarget::Tcp,
    };
    let body = CreateRoute {
        target,
        listen_port: arguments.listen.unwrap_or(TLS_PORT),
        process: arguments.process,
        port: arguments.port,
        proxy_protocol: if arguments.proxy_protocol_v2 { ProxyProtocol::V2 } else { ProxyProtocol::Off },
    };
    let made = session.client.create_route(env.id, &body).await?;
    session.output.show(&made, || {
        let route = &made.item;
        format!("{}:{} leads to {}: {}", reached_by(route), route.listen_port, route.process, route.id)
    })
}

async fn remove(session: &Session, named: &str) -> Result<(), Failure> {
    let id = match named.parse() {
        Ok(id) => id,
        Err(_) => {
            let env = session.env().await?;
            let routes = session.client.routes(env.id).await?.items;
            let found = routes.iter().find(|route| reached_by(route) == named);
            found.ok_or_else(|| Failure::NotFound { what: "route", name: named.to_owned() })?.id
        }
    };
    let done = session.client.delete_route(id).await?;
    session.output.show(&done, || format!("Route {named} is removed."))
}

fn reached_by(route: &Route) -> String {
    match &route.target {
        RouteTarget::TlsPassthrough { hostname } => hostname.to_string(),
        RouteTarget::Tcp => "tcp".into(),
    }
}

fn row(route: &Route) -> [String; 6] {
    [
        reached_by(route),
        route.listen_port.to_string(),
        format!("{}:{}", route.process, route.port),
        word(&route.proxy_protocol),
        route.id.to_string(),
        age(route.created_at),
    ]
}
