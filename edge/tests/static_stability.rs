//! What the edge keeps doing while its routes change, and when nobody is there to send any.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_client::Client;
use holdfast_edge::introspect::{StatusError, read_status};
use holdfast_edge::process::{Standing, run};
use holdfast_identity::Authority;
use holdfast_model::agent::EdgeRoute;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use support::tls::{Offer, identity};
use support::world::{
    TCP_PORT, TLS_PORT, World, all, cluster, exactly, guarded, plain_backend, route, tls_backend, until,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn i05_edge_keeps_routing_without_servers() {
    let a = identity("a.example");
    let mut world = World::new().await;
    world
        .publish(vec![
            route(Some("a.example"), &[tls_backend(&a, "I am a").await]),
            route(None, &[plain_backend(b"tcp").await]),
        ])
        .await;
    let before = world.status().await;
    for _ in 0..3 {
        // From here on the edge has its own disk and nothing else.
        world.restart().await;
        world.served(1).await;
        let mut stream = world.tls("a.example", &[&a], Offer::default()).await.unwrap();
        assert_eq!(exactly(&mut stream, 6).await.unwrap(), "I am a");
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 3).await.unwrap(), "tcp");
        let after = world.status().await;
        assert_eq!(after.serving, before.serving);
        let names = |routes: &[holdfast_edge::introspect::RouteStatus]| {
            routes.iter().map(|r| (r.id, r.listen_port, r.hostname.clone())).collect::<Vec<_>>()
        };
        assert_eq!(names(&after.routes), names(&before.routes));
        assert_eq!((after.control_plane.member, after.control_plane.changed_ms), (None, None));
    }
}

#[tokio::test]
async fn i05_an_edge_started_while_no_server_answers_serves_what_it_knew() {
    let mut world = World::new().await;
    world.publish(vec![route(None, &[plain_backend(b"hi").await])]).await;
    world.end().await;
    // Somebody holds the port and never listens, so that whoever dials it is refused.
    let nobody = tokio::net::TcpSocket::new_v4().unwrap();
    nobody.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let authority = Authority::create(&cluster().to_string(), std::time::SystemTime::now()).unwrap();
    for client in [false, true] {
        let endpoints = vec![nobody.local_addr().unwrap().into()];
        let client = client.then(|| Client::new(endpoints, authority.certificate(), None).unwrap());
        let (stop, shutdown) = tokio::sync::watch::channel(false);
        let edge = tokio::spawn(run(
            world.config.clone(),
            cluster(),
            client,
            shutdown,
            tokio::sync::watch::Sender::new(Standing::Starting),
        ));
        until(async || TcpStream::connect(world.address(TCP_PORT)).await.is_ok()).await;
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
        until(async || world.status().await.control_plane.reason.is_some()).await;
        let status = world.status().await;
        assert_eq!((status.serving.unwrap().revision.0, status.control_plane.member), (1, None));
        stop.send_replace(true);
        guarded(edge).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn i05_a_feed_that_ends_takes_no_route_away() {
    let mut world = World::new().await;
    world.publish(vec![route(None, &[plain_backend(b"hi").await])]).await;
    world.end_feed();
    for _ in 0..40 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let status = world.status().await;
    assert_eq!((status.serving.unwrap().revision.0, status.route_count), (1, 1));
}

#[tokio::test]
async fn i05_an_edge_that_knows_nothing_serves_nothing_and_waits() {
    let mut world = World::new().await;
    let status = world.status().await;
    assert_eq!((status.serving, status.route_count, status.listening.len()), (None, 0, 0));
    world.publish(vec![route(None, &[plain_backend(b"hi").await])]).await;
    assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
}

#[tokio::test]
async fn i05_a_restarted_edge_takes_its_ports_back_at_once_over_connections_of_the_old_one() {
    let mut world = World::with(|config| config.limits.shutdown = std::time::Duration::from_millis(50)).await;
    world.publish(vec![route(None, &[plain_backend(b"hi").await])]).await;
    let mut old = world.tcp(TCP_PORT).await;
    assert_eq!(exactly(&mut old, 2).await.unwrap(), "hi");
    world.restart().await;
    world.served(1).await;
    assert!(world.status().await.not_listening.is_empty());
    assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
    assert!(all(&mut old).await.is_empty(), "a connection that outlasts the grace is cut");
}

#[tokio::test]
async fn i08_routes_that_contradict_each_other_leave_the_last_good_table() {
    let mut world = World::new().await;
    let good = vec![route(None, &[plain_backend(b"owner").await])];
    world.publish(good.clone()).await;
    let thief = route(None, &[plain_backend(b"thief").await]);
    world.offer(vec![good[0].clone(), thief]);
    until(async || world.status().await.refused.is_some()).await;
    let status = world.status().await;
    assert_eq!(status.serving.unwrap().revision.0, 1, "a revision that is not served is not reported");
    assert!(status.refused.unwrap().contains("both claim port 9000"));
    for _ in 0..5 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 5).await.unwrap(), "owner");
    }
    world.publish(good).await;
    assert_eq!(world.status().await.refused, None);
}

