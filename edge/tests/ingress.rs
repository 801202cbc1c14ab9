//! Clients, the edge and backends over real sockets: what is routed, what is closed, what is balanced.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_edge::EdgeConfig;
use holdfast_edge::proxy_protocol::{Decoded, decode};
use holdfast_model::agent::ProxyProtocol;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::tls::{Offer, client_hello, identity};
use support::world::{
    Dribble, TCP_PORT, TLS_PORT, World, accept_used, all, exactly, guarded, handshake, listener,
    plain_backend, route, serve_plain, tls_backend, until,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

#[tokio::test]
async fn i08_tls_connections_reach_the_backend_of_their_name_unterminated() {
    let (a, b) = (identity("a.example"), identity("b.example"));
    let mut world = World::new().await;
    let routes = vec![
        route(Some("a.example"), &[tls_backend(&a, "I am a").await]),
        route(Some("b.example"), &[tls_backend(&b, "I am b").await]),
    ];
    world.publish(routes).await;
    let offers = [
        Offer::default(),
        Offer { hybrid: true, ..Offer::default() },
        Offer { fragment: Some(33), hybrid: true, ..Offer::default() },
        Offer { alpn_bytes: 50_000, hybrid: true, ..Offer::default() },
    ];
    for offer in offers {
        for (name, identity, greeting) in [("a.example", &a, "I am a"), ("b.example", &b, "I am b")] {
            // The client trusts the one certificate alone, so that nobody else can have answered.
            let mut stream = world.tls(name, &[identity], offer).await.unwrap();
            assert_eq!(exactly(&mut stream, 6).await.unwrap(), greeting);
            stream.write_all(b"echo").await.unwrap();
            assert_eq!(exactly(&mut stream, 4).await.unwrap(), "echo");
            stream.shutdown().await.unwrap();
            assert!(all(&mut stream).await.is_empty());
        }
    }
}

#[tokio::test]
async fn a_hello_of_one_byte_a_segment_is_routed() {
    let a = identity("a.example");
    let mut world = World::new().await;
    world.publish(vec![route(Some("a.example"), &[tls_backend(&a, "I am a").await])]).await;
    let stream = world.tcp(TLS_PORT).await;
    stream.set_nodelay(true).unwrap();
    let offer = Offer { hybrid: true, fragment: Some(100), ..Offer::default() };
    let mut stream = handshake(Dribble { stream, at_a_time: 1 }, "a.example", &[&a], offer).await.unwrap();
    assert_eq!(exactly(&mut stream, 6).await.unwrap(), "I am a");
}

#[tokio::test]
async fn i08_what_has_no_route_of_its_own_is_closed() {
    let mut world = World::new().await;
    let (backend, address) = listener().await;
    world.publish(vec![route(Some("a.example"), &[address])]).await;
    let mut proxied = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 8443\r\n".to_vec();
    proxied.extend_from_slice(&client_hello("a.example", Offer::default()));
    for bytes in [client_hello("b.example", Offer::default()), b"GET / HTTP/1.1\r\n\r\n".to_vec(), proxied] {
        let mut stream = world.tcp(TLS_PORT).await;
        stream.write_all(&bytes).await.unwrap();
        assert!(all(&mut stream).await.is_empty());
    }
    // An address is no host name, so that rustls sends no server_name.
    let mut stream = world.tcp(TLS_PORT).await;
    stream.write_all(&client_hello("192.0.2.1", Offer::default())).await.unwrap();
    assert!(all(&mut stream).await.is_empty());
    let metrics = world.status().await.metrics;
    assert_eq!((metrics.no_route, metrics.hello_refused, metrics.no_server_name), (1, 2, 1));
    assert_eq!((metrics.relayed, metrics.bytes_to_backends), (0, 0));
    drop(backend);
}

#[tokio::test]
async fn a_client_that_is_slow_with_its_hello_is_closed() {
    let mut world = World::with(|config| {
        config.limits.hello_total = Duration::from_millis(300);
        config.limits.hello_gap = Duration::from_millis(100);
    })
    .await;
    world.publish(vec![route(Some("a.example"), &[plain_backend(b"").await])]).await;
    let hello = client_hello("a.example", Offer { alpn_bytes: 60_000, ..Offer::default() });

    let mut silent = world.tcp(TLS_PORT).await;
    assert!(all(&mut silent).await.is_empty());
    let mut stuck = world.tcp(TLS_PORT).await;
    stuck.write_all(&hello[..50]).await.unwrap();
    assert!(all(&mut stuck).await.is_empty());
    // Never pausing for long, never done.
    let mut dribbling = world.tcp(TLS_PORT).await;
    dribbling.set_nodelay(true).unwrap();
    guarded(async {
        for byte in &hello {
            if dribbling.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the edge took a hello of {} slow bytes", hello.len());
    })
    .await;
    assert_eq!(world.status().await.metrics.hello_timed_out, 3);
}

#[tokio::test]
async fn a_refused_connection_goes_to_another_backend_and_the_refuser_leaves_rotation_until_it_is_back() {
    let mut world = World::new().await;
    let (dead, dead_address) = listener().await;
    drop(dead);
    let alive = plain_backend(b"alive").await;
    world.publish(vec![route(None, &[dead_address, alive])]).await;
    for _ in 0..20 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 5).await.unwrap(), "alive");
    }
    let standing = async |world: &World| {
        let status = world.status().await;
        status.routes[0].backends.iter().find(|b| b.address == dead_address).unwrap().in_rotation
    };
    // By a client or by a probe, whichever came first.
    until(async || !standing(&world).await).await;
    let before = world.status().await.metrics.connect_attempts_failed;
    for _ in 0..20 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 5).await.unwrap(), "alive");
    }
    assert_eq!(world.status().await.metrics.connect_attempts_failed, before, "it was tried again");

    let back = tokio::net::TcpListener::bind(dead_address).await.unwrap();
    serve_plain(back, b"again");
    until(async || standing(&world).await).await;
    until(async || exactly(&mut world.tcp(TCP_PORT).await, 5).await.unwrap() == "again").await;
}

