//! Sealing with age: what only the holder of one X25519 key opens.
//!
//! A key is made by its holder, lies in a file of mode 0600, and shows nothing of itself. What is opened lies in memory
//! that is wiped. Who seals says in the sealed bytes what they are for, since age itself binds nothing but the key.

use std::fmt;
use std::io::{Read, Write};
use std::iter::once;
use std::str::FromStr;

use age::secrecy::ExposeSecret;
use zeroize::Zeroizing;

/// The most that one seal holds, in bytes. More than any sealed thing of ours has.
pub const SEALED_BYTES_MAX: usize = 1 << 20;
/// The most that one sealed part of a backup holds, in bytes.
pub const PART_BYTES_MAX: usize = 5 << 20;

/// Why something could not be sealed or opened. Never holds any of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The text is no key.
    #[error("The text is not an age identity (`AGE-SECRET-KEY-1…`); restore the file that held it.")]
    Key,
    /// The text is no recipient.
    #[error("The text is not an age recipient (`age1…`); ask its holder for it again.")]
    Recipient,
    /// There is too much of it.
    #[error("More than {SEALED_BYTES_MAX} bytes cannot be sealed or opened at once.")]
    TooLarge,
    /// Sealing failed.
    #[error("Sealing failed; the system's random source may be failing.")]
    Seal(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It is sealed to somebody else, or was changed.
    #[error("What is sealed cannot be opened by this key: it is sealed to another one, or was changed.")]
    Open(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// To whom things are sealed.
#[derive(Clone, PartialEq, Eq)]
pub struct SealTo(age::x25519::Recipient);

impl SealTo {
    /// Seals bytes. The same bytes sealed twice differ.
    ///
    /// # Errors
    /// [`SealError`] when there are too many, or without randomness.
    pub fn seal(&self, clear: &[u8]) -> Result<Vec<u8>, SealError> {
        if clear.len() > SEALED_BYTES_MAX {
            return Err(SealError::TooLarge);
        }
        self.seal_any(clear)
    }

    /// Seals a part of a backup, which may be larger: [`PART_BYTES_MAX`].
    ///
    /// # Errors
    /// As [`SealTo::seal`].
    pub fn seal_part(&self, clear: &[u8]) -> Result<Vec<u8>, SealError> {
        if clear.len() > PART_BYTES_MAX {
            return Err(SealError::TooLarge);
        }
        self.seal_any(clear)
    }

    fn seal_any(&self, clear: &[u8]) -> Result<Vec<u8>, SealError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| SealError::Seal(error);
        let encryptor =
            age::Encryptor::with_recipients(once(&self.0 as _)).map_err(|e| failed(Box::new(e)))?;
        let mut sealed = Vec::with_capacity(clear.len() + 512);
        let mut writer = encryptor.wrap_output(&mut sealed).map_err(|e| failed(Box::new(e)))?;
        writer.write_all(clear).map_err(|e| failed(Box::new(e)))?;
        writer.finish().map_err(|e| failed(Box::new(e)))?;
        Ok(sealed)
    }
}

impl fmt::Display for SealTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SealTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SealTo {
    type Err = SealError;

    fn from_str(text: &str) -> Result<SealTo, SealError> {
        text.parse().map(SealTo).map_err(|_| SealError::Recipient)
    }
}

/// A key that opens what is sealed to it.
#[derive(Clone)]
pub struct SealKey(age::x25519::Identity);

impl SealKey {
    /// Makes a new key from the system's randomness.
    pub fn generate() -> SealKey {
        SealKey(age::x25519::Identity::generate())
    }

    /// Its public half.
    pub fn recipient(&self) -> SealTo {
        SealTo(self.0.to_public())
    }

    /// The key as text, for the file that keeps it, and for sealing it in turn.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.to_string().expose_secret().to_owned())
    }

    /// Opens what was sealed to this key.
    ///
    /// # Errors
    /// [`SealError`] when it is sealed to another one, was changed, or is too large.
    pub fn open(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        if sealed.len() > SEALED_BYTES_MAX + 4_096 {
            return Err(SealError::TooLarge);
        }
        self.open_any(sealed)
    }

    /// Opens a part of a backup that was sealed to this key.
    ///
    /// # Errors
    /// As [`SealKey::open`].
    pub fn open_part(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        // Of 64 KiB each, age keeps 16 bytes more.
        if sealed.len() > PART_BYTES_MAX + PART_BYTES_MAX / 4_096 + 4_096 {
            return Err(SealError::TooLarge);
        }
        self.open_any(sealed)
    }

    fn open_any(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| SealError::Open(error);
        let decryptor = age::Decryptor::new_buffered(sealed).map_err(|e| failed(Box::new(e)))?;
        let mut reader = decryptor.decrypt(once(&self.0 as _)).map_err(|e| failed(Box::new(e)))?;
        // Room for all at once: a buffer that grew would leave copies behind.
        let mut clear = Zeroizing::new(Vec::with_capacity(sealed.len()));
        reader.read_to_end(&mut clear).map_err(|e| failed(Box::new(e)))?;
        Ok(clear)
    }
}

impl FromStr for SealKey {
    type Err = SealError;

    fn from_str(text: &str) -> Result<SealKey, SealError> {
        text.parse().map(SealKey).map_err(|_| SealError::Key)
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealKey(of {}, redacted)", self.0.to_public())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_key_opens_and_only_what_is_whole() {
        let (key, other) = (SealKey::generate(), SealKey::generate());
        let sealed = key.recipient().seal(b"hunter2").unwrap();
        assert_eq!(&key.open(&sealed).unwrap()[..], b"hunter2");
        assert!(matches!(other.open(&sealed), Err(SealError::Open(_))));
        assert_ne!(sealed, key.recipient().seal(b"hunter2").unwrap());
        assert!(!sealed.windows(7).any(|w| w == b"hunter2"));
        for at in (0..sealed.len()).step_by(7) {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(key.open(&changed).is_err(), "byte {at}");
            assert!(key.open(&sealed[..at]).is_err(), "cut at {at}");
        }
        assert!(matches!(key.recipient().seal(&vec![0; SEALED_BYTES_MAX + 1]), Err(SealError::TooLarge)));
    }

    #[test]
    fn i10_a_key_survives_its_text_and_shows_nothing_of_it() {
        let key = SealKey::generate();
        let text = key.to_text();
        let again: SealKey = text.parse().unwrap();
        assert_eq!(again.recipient(), key.recipient());
        let shown = format!("{key:?}");
        assert!(!shown.to_uppercase().contains("SECRET-KEY") && shown.contains("age1"), "{shown}");
        assert!(matches!("AGE-SECRET-KEY-1X".parse::<SealKey>(), Err(SealError::Key)));
        assert_eq!(key.recipient().to_string().parse::<SealTo>().unwrap(), key.recipient());
        assert!(matches!("age1x".parse::<SealTo>(), Err(SealError::Recipient)));
    }
}
