//! `holdfast edge join|run|status`: wires the edge to its replica and to the control plane.
//!
//! The edge serves what is on its own disk before it has heard from anybody (I5).

use crate::agents::enrolled::{self, Agent};
use crate::agents::renewal;
use crate::agents::shutdown::Asked;
use crate::args::Global;
use crate::args::operator::{AgentFolder, EdgeJoin, EdgeRun};
use crate::failure::{Failure, with_sources};
use crate::metrics;
use crate::output::{Output, or_dash, table};
use holdfast_edge::EdgeConfig;
use holdfast_edge::introspect::{EdgeStatus, RouteStatus, read_status};
use holdfast_edge::process::{self, Standing};
use holdfast_model::command::Joiner;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::watch;

/// How long an edge that took over waits for the place where metrics are served.
const METRICS_PATIENCE: Duration = Duration::from_secs(10);

/// Joins as an edge.
pub(crate) async fn join(arguments: EdgeJoin, global: &Global, output: Output) -> Result<(), Failure> {
    let joiner = Joiner::Edge { name: arguments.name };
    let enrolled = enrolled::join(&arguments.data_dir, joiner, arguments.join, global).await?;
    output.show(&enrolled, || {
        format!("Joined; run it: holdfast edge run --data-dir {}", arguments.data_dir.display())
    })
}

/// Serves until told to stop.
pub(crate) async fn run(arguments: EdgeRun) -> Result<(), Failure> {
    let mut asked = Asked::listen()?;
    let agent = Agent::load(&arguments.data_dir)?;
    let mut config = EdgeConfig::new(arguments.data_dir.clone());
    if !arguments.listen.is_empty() {
        config.listen = arguments.listen;
    }
    let (stop, stopped) = watch::channel(false);
    let (standing, mut stands) = watch::channel(Standing::Starting);
    let mut left = standing.subscribe();
    let edge = process::run(config, agent.cluster, Some(agent.client.clone()), stopped, standing);
    tokio::pin!(edge);
    let renewal = tokio::spawn(renewal::run(agent));
    let renewing = renewal.abort_handle();
    let metrics = async {
        let serving = stands.wait_for(|standing| matches!(standing, Standing::Serving { .. })).await;
        // The one before this leaves the place when it hears of it.
        let patience = match serving.map(|standing| *standing) {
            Ok(Standing::Serving { took_over: true }) => METRICS_PATIENCE,
            _ => Duration::ZERO,
        };
        let listener = metrics::listener_within(arguments.metrics.as_ref(), patience).await?;
        match metrics::serve(listener, metrics::of_edge(arguments.data_dir)).await {}
    };
    let beside = async {
        tokio::select! {
            failed = metrics => failed,
            // Somebody else renews, and answers for metrics, from now on.
            _ = left.wait_for(|standing| *standing == Standing::Left) => {
                renewing.abort();
                std::future::pending().await
            }
        }
    };
    let ended = tokio::select! {
        ended = &mut edge => ended,
        failed = beside => {
            let failed: Result<Infallible, Failure> = failed;
            stop.send_replace(true);
            edge.await.map_err(|e| Failure::Host(with_sources(&e)))?;
            return failed.map(|never| match never {});
        }
        () = asked.wait() => {
            tracing::info!("stopping");
            stop.send_replace(true);
            edge.await
        }
    };
    renewal.abort();
    ended.map_err(|e| Failure::Host(with_sources(&e)))
}

/// Asks the edge on this host how it is.
pub(crate) async fn status(arguments: AgentFolder, output: Output) -> Result<(), Failure> {
    let status = read_status(&arguments.data_dir).await.map_err(|e| Failure::Host(with_sources(&e)))?;
    output.show(&status, || text(&status))
}

fn text(status: &EdgeStatus) -> String {
    let follows = status.control_plane.member.as_ref().map_or_else(
        || "follows no member: it serves what is on its own disk".to_owned(),
        |member| format!("follows {member}"),
    );
    let serving = or_dash(status.serving.map(|s| s.revision));
    let mut parts = vec![format!(
        "Edge {} (pid {}) {follows} · serves revision {serving} · {} routes · {} connections",
        status.version, status.pid, status.route_count, status.connections
    )];
    if let Some(held) = status.held {
        parts.push(format!(
            "Holds back revision {}: it would remove {} of {} routes.",
            held.revision, held.removes, held.of
        ));
    }
    if let Some(refused) = &status.refused {
        parts.push(format!("Keeps its last good routes: {refused}"));
    }
    for (address, why) in &status.not_listening {
        parts.push(format!("Cannot listen on {address}: {why}"));
    }
    let rows = status.routes.iter().flat_map(rows);
    parts.push(table(["PORT", "NAME", "BACKEND", "ADDRESS", "STATE", "CONNECTIONS"], rows));
    parts.join("\n\n")
}

fn rows(route: &RouteStatus) -> Vec<[String; 6]> {
    let name = route.hostname.as_ref().map_or_else(|| "(any)".to_owned(), ToString::to_string);
    let backends = route.backends.iter().map(|backend| {
        let state = match (backend.draining, backend.in_rotation) {
            (true, _) => "draining",
            (false, true) => "in rotation",
            (false, false) => "out",
        };
        [
            route.listen_port.to_string(),
            name.clone(),
            backend.instance.to_string(),
            backend.address.to_string(),
            state.to_owned(),
            backend.connections.to_string(),
        ]
    });
    backends.collect()
}
