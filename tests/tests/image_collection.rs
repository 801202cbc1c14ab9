//! What goes from a node's images when there is too much, and what never does: with real files, a real registry, and a
//! disk that is really full.
//!
//! Needs Debian's `docker-registry` and `erofs-utils`, and root, as the agent does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

#[path = "images/flaky_proxy.rs"]
#[allow(dead_code, reason = "shared with the tests of pulls")]
mod flaky_proxy;
#[path = "../../node/tests/namespace/mod.rs"]
#[allow(dead_code, reason = "shared with the tests of the node")]
mod namespace;
#[path = "images/pulls.rs"]
#[allow(dead_code, reason = "shared with the tests of pulls")]
mod pulls;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flaky_proxy::FlakyProxy;
use holdfast_node::image::{Digest, Evictions, ImageCache, ImageError, Progress};
use holdfast_tests::oci::Registry;
use pulls::{HANG_GUARD, cache_in, ensure, files_below, push_noise, reference};

const MIB: usize = 1 << 20;

#[tokio::test]
async fn i05_which_image_was_used_last_is_known_after_a_restart() {
    let registry = Registry::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let mut roots = Vec::new();
    for seed in 40..43 {
        roots.push(ensure(&cache, &push_noise(registry.host(), seed, MIB).await).await.unwrap());
    }
    let digests: Vec<Digest> = roots.iter().map(|root| root.digest).collect();
    let bytes = roots[0].bytes;
    drop(roots);
    // The first one is used again, and the third one runs while the others are judged: that counts as use.
    drop(cache.get(digests[0]).unwrap().unwrap());
    cache.gc(&HashSet::from([digests[2]]), u64::MAX).unwrap();
    drop(cache);
    let cache = cache_in(&folder);
    let report = cache.gc(&HashSet::new(), bytes * 2).unwrap();
    assert_eq!(report.roots_removed, 1);
    let names: Vec<bool> = digests.iter().map(|digest| root_folder(&folder, *digest).exists()).collect();
    assert_eq!(names, [true, false, true]);
    let report = cache.gc(&HashSet::new(), bytes).unwrap();
    assert_eq!((report.roots_removed, report.kept_bytes), (1, bytes));
    assert!(root_folder(&folder, digests[2]).exists());
    let evicted = cache.evictions();
    assert_eq!(evicted.roots, 2);
    assert!(evicted.blobs >= 3 && evicted.bytes > 4 * MIB as u64, "{evicted:?}");
}

fn root_folder(folder: &tempfile::TempDir, digest: Digest) -> std::path::PathBuf {
    folder.path().join("cache/roots").join(digest.hex())
}

#[tokio::test]
async fn i05_a_root_that_a_crash_left_half_removed_is_never_believed() {
    let registry = Registry::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let image = push_noise(registry.host(), 44, MIB).await;
    let cache = cache_in(&folder);
    let digest = ensure(&cache, &image).await.unwrap().digest;
    let files = files_below(&root_folder(&folder, digest));
    assert_eq!(files.len(), 4);
    for file in files {
        fs::remove_file(&file).unwrap();
        assert!(cache.get(digest).unwrap().is_none(), "without {}", file.display());
        ensure(&cache, &image).await.unwrap();
        assert!(file.exists());
    }
    // What a collection had taken out of sight when its process died.
    let left = folder.path().join("cache/tmp/removed-0");
    fs::rename(root_folder(&folder, digest), &left).unwrap();
    drop(cache);
    let cache = cache_in(&folder);
    assert!(!left.exists() && cache.get(digest).unwrap().is_none());
}

