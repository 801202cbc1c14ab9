//! One edge takes over from another in the same folder, and nobody notices.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod support;

use holdfast_edge::EdgeConfig;
use holdfast_edge::agent::{EdgeError, REPLICA_FILE};
use holdfast_edge::process::{Standing, run};
use holdfast_edge::take_over::{TAKE_OVER_SOCKET, TakeOverError, take};
use holdfast_model::agent::{EdgeRoute, Frame, Stamp};
use holdfast_model::{Incarnation, Revision};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use support::member::{Member, Trust};
use support::tls::identity;
use support::world::{
    TCP_PORT, TLS_PORT, World, cluster, exactly, guarded, plain_backend, route, tls_backend, until,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An edge as a process of its own would be.
struct Process {
    task: JoinHandle<Result<(), EdgeError>>,
    stop: watch::Sender<bool>,
    standing: watch::Receiver<Standing>,
}

impl Process {
    fn start(config: &EdgeConfig, client: Option<holdfast_client::Client>) -> Self {
        let (stop, shutdown) = watch::channel(false);
        let (standing, stands) = watch::channel(Standing::Starting);
        let task = tokio::spawn(run(config.clone(), cluster(), client, shutdown, standing));
        Self { task, stop, standing: stands }
    }

    async fn is(&mut self, wanted: Standing) {
        guarded(self.standing.wait_for(|standing| *standing == wanted)).await.unwrap();
    }

    async fn stops(self) {
        self.stop.send_replace(true);
        guarded(self.task).await.unwrap().unwrap();
    }
}

/// A world whose edge has ended, with two routes on its disk.
async fn with_routes() -> World {
    let mut world = World::with(|config| config.limits.take_over = Duration::from_millis(500)).await;
    let named = tls_backend(&identity("a.example"), "I am a").await;
    world.publish(vec![route(None, &[plain_backend(b"hi").await]), route(Some("a.example"), &[named])]).await;
    world.end().await;
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i05_five_successors_take_over_under_load_and_no_connection_is_refused_or_cut() {
    let world = with_routes().await;
    let mut serving = Process::start(&world.config, None);
    serving.is(Standing::Serving { took_over: false }).await;
    let (done, exchanges) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (done, exchanges, address) = (done.clone(), exchanges.clone(), world.address(TCP_PORT));
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    stream.write_all(b" there").await.unwrap();
                    assert_eq!(exactly(&mut stream, 8).await.unwrap(), "hi there");
                    exchanges.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut gone = Vec::new();
    let mut long = Vec::new();
    for _ in 0..5 {
        let mut stream = world.tcp(TCP_PORT).await;
        assert_eq!(exactly(&mut stream, 2).await.unwrap(), "hi");
        long.push(stream);
        let before = exchanges.load(Ordering::Relaxed);
        let mut successor = Process::start(&world.config, None);
        successor.is(Standing::Serving { took_over: true }).await;
        serving.is(Standing::Left).await;
        assert_eq!(world.status().await.listening.len(), 2, "the successor answers for the status");
        until(async || exchanges.load(Ordering::Relaxed) > before + 8).await;
        gone.push(std::mem::replace(&mut serving, successor));
    }
    done.store(true, Ordering::Relaxed);
    for client in clients {
        guarded(client).await.unwrap();
    }
    // What began with an edge that left goes on to its end, and with it that edge ends.
    for (mut stream, edge) in long.into_iter().zip(gone) {
        assert!(!edge.task.is_finished());
        stream.write_all(b"still here").await.unwrap();
        assert_eq!(exactly(&mut stream, 10).await.unwrap(), "still here");
        drop(stream);
        guarded(edge.task).await.unwrap().unwrap();
    }
    serving.stops().await;
    assert!(TcpStream::connect(world.address(TLS_PORT)).await.is_err(), "the ports are closed in the end");
}

#[tokio::test]
async fn i05_an_edge_that_left_ends_when_it_is_told_although_a_connection_is_open() {
    let mut world = with_routes().await;
    world.config.limits.shutdown = Duration::from_millis(50);
    let mut old = Process::start(&world.config, None);
    old.is(Standing::Serving { took_over: false }).await;
    let mut stream = world.tcp(TCP_PORT).await;
    assert_eq!(exactly(&mut stream, 2).await.unwrap(), "hi");
    let mut new = Process::start(&world.config, None);
    new.is(Standing::Serving { took_over: true }).await;
    old.is(Standing::Left).await;
    old.stops().await;
    assert_eq!(guarded(stream.read(&mut [0; 8])).await.unwrap_or(0), 0);
    assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
    new.stops().await;
}

fn snapshot(revision: u64, routes: Vec<EdgeRoute>) -> Vec<Frame<EdgeRoute>> {
    let stamp = Stamp { cluster: cluster(), incarnation: Incarnation(0), revision: Revision(revision) };
    let begin = Frame::SnapshotBegin { stamp, items: routes.len() as u64, confirmed_through: stamp.revision };
    vec![begin, Frame::SnapshotItems(routes), Frame::SnapshotEnd]
}

#[tokio::test]
async fn i05_an_edge_whose_successor_dies_serves_and_follows_on() {
    let world = with_routes().await;
    let trust = Trust::new();
    let member_address = world.address(7443);
    let client = trust.edge_client(member_address);
    let mut edge = Process::start(&world.config, Some(client));
    edge.is(Standing::Serving { took_over: false }).await;
    // One that takes the ports and dies, one that dies at once, one that says something else.
    let (sockets, taken) = take(&world.config.data_dir).await.unwrap().unwrap();
    assert_eq!(sockets.len(), 2);
    drop((sockets, taken));
    let door = world.config.data_dir.join(TAKE_OVER_SOCKET);
    drop(UnixStream::connect(&door).await.unwrap());
    let mut other = UnixStream::connect(&door).await.unwrap();
    other.write_all(b"no").await.unwrap();
    for _ in 0..20 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
    }
    // It follows again: a control plane that appears only now is heard.
    let later = route(None, &[plain_backend(b"later").await]);
    let _member = Member::start(&trust, member_address, snapshot(9, vec![later])).await;
    until(async || {
        let mut stream = world.tcp(TCP_PORT).await;
        exactly(&mut stream, 2).await.is_ok_and(|said| said == "la")
    })
    .await;
    assert_eq!(world.status().await.serving.unwrap().revision, Revision(9));
    edge.stops().await;
}

#[tokio::test]
async fn i05_a_successor_that_does_not_know_what_is_served_does_not_take_over() {
    let world = with_routes().await;
    let mut edge = Process::start(&world.config, None);
    edge.is(Standing::Serving { took_over: false }).await;
    // The one that runs has its routes; whoever comes next finds none on the disk.
    std::fs::remove_file(world.config.data_dir.join(REPLICA_FILE)).unwrap();
    let successor = Process::start(&world.config, None);
    let refused = guarded(successor.task).await.unwrap().unwrap_err();
    assert!(matches!(refused, EdgeError::TakeOver(TakeOverError::Behind(_))), "{refused:?}");
    assert_eq!(*edge.standing.borrow(), Standing::Serving { took_over: false });
    for _ in 0..20 {
        assert_eq!(exactly(&mut world.tcp(TCP_PORT).await, 2).await.unwrap(), "hi");
    }
    until(async || holdfast_edge::introspect::read_status(&world.config.data_dir).await.is_ok()).await;
    assert_eq!(world.status().await.serving.unwrap().revision, Revision(1));
    edge.stops().await;
}
