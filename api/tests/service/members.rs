//! Members, as operators meet them, over one real member; and how agents meet a new incarnation.

use crate::agents::{edge, follow, next_frame};
use crate::harness::Rig;
use crate::harness::scene::{release, route, tenant};
use axum::http::{Method, StatusCode};
use holdfast_api::service::RequestInfo;
use holdfast_model::agent::{EdgeRoute, Frame, HAND_OVER_PURPOSE, HandOver};
use holdfast_model::{Command, Incarnation, MemberId, Revision};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_names_every_member_and_the_revision_of_the_comparison() {
    let rig = Rig::start().await;
    tenant(&rig, "ours").await;
    let reply = rig.post("/v1/cluster/verify", &rig.operator, json!({})).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let item = &reply.body["item"];
    assert_eq!(item["sound"], true, "{}", reply.text);
    assert_eq!(item["at"], item["members"][0]["verified"]["revision"]);
    let views = rig.service.store().views_digest();
    assert_eq!(item["members"][0]["verified"]["views"], views.to_string());
    // A member's own check is for members alone.
    let body = json!({"at": 1});
    let reply = rig.post("/v1/members/verify", &rig.operator, body).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{}", reply.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn i13_what_the_views_were_at_a_revision_is_told_by_a_running_cluster() {
    let rig = Rig::start().await;
    tenant(&rig, "ours").await;
    let (then, views) = (rig.service.store().revision(), rig.service.store().views_digest());
    tenant(&rig, "later").await;
    let now = rig.service.store().views_digest();
    assert_ne!(views, now);

    let reply = rig.post("/v1/cluster/rebuild", &rig.operator, json!({"to": then})).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let item = &reply.body["item"];
    assert_eq!(
        (&item["views"], &item["revision"]),
        (&json!(views.to_string()), &json!(then)),
        "{}",
        reply.text
    );
    assert_eq!(item["rows"]["org"], 1, "{}", reply.text);
    assert_eq!(item["members"]["sound"], true);
    assert_eq!(item["members"]["members"][0]["verified"]["views"], views.to_string());
    // Nothing was changed, and what has not happened yet cannot be told.
    assert_eq!(rig.service.store().views_digest(), now);
    let beyond = rig.service.store().revision().0 + 1;
    let reply = rig.post("/v1/cluster/rebuild", &rig.operator, json!({"to": beyond})).await;
    assert!(reply.status.is_client_error(), "{}", reply.text);
    for body in [json!({}), json!({"to": -1}), json!({"to": 1, "and": 2})] {
        let reply = rig.post("/v1/cluster/rebuild", &rig.operator, body).await;
        assert_eq!(reply.body["code"], "invalid_request", "{}", reply.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_member_can_neither_be_removed_nor_demoted_nor_replaced_as_leader() {
    let rig = Rig::start().await;
    for (method, path) in [
        (Method::DELETE, "/v1/members/1"),
        (Method::DELETE, "/v1/members/1?force=true"),
        (Method::POST, "/v1/members/1/demote"),
    ] {
        let reply = rig.send(rig.request(method, path, Some(&rig.operator), None)).await;
        assert_eq!(reply.status, StatusCode::CONFLICT, "{path}: {}", reply.text);
        assert_eq!(reply.body["code"], "failed_precondition");
    }
    let reply = rig.post("/v1/cluster/leader", &rig.operator, json!({})).await;
    assert_eq!(reply.body["code"], "failed_precondition", "{}", reply.text);
    let reply = rig.post("/v1/cluster/leader", &rig.operator, json!({"to": 9})).await;
    assert_eq!(reply.body["code"], "not_found", "{}", reply.text);
    let reply = rig.send(rig.request(Method::DELETE, "/v1/members/9", Some(&rig.operator), None)).await;
    assert_eq!(reply.body["code"], "not_found", "{}", reply.text);
    assert_eq!(rig.post("/v1/members/1/promote", &rig.operator, json!({})).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_from_a_revision_that_this_history_does_not_have_says_where_to_start() {
    let rig = Rig::start().await;
    let now = rig.service.store().revision();
    for path in
        [format!("/v1/events?after={}", now.0 + 5), format!("/v1/events?after={}&follow=true", now.0 + 5)]
    {
        let reply = rig.get(&path, &rig.operator).await;
        assert_eq!(reply.status, StatusCode::GONE, "{}", reply.text);
        assert_eq!(reply.body["code"], "compacted");
        assert_eq!(reply.body["details"]["start_after"], now.to_string());
    }
    // Who asks a member that may lag is not told that what it knows is gone.
    let stale = rig.get(&format!("/v1/events?after={}&consistency=stale", now.0 + 5), &rig.operator).await;
    assert_eq!(stale.status, StatusCode::OK, "{}", stale.text);
    assert_eq!(rig.get(&format!("/v1/events?after={now}"), &rig.operator).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn i06_an_agent_is_handed_over_by_the_authoritys_signature_and_then_gets_the_whole_state() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    assert_eq!(route(&rig, &ours, "one.example").await.status, StatusCode::CREATED);
    let peer = edge(&rig).await;
    let (mut stream, mut pending) = (follow(&rig, &peer, "").await, Vec::new());
    loop {
        if matches!(next_frame::<EdgeRoute>(&mut stream, &mut pending).await, Frame::SnapshotEnd) {
            break;
        }
    }
    let last = rig.service.store().revision();
    let begin = Command::BeginIncarnation { incarnation: Incarnation(2), survivor: MemberId(1) };
    rig.service.propose(&RequestInfo::of_member(MemberId(1)), begin).await.unwrap();

    // On the stream that stands, and then on one that an agent opens that was away, ahead of what survived. One after
    // the other: a newer stream of an agent ends its older one.
    let ahead = format!("&incarnation=1&revision={}", last.0 + 1_000);
    for opens_anew in [false, true] {
        if opens_anew {
            (stream, pending) = (follow(&rig, &peer, &ahead).await, Vec::new());
        }
        let signed = loop {
            match next_frame::<EdgeRoute>(&mut stream, &mut pending).await {
                Frame::HandOver(signed) => break signed,
                Frame::Heartbeat { stamp, .. } => assert_eq!(stamp.incarnation, Incarnation(1)),
                other => panic!("instead of a hand-over: {other:?}"),
            }
        };
        let ca = rig.service.authority.certificate();
        assert!(ca.has_signed(HAND_OVER_PURPOSE, &signed.record, &signed.signature));
        let record: HandOver = postcard::from_bytes(&signed.record).unwrap();
        let (from, to, cluster) = (Incarnation(1), Incarnation(2), rig.service.cluster);
        assert_eq!(record, HandOver { cluster, from, to, last });
        let Frame::<EdgeRoute>::SnapshotBegin { stamp, items, .. } =
            next_frame(&mut stream, &mut pending).await
        else {
            panic!("no snapshot")
        };
        assert_eq!((stamp.incarnation, items), (Incarnation(2), 1));
        assert!(stamp.revision > last && stamp.revision < Revision(last.0 + 1_000));
    }
}
