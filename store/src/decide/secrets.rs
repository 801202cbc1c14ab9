//! Secrets and registry credentials. What is sealed was sealed before the command was proposed, so that the log, too,
//! holds nothing in clear (I10); it is stored as log state, and events say by which digest it is found.
//!
//! Values are sealed one by one: what a change leaves as it is need not be opened, and two changes at the same time are
//! both kept, in log order.

use super::admission::{app, cluster_only, env, sees};
use super::{Decision, Refusal, absent, refuse};
use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::rollout;
use crate::rows::{Rows, RowsMut};
use crate::secret_views::{SecretViews, credential_owner_bytes, seal_owner_bytes};
use crate::tables::{Table, encode, key};
use crate::views::{Views, required};
use crate::volume_snapshot_views::SnapshotViews as _;
use holdfast_model::limits::{REGISTRY_CREDENTIALS_MAX, SECRETS_FILE_BYTES_MAX, SECRETS_MAX};
use holdfast_model::resource::DeploymentCause;
use holdfast_model::sealed::{
    CredentialOwner, Envelope, Recipient, RegistryCredential, RegistryHost, SealOwner, SealedBytes,
    SealedSecret, SecretCause, SecretMeta, SecretVersion,
};
use holdfast_model::secrets::HEADER;
use holdfast_model::{Aggregate, AppId, Code, EnvId, EventPayload, OrgId, Output, SecretKey};
use std::collections::{BTreeMap, BTreeSet};

/// Sealed rows that deleting an app reads at a time.
const DELETE_PAGE: usize = 256;

/// A change of an env's secrets.
pub(super) struct Asked<'a> {
    pub(super) env: EnvId,
    pub(super) recipient: &'a Recipient,
    pub(super) set: &'a BTreeMap<SecretKey, SealedSecret>,
    pub(super) unset: &'a BTreeSet<SecretKey>,
    pub(super) replace: bool,
    pub(super) roll: bool,
}

/// Refuses what is sealed to another key than the owner's: nobody could open it.
fn check_recipient(draft: &Draft<'_>, owner: SealOwner, recipient: &Recipient) -> Result<(), Refusal> {
    match draft.envelope(owner)? {
        Some(envelope) if envelope.recipient == *recipient => Ok(()),
        _ => Err(refuse(
            Code::FailedPrecondition,
            "What was sent is sealed to a key that is not in use: send it again with a fresh idempotency key.",
        )),
    }
}

pub(super) fn set(draft: &mut Draft<'_>, asked: &Asked<'_>) -> Decision {
    let env = env(draft, asked.env)?;
    check_recipient(draft, SealOwner::Env(env.id), asked.recipient)?;
    if asked.set.is_empty() && asked.unset.is_empty() && !asked.replace {
        return Err(refuse(Code::InvalidRequest, "Nothing would change: name secrets to set or to remove."));
    }
    let head = draft.secret_head(env.id)?;
    let number = next_number(head)?;
    let mut secrets = match draft.secret_version(env.id, head)? {
        Some(newest) if !asked.replace => newest.secrets,
        _ => BTreeMap::new(),
    };
    for key in asked.unset {
        secrets.remove(key).ok_or_else(|| absent("secret"))?;
    }
    for (name, sealed) in asked.set {
        if !sealed.bytes.fits() {
            return Err(refuse(Code::InvalidRequest, "A secret has at most 64 KiB, sealed."));
        }
        let digest = sealed.bytes.digest();
        secrets.insert(name.clone(), SecretMeta { sealed: digest, changed_in: number });
        let at = key(Table::SealedSecret, &[&env.id.to_key(), &digest.0]);
        draft.put(at, Some(encode(Table::SealedSecret, sealed)?))?;
    }
    check_size(draft, env.id, &secrets)?;
    let cause = if asked.replace { SecretCause::Import } else { SecretCause::Set };
    change(draft, env.id, number, cause, secrets, asked.roll)
}

