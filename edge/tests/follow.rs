//! The whole edge agent beside a control plane that comes, goes and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_edge::process::{Standing, run};
use holdfast_model::agent::{EdgeRoute, Frame, ReportDetail, Stamp};
use holdfast_model::{Incarnation, Revision};
use support::member::{Member, Trust};
use support::world::{TCP_PORT, World, cluster, exactly, guarded, plain_backend, route, until};
use tokio::net::TcpStream;

fn snapshot(revision: u64, routes: Vec<EdgeRoute>) -> Vec<Frame<EdgeRoute>> {
    let stamp = Stamp { cluster: cluster(), incarnation: Incarnation(1), revision: Revision(revision) };
    let begin = Frame::SnapshotBegin { stamp, items: routes.len() as u64, confirmed_through: stamp.revision };
    vec![begin, Frame::SnapshotItems(routes), Frame::SnapshotEnd]
}

async fn says(world: &World, port: u16, what: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(world.address(port)).await else { return false };
    exactly(&mut stream, what.len()).await.is_ok_and(|got| got == what)
}

#[tokio::test]
async fn i05_edge_follows_its_control_plane_and_goes_on_without_it() {
    let mut world = World::new().await;
    world.end().await;
    let trust = Trust::new();
    let old = route(None, &[plain_backend(b"old").await]);
    let address = world.address(7443);
    let member = Member::start(&trust, address, snapshot(5, vec![old.clone()])).await;
    let client = trust.edge_client(address);
    let (stop, shutdown) = tokio::sync::watch::channel(false);
    let edge = tokio::spawn(run(
        world.config.clone(),
        cluster(),
        Some(client),
        shutdown,
        tokio::sync::watch::Sender::new(Standing::Starting),
    ));

    until(async || says(&world, TCP_PORT, "old").await).await;
    let mut reports = member.reports.clone();
    let report =
        guarded(reports.wait_for(|report| report.as_ref().is_some_and(|r| r.applied == Revision(5))))
            .await
            .unwrap()
            .clone()
            .unwrap();
    assert!(matches!(report.detail, ReportDetail::Edge { routes: 1, .. }), "{report:?}");
    assert_eq!(world.status().await.control_plane.member, Some(address.to_string()));

    member.stop().await;
    until(async || world.status().await.control_plane.member.is_none()).await;
    for _ in 0..20 {
        assert!(says(&world, TCP_PORT, "old").await);
    }
    assert_eq!(world.status().await.serving.unwrap().revision, Revision(5));

    // It comes back first with an older state, which is refused (I6), then with a newer one.
    let behind = Member::start(&trust, address, snapshot(4, vec![])).await;
    let mut attempts = behind.reports.clone();
    guarded(attempts.wait_for(|report| report.is_some())).await.unwrap();
    assert!(says(&world, TCP_PORT, "old").await);
    assert_eq!(world.status().await.serving.unwrap().revision, Revision(5));
    behind.stop().await;
    let mut new = old;
    new.backends = route(None, &[plain_backend(b"new").await]).backends;
    let ahead = Member::start(&trust, address, snapshot(6, vec![new])).await;
    until(async || says(&world, TCP_PORT, "new").await).await;
    let mut reports = ahead.reports.clone();
    let served = |report: &Option<holdfast_model::agent::Report>| {
        report.as_ref().is_some_and(|r| r.applied == Revision(6) && r.held.is_none())
    };
    guarded(reports.wait_for(served)).await.unwrap();
    stop.send_replace(true);
    guarded(edge).await.unwrap().unwrap();
}
