//! Our own small tool to make OCI images and push them to a registry on this machine.
//!
//! An image is one or more layers, each a deterministic tar.gz of a list of files: the same list gives the same
//! digest on any machine. [`Registry`] runs Debian's `docker-registry` on a loopback port; [`webapp`] builds the
//! image of the demo's app. For tests and the demo only: it speaks plain HTTP, to loopback.

pub mod busybox;
pub mod registry;
pub mod webapp;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::{BASE64, HEXLOWER};
use flate2::{Compression, GzBuilder};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, LOCATION};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use thiserror::Error;

pub use registry::Registry;

/// For one request, at most: a guard against hanging, not a measure.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(60);
/// Of an answer's body, what is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Every file's time: fixed, so that the same files make the same layer.
const FILE_TIME: u64 = 1_700_000_000;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
/// A gzipped layer's media type.
pub const LAYER_GZIP_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Making or pushing an image failed.
#[derive(Debug, Error)]
pub enum OciError {
    /// A file could not be read or written, or a layer not be made.
    #[error("{} could not be used", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A program is missing.
    #[error("{program} could not be started; install the package {package}")]
    Program {
        /// The program.
        program: &'static str,
        /// Debian's package that has it.
        package: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A program ended badly.
    #[error("{program} failed: {output}")]
    Failed {
        /// The program.
        program: &'static str,
        /// The end of what it said.
        output: String,
    },
    /// The registry did not do what it was asked.
    #[error("the registry did not accept {what}: {detail}")]
    Push {
        /// What was pushed.
        what: String,
        /// Its answer, or the fault of the connection.
        detail: String,
    },
    /// A certificate could not be made.
    #[error("a certificate for {hostname} could not be made")]
    Certificate {
        /// For which name.
        hostname: String,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
}

/// One file, directory or link of a layer.
#[derive(Debug, Clone)]
pub struct LayerFile {
    /// Path in the image, without a leading `/`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What it is.
    pub kind: FileKind,
}

/// What a [`LayerFile`] is.
#[derive(Debug, Clone)]
pub enum FileKind {
    /// A file with this content.
    Regular(Vec<u8>),
    /// A directory.
    Directory,
    /// A symbolic link to this target.
    Symlink(String),
    /// Another name of a file that comes earlier.
    HardLink(String),
}

impl LayerFile {
    /// A file of root's.
    pub fn regular(path: impl Into<String>, mode: u32, content: impl Into<Vec<u8>>) -> LayerFile {
        LayerFile { path: path.into(), mode, uid: 0, gid: 0, kind: FileKind::Regular(content.into()) }
    }

    /// A directory of root's.
    pub fn directory(path: impl Into<String>, mode: u32) -> LayerFile {
        LayerFile { path: path.into(), mode, uid: 0, gid: 0, kind: FileKind::Directory }
    }

    /// A symbolic link.
    pub fn symlink(path: impl Into<String>, target: impl Into<String>) -> LayerFile {
        let kind = FileKind::Symlink(target.into());
        LayerFile { path: path.into(), mode: 0o777, uid: 0, gid: 0, kind }
    }

    /// The same with another owner.
    pub fn owned_by(self, uid: u32, gid: u32) -> LayerFile {
        LayerFile { uid, gid, ..self }
    }
}

/// A layer ready to be pushed.
#[derive(Debug, Clone)]
pub struct Layer {
    /// As it is pushed.
    pub blob: Bytes,
    /// One of the layer media types.
    pub media_type: String,
    /// `sha256:…` of the uncompressed tar.
    pub diff_id: String,
}

impl Layer {
    /// A gzipped layer of these files, in this order.
    pub fn of_files(files: &[LayerFile]) -> io::Result<Layer> {
        Layer::of_tar(&tar_of(files)?)
    }

    /// A gzipped layer of an archive, whatever is in it.
    pub fn of_tar(tar: &[u8]) -> io::Result<Layer> {
        let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(4));
        encoder.write_all(tar)?;
        Ok(Layer {
            blob: encoder.finish()?.into(),
            media_type: LAYER_GZIP_TYPE.to_owned(),
            diff_id: digest_of(tar),
        })
    }
}

/// How an image's processes run by default.
#[derive(Debug, Clone, Default)]
pub struct RunConfig {
    /// Environment.
    pub env: BTreeMap<String, String>,
    /// Program and first arguments.
    pub entrypoint: Vec<String>,
    /// Further arguments.
    pub cmd: Vec<String>,
    /// `user[:group]`, empty for root.
    pub user: String,
    /// Working directory, empty for `/`.
    pub workdir: String,
}

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedImage {
    /// `host:port/repository:tag@sha256:…`
    pub reference: String,
    /// `sha256:…` of its manifest.
    pub digest: String,
}

/// `sha256:…` of these bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", HEXLOWER.encode(&Sha256::digest(bytes)))
}

