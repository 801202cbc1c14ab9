//! The events of a history, one after the other, each checked to be its chain's next (I12) and decoded.
//!
//! For a long history a second thread reads and checks ahead of whoever decodes and evolves: an event is freed by the
//! thread that made it, which allocators like, and the two threads have about as much to do. What is shown, and with which
//! error it ends, does not depend on that: an error comes after every event before it. A short history is not worth a
//! thread; the simulator, whose process has one, stays below.

use crate::error::StoreError;
use crate::event_bytes;
use holdfast_model::{Digest, Event, Revision};
use std::sync::mpsc::{SyncSender, sync_channel};

/// From so many events on a second thread is used. In tests few are many, so that they take both ways.
pub(crate) const THREADS_FROM_EVENTS: u64 = if cfg!(test) { 25 } else { 50_000 };
/// Events that are handed over at a time.
const CHUNK_EVENTS: usize = 512;
/// Room for each event of a chunk; they may take more.
const EVENT_BYTES_USUAL: usize = 400;
/// Chunks that may wait to be evolved.
const CHUNKS_QUEUED_MAX: usize = 8;

/// Where a history stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The last event.
    pub(crate) revision: Revision,
    /// Its chain digest.
    pub(crate) chain: Digest,
}

/// Follows the chain through stored events.
struct Reader {
    at: Place,
}

impl Reader {
    fn follow(&mut self, revision: Revision, bytes: &[u8]) -> Result<(), StoreError> {
        let chain = event_bytes::continued(self.at.chain, bytes);
        let (true, Some(chain)) = (revision == self.at.revision.next(), chain) else {
            return Err(StoreError::corrupt(format!("event {revision} does not continue the history")));
        };
        self.at = Place { revision, chain };
        Ok(())
    }
}

/// The event that is filed as `revision`.
fn open(revision: Revision, bytes: &[u8]) -> Result<Event, StoreError> {
    let event = event_bytes::open(bytes)?;
    if event.revision != revision {
        return Err(StoreError::corrupt(format!("event {} is filed as {revision}", event.revision)));
    }
    // The chain was followed by where the bytes end.
    if !bytes.ends_with(&event.chain.0) {
        return Err(StoreError::corrupt(format!("event {revision} does not end in its place in the chain")));
    }
    Ok(event)
}

