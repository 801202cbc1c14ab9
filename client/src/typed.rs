//! One method for each thing that the API offers (see `docs/reference/openapi.json`): paths and bodies are written here once.
//!
//! Nothing here decides anything: deadlines, retries, fail-over and idempotency keys are [`Client`]'s own.

use crate::error::ClientError;
use crate::http::Client;
use crate::lines::Lines;
use holdfast_model::api::{
    Answer, ClusterStatus, ConfirmRemovals, CreateApp, CreateDeployment, CreateEnrolment, CreateEnv,
    CreateExecGrant, CreateOrg, CreateRelease, CreateRoute, CreateToken, CreatedEnrolment, CreatedExecGrant,
    CreatedToken, Done, EdgeStatus, InstanceStatus, Leader, NodeStatus, Page, RebuildViews, RebuiltViews,
    ResolveImage, RestoreSnapshot, RevealSecrets, RevealedSecrets, RollBackSecrets, Scale, SealingStatus,
    SetRegistryCredential, SetSecrets, TokenView, TransferLeader, Verification, WhoAmI,
};
use holdfast_model::audit::AuditCheckpoint;
use holdfast_model::exec::ExecGrant;
use holdfast_model::limits::PAGE_MAX;
use holdfast_model::logs::{LogRecord, LogStart};
use holdfast_model::resource::{App, Deployment, Env, Image, Org, Release, Route};
use holdfast_model::sealed::{CredentialOwner, RegistryCredential, RegistryHost, SecretVersion};
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{VolumeRestore, VolumeSnapshot};
use holdfast_model::{
    AppId, DeploymentId, EdgeId, EnvId, Event, ExecGrantId, InstanceId, MemberId, NodeId, OrgId, ReleaseId,
    Revision, RouteId, SnapshotId, TokenId, VolumeId, VolumeName,
};
use serde::de::DeserializeOwned;

/// Pages that [`Client::all`] reads at most: what a person or script lists, not an export.
pub const PAGES_MAX: usize = 500;

/// Every item of a list, and the revision of its first page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct All<T> {
    /// Read at, for the first page.
    pub revision: Revision,
    /// The items, in the order of their ids.
    pub items: Vec<T>,
    /// Whether there are more than [`PAGES_MAX`] pages.
    pub truncated: bool,
}

impl Client {
    /// Reads every page of the list at `path`, which may hold a query already.
    ///
    /// # Errors
    /// As [`Client::get`], of the first page that fails.
    pub async fn all<T: DeserializeOwned>(&self, path: &str) -> Result<All<T>, ClientError> {
        let separator = if path.contains('?') { '&' } else { '?' };
        let first = format!("{path}{separator}limit={PAGE_MAX}");
        let page: Page<T> = self.get(&first).await?;
        let mut all = All { revision: page.revision, items: page.items, truncated: false };
        let mut next = page.next;
        for _ in 1..PAGES_MAX {
            let Some(cursor) = next.take() else { return Ok(all) };
            let page: Page<T> = self.get(&format!("{first}&cursor={}", encoded(&cursor))).await?;
            all.items.extend(page.items);
            next = page.next;
        }
        all.truncated = next.is_some();
        Ok(all)
    }

    /// Who the token is.
    pub async fn whoami(&self) -> Result<Answer<WhoAmI>, ClientError> {
        self.get("/v1/whoami").await
    }

    /// How the cluster stands.
    pub async fn cluster(&self) -> Result<Answer<ClusterStatus>, ClientError> {
        self.get("/v1/cluster").await
    }

    /// Makes an org.
    pub async fn create_org(&self, body: &CreateOrg) -> Result<Answer<Org>, ClientError> {
        self.post("/v1/orgs", body).await
    }

    /// The orgs that the token may see; with a name, that one or none.
    pub async fn orgs(&self, name: Option<&str>) -> Result<All<Org>, ClientError> {
        self.all(&named("/v1/orgs", name)).await
    }

