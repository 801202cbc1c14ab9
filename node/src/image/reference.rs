//! The name of an image: `host[:port]/repository[:tag][@sha256:…]`.
//!
//! The host is always written out: there is no default registry that a typing mistake could fall into.
//! A registry is spoken to over HTTPS; plain HTTP is for loopback addresses alone, and that is decided here,
//! from the name, so that no setting and no redirect can widen it.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::auth::Login;
use super::digest::{Digest, DigestError};

/// A reference's length in bytes, at most.
pub const REFERENCE_BYTES_MAX: usize = 512;
/// A repository's length in bytes, at most (the distribution specification's own limit).
pub const REPOSITORY_BYTES_MAX: usize = 255;
/// A tag's length in bytes, at most.
pub const TAG_BYTES_MAX: usize = 128;
/// The tag that is meant when neither tag nor digest is written.
const TAG_DEFAULT: &str = "latest";

/// Why a text is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReferenceError {
    /// Longer than [`REFERENCE_BYTES_MAX`].
    #[error("the image reference has {bytes} bytes; at most {REFERENCE_BYTES_MAX} are allowed")]
    TooLong {
        /// How long it was.
        bytes: usize,
    },
    /// No registry host in front.
    #[error(
        "the image reference {reference:?} does not begin with a registry; write it out, as in docker.io/library/nginx:1.27"
    )]
    NoHost {
        /// What was given.
        reference: String,
    },
    /// The host or port is malformed.
    #[error(
        "{host:?} is not a registry host; write a DNS name, an IPv4 address or an [IPv6] address, and a :port if needed"
    )]
    Host {
        /// What was given.
        host: String,
    },
    /// The repository is malformed.
    #[error(
        "{repository:?} is not a repository; its parts hold a-z and 0-9, joined by '.', '_', '__' or '-', and are divided by '/'"
    )]
    Repository {
        /// What was given.
        repository: String,
    },
    /// The tag is malformed.
    #[error(
        "{tag:?} is not a tag; it has 1 to 128 letters, digits, '_', '.' or '-', and begins with none of the last two"
    )]
    Tag {
        /// What was given.
        tag: String,
    },
    /// The digest is malformed.
    #[error("the image reference ends in an unusable digest")]
    Digest(#[source] DigestError),
}

/// A parsed image reference. [`fmt::Display`] writes it back as it was read.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    /// Host and port as written, e.g. `registry.example:5000`.
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
    /// With which it is pulled; no part of its name.
    login: Option<Login>,
}

impl PartialEq for ImageRef {
    fn eq(&self, other: &Self) -> bool {
        let name =
            |image: &Self| (image.host.clone(), image.repository.clone(), image.tag.clone(), image.digest);
        name(self) == name(other)
    }
}

impl Eq for ImageRef {}

impl ImageRef {
    /// The login with which it is pulled.
    pub(crate) fn login(&self) -> Option<&Login> {
        self.login.as_ref()
    }

    /// The same image, pulled with this login.
    pub fn with_login(&self, login: Option<Login>) -> ImageRef {
        ImageRef { login, ..self.clone() }
    }

    /// Whether its registry is on this machine's own loopback.
    pub fn is_on_loopback(&self) -> bool {
        is_loopback(&self.host)
    }

    /// The registry's host, with its port if one was written.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was written.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was written.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same image, pinned to this digest.
    pub fn with_digest(&self, digest: Digest) -> ImageRef {
        ImageRef { digest: Some(digest), ..self.clone() }
    }

    /// What a manifest is asked for by: the digest where there is one, else the tag, else `latest`.
    pub(crate) fn manifest_key(&self) -> String {
        match (self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => TAG_DEFAULT.to_owned(),
        }
    }

