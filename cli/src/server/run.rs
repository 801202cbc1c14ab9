//! `holdfast server run`: a member at work, until it is told to stop or may not go on.

use super::folder::{Folder, MemberFile};
use super::init::self_issued;
use super::registries::Asker;
use crate::args::operator::ServerRun;
use crate::failure::{Failure, with_sources};
use crate::metrics;
use arc_swap::ArcSwap;
use futures::FutureExt;
use holdfast_api::contacts::Contacts;
use holdfast_api::peers::Peers;
use holdfast_api::registries::Inquiries;
use holdfast_api::service::{SecretSeed, Service};
use holdfast_api::{clockwork, router, server};
use holdfast_identity::{
    Authority, Credential, client_config, mutual_client_config, mutual_server_config, server_config,
    server_name,
};
use holdfast_model::{ClusterVersion, SupportedVersions};
use holdfast_raft::transport::RaftTls;
use holdfast_raft::{Consensus, ConsensusConfig};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// For the first leader of a new cluster, in milliseconds.
const FIRST_LEADER_MS_MAX: u64 = 30_000;
/// Names the environment variable by which a build acts as an earlier one.
const CLUSTER_VERSION_MAX: &str = "HOLDFAST_CLUSTER_VERSION_MAX";
/// Between two looks at the certificate's age.
const RENEW_EVERY: Duration = Duration::from_secs(3600);

/// The TLS of a member, replaced as a whole when its certificate is renewed.
struct Tls {
    raft: Arc<RaftTls>,
    api: Arc<ArcSwap<rustls::ServerConfig>>,
}

pub(crate) async fn run(arguments: ServerRun) -> Result<(), Failure> {
    let (folder, member) = Folder::open(&arguments.data_dir)?;
    let authority = Arc::new(folder.authority()?);
    let credential = fresh_credential(&folder, &authority, &member)?;
    let tls = Tls { raft: raft_tls(&authority, &credential)?, api: api_tls(&authority, &credential)? };
    let listener = TcpListener::bind(bind_address(&member.api_addr).await?)
        .await
        .map_err(|e| Failure::Host(format!("Cannot listen for the API on {}: {e}.", member.api_addr)))?;
    let for_metrics = metrics::listener(arguments.metrics.as_ref()).await?;
    let consensus = Arc::new(start_with(&folder, &member, Arc::clone(&tls.raft)).await?);
    let (stop, stopping) = watch::channel(false);
    let service = Arc::new(Service {
        cluster: member.cluster,
        member: member.member,
        consensus: Arc::clone(&consensus),
        contacts: Arc::new(Contacts::new(member.member)),
        exec: Arc::default(),
        seed: SecretSeed::of(&authority),
        keys: Some(Arc::new(folder.sealing_keys()?)),
        registries: Some(Inquiries::new(Arc::new(Asker::new(arguments.loopback_registries)?))),
        peers: peers(&authority, &credential, &member)?,
        authority: Arc::clone(&authority),
        stopping: stopping.clone(),
    });
    let taker = Arc::clone(&service);
    consensus.set_app_handler(Arc::new(move |_, message| {
        clockwork::take_in(&taker, &message);
        async { Vec::new() }.boxed()
    }));
    tracing::info!(member = %member.member, api = %member.api_addr, raft = %member.raft_addr, "the member runs");
    let mut clock = tokio::spawn(clockwork::run(Arc::clone(&service)));
    let mut serving =
        tokio::spawn(server::serve(listener, Arc::clone(&tls.api), router(Arc::clone(&service)), stopping));
    let mut to_be_filled = false;
    let ended = tokio::select! {
        () = told_to_stop() => Ok(()),
        fault = consensus.failed() => {
            to_be_filled = fault.is_healed_by_a_start();
            Err(Failure::Host(with_sources(&fault)))
        }
        // Neither ends by itself. A member without them would look alive and not be.
        _ = &mut clock => Err(Failure::Host("The member's clockwork ended; its log says why. Start it again.".into())),
        _ = &mut serving => Err(Failure::Host("The member's API ended; its log says why. Start it again.".into())),
        never = keep_certificate(&folder, &authority, &member, &tls, &service.peers) => match never {},
        never = metrics::serve(for_metrics, metrics::of_member(Arc::clone(&service))) => match never {},
    };
    // In this order: no new requests, those in flight answered, then the log and the state closed.
    let _ = stop.send(true);
    if !serving.is_finished() {
        let _ = serving.await;
    }
    clock.abort();
    consensus.shutdown().await;
    tracing::info!("the member has stopped");
    if to_be_filled {
        start_anew();
    }
    ended
}

/// Becomes a fresh process of the same command, whose start fills the member with a new state; a member does this a few
/// times at most. When it cannot, the process ends as if it had not been tried, and who supervises it starts it again.
fn start_anew() {
    let Ok(program) = std::env::current_exe() else { return };
    tracing::warn!("starting again, to be filled with a new state");
    let error = std::process::Command::new(program).args(std::env::args_os().skip(1)).exec();
    tracing::error!(%error, "the process could not start itself again");
}

