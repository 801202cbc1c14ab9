//! What must hold at every moment, seen from outside the members: one state per index, and at the end every acknowledged
//! write in the history.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_model::resource::RouteTarget;
use holdfast_model::{Digest, EventPayload, Revision};
use holdfast_raft::{Fault, MemberState};
use holdfast_store::Store;

use crate::client::{Answer, Name, Thing};
use crate::history::Asked;
use crate::host::Host;
use crate::trace::Trace;

/// What was seen so far.
#[derive(Default)]
pub(crate) struct Watch {
    /// The state after each entry that any member was seen to have applied.
    states: BTreeMap<u64, (Digest, Revision)>,
    /// Who led in which term.
    leaders: BTreeSet<(u64, u64)>,
    /// What each member was last seen to have applied.
    applied: BTreeMap<u64, u64>,
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

    /// Looks at one member.
    pub(crate) fn see(&mut self, now_ms: u64, host: &Host, trace: &mut Trace) -> Result<(), String> {
        let Some(member) = host.member() else { return Ok(()) };
        let store = member.store();
        let Some(applied) = store.applied() else { return Ok(()) };
        if self.applied.insert(host.id, applied.0) == Some(applied.0) {
            return Ok(());
        }
        if store.log_time_ms() > now_ms {
            return Err(format!(
                "I4: host {} has log time {} ms after {now_ms} ms: what is kept by it is forgotten too early",
                host.id,
                store.log_time_ms()
            ));
        }
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
