//! The registry's documents: index, manifest and configuration, in their OCI and Docker v2 spellings.
//!
//! Parsing is all that happens here: the bytes were compared with their digest before, and sizes and counts are
//! checked before anything is fetched.

use serde::{Deserialize, Serialize};

use super::compression::Compression;
use super::digest::Digest;
use super::error::ManifestError;
use super::user::ImageUser;

/// What a manifest may be answered as.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

const INDEX_TYPES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFEST_TYPES: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// The only operating system whose images can run here.
const OS: &str = "linux";

/// This machine's architecture under its name in image indexes.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn platform() -> String {
    format!("{OS}/{}", architecture())
}

/// Names a blob, with its size.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// One layer, in the order in which they are applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) compression: Compression,
}

/// One image's manifest, checked against the limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Layer>,
}

/// An index of images, or one image.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Vec<IndexEntry>),
    Image(RawManifest),
}

#[derive(Debug, Deserialize)]
pub(crate) struct IndexEntry {
    pub(crate) digest: Digest,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RawManifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    media_type: Option<String>,
    manifests: Option<Vec<IndexEntry>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Tells an index from an image by what is in it, and refuses a document that claims to be another type.
    pub(crate) fn parse(digest: Digest, bytes: &[u8]) -> Result<Document, ManifestError> {
        let raw: Raw = serde_json::from_slice(bytes).map_err(|source| ManifestError::Json {
            digest,
            what: "image manifest",
            source,
        })?;
        let claims = |types: &[&str]| raw.media_type.as_deref().is_none_or(|claim| types.contains(&claim));
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) if claims(&INDEX_TYPES) => Ok(Document::Index(manifests)),
            (None, Some(config), Some(layers)) if claims(&MANIFEST_TYPES) => {
                Ok(Document::Image(RawManifest { config, layers }))
            }
            _ => Err(ManifestError::MediaType {
                digest,
                media_type: raw.media_type.unwrap_or_else(|| "unknown".to_owned()),
            }),
        }
    }
}

/// The index's image for this machine.
pub(crate) fn choose(index: Digest, entries: &[IndexEntry]) -> Result<Digest, ManifestError> {
    let fits = |entry: &&IndexEntry| {
        entry.platform.as_ref().is_some_and(|it| it.os == OS && it.architecture == architecture())
    };
    // The baseline first: every machine runs it. `v8` is arm64's baseline under its own name.
    let is_baseline = |entry: &&IndexEntry| {
        let variant = entry.platform.as_ref().and_then(|platform| platform.variant.as_deref());
        matches!(variant, None | Some("" | "v8" | "v1"))
    };
    entries
        .iter()
        .filter(fits)
        .find(is_baseline)
        .map(|entry| entry.digest)
        .ok_or_else(|| ManifestError::NoPlatform { digest: index, platform: platform() })
}

impl RawManifest {
    /// Checks counts, sizes and media types.
    pub(crate) fn check(
        self,
        digest: Digest,
        layers_max: usize,
        bytes_max: u64,
    ) -> Result<Manifest, ManifestError> {
        if self.layers.len() > layers_max {
            return Err(ManifestError::TooManyLayers { digest, layers: self.layers.len(), layers_max });
        }
        let bytes = self.layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
        if bytes > bytes_max {
            return Err(ManifestError::TooLarge { digest, bytes, bytes_max });
        }
        if !CONFIG_TYPES.contains(&self.config.media_type.as_str()) {
            let media_type = self.config.media_type;
            return Err(ManifestError::MediaType { digest: self.config.digest, media_type });
        }
        let layers = self.layers.into_iter().map(|layer| {
            let compression = Compression::of_media_type(&layer.media_type).ok_or_else(|| {
                ManifestError::MediaType { digest: layer.digest, media_type: layer.media_type.clone() }
            })?;
            Ok(Layer { digest: layer.digest, size: layer.size, compression })
        });
        Ok(Manifest { config: self.config, layers: layers.collect::<Result<_, _>>()? })
    }
}

/// What an image says about how to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Environment, in the image's order.
    pub env: Vec<(String, String)>,
    /// The program and its first arguments; may be empty.
    pub entrypoint: Vec<String>,
    /// Arguments after the entry point, or the program itself where there is none.
    pub cmd: Vec<String>,
    /// The user, resolved in the image's own account files.
    pub user: ImageUser,
    /// Working directory, absolute.
    pub workdir: String,
}

impl ImageConfig {
    /// The command line that the image itself asks for: entry point and arguments.
    pub fn command(&self) -> Vec<String> {
        [&self.entrypoint[..], &self.cmd[..]].concat()
    }
}

/// The configuration as stored in the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawConfig {
    pub(crate) env: Vec<(String, String)>,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) cmd: Vec<String>,
    pub(crate) user: String,
    pub(crate) workdir: String,
    /// Digests of the layers' uncompressed tars.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct ConfigFile {
    architecture: String,
    os: String,
    #[serde(default)]
    config: Option<ProcessConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ProcessConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
}

