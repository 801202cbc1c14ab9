//! The replica's rules, on real redb files, across reopening.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;

use holdfast_client::replica::{Applied, DiskError, Refusal, Replica};
use holdfast_model::agent::{EdgeRoute, Frame, Held, Stamp};
use holdfast_model::{ClusterId, Incarnation, Revision};
use support::*;

fn open(path: &Path) -> Replica<EdgeRoute> {
    Replica::open(path, CLUSTER).unwrap()
}

fn with_routes(path: &Path, revision: u64, count: u64) -> Replica<EdgeRoute> {
    let mut replica = open(path);
    let routes = (0..count).map(|id| route(id, 443)).collect();
    assert_eq!(feed(&mut replica, snapshot(stamp(revision), routes, 0)), Applied::Applied);
    replica
}

fn routes(ids: std::ops::Range<u64>) -> Vec<EdgeRoute> {
    ids.map(|id| route(id, 443)).collect()
}

#[test]
fn i05_nothing_known_is_not_nothing_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let replica = open(&path);
    assert!(replica.current().is_none());
    drop(replica);

    // An empty state that was really received is another thing.
    let mut replica = open(&path);
    feed(&mut replica, snapshot(stamp(3), vec![], 0));
    assert_eq!(marks(&replica.current()).unwrap().1.len(), 0);
    drop(replica);
    assert!(open(&path).current().is_some());
}

#[test]
fn i05_state_survives_restart_and_lost_streams_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 5, 20);
    feed(&mut replica, vec![delta(5, 6, vec![route(3, 8443), route(30, 1)], vec![4])]);
    let before = marks(&replica.current());
    for _ in 0..3 {
        // A snapshot breaks off in the middle.
        feed(&mut replica, snapshot(stamp(9), vec![route(1, 1), route(2, 2), route(3, 3)], 0)[..2].to_vec());
        replica.begin_stream();
        assert_eq!(marks(&replica.current()), before);
    }
    drop(replica);
    assert_eq!(marks(&open(&path).current()), before);
}

#[test]
fn i06_older_snapshots_deltas_and_heartbeats_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 10, 2);
    let before = marks(&replica.current());
    let stale = Refusal::Stale { known: Revision(10), offered: Revision(9) };
    assert_eq!(
        feed(&mut replica, vec![snapshot(stamp(9), vec![], 0)[0].clone()]),
        Applied::Refused(stale.clone())
    );
    assert_eq!(feed(&mut replica, vec![heartbeat(9, 99)]), Applied::Refused(stale.clone()));
    assert_eq!(feed(&mut replica, vec![delta(8, 9, vec![], vec![0])]), Applied::Refused(stale));
    let gap = Refusal::Gap { known: Revision(10), from: Revision(11) };
    assert_eq!(feed(&mut replica, vec![delta(11, 12, vec![], vec![0])]), Applied::Refused(gap));
    let gap = Refusal::Gap { known: Revision(10), from: Revision(9) };
    assert_eq!(feed(&mut replica, vec![delta(9, 12, vec![], vec![0])]), Applied::Refused(gap));
    assert!(matches!(feed(&mut replica, vec![delta(10, 10, vec![], vec![0])]), Applied::Refused(_)));
    assert_eq!(marks(&replica.current()), before);

    // And the refusal outlives a restart.
    drop(replica);
    let mut replica = open(&path);
    assert!(matches!(feed(&mut replica, vec![heartbeat(9, 0)]), Applied::Refused(_)));
    assert_eq!(feed(&mut replica, vec![delta(10, 11, vec![route(1, 7)], vec![])]), Applied::Applied);
}

#[test]
fn i06_another_incarnation_needs_a_hand_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 100, 2);
    let restored = || snapshot(stamp_in(2, 4), vec![route(9, 9)], 0);
    let refusal = Refusal::Incarnation { known: Incarnation(1), offered: Incarnation(2) };
    assert_eq!(feed(&mut replica, vec![restored()[0].clone()]), Applied::Refused(refusal));
    assert_eq!(replica.revision(), Some(Revision(100)));

    replica.hand_over(Incarnation(2)).unwrap();
    drop(replica);
    let mut replica = open(&path);
    assert!(matches!(
        feed(&mut replica, vec![snapshot(stamp_in(3, 200), vec![], 0)[0].clone()]),
        Applied::Refused(_)
    ));
    assert_eq!(feed(&mut replica, restored()), Applied::Applied);
    assert_eq!(replica.revision(), Some(Revision(4)));

    // The old history is over, and the permission is used up.
    drop(replica);
    let mut replica = open(&path);
    assert!(matches!(
        feed(&mut replica, vec![snapshot(stamp(101), vec![], 0)[0].clone()]),
        Applied::Refused(_)
    ));
    assert_eq!(marks(&replica.current()).unwrap().1.len(), 1);
}

