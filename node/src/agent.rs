//! The node agent as a whole: [`run`] opens what is on disk, adopts what runs, follows the control plane and reports
//! to it; [`wipe`] ends every microVM of a data folder.
//!
//! ```text
//! agent.lock      held by the one agent of this folder     network-tag    this agent's mark on its TAPs
//! replica.redb    what is desired (client crate)           images/        roots (image)
//! node.redb       phases and restarts (state)              logs/          rings (logs)
//! vms/<instance>/ one machine each (vmm)                   status.json    for people (status)
//! volumes/        disks (volumes), if they have no other place
//! vmm-verdict.json, probe/  the VMM probe's (vmm)
//! ```
//!
//! The agent ends without touching a machine, on SIGTERM as on `kill -9` (I5, I7).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_client::{
    CallHandler, Client, ClientError, DiskError, Endpoint, Follower, Link, Published, Replica, ReportSlot,
    reporter,
};
use holdfast_identity::{AuthorityError, CaCertificate, Credential, CredentialError, Role};
use holdfast_metrics::Listen;
use holdfast_model::agent::{AgentCall, CallAnswer, NodeInstance};
use holdfast_model::resource::Capacity;
use holdfast_model::volume_snapshot::{SnapshotNews, SnapshotWork};
use holdfast_model::{ClusterId, VolumeId};
use rustix::fs::FlockOperation;
use tokio::sync::watch;

use crate::backups::Backups;
use crate::exec::Execs;
use crate::executor::{self, Executor, ExecutorError};
use crate::host::{self, CapacityOverride, HostError, VmmChoice, VmmHost};
use crate::image::{ImageCache, ImageError, Limits};
use crate::logs::retention::Retention;
use crate::logs::{LogError, Logs, chain};
use crate::machine::now_ms;
use crate::metrics;
use crate::network::guard::Rate;
use crate::network::{Network, NetworkError};
use crate::pulls::PullsFollower;
use crate::secrets::{NodeSecretsError, NodeSecretsStore};
use crate::state::{State, StateError};
use crate::status::{self, StatusError, Surroundings};
use crate::step::{AfterStep, unheard};
use crate::supervisor::{Snapshot, Supervisor, SupervisorError};
use crate::vmm::jail::{JailConfig, Jails};
use crate::volumes::{VolumeError, Volumes};

/// The longest path of a data folder, in bytes: a machine's folder adds 36, and the kernel bounds sockets' names.
pub const DATA_DIR_BYTES_MAX: usize = 54;

/// How often a replica that is in use is tried again.
const REPLICA_TRIES_MAX: u32 = 20;

/// The pause between two of these tries.
const REPLICA_PAUSE: Duration = Duration::from_millis(100);

/// How often a folder that another agent holds is tried again: what a killed agent was about to execute holds its lock for a
/// moment longer.
const LOCK_TRIES_MAX: u32 = 20;

/// The pause between two of these tries.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// The longest time between two writes of `status.json`.
const STATUS_PERIOD: Duration = Duration::from_secs(5);

/// How often logs are looked through for what is too old.
const LOGS_PERIOD: Duration = Duration::from_secs(60);

/// How often a deleted volume that a machine still has is looked at again.
const ERASE_PERIOD: Duration = Duration::from_secs(10);

/// The shortest time between two reports or writes of `status.json`.
const STATUS_GAP: Duration = Duration::from_millis(100);

/// What an agent is started with.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This node.
    pub host: HostConfig,
    /// The members' API addresses.
    pub endpoints: Vec<Endpoint>,
    /// The cluster authority's certificate, PEM.
    pub ca_file: PathBuf,
    /// This node's key and certificate, as [`Credential::save`] wrote them.
    pub credential_file: PathBuf,
}

