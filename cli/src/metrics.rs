//! What an edge and a member tell Prometheus. A node tells it itself.

use crate::failure::Failure;
use futures::FutureExt;
use holdfast_api::service::Service;
use holdfast_edge::introspect::{EdgeStatus, read_status};
use holdfast_metrics::{Exposition, Listen, Listener, server::Source};
use holdfast_raft::MemberState;
use rand::RngExt;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How soon a place that is held is tried again, with jitter of as much again.
const PLACE_AGAIN: Duration = Duration::from_millis(200);

/// Takes the place, if one was given.
pub(crate) async fn listener(listen: Option<&Listen>) -> Result<Option<Listener>, Failure> {
    let Some(listen) = listen else { return Ok(None) };
    let bound = Listener::bind(listen).await;
    bound.map(Some).map_err(|e| Failure::Host(crate::failure::with_sources(&e)))
}

/// Takes the place, if one was given, and has patience with who holds it.
pub(crate) async fn listener_within(
    listen: Option<&Listen>,
    patience: Duration,
) -> Result<Option<Listener>, Failure> {
    let until = Instant::now() + patience;
    loop {
        match listener(listen).await {
            Err(_) if Instant::now() < until => {
                let pause = PLACE_AGAIN.mul_f64(rand::rng().random_range(1.0..2.0));
                tokio::time::sleep(pause).await;
            }
            taken => return taken,
        }
    }
}

/// Serves until it is dropped; without a place it only waits.
pub(crate) async fn serve(listener: Option<Listener>, source: Source) -> Infallible {
    match listener {
        Some(listener) => holdfast_metrics::serve(listener, source).await,
        None => std::future::pending().await,
    }
}

/// An edge, as its status socket tells of it.
pub(crate) fn of_edge(data_dir: PathBuf) -> Source {
    Arc::new(move || {
        let data_dir = data_dir.clone();
        async move {
            match read_status(&data_dir).await {
                Ok(status) => edge(&status),
                Err(error) => {
                    tracing::warn!(%error, "the edge's metrics could not be read");
                    Exposition::default()
                }
            }
        }
        .boxed()
    })
}

fn edge(status: &EdgeStatus) -> Exposition {
    let mut out = Exposition::default();
    out.flag(
        "holdfast_edge_follows",
        "Whether the control plane is followed",
        status.control_plane.member.is_some(),
    );
    let revision = status.serving.map_or(0, |stamp| stamp.revision.0);
    out.gauge("holdfast_edge_revision", "The revision that is served", &[], revision as f64);
    let held = status.held.map_or(0, |held| held.removes);
    out.gauge("holdfast_edge_held_removals", "Removals that wait to be confirmed", &[], held as f64);
    out.flag("holdfast_edge_routes_refused", "Whether later routes are refused", status.refused.is_some());
    out.gauge("holdfast_edge_routes", "Routes in the table", &[], status.route_count as f64);
    out.gauge("holdfast_edge_ports_open", "Ports that are listened on", &[], status.listening.len() as f64);
    out.gauge(
        "holdfast_edge_ports_failed",
        "Ports that could not be opened",
        &[],
        status.not_listening.len() as f64,
    );
    out.gauge("holdfast_edge_connections", "Open client connections", &[], status.connections as f64);
    let backends = || status.routes.iter().flat_map(|route| &route.backends);
    let rotating = backends().filter(|backend| backend.in_rotation).count();
    out.gauge(
        "holdfast_edge_backends",
        "Backends of the first 10,000 routes",
        &[],
        backends().count() as f64,
    );
    out.gauge("holdfast_edge_backends_in_rotation", "Those of them that answer", &[], rotating as f64);
    // One series for each counter of the data path: their number is the program's, not its clients'.
    if let Ok(serde_json::Value::Object(counters)) = serde_json::to_value(&status.metrics) {
        for (name, value) in counters {
            let value = value.as_u64().unwrap_or(0) as f64;
            match name.strip_prefix("bytes_") {
                Some(way) => out.counter("holdfast_edge_bytes", "Bytes relayed", &[("way", way)], value),
                None => out.counter(
                    "holdfast_edge_events",
                    "What happened on the data path",
                    &[("event", &name)],
                    value,
                ),
            }
        }
    }
    out
}

/// A member, as it sees itself.
pub(crate) fn of_member(service: Arc<Service>) -> Source {
    Arc::new(move || {
        let out = member(&service);
        async { out }.boxed()
    })
}

fn member(service: &Service) -> Exposition {
    let mut out = Exposition::default();
    let status = service.consensus.status();
    out.flag("holdfast_member_healthy", "Whether the member may serve (I1)", status.healthy);
    out.flag("holdfast_member_has_leader", "Whether it knows a leader", status.leader.is_some());
    out.flag("holdfast_member_leads", "Whether it is the leader", status.state == MemberState::Leader);
    out.gauge("holdfast_member_term", "The term", &[], status.term as f64);
    let index = |index: Option<u64>| index.unwrap_or(0) as f64;
    out.gauge("holdfast_member_log_index", "The last entry of its log", &[], index(status.last_log));
    out.gauge(
        "holdfast_member_applied_index",
        "The last entry that it applied",
        &[],
        index(status.last_applied),
    );
    out.gauge("holdfast_member_purged_index", "Through which its log was purged", &[], index(status.purged));
    out.gauge(
        "holdfast_member_snapshot_index",
        "Through which its newest snapshot goes",
        &[],
        index(status.snapshot),
    );
    out.gauge("holdfast_member_voters", "Members that vote", &[], status.voters.len() as f64);
    out.gauge("holdfast_member_learners", "Members that do not", &[], status.learners.len() as f64);
    out.gauge(
        "holdfast_member_revision",
        "The last revision that it applied",
        &[],
        service.store().revision().0 as f64,
    );
    out.counter(
        "holdfast_member_log_commits",
        "Writes of its log to the disk",
        &[],
        service.consensus.log_commits() as f64,
    );
    out.gauge(
        "holdfast_member_streams",
        "Agents that follow this member",
        &[],
        service.contacts.streams() as f64,
    );
    out.gauge(
        "holdfast_member_log_readers",
        "Who read instances' lines through it",
        &[],
        service.contacts.log_readers.all() as f64,
    );
    out
}
