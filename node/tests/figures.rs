//! The node's figures, measured with real guests: `cargo xtask bench node`, on a machine that does nothing else.
//!
//! Each test prints what it measured and asserts nothing about how long it took. They need what the tests of an outage need,
//! and `HOLDFAST_BIN` where it says so.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
#[allow(dead_code, reason = "shared with other tests")]
mod namespace;
#[allow(dead_code, reason = "shared with the tests of an outage")]
mod scene;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use holdfast_client::{Published, View};
use holdfast_identity::{Authority, CERTIFICATE_VALIDITY, Credential, PrivateKey, Subject};
use holdfast_model::NodeId;
use holdfast_model::agent::NodeInstance;
use holdfast_model::resource::InstanceState;
use holdfast_node::executor::Executor;
use holdfast_node::host::{VmmChoice, VmmHost};
use holdfast_node::image::ImageCache;
use holdfast_node::logs::Logs;
use holdfast_node::network::Network;
use holdfast_node::phase::Phase;
use holdfast_node::secrets::NodeSecretsStore;
use holdfast_node::state::State;
use holdfast_node::status::NodeStatus;
use holdfast_node::step::{Step, unheard};
use holdfast_node::supervisor::Supervisor;
use holdfast_node::vmm::channel::{ChannelAddress, GuestChannel, GuestConfig, GuestEvent};
use holdfast_node::vmm::jail::Jails;
use scene::{CLUSTER, Scene, kill, reap, runtime, stamp, until};
use tokio::sync::{oneshot, watch};

/// Starts of each kind.
const STARTS: usize = 15;
/// Guests that run at the same time, and how much memory each has.
const GUESTS: u16 = 50;
const GUEST_MIB: u64 = 64;
/// At which numbers of guests the agent's memory is looked at, and how long it is left alone before.
const LOOKS: [u16; 4] = [0, 10, 25, GUESTS];
const REST: Duration = Duration::from_secs(20);
/// What the memory is extrapolated to.
const GUESTS_ASKED: f64 = 200.0;
/// Restarts of the agent that are timed.
const RESTARTS: usize = 11;
/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(180);

/// The least, the median and the greatest, in milliseconds.
fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let [least, middle, most] = [0, times.len() / 2, times.len() - 1].map(|at| ms(times[at]));
    format!("{middle:.1} ms median of {} ({least:.1}–{most:.1})", times.len())
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

/// A workload that does nothing, so that ready means that it runs.
fn idle(scene: &Scene, n: u16) -> NodeInstance {
    let mut instance = scene.instance(n);
    instance.health = None;
    instance.resources.memory_mib = GUEST_MIB;
    instance.command = Some(["sleep", "1000000"].map(str::to_owned).to_vec());
    instance
}

#[test]
#[ignore = "measures"]
fn how_long_a_start_takes() {
    const TEST: &str = "how_long_a_start_takes";
    if !ignored_inside(TEST) {
        return;
    }
    let scene = Scene::new(TEST);
    runtime().block_on(measure_starts(&scene));
}

