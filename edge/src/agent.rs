//! The edge agent's heart: serves what its routes say, as they change.
//!
//! The routes arrive as whole views of a replica, whose first one comes from the edge's own disk (I5); where later
//! ones come from, and whether they may be believed (I6, I7), is the replica's business. An update is put in
//! force whole or not at all (I8); a channel that falls silent, or whose sender is gone, changes nothing.

use crate::config::{EdgeConfig, Limits};
use crate::edge::Edge;
use crate::in_force::{InForce, Put};
use crate::introspect::{self, Serving, StatusError};
use crate::listeners::Listeners;
use crate::probe;
use crate::take_over::{Inherited, TakeOverError};
use holdfast_client::{DiskError, Link, Published};
use holdfast_model::agent::{EdgeRoute, Stamp};
use rand::RngExt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The file in the edge's folder that holds its copy of its routes.
pub const REPLICA_FILE: &str = "routes.redb";
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
    /// Another edge runs in the folder and this one did not take over from it.
    #[error("Another edge runs in this folder, and this one does not take over from it.")]
    TakeOver(#[source] TakeOverError),
    /// The task that serves ended by a panic.
    #[error("The edge's main task ended by a panic; report it with the log, and start the edge again.")]
    Panicked(#[source] tokio::task::JoinError),
}

/// An edge that serves, until it is dropped.
#[derive(Debug)]
pub struct RunningEdge {
    edge: Arc<Edge>,
    applied: watch::Receiver<Option<Stamp>>,
    serving: watch::Receiver<Serving>,
    asks: mpsc::Sender<Ask>,
    status: DropGuard,
    stop: DropGuard,
    pub(crate) task: JoinHandle<()>,
    data_dir: PathBuf,
}

/// What the main task is asked from beside its feed.
#[derive(Debug)]
enum Ask {
    /// Follow this from now on.
    Feed(Feed),
    /// Share the open ports.
    Share(oneshot::Sender<std::io::Result<Vec<(SocketAddr, OwnedFd)>>>),
    /// Close the ports and end with the last connection.
    Leave,
}

impl RunningEdge {
    /// Starts an edge in the background, on ports that may be `inherited` from one before it.
    ///
    /// # Errors
    /// [`EdgeError::Status`] when the status socket cannot be made.
    pub fn start(config: &EdgeConfig, feed: Feed, inherited: Inherited) -> Result<Self, EdgeError> {
        let edge = Edge::new(config);
        let (serving_changed, serving) = watch::channel(Serving::new());
        let (applied_changed, applied) = watch::channel(None);
        let (asks, asked) = mpsc::channel(1);
        let status = answer_status(&config.data_dir, &edge, &serving)?;
        let stop = CancellationToken::new();
        tokio::spawn(probe::run(Arc::clone(&edge), stop.clone()));
        let agent = Agent {
            listeners: Listeners::new(Arc::clone(&edge), inherited),
            routes: feed.routes,
            link: feed.link,
            in_force: InForce::new(Arc::clone(&edge)),
            serving: serving_changed,
            applied: applied_changed,
            reopen_after: REOPEN_FIRST,
            asked,
        };
        let task = tokio::spawn(agent.run(stop.clone(), config.limits.clone()));
        let stop = stop.drop_guard();
        Ok(Self { edge, applied, serving, asks, status, stop, task, data_dir: config.data_dir.clone() })
    }

    /// Follows another feed from now on, and answers for its status anew: an edge that was to take over may have taken
    /// the socket's place.
    ///
    /// # Errors
    /// [`EdgeError::Status`] when the status socket cannot be made; the feed is followed all the same.
    pub(crate) async fn go_on(&mut self, feed: Feed) -> Result<(), EdgeError> {
        self.ask(Ask::Feed(feed)).await;
        self.status = answer_status(&self.data_dir, &self.edge, &self.serving)?;
        Ok(())
    }

    /// The open ports, for another process.
    pub(crate) async fn share(&self) -> std::io::Result<Vec<(SocketAddr, OwnedFd)>> {
        let (answer, answered) = oneshot::channel();
        self.ask(Ask::Share(answer)).await;
        // Without an answer the main task is gone, and whoever runs the edge learns that from the task.
        answered.await.unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into()))
    }

    /// Closes the ports; the edge ends with its last connection.
    pub(crate) async fn leave(&self) {
        self.ask(Ask::Leave).await;
    }

    async fn ask(&self, ask: Ask) {
        if self.asks.send(ask).await.is_err() {
            tracing::debug!("the edge's main task has ended");
        }
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
        drop((self.stop, self.status));
        self.task.await.map_err(EdgeError::Panicked)
    }
}

/// Why the main task serves no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// It was told to stop.
    Stopped,
    /// Another process has its ports.
    Left,
}

/// Answers for the status until the guard is dropped.
fn answer_status(
    data_dir: &std::path::Path,
    edge: &Arc<Edge>,
    serving: &watch::Receiver<Serving>,
) -> Result<DropGuard, EdgeError> {
    let socket = introspect::bind(data_dir).map_err(EdgeError::Status)?;
    let until = CancellationToken::new();
    tokio::spawn(introspect::answer(socket, Arc::clone(edge), serving.clone(), until.clone()));
    Ok(until.drop_guard())
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
    asked: mpsc::Receiver<Ask>,
}

impl Agent {
    async fn run(mut self, stop: CancellationToken, limits: Limits) {
        if self.serve(&stop).await == Ended::Stopped {
            return self.listeners.stop(limits.shutdown, std::future::pending()).await;
        }
        let cut_short = async {
            stop.cancelled().await;
            tokio::time::sleep(limits.shutdown).await;
        };
        self.listeners.stop(limits.after_take_over, cut_short).await;
    }

    async fn serve(&mut self, stop: &CancellationToken) -> Ended {
        self.routes.mark_changed();
        self.link.mark_changed();
        let (mut fed, mut linked) = (true, true);
        let mut all_open = true;
        loop {
            let reopen_after = self.reopen_after.mul_f64(rand::rng().random_range(0.8..1.2));
            tokio::select! {
                () = stop.cancelled() => return Ended::Stopped,
                ask = self.asked.recv() => match ask {
                    Some(Ask::Feed(feed)) => {
                        (self.routes, self.link) = (feed.routes, feed.link);
                        self.routes.mark_changed();
                        self.link.mark_changed();
                        (fed, linked) = (true, true);
                        continue;
                    }
                    Some(Ask::Share(answer)) => {
                        // Whoever asked may have given up.
                        let _ = answer.send(self.listeners.share());
                        continue;
                    }
                    Some(Ask::Leave) => return Ended::Left,
                    None => return Ended::Stopped,
                },
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
            let stamp = self.serving.borrow().stamp;
            if stamp.is_some() {
                self.listeners.drop_inherited();
            }
            self.applied.send_replace(stamp);
        }
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
