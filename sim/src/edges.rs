//! The edges: each follows any member through whatever happens to members, to the network and to itself, and an operator
//! confirms what they hold back.
//!
//! What an edge puts in force never goes back, over restarts too (I6); changes only with a newer revision (I5); takes most
//! routes away only once the operator confirmed that (I7); and is what the history has at its revision (I8).

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_faulty_disk::Faults;
use holdfast_model::agent::{EdgeRoute, Held, Stamp};
use holdfast_model::limits::{REMOVED_ITEMS_FREE, REMOVED_ITEMS_PERCENT_MAX};
use holdfast_model::resource::{Route, RouteTarget};
use holdfast_model::{AppId, Digest, Event, EventPayload, Revision, RouteId};
use holdfast_store::{Store, agents};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::api_member::Cluster;
use crate::client::Account;
use crate::edge_host::{EdgeHost, InForceNow};
use crate::errand::Errand;
use crate::host::{Crash, Host};
use crate::network::Network;
use crate::trace::Trace;

/// The first edge's number in the network; members have lower ones.
pub(crate) const FIRST_EDGE: u64 = 101;
/// Events that are read at a time.
const EVENTS_PAGE: usize = 500;

/// The routes of one moment.
type Routes = BTreeMap<RouteId, EdgeRoute>;

/// All edges, and their operator.
pub(crate) struct Edges {
    rng: StdRng,
    network: Network,
    cluster: Cluster,
    members: u64,
    secret: String,
    edges: Vec<Edge>,
    /// Deletes an app that has most of the routes.
    deletion: Option<Errand>,
    /// What is still to be judged by the history.
    removals: Vec<Removal>,
    /// The digest of the routes at each revision at which an edge had a table, as the first edge had them.
    seen: BTreeMap<Revision, Digest>,
    /// The routes that the state has, and its revision.
    state: Option<(Revision, Routes)>,
    /// Between two faults of one edge at most, in milliseconds; none when there are none.
    fault_pause_ms: Option<u64>,
    /// Whether the run ends only when edges were told the last revision, and not merely the last that concerns them.
    to_the_last: bool,
    tables: u64,
    crashes: u64,
}

/// What is known of one edge.
struct Edge {
    host: EdgeHost,
    /// What it put in force last, in this life or before.
    last: Option<Last>,
    /// Whether this life has put anything in force.
    shown: bool,
    /// Where it stood with what is in force, when that came: a restart must not be behind it.
    durable: Option<Stamp>,
    /// Whether its disk had failed when that came. A commit that had reached the file after all is then put in force first,
    /// maybe at an older revision, and nobody sees that when a newer one with the same routes follows at once.
    blurred: bool,
    start_ms: u64,
    fault_ms: u64,
    mend_ms: u64,
    /// Up to where the operator has begun to confirm removals.
    confirmed: Option<Revision>,
    confirmation: Option<Errand>,
}

struct Last {
    view: Arc<holdfast_client::View<EdgeRoute>>,
    digest: Digest,
}

impl Edges {
    pub(crate) fn new(
        seed: u64,
        now_ms: u64,
        network: Network,
        cluster: Cluster,
        members: u64,
        account: &Account,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let edges = account.edges.iter().zip(FIRST_EDGE..).map(|(edge, id)| Edge {
            host: EdgeHost::new(id, *edge),
            last: None,
            shown: false,
            durable: None,
            blurred: false,
            start_ms: now_ms,
            fault_ms: now_ms + rng.random_range(100..2000),
            mend_ms: u64::MAX,
            confirmed: None,
            confirmation: None,
        });
        let edges = edges.collect();
        let deletion = rng.random_bool(0.5).then(|| {
            let path = format!("/v1/apps/{}", account.crowded);
            let at_ms = now_ms + rng.random_range(500..6000);
            Errand::new(at_ms, &account.secret, "the-crowded-app".to_owned(), "DELETE", path, None)
        });
        Edges {
            network,
            cluster,
            members,
            secret: account.secret.clone(),
            edges,
            deletion,
            seen: BTreeMap::new(),
            removals: Vec::new(),
            state: None,
            fault_pause_ms: rng.random_bool(0.75).then(|| rng.random_range(300..4000)),
            to_the_last: rng.random_bool(0.125),
            tables: 0,
            crashes: 0,
            rng,
        }
    }

