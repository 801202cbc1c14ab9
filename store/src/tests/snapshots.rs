//! Snapshots of the state: whole or refused.

use super::world::*;
use crate::{Store, Views};
use holdfast_model::*;

fn busy() -> (World, Tenant) {
    let mut world = World::new();
    world.node("n1", 8_192);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    world.tenant_asks(&a, route(a.env, "a.example.com")).unwrap();
    (world, a)
}

fn snapshot(store: &Store) -> Vec<u8> {
    let mut bytes = Vec::new();
    let summary = store.snapshot().unwrap().write_to(&mut bytes).unwrap();
    assert_eq!(summary.bytes, bytes.len() as u64);
    assert_eq!((summary.revision, summary.state), (store.revision(), store.digest()));
    bytes
}

#[test]
fn a_snapshot_carries_everything_to_another_member() {
    let (mut world, _) = busy();
    let bytes = snapshot(&world.store);
    let other = World::new();
    let summary = other.store.install(&mut bytes.as_slice()).unwrap();
    assert_eq!(summary.state, world.store.digest());
    assert_eq!(other.store.digest(), world.store.digest());
    assert_eq!(other.store.applied(), world.store.applied());
    assert_eq!(other.store.raft_meta().unwrap(), world.store.raft_meta().unwrap());
    assert_eq!(other.store.recorded_digest().unwrap(), world.store.recorded_digest().unwrap());
    other.check();
    assert_eq!(snapshot(&other.store), bytes);
    // Both go on alike, and I4's outcomes came along: a resend changes nothing.
    let resent = world
        .log
        .iter()
        .flatten()
        .rfind(|p| matches!(p.command, Command::CreateRoute { .. }))
        .cloned()
        .unwrap();
    let resent = vec![resent];
    let index = LogIndex(world.log.len() as u64);
    let first = world.store.apply(index, std::slice::from_ref(&resent), b"x").unwrap();
    let second = other.store.apply(index, &[resent], b"x").unwrap();
    assert!(first[0][0].is_ok());
    assert_eq!(first, second);
    assert_eq!(world.store.digest(), other.store.digest());
    world.now = world.now.plus_ms(1);
    assert_eq!(other.view().all_routes(None, 10).unwrap().len(), 1);
}

#[test]
fn a_snapshot_is_of_one_moment_while_applies_go_on() {
    let (mut world, a) = busy();
    let source = world.store.snapshot().unwrap();
    let (digest, meta) = (world.store.digest(), world.store.raft_meta().unwrap());
    world.tenant_asks(&a, Command::DeleteApp { app: a.app, expected_version: None }).unwrap();
    let mut bytes = Vec::new();
    let summary = source.write_to(&mut bytes).unwrap();
    assert_eq!(summary.state, digest);
    assert_eq!(source.raft_meta().unwrap(), meta);
    let other = memory_store();
    other.install(&mut bytes.as_slice()).unwrap();
    assert_eq!(other.digest(), digest);
    assert_eq!(other.raft_meta().unwrap(), meta);
}

/// Takes a snapshot's bytes, and has another thread apply an entry before it takes the first rows.
struct AppliesMeanwhile {
    store: std::sync::Arc<Store>,
    applied: bool,
    bytes: usize,
    largest: usize,
}

impl std::io::Write for AppliesMeanwhile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // In the middle of the rows, and not at the header.
        if !self.applied && bytes.len() > 1024 {
            let (store, (done, answer)) = (self.store.clone(), std::sync::mpsc::channel());
            std::thread::spawn(move || {
                done.send(store.apply(store.applied().unwrap().next(), &[vec![]], b"later"))
            });
            // A guard against hanging.
            let answer = answer.recv_timeout(std::time::Duration::from_secs(60));
            answer.expect("an apply waits for the snapshot that is being written").unwrap();
            self.applied = true;
        }
        self.bytes += bytes.len();
        self.largest = self.largest.max(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_snapshot_is_written_piece_by_piece_while_applies_go_on() {
    let mut world = World::new();
    for n in 0..4_000 {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    world.store.checkpoint().unwrap();
    let store = std::sync::Arc::new(world.store);
    let source = store.snapshot().unwrap();
    let before = store.applied();
    let mut out = AppliesMeanwhile { store: store.clone(), applied: false, bytes: 0, largest: 0 };
    let summary = source.write_to(&mut out).unwrap();
    assert_eq!((summary.applied, store.applied()), (before, before.map(LogIndex::next)));
    // What is in memory of a snapshot is one chunk of it.
    let chunk = holdfast_snapshots::CHUNK_BYTES;
    assert!(out.bytes > 4 * chunk, "the snapshot has only {} bytes", out.bytes);
    assert!(out.largest <= chunk + 1024, "{} bytes were gathered", out.largest);
}

#[test]
fn i14_a_damaged_snapshot_changes_nothing() {
    let (world, _) = busy();
    let bytes = snapshot(&world.store);
    let other = World::new();
    let (digest, meta) = (other.store.digest(), other.store.raft_meta().unwrap());
    let mut cases: Vec<Vec<u8>> =
        vec![vec![], bytes[..bytes.len() - 1].to_vec(), bytes[..bytes.len() / 2].to_vec()];
    for at in (0..bytes.len()).step_by(bytes.len() / 50) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        cases.push(damaged);
    }
    for case in cases {
        other.store.install(&mut case.as_slice()).unwrap_err();
        assert_eq!(other.store.digest(), digest);
        assert_eq!(other.store.raft_meta().unwrap(), meta);
    }
    other.check();
    // It is still in service, and takes the whole one.
    other.store.install(&mut bytes.as_slice()).unwrap();
    assert_eq!(other.store.digest(), world.store.digest());
}

/// A snapshot whose format is whole but whose rows are not what its head says.
#[test]
fn i01_a_snapshot_with_other_rows_is_refused() {
    let (world, _) = busy();
    let bytes = snapshot(&world.store);
    let mut from = bytes.as_slice();
    let mut reader = holdfast_snapshots::SnapshotReader::new(&mut from).unwrap();
    let mut forged = Vec::new();
    let mut writer = holdfast_snapshots::SnapshotWriter::new(&mut forged).unwrap();
    let mut dropped = 0;
    while let Some(chunk) = reader.next_chunk().unwrap() {
        for (key, value) in chunk.rows() {
            // An outcome kept for I4 is left out.
            if chunk.table == 2 && key[0] == crate::Table::Outcome as u8 && dropped == 0 {
                dropped += 1;
                continue;
            }
            writer.row(chunk.table, key, value).unwrap();
        }
    }
    writer.finish().unwrap();
    assert_eq!(dropped, 1);
    let other = memory_store();
    other.install(&mut forged.as_slice()).unwrap_err();
    assert_eq!(other.revision(), Revision(0));
}
