//! Typed reads of secrets: versions and who runs with them (views), and what is sealed (log state).
//!
//! A deployment is bound to the version that it began with ([`deployment_secrets`](SecretViews::deployment_secrets)), and an instance to its
//! deployment's: a change of secrets is a change of spec, and makes new instances.

use crate::error::StoreError;
use crate::rows::{Rows, read_at};
use crate::tables::{Table, decode, key};
use crate::views::Views;
use holdfast_model::limits::{REGISTRY_CREDENTIALS_MAX, SECRET_VERSIONS_KEPT};
use holdfast_model::sealed::{
    CredentialOwner, Envelope, Recipient, RegistryCredential, RegistryHost, SealOwner, SealedBytes,
    SealedSecret, SecretVersion,
};
use holdfast_model::{DeploymentId, Digest, EnvId};
use std::collections::BTreeSet;

/// Versions of an env that are listed at most: those that are kept, and those that something runs with.
const VERSIONS_LISTED_MAX: usize = 1_024;
/// Sealing keys that are looked through at a time.
pub const ENVELOPES_PAGE: usize = 1_000;

/// The kind and the id of whose a sealing key is.
pub(crate) fn seal_owner_bytes(owner: SealOwner) -> [u8; 17] {
    tagged(match owner {
        SealOwner::Env(id) => (1, id.to_key()),
        SealOwner::Org(id) => (2, id.to_key()),
        SealOwner::Snapshot(id) => (3, id.to_key()),
    })
}

/// The kind and the id of for whom a credential is.
pub(crate) fn credential_owner_bytes(owner: CredentialOwner) -> [u8; 17] {
    tagged(match owner {
        CredentialOwner::Org(id) => (1, id.to_key()),
        CredentialOwner::App(id) => (2, id.to_key()),
    })
}

fn tagged((kind, id): (u8, [u8; 16])) -> [u8; 17] {
    let mut bytes = [kind; 17];
    bytes[1..].copy_from_slice(&id);
    bytes
}

/// Reads of secrets. Nothing here authorises (I9), and nothing here opens a seal (I10).
pub trait SecretViews: Views {
    /// To whom members seal; `None` until the first leader of a cluster with secrets has said so.
    ///
    /// # Errors
    /// When the database fails.
    fn cluster_recipient(&self) -> Result<Option<Recipient>, StoreError> {
        read_at(self, Table::ClusterRecipient, &key(Table::ClusterRecipient, &[]))
    }

    /// The number of an env's newest version; 0 when it never had secrets.
    ///
    /// # Errors
    /// When the database fails.
    fn secret_head(&self, env: EnvId) -> Result<u32, StoreError> {
        Ok(read_at(self, Table::SecretHead, &key(Table::SecretHead, &[&env.to_key()]))?.unwrap_or(0))
    }

    /// A version of an env's secrets, if it is kept.
    ///
    /// # Errors
    /// When the database fails.
    fn secret_version(&self, env: EnvId, number: u32) -> Result<Option<SecretVersion>, StoreError> {
        let at = key(Table::SecretVersion, &[&env.to_key(), &number.to_be_bytes()]);
        read_at(self, Table::SecretVersion, &at)
    }

