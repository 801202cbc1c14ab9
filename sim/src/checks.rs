//! What must hold at every moment, seen from outside the members: one state per index, and at the end every acknowledged
//! write in the history.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_model::resource::RouteTarget;
use holdfast_model::{ClusterVersion, Digest, EventPayload, Revision};
use holdfast_raft::{Fault, MemberState};
use holdfast_store::Store;

use crate::client::{Answer, Name, Thing};
use crate::drift::Speed;
use crate::history::Asked;
use crate::host::Host;
use crate::trace::Trace;

/// What was seen so far.
pub(crate) struct Watch {
    /// The state after each entry that any member was seen to have applied.
    states: BTreeMap<u64, (Digest, Revision)>,
    /// Who led in which term.
    leaders: BTreeSet<(u64, u64)>,
    /// What each member was last seen to have applied.
    applied: BTreeMap<u64, u64>,
    /// The entries after which another cluster version was first seen.
    versions: BTreeMap<u64, ClusterVersion>,
    /// The newest version that every host's build supports.
    pub(crate) supported: ClusterVersion,
    /// The speed of the fastest clock.
    pub(crate) fastest: Speed,
}

impl Default for Watch {
    fn default() -> Self {
        Watch {
            states: BTreeMap::new(),
            leaders: BTreeSet::new(),
            applied: BTreeMap::new(),
            versions: BTreeMap::new(),
            supported: ClusterVersion::NEWEST,
            fastest: Speed::default(),
        }
    }
}

impl Watch {
    /// How often a member came to lead.
    pub(crate) fn leaders(&self) -> usize {
        self.leaders.len()
    }

    /// The last index that any member applied.
    pub(crate) fn last_index(&self) -> u64 {
        self.states.last_key_value().map_or(0, |(index, _)| *index)
    }

    /// The newest revision that any member was seen to have.
    pub(crate) fn newest(&self) -> Revision {
        self.states.last_key_value().map_or(Revision(0), |(_, (_, revision))| *revision)
    }

    /// Looks at one member.
    pub(crate) fn see(&mut self, now_ms: u64, host: &Host, trace: &mut Trace) -> Result<(), String> {
        let Some(member) = host.member() else { return Ok(()) };
        let store = member.store();
        let Some(applied) = store.applied() else { return Ok(()) };
        if self.applied.insert(host.id, applied.0) == Some(applied.0) {
            return Ok(());
        }
        // Leaders measure log time by their own clocks, so it keeps up with the fastest at most.
        let passed_ms = self.fastest.local(now_ms).as_millis();
        if u128::from(store.log_time_ms()) > passed_ms {
            return Err(format!(
                "I4: host {} has log time {} ms after {passed_ms} ms of the fastest clock: what is kept by it is forgotten too early",
                host.id,
                store.log_time_ms()
            ));
        }
        self.see_version(host.id, applied.0, store.cluster_version(), store.revision())?;
        let (digest, revision) = (store.digest(), store.revision());
        trace.line(
            now_ms,
            format_args!("host {} applied {} revision {revision} {digest}", host.id, applied.0),
        );
        let first = self.states.entry(applied.0).or_insert((digest, revision));
        if *first != (digest, revision) {
            return Err(format!(
                "I1: after entry {} host {} has revision {revision} and digest {digest}, another had revision {} and digest {}",
                applied.0, host.id, first.1, first.0
            ));
        }
        Ok(())
    }

    /// The version never falls, and rises only to one that every member supports.
    fn see_version(
        &mut self,
        host: u64,
        index: u64,
        version: ClusterVersion,
        revision: Revision,
    ) -> Result<(), String> {
        // Before the cluster begins there is none.
        if revision == Revision(0) {
            return Ok(());
        }
        if version > self.supported {
            return Err(format!(
                "I1: host {host} is at cluster version {version} after entry {index}, and there is a member whose build supports {} at most",
                self.supported
            ));
        }
        let before = self.versions.range(..=index).next_back().map(|(_, version)| *version);
        let after = self.versions.range(index + 1..).next().map(|(_, version)| *version);
        if before.is_some_and(|before| before > version) || after.is_some_and(|after| after < version) {
            return Err(format!(
                "I1: host {host} is at cluster version {version} after entry {index}; before it came {before:?}, after it {after:?}"
            ));
        }
        if before != Some(version) {
            self.versions.insert(index, version);
        }
        Ok(())
    }

    /// The newest cluster version that was seen.
    pub(crate) fn version(&self) -> ClusterVersion {
        self.versions.values().max().copied().unwrap_or(ClusterVersion::ONE)
    }

    /// How often the version rose.
    pub(crate) fn raises(&self) -> u64 {
        let versions: BTreeSet<ClusterVersion> = self.versions.values().copied().collect();
        versions.len().saturating_sub(1) as u64
    }

