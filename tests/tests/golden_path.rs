//! What a tenant does, through the command line, onto real microVMs: from nothing to a page by hostname, and on.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_tests::cluster::{Cluster, Options, wait_for};
use holdfast_tests::load::Target;
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::{netns, shop};
use serde_json::Value;
use std::process::Output;
use std::time::Duration;

const PORT: u16 = 8443;
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(60);

struct Tenant {
    cluster: Cluster,
}

impl Tenant {
    fn run(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["--org", "acme", "--app", "shop", "--env", "prod"];
        all.extend(arguments);
        self.cluster.holdfast(&all).unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.text(&all)).unwrap()
    }

    fn ready(&self) -> usize {
        let instances = self.json(&["instances"]);
        instances["items"]
            .as_array()
            .or(instances.as_array())
            .unwrap()
            .iter()
            .filter(|i| i["state"] == "ready")
            .count()
    }
}

#[tokio::test]
async fn from_nothing_to_a_page_by_hostname_and_back_from_a_bad_release() {
    netns::enter().unwrap();
    let registry = Registry::start().await.unwrap();
    let tls = WebappTls::generate(shop::HOSTNAME).unwrap();
    let image = webapp::push(registry.host(), "team/shop", "one", &tls).await.unwrap();
    let tenant = Tenant { cluster: Cluster::start(Options::WHOLE).unwrap() };
    tenant.text(&["org", "create", "acme"]);
    tenant.text(&["app", "create", "shop"]);
    tenant.text(&["env", "create", "prod"]);

    let manifest = shop::write_manifest(&tenant.cluster, 1).unwrap();
    // By tag: the digest is what the release keeps.
    let by_tag = format!("{}/team/shop:one", registry.host());
    let deployment = tenant.json(&["deploy", "--file", &manifest, "--image", &by_tag]);
    assert_eq!(deployment["state"], "complete");
    let releases = tenant.json(&["releases"]);
    assert_eq!(releases[0]["image"]["digest"], image.digest.as_str());
    assert_eq!(tenant.ready(), 1);

    let port = PORT.to_string();
    tenant.text(&["route", "add", shop::HOSTNAME, "--port", "https", "--listen", &port]);
    let target = Target::new(([127, 0, 0, 1], PORT).into(), shop::HOSTNAME, &tls.ca_pem).unwrap();
    let page = wait_for("the page", COME_MAX, || target.get("/").outcome.ok()).unwrap();
    assert!(page.contains("release one"), "{page}");
    let taken = tenant.run(&["--json", "route", "add", shop::HOSTNAME, "--port", "https", "--listen", &port]);
    assert_eq!(taken.status.code(), Some(5), "I8: a hostname has one owner");
    assert!(tenant.text(&["route", "list"]).contains(shop::HOSTNAME));

    tenant.text(&["scale", "web=2"]);
    assert_eq!(tenant.ready(), 2);
    assert!(tenant.text(&["logs"]).contains("listening on"));
    let events = tenant.text(&["events", "--limit", "200"]);
    for kind in ["org_created", "release_created", "deployment_started", "instance_placed", "route_created"] {
        assert!(events.contains(kind), "{kind} is in the history");
    }
    assert!(tenant.text(&["status"]).contains("node-1"));

    // A release that cannot run: the command says so, and what ran goes on.
    let broken = tenant.cluster.data_dir().join("broken.toml");
    let text =
        shop::manifest(2).replace("[processes.web]", "[processes.web]\ncommand = [\"/app/nothing-here\"]");
    let text = text.replace("scaling", "restart = { policy = \"never\" }\nscaling");
    std::fs::write(&broken, text).unwrap();
    let before = shop::machines(&tenant.cluster).unwrap();
    let failed =
        tenant.run(&["deploy", "--file", &broken.display().to_string(), "--image", &image.reference]);
    let said = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{said}");
    assert!(said.contains("goes back to its last good release"), "{said}");
    assert!(target.get("/").outcome.unwrap().contains("release one"));
    assert_eq!(
        shop::machines(&tenant.cluster).unwrap(),
        before,
        "the good release's microVMs were not touched"
    );

    let route = tenant.json(&["route", "list"]);
    tenant.text(&["route", "remove", route[0]["id"].as_str().unwrap()]);
    wait_for("the edge to drop the route", COME_MAX, || target.get("/").outcome.err()).unwrap();
}
