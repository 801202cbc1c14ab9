//! The replica's file: one redb database with the items by key and a record of where they stand.
//!
//! Assumptions of the disk: what `fsync` reported is stable, anything later may be torn or lost. redb keeps its own
//! checksums and rolls back to the last durable commit after a crash; opening verifies them all. Above that, the meta
//! record carries the number of items and the XOR of their digests, written in the commit that changes the items and
//! checked when they are read, so that a file which redb accepts but which is not what was written is found too. A file
//! that fails any check is moved aside, whole, for whoever wants to know why; it is never trusted in part.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_model::agent::{Followed, Held, Stamp};
use holdfast_model::{ClusterId, Incarnation, Revision};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::file::ReplicaFile;
use super::rules::Changes;
use super::{ITEMS_MAX, Items, View};

const ITEMS: TableDefinition<'static, &[u8; 16], &[u8]> = TableDefinition::new("items");
const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
const META_KEY: &str = "meta";
/// Version of the stored bytes.
const FORMAT: u16 = 1;
/// Memory for redb's cache, in bytes: the items are in memory anyway.
const CACHE_BYTES: usize = 4 << 20;
/// Purpose of an item's digest. Part of the stored format: never changes.
const ITEM_PURPOSE: &str = "holdfast 2026-11 replica item";

/// Why the replica's file could not be used. The published state is as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The folder could not be made.
    #[error("The folder of {} could not be created; check its parent's permissions.", path.display())]
    Folder {
        /// The replica's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has the file open.
    #[error("The file {} is in use by another agent; stop that one, or give this one a folder of its own.", path.display())]
    InUse {
        /// The replica's file.
        path: PathBuf,
    },
    /// The disk failed or is full.
    #[error("The file {} could not be read or written; check the disk and its free space.", path.display())]
    Storage {
        /// The replica's file.
        path: PathBuf,
        /// What redb said.
        source: Box<redb::Error>,
    },
    /// A later version wrote the file.
    #[error("The file {} has format {found}, which this version cannot read; run the version that wrote it.", path.display())]
    Format {
        /// The replica's file.
        path: PathBuf,
        /// The format found.
        found: u16,
    },
    /// The file belongs to another cluster.
    #[error("The file {} is of cluster {found}, and this agent belongs to another; give it a folder of its own.", path.display())]
    ForeignCluster {
        /// The replica's file.
        path: PathBuf,
        /// The cluster found.
        found: ClusterId,
    },
    /// A damaged file could not be moved aside.
    #[error("The damaged file {} could not be moved aside; move it away by hand.", path.display())]
    Quarantine {
        /// The replica's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that was just created is damaged.
    #[error("The file {} is damaged although it is new; the disk is failing.", path.display())]
    Damaged {
        /// The replica's file.
        path: PathBuf,
    },
    /// A value could not be encoded: a defect of ours.
    #[error("A record for {} could not be encoded; report this as a defect.", path.display())]
    Encode {
        /// The replica's file.
        path: PathBuf,
        /// What postcard said.
        source: postcard::Error,
    },
}

/// The record beside the items.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    cluster: ClusterId,
    place: Option<(Incarnation, Revision)>,
    held: Option<Held>,
    handed_over: Option<Incarnation>,
}

impl Meta {
    pub(super) fn new<T: Followed>(
        cluster: ClusterId,
        view: Option<&View<T>>,
        handed_over: Option<Incarnation>,
    ) -> Meta {
        let place = view.map(|view| (view.stamp.incarnation, view.stamp.revision));
        Meta { cluster, place, held: view.and_then(|view| view.held), handed_over }
    }
}

/// What is stored of [`Meta`]: with the checks over the items.
#[derive(Serialize, Deserialize)]
struct StoredMeta {
    format: u16,
    meta: Meta,
    items: u64,
    digest: [u8; 32],
}

/// What a file held.
pub(super) struct Loaded<T: Followed> {
    pub(super) view: Option<View<T>>,
    pub(super) handed_over: Option<Incarnation>,
}

/// The open file.
#[derive(Debug)]
pub(super) struct Disk<T: Followed> {
    file: Box<dyn ReplicaFile>,
    /// `None` after an error, until it is opened anew.
    database: Option<Database>,
    items: u64,
    digest: [u8; 32],
    kind: std::marker::PhantomData<fn() -> T>,
}

/// Why an attempt to open failed.
enum Attempt {
    Damaged,
    Failed(DiskError),
}

