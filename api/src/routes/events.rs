//! The history, readable: a page, or a stream that goes on.

use crate::caller::{Caller, still_holds};
use crate::endpoint::{CONSISTENCY, Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Call, found, page};
use crate::service::{Service, moved_past, now, told_to_stop};
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use data_encoding::BASE64;
use futures::Stream;
use holdfast_model::api::{Answer, Consistency, NDJSON_MEDIA_TYPE, Page};
use holdfast_model::audit::{AuditCheckpoint, CHECKPOINT_PURPOSE};
use holdfast_model::{Code, Event, Revision, Scope};
use holdfast_store::{View, Views};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Events read from the store at a time.
const BATCH_MAX: usize = 200;
/// Batches that wait for a slow reader before it holds up its own stream.
const BATCHES_QUEUED_MAX: usize = 4;
/// How long a reader may take nothing while the queue is full, before its stream is cut, in milliseconds.
const TAKE_MS_MAX: u64 = 60_000;
/// How often an idle stream is touched, so that both ends notice when the other is gone, in milliseconds.
const KEEPALIVE_MS: u64 = 10_000;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get(
            "/v1/events",
            Need::Scope(Scope::AuditRead),
            "Read the history, or follow it as JSON lines",
        )
        .query(&[
            ("after", "Only events after this revision; from the beginning without it."),
            ("limit", "Events on the page: 50 by default, 200 at most."),
            ("follow", "true: a stream of JSON lines without an end."),
            CONSISTENCY,
        ])
        .streams()
        .answers::<Page<Event>>(200),
        list,
    );
    table.add(
        Endpoint::get(
            "/v1/events/checkpoint",
            Need::Operator(Scope::AuditRead),
            "How the chain of events stands, signed by the cluster's authority",
        )
        .answers::<Answer<AuditCheckpoint>>(200),
        checkpoint,
    );
}

/// Signs how the history of this moment ends: every event that was acknowledged before is in it (I3, I12).
async fn checkpoint(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let cluster = view.cluster()?.ok_or_else(|| Refusal::not_found("cluster"))?;
    let revision = view.revision();
    let last = view.event(revision)?.ok_or_else(|| Refusal::not_found("event"))?;
    let mut checkpoint = AuditCheckpoint {
        cluster: cluster.id,
        incarnation: cluster.incarnation,
        revision,
        chain: last.chain,
        signed_at: now(),
        signature: String::new(),
    };
    let signature =
        call.service.authority.sign_statement(CHECKPOINT_PURPOSE, &checkpoint.statement()).map_err(
            |error| Refusal::new(Code::Internal, format!("The checkpoint could not be signed: {error}.")),
        )?;
    checkpoint.signature = BASE64.encode(&signature);
    Ok(found(revision, checkpoint))
}

async fn list(call: Call) -> Result<Response, Refusal> {
    let after = call.query::<Revision>("after")?.unwrap_or_default();
    let (view, limit) = (call.view().await?, call.limit()?);
    check_held(&view, after, call.consistency()?)?;
    if call.query::<bool>("follow")?.unwrap_or(false) {
        drop(view);
        let lines = follow(Arc::clone(&call.service), call.caller, after);
        return Ok(([(header::CONTENT_TYPE, NDJSON_MEDIA_TYPE)], Body::from_stream(lines)).into_response());
    }
    let read = view.events(after, limit, call.caller.org())?;
    let next = (read.scanned_to < view.revision()).then(|| read.scanned_to.to_string());
    Ok(page(view.revision(), read.events, next))
}

/// Refuses to go on after a revision of which this history cannot say what came next. A reader begins again where the
/// answer says.
fn check_held(view: &View, after: Revision, consistency: Consistency) -> Result<(), Refusal> {
    // A member that may lag does not know what comes.
    let last = if consistency == Consistency::Linearizable { view.revision() } else { Revision(u64::MAX) };
    match lost(after, view.first_held()?.unwrap_or(Revision(1)), last) {
        None => Ok(()),
        Some((start, why)) => {
            let detail = format!("{why} Read the state, then go on after revision {start}.");
            Err(Refusal::new(Code::Compacted, detail).with("start_after", start))
        }
    }
}

/// Where a reader that asks for what came after `after` must start instead, and why: the events are no longer held, or
/// they belong to a history that another incarnation replaced. `None` when it may have what it asks for.
fn lost(after: Revision, first_held: Revision, last: Revision) -> Option<(Revision, String)> {
    if after > last {
        let why =
            format!("The history ends before revision {after}: a new incarnation replaced what came after.");
        return Some((last, why));
    }
    if after.next() < first_held {
        let before = Revision(first_held.0.saturating_sub(1));
        let why = format!("The events from revision {} to {before} are no longer held.", after.next());
        return Some((before, why));
    }
    None
}

fn follow(
    service: Arc<Service>,
    caller: Caller,
    after: Revision,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
    let (lines, receiver) = mpsc::channel(BATCHES_QUEUED_MAX);
    tokio::spawn(async move {
        if let Err(refusal) = pump(&service, &caller, after, &lines).await {
            tracing::debug!(%refusal, "an event stream was cut");
        }
    });
    futures::stream::unfold(receiver, |mut r| async move { r.recv().await.map(|bytes| (Ok(bytes), r)) })
}

/// Sends events until the reader leaves, the member stops, or the token ends (I11).
async fn pump(
    service: &Service,
    caller: &Caller,
    after: Revision,
    lines: &mpsc::Sender<Bytes>,
) -> Result<(), Refusal> {
    let mut sent = after;
    let mut revisions = service.consensus.revisions();
    let mut stopping = service.stopping.clone();
    loop {
        let (text, reached, current) = {
            let view = service.view()?;
            still_holds(caller, &view, now())?;
            let read = view.events(sent, BATCH_MAX, caller.org())?;
            let mut text = Vec::new();
            for event in &read.events {
                serde_json::to_writer(&mut text, event).map_err(|e| Refusal::internal(&e))?;
                text.push(b'\n');
            }
            (text, read.scanned_to, view.revision())
        };
        sent = reached.max(sent);
        if !text.is_empty() {
            let taken = tokio::time::timeout(Duration::from_millis(TAKE_MS_MAX), lines.send(text.into()));
            if !matches!(taken.await, Ok(Ok(()))) {
                return Ok(());
            }
        }
        if sent < current {
            continue;
        }
        let moved = moved_past(&mut revisions, sent);
        tokio::select! {
            moved = tokio::time::timeout(Duration::from_millis(KEEPALIVE_MS), moved) => match moved {
                Ok(true) => {}
                // The member stopped applying for good: nothing will ever come.
                Ok(false) => return Ok(()),
                // An empty line is no JSON value and readers skip it.
                Err(_) => if lines.send(Bytes::from_static(b"\n")).await.is_err() {
                    return Ok(());
                },
            },
            () = lines.closed() => return Ok(()),
            () = told_to_stop(&mut stopping) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_is_sent_to_the_first_revision_after_which_nothing_is_missing() {
        let start = |after, first, last| lost(Revision(after), Revision(first), Revision(last)).map(|l| l.0);
        assert_eq!(start(0, 1, 9), None);
        assert_eq!(start(9, 1, 9), None);
        assert_eq!(start(10, 1, 9), Some(Revision(9)));
        assert_eq!(start(0, 5, 9), Some(Revision(4)));
        assert_eq!(start(3, 5, 9), Some(Revision(4)));
        // Where it is sent it is served.
        assert_eq!(start(4, 5, 9), None);
        assert_eq!(start(9, 5, 9), None);
    }
}
