//! The follower against real TLS servers on loopback that serve frames, break off, lag behind, lie and fall silent.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;
use std::time::Duration;

use holdfast_client::frames::encode;
use holdfast_client::{CallHandler, Client, Endpoint, Follower, Link, NoCalls, Published, Replica, reporter};
use holdfast_identity::Authority;
use holdfast_model::agent::{
    AgentCall, CallAnswer, EdgeRoute, Frame, HAND_OVER_PURPOSE, HandOver, LogLine, LogStream, REPORT_PATH,
    Report, ReportDetail, SignedHandOver,
};
use holdfast_model::{Code, Incarnation, InstanceId, RequestId, Revision};
use http_body_util::BodyExt;
use support::member::*;
use support::*;
use tokio::sync::{mpsc, watch};

/// What a server saw: a stream that was opened, or something posted.
enum Event {
    Opened { query: String, chunks: Chunks },
    Posted { path: String, body: Vec<u8> },
}

async fn member(authority: &Authority) -> (Member, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    let member = Member::start(authority, move |request: hyper::Request<hyper::body::Incoming>| {
        let events = events.clone();
        async move {
            let path = request.uri().path().to_owned();
            if request.method() == hyper::Method::GET {
                let (chunks, response) = streamed();
                let query = request.uri().query().unwrap_or_default().to_owned();
                let _ = events.send(Event::Opened { query, chunks });
                return response;
            }
            let body = request.into_body().collect().await.unwrap().to_bytes().to_vec();
            let _ = events.send(Event::Posted { path, body });
            json(200, "{}")
        }
    })
    .await;
    (member, receiver)
}

async fn opened(events: &mut mpsc::UnboundedReceiver<Event>) -> (String, Chunks) {
    loop {
        if let Event::Opened { query, chunks } = within(events.recv()).await.unwrap() {
            return (query, chunks);
        }
    }
}

async fn posted(events: &mut mpsc::UnboundedReceiver<Event>) -> (String, Vec<u8>) {
    loop {
        if let Event::Posted { path, body } = within(events.recv()).await.unwrap() {
            return (path, body);
        }
    }
}

async fn serve(chunks: &Chunks, frames: Vec<Frame<EdgeRoute>>) {
    for frame in frames {
        chunks.send(Ok(encode(&frame).unwrap())).await.unwrap();
    }
}

struct Agent {
    views: watch::Receiver<Published<EdgeRoute>>,
    link: watch::Receiver<Link>,
    stop: watch::Sender<bool>,
    running: tokio::task::JoinHandle<()>,
}

impl Agent {
    fn start<H: CallHandler>(
        authority: &Authority,
        path: &Path,
        endpoints: Vec<Endpoint>,
        handler: H,
    ) -> Agent {
        Agent::start_with(authority, path, endpoints, handler, HANG_GUARD)
    }

    fn start_with<H: CallHandler>(
        authority: &Authority,
        path: &Path,
        endpoints: Vec<Endpoint>,
        handler: H,
        silence_max: Duration,
    ) -> Agent {
        let credential = edge_credential(authority);
        let client = Client::with_credential(endpoints, authority.certificate(), &credential).unwrap();
        let replica = Replica::open(path, CLUSTER).unwrap();
        let follower = Follower::new(client, replica, handler).with_silence_max(silence_max);
        let (views, link) = (follower.views(), follower.link());
        let (stop, stopping) = watch::channel(false);
        let running = tokio::spawn(follower.run(stopping));
        Agent { views, link, stop, running }
    }

    async fn reaches(&mut self, revision: u64) {
        let at =
            |view: &Published<EdgeRoute>| view.as_ref().is_some_and(|view| view.stamp.revision.0 >= revision);
        within(self.views.wait_for(at)).await.unwrap();
    }

    async fn is_down(&mut self) {
        within(self.link.wait_for(|link| matches!(link, Link::Down { .. }))).await.unwrap();
    }

    fn marks(&self) -> Option<(u64, usize)> {
        marks(&self.views.borrow()).map(|(revision, items)| (revision, items.len()))
    }

    async fn stop(self) {
        self.stop.send(true).unwrap();
        within(self.running).await.unwrap();
    }
}

fn routes(count: u64) -> Vec<EdgeRoute> {
    (0..count).map(|id| route(id, 443)).collect()
}

