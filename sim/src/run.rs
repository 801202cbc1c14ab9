//! One run: a cluster is made, suffers for a while, and must then be as if nothing had happened.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use holdfast_identity::Authority;
use holdfast_model::{ClusterId, ClusterVersion};
use holdfast_raft::{MemberNode, RaftTls};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::api_member::Cluster;
use crate::checks;
use crate::client_pool::ClientPool;
use crate::edges::Edges;
use crate::fault_plan::FaultPlan;
use crate::happened::Happened;
use crate::history;
use crate::host;
use crate::machine;
use crate::making::{self, Made};
use crate::nodes::Nodes;
use crate::process;
use crate::tally::Tally;
use crate::trace::Trace;
use crate::upgrades::Upgrades;
use crate::watchers::Watchers;
use crate::world::{PANICKED, World};

/// How long making the cluster may take, in milliseconds of its time.
const SETUP_MS_MAX: u64 = 60_000;
/// How long clients go on after the last fault, in milliseconds.
const CALM_MS: u64 = 1_500;
/// How long the cluster may take to answer everything and agree after the last fault, in milliseconds.
const RECOVERY_MS_MAX: u64 = 60_000;

/// The stack of the simulation's thread: that of a main thread.
const STACK_BYTES: usize = 8 << 20;

/// What a run came to.
pub(crate) struct Report {
    pub(crate) lines: u64,
    pub(crate) digest: String,
    pub(crate) summary: String,
    pub(crate) happened: Happened,
    pub(crate) verdict: Result<(), String>,
}

/// Runs one seed. Takes the process's clock and randomness over, on a fresh thread: what was random before, such as the
/// keys of the hash maps of the thread that logs were set up on, stays behind.
pub(crate) fn run(seed: u64, trace_path: Option<&Path>) -> std::io::Result<Report> {
    let trace = Trace::new(trace_path)?;
    // The process's number and the time make the name unique without drawing anything; one that was killed may have left
    // a folder with the same number.
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let name = format!("holdfast-sim-{}-{}", std::process::id(), since.as_nanos());
    let folder = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir_in(memory_folder())?;
    // Members are told relative paths, so that no sentence of theirs holds this folder's name.
    std::env::set_current_dir(folder.path())?;
    let simulation =
        std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || simulate(seed, trace))?;
    simulation.join().map_err(|_| std::io::Error::other("the simulation panicked"))
}

/// Where the few real files of a run lie: in memory if there is such a place, because each waits for its fsync otherwise.
fn memory_folder() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

fn simulate(seed: u64, trace: Trace) -> Report {
    machine::take_over(seed);
    process::pace_disks();
    std::panic::set_hook(Box::new(|panic| {
        // redb's own, over a page that rotted: it becomes an error, and the member is healed.
        if holdfast_checked_file::is_opening() {
            return;
        }
        PANICKED.store(true, std::sync::atomic::Ordering::Relaxed);
        eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
    }));
    let mut rng = StdRng::seed_from_u64(seed);
    let plan = FaultPlan::draw(&mut rng);
    let summary = format!("{} members, {} clients, {:?}", plan.members, plan.clients, plan.kinds);
    let mut world = World::new(plan, rng, trace, tls(), cluster());
    let upgrades = world.equip(seed);
    let verdict = phases(&mut world, upgrades);
    let (requests, repeats) = world.pool.as_ref().map_or((0, 0), ClientPool::counts);
    let (watched, streams) = world.watchers.as_ref().map_or((0, 0), Watchers::counts);
    let (tables, edge_crashes) = world.edges.as_ref().map_or((0, 0), Edges::counts);
    let (machines, deaths) = world.nodes.as_ref().map_or((0, 0), Nodes::counts);
    let tally = Tally {
        requests,
        repeats,
        faults: world.faults(),
        leaders: world.watch.leaders() as u64,
        entries: world.watch.last_index(),
        watched,
        streams,
        tables,
        edge_crashes,
        machines,
        deaths,
    };
    let summary = format!("{tally}; {} ms; {summary}", world.now_ms);
    if let Err(failure) = &verdict {
        world.trace.line(world.now_ms, format_args!("FAILED {failure}"));
    }
    let happened = world.happened();
    let (lines, digest) = world.trace.finish();
    Report { lines, digest, summary, happened, verdict }
}

