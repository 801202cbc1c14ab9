//! The agent's one loop: it hears what is desired and what has happened, asks [`crate::reconcile`] what to do, stores
//! it, and has it done by its [`Host`]: [`crate::executor`] in the product.
//!
//! Nothing is begun before it is on disk. An unknown desired set is not an empty one: then nothing is begun at all,
//! and what runs is adopted and watched (I5). When the loop ends the machines run on (I7). Everything that takes
//! time runs in a task of its own, at most one for each instance.

mod adoption;
mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use holdfast_client::{Published, View};
use holdfast_model::InstanceId;
use holdfast_model::agent::NodeInstance;
use holdfast_model::resource::Capacity;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::admission::{self, Room};
use crate::executor::ExecutorError;
use crate::logs::{LogError, Logs, chain};
use crate::machine::now_ms;
use crate::phase::{Cause, Event, Observed, Phase, RETRY_MS};
use crate::reconcile::{Action, is_ahead, next_wake_ms, plan};
use crate::state::{State, StateError};

pub use host::{Host, Watch};

/// The loop looks at everything at least this often.
const PERIOD_MS: u64 = 10_000;

/// Notes that wait for the loop, at most; who has one more waits.
const NOTES_MAX: usize = 1_024;

/// Notes that are taken before the next plan, at most.
const NOTES_AT_ONCE_MAX: usize = 256;

/// Images are collected at least this often, which is also how exactly their last use is known.
const COLLECTION_PERIOD_MS: u64 = 600_000;

/// Why the agent cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// Its state.
    #[error(transparent)]
    State(#[from] StateError),
    /// What is on the host.
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    /// The host's boot is not known.
    #[error("The host's boot could not be told from others; /proc must be mounted.")]
    BootId(#[source] std::io::Error),
    /// A thread died.
    #[error("A thread that read the node's state ended unexpectedly; start the agent again.")]
    Thread,
}

/// What the agent knows at one moment, for reports and `holdfast node status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every instance that it knows.
    pub instances: BTreeMap<InstanceId, InstanceView>,
    /// Whether this node was cut off.
    pub cut_off: bool,
}

/// One instance in a [`Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceView {
    /// How it stands.
    pub observed: Observed,
    /// Its VMM's process and kind, while one runs.
    pub machine: Option<(u32, &'static str)>,
    /// How often this agent saw it end because memory was used up.
    pub oom_kills: u64,
}

/// How the loop comes round, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// When it last did, in milliseconds since the Unix epoch.
    pub passed_ms: u64,
    /// How long that took.
    pub pass: Duration,
    /// How often it has.
    pub passes: u64,
}

/// What a task tells the loop.
enum Note<R> {
    /// An action of the instance ended.
    Done { id: InstanceId, ticket: u64, event: Event },
    /// Its VMM runs.
    Started { id: InstanceId, ticket: u64, started: Box<R> },
    /// Something happened to its machine.
    Machine { id: InstanceId, life: u64, event: Event },
}

/// What the loop holds for one instance.
struct Slot<W> {
    /// The action under way, and its task. A note with another ticket is stale.
    ticket: u64,
    task: Option<JoinHandle<()>>,
    /// The machine, and which one it is. A note of another life is stale.
    life: u64,
    machine: Option<Arc<W>>,
    /// Whether it was known what the machine is for when the watching began.
    known: bool,
    /// Ends because memory was used up.
    oom_kills: u64,
}

impl<W> Default for Slot<W> {
    fn default() -> Self {
        Self { ticket: 0, task: None, life: 0, machine: None, known: false, oom_kills: 0 }
    }
}