#[tokio::test]
async fn i05_a_lost_stream_changes_nothing_and_the_next_begins_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let authority = authority();
    let (server, mut events) = member(&authority).await;
    let mut agent = Agent::start(&authority, &path, vec![server.endpoint()], NoCalls);

    let (query, chunks) = opened(&mut events).await;
    assert_eq!(query, "protocol=1");
    serve(&chunks, snapshot(stamp(5), routes(20), 0)).await;
    serve(&chunks, vec![delta(5, 7, vec![route(50, 1)], vec![0, 1])]).await;
    agent.reaches(7).await;
    assert_eq!(agent.marks(), Some((7, 19)));
    assert!(matches!(&*agent.link.borrow(), Link::Up { .. }));

    // The next breaks in the middle of an empty snapshot.
    chunks.send(Err(std::io::Error::other("cut"))).await.unwrap();
    let (query, chunks) = opened(&mut events).await;
    assert_eq!(query, "protocol=1&incarnation=1&revision=7");
    serve(&chunks, vec![snapshot(stamp(9), vec![], 9)[0].clone()]).await;
    drop(chunks);
    let (query, chunks) = opened(&mut events).await;
    assert_eq!(query, "protocol=1&incarnation=1&revision=7");
    assert_eq!(agent.marks(), Some((7, 19)));
    serve(&chunks, vec![delta(7, 10, vec![], vec![2])]).await;
    agent.reaches(10).await;

    // Nobody is left, and it stays what it is, also over a restart.
    drop((server, chunks));
    agent.is_down().await;
    assert_eq!(agent.marks(), Some((10, 18)));
    agent.stop().await;
    let agent = Agent::start(&authority, &path, vec![dead_endpoint().await], NoCalls);
    assert_eq!(agent.marks(), Some((10, 18)));
    agent.stop().await;
}

#[tokio::test]
async fn i06_a_lagging_member_is_left_for_one_that_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let authority = authority();
    feed(&mut Replica::open(&path, CLUSTER).unwrap(), snapshot(stamp(100), routes(3), 0));
    let (lagging, mut lagging_events) = member(&authority).await;
    let (current, mut current_events) = member(&authority).await;
    let lag = tokio::spawn(async move {
        loop {
            let (_, chunks) = opened(&mut lagging_events).await;
            // It may break off as soon as the first frame is refused.
            for frame in snapshot(stamp(99), vec![], 99) {
                let _ = chunks.send(Ok(encode(&frame).unwrap())).await;
            }
        }
    });
    let mut agent = Agent::start(&authority, &path, vec![lagging.endpoint(), current.endpoint()], NoCalls);
    let (query, chunks) = opened(&mut current_events).await;
    assert_eq!(query, "protocol=1&incarnation=1&revision=100");
    assert_eq!(agent.marks(), Some((100, 3)));
    serve(&chunks, vec![heartbeat(100, 0), delta(100, 101, vec![route(8, 1)], vec![])]).await;
    agent.reaches(101).await;
    assert_eq!(agent.marks(), Some((101, 4)));
    agent.stop().await;
    lag.abort();
}

#[tokio::test]
async fn i07_a_mass_removal_is_held_until_a_heartbeat_confirms_it() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    let (server, mut events) = member(&authority).await;
    let mut agent = Agent::start(&authority, &folder.path().join("e.redb"), vec![server.endpoint()], NoCalls);
    let (_, chunks) = opened(&mut events).await;
    serve(&chunks, snapshot(stamp(5), routes(20), 0)).await;
    serve(&chunks, vec![delta(5, 6, vec![], (0..15).collect())]).await;
    let held = |view: &Published<EdgeRoute>| view.as_ref().is_some_and(|view| view.held.is_some());
    within(agent.views.wait_for(held)).await.unwrap();
    assert_eq!(agent.marks(), Some((5, 20)));
    serve(&chunks, vec![heartbeat(6, 6)]).await;
    agent.reaches(6).await;
    assert_eq!(agent.marks(), Some((6, 5)));
    agent.stop().await;
}

#[tokio::test]
async fn i05_a_silent_member_is_left_and_nothing_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let authority = authority();
    feed(&mut Replica::open(&path, CLUSTER).unwrap(), snapshot(stamp(5), routes(4), 0));
    let (server, mut events) = member(&authority).await;
    let silence_max = Duration::from_millis(200);
    let agent = Agent::start_with(&authority, &path, vec![server.endpoint()], NoCalls, silence_max);
    // Each stream stands and says nothing; the agent opens the next by itself.
    let mut silent = Vec::new();
    for _ in 0..3 {
        let (query, chunks) = opened(&mut events).await;
        assert_eq!(query, "protocol=1&incarnation=1&revision=5");
        silent.push(chunks);
    }
    assert_eq!(agent.marks(), Some((5, 4)));
    agent.stop().await;
}

