//! What the loop asks of the host below it. [`Executor`] is the one in the product. Another, such as a simulated one, can
//! stand below the same loop, so nothing above this trait may start a thread, a process or a wait on the disk by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::sync::Arc;

use holdfast_client::Items;
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;

use crate::executor::{Executor, ExecutorError, Running};
use crate::host;
use crate::logs::{Ring, chain};
use crate::machine::{Brief, Machine, Tell};
use crate::phase::Event;

/// What the loop knows of a microVM that is to be watched.
pub struct Watch<'a> {
    /// Whose it is.
    pub id: InstanceId,
    /// What it is for; `None` while that is not known.
    pub spec: Option<&'a NodeInstance>,
    /// Whether its workload was seen to run.
    pub runs: bool,
    /// Whether it was found healthy.
    pub ready: bool,
    /// Where its lines go.
    pub ring: Arc<Ring>,
    /// Where its events go.
    pub tell: Tell,
}

/// A host with microVMs. Each call may be repeated after it, or the whole agent, was stopped at any point.
pub trait Host: Send + Sync + 'static {
    /// A hold on a microVM that runs. Dropping it changes nothing.
    type Running: Send + 'static;
    /// One that is watched. Dropping it ends the watching and leaves the microVM as it is (I5, I7).
    type Watched: Send + Sync + 'static;

    /// The identity of this boot of the host.
    ///
    /// # Errors
    /// When the system does not tell it.
    fn boot_id(&self) -> io::Result<String>;

    /// Does work that waits for the disk, where it holds up nothing else. It is done to its end, also when nobody waits
    /// for it any more.
    ///
    /// # Errors
    /// When the work did not come to its end.
    fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + Send;

    /// Every microVM of this agent's that runs. Starts, stops and changes nothing; waits for the disk.
    ///
    /// # Errors
    /// When the host could not be looked at.
    fn scan(&self) -> Result<BTreeMap<InstanceId, Self::Running>, ExecutorError>;

    /// A hold on an instance's microVM, if it runs.
    ///
    /// # Errors
    /// When that could not be told.
    fn adopt(&self, id: InstanceId) -> Result<Option<Self::Running>, ExecutorError>;

    /// Begins to watch.
    fn watch(&self, running: Self::Running, watch: Watch<'_>) -> Self::Watched;

    /// The process and the kind of the VMM, while it runs.
    fn process(&self, watched: &Self::Watched) -> Option<(u32, &'static str)>;

    /// Makes image and network of an instance ready.
    fn prepare(&self, spec: &NodeInstance) -> impl Future<Output = Event> + Send;

    /// Starts the VMM of an instance that was prepared. On failure no process is left.
    ///
    /// # Errors
    /// What is to be told of the instance.
    fn start(&self, spec: &NodeInstance) -> impl Future<Output = Result<Self::Running, Event>> + Send;

    /// Ends a microVM at once.
    ///
    /// # Errors
    /// When it may still run.
    fn kill(&self, running: Self::Running) -> impl Future<Output = Result<(), ExecutorError>> + Send;

    /// Kills what is left of an instance's microVM; what the next start can use stays.
    ///
    /// # Errors
    /// When something may still run.
    fn back_off(&self, id: InstanceId) -> impl Future<Output = Result<(), ExecutorError>> + Send;

    /// Stops an instance's workload and removes everything that it has here.
    ///
    /// # Errors
    /// When something is left.
    fn terminate(
        &self,
        id: InstanceId,
        watched: Option<Arc<Self::Watched>>,
    ) -> impl Future<Output = Result<(), ExecutorError>> + Send;

    /// Removes whatever belongs to this agent and to none of these instances.
    ///
    /// # Errors
    /// When something is left.
    fn sweep(&self, keep: &BTreeSet<InstanceId>) -> impl Future<Output = Result<(), ExecutorError>> + Send;

    /// Takes the network of every instance down and touches nothing else.
    ///
    /// # Errors
    /// When one may still be reached.
    fn isolate(&self) -> impl Future<Output = Result<(), ExecutorError>> + Send;

    /// Free space for images, logs and machines' folders, in MiB; `None` where it is not known.
    fn disk_free_mib(&self) -> Option<u64> {
        None
    }

    /// Hears that a change of the node's state is durable.
    fn stored(&self) {}

    /// Removes images that nothing here needs and these instances do not want. Waits for the disk.
    fn collect_images(&self, wanted: &Items<NodeInstance>);
}

impl Host for Executor {
    type Running = Running;
    type Watched = Machine;

    fn boot_id(&self) -> io::Result<String> {
        host::boot_id()
    }

    async fn on_disk<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
    }

    fn scan(&self) -> Result<BTreeMap<InstanceId, Running>, ExecutorError> {
        Self::scan(self)
    }

    fn adopt(&self, id: InstanceId) -> Result<Option<Running>, ExecutorError> {
        Ok(Self::adopt(self, id)?.map(Running::adopted))
    }

    fn watch(&self, running: Running, watch: Watch<'_>) -> Machine {
        let Running { vm, guest, booting } = running;
        let Watch { id, spec, runs, ready, ring, tell } = watch;
        let (config, root) = guest.or_else(|| self.watched(spec?)).unzip();
        let health = spec.and_then(|spec| spec.health.clone());
        let (known, execs) = (spec.is_some(), Arc::clone(self.execs()));
        let secrets = (id, Arc::clone(self.secrets()));
        // I10: before a guest that waits is given them, and before one that was found says its next line.
        if let Err(error) = secrets.1.open_for_lines(id, &ring) {
            tracing::error!(instance = %id, error = %chain(&error), "its secrets are not known: its lines are stored without their text");
        }
        Machine::new(
            vm,
            Brief { config, secrets, health, known, runs, ready, ring, execs, root, booting, tell },
        )
    }

    fn process(&self, watched: &Machine) -> Option<(u32, &'static str)> {
        let vm = watched.vm();
        vm.is_alive().then(|| (vm.pid(), vm.kind().as_str()))
    }

    async fn prepare(&self, spec: &NodeInstance) -> Event {
        Self::prepare(self, spec).await
    }

    async fn start(&self, spec: &NodeInstance) -> Result<Running, Event> {
        Self::start(self, spec).await
    }

    async fn kill(&self, running: Running) -> Result<(), ExecutorError> {
        Ok(running.vm.kill().await?)
    }

    async fn back_off(&self, id: InstanceId) -> Result<(), ExecutorError> {
        Self::back_off(self, id).await
    }

    async fn terminate(&self, id: InstanceId, watched: Option<Arc<Machine>>) -> Result<(), ExecutorError> {
        Self::terminate(self, id, watched).await
    }

    async fn sweep(&self, keep: &BTreeSet<InstanceId>) -> Result<(), ExecutorError> {
        Self::sweep(self, keep).await
    }

    async fn isolate(&self) -> Result<(), ExecutorError> {
        Self::isolate(self).await
    }

    fn disk_free_mib(&self) -> Option<u64> {
        Self::disk(self).map(|disk| disk.free_mib)
    }

    fn stored(&self) {
        Self::stored(self);
    }

    fn collect_images(&self, wanted: &Items<NodeInstance>) {
        Self::collect_images(self, wanted.values().map(Arc::as_ref));
    }
}
