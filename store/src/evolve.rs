//! What each event does to the views. Total: an event that was decided always applies (I13).
//!
//! Never sees a clock, randomness or the caller; a view is a function of the events and nothing else.

use crate::decide::exec::hour_of;
use crate::error::StoreError;
use crate::evolve_secrets;
use crate::rows::{RowsMut, remove, write, write_at, write_id, write_mark};
use crate::settled;
use crate::tables::{Table, aggregate_key, key, port_claim_key, token_owner, unsettled_key};
use crate::views::{ENV_ENDED_KEPT, ExecHour, NodeLoad, Views, aggregate_seq};
use crate::{evolve_volume_snapshots, evolve_volumes};
use holdfast_model::command::AgentRef;
use holdfast_model::exec::ExecGrant;
use holdfast_model::limits::VMM_OVERHEAD_MIB;
use holdfast_model::resource::{
    App, Cluster, Deployment, DeploymentState, Edge, Enrolment, Env, Instance, InstanceReason, InstanceState,
    Member, Node, NodeState, Release, Route, RouteTarget, Token, TokenKind,
};
use holdfast_model::volume::Attachment;
use holdfast_model::{AppId, ClusterVersion, EnvId, Event, EventPayload, Hostname};

/// Rows that deleting an app reads at a time.
const DELETE_PAGE: usize = 1_000;

pub(crate) fn missing(what: &str) -> StoreError {
    StoreError::corrupt(format!("an event is about {what} that is not there"))
}

