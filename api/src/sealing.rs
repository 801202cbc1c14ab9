//! Sealing and opening: the one place of the control plane where secrets are in clear, and only while a request lasts.
//!
//! A change is sealed before its command is proposed, so the log, what is stored and what members send one another hold
//! age files (I10). What is opened is sealed again to the one node that needs it, or goes to a caller who may read it
//! after that was recorded (I12). Which key opens what: the cluster's keys, which each member has in a file, open the
//! key of an env or org, and that one opens what is sealed for them.

use crate::problem::Refusal;
use crate::service::{RequestInfo, Service};
use data_encoding::BASE64;
use holdfast_identity::{KeyRing, KeyRingError, SealError, SealKey, SealTo};
use holdfast_model::api::{NodeSecrets, SealingKeys, SealingStatus};
use holdfast_model::delivery::{ClearCredential, ClearKey, ClearSecret, Delivery, SnapshotDelivery};
use holdfast_model::resource::Member;
use holdfast_model::sealed::{
    CredentialOwner, Envelope, Recipient, RegistryHost, SealOwner, SealedBytes, SealedSecret, SecretVersion,
};
use holdfast_model::secrets::{Bundle, SecretValue};
use holdfast_model::{AppId, Code, Command, NodeId, OrgId, SecretKey, SnapshotId};
use holdfast_store::{ENVELOPES_PAGE, SecretViews, View, Views};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};
use zeroize::Zeroizing;

/// Between two looks of the clockwork, in milliseconds.
const LOOK_MS: u64 = 1_000;
/// Keys that one look seals anew at most.
const RESEALED_MAX: usize = 50;
/// Where members give one another the cluster's sealing keys.
pub(crate) const KEYS_PATH: &str = "/v1/members/sealing-keys";

fn broken(error: &dyn std::error::Error) -> Refusal {
    Refusal::internal(error)
}

fn ring(service: &Service) -> Result<&Arc<KeyRing>, Refusal> {
    let missing = || Refusal::new(Code::Unavailable, "This member has no sealing keys; ask another one.");
    service.keys.as_ref().ok_or_else(missing)
}

fn ring_refusal(error: &KeyRingError) -> Refusal {
    match error {
        KeyRingError::Missing(_) => Refusal::new(Code::Unavailable, error.to_string()),
        _ => broken(error),
    }
}

/// Seals what says what it is for.
fn seal<T: Serialize>(to: &SealTo, clear: &T) -> Result<SealedBytes, Refusal> {
    // Room for all at once: a buffer that grew would leave copies behind.
    let size = postcard::serialize_with_flavor(clear, postcard::ser_flavors::Size::default());
    let mut room = Zeroizing::new(vec![0; size.map_err(|e| broken(&e))?]);
    let bytes = postcard::to_slice(clear, &mut room).map_err(|e| broken(&e))?;
    Ok(SealedBytes(to.seal(bytes).map_err(|e| broken(&e))?))
}

fn open<T: DeserializeOwned>(key: &SealKey, sealed: &SealedBytes) -> Result<T, Refusal> {
    let clear = key.open(&sealed.0).map_err(|e| broken(&e))?;
    postcard::from_bytes(&clear).map_err(|e| broken(&e))
}

fn seal_to(recipient: &Recipient) -> Result<SealTo, Refusal> {
    recipient.0.parse().map_err(|e: SealError| Refusal::invalid(e.to_string()))
}

/// What was opened says that it is for something else: a row stands in another's place.
fn misplaced() -> Refusal {
    Refusal::new(Code::Internal, "What is sealed is for something else than where it lies.")
}

/// The key of an env or org.
fn owners_key(service: &Service, view: &View, owner: SealOwner) -> Result<SealKey, Refusal> {
    let envelope = view.envelope(owner)?.ok_or_else(|| Refusal::not_found("sealing key"))?;
    open_envelope(service, owner, &envelope)
}

fn open_envelope(service: &Service, owner: SealOwner, envelope: &Envelope) -> Result<SealKey, Refusal> {
    let opened = ring(service)?.open_sealed(&envelope.to.0, &envelope.key.0);
    let opened = opened.map_err(|e| ring_refusal(&e))?;
    let clear: ClearKey = postcard::from_bytes(&opened).map_err(|e| broken(&e))?;
    let text = std::str::from_utf8(clear.key.reveal()).map_err(|e| broken(&e))?;
    let key: SealKey = text.parse().map_err(|e: SealError| broken(&e))?;
    match clear.owner == owner && key.recipient().to_string() == envelope.recipient.0 {
        true => Ok(key),
        false => Err(misplaced()),
    }
}

