//! What this node must remember of its instances across its own restarts, in its own redb file.
//!
//! A phase is stored here before it is acted on, so that after a crash between any two steps the next agent knows
//! what may have been begun. Every write is one durable transaction. It holds no specification (those are in the
//! replica) and no secret (I10).
//!
//! Each value is a format version byte and then postcard; see [`VERSION`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_model::InstanceId;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::phase::Observed;

/// The version of the stored form of [`Observed`].
const VERSION: u8 = 1;

const INSTANCES: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("instances");
const HOST: TableDefinition<'_, &str, &str> = TableDefinition::new("host");
const BOOT_ID: &str = "boot_id";
/// Whether the node was cut off: since when, in milliseconds since the Unix epoch.
const CUT_OFF: &str = "cut_off_at_ms";

/// Why the node's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file could not be opened.
    #[error("The node's state '{}' could not be opened; if another agent uses it, stop that one first.", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<redb::DatabaseError>,
    },
    /// A damaged file could not be moved aside.
    #[error("The damaged state '{}' could not be moved aside; remove it by hand.", .path.display())]
    Aside {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Reading or writing failed.
    #[error("The node's state '{}' could not be {action}; check the disk and its free space.", .path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: Box<redb::Error>,
    },
    /// A record could not be encoded.
    #[error(
        "The record of {instance} could not be encoded for '{}'; this is a defect, please report it.",
        .path.display()
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// Whose record.
        instance: InstanceId,
        /// What is wrong with it.
        #[source]
        source: postcard::Error,
    },
}

/// A key and a value as stored.
type Record = ([u8; 16], Vec<u8>);

/// The node's own state. Its calls block on the disk.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    database: Database,
}

impl State {
    /// Opens the file, or makes it. Held by one process at a time. A damaged file is moved aside: machines that run
    /// are adopted without it, and no instance stops for its loss (I5).
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let aside = path.with_extension("redb.damaged");
        Self::open_with(path, || Database::create(path), || std::fs::rename(path, &aside))
    }

    /// The same over any disk: `open` makes or opens the database, `set_aside` moves a damaged one away. `path` is what
    /// errors call it.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn open_with(
        path: &Path,
        open: impl Fn() -> Result<Database, redb::DatabaseError>,
        set_aside: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<Self, StateError> {
        match Self::prepared(open(), path) {
            Err(StateError::Open { source, .. }) if is_damage(&source) => {
                tracing::error!(path = %path.display(), error = %source, "the node's state is damaged and moved aside");
                set_aside().map_err(|source| StateError::Aside { path: path.to_owned(), source })?;
                Self::prepared(open(), path)
            }
            opened => opened,
        }
    }

    fn prepared(opened: Result<Database, redb::DatabaseError>, path: &Path) -> Result<Self, StateError> {
        let database =
            opened.map_err(|source| StateError::Open { path: path.to_owned(), source: Box::new(source) })?;
        let state = Self { path: path.to_owned(), database };
        state.make_tables().map_err(|source| state.access("prepared", source))?;
        Ok(state)
    }

    /// Every instance that is remembered. A record of an unknown form, from another release, is passed over.
    pub fn load(&self) -> Result<BTreeMap<InstanceId, Observed>, StateError> {
        let mut loaded = BTreeMap::new();
        for (key, bytes) in self.records().map_err(|source| self.access("read", source))? {
            let instance = InstanceId::from_bits(u128::from_be_bytes(key));
            match decode(&bytes) {
                Ok(observed) => {
                    loaded.insert(instance, observed);
                }
                Err(error) => tracing::error!(%instance, %error, "a record is not of a known form"),
            }
        }
        Ok(loaded)
    }

    /// Stores what changed, all or nothing; `None` forgets an instance. Durable when it returns.
    pub fn store(&self, changes: &[(InstanceId, Option<Observed>)]) -> Result<(), StateError> {
        let mut records = Vec::with_capacity(changes.len());
        for (instance, observed) in changes {
            let bytes = observed.as_ref().map(encode).transpose().map_err(|source| StateError::Record {
                path: self.path.clone(),
                instance: *instance,
                source,
            })?;
            records.push((instance.to_key(), bytes));
        }
        self.write(&records).map_err(|source| self.access("written", source))
    }

    /// Compares the host's boot with the one that was last seen here, and remembers it. `true` if the host has
    /// booted in between; `false` the first time.
    pub fn host_restarted(&self, boot_id: &str) -> Result<bool, StateError> {
        self.swap_boot_id(boot_id).map_err(|source| self.access("written", source))
    }

    /// Remembers for good that this node was cut off.
    pub fn cut_off(&self, now_ms: u64) -> Result<(), StateError> {
        let write = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            transaction.open_table(HOST)?.insert(CUT_OFF, now_ms.to_string().as_str())?;
            Ok(transaction.commit()?)
        };
        write().map_err(|source| self.access("written", source))
    }

    /// Whether this node was cut off.
    pub fn is_cut_off(&self) -> Result<bool, StateError> {
        let read = || -> Result<bool, redb::Error> {
            Ok(self.database.begin_read()?.open_table(HOST)?.get(CUT_OFF)?.is_some())
        };
        read().map_err(|source| self.access("read", source))
    }

    fn access(&self, action: &'static str, source: redb::Error) -> StateError {
        StateError::Access { path: self.path.clone(), action, source: Box::new(source) }
    }

    fn make_tables(&self) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        transaction.open_table(INSTANCES)?;
        transaction.open_table(HOST)?;
        Ok(transaction.commit()?)
    }

    fn records(&self) -> Result<Vec<Record>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let table = transaction.open_table(INSTANCES)?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            records.push((key.value(), value.value().to_vec()));
        }
        Ok(records)
    }

    fn write(&self, records: &[([u8; 16], Option<Vec<u8>>)]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(INSTANCES)?;
            for (key, bytes) in records {
                match bytes {
                    Some(bytes) => table.insert(key, bytes.as_slice())?,
                    None => table.remove(key)?,
                };
            }
        }
        Ok(transaction.commit()?)
    }

    fn swap_boot_id(&self, boot_id: &str) -> Result<bool, redb::Error> {
        let transaction = self.database.begin_write()?;
        let former = transaction.open_table(HOST)?.insert(BOOT_ID, boot_id)?.map(|id| id.value().to_owned());
        transaction.commit()?;
        Ok(former.is_some_and(|former| former != boot_id))
    }
}