/// The id of every simulated cluster.
const CLUSTER: u128 = 1;

fn cluster() -> Cluster {
    let id = ClusterId::from_bits(CLUSTER);
    match Authority::create(&id.to_string(), std::time::SystemTime::now()) {
        Ok(authority) => Cluster { id, version: ClusterVersion::NEWEST, authority: Arc::new(authority) },
        Err(error) => unreachable!("an authority can always be made: {error}"),
    }
}

/// TLS is not simulated; the members want configurations all the same.
fn tls() -> Arc<RaftTls> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let resolver = Arc::new(rustls::server::ResolvesServerCertUsingSni::new());
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map(|config| config.with_no_client_auth().with_cert_resolver(resolver));
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map(|config| config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth());
    match (server, client) {
        (Ok(server), Ok(client)) => Arc::new(RaftTls::new(
            &ClusterId::from_bits(CLUSTER).to_string(),
            Arc::new(server),
            Arc::new(client),
        )),
        _ => unreachable!("ring speaks TLS 1.3"),
    }
}

fn phases(world: &mut World, upgrades: Upgrades) -> Result<(), String> {
    let Made { account, estate, nodes } = set_up(world)?;
    let (clients, think_ms) = (world.plan.clients, world.plan.think_ms);
    if let Some(estate) = estate {
        let cluster = world.cluster.id.to_string();
        world.nodes = Some(Nodes::new(world.rng.random(), &cluster, account.secret.clone(), estate, &nodes)?);
    }
    world.watchers = Some(Watchers::new(world.rng.random(), account.secret.clone()));
    world.begin_edges(&account);
    world.pool = Some(ClientPool::new(world.rng.random(), account, clients, think_ms)?);
    world.begin_upgrades(upgrades);
    suffer(world)?;
    recover(world)?;
    judge(world)
}