fn envelope_of(owner: SealOwner, key: &SealKey, cluster: &Recipient) -> Result<Envelope, Refusal> {
    let text = key.to_text();
    let clear = ClearKey { owner, key: SecretValue::new(Zeroizing::new(text.as_bytes().to_vec())) };
    Ok(Envelope {
        recipient: Recipient(key.recipient().to_string()),
        to: cluster.clone(),
        key: seal(&seal_to(cluster)?, &clear)?,
    })
}

/// To whom an env's or org's things are sealed; made when there is none yet.
async fn owners_recipient(service: &Service, owner: SealOwner) -> Result<Recipient, Refusal> {
    let view = service.view()?;
    if let Some(envelope) = view.envelope(owner)? {
        return Ok(envelope.recipient);
    }
    let cluster = view.cluster_recipient()?;
    drop(view);
    let not_yet =
        || Refusal::new(Code::Unavailable, "The cluster has no sealing key yet; try again in a moment.");
    let cluster = cluster.ok_or_else(not_yet)?;
    let envelope = envelope_of(owner, &SealKey::generate(), &cluster)?;
    let request = RequestInfo::of_member(service.member);
    let made = service.propose(&request, Command::CreateEnvelope { owner, envelope }).await?;
    // Somebody else may have been first: theirs counts. A key without an event moves no revision, so this member may
    // need a read index to see it.
    let view = service.view_at_least(made.revision).await?;
    if let Some(envelope) = view.envelope(owner)? {
        return Ok(envelope.recipient);
    }
    drop(view);
    let view = service.read(Default::default()).await?;
    Ok(view.envelope(owner)?.ok_or_else(|| broken(&SealError::Recipient))?.recipient)
}

/// An env's secrets, sealed, and to whom.
pub(crate) async fn seal_secrets<'a>(
    service: &Service,
    env: holdfast_model::EnvId,
    secrets: impl Iterator<Item = (&'a SecretKey, &'a SecretValue)>,
) -> Result<(Recipient, std::collections::BTreeMap<SecretKey, SealedSecret>), Refusal> {
    let recipient = owners_recipient(service, SealOwner::Env(env)).await?;
    let to = seal_to(&recipient)?;
    let mut sealed = std::collections::BTreeMap::new();
    for (key, value) in secrets {
        holdfast_model::secrets::check_value(key, value).map_err(|e| Refusal::invalid(e.to_string()))?;
        let clear = ClearSecret { env, key: key.clone(), value: value.clone() };
        let line_bytes = u32::try_from(value.line_bytes(key)).map_err(|e| broken(&e))?;
        sealed.insert(key.clone(), SealedSecret { line_bytes, bytes: seal(&to, &clear)? });
    }
    Ok((recipient, sealed))
}

/// A registry credential, sealed, and to whom.
pub(crate) async fn seal_credential(
    service: &Service,
    org: OrgId,
    clear: &ClearCredential,
) -> Result<(Recipient, SealedBytes), Refusal> {
    let recipient = owners_recipient(service, SealOwner::Org(org)).await?;
    let sealed = seal(&seal_to(&recipient)?, clear)?;
    Ok((recipient, sealed))
}

/// A version of an env's secrets, in clear.
pub(crate) fn open_bundle(
    service: &Service,
    view: &View,
    version: &SecretVersion,
) -> Result<Bundle, Refusal> {
    let mut bundle = Bundle::default();
    if version.secrets.is_empty() {
        return Ok(bundle);
    }
    let key = owners_key(service, view, SealOwner::Env(version.env))?;
    for (name, meta) in &version.secrets {
        let sealed = view.sealed_secret(version.env, &meta.sealed)?;
        let sealed = sealed.ok_or_else(|| Refusal::not_found("sealed secret"))?;
        let clear: ClearSecret = open(&key, &sealed.bytes)?;
        if clear.env != version.env || clear.key != *name {
            return Err(misplaced());
        }
        bundle.add(clear.key, clear.value).map_err(|e| broken(&e))?;
    }
    Ok(bundle)
}

/// What a registry asks for, if the app or its org has it; the app's goes first.
pub(crate) fn open_credential(
    service: &Service,
    view: &View,
    (app, org): (AppId, OrgId),
    host: &RegistryHost,
) -> Result<Option<ClearCredential>, Refusal> {
    for owner in [CredentialOwner::App(app), CredentialOwner::Org(org)] {
        let Some(sealed) = view.sealed_credential(owner, host)? else { continue };
        let key = owners_key(service, view, SealOwner::Org(org))?;
        let clear: ClearCredential = open(&key, &sealed)?;
        return if clear.owner == owner && clear.host == *host { Ok(Some(clear)) } else { Err(misplaced()) };
    }
    Ok(None)
}

