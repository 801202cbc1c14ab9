//! Lines on their way from a node, over whichever member, to whoever may read them.

use crate::agents::next_frame;
use crate::harness::scene::{Elsewhere, Tenant, elsewhere, tenant};
use crate::harness::{HANG, Reply, Rig};
use axum::Router;
use axum::body::Body;
use axum::http::{Method, StatusCode};
use holdfast_api::log_readers::LOG_STREAMS_ORG_MAX;
use holdfast_identity::PeerIdentity;
use holdfast_model::agent::{
    AgentCall, CallAnswer, Frame, ImagePhase, ImageProgress, LogStream, NodeInstance, Observation, Pull,
    REPORT_PULLS_MAX, Report, ReportDetail,
};
use holdfast_model::logs::{LogChunk, LogCursor, LogEntry, LogRecord, LogStart};
use holdfast_model::resource::{Capacity, InstanceReason, InstanceState};
use holdfast_model::{Incarnation, Revision};
use http_body_util::BodyExt;
use serde_json::json;
use std::sync::{Arc, Mutex};
use tokio::task::JoinHandle;
use tower::ServiceExt as _;

/// What the node has of the instance.
type Held = Arc<Mutex<Vec<String>>>;

const EPOCH: u64 = 5;

struct Scene {
    rig: Arc<Rig>,
    second: Router,
    ours: Tenant,
    instance: String,
    held: Held,
    peer: PeerIdentity,
    agent: JoinHandle<()>,
}

/// A tenant whose instance is on a node that reports to the first member and follows the second.
async fn scene() -> Scene {
    let rig = Arc::new(Rig::start().await);
    let Elsewhere { second, ours, peer, instance, follow } = elsewhere(&rig).await;
    let held = Held::default();
    let agent =
        tokio::spawn(answer(Arc::clone(&rig), second.clone(), peer.clone(), follow, Arc::clone(&held)));
    Scene { rig, second, ours, instance, held, peer, agent }
}

/// Answers as a node does, two lines at a time.
async fn answer(rig: Arc<Rig>, member: Router, peer: PeerIdentity, mut stream: Body, held: Held) {
    let mut pending = Vec::new();
    loop {
        let frame = next_frame::<NodeInstance>(&mut stream, &mut pending).await;
        let Frame::Call { id, call: AgentCall::ReadLogs { start, .. } } = frame else { continue };
        let chunk = chunk(&held.lock().unwrap(), start);
        let body = serde_json::to_string(&CallAnswer::LogChunk(chunk)).unwrap();
        let request = rig.request(Method::POST, &format!("/v1/agent/answers/{id}"), None, Some(&body));
        // Whoever asked may be gone.
        member.clone().oneshot(rig.by(request, peer.clone())).await.unwrap();
    }
}

fn chunk(held: &[String], start: LogStart) -> LogChunk {
    let after = start.after.map_or(0, |cursor| cursor.seq);
    let lines = held.iter().enumerate().skip(usize::try_from(after).unwrap()).take(2);
    let entries: Vec<LogEntry> = lines
        .map(|(at, text)| LogEntry {
            seq: at as u64 + 1,
            time_ms: 1,
            stream: LogStream::Stdout,
            text: text.clone(),
            base64: None,
            continues: false,
            dropped: 0,
        })
        .collect();
    let seq = after + entries.len() as u64;
    let missed = if start.after == Some(LogCursor { epoch: EPOCH, seq: 0 }) { 9 } else { 0 };
    LogChunk { entries, next: LogCursor { epoch: EPOCH, seq }, missed, more: seq < held.len() as u64 }
}

impl Scene {
    fn observed(&self, state: InstanceState, reason: Option<InstanceReason>) -> Observation {
        Observation { instance: self.instance.parse().unwrap(), state, reason, detail: None, restarts: 0 }
    }

    /// What the node says of the instance.
    async fn report(&self, seen: Observation, pulls: Vec<Pull>) -> Reply {
        let report = Report {
            applied: Revision(1),
            incarnation: Incarnation(1),
            held: None,
            detail: ReportDetail::Node {
                erased: std::collections::BTreeSet::new(),
                snapshots: Default::default(),
                observations: vec![seen],
                capacity: Capacity { memory_mib: 4096, cpu_milli: 4000 },
                vmm: "kvm".to_owned(),
                pulls,
                disk: None,
            },
        };
        let body = serde_json::to_string(&report).unwrap();
        let request = self.rig.request(Method::POST, "/v1/agent/report", None, Some(&body));
        self.rig.send(self.rig.by(request, self.peer.clone())).await
    }

