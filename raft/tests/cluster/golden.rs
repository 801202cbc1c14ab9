//! A member's folder as an earlier build left it: `raft/golden/README.md` says how it was made.

use std::path::Path;

use holdfast_model::ClusterVersion;

use crate::group::Group;

impl Group {
    /// Puts a member's files where they belong; `with_state` or from the log alone.
    fn restore(&self, id: u64, version: &str, with_state: bool) {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(version);
        let to = self.path(id);
        std::fs::create_dir_all(to.join("snapshots")).unwrap();
        let files = ["member.postcard", "log.redb"].into_iter().chain(with_state.then_some("state.redb"));
        for file in files {
            std::fs::copy(golden.join(file), to.join(file)).unwrap();
        }
    }

    fn stands(&self, id: u64) -> String {
        let store = self.members[&id].store();
        format!("{} {} {}\n", store.revision(), store.digest(), store.views_digest())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i01_i13_a_folder_of_version_1_is_taken_over_with_and_without_its_state() {
    let expected = include_str!("../../golden/v1/digests.txt");
    for with_state in [true, false] {
        let mut group = Group::new();
        group.restore(1, "v1", with_state);
        group.version_max = ClusterVersion::ONE;
        group.start(1).await;
        group.leader().await;
        group.until("the old state", || (group.stands(1) == expected).then_some(())).await;
        assert_eq!(group.members[&1].store().cluster_version(), ClusterVersion::ONE);
        group.members[&1].store().verify().unwrap();
        group.stop(1).await;

        // The history ends with a member that the test never started, so this one is alone and may rise.
        group.version_max = ClusterVersion::NEWEST;
        group.start(1).await;
        let newest = || group.members[&1].store().cluster_version() == ClusterVersion::NEWEST;
        group.until("the newest version", || newest().then_some(())).await;
        group.members[&1].store().verify().unwrap();
        group.stop(1).await;
    }
}
