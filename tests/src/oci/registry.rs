//! Debian's `docker-registry` on a free loopback port, for as long as its handle lives.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::OciError;

const PROGRAM: &str = "docker-registry";
const PACKAGE: &str = "docker-registry";
/// Whom a private registry lets in, and by what.
pub const USER: &str = "robot";
/// The password of [`USER`].
pub const PASSWORD: &str = "canary-registry-41c7";
/// What a private registry knows of [`PASSWORD`]: bcrypt, the one form that it reads.
const HTPASSWD: &str = "robot:$2y$05$abcdefghijklmnopqrstuu/7yNUfxyVxXOmtBA0n9Xz3lyf0TMCnW\n";
/// For the registry to listen, at most: a guard against hanging.
const START_TIME_MAX: Duration = Duration::from_secs(60);
const POLL_TIME: Duration = Duration::from_millis(20);
/// How it says in its log where it listens.
const LISTENING: &str = "listening on ";

/// A running registry with its own empty storage. Dropping it kills it and removes the storage.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    host: String,
    folder: tempfile::TempDir,
}

impl Registry {
    /// Starts a registry with storage in a temporary folder.
    pub async fn start() -> Result<Registry, OciError> {
        Self::start_with("").await
    }

    /// The same, for [`USER`] with [`PASSWORD`] alone.
    pub async fn start_private() -> Result<Registry, OciError> {
        Self::start_with("auth:\n  htpasswd:\n    realm: private\n    path: htpasswd\n").await
    }

    async fn start_with(auth: &str) -> Result<Registry, OciError> {
        let folder =
            tempfile::tempdir().map_err(|source| OciError::File { path: std::env::temp_dir(), source })?;
        let log = folder.path().join("registry.log");
        let child = spawn(folder.path(), &log, auth)?;
        // From here on a failure drops the handle, which ends the process.
        let mut registry = Registry { child, host: String::new(), folder };
        let began_at = Instant::now();
        while registry.host.is_empty() {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let exited = registry.child.try_wait().map(|status| status.is_some()).unwrap_or(true);
            if let Some(host) = listening_at(&said) {
                registry.host = host;
            } else if exited || began_at.elapsed() > START_TIME_MAX {
                let start = said.len().saturating_sub(1000);
                let output = said.get(start..).unwrap_or(&said).to_owned();
                return Err(OciError::Failed { program: PROGRAM, output });
            } else {
                tokio::time::sleep(POLL_TIME).await;
            }
        }
        Ok(registry)
    }

    /// `127.0.0.1:port`, as image references begin.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The same for [`Pusher`](super::Pusher), with the login of a private registry.
    pub fn host_with_login(&self) -> String {
        format!("{USER}:{PASSWORD}@{}", self.host)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its storage: tests damage it on purpose.
    pub fn storage(&self) -> std::path::PathBuf {
        self.folder.path().join("storage")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &Path, log: &Path, auth: &str) -> Result<Child, OciError> {
    let config = folder.join("config.yml");
    let storage = folder.join("storage");
    // Port 0: the kernel chooses a free one, and no other process can take it in between.
    let text = format!(
        "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:0\n{auth}",
        storage.display()
    );
    for (path, text) in [(&config, text.as_str()), (&folder.join("htpasswd"), HTPASSWD)] {
        fs::write(path, text).map_err(|source| OciError::File { path: path.clone(), source })?;
    }
    let log_file = |path: &Path| -> io::Result<(File, File)> {
        let file = File::create(path)?;
        Ok((file.try_clone()?, file))
    };
    let (out, err) = log_file(log).map_err(|source| OciError::File { path: log.to_owned(), source })?;
    Command::new(PROGRAM)
        .arg("serve")
        .arg(&config)
        .current_dir(folder)
        // Settings in the environment would win over the file.
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .env("OTEL_TRACES_EXPORTER", "none")
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .map_err(|source| OciError::Program { program: PROGRAM, package: PACKAGE, source })
}

/// The address in `msg="listening on 127.0.0.1:43127"`.
fn listening_at(log: &str) -> Option<String> {
    let (_, after) = log.split_once(LISTENING)?;
    let end = after.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))?;
    Some(after[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_the_log() {
        let log = "time=\"…\" level=info msg=\"listening on 127.0.0.1:43127\" go.version=go1\n";
        assert_eq!(listening_at(log).unwrap(), "127.0.0.1:43127");
        assert_eq!(listening_at("listening on 127.0.0.1:43"), None);
    }
}