#[tokio::test]
async fn i05_the_edge_sees_by_itself_that_a_backend_died_and_came_back() {
    let mut world = World::with(|config| config.limits.probe_healthy = Duration::from_millis(20)).await;
    let (backend, address) = listener().await;
    world.publish(vec![route(None, &[address])]).await;
    let in_rotation = async |world: &World| world.status().await.routes[0].backends[0].in_rotation;
    until(async || world.status().await.metrics.probes >= 3).await;
    assert!(in_rotation(&world).await);
    drop(backend);
    until(async || !in_rotation(&world).await).await;
    let _back = tokio::net::TcpListener::bind(address).await.unwrap();
    until(async || in_rotation(&world).await).await;
    let metrics = world.status().await.metrics;
    assert_eq!(metrics.accepted, 0);
    assert!(metrics.backends_left_rotation >= 1 && metrics.backends_back_in_rotation >= 1);
}

#[tokio::test]
async fn a_backend_that_does_not_answer_is_given_up_for_another() {
    let mut world = World::with(|config| config.limits.connect = Duration::from_millis(100)).await;
    // Its queue is full, so that Linux drops every further SYN.
    let silent = tokio::net::TcpSocket::new_v6().unwrap();
    silent.bind("[::1]:0".parse().unwrap()).unwrap();
    let silent = silent.listen(0).unwrap();
    let silent_address = silent.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(silent_address)).await
    {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue never fills");
    }
    let alive = plain_backend(b"alive").await;
    world.publish(vec![route(None, &[silent_address, alive])]).await;
    for _ in 0..10 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 5).await.unwrap(), "alive");
    }
    until(async || {
        let status = world.status().await;
        status.routes[0].backends.iter().all(|b| b.in_rotation == (b.address == alive))
    })
    .await;
}

#[tokio::test]
async fn a_route_whose_backends_are_all_gone_closes_its_clients() {
    let mut world = World::new().await;
    let (dead, address) = listener().await;
    drop(dead);
    world.publish(vec![route(None, &[address])]).await;
    assert!(all(&mut world.tcp(TCP_PORT).await).await.is_empty());
    assert_eq!(world.status().await.metrics.connect_failed, 1);
    world.publish(vec![route(None, &[])]).await;
    assert!(all(&mut world.tcp(TCP_PORT).await).await.is_empty());
    assert_eq!(world.status().await.metrics.no_backend, 1);
}

#[tokio::test]
async fn a_draining_backend_gets_connections_only_when_it_is_the_last() {
    let mut world = World::new().await;
    let (old, new) = (plain_backend(b"old").await, plain_backend(b"new").await);
    let mut both = route(None, &[old, new]);
    both.backends[0].draining = true;
    world.publish(vec![both.clone()]).await;
    for _ in 0..20 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 3).await.unwrap(), "new");
    }
    both.backends.truncate(1);
    world.publish(vec![both]).await;
    assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 3).await.unwrap(), "old");
}

#[tokio::test]
async fn a_backend_that_asked_for_it_is_told_the_client_by_proxy_v2() {
    let mut world = World::new().await;
    let (tls, tls_address) = listener().await;
    let (tcp, tcp_address) = listener().await;
    let mut routes = vec![route(Some("a.example"), &[tls_address]), route(None, &[tcp_address])];
    for route in &mut routes {
        route.proxy_protocol = ProxyProtocol::V2;
    }
    world.publish(routes).await;
    let hello = client_hello("a.example", Offer { hybrid: true, ..Offer::default() });
    // On a raw port, a header of the client's own is payload behind ours.
    let forged = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec();
    for (backend, port, payload, authority) in
        [(tls, TLS_PORT, hello, Some("a.example".to_owned())), (tcp, TCP_PORT, forged, None)]
    {
        let mut client = world.tcp(port).await;
        client.write_all(&payload).await.unwrap();
        client.shutdown().await.unwrap();
        let mut stream = accept_used(&backend).await;
        let got = all(&mut stream).await;
        let Ok(Decoded::Proxy { header, length }) = decode(&got) else { panic!("{got:?}") };
        assert_eq!(&got[length..], payload);
        assert_eq!(header.source, client.local_addr().unwrap());
        assert_eq!((header.destination, header.authority), (world.address(port), authority));
        assert_eq!(header.unique_id.unwrap().len(), 26);
    }
}

