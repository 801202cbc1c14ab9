//! Reads of resources as they were at an earlier revision.

use crate::harness::Rig;
use crate::harness::scene::tenant;
use axum::http::{Method, StatusCode};
use serde_json::{Value, json};

fn names(body: &Value) -> Vec<&str> {
    body["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_read_page_by_page_as_it_was_at_one_revision() {
    let rig = Rig::start().await;
    let tenant = tenant(&rig, "ours").await;
    let apps = format!("/v1/orgs/{}/apps", tenant.org);
    for name in ["a", "b", "c"] {
        rig.made(&apps, json!({"name": name})).await;
    }
    let first = rig.get(&format!("{apps}?limit=2"), &tenant.owner).await;
    let at = first.body["revision"].as_u64().unwrap();
    assert_eq!(names(&first.body), ["a", "b"]);
    // Between two pages much happens, a checkpoint of the state too.
    rig.made(&apps, json!({"name": "bb"})).await;
    let gone = rig
        .send(rig.request(Method::DELETE, &format!("/v1/apps/{}", tenant.app), Some(&tenant.owner), None))
        .await;
    assert_eq!(gone.status, StatusCode::OK, "{}", gone.text);
    rig.service.store().checkpoint().unwrap();
    rig.made(&apps, json!({"name": "cc"})).await;

    let cursor = first.body["next"].as_str().unwrap();
    let second = rig.get(&format!("{apps}?limit=2&cursor={cursor}&revision={at}"), &tenant.owner).await;
    assert_eq!(second.status, StatusCode::OK, "{}", second.text);
    assert_eq!(names(&second.body), ["c", "hello"], "what was made and deleted since does not show");
    assert_eq!(second.body["revision"], at, "the answer says of which revision it is");
    let now = rig.get(&apps, &tenant.owner).await;
    assert_eq!(names(&now.body), ["a", "b", "bb", "c", "cc"]);
    let app = rig.get(&format!("/v1/apps/{}?revision={at}", tenant.app), &tenant.owner).await;
    assert_eq!((app.status, &app.body["item"]["name"]), (StatusCode::OK, &json!("hello")));
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_an_earlier_revision_does_not_bring_a_revoked_token_back() {
    let rig = Rig::start().await;
    let tenant = tenant(&rig, "ours").await;
    let apps = format!("/v1/orgs/{}/apps", tenant.org);
    let at = rig.get(&apps, &tenant.owner).await.body["revision"].as_u64().unwrap();
    let tokens = rig.get(&format!("/v1/tokens?org={}", tenant.org), &rig.operator).await;
    let id = tokens.body["items"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/tokens/{id}");
    let revoked = rig.send(rig.request(Method::DELETE, &path, Some(&rig.operator), None)).await;
    assert_eq!(revoked.status, StatusCode::OK, "{}", revoked.text);
    let reply = rig.get(&format!("{apps}?revision={at}"), &tenant.owner).await;
    assert_eq!(reply.status, StatusCode::UNAUTHORIZED, "{}", reply.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_another_orgs_past_is_as_absent_as_its_present() {
    let rig = Rig::start().await;
    let (ours, theirs) = (tenant(&rig, "ours").await, tenant(&rig, "theirs").await);
    let at = rig.service.store().revision();
    let theirs = rig.get(&format!("/v1/apps/{}?revision={at}", theirs.app), &ours.owner).await;
    assert_eq!(theirs.status, StatusCode::NOT_FOUND, "{}", theirs.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_a_revision_that_is_not_held_is_answered_and_says_which_is() {
    let rig = Rig::start().await;
    let tenant = tenant(&rig, "ours").await;
    let apps = format!("/v1/orgs/{}/apps", tenant.org);
    let future = rig.get(&format!("{apps}?revision=1000000"), &tenant.owner).await;
    assert_eq!(future.status, StatusCode::BAD_REQUEST, "{}", future.text);
    assert_eq!(future.body["details"]["newest"], rig.service.store().revision().to_string());
    for _ in 0..8 {
        rig.made(&apps, json!({"name": format!("a{}", rig.service.store().revision())})).await;
        rig.service.store().checkpoint().unwrap();
    }
    let past = rig.get(&format!("{apps}?revision=1"), &tenant.owner).await;
    assert_eq!(past.status, StatusCode::GONE, "{}", past.text);
    let oldest = past.body["details"]["oldest"].as_str().unwrap();
    let held = rig.get(&format!("{apps}?revision={oldest}"), &tenant.owner).await;
    assert_eq!(held.status, StatusCode::OK, "{}", held.text);
    for wrong in ["", "-1", "x", "99999999999999999999"] {
        let reply = rig.get(&format!("{apps}?revision={wrong}"), &tenant.owner).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{wrong}: {}", reply.text);
    }
    let elsewhere = rig.get("/v1/whoami?revision=1", &tenant.owner).await;
    assert_eq!(elsewhere.status, StatusCode::BAD_REQUEST, "only reads of resources take it");
}
