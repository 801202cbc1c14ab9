//! What each command comes to: events, or a rejection that says what to do. Pure and deterministic (I1): no clock, no
//! randomness, no order but that of keys. One file per family of commands.
//!
//! Whatever lies outside the caller's org is answered exactly as what does not exist (I9). A rejection leaves the
//! draft to be dropped, so that nothing of it remains (I14).

mod admission;
mod agents;
mod enrolment;
pub(crate) mod exec;
pub(crate) mod log_time;
mod members;
mod org;
mod release;
mod route;
mod secrets;
mod tick;
mod token;
mod version;
mod volume;
mod volume_snapshot;

use crate::error::StoreError;
use crate::overlay::Draft;
use holdfast_model::{ClusterVersion, Code, Command, Output, Rejection};

/// Why a command was not carried out.
pub(crate) enum Refusal {
    /// It is answered, and the state goes on.
    Rejected(Rejection),
    /// The state itself failed: the member stops.
    Fault(StoreError),
}

impl From<Rejection> for Refusal {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Fault(error)
    }
}

/// What a decision is.
pub(crate) type Decision = Result<Output, Refusal>;

/// A rejection, as a refusal.
fn refuse(code: Code, message: impl Into<String>) -> Refusal {
    Refusal::Rejected(Rejection::new(code, message))
}

/// «There is no such …», as a refusal (I9).
fn absent(what: &'static str) -> Refusal {
    Refusal::Rejected(Rejection::not_found(what))
}

/// Decides a command; the draft holds its events when it is accepted.
pub(crate) fn decide(draft: &mut Draft<'_>, command: &Command) -> Decision {
    admission::admit(draft, command)?;
    match command {
        Command::InitCluster { cluster, incarnation, member, operator } => {
            enrolment::init_cluster(draft, ClusterVersion::ONE, *cluster, *incarnation, member, operator)
        }
        Command::BeginCluster { version, cluster, incarnation, member, operator } => {
            enrolment::init_cluster(draft, *version, *cluster, *incarnation, member, operator)
        }
        Command::RaiseClusterVersion { to } => version::raise(draft, *to),
        Command::AdvanceLogTime { by_ms } => log_time::advance(draft, *by_ms),
        Command::CreateOrg { name } => org::create_org(draft, name),
        Command::CreateApp { org, name } => org::create_app(draft, *org, name),
        Command::CreateEnv { app, name } => org::create_env(draft, *app, name),
        Command::DeleteApp { app, expected_version } => org::delete_app(draft, *app, *expected_version),
        Command::CreateToken(new) => token::create(draft, new),
        Command::RevokeToken { token } => token::revoke(draft, *token),
        Command::CreateEnrolment { kind, digest, ttl_ms } => {
            enrolment::create(draft, *kind, *digest, *ttl_ms)
        }
        Command::Enrol { digest, key, joiner } => enrolment::enrol(draft, *digest, *key, joiner),
        Command::CreateRelease { env, image, manifest } => release::create(draft, *env, image, manifest),
        Command::Deploy { env, release, counts } => release::deploy(draft, *env, *release, counts),
        Command::Scale { env, counts } => release::scale(draft, *env, counts),
        Command::CreateRoute { env, target, listen_port, process, port, proxy_protocol } => {
            let asked = route::Asked {
                env: *env,
                target,
                listen_port: *listen_port,
                process,
                port,
                proxy_protocol: *proxy_protocol,
            };
            route::create(draft, &asked)
        }
        Command::DeleteRoute { route, expected_version } => route::delete(draft, *route, *expected_version),
        Command::ReportInstances { node, observations } => {
            agents::report_instances(draft, *node, observations)
        }
        Command::ReportNode { node, capacity, vmm } => agents::report_node(draft, *node, *capacity, vmm),
        Command::ReportSilence { silent, back } => agents::report_silence(draft, silent, back),
        Command::ConfirmRemovals { agent, through } => agents::confirm_removals(draft, *agent, *through),
        Command::DrainNode { node } => agents::drain(draft, *node),
        Command::ActivateNode { node } => agents::activate(draft, *node),
        Command::CordonNode { node } => agents::cordon(draft, *node),
        Command::QuarantineNode { node } => agents::quarantine(draft, *node),
        Command::RemoveMember { member } => members::remove(draft, *member),
        Command::SetMemberVotes { member, votes } => members::set_votes(draft, *member, *votes),
        Command::BeginIncarnation { incarnation, survivor } => {
            members::begin_incarnation(draft, *incarnation, *survivor)
        }
        Command::CreateExecGrant { instance, class, terminal, digest, use_within_ms, session_ms } => {
            let asked = exec::Asked {
                instance: *instance,
                class: *class,
                terminal: *terminal,
                digest: *digest,
                use_within_ms: *use_within_ms,
                session_ms: *session_ms,
            };
            exec::create(draft, &asked)
        }
        Command::UseExecGrant { grant, digest, class, terminal, member } => {
            let shown = exec::Shown {
                grant: *grant,
                digest: *digest,
                class: *class,
                terminal: *terminal,
                member: *member,
            };
            exec::use_up(draft, &shown)
        }
        Command::EndExecGrant { grant, end, code, lasted_ms } => {
            exec::end(draft, *grant, *end, *code, *lasted_ms)
        }
        Command::DeleteVolume { volume, expected_version } => {
            volume::delete(draft, *volume, *expected_version)
        }
        Command::CreateSnapshot { volume } => volume_snapshot::create(draft, *volume),
        Command::DeleteSnapshot { snapshot } => volume_snapshot::delete(draft, *snapshot),
        Command::RestoreSnapshot { snapshot, name } => volume_snapshot::restore(draft, *snapshot, name),
        Command::ReportSnapshots { node, news } => volume_snapshot::report(draft, *node, news),
        Command::ReportVolumesErased { node, volumes } => volume::erased(draft, *node, volumes),
        Command::Tick => tick::tick(draft),
        Command::SetSecrets { env, recipient, set, unset, replace, roll, content: _ } => {
            let asked = secrets::Asked { env: *env, recipient, set, unset, replace: *replace, roll: *roll };
            secrets::set(draft, &asked)
        }
        Command::RollBackSecrets { env, to, roll } => secrets::roll_back(draft, *env, *to, *roll),
        Command::ReadSecrets { env, number, keys } => secrets::read(draft, *env, *number, keys),
        Command::CreateEnvelope { owner, envelope } => secrets::create_envelope(draft, *owner, envelope),
        Command::ResealEnvelope { owner, envelope } => secrets::reseal_envelope(draft, *owner, envelope),
        Command::SetClusterRecipient { recipient, after } => {
            secrets::set_cluster_recipient(draft, recipient, after.as_ref())
        }
        Command::SetRegistryCredential { owner, host, recipient, sealed, content: _ } => {
            secrets::set_credential(draft, *owner, host, recipient, sealed)
        }
        Command::DeleteRegistryCredential { owner, host } => secrets::delete_credential(draft, *owner, host),
        // Compared where the digests are, in `apply`.
        Command::VerifyDigest { .. } => Ok(Output::None),
    }
}

/// Refuses a version that is not the resource's.
fn expect_version(expected: Option<u64>, actual: u64) -> Result<(), Refusal> {
    match expected {
        Some(expected) if expected != actual => Err(refuse(
            Code::VersionConflict,
            format!(
                "It changed since you looked: its version is {actual}, not {expected}; look again and repeat."
            ),
        )),
        _ => Ok(()),
    }
}