#[tokio::test]
async fn i14_rubbish_is_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let authority = authority();
    feed(&mut Replica::open(&path, CLUSTER).unwrap(), snapshot(stamp(5), routes(4), 0));
    let (server, mut events) = member(&authority).await;
    let mut agent = Agent::start(&authority, &path, vec![server.endpoint()], NoCalls);
    for bytes in [vec![0xff; 64], vec![0, 0, 0, 3, 99, 99, 99], encode(&heartbeat(1, 9)).unwrap()] {
        let (query, chunks) = opened(&mut events).await;
        assert_eq!(query, "protocol=1&incarnation=1&revision=5");
        chunks.send(Ok(bytes)).await.unwrap();
        // The agent leaves; the server does not.
        within(chunks.closed()).await;
    }
    let (_, chunks) = opened(&mut events).await;
    serve(&chunks, vec![delta(5, 6, vec![route(9, 9)], vec![])]).await;
    agent.reaches(6).await;
    assert_eq!(agent.marks(), Some((6, 5)));
    agent.stop().await;
}

struct Log;

impl CallHandler for Log {
    async fn answer(&self, call: AgentCall) -> CallAnswer {
        let AgentCall::Logs { after: Some(seq), .. } = call else { return std::future::pending().await };
        CallAnswer::Logs(vec![LogLine {
            seq: seq + 1,
            time_ms: 0,
            stream: LogStream::Stdout,
            text: "hi".into(),
        }])
    }
}

#[tokio::test]
async fn calls_are_answered_to_the_member_that_asked_while_frames_flow() {
    let folder = tempfile::tempdir().unwrap();
    let authority = authority();
    let (one, mut one_events) = member(&authority).await;
    let (two, mut two_events) = member(&authority).await;
    let mut agent =
        Agent::start(&authority, &folder.path().join("e.redb"), vec![one.endpoint(), two.endpoint()], Log);
    let call = |id, after| {
        let call = AgentCall::Logs { instance: InstanceId::from_bits(1), after, limit: 10, wait_ms: 0 };
        Frame::Call { id: RequestId::from_bits(id), call }
    };
    // Followers begin anywhere: whichever member is followed asks.
    let opened = tokio::select! {
        event = one_events.recv() => (event, &mut one_events),
        event = two_events.recv() => (event, &mut two_events),
    };
    let (Some(Event::Opened { chunks, .. }), events) = opened else { panic!("no member was followed") };
    serve(&chunks, vec![call(1, None), call(2, Some(41))]).await;
    serve(&chunks, snapshot(stamp(3), routes(1), 0)).await;
    let (path, body) = posted(events).await;
    assert_eq!(path, format!("/v1/agent/answers/{}", RequestId::from_bits(2)));
    let CallAnswer::Logs(lines) = serde_json::from_slice(&body).unwrap() else { panic!("no lines") };
    assert_eq!(lines[0].seq, 42);
    agent.reaches(3).await;
    agent.stop().await;
}

#[tokio::test]
async fn the_newest_report_is_delivered_once_somebody_listens() {
    let authority = authority();
    let report = |connections| Report {
        applied: Revision(4),
        incarnation: Incarnation(1),
        held: None,
        detail: ReportDetail::Edge { routes: 1, connections },
    };
    let dead = dead_endpoint().await;
    let (server, mut events) = member(&authority).await;
    let credential = edge_credential(&authority);
    let client =
        Client::with_credential(vec![dead, server.endpoint()], authority.certificate(), &credential).unwrap();
    let (slot, reporter) = reporter(&client);
    for connections in 0..50 {
        slot.put(report(connections));
    }
    let (stop, stopping) = watch::channel(false);
    let running = tokio::spawn(reporter.run(stopping));
    let (path, body) = posted(&mut events).await;
    assert_eq!(path, REPORT_PATH);
    assert_eq!(serde_json::from_slice::<Report>(&body).unwrap(), report(49));
    slot.put(report(77));
    let (_, body) = posted(&mut events).await;
    assert_eq!(serde_json::from_slice::<Report>(&body).unwrap(), report(77));
    // With nothing new it is still heard of, at the heartbeat.
    let (_, body) = posted(&mut events).await;
    assert_eq!(serde_json::from_slice::<Report>(&body).unwrap(), report(77));
    stop.send(true).unwrap();
    within(running).await.unwrap();
}

