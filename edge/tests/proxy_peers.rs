//! PROXY v2 with HAProxy and nginx: as receivers of what the edge sends, and as senders of what our decoder reads.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_edge::proxy_protocol::{Decoded, ProxyHeader, ProxyHeaderError, decode};
use holdfast_model::agent::ProxyProtocol;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use support::programs::{free_port, haproxy, nginx};
use support::tls::{Offer, identity};
use support::world::{Dribble, TCP_PORT, TLS_PORT, World, all, guarded, handshake, listener, route};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const REQUEST: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

/// An edge on this loopback address; on IPv4, on one of its own. There is one of IPv6 alone, so that tests there use ports
/// of their own.
async fn world_of(address: IpAddr) -> World {
    World::with(|config| {
        config.listen = if address.is_ipv6() { vec![address] } else { config.listen.clone() }
    })
    .await
}

fn last_line(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer).lines().last().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn haproxy_takes_the_header_with_both_families_and_our_tlvs() {
    let (folder, identity) = (TempDir::new().unwrap(), identity("a.example"));
    let certificate = folder.path().join("a.pem");
    std::fs::write(&certificate, format!("{}{}", identity.certificate_pem, identity.key_pem)).unwrap();
    let (plain, tls) = (free_port().await, free_port().await);
    let certificate = certificate.display();
    let says = "lf-string \"%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority] %[fc_pp_unique_id]\"";
    let configuration = format!(
        "frontend f\n mode http\n bind {plain} accept-proxy\n bind {tls} accept-proxy ssl crt {certificate}\n \
         http-request return status 200 content-type text/plain {says}\n"
    );
    let _haproxy = haproxy(folder.path(), &configuration, &[plain, tls]).await;
    for address in [IpAddr::from([127, 0, 0, 1]), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let mut world = world_of(address).await;
        let mut routes = vec![route(None, &[plain]), route(Some("a.example"), &[tls])];
        for route in &mut routes {
            route.proxy_protocol = ProxyProtocol::V2;
        }
        world.publish(routes).await;

        let mut client = world.tcp(TCP_PORT).await;
        let (mine, edge) = (client.local_addr().unwrap(), world.address(TCP_PORT));
        client.write_all(REQUEST).await.unwrap();
        let heard = last_line(&all(&mut client).await);
        let ends = format!("{} {} {} {} ", mine.ip(), mine.port(), edge.ip(), edge.port());
        let id = heard.strip_prefix(&ends).unwrap_or_else(|| panic!("{heard:?} is not {ends:?}"));
        // No name was asked for on a raw port.
        assert_eq!(id.trim_start_matches("- ").trim().len(), 26, "{heard:?}");

        let stream = world.tcp(TLS_PORT).await;
        let (mine, edge) = (stream.local_addr().unwrap(), world.address(TLS_PORT));
        let stream = Dribble { stream, at_a_time: usize::MAX };
        let mut client = handshake(stream, "a.example", &[&identity], Offer::default()).await.unwrap();
        client.write_all(REQUEST).await.unwrap();
        let heard = last_line(&all(&mut client).await);
        let ends = format!("{} {} {} {} a.example ", mine.ip(), mine.port(), edge.ip(), edge.port());
        let id = heard.strip_prefix(&ends).unwrap_or_else(|| panic!("{heard:?} is not {ends:?}"));
        assert_eq!(id.len(), 26, "{heard:?}");
    }
}

#[tokio::test]
async fn nginx_takes_the_header_with_both_families() {
    let (folder, plain) = (TempDir::new().unwrap(), free_port().await);
    let says =
        "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port";
    let stream = format!("server {{ listen {plain} proxy_protocol; return \"{says}\"; }}");
    let _nginx = nginx(folder.path(), &stream, &[plain]).await;
    for address in [IpAddr::from([127, 0, 0, 1]), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let mut world = world_of(address).await;
        let mut route = route(None, &[plain]);
        // HAProxy's test may have the other one of this loopback address.
        route.listen_port = TCP_PORT + 1;
        route.proxy_protocol = ProxyProtocol::V2;
        world.publish(vec![route]).await;
        let mut client = world.tcp(TCP_PORT + 1).await;
        let (mine, edge) = (client.local_addr().unwrap(), world.address(TCP_PORT + 1));
        let heard = all(&mut client).await;
        let want = format!("{} {} {} {}", mine.ip(), mine.port(), edge.ip(), edge.port());
        assert_eq!(String::from_utf8_lossy(&heard), want);
    }
}

