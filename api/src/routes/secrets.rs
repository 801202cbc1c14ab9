//! Secrets of an env, and credentials for registries. Values come in, and go out only to who may read material, after
//! that was recorded (I12).

use super::apps::{app, env, gone, org, vanished};
use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, done, found, page};
use crate::service::Service;
use crate::{registries, sealing};
use axum::response::Response;
use holdfast_model::api::{
    Answer, AskSecrets, Done, NodeSecrets, Page, ResolveImage, RevealSecrets, RevealedSecrets,
    RollBackSecrets, SealingKeys, SealingStatus, SetRegistryCredential, SetSecrets,
};
use holdfast_model::command::AgentRef;
use holdfast_model::delivery::ClearCredential;
use holdfast_model::limits::BODY_BYTES_MAX;
use holdfast_model::resource::Image;
use holdfast_model::sealed::{CredentialOwner, RegistryCredential, RegistryHost, SecretVersion};
use holdfast_model::{Accepted, Command, Digest, EnvId, OrgId, Output, Scope};
use holdfast_store::{SecretViews, View};
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::Arc;
use zeroize::Zeroizing;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let (write, metadata) = (Need::Scope(Scope::SecretsWrite), Need::Scope(Scope::SecretsReadMetadata));
    let secrets = "/v1/envs/{env}/secrets";
    table.add(
        Endpoint::post(secrets, write, "Set and remove an env's secrets: a new version")
            .body::<SetSecrets>()
            .answers::<Answer<SecretVersion>>(201),
        set,
    );
    table.add(
        Endpoint::get(secrets, metadata, "Which secrets an env has, not what they say")
            .query(&[("version", "This version; the newest by default.")])
            .reads()
            .answers::<Answer<SecretVersion>>(200),
        show,
    );
    table.add(
        Endpoint::get(
            "/v1/envs/{env}/secrets/versions",
            metadata,
            "The versions of an env's secrets that are kept",
        )
        .reads()
        .answers::<Page<SecretVersion>>(200),
        versions,
    );
    table.add(
        Endpoint::post("/v1/envs/{env}/secrets/rollback", write, "Make an earlier version the newest again")
            .body::<RollBackSecrets>()
            .answers::<Answer<SecretVersion>>(201),
        roll_back,
    );
    table.add(
        Endpoint::post(
            "/v1/envs/{env}/secrets/reveal",
            Need::Scope(Scope::SecretsReadMaterial),
            "Show secrets in clear; that becomes an event",
        )
        .body::<RevealSecrets>()
        .answers::<Answer<RevealedSecrets>>(200),
        reveal,
    );
    for (path, one) in [
        ("/v1/orgs/{org}/registries", "/v1/orgs/{org}/registries/{host}"),
        ("/v1/apps/{app}/registries", "/v1/apps/{app}/registries/{host}"),
    ] {
        table.add(
            Endpoint::post(path, write, "Keep a credential for a registry")
                .body::<SetRegistryCredential>()
                .answers::<Answer<RegistryCredential>>(201),
            set_credential,
        );
        table.add(
            Endpoint::get(path, metadata, "For which registries there are credentials")
                .reads()
                .answers::<Page<RegistryCredential>>(200),
            credentials,
        );
        table.add(
            Endpoint::delete(one, write, "Forget a credential for a registry").answers::<Done>(200),
            delete_credential,
        );
    }
    table.add(
        Endpoint::post(
            "/v1/apps/{app}/images/resolve",
            Need::Scope(Scope::ReleasesWrite),
            "Ask a private registry, with the kept credential, which image a reference names",
        )
        .body::<ResolveImage>()
        .answers::<Answer<Image>>(200),
        resolve_image,
    );
    let sealing = "/v1/cluster/sealing";
    table.add(
        Endpoint::get(sealing, Need::Operator(Scope::ClusterRead), "To whom members seal, and what is left")
            .answers::<Answer<SealingStatus>>(200),
        sealing_status,
    );
    table.add(
        Endpoint::post(
            sealing,
            Need::Operator(Scope::ClusterAdmin),
            "Begin a rotation of the cluster's sealing key",
        )
        .answers::<Answer<SealingStatus>>(200),
        rotate,
    );
    table.add(
        Endpoint::post(sealing::KEYS_PATH, Need::Member, "Exchange the cluster's sealing keys")
            .body::<SealingKeys>()
            .answers::<SealingKeys>(200),
        exchange,
    );
    table.add(
        Endpoint::post(
            "/v1/agent/secrets",
            Need::Agent,
            "What one of the node's instances needs, sealed to it",
        )
        .body::<AskSecrets>()
        .answers::<Answer<NodeSecrets>>(200),
        deliver,
    );
}

/// The digest of what was asked, by a key that only members have: it tells a repeat, and confirms no guess.
fn content(call: &Call, asked: &impl Serialize) -> Result<Digest, Refusal> {
    // Room for all at once: a buffer that grew would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * BODY_BYTES_MAX));
    serde_json::to_writer(&mut *bytes, asked).map_err(|e| Refusal::internal(&e))?;
    Ok(call.service.seed.fingerprint(&bytes))
}

/// The env, as a majority knows it. Who may change it, the command says again in log order.
async fn env_to_change(call: &Call) -> Result<EnvId, Refusal> {
    let view = call.view().await?;
    env(call, &view, call.id("env", "env")?).map(|env| env.id)
}