/// Events that continue the history, in one piece of memory, as they are stored.
struct Chunk {
    /// The revision before the first.
    after: Revision,
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Chunk {
    fn new(after: Revision) -> Self {
        let bytes = Vec::with_capacity(CHUNK_EVENTS * EVENT_BYTES_USUAL);
        Self { after, bytes, ends: Vec::with_capacity(CHUNK_EVENTS) }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.ends.push(self.bytes.len());
    }

    fn show(&self, mut show: impl FnMut(&Event) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let (mut revision, mut begin) = (self.after, 0);
        for end in &self.ends {
            revision = revision.next();
            show(&open(revision, &self.bytes[begin..*end])?)?;
            begin = *end;
        }
        Ok(())
    }
}

/// Shows the events that come after `from`, up to `to`, and tells where that ended. `stored` yields them as they are
/// stored, in order.
pub(crate) fn each<S, B: AsRef<[u8]>>(
    from: Place,
    to: Revision,
    threads: bool,
    stored: impl FnOnce() -> Result<S, StoreError> + Send,
    mut show: impl FnMut(&Event) -> Result<(), StoreError>,
) -> Result<Place, StoreError>
where
    S: Iterator<Item = Result<(Revision, B), StoreError>>,
{
    if !threads {
        let mut reader = Reader { at: from };
        for row in stored()? {
            let (revision, bytes) = row?;
            if revision > to {
                break;
            }
            reader.follow(revision, bytes.as_ref())?;
            show(&open(revision, bytes.as_ref())?)?;
        }
        return Ok(reader.at);
    }
    std::thread::scope(|scope| {
        let (chunks, queue) = sync_channel(CHUNKS_QUEUED_MAX);
        // It ends with the history, with an error, or when nobody listens any more because evolving failed.
        let ahead = scope.spawn(move || read_ahead(from, to, stored, &chunks));
        for chunk in queue {
            chunk.show(&mut show)?;
        }
        match ahead.join() {
            Ok(read) => read,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn read_ahead<S, B: AsRef<[u8]>>(
    from: Place,
    to: Revision,
    stored: impl FnOnce() -> Result<S, StoreError>,
    chunks: &SyncSender<Chunk>,
) -> Result<Place, StoreError>
where
    S: Iterator<Item = Result<(Revision, B), StoreError>>,
{
    let mut reader = Reader { at: from };
    let mut chunk = Chunk::new(from.revision);
    let mut failed = None;
    for row in stored()? {
        let read = match row {
            Ok((revision, _)) if revision > to => break,
            Ok((revision, bytes)) => {
                reader.follow(revision, bytes.as_ref()).map(|()| chunk.add(bytes.as_ref()))
            }
            Err(error) => Err(error),
        };
        if let Err(error) = read {
            failed = Some(error);
            break;
        }
        if chunk.ends.len() == CHUNK_EVENTS
            && chunks.send(std::mem::replace(&mut chunk, Chunk::new(reader.at.revision))).is_err()
        {
            return Ok(reader.at);
        }
    }
    // What came before an error is evolved before it is told. Nobody listens when that failed, and then its error counts.
    let _ = chunks.send(chunk);
    failed.map_or(Ok(reader.at), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_bytes::seal;
    use holdfast_model::event::EVENT_VERSION;
    use holdfast_model::{Actor, Aggregate, EventPayload, MemberId, RequestId, Timestamp, TokenId};

    type Stored = Vec<(Revision, Vec<u8>)>;

    fn history(events: u64) -> Stored {
        let mut chain = Digest::default();
        (1..=events)
            .map(|n| {
                let token = TokenId::from_bits(u128::from(n));
                let mut event = Event {
                    revision: Revision(n),
                    time: Timestamp(n),
                    version: EVENT_VERSION,
                    aggregate: Aggregate::Token(token),
                    aggregate_seq: 1,
                    actor: Actor::System(MemberId(1)),
                    source: None,
                    org: None,
                    request_id: RequestId::from_bits(7),
                    idempotency_key: None,
                    correlation: None,
                    causation: None,
                    payload: EventPayload::TokenRevoked { token },
                    chain,
                };
                let bytes = seal(&mut event).unwrap();
                chain = event.chain;
                (Revision(n), bytes)
            })
            .collect()
    }

    fn shown(stored: &Stored, to: u64, threads: bool, refuse: u64) -> (Vec<Revision>, Result<Place, String>) {
        let mut seen = Vec::new();
        let rows = stored.clone();
        let ended = each(
            Place::default(),
            Revision(to),
            threads,
            move || Ok(rows.into_iter().map(Ok)),
            |event| {
                if event.revision.0 == refuse {
                    return Err(StoreError::corrupt("refused"));
                }
                seen.push(event.revision);
                Ok(())
            },
        );
        (seen, ended.map_err(|e| e.to_string()))
    }

    #[test]
    fn i12_a_broken_history_ends_at_the_same_event_with_and_without_a_thread() {
        let good = history(3 * CHUNK_EVENTS as u64 + 5);
        let last = good.len() as u64;
        let (seen, ended) = shown(&good, last, false, 0);
        assert_eq!((seen.len() as u64, ended.unwrap().revision), (last, Revision(last)));
        for at in [1, 2, CHUNK_EVENTS, CHUNK_EVENTS + 1, 2 * CHUNK_EVENTS, good.len() - 2] {
            let (mut gap, mut edited) = (good.clone(), good.clone());
            gap.remove(at);
            edited[at].1[9] ^= 1;
            for stored in [&gap, &edited] {
                let inline = shown(stored, last, false, 0);
                assert_eq!(inline.0.len(), at, "what comes before is shown");
                assert!(inline.1.is_err(), "the event after {at} is wrong");
                assert_eq!(shown(stored, last, true, 0), inline, "broken after {at}");
            }
            // A failure to evolve comes before a later break of the chain.
            let refused = shown(&edited, last, true, at as u64);
            assert_eq!(refused, shown(&edited, last, false, at as u64));
            assert_eq!(refused.0.len(), at - 1);
        }
        for to in [0, 1, CHUNK_EVENTS as u64, CHUNK_EVENTS as u64 + 7] {
            let inline = shown(&good, to, false, 0);
            assert_eq!(inline.0.len() as u64, to);
            assert_eq!(shown(&good, to, true, 0), inline);
        }
    }
}
