//! A rolling upgrade: members of two builds in one group, and the cluster version that rises when the last one is new.
//!
//! One build acts as the earlier one by a limit on the cluster version that it supports, so these tests show the rules
//! of the rise and not the earlier build's own code; `docs/ops/runbooks/upgrade-a-cluster.md` says what shows that.

use std::time::Duration;

use holdfast_model::ClusterVersion;
use tokio::time::sleep;

use crate::group::Group;

const ONE: ClusterVersion = ClusterVersion::ONE;
const TWO: ClusterVersion = ClusterVersion::TWO;
/// Longer than the leader takes to find that the version can rise, several times over.
const SEVERAL_LOOKS: Duration = Duration::from_secs(4);

impl Group {
    fn version(&self, id: u64) -> ClusterVersion {
        self.members[&id].store().cluster_version()
    }

    /// Stops a member and starts it as a build that supports the versions up to `newest`.
    async fn replace_build(&mut self, id: u64, newest: ClusterVersion) {
        self.stop(id).await;
        self.version_max = newest;
        self.start(id).await;
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
