//! Files that are cut, torn or overwritten: found, moved aside whole, and never fatal.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use holdfast_client::replica::{Applied, Replica};
use holdfast_model::agent::EdgeRoute;
use proptest::prelude::*;
use support::*;

const ROUTES: u64 = 60;

fn written(folder: &Path) -> PathBuf {
    let path = folder.join("edge.redb");
    let mut replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
    feed(&mut replica, snapshot(stamp(5), (0..ROUTES).map(|id| route(id, 443)).collect(), 0));
    feed(&mut replica, vec![delta(5, 6, vec![route(1, 444)], vec![2])]);
    path
}

/// Either the file was still good in every respect, or nothing of it was believed.
fn check(path: &Path) -> bool {
    let mut replica =
        Replica::<EdgeRoute>::open(path, CLUSTER).expect("a damaged file must not stop the agent");
    let intact = match marks(&replica.current()) {
        Some((revision, items)) => {
            // redb may roll a torn last commit back to the one before it.
            match revision {
                6 => assert_eq!((items.len() as u64, items[&key(1)]), (ROUTES - 1, 444)),
                5 => assert_eq!((items.len() as u64, items[&key(1)]), (ROUTES, 443)),
                other => panic!("revision {other} was never written"),
            }
            true
        }
        None => false,
    };
    // Whatever happened, the agent goes on from here.
    assert_eq!(feed(&mut replica, snapshot(stamp(9), vec![route(1, 9)], 9)), Applied::Applied);
    drop(replica);
    let replica = Replica::<EdgeRoute>::open(path, CLUSTER).unwrap();
    assert_eq!(marks(&replica.current()).unwrap().0, 9);
    intact
}

#[test]
fn i05_truncated_file_is_moved_aside_and_refetched() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    let bytes = fs::read(&path).unwrap();
    for keep in
        [1, 63, 64, 320, 511, 512, 4_095, 4_096, 8_192, bytes.len() / 2, bytes.len() - 4_096, bytes.len() - 1]
    {
        fs::write(&path, &bytes[..keep]).unwrap();
        let replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
        if replica.current().is_none() {
            let aside = replica.quarantined().expect("a damaged file is kept").to_owned();
            assert_eq!(fs::read(aside).unwrap().len(), keep);
        }
        drop(replica);
        fs::write(&path, &bytes[..keep]).unwrap();
        check(&path);
    }
    fs::write(&path, b"this was never a database").unwrap();
    assert!(!check(&path));
}

#[test]
fn an_empty_file_is_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    fs::write(&path, b"").unwrap();
    let replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
    assert!(replica.current().is_none() && replica.quarantined().is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn i14_overwritten_bytes_are_never_believed(
        seed in any::<u64>(),
        places in proptest::collection::vec((any::<prop::sample::Index>(), 1..=255u8, 1..600usize), 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let mut bytes = fs::read(&path).unwrap();
        for (at, flip, length) in places {
            let at = at.index(bytes.len());
            let end = (at + length).min(bytes.len());
            for (offset, byte) in bytes[at..end].iter_mut().enumerate() {
                *byte ^= flip.wrapping_add((seed >> (offset % 8)) as u8);
            }
        }
        fs::write(&path, &bytes).unwrap();
        check(&path);
    }
}
