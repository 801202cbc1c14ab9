//! One edge's host: a disk, and a process with the real follower, the real replica on that disk and the real table. It has no
//! listeners: what it would serve is what its table says.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_client::{Client, Endpoint, Follower, NoCalls, Published, Replica, ReplicaFile, View};
use holdfast_edge::in_force::{InForce, Put};
use holdfast_edge::{Edge, EdgeConfig};
use holdfast_faulty_disk::{Disk, Faults};
use holdfast_identity::{PeerIdentity, Role};
use holdfast_model::agent::EdgeRoute;
use holdfast_model::{ClusterId, EdgeId};
use rand::rngs::StdRng;
use redb::{Builder, Database, DatabaseError};
use tokio::sync::watch;

use crate::api_member::Cluster;
use crate::host::{Crash, describe};
use crate::network::Network;
use crate::process::{Machine, Process};

/// The replica's name, for its errors.
const FILE: &str = "routes.redb";

/// What an edge put in force, and whether its table is then what the view says.
pub(crate) struct InForceNow {
    pub(crate) view: Arc<View<EdgeRoute>>,
    pub(crate) table: Result<(), String>,
}

/// What a process tells the world.
#[derive(Default)]
struct Told {
    put: Vec<InForceNow>,
    /// Why it ended by itself.
    ended: Option<String>,
}

/// A host.
pub(crate) struct EdgeHost {
    /// Its number in the network.
    pub(crate) id: u64,
    pub(crate) edge: EdgeId,
    pub(crate) machine: Machine,
    /// Whether its disk misbehaved since the process started: then it may end.
    pub(crate) excused: bool,
    disk: Disk,
    set_aside: Arc<AtomicBool>,
    process: Option<Process>,
    told: Arc<Mutex<Told>>,
}

