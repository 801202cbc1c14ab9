//! One host: two disks, a wall clock, and the process of the member that runs on it, if one does.
//!
//! A crash drops the process with everything in it, in the middle of whatever it does, after its disks were turned off:
//! no destructor of a dead process reaches a disk.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_faulty_disk::{Disk, Faults};
use holdfast_model::{ClusterVersion, MemberId};
use holdfast_raft::log_store::LogStore;
use holdfast_raft::{Compaction, Consensus, ConsensusConfig, MemberIdentity, MemberNode, Parts, RaftTls};
use holdfast_store::Store;
use rand::rngs::StdRng;
use tokio::task::AbortHandle;

use crate::api_member::{ApiMember, Cluster};
use crate::network::Network;
use crate::process::{Machine, Process};

/// Bytes of a log's journal: few, so that it is full often.
const JOURNAL_BYTES: u64 = 16 * 1024;

/// How a host goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The process is killed: what it wrote is still in the kernel's memory.
    Kill,
    /// The power goes: what was not synced is lost or torn.
    PowerLoss,
}

/// What was said to a start of a member.
type Started = Arc<Mutex<Option<Result<ApiMember, String>>>>;

/// A host.
pub(crate) struct Host {
    pub(crate) id: u64,
    pub(crate) machine: Machine,
    /// The newest cluster version that its build supports.
    pub(crate) version_max: ClusterVersion,
    /// Whether its disk misbehaved since it started: then it may fail and stop.
    pub(crate) excused: bool,
    /// How often its state rotted. What rots is found late.
    pub(crate) rotted: u32,
    folder: PathBuf,
    log_disk: Disk,
    state_disk: Disk,
    log_made: bool,
    running: Option<Running>,
}

struct Running {
    process: Process,
    started: Started,
    member: Option<ApiMember>,
}

impl Host {
    pub(crate) fn new(id: u64, folder: PathBuf) -> Self {
        Host {
            id,
            machine: Machine::WELL,
            version_max: ClusterVersion::NEWEST,
            excused: false,
            rotted: 0,
            folder,
            log_disk: Disk::default(),
            state_disk: Disk::default(),
            log_made: false,
            running: None,
        }
    }

    /// The node as the membership knows it.
    pub(crate) fn node(&self) -> MemberNode {
        MemberNode {
            raft_addr: Network::address(self.id).to_string(),
            api_addr: format!("10.0.0.{}:8443", self.id),
        }
    }

    /// The process has this host's clocks from now on.
    pub(crate) fn take_clocks(&self, now_ms: u64) {
        self.machine.take_clocks(now_ms);
    }

