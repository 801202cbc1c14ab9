//! Running a program in an instance: a grant, then one session by it, whose bytes a member passes on.

use super::apps::{env, vanished};
use super::instances::ask;
use crate::endpoint::{Endpoint, Need, Table};
use crate::exec::{FrameReader, FrameWriter, NodePart, Session, relay};
use crate::problem::Refusal;
use crate::request::{Body, Call, created, done, page};
use crate::service::{RequestInfo, Service, now};
use axum::body::Body as HttpBody;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use holdfast_identity::{Token as Secret, TokenKind as SecretKind};
use holdfast_model::agent::{AgentCall, CallAnswer};
use holdfast_model::api::{Answer, CreateExecGrant, CreatedExecGrant, Done, Page};
use holdfast_model::command::AgentRef;
use holdfast_model::exec::{
    EXEC_MEDIA_TYPE, ExecCall, ExecEnd, ExecGrant, ExecInput, ExecOutput, ExecProgram,
};
use holdfast_model::limits::{EXEC_SESSION_MS, EXEC_USE_WITHIN_MS_MAX};
use holdfast_model::{Code, Command, Digest, ExecGrantId, Output, Scope};
use holdfast_store::Views;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a person may take to say what to run, in milliseconds.
const FIRST_FRAME_MS_MAX: u64 = 5_000;
/// How long a node may take to dial, once it said that it does, in milliseconds.
const NODE_MS_MAX: u64 = 10_000;
/// How often the end of a session is written down again when that fails, and the first pause between, in milliseconds.
const END_TRIES_MAX: u32 = 6;
const END_PAUSE_MS: u64 = 250;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let need = Need::Scope(Scope::ExecCreate);
    table.add(
        Endpoint::post("/v1/instances/{instance}/exec", need, "Get a grant to run one program, once")
            .body::<CreateExecGrant>()
            .answers::<Answer<CreatedExecGrant>>(201),
        create,
    );
    table.add(
        Endpoint::get("/v1/envs/{env}/exec", need, "List an env's exec grants and sessions")
            .reads()
            .answers::<Page<ExecGrant>>(200),
        list,
    );
    table.add(
        Endpoint::delete("/v1/exec/{grant}", need, "Take an exec grant away, and cut its session")
            .answers::<Done>(200),
        revoke,
    );
    table.add(
        Endpoint::post("/v1/exec/{grant}/session", need, "Use an exec grant up: frames in both directions")
            .streams(),
        open,
    );
    table.add(
        Endpoint::post(
            "/v1/agent/exec/{grant}",
            Need::Agent,
            "Take a node's part of an exec session: frames",
        )
        .streams(),
        take_part,
    );
}

async fn create(call: Call, Body(body): Body<CreateExecGrant>) -> Result<Response, Refusal> {
    let instance = {
        let view = call.view().await?;
        let instance = view.instance(call.id("instance", "instance")?)?;
        call.caller.visible("instance", instance, |i| i.org)?.id
    };
    let secret = call.service.seed.token(SecretKind::Exec, call.caller.request());
    let command = Command::CreateExecGrant {
        instance,
        class: body.class,
        terminal: body.terminal,
        digest: Digest(*secret.digest().as_bytes()),
        use_within_ms: EXEC_USE_WITHIN_MS_MAX,
        session_ms: body.session_s.map_or(EXEC_SESSION_MS, |s| s.saturating_mul(1_000)),
    };
    let (accepted, view) = call.service.write(&call.caller, command).await?;
    let Output::ExecGrant(id) = accepted.output else { return Err(vanished("exec grant")) };
    let grant = view.exec_grant(id)?.ok_or_else(|| vanished("exec grant"))?;
    Ok(created(accepted.revision, CreatedExecGrant { grant, secret: secret.reveal().as_str().to_owned() }))
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    Ok(page(view.revision(), view.exec_grants_of(env.id)?, None))
}