pub(super) fn roll_back(draft: &mut Draft<'_>, of: EnvId, to: u32, roll: bool) -> Decision {
    let env = env(draft, of)?;
    let head = draft.secret_head(env.id)?;
    let earlier = draft.secret_version(env.id, to)?.ok_or_else(|| absent("version of secrets"))?;
    if to == head {
        return Err(refuse(
            Code::FailedPrecondition,
            format!("Version {to} is the newest already: name an earlier one."),
        ));
    }
    let number = next_number(head)?;
    change(draft, env.id, number, SecretCause::Rollback { to }, earlier.secrets, roll)
}

fn next_number(head: u32) -> Result<u32, Refusal> {
    head.checked_add(1).ok_or_else(|| {
        refuse(Code::FailedPrecondition, "The env has no version numbers left: make another env.")
    })
}

fn check_size(
    draft: &Draft<'_>,
    env: EnvId,
    secrets: &BTreeMap<SecretKey, SecretMeta>,
) -> Result<(), Refusal> {
    if secrets.len() > SECRETS_MAX {
        return Err(refuse(Code::InvalidRequest, "An env has at most 256 secrets: remove some first."));
    }
    let mut bytes = HEADER.len() + 1;
    for meta in secrets.values() {
        let sealed = required(draft.sealed_secret(env, &meta.sealed)?, "a sealed secret")?;
        bytes = bytes.saturating_add(sealed.line_bytes as usize);
    }
    if bytes > SECRETS_FILE_BYTES_MAX {
        return Err(refuse(
            Code::InvalidRequest,
            "An env's secrets have at most 256 KiB together: shorten or remove some first.",
        ));
    }
    Ok(())
}

/// Makes a version, forgets what only spent versions had, and rolls what runs to it.
fn change(
    draft: &mut Draft<'_>,
    env: EnvId,
    number: u32,
    cause: SecretCause,
    secrets: BTreeMap<SecretKey, SecretMeta>,
    roll: bool,
) -> Decision {
    let row = required(draft.env(env)?, "an env")?;
    let (actor, created_at) = (draft.context().actor, draft.context().now);
    let version =
        SecretVersion { env, app: row.app, org: row.org, number, cause, secrets, actor, created_at };
    let before = draft.secret_versions(env)?;
    let filing = Filing::org(Aggregate::Env(env), row.org);
    draft.emit(filing, EventPayload::SecretsChanged(Box::new(version)))?;
    forget_spent(draft, env, before)?;
    if let (true, Some(current)) = (roll, row.current) {
        let current = required(draft.deployment(current)?, "a deployment")?;
        let release = required(draft.release(current.release)?, "a release")?;
        rollout::start(draft, env, &release, DeploymentCause::Secrets, current.counts)?;
        rollout::advance(draft, env)?;
    }
    Ok(Output::SecretVersion(number))
}

fn forget_spent(draft: &mut Draft<'_>, env: EnvId, before: Vec<SecretVersion>) -> Result<(), StoreError> {
    let kept = draft.secret_versions(env)?;
    let digests = |versions: &[SecretVersion]| -> BTreeSet<_> {
        versions.iter().flat_map(|v| v.secrets.values().map(|meta| meta.sealed)).collect()
    };
    let used = digests(&kept);
    for digest in digests(&before).difference(&used) {
        draft.put(key(Table::SealedSecret, &[&env.to_key(), &digest.0]), None)?;
    }
    Ok(())
}

pub(super) fn read(draft: &mut Draft<'_>, of: EnvId, number: u32, keys: &BTreeSet<SecretKey>) -> Decision {
    let env = env(draft, of)?;
    let version = draft.secret_version(env.id, number)?.ok_or_else(|| absent("version of secrets"))?;
    if let Some(_missing) = keys.iter().find(|key| !version.secrets.contains_key(*key)) {
        return Err(absent("secret"));
    }
    let filing = Filing::org(Aggregate::Env(env.id), env.org);
    draft.emit(filing, EventPayload::SecretsRead { env: env.id, number, keys: keys.clone() })?;
    Ok(Output::SecretVersion(number))
}

