//! A disk that fills up under the replica: what is known stays known, and the replica goes on once there is room.
//!
//! The disk is a small tmpfs in a mount namespace of the test's own, so the test runs itself again inside one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use holdfast_client::replica::{Applied, DiskError, Replica};
use holdfast_model::agent::EdgeRoute;
use support::*;

const DISK: &str = "HOLDFAST_TEST_SMALL_DISK";

#[test]
fn i05_a_full_disk_keeps_what_is_known() {
    if let Some(disk) = std::env::var_os(DISK) {
        return on_small_disk(Path::new(&disk));
    }
    let folder = tempfile::tempdir().unwrap();
    // Root gets a mount namespace at once; anybody else needs a user namespace around it.
    let namespace = match Command::new("id").arg("-u").output().unwrap().stdout.as_slice() {
        b"0\n" => "--mount",
        _ => "--map-root-user",
    };
    let script = r#"mount -t tmpfs -o size=1m none "$0" && exec "$1" --exact "$2" --nocapture"#;
    let status = Command::new("unshare")
        .args([namespace, "--mount", "sh", "-c", script])
        .arg(folder.path())
        .arg(std::env::current_exe().unwrap())
        .arg("i05_a_full_disk_keeps_what_is_known")
        .env(DISK, folder.path())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

fn on_small_disk(disk: &Path) {
    let path = disk.join("edge.redb");
    let mut replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
    let first = (0..5).map(|id| route(id, 443)).collect();
    assert_eq!(feed(&mut replica, snapshot(stamp(5), first, 0)), Applied::Applied);
    let before = marks(&replica.current());

    let filler = disk.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 512]).is_ok() {}
    drop(file);
    let large = || delta(5, 6, (10..900).map(|id| route(id, 1)).collect(), vec![0]);
    for _ in 0..4 {
        let error = replica.apply(large()).unwrap_err();
        assert!(matches!(error, DiskError::Storage { .. }), "{error:?}");
        assert_eq!(marks(&replica.current()), before);
        replica.begin_stream();
    }
    // An agent that restarts on the full disk still finds what it knew, or says that it cannot look; it never
    // finds nothing. (After an error the file is closed until the next frame.)
    match Replica::<EdgeRoute>::open(&path, CLUSTER) {
        Ok(replica) => assert_eq!(marks(&replica.current()), before),
        Err(error) => assert!(matches!(error, DiskError::Storage { .. }), "{error:?}"),
    }

    // With room again it goes on, in the same process and in another.
    fs::remove_file(&filler).unwrap();
    assert_eq!(replica.apply(large()).unwrap(), Applied::Applied);
    let after = marks(&replica.current());
    assert_eq!(after.as_ref().unwrap().1.len(), 894);
    drop(replica);
    let replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
    assert!(replica.quarantined().is_none());
    assert_eq!(marks(&replica.current()), after);
}
