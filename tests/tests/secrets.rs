//! I5 and I10 with real processes and a real microVM: secrets reach the guest's memory and nothing else, come back from
//! the node's own disk with no server alive, roll what runs when they change, and survive a rotation of the cluster's key.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test fails by panicking.

use data_encoding::{BASE64, HEXLOWER};
use holdfast_tests::cluster::{Cluster, Options, signal, wait_for};
use holdfast_tests::load::Target;
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::{netns, shop};
use rustix::process::Signal;
use std::io::{Seek, Write};
use std::process::Stdio;
use std::time::Duration;

const PORT: u16 = 8443;
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(120);
/// Values that stand nowhere but where they should.
const CANARIES: [&str; 3] = ["canary-one-5b1d0c77e2", "canary-two-97ffab1204", "canary-three\nline-c0ffee42"];

fn run(cluster: &Cluster, arguments: &[&str], input: Option<&[u8]>) -> String {
    let mut all = vec!["--app", "shop", "--env", "prod"];
    all.extend(arguments);
    let stdin = input.map_or_else(Stdio::null, |bytes| {
        // In memory: the test's own files must not be what the search finds.
        let fd = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = std::fs::File::from(fd);
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file.into()
    });
    let output = cluster.holdfast_reading(&all, stdin).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(cluster: &Cluster, arguments: &[&str]) -> serde_json::Value {
    let mut all = vec!["--json"];
    all.extend(arguments);
    serde_json::from_str(&run(cluster, &all, None)).unwrap()
}

/// Whether one of the spellings stands in the bytes.
fn holds(bytes: &[u8], spellings: &[Vec<u8>]) -> bool {
    spellings.iter().any(|s| bytes.windows(s.len()).any(|w| w == s.as_slice()))
}

/// Looks for the canaries in every byte that the cluster's processes wrote; tells how many files there were.
fn search(cluster: &Cluster) -> usize {
    let spellings: Vec<Vec<u8>> = CANARIES
        .iter()
        .flat_map(|c| {
            [c.as_bytes().to_vec(), BASE64.encode(c.as_bytes()).into(), HEXLOWER.encode(c.as_bytes()).into()]
        })
        .collect();
    let mut found = cluster.files().unwrap();
    found.extend(cluster.record().processes.iter().map(|p| p.log_file.clone()));
    for path in &found {
        // What a process removed meanwhile is not at rest.
        let Ok(bytes) = std::fs::read(path) else { continue };
        assert!(!holds(&bytes, &spellings), "{} holds a canary", path.display());
    }
    for process in &cluster.record().processes {
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
            assert!(!holds(&bytes, &spellings), "{} of {}", file, process.name);
        }
    }
    found.len()
}

