//! What an instance wrote, as a stream of JSON lines. They are not replicated: they come from the node that has them, over
//! the stream that the node dialled, a bounded piece at a time and only as fast as the reader takes them.
//!
//! A member keeps nothing of a reader but its cursor, which the reader has too: it goes on with another member where it
//! was. A reader whose token ends is cut (I11).

use super::instances::ask;
use crate::caller::{Caller, still_holds};
use crate::endpoint::{CONSISTENCY, Endpoint, Need, Table};
use crate::log_readers::Reading;
use crate::problem::Refusal;
use crate::request::Call;
use crate::service::{Service, moved_past, now, told_to_stop};
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::Stream;
use holdfast_model::agent::{AgentCall, CallAnswer};
use holdfast_model::api::NDJSON_MEDIA_TYPE;
use holdfast_model::logs::{LogChunk, LogCursor, LogRecord, LogStart};
use holdfast_model::{Code, InstanceId, NodeId, Scope};
use holdfast_store::Views;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Bytes of lines that are asked for at a time.
const CHUNK_BYTES: u32 = 32 * 1024;
/// Pieces that wait for a slow reader before it holds up its own stream.
const CHUNKS_QUEUED_MAX: usize = 1;
/// How long a reader may take nothing while the queue is full, before its stream is cut, in milliseconds.
const TAKE_MS_MAX: u64 = 60_000;
/// How long a node waits for a line, in milliseconds. An idle stream is touched as often, so that both ends notice when the
/// other is gone.
const WAIT_MS: u64 = 8_000;
/// Between two looks while a node has nothing, or is away, in milliseconds; half as much again at random.
const PAUSE_MS: u64 = 500;
/// Looks at a node that is away for the lines of an instance that has ended, at most: its agent may just be restarting.
const ENDED_LOOKS_MAX: u32 = 6;
/// Between two looks at the reader's token at least, and at most, in milliseconds.
const TOKEN_LOOK_MS: (u64, u64) = (100, 1_000);

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get(
            "/v1/instances/{instance}/logs",
            Need::Scope(Scope::LogsRead),
            "Read an instance's lines as JSON lines, and follow them",
        )
        .query(&[
            ("follow", "true: go on with what is written, until the instance has ended."),
            ("cursor", "Behind the line that carried this cursor, from whichever member; else:"),
            ("since_ms", "with the first line at or after this time, in milliseconds since the Unix epoch;"),
            ("tail", "with the last so many of these lines."),
            CONSISTENCY,
        ])
        .streams()
        .answers::<LogRecord>(200),
        read,
    );
}

async fn read(call: Call) -> Result<Response, Refusal> {
    let start = LogStart {
        after: call.query::<LogCursor>("cursor")?,
        since_ms: call.query::<u64>("since_ms")?.unwrap_or(0),
        tail: call.query::<u64>("tail")?,
    };
    let follow = call.query::<bool>("follow")?.unwrap_or(false);
    let instance = {
        let view = call.view().await?;
        let instance = view.instance(call.id("instance", "instance")?)?;
        call.caller.visible("instance", instance, |i| i.org)?
    };
    let reading = call.service.contacts.log_readers.begin(instance.org)?;
    let reader =
        Reader { service: Arc::clone(&call.service), caller: call.caller, instance: instance.id, follow };
    let lines = stream(reader, reading, start);
    Ok(([(header::CONTENT_TYPE, NDJSON_MEDIA_TYPE)], Body::from_stream(lines)).into_response())
}

/// What is said of an instance that has ended and whose node is away.
const ENDED_AND_AWAY: &str = "The instance has ended, and its node holds no stream to the control plane: what it wrote last cannot be read until the node is back.";

struct Reader {
    service: Arc<Service>,
    caller: Caller,
    instance: InstanceId,
    follow: bool,
}

fn stream(
    reader: Reader,
    reading: Reading,
    start: LogStart,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
    let (out, receiver) = mpsc::channel(CHUNKS_QUEUED_MAX);
    tokio::spawn(async move {
        let _reading = reading;
        let mut stopping = reader.service.stopping.clone();
        let ended = tokio::select! {
            ended = reader.talk(start, &out) => ended,
            refusal = reader.no_longer_may() => Err(refusal),
            () = out.closed() => Ok(()),
            () = told_to_stop(&mut stopping) => Ok(()),
        };
        if let Err(refusal) = ended {
            tracing::debug!(%refusal, "a reader of lines was cut");
        }
    });
    futures::stream::unfold(receiver, |mut r| async move { r.recv().await.map(|bytes| (Ok(bytes), r)) })
}