/// This machine's architecture as images name it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Makes an image of one layer and pushes it.
pub async fn push_files(
    host: &str,
    repository: &str,
    tag: &str,
    files: &[LayerFile],
    config: &RunConfig,
) -> Result<PushedImage, OciError> {
    let layer =
        Layer::of_files(files).map_err(|source| OciError::File { path: repository.into(), source })?;
    Pusher::new(host, repository).push_image(tag, &[layer], config).await
}

/// Pushes to one repository of a registry that speaks plain HTTP.
pub struct Pusher {
    http: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>,
    host: String,
    repository: String,
    /// The header of a login.
    authorization: Option<String>,
}

impl Pusher {
    /// `host` is `address:port`, with `user:password@` in front for a private registry.
    pub fn new(host: &str, repository: &str) -> Pusher {
        let http = Client::builder(TokioExecutor::new()).build_http();
        let (login, host) = host.rsplit_once('@').map_or((None, host), |(login, host)| (Some(login), host));
        let authorization = login.map(|login| format!("Basic {}", BASE64.encode(login.as_bytes())));
        Pusher { http, host: host.to_owned(), repository: repository.to_owned(), authorization }
    }

    /// Pushes layers, configuration and manifest, the manifest last.
    pub async fn push_image(
        &self,
        tag: &str,
        layers: &[Layer],
        config: &RunConfig,
    ) -> Result<PushedImage, OciError> {
        let config = config_file(layers, config);
        self.push_blob(&config).await?;
        for layer in layers {
            self.push_blob(&layer.blob).await?;
        }
        let manifest = manifest_of(&config, layers);
        self.push_manifest(tag, MANIFEST_TYPE, &manifest).await
    }

    /// Pushes a blob and returns its digest. One that is there already is not sent.
    pub async fn push_blob(&self, blob: &Bytes) -> Result<String, OciError> {
        let digest = digest_of(blob);
        let what = format!("blob {digest}");
        let base = format!("http://{}/v2/{}/blobs", self.host, self.repository);
        if self.request(Method::HEAD, format!("{base}/{digest}"), "", &Bytes::new(), &what).await?.0
            == StatusCode::OK
        {
            return Ok(digest);
        }
        let (status, location) =
            self.request(Method::POST, format!("{base}/uploads/"), "", &Bytes::new(), &what).await?;
        let location = location.filter(|_| status == StatusCode::ACCEPTED);
        let upload = location.ok_or_else(|| rejected(&what, status))?;
        let upload = if upload.starts_with('/') { format!("http://{}{upload}", self.host) } else { upload };
        let separator = if upload.contains('?') { '&' } else { '?' };
        let target = format!("{upload}{separator}digest={digest}");
        match self.request(Method::PUT, target, "application/octet-stream", blob, &what).await?.0 {
            StatusCode::CREATED => Ok(digest),
            status => Err(rejected(&what, status)),
        }
    }