impl<T: Followed> Disk<T> {
    pub(super) fn open(
        file: Box<dyn ReplicaFile>,
        cluster: ClusterId,
    ) -> Result<(Self, Loaded<T>, Option<PathBuf>), DiskError> {
        let mut disk =
            Disk { file, database: None, items: 0, digest: [0; 32], kind: std::marker::PhantomData };
        disk.file.make_folder().map_err(|source| DiskError::Folder { path: disk.path(), source })?;
        match disk.attempt(cluster) {
            Ok(loaded) => Ok((disk, loaded, None)),
            Err(Attempt::Failed(error)) => Err(error),
            Err(Attempt::Damaged) => {
                let aside = disk.quarantine()?;
                let loaded = disk.attempt(cluster).map_err(|error| disk.settled(error))?;
                Ok((disk, loaded, Some(aside)))
            }
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.database.is_some()
    }

    /// Opens the file anew after an error; a damaged one is moved aside.
    pub(super) fn reopen(&mut self, cluster: ClusterId) -> Result<Loaded<T>, DiskError> {
        self.database = None;
        self.file.forget_cached();
        match self.attempt(cluster) {
            Ok(loaded) => Ok(loaded),
            Err(Attempt::Failed(error)) => Err(error),
            Err(Attempt::Damaged) => {
                let aside = self.quarantine()?;
                tracing::error!(path = %aside.display(), "the replica's file was damaged and has been moved aside");
                self.attempt(cluster).map_err(|error| self.settled(error))
            }
        }
    }

    /// Writes changed items and the record in one durable commit.
    pub(super) fn commit(&mut self, meta: &Meta, changes: &Changes<T>) -> Result<(), DiskError> {
        let mut upserts = Vec::with_capacity(changes.upserts.len());
        for item in &changes.upserts {
            upserts.push((T::key_bytes(&item.key()), self.encode(item.as_ref())?));
        }
        let removes = changes.removes.iter().map(T::key_bytes).collect();
        self.write(meta, upserts, removes, Durability::Immediate)
    }

    /// Writes the record alone.
    pub(super) fn commit_meta(&mut self, meta: &Meta, durable: bool) -> Result<(), DiskError> {
        self.write(
            meta,
            Vec::new(),
            Vec::new(),
            if durable { Durability::Immediate } else { Durability::None },
        )
    }

    fn write(
        &mut self,
        meta: &Meta,
        upserts: Vec<([u8; 16], Vec<u8>)>,
        removes: Vec<[u8; 16]>,
        durability: Durability,
    ) -> Result<(), DiskError> {
        let Some(database) = self.database.take() else {
            return Err(self.storage(redb::Error::DatabaseClosed));
        };
        let written = catch_unwind(AssertUnwindSafe(|| -> Result<(u64, [u8; 32]), WriteError> {
            let mut transaction = database.begin_write()?;
            transaction.set_durability(durability)?;
            let (mut items, mut digest) = (self.items, self.digest);
            {
                let mut table = transaction.open_table(ITEMS)?;
                for key in &removes {
                    if let Some(old) = table.remove(key)? {
                        toggle(&mut digest, key, old.value());
                        items = items.saturating_sub(1);
                    }
                }
                for (key, value) in &upserts {
                    match table.insert(key, value.as_slice())? {
                        Some(old) => toggle(&mut digest, key, old.value()),
                        None => items = items.saturating_add(1),
                    }
                    toggle(&mut digest, key, value);
                }
                let stored = StoredMeta { format: FORMAT, meta: meta.clone(), items, digest };
                let stored = postcard::to_stdvec(&stored).map_err(WriteError::Encode)?;
                transaction.open_table(META)?.insert(META_KEY, stored.as_slice())?;
            }
            transaction.commit()?;
            Ok((items, digest))
        }));
        match written {
            Ok(Ok((items, digest))) => {
                (self.items, self.digest) = (items, digest);
                self.database = Some(database);
                Ok(())
            }
            Ok(Err(WriteError::Encode(source))) => Err(DiskError::Encode { path: self.path(), source }),
            Ok(Err(WriteError::Redb(source))) => Err(DiskError::Storage { path: self.path(), source }),
            // redb found its own state broken: the file is looked at anew before it is written again.
            Err(_panic) => {
                Err(self.storage(redb::Error::Corrupted("redb stopped at an inconsistency".into())))
            }
        }
    }

    fn attempt(&mut self, cluster: ClusterId) -> Result<Loaded<T>, Attempt> {
        self.database = None;
        let opened = catch_unwind(AssertUnwindSafe(|| self.open_and_load(cluster)));
        let (database, loaded, items, digest) = opened.unwrap_or(Err(Attempt::Damaged))?;
        (self.database, self.items, self.digest) = (Some(database), items, digest);
        Ok(loaded)
    }

    #[allow(clippy::type_complexity)]
    fn open_and_load(&self, cluster: ClusterId) -> Result<(Database, Loaded<T>, u64, [u8; 32]), Attempt> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
        let database = self.file.open(&builder).map_err(|error| self.judge(error.into()))?;
        let failed = |error: redb::Error| self.judge(error);
        let transaction = database.begin_read().map_err(|error| failed(error.into()))?;
        let stored = match transaction.open_table(META) {
            Ok(table) => {
                let value =
                    table.get(META_KEY).map_err(|error| failed(error.into()))?.ok_or(Attempt::Damaged)?;
                Some(self.decode_meta(value.value(), cluster)?)
            }
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(failed(error.into())),
        };
        let (items, digest) = match transaction.open_table(ITEMS) {
            Ok(table) => load_items::<T>(&table, &failed)?,
            Err(redb::TableError::TableDoesNotExist(_)) => (BTreeMap::new(), [0; 32]),
            Err(error) => return Err(failed(error.into())),
        };
        drop(transaction);
        let count = items.len() as u64;
        let Some(stored) = stored else {
            // Both tables come with the first commit; items without a record are no state of ours.
            let nothing = Loaded { view: None, handed_over: None };
            return if items.is_empty() {
                Ok((database, nothing, 0, [0; 32]))
            } else {
                Err(Attempt::Damaged)
            };
        };
        if stored.items != count || stored.digest != digest || (stored.meta.place.is_none() && count != 0) {
            return Err(Attempt::Damaged);
        }
        let items: Items<T> = Arc::new(items);
        let view = stored.meta.place.map(|(incarnation, revision)| View {
            stamp: Stamp { cluster, incarnation, revision },
            items,
            held: stored.meta.held,
        });
        Ok((database, Loaded { view, handed_over: stored.meta.handed_over }, count, digest))
    }

