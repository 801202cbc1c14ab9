//! The server's end of a follow stream: a snapshot at a revision, then deltas, of what is this agent's own.
//!
//! Frames come from this member's applied state, so a member that lags simply sends later. What an agent already has
//! is never sent backwards: if the agent is ahead, the stream waits for this member to catch up (I6). An agent that lost
//! what it had cannot say that it is ahead, so a node's first state waits for a majority. A slow agent
//! holds up only its own stream: while its queue is full nothing is derived for it, and the next delta covers the
//! whole distance.

use crate::caller::{Caller, still_holds};
use crate::contacts::Question;
use crate::problem::Refusal;
use crate::service::{Service, moved_past, now, told_to_stop};
use axum::body::Bytes;
use futures::Stream;
use holdfast_model::agent::{
    EdgeRoute, FRAME_BYTES_MAX, FRAME_ITEMS_MAX, Followed, Frame, LEVEL_OF_VOLUMES, NodeInstance, Stamp,
};
use holdfast_model::command::AgentRef;
use holdfast_model::framing::{self, FramingError};
use holdfast_model::limits::HEARTBEAT_MS;
use holdfast_model::{Code, Incarnation, NodeId, Revision};
use holdfast_store::agents::{self, TouchedNodes};
use holdfast_store::{View, Views};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// Frames that wait for a slow agent.
const FRAMES_QUEUED_MAX: usize = 16;
/// How long an agent may take no frame while the queue is full, before its stream is cut, in milliseconds.
const TAKE_MS_MAX: u64 = 15_000;
/// Events that are looked through to find that nothing concerns the agent, before a snapshot is cheaper.
const EVENTS_SCANNED_MAX: usize = 4_096;
/// How long a stream waits for this member to reach the revision that the agent has.
const CATCH_UP_MS_MAX: u64 = 10_000;

/// The frames for an agent that has the state at `has` and understands questions of this level.
pub(crate) fn frames(
    service: Arc<Service>,
    caller: Caller,
    agent: AgentRef,
    has: Option<(Incarnation, Revision)>,
    level: u16,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static {
    let (out, receiver) = mpsc::channel(FRAMES_QUEUED_MAX);
    tokio::spawn(async move {
        let (generation, questions) = service.contacts.stream_begins(agent, level);
        let feed = Feed { service: &service, caller: &caller, agent, out };
        let ended = match agent {
            AgentRef::Node(id) => feed.run(has, questions, |view| node_items(view, id, level)).await,
            AgentRef::Edge(_) => feed.run(has, questions, edge_items).await,
        };
        service.contacts.stream_ended(agent, generation);
        if let Err(refusal) = ended {
            tracing::info!(?agent, %refusal, "a follow stream was cut");
        }
    });
    futures::stream::unfold(receiver, |mut r| async move { r.recv().await.map(|bytes| (Ok(bytes), r)) })
}

/// What a node is to run, as far as its agent knows of such things.
fn node_items(view: &View, node: NodeId, level: u16) -> Result<Vec<NodeInstance>, Refusal> {
    let mut items = agents::node_instances(view, node)?;
    // An agent of an earlier release would lose its stream over a disk that it cannot attach anyway.
    items.retain(|item| level >= LEVEL_OF_VOLUMES || item.volumes.is_empty());
    Ok(items)
}

fn edge_items(view: &View) -> Result<Vec<EdgeRoute>, Refusal> {
    Ok(agents::edge_routes(view)?)
}

struct Feed<'s> {
    service: &'s Service,
    caller: &'s Caller,
    agent: AgentRef,
    out: mpsc::Sender<Bytes>,
}

/// What was sent so far.
struct Sent<T: Followed> {
    stamp: Stamp,
    /// The revision of the last frame: what the agent stands at, and what a delta must build on.
    told: Revision,
    confirmed_through: Revision,
    items: BTreeMap<T::Key, T>,
}