    /// `http://host` for a loopback registry, `https://host` for every other.
    pub(crate) fn endpoint(&self) -> String {
        match self.host.as_str() {
            // Docker Hub serves its registry under another name than the one its images carry.
            "docker.io" => "https://registry-1.docker.io".to_owned(),
            host if is_loopback(host) => format!("http://{host}"),
            host => format!("https://{host}"),
        }
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<ImageRef, ReferenceError> {
        if text.len() > REFERENCE_BYTES_MAX {
            return Err(ReferenceError::TooLong { bytes: text.len() });
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse().map_err(ReferenceError::Digest)?)),
            None => (text, None),
        };
        let (host, path) =
            name.split_once('/').ok_or_else(|| ReferenceError::NoHost { reference: text.to_owned() })?;
        if !(host.contains(['.', ':', '[']) || host == "localhost") {
            return Err(ReferenceError::NoHost { reference: text.to_owned() });
        }
        if !is_host_and_port(host) {
            return Err(ReferenceError::Host { host: host.to_owned() });
        }
        let (repository, tag) = match path.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path, None),
        };
        if !is_repository(repository) {
            return Err(ReferenceError::Repository { repository: repository.to_owned() });
        }
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag { tag: tag.to_owned() });
        }
        Ok(ImageRef {
            host: host.to_owned(),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
            login: None,
        })
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ReferenceError;

    fn try_from(text: String) -> Result<ImageRef, ReferenceError> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(reference: ImageRef) -> String {
        reference.to_string()
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Host and port apart; an IPv6 host keeps its brackets. None if the port is malformed.
fn split_port(host: &str) -> Option<(&str, Option<u16>)> {
    let after_brackets = host.rfind(']').map_or(0, |end| end + 1);
    match host[after_brackets..].find(':') {
        None => Some((host, None)),
        Some(colon) => {
            let (name, port) = host.split_at(after_brackets + colon);
            let digits = &port[1..];
            let plain = !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
            Some((name, Some(digits.parse().ok().filter(|_| plain)?)))
        }
    }
}

fn is_host_and_port(host: &str) -> bool {
    let Some((name, _)) = split_port(host) else { return false };
    if let Some(inner) = name.strip_prefix('[') {
        return inner.strip_suffix(']').is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if !name.split('.').all(is_label) || name.len() > 253 {
        return false;
    }
    // A name whose last label is a number is an IPv4 address or nothing (WHATWG URL has the same rule).
    let numeric_end = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    !numeric_end || name.parse::<Ipv4Addr>().is_ok()
}

/// Whether a host, with or without a port, is this machine itself.
pub(crate) fn is_loopback(host: &str) -> bool {
    let Some((name, _)) = split_port(host) else { return false };
    name == "localhost"
        || name.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || name
            .strip_prefix('[')
            .and_then(|inner| inner.strip_suffix(']'))
            .and_then(|address| address.parse::<Ipv6Addr>().ok())
            .is_some_and(|address| address.is_loopback())
}

fn is_repository(repository: &str) -> bool {
    repository.len() <= REPOSITORY_BYTES_MAX && repository.split('/').all(is_repository_part)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_repository_part(part: &str) -> bool {
    let is_alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    is_alphanumeric(first)
        && is_alphanumeric(last)
        && bytes.split(is_alphanumeric).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&b| b == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=TAG_BYTES_MAX).contains(&tag.len())
        && tag.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
        && tag.bytes().next().is_some_and(is_word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_are_found() {
        let digest = Digest::of(b"m");
        let image: ImageRef = format!("[::1]:5000/team/web_app:v1.2@{digest}").parse().unwrap();
        assert_eq!(image.host(), "[::1]:5000");
        assert_eq!(image.repository(), "team/web_app");
        assert_eq!(image.tag(), Some("v1.2"));
        assert_eq!(image.digest(), Some(digest));
        assert_eq!(image.manifest_key(), digest.to_string());
    }

    #[test]
    fn plain_http_is_for_loopback_alone() {
        for (reference, endpoint) in [
            ("localhost/a", "http://localhost"),
            ("localhost:5000/a", "http://localhost:5000"),
            ("127.0.0.1:5000/a", "http://127.0.0.1:5000"),
            ("127.3.2.1/a", "http://127.3.2.1"),
            ("[::1]:5000/a", "http://[::1]:5000"),
            ("[::2]:5000/a", "https://[::2]:5000"),
            ("10.0.0.1:5000/a", "https://10.0.0.1:5000"),
            ("127.0.0.1.example/a", "https://127.0.0.1.example"),
            ("localhost.example/a", "https://localhost.example"),
            ("docker.io/library/nginx", "https://registry-1.docker.io"),
        ] {
            assert_eq!(reference.parse::<ImageRef>().unwrap().endpoint(), endpoint, "{reference}");
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        for bad in [
            "",
            "nginx",
            "library/nginx",
            "/nginx",
            "h.example/",
            "h.example/a/",
            "h.example//a",
            "h.example/A",
            "h.example/a..b",
            "h.example/a___b",
            "h.example/-a",
            "h.example/../a",
            "h.example/a:",
            "h.example/a:.x",
            "h.example/a:b:c",
            "h.example/a@",
            "h.example/a@sha256:12",
            "h.example/a@sha256:12@sha256:12",
            "h.example:/a",
            "h.example:0/a",
            "h.example:080/a",
            "h.example:65536/a",
            "h.example:+80/a",
            "H.example/a",
            "user@h.example/a",
            "h_h.example/a",
            "-h.example/a",
            "h..example/a",
            "[::1/a",
            "[::1]x/a",
            "[::1%lo]/a",
            "::1/a",
            "1.2.3/a",
            "1.2.3.400/a",
            "h.example/a b",
            "h.example/a\n",
            "https://h.example/a",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?}");
        }
        assert!(format!("h.example/{}", "a".repeat(256)).parse::<ImageRef>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,80}") {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string(), text);
            }
        }

        #[test]
        fn well_formed_references_survive_a_round_trip(
            text in "(localhost|[a-z]{1,9}\\.[a-z]{2,5}|\\[::1\\])(:[1-9][0-9]{0,3})?/[a-z0-9]{1,5}([._/-][a-z0-9]{1,5}){0,4}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,9})?(@sha256:[0-9a-f]{64})?"
        ) {
            let image: ImageRef = text.parse().unwrap();
            prop_assert_eq!(image.to_string(), text.clone());
            let json = serde_json::to_string(&image).unwrap();
            prop_assert_eq!(serde_json::from_str::<ImageRef>(&json).unwrap(), image);
        }

        #[test]
        fn no_reference_reaches_a_foreign_host_in_clear(
            text in "[a-z0-9.\\[\\]:]{1,20}/[a-z]{1,3}"
        ) {
            if let Ok(image) = text.parse::<ImageRef>()
                && image.endpoint().starts_with("http://")
            {
                let host = image.host();
                prop_assert!(
                    host == "localhost" || host.starts_with("localhost:") || host.starts_with("127.")
                        || host.starts_with('['),
                    "{}", host
                );
            }
        }
    }
}
