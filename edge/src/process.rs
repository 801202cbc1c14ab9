//! An edge as a process: takes over from one that runs, serves and follows, and gives its ports to the next.
//!
//! It serves what its own disk holds before it contacts anybody (I5). Meanwhile it serves on; if the successor
//! does not come to serve, it follows again.

use crate::agent::{EdgeError, Feed, REPLICA_FILE, RunningEdge};
use crate::config::EdgeConfig;
use crate::edge::Edge;
use crate::take_over::{self, Door, Inherited, Successor, TakeOverError};
use holdfast_client::{Client, Follower, Link, NoCalls, Published, Replica, ReportSlot, reporter};
use holdfast_model::ClusterId;
use holdfast_model::agent::{EdgeRoute, Report, ReportDetail, Stamp};
use holdfast_model::limits::HEARTBEAT_MS;
use rand::RngExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How long following and reporting may take to stop.
const TASKS_STOP_MAX: Duration = Duration::from_secs(5);
/// How soon an edge whose successor failed tries to open its copy of the routes again, with jitter of as much again;
/// it goes on trying as long as it serves.
const RESUME_EVERY: Duration = Duration::from_millis(500);

/// Where an edge's process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It does not serve yet.
    Starting,
    /// It serves, if there is anything that it knows.
    Serving {
        /// Whether another process served before, which may still be about to leave.
        took_over: bool,
    },
    /// Another process serves in its folder; what else this one does there must end. Its connections go on.
    Left,
}

/// Runs an edge of `cluster` until `shutdown` becomes true or its sender is gone, then lets connections finish for a
/// bounded time; or until a successor took over and the last connection has ended. `standing` tells how far it is.
///
/// It goes on without a `client`, or with one that reaches nobody (I5).
///
/// # Errors
/// [`EdgeError`] when the edge cannot start. Once it runs, nothing that arrives over a socket ends it.
pub async fn run(
    config: EdgeConfig,
    cluster: ClusterId,
    client: Option<Client>,
    mut shutdown: watch::Receiver<bool>,
    standing: watch::Sender<Standing>,
) -> Result<(), EdgeError> {
    let taken = take_over::take(&config.data_dir).await.map_err(EdgeError::TakeOver)?;
    let (inherited, taken) =
        taken.map_or((Inherited::new(), None), |(sockets, taken)| (sockets, Some(taken)));
    let replica = open_replica(&config.data_dir, cluster).await?;
    let (mut following, feed) = Following::begin(replica, client.as_ref());
    let knows = feed.routes.borrow().is_some();
    let mut running = RunningEdge::start(&config, feed, inherited)?;
    following.report(&running);
    let stopped = async move {
        // An error means that the sender is gone, which is a reason to stop as well.
        let _ = shutdown.wait_for(|stop| *stop).await;
    };
    tokio::pin!(stopped);
    let took_over = taken.is_some();
    if let Some(taken) = taken {
        if let Err(error) = taken.serves(running.applied(), config.limits.take_over).await {
            following.end().await;
            running.stop().await?;
            return Err(EdgeError::TakeOver(error));
        }
        tracing::info!("took over from the edge that ran here");
    }
    let door = Door::open(&config.data_dir).map_err(EdgeError::TakeOver)?;
    if knows {
        // So that a successor is given what there will be. Routes that contradict each other never come into force.
        let mut applied = running.applied();
        let open = tokio::time::timeout(config.limits.take_over, applied.wait_for(Option::is_some));
        tokio::select! {
            () = &mut stopped => {}
            _ = open => {}
        }
    }
    standing.send_replace(Standing::Serving { took_over });
    let ended = loop {
        let knocked = tokio::select! {
            () = &mut stopped => break running.stop().await,
            ended = &mut running.task => break ended.map_err(EdgeError::Panicked),
            knocked = door.knocked() => knocked,
        };
        let serving = *running.applied().borrow();
        // Its file is locked: the successor opens it next.
        following.end().await;
        match give(knocked, serving, &running, config.limits.take_over).await {
            Ok(()) => {
                tracing::info!("another process has taken over; ending with the last connection");
                standing.send_replace(Standing::Left);
                running.leave().await;
                drop(door);
                return tokio::select! {
                    () = &mut stopped => running.stop().await,
                    ended = &mut running.task => ended.map_err(EdgeError::Panicked),
                };
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no other process took over; serving on"
            ),
        }
        let replica = tokio::select! {
            () = &mut stopped => return running.stop().await,
            replica = reopen_replica(&config.data_dir, cluster) => replica,
        };
        let (resumed, feed) = Following::begin(replica, client.as_ref());
        following = resumed;
        if let Err(error) = running.go_on(feed).await {
            tracing::error!(error = &error as &dyn std::error::Error, "serving without a status");
        }
        following.report(&running);
    };
    following.end().await;
    ended
}

async fn give(
    knocked: Result<Successor, TakeOverError>,
    serving: Option<Stamp>,
    running: &RunningEdge,
    within: Duration,
) -> Result<(), TakeOverError> {
    knocked?.give(serving, running.share().await?, within).await
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

/// The successor that failed may not have closed the file yet.
async fn reopen_replica(data_dir: &Path, cluster: ClusterId) -> Replica<EdgeRoute> {
    loop {
        match open_replica(data_dir, cluster).await {
            Ok(replica) => return replica,
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "serving without following; trying again"
                );
                let pause = RESUME_EVERY.mul_f64(rand::rng().random_range(1.0..2.0));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// What follows the control plane and reports to it, from the edge's copy of its routes.
struct Following {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    routes: watch::Receiver<Published<EdgeRoute>>,
    /// What is reported; nothing without a control plane.
    slot: Option<ReportSlot>,
    /// A replica that nobody follows lives as long as this.
    alone: Option<Replica<EdgeRoute>>,
}

impl Following {
    fn begin(replica: Replica<EdgeRoute>, client: Option<&Client>) -> (Self, Feed) {
        let routes = replica.subscribe();
        let (stop, stopped) = watch::channel(false);
        let mut following =
            Self { tasks: JoinSet::new(), stop, routes: routes.clone(), slot: None, alone: None };
        let link = match client {
            None => {
                following.alone = Some(replica);
                watch::Sender::new(Link::Down { reason: "no control plane is configured".to_owned() })
                    .subscribe()
            }
            Some(client) => {
                let (slot, reporter) = reporter(client);
                let follower = Follower::new(client.clone(), replica, NoCalls);
                let link = follower.link();
                following.slot = Some(slot);
                following.tasks.spawn(reporter.run(stopped.clone()));
                following.tasks.spawn(follower.run(stopped));
                link
            }
        };
        (following, Feed { routes, link })
    }

    /// Begins to report what the edge serves.
    fn report(&mut self, running: &RunningEdge) {
        if let Some(slot) = self.slot.take() {
            let (edge, applied) = (Arc::clone(running.edge()), running.applied());
            self.tasks.spawn(report(slot, edge, self.routes.clone(), applied, self.stop.subscribe()));
        }
    }

    /// Ends it all. Whoever starts an edge in this folder next must find the replica closed.
    async fn end(&mut self) {
        self.stop.send_replace(true);
        self.alone = None;
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(TASKS_STOP_MAX, all).await.is_err() {
            tracing::warn!("following did not stop in time; leaving it behind");
        }
    }
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
