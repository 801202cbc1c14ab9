//! The edge agent: serves what its routes say, and follows them as they change.
//!
//! The routes arrive as whole views of a replica, whose first one comes from the edge's own disk (I5); where later
//! ones come from, and whether they may be believed (I6, I7), is the replica's business. An update is put in
//! force whole or not at all (I8); a channel that falls silent, or whose sender is gone, changes nothing.

use crate::config::EdgeConfig;
use crate::edge::Edge;
use crate::in_force::{InForce, Put};
use crate::introspect::{self, Serving, StatusError};
use crate::listeners::Listeners;
use crate::probe;
use holdfast_client::{Client, DiskError, Follower, Link, NoCalls, Published, Replica, ReportSlot, reporter};
use holdfast_model::ClusterId;
use holdfast_model::agent::{EdgeRoute, Report, ReportDetail, Stamp};
use holdfast_model::limits::HEARTBEAT_MS;
use rand::RngExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The file in the edge's folder that holds its copy of its routes.
pub const REPLICA_FILE: &str = "routes.redb";
/// How long following and reporting may take to stop.
const TASKS_STOP_MAX: Duration = Duration::from_secs(5);
/// How soon a port that could not be opened is tried again at first.
const REOPEN_FIRST: Duration = Duration::from_millis(200);
/// How long apart such tries are at most; they go on as long as the route exists.
const REOPEN_MAX: Duration = Duration::from_secs(5);

/// What an edge is fed.
#[derive(Debug)]
pub struct Feed {
    /// The replica's views; the first is what the edge's own disk holds.
    pub routes: watch::Receiver<Published<EdgeRoute>>,
    /// Whether there is a stream from the control plane, for the status alone.
    pub link: watch::Receiver<Link>,
}

