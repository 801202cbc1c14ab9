//! What a tenant reads of its instances' lines while everything in between is killed: each line once.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use holdfast_tests::cluster::{Cluster, Options, binary, wait_for};
use holdfast_tests::load::Target;
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::{netns, shop};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PORT: u16 = 8443;
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(120);
const PLACE: [&str; 6] = ["--org", "acme", "--app", "shop", "--env", "prod"];

/// Requests that were answered by the app, which writes a line for each: by the number that it carries.
struct Visitor {
    target: Target,
    answered: Mutex<Vec<usize>>,
    done: AtomicBool,
}

impl Visitor {
    fn visit(&self) {
        for number in 1.. {
            if self.done.load(Ordering::SeqCst) {
                return;
            }
            if self.target.get(&format!("/big?bytes={number}")).outcome.is_ok() {
                self.answered.lock().unwrap().push(number);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn last(&self) -> usize {
        self.answered.lock().unwrap().last().copied().unwrap_or(0)
    }

    /// Waits until so many more requests were answered.
    fn go_on(&self, more: usize) {
        let until = self.answered.lock().unwrap().len() + more;
        let enough = || (self.answered.lock().unwrap().len() >= until).then_some(());
        wait_for("requests to be answered", COME_MAX, enough).unwrap();
    }
}

fn run(cluster: &Cluster, arguments: &[&str]) -> Output {
    cluster.holdfast(&[&PLACE[..], arguments].concat()).unwrap()
}

fn text(cluster: &Cluster, arguments: &[&str]) -> String {
    let output = run(cluster, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `holdfast logs --follow` into a file, ended with this.
struct Following {
    child: Child,
    path: PathBuf,
}

impl Following {
    fn start(cluster: &Cluster) -> Self {
        let path = cluster.data_dir().join("followed.jsonl");
        let child = Command::new(binary().unwrap())
            .args(PLACE)
            .args(["--json", "logs", "--follow", "--tail", "0"])
            .env("HOLDFAST_CONTEXT", &cluster.record().context_file)
            .stdin(Stdio::null())
            .stdout(File::create(&path).unwrap())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        Self { child, path }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The numbers of requests in the lines that were printed whole, with how often each was, and instances in their order.
fn printed(path: &Path) -> (BTreeMap<usize, usize>, Vec<String>) {
    let text = std::fs::read_to_string(path).unwrap();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let (mut numbers, mut instances) = (BTreeMap::new(), Vec::new());
    for line in whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let instance = line["instance"].as_str().unwrap().to_owned();
        if !instances.contains(&instance) {
            instances.push(instance);
        }
        let said = line["text"].as_str().unwrap_or_default();
        let number =
            said.strip_prefix("GET /big?bytes=").and_then(|rest| rest.split(' ').next()?.parse().ok());
        if let Some(number) = number {
            *numbers.entry(number).or_default() += 1;
        }
    }
    (numbers, instances)
}

#[tokio::test(flavor = "multi_thread")]
async fn i05_a_follower_sees_each_line_once_while_members_agents_and_instances_are_replaced() {
    netns::enter().unwrap();
    let registry = Registry::start().await.unwrap();
    let tls = WebappTls::generate(shop::HOSTNAME).unwrap();
    let image = webapp::push(registry.host(), "team/shop", "one", &tls).await.unwrap();
    let mut cluster = Cluster::start(Options::WHOLE).unwrap();
    for arguments in [["org", "create", "acme"], ["app", "create", "shop"], ["env", "create", "prod"]] {
        text(&cluster, &arguments);
    }
    let manifest = shop::write_manifest(&cluster, 1).unwrap();
    let deploy = ["deploy", "--file", &manifest, "--image", &image.reference];
    text(&cluster, &deploy);
    text(&cluster, &["route", "add", shop::HOSTNAME, "--port", "https", "--listen", &PORT.to_string()]);
    let target = Target::new(([127, 0, 0, 1], PORT).into(), shop::HOSTNAME, &tls.ca_pem).unwrap();
    wait_for("the page", COME_MAX, || target.get("/").outcome.ok()).unwrap();

    let following = Following::start(&cluster);
    let visitor = Arc::new(Visitor { target, answered: Mutex::default(), done: AtomicBool::new(false) });
    let visiting = std::thread::spawn({
        let visitor = Arc::clone(&visitor);
        move || visitor.visit()
    });
    let seen = |least: usize| {
        let (numbers, _) = printed(&following.path);
        numbers.last_key_value().is_some_and(|(last, _)| *last >= least).then_some(())
    };
    visitor.go_on(10);
    wait_for("lines to be followed", COME_MAX, || seen(1)).unwrap();
    // Every member in turn: whichever the follower and the node were with is among them.
    for server in cluster.names("server") {
        cluster.kill(std::slice::from_ref(&server)).unwrap();
        visitor.go_on(10);
        cluster.restart(&server).unwrap();
        let last = visitor.last();
        wait_for("the follower to catch up", COME_MAX, || seen(last)).unwrap();
    }
    // The agent of the node, while the instance goes on.
    let node = cluster.names("node");
    cluster.kill(&node).unwrap();
    visitor.go_on(20);
    cluster.restart(&node[0]).unwrap();
    let last = visitor.last();
    wait_for("the follower to catch up", COME_MAX, || seen(last)).unwrap();
    // The instance.
    let changed = std::fs::read_to_string(&manifest).unwrap() + "\n[env]\nvars = { TIMES = \"two\" }\n";
    std::fs::write(&manifest, changed).unwrap();
    text(&cluster, &deploy);
    visitor.go_on(20);
    visitor.done.store(true, Ordering::SeqCst);
    visiting.join().unwrap();
    let last = visitor.last();
    wait_for("the last line", COME_MAX, || seen(last)).unwrap();

    let (numbers, instances) = printed(&following.path);
    let first = *numbers.first_key_value().unwrap().0;
    let answered = visitor.answered.lock().unwrap().clone();
    for number in answered.iter().filter(|number| **number >= first) {
        assert_eq!(numbers.get(number), Some(&1), "request {number}");
    }
    assert!(numbers.values().all(|times| *times == 1), "{numbers:?}");
    assert_eq!(instances.len(), 2, "the old one and the new: {instances:?}");

    // And without following: merged, of one, the last ones, those that ended.
    let shown = text(&cluster, &["logs", "--all", "--timestamps"]);
    assert!(shown.lines().all(|line| line.starts_with("web ") && line.contains(" | 20")), "{shown}");
    for instance in &instances {
        let all = text(&cluster, &["logs", "--instance", instance, "--tail", "100000"]);
        let short = text(&cluster, &["logs", "--instance", instance, "--tail", "3"]);
        assert_eq!(short.lines().count(), 3, "{short}");
        assert!(all.ends_with(&short) && all.contains("listening on"), "{all}");
    }
    assert!(text(&cluster, &["logs", "--process", "web", "--since", "1h"]).contains("GET /big"));
    assert_eq!(text(&cluster, &["logs", "--process", "other"]), "");
}