/// Applies an event to the views.
pub(crate) fn evolve(rows: &mut impl RowsMut, event: &Event) -> Result<(), StoreError> {
    let seq = aggregate_seq(rows, &event.aggregate)? + 1;
    if seq != event.aggregate_seq {
        return Err(StoreError::corrupt(format!("event {} is not its aggregate's next", event.revision)));
    }
    write_at(rows, Table::AggregateSeq, aggregate_key(&event.aggregate), &seq)?;
    match &event.payload {
        EventPayload::ClusterInitialised(cluster) => write(rows, cluster),
        EventPayload::OrgCreated(org) => {
            write_id(rows, Table::OrgByName, &[org.name.as_str().as_bytes()], org.id.to_key())?;
            write(rows, org)
        }
        EventPayload::AppCreated(app) => {
            write_id(
                rows,
                Table::AppByName,
                &[&app.org.to_key(), app.name.as_str().as_bytes()],
                app.id.to_key(),
            )?;
            write(rows, app)
        }
        EventPayload::AppDeleted { app } => app_deleted(rows, *app),
        EventPayload::EnvCreated(env) => {
            write_id(
                rows,
                Table::EnvByName,
                &[&env.app.to_key(), env.name.as_str().as_bytes()],
                env.id.to_key(),
            )?;
            write(rows, env)
        }
        EventPayload::TokenCreated(token) => token_created(rows, token),
        EventPayload::TokenRevoked { token } => {
            let mut token = rows.token(*token)?.ok_or_else(|| missing("a token"))?;
            token.revoked_at = Some(event.time);
            write(rows, &token)
        }
        EventPayload::EnrolmentCreated(enrolment) => {
            write_id(rows, Table::EnrolmentByDigest, &[&enrolment.digest.0], enrolment.id.to_key())?;
            write(rows, enrolment)
        }
        EventPayload::EnrolmentUsed { enrolment, key, enrolled } => {
            let enrolment = rows.enrolment(*enrolment)?.ok_or_else(|| missing("an enrolment"))?;
            let used = Some((event.time, *key));
            write(rows, &Enrolment { used, enrolled: Some(*enrolled), ..enrolment })
        }
        EventPayload::MemberEnrolled(member) => member_enrolled(rows, member),
        EventPayload::NodeEnrolled(node) => node_enrolled(rows, node),
        EventPayload::EdgeEnrolled(edge) => {
            write_id(rows, Table::EdgeByName, &[edge.name.as_str().as_bytes()], edge.id.to_key())?;
            write(rows, edge)
        }
        EventPayload::NodeStateChanged { node, state, silent_since } => {
            let node = rows.node(*node)?.ok_or_else(|| missing("a node"))?;
            let version = node.version + 1;
            node_changed(rows, &Node { state: *state, silent_since: *silent_since, version, ..node })
        }
        EventPayload::NodeDescribed { node, capacity, vmm } => {
            let node = rows.node(*node)?.ok_or_else(|| missing("a node"))?;
            let version = node.version + 1;
            write(rows, &Node { capacity: *capacity, vmm: Some(vmm.clone()), version, ..node })
        }
        EventPayload::ReleaseCreated(release) => release_created(rows, release),
        EventPayload::DeploymentStarted(deployment) => deployment_started(rows, deployment),
        EventPayload::DeploymentStateChanged { deployment, state, failure } => {
            let mut row = rows.deployment(*deployment)?.ok_or_else(|| missing("a deployment"))?;
            row.state = *state;
            row.failure = *failure;
            row.finished_at = Some(event.time);
            deployment_changed(rows, &row)
        }
        EventPayload::DeploymentBlocked { deployment, unschedulable } => {
            let row = rows.deployment(*deployment)?.ok_or_else(|| missing("a deployment"))?;
            write(rows, &Deployment { unschedulable: *unschedulable, ..row })
        }
        EventPayload::InstancePlaced(instance) => instance_placed(rows, instance),
        EventPayload::InstanceStateChanged { instance, state, reason, detail, restarts } => {
            let old = rows.instance(*instance)?.ok_or_else(|| missing("an instance"))?;
            let new = Instance {
                state: *state,
                reason: *reason,
                detail: detail.clone(),
                restarts: *restarts,
                was_ready: old.was_ready || *state == InstanceState::Ready,
                changed_at: if old.state == *state { old.changed_at } else { event.time },
                ..old.clone()
            };
            instance_changed(rows, &old, &new, event.revision.0)
        }
        EventPayload::RouteCreated(route) => route_created(rows, route),
        EventPayload::RouteDeleted { route } => {
            let route = rows.route(*route)?.ok_or_else(|| missing("a route"))?;
            route_deleted(rows, &route)
        }
        EventPayload::RemovalsConfirmed { agent: AgentRef::Node(id), through } => {
            let node = rows.node(*id)?.ok_or_else(|| missing("a node"))?;
            let version = node.version + 1;
            write(rows, &Node { confirmed_through: *through, version, ..node })
        }
        EventPayload::RemovalsConfirmed { agent: AgentRef::Edge(id), through } => {
            let edge = rows.edge(*id)?.ok_or_else(|| missing("an edge"))?;
            let version = edge.version + 1;
            write(rows, &Edge { confirmed_through: *through, version, ..edge })
        }
        EventPayload::MemberRemoved { member } => {
            let row = rows.member(*member)?.ok_or_else(|| missing("a member"))?;
            remove(rows, Table::NonVoter, &[&member.0.to_be_bytes()])?;
            // The name is free again; the id is not.
            remove(rows, Table::MemberByName, &[row.name.as_str().as_bytes()])?;
            write(rows, &Member { removed: true, ..row })
        }
        EventPayload::MemberVotesChanged { member, votes: true } => {
            remove(rows, Table::NonVoter, &[&member.0.to_be_bytes()])
        }
        EventPayload::MemberVotesChanged { member, votes: false } => {
            write_mark(rows, Table::NonVoter, &[&member.0.to_be_bytes()])
        }
        EventPayload::IncarnationBegan { incarnation, survivor: _, last } => {
            let cluster = rows.cluster()?.ok_or_else(|| missing("a cluster"))?;
            let began = key(Table::Incarnation, &[&incarnation.0.to_be_bytes()]);
            write_at(rows, Table::Incarnation, began, last)?;
            write(rows, &Cluster { incarnation: *incarnation, ..cluster })
        }
        EventPayload::ClusterVersionRaised { to } => {
            let cluster = rows.cluster()?.ok_or_else(|| missing("a cluster"))?;
            write(rows, &Cluster { version: *to, ..cluster })?;
            if *to == ClusterVersion::FOUR { evolve_volumes::mark_backed_up(rows) } else { Ok(()) }
        }
        EventPayload::ExecGranted(grant) => exec_granted(rows, grant),
        EventPayload::ExecStarted { grant, used } => {
            let grant = rows.exec_grant(*grant)?.ok_or_else(|| missing("an exec grant"))?;
            write(rows, &ExecGrant { used: Some(*used), ..grant })
        }
        EventPayload::ExecEnded { grant, .. } => {
            let grant = rows.exec_grant(*grant)?.ok_or_else(|| missing("an exec grant"))?;
            exec_ended(rows, &grant)
        }
        EventPayload::VolumeCreated(volume) => evolve_volumes::created(rows, volume),
        EventPayload::VolumeAttached { volume, instance, node, generation, fresh } => {
            let attached = Attachment { instance: *instance, fresh: *fresh };
            evolve_volumes::attached(rows, *volume, attached, *node, *generation)
        }
        EventPayload::VolumeDetached { volume, used, .. } => evolve_volumes::detached(rows, *volume, *used),
        EventPayload::VolumeDeleted { volume } => evolve_volumes::deleted(rows, *volume),
        EventPayload::VolumeErased { volume, node } => {
            remove(rows, Table::VolumeToErase, &[&node.to_key(), &volume.to_key()])
        }
        EventPayload::SnapshotRequested(snapshot) => evolve_volume_snapshots::requested(rows, snapshot),
        EventPayload::SnapshotAdvanced { snapshot, state } => {
            evolve_volume_snapshots::advanced(rows, *snapshot, state, event.time)
        }
        EventPayload::SnapshotDeleted { snapshot } => evolve_volume_snapshots::deleted(rows, *snapshot),
        EventPayload::SnapshotErased { snapshot, node } => {
            evolve_volume_snapshots::erased(rows, *snapshot, *node)
        }
        EventPayload::VolumeRestoreBegan { volume, snapshot } => {
            evolve_volume_snapshots::restore_began(rows, volume, *snapshot)
        }
        EventPayload::VolumeRestored { volume } => evolve_volume_snapshots::restored(rows, *volume),
        EventPayload::VolumeRestoreFailed { volume, detail } => {
            evolve_volume_snapshots::restore_failed(rows, *volume, detail)
        }
        EventPayload::SecretsChanged(version) => evolve_secrets::secrets_changed(rows, version),
        // They are there to be read; no view follows from them.
        EventPayload::SecretsRead { .. } | EventPayload::EnvelopeResealed { .. } => Ok(()),
        EventPayload::ClusterRecipientChanged { recipient } => {
            evolve_secrets::cluster_recipient_changed(rows, recipient)
        }
        EventPayload::RegistryCredentialSet(credential) => evolve_secrets::credential_set(rows, credential),
        EventPayload::RegistryCredentialDeleted { owner, host } => {
            evolve_secrets::credential_deleted(rows, *owner, host)
        }
    }
}