    /// An org.
    pub async fn org(&self, org: OrgId) -> Result<Answer<Org>, ClientError> {
        self.get(&format!("/v1/orgs/{org}")).await
    }

    /// Makes an app.
    pub async fn create_app(&self, org: OrgId, body: &CreateApp) -> Result<Answer<App>, ClientError> {
        self.post(&format!("/v1/orgs/{org}/apps"), body).await
    }

    /// An org's apps; with a name, that one or none.
    pub async fn apps(&self, org: OrgId, name: Option<&str>) -> Result<All<App>, ClientError> {
        self.all(&named(&format!("/v1/orgs/{org}/apps"), name)).await
    }

    /// An app.
    pub async fn app(&self, app: AppId) -> Result<Answer<App>, ClientError> {
        self.get(&format!("/v1/apps/{app}")).await
    }

    /// Deletes an app with everything in it, as long as it is at `version`.
    pub async fn delete_app(&self, app: AppId, version: u64) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/apps/{app}?expected_version={version}")).await
    }

    /// Makes an env.
    pub async fn create_env(&self, app: AppId, body: &CreateEnv) -> Result<Answer<Env>, ClientError> {
        self.post(&format!("/v1/apps/{app}/envs"), body).await
    }

    /// An app's envs; with a name, that one or none.
    pub async fn envs(&self, app: AppId, name: Option<&str>) -> Result<All<Env>, ClientError> {
        self.all(&named(&format!("/v1/apps/{app}/envs"), name)).await
    }

    /// An env.
    pub async fn env(&self, env: EnvId) -> Result<Answer<Env>, ClientError> {
        self.get(&format!("/v1/envs/{env}")).await
    }

    /// Makes a release.
    pub async fn create_release(
        &self,
        env: EnvId,
        body: &CreateRelease,
    ) -> Result<Answer<Release>, ClientError> {
        self.post(&format!("/v1/envs/{env}/releases"), body).await
    }

    /// An env's releases.
    pub async fn releases(&self, env: EnvId) -> Result<All<Release>, ClientError> {
        self.all(&format!("/v1/envs/{env}/releases")).await
    }

    /// A release.
    pub async fn release(&self, release: ReleaseId) -> Result<Answer<Release>, ClientError> {
        self.get(&format!("/v1/releases/{release}")).await
    }

    /// Rolls out a release.
    pub async fn deploy(
        &self,
        env: EnvId,
        body: &CreateDeployment,
    ) -> Result<Answer<Deployment>, ClientError> {
        self.post(&format!("/v1/envs/{env}/deployments"), body).await
    }

    /// Changes numbers of instances.
    pub async fn scale(&self, env: EnvId, body: &Scale) -> Result<Answer<Deployment>, ClientError> {
        self.post(&format!("/v1/envs/{env}/scale"), body).await
    }

    /// An env's deployments.
    pub async fn deployments(&self, env: EnvId) -> Result<All<Deployment>, ClientError> {
        self.all(&format!("/v1/envs/{env}/deployments")).await
    }

    /// A deployment.
    pub async fn deployment(&self, deployment: DeploymentId) -> Result<Answer<Deployment>, ClientError> {
        self.get(&format!("/v1/deployments/{deployment}")).await
    }

    /// An env's instances, with those that have ended if asked.
    pub async fn instances(&self, env: EnvId, ended: bool) -> Result<Page<InstanceStatus>, ClientError> {
        let query = if ended { "?all=true" } else { "" };
        self.get(&format!("/v1/envs/{env}/instances{query}")).await
    }

    /// An instance.
    pub async fn instance(&self, instance: InstanceId) -> Result<Answer<InstanceStatus>, ClientError> {
        self.get(&format!("/v1/instances/{instance}")).await
    }

    /// Lines that an instance wrote, from a place on, and with `follow` those that it writes. A stream that ends without
    /// [`LogRecord::End`] was cut: go on behind the last line.
    pub async fn read_logs(
        &self,
        instance: InstanceId,
        start: &LogStart,
        follow: bool,
    ) -> Result<Lines<LogRecord>, ClientError> {
        let mut path = format!("/v1/instances/{instance}/logs?follow={follow}&since_ms={}", start.since_ms);
        if let Some(cursor) = start.after {
            path.push_str(&format!("&cursor={cursor}"));
        }
        if let Some(tail) = start.tail {
            path.push_str(&format!("&tail={tail}"));
        }
        self.lines(&path).await
    }

    /// Asks for a grant to run one program in an instance, once.
    pub async fn create_exec_grant(
        &self,
        instance: InstanceId,
        body: &CreateExecGrant,
    ) -> Result<Answer<CreatedExecGrant>, ClientError> {
        self.post(&format!("/v1/instances/{instance}/exec"), body).await
    }

    /// An env's exec grants and sessions.
    pub async fn exec_grants(&self, env: EnvId) -> Result<Page<ExecGrant>, ClientError> {
        self.get(&format!("/v1/envs/{env}/exec")).await
    }

    /// Takes an exec grant away, and cuts its session.
    pub async fn revoke_exec_grant(&self, grant: ExecGrantId) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/exec/{grant}")).await
    }

    /// Makes a route.
    pub async fn create_route(&self, env: EnvId, body: &CreateRoute) -> Result<Answer<Route>, ClientError> {
        self.post(&format!("/v1/envs/{env}/routes"), body).await
    }

    /// An env's routes.
    pub async fn routes(&self, env: EnvId) -> Result<All<Route>, ClientError> {
        self.all(&format!("/v1/envs/{env}/routes")).await
    }

    /// Deletes a route.
    pub async fn delete_route(&self, route: RouteId) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/routes/{route}")).await
    }

    /// An env's volumes, all on one page.
    pub async fn volumes(&self, env: EnvId) -> Result<Page<Volume>, ClientError> {
        self.get(&format!("/v1/envs/{env}/volumes")).await
    }

    /// A volume.
    pub async fn volume(&self, volume: VolumeId) -> Result<Answer<Volume>, ClientError> {
        self.get(&format!("/v1/volumes/{volume}")).await
    }

    /// Deletes a volume that no instance has, as long as it is at `version`.
    pub async fn delete_volume(&self, volume: VolumeId, version: u64) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/volumes/{volume}?expected_version={version}")).await
    }

    /// The snapshots of an env's volumes, all on one page.
    pub async fn volume_snapshots(&self, env: EnvId) -> Result<Page<VolumeSnapshot>, ClientError> {
        self.get(&format!("/v1/envs/{env}/snapshots")).await
    }

    /// A volume snapshot.
    pub async fn volume_snapshot(&self, id: SnapshotId) -> Result<Answer<VolumeSnapshot>, ClientError> {
        self.get(&format!("/v1/snapshots/{id}")).await
    }

    /// Asks for a snapshot of a volume.
    pub async fn create_snapshot(&self, volume: VolumeId) -> Result<Answer<VolumeSnapshot>, ClientError> {
        self.post(&format!("/v1/volumes/{volume}/snapshots"), &()).await
    }

    /// Deletes a volume snapshot.
    pub async fn delete_snapshot(&self, id: SnapshotId) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/snapshots/{id}")).await
    }

    /// Makes a new volume from a snapshot.
    pub async fn restore_snapshot(
        &self,
        id: SnapshotId,
        name: VolumeName,
    ) -> Result<Answer<Volume>, ClientError> {
        self.post(&format!("/v1/snapshots/{id}/restore"), &RestoreSnapshot { name }).await
    }

    /// What a volume is being made from.
    pub async fn volume_restore(&self, volume: VolumeId) -> Result<Answer<VolumeRestore>, ClientError> {
        self.get(&format!("/v1/volumes/{volume}/restore")).await
    }

    /// Changes an env's secrets.
    pub async fn set_secrets(
        &self,
        env: EnvId,
        body: &SetSecrets,
    ) -> Result<Answer<SecretVersion>, ClientError> {
        self.post(&format!("/v1/envs/{env}/secrets"), body).await
    }

    /// Which secrets an env has, now or in a version.
    pub async fn secrets(
        &self,
        env: EnvId,
        version: Option<u32>,
    ) -> Result<Answer<SecretVersion>, ClientError> {
        let query = version.map(|number| format!("?version={number}")).unwrap_or_default();
        self.get(&format!("/v1/envs/{env}/secrets{query}")).await
    }

    /// The versions of an env's secrets that are kept, oldest first.
    pub async fn secret_versions(&self, env: EnvId) -> Result<Page<SecretVersion>, ClientError> {
        self.get(&format!("/v1/envs/{env}/secrets/versions")).await
    }

    /// Makes an earlier version of an env's secrets the newest again.
    pub async fn roll_back_secrets(
        &self,
        env: EnvId,
        body: &RollBackSecrets,
    ) -> Result<Answer<SecretVersion>, ClientError> {
        self.post(&format!("/v1/envs/{env}/secrets/rollback"), body).await
    }

    /// Secrets in clear; that becomes an event.
    pub async fn reveal_secrets(
        &self,
        env: EnvId,
        body: &RevealSecrets,
    ) -> Result<Answer<RevealedSecrets>, ClientError> {
        self.post(&format!("/v1/envs/{env}/secrets/reveal"), body).await
    }

    /// Keeps a credential for a registry.
    pub async fn set_registry_credential(
        &self,
        owner: CredentialOwner,
        body: &SetRegistryCredential,
    ) -> Result<Answer<RegistryCredential>, ClientError> {
        self.post(&registries(owner), body).await
    }

    /// For which registries there are credentials.
    pub async fn registry_credentials(
        &self,
        owner: CredentialOwner,
    ) -> Result<Page<RegistryCredential>, ClientError> {
        self.get(&registries(owner)).await
    }

    /// Forgets a credential for a registry.
    pub async fn delete_registry_credential(
        &self,
        owner: CredentialOwner,
        host: &RegistryHost,
    ) -> Result<Done, ClientError> {
        self.delete(&format!("{}/{}", registries(owner), encoded(host.as_str()))).await
    }

    /// The image that a reference to a private registry names, asked for with the credential that is kept.
    pub async fn resolve_image(&self, app: AppId, body: &ResolveImage) -> Result<Answer<Image>, ClientError> {
        self.post(&format!("/v1/apps/{app}/images/resolve"), body).await
    }

    /// To whom members seal, and what is still sealed to an earlier key.
    pub async fn sealing(&self) -> Result<Answer<SealingStatus>, ClientError> {
        self.get("/v1/cluster/sealing").await
    }

    /// Begins a rotation of the cluster's sealing key.
    pub async fn rotate_sealing(&self) -> Result<Answer<SealingStatus>, ClientError> {
        self.post("/v1/cluster/sealing", &serde_json::json!({})).await
    }

    /// Makes a token.
    pub async fn create_token(&self, body: &CreateToken) -> Result<Answer<CreatedToken>, ClientError> {
        self.post("/v1/tokens", body).await
    }

    /// The tokens that the token may see.
    pub async fn tokens(&self) -> Result<All<TokenView>, ClientError> {
        self.all("/v1/tokens").await
    }

    /// Ends a token at once.
    pub async fn revoke_token(&self, token: TokenId) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/tokens/{token}")).await
    }

    /// Events after a revision, oldest first.
    pub async fn events(&self, after: Revision, limit: usize) -> Result<Page<Event>, ClientError> {
        self.get(&format!("/v1/events?after={after}&limit={limit}")).await
    }

    /// How the chain of events stands, signed.
    pub async fn audit_checkpoint(&self) -> Result<Answer<AuditCheckpoint>, ClientError> {
        self.get("/v1/events/checkpoint").await
    }

    /// Events after a revision, and those that come, oldest first.
    pub async fn follow_events(&self, after: Revision) -> Result<Lines<Event>, ClientError> {
        self.lines(&format!("/v1/events?after={after}&follow=true")).await
    }

    /// Every node.
    pub async fn nodes(&self) -> Result<Page<NodeStatus>, ClientError> {
        self.get("/v1/nodes").await
    }

    /// Every edge.
    pub async fn edges(&self) -> Result<Page<EdgeStatus>, ClientError> {
        self.get("/v1/edges").await
    }

    /// Moves a node's instances away and places none on it.
    pub async fn drain_node(&self, node: NodeId) -> Result<Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/drain"), &serde_json::json!({})).await
    }

    /// Places nothing more on a node, and leaves what runs there.
    pub async fn cordon_node(&self, node: NodeId) -> Result<Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/cordon"), &serde_json::json!({})).await
    }

    /// Cuts a node off for good.
    pub async fn quarantine_node(&self, node: NodeId) -> Result<Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/quarantine"), &serde_json::json!({})).await
    }

    /// Takes a drained or cordoned node back into use.
    pub async fn activate_node(&self, node: NodeId) -> Result<Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/activate"), &serde_json::json!({})).await
    }

    /// Confirms what a node holds back (I7).
    pub async fn confirm_node(&self, node: NodeId, body: &ConfirmRemovals) -> Result<Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/confirm"), body).await
    }

    /// Confirms what an edge holds back (I7).
    pub async fn confirm_edge(&self, edge: EdgeId, body: &ConfirmRemovals) -> Result<Done, ClientError> {
        self.post(&format!("/v1/edges/{edge}/confirm"), body).await
    }

    /// Removes a member for good. `force`: also when the members that stay have no majority that answers.
    pub async fn remove_member(&self, member: MemberId, force: bool) -> Result<Done, ClientError> {
        self.delete(&format!("/v1/members/{member}?force={force}")).await
    }

    /// Makes a member a voter, or one that follows only.
    pub async fn set_member_votes(&self, member: MemberId, votes: bool) -> Result<Done, ClientError> {
        let change = if votes { "promote" } else { "demote" };
        self.post(&format!("/v1/members/{member}/{change}"), &serde_json::json!({})).await
    }

    /// Hands the leadership to a member, or to any voter that answers.
    pub async fn transfer_leader(&self, body: &TransferLeader) -> Result<Answer<Leader>, ClientError> {
        self.post("/v1/cluster/leader", body).await
    }

    /// Has every member check its state, and compares them.
    pub async fn verify(&self) -> Result<Answer<Verification>, ClientError> {
        self.post("/v1/cluster/verify", &serde_json::json!({})).await
    }

    /// Has every member replay the events up to a revision, and tells what they lead to. Changes nothing.
    pub async fn rebuild(&self, body: &RebuildViews) -> Result<Answer<RebuiltViews>, ClientError> {
        self.post("/v1/cluster/rebuild", body).await
    }

    /// Makes a one-time permission to join.
    pub async fn create_enrolment(
        &self,
        body: &CreateEnrolment,
    ) -> Result<Answer<CreatedEnrolment>, ClientError> {
        self.post("/v1/enrolments", body).await
    }
}

fn registries(owner: CredentialOwner) -> String {
    match owner {
        CredentialOwner::Org(org) => format!("/v1/orgs/{org}/registries"),
        CredentialOwner::App(app) => format!("/v1/apps/{app}/registries"),
    }
}

fn named(path: &str, name: Option<&str>) -> String {
    name.map_or_else(|| path.to_owned(), |name| format!("{path}?name={}", encoded(name)))
}

/// Percent-encodes what is not unreserved (RFC 3986 §2.3).
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_leave_its_place_in_a_query() {
        assert_eq!(named("/v1/orgs", Some("a&b=c#d/é")), "/v1/orgs?name=a%26b%3Dc%23d%2F%C3%A9");
        assert_eq!(named("/v1/orgs", None), "/v1/orgs");
    }
}
