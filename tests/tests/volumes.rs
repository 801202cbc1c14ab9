//! What a tenant keeps: a volume through the command line, onto real microVMs, from its first deployment to its end.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_tests::cluster::{Cluster, Options, signal, wait_for};
use holdfast_tests::netns;
use holdfast_tests::oci::{PushedImage, Registry, busybox};
use rustix::process::Signal;
use serde_json::Value;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(120);

/// Adds its release to what is on the volume, tells all of it, and stays.
fn manifest(release: &str) -> String {
    let script = "echo $RELEASE >> /data/runs; sync; while read run; do echo has $run; done < /data/runs; echo all; \
                  exec sleep 100000";
    format!(
        r#"schema_version = "v1"

[app]
name = "shop"

[processes.db]
command = ["sh", "-c", "{script}"]
user = "db"
resources = {{ memory = "64Mi", cpu = 0.5 }}
vars = {{ RELEASE = "{release}" }}
mounts = [{{ volume = "data", path = "/data" }}]

[[volumes]]
name = "data"
size = "32Mi"
"#
    )
}

async fn image(registry: &Registry) -> PushedImage {
    let account = busybox::Account { name: "db", id: 70, home: "/" };
    let programs = ["sh", "cat", "echo", "sleep", "sync"];
    busybox::push(registry.host(), "team/db", account, &programs).await.unwrap()
}

struct Tenant {
    cluster: Cluster,
    image: PushedImage,
}

impl Tenant {
    fn run(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["--org", "acme", "--app", "shop", "--env", "prod"];
        all.extend(arguments);
        self.cluster.holdfast(&all).unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}{}", self.cluster.log_ends());
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.text(&all)).unwrap()
    }

    fn deploy(&self, release: &str) -> Value {
        let path = self.cluster.data_dir().join(format!("{release}.toml"));
        std::fs::write(&path, manifest(release)).unwrap();
        self.json(&["deploy", "--file", path.to_str().unwrap(), "--image", &self.image.reference])
    }

    fn volume(&self) -> Value {
        self.json(&["volume", "show", "data"])
    }

    /// What the instance that has the volume told of what is on it.
    fn told(&self) -> Vec<String> {
        let instance = self.volume()["attached"]["instance"].as_str().unwrap().to_owned();
        let told = || {
            let text = self.text(&["logs", "--instance", &instance]);
            let lines: Vec<_> =
                text.lines().filter_map(|l| l.split_once("has ").map(|(_, run)| run.to_owned())).collect();
            text.contains("all").then_some(lines)
        };
        wait_for("the instance to tell", COME_MAX, told).unwrap()
    }

    fn disk(&self) -> PathBuf {
        let folder = self.cluster.process("node-1").unwrap().data_dir.clone();
        folder.join("volumes").join(self.volume()["id"].as_str().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_outlives_releases_agents_and_crashes_until_it_is_deleted() {
    netns::enter().unwrap();
    let registry = Registry::start().await.unwrap();
    let image = image(&registry).await;
    let mut tenant = Tenant { cluster: Cluster::start(Options::WHOLE).unwrap(), image };
    for make in [&["org", "create", "acme"][..], &["app", "create", "shop"], &["env", "create", "prod"]] {
        tenant.text(make);
    }

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
