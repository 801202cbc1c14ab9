//! Exec sessions as a member passes them on: the person's and the node's ends are played, everything between is real.

use crate::agents::{enrolled, next_frame, until};
use crate::harness::scene::{Elsewhere, Tenant, elsewhere, tenant};
use crate::harness::{HANG, Rig};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use holdfast_api::clockwork;
use holdfast_api::service::RequestInfo;
use holdfast_identity::{PeerIdentity, Role};
use holdfast_model::agent::{AgentCall, CallAnswer, Frame, NodeInstance};
use holdfast_model::exec::{
    ExecCall, ExecClass, ExecEnd, ExecFrames, ExecInput, ExecOutput, ExecProgram, ExecStatus, encode,
};
use holdfast_model::{Command, Digest, EventPayload, ExecGrantId, MemberId, Revision};
use holdfast_store::Views;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::convert::Infallible;
use tokio::sync::mpsc;
use tower::ServiceExt as _;

/// One end of a stream: what it says, and what it hears.
struct End<R> {
    says: mpsc::Sender<Bytes>,
    body: Body,
    frames: ExecFrames,
    kind: std::marker::PhantomData<R>,
}

impl<R: serde::de::DeserializeOwned> End<R> {
    async fn say(&self, frame: &impl serde::Serialize) {
        self.says.send(encode(frame).unwrap().into()).await.unwrap();
    }

    /// The next frame; `None` at the end.
    async fn hear(&mut self) -> Option<R> {
        loop {
            if let Some(frame) = self.frames.next_frame().unwrap() {
                return Some(frame);
            }
            let frame =
                tokio::time::timeout(HANG, self.body.frame()).await.expect("nothing is said")?.unwrap();
            self.frames.extend(frame.data_ref().unwrap());
        }
    }
}

fn stream_body() -> (mpsc::Sender<Bytes>, Body) {
    let (says, said) = mpsc::channel(64);
    let stream = futures::stream::unfold(said, |mut said: mpsc::Receiver<Bytes>| async move {
        Some((Ok::<_, Infallible>(said.recv().await?), said))
    });
    (says, Body::from_stream(stream))
}

/// A cluster with an instance on a node whose follow stream ends at another member.
struct Scene {
    rig: Rig,
    second: Router,
    ours: Tenant,
    instance: String,
    peer: PeerIdentity,
    /// The node's stream, and what came of it and was not read.
    follow: tokio::sync::Mutex<(Body, Vec<u8>)>,
}

async fn scene() -> Scene {
    let rig = Rig::start().await;
    let Elsewhere { second, ours, peer, instance, follow } = elsewhere(&rig).await;
    Scene { rig, second, ours, instance, peer, follow: tokio::sync::Mutex::new((follow, Vec::new())) }
}

impl Scene {
    /// A grant's id and its secret.
    async fn granted(&self, session_s: Option<u64>) -> (ExecGrantId, String) {
        let mut body = json!({"class": "program"});
        if let Some(session_s) = session_s {
            body["session_s"] = session_s.into();
        }
        let path = format!("/v1/instances/{}/exec", self.instance);
        let made = self.rig.post(&path, &self.ours.owner, body).await;
        assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
        let item = &made.body["item"];
        (item["grant"]["id"].as_str().unwrap().parse().unwrap(), item["secret"].as_str().unwrap().to_owned())
    }

    /// What the person's end comes to, once the node has answered as `answer` says.
    async fn opens(&self, grant: ExecGrantId, secret: &str) -> (mpsc::Sender<Bytes>, Response) {
        let (says, body) = stream_body();
        let program = ExecProgram { argv: vec!["ls".into()], terminal: None };
        let open = ExecInput::Open { secret: secret.to_owned(), program };
        says.send(encode(&open).unwrap().into()).await.unwrap();
        let path = format!("/v1/exec/{grant}/session");
        let mut request = self.rig.request(Method::POST, &path, Some(&self.ours.owner), None);
        *request.body_mut() = body;
        let answer = tokio::time::timeout(HANG, self.rig.router.clone().oneshot(request)).await;
        (says, answer.expect("it is never answered").unwrap())
    }

