//! Private keys: made by their holder, wiped when dropped, never printed.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

/// Tag of a private key in a PEM file.
pub(crate) const KEY_TAG: &str = "PRIVATE KEY";
/// Tag of a signing request in a PEM file.
pub(crate) const REQUEST_TAG: &str = "CERTIFICATE REQUEST";

/// Why a key could not be made or read. Never holds any of the key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The system gave no randomness or the key could not be built from it.
    #[error("A new private key could not be generated; the system's random source may be failing.")]
    Generate(#[source] rcgen::Error),
    /// The bytes are not a key of the kind that this product uses.
    #[error(
        "The private key is not a PKCS#8 ECDSA P-256 key; restore the file from where it was written, or enrol again."
    )]
    Parse(#[source] rcgen::Error),
    /// A signing request could not be signed.
    #[error("A signing request could not be made with this key.")]
    Request(#[source] rcgen::Error),
}

/// An ECDSA P-256 private key in PKCS#8.
pub struct PrivateKey {
    der: Zeroizing<Vec<u8>>,
}

impl PrivateKey {
    /// Makes a new key from the system's randomness.
    ///
    /// # Errors
    /// [`KeyError::Generate`] when there is none.
    pub fn generate() -> Result<PrivateKey, KeyError> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(KeyError::Generate)?;
        Ok(PrivateKey::from_pair(pair))
    }

    /// Reads a key from PKCS#8 DER.
    ///
    /// # Errors
    /// [`KeyError::Parse`] when it is anything else.
    pub fn from_der(der: &[u8]) -> Result<PrivateKey, KeyError> {
        let pair = pair_from_der(der).map_err(KeyError::Parse)?;
        Ok(PrivateKey::from_pair(pair))
    }

    /// The PKCS#8 bytes, for the file that keeps the key and for nothing else.
    pub(crate) fn der(&self) -> &[u8] {
        &self.der
    }

    /// Makes a signing request in PEM: the public key, and the proof that its holder has the private one. It asks for
    /// no name, because the authority would ignore it.
    ///
    /// # Errors
    /// [`KeyError::Request`] when signing fails.
    pub fn signing_request(&self) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&*self.pair()?).map_err(KeyError::Request)?;
        Ok(pem::encode(&pem::Pem::new(REQUEST_TAG, request.der().as_ref())))
    }

    /// The key in the form that signs; wiped after use, as it holds a copy of the bytes.
    pub(crate) fn pair(&self) -> Result<Zeroizing<KeyPair>, KeyError> {
        pair_from_der(&self.der).map(Zeroizing::new).map_err(KeyError::Parse)
    }

    /// A copy in the form that rustls takes; rustls wipes nothing, so it is made only when a configuration is.
    pub(crate) fn rustls(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.der.to_vec()))
    }

    fn from_pair(mut pair: KeyPair) -> PrivateKey {
        let der = Zeroizing::new(pair.serialized_der().to_vec());
        zeroize::Zeroize::zeroize(&mut pair);
        PrivateKey { der }
    }
}

fn pair_from_der(der: &[u8]) -> Result<KeyPair, rcgen::Error> {
    KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(der), &PKCS_ECDSA_P256_SHA256)
}

impl Clone for PrivateKey {
    fn clone(&self) -> PrivateKey {
        PrivateKey { der: self.der.clone() }
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i10_debug_shows_nothing_of_the_key() {
        let key = PrivateKey::generate().unwrap();
        assert_eq!(format!("{key:?}"), "PrivateKey(redacted)");
    }

    #[test]
    fn key_round_trips_and_rubbish_is_refused() {
        let key = PrivateKey::generate().unwrap();
        let again = PrivateKey::from_der(key.der()).unwrap();
        assert_eq!(key.der(), again.der());
        assert!(matches!(PrivateKey::from_der(b"rubbish"), Err(KeyError::Parse(_))));
    }
}
