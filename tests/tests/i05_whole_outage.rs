//! I5, I6 and I7 with real processes and a real microVM: with no server alive, edge and node come back from their own
//! disks and a crashed microVM comes back by itself; the returning control plane changes nothing.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_tests::cluster::{Cluster, Options, gone, signal, wait_for};
use holdfast_tests::load::{Load, Tally, Target};
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::{netns, shop};
use rustix::process::Signal;
use std::time::{Duration, Instant};

const PORT: u16 = 8443;
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(90);

fn accepted(cluster: &Cluster, arguments: &[&str]) -> String {
    let mut all = vec!["--app", "shop", "--env", "prod"];
    all.extend(arguments);
    let output = cluster.holdfast(&all).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn i05_edge_and_node_come_back_without_servers_and_i07_the_servers_return_does_no_harm() {
    netns::enter().unwrap();
    let registry = Registry::start().await.unwrap();
    let tls = WebappTls::generate(shop::HOSTNAME).unwrap();
    let image = webapp::push(registry.host(), "team/shop", "one", &tls).await.unwrap();
    let mut cluster = Cluster::start(Options::WHOLE).unwrap();
    accepted(&cluster, &["org", "create", "acme"]);
    accepted(&cluster, &["app", "create", "shop"]);
    accepted(&cluster, &["env", "create", "prod"]);
    let manifest = shop::write_manifest(&cluster, 1).unwrap();
    accepted(&cluster, &["deploy", "--file", &manifest, "--image", &image.reference]);
    accepted(&cluster, &["route", "add", shop::HOSTNAME, "--port", "https", "--listen", &PORT.to_string()]);
    let target = Target::new(([127, 0, 0, 1], PORT).into(), shop::HOSTNAME, &tls.ca_pem).unwrap();
    wait_for("the page", COME_MAX, || target.get("/").outcome.ok()).unwrap();

    // An upgrade of the edge: the next one takes the ports over, and the one before it ends by itself.
    let (load, old_edge, began) = (
        Load::start(&target, 2, Duration::from_millis(5)),
        cluster.process("edge-1").unwrap().pid,
        Instant::now(),
    );
    cluster.restart("edge-1").unwrap();
    wait_for("the edge before to end", COME_MAX, || gone(old_edge).then_some(())).unwrap();
    let tally = Tally::of(&load.stop(), began, Instant::now());
    assert!(tally.sent > 0 && tally.failed == 0, "{tally:?}");
    target.get("/").outcome.unwrap();

    // The images' registry goes too: what runs needs nobody.
    drop(registry);

    let before = shop::machines(&cluster).unwrap();
    assert_eq!(before.len(), 1);
    let everything: Vec<String> = cluster.record().processes.iter().map(|p| p.name.clone()).collect();
    cluster.kill(&everything).unwrap();
    for agent in ["edge-1", "node-1"] {
        cluster.restart(agent).unwrap();
    }
    wait_for("the page without servers", COME_MAX, || target.get("/").outcome.ok()).unwrap();
    let node = cluster.process("node-1").unwrap().pid;
    wait_for("the node agent to adopt the microVM", COME_MAX, || {
        let status = shop::node_status(&cluster).ok()?;
        (status["pid"] == node && shop::machines_of(&status) == before).then_some(())
    })
    .unwrap();

    let (instance, pid) = before[0].clone();
    signal(pid, Signal::KILL);
    let after = wait_for("the microVM to come back", COME_MAX, || {
        let now = shop::machines(&cluster).ok()?;
        now.iter()
            .all(|(id, now)| *id == instance && *now != pid)
            .then_some(now)
            .filter(|now| !now.is_empty())
    })
    .unwrap();
    wait_for("the page from the microVM that came back", COME_MAX, || target.get("/").outcome.ok()).unwrap();

    for server in cluster.names("server") {
        cluster.restart(&server).unwrap();
    }
    let status = wait_for("the control plane to hear of the restart", COME_MAX, || {
        let output = cluster.holdfast(&["--json", "--app", "shop", "--env", "prod", "instances"]).ok()?;
        let instances: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        (instances[0]["restarts"] == 1 && instances[0]["state"] == "ready").then_some(instances)
    })
    .unwrap();
    assert_eq!(status.as_array().map(Vec::len), Some(1), "nothing was placed anew");
    assert_eq!(shop::machines(&cluster).unwrap(), after, "nothing was restarted");
    assert!(target.get("/").outcome.is_ok());
    let deployments = accepted(&cluster, &["--json", "deployments"]);
    let deployments: serde_json::Value = serde_json::from_str(&deployments).unwrap();
    assert_eq!(deployments.as_array().map(Vec::len), Some(1), "no roll-out was begun");

    cluster.end().unwrap();
    assert!(after.iter().all(|(_, pid)| gone(*pid)), "`holdfast dev` leaves no microVM behind");
}
