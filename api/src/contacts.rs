//! What this member last heard of agents, and questions that wait for an agent's answer. In memory only: high-rate
//! reports do not pass through the log. Other members' contacts arrive by [`Heard`] messages, and what else their nodes
//! tell in [`News`] behind them.

use crate::log_readers::LogReaders;
use holdfast_model::agent::{AgentCall, CallAnswer, Disk, ImageProgress, NodeNews, Report, ReportDetail};
use holdfast_model::api::Contact;
use holdfast_model::command::AgentRef;
use holdfast_model::{InstanceId, MemberId, NodeId, RequestId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Questions that may wait for one agent at a time.
pub const CALLS_QUEUED_MAX: usize = 64;
/// Questions that may wait for an answer on one member.
pub const CALLS_WAITING_MAX: usize = 4_096;

/// Contacts that a member passes on to the others. They carry their age, because members' clocks differ and jump, and
/// a node must not count as silent for that (I7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// What was heard, per agent, and how long ago, in milliseconds.
    pub contacts: Vec<(AgentRef, Contact, u64)>,
}

/// What else was heard, by node, of the nodes in the [`Heard`] that it follows. Only nodes with something to tell are in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    /// What each of them tells.
    pub nodes: Vec<(NodeId, NodeNews)>,
}

/// A contact, and when it was by this process's own monotonic clock.
#[derive(Clone)]
struct Known {
    contact: Contact,
    heard: Instant,
    /// What else a node said at this contact.
    news: NodeNews,
}

/// A question on its way to an agent.
#[derive(Debug)]
pub struct Question {
    /// Names the answer.
    pub id: RequestId,
    /// What is asked.
    pub call: AgentCall,
}

struct Stream {
    /// Tells one stream of an agent from its next.
    generation: u64,
    questions: mpsc::Sender<Question>,
    /// The greatest [`AgentCall::level`] that the agent understands.
    level: u16,
}

#[derive(Default)]
struct Inner {
    contacts: BTreeMap<AgentRef, Known>,
    streams: BTreeMap<AgentRef, Stream>,
    waiting: BTreeMap<RequestId, (AgentRef, oneshot::Sender<CallAnswer>)>,
    generations: u64,
}

/// See the module.
pub struct Contacts {
    member: MemberId,
    inner: Mutex<Inner>,
    /// Who reads lines through this member.
    pub log_readers: LogReaders,
}

/// Why an agent could not be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// No stream of the agent ends at this member.
    #[error("the agent holds no stream to this member")]
    NotHere,
    /// Too many questions wait.
    #[error("too many questions wait for the agent; try again")]
    Busy,
    /// The agent does not know the question: it would have to leave its stream.
    #[error("the agent is of an older release and does not know the question")]
    Older,
}

