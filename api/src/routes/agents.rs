//! What agents call: follow, report, answer, renew. An agent is who its certificate says, and nothing in a body can
//! make it another (I9).

use super::enrolment::issue;
use super::volume_snapshots;
use crate::endpoint::{Endpoint, Need, Table};
use crate::follow;
use crate::problem::Refusal;
use crate::request::{Body, Call, done, found, reported};
use crate::service::{RequestInfo, Service};
use axum::body::Body as HttpBody;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use holdfast_identity::Subject;
use holdfast_model::agent::{
    CallAnswer, DETAIL_BYTES_MAX, FOLLOW_PROTOCOL, FRAMES_MEDIA_TYPE, Observation, REPORT_OBSERVATIONS_MAX,
    REPORT_PULLS_MAX, Report, ReportDetail, accepted_level,
};
use holdfast_model::api::{Answer, Done, Renew, Renewed, Reported};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::VOLUMES_ERASED_MAX;
use holdfast_model::resource::{Instance, InstanceReason, InstanceState};
use holdfast_model::volume_snapshot::SnapshotWork;
use holdfast_model::{Command, Incarnation, NodeId, Revision};
use holdfast_store::{View, Views};
use std::collections::BTreeSet;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get(
            "/v1/agent/follow",
            Need::Agent,
            "Follow what is the agent's own: an endless stream of frames",
        )
        .query(&[
            ("protocol", "The version of the frames."),
            ("incarnation", "The incarnation that the agent has."),
            ("revision", "The revision that the agent has."),
        ])
        .streams(),
        follow_own,
    );
    table.add(
        Endpoint::post("/v1/agent/report", Need::Agent, "Report what the agent sees")
            .answers::<Reported>(200),
        report,
    );
    table.add(
        Endpoint::post("/v1/agent/answers/{call}", Need::Agent, "Answer a question that came on the stream")
            .answers::<Done>(200),
        answer,
    );
    table.add(
        Endpoint::post("/v1/agent/renew", Need::Agent, "Get a fresh certificate")
            .body::<Renew>()
            .answers::<Answer<Renewed>>(200),
        renew,
    );
}

async fn follow_own(call: Call, headers: HeaderMap) -> Result<Response, Refusal> {
    let agent = call.caller.agent()?;
    if call.query::<u16>("protocol")? != Some(FOLLOW_PROTOCOL) {
        let detail =
            format!("This member speaks version {FOLLOW_PROTOCOL} of the frames; upgrade the agent.");
        return Err(Refusal::invalid(detail));
    }
    let has = match (call.query::<Incarnation>("incarnation")?, call.query::<Revision>("revision")?) {
        (Some(incarnation), Some(revision)) => Some((incarnation, revision)),
        (None, None) => None,
        _ => return Err(Refusal::invalid("`incarnation` and `revision` go together.")),
    };
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let level = accepted_level(accept);
    let frames = follow::frames(Arc::clone(&call.service), call.caller, agent, has, level);
    Ok(([(header::CONTENT_TYPE, FRAMES_MEDIA_TYPE)], HttpBody::from_stream(frames)).into_response())
}

async fn report(call: Call, Body(report): Body<Report>) -> Result<Response, Refusal> {
    let agent = call.caller.agent()?;
    let service = &call.service;
    if let ReportDetail::Node { pulls, .. } = &report.detail
        && pulls.len() > REPORT_PULLS_MAX
    {
        return Err(Refusal::invalid("The report tells of more than 256 images."));
    }
    // Whatever becomes of the news below: the agent lives, and must not count as silent because we cannot write (I7).
    service.contacts.reported(agent, &report, call.caller.request().now);
    // A report that is sent again changes nothing twice; its outcomes need not be kept.
    let request = RequestInfo { idempotency_key: None, ..call.caller.request().clone() };
    let mut revision = service.store().revision();
    let mut erase = BTreeSet::new();
    let mut snapshots = SnapshotWork::default();
    if let (
        AgentRef::Node(node),
        ReportDetail::Node { observations, capacity, vmm, erased, snapshots: told, .. },
    ) = (agent, &report.detail)
    {
        if observations.len() > REPORT_OBSERVATIONS_MAX || vmm.len() > DETAIL_BYTES_MAX {
            return Err(Refusal::invalid(
                "The report holds more than 1,000 observations, or too long a text.",
            ));
        }
        if observations.iter().any(|o| o.detail.as_ref().is_some_and(|d| d.len() > DETAIL_BYTES_MAX)) {
            return Err(Refusal::invalid("A detail is longer than 512 bytes."));
        }
        // High-rate reports do not pass through the log: only what differs from the views does.
        let view = service.view()?;
        let news = changed(&view, node, observations)?;
        let described =
            view.node(node)?.is_some_and(|n| n.capacity != *capacity || n.vmm.as_ref() != Some(vmm));
        erase = view.volumes_to_erase(node, VOLUMES_ERASED_MAX)?.into_iter().collect();
        let gone: BTreeSet<_> = erase.intersection(erased).copied().collect();
        let of_snapshots = volume_snapshots::changed(&view, node, told)?;
        drop(view);
        if described {
            let command = Command::ReportNode { node, capacity: *capacity, vmm: vmm.clone() };
            revision = service.propose(&request, command).await?.revision;
        }
        if !news.is_empty() {
            let command = Command::ReportInstances { node, observations: news };
            revision = service.propose(&request, command).await?.revision;
        }
        if !gone.is_empty() {
            let command = Command::ReportVolumesErased { node, volumes: gone.clone() };
            revision = service.propose(&request, command).await?.revision;
            erase.retain(|volume| !gone.contains(volume));
        }
        if !of_snapshots.is_empty() {
            let command = Command::ReportSnapshots { node, news: of_snapshots };
            revision = service.propose(&request, command).await?.revision;
            drop(service.view_at_least(revision).await?);
        }
        snapshots = volume_snapshots::work(service, node).await?;
    }
    Ok(reported(Reported { revision, erase, snapshots }))
}