#[tokio::test]
async fn what_a_pull_counts_on_is_not_collected_beside_it() {
    let registry = Registry::start().await.unwrap();
    let (idle, image) =
        (push_noise(registry.host(), 45, MIB).await, push_noise(registry.host(), 46, 6 * MIB).await);
    let proxy = FlakyProxy::start(registry.host()).await;
    let through = proxy.address_of(&image);
    let folder = tempfile::tempdir().unwrap();
    let cache = Arc::new(cache_in(&folder));
    drop(ensure(&cache, &idle).await.unwrap());
    proxy.stall_after(4 * MIB as u64);
    let received = Arc::new(AtomicU64::new(0));
    let pull = tokio::spawn({
        let (cache, through, received) = (Arc::clone(&cache), reference(&through), Arc::clone(&received));
        async move {
            let note = move |step| {
                if let Progress::Fetching { received_bytes, .. } = step {
                    received.store(received_bytes, Ordering::SeqCst);
                }
            };
            cache.ensure(&through, &note).await
        }
    });
    let enough = async {
        while received.load(Ordering::SeqCst) < 2 * MIB as u64 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(HANG_GUARD, enough).await.expect("the pull hangs");
    let report = cache.gc(&HashSet::new(), 0).unwrap();
    assert_eq!((report.roots_removed, report.blobs_removed), (1, 3), "the idle image goes, with its blobs");
    assert!(report.kept_bytes >= 2 * MIB as u64, "{report:?}");
    let before = proxy.forwarded_bytes();
    proxy.heal();
    let root = tokio::time::timeout(HANG_GUARD, pull).await.expect("the pull hangs").unwrap().unwrap();
    let after = proxy.forwarded_bytes() - before;
    assert!(after < 9 * MIB as u64 / 2, "{after} bytes came after the collection");
    // Nobody counts on the blobs any more.
    let report = cache.gc(&HashSet::new(), 0).unwrap();
    assert_eq!((report.roots_removed, report.blobs_removed), (0, 3));
    assert_eq!(report.kept_bytes, root.bytes);
}

/// A cache on a disk of its own, of so many MiB. In a namespace.
fn small_disk(folder: &Path, mib: usize) {
    fs::create_dir(folder).unwrap();
    let size = format!("size={mib}m");
    namespace::run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", folder.to_str().unwrap()]);
}

#[tokio::test]
async fn a_pull_that_finds_the_disk_full_makes_room_once_and_then_says_what_to_do() {
    const TEST: &str = "a_pull_that_finds_the_disk_full_makes_room_once_and_then_says_what_to_do";
    if !namespace::inside(TEST) {
        return;
    }
    let registry = Registry::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("cache");
    small_disk(&disk, 24);
    let in_use = Arc::new(Mutex::new(None));
    let asked = Arc::clone(&in_use);
    let cache = ImageCache::open(&disk).unwrap().with_in_use(Arc::new(move || asked.lock().unwrap().clone()));
    // Each needs its blob, its unpacked files and its root at once, and keeps two of the three.
    let [first, second, third] = [50, 51, 52].map(|seed| push_noise(registry.host(), seed, 4 * MIB));
    let (first, second, third) = (first.await, second.await, third.await);
    let digest = |image: &holdfast_tests::oci::PushedImage| image.digest.parse::<Digest>().unwrap();
    drop(ensure(&cache, &first).await.unwrap());
    drop(ensure(&cache, &second).await.unwrap());

    // While it is not known what is in use nothing goes.
    let refused = ensure(&cache, &third).await.unwrap_err();
    assert!(matches!(refused, ImageError::DiskFull { .. }), "{refused:?}");
    let said = refused.to_string();
    assert!(said.contains("is full") && said.contains("free space there"), "{said}");
    assert_eq!(cache.evictions(), Evictions::default());
    assert!(cache.get(digest(&first)).unwrap().is_some() && cache.get(digest(&second)).unwrap().is_some());

    *in_use.lock().unwrap() = Some(HashSet::from([digest(&first)]));
    let root = ensure(&cache, &third).await.unwrap();
    let evicted = cache.evictions();
    assert_eq!(evicted.roots, 1, "{evicted:?}");
    assert!(cache.get(digest(&first)).unwrap().is_some() && cache.get(digest(&second)).unwrap().is_none());
    // What was unpacked is removed behind the caller's back.
    let cleared = async {
        while !files_below(&disk.join("tmp")).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(HANG_GUARD, cleared).await.expect("something of an attempt is left");

    // Two are in use, and something else takes the rest.
    *in_use.lock().unwrap() = Some(HashSet::from([digest(&first), digest(&third)]));
    let other = disk.join("something-else");
    fs::write(&other, vec![1; 9 * MIB]).unwrap();
    let refused = ensure(&cache, &second).await.unwrap_err();
    assert!(matches!(refused, ImageError::DiskFull { .. }), "{refused:?}");
    assert!(cache.get(digest(&first)).unwrap().is_some() && root.path.exists());
    fs::remove_file(other).unwrap();
    ensure(&cache, &second).await.unwrap();
}