impl Contacts {
    /// Nothing heard yet.
    pub fn new(member: MemberId) -> Self {
        Self { member, inner: Mutex::new(Inner::default()), log_readers: LogReaders::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below leaves the maps whole, so a panic elsewhere cannot have broken them.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An agent reported to this member.
    pub fn reported(&self, agent: AgentRef, report: &Report, at: holdfast_model::Timestamp) {
        let contact = Contact { at, member: self.member, applied: report.applied, held: report.held };
        let news = match &report.detail {
            ReportDetail::Node { pulls, disk, .. } => NodeNews { pulls: pulls.clone(), disk: *disk },
            ReportDetail::Edge { .. } => NodeNews::default(),
        };
        self.lock().contacts.insert(agent, Known { contact, heard: Instant::now(), news });
    }

    /// Another member heard of agents. Only what is newer counts.
    pub fn merge(&self, heard: Heard, news: News) {
        let mut news: BTreeMap<NodeId, NodeNews> = news.nodes.into_iter().collect();
        let now = Instant::now();
        let mut inner = self.lock();
        for (agent, contact, age_ms) in heard.contacts {
            // Older than this host's uptime is as good as never.
            let Some(heard) = now.checked_sub(Duration::from_millis(age_ms)) else { continue };
            let news = match agent {
                AgentRef::Node(node) => news.remove(&node).unwrap_or_default(),
                AgentRef::Edge(_) => NodeNews::default(),
            };
            if inner.contacts.get(&agent).is_none_or(|known| known.heard < heard) {
                inner.contacts.insert(agent, Known { contact, heard, news });
            }
        }
    }

    /// What this member itself heard within the last `within`, to pass on.
    pub fn own_within(&self, within: Duration) -> (Heard, News) {
        let inner = self.lock();
        let (mut contacts, mut nodes) = (Vec::new(), Vec::new());
        for (agent, known) in inner.contacts.iter().filter(|(_, k)| k.contact.member == self.member) {
            let age = known.heard.elapsed();
            if age > within {
                continue;
            }
            contacts.push((*agent, known.contact, millis(age)));
            if let AgentRef::Node(node) = agent
                && known.news != NodeNews::default()
            {
                nodes.push((*node, known.news.clone()));
            }
        }
        (Heard { contacts }, News { nodes })
    }

    /// How far the image of an instance is, if its node waits for it and was heard within `within`.
    pub fn pull(&self, node: NodeId, instance: InstanceId, within: Duration) -> Option<ImageProgress> {
        let inner = self.lock();
        let known = inner.contacts.get(&AgentRef::Node(node))?;
        let pull = known.news.pulls.iter().find(|pull| pull.instance == instance)?;
        (known.heard.elapsed() <= within).then_some(pull.image)
    }

    /// What was last heard of an agent.
    pub fn contact(&self, agent: AgentRef) -> Option<Contact> {
        self.lock().contacts.get(&agent).map(|known| known.contact)
    }

    /// A node's disk, as it last told.
    pub fn disk(&self, node: NodeId) -> Option<Disk> {
        self.lock().contacts.get(&AgentRef::Node(node))?.news.disk
    }

    /// How long ago any member last heard of an agent, by this process's own clock.
    pub fn age(&self, agent: AgentRef) -> Option<Duration> {
        self.lock().contacts.get(&agent).map(|known| known.heard.elapsed())
    }

    /// An agent's stream begins here; questions to it, of this level at most, come out of the receiver. A newer stream
    /// takes over.
    pub fn stream_begins(&self, agent: AgentRef, level: u16) -> (u64, mpsc::Receiver<Question>) {
        let (questions, receiver) = mpsc::channel(CALLS_QUEUED_MAX);
        let mut inner = self.lock();
        inner.generations += 1;
        let generation = inner.generations;
        inner.streams.insert(agent, Stream { generation, questions, level });
        (generation, receiver)
    }

    /// An agent's stream ended; unless a newer one took over, it cannot be asked here any more.
    pub fn stream_ended(&self, agent: AgentRef, generation: u64) {
        let mut inner = self.lock();
        if inner.streams.get(&agent).is_some_and(|s| s.generation == generation) {
            inner.streams.remove(&agent);
        }
    }

    /// Whether an agent's stream ends at this member.
    pub fn is_here(&self, agent: AgentRef) -> bool {
        self.lock().streams.contains_key(&agent)
    }

    /// How many agents' streams end at this member.
    pub fn streams(&self) -> usize {
        self.lock().streams.len()
    }

    /// Puts a question to an agent; the answer arrives at the receiver, or its sender is dropped.
    ///
    /// # Errors
    /// When the agent has no stream here, or too many questions wait.
    pub fn ask(
        &self,
        agent: AgentRef,
        id: RequestId,
        call: AgentCall,
    ) -> Result<oneshot::Receiver<CallAnswer>, AskError> {
        let mut inner = self.lock();
        inner.waiting.retain(|_, (_, sender)| !sender.is_closed());
        if inner.waiting.len() >= CALLS_WAITING_MAX {
            return Err(AskError::Busy);
        }
        let stream = inner.streams.get(&agent).ok_or(AskError::NotHere)?;
        if call.level() > stream.level {
            return Err(AskError::Older);
        }
        match stream.questions.try_send(Question { id, call }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => return Err(AskError::Busy),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(AskError::NotHere),
        }
        let (sender, receiver) = oneshot::channel();
        inner.waiting.insert(id, (agent, sender));
        Ok(receiver)
    }

    /// An agent answers. Only the agent that was asked may; returns whether the answer was waited for.
    pub fn answered(&self, agent: AgentRef, id: RequestId, answer: CallAnswer) -> bool {
        let mut inner = self.lock();
        if inner.waiting.get(&id).is_none_or(|(asked, _)| *asked != agent) {
            return false;
        }
        inner.waiting.remove(&id).is_some_and(|(_, sender)| sender.send(answer).is_ok())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::agent::{
        FRAMES_ACCEPTED, FRAMES_MEDIA_TYPE, ImagePhase, Pull, ReportDetail, accepted_level,
    };
    use holdfast_model::logs::LogStart;
    use holdfast_model::{Incarnation, Revision, Timestamp};

    #[test]
    fn i07_a_contact_is_as_old_as_it_was_passed_on_whatever_the_other_clock_says() {
        let node = AgentRef::Node(NodeId::from_bits(1));
        let detail = ReportDetail::Edge { routes: 0, connections: 0 };
        let report = Report { applied: Revision(1), incarnation: Incarnation(1), held: None, detail };
        let (theirs, ours) = (Contacts::new(MemberId(2)), Contacts::new(MemberId(1)));
        // Their clock stands at the beginning of time.
        theirs.reported(node, &report, Timestamp(0));
        let (heard, news) = theirs.own_within(Duration::from_secs(3600));
        assert_eq!(heard.contacts.len(), 1);
        ours.merge(heard, news);
        assert!(ours.age(node).unwrap() < Duration::from_secs(3600));
        assert_eq!(ours.contact(node).unwrap().member, MemberId(2));
        // What is older does not replace it, and nobody passes on what another heard.
        let (agent, contact, _) = theirs.own_within(Duration::from_secs(3600)).0.contacts[0];
        let older = Contact { applied: Revision(0), ..contact };
        ours.merge(Heard { contacts: vec![(agent, older, 3_600_000)] }, News::default());
        assert_eq!(ours.contact(node).unwrap().applied, Revision(1));
        assert!(ours.own_within(Duration::from_secs(3600)).0.contacts.is_empty());
    }

    #[test]
    fn how_far_an_image_is_travels_with_the_contact_and_is_as_old() {
        let (node, other) = (NodeId::from_bits(1), NodeId::from_bits(2));
        let hour = Duration::from_secs(3600);
        let image = ImageProgress {
            phase: ImagePhase::Pulling,
            received_bytes: 1,
            total_bytes: 2,
            layer: 0,
            layers: 1,
        };
        let waiting = Pull { instance: InstanceId::from_bits(1), image };
        let report = |pulls| Report {
            applied: Revision(1),
            incarnation: Incarnation(1),
            held: None,
            detail: ReportDetail::Node {
                erased: std::collections::BTreeSet::new(),
                observations: Vec::new(),
                capacity: Default::default(),
                vmm: String::new(),
                snapshots: Default::default(),
                pulls,
                disk: Some(Disk { total_mib: 2, free_mib: 1 }),
            },
        };
        let (theirs, ours) = (Contacts::new(MemberId(2)), Contacts::new(MemberId(1)));
        theirs.reported(AgentRef::Node(node), &report(vec![waiting]), Timestamp(0));
        // As members tell one another: builds that know nothing of pulls read the contacts and stop there.
        let message = postcard::to_stdvec(&theirs.own_within(hour)).unwrap();
        let (heard, rest) = postcard::take_from_bytes::<Heard>(&message).unwrap();
        assert_eq!(postcard::from_bytes::<Heard>(&message).unwrap(), heard);
        ours.merge(heard.clone(), postcard::from_bytes(rest).unwrap());
        assert_eq!(ours.pull(node, waiting.instance, hour), Some(image));
        assert_eq!(ours.disk(node), Some(Disk { total_mib: 2, free_mib: 1 }));
        assert_eq!(
            ours.pull(node, waiting.instance, Duration::ZERO),
            None,
            "of a silent node nothing is told"
        );
        // I9: a node tells of its own instances alone.
        assert_eq!(ours.pull(other, waiting.instance, hour), None);
        // An older build says nothing of pulls, and a later report nothing of this one.
        ours.merge(Heard { contacts: vec![(heard.contacts[0].0, heard.contacts[0].1, 0)] }, News::default());
        assert_eq!(ours.pull(node, waiting.instance, hour), None);
    }

    fn call() -> AgentCall {
        AgentCall::Logs { instance: InstanceId::from_bits(1), after: None, limit: 10, wait_ms: 0 }
    }

    #[tokio::test]
    async fn i09_only_the_agent_that_was_asked_may_answer() {
        let contacts = Contacts::new(MemberId(1));
        let (asked, other) = (AgentRef::Node(NodeId::from_bits(1)), AgentRef::Node(NodeId::from_bits(2)));
        let (_, mut questions) = contacts.stream_begins(asked, 2);
        let id = RequestId::from_bits(9);
        let answer = contacts.ask(asked, id, call()).unwrap();
        assert_eq!(questions.recv().await.unwrap().id, id);
        assert!(!contacts.answered(other, id, CallAnswer::NotFound));
        assert!(contacts.answered(asked, id, CallAnswer::NotFound));
        assert_eq!(answer.await.unwrap(), CallAnswer::NotFound);
        assert!(!contacts.answered(asked, id, CallAnswer::NotFound));
    }

    #[test]
    fn an_old_stream_does_not_close_a_new_one() {
        let contacts = Contacts::new(MemberId(1));
        let agent = AgentRef::Node(NodeId::from_bits(1));
        let (old, _old) = contacts.stream_begins(agent, 2);
        let (new, _new) = contacts.stream_begins(agent, 2);
        contacts.stream_ended(agent, old);
        assert!(contacts.is_here(agent));
        contacts.stream_ended(agent, new);
        assert_eq!(contacts.ask(agent, RequestId::from_bits(1), call()).unwrap_err(), AskError::NotHere);
    }

    #[test]
    fn i05_an_agent_of_an_older_release_is_not_asked_what_would_cost_it_its_stream() {
        let contacts = Contacts::new(MemberId(1));
        let agent = AgentRef::Node(NodeId::from_bits(1));
        let (_, mut questions) = contacts.stream_begins(agent, accepted_level(FRAMES_MEDIA_TYPE));
        let (instance, start) = (InstanceId::from_bits(1), LogStart::default());
        let newer = || AgentCall::ReadLogs { instance, start, bytes: 1, wait_ms: 0 };
        assert_eq!(contacts.ask(agent, RequestId::from_bits(1), newer()).unwrap_err(), AskError::Older);
        assert!(questions.try_recv().is_err());
        assert!(contacts.ask(agent, RequestId::from_bits(2), call()).is_ok());
        let (_, _questions) = contacts.stream_begins(agent, accepted_level(FRAMES_ACCEPTED));
        assert!(contacts.ask(agent, RequestId::from_bits(3), newer()).is_ok());
    }

    #[test]
    fn questions_are_bounded() {
        let contacts = Contacts::new(MemberId(1));
        let agent = AgentRef::Node(NodeId::from_bits(1));
        let (_, _questions) = contacts.stream_begins(agent, 2);
        let answers: Vec<_> = (0..CALLS_QUEUED_MAX as u128)
            .map(|n| contacts.ask(agent, RequestId::from_bits(n), call()))
            .collect();
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!(contacts.ask(agent, RequestId::from_bits(1 << 64), call()).unwrap_err(), AskError::Busy);
    }
}
