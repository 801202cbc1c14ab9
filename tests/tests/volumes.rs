//! What a tenant keeps: a volume through the command line, onto real microVMs, from its first deployment to its end.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

mod database;

use database::{COME_MAX, Tenant};
use holdfast_tests::cluster::{signal, wait_for};
use rustix::process::Signal;
use serde_json::Value;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_outlives_releases_agents_and_crashes_until_it_is_deleted() {
    let mut tenant = Tenant::start().await;

    assert_eq!(tenant.deploy("one")["state"], "complete");
    assert_eq!(tenant.told(), ["one"]);
    let volume = tenant.volume();
    assert_eq!((&volume["size_mib"], &volume["generation"]), (&32.into(), &1.into()));
    assert!(tenant.text(&["volume", "list"]).contains(volume["id"].as_str().unwrap()));

    // A new release has what the old one wrote.
    assert_eq!(tenant.deploy("two")["state"], "complete");
    assert_eq!(tenant.told(), ["one", "two"]);
    let after = tenant.volume();
    assert_eq!((&after["id"], &after["home"]), (&volume["id"], &volume["home"]));
    assert_eq!(after["generation"], 2);

    // The agent is killed and comes back: the machine goes on, and has its disk.
    let attached = after["attached"].clone();
    tenant.cluster.kill(&["node-1".to_owned()]).unwrap();
    tenant.cluster.restart("node-1").unwrap();
    assert_eq!(tenant.volume()["attached"], attached);
    assert_eq!(tenant.told(), ["one", "two"], "it was not started again");

    // The machine is killed: its node starts the same instance again, which finds the disk as it was.
    let folder = tenant.cluster.process("node-1").unwrap().data_dir.clone();
    let instance = attached["instance"].as_str().unwrap();
    let record = std::fs::read_to_string(folder.join("vms").join(instance).join("vm.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    let pid = record["process"]["pid"].as_u64().unwrap();
    signal(u32::try_from(pid).unwrap(), Signal::KILL);
    wait_for("the machine that was killed to run again", COME_MAX, || {
        (tenant.told().last().map(String::as_str) == Some("two") && tenant.told().len() == 5).then_some(())
    })
    .unwrap();
    assert_eq!(tenant.volume()["attached"], attached, "it is the same attachment");

    // It cannot be deleted while somebody has it or wants it.
    let refused = tenant.run(&["--yes", "volume", "delete", "data"]);
    assert_eq!(refused.status.code(), Some(5), "{}", String::from_utf8_lossy(&refused.stderr));
    let refused = tenant.run(&["--yes", "app", "delete", "shop"]);
    assert_eq!(refused.status.code(), Some(5), "{}", String::from_utf8_lossy(&refused.stderr));
    tenant.json(&["scale", "db=0"]);
    let disk = tenant.disk();
    wait_for("the volume to be free", COME_MAX, || tenant.volume()["attached"].is_null().then_some(()))
        .unwrap();
    assert!(disk.join("disk.img").is_file());
    tenant.text(&["--yes", "volume", "delete", "data"]);
    assert_eq!(tenant.run(&["volume", "show", "data"]).status.code(), Some(4));
    wait_for("its node to erase the disk", COME_MAX, || (!disk.exists()).then_some(())).unwrap();
    let erased = || tenant.text(&["events", "--limit", "200"]).contains("volume_erased").then_some(());
    wait_for("the history to say so", COME_MAX, erased).unwrap();
    tenant.text(&["--yes", "app", "delete", "shop"]);
}
