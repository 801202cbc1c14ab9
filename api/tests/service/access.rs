//! The API over one real member: who may call what, what a caller may see, and what bad input does.

use crate::harness::scene::{Tenant, release, route, tenant};
use crate::harness::{HANG, Rig, SOURCE};
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use holdfast_model::Scope;
use holdfast_store::Views;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use tower::ServiceExt as _;

/// Every path that a tenant's resources can be reached by, with the ids filled in.
fn paths_of(tenant: &Tenant) -> Vec<(Method, String, Option<Value>)> {
    let Tenant { org, app, env, .. } = tenant;
    let counts = json!({"counts": {"web": 1}});
    let credential = json!({"host": "registry.test", "user": "dQ==", "password": "cA=="});
    vec![
        (Method::GET, format!("/v1/orgs/{org}"), None),
        (Method::GET, format!("/v1/orgs/{org}/apps"), None),
        (Method::GET, format!("/v1/orgs/{org}/apps?name=hello"), None),
        (Method::POST, format!("/v1/orgs/{org}/apps"), Some(json!({"name": "other"}))),
        (Method::GET, format!("/v1/apps/{app}"), None),
        (Method::DELETE, format!("/v1/apps/{app}"), None),
        (Method::GET, format!("/v1/apps/{app}/envs"), None),
        (Method::POST, format!("/v1/apps/{app}/envs"), Some(json!({"name": "other"}))),
        (Method::GET, format!("/v1/envs/{env}"), None),
        (Method::GET, format!("/v1/envs/{env}/releases"), None),
        (Method::POST, format!("/v1/envs/{env}/releases"), Some(release())),
        (Method::GET, format!("/v1/envs/{env}/deployments"), None),
        (Method::POST, format!("/v1/envs/{env}/scale"), Some(counts)),
        (Method::GET, format!("/v1/envs/{env}/instances"), None),
        (Method::GET, format!("/v1/envs/{env}/routes"), None),
        (Method::GET, format!("/v1/envs/{env}/volumes"), None),
        (Method::GET, format!("/v1/envs/{env}/secrets"), None),
        (Method::POST, format!("/v1/envs/{env}/secrets"), Some(json!({"set": {"A": "QQ=="}}))),
        (Method::GET, format!("/v1/envs/{env}/secrets/versions"), None),
        (Method::POST, format!("/v1/envs/{env}/secrets/rollback"), Some(json!({"to": 1}))),
        (Method::POST, format!("/v1/envs/{env}/secrets/reveal"), Some(json!({}))),
        (Method::GET, format!("/v1/orgs/{org}/registries"), None),
        (Method::POST, format!("/v1/apps/{app}/registries"), Some(credential)),
        (Method::DELETE, format!("/v1/apps/{app}/registries/registry.test"), None),
        (
            Method::POST,
            format!("/v1/apps/{app}/images/resolve"),
            Some(json!({"reference": "registry.test/a:b"})),
        ),
    ]
}

