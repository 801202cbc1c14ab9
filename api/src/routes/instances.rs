//! Instances, and questions to the nodes that run them: these travel over the stream that a node dialled, through
//! whichever member holds that stream.

use super::apps::env;
use crate::contacts::AskError;
use crate::endpoint::{Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, found, page};
use crate::service::{Service, fresh_request_id, now};
use axum::response::{IntoResponse, Response};
use holdfast_model::agent::{AgentCall, CallAnswer};
use holdfast_model::api::{Answer, InstanceStatus, Page};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::HEARTBEAT_MS;
use holdfast_model::resource::{Instance, InstanceState};
use holdfast_model::{Code, NodeId, Scope};
use holdfast_store::Views;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long a question waits for a line at most, in milliseconds.
const WAIT_MS_MAX: u64 = 10_000;
/// For an agent's answer beyond what it was asked to wait, in milliseconds.
const ANSWER_MS: u64 = 5_000;
/// Where a member asks another to put a question to an agent.
const ASK_PATH: &str = "/v1/members/ask";

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get("/v1/envs/{env}/instances", Need::Scope(Scope::EnvsRead), "List an env's instances")
            .query(&[("all", "true: also those that ended.")])
            .reads()
            .answers::<Page<InstanceStatus>>(200),
        list,
    );
    table.add(
        Endpoint::get("/v1/instances/{instance}", Need::Scope(Scope::EnvsRead), "Show an instance")
            .reads()
            .answers::<Answer<InstanceStatus>>(200),
        show,
    );
    table.add(
        Endpoint::post(
            ASK_PATH,
            Need::Member,
            "Put another member's question to an agent whose stream ends here",
        ),
        ask_here,
    );
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let env = env(&call, &view, call.id("env", "env")?)?;
    let all = call.query::<bool>("all")?.unwrap_or(false);
    let mut items = view.instances(env.id)?;
    items.retain(|i| all || !i.state.is_final());
    let items = items.into_iter().map(|i| with_progress(&call.service, i)).collect();
    Ok(page(view.revision(), items, None))
}

async fn show(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let instance = view.instance(call.id("instance", "instance")?)?;
    let instance = call.caller.visible("instance", instance, |i| i.org)?;
    Ok(found(view.revision(), with_progress(&call.service, instance)))
}

/// With what the instance's own node last told of its image, while that is news: neither after the instance was up, nor when
/// the node has been silent.
fn with_progress(service: &Service, instance: Instance) -> InstanceStatus {
    let waits = instance.state == InstanceState::Booting;
    let within = Duration::from_millis(3 * HEARTBEAT_MS);
    let told = || service.contacts.pull(instance.node, instance.id, within);
    let image_progress = if waits { told() } else { None };
    InstanceStatus { instance, image_progress }
}

/// A question that another member passes on.
#[derive(Serialize, Deserialize)]
struct Ask {
    node: NodeId,
    question: Vec<u8>,
    wait_ms: u64,
}

/// Puts a question to a node, over whichever member holds its stream.
pub(super) async fn ask(
    service: &Service,
    node: NodeId,
    question: AgentCall,
    wait_ms: u64,
) -> Result<CallAnswer, Refusal> {
    let agent = AgentRef::Node(node);
    if service.contacts.is_here(agent) {
        return ask_locally(service, agent, question, wait_ms).await;
    }
    let unreachable = || {
        let detail = "The instance's node holds no stream to the control plane now; try again.";
        Refusal::new(Code::AgentUnreachable, detail)
    };
    let question = postcard::to_stdvec(&question).map_err(|e| Refusal::internal(&e))?;
    let body = serde_json::to_vec(&Ask { node, question, wait_ms }).map_err(|e| Refusal::internal(&e))?;
    // Where an agent reports is not always where its stream ends, so all are asked; only who has the stream passes the
    // question on, and the others say so at once.
    let others = service.view()?.members()?.into_iter().filter(|m| !m.removed && m.id != service.member);
    let asked = others.map(|member| {
        let body = body.clone();
        Box::pin(async move {
            match service.peers.post(&member.api_addr, ASK_PATH, body).await? {
                (200, bytes) => postcard::from_bytes(&bytes).map_err(|e| Refusal::internal(&e)),
                _ => Err(unreachable()),
            }
        })
    });
    let asked: Vec<_> = asked.collect();
    if asked.is_empty() {
        return Err(unreachable());
    }
    let (answer, _) = futures::future::select_ok(asked).await.map_err(|_| unreachable())?;
    Ok(answer)
}

async fn ask_locally(
    service: &Service,
    agent: AgentRef,
    question: AgentCall,
    wait_ms: u64,
) -> Result<CallAnswer, Refusal> {
    let answer = service.contacts.ask(agent, fresh_request_id(now()), question).map_err(|e| match e {
        AskError::Older => {
            Refusal::new(Code::AgentUnreachable, "The node's agent is of an older release; upgrade it.")
        }
        AskError::NotHere => Refusal::new(Code::AgentUnreachable, "The node holds no stream now; try again."),
        AskError::Busy => {
            Refusal::new(Code::RateLimited, "Too many questions wait for that node; try again.")
        }
    })?;
    match tokio::time::timeout(Duration::from_millis(wait_ms + ANSWER_MS), answer).await {
        Ok(Ok(answer)) => Ok(answer),
        _ => Err(Refusal::new(Code::AgentUnreachable, "The node did not answer in time; try again.")),
    }
}

async fn ask_here(call: Call, Body(ask): Body<Ask>) -> Result<Response, Refusal> {
    let question = postcard::from_bytes(&ask.question)
        .map_err(|_| Refusal::invalid("The question is not one that this build knows."))?;
    let wait_ms = ask.wait_ms.min(WAIT_MS_MAX);
    let answer = ask_locally(&call.service, AgentRef::Node(ask.node), question, wait_ms).await?;
    Ok(postcard::to_stdvec(&answer).map_err(|e| Refusal::internal(&e))?.into_response())
}
