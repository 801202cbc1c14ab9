//! What the cluster's authority states outside of certificates, signed for one purpose.
//!
//! The signed bytes begin with the length of the purpose, so that no statement can pass as one for another purpose, and
//! none as a certificate, which begins otherwise.

use rcgen::SigningKey;
use rustls::SignatureScheme;

use crate::authority::{Authority, AuthorityError, CaCertificate};
use crate::certificate;

fn signed_bytes(purpose: &str, statement: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + purpose.len() + statement.len());
    bytes.extend_from_slice(&(purpose.len() as u64).to_be_bytes());
    bytes.extend_from_slice(purpose.as_bytes());
    bytes.extend_from_slice(statement);
    bytes
}

impl Authority {
    /// Signs a statement for a purpose: ECDSA P-256 with SHA-256, in DER.
    ///
    /// # Errors
    /// [`AuthorityError`] when the key cannot sign.
    pub fn sign_statement(&self, purpose: &str, statement: &[u8]) -> Result<Vec<u8>, AuthorityError> {
        let pair = self.key().pair()?;
        pair.sign(&signed_bytes(purpose, statement)).map_err(AuthorityError::Sign)
    }
}

impl CaCertificate {
    /// Whether this authority signed exactly this statement for exactly this purpose.
    pub fn has_signed(&self, purpose: &str, statement: &[u8], signature: &[u8]) -> bool {
        let Ok(parsed) = certificate::parse(self.der()) else { return false };
        let key = parsed.public_key().subject_public_key.data.as_ref();
        let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
        let of_scheme = algorithms.mapping.iter();
        let of_scheme = of_scheme.filter(|(scheme, _)| *scheme == SignatureScheme::ECDSA_NISTP256_SHA256);
        let bytes = signed_bytes(purpose, statement);
        of_scheme
            .flat_map(|(_, algorithms)| algorithms.iter())
            .any(|algorithm| algorithm.verify_signature(key, &bytes, signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn i06_only_the_authoritys_own_statement_for_its_purpose_counts() {
        let authority = Authority::create("01jdcluster", SystemTime::now()).unwrap();
        let signature = authority.sign_statement("a purpose", b"a statement").unwrap();
        let ca = authority.certificate();
        assert!(ca.has_signed("a purpose", b"a statement", &signature));
        assert!(!ca.has_signed("a purpose", b"a statemenu", &signature));
        assert!(!ca.has_signed("a purpos", b"ea statement", &signature));
        assert!(!ca.has_signed("another", b"a statement", &signature));
        for position in 0..signature.len() {
            let mut bad = signature.clone();
            bad[position] ^= 1;
            assert!(!ca.has_signed("a purpose", b"a statement", &bad), "byte {position}");
        }
        let other = Authority::create("01jdcluster", SystemTime::now()).unwrap();
        assert!(!other.certificate().has_signed("a purpose", b"a statement", &signature));
        assert!(!ca.has_signed("a purpose", b"a statement", b""));
    }
}
