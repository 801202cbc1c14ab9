//! How a member comes up: whose folder is this, open log and state, connect them with openraft, listen.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use holdfast_model::{MemberId, Revision};
use holdfast_store::{Store, StoreError};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::storage::RaftStateMachine;
use openraft::{Raft, RaftSnapshotBuilder};
use rand::RngExt;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster_version;
use crate::config::ConsensusConfig;
use crate::consensus::{Consensus, Inner, PROPOSALS_IN_FLIGHT_MAX, Parts};
use crate::disk_work;
use crate::divergence;
use crate::error::{ConsensusError, StartError};
use crate::filling::Filling;
use crate::healing;
use crate::health::{self, Fault, Health};
use crate::known_peers::{self, KnownPeers};
use crate::log_store::LogStore;
use crate::log_time;
use crate::lost_memory;
use crate::member_identity::{self, MemberIdentity};
use crate::network::{Channels, NetworkFactory};
use crate::proposals::{IntoLog, ToLeader};
use crate::reads::ReadRounds;
use crate::removal;
use crate::scrub;
use crate::service::MemberService;
use crate::snapshot_file::SnapshotFolder;
use crate::state_machine::{Progress, StateMachine, read_meta};
use crate::transport::channel::LocalPeer;
use crate::transport::link::{Link, TlsLink};
use crate::transport::server;
use crate::types::Membership;
use crate::verdict;

pub(crate) const LOG_FILE: &str = "log.redb";
const SNAPSHOT_FOLDER: &str = "snapshots";
/// Findings of differing states that may wait to be looked into; one is enough to stop a member.
const FINDINGS_MAX: usize = 16;
/// How long to wait for a file that another member of this host is closing.
const CLOSING_FILE_PATIENCE: Duration = Duration::from_secs(5);
/// About how long between two attempts of a filled member to catch up.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(250);
/// Between two looks at such a file.
const CLOSING_FILE_POLL: Duration = Duration::from_millis(20);

/// Makes a folder a member's. The marker is written last: without it the folder is not prepared, and what a crash left
/// of an earlier attempt is thrown away, because a member without a marker never ran.
pub(crate) fn prepare(data_dir: &Path, identity: &MemberIdentity) -> Result<(), StartError> {
    let folder = |source| StartError::Folder { path: data_dir.to_owned(), source };
    fs::create_dir_all(data_dir).map_err(folder)?;
    match member_identity::read(data_dir)? {
        Some(found) if found == *identity => return Ok(()),
        Some(found) => {
            return Err(StartError::OtherMember {
                path: data_dir.to_owned(),
                found: found.member,
                wanted: identity.member,
            });
        }
        None => {}
    }
    let log_path = data_dir.join(LOG_FILE);
    if log_path.exists() {
        let left = LogStore::open(&log_path)?;
        if left.identity() != Some(identity) || !left.is_unused() {
            return Err(StartError::MarkerMismatch { path: data_dir.to_owned() });
        }
        return Ok(member_identity::write(data_dir, identity)?);
    }
    LogStore::create(&log_path, identity)?;
    Ok(member_identity::write(data_dir, identity)?)
}

/// Checks that the folder is this member's, all of it.
fn open_log(config: &ConsensusConfig) -> Result<(LogStore, MemberIdentity), StartError> {
    let path = config.data_dir.clone();
    let Some(marker) = member_identity::read(&path)? else { return Err(StartError::NotPrepared { path }) };
    if marker.member != config.id {
        return Err(StartError::OtherMember { path, found: marker.member, wanted: config.id });
    }
    if marker.cluster != config.tls.cluster() {
        return Err(StartError::OtherCluster { path });
    }
    let log = once_closed(|| LogStore::open(&path.join(LOG_FILE)))?;
    if log.identity() != Some(&marker) {
        return Err(StartError::MarkerMismatch { path });
    }
    Ok((log, marker))
}

/// Opens a file, waiting a little when the member that had it before is just closing it.
pub(crate) fn once_closed<T, E: std::error::Error + 'static>(
    open: impl Fn() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + CLOSING_FILE_PATIENCE;
    loop {
        match open() {
            Err(error) if is_open_elsewhere(&error) && Instant::now() < until => {
                thread::sleep(CLOSING_FILE_POLL)
            }
            result => return result,
        }
    }
}

fn is_open_elsewhere(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|cause| {
        matches!(cause.downcast_ref(), Some(redb::DatabaseError::DatabaseAlreadyOpen))
            || matches!(cause.downcast_ref(), Some(redb::Error::DatabaseAlreadyOpen))
    })
}