/// Whether opening failed because of what is in the file.
fn is_damage(error: &redb::DatabaseError) -> bool {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        // No version of ours wrote an older format of redb: the byte that says so is damaged.
        redb::DatabaseError::Storage(redb::StorageError::Corrupted(_))
        | redb::DatabaseError::UpgradeRequired(_)
        | redb::DatabaseError::RepairAborted => true,
        redb::DatabaseError::Storage(redb::StorageError::Io(error)) => {
            matches!(error.kind(), InvalidData | UnexpectedEof)
        }
        _ => false,
    }
}

fn encode(observed: &Observed) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_extend(observed, vec![VERSION])
}

fn decode(bytes: &[u8]) -> Result<Observed, postcard::Error> {
    match bytes.split_first() {
        Some((&VERSION, body)) => postcard::from_bytes(body),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_model::resource::InstanceReason;

    use super::*;
    use crate::phase::{Cause, Outcome, Phase};

    fn every_phase() -> Vec<Observed> {
        let reason = InstanceReason::HealthcheckFailed;
        [
            Phase::Absent,
            Phase::Preparing,
            Phase::Starting,
            Phase::Booting,
            Phase::Running,
            Phase::Ready,
            Phase::Draining { since_ms: 1, grace_ms: 300 },
            Phase::Ended { cause: Cause::OutOfMemory },
            Phase::Backoff { until_ms: 70_000 },
            Phase::Terminating { then: Outcome::Failed { reason } },
            Phase::Stopped,
            Phase::Failed { reason },
        ]
        .into_iter()
        .map(|phase| Observed {
            phase,
            restarts: 3,
            failures: 2,
            was_ready: true,
            last_cause: Some(Cause::Crashed),
            detail: Some("exit code 1".to_owned()),
            ..Observed::default()
        })
        .collect()
    }

    #[test]
    fn i05_what_was_stored_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let phases = every_phase();
        let id = |n: usize| InstanceId::from_bits(n as u128);
        {
            let state = State::open(&path).unwrap();
            assert!(!state.host_restarted("first boot").unwrap());
            let changes: Vec<_> = phases.iter().cloned().enumerate().map(|(n, o)| (id(n), Some(o))).collect();
            state.store(&changes).unwrap();
            state.store(&[(id(0), None)]).unwrap();
        }
        let state = State::open(&path).unwrap();
        assert!(!state.host_restarted("first boot").unwrap());
        assert!(state.host_restarted("second boot").unwrap());
        let loaded = state.load().unwrap();
        assert_eq!(loaded.len(), phases.len() - 1);
        assert!(!state.is_cut_off().unwrap());
        state.cut_off(5).unwrap();
        drop(state);
        assert!(State::open(&path).unwrap().is_cut_off().unwrap(), "for good");
        for (n, phase) in phases.iter().enumerate().skip(1) {
            assert_eq!(&loaded[&id(n)], phase);
        }
    }

    #[test]
    fn the_stored_form_of_version_1_stays_readable() {
        // One byte each: version, phase «draining», since, grace (two), restarts, failures, was_ready, cause, text.
        let bytes = [1, 6, 1, 0xac, 2, 3, 2, 1, 1, 1, 1, 2, b'o', b'k'];
        let observed = decode(&bytes).unwrap();
        assert_eq!(observed.phase, Phase::Draining { since_ms: 1, grace_ms: 300 });
        assert_eq!(observed.detail.as_deref(), Some("ok"));
        assert_eq!(encode(&observed).unwrap(), bytes);
    }

    #[test]
    fn i14_a_record_of_another_form_is_an_error() {
        for bytes in [&[][..], &[0], &[2, 0], &[1], &[1, 99], &[1, 6, 1]] {
            assert!(decode(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn i14_a_damaged_file_is_moved_aside_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        for garbage in [vec![7; 8_192], b"short".to_vec()] {
            std::fs::write(&path, &garbage).unwrap();
            let state = State::open(&path).unwrap();
            assert!(state.load().unwrap().is_empty());
            assert_eq!(std::fs::read(path.with_extension("redb.damaged")).unwrap(), garbage);
        }
    }

    #[test]
    fn a_second_agent_cannot_open_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.redb");
        let _held = State::open(&path).unwrap();
        assert!(matches!(State::open(&path), Err(StateError::Open { .. })));
    }
}
