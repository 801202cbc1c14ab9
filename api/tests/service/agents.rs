//! The API as agents and members meet it, over one real member: enrolling, following, reporting, and the clockwork.

use crate::harness::scene::{release, route, tenant};
use crate::harness::{HANG, Rig};
use axum::body::Body;
use axum::http::{Method, StatusCode};
use holdfast_api::clockwork;
use holdfast_api::service::{RequestInfo, now};
use holdfast_identity::{PeerIdentity, PrivateKey, Role};
use holdfast_model::agent::{EdgeRoute, Followed, Frame, NodeInstance, Report, ReportDetail};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::UNREACHABLE_MS;
use holdfast_model::resource::{Capacity, DeploymentState, NodeState};
use holdfast_model::{Actor, Command, EventPayload, Incarnation, NodeId, Revision, RouteId, Timestamp};
use holdfast_store::Views;
use http_body_util::BodyExt;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use tower::ServiceExt as _;

pub(crate) async fn next_frame<T: Followed>(body: &mut Body, pending: &mut Vec<u8>) -> Frame<T> {
    loop {
        if pending.len() >= 4 {
            let length = u32::from_be_bytes(pending[..4].try_into().unwrap()) as usize;
            if pending.len() >= 4 + length {
                let frame = postcard::from_bytes(&pending[4..4 + length]).unwrap();
                pending.drain(..4 + length);
                return frame;
            }
        }
        let frame = tokio::time::timeout(HANG, body.frame()).await.unwrap().unwrap().unwrap();
        pending.extend_from_slice(frame.data_ref().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_enrols_and_follows_its_own_state() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let invite = rig.post("/v1/enrolments", &rig.operator, json!({"kind": "edge"})).await;
    let secret = invite.body["item"]["secret"].as_str().unwrap().to_owned();
    let csr = PrivateKey::generate().unwrap().signing_request().unwrap();
    let wrong = json!({"secret": secret, "csr_pem": csr, "joiner": {"node": {"name": "n", "capacity": {"memory_mib": 1, "cpu_milli": 1}}}});
    let refused = rig.post("/v1/enrol", "", wrong).await;
    assert_eq!(refused.body["code"], "enrolment_invalid", "{}", refused.text);
    let body = json!({"secret": secret, "csr_pem": csr, "joiner": {"edge": {"name": "e1"}}});
    let enrolled = rig.post("/v1/enrol", "", body.clone()).await;
    assert_eq!(enrolled.status, StatusCode::CREATED, "{}", enrolled.text);
    let again = rig.post("/v1/enrol", "", body).await;
    assert_eq!(enrolled.body["item"]["enrolled"], again.body["item"]["enrolled"], "{}", again.text);
    let other_key = PrivateKey::generate().unwrap().signing_request().unwrap();
    let stolen = json!({"secret": secret, "csr_pem": other_key, "joiner": {"edge": {"name": "e2"}}});
    assert_eq!(rig.post("/v1/enrol", "", stolen).await.body["code"], "enrolment_invalid");

    let edge = enrolled.body["item"]["enrolled"]["edge"].as_str().unwrap();
    let peer = PeerIdentity::new(&rig.service.cluster.to_string(), Role::Edge, edge).unwrap();
    let follow = rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
    let mut stream = rig.router.clone().oneshot(rig.by(follow, peer.clone())).await.unwrap().into_body();
    let mut pending = Vec::new();
    let Frame::<EdgeRoute>::SnapshotBegin { items: 0, stamp, .. } =
        next_frame(&mut stream, &mut pending).await
    else {
        panic!()
    };
    assert!(matches!(next_frame(&mut stream, &mut pending).await, Frame::<EdgeRoute>::SnapshotEnd));
    assert_eq!(route(&rig, &ours, "shop.example").await.status, StatusCode::CREATED);
    let Frame::<EdgeRoute>::Delta { from, stamp: later, upserts, .. } =
        next_frame(&mut stream, &mut pending).await
    else {
        panic!("no delta")
    };
    assert!(from >= stamp.revision && later.revision > from);
    assert_eq!(upserts[0].hostname.as_ref().unwrap().as_str(), "shop.example");

    // Offering what it has, it is told that nothing changed, and not everything again.
    let path = format!("/v1/agent/follow?protocol=1&incarnation=1&revision={}", later.revision);
    let follow = rig.request(Method::GET, &path, None, None);
    let mut stream = rig.router.clone().oneshot(rig.by(follow, peer.clone())).await.unwrap().into_body();
    assert!(matches!(next_frame(&mut stream, &mut Vec::new()).await, Frame::<EdgeRoute>::Heartbeat { .. }));

    // A certificate of another cluster, or of an edge that never enrolled, opens nothing.
    for (cluster, id) in [
        ("cluster_00000000000000000000000000", edge),
        (&rig.service.cluster.to_string(), "edge_00000000000000000000000000"),
    ] {
        let peer = PeerIdentity::new(cluster, Role::Edge, id).unwrap();
        let follow = rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
        assert_eq!(rig.send(rig.by(follow, peer)).await.status, StatusCode::UNAUTHORIZED);
    }
}

/// Enrols and answers the id under `kind`.
pub(crate) async fn enrolled(rig: &Rig, kind: &str, joiner: Value) -> String {
    let invite = rig.post("/v1/enrolments", &rig.operator, json!({"kind": kind})).await;
    let csr = PrivateKey::generate().unwrap().signing_request().unwrap();
    let body = json!({"secret": invite.body["item"]["secret"], "csr_pem": csr, "joiner": {kind: joiner}});
    let reply = rig.post("/v1/enrol", "", body).await;
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text);
    let id = &reply.body["item"]["enrolled"][kind];
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}

pub(crate) async fn node(rig: &Rig) -> (NodeId, PeerIdentity) {
    let joiner = json!({"name": "n1", "capacity": {"memory_mib": 4096, "cpu_milli": 4000}});
    let id = enrolled(rig, "node", joiner).await;
    (id.parse().unwrap(), PeerIdentity::new(&rig.service.cluster.to_string(), Role::Node, &id).unwrap())
}

pub(crate) async fn edge(rig: &Rig) -> PeerIdentity {
    let id = enrolled(rig, "edge", json!({"name": "e1"})).await;
    PeerIdentity::new(&rig.service.cluster.to_string(), Role::Edge, &id).unwrap()
}

pub(crate) fn node_report(vmm: &str) -> String {
    let report = Report {
        applied: Revision(1),
        incarnation: Incarnation(1),
        held: None,
        detail: ReportDetail::Node {
            observations: Vec::new(),
            capacity: Capacity { memory_mib: 4096, cpu_milli: 4000 },
            vmm: vmm.to_owned(),
            erased: BTreeSet::new(),
            snapshots: Default::default(),
            pulls: Vec::new(),
            disk: None,
        },
    };
    serde_json::to_string(&report).unwrap()
}

pub(crate) async fn follow(rig: &Rig, peer: &PeerIdentity, query: &str) -> Body {
    let request = rig.request(Method::GET, &format!("/v1/agent/follow?protocol=1{query}"), None, None);
    rig.router.clone().oneshot(rig.by(request, peer.clone())).await.unwrap().into_body()
}

/// Waits until `done` says so.
pub(crate) async fn until(what: &str, done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(HANG, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// An edge as far as the order of frames goes: what it was told, and what it knows by that.
#[derive(Default)]
struct Told {
    revision: Option<Revision>,
    staged: Option<(Revision, BTreeMap<RouteId, EdgeRoute>)>,
    routes: BTreeMap<RouteId, EdgeRoute>,
}

impl Told {
    fn take(&mut self, frame: Frame<EdgeRoute>) {
        match frame {
            Frame::SnapshotBegin { stamp, .. } => {
                assert!(self.staged.is_none() && self.revision.is_none_or(|told| stamp.revision >= told));
                self.staged = Some((stamp.revision, BTreeMap::new()));
            }
            Frame::SnapshotItems(items) => {
                self.staged.as_mut().unwrap().1.extend(items.into_iter().map(|r| (r.id, r)));
            }
            Frame::SnapshotEnd => {
                let (revision, routes) = self.staged.take().unwrap();
                (self.revision, self.routes) = (Some(revision), routes);
            }
            Frame::Delta { from, stamp, upserts, removes, .. } => {
                assert_eq!(Some(from), self.revision, "a delta builds on what the agent was never told");
                assert!(self.staged.is_none() && stamp.revision > from);
                self.revision = Some(stamp.revision);
                self.routes.retain(|id, _| !removes.contains(id));
                self.routes.extend(upserts.into_iter().map(|r| (r.id, r)));
            }
            Frame::Heartbeat { stamp, .. } => {
                assert!(self.revision.is_some_and(|told| stamp.revision >= told) && self.staged.is_none());
                self.revision = Some(stamp.revision);
            }
            // Questions and hand-overs change nothing that is told here.
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_every_delta_builds_on_a_revision_that_the_agent_was_told() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let peer = edge(&rig).await;
    let (mut told, mut stream, mut pending) = (Told::default(), follow(&rig, &peer, "").await, Vec::new());
    let mut routes = Vec::new();
    for step in 0..80 {
        match random.random_range(0..8) {
            // Changes that do not concern the edge move the revision on without a frame.
            0..3 => drop(rig.made("/v1/orgs", json!({"name": format!("org-{step}")})).await),
            3..6 => {
                let made = route(&rig, &ours, &format!("h{step}.example")).await;
                let id: RouteId = made.body["item"]["id"].as_str().unwrap().parse().unwrap();
                routes.push(id);
                // Sometimes the edge keeps up, and sometimes it falls behind.
                while random.random_bool(0.8) && !told.routes.contains_key(&id) {
                    told.take(next_frame(&mut stream, &mut pending).await);
                }
            }
            6 if !routes.is_empty() => {
                let gone = routes.swap_remove(random.random_range(0..routes.len()));
                let path = format!("/v1/routes/{gone}");
                let reply = rig.send(rig.request(Method::DELETE, &path, Some(&ours.owner), None)).await;
                assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
            }
            _ => {
                // Lost and followed anew, from what it was told.
                let from = told.revision.map(|r| format!("&incarnation=1&revision={r}")).unwrap_or_default();
                told.staged = None;
                (stream, pending) = (follow(&rig, &peer, &from).await, Vec::new());
                told.take(next_frame(&mut stream, &mut pending).await);
            }
        }
    }
    let last = route(&rig, &ours, "last.example").await.body["item"]["id"].as_str().unwrap().parse().unwrap();
    while !told.routes.contains_key(&last) || told.staged.is_some() {
        told.take(next_frame(&mut stream, &mut pending).await);
    }
    let expected = holdfast_store::agents::edge_routes(&rig.service.view().unwrap()).unwrap();
    assert_eq!(told.routes.into_values().collect::<Vec<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_a_member_says_nothing_to_an_agent_that_is_ahead_until_it_has_caught_up() {
    let rig = Rig::start().await;
    let peer = edge(&rig).await;
    let ahead = Revision(rig.service.store().revision().0 + 5);
    let mut stream = follow(&rig, &peer, &format!("&incarnation=1&revision={ahead}")).await;
    let catch_up = async {
        for name in 0..6 {
            rig.made("/v1/orgs", json!({"name": format!("org-{name}")})).await;
        }
    };
    let mut pending = Vec::new();
    let (frame, ()) = tokio::join!(next_frame::<EdgeRoute>(&mut stream, &mut pending), catch_up);
    let (Frame::SnapshotBegin { stamp, .. } | Frame::Heartbeat { stamp, .. }) = frame else { panic!() };
    assert!(stamp.revision >= ahead, "told {} although it has {ahead}", stamp.revision);
}

/// A node that lost its disk may run instances that a member without a majority does not know of yet.
#[tokio::test(flavor = "multi_thread")]
async fn i07_a_node_without_a_state_is_told_none_that_no_majority_confirms() {
    let rig = Rig::start().await;
    let ((_, node), edge) = (node(&rig).await, edge(&rig).await);
    let mut first = follow(&rig, &node, "").await;
    let begin = next_frame::<NodeInstance>(&mut first, &mut Vec::new()).await;
    let Frame::SnapshotBegin { stamp, .. } = begin else { panic!("{begin:?}") };
    rig.service.consensus.shutdown().await;

    let mut nothing = follow(&rig, &node, "").await;
    assert!(tokio::time::timeout(HANG, nothing.frame()).await.unwrap().is_none(), "it was told something");
    let knows = format!("&incarnation={}&revision={}", stamp.incarnation.0, stamp.revision.0);
    let mut known = follow(&rig, &node, &knows).await;
    next_frame::<NodeInstance>(&mut known, &mut Vec::new()).await;
    let mut routes = follow(&rig, &edge, "").await;
    let begin = next_frame::<EdgeRoute>(&mut routes, &mut Vec::new()).await;
    assert!(
        matches!(begin, Frame::SnapshotBegin { .. }),
        "an edge is better off with what there is: {begin:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_an_agent_of_another_incarnation_is_not_made_to_wait_for_its_revision() {
    let rig = Rig::start().await;
    let peer = edge(&rig).await;
    let ahead = format!("&incarnation=9&revision={}", u64::MAX);
    let mut stream = follow(&rig, &peer, &ahead).await;
    let Frame::<EdgeRoute>::SnapshotBegin { stamp, .. } = next_frame(&mut stream, &mut Vec::new()).await
    else {
        panic!()
    };
    assert_eq!(stamp.incarnation, Incarnation(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_certificate_that_ends_opens_nothing_more_and_its_stream_is_cut() {
    let rig = Rig::start().await;
    let peer = edge(&rig).await;
    let request = || rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
    let ended = rig.send(rig.by_until(request(), peer.clone(), now())).await;
    assert_eq!(ended.status, StatusCode::UNAUTHORIZED);
    // Long enough for the stream to begin; it then ends by itself, although the edge is welcome still.
    let soon = rig.by_until(request(), peer, now().plus_ms(2_000));
    let answer = rig.router.clone().oneshot(soon).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let mut stream = answer.into_body();
    assert!(matches!(
        next_frame(&mut stream, &mut Vec::new()).await,
        Frame::<EdgeRoute>::SnapshotBegin { .. }
    ));
    let end = async { while let Some(Ok(_)) = stream.frame().await {} };
    tokio::time::timeout(HANG, end).await.expect("the stream outlives the certificate");
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_quarantined_node_loses_its_stream_and_is_told_why_from_then_on() {
    let rig = Rig::start().await;
    let (id, peer) = node(&rig).await;
    let mut stream = follow(&rig, &peer, "").await;
    let first = next_frame::<NodeInstance>(&mut stream, &mut Vec::new()).await;
    assert!(matches!(first, Frame::SnapshotBegin { .. }), "{first:?}");
    let path = format!("/v1/nodes/{id}/quarantine");
    let ask = |token: &str| rig.request(Method::POST, &path, Some(token), None);
    let ours = tenant(&rig, "ours").await;
    assert_eq!(rig.send(ask(&ours.owner)).await.status, StatusCode::FORBIDDEN);
    let asked_at = std::time::Instant::now();
    let done = rig.send(ask(&rig.operator)).await;
    assert_eq!(done.status, StatusCode::OK, "{}", done.text);
    let end = async { while stream.frame().await.is_some_and(|frame| frame.is_ok()) {} };
    tokio::time::timeout(HANG, end).await.expect("the stream of a quarantined node goes on");
    println!("from the order to the stream's end: {:?}", asked_at.elapsed());

    let csr = PrivateKey::generate().unwrap().signing_request().unwrap();
    let (report, renew) = (node_report("kvm"), json!({ "csr_pem": csr }).to_string());
    for request in [
        rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None),
        rig.request(Method::POST, "/v1/agent/report", None, Some(&report)),
        rig.request(Method::POST, "/v1/agent/renew", None, Some(&renew)),
    ] {
        let reply = rig.send(rig.by(request, peer.clone())).await;
        assert_eq!((reply.status, &reply.body["code"]), (StatusCode::FORBIDDEN, &json!("quarantined")));
    }
    // Another node hears nothing of it.
    let stranger =
        PeerIdentity::new(&rig.service.cluster.to_string(), Role::Node, "node_00000000000000000000000000");
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&report));
    assert_eq!(rig.send(rig.by(request, stranger.unwrap())).await.body["code"], "unauthenticated");
    // Who did it, and when, is in the history.
    let view = rig.service.view().unwrap();
    let events = view.events(Revision(0), 1_000, None).unwrap().events;
    let by_whom = events.iter().find(|event| {
        matches!(event.payload, EventPayload::NodeStateChanged { state: NodeState::Quarantined, .. })
    });
    assert!(matches!(by_whom.unwrap().actor, Actor::Operator(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_only_an_agent_that_the_cluster_has_may_follow_as_one() {
    let rig = Rig::start().await;
    let own = rig.service.cluster.to_string();
    let known = edge(&rig).await;
    let (edge_id, node_id) = ("edge_00000000000000000000000000", "node_00000000000000000000000000");
    let cases = [
        (own.as_str(), Role::Edge, edge_id),
        (own.as_str(), Role::Node, node_id),
        (own.as_str(), Role::Member, "1"),
        ("cluster_00000000000000000000000000", Role::Edge, known.id.as_str()),
    ];
    for (cluster, role, id) in cases {
        let peer = PeerIdentity::new(cluster, role, id).unwrap();
        let request = rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
        // A stream that is refused ends with its answer; one that is not would go on.
        let answer = rig.router.clone().oneshot(rig.by(request, peer)).await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{cluster} {id}");
    }
    let mut stream = follow(&rig, &known, "").await;
    let first = next_frame::<EdgeRoute>(&mut stream, &mut Vec::new()).await;
    assert!(matches!(first, Frame::SnapshotBegin { .. }), "{first:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_only_a_member_that_the_cluster_has_may_ask_as_one() {
    let rig = Rig::start().await;
    let body = r#"{"node":"node_00000000000000000000000000","question":[],"wait_ms":0}"#;
    let cluster = rig.service.cluster.to_string();
    let cases = [
        (cluster.as_str(), "9", "unauthenticated"),
        ("cluster_0", "1", "unauthenticated"),
        (cluster.as_str(), "1", "invalid_request"),
    ];
    for (cluster, id, code) in cases {
        let peer = PeerIdentity::new(cluster, Role::Member, id).unwrap();
        let request = rig.request(Method::POST, "/v1/members/ask", None, Some(body));
        let reply = rig.send(rig.by(request, peer)).await;
        assert_eq!(reply.body["code"], code, "{cluster} {id}: {}", reply.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i07_a_node_counts_as_heard_although_its_news_cannot_be_written() {
    let rig = Rig::start().await;
    let (id, peer) = node(&rig).await;
    rig.service.consensus.shutdown().await;
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    let reply = rig.send(rig.by(request, peer)).await;
    assert_eq!(reply.body["code"], "unavailable", "{}", reply.text);
    assert!(rig.service.contacts.contact(AgentRef::Node(id)).is_some(), "the report was forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn i07_a_new_leader_lets_no_roll_out_time_out_before_it_has_listened() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let (env, release) = (ours.env.parse().unwrap(), made.body["item"]["id"].as_str().unwrap());
    let deploy = Command::Deploy { env, release: release.parse().unwrap(), counts: Default::default() };
    // Long ago, when another led; since then nobody has been there to hear that it came to its end.
    let of_member = RequestInfo::of_member(rig.service.member);
    let long_ago = RequestInfo { now: Timestamp(1), ..of_member.clone() };
    rig.service.propose(&long_ago, deploy).await.unwrap();
    let deployment = || {
        let view = rig.service.view().unwrap();
        let current = view.env(env).unwrap().unwrap().current.unwrap();
        view.deployment(current).unwrap().unwrap().state
    };
    let (id, peer) = node(&rig).await;
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    assert_eq!(rig.send(rig.by(request, peer)).await.status, StatusCode::OK);
    let began = std::time::Instant::now();
    let clock = tokio::spawn(clockwork::run(rig.service.clone()));
    // Two passes: each finds that the node is heard of after all.
    for _ in 0..2 {
        let silent = Command::ReportSilence { silent: [(id, Timestamp(1))].into(), back: Default::default() };
        rig.service.propose(&RequestInfo::of_member(rig.service.member), silent).await.unwrap();
        let heard = || rig.service.view().unwrap().node(id).unwrap().unwrap().silent_since.is_none();
        until("the node counts as heard", heard).await;
    }
    let state = deployment();
    // On a machine so slow that the window is over by now this shows nothing.
    if began.elapsed().as_millis() < u128::from(UNREACHABLE_MS) {
        assert_eq!(state, DeploymentState::Rolling);
    }
    clock.abort();
    rig.service.propose(&of_member, Command::Tick).await.unwrap();
    assert_eq!(deployment(), DeploymentState::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn i07_a_draining_node_that_was_silent_is_heard_again() {
    let rig = Rig::start().await;
    let (id, peer) = node(&rig).await;
    let silent = Command::ReportSilence { silent: [(id, Timestamp(1))].into(), back: Default::default() };
    rig.service.propose(&RequestInfo::of_member(rig.service.member), silent).await.unwrap();
    let drain = rig.request(Method::POST, &format!("/v1/nodes/{id}/drain"), Some(&rig.operator), None);
    assert_eq!(rig.send(drain).await.status, StatusCode::OK);
    let of_node = || rig.service.view().unwrap().node(id).unwrap().unwrap();
    assert!(of_node().silent_since.is_some());
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    assert_eq!(rig.send(rig.by(request, peer)).await.status, StatusCode::OK);
    let clock = tokio::spawn(clockwork::run(rig.service.clone()));
    until("the node counts as heard", || of_node().silent_since.is_none()).await;
    assert_eq!(of_node().state, NodeState::Draining);
    clock.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_enrolled_and_never_came_keeps_no_other_waiting() {
    let rig = Rig::start().await;
    let clock = tokio::spawn(clockwork::run(rig.service.clone()));
    // Port 9 of a loopback address: nobody listens.
    for name in ["ghost", "real"] {
        let joiner = json!({"name": name, "api_addr": "127.0.0.1:9", "raft_addr": "127.0.0.1:9"});
        enrolled(&rig, "member", joiner).await;
    }
    let learners = || rig.service.consensus.status().learners.len();
    until("both are learners", || learners() == 2).await;
    assert_eq!(rig.service.consensus.status().voters.len(), 1, "who never came must not vote");
    // And the cluster goes on.
    rig.made("/v1/orgs", json!({"name": "ours"})).await;
    clock.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_a_request_that_no_certificate_can_be_made_of_uses_up_no_enrolment() {
    let rig = Rig::start().await;
    let invite = rig.post("/v1/enrolments", &rig.operator, json!({"kind": "member"})).await;
    let secret = invite.body["item"]["secret"].clone();
    let csr = PrivateKey::generate().unwrap().signing_request().unwrap();
    let digest = rig.service.store().views_digest();
    let joiner = |host: &str| json!({"member": {"name": "m2", "api_addr": format!("{host}:1"), "raft_addr": "127.0.0.1:2"}});
    for (csr, host) in [("rubbish", "127.0.0.1"), (csr.as_str(), "x.holdfast.internal")] {
        let body = json!({"secret": secret, "csr_pem": csr, "joiner": joiner(host)});
        let reply = rig.post("/v1/enrol", "", body).await;
        assert_eq!(reply.body["code"], "invalid_request", "{}", reply.text);
    }
    assert_eq!(rig.service.store().views_digest(), digest, "a refused request changed the state");
    let body = json!({"secret": secret, "csr_pem": csr, "joiner": joiner("127.0.0.1")});
    assert_eq!(rig.post("/v1/enrol", "", body).await.status, StatusCode::CREATED);
}