/// A log that is damaged takes its member out of service for good.
fn judge_log(data_dir: &Path, error: StartError) -> StartError {
    match &error {
        StartError::Log(log) if log.is_damage() => {
            let fault = Fault::LogRotten(crate::network::chain(log));
            match health::write_down(data_dir, &fault, None) {
                Ok(()) => StartError::OutOfService { path: data_dir.to_owned(), fault },
                Err(_) => error,
            }
        }
        _ => error,
    }
}

/// Opens the state, or, when it is of no use any more, an empty one in its place that is to be filled. `open` is told
/// whether the state that it has is given up.
pub(crate) fn open_state(
    data_dir: &Path,
    log: &LogStore,
    mut open: impl FnMut(bool) -> Result<Store, StoreError>,
) -> Result<Store, StartError> {
    let given_up = healing::set_state_aside(data_dir)?;
    let useless = match open(given_up) {
        Ok(store) => match useless(&store, log, data_dir)? {
            None => return Ok(store),
            Some(reason) => reason,
        },
        Err(error) if healing::is_damage(&error) => crate::network::chain(&error),
        Err(error) => return Err(error.into()),
    };
    let fault = Fault::StateRotten(useless);
    tracing::error!(%fault, "the state is given up");
    let written = health::write_down(data_dir, &fault, None);
    written.map_err(|source| StartError::Folder { path: data_dir.to_owned(), source })?;
    verdict::check(data_dir)?;
    healing::set_state_aside(data_dir)?;
    Ok(open(true)?)
}

/// Why a state that could be opened is of no use, if it is of none.
fn useless(store: &Store, log: &LogStore, data_dir: &Path) -> Result<Option<String>, StartError> {
    let meta = match read_meta(store) {
        Ok(meta) => meta,
        Err(error) if healing::is_damage(&error) => return Ok(Some(crate::network::chain(&error))),
        Err(error) => return Err(error.into()),
    };
    let first = log.first_index()?;
    if meta.next_index() >= first || healing::pending(data_dir)?.is_some() {
        return Ok(None);
    }
    let newest = SnapshotFolder::open(&data_dir.join(SNAPSHOT_FOLDER))?.newest();
    let reached = newest.ok().flatten().map_or(0, |newest| newest.meta.next_index());
    Ok((reached < first)
        .then(|| format!("it ends before log index {} and the log begins at {first}", meta.next_index())))
}

/// Starts a member over TLS.
pub(crate) async fn start(config: ConsensusConfig) -> Result<Consensus, StartError> {
    let address = config.listen;
    let listen = |source| StartError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let bound = listener.local_addr().map_err(listen)?;
    let link = Arc::new(TlsLink::new(config.tls.clone(), listener));
    start_on(config, link, bound).await
}

/// Opens this member's files and starts it over a link.
async fn start_on(
    config: ConsensusConfig,
    link: Arc<dyn Link>,
    raft_addr: std::net::SocketAddr,
) -> Result<Consensus, StartError> {
    let disk = config.clone();
    let opened = disk_work::run(move || {
        verdict::check(&disk.data_dir)?;
        let (log, identity) = open_log(&disk).map_err(|error| judge_log(&disk.data_dir, error))?;
        let path = disk.data_dir.join(healing::STATE_FILE);
        let store = open_state(&disk.data_dir, &log, |_| once_closed(|| Store::open(&path)))?;
        Ok::<_, StartError>((log, identity, Arc::new(store)))
    });
    let (log, identity, store) = opened.await.map_err(StartError::Work)??;
    run(config, identity, Parts { link, raft_addr, log, store }).await
}

/// Starts a member on parts of the caller's.
pub(crate) async fn start_on_parts(config: ConsensusConfig, parts: Parts) -> Result<Consensus, StartError> {
    let Some(identity) = parts.log.identity().cloned() else {
        return Err(StartError::NotPrepared { path: config.data_dir });
    };
    if identity.member != config.id {
        let path = config.data_dir;
        return Err(StartError::OtherMember { path, found: identity.member, wanted: config.id });
    }
    run(config, identity, parts).await
}

