//! Members that leave and come, against real processes, by the commands of `docs/ops/runbooks/`.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_client::Client;
use holdfast_model::api::{CreateOrg, MemberRole};
use holdfast_model::{EventPayload, Incarnation, MemberId, OrgId};
use holdfast_tests::cluster::{Cluster, Options, binary, wait_until};
use holdfast_tests::netns;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(90);

/// A member that this test runs beside those of `holdfast dev`.
struct Server(Child);

impl Server {
    fn run(data_dir: &Path) -> Server {
        Self::run_as("server", data_dir, &[])
    }

    fn run_as(role: &str, data_dir: &Path, more: &[&str]) -> Server {
        let log = std::fs::File::create(data_dir.with_extension("log")).unwrap();
        let child = Command::new(binary().unwrap())
            .args([role, "run", "--data-dir"])
            .arg(data_dir)
            .args(more)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        Server(child.unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ok(what: &str, output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {errors}\n{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn holdfast(cluster: &Cluster, arguments: &[&str]) -> Value {
    let with_json: Vec<&str> = arguments.iter().copied().chain(["--json", "--yes"]).collect();
    ok(&arguments.join(" "), &cluster.holdfast(&with_json).unwrap())
}

/// Invites, joins and runs a member, by the commands of the runbook.
fn join(cluster: &Cluster, name: &str, port: u16, more: &[&str]) -> (Server, PathBuf) {
    let secret = cluster.data_dir().join(format!("{name}.secret"));
    let secret = secret.to_str().unwrap();
    let invite: Vec<&str> =
        ["server", "invite", "member", "--out", secret].into_iter().chain(more.iter().copied()).collect();
    let invited = holdfast(cluster, &invite);
    let pin = invited["ca_pin"].as_str().unwrap();
    let data_dir = cluster.data_dir().join(name);
    let (api, raft) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", port + 1));
    let mut arguments = vec!["server", "join", "--name", name, "--data-dir", data_dir.to_str().unwrap()];
    arguments.extend(["--api-addr", &api, "--raft-addr", &raft, "--ca-pin", pin, "--secret-file", secret]);
    for server in &cluster.record().servers {
        arguments.extend(["--server", server]);
    }
    holdfast(cluster, &arguments);
    (Server::run(&data_dir), data_dir)
}

/// Joins and runs an edge that knows one member only.
fn edge_of(cluster: &Cluster, server: &str) -> Server {
    let secret = cluster.data_dir().join("edge.secret");
    let secret = secret.to_str().unwrap();
    let invited = holdfast(cluster, &["server", "invite", "edge", "--out", secret]);
    let pin = invited["ca_pin"].as_str().unwrap();
    let data_dir = cluster.data_dir().join("edge-of-one");
    let folder = data_dir.to_str().unwrap();
    let arguments = ["edge", "join", "--name", "of-one", "--data-dir", folder, "--server", server];
    holdfast(cluster, &[&arguments[..], &["--ca-pin", pin, "--secret-file", secret]].concat());
    let known = data_dir.join("agent.json");
    let mut agent: Value = serde_json::from_slice(&std::fs::read(&known).unwrap()).unwrap();
    agent["members"] = serde_json::json!([server.trim_start_matches("https://")]);
    std::fs::write(&known, agent.to_string()).unwrap();
    Server::run_as("edge", &data_dir, &["--listen", "127.0.0.1"])
}

async fn org(client: &Client, name: &str) -> OrgId {
    client.create_org(&CreateOrg { name: name.parse().unwrap() }).await.unwrap().item.id
}

async fn has_role(client: &Client, name: &str, role: MemberRole) -> MemberId {
    let what = format!("{name} to be {role:?}");
    let found = wait_until(&what, PATIENCE, async || {
        let cluster = client.cluster().await.ok()?.item;
        cluster.members.iter().find(|m| m.member.name.as_str() == name && m.role == role).map(|m| m.member.id)
    });
    found.await.unwrap()
}

#[tokio::test]
async fn a_member_that_lost_its_disk_is_replaced_while_writes_go_on() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::SERVERS).unwrap();
    let client = cluster.client().unwrap();
    let before = org(&client, "before").await;
    let victim = cluster.names("server")[1].clone();
    let old_id = has_role(&client, &victim, MemberRole::Voter).await;

    cluster.kill(std::slice::from_ref(&victim)).unwrap();
    let folder = cluster.process(&victim).unwrap().data_dir.clone();
    std::fs::remove_dir_all(&folder).unwrap();
    // The wiped folder does not come back as the member that it was.
    let again = cluster.holdfast(&["server", "run", "--data-dir", folder.to_str().unwrap()]).unwrap();
    assert!(!again.status.success());
    org(&client, "while-one-is-gone").await;

    for _ in 0..2 {
        let removed = holdfast(&cluster, &["server", "remove", &old_id.to_string()]);
        assert_eq!(removed["role"], "removed");
    }
    let (_server, _) = join(&cluster, &victim, 7461, &[]);
    let new_id = has_role(&client, &victim, MemberRole::Voter).await;
    assert!(new_id > old_id, "{new_id} after {old_id}");
    org(&client, "after").await;

    // The new member has it all, and counts: the group stands the loss of another.
    let joined = cluster.client_of(&["https://127.0.0.1:7461"]).unwrap();
    assert_eq!(joined.org(before).await.unwrap().item.id, before);
    let verified = holdfast(&cluster, &["server", "verify"]);
    assert_eq!(verified["sound"], true, "{verified}");
    assert_eq!(verified["members"].as_array().unwrap().len(), 3);
    let other = cluster.names("server")[2].clone();
    cluster.kill(std::slice::from_ref(&other)).unwrap();
    org(&client, "with-the-new-member").await;
    // Nobody is taken out when those that stay could decide nothing any more.
    let id = new_id.to_string();
    let refused = cluster.holdfast(&["server", "remove", &id, "--yes", "--json"]).unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("failed_precondition"));
}

#[tokio::test]
async fn a_learner_serves_and_becomes_a_voter_the_leader_changes_and_a_removed_member_stops() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::SERVERS).unwrap();
    let client = cluster.client().unwrap();
    let made = org(&client, "before").await;
    let (mut fourth, data_dir) = join(&cluster, "fourth", 7471, &["--learner"]);
    let id = has_role(&client, "fourth", MemberRole::Learner).await;
    let of_fourth = cluster.client_of(&["https://127.0.0.1:7471"]).unwrap();
    assert_eq!(of_fourth.org(made).await.unwrap().item.id, made, "a learner answers linearizable reads");
    let _edge = edge_of(&cluster, "https://127.0.0.1:7471");
    let written = org(&client, "seen-through-a-learner").await;
    let revision = of_fourth.events(holdfast_model::Revision(0), 1).await.unwrap().revision;
    assert_eq!(of_fourth.org(written).await.unwrap().item.id, written);
    let followed = wait_until("the edge to follow the learner", PATIENCE, async || {
        let edges = client.edges().await.ok()?.items;
        edges.iter().any(|e| e.contact.is_some_and(|c| c.applied >= revision)).then_some(())
    });
    followed.await.unwrap();
    // It stays what it is: nobody made it a voter meanwhile.
    assert_eq!(has_role(&client, "fourth", MemberRole::Learner).await, id);