    /// Their numbers in the network.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.edges.iter().map(|edge| edge.host.id).collect()
    }

    /// Tables that were put in force, and crashes of edges.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.tables, self.crashes)
    }

    /// From now on nothing happens to them, and who is down starts.
    pub(crate) fn rest(&mut self, now_ms: u64) {
        self.fault_pause_ms = None;
        for edge in &mut self.edges {
            edge.host.mend();
            edge.start_ms = edge.start_ms.min(now_ms);
        }
    }

    /// One millisecond of all edges.
    pub(crate) fn tick(&mut self, now_ms: u64, hosts: &[Host], trace: &mut Trace) -> Result<(), String> {
        for number in 0..self.edges.len() {
            self.start(number, now_ms, trace)?;
            self.run(number, now_ms, trace)?;
            self.confirm(number, now_ms, hosts, trace)?;
            self.cause_fault(number, now_ms, trace);
        }
        if let Some(errand) = &mut self.deletion
            && errand.tick(now_ms, hosts, &mut self.rng)?
        {
            trace.line(now_ms, format_args!("the crowded app is deleted"));
            self.deletion = None;
        }
        Ok(())
    }

    fn start(&mut self, number: usize, now_ms: u64, trace: &mut Trace) -> Result<(), String> {
        let edge = &mut self.edges[number];
        if edge.host.is_running() || edge.start_ms > now_ms {
            return Ok(());
        }
        trace.line(now_ms, format_args!("edge {} starts", edge.host.id));
        edge.shown = false;
        edge.host.start(&self.network, &self.cluster, self.members)
    }

    fn run(&mut self, number: usize, now_ms: u64, trace: &mut Trace) -> Result<(), String> {
        let edge = &mut self.edges[number];
        if !edge.host.is_due(now_ms) {
            return Ok(());
        }
        let (put, ended) = edge.host.tick(now_ms);
        let (id, lost_power) = (edge.host.id, edge.host.lost_power());
        if edge.host.take_set_aside() && edge.durable.is_some() {
            return Err(format!("I5: edge {id} took its copy of the routes for damaged, and nothing rotted"));
        }
        for now in put {
            self.see(number, now, now_ms, trace).map_err(|reason| format!("{reason} (edge {id})"))?;
        }
        let edge = &mut self.edges[number];
        if lost_power {
            trace.line(now_ms, format_args!("edge {id} lost power while it wrote"));
            self.crash(number, Crash::PowerLoss, now_ms, trace);
        } else if let Some(reason) = ended {
            if !edge.host.excused {
                return Err(format!("edge {id} ended although its disk is well: {reason}"));
            }
            trace.line(now_ms, format_args!("edge {id} ended: {reason}"));
            self.crash(number, Crash::Kill, now_ms, trace);
        } else if !edge.shown && edge.durable.is_some() {
            // What its disk holds needs nobody, and is in force before anything else happens.
            return Err(format!("I5: edge {id} started and serves nothing of what it knew"));
        }
        Ok(())
    }

    /// Judges what an edge put in force.
    fn see(&mut self, number: usize, now: InForceNow, now_ms: u64, trace: &mut Trace) -> Result<(), String> {
        let edge = &mut self.edges[number];
        let (id, view) = (edge.host.id, now.view);
        let (stamp, held) = (view.stamp, view.held);
        now.table.map_err(|reason| format!("I8: at revision {}: {reason}", stamp.revision))?;
        let digest = match &edge.last {
            Some(last) if Arc::ptr_eq(&last.view.items, &view.items) => last.digest,
            _ => digest(view.items.values().map(Arc::as_ref))?,
        };
        trace.line(
            now_ms,
            format_args!(
                "edge {id} has revision {} in force: {} routes {digest}, held {held:?}",
                stamp.revision,
                view.items.len()
            ),
        );
        self.tables += 1;
        if *self.seen.entry(stamp.revision).or_insert(digest) != digest {
            return Err(format!("I8: two tables were in force at revision {}", stamp.revision));
        }
        let changed = edge.last.as_ref().is_none_or(|last| last.digest != digest);
        if let Some(last) = &edge.last {
            if stamp.incarnation != last.view.stamp.incarnation {
                return Err(format!(
                    "I6: from {:?} to {stamp:?}, and nobody handed it over",
                    last.view.stamp
                ));
            }
            let floor = if edge.shown { last.view.stamp } else { edge.durable.unwrap_or(stamp) };
            let same = edge.blurred && !edge.shown && !changed;
            if stamp.revision < floor.revision && !same {
                return Err(format!("I6: revision {} after {}", stamp.revision, floor.revision));
            }
            if changed && stamp.revision <= last.view.stamp.revision {
                return Err(format!(
                    "I5: other routes at revision {} than at {}",
                    stamp.revision, last.view.stamp.revision
                ));
            }
            self.removals.extend(check_removals(
                &last.view.items,
                &view.items,
                last.view.held,
                edge.confirmed,
            )?);
        }
        let held_before = edge.last.as_ref().and_then(|last| last.view.held);
        if changed || held != held_before || !edge.shown {
            edge.durable = Some(stamp);
            edge.blurred = edge.host.excused;
        }
        edge.shown = true;
        edge.last = Some(Last { view, digest });
        Ok(())
    }

    fn crash(&mut self, number: usize, crash: Crash, now_ms: u64, trace: &mut Trace) {
        let silent = crash == Crash::PowerLoss && self.rng.random_bool(0.5);
        let down_ms = self.rng.random_range(1..2000);
        let edge = &mut self.edges[number];
        trace.line(now_ms, format_args!("edge {} goes down: {crash:?}", edge.host.id));
        edge.host.crash(crash, &self.network, silent, &mut self.rng);
        edge.start_ms = now_ms + if self.fault_pause_ms.is_some() { down_ms } else { 1 };
        self.crashes += 1;
    }

    fn cause_fault(&mut self, number: usize, now_ms: u64, trace: &mut Trace) {
        let edge = &mut self.edges[number];
        if edge.mend_ms <= now_ms {
            edge.mend_ms = u64::MAX;
            edge.host.mend();
        }
        let Some(pause_ms) = self.fault_pause_ms else { return };
        if edge.fault_ms > now_ms {
            return;
        }
        edge.fault_ms = now_ms + self.rng.random_range(50..pause_ms);
        if !edge.host.is_running() {
            return;
        }
        let faulty = match self.rng.random_range(0..7) {
            0 => return self.crash(number, Crash::Kill, now_ms, trace),
            1 => return self.crash(number, Crash::PowerLoss, now_ms, trace),
            2 | 3 => {
                let steps = self.rng.random_range(1..40);
                return edge.host.lose_power_after(steps);
            }
            4 => Faults { write_fails: true, ..Faults::default() },
            5 => Faults { sync_fails: true, ..Faults::default() },
            _ => {
                edge.host.machine.disk_ms = (10, 300);
                Faults::default()
            }
        };
        trace.line(now_ms, format_args!("edge {} has a bad disk: {faulty:?}", edge.host.id));
        edge.host.set_disk_faults(faulty);
        edge.mend_ms = now_ms + self.rng.random_range(50..1500);
    }

    /// The operator sees what an edge holds back, and confirms it after a while.
    fn confirm(
        &mut self,
        number: usize,
        now_ms: u64,
        hosts: &[Host],
        trace: &mut Trace,
    ) -> Result<(), String> {
        let edge = &mut self.edges[number];
        if let Some(errand) = &mut edge.confirmation {
            if errand.tick(now_ms, hosts, &mut self.rng)? {
                edge.confirmation = None;
            }
            return Ok(());
        }
        let held = edge.last.as_ref().and_then(|last| last.view.held);
        let Some(Held { revision, .. }) = held.filter(|held| edge.confirmed < Some(held.revision)) else {
            return Ok(());
        };
        trace.line(now_ms, format_args!("removals of edge {} up to {revision} are confirmed", edge.host.id));
        let at_ms = now_ms + self.rng.random_range(1..1500);
        let key = format!("confirm-{number}-{revision}");
        let path = format!("/v1/edges/{}/confirm", edge.host.edge);
        let body = format!("{{\"through\":{}}}", revision.0);
        edge.confirmed = Some(revision);
        edge.confirmation = Some(Errand::new(at_ms, &self.secret, key, "POST", path, Some(body)));
        Ok(())
    }

    /// Whether every edge serves what the state has.
    pub(crate) fn have_arrived(&mut self, store: &Store) -> Result<bool, String> {
        if self.deletion.is_some() || self.edges.iter().any(|edge| edge.confirmation.is_some()) {
            return Ok(false);
        }
        let revision = store.revision();
        if self.state.as_ref().is_none_or(|(at, _)| *at != revision) {
            let view = store.view().map_err(|e| e.to_string())?;
            let routes = agents::edge_routes(&view).map_err(|e| e.to_string())?;
            self.state = Some((view.revision(), routes.into_iter().map(|route| (route.id, route)).collect()));
        }
        let Some((last, routes)) = &self.state else { return Ok(false) };
        Ok(self.edges.iter().all(|edge| {
            edge.last.as_ref().is_some_and(|known| {
                let view = &known.view;
                view.held.is_none()
                    && (!self.to_the_last || view.stamp.revision == *last)
                    && view.items.len() == routes.len()
                    && view.items.values().zip(routes.values()).all(|(mine, theirs)| **mine == *theirs)
            })
        }))
    }

    /// How each stands, for a run that did not settle.
    pub(crate) fn standing(&self) -> String {
        let one = |edge: &Edge| match &edge.last {
            Some(last) => format!(
                "edge {} at {} with {} routes, held {:?}",
                edge.host.id,
                last.view.stamp.revision,
                last.view.items.len(),
                last.view.held
            ),
            None => format!("edge {} knows nothing", edge.host.id),
        };
        self.edges.iter().map(one).collect::<Vec<_>>().join("; ")
    }

    /// Whether every table that was in force is what a member's history has at its revision.
    pub(crate) fn judge(&self, store: &Store) -> Result<(), String> {
        let view = store.view().map_err(|e| e.to_string())?;
        let mut history = RouteHistory::default();
        let mut removals: Vec<&Removal> = self.removals.iter().collect();
        removals.sort_by_key(|removal| removal.confirmed);
        let mut removals = removals.into_iter().peekable();
        let (mut read, mut seen) = (Revision(0), self.seen.iter().peekable());
        let check = |at: Revision, digest: &Digest, history: &RouteHistory| match history.digest()? == *digest
        {
            true => Ok(()),
            false => Err(format!("I8: at revision {at} a table was in force that the history does not have")),
        };
        while read < view.revision() {
            let page = view.events(read, EVENTS_PAGE, None).map_err(|e| e.to_string())?;
            let Some(end) = page.events.last().map(|event| event.revision) else { break };
            for event in &page.events {
                while let Some((at, digest)) = seen.next_if(|(at, _)| **at < event.revision) {
                    check(*at, digest, &history)?;
                }
                while let Some(removal) = removals.next_if(|removal| removal.confirmed < event.revision) {
                    removal.check(&history)?;
                }
                history.note(event);
            }
            read = end;
        }
        while let Some((at, digest)) = seen.next_if(|(at, _)| **at <= view.revision()) {
            check(*at, digest, &history)?;
        }
        for removal in removals {
            removal.check(&history)?;
        }
        match seen.next() {
            None => Ok(()),
            Some((at, _)) => Err(format!("I6: a table was in force at revision {at}, which never was")),
        }
    }
}