/// What a node needs for one of its own instances, sealed to it. Whatever is not the node's own is absent (I9).
pub(crate) fn deliver(
    service: &Service,
    view: &View,
    node: NodeId,
    instance: holdfast_model::InstanceId,
    recipient: &Recipient,
) -> Result<NodeSecrets, Refusal> {
    let found = view.instance(instance)?.filter(|i| i.node == node && !i.state.is_final());
    let found = found.ok_or_else(|| Refusal::not_found("instance"))?;
    let version = view.deployment_secrets(found.deployment)?;
    let file = match version {
        0 => None,
        number => {
            let version = view.secret_version(found.env, number)?;
            let version = version.ok_or_else(|| Refusal::not_found("version of secrets"))?;
            Some(SecretValue::new(open_bundle(service, view, &version)?.to_file()))
        }
    };
    let release = view.release(found.release)?;
    let registry = match release.and_then(|r| RegistryHost::of_repository(&r.image.repository)) {
        Some(host) => open_credential(service, view, (found.app, found.org), &host)?,
        None => None,
    };
    if file.is_none() && registry.is_none() {
        return Ok(NodeSecrets { version, sealed: None });
    }
    let delivery = Delivery { cluster: service.cluster, node, instance, version, file, registry };
    let sealed = seal(&seal_to(recipient)?, &delivery)?;
    Ok(NodeSecrets { version, sealed: Some(BASE64.encode(&sealed.0)) })
}

/// To whom a snapshot is sealed: a key of its own, which goes with it.
pub(crate) async fn snapshot_recipient(
    service: &Service,
    snapshot: SnapshotId,
) -> Result<Recipient, Refusal> {
    owners_recipient(service, SealOwner::Snapshot(snapshot)).await
}

/// The key of a snapshot, sealed to the node that restores from it; base64.
pub(crate) fn deliver_snapshot_key(
    service: &Service,
    view: &View,
    node: NodeId,
    snapshot: SnapshotId,
    recipient: &Recipient,
) -> Result<String, Refusal> {
    let key = owners_key(service, view, SealOwner::Snapshot(snapshot))?;
    let text = key.to_text();
    let key = SecretValue::new(Zeroizing::new(text.as_bytes().to_vec()));
    let delivery = SnapshotDelivery { cluster: service.cluster, node, snapshot, key };
    Ok(BASE64.encode(&seal(&seal_to(recipient)?, &delivery)?.0))
}

/// How many keys are sealed to whom.
pub(crate) fn status(view: &View) -> Result<SealingStatus, Refusal> {
    let recipient = view.cluster_recipient()?;
    let (mut envelopes, mut stale, mut after) = (0, 0, None);
    loop {
        let page = view.envelopes(after, ENVELOPES_PAGE)?;
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        envelopes += page.len() as u64;
        stale += page.iter().filter(|(_, e)| Some(&e.to) != recipient.as_ref()).count() as u64;
    }
    Ok(SealingStatus { recipient, envelopes, stale })
}

/// Begins a rotation: every member gets a new key, and then it is the one to seal to. The clockwork does the rest.
pub(crate) async fn rotate(service: &Service, request: &RequestInfo) -> Result<(), Refusal> {
    let after = service.read(Default::default()).await?.cluster_recipient()?;
    // Asked first: a key that not everybody takes would stay in the rings for nothing.
    spread_to_all(service).await?;
    let recipient = Recipient(ring(service)?.add_new().map_err(|e| ring_refusal(&e))?.to_string());
    spread_to_all(service).await?;
    let command = Command::SetClusterRecipient { recipient, after };
    // A repeat draws another key: the caller's idempotency key would make that a different command.
    let request = RequestInfo { idempotency_key: None, ..request.clone() };
    service.propose(&request, command).await.map(|_| ())
}

fn others(service: &Service) -> Result<Vec<Member>, Refusal> {
    let members = service.view()?.members()?;
    Ok(members.into_iter().filter(|m| !m.removed && m.id != service.member).collect())
}

async fn spread_to_all(service: &Service) -> Result<(), Refusal> {
    let (have, of) = spread(service).await?;
    if have == of {
        return Ok(());
    }
    let detail =
        format!("Only {have} of {of} members take new keys: bring the others back or remove them first.");
    Err(Refusal::new(Code::FailedPrecondition, detail))
}

/// Gives every other member our keys and takes theirs; how many of all members have them now.
async fn spread(service: &Service) -> Result<(usize, usize), Refusal> {
    let others = others(service)?;
    let keys = ring(service)?.to_text();
    let body = serde_json::to_vec(&SealingKeys { keys }).map(Zeroizing::new).map_err(|e| broken(&e))?;
    let asks = others.iter().map(|m| service.peers.post(&m.api_addr, KEYS_PATH, body.to_vec()));
    let answers = futures::future::join_all(asks).await;
    let mut have = 1;
    for (status, answer) in answers.into_iter().flatten() {
        if status != 200 {
            continue;
        }
        let theirs: Result<SealingKeys, _> = serde_json::from_slice(&answer);
        if let Ok(theirs) = theirs
            && ring(service)?.merge(theirs.keys.as_bytes()).is_ok()
        {
            have += 1;
        }
    }
    Ok((have, others.len() + 1))
}

