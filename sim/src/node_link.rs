//! The way between one node's agent and the control plane: what is desired comes from any one member's own state, as it does
//! in a follow stream, and reports go to its API. It may be cut for as long as one likes.
//!
//! A member that is behind the agent is waited for, never believed (I6). An agent that has lost what it knew is told what the
//! newest member knows: what one that lags would tell it is not simulated.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use holdfast_api::caller::Peer;
use holdfast_api::gate::Connection;
use holdfast_client::{Link, Published, View};
use holdfast_identity::{PeerIdentity, Role};
use holdfast_model::agent::{Followed, NodeInstance, REPORT_PATH, Stamp};
use holdfast_model::limits::HEARTBEAT_MS;
use holdfast_model::resource::Capacity;
use holdfast_model::{NodeId, Revision, Timestamp};
use holdfast_node::status::{self, Surroundings};
use holdfast_store::{Store, Views, agents};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::host::{Host, describe};
use crate::node_host::NodeHost;

/// How long one member is followed, in milliseconds.
const STAY_MS: Range<u64> = 500..8_000;
/// Between two members, in milliseconds.
const PAUSE_MS: Range<u64> = 1..300;
/// How long a frame is on its way, in milliseconds.
const LATENCY_MS: Range<u64> = 0..25;
/// The shortest time between two reports, in milliseconds.
const REPORT_GAP_MS: u64 = 100;
/// How long an answer to a report is waited for, in milliseconds.
const REPORT_PATIENCE_MS: u64 = 3_000;

/// See the module.
pub(crate) struct NodeLink {
    peer: Peer,
    capacity: Capacity,
    /// The member that is followed.
    member: Option<u64>,
    /// When that is left, or another is looked for.
    next_ms: u64,
    cut_until_ms: u64,
    /// The last revision of the member that was looked at.
    seen: Revision,
    on_the_way: VecDeque<(u64, View<NodeInstance>)>,
    /// When the next report is due.
    report_ms: u64,
    reporting: Option<Arc<Mutex<Option<bool>>>>,
}

impl NodeLink {
    pub(crate) fn new(cluster: &str, node: NodeId, capacity: Capacity) -> Result<Self, String> {
        let identity = PeerIdentity::new(cluster, Role::Node, &node.to_string()).map_err(|e| describe(&e))?;
        Ok(NodeLink {
            peer: Peer { identity, not_after: Timestamp(u64::MAX) },
            capacity,
            member: None,
            next_ms: 0,
            cut_until_ms: 0,
            seen: Revision(0),
            on_the_way: VecDeque::new(),
            report_ms: 0,
            reporting: None,
        })
    }

    /// Nothing arrives before this time.
    pub(crate) fn cut(&mut self, until_ms: u64) {
        self.cut_until_ms = until_ms;
        self.lose();
    }

    /// What is on its way is lost.
    pub(crate) fn lose(&mut self) {
        self.member = None;
        self.on_the_way.clear();
        self.reporting = None;
    }

    /// One millisecond.
    pub(crate) fn tick(
        &mut self,
        now_ms: u64,
        node: &mut NodeHost,
        hosts: &[Host],
        newest: Revision,
        rng: &mut StdRng,
    ) -> Result<(), String> {
        if !node.is_up() || now_ms < self.cut_until_ms {
            return Ok(());
        }
        let host = self.member.and_then(|id| hosts.iter().find(|host| host.id == id));
        let Some(host) = host.filter(|host| host.api().is_some() && now_ms < self.next_ms) else {
            self.look_for_a_member(now_ms, hosts, rng);
            return Ok(());
        };
        if let Some(member) = host.member() {
            self.follow(now_ms, node, member.store(), newest, rng)?;
        }
        while self.on_the_way.front().is_some_and(|(due, _)| *due <= now_ms) {
            let Some((_, view)) = self.on_the_way.pop_front() else { break };
            node.publish(Some(Arc::new(view)));
        }
        self.report(now_ms, node, host)
    }