/// Why an edge does not run.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The edge's copy of its routes cannot be opened.
    #[error("The edge's copy of its routes cannot be opened.")]
    Replica(#[source] DiskError),
    /// The status socket cannot be served.
    #[error("The edge cannot offer its status.")]
    Status(#[source] StatusError),
    /// The task that serves ended by a panic.
    #[error("The edge's main task ended by a panic; report it with the log, and start the edge again.")]
    Panicked(#[source] tokio::task::JoinError),
}

/// An edge that serves, until it is dropped.
#[derive(Debug)]
pub struct RunningEdge {
    edge: Arc<Edge>,
    applied: watch::Receiver<Option<Stamp>>,
    stop: DropGuard,
    task: JoinHandle<()>,
}

/// Runs an edge of `cluster` until `shutdown` becomes true or its sender is gone, then lets connections finish for a
/// bounded time.
///
/// It serves what its own disk holds before it contacts anybody, and goes on without a `client`, or with one that
/// reaches nobody (I5).
///
/// # Errors
/// [`EdgeError`] when the edge cannot start. Once it runs, nothing that arrives over a socket ends it.
pub async fn run(
    config: EdgeConfig,
    cluster: ClusterId,
    client: Option<Client>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), EdgeError> {
    let replica = open_replica(&config.data_dir, cluster).await?;
    let routes = replica.subscribe();
    // A replica that nobody follows lives as long as this function.
    let mut alone = None;
    let mut tasks = JoinSet::new();
    let mut running = match client {
        None => {
            let link = watch::Sender::new(Link::Down { reason: "no control plane is configured".to_owned() });
            let feed = Feed { routes, link: link.subscribe() };
            alone = Some(replica);
            RunningEdge::start(&config, feed)?
        }
        Some(client) => {
            let (slot, reporter) = reporter(&client);
            let follower = Follower::new(client, replica, NoCalls);
            let running =
                RunningEdge::start(&config, Feed { routes: routes.clone(), link: follower.link() })?;
            tasks.spawn(report(
                slot,
                Arc::clone(running.edge()),
                routes,
                running.applied(),
                shutdown.clone(),
            ));
            tasks.spawn(reporter.run(shutdown.clone()));
            tasks.spawn(follower.run(shutdown.clone()));
            running
        }
    };
    let stopped = async move {
        // An error means that the sender is gone, which is a reason to stop as well.
        let _ = shutdown.wait_for(|stop| *stop).await;
    };
    let ended = tokio::select! {
        () = stopped => running.stop().await,
        ended = &mut running.task => ended.map_err(EdgeError::Panicked),
    };
    drop(alone);
    // They end by the same signal. Whoever starts an edge in this folder next must find the replica closed.
    let all = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(TASKS_STOP_MAX, all).await.is_err() {
        tracing::warn!("following did not stop in time; leaving it behind");
    }
    ended
}

async fn open_replica(data_dir: &Path, cluster: ClusterId) -> Result<Replica<EdgeRoute>, EdgeError> {
    let path = data_dir.join(REPLICA_FILE);
    let opened = tokio::task::spawn_blocking(move || Replica::open(&path, cluster)).await;
    let replica = opened.map_err(EdgeError::Panicked)?.map_err(EdgeError::Replica)?;
    if let Some(aside) = replica.quarantined() {
        tracing::error!(moved_to = %aside.display(), "the edge's copy of its routes was damaged; it waits for another");
    }
    Ok(replica)
}

/// Puts into `slot` which revision is served: at once when it changes, and with every heartbeat.
async fn report(
    slot: ReportSlot,
    edge: Arc<Edge>,
    routes: watch::Receiver<Published<EdgeRoute>>,
    mut applied: watch::Receiver<Option<Stamp>>,
    mut shutdown: watch::Receiver<bool>,
) {
    loop {
        let stamp = *applied.borrow_and_update();
        slot.put(Report {
            // Zero is the empty history: nothing is known yet.
            applied: stamp.map(|s| s.revision).unwrap_or_default(),
            incarnation: stamp.map(|s| s.incarnation).unwrap_or_default(),
            held: routes.borrow().as_ref().and_then(|view| view.held),
            detail: ReportDetail::Edge {
                routes: edge.table().routes() as u64,
                connections: edge.connections() as u64,
            },
        });
        tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => return,
            changed = applied.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(Duration::from_millis(HEARTBEAT_MS)) => {}
        }
    }
}

impl RunningEdge {
    /// Starts an edge in the background.
    ///
    /// # Errors
    /// [`EdgeError::Status`] when the status socket cannot be made.
    pub fn start(config: &EdgeConfig, feed: Feed) -> Result<Self, EdgeError> {
        let edge = Edge::new(config);
        let (serving_changed, serving) = watch::channel(Serving::new());
        let (applied_changed, applied) = watch::channel(None);
        let socket = introspect::bind(&config.data_dir).map_err(EdgeError::Status)?;
        let stop = CancellationToken::new();
        tokio::spawn(introspect::answer(socket, Arc::clone(&edge), serving, stop.clone()));
        tokio::spawn(probe::run(Arc::clone(&edge), stop.clone()));
        let agent = Agent {
            listeners: Listeners::new(Arc::clone(&edge)),
            routes: feed.routes,
            link: feed.link,
            in_force: InForce::new(Arc::clone(&edge)),
            serving: serving_changed,
            applied: applied_changed,
            reopen_after: REOPEN_FIRST,
        };
        let task = tokio::spawn(agent.run(stop.clone(), config.limits.shutdown));
        Ok(Self { edge, applied, stop: stop.drop_guard(), task })
    }

    /// The edge's state.
    pub fn edge(&self) -> &Arc<Edge> {
        &self.edge
    }

    /// The revision that the edge serves: its table is in force and its ports were opened.
    pub fn applied(&self) -> watch::Receiver<Option<Stamp>> {
        self.applied.clone()
    }

    /// Closes the ports, lets connections finish for a bounded time, and ends.
    ///
    /// # Errors
    /// [`EdgeError::Panicked`] when the edge had ended by itself.
    pub async fn stop(self) -> Result<(), EdgeError> {
        drop(self.stop);
        self.task.await.map_err(EdgeError::Panicked)
    }
}

/// The main task's state.
struct Agent {
    listeners: Listeners,
    routes: watch::Receiver<Published<EdgeRoute>>,
    link: watch::Receiver<Link>,
    in_force: InForce,
    serving: watch::Sender<Serving>,
    applied: watch::Sender<Option<Stamp>>,
    reopen_after: Duration,
}

impl Agent {
    async fn run(mut self, stop: CancellationToken, grace: Duration) {
        self.routes.mark_changed();
        self.link.mark_changed();
        let (mut fed, mut linked) = (true, true);
        let mut all_open = true;
        loop {
            let reopen_after = self.reopen_after.mul_f64(rand::rng().random_range(0.8..1.2));
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.routes.changed(), if fed => match changed {
                    Ok(()) => {
                        self.apply();
                        self.reopen_after = REOPEN_FIRST;
                    }
                    Err(_) => {
                        // Nobody will send routes again; that is no reason to drop any (I5).
                        tracing::error!("the feed of routes ended; serving the last ones");
                        fed = false;
                        continue;
                    }
                },
                changed = self.link.changed(), if linked => {
                    linked = changed.is_ok();
                    let link = self.link.borrow_and_update().clone();
                    self.serving.send_modify(|serving| serving.set_link(&link));
                    continue;
                }
                () = tokio::time::sleep(reopen_after), if !all_open => {
                    self.reopen_after = (self.reopen_after * 2).min(REOPEN_MAX);
                }
            }
            all_open = self.listeners.reconcile().await;
            let (listening, problems) = self.listeners.state();
            self.serving.send_modify(|serving| serving.set_listeners(listening, problems));
            self.applied.send_replace(self.serving.borrow().stamp);
        }
        self.listeners.stop(grace).await;
    }

    fn apply(&mut self) {
        let published = self.routes.borrow_and_update().clone();
        let Some((view, put)) = self.in_force.put(published) else { return };
        let refused = match put {
            Put::Switched | Put::Same => None,
            Put::Refused(error) => Some(error.to_string()),
        };
        self.serving.send_modify(|serving| {
            serving.held = view.held;
            if refused.is_none() {
                serving.stamp = Some(view.stamp);
            }
            serving.refused = refused;
        });
    }
}
