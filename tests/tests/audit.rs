//! I12 through the command line: the history is searched, exported and verified without the cluster, and whatever was done
//! to an export is found.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_identity::Authority;
use holdfast_tests::cluster::{Cluster, Options};
use holdfast_tests::netns;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

struct Scene {
    cluster: Cluster,
}

impl Scene {
    /// Exit code, what it printed, and what it complained of.
    fn run(&self, arguments: &[&str]) -> (i32, Vec<Value>, Value) {
        let mut all = vec!["--json", "audit"];
        all.extend(arguments);
        let output = self.cluster.holdfast(&all).unwrap();
        let lines = |bytes: &[u8]| -> Vec<Value> {
            serde_json::Deserializer::from_slice(bytes).into_iter().map_while(Result::ok).collect()
        };
        let complaint = lines(&output.stderr).pop().unwrap_or_default();
        (output.status.code().unwrap(), lines(&output.stdout), complaint)
    }

    fn export(&self, name: &str, after: u64) -> PathBuf {
        let path = self.cluster.data_dir().join(name);
        let (code, ..) = self.run(&["export", path.to_str().unwrap(), "--after", &after.to_string()]);
        assert_eq!(code, 0);
        path
    }

    fn verify(&self, file: &Path, more: &[&str]) -> (i32, Vec<Value>, Value) {
        let ca = self.cluster.record().ca_file.clone();
        let mut arguments = vec!["verify", file.to_str().unwrap(), "--ca-file", ca.to_str().unwrap()];
        arguments.extend(more);
        self.run(&arguments)
    }

    /// A copy of an export with its lines changed is refused.
    fn refused(&self, file: &Path, why: &str, change: impl FnOnce(&mut Vec<String>)) {
        let text = std::fs::read_to_string(file).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        change(&mut lines);
        let changed = self.cluster.data_dir().join("changed.jsonl");
        std::fs::write(&changed, lines.join("\n") + "\n").unwrap();
        let (code, printed, complaint) = self.verify(&changed, &[]);
        assert_eq!((code, printed), (1, vec![]), "{complaint}");
        assert_eq!(complaint["code"], "not_authentic", "{complaint}");
        assert!(complaint["message"].as_str().unwrap().contains(why), "{complaint}");
    }
}

#[tokio::test]
async fn i12_an_exported_history_is_verified_without_the_cluster() {
    netns::enter().unwrap();
    let scene = Scene { cluster: Cluster::start(Options::SERVERS).unwrap() };
    for org in ["acme", "other"] {
        assert!(scene.cluster.holdfast(&["org", "create", org]).unwrap().status.success());
    }
    let file = scene.export("history.jsonl", 0);
    let (code, verified, complaint) = scene.verify(&file, &[]);
    assert_eq!(code, 0, "{complaint}");
    let revision = verified[0]["checkpoint"]["revision"].as_u64().unwrap();
    assert_eq!(verified[0]["events"].as_u64(), Some(revision));

    let at = |text: &str| text.len() / 2;
    scene.refused(&file, "was changed", |lines| lines[2] = lines[2].replacen("\"time\":1", "\"time\":2", 1));
    scene.refused(&file, "removed, added or moved", |lines| drop(lines.remove(2)));
    scene.refused(&file, "removed, added or moved", |lines| lines.swap(2, 3));
    scene.refused(&file, "it was cut", |lines| drop(lines.pop()));
    scene.refused(&file, "not those that were signed", |lines| drop(lines.remove(lines.len() - 2)));
    scene.refused(&file, "no event", |lines| {
        let half = at(&lines[2]);
        lines[2].truncate(half);
    });
    scene.refused(&file, "something follows", |lines| lines.push(lines[1].clone()));
    scene.refused(&file, "did not sign", |lines| {
        let last = lines.last_mut().unwrap();
        *last = last.replacen("\"incarnation\":1", "\"incarnation\":2", 1);
    });
    scene.refused(&file, "first line", |lines| drop(lines.remove(0)));
    scene.refused(&file, "names a chain before it", |lines| {
        lines[0] = lines[0].replacen("00000000", "00000001", 1)
    });

    // Another cluster's authority signed nothing of it.
    let foreign = scene.cluster.data_dir().join("foreign.pem");
    let authority = Authority::create("01jdcluster", SystemTime::now()).unwrap();
    std::fs::write(&foreign, authority.certificate().pem()).unwrap();
    let (code, _, complaint) =
        scene.run(&["verify", file.to_str().unwrap(), "--ca-file", foreign.to_str().unwrap()]);
    assert_eq!((code, complaint["code"].as_str()), (1, Some("not_authentic")), "{complaint}");

    // A later export goes on from it, and from nothing else.
    assert!(scene.cluster.holdfast(&["org", "create", "third"]).unwrap().status.success());
    let newer = scene.export("newer.jsonl", revision);
    let (code, verified, complaint) = scene.verify(&newer, &["--continues", file.to_str().unwrap()]);
    assert_eq!((code, verified[0]["after"].as_u64()), (0, Some(revision)), "{complaint}");
    let (code, _, complaint) = scene.verify(&file, &["--continues", newer.to_str().unwrap()]);
    assert_eq!((code, complaint["code"].as_str()), (1, Some("not_authentic")), "{complaint}");

    // What is there is not written over, and nothing is exported that did not happen.
    let again = scene.run(&["export", file.to_str().unwrap()]);
    assert_eq!((again.0, again.2["code"].as_str()), (2, Some("usage")));
    let beyond = scene.run(&["export", "beyond.jsonl", "--after", "999999"]);
    assert_eq!((beyond.0, beyond.2["code"].as_str()), (2, Some("usage")));

    let found = |arguments: &[&str]| {
        let mut all = vec!["search"];
        all.extend(arguments);
        let (code, events, complaint) = scene.run(&all);
        assert_eq!(code, 0, "{complaint}");
        events.len()
    };
    assert_eq!(found(&["--kind", "org_created"]), 3);
    assert_eq!(found(&["--kind", "org_created", "--limit", "2"]), 2);
    assert_eq!(found(&["--kind", "org_created", "--until", "1h"]), 0);
    assert_eq!(
        found(&["--kind", "org_created", "--since", "1h", "--about", "org", "--actor", "operator"]),
        3
    );
    assert_eq!(found(&["--kind", "org_created", "--source", "192.0.2.7"]), 0);
    assert_eq!(found(&["--about", "org_00000000000000000000000000"]), 0);
}