fn hand_over(authority: &Authority, from: u64, to: u64) -> Frame<EdgeRoute> {
    let record =
        HandOver { cluster: CLUSTER, from: Incarnation(from), to: Incarnation(to), last: Revision(8) };
    let record = postcard::to_stdvec(&record).unwrap();
    let signature = authority.sign_statement(HAND_OVER_PURPOSE, &record).unwrap();
    Frame::HandOver(SignedHandOver { record, signature })
}

#[tokio::test]
async fn i06_only_a_hand_over_that_the_authority_signed_leads_to_another_incarnation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let (stranger, authority) = (authority(), authority());
    feed(&mut Replica::open(&path, CLUSTER).unwrap(), snapshot(stamp(100), routes(4), 0));
    let (server, mut events) = member(&authority).await;
    let mut agent = Agent::start(&authority, &path, vec![server.endpoint()], NoCalls);
    let restored = || snapshot(stamp_in(2, 9), routes(3), 0);
    let Frame::HandOver(good) = hand_over(&authority, 1, 2) else { panic!("no hand-over") };
    let mut altered = good.clone();
    altered.record[17] ^= 1;
    let refused = [
        vec![],
        vec![hand_over(&stranger, 1, 2)],
        vec![Frame::HandOver(altered)],
        // Of somebody else's past, backwards, and to another one than what follows.
        vec![hand_over(&authority, 7, 8)],
        vec![hand_over(&authority, 1, 1)],
        vec![hand_over(&authority, 1, 3)],
    ];
    for first in refused {
        let (query, chunks) = opened(&mut events).await;
        assert_eq!(query, "protocol=1&incarnation=1&revision=100");
        for frame in first.into_iter().chain(restored()) {
            // The agent leaves as soon as it refuses.
            let _ = chunks.send(Ok(encode(&frame).unwrap())).await;
        }
        within(chunks.closed()).await;
        assert_eq!(agent.marks(), Some((100, 4)));
    }
    let (_, chunks) = opened(&mut events).await;
    serve(&chunks, vec![hand_over(&authority, 1, 2)]).await;
    serve(&chunks, restored()).await;
    let moved = |view: &Published<EdgeRoute>| view.as_ref().is_some_and(|view| view.stamp == stamp_in(2, 9));
    within(agent.views.wait_for(moved)).await.unwrap();
    assert_eq!(agent.marks(), Some((9, 3)));
    drop(chunks);
    // From here on the older incarnation is refused, whatever its revision.
    let (query, chunks) = opened(&mut events).await;
    assert_eq!(query, "protocol=1&incarnation=2&revision=9");
    for frame in snapshot(stamp(200), routes(9), 0) {
        let _ = chunks.send(Ok(encode(&frame).unwrap())).await;
    }
    within(chunks.closed()).await;
    assert_eq!(agent.marks(), Some((9, 3)));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_an_agent_is_cut_off_by_that_word_alone_and_knows_what_it_knew() {
    let authority = authority();
    let folder = tempfile::tempdir().unwrap();
    for (code, cuts_off) in
        [(Code::Unauthenticated, false), (Code::NotFound, false), (Code::Quarantined, true)]
    {
        let (asked, mut asks) = mpsc::unbounded_channel();
        let member = Member::start(&authority, move |_: hyper::Request<hyper::body::Incoming>| {
            let asked = asked.clone();
            async move {
                let _ = asked.send(());
                problem(code)
            }
        })
        .await;
        let client = Client::with_credential(
            vec![member.endpoint()],
            authority.certificate(),
            &edge_credential(&authority),
        );
        let replica = Replica::<EdgeRoute>::open(&folder.path().join(code.as_str()), CLUSTER).unwrap();
        let follower = Follower::new(client.unwrap(), replica, NoCalls);
        let cut_off = follower.cut_off();
        let (stop, stopping) = watch::channel(false);
        let running = tokio::spawn(follower.run(stopping));
        // It asks again and again: the third time the second answer has been heard.
        for _ in 0..3 {
            within(asks.recv()).await.unwrap();
        }
        assert_eq!(*cut_off.borrow(), cuts_off, "{code}");
        stop.send(true).unwrap();
        within(running).await.unwrap();
    }
}
