//! A rolling upgrade: members of two builds in one group, and the cluster version that rises when the last one is new.
//!
//! One build acts as the earlier one by a limit on the cluster version that it supports, so these tests show the rules
//! of the rise and not the earlier build's own code; `docs/ops/runbooks/upgrade-a-cluster.md` says what shows that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use holdfast_model::{ClusterVersion, EventPayload, MemberId, Proposal, Revision};
use holdfast_raft::{Consensus, StartError};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::group::Group;

const ONE: ClusterVersion = ClusterVersion::ONE;
const TWO: ClusterVersion = ClusterVersion::TWO;
/// Longer than the leader takes to find that the version can rise, several times over.
const SEVERAL_LOOKS: Duration = Duration::from_secs(4);

impl Group {
    fn version(&self, id: u64) -> ClusterVersion {
        self.members[&id].store().cluster_version()
    }

    async fn until_leads(&self, id: u64) {
        while self.leader().await != id {
            // It may fail as well: a member that just started is not caught up yet.
            let _ = self.members[&id].transfer_leader(MemberId(id)).await;
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stops a member and starts it as a build that supports the versions up to `newest`.
    async fn replace_build(&mut self, id: u64, newest: ClusterVersion) {
        self.stop(id).await;
        self.version_max = newest;
        let member = loop {
            match Consensus::start(self.config(id)).await {
                Ok(member) => break member,
                // Whoever still asks the stopped member holds its port for a moment.
                Err(StartError::Listen { .. }) => sleep(Duration::from_millis(50)).await,
                Err(error) => panic!("{}", crate::group::sentence(&error)),
            }
        };
        self.members.insert(id, member);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_the_version_rises_when_the_last_member_supports_it_and_never_before() {
    let mut group = Group::new();
    group.version_max = ONE;
    group.grow(3).await;
    for id in [1, 2] {
        group.replace_build(id, TWO).await;
        group.leader().await;
        sleep(SEVERAL_LOOKS).await;
        assert!((1..=3).all(|id| group.version(id) == ONE), "member 3 does not support version 2");
    }
    // A member that is away is asked for too: it could come back as it was.
    group.stop(3).await;
    sleep(SEVERAL_LOOKS).await;
    assert!((1..=2).all(|id| group.version(id) == ONE), "member 3 could come back as it was");
    group.version_max = TWO;
    group.start(3).await;
    group.until("version 2", || (1..=3).all(|id| group.version(id) == TWO).then_some(())).await;

    // From here on the earlier build is refused, and says why.
    group.stop(2).await;
    group.version_max = ONE;
    let refused = holdfast_raft::Consensus::start(group.config(2)).await.map(drop).unwrap_err();
    let told = crate::group::sentence(&refused);
    assert!(told.contains("version 2") && told.contains("supports 1"), "{told}");
    group.version_max = TWO;
    group.start(2).await;
    let write = group.write("after");
    group.propose(2, write).await;
    group.stop_all().await;
}

/// The members that can be asked now; a member that is being replaced is not among them.
type Running = Arc<Mutex<BTreeMap<u64, Consensus>>>;
/// What was acknowledged: the name, and the revision of the event that says so.
type Acknowledged = Arc<Mutex<Vec<(String, Revision)>>>;

/// Writes one after the other until it is stopped, each through one member after the other until it is answered.
async fn write_on(
    proposals: Vec<(String, Proposal)>,
    running: Running,
    stop: CancellationToken,
    done: Acknowledged,
) {
    for (turn, (name, proposal)) in proposals.into_iter().enumerate() {
        for attempt in 0.. {
            let member = {
                let running = running.lock().unwrap();
                running.values().nth((turn + attempt) % running.len()).unwrap().clone()
            };
            match member.propose(proposal.clone()).await {
                Ok(Ok(accepted)) => {
                    done.lock().unwrap().push((name, accepted.revision));
                    break;
                }
                Ok(Err(rejection)) => panic!("{name}: {rejection}"),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
        if stop.is_cancelled() {
            return;
        }
    }
    panic!("there were too few writes prepared");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_i04_members_are_replaced_one_by_one_under_writes() {
    const WRITERS: usize = 4;
    let mut group = Group::new();
    group.version_max = ONE;
    group.grow(3).await;
    let running: Running = Arc::new(Mutex::new(group.members.clone()));
    let (stop, done) = (CancellationToken::new(), Acknowledged::default());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let names = (0..20_000).map(|n| format!("w{writer}-{n}"));
            let proposals = names.map(|name| (name.clone(), group.write(&name))).collect();
            tokio::spawn(write_on(proposals, running.clone(), stop.clone(), done.clone()))
        })
        .collect();
    for id in 1..=3 {
        running.lock().unwrap().remove(&id);
        group.replace_build(id, TWO).await;
        running.lock().unwrap().insert(id, group.members[&id].clone());
        if id == 3 {
            break;
        }
        // Once a new build leads and once an old one, each for some writes, and every member reads them.
        for leader in [1, 3] {
            group.until_leads(leader).await;
            let before = done.lock().unwrap().len();
            group.until("writes", || (done.lock().unwrap().len() > before + 40).then_some(())).await;
            let newest = done.lock().unwrap().last().unwrap().1;
            for member in group.members.values() {
                member.linearize().await.unwrap();
                assert!(member.store().revision() >= newest);
            }
        }
        assert!((1..=3).all(|id| group.version(id) == ONE), "member 3 is not new yet");
    }
    group.until("version 2", || (1..=3).all(|id| group.version(id) == TWO).then_some(())).await;
    let before = done.lock().unwrap().len();
    group.until("writes at version 2", || (done.lock().unwrap().len() > before + 40).then_some(())).await;
    stop.cancel();
    for writer in writers {
        writer.await.unwrap();
    }
    let digests = || group.members.values().map(|m| m.store().digest()).collect::<BTreeSet<_>>().len();
    group.until("one state", || (digests() == 1).then_some(())).await;
    let done = done.lock().unwrap().clone();
    for member in group.members.values() {
        member.store().verify().unwrap();
        let view = member.store().view().unwrap();
        for (name, revision) in &done {
            let event = view.event(*revision).unwrap().unwrap();
            assert!(matches!(&event.payload, EventPayload::OrgCreated(org) if org.name.as_str() == name));
        }
    }
    group.stop_all().await;
}
