//! Images end to end: pushed to a real registry, resolved, pulled, flattened, and read back from the EROFS file.
//!
//! Needs Debian's `docker-registry` and `erofs-utils`, and root, as the agent does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

#[path = "images/flaky_proxy.rs"]
mod flaky_proxy;
#[path = "images/pulls.rs"]
mod pulls;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use flaky_proxy::FlakyProxy;
use holdfast_node::image::{
    Digest, ImageCache, ImageError, ImageRef, LayerError, Limits, Login, ManifestError, Progress,
    RegistryClient, RegistryError, RootImage,
};
use holdfast_tests::oci::registry::{PASSWORD, USER};
use holdfast_tests::oci::{
    Layer, LayerFile, PushedImage, Pusher, Registry, RunConfig, architecture, config_file, digest_of,
    manifest_of, push_files,
};
use pulls::{HANG_GUARD, cache_in, ensure, files_below, noise, push_noise, reference};
use serde_json::json;
use tempfile::TempDir;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const MIB: usize = 1 << 20;

/// Unpacks a root with the tool of those who made the format.
fn extract(root: &RootImage, into: &TempDir) -> PathBuf {
    let target = into.path().join("extracted");
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", target.display()))
        .arg(&root.path)
        .output()
        .expect("fsck.erofs is in the package erofs-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target
}

/// The mode in a file's inode, at the place that the format gives it.
fn inode_mode(root: &RootImage, path: &str) -> u16 {
    let output = Command::new("dump.erofs").arg(format!("--path={path}")).arg(&root.path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let after = text.split("NID: ").nth(1).unwrap_or_else(|| panic!("{path} is not in the image: {text}"));
    let node: u64 = after.split_whitespace().next().unwrap().parse().unwrap();
    let file = fs::File::open(&root.path).unwrap();
    let (mut metadata_block, mut mode) = ([0; 4], [0; 2]);
    file.read_exact_at(&mut metadata_block, 1024 + 40).unwrap();
    let inode = u64::from(u32::from_le_bytes(metadata_block)) * 4096 + node * 32;
    file.read_exact_at(&mut mode, inode + 4).unwrap();
    u16::from_le_bytes(mode)
}

/// Where the registry keeps a blob.
fn stored_blob(registry: &Registry, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap();
    let below = format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]);
    registry.storage().join(below)
}

fn flip_a_byte(path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
}