/// Whether the owner of a sealing key is there, and whose it is.
fn org_of(draft: &Draft<'_>, owner: SealOwner) -> Result<OrgId, Refusal> {
    match owner {
        SealOwner::Env(id) => draft.env(id)?.map(|env| env.org).ok_or_else(|| absent("env")),
        SealOwner::Org(id) => draft.org(id)?.map(|org| org.id).ok_or_else(|| absent("org")),
        SealOwner::Snapshot(id) => {
            draft.volume_snapshot(id)?.map(|snapshot| snapshot.org).ok_or_else(|| absent("volume snapshot"))
        }
    }
}

fn check_envelope(draft: &Draft<'_>, envelope: &Envelope) -> Result<(), Refusal> {
    let current = draft.cluster_recipient()?;
    let formed = envelope.recipient.is_formed() && envelope.key.fits();
    if formed && current.as_ref() == Some(&envelope.to) {
        return Ok(());
    }
    Err(refuse(Code::FailedPrecondition, "The key is not sealed to the cluster's present recipient."))
}

/// Only the clockwork asks for this: see `admission`.
pub(super) fn create_envelope(draft: &mut Draft<'_>, owner: SealOwner, envelope: &Envelope) -> Decision {
    org_of(draft, owner)?;
    if draft.envelope(owner)?.is_none() {
        check_envelope(draft, envelope)?;
        put_envelope(draft, owner, envelope)?;
    }
    Ok(Output::None)
}

/// Only the clockwork asks for this: see `admission`.
pub(super) fn reseal_envelope(draft: &mut Draft<'_>, owner: SealOwner, envelope: &Envelope) -> Decision {
    let org = org_of(draft, owner)?;
    let old = draft.envelope(owner)?.ok_or_else(|| absent("sealing key"))?;
    if old.to == envelope.to {
        return Ok(Output::None);
    }
    check_envelope(draft, envelope)?;
    if old.recipient != envelope.recipient {
        return Err(refuse(Code::FailedPrecondition, "That is another key: what is sealed would be lost."));
    }
    put_envelope(draft, owner, envelope)?;
    let aggregate = match owner {
        SealOwner::Env(id) => Aggregate::Env(id),
        SealOwner::Org(id) => Aggregate::Org(id),
        SealOwner::Snapshot(id) => Aggregate::Snapshot(id),
    };
    let payload = EventPayload::EnvelopeResealed { owner, to: envelope.to.clone() };
    draft.emit(Filing::org(aggregate, org), payload)?;
    Ok(Output::None)
}

fn put_envelope(draft: &mut Draft<'_>, owner: SealOwner, envelope: &Envelope) -> Result<(), StoreError> {
    let at = key(Table::Envelope, &[&seal_owner_bytes(owner)]);
    draft.put(at, Some(encode(Table::Envelope, envelope)?))
}

pub(super) fn set_cluster_recipient(
    draft: &mut Draft<'_>,
    recipient: &Recipient,
    after: Option<&Recipient>,
) -> Decision {
    cluster_only(draft, "cluster")?;
    let current = draft.cluster_recipient()?;
    if current.as_ref() == Some(recipient) {
        return Ok(Output::None);
    }
    if current.as_ref() != after {
        return Err(refuse(
            Code::VersionConflict,
            "The cluster's recipient was changed meanwhile: look again.",
        ));
    }
    if !recipient.is_formed() {
        return Err(refuse(Code::InvalidRequest, "A recipient has the form `age1…`."));
    }
    let cluster = required(draft.cluster()?, "a cluster")?;
    let payload = EventPayload::ClusterRecipientChanged { recipient: recipient.clone() };
    draft.emit(Filing::cluster(Aggregate::Cluster(cluster.id)), payload)?;
    Ok(Output::None)
}