/// Connects log and state with openraft, and listens.
async fn run(
    config: ConsensusConfig,
    identity: MemberIdentity,
    parts: Parts,
) -> Result<Consensus, StartError> {
    let Parts { link, raft_addr, log, store } = parts;
    let id = config.id.0;
    verdict::check(&config.data_dir)?;
    store.support_up_to(config.cluster_version_max)?;
    let openraft_config = Arc::new(config.openraft()?);
    let snapshots = config.data_dir.join(SNAPSHOT_FOLDER);
    let folder = disk_work::run(move || SnapshotFolder::open(&snapshots));
    let folder = folder.await.map_err(StartError::Work)??;

    let health = Arc::new(Health::kept_in(config.data_dir.clone()));
    let (mismatches, found) = mpsc::channel(FINDINGS_MAX);
    let (accused_sender, accused) = mpsc::channel(FINDINGS_MAX);
    let (revision_sender, revision) = watch::channel(Revision(0));
    let (applied_sender, applied_next) = watch::channel(0);
    let (former_sender, former_members) = watch::channel(BTreeSet::new());
    let progress = Progress {
        former_members: former_sender,
        applied_next: applied_sender,
        revision: revision_sender,
        mismatches,
    };
    let local = LocalPeer {
        cluster: identity.realm(),
        member: id,
        newer_incarnation: Arc::default(),
        supported: store.supported_versions(),
        heard_from: Default::default(),
    };
    let channels = Channels::new(link.clone(), local.clone());
    watch_for_rot(&health, &log, &store);
    let mut peers = known_peers::read(&config.data_dir);
    peers.remove(&id);
    let to_be_filled = healing::pending(&config.data_dir)?;
    let filled = to_be_filled.is_some();
    if let Some(pending) = to_be_filled {
        let (data_dir, log) = (config.data_dir.as_path(), log.clone());
        let (store, folder, channels, peers) = (&store, &folder, &channels, &peers);
        Filling { data_dir, pending, store, log, folder, channels, peers }.fill().await?;
    }
    let mut machine =
        StateMachine::open(store.clone(), log.clone(), folder.clone(), progress, health.clone())?;
    let checkpoints = machine.checkpoints();
    peers.extend(peers_in(machine.opened().membership.membership(), id));
    let (vote, last) = log.ends()?;
    let (logged, applied) = (last.map_or(0, |last| last.index() + 1), machine.opened().next_index());
    let next = logged.max(applied);
    if logged < applied {
        let made = reach_with_a_snapshot(&mut machine, applied).await;
        made.map_err(StartError::OwnSnapshot)?;
    }
    let service = MemberService::new(
        health.clone(),
        log.clone(),
        store.clone(),
        folder,
        former_members,
        accused_sender,
    );
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    // Before the question, which others that start now ask as well: that this one is starting is an answer too, and
    // nobody waits for it.
    tasks.spawn(server::serve(link, local, service.clone(), stop.clone()));
    let unless_started = stop.clone().drop_guard();
    if let Some(fault) = lost_memory::ask(&channels, &peers, vote, next).await {
        health.fail(fault.clone());
        return Err(StartError::OutOfService { path: config.data_dir, fault });
    }
    let network = NetworkFactory { channels: channels.clone() };
    let raft = Raft::build(id, openraft_config, network, log.clone(), machine)
        .await
        .map_err(|error| StartError::Core(error.into()))?;
    service.attach(raft.clone());

    let (leader_sender, leader) = watch::channel(None);
    let inner = Arc::new(Inner {
        id,
        identity,
        raft: raft.clone(),
        store,
        log,
        channels,
        service: service.clone(),
        health,
        revision,
        applied_next,
        leader,
        reads: Arc::new(ReadRounds::default()),
        proposals: Semaphore::new(PROPOSALS_IN_FLIGHT_MAX),
        entries: service.entries.clone(),
        forwards: Arc::default(),
        verifying: Semaphore::new(1),
        stop,
        tasks,
        raft_addr,
    });
    inner.tasks.spawn(follow_metrics(inner.clone(), leader_sender, config.data_dir.clone()));
    inner.tasks.spawn(scrub::run(inner.clone(), inner.log.checks().clone(), config.scrub_pass));
    inner.tasks.spawn(scrub::run(inner.clone(), inner.store.checks().clone(), config.scrub_pass));
    let into_log = IntoLog { raft: raft.clone(), store: inner.store.clone() };
    inner.tasks.spawn(inner.entries.clone().run(into_log, inner.leader.clone(), inner.stop.clone()));
    let to_leader = ToLeader { inner: inner.clone() };
    inner.tasks.spawn(inner.forwards.clone().run(to_leader, inner.leader.clone(), inner.stop.clone()));
    inner.tasks.spawn(checkpoints.run(inner.store.clone(), inner.health.clone(), inner.stop.clone()));
    inner.tasks.spawn(removal::notice(inner.clone()));
    inner.tasks.spawn(divergence::settle(inner.clone(), found, accused));
    inner.tasks.spawn(divergence::propose_checks(inner.clone(), config.digest_check_every));
    inner.tasks.spawn(cluster_version::keep_raising(inner.clone()));
    inner.tasks.spawn(log_time::keep_reporting(inner.clone(), config.log_time_every));
    raft.run();
    unless_started.disarm();
    let member = Consensus { inner };
    if filled {
        catch_up(&member).await?;
    }
    Ok(member)
}

