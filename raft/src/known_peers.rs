//! Where the other members were last known to be, beside the state, which may be what is lost.
//!
//! Only hints: who answers there must still prove with its certificate which member it is. A file that cannot be read
//! counts as empty.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::sealed_file;

/// Name of the file in the data folder.
const PEERS_FILE: &str = "peers.postcard";
/// First bytes of the file.
const PEERS_MAGIC: &[u8; 8] = b"HFPEERS1";

/// Raft addresses by member.
pub(crate) type KnownPeers = BTreeMap<u64, String>;

/// What was known last.
pub(crate) fn read(data_dir: &Path) -> KnownPeers {
    sealed_file::read(&data_dir.join(PEERS_FILE), PEERS_MAGIC).ok().flatten().unwrap_or_default()
}

/// Remembers it.
pub(crate) fn write(data_dir: &Path, peers: &KnownPeers) -> io::Result<()> {
    sealed_file::replace(&data_dir.join(PEERS_FILE), PEERS_MAGIC, peers)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn peers_are_read_back_and_a_damaged_file_knows_none() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).is_empty());
        let peers = KnownPeers::from([(2, "10.0.0.2:7444".to_owned())]);
        write(folder.path(), &peers).unwrap();
        assert_eq!(read(folder.path()), peers);
        fs::write(folder.path().join(PEERS_FILE), b"HFPEERS1 and rubbish").unwrap();
        assert!(read(folder.path()).is_empty());
    }
}
