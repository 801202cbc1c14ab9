//! A node without any control plane: its data folder with a root image and a stored desired set, agents as processes
//! of their own that can be killed, and what can be seen of their machines from outside.

#[allow(dead_code, reason = "not every test takes one")]
pub(crate) mod inventory;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use futures::future::BoxFuture;
use holdfast_client::{Applied, ClientError, Link, Replica};
use holdfast_identity::SealTo;
use holdfast_jail::ids::IdRange;
use holdfast_metrics::Listen;
use holdfast_model::agent::{Desired, Frame, LogLine, NodeInstance, Stamp};
use holdfast_model::api::{NodeSecrets, SnapshotKey};
use holdfast_model::delivery::Delivery;
use holdfast_model::manifest::{Health, HealthCheck, Resources, Restart, RestartPolicy};
use holdfast_model::resource::{Image, ImageDigest, InstanceReason, InstanceState};
use holdfast_model::sealed::Recipient;
use holdfast_model::secrets::SecretValue;
use holdfast_model::{ClusterId, Incarnation, InstanceId, NodeId, Revision, VolumeId};
use holdfast_node::agent::{HostConfig, Node, wipe};
use holdfast_node::host::{CapacityOverride, VmmChoice};
use holdfast_node::image::{CACHE_BYTES_MAX, ImageConfig, ImageUser};
use holdfast_node::logs::Ring;
use holdfast_node::logs::retention::Retention;
use holdfast_node::network::Network;
use holdfast_node::network::guard::Rate;
use holdfast_node::secrets::Source;
use holdfast_node::status::NodeStatus;
use holdfast_node::step::Step;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::guest_image::{FileSystem, assets, jail_config, root_image};

/// Nothing here waits longer for anything. A guard against hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(50);
/// The port that workloads listen on.
pub(crate) const PORT: u16 = 8080;

/// The cluster of these nodes.
pub(crate) const CLUSTER: ClusterId = ClusterId::from_bits(1);
const NODE: NodeId = NodeId::from_bits(2);
/// Makes this process an agent for the folder that it names.
const AGENT: &str = "HOLDFAST_TEST_AGENT";
/// Names an instance that knows [`SECRET`].
const KNOWS_SECRET: &str = "HOLDFAST_TEST_KNOWS_SECRET";
/// Where an agent serves its metrics, in its folder.
pub(crate) const METRICS_SOCKET: &str = "m.sock";
/// A secret value for whoever tests that it is kept.
pub(crate) const SECRET: &str = "correct-horse-battery-staple-9f3c";
/// Makes an agent end, as by `kill -9`, right after a step: `NTH STEP`.
const CRASH_AT: &str = "HOLDFAST_TEST_CRASH_AT";
/// Makes an agent hear that it is cut off.
const CUT_OFF: &str = "HOLDFAST_TEST_CUT_OFF";
/// What images may take, in bytes, instead of the default.
const IMAGES_BYTES: &str = "HOLDFAST_TEST_IMAGES_BYTES";
/// The file to which an agent appends the name of each step.
const STEPS_FILE: &str = "steps";

/// The `nth` time, from 1, that an agent does a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Point {
    pub(crate) step: Step,
    pub(crate) nth: u32,
}

/// One node.
pub(crate) struct Scene {
    folder: tempfile::TempDir,
    test: &'static str,
    image: Image,
    revision: u64,
}

impl Scene {
    /// A node with an image and no desired set. `test` names the calling test.
    pub(crate) fn new(test: &'static str) -> Self {
        assets();
        let folder = tempfile::Builder::new().prefix("hfn").tempdir_in("/tmp").unwrap();
        let image = install_root(folder.path());
        let scene = Self { folder, test, image, revision: 0 };
        scene.reuse_verdict();
        scene
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.folder.path().join("node")
    }

