//! How a member whose state is bad gets a good one, as itself.
//!
//! The state is a function of the log: of snapshots, which hold what was committed, and of the entries after them. Votes
//! and acknowledgements lie in `log.redb` and nowhere else. So a member whose log is sound may throw its state away and
//! be filled again under its own id, and promises nothing anew by it (I2). A member whose *log* is bad may not: see
//! [`crate::health::Fault::LogRotten`].
//!
//! A member that finds its state rotten, or different from a majority's, writes down here that it must be filled, and
//! stops (a leader thereby ends its term). At its next start the bad file is set aside, for whoever wants to know why, and
//! the member is filled: from its own snapshot and log when these reach and only bits rotted, and from a peer's snapshot
//! otherwise (`filling`). It serves when it has what was acknowledged meanwhile. After [`HEALS_MAX`] times the next
//! finding is a verdict, because a disk that rots again and again, or a defect that makes states differ, is not healed.
//!
//! Nothing here serves, votes, or reads what it sets aside (I1).

use std::error::Error;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use holdfast_checked_file::sealed::sync_folder;
use holdfast_model::Digest;
use holdfast_store::StoreError;
use serde::{Deserialize, Serialize};

use crate::error::StartError;
use crate::health::Fault;
use crate::sealed_file;

/// How often a member is filled again before it must be replaced.
pub(crate) const HEALS_MAX: u32 = 3;
/// Name of the record in the data folder.
const RECORD_FILE: &str = "healing.postcard";
/// First bytes of the record.
const RECORD_MAGIC: &[u8; 8] = b"HFHEALS1";
/// The state, and what it is called when it was set aside. One is kept.
pub(crate) const STATE_FILE: &str = "state.redb";
const SET_ASIDE_FILE: &str = "state.redb.bad";

/// A digest that this member had and a majority has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WrongDigest {
    /// After which entry.
    pub(crate) index: u64,
    /// This member's.
    pub(crate) digest: Digest,
}

/// What is to be done at the next start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    /// What was found.
    pub(crate) fault: Fault,
    /// What the new state must not have.
    pub(crate) wrong: Option<WrongDigest>,
    /// Whether the bad state is out of the way already.
    set_aside: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    times: u32,
    pending: Option<Pending>,
}

fn path_in(data_dir: &Path) -> PathBuf {
    data_dir.join(RECORD_FILE)
}

fn read(data_dir: &Path) -> Result<Record, StartError> {
    let path = path_in(data_dir);
    let read = sealed_file::read(&path, RECORD_MAGIC);
    Ok(read.map_err(|source| StartError::VerdictUnreadable { path, source })?.unwrap_or_default())
}

fn write(data_dir: &Path, record: &Record) -> io::Result<()> {
    sealed_file::replace(&path_in(data_dir), RECORD_MAGIC, record)
}

/// Has the member filled at its next start. False when that was done too often, or cannot be counted: then the fault is
/// a verdict.
pub(crate) fn request(data_dir: &Path, fault: &Fault, wrong: Option<WrongDigest>) -> io::Result<bool> {
    let Ok(record) = read(data_dir) else { return Ok(false) };
    if record.pending.is_some() {
        return Ok(true);
    }
    if record.times >= HEALS_MAX {
        return Ok(false);
    }
    let pending = Some(Pending { fault: fault.clone(), wrong, set_aside: false });
    write(data_dir, &Record { times: record.times + 1, pending })?;
    Ok(true)
}

/// What is to be done at this start.
pub(crate) fn pending(data_dir: &Path) -> Result<Option<Pending>, StartError> {
    Ok(read(data_dir)?.pending)
}

