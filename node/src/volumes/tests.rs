//! Real files, real loop devices, real file systems. Needs root and e2fsprogs.

use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;

const NOBODY: Owner = Owner { uid: 33, gid: 50 };

fn volume(n: u128, generation: u64) -> NodeVolume {
    NodeVolume {
        id: VolumeId::from_bits(n),
        generation,
        size_mib: 16,
        fresh: true,
        path: "/data".into(),
        read_only: false,
    }
}

fn volumes() -> (tempfile::TempDir, Volumes) {
    let folder = tempfile::Builder::new().prefix("hfvol").tempdir().unwrap();
    let volumes = Volumes::open(&folder.path().join("volumes")).unwrap();
    (folder, volumes)
}

fn disk(folder: &tempfile::TempDir, id: VolumeId) -> PathBuf {
    folder.path().join("volumes").join(id.to_string()).join("disk.img")
}

/// What stands at a place of a device; its first bytes are left alone.
const PLACE: u64 = 9 << 20;

fn write(attached: &Attached, text: &[u8]) {
    let device = std::fs::OpenOptions::new().write(true).open(attached.device().path()).unwrap();
    device.write_all_at(text, PLACE).unwrap();
    device.sync_all().unwrap();
}

fn read(attached: &Attached, bytes: usize) -> Vec<u8> {
    let mut text = vec![0; bytes];
    std::fs::File::open(attached.device().path()).unwrap().read_exact_at(&mut text, PLACE).unwrap();
    text
}

#[tokio::test]
async fn a_disk_is_made_once_private_and_sparse_and_keeps_what_is_written() {
    let (folder, volumes) = volumes();
    let attached = volumes.attach(&volume(1, 1), NOBODY).await.unwrap();
    let meta = std::fs::metadata(disk(&folder, VolumeId::from_bits(1))).unwrap();
    assert_eq!((meta.permissions().mode() & 0o777, meta.len()), (0o600, 16 << 20));
    use std::os::unix::fs::MetadataExt;
    assert!(meta.blocks() * 512 < meta.len() / 2, "{} blocks", meta.blocks());
    let folder_mode = std::fs::metadata(folder.path().join("volumes")).unwrap().permissions().mode();
    assert_eq!(folder_mode & 0o777, 0o700);
    let mut magic = [0; 2];
    let device = std::fs::File::open(attached.device().path()).unwrap();
    device.read_exact_at(&mut magic, 1_024 + 56).unwrap();
    assert_eq!(magic, [0x53, 0xef], "an ext4 superblock");
    drop(device);
    write(&attached, b"kept");
    drop(attached);
    for generation in [1, 2, 7] {
        let again = volumes.attach(&volume(1, generation), NOBODY).await.unwrap();
        assert_eq!(read(&again, 4), b"kept", "generation {generation}");
    }
}

#[tokio::test]
async fn i11_a_disk_is_had_once_and_an_older_attachment_is_fenced_off() {
    let (_folder, volumes) = volumes();
    let first = volumes.attach(&volume(1, 3), NOBODY).await.unwrap();
    for generation in [3, 4] {
        let error = volumes.attach(&volume(1, generation), NOBODY).await.unwrap_err();
        assert!(matches!(error, VolumeError::InUse { .. }), "{error}");
    }
    // Whoever has the device open has the disk, also when who attached it is gone.
    let machine = std::fs::File::open(first.device().path()).unwrap();
    drop(first);
    assert!(matches!(volumes.attach(&volume(1, 4), NOBODY).await, Err(VolumeError::InUse { .. })));
    drop(machine);
    let second = volumes.attach(&volume(1, 4), NOBODY).await.unwrap();
    drop(second);
    let error = volumes.attach(&volume(1, 3), NOBODY).await.unwrap_err();
    assert!(matches!(error, VolumeError::Fenced { asked: 3, seen: 4, .. }), "{error}");
    // Another volume is another's.
    volumes.attach(&volume(2, 1), NOBODY).await.unwrap();
}

#[tokio::test]
async fn a_disk_that_is_lost_or_not_as_it_was_is_never_made_anew() {
    let (folder, volumes) = volumes();
    let gone = NodeVolume { fresh: false, ..volume(1, 2) };
    assert!(matches!(volumes.attach(&gone, NOBODY).await, Err(VolumeError::Missing { .. })));
    drop(volumes.attach(&volume(2, 1), NOBODY).await.unwrap());
    let id = VolumeId::from_bits(2);
    let record = disk(&folder, id).with_file_name("state.json");
    let kept = std::fs::read(&record).unwrap();
    for (record_bytes, length) in [(None, None), (Some(&b"{"[..]), None), (Some(&kept[..]), Some(1 << 20))] {
        match record_bytes {
            Some(bytes) => std::fs::write(&record, bytes).unwrap(),
            None => std::fs::remove_file(&record).unwrap(),
        }
        let before = std::fs::metadata(disk(&folder, id)).unwrap().len();
        if let Some(length) = length {
            std::fs::File::options().write(true).open(disk(&folder, id)).unwrap().set_len(length).unwrap();
        }
        let error = volumes.attach(&volume(2, 2), NOBODY).await.unwrap_err();
        assert!(matches!(error, VolumeError::Damaged { .. } | VolumeError::Disk { .. }), "{error}");
        let after = std::fs::metadata(disk(&folder, id)).unwrap().len();
        assert_eq!(after, length.unwrap_or(before), "it was left alone");
    }
}

#[tokio::test]
async fn what_is_deleted_is_erased_once_nobody_has_it() {
    let (folder, volumes) = volumes();
    let held = volumes.attach(&volume(1, 1), NOBODY).await.unwrap();
    drop(volumes.attach(&volume(2, 1), NOBODY).await.unwrap());
    let all = BTreeSet::from([1, 2, 3].map(VolumeId::from_bits));
    let erased = volumes.erase(all.clone()).await;
    assert_eq!(erased, BTreeSet::from([2, 3].map(VolumeId::from_bits)));
    assert!(disk(&folder, VolumeId::from_bits(1)).is_file());
    drop(held);
    assert_eq!(volumes.erase(all.clone()).await, all);
    assert_eq!(std::fs::read_dir(folder.path().join("volumes")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_link_in_the_place_of_a_disk_or_folder_is_not_followed() {
    use std::os::unix::fs::symlink;
    let (folder, volumes) = volumes();
    let (other, id) = (folder.path().join("other"), VolumeId::from_bits(1));
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("disk.img"), "somebody's").unwrap();
    symlink(&other, folder.path().join("volumes").join(id.to_string())).unwrap();
    assert!(volumes.attach(&volume(1, 1), NOBODY).await.is_err());
    assert!(volumes.erase([id].into()).await.is_empty());
    let second = folder.path().join("volumes").join(VolumeId::from_bits(2).to_string());
    std::fs::create_dir(&second).unwrap();
    symlink(other.join("disk.img"), second.join("disk.img")).unwrap();
    assert!(volumes.attach(&volume(2, 1), NOBODY).await.is_err());
    assert_eq!(std::fs::read(other.join("disk.img")).unwrap(), b"somebody's");
}

mod snapshots;
