//! I2: what was acknowledged survives kill -9 of every process at once, 50 times at random moments under write load.
//!
//! `HOLDFAST_SEED=N` repeats a run's random choices, `HOLDFAST_ROUNDS=N` sets another number of rounds.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_client::{Client, fresh_key};
use holdfast_model::OrgId;
use holdfast_model::api::{Answer, CreateApp, CreateOrg};
use holdfast_model::resource::App;
use holdfast_tests::cluster::{Cluster, Options, wait_until};
use holdfast_tests::netns;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const ROUNDS: u32 = 50;
/// Each writes one app after the other.
const WRITERS: usize = 4;
/// Writes that a round waits for at most, before the moment of the kill is drawn.
const WRITES_BEFORE_KILL_MAX: usize = 12;
/// The kill comes at most so long after that.
const PAUSE_MS_MAX: u64 = 120;
/// A guard against hanging: for the cluster to take writes again.
const BACK_MAX: Duration = Duration::from_secs(90);
/// Of the youngest acknowledged writes, how many are asked for after each round.
const ASKED_AFTER_ROUND: usize = 8;

/// A write that was acknowledged.
#[derive(Clone)]
struct Acknowledged {
    key: String,
    app: App,
}

#[derive(Default)]
struct Written {
    acknowledged: Mutex<Vec<Acknowledged>>,
    /// Names that were ever sent.
    sent: Mutex<BTreeSet<String>>,
    /// Kills so far.
    kills: AtomicUsize,
    /// Writes that were under way when everything was killed, and got their answer later.
    over_a_kill: AtomicUsize,
    stop: AtomicBool,
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a whole number"))
}

#[test]
fn i02_kill_of_every_process_at_once_50_times_loses_no_acknowledged_write() {
    let seed = number("HOLDFAST_SEED").unwrap_or_else(rand::random);
    println!("HOLDFAST_SEED={seed}");
    netns::enter().unwrap();
    let cluster = Cluster::start(Options::WHOLE).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(run(cluster, StdRng::seed_from_u64(seed)));
}

async fn run(mut cluster: Cluster, mut random: StdRng) {
    let rounds = number("HOLDFAST_ROUNDS").map_or(ROUNDS, |n| n as u32);
    let client = cluster.client().unwrap();
    let org = client.create_org(&CreateOrg { name: "load".parse().unwrap() }).await.unwrap().item.id;
    let written = Arc::new(Written::default());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write(client.clone(), org, writer, Arc::clone(&written))))
        .collect();
    let mut names: Vec<String> = cluster.record().processes.iter().map(|p| p.name.clone()).collect();
    for round in 0..rounds {
        let wanted = count(&written) + random.random_range(1..=WRITES_BEFORE_KILL_MAX);
        let what = format!("writes in round {round}");
        wait_until(&what, BACK_MAX, async || (count(&written) >= wanted).then_some(())).await.unwrap();
        check_youngest(&client, &written).await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..=PAUSE_MS_MAX))).await;
        written.kills.fetch_add(1, Ordering::Relaxed);
        cluster.kill(&names).unwrap();
        names.shuffle(&mut random);
        names.iter().for_each(|name| cluster.restart(name).unwrap());
    }
    written.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    check_all(&client, org, &written).await;
    let over_a_kill = written.over_a_kill.load(Ordering::Relaxed);
    println!(
        "{} writes acknowledged over {rounds} kills of {} processes, {over_a_kill} of them under way at a kill",
        count(&written),
        names.len()
    );
    assert!(over_a_kill > 0, "no kill met a write");
}

fn count(written: &Written) -> usize {
    written.acknowledged.lock().unwrap().len()
}

/// Writes one app after the other; a request without an answer is sent again under its own key until it has one.
async fn write(client: Client, org: OrgId, writer: usize, written: Arc<Written>) {
    for n in 0_u64.. {
        if written.stop.load(Ordering::Relaxed) {
            return;
        }
        let (name, key) = (format!("w{writer}-{n}"), fresh_key());
        written.sent.lock().unwrap().insert(name.clone());
        let body = CreateApp { name: name.parse().unwrap() };
        let path = format!("/v1/orgs/{org}/apps");
        let kills = written.kills.load(Ordering::Relaxed);
        let app = loop {
            match client.post_with_key::<_, Answer<App>>(&path, &body, key.clone()).await {
                Ok(answer) => break answer.item,
                Err(error) if error.is_retryable() => {}
                Err(error) => panic!("{name}: {error}"),
            }
        };
        if written.kills.load(Ordering::Relaxed) > kills {
            written.over_a_kill.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(app.name.as_str(), name);
        written.acknowledged.lock().unwrap().push(Acknowledged { key, app });
    }
}

async fn check_youngest(client: &Client, written: &Written) {
    let youngest: Vec<Acknowledged> =
        written.acknowledged.lock().unwrap().iter().rev().take(ASKED_AFTER_ROUND).cloned().collect();
    for one in youngest {
        assert_eq!(client.app(one.app.id).await.unwrap().item, one.app);
    }
}

/// Everything that was acknowledged is there, nothing is there twice or unasked, and keys still have their outcomes.
async fn check_all(client: &Client, org: OrgId, written: &Written) {
    let all = client.apps(org, None).await.unwrap();
    assert!(!all.truncated);
    let by_name: BTreeMap<String, App> =
        all.items.iter().map(|app| (app.name.to_string(), app.clone())).collect();
    assert_eq!(by_name.len(), all.items.len(), "no name is there twice");
    let acknowledged = written.acknowledged.lock().unwrap().clone();
    for one in &acknowledged {
        assert_eq!(by_name.get(one.app.name.as_str()), Some(&one.app), "an acknowledged write is lost");
    }
    let sent = written.sent.lock().unwrap().clone();
    assert!(by_name.keys().all(|name| sent.contains(name)), "nothing is there that was never asked for");
    for one in acknowledged.iter().rev().take(ASKED_AFTER_ROUND) {
        let body = CreateApp { name: one.app.name.clone() };
        let again: Answer<App> =
            client.post_with_key(&format!("/v1/orgs/{org}/apps"), &body, one.key.clone()).await.unwrap();
        assert_eq!(again.item, one.app, "I4: a repeat has the first outcome");
    }
}
