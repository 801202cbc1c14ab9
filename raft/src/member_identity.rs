//! Who the owner of a data folder is: cluster, member and incarnation.
//!
//! The same record lies in `member.postcard` beside the databases and in a row of `log.redb`. A member that lost its log, or
//! its whole disk, would otherwise vote a second time in a term in which it voted already, and two quorums could form.
//! So a folder whose two copies do not agree is refused, and an empty folder is never taken for a known member (I2).

use std::io;
use std::path::{Path, PathBuf};

use holdfast_model::MemberId;
use serde::{Deserialize, Serialize};

use crate::sealed_file;

/// Name of the marker in the data folder.
const MARKER_FILE: &str = "member.postcard";
/// First bytes of the marker.
const MARKER_MAGIC: &[u8; 8] = b"HFMEMBR1";

/// Which member of which cluster a data folder belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberIdentity {
    /// The id of the cluster, drawn once at `server init`.
    pub cluster: String,
    /// The id of the member. Never reused, not even after its removal.
    pub member: MemberId,
    /// How often the cluster was started anew from a backup or after the loss of its majority. Starts at 1.
    pub incarnation: u64,
}

impl MemberIdentity {
    /// Who may talk to whom: members of one cluster and one incarnation of it. The first incarnation is the cluster's id
    /// alone, as it was before there were others.
    pub(crate) fn realm(&self) -> String {
        match self.incarnation {
            1 => self.cluster.clone(),
            later => format!("{}/{later}", self.cluster),
        }
    }
}

/// The incarnation of `realm`, if it is one of the same cluster as `own` and a later one.
pub(crate) fn later_incarnation(own: &str, realm: &str) -> Option<u64> {
    let parts = |text: &str| match text.split_once('/') {
        Some((cluster, incarnation)) => Some((cluster.to_owned(), incarnation.parse::<u64>().ok()?)),
        None => Some((text.to_owned(), 1)),
    };
    let ((own_cluster, own), (cluster, incarnation)) = (parts(own)?, parts(realm)?);
    (own_cluster == cluster && incarnation > own).then_some(incarnation)
}

/// Why the marker could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MarkerError {
    /// Reading or writing failed.
    #[error(
        "the identity marker {path} could not be read or written; check the disk and the folder's permissions"
    )]
    Io {
        /// The marker.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The content is not a marker.
    #[error(
        "the identity marker {path} is damaged; this folder cannot prove which member it belongs to: remove the member and join again under a new id"
    )]
    Damaged {
        /// The marker.
        path: PathBuf,
    },
    /// A marker exists already.
    #[error("{path} exists: this folder belongs to a member already; choose an empty folder")]
    Exists {
        /// The marker.
        path: PathBuf,
    },
}

/// Reads the marker of a data folder. `None` when there is none.
pub(crate) fn read(data_dir: &Path) -> Result<Option<MemberIdentity>, MarkerError> {
    let path = data_dir.join(MARKER_FILE);
    sealed_file::read(&path, MARKER_MAGIC).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => MarkerError::Damaged { path },
        _ => MarkerError::Io { path, source },
    })
}

/// Writes the marker of a data folder, durably and only once.
pub(crate) fn write(data_dir: &Path, identity: &MemberIdentity) -> Result<(), MarkerError> {
    let path = data_dir.join(MARKER_FILE);
    if path.exists() {
        return Err(MarkerError::Exists { path });
    }
    replace(data_dir, identity)
}

/// Replaces the marker of a data folder, durably and at once.
pub(crate) fn replace(data_dir: &Path, identity: &MemberIdentity) -> Result<(), MarkerError> {
    let path = data_dir.join(MARKER_FILE);
    sealed_file::replace(&path, MARKER_MAGIC, identity).map_err(|source| MarkerError::Io { path, source })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn identity() -> MemberIdentity {
        MemberIdentity { cluster: "c1".into(), member: MemberId(7), incarnation: 1 }
    }

    #[test]
    fn i06_only_a_later_incarnation_of_the_same_cluster_supersedes() {
        let realm = |incarnation| MemberIdentity { incarnation, ..identity() }.realm();
        assert_eq!(later_incarnation(&realm(1), &realm(2)), Some(2));
        assert_eq!(later_incarnation(&realm(2), &realm(10)), Some(10));
        assert_eq!(later_incarnation(&realm(2), &realm(2)), None);
        assert_eq!(later_incarnation(&realm(2), &realm(1)), None);
        assert_eq!(later_incarnation(&realm(1), "another/7"), None);
        assert_eq!(later_incarnation(&realm(1), "c1/rubbish"), None);
    }

    #[test]
    fn a_marker_is_read_back_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
        write(folder.path(), &identity()).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(identity()));
        assert!(matches!(write(folder.path(), &identity()), Err(MarkerError::Exists { .. })));
    }

    #[test]
    fn any_flipped_or_missing_byte_of_a_marker_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &identity()).unwrap();
        let path = folder.path().join(MARKER_FILE);
        let good = fs::read(&path).unwrap();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(read(folder.path()), Err(MarkerError::Damaged { .. })), "byte {position}");
            fs::write(&path, &good[..position]).unwrap();
            assert!(matches!(read(folder.path()), Err(MarkerError::Damaged { .. })), "cut at {position}");
        }
    }
}
