//! Routes. A hostname is claimed here, in log order, and has at most one owner (I8); who owns it is not told (I9).

use super::admission::{env, sees};
use super::{Decision, Refusal, absent, expect_version, refuse};
use crate::overlay::{Draft, Filing};
use crate::rows::Rows;
use crate::tables::{Table, key};
use crate::views::{Views, required};
use holdfast_model::agent::ProxyProtocol;
use holdfast_model::limits::{API_PORT, DENIED_PORTS, OVERLAY_PORT, RAFT_PORT};
use holdfast_model::resource::{Env, Release, Route, RouteTarget};
use holdfast_model::{Aggregate, Code, EnvId, EventPayload, Output, PortName, ProcessName, RouteId};

/// Ports of the platform's own.
const OWN_PORTS: &[u16] = &[API_PORT, RAFT_PORT, OVERLAY_PORT];

/// A route that is asked for.
pub(super) struct Asked<'a> {
    pub(super) env: EnvId,
    pub(super) target: &'a RouteTarget,
    pub(super) listen_port: u16,
    pub(super) process: &'a ProcessName,
    pub(super) port: &'a PortName,
    pub(super) proxy_protocol: ProxyProtocol,
}

pub(super) fn create(draft: &mut Draft<'_>, asked: &Asked<'_>) -> Decision {
    let env = env(draft, asked.env)?;
    check_port(asked.listen_port)?;
    check_declared(draft, &env, asked)?;
    check_free(draft, asked)?;
    let id = RouteId::from_bits(draft.fresh_id());
    let route = Route {
        id,
        env: env.id,
        app: env.app,
        org: env.org,
        target: asked.target.clone(),
        listen_port: asked.listen_port,
        process: asked.process.clone(),
        port: asked.port.clone(),
        proxy_protocol: asked.proxy_protocol,
        version: 1,
        created_at: draft.context().now,
    };
    draft.emit(Filing::org(Aggregate::Route(id), env.org), EventPayload::RouteCreated(route))?;
    Ok(Output::Route(id))
}

pub(super) fn delete(draft: &mut Draft<'_>, id: RouteId, expected_version: Option<u64>) -> Decision {
    let route = draft.route(id)?.filter(|r| sees(draft, r.org)).ok_or_else(|| absent("route"))?;
    expect_version(expected_version, route.version)?;
    draft.emit(Filing::org(Aggregate::Route(id), route.org), EventPayload::RouteDeleted { route: id })?;
    Ok(Output::None)
}

fn check_port(port: u16) -> Result<(), Refusal> {
    if port == 0 || DENIED_PORTS.contains(&port) || OWN_PORTS.contains(&port) {
        return Err(refuse(
            Code::InvalidRequest,
            format!("No route may listen on port {port}: choose another, such as 443."),
        ));
    }
    Ok(())
}

/// The process and port must be declared by what runs, or by what is about to.
fn check_declared(draft: &Draft<'_>, env: &Env, asked: &Asked<'_>) -> Result<(), Refusal> {
    let declares = |release: &Release| {
        let process = release.manifest.processes.get(asked.process);
        process.is_some_and(|p| p.ports.iter().any(|port| port.name == *asked.port))
    };
    if env.releases == 0 {
        return Err(refuse(
            Code::FailedPrecondition,
            "This env has no release yet, so it declares no port: make a release first, then the route.",
        ));
    }
    if draft.release_by_number(env.id, env.releases)?.as_ref().is_some_and(declares) {
        return Ok(());
    }
    if let Some(current) = env.current {
        let current = required(draft.deployment(current)?, "a deployment")?;
        if draft.release(current.release)?.as_ref().is_some_and(declares) {
            return Ok(());
        }
    }
    Err(refuse(
        Code::FailedPrecondition,
        format!(
            "No process «{}» with a port «{}» is declared here: add it to the manifest and make a release.",
            asked.process, asked.port
        ),
    ))
}

fn check_free(draft: &Draft<'_>, asked: &Asked<'_>) -> Result<(), Refusal> {
    let port = asked.listen_port;
    let port_taken =
        || refuse(Code::PortTaken, format!("Port {port} is taken on the edges: choose another."));
    match asked.target {
        RouteTarget::TlsPassthrough { hostname } => {
            if draft.route_by_hostname(hostname)?.is_some() {
                return Err(refuse(
                    Code::HostnameTaken,
                    format!(
                        "The hostname «{hostname}» is taken: delete the route that has it, or choose another."
                    ),
                ));
            }
            // A port that takes any connection is no place for names.
            if draft.route_by_port(port, None)?.is_some() { Err(port_taken()) } else { Ok(()) }
        }
        RouteTarget::Tcp => {
            let claims = draft.scan(&key(Table::PortClaim, &[&port.to_be_bytes()]), None, 1)?;
            if claims.is_empty() { Ok(()) } else { Err(port_taken()) }
        }
    }
}
