//! What instances need in secret, sealed to this node on its own disk, and opened only on the way into a guest (I10).
//!
//! The node makes its key by itself and tells members the public half with each question. What a member sealed for an
//! instance lies in one file until the instance is gone, so that an instance starts again without any member (I5); an
//! instance that needs nothing has a file that says so, since «not asked yet» must not look like «nothing».
//!
//! It never stores anything in clear, never opens anything before a guest waits for it, and asks for nothing but the
//! node's own instances.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use data_encoding::BASE64;
use futures::future::BoxFuture;
use holdfast_client::{Client, ClientError};
use holdfast_guest::config;
use holdfast_identity::files::{FileError, read_secret, write_secret};
use holdfast_identity::{SealError, SealKey};
use holdfast_model::api::{Answer, AskSecrets, AskSnapshotKey, NodeSecrets, SnapshotKey};
use holdfast_model::delivery::{ClearCredential, Delivery, SnapshotDelivery};
use holdfast_model::sealed::Recipient;
use holdfast_model::secrets::{Bundle, SecretsError};
use holdfast_model::{ClusterId, InstanceId, NodeId, SnapshotId, VolumeId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::logs::redact::RedactError;
use crate::logs::{Ring, chain};

/// The folder below the agent's own.
const FOLDER: &str = "secrets";
/// The node's key, beside the instances' files.
const KEY_FILE: &str = "node.key";
/// The first line of an instance's file, before the version.
const HEADER: &str = "holdfast-node-secrets-1 ";
/// The largest file of an instance: a header, and what a seal may hold.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why an instance's secrets are not here, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NodeSecretsError {
    /// No member could be asked.
    #[error("The instance's secrets are not on this node yet, and no member gave them.")]
    Ask(#[source] ClientError),
    /// No member could be asked for a snapshot's key.
    #[error("No member gave the key of the snapshot.")]
    AskSnapshotKey(#[source] ClientError),
    /// A file of the key or of an instance.
    #[error("The node's own file of secrets cannot be used.")]
    File(#[from] FileError),
    /// A file of an instance.
    #[error("The file '{}' could not be {action}.", .path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("The instance's file of secrets is damaged; it is asked for again when it is removed.")]
    Form,
    /// The seal.
    #[error("What is sealed for this node cannot be opened.")]
    Seal(#[from] SealError),
    /// What was sealed is for somebody else.
    #[error("What is sealed here is for another node or instance.")]
    Misplaced,
    /// The bundle inside.
    #[error("The secrets are not in their canonical form.")]
    Bundle(#[from] SecretsError),
    /// More than can be looked for in lines.
    #[error(transparent)]
    Lines(#[from] RedactError),
}

/// Whom the node asks, and as whom.
pub trait Source: Send + Sync + 'static {
    /// Asks for what an instance needs, sealed to `recipient`.
    fn ask(
        &self,
        instance: InstanceId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<NodeSecrets, ClientError>>;

    /// Asks for the key of the snapshot that a volume is restored from, sealed to `recipient`.
    fn ask_snapshot_key(
        &self,
        volume: VolumeId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<SnapshotKey, ClientError>>;
}

impl Source for Client {
    fn ask(
        &self,
        instance: InstanceId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<NodeSecrets, ClientError>> {
        let client = self.clone();
        let body = AskSecrets { instance, recipient };
        Box::pin(async move { post(&client, "/v1/agent/secrets", &body).await })
    }

    fn ask_snapshot_key(
        &self,
        volume: VolumeId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<SnapshotKey, ClientError>> {
        let client = self.clone();
        let body = AskSnapshotKey { volume, recipient };
        Box::pin(async move { post(&client, "/v1/agent/snapshots/key", &body).await })
    }
}

async fn post<T: DeserializeOwned>(
    client: &Client,
    path: &str,
    body: &impl Serialize,
) -> Result<T, ClientError> {
    let answer: Answer<T> = client.post(path, body).await?;
    Ok(answer.item)
}

struct Membership {
    cluster: ClusterId,
    node: NodeId,
    source: Arc<dyn Source>,
}

/// The secrets of this node's instances.
pub struct NodeSecretsStore {
    folder: PathBuf,
    key: SealKey,
    /// Set once, when the agent knows whose it is. A node without a cluster has no secrets.
    membership: OnceLock<Membership>,
}

impl NodeSecretsStore {
    /// Opens the folder, or makes it with a new key. `known` are instances that an agent before had here: one that did
    /// not know of secrets yet had none for them.
    pub fn open(
        data_dir: &Path,
        known: impl FnOnce() -> BTreeSet<InstanceId>,
    ) -> Result<Self, NodeSecretsError> {
        let folder = data_dir.join(FOLDER);
        let key_file = folder.join(KEY_FILE);
        if !key_file.exists() {
            // The key comes last: a folder that has it has everything.
            for id in known() {
                write_secret(&folder.join(id.to_string()), format!("{HEADER}0\n").as_bytes())?;
            }
            write_secret(&key_file, SealKey::generate().to_text().as_bytes())?;
        }
        let text = read_secret(&key_file)?;
        let key = std::str::from_utf8(&text).map_err(|_| NodeSecretsError::Form)?.trim_end().parse()?;
        Ok(Self { folder, key, membership: OnceLock::new() })
    }

    /// Says whose node this is and whom it asks. Counts once.
    pub fn belongs_to(&self, cluster: ClusterId, node: NodeId, source: Arc<dyn Source>) {
        let _ = self.membership.set(Membership { cluster, node, source });
    }

    /// Sees that what an instance needs is on this disk. Asks nobody when it is.
    pub async fn ensure(&self, id: InstanceId) -> Result<(), NodeSecretsError> {
        let Some(membership) = self.membership.get() else { return Ok(()) };
        if self.path(id).exists() { Ok(()) } else { self.fetch(membership, id).await }
    }

    /// The key of the snapshot that a volume is restored from. It is kept nowhere.
    pub async fn snapshot_key(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<SealKey, NodeSecretsError> {
        let membership = self.membership.get().ok_or(NodeSecretsError::Misplaced)?;
        let recipient = Recipient(self.key.recipient().to_string());
        let asked = membership.source.ask_snapshot_key(volume, recipient);
        let given = asked.await.map_err(NodeSecretsError::AskSnapshotKey)?;
        let sealed = BASE64.decode(given.sealed.as_bytes()).map_err(|_| NodeSecretsError::Form)?;
        let clear = self.key.open(&sealed)?;
        let delivery: SnapshotDelivery = postcard::from_bytes(&clear).map_err(|_| NodeSecretsError::Form)?;
        let expected = (membership.cluster, membership.node, snapshot);
        if (delivery.cluster, delivery.node, delivery.snapshot) != expected {
            return Err(NodeSecretsError::Misplaced);
        }
        let text = std::str::from_utf8(delivery.key.reveal()).map_err(|_| NodeSecretsError::Form)?;
        Ok(text.parse()?)
    }

    /// Asks for what an instance needs now, in the place of what is here.
    pub async fn refresh(&self, id: InstanceId) -> Result<(), NodeSecretsError> {
        match self.membership.get() {
            Some(membership) => self.fetch(membership, id).await,
            None => Ok(()),
        }
    }

    async fn fetch(&self, membership: &Membership, id: InstanceId) -> Result<(), NodeSecretsError> {
        let recipient = Recipient(self.key.recipient().to_string());
        let given = membership.source.ask(id, recipient).await.map_err(NodeSecretsError::Ask)?;
        let sealed = given.sealed.unwrap_or_default();
        let sealed = BASE64.decode(sealed.as_bytes()).map_err(|_| NodeSecretsError::Form)?;
        // Tried at once, and forgotten at once: what could not be opened later must not be kept.
        if !sealed.is_empty() {
            self.opened(membership, id, &sealed)?;
        }
        let mut file = format!("{HEADER}{}\n", given.version).into_bytes();
        file.extend_from_slice(&sealed);
        Ok(write_secret(&self.path(id), &file)?)
    }

    /// The secrets of an instance, for its guest that waits for them.
    pub fn open_for_guest(&self, id: InstanceId) -> Result<Option<config::Secrets>, NodeSecretsError> {
        let Some(file) = self.delivery(id)?.and_then(|delivery| delivery.file) else { return Ok(None) };
        let bundle = Bundle::from_file(file.reveal())?;
        let keys = bundle.iter().map(|(key, value)| (key.to_string(), value.reveal().to_vec())).collect();
        Ok(Some(config::Secrets { platform_env: file.reveal().to_vec(), keys }))
    }

    /// Has an instance's values taken out of its lines from now on. On failure its lines are stored without their text.
    pub fn open_for_lines(&self, id: InstanceId, ring: &Ring) -> Result<(), NodeSecretsError> {
        let known = self.open_for_guest(id).and_then(|secrets| {
            let values = secrets.iter().flat_map(|secrets| &secrets.keys).map(|(_, value)| value.as_slice());
            Ok(ring.know_secrets(values)?)
        });
        known.inspect_err(|_| ring.withhold())
    }

    /// What the registry of an instance's image asks for.
    pub fn open_registry(&self, id: InstanceId) -> Result<Option<ClearCredential>, NodeSecretsError> {
        Ok(self.delivery(id)?.and_then(|delivery| delivery.registry))
    }

    fn delivery(&self, id: InstanceId) -> Result<Option<Delivery>, NodeSecretsError> {
        let Some(membership) = self.membership.get() else { return Ok(None) };
        let path = self.path(id);
        let failed = |source| NodeSecretsError::Disk { path: path.clone(), action: "read", source };
        let mut bytes = Vec::new();
        let file = fs::File::open(&path).map_err(failed)?;
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        let end = bytes.iter().position(|b| *b == b'\n').ok_or(NodeSecretsError::Form)?;
        let version = std::str::from_utf8(&bytes[..end]).ok().and_then(|line| line.strip_prefix(HEADER));
        let version: u32 = version.and_then(|v| v.parse().ok()).ok_or(NodeSecretsError::Form)?;
        if end + 1 == bytes.len() {
            // Without a seal there is nothing; with a version there would have to be something.
            return if version == 0 { Ok(None) } else { Err(NodeSecretsError::Form) };
        }
        self.opened(membership, id, &bytes[end + 1..]).map(Some)
    }

    fn opened(
        &self,
        membership: &Membership,
        id: InstanceId,
        sealed: &[u8],
    ) -> Result<Delivery, NodeSecretsError> {
        let clear = self.key.open(sealed)?;
        let delivery: Delivery = postcard::from_bytes(&clear).map_err(|_| NodeSecretsError::Form)?;
        let ours = delivery.cluster == membership.cluster && delivery.node == membership.node;
        if ours && delivery.instance == id { Ok(delivery) } else { Err(NodeSecretsError::Misplaced) }
    }

    /// Removes what an instance had.
    pub fn forget(&self, id: InstanceId) {
        if let Err(error) = fs::remove_file(self.path(id))
            && error.kind() != io::ErrorKind::NotFound
        {
            // It is sealed, and the next sweep removes it.
            tracing::warn!(instance = %id, error = %chain(&error), "an instance's sealed secrets were not removed");
        }
    }

    /// Removes what other instances had than these.
    pub fn sweep(&self, keep: &BTreeSet<InstanceId>) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let id = name.to_str().and_then(|name| name.parse::<InstanceId>().ok());
            if let Some(id) = id.filter(|id| !keep.contains(id)) {
                self.forget(id);
            }
        }
    }

    fn path(&self, id: InstanceId) -> PathBuf {
        self.folder.join(id.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::{Line, Logs};
    use crate::machine::now_ms;
    use holdfast_identity::SealTo;
    use holdfast_model::agent::LogStream;
    use holdfast_model::secrets::SecretValue;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    const CLUSTER: ClusterId = ClusterId::from_bits(1);
    const NODE: NodeId = NodeId::from_bits(2);
    const CANARY: &[u8] = b"canary-of-this-test";

    /// Seals as a member does, and counts how often it is asked. Without an answer it is a member that is away.
    struct Member {
        asked: AtomicU32,
        answer: Mutex<Option<Delivery>>,
    }

    impl Source for Arc<Member> {
        fn ask(
            &self,
            _: InstanceId,
            recipient: Recipient,
        ) -> BoxFuture<'static, Result<NodeSecrets, ClientError>> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let to: SealTo = recipient.0.parse().unwrap();
            let delivery = self.answer.lock().unwrap().clone();
            Box::pin(async move {
                let Some(delivery) = delivery else { return Err(ClientError::NoEndpoints) };
                let clear = postcard::to_stdvec(&delivery).unwrap();
                let sealed = delivery.file.is_some().then(|| BASE64.encode(&to.seal(&clear).unwrap()));
                Ok(NodeSecrets { version: delivery.version, sealed })
            })
        }

        fn ask_snapshot_key(
            &self,
            volume: VolumeId,
            recipient: Recipient,
        ) -> BoxFuture<'static, Result<SnapshotKey, ClientError>> {
            let to: SealTo = recipient.0.parse().unwrap();
            // The volume's number says for whom it is sealed.
            let (cluster, node) =
                if volume.bits() == 1 { (CLUSTER, NODE) } else { (CLUSTER, NodeId::from_bits(9)) };
            let snapshot = SnapshotId::from_bits(7);
            let key = SealKey::generate().to_text().as_bytes().to_vec();
            let delivery = SnapshotDelivery { cluster, node, snapshot, key: SecretValue::new(key.into()) };
            let sealed = BASE64.encode(&to.seal(&postcard::to_stdvec(&delivery).unwrap()).unwrap());
            Box::pin(async move { Ok(SnapshotKey { sealed }) })
        }
    }

    #[tokio::test]
    async fn i09_a_snapshots_key_is_taken_only_if_it_is_for_this_node_and_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let (store, _) = store(folder.path(), None);
        let (own, other) = (VolumeId::from_bits(1), VolumeId::from_bits(2));
        let (asked, another) = (SnapshotId::from_bits(7), SnapshotId::from_bits(8));
        store.snapshot_key(own, asked).await.unwrap();
        for (volume, snapshot) in [(other, asked), (own, another)] {
            let refused = store.snapshot_key(volume, snapshot).await;
            assert!(matches!(refused, Err(NodeSecretsError::Misplaced)), "{refused:?}");
        }
    }

    fn delivery(instance: u128) -> Delivery {
        let file = [b"# HOLDFAST_SECRETS_V1\nA=", CANARY, b"\n"].concat();
        Delivery {
            cluster: CLUSTER,
            node: NODE,
            instance: InstanceId::from_bits(instance),
            version: 3,
            file: Some(SecretValue::new(file.into())),
            registry: None,
        }
    }

    fn store(folder: &Path, answer: Option<Delivery>) -> (NodeSecretsStore, Arc<Member>) {
        let store = NodeSecretsStore::open(folder, BTreeSet::new).unwrap();
        let member = Arc::new(Member { asked: AtomicU32::new(0), answer: Mutex::new(answer) });
        store.belongs_to(CLUSTER, NODE, Arc::new(Arc::clone(&member)));
        (store, member)
    }

    #[tokio::test]
    async fn i05_i10_an_instance_has_its_secrets_from_this_disk_alone_and_sealed() {
        let folder = tempfile::tempdir().unwrap();
        let id = InstanceId::from_bits(7);
        let (first, member) = store(folder.path(), Some(delivery(7)));
        first.ensure(id).await.unwrap();
        first.ensure(id).await.unwrap();
        assert_eq!(member.asked.load(Ordering::SeqCst), 1);
        drop(first);
        // An agent that comes back while every member is away.
        let (second, member) = store(folder.path(), None);
        second.ensure(id).await.unwrap();
        let secrets = second.open_for_guest(id).unwrap().unwrap();
        assert_eq!(secrets.keys, [("A".to_owned(), CANARY.to_vec())]);
        assert!(secrets.platform_env.ends_with(&[b"A=", CANARY, b"\n"].concat()));
        assert_eq!(member.asked.load(Ordering::SeqCst), 0);
        assert!(second.ensure(InstanceId::from_bits(8)).await.is_err(), "nobody to ask, and nothing here");
        for entry in fs::read_dir(folder.path().join(FOLDER)).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let bytes = fs::read(&path).unwrap();
            assert!(!bytes.windows(CANARY.len()).any(|w| w == CANARY), "{}", path.display());
        }
        second.forget(id);
        assert!(second.open_for_guest(id).is_err());
    }

    #[tokio::test]
    async fn i09_what_is_for_another_node_or_instance_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let id = InstanceId::from_bits(7);
        let foreign = [
            Delivery { node: NodeId::from_bits(9), ..delivery(7) },
            Delivery { cluster: ClusterId::from_bits(9), ..delivery(7) },
            delivery(8),
        ];
        for foreign in foreign {
            let (store, _) = store(folder.path(), Some(foreign));
            assert!(matches!(store.ensure(id).await, Err(NodeSecretsError::Misplaced)));
            assert!(!store.path(id).exists());
        }
        let (store, _) = store(folder.path(), Some(delivery(7)));
        store.ensure(id).await.unwrap();
        // A file that is put in another's place.
        let other = InstanceId::from_bits(8);
        fs::copy(store.path(id), store.path(other)).unwrap();
        assert!(matches!(store.open_for_guest(other), Err(NodeSecretsError::Misplaced)));
        let mut bytes = fs::read(store.path(id)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(store.path(id), &bytes).unwrap();
        assert!(matches!(store.open_for_guest(id), Err(NodeSecretsError::Seal(_))));
        // Nor is what was cut off taken for nothing.
        let end = bytes.iter().position(|b| *b == b'\n').unwrap();
        fs::write(store.path(id), &bytes[..=end]).unwrap();
        assert!(matches!(store.open_for_guest(id), Err(NodeSecretsError::Form)));
    }

    #[tokio::test]
    async fn i10_values_are_taken_out_of_lines_also_by_an_agent_that_was_restarted() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path().join("logs")).unwrap();
        let stored = |id| {
            let ring = logs.ring(id).unwrap();
            let said = [b"pw=".as_slice(), CANARY].concat();
            ring.append(&[Line { stream: LogStream::Stdout, guest_seq: 1, ..Line::remark(now_ms(), said) }])
                .unwrap();
            ring.read(None, 10).unwrap().pop().unwrap().text
        };
        let (id, unknown) = (InstanceId::from_bits(7), InstanceId::from_bits(8));
        let (first, _) = store(folder.path(), Some(delivery(7)));
        first.ensure(id).await.unwrap();
        drop(first);
        let (second, _) = store(folder.path(), None);
        second.open_for_lines(id, &logs.ring(id).unwrap()).unwrap();
        assert_eq!(stored(id), "pw=[redacted]");
        // What cannot be opened cannot be looked for.
        assert!(second.open_for_lines(unknown, &logs.ring(unknown).unwrap()).is_err());
        assert_eq!(stored(unknown), "[redacted]");
    }

    #[tokio::test]
    async fn i05_instances_from_before_there_were_secrets_need_none() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (InstanceId::from_bits(1), InstanceId::from_bits(2));
        let secrets = NodeSecretsStore::open(folder.path(), || BTreeSet::from([old])).unwrap();
        drop(secrets);
        let again = NodeSecretsStore::open(folder.path(), || BTreeSet::from([new])).unwrap();
        let member = Arc::new(Member { asked: AtomicU32::new(0), answer: Mutex::new(None) });
        again.belongs_to(CLUSTER, NODE, Arc::new(member));
        again.ensure(old).await.unwrap();
        assert!(again.open_for_guest(old).unwrap().is_none());
        assert!(again.ensure(new).await.is_err());
        again.sweep(&BTreeSet::from([new]));
        assert!(!again.path(old).exists() && again.folder.join(KEY_FILE).exists());
    }
}
