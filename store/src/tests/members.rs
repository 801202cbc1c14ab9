//! Members that join, vote, leave, and one that goes on alone.

use super::world::{World, code};
use crate::Views;
use holdfast_model::command::{Joiner, NewMember};
use holdfast_model::resource::{Enrolled, EnrolmentKind};
use holdfast_model::*;

fn join(world: &mut World, name: &str, kind: EnrolmentKind) -> MemberId {
    let digest = Digest::of(format!("secret of {name} at {}", world.store.revision()).as_bytes());
    let create = Command::CreateEnrolment { kind, digest, ttl_ms: 60_000 };
    let Output::Enrolment(id) = world.operator(create).unwrap().output else { panic!("no enrolment") };
    let new = NewMember {
        name: name.parse().unwrap(),
        raft_addr: "10.0.0.9:7444".into(),
        api_addr: "10.0.0.9:7443".into(),
    };
    let enrol = Command::Enrol { digest, key: Digest([7; 32]), joiner: Joiner::Member(new) };
    let Output::Enrolled(Enrolled::Member(member)) =
        world.as_actor(Actor::Enrolling(id), None, enrol).unwrap().output
    else {
        panic!("no member")
    };
    member
}

#[test]
fn a_removed_members_id_is_never_given_again_and_its_name_is() {
    let mut world = World::new();
    let two = join(&mut world, "two", EnrolmentKind::Member);
    world.operator(Command::RemoveMember { member: two }).unwrap();
    let revision = world.store.revision();
    world.operator(Command::RemoveMember { member: two }).unwrap();
    assert_eq!(world.store.revision(), revision, "a repetition made an event");
    assert!(world.view().member(two).unwrap().unwrap().removed);
    let again = join(&mut world, "two", EnrolmentKind::Member);
    assert!(again > two, "{again} after {two}");
    let back = Command::SetMemberVotes { member: two, votes: true };
    assert_eq!(code(world.operator(back)), Code::FailedPrecondition);
    let absent = Command::RemoveMember { member: MemberId(99) };
    assert_eq!(code(world.operator(absent)), Code::NotFound);
    world.check();
}

#[test]
fn the_last_member_that_votes_can_neither_leave_nor_stop_voting() {
    let mut world = World::new();
    let one = MemberId(1);
    let learner = join(&mut world, "learner", EnrolmentKind::Learner);
    assert_eq!(world.view().voting_members().unwrap(), [one]);
    let demote = |member| Command::SetMemberVotes { member, votes: false };
    assert_eq!(code(world.operator(Command::RemoveMember { member: one })), Code::FailedPrecondition);
    assert_eq!(code(world.operator(demote(one))), Code::FailedPrecondition);
    world.operator(Command::SetMemberVotes { member: learner, votes: true }).unwrap();
    assert_eq!(world.view().voting_members().unwrap(), [one, learner]);
    world.operator(demote(one)).unwrap();
    let revision = world.store.revision();
    world.operator(demote(one)).unwrap();
    assert_eq!(world.store.revision(), revision, "a repetition made an event");
    assert_eq!(world.view().voting_members().unwrap(), [learner]);
    world.check();
}

#[test]
fn tenants_know_nothing_of_members() {
    let mut world = World::new();
    let tenant = world.tenant("acme", 10);
    for member in [MemberId(1), MemberId(99)] {
        assert_eq!(code(world.tenant_asks(&tenant, Command::RemoveMember { member })), Code::NotFound);
        let demote = Command::SetMemberVotes { member, votes: false };
        assert_eq!(code(world.tenant_asks(&tenant, demote)), Code::NotFound);
    }
}

#[test]
fn i12_a_new_incarnation_is_written_down_and_leaves_one_member() {
    let mut world = World::new();
    let two = join(&mut world, "two", EnrolmentKind::Member);
    let learner = join(&mut world, "learner", EnrolmentKind::Learner);
    let last = world.store.revision();
    let begin =
        |incarnation, survivor| Command::BeginIncarnation { incarnation: Incarnation(incarnation), survivor };
    // Nobody begins one over the network, and only the next one can begin.
    assert_eq!(code(world.operator(begin(2, learner))), Code::Unauthenticated);
    let by = |world: &mut World, incarnation, survivor| {
        world.as_actor(Actor::System(survivor), None, begin(incarnation, survivor))
    };
    assert_eq!(code(by(&mut world, 3, learner)), Code::FailedPrecondition);
    assert_eq!(code(by(&mut world, 2, MemberId(99))), Code::FailedPrecondition);
    by(&mut world, 2, learner).unwrap();
    let revision = world.store.revision();
    by(&mut world, 2, learner).unwrap();
    assert_eq!(world.store.revision(), revision, "a repetition made an event");

    let view = world.view();
    assert_eq!(view.cluster().unwrap().unwrap().incarnation, Incarnation(2));
    assert_eq!(view.last_before(Incarnation(2)).unwrap(), Some(last));
    assert_eq!(view.last_before(Incarnation(1)).unwrap(), None);
    assert_eq!(view.voting_members().unwrap(), [learner]);
    assert!(view.member(two).unwrap().unwrap().removed);
    let event = view.event(last.next()).unwrap().unwrap();
    assert_eq!(event.actor, Actor::System(learner));
    assert_eq!(event.payload.kind(), "incarnation_began");
    world.check();
}

#[test]
fn i13_a_verification_tells_the_views_of_an_earlier_revision() {
    let mut world = World::new();
    let mut digests = vec![(world.store.revision(), world.store.views_digest())];
    for name in ["two", "three"] {
        join(&mut world, name, EnrolmentKind::Member);
        digests.push((world.store.revision(), world.store.views_digest()));
    }
    for (at, views) in digests {
        let (verified, then) = world.store.verify_at(at).unwrap();
        assert_eq!(then, views, "at {at}");
        assert_eq!(verified.revision, world.store.revision());
        let replayed = world.store.replayed(at).unwrap();
        assert_eq!(replayed.rebuilt.views, views);
        assert_eq!(replayed.rows["cluster"], 1);
    }
    assert!(world.store.verify_at(world.store.revision().next()).is_err());
    assert_eq!(world.view().first_held().unwrap(), Some(Revision(1)));
}