/// The org of the one for whom a credential is, if the caller may know of them.
fn credential_org(draft: &Draft<'_>, owner: CredentialOwner) -> Result<(OrgId, Filing), Refusal> {
    match owner {
        CredentialOwner::Org(id) => {
            let org = draft.org(id)?.filter(|org| sees(draft, org.id)).ok_or_else(|| absent("org"))?;
            Ok((org.id, Filing::org(Aggregate::Org(id), org.id)))
        }
        CredentialOwner::App(id) => {
            let app = app(draft, id)?;
            Ok((app.org, Filing::org(Aggregate::App(id), app.org)))
        }
    }
}

pub(super) fn set_credential(
    draft: &mut Draft<'_>,
    owner: CredentialOwner,
    host: &RegistryHost,
    recipient: &Recipient,
    sealed: &SealedBytes,
) -> Decision {
    let (org, filing) = credential_org(draft, owner)?;
    check_recipient(draft, SealOwner::Org(org), recipient)?;
    if !sealed.fits() {
        return Err(refuse(Code::InvalidRequest, "A credential has at most 64 KiB, sealed."));
    }
    let is_new = draft.registry_credential(owner, host)?.is_none();
    if is_new && draft.registry_credentials(owner)?.len() >= REGISTRY_CREDENTIALS_MAX {
        return Err(refuse(
            Code::QuotaExceeded,
            "There are 32 registry credentials already: remove one first.",
        ));
    }
    draft.put(credential_key(owner, host), Some(encode(Table::SealedCredential, sealed)?))?;
    let (actor, created_at) = (draft.context().actor, draft.context().now);
    let credential =
        RegistryCredential { owner, org, host: host.clone(), sealed: sealed.digest(), actor, created_at };
    draft.emit(filing, EventPayload::RegistryCredentialSet(credential))?;
    Ok(Output::None)
}

pub(super) fn delete_credential(
    draft: &mut Draft<'_>,
    owner: CredentialOwner,
    host: &RegistryHost,
) -> Decision {
    let (_, filing) = credential_org(draft, owner)?;
    draft.registry_credential(owner, host)?.ok_or_else(|| absent("registry credential"))?;
    draft.put(credential_key(owner, host), None)?;
    draft.emit(filing, EventPayload::RegistryCredentialDeleted { owner, host: host.clone() })?;
    Ok(Output::None)
}

fn credential_key(owner: CredentialOwner, host: &RegistryHost) -> Vec<u8> {
    key(Table::SealedCredential, &[&credential_owner_bytes(owner), host.as_str().as_bytes()])
}

/// Forgets what is sealed for an app and its envs, before it is deleted.
pub(super) fn forget_app(draft: &mut Draft<'_>, app: AppId) -> Result<(), StoreError> {
    let owner = credential_owner_bytes(CredentialOwner::App(app));
    forget_rows(draft, &key(Table::SealedCredential, &[&owner]))?;
    let mut after = None;
    loop {
        let envs = draft.envs(app, after.as_ref(), DELETE_PAGE)?;
        let Some(last) = envs.last() else { return Ok(()) };
        after = Some(last.name.clone());
        for env in envs {
            forget_rows(draft, &key(Table::SealedSecret, &[&env.id.to_key()]))?;
            forget_rows(draft, &key(Table::Envelope, &[&seal_owner_bytes(SealOwner::Env(env.id))]))?;
        }
    }
}

fn forget_rows(draft: &mut Draft<'_>, prefix: &[u8]) -> Result<(), StoreError> {
    loop {
        let found = draft.scan(prefix, None, DELETE_PAGE)?;
        if found.is_empty() {
            return Ok(());
        }
        for (at, _) in found {
            draft.put(at, None)?;
        }
    }
}
