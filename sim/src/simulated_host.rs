//! The host as an agent's real loop sees it, over a [`MachineRoom`]: every step takes some time, may fail, and may be the
//! last one that this agent does.
//!
//! It stands for `node`'s executor and for its watching of one machine, and behaves as they do where the loop can tell: a
//! start fails beside a machine that runs, everything may be repeated, and dropping a hold changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_client::Items;
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;
use holdfast_node::executor::ExecutorError;
use holdfast_node::phase::{Cause, Event};
use holdfast_node::supervisor::{Host, Watch};
use rand::RngExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::machine_room::{MachineRoom, Stage};

/// How long a step on the host takes, in milliseconds.
const STEP_MS: Range<u64> = 0..15;
/// How long an image takes that is not here yet, in milliseconds.
const IMAGE_MS: Range<u64> = 0..100;
/// How long a workload takes to stop, in milliseconds.
const STOP_MS: Range<u64> = 0..300;
/// How long a piece of work on the disk takes, in milliseconds.
const DISK_MS: Range<u64> = 0..3;
/// How likely one of an action's steps fails.
const FAILS: f64 = 0.03;

/// One agent's process, as far as it can be ended between any two steps.
#[derive(Default)]
pub(crate) struct Life {
    /// Steps until it dies; it lives on for ever while this is not above zero.
    steps_left: AtomicI64,
    /// The same for steps that changed the host.
    changes_left: AtomicI64,
    dead: AtomicBool,
}