/// Names swap their backends at every revision, so that a connection that saw half an update, or two tables, would
/// reach the other name's backend.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i08_table_switches_under_load_drop_and_misroute_nothing() {
    const SWITCHES: u64 = 300;
    const CLIENTS: usize = 8;
    let mut world = World::new().await;
    let (x, y) = (plain_backend(b"x").await, plain_backend(b"y").await);
    // The port of x gets y's backend and the other way round with every odd revision.
    let routes = |revision: u64| -> Vec<EdgeRoute> {
        let (first, second) = if revision.is_multiple_of(2) { (x, y) } else { (y, x) };
        let mut routes = vec![route(None, &[first]), route(None, &[second])];
        routes[1].listen_port = TCP_PORT + 1;
        routes
    };
    world.publish(routes(1)).await;
    let (first_port, second_port) = (world.address(TCP_PORT), world.address(TCP_PORT + 1));
    // What was served before a connection began, and what has been offered when it ended, bound what it may see.
    let served = Arc::new(AtomicU64::new(1));
    let offered = Arc::new(AtomicU64::new(1));
    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (served, offered, done) = (Arc::clone(&served), Arc::clone(&offered), Arc::clone(&done));
            tokio::spawn(async move {
                let (mut connections, mut certain) = (0_u64, 0_u64);
                while !done.load(Ordering::Relaxed) {
                    let port = if client % 2 == 0 { first_port } else { second_port };
                    let since = served.load(Ordering::SeqCst);
                    let mut stream = tokio::net::TcpStream::connect(port).await.expect("dropped at connect");
                    let got = exactly(&mut stream, 1).await.expect("dropped");
                    let until = offered.load(Ordering::SeqCst);
                    stream.write_all(b"ping").await.expect("dropped");
                    assert_eq!(exactly(&mut stream, 4).await.expect("dropped"), "ping");
                    let want =
                        |revision: u64| if (revision + client as u64).is_multiple_of(2) { "x" } else { "y" };
                    assert!(
                        (since..=until).any(|revision| want(revision) == got),
                        "{got} in {since}..={until}"
                    );
                    connections += 1;
                    certain += u64::from(since == until);
                }
                (connections, certain)
            })
        })
        .collect();
    for revision in 2..=SWITCHES {
        offered.store(revision, Ordering::SeqCst);
        world.publish(routes(revision)).await;
        served.store(revision, Ordering::SeqCst);
        if revision % 3 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
    done.store(true, Ordering::Relaxed);
    let (mut connections, mut certain) = (0, 0);
    for client in clients {
        let (all, sure) = client.await.unwrap();
        (connections, certain) = (connections + all, certain + sure);
    }
    println!("{connections} connections, of which {certain} within one revision, over {SWITCHES} switches");
    assert!(connections > 0 && certain > 0);
    let metrics = world.status().await.metrics;
    assert_eq!(metrics.tables_applied, SWITCHES);
    assert_eq!(
        (metrics.no_route, metrics.connect_failed, metrics.no_backend, metrics.shed_total),
        (0, 0, 0, 0)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i08_names_that_swap_owners_are_never_answered_by_the_wrong_certificate() {
    let (a, b) = (identity("a.example"), identity("b.example"));
    let mut world = World::new().await;
    let backends_a = [tls_backend(&a, "a1").await, tls_backend(&a, "a2").await];
    let backends_b = [tls_backend(&b, "b1").await, tls_backend(&b, "b2").await];
    let routes = |revision: usize| {
        vec![
            route(Some("a.example"), &[backends_a[revision % 2]]),
            route(Some("b.example"), &[backends_b[(revision + 1) % 2]]),
        ]
    };
    world.publish(routes(1)).await;
    let address = world.address(TLS_PORT);
    let clients: Vec<_> = [("a.example", a), ("b.example", b)]
        .into_iter()
        .map(|(name, identity)| {
            tokio::spawn(async move {
                for _ in 0..50 {
                    let stream = tokio::net::TcpStream::connect(address).await.expect("dropped at connect");
                    let stream = support::world::Dribble { stream, at_a_time: usize::MAX };
                    // Trusts its own name's certificate alone.
                    let offer = Offer { hybrid: true, ..Offer::default() };
                    let mut stream = support::world::handshake(stream, name, &[&identity], offer)
                        .await
                        .expect("misrouted or dropped");
                    assert!(exactly(&mut stream, 2).await.expect("dropped").starts_with(&name[..1]));
                }
            })
        })
        .collect();
    let mut revision = 1;
    while !clients.iter().all(|client| client.is_finished()) {
        revision += 1;
        world.publish(routes(revision)).await;
    }
    for client in clients {
        client.await.unwrap();
    }
    println!("100 handshakes over {revision} switches");
    let metrics = world.status().await.metrics;
    assert_eq!((metrics.no_route, metrics.hello_refused, metrics.connect_failed), (0, 0, 0));
}

#[tokio::test]
async fn a_status_is_asked_of_an_edge_that_runs() {
    let dir = tempfile::TempDir::new().unwrap();
    assert!(matches!(read_status(dir.path()).await, Err(StatusError::Unreachable { .. })));
    let world = World::new().await;
    let status = world.status().await;
    assert_eq!((status.pid, status.version.as_str()), (std::process::id(), env!("CARGO_PKG_VERSION")));
}