fn token_created(rows: &mut impl RowsMut, token: &Token) -> Result<(), StoreError> {
    write_id(rows, Table::TokenByDigest, &[&token.digest.0], token.id.to_key())?;
    let org = match token.kind {
        TokenKind::Operator => None,
        TokenKind::Org(org) => Some(org),
    };
    write_mark(rows, Table::TokenByOrg, &[&token_owner(org), &token.id.to_key()])?;
    write(rows, token)
}

fn member_enrolled(rows: &mut impl RowsMut, member: &Member) -> Result<(), StoreError> {
    let mut cluster = rows.cluster()?.ok_or_else(|| missing("a cluster"))?;
    cluster.members_enrolled = cluster.members_enrolled.max(member.id.0);
    write(rows, &cluster)?;
    let name = key(Table::MemberByName, &[member.name.as_str().as_bytes()]);
    rows.set(name, &member.id.0.to_be_bytes())?;
    write(rows, member)
}

fn node_enrolled(rows: &mut impl RowsMut, node: &Node) -> Result<(), StoreError> {
    let mut cluster = rows.cluster()?.ok_or_else(|| missing("a cluster"))?;
    cluster.nodes_enrolled = cluster.nodes_enrolled.saturating_add(1);
    write(rows, &cluster)?;
    write_id(rows, Table::NodeByName, &[node.name.as_str().as_bytes()], node.id.to_key())?;
    write(rows, node)
}

