//! The keys that open what is sealed to the cluster: one file in each member's folder, the newest key first.
//!
//! Every member holds the same keys, as it holds the CA's. A rotation adds a key; an old one goes when nothing is sealed
//! to it any more. Where and how the file is kept is this module's alone: a key manager outside would take its place.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use zeroize::Zeroizing;

use crate::files::{FileError, read_secret, write_secret};
use crate::sealing::{SealError, SealKey, SealTo};

/// Keys that a ring holds at most: the present one, and those of rotations that are not through.
pub const KEYS_MAX: usize = 8;

/// Why the keys could not be kept or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyRingError {
    /// The file could not be read or written.
    #[error("The file of the cluster's sealing keys cannot be used.")]
    File(#[from] FileError),
    /// A line is no key.
    #[error("The sealing keys cannot be understood; restore the file from another member.")]
    Key(#[from] SealError),
    /// Too many rotations are under way.
    #[error("The ring holds {KEYS_MAX} keys; wait until an earlier rotation is through.")]
    Full,
    /// No key of ours opens it.
    #[error(
        "This member does not have the key to {0} yet; it asks the others for it. Try again in a moment."
    )]
    Missing(String),
}

/// The keys of a member.
#[derive(Debug)]
pub struct KeyRing {
    path: PathBuf,
    keys: Mutex<Vec<SealKey>>,
}

impl KeyRing {
    /// Reads the ring at `path`; a file that is not there is a ring without keys.
    ///
    /// # Errors
    /// [`KeyRingError`] when the file is exposed or damaged.
    pub fn open(path: &Path) -> Result<KeyRing, KeyRingError> {
        let keys = match path.exists() {
            true => parse(&read_secret(path)?)?,
            false => Vec::new(),
        };
        Ok(KeyRing { path: path.to_owned(), keys: Mutex::new(keys) })
    }

    fn keys(&self) -> std::sync::MutexGuard<'_, Vec<SealKey>> {
        // Keys are replaced as a whole: whoever panicked left a whole ring.
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest key's recipient.
    pub fn newest(&self) -> Option<SealTo> {
        self.keys().first().map(SealKey::recipient)
    }

    /// Whether the ring has the key to `recipient`.
    pub fn has(&self, recipient: &str) -> bool {
        self.keys().iter().any(|key| key.recipient().to_string() == recipient)
    }

    /// Makes a new key, on disk before this returns.
    ///
    /// # Errors
    /// [`KeyRingError`] when the ring is full or the file cannot be written.
    pub fn add_new(&self) -> Result<SealTo, KeyRingError> {
        let key = SealKey::generate();
        let recipient = key.recipient();
        self.change(|keys| keys.insert(0, key))?;
        Ok(recipient)
    }

    /// Takes over keys that another member has, before the own ones: they may be newer, and what is taken for the newest
    /// is never dropped by [`keep_only`](Self::keep_only)'s callers before it is in use.
    ///
    /// # Errors
    /// [`KeyRingError`] when they are no keys, too many, or the file cannot be written.
    pub fn merge(&self, text: &[u8]) -> Result<(), KeyRingError> {
        let theirs = parse(text)?;
        self.change(|keys| {
            let is_new = |key: &SealKey| !keys.iter().any(|own| own.recipient() == key.recipient());
            let new: Vec<_> = theirs.into_iter().filter(is_new).collect();
            keys.splice(0..0, new);
        })
    }

    /// Drops every key but the one to `recipient`, when nothing is sealed to the others any more.
    ///
    /// # Errors
    /// When the key is not there, or the file cannot be written.
    pub fn keep_only(&self, recipient: &str) -> Result<(), KeyRingError> {
        if !self.has(recipient) {
            return Err(KeyRingError::Missing(recipient.to_owned()));
        }
        self.change(|keys| keys.retain(|key| key.recipient().to_string() == recipient))
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys().is_empty()
    }

    /// Opens what is sealed to `recipient`.
    ///
    /// # Errors
    /// [`KeyRingError`] when its key is not here, or the seal is broken.
    pub fn open_sealed(&self, recipient: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyRingError> {
        let found = self.keys().iter().find(|key| key.recipient().to_string() == recipient).cloned();
        let key = found.ok_or_else(|| KeyRingError::Missing(recipient.to_owned()))?;
        Ok(key.open(sealed)?)
    }

    /// Every key as text, for another member.
    pub fn to_text(&self) -> Zeroizing<String> {
        text_of(&self.keys())
    }

    fn change(&self, act: impl FnOnce(&mut Vec<SealKey>)) -> Result<(), KeyRingError> {
        let mut keys = self.keys();
        let mut next = keys.clone();
        act(&mut next);
        if next.len() > KEYS_MAX {
            return Err(KeyRingError::Full);
        }
        let same = next.iter().map(SealKey::recipient).eq(keys.iter().map(SealKey::recipient));
        if !same {
            write_secret(&self.path, text_of(&next).as_bytes())?;
            *keys = next;
        }
        Ok(())
    }
}

fn text_of(keys: &[SealKey]) -> Zeroizing<String> {
    let texts: Vec<_> = keys.iter().map(SealKey::to_text).collect();
    let mut text = Zeroizing::new(String::with_capacity(texts.iter().map(|t| t.len() + 1).sum()));
    for line in &texts {
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn parse(text: &[u8]) -> Result<Vec<SealKey>, KeyRingError> {
    let text = std::str::from_utf8(text).map_err(|_| SealError::Key)?;
    let lines = text.lines().filter(|line| !line.is_empty());
    let keys = lines.map(str::parse).collect::<Result<Vec<SealKey>, _>>()?;
    if keys.len() > KEYS_MAX { Err(KeyRingError::Full) } else { Ok(keys) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_come_back_from_their_file_and_spread_by_merging() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sealing.keys");
        let ring = KeyRing::open(&path).unwrap();
        assert!(ring.is_empty() && ring.newest().is_none());
        let first = ring.add_new().unwrap();
        let sealed = first.seal(b"s").unwrap();
        let second = ring.add_new().unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!((ring.newest(), mode), (Some(second.clone()), 0o600));
        let again = KeyRing::open(&path).unwrap();
        assert_eq!(&again.open_sealed(&first.to_string(), &sealed).unwrap()[..], b"s");

        let other = KeyRing::open(&folder.path().join("other.keys")).unwrap();
        let missing = other.open_sealed(&first.to_string(), &sealed);
        assert!(matches!(missing, Err(KeyRingError::Missing(_))));
        for _ in 0..2 {
            other.merge(ring.to_text().as_bytes()).unwrap();
            assert_eq!((other.len(), other.newest()), (2, Some(second.clone())));
        }
        assert_eq!(&other.open_sealed(&first.to_string(), &sealed).unwrap()[..], b"s");
        // A key that was just made elsewhere is the newest here, too.
        let third = ring.add_new().unwrap();
        other.merge(ring.to_text().as_bytes()).unwrap();
        assert_eq!((other.len(), other.newest()), (3, Some(third)));
        other.keep_only(&second.to_string()).unwrap();
        assert_eq!((other.len(), other.has(&first.to_string())), (1, false));
        assert!(other.keep_only(&first.to_string()).is_err() && other.len() == 1);
        assert!(other.merge(b"rubbish").is_err() && other.len() == 1);
    }

    #[test]
    fn i10_an_exposed_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sealing.keys");
        KeyRing::open(&path).unwrap().add_new().unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(KeyRing::open(&path), Err(KeyRingError::File(FileError::Exposed { .. }))));
    }
}
