//! A rolling upgrade of real processes under writes: each member is killed and comes back as the new build, while the
//! others serve, and the cluster version rises when the last one is new.
//!
//! The previous build is the program that `HOLDFAST_PREVIOUS_BIN` names. Without it the new build acts as the previous one
//! by `HOLDFAST_CLUSTER_VERSION_MAX`, which shows the rise and not the previous build's own code.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_client::{Client, fresh_key};
use holdfast_model::api::{Answer, CreateApp, CreateOrg};
use holdfast_model::resource::App;
use holdfast_model::{AppId, ClusterVersion, MemberId, OrgId};
use holdfast_tests::cluster::{Cluster, Options, binary, wait_for, wait_until};
use holdfast_tests::history::apps_created;
use holdfast_tests::netns;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LIMIT: &str = "HOLDFAST_CLUSTER_VERSION_MAX";
/// Writers at once.
const WRITERS: usize = 3;
/// How long each mixture of builds is under load.
const MIXED_FOR: Duration = Duration::from_secs(4);
/// A guard against hanging.
const WAIT_MAX: Duration = Duration::from_secs(90);

/// What was acknowledged, by name.
type Written = Arc<Mutex<BTreeMap<String, AppId>>>;

async fn write_on(client: Client, org: OrgId, writer: usize, stop: Arc<AtomicBool>, written: Written) {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let (name, key) = (format!("w{writer}-{n}"), fresh_key());
        let body = CreateApp { name: name.parse().unwrap() };
        // The same key until it is answered: a member that dies may have carried it out.
        let path = format!("/v1/orgs/{org}/apps");
        let began = Instant::now();
        let app = loop {
            match client.post_with_key::<_, Answer<App>>(&path, &body, key.clone()).await {
                Ok(answer) => break answer.item,
                Err(error) if began.elapsed() > WAIT_MAX => panic!("{name}: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        written.lock().unwrap().insert(name, app.id);
        n += 1;
    }
}

async fn cluster_version(client: &Client) -> Option<ClusterVersion> {
    Some(client.cluster().await.ok()?.item.version)
}

async fn leader(client: &Client) -> Option<(MemberId, String)> {
    let cluster = client.cluster().await.ok()?.item;
    let leader = cluster.leader?;
    let member = cluster.members.iter().find(|m| m.member.id == leader)?;
    Some((leader, member.member.name.to_string()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i01_i02_i04_members_are_upgraded_one_by_one_under_writes() {
    netns::enter().unwrap();
    let previous = std::env::var_os("HOLDFAST_PREVIOUS_BIN").map(PathBuf::from);
    let is_limited = previous.is_none();
    let (previous, new) = (previous.unwrap_or_else(|| binary().unwrap()), binary().unwrap());
    let limit = is_limited.then_some((LIMIT, "1"));
    let newest_text = ClusterVersion::NEWEST.to_string();
    let mut cluster = Cluster::start_as(&previous, limit, Options::SERVERS).unwrap();
    let client = cluster.client().unwrap();
    let org = client.create_org(&CreateOrg { name: "acme".parse().unwrap() }).await.unwrap().item.id;
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Written::default());
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| tokio::spawn(write_on(client.clone(), org, n, stop.clone(), written.clone())))
        .collect();

    let names = cluster.names("server");
    for (turn, name) in names.iter().enumerate() {
        assert_eq!(cluster_version(&client).await, Some(ClusterVersion::ONE), "before {name} is new");
        let before = written.lock().unwrap().len();
        let more = || (written.lock().unwrap().len() > before + 20).then_some(());
        wait_until("writes", WAIT_MAX, async || more()).await.unwrap();
        cluster.kill(std::slice::from_ref(name)).unwrap();
        cluster.run_as(name, &new, is_limited.then_some((LIMIT, newest_text.as_str()))).unwrap();
        cluster.restart(name).unwrap();
        let server = cluster.record().servers[turn].clone();
        let own = cluster.client_of(&[&server]).unwrap();
        // It takes part: a linearizable read through it sees the newest acknowledged write.
        let newest = *written.lock().unwrap().values().last().unwrap();
        wait_until("the new member to serve", WAIT_MAX, async || own.app(newest).await.ok()).await.unwrap();
        if turn + 1 == names.len() {
            break;
        }
        // Each build leads while the builds are mixed.
        for to in [&names[0], &names[names.len() - 1]] {
            wait_until("a leader of that build", WAIT_MAX, async || {
                let cluster = client.cluster().await.ok()?.item;
                let to = cluster.members.iter().find(|m| m.member.name.as_str() == to)?.member.id;
                let body = holdfast_model::api::TransferLeader { to: Some(to) };
                let _ = client.transfer_leader(&body).await;
                (leader(&client).await?.0 == to).then_some(())
            })
            .await
            .unwrap();
            tokio::time::sleep(MIXED_FOR / 2).await;
        }
        let (leader, count) = (leader(&client).await, written.lock().unwrap().len());
        println!("{count} writes with {} new; led by {leader:?}", turn + 1);
    }
    let newest = Some(ClusterVersion::NEWEST);
    wait_until("the version to rise", WAIT_MAX, async || {
        (cluster_version(&client).await == newest).then_some(())
    })
    .await
    .unwrap();
    tokio::time::sleep(MIXED_FOR).await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }

    // Every member has the same sound state, and every acknowledged write once.
    let found = client.with_deadline(WAIT_MAX).verify().await.unwrap().item;
    assert!(found.sound, "{found:?}");
    let written = written.lock().unwrap().clone();
    let made = apps_created(&client).await.unwrap();
    for (name, id) in &written {
        assert_eq!(made.get(name), Some(&vec![*id]), "{name}");
    }
    println!("{} acknowledged writes, each there once; verified at {:?}", written.len(), found.at);

    // The previous build can do nothing with this state any more, and says so.
    let name = &names[0];
    cluster.kill(std::slice::from_ref(name)).unwrap();
    cluster.run_as(name, &previous, limit).unwrap();
    cluster.restart(name).unwrap();
    let pid = cluster.process(name).unwrap().pid;
    wait_for("the previous build to end", WAIT_MAX, || holdfast_tests::cluster::gone(pid).then_some(()))
        .unwrap();
    let log = std::fs::read_to_string(&cluster.process(name).unwrap().log_file).unwrap();
    println!("the previous build said:\n{}", log.lines().rev().take(4).collect::<Vec<_>>().join("\n"));
    if is_limited {
        let newest = ClusterVersion::NEWEST;
        let said = format!("The cluster is at version {newest} and this build supports 1");
        assert!(log.contains(&said), "{log}");
    }
}