#[tokio::test]
async fn an_image_becomes_the_root_that_its_layers_describe() {
    let registry = Registry::start().await.unwrap();
    let base = [
        LayerFile::directory("etc", 0o755),
        LayerFile::regular("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\nweb:x:1000:1001::/srv:/bin/sh\n"),
        LayerFile::regular("etc/old", 0o644, "removed later"),
        LayerFile::directory("usr", 0o755),
        LayerFile::directory("usr/bin", 0o755),
        LayerFile::regular("usr/bin/su", 0o4755, "set-id"),
        LayerFile::symlink("bin", "usr/bin"),
        LayerFile::directory("srv", 0o700).owned_by(1000, 1001),
    ];
    let top = [
        LayerFile::regular("etc/.wh.old", 0o644, ""),
        LayerFile::regular("srv/page", 0o640, "hello").owned_by(1000, 1001),
    ];
    let mut zstd = Layer::of_files(&[LayerFile::regular("opt/from-zstd", 0o644, "z".repeat(5000))]).unwrap();
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&zstd.blob[..]), &mut tar).unwrap();
    zstd.blob =
        ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Fastest).into();
    zstd.media_type = "application/vnd.oci.image.layer.v1.tar+zstd".to_owned();
    let mut plain = Layer::of_files(&[LayerFile::regular("opt/from-plain", 0o644, "p")]).unwrap();
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&plain.blob[..]), &mut tar).unwrap();
    plain.blob = tar.into();
    plain.media_type = "application/vnd.oci.image.layer.v1.tar".to_owned();
    let layers = [Layer::of_files(&base).unwrap(), Layer::of_files(&top).unwrap(), zstd, plain];
    let config = RunConfig {
        env: BTreeMap::from([("A".to_owned(), "b=c".to_owned())]),
        entrypoint: vec!["/usr/bin/su".to_owned()],
        cmd: vec!["-l".to_owned()],
        user: "web".to_owned(),
        workdir: "/srv".to_owned(),
    };
    let pushed = Pusher::new(registry.host(), "team/app").push_image("v1", &layers, &config).await.unwrap();

    let by_tag: ImageRef = format!("{}/team/app:v1", registry.host()).parse().unwrap();
    let client = RegistryClient::new(Limits::default()).unwrap();
    let resolved = client.resolve(&by_tag).await.unwrap();
    assert_eq!(resolved.reference.to_string(), pushed.reference);

    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let steps = std::sync::Mutex::new(Vec::new());
    let root = cache.ensure(&resolved.reference, &|step| steps.lock().unwrap().push(step)).await.unwrap();
    let steps = steps.into_inner().unwrap();
    assert!(steps.contains(&Progress::Unpacking { layer: 4, layers: 4 }), "{steps:?}");
    assert_eq!(steps.last(), Some(&Progress::Ready));

    assert_eq!(root.config.env, [("A".to_owned(), "b=c".to_owned())]);
    assert_eq!(root.config.command(), ["/usr/bin/su", "-l"]);
    assert_eq!(
        (root.config.user.uid, root.config.user.gid, root.config.user.home.as_str()),
        (1000, 1001, "/srv")
    );
    assert_eq!(root.resolve_user("root").unwrap().uid, 0);
    assert!(root.resolve_user("nobody").is_err());
    assert_eq!(fs::metadata(&root.path).unwrap().mode() & 0o777, 0o444);
    assert_eq!((root.bytes % 4096, root.bytes), (0, fs::metadata(&root.path).unwrap().len()));

    let extracted = extract(&root, &folder);
    assert!(!extracted.join("etc/old").exists() && !extracted.join("etc/.wh.old").exists());
    assert_eq!(fs::read_to_string(extracted.join("srv/page")).unwrap(), "hello");
    assert_eq!(fs::read_to_string(extracted.join("opt/from-zstd")).unwrap(), "z".repeat(5000));
    assert_eq!(fs::read_to_string(extracted.join("opt/from-plain")).unwrap(), "p");
    assert_eq!(fs::read_link(extracted.join("bin")).unwrap(), Path::new("usr/bin"));
    let page = fs::metadata(extracted.join("srv/page")).unwrap();
    assert_eq!(
        (page.uid(), page.gid(), page.mode() & 0o7777, page.mtime()),
        (1000, 1001, 0o640, 1_700_000_000)
    );
    // fsck.erofs itself loses set-id bits, so this one is read from the inode.
    assert_eq!(inode_mode(&root, "/usr/bin/su") & 0o7777, 0o4755);
}

#[tokio::test]
async fn i05_a_root_on_disk_needs_no_registry_and_survives_a_restart() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 1, 10_000).await;
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let first = ensure(&cache, &image).await.unwrap();
    drop(registry);
    drop(cache);
    let cache = cache_in(&folder);
    let again = ensure(&cache, &image).await.unwrap();
    assert_eq!((&again.path, &again.config), (&first.path, &first.config));
    assert!(cache.get(first.digest).unwrap().is_some());
}

#[tokio::test]
async fn the_same_image_makes_the_same_bytes() {
    let registry = Registry::start().await.unwrap();
    let files: Vec<_> = (0..200)
        .map(|n| LayerFile::regular(format!("d{}/f{n}", n % 7), 0o644, format!("{n}").repeat(n)))
        .collect();
    let image = push_files(registry.host(), "a", "v1", &files, &RunConfig::default()).await.unwrap();
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = ensure(&cache_in(&one), &image).await.unwrap();
    let second = ensure(&cache_in(&two), &image).await.unwrap();
    assert!(fs::read(first.path).unwrap() == fs::read(second.path).unwrap());
}