impl<W> Drop for Slot<W> {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// The loop's state.
pub struct Supervisor<H: Host> {
    host: Arc<H>,
    state: Arc<State>,
    logs: Arc<Logs>,
    desired: watch::Receiver<Published<NodeInstance>>,
    observed: BTreeMap<InstanceId, Observed>,
    /// Instances whose record on disk is not what is observed.
    dirty: BTreeSet<InstanceId>,
    slots: BTreeMap<InstanceId, Slot<H::Watched>>,
    notes: mpsc::Sender<Note<H::Running>>,
    inbox: mpsc::Receiver<Note<H::Running>>,
    /// `None` before the first pass.
    published: watch::Sender<Option<Snapshot>>,
    pulse: watch::Sender<Pulse>,
    /// The last ticket or life that was given out.
    last_number: u64,
    /// Becomes true when an operator has cut this node off.
    cut_off: watch::Receiver<bool>,
    /// Whether it is, as far as the disk says. Then nothing is begun or removed any more: what is here is evidence.
    is_cut_off: bool,
    /// What the node offers; `None` takes whatever comes.
    capacity: Option<Capacity>,
    /// Whether leftovers were looked for with the desired set known.
    swept: bool,
    /// The last collection of images.
    collection: Option<JoinHandle<()>>,
    /// When the next one is due.
    collect_at_ms: u64,
    /// No action before this time: the disk refused.
    not_before_ms: u64,
}

impl<H: Host> Supervisor<H> {
    /// A loop over these parts. Nothing happens before [`Supervisor::run`].
    pub fn new(
        host: Arc<H>,
        state: Arc<State>,
        logs: Arc<Logs>,
        desired: watch::Receiver<Published<NodeInstance>>,
    ) -> Self {
        let (notes, inbox) = mpsc::channel(NOTES_MAX);
        Self {
            host,
            state,
            logs,
            desired,
            observed: BTreeMap::new(),
            dirty: BTreeSet::new(),
            slots: BTreeMap::new(),
            notes,
            inbox,
            published: watch::Sender::new(None),
            cut_off: watch::Sender::new(false).subscribe(),
            is_cut_off: false,
            capacity: None,
            pulse: watch::Sender::new(Pulse::default()),
            last_number: 0,
            swept: false,
            collection: None,
            collect_at_ms: 0,
            not_before_ms: 0,
        }
    }

    /// Follows what the agent knows; `None` until it has looked at its disk.
    pub fn snapshots(&self) -> watch::Receiver<Option<Snapshot>> {
        self.published.subscribe()
    }

    /// Listens to who tells that this node is cut off.
    #[must_use]
    pub fn with_cut_off(self, cut_off: watch::Receiver<bool>) -> Self {
        Self { cut_off, ..self }
    }

    /// Refuses new instances for which this leaves no room.
    #[must_use]
    pub fn with_capacity(self, capacity: Capacity) -> Self {
        Self { capacity: Some(capacity), ..self }
    }

    /// Follows how the loop comes round.
    pub fn pulse(&self) -> watch::Receiver<Pulse> {
        self.pulse.subscribe()
    }