#[test]
fn i06_no_hand_over_leads_back_and_only_a_snapshot_begins_an_incarnation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = open(&path);
    feed(&mut replica, snapshot(stamp_in(2, 10), routes(0..2), 0));
    let before = marks(&replica.current());
    for (handed_over, offered) in [(1, 1), (3, 3)] {
        replica.hand_over(Incarnation(handed_over)).unwrap();
        let stamp = stamp_in(offered, 11);
        let delta = Frame::Delta {
            from: Revision(10),
            stamp,
            upserts: vec![],
            removes: vec![key(0)],
            confirmed_through: Revision(0),
        };
        let heartbeat = Frame::Heartbeat { stamp, confirmed_through: Revision(11) };
        let refusal = Refusal::Incarnation { known: Incarnation(2), offered: Incarnation(offered) };
        for frame in [delta, heartbeat] {
            assert_eq!(feed(&mut replica, vec![frame]), Applied::Refused(refusal.clone()));
        }
        if offered < 2 {
            let older = snapshot(stamp, vec![], 0);
            assert_eq!(feed(&mut replica, older[..1].to_vec()), Applied::Refused(refusal));
        }
        assert_eq!(marks(&replica.current()), before);
    }
    assert_eq!(feed(&mut replica, snapshot(stamp_in(3, 1), routes(5..6), 0)), Applied::Applied);
}

#[test]
fn i06_a_foreign_cluster_is_refused_on_the_wire_and_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 1, 1);
    let foreign = Stamp { cluster: ClusterId::from_bits(8), ..stamp(50) };
    let refused = feed(&mut replica, vec![snapshot(foreign, vec![], 0)[0].clone()]);
    assert!(matches!(refused, Applied::Refused(Refusal::ForeignCluster { .. })));
    drop(replica);
    let error = Replica::<EdgeRoute>::open(&path, ClusterId::from_bits(8)).unwrap_err();
    assert!(matches!(error, DiskError::ForeignCluster { .. }));
    assert_eq!(marks(&open(&path).current()).unwrap().1.len(), 1);
}

#[test]
fn i07_a_large_removal_waits_for_confirmation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 10, 20);
    let held = Held { revision: Revision(11), removes: 20, of: 20 };
    assert_eq!(feed(&mut replica, snapshot(stamp(11), vec![], 10)), Applied::Held(held));
    let view = replica.current().unwrap();
    assert_eq!((view.items.len(), view.held, view.stamp.revision), (20, Some(held), Revision(10)));

    // Heartbeats that confirm less change nothing; one that confirms enough does.
    assert_eq!(feed(&mut replica, vec![heartbeat(15, 10)]), Applied::Held(held));
    assert_eq!(replica.current().unwrap().items.len(), 20);
    assert_eq!(feed(&mut replica, vec![heartbeat(16, 11)]), Applied::Applied);
    let view = replica.current().unwrap();
    assert_eq!((view.items.len(), view.held, view.stamp.revision), (0, None, Revision(16)));
    drop(replica);
    assert_eq!(marks(&open(&path).current()).unwrap().1.len(), 0);
}

#[test]
fn i07_removals_that_add_up_over_deltas_within_a_hold_are_held_and_follow_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 10, 20);
    assert!(matches!(feed(&mut replica, vec![delta(10, 11, vec![], (0..12).collect())]), Applied::Held(_)));
    // Deltas build on the held state, and wait with it.
    let held = Held { revision: Revision(11), removes: 12, of: 20 };
    assert_eq!(feed(&mut replica, vec![delta(11, 12, vec![route(40, 1)], vec![])]), Applied::Held(held));
    assert_eq!(marks(&replica.current()).unwrap().1.len(), 20);
    // The items come back: nothing is to be confirmed any more.
    let back = (0..10).map(|id| route(id, 443)).collect();
    assert_eq!(feed(&mut replica, vec![delta(12, 13, back, vec![])]), Applied::Applied);
    let (revision, items) = marks(&replica.current()).unwrap();
    assert_eq!((revision, items.len()), (13, 19));
    assert!(items.contains_key(&key(40)));
}

#[test]
fn i07_a_confirmation_of_what_is_held_counts_for_a_later_state_that_removes_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut replica = with_routes(&folder.path().join("edge.redb"), 10, 20);
    let first = snapshot(stamp(12), routes(0..5), 0);
    let held = Held { revision: Revision(12), removes: 15, of: 20 };
    assert_eq!(feed(&mut replica, first), Applied::Held(held));
    // The stream breaks; another member, further on, takes away the same items and adds one.
    replica.begin_stream();
    let mut items = routes(0..5);
    items.push(route(70, 1));
    assert_eq!(feed(&mut replica, snapshot(stamp(20), items.clone(), 11)), Applied::Held(held));
    // The operator confirms what was reported; by then the history has gone on.
    assert_eq!(feed(&mut replica, snapshot(stamp(22), items, 12)), Applied::Applied);
    assert_eq!(marks(&replica.current()).unwrap().1.len(), 6);
}