/// The next connection's bytes that begin with something, to the end of what `decode` wants.
async fn header_of(listener: &TcpListener) -> (Result<Decoded, ProxyHeaderError>, TcpStream, Vec<u8>) {
    let (mut stream, _) = guarded(listener.accept()).await.unwrap();
    let mut got = Vec::new();
    loop {
        match decode(&got) {
            Ok(Decoded::NeedMore) => {
                assert_ne!(guarded(stream.read_buf(&mut got)).await.unwrap(), 0, "{got:?}")
            }
            read => return (read, stream, got),
        }
    }
}

#[tokio::test]
async fn our_decoder_reads_what_haproxy_sends() {
    let (folder, identity) = (TempDir::new().unwrap(), identity("a.example"));
    let certificate = folder.path().join("a.pem");
    std::fs::write(&certificate, format!("{}{}", identity.certificate_pem, identity.key_pem)).unwrap();
    let (receiver, to) = listener().await;
    let (v6, front) = (free_port().await, free_port().await.port());
    let v4 = SocketAddr::from(([127, 0, 0, 1], front));
    let certificate = certificate.display();
    let options = "ssl,cert-cn,ssl-cipher,crc32c,unique-id,authority";
    let configuration = format!(
        "frontend f\n mode tcp\n bind {v4} ssl crt {certificate}\n bind {v6} ssl crt {certificate}\n unique-id-format %pid-%rt\n \
         default_backend b\nbackend b\n mode tcp\n server s {to} send-proxy-v2 proxy-v2-options {options}\n"
    );
    let _haproxy = haproxy(folder.path(), &configuration, &[v4, v6]).await;
    for address in [v4, v6] {
        let stream = guarded(TcpStream::connect(address)).await.unwrap();
        let mine = stream.local_addr().unwrap();
        let stream = Dribble { stream, at_a_time: usize::MAX };
        let mut client = handshake(stream, "a.example", &[&identity], Offer::default()).await.unwrap();
        client.write_all(b"payload").await.unwrap();
        let (read, mut server, mut got) = header_of(&receiver).await;
        let Ok(Decoded::Proxy { header: ProxyHeader { source, destination, authority, unique_id }, length }) =
            read
        else {
            panic!("{read:?}: {got:?}")
        };
        assert_eq!((source, destination), (mine, address));
        assert_eq!(authority.as_deref(), Some("a.example"));
        assert!(unique_id.as_ref().is_some_and(|id| id.contains('-')), "{unique_id:?}");
        while got.len() < length + 7 {
            assert_ne!(guarded(server.read_buf(&mut got)).await.unwrap(), 0);
        }
        assert_eq!(&got[length..], b"payload");
    }
}

#[tokio::test]
async fn our_decoder_knows_haproxys_health_checks_as_local() {
    let folder = TempDir::new().unwrap();
    let (receiver, to) = listener().await;
    let front = free_port().await;
    let configuration = format!(
        "listen l\n mode tcp\n bind {front}\n option tcp-check\n tcp-check connect send-proxy\n tcp-check send checked\n \
         server s {to} check inter 100ms send-proxy-v2 check-send-proxy\n"
    );
    let _haproxy = haproxy(folder.path(), &configuration, &[]).await;
    let (read, _stream, got) = header_of(&receiver).await;
    assert!(matches!(read, Ok(Decoded::Local { .. })), "{read:?}: {got:?}");
}

/// Debian's nginx sends version 1 alone: that it is not ours must be said, not guessed at.
#[tokio::test]
async fn our_decoder_refuses_the_version_1_that_nginx_sends() {
    let folder = TempDir::new().unwrap();
    let (receiver, to) = listener().await;
    let front = free_port().await;
    let stream = format!("server {{ listen {front}; proxy_pass {to}; proxy_protocol on; }}");
    let _nginx = nginx(folder.path(), &stream, &[]).await;
    support::world::until(async || TcpStream::connect(front).await.is_ok()).await;
    let (read, _stream, got) = header_of(&receiver).await;
    assert!(got.starts_with(b"PROXY TCP6 ::1 ::1 "), "{got:?}");
    assert_eq!(read, Err(ProxyHeaderError::Signature));
}
