//! What can go wrong with an image, one enum for each duty: the registry, the layers, the root file system.
//!
//! None of these ever holds a token, a header or a body of a registry's answer.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::digest::Digest;

/// Asking a registry failed.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// TLS cannot be set up at all.
    #[error("TLS could not be set up for registries; report this as a fault of this build")]
    Tls(#[source] rustls::Error),
    /// A URL did not parse (a redirect's, in practice).
    #[error("the registry {host} led to an address that is no URL")]
    Url {
        /// The registry.
        host: String,
    },
    /// No connection, or it broke.
    #[error(
        "the registry {host} could not be reached; check its name, the network and, for HTTPS, its certificate"
    )]
    Unreachable {
        /// The registry.
        host: String,
        /// What the HTTP client said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer in time.
    #[error("the registry {host} did not answer within {seconds} seconds")]
    Silent {
        /// The registry.
        host: String,
        /// The deadline that passed.
        seconds: u64,
    },
    /// The answer ended early or stalled.
    #[error("the registry {host} stopped sending {what} part-way")]
    Interrupted {
        /// The registry.
        host: String,
        /// What was being fetched.
        what: String,
    },
    /// 404.
    #[error("the registry {host} has no {what}; check the repository, the tag and that it was pushed")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// 401 or 403.
    #[error(
        "the registry {host} refused {what} with status {status}; name a credential for it with `holdfast registry set`, or check the one that is kept"
    )]
    Denied {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
    },
    /// 429 or 5xx, also after the retries.
    #[error("the registry {host} answered {what} with status {status}; try again later")]
    Unavailable {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
    },
    /// Any other status.
    #[error("the registry {host} answered {what} with the unexpected status {status}")]
    Status {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The HTTP status.
        status: u16,
    },
    /// Asked for the rest of a blob, it answered with something else.
    #[error("the registry {host} answered a request for the rest of {what} with something else")]
    Range {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// More redirects than allowed, or one to plain HTTP.
    #[error("the registry {host} redirected {what} too often, or to an address without HTTPS")]
    Redirect {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The token service's answer was unusable.
    #[error("the registry {host} asked for a token, but its token service gave none")]
    Token {
        /// The registry.
        host: String,
    },
    /// The body was longer than allowed.
    #[error("the registry {host} sent more than {bytes_max} bytes for {what}")]
    TooLarge {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// The limit.
        bytes_max: u64,
    },
    /// The bytes are not those that the digest names.
    #[error("the registry {host} sent bytes for {expected} that hash to {actual}; push the image again")]
    WrongDigest {
        /// The registry.
        host: String,
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// A descriptor's size and the blob's differ.
    #[error(
        "the registry {host} sent {actual} bytes for {digest}, whose manifest says {expected}; push the image again"
    )]
    WrongSize {
        /// The registry.
        host: String,
        /// The blob.
        digest: Digest,
        /// The manifest's size.
        expected: u64,
        /// The size that came.
        actual: u64,
    },
    /// The disk refused.
    #[error("the fetched blob could not be written to {}", path.display())]
    Disk {
        /// Where it should have gone.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl RegistryError {
    /// Whether the same request may well succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        use RegistryError::*;
        match self {
            Unreachable { .. } | Silent { .. } | Interrupted { .. } | Unavailable { .. } => true,
            Tls(_)
            | Url { .. }
            | NotFound { .. }
            | Denied { .. }
            | Status { .. }
            | Range { .. }
            | Redirect { .. }
            | Token { .. } => false,
            TooLarge { .. } | WrongDigest { .. } | WrongSize { .. } | Disk { .. } => false,
        }
    }
}

/// A manifest or configuration cannot be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// Not the JSON that it should be.
    #[error("{digest} is not a readable {what}; push the image again")]
    Json {
        /// The document.
        digest: Digest,
        /// What it should have been.
        what: &'static str,
        /// Where it is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A media type that this client does not know.
    #[error(
        "{digest} has the media type {media_type:?}, which cannot be used; build the image as an OCI or Docker v2 image"
    )]
    MediaType {
        /// The document or layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// An index without an entry for this machine.
    #[error("{digest} has no image for {platform}; build the image for it")]
    NoPlatform {
        /// The index.
        digest: Digest,
        /// The platform that was looked for.
        platform: String,
    },
    /// An image for another machine.
    #[error("{digest} is an image for {actual}, but this node is {platform}; build the image for it")]
    WrongPlatform {
        /// The image.
        digest: Digest,
        /// This node's platform.
        platform: String,
        /// The image's platform.
        actual: String,
    },
    /// An index where one image was expected.
    #[error("{digest} names several images; resolve it to one image first")]
    IsIndex {
        /// The index.
        digest: Digest,
    },
    /// More layers than allowed.
    #[error("{digest} has {layers} layers; at most {layers_max} are allowed, so squash some")]
    TooManyLayers {
        /// The image.
        digest: Digest,
        /// How many it has.
        layers: usize,
        /// The limit.
        layers_max: usize,
    },
    /// More bytes than allowed.
    #[error("{digest} has {bytes} compressed bytes; at most {bytes_max} are allowed")]
    TooLarge {
        /// The image.
        digest: Digest,
        /// How many it has.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// The configuration's list of layers is not the manifest's.
    #[error(
        "the configuration of {digest} lists {diff_ids} layers, its manifest {layers}; push the image again"
    )]
    LayerCount {
        /// The image.
        digest: Digest,
        /// In the configuration.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
}