    /// Pushes a manifest or index, as it is, under a tag.
    pub async fn push_manifest(
        &self,
        tag: &str,
        media_type: &str,
        manifest: &Bytes,
    ) -> Result<PushedImage, OciError> {
        let what = format!("{}:{tag}", self.repository);
        let target = format!("http://{}/v2/{}/manifests/{tag}", self.host, self.repository);
        match self.request(Method::PUT, target, media_type, manifest, &what).await?.0 {
            StatusCode::CREATED => {
                let digest = digest_of(manifest);
                Ok(PushedImage { reference: format!("{}/{what}@{digest}", self.host), digest })
            }
            status => Err(rejected(&what, status)),
        }
    }

    async fn request(
        &self,
        method: Method,
        target: String,
        content_type: &str,
        body: &Bytes,
        what: &str,
    ) -> Result<(StatusCode, Option<String>), OciError> {
        let fail = |detail: String| OciError::Push { what: what.to_owned(), detail };
        let mut request = Request::builder().method(method).uri(target);
        if !content_type.is_empty() {
            request = request.header(CONTENT_TYPE, content_type);
        }
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        let request = request.body(Full::new(body.clone())).map_err(|error| fail(error.to_string()))?;
        let exchange = async {
            let answer = self.http.request(request).await.map_err(|error| fail(error.to_string()))?;
            let status = answer.status();
            let location = answer.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.map(str::to_owned);
            // Read to its end, so that the connection can be used again.
            Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| fail(error.to_string()))?;
            Ok((status, location))
        };
        tokio::time::timeout(REQUEST_TIME_MAX, exchange)
            .await
            .map_err(|_| fail("it took too long".to_owned()))?
    }
}

fn rejected(what: &str, status: StatusCode) -> OciError {
    OciError::Push { what: what.to_owned(), detail: status.to_string() }
}

/// The configuration of an image of these layers.
pub fn config_file(layers: &[Layer], config: &RunConfig) -> Bytes {
    let env: Vec<_> = config.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    let file = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "User": config.user,
            "WorkingDir": config.workdir,
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    file.to_string().into()
}

/// The manifest of an image of these layers.
pub fn manifest_of(config: &Bytes, layers: &[Layer]) -> Bytes {
    let descriptor = |media_type: &str, blob: &Bytes| json!({ "mediaType": media_type, "digest": digest_of(blob), "size": blob.len() });
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(&layer.media_type, &layer.blob)).collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor(CONFIG_TYPE, config),
        "layers": layers,
    });
    manifest.to_string().into()
}

fn tar_of(files: &[LayerFile]) -> io::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = Header::new_gnu();
        header.set_mode(file.mode);
        header.set_uid(u64::from(file.uid));
        header.set_gid(u64::from(file.gid));
        header.set_mtime(FILE_TIME);
        header.set_size(0);
        match &file.kind {
            FileKind::Regular(content) => {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, &file.path, &content[..])?;
            }
            FileKind::Directory => {
                header.set_entry_type(EntryType::Directory);
                builder.append_data(&mut header, &file.path, io::empty())?;
            }
            FileKind::Symlink(target) => {
                header.set_entry_type(EntryType::Symlink);
                builder.append_link(&mut header, &file.path, target)?;
            }
            FileKind::HardLink(target) => {
                header.set_entry_type(EntryType::Link);
                builder.append_link(&mut header, &file.path, target)?;
            }
        }
    }
    builder.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_layer() {
        let files = [
            LayerFile::directory("app", 0o755),
            LayerFile::regular("app/run", 0o755, "x").owned_by(5, 6),
            LayerFile::symlink("app/link", "run"),
        ];
        let layers = [Layer::of_files(&files).unwrap(), Layer::of_files(&files).unwrap()];
        assert_eq!(layers[0].blob, layers[1].blob);
        // Fixed here so that another machine's digest is compared too.
        assert_eq!(
            layers[0].diff_id,
            "sha256:41e458f51749056c52cf75b42de8314b8e8d8556df0c32bd9544075ad39795bd"
        );
    }
}