    /// A web server as instance `n`: it says so, and is healthy once its port answers.
    pub(crate) fn instance(&self, n: u16) -> NodeInstance {
        let script = format!(
            "mkdir -p /srv; echo page of {n} > /srv/index.html; echo serving {n}; exec httpd -f -p {PORT} -h /srv"
        );
        NodeInstance {
            id: InstanceId::from_bits(u128::from(n)),
            org: "acme".parse().unwrap(),
            app: "shop".parse().unwrap(),
            env: "production".parse().unwrap(),
            process: "web".parse().unwrap(),
            image: self.image.clone(),
            command: Some(["sh", "-c", &script].map(str::to_owned).to_vec()),
            workdir: None,
            user: None,
            vars: BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]),
            resources: Resources { memory_mib: 128, cpu_milli: 1_000, disk_mib: 1_024 },
            ports: Vec::new(),
            health: Some(Health {
                check: HealthCheck::Http { port: PORT, path: "/index.html".to_owned() },
                interval_ms: 1_000,
                timeout_ms: 5_000,
                grace_ms: 120_000,
                success: 1,
                failure: 5,
            }),
            restart: Restart { policy: RestartPolicy::Always, max_retries: 3, backoff_ms: 500 },
            address: Ipv6Addr::new(0xfd00, 0x40, 0, 1, 0, 0, 0, n),
            desired: Desired::Run,
            volumes: Vec::new(),
        }
    }

    /// Stores a desired set on the node's disk as the follower does. No agent may be running.
    pub(crate) fn desire(&mut self, instances: &[NodeInstance]) {
        self.revision += 1;
        fs::create_dir_all(self.data_dir()).unwrap();
        let mut replica =
            Replica::<NodeInstance>::open(&self.data_dir().join("replica.redb"), CLUSTER).unwrap();
        let stamp = stamp(self.revision);
        let begin = Frame::SnapshotBegin {
            stamp,
            items: instances.len() as u64,
            confirmed_through: Revision(self.revision),
        };
        let frames = [begin, Frame::SnapshotItems(instances.to_vec()), Frame::SnapshotEnd];
        let last = frames.map(|frame| replica.apply(frame).unwrap()).into_iter().last();
        assert_eq!(last, Some(Applied::Applied));
    }

    /// Starts an agent in a process of its own.
    pub(crate) fn agent(&self) -> Agent {
        self.spawn(None)
    }

    /// Starts one that ends abruptly at a point, if it comes there.
    pub(crate) fn agent_that_crashes(&self, at: Point) -> Agent {
        self.spawn(Some(at))
    }

    /// Starts one that is told at once that an operator has cut it off.
    pub(crate) fn agent_that_is_cut_off(&self, crash: Option<Point>) -> Agent {
        self.spawn_with(crash, &[(CUT_OFF, "1")])
    }

    /// Starts one that keeps no image beyond those that are in use.
    pub(crate) fn agent_that_collects(&self, crash: Option<Point>) -> Agent {
        self.spawn_with(crash, &[(IMAGES_BYTES, "0")])
    }

    /// The root that the scene's own image is made from.
    pub(crate) fn image_files(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Starts one that is told, before anything else, of a secret that an instance knows.
    pub(crate) fn agent_that_knows_a_secret(&self, id: InstanceId) -> Agent {
        self.spawn_with(None, &[(KNOWS_SECRET, &id.to_string())])
    }

    /// What the last agent did, in order.
    pub(crate) fn points(&self) -> Vec<Point> {
        let text = fs::read_to_string(self.folder.path().join(STEPS_FILE)).unwrap_or_default();
        let mut points: Vec<Point> = Vec::new();
        for line in text.lines() {
            let step = *Step::ALL.iter().find(|step| step.as_str() == line).expect("a step's name");
            let before = points.iter().filter(|point| point.step == step).count();
            points.push(Point { step, nth: before as u32 + 1 });
        }
        points
    }

    fn spawn(&self, crash: Option<Point>) -> Agent {
        self.spawn_with(crash, &[])
    }

    fn spawn_with(&self, crash: Option<Point>, more: &[(&str, &str)]) -> Agent {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([self.test, "--exact", "--nocapture", "--test-threads=1"])
            .env(AGENT, self.data_dir())
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(Point { step, nth }) = crash {
            command.env(CRASH_AT, format!("{nth} {step}"));
        }
        fs::remove_file(self.folder.path().join(STEPS_FILE)).ok();
        // What a dead agent said of an instance must not be taken for what this one says.
        fs::remove_file(self.data_dir().join("status.json")).ok();
        Agent { child: command.spawn().unwrap(), data_dir: self.data_dir() }
    }

    /// The TAPs of this node.
    pub(crate) fn taps(&self) -> Vec<String> {
        runtime().block_on(Network::open(&self.data_dir()).unwrap().list()).unwrap()
    }

    /// Folders of machines.
    pub(crate) fn folders(&self) -> usize {
        fs::read_dir(self.data_dir().join("vms")).map_or(0, Iterator::count)
    }

    /// Processes of VMMs of this node.
    pub(crate) fn vmms(&self) -> Vec<u32> {
        let needle = self.data_dir().join("vms").display().to_string();
        let running = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&needle)
        };
        let processes = fs::read_dir("/proc").unwrap();
        processes
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
            .filter(running)
            .collect()
    }

    /// Processes that run as a VM's user, whatever they are called: a launcher that was left behind, for one.
    pub(crate) fn of_vm_users(&self) -> Vec<u32> {
        let range = IdRange::default();
        let owned = |entry: &fs::DirEntry| {
            let uid = entry.metadata().map_or(0, |meta| meta.uid());
            (range.first..range.first + range.count).contains(&uid)
        };
        let processes = fs::read_dir("/proc").unwrap().map(Result::unwrap).filter(owned);
        // Remains are nobody's: in a test's namespace there is no init that waits for orphans.
        processes
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| runs(*pid))
            .collect()
    }

    /// The lines of an instance's log. No agent may be running.
    pub(crate) fn log(&self, id: InstanceId) -> Vec<LogLine> {
        let ring = Ring::open(self.data_dir().join("logs").join(id.to_string())).unwrap();
        ring.read(None, 1_000).unwrap()
    }

    /// Removes everything that runs.
    pub(crate) fn wipe(&self) -> usize {
        runtime().block_on(wipe(&self.data_dir())).unwrap()
    }

    /// Probing takes long where KVM is there and boots nothing: one probe serves every test.
    fn reuse_verdict(&self) {
        let shared = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vmm-verdict.json");
        fs::create_dir_all(self.data_dir()).unwrap();
        fs::copy(shared, self.data_dir().join("vmm-verdict.json")).ok();
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let verdict = self.data_dir().join("vmm-verdict.json");
        let shared = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let fresh = shared.join(format!("vmm-verdict.{}", self.test));
        if fs::copy(verdict, &fresh).is_ok() {
            fs::rename(fresh, shared.join("vmm-verdict.json")).ok();
        }
    }
}