fn node_changed(rows: &mut impl RowsMut, node: &Node) -> Result<(), StoreError> {
    write(rows, node)?;
    match node.silent_since {
        Some(_) => write_mark(rows, Table::SilentNode, &[&node.id.to_key()])?,
        None => remove(rows, Table::SilentNode, &[&node.id.to_key()])?,
    }
    if node.state == NodeState::Unreachable {
        return Ok(());
    }
    // A node that takes no instances any more makes each env with one of its instances move.
    let mut envs: Vec<EnvId> = rows.node_instances_live(node.id)?.iter().map(|i| i.env).collect();
    envs.sort_unstable();
    envs.dedup();
    envs.into_iter().try_for_each(|env| mark_env(rows, env))
}

fn release_created(rows: &mut impl RowsMut, release: &Release) -> Result<(), StoreError> {
    let env = rows.env(release.env)?.ok_or_else(|| missing("an env"))?;
    let version = env.version + 1;
    write(rows, &Env { releases: release.number, version, ..env })?;
    let number = release.number.to_be_bytes();
    write_id(rows, Table::ReleaseByEnv, &[&release.env.to_key(), &number], release.id.to_key())?;
    write(rows, release)
}

fn deployment_started(rows: &mut impl RowsMut, deployment: &Deployment) -> Result<(), StoreError> {
    let env = rows.env(deployment.env)?.ok_or_else(|| missing("an env"))?;
    evolve_secrets::bind_deployment(rows, &env, deployment)?;
    let version = env.version + 1;
    write(rows, &Env { deployments: deployment.number, current: Some(deployment.id), version, ..env })?;
    let number = deployment.number.to_be_bytes();
    write_id(rows, Table::DeploymentByEnv, &[&deployment.env.to_key(), &number], deployment.id.to_key())?;
    write(rows, deployment)?;
    mark_env(rows, deployment.env)
}

fn deployment_changed(rows: &mut impl RowsMut, deployment: &Deployment) -> Result<(), StoreError> {
    write(rows, deployment)?;
    if deployment.state == DeploymentState::Complete {
        let env = rows.env(deployment.env)?.ok_or_else(|| missing("an env"))?;
        let version = env.version + 1;
        write(rows, &Env { last_good: Some(deployment.id), version, ..env })?;
    }
    mark_env(rows, deployment.env)
}

/// Keeps the mark that makes `Tick` look at an env.
fn mark_env(rows: &mut impl RowsMut, env: EnvId) -> Result<(), StoreError> {
    let is = rows.is_unsettled(env)?;
    let should = settled::wants_attention(rows, env)?;
    match (is, should) {
        (false, true) => rows.set(unsettled_key(env), &[]),
        (true, false) => rows.put(unsettled_key(env), None),
        _ => Ok(()),
    }
}

fn instance_placed(rows: &mut impl RowsMut, instance: &Instance) -> Result<(), StoreError> {
    let node = rows.node(instance.node)?.ok_or_else(|| missing("a node"))?;
    let number = u128::from(instance.address) as u64;
    write(rows, &Node { addresses_given: node.addresses_given.max(number), ..node })?;
    write(rows, instance)?;
    write_mark(rows, Table::InstanceByEnv, &[&instance.env.to_key(), &instance.id.to_key()])?;
    write_mark(rows, Table::InstanceByNode, &[&instance.node.to_key(), &instance.id.to_key()])?;
    load_changed(rows, instance, true)?;
    mark_env(rows, instance.env)
}

