//! How a relayed connection moves bytes and ends, spliced and copied alike.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use std::io::ErrorKind;
use std::time::Duration;
use support::world::{TCP_PORT, World, accept_used, all, guarded, listener, route, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};

/// More than every buffer between two ends holds together, and no multiple of any.
const BULK_BYTES: usize = (24 << 20) + 12_345;

/// An edge with one TCP route, a client through it, and the backend's end of that connection.
async fn connected(zero_copy: bool) -> (World, TcpListener, TcpStream, TcpStream) {
    let mut world = World::with(|config| config.zero_copy = zero_copy).await;
    let (backend, address) = listener().await;
    world.publish(vec![route(None, &[address])]).await;
    let mut client = world.tcp(TCP_PORT).await;
    client.write_all(b"!").await.unwrap();
    let mut server = accept_used(&backend).await;
    assert_eq!(guarded(server.read_u8()).await.unwrap(), b'!');
    (world, backend, client, server)
}

/// Bytes that show when any is lost, doubled or moved.
fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed;
    (0..BULK_BYTES)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

async fn bulk_arrives_whole_both_ways_at_once(zero_copy: bool) {
    let (world, _backend, mut client, mut server) = connected(zero_copy).await;
    let (up, down) = (pattern(1), pattern(2));
    let (mut client_read, mut client_write) = client.split();
    let (mut server_read, mut server_write) = server.split();
    let send_up = async {
        client_write.write_all(&up).await.unwrap();
        client_write.shutdown().await.unwrap();
    };
    let send_down = async {
        server_write.write_all(&down).await.unwrap();
        server_write.shutdown().await.unwrap();
    };
    let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
    let (_, _, up_read, down_read) = guarded(async {
        tokio::join!(
            send_up,
            send_down,
            server_read.read_to_end(&mut got_up),
            client_read.read_to_end(&mut got_down)
        )
    })
    .await;
    assert_eq!((up_read.unwrap(), down_read.unwrap()), (BULK_BYTES, BULK_BYTES));
    assert!(got_up == up && got_down == down, "{} bytes up, {} down", got_up.len(), got_down.len());
    until(async || world.status().await.connections == 0).await;
    let metrics = world.status().await.metrics;
    assert_eq!(metrics.bytes_to_backends, 1 + BULK_BYTES as u64);
    assert_eq!(metrics.bytes_to_clients, BULK_BYTES as u64);
    assert_eq!((metrics.relayed, metrics.relayed_reset), (1, 0));
    // How much was spliced depends on how the bytes arrived; that some was does not.
    assert_eq!(metrics.bytes_spliced > BULK_BYTES as u64 / 2, zero_copy, "{} spliced", metrics.bytes_spliced);
}

#[tokio::test]
async fn bulk_arrives_whole_when_spliced() {
    bulk_arrives_whole_both_ways_at_once(true).await;
}

#[tokio::test]
async fn bulk_arrives_whole_when_copied() {
    bulk_arrives_whole_both_ways_at_once(false).await;
}

#[tokio::test]
async fn a_side_that_finished_sending_still_receives() {
    for zero_copy in [true, false] {
        let (_world, _backend, mut client, mut server) = connected(zero_copy).await;
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(all(&mut server).await, b"question");
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(all(&mut client).await, b"answer");

        let (_world, _backend, mut client, mut server) = connected(zero_copy).await;
        server.write_all(b"greeting").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(all(&mut client).await, b"greeting");
        client.write_all(b"late").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(all(&mut server).await, b"late");
    }
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
    drop(stream);
}

async fn is_reset(stream: &mut TcpStream) -> bool {
    matches!(guarded(stream.read_u8()).await, Err(error) if error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset() {
    let (_world, _backend, client, mut server) = connected(true).await;
    reset(client);
    assert!(is_reset(&mut server).await);

    let (world, _backend, mut client, server) = connected(true).await;
    reset(server);
    assert!(is_reset(&mut client).await);
    until(async || world.status().await.metrics.relayed_reset == 1).await;
}

#[tokio::test]
async fn a_reset_after_the_end_of_sending_arrives_although_the_other_side_is_silent() {
    let (_world, _backend, mut client, mut server) = connected(true).await;
    client.shutdown().await.unwrap();
    assert!(all(&mut server).await.is_empty());
    reset(client);
    // The server sends nothing; it learns of it because the edge tells it.
    guarded(server.ready(Interest::ERROR)).await.unwrap();
    // Linux calls a reset after a FIN EPIPE.
    assert_eq!(server.take_error().unwrap().unwrap().kind(), ErrorKind::BrokenPipe);

    let (_world, _backend, mut client, mut server) = connected(true).await;
    server.shutdown().await.unwrap();
    assert!(all(&mut client).await.is_empty());
    reset(server);
    guarded(client.ready(Interest::ERROR)).await.unwrap();
    // Linux calls a reset after a FIN EPIPE.
    assert_eq!(client.take_error().unwrap().unwrap().kind(), ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn an_answer_sent_before_a_reset_still_arrives() {
    let (_world, _backend, mut client, mut server) = connected(true).await;
    // The server answers and closes without reading what the client is still sending: its end is a reset.
    client.write_all(b"ignored").await.unwrap();
    guarded(server.readable()).await.unwrap();
    server.write_all(b"413 too large").await.unwrap();
    let mut answer = [0; 13];
    guarded(client.read_exact(&mut answer)).await.unwrap();
    drop(server);
    assert_eq!(&answer, b"413 too large");
    assert!(is_reset(&mut client).await);
}

#[tokio::test]
async fn an_idle_connection_is_closed_on_both_sides() {
    let mut world = World::with(|config| {
        config.limits.idle = Duration::from_millis(100);
        config.limits.idle_half_closed = Duration::from_millis(100);
    })
    .await;
    let (backend, address) = listener().await;
    world.publish(vec![route(None, &[address])]).await;
    let mut client = world.tcp(TCP_PORT).await;
    client.write_all(b"!").await.unwrap();
    let mut server = accept_used(&backend).await;
    assert_eq!(all(&mut server).await, b"!");
    assert!(is_reset(&mut client).await);

    let mut client = world.tcp(TCP_PORT).await;
    client.write_all(b"!").await.unwrap();
    client.shutdown().await.unwrap();
    let mut server = accept_used(&backend).await;
    assert_eq!(all(&mut server).await, b"!");
    until(async || world.status().await.metrics.relayed_idle == 2).await;
}