impl EdgeHost {
    pub(crate) fn new(id: u64, edge: EdgeId) -> Self {
        EdgeHost {
            id,
            edge,
            machine: Machine::WELL,
            excused: false,
            disk: Disk::default(),
            set_aside: Arc::default(),
            process: None,
            told: Arc::default(),
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the agent's process.
    pub(crate) fn start(&mut self, network: &Network, cluster: &Cluster, members: u64) -> Result<(), String> {
        let words = |error: &dyn std::error::Error| describe(error);
        network.come_up(self.id);
        self.excused = false;
        let id = cluster.id.to_string();
        let identity =
            PeerIdentity::new(&id, Role::Edge, &self.edge.to_string()).map_err(|error| words(&error))?;
        let endpoints: Result<Vec<Endpoint>, _> =
            (1..=members).map(|member| format!("10.0.0.{member}:8443").parse()).collect();
        let endpoints = endpoints.map_err(|error| words(&error))?;
        let dial = network.agent_dial(self.id, identity);
        let authority = cluster.authority.certificate().clone();
        let file = SimulatedFile { disk: self.disk.clone(), set_aside: self.set_aside.clone() };
        self.told = Arc::default();
        let (told, cluster) = (self.told.clone(), cluster.id);
        let process = Process::new()?;
        process.spawn(async move {
            let client = Client::with_dial(endpoints, &authority, dial);
            let run = async { run(client.map_err(|error| describe(&error))?, file, cluster, &told).await };
            if let Err(reason) = run.await {
                told.lock().unwrap_or_else(PoisonError::into_inner).ended = Some(reason);
            }
        });
        self.process = Some(process);
        Ok(())
    }

    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.process.as_ref().is_some_and(|process| process.is_due(now_ms))
    }

    /// Runs what can run at this time, and tells what was put in force meanwhile, and whether the process ended by itself.
    pub(crate) fn tick(&mut self, now_ms: u64) -> (Vec<InForceNow>, Option<String>) {
        if let Some(process) = &mut self.process {
            process.run(now_ms, self.machine);
        }
        let Told { put, ended } =
            std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        (put, ended)
    }

    /// Whether a replica that was found damaged was moved aside since this was asked last.
    pub(crate) fn take_set_aside(&self) -> bool {
        self.set_aside.swap(false, Ordering::Relaxed)
    }

    /// Ends the process at once.
    pub(crate) fn crash(&mut self, crash: Crash, network: &Network, silent: bool, rng: &mut StdRng) {
        self.disk = match crash {
            Crash::Kill => self.disk.for_next_process(),
            Crash::PowerLoss => self.disk.after_power_loss(rng),
        };
        network.go_down(self.id, silent);
        self.process = None;
    }

    /// Whether the disk lost its power, so that the host must go down.
    pub(crate) fn lost_power(&self) -> bool {
        self.is_running() && self.disk.is_off()
    }

    /// Loses power after so many more steps of its disk.
    pub(crate) fn lose_power_after(&self, steps: u64) {
        self.disk.lose_power_after(steps);
    }

    /// How the disk behaves from now on.
    pub(crate) fn set_disk_faults(&mut self, faults: Faults) {
        self.excused |= faults != Faults::default();
        self.disk.set_faults(faults);
    }

    /// The disk is well, and loses no power after all.
    pub(crate) fn mend(&mut self) {
        self.machine = Machine::WELL;
        self.disk.set_faults(Faults::default());
        self.disk.keep_power();
    }
}

/// The agent, for as long as its process lives.
async fn run(
    client: Client,
    file: SimulatedFile,
    cluster: ClusterId,
    told: &Arc<Mutex<Told>>,
) -> Result<(), String> {
    let replica = Replica::open_file(Box::new(file), cluster).map_err(|error| describe(&error))?;
    tokio::spawn(put_in_force(replica.subscribe(), told.clone()));
    // Only an orderly stop would say anything on it.
    let (_stop, stopping) = watch::channel(false);
    Follower::new(client, replica, NoCalls).run(stopping).await;
    Err("the follower ended".to_owned())
}

/// Puts each view in force, as the edge's main task does, and the one from the disk first.
async fn put_in_force(mut views: watch::Receiver<Published<EdgeRoute>>, told: Arc<Mutex<Told>>) {
    let edge = Edge::new(&EdgeConfig { seed: Some(0), ..EdgeConfig::new(PathBuf::new()) });
    let mut in_force = InForce::new(Arc::clone(&edge));
    views.mark_changed();
    while views.changed().await.is_ok() {
        let published = views.borrow_and_update().clone();
        let Some((view, put)) = in_force.put(published) else { continue };
        let table = match put {
            Put::Refused(error) => Err(describe(&error)),
            Put::Switched | Put::Same => agrees(&edge, &view),
        };
        told.lock().unwrap_or_else(PoisonError::into_inner).put.push(InForceNow { view, table });
    }
}

/// Whether the table in force has each route of a view under its port and name, and no other.
fn agrees(edge: &Edge, view: &View<EdgeRoute>) -> Result<(), String> {
    let table = edge.table();
    let mut found: Vec<_> = table.iter().map(|(port, name, route)| (route.id, port, name.cloned())).collect();
    found.sort();
    let meant: Vec<_> = view.items.values().map(|r| (r.id, r.listen_port, r.hostname.clone())).collect();
    if found == meant { Ok(()) } else { Err(format!("the table has {found:?} where the view has {meant:?}")) }
}

/// The replica's file on the host's disk.
#[derive(Debug)]
struct SimulatedFile {
    disk: Disk,
    set_aside: Arc<AtomicBool>,
}

impl ReplicaFile for SimulatedFile {
    fn path(&self) -> &Path {
        Path::new(FILE)
    }

    fn make_folder(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn open(&self, builder: &Builder) -> Result<Database, DatabaseError> {
        builder.create_with_backend(self.disk.clone())
    }

    /// What a sync of this disk could not write is written by a later one.
    fn forget_cached(&self) {}

    fn set_aside(&self) -> std::io::Result<PathBuf> {
        self.set_aside.store(true, Ordering::Relaxed);
        self.disk.wipe();
        Ok(PathBuf::from(FILE))
    }
}
