use super::*;
use holdfast_model::{OrgId, VolumeId};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const ATTEMPT: [u8; 8] = [7; 8];

fn of(snapshot: u128) -> SnapshotOf {
    SnapshotOf {
        org: OrgId::from_bits(1),
        volume: VolumeId::from_bits(2),
        snapshot: SnapshotId::from_bits(snapshot),
    }
}

/// A disk with these bytes at these places.
fn disk(bytes: u64, data: &[(u64, &[u8])]) -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    for (at, data) in data {
        file.write_all_at(data, *at).unwrap();
    }
    Arc::new(file)
}

fn whole(disk: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.metadata().unwrap().len()).unwrap()];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

struct Scene {
    folder: tempfile::TempDir,
    store: Store,
    key: SealKey,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        Self { folder, store, key: SealKey::generate() }
    }

    async fn store(&self, of: SnapshotOf, disk: &Arc<File>) -> Stored {
        super::store(&self.store, of, Arc::clone(disk), &self.key.recipient(), ATTEMPT).await.unwrap()
    }

    async fn restore(&self, of: SnapshotOf, stored: Stored, bytes: u64) -> Result<Vec<u8>, SnapshotError> {
        let to = disk(bytes, &[]);
        super::restore(&self.store, of, stored.manifest, &self.key, Arc::clone(&to)).await?;
        Ok(whole(&to))
    }

    /// Every object of a snapshot, by its path.
    fn objects(&self, of: SnapshotOf) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.folder.path().join(folder(of.snapshot))];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path)
                } else {
                    drop(found.insert(path.clone(), std::fs::read(path).unwrap()))
                }
            }
        }
        found
    }
}

fn named(objects: &BTreeMap<PathBuf, Vec<u8>>, word: &str) -> Vec<PathBuf> {
    let is = |path: &&PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(word);
    objects.keys().filter(is).cloned().collect()
}

const BYTES: u64 = 5 * PART_BYTES as u64 / 2;

fn some_disk() -> Arc<File> {
    disk(
        BYTES,
        &[(10, b"the first words"), (PART_BYTES as u64 * 2 + 5, b"the last words"), (BYTES - 3, b"end")],
    )
}

#[tokio::test]
async fn what_is_stored_is_restored_and_shows_nothing_in_the_store() {
    let scene = Scene::new();
    let from = some_disk();
    let stored = scene.store(of(1), &from).await;
    assert_eq!(scene.restore(of(1), stored, BYTES).await.unwrap(), whole(&from));
    let objects = scene.objects(of(1));
    // The part between has nothing in it.
    assert_eq!((named(&objects, "part").len(), named(&objects, "list").len()), (2, 1));
    assert_eq!(objects.values().map(|bytes| bytes.len() as u64).sum::<u64>(), stored.bytes);
    for bytes in objects.values() {
        assert!(bytes.starts_with(b"age-encryption.org/v1"));
        for word in [&b"first words"[..], b"last words"] {
            assert!(!bytes.windows(word.len()).any(|part| part == word));
        }
    }
}

#[tokio::test]
async fn an_empty_disk_is_a_manifest() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &disk(BYTES, &[])).await;
    assert_eq!(scene.objects(of(1)).len(), 1);
    assert_eq!(scene.restore(of(1), stored, BYTES).await.unwrap(), vec![0; usize::try_from(BYTES).unwrap()]);
}

#[tokio::test]
async fn i14_no_changed_cut_or_missing_object_is_restored() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    for (path, bytes) in scene.objects(of(1)) {
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        for wrong in [Some(flipped), Some(bytes[..bytes.len() - 1].to_vec()), Some(vec![]), None] {
            match wrong {
                Some(wrong) => std::fs::write(&path, wrong).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let error = scene.restore(of(1), stored, BYTES).await.unwrap_err();
            assert!(error.is_final(), "{}: {error}", path.display());
        }
        std::fs::write(&path, bytes).unwrap();
    }
    scene.restore(of(1), stored, BYTES).await.unwrap();
}

#[tokio::test]
async fn an_object_that_is_far_too_long_is_not_read_to_its_end() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    let part = named(&scene.objects(of(1)), "part").remove(0);
    std::fs::File::create(part).unwrap().set_len(1 << 40).unwrap();
    let error = scene.restore(of(1), stored, BYTES).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Store(StoreError::TooLong { .. })), "{error}");
}

#[tokio::test]
async fn parts_in_each_others_place_are_refused() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    let objects = scene.objects(of(1));
    let parts = named(&objects, "part");
    std::fs::write(&parts[0], &objects[&parts[1]]).unwrap();
    std::fs::write(&parts[1], &objects[&parts[0]]).unwrap();
    let error = scene.restore(of(1), stored, BYTES).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
}

