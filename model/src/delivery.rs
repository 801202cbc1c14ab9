//! What is sealed, in clear, and what it is bound to. These values exist between a seal and the next one, or between a
//! seal and a guest's memory; they are never stored and show nothing of themselves (I10).
//!
//! Age binds what is sealed to a key and to nothing else, so each of these says what it is for, and who opens it
//! compares: a row that was put in another's place is refused.

use crate::sealed::{CredentialOwner, RegistryHost, SealOwner};
use crate::secrets::SecretValue;
use crate::{ClusterId, EnvId, InstanceId, NodeId, SecretKey, SnapshotId};
use serde::{Deserialize, Serialize};

/// One secret of an env.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClearSecret {
    /// Of which env.
    pub env: EnvId,
    /// Under which key.
    pub key: SecretKey,
    /// Its value.
    pub value: SecretValue,
}

/// The sealing key of an env or org.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClearKey {
    /// Whose.
    pub owner: SealOwner,
    /// The key's text.
    pub key: SecretValue,
}

/// What a registry asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClearCredential {
    /// For whom.
    pub owner: CredentialOwner,
    /// The registry.
    pub host: RegistryHost,
    /// The user.
    pub user: SecretValue,
    /// The password or token.
    pub password: SecretValue,
}

/// What one node needs for one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// In which cluster.
    pub cluster: ClusterId,
    /// For which node.
    pub node: NodeId,
    /// For which instance.
    pub instance: InstanceId,
    /// The version of the env's secrets; 0 for none.
    pub version: u32,
    /// The env's secrets, as the canonical file.
    pub file: Option<SecretValue>,
    /// For the registry of the instance's image.
    pub registry: Option<ClearCredential>,
}

/// The key of a snapshot, for the node that restores a volume from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDelivery {
    /// In which cluster.
    pub cluster: ClusterId,
    /// For which node.
    pub node: NodeId,
    /// Of which snapshot.
    pub snapshot: SnapshotId,
    /// The key's text.
    pub key: SecretValue,
}