    for _ in 0..2 {
        assert_eq!(holdfast(&cluster, &["server", "promote", "fourth"])["role"], "voter");
    }
    assert_eq!(holdfast(&cluster, &["server", "transfer-leader", "fourth"])["member"], id.0);
    let leads = wait_until("the fourth member to lead", PATIENCE, async || {
        (client.cluster().await.ok()?.item.leader == Some(id)).then_some(())
    });
    leads.await.unwrap();
    // A leader is demoted and removed too: it hands the leadership on first.
    assert_eq!(holdfast(&cluster, &["server", "demote", "fourth"])["role"], "learner");
    assert_eq!(holdfast(&cluster, &["server", "promote", "fourth"])["role"], "voter");
    assert_eq!(holdfast(&cluster, &["server", "transfer-leader", "fourth"])["member"], id.0);
    assert_eq!(holdfast(&cluster, &["server", "remove", "fourth"])["role"], "removed");
    org(&client, "after").await;

    let ended = wait_until("the removed member to stop", PATIENCE, async || fourth.0.try_wait().unwrap());
    assert!(!ended.await.unwrap().success());
    let again = cluster.holdfast(&["server", "run", "--data-dir", data_dir.to_str().unwrap()]).unwrap();
    let errors = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && errors.contains("removed from the cluster"), "{errors}");

    // What the views were once, by the members that run, and by the folder of one below.
    let live = holdfast(&cluster, &["server", "rebuild", "--to", "1"]);
    assert_eq!((&live["members"]["sound"], &live["revision"]), (&Value::from(true), &Value::from(1)));
    assert_eq!(live["members"]["members"].as_array().unwrap().len(), 3);

    // A stopped member's folder can be checked, rebuilt and looked into.
    let other = cluster.names("server")[2].clone();
    let pid = cluster.process(&other).unwrap().pid.to_string();
    // In order, so that its state is as far as its log.
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let gone = wait_until("the member to stop", PATIENCE, async || {
        (!Path::new("/proc").join(&pid).exists()).then_some(())
    });
    gone.await.unwrap();
    let folder = cluster.process(&other).unwrap().data_dir.clone();
    for file in ["state.redb", "log.redb"] {
        let sums = folder.join(file).with_extension("redb.sums");
        assert!(sums.exists(), "{file} was left as after a crash; the next start verifies all of it");
    }
    let folder = folder.to_str().unwrap();
    let running = cluster.process(&cluster.names("server")[0]).unwrap().data_dir.clone();
    let running = running.to_str().unwrap();
    let sound = holdfast(&cluster, &["server", "verify", "--data-dir", folder]);
    let rebuilt = holdfast(&cluster, &["server", "rebuild", "--data-dir", folder]);
    assert_eq!(sound["revision"], rebuilt["revision"]);
    let early = holdfast(&cluster, &["server", "rebuild", "--data-dir", folder, "--to", "1"]);
    assert_eq!((&early["revision"], &early["rows"]["cluster"]), (&Value::from(1), &Value::from(1)));
    assert_ne!(early["views"], rebuilt["views"]);
    assert_eq!((&early["views"], &early["rows"]), (&live["views"], &live["rows"]));
    for (exit, wrong) in [
        (1, &["server", "rebuild", "--data-dir", folder, "--to", "999999999"] as &[&str]),
        (2, &["server", "rebuild", "--data-dir", "/nonexistent", "--to", "1"]),
        (2, &["server", "verify", "--data-dir", "/nonexistent"]),
        // One whose member runs.
        (1, &["server", "verify", "--data-dir", running]),
        (1, &["server", "rebuild", "--data-dir", running]),
    ] {
        let refused = cluster.holdfast(wrong).unwrap();
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(exit), "{wrong:?}: {errors}");
    }
    assert_eq!(holdfast(&cluster, &["server", "verify", "--data-dir", folder])["state"], sound["state"]);
    cluster.restart(&other).unwrap();
    org(&client, "at-the-end").await;
}