#[tokio::test]
async fn an_index_is_resolved_to_this_machine_once() {
    let registry = Registry::start().await.unwrap();
    let ours = push_noise(registry.host(), 2, 1000).await;
    let other = push_noise(registry.host(), 3, 1000).await;
    let entry = |digest: &str, arch: &str| {
        json!({"mediaType": MANIFEST_TYPE, "digest": digest, "size": 500,
            "platform": {"os": "linux", "architecture": arch}})
    };
    let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE,
        "manifests": [entry(&other.digest, "riscv64"), entry(&ours.digest, architecture())]});
    let pusher = Pusher::new(registry.host(), "noise");
    let index = pusher.push_manifest("multi", INDEX_TYPE, &index.to_string().into()).await.unwrap();

    let client = RegistryClient::new(Limits::default()).unwrap();
    let by_tag: ImageRef = format!("{}/noise:multi", registry.host()).parse().unwrap();
    for asked in [by_tag, reference(&index)] {
        assert_eq!(client.resolve(&asked).await.unwrap().digest.to_string(), ours.digest);
    }
    let folder = tempfile::tempdir().unwrap();
    let unresolved = ensure(&cache_in(&folder), &index).await;
    assert!(matches!(unresolved, Err(ImageError::Manifest(ManifestError::IsIndex { .. }))), "{unresolved:?}");
}

#[tokio::test]
async fn unusable_references_are_answered() {
    let registry = Registry::start().await.unwrap();
    let client = RegistryClient::new(Limits::default()).unwrap();
    let missing: ImageRef = format!("{}/no/such:v1", registry.host()).parse().unwrap();
    let outcome = client.resolve(&missing).await;
    assert!(matches!(outcome, Err(ImageError::Registry(RegistryError::NotFound { .. }))), "{outcome:?}");
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let unpinned = cache.ensure(&missing, &|_| {}).await;
    assert!(matches!(unpinned, Err(ImageError::NotPinned { .. })), "{unpinned:?}");
    let second = ImageCache::open(&folder.path().join("cache"));
    assert!(matches!(second, Err(ImageError::InUse { .. })));
    let foreign = json!({"architecture": "s390x", "os": "linux", "rootfs": {"diff_ids": []}});
    let foreign: Bytes = foreign.to_string().into();
    let pusher = Pusher::new(registry.host(), "foreign");
    pusher.push_blob(&foreign).await.unwrap();
    let image = pusher.push_manifest("v1", MANIFEST_TYPE, &manifest_of(&foreign, &[])).await.unwrap();
    let outcome = client.resolve(&reference(&image)).await;
    assert!(matches!(outcome, Err(ImageError::Manifest(ManifestError::WrongPlatform { .. }))), "{outcome:?}");
}

#[tokio::test]
async fn a_connection_that_keeps_breaking_is_resumed() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 4, 4 * MIB).await;
    let proxy = FlakyProxy::start(registry.host()).await;
    // Each connection breaks after a bit more than the mebibyte that is written at once.
    proxy.break_each_connection_after(MIB as u64 * 3 / 2);
    let folder = tempfile::tempdir().unwrap();
    let through: PushedImage = proxy.address_of(&image);
    ensure(&cache_in(&folder), &through).await.unwrap();
    let forwarded = proxy.forwarded_bytes();
    assert!(forwarded > 4 * MIB as u64, "{forwarded}");
    // Without resuming it would never have come to an end; with it, hardly a byte came twice.
    assert!(forwarded < 6 * MIB as u64, "{forwarded}");
}

#[tokio::test]
async fn a_pull_that_was_dropped_half_way_is_resumed_by_the_next_process() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 5, 6 * MIB).await;
    let proxy = FlakyProxy::start(registry.host()).await;
    let through = proxy.address_of(&image);
    let folder = tempfile::tempdir().unwrap();
    // Nothing comes any more after 4 MiB: the pull can only be given up.
    proxy.stall_after(4 * MIB as u64);
    let cache = cache_in(&folder);
    let received = AtomicU64::new(0);
    let note = |step| {
        if let Progress::Fetching { received_bytes, .. } = step {
            received.store(received_bytes, Ordering::SeqCst);
        }
    };
    let image_ref = reference(&through);
    let pull = cache.ensure(&image_ref, &note);
    let enough = async {
        while received.load(Ordering::SeqCst) < 2 * MIB as u64 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        outcome = pull => panic!("the pull ended: {outcome:?}"),
        outcome = tokio::time::timeout(HANG_GUARD, enough) => outcome.expect("the pull hangs"),
    }
    assert!(files_below(&folder.path().join("cache/roots")).is_empty());
    drop(cache);

    proxy.heal();
    let before = proxy.forwarded_bytes();
    let root = ensure(&cache_in(&folder), &through).await.unwrap();
    let resumed_bytes = proxy.forwarded_bytes() - before;
    assert!(resumed_bytes < 9 * MIB as u64 / 2, "{resumed_bytes} bytes came after the restart");
    let extracted = extract(&root, &folder);
    assert!(fs::read(extracted.join("data")).unwrap() == noise(5, 6 * MIB));
}

