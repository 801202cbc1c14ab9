//! Random frames, restarts and lost streams against a model of a few lines.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use holdfast_client::replica::{Applied, Replica};
use holdfast_model::agent::{EdgeRoute, Frame};
use holdfast_model::limits::{REMOVED_ITEMS_FREE, REMOVED_ITEMS_PERCENT_MAX};
use holdfast_model::{Revision, RouteId};
use proptest::prelude::*;
use support::*;

type Marks = BTreeMap<RouteId, u16>;

/// A state: revision, items, and up to where removals are confirmed.
type State = (u64, Marks, u64);

/// The state, the held state that runs ahead of it, and what the held one takes away since which revision.
#[derive(Debug, Clone, Default)]
struct Model {
    known: Option<(u64, Marks)>,
    ahead: Option<State>,
    waiting: Option<(u64, BTreeSet<RouteId>)>,
}

impl Model {
    fn base(&self) -> Option<State> {
        self.ahead.clone().or_else(|| self.known.clone().map(|(revision, marks)| (revision, marks, 0)))
    }

    fn settle(&mut self, (revision, marks, confirmed): State) -> &'static str {
        let known = self.known.as_ref().map(|(_, marks)| marks.clone()).unwrap_or_default();
        let removes: BTreeSet<_> = known.keys().filter(|key| !marks.contains_key(*key)).copied().collect();
        let count = removes.len() as u64;
        let too_many =
            count > REMOVED_ITEMS_FREE && count * 100 > known.len() as u64 * REMOVED_ITEMS_PERCENT_MAX;
        let since = match &self.waiting {
            Some((since, waiting)) if removes.is_subset(waiting) => *since,
            _ => revision,
        };
        if too_many && confirmed < since {
            self.ahead = Some((revision, marks, confirmed));
            self.waiting = Some((since, removes));
            return "held";
        }
        *self = Model { known: Some((revision, marks)), ..Model::default() };
        "applied"
    }

    fn refuse(&mut self) -> &'static str {
        self.ahead = None;
        "refused"
    }
}

#[derive(Debug, Clone)]
enum Step {
    Snapshot { revision: u64, items: Vec<(u64, u16)>, confirmed: u64, whole: bool },
    Delta { back: u64, ahead: u64, upserts: Vec<(u64, u16)>, removes: Vec<u64>, confirmed: u64 },
    Heartbeat { by: i64, confirmed: u64 },
    LostStream,
    Restart,
}

fn steps() -> impl Strategy<Value = Step> {
    let items = || {
        proptest::collection::btree_map(0..24u64, any::<u16>(), 0..24)
            .prop_map(|map| map.into_iter().collect::<Vec<_>>())
    };
    prop_oneof![
        2 => (0..60u64, items(), 0..70u64, prop::bool::weighted(0.8)).prop_map(|(revision, items, confirmed, whole)| {
            Step::Snapshot { revision, items, confirmed, whole }
        }),
        4 => (prop_oneof![8 => Just(0u64), 1 => 1..4u64], 0..5u64, items(), proptest::collection::vec(0..24u64, 0..20), 0..60u64)
            .prop_map(|(back, ahead, upserts, removes, confirmed)| Step::Delta { back, ahead, upserts, removes, confirmed }),
        2 => (-2..4i64, 0..70u64).prop_map(|(by, confirmed)| Step::Heartbeat { by, confirmed }),
        1 => Just(Step::LostStream),
        1 => Just(Step::Restart),
    ]
}

fn routes(items: &[(u64, u16)]) -> Vec<EdgeRoute> {
    items.iter().map(|(id, mark)| route(*id, *mark)).collect()
}

fn name(applied: &Applied) -> &'static str {
    match applied {
        Applied::Applied => "applied",
        Applied::Staged => "staged",
        Applied::Held(_) => "held",
        Applied::Refused(_) => "refused",
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn i06_i07_random_frames_lead_where_the_model_says(steps in proptest::collection::vec(steps(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("edge.redb");
        let mut replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
        let mut model = Model::default();
        let mut highest = 0;
        for step in steps {
            match step {
                Step::Snapshot { revision, items, confirmed, whole } => {
                    let mut frames = snapshot(stamp(revision), routes(&items), confirmed);
                    if !whole {
                        frames.pop();
                    }
                    let stale = model.known.as_ref().is_some_and(|(known, _)| revision < *known);
                    if stale {
                        let first = feed(&mut replica, vec![frames[0].clone()]);
                        prop_assert_eq!(name(&first), model.refuse());
                    } else if whole {
                        let marks = items.iter().map(|(id, mark)| (key(*id), *mark)).collect();
                        let last = feed(&mut replica, frames);
                        prop_assert_eq!(name(&last), model.settle((revision, marks, confirmed)));
                    } else {
                        prop_assert_eq!(name(&feed(&mut replica, frames)), "staged");
                        replica.begin_stream();
                        model.ahead = None;
                    }
                }
                Step::Delta { back, ahead, upserts, removes, confirmed } => {
                    let base = model.base();
                    let at = base.as_ref().map_or(0, |base| base.0);
                    let (from, to) = (at.saturating_sub(back), at + ahead);
                    let frame = Frame::Delta {
                        from: Revision(from),
                        stamp: stamp(to),
                        upserts: routes(&upserts),
                        removes: removes.iter().map(|id| key(*id)).collect(),
                        confirmed_through: Revision(confirmed),
                    };
                    let got = replica.apply(frame).unwrap();
                    let expected = match base {
                        Some((at, mut marks, was_confirmed)) if from == at && to > at => {
                            for id in removes {
                                marks.remove(&key(id));
                            }
                            marks.extend(upserts.iter().map(|(id, mark)| (key(*id), *mark)));
                            model.settle((to, marks, confirmed.max(was_confirmed)))
                        }
                        _ => model.refuse(),
                    };
                    prop_assert_eq!(name(&got), expected);
                }
                Step::Heartbeat { by, confirmed } => {
                    let base = model.base();
                    let at = base.as_ref().map_or(0, |base| base.0);
                    let to = at.saturating_add_signed(by);
                    let got = replica.apply(heartbeat(to, confirmed)).unwrap();
                    let expected = match base {
                        Some((at, marks, was_confirmed)) if to >= at => {
                            model.settle((to, marks, confirmed.max(was_confirmed)))
                        }
                        _ => model.refuse(),
                    };
                    prop_assert_eq!(name(&got), expected);
                }
                Step::LostStream => {
                    replica.begin_stream();
                    model.ahead = None;
                }
                Step::Restart => {
                    drop(replica);
                    replica = Replica::open(&path, CLUSTER).unwrap();
                    prop_assert!(replica.quarantined().is_none());
                    (model.ahead, model.waiting) = (None, None);
                }
            }
            prop_assert_eq!(&marks(&replica.current()), &model.known);
            let revision = replica.revision().map_or(0, |revision| revision.0);
            prop_assert!(revision >= highest, "I6: went back from {} to {}", highest, revision);
            highest = revision;
        }
    }
}
