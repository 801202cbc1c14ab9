//! Public hostnames in the one spelling that the edge looks up (I8).

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A DNS name in lower-case A-label form (RFC 5890), without a trailing dot, with at least two labels.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hostname(String);

/// The longest hostname, in bytes (RFC 1035 §2.3.4, without the root label).
pub const HOSTNAME_BYTES_MAX: usize = 253;

/// Why a text is not a public hostname.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("«{text}» is not a public hostname: {why}")]
pub struct HostnameError {
    /// What was given, cut to a printable length.
    pub text: String,
    /// The rule that it breaks.
    pub why: &'static str,
}

impl Hostname {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Hostname {
    type Err = HostnameError;

    fn from_str(text: &str) -> Result<Self, HostnameError> {
        let fail = |why| HostnameError { text: text.chars().take(64).collect(), why };
        let bare = text.strip_suffix('.').unwrap_or(text);
        if bare.len() > 4 * HOSTNAME_BYTES_MAX {
            return Err(fail("it is longer than 253 bytes"));
        }
        let ascii = idna::domain_to_ascii_strict(bare)
            .map_err(|_| fail("it breaks the rules of IDNA or of DNS labels"))?;
        if ascii.is_empty() || ascii.len() > HOSTNAME_BYTES_MAX {
            return Err(fail("it must have 1–253 bytes"));
        }
        if !ascii.contains('.') {
            return Err(fail("it needs at least two labels, as in app.example"));
        }
        if ascii.split('.').any(|l| l.is_empty() || l.len() > 63 || l.starts_with('-') || l.ends_with('-')) {
            return Err(fail("each label needs 1–63 bytes and no «-» at its ends"));
        }
        if ascii.bytes().any(|b| !matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.')) {
            return Err(fail("only letters, digits, «-» and «.» are allowed"));
        }
        // A name whose last label is a number is read as an IPv4 address by clients (WHATWG URL, RFC 1123 §2.1).
        if ascii.rsplit('.').next().is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit())) {
            return Err(fail("it looks like an IP address"));
        }
        Ok(Self(ascii))
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Serialize for Hostname {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Hostname {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn i08_every_spelling_of_a_name_is_one_name() {
        let one: Hostname = "bücher.example".parse().unwrap();
        assert_eq!(one.as_str(), "xn--bcher-kva.example");
        for same in ["BÜCHER.example.", "xn--bcher-kva.EXAMPLE", "Xn--Bcher-Kva.example"] {
            assert_eq!(same.parse::<Hostname>().unwrap(), one, "{same}");
        }
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in [
            "",
            ".",
            "localhost",
            "a..b",
            "-a.b",
            "a-.b",
            "a b.c",
            "*.a.b",
            "10.0.0.1",
            "a.b..",
            "[::1]",
            "a.b:80",
        ] {
            assert!(bad.parse::<Hostname>().is_err(), "{bad}");
        }
        assert!(format!("{}.example", "a".repeat(64)).parse::<Hostname>().is_err());
    }

    proptest! {
        #[test]
        fn i14_any_text_is_answered_and_the_result_is_stable(text in "\\PC{0,80}") {
            if let Ok(name) = text.parse::<Hostname>() {
                prop_assert_eq!(name.as_str().parse::<Hostname>().unwrap(), name);
            }
        }
    }
}