    /// The question that comes to the node, answered.
    async fn asked(&self, answer: &CallAnswer) -> ExecCall {
        let mut follow = self.follow.lock().await;
        let (body, pending) = &mut *follow;
        loop {
            let Frame::Call { id, call } = next_frame::<NodeInstance>(body, pending).await else { continue };
            let AgentCall::Exec(call) = call else { panic!("{call:?}") };
            let answer = serde_json::to_string(answer).unwrap();
            let path = format!("/v1/agent/answers/{id}");
            let request = self.rig.request(Method::POST, &path, None, Some(&answer));
            let request = self.rig.by(request, self.peer.clone());
            assert_eq!(self.second.clone().oneshot(request).await.unwrap().status(), StatusCode::OK);
            return *call;
        }
    }

    /// A node's part, taken by somebody at the member that asked.
    async fn takes_part(&self, grant: ExecGrantId, peer: PeerIdentity) -> (mpsc::Sender<Bytes>, Response) {
        let (says, body) = stream_body();
        let mut request = self.rig.request(Method::POST, &format!("/v1/agent/exec/{grant}"), None, None);
        *request.body_mut() = body;
        let answer = self.rig.router.clone().oneshot(self.rig.by(request, peer));
        (says, tokio::time::timeout(HANG, answer).await.unwrap().unwrap())
    }

    /// A session with both ends.
    async fn session(&self, session_s: Option<u64>) -> (ExecGrantId, End<ExecOutput>, End<ExecInput>) {
        let (grant, secret) = self.granted(session_s).await;
        let node = async {
            let call = self.asked(&CallAnswer::ExecComes).await;
            assert_eq!((call.grant, call.program.argv.as_slice()), (grant, &["ls".to_owned()][..]));
            self.takes_part(grant, self.peer.clone()).await
        };
        let ((person, answer), (node, part)) = tokio::join!(self.opens(grant, &secret), node);
        assert_eq!((answer.status(), part.status()), (StatusCode::OK, StatusCode::OK));
        (grant, end(person, answer), end(node, part))
    }

    /// How a grant ended, by the history.
    async fn ended(&self, grant: ExecGrantId) -> (ExecEnd, Option<i32>) {
        let store = self.rig.service.store();
        let found = || {
            let view = store.view().unwrap();
            let events = view.events(Revision(0), usize::MAX, None).unwrap().events;
            events.into_iter().find_map(|event| match event.payload {
                EventPayload::ExecEnded { grant: of, end, code, .. } if of == grant => Some((end, code)),
                _ => None,
            })
        };
        until("the end is written down", || found().is_some()).await;
        found().unwrap()
    }
}

fn end<R>(says: mpsc::Sender<Bytes>, answer: Response) -> End<R> {
    End { says, body: answer.into_body(), frames: ExecFrames::new(), kind: std::marker::PhantomData }
}

