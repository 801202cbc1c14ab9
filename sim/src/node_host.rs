//! One node: a host that may reboot, and on it the real loop of the agent, which may die at any step.
//!
//! The agent's disk holds its real records; what is desired comes over a [`NodeLink`](crate::node_link::NodeLink) and is
//! kept, as a replica does.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdfast_client::Published;
use holdfast_faulty_disk::Disk;
use holdfast_model::NodeId;
use holdfast_model::agent::NodeInstance;
use holdfast_node::logs::Logs;
use holdfast_node::state::State;
use holdfast_node::supervisor::{Snapshot, Supervisor};
use rand::RngExt;
use rand::rngs::StdRng;
use redb::Database;
use tokio::sync::watch;

use crate::host::describe;
use crate::machine_room::MachineRoom;
use crate::process::{Machine, Process};
use crate::simulated_host::{Life, SimulatedHost};

/// How long an agent is away, in milliseconds.
const AGENT_AWAY_MS: std::ops::Range<u64> = 1..1_500;

/// See the module.
pub(crate) struct NodeHost {
    pub(crate) number: usize,
    pub(crate) node: NodeId,
    pub(crate) wall_offset_ms: i64,
    pub(crate) room: Arc<Mutex<MachineRoom>>,
    /// What its replica has on disk.
    pub(crate) known: Published<NodeInstance>,
    disk: Disk,
    agent: Option<Agent>,
    /// When the agent is started again.
    start_ms: Option<u64>,
}

/// An agent's process.
pub(crate) struct Agent {
    process: Process,
    life: Arc<Life>,
    published: watch::Sender<Published<NodeInstance>>,
    snapshots: Arc<Mutex<Option<watch::Receiver<Option<Snapshot>>>>>,
    ended: Arc<Mutex<Option<String>>>,
}

impl NodeHost {
    pub(crate) fn new(number: usize, node: NodeId, seed: u64) -> Self {
        NodeHost {
            number,
            node,
            wall_offset_ms: 0,
            room: Arc::new(Mutex::new(MachineRoom::new(seed))),
            known: None,
            disk: Disk::default(),
            agent: None,
            start_ms: Some(0),
        }
    }

    pub(crate) fn room(&self) -> MutexGuard<'_, MachineRoom> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_up(&self) -> bool {
        self.agent.is_some()
    }

    /// What the agent last knew, once it has looked at its disk.
    pub(crate) fn snapshot(&self) -> Option<Snapshot> {
        let snapshots = self.agent.as_ref()?.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.as_ref()?.borrow().clone()
    }

    /// Whether the agent's knowledge changed since this was last asked.
    pub(crate) fn has_news(&self) -> bool {
        let Some(agent) = &self.agent else { return false };
        let mut snapshots = agent.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.as_mut().is_some_and(|snapshots| {
            let changed = snapshots.has_changed().unwrap_or(false);
            snapshots.mark_unchanged();
            changed
        })
    }

    /// Puts what is desired on the replica's disk and tells the agent.
    pub(crate) fn publish(&mut self, view: Published<NodeInstance>) {
        self.known = view;
        if let Some(agent) = &self.agent {
            agent.published.send_replace(self.known.clone());
        }
    }

    /// One millisecond. Answers whether the agent or the host went down in it.
    pub(crate) fn tick(&mut self, now_ms: u64, rng: &mut StdRng) -> Result<bool, String> {
        self.room().advance(now_ms);
        if self.start_ms.is_some_and(|at| at <= now_ms) {
            self.start_ms = None;
            self.start()?;
        }
        let Some(agent) = &mut self.agent else { return Ok(false) };
        if agent.process.is_due(now_ms) {
            agent.process.run(now_ms, Machine { wall_offset_ms: self.wall_offset_ms, ..Machine::WELL });
        }
        if self.disk.is_off() {
            self.reboot(now_ms, rng);
            return Ok(true);
        }
        if agent.life.is_over() {
            self.kill_agent(now_ms, rng);
            return Ok(true);
        }
        match agent.ended.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(reason) => Err(format!("node {}: the agent ended: {reason}", self.number)),
            None => Ok(false),
        }
    }

    fn start(&mut self) -> Result<(), String> {
        let process = Process::new()?;
        let life = Arc::new(Life::default());
        let host = Arc::new(SimulatedHost::new(Arc::clone(&self.room), Arc::clone(&life)));
        let published = watch::Sender::new(self.known.clone());
        let (snapshots, ended) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
        let (desired, disk, slot) = (published.subscribe(), self.disk.clone(), Arc::clone(&snapshots));
        let folder = PathBuf::from(format!("node-{}", self.number)).join("logs");
        let end = Arc::clone(&ended);
        process.spawn(async move {
            let run = async {
                let open = || Database::builder().create_with_backend(disk.clone());
                let state = State::open_with(Path::new("node.redb"), open, || {
                    disk.wipe();
                    Ok(())
                });
                let state = Arc::new(state.map_err(|e| describe(&e))?);
                let logs = Arc::new(Logs::open(folder).map_err(|e| describe(&e))?);
                let supervisor = Supervisor::new(host, state, logs, desired);
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(supervisor.snapshots());
                supervisor.run(pending()).await.map_err(|e| describe(&e))
            };
            let reason = run.await.err().unwrap_or_else(|| "it was not told to".to_owned());
            *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        });
        self.agent = Some(Agent { process, life, published, snapshots, ended });
        Ok(())
    }

    /// Ends the agent at once. What runs on the host runs on.
    pub(crate) fn kill_agent(&mut self, now_ms: u64, rng: &mut StdRng) {
        self.disk = self.disk.for_next_process();
        self.agent = None;
        self.start_ms = Some(now_ms + rng.random_range(AGENT_AWAY_MS));
    }

    /// Ends the agent; its replica is damaged, so that the next one does not know what is desired.
    pub(crate) fn lose_replica(&mut self, now_ms: u64, rng: &mut StdRng) {
        self.kill_agent(now_ms, rng);
        self.known = None;
    }

    /// Ends the agent after so many more steps of any kind, or so many that change the host; never by what is zero.
    pub(crate) fn kill_agent_after(&self, steps: i64, changes: i64) {
        self.agent.iter().for_each(|agent| agent.life.die_after(steps, changes));
    }

    /// Takes the power away: nothing runs any more, and what was not synced is lost or torn.
    pub(crate) fn reboot(&mut self, now_ms: u64, rng: &mut StdRng) {
        self.disk = self.disk.after_power_loss(rng);
        self.agent = None;
        self.room().reboot();
        self.start_ms = Some(now_ms + rng.random_range(AGENT_AWAY_MS));
    }

    /// Takes the power away after so many more steps of its disk.
    pub(crate) fn lose_power_after(&self, steps: u64) {
        self.disk.lose_power_after(steps);
    }

    /// Nothing more goes wrong by itself.
    pub(crate) fn calm_down(&self) {
        self.disk.keep_power();
        self.kill_agent_after(0, 0);
        self.room().calm_down();
    }
}