#[tokio::test]
async fn i05_i10_secrets_reach_the_guest_and_nothing_else() {
    netns::enter().unwrap();
    let registry = Registry::start().await.unwrap();
    let tls = WebappTls::generate(shop::HOSTNAME).unwrap();
    let image = webapp::push(registry.host(), "team/shop", "one", &tls).await.unwrap();
    let mut cluster = Cluster::start(Options::WHOLE).unwrap();
    run(&cluster, &["org", "create", "acme"], None);
    run(&cluster, &["app", "create", "shop"], None);
    run(&cluster, &["env", "create", "prod"], None);
    let path = cluster.data_dir().join("holdfast.toml");
    let manifest = format!("{}secrets = {{ required = [\"DB_PASSWORD\"] }}\n", shop::manifest(1));
    std::fs::write(&path, manifest).unwrap();
    let manifest = path.display().to_string();
    run(&cluster, &["deploy", "--file", &manifest, "--image", &image.reference, "--no-wait"], None);
    assert_eq!(json(&cluster, &["deployments"])[0]["unschedulable"], "secrets_missing");
    run(&cluster, &["route", "add", shop::HOSTNAME, "--port", "https", "--listen", &PORT.to_string()], None);

    run(&cluster, &["secrets", "set", "DB_PASSWORD"], Some(CANARIES[0].as_bytes()));
    let target = Target::new(([127, 0, 0, 1], PORT).into(), shop::HOSTNAME, &tls.ca_pem).unwrap();
    let page = |path: &str| target.get(path).outcome.ok();
    let platform = |expected: &str| {
        let body = wait_for("the secrets in the guest", COME_MAX, || {
            page("/run/secrets/platform.env").filter(|body| body.ends_with(expected))
        });
        body.unwrap_or_else(|e| panic!("{e}\n{}", cluster.log_ends()))
    };
    let first = format!("# HOLDFAST_SECRETS_V1\nDB_PASSWORD={}\n", CANARIES[0]);
    let body = platform(&first);
    let (mode, content) = body.split_once('\n').unwrap();
    assert_eq!((mode.split(' ').next(), content), (Some("400"), first.as_str()));
    let keys = page("/run/secrets/keys/DB_PASSWORD").unwrap();
    assert!(keys.starts_with("400 ") && keys.ends_with(&format!("\n{}", CANARIES[0])), "{keys}");

    // A change makes new instances; a value with a line's end stands in base64, and as it is in its own file.
    let more = format!("SECOND={}\nTHIRD=base64:{}\n", CANARIES[1], BASE64.encode(CANARIES[2].as_bytes()));
    run(&cluster, &["secrets", "import", "--keep"], Some(more.as_bytes()));
    let second = format!("{first}{more}");
    platform(&second);
    assert!(page("/run/secrets/keys/THIRD").unwrap().ends_with(CANARIES[2]));
    assert!(json(&cluster, &["deployments"])[0]["cause"] == "secrets");
    // The workload has written what it read; the node took the values out.
    wait_for("the lines", COME_MAX, || {
        run(&cluster, &["logs"], None).contains("SECOND=[redacted]").then_some(())
    })
    .unwrap();
    assert!(search(&cluster) > 20, "everything that the processes wrote was looked at");

    // The cluster's own key changes under all that, and nothing notices.
    let client = cluster.client().unwrap();
    let before = client.sealing().await.unwrap().item;
    assert!(before.envelopes >= 1 && before.stale == 0);
    let said = run(&cluster, &["server", "rotate-sealing"], None);
    assert!(said.contains("The rotation is through."), "{said}");
    let after = client.sealing().await.unwrap().item;
    assert_eq!((after.stale, after.envelopes), (0, before.envelopes));
    assert_ne!(after.recipient, before.recipient);
    let listed = json(&cluster, &["server", "sealing"]);
    assert_eq!(listed["recipient"], after.recipient.unwrap().0.as_str());
    let shown = run(&cluster, &["secrets", "show", "SECOND"], None);
    assert_eq!(shown, format!("# HOLDFAST_SECRETS_V1\nSECOND={}\n", CANARIES[1]));

    // Roll-out over: one instance is left. Then nobody is there but the node's own disk.
    let machines = wait_for("one microVM", COME_MAX, || {
        shop::machines(&cluster).ok().filter(|machines| machines.len() == 1)
    });
    let before = machines.unwrap();
    drop(registry);
    let everything: Vec<String> = cluster.record().processes.iter().map(|p| p.name.clone()).collect();
    cluster.kill(&everything).unwrap();
    for agent in ["edge-1", "node-1"] {
        cluster.restart(agent).unwrap();
    }
    let (instance, pid) = before[0].clone();
    wait_for("the node agent to adopt the microVM", COME_MAX, || {
        let node = cluster.process("node-1").ok()?.pid;
        let status = shop::node_status(&cluster).ok()?;
        (status["pid"] == node && shop::machines_of(&status) == before).then_some(())
    })
    .unwrap();
    // An agent that found the machine takes values out of its lines, too.
    wait_for("the page of the adopted machine", COME_MAX, || page("/run/secrets/platform.env")).unwrap();
    signal(pid, Signal::KILL);
    wait_for("the microVM to come back", COME_MAX, || {
        let now = shop::machines(&cluster).ok()?;
        now.iter().any(|(id, now)| *id == instance && *now != pid).then_some(())
    })
    .unwrap();
    let back = wait_for("its secrets, without any server", COME_MAX, || {
        page("/run/secrets/platform.env").filter(|body| body.ends_with(&second))
    });
    back.unwrap_or_else(|e| panic!("{e}\n{}", cluster.log_ends()));

    for server in cluster.names("server") {
        cluster.restart(&server).unwrap();
    }
    let listed = wait_for("the control plane", COME_MAX, || {
        let output =
            cluster.holdfast(&["--json", "--app", "shop", "--env", "prod", "secrets", "list"]).ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .unwrap();
    assert!(listed.contains("DB_PASSWORD") && !CANARIES.iter().any(|c| listed.contains(c)), "{listed}");
    // I12: that a value was shown stands in the history, and what it is does not.
    let events = run(&cluster, &["--json", "events", "--limit", "200"], None);
    for kind in ["secrets_read", "cluster_recipient_changed", "envelope_resealed"] {
        assert!(events.contains(kind), "{kind}: {events}");
    }
    assert!(!CANARIES.iter().any(|c| events.contains(c)));
    search(&cluster);
    cluster.end().unwrap();
}
