//! What events about secrets do to the views. What is sealed is not theirs: it is log state, and `decide` keeps it.

use crate::error::StoreError;
use crate::rows::{RowsMut, remove, write_at};
use crate::secret_views::{SecretViews, credential_owner_bytes};
use crate::tables::{Table, key};
use crate::views::Views;
use holdfast_model::resource::{Deployment, DeploymentCause, Env};
use holdfast_model::sealed::{CredentialOwner, Recipient, RegistryCredential, RegistryHost, SecretVersion};
use holdfast_model::{AppId, EnvId};

pub(crate) fn secrets_changed(rows: &mut impl RowsMut, version: &SecretVersion) -> Result<(), StoreError> {
    let env = version.env.to_key();
    let at = key(Table::SecretVersion, &[&env, &version.number.to_be_bytes()]);
    write_at(rows, Table::SecretVersion, at, version)?;
    write_at(rows, Table::SecretHead, key(Table::SecretHead, &[&env]), &version.number)?;
    for spent in rows.spent_secret_versions(version.env)? {
        remove(rows, Table::SecretVersion, &[&env, &spent.number.to_be_bytes()])?;
    }
    Ok(())
}

/// Binds a deployment that begins to a version of its env's secrets: a rollback to what it goes back to, a change of
/// numbers to what runs, and whatever else to the newest. `env` is what it was before.
pub(crate) fn bind_deployment(
    rows: &mut impl RowsMut,
    env: &Env,
    deployment: &Deployment,
) -> Result<(), StoreError> {
    let like = match deployment.cause {
        DeploymentCause::Deploy | DeploymentCause::Secrets => None,
        DeploymentCause::Scale => env.current,
        DeploymentCause::Rollback => env.last_good,
    };
    let number = match like {
        Some(other) => rows.deployment_secrets(other)?,
        None => rows.secret_head(env.id)?,
    };
    if number == 0 {
        return Ok(());
    }
    let at = key(Table::DeploymentSecrets, &[&deployment.id.to_key()]);
    write_at(rows, Table::DeploymentSecrets, at, &number)
}

pub(crate) fn cluster_recipient_changed(
    rows: &mut impl RowsMut,
    recipient: &Recipient,
) -> Result<(), StoreError> {
    write_at(rows, Table::ClusterRecipient, key(Table::ClusterRecipient, &[]), recipient)
}

pub(crate) fn credential_set(
    rows: &mut impl RowsMut,
    credential: &RegistryCredential,
) -> Result<(), StoreError> {
    let owner = credential_owner_bytes(credential.owner);
    let at = key(Table::RegistryCredential, &[&owner, credential.host.as_str().as_bytes()]);
    write_at(rows, Table::RegistryCredential, at, credential)
}

pub(crate) fn credential_deleted(
    rows: &mut impl RowsMut,
    owner: CredentialOwner,
    host: &RegistryHost,
) -> Result<(), StoreError> {
    remove(rows, Table::RegistryCredential, &[&credential_owner_bytes(owner), host.as_str().as_bytes()])
}

/// Before the env's deployments go.
pub(crate) fn env_deleted(rows: &mut impl RowsMut, env: EnvId) -> Result<(), StoreError> {
    let mut after = None;
    loop {
        let page = rows.deployments(env, after, 1_000)?;
        let Some(last) = page.last() else { break };
        after = Some(last.number);
        for deployment in page {
            remove(rows, Table::DeploymentSecrets, &[&deployment.id.to_key()])?;
        }
    }
    loop {
        let versions = rows.secret_versions(env)?;
        if versions.is_empty() {
            break;
        }
        for version in versions {
            remove(rows, Table::SecretVersion, &[&env.to_key(), &version.number.to_be_bytes()])?;
        }
    }
    remove(rows, Table::SecretHead, &[&env.to_key()])
}

pub(crate) fn app_deleted(rows: &mut impl RowsMut, app: AppId) -> Result<(), StoreError> {
    for credential in rows.registry_credentials(CredentialOwner::App(app))? {
        credential_deleted(rows, credential.owner, &credential.host)?;
    }
    Ok(())
}