/// Observations of the node's own instances that say something new.
fn changed(view: &View, node: NodeId, observations: &[Observation]) -> Result<Vec<Observation>, Refusal> {
    let mut news = Vec::new();
    for seen in observations {
        let Some(known) = view.instance(seen.instance)?.filter(|i| i.node == node && !i.state.is_final())
        else {
            continue;
        };
        let mut seen = seen.clone();
        if seen.reason == Some(InstanceReason::NoCapacity) && !view.cluster_version()?.has_cordon() {
            // Members of an earlier version do not know it.
            seen.reason = Some(InstanceReason::VmmStartFailed);
        }
        if says_something_new(&known, &seen) {
            news.push(seen);
        }
    }
    Ok(news)
}

/// Whether the state machine could make anything of what was seen of a live instance. What it ignores must not reach
/// the log: agents repeat themselves at every heartbeat.
fn says_something_new(known: &Instance, seen: &Observation) -> bool {
    use InstanceState::{Draining, Failed, Stopped};
    match (known.state, seen.state) {
        // Draining is the control plane's word: the node's is only its end.
        (_, Draining) => false,
        (_, Stopped | Failed) => true,
        (Draining, _) => false,
        (was, is) => was != is || seen.reason != known.reason || seen.restarts > known.restarts,
    }
}

async fn answer(call: Call, Body(answer): Body<CallAnswer>) -> Result<Response, Refusal> {
    let agent = call.caller.agent()?;
    let id = call.id("call", "question")?;
    if !call.service.contacts.answered(agent, id, answer) {
        return Err(Refusal::not_found("question"));
    }
    Ok(done(call.service.store().revision()))
}

async fn renew(call: Call, Body(body): Body<Renew>) -> Result<Response, Refusal> {
    let subject = match call.caller.agent()? {
        AgentRef::Node(id) => Subject::Node { id: id.to_string() },
        AgentRef::Edge(id) => Subject::Edge { id: id.to_string() },
    };
    // A certificate is a power of its own: it is given only by what the majority knows now.
    let view = call.view().await?;
    let certificate_pem = issue(&call.service, &body.csr_pem, &subject)?;
    let ca_pem = call.service.authority.certificate().pem();
    Ok(found(view.revision(), Renewed { certificate_pem, ca_pem }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use InstanceState::{Booting, Draining, Failed, Ready, Stopped};
    use holdfast_model::{AppId, DeploymentId, EnvId, InstanceId, OrgId, ReleaseId, Timestamp};
    use std::net::Ipv6Addr;

    fn known(state: InstanceState, reason: Option<InstanceReason>, restarts: u32) -> Instance {
        Instance {
            id: InstanceId::from_bits(1),
            env: EnvId::from_bits(1),
            app: AppId::from_bits(1),
            org: OrgId::from_bits(1),
            deployment: DeploymentId::from_bits(1),
            release: ReleaseId::from_bits(1),
            process: "web".parse().unwrap(),
            node: NodeId::from_bits(1),
            address: Ipv6Addr::LOCALHOST,
            memory_mib: 64,
            cpu_milli: 1_000,
            state,
            reason,
            detail: None,
            restarts,
            was_ready: true,
            created_at: Timestamp(0),
            changed_at: Timestamp(0),
        }
    }

    fn seen(state: InstanceState, reason: Option<InstanceReason>, restarts: u32) -> Observation {
        Observation { instance: InstanceId::from_bits(1), state, reason, detail: None, restarts }
    }

    #[test]
    fn what_the_state_machine_would_ignore_is_no_news() {
        let draining = known(Draining, Some(InstanceReason::NodeDraining), 0);
        for state in [Booting, Ready, Draining] {
            assert!(!says_something_new(&draining, &seen(state, None, 3)), "{state:?}");
        }
        let ready = known(Ready, None, 2);
        assert!(!says_something_new(&ready, &seen(Ready, None, 2)));
        assert!(
            !says_something_new(&ready, &seen(Ready, None, 0)),
            "a node that lost count repeats itself for ever"
        );
        assert!(!says_something_new(&ready, &seen(Draining, None, 2)));
        for state in [Stopped, Failed] {
            assert!(says_something_new(&draining, &seen(state, None, 0)));
            assert!(says_something_new(&ready, &seen(state, None, 0)));
        }
        assert!(says_something_new(&ready, &seen(Booting, None, 3)));
        assert!(says_something_new(&ready, &seen(Ready, None, 3)));
        let crashing = Some(InstanceReason::CrashLoopBackoff);
        assert!(says_something_new(&known(Booting, None, 1), &seen(Booting, crashing, 1)));
    }
}
