//! What clients ask, and what they are told: apps of one org come and go under a few names, and routes under a few hostnames,
//! which two envs compete for.
//!
//! A name is a register that holds an app or a route, or nothing. Most requests are HTTP requests to a member's API. Some writes are
//! proposals below it, without an idempotency key: what members propose by themselves, and send again by its request id.

use std::fmt;

use axum::http::StatusCode;
use holdfast_model::api::{Done, Page, Problem};
use holdfast_model::resource::{App, Route};
use holdfast_model::{
    Actor, AppId, AppName, Code, Command, Context, EdgeId, EnvId, Hostname, OrgId, Outcome, Output, Proposal,
    RequestId, Revision, RouteId, Timestamp, TokenId,
};
use rand::RngExt;
use rand::rngs::StdRng;
use serde::de::DeserializeOwned;

use crate::api_member::{self, ApiMember};
use crate::machine;

/// As whom clients act, and where.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) operator: TokenId,
    /// The operator's token, as it is shown.
    pub(crate) secret: String,
    pub(crate) org: OrgId,
    /// Envs of two orgs, where routes are made.
    pub(crate) envs: Vec<EnvId>,
    /// An app with most of the routes.
    pub(crate) crowded: AppId,
    pub(crate) edges: Vec<EdgeId>,
}

/// What clients name things by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Name {
    App(AppName),
    Host(Hostname),
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::App(name) => name.fmt(f),
            Name::Host(name) => name.fmt(f),
        }
    }
}

/// What has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Thing {
    App(AppId),
    Route(RouteId),
}

/// How a write is asked for, the same each time that it is.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// From the API, with this idempotency key.
    Http(String),
    /// Below the API.
    Proposal(Box<Proposal>),
}

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    /// Make an app of this name.
    Create(Way),
    /// Make a route of this hostname in an env.
    Claim(EnvId, Way),
    /// Delete what has this id, and was made under this name.
    Delete(Thing, Way),
    /// Which app has this name?
    Read,
    /// Which app had this name a moment ago?
    StaleRead,
}

impl Question {
    /// Whether it changes something: then it may be repeated, and is told the same again.
    pub(crate) fn writes(&self) -> bool {
        matches!(self, Question::Create(_) | Question::Claim(..) | Question::Delete(..))
    }
}

/// What a client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It was made.
    Created(Thing, Revision),
    /// The name is taken.
    Taken,
    /// It was deleted.
    Deleted(Revision),
    /// There is no such thing.
    Absent,
    /// The app of that name, and the revision that was read.
    Found(Option<Thing>, Revision),
}

/// An answer, or why there is none.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Answer(Answer),
    /// Nothing is known; ask again. The reason is for the trace.
    Nothing(#[expect(dead_code, reason = "read by Debug, for the trace")] String),
    /// The member failed. Right when its disk did, and wrong otherwise.
    Failed(String),
    /// An answer that may never be given.
    Wrong(String),
}

/// How a client's write is asked for.
pub(crate) fn way(account: &Account, command: Command, rng: &mut StdRng) -> Way {
    let request: u128 = rng.random();
    if rng.random_bool(0.75) {
        return Way::Http(format!("key-{request:x}"));
    }
    let context = Context {
        actor: Actor::Operator(account.operator),
        actor_org: None,
        source: None,
        request_id: RequestId::from_bits(request),
        idempotency_key: None,
        now: Timestamp(machine::wall_ms()),
        entropy: rng.random(),
    };
    Way::Proposal(Box::new(Proposal { context, command }))
}

/// Asks a member.
pub(crate) async fn ask(member: ApiMember, account: Account, name: Name, question: Question) -> Told {
    let apps = format!("/v1/orgs/{}/apps", account.org);
    let secret = &account.secret;
    match question {
        Question::Create(Way::Proposal(proposal))
        | Question::Claim(_, Way::Proposal(proposal))
        | Question::Delete(_, Way::Proposal(proposal)) => match member.consensus.propose(*proposal).await {
            Ok(outcome) => judge(outcome),
            Err(error) => Told::Nothing(error.to_string()),
        },
        Question::Create(Way::Http(key)) => {
            let body = format!("{{\"name\":\"{name}\"}}");
            let told = http(&member, "POST", &apps, secret, Some(&key), Some(body), StatusCode::CREATED);
            let refused = |failed| refused_create(failed, |id| id.parse().ok().map(Thing::App));
            told.await.map_or_else(refused, |made: holdfast_model::api::Answer<App>| {
                Told::Answer(Answer::Created(Thing::App(made.item.id), made.revision))
            })
        }
        Question::Claim(env, Way::Http(key)) => {
            let body = route_body(&name.to_string());
            let path = format!("/v1/envs/{env}/routes");
            let told = http(&member, "POST", &path, secret, Some(&key), Some(body), StatusCode::CREATED);
            let refused = |failed| refused_create(failed, |id| id.parse().ok().map(Thing::Route));
            told.await.map_or_else(refused, |made: holdfast_model::api::Answer<Route>| {
                Told::Answer(Answer::Created(Thing::Route(made.item.id), made.revision))
            })
        }
        Question::Delete(thing, Way::Http(key)) => {
            let path = match thing {
                Thing::App(app) => format!("/v1/apps/{app}"),
                Thing::Route(route) => format!("/v1/routes/{route}"),
            };
            let told = http(&member, "DELETE", &path, secret, Some(&key), None, StatusCode::OK);
            told.await.map_or_else(refused, |done: Done| Told::Answer(Answer::Deleted(done.revision)))
        }
        Question::Read => read(&member, &format!("{apps}?name={name}"), secret).await,
        Question::StaleRead => read(&member, &format!("{apps}?name={name}&consistency=stale"), secret).await,
    }
}