    /// Whether it may fail and stop: its disk misbehaved since it started, or bits rotted that nobody may have read yet.
    pub(crate) fn may_fail(&self) -> bool {
        self.excused || self.rotted > 0
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The member, once it has started.
    pub(crate) fn member(&self) -> Option<&Consensus> {
        self.api().map(|api| &*api.consensus)
    }

    /// The member with its API, once it has started.
    pub(crate) fn api(&self) -> Option<&ApiMember> {
        self.running.as_ref().and_then(|running| running.member.as_ref())
    }

    /// Begins to start the member.
    pub(crate) fn start(
        &mut self,
        network: &Network,
        tls: &Arc<RaftTls>,
        cluster: &Cluster,
        compaction: &Compaction,
    ) -> Result<(), String> {
        network.come_up(self.id);
        let process = Process::new()?;
        let started = Started::default();
        let mut config = ConsensusConfig::new(
            MemberId(self.id),
            self.folder.clone(),
            Network::address(self.id),
            tls.clone(),
        );
        config.compaction = compaction.clone();
        config.cluster_version_max = self.version_max;
        config.digest_check_every = Duration::from_secs(2);
        config.log_time_every = Duration::from_millis(500);
        let identity = (!self.log_made).then(|| MemberIdentity {
            cluster: cluster.id.to_string(),
            member: MemberId(self.id),
            incarnation: 1,
        });
        config.scrub_pass = Duration::from_secs(2);
        let folder = self.folder.clone();
        let (log_disk, state_disk) = (self.log_disk.clone(), self.state_disk.clone());
        let (cluster, id) = (cluster.clone(), self.id);
        let api_port = network.api_port(self.id);
        let (link, raft_addr, slot) = (network.link(self.id), Network::address(self.id), started.clone());
        process.spawn(async move {
            let start = async {
                let (journal, log) = log_disk.split(JOURNAL_BYTES).map_err(|e| describe(&e))?;
                let log = LogStore::open_with_backend(journal, log, identity.as_ref());
                let log = log.map_err(|e| describe(&e))?;
                let store = Consensus::open_state(&folder, &log, |given_up| {
                    if given_up {
                        state_disk.wipe();
                    }
                    Store::open_with_backend(state_disk.clone())
                });
                let store = store.map_err(|e| describe(&e))?;
                let parts = Parts { link, raft_addr, log, store: Arc::new(store) };
                let consensus = Consensus::start_on(config, parts).await.map_err(|e| describe(&e))?;
                ApiMember::start(&cluster, id, consensus, api_port)
            };
            let result = start.await;
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
        self.running = Some(Running { process, started, member: None });
        Ok(())
    }

    /// Runs a task on the host, as part of its process.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Option<AbortHandle> {
        Some(self.running.as_ref()?.process.spawn(task))
    }

    /// Whether anything can run at this time: a timer is due, or something from outside woke a task.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.running.as_ref().is_some_and(|running| running.process.is_due(now_ms))
    }

    /// Runs everything that can run at this time. The error is why the member did not start.
    pub(crate) fn tick(&mut self, now_ms: u64) -> Result<(), String> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.process.run(now_ms, self.machine);
        if running.member.is_none() {
            let started = running.started.lock().unwrap_or_else(PoisonError::into_inner).take();
            match started {
                Some(Ok(member)) => {
                    self.log_made = true;
                    running.member = Some(member);
                }
                Some(Err(reason)) => return Err(reason),
                None => {}
            }
        }
        Ok(())
    }

    /// Ends the process at once. Answers whether a write was lost with the power.
    pub(crate) fn crash(&mut self, crash: Crash, network: &Network, silent: bool, rng: &mut StdRng) -> bool {
        let (log, state) = match crash {
            Crash::Kill => (self.log_disk.for_next_process(), self.state_disk.for_next_process()),
            Crash::PowerLoss => (self.log_disk.after_power_loss(rng), self.state_disk.after_power_loss(rng)),
        };
        let lost = self.log_disk.current() != log.current() || self.state_disk.current() != state.current();
        (self.log_disk, self.state_disk) = (log, state);
        network.go_down(self.id, silent);
        self.running = None;
        lost
    }

    /// Loses power after so many more steps of one of its disks.
    pub(crate) fn lose_power_after(&self, steps: u64, on_log: bool) {
        let disk = if on_log { &self.log_disk } else { &self.state_disk };
        disk.lose_power_after(steps);
    }

    /// Loses no power after all.
    pub(crate) fn keep_power(&self) {
        self.log_disk.keep_power();
        self.state_disk.keep_power();
    }

    /// Whether a disk lost its power, so that the host must go down.
    pub(crate) fn lost_power(&self) -> bool {
        self.running.is_some() && (self.log_disk.is_off() || self.state_disk.is_off())
    }

    /// Flips bits of its state, wherever they lie.
    pub(crate) fn rot(&self, bits: u32, rng: &mut StdRng) {
        use rand::RngExt;
        for _ in 0..bits {
            let at = rng.random_range(0..self.state_disk.bytes().max(1));
            self.state_disk.flip_bit(at, rng.random_range(0..8));
        }
    }

    /// How the disks behave from now on.
    pub(crate) fn set_disk_faults(&self, faults: Faults) {
        self.log_disk.set_faults(faults);
        self.state_disk.set_faults(faults);
    }
}

/// An error and its sources in one line.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