async fn measure_starts(scene: &Scene) {
    let folder = scene.data_dir();
    let executed = Arc::new(Mutex::new(None));
    let heard = Arc::clone(&executed);
    let after_step = Arc::new(move |step| {
        if step == Step::Executed {
            *heard.lock().unwrap() = Some(Instant::now());
        }
    });
    let assets = guest_image::assets();
    let jails = Arc::new(Jails::new(&folder, guest_image::jail_config(), after_step));
    let host = VmmHost::new(assets.kernel.parent().unwrap(), &folder, VmmChoice::Qemu, jails);
    let images = ImageCache::open(&folder.join("images")).unwrap();
    // The probe is over before anything is measured.
    host.vmm().await.unwrap();
    let volumes = holdfast_node::volumes::Volumes::open(&folder.join("volumes")).unwrap();
    let secrets = Arc::new(NodeSecretsStore::open(&folder, BTreeSet::new).unwrap());
    let network = Network::open(&folder).unwrap();
    let executor =
        Arc::new(Executor::new(&folder, network, images, volumes, secrets, host, unheard()).unwrap());
    let state = Arc::new(State::open(&folder.join("node.redb")).unwrap());
    let logs = Arc::new(Logs::open(folder.join("logs")).unwrap());
    let desired = watch::Sender::new(view(0, &[]));
    let supervisor = Supervisor::new(Arc::clone(&executor), state, logs, desired.subscribe());
    let mut snapshots = supervisor.snapshots();
    let (shutdown, down) = oneshot::channel::<()>();
    let running = tokio::spawn(supervisor.run(async {
        down.await.ok();
    }));
    let spec = idle(scene, 1);
    let (mut to_vmm, mut to_ready, mut by_hand) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=STARTS as u64 {
        let began = Instant::now();
        desired.send_replace(view(2 * round + 1, std::slice::from_ref(&spec)));
        let ready = snapshots.wait_for(|seen| {
            let seen = seen.as_ref().and_then(|seen| seen.instances.get(&spec.id));
            seen.is_some_and(|seen| seen.observed.phase == Phase::Ready)
        });
        let pid = {
            let seen = tokio::time::timeout(PATIENCE, ready).await.unwrap().unwrap();
            seen.as_ref().unwrap().instances[&spec.id].machine.unwrap().0
        };
        let (ready, vmm) = (began.elapsed(), executed.lock().unwrap().take().unwrap() - began);
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let arguments: Vec<_> =
            line.split(|byte| *byte == 0).map(|part| String::from_utf8(part.to_vec()).unwrap()).collect();
        desired.send_replace(view(2 * round + 2, &[]));
        let gone = snapshots.wait_for(|seen| seen.as_ref().is_some_and(|seen| seen.instances.is_empty()));
        tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();

        let network = Network::open(&folder).unwrap();
        let tap = network.ensure(spec.id, spec.address, &unheard()).await.unwrap();
        let hand = start_by_hand(scene, &arguments, &executor, &spec, &tap).await;
        network.remove(&tap).await.unwrap();
        // The first of each kind finds nothing in the caches.
        if round > 0 {
            to_vmm.push(vmm);
            to_ready.push(ready);
            by_hand.push(hand);
        }
    }
    println!("desired state received → VMM executed: {}", spread(&mut to_vmm));
    println!("desired state received → ready: {}", spread(&mut to_ready));
    println!(
        "the same QEMU by hand, started → its guest says that the workload runs: {}",
        spread(&mut by_hand)
    );
    println!("ratio of the medians: {:.3}", median(&mut to_ready) / median(&mut by_hand));
    shutdown.send(()).unwrap();
    running.await.unwrap().unwrap();
}

fn view(revision: u64, instances: &[NodeInstance]) -> Published<NodeInstance> {
    let items: BTreeMap<_, _> = instances.iter().map(|one| (one.id, Arc::new(one.clone()))).collect();
    Some(Arc::new(View { stamp: stamp(revision), items: Arc::new(items), held: None }))
}

/// The agent's own command line with paths where it has descriptors, with no jail, and a TAP that is there already.
async fn start_by_hand(
    scene: &Scene,
    arguments: &[String],
    executor: &Executor,
    spec: &NodeInstance,
    tap: &str,
) -> Duration {
    let (config, root) = executor.watched(spec).unwrap();
    let folder = tempfile::Builder::new().prefix("hfh").tempdir_in("/tmp").unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut command = Command::new(holdfast_node::vmm::probe::find_qemu().unwrap());
    let mut rest = arguments.iter().skip(1).filter(|part| !part.is_empty());
    while let Some(argument) = rest.next() {
        if argument == "-add-fd" {
            rest.next();
            continue;
        }
        let socket = |id: &str| format!("socket,id={id},path={},server=on,wait=off", at(id));
        command.arg(match argument.split(',').nth(1) {
            Some("id=control") if argument.starts_with("socket,") => socket("control"),
            Some("id=channel") if argument.starts_with("socket,") => socket("channel"),
            Some("id=console") if argument.starts_with("file,") => {
                format!("file,id=console,path={}", at("console"))
            }
            _ if argument.starts_with("id=root,") => {
                format!("id=root,file={},format=raw,if=none,readonly=on", root.path.display())
            }
            _ if argument.starts_with("tap,") => {
                format!("tap,id=eth0,ifname={tap},script=no,downscript=no,vhost=off")
            }
            _ => argument.clone(),
        });
    }
    let began = Instant::now();
    let mut qemu = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let address = ChannelAddress::Stream(folder.path().join("channel"));
    let mut channel = GuestChannel::connect(&address, 0, PATIENCE).await.unwrap();
    let now_unix_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    let config = GuestConfig { now_unix_ms: now_unix_ms.try_into().unwrap(), ..config };
    channel.sender.configure(&config).await.unwrap();
    loop {
        match channel.receiver.recv().await.unwrap() {
            GuestEvent::Ready { .. } => break,
            GuestEvent::Failed { reason } => panic!("{reason}; in {}", scene.data_dir().display()),
            _ => {}
        }
    }
    let took = began.elapsed();
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    took
}

/// As [`namespace::inside`], for a test that is ignored.
fn ignored_inside(test: &str) -> bool {
    namespace::inside_with(test, &["--ignored"])
}

/// The real agent, with every member out of reach.
struct RealAgent(Child);