#[tokio::test]
async fn by_default_both_address_families_are_served_on_one_socket() {
    let port = 20_000 + (std::process::id() % 10_000) as u16;
    let mut world = World::with(|config| config.listen = EdgeConfig::new("".into()).listen).await;
    let (backend, address) = listener().await;
    let mut route = route(None, &[address]);
    (route.proxy_protocol, route.listen_port) = (ProxyProtocol::V2, port);
    world.publish(vec![route]).await;
    for host in ["127.0.0.1", "::1"] {
        let edge = SocketAddr::new(host.parse().unwrap(), port);
        let mut client = guarded(TcpStream::connect(edge)).await.unwrap();
        client.shutdown().await.unwrap();
        let got = all(&mut accept_used(&backend).await).await;
        let Ok(Decoded::Proxy { header, .. }) = decode(&got) else { panic!("{got:?}") };
        // An IPv4 client is told as one, not as an address mapped into IPv6.
        assert_eq!((header.source, header.destination), (client.local_addr().unwrap(), edge));
    }
}

#[tokio::test]
async fn a_source_with_too_many_connections_is_shed_and_nobody_else() {
    let mut world = World::with(|config| config.limits.connections_per_source = 2).await;
    world.publish(vec![route(None, &[plain_backend(b"hi").await])]).await;
    let mut first = world.tcp(TCP_PORT).await;
    let mut second = world.tcp(TCP_PORT).await;
    for stream in [&mut first, &mut second] {
        assert_eq!(exactly(stream, 2).await.unwrap(), "hi");
    }
    assert!(all(&mut world.tcp(TCP_PORT).await).await.is_empty());
    let other_source = tokio::net::TcpSocket::new_v4().unwrap();
    other_source.bind("127.9.9.9:0".parse().unwrap()).unwrap();
    let mut other = guarded(other_source.connect(world.address(TCP_PORT))).await.unwrap();
    assert_eq!(exactly(&mut other, 2).await.unwrap(), "hi");
    let status = world.status().await;
    assert_eq!((status.metrics.shed_source, status.connections), (1, 3));
    drop(first);
    until(async || exactly(&mut world.tcp(TCP_PORT).await, 2).await.is_ok()).await;
}

#[tokio::test]
async fn ports_follow_the_table_and_connections_outlive_them() {
    let mut world = World::new().await;
    let backend = plain_backend(b"hi").await;
    world.publish(vec![route(None, &[backend])]).await;
    let mut stream = world.tcp(TCP_PORT).await;
    assert_eq!(exactly(&mut stream, 2).await.unwrap(), "hi");

    let mut moved = route(None, &[backend]);
    moved.listen_port = TCP_PORT + 1;
    world.publish(vec![moved.clone()]).await;
    let refused = TcpStream::connect(world.address(TCP_PORT)).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(exactly(&mut world.tcp(TCP_PORT + 1).await, 2).await.unwrap(), "hi");
    stream.write_all(b"still here").await.unwrap();
    assert_eq!(exactly(&mut stream, 10).await.unwrap(), "still here");

    // Somebody else has the port: the others serve, and it is opened once it is free.
    let taken: SocketAddr = world.address(TCP_PORT);
    let squatter = std::net::TcpListener::bind(taken).unwrap();
    world.publish(vec![moved, route(None, &[backend])]).await;
    assert!(world.status().await.not_listening.contains_key(&taken));
    assert_eq!(exactly(&mut world.tcp(TCP_PORT + 1).await, 2).await.unwrap(), "hi");
    drop(squatter);
    until(async || world.status().await.listening.contains(&taken)).await;
    assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
    assert!(world.status().await.not_listening.is_empty());
}

#[tokio::test]
async fn many_clients_at_once_all_get_their_own_bytes() {
    let mut world = World::new().await;
    let backends = [plain_backend(b"").await, plain_backend(b"").await, plain_backend(b"").await];
    world.publish(vec![route(None, &backends)]).await;
    let world = Arc::new(world);
    let clients: Vec<_> = (0..200_u32)
        .map(|client| {
            let world = Arc::clone(&world);
            tokio::spawn(async move {
                let mine = client.to_string().repeat(1000);
                let mut stream = world.tcp(TCP_PORT).await;
                stream.write_all(mine.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
                assert_eq!(all(&mut stream).await, mine.as_bytes());
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    until(async || world.status().await.connections == 0).await;
    let status = world.status().await;
    assert_eq!((status.metrics.relayed, status.metrics.relayed_reset), (200, 0));
    assert!(status.routes[0].backends.iter().all(|b| b.connections == 0));
}
