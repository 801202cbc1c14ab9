//! Secrets over one real member: sealed before they are stored, delivered to the one node that needs them, shown to
//! nobody without a scope and a record.

use crate::agents::{edge, enrolled, node, node_report, until};
use crate::harness::Rig;
use crate::harness::scene::{Tenant, release, tenant};
use axum::http::{Method, StatusCode, header};
use data_encoding::BASE64;
use holdfast_api::clockwork;
use holdfast_identity::{PeerIdentity, Role, SealKey};
use holdfast_model::delivery::Delivery;
use holdfast_model::{EnvId, InstanceId};
use holdfast_store::{SecretViews, Views};
use serde_json::{Value, json};

const CANARY: &str = "canary-8d3f10ab77";

fn set(value: &str) -> Value {
    json!({"set": {"DB_PASSWORD": BASE64.encode(value.as_bytes())}})
}

/// A member with its clockwork, and a tenant.
pub(crate) async fn sealing() -> (Rig, Tenant, tokio::task::JoinHandle<()>) {
    let rig = Rig::start().await;
    let ours = tenant(&rig, "ours").await;
    let clock = tokio::spawn(clockwork::run(rig.service.clone()));
    until("there is a key to seal to", || rig.service.view().unwrap().cluster_recipient().unwrap().is_some())
        .await;
    (rig, ours, clock)
}