    fn write(&self, lines: &[&str]) {
        self.held.lock().unwrap().extend(lines.iter().map(|line| (*line).to_owned()));
    }

    async fn open(&self, member: &Router, query: &str, token: &str) -> (StatusCode, Body) {
        let path = format!("/v1/instances/{}/logs?{query}", self.instance);
        let request = self.rig.request(Method::GET, &path, Some(token), None);
        let answer = tokio::time::timeout(HANG, member.clone().oneshot(request)).await.unwrap().unwrap();
        (answer.status(), answer.into_body())
    }

    async fn first(&self, query: &str) -> (StatusCode, Body) {
        self.open(&self.rig.router, query, &self.ours.owner).await
    }
}

/// The next `number` records, or as many as there are before the stream ends.
async fn records(body: &mut Body, number: usize) -> Vec<LogRecord> {
    let mut found = Vec::new();
    while found.len() < number {
        let Some(Ok(frame)) = tokio::time::timeout(HANG, body.frame()).await.expect("no line came") else {
            break;
        };
        let text = frame.into_data().unwrap();
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        found.extend(lines.map(|line| serde_json::from_slice::<LogRecord>(line).unwrap()));
    }
    found
}

fn texts(records: &[LogRecord]) -> Vec<&str> {
    records
        .iter()
        .filter_map(|record| match record {
            LogRecord::Line(line) => Some(line.text.as_str()),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_are_found_wherever_their_node_follows_and_a_cursor_goes_on_at_any_member() {
    let scene = scene().await;
    scene.write(&["one", "two", "three"]);
    let (status, mut body) = scene.first("").await;
    assert_eq!(status, StatusCode::OK);
    let found = records(&mut body, usize::MAX).await;
    assert_eq!(texts(&found), ["one", "two", "three"]);
    let end = LogCursor { epoch: EPOCH, seq: 3 };
    assert_eq!(found.last(), Some(&LogRecord::End { cursor: Some(end) }), "it says that this is all");

    let (_, mut following) = scene.first("follow=true").await;
    let seen = records(&mut following, 3).await;
    scene.write(&["four"]);
    let more = records(&mut following, 1).await;
    assert_eq!(texts(&more), ["four"]);
    let LogRecord::Line(last) = &more[0] else { panic!("{seen:?}") };
    drop(following);
    scene.write(&["five"]);
    let query = format!("follow=true&cursor={}", last.cursor);
    let (_, mut elsewhere) = scene.open(&scene.second, &query, &scene.ours.owner).await;
    assert_eq!(texts(&records(&mut elsewhere, 1).await), ["five"], "neither lost nor repeated");

    // A reader that was away for too long is told what is missing.
    let (_, mut late) = scene.first(&format!("cursor={EPOCH}-0")).await;
    assert_eq!(records(&mut late, 1).await[0], LogRecord::Dropped { lines: 9 });
    for query in ["cursor=7", "tail=-1", "since_ms=now", "follow=perhaps", "after=1"] {
        assert_eq!(scene.first(query).await.0, StatusCode::BAD_REQUEST, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_another_orgs_lines_do_not_exist() {
    let scene = scene().await;
    scene.write(&["ours"]);
    let theirs = tenant(&scene.rig, "theirs").await;
    let asked = format!("/v1/instances/{}/logs", scene.instance);
    let absent = "/v1/instances/inst_00000000000000000000000000/logs";
    let (one, other) =
        (scene.rig.get(&asked, &theirs.owner).await, scene.rig.get(absent, &theirs.owner).await);
    assert_eq!((one.status, &one.body["detail"]), (StatusCode::NOT_FOUND, &other.body["detail"]));
    let body = json!({"name": "t", "org": scene.ours.org, "scopes": ["envs:read"], "ttl_s": 3600});
    let made = scene.rig.post("/v1/tokens", &scene.rig.operator, body).await;
    let without = scene.rig.get(&asked, made.body["item"]["secret"].as_str().unwrap()).await;
    assert_eq!(without.status, StatusCode::FORBIDDEN, "reading an env is not reading its lines");
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_reader_whose_token_is_revoked_is_cut() {
    let scene = scene().await;
    scene.write(&["one"]);
    let (_, mut stream) = scene.first("follow=true").await;
    assert_eq!(records(&mut stream, 1).await.len(), 1);
    let who = scene.rig.get("/v1/whoami", &scene.ours.owner).await;
    let id = who.body["item"]["token"]["id"].as_str().unwrap();
    let revoke =
        scene.rig.request(Method::DELETE, &format!("/v1/tokens/{id}"), Some(&scene.rig.operator), None);
    assert_eq!(scene.rig.send(revoke).await.status, StatusCode::OK);
    let left = tokio::time::timeout(HANG, records(&mut stream, usize::MAX)).await;
    assert_eq!(
        left.expect("the stream of a revoked token goes on"),
        [],
        "and nothing says that this was all"
    );
    assert_eq!(scene.first("").await.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_an_org_reads_so_many_logs_at_a_time_and_no_more() {
    let scene = scene().await;
    scene.write(&["one"]);
    let mut open = Vec::new();
    for _ in 0..LOG_STREAMS_ORG_MAX {
        let (status, mut body) = scene.first("follow=true").await;
        assert_eq!((status, records(&mut body, 1).await.len()), (StatusCode::OK, 1));
        open.push(body);
    }
    let path = format!("/v1/instances/{}/logs", scene.instance);
    let refused = scene.rig.get(&path, &scene.ours.owner).await;
    assert_eq!((refused.status, &refused.body["code"]), (StatusCode::CONFLICT, &json!("quota_exceeded")));
    assert_eq!(refused.body["details"]["dimension"], "log_streams");
    // Who leaves makes room.
    drop(open);
    let again = async { while scene.first("").await.0 != StatusCode::OK {} };
    tokio::time::timeout(HANG, again).await.expect("a place of a reader that left stays taken");
}

#[tokio::test]
async fn who_follows_an_instance_that_has_ended_on_a_node_that_is_away_is_told_and_not_kept() {
    let scene = scene().await;
    scene.write(&["one"]);
    let (status, mut body) = scene.first("follow=true").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(texts(&records(&mut body, 1).await), ["one"]);
    // The node goes, and its word that the instance has failed is the last that is heard of it.
    scene.agent.abort();
    let seen = scene.observed(InstanceState::Failed, Some(InstanceReason::CrashLoopBackoff));
    assert_eq!(scene.report(seen, Vec::new()).await.status, StatusCode::OK);
    // To the end of the stream.
    let last = records(&mut body, usize::MAX).await.pop().unwrap();
    let LogRecord::Away { detail, ended: true } = last else { panic!("{last:?}") };
    assert!(detail.contains("has ended") && detail.contains("until the node is back"), "{detail}");
}

#[tokio::test]
async fn how_far_an_image_is_is_told_while_the_instance_waits_and_not_logged() {
    let scene = scene().await;
    let pull = Pull {
        instance: scene.instance.parse().unwrap(),
        image: ImageProgress {
            phase: ImagePhase::Pulling,
            received_bytes: 10,
            total_bytes: 40,
            layer: 0,
            layers: 3,
        },
    };
    let report = |state, pulls| scene.report(scene.observed(state, None), pulls);
    let revision = || scene.rig.service.store().revision();
    let before = revision();
    assert_eq!(report(InstanceState::Booting, vec![pull]).await.status, StatusCode::OK);
    assert_eq!(revision(), before, "nothing of it reaches the log");
    let path = format!("/v1/instances/{}", scene.instance);
    let shown = || scene.rig.get(&path, &scene.ours.owner);
    let told = shown().await.body["item"]["image_progress"].clone();
    assert_eq!(
        told,
        json!({"phase": "pulling", "received_bytes": 10, "total_bytes": 40, "layer": 0, "layers": 3})
    );
    let list = format!("/v1/envs/{}/instances", scene.ours.env);
    let listed = scene.rig.get(&list, &scene.ours.owner).await;
    assert_eq!(listed.body["items"][0]["image_progress"], told);
    // Once it is up that is no news, even if the node still says so.
    assert_eq!(report(InstanceState::Ready, vec![pull]).await.status, StatusCode::OK);
    assert_eq!(shown().await.body["item"].get("image_progress"), None);
    let many = vec![pull; REPORT_PULLS_MAX + 1];
    assert_eq!(report(InstanceState::Ready, many).await.status, StatusCode::BAD_REQUEST);
}