/// What identifies a resource, swapped for one that never existed.
fn absent(path: &str) -> String {
    path.split('/')
        .map(|part| match part.split_once('_') {
            Some((prefix, _)) if part.len() > 26 => format!("{prefix}_{}", "0".repeat(26)),
            _ => part.to_owned(),
        })
        .collect::<Vec<_>>()
        .join("/")
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_another_orgs_resources_answer_exactly_as_absent_ones() {
    let rig = Rig::start().await;
    let (ours, theirs) = (tenant(&rig, "ours").await, tenant(&rig, "theirs").await);
    let release = rig.post(&format!("/v1/envs/{}/releases", theirs.env), &theirs.owner, release()).await;
    assert_eq!(release.status, StatusCode::CREATED, "{}", release.text);
    let digest = rig.service.store().views_digest();
    for (method, path, body) in paths_of(&theirs) {
        let body = body.map(|b| b.to_string());
        let mut replies = Vec::new();
        for path in [path.clone(), absent(&path)] {
            let path = path.split('?').next().unwrap().to_owned();
            let reply =
                rig.send(rig.request(method.clone(), &path, Some(&ours.owner), body.as_deref())).await;
            assert_eq!(reply.status, StatusCode::NOT_FOUND, "{method} {path}: {}", reply.text);
            replies.push(reply.text.replace(&reply.request_id, "ID"));
        }
        assert_eq!(replies[0], replies[1], "{method} {path}");
    }
    // Lists show nothing of theirs either.
    let orgs = rig.get("/v1/orgs", &ours.owner).await;
    assert!(orgs.text.contains(&ours.org) && !orgs.text.contains(&theirs.org));
    let events = rig.get("/v1/events?limit=200", &ours.owner).await;
    assert_eq!(events.status, StatusCode::OK);
    assert!(events.text.contains(&ours.org) && !events.text.contains(&theirs.org), "{}", events.text);
    assert_eq!(rig.service.store().views_digest(), digest, "refused calls changed the state");
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_every_endpoint_refuses_whoever_does_not_have_what_it_declares() {
    let rig = Rig::start().await;
    let tenant = tenant(&rig, "ours").await;
    let viewer = rig.tenant(&tenant.org, "viewer").await;
    let digest = rig.service.store().views_digest();
    let document: Value = serde_json::from_str(&holdfast_api::openapi_text().unwrap()).unwrap();
    let mut walked = 0;
    for line in holdfast_api::access_text()
        .lines()
        .filter(|l| l.starts_with("| GET") || l.starts_with("| POST") || l.starts_with("| DELETE"))
    {
        let cells: Vec<_> = line.split('|').map(|c| c.trim().trim_matches('`')).collect();
        let (method, declared, needs) = (cells[1], cells[2], cells[3]);
        assert!(
            document["paths"][declared][method.to_lowercase()].is_object(),
            "{declared} is not in the document"
        );
        let path = declared
            .replace("{org}", &tenant.org)
            .replace("{app}", &tenant.app)
            .replace("{env}", &tenant.env);
        let method: Method = method.parse().unwrap();
        let body = (method == Method::POST).then_some("{}");
        let anonymous = rig.send(rig.request(method.clone(), &path, None, body)).await;
        let as_viewer = rig.send(rig.request(method.clone(), &path, Some(&viewer), body)).await;
        match needs {
            "nothing" => assert_eq!(anonymous.status, StatusCode::OK, "{declared}"),
            "enrolment secret" => assert_eq!(anonymous.body["code"], "invalid_request", "{declared}"),
            "any token" => {
                assert_eq!(anonymous.status, StatusCode::UNAUTHORIZED);
                assert_eq!(as_viewer.status, StatusCode::OK);
            }
            "agent certificate" | "member certificate" => {
                assert_eq!(anonymous.status, StatusCode::UNAUTHORIZED, "{declared}");
                assert_eq!(as_viewer.status, StatusCode::UNAUTHORIZED, "{declared}");
            }
            operator if operator.starts_with("operator") => {
                assert_eq!(anonymous.status, StatusCode::UNAUTHORIZED, "{declared}");
                assert_eq!(as_viewer.status, StatusCode::FORBIDDEN, "{declared}");
            }
            scoped => {
                assert_eq!(anonymous.status, StatusCode::UNAUTHORIZED, "{declared}");
                let may = scoped.ends_with(":read") && !scoped.contains("audit");
                assert_eq!(as_viewer.status != StatusCode::FORBIDDEN, may, "{declared}: {}", as_viewer.text);
            }
        }
        walked += 1;
    }
    assert!(walked > 35, "only {walked} endpoints were walked");
    assert_eq!(rig.service.store().views_digest(), digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_an_orgs_token_calls_nothing_that_is_for_operators_whatever_its_scopes() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let scopes: Vec<_> = Scope::ALL.iter().map(|scope| scope.as_str()).collect();
    let body = json!({"name": "all", "org": ours.org, "scopes": scopes, "ttl_s": 60});
    let made = rig.post("/v1/tokens", &rig.operator, body).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let all = made.body["item"]["secret"].as_str().unwrap();
    let digest = rig.service.store().views_digest();
    let mut walked = 0;
    for line in holdfast_api::access_text().lines() {
        let cells: Vec<_> = line.split('|').map(|c| c.trim().trim_matches('`')).collect();
        let [_, method, path, needs, ..] = cells[..] else { continue };
        if !needs.starts_with("operator") {
            continue;
        }
        let method: Method = method.parse().unwrap();
        let body = (method == Method::POST).then_some("{}");
        let reply = rig.send(rig.request(method, path, Some(all), body)).await;
        assert_eq!(reply.status, StatusCode::FORBIDDEN, "{path}: {}", reply.text);
        walked += 1;
    }
    assert!(walked > 5, "only {walked} endpoints were walked");
    assert_eq!(rig.service.store().views_digest(), digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn i14_bad_input_has_a_stable_code_and_changes_nothing() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let digest = rig.service.store().views_digest();
    let releases = format!("/v1/envs/{}/releases", ours.env);
    let bad_manifest =
        json!({"image": release()["image"], "manifest": "schema_version = \"v9\""}).to_string();
    let too_large = format!("{{\"name\":\"{}\"}}", "a".repeat(2 << 20));
    let post = Method::POST;
    let cases: Vec<(Method, &str, Option<&str>, &str)> = vec![
        (post.clone(), "/v1/orgs", Some("{"), "invalid_request"),
        (post.clone(), "/v1/orgs", Some(r#"{"name":"UPPER"}"#), "invalid_request"),
        (post.clone(), "/v1/orgs", Some(r#"{"name":"x","extra":1}"#), "invalid_request"),
        (post.clone(), "/v1/orgs", Some(r#"{"name":"ours"}"#), "name_taken"),
        (post.clone(), "/v1/orgs", Some(&too_large), "body_too_large"),
        (post.clone(), "/v1/orgs", None, "unsupported_media_type"),
        (post.clone(), &releases, Some(&bad_manifest), "invalid_manifest"),
        (post.clone(), "/v1/orgs/not-an-id/apps", Some(r#"{"name":"x"}"#), "not_found"),
        (Method::GET, "/v1/orgs?limit=0", None, "invalid_request"),
        (Method::GET, "/v1/orgs?limit=201", None, "invalid_request"),
        (Method::GET, "/v1/orgs?nonsense=1", None, "invalid_request"),
        (Method::GET, "/v1/orgs?limit=1&limit=2", None, "invalid_request"),
        (Method::GET, "/v1/orgs?consistency=maybe", None, "invalid_request"),
        (Method::GET, "/v1/orgs?cursor=%00", None, "invalid_request"),
        (Method::GET, "/v1/nothing", None, "not_found"),
        (Method::PUT, "/v1/orgs", None, "method_not_allowed"),
        (
            post.clone(),
            "/v1/enrol",
            Some(r#"{"secret":"x","csr_pem":"y","joiner":{"edge":{"name":"e"}}}"#),
            "enrolment_invalid",
        ),
    ];
    for (method, path, body, code) in cases {
        let reply = rig.send(rig.request(method.clone(), path, Some(&rig.operator), body)).await;
        assert_eq!(reply.body["code"], code, "{method} {path}: {}", reply.text);
        assert_eq!(reply.body["status"], reply.status.as_u16());
        assert_eq!(reply.body["request_id"], reply.request_id.as_str());
        assert!(reply.body["detail"].as_str().unwrap().ends_with('.'), "{}", reply.text);
    }
    assert_eq!(rig.service.store().views_digest(), digest, "bad input changed the state");
}

fn keyed(rig: &Rig, path: &str, key: &str, body: &Value) -> Request<Body> {
    let mut request = rig.request(Method::POST, path, Some(&rig.operator), Some(&body.to_string()));
    request.headers_mut().insert("idempotency-key", key.parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn i04_a_repeated_request_answers_the_first_outcome_and_shows_the_same_secret() {
    let rig = Rig::start().await;
    let first = rig.send(keyed(&rig, "/v1/orgs", "k1", &json!({"name": "ours"}))).await;
    let again = rig.send(keyed(&rig, "/v1/orgs", "k1", &json!({"name": "ours"}))).await;
    assert_eq!((first.status, &first.body["item"]["id"]), (again.status, &again.body["item"]["id"]));
    let other = rig.send(keyed(&rig, "/v1/orgs", "k1", &json!({"name": "other"}))).await;
    assert_eq!(other.body["code"], "idempotency_key_reuse");
    let bad_key = rig.send(keyed(&rig, "/v1/orgs", &"k".repeat(129), &json!({"name": "x"}))).await;
    assert_eq!(bad_key.body["code"], "invalid_request");

    let org = first.body["item"]["id"].as_str().unwrap();
    let body = json!({"name": "ci", "org": org, "role": "viewer", "ttl_s": 60});
    let (one, two) = (
        rig.send(keyed(&rig, "/v1/tokens", "k2", &body)).await,
        rig.send(keyed(&rig, "/v1/tokens", "k2", &body)).await,
    );
    assert_eq!(one.status, StatusCode::CREATED, "{}", one.text);
    assert_eq!(one.body["item"], two.body["item"]);
    let three = rig.send(keyed(&rig, "/v1/tokens", "k3", &body)).await;
    assert_ne!(one.body["item"]["secret"], three.body["item"]["secret"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_revoked_token_is_refused_at_once_and_its_stream_is_cut() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let who = rig.get("/v1/whoami", &ours.owner).await;
    let id = who.body["item"]["token"]["id"].as_str().unwrap().to_owned();
    let follow = rig.request(Method::GET, "/v1/events?follow=true", Some(&ours.owner), None);
    let mut stream = rig.router.clone().oneshot(follow).await.unwrap().into_body();
    let first = tokio::time::timeout(HANG, stream.frame()).await.unwrap().unwrap().unwrap();
    assert!(first.data_ref().is_some_and(|d| !d.is_empty()));

    let revoke = rig.request(Method::DELETE, &format!("/v1/tokens/{id}"), Some(&rig.operator), None);
    assert_eq!(rig.send(revoke).await.status, StatusCode::OK);
    for path in ["/v1/whoami", "/v1/orgs", "/v1/orgs?consistency=stale"] {
        assert_eq!(rig.get(path, &ours.owner).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    let write = rig.post(&format!("/v1/orgs/{}/apps", ours.org), &ours.owner, json!({"name": "late"})).await;
    assert_eq!(write.status, StatusCode::UNAUTHORIZED);
    let end = async { while let Some(Ok(_)) = stream.frame().await {} };
    tokio::time::timeout(HANG, end).await.expect("the stream of a revoked token goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_token_that_has_ended_reads_nothing_more() {
    let rig = Rig::start().await;
    let body = json!({"name": "short", "scopes": ["orgs:read"], "ttl_s": 1});
    let made = rig.post("/v1/tokens", &rig.operator, body).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let token = made.body["item"]["secret"].as_str().unwrap();
    for path in ["/v1/whoami", "/v1/orgs?consistency=stale"] {
        let ends = async { while rig.get(path, token).await.status != StatusCode::UNAUTHORIZED {} };
        tokio::time::timeout(HANG, ends).await.expect("an ended token still reads");
    }
}

/// Who was let in before a revocation and reads after it is refused all the same.
#[tokio::test(flavor = "multi_thread")]
async fn i11_no_answer_shows_a_state_in_which_its_token_is_revoked() {
    let rig = Arc::new(Rig::start().await);
    let ours = tenant(&rig, "ours").await;
    for _ in 0..20 {
        let token = rig.tenant(&ours.org, "viewer").await;
        let who = rig.get("/v1/whoami", &token).await;
        let id = who.body["item"]["token"]["id"].as_str().unwrap().to_owned();
        let readers: Vec<_> = (0..50)
            .map(|_| {
                let (rig, token) = (Arc::clone(&rig), token.clone());
                tokio::spawn(async move { rig.get("/v1/orgs", &token).await })
            })
            .collect();
        let revoke = rig.request(Method::DELETE, &format!("/v1/tokens/{id}"), Some(&rig.operator), None);
        let revoked = rig.send(revoke).await;
        assert_eq!(revoked.status, StatusCode::OK, "{}", revoked.text);
        for reader in readers {
            let reply = reader.await.unwrap();
            match reply.status {
                StatusCode::OK => {
                    let (read, at) = (reply.body["revision"].as_u64(), revoked.body["revision"].as_u64());
                    assert!(read.unwrap() < at.unwrap(), "read at {read:?}, revoked at {at:?}");
                }
                status => assert_eq!(status, StatusCode::UNAUTHORIZED, "{}", reply.text),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i03_only_who_asks_for_a_stale_read_gets_one_that_no_majority_confirms() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let revision = rig.service.store().revision().0;
    rig.service.consensus.shutdown().await;
    for path in ["/v1/orgs", "/v1/orgs?consistency=linearizable"] {
        let reply = rig.get(path, &rig.operator).await;
        assert_eq!(reply.body["code"], "unavailable", "{path}: {}", reply.text);
    }
    let stale = rig.get("/v1/orgs?consistency=stale", &rig.operator).await;
    assert_eq!(stale.status, StatusCode::OK, "{}", stale.text);
    assert!(stale.text.contains(&ours.org));
    assert_eq!(stale.body["revision"], revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn i08_a_hostname_has_one_owner_and_the_loser_learns_nothing_of_it() {
    let rig = Rig::start().await;
    let (ours, theirs) = (tenant(&rig, "ours").await, tenant(&rig, "theirs").await);
    for t in [&ours, &theirs] {
        let made = rig.post(&format!("/v1/envs/{}/releases", t.env), &t.owner, release()).await;
        assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    }
    assert_eq!(route(&rig, &ours, "Shop.Example.").await.status, StatusCode::CREATED);
    let lost = route(&rig, &theirs, "shop.example").await;
    assert_eq!(lost.body["code"], "hostname_taken", "{}", lost.text);
    for secret in [ours.org.as_str(), &ours.app, &ours.env, "ours"] {
        assert!(!lost.text.contains(secret), "{}", lost.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i12_every_change_names_its_actor_its_source_and_its_request() {
    let rig = Rig::start().await;
    let request = rig.request(Method::POST, "/v1/orgs", Some(&rig.operator), Some(r#"{"name":"ours"}"#));
    let reply = rig.send(request).await;
    let view = rig.service.view().unwrap();
    let event = view.event(view.revision()).unwrap().unwrap();
    assert_eq!(event.request_id.to_string(), reply.request_id);
    assert_eq!(event.source, Some(SOURCE.into()));
    assert!(matches!(event.actor, holdfast_model::Actor::Operator(_)));
    assert!(
        view.token(match event.actor {
            holdfast_model::Actor::Operator(id) => id,
            _ => panic!(),
        })
        .unwrap()
        .is_some()
    );
}

/// Whether a file below the folder holds the text.
fn is_on_disk(folder: &std::path::Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
        if path.is_dir() {
            return is_on_disk(&path, text);
        }
        let bytes = std::fs::read(&path).unwrap();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_no_secret_that_was_handed_out_is_on_disk_or_in_an_event() {
    let rig = Rig::start().await;
    let org = rig.made("/v1/orgs", json!({"name": "ours-on-disk"})).await;
    let mut secrets = vec![rig.operator.clone(), rig.tenant(&org, "owner").await];
    let body = json!({"name": "ci", "org": org, "role": "viewer", "ttl_s": 60});
    for (path, body) in [("/v1/tokens", body), ("/v1/enrolments", json!({"kind": "node"}))] {
        // With a key the outcome is kept, to be answered again with its secret.
        let reply = rig.send(keyed(&rig, path, "k1", &body)).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text);
        secrets.push(reply.body["item"]["secret"].as_str().unwrap().to_owned());
    }
    let events = rig.get("/v1/events?limit=200", &rig.operator).await;
    let store = Arc::clone(rig.service.store());
    tokio::task::spawn_blocking(move || store.checkpoint()).await.unwrap().unwrap();
    rig.service.consensus.shutdown().await;
    assert!(is_on_disk(rig.folder.path(), "ours-on-disk"), "what is not secret is found");
    for secret in secrets {
        // Without what tells its kind, and without what may be written apart.
        let core = &secret[secret.len() / 3..secret.len() * 2 / 3];
        assert!(!events.text.contains(core) && !is_on_disk(rig.folder.path(), core));
    }
}

#[test]
fn the_checked_in_documents_are_current() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/");
    let hint = "run `cargo xtask openapi` and review the diff";
    let read = |name: &str| std::fs::read_to_string(format!("{root}{name}")).unwrap_or_default();
    assert!(read("openapi.json") == holdfast_api::openapi_text().unwrap(), "openapi.json is stale: {hint}");
    assert!(read("access.md") == holdfast_api::access_text(), "access.md is stale: {hint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_a_token_gives_no_more_than_it_has() {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let body = json!({"name": "up", "org": ours.org, "scopes": ["cluster:admin"], "ttl_s": 60});
    assert_eq!(rig.post("/v1/tokens", &ours.owner, body).await.body["code"], "forbidden");
    let body = json!({"name": "up", "scopes": ["apps:read"], "ttl_s": 60});
    assert_eq!(rig.post("/v1/tokens", &ours.owner, body).await.body["code"], "invalid_request");
    let request = rig.request(Method::GET, "/v1/whoami", None, None);
    let answer = rig.router.clone().oneshot(request).await.unwrap();
    assert_eq!(answer.headers()[header::WWW_AUTHENTICATE], "Bearer");
}
