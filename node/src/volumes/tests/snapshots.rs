//! Clones of disks, with machines that write meanwhile, and disks that are written from snapshots.

use super::*;
use crate::vmm::{Vm, VmmKind};
use std::process::{Command, Stdio};
use std::time::Duration;

const SNAPSHOT: SnapshotId = SnapshotId::from_bits(5);

fn file_of(folder: &tempfile::TempDir, volume: u128, name: &str) -> PathBuf {
    disk(folder, VolumeId::from_bits(volume)).with_file_name(name)
}

#[tokio::test]
async fn a_snapshot_is_what_was_on_the_disk_and_is_taken_once() {
    let (folder, volumes) = volumes();
    let id = VolumeId::from_bits(1);
    let attached = volumes.attach(&volume(1, 1), NOBODY).await.unwrap();
    write(&attached, b"first");
    drop(attached);
    let snapshot = volumes.snapshot(id, SNAPSHOT, None).await.unwrap();
    let attached = volumes.attach(&volume(1, 2), NOBODY).await.unwrap();
    write(&attached, b"later");
    drop(attached);
    let read = |file: &File| {
        let mut text = [0; 5];
        file.read_exact_at(&mut text, PLACE).unwrap();
        text
    };
    assert_eq!(&read(&snapshot), b"first");
    assert_eq!(snapshot.metadata().unwrap().len(), 16 << 20);
    // An agent that was restarted meanwhile asks again, and gets what was taken.
    assert_eq!(&read(&volumes.snapshot(id, SNAPSHOT, None).await.unwrap()), b"first");
    assert_eq!(&read(&volumes.snapshot(id, SnapshotId::from_bits(6), None).await.unwrap()), b"later");
    volumes.sweep_snapshots([SNAPSHOT].into()).await;
    assert!(file_of(&folder, 1, &format!("{SNAPSHOT}.img")).exists());
    assert!(!file_of(&folder, 1, &format!("{}.img", SnapshotId::from_bits(6))).exists());
    // They go with the volume.
    assert_eq!(volumes.erase([id].into()).await, [id].into());
    assert!(!file_of(&folder, 1, "").exists());
}

#[tokio::test]
async fn what_is_half_a_snapshot_is_taken_anew() {
    let (folder, volumes) = volumes();
    let id = VolumeId::from_bits(1);
    drop(volumes.attach(&volume(1, 1), NOBODY).await.unwrap());
    let half = file_of(&folder, 1, &format!("{SNAPSHOT}.part"));
    std::fs::write(&half, vec![9; 20 << 20]).unwrap();
    let taken = volumes.snapshot(id, SNAPSHOT, None).await.unwrap();
    let mut bytes = vec![0; 16 << 20];
    taken.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == std::fs::read(disk(&folder, id)).unwrap(), "nothing of the half shines through");
    assert_eq!(taken.metadata().unwrap().len(), 16 << 20);
    assert!(!half.exists());
}

#[tokio::test]
async fn a_volume_that_is_not_here_has_no_snapshot() {
    let (_folder, volumes) = volumes();
    let error = volumes.snapshot(VolumeId::from_bits(1), SNAPSHOT, None).await.unwrap_err();
    assert!(matches!(error, VolumeError::Missing { .. }), "{error}");
}

#[tokio::test]
async fn a_disk_whose_machine_is_not_known_is_not_cloned() {
    let (folder, volumes) = volumes();
    let attached = volumes.attach(&volume(1, 1), NOBODY).await.unwrap();
    for machine in [None, Some(folder.path().join("absent"))] {
        let error = volumes.snapshot(VolumeId::from_bits(1), SNAPSHOT, machine).await.unwrap_err();
        assert!(matches!(error, VolumeError::InUse { .. }), "{error}");
    }
    drop(attached);
}