async fn problem(answer: Response) -> Value {
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn i12_a_session_passes_everything_on_and_its_end_is_written_down() {
    let scene = scene().await;
    let (grant, mut person, mut node) = scene.session(None).await;
    node.say(&ExecOutput::Started).await;
    person.say(&ExecInput::Stdin(b"words".to_vec())).await;
    person.say(&ExecInput::StdinEnds).await;
    assert_eq!(node.hear().await, Some(ExecInput::Stdin(b"words".to_vec())));
    assert_eq!(node.hear().await, Some(ExecInput::StdinEnds));
    node.say(&ExecOutput::Stderr(b"more".to_vec())).await;
    node.say(&ExecOutput::Exit(ExecStatus::Code(7))).await;
    assert_eq!(person.hear().await, Some(ExecOutput::Started));
    assert_eq!(person.hear().await, Some(ExecOutput::Stderr(b"more".to_vec())));
    assert_eq!(person.hear().await, Some(ExecOutput::Exit(ExecStatus::Code(7))));
    let Some(ExecOutput::Ended { end: ExecEnd::Exited, .. }) = person.hear().await else { panic!("no end") };
    assert_eq!(person.hear().await, None);
    assert_eq!(scene.ended(grant).await, (ExecEnd::Exited, Some(7)));
    // Neither what was said nor what was run is anywhere in the history (I10).
    let events = scene.rig.get("/v1/events?limit=200", &scene.ours.owner).await.text;
    assert!(
        events.contains("exec_started") && !events.contains("words") && !events.contains("\"ls\""),
        "{events}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_session_is_cut_at_its_end_and_when_its_token_or_its_grant_is_taken_away() {
    let scene = scene().await;
    // By the grant.
    let (grant, mut person, mut node) = scene.session(None).await;
    let path = format!("/v1/exec/{grant}");
    let request = scene.rig.request(Method::DELETE, &path, Some(&scene.ours.owner), None);
    assert_eq!(scene.rig.send(request).await.status, StatusCode::OK);
    assert!(matches!(person.hear().await, Some(ExecOutput::Ended { end: ExecEnd::Revoked, .. })));
    assert_eq!(node.hear().await, Some(ExecInput::Close { kill: true }), "the program must not run on");
    assert_eq!((person.hear().await, node.hear().await), (None, None));
    // By its time.
    let (grant, mut person, mut node) = scene.session(Some(1)).await;
    assert!(matches!(person.hear().await, Some(ExecOutput::Ended { end: ExecEnd::Timeout, .. })));
    assert_eq!(node.hear().await, Some(ExecInput::Close { kill: true }));
    assert_eq!(scene.ended(grant).await, (ExecEnd::Timeout, None));
    // By the token, while much is said and nobody hears it.
    let (grant, person, node) = scene.session(None).await;
    let says = node.says.clone();
    let flood = tokio::spawn(async move {
        let piece = Bytes::from(encode(&ExecOutput::Stdout(vec![0; 16 << 10])).unwrap());
        while says.send(piece.clone()).await.is_ok() {}
    });
    let whoami = scene.rig.get("/v1/whoami", &scene.ours.owner).await;
    let token = whoami.body["item"]["token"]["id"].as_str().unwrap().parse().unwrap();
    let request = RequestInfo::of_member(MemberId(1));
    scene.rig.service.propose(&request, Command::RevokeToken { token }).await.unwrap();
    assert_eq!(scene.ended(grant).await, (ExecEnd::Revoked, None));
    tokio::time::timeout(HANG, flood).await.expect("the node is still heard").unwrap();
    drop((person, node));
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_session_is_cut_when_its_node_is_cut_off() {
    let scene = scene().await;
    let (grant, mut person, mut node) = scene.session(None).await;
    let path = format!("/v1/nodes/{}/quarantine", scene.peer.id);
    let cut = scene.rig.post(&path, &scene.rig.operator, json!({})).await;
    assert_eq!(cut.status, StatusCode::OK, "{}", cut.text);
    assert!(matches!(person.hear().await, Some(ExecOutput::Ended { .. })));
    assert_eq!(node.hear().await, Some(ExecInput::Close { kill: true }), "the program must not run on");
    let (end, code) = scene.ended(grant).await;
    assert_eq!((end, code), (ExecEnd::Revoked, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_either_end_breaks_off() {
    let scene = scene().await;
    let (grant, person, mut node) = scene.session(None).await;
    drop(person);
    assert_eq!(node.hear().await, Some(ExecInput::Close { kill: false }), "hung up, not killed");
    assert_eq!(scene.ended(grant).await, (ExecEnd::ClientDisconnect, None));
    let (grant, mut person, node) = scene.session(None).await;
    drop(node);
    let Some(ExecOutput::Ended { end: ExecEnd::Lost, reason }) = person.hear().await else {
        panic!("no end")
    };
    assert!(reason.contains("node broke off"), "{reason}");
    assert_eq!(scene.ended(grant).await, (ExecEnd::Lost, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_i11_nobody_but_the_node_takes_the_nodes_part_and_nobody_uses_a_grant_twice() {
    let scene = scene().await;
    let cluster = scene.rig.service.cluster.to_string();
    let joiner = json!({"name": "n2", "capacity": {"memory_mib": 64, "cpu_milli": 1}});
    let other = enrolled(&scene.rig, "node", joiner).await;
    let other = PeerIdentity::new(&cluster, Role::Node, &other).unwrap();
    let (grant, secret) = scene.granted(None).await;
    let node = async {
        let call = scene.asked(&CallAnswer::ExecComes).await;
        // While it is waited for: another node, and a grant that is not there.
        let (_, refused) = scene.takes_part(call.grant, other.clone()).await;
        assert_eq!(refused.status(), StatusCode::NOT_FOUND);
        let (_, refused) = scene.takes_part(ExecGrantId::from_bits(7), scene.peer.clone()).await;
        assert_eq!(refused.status(), StatusCode::NOT_FOUND);
        // Used once more on the same member, before the first use came to anything.
        let (_, refused) = scene.opens(grant, &secret).await;
        assert_eq!(refused.status(), StatusCode::CONFLICT);
        scene.takes_part(call.grant, scene.peer.clone()).await
    };
    let ((_person, answer), (_node, part)) = tokio::join!(scene.opens(grant, &secret), node);
    assert_eq!((answer.status(), part.status()), (StatusCode::OK, StatusCode::OK));
    // The part is taken.
    let (_, refused) = scene.takes_part(grant, scene.peer.clone()).await;
    assert_eq!(refused.status(), StatusCode::NOT_FOUND);
    let (_, refused) = scene.opens(grant, &secret).await;
    assert_eq!(refused.status(), StatusCode::CONFLICT);

    // Another org's token, and one without the scope.
    let (grant, secret) = scene.granted(None).await;
    let theirs = tenant(&scene.rig, "theirs").await;
    let path = format!("/v1/instances/{}/exec", scene.instance);
    let absent = scene.rig.post(&path, &theirs.owner, json!({"class": "shell"})).await;
    assert_eq!(absent.status, StatusCode::NOT_FOUND, "{}", absent.text);
    let developer = scene.rig.tenant(&scene.ours.org, "developer").await;
    let forbidden = scene.rig.post(&path, &developer, json!({"class": "shell"})).await;
    assert_eq!(forbidden.status, StatusCode::FORBIDDEN, "deploying does not imply it: {}", forbidden.text);
    let request = scene.rig.request(Method::DELETE, &format!("/v1/exec/{grant}"), Some(&theirs.owner), None);
    assert_eq!(scene.rig.send(request).await.status, StatusCode::NOT_FOUND);
    let (_, refused) = scene.opens(grant, &secret.replace("holdfast_exec_", "holdfast_tok_")).await;
    assert_eq!(refused.status(), StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_refuses_is_told_and_written_down() {
    let scene = scene().await;
    let (grant, secret) = scene.granted(None).await;
    let refusal = CallAnswer::Refused { reason: "The instance does not run.".into() };
    let ((_, answer), _) = tokio::join!(scene.opens(grant, &secret), scene.asked(&refusal));
    assert_eq!(answer.status(), StatusCode::CONFLICT);
    assert_eq!(problem(answer).await["detail"], "The instance does not run.");
    assert_eq!(scene.ended(grant).await, (ExecEnd::Refused, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_streams_that_make_no_sense_are_answered() {
    let scene = scene().await;
    let (grant, _) = scene.granted(None).await;
    for first in [&b"\xff\xff\xff\xff"[..], b"\0\0\0\x01\x77", b"", &encode(&ExecInput::StdinEnds).unwrap()] {
        let path = format!("/v1/exec/{grant}/session");
        let mut request = scene.rig.request(Method::POST, &path, Some(&scene.ours.owner), None);
        *request.body_mut() = Body::from(first.to_vec());
        let refused = scene.rig.send(request).await;
        assert_eq!(refused.body["code"], "invalid_request", "{}", refused.text);
    }
    // In the middle of a session it ends the session, and nothing else.
    let (grant, person, mut node) = scene.session(None).await;
    person.says.send(Bytes::from_static(b"\xff\xff\xff\xff")).await.unwrap();
    assert_eq!(node.hear().await, Some(ExecInput::Close { kill: false }));
    assert_eq!(scene.ended(grant).await, (ExecEnd::ClientDisconnect, None));
    let (grant, mut person, node) = scene.session(None).await;
    node.says.send(Bytes::from_static(b"\xff\xff\xff\xff")).await.unwrap();
    assert!(matches!(person.hear().await, Some(ExecOutput::Ended { end: ExecEnd::Lost, .. })));
    assert_eq!(scene.ended(grant).await, (ExecEnd::Lost, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_restarted_ends_what_it_passed_on_before() {
    let scene = scene().await;
    let (lost, secret) = scene.granted(None).await;
    // As if an earlier process of this member had used it.
    let digest = holdfast_identity::Token::parse(&secret).unwrap().digest();
    let command = Command::UseExecGrant {
        grant: lost,
        digest: Digest(*digest.as_bytes()),
        class: ExecClass::Program,
        terminal: false,
        member: MemberId(1),
    };
    let principal = scene.rig.service.view().unwrap().exec_grant(lost).unwrap().unwrap();
    let request = RequestInfo {
        actor: principal.principal,
        actor_org: Some(principal.org),
        ..RequestInfo::of_member(MemberId(1))
    };
    scene.rig.service.propose(&request, command).await.unwrap();
    let (here, _person, _node) = scene.session(None).await;
    let clock = tokio::spawn(clockwork::run(scene.rig.service.clone()));
    assert_eq!(scene.ended(lost).await, (ExecEnd::Lost, None));
    let view = scene.rig.service.view().unwrap();
    assert!(view.exec_grant(here).unwrap().is_some(), "what is passed on now goes on");
    clock.abort();
}
