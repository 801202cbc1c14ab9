//! Images of noise, pushed to a registry and pulled into a cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_node::image::{ImageCache, ImageError, ImageRef, RootImage};
use holdfast_tests::oci::{LayerFile, PushedImage, RunConfig, push_files};
use tempfile::TempDir;

/// Keeps a test from hanging for ever; no test depends on it.
pub(crate) const HANG_GUARD: Duration = Duration::from_secs(120);

pub(crate) fn reference(image: &PushedImage) -> ImageRef {
    image.reference.parse().unwrap()
}

pub(crate) fn cache_in(folder: &TempDir) -> ImageCache {
    ImageCache::open(&folder.path().join("cache")).unwrap()
}

pub(crate) async fn ensure(cache: &ImageCache, image: &PushedImage) -> Result<RootImage, ImageError> {
    tokio::time::timeout(HANG_GUARD, cache.ensure(&reference(image), &|_| {})).await.expect("it hangs")
}

/// Bytes that no compressor makes smaller, the same for a seed.
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    };
    (0..bytes.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(bytes).collect()
}

pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found
}

pub(crate) async fn push_noise(host: &str, seed: u64, bytes: usize) -> PushedImage {
    let files = [LayerFile::regular("data", 0o644, noise(seed, bytes))];
    push_files(host, "noise", "v1", &files, &RunConfig::default()).await.unwrap()
}
