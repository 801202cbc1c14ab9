//! A bundle of secrets and the file that it becomes in a guest: `/run/secrets/platform.env`.
//!
//! The form is fixed (`docs/formats/secrets.md`): one bundle has one file, so that its digest says whether two bundles
//! are the same. Values are held in memory that is wiped, show nothing of themselves, and are compared nowhere. Every
//! byte may come from outside (I14); an error names a key or a line, never a value (I10).

use crate::limits::{SECRET_KEY_BYTES_MAX, SECRET_VALUE_BYTES_MAX, SECRETS_FILE_BYTES_MAX, SECRETS_MAX};
use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use zeroize::Zeroizing;

/// The first line of the file: its form and version.
pub const HEADER: &str = "# HOLDFAST_SECRETS_V1";
/// What a value begins with that stands in base64.
const BASE64_PREFIX: &str = "base64:";

/// Why a bundle cannot be. Names keys and lines, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretsError {
    /// A key has another form.
    #[error("a secret's key has A–Z, 0–9 and «_», does not begin with a digit, and has at most 128 bytes")]
    Key,
    /// A value is too long.
    #[error("the value of «{0}» is longer than 64 KiB: store it in a volume or an image instead")]
    ValueTooLong(SecretKey),
    /// There are too many keys.
    #[error("a bundle has at most 256 keys: remove some first")]
    TooManyKeys,
    /// The file is too long.
    #[error("a bundle's file has at most 256 KiB: shorten or remove values first")]
    TooLong,
    /// A key stands there twice.
    #[error("the key «{0}» stands there twice: keep one of them")]
    Twice(SecretKey),
    /// A line is not `KEY=VALUE`.
    #[error("line {0} is not KEY=VALUE")]
    Line(usize),
    /// A value says that it is base64 and is not.
    #[error("the value of «{0}» begins with «base64:» and is not padded base64 (RFC 4648)")]
    Base64(SecretKey),
    /// It is not UTF-8.
    #[error("the file is not UTF-8: write such values as «base64:» and padded base64 (RFC 4648)")]
    NotUtf8,
    /// It is no file of this version, or not in the one form that a bundle has.
    #[error("the file is not in the canonical form of «{HEADER}»")]
    NotCanonical,
}

/// A secret's name: `[A-Z_][A-Z0-9_]*`, at most 128 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretKey(String);

impl SecretKey {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SecretKey {
    type Err = SecretsError;

    fn from_str(text: &str) -> Result<Self, SecretsError> {
        let bytes = text.as_bytes();
        let ok = matches!(bytes.first(), Some(b'A'..=b'Z' | b'_'))
            && bytes.len() <= SECRET_KEY_BYTES_MAX
            && bytes.iter().all(|b| matches!(b, b'A'..=b'Z' | b'0'..=b'9' | b'_'));
        // What is no key may be a value that was put in its place: it is not repeated.
        if ok { Ok(Self(text.to_owned())) } else { Err(SecretsError::Key) }
    }
}

impl fmt::Display for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Serialize for SecretKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SecretKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

/// A secret's value in clear, in memory that is wiped. In JSON it is padded base64, elsewhere its bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Zeroizing<Vec<u8>>);

impl SecretValue {
    /// The value with these bytes.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }

    /// The bytes, for whoever seals them or writes them where they belong.
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }

    /// The bytes that its line takes in the file.
    pub fn line_bytes(&self, key: &SecretKey) -> usize {
        let value = if self.is_plain() {
            self.0.len()
        } else {
            BASE64_PREFIX.len() + BASE64.encode_len(self.0.len())
        };
        key.0.len() + 1 + value + 1
    }

    /// Whether it stands in the file as it is.
    fn is_plain(&self) -> bool {
        std::str::from_utf8(&self.0).is_ok()
            && !self.0.iter().any(|b| matches!(b, b'\n' | b'\r' | 0))
            && !self.0.starts_with(BASE64_PREFIX.as_bytes())
    }

    fn write(&self, file: &mut Vec<u8>) {
        if self.is_plain() {
            file.extend_from_slice(&self.0);
        } else {
            file.extend_from_slice(BASE64_PREFIX.as_bytes());
            let text = Zeroizing::new(BASE64.encode(&self.0));
            file.extend_from_slice(text.as_bytes());
        }
    }

    fn read(key: &SecretKey, text: &[u8]) -> Result<Self, SecretsError> {
        let Some(encoded) = text.strip_prefix(BASE64_PREFIX.as_bytes()) else {
            return Ok(Self(Zeroizing::new(text.to_vec())));
        };
        let decoded = BASE64.decode(encoded).map_err(|_| SecretsError::Base64(key.clone()))?;
        Ok(Self(Zeroizing::new(decoded)))
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(redacted)")
    }
}

impl Serialize for SecretValue {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if !s.is_human_readable() {
            return s.serialize_bytes(&self.0);
        }
        let text = Zeroizing::new(BASE64.encode(&self.0));
        s.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for SecretValue {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        // Any, and not a text: a reader of JSON that expects a text repeats the number that it finds in its place.
        if d.is_human_readable() { d.deserialize_any(Base64Text) } else { d.deserialize_bytes(Base64Text) }
    }
}

/// Padded base64, or bytes. Serde's own words for what is no text would repeat it, and the decoder's would name a character.
struct Base64Text;