/// A route of a hostname, as the API takes it.
pub(crate) fn route_body(hostname: &str) -> String {
    format!(
        "{{\"target\":{{\"tls_passthrough\":{{\"hostname\":\"{hostname}\"}}}},\"listen_port\":443,\"process\":\"web\",\"port\":\"https\"}}"
    )
}

/// Why the API gave no answer of the right kind.
enum Failed {
    Refused(Problem),
    Wrong(String),
}

/// One request to the API. Every answer must have the form that the API's document says.
async fn http<T: DeserializeOwned>(
    member: &ApiMember,
    method: &str,
    path: &str,
    secret: &str,
    key: Option<&str>,
    json: Option<String>,
    expected: StatusCode,
) -> Result<T, Failed> {
    let request = api_member::request(method, path, secret, key, json).map_err(Failed::Wrong)?;
    let (status, body) = member.ask(request).await.map_err(Failed::Wrong)?;
    let wrong = |e: serde_json::Error| {
        Failed::Wrong(format!("{status} with «{}»: {e}", String::from_utf8_lossy(&body)))
    };
    if status == expected {
        return serde_json::from_slice(&body).map_err(wrong);
    }
    Err(Failed::Refused(serde_json::from_slice(&body).map_err(wrong)?))
}

async fn read(member: &ApiMember, path: &str, secret: &str) -> Told {
    let told = http(member, "GET", path, secret, None, None, StatusCode::OK);
    told.await.map_or_else(refused, |page: Page<App>| match page.items.as_slice() {
        [] => Told::Answer(Answer::Found(None, page.revision)),
        [app] => Told::Answer(Answer::Found(Some(Thing::App(app.id)), page.revision)),
        many => Told::Wrong(format!("one name has {} apps", many.len())),
    })
}

/// A create that is repeated after what it made was deleted is told what that was.
fn refused_create(failed: Failed, parse: impl Fn(&str) -> Option<Thing>) -> Told {
    if let Failed::Refused(problem) = &failed
        && problem.code == Code::NotFound.as_str()
    {
        let id = problem.details.get("id").and_then(|id| parse(id));
        let revision = problem.details.get("made_at").and_then(|revision| revision.parse().ok());
        return match (id, revision) {
            (Some(id), Some(revision)) => Told::Answer(Answer::Created(id, Revision(revision))),
            _ => Told::Wrong(format!("it could not be made because nothing is there: {problem:?}")),
        };
    }
    refused(failed)
}

fn refused(failed: Failed) -> Told {
    match failed {
        Failed::Wrong(reason) => Told::Wrong(reason),
        Failed::Refused(problem) if problem.code == Code::NotFound.as_str() => Told::Answer(Answer::Absent),
        Failed::Refused(problem)
            if [Code::NameTaken, Code::HostnameTaken].iter().any(|code| problem.code == code.as_str()) =>
        {
            Told::Answer(Answer::Taken)
        }
        // Each of them says that the cluster could not answer now, and is repeated.
        Failed::Refused(problem) if problem.retryable && problem.status != 500 => Told::Nothing(problem.code),
        Failed::Refused(problem) if problem.status == 500 => Told::Failed(problem.code),
        Failed::Refused(problem) => Told::Wrong(format!("refused: {problem:?}")),
    }
}

fn judge(outcome: Outcome) -> Told {
    match outcome {
        Ok(accepted) => match accepted.output {
            Output::App(id) => Told::Answer(Answer::Created(Thing::App(id), accepted.revision)),
            Output::Route(id) => Told::Answer(Answer::Created(Thing::Route(id), accepted.revision)),
            Output::None => Told::Answer(Answer::Deleted(accepted.revision)),
            other => Told::Wrong(format!("an app or a route was asked for, and {other:?} was made")),
        },
        Err(rejection) => match rejection.code {
            Code::NotFound => Told::Answer(Answer::Absent),
            Code::NameTaken | Code::HostnameTaken => Told::Answer(Answer::Taken),
            code => Told::Wrong(format!("refused as {code:?}: {rejection:?}")),
        },
    }
}
