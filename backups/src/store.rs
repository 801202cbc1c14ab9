//! Where backups lie: a folder, or a bucket of an S3-compatible service.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload};

use crate::http::Connector;

/// For one object, there or back, with the retries of the client, at most.
const OBJECT_TIME_MAX: Duration = Duration::from_secs(300);
/// To erase a folder of objects, at most.
const ERASE_TIME_MAX: Duration = Duration::from_secs(600);

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The address says nothing that is known.
    #[error(
        "«{address}» is no place for backups: name a folder by its absolute path, or a bucket as in s3://bucket/folder."
    )]
    Address {
        /// What was given.
        address: String,
    },
    /// It cannot be opened.
    #[error(
        "The store of backups '{address}' cannot be used; check its address, its rights and its credentials."
    )]
    Open {
        /// Its address.
        address: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something could not be done with an object.
    #[error("The object '{name}' could not be {action} in the store of backups.")]
    Object {
        /// Which.
        name: String,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: object_store::Error,
    },
    /// The object is not there.
    #[error("The object '{name}' is not in the store of backups.")]
    Absent {
        /// Which.
        name: String,
    },
    /// The object is longer than it may be.
    #[error(
        "The object '{name}' in the store of backups is longer than {bytes_max} bytes: it is not what was stored."
    )]
    TooLong {
        /// Which.
        name: String,
        /// What it may have.
        bytes_max: usize,
    },
    /// It took too long.
    #[error("The object '{name}' could not be {action} within {seconds} s.")]
    Late {
        /// Which.
        name: String,
        /// What was tried, as a past participle.
        action: &'static str,
        /// The deadline.
        seconds: u64,
    },
}

/// A place for backups. Cheap to share.
#[derive(Clone, Debug)]
pub struct Store {
    address: String,
    objects: Arc<dyn ObjectStore>,
}

impl Store {
    /// The store at an address: `/folder`, which is made if needed, or `s3://bucket/folder`, with what the environment says of
    /// credentials, region and endpoint (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`,
    /// `AWS_ALLOW_HTTP`). Nothing is asked of the service yet.
    ///
    /// # Errors
    /// When the address is none, or the store cannot be used.
    pub fn open(address: &str) -> Result<Self, StoreError> {
        let opened = match address.strip_prefix("s3://") {
            Some(rest) => bucket(rest).ok_or(None),
            None if address.starts_with('/') => folder(address).map_err(Some),
            None => Err(None),
        };
        let objects = match opened {
            Ok(Place::Folder(objects)) => objects,
            Ok(Place::Bucket { name, below }) => {
                let failed = |source: object_store::Error| StoreError::Open {
                    address: address.to_owned(),
                    source: Box::new(source),
                };
                let builder =
                    AmazonS3Builder::from_env().with_bucket_name(name).with_http_connector(Connector);
                let bucket = builder.build().map_err(failed)?;
                Arc::new(PrefixStore::new(bucket, below)) as Arc<dyn ObjectStore>
            }
            Err(None) => return Err(StoreError::Address { address: address.to_owned() }),
            Err(Some(source)) => return Err(StoreError::Open { address: address.to_owned(), source }),
        };
        Ok(Self { address: address.to_owned(), objects })
    }

    /// Its address, for people.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Stores an object whole; durable when this returns, as far as the service keeps its word.
    ///
    /// # Errors
    /// When it cannot be stored.
    pub async fn put(&self, name: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
        let path = Path::from(name);
        let put = self.objects.put(&path, PutPayload::from(bytes));
        within(name, "stored", OBJECT_TIME_MAX, put).await.map(|_| ())
    }