impl Base64Text {
    fn refuse<E: de::Error>() -> E {
        E::custom("a secret's value must be padded base64 (RFC 4648)")
    }
}

impl de::Visitor<'_> for Base64Text {
    type Value = SecretValue;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("padded base64")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<SecretValue, E> {
        let bytes = BASE64.decode(text.as_bytes()).map_err(|_| Self::refuse())?;
        Ok(SecretValue(Zeroizing::new(bytes)))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<SecretValue, E> {
        Ok(SecretValue(Zeroizing::new(bytes.to_vec())))
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<SecretValue, E> {
        Err(Self::refuse())
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<SecretValue, E> {
        Err(Self::refuse())
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<SecretValue, E> {
        Err(Self::refuse())
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<SecretValue, E> {
        Err(Self::refuse())
    }
}

/// Every secret of an env, in clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bundle(BTreeMap<SecretKey, SecretValue>);

impl Bundle {
    /// Adds a secret that is not there yet.
    ///
    /// # Errors
    /// When a limit would be passed, or the key is there.
    pub fn add(&mut self, key: SecretKey, value: SecretValue) -> Result<(), SecretsError> {
        check_value(&key, &value)?;
        if self.0.len() >= SECRETS_MAX {
            return Err(SecretsError::TooManyKeys);
        }
        if self.0.contains_key(&key) {
            return Err(SecretsError::Twice(key));
        }
        self.0.insert(key, value);
        if self.file_bytes() > SECRETS_FILE_BYTES_MAX { Err(SecretsError::TooLong) } else { Ok(()) }
    }

    /// The secrets, in the order of their keys' bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&SecretKey, &SecretValue)> {
        self.0.iter()
    }

    /// The secrets by key.
    pub fn into_map(self) -> BTreeMap<SecretKey, SecretValue> {
        self.0
    }

    fn file_bytes(&self) -> usize {
        HEADER.len() + 1 + self.0.iter().map(|(key, value)| value.line_bytes(key)).sum::<usize>()
    }

    /// The one file of this bundle.
    pub fn to_file(&self) -> Zeroizing<Vec<u8>> {
        // Sized at once: a buffer that grew would leave copies behind.
        let mut file = Zeroizing::new(Vec::with_capacity(self.file_bytes()));
        file.extend_from_slice(HEADER.as_bytes());
        file.push(b'\n');
        for (key, value) in &self.0 {
            file.extend_from_slice(key.0.as_bytes());
            file.push(b'=');
            value.write(&mut file);
            file.push(b'\n');
        }
        file
    }

    /// The digest of the canonical file: SHA-256. It would confirm a guess, so it is shown to whom the values are.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&*self.to_file()).into()
    }

    /// Reads a file that is in the canonical form, and no other.
    ///
    /// # Errors
    /// When it is not.
    pub fn from_file(file: &[u8]) -> Result<Self, SecretsError> {
        if file.len() > SECRETS_FILE_BYTES_MAX {
            return Err(SecretsError::TooLong);
        }
        let text = std::str::from_utf8(file).map_err(|_| SecretsError::NotUtf8)?;
        let body = text.strip_prefix(HEADER).and_then(|rest| rest.strip_prefix('\n'));
        let bundle = Self::read_lines(body.ok_or(SecretsError::NotCanonical)?, 2)?;
        if *bundle.to_file() == file { Ok(bundle) } else { Err(SecretsError::NotCanonical) }
    }

    /// Reads what a person wrote: lines `KEY=VALUE` in any order, with or without the first line; empty lines and lines
    /// that begin with `#` say nothing. Values are taken as they stand, but for `base64:`.
    ///
    /// # Errors
    /// When a line is something else, a key stands there twice, or a limit is passed.
    pub fn import(text: &[u8]) -> Result<Self, SecretsError> {
        if text.len() > 2 * SECRETS_FILE_BYTES_MAX {
            return Err(SecretsError::TooLong);
        }
        let text = std::str::from_utf8(text).map_err(|_| SecretsError::NotUtf8)?;
        let mut bundle = Self::default();
        for (at, line) in text.lines().enumerate() {
            if !line.is_empty() && !line.starts_with('#') {
                bundle.read_line(line, at + 1)?;
            }
        }
        Ok(bundle)
    }

    fn read_lines(body: &str, first: usize) -> Result<Self, SecretsError> {
        let mut bundle = Self::default();
        for (at, line) in body.split_terminator('\n').enumerate() {
            bundle.read_line(line, at + first)?;
        }
        Ok(bundle)
    }

    fn read_line(&mut self, line: &str, at: usize) -> Result<(), SecretsError> {
        let (key, value) = line.split_once('=').ok_or(SecretsError::Line(at))?;
        // A line that is no KEY=VALUE may be part of a value: its words are not repeated.
        let key: SecretKey = key.parse().map_err(|_| SecretsError::Line(at))?;
        let value = SecretValue::read(&key, value.as_bytes())?;
        self.add(key, value)
    }
}

/// Refuses a value that no bundle takes.
///
/// # Errors
/// [`SecretsError::ValueTooLong`].
pub fn check_value(key: &SecretKey, value: &SecretValue) -> Result<(), SecretsError> {
    match value.reveal().len() <= SECRET_VALUE_BYTES_MAX {
        true => Ok(()),
        false => Err(SecretsError::ValueTooLong(key.clone())),
    }
}

#[cfg(test)]
#[path = "secrets/tests.rs"]
mod tests;
