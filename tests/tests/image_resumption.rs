//! Downloads that break off: they go on from what is on disk, whatever a registry makes of the request for the rest, and
//! end in the right bytes or in an error. See `images.rs` for the same over Debian's registry.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on shall panic")]

#[path = "images/moody_registry.rs"]
mod moody_registry;
#[path = "images/pulls.rs"]
#[allow(dead_code, reason = "shared with the tests of pulls")]
mod pulls;

use std::fs;

use holdfast_node::image::{ImageError, RegistryError};
use moody_registry::{MoodyRegistry, Rest};
use pulls::{cache_in, ensure, files_below};

const MIB: usize = 1 << 20;
/// Attempts in a row that bring nothing, at most: as `node/src/image/retry.rs` has it.
const ATTEMPTS_MAX: usize = 5;

/// Pulls into a fresh cache; a root means that the layer had its digest.
async fn pull(registry: &MoodyRegistry) -> Result<(), ImageError> {
    let folder = tempfile::tempdir().unwrap();
    let pulled = ensure(&cache_in(&folder), &registry.image()).await.map(drop);
    if pulled.is_err() {
        assert!(files_below(&folder.path().join("cache/roots")).is_empty());
    }
    pulled
}

#[tokio::test]
async fn a_download_goes_on_from_what_is_on_disk_each_time_it_breaks() {
    let registry = MoodyRegistry::start(4 * MIB, Rest::Given, &[MIB, 2 * MIB, 0, 7]).await;
    pull(&registry).await.unwrap();
    assert_eq!(registry.asked(), [0, MIB, 3 * MIB, 3 * MIB, 3 * MIB + 7]);
}

#[tokio::test]
async fn a_registry_that_ignores_what_is_here_is_taken_at_its_word() {
    let registry = MoodyRegistry::start(2 * MIB, Rest::Ignored, &[MIB, MIB + 5]).await;
    pull(&registry).await.unwrap();
    assert_eq!(registry.asked(), [0, MIB, MIB + 5]);
}

#[tokio::test]
async fn a_registry_whose_rest_is_something_else_is_asked_for_the_whole() {
    for rest in [Rest::Wrong, Rest::OtherPart, Rest::TooLong, Rest::Refused] {
        let registry = MoodyRegistry::start(2 * MIB, rest, &[MIB]).await;
        pull(&registry).await.unwrap_or_else(|error| panic!("{rest:?}: {error:?}"));
        assert_eq!(registry.asked(), [0, MIB, 0], "{rest:?}");
    }
}

#[tokio::test]
async fn after_a_wrong_rest_an_interruption_begins_anew() {
    let registry = MoodyRegistry::start(2 * MIB, Rest::OtherPart, &[MIB, 0, MIB + 1]).await;
    pull(&registry).await.unwrap();
    assert_eq!(registry.asked(), [0, MIB, 0, 0]);
}

#[tokio::test]
async fn a_registry_that_can_never_resume_is_given_up() {
    let cuts = [MIB; 50];
    let registry = MoodyRegistry::start(2 * MIB, Rest::Ignored, &cuts).await;
    let error = pull(&registry).await.unwrap_err();
    assert!(matches!(error, ImageError::Registry(RegistryError::Interrupted { .. })), "{error:?}");
    // Only the first one brought something.
    assert_eq!(registry.asked().len(), ATTEMPTS_MAX, "{:?}", registry.asked());
}

#[tokio::test]
async fn a_beginning_of_another_blob_is_not_kept() {
    let registry = MoodyRegistry::start(MIB, Rest::Given, &[]).await;
    let folder = tempfile::tempdir().unwrap();
    let cache = cache_in(&folder);
    // As a crash, or a damaged disk, may leave it: bytes of the right number or fewer, and wrong.
    for bytes in [1_000, registry.layer_bytes()] {
        let layer = registry.layer_digest();
        fs::write(folder.path().join("cache/partial").join(&layer), vec![0; bytes]).unwrap();
        ensure(&cache, &registry.image()).await.unwrap();
        for below in ["roots", "blobs"] {
            for file in files_below(&folder.path().join("cache").join(below)) {
                fs::remove_file(file).unwrap();
            }
        }
    }
    assert_eq!(registry.asked(), [1_000, 0, 0]);
}