impl RealAgent {
    fn start(scene: &Scene) -> Self {
        fs::remove_file(scene.data_dir().join("status.json")).ok();
        let program = std::env::var_os("HOLDFAST_BIN").expect("HOLDFAST_BIN must name the holdfast binary");
        let mut command = Command::new(program);
        command.args(["node", "run", "--without-cgroups", "--data-dir"]).arg(scene.data_dir());
        command.arg("--assets").arg(guest_image::assets().kernel.parent().unwrap());
        // Guests share their memory with nobody, but most of it is never touched.
        command.args(["--memory-mib", "1000000", "--cpu-milli", "1000000"]);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    fn resident_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// What joining leaves in an agent's folder.
fn enrol(data_dir: &Path) {
    let authority = Authority::create(&CLUSTER.to_string(), SystemTime::now()).unwrap();
    let (key, node) = (PrivateKey::generate().unwrap(), NodeId::from_bits(1));
    let subject = Subject::Node { id: node.to_string() };
    let request = key.signing_request().unwrap();
    let issued = authority.issue(&request, &subject, CERTIFICATE_VALIDITY, SystemTime::now()).unwrap();
    Credential::new(key, &issued.chain_pem).unwrap().save(&data_dir.join("credential.pem")).unwrap();
    let secret = |name: &str, text: &[u8]| {
        holdfast_identity::files::write_secret(&data_dir.join(name), text).unwrap();
    };
    secret("ca.pem", authority.certificate().pem().as_bytes());
    let agent = serde_json::json!({
        "cluster": CLUSTER, "incarnation": 1, "enrolled": { "node": node }, "members": ["127.0.0.1:9"],
    });
    secret("agent.json", agent.to_string().as_bytes());
}

fn ready(scene: &Scene) -> BTreeMap<String, u32> {
    let Ok(status) = NodeStatus::read(&scene.data_dir()) else { return BTreeMap::new() };
    let ready = |seen: &&holdfast_node::status::InstanceStatus| {
        seen.observation.state == InstanceState::Ready && seen.observation.restarts == 0
    };
    let instances = status.instances.iter().filter(ready);
    instances.filter_map(|seen| Some((seen.observation.instance.to_string(), seen.pid?))).collect()
}

#[test]
#[ignore = "measures; needs HOLDFAST_BIN"]
fn what_an_agent_takes_and_how_long_it_is_away() {
    const TEST: &str = "what_an_agent_takes_and_how_long_it_is_away";
    if !ignored_inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let guests: Vec<NodeInstance> = (1..=GUESTS).map(|n| idle(&scene, n)).collect();
    scene.desire(&[]);
    enrol(&scene.data_dir());
    let mut looks = Vec::new();
    let mut running = 0;
    for look in LOOKS {
        // A few at a time: translated guests need the processors when they boot, and nearly nothing later.
        while running < look {
            running += 1;
            // No member can be asked: what the next instance needs in secret, which is nothing, was told before.
            let path = scene.data_dir().join("secrets").join(guests[usize::from(running) - 1].id.to_string());
            holdfast_identity::files::write_secret(&path, b"holdfast-node-secrets-1 0\n").unwrap();
            scene.desire(&guests[..usize::from(running)]);
            let agent = RealAgent::start(&scene);
            until("the next guest is ready", || ready(&scene).len() == usize::from(running));
            agent.kill();
        }
        // Fresh, and left alone for a while; then it has everything that it needs for them.
        let agent = RealAgent::start(&scene);
        until("it has adopted them", || ready(&scene).len() == usize::from(running));
        std::thread::sleep(REST);
        looks.push((f64::from(look), agent.resident_mib()));
        println!("{look} guests: the agent has {:.1} MiB", agent.resident_mib());
        agent.kill();
    }
    let ((first, least), (last, most)) = (looks[0], looks[looks.len() - 1]);
    let each = (most - least) / (last - first);
    println!(
        "{:.2} MiB a guest; extrapolated to {GUESTS_ASKED}: {:.1} MiB",
        each,
        least + each * GUESTS_ASKED
    );

    let before = ready(&scene);
    assert_eq!(before.len(), usize::from(GUESTS));
    let mut times = Vec::new();
    for _ in 0..RESTARTS {
        let began = Instant::now();
        let agent = RealAgent::start(&scene);
        while ready(&scene).len() < usize::from(GUESTS) {
            assert!(began.elapsed() < PATIENCE, "{} of {GUESTS} were adopted", ready(&scene).len());
            std::thread::sleep(Duration::from_millis(2));
        }
        times.push(began.elapsed());
        assert_eq!(ready(&scene), before, "the same processes, restarted none");
        agent.kill();
    }
    println!("agent started → it says that all {GUESTS} run, none restarted: {}", spread(&mut times));
    for pid in before.values() {
        kill(*pid);
    }
    reap();
    scene.wipe();
}
