//! The story, in the order in which it happens.

use crate::checks::Checks;
use holdfast_tests::cluster::{Cluster, Options, signal, wait_for};
use holdfast_tests::load::{Load, Sample, Tally, Target, outage};
use holdfast_tests::oci::webapp::WebappTls;
use holdfast_tests::oci::{Registry, webapp};
use holdfast_tests::shop::{self, machines, machines_of, node_status};
use rustix::process::Signal;
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

const PORT: u16 = 443;
/// Threads that send requests, and the pause of each between two.
const LOAD_THREADS: usize = 4;
const LOAD_PAUSE: Duration = Duration::from_millis(40);
/// How long each state of things is watched under load.
const WATCH: Duration = Duration::from_secs(5);
/// The longest outage while an edge is killed and started again.
const EDGE_OUTAGE_MAX: Duration = Duration::from_secs(1);
/// A guard against hanging, where something has to come by itself.
const COME_MAX: Duration = Duration::from_secs(60);

type Any = Box<dyn Error>;

/// Tells it; says whether everything held.
pub(crate) async fn tell() -> Result<bool, Any> {
    let began = Instant::now();
    let mut checks = Checks::default();

    say("A registry with two releases of a small TLS web app");
    let registry = Registry::start().await?;
    let tls = WebappTls::generate(shop::HOSTNAME)?;
    let one = webapp::push(registry.host(), "demo/shop", "one", &tls).await?;
    let two = webapp::push(registry.host(), "demo/shop", "two", &tls).await?;
    println!("   {}\n   {}", one.reference, two.reference);

    say("A cluster: three servers, an edge, a node");
    let started = Instant::now();
    let mut cluster = Cluster::start(Options::WHOLE)?;
    println!("   up after {:.1} s", started.elapsed().as_secs_f32());
    show(&cluster, &["status"])?;

    say("Deploy the app onto two microVMs, and lead a hostname to it");
    let manifest = shop::write_manifest(&cluster, 2)?;
    show(&cluster, &["org", "create", "acme"])?;
    show(&cluster, &["app", "create", "shop"])?;
    show(&cluster, &["env", "create", "prod", "--app", "shop"])?;
    let deployed = Instant::now();
    show(&cluster, &["deploy", "--file", &manifest, "--env", "prod", "--image", &one.reference])?;
    checks.check("two microVMs serve", machines(&cluster)?.len() == 2, seconds(deployed.elapsed()));
    show(&cluster, &["route", "add", shop::HOSTNAME, "--port", "https", "--app", "shop", "--env", "prod"])?;
    show(&cluster, &["instances", "--app", "shop", "--env", "prod"])?;

    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let target = Target::new(address, shop::HOSTNAME, &tls.ca_pem)?;
    let routed = Instant::now();
    wait_for("the edge to serve the route", COME_MAX, || target.get("/").outcome.ok())?;
    println!("   the first answer came {:.2} s after the route", routed.elapsed().as_secs_f32());
    let page = curl(&cluster, &tls.ca_pem)?;
    checks.check("curl gets the page by hostname", page.contains("release one"), page.trim());

    let load = Load::start(&target, LOAD_THREADS, LOAD_PAUSE);
    let outcome = lose_everything(&mut cluster, &load, &mut checks)
        .and_then(|()| come_back(&mut cluster, &load, &mut checks, &manifest, &two.reference));
    let samples = load.stop();
    if let Err(error) = outcome {
        eprintln!("{}", cluster.log_ends());
        return Err(error);
    }
    let (all, failed) = (samples.len(), samples.iter().filter(|s| s.outcome.is_err()).count());
    println!(
        "\n   {all} requests in all; {failed} of them were in flight inside what was killed, and failed"
    );

    say("Stop the cluster");
    cluster.end()?;
    drop(registry);
    Ok(checks.conclude(began.elapsed()))
}