    /// The versions of an env's secrets that are kept, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    fn secret_versions(&self, env: EnvId) -> Result<Vec<SecretVersion>, StoreError> {
        let prefix = key(Table::SecretVersion, &[&env.to_key()]);
        let found = self.scan(&prefix, None, VERSIONS_LISTED_MAX)?;
        found.iter().map(|(_, value)| decode(Table::SecretVersion, value)).collect()
    }

    /// The version that a deployment's instances run with; 0 for none.
    ///
    /// # Errors
    /// When the database fails.
    fn deployment_secrets(&self, deployment: DeploymentId) -> Result<u32, StoreError> {
        let at = key(Table::DeploymentSecrets, &[&deployment.to_key()]);
        Ok(read_at(self, Table::DeploymentSecrets, &at)?.unwrap_or(0))
    }

    /// Versions that are kept and need not be: neither among the newest, nor something's that runs or may come back.
    ///
    /// # Errors
    /// When the database fails.
    fn spent_secret_versions(&self, env: EnvId) -> Result<Vec<SecretVersion>, StoreError> {
        let mut versions = self.secret_versions(env)?;
        versions.truncate(versions.len().saturating_sub(SECRET_VERSIONS_KEPT));
        if versions.is_empty() {
            return Ok(versions);
        }
        let mut used = BTreeSet::new();
        let row = self.env(env)?;
        let deployments = row.iter().flat_map(|env| [env.current, env.last_good]).flatten();
        let running = self.live_instances(env)?.into_iter().map(|instance| instance.deployment);
        for deployment in deployments.chain(running).collect::<BTreeSet<_>>() {
            used.insert(self.deployment_secrets(deployment)?);
        }
        versions.retain(|version| !used.contains(&version.number));
        Ok(versions)
    }

    /// One secret of an env, sealed.
    ///
    /// # Errors
    /// When the database fails.
    fn sealed_secret(&self, env: EnvId, digest: &Digest) -> Result<Option<SealedSecret>, StoreError> {
        read_at(self, Table::SealedSecret, &key(Table::SealedSecret, &[&env.to_key(), &digest.0]))
    }

    /// A sealing key.
    ///
    /// # Errors
    /// When the database fails.
    fn envelope(&self, owner: SealOwner) -> Result<Option<Envelope>, StoreError> {
        read_at(self, Table::Envelope, &key(Table::Envelope, &[&seal_owner_bytes(owner)]))
    }

    /// Sealing keys in the order of their owners, after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn envelopes(
        &self,
        after: Option<SealOwner>,
        limit: usize,
    ) -> Result<Vec<(SealOwner, Envelope)>, StoreError> {
        let after = after.map(|owner| key(Table::Envelope, &[&seal_owner_bytes(owner)]));
        let found = self.scan(&key(Table::Envelope, &[]), after.as_deref(), limit)?;
        found.iter().map(|(at, value)| Ok((owner_of(at)?, decode(Table::Envelope, value)?))).collect()
    }

    /// That there is a credential for a registry.
    ///
    /// # Errors
    /// When the database fails.
    fn registry_credential(
        &self,
        owner: CredentialOwner,
        host: &RegistryHost,
    ) -> Result<Option<RegistryCredential>, StoreError> {
        let at = key(Table::RegistryCredential, &[&credential_owner_bytes(owner), host.as_str().as_bytes()]);
        read_at(self, Table::RegistryCredential, &at)
    }

    /// The registries for which there are credentials, by name.
    ///
    /// # Errors
    /// When the database fails.
    fn registry_credentials(&self, owner: CredentialOwner) -> Result<Vec<RegistryCredential>, StoreError> {
        let prefix = key(Table::RegistryCredential, &[&credential_owner_bytes(owner)]);
        let found = self.scan(&prefix, None, REGISTRY_CREDENTIALS_MAX)?;
        found.iter().map(|(_, value)| decode(Table::RegistryCredential, value)).collect()
    }

    /// A registry credential, sealed.
    ///
    /// # Errors
    /// When the database fails.
    fn sealed_credential(
        &self,
        owner: CredentialOwner,
        host: &RegistryHost,
    ) -> Result<Option<SealedBytes>, StoreError> {
        let at = key(Table::SealedCredential, &[&credential_owner_bytes(owner), host.as_str().as_bytes()]);
        read_at(self, Table::SealedCredential, &at)
    }
}

impl<T: Rows + Views + ?Sized> SecretViews for T {}

fn owner_of(at: &[u8]) -> Result<SealOwner, StoreError> {
    let id = crate::rows::id_suffix(at)?;
    match at.get(1) {
        Some(1) => Ok(SealOwner::Env(EnvId::from_bits(id))),
        Some(2) => Ok(SealOwner::Org(holdfast_model::OrgId::from_bits(id))),
        Some(3) => Ok(SealOwner::Snapshot(holdfast_model::SnapshotId::from_bits(id))),
        _ => Err(StoreError::corrupt("a sealing key is nobody's")),
    }
}