    fn look_for_a_member(&mut self, now_ms: u64, hosts: &[Host], rng: &mut StdRng) {
        if self.member.is_some() {
            self.lose();
            self.next_ms = now_ms + rng.random_range(PAUSE_MS);
        }
        let members: Vec<u64> =
            hosts.iter().filter(|host| host.api().is_some()).map(|host| host.id).collect();
        if now_ms < self.next_ms || members.is_empty() {
            return;
        }
        self.member = Some(members[rng.random_range(0..members.len())]);
        self.next_ms = now_ms + rng.random_range(STAY_MS);
        self.seen = Revision(0);
    }

    fn follow(
        &mut self,
        now_ms: u64,
        node: &NodeHost,
        store: &Store,
        newest: Revision,
        rng: &mut StdRng,
    ) -> Result<(), String> {
        let known = node.known.as_ref().map(|view| view.stamp.revision);
        let revision = store.revision();
        if known.is_none() && revision < newest || revision <= self.seen.max(known.unwrap_or(Revision(0))) {
            return Ok(());
        }
        let Some(view) = derive(store, node.node, &node.known)? else { return Ok(()) };
        self.seen = view.stamp.revision;
        let last = self.on_the_way.back().map_or(0, |(due, _)| *due);
        self.on_the_way.push_back((last.max(now_ms + rng.random_range(LATENCY_MS)), view));
        Ok(())
    }

    fn report(&mut self, now_ms: u64, node: &NodeHost, host: &Host) -> Result<(), String> {
        if let Some(answer) = &self.reporting {
            let answer = *answer.lock().unwrap_or_else(PoisonError::into_inner);
            match answer {
                Some(done) => {
                    self.reporting = None;
                    self.report_ms = now_ms + if done { HEARTBEAT_MS } else { REPORT_GAP_MS };
                }
                None if now_ms < self.report_ms => return Ok(()),
                None => self.reporting = None,
            }
        }
        if node.has_news() {
            self.report_ms = self.report_ms.min(now_ms + REPORT_GAP_MS);
        }
        if now_ms < self.report_ms {
            return Ok(());
        }
        let (Some(snapshot), Some(api)) = (node.snapshot(), host.api().cloned()) else { return Ok(()) };
        let around = Surroundings {
            link: Link::Up { endpoint: String::new() },
            vmm: "simulated".to_owned(),
            capacity: self.capacity,
            disk: None,
            waiting: std::collections::BTreeMap::new(),
            erased: BTreeSet::new(),
            snapshots: Default::default(),
        };
        let report = status::report(&snapshot, node.known.as_deref(), &around);
        let body = serde_json::to_vec(&report).map_err(|e| e.to_string())?;
        let mut request = Request::post(REPORT_PATH)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .map_err(|e| e.to_string())?;
        request.extensions_mut().insert(Connection { source: None, peer: Some(self.peer.clone()) });
        let answer = Arc::new(Mutex::new(None));
        self.reporting = Some(Arc::clone(&answer));
        self.report_ms = now_ms + REPORT_PATIENCE_MS;
        host.spawn(async move {
            let told = api.ask(request).await;
            let done = told.is_ok_and(|(status, _)| status == StatusCode::OK);
            *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
        });
        Ok(())
    }
}

/// What a member would tell a node; `None` while it knows no cluster.
pub(crate) fn derive(
    store: &Store,
    node: NodeId,
    known: &Published<NodeInstance>,
) -> Result<Option<View<NodeInstance>>, String> {
    let view = store.view().map_err(|e| describe(&e))?;
    let Some(cluster) = view.cluster().map_err(|e| describe(&e))? else { return Ok(None) };
    let stamp = Stamp { cluster: cluster.id, incarnation: cluster.incarnation, revision: view.revision() };
    let items = agents::node_instances(&view, node).map_err(|e| describe(&e))?;
    let items: std::collections::BTreeMap<_, _> =
        items.into_iter().map(|item| (item.key(), Arc::new(item))).collect();
    let same = known.as_ref().filter(|known| *known.items == items).map(|known| Arc::clone(&known.items));
    Ok(Some(View { stamp, items: same.unwrap_or_else(|| Arc::new(items)), held: None }))
}