fn made(env: EnvId, accepted: &Accepted, view: &View) -> Result<Response, Refusal> {
    let Output::SecretVersion(number) = accepted.output else { return Err(vanished("version of secrets")) };
    let version = view.secret_version(env, number)?;
    let version = version.ok_or_else(|| gone("version of secrets", number, accepted.revision))?;
    Ok(created(accepted.revision, version))
}

async fn set(call: Call, Body(body): Body<SetSecrets>) -> Result<Response, Refusal> {
    let env = env_to_change(&call).await?;
    let content = content(&call, &body)?;
    let (recipient, set) = sealing::seal_secrets(&call.service, env, body.set.iter()).await?;
    let SetSecrets { unset, replace, roll, .. } = body;
    let command = Command::SetSecrets { env, recipient, set, unset, replace, roll, content };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    made(env, &accepted, &view)
}

async fn roll_back(call: Call, Body(body): Body<RollBackSecrets>) -> Result<Response, Refusal> {
    let env = call.id("env", "env")?;
    let command = Command::RollBackSecrets { env, to: body.to, roll: body.roll };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    made(env, &accepted, &view)
}

/// The version that is asked for, or the newest.
fn version(view: &View, env: EnvId, asked: Option<u32>) -> Result<SecretVersion, Refusal> {
    let number = match asked {
        Some(number) => number,
        None => view.secret_head(env)?,
    };
    view.secret_version(env, number)?.ok_or_else(|| Refusal::not_found("version of secrets"))
}

async fn show(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    Ok(found(view.revision(), version(&view, env.id, call.query("version")?)?))
}

async fn versions(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    Ok(page(view.revision(), view.secret_versions(env.id)?, None))
}

async fn reveal(call: Call, Body(body): Body<RevealSecrets>) -> Result<Response, Refusal> {
    let env = env_to_change(&call).await?;
    let asked = version(&call.view().await?, env, body.version)?;
    let keys: BTreeSet<_> =
        if body.keys.is_empty() { asked.secrets.keys().cloned().collect() } else { body.keys };
    let command = Command::ReadSecrets { env, number: asked.number, keys: keys.clone() };
    // Recorded first, and durable: nothing is shown that the history does not know of.
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let bundle = sealing::open_bundle(&call.service, &view, &version(&view, env, Some(asked.number))?)?;
    let digest = data_encoding::HEXLOWER.encode(&bundle.digest());
    let mut secrets = bundle.into_map();
    secrets.retain(|key, _| keys.contains(key));
    Ok(found(accepted.revision, RevealedSecrets { version: asked.number, digest, secrets }))
}

/// For whom the credential is, by the path, and their org.
fn owner(call: &Call, view: &View) -> Result<(CredentialOwner, OrgId), Refusal> {
    match call.has("org") {
        true => {
            let org = org(call, view, call.id("org", "org")?)?;
            Ok((CredentialOwner::Org(org.id), org.id))
        }
        false => {
            let app = app(call, view, call.id("app", "app")?)?;
            Ok((CredentialOwner::App(app.id), app.org))
        }
    }
}

async fn set_credential(call: Call, Body(body): Body<SetRegistryCredential>) -> Result<Response, Refusal> {
    let (owner, org) = owner(&call, &call.view().await?)?;
    let content = content(&call, &body)?;
    let SetRegistryCredential { host, user, password } = body;
    let clear = ClearCredential { owner, host: host.clone(), user, password };
    let (recipient, sealed) = sealing::seal_credential(&call.service, org, &clear).await?;
    let command = Command::SetRegistryCredential { owner, host: host.clone(), recipient, sealed, content };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let credential = view.registry_credential(owner, &host)?;
    Ok(created(
        accepted.revision,
        credential.ok_or_else(|| gone("registry credential", &host, accepted.revision))?,
    ))
}

async fn credentials(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let (owner, _) = owner(&call, &view)?;
    Ok(page(view.revision(), view.registry_credentials(owner)?, None))
}

async fn delete_credential(call: Call) -> Result<Response, Refusal> {
    let (owner, _) = owner(&call, &call.view().await?)?;
    let host: RegistryHost = call.id("host", "registry credential")?;
    let command = Command::DeleteRegistryCredential { owner, host };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn resolve_image(call: Call, Body(body): Body<ResolveImage>) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let app = app(&call, &view, call.id("app", "app")?)?;
    let (owner, revision) = ((app.id, app.org), view.revision());
    Ok(found(revision, registries::resolve(&call.service, view, owner, body.reference).await?))
}

async fn sealing_status(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    Ok(found(view.revision(), sealing::status(&view)?))
}

async fn rotate(call: Call) -> Result<Response, Refusal> {
    // Who may do this is judged in the state as a majority has it, before every member gets a key.
    drop(call.view().await?);
    sealing::rotate(&call.service, call.caller.request()).await?;
    let view = call.view().await?;
    Ok(found(view.revision(), sealing::status(&view)?))
}

async fn exchange(call: Call, Body(body): Body<SealingKeys>) -> Result<Response, Refusal> {
    use axum::response::IntoResponse;
    Ok(axum::Json(sealing::exchange(&call.service, &body)?).into_response())
}

async fn deliver(call: Call, Body(body): Body<AskSecrets>) -> Result<Response, Refusal> {
    let AgentRef::Node(node) = call.caller.agent()? else { return Err(Refusal::not_found("instance")) };
    let view = call.view().await?;
    let sealed = sealing::deliver(&call.service, &view, node, body.instance, &body.recipient)?;
    tracing::info!(%node, instance = %body.instance, version = sealed.version, "secrets were sealed for a node");
    Ok(found(view.revision(), sealed))
}
