//! How members, nodes and edges join: a one-time secret, a key of their own, a certificate from the cluster's CA.

use super::apps::vanished;
use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, created};
use crate::service::{RequestInfo, Service};
use axum::response::Response;
use holdfast_identity::{CERTIFICATE_VALIDITY, Subject, Token as Secret, TokenKind as SecretKind};
use holdfast_model::api::{Answer, CreateEnrolment, CreatedEnrolment, Enrol, EnrolAnswer};
use holdfast_model::command::Joiner;
use holdfast_model::limits::{ENROLMENT_MS, ENROLMENT_MS_MAX};
use holdfast_model::resource::{Enrolled, EnrolmentKind, Member};
use holdfast_model::{Actor, Code, Command, Digest, EdgeId, MemberId, NodeId, Output, Scope, Timestamp};
use holdfast_store::Views;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::post(
            "/v1/enrolments",
            Need::Operator(Scope::ClusterAdmin),
            "Make a one-time permission to join; its secret is shown this once",
        )
        .body::<CreateEnrolment>()
        .answers::<Answer<CreatedEnrolment>>(201),
        create,
    );
    table.add(
        Endpoint::post("/v1/enrol", Need::EnrolmentSecret, "Join with an enrolment's secret")
            .body::<Enrol>()
            .answers::<Answer<EnrolAnswer>>(201),
        enrol,
    );
}

async fn create(call: Call, Body(body): Body<CreateEnrolment>) -> Result<Response, Refusal> {
    let ttl_ms = body.ttl_s.map_or(ENROLMENT_MS, |s| s.saturating_mul(1000));
    if ttl_ms == 0 || ttl_ms > ENROLMENT_MS_MAX {
        return Err(Refusal::invalid("`ttl_s` must be from 1 second to 24 hours."));
    }
    let secret = call.service.seed.token(SecretKind::Enrolment, call.caller.request());
    let digest = Digest(*secret.digest().as_bytes());
    let command = Command::CreateEnrolment { kind: body.kind, digest, ttl_ms };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::Enrolment(id) = accepted.output else { return Err(vanished("enrolment")) };
    let enrolment = view.enrolment(id)?.ok_or_else(|| vanished("enrolment"))?;
    let item = CreatedEnrolment {
        id,
        kind: enrolment.kind,
        expires_at: enrolment.expires_at,
        secret: secret.reveal().as_str().to_owned(),
        ca_pin: call.service.authority.certificate().fingerprint().to_string(),
    };
    Ok(created(accepted.revision, item))
}

async fn enrol(call: Call, Body(body): Body<Enrol>) -> Result<Response, Refusal> {
    let invalid = || {
        let detail = "The enrolment secret is unknown, used, or over; ask an operator for a new one.";
        Refusal::new(Code::EnrolmentInvalid, detail)
    };
    let secret = Secret::parse(&body.secret).map_err(|_| invalid())?;
    if secret.kind() != SecretKind::Enrolment {
        return Err(invalid());
    }
    let digest = Digest(*secret.digest().as_bytes());
    let view = call.service.read(Default::default()).await?;
    let enrolment = view.enrolment_by_digest(&digest)?.ok_or_else(invalid)?;
    drop(view);
    // What no certificate can be made of must not use up the secret, nor leave a member behind that never comes (I14).
    issue(&call.service, &body.csr_pem, &subject_if_enrolled(&body.joiner))?;
    let key = Digest::keyed("holdfast 2026 enrolling key v1", body.csr_pem.as_bytes());
    let request = RequestInfo { actor: Actor::Enrolling(enrolment.id), ..call.caller.request().clone() };
    let command = Command::Enrol { digest, key, joiner: body.joiner };
    let accepted = call.service.propose(&request, command).await?;
    let view = call.service.view_at_least(accepted.revision).await?;
    let Output::Enrolled(enrolled) = accepted.output else { return Err(vanished("enrolment")) };
    let members: Vec<_> = view.members()?.into_iter().filter(|m| !m.removed).collect();
    let subject = match enrolled {
        Enrolled::Member(id) => {
            let member = members.iter().find(|m| m.id == id).ok_or_else(|| vanished("member"))?;
            member_subject(member)
        }
        Enrolled::Node(id) => Subject::Node { id: id.to_string() },
        Enrolled::Edge(id) => Subject::Edge { id: id.to_string() },
    };
    let certificate = issue(&call.service, &body.csr_pem, &subject)?;
    let cluster = view.cluster()?.ok_or_else(|| vanished("cluster"))?;
    // A member signs in its turn; the CA's key travels to members only, over TLS that the joiner has verified by pin.
    let ca_key = matches!(enrolment.kind, EnrolmentKind::Member | EnrolmentKind::Learner)
        .then(|| call.service.authority.to_pem().as_str().to_owned());
    let sealing_keys = match (&ca_key, &call.service.keys) {
        (Some(_), Some(keys)) => Some(keys.to_text()),
        _ => None,
    };
    let item = EnrolAnswer {
        cluster: cluster.id,
        incarnation: cluster.incarnation,
        enrolled,
        certificate_pem: certificate,
        ca_pem: call.service.authority.certificate().pem(),
        members,
        ca_key_pem: ca_key,
        sealing_keys,
    };
    Ok(created(accepted.revision, item))
}

/// The subject of a joiner that has no id yet, for a certificate that is thrown away.
fn subject_if_enrolled(joiner: &Joiner) -> Subject {
    match joiner {
        Joiner::Member(new) => member_subject(&Member {
            id: MemberId(u64::MAX),
            name: new.name.clone(),
            raft_addr: new.raft_addr.clone(),
            api_addr: new.api_addr.clone(),
            removed: false,
            created_at: Timestamp(0),
        }),
        Joiner::Node { .. } => Subject::Node { id: NodeId::from_bits(0).to_string() },
        Joiner::Edge { .. } => Subject::Edge { id: EdgeId::from_bits(0).to_string() },
    }
}

/// The certificate's subject for a member: reachable under the hosts of its addresses.
pub fn member_subject(member: &Member) -> Subject {
    let (mut host_names, mut addresses) = (Vec::new(), Vec::new());
    for endpoint in [&member.api_addr, &member.raft_addr] {
        let host = endpoint.rsplit_once(':').map_or(endpoint.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        match host.parse::<IpAddr>() {
            Ok(address) if !addresses.contains(&address) => addresses.push(address),
            Err(_) if !host_names.iter().any(|h| h == host) => host_names.push(host.to_owned()),
            _ => {}
        }
    }
    Subject::Member { id: member.id.to_string(), host_names, addresses }
}

/// Signs a request for `subject`.
pub(super) fn issue(service: &Service, csr_pem: &str, subject: &Subject) -> Result<String, Refusal> {
    let issued = service.authority.issue(csr_pem, subject, CERTIFICATE_VALIDITY, SystemTime::now());
    let issued = issued.map_err(|e| Refusal::invalid(e.to_string()))?;
    Ok(issued.chain_pem)
}