#[tokio::test]
async fn a_damaged_beginning_is_noticed_and_fetched_anew() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 6, MIB).await;
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let layer = Layer::of_files(&[LayerFile::regular("data", 0o644, noise(6, MIB))]).unwrap();
    let hex = digest_of(&layer.blob)["sha256:".len()..].to_owned();
    fs::write(folder.path().join("cache/partial").join(hex), vec![0; 1000]).unwrap();
    ensure(&cache, &image).await.unwrap();
}

#[tokio::test]
async fn concurrent_callers_share_one_pull() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 7, 2 * MIB).await;
    let proxy = FlakyProxy::start(registry.host()).await;
    let through = proxy.address_of(&image);
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let pulls = (0..8).map(|_| ensure(&cache, &through));
    let roots = futures::future::join_all(pulls).await;
    assert!(roots.iter().all(|root| root.is_ok()));
    assert!(proxy.forwarded_bytes() < 3 * MIB as u64, "{}", proxy.forwarded_bytes());
}

#[tokio::test]
async fn i14_a_registry_that_serves_other_bytes_gets_nothing_onto_the_node() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 8, MIB).await;
    let layer = Layer::of_files(&[LayerFile::regular("data", 0o644, noise(8, MIB))]).unwrap();
    let stored = stored_blob(&registry, &digest_of(&layer.blob));
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);

    flip_a_byte(&stored);
    let outcome = ensure(&cache, &image).await;
    assert!(matches!(outcome, Err(ImageError::Registry(RegistryError::WrongDigest { .. }))), "{outcome:?}");
    flip_a_byte(&stored);
    let whole = fs::metadata(&stored).unwrap().len();
    fs::OpenOptions::new().write(true).open(&stored).unwrap().set_len(whole - 1).unwrap();
    let outcome = ensure(&cache, &image).await;
    assert!(matches!(outcome, Err(ImageError::Registry(RegistryError::WrongSize { .. }))), "{outcome:?}");
    let manifest = stored_blob(&registry, &image.digest);
    flip_a_byte(&manifest);
    let other = tempfile::tempdir().unwrap();
    let outcome = ensure(&cache_in(&other), &image).await;
    assert!(outcome.is_err());
    for folder in [&folder, &other] {
        assert!(files_below(&folder.path().join("cache/roots")).is_empty());
    }

    fs::write(&stored, &layer.blob).unwrap();
    ensure(&cache, &image).await.unwrap();
}

#[tokio::test]
async fn a_blob_that_the_disk_damaged_is_replaced() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 9, MIB).await;
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    drop(ensure(&cache, &image).await.unwrap());
    for root in fs::read_dir(folder.path().join("cache/roots")).unwrap() {
        fs::remove_dir_all(root.unwrap().path()).unwrap();
    }
    let largest = files_below(&folder.path().join("cache/blobs"));
    flip_a_byte(largest.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap());
    let outcome = ensure(&cache, &image).await;
    assert!(matches!(outcome, Err(ImageError::DamagedBlob { .. })), "{outcome:?}");
    ensure(&cache, &image).await.unwrap();
}

#[tokio::test]
async fn a_root_that_the_disk_damaged_is_built_again() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 10, MIB).await;
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let path = ensure(&cache, &image).await.unwrap().path;
    let bytes = fs::read(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert_eq!(ensure(&cache, &image).await.unwrap().path, path);
    assert!(fs::read(&path).unwrap() == bytes);
}

async fn push_layer(registry: &Registry, layer: Layer) -> PushedImage {
    let pusher = Pusher::new(registry.host(), "hostile");
    pusher.push_image("v1", &[layer], &RunConfig::default()).await.unwrap()
}

