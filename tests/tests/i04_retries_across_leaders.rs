//! I3 and I4 against real processes: reads on every member see what was acknowledged, and a request that is sent again
//! over a change of leader happens once.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_client::{Client, fresh_key};
use holdfast_model::api::{Answer, CreateApp, CreateOrg};
use holdfast_model::resource::App;
use holdfast_model::{Code, MemberId, OrgId};
use holdfast_tests::cluster::{Cluster, Options, wait_until};
use holdfast_tests::history::apps_created;
use holdfast_tests::netns;
use std::collections::BTreeMap;
use std::time::Duration;

/// Requests that are under way when the leader dies.
const REQUESTS: usize = 40;
const LEADERS_KILLED: usize = 4;
/// Writes whose effect every member is asked for.
const READS: usize = 45;
/// A guard against hanging.
const LEADER_MAX: Duration = Duration::from_secs(60);

async fn new_org(client: &Client, name: &str) -> OrgId {
    client.create_org(&CreateOrg { name: name.parse().unwrap() }).await.unwrap().item.id
}

/// The name of the process that leads.
async fn leader(client: &Client) -> String {
    let found = wait_until("a leader", LEADER_MAX, async || {
        let cluster = client.cluster().await.ok()?.item;
        let leader: MemberId = cluster.leader?;
        cluster.members.iter().find(|m| m.member.id == leader).map(|m| m.member.name.to_string())
    });
    found.await.unwrap()
}

async fn create(client: &Client, org: OrgId, name: &str, key: &str) -> Answer<App> {
    let body = CreateApp { name: name.parse().unwrap() };
    client.post_with_key(&format!("/v1/orgs/{org}/apps"), &body, key.to_owned()).await.unwrap()
}

#[tokio::test]
async fn i04_a_request_that_is_sent_again_over_changes_of_leader_happens_once() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::SERVERS).unwrap();
    let client = cluster.client().unwrap();
    let org = new_org(&client, "acme").await;
    let mut answers: BTreeMap<String, (String, Answer<App>)> = BTreeMap::new();
    for round in 0..LEADERS_KILLED {
        let victim = leader(&client).await;
        let mut requests = tokio::task::JoinSet::new();
        for n in 0..REQUESTS {
            let (client, name, key) = (client.clone(), format!("a{round}-{n}"), fresh_key());
            requests
                .spawn(async move { (name.clone(), key.clone(), create(&client, org, &name, &key).await) });
        }
        // Some have their answer by now, some are under way, some were not sent yet.
        let Some(first) = requests.join_next().await else { panic!("no request was made") };
        cluster.kill(std::slice::from_ref(&victim)).unwrap();
        let mut ended = vec![first.unwrap()];
        while let Some(request) = requests.join_next().await {
            ended.push(request.unwrap());
        }
        cluster.restart(&victim).unwrap();
        answers.extend(ended.into_iter().map(|(name, key, answer)| (name, (key, answer))));
    }
    assert_eq!(answers.len(), REQUESTS * LEADERS_KILLED);

    for (name, (key, answer)) in &answers {
        assert_eq!(create(&client, org, name, key).await.item, answer.item, "{name} has its first outcome");
    }
    let made = apps_created(&client).await.unwrap();
    for (name, (_, answer)) in &answers {
        assert_eq!(made.get(name), Some(&vec![answer.item.id]), "{name} was made exactly once");
    }

    let Some((name, (key, _))) = answers.first_key_value() else { panic!("no answers") };
    let body = CreateApp { name: "another".parse().unwrap() };
    let reused =
        client.post_with_key::<_, Answer<App>>(&format!("/v1/orgs/{org}/apps"), &body, key.clone()).await;
    assert_eq!(reused.unwrap_err().code(), Code::IdempotencyKeyReuse.as_str(), "the key of {name}");
}

#[tokio::test]
async fn i03_a_read_on_any_member_sees_every_acknowledged_write() {
    netns::enter().unwrap();
    let cluster = Cluster::start(Options::SERVERS).unwrap();
    let servers = cluster.record().servers.clone();
    let members: Vec<Client> = servers.iter().map(|s| cluster.client_of(&[s]).unwrap()).collect();
    let org = new_org(&members[0], "acme").await;
    for n in 0..READS {
        let writer = &members[n % members.len()];
        let app = create(writer, org, &format!("a{n}"), &fresh_key()).await;
        for reader in &members {
            let read = reader.app(app.item.id).await.unwrap();
            assert_eq!(read.item, app.item);
            assert!(read.revision >= app.revision);
        }
        if n % 5 == 0 {
            writer.delete_app(app.item.id, app.item.version).await.unwrap();
            for reader in &members {
                assert!(reader.app(app.item.id).await.unwrap_err().is_not_found());
            }
        }
    }
}