#[tokio::test]
async fn another_snapshots_parts_are_refused_even_when_the_digests_agree() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    // Who holds the key's public half can seal what he likes. That it is something else stands inside the seal.
    let other = of(2);
    let from = scene.folder.path().join(folder(of(1).snapshot));
    copy(&from, &scene.folder.path().join(folder(other.snapshot)));
    let error = scene.restore(other, stored, BYTES).await.unwrap_err();
    let SnapshotError::Changed { problem, .. } = &error else { panic!("{error}") };
    assert_eq!(*problem, "it says that it is something else");
    for other in [
        SnapshotOf { org: OrgId::from_bits(9), ..of(1) },
        SnapshotOf { volume: VolumeId::from_bits(9), ..of(1) },
    ] {
        let error = scene.restore(other, stored, BYTES).await.unwrap_err();
        assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, &to).unwrap();
        }
    }
}

#[tokio::test]
async fn who_knows_the_recipient_exchanges_no_part() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    let part = named(&scene.objects(of(1)), "part").remove(0);
    let forged = seal(&scene.key.recipient(), of(1), Kind::Part, 0, &vec![9; PART_BYTES]).unwrap();
    std::fs::write(part, forged).unwrap();
    let error = scene.restore(of(1), stored, BYTES).await.unwrap_err();
    let SnapshotError::Changed { problem, .. } = &error else { panic!("{error}") };
    assert_eq!(*problem, "its digest is another");
}

#[tokio::test]
async fn a_wrong_key_manifest_or_size_is_refused() {
    let scene = Scene::new();
    let stored = scene.store(of(1), &some_disk()).await;
    let key = SealKey::generate();
    let other = super::restore(&scene.store, of(1), stored.manifest, &key, disk(BYTES, &[])).await;
    assert!(matches!(other, Err(SnapshotError::Seal(_))));
    let absent = Stored { manifest: Digest([1; 32]), ..stored };
    let error = scene.restore(of(1), absent, BYTES).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Store(StoreError::Absent { .. })), "{error}");
    for bytes in [BYTES - 1, BYTES + 1] {
        let error = scene.restore(of(1), stored, bytes).await.unwrap_err();
        assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
    }
    // Also where each part has the length that it should have.
    let part = PART_BYTES as u64;
    let stored = scene.store(of(2), &disk(2 * part, &[(0, b"data")])).await;
    let error = scene.restore(of(2), stored, 3 * part).await.unwrap_err();
    assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
}

#[tokio::test]
async fn two_attempts_do_not_disturb_each_other() {
    let scene = Scene::new();
    let first = scene.store(of(1), &some_disk()).await;
    let recipient = scene.key.recipient();
    let later = disk(BYTES, &[(77, b"later")]);
    let second = super::store(&scene.store, of(1), Arc::clone(&later), &recipient, [8; 8]).await.unwrap();
    assert_eq!(scene.restore(of(1), first, BYTES).await.unwrap(), whole(&some_disk()));
    assert_eq!(scene.restore(of(1), second, BYTES).await.unwrap(), whole(&later));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_disk_comes_back_as_it_was(
        bytes in 1u64..=3 * PART_BYTES as u64,
        data in proptest::collection::vec((any::<u64>(), proptest::collection::vec(any::<u8>(), 1..2_000)), 0..6),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let from = disk(bytes, &[]);
        for (at, data) in &data {
            let at = at % bytes;
            let length = usize::try_from(bytes - at).unwrap().min(data.len());
            from.write_all_at(&data[..length], at).unwrap();
        }
        runtime.block_on(async {
            let scene = Scene::new();
            let stored = scene.store(of(3), &from).await;
            let back = scene.restore(of(3), stored, bytes).await.unwrap();
            assert!(back == whole(&from));
        });
    }

    #[test]
    fn i14_what_is_sealed_is_opened_as_what_it_is_or_refused(clear in proptest::collection::vec(any::<u8>(), 0..3_000), number in 0u64..4, other in 0u64..4) {
        let key = SealKey::generate();
        let sealed = seal(&key.recipient(), of(1), Kind::Part, number, &clear).unwrap();
        let opened = open(&key, of(1), Kind::Part, other, ("it", &sealed));
        prop_assert_eq!(opened.ok(), (number == other).then_some(clear));
        prop_assert!(open(&key, of(1), Kind::List, number, ("it", &sealed)).is_err());
    }
}