    /// Adopts what runs and keeps what is desired, until `shutdown`.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) -> Result<(), SupervisorError> {
        self.adopt().await?;
        let mut shutdown = std::pin::pin!(shutdown);
        let (mut followed, mut heard) = (true, true);
        loop {
            let began = tokio::time::Instant::now();
            self.pass().await;
            self.publish();
            self.pulse.send_modify(|pulse| {
                let passes = pulse.passes + 1;
                *pulse = Pulse { passed_ms: now_ms(), pass: began.elapsed(), passes };
            });
            let pause = Duration::from_millis(self.wake_ms().saturating_sub(now_ms()));
            tokio::select! {
                () = &mut shutdown => {
                    self.close().await;
                    return Ok(());
                }
                // Who follows the control plane may end before us: what is known stays in force.
                changed = self.desired.changed(), if followed => followed = changed.is_ok(),
                changed = self.cut_off.changed(), if heard => heard = changed.is_ok(),
                Some(note) = self.inbox.recv() => self.take_notes(note),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Ends every task, so that whoever opens the folder next finds it free. Machines run on.
    async fn close(mut self) {
        for slot in self.slots.values_mut() {
            if let Some(task) = slot.task.take() {
                task.abort();
                task.await.ok();
            }
        }
        if let Some(collection) = self.collection.take() {
            collection.await.ok();
        }
    }

    fn wake_ms(&self) -> u64 {
        let periodic = now_ms() + PERIOD_MS;
        let next = match self.view() {
            Some(view) => next_wake_ms(&view.items, &self.observed).unwrap_or(periodic),
            None => periodic,
        };
        let retry = if self.dirty.is_empty() { periodic } else { now_ms() + RETRY_MS };
        next.min(periodic).min(retry).max(self.not_before_ms.min(periodic))
    }

    fn view(&self) -> Published<NodeInstance> {
        self.desired.borrow().clone()
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Watches a machine that runs.
    fn attach(&mut self, id: InstanceId, running: H::Running, spec: Option<&NodeInstance>) {
        let ring = match self.logs.ring(id) {
            Ok(ring) => ring,
            Err(error) => return self.give_up(id, &error),
        };
        let life = self.number();
        let notes = self.notes.clone();
        let tell = Arc::new(move |event| {
            let notes = notes.clone();
            async move {
                // An agent that ends hears nothing any more.
                notes.send(Note::Machine { id, life, event }).await.ok();
            }
            .boxed()
        });
        let phase = self.observed.get(&id).map(|seen| seen.phase);
        let ready = phase == Some(Phase::Ready);
        let runs = !matches!(phase, Some(Phase::Booting) | None);
        let machine = self.host.watch(running, Watch { id, spec, runs, ready, ring, tell });
        let slot = self.slots.entry(id).or_default();
        slot.life = life;
        slot.known = spec.is_some();
        slot.machine = Some(Arc::new(machine));
    }

    /// Without its log an instance's output would be lost: it is started again when the disk is well.
    fn give_up(&mut self, id: InstanceId, error: &LogError) {
        let detail = chain(error);
        tracing::error!(instance = %id, %detail, "a microVM cannot be watched");
        self.step(id, Event::Ended { cause: Cause::VmmStart, detail });
    }

    /// Plans, stores, begins.
    async fn pass(&mut self) {
        let now_ms = now_ms();
        if is_ahead(self.not_before_ms, now_ms, RETRY_MS) {
            return;
        }
        if *self.cut_off.borrow_and_update() || self.is_cut_off {
            return self.keep_apart(now_ms).await;
        }
        let view = self.desired.borrow_and_update().clone();
        self.sweep(view.as_deref()).await;
        self.recognise(view.as_deref());
        self.refuse(view.as_deref());
        let actions = match &view {
            Some(view) => plan(&view.items, &self.observed, now_ms),
            // I5: unknown is not empty.
            None => Vec::new(),
        };
        let mut before = Vec::with_capacity(actions.len());
        for action in &actions {
            let id = action.id();
            before.push((id, self.observed.get(&id).cloned()));
            match action {
                Action::Forget { .. } => {
                    self.observed.remove(&id);
                }
                _ => self.observed.entry(id).or_default().begin(action, now_ms),
            }
            self.dirty.insert(id);
        }
        if let Err(error) = self.store().await {
            tracing::error!(error = %chain(&error), "nothing is begun until the node's state can be stored");
            for (id, was) in before {
                match was {
                    Some(was) => self.observed.insert(id, was),
                    None => self.observed.remove(&id),
                };
            }
            self.not_before_ms = now_ms + RETRY_MS;
            return;
        }
        if let Some(view) = &view {
            // Before anything is begun for one that has come.
            self.logs.keep(&self.here(view));
        }
        self.collect(view.as_deref(), now_ms);
        for action in actions {
            self.carry_out(&action, view.as_deref());
        }
    }

    /// Refuses new instances for which there is no room.
    fn refuse(&mut self, view: Option<&View<NodeInstance>>) {
        let (Some(view), Some(capacity)) = (view, self.capacity) else { return };
        if view.items.keys().all(|id| self.observed.contains_key(id)) {
            return;
        }
        let room = Room { capacity, disk_free_mib: self.host.disk_free_mib() };
        for (id, shortage) in admission::refused(&view.items, &self.observed, room) {
            tracing::warn!(instance = %id, %shortage, "refused");
            self.observed.entry(id).or_default().refuse(format!("There is no room for it: {shortage}."));
            self.dirty.insert(id);
        }
    }

    /// A node that was cut off: its instances' network is down and stays down, what is under way is given up, and nothing
    /// is begun. It is durable first: no later agent of this folder may begin anything either.
    async fn keep_apart(&mut self, now_ms: u64) {
        if !self.is_cut_off {
            let state = Arc::clone(&self.state);
            match self.host.on_disk(move || state.cut_off(now_ms)).await {
                Ok(Ok(())) => self.is_cut_off = true,
                Ok(Err(error)) => {
                    tracing::error!(error = %chain(&error), "that this node is cut off was not stored")
                }
                Err(error) => tracing::error!(%error, "that this node is cut off was not stored"),
            }
            tracing::warn!("this node was quarantined: its instances are cut off and kept as they are");
            for slot in self.slots.values_mut() {
                if let Some(task) = slot.task.take() {
                    task.abort();
                    task.await.ok();
                }
            }
        }
        if let Err(error) = self.host.isolate().await {
            tracing::error!(error = %chain(&error), "an instance of this quarantined node may still be reached");
            self.not_before_ms = now_ms + RETRY_MS;
        }
        if let Err(error) = self.store().await {
            tracing::error!(error = %chain(&error), "what happened on this quarantined node was not stored");
        }
    }

    async fn store(&mut self) -> Result<(), SupervisorError> {
        if self.dirty.is_empty() {
            return Ok(());
        }
        let changes: Vec<_> = self.dirty.iter().map(|id| (*id, self.observed.get(id).cloned())).collect();
        let state = Arc::clone(&self.state);
        let stored = self.host.on_disk(move || state.store(&changes)).await;
        stored.map_err(|_| SupervisorError::Thread)??;
        self.host.stored();
        self.dirty.clear();
        Ok(())
    }

    /// The instances that are here: that are desired, or that something is left of.
    fn here(&self, view: &View<NodeInstance>) -> BTreeSet<InstanceId> {
        view.items.keys().chain(self.observed.keys()).copied().collect()
    }

    /// Once, when the desired set is known: removes what belongs to no instance that is known.
    async fn sweep(&mut self, view: Option<&View<NodeInstance>>) {
        let (Some(view), false) = (view, self.swept) else { return };
        let swept = self.host.sweep(&self.here(view)).await;
        self.collect_at_ms = 0;
        match swept {
            Ok(()) => self.swept = true,
            // Tried again with the next pass.
            Err(error) => tracing::warn!(error = %chain(&error), "leftovers could not be removed"),
        }
    }

    /// Removes images beyond the cache's bound: when something may have become free, after one was made, and now and
    /// then. In its own time: a large image takes long to remove.
    fn collect(&mut self, view: Option<&View<NodeInstance>>, now_ms: u64) {
        let idle = self.collection.as_ref().is_none_or(JoinHandle::is_finished);
        let Some(view) = view.filter(|_| idle) else { return };
        if is_ahead(self.collect_at_ms, now_ms, COLLECTION_PERIOD_MS) {
            return;
        }
        self.collect_at_ms = now_ms.saturating_add(COLLECTION_PERIOD_MS);
        let (host, collector) = (Arc::clone(&self.host), Arc::clone(&self.host));
        let specs = Arc::clone(&view.items);
        self.collection = Some(tokio::spawn(async move {
            host.on_disk(move || collector.collect_images(&specs)).await.ok();
        }));
    }

    fn carry_out(&mut self, action: &Action, view: Option<&View<NodeInstance>>) {
        let id = action.id();
        let spec = view.and_then(|view| view.items.get(&id)).cloned();
        tracing::info!(instance = %id, ?action, "acting");
        let host = Arc::clone(&self.host);
        match (action, spec) {
            (Action::Prepare { .. }, Some(spec)) => {
                self.spawn(id, |ticket| async move {
                    Note::Done { id, ticket, event: host.prepare(&spec).await }
                });
            }
            (Action::Start { .. }, Some(spec)) => {
                self.spawn(id, |ticket| async move {
                    match host.start(&spec).await {
                        Ok(started) => Note::Started { id, ticket, started: Box::new(started) },
                        Err(event) => Note::Done { id, ticket, event },
                    }
                });
            }
            (Action::BackOff { .. }, _) => {
                let machine = self.slots.get_mut(&id).and_then(|slot| slot.machine.take());
                self.spawn(id, |ticket| async move {
                    drop(machine);
                    Note::Done { id, ticket, event: outcome(host.back_off(id).await, Event::Killed) }
                });
            }
            (Action::Terminate { .. }, _) => {
                let slot = self.slots.entry(id).or_default();
                let (task, machine) = (slot.task.take(), slot.machine.clone());
                // What it was doing must not go on beside the removal.
                task.as_ref().inspect(|task| task.abort());
                self.spawn(id, |ticket| async move {
                    if let Some(task) = task {
                        task.await.ok();
                    }
                    Note::Done {
                        id,
                        ticket,
                        event: outcome(host.terminate(id, machine).await, Event::Removed),
                    }
                });
            }
            (Action::Forget { .. }, _) => {
                self.slots.remove(&id);
                self.swept = false;
            }
            (Action::Drain { .. } | Action::Resume { .. }, _) => {}
            // Only what is desired is prepared and started.
            (Action::Prepare { .. } | Action::Start { .. }, None) => {}
        }
    }

    fn spawn<F>(&mut self, id: InstanceId, work: impl FnOnce(u64) -> F)
    where
        F: Future<Output = Note<H::Running>> + Send + 'static,
    {
        let ticket = self.number();
        let (notes, work) = (self.notes.clone(), work(ticket));
        let task = tokio::spawn(async move {
            let note = work.await;
            notes.send(note).await.ok();
        });
        let slot = self.slots.entry(id).or_default();
        slot.ticket = ticket;
        slot.task = Some(task);
    }

    fn take_notes(&mut self, first: Note<H::Running>) {
        self.take(first);
        for _ in 0..NOTES_AT_ONCE_MAX {
            let Ok(note) = self.inbox.try_recv() else { return };
            self.take(note);
        }
    }

    fn take(&mut self, note: Note<H::Running>) {
        match note {
            Note::Done { id, ticket, event } => {
                let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.ticket == ticket) else { return };
                slot.task = None;
                if matches!(event, Event::Killed | Event::Removed) {
                    slot.machine = None;
                }
                if matches!(event, Event::Prepared | Event::Ended { .. } | Event::Removed) {
                    // An image may have come, or become free.
                    self.collect_at_ms = 0;
                }
                self.step(id, event);
            }
            Note::Started { id, ticket, started } => {
                let Some(slot) = self.slots.get_mut(&id).filter(|slot| slot.ticket == ticket) else { return };
                slot.task = None;
                let spec = self.view().and_then(|view| view.items.get(&id).cloned());
                self.begin_life(id);
                self.step(id, Event::Started);
                self.attach(id, *started, spec.as_deref());
            }
            Note::Machine { id, life, event } => {
                if self.slots.get(&id).is_some_and(|slot| slot.life == life) {
                    self.step(id, event);
                }
            }
        }
    }

    /// The guest counts its lines anew.
    fn begin_life(&self, id: InstanceId) {
        let restarts = self.observed.get(&id).map_or(0, |observed| observed.restarts);
        let remark = if restarts == 0 { "started".to_owned() } else { format!("started again ({restarts})") };
        let begun = self.logs.ring(id).and_then(|ring| ring.begin_life(now_ms(), &remark));
        if let Err(error) = begun {
            tracing::warn!(instance = %id, error = %chain(&error), "a remark was not stored");
        }
    }

    fn step(&mut self, id: InstanceId, event: Event) {
        let Some(observed) = self.observed.get_mut(&id) else { return };
        let before = observed.clone();
        tracing::info!(instance = %id, ?event, "happened");
        if matches!(event, Event::Ended { cause: Cause::OutOfMemory, .. }) {
            self.slots.entry(id).or_default().oom_kills += 1;
        }
        observed.step(event, now_ms());
        if *observed != before {
            self.dirty.insert(id);
        }
    }

    fn publish(&self) {
        let view = |(id, observed): (&InstanceId, &Observed)| {
            let slot = self.slots.get(id);
            let machine = slot.and_then(|slot| slot.machine.as_ref());
            let machine = machine.and_then(|machine| self.host.process(machine));
            let oom_kills = slot.map_or(0, |slot| slot.oom_kills);
            (*id, InstanceView { observed: observed.clone(), machine, oom_kills })
        };
        let snapshot =
            Some(Snapshot { instances: self.observed.iter().map(view).collect(), cut_off: self.is_cut_off });
        self.published.send_if_modified(|published| {
            let changed = *published != snapshot;
            *published = snapshot;
            changed
        });
    }
}

fn outcome(result: Result<(), ExecutorError>, done: Event) -> Event {
    match result {
        Ok(()) => done,
        Err(error) => Event::ActionFailed { detail: chain(&error) },
    }
}