    fn decode_meta(&self, bytes: &[u8], cluster: ClusterId) -> Result<StoredMeta, Attempt> {
        // The format comes first so that it can be read whatever follows.
        let (format, _) = postcard::take_from_bytes::<u16>(bytes).map_err(|_| Attempt::Damaged)?;
        if format > FORMAT {
            return Err(Attempt::Failed(DiskError::Format { path: self.path(), found: format }));
        }
        let stored: StoredMeta = postcard::from_bytes(bytes).map_err(|_| Attempt::Damaged)?;
        if stored.meta.cluster != cluster {
            let found = stored.meta.cluster;
            return Err(Attempt::Failed(DiskError::ForeignCluster { path: self.path(), found }));
        }
        Ok(stored)
    }

    /// Whether an error means a damaged file, or a disk or a neighbour that may recover.
    fn judge(&self, error: redb::Error) -> Attempt {
        match error {
            redb::Error::DatabaseAlreadyOpen => Attempt::Failed(DiskError::InUse { path: self.path() }),
            redb::Error::Corrupted(_)
            | redb::Error::RepairAborted
            // No version of ours wrote an older format: the byte that says so is damaged.
            | redb::Error::UpgradeRequired(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableIsMultimap(_)
            | redb::Error::TypeDefinitionChanged { .. } => Attempt::Damaged,
            redb::Error::Io(ref source)
                if matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Attempt::Damaged
            }
            other => Attempt::Failed(self.storage(other)),
        }
    }

    fn quarantine(&mut self) -> Result<PathBuf, DiskError> {
        self.database = None;
        (self.items, self.digest) = (0, [0; 32]);
        self.file.set_aside().map_err(|source| DiskError::Quarantine { path: self.path(), source })
    }

    fn settled(&self, error: Attempt) -> DiskError {
        match error {
            Attempt::Failed(error) => error,
            Attempt::Damaged => DiskError::Damaged { path: self.path() },
        }
    }

    fn path(&self) -> PathBuf {
        self.file.path().to_owned()
    }

    fn encode<V: Serialize>(&self, value: &V) -> Result<Vec<u8>, DiskError> {
        postcard::to_stdvec(value).map_err(|source| DiskError::Encode { path: self.path(), source })
    }

    fn storage(&self, source: redb::Error) -> DiskError {
        DiskError::Storage { path: self.path(), source: Box::new(source) }
    }
}

enum WriteError {
    Redb(Box<redb::Error>),
    Encode(postcard::Error),
}

impl<E: Into<redb::Error>> From<E> for WriteError {
    fn from(error: E) -> WriteError {
        WriteError::Redb(Box::new(error.into()))
    }
}

type LoadedItems<T> = (BTreeMap<<T as Followed>::Key, Arc<T>>, [u8; 32]);

fn load_items<T: Followed>(
    table: &redb::ReadOnlyTable<&'static [u8; 16], &'static [u8]>,
    failed: &impl Fn(redb::Error) -> Attempt,
) -> Result<LoadedItems<T>, Attempt> {
    let mut items = BTreeMap::new();
    let mut digest = [0; 32];
    for entry in table.iter().map_err(|error| failed(error.into()))? {
        let (key, value) = entry.map_err(|error| failed(error.into()))?;
        let item: T = postcard::from_bytes(value.value()).map_err(|_| Attempt::Damaged)?;
        if T::key_bytes(&item.key()) != *key.value() || items.len() as u64 >= ITEMS_MAX {
            return Err(Attempt::Damaged);
        }
        toggle(&mut digest, key.value(), value.value());
        items.insert(item.key(), Arc::new(item));
    }
    Ok((items, digest))
}

/// Adds an item's digest to the set's, or takes it away again.
fn toggle(set: &mut [u8; 32], key: &[u8; 16], value: &[u8]) {
    let mut hasher = blake3::Hasher::new_derive_key(ITEM_PURPOSE);
    hasher.update(key).update(value);
    for (byte, item) in set.iter_mut().zip(hasher.finalize().as_bytes()) {
        *byte ^= item;
    }
}
