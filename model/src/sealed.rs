//! What the state holds of secrets: which there are, and what is sealed. Nothing here is in clear, and nothing here
//! can open a seal; that is `identity`'s.
//!
//! Events and views hold keys, digests of what is sealed, and versions. What is sealed lies in rows of the log state,
//! which the events refer to by digest (`docs/adr/`, «Secrets»).

use crate::limits::{SEAL_BYTES_MAX, SECRET_VALUE_BYTES_MAX};
use crate::{Actor, AppId, Digest, EnvId, OrgId, SecretKey, SnapshotId, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The longest recipient, in bytes: `age1` and 58 characters.
const RECIPIENT_BYTES_MAX: usize = 64;
/// The longest name of a registry, in bytes: a hostname and a port.
const REGISTRY_HOST_BYTES_MAX: usize = 262;

/// To whom something is sealed: an age X25519 recipient, as in `age1…`. Its form is checked by who seals.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct Recipient(pub String);

impl Recipient {
    /// Whether it has the length and the letters of one.
    pub fn is_formed(&self) -> bool {
        self.0.len() <= RECIPIENT_BYTES_MAX
            && self.0.starts_with("age1")
            && self.0.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// An age file. It shows its length only: it is nobody's to read.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SealedBytes(pub Vec<u8>);

impl SealedBytes {
    /// Its digest, by which events refer to it.
    pub fn digest(&self) -> Digest {
        Digest::keyed("holdfast 2026 sealed bytes v1", &self.0)
    }

    /// Whether it is not longer than a sealed value may be.
    pub fn fits(&self) -> bool {
        !self.0.is_empty() && self.0.len() <= SECRET_VALUE_BYTES_MAX + SEAL_BYTES_MAX
    }
}

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealedBytes({} bytes)", self.0.len())
    }
}

/// One secret, sealed to its env's recipient.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSecret {
    /// The bytes that its line takes in the file: the bound on the file is kept without opening anything.
    pub line_bytes: u32,
    /// The age file.
    pub bytes: SealedBytes,
}

/// Whose a sealing key is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum SealOwner {
    /// An env's, for its secrets.
    Env(EnvId),
    /// An org's, for its registry credentials.
    Org(OrgId),
    /// A volume snapshot's. With it goes all that was ever sealed to it.
    Snapshot(SnapshotId),
}

/// A sealing key: who holds the cluster's key opens it, and with it what is sealed to `recipient`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The key's public half.
    pub recipient: Recipient,
    /// The recipient of the cluster that the key is sealed to.
    pub to: Recipient,
    /// The key, sealed.
    pub key: SealedBytes,
}

/// What is known of one secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SecretMeta {
    /// Of what is sealed.
    pub sealed: Digest,
    /// The version that brought this value.
    pub changed_in: u32,
}

/// Why there is a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SecretCause {
    /// Some were set or removed.
    Set,
    /// All were replaced.
    Import,
    /// An earlier version came back.
    Rollback {
        /// Which.
        to: u32,
    },
}

/// One version of an env's secrets: which there are, not what they say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SecretVersion {
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// From 1 within the env.
    pub number: u32,
    /// Why it exists.
    pub cause: SecretCause,
    /// The secrets.
    #[schema(value_type = BTreeMap<String, SecretMeta>)]
    pub secrets: BTreeMap<SecretKey, SecretMeta>,
    /// Who made it.
    pub actor: Actor,
    /// When it was made.
    pub created_at: Timestamp,
}

/// For whom a registry credential is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum CredentialOwner {
    /// Every app of an org.
    Org(OrgId),
    /// One app; it goes before its org's.
    App(AppId),
}

/// A registry, as an image's reference begins: a hostname and perhaps a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistryHost(String);

/// A text does not name a registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a registry is named as in `registry.example` or `registry.example:5000`, in lower case")]
pub struct RegistryHostError;

impl RegistryHost {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The registry of an image's repository: its first part, where that has a dot or a port or is `localhost`.
    pub fn of_repository(repository: &str) -> Option<Self> {
        let (first, _) = repository.split_once('/')?;
        (first.contains(['.', ':']) || first == "localhost").then(|| first.parse().ok()).flatten()
    }
}

impl FromStr for RegistryHost {
    type Err = RegistryHostError;

    fn from_str(text: &str) -> Result<Self, RegistryHostError> {
        let (host, port) = text.rsplit_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
        let named = !host.is_empty()
            && text.len() <= REGISTRY_HOST_BYTES_MAX
            && host.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'))
            && !host.starts_with(['.', '-'])
            && !host.ends_with(['.', '-']);
        let port = port.is_none_or(|port| {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
        if named && port { Ok(Self(text.to_owned())) } else { Err(RegistryHostError) }
    }
}

impl fmt::Display for RegistryHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for RegistryHost {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RegistryHost {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// That there is a credential for a registry, not what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RegistryCredential {
    /// For whom.
    pub owner: CredentialOwner,
    /// Whose.
    pub org: OrgId,
    /// The registry.
    pub host: RegistryHost,
    /// Of what is sealed.
    pub sealed: Digest,
    /// Who set it.
    pub actor: Actor,
    /// When it was set.
    pub created_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_have_one_spelling() {
        for good in ["docker.io", "127.0.0.1:5000", "localhost", "a-b.example:443"] {
            assert_eq!(good.parse::<RegistryHost>().unwrap().to_string(), good);
        }
        let of = |text| RegistryHost::of_repository(text).map(|host| host.to_string());
        assert_eq!(of("registry.test:5000/team/app").as_deref(), Some("registry.test:5000"));
        assert_eq!(
            (of("team/app"), of("app"), of("localhost/app").as_deref()),
            (None, None, Some("localhost"))
        );
        for bad in ["", "A.example", "a/b", "a:", "a:0", "a:99999", "a:+1", ".a", "a.", "-a", "user@a", "a b"]
        {
            assert!(bad.parse::<RegistryHost>().is_err(), "{bad}");
        }
    }

    #[test]
    fn i10_what_is_sealed_shows_its_length_only() {
        assert_eq!(format!("{:?}", SealedBytes(vec![1, 2, 3])), "SealedBytes(3 bytes)");
    }
}