impl RawConfig {
    /// Reads a configuration and checks that it belongs to this machine and to a manifest of so many layers.
    pub(crate) fn parse(digest: Digest, bytes: &[u8], layers: usize) -> Result<RawConfig, ManifestError> {
        let file: ConfigFile = serde_json::from_slice(bytes).map_err(|source| ManifestError::Json {
            digest,
            what: "image configuration",
            source,
        })?;
        if file.os != OS || file.architecture != architecture() {
            let actual = format!("{}/{}", file.os, file.architecture);
            return Err(ManifestError::WrongPlatform { digest, platform: platform(), actual });
        }
        let diff_ids = file.rootfs.diff_ids;
        if diff_ids.len() != layers {
            return Err(ManifestError::LayerCount { digest, diff_ids: diff_ids.len(), layers });
        }
        let process = file.config.unwrap_or_default();
        let pair = |entry: String| match entry.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (entry, String::new()),
        };
        let workdir = process.working_dir.unwrap_or_default();
        Ok(RawConfig {
            env: process.env.unwrap_or_default().into_iter().map(pair).collect(),
            entrypoint: process.entrypoint.unwrap_or_default(),
            cmd: process.cmd.unwrap_or_default(),
            user: process.user.unwrap_or_default(),
            workdir: if workdir.starts_with('/') { workdir } else { format!("/{workdir}") },
            diff_ids,
        })
    }
}

/// Entry for a fuzz target: any bytes from a registry, as a manifest, an index or a configuration.
pub fn fuzz_documents(bytes: &[u8]) {
    let digest = Digest::of(bytes);
    let _ = RawConfig::parse(digest, bytes, 1);
    if let Ok(Document::Index(entries)) = Document::parse(digest, bytes) {
        let _ = choose(digest, &entries);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn descriptor(media_type: &str, size: u64) -> serde_json::Value {
        json!({"mediaType": media_type, "digest": Digest::of(b"blob"), "size": size})
    }

    fn parse(value: &serde_json::Value) -> Result<Document, ManifestError> {
        Document::parse(Digest::of(b"doc"), &serde_json::to_vec(value).unwrap())
    }

    #[test]
    fn index_yields_this_machine() {
        let entry = |name: &[u8], os, arch, variant: Option<&str>| {
            json!({"digest": Digest::of(name), "size": 1, "mediaType": MANIFEST_TYPES[0],
                "platform": {"os": os, "architecture": arch, "variant": variant}})
        };
        let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": [
            {"digest": Digest::of(b"no platform"), "size": 1, "mediaType": MANIFEST_TYPES[0]},
            entry(b"windows", "windows", architecture(), None),
            entry(b"other", "linux", "riscv64", None),
            entry(b"newer", "linux", architecture(), Some("v9")),
            entry(b"ours", "linux", architecture(), None),
        ]});
        let Document::Index(entries) = parse(&index).unwrap() else { panic!("not an index") };
        assert_eq!(choose(Digest::of(b"i"), &entries).unwrap(), Digest::of(b"ours"));
        let none = choose(Digest::of(b"i"), &entries[..3]);
        assert!(matches!(none, Err(ManifestError::NoPlatform { .. })));
    }

    #[test]
    fn manifests_beyond_the_limits_are_refused() {
        let manifest = |layers: Vec<serde_json::Value>| {
            let document =
                parse(&json!({"config": descriptor(CONFIG_TYPES[0], 2), "layers": layers})).unwrap();
            let Document::Image(image) = document else { panic!("not an image") };
            image.check(Digest::of(b"doc"), 3, 100)
        };
        let layer = |size| descriptor("application/vnd.oci.image.layer.v1.tar+zstd", size);
        assert_eq!(manifest(vec![layer(50), layer(50)]).unwrap().layers.len(), 2);
        assert!(matches!(manifest(vec![layer(1); 4]), Err(ManifestError::TooManyLayers { .. })));
        assert!(matches!(manifest(vec![layer(50), layer(51)]), Err(ManifestError::TooLarge { .. })));
        assert!(matches!(manifest(vec![layer(u64::MAX); 3]), Err(ManifestError::TooLarge { .. })));
        let foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", 1);
        assert!(matches!(manifest(vec![foreign]), Err(ManifestError::MediaType { .. })));
    }

    #[test]
    fn a_document_is_what_it_claims() {
        let layers: [u8; 0] = [];
        let image =
            json!({"mediaType": INDEX_TYPES[0], "config": descriptor(CONFIG_TYPES[0], 2), "layers": layers});
        assert!(matches!(parse(&image), Err(ManifestError::MediaType { .. })));
        let both = json!({"manifests": [], "config": descriptor(CONFIG_TYPES[0], 2), "layers": layers});
        assert!(matches!(parse(&both), Err(ManifestError::MediaType { .. })));
    }

    #[test]
    fn configuration_is_read_with_its_defaults() {
        let digest = Digest::of(b"c");
        let config =
            |value: serde_json::Value| RawConfig::parse(digest, &serde_json::to_vec(&value).unwrap(), 1);
        let full = config(json!({"architecture": architecture(), "os": "linux",
            "config": {"Env": ["A=b=c", "EMPTY"], "Entrypoint": ["/app"], "Cmd": null, "WorkingDir": "srv"},
            "rootfs": {"type": "layers", "diff_ids": [digest]}}));
        let full = full.unwrap();
        assert_eq!(full.env, [("A".into(), "b=c".into()), ("EMPTY".into(), String::new())]);
        assert_eq!((full.workdir.as_str(), full.user.as_str()), ("/srv", ""));
        let other = config(json!({"architecture": "s390x", "os": "linux", "rootfs": {"diff_ids": [digest]}}));
        assert!(matches!(other, Err(ManifestError::WrongPlatform { .. })));
        let none = config(json!({"architecture": architecture(), "os": "linux", "rootfs": {}}));
        assert!(matches!(none, Err(ManifestError::LayerCount { .. })));
    }

    proptest! {
        #[test]
        fn any_document_is_answered(text in "[\\[\\]{}\":,a-z0-9 ]{0,200}") {
            let _ = Document::parse(Digest::of(b""), text.as_bytes());
            let _ = RawConfig::parse(Digest::of(b""), text.as_bytes(), 1);
        }
    }
}
