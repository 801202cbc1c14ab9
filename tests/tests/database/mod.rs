//! A tenant with a database that tells what is on its volume.

#![allow(dead_code)] // Each test uses what it needs.

use holdfast_tests::cluster::{Cluster, Options, wait_for};
use holdfast_tests::netns;
use holdfast_tests::oci::{PushedImage, Registry, busybox};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

/// A guard against hanging.
pub(crate) const COME_MAX: Duration = Duration::from_secs(120);

/// Adds its release to what is on the volume, tells all of it, and stays.
fn manifest(release: &str, volume: &str) -> String {
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
mounts = [{{ volume = "{volume}", path = "/data" }}]

[[volumes]]
name = "{volume}"
size = "32Mi"
"#
    )
}

async fn image(registry: &Registry) -> PushedImage {
    let account = busybox::Account { name: "db", id: 70, home: "/" };
    let programs = ["sh", "cat", "echo", "sleep", "sync"];
    busybox::push(registry.host(), "team/db", account, &programs).await.unwrap()
}

pub(crate) struct Tenant {
    pub(crate) cluster: Cluster,
    image: PushedImage,
    /// Goes after the cluster that pulls from it.
    _registry: Registry,
}

impl Tenant {
    /// A cluster in a network of its own, with an org, an app and an env.
    pub(crate) async fn start() -> Self {
        netns::enter().unwrap();
        let registry = Registry::start().await.unwrap();
        let image = image(&registry).await;
        let cluster = Cluster::start(Options::WHOLE).unwrap();
        let tenant = Self { cluster, image, _registry: registry };
        for make in [&["org", "create", "acme"][..], &["app", "create", "shop"], &["env", "create", "prod"]] {
            tenant.text(make);
        }
        tenant
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["--org", "acme", "--app", "shop", "--env", "prod"];
        all.extend(arguments);
        self.cluster.holdfast(&all).unwrap()
    }

    pub(crate) fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}{}", self.cluster.log_ends());
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.text(&all)).unwrap()
    }

    pub(crate) fn deploy(&self, release: &str) -> Value {
        self.deploy_with(release, "data")
    }

    /// The same, with another volume.
    pub(crate) fn deploy_with(&self, release: &str, volume: &str) -> Value {
        let path = self.cluster.data_dir().join(format!("{release}.toml"));
        std::fs::write(&path, manifest(release, volume)).unwrap();
        self.json(&["deploy", "--file", path.to_str().unwrap(), "--image", &self.image.reference])
    }

    pub(crate) fn volume(&self) -> Value {
        self.named("data")
    }

    pub(crate) fn named(&self, volume: &str) -> Value {
        self.json(&["volume", "show", volume])
    }

    /// What the instance that has the volume told of what is on it.
    pub(crate) fn told(&self) -> Vec<String> {
        self.told_with("data")
    }

    /// The same, of another volume.
    pub(crate) fn told_with(&self, volume: &str) -> Vec<String> {
        let instance = self.named(volume)["attached"]["instance"].as_str().unwrap().to_owned();
        let told = || {
            let text = self.text(&["logs", "--instance", &instance]);
            let lines: Vec<_> =
                text.lines().filter_map(|l| l.split_once("has ").map(|(_, run)| run.to_owned())).collect();
            text.contains("all").then_some(lines)
        };
        wait_for("the instance to tell", COME_MAX, told).unwrap()
    }

    pub(crate) fn disk(&self) -> PathBuf {
        let folder = self.cluster.process("node-1").unwrap().data_dir.clone();
        folder.join("volumes").join(self.volume()["id"].as_str().unwrap())
    }
}