/// Makes the cluster: the first member, then the others as learners and voters.
fn set_up(world: &mut World) -> Result<Made, String> {
    for id in 1..=world.plan.members {
        world.start(id)?;
    }
    let end = world.now_ms + SETUP_MS_MAX;
    while world.hosts.iter().any(|host| host.member().is_none()) {
        world.step()?;
        if world.now_ms > end {
            return Err("the members did not start".to_owned());
        }
    }
    let made = Arc::new(Mutex::new(None));
    let nodes: Vec<(u64, MemberNode)> = world.hosts.iter().map(|host| (host.id, host.node())).collect();
    if let Some(first) = world.hosts[0].api().cloned() {
        let (made, cluster, agents) = (made.clone(), world.cluster.clone(), world.plan.nodes);
        world.hosts[0].spawn(async move {
            let result = making::make_cluster(cluster, first, nodes, agents).await;
            *made.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
    }
    loop {
        world.step()?;
        if let Some(result) = made.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return result;
        }
        if world.now_ms > end {
            return Err("the cluster was not made in time".to_owned());
        }
    }
}

/// The safety phase: faults of every kind that this seed drew.
fn suffer(world: &mut World) -> Result<(), String> {
    let end = world.now_ms + world.plan.faults_ms;
    let mut next = world.now_ms;
    while world.now_ms < end {
        if world.now_ms >= next {
            world.cause_fault();
            next = world.now_ms + world.rng.random_range(20..world.plan.pause_ms);
        }
        world.step()?;
    }
    Ok(())
}

/// The liveness phase: without faults everything that was asked is answered, and all members come to the same state.
fn recover(world: &mut World) -> Result<(), String> {
    world.end_faults()?;
    let calm_end = world.now_ms + CALM_MS;
    let end = world.now_ms + RECOVERY_MS_MAX;
    loop {
        world.step()?;
        if world.now_ms >= calm_end
            && let Some(pool) = &mut world.pool
        {
            pool.close();
            world.nodes.iter_mut().for_each(Nodes::close);
            if pool.is_quiet()
                && has_converged(world)
                && is_newest(world)
                && watchers_are_done(world)
                && edges_have_arrived(world)?
                && nodes_wait_for(world)?.is_none()
            {
                return Ok(());
            }
        }
        if world.now_ms >= end {
            return Err(unsettled(world));
        }
    }
}

/// What is not yet on the nodes as the control plane wants it.
fn nodes_wait_for(world: &World) -> Result<Option<String>, String> {
    world.nodes.as_ref().map_or(Ok(None), |nodes| nodes.unsettled(world.now_ms, &world.hosts))
}

/// Whether whoever follows the history has seen all of it.
fn watchers_are_done(world: &World) -> bool {
    let last = world.hosts.iter().filter_map(|host| host.member()).map(|m| m.store().revision()).max();
    world.watchers.as_ref().zip(last).is_none_or(|(watchers, last)| watchers.have_seen(last))
}

/// Whether every edge serves what the state has. The members agree on that.
fn edges_have_arrived(world: &mut World) -> Result<bool, String> {
    match (&mut world.edges, world.hosts.iter().find_map(|host| host.member())) {
        (Some(edges), Some(member)) => edges.have_arrived(member.store()),
        _ => Ok(true),
    }
}

fn has_converged(world: &World) -> bool {
    let states: Option<BTreeSet<_>> = world
        .hosts
        .iter()
        .map(|host| {
            let member = host.member()?;
            let status = member.status();
            let applied = status.last_applied?;
            (status.healthy && status.last_log == Some(applied)).then_some((applied, status.leader?))
        })
        .collect();
    states.is_some_and(|states| states.len() == 1)
}

/// Whether every member is at the newest cluster version, which all builds support by now.
fn is_newest(world: &World) -> bool {
    let mut members = world.hosts.iter().filter_map(|host| host.member());
    members.all(|member| member.store().cluster_version() == ClusterVersion::NEWEST)
}

fn unsettled(world: &World) -> String {
    let states: Vec<String> = world
        .hosts
        .iter()
        .map(|host| match host.member() {
            None => format!("host {} is down", host.id),
            Some(member) => {
                let status = member.status();
                format!(
                    "host {}: {:?}, term {}, leader {:?}, log {:?}, applied {:?}, cluster version {}",
                    host.id,
                    status.state,
                    status.term,
                    status.leader,
                    status.last_log,
                    status.last_applied,
                    member.store().cluster_version()
                )
            }
        })
        .collect();
    let waiting = world.pool.as_ref().is_some_and(|pool| !pool.is_quiet());
    format!(
        "liveness: {RECOVERY_MS_MAX} ms after the last fault the cluster has not settled (requests wait: {waiting}, watchers are done: {}, nodes wait for: {:?}); {}; {}",
        watchers_are_done(world),
        nodes_wait_for(world),
        states.join("; "),
        world.edges.as_ref().map(Edges::standing).unwrap_or_default()
    )
}

/// Everything that was acknowledged is there, on every member, and one order explains it.
fn judge(world: &mut World) -> Result<(), String> {
    let Some(pool) = &world.pool else { return Ok(()) };
    for host in &world.hosts {
        let Some(member) = host.member() else { continue };
        checks::scan(member.store(), pool.history())
            .map_err(|reason| format!("host {}: {reason}", host.id))?;
        if let Some(watchers) = &world.watchers {
            watchers.judge(member.store()).map_err(|reason| format!("host {}: {reason}", host.id))?;
        }
        if let Some(edges) = &world.edges {
            edges.judge(member.store()).map_err(|reason| format!("host {}: {reason}", host.id))?;
        }
        if let Some(nodes) = &world.nodes {
            nodes.judge(member.store())?;
        }
        member
            .store()
            .verify()
            .map_err(|error| format!("I13: host {}: {}", host.id, host::describe(&error)))?;
    }
    history::judge(pool.history())
}
