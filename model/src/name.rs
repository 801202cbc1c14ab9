//! Names that people give: lower case, short, safe in a URL, a file name and a hostname label.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 32;

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "«{text}» is not {kind}: use 1–32 of a–z, 0–9 and «-», beginning with a letter and not ending in «-»"
)]
pub struct NameError {
    /// What was given, cut to a printable length.
    pub text: String,
    /// What kind of name was expected.
    pub kind: &'static str,
}

fn check(text: &str, kind: &'static str) -> Result<(), NameError> {
    let bytes = text.as_bytes();
    let ok = matches!(bytes.first(), Some(b'a'..=b'z'))
        && bytes.len() <= NAME_BYTES_MAX
        && bytes.last() != Some(&b'-')
        && bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if ok { Ok(()) } else { Err(NameError { text: text.chars().take(48).collect(), kind }) }
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident = $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text, $kind)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                check(&text, $kind).map_err(serde::de::Error::custom)?;
                Ok(Self(text))
            }
        }
    )*};
}

names! {
    /// An org's name, unique in the cluster.
    OrgName = "an org's name";
    /// An app's name, unique in its org.
    AppName = "an app's name";
    /// An env's name, unique in its app.
    EnvName = "an env's name";
    /// A process type of a manifest, as in `web`.
    ProcessName = "a process's name";
    /// A port that a process declares, as in `https`.
    PortName = "a port's name";
    /// A volume that a manifest declares.
    VolumeName = "a volume's name";
    /// The name of a member, node or edge.
    AgentName = "a host's name";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_exact() {
        for good in ["a", "web", "web-2", &"a".repeat(32)] {
            assert!(good.parse::<ProcessName>().is_ok(), "{good}");
        }
        for bad in ["", "2web", "-a", "a-", "Web", "we b", "wéb", "a_b", &"a".repeat(33)] {
            assert!(bad.parse::<ProcessName>().is_err(), "{bad}");
        }
    }
}
