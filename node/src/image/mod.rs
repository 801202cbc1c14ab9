//! Images: from a reference to a read-only root file system on this node's disk.
//!
//! A reference is resolved once, when a release is made, to the digest of one image for this machine's
//! architecture ([`RegistryClient::resolve`]). A node then fetches by digest alone ([`ImageCache::ensure`]):
//! every blob is compared with its digest and size while it streams to disk, the layers are flattened in a
//! folder that only this process reaches, and the result becomes one EROFS file, put in its place by a rename.
//!
//! What this module never does: run anything of an image, mount anything, follow a link of an image out of its
//! root, speak plain HTTP to any but a loopback registry, or show a root that is not complete.
//! I14: registries and layers are hostile until proved otherwise; each fault of theirs is an [`ImageError`].
//! I5: a root that is on disk is handed out without any network.

mod auth;
mod blob_store;
mod cache;
mod collect;
mod compression;
mod digest;
mod entry_path;
mod error;
mod flatten;
mod keyed_lock;
mod layer_tar;
mod manifest;
mod reference;
mod registry;
mod retry;
mod root_image;
mod roots;
mod stock;
mod user;

use std::time::Duration;

pub use auth::Login;
pub use cache::{CACHE_BYTES_MAX, ImageCache, InUse, Progress};
pub use digest::{Digest, DigestError};
pub use error::{ImageError, LayerError, ManifestError, RegistryError, RootError};
pub use manifest::{ImageConfig, fuzz_documents};
pub use reference::{ImageRef, REFERENCE_BYTES_MAX, REPOSITORY_BYTES_MAX, ReferenceError, TAG_BYTES_MAX};
pub use registry::{RegistryClient, ResolvedImage};
pub use roots::RootImage;
pub use stock::{Evictions, GcReport};
pub use user::{ACCOUNT_FILE_BYTES_MAX, Accounts, ImageUser};

/// What an image may cost. The defaults are the product's; tests lower them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sum of all layers as they are in the registry, in bytes.
    pub compressed_bytes_max: u64,
    /// Sum of all layers' tar archives, in bytes.
    pub unpacked_bytes_max: u64,
    /// Layers of one image.
    pub layers_max: usize,
    /// A manifest, index or configuration, in bytes.
    pub document_bytes_max: u64,
    /// Files, directories and links of all layers.
    pub entries_max: u64,
    /// All their names together, in bytes: what this process remembers of them while it unpacks.
    pub name_bytes_max: u64,
    /// To fetch one layer, retries included.
    pub layer_time_max: Duration,
    /// To fetch and build one image.
    pub image_time_max: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            compressed_bytes_max: 10 << 30,
            unpacked_bytes_max: 50 << 30,
            layers_max: 128,
            document_bytes_max: 4 << 20,
            entries_max: 1_000_000,
            name_bytes_max: 256 << 20,
            layer_time_max: Duration::from_secs(5 * 60),
            image_time_max: Duration::from_secs(30 * 60),
        }
    }
}
