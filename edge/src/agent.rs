//! The edge agent: serves what its routes say, and follows them as they change.
//!
//! The routes arrive as whole views of a replica, whose first one comes from the edge's own disk (I5); where later
//! ones come from, and whether they may be believed (I6, I7), is the replica's business. An update is put in
//! force whole or not at all (I8); a channel that falls silent, or whose sender is gone, changes nothing.

use crate::config::EdgeConfig;
use crate::edge::Edge;
use crate::introspect::{self, ControlPlane, Serving, StatusError};
use crate::listeners::Listeners;
use crate::probe;
use holdfast_client::replica::{Items, Published};
use holdfast_model::agent::{EdgeRoute, Stamp};
use rand::RngExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How soon a port that could not be opened is tried again at first.
const REOPEN_FIRST: Duration = Duration::from_millis(200);
/// How long apart such tries are at most; they go on as long as the route exists.
const REOPEN_MAX: Duration = Duration::from_secs(5);

/// What an edge is fed.
#[derive(Debug)]
pub struct Feed {
    /// The replica's views; the first is what the edge's own disk holds.
    pub routes: watch::Receiver<Published<EdgeRoute>>,
    /// How the edge stands with its control plane, for the status alone.
    pub control_plane: watch::Receiver<ControlPlane>,
}

/// Why an edge does not run.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
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

/// Serves `feed` until `shutdown`, then lets connections finish for a bounded time.
///
/// # Errors
/// [`EdgeError`] when the edge cannot start. Once it runs, nothing that arrives over a socket ends it.
pub async fn serve(config: EdgeConfig, feed: Feed, shutdown: CancellationToken) -> Result<(), EdgeError> {
    let mut running = RunningEdge::start(&config, feed)?;
    tokio::select! {
        () = shutdown.cancelled() => running.stop().await,
        ended = &mut running.task => ended.map_err(EdgeError::Panicked),
    }
}

impl RunningEdge {
    /// Starts an edge in the background.
    ///
    /// # Errors
    /// [`EdgeError::Status`] when the status socket cannot be made.
    pub fn start(config: &EdgeConfig, feed: Feed) -> Result<Self, EdgeError> {
        let edge = Edge::new(config);
        let (serving_changed, serving) = watch::channel(Serving::new(SystemTime::now()));
        let (applied_changed, applied) = watch::channel(None);
        let socket = introspect::bind(&config.data_dir).map_err(EdgeError::Status)?;
        let stop = CancellationToken::new();
        tokio::spawn(introspect::answer(
            socket,
            Arc::clone(&edge),
            serving,
            feed.control_plane,
            stop.clone(),
        ));
        tokio::spawn(probe::run(Arc::clone(&edge), stop.clone()));
        let agent = Agent {
            listeners: Listeners::new(Arc::clone(&edge)),
            edge: Arc::clone(&edge),
            routes: feed.routes,
            in_force: None,
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
    edge: Arc<Edge>,
    listeners: Listeners,
    routes: watch::Receiver<Published<EdgeRoute>>,
    /// The items of the table in force.
    in_force: Option<Items<EdgeRoute>>,
    serving: watch::Sender<Serving>,
    applied: watch::Sender<Option<Stamp>>,
    reopen_after: Duration,
}

impl Agent {
    async fn run(mut self, stop: CancellationToken, grace: Duration) {
        self.routes.mark_changed();
        let mut fed = true;
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
        // Nothing is known: that is no reason to change anything (I5).
        let Some(view) = self.routes.borrow_and_update().clone() else { return };
        let unchanged = self.in_force.as_ref().is_some_and(|items| Arc::ptr_eq(items, &view.items));
        let applied = if unchanged { Ok(()) } else { self.edge.apply(view.items.values().map(Arc::as_ref)) };
        let refused = match applied {
            Ok(()) if unchanged => None,
            Ok(()) => {
                tracing::info!(revision = %view.stamp.revision, routes = view.items.len(), "routes in force");
                self.in_force = Some(Arc::clone(&view.items));
                None
            }
            Err(error) => {
                tracing::error!(revision = %view.stamp.revision, %error, "keeping the last good routes");
                Some(error.to_string())
            }
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