#[tokio::test]
async fn i06_one_survivor_of_a_lost_majority_goes_on_and_the_edge_follows_it() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::NO_NODE).unwrap();
    let client = cluster.client().unwrap();
    let kept = org(&client, "kept").await;
    let servers = cluster.names("server");
    let survivor_url = cluster.record().servers[0].clone();
    let survivor = cluster.client_of(&[&survivor_url]).unwrap();
    // A linearizable read: the survivor has the write, in its log at least; its state may be empty after the kill.
    survivor.org(kept).await.unwrap();
    cluster.kill(&servers).unwrap();
    let folder = cluster.process(&servers[0]).unwrap().data_dir.clone();
    let folder = folder.to_str().unwrap();

    let hasty = cluster.holdfast(&["server", "recover", "--data-dir", folder]).unwrap();
    assert!(!hasty.status.success(), "it went on without being told that writes may be lost");
    let told = String::from_utf8_lossy(&hasty.stderr).into_owned();
    assert!(told.contains("The log of member 1 ends at term"), "{told}");
    let said = ["server", "recover", "--data-dir", folder, "--i-understand-that-writes-may-be-lost"];
    assert_eq!(holdfast(&cluster, &said)["incarnation"], 2);
    // Asked again before it ran, it begins no third one.
    assert!(!cluster.holdfast(&said).unwrap().status.success());
    cluster.restart(&servers[0]).unwrap();

    let alone = wait_until("the survivor to lead", PATIENCE, async || {
        let status = survivor.cluster().await.ok()?.item;
        (status.incarnation == Incarnation(2) && status.leader.is_some()).then_some(status)
    });
    let status = alone.await.unwrap();
    let present: Vec<_> = status.members.iter().filter(|m| m.role != MemberRole::Removed).collect();
    assert_eq!(present.len(), 1, "{present:?}");
    assert_eq!(survivor.org(kept).await.unwrap().item.id, kept);
    org(&survivor, "after").await;

    // It stands in the history: what happened, from where on, and that no tenant asked for it.
    let history = survivor.events(holdfast_model::Revision(0), 200).await.unwrap().items;
    let began = history.iter().find(|e| matches!(e.payload, EventPayload::IncarnationBegan { .. })).unwrap();
    assert_eq!(began.org, None);
    assert!(matches!(
        began.payload,
        EventPayload::IncarnationBegan { incarnation: Incarnation(2), survivor: MemberId(1), .. }
    ));

    // The edge, which followed incarnation 1, acts on a revision of the new one: it adopted the hand-over.
    let after = survivor.events(holdfast_model::Revision(0), 1).await.unwrap().revision;
    let adopted = wait_until("the edge to follow the new incarnation", PATIENCE, async || {
        let edges = survivor.edges().await.ok()?.items;
        edges.iter().any(|e| e.contact.is_some_and(|c| c.applied >= after)).then_some(())
    });
    adopted.await.unwrap();

    // The others were not lost after all: what they say is not heard, and they stop once they hear of the incarnation.
    cluster.restart(&servers[1]).unwrap();
    cluster.restart(&servers[2]).unwrap();
    org(&survivor, "while-the-old-ones-run").await;
    assert_eq!(survivor.cluster().await.unwrap().item.incarnation, Incarnation(2));
    for name in &servers[1..] {
        let folder = cluster.process(name).unwrap().data_dir.clone();
        let stopped = wait_until("an old member to stop for good", PATIENCE, async || {
            folder.join("verdict.postcard").exists().then_some(())
        });
        stopped.await.unwrap();
    }
    cluster.kill(&servers[1..]).unwrap();
    for name in &servers[1..] {
        let folder = cluster.process(name).unwrap().data_dir.clone();
        let again = cluster.holdfast(&["server", "run", "--data-dir", folder.to_str().unwrap()]).unwrap();
        assert!(String::from_utf8_lossy(&again.stderr).contains("goes on in incarnation 2"));
    }
    let (_server, _) = join_at(&cluster, &survivor_url);
    has_role(&survivor, "joined", MemberRole::Voter).await;
}

/// A new member of a cluster of which only one member is left.
fn join_at(cluster: &Cluster, server: &str) -> (Server, PathBuf) {
    let secret = cluster.data_dir().join("joined.secret");
    let secret = secret.to_str().unwrap();
    let invited = holdfast(cluster, &["server", "invite", "member", "--out", secret]);
    let pin = invited["ca_pin"].as_str().unwrap();
    let data_dir = cluster.data_dir().join("joined");
    let folder = data_dir.to_str().unwrap();
    let mut arguments = vec!["server", "join", "--name", "joined", "--data-dir", folder, "--server", server];
    arguments.extend(["--api-addr", "127.0.0.1:7481", "--raft-addr", "127.0.0.1:7482"]);
    arguments.extend(["--ca-pin", pin, "--secret-file", secret]);
    holdfast(cluster, &arguments);
    (Server::run(&data_dir), data_dir)
}