/// An agent's process.
pub(crate) struct Agent {
    child: Child,
    data_dir: PathBuf,
}

impl Agent {
    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and waits for a clean end.
    pub(crate) fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Waits until it has ended by itself or `done` says so; answers whether it has ended.
    pub(crate) fn ended_or(&mut self, mut done: impl FnMut() -> bool) -> bool {
        let mut ended = false;
        until("the agent crashes or is done", || {
            ended = self.child.try_wait().unwrap().inspect(check_crash).is_some();
            ended || done()
        });
        ended
    }

    /// Waits until the agent says that an instance stands like this, or finally otherwise, which is a failure.
    pub(crate) fn wait_for(&mut self, id: InstanceId, state: InstanceState) -> InstanceStatusView {
        let mut found = None;
        until(&format!("{id} is {state:?}"), || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the agent ended: {status}");
            }
            found = view(&self.data_dir, id);
            found.is_some_and(|seen| seen.state == state || seen.state.is_final())
        });
        let found = found.unwrap();
        assert_eq!(found.state, state, "{found:?}");
        found
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn check_crash(status: &ExitStatus) {
    assert_eq!(status.signal(), Some(9), "the agent ended otherwise than by its crash: {status}");
}

/// What an agent says of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InstanceStatusView {
    pub(crate) state: InstanceState,
    pub(crate) pid: Option<u32>,
    pub(crate) restarts: u32,
    pub(crate) reason: Option<InstanceReason>,
}

/// What the agent of a folder says of an instance.
pub(crate) fn view(data_dir: &Path, id: InstanceId) -> Option<InstanceStatusView> {
    let status = NodeStatus::read(data_dir).ok()?;
    let seen = status.instances.into_iter().find(|seen| seen.observation.instance == id)?;
    Some(InstanceStatusView {
        state: seen.observation.state,
        pid: seen.pid,
        restarts: seen.observation.restarts,
        reason: seen.observation.reason,
    })
}

/// A place in the history that these tests tell of.
pub(crate) fn stamp(revision: u64) -> Stamp {
    Stamp { cluster: CLUSTER, incarnation: Incarnation(1), revision: Revision(revision) }
}

/// Waits for something.
pub(crate) fn until(what: &str, done: impl FnMut() -> bool) {
    assert!(becomes(done), "waited in vain until {what}");
}