/// A layer is malformed, hostile or too large, or the disk refused it.
#[derive(Debug, Error)]
pub enum LayerError {
    /// Reading the stream failed: truncated, or not what its media type says.
    #[error("the layer's data could not be read; it is truncated or not compressed as its media type says")]
    Read(#[source] io::Error),
    /// Not a tar archive, or a damaged one.
    #[error("the layer is not a sound tar archive: {reason}")]
    Tar {
        /// What is wrong.
        reason: &'static str,
    },
    /// An entry's name leads outside, or is too long or deep.
    #[error("the layer's entry {path:?} has a forbidden name: {reason}")]
    Path {
        /// The entry.
        path: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An entry's parent is a symbolic link or a file of the same layer.
    #[error("the layer's entry {path:?} goes through something that is no directory")]
    ThroughNonDirectory {
        /// The entry.
        path: String,
    },
    /// A device node, a sparse file, or a type that no one knows.
    #[error("the layer's entry {path:?} is {kind}, which an image must not hold; remove it from the image")]
    Forbidden {
        /// The entry.
        path: String,
        /// What it is.
        kind: &'static str,
    },
    /// An extended attribute other than `user.*` and `security.capability`.
    #[error(
        "the layer's entry {path:?} has the extended attribute {name:?}; only user.* and security.capability are allowed"
    )]
    Xattr {
        /// The entry.
        path: String,
        /// The attribute.
        name: String,
    },
    /// A hard link to nothing, or to a directory.
    #[error("the layer's entry {path:?} is a hard link to {target:?}, which is not an earlier file")]
    HardLink {
        /// The entry.
        path: String,
        /// What it links to.
        target: String,
    },
    /// Unpacked, the image is larger than allowed.
    #[error("the unpacked image has more than {max} {what}; make it smaller")]
    TooLarge {
        /// Bytes, entries or bytes of names.
        what: &'static str,
        /// The limit.
        max: u64,
    },
    /// The unpacked bytes are not those that the configuration names.
    #[error(
        "the layer unpacks to {actual}, but the image's configuration says {expected}; push the image again"
    )]
    DiffId {
        /// The configuration's.
        expected: Digest,
        /// What came out.
        actual: Digest,
    },
    /// A system call failed.
    #[error("the layer's entry {path:?} could not be unpacked while {doing}")]
    Disk {
        /// The entry.
        path: String,
        /// Which step.
        doing: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The one who wanted it went away.
    #[error("unpacking was cancelled")]
    Cancelled,
}

/// The root file system could not be made from the unpacked layers.
#[derive(Debug, Error)]
pub enum RootError {
    /// No mkfs.erofs.
    #[error("mkfs.erofs is not installed; install the package erofs-utils")]
    ToolMissing,
    /// It could not be run.
    #[error("mkfs.erofs could not be run")]
    ToolStart(#[source] io::Error),
    /// It failed.
    #[error("mkfs.erofs failed ({status}): {stderr}")]
    ToolFailed {
        /// Its exit status.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
    /// The image's user is not in its passwd or group file.
    #[error("the image has no {what} {name:?}; add it to the image's {file} or use a number")]
    UnknownUser {
        /// User or group.
        what: &'static str,
        /// Its name.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// passwd or group cannot be used.
    #[error("the image's {file} could not be read")]
    AccountFile {
        /// Which file.
        file: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// An image could not be resolved, pulled or made ready.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The manifest or configuration.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A layer.
    #[error("layer {layer} could not be unpacked")]
    Layer {
        /// The layer's blob.
        layer: Digest,
        /// Why not.
        #[source]
        source: LayerError,
    },
    /// A blob on our own disk changed since it was verified. It was removed.
    #[error("the cached blob {digest} was damaged on disk and has been removed; try again to fetch it anew")]
    DamagedBlob {
        /// The blob.
        digest: Digest,
    },
    /// The root file system.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The reference has no digest.
    #[error("the image reference {reference} has no digest; resolve it first")]
    NotPinned {
        /// The reference.
        reference: String,
    },
    /// A deadline passed.
    #[error("{what} took longer than {seconds} seconds")]
    TooSlow {
        /// What took so long.
        what: String,
        /// The deadline.
        seconds: u64,
    },
    /// Another process has this cache open.
    #[error("the image cache {} is in use by another process; stop it first", path.display())]
    InUse {
        /// The cache's folder.
        path: PathBuf,
    },
    /// The disk refused.
    #[error("the image cache could not use {}", path.display())]
    Disk {
        /// Which file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The disk is full, also after everything that nothing needs was removed from the cache.
    #[error(
        "the disk of the image cache {} is full, and no more images can be removed from it; free space there, give the node a larger disk, or run fewer images on it",
        path.display()
    )]
    DiskFull {
        /// The cache's folder.
        path: PathBuf,
        /// What could not be done.
        #[source]
        source: Box<ImageError>,
    },
    /// A background thread died.
    #[error("a thread of the image cache ended unexpectedly while {doing}")]
    Thread {
        /// What it was doing.
        doing: &'static str,
    },
}

impl ImageError {
    /// Whether there was no room on the disk for it.
    pub(crate) fn is_disk_full(&self) -> bool {
        let full = |source: &io::Error| {
            matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        };
        match self {
            ImageError::Registry(RegistryError::Disk { source, .. })
            | ImageError::Layer { source: LayerError::Disk { source, .. }, .. }
            | ImageError::Disk { source, .. } => full(source),
            // The tool speaks the C locale.
            ImageError::Root(RootError::ToolFailed { stderr, .. }) => {
                stderr.contains("No space left on device")
            }
            _ => false,
        }
    }

    /// Whether the image was fetched but could not be made into a root (`rootfs_build_failed`), rather than
    /// not fetched at all (`image_pull_failed`).
    pub fn is_build_failure(&self) -> bool {
        matches!(self, ImageError::Layer { .. } | ImageError::Root(_))
    }
}
