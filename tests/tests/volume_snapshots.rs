//! What a tenant gets back: snapshots of a volume that a real microVM writes to, through the command line, and volumes that
//! are restored from them, with agents that are killed and a store that lies.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

mod database;

use database::{COME_MAX, Tenant};
use holdfast_tests::cluster::wait_for;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Every object below a folder.
fn objects(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(objects(&path)) } else { found.push(path) }
    }
    found
}

fn id(of: &Value) -> String {
    of["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_restored_from_a_snapshot_that_was_taken_while_it_was_written_to() {
    let mut tenant = Tenant::start().await;
    assert_eq!(tenant.deploy("one")["state"], "complete");
    assert_eq!(tenant.told(), ["one"]);
    let attached = tenant.volume()["attached"].clone();

    // Taken while the machine runs, which stands for a moment and is not started again.
    let first = tenant.json(&["volume", "snapshot", "data"]);
    assert!(first["state"]["uploaded"]["stored_bytes"].as_u64().unwrap() > 0, "{first}");
    assert_eq!(tenant.volume()["attached"], attached);
    assert_eq!(tenant.told(), ["one"]);
    let store = tenant.cluster.data_dir().join("backups/volumes");
    let stored = objects(&store.join(id(&first)));
    assert!(stored.len() >= 3, "{stored:?}");
    for object in &stored {
        assert!(std::fs::read(object).unwrap().starts_with(b"age-encryption.org/v1"), "{}", object.display());
    }
    wait_for("the clone to be removed", COME_MAX, || {
        (!tenant.disk().join(format!("{}.img", id(&first))).exists()).then_some(())
    })
    .unwrap();

    // The volume goes on; the restored one is as it was.
    assert_eq!(tenant.deploy("two")["state"], "complete");
    assert_eq!(tenant.told(), ["one", "two"]);
    let taken = tenant.run(&["volume", "restore", &id(&first), "--as", "data"]);
    assert_eq!(taken.status.code(), Some(5), "{}", String::from_utf8_lossy(&taken.stderr));
    let absent = tenant.run(&["volume", "restore", "snap_00000000000000000000000000", "--as", "older"]);
    assert_eq!(absent.status.code(), Some(4), "{}", String::from_utf8_lossy(&absent.stderr));
    let older = tenant.json(&["volume", "restore", &id(&first), "--as", "older"]);
    assert_ne!(older["id"], tenant.volume()["id"]);
    assert_eq!(tenant.deploy_with("three", "older")["state"], "complete");
    assert_eq!(tenant.told_with("older"), ["one", "three"]);
    wait_for("the old volume to be free", COME_MAX, || tenant.volume()["attached"].is_null().then_some(()))
        .unwrap();
    tenant.text(&["--yes", "volume", "delete", "data"]);

    // The agent is killed the moment that a snapshot was asked for; it is taken all the same, once.
    let asked = tenant.json(&["volume", "snapshot", "older", "--no-wait"]);
    tenant.cluster.kill(&["node-1".to_owned()]).unwrap();
    tenant.cluster.restart("node-1").unwrap();
    let second = wait_for("the snapshot to be uploaded", COME_MAX, || {
        let all = tenant.json(&["volume", "snapshots", "older"]);
        let one = all.as_array().unwrap().iter().find(|one| one["id"] == asked["id"]).unwrap().clone();
        assert!(one["state"]["failed"].is_null(), "{one}");
        one["state"]["uploaded"].is_object().then_some(one)
    })
    .unwrap();
    let listed = tenant.text(&["volume", "snapshots"]);
    assert!(listed.contains(&id(&first)) && listed.contains(&id(&second)), "{listed}");

    // A store that changes one bit makes no volume, and is told.
    let part =
        objects(&store.join(id(&second))).into_iter().find(|path| path.to_str().unwrap().contains("part-"));
    let part = part.unwrap();
    let sound = std::fs::read(&part).unwrap();
    let mut wrong = sound.clone();
    *wrong.last_mut().unwrap() ^= 1;
    std::fs::write(&part, wrong).unwrap();
    let broken = tenant.run(&["volume", "restore", &id(&second), "--as", "broken"]);
    let said = String::from_utf8_lossy(&broken.stderr);
    assert_eq!(broken.status.code(), Some(1), "{said}");
    assert!(said.contains("is not what was stored"), "{said}");
    tenant.text(&["--yes", "volume", "delete", "broken"]);
    std::fs::write(&part, sound).unwrap();
    tenant.json(&["volume", "restore", &id(&second), "--as", "again"]);
    assert_eq!(tenant.deploy_with("four", "again")["state"], "complete");
    assert_eq!(tenant.told_with("again"), ["one", "three", "four"]);

    // Deleted, with what is stored.
    tenant.text(&["--yes", "volume", "delete-snapshot", &id(&first)]);
    assert_eq!(tenant.run(&["volume", "restore", &id(&first), "--as", "late"]).status.code(), Some(4));
    wait_for("the objects to be erased", COME_MAX, || {
        objects(&store.join(id(&first))).is_empty().then_some(())
    })
    .unwrap();
    assert!(!objects(&store.join(id(&second))).is_empty());
    let told = || tenant.text(&["events", "--limit", "300"]).contains("snapshot_erased").then_some(());
    wait_for("the history to say so", COME_MAX, told).unwrap();
}
