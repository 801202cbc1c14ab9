//! openraft's own suite for storages, against the real ones, and what it does not ask: what a crash leaves of them.

use std::io;
use std::sync::{Arc, Mutex};

use futures::{Stream, TryStreamExt};
use holdfast_model::{LogIndex, MemberId, Revision};
use holdfast_store::Store;
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{OptionalSend, RaftSnapshotBuilder, StorageError};
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

fn progress() -> Progress {
    Progress {
        applied_next: watch::channel(0).0,
        revision: watch::channel(Revision(0)).0,
        former_members: watch::channel(Default::default()).0,
        mismatches: mpsc::channel(1).0,
    }
}

impl StoreBuilder<TypeConfig, LogStore, GapFilling, tempfile::TempDir> for Disks {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, GapFilling), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().unwrap();
        let identity = MemberIdentity { cluster: "suite".into(), member: MemberId(1), incarnation: 1 };
        let log = LogStore::create(&folder.path().join("log.redb"), &identity).unwrap();
        let store = Arc::new(Store::open(&folder.path().join("state.redb")).unwrap());
        let snapshots = SnapshotFolder::open(&folder.path().join("snapshots")).unwrap();
        let machine = StateMachine::open(store, log.clone(), snapshots, progress(), Arc::default()).unwrap();
        // The suite purges logs whose entries it never applied.
        log.allow_purge_below(u64::MAX);
        Ok((folder, log, GapFilling(machine)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_storages_pass_the_suite_of_openraft() {
    Suite::test_all(Disks).await.unwrap();
}

/// A disk that a crash takes back to its last sync: what it holds, and what it would hold.
#[derive(Clone, Debug, Default)]
struct SyncedOnly(Arc<Mutex<(Vec<u8>, Vec<u8>)>>);

impl SyncedOnly {
    fn after_crash(&self) -> Self {
        let synced = self.0.lock().unwrap().1.clone();
        Self(Arc::new(Mutex::new((synced.clone(), synced))))
    }
}

impl redb::StorageBackend for SyncedOnly {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().0.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = offset as usize;
        out.copy_from_slice(&self.0.lock().unwrap().0[start..start + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().0.resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.1 = disk.0.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = offset as usize;
        self.0.lock().unwrap().0[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_snapshot_lets_the_log_go_only_once_the_state_is_durable() {
    let (folder, log, _) = Disks.build().await.unwrap();
    let disk = SyncedOnly::default();
    let store = Arc::new(Store::open_with_backend(disk.clone()).unwrap());
    let snapshots = SnapshotFolder::open(&folder.path().join("others")).unwrap();
    let mut machine = StateMachine::open(store, log, snapshots, progress(), Arc::default()).unwrap();
    let log_id = |index| LogId::new(LeaderId { term: 1, node_id: 1 }, index);
    let blank = |index| Ok((Entry::new_blank(log_id(index)), None));
    machine.apply(futures::stream::iter((0..10).map(blank))).await.unwrap();
    assert_eq!(Store::open_with_backend(disk.after_crash()).unwrap().applied(), None);
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    // From here on the log may be purged up to the snapshot, and a crash has nothing else to begin from.
    assert_eq!(snapshot.meta.last_log_id, Some(log_id(9)));
    let left = Store::open_with_backend(disk.after_crash()).unwrap();
    assert_eq!(left.applied(), Some(LogIndex(9)));
}
