//! openraft's own suite for storages, against the real ones.

use std::io;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use holdfast_model::{MemberId, Revision};
use holdfast_store::Store;
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{OptionalSend, StorageError};
use tokio::sync::{mpsc, watch};

use crate::log_store::LogStore;
use crate::member_identity::MemberIdentity;
use crate::snapshot_file::{SnapshotFile, SnapshotFolder};
use crate::state_machine::{Builder, Progress, StateMachine};
use crate::types::{Entry, LeaderId, LogId, MemberNode, SnapshotMeta, StoredMembership, TypeConfig};

struct Disks;

/// The suite skips log indexes, which no log does and the store refuses. This puts a blank entry in each gap.
struct GapFilling(StateMachine);

impl RaftStateMachine<TypeConfig> for GapFilling {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        self.0.applied_state().await
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut filled: Vec<Result<EntryResponder<TypeConfig>, io::Error>> = Vec::new();
        let mut next = self.0.applied_state().await?.0.map(|last| last.index() + 1);
        while let Some((entry, responder)) = entries.try_next().await? {
            let log_id = entry.log_id();
            for index in next.unwrap_or(log_id.index())..log_id.index() {
                let blank = Entry::new_blank(LogId::new(*log_id.committed_leader_id(), index));
                filled.push(Ok((blank, None)));
            }
            next = Some(log_id.index() + 1);
            filled.push(Ok((entry, responder)));
        }
        self.0.apply(futures::stream::iter(filled)).await
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.0.get_snapshot_builder().await
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        self.0.install_snapshot(meta, snapshot).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<LeaderId, u64, MemberNode, SnapshotFile>>, io::Error> {
        self.0.get_current_snapshot().await
    }
}

impl StoreBuilder<TypeConfig, LogStore, GapFilling, tempfile::TempDir> for Disks {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, GapFilling), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().unwrap();
        let identity = MemberIdentity { cluster: "suite".into(), member: MemberId(1), incarnation: 1 };
        let log = LogStore::create(&folder.path().join("log.redb"), &identity).unwrap();
        let store = Arc::new(Store::open(&folder.path().join("state.redb")).unwrap());
        let snapshots = SnapshotFolder::open(&folder.path().join("snapshots")).unwrap();
        let progress = Progress {
            applied_next: watch::channel(0).0,
            revision: watch::channel(Revision(0)).0,
            former_members: watch::channel(Default::default()).0,
            mismatches: mpsc::channel(1).0,
        };
        let machine = StateMachine::open(store, log.clone(), snapshots, progress).unwrap();
        // The suite purges logs whose entries it never applied.
        log.allow_purge_below(u64::MAX);
        Ok((folder, log, GapFilling(machine)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_storages_pass_the_suite_of_openraft() {
    Suite::test_all(Disks).await.unwrap();
}