/// The part of a configuration that needs no control plane.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// The agent's own folder, absolute and at most [`DATA_DIR_BYTES_MAX`] long; made if needed.
    pub data_dir: PathBuf,
    /// Holds the guest kernel and the guest's init, as `cargo xtask assets` makes them.
    pub assets_dir: PathBuf,
    /// What is offered to instances, instead of what was measured.
    pub capacity: CapacityOverride,
    /// Which VMM to use.
    pub vmm: VmmChoice,
    /// What it runs in.
    pub jail: JailConfig,
    /// What goes through each instance's network card.
    pub rate: Rate,
    /// How much of what instances write is kept.
    pub logs: Retention,
    /// What images may take on the disk, in bytes, as far as nothing needs them.
    pub images_bytes_max: u64,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<Listen>,
    /// Where volumes' disks are: on a file system of their own, at best. In the data folder, if nothing is said.
    pub volumes_dir: Option<PathBuf>,
    /// Where snapshots of volumes are kept: a folder or `s3://bucket/folder`. Nowhere, if nothing is said.
    pub backups: Option<String>,
}

/// Why an agent cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A file or folder of the agent's.
    #[error("'{}' could not be {action}.", .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The data folder's path cannot be used.
    #[error(
        "The data folder '{}' must be an absolute path of at most {DATA_DIR_BYTES_MAX} bytes, so that sockets in it can be named.",
        .path.display()
    )]
    DataDir {
        /// The folder.
        path: PathBuf,
    },
    /// There is another agent.
    #[error("Another node agent uses '{}'; stop it first.", .path.display())]
    InUse {
        /// The data folder.
        path: PathBuf,
    },
    /// The guest's parts are not there.
    #[error("'{}' is not there; build it with `cargo xtask assets`, or name the folder that holds it.", .path.display())]
    Asset {
        /// The file.
        path: PathBuf,
    },
    /// The authority's certificate.
    #[error("'{}' does not hold the cluster authority's certificate; join the cluster again.", .path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: AuthorityError,
    },
    /// The authority names no cluster.
    #[error("'{}' names no cluster; join the cluster again.", .path.display())]
    Cluster {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: holdfast_model::id::IdError,
    },
    /// The node's certificate.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The client.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The replica.
    #[error(transparent)]
    Replica(#[from] DiskError),
    /// The node's own state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The images.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// The volumes.
    #[error(transparent)]
    Volumes(#[from] VolumeError),
    /// The secrets.
    #[error(transparent)]
    Secrets(#[from] NodeSecretsError),
    /// The certificate is not a node's.
    #[error("The credential is not that of a node of this cluster; join the cluster again.")]
    NotANode,
    /// The logs.
    #[error(transparent)]
    Logs(#[from] LogError),
    /// Machines.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The loop.
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The store of backups.
    #[error(transparent)]
    Backups(#[from] holdfast_backups::StoreError),
}

/// A node with its data folder open: the agent without its control plane.
pub struct Node {
    data_dir: PathBuf,
    around: Surroundings,
    executor: Arc<Executor>,
    state: Arc<State>,
    logs: Arc<Logs>,
    cut_off: watch::Receiver<bool>,
    erase: watch::Receiver<BTreeSet<VolumeId>>,
    backups: Backups,
    snapshots: watch::Receiver<Option<SnapshotWork>>,
    metrics: Option<Listen>,
    _lock: File,
}

impl Node {
    /// Opens a data folder, or makes it, and holds it against other agents.
    pub fn open(config: &HostConfig) -> Result<Self, AgentError> {
        Self::open_with(config, unheard())
    }

    /// The same, with something to call between any two steps that change the host.
    pub fn open_with(config: &HostConfig, after_step: AfterStep) -> Result<Self, AgentError> {
        let data_dir = &config.data_dir;
        if !data_dir.is_absolute() || data_dir.as_os_str().len() > DATA_DIR_BYTES_MAX {
            return Err(AgentError::DataDir { path: data_dir.clone() });
        }
        let lock = lock(data_dir)?;
        for name in [host::KERNEL_FILE, host::INITRD_FILE] {
            let path = config.assets_dir.join(name);
            if !path.is_file() {
                return Err(AgentError::Asset { path });
            }
        }
        let jails = Jails::new(data_dir, config.jail.clone(), Arc::clone(&after_step));
        let vmm = VmmHost::new(&config.assets_dir, data_dir, config.vmm, Arc::new(jails));
        let around = Surroundings {
            link: Link::Down { reason: "not connected yet".to_owned() },
            vmm: vmm.verdict(),
            capacity: host::capacity(config.capacity)?,
            disk: host::disk(data_dir),
            waiting: BTreeMap::new(),
            erased: BTreeSet::new(),
            snapshots: SnapshotNews::default(),
        };
        let volumes_dir = config.volumes_dir.clone().unwrap_or_else(|| data_dir.join("volumes"));
        let volumes = Volumes::open(&volumes_dir)?;
        let images =
            ImageCache::open_heard(&data_dir.join("images"), Limits::default(), Arc::clone(&after_step))?
                .with_bytes_max(config.images_bytes_max);
        let state = Arc::new(State::open(&data_dir.join(STATE_FILE))?);
        let known = state.load()?.into_keys().collect();
        let secrets = Arc::new(NodeSecretsStore::open(data_dir, || known)?);
        let network = Network::open(data_dir)?.with_rate(config.rate);
        let store = config.backups.as_deref().map(holdfast_backups::Store::open).transpose()?;
        let machines = executor::machines_folder(data_dir);
        let backups = Backups::new(store, volumes.clone(), Arc::clone(&secrets), machines);
        let executor = Executor::new(data_dir, network, images, volumes, secrets, vmm, after_step)?;
        Ok(Self {
            data_dir: data_dir.clone(),
            around,
            executor: Arc::new(executor),
            state,
            logs: Arc::new(Logs::open_with(data_dir.join("logs"), config.logs)?),
            cut_off: watch::Sender::new(false).subscribe(),
            erase: watch::Sender::new(BTreeSet::new()).subscribe(),
            backups,
            snapshots: watch::Sender::new(None).subscribe(),
            metrics: config.metrics.clone(),
            _lock: lock,
        })
    }

    /// The instances' logs.
    pub fn logs(&self) -> &Arc<Logs> {
        &self.logs
    }

    /// Listens to who tells that an operator has cut this node off.
    #[must_use]
    pub fn with_cut_off(self, cut_off: watch::Receiver<bool>) -> Self {
        Self { cut_off, ..self }
    }

    /// Erases the disks of deleted volumes that this tells of.
    #[must_use]
    pub fn with_erase(self, erase: watch::Receiver<BTreeSet<VolumeId>>) -> Self {
        Self { erase, ..self }
    }

    /// Takes and restores the snapshots that this tells of.
    #[must_use]
    pub fn with_snapshots(self, snapshots: watch::Receiver<Option<SnapshotWork>>) -> Self {
        Self { snapshots, ..self }
    }

    /// What instances need in secret.
    pub fn secrets(&self) -> &Arc<NodeSecretsStore> {
        self.executor.secrets()
    }

    /// Keeps what is desired until `shutdown`, and leaves every machine running then. Reports go to the slot, if
    /// there is one. `link` is only for people.
    pub async fn keep(
        self,
        desired: watch::Receiver<Published<NodeInstance>>,
        link: watch::Receiver<Link>,
        reports: Option<ReportSlot>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), AgentError> {
        self.executor.follow(desired.clone());
        let supervisor =
            Supervisor::new(Arc::clone(&self.executor), self.state, Arc::clone(&self.logs), desired.clone())
                .with_cut_off(self.cut_off)
                .with_capacity(self.around.capacity);
        let (tried, probed) = watch::channel(false);
        let executor = Arc::clone(&self.executor);
        let probe = async move {
            executor.host().settle(|| tried.send_modify(|tried| *tried = true)).await;
            std::future::pending::<()>().await;
        };
        let sources = metrics::Sources {
            capacity: self.around.capacity,
            executor: Arc::clone(&self.executor),
            logs: Arc::clone(&self.logs),
            snapshots: supervisor.snapshots(),
            pulse: supervisor.pulse(),
            desired: desired.clone(),
            link: link.clone(),
        };
        let metrics = serve_metrics(self.metrics, sources);
        let erased = watch::Sender::new(BTreeSet::new());
        let eraser = erase_volumes(Arc::clone(&self.executor), self.erase, erased.clone());
        let told_of_snapshots = self.backups.news();
        let backups = self.backups.run(self.snapshots);
        let teller = Teller {
            erased: erased.subscribe(),
            told_of_snapshots,
            data_dir: self.data_dir,
            capacity: self.around.capacity,
            around: self.around,
            pulls: self.executor.waiting().follow(),
            executor: self.executor,
            snapshots: supervisor.snapshots(),
            desired,
            link,
            probed,
            reports,
        };
        let sweeper = sweep_logs(self.logs, supervisor.snapshots(), LOGS_PERIOD);
        tokio::select! {
            kept = supervisor.run(shutdown) => Ok(kept?),
            () = async { tokio::join!(teller.run(), probe, sweeper, metrics, eraser, backups); } => Ok(()),
        }
    }
}

const STATE_FILE: &str = "node.redb";

/// Serves metrics for as long as the agent runs, if they are wanted.
async fn serve_metrics(listen: Option<Listen>, sources: metrics::Sources) {
    match listen {
        Some(listen) => match metrics::run(listen, sources).await {},
        None => std::future::pending().await,
    }
}

/// Keeps logs within their age for as long as the agent runs, but of a node that was cut off: there they are evidence.
async fn sweep_logs(logs: Arc<Logs>, snapshots: watch::Receiver<Option<Snapshot>>, period: Duration) {
    loop {
        tokio::time::sleep(period).await;
        if !may_sweep(snapshots.borrow().as_ref()) {
            continue;
        }
        let logs = Arc::clone(&logs);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || logs.sweep()).await {
            tracing::warn!(error = %chain(&error), "old logs could not be removed");
        }
    }
}

/// Whether old lines may go. Not before it is known that the node was not cut off.
fn may_sweep(snapshot: Option<&Snapshot>) -> bool {
    snapshot.is_some_and(|snapshot| !snapshot.cut_off)
}

/// Erases the disks of volumes that were deleted, as far as no machine has them, and tells which are gone.
async fn erase_volumes(
    executor: Arc<Executor>,
    mut erase: watch::Receiver<BTreeSet<VolumeId>>,
    erased: watch::Sender<BTreeSet<VolumeId>>,
) {
    loop {
        let asked = erase.borrow_and_update().clone();
        let gone =
            if asked.is_empty() { asked.clone() } else { executor.volumes().erase(asked.clone()).await };
        let left = gone.len() < asked.len();
        erased.send_replace(gone);
        tokio::select! {
            changed = erase.changed() => if changed.is_err() { return std::future::pending().await },
            () = tokio::time::sleep(ERASE_PERIOD), if left => {}
        }
    }
}

/// Tells what is known, to the control plane and to `status.json`, when it changes and now and then.
struct Teller {
    /// Volumes whose disks are erased.
    erased: watch::Receiver<BTreeSet<VolumeId>>,
    /// What there is to tell of snapshots.
    told_of_snapshots: watch::Receiver<SnapshotNews>,
    data_dir: PathBuf,
    /// What is offered once a VMM is known to boot.
    capacity: Capacity,
    around: Surroundings,
    executor: Arc<Executor>,
    /// How far images are: told at once when something else is done about one, and else every [`STATUS_PERIOD`].
    pulls: PullsFollower,
    snapshots: watch::Receiver<Option<Snapshot>>,
    desired: watch::Receiver<Published<NodeInstance>>,
    link: watch::Receiver<Link>,
    /// Whether the probe has come to an end, well or not; changes with each attempt.
    probed: watch::Receiver<bool>,
    reports: Option<ReportSlot>,
}

impl Teller {
    /// Until the loop is gone.
    async fn run(mut self) {
        let (mut followed, mut linked, mut warned) = (true, true, false);
        loop {
            let written = self.tell();
            if let (Err(error), false) = (&written, warned) {
                tracing::warn!(error = %chain(error), "the status could not be written");
            }
            warned = written.is_err();
            tokio::time::sleep(STATUS_GAP).await;
            tokio::select! {
                changed = self.snapshots.changed() => if changed.is_err() { return },
                changed = self.desired.changed(), if followed => followed = changed.is_ok(),
                changed = self.link.changed(), if linked => linked = changed.is_ok(),
                () = self.pulls.changed() => {}
                // Its sender lives as long as this does.
                _ = self.probed.changed() => {}
                _ = self.erased.changed() => {}
                _ = self.told_of_snapshots.changed() => {}
                () = tokio::time::sleep(STATUS_PERIOD) => {}
            }
        }
    }

    fn tell(&mut self) -> Result<(), StatusError> {
        self.around.vmm = self.executor.host().verdict();
        self.around.capacity = if self.executor.host().boots() { self.capacity } else { Capacity::default() };
        self.around.disk = self.executor.disk();
        self.around.waiting = self.pulls.look();
        self.around.link = self.link.borrow_and_update().clone();
        self.around.erased.clone_from(&self.erased.borrow_and_update());
        self.around.snapshots.clone_from(&self.told_of_snapshots.borrow_and_update());
        // Nothing is told before the first pass: a report without observations would say that nothing runs.
        let Some(snapshot) = self.snapshots.borrow_and_update().clone() else { return Ok(()) };
        let view = self.desired.borrow_and_update().clone();
        // Nor while it is not known whether this node is of use, if nothing runs on it: first to say that there is no
        // room, and then that there is, would let pass a deployment in between.
        let known = *self.probed.borrow_and_update() || self.executor.host().boots();
        let reports = self.reports.as_ref().filter(|_| known || !snapshot.instances.is_empty());
        if let Some(slot) = reports {
            slot.put(status::report(&snapshot, view.as_deref(), &self.around));
        }
        status::status(&snapshot, view.as_deref(), &self.around, now_ms()).write(&self.data_dir)
    }
}

/// Answers what the control plane asks.
struct Calls {
    logs: Arc<Logs>,
    execs: Arc<Execs>,
    client: Client,
}

impl CallHandler for Calls {
    async fn answer(&self, call: AgentCall) -> CallAnswer {
        match call {
            AgentCall::Exec(call) => self.execs.answer(&self.client, *call),
            call => self.logs.answer(&call).await,
        }
    }
}

/// Runs the agent until `shutdown`. Every machine runs on after it.
pub async fn run(config: NodeConfig, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
    let node = Node::open(&config.host)?;
    let ca_file = &config.ca_file;
    let text = fs::read_to_string(ca_file).map_err(|source| AgentError::File {
        path: ca_file.clone(),
        action: "read",
        source,
    })?;
    let ca = CaCertificate::from_pem(&text)
        .map_err(|source| AgentError::Authority { path: ca_file.clone(), source })?;
    let cluster: ClusterId =
        ca.cluster().parse().map_err(|source| AgentError::Cluster { path: ca_file.clone(), source })?;
    let credential = Credential::load(&config.credential_file)?;
    let client = Client::with_credential(config.endpoints, &ca, &credential)?;
    let own = &credential.facts().identity;
    let own = if own.role == Role::Node { own.id.parse().ok() } else { None };
    let own = own.ok_or(AgentError::NotANode)?;
    node.secrets().belongs_to(cluster, own, Arc::new(client.clone()));
    let replica = open_replica(&config.host.data_dir.join("replica.redb"), cluster).await?;
    if let Some(path) = replica.quarantined() {
        tracing::error!(path = %path.display(), "what was desired could not be read and was moved aside");
    }
    let (logs, execs) = (Arc::clone(node.logs()), Arc::clone(node.executor.execs()));
    let follower = Follower::new(client.clone(), replica, Calls { logs, execs, client: client.clone() });
    let (views, link, cut_off) = (follower.views(), follower.link(), follower.cut_off());
    let (slot, reporter) = reporter(&client);
    let (erase, snapshots) = (reporter.erase(), reporter.snapshots());
    let (stop, stopped) = watch::channel(false);
    let following = tokio::spawn(follower.run(stopped.clone()));
    let reporting = tokio::spawn(reporter.run(stopped));
    let node = node.with_cut_off(cut_off).with_erase(erase).with_snapshots(snapshots);
    let kept = node.keep(views, link, Some(slot), shutdown).await;
    stop.send_replace(true);
    // Both end at once when they are told to; a death of theirs changes nothing any more.
    following.await.ok();
    reporting.await.ok();
    kept
}

/// Opens the replica. The last thread of an agent that ended in this process a moment ago may still hold it.
async fn open_replica(path: &Path, cluster: ClusterId) -> Result<Replica<NodeInstance>, DiskError> {
    for _ in 0..REPLICA_TRIES_MAX {
        match Replica::open(path, cluster) {
            Err(DiskError::InUse { .. }) => tokio::time::sleep(REPLICA_PAUSE).await,
            opened => return opened,
        }
    }
    Replica::open(path, cluster)
}

/// Ends every microVM of a data folder, and removes its TAPs, machines' folders and this node's record of them.
/// What is desired, images and logs stay. Fails if an agent uses the folder. Answers with how many it ended.
pub async fn wipe(data_dir: &Path) -> Result<usize, AgentError> {
    if !data_dir.is_dir() {
        return Ok(0);
    }
    let _lock = lock(data_dir)?;
    let ended = executor::remove_all(data_dir).await?;
    for name in [STATE_FILE, status::STATUS_FILE] {
        let path = data_dir.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(AgentError::File { path, action: "removed", source });
            }
            _ => {}
        }
    }
    Ok(ended)
}

/// Makes the data folder and takes its lock, which the kernel frees with this process.
fn lock(data_dir: &Path) -> Result<File, AgentError> {
    let file_error = |path: &Path, action, source| AgentError::File { path: path.to_owned(), action, source };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_dir)
        .map_err(|source| file_error(data_dir, "created", source))?;
    let path = data_dir.join("agent.lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| file_error(&path, "opened", source))?;
    for _ in 0..LOCK_TRIES_MAX {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(file_error(&path, "locked", error.into())),
        }
    }
    Err(AgentError::InUse { path: data_dir.to_owned() })
}