    /// Looks at who leads, and whether a member stopped serving. The fault is the caller's to judge.
    pub(crate) fn see_status(&mut self, now_ms: u64, host: &Host, trace: &mut Trace) -> Option<Fault> {
        let status = host.member()?.status();
        // openraft orders leaders by term and member, so that one term may see several, each with a vote above the one
        // before: two leaders of one term are not wrong by themselves.
        if status.state == MemberState::Leader && self.leaders.insert((status.term, host.id)) {
            trace.line(now_ms, format_args!("host {} leads term {}", host.id, status.term));
        }
        status.fault
    }
}

/// What happened to one app or route, by the history of events.
#[derive(Default)]
struct Life {
    created: Option<Revision>,
    deleted: Option<Revision>,
}

/// Reads the whole history of a member and looks for every acknowledged write in it.
pub(crate) fn scan(store: &Store, history: &[Asked]) -> Result<u64, String> {
    let fail = |error: holdfast_store::StoreError| format!("the history could not be read: {error}");
    let view = store.view().map_err(fail)?;
    let mut lives = Lives::default();
    let mut last = Revision(0);
    while last < view.revision() {
        let page = view.events(last, 500, None).map_err(fail)?;
        if page.events.is_empty() {
            return Err(format!(
                "I13: the history ends at revision {last} and the state is at {}",
                view.revision()
            ));
        }
        for event in page.events {
            if event.revision != last.next() {
                return Err(format!("I1: revision {} follows {last} in the history", event.revision));
            }
            last = event.revision;
            lives.note(&event)?;
        }
    }
    for (request, asked) in history.iter().enumerate() {
        let found = match asked.answered {
            Some((_, Answer::Created(id, revision))) => {
                lives.things.get(&id).and_then(|l| l.created) == Some(revision)
            }
            Some((_, Answer::Deleted(revision))) => match &asked.question {
                crate::client::Question::Delete(id, _) => {
                    lives.things.get(id).and_then(|l| l.deleted) == Some(revision)
                }
                _ => false,
            },
            Some((_, Answer::Found(found, revision))) if lives.at(&asked.name, revision) != found => {
                return Err(format!(
                    "I3: request {request} read {found:?} under the name {} at revision {revision}, and the history has {:?}",
                    asked.name,
                    lives.at(&asked.name, revision)
                ));
            }
            _ => true,
        };
        if !found {
            return Err(format!(
                "I2: request {request} was acknowledged ({:?}) and is not in the history",
                asked.answered
            ));
        }
    }
    Ok(last.0)
}

/// What happened to all apps and routes.
#[derive(Default)]
struct Lives {
    things: BTreeMap<Thing, Life>,
    /// What had a name from a revision on.
    names: BTreeMap<(Name, Revision), Option<Thing>>,
    name_of: BTreeMap<Thing, Name>,
}

impl Lives {
    fn note(&mut self, event: &holdfast_model::Event) -> Result<(), String> {
        let (thing, created) = match &event.payload {
            EventPayload::AppCreated(app) => (Thing::App(app.id), Some(Name::App(app.name.clone()))),
            EventPayload::AppDeleted { app } => (Thing::App(*app), None),
            EventPayload::RouteCreated(route) => match &route.target {
                RouteTarget::TlsPassthrough { hostname } => {
                    (Thing::Route(route.id), Some(Name::Host(hostname.clone())))
                }
                RouteTarget::Tcp => return Ok(()),
            },
            EventPayload::RouteDeleted { route } => (Thing::Route(*route), None),
            _ => return Ok(()),
        };
        let life = self.things.entry(thing).or_default();
        let slot = if created.is_some() { &mut life.created } else { &mut life.deleted };
        if let Some(first) = slot.replace(event.revision) {
            return Err(format!(
                "I4: {thing:?} was made or deleted twice, at {first} and {}",
                event.revision
            ));
        }
        if let Some(name) = created {
            // Routes only: orgs may have apps of one name.
            if matches!(name, Name::Host(_)) && self.at(&name, event.revision).is_some() {
                return Err(format!("I8: {name} was given away twice, at {}", event.revision));
            }
            self.name_of.insert(thing, name.clone());
            self.names.insert((name, event.revision), Some(thing));
        } else if let Some(name) = self.name_of.get(&thing) {
            self.names.insert((name.clone(), event.revision), None);
        }
        Ok(())
    }

    /// What had a name at a revision.
    fn at(&self, name: &Name, revision: Revision) -> Option<Thing> {
        let until = (name.clone(), Revision(0))..=(name.clone(), revision);
        self.names.range(until).next_back().and_then(|(_, thing)| *thing)
    }
}