#[tokio::test]
async fn i14_a_hostile_layer_leaves_no_root() {
    let registry = Registry::start().await.unwrap();
    let raw = |kind: tar::EntryType, name: &str, link: &str| {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(0);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let traversal = raw(tar::EntryType::Regular, "../../evil", "");
    let device = raw(tar::EntryType::Block, "dev/sda", "");
    let through_link =
        [raw(tar::EntryType::Symlink, "x", "/tmp"), raw(tar::EntryType::Regular, "x/holdfast-evil", "")];
    let truncated = raw(tar::EntryType::Regular, "a", "")[..300].to_vec();
    let small = Limits { unpacked_bytes_max: MIB as u64, ..Limits::default() };
    let bomb = Layer::of_files(&[LayerFile::regular("zeros", 0o644, vec![0; 20 * MIB])]).unwrap();
    assert!(bomb.blob.len() < 200_000);
    let mut layers: Vec<_> = [traversal, device, through_link.concat(), truncated]
        .iter()
        .map(|tar| Layer::of_tar(tar).unwrap())
        .collect();
    layers.push(bomb);
    let mut lying = Layer::of_files(&[LayerFile::regular("a", 0o644, "x")]).unwrap();
    lying.diff_id = digest_of(b"something else");
    layers.push(lying);
    let mut not_gzip = Layer::of_files(&[]).unwrap();
    not_gzip.blob = Bytes::from_static(b"this is no gzip stream at all");
    layers.push(not_gzip);

    for layer in layers {
        let image = push_layer(&registry, layer).await;
        let folder = tempfile::tempdir().unwrap();
        let cache = ImageCache::open_with(&folder.path().join("cache"), small).unwrap();
        let error = ensure(&cache, &image).await.unwrap_err();
        assert!(matches!(error, ImageError::Layer { .. }) && error.is_build_failure(), "{error:?}");
        assert!(files_below(&folder.path().join("cache/roots")).is_empty());
        drop(cache);
        // Whatever was half done is gone by the next start at the latest.
        drop(ImageCache::open(&folder.path().join("cache")).unwrap());
        assert!(files_below(&folder.path().join("cache/tmp")).is_empty());
    }
    assert!(!Path::new("/tmp/holdfast-evil").exists());
}

#[tokio::test]
async fn an_unknown_user_fails_the_build_with_its_name() {
    let registry = Registry::start().await.unwrap();
    let config = RunConfig { user: "nobody-here".to_owned(), ..RunConfig::default() };
    let files = [LayerFile::regular("a", 0o644, "")];
    let image = push_files(registry.host(), "a", "v1", &files, &config).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = ensure(&cache_in(&folder), &image).await.unwrap_err();
    assert!(error.to_string().contains("nobody-here"), "{error}");
}

#[tokio::test]
async fn limits_are_checked_before_anything_is_fetched() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 11, MIB).await;
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { compressed_bytes_max: MIB as u64 / 2, ..Limits::default() };
    let cache = ImageCache::open_with(&folder.path().join("cache"), limits).unwrap();
    let outcome = ensure(&cache, &image).await;
    assert!(matches!(outcome, Err(ImageError::Manifest(ManifestError::TooLarge { .. }))), "{outcome:?}");

    let layer = Layer::of_files(&[]).unwrap();
    let layers = vec![layer; 129];
    let pusher = Pusher::new(registry.host(), "many");
    let config = config_file(&layers, &RunConfig::default());
    pusher.push_blob(&config).await.unwrap();
    pusher.push_blob(&layers[0].blob).await.unwrap();
    let many = pusher.push_manifest("v1", MANIFEST_TYPE, &manifest_of(&config, &layers)).await.unwrap();
    let outcome = ensure(&cache, &many).await;
    assert!(matches!(outcome, Err(ImageError::Manifest(ManifestError::TooManyLayers { .. }))), "{outcome:?}");
}