#[cfg(test)]
mod tests {
    use holdfast_model::InstanceId;
    use holdfast_model::agent::LogStream;

    use super::*;
    use crate::logs::Line;

    #[tokio::test]
    async fn a_node_that_was_quarantined_removes_no_log_for_its_age() {
        let folder = tempfile::tempdir().unwrap();
        let retention = Retention { age_ms: 1_000, ended_ms: 1_000, ..Retention::default() };
        let logs = Arc::new(Logs::open_with(folder.path().join("logs"), retention).unwrap());
        let ended = InstanceId::from_bits(1);
        let old = Line {
            time_ms: now_ms() - 3_600_000,
            stream: LogStream::Stdout,
            guest_seq: 1,
            bytes: b"evidence".to_vec(),
            continues: false,
            dropped: 0,
        };
        logs.ring(ended).unwrap().append(&[old]).unwrap();
        logs.keep(&std::collections::BTreeSet::new());
        let kept = || folder.path().join("logs").join(ended.to_string()).exists();
        let period = Duration::from_millis(10);
        let snapshots = watch::Sender::new(None);
        let sweeper = tokio::spawn(sweep_logs(Arc::clone(&logs), snapshots.subscribe(), period));
        // Nor while it is not known whether it was.
        tokio::time::sleep(period * 20).await;
        assert!(kept());
        snapshots.send_replace(Some(Snapshot { cut_off: true, ..Snapshot::default() }));
        tokio::time::sleep(period * 20).await;
        assert!(kept());
        // The same log goes on a node that was not.
        snapshots.send_replace(Some(Snapshot::default()));
        let gone = async {
            while kept() {
                tokio::time::sleep(period).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), gone).await.expect("old logs are never removed");
        sweeper.abort();
    }
}