/// Routes that an edge gave up at once, and up to which revision removals were confirmed to it then.
struct Removal {
    confirmed: Revision,
    removed: Vec<RouteId>,
    of: u64,
}

impl Removal {
    /// What is confirmed is that the routes are gone which the history had taken away by then.
    fn check(&self, history: &RouteHistory) -> Result<(), String> {
        let unconfirmed = self.removed.iter().filter(|id| history.routes.contains_key(id)).count() as u64;
        match many(unconfirmed, self.of) {
            true => Err(format!(
                "I7: {unconfirmed} of {} routes were taken away, and removals were confirmed only up to {}",
                self.of, self.confirmed
            )),
            false => Ok(()),
        }
    }
}

fn many(removed: u64, of: u64) -> bool {
    removed > REMOVED_ITEMS_FREE && removed * 100 > of * REMOVED_ITEMS_PERCENT_MAX
}

/// An update that takes most routes away comes after the operator confirmed it. What the edge did not say that it held,
/// because its disk failed just then, it may still have held; whether that was confirmed is for the history to say.
fn check_removals(
    before: &BTreeMap<RouteId, Arc<EdgeRoute>>,
    after: &BTreeMap<RouteId, Arc<EdgeRoute>>,
    held: Option<Held>,
    confirmed: Option<Revision>,
) -> Result<Option<Removal>, String> {
    let removed: Vec<RouteId> = before.keys().filter(|id| !after.contains_key(id)).copied().collect();
    let of = before.len() as u64;
    if !many(removed.len() as u64, of) {
        return Ok(None);
    }
    match (held, confirmed) {
        (Some(held), Some(confirmed)) if held.revision <= confirmed => Ok(None),
        (None, Some(confirmed)) => Ok(Some(Removal { confirmed, removed, of })),
        _ => Err(format!("I7: {} of {of} routes were taken away and nobody confirmed it", removed.len())),
    }
}