/// Starts the consensus of a member alone, without its API.
pub(super) async fn start_consensus(folder: &Folder, member: &MemberFile) -> Result<Consensus, Failure> {
    let tls = raft_tls(&folder.authority()?, &folder.credential()?)?;
    start_with(folder, member, tls).await
}

async fn start_with(folder: &Folder, member: &MemberFile, tls: Arc<RaftTls>) -> Result<Consensus, Failure> {
    let listen = bind_address(&member.raft_addr).await?;
    let mut config = ConsensusConfig::new(member.member, folder.path().to_owned(), listen, tls);
    config.cluster_version_max = cluster_version_max()?;
    Consensus::start(config).await.map_err(|e| Failure::Host(with_sources(&e)))
}

/// The newest cluster version that this process supports: the build's, or less to act as an earlier build in tests.
pub(super) fn cluster_version_max() -> Result<ClusterVersion, Failure> {
    let Some(text) = std::env::var_os(CLUSTER_VERSION_MAX) else { return Ok(ClusterVersion::NEWEST) };
    let asked = text.to_str().and_then(|text| text.parse().ok()).map(ClusterVersion);
    asked.filter(|asked| SupportedVersions::OURS.includes(*asked)).ok_or_else(|| {
        Failure::Usage(format!(
            "{CLUSTER_VERSION_MAX} must be a cluster version that this build supports ({}).",
            SupportedVersions::OURS
        ))
    })
}

/// Waits until the group has a leader.
pub(super) async fn wait_for_leader(consensus: &Consensus) -> Result<(), Failure> {
    let mut leader = consensus.leader_changes();
    let elected = leader.wait_for(Option::is_some);
    match tokio::time::timeout(Duration::from_millis(FIRST_LEADER_MS_MAX), elected).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err(Failure::Host(
            "The first member did not become leader within 30 s; remove its folder and try again.".into(),
        )),
    }
}

async fn bind_address(address: &str) -> Result<SocketAddr, Failure> {
    let mut found = tokio::net::lookup_host(address)
        .await
        .map_err(|e| Failure::Host(format!("The address {address} cannot be resolved: {e}.")))?;
    found.next().ok_or_else(|| Failure::Host(format!("The address {address} resolves to nothing.")))
}

/// The credential on disk, renewed first if it is old: a member that was away for long must still be able to come back.
fn fresh_credential(
    folder: &Folder,
    authority: &Authority,
    member: &MemberFile,
) -> Result<Credential, Failure> {
    let credential = folder.credential()?;
    if SystemTime::now() < credential.facts().renew_at() {
        return Ok(credential);
    }
    let renewed = self_issued(authority, member)?;
    folder.save_credential(&renewed)?;
    tracing::info!("the member renewed its certificate");
    Ok(renewed)
}

/// Renews the certificate for as long as the member runs. The old one has a third of its life left when that begins to
/// fail, so a failure is no reason to stop a member that serves.
async fn keep_certificate(
    folder: &Folder,
    authority: &Authority,
    member: &MemberFile,
    tls: &Tls,
    peers: &Peers,
) -> Infallible {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        let renewed = fresh_credential(folder, authority, member).and_then(|credential| {
            let (server, client) = mutual(authority, &credential)?;
            let to_peers = client_config(authority.certificate(), Some(&credential));
            let to_peers = to_peers.map_err(|e| Failure::Host(with_sources(&e)))?;
            peers.replace(&to_peers);
            tls.api.store(api_tls(authority, &credential)?.load_full());
            tls.raft.replace(server, client);
            Ok(())
        });
        if let Err(failure) = renewed {
            tracing::error!(%failure, "the member could not renew its certificate; it tries again");
        }
    }
}

type Mutual = (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>);

fn mutual(authority: &Authority, credential: &Credential) -> Result<Mutual, Failure> {
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let server = mutual_server_config(credential, authority.certificate()).map_err(|e| host(&e))?;
    let client = mutual_client_config(credential, authority.certificate()).map_err(|e| host(&e))?;
    Ok((server, client))
}

fn raft_tls(authority: &Authority, credential: &Credential) -> Result<Arc<RaftTls>, Failure> {
    let (server, client) = mutual(authority, credential)?;
    Ok(Arc::new(RaftTls::new(authority.certificate().cluster(), server, client)))
}

fn api_tls(
    authority: &Authority,
    credential: &Credential,
) -> Result<Arc<ArcSwap<rustls::ServerConfig>>, Failure> {
    let config =
        server_config(credential, authority.certificate()).map_err(|e| Failure::Host(with_sources(&e)))?;
    Ok(Arc::new(ArcSwap::new(config)))
}

fn peers(authority: &Authority, credential: &Credential, member: &MemberFile) -> Result<Peers, Failure> {
    let host = |e: &dyn std::error::Error| Failure::Host(with_sources(e));
    let config = client_config(authority.certificate(), Some(credential)).map_err(|e| host(&e))?;
    let name = server_name(&member.cluster.to_string()).map_err(|e| host(&e))?;
    Ok(Peers::new(config, name))
}

/// Resolves on SIGTERM or SIGINT.
async fn told_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