#[test]
fn i07_a_confirmation_does_not_count_for_more_than_was_held() {
    let folder = tempfile::tempdir().unwrap();
    let mut replica = with_routes(&folder.path().join("edge.redb"), 10, 20);
    assert!(matches!(feed(&mut replica, snapshot(stamp(12), routes(0..5), 0)), Applied::Held(_)));
    let more = Held { revision: Revision(22), removes: 16, of: 20 };
    assert_eq!(feed(&mut replica, snapshot(stamp(22), routes(0..4), 12)), Applied::Held(more));
    assert_eq!(feed(&mut replica, vec![heartbeat(30, 21)]), Applied::Held(more));
    assert_eq!(feed(&mut replica, vec![heartbeat(31, 22)]), Applied::Applied);
}

#[test]
fn i07_a_hold_is_reported_after_restart_and_decided_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let mut replica = with_routes(&path, 10, 20);
    feed(&mut replica, snapshot(stamp(12), vec![], 0));
    drop(replica);
    let mut replica = open(&path);
    assert_eq!(replica.current().unwrap().held.unwrap().revision, Revision(12));
    assert_eq!(replica.current().unwrap().items.len(), 20);
    // The next stream begins at revision 10 again, and this time it is a small change.
    assert_eq!(feed(&mut replica, vec![delta(10, 13, vec![], vec![0])]), Applied::Applied);
    let view = replica.current().unwrap();
    assert_eq!((view.items.len(), view.held), (19, None));
}

#[test]
fn i07_small_removals_and_confirmed_ones_pass() {
    let folder = tempfile::tempdir().unwrap();
    let mut small = with_routes(&folder.path().join("a.redb"), 1, 8);
    assert_eq!(feed(&mut small, snapshot(stamp(2), vec![], 0)), Applied::Applied);
    let mut half = with_routes(&folder.path().join("b.redb"), 1, 20);
    assert_eq!(feed(&mut half, vec![delta(1, 2, vec![], (0..10).collect())]), Applied::Applied);
    let mut confirmed = with_routes(&folder.path().join("c.redb"), 1, 20);
    assert_eq!(feed(&mut confirmed, snapshot(stamp(2), vec![], 2)), Applied::Applied);
}

#[test]
fn i08_subscribers_see_whole_states_only_and_unchanged_items_are_shared() {
    let folder = tempfile::tempdir().unwrap();
    let mut replica = open(&folder.path().join("edge.redb"));
    let mut views = replica.subscribe();
    let frames = snapshot(stamp(4), (0..10).map(|id| route(id, 1)).collect(), 0);
    let (last, rest) = frames.split_last().unwrap();
    feed(&mut replica, rest.to_vec());
    assert!(!views.has_changed().unwrap());
    feed(&mut replica, vec![last.clone()]);
    assert!(views.has_changed().unwrap());
    let first = views.borrow_and_update().clone().unwrap();
    feed(&mut replica, vec![heartbeat(5, 0)]);
    let second = views.borrow_and_update().clone().unwrap();
    assert!(std::sync::Arc::ptr_eq(&first.items, &second.items));
    assert_eq!(second.stamp.revision, Revision(5));
    feed(&mut replica, vec![heartbeat(5, 0)]);
    assert!(!views.has_changed().unwrap());
}

#[test]
fn i14_contradictory_frames_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut replica = with_routes(&folder.path().join("edge.redb"), 10, 3);
    let before = marks(&replica.current());
    let begin = |items| Frame::SnapshotBegin { stamp: stamp(11), items, confirmed_through: Revision(0) };
    let one = || Frame::SnapshotItems(vec![route(1, 1)]);
    for frames in [
        vec![Frame::SnapshotEnd],
        vec![one()],
        vec![begin(1), begin(1)],
        vec![begin(1), one(), one()],
        vec![begin(2), one(), one()],
        vec![begin(2), one(), Frame::SnapshotEnd],
        vec![begin(0), heartbeat(12, 0)],
        vec![begin(0), delta(10, 11, vec![], vec![])],
        vec![begin(u64::MAX)],
        vec![delta(10, 11, (0..1_001).map(|id| route(id, 1)).collect(), vec![])],
    ] {
        assert!(matches!(feed(&mut replica, frames.clone()), Applied::Refused(_)), "{frames:?}");
        assert_eq!(marks(&replica.current()), before);
    }
}

#[test]
fn two_agents_cannot_share_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    let _first = open(&path);
    assert!(matches!(Replica::<EdgeRoute>::open(&path, CLUSTER), Err(DiskError::InUse { .. })));
}