    /// Fetches an object of at most so many bytes.
    ///
    /// # Errors
    /// When it is not there, cannot be fetched, or is longer.
    pub async fn get(&self, name: &str, bytes_max: usize) -> Result<Bytes, StoreError> {
        let path = Path::from(name);
        let fetch = async {
            let found = self.objects.get(&path).await?;
            let mut pieces = found.into_stream();
            let mut bytes = BytesMut::new();
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                if bytes.len() + piece.len() > bytes_max {
                    return Ok(None);
                }
                bytes.extend_from_slice(&piece);
            }
            Ok(Some(bytes.freeze()))
        };
        let found = within(name, "fetched", OBJECT_TIME_MAX, fetch).await?;
        found.ok_or_else(|| StoreError::TooLong { name: name.to_owned(), bytes_max })
    }

    /// Erases every object below a folder. One that is not there is no error.
    ///
    /// # Errors
    /// When some object may still be there.
    pub async fn erase_all(&self, folder: &str) -> Result<(), StoreError> {
        let path = Path::from(folder);
        let found = self.objects.list(Some(&path)).map_ok(|object| object.location).boxed();
        let erase = async {
            let mut erased = self.objects.delete_stream(found);
            while let Some(one) = erased.next().await {
                match one {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        within(folder, "erased", ERASE_TIME_MAX, erase).await
    }
}

enum Place {
    Folder(Arc<dyn ObjectStore>),
    Bucket { name: String, below: String },
}

fn bucket(rest: &str) -> Option<Place> {
    let (name, below) = rest.split_once('/').unwrap_or((rest, ""));
    let below = below.trim_end_matches('/');
    let formed = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    (formed && !name.is_empty()).then(|| Place::Bucket { name: name.to_owned(), below: below.to_owned() })
}

fn folder(address: &str) -> Result<Place, Box<dyn std::error::Error + Send + Sync>> {
    let path = PathBuf::from(address);
    std::fs::create_dir_all(&path)?;
    let folder = LocalFileSystem::new_with_prefix(&path)?.with_fsync(true).with_automatic_cleanup(true);
    Ok(Place::Folder(Arc::new(folder)))
}

async fn within<T>(
    name: &str,
    action: &'static str,
    deadline: Duration,
    work: impl Future<Output = Result<T, object_store::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(deadline, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(object_store::Error::NotFound { .. })) => Err(StoreError::Absent { name: name.to_owned() }),
        Ok(Err(source)) => Err(StoreError::Object { name: name.to_owned(), action, source }),
        Err(_) => Err(StoreError::Late { name: name.to_owned(), action, seconds: deadline.as_secs() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_put_is_got_and_erased() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("deep/er").to_str().unwrap()).unwrap();
        puts_gets_and_erases(&store, b"first".to_vec()).await;
    }

    async fn puts_gets_and_erases(store: &Store, first: Vec<u8>) {
        store.put("a/one", first.clone()).await.unwrap();
        store.put("a/b/two", b"second".to_vec()).await.unwrap();
        store.put("ab", b"beside".to_vec()).await.unwrap();
        assert!(store.get("a/one", first.len()).await.unwrap() == first);
        assert!(matches!(store.get("a/one", 4).await, Err(StoreError::TooLong { .. })));
        assert!(matches!(store.get("a/none", 4).await, Err(StoreError::Absent { .. })));
        store.erase_all("a").await.unwrap();
        store.erase_all("a").await.unwrap();
        assert!(matches!(store.get("a/b/two", 9).await, Err(StoreError::Absent { .. })));
        assert_eq!(&store.get("ab", 9).await.unwrap()[..], b"beside");
    }

    /// A bucket of a real service: `HOLDFAST_S3=s3://bucket/folder` and the credentials that [`Store::open`] reads.
    #[tokio::test]
    #[ignore = "needs an S3-compatible service in HOLDFAST_S3"]
    async fn a_bucket_does_what_a_folder_does() {
        let address = std::env::var("HOLDFAST_S3").unwrap();
        let store = Store::open(&address).unwrap();
        puts_gets_and_erases(&store, vec![7; 4 << 20]).await;
        store.erase_all("ab").await.unwrap();
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_is_one() {
        for address in ["", "backups", "./backups", "ftp://host/x", "s3://", "s3:///folder", "s3://b cket"] {
            let error = Store::open(address).unwrap_err();
            assert!(matches!(error, StoreError::Address { .. }), "{address}: {error}");
            assert!(error.to_string().contains("s3://bucket/folder"));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Store::open(file.path().join("below").to_str().unwrap()).unwrap_err();
        assert!(matches!(error, StoreError::Open { .. }), "{error}");
    }
}