/// Ends with its handle, also when a test fails: whoever reads the test's output waits for it.
struct Writer(std::process::Child);

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A process that has a volume as a machine has it, and writes a number to one place, and then to another.
fn writer(folder: &Path, attached: &Attached) -> Writer {
    let script = r#"
        i=10000000
        while :; do
            i=$((i+1))
            printf %d $i | dd of="$0" bs=8 seek=1179648 conv=notrunc status=none
            printf %d $i | dd of="$0" bs=8 seek=1310720 conv=notrunc status=none
        done"#;
    let process = Command::new("/bin/sh")
        .args(["-c", script])
        .arg(attached.device().path())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let process = Writer(process);
    let recorded = Vm::record(folder, "inst_1", VmmKind::QemuTcg, process.0.id(), None, None).unwrap();
    assert!(recorded.is_some(), "the writer ended");
    process
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_machine_that_writes_stands_while_its_disk_is_cloned_and_goes_on() {
    let (folder, volumes) = volumes();
    let machine = folder.path().join("machine");
    std::fs::create_dir(&machine).unwrap();
    let attached = volumes.attach(&volume(1, 1), NOBODY).await.unwrap();
    let process = writer(&machine, &attached);
    let mut last = 0;
    for n in 0..12u128 {
        std::thread::sleep(Duration::from_millis(100));
        let id = SnapshotId::from_bits(100 + n);
        let taken = volumes.snapshot(VolumeId::from_bits(1), id, Some(machine.clone())).await.unwrap();
        let number = |at: u64| -> u64 {
            let mut text = [0; 8];
            taken.read_exact_at(&mut text, at).unwrap();
            std::str::from_utf8(&text).unwrap().parse().unwrap()
        };
        let (first, second) = (number(1_179_648 * 8), number(1_310_720 * 8));
        // The one number is written before the other: a clone of one moment never has the second alone.
        assert!(first == second || first == second + 1, "{first} {second}");
        assert!(first > last, "it went on after the snapshot before: {first}, {last}");
        last = first;
    }
    drop(process);
    drop(attached);
}

#[tokio::test]
async fn a_disk_that_is_not_restored_yet_is_nobodys() {
    let (_folder, volumes) = volumes();
    let id = VolumeId::from_bits(3);
    let restoring = volumes.begin_restore(id, 16).await.unwrap().unwrap();
    let used = NodeVolume { fresh: false, ..volume(3, 1) };
    assert!(matches!(volumes.attach(&used, NOBODY).await, Err(VolumeError::InUse { .. })));
    assert!(matches!(volumes.begin_restore(id, 16).await, Err(VolumeError::InUse { .. })));
    drop(restoring);
    assert!(matches!(volumes.attach(&used, NOBODY).await, Err(VolumeError::Missing { .. })));
}

#[tokio::test]
async fn a_restore_begins_empty_and_is_done_once() {
    let (_folder, volumes) = volumes();
    let id = VolumeId::from_bits(4);
    let restoring = volumes.begin_restore(id, 16).await.unwrap().unwrap();
    restoring.file().unwrap().write_all_at(b"half", PLACE).unwrap();
    drop(restoring);
    let restoring = volumes.begin_restore(id, 16).await.unwrap().unwrap();
    let file = restoring.file().unwrap();
    let mut text = [7; 4];
    file.read_exact_at(&mut text, PLACE).unwrap();
    assert_eq!(text, [0; 4]);
    file.write_all_at(b"full", PLACE).unwrap();
    drop(file);
    restoring.finish().await.unwrap();
    assert!(volumes.begin_restore(id, 16).await.unwrap().is_none());
    let used = NodeVolume { fresh: false, ..volume(4, 1) };
    let attached = volumes.attach(&used, NOBODY).await.unwrap();
    assert_eq!(read(&attached, 4), b"full");
}

#[tokio::test]
async fn a_restore_without_room_is_refused() {
    let (_folder, volumes) = volumes();
    let error = volumes.begin_restore(VolumeId::from_bits(4), 16 << 20).await.unwrap_err();
    assert!(matches!(error, VolumeError::Room { .. }), "{error}");
}

/// The same on a file system that clones files, in a mount namespace that goes with its processes.
#[test]
fn clones_that_share_blocks_are_of_one_moment_too() {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"
        set -e
        truncate -s 512M "$1/xfs.img"
        mkfs.xfs -q -m reflink=1 "$1/xfs.img"
        mkdir "$1/mounted"
        mount -o loop "$1/xfs.img" "$1/mounted"
        TMPDIR="$1/mounted" exec "$0" --exact \
            volumes::tests::snapshots::i02_a_machine_that_writes_stands_while_its_disk_is_cloned_and_goes_on \
            volumes::tests::snapshots::a_snapshot_is_what_was_on_the_disk_and_is_taken_once"#;
    let run = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(said.contains("2 passed"), "{said}{}", String::from_utf8_lossy(&run.stderr));
}
