//! What lies in a member's folder beside the databases.

use crate::failure::{Failure, with_sources};
use holdfast_identity::files::write_secret;
use holdfast_identity::{Authority, Credential, KeyRing};
use holdfast_model::{AgentName, ClusterId, MemberId};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A member's folder.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

/// Who the member is and where it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemberFile {
    pub(super) cluster: ClusterId,
    pub(super) member: MemberId,
    pub(super) name: AgentName,
    pub(super) api_addr: String,
    pub(super) raft_addr: String,
}

impl Folder {
    /// The folder of a member that is to be made: it must not hold one already.
    pub(super) fn make(path: &Path) -> Result<Self, Failure> {
        std::fs::create_dir_all(path).map_err(Failure::file("make the folder", path))?;
        let mut entries = std::fs::read_dir(path).map_err(Failure::file("read", path))?;
        if entries.next().is_some() {
            return Err(Failure::Usage(format!(
                "{} is not empty: it may hold a member already. Choose another folder, or remove this one if an \
                 earlier attempt stopped half-way.",
                path.display()
            )));
        }
        // Only now: a folder that holds something is somebody's, and stays as it is.
        use std::os::unix::fs::PermissionsExt;
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(path, private).map_err(Failure::file("make private", path))?;
        Ok(Self { path: path.to_owned() })
    }

    /// The folder of a member that exists.
    pub(super) fn open(path: &Path) -> Result<(Self, MemberFile), Failure> {
        let folder = Self { path: path.to_owned() };
        let file = folder.member_path();
        let text = std::fs::read(&file).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Failure::Usage(format!(
                "{} holds no member; make one with `holdfast server init` or `holdfast server join`.",
                path.display()
            )),
            _ => Failure::File { doing: "read", path: file.clone(), source },
        })?;
        let member = serde_json::from_slice(&text)
            .map_err(|e| Failure::Host(format!("{} is damaged: {e}.", file.display())))?;
        Ok((folder, member))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn member_path(&self) -> PathBuf {
        self.path.join("member.json")
    }

    fn credential_path(&self) -> PathBuf {
        self.path.join("credential.pem")
    }

    fn authority_path(&self) -> PathBuf {
        self.path.join("authority.pem")
    }

    /// The keys that open what is sealed to the cluster.
    pub(super) fn sealing_keys(&self) -> Result<KeyRing, Failure> {
        KeyRing::open(&self.path.join("sealing.keys")).map_err(|e| Failure::Host(with_sources(&e)))
    }

    pub(super) fn credential(&self) -> Result<Credential, Failure> {
        Credential::load(&self.credential_path()).map_err(|e| Failure::Host(with_sources(&e)))
    }

    pub(super) fn save_credential(&self, credential: &Credential) -> Result<(), Failure> {
        credential.save(&self.credential_path()).map_err(|e| Failure::Host(with_sources(&e)))
    }

    pub(super) fn authority(&self) -> Result<Authority, Failure> {
        Authority::load(&self.authority_path()).map_err(|e| Failure::Host(with_sources(&e)))
    }

    pub(super) fn save_authority(&self, authority: &Authority) -> Result<(), Failure> {
        authority.save(&self.authority_path()).map_err(|e| Failure::Host(with_sources(&e)))
    }

    /// Writes who the member is: the last step of making one.
    pub(super) fn finish(&self, member: &MemberFile) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(member).map_err(|e| Failure::Host(e.to_string()))?;
        write_secret(&self.member_path(), &text).map_err(|e| Failure::Host(with_sources(&e)))
    }
}

/// Checks that an address is `host:port`.
pub(super) fn check_address(flag: &str, address: &str) -> Result<(), Failure> {
    let port =
        address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(port)) if port != 0 => Ok(()),
        _ => Err(Failure::Usage(format!(
            "{flag} must be host:port with a port from 1 to 65535, not «{address}»."
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn i14_a_folder_that_holds_something_is_refused_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("theirs"), "x").unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(Folder::make(folder.path()), Err(Failure::Usage(_))));
        assert_eq!(mode(folder.path()), 0o755);
        let fresh = folder.path().join("fresh");
        Folder::make(&fresh).unwrap();
        assert_eq!(mode(&fresh), 0o700);
        assert!(matches!(Folder::open(&fresh), Err(Failure::Usage(_))), "a half-made folder is no member");
    }
}
