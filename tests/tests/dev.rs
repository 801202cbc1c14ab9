//! `holdfast dev` as a user meets it: made once, started again from disk, one at a time on a folder, told when a process
//! ends, and gone without a trace.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_model::api::CreateOrg;
use holdfast_tests::cluster::{Cluster, Options, binary, gone, wait_for};
use holdfast_tests::netns;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

/// A guard against hanging.
const SEEN_MAX: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_cluster_is_made_once_and_started_again_from_its_folder() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::NO_NODE).unwrap();
    let org =
        cluster.client().unwrap().create_org(&CreateOrg { name: "acme".parse().unwrap() }).await.unwrap();
    let first = cluster.record().clone();
    for secret in [&first.token_file, &first.context_file] {
        assert_eq!(
            std::fs::metadata(secret).unwrap().permissions().mode() & 0o777,
            0o600,
            "{}",
            secret.display()
        );
    }
    let token = std::fs::read_to_string(&first.token_file).unwrap();
    let record = std::fs::read_to_string(cluster.data_dir().join("dev.json")).unwrap();
    assert!(!record.contains(token.trim()), "I10: dev.json holds no secret");
    for process in &first.processes {
        let log = std::fs::read_to_string(&process.log_file).unwrap();
        assert!(!log.contains(token.trim()), "I10: {} logs no secret", process.name);
    }

    let second =
        Command::new(binary().unwrap()).arg("dev").arg("--data-dir").arg(cluster.data_dir()).output();
    let second = second.unwrap();
    assert_eq!(second.status.code(), Some(1), "two on one folder would fight");
    assert!(String::from_utf8_lossy(&second.stderr).contains("Another `holdfast dev` runs"));

    cluster.kill(&["edge-1".to_owned()]).unwrap();
    wait_for("the end of the edge to be reported", SEEN_MAX, || {
        cluster.log_ends().contains("edge-1 (pid").then_some(())
    })
    .unwrap();

    cluster.stop_and_start().unwrap();
    assert!(first.processes.iter().all(|p| gone(p.pid)), "every process ended");
    let again = cluster.client().unwrap().org(org.item.id).await.unwrap();
    assert_eq!(again.item, org.item);
    assert_eq!(cluster.record().servers, first.servers, "members keep their addresses");
    let record = cluster.data_dir().join("dev.json");
    cluster.end().unwrap();
    assert!(!record.exists(), "nothing runs, and nothing says that it does");
}
