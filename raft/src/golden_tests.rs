//! Records and snapshots as earlier builds wrote them, byte by byte: see `raft/golden/README.md`.

use std::path::{Path, PathBuf};

use holdfast_store::Store;
use redb::{ReadableDatabase, ReadableTable};

use crate::log_record::{decode_entry, encode_entry};
use crate::log_store::ENTRIES;
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::SnapshotFile;

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/v1").join(file)
}

#[test]
fn i01_log_records_of_version_1_are_read_and_written_the_same() {
    let copy = tempfile::tempdir().unwrap();
    let path = copy.path().join("log.redb");
    std::fs::copy(golden("log.redb"), &path).unwrap();
    let db = redb::Database::open(&path).unwrap();
    let txn = db.begin_read().unwrap();
    let entries = txn.open_table(ENTRIES).unwrap();
    let mut count = 0;
    for row in entries.iter().unwrap() {
        let (index, bytes) = row.unwrap();
        let entry = decode_entry(index.value(), bytes.value()).unwrap();
        assert_eq!(encode_entry(&entry).unwrap(), bytes.value(), "index {}", index.value());
        count += 1;
    }
    assert_eq!(count, 96);
}

#[test]
fn i13_a_snapshot_file_of_version_1_is_verified_and_installed() {
    let file = SnapshotFile::open(&golden("state.snapshot")).unwrap();
    file.verify().unwrap();
    let store = Store::open_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
    store.install(&mut file.body().unwrap()).unwrap();
    store.verify().unwrap();
    let meta = RaftMeta::decode(&store.raft_meta().unwrap().unwrap()).unwrap();
    assert_eq!(meta, file.meta);
    assert_eq!(file.meta.encode().unwrap(), store.raft_meta().unwrap().unwrap());
}