/// What another member sent: its keys become ours, too, and it gets ours.
pub(crate) fn exchange(service: &Service, theirs: &SealingKeys) -> Result<SealingKeys, Refusal> {
    let ring = ring(service)?;
    ring.merge(theirs.keys.as_bytes()).map_err(|e| ring_refusal(&e))?;
    Ok(SealingKeys { keys: ring.to_text() })
}

/// Runs for as long as the member does: sees that there is a key, that this member has it, and, as leader, that nothing
/// stays sealed to an old one.
pub(crate) async fn keep(service: &Service) {
    if service.keys.is_none() {
        return std::future::pending().await;
    }
    // The recipient to which everything is known to be sealed: what is new is sealed to it as well.
    let mut settled = None;
    let mut looks = interval(Duration::from_millis(LOOK_MS));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        if let Err(refusal) = look(service, &mut settled).await {
            tracing::info!(%refusal, "sealing could not be looked after; the next look tries again");
        }
    }
}

async fn look(service: &Service, settled: &mut Option<Recipient>) -> Result<(), Refusal> {
    let (has_secrets, recipient) = {
        let view = service.view()?;
        (view.cluster_version()?.has_secrets(), view.cluster_recipient()?)
    };
    let ring = ring(service)?;
    match recipient {
        _ if !has_secrets => Ok(()),
        Some(recipient) if !ring.has(&recipient.0) => spread(service).await.map(|_| ()),
        Some(recipient) if settled.as_ref() == Some(&recipient) => Ok(()),
        Some(recipient) => {
            if service.consensus.is_leader() {
                reseal(service, &recipient).await?;
            }
            if forget_old(service, &recipient)? {
                *settled = Some(recipient);
            }
            Ok(())
        }
        None if service.consensus.is_leader() => begin(service).await,
        None => Ok(()),
    }
}

/// The first key of a cluster: most members must have it before anything is sealed to it.
async fn begin(service: &Service) -> Result<(), Refusal> {
    let ring = ring(service)?;
    let recipient = match ring.newest() {
        Some(recipient) => recipient,
        None => ring.add_new().map_err(|e| ring_refusal(&e))?,
    };
    let (have, of) = spread(service).await?;
    if have * 2 <= of {
        let detail = format!("Only {have} of {of} members took the cluster's first sealing key.");
        return Err(Refusal::new(Code::Unavailable, detail));
    }
    let recipient = Recipient(recipient.to_string());
    service.propose_as_leader(Command::SetClusterRecipient { recipient, after: None }).await.map(|_| ())
}

/// Seals keys to the newest recipient, some at a time.
async fn reseal(service: &Service, recipient: &Recipient) -> Result<(), Refusal> {
    let stale = {
        let view = service.view()?;
        let (mut stale, mut after) = (Vec::new(), None);
        while stale.len() < RESEALED_MAX {
            let page = view.envelopes(after, ENVELOPES_PAGE)?;
            let Some((last, _)) = page.last() else { break };
            after = Some(*last);
            stale.extend(page.into_iter().filter(|(_, envelope)| envelope.to != *recipient));
        }
        stale.truncate(RESEALED_MAX);
        stale
    };
    if !stale.is_empty() {
        tracing::info!(keys = stale.len(), to = %recipient, "sealing keys to the cluster's newest recipient");
    }
    for (owner, old) in stale {
        let key = open_envelope(service, owner, &old)?;
        let envelope = envelope_of(owner, &key, recipient)?;
        service.propose_as_leader(Command::ResealEnvelope { owner, envelope }).await?;
    }
    Ok(())
}

/// Drops keys to which nothing is sealed any more; whether everything is sealed to `recipient`.
fn forget_old(service: &Service, recipient: &Recipient) -> Result<bool, Refusal> {
    let ring = ring(service)?;
    if status(&service.view()?)?.stale > 0 {
        return Ok(false);
    }
    // A newer one may be a rotation that has just begun.
    let is_newest = ring.newest().is_some_and(|newest| newest.to_string() == recipient.0);
    if ring.len() > 1 && is_newest {
        ring.keep_only(&recipient.0).map_err(|e| ring_refusal(&e))?;
        tracing::info!("the sealing keys of earlier recipients are gone from this member");
    }
    Ok(true)
}
