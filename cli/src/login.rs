//! The login on disk: which cluster, whom to trust, and the token. One file, readable by its owner alone.

use crate::failure::Failure;
use holdfast_identity::files::{read_secret, write_secret};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The largest login file that is read, in bytes: a CA certificate, addresses and a token.
const LOGIN_BYTES_MAX: usize = 64 << 10;

/// What `holdfast login` keeps.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    /// Members' addresses, `https://host:port`.
    pub(crate) servers: Vec<String>,
    /// The cluster's CA certificate, PEM.
    pub(crate) ca_pem: String,
    /// The bearer token.
    pub(crate) token: Zeroizing<String>,
    /// The org to work in when none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) org: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login")
            .field("servers", &self.servers)
            .field("token", &"[redacted]")
            .finish_non_exhaustive()
    }
}

impl Login {
    /// Reads a login.
    ///
    /// # Errors
    /// [`Failure::NoLogin`] when there is none; others when it is there and cannot be used.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        if !path.exists() {
            return Err(Failure::NoLogin { path: path.to_owned() });
        }
        let bytes = read_secret(path).map_err(|e| Failure::Host(crate::failure::with_sources(&e)))?;
        if bytes.len() > LOGIN_BYTES_MAX {
            return Err(Failure::Host(format!("{} is too large to be a login.", path.display())));
        }
        serde_json::from_slice(&bytes).map_err(|e| {
            Failure::Host(format!("{} is not a login ({e}); run `holdfast login` again.", path.display()))
        })
    }

    /// Writes a login, with mode 0600, whole or not at all.
    pub(crate) fn save(&self, path: &Path) -> Result<(), Failure> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Failure::file("make", folder))?;
        }
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| Failure::Host(format!("Cannot write a login: {e}.")))?;
        write_secret(path, &Zeroizing::new(text)).map_err(|e| Failure::Host(crate::failure::with_sources(&e)))
    }
}

/// Where the login is when nobody says otherwise: `$XDG_CONFIG_HOME/holdfast/context.json`.
pub(crate) fn default_path() -> Result<PathBuf, Failure> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
    let folder = folder.ok_or_else(|| {
        Failure::Usage("Neither XDG_CONFIG_HOME nor HOME is set; name a file with --context.".into())
    })?;
    Ok(folder.join("holdfast").join("context.json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn i10_a_login_is_for_its_owner_alone_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/context.json");
        let login = Login {
            servers: vec!["https://127.0.0.1:7443".into()],
            ca_pem: "ca".into(),
            token: Zeroizing::new("very-secret".into()),
            org: None,
        };
        login.save(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(*Login::load(&path).unwrap().token, "very-secret");
        assert!(!format!("{login:?}").contains("very-secret"));
    }

    #[test]
    fn i14_a_broken_login_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("context.json");
        assert!(matches!(Login::load(&path), Err(Failure::NoLogin { .. })));
        write_secret(&path, b"{\"servers\": 1}").unwrap();
        assert!(matches!(Login::load(&path), Err(Failure::Host(_))));
    }
}