impl Reader {
    /// Sends lines until all that was asked for is sent, or the reader is gone.
    async fn talk(&self, mut start: LogStart, out: &mpsc::Sender<Bytes>) -> Result<(), Refusal> {
        let (mut away, mut ended_looks) = (false, 0);
        loop {
            // What had ended before the question was asked writes nothing after it.
            let (node, ended) = self.place()?;
            let last = !self.follow || ended;
            let (instance, bytes, wait_ms) = (self.instance, CHUNK_BYTES, if last { 0 } else { WAIT_MS });
            let question = AgentCall::ReadLogs { instance, start, bytes, wait_ms };
            match ask(&self.service, node, question, wait_ms).await {
                Ok(CallAnswer::LogChunk(chunk)) => {
                    away = false;
                    let (next, more, idle) = (chunk.next, chunk.more, chunk.entries.is_empty());
                    let cursor = Some(next);
                    send(out, &records(chunk)?).await?;
                    start = LogStart { after: cursor, ..LogStart::default() };
                    if !more && last {
                        return send(out, &json(&LogRecord::End { cursor })?).await;
                    }
                    if !more && idle {
                        pause().await;
                    }
                }
                // The node has not begun with it yet, or keeps nothing of it any more.
                Ok(CallAnswer::NotFound) if last => {
                    return send(out, &json(&LogRecord::End { cursor: start.after })?).await;
                }
                Ok(CallAnswer::NotFound) => {
                    send(out, b"\n").await?;
                    pause().await;
                }
                Ok(_) => {
                    return Err(Refusal::new(Code::Internal, "A node answered another question."));
                }
                Err(refusal) => {
                    ended_looks += u32::from(ended);
                    if self.follow && ended_looks >= ENDED_LOOKS_MAX {
                        let detail = ENDED_AND_AWAY.to_owned();
                        return send(out, &json(&LogRecord::Away { detail, ended: true })?).await;
                    }
                    let detail = refusal.detail.clone();
                    let said =
                        if away { b"\n".to_vec() } else { json(&LogRecord::Away { detail, ended: false })? };
                    send(out, &said).await?;
                    if !self.follow {
                        return Err(refusal);
                    }
                    away = true;
                    pause().await;
                }
            }
        }
    }

    /// The node that has the lines, and whether the instance has ended.
    fn place(&self) -> Result<(NodeId, bool), Refusal> {
        let instance = self.service.view()?.instance(self.instance)?;
        let instance = self.caller.visible("instance", instance, |i| i.org)?;
        Ok((instance.node, instance.state.is_final()))
    }

    /// Ends when the reader's token no longer holds (I11).
    async fn no_longer_may(&self) -> Refusal {
        let mut revisions = self.service.consensus.revisions();
        loop {
            let seen = match self.service.view() {
                Ok(view) => still_holds(&self.caller, &view, now()).map(|()| view.revision()),
                Err(refusal) => Err(refusal),
            };
            let revision = match seen {
                Ok(revision) => revision,
                Err(refusal) => return refusal,
            };
            tokio::time::sleep(Duration::from_millis(TOKEN_LOOK_MS.0)).await;
            // A token also ends by itself.
            let moved = moved_past(&mut revisions, revision);
            tokio::time::timeout(Duration::from_millis(TOKEN_LOOK_MS.1), moved).await.ok();
        }
    }
}

/// A piece as JSON lines; an empty line, which readers skip, where there is none.
fn records(chunk: LogChunk) -> Result<Vec<u8>, Refusal> {
    let mut text = Vec::new();
    if chunk.missed > 0 {
        text.extend(json(&LogRecord::Dropped { lines: chunk.missed })?);
    }
    for entry in chunk.entries {
        text.extend(json(&entry.into_record(chunk.next.epoch))?);
    }
    if text.is_empty() {
        text.push(b'\n');
    }
    Ok(text)
}

fn json(record: &LogRecord) -> Result<Vec<u8>, Refusal> {
    let mut text = serde_json::to_vec(record).map_err(|e| Refusal::internal(&e))?;
    text.push(b'\n');
    Ok(text)
}

async fn send(out: &mpsc::Sender<Bytes>, text: &[u8]) -> Result<(), Refusal> {
    let taken = out.send(Bytes::copy_from_slice(text));
    match tokio::time::timeout(Duration::from_millis(TAKE_MS_MAX), taken).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(Refusal::new(Code::Timeout, "The reader took no line for too long.")),
    }
}

async fn pause() {
    let pause = Duration::from_millis(PAUSE_MS);
    tokio::time::sleep(pause.mul_f64(rand::random_range(1.0..1.5))).await;
}