impl Life {
    /// Dies after so many more steps of any kind, or so many that change the host; never by what is zero.
    pub(crate) fn die_after(&self, steps: i64, changes: i64) {
        self.steps_left.store(steps, Ordering::Relaxed);
        self.changes_left.store(changes, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// A step was done. Waits for ever if it was the last one.
    async fn step(&self) {
        self.count(&self.steps_left).await;
    }

    /// A step that changed the host was done. The same.
    async fn changed(&self) {
        self.count(&self.changes_left).await;
        self.step().await;
    }

    async fn count(&self, left: &AtomicI64) {
        if left.load(Ordering::Relaxed) > 0 && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.dead.store(true, Ordering::Relaxed);
        }
        if self.is_over() {
            pending::<()>().await;
        }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct SimulatedHost {
    room: Arc<Mutex<MachineRoom>>,
    life: Arc<Life>,
}

/// A VMM that runs.
pub(crate) struct SimulatedVm {
    pid: u32,
    stage: watch::Receiver<Stage>,
}

/// A VMM that is watched.
pub(crate) struct Watched {
    pid: u32,
    stage: watch::Receiver<Stage>,
    task: AbortHandle,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl SimulatedHost {
    pub(crate) fn new(room: Arc<Mutex<MachineRoom>>, life: Arc<Life>) -> Self {
        SimulatedHost { room, life }
    }

    fn room(&self) -> MutexGuard<'_, MachineRoom> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes some time, and dies if it is time to.
    async fn take(&self, ms: Range<u64>) {
        let ms = self.room().rng.random_range(ms);
        if ms > 0 {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        self.life.step().await;
    }

    /// One step that changes the host. It may fail.
    async fn change(&self, change: impl FnOnce(&mut MachineRoom)) -> Result<(), ExecutorError> {
        self.take(STEP_MS).await;
        {
            let mut room = self.room();
            if room.fails(FAILS) {
                return Err(ExecutorError::Folder {
                    path: "vms".into(),
                    action: "changed",
                    source: io::Error::other("the simulated host did not want to"),
                });
            }
            change(&mut room);
        }
        self.life.changed().await;
        Ok(())
    }

    async fn kill_all_of(&self, id: InstanceId) -> Result<(), ExecutorError> {
        self.change(|room| {
            let pids: Vec<u32> = room.running().filter(|(_, of, _)| *of == id).map(|(pid, ..)| pid).collect();
            pids.into_iter().for_each(|pid| room.kill(pid));
        })
        .await
    }

    fn ended(cause: Cause) -> Event {
        Event::Ended { cause, detail: "by the seed".to_owned() }
    }
}

impl Host for SimulatedHost {
    type Running = SimulatedVm;
    type Watched = Watched;

    fn boot_id(&self) -> io::Result<String> {
        Ok(self.room().boot_id())
    }

    async fn on_disk<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        self.take(DISK_MS).await;
        let done = work();
        self.life.step().await;
        Ok(done)
    }

    fn scan(&self) -> Result<BTreeMap<InstanceId, SimulatedVm>, ExecutorError> {
        let room = self.room();
        let found = room.folders.iter().filter_map(|id| Some((*id, room.find(*id)?)));
        Ok(found.map(|(id, (pid, stage))| (id, SimulatedVm { pid, stage })).collect())
    }

    fn adopt(&self, id: InstanceId) -> Result<Option<SimulatedVm>, ExecutorError> {
        Ok(self.room().find(id).map(|(pid, stage)| SimulatedVm { pid, stage }))
    }

    fn watch(&self, running: SimulatedVm, watch: Watch<'_>) -> Watched {
        let SimulatedVm { pid, stage } = running;
        let (mut seen, known, tell) = (stage.clone(), watch.spec.is_some(), watch.tell);
        let host = self.clone();
        let task = tokio::spawn(async move {
            let mut told = Stage::Booting;
            loop {
                // A guest is greeted, or a check is answered.
                host.take(STEP_MS).await;
                let stage = *seen.borrow_and_update();
                if stage >= Stage::Running && stage < Stage::Gone && told < Stage::Running {
                    tell(Event::WorkloadRunning).await;
                    told = Stage::Running;
                }
                match stage {
                    Stage::Booting | Stage::Running => {}
                    Stage::Serving if known && told < Stage::Serving => {
                        tell(Event::Healthy).await;
                        told = Stage::Serving;
                    }
                    Stage::Serving => {}
                    Stage::Sick if !known => {}
                    Stage::Sick => return tell(SimulatedHost::ended(Cause::Unhealthy)).await,
                    Stage::Gone => break,
                }
                if seen.changed().await.is_err() {
                    break;
                }
            }
            let cause = if told == Stage::Booting { Cause::VmmStart } else { Cause::Crashed };
            tell(SimulatedHost::ended(cause)).await;
        });
        Watched { pid, stage, task: task.abort_handle() }
    }

    fn process(&self, watched: &Watched) -> Option<(u32, &'static str)> {
        self.room().is_running(watched.pid).then_some((watched.pid, "simulated"))
    }

    async fn prepare(&self, spec: &NodeInstance) -> Event {
        self.take(IMAGE_MS).await;
        if self.room().fails(FAILS) {
            return Self::ended(Cause::ImagePull);
        }
        match self
            .change(|room| {
                room.taps.insert(spec.id);
            })
            .await
        {
            Ok(()) => Event::Prepared,
            Err(_) => Self::ended(Cause::Network),
        }
    }

    async fn start(&self, spec: &NodeInstance) -> Result<SimulatedVm, Event> {
        let failed = |_| Self::ended(Cause::VmmStart);
        self.room().set_about_to_start(spec.id);
        if self.room().find(spec.id).is_some() {
            return Err(Self::ended(Cause::VmmStart));
        }
        self.change(|room| {
            room.folders.insert(spec.id);
        })
        .await
        .map_err(failed)?;
        let mut begun = None;
        self.change(|room| begun = Some(room.begin(spec.id))).await.map_err(failed)?;
        begun.map(|(pid, stage)| SimulatedVm { pid, stage }).ok_or_else(|| Self::ended(Cause::VmmStart))
    }

    async fn kill(&self, running: SimulatedVm) -> Result<(), ExecutorError> {
        self.take(STEP_MS).await;
        self.room().kill(running.pid);
        self.life.changed().await;
        Ok(())
    }

    async fn isolate(&self) -> Result<(), ExecutorError> {
        // No node of a simulation is quarantined.
        Ok(())
    }

    async fn back_off(&self, id: InstanceId) -> Result<(), ExecutorError> {
        self.kill_all_of(id).await
    }

    async fn terminate(&self, id: InstanceId, watched: Option<Arc<Watched>>) -> Result<(), ExecutorError> {
        if let Some(watched) = watched.filter(|watched| *watched.stage.borrow() != Stage::Booting) {
            self.take(STOP_MS).await;
            self.room().kill(watched.pid);
            self.life.changed().await;
        }
        self.kill_all_of(id).await?;
        self.change(|room| {
            room.taps.remove(&id);
        })
        .await?;
        self.change(|room| {
            room.folders.remove(&id);
        })
        .await
    }

    async fn sweep(&self, keep: &BTreeSet<InstanceId>) -> Result<(), ExecutorError> {
        let unknown: Vec<InstanceId> = self.room().folders.difference(keep).copied().collect();
        for id in unknown {
            self.kill_all_of(id).await?;
            self.change(|room| {
                room.folders.remove(&id);
            })
            .await?;
        }
        self.change(|room| room.taps.retain(|tap| keep.contains(tap))).await
    }

    fn collect_images(&self, _wanted: &Items<NodeInstance>) {}
}
