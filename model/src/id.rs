//! Typed ids: a prefix that names the kind and a ULID, as in `app_01jz…`.
//!
//! An id is drawn once, at the API, from the [`Context`](crate::Context)'s entropy, so that every member derives the
//! same one. In JSON and on a command line an id is text; in stored and wire bytes it is 16 bytes.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use ulid::Ulid;

/// Why a text is not an id of the kind that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("«{text}» is not {article} id: expected «{prefix}_» followed by 26 characters of a ULID")]
pub struct IdError {
    /// What was given, cut to a printable length.
    pub text: String,
    /// The prefix that this kind of id has.
    pub prefix: &'static str,
    article: &'static str,
}

/// The longest text that an [`IdError`] repeats, in characters.
const ECHO_CHARS_MAX: usize = 48;

fn parse(text: &str, prefix: &'static str, article: &'static str) -> Result<Ulid, IdError> {
    let err = || IdError { text: text.chars().take(ECHO_CHARS_MAX).collect(), prefix, article };
    let rest = text.strip_prefix(prefix).and_then(|r| r.strip_prefix('_')).ok_or_else(err)?;
    // Only the spelling that we print: ids are compared as text by scripts and in URLs.
    if rest.len() != ulid::ULID_LEN || rest.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(err());
    }
    let ulid = Ulid::from_string(rest).map_err(|_| err())?;
    if ulid.to_string().to_ascii_lowercase() == rest { Ok(ulid) } else { Err(err()) }
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal, $article:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            /// The text before the underscore.
            pub const PREFIX: &'static str = $prefix;

            /// The id with these 128 bits.
            pub const fn from_bits(bits: u128) -> Self {
                Self(bits)
            }

            /// The id's 128 bits; their byte order is the order of creation.
            pub const fn bits(self) -> u128 {
                self.0
            }

            /// Big-endian bytes, for keys whose byte order is the id's order.
            pub const fn to_key(self) -> [u8; 16] {
                self.0.to_be_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}_{}", $prefix, Ulid(self.0).to_string().to_ascii_lowercase())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse(text, $prefix, $article).map(|u| Self(u.0))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                if s.is_human_readable() { s.collect_str(self) } else { self.0.to_be_bytes().serialize(s) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                if d.is_human_readable() {
                    let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 16]>::deserialize(d).map(|b| Self(u128::from_be_bytes(b)))
                }
            }
        }
    )*};
}

ids! {
    /// A cluster, from `holdfast server init` on, through restores.
    ClusterId = "cluster", "a cluster";
    /// An organisation: the boundary that no tenant crosses (I9).
    OrgId = "org", "an org";
    /// An application of an org.
    AppId = "app", "an app";
    /// An environment of an app.
    EnvId = "env", "an env";
    /// A release: an image by digest and its manifest.
    ReleaseId = "rel", "a release";
    /// A roll-out of a release over an env.
    DeploymentId = "dep", "a deployment";
    /// One microVM's worth of a process.
    InstanceId = "inst", "an instance";
    /// A host that runs instances.
    NodeId = "node", "a node";
    /// A host that routes public traffic.
    EdgeId = "edge", "an edge";
    /// A hostname or port that leads to a process.
    RouteId = "rt", "a route";
    /// A bearer token.
    TokenId = "tok", "a token";
    /// A person.
    UserId = "usr", "a user";
    /// A service principal.
    ServiceId = "sp", "a service principal";
    /// A one-time permission to join as member, node or edge.
    EnrolmentId = "enr", "an enrolment";
    /// A permission to run one program in one instance, once.
    ExecGrantId = "exec", "an exec grant";
    /// A disk that outlives the instances which mount it.
    VolumeId = "vol", "a volume";
    /// A snapshot of a volume.
    SnapshotId = "snap", "a volume snapshot";
    /// One request to the API.
    RequestId = "req", "a request";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_and_bytes_round_trip(bits in any::<u128>()) {
            let id = AppId::from_bits(bits);
            prop_assert_eq!(id.to_string().parse::<AppId>(), Ok(id));
            let bytes = postcard::to_stdvec(&id).unwrap();
            prop_assert_eq!(bytes.len(), 16);
            prop_assert_eq!(postcard::from_bytes::<AppId>(&bytes).unwrap(), id);
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<AppId>(&json).unwrap(), id);
        }

        #[test]
        fn i14_no_text_panics_and_only_one_spelling_is_accepted(text in "\\PC{0,40}") {
            if let Ok(id) = text.parse::<OrgId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn another_kind_is_refused() {
        let org = OrgId::from_bits(7).to_string();
        assert!(org.parse::<AppId>().is_err());
        assert!(org.to_uppercase().parse::<OrgId>().is_err());
    }
}
