//! Ten thousand switches of the table while connections come, go and stay.
//!
//! The tables are put in force by the same call as an update from the control plane, without its way over the disk.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_edge::listeners::Listeners;
use holdfast_edge::take_over::Inherited;
use holdfast_edge::{Edge, EdgeConfig};
use holdfast_model::agent::EdgeRoute;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use support::tls::{Offer, client_hello};
use support::world::{TLS_PORT, exactly, guarded, plain_backend, route};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

const SWITCHES: u64 = 10_000;
/// After so many switches at least one more connection must have come and gone, so that the two do take turns.
const SWITCHES_PER_CONNECTION: u64 = 20;
/// Connections that come and go at a time, for each name.
const COMING: usize = 4;
/// Longer than the test takes on any machine that it should pass on.
const HANG: Duration = Duration::from_secs(300);

struct Name {
    hostname: &'static str,
    /// What its backends say.
    tag: &'static str,
    backends: Vec<SocketAddr>,
    hello: Vec<u8>,
}

async fn name(hostname: &'static str, tag: &'static [u8]) -> Name {
    let mut backends = Vec::new();
    for _ in 0..3 {
        backends.push(plain_backend(tag).await);
    }
    let hello = client_hello(hostname, Offer::default());
    Name { hostname, tag: str::from_utf8(tag).unwrap(), backends, hello }
}

/// The routes of table `nth`: every name leads to two of its backends, others each time, and many routes beside them
/// come and go, some to the backends of the one name and some of the other.
fn table(nth: u64, names: &[Name]) -> Vec<EdgeRoute> {
    let turn = (nth % 3) as usize;
    let mut routes: Vec<EdgeRoute> = names
        .iter()
        .map(|name| route(Some(name.hostname), &[name.backends[turn], name.backends[(turn + 1) % 3]]))
        .collect();
    for other in 0..nth % 7 {
        let hostname = format!("other-{}.example", nth % 11 + other);
        routes.push(route(Some(&hostname), &names[(nth % 2) as usize].backends));
    }
    if nth.is_multiple_of(2) {
        routes.reverse();
    }
    routes
}

/// A connection that was answered by its own name's backend.
async fn open(edge: SocketAddr, name: &Name) -> TcpStream {
    let mut stream = guarded(TcpStream::connect(edge)).await.unwrap();
    guarded(stream.write_all(&name.hello)).await.unwrap();
    let greeting = exactly(&mut stream, name.tag.len()).await.unwrap();
    assert_eq!(greeting, name.tag, "{} was misrouted", name.hostname);
    let mut echo = vec![0; name.hello.len()];
    guarded(tokio::io::AsyncReadExt::read_exact(&mut stream, &mut echo)).await.unwrap();
    assert!(echo == name.hello, "the hello of {} was changed", name.hostname);
    stream
}

async fn echoes(stream: &mut TcpStream, text: &str) {
    guarded(stream.write_all(text.as_bytes())).await.unwrap();
    assert_eq!(exactly(stream, text.len()).await.unwrap(), text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i08_ten_thousand_switches_under_load_drop_and_misroute_no_connection() {
    let folder = TempDir::new().unwrap();
    let mut config = EdgeConfig::new(folder.path().to_owned());
    config.listen = vec![IpAddr::V4(Ipv4Addr::new(127, (std::process::id() % 100 + 100) as u8, 255, 1))];
    let address = SocketAddr::new(config.listen[0], TLS_PORT);
    let names: &'static [Name] =
        Box::leak(Box::new([name("a.example", b"I am a").await, name("b.example", b"I am b").await]));
    let edge = Edge::new(&config);
    edge.apply(&table(0, names)).unwrap();
    let mut listeners = Listeners::new(edge.clone(), Inherited::new());
    assert!(listeners.reconcile().await, "{:?}", listeners.state());

    let mut staying = Vec::new();
    for name in names {
        staying.push(open(address, name).await);
    }
    let (came, mut coming) = watch::channel(0_u64);
    let (over, ended) = watch::channel(false);
    let mut clients = JoinSet::new();
    for name in names.iter().cycle().take(COMING * names.len()) {
        let (came, ended) = (came.clone(), ended.clone());
        clients.spawn(async move {
            while !*ended.borrow() {
                let mut stream = open(address, name).await;
                echoes(&mut stream, "and on").await;
                stream.shutdown().await.unwrap();
                let rest = support::world::all(&mut stream).await;
                assert!(rest.is_empty(), "{rest:?}");
                came.send_modify(|came| *came += 1);
            }
        });
    }
    let switching = async {
        for nth in 1..=SWITCHES {
            edge.apply(&table(nth, names)).unwrap();
            if nth % SWITCHES_PER_CONNECTION == 0 {
                let before = *coming.borrow_and_update();
                coming.wait_for(|came| *came > before).await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        done = tokio::time::timeout(HANG, switching) => done.expect("no connection comes through any more"),
        // A client ends before it is told to by failing alone.
        failed = clients.join_next() => panic!("{failed:?}"),
    }
    over.send_replace(true);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    for stream in &mut staying {
        echoes(stream, "still here").await;
    }
    drop(staying);

    let came = *came.borrow();
    assert!(came >= SWITCHES / SWITCHES_PER_CONNECTION);
    listeners.stop(HANG, std::future::pending()).await;
    let metrics = edge.metrics();
    println!("{came} connections over {} tables", metrics.tables_applied.get());
    assert_eq!(metrics.tables_applied.get(), SWITCHES + 1);
    assert_eq!(metrics.accepted.get(), came + names.len() as u64);
    assert_eq!(metrics.relayed.get(), came + names.len() as u64);
    assert_eq!(
        (metrics.relayed_reset.get(), metrics.no_route.get(), metrics.connect_failed.get()),
        (0, 0, 0)
    );
}
