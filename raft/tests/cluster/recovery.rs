//! Going on with one survivor when the majority is lost for good.

use holdfast_model::{Actor, Command, Context, Incarnation, MemberId, Proposal, RequestId, Timestamp};
use holdfast_raft::{Consensus, Fault, MemberIdentity, StartError};
use holdfast_store::Views;

use crate::group::{CLUSTER, Group, PATIENCE};

fn begin(identity: &MemberIdentity) -> Proposal {
    Proposal {
        context: Context {
            actor: Actor::System(identity.member),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(77),
            idempotency_key: None,
            now: Timestamp(1_700_000_100_000),
            entropy: 77,
        },
        command: Command::BeginIncarnation {
            incarnation: Incarnation(identity.incarnation),
            survivor: identity.member,
        },
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i06_one_survivor_goes_on_in_a_new_incarnation_and_the_old_one_is_shut_out() {
    let mut group = Group::of_three().await;
    let mut proposals = Vec::new();
    for number in 0..20 {
        let proposal = group.write(&format!("org-{number}"));
        let revision = group.propose(1 + number % 3, proposal.clone()).await;
        proposals.push((proposal, revision));
    }
    // The one that the state knows: the others were added to this group without enrolling.
    let survivor = 1;
    let written = proposals.last().unwrap().1;
    group.until("the survivor to have it all", || (group.revision(survivor) >= written).then_some(())).await;
    group.stop_all().await;
    let node = group.node(survivor);
    let recovered = Consensus::recover(&group.path(survivor), node, begin).unwrap();
    assert_eq!(recovered.identity.incarnation, 2);

    group.start(survivor).await;
    assert_eq!(group.leader().await, survivor);
    for (proposal, revision) in proposals {
        assert_eq!(group.propose(survivor, proposal).await, revision, "an acknowledged write was lost");
    }
    group.members[&survivor].linearize().await.unwrap();
    let view = group.members[&survivor].store().view().unwrap();
    assert_eq!(view.cluster().unwrap().unwrap().incarnation, Incarnation(2));
    assert_eq!(view.last_before(Incarnation(2)).unwrap(), Some(written));
    drop(view);
    group.members[&survivor].store().verify().unwrap();

    // The others were not lost after all. Nobody of the new incarnation hears them, and once they hear of it they stop.
    let others: Vec<u64> = (1..=3).filter(|id| *id != survivor).collect();
    for id in &others {
        group.start(*id).await;
    }
    let status = group.members[&survivor].status();
    assert_eq!(status.leader, Some(MemberId(survivor)));
    assert_eq!(status.voters.len(), 1);
    let before = group.propose(survivor, group.write("new-incarnation")).await;
    for id in others {
        assert!(group.members[&survivor].app_to(MemberId(id), Vec::new()).await.is_err());
        let fault = tokio::time::timeout(PATIENCE, group.members[&id].failed()).await.unwrap();
        assert_eq!(fault, Fault::Superseded { incarnation: 2 });
        group.stop(id).await;
        let again = Consensus::start(group.config(id)).await.map(drop);
        assert!(matches!(again, Err(StartError::OutOfService { .. })), "{again:?}");
    }

    // A new member joins the new incarnation, under an id that nobody had.
    let identity = MemberIdentity { cluster: CLUSTER.into(), member: MemberId(4), incarnation: 2 };
    Consensus::prepare(&group.path(4), &identity).unwrap();
    group.start(4).await;
    group.members[&survivor].add_learner(MemberId(4), group.node(4)).await.unwrap();
    group.members[&survivor].promote(MemberId(4)).await.unwrap();
    group.members[&4].linearize().await.unwrap();
    assert!(group.revision(4) >= before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_recovery_that_stopped_half_way_is_finished_by_another() {
    let mut group = Group::new();
    group.grow(1).await;
    let written = group.propose(1, group.write("kept")).await;
    group.stop_all().await;
    let marker = group.path(1).join("member.postcard");
    let old_marker = std::fs::read(&marker).unwrap();
    let first = Consensus::recover(&group.path(1), group.node(1), begin).unwrap();
    // As if the power had gone between the log and the marker.
    std::fs::write(&marker, old_marker).unwrap();
    assert!(matches!(Consensus::start(group.config(1)).await, Err(StartError::MarkerMismatch { .. })));
    let second = Consensus::recover(&group.path(1), group.node(1), begin).unwrap();
    assert_eq!(second, first);
    group.start(1).await;
    group.members[&1].linearize().await.unwrap();
    let view = group.members[&1].store().view().unwrap();
    assert_eq!(view.cluster().unwrap().unwrap().incarnation, Incarnation(2));
    assert!(view.revision() > written);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_running_or_empty_member_cannot_be_the_survivor() {
    let group = Group::of_three().await;
    let running = Consensus::recover(&group.path(1), group.node(1), begin);
    assert!(matches!(running, Err(StartError::Log(_))), "{running:?}");
    group.prepare(9);
    let empty = Consensus::recover(&group.path(9), group.node(1), begin);
    assert!(matches!(empty, Err(StartError::NothingToRecover { .. })), "{empty:?}");
}
