//! What a member found out against itself, kept in its data folder for good.
//!
//! A member that is wrong about its state, or whose disk is not the one that it acknowledged writes with, must not come
//! back by a restart (I1, I2). So the verdict is made durable before the member stops, and a folder that has one is
//! refused. A verdict that cannot be read counts as one. Nothing here removes a verdict: the way back is a new member.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::StartError;
use crate::health::Fault;
use crate::sealed_file;

/// Name of the verdict in the data folder.
const VERDICT_FILE: &str = "verdict.postcard";
/// First bytes of the verdict.
const VERDICT_MAGIC: &[u8; 8] = b"HFVERDT1";

fn path_in(data_dir: &Path) -> PathBuf {
    data_dir.join(VERDICT_FILE)
}

/// Refuses a folder whose member may not start again.
pub(crate) fn check(data_dir: &Path) -> Result<(), StartError> {
    let path = path_in(data_dir);
    match sealed_file::read(&path, VERDICT_MAGIC) {
        Ok(None) => Ok(()),
        Ok(Some(fault)) => Err(StartError::OutOfService { path, fault }),
        Err(source) => Err(StartError::VerdictUnreadable { path, source }),
    }
}

/// Makes a verdict durable. The first one stays.
pub(crate) fn write(data_dir: &Path, fault: &Fault) -> io::Result<()> {
    let path = path_in(data_dir);
    if path.exists() {
        return Ok(());
    }
    sealed_file::replace(&path, VERDICT_MAGIC, fault)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn i01_a_verdict_stays_and_a_damaged_one_counts() {
        let folder = tempfile::tempdir().unwrap();
        check(folder.path()).unwrap();
        let fault = Fault::Diverged { index: 7 };
        write(folder.path(), &fault).unwrap();
        write(folder.path(), &Fault::Removed).unwrap();
        assert!(
            matches!(check(folder.path()), Err(StartError::OutOfService { fault: found, .. }) if found == fault)
        );
        let path = path_in(folder.path());
        let good = fs::read(&path).unwrap();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(
                matches!(check(folder.path()), Err(StartError::VerdictUnreadable { .. })),
                "byte {position}"
            );
        }
    }
}