fn digest<'a>(routes: impl Iterator<Item = &'a EdgeRoute>) -> Result<Digest, String> {
    let routes: Vec<&EdgeRoute> = routes.collect();
    serde_json::to_vec(&routes).map(|bytes| Digest::of(&bytes)).map_err(|e| e.to_string())
}

/// The routes by the history of events alone. There are no nodes in a run, and so no route has backends.
#[derive(Default)]
struct RouteHistory {
    routes: Routes,
    apps: BTreeMap<RouteId, AppId>,
}

impl RouteHistory {
    fn note(&mut self, event: &Event) {
        match &event.payload {
            EventPayload::RouteCreated(route) => {
                self.apps.insert(route.id, route.app);
                self.routes.insert(route.id, as_edges_know(route));
            }
            EventPayload::RouteDeleted { route } => {
                self.routes.remove(route);
            }
            EventPayload::AppDeleted { app } => {
                let apps = &self.apps;
                self.routes.retain(|id, _| apps.get(id) != Some(app));
            }
            _ => {}
        }
    }

    fn digest(&self) -> Result<Digest, String> {
        digest(self.routes.values())
    }
}

fn as_edges_know(route: &Route) -> EdgeRoute {
    let hostname = match &route.target {
        RouteTarget::TlsPassthrough { hostname } => Some(hostname.clone()),
        RouteTarget::Tcp => None,
    };
    EdgeRoute {
        id: route.id,
        hostname,
        listen_port: route.listen_port,
        proxy_protocol: route.proxy_protocol,
        backends: Vec::new(),
    }
}