async fn asks(rig: &Rig, peer: &PeerIdentity, instance: InstanceId, key: &SealKey) -> crate::harness::Reply {
    let body = json!({"instance": instance, "recipient": key.recipient().to_string()}).to_string();
    let request = rig.request(Method::POST, "/v1/agent/secrets", None, Some(&body));
    rig.send(rig.by(request, peer.clone())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_i12_values_are_stored_sealed_and_shown_to_a_scope_after_a_record() {
    let (rig, ours, clock) = sealing().await;
    let path = format!("/v1/envs/{}/secrets", ours.env);
    let empty = rig.get(&path, &ours.owner).await;
    assert_eq!(empty.status, StatusCode::NOT_FOUND, "{}", empty.text);
    let made = rig.post(&path, &ours.owner, set(CANARY)).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    assert_eq!(made.body["item"]["number"], 1);
    let listed = rig.get(&path, &ours.owner).await;
    assert!(listed.text.contains("DB_PASSWORD"), "{}", listed.text);

    // Deploying does not imply reading material; a viewer sees not even which there are.
    let reveal = format!("{path}/reveal");
    let developer = rig.tenant(&ours.org, "developer").await;
    assert_eq!(rig.post(&reveal, &developer, json!({})).await.status, StatusCode::FORBIDDEN);
    assert_eq!(rig.get(&path, &developer).await.status, StatusCode::OK);
    let viewer = rig.tenant(&ours.org, "viewer").await;
    assert_eq!(rig.get(&path, &viewer).await.status, StatusCode::FORBIDDEN);
    let before = rig.service.view().unwrap().revision();
    let shown = rig.post(&reveal, &ours.owner, json!({})).await;
    assert_eq!(
        shown.body["item"]["secrets"]["DB_PASSWORD"],
        BASE64.encode(CANARY.as_bytes()),
        "{}",
        shown.text
    );
    let missing = rig.post(&reveal, &ours.owner, json!({"keys": ["NONE"]})).await;
    assert_eq!(missing.status, StatusCode::NOT_FOUND, "{}", missing.text);
    let events = rig.get(&format!("/v1/events?after={before}&limit=10"), &ours.owner).await;
    assert!(events.text.contains("secrets_read") && !events.text.contains(CANARY), "{}", events.text);

    // Bad input says nothing of the value that it holds (I14).
    for body in [json!({"set": {"A": CANARY}}), json!({"set": {CANARY: "QQ=="}}), json!({"set": {"A": 4711}})]
    {
        let refused = rig.post(&path, &ours.owner, body).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.text);
        assert!(!refused.text.contains(CANARY) && !refused.text.contains("4711"), "{}", refused.text);
    }
    // Nothing on this member's disk holds it, in the spelling of the request or as it is.
    rig.service.store().verify().unwrap();
    let spelled = [CANARY.as_bytes().to_vec(), BASE64.encode(CANARY.as_bytes()).into_bytes()];
    for file in std::fs::read_dir(&rig.folder).unwrap().flatten().filter(|f| f.path().is_file()) {
        let bytes = std::fs::read(file.path()).unwrap();
        for canary in &spelled {
            assert!(!bytes.windows(canary.len()).any(|w| w == canary), "{}", file.path().display());
        }
    }
    clock.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn i04_a_repeat_is_the_same_version_though_it_is_sealed_anew() {
    let (rig, ours, clock) = sealing().await;
    let path = format!("/v1/envs/{}/secrets", ours.env);
    let with_key = |value: &str| {
        let mut request = rig.request(Method::POST, &path, Some(&ours.owner), Some(&set(value).to_string()));
        request.headers_mut().insert("idempotency-key", header::HeaderValue::from_static("once"));
        request
    };
    let first = rig.send(with_key("one")).await;
    let again = rig.send(with_key("one")).await;
    assert_eq!(
        (first.status, &first.body["item"]),
        (StatusCode::CREATED, &again.body["item"]),
        "{}",
        again.text
    );
    let other = rig.send(with_key("two")).await;
    assert_eq!(other.body["code"], "idempotency_key_reuse", "{}", other.text);
    let env: EnvId = ours.env.parse().unwrap();
    assert_eq!(rig.service.view().unwrap().secret_head(env).unwrap(), 1);
    clock.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_a_node_gets_what_its_own_instances_need_and_nothing_else() {
    let (rig, ours, clock) = sealing().await;
    let (id, peer) = node(&rig).await;
    let report = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    assert_eq!(rig.send(rig.by(report, peer.clone())).await.status, StatusCode::OK);
    let credential = json!({
        "host": "127.0.0.1:5000", "user": BASE64.encode(b"robot"), "password": BASE64.encode(CANARY.as_bytes())
    });
    let kept = rig.post(&format!("/v1/orgs/{}/registries", ours.org), &ours.owner, credential).await;
    assert_eq!(kept.status, StatusCode::CREATED, "{}", kept.text);
    let path = format!("/v1/envs/{}/secrets", ours.env);
    assert_eq!(rig.post(&path, &ours.owner, set(CANARY)).await.status, StatusCode::CREATED);
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    let deploy = json!({"release": made.body["item"]["id"]});
    let deployed = rig.post(&format!("/v1/envs/{}/deployments", ours.env), &ours.owner, deploy).await;
    assert_eq!(deployed.status, StatusCode::CREATED, "{}", deployed.text);
    let env: EnvId = ours.env.parse().unwrap();
    let instance = rig.service.view().unwrap().live_instances(env).unwrap()[0].id;

    let key = SealKey::generate();
    let given = asks(&rig, &peer, instance, &key).await;
    assert_eq!(given.status, StatusCode::OK, "{}", given.text);
    let sealed = BASE64.decode(given.body["item"]["sealed"].as_str().unwrap().as_bytes()).unwrap();
    let delivery: Delivery = postcard::from_bytes(&key.open(&sealed).unwrap()).unwrap();
    assert_eq!((delivery.node, delivery.instance, delivery.version), (id, instance, 1));
    let file = format!("# HOLDFAST_SECRETS_V1\nDB_PASSWORD={CANARY}\n");
    assert_eq!(delivery.file.unwrap().reveal(), file.as_bytes());
    let registry = delivery.registry.unwrap();
    assert_eq!((registry.user.reveal(), registry.password.reveal()), (&b"robot"[..], CANARY.as_bytes()));
    assert!(SealKey::generate().open(&sealed).is_err(), "sealed to this node alone");

    // Another node, an edge, and an instance that is nobody's are answered alike; a recipient that is none is refused.
    let joiner = json!({"name": "n2", "capacity": {"memory_mib": 4096, "cpu_milli": 4000}});
    let other = enrolled(&rig, "node", joiner).await;
    let other = PeerIdentity::new(&rig.service.cluster.to_string(), Role::Node, &other).unwrap();
    let stolen = asks(&rig, &other, instance, &key).await;
    assert_eq!(stolen.status, StatusCode::NOT_FOUND, "{}", stolen.text);
    let absent = asks(&rig, &peer, InstanceId::from_bits(1), &key).await;
    let from_edge = asks(&rig, &edge(&rig).await, instance, &key).await;
    assert_eq!((absent.status, from_edge.status), (StatusCode::NOT_FOUND, StatusCode::NOT_FOUND));
    let body = json!({"instance": instance, "recipient": "age1nobody"}).to_string();
    let wrong = rig.request(Method::POST, "/v1/agent/secrets", None, Some(&body));
    assert_eq!(rig.send(rig.by(wrong, peer.clone())).await.status, StatusCode::BAD_REQUEST);

    // A rotation seals every key anew, and what is delivered stays the same.
    let before = rig.get("/v1/cluster/sealing", &rig.operator).await;
    let rotated = rig.post("/v1/cluster/sealing", &rig.operator, json!({})).await;
    assert_eq!(rotated.status, StatusCode::OK, "{}", rotated.text);
    assert_ne!(rotated.body["item"]["recipient"], before.body["item"]["recipient"]);
    let keys = rig.service.keys.clone().unwrap();
    until("one key is left, and nothing is sealed to another", || {
        let view = rig.service.view().unwrap();
        let recipient = view.cluster_recipient().unwrap().unwrap();
        let envelopes = view.envelopes(None, 10).unwrap();
        envelopes.len() == 2 && envelopes.iter().all(|(_, e)| e.to == recipient) && keys.len() == 1
    })
    .await;
    let again = asks(&rig, &peer, instance, &key).await;
    let sealed = BASE64.decode(again.body["item"]["sealed"].as_str().unwrap().as_bytes()).unwrap();
    let delivery: Delivery = postcard::from_bytes(&key.open(&sealed).unwrap()).unwrap();
    assert_eq!(delivery.file.unwrap().reveal(), file.as_bytes());
    clock.abort();
}
