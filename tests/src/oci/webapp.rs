//! The image of the demo's app: a static binary, a certificate for its hostname, and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use super::{LayerFile, OciError, PushedImage, RunConfig, push_files};

/// The port that the app listens on, TLS.
pub const WEBAPP_PORT: u16 = 8443;
/// The path that answers 200 while it is healthy.
pub const WEBAPP_HEALTH_PATH: &str = "/healthz";

const BINARY_PATH: &str = "app/webapp";
const CERTIFICATE_PATH: &str = "app/tls/certificate.pem";
const KEY_PATH: &str = "app/tls/key.pem";
/// Whom the app runs as.
const UID: u32 = 1000;
/// For cargo to build it, at most: a guard against hanging.
const BUILD_TIME_MAX: Duration = Duration::from_secs(15 * 60);

/// A certificate authority and a certificate by it for one hostname. The key is a test's own, and yet not shown.
#[derive(Clone)]
pub struct WebappTls {
    /// What a client must trust.
    pub ca_pem: String,
    certificate_pem: String,
    key_pem: String,
}

impl fmt::Debug for WebappTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebappTls(…)")
    }
}

impl WebappTls {
    /// Makes both for a hostname.
    pub fn generate(hostname: &str) -> Result<WebappTls, OciError> {
        let make = || -> Result<WebappTls, rcgen::Error> {
            let mut authority = CertificateParams::new(Vec::new())?;
            authority.distinguished_name.push(DnType::CommonName, "Holdfast demo CA");
            authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let authority_key = KeyPair::generate()?;
            let ca_pem = authority.self_signed(&authority_key)?.pem();
            let issuer = Issuer::new(authority, authority_key);
            let mut leaf = CertificateParams::new(vec![hostname.to_owned()])?;
            leaf.distinguished_name.push(DnType::CommonName, hostname);
            leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            leaf.use_authority_key_identifier_extension = true;
            let key = KeyPair::generate()?;
            let certificate_pem = leaf.signed_by(&key, &issuer)?.pem();
            Ok(WebappTls { ca_pem, certificate_pem, key_pem: key.serialize_pem() })
        };
        make().map_err(|source| OciError::Certificate { hostname: hostname.to_owned(), source })
    }
}

/// Builds the app's static binary, in a target folder of its own, and returns its path. Quick if nothing changed.
pub async fn build_binary() -> Result<PathBuf, OciError> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let target = workspace.join("target/guest-apps");
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let build = tokio::process::Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--locked",
            "--release",
            "--package",
            "holdfast-webapp",
            "--target",
            &triple,
        ])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(workspace)
        // With a target named, these flags do not reach build scripts and macros, which must not be static.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // A release in what runs, not in how long it takes to make.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let failed = |output: String| OciError::Failed { program: "cargo", output };
    let output = tokio::time::timeout(BUILD_TIME_MAX, build)
        .await
        .map_err(|_| failed("it took too long".to_owned()))?
        .map_err(|source| OciError::Program { program: "cargo", package: "cargo", source })?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(target.join(triple).join("release/holdfast-webapp"))
}

/// Builds the app and pushes it as `repository:release`. Releases differ in their environment alone.
pub async fn push(
    host: &str,
    repository: &str,
    release: &str,
    tls: &WebappTls,
) -> Result<PushedImage, OciError> {
    let path = build_binary().await?;
    let binary = tokio::fs::read(&path).await.map_err(|source| OciError::File { path, source })?;
    let files = [
        LayerFile::directory("app", 0o755),
        LayerFile::directory("app/tls", 0o755),
        LayerFile::regular(CERTIFICATE_PATH, 0o444, tls.certificate_pem.as_str()),
        LayerFile::regular(KEY_PATH, 0o400, tls.key_pem.as_str()).owned_by(UID, UID),
        LayerFile::regular(BINARY_PATH, 0o755, binary),
        LayerFile::directory("etc", 0o755),
        LayerFile::regular("etc/group", 0o644, format!("root:x:0:\nweb:x:{UID}:\n")),
        LayerFile::regular(
            "etc/passwd",
            0o644,
            format!("root:x:0:0:root:/:/nologin\nweb:x:{UID}:{UID}::/app:/nologin\n"),
        ),
    ];
    let config = RunConfig {
        env: BTreeMap::from([("RELEASE".to_owned(), release.to_owned())]),
        entrypoint: vec![format!("/{BINARY_PATH}"), format!("/{CERTIFICATE_PATH}"), format!("/{KEY_PATH}")],
        cmd: Vec::new(),
        user: "web".to_owned(),
        workdir: "/app".to_owned(),
    };
    push_files(host, repository, release, &files, &config).await
}