#[tokio::test]
async fn the_collector_spares_what_is_in_use() {
    let registry = Registry::start().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    let mut roots = Vec::new();
    for seed in 20..24 {
        let image = push_noise(registry.host(), seed, MIB).await;
        roots.push(ensure(&cache, &image).await.unwrap());
    }
    let digests: Vec<Digest> = roots.iter().map(|root| root.digest).collect();
    let everything = cache.gc(&HashSet::new(), u64::MAX).unwrap();
    assert_eq!((everything.roots_removed, everything.blobs_removed), (0, 0));

    // One is held, one is named; of the other two the budget has room for the one used last.
    let held = roots.remove(0);
    roots.clear();
    drop(cache.get(digests[1]).unwrap().unwrap());
    let budget = held.bytes * 3;
    let report = cache.gc(&HashSet::from([digests[3]]), budget).unwrap();
    assert_eq!(report.roots_removed, 1);
    assert!(report.blobs_removed > 0 && report.kept_bytes <= budget && report.freed_bytes > 4 * MIB as u64);
    let here = |digest: &Digest| cache.get(*digest).unwrap().is_some();
    assert_eq!(digests.iter().map(here).collect::<Vec<_>>(), [true, true, false, true]);

    let report = cache.gc(&HashSet::from([digests[3]]), 0).unwrap();
    assert_eq!(report.roots_removed, 1);
    assert_eq!(digests.iter().map(here).collect::<Vec<_>>(), [true, false, false, true]);
    assert!(held.path.exists());
}

#[tokio::test]
async fn a_slow_layer_runs_out_of_time() {
    let registry = Registry::start().await.unwrap();
    let image = push_noise(registry.host(), 30, MIB).await;
    let proxy = FlakyProxy::start(registry.host()).await;
    proxy.stall_after(MIB as u64 / 2);
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { layer_time_max: Duration::from_millis(300), ..Limits::default() };
    let cache = ImageCache::open_with(&folder.path().join("cache"), limits).unwrap();
    let outcome = ensure(&cache, &proxy.address_of(&image)).await;
    assert!(matches!(outcome, Err(ImageError::TooSlow { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_layer_error_says_what_is_wrong() {
    let registry = Registry::start().await.unwrap();
    let device = [LayerFile::directory("dev", 0o755)];
    let mut tar = Vec::new();
    {
        let mut builder = tar::Builder::new(&mut tar);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Char);
        header.set_size(0);
        builder.append_data(&mut header, "dev/null", std::io::empty()).unwrap();
    }
    let layers = [Layer::of_files(&device).unwrap(), Layer::of_tar(&tar).unwrap()];
    let pusher = Pusher::new(registry.host(), "device");
    let image = pusher.push_image("v1", &layers, &RunConfig::default()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    match ensure(&cache_in(&folder), &image).await {
        Err(ImageError::Layer { layer, source: LayerError::Forbidden { path, .. } }) => {
            assert_eq!((layer.to_string(), path.as_str()), (digest_of(&layers[1].blob), "dev/null"));
        }
        other => panic!("{other:?}"),
    }
}

fn denied<T>(result: Result<T, ImageError>) -> bool {
    matches!(result, Err(ImageError::Registry(RegistryError::Denied { status: 401, .. })))
}

#[tokio::test]
async fn a_private_registry_gives_to_its_login_and_to_nobody_after_it() {
    let registry = Registry::start_private().await.unwrap();
    let files = [LayerFile::regular("data", 0o644, "mine")];
    let (host, config) = (registry.host_with_login(), RunConfig::default());
    let pushed = push_files(&host, "private", "v1", &files, &config).await.unwrap();
    let named: ImageRef = format!("{}/private:v1", registry.host()).parse().unwrap();
    let with = |password: &str| named.with_login(Some(Login::new(USER.as_bytes(), password.as_bytes())));

    let client = RegistryClient::new(Limits::default()).unwrap();
    assert!(denied(client.resolve(&named).await));
    assert!(denied(client.resolve(&with("another")).await));
    let resolved = client.resolve(&with(PASSWORD)).await.unwrap();
    assert_eq!(resolved.digest.to_string(), pushed.digest);
    assert!(denied(client.resolve(&named).await), "what one login opened stays shut to who has none");

    let folder = TempDir::new().unwrap();
    let cache = cache_in(&folder);
    let pinned = named.with_digest(resolved.digest);
    assert!(denied(cache.ensure(&pinned, &|_| {}).await));
    let root = tokio::time::timeout(HANG_GUARD, cache.ensure(&resolved.reference, &|_| {})).await;
    assert_eq!(root.expect("it hangs").unwrap().digest, resolved.digest);
    // I10: the cache keeps what was pulled, not by which login.
    for path in files_below(&folder.path().join("cache")) {
        let bytes = fs::read(&path).unwrap();
        assert!(!bytes.windows(PASSWORD.len()).any(|w| w == PASSWORD.as_bytes()), "{}", path.display());
    }
}