/// Gets the bad state out of the way, if that is to be done. Whoever holds the state elsewhere than in a file does the same
/// there when this is true. Safe to repeat.
pub(crate) fn set_state_aside(data_dir: &Path) -> Result<bool, StartError> {
    let record = read(data_dir)?;
    let Some(pending) = record.pending.clone().filter(|pending| !pending.set_aside) else { return Ok(false) };
    let io = |source| StartError::Folder { path: data_dir.to_owned(), source };
    let state = data_dir.join(STATE_FILE);
    remove_if_there(&holdfast_checked_file::sidecar_of(&state)).map_err(io)?;
    match fs::rename(&state, data_dir.join(SET_ASIDE_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
        _ => sync_folder(data_dir).map_err(io)?,
    }
    let pending = Some(Pending { set_aside: true, ..pending });
    write(data_dir, &Record { pending, ..record }).map_err(io)?;
    Ok(true)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Notes that the state is good again.
pub(crate) fn done(data_dir: &Path) -> Result<(), StartError> {
    let record = read(data_dir)?;
    write(data_dir, &Record { pending: None, ..record })
        .map_err(|source| StartError::Folder { path: data_dir.to_owned(), source })
}

/// Whether an error says that a file holds what was never written to it, at any depth.
pub(crate) fn is_damage(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if is_damage_itself(error) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn is_damage_itself(error: &(dyn Error + 'static)) -> bool {
    let of_io =
        |error: &io::Error| matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof);
    let of_storage = |error: &redb::StorageError| match error {
        redb::StorageError::Corrupted(_) => true,
        redb::StorageError::Io(error) => of_io(error),
        _ => false,
    };
    let of_any = |error: &redb::Error| match error {
        // No version of ours wrote an older format of redb: the byte that says so is damaged.
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => true,
        redb::Error::Io(error) => of_io(error),
        _ => false,
    };
    if let Some(error) = error.downcast_ref::<StoreError>() {
        matches!(error, StoreError::Corrupt { .. } | StoreError::Decode { .. })
    } else if let Some(error) = error.downcast_ref::<crate::log_record::RecordError>() {
        !matches!(error, crate::log_record::RecordError::Version { .. })
    } else if let Some(error) = error.downcast_ref::<io::Error>() {
        of_io(error)
    } else if let Some(error) = error.downcast_ref::<redb::StorageError>() {
        of_storage(error)
    } else if let Some(error) = error.downcast_ref::<redb::Error>() {
        of_any(error)
    } else if let Some(error) = error.downcast_ref::<Box<redb::Error>>() {
        of_any(error)
    } else {
        match (
            error.downcast_ref::<redb::DatabaseError>(),
            error.downcast_ref::<redb::TableError>(),
            error.downcast_ref::<redb::TransactionError>(),
            error.downcast_ref::<redb::CommitError>(),
        ) {
            (Some(redb::DatabaseError::UpgradeRequired(_)), ..) => true,
            (Some(redb::DatabaseError::Storage(error)), ..)
            | (_, Some(redb::TableError::Storage(error)), ..)
            | (_, _, Some(redb::TransactionError::Storage(error)), _)
            | (_, _, _, Some(redb::CommitError::Storage(error))) => of_storage(error),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i01_a_bad_state_is_set_aside_once_and_the_last_one_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (state, bad) = (folder.path().join(STATE_FILE), folder.path().join(SET_ASIDE_FILE));
        assert!(!set_state_aside(folder.path()).unwrap());
        for time in 1..=HEALS_MAX {
            fs::write(&state, [time as u8]).unwrap();
            assert!(request(folder.path(), &Fault::StateRotten("a bit".into()), None).unwrap());
            assert!(request(folder.path(), &Fault::StateRotten("again".into()), None).unwrap());
            assert!(set_state_aside(folder.path()).unwrap());
            assert!(!state.exists());
            // A state that is being filled is not set aside as well.
            fs::write(&state, b"new").unwrap();
            assert!(!set_state_aside(folder.path()).unwrap());
            assert_eq!(fs::read(&bad).unwrap(), [time as u8]);
            assert!(pending(folder.path()).unwrap().is_some());
            done(folder.path()).unwrap();
            assert_eq!(pending(folder.path()).unwrap(), None);
        }
        assert!(!request(folder.path(), &Fault::StateRotten("once more".into()), None).unwrap());
    }

    #[test]
    fn i01_a_format_that_was_never_written_is_damage() {
        // redb's design page: two commit slots of 128 bytes at 64, each beginning with the version of the format.
        const SLOTS: [usize; 2] = [64, 192];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        drop(redb::Database::create(&path).unwrap());
        let mut bytes = fs::read(&path).unwrap();
        for slot in SLOTS {
            bytes[slot] = 1;
        }
        fs::write(&path, bytes).unwrap();
        let error = redb::Database::open(&path).unwrap_err();
        assert!(matches!(error, redb::DatabaseError::UpgradeRequired(1)), "{error:?}");
        assert!(is_damage(&error) && is_damage(&redb::Error::from(error)));
    }

    #[test]
    fn i01_a_damaged_record_of_healing_keeps_the_member_out() {
        let folder = tempfile::tempdir().unwrap();
        request(folder.path(), &Fault::StateRotten("a bit".into()), None).unwrap();
        let path = path_in(folder.path());
        let good = fs::read(&path).unwrap();
        for position in 0..good.len() {
            let mut damaged = good.clone();
            damaged[position] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(matches!(pending(folder.path()), Err(StartError::VerdictUnreadable { .. })));
            assert!(!request(folder.path(), &Fault::StateRotten("a bit".into()), None).unwrap());
        }
    }
}