/// Adds an instance to its node's load, or takes it away.
fn load_changed(rows: &mut impl RowsMut, instance: &Instance, placed: bool) -> Result<(), StoreError> {
    let load = rows.node_load(instance.node)?;
    let org_load = rows.node_org_load(instance.node, instance.org)?;
    let memory = instance.memory_mib.saturating_add(VMM_OVERHEAD_MIB);
    let step = |value: u64, by: u64| if placed { value.saturating_add(by) } else { value.saturating_sub(by) };
    let load = NodeLoad {
        instances: step(load.instances, 1),
        memory_mib: step(load.memory_mib, memory),
        cpu_milli: step(load.cpu_milli, instance.cpu_milli),
    };
    let at = key(Table::NodeLoad, &[&instance.node.to_key()]);
    write_at(rows, Table::NodeLoad, at, &load)?;
    let org_load = step(org_load, 1);
    let at = key(Table::NodeOrgLoad, &[&instance.node.to_key(), &instance.org.to_key()]);
    if org_load == 0 { rows.put(at, None) } else { write_at(rows, Table::NodeOrgLoad, at, &org_load) }
}

fn instance_changed(
    rows: &mut impl RowsMut,
    old: &Instance,
    new: &Instance,
    revision: u64,
) -> Result<(), StoreError> {
    write(rows, new)?;
    if new.state.is_final() && !old.state.is_final() {
        remove(rows, Table::InstanceByEnv, &[&new.env.to_key(), &new.id.to_key()])?;
        remove(rows, Table::InstanceByNode, &[&new.node.to_key(), &new.id.to_key()])?;
        load_changed(rows, new, false)?;
        write_id(rows, Table::InstanceEnded, &[&new.env.to_key(), &revision.to_be_bytes()], new.id.to_key())?;
        forget_oldest_ended(rows, new.env)?;
        count_replacement(rows, old, new)?;
    }
    mark_env(rows, new.env)
}

/// Keeps the last [`ENV_ENDED_KEPT`] ended instances of an env.
fn forget_oldest_ended(rows: &mut impl RowsMut, env: EnvId) -> Result<(), StoreError> {
    let ended = rows.scan(&key(Table::InstanceEnded, &[&env.to_key()]), None, ENV_ENDED_KEPT + 1)?;
    if ended.len() <= ENV_ENDED_KEPT {
        return Ok(());
    }
    let (oldest, id) = &ended[0];
    rows.put(oldest.clone(), None)?;
    remove(rows, Table::Instance, &[id])
}

/// An instance that fails while its release rolls out counts against the roll-out, if it was not its node's fault.
fn count_replacement(rows: &mut impl RowsMut, old: &Instance, new: &Instance) -> Result<(), StoreError> {
    // One with a volume is not given up but stopped, when its time to start is over.
    let timed_out = new.reason == Some(InstanceReason::StartTimedOut);
    let failed = new.state == InstanceState::Failed && old.state != InstanceState::Draining;
    if !failed && !timed_out {
        return Ok(());
    }
    if new.reason.is_some_and(InstanceReason::is_of_its_node) {
        return Ok(());
    }
    let current = rows.env(new.env)?.and_then(|env| env.current);
    let Some(id) = current else { return Ok(()) };
    let mut deployment = rows.deployment(id)?.ok_or_else(|| missing("a deployment"))?;
    if deployment.state == DeploymentState::Rolling && deployment.release == new.release {
        let count = deployment.replacements.entry(new.process.clone()).or_default();
        *count = count.saturating_add(1);
        write(rows, &deployment)?;
    }
    Ok(())
}

fn claimed_name(route: &Route) -> Option<&Hostname> {
    match &route.target {
        RouteTarget::TlsPassthrough { hostname } => Some(hostname),
        RouteTarget::Tcp => None,
    }
}

fn route_created(rows: &mut impl RowsMut, route: &Route) -> Result<(), StoreError> {
    let name = claimed_name(route);
    let id = route.id.to_key();
    if let Some(name) = name {
        write_id(rows, Table::HostnameOwner, &[name.as_str().as_bytes()], id)?;
    }
    rows.set(port_claim_key(route.listen_port, name), &id)?;
    write_mark(rows, Table::RouteByEnv, &[&route.env.to_key(), &id])?;
    write(rows, route)
}