impl Feed<'_> {
    async fn run<T: Followed>(
        &self,
        has: Option<(Incarnation, Revision)>,
        mut questions: mpsc::Receiver<Question>,
        derive: impl Fn(&View) -> Result<Vec<T>, Refusal>,
    ) -> Result<(), Refusal> {
        let mut revisions = self.service.consensus.revisions();
        let mut stopping = self.service.stopping.clone();
        if let Some(ahead) = self.comparable(has)? {
            let before = Revision(ahead.0.saturating_sub(1));
            let caught_up = async { ahead.0 == 0 || moved_past(&mut revisions, before).await };
            let caught_up = tokio::time::timeout(Duration::from_millis(CATCH_UP_MS_MAX), caught_up);
            tokio::select! {
                caught_up = caught_up => if caught_up.is_err() {
                    let detail = "This member is behind the agent; follow another.";
                    return Err(Refusal::new(Code::Unavailable, detail));
                },
                () = self.out.closed() => return Ok(()),
                () = told_to_stop(&mut stopping) => return Ok(()),
            }
        }
        if has.is_none() {
            tokio::select! {
                current = self.first_state_is_current() => current?,
                () = self.out.closed() => return Ok(()),
                () = told_to_stop(&mut stopping) => return Ok(()),
            }
        }
        let mut sent = self.begin(has, &derive).await?;
        let period = Duration::from_millis(HEARTBEAT_MS);
        let mut heartbeat = interval_at(Instant::now() + period, period);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                moved = moved_past(&mut revisions, sent.stamp.revision) => {
                    if !moved {
                        return Ok(());
                    }
                    sent = self.advance(sent, &derive).await?;
                }
                question = questions.recv() => match question {
                    Some(Question { id, call }) => self.send(&Frame::<T>::Call { id, call }).await?,
                    None => return Ok(()),
                },
                _ = heartbeat.tick() => {
                    // Also a tick of I11: a stream whose agent is no longer welcome ends, whatever else happens.
                    still_holds(self.caller, &self.service.view()?, now())?;
                    let (stamp, confirmed_through) = (sent.stamp, sent.confirmed_through);
                    self.send(&Frame::<T>::Heartbeat { stamp, confirmed_through }).await?;
                    sent.told = stamp.revision;
                }
                () = self.out.closed() => return Ok(()),
                () = told_to_stop(&mut stopping) => return Ok(()),
            }
        }
    }

    /// Waits until what an agent without any state would be told has everything that was acknowledged. A node may run
    /// what it does not know any more: an older state would make it end instances that are wanted by now (I7), so without a
    /// majority it is told nothing and goes on as it is. An edge without routes serves nobody; older ones are better.
    async fn first_state_is_current(&self) -> Result<(), Refusal> {
        match (self.service.consensus.linearize().await, self.agent) {
            (Ok(()), _) | (Err(_), AgentRef::Edge(_)) => Ok(()),
            (Err(error), AgentRef::Node(_)) => Err(error.into()),
        }
    }

    /// The agent's revision, if it can be compared with ours: revisions of another incarnation cannot, and whether to
    /// adopt ours is for the agent to say (I6).
    fn comparable(&self, has: Option<(Incarnation, Revision)>) -> Result<Option<Revision>, Refusal> {
        let Some((incarnation, revision)) = has else { return Ok(None) };
        let own = self.service.view()?.cluster()?.map(|cluster| cluster.incarnation);
        // A member that knows no cluster yet is merely behind.
        Ok(own.is_none_or(|own| own == incarnation).then_some(revision))
    }

    /// The first frames: none but a heartbeat when nothing of the agent's changed since it was last here.
    async fn begin<T: Followed>(
        &self,
        has: Option<(Incarnation, Revision)>,
        derive: &impl Fn(&View) -> Result<Vec<T>, Refusal>,
    ) -> Result<Sent<T>, Refusal> {
        let (sent, unchanged) = {
            let view = self.service.view()?;
            let sent = self.state(&view, derive)?;
            let unchanged = match has {
                Some((incarnation, revision)) if incarnation == sent.stamp.incarnation => {
                    !self.concerned(&view, revision)?
                }
                _ => false,
            };
            (sent, unchanged)
        };
        if unchanged {
            let (stamp, confirmed_through) = (sent.stamp, sent.confirmed_through);
            self.send(&Frame::<T>::Heartbeat { stamp, confirmed_through }).await?;
        } else {
            if let Some((incarnation, _)) = has {
                self.hand_over::<T>(incarnation).await?;
            }
            self.snapshot(&sent).await?;
        }
        Ok(sent)
    }

    /// From what was sent to what is now.
    async fn advance<T: Followed>(
        &self,
        sent: Sent<T>,
        derive: &impl Fn(&View) -> Result<Vec<T>, Refusal>,
    ) -> Result<Sent<T>, Refusal> {
        let next = {
            let view = self.service.view()?;
            still_holds(self.caller, &view, now())?;
            let incarnation = view.cluster()?.map(|cluster| cluster.incarnation);
            if incarnation != Some(sent.stamp.incarnation) || self.concerned(&view, sent.stamp.revision)? {
                self.state(&view, derive)?
            } else {
                // Told at the next heartbeat; nothing of the agent's changed.
                let stamp = Stamp { revision: view.revision(), ..sent.stamp };
                return Ok(Sent { stamp, ..sent });
            }
        };
        if next.stamp.incarnation != sent.stamp.incarnation {
            self.hand_over::<T>(sent.stamp.incarnation).await?;
            self.snapshot(&next).await?;
            return Ok(next);
        }
        if next.confirmed_through != sent.confirmed_through {
            // The agent may hold back an update; the whole state, confirmed, settles it (I7).
            self.snapshot(&next).await?;
            return Ok(next);
        }
        match change(&sent, &next)? {
            Change::Nothing => return Ok(Sent { told: sent.told, ..next }),
            Change::Delta(bytes) => self.push(bytes).await?,
            Change::Whole => self.snapshot(&next).await?,
        }
        Ok(next)
    }

    fn state<T: Followed>(
        &self,
        view: &View,
        derive: &impl Fn(&View) -> Result<Vec<T>, Refusal>,
    ) -> Result<Sent<T>, Refusal> {
        let cluster = view.cluster()?.ok_or_else(|| Refusal::not_found("cluster"))?;
        let confirmed_through = match self.agent {
            AgentRef::Node(id) => view.node(id)?.map(|n| n.confirmed_through),
            AgentRef::Edge(id) => view.edge(id)?.map(|e| e.confirmed_through),
        };
        Ok(Sent {
            told: view.revision(),
            stamp: Stamp { cluster: cluster.id, incarnation: cluster.incarnation, revision: view.revision() },
            confirmed_through: confirmed_through.ok_or_else(|| Refusal::not_found("agent"))?,
            items: derive(view)?.into_iter().map(|item| (item.key(), item)).collect(),
        })
    }

    /// Whether any event after `since` may concern the agent; true when there are too many to look through.
    fn concerned(&self, view: &View, since: Revision) -> Result<bool, Refusal> {
        let read = view.events(since, EVENTS_SCANNED_MAX, None)?;
        if read.scanned_to < view.revision() {
            return Ok(true);
        }
        for event in &read.events {
            let touched = agents::touches(event, view)?;
            let concerned = match (self.agent, touched.nodes) {
                (AgentRef::Edge(_), _) => touched.edges,
                (AgentRef::Node(_), TouchedNodes::None) => false,
                (AgentRef::Node(own), TouchedNodes::One(node)) => own == node,
                (AgentRef::Node(_), TouchedNodes::All) => true,
            };
            if concerned {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Hands an agent of an older incarnation over to this one (I6).
    async fn hand_over<T: Followed>(&self, from: Incarnation) -> Result<(), Refusal> {
        let signed = crate::hand_over::signed(self.service, &self.service.view()?, from)?;
        match signed {
            Some(signed) => self.send(&Frame::<T>::HandOver(signed)).await,
            None => Ok(()),
        }
    }

    async fn snapshot<T: Followed>(&self, sent: &Sent<T>) -> Result<(), Refusal> {
        let items = sent.items.len() as u64;
        let (stamp, confirmed_through) = (sent.stamp, sent.confirmed_through);
        self.send(&Frame::<T>::SnapshotBegin { stamp, items, confirmed_through }).await?;
        let mut all = sent.items.values().cloned();
        let mut size = FRAME_ITEMS_MAX;
        loop {
            let part: Vec<T> = all.by_ref().take(size).collect();
            if part.is_empty() {
                break;
            }
            self.send_part(part, &mut size).await?;
        }
        self.send(&Frame::<T>::SnapshotEnd).await
    }

    /// Sends some items, in smaller parts when they are too large for one frame; remembers the size that fits.
    async fn send_part<T: Followed>(&self, part: Vec<T>, size: &mut usize) -> Result<(), Refusal> {
        let mut rest = part.as_slice();
        while !rest.is_empty() {
            let take = rest.len().min(*size);
            match encode(&Frame::SnapshotItems(rest[..take].to_vec()))? {
                Some(bytes) => {
                    self.push(bytes).await?;
                    rest = &rest[take..];
                }
                None if take > 1 => *size = take / 2,
                None => return Err(Refusal::new(Code::Internal, "An item is larger than a frame may be.")),
            }
        }
        Ok(())
    }

    async fn send<T: Followed>(&self, frame: &Frame<T>) -> Result<(), Refusal> {
        match encode(frame)? {
            Some(bytes) => self.push(bytes).await,
            None => Err(Refusal::new(Code::Internal, "A frame is larger than it may be.")),
        }
    }

    async fn push(&self, bytes: Bytes) -> Result<(), Refusal> {
        let cut = |why| Refusal::new(Code::AgentUnreachable, why);
        match tokio::time::timeout(Duration::from_millis(TAKE_MS_MAX), self.out.send(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(cut("The agent left its stream.")),
            Err(_) => Err(cut("The agent took no frame for too long.")),
        }
    }
}

/// How an agent gets from one state to the next.
enum Change {
    /// Nothing of its own changed.
    Nothing,
    /// By this frame.
    Delta(Bytes),
    /// By the whole state: the difference is more than one frame may hold.
    Whole,
}

fn change<T: Followed>(sent: &Sent<T>, next: &Sent<T>) -> Result<Change, Refusal> {
    let changed = next.items.iter().filter(|(key, item)| sent.items.get(key) != Some(item));
    let upserts: Vec<T> = changed.map(|(_, item)| item.clone()).collect();
    let removes: Vec<_> = sent.items.keys().filter(|k| !next.items.contains_key(k)).copied().collect();
    match upserts.len() + removes.len() {
        0 => return Ok(Change::Nothing),
        1..=FRAME_ITEMS_MAX => {}
        _ => return Ok(Change::Whole),
    }
    let (from, stamp, confirmed_through) = (sent.told, next.stamp, next.confirmed_through);
    let delta = Frame::Delta { from, stamp, upserts, removes, confirmed_through };
    Ok(encode(&delta)?.map_or(Change::Whole, Change::Delta))
}

/// As it travels; `None` when it is longer than a frame may be.
fn encode<T: Followed>(frame: &Frame<T>) -> Result<Option<Bytes>, Refusal> {
    match framing::encode(frame, FRAME_BYTES_MAX) {
        Ok(bytes) => Ok(Some(bytes.into())),
        Err(FramingError::TooLong { .. }) => Ok(None),
        Err(error) => Err(Refusal::internal(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::agent::ProxyProtocol;
    use holdfast_model::{ClusterId, RouteId};

    fn state(revision: u64, routes: std::ops::Range<u128>) -> Sent<EdgeRoute> {
        let stamp = Stamp {
            cluster: ClusterId::from_bits(1),
            incarnation: Incarnation(1),
            revision: Revision(revision),
        };
        let route = |n| EdgeRoute {
            id: RouteId::from_bits(n),
            hostname: None,
            listen_port: 443,
            proxy_protocol: ProxyProtocol::Off,
            backends: Vec::new(),
        };
        let items = routes.map(|n| (RouteId::from_bits(n), route(n))).collect();
        Sent { stamp, told: stamp.revision, confirmed_through: Revision(0), items }
    }

    #[test]
    fn a_change_that_no_agent_would_take_as_one_frame_becomes_a_snapshot() {
        let most = FRAME_ITEMS_MAX as u128;
        assert!(matches!(change(&state(1, 0..9), &state(2, 0..9)).unwrap(), Change::Nothing));
        // Half of them removed, half of them new: the bound is on both together.
        let (before, after) = (state(1, 0..most / 2), state(2, most..most + most / 2));
        assert!(matches!(change(&before, &after).unwrap(), Change::Delta(_)));
        let after = state(2, most..most + most / 2 + 1);
        assert!(matches!(change(&before, &after).unwrap(), Change::Whole));
        assert!(matches!(change(&state(1, 0..most + 1), &state(2, 0..0)).unwrap(), Change::Whole));
    }
}
