//! `holdfast doctor` as a person runs it: what it finds of a cluster that is well, of one that has lost a member, and of a
//! login that others can read.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use std::os::unix::fs::PermissionsExt;

use holdfast_tests::cluster::{Cluster, Options, wait_for};
use holdfast_tests::netns;
use serde_json::Value;
use std::time::Duration;

/// A guard against hanging: an election.
const PATIENCE: Duration = Duration::from_secs(120);

/// The exit code, and the findings with their severities.
fn ask(cluster: &Cluster, arguments: &[&str]) -> (i32, Value) {
    let output = cluster.holdfast(&[&["doctor", "--json"], arguments].concat()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output.status.code().unwrap(), report)
}

fn severity<'a>(report: &'a Value, id: &str) -> &'a str {
    let findings = report["findings"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["id"] == id);
    finding.unwrap_or_else(|| panic!("{id}: {report:#}"))["severity"].as_str().unwrap()
}

#[tokio::test]
async fn the_doctor_tells_a_cluster_that_is_well_from_one_that_is_not() {
    netns::enter().unwrap();
    let mut cluster = Cluster::start(Options::SERVERS).unwrap();
    let (code, report) = ask(&cluster, &["--cluster"]);
    assert_eq!((code, report["worst"].as_str()), (0, Some("ok")), "{report:#}");
    for id in ["login", "members", "token"] {
        assert_eq!(severity(&report, id), "ok");
    }

    // One member of three: commands still work, and it is said.
    let one = cluster.names("server")[0].clone();
    cluster.kill(&[one]).unwrap();
    wait_for("the other two to answer", PATIENCE, || {
        let (code, report) = ask(&cluster, &["--cluster"]);
        ((code, severity(&report, "members"), severity(&report, "token")) == (0, "warn", "ok")).then_some(())
    })
    .unwrap();
    let rest = cluster.names("server")[1..].to_vec();
    cluster.kill(&rest).unwrap();
    let (code, report) = ask(&cluster, &["--cluster"]);
    assert_eq!(
        (code, severity(&report, "members"), severity(&report, "token")),
        (1, "fail", "unknown"),
        "{report:#}"
    );

    // A login that others can read is none.
    let copy = cluster.data_dir().join("copied.json");
    std::fs::write(&copy, "{}").unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, report) = ask(&cluster, &["--cluster", "--context", copy.to_str().unwrap()]);
    assert_eq!((code, severity(&report, "login")), (1, "fail"), "{report:#}");

    // This host, whatever it is: the code follows from the worst finding, and each that is not well says what to do.
    let (code, report) = ask(&cluster, &["--host"]);
    assert_eq!(code == 1, report["worst"] == "fail", "{report:#}");
    assert_eq!(severity(&report, "seccomp"), "ok", "every test with a VMM needs it");
    for finding in report["findings"].as_array().unwrap() {
        assert!(!finding["seen"].as_str().unwrap().is_empty(), "{finding}");
        if ["warn", "fail"].contains(&finding["severity"].as_str().unwrap()) {
            assert!(finding["means"].is_string() && finding["mend"].is_string(), "{finding}");
        }
    }
}