fn route_deleted(rows: &mut impl RowsMut, route: &Route) -> Result<(), StoreError> {
    let name = claimed_name(route);
    if let Some(name) = name {
        remove(rows, Table::HostnameOwner, &[name.as_str().as_bytes()])?;
    }
    rows.put(port_claim_key(route.listen_port, name), None)?;
    remove(rows, Table::RouteByEnv, &[&route.env.to_key(), &route.id.to_key()])?;
    remove(rows, Table::Route, &[&route.id.to_key()])
}

fn exec_granted(rows: &mut impl RowsMut, grant: &ExecGrant) -> Result<(), StoreError> {
    let known = rows.exec_hour(grant.org)?;
    let hour = hour_of(grant.created_at);
    let before = if known.hour == hour { known.grants } else { 0 };
    let at = key(Table::ExecHour, &[&grant.org.to_key()]);
    write_at(rows, Table::ExecHour, at, &ExecHour { hour, grants: before.saturating_add(1) })?;
    write_mark(rows, Table::ExecGrantByEnv, &[&grant.env.to_key(), &grant.id.to_key()])?;
    write(rows, grant)
}

fn exec_ended(rows: &mut impl RowsMut, grant: &ExecGrant) -> Result<(), StoreError> {
    remove(rows, Table::ExecGrantByEnv, &[&grant.env.to_key(), &grant.id.to_key()])?;
    remove(rows, Table::ExecGrant, &[&grant.id.to_key()])
}

fn app_deleted(rows: &mut impl RowsMut, id: AppId) -> Result<(), StoreError> {
    let app: App = rows.app(id)?.ok_or_else(|| missing("an app"))?;
    loop {
        let envs = rows.envs(id, None, DELETE_PAGE)?;
        if envs.is_empty() {
            break;
        }
        for env in envs {
            env_deleted(rows, &env)?;
        }
    }
    evolve_secrets::app_deleted(rows, id)?;
    remove(rows, Table::AppByName, &[&app.org.to_key(), app.name.as_str().as_bytes()])?;
    remove(rows, Table::App, &[&id.to_key()])
}

fn env_deleted(rows: &mut impl RowsMut, env: &Env) -> Result<(), StoreError> {
    let at = env.id.to_key();
    loop {
        let routes = rows.routes(env.id, None, DELETE_PAGE)?;
        if routes.is_empty() {
            break;
        }
        for route in routes {
            route_deleted(rows, &route)?;
        }
    }
    for instance in rows.live_instances(env.id)? {
        remove(rows, Table::InstanceByEnv, &[&at, &instance.id.to_key()])?;
        remove(rows, Table::InstanceByNode, &[&instance.node.to_key(), &instance.id.to_key()])?;
        load_changed(rows, &instance, false)?;
        remove(rows, Table::Instance, &[&instance.id.to_key()])?;
    }
    delete_index(rows, Table::InstanceEnded, Table::Instance, &at)?;
    delete_index(rows, Table::ReleaseByEnv, Table::Release, &at)?;
    evolve_secrets::env_deleted(rows, env.id)?;
    delete_index(rows, Table::DeploymentByEnv, Table::Deployment, &at)?;
    rows.put(unsettled_key(env.id), None)?;
    remove(rows, Table::EnvByName, &[&env.app.to_key(), env.name.as_str().as_bytes()])?;
    remove(rows, Table::Env, &[&at])
}

/// Removes every index row under an env, and what it leads to.
fn delete_index(
    rows: &mut impl RowsMut,
    index: Table,
    table: Table,
    env: &[u8; 16],
) -> Result<(), StoreError> {
    loop {
        let found = rows.scan(&key(index, &[env]), None, DELETE_PAGE)?;
        if found.is_empty() {
            return Ok(());
        }
        for (at, id) in found {
            remove(rows, table, &[&id])?;
            rows.put(at, None)?;
        }
    }
}