/// A state may be ahead of its log: what a majority has is applied, also before it is synced here, and a power loss takes
/// what was not. The log then goes on after the state, and needs a snapshot that reaches as far.
async fn reach_with_a_snapshot(machine: &mut StateMachine, applied: u64) -> io::Result<()> {
    let newest = machine.get_current_snapshot().await?;
    if newest.is_none_or(|newest| newest.snapshot.meta.next_index() < applied) {
        machine.get_snapshot_builder().await.build_snapshot().await?;
    }
    Ok(())
}

/// Says to the health what is found rotten, whoever reads it.
fn watch_for_rot(health: &Arc<Health>, log: &LogStore, store: &Store) {
    let of_log = health.clone();
    log.checks().on_rot(move |rot| of_log.fail(Fault::LogRotten(rot.to_string())));
    let of_state = health.clone();
    store.checks().on_rot(move |rot| of_state.fail(Fault::StateRotten(rot.to_string())));
}

/// A member that was filled takes part, and serves nobody before it has what was acknowledged meanwhile.
async fn catch_up(member: &Consensus) -> Result<(), StartError> {
    loop {
        match member.linearize().await {
            Ok(()) => return Ok(()),
            Err(ConsensusError::Stopped(fault)) => {
                member.shutdown().await;
                return Err(StartError::StoppedCatchingUp(fault));
            }
            Err(error) => {
                tracing::warn!(%error, "this member was filled and has not caught up yet");
                let pause = CATCH_UP_PAUSE.mul_f64(rand::rng().random_range(0.5..1.5));
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// The other members of a membership, and where they are.
fn peers_in(membership: &Membership, id: u64) -> KnownPeers {
    let others = membership.nodes().filter(|(other, _)| **other != id);
    others.map(|(other, node)| (*other, node.raft_addr.clone())).collect()
}

/// Tells who leads, forgets members that left, and notices when the core stops.
async fn follow_metrics(inner: Arc<Inner>, leader: watch::Sender<Option<MemberId>>, data_dir: PathBuf) {
    let mut written = KnownPeers::new();
    // These change with votes and memberships, not with every entry.
    let mut metrics = inner.raft.server_metrics();
    loop {
        let (now, membership) = {
            let metrics = metrics.borrow_watched();
            (metrics.current_leader.map(MemberId), metrics.membership_config.clone())
        };
        leader.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
        inner.channels.retain(|member| membership.membership().get_node(&member).is_some());
        let peers = peers_in(membership.membership(), inner.id);
        if peers != written && !peers.is_empty() {
            written.clone_from(&peers);
            let folder = data_dir.clone();
            let kept = disk_work::run(move || known_peers::write(&folder, &peers)).await;
            if let Ok(Err(error)) | Err(error) = kept {
                tracing::warn!(%error, "where the other members are could not be written down");
            }
        }
        tokio::select! {
            changed = metrics.changed() => if changed.is_err() {
                core_ended(&inner);
                leader.send_replace(None);
                return;
            },
            () = inner.health.failed() => {
                // A member that may not serve must not lead, vote or acknowledge either.
                if let Err(error) = inner.raft.shutdown().await {
                    tracing::warn!(%error, "the consensus core ended badly");
                }
                leader.send_replace(None);
                return;
            }
            () = inner.stop.cancelled() => return,
        }
    }
}

/// The core ended. Unless that was asked for, the member may not serve.
fn core_ended(inner: &Inner) {
    if inner.stop.is_cancelled() {
        return;
    }
    if let Some(damage) = inner.log.damage() {
        inner.health.fail(Fault::LogRotten(damage.to_owned()));
    }
    let reason = match &inner.raft.metrics().borrow_watched().running_state {
        Ok(()) => "it ended".to_owned(),
        Err(error) => error.to_string(),
    };
    inner.health.fail(Fault::Core(reason));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preparing_can_be_repeated_also_after_a_crash_in_between() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let identity = MemberIdentity { cluster: "c1".to_owned(), member: MemberId(3), incarnation: 1 };
        let other = MemberIdentity { member: MemberId(4), ..identity.clone() };
        prepare(&path, &identity).unwrap();
        prepare(&path, &identity).unwrap();
        assert!(matches!(prepare(&path, &other), Err(StartError::OtherMember { .. })));

        fs::remove_file(path.join("member.postcard")).unwrap();
        assert!(matches!(prepare(&path, &other), Err(StartError::MarkerMismatch { .. })));
        prepare(&path, &identity).unwrap();
        assert_eq!(member_identity::read(&path).unwrap(), Some(identity));
    }
}
