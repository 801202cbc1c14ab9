//! What a node with a real guest tells Prometheus.
//!
//! Needs what `cargo xtask assets` makes and installs, and root. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
mod namespace;
#[allow(dead_code, reason = "shared with the tests of outages")]
mod scene;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use holdfast_model::InstanceId;
use holdfast_model::manifest::RestartPolicy;
use holdfast_model::resource::InstanceState;
use scene::{METRICS_SOCKET, Scene, fetch, until, was_agent};

fn scrape(data_dir: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(data_dir.join(METRICS_SOCKET)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: node\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    Some(body.to_owned())
}

/// The value of a series: of an instance, or of the node.
fn value(text: &str, name: &str, instance: Option<InstanceId>) -> f64 {
    let needle = instance.map_or_else(String::new, |id| format!("instance_id=\"{id}\""));
    let is = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(&needle)
    };
    let line = text.lines().find(is).unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn promtool(text: &str) -> String {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool must be installed: Debian's package prometheus");
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

#[test]
fn a_nodes_metrics_tell_of_its_microvms_and_prometheus_reads_them() {
    const TEST: &str = "a_nodes_metrics_tell_of_its_microvms_and_prometheus_reads_them";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let [one, mut greedy] = [scene.instance(1), scene.instance(2)];
    // `tail` keeps all of a line that never ends.
    greedy.command = Some(["sh", "-c", "tail /dev/zero"].map(str::to_owned).to_vec());
    greedy.health = None;
    greedy.restart.policy = RestartPolicy::Never;
    scene.desire(&[one.clone(), greedy.clone()]);
    let mut agent = scene.agent();
    agent.wait_for(one.id, InstanceState::Ready);
    agent.wait_for(greedy.id, InstanceState::Failed);
    assert!(fetch(one.address).unwrap().contains("page of 1"));
    let data_dir = scene.data_dir();
    let mut text = String::new();
    until("metrics are served", || scrape(&data_dir).map(|scraped| text = scraped).is_some());
    assert_eq!(promtool(&text), "", "{text}");
    let of = |name: &str| value(&text, name, Some(one.id));
    assert!(
        text.contains("org=\"acme\",app=\"shop\",env=\"production\",process=\"web\",state=\"ready\"} 1"),
        "{text}"
    );
    assert!(of("holdfast_node_vm_cpu_seconds_total") > 0.0);
    let (resident, limit) =
        (of("holdfast_node_vm_resident_bytes"), of("holdfast_node_vm_memory_limit_bytes"));
    assert_eq!(limit, f64::from(128 + 64) * 1_048_576.0);
    assert!(resident > 8e6 && resident < 4.0 * limit, "{resident}");
    assert_eq!(of("holdfast_node_vm_restarts_total"), 0.0);
    assert!(of("holdfast_node_vm_log_lines_total") >= 2.0 && of("holdfast_node_vm_log_bytes") > 100.0);
    assert_eq!(of("holdfast_node_vm_log_lines_dropped_total"), 0.0);
    // A page and its handshake went each way.
    assert!(of("holdfast_node_vm_network_sent_bytes_total") > 200.0);
    assert!(of("holdfast_node_vm_network_received_bytes_total") > 200.0);
    assert_eq!(value(&text, "holdfast_node_vm_oom_kills_total", Some(greedy.id)), 1.0);
    assert_eq!(of("holdfast_node_vm_oom_kills_total"), 0.0);
    let host = |name: &str| value(&text, name, None);
    assert_eq!((host("holdfast_node_vmm_boots"), host("holdfast_node_follows")), (1.0, 0.0));
    assert_eq!(host("holdfast_node_memory_promised_bytes"), limit, "what has failed takes none");
    assert_eq!(host("holdfast_node_revision"), 1.0);
    assert_eq!(host("holdfast_node_image_cache_bound_bytes"), 20.0 * 1_073_741_824.0);
    assert!(text.contains("holdfast_node_image_evictions_total{kind=\"root\"} 0"), "{text}");
    assert_eq!(host("holdfast_node_image_evicted_bytes_total"), 0.0);
    assert!(host("holdfast_node_image_cache_bytes") > 0.0 && host("holdfast_node_logs_bytes") > 0.0);
    assert!(host("holdfast_node_supervisor_passes_total") > 2.0);
    assert!(host("holdfast_node_supervisor_age_seconds") < 120.0);
    agent.stop();
    assert_eq!(scene.wipe(), 1);
}