/// The control plane goes, then the edge, the node agent and a microVM while it is gone.
fn lose_everything(cluster: &mut Cluster, load: &Load, checks: &mut Checks) -> Result<(), Any> {
    say("Requests, with everything as it should be");
    let (from, to) = watch();
    checks.no_failure("everything runs", &Tally::of(&ended_by(load, to), from, to));

    say("kill -9 all three servers");
    let servers = cluster.names("server");
    let from = Instant::now();
    cluster.kill(&servers)?;
    let status = cluster.holdfast(&["status"])?;
    println!("   `holdfast status`: {}", String::from_utf8_lossy(&status.stderr).trim().replace('\n', " "));
    let (_, to) = watch();
    checks.no_failure("all servers are lost", &Tally::of(&ended_by(load, to), from, to));

    say("kill -9 the edge, and start it again: no server runs");
    let edge = cluster.names("edge");
    let cut = Instant::now();
    cluster.kill(&edge)?;
    cluster.restart(&edge[0])?;
    let back = wait_for("the edge to serve again", COME_MAX, || outage(&load.samples(), cut))?;
    checks.check("the edge is back within 1 s", back < EDGE_OUTAGE_MAX, format!("{} ms", back.as_millis()));
    let (from, to) = (cut + back, watch().1);
    checks.no_failure("the edge runs from its own disk", &Tally::of(&ended_by(load, to), from, to));

    say("kill -9 the node agent, and start it again: no server runs");
    let before = machines(cluster)?;
    let node = cluster.names("node");
    let from = Instant::now();
    cluster.kill(&node)?;
    cluster.restart(&node[0])?;
    let agent = cluster.process(&node[0])?.pid;
    wait_for("the node agent to adopt its microVMs", COME_MAX, || {
        let status = node_status(cluster).ok()?;
        let same = status["pid"] == agent && machines_of(&status) == before;
        same.then_some(())
    })?;
    let (_, to) = watch();
    checks.check(
        "the node agent adopted the microVMs that ran",
        machines(cluster)? == before,
        "the same processes",
    );
    checks.no_failure("the node agent was killed", &Tally::of(&ended_by(load, to), from, to));

    say("Crash one microVM: no server runs");
    let Some((victim, pid)) = before.first().cloned() else { return Err("no microVM runs".into()) };
    let cut = Instant::now();
    signal(pid, Signal::KILL);
    println!("   killed the VMM of {victim} (pid {pid})");
    wait_for("the microVM to come back", COME_MAX, || {
        let now = machines(cluster).ok()?;
        now.iter().any(|(id, now)| *id == victim && *now != pid).then_some(())
    })?;
    let back = cut.elapsed();
    checks.check("the microVM came back by itself", true, seconds(back));
    let (_, to) = watch();
    // What was in flight inside the microVM died with it; whatever began after has to be served by the other one.
    checks.no_failure("a microVM crashed", &Tally::of(&ended_by(load, to), cut, to));
    Ok(())
}

/// The control plane returns and does no harm; a second release goes out under load.
fn come_back(
    cluster: &mut Cluster,
    load: &Load,
    checks: &mut Checks,
    manifest: &str,
    image: &str,
) -> Result<(), Any> {
    say("Start the servers again");
    let before = machines(cluster)?;
    let from = Instant::now();
    for server in cluster.names("server") {
        cluster.restart(&server)?;
    }
    wait_for("the control plane to answer", COME_MAX, || {
        cluster.holdfast(&["status"]).ok().filter(|o| o.status.success()).map(drop)
    })?;
    println!("   it answers after {:.1} s", from.elapsed().as_secs_f32());
    let (_, to) = watch();
    show(cluster, &["instances", "--app", "shop", "--env", "prod"])?;
    checks.check(
        "the returning control plane restarted nothing",
        machines(cluster)? == before,
        "the same processes",
    );
    checks.no_failure("the control plane came back", &Tally::of(&ended_by(load, to), from, to));

    say("Deploy a second release under load");
    let from = Instant::now();
    show(cluster, &["deploy", "--file", manifest, "--env", "prod", "--image", image])?;
    let took = from.elapsed();
    let (_, to) = watch();
    let samples = ended_by(load, to);
    checks.no_failure("a second release was deployed", &Tally::of(&samples, from, to));
    let last = samples.iter().rev().find_map(|s| s.outcome.as_ref().ok()).cloned().unwrap_or_default();
    checks.check(
        "the second release serves",
        last.contains("release two"),
        format!("after {}", seconds(took)),
    );
    show(cluster, &["deployments", "--app", "shop", "--env", "prod"])?;
    Ok(())
}

fn say(what: &str) {
    println!("\n== {what}");
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f32())
}

/// Lets the load run, and returns from when to when.
fn watch() -> (Instant, Instant) {
    let from = Instant::now();
    std::thread::sleep(WATCH);
    (from, Instant::now())
}

/// The samples, once every request that began before `to` has ended.
fn ended_by(load: &Load, to: Instant) -> Vec<Sample> {
    // A request ends by its own time-out at the latest; then its thread goes on to a younger one.
    let all_younger = |samples: &[Sample]| samples.iter().filter(|s| s.began >= to).count() >= LOAD_THREADS;
    let _ = wait_for("requests to end", COME_MAX, || all_younger(&load.samples()).then_some(()));
    load.samples()
}

/// Runs a command as a user would, and shows both.
fn show(cluster: &Cluster, arguments: &[&str]) -> Result<(), Any> {
    println!("   $ holdfast {}", arguments.join(" "));
    let output = cluster.holdfast(arguments)?;
    for text in [&output.stderr, &output.stdout] {
        String::from_utf8_lossy(text).lines().for_each(|line| println!("     {line}"));
    }
    if output.status.success() { Ok(()) } else { Err(format!("it ended with {}", output.status).into()) }
}

fn curl(cluster: &Cluster, ca_pem: &str) -> Result<String, Any> {
    let ca = cluster.data_dir().join("shop-ca.pem");
    std::fs::write(&ca, ca_pem)?;
    let url = format!("https://{}/", shop::HOSTNAME);
    let resolve = format!("{}:{PORT}:127.0.0.1", shop::HOSTNAME);
    println!("   $ curl --resolve {resolve} {url}");
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "10", "--resolve", &resolve, "--cacert"]);
    let output = command.arg(&ca).arg(&url).output()?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("curl: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
    }
}