/// Waits for something; answers whether it came.
pub(crate) fn becomes(mut done: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !done() {
        if begun.elapsed() > PATIENCE {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

/// Waits for orphans that have ended: in a test's namespace it is the test that has to. No agent may be running, whose
/// end somebody else waits for.
pub(crate) fn reap() {
    while let Ok(Some(_)) = rustix::process::wait(rustix::process::WaitOptions::NOHANG) {}
}

/// Fetches an instance's page through its TAP.
pub(crate) fn fetch(address: Ipv6Addr) -> std::io::Result<String> {
    let target = SocketAddr::from((address, PORT));
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// `kill -9` of a process that this test's agents started.
pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Whether the process runs.
pub(crate) fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// What an agent of this folder is started with.
pub(crate) fn host_config(data_dir: &Path) -> HostConfig {
    HostConfig {
        data_dir: data_dir.to_owned(),
        assets_dir: assets().kernel.parent().unwrap().to_owned(),
        capacity: CapacityOverride::default(),
        vmm: VmmChoice::Qemu,
        jail: jail_config(),
        rate: Rate::default(),
        logs: Retention::default(),
        images_bytes_max: CACHE_BYTES_MAX,
        metrics: Some(Listen::Unix(data_dir.join(METRICS_SOCKET))),
        volumes_dir: None,
        backups: None,
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A member that has [`SECRET`] for one instance, sealed to who asks.
struct GivesSecret(InstanceId);

impl Source for GivesSecret {
    fn ask(
        &self,
        _: InstanceId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<NodeSecrets, ClientError>> {
        let file = format!("# HOLDFAST_SECRETS_V1\nPASSWORD={SECRET}\n").into_bytes();
        let file = Some(SecretValue::new(file.into()));
        let (version, instance) = (1, self.0);
        let delivery = Delivery { cluster: CLUSTER, node: NODE, instance, version, file, registry: None };
        let to: SealTo = recipient.0.parse().unwrap();
        let sealed = to.seal(&postcard::to_stdvec(&delivery).unwrap()).unwrap();
        Box::pin(async move { Ok(NodeSecrets { version, sealed: Some(BASE64.encode(&sealed)) }) })
    }

    fn ask_snapshot_key(
        &self,
        _: VolumeId,
        _: Recipient,
    ) -> BoxFuture<'static, Result<SnapshotKey, ClientError>> {
        Box::pin(async { Err(ClientError::NoEndpoints) })
    }
}

/// In a process that is to be an agent: is one until SIGTERM, and answers `true`.
pub(crate) fn was_agent() -> bool {
    let Some(data_dir) = std::env::var_os(AGENT) else { return false };
    let data_dir = PathBuf::from(data_dir);
    let crash = std::env::var(CRASH_AT).ok();
    let crash = crash.as_deref().and_then(|at| at.split_once(' '));
    let crash = crash.map(|(nth, step)| (nth.parse::<u32>().unwrap(), step.to_owned()));
    let steps = data_dir.parent().unwrap().join(STEPS_FILE);
    let steps = fs::OpenOptions::new().create(true).append(true).open(steps).unwrap();
    let seen = Mutex::new(0);
    let after_step = Arc::new(move |step: Step| {
        (&steps).write_all(format!("{step}\n").as_bytes()).unwrap();
        let Some((nth, wanted)) = &crash else { return };
        let mut seen = seen.lock().unwrap();
        *seen += u32::from(step.as_str() == wanted);
        if *seen == *nth {
            kill(std::process::id());
        }
    });
    runtime().block_on(async {
        let mut config = host_config(&data_dir);
        if let Ok(bytes) = std::env::var(IMAGES_BYTES) {
            config.images_bytes_max = bytes.parse().unwrap();
        }
        let node = Node::open_with(&config, after_step).unwrap();
        let cut_off = watch::Sender::new(std::env::var_os(CUT_OFF).is_some());
        let node = node.with_cut_off(cut_off.subscribe());
        if let Ok(id) = std::env::var(KNOWS_SECRET) {
            node.secrets().belongs_to(CLUSTER, NODE, Arc::new(GivesSecret(id.parse().unwrap())));
        }
        let replica = Replica::<NodeInstance>::open(&data_dir.join("replica.redb"), CLUSTER).unwrap();
        let link = watch::Sender::new(Link::Down { reason: "this test has no control plane".to_owned() });
        let mut term = signal(SignalKind::terminate()).unwrap();
        let shutdown = async move {
            term.recv().await;
        };
        node.keep(replica.subscribe(), link.subscribe(), None, shutdown).await.unwrap();
    });
    true
}

/// Puts a root into the node's cache, as a pull leaves it.
fn install_root(folder: &Path) -> Image {
    let digest = ImageDigest::from_bytes([0x5a; 32]);
    let root = folder.join("node/images/roots").join(digest.to_string().trim_start_matches("sha256:"));
    fs::create_dir_all(&root).unwrap();
    let made = root_image(folder, FileSystem::Erofs);
    let bytes = fs::metadata(&made).unwrap().len();
    fs::rename(made, root.join("root.erofs")).unwrap();
    let config = ImageConfig {
        env: Vec::new(),
        entrypoint: Vec::new(),
        cmd: Vec::new(),
        user: ImageUser { uid: 0, gid: 0, home: "/".to_owned() },
        workdir: "/".to_owned(),
    };
    let record = serde_json::json!({
        "version": 1, "manifest": digest.to_string(), "root_bytes": bytes, "config": config,
    });
    fs::write(root.join("image.json"), record.to_string()).unwrap();
    for name in ["passwd", "group"] {
        fs::copy(folder.join("root/etc").join(name), root.join(name)).unwrap();
    }
    Image { repository: "127.0.0.1:5000/test".to_owned(), digest }
}