async fn revoke(call: Call) -> Result<Response, Refusal> {
    let grant = call.id("grant", "exec grant")?;
    {
        let found = call.view().await?.exec_grant(grant)?;
        call.caller.visible("exec grant", found, |g| g.org)?;
    }
    let command = Command::EndExecGrant { grant, end: ExecEnd::Revoked, code: None, lasted_ms: 0 };
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

/// Uses the grant up, waits for the node, and passes the session on.
async fn open(call: Call, body: HttpBody) -> Result<Response, Refusal> {
    let id: ExecGrantId = call.id("grant", "exec grant")?;
    let mut from_person = FrameReader::new(body);
    let first = tokio::time::timeout(Duration::from_millis(FIRST_FRAME_MS_MAX), from_person.next());
    let Ok(Some(ExecInput::Open { secret, program })) = first.await else {
        return Err(Refusal::invalid("An exec session begins with a frame that says what to run."));
    };
    if !program.is_within_bounds() {
        let detail = "The command is not within bounds: 256 arguments, 32 KiB in all, and no NUL bytes.";
        return Err(Refusal::invalid(detail));
    }
    let grant = {
        let found = call.view().await?.exec_grant(id)?;
        call.caller.visible("exec grant", found, |g| g.org)?
    };
    let service = &call.service;
    // Before the grant is used: a used grant without a place here is one that an earlier process left.
    let (seat, comes) = service.exec.expect(id, grant.node)?;
    use_up(&call, id, &secret, &program).await?;
    let session =
        Session { grant: id, began: Instant::now(), lasts: Duration::from_millis(grant.session_ms) };
    // From here on the end is written down, whatever comes.
    let mut record = Record { service: Arc::clone(service), grant: id, began: session.began, ended: None };
    let node_part = match meet(service, &grant, program, comes).await {
        Ok(part) => part,
        Err((end, refusal)) => {
            record.ended = Some((end, None));
            return Err(refusal);
        }
    };
    let (to_person, answer) = FrameWriter::<ExecOutput>::new();
    let (service, caller) = (Arc::clone(service), call.caller.clone());
    tokio::spawn(async move {
        // Both are dropped when the session is over, the record last.
        let mut record = record;
        let _seat = seat;
        let ended = relay(&service, &session, &caller, from_person, to_person, node_part).await;
        record.ended = Some((ended.end, ended.code));
    });
    Ok(([(header::CONTENT_TYPE, EXEC_MEDIA_TYPE)], answer).into_response())
}

/// Uses a grant up: from here on it is good for nothing else, on any member.
async fn use_up(call: &Call, id: ExecGrantId, secret: &str, program: &ExecProgram) -> Result<(), Refusal> {
    // A text that is no secret uses nothing, as a wrong one.
    let secret = Secret::parse(secret).ok().filter(|secret| secret.kind() == SecretKind::Exec);
    let secret = secret.ok_or_else(|| Refusal::not_found("exec grant"))?;
    let command = Command::UseExecGrant {
        grant: id,
        digest: Digest(*secret.digest().as_bytes()),
        class: program.class(),
        terminal: program.terminal.is_some(),
        member: call.service.member,
    };
    // Never under a key: the answer to a repeat would be the first one's, and the grant used twice.
    let request = RequestInfo { idempotency_key: None, ..call.caller.request().clone() };
    let accepted = call.service.propose(&request, command).await?;
    // What watches the session must find the grant used, and not gone.
    call.service.view_at_least(accepted.revision).await?;
    Ok(())
}

/// Asks the node for its part, and waits for it.
async fn meet(
    service: &Arc<Service>,
    grant: &ExecGrant,
    program: ExecProgram,
    comes: oneshot::Receiver<NodePart>,
) -> Result<NodePart, (ExecEnd, Refusal)> {
    let lost = |refusal| (ExecEnd::Lost, refusal);
    let own = service.view().and_then(|view| Ok(view.member(service.member)?)).map_err(lost)?;
    let own = own.ok_or_else(|| lost(Refusal::not_found("member")))?;
    let asked = AgentCall::Exec(Box::new(ExecCall {
        grant: grant.id,
        instance: grant.instance,
        member: own.api_addr,
        program,
        ends_in_ms: grant.session_ms,
    }));
    let unreached = |refusal| (ExecEnd::ConnectTimeout, refusal);
    match ask(service, grant.node, asked, 0).await.map_err(unreached)? {
        CallAnswer::ExecComes => {}
        CallAnswer::Refused { reason } => {
            return Err((ExecEnd::Refused, Refusal::new(Code::FailedPrecondition, reason)));
        }
        CallAnswer::NotFound | CallAnswer::Logs(_) | CallAnswer::LogChunk(_) => {
            let detail = "The instance's node does not know how to run programs; upgrade its agent.";
            return Err((ExecEnd::Refused, Refusal::new(Code::FailedPrecondition, detail)));
        }
    }
    match tokio::time::timeout(Duration::from_millis(NODE_MS_MAX), comes).await {
        Ok(Ok(part)) => Ok(part),
        _ => {
            let detail =
                "The instance's node did not dial this member in time; check that it can reach every member.";
            Err(unreached(Refusal::new(Code::AgentUnreachable, detail)))
        }
    }
}

/// A node dials for a session that it was asked to take part in.
async fn take_part(call: Call, body: HttpBody) -> Result<Response, Refusal> {
    let absent = || Refusal::not_found("exec grant");
    let AgentRef::Node(node) = call.caller.agent()? else { return Err(absent()) };
    let grant = call.id("grant", "exec grant")?;
    let (writer, answer) = FrameWriter::<ExecInput>::new();
    let part = NodePart { reader: FrameReader::new(body), writer, caller: call.caller.clone() };
    if !call.service.exec.arrived(grant, node, part) {
        return Err(absent());
    }
    Ok(([(header::CONTENT_TYPE, EXEC_MEDIA_TYPE)], answer).into_response())
}

/// Writes down how a session ended, also when what held it was dropped.
struct Record {
    service: Arc<Service>,
    grant: ExecGrantId,
    began: Instant,
    ended: Option<(ExecEnd, Option<i32>)>,
}

impl Drop for Record {
    fn drop(&mut self) {
        // Dropped unfinished, the person left while the node was awaited.
        let (end, code) = self.ended.unwrap_or((ExecEnd::ClientDisconnect, None));
        let lasted_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let (service, grant) = (Arc::clone(&self.service), self.grant);
        let command = Command::EndExecGrant { grant, end, code, lasted_ms };
        tokio::spawn(async move { write_down(&service, grant, command).await });
    }
}

async fn write_down(service: &Service, grant: ExecGrantId, command: Command) {
    let request = RequestInfo::of_member(service.member);
    for attempt in 0..END_TRIES_MAX {
        match service.propose(&request, command.clone()).await {
            Ok(_) => return,
            Err(refusal) => {
                tracing::debug!(%grant, %refusal, "the end of an exec session is not written down yet")
            }
        }
        let pause = END_PAUSE_MS << attempt;
        let jitter = u64::try_from(crate::service::entropy() % u128::from(END_PAUSE_MS)).unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(pause + jitter)).await;
    }
    tracing::warn!(%grant, time = ?now(), "the end of an exec session was not written down; its time will end it");
}
